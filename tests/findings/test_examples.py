"""Findings of single examples against loops over one example at a time, on a classifier whose
allocations were told apart by one backward pass for each.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from xarray.backends import BackendArray
from xarray.core import indexing

from lca_posthoc import findings, plots
from lca_posthoc.errors import InputError
from lca_posthoc.export import export, read_netcdf
from lca_posthoc.findings import per_example
from lca_posthoc.findings.common import layer_of
from lca_posthoc.findings.examples import (
    FATES,
    heat_rows,
    interference_over,
    one_story,
    stories_to_show,
    story_name,
)
from lca_posthoc.report import write_report

from ..helpers import example_runs
from ..helpers.cli import lca, refused
from ..helpers.example_runs import OtherExamples, Told

mpl.use("agg")
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return example_runs.tell(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def weighed(told: Told) -> xr.Dataset:
    """Examples that count more or less than others, and one that does not count."""
    weight = told.examples["weight"].copy(deep=True)
    weight[:] = 1 + np.arange(weight.sizes["example"]) % 3
    weight[:, 4] = 0
    return told.examples.assign(weight=weight)


def of(told: Told, examples: xr.Dataset, **options: Any) -> xr.Dataset:
    return findings.examples(OtherExamples(told.run["train"], examples), **options)


def walk(losses: list[float], least: float) -> tuple[int, int]:
    """The events of one example and its fate, looked for one after the other."""
    events, begin, learned_ever, low = 0, 0, False, 0.0

    def border(step: int) -> float:
        """What the loss must fall below: its start, or its highest since, where that is lower."""
        return min(losses[0], max(losses[begin : step + 1]))

    while True:
        learned = next(
            (
                step
                for step in range(begin + 1, len(losses))
                if (border(step) - losses[step] >= least and border(step) > losses[step])
                or (learned_ever and losses[step] <= low)
            ),
            None,
        )
        if learned is None:
            return events, 3 if learned_ever else 0
        learned_ever, high = True, border(learned)
        begin_again = next(
            (
                step
                for step in range(learned + 1, len(losses))
                if losses[step] > (high + min(losses[learned:step])) / 2
            ),
            None,
        )
        if begin_again is None:
            return events, 2 if events else 1
        low = min(losses[learned:begin_again])
        events, begin = events + 1, begin_again


def close(one: object, other: object) -> None:
    np.testing.assert_allclose(np.asarray(one, float), np.asarray(other, float), atol=1e-9)


# --- laws -----------------------------------------------------------------------------------------


def test_each_example_is_described_as_a_loop_over_its_losses_does(told: Told) -> None:
    found, fates = of(told, told.examples), []
    for number, losses in example_runs.each_example(told.examples):
        one = found.sel(example=number)
        lowest = int(losses.argmin())
        steps = 5 * np.arange(len(losses))
        half = next(
            (at for at, loss in enumerate(losses) if loss <= (losses[0] + losses.min()) / 2), 0
        )
        close(one["loss_lowest"], losses.min())
        close(one["forgotten"], losses[-1] - losses.min())
        assert int(one["step_lowest"]) == steps[lowest]
        assert int(one["step_half"]) == (steps[half] if lowest else 0)
        assert (int(one["events"]), int(one["fate"])) == walk(losses.tolist(), found.attrs["least"])
        fates.append(int(one["fate"]))
    assert found["fates"].values.tolist() == [fates.count(fate) for fate in range(len(FATES))]
    assert found["events"].values.max() > 1
    assert found.attrs["least"] == pytest.approx(
        0.1 * float(told.examples["loss_start"][0].astype(float).mean())
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=2, max_size=12),
    st.sampled_from([0.0, 1.0, 2.0, 3.0]),
)
def test_events_are_those_of_a_walk_along_each_series(rows: list[list[int]], least: float) -> None:
    losses = np.array(rows, "float32")
    dims, steps = ("step", "example"), len(rows) - 1
    data = xr.Dataset(
        {
            "allocated": ((*dims, "tensor"), np.zeros((steps, 3, 1), "float32")),
            "loss_start": (dims, losses[:-1]),
            "loss_end": (dims, losses[1:]),
        },
        coords={"step": np.arange(steps), "example": np.arange(3)},
    )
    reader = per_example.ExampleReader(
        table=xr.Dataset(), data=data, per="example", layers={"fc": [0]}, texts=None
    )
    course = findings.examples.__globals__["_course"](reader, slice(0, 3), least)
    for example in range(3):
        expected = walk(losses[:, example].tolist(), least)
        assert (course.events[example], course.fate[example]) == expected


def test_layers_add_up_to_what_each_loss_did(told: Told) -> None:
    found = of(told, told.examples)
    change = found["loss_end"] - found["loss_start"]
    np.testing.assert_allclose(
        found["allocated"].sum("layer") + found["residual"], change, atol=1e-5
    )
    stories = found["story_allocated"].isel(stretch=-1)
    np.testing.assert_allclose(
        stories, found["allocated"].sel(example=found["story_example"].values), atol=1e-9
    )


@pytest.mark.parametrize("by", ["module", "tensor", 1])
def test_what_layers_did_since_the_lowest_loss_is_what_was_forgotten(
    told: Told, by: str | int
) -> None:
    found = of(told, told.examples, by=by)
    for number, losses in example_runs.each_example(told.examples):
        one, lowest = told.examples.isel(example=number), int(losses.argmin())
        for layer in found["layer"].values:
            members = [layer_of(str(name), by) == layer for name in one["tensor"].values]
            since = one["allocated"].values.astype(float)[lowest:, members].sum()
            close(found["since_lowest"].sel(example=number, layer=layer), since)
        rest = one["residual"].values.astype(float)[lowest:].sum()
        total = float(found["since_lowest"].sel(example=number).sum()) + rest
        assert total == pytest.approx(float(found["forgotten"].sel(example=number)), abs=1e-5)


def test_the_mean_over_examples_is_the_layer_of_the_plain_loss(told: Told) -> None:
    found, layers = of(told, told.examples), findings.layers(told.run["train"])
    np.testing.assert_allclose(found["total"], layers["total"].sel(layer=found["layer"]), atol=1e-5)


def test_interference_is_counted_over_examples_by_their_weights(
    told: Told, weighed: xr.Dataset
) -> None:
    found = of(told, weighed)
    signed, sizes = np.zeros((2, *found["interference"].shape))
    for column, layer in enumerate(found["layer"].values):
        members = [layer_of(str(name)) == layer for name in weighed["tensor"].values]
        for step in range(weighed.sizes["step"]):
            for example in range(weighed.sizes["example"]):
                one = weighed.isel(step=step, example=example)
                effect = float(one["allocated"].values.astype(float)[members].sum())
                signed[step, column] += float(one["weight"]) * effect
                sizes[step, column] += float(one["weight"]) * abs(effect)
    weights = float(weighed["weight"][0].sum())
    close(found["interference"], 1 - abs(signed) / sizes)
    close(found["absolute"], sizes / weights)
    close(found["interference_mean"], 1 - abs(signed).sum(0) / sizes.sum(0))
    counting = weighed["weight"][0].values
    total = found["allocated"].values
    close(found["total"], counting @ total / weights)
    close(found["interference_total"], 1 - abs(counting @ total) / (counting @ abs(total)))
    assert 4 not in found["story_example"].values
    assert int(found["fates"].sum()) == weighed.sizes["example"] - 1
    assert "Excluded: 1 example of weight 0." in found.attrs["left_out"]


def test_the_layers_that_did_most_are_counted(told: Told) -> None:
    found = of(told, told.examples)
    total, names = found["allocated"].values, found["layer"].values
    since, forgotten = found["since_lowest"].values, found["fate"].values == 3
    for name, values in {"helped": -total, "hurt": total, "forgot": since[forgotten]}.items():
        best = [names[row.argmax()] for row in values if row.max() > 0]
        assert found[f"{name}_most"].values.tolist() == [best.count(layer) for layer in names]


def test_extremes_are_the_ends_of_the_sorted_table(told: Told) -> None:
    table = of(told, told.examples)
    fell = (table["loss_start"] - table["loss_lowest"]).values
    least = float(np.median(fell))  # of an example that fell by less, nothing can be forgotten
    found = of(told, told.examples, extremes=4, least=least)
    change = (found["loss_end"] - found["loss_start"]).values
    forgotten = np.where(found["fate"].values == 3, found["forgotten"].values, 0.0)
    assert not np.array_equal(forgotten, found["forgotten"].values)
    expected = {
        "most helped": [at for at in np.argsort(change) if change[at] < 0],
        "most hurt": [at for at in np.argsort(-change) if change[at] > 0],
        "most forgotten": [at for at in np.argsort(-forgotten) if forgotten[at] > 0],
    }
    kinds = found["story_kind"].values
    for kind, positions in expected.items():
        assert found["story_example"].values[kinds == kind].tolist() == positions[:4]
    for story in range(found.sizes["story"]):
        one = found.isel(story=story)
        of_example = found.sel(example=int(one["story_example"]))
        by = {"most helped": -of_example["allocated"], "most hurt": of_example["allocated"]}
        worst = by.get(str(one["story_kind"].item()), of_example["since_lowest"])
        assert one["story_layer"].item() == worst["layer"].values[worst.values.argmax()]


def test_a_named_example_is_told_by_its_fate_or_by_the_change_of_its_loss(told: Told) -> None:
    table = of(told, told.examples)
    least = float(np.median((table["loss_start"] - table["loss_lowest"]).values))
    every = table["example"].values.tolist()
    found = of(told, told.examples, least=least, named=every)
    ways = set[str]()
    for story in np.flatnonzero(found["story_kind"].values == "named"):
        one = found.isel(story=int(story))
        of_example = found.sel(example=int(one["story_example"]))
        fate = str(found["fate_name"].values[int(of_example["fate"])])
        change = float(of_example["loss_end"] - of_example["loss_start"])
        way = "forgotten" if fate == "forgotten" else "hurt" if change > 0 else "helped"
        by = {
            "forgotten": of_example["since_lowest"],
            "hurt": of_example["allocated"],
            "helped": -of_example["allocated"],
        }[way]
        assert one["story_fate"].item() == fate
        assert one["story_layer"].item() == by["layer"].values[by.values.argmax()]
        ways.add(way)
    assert {"forgotten", "helped"} <= ways


# --- streams --------------------------------------------------------------------------------------


class Generated(BackendArray):  # type: ignore[misc]
    """An array that is nowhere: every number follows from its place, and every read is noted."""

    def __init__(self, shape: tuple[int, ...], reads: list[int]) -> None:
        self.shape, self.dtype, self.reads = shape, np.dtype("float32"), reads

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._numbers
        )

    def _numbers(self, key: tuple[Any, ...]) -> Array:
        axes = [
            np.arange(extent)[part] if isinstance(part, slice) else np.atleast_1d(part)
            for part, extent in zip(key, self.shape, strict=True)
        ]
        places = np.ix_(*axes)
        values = sum(np.sin(place * (axis + 0.7)) for axis, place in enumerate(places))
        self.reads.append(int(np.prod([len(axis) for axis in axes])))
        squeezed = tuple(0 if isinstance(part, (int, np.integer)) else slice(None) for part in key)
        return np.asarray(values, "float32")[squeezed]


class Long(OtherExamples):
    """The same run, as if it had been so many segments long."""

    @property
    def tensors(self) -> xr.Dataset:
        return self._repeated(super().tensors)

    @property
    def steps(self) -> xr.Dataset:
        return self._repeated(super().steps)

    def _repeated(self, table: xr.Dataset) -> xr.Dataset:
        steps = self.examples.sizes["step"]
        table = table.isel(step=np.arange(steps) % table.sizes["step"])
        return table.assign_coords(step=np.arange(steps), step_end=("step", np.arange(steps) + 1))


def test_a_dataset_larger_than_the_bound_is_read_within_it(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound: `BLOCK // 4` stored numbers at a time; it is set low to see it held."""
    reads = list[int]()
    steps, examples, tensors = 120, 8_000, told.examples.sizes["tensor"]
    dims: tuple[str, ...] = ("step", "example", "tensor")
    variables = {
        name: xr.Variable(
            dims[:axes],
            indexing.LazilyIndexedArray(Generated((steps, examples, tensors)[:axes], reads)),
        )
        for name, axes in {"allocated": 3, "loss_start": 2, "loss_end": 2, "residual": 2}.items()
    }
    weight = np.broadcast_to(np.float32(1), (steps, examples))
    variables["weight"] = xr.Variable(dims[:2], weight)
    data = xr.Dataset(
        variables,
        coords={
            "step": np.arange(steps),
            "example": np.arange(examples),
            "tensor": told.examples["tensor"].values,
        },
    )
    monkeypatch.setattr(per_example, "BLOCK", 2**18)
    results = Long(told.run["train"], data)
    findings.examples(Long(told.run["train"], data.isel(example=slice(50))))  # what is imported
    reads.clear()
    tracemalloc.start()
    try:
        found = findings.examples(results, most=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = 4 * steps * examples * tensors
    assert max(reads) <= 2**16
    assert peak < whole / 10
    assert found.sizes["example"] == 500
    assert int(found["fates"].sum()) == examples
    assert "The table has 500 of 8,000 examples, drawn at random" in found.attrs["left_out"]


@pytest.mark.parametrize(
    ("chunks", "block"),
    [((1, 1, 9), 2**22), ((4, 7, 9), 2**10), ((16, 24, 9), 4), (None, 4), (None, 2**12)],
)
def test_blocks_and_chunks_change_nothing(
    told: Told,
    weighed: xr.Dataset,
    chunks: tuple[int, ...] | None,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = of(told, weighed, frames=6)
    stored = weighed
    if chunks is not None:
        encoding = {"allocated": {"chunks": chunks}} | {
            name: {"chunks": chunks[:2]}
            for name in ("loss_start", "loss_end", "residual", "weight")
        }
        weighed.to_zarr(tmp_path / "examples", encoding=encoding, consolidated=False)
        stored = xr.open_zarr(tmp_path / "examples", chunks=None, consolidated=False)
    monkeypatch.setattr(per_example, "BLOCK", block)
    xr.testing.assert_allclose(of(told, stored, frames=6), whole, rtol=1e-9, atol=1e-12)


# --- elements, texts and refusals -----------------------------------------------------------------


def test_elements_are_named_by_their_example_and_their_index(told: Told) -> None:
    elements = example_runs.by_element(told.examples, 3)
    found, whole = of(told, elements, named=["7:2"]), of(told, told.examples, named=[7])
    assert found.sizes["element"] == 3 * whole.sizes["example"]
    np.testing.assert_allclose(found["total"], whole["total"], atol=1e-6)
    assert stories_to_show(found) == [0]
    assert (story_name(found, 0), found["story_kind"].values[0]) == ("7:2", "named")
    own = one_story(whole, 0)["allocated"]
    np.testing.assert_allclose(one_story(found, 0)["allocated"], own * 1.5, atol=1e-5)
    for name, words in {
        "7": "EXAMPLE:INDEX, such as 7:0",
        "7:9": "example 7 has no element 9; its elements are 7:0 to 7:2",
        "99:0": "no element 99:0",
    }.items():
        with pytest.raises(InputError, match=words):
            of(told, elements, named=[name])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("24", "no example 24. They have 24 examples, of the numbers 0 to 23"),
        ("-1", "example by its number"),
        ("seven", "example by its number"),
        ("1:2:3", "example by its number"),
        ("1:2", "not per element"),
    ],
)
def test_an_example_that_is_not_there_is_refused(told: Told, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        of(told, told.examples, named=[name])


def test_texts_come_from_the_run_or_from_who_asks(told: Told) -> None:
    worded = told.examples.assign_coords(
        text=("example", [f"digit {at}" for at in range(told.examples.sizes["example"])])
    )
    found = of(told, worded, named=[3])
    assert found["story_text"].values[0] == "digit 3"
    assert found["example_text"].values.tolist() == worded["text"].values.tolist()
    given_texts = of(told, worded, named=[3, 4], texts={3: "three"})
    assert given_texts["story_text"].values[:2].tolist() == ["three", ""]


def test_a_loss_that_does_not_tell_its_examples_is_refused(told: Told, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Loss 'train' has: --loss train"):
        findings.examples(told.run["plain"])
    plain = ("--loss", "plain")
    out = lca("plot", told.run.path, "examples", *plain, "-o", tmp_path / "x.png")
    refused(out, "--loss train")
    out = lca("export", told.run.path, *plain, "-o", tmp_path / "asked", "--finding", "examples")
    refused(out, 'per="example"')


def test_the_run_has_what_brute_force_gives(told: Told) -> None:
    names = [str(name) for name in told.examples["tensor"].values]
    wanted = example_runs.brute_force(told.checkpoints, names)
    for field in wanted:
        np.testing.assert_allclose(told.examples[field], wanted[field], rtol=0, atol=2e-6)


# --- figures, page, tables ------------------------------------------------------------------------


def test_rows_of_the_picture_are_means_of_neighbours(told: Told, weighed: xr.Dataset) -> None:
    found = of(told, weighed)
    change = (found["loss_end"] - found["loss_start"]).values
    order = [at for at in np.argsort(change, kind="stable") if at != 4]
    for most, together in ((100, 1), (23, 1), (10, 3), (1, 23)):
        values, amount = heat_rows(found, most)
        assert amount == together
        for row, mean in enumerate(values):
            own = order[row * together : (row + 1) * together]
            close(mean, found["allocated"].values[own].mean(0))


def test_interference_over_all_segments_is_its_mean(told: Told) -> None:
    found = of(told, told.examples)
    close(interference_over(found, 1)["interference"][0], found["interference_mean"])
    close(interference_over(found, 1000)["interference"], found["interference"])


def test_the_figure_shows_the_story_that_was_asked_for(told: Told) -> None:
    found = of(told, told.examples, named=[7])
    figure = plots.examples(found)
    story = next(ax for ax in figure.axes if "example 7" in ax.get_title(loc="left"))
    losses = dict(example_runs.each_example(told.examples))[7]
    drawn = [np.asarray(line.get_ydata(), float) for line in story.lines]
    assert any(
        len(line) == len(losses) and np.allclose(line, losses - losses[0], atol=1e-6)
        for line in drawn
    )
    total = found["allocated"].sel(example=7).values
    assert all(any(np.isclose(line[-1], value) for line in drawn) for value in total)


def test_the_command_and_the_page_show_examples(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example_runs.patched(monkeypatch, told)
    hostile = '<img src=x onerror="alert(1)">\x1b[31m'
    data = told.examples.assign_coords(text=("example", [hostile] * 24))
    example_runs.patched(monkeypatch, Told(told.run, told.checkpoints, data))
    path = tmp_path / "x.png"
    result = lca("plot", told.run.path, "examples", "--example", "7", "-o", path)
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 10_000
    page = write_report([told.run], tmp_path / "page.html").read_text()
    # under losses that have none too
    assert '<section id="examples" data-panels="0 1 2"' in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "&lt;img src=x" in page


def test_what_is_exported_reads_back(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example_runs.patched(monkeypatch, told)
    export(told.run, tmp_path / "out", say=lambda text: None)
    for name in ("examples", "clusters"):
        files = list((tmp_path / "out").rglob(f"{name}.nc"))
        assert [file.parent.name for file in files] == [told.run.manifest.losses["train"].key]
        xr.testing.assert_identical(
            read_netcdf(files[0]), getattr(findings, name)(told.run["train"])
        )


def test_the_summary_says_what_shows_the_examples(told: Told) -> None:
    result = lca("summary", told.run.path)
    assert "24 examples of 'train': `lca plot" in result.output
    assert "examples --loss train" in " ".join(result.output.split())
    assert "examples of" not in lca("summary", told.run.path, "--loss", "plain").output


def test_a_figure_has_a_story_for_each_named_example(told: Told) -> None:
    figure = plots.examples(of(told, told.examples, named=[7, 1]))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    stories = [title for title in titles if title.startswith("example ")]
    assert [title.split(",")[0] for title in stories] == ["example 7", "example 1"]
