"""Laws of random parts of the segments: how they are drawn, and what their standard errors are."""

from __future__ import annotations

import numpy as np
import pytest

from lca_posthoc.errors import InputError
from lca_posthoc.numerics.sampling import SegmentSample, drawing_order, scale, standard_error

SEEDS = range(40)


@pytest.mark.parametrize("segments", [2, 3, 7, 64, 100, 513])
def test_every_segment_is_drawn_once_and_the_same_seed_draws_the_same(segments: int) -> None:
    order = drawing_order(segments, 7)
    assert sorted(order) == list(range(segments))
    assert (order == drawing_order(segments, 7)).all()
    assert segments < 7 or (order != drawing_order(segments, 8)).any()


@pytest.mark.parametrize("segments", [64, 100, 513])
def test_every_beginning_is_stratified_over_training(segments: int) -> None:
    """Each part of training has its share of the first n, rounded at each halving."""
    order = drawing_order(segments, 3)
    for first in range(1, segments + 1):
        chosen = np.sort(order[:first])
        for parts in (2, 4, 8):
            borders = np.cumsum(_sizes(segments, parts))
            counts = np.diff(np.searchsorted(chosen, [0, *borders]))
            shares = first * np.array(_sizes(segments, parts)) / segments
            assert (abs(counts - shares) < 2).all(), (first, parts)


def test_of_as_many_parts_as_segments_drawn_each_has_one() -> None:
    for seed in SEEDS:
        for drawn in (2, 4, 8, 16, 32):
            assert sorted(drawing_order(64, seed)[:drawn] // (64 // drawn)) == list(range(drawn))


def test_every_segment_is_as_likely_as_every_other_for_every_number_drawn() -> None:
    seeds, segments = 4000, 11
    orders = np.stack([drawing_order(segments, seed) for seed in range(seeds)])
    ranks = np.argsort(orders, axis=1)
    for drawn in range(1, segments):
        share = drawn / segments
        error = np.sqrt(share * (1 - share) / seeds)
        assert (abs((ranks < drawn).mean(axis=0) - share) < 5 * error).all()


def _sizes(segments: int, parts: int) -> list[int]:
    """The lengths of the parts into which positions are halved again and again."""
    if parts == 1:
        return [segments]
    left = segments // 2
    return [*_sizes(left, parts // 2), *_sizes(segments - left, parts // 2)]


def _series(kind: str, segments: int) -> np.ndarray:
    """What a layer was allocated on each segment, as trainings have it."""
    time, noise = np.arange(segments), np.random.default_rng(5).normal(size=segments)
    return {
        "noise": noise - 0.02,
        "a steep start": -1 / (time + 3) + 0.01 * noise * (1 + 10 / (1 + time / 20)),
        "a decay alone": -np.exp(-time / (segments / 20)),
        "heavy tails": noise**3 / (1 + time / 50),
    }[kind]


@pytest.mark.parametrize("segments", [200, 1000])
@pytest.mark.parametrize("kind", ["noise", "a steep start", "a decay alone", "heavy tails"])
def test_estimates_are_unbiased_and_spread_as_their_standard_errors_say(
    kind: str, segments: int
) -> None:
    values, estimates, errors = _series(kind, segments), [], []
    for seed in SEEDS:
        chosen = np.sort(SegmentSample.parse(f"0.1@{seed}").drawn(segments))
        estimates.append(scale(segments, len(chosen)) * values[chosen].sum())
        errors.append(standard_error(values[chosen], segments))
    spread = np.std(estimates, ddof=1)
    assert 1 / 1.5 < np.sqrt(np.mean(np.square(errors))) / spread < 1.5
    assert abs(np.mean(estimates) - values.sum()) < 3 * spread / np.sqrt(len(SEEDS))


def test_the_error_of_all_segments_is_zero_and_that_of_columns_is_each_ones_own() -> None:
    values = np.random.default_rng(0).normal(size=(12, 2, 3))
    assert (standard_error(values, 12) == 0).all()
    both = standard_error(values, 40)
    assert both.shape == (2, 3)
    assert both[1, 2] == standard_error(values[:, 1, 2], 40)


def test_a_larger_fraction_begins_with_a_smaller_one() -> None:
    smaller = SegmentSample.parse("0.1@5").drawn(90)
    assert SegmentSample.parse("0.35@5").drawn(90)[: len(smaller)] == smaller
    assert len(SegmentSample.parse("0.29@0").drawn(100)) == 29  # exact, not 0.29 · 100 in float64


@pytest.mark.parametrize("text", ["0.1", "0@1", "1.5@1", "-0.1@1", "0.1@", "@3", "0.1@-3", "a@b"])
def test_what_is_no_fraction_and_seed_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"FRACTION@SEED.* 0\.1@7"):
        SegmentSample.parse(text)


def test_too_few_segments_for_a_standard_error_are_refused() -> None:
    with pytest.raises(InputError, match="selects 1 of 19 segments"):
        SegmentSample.parse("0.1@7").drawn(19)
