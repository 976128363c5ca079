"""Numerics 13: what another path through the same checkpoints would change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lca_posthoc.numerics.objective import Along, Evaluation, Motion, OfTensors, OfUnits, Units
from lca_posthoc.numerics.path import Course, OtherPaths, SegmentPath
from lca_posthoc.results import Run, verify

from ..helpers.small_perceptron import (
    copied,
    examples,
    file_of,
    network,
    replay,
    train,
    value,
)

SPARSE = [0, 1, 2, 4, 8, 12, 15, 19]
Point = dict[str, Tensor]
Gradient = Callable[[Point], Point]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("dense"), SPARSE[-1])


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(dense, tmp_path_factory.mktemp("sparse"), SPARSE)


# --- a plain loop ---------------------------------------------------------------------------------


def gradient_of(rows: slice | Tensor) -> Gradient:
    """The gradient of the mean loss over some examples, in float64."""
    model, (inputs, targets) = network().double(), examples()

    def gradient(point: Point) -> Point:
        outputs = torch.func.functional_call(model, point, (inputs[rows].double(),))
        loss = value(outputs, targets[rows]).mean()
        return dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True))

    def of_leaves(point: Point) -> Point:
        return gradient({name: of.detach().requires_grad_() for name, of in point.items()})

    return of_leaves


def combined(*terms: tuple[float, Point]) -> Point:
    return {name: sum((factor * of[name] for factor, of in terms), 0.0) for name in terms[0][1]}


def product(one: Point, other: Point) -> np.ndarray:
    return np.array([float((one[name] * other[name]).sum()) for name in one])


def tangents(points: Sequence[Point], steps: Sequence[int]) -> list[Point]:
    """Derivatives of the parabola through each checkpoint and its neighbours, per step."""
    slopes = [
        combined((1 / (stop - start), after), (-1 / (stop - start), before))
        for (start, stop), (before, after) in zip(
            itertools.pairwise(steps), itertools.pairwise(points), strict=True
        )
    ]
    lengths = np.diff(steps)
    inner = [
        combined(
            (lengths[i] / (lengths[i - 1] + lengths[i]), slopes[i - 1]),
            (lengths[i - 1] / (lengths[i - 1] + lengths[i]), slopes[i]),
        )
        for i in range(1, len(slopes))
    ]
    first = combined((2.0, slopes[0]), (-1.0, inner[0]))
    last = combined((2.0, slopes[-1]), (-1.0, inner[-1]))
    return [first, *inner, last]


def expected(
    points: Sequence[Point], steps: Sequence[int], gradient: Gradient
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts of every segment, and what every second line is allocated."""
    tangent, shifts, lines = tangents(points, steps), [], []
    for row, (start, end) in enumerate(itertools.pairwise(points)):
        length = steps[row + 1] - steps[row]
        if length == 1:
            shifts.append(np.zeros(len(start)))
            continue
        first, last = combined((length, tangent[row])), combined((length, tangent[row + 1]))
        motion = combined((1.0, end), (-1.0, start))
        halfway = combined((0.5, start), (0.5, end), (1 / 8, first), (-1 / 8, last))
        speed = combined((1.5, motion), (-0.25, first), (-0.25, last))
        along_curve = (
            product(first, gradient(start))
            + 4 * product(speed, gradient(halfway))
            + product(last, gradient(end))
        ) / 6
        shifts.append(along_curve - simpson(start, end, gradient))
    for row in range(0, len(points) - 2, 2):
        if min(np.diff(steps)[row : row + 2]) > 1:
            lines.append(simpson(points[row], points[row + 2], gradient))
    return np.array(shifts), np.array(lines)


def simpson(start: Point, end: Point, gradient: Gradient) -> np.ndarray:
    motion = combined((1.0, end), (-1.0, start))
    middle = combined((0.5, start), (0.5, end))
    return (
        product(motion, gradient(start))
        + 4 * product(motion, gradient(middle))
        + product(motion, gradient(end))
    ) / 6


def stored(place: Path, steps: Sequence[int]) -> list[Point]:
    names = [name for name, _ in network().named_parameters()]
    files = [load_file(file_of(place, step)) for step in steps]
    return [{name: tensors[name].double() for name in names} for tensors in files]


def lines_of(run: Run, loss: str) -> np.ndarray:
    """Lines of twice the length, of which both halves are long."""
    doubled = run[loss].other_path["doubled"].values
    rows = np.flatnonzero(np.any(doubled != 0, axis=tuple(range(1, doubled.ndim))))
    return doubled[rows].reshape(-1, 2, *doubled.shape[1:]).sum(1)


