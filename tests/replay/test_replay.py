"""One result, however it came about: spans, workers, interruptions, resumption, growth."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lca_posthoc as lca_package
from lca_posthoc import Recorder, open_run, results
from lca_posthoc.errors import InputError, LCAError
from lca_posthoc.numerics import allocation
from lca_posthoc.numerics.objective import probe
from lca_posthoc.replay import driver, prepare
from lca_posthoc.replay.events import Planned, SpanDone, Stage
from lca_posthoc.replay.plan import plan
from lca_posthoc.replay.repair import repair
from tests.helpers.cli import (
    contents,
    lca,
    marker,
    refused,
    run_lca,
    says,
    task_namespace,
    write_task,
)
from tests.helpers.faults.processes import Driver

SEGMENTS = 37
LONG = 600.0  # seconds after which a process is taken to hang, on a busy machine too


def record_training(directory: Path, steps: range) -> Path:
    """Iterates of one and the same mini-batch training; those in `steps` are written."""
    made = task_namespace()
    torch.manual_seed(3)
    model, (inputs, targets) = made["Net"](), made["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    with Recorder(directory, model) as recorder:
        for step in range(steps.stop):
            if step in steps:
                recorder.save(step)
            batch = torch.randint(len(inputs), (8,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints of 37 segments and a task file."""
    root = tmp_path_factory.mktemp("replay")
    record_training(root / "checkpoints", range(SEGMENTS + 1))
    write_task(root / "small_task.py")
    return root


