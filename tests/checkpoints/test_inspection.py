"""`inspect`: every defect of a faked series is named, and nothing in healthy ones.

The series are small real trainings; a defect is put into copies of their checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lca_posthoc.checkpoints.inspection import Observation, geometry, inspect, sketch
from lca_posthoc.checkpoints.inspection.missing import gaps_in_a_grid
from lca_posthoc.checkpoints.inspection.observations import stretches
from lca_posthoc.errors import InputError
from tests.helpers.cli import says
from tests.helpers.faked_series import Series, State, Training, save, series

LOG_SPACED = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, *range(300, 701, 50)]
BURSTS = [start + step for start in range(0, 601, 100) for step in range(10)]
SEEDS = (0, 1)


def seen_in(place: Path, checkpoints: Series, *, notes: bool = False) -> list[Observation]:
    """What is seen in a series, notes left out unless they are asked for."""
    inspection = inspect(save(place / "series", checkpoints), say=lambda note: None)
    return [some for some in inspection.observations if notes or some.grade != "note"]


# --- healthy series -------------------------------------------------------------------------------

# a training, and the steps at which it was saved
HEALTHY: dict[str, tuple[Training, Sequence[int] | None]] = {
    "warm-up": (Training(shape="warm-up", optimizer="adamw", rate=0.01), None),
    "cosine to 0": (Training(shape="cosine"), None),
    "fine-tuning": (Training(start=7, rate=0.01), None),
    "log-spaced": (Training(shape="warm-up", steps=700, rate=0.02), LOG_SPACED),
    "bursts": (Training(steps=610, optimizer="sgd", rate=0.1), BURSTS),
    "restarts": (Training(shape="restarts", optimizer="sgd", rate=0.2), None),
    "drops": (Training(shape="drops", batch=4), None),
    "batch norm": (Training(normalised=True), None),
    "one long gap": (Training(steps=610, rate=0.1), [0, *range(400, 601, 20)]),
    "two checkpoints": (Training(steps=610, rate=0.1), [0, 600]),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", HEALTHY)
def test_nothing_is_wrong_with_a_healthy_series(tmp_path: Path, case: str, seed: int) -> None:
    training, steps = HEALTHY[case]
    own = replace(training, seed=seed, width=24 * (1 + seed))
    assert seen_in(tmp_path, series(own, steps)) == []


# --- defects --------------------------------------------------------------------------------------

DENSE = Training(rate=0.02)
TUNED = Training(rate=0.02, start=7)


def ordinary(seed: int) -> Series:
    return series(replace(DENSE, seed=seed))


def of_another_seed(seed: int) -> Series:
    return series(replace(DENSE, seed=seed + 100))


def tuned(seed: int, start: int) -> Series:
    return series(replace(TUNED, seed=seed, start=start))


def with_others(checkpoints: Series, others: Series, steps: Sequence[int]) -> Series:
    return checkpoints | {step: others[step] for step in steps}


def exchanged(checkpoints: Series, one: int, other: int) -> Series:
    return checkpoints | {one: checkpoints[other], other: checkpoints[one]}


def in_type(checkpoints: Series, change: Callable[[Tensor], Tensor]) -> Series:
    return {
        step: {name: change(tensor) for name, tensor in state.items()}
        for step, state in checkpoints.items()
    }


def spoilt(state: State, number: float) -> State:
    weight = state["2.weight"].clone()
    weight[3, :2] = number
    return {**state, "2.weight": weight}


def every_tenth(seed: int) -> Series:
    return series(replace(DENSE, seed=seed, steps=610), range(0, 601, 20))


# a series with a defect, the one kind that is seen, and words of it
DEFECTS: dict[str, tuple[Callable[[int], Series], str, tuple[str, ...]]] = {
    "late weights under early names": (
        lambda seed: ordinary(seed) | dict.fromkeys(range(3, 50, 2), ordinary(seed)[60]),
        "identical",
        (
            "25 of 61 checkpoints hold the same weights, with others between them: steps 3, 5, 7, "
            "9, 11, 13 and 19 more",
            "they belong at step 60",
        ),
    ),
    "an early file under a late name": (
        lambda seed: ordinary(seed) | {50: ordinary(seed)[20]},
        "identical",
        ("2 of 61 checkpoints", "steps 20, 50", "belong at step 20"),
    ),
    "a neighbour's file across a long gap": (
        lambda seed: every_tenth(seed) | {300: every_tenth(seed)[280]},
        "identical",
        ("steps 280 to 300 hold the same weights, while", "both are copies of one checkpoint"),
    ),
    "ten neighbours' names for one file": (
        lambda seed: ordinary(seed) | dict.fromkeys(range(20, 40), ordinary(seed)[40]),
        "identical",
        ("steps 20 to 40 hold the same weights", "all 21 are copies of one checkpoint"),
    ),
    "nothing moves": (
        lambda seed: dict.fromkeys(range(9), ordinary(seed)[3]),
        "identical",
        ("all 9 checkpoints hold the same weights",),
    ),
    "another seed's first checkpoint": (
        lambda seed: with_others(ordinary(seed), of_another_seed(seed), [0]),
        "descent",
        ("checkpoints from step 1 on do not descend from step 0",),
    ),
    "a checkpoint of another seed": (
        lambda seed: with_others(ordinary(seed), of_another_seed(seed), [31]),
        "descent",
        ("step 31 does not descend from step 0",),
    ),
    "the last two of another seed": (
        lambda seed: with_others(ordinary(seed), of_another_seed(seed), [59, 60]),
        "descent",
        ("steps 59 to 60 do not descend from step 0",),
    ),
    "two seeds, one after the other": (
        lambda seed: with_others(ordinary(seed), of_another_seed(seed), range(30, 61)),
        "two series",
        ("30 checkpoints of steps 0 to 29; 31 checkpoints of steps 30 to 60",),
    ),
    "two seeds in turn": (
        lambda seed: with_others(ordinary(seed), of_another_seed(seed), range(1, 61, 2)),
        "two series",
        ("31 checkpoints of steps 0, 2, 4", "30 checkpoints of steps 1, 3, 5"),
    ),
    "two trainings of one start in turn": (
        lambda seed: with_others(tuned(seed, 7), tuned(seed, 8), range(1, 61, 2)),
        "two series",
        ("two series with one start",),
    ),
    "a checkpoint of another training of the same start": (
        lambda seed: with_others(tuned(seed, 7), tuned(seed, 8), [31]),
        "elsewhere",
        ("step 31 does not lie between the checkpoints before and after it",),
    ),
    "neighbours exchanged": (
        lambda seed: exchanged(ordinary(seed), 20, 21),
        "order",
        ("steps 20 and 21 are exchanged",),
    ),
    "distant checkpoints exchanged": (
        lambda seed: exchanged(ordinary(seed), 12, 45),
        "order",
        ("steps 12 and 45 are exchanged",),
    ),
    "exchanged in a log-spaced series": (
        lambda seed: exchanged(series(replace(DENSE, seed=seed, steps=700), LOG_SPACED), 32, 256),
        "order",
        ("steps 32 and 256 are exchanged",),
    ),
    "bfloat16": (
        lambda seed: in_type(ordinary(seed), Tensor.bfloat16),
        "half precision",
        ("6 of 6 tensors of weights are stored in half precision", "% of the weights keep their"),
    ),
    "float16 widened again": (
        lambda seed: in_type(ordinary(seed), lambda tensor: tensor.half().float()),
        "half precision",
        ("the float32 weights were converted from F16",),
    ),
    "NaN": (
        lambda seed: ordinary(seed) | {31: spoilt(ordinary(seed)[31], float("nan"))},
        "not finite",
        ("step 31 holds NaN or Inf: 2 in '2.weight'. Segments",),
    ),
    "Inf from a step on": (
        lambda seed: {
            step: spoilt(state, float("inf")) if step >= 55 else state
            for step, state in ordinary(seed).items()
        },
        "not finite",
        ("step 55 holds NaN or Inf: 2 in '2.weight', and likewise up to step 60",),
    ),
    "missing steps": (
        lambda seed: {
            step: state for step, state in ordinary(seed).items() if step not in (10, 30, 31, 32)
        },
        "missing",
        ("4 checkpoints of an otherwise regular series are missing: steps 10, 30 to 32",),
    ),
    "steps left out and renumbered": (
        lambda seed: dict(
            enumerate(
                series(
                    replace(DENSE, seed=seed, steps=200), [*range(20), *range(150, 180)]
                ).values()
            )
        ),
        "jump",
        ("from step 19 to 20 the weights jump",),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", DEFECTS)
def test_a_defect_is_named_and_nothing_else(tmp_path: Path, case: str, seed: int) -> None:
    make, kind, words = DEFECTS[case]
    (seen,) = seen_in(tmp_path, make(seed))
    assert seen.kind == kind
    says(seen.text, *words)


def test_several_defects_are_told_apart(tmp_path: Path) -> None:
    whole = ordinary(0)
    broken = exchanged(whole, 20, 21) | {
        0: of_another_seed(0)[0],
        40: spoilt(whole[40], float("nan")),
        50: whole[10],
    }
    seen = seen_in(tmp_path, {step: state for step, state in broken.items() if step != 30})
    assert sorted(some.kind for some in seen) == [
        "descent",
        "identical",
        "missing",
        "not finite",
        "order",
    ]
    assert [some.grade for some in seen] == ["defect"] * 4 + ["doubt"]


# --- still steps ----------------------------------------------------------------------------------

STILL: dict[str, tuple[Callable[[], Series], str]] = {
    "warm-up": (
        lambda: series(Training(shape="warm-up")),
        "steps 0 to 1: a learning rate of 0, as at the start of a warm-up",
    ),
    "cosine to 0": (
        lambda: series(Training(shape="cosine")),
        "steps 59 to 60: a learning rate of 0, skipped steps, or one state saved again",
    ),
    "skipped": (
        lambda: ordinary(0) | {31: ordinary(0)[30], 41: ordinary(0)[40]},
        "steps 30 to 31, 40 to 41: a learning rate of 0, skipped steps",
    ),
    "statistics move": (
        lambda: series(Training(shape="warm-up", normalised=True)),
        "steps 0 to 1: other tensors move, so training went on",
    ),
    "at rest before the end": (
        lambda: {
            2 * step: state for step, state in series(Training(shape="cosine")).items() if step
        },
        "steps 118 to 120: the checkpoints next to them hardly move either",
    ),
}


@pytest.mark.parametrize("case", STILL)
def test_training_that_stands_still_is_a_note_and_no_defect(tmp_path: Path, case: str) -> None:
    make, words = STILL[case]
    (seen,) = seen_in(tmp_path, make(), notes=True)
    assert (seen.kind, seen.grade) == ("still", "note")
    says(seen.text, words)


# --- what it is told from -------------------------------------------------------------------------


def test_distances_norms_and_bits_are_those_of_the_weights(tmp_path: Path) -> None:
    checkpoints = series(Training(normalised=True, steps=6))
    inspection = inspect(save(tmp_path / "s", checkpoints), say=lambda note: None)
    names = [
        name
        for name, tensor in checkpoints[0].items()
        if tensor.is_floating_point() and "running" not in name
    ]
    flat = [
        torch.cat([state[name].double().flatten() for name in names]).numpy()
        for state in checkpoints.values()
    ]
    assert inspection.steps == tuple(checkpoints)
    assert inspection.weights == flat[0].size
    np.testing.assert_allclose(inspection.norms, [np.linalg.norm(one) for one in flat], rtol=1e-12)
    pairs = list(pairwise(flat))
    expected = [np.linalg.norm(after - before) for before, after in pairs]
    np.testing.assert_allclose(inspection.distances, expected, rtol=1e-12)
    same = [float((after == before).mean()) for before, after in pairs]
    np.testing.assert_allclose(inspection.same_bits, same, rtol=1e-12)


@pytest.mark.parametrize("shape", [(60, 50), (300, 4093), (7,), (123_457,)])
def test_a_sketch_keeps_distances_and_forgets_means(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    projection = sketch.Projection(4093)
    pair = []
    for shift in (0.0, 5.0):
        numbers = generator.standard_cauchy(shape).ravel()
        own = projection.start("w")
        for start in range(0, numbers.size, projection.piece):
            own.add(numbers[start : start + projection.piece] + shift)
        pair.append((numbers - numbers.mean(), *own.centred()))
    (one, sketched, squares), (other, other_sketched, _) = pair
    assert squares == pytest.approx(one @ one, rel=1e-9)
    true = np.linalg.norm(one - other)
    assert np.linalg.norm(sketched - other_sketched) == pytest.approx(true, rel=0.06)


def test_memory_of_sketches_is_bounded() -> None:
    for checkpoints in (2, 154, 20_000, 200_000):
        assert 8 * sketch.width_for(checkpoints) * checkpoints <= 2**29
    assert sketch.width_for(10_000_000) == 251


GRIDS: dict[str, tuple[Sequence[int], list[tuple[int, int, int]]]] = {
    "whole": (range(20), []),
    "one missing": ([*range(9), *range(10, 20)], [(8, 10, 1)]),
    "every tenth": ([0, 10, 20, 40, 50, 60], [(20, 40, 10)]),
    "at its ends": ([0, 2, 3, 4, 6], []),
    "log-spaced": (LOG_SPACED, []),
    "bursts": (BURSTS, []),
    "two bursts": ([*range(10), *range(100, 110)], []),
    "bursts, the last of them one checkpoint": ([*range(6), *range(40, 46), 80], []),
    "a burst with a hole": ([*range(10), *range(100, 105), *range(106, 110)], [(104, 106, 1)]),
    "dense, then sparse": ([*range(10), *range(20, 100, 10)], []),
    "no multiple": ([0, 10, 20, 35, 45, 55], []),
}


@pytest.mark.parametrize("case", GRIDS)
def test_missing_is_what_a_regular_series_lacks(case: str) -> None:
    steps, gaps = GRIDS[case]
    assert [gap for gap in gaps_in_a_grid(steps) if gap in gaps] == gaps
    assert len(gaps) == len(gaps_in_a_grid(steps)) or case == "a burst with a hole"


def test_what_lies_between_ranges_of_steps_is_not_missing(tmp_path: Path) -> None:
    place = save(tmp_path / "s", ordinary(0))
    for steps in ("0:20,26:60", "0:20,26:50,53:60"):
        inspection = inspect(place, steps=steps, say=lambda note: None)
        assert inspection.observations == ()
    holed = save(tmp_path / "h", {step: some for step, some in ordinary(0).items() if step != 42})
    (seen,) = inspect(holed, steps="0:20,26:60", say=lambda note: None).observations
    says(seen.text, "missing: step 42")


def test_a_long_gap_may_forget_the_start() -> None:
    assert geometry.across_a_long_gap([0, 1000, 1010, 1020], [[0], [1, 2, 3]])
    assert not geometry.across_a_long_gap([0, 10, 20, 30], [[0], [1, 2, 3]])
    assert not geometry.across_a_long_gap([0, 1000, 1010, 1020], [[0, 2], [1, 3]])


def test_stretches_join_what_follows() -> None:
    assert stretches([]) == []
    assert stretches([4, 5, 9]) == [(4, 5), (9, 9)]


def test_checkpoints_of_other_shapes_are_refused(tmp_path: Path) -> None:
    checkpoints = ordinary(0) | {30: series(replace(DENSE, width=48))[30]}
    with pytest.raises(InputError, match=r"step 30.*must come from one model"):
        seen_in(tmp_path, checkpoints)


def test_models_too_small_to_tell_are_not_judged_by_distances(tmp_path: Path) -> None:
    states = {step: {"w": torch.randn(9, 9)} for step in range(20)}
    (seen,) = seen_in(tmp_path, states, notes=True)
    says(seen.text, "only 81 weights move, too few")
