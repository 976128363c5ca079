"""What a run would cost, against what it costs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lca_posthoc
from lca_posthoc import Loss, Recorder, Task
from lca_posthoc.errors import ResourceError
from lca_posthoc.findings import summary
from lca_posthoc.numerics.objective import Objective
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.replay import prepare
from lca_posthoc.replay.plan import plan, plan_recording
from lca_posthoc.replay.prepare import choose_span
from lca_posthoc.replay.worker import costs
from lca_posthoc.results import read_manifest, required_bytes, verify
from tests.helpers.cli import (
    contents,
    document,
    lca,
    record,
    refused,
    run_lca,
    task_namespace,
    write_step,
    write_task,
)


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left", "midpoint", "gauss-2"])
def test_evaluations_are_those_a_run_without_refinement_makes(tmp_path: Path, rule: str) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    before = contents(tmp_path)
    planned = plan(tmp_path / "ck", task, losses=["all"], rule=rule, workers=1)
    assert contents(tmp_path) == {
        **before,
        **{name: held for name, held in contents(tmp_path).items() if "pycache" in name},
    }
    options = {"rule": rule, "tolerance": float("inf"), "losses": ["all"]}
    run = lca_posthoc.run(tmp_path / "ck", task, cluster="inline", **options)
    assert {name: loss.evaluations for name, loss in planned.losses.items()} == {
        name: summary(run[name])["evaluations"] for name in run
    }
    manifest = read_manifest(run.path)
    assert planned.segments == manifest.segments
    assert planned.parameters == manifest.parameters
    assert {name: loss.batch_size for name, loss in planned.losses.items()} == {
        name: record.batch_size for name, record in manifest.losses.items()
    }
    assert all(
        loss.seconds == loss.seconds_per_evaluation * loss.evaluations > 0
        for loss in planned.losses.values()
    )
    assert planned.keep == manifest.keep == "parameters"
    assert list(planned.seconds) == list(planned.bytes) == list(planned.memory) == list(KEEP)
    assert min(planned.seconds.values()) > 0
    assert (
        planned.bytes["parameters"]
        >= sum(loss.bytes["parameters"] for loss in planned.losses.values()) / 2
    )
    assert planned.free > 0
    assert planned.free_memory > 0
    assert 0 < planned.memory["tensors"] < planned.memory["units"] < planned.memory["parameters"]


def test_what_cannot_be_spread_over_the_workers_is_said(tmp_path: Path) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    assert not any("busy" in note for note in plan(tmp_path / "ck", task, workers=6).notes)
    assert (
        "6 segments keep at most 6 of 64 workers busy"
        in plan(tmp_path / "ck", task, workers=64).notes
    )


def test_spans_are_shortened_until_every_worker_has_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "choose_span", choose_span)
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    for workers, span in ((1, 4), (2, 1), (3, 1)):
        run = lca_posthoc.run(
            tmp_path / "ck", task, workers=workers, out=tmp_path / f"{workers}.lca"
        )
        assert run.manifest.span == span


@pytest.mark.parametrize(
    ("segments", "workers", "elements", "keep", "span"),
    [
        (40, 1, 10, "parameters", 32),  # never longer
        (40, 2, 10, "parameters", 8),  # two spans for each of several workers
        (7, 1, 10, "parameters", 4),  # one worker has nobody to share with
        (1, 1, 10, "parameters", 1),
        (1, 8, 10, "parameters", 1),
        (32, 1, 2**22, "parameters", 16),  # 256 MiB of allocations
        (32, 1, 2**28, "parameters", 8),  # or 8 segments of a large model
        (32, 1, 2**28, "statistics", 32),  # no allocation is kept
        (32, 1, 2**28, "units", 32),
        (32, 4, 2**28, "tensors", 4),
    ],
)
def test_the_length_of_a_span_follows_from_what_is_shared_and_kept(
    segments: int, workers: int, elements: int, keep: str, span: int
) -> None:
    assert choose_span(segments, workers, elements, keep) == span


def test_a_result_larger_than_the_disk_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    options: dict[str, Any] = {"workers": 1, "keep": "parameters"}
    needed = plan(tmp_path / "ck", task, **options).bytes["parameters"]
    for free, said in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(
            psutil, "disk_usage", lambda place, free=free: SimpleNamespace(free=free)
        )
        assert (
            any(
                "the result will need about" in note
                for note in plan(tmp_path / "ck", task, **options).notes
            )
            is said
        )


class Wide(nn.Module):
    """Large enough that its numbers, and not the files around them, are what a result takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 200), nn.Linear(200, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(inputs)))


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "one segment": {"steps": 1},
    "long": {"steps": 40},
    "dead parameters": {"dead": ("first.weight",)},
    "nothing moves": {"dead": ("first.weight", "first.bias", "last.weight", "last.bias")},
    "half precision": {"dtype": torch.bfloat16},
    "grouped": {"group_by": lambda inputs, targets: targets},
    "units": {"options": {"keep": "units"}},
    "tensors": {"options": {"keep": "tensors"}},
    "some tensors": {"options": {"tensors": ["last.*"]}},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_space_is_what_a_run_takes_after_compression_within_a_factor_of_two(
    tmp_path: Path, kind: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Wide(), task_namespace()["train"]
    optimizer = torch.optim.Adam(
        [each for name, each in model.named_parameters() if name not in kind.get("dead", ())]
        or [torch.zeros(1)]
    )
    for step in range(kind.get("steps", 6) + 1):
        write_step(
            tmp_path / "ck",
            step,
            {
                name: each.to(kind.get("dtype", torch.float32))
                for name, each in model.state_dict().items()
            },
        )
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    task = Task(
        Wide,
        {"train": (inputs, targets)},
        {"train": Loss(F.cross_entropy, group_by=kind.get("group_by"))},
    )
    options = {"keep": "parameters", **kind.get("options", {})}
    planned = plan(tmp_path / "ck", task, workers=1, **options).bytes[options["keep"]]
    run = lca_posthoc.run(tmp_path / "ck", task, out=tmp_path / "run", cluster="inline", **options)
    taken = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    assert taken / 2 <= planned <= 2 * taken, planned / taken
    assert taken <= required_bytes(run.manifest, options["keep"], run.manifest.losses)


def test_timing_evaluates_a_split_no_more_than_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[int] = []
    over, measured = Objective.evaluate_on_batches, costs._measured

    def counted(objective: Objective, values: Any, batches: Any, *others: Any) -> Any:
        spent.append(sum(len(batch[1]) for batch in batches))
        return over(objective, values, batches, *others)

    def counting(*given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(Objective, "evaluate_on_batches", counted)
            return measured(*given)

    monkeypatch.setattr(costs, "_measured", counting)
    record(tmp_path / "ck")
    stages: list[str] = []
    plan(tmp_path / "ck", write_task(tmp_path / "task.py"), workers=1, tell=stages.append)
    # what the budget allows, and what parts of a batch tell besides
    assert 30 <= sum(spent) <= (1.5 + 0.5) * 30
    assert [stage.split()[0] for stage in stages] == ["reading", "building", "timing"]


@pytest.mark.parametrize(
    ("of_a_pass", "of_an_example", "counts"),
    [
        (0.25, 0.0, [1, 4, 16, 64, 100]),
        (0.25, 0.125, [1, 4, 16]),
        (0.0, 60.0, [1]),
    ],
)
def test_elements_are_timed_on_a_whole_batch_or_until_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, of_a_pass: float, of_an_example: float, counts: list[int]
) -> None:
    """Most of a small model's pass takes the same time for any number of examples."""
    examples, batch, clock, timed = 1000, 100, [0.0], list[int]()

    def tell_elements(name: str, motions: object, batches: list[range], elements: int) -> None:
        (told,) = batches
        assert elements == 7 * len(told)
        timed.append(len(told))
        clock[0] += of_a_pass + of_an_example * len(told)

    objective: Any = SimpleNamespace(
        losses={"tokens": SimpleNamespace(split="train")},
        splits={"train": SimpleNamespace(name="train", examples=examples, sample=range)},
        batch_sizes={"train": batch},
        point={},
        elements_of=lambda name: 7,
        tell_elements=tell_elements,
    )
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = costs._seconds_of_elements(objective, "tokens")
    assert timed == counts
    assert seconds == (of_a_pass / counts[-1] + of_an_example) * examples


def test_a_plan_evaluates_one_large_batch_about_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a split of 4,000 examples that is one batch: the probe's samples, and what is timed."""
    torch.manual_seed(0)
    seen: list[int] = []
    # a task is pickled: its model finds it here
    monkeypatch.setattr(torch, "seen_by_the_model", seen, raising=False)

    class Counting(Wide):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            torch.seen_by_the_model.append(len(inputs))  # type: ignore[attr-defined]
            return super().forward(inputs)

    for step in range(3):
        write_step(tmp_path / "ck", step, Wide().state_dict())
    data = torch.randn(4000, 64), torch.randint(0, 4, (4000,))
    plan(
        tmp_path / "ck",
        Task(Counting, {"train": data}, {"train": Loss(F.cross_entropy)}),
        workers=1,
        batch_size=4000,
    )
    assert 1 <= sum(seen) / 4000 <= 3.25


def test_a_recording_is_planned_as_it_turns_out(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py")
    before = contents(tmp_path)
    found = plan_recording(tmp_path / "yet" / "to come", task, 20)
    assert {name for name in contents(tmp_path) if "pycache" not in name} == set(before)
    model = task_namespace()["Net"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "ck", model).attach(optimizer):
        for _ in range(20):
            optimizer.step()
    files = list((tmp_path / "ck").glob("*.safetensors"))
    assert len(files) == found.iterates == 21
    # the step's own digits
    assert sum(file.stat().st_size for file in files) == pytest.approx(found.bytes, rel=0.001)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert found.tensors == len(model.state_dict())
    assert found.every == 1
    assert found.seconds_each > 0


@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 7, 100, 300, 301])
def test_every_is_the_least_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    task = write_task(tmp_path / "task.py")
    size = plan_recording(tmp_path / "ck", task, 300).bytes_each
    monkeypatch.setattr(psutil, "disk_usage", lambda place: SimpleNamespace(free=room * size))
    every = plan_recording(tmp_path / "ck", task, 300).every
    fitting = [each for each in range(1, 301) if len(range(0, 301, each)) <= room]
    assert every == (fitting[0] if fitting else 0)


