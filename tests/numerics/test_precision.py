"""The error of a precision is measured, on a few segments, against the same computation one
precision higher.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
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
from lca_posthoc.replay.events import Note
from lca_posthoc.replay.worker import spans

from ..helpers.cli import contents, lca, says, write_step
from ..helpers.model_cases import CASES, Batch, Case, classes
from ..helpers.oracle import Oracle, simpson
from ..helpers.replayed_cases import arrays

SEGMENTS, MEASURED = 10, [0, 8]


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


class Place:
    """Iterates of cases, and runs over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.iterates, self.replay = cache(self.iterates), cache(self.replay)

    def iterates(self, name: str) -> Path:
        return CASES[name].record(self.root / name, steps=SEGMENTS)

    def new(self) -> Path:
        return self.root / f"run{len(list(self.root.iterdir()))}"

    def replay(self, name: str, **settings: Any) -> Run:
        """The losses of `SEVERAL` on a case's model and data."""
        return replayed(self.iterates(name), CASES[name], self.new(), SEVERAL, **settings)

    def truth(self, name: str, loss: str, at: int) -> list[dict[str, np.ndarray]]:
        """The oracle's allocation of one segment, for each group."""
        case, checkpoints = CASES[name], sorted(self.iterates(name).glob("*.safetensors"))
        data = case.data()["train"]
        labels = data[1].unique().tolist() if loss == "grouped" else [None]
        found = []
        for label in labels:
            mine = slice(None) if label is None else data[1] == label
            judge = Oracle(case.build, tuple(each[mine] for each in data), VALUES[loss])
            truth = judge.allocate(
                [load_file(path) for path in checkpoints[at : at + 2]], *simpson(2)
            )
            found.append({tensor: each.numpy() for tensor, each in truth.allocation[0].items()})
        return found


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


BFLOAT16 = [(name, loss) for name in ("smooth_mlp", "conv_bn") for loss in SEVERAL]


@pytest.mark.parametrize(("name", "loss"), BFLOAT16)
def test_the_error_of_bfloat16_is_the_one_against_float64(
    place: Place, name: str, loss: str
) -> None:
    """Of plain, several and grouped losses in one run; of a grouped loss, over all groups
    together.
    """
    results = place.replay(name, precision="bfloat16")[loss]
    # Simpson's rule, as the oracle's
    assert results.steps["evaluations"].values[MEASURED].tolist() == [2, 2]
    for at in MEASURED:
        apart = scale = 0.0
        for group, wanted in enumerate(place.truth(name, loss, at)):
            for tensor, stored in arrays(results.allocation).items():
                mine = stored[at, group] if loss == "grouped" else stored[at]
                apart += np.abs(mine.astype(np.float64) - wanted[tensor]).sum()
                scale += np.abs(wanted[tensor]).sum()
        assert apart / scale > 1e-4  # it is bfloat16's, not float32's
        assert 1 / 1.5 <= results.steps["precision_error"].values[at] / (apart / scale) <= 1.5


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
        "on 2 segments",
    )


def test_an_error_is_that_of_the_rule_and_the_level_that_were_used(place: Place) -> None:
    """Refined segments are compared with refined ones: another rule would differ by far more than
    rounding.
    """
    for settings in ({"tolerance": 1e-9}, {"rule": "left"}):
        found = place.replay("smooth_mlp", losses=("plain",), **settings)
        assert ((error_of(found)[MEASURED] > 0) & (error_of(found)[MEASURED] <= 1e-5)).all()
    assert (
        place.replay("smooth_mlp", losses=("plain",), tolerance=1e-9)["plain"]
        .steps["level"]
        .values[0]
        > 1
    )


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


@pytest.mark.parametrize("first", [5, 9])
def test_a_run_that_grew_has_the_errors_of_one_run(
    place: Place, tmp_path: Path, first: int
) -> None:
    whole = place.iterates("smooth_mlp")
    growing = tmp_path / "growing"
    shutil.copytree(whole, growing)
    later = [growing / f"step_{step:08d}.safetensors" for step in range(first + 1, SEGMENTS + 1)]
    for path in later:
        path.unlink()
    settings = {"precision": "bfloat16", "keep": "tensors"}
    replayed(growing, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **settings)
    for path in later:
        shutil.copy(whole / path.name, path)
    grown = replayed(growing, CASES["smooth_mlp"], tmp_path / "run", SEVERAL, **settings)
    once = place.replay("smooth_mlp", precision="bfloat16")
    for loss in SEVERAL:
        assert grown[loss].complete
        assert error_of(grown, loss).tobytes() == error_of(once, loss).tobytes()


def test_a_loss_added_later_has_the_errors_it_has_in_one_run(place: Place, tmp_path: Path) -> None:
    settings = {"precision": "bfloat16", "keep": "tensors"}
    iterates, case = place.iterates("smooth_mlp"), CASES["smooth_mlp"]
    replayed(iterates, case, tmp_path / "run", SEVERAL, losses=["squares"], **settings)
    later = replayed(iterates, case, tmp_path / "run", SEVERAL, losses=["grouped"], **settings)
    once = place.replay("smooth_mlp", precision="bfloat16")
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
        ([], "of the parameters do not move at all on sampled segments, and"),
        ([0], "on sampled segments (1 more, on which nothing moves, are not counted), and"),
        (list(range(SEGMENTS)), "nothing moves at all on the 10 sampled segments"),
    ],
    ids=["none", "the first", "all"],
)
def test_the_share_of_unmoved_half_precision_weights_leaves_dead_segments_out(
    place: Place, tmp_path: Path, dead: list[int], said: str
) -> None:
    iterates = dead_series(tmp_path / "iterates", place.iterates("smooth_mlp"), dead)
    for path in iterates.iterdir():
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
