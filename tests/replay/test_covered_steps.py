"""Checkpoints that are added for some losses: the others stay as they were, byte by byte, until
they are asked for.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lca_posthoc
from lca_posthoc import findings, open_run, results
from lca_posthoc.errors import LCAError, SpanError
from lca_posthoc.replay import prepare
from lca_posthoc.replay.events import Note, Planned
from lca_posthoc.replay.repair import repair
from lca_posthoc.report import write_report
from lca_posthoc.results import RunWriter
from tests.helpers.cli import contents, document, lca, marker, says, write_task
from tests.replay.test_replay import arrays, identical, record_training

LOSSES = ("train", "validation", "grouped")
OLD = 'losses={"train"'
NEW = 'losses={"grouped": Loss(F.cross_entropy, on="validation", group_by=lambda inputs, targets: targets % 2), "train"'


@dataclass
class Place:
    """A trajectory that grows, and a task of three losses, one of them with groups."""

    root: Path
    whole: Path

    @property
    def out(self) -> Path:
        """The run."""
        return self.root / "run.lca"

    def grow(self, last: int) -> None:
        """Let the checkpoints go on to a step."""
        (self.root / "ck").mkdir(exist_ok=True)
        for step in range(last + 1):
            name = f"step_{step:08d}.safetensors"
            if not (self.root / "ck" / name).exists():
                shutil.copy(self.whole / name, self.root / "ck")

    def replay(self, *losses: str, out: Path | None = None, **options: Any) -> list[Any]:
        """Run some losses; returns the events."""
        events: list[Any] = []
        task = self.root / "task.py"
        if not task.exists():
            write_task(task, OLD, NEW)
        given = {
            "cluster": "inline",
            "tolerance": float("inf"),
            "durability": "none",
            "progress": events.append,
            **options,
        }
        lca_posthoc.run(self.root / "ck", task, losses=losses, out=out or self.out, **given)
        return events

    def files(self, *losses: str) -> dict[str, bytes | None]:
        """Every committed file of some losses."""
        return {
            name: data
            for name, data in contents(self.out).items()
            if set(name.split("/")[1:2]) & set(losses)
        }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_training(tmp_path_factory.mktemp("whole"), range(72))


@pytest.fixture
def place(tmp_path: Path, whole: Path) -> Place:
    return Place(tmp_path, whole)


def damage_of(out: Path) -> list[Any]:
    return list(results.verify(out))


GROWTH = {
    "one more, in a short span": (8, 19, [(20, ("train",))]),
    "the other order": (8, 19, [(20, ("validation",))]),
    "the one with groups": (8, 19, [(20, ("grouped",))]),
    "two of three": (8, 19, [(20, ("train", "validation"))]),
    "one more, after a whole span": (4, 16, [(17, ("train",))]),
    "over borders of spans": (8, 19, [(37, ("train",))]),
    "over a border of windows": (1, 10, [(13, ("validation",))]),
    "twice": (8, 19, [(20, ("train",)), (26, ("train",))]),
    "twice, another one": (8, 19, [(20, ("train",)), (26, ("grouped",))]),
}


@pytest.mark.parametrize("name", GROWTH)
def test_a_loss_that_is_not_asked_for_keeps_every_byte_and_catches_up_to_the_same_bits(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    span, first, additions = GROWTH[name]
    monkeypatch.setattr(prepare._Match, "room_for_windows", 4)  # so that windows have several spans
    place.grow(first)
    place.replay("all", span=span)
    ends = dict.fromkeys(LOSSES, first)
    for last, asked in additions:
        others = [loss for loss in LOSSES if loss not in asked]
        before, read = (
            place.files(*others),
            {loss: open_run(place.out)[loss].steps for loss in others},
        )
        assert sum(data is not None for data in before.values()) > 100
        place.grow(last)
        notes = [event.text for event in place.replay(*asked) if isinstance(event, Note)]
        assert place.files(*others) == before
        ends |= dict.fromkeys(asked, last)
        for loss in LOSSES:
            done = open_run(place.out)[loss].progress()
            assert done["complete"]
            assert (done["segments_done"], done["segments"], done["behind"]) == (
                ends[loss],
                ends[loss],
                last - ends[loss],
            )
            assert len(open_run(place.out)[loss].markers) == -(-ends[loss] // span)
            assert open_run(place.out)[loss].totals.sizes["total"]
        assert all(open_run(place.out)[loss].steps.identical(read[loss]) for loss in others)
        assert sorted(
            loss
            for loss in LOSSES
            if any(f"loss {loss!r} stays as it is" in note for note in notes)
        ) == sorted(others)
        assert damage_of(place.out) == []
    place.replay("all")
    once = place.root / "once.lca"
    place.replay("all", out=once, span=span)
    identical(arrays(once), arrays(place.out))
    assert damage_of(place.out) == []
    assert "covers" not in (place.out / "run.json").read_text()


@pytest.fixture
def behind(place: Place) -> Place:
    """Training and validation up to step 20, the loss with groups up to step 19."""
    place.grow(19)
    place.replay("all", span=8)
    place.grow(20)
    place.replay("train", "validation")
    return place


def test_nothing_is_left_to_do_for_what_covers_all_and_something_for_what_does_not(
    behind: Place,
) -> None:
    assert [event.pending for event in behind.replay("train") if isinstance(event, Planned)] == [0]
    # its last span, again
    assert [event.pending for event in behind.replay("all") if isinstance(event, Planned)] == [4]
    assert open_run(behind.out)["grouped"].behind == 0


def test_another_loss_under_the_name_of_one_that_stayed_is_refused(behind: Place) -> None:
    task = behind.root / "task.py"
    task.write_text(task.read_text().replace("targets % 2", "targets % 3"))
    with pytest.raises(LCAError, match="not the one recorded"):
        behind.replay("grouped")
    assert open_run(behind.out)["grouped"].complete


@pytest.mark.parametrize("losses", [("grouped",), ("train",), ("grouped", "train")])
def test_a_repair_computes_what_is_damaged_and_adds_nothing(
    behind: Place, losses: tuple[str, ...]
) -> None:
    before = contents(behind.out / "data.zarr")
    behind.grow(24)  # nor does it take up what came since
    for loss in losses:
        for file in (
            behind.out / "data.zarr" / loss / "allocation" / "out.weight" / "c" / "2"
        ).rglob("0"):
            if file.is_file():
                file.write_bytes(b"damaged")
    done = repair(behind.out, behind.root / "task.py", cluster="inline")
    assert done.spans == {loss: [2] for loss in losses}
    assert contents(behind.out / "data.zarr") == before
    assert damage_of(behind.out) == []
    run = open_run(behind.out)
    assert [run[loss].progress()["segments_done"] for loss in ("train", "grouped")] == [20, 19]
    assert all(run[loss].complete for loss in LOSSES)


def test_a_loss_is_removed_and_the_others_stay(behind: Place) -> None:
    kept = behind.files("train", "validation")
    results.remove_loss(behind.out, "grouped")
    assert behind.files("train", "validation") == kept
    assert behind.files("grouped") == {}
    behind.replay("grouped")
    assert open_run(behind.out)["grouped"].progress()["segments_done"] == 20
    results.remove_loss(behind.out, "train")
    results.remove_loss(behind.out, "validation")
    assert open_run(behind.out)["grouped"].complete


def test_a_worker_that_comes_late_commits_a_loss_that_stayed_and_not_one_that_grew(
    place: Place,
) -> None:
    place.grow(19)
    place.replay("all", span=8)
    late, before = RunWriter.open(place.out), place.files("validation")
    marker(place.out, "validation", 2).unlink()
    place.grow(20)
    place.replay("train")
    for loss, allowed in (("validation", True), ("train", False)):
        if allowed:
            late._still_recorded(loss, 2)
        else:
            with pytest.raises(SpanError, match="has changed since"):
                late._still_recorded(loss, 2)
    place.replay("validation")
    assert open_run(place.out)["validation"].progress()["segments_done"] == 20
    assert before.keys() != place.files("validation").keys()


def test_what_is_said_of_both_says_which_steps(behind: Place) -> None:
    status = lca("status", behind.out).stdout
    says(status, "0–20", "0–19", "20 / 20", "19 / 19", "1 more segment with --loss grouped")
    shown = document(lca("status", behind.out, "--json"))["losses"]
    assert {name: each["behind"] for name, each in shown.items()} == {
        "train": 0,
        "validation": 0,
        "grouped": 1,
    }
    printed = lca("summary", behind.out)
    says(printed.stderr, "'grouped' ends at step 19, 1 segment before the run does")
    found = document(lca("summary", behind.out, "--json"))["losses"]
    assert [(each["first_step"], each["last_step"]) for each in found.values()] == [
        (0, 19),
        (0, 20),
        (0, 20),
    ]
    assert "ends at step 19" in findings.layers(open_run(behind.out)["grouped"]).attrs["left_out"]
    page = write_report([open_run(behind.out)], behind.root / "report.html").read_text()
    says(page, "19 of 19", "20 of 20", "ends at step 19")


def test_two_losses_side_by_side_are_over_the_steps_both_cover(place: Place) -> None:
    place.grow(19)
    place.replay("train", "validation", span=8)
    both = findings.generalisation(*(open_run(place.out)[loss] for loss in ("train", "validation")))
    assert "quadrant" in both.dims
    place.grow(23)
    place.replay("validation")
    # the rows of the two differ, so that they are said
    assert "0–23" in lca("summary", place.out).stdout
    found = findings.generalisation(
        *(open_run(place.out)[loss] for loss in ("train", "validation"))
    )
    for name in ("train", "validation", "cumulative_train", "cumulative_validation"):
        np.testing.assert_array_equal(found[name].values, both[name].values)
    assert "quadrant" not in found.dims
    says(found.attrs["left_out"], "up to step 19", "every segment of both")


@pytest.mark.parametrize("value", [0, 20, "7", True])
def test_a_record_that_lies_about_what_a_loss_covers_is_refused(
    behind: Place, value: object
) -> None:
    manifest = results.read_manifest(behind.out)
    record = manifest.losses["grouped"]
    object.__setattr__(record, "covers", value)
    results.writer.write_manifest(manifest, behind.out)
    with pytest.raises(LCAError, match=r"losses\.covers"):
        open_run(behind.out)
    assert json.loads((behind.out / "run.json").read_text())["losses"]["grouped"]["covers"] == value
