"""Totals over time are whole numbers: the same however segments are cut, never too large in silence,
and no larger on disk than they need be.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lca_posthoc
from lca_posthoc import Loss, Task
from lca_posthoc.checkpoints.trajectory import TensorSpec
from lca_posthoc.errors import LCAError, SpanError
from lca_posthoc.numerics.objective import Row
from lca_posthoc.numerics.schema import (
    BYTES_OF_TOTALS,
    TOTAL_FIELDS,
    Totals,
    join,
    join_all,
    types_of_totals,
    unit_of_totals,
)
from lca_posthoc.numerics.segment_allocation import Scratch
from lca_posthoc.numerics.statistics import _Running
from lca_posthoc.replay import prepare
from lca_posthoc.replay.prepare import choose_window
from lca_posthoc.results import Damage, RunWriter, StoredTensor, required_bytes
from lca_posthoc.results.commits import Commits
from lca_posthoc.results.partials import bytes_of_partial, read_partial, write_partial
from tests.helpers.cli import write_step
from tests.helpers.replayed_cases import slow_totals
from tests.replay.test_covered_steps import Place, damage_of, place, whole
from tests.replay.test_replay import arrays, identical

__all__ = ["place", "whole"]  # fixtures

SPEC = TensorSpec("w", "parameter", (3, 2), unit_axis=0)


def series(segments: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Motions and gradients of all signs, often none, of sizes far apart."""
    generator = np.random.default_rng(segments)
    signs = generator.integers(-1, 2, (2, segments, *SPEC.shape))
    sizes = 10.0 ** generator.integers(-8, 1, signs.shape)
    motion, gradient = signs * sizes
    return motion * scale, gradient


def totals_of(motion: np.ndarray, gradient: np.ndarray, unit: float) -> Totals:
    device = torch.device("cpu")
    row = Row({SPEC.name: torch.Size(SPEC.shape)}, device)
    running = _Running(row, len(motion), device, unit, Scratch(device))
    for moved, slope in zip(motion, gradient, strict=True):
        moved, slope = torch.tensor(moved).reshape(-1), torch.tensor(slope).reshape(-1)
        for part in (slice(0, 2), slice(2, 6)):
            exact = moved[part] * slope[part]
            running.add(part, moved[part], slope[part], exact, exact.float())
    return running.arrays()[SPEC.name]


# --- whole numbers --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 140), st.lists(st.integers(1, 139), max_size=5), st.data())
def test_totals_do_not_depend_on_cuts_nor_on_the_order_of_joining(
    segments: int, cuts: list[int], data: st.DataObject
) -> None:
    motion, gradient = series(segments, 1.0)
    unit = unit_of_totals([2.5])
    borders = sorted({0, segments, *(cut for cut in cuts if cut < segments)})
    stretches = [
        totals_of(motion[begin:end], gradient[begin:end], unit)
        for begin, end in itertools.pairwise(borders)
    ]
    whole = totals_of(motion, gradient, unit)
    while len(stretches) > 1:
        at = data.draw(st.integers(0, len(stretches) - 2))
        stretches[at : at + 2] = [join(*stretches[at : at + 2])]
    assert all(np.array_equal(stretches[0][name], whole[name]) for name in whole)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_totals_are_exact_sums_of_what_is_rounded_to_half_a_unit(scale: float) -> None:
    motion, gradient = series(40, scale)
    unit = unit_of_totals([scale])
    assert math.frexp(unit)[0] == 0.5
    assert unit <= 2.0**-51 * scale
    exact = motion * gradient
    totals = totals_of(motion, gradient, unit)
    stored = {"weight": motion, "gradient": gradient, "allocation": exact.astype(np.float32)}
    wanted = slow_totals(stored, exact, unit)
    assert np.array_equal(totals["allocated"] * unit, wanted["allocated"])
    for name in ("weight_turns", "gradient_turns", "allocation_turns", "helping", "hurting"):
        assert np.array_equal(totals[name], wanted[name])
    summed = [math.fsum(column) for column in exact.reshape(40, -1).T]
    error = np.abs(totals["allocated"].reshape(-1) * unit - summed)
    assert error.max() <= 40 * unit / 2 + 2.0**-52 * np.abs(summed).max()


