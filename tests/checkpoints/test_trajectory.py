"""Checkpoints are found, ordered by number, matched with the model's names, and read; nothing about
them is guessed.
"""

from __future__ import annotations

import builtins
import copy
import json
import mmap
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lca_posthoc.checkpoints.headers import MAX_TENSORS, read_header
from lca_posthoc.checkpoints.trajectory import (
    TensorSpec,
    Trajectory,
    normalise,
    open_trajectory,
    read_checkpoint,
    step_in_name,
)
from lca_posthoc.errors import InputError, LCAError, SpanError

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.arange(2.0)}
TABLE = [TensorSpec("w", "parameter", (2, 3)), TensorSpec("b", "parameter", (2,))]


def write(
    path: Path, tensors: Mapping[str, torch.Tensor] = WEIGHTS, step: int | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(tensors),
        path,
        metadata={"format": "pt"} | ({} if step is None else {"step": str(step)}),
    )
    return path


def steps(directory: Path, **options: Any) -> list[int]:
    return open_trajectory(directory, **options).steps


def refused(act: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        act()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


# --- steps ----------------------------------------------------------------------------------------

NAMES = {
    "step_00000010": 10,
    "step-7": 7,
    "step7": 7,
    "STEP_7": 7,
    "checkpoint-500": 500,
    "checkpoint-30000step": 30000,
    "ckpt_12": 12,
    "global_step143000": 143000,
    "globalstep_5": 5,
    "iter_0001000": 1000,
    "iterate=3": 3,
    "iteration-3": 3,
    "epoch=1-step=2000": 2000,
    "v2_step100_seed7": 100,
    "run3_ckpt-40": 40,
    "step_5_step_5": 5,
    "model-00001-of-00004": None,
    "step_1e5": None,
    "step_1E5": None,
    "step_1.5": None,
    "step_5_iter_6": None,
    "epoch_5": None,
    "checkpoint-best": None,
    "footstep_5": None,
    "model_7": None,
    "7": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_states_its_step_or_none_and_never_just_its_last_number(name: str) -> None:
    assert step_in_name(name) == NAMES[name]


@pytest.mark.parametrize(
    "name", [name for name, step in NAMES.items() if step is None and not name.startswith("model-")]
)
def test_a_file_that_states_no_step_is_refused_with_the_way_to_name_it(
    tmp_path: Path, name: str
) -> None:
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors")
    write(tmp_path / f"{name}.safetensors")
    refused(
        lambda: open_trajectory(tmp_path),
        "cannot tell the training step",
        f"{name}.safetensors",
        "--pattern",
    )


def test_files_are_ordered_by_their_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (100, 9, 20, 1000):
        write(tmp_path / f"step_{step}.safetensors", {"w": torch.tensor([float(step)])})
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == [9, 20, 100, 1000]
    assert [read_checkpoint(each, {"w": "w"})["w"].item() for each in trajectory.checkpoints] == [
        9,
        20,
        100,
        1000,
    ]


def test_the_step_in_metadata_beats_the_one_in_the_name(tmp_path: Path) -> None:
    write(tmp_path / "step_1.safetensors", step=30)
    write(tmp_path / "step_2.safetensors", step=20)
    write(tmp_path / "anything.safetensors", step=10)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == [10, 20, 30]
    assert [each.files[0].name for each in trajectory.checkpoints] == [
        "anything.safetensors",
        "step_2.safetensors",
        "step_1.safetensors",
    ]


def test_directories_of_a_trainer_are_checkpoints(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"not ours")
    assert steps(tmp_path) == [5, 10, 100]


def test_the_step_of_a_trainer_state_beats_the_one_in_the_name(tmp_path: Path) -> None:
    for epoch, step in ((1, 500), (2, 1000)):
        write(tmp_path / f"checkpoint-{epoch}-epoch" / "model.safetensors")
        (tmp_path / f"checkpoint-{epoch}-epoch" / "trainer_state.json").write_text(
            json.dumps({"global_step": step})
        )
    assert steps(tmp_path) == [500, 1000]


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"global_step": null}', '{"global_step": "many"}', "\xff"]
)
def test_a_trainer_state_without_a_step_leaves_the_name_to_tell(tmp_path: Path, state: str) -> None:
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state, "latin-1")
    assert steps(tmp_path) == [1, 2]


