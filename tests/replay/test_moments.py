"""Moments of an optimiser are those that a run recorded, or are refused by name: by a run that goes
on, by a repair and by every span that reads them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from safetensors.torch import load_file, save_file

import lca_posthoc
from lca_posthoc import results
from lca_posthoc.checkpoints.optimizer_steps import moments_path
from lca_posthoc.errors import SpanError
from lca_posthoc.replay.events import silent
from lca_posthoc.replay.worker import causes
from lca_posthoc.results import runfile
from lca_posthoc.results.files import read_json
from tests.helpers.cli import contents, lca, marker, refused, step_file, write_task
from tests.helpers.followed_training import train
from tests.helpers.wrong_input import before_span

STEPS, STEP = 7, 3  # of the training, and the one whose moments are changed


class Place:
    """A directory of iterates with moments, a task of two losses, and a run with causes, of whose
    spans each has one segment.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.iterates, self.out = root, root / "checkpoints", root / "run.lca"
        self.task, self.moments = root / "task.py", moments_path(self.iterates, STEP)

    def run(self, **options: Any) -> None:
        options = {"causes": True, "out": self.out, "span": 1, **options}
        lca_posthoc.run(self.iterates, self.task, cluster="inline", progress=silent, **options)

    def resumed(self, *options: object) -> Any:
        where = ("--task", self.task, "--out", self.out, "--cluster", "inline")
        return lca("run", self.iterates, *where, *options)

    def repaired(self) -> Any:
        where = ("--checkpoints", self.iterates, "--task", self.task, "--cluster", "inline")
        return lca("repair", self.out, *where)

    def record(self) -> list[Any]:
        """The entries of checkpoints in `run.json`."""
        document: dict[str, Any] = read_json(self.out / runfile.FILE)
        return document["checkpoints"]


@dataclass(frozen=True)
class Change:
    """A change of a file of moments.

    Attributes:
        make: changes it; given the file, and a copy as the training wrote it.
        words: what is said of it.
        was_there: whether it is there when the run begins.
    """

    make: Callable[[Path, Path], object]
    words: tuple[str, ...]
    was_there: bool = True


def other_bytes(path: Path, _: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def other_moments(path: Path, _: Path) -> None:
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)


