"""The error of a precision is measured at the start of a few segments, on a sample of the examples,
against the same computation one precision higher.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lca_posthoc import Loss, Recorder, Run, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.findings import summary
from lca_posthoc.numerics.schema import KEEP, sampled_examples
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.worker import spans

from ..helpers.cli import contents, lca, says, write_step
from ..helpers.model_cases import CASES, Batch, Case, classes
from ..helpers.oracle import RULES, Oracle
from ..helpers.replayed_cases import arrays

SEGMENTS, MEASURED = 10, [0, 8]
STARTS = set(spans.SAMPLED)  # of every run but those of this file


@pytest.fixture(scope="module", autouse=True)
def _measured_early() -> Iterator[None]:
    with mock.patch.object(spans, "SAMPLED", set(MEASURED)):
        yield


def by_class(inputs: Tensor, targets: Tensor) -> Tensor:
    return targets


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - F.one_hot(targets, 4)) ** 2).sum(1)


def square_values(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch[0]) - torch.eye(4).double()[batch[1]]) ** 2).sum(1)


SEVERAL = {
    "plain": Loss(F.cross_entropy),
    "squares": Loss(squares),
    "grouped": Loss(F.cross_entropy, group_by=by_class),
}
VALUES = {"plain": classes, "squares": square_values, "grouped": classes}


def many(name: str, examples: int) -> Case:
    """A case with as many examples, noisy copies of its own."""
    inputs, targets = CASES[name].data()["train"]
    chosen = torch.arange(examples) % len(inputs)
    noise = torch.randn((examples, *inputs.shape[1:]), generator=torch.Generator().manual_seed(6))
    data = {"train": (inputs[chosen] + noise / 2, targets[chosen])}
    return replace(CASES[name], data=lambda: data, batch_size=64)


# the examples that are sampled, from the first to the last
EXAMPLES, SAMPLE = 321, torch.tensor([0, 80, 160, 240, 320])
CASE_OF = {**CASES, "many_mlp": many("smooth_mlp", EXAMPLES), "many_bn": many("conv_bn", EXAMPLES)}


class Place:
    """Iterates of cases, and runs over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.iterates, self.replay = cache(self.iterates), cache(self.replay)

    def iterates(self, name: str) -> Path:
        return CASE_OF[name].record(self.root / name, steps=SEGMENTS)

    def new(self) -> Path:
        return self.root / f"run{len(list(self.root.iterdir()))}"

    def replay(self, name: str, **settings: Any) -> Run:
        """The losses of `SEVERAL` on a case's model and data."""
        return replayed(self.iterates(name), CASE_OF[name], self.new(), SEVERAL, **settings)

    def truth(
        self, name: str, loss: str, at: int, positions: Tensor | None
    ) -> dict[str, np.ndarray]:
        """The oracle's motion of one segment times the gradient at its start, over some examples
        of the case, or all.
        """
        case, checkpoints = CASE_OF[name], sorted(self.iterates(name).glob("*.safetensors"))
        data = case.data()["train"]
        mine = data if positions is None else tuple(part[positions] for part in data)
        truth = Oracle(case.build, mine, VALUES[loss]).allocate(
            [load_file(path) for path in checkpoints[at : at + 2]], *RULES["left"]
        )
        return {tensor: values.numpy() for tensor, values in truth.allocation[0].items()}


def replayed(
    iterates: Path, case: Case, out: Path, given: Mapping[str, Loss], **settings: Any
) -> Run:
    task = Task(case.build, case.data(), given)
    fixed = {
        "cluster": "inline",
        "device": "cpu",
        "losses": ["all"],
        "batch_size": case.batch_size,
        "span": 8,
    }
    return run(iterates, task, out=out, **{**fixed, **settings})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("precision"))


def error_of(replayed: Run, loss: str = "plain") -> np.ndarray:
    return replayed[loss].steps["precision_error"].values