def test_model_safetensors_is_taken_where_others_lie_beside_it(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        write(tmp_path / f"checkpoint-{step}" / "ema.safetensors", {"other": torch.zeros(9)})
    assert set(open_trajectory(tmp_path).tensors) == {"w", "b"}


@pytest.mark.parametrize("final", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_final_model_beside_the_checkpoints_is_left_out_with_a_note(
    tmp_path: Path, final: str
) -> None:
    for step in (5, 10):
        write(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    write(tmp_path / final)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == [5, 10]
    assert any(final in note and "left out" in note for note in trajectory.notes)


def test_what_is_hidden_temporary_or_no_checkpoint_is_ignored(tmp_path: Path) -> None:
    for step in (0, 1):
        write(tmp_path / f"step_{step}.safetensors", {"w": torch.tensor([float(step)])})
    for name in (
        ".step_3.safetensors",
        ".step_3.safetensors.tmp",
        "step_3.safetensors.tmp",
        "step_3.tmp.safetensors",
    ):
        (tmp_path / name).write_bytes(b"half written")
    for name in ("README.md", "step_3.pt", "step_3.ckpt"):
        (tmp_path / name).write_text("no checkpoint")
    (tmp_path / "logs").mkdir()
    (tmp_path / ".tmpAbC123").write_bytes(b"safetensors' own temporary name")
    write(tmp_path / ".cache" / "step_4.safetensors")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == [0, 1]
    assert trajectory.notes == ()


def test_a_first_checkpoint_that_is_not_the_initial_weights_is_reported(tmp_path: Path) -> None:
    for step in (5, 6):
        write(tmp_path / f"step_{step}.safetensors", {"w": torch.tensor([float(step)])})
    (note,) = open_trajectory(tmp_path).notes
    assert "the first checkpoint is step 5" in note


def test_a_hidden_file_inside_a_checkpoint_directory_is_ignored(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}" / "weights.safetensors")
        (tmp_path / f"checkpoint-{step}" / ".weights.safetensors").write_bytes(b"half written")
    assert steps(tmp_path) == [1, 2]


def test_a_pattern_names_the_step_and_leaves_out_what_it_does_not_match(tmp_path: Path) -> None:
    for name in ("run3_00010", "run3_00005", "run4_00007", "best"):
        write(tmp_path / f"{name}.safetensors")
    assert steps(tmp_path, pattern=r"run3_(?P<step>\d+)") == [5, 10]


def test_a_pattern_beats_the_step_in_metadata(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"m{step}.safetensors", step=99)
    assert steps(tmp_path, pattern=r"m(?P<step>\d+)") == [1, 2]


SLICES = {
    "0:60": [0, 10, 20, 30, 40, 50, 60],
    ":": [0, 10, 20, 30, 40, 50, 60],
    "20:40": [20, 30, 40],
    "15:45": [20, 30, 40],
    "40:": [40, 50, 60],
    ":20": [0, 10, 20],
    "::2": [0, 20, 40, 60],
    "10::3": [10, 40],
    ":50:5": [0, 50],
    "10:50:2": [10, 30, 50],
    "0,10,40": [0, 10, 40],
    "0:10,40:": [0, 10, 40, 50, 60],
    "0,20:60:2": [0, 20, 40, 60],
}


@pytest.mark.parametrize("text", SLICES)
def test_steps_are_training_steps_with_both_ends_and_every_kth_checkpoint(
    tmp_path: Path, text: str
) -> None:
    for step in range(0, 70, 10):
        write(tmp_path / f"step_{step}.safetensors")
    assert steps(tmp_path, steps=text) == SLICES[text]


# --steps → the segments, as steps of their ends
SEGMENTS = {
    ":": [(0, 1), (1, 2), (2, 3), (3, 10), (10, 11), (11, 12)],
    "0,2,11": [(0, 2), (2, 11)],
    "0:2,10:12": [(0, 1), (1, 2), (10, 11), (11, 12)],
    "0:1,3:10,12": [(0, 1), (3, 10), (10, 12)],
    "0:1,3,10:12": [(0, 1), (1, 3), (3, 10), (10, 11), (11, 12)],
    "0:1,2:2,3:3,10:11": [(0, 1), (10, 11)],
    "0:1,4:9,10:11": [(0, 1), (10, 11)],
}


@pytest.mark.parametrize("text", SEGMENTS)
def test_nothing_is_joined_between_ranges(tmp_path: Path, text: str) -> None:
    for step in (0, 1, 2, 3, 10, 11, 12):
        write(tmp_path / f"step_{step}.safetensors")
    trajectory = open_trajectory(tmp_path, steps=text)
    steps = trajectory.steps
    assert [(steps[start], steps[start + 1]) for start in trajectory.starts] == SEGMENTS[text]
    assert {*range(len(steps) - 1)} - {*trajectory.starts} == trajectory.breaks


def test_a_range_without_checkpoints_is_said(tmp_path: Path) -> None:
    for step in range(3):
        write(tmp_path / f"step_{step}.safetensors")
    notes = open_trajectory(tmp_path, steps="0:1,5:6").notes
    assert notes[0] == "no checkpoint lies in 5:6 of --steps 0:1,5:6"


def test_steps_left_out_are_not_validated(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors")
    write(tmp_path / "step_3.safetensors", {"other": torch.zeros(9)})
    assert steps(tmp_path, steps=":2") == [1, 2]


# --- shards ---------------------------------------------------------------------------------------


def shard(
    directory: Path, *tables: Mapping[str, torch.Tensor], index: Mapping[str, str] | None = None
) -> Path:
    names = [
        f"model-{part:05d}-of-{len(tables):05d}.safetensors" for part in range(1, len(tables) + 1)
    ]
    for name, tensors in zip(names, tables, strict=True):
        write(directory / name, tensors)
    weight_map = {
        tensor: name for name, tensors in zip(names, tables, strict=True) for tensor in tensors
    }
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index or weight_map})
    )
    return directory


def test_a_sharded_checkpoint_is_read_as_one(tmp_path: Path) -> None:
    for step in (1, 2):
        shard(
            tmp_path / f"checkpoint-{step}", {"w": WEIGHTS["w"] * step}, {"b": WEIGHTS["b"] * step}
        )
    trajectory = open_trajectory(tmp_path)
    names = trajectory.match(TABLE)
    for checkpoint in trajectory.checkpoints:
        read = read_checkpoint(checkpoint, names)
        assert {name: tensor.tolist() for name, tensor in read.items()} == {
            name: (tensor * checkpoint.step).tolist() for name, tensor in WEIGHTS.items()
        }
        assert checkpoint.size == sum(file.stat().st_size for file in checkpoint.files)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        shard(tmp_path / f"checkpoint-{step}", {"w": WEIGHTS["w"]}, {"b": WEIGHTS["b"]})
    (tmp_path / "checkpoint-2" / "model-00002-of-00002.safetensors").unlink()
    refused(
        lambda: open_trajectory(tmp_path),
        "checkpoint-2",
        "model-00002-of-00002.safetensors",
        "missing",
    )


def test_a_shard_of_another_directory_is_never_read(tmp_path: Path) -> None:
    write(tmp_path / "secret.safetensors")
    for step in (1, 2):
        shard(
            tmp_path / "ck" / f"checkpoint-{step}", WEIGHTS, index={"w": "../../secret.safetensors"}
        )
    refused(lambda: open_trajectory(tmp_path / "ck"), "secret.safetensors", "missing")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("w", "w"),
        ("module.w", "w"),
        ("module.module.w", "w"),
        ("_orig_mod.w", "w"),
        ("module._orig_mod.w", "w"),
        ("_orig_mod.module.w", "w"),
        ("fc._orig_mod.w", "fc.w"),
        ("encoder.module.w", "encoder.module.w"),
        ("module", "module"),
        ("modules.w", "modules.w"),
    ],
)
def test_what_wrappers_put_into_a_name_is_taken_out(stored: str, name: str) -> None:
    assert normalise(stored) == name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("in_model", ["", "module.", "_orig_mod."])
