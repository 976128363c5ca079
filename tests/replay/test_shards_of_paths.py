"""Path bands of spans that are computed in shards of their data, and of checkpoints beside some that
are not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lca_posthoc import open_run
from lca_posthoc.checkpoints import trajectory
from lca_posthoc.checkpoints.trajectory import Checkpoint
from lca_posthoc.errors import InputError, SpanError
from lca_posthoc.replay import pending_spans
from lca_posthoc.replay.events import SpanFailed
from lca_posthoc.replay.worker import replay_in_shards
from lca_posthoc.results import Run

from ..helpers import small_perceptron
from ..helpers.small_perceptron import copied, file_of, train

STEPS = range(0, 22, 2)  # ten segments
BATCH = 4  # of 40 examples


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = train(tmp_path_factory.mktemp("dense"), STEPS[-1])
    return copied(dense, tmp_path_factory.mktemp("sparse"), STEPS)


def replayed(iterates: Path, out: Path, **options: Any) -> Run:
    return small_perceptron.replay(
        iterates, out, **{"batch_size": BATCH, "losses": ["train"], **options}
    )


def paths_of(run: Run) -> dict[str, np.ndarray]:
    """Shifts and doubled lines, and what is allocated, by step."""
    results = run["train"]
    tables = {name: results.other_path[name].values for name in ("shift", "doubled")}
    return {**tables, "allocated": results.tensors["allocated"].values}


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "near"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "gauss-2"])
@pytest.mark.parametrize("keep", ["tensors", "units"])
def test_bands_of_shards_are_those_of_whole_spans(
    sparse: Path, tmp_path: Path, keep: str, rule: str, precision: str, near: float
) -> None:
    options = {"keep": keep, "rule": rule, "precision": precision}
    cut = replayed(sparse, tmp_path / "cut.lca", shards=3, **options)
    whole = replayed(sparse, tmp_path / "whole.lca", shards=1, **options)
    assert (cut.manifest.settings["shards"], whole.manifest.settings["shards"]) == (3, 1)
    ours, theirs = paths_of(cut), paths_of(whole)
    size = np.abs(theirs["allocated"]).sum()
    for name, values in theirs.items():
        assert np.abs(ours[name] - values).max() <= near * size, name
        assert np.abs(values).max() > 1e-3 * size, name  # so that it says something


def test_bits_do_not_depend_on_where_spans_of_shards_end(sparse: Path, tmp_path: Path) -> None:
    first, *others = (
        paths_of(
            replayed(
                sparse,
                tmp_path / f"{span}.lca",
                shards=3,
                span=span,
                precision="float32",
                steps="0:8,12:20",
            )
        )
        for span in (1, 2, 8)
    )
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(values, other[name])


def test_a_random_part_of_the_segments_in_shards_has_the_bits_of_all(
    sparse: Path, tmp_path: Path
) -> None:
    whole = replayed(sparse, tmp_path / "whole.lca", shards=3)["train"].other_path
    part = replayed(sparse, tmp_path / "part.lca", shards=3, segments="0.6@1")["train"].other_path
    assert 0 < part.sizes["step"] < whole.sizes["step"]
    for name in ("shift", "doubled"):
        np.testing.assert_array_equal(
            part[name].values, whole[name].sel(step=part["step"].values).values
        )


@pytest.mark.parametrize("known", [4, 5, 6])
def test_a_run_in_shards_that_grew_is_the_same_to_the_bit(
    known: int, sparse: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"shards": 3, "span": 2}
    growing = copied(sparse, tmp_path / "growing", STEPS[:known])
    replayed(growing, tmp_path / "grown.lca", **options)
    copied(sparse, growing, STEPS)
    grown = paths_of(replayed(growing, tmp_path / "grown.lca", **options))
    whole = paths_of(replayed(sparse, tmp_path / "whole.lca", **options))
    for name, values in whole.items():
        np.testing.assert_array_equal(values, grown[name])


# --- a checkpoint that is not finite --------------------------------------------------------------


def poisoned(source: Path, place: Path, step: int, value: float) -> Path:
    copied(source, place, STEPS)
    tensors = load_file(file_of(place, step))
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = value
    save_file(tensors, file_of(place, step), {"format": "pt", "step": str(step), "every": "2"})
    return place


def failures(iterates: Path, out: Path, **options: Any) -> list[tuple[int, int | None]]:
    """Spans that fail, and the step with a number that is not finite."""
    events: list[Any] = []
    with pytest.raises(SpanError, match="failed; the others are complete"):
        replayed(iterates, out, progress=events.append, **options)
    failed = [event for event in events if isinstance(event, SpanFailed)]
    return sorted((event.span, event.not_finite) for event in failed)


KINDS: Mapping[str, dict[str, Any]] = {
    "tensors": {"shards": 1},
    "parameters": {"keep": "parameters"},
    "fixed": {"shards": 1, "rule": "gauss-2"},
    "shards": {"shards": 3},
    "fixed in shards": {"shards": 3, "rule": "gauss-2"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("place", "value"), [(1, math.nan), (5, math.inf), (4, math.nan)])
def test_a_checkpoint_that_is_not_finite_fails_its_own_two_segments_alone(
    sparse: Path, tmp_path: Path, place: int, value: float, options: dict[str, Any]
) -> None:
    step = STEPS[place]
    iterates, out = poisoned(sparse, tmp_path / "ck", step, value), tmp_path / "run.lca"
    expected = [(span, step) for span in (place - 1, place)]
    assert failures(iterates, out, span=1, **options) == expected
    ours = open_run(out)["train"].other_path
    sides = {"before": STEPS[:place], "after": STEPS[place + 1 :]}
    for side, steps in sides.items():
        if len(steps) < 2:
            continue
        alone = replayed(
            copied(sparse, tmp_path / side, steps), tmp_path / f"{side}.lca", **options
        )
        theirs = alone["train"].other_path
        # lines of twice the length begin at every second checkpoint of a series
        even = side == "before" or (place + 1) % 2 == 0
        for name in ("shift", *(["doubled"] if even else [])):
            np.testing.assert_array_equal(
                ours[name].sel(step=theirs["step"]).values, theirs[name].values
            )
    # and running again changes nothing
    assert failures(iterates, out, span=1, **options) == expected
    assert open_run(out)["train"].other_path.equals(ours)


def test_bands_rely_on_what_a_neighbour_that_is_not_finite_holds(
    sparse: Path, tmp_path: Path
) -> None:
    iterates, out = poisoned(sparse, tmp_path / "ck", STEPS[5], math.nan), tmp_path / "run.lca"
    failures(iterates, out, span=1)
    copied(sparse, iterates, STEPS)
    with pytest.raises(InputError, match=f"the content of step {STEPS[5]} differs"):
        replayed(iterates, out, span=1)


def test_a_segment_between_two_that_are_not_finite_has_no_band(
    sparse: Path, tmp_path: Path
) -> None:
    for shards in (1, 3):
        iterates = poisoned(sparse, tmp_path / "one", STEPS[3], math.nan)
        tensors = load_file(file_of(iterates, STEPS[3]))
        save_file(tensors, file_of(iterates, STEPS[6]), {"format": "pt", "step": str(STEPS[6])})
        out = tmp_path / f"{shards}.lca"
        assert [span for span, _ in failures(iterates, out, span=1, shards=shards)] == [2, 3, 5, 6]
        path = open_run(out)["train"].other_path.sel(step=STEPS[4])
        assert not path["shift"].values.any()
        assert not path["doubled"].values.any()


def test_spans_of_another_length_bend_alike_beside_one_that_is_not_finite(
    sparse: Path, tmp_path: Path
) -> None:
    iterates = poisoned(sparse, tmp_path / "ck", STEPS[5], math.nan)
    for shards in (1, 3):
        tables = []
        for span in (1, 2):
            out = tmp_path / f"{shards}-{span}.lca"
            failures(iterates, out, span=span, shards=shards)
            tables.append(open_run(out)["train"].other_path)
        for name in ("shift", "doubled"):
            np.testing.assert_array_equal(tables[0][name].values, tables[1][name].values)


class Stopped(Exception):
    """Ends a driver in the middle, as a kill does."""


@pytest.mark.parametrize("most", [3, 6, 12])
def test_a_run_in_shards_that_was_killed_bends_alike_beside_one_that_is_not_finite(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    iterates = poisoned(sparse, tmp_path / "ck", STEPS[4], math.nan)
    options: dict[str, Any] = {"shards": 3, "span": 1}
    failures(iterates, tmp_path / "undisturbed.lca", **options)
    left = itertools.count(most, -1)

    def compute(spec: Any) -> Any:
        if not next(left):
            raise Stopped
        return replay_in_shards(spec)

    with monkeypatch.context() as patched:
        patched.setattr(pending_spans, "replay_in_shards", compute)
        with pytest.raises(Stopped):
            replayed(iterates, tmp_path / "run.lca", **options)
    failures(iterates, tmp_path / "run.lca", **options)
    ours, theirs = (open_run(tmp_path / name)["train"] for name in ("run.lca", "undisturbed.lca"))
    assert ours.other_path.equals(theirs.other_path)
    assert ours.steps.equals(theirs.steps)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_neighbour_that_cannot_be_read_fails_what_bends_by_it(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    original, out = trajectory.read_stored, tmp_path / "run.lca"

    def read(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        if checkpoint.step == STEPS[5]:
            raise SpanError("the disk is away")
        return original(checkpoint, names)

    with monkeypatch.context() as patched:
        patched.setattr(trajectory, "read_stored", read)
        failed = failures(sparse, out, span=1, **options)
    assert failed == [(span, None) for span in (3, 4, 5, 6)]
    mended = replayed(sparse, out, span=1, **options)["train"]
    undisturbed = replayed(sparse, tmp_path / "undisturbed.lca", span=1, **options)["train"]
    assert mended.other_path.equals(undisturbed.other_path)