# --- what is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["smooth_mlp", "conv_bn"])
def test_the_error_is_measured_on_the_segments_that_are_sampled(
    place: Place, name: str, precision: str
) -> None:
    found = place.replay(name, precision=precision)
    for loss in SEVERAL:
        error = error_of(found, loss)
        assert found[loss].steps["precision_error"].dims == ("step",)
        assert np.flatnonzero(~np.isnan(error)).tolist() == MEASURED
        assert np.isfinite(error[MEASURED]).all()


MANY = [(name, loss) for name in ("many_mlp", "many_bn") for loss in SEVERAL]
SAMPLED = ",".join(map(str, SAMPLE.tolist()))


def over_units(values: np.ndarray, axis: int | None, keep: str) -> np.ndarray:
    """The sums a level of `--keep` holds of a tensor's allocation."""
    if keep == "tensors" or axis is None:
        return values.sum()
    others = tuple(dim for dim in range(values.ndim) if dim != axis)
    return values.sum(others) if keep == "units" else values


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("check", ["sample", "full"])
@pytest.mark.parametrize(("name", "loss"), MANY)
def test_the_error_of_bfloat16_is_that_of_the_gradient_at_the_start_against_float64(
    place: Place, name: str, loss: str, check: str, keep: str
) -> None:
    """Of plain, several and grouped losses in one run, over exactly the examples that are sampled,
    or over all; A is what the left rule allocates in bfloat16 on these examples.
    """
    positions, subset = (SAMPLE, (SAMPLED,)) if check == "sample" else (None, ())
    settings = {"precision": "bfloat16", "rule": "left", "steps": "0:1"}
    alike = "plain" if loss == "grouped" else loss
    ours = place.replay(name, losses=(alike,), subset=subset, keep="parameters", **settings)[alike]
    error = error_of(place.replay(name, precision_check=check, keep=keep, **settings), loss)
    axes = {tensor.spec.name: tensor.spec.unit_axis for tensor in ours.manifest.tensors}
    wanted, apart, scale = place.truth(name, loss, 0, positions), 0.0, 0.0
    for tensor, stored in arrays(ours.allocation).items():
        mine, right = (
            over_units(values, axes[tensor], keep)
            for values in (stored[0].astype(np.float64), wanted[tensor])
        )
        apart += np.abs(mine - right).sum()
        scale += np.abs(right).sum()
    assert apart / scale > 1e-4  # it is bfloat16's, not float32's
    assert error[0] == pytest.approx(apart / scale, rel=0.02)


@pytest.mark.parametrize("name", ["smooth_mlp", "conv_bn"])
def test_the_error_of_float32_is_small_and_not_nothing(place: Place, name: str) -> None:
    found = place.replay(name)
    for loss in SEVERAL:
        error = error_of(found, loss)[MEASURED]
        assert ((error > 0) & (error <= 1e-5)).all()
        assert summary(found[loss])["precision_error"] == pytest.approx(error.mean(), rel=1e-12)
        assert summary(found[loss])["precision_segments"] == len(MEASURED)


def test_the_error_of_float64_is_not_measured(place: Place) -> None:
    found = place.replay("smooth_mlp", precision="float64")
    for loss in SEVERAL:
        assert np.isnan(error_of(found, loss)).all()
        figures = summary(found[loss])
        assert (
            figures["precision"],
            figures["precision_error"],
            figures["precision_segments"],
        ) == ("float64", None, 0)
    assert "measured error" not in lca("summary", found.path).stdout


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_command_line_shows_the_measured_error(place: Place, precision: str) -> None:
    found = place.replay("smooth_mlp", precision=precision)
    shown = lca("summary", found.path, "--loss", "plain").stdout.replace("\n", " ")
    higher = {"bfloat16": "float32", "float32": "float64"}[precision]
    says(
        shown,
        f"measured error of {precision} allocations against {higher} ones "
        f"{error_of(found)[MEASURED].mean():.1e} of their size",
        "on 2 segments, on 1 example of 50)",
    )