def test_wrapped_and_plain_models_match(tmp_path: Path, prefix: str, in_model: str) -> None:
    for step in (1, 2):
        write(
            tmp_path / f"step_{step}.safetensors",
            {prefix + name: tensor for name, tensor in WEIGHTS.items()},
        )
    table = [TensorSpec(in_model + spec.name, spec.kind, spec.shape) for spec in TABLE]
    trajectory = open_trajectory(tmp_path)
    names = trajectory.match(table)
    assert names == {f"{in_model}w": f"{prefix}w", f"{in_model}b": f"{prefix}b"}
    assert torch.equal(
        read_checkpoint(trajectory.checkpoints[0], names)[f"{in_model}w"], WEIGHTS["w"]
    )


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        write(
            tmp_path / f"step_{step}.safetensors",
            {"w": WEIGHTS["w"], "module.w": WEIGHTS["w"].clone()},
        )
    refused(lambda: open_trajectory(tmp_path), "'w'", "'module.w'", "both become", "--rename")


RENAMES = {
    "one": (["kernel=w", "bias=b"], {"kernel": "w", "bias": "b"}),
    "pattern": ([r"^net\.(\w+)$=\1"], {"net.w": "w", "net.b": "b"}),
    "in turn": (["x=y", "y=w", "bias=b"], {"x": "w", "bias": "b"}),
    "after wrappers": (["^kernel$=w", "^bias$=b"], {"module.kernel": "w", "module.bias": "b"}),
}