@pytest.mark.parametrize(
    ("losses", "like"),
    [
        ([math.nan, math.inf], 0.0),
        ([], 0.0),
        ([0.0, 0.0], 0.0),
        ([0.0, 1e-30], 1e-30),
        ([math.inf, -3.0], 3.0),
        ([1e30, 1.0], 1e30),
        ([1.0, 60.0], 1.0),  # an end that is not far away makes no difference
        ([1.0, 65.0], 65.0),
        ([5e-324], 5e-324),
        ([1.7e308], 1.7e308),
    ],
)
def test_every_loss_has_a_unit(losses: list[float], like: float) -> None:
    unit = unit_of_totals(losses)
    assert unit == unit_of_totals([like])
    assert 0 < unit < math.inf
    assert 2.0**63 * unit >= 2.0**11 * like


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_that_is_too_large_is_refused_and_one_just_below_is_right(sign: float) -> None:
    largest = np.full((1, *SPEC.shape), sign)
    just = totals_of(np.tile(largest, (4, 1, 1)), np.tile(abs(largest), (4, 1, 1)), 2.0**-60)
    assert (just["allocated"] == sign * 2**62).all()
    with pytest.raises(SpanError, match=r"tensor 'w': .* --steps, .* --keep units"):
        totals_of(np.tile(largest, (9, 1, 1)), np.tile(abs(largest), (9, 1, 1)), 2.0**-60)
    with pytest.raises(SpanError, match=r"--steps, .* --keep units"):
        join_all([just, just, just], [True, True])
    # what comes back does not count as too large
    there = np.concatenate([largest, -largest] * 9)
    assert not totals_of(there, np.abs(there), 2.0**-61)["allocated"].any()


def test_a_sum_that_is_too_large_is_refused_for_tensors_of_one_number_too() -> None:
    one = {name: np.zeros((), dtype) for name, dtype in types_of_totals(1).items()}
    one["allocated"] += np.int64(2**62)
    with pytest.raises(SpanError, match="exceeds what totals"):
        join(one, one)


# --- where they wait ------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [5, 200])
def test_what_waits_is_read_as_it_was_written_and_never_when_it_is_cut(
    tmp_path: Path, segments: int
) -> None:
    specs = [
        SPEC,
        TensorSpec("s", "parameter", (), unit_axis=None),
        TensorSpec("e", "buffer", (0,)),
    ]
    tensors = [StoredTensor(spec, spec.name, spec.name) for spec in specs]
    generator = np.random.default_rng(0)
    totals = [
        {
            name: generator.integers(-100, 100, spec.shape).astype(dtype)
            for name, dtype in types_of_totals(segments).items()
        }
        for spec in specs
    ]
    path = tmp_path / "partial"
    size, _ = write_partial(path, totals, segments)
    assert size == path.stat().st_size == bytes_of_partial(7, segments)
    for stored, written in zip(read_partial(path, tensors, segments), totals, strict=True):
        assert all(np.array_equal(stored[name], written[name]) for name in written)
        assert {name: str(stored[name].dtype) for name in stored} == types_of_totals(segments)
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(LCAError, match="shorter"):
        list(read_partial(path, tensors, segments))