CHANGES = {
    "replaced by as many bytes": Change(other_bytes, ("is another file", "Restore it")),
    "truncated": Change(
        lambda path, _: os.truncate(path, path.stat().st_size - 100),
        ("is another file", "Restore it"),
    ),
    "removed": Change(lambda path, _: path.unlink(), ("is gone", "Restore it")),
    "added": Change(
        lambda path, copy: shutil.copy(copy, path), ("is new", "Remove it"), was_there=False
    ),
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with moments at every step, another without those of one, each with its run; and a
    copy of these moments.
    """
    root = tmp_path_factory.mktemp("moments")
    train(root / "True", STEPS)
    shutil.copytree(root / "True", root / "False")
    Place(root / "False").moments.rename(root / "copy")
    for there in (True, False):
        place = Place(root / str(there))
        write_task(place.task)
        place.run()
    shutil.copy(Place(root / "True").moments, root / "copy")
    return root


def place_of(made: Path, tmp_path: Path, there: bool) -> Place:
    return Place(Path(shutil.copytree(made / str(there), tmp_path / "place")))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return place_of(made, tmp_path, True)


# --- what is recorded -----------------------------------------------------------------------------


def test_a_run_that_tells_causes_records_size_and_fingerprint_of_every_file_of_moments(
    place: Place,
) -> None:
    """Each is shorter than a sample, so that all of it is one."""
    files = [moments_path(place.iterates, step) for step in range(1, STEPS + 1)]
    data = [path.read_bytes() for path in files]
    assert [entry[4:] for entry in place.record()] == [
        [],  # no step led to the first iterate
        *([len(moments), google_crc32c.value(moments)] for moments in data),
    ]


def test_a_run_without_causes_records_none_and_minds_no_change(place: Place) -> None:
    place.out = place.root / "plain.lca"
    place.run(causes=False)
    assert {len(entry) for entry in place.record()} == {4}
    before = contents(place.out / "data.zarr")
    place.moments.unlink()
    marker(place.out, "train", STEP).unlink()
    assert place.resumed().exit_code == 0
    assert contents(place.out / "data.zarr") == before


@pytest.mark.parametrize(
    ("entry", "signal", "words"),
    [
        ([0, ["a"], 8, 1, 8], "train", "with moments their size and fingerprint"),
        ([0, ["a"], 8, 1, 8, -1], "train", "a whole number from 0 on"),
        ([0, ["a"], 8, 1, 8, 1], None, "without moments, as no causes are told"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    place: Place, entry: list[object], signal: str | None, words: str
) -> None:
    document: dict[str, Any] = read_json(place.out / runfile.FILE)
    document["checkpoints"][0] = entry
    document["settings"]["signal"] = signal
    with pytest.raises(ValueError, match=words):
        runfile.parse(document)


# --- what is refused ------------------------------------------------------------------------------


def refuses(place: Place, result: Any, change: Change, code: int = 2) -> None:
    """The file is named, and its step, and the way out."""
    named = (str(place.moments), f"(step {STEP})", "--out", *change.words)
    refused(result, *named, code=code)


@every_change
@pytest.mark.parametrize("options", [(), ("--loss", "validation")], ids=["again", "a loss"])
def test_a_run_that_goes_on_refuses_other_moments(
    made: Path, tmp_path: Path, change: Change, options: tuple[str, ...]
) -> None:
    place = place_of(made, tmp_path, change.was_there)
    change.make(place.moments, made / "copy")
    before = contents(place.out)
    refuses(place, place.resumed(*options), change)
    assert contents(place.out) == before


@every_change
def test_a_repair_refuses_other_moments(made: Path, tmp_path: Path, change: Change) -> None:
    """Of the damage, which is elsewhere, nothing is taken away."""
    place = place_of(made, tmp_path, change.was_there)
    change.make(place.moments, made / "copy")
    chunks = (place.out / "data.zarr/train/allocation/out.weight/c/0").rglob("*")
    next(path for path in chunks if path.is_file()).write_bytes(b"")
    refuses(place, place.repaired(), change)
    assert [damage.span for damage in results.verify(place.out)] == [0]


@every_change
def test_a_span_that_reads_other_moments_fails_and_with_the_old_ones_completes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    place = place_of(made, tmp_path, change.was_there)
    before = place.moments.read_bytes() if change.was_there else None
    shutil.rmtree(place.out)
    with monkeypatch.context() as patch:
        before_span(patch, 0, lambda: change.make(place.moments, made / "copy"))
        with pytest.raises(SpanError) as failure:
            place.run()
    for words in ("2 spans failed", str(place.moments), f"(step {STEP})", *change.words):
        assert words in str(failure.value)
    assert results.RunWriter.open(place.out).pending("train") == [STEP - 1, STEP]
    if before is None:
        place.moments.unlink()
    else:
        place.moments.write_bytes(before)
    assert place.resumed().exit_code == 0
    clean = made / str(change.was_there) / "run.lca" / "data.zarr"
    assert contents(place.out / "data.zarr") == contents(clean)


def test_moments_that_change_while_they_are_read_fail_their_span(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at their header and the first tensor; so does the span after it."""
    shutil.rmtree(place.out)
    original = causes.read_header

    def read_and_change(path: Path) -> Any:
        header = original(path)
        if path == place.moments:
            other_bytes(path, path)
        return header

    monkeypatch.setattr(causes, "read_header", read_and_change)
    with pytest.raises(SpanError, match=f"2 spans failed.*{place.moments} .* is another file"):
        place.run()


# --- what is taken up -----------------------------------------------------------------------------


def test_moments_that_no_number_relies_on_may_be_other_ones(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spans at both their sides failed. The segment after those looks back at the iterate, and
    not at its moments.
    """
    shutil.rmtree(place.out)
    with monkeypatch.context() as patch:
        before_span(patch, 0, lambda: other_moments(place.moments, place.moments))
        with pytest.raises(SpanError, match="2 spans failed"):
            place.run()
    assert place.resumed().exit_code == 0
    fresh = place.root / "fresh.lca"
    place.run(out=fresh)
    assert contents(place.out / "data.zarr") == contents(fresh / "data.zarr")
    assert place.record() == read_json(fresh / runfile.FILE)["checkpoints"]


def test_moments_of_new_iterates_are_recorded_when_these_are_taken_up(place: Place) -> None:
    whole, aside = place.root / "whole.lca", place.root / "aside"
    place.run(out=whole, keep="units")
    shutil.rmtree(place.out)
    aside.mkdir()
    last = (step_file(place.iterates, STEPS), moments_path(place.iterates, STEPS))
    for number, path in enumerate(last):
        path.rename(aside / str(number))
    place.run(keep="units")
    assert len(place.record()) == STEPS
    for number, path in enumerate(last):
        (aside / str(number)).rename(path)
    assert place.resumed().exit_code == 0
    assert place.record() == read_json(whole / runfile.FILE)["checkpoints"]
    assert contents(place.out / "data.zarr") == contents(whole / "data.zarr")


# --- what a replay removed ------------------------------------------------------------------------


def test_moments_that_went_with_their_iterates_stay_recorded(place: Place) -> None:
    before = place.record()
    assert place.resumed("--consume").exit_code == 0
    assert not place.moments.exists()
    assert place.record() == before
    assert place.resumed("--consume").exit_code == 0
    assert place.repaired().exit_code == 0


def test_a_removal_that_a_kill_cut_short_is_finished_and_no_number_takes_half_of_it(
    place: Place, made: Path
) -> None:
    """Moments go before their iterate, which alone is there then."""
    assert place.resumed("--consume").exit_code == 0
    for step in range(STEPS):
        iterate = step_file(place.iterates, step)
        shutil.copy(step_file(made / "True" / "checkpoints", step), iterate)
    refused(place.resumed("--loss", "validation"), "is gone", "Restore it", code=3)
    assert results.RunWriter.open(place.out).pending("validation") == [*range(STEPS - 1)]
    assert place.resumed("--consume").exit_code == 0
    assert not step_file(place.iterates, 0).exists()