@pytest.mark.parametrize("case", RENAMES)
def test_names_are_mapped(tmp_path: Path, case: str) -> None:
    rename, stored = RENAMES[case]
    for step in (1, 2):
        write(
            tmp_path / f"step_{step}.safetensors",
            {source: WEIGHTS[name] for source, name in stored.items()},
        )
    trajectory = open_trajectory(tmp_path, rename=rename)
    assert trajectory.match(TABLE) == {name: source for source, name in stored.items()}


TIED = [TensorSpec("emb.w", "parameter", (2, 3), aliases=("head.w", "out.w"))]


@pytest.mark.parametrize(
    "stored",
    [("emb.w",), ("head.w",), ("module.out.w",), ("emb.w", "head.w"), ("emb.w", "head.w", "out.w")],
)
def test_a_tied_tensor_is_found_under_any_of_its_names_and_counted_once(
    tmp_path: Path, stored: tuple[str, ...]
) -> None:
    for step in (1, 2):
        write(
            tmp_path / f"step_{step}.safetensors", {name: WEIGHTS["w"].clone() for name in stored}
        )
    trajectory = open_trajectory(tmp_path)
    names = trajectory.match(TIED)
    assert names == {"emb.w": stored[0]}
    assert list(read_checkpoint(trajectory.checkpoints[0], names)) == ["emb.w"]


