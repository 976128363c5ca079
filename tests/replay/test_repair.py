"""`lca repair`: exactly what is damaged is computed again, wherever the run and the checkpoints are
now.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from lca_posthoc import open_run
from lca_posthoc.replay.events import SpanDone
from lca_posthoc.replay.repair import repair
from tests.helpers.cli import contents, lca, marker, record, refused, write_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, a task file and a run of six spans."""
    root = tmp_path_factory.mktemp("repair")
    record(root / "ck")
    task = write_task(root / "task.py")
    lca_posthoc.run(
        root / "ck", task, losses=["all"], cluster="inline", span=1, out=root / "run.lca"
    )
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "place"))


def chunk(run: Path, span: int, array: str = "allocation/hidden.weight") -> Path:
    return next(
        each
        for each in sorted((run / "data.zarr/train" / array / "c" / str(span)).rglob("*"))
        if each.is_file()
    )


def repaired(place: Path, **options: Any) -> list[tuple[int, list[str]]]:
    """The spans a repair in this process computed, with their losses."""
    events: list[Any] = []
    repair(
        place / "run.lca", place / "task.py", cluster="inline", progress=events.append, **options
    )
    return [(event.span, event.losses) for event in events if isinstance(event, SpanDone)]


def is_as_made(place: Path, made: Path) -> bool:
    before, after = (contents(each / "run.lca" / "data.zarr") for each in (made, place))
    return before == after


def test_every_kind_of_damage_at_once_is_put_right(place: Path, made: Path) -> None:
    run = place / "run.lca"
    chunk(run, 1).write_bytes(b"")
    marker(run, "validation", 4).write_text("{}")
    (run / "data.zarr/train/steps/residual/zarr.json").unlink()
    (run / "data.zarr/train/steps/step/zarr.json").write_text("{}")
    (run / "data.zarr/train/units/out.bias/c/0/0.abc.partial").write_bytes(b"torn")
    (run / "data.zarr/stray").write_text("?")
    assert lca("verify", run).exit_code == 4
    done = lca("repair", run, "--task", place / "task.py", "--cluster", "inline")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "loss 'train': recomputed span 1",
        "loss 'validation': recomputed span 4",
        "restored 2 other files",
        "removed 2 leftover files",
    ]
    assert lca("verify", run).exit_code == 0
    assert is_as_made(place, made)


def test_a_whole_run_is_left_alone(place: Path) -> None:
    before = contents(place)
    done = lca("repair", place / "run.lca", "--task", place / "task.py", "--cluster", "inline")
    assert (done.exit_code, done.stdout) == (0, f"{place / 'run.lca'} is whole\n")
    assert contents(place) == before


def test_checkpoints_that_moved_are_named(place: Path, made: Path) -> None:
    chunk(place / "run.lca", 2).unlink()
    (place / "ck").rename(place / "moved")
    assert repaired(place, checkpoints=place / "moved") == [(2, ["train"])]
    assert is_as_made(place, made)


def test_checkpoints_that_are_gone_are_said_and_the_rest_of_the_run_stays(
    place: Path, made: Path
) -> None:
    run = place / "run.lca"
    chunk(run, 2).unlink()
    record_ = made / "ck"
    record_.rename(made / "aside")  # where they were when the run was made
    try:
        result = lca("repair", run, "--task", place / "task.py", "--cluster", "inline")
    finally:
        (made / "aside").rename(record_)
    refused(result, str(record_), "is not a directory of checkpoints")
    assert_still_named(run, 2)
    assert repaired(place, checkpoints=place / "ck") == [(2, ["train"])]
    assert is_as_made(place, made)


def assert_still_named(run: Path, span: int) -> None:
    """A repair that could not be begun has taken nothing away: the damage is there to be named and
    repaired.
    """
    result = lca("verify", run, "--json")
    assert [each["span"] for each in json.loads(result.stdout)["damages"]] == [span]
    assert result.exit_code == 4


def repaired_by_run(place: Path) -> list[tuple[int, list[str]]]:
    events: list[Any] = []
    where = {
        "losses": ["all"],
        "cluster": "inline",
        "out": place / "run.lca",
        "progress": events.append,
    }
    lca_posthoc.run(place / "ck", place / "task.py", **where)
    return [(event.span, event.losses) for event in events if isinstance(event, SpanDone)]


def test_another_task_is_refused(place: Path) -> None:
    chunk(place / "run.lca", 3).unlink()
    write_task(place / "task.py", "inputs[:30], targets[:30]", "inputs[5:35], targets[5:35]")
    result = lca("repair", place / "run.lca", "--task", place / "task.py", "--cluster", "inline")
    refused(result, "loss 'train' is not the one recorded")
    assert_still_named(place / "run.lca", 3)
    unreached = lca(
        "repair", place / "run.lca", "--task", place / "task.py", "--cluster", "tls://127.0.0.1:9"
    )
    refused(unreached, "needs --tls-ca")
    assert_still_named(place / "run.lca", 3)


def test_what_was_never_computed_is_left_to_run(place: Path) -> None:
    run = place / "run.lca"
    marker(run, "train", 5).unlink()
    chunk(run, 0).unlink()
    done = lca("repair", run, "--task", place / "task.py", "--cluster", "inline")
    assert done.exit_code == 0
    assert "loss 'train': recomputed span 0\n" in done.stdout
    assert done.stdout.endswith("not finished yet: train; `lca run` resumes them\n")
    assert open_run(run)["train"].progress()["spans_done"] == 5


def test_a_damaged_record_is_not_guessed(place: Path) -> None:
    record_file = place / "run.lca" / "run.json"
    record_file.write_bytes(record_file.read_bytes().replace(b'"span": 1', b'"span": 2'))
    refused(
        lca("repair", place / "run.lca", "--task", place / "task.py"),
        "run.json",
        "Restore it from a copy",
        code=1,
    )


def test_a_run_that_was_copied_goes_on_where_it_is(place: Path, made: Path) -> None:
    (place / "run.lca").rename(place / "moved.lca")
    shutil.copytree(place / "moved.lca", place / "run.lca")
    shutil.rmtree(place / "moved.lca")
    marker(place / "run.lca", "train", 2).unlink()
    assert repaired_by_run(place) == [(2, ["train"])]
    assert is_as_made(place, made)


def test_without_durability_nothing_is_flushed_and_the_bytes_are_the_same(
    place: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(place / "run.lca")
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    options: dict[str, Any] = {
        "losses": ["all"],
        "cluster": "inline",
        "span": 1,
        "out": place / "run.lca",
    }
    lca_posthoc.run(place / "ck", place / "task.py", durability="none", **options)
    assert flushed == []
    assert is_as_made(place, made)
    assert lca("verify", place / "run.lca").exit_code == 0
    shutil.rmtree(place / "run.lca")
    lca_posthoc.run(place / "ck", place / "task.py", **options)
    assert len(flushed) > 100
