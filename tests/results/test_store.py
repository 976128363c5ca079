"""The run directory: what is in it, how it is cut, what names become, what a marker vouches for."""

from __future__ import annotations

import json
import shutil
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task, open_run
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.results import RunWriter, create, read_manifest, required_bytes
from lca_posthoc.results.keys import encode_all
from lca_posthoc.results.layout import plan_arrays
from lca_posthoc.results.metadata import metadata_files

HOSTILE = [
    *(
        "a/b",
        "..",
        ".",
        "zarr.json",
        "<script>",
        "$\\frac{$",
        "A",
        "a",
        "ß" * 200,
        "\x1b[31m",
        "c",
        "%41",
        "x" * 10_000,
    ),
    *(
        "[bold red]x[/]",
        "<img src=x onerror=alert(1)>",
        "**b**`c`",
        "n" * 300,
        "N" * 300,
        "edge",
        "step_end",
    ),
]


class Hostile(torch.nn.Module):
    """Parameters with names from hell, a scalar and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self._parameters[name] = torch.nn.Parameter(torch.full((3,), 0.1))
        self.scalar = torch.nn.Parameter(torch.tensor(1.0))
        self.empty = torch.nn.Parameter(torch.zeros(0, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (
            self.scalar * inputs @ torch.stack([self._parameters[name] for name in HOSTILE]).sum(0)
            + self.empty.sum()
        )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(7, 3, generator=generator), torch.randn(7, generator=generator)
    model = Hostile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(root / "ck", model) as recorder:
        for step in range(6):
            recorder.save(step)
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    task = Task(
        Hostile,
        {"train": (inputs, targets)},
        {"a/../b": Loss(F.mse_loss), "A/../b": Loss(F.mse_loss)},
    )
    lca_posthoc.run(
        root / "ck", task, losses=["all"], out=root / "run.lca", cluster="inline", span=2
    )
    return root / "run.lca"


def test_hostile_names_stay_inside_and_come_back(hostile: Path) -> None:
    run = open_run(hostile)
    assert list(run) == ["a/../b", "A/../b"]
    assert set(run["a/../b"].allocation) == {*HOSTILE, "scalar", "empty"}
    assert run["a/../b"].allocation["a/b"].dims == ("step", "a/b:0")
    assert run["a/../b"].allocation["scalar"].dims == ("step",)
    assert run["a/../b"].allocation["empty"].shape == (5, 0, 4)
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["ck", "run.lca"]
    assert {path.name for path in hostile.iterdir()} == {
        "run.json",
        "data.zarr",
        "commits",
        "partial",
        "log",
        "lock",
    }


def test_the_store_opens_without_this_package(hostile: Path) -> None:
    tree = xr.open_datatree(hostile / "data.zarr", engine="zarr", consolidated=False)
    groups = [node for node in tree.children.values() if node.attrs["loss"] == "a/../b"]
    assert len(groups) == 1
    allocation = groups[0]["allocation"].to_dataset()
    assert {variable.attrs["name"] for variable in allocation.data_vars.values()} == {
        *HOSTILE,
        "scalar",
        "empty",
    }
    assert allocation.step.values.tolist() == list(range(5))


@given(
    st.lists(st.text(max_size=300), unique=True, max_size=8),
    st.lists(st.text(max_size=5), max_size=3),
)
def test_keys_are_safe_distinct_and_reversible_where_they_are_short(
    names: list[str], taken: list[str]
) -> None:
    names = [name.encode("utf-8", "ignore").decode() for name in names]
    names = list(dict.fromkeys(names))
    keys = encode_all(names, encode_all(taken).values())
    assert len({key.casefold() for key in keys.values()}) == len(names)
    for name, key in keys.items():
        assert key not in ("", ".", "..", "zarr.json")
        assert not key.startswith("__")
        assert set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-%")
        assert len(key) <= 140
        assert (unquote(key) if name else "") == name or len(key.rpartition("-")[2]) == 12


def test_a_loss_key_never_changes_when_losses_join() -> None:
    first = encode_all(["Train"])
    assert encode_all(["train"], first.values()) != {"train": "train"}
    assert first == {"Train": "Train"}


def chunk_files(run: Path, loss: str) -> set[str]:
    """Chunks of results; the coordinates follow from `run.json`."""
    place = run / "data.zarr" / read_manifest(run).losses[loss].key
    found = {path for path in place.rglob("c/**/*") if path.is_file()}
    known = {place / path for path, _ in metadata_files(read_manifest(run), loss)}
    return {path.relative_to(run).as_posix() for path in found - known}


def test_markers_hold_size_and_checksum_of_every_chunk(hostile: Path) -> None:
    vouched: dict[str, list[int]] = {}
    for marker in open_run(hostile)["a/../b"].markers:
        assert not vouched.keys() & marker["files"].keys()
        vouched |= marker["files"]
    assert vouched.keys() == chunk_files(hostile, "a/../b")
    for name, (size, crc) in vouched.items():
        data = (hostile / name).read_bytes()
        assert (len(data), zlib.crc32(data)) == (size, crc)
    contents = {(hostile / name).read_bytes() for name in vouched}
    assert len({crc for _, crc in vouched.values()}) == len(contents) > 20


def test_chunk_rows_are_spans_and_about_a_mebibyte(hostile: Path) -> None:
    manifest = read_manifest(hostile)
    for plan in plan_arrays(manifest, "parameters", manifest.losses["a/../b"]):
        array = zarr.open_array(
            hostile / "data.zarr" / manifest.losses["a/../b"].key / plan.path, mode="r"
        )
        assert array.chunks == plan.chunks
        assert array.chunks[0] == (1 if plan.of_windows else manifest.span)
        assert np.prod(array.chunks) * array.dtype.itemsize <= 2**20


def test_a_damaged_chunk_is_an_error_and_never_a_number(hostile: Path, tmp_path: Path) -> None:
    key = read_manifest(hostile).losses["a/../b"].key
    chunk = hostile / "data.zarr" / key / "allocation" / "scalar" / "c" / "1"
    whole = chunk.read_bytes()
    try:
        for damaged in (
            whole[:-1],
            b"",
            bytes([*whole[:3], whole[3] ^ 1, *whole[4:]]),
            bytes(len(whole)),
        ):
            chunk.write_bytes(damaged)
            with pytest.raises(
                LCAError,
                match=r"allocation of 'scalar', span 1 \(steps 2 to 4\).*lca verify.*lca "
                r"repair",
            ):
                _ = open_run(hostile)["a/../b"].allocation["scalar"].values
    finally:
        chunk.write_bytes(whole)


def test_a_missing_chunk_of_a_committed_span_is_noticed_by_the_summary(hostile: Path) -> None:
    from lca_posthoc.findings import summary

    key = read_manifest(hostile).losses["a/../b"].key
    for name in ("steps/residual", "tensors/allocated", "tensors/helping"):
        place = hostile / "data.zarr" / key / name / "c" / "1"
        place.rename(hostile / "aside")
        try:
            with pytest.raises(LCAError, match="damaged"):
                summary(open_run(hostile)["a/../b"])
        finally:
            (hostile / "aside").rename(place)


@pytest.fixture
def levels(hostile: Path, tmp_path: Path) -> Callable[[str], Any]:
    record = json.loads((hostile / "run.json").read_text())

    def at(keep: str) -> Any:
        generator = torch.Generator().manual_seed(0)
        inputs, targets = (
            torch.randn(7, 3, generator=generator),
            torch.randn(7, generator=generator),
        )
        task = Task(Hostile, {"train": (inputs, targets)}, {"train": Loss(F.mse_loss)})
        out = tmp_path / f"{keep}.lca"
        return lca_posthoc.run(
            hostile.parent / "ck", task, out=out, keep=keep, cluster="inline", span=record["span"]
        )["train"]

    return at


def test_each_level_keeps_what_it_says(levels: Callable[[str], Any]) -> None:
    whole, statistics, units, tensors = (levels(keep) for keep in reversed(KEEP))
    for part in ("tensors", "steps", "histogram", "totals", "units"):
        xr.testing.assert_identical(getattr(whole, part).load(), getattr(statistics, part).load())
    for sums in (units, tensors):
        assert {*sums.tensors.data_vars} == {"allocated", "motion"}
        assert {*sums.steps.data_vars} == {*whole.steps.data_vars}
    assert {*units.units.data_vars} == {*whole.units.data_vars}
    beyond = {"units": "units", "histogram": "statistics", "totals": "statistics"}
    for part, level in {**beyond, "allocation": "parameters"}.items():
        for results, keep in ((tensors, "tensors"), (units, "units"), (statistics, "statistics")):
            if KEEP.index(keep) < KEEP.index(level):
                with pytest.raises(LCAError, match=f"--keep {keep}, but .* need --keep {level}"):
                    getattr(results, part)


def test_required_bytes_are_those_of_the_arrays(hostile: Path) -> None:
    manifest = read_manifest(hostile)
    held = files = 0
    for plan in plan_arrays(manifest, "parameters", manifest.losses["a/../b"]):
        held += zarr.open_array(
            hostile / "data.zarr" / manifest.losses["a/../b"].key / plan.path, mode="r"
        ).nbytes
        files += plan.files
    assert 2 * files == len(chunk_files(hostile, "a/../b") | chunk_files(hostile, "A/../b"))
    on_disk = sum(
        -(-path.stat().st_size // 4096) * 4096 for path in hostile.rglob("*") if path.is_file()
    )
    assert (
        max(2 * held, on_disk)
        <= required_bytes(manifest, "parameters", manifest.losses)
        <= 2 * held + 4 * on_disk
    )


def test_names_results_reserve_are_refused(tmp_path: Path) -> None:
    class Reserved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = torch.nn.Parameter(torch.zeros(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ self.step

    for step in (0, 1):
        save_file({"step": torch.zeros(2)}, tmp_path / f"step_{step}.safetensors")
    task = Task(Reserved, {"train": (torch.ones(3, 2), torch.ones(3))}, {"train": Loss(F.mse_loss)})
    with pytest.raises(InputError, match="'step'"):
        lca_posthoc.run(tmp_path, task, cluster="inline", out=tmp_path / "run.lca")


def test_a_sweep_removes_what_was_being_written_and_no_loss_of_such_a_name(
    hostile: Path, tmp_path: Path
) -> None:
    """A loss or tensor may end like a temporary file does; only files are swept."""
    run = tmp_path / "run.lca"
    shutil.copytree(hostile, run)
    for place in ("data.zarr", "commits", "partial"):
        (run / place / "w.partial").mkdir()
        (run / place / "w.partial" / ".0123.partial").write_bytes(b"")
        (run / place / ".4567.tmp").write_bytes(b"")
    RunWriter.open(run).sweep()
    assert {path.name for path in run.rglob("*.partial")} == {"w.partial"}
    assert [*run.rglob(".*.tmp")] == []


@pytest.mark.parametrize("name", ["run.lca", "run[1].lca", "*.lca"])
def test_a_creation_removes_what_killed_ones_of_this_host_left(
    hostile: Path, tmp_path: Path, name: str
) -> None:
    """Also where the name of the run would be a pattern."""
    begun = f"{name}.partial-{socket.gethostname()}-"
    for left in (f"{begun}4000000", f"{begun}1", f"{begun}x", f"{name}.partial-elsewhere-4000000"):
        (tmp_path / left / "commits").mkdir(parents=True)
    create(tmp_path / name, read_manifest(hostile), durable=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [name, f"{begun}1", f"{begun}x", f"{name}.partial-elsewhere-4000000"]
    )