def test_a_tied_tensor_under_none_of_its_names_is_missing(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", {"other": WEIGHTS["w"]})
    refused(
        lambda: open_trajectory(tmp_path).match(TIED),
        "'emb.w'",
        "'other' instead",
        "step 1",
        "--rename",
    )


@pytest.mark.parametrize("name", ["step", "group", "total", "w:0", "w:unit"])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "state"])
def test_an_allocated_tensor_by_the_name_of_a_dimension_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", {name: torch.zeros(2), "w": torch.zeros(2)})
    table = [TensorSpec("w", "parameter", (2,)), TensorSpec(name, kind, (2,))]
    if kind == "state":
        assert open_trajectory(tmp_path).match(table) == {"w": "w", name: name}
    else:
        way_out = f"--rename '^{name}$=NEW'"
        refused(
            lambda: open_trajectory(tmp_path).match(table),
            f"{name!r}",
            "Rename it in the task's model",
            way_out,
        )


def test_many_names_left_over_are_shortened(tmp_path: Path) -> None:
    extra = {f"extra.{index}": torch.zeros(1) for index in range(9)}
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", WEIGHTS | extra)
    refused(
        lambda: open_trajectory(tmp_path).match(TABLE), "'extra.0', 'extra.1', 'extra.2' and 6 more"
    )


