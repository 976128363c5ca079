"""Peak moments and the nulls of their alignment, against loops, full enumerations and planted
truths.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lca_posthoc import Loss, Recorder, Run, Task, open_run, run
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.findings import peaks
from lca_posthoc.findings.peaks import (
    Alignment,
    align,
    intersection,
    minima,
    moments,
    possible,
    rotated,
)

from ..helpers.cli import marker, says

Array = np.ndarray[Any, Any]

# --- moments --------------------------------------------------------------------------------------


def slow_possible(rows: list[Any], joined: list[bool]) -> list[bool]:
    """Both neighbours follow directly, and all three segments are finite."""
    fine = [bool(np.isfinite(row).all()) for row in rows]
    return [
        0 < at < len(rows) - 1
        and joined[at - 1]
        and joined[at]
        and fine[at - 1]
        and fine[at]
        and fine[at + 1]
        for at in range(len(rows))
    ]


def slow_peaks(series: list[float], can: list[bool], top: int) -> set[int]:
    """Walk down into every run of equal numbers; a peak if the walk goes up behind it and never
    leaves what can be a peak.
    """
    found = []
    for at in range(1, len(series) - 1):
        end = at
        while can[end] and series[end + 1] == series[at]:
            end += 1
        if (
            all(can[at : end + 1])
            and series[at - 1] > series[at] < series[end + 1]
            and series[at] < 0
        ):
            found.append((series[at], at))
    return {at for _, at in sorted(found)[:top]}


@st.composite
def recorded(draw: st.DrawFn) -> tuple[Array, Array]:
    """Few different numbers, so that there are plateaus and ties; holes; numbers that are none."""
    steps = draw(st.integers(1, 14))
    number = st.sampled_from([-3.0, -2.0, -1.0, 0.0, 1.0] * 3 + [np.nan, -np.inf, np.inf])
    values = draw(
        st.lists(st.lists(number, min_size=4, max_size=4), min_size=steps, max_size=steps)
    )
    joined = draw(
        st.lists(st.sampled_from([True] * 5 + [False]), min_size=steps - 1, max_size=steps - 1)
    )
    return np.array(values).reshape(steps, 2, 2), np.array(joined, dtype=bool)


@settings(max_examples=400, deadline=None)
@given(recorded(), st.integers(1, 4))
def test_peaks_are_those_of_a_walk_along_the_series(made: tuple[Array, Array], top: int) -> None:
    values, joined = made
    can = possible(values, joined)
    assert can.tolist() == slow_possible(list(values), joined.tolist())
    with np.errstate(all="raise"):
        found = moments(values, can, top)
    for group, layer in itertools.product(range(2), range(2)):
        wanted = slow_peaks(values[:, group, layer].tolist(), can.tolist(), top)
        assert set(found[:, group, layer].nonzero()[0].tolist()) == wanted


PLATEAUS = {
    "once, at the first": ([0, -2, -2, -2, 0], [1]),
    "a shelf on the way down is none": ([0, -1, -1, -2, 0], [3]),
    "a shelf on the way up is none": ([0, -2, -1, -1, 0], [1]),
    "to the end": ([0, -1, 0, -2, -2], [1]),
    "from the start": ([-2, -2, 0, -1, 0], [3]),
    "constant": ([-1, -1, -1, -1], []),
    "above zero": ([3, 1, 2, 0, 2], []),
    "too short": ([0, -1], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("case", PLATEAUS)
def test_a_plateau_is_one_peak(case: str) -> None:
    series, wanted = PLATEAUS[case]
    values = np.array(series, dtype=float).reshape(-1, 1, 1)
    found = moments(values, possible(values, np.ones(max(0, len(series) - 1), dtype=bool)), 20)
    assert found.ravel().nonzero()[0].tolist() == wanted


def test_a_plateau_across_a_gap_is_none() -> None:
    """Whether it is the bottom is not known."""
    values = np.array([0.0, -1, -1, -1, -1, 0, -1, 0]).reshape(-1, 1, 1)
    can = possible(values, np.array([True, True, False, True, True, True, True]))
    assert can.tolist() == [False, True, False, False, True, True, True, False]
    assert minima(values, can).ravel().nonzero()[0].tolist() == [6]


# --- nulls ----------------------------------------------------------------------------------------


def every_rotation(peak: Array, borders: list[int]) -> dict[tuple[int, ...], float]:
    """The exact distribution of the counts per group: all offsets of all layers in all
    stretches.
    """
    segments, groups, layers = peak.shape
    lengths = [b - a for a, b in itertools.pairwise(borders)]
    seen: Counter[tuple[int, ...]] = Counter()
    for offsets in itertools.product(*(range(length) for _ in range(layers) for length in lengths)):
        moved = np.zeros_like(peak)
        for layer in range(layers):
            for at, (start, length) in enumerate(zip(borders, lengths, strict=False)):
                offset = offsets[layer * len(lengths) + at]
                for place in range(length):
                    moved[start + (place + offset) % length, :, layer] = peak[
                        start + place, :, layer
                    ]
        seen[
            tuple(
                sum(all(moved[step, group]) for step in range(segments)) for group in range(groups)
            )
        ] += 1
    return {counts: number / seen.total() for counts, number in seen.items()}


@pytest.mark.parametrize(
    ("shape", "borders"),
    [
        ((5, 2, 3), [0, 5]),
        ((6, 1, 2), [0, 6]),
        ((7, 3, 2), [0, 3, 7]),
        ((6, 2, 2), [0, 2, 4, 6]),
        ((4, 2, 2), [0, 1, 4]),
    ],
)
def test_rotations_have_the_distribution_of_all_rotations(
    shape: tuple[int, ...], borders: list[int]
) -> None:
    draws = 20_000
    peak = np.random.default_rng(3).random(shape) < 0.5
    wanted = every_rotation(peak, borders)
    assert len(wanted) > 1
    drawn = Counter(
        map(tuple, rotated(peak, np.array(borders), draws, np.random.default_rng(0)).tolist())
    )
    assert set(drawn) <= set(wanted)
    for counts, chance in wanted.items():
        assert abs(drawn[counts] / draws - chance) <= 5 * np.sqrt(chance * (1 - chance) / draws), (
            counts
        )


def test_rotations_are_the_same_in_any_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = np.random.default_rng(1).random((40, 3, 4)) < 0.6
    whole = rotated(peak, np.array([0, 20, 40]), 500, np.random.default_rng(7))
    for most in (1, 77, 1000):
        monkeypatch.setitem(rotated.__globals__, "_AT_ONCE", most)
        assert np.array_equal(
            rotated(peak, np.array([0, 20, 40]), 500, np.random.default_rng(7)), whole
        )


def test_a_layer_without_peaks_is_never_aligned() -> None:
    peak = np.ones((9, 2, 3), dtype=bool)
    peak[:, 1, 2] = False
    found = align(peak, draws=50, seed=0, stretch=3)
    assert (found.observed.tolist(), found.expected.tolist()) == ([9, 0], [9.0, 0.0])
    assert set(found.shift) == set(found.local) == {9}
    assert (found.p_shift, found.p_local, found.p_independent, found.p_shift_group.tolist()) == (
        1,
        1,
        1,
        [1, 1],
    )
    peak[:] = False
    assert align(peak, draws=50, seed=0, stretch=3).p_shift == 1


def every_subset(segments: int, sizes: tuple[int, ...]) -> list[Fraction]:
    """The exact distribution of the size of the intersection, by writing out all the subsets."""
    subsets = [
        [set(each) for each in itertools.combinations(range(segments), size)] for size in sizes
    ]
    seen = Counter(len(set.intersection(*chosen)) for chosen in itertools.product(*subsets))
    return [Fraction(seen[count], seen.total()) for count in range(min(sizes) + 1)]


@pytest.mark.parametrize(
    ("segments", "sizes"),
    [
        (5, (2, 3)),
        (5, (3, 2, 3)),
        (4, (4, 2, 4)),
        (6, (2, 2)),
        (4, (0, 3)),
        (3, (3, 3)),
        (4, (2, 2, 2, 3)),
        (1, (1, 1)),
        (5, (4,)),
    ],
)
def test_independent_subsets_are_counted_exactly(segments: int, sizes: tuple[int, ...]) -> None:
    found = intersection(segments, np.array(sizes))
    assert found.tolist() == pytest.approx(
        [float(each) for each in every_subset(segments, sizes)], abs=1e-12
    )


def test_groups_are_independent_in_the_independent_null() -> None:
    peak = np.zeros((5, 2, 2), dtype=bool)
    peak[[0, 1], 0, 0] = peak[[0, 1, 3], 0, 1] = peak[[0, 2], 1, 0] = peak[[2, 4], 1, 1] = True
    first, second = every_subset(5, (2, 3)), every_subset(5, (2, 2))
    found = align(peak, draws=10, seed=0, stretch=5)
    assert found.observed.tolist() == [2, 1]
    wanted = sum(
        a * b
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
        if i + j >= 3
    )
    assert found.p_independent == pytest.approx(float(wanted), abs=1e-12)
    assert found.expected == pytest.approx(
        [float(sum(i * a for i, a in enumerate(each))) for each in (first, second)]
    )


def test_what_is_expected_is_the_mean_of_all_rotations() -> None:
    peak = np.random.default_rng(3).random((5, 2, 3)) < 0.6
    exact = every_rotation(peak, [0, 5])
    mean = [sum(counts[group] * chance for counts, chance in exact.items()) for group in range(2)]
    assert align(peak, draws=1, seed=0, stretch=5).expected == pytest.approx(mean)


def test_the_p_values_are_counts_of_draws() -> None:
    peak = np.random.default_rng(5).random((30, 2, 2)) < 0.5
    found = align(peak, draws=400, seed=1, stretch=10)
    total = int(found.observed.sum())
    assert found.p_shift == (1 + sum(each >= total for each in found.shift.tolist())) / 401
    assert found.p_local == (1 + sum(each >= total for each in found.local.tolist())) / 401
    assert found.stretches == 3
    again, other = (align(peak, draws=400, seed=seed, stretch=10) for seed in (1, 2))
    assert np.array_equal(again.shift, found.shift)
    assert np.array_equal(again.local, found.local)
    assert not np.array_equal(other.shift, found.shift)


# --- calibration and power ------------------------------------------------------------------------

SEEDS, LEVELS = 200, (0.01, 0.05, 0.1)
EARLY = 1 + 20 * np.exp(-np.arange(1100) / 100)  # all layers learn most early on, as they do


def simulated(
    seed: int,
    shape: tuple[int, int, int],
    top: int,
    *,
    shared: float = 0.7,
    trend: Array | None = None,
    planted: int = 0,
) -> Alignment:
    """Autoregressive noise, independent between layers and correlated between groups; `planted`
    common dips three deviations deep.
    """
    steps, _, layers = shape
    generator = np.random.default_rng(seed)
    values = shared * generator.standard_normal((steps, 1, layers)) - 1.0
    values = values + np.sqrt(1 - shared**2) * generator.standard_normal(shape)
    values[1:] += 0.5 * values[:-1]
    if trend is not None:
        values *= trend[:, None, None]
    if planted:
        values[generator.choice(np.arange(2, steps - 2, 4), planted, replace=False)] -= 3.0
    can = possible(values, np.ones(steps - 1, dtype=bool))
    return align(moments(values, can, top)[can], draws=499, seed=seed, stretch=50)


def most(level: float) -> int:
    """False alarms that a valid test exceeds once in a thousand times."""
    return int(stats.binom.ppf(0.999, SEEDS, level))


@pytest.mark.parametrize(
    ("shape", "top"), [((200, 4, 2), 40), ((200, 1, 2), 40), ((200, 3, 3), 50), ((1100, 10, 3), 20)]
)
def test_layers_that_have_nothing_to_do_with_each_other_are_rarely_found_aligned(
    shape: tuple[int, int, int], top: int
) -> None:
    found = [simulated(seed, shape, top) for seed in range(SEEDS)]
    for name in ("p_shift", "p_local"):
        p = np.array([getattr(each, name) for each in found])
        alarms = {level: int((p <= level).sum()) for level in LEVELS}
        assert all(alarms[level] <= most(level) for level in LEVELS), (name, alarms)
        # the bound can fail: chance alignments are common
        assert shape[0] == 1100 or (p <= 0.5).mean() > 0.3


def test_planted_alignments_are_found() -> None:
    found = [simulated(seed, (1100, 10, 3), 20, planted=6) for seed in range(SEEDS)]
    for name in ("p_shift", "p_local"):
        assert np.mean([getattr(each, name) < 0.01 for each in found]) >= 0.95, name


def test_a_common_trend_alone_fools_every_null_but_the_local_one() -> None:
    found = [simulated(seed, (1100, 10, 3), 20, trend=EARLY) for seed in range(SEEDS)]
    alarms = {
        name: sum(getattr(each, name) <= 0.05 for each in found)
        for name in ("p_shift", "p_independent", "p_local")
    }
    assert alarms["p_local"] <= most(0.05)
    assert min(alarms["p_shift"], alarms["p_independent"]) > SEEDS / 2


def test_groups_that_are_alike_fool_the_independent_null_and_not_the_rotations() -> None:
    found = [simulated(seed, (100, 10, 2), 20, shared=0.99) for seed in range(SEEDS)]
    alarms = {
        name: sum(getattr(each, name) <= 0.05 for each in found)
        for name in ("p_shift", "p_independent", "p_local")
    }
    assert max(alarms["p_shift"], alarms["p_local"]) <= most(0.05) < alarms["p_independent"]


# --- a run ----------------------------------------------------------------------------------------

SEGMENTS, SPAN = 30, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 3)
        self.still = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.still(self.out(torch.tanh(self.norm(self.hidden(inputs)))))


def replay(root: Path, segments: int = SEGMENTS, build: Callable[[], nn.Module] = Net) -> Run:
    """A random walk of all tensors but those of `still`."""
    torch.manual_seed(0)
    model = build()
    with Recorder(root / "ck", model) as recorder:
        for step in range(segments + 1):
            recorder.save(step)
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and "still" not in name:
                    tensor += (
                        0.05 * torch.randn_like(tensor) * (tensor.abs() if "var" in name else 1.0)
                    )
    inputs, targets = torch.randn(24, 6), torch.arange(24) % 3
    losses = {
        "train": Loss(F.cross_entropy, on="train"),
        "per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets),
    }
    task = Task(build, {"train": (inputs, targets)}, losses)
    return run(
        root / "ck",
        task,
        losses=["all"],
        out=root / "run",
        cluster="inline",
        span=SPAN,
        keep="statistics",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return replay(tmp_path_factory.mktemp("peaks"))


FIELD = {"allocation": "allocated", "motion": "motion", "gradient": "gradient"}


def series(results: Any, signal: str, layer: str) -> Iterator[tuple[Any, list[float]]]:
    """Per group, sums over the layer's parameters one by one; dips, whatever the signal."""
    table = results.tensors
    column, sign = table[FIELD[signal]], 1 if signal == "allocation" else -1
    mine = [
        at
        for at, (name, kind) in enumerate(
            zip(table["tensor"].values, table["kind"].values, strict=True)
        )
        if name.split(".")[0] == layer and kind == "parameter"
    ]
    for group in column["group"].values if "group" in column.dims else ["all"]:
        chosen = column.sel(group=group) if "group" in column.dims else column
        yield (
            group,
            [
                sign * sum(chosen.values[step, at] for at in mine)
                for step in range(table.sizes["step"])
            ],
        )