@pytest.mark.parametrize(
    ("name", "settings", "examples"),
    [
        ("many_mlp", {}, 5),
        ("many_mlp", {"precision_check": "full"}, EXAMPLES),
        ("many_mlp", {"subset": ("0:130",)}, 2),
        ("many_bn", {"norm_stats": "batch"}, 64),
        ("many_bn", {"norm_stats": "batch", "precision_check": "full"}, EXAMPLES),
    ],
    ids=str,
)
def test_a_measured_error_says_on_how_many_examples(
    place: Place, name: str, settings: dict[str, Any], examples: int
) -> None:
    figures = summary(place.replay(name, losses=("plain",), steps="0:1", **settings)["plain"])
    assert (figures["precision_examples"], figures["precision_segments"]) == (examples, 1)
    beside = extra_of_the_check(place, name, 1, **settings)
    assert beside.backward["float64"] == beside.backward["float32"] == examples


@dataclass
class Counts:
    """Examples a loss was called with, and those whose gradient was computed, by the type of the
    model's outputs.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    def less(self, other: Counts) -> Counts:
        """Return what is more here than there."""
        own, others = (self.forward, self.backward), (other.forward, other.backward)
        for counter, counted_there in zip(own, others, strict=True):
            counter.subtract(counted_there)
        return self

    def cost(self) -> int:
        """Return examples × bytes of the precision; a backward pass counts as two forward ones."""
        wide = {"float32": 4, "float64": 8}
        return sum((self.forward[kind] + 2 * self.backward[kind]) * wide[kind] for kind in wide)


COUNTS = [Counts()]  # of the run at hand: a task and its losses are copied


def counted(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy, and count."""
    kind, counts = str(outputs.dtype).removeprefix("torch."), COUNTS[0]
    counts.forward[kind] += len(targets)
    if outputs.requires_grad:
        outputs.register_hook(lambda _: counts.backward.update({kind: len(targets)}))
    return F.cross_entropy(outputs, targets, reduction=reduction)


def counts_of(
    place: Place, name: str, segments: int, measured: set[int], **settings: Any
) -> Counts:
    """Return what a run of as many segments computes of a loss, of which some are measured."""
    COUNTS[0] = Counts()
    with mock.patch.object(spans, "SAMPLED", measured):
        replayed(
            place.iterates(name),
            CASE_OF[name],
            place.new(),
            {"plain": Loss(counted)},
            **{"steps": f"0:{segments}", "tolerance": math.inf, **settings},
        )
    return COUNTS[0]


def extra_of_the_check(place: Place, name: str, segments: int, **settings: Any) -> Counts:
    """Return what a run computes more where it measures the error of its precision."""
    plain = counts_of(place, name, segments, set(), **settings)
    return counts_of(place, name, segments, {0}, **settings).less(plain)


@pytest.mark.parametrize("keep", ["units", "parameters"])
@pytest.mark.parametrize("rule", ["simpson", "trapezoid"])
def test_the_check_costs_at_most_one_evaluation_and_a_hundredth_of_nine_segments(
    place: Place, rule: str, keep: str
) -> None:
    """Counted in examples × bytes of the precision, on a split of a few hundred examples."""
    evaluation = 3 * 4 * EXAMPLES  # forward and backward in float32
    settings = {"rule": rule, "keep": keep}
    extra = extra_of_the_check(place, "many_mlp", 1, **settings)
    assert 0 < extra.cost() <= evaluation
    extra = extra_of_the_check(place, "many_mlp", 9, **settings)
    whole = {"simpson": 19, "trapezoid": 10}[rule] * evaluation
    assert 0 < extra.cost() <= whole / 100


@pytest.mark.parametrize("segments", [1, 8, 9, 64, 65, 513, 10_000])
@pytest.mark.parametrize("examples", [3, 20, 40, 63, 64, 127, 640, 16_383, 16_384, 60_000, 10**9])
def test_the_check_is_a_hundredth_of_a_run_of_any_size(examples: int, segments: int) -> None:
    """Examples times their bytes in a precision: each of the sample costs one of the run and two
    more in float64. The cheapest rule evaluates once a segment.
    """
    sampled = sampled_examples(examples)
    cost = 3 * sampled * sum(start < segments for start in STARTS)
    assert cost <= examples * segments
    if segments > 8:
        assert cost <= examples * segments / 100 or sampled == 1  # nothing is less than an example