def test_half_precision_is_seen_in_the_headers(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", {"w": WEIGHTS["w"].half(), "b": WEIGHTS["b"]})
    assert open_trajectory(tmp_path).half_precision == ["w"]


# --- what is read, and how ------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Two checkpoints of 4 MiB."""
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", {"w": torch.full((2**20,), float(step))})
    return tmp_path


def _bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_opening_reads_headers_and_samples_only(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", _forbidden)
    monkeypatch.setattr(safetensors.torch, "load", _forbidden)
    monkeypatch.setattr(safetensors, "safe_open", _forbidden)
    before = _bytes_read()
    open_trajectory(large)
    assert _bytes_read() - before < 2 * 4 * 2**20 / 8


def _forbidden(*arguments: object, **options: object) -> None:
    raise AssertionError("opening or reading a trajectory must not call this")


def test_opening_touches_each_sample_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory on a network file system holds ten thousand of them."""
    read: dict[str, int] = {}
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        read[name] = read.get(name, 0) + count
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    open_trajectory(large)
    assert read == {str(path): 3 * 2**16 for path in large.glob("*.safetensors")}


def test_reading_never_maps_a_file(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", _forbidden)
    monkeypatch.setattr(safetensors, "safe_open", _forbidden)
    trajectory = open_trajectory(large)
    held = read_checkpoint(trajectory.checkpoints[0], {"w": "w"})
    assert str(large) not in Path("/proc/self/maps").read_text()
    (large / "step_1.safetensors").write_bytes(b"")  # a mapped file would kill the process here
    assert torch.equal(held["w"], torch.full((2**20,), 1.0))


REPLACEMENTS: dict[str, Callable[[Path], object]] = {
    "other numbers": lambda path: write(path, {"w": torch.full((2**20,), 3.0)}),
    "its last number": lambda path: _overwrite(path, path.stat().st_size - 4),
    "a number in its middle": lambda path: _overwrite(path, path.stat().st_size // 2),
    "the other checkpoint": lambda path: path.write_bytes(
        (path.parent / "step_2.safetensors").read_bytes()
    ),
    "another size": lambda path: write(path, {"w": torch.zeros(2**19)}),
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "nothing": lambda path: os.truncate(path, 0),
}


def _overwrite(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\1\2\3\4")


@pytest.mark.parametrize("case", REPLACEMENTS)
def test_a_file_replaced_after_opening_is_refused(large: Path, case: str) -> None:
    trajectory = open_trajectory(large)
    REPLACEMENTS[case](large / "step_1.safetensors")
    with pytest.raises(SpanError, match=r"step_1\.safetensors \(step 1\)") as caught:
        read_checkpoint(trajectory.checkpoints[0], {"w": "w"})
    assert "Restore" in str(caught.value)


def test_shards_that_changed_places_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        shard(
            tmp_path / f"checkpoint-{step}", {"w": WEIGHTS["w"] * step}, {"b": WEIGHTS["b"] * step}
        )
    trajectory = open_trajectory(tmp_path)
    one, two = (
        tmp_path / "checkpoint-1" / f"model-0000{part}-of-00002.safetensors" for part in (1, 2)
    )
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(SpanError, match="changed since the run was created"):
        read_checkpoint(trajectory.checkpoints[0], trajectory.match(TABLE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_numbers_that_are_not_finite_are_counted_and_named(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    whole = WEIGHTS["w"].to(dtype)
    spoiled = whole.clone()
    spoiled[0, :2] = value
    for step, tensor in ((1, whole), (2, spoiled)):
        write(tmp_path / f"step_{step}.safetensors", {"w": tensor})
    trajectory = open_trajectory(tmp_path)
    read_checkpoint(trajectory.checkpoints[0], {"w": "w"})
    with pytest.raises(
        SpanError,
        match=r"tensor 'w' holds 2 NaN or Inf in .*step_2\.safetensors "
        r"\(step 2\)",
    ):
        read_checkpoint(trajectory.checkpoints[1], {"w": "w"})


DTYPES = [
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3)], ids=str)
def test_every_dtype_and_shape_comes_back_as_it_was(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.ones(shape).to(dtype)
    for step in (1, 2):
        write(tmp_path / f"step_{step}.safetensors", {"w": tensor})
    trajectory = open_trajectory(tmp_path)
    assert trajectory.match([TensorSpec("w", "state", shape)]) == {"w": "w"}
    read = read_checkpoint(trajectory.checkpoints[0], {"w": "w"})["w"]
    assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(
        read.view(torch.uint8) if shape else read, tensor.view(torch.uint8) if shape else tensor
    )


# --- headers: whatever we accept, safetensors accepts ---------------------------------------------

SMALL = save(
    {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.int64)},
    metadata={"step": "1"},
)
LENGTH = int.from_bytes(SMALL[:8], "little")
HEADER: dict[str, Any] = json.loads(SMALL[8 : 8 + LENGTH])
BODY = SMALL[8 + LENGTH :]
FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def accepted_by_both_or_refused(path: Path, data: bytes) -> None:
    """Our reader refuses in its own words, or safetensors loads the same names and shapes."""
    path.write_bytes(data)
    header, refusal = None, ""
    try:
        header = read_header(path)
    except LCAError as error:
        refusal = str(error)
    if header is None:
        assert str(path) in refusal
        assert "\n" not in refusal
        return
    loaded = safetensors.torch.load(data)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in header.tensors.items()
    }


def file_of(header: Any, body: bytes = BODY) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(
        "utf-8", "surrogatepass"
    )
    return len(text).to_bytes(8, "little") + text + body


def test_the_unspoiled_file_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(SMALL)
    header = read_header(tmp_path / "f")
    assert {name: each.shape for name, each in header.tensors.items()} == {"w": (2, 3), "b": (2,)}
    assert (header.metadata, header.size) == ({"step": "1"}, len(SMALL))


@FUZZ
@given(bits=st.lists(st.integers(0, 8 * len(SMALL) - 1), min_size=1, max_size=4))
def test_flipped_bits_are_refused_or_harmless(tmp_path: Path, bits: list[int]) -> None:
    data = bytearray(SMALL)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    accepted_by_both_or_refused(tmp_path / "f", bytes(data))


@FUZZ
@given(cut=st.integers(0, len(SMALL)), tail=st.binary(max_size=20))
def test_cut_and_extended_files_are_refused(tmp_path: Path, cut: int, tail: bytes) -> None:
    accepted_by_both_or_refused(tmp_path / "f", SMALL[:cut] + tail)


@FUZZ
@given(data=st.binary(max_size=200))
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    accepted_by_both_or_refused(tmp_path / "f", data)


NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64]))
DTYPE_NAMES = st.sampled_from(
    [
        "F32",
        "I64",
        "F64",
        "F16",
        "BF16",
        "U8",
        "BOOL",
        "F8_E8M0",
        "F8_E4M3",
        "C64",
        "U64",
        "F4",
        "f32",
        "",
    ]
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=4), DTYPE_NAMES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_headers(draw: st.DrawFn) -> Any:
    """The small file's header with a few of its values replaced, removed or added to."""
    header: Any = copy.deepcopy(HEADER)
    for _ in range(draw(st.integers(1, 3))):
        places = [(header, key) for key in header]
        places += [
            (entry, key) for entry in header.values() if isinstance(entry, dict) for key in entry
        ]
        lists = [value for holder, key in places if isinstance(value := holder[key], list)]
        places += [(each, index) for each in lists for index in range(len(each))]
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "number", "dtype", "remove", "add"]))
        if action == "remove":
            del holder[key]
        elif action == "add":
            target = holder[key]
            value = draw(JSON)
            if isinstance(target, dict):
                target[draw(st.text(max_size=4))] = value
            elif isinstance(target, list):
                target.insert(draw(st.integers(0, len(target))), value)
        else:
            holder[key] = draw({"replace": JSON, "number": NUMBERS, "dtype": DTYPE_NAMES}[action])
        if not header:
            break
    return header


