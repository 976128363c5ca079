"""`lca export`: what is read back, by the program the format is for, is what the findings say,
number for number.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

import lca_posthoc
from lca_posthoc import Loss, Recorder, Run, Task, findings, open_run
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.errors import InputError
from lca_posthoc.export import export, read_netcdf
from lca_posthoc.export.choose import known
from lca_posthoc.export.netcdf import write_netcdf
from lca_posthoc.export.tables import tables
from tests.helpers.cli import contents, lca, record, refused, run_lca, says, write_task

HOSTILE = (
    *(
        "a/b",
        "..",
        "<script>",
        "$\\frac{$",
        "=1+1",
        "@SUM(A1)",
        "-2",
        "+x",
        "A",
        "a",
        "float",
        "string",
        "ß" * 100,
        "\x1b[31m",
    ),
    *(
        "n" * 300,
        "N" * 300,
        'x"y,z',
        "new\nline",
        "car\rriage",
        "tab\there",
        " lead",
        "trail ",
        "nul\0nul",
        "%41",
        "\u202eevil",
        *("\x9b31m", "\x85", "\x7f", "\u061c", "\u200f", "two\u2028lines", "\u2066turned\u2069"),
    ),
)


class Hostile(torch.nn.Module):
    """Parameters with names from hell, a scalar among them."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            if "." not in name:
                self._parameters[name] = torch.nn.Parameter(torch.full((3, 2), 0.1))
        self.scalar = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights = [each for name, each in self.named_parameters() if name != "scalar"]
        return self.scalar * (inputs @ torch.stack(weights).sum(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Hostile names of parameters, losses and groups; train, validation and a loss with groups."""
    root = tmp_path_factory.mktemp("export")
    generator = torch.Generator().manual_seed(0)
    data = {
        name: (
            torch.randn(9, 3, generator=generator),
            torch.randint(0, 2, (9,), generator=generator),
        )
        for name in ("train", "validation")
    }
    model = Hostile()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Recorder(root / "ck", model) as recorder:
        for step in range(7):
            recorder.save(step)
            optimizer.zero_grad()
            F.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
            optimizer.step()
    losses = {
        "a/../b": Loss(F.cross_entropy, on="train"),
        "=validation": Loss(F.cross_entropy, on="validation"),
        "per_class": Loss(F.cross_entropy, on="train", group_by=_label),
    }
    return lca_posthoc.run(
        root / "ck", Task(Hostile, data, losses), losses=["all"], cluster="inline", span=2
    )


def _label(inputs: torch.Tensor, targets: torch.Tensor) -> list[str]:
    return [("=evil/\0!", "b,\n\"c'")[int(target)] for target in targets]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    task = write_task(root / "task.py")
    assert (
        run_lca(record(root / "ck", range(7)), task, root / "r.lca", "--loss", "all").exit_code == 0
    )
    assert (
        run_lca(
            root / "ck", task, root / "tensors.lca", "--loss", "all", "--keep", "tensors"
        ).exit_code
        == 0
    )
    return root


@functools.cache
def _expected(path: Path, loss: str, name: str) -> xr.Dataset:
    run = open_run(path)
    given = [run[loss]] if name != "generalisation" else [run["a/../b"], run["=validation"]]
    found: xr.Dataset = getattr(findings, name)(*given)
    return found


def expected(run: Run, loss: str, name: str) -> xr.Dataset:
    """What the finding itself says; of two losses where it compares them."""
    return _expected(run.path, loss, name)


def _is_of_any_run(name: str) -> bool:
    return not (declared_findings()[name].examples or declared_findings()[name].part)


def exported(run: Run, *names: str) -> Iterator[tuple[str, str]]:
    """The losses and findings that are exported of the run."""
    for loss in run:
        for name in names or (name for name in known() if _is_of_any_run(name)):
            if name != "microscope" and (name != "generalisation" or loss == "a/../b"):
                yield loss, name


def same(found: xr.Dataset, wanted: xr.Dataset) -> None:
    """Equal in every number, name, type and attribute."""
    xr.testing.assert_identical(found, wanted)
    for name, variable in wanted.variables.items():
        if variable.dtype.kind not in "OU":
            assert found[name].dtype == variable.dtype, name
        assert found[name].variable.dims == variable.dims
    assert set(found.coords) == set(wanted.coords)


# --- NetCDF ---------------------------------------------------------------------------------------


def odd() -> xr.Dataset:
    """Every type, name and attribute that NetCDF has trouble with."""
    values = np.array([[1.5, np.nan, np.inf], [-np.inf, -0.0, 1e-310]])
    made: dict[str, Any] = {
        "i64": ("step", np.array([2**62 + 1, -(2**63)])),
        "near": ("step", np.array([2**53, -(2**40)])),
        "small": ("step", np.array([1, 2])),
        "u8": ("step", np.array([0, 255], "uint8")),
        "i8": ("step", np.array([-128, 127], "int8")),
        "f32": ("step", np.array([0.1, np.nan], "float32")),
        "flag": ("step", np.array([True, False])),
        "texts": ("step", np.array(["", "ü\0\n\\u0041 "], dtype=object)),
        "fixed": ("step", np.array(["abc", "d"])),
        "blank": ("step", np.array(["", ""])),
        "number": ((), 2.5),
        "count": ((), 2**40),
        "word": ((), "x"),
        "yes": ((), True),
        "none": ("hero", np.zeros(0)),
        "no_names": ("hero", np.array([], dtype=object)),
        "no_flags": (("hero", "step", "nothing"), np.zeros((0, 2, 0), bool)),
        **{
            name: (("step", f"{name}:column"), values, {"name": name, "units": "loss"})
            for name in HOSTILE
        },
    }
    attributes = {
        "text": "ü",
        "empty": "",
        "control": "\x1b",
        "whole": 7,
        "large": 2**40,
        "float": 0.1,
        "flag": True,
        "nothing": None,
        "shape": [3, 4],
        "axes": [[0], [1, 2]],
        "no": [],
        "table": {"a": [1]},
        "/": "slash",
    }
    coords = {
        "step": np.array([0, 10**12]),
        "step_end": ("step", [5, 6]),
        "a:column": ["=x", "y", "z"],
        "scalar": 3,
    }
    return xr.Dataset(made, coords, attributes)


def test_every_type_name_and_attribute_comes_back(tmp_path: Path) -> None:
    write_netcdf(odd(), tmp_path / "odd.nc")
    same(read_netcdf(tmp_path / "odd.nc"), odd())


@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf"])
def test_other_programs_read_the_numbers_under_names_that_tell(engine: Any, tmp_path: Path) -> None:
    write_netcdf(odd(), tmp_path / "odd.nc")
    with xr.open_dataset(tmp_path / "odd.nc", engine=engine) as found:
        names = {real: key for key, real in json.loads(found.attrs["lca_posthoc"])["names"].items()}
        for name in HOSTILE:
            stored = found[names.get(name, name)]
            assert np.array_equal(stored.values, odd()[name].values, equal_nan=True)
            assert "/" not in str(stored.name)
            assert name in names or stored.name == name
            assert stored.attrs["units"] == "loss"
        assert found["a%2Fb"].attrs["real_name"] == "a/b"
        assert found.step.values.tolist() == [0, 10**12]
        assert found["flag"].dtype == bool
        assert found.attrs["axes"] == "[[0], [1, 2]]"


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    xr.Dataset({"x": 1}).to_netcdf(tmp_path / "x.nc")
    with pytest.raises(InputError, match="not a file that `lca export` wrote"):
        read_netcdf(tmp_path / "x.nc")


def test_netcdf_of_every_finding_reads_back(run: Run, tmp_path: Path) -> None:
    files = export(run, tmp_path / "out", say=lambda text: None)
    assert sorted(files) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    pairs = list(exported(run))
    assert len(files) == len(pairs)
    for loss, name in pairs:
        same(
            read_netcdf(tmp_path / "out" / run.manifest.losses[loss].key / f"{name}.nc"),
            expected(run, loss, name),
        )


# --- tables ---------------------------------------------------------------------------------------


def rows_of(data: xr.Dataset, dims: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a table, one place after the other."""
    inside = {
        str(name): (variable.dims, variable.values)
        for name, variable in data.variables.items()
        if set(variable.dims) == set(dims)
        or (name in data.coords and variable.dims and set(variable.dims) < set(dims))
    }
    for place in np.ndindex(*(data.sizes[dim] for dim in dims)):
        at = dict(zip(dims, place, strict=True))
        row = {
            name: values[tuple(at[dim] for dim in own)] for name, (own, values) in inside.items()
        }
        yield {**at, **row}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_every_finding_read_back(suffix: str, run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out", format=suffix, say=lambda text: None)
    about = json.loads((tmp_path / "out" / "about.json").read_text())["files"]
    for loss, name in exported(run):
        data, place = expected(run, loss, name), run.manifest.losses[loss].key
        mine = {file: each for file, each in about.items() if file.startswith(f"{place}/{name}")}
        shapes = {frozenset(variable.dims) for variable in data.data_vars.values()}
        assert {frozenset(each["axes"]) for each in mine.values()} == shapes
        assert len(mine) == len(shapes)
        for file, each in mine.items():
            assert {
                key: value for key, value in each.items() if key not in ("columns", "axes")
            } == data.attrs
            table = (
                read_csv(tmp_path / "out" / file)
                if suffix == "csv"
                else pd.read_parquet(tmp_path / "out" / file)
            )
            wanted = list(rows_of(data, tuple(each["axes"])))
            assert len(table) == len(wanted)
            for column, said in each["columns"].items():
                check(list(table[column]), [row[column] for row in wanted], said["type"])
            if suffix == "parquet":
                assert json.loads(pd_metadata(tmp_path / "out" / file)) == each


def check(found: list[Any], wanted: list[Any], kind: str) -> None:
    """A column as it is read: CSV gives texts."""
    if kind == "text":
        assert [str(each) for each in found] == [str(each) for each in wanted]
    elif kind == "bool":
        assert [str(each) for each in found] == [str(bool(each)) for each in wanted]
    else:
        assert np.array_equal(
            np.array(found).astype(kind), np.array(wanted).astype(kind), equal_nan=kind[0] == "f"
        )


def read_csv(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return CSV({name: [row[at] for row in rows] for at, name in enumerate(head)}, len(rows))


class CSV(dict[str, list[str]]):
    """Columns of text."""

    def __init__(self, columns: dict[str, list[str]], rows: int) -> None:
        super().__init__(columns)
        self.rows = rows

    def __len__(self) -> int:
        return self.rows


def pd_metadata(path: Path) -> bytes:
    import pyarrow.parquet

    found: bytes = pyarrow.parquet.read_schema(path).metadata[b"lca_posthoc"]
    return found


def test_a_table_has_a_row_for_every_place(tmp_path: Path, plain: Path) -> None:
    result = lca(
        "export",
        plain / "r.lca",
        "-o",
        tmp_path / "t",
        "--format",
        "csv",
        "--loss",
        "train",
        "--finding",
        "layers",
    )
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "t" / "train" / "layers_step_layer.csv").read_text().splitlines()
    assert lines[0].startswith('"step","layer",')
    assert lines[0].endswith(',"elements","role","allocated","cumulative"')
    assert [line.split(",")[:2] for line in lines[1:4]] == [
        ["0", '"hidden"'],
        ["0", '"out"'],
        ["1", '"hidden"'],
    ]
    assert len(lines) == 1 + 6 * 2


def test_names_that_a_spreadsheet_takes_for_formulas_are_quoted_and_not_altered(
    run: Run, tmp_path: Path
) -> None:
    files = export(run, tmp_path / "o", format="csv", losses=["per_class"], findings=["layers"])
    (path,) = (each for each in files if each.name == "layers_layer_group.csv")
    text = path.read_bytes().decode()
    found = read_csv(path)
    assert set(found["layer"]) == set(expected(run, "per_class", "layers").layer.values)
    assert {"=1+1", "@SUM(A1)", "-2", "+x", 'x"y,z', "new\nline", "car\rriage", "nul\0nul"} <= set(
        found["layer"]
    )
    assert '\n"=1+1","=evil/\0!",' in text


def test_numbers_keep_every_digit_and_their_type() -> None:
    values = np.array([0.1, 1 / 3, 5e-324, -0.0, np.inf, np.nan])
    data = xr.Dataset(
        {"a": ("x", values), "b": ("x", values.astype("float32")), "c": ("x", [2**62 + 1] * 6)}
    )
    ((dims, table),) = tables(data)
    assert dims == ("x",)
    assert list(table.dtypes.astype(str)) == ["int64", "float64", "float32", "int64"]


# --- TensorBoard ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The accumulators of TensorBoard itself, by loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tmp_path_factory.mktemp("events") / "out"
    export(run, place, format="tensorboard")
    found = {}
    for loss in run:
        found[loss] = EventAccumulator(
            str(place / run.manifest.losses[loss].key),
            size_guidance={"tensors": 0, "histograms": 0},
        )
        found[loss].Reload()
    return found


def scalars(events: Any, tag: str) -> dict[int, float]:
    from tensorboard.util.tensor_util import make_ndarray

    return {each.step: make_ndarray(each.tensor_proto).item() for each in events.Tensors(tag)}


def test_scalars_are_those_of_the_findings(run: Run, events: dict[str, Any]) -> None:
    for loss, found in events.items():
        wanted: dict[str, xr.DataArray] = {}
        data = {name: expected(run, loss, name) for name in ("curve", "helping", "layers")}
        for name, columns in (
            ("curve", ("loss", "predicted", "residual")),
            ("helping", ("helping", "hurting")),
        ):
            wanted |= {column: data[name][column] for column in columns}
        for column in ("allocated", "cumulative"):
            each = data["layers"][column]
            wanted |= {
                f"{column}/{layer}": each.isel(layer=at)
                for at, layer in enumerate(each.layer.values)
            }
        if run[loss].record.groups is not None:
            wanted = {
                f"{tag}/group {group}": each.isel(group=at)
                for tag, each in wanted.items()
                for at, group in enumerate(each.group.values)
            }
        assert set(found.Tags()["tensors"]) == set(wanted)
        for tag, each in wanted.items():
            assert scalars(found, tag) == dict(
                zip(range(1, 7), each.values.tolist(), strict=True)
            ), tag


def test_histograms_are_the_stored_counts(run: Run, events: dict[str, Any]) -> None:
    for loss, found in events.items():
        results = run[loss]
        stored, edges, labels = (
            results.histogram,
            results.histogram.edge.values,
            results.record.groups or [None],
        )
        assert found.Tags()["histograms"] == [
            "allocation" if each is None else f"allocation/group {each}" for each in labels
        ]
        for row, tag in enumerate(found.Tags()["histograms"]):
            assert [each.step for each in found.Histograms(tag)] == list(range(1, 7))
            for at, each in enumerate(found.Histograms(tag)):
                value = each.histogram_value
                counts = stored["count"].values[at].reshape(len(labels), -1)[row]
                zero = stored["zero"].values[at].reshape(-1)[row]
                counted = dict(zip(value.bucket_limit, value.bucket, strict=True))
                for bin_, count in enumerate(counts):
                    wanted = count + (zero if edges[bin_ + 1] == 0 else 0)
                    assert counted.get(edges[bin_ + 1], 0) == wanted
                assert value.num == counts.sum() + zero == sum(value.bucket)
                assert value.bucket[0] == 0
                assert list(value.bucket_limit) == sorted(value.bucket_limit)
                allocation = [
                    values.values[at].reshape(len(labels), -1)[row]
                    for values in results.allocation.values()
                ]
                flat = np.concatenate(allocation).astype("float64")
                assert value.sum == pytest.approx(flat.sum(), rel=1e-4, abs=1e-9)
                assert 0.5 < value.sum_squares / (flat**2).sum() < 2  # from the middles of the bins
                assert value.min <= flat.min() <= flat.max() <= value.max


def test_a_long_run_is_thinned_and_says_so(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("lca_posthoc.export.events.HISTOGRAMS", 2)
    monkeypatch.setattr("lca_posthoc.export.events.SCALARS", 3 * 3)
    said: list[str] = []
    export(
        open_run(plain / "r.lca"),
        tmp_path / "o",
        format="tensorboard",
        losses=["train"],
        findings=["curve"],
        say=said.append,
    )
    found = EventAccumulator(str(tmp_path / "o" / "train"))
    found.Reload()
    assert list(scalars(found, "loss")) == [1, 4, 6]
    assert said == ["loss 'train' has 3 curves: 3 of 6 segments are written."]
    assert found.Tags()["histograms"] == []
    export(
        open_run(plain / "r.lca"),
        tmp_path / "p",
        format="tensorboard",
        losses=["train"],
        findings=["helping"],
        say=said.append,
    )
    found = EventAccumulator(str(tmp_path / "p" / "train"), size_guidance={"histograms": 0})
    found.Reload()
    assert [each.step for each in found.Histograms("allocation")] == [1, 6]
    assert said[-1] == "loss 'train': histograms of 2 of 6 segments are written."


# --- what is left out, and what is refused --------------------------------------------------------


def test_what_the_run_does_not_keep_is_left_out_with_a_word(plain: Path, tmp_path: Path) -> None:
    result = lca("export", plain / "tensors.lca", "-o", tmp_path / "out", "--format", "csv")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("wrote ")
    files = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    allowed = ("blocks", "candidates", "curve", "generalisation", "layers", "peaks")
    assert {name for name in files if not name.startswith(allowed)} == set()
    assert all(any(name.startswith(finding) for name in files) for finding in allowed)
    says(
        result.stderr,
        "note: the run keeps tensors, so units (--keep units) and helping, distribution, "
        "oscillation (--keep statistics) are skipped.",
    )
    assert result.stderr.count("are skipped") == 1, "said once, not of every loss"
    needs = "candidates: Units and parameters need --keep statistics; this run keeps tensors."
    assert result.stderr.count(needs) == result.stderr.count("candidates") == 1
    columns = pd.read_csv(tmp_path / "out" / "train" / "candidates.csv").columns
    errors = ["quadrature", "precision", "error", "verdict"]
    assert list(columns) == ["layer", "elements", "role", "total", *errors, "mean", "freeze"]


def test_events_of_sums_have_curves_and_layers_alone(plain: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tmp_path / "out"
    result = lca("export", plain / "tensors.lca", "-o", place, "--format", "tensorboard")
    assert result.exit_code == 0, result.output
    says(result.stderr, "the run keeps tensors", "histograms (--keep statistics) are skipped")
    for loss in ("train", "validation"):
        found = EventAccumulator(str(place / loss))
        found.Reload()
        assert {tag.partition("/")[0] for tag in found.Tags()["tensors"]} == {
            *("loss", "predicted", "residual", "allocated", "cumulative")
        }
        assert found.Tags()["histograms"] == []
    asked = ("--format", "tensorboard", "--finding", "helping")
    result = lca("export", plain / "tensors.lca", "-o", tmp_path / "asked", *asked)
    refused(result, "helping", "train", "the run keeps tensors", "needs --keep statistics")
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("name", ["units", "helping", "distribution", "oscillation", "microscope"])
def test_one_that_was_asked_for_is_an_error(name: str, plain: Path, tmp_path: Path) -> None:
    if name not in known():
        pytest.skip("not there yet")
    result = lca("export", plain / "tensors.lca", "-o", tmp_path / "out", "--finding", name)
    refused(result, name, "train", "--keep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--loss", "nosuch"), ("nosuch", "'train', 'validation'")),
        (("--finding", "nosuch"), ("nosuch", "curve", "layers")),
        (("--finding", "compare"), ("compare",)),
        (
            ("--format", "tensorboard", "--finding", "distribution"),
            ("TensorBoard", "curve", "distribution"),
        ),
        (("--format", "tensorboard", "--loss", "nosuch"), ("nosuch",)),
        (("--format", "xlsx"), ("xlsx", "netcdf")),
    ],
)
def test_what_is_not_there_is_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], plain: Path, tmp_path: Path
) -> None:
    refused(lca("export", plain / "r.lca", "-o", tmp_path / "out", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file.nc").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    for place in ("full", "file.nc", "link", "file.nc/inside"):
        refused(
            lca(
                "export",
                plain / "r.lca",
                "-o",
                tmp_path / place,
                "--loss",
                "train",
                "--finding",
                "curve",
            ),
            place.split("/")[0],
        )
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert (
        lca("export", plain / "r.lca", "-o", tmp_path / "empty", "--loss", "train").exit_code == 0
    )
    assert (tmp_path / "empty" / "train" / "curve.nc").is_file()


def test_one_table_may_be_one_file(plain: Path, tmp_path: Path) -> None:
    options = ("--loss", "train", "--finding", "curve")
    for suffix in ("nc", "csv", "parquet"):
        result = lca("export", plain / "r.lca", "-o", tmp_path / f"curve.{suffix}", *options)
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.csv",
        "curve.nc",
        "curve.parquet",
    ]
    wanted = findings.curve(open_run(plain / "r.lca")["train"])
    same(read_netcdf(tmp_path / "curve.nc"), wanted)
    assert pd.read_csv(tmp_path / "curve.csv")["loss"].tolist() == wanted["loss"].values.tolist()
    assert (
        pd.read_parquet(tmp_path / "curve.parquet")["loss"].tolist()
        == wanted["loss"].values.tolist()
    )
    refused(
        lca("export", plain / "r.lca", "-o", tmp_path / "x.nc"), "x.nc", "one file", "--finding"
    )
    refused(
        lca(
            "export",
            plain / "r.lca",
            "-o",
            tmp_path / "x.csv",
            "--loss",
            "train",
            "--finding",
            "layers",
        ),
        "one file",
    )
    refused(
        lca("export", plain / "r.lca", "-o", tmp_path / "x.nc", "--format", "csv", *options),
        "x.nc",
        "csv",
    )
    assert len(list(tmp_path.iterdir())) == 3


def test_an_export_that_fails_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(plain / "r.lca", tmp_path / "r.lca"))
    chunk = next((damaged / "data.zarr" / "validation" / "tensors" / "allocated").rglob("c/*/*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    for format_ in ("netcdf", "csv", "tensorboard"):
        result = lca("export", damaged, "-o", tmp_path / "out", "--format", format_)
        assert result.exit_code == 1
        says(result.stderr, "validation", "damaged", "lca repair")
        assert [path.name for path in tmp_path.iterdir()] == ["r.lca"]


def test_a_run_without_a_segment_has_nothing_to_export(plain: Path, tmp_path: Path) -> None:
    empty = Path(shutil.copytree(plain / "r.lca", tmp_path / "r.lca"))
    for marker in empty.glob("commits/*/0*.json"):
        marker.unlink()
    for format_ in ("netcdf", "tensorboard"):
        result = lca("export", empty, "-o", tmp_path / "out", "--format", format_)
        assert result.exit_code == 2
        says(result.stderr, "nothing to export yet", "lca run")
    assert [path.name for path in tmp_path.iterdir()] == ["r.lca"]


def test_an_unfinished_loss_is_exported_as_far_as_it_is(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain / "r.lca", tmp_path / "r.lca"))
    sorted(run.glob("commits/train/0*.json"))[-1].unlink()
    result = lca("export", run, "-o", tmp_path / "out", "--loss", "train")
    assert result.exit_code == 0, result.output
    says(result.stderr, "note: curve of loss 'train': ", "of 6 segments are finished")
    assert 0 < read_netcdf(tmp_path / "out" / "train" / "curve.nc").sizes["step"] < 6


def test_losses_that_are_unequally_far_do_not_stop_the_others(plain: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(plain / "r.lca", tmp_path / "r.lca"))
    sorted(run.glob("commits/train/0*.json"))[-1].unlink()
    result = lca("export", run, "-o", tmp_path / "out", "--format", "csv")
    assert result.exit_code == 0, result.output
    says(result.stderr, "generalisation of loss 'train' is skipped: ", "same segments", "lca run")
    assert (tmp_path / "out" / "validation" / "layers_layer.csv").is_file()


@pytest.mark.parametrize(
    ("format_", "package"),
    [("netcdf", "h5netcdf"), ("parquet", "pyarrow"), ("tensorboard", "tensorboard")],
)
def test_a_package_that_is_missing_is_named(
    format_: str, package: str, plain: Path, tmp_path: Path
) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom lca_posthoc.cli import main\n"
        f"sys.argv = ['lca', 'export', {str(plain / 'r.lca')!r}, '-o', {str(tmp_path / 'out')!r}, "
        f"'--format', {format_!r}]\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 5, done.stderr
    assert f"needs the package {package}" in done.stderr
    assert f"pip install {package}" in done.stderr
    assert list(tmp_path.iterdir()) == []