def replayed(place: Path, out: Path, **options: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Every array of a run of both losses, and the events on the way."""
    events: list[Any] = []
    options = {
        "cluster": "inline",
        "losses": ["all"],
        "checkpoints": place / "checkpoints",
        **options,
    }
    lca_package.run(task=place / "small_task.py", out=out, progress=events.append, **options)
    return arrays(out), events


def arrays(out: Path) -> dict[str, np.ndarray]:
    run = open_run(out)
    parts = ("allocation", "units", "tensors", "steps", "histogram", "totals")
    return {
        f"{loss}/{part}/{name}": np.asarray(values)
        for loss in run
        for part in parts
        for name, values in getattr(run[loss], part).variables.items()
    }


def identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    different = [
        name
        for name in one
        if one[name].dtype != object and one[name].tobytes() != other[name].tobytes()
    ]
    assert different == []


@pytest.fixture(scope="module")
def reference(place: Path) -> dict[str, np.ndarray]:
    found, _ = replayed(place, place / "reference.lca", span=8)
    return found


@pytest.mark.parametrize("span", [1, 4, 16])
def test_any_span_length_gives_the_same_bits(
    place: Path, tmp_path: Path, reference: dict, span: int
) -> None:
    found, _ = replayed(place, tmp_path / "run.lca", span=span)
    identical(reference, found)


@pytest.mark.parametrize("workers", [1, 2])
def test_local_workers_give_the_same_bits_as_this_process(
    place: Path, tmp_path: Path, reference: dict, workers: int
) -> None:
    found, events = replayed(place, tmp_path / "run.lca", cluster="local", workers=workers, span=4)
    identical(reference, found)
    assert [event.workers for event in events if isinstance(event, Planned)] == [workers]


@pytest.mark.parametrize(("span", "room", "window"), [(1, 64, 1), (1, 8, 5), (1, 0, 37), (4, 2, 5)])
def test_any_window_of_totals_gives_the_same_bits(
    place: Path,
    tmp_path: Path,
    reference: dict,
    monkeypatch: pytest.MonkeyPatch,
    span: int,
    room: int,
    window: int,
) -> None:
    """Also where the spans end in any order."""
    monkeypatch.setattr(prepare._Match, "room_for_windows", room)
    out = tmp_path / "run.lca"
    found, _ = replayed(place, out, span=span, cluster="local", workers=2)
    identical(reference, found)
    assert results.read_manifest(out).window == window
    assert list((out / "partial").glob("*/*")) == []


def test_a_second_run_evaluates_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out)
    before = contents(out)
    monkeypatch.setattr(
        driver, "prepare", lambda *_, **__: pytest.fail("a finished run was prepared again")
    )
    _, events = replayed(place, out)
    assert [event for event in events if not isinstance(event, Stage)] == [
        Planned(0, 2 * SEGMENTS, 0, 0)
    ]
    assert contents(out) == before


def test_a_second_run_with_an_edited_task_file_evaluates_no_span(
    place: Path, tmp_path: Path
) -> None:
    root = tmp_path / "place"
    shutil.copytree(place / "checkpoints", root / "checkpoints")
    write_task(root / "small_task.py")
    replayed(root, tmp_path / "run.lca")
    write_task(root / "small_task.py", "def task():", "# a comment\ndef task():")
    _, events = replayed(root, tmp_path / "run.lca")
    assert [event for event in events if isinstance(event, SpanDone)] == []


def test_only_spans_without_a_marker_are_replayed(
    place: Path, tmp_path: Path, reference: dict
) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out, span=8)
    marker(out, "train", 2).unlink()
    _, events = replayed(place, out)
    done = [event for event in events if isinstance(event, SpanDone)]
    # and the start of the span once more
    own = int(open_run(out)["train"].steps.evaluations[16:24].sum())
    assert [(event.span, event.losses, event.evaluations) for event in done] == [
        (2, ["train"], own + 1)
    ]
    identical(reference, arrays(out))


def test_a_loss_added_later_leaves_the_others_as_they_were(
    place: Path, tmp_path: Path, reference: dict
) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out, losses=["train"], span=8)
    before = {name: data for name, data in contents(out).items() if "train" in name}
    _, events = replayed(place, out, losses=["validation"])
    assert {tuple(event.losses) for event in events if isinstance(event, SpanDone)} == {
        ("validation",)
    }
    assert {name: data for name, data in contents(out).items() if "train" in name} == before
    identical(reference, arrays(out))


@pytest.mark.parametrize(
    ("first", "last", "span"), [(18, 37, 8), (16, 37, 8), (67, 80, 1), (66, 71, 1)]
)
def test_checkpoints_added_at_the_end_give_the_same_bits_as_one_run(
    place: Path, tmp_path: Path, first: int, last: int, span: int
) -> None:
    whole = record_training(tmp_path / "whole", range(last + 1))
    growing = tmp_path / "growing"
    growing.mkdir()
    for step in range(first + 1):
        shutil.copy(whole / f"step_{step:08d}.safetensors", growing)
    replayed(place, tmp_path / "grown.lca", checkpoints=growing, span=span)
    for step in range(first + 1, last + 1):
        shutil.copy(whole / f"step_{step:08d}.safetensors", growing)
    grown, events = replayed(place, tmp_path / "grown.lca", checkpoints=growing)
    once, _ = replayed(place, tmp_path / "once.lca", checkpoints=whole, span=span)
    identical(once, grown)
    again = [event.span for event in events if isinstance(event, SpanDone)]
    assert again == list(range(first // span, -(-last // span)))


def test_data_that_changed_behind_the_sample_is_noticed_where_spans_meet(
    place: Path, tmp_path: Path
) -> None:
    """The sample a loss is known by is of the first examples; what lies behind it shows in the loss
    itself.
    """
    out = tmp_path / "run.lca"
    torch.save(torch.cat([task_namespace()["train"][0]] * 20), tmp_path / "inputs.pt")
    task = write_task(
        tmp_path / "task.py",
        "train = (inputs[:30], targets[:30])",
        f"train = (torch.load({str(tmp_path / 'inputs.pt')!r}), targets[:30].repeat(20))",
    )

    def go_on(until: int) -> tuple[int, str]:
        for step in range(until + 1):
            name = f"step_{step:08d}.safetensors"
            (tmp_path / "checkpoints").mkdir(exist_ok=True)
            shutil.copy2(place / "checkpoints" / name, tmp_path / "checkpoints" / name)
        arguments = [
            "run",
            "--task",
            task,
            "--out",
            out,
            "--cluster",
            "inline",
            tmp_path / "checkpoints",
        ]
        code = "from lca_posthoc.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    assert go_on(8)[0] == 0
    before = contents(out / "commits")
    changed = torch.load(tmp_path / "inputs.pt")
    changed[400:] = -changed[400:]
    torch.save(changed, tmp_path / "inputs.pt")
    code, errors = go_on(16)
    assert code == 2
    says(errors, "value over its whole data at step 8 was", "lca remove RUN --loss train", "--out")
    assert contents(out / "commits") == before
    changed[400:] = -changed[400:]
    torch.save(changed, tmp_path / "inputs.pt")
    assert go_on(16)[0] == 0
    assert [fact["span"] for fact in open_run(out)["train"].markers] == [0, 1]
    assert list(results.verify(out)) == []


DIVIDED = """\
from pathlib import Path

try:  # one process has these data, every other one has others where no sample looks
    (Path(__file__).parent / "taken").mkdir()
    sign = 1.0
except FileExistsError:
    sign = -1.0
sampled = torch.arange(256) * 599 // 255
tail = torch.ones(600, 1).index_fill_(0, torch.arange(600), sign).index_fill_(0, sampled, 1.0)
train = (inputs[:30].repeat(20, 1) * tail, targets[:30].repeat(20))
"""


def test_workers_with_different_data_are_noticed_where_spans_meet(
    place: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path / "task.py", "train = (inputs[:30], targets[:30])\n", DIVIDED)
    out = tmp_path / "run.lca"
    with pytest.raises(
        LCAError,
        match=r"loss 'train' at step .* and .* in span .* one was computed from "
        r"different data",
    ) as caught:
        lca_package.run(place / "checkpoints", task, out=out, workers=2, device="cpu", span=2)
    assert caught.value.exit_code == 1
    found = [each for each in results.verify(out) if isinstance(each, results.Damage)]
    assert {each.loss for each in found} == {"train"}
    assert {(each.span or 0) % 2 for each in found} == {0, 1}
    assert all("at step" in each.what for each in found)


@pytest.mark.parametrize("window", [1, 4])
def test_a_span_of_other_data_is_found_and_computed_again(
    place: Path, tmp_path: Path, reference: dict, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """As a machine that erred would have committed it."""
    monkeypatch.setattr(prepare._Match, "room_for_windows", 3 if window > 1 else 64)
    out = tmp_path / "run.lca"
    replayed(place, out, span=4)
    assert results.read_manifest(out).window >= window
    twisted = write_task(
        tmp_path / "small_task.py",
        "validation = (",
        "train = (1.01 * train[0], train[1])\nvalidation = (",
    )
    damaged = results.Damage(
        path="", what="", loss="train", span=5, window=5 // results.read_manifest(out).window
    )
    with monkeypatch.context() as patch:
        patch.setattr(results, "differ", lambda *_: False)
        patch.setattr(results.boundary_checks, "differ", lambda *_: False)
        patch.setattr(results, "verify", lambda run: iter([damaged]))
        patch.setattr(probe.Identity, "matches", lambda *_: True)
        repair(out, twisted, cluster="inline")
    found = [each for each in results.verify(out) if isinstance(each, results.Damage)]
    assert {each.span for each in found} >= ({4, 5, 6} if window == 1 else {3, 4, 7, 8})
    assert all("loss 'train' at step" in each.what for each in found)
    with pytest.raises(InputError, match="its value"):
        repair(out, twisted, cluster="inline")
    done = repair(out, place / "small_task.py", cluster="inline")
    assert {*done.spans["train"]} >= {each.span for each in found}
    assert list(results.verify(out)) == []
    identical(arrays(out), reference)


def test_a_run_that_grew_knows_its_losses_again(place: Path, tmp_path: Path) -> None:
    whole, growing = record_training(tmp_path / "whole", range(13)), tmp_path / "growing"
    shutil.copytree(whole, growing)
    for step in range(9, 13):
        (growing / f"step_{step:08d}.safetensors").unlink()
    replayed(place, tmp_path / "run.lca", checkpoints=growing)
    for step in range(9, 13):
        shutil.copy(whole / f"step_{step:08d}.safetensors", growing)
    options = {"losses": ["train"], "cluster": "inline", "out": tmp_path / "run.lca"}
    lca_package.run(growing, place / "small_task.py", **options)
    edited = write_task(
        tmp_path / "small_task.py", "def task():", "# a comment\ndef task():"
    ).parent
    grown, _ = replayed(edited, tmp_path / "run.lca", checkpoints=growing)
    once, _ = replayed(
        place,
        tmp_path / "once.lca",
        checkpoints=whole,
        span=results.read_manifest(tmp_path / "run.lca").span,
    )
    identical(once, grown)


def test_an_unfinished_run_shows_committed_segments_only(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out, span=8)
    marker(out, "train", 1).unlink()
    train = open_run(out)["train"]
    assert train.steps.step.values.tolist() == [*range(8), *range(16, SEGMENTS)]
    assert train.allocation.sizes["step"] == SEGMENTS - 8
    assert not np.isnan(train.allocation["hidden.weight"]).any()
    with pytest.raises(LCAError, match="not complete"):
        _ = train.totals


def test_two_drivers_never_share_a_run(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.lca"
    replayed(place, out, losses=["train"])
    with results.hold(out):
        assert open_run(out)["train"].progress()["running"]
        result = run_lca(
            place / "checkpoints", place / "small_task.py", out, "--loss", "validation"
        )
    refused(result, str(out), "is being written by process", code=5)
    assert not open_run(out)["train"].progress()["running"]


# --- real processes, really killed ----------------------------------------------------------------


def whole(root: Path, segments: int) -> Path:
    """Checkpoints, a task and `clean.lca`, an undisturbed run of it in spans of 4 segments."""
    record_training(root / "checkpoints", range(segments + 1))
    write_task(
        root / "small_task.py",
        "inputs = torch.randn(40",
        "torch.manual_seed(0)\ninputs = torch.randn(40",
    )
    lca_package.run(
        root / "checkpoints",
        root / "small_task.py",
        losses=["all"],
        cluster="inline",
        span=4,
        out=root / "clean.lca",
    )
    return root


@pytest.fixture(scope="module")
def long_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough segments that a replay can be interrupted many times."""
    return whole(tmp_path_factory.mktemp("long"), 400)


@pytest.fixture(scope="module")
def middle_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough segments that a replay can be interrupted in the middle."""
    return whole(tmp_path_factory.mktemp("middle"), 120)


def start(root: Path, out: Path, cluster: str) -> Driver:
    """`lca run` in a process of its own; its spans are 4 segments long."""
    script = root / "lca_short_spans.py"
    script.write_text(
        "from lca_posthoc.replay import prepare\n"
        "from lca_posthoc.cli import main\n\n"
        "if __name__ == '__main__':\n"
        "    prepare._LONGEST_SPAN = 4\n"
        "    main()\n"
    )
    options = ["--loss", "all", "--out", out, "--cluster", cluster, "--workers", "2"]
    arguments = ["run", root / "checkpoints", "--task", root / "small_task.py", *options]
    return Driver([str(script), *map(str, arguments)], root, {}, powerless=False)


def wait_until(driver: Driver, ready: Callable[[], object]) -> None:
    """Return as soon as `ready()` holds; fail if the process ends before."""
    if not driver.until(ready):
        pytest.fail(f"ended before it could be interrupted: {driver.returncode}, {driver.said}")


def markers(out: Path) -> int:
    return len(list(out.glob("commits/train/0*.json")))


@pytest.mark.moment
def test_killed_at_random_moments_and_run_again_gives_the_bytes_of_an_undisturbed_run(
    long_place: Path, tmp_path: Path
) -> None:
    chance, out = random.Random(0), tmp_path / "run.lca"
    moments: Iterator[Any] = iter(
        [
            lambda: list(tmp_path.glob("run.lca.partial-*")),  # in the middle of creation
            lambda: out.exists(),
            *(lambda n=n: markers(out) >= n for n in sorted(chance.sample(range(1, 95), 6))),
        ]
    )
    for ready in moments:
        process = start(long_place, out, "inline")
        wait_until(process, ready)
        process.kill()
    process = start(long_place, out, "inline")
    assert process.finished(LONG) == 0, process.said
    assert contents(out / "data.zarr") == contents(long_place / "clean.lca" / "data.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["run.lca"]


@pytest.mark.moment
def test_a_killed_worker_costs_time_and_changes_nothing(middle_place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.lca"
    process = start(middle_place, out, "local")
    wait_until(process, lambda: markers(out) >= 3)
    workers = process.workers()
    assert workers
    workers[0].kill()
    assert process.finished(LONG) == 0, process.said
    assert contents(out / "data.zarr") == contents(middle_place / "clean.lca" / "data.zarr")


@pytest.mark.moment
@pytest.mark.parametrize("cluster", ["inline", "local"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_drains_and_leaves_a_resumable_run(
    middle_place: Path, tmp_path: Path, cluster: str, number: signal.Signals
) -> None:
    out = tmp_path / "run.lca"
    process = start(middle_place, out, cluster)
    wait_until(process, lambda: markers(out) >= 3)
    # A terminal sends Ctrl-C to every process of the group; a scheduler's SIGTERM reaches the
    # driver.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.finished(LONG) == 128 + number
    errors = process.said
    assert len(errors.splitlines()) <= 5, errors
    assert "Run the same command again" in errors
    status = lca("status", out)
    assert "stopped: run `lca run` again" in status.stdout
    lca_package.run(
        middle_place / "checkpoints",
        middle_place / "small_task.py",
        losses=["all"],
        cluster="inline",
        out=out,
    )
    assert contents(out / "data.zarr") == contents(middle_place / "clean.lca" / "data.zarr")


def test_only_a_loss_that_is_new_is_calibrated_at_the_level_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[tuple[list[str], bool]] = []
    original = allocation.calibrate

    def noted(start: Any, end: Any, objective: Any, losses: list[str], axes: Any) -> Any:
        calibrated.append((losses, axes is None))
        return original(start, end, objective, losses, axes)

    monkeypatch.setattr(allocation, "calibrate", noted)
    out = tmp_path / "run.lca"
    replayed(place, out, losses=["train"], rule="trapezoid", span=8)
    replayed(place, out, losses=["all"])
    marker(out, "train", 2).unlink()
    replayed(place, out)
    assert calibrated == [(["train"], True)] * 3 + [(["validation"], True)] * 3
    both, _ = replayed(place, tmp_path / "both.lca", rule="trapezoid", span=8)
    identical(both, arrays(out))
    del calibrated[:]
    sums = {"rule": "trapezoid", "keep": "tensors"}
    plan(place / "checkpoints", place / "small_task.py", **sums)
    lca_package.run(
        place / "checkpoints",
        place / "small_task.py",
        out=tmp_path / "sums.lca",
        cluster="inline",
        **sums,
    )
    assert calibrated == [(["train"], False)] * 3