@pytest.mark.parametrize("signal", FIELD)
@pytest.mark.parametrize("loss", ["train", "per_class"])
def test_the_peaks_of_a_run_are_those_of_its_tensors(made: Run, loss: str, signal: str) -> None:
    found = peaks(made[loss], signal=signal, top=6, draws=200, stretch=10)
    grouped = loss == "per_class" and signal != "motion"
    assert found["group"].values.tolist() == ([0, 1, 2] if grouped else ["all"])
    assert found["layer"].values.tolist() == ["hidden", "norm", "out", "still"]
    can = [0 < at < SEGMENTS - 1 for at in range(SEGMENTS)]
    wanted: dict[Any, list[set[int]]] = {}
    for layer in found["layer"].values:
        for group, values in series(made[loss], signal, layer):
            mine = slow_peaks(values, can, 6)
            assert (
                set(found["peak"].sel(layer=layer, group=group).values.nonzero()[0].tolist())
                == mine
            )
            wanted.setdefault(group, []).append(mine)
    counted = [each for each in found["layer"].values if found["counted"].sel(layer=each)]
    assert ("still" in counted) == (signal == "gradient")  # it has gradients and does not move
    for group, sets in wanted.items():
        together = set.intersection(*(each for each in sets if each))
        assert set(found["aligned"].sel(group=group).values.nonzero()[0].tolist()) == together
        assert found["observed"].sel(group=group) == len(together)
        chances = [len(each) / sum(can) for each in sets if each]
        assert found["expected"].sel(group=group) == pytest.approx(sum(can) * math.prod(chances))
    assert found["observed_total"] == sum(found["observed"].values)
    assert ("Without a peak: still." in found.attrs["left_out"]) == (signal != "gradient")
    assert {name: found.attrs[name] for name in ("finding", "loss", "split", "signal")} == {
        "finding": "peaks",
        "loss": loss,
        "split": "train",
        "signal": signal,
    }
    assert found["step"].values.tolist() == list(range(SEGMENTS))
    assert found["step_end"].values.tolist() == list(range(1, SEGMENTS + 1))
    assert dict(found.sizes) == {
        "step": SEGMENTS,
        "group": 3 if grouped else 1,
        "layer": 4,
        "draw": 200,
    }
    assert all({"units", "long_name"} <= set(found[name].attrs) for name in found)