@pytest.fixture
def extended(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run of 19 segments in one window, to which three came whose span and window wait."""
    monkeypatch.setattr(prepare, "choose_window", lambda *_: 8)
    place.grow(19)
    place.replay("train", span=4)
    place.grow(22)
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "fold", lambda *_: [])
        place.replay("train")
    return place


def begun(place: Place) -> Path:
    (path,) = place.out.glob("partial/train/begun-*")
    return path


def is_whole(place: Place) -> bool:
    once = place.root / "once.lca"
    place.replay("train", out=once, span=4)
    identical(arrays(once), arrays(place.out))
    return damage_of(place.out) == [] and not [*place.out.glob("partial/*/*")]


def test_totals_go_on_where_checkpoints_are_added(extended: Place) -> None:
    waiting = {path.name for path in extended.out.glob("partial/train/*")}
    assert waiting == {"begun-19", "000004-3-4", "000005-0-2"}
    assert [each for each in damage_of(extended.out) if isinstance(each, Damage)] == []
    RunWriter.open(extended.out).sweep()
    assert {path.name for path in extended.out.glob("partial/train/*")} == waiting
    extended.replay("train")
    assert is_whole(extended)


def test_they_go_on_after_checkpoints_came_twice(extended: Place) -> None:
    extended.grow(23)
    extended.replay("train")
    assert is_whole(extended)


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_begun_totals_that_are_damaged_are_found_and_computed_again(
    extended: Place, how: str
) -> None:
    path = begun(extended)
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    {
        "cut": lambda: path.write_bytes(data[:-1]),
        "changed": lambda: path.write_bytes(data),
        "gone": path.unlink,
    }[how]()
    listed = [each for each in damage_of(extended.out) if isinstance(each, Damage)]
    wanted = (None, 0) if how != "gone" else (4, None)
    assert wanted in {(each.span, each.window) for each in listed}
    writer = RunWriter.open(extended.out)
    if how != "gone":
        assert writer.fold_all("train") == [*range(6)]
    assert {*range(5)} <= {*writer.pending("train")}
    extended.replay("train")
    assert is_whole(extended)


def test_checkpoints_that_begun_totals_were_computed_from_are_relied_on(extended: Place) -> None:
    writer = RunWriter.open(extended.out)
    writer.commits("train").marker(4).unlink()
    assert [writer.relies_on(checkpoint) for checkpoint in (16, 18, 19)] == [True] * 3
    begun(extended).unlink()
    assert not writer.relies_on(18)


def test_a_worker_that_folds_late_writes_nothing_else(extended: Place) -> None:
    """Another one folds a window between two looks at what waits."""
    late, other = RunWriter.open(extended.out), RunWriter.open(extended.out)
    joined = late._joined

    def folded_meanwhile(window: int, waiting: list[Any]) -> Any:
        assert other.fold("train", 0) == []
        return joined(window, waiting)

    late._joined = folded_meanwhile  # type: ignore[method-assign]
    assert late.fold("train", 0) == []
    assert Commits(extended.out, late.manifest, "train").is_folded(0)
    assert is_whole(extended)


# --- space ----------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4096, 16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(inputs)


@pytest.mark.parametrize(("segments", "span"), [(4, None), (7, 2), (12, 4)])
def test_statistics_take_at_most_40_bytes_a_parameter_where_one_window_fits(
    tmp_path: Path, segments: int, span: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 4096, generator=generator)
    targets = torch.randint(0, 16, (8,), generator=generator)
    model = Wide()
    for step in range(segments + 1):
        write_step(tmp_path / "ck", step, dict(model.state_dict()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    task = Task(Wide, {"train": (inputs, targets)}, {"train": Loss(F.cross_entropy)})
    run = lca_posthoc.run(
        tmp_path / "ck",
        task,
        out=tmp_path / "run.lca",
        keep="statistics",
        span=span,
        cluster="inline",
    )
    manifest, elements = run.manifest, 16 * 4097
    assert manifest.windows == 1
    files = [path for path in run.path.rglob("*") if path.is_file()]
    of_parameters = sum(
        path.stat().st_size
        for path in files
        if {*path.relative_to(run.path).parts} & {*TOTAL_FIELDS, "partial"}
    )
    assert of_parameters <= BYTES_OF_TOTALS * elements + 4096
    # the rest does not grow with parameters
    assert sum(path.stat().st_size for path in files) <= 40 * elements
    blocks = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    assert blocks <= required_bytes(manifest, "statistics", manifest.losses)
    assert (
        required_bytes(manifest, "statistics", manifest.losses) >= BYTES_OF_TOTALS * elements * 0.8
    )


@pytest.mark.parametrize(
    ("segments", "span", "room", "windows"),
    [
        (4, 4, 0, 1),
        (1000, 1, 0, 1),
        (1000, 1, 3, 3),
        (1000, 1, 10**6, 63),
        (10, 4, 2, 2),
        (9, 1, 7, 5),
    ],
)
def test_windows_are_as_many_as_there_is_room_for(
    segments: int, span: int, room: int, windows: int
) -> None:
    window = choose_window(segments, span, "statistics", room)
    assert math.ceil(segments / span / window) == windows <= max(1, min(room, 64))
    assert choose_window(segments, span, "units", room) == 1