@pytest.mark.parametrize("settings", [{"tolerance": 1e-9}, {"rule": "left"}, {"span": 1}], ids=str)
def test_an_error_does_not_depend_on_the_rule_or_the_level(
    place: Place, settings: dict[str, Any]
) -> None:
    once = place.replay("smooth_mlp", losses=("plain",))
    other = place.replay("smooth_mlp", losses=("plain",), **settings)
    assert error_of(other).tobytes() == error_of(once).tobytes()
    levels = other["plain"].steps["level"].values
    assert (levels[0] > 1) == ("tolerance" in settings)


def test_the_error_is_measured_with_the_same_normalisation(place: Place) -> None:
    error = error_of(place.replay("conv_bn", norm_stats="batch", losses=("plain",)))[MEASURED]
    assert ((error > 0) & (error <= 1e-4)).all()


def test_the_error_is_that_of_all_tensors_also_where_some_are_kept(place: Place) -> None:
    part = place.replay("smooth_mlp", precision="bfloat16", tensors=("0.*",))
    assert np.array_equal(
        error_of(part), error_of(place.replay("smooth_mlp", precision="bfloat16")), equal_nan=True
    )


# --- tasks that do not run one precision higher ---------------------------------------------------


class Rounded(nn.Module):
    """What a large constant leaves of its inputs depends on the precision: in float64 it is another
    function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 1e7 - 1e7)


class Single(Rounded):
    """Holds a constant whose precision is stated, which float64 does not multiply with."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x @ torch.eye(12, dtype=torch.float32))


@pytest.mark.parametrize(
    ("build", "why"),
    [(Rounded, ("in float32 but", "in float64")), (Single, ("RuntimeError", "split 'train'"))],
)
def test_a_task_that_is_another_one_in_float64_runs_in_float32_and_says_that_nothing_was_measured(
    tmp_path: Path, build: Callable[[], nn.Module], why: tuple[str, ...]
) -> None:
    case = replace(CASES["relu_mlp"], build=build)
    heard: list[Any] = []
    iterates = replace(case, build=Rounded).record(tmp_path / "iterates", steps=2)
    found = replayed(
        iterates, case, tmp_path / "run", case.losses, progress=heard.append, tolerance=math.inf
    )
    (note,) = [event.text for event in heard if isinstance(event, Note)]
    says(note, "the error of float32 is not measured", "does not run in float64", *why)
    assert found["train"].complete
    assert np.isnan(error_of(found, "train")).all()
    assert summary(found["train"])["precision_error"] is None
    with pytest.raises(InputError):
        replayed(iterates, case, tmp_path / "wide", case.losses, precision="float64")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, which tf32 may be used on")
def test_tf32_needs_a_gpu(tmp_path: Path, place: Place) -> None:
    with pytest.raises(InputError, match=r"--precision tf32 needs a GPU"):
        replayed(
            place.iterates("smooth_mlp"),
            CASES["smooth_mlp"],
            tmp_path / "run",
            SEVERAL,
            precision="tf32",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"precision": "bfloat16"}, "inf"),
        ({"precision": "bfloat16", "tolerance": 1e-3, "losses": ("plain",)}, 1e-3),
        ({"precision": "float32"}, 1e-3),
    ],
    ids=str,
)
def test_bfloat16_is_not_refined_unless_asked(
    place: Place, settings: dict[str, Any], wanted: Any
) -> None:
    found = place.replay("smooth_mlp", **settings)
    assert json.loads((found.path / "run.json").read_text())["settings"]["tolerance"] == wanted
    levels = found["plain"].steps["level"].values
    assert (levels == levels.min()).all() or wanted != "inf"