def test_the_segments_beside_a_gap_are_no_peaks(made: Run, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made.path, tmp_path / "run"))
    marker(place, "per_class", 2).unlink()
    results = open_run(place)["per_class"]
    found = peaks(results, top=50, draws=10)
    left = [step for step in range(SEGMENTS) if not 8 <= step < 12]
    assert found["step"].values.tolist() == left
    ends = {0, 7, 12, SEGMENTS - 1}
    for layer in ("hidden", "norm", "out"):
        for group, values in series(made["per_class"], "allocation", layer):
            wanted = slow_peaks(
                values, [step in left and step not in ends for step in range(SEGMENTS)], 50
            )
            peak = found["peak"].sel(layer=layer, group=group)
            assert set(found["step"].values[peak.values].tolist()) == wanted
    says(found.attrs["left_out"], "of 30 segments", "lca run")


def test_fewer_than_two_layers_with_peaks_are_never_aligned(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(OrderedDict(still=nn.Linear(6, 3), moving=nn.Linear(3, 3)))

    found = peaks(replay(tmp_path, 12, build)["train"], draws=20)
    assert (
        int(found["observed_total"]),
        float(found["p_shift"]),
        float(found["p_independent"]),
    ) == (0, 1.0, 1.0)
    says(found.attrs["left_out"], "Without a peak: still.", "Fewer than two layers have peaks")


ASKED_WRONGLY: dict[str, tuple[dict[str, Any], str]] = {
    "a signal that is none": (
        {"signal": "weight"},
        "signal is one of allocation, motion, gradient, got 'weight'",
    ),
    "no peaks": ({"top": 0}, "top is a whole number of at least 1, got 0"),
    "no draws": ({"draws": 0}, "draws is a whole number of at least 1, got 0"),
    "half a draw": ({"draws": 0.5}, "draws is a whole number of at least 1, got 0.5"),
    "no stretch": ({"stretch": 0}, "stretch is a whole number of at least 1, got 0"),
    "one layer": (
        {"by": 0},
        "compares layers, but by=0 makes 1 of the parameters of 'train'; by=\"tensor\"",
    ),
    "layers by what": ({"by": "colour"}, "'colour'"),
}


@pytest.mark.parametrize("case", ASKED_WRONGLY)
def test_what_cannot_be_asked_is_refused(made: Run, case: str) -> None:
    given, words = ASKED_WRONGLY[case]
    with pytest.raises(InputError) as caught:
        peaks(made["train"], **given)
    says(str(caught.value), *words.split("; "))


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_peak_needs_a_segment_on_either_side(tmp_path: Path, segments: int) -> None:
    results = replay(tmp_path, segments)["train"]
    if segments == 3:
        assert peaks(results, draws=10)["peak"].values[[0, 2]].sum() == 0
        return
    with pytest.raises(LCAError) as caught:
        peaks(results)
    says(str(caught.value), f"{segments} finished segment", "nothing can be a peak")


def test_the_seed_decides(made: Run) -> None:
    first, again, other = (
        peaks(made["per_class"], top=10, draws=300, seed=seed) for seed in (1, 1, 2)
    )
    assert first.identical(again)
    assert not np.array_equal(first["shift"], other["shift"])
    assert np.array_equal(first["peak"], other["peak"])
