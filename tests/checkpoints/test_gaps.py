"""Segments longer than a step and neighbours that hold the same are said when a trajectory is
opened, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lca_posthoc import Recorder
from lca_posthoc.checkpoints import spacing
from lca_posthoc.checkpoints.trajectory import open_trajectory
from tests.helpers.cli import iterates, lca, says, write_step, write_task

LONG = (
    ". There the straight line between checkpoints is not the path that training took, and the "
    "allocation is that of the straight line. Sums over tensors and units are meaningful within "
    "their path band (± path in `lca summary`, from --path-band: how much other paths through the "
    "checkpoints would change them); how often a parameter helps and turns (--keep statistics, "
    "parameters) is not. The residual shows what quadrature misses"
)


def write(directory: Path, step: int, number: float, **metadata: str) -> Path:
    """A checkpoint of one tensor of 100,000 numbers, more than the samples of a file hold."""
    directory.mkdir(exist_ok=True)
    path = directory / f"step_{step}.safetensors"
    save_file({"w": torch.full((100_000,), number)}, path, metadata=metadata)
    return path


# steps, `every` in their files, --steps: what is said of how many segments, steps in them, the
# longest
GAPS: dict[str, tuple[tuple[int, ...], int, str | None, str | None]] = {
    "every step": ((0, 1, 2, 3), 1, None, None),
    "as asked of the recorder": ((0, 10, 20, 30), 10, None, None),
    "another gap than asked": (
        (0, 10, 20, 40),
        10,
        None,
        "1 of 3 segments is longer than one step, with 20 steps or 50% of training in them, the "
        "longest 20→40",
    ),
    "nobody asked": (
        (0, 10, 20, 30),
        1,
        None,
        "all 3 segments are longer than one step, with 30 steps or 100% of training in them, the "
        "longest 0→10",
    ),
    "one segment": (
        (0, 10),
        1,
        None,
        "the segment is longer than one step, with 10 steps or 100% of training in them, the "
        "longest 0→10",
    ),
    "a public series": (
        (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 7000, 1000)),
        1,
        None,
        "14 of 16 segments are longer than one step, with 5,998 steps or 99.9% of training in "
        "them, the longest 1000→2000",
    ),
    "a public series, one recorded every 1000 steps at its end": (
        (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 7000, 1000)),
        1000,
        None,
        "14 of 16 segments are longer than one step, with 5,998 steps or 99.9% of training in "
        "them, the longest 1000→2000",
    ),
    "single steps, then as asked of the recorder": ((*range(10), 10, 20, 30), 10, None, None),
    "its beginning": ((0, 1, 2, 4, 8), 1, ":2", None),
    "thinned by --steps": (tuple(range(13)), 1, "::4", None),
    "thinned by --steps across a gap": (
        (0, 1, 2, 3, 4, 9, 10),
        1,
        "::2",
        "1 of 3 segments is longer than one step, with 6 steps or 60% of training in them, the "
        "longest 4→10",
    ),
    "chosen one by one": (tuple(range(13)), 1, "0,1,2,4,12", None),
    "ranges, and a gap in one of them": (
        (0, 1, 2, 50, 51, 53),
        1,
        "0:2,50:53",
        "1 of 4 segments is longer than one step, with 2 steps or 40% of training in them, the "
        "longest 51→53",
    ),
    "a gap and single steps": (
        (0, 1, 2, 4, 5),
        1,
        None,
        "1 of 4 segments is longer than one step, with 2 steps or 40% of training in them, the "
        "longest 2→4",
    ),
}


@pytest.mark.parametrize("case", GAPS)
def test_segments_longer_than_a_step_that_nobody_asked_for_are_said(
    tmp_path: Path, case: str
) -> None:
    present, every, steps, said = GAPS[case]
    for step in present:
        write(tmp_path, step, step, **({} if every == 1 else {"every": str(every)}))
    assert list(open_trajectory(tmp_path, steps=steps).notes) == (
        [] if said is None else [said + LONG]
    )


@pytest.mark.parametrize("every", [1, 3])
def test_a_recorder_says_in_its_files_what_it_was_asked_for(tmp_path: Path, every: int) -> None:
    model = nn.Linear(3, 2)
    with Recorder(tmp_path / "ck", model, every=every) as recorder:
        for step in range(8):
            recorder.save(step)
            nn.init.uniform_(model.weight)
    assert open_trajectory(tmp_path / "ck").notes == ()


def tail_alone(directory: Path) -> None:
    """The last 64 KiB are those of the step before, and nothing else is."""
    for step in (0, 1):
        tensors = {"a": torch.full((100_000,), float(step)), "b": torch.zeros(100_000)}
        save_file(tensors, directory / f"step_{step}.safetensors")


def between_samples(directory: Path) -> None:
    """Every sample is that of the step before, and one number between them is not."""
    for step in (0, 1):
        tensor = torch.zeros(200_000)
        tensor[50_000] = step
        save_file({"w": tensor}, directory / f"step_{step}.safetensors")


def other_metadata(directory: Path) -> None:
    """Names of steps of another length move every byte of the tensors in the file."""
    for step, number in ((0, 1.0), (1, 1.0), (2, 2.0)):
        write(directory, step, number, note="x" * 40 * step)


def shards(directory: Path) -> None:
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    for step in (0, 1, 2):
        place = directory / f"step_{step}"
        place.mkdir()
        (place / "model.safetensors.index.json").write_text(index)
        save_file({"a": torch.zeros(3)}, place / "one.safetensors")
        save_file({"b": torch.full((3,), float(max(1, step)))}, place / "two.safetensors")


def numbers(*values: float) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        for step, value in enumerate(values):
            write(directory, step, value)

    return make


STILL: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "nothing": (numbers(0, 1, 2), None),
    "a warm-up at rate 0": (numbers(0, 0, 1), "steps 0 to 1: in this segment nothing moves"),
    "the end": (numbers(0, 1, 1), "steps 1 to 2: in this segment nothing moves"),
    "a long stretch": (
        numbers(0, *[1] * 13, 2),
        "steps 1 to 13: in these 12 segments nothing moves",
    ),
    "two stretches": (
        numbers(0, 0, 0, 1, 2, 2),
        "steps 0 to 2, steps 4 to 5: in these 3 segments nothing moves",
    ),
    "many stretches": (
        numbers(0, 0, 1, 1, 2, 2, 3, 3, 4, 4),
        "steps 0 to 1, steps 2 to 3, steps 4 to 5 and 2 more: in these 5 segments nothing moves",
    ),
    "other metadata": (other_metadata, "steps 0 to 1: in this segment nothing moves"),
    "shards": (shards, "steps 0 to 1: in this segment nothing moves"),
    "the end of the file alone": (tail_alone, None),
    "all but a number between the samples": (between_samples, None),
}


@pytest.mark.parametrize("case", STILL)
def test_neighbours_that_hold_the_same_tensors_are_named(tmp_path: Path, case: str) -> None:
    make, said = STILL[case]
    make(tmp_path)
    notes = open_trajectory(tmp_path).notes
    assert [
        said is not None and said in note and "hold the same tensors, steps" in note
        for note in notes
    ] == [True] * (said is not None)


# numbers of the steps 0, 1, 2, …: how many hold the same, and which
APART: dict[str, tuple[tuple[float, ...], str]] = {
    "one that comes back": ((0, 1, 0), "2 of 3 checkpoints hold the same tensors, with others"),
    "late weights": (
        (0, 9, 2, 3, 9, 9, 6, 9),
        "4 of 8 checkpoints hold the same tensors, with others between them, judging by samples "
        "of their bytes: steps 1, 4, 5, 7. Some files have wrong names",
    ),
    "two sets": (
        (0, 5, 0, 0, 5, 6),
        "steps 0, 2, 3, and likewise 1 other set of steps. Some files",
    ),
}


@pytest.mark.parametrize("case", APART)
def test_tensors_that_come_back_later_are_named(tmp_path: Path, case: str) -> None:
    values, words = APART[case]
    numbers(*values)(tmp_path)
    notes = open_trajectory(tmp_path).notes
    says(notes[0], words, "`lca inspect` says which")
    assert [note for note in notes[1:] if "neighbouring" not in note] == []
    assert open_trajectory(tmp_path, compare=False).notes == ()


def test_still_segments_of_several_steps_may_be_of_a_wrong_file(tmp_path: Path) -> None:
    for step, value in ((0, 0.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (14, 3.0)):
        write(tmp_path, step, value, every="10")
    (note,) = open_trajectory(tmp_path).notes
    says(note, "steps 1 to 2, steps 4 to 14: in these 2 segments", "or another step's file")
    (note,) = open_trajectory(tmp_path, steps=":4").notes
    assert "another step's file" not in note


def test_what_is_not_compared_whole_is_said_to_be_told_from_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spacing, "_MOST_COMPARED", 500_000)
    numbers(0, 0, 0)(tmp_path)
    (note,) = open_trajectory(tmp_path).notes
    says(note, "judging by samples of their bytes, steps 0 to 2: in these 2 segments")


def test_plan_run_and_import_say_both(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py")
    (tmp_path / "saved").mkdir()
    for step, point in ((0, 0), (1, 0), (5, 1)):
        write_step(tmp_path / "ck", step, iterates()[point])
        torch.save(dict(iterates()[point]), tmp_path / "saved" / f"step_{step}.pt")
    run = ("--task", task, "--out", tmp_path / "run")
    for done in (
        lca("plan", tmp_path / "ck", *run),
        lca("run", tmp_path / "ck", *run, "--cluster", "inline"),
        lca("import", tmp_path / "saved", tmp_path / "st"),
    ):
        assert done.exit_code == 0, done.output
        words = "".join((done.stdout + done.stderr).split())
        for part in (
            "with4stepsor80%oftraininginthem,thelongest1→5",
            "holdthesametensors,steps0to1",
        ):
            assert part in words, words