# --- measuring disturbs nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"), [("smooth_mlp", "float32"), ("conv_bn", "bfloat16")]
)
def test_measuring_changes_no_other_byte(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    measured = place.replay(name, precision=precision)
    monkeypatch.setattr(spans, "SAMPLED", set())
    out = place.new()
    plain = replayed(place.iterates(name), CASES[name], out, SEVERAL, precision=precision)
    assert all(np.isnan(error_of(plain, loss)).all() for loss in SEVERAL)
    one, other = (contents(each.path / "data.zarr") for each in (measured, plain))
    differ = {path for path in {*one, *other} if one.get(path) != other.get(path)}
    assert differ
    assert {"/".join(path.split("/")[1:3]) for path in differ} == {"steps/precision_error"}
    for loss in SEVERAL:
        taken = [
            [
                {key: marker[key] for key in ("evaluations", "forward_passes")}
                for marker in each[loss].markers
            ]
            for each in (measured, plain)
        ]
        assert taken[0] == taken[1]


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("first", [5, 9])
def test_a_run_that_grew_has_the_errors_of_one_run(
    place: Place, tmp_path: Path, first: int, keep: str
) -> None:
    whole = place.iterates("smooth_mlp")
    growing = tmp_path / "growing"
    shutil.copytree(whole, growing)
    later = [growing / f"step_{step:08d}.safetensors" for step in range(first + 1, SEGMENTS + 1)]
    for path in later:
        path.unlink()
    settings = {"precision": "bfloat16", "keep": keep}
    replayed(growing, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **settings)
    for path in later:
        shutil.copy(whole / path.name, path)
    grown = replayed(growing, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **settings)
    once = place.replay("smooth_mlp", **settings)
    for loss in SEVERAL:
        assert grown[loss].complete
        assert error_of(grown, loss).tobytes() == error_of(once, loss).tobytes()


def test_a_loss_added_later_has_the_errors_it_has_in_one_run(place: Place, tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "keep": "tensors"}
    iterates, case = place.iterates("smooth_mlp"), CASES["smooth_mlp"]
    replayed(iterates, case, tmp_path / "run", SEVERAL, losses=["squares"], **settings)
    later = replayed(iterates, case, tmp_path / "run", SEVERAL, losses=["grouped"], **settings)
    once = place.replay("smooth_mlp", **settings)
    assert error_of(later, "grouped").tobytes() == error_of(once, "grouped").tobytes()


# --- dead segments --------------------------------------------------------------------------------

# segments that do not move, of ten; the segments that are measured, with stretches from 0 and from
# 8 on
DEAD = {
    "the first": ([0], [1, 8]),
    "the first three": ([0, 1, 2], [3, 8]),
    "one in the middle": ([4], [0, 8]),
    "at the border": ([7, 8], [0, 9]),
    "a whole stretch": (list(range(8)), [8]),
    "the last ones": ([8, 9], [0]),
    "none moves": (list(range(10)), []),
}


def dead_series(place: Path, whole: Path, dead: list[int]) -> Path:
    """The iterates with some segments repeated: as many checkpoints, each a copy of the one before
    after a dead segment.
    """
    place.mkdir()
    source = 0
    for step in range(SEGMENTS + 1):
        if step and step - 1 not in dead:
            source += 1
        tensors = load_file(whole / f"step_{source:08d}.safetensors")
        write_step(place, step, tensors)
    return place


@pytest.mark.parametrize(("dead", "wanted"), DEAD.values(), ids=DEAD)
def test_the_first_segment_that_moves_is_measured(
    place: Place, tmp_path: Path, dead: list[int], wanted: list[int]
) -> None:
    iterates = dead_series(tmp_path / "iterates", place.iterates("smooth_mlp"), dead)
    taken = []
    for span in (1, 2, 8):
        options = {"keep": "tensors", "losses": ["plain", "grouped"], "span": span}
        found = replayed(iterates, CASES["smooth_mlp"], tmp_path / f"{span}", SEVERAL, **options)
        for loss in found:
            assert np.flatnonzero(np.isfinite(error_of(found, loss))).tolist() == wanted
            error = summary(found[loss])["precision_error"]
            assert summary(found[loss])["precision_segments"] == len(wanted)
            assert (error is None) == (not wanted)
            assert error is None or 0 < error < 1e-5
        taken.append([error_of(found, loss).tobytes() for loss in found])
    assert taken[0] == taken[1] == taken[2]


def test_a_dead_start_that_grew_has_the_errors_of_one_run(place: Place, tmp_path: Path) -> None:
    whole = dead_series(tmp_path / "whole", place.iterates("smooth_mlp"), [0, 1, 8])
    growing = tmp_path / "growing"
    growing.mkdir()
    options = {"keep": "tensors", "losses": ["plain"], "span": 2}
    for last in (2, 3, 9, SEGMENTS):
        for step in range(last + 1):
            shutil.copy(whole / f"step_{step:08d}.safetensors", growing)
        grown = replayed(growing, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **options)
    once = replayed(whole, CASES["smooth_mlp"], tmp_path / "once", SEVERAL, **options)
    assert error_of(grown).tobytes() == error_of(once).tobytes()
    assert np.flatnonzero(np.isfinite(error_of(once))).tolist() == [2, 9]


@pytest.mark.parametrize(
    ("dead", "said"),
    [
        ([], "of the parameters do not move at all on sampled segments, so"),
        ([0], "on sampled segments (1 more, on which nothing moves, are not counted), so"),
        (list(range(SEGMENTS)), "nothing moves at all on the 10 sampled segments"),
    ],
    ids=["none", "the first", "all"],
)
def test_the_share_of_unmoved_half_precision_weights_leaves_dead_segments_out(
    place: Place, tmp_path: Path, dead: list[int], said: str
) -> None:
    iterates = dead_series(tmp_path / "iterates", place.iterates("smooth_mlp"), dead)
    for path in iterates.glob("*.safetensors"):
        halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        write_step(iterates, int(path.stem.split("_")[1]), halves)
    heard: list[Any] = []
    replayed(
        iterates,
        CASES["smooth_mlp"],
        tmp_path / "run",
        SEVERAL,
        losses=["plain"],
        keep="tensors",
        progress=heard.append,
    )
    (note,) = [
        event.text for event in heard if isinstance(event, Note) and "half precision" in event.text
    ]
    says(note, said)


@pytest.mark.parametrize("dead", [[0], [0, 9], [0, 4, 9]], ids=str)
def test_the_calibration_is_that_of_segments_that_move(
    place: Place, tmp_path: Path, dead: list[int]
) -> None:
    iterates = dead_series(tmp_path / "iterates", place.iterates("smooth_mlp"), dead)
    options = {"rule": "trapezoid", "keep": "tensors", "losses": ["plain"]}
    found = replayed(iterates, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **options)
    moving = [row for row in range(SEGMENTS) if row not in dead]
    assert found["plain"].record.calibration > 0
    assert (found["plain"].steps["error_bound"].values[moving] > 0).all()
    still = dead_series(tmp_path / "still", place.iterates("smooth_mlp"), list(range(SEGMENTS)))
    nothing = replayed(still, CASES["smooth_mlp"], tmp_path / "nothing", SEVERAL, **options)
    assert nothing["plain"].record.calibration is None


class Drawn(torch.utils.data.Dataset[Any]):
    """Examples drawn anew, by a seed, whenever they are read: under another default dtype the same
    seed gives other numbers.
    """

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(4, generator=torch.Generator().manual_seed(index)), index % 3


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_data_are_read_alike_whatever_the_loss_is_computed_in(
    tmp_path: Path, precision: str
) -> None:
    """The measured error is that of rounding, and float64 has the loss of the same examples."""
    fixed = torch.stack([Drawn()[index][0] for index in range(24)]), torch.arange(24) % 3
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Recorder(tmp_path / "iterates", model) as recorder:
        recorder.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(fixed[0]), fixed[1]).backward()
            optimizer.step()
    losses = {}
    for name, data in {"drawn": Drawn(), "fixed": fixed}.items():
        task = Task(
            lambda: torch.nn.Linear(4, 3), {"train": data}, {"train": Loss(F.cross_entropy)}
        )
        where = {"out": tmp_path / name, "cluster": "inline"}
        steps = run(tmp_path / "iterates", task, precision=precision, batch_size=8, **where)[
            "train"
        ].steps
        losses[name] = [*steps["loss_start"].values, steps["loss_end"].values[-1]]
        if precision == "float32":
            assert np.nanmax(steps["precision_error"].values) < 1e-5
    assert losses["drawn"] == losses["fixed"]