@pytest.mark.parametrize("keep", ["tensors", "units", "parameters"])
@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left", "gauss-2"])
def test_shifts_and_doubled_lines_are_those_of_a_plain_loop(
    keep: str, rule: str, sparse: Path, tmp_path: Path
) -> None:
    run = replay(sparse, tmp_path / "run.lca", keep=keep, rule=rule, losses=["train"])
    shifts, lines = expected(stored(sparse, SPARSE), SPARSE, gradient_of(slice(None)))
    size = np.abs(run["train"].tensors["allocated"].values).sum()
    finding = run["train"].other_path["shift"].values
    assert np.abs(finding - shifts).max() <= 1e-12 * size
    assert np.abs(lines_of(run, "train") - lines).max() <= 1e-12 * size
    assert np.abs(shifts).max() > 1e-3 * size  # so that it says something


def test_every_group_has_its_own(sparse: Path, tmp_path: Path) -> None:
    run = replay(sparse, tmp_path / "run.lca", losses=["classes"])
    path = run["classes"].other_path
    for label in path["group"].values:
        gradient = gradient_of(torch.nonzero(examples()[1] == int(label)).flatten())
        shifts, lines = expected(stored(sparse, SPARSE), SPARSE, gradient)
        assert path["shift"].sel(group=label).values == pytest.approx(shifts, abs=1e-12)
        position = list(path["group"].values).index(label)
        assert lines_of(run, "classes")[:, position] == pytest.approx(lines, abs=1e-12)


def test_they_do_not_change_what_is_allocated_beside_them(sparse: Path, tmp_path: Path) -> None:
    on = replay(sparse, tmp_path / "on.lca", losses=["train"], precision="float32")
    off = replay(
        sparse, tmp_path / "off.lca", losses=["train"], precision="float32", path_band="off"
    )
    for name in ("allocated", "motion"):
        np.testing.assert_array_equal(
            on["train"].tensors[name].values, off["train"].tensors[name].values
        )


def test_a_dense_run_has_none(dense: Path, tmp_path: Path) -> None:
    run = replay(dense, tmp_path / "run.lca", losses=["train"])
    assert run.manifest.settings["path_band"] == "off"
    assert not (tmp_path / "run.lca" / "data.zarr" / "train" / "path").exists()


@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_bits_do_not_depend_on_where_spans_end(keep: str, sparse: Path, tmp_path: Path) -> None:
    losses = ["train", "classes", "examples"]
    runs = [
        replay(
            sparse,
            tmp_path / f"{span}.lca",
            keep=keep,
            losses=losses,
            span=span,
            precision="float32",
        )
        for span in (1, 2, 8)
    ]
    for loss, name in itertools.product(losses, ("shift", "doubled")):
        first, *others = (run[loss].other_path[name].values for run in runs)
        for other in others:
            np.testing.assert_array_equal(first, other)
    for loss in losses:
        first, *others = (run[loss].tensors["allocated"].values for run in runs)
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("known", [4, 5, 6, 7])
@pytest.mark.parametrize("keep", ["tensors", "parameters"])
def test_a_run_that_grew_is_the_same_to_the_bit(
    keep: str, known: int, dense: Path, sparse: Path, tmp_path: Path
) -> None:
    options = {"losses": ["train"], "span": 2, "keep": keep}
    growing = copied(dense, tmp_path / "growing", SPARSE[:known])
    replay(growing, tmp_path / "grown.lca", **options)
    copied(dense, growing, SPARSE)
    grown = replay(growing, tmp_path / "grown.lca", **options)["train"]
    whole = replay(sparse, tmp_path / "whole.lca", **options)["train"]
    assert not list(verify(tmp_path / "grown.lca"))
    for name in ("tensors", "steps", "other_path"):
        assert getattr(grown, name).equals(getattr(whole, name))
    if keep == "parameters":
        assert grown.totals.equals(whole.totals)


def test_a_random_part_of_the_segments_has_the_bits_of_all(sparse: Path, tmp_path: Path) -> None:
    whole = replay(sparse, tmp_path / "whole.lca", losses=["train"])["train"].other_path
    part = replay(sparse, tmp_path / "part.lca", losses=["train"], segments="0.6@1")["train"]
    assert 0 < part.other_path.sizes["step"] < whole.sizes["step"]
    for name in ("shift", "doubled"):
        np.testing.assert_array_equal(
            part.other_path[name].values,
            whole[name].sel(step=part.other_path["step"].values).values,
        )


def test_paths_do_not_bend_across_what_is_left_out(sparse: Path, tmp_path: Path) -> None:
    # of steps 0, 1, 2, 4, 8 and 12, 15, 19
    both = replay(sparse, tmp_path / "both.lca", losses=["train"], steps="0:8,12:19")["train"]
    ends = replay(sparse, tmp_path / "ends.lca", losses=["train"], steps="0:8")["train"]
    for name in ("shift",):
        joined = both.other_path[name].sel(step=ends.other_path["step"].values)
        np.testing.assert_array_equal(joined.values, ends.other_path[name].values)


# --- laws -----------------------------------------------------------------------------------------