def test_the_command_plans_a_recording(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py")
    said = lca("plan", tmp_path / "ck", "--task", task, "--recording", 20).stdout
    assert re.match(
        r"21 iterates of 556 parameters \(4 tensors, buffers included\), 2\.\d+ kB each: "
        r"5\d(\.\d)? kB; free: ",
        said,
    )
    assert "writing one took" in said
    found = document(lca("plan", tmp_path / "ck", "--task", task, "--recording", 20, "--json"))
    assert found["iterates"] == 21
    refused(
        lca("plan", tmp_path / "ck", "--task", task, "--recording", 0),
        "must be 1 or more optimiser steps, got 0",
    )
    refused(
        lca(
            "plan",
            tmp_path / "ck",
            "--task",
            task,
            "--recording",
            3,
            "--rule",
            "left",
            "--loss",
            "all",
        ),
        "--loss, --rule: --recording uses only --task and --json",
    )


class Space:
    """A disk with so much free space."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        monkeypatch.setattr(psutil, "disk_usage", lambda place: SimpleNamespace(free=self.free))


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Space:
    return Space(monkeypatch)


@pytest.mark.parametrize("losses", [["train"], ["all"]])
def test_space_is_refused_by_its_estimate_after_compression(
    tmp_path: Path, space: Space, losses: list[str]
) -> None:
    record(tmp_path / "ck")
    task, out = write_task(tmp_path / "task.py"), tmp_path / "out.lca"
    options: dict[str, Any] = {"cluster": "inline", "keep": "parameters"}
    with pytest.raises(
        ResourceError,
        match=r"about .* after compression .*at most.*--keep "
        r"statistics or --keep units or --keep tensors.*--ignore-space",
    ) as e:
        lca_posthoc.run(tmp_path / "ck", task, out=out, losses=losses, **options)
    assert not out.exists()
    about, most = (
        float(number) * {"kB": 1e3, "MB": 1e6}[unit]
        for number, unit in re.findall(r"([\d.]+) ([kM]B)", str(e.value))[:2]
    )
    assert about < most
    space.free = round(about * 1.01)
    notes: list[Any] = []
    run = lca_posthoc.run(
        tmp_path / "ck", task, out=out, losses=losses, progress=notes.append, **options
    )
    assert any("a run on a full disk stops" in getattr(event, "text", "") for event in notes)
    assert list(verify(run.path)) == []


def test_a_refusal_of_space_can_be_overruled(tmp_path: Path, space: Space) -> None:
    record(tmp_path / "ck")
    task, out = write_task(tmp_path / "task.py"), tmp_path / "out.lca"
    whole = ("--keep", "parameters")
    refused(run_lca(tmp_path / "ck", task, out, *whole), "0 B free", "--ignore-space", code=5)
    assert run_lca(tmp_path / "ck", task, out, *whole, "--ignore-space").exit_code == 0
    more = ("--loss", "validation")
    refused(run_lca(tmp_path / "ck", task, out, *more), "0 B free", "--ignore-space", code=5)
    lca_posthoc.run(
        tmp_path / "ck", task, cluster="inline", out=out, losses=["all"], ignore_space=True
    )
    assert list(verify(out)) == []