@settings(FUZZ, max_examples=600)
@given(header=mutated_headers())
def test_mutated_headers_are_accepted_by_both_or_refused(tmp_path: Path, header: Any) -> None:
    accepted_by_both_or_refused(tmp_path / "f", file_of(header))


SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(FUZZ, max_examples=300)
@given(
    tensors=st.dictionaries(
        st.text(max_size=6),
        st.tuples(st.sampled_from(["F32", "I64", "F16", "U8", "BOOL"]), SHAPES),
        max_size=5,
    ),
    slack=st.sampled_from([0, 0, 0, 1, -1]),
    swap=st.booleans(),
)
def test_made_up_tables_are_accepted_by_both_or_refused(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], slack: int, swap: bool
) -> None:
    width = {"F32": 4, "I64": 8, "F16": 2, "U8": 1, "BOOL": 1}
    header, position = {}, 0
    for name, (dtype, shape) in reversed(tensors.items()) if swap else tensors.items():
        size = width[dtype] * int(torch.tensor(shape).prod()) if shape else width[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    accepted_by_both_or_refused(tmp_path / "f", file_of(header, bytes(max(0, position + slack))))


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ODD: dict[str, tuple[Any, bytes]] = {
    "no tensors": ({}, b""),
    "metadata alone": ({"__metadata__": {"a": "b"}}, b""),
    "metadata null": ({"__metadata__": None, "w": entry([1], 0, 4)}, bytes(4)),
    "metadata a list": ({"__metadata__": [], "w": entry([1], 0, 4)}, bytes(4)),
    "metadata a number": ({"__metadata__": 1, "w": entry([1], 0, 4)}, bytes(4)),
    "metadata of a number": ({"__metadata__": {"a": 1}, "w": entry([1], 0, 4)}, bytes(4)),
    "metadata nested": ({"__metadata__": {"a": {}}, "w": entry([1], 0, 4)}, bytes(4)),
    "metadata a tensor": ({"__metadata__": entry([1], 0, 4)}, bytes(4)),
    "true as an extent": ({"w": entry([True], 0, 4)}, bytes(4)),
    "false as an offset": ({"w": entry([1], False, 4)}, bytes(4)),
    "a float as an extent": ({"w": entry([1.0], 0, 4)}, bytes(4)),
    "minus zero": ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)),
    "an extent too large": ({"w": entry([2**64, 0], 0, 0)}, b""),
    "a product too large": ({"w": entry([2**63, 2**63, 0], 0, 0)}, b""),
    "a product too large behind a zero": ({"w": entry([0, 2**63, 2**63], 0, 0)}, b""),
    "bits too large": ({"w": entry([2**62, 2, 0], 0, 0)}, b""),
    "a hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "an overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)),
    "the same bytes twice": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "backwards": ({"a": entry([1], 4, 0)}, bytes(4)),
    "empty tensors between": (
        {"a": entry([1], 0, 4), "b": entry([0], 4, 4), "c": entry([1], 4, 8)},
        bytes(8),
    ),
    "an empty tensor outside": ({"a": entry([1], 0, 4), "b": entry([0], 9, 9)}, bytes(4)),
    "an empty tensor inside another": ({"a": entry([1], 0, 4), "b": entry([0], 2, 2)}, bytes(4)),
    "unknown dtype": ({"w": entry([1], 0, 4, "F33")}, bytes(4)),
    "half a byte": ({"w": entry([2], 0, 1, "F4")}, bytes(1)),
    "dtype a list": ({"w": entry([1], 0, 4, ["F32"])}, bytes(4)),
    "shape a word": ({"w": entry("1", 0, 4)}, bytes(4)),
    "shape null": ({"w": entry(None, 0, 4)}, bytes(4)),
    "three offsets": ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "an unknown key": ({"w": entry([1], 0, 4) | {"more": 1}}, bytes(4)),
    "an entry that is a list": ({"w": ["F32", [1], [0, 4]]}, bytes(4)),
    "a name twice": (
        "{" + ",".join(2 * ['"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}']) + "}",
        bytes(4),
    ),
    "half a surrogate": ('{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "an empty name": ({"": entry([1], 0, 4)}, bytes(4)),
    "a name that is a path": ({"../../etc/x": entry([1], 0, 4)}, bytes(4)),
    "a name with a zero": ({"\0": entry([1], 0, 4)}, bytes(4)),
    "spaces behind": (json.dumps({"w": entry([1], 0, 4)}) + "    ", bytes(4)),
    "spaces in front": ("    " + json.dumps({"w": entry([1], 0, 4)}), bytes(4)),
    "a byte order mark": ("\ufeff" + json.dumps({"w": entry([1], 0, 4)}), bytes(4)),
    "a list": ([], b""),
    "a word": ('"w"', b""),
    "NaN": ('{"w":NaN}', b""),
    "nested deep": ("[" * 50_000, b""),
    "an integer of 5000 digits": ('{"w":' + "9" * 5000 + "}", b""),
    "an extent of 5000 digits": (
        '{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "nothing": ("", b""),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_header_is_accepted_by_both_or_refused(tmp_path: Path, case: str) -> None:
    accepted_by_both_or_refused(tmp_path / "f", file_of(*ODD[case]))


@pytest.mark.parametrize(
    "key", ['"data_offsets"', '"data\\u005foffsets"'], ids=["plainly", "in disguise"]
)
def test_too_many_tensors_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    entries = (
        f'"{index:x}":{{"dtype":"U8","shape":[0],{key}:[0,0]}}' for index in range(MAX_TENSORS + 2)
    )
    (tmp_path / "f").write_bytes(file_of("{" + ",".join(entries) + "}", b""))
    monkeypatch.setattr(json, "loads", _forbidden)
    refused(lambda: read_header(tmp_path / "f"), "100,000 tensors")


def test_a_header_as_long_as_it_claims_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write((2**35).to_bytes(8, "little"))
        file.truncate(2**36)  # sparse
    before = _bytes_read()
    refused(lambda: read_header(tmp_path / "f"), "its header claims 34,359,738,368 bytes")
    assert _bytes_read() - before < 2**17


def test_opening_imports_no_torch(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that only looks at headers need not load it."""
    monkeypatch.setattr(builtins, "__import__", _without_torch(builtins.__import__))
    assert isinstance(open_trajectory(large), Trajectory)


def _without_torch(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(name: str, *arguments: Any, **options: Any) -> Any:
        assert name.partition(".")[0] != "torch", "opening a trajectory imported torch"
        return original(name, *arguments, **options)

    return guarded