class Bowl:
    """The loss ½⟨θ, Hθ⟩ + ⟨b, θ⟩ of two tensors, whose gradient is known."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        half = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        self.matrix = half @ half.T
        self.slope = torch.randn(5, generator=generator, dtype=torch.float64)

    def gradient(self, point: Mapping[str, Tensor]) -> Point:
        flat = torch.cat([point["one"], point["two"]])
        one, two = (self.matrix @ flat + self.slope).split([2, 3])
        return {"one": one, "two": two}

    def evaluate(
        self, point: Mapping[str, Tensor], losses: list[str], *, along: Along | None = None
    ) -> dict[str, Evaluation]:
        assert along is not None
        gradient = self.gradient(point)
        sums = torch.tensor(
            [
                [
                    float(((motion.end[name] - motion.start[name]) * of_tensor).sum())
                    for name, of_tensor in gradient.items()
                ]
                for motion in along.motions
            ],
            dtype=torch.float64,
        )
        of_units = OfUnits(sums, Units(dict.fromkeys(gradient, 1)))
        return {"bowl": Evaluation.known(np.float64(0.0), np.float64(1.0), of_units)}

    def shift(self, path: SegmentPath, start: Point, end: Point) -> dict[str, float]:
        def beside(point: Point, directions: Sequence[Motion]) -> dict[str, Evaluation]:
            along = Along(dict.fromkeys(point), directions)
            gradient = self.evaluate(point, ["bowl"], along=along)["bowl"].gradient
            sums = torch.stack([values[..., 0] for values in gradient.values()], -1)
            nothing = Evaluation.known(np.float64(0.0), np.float64(1.0), {})
            return {"bowl": replace(nothing, beside=OfTensors(sums, tuple(gradient)))}

        middle = {name: torch.lerp(start[name], end[name], 0.5) for name in start}
        sums = self.evaluate(
            middle, ["bowl"], along=Along(dict.fromkeys(start), [Motion(start, end)])
        )
        on_line = {name: values.sum().numpy() for name, values in sums["bowl"].gradient.items()}
        ends = beside(start, path.at_start), beside(end, path.at_end)
        shift = path.shifts(self, ends, {"bowl": on_line})["bowl"].shift
        return {name: float(of_tensor) for name, of_tensor in shift.items()}


def point(*values: float) -> Point:
    one, two = torch.tensor(values, dtype=torch.float64).split([2, 3])
    return {"one": one, "two": two}


def path_of(points: Sequence[Point], steps: Sequence[int]) -> SegmentPath:
    """The path of the second of three segments."""
    before, length, after = np.diff(steps).tolist()
    paths = OtherPaths(1, (before, length, after), lambda position: True)
    return SegmentPath(paths, Course(points.__getitem__, steps.__getitem__))


def test_a_path_through_checkpoints_on_one_line_changes_nothing() -> None:
    steps = [0, 3, 10, 12]
    points = [point(*(1.0 + step * direction for direction in range(5))) for step in steps]
    shift = Bowl().shift(path_of(points, steps), points[1], points[2])
    assert all(abs(of_tensor) <= 1e-10 for of_tensor in shift.values())


def test_on_a_parabola_the_shift_of_a_quadratic_loss_is_known_by_hand() -> None:
    # through θ(t) = a + bt + ct², for which tangents are exact. Simpson's rule integrates the
    # straight line exactly, and of the curve ⟨γ̇, Hγ + s⟩, a cubic in t, as well
    bowl, steps = Bowl(), [0, 2, 6, 11]
    generator = torch.Generator().manual_seed(4)
    a, b, c = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    points = [point(*(a + b * t + c * t**2).tolist()) for t in steps]
    shift = bowl.shift(path_of(points, steps), points[1], points[2])

    def integral(tensor: str) -> float:
        nodes, weights = np.polynomial.legendre.leggauss(8)
        times = 4 + 2 * nodes
        total = 0.0
        for time, weight in zip(times, weights, strict=True):
            place = point(*(a + b * time + c * time**2).tolist())
            speed = point(*(b + 2 * c * time).tolist())
            total += 2 * weight * float((speed[tensor] * bowl.gradient(place)[tensor]).sum())
        motion = points[2][tensor] - points[1][tensor]
        middle = {name: (points[1][name] + points[2][name]) / 2 for name in points[1]}
        return total - float((motion * bowl.gradient(middle)[tensor]).sum())

    assert shift == pytest.approx({name: integral(name) for name in shift}, rel=1e-9)
    assert abs(sum(shift.values())) <= 1e-9 * max(map(abs, shift.values()))


def test_training_backwards_turns_the_sign() -> None:
    steps, generator = [0, 2, 6, 11], torch.Generator().manual_seed(5)
    points = [
        point(*torch.randn(5, generator=generator, dtype=torch.float64).tolist()) for _ in steps
    ]
    there = Bowl().shift(path_of(points, steps), points[1], points[2])
    mirrored = [steps[-1] - step for step in reversed(steps)]
    back = Bowl().shift(path_of(points[::-1], mirrored), points[2], points[1])
    assert back == pytest.approx({name: -of_tensor for name, of_tensor in there.items()})
