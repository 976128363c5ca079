"""`lca inspect`: what it prints, as text and as JSON, what it refuses, and that nothing it sees is a
failure.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lca_posthoc.checkpoints.inspection import inspect
from tests.helpers.cli import lca, record, refused, says, write_step
from tests.helpers.faked_series import Training, save, series


def test_a_healthy_series_is_one_training(tmp_path: Path) -> None:
    place = save(tmp_path / "ck", series(Training(shape="warm-up", steps=30)))
    result = lca("inspect", place)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    says(lines[0], "31 checkpoints, steps 0 to 30; 1,179 weights (F32)", "in all")
    says(
        lines[2],
        "note: neighbouring checkpoints hold the same weights, steps 0 to 1: a learning rate of 0",
    )
    says(result.stdout, "‖Δθ‖, smallest", "same bits")
    assert lines[-1] == "one training, as far as distances tell"


def test_defects_come_first_and_are_no_failure(tmp_path: Path) -> None:
    checkpoints = series(Training(steps=30))
    checkpoints |= {20: checkpoints[10], 21: {**checkpoints[21]}}
    checkpoints[21] = {**checkpoints[21], "0.bias": torch.full((24,), float("nan"))}
    del checkpoints[5]
    place = save(tmp_path / "ck", checkpoints)
    result = lca("inspect", place)
    assert result.exit_code == 0
    grades = [line.split(":")[0] for line in result.stdout.splitlines()[2:5]]
    assert grades == ["defect", "defect", "doubt"]
    says(result.stdout, "24 in '0.bias'", "steps 10, 20", "missing: step 5")
    assert "nan" not in result.stdout
    assert result.stdout.splitlines()[-1] == ("not one training as it stands: 2 defects, 1 doubt")
    says(result.stderr, "note: 1 of 29 segments is longer than one step")


def test_json_has_every_number_and_the_worst_grade(tmp_path: Path) -> None:
    checkpoints = series(Training(steps=30))
    checkpoints |= {9: {name: tensor * float("nan") for name, tensor in checkpoints[9].items()}}
    place = save(tmp_path / "ck", checkpoints)
    result = lca("inspect", place, "--steps", ":20", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    inspection = inspect(place, steps=":20", say=lambda note: None)
    assert (document["schema"], document["worst"]) == (1, "defect")
    assert document["steps"] == [*range(21)] == list(inspection.steps)
    assert [position for position, value in enumerate(document["distances"]) if value is None] == [
        8,
        9,
    ]
    assert document["distances"][:8] == list(inspection.distances[:8])
    (seen,) = document["observations"]
    assert (seen["kind"], seen["grade"], seen["steps"]) == ("not finite", "defect", [9])


BURSTS = [step for step in range(70) if step % 20 < 6]


@pytest.mark.parametrize("stated", [True, False])
def test_gaps_between_bursts_are_no_segments_or_it_is_said_how_to_leave_them_out(
    tmp_path: Path, stated: bool
) -> None:
    checkpoints = series(Training(steps=69))
    place = save(tmp_path / "ck", {step: checkpoints[step] for step in BURSTS})
    steps = "0:5,20:25,40:45,60:65"
    if stated:
        metadata = {"bursts": "20:6"}
        for path in place.iterdir():
            save_file(load_file(path), path, metadata)
    asked = lca("inspect", place, "--steps", steps)
    says(asked.stdout, "3 gaps between checkpoints, the longest 5→20, are skipped below")
    assert counted(asked.stdout) == 20
    plain = lca("inspect", place)
    if stated:
        assert plain.stdout == asked.stdout
    else:
        says(plain.stdout, "are 4 bursts", "by 3 long segments", f"--steps {steps} skips")
        assert counted(plain.stdout) == 23
    assert [*map(tuple, json.loads(lca("inspect", place, "--json").stdout)["gaps"])] == (
        [(5, 20), (25, 40), (45, 60)] if stated else []
    )


def counted(text: str) -> int:
    """Return how many segments the table counts."""
    return sum(int(number) for number in re.findall(r"^[0-9]+ to [0-9]+ +([0-9]+) ", text, re.M))


def test_nothing_seen_has_no_grade(tmp_path: Path) -> None:
    place = save(tmp_path / "ck", series(Training(steps=8)))
    document = json.loads(lca("inspect", place, "--json").stdout)
    assert (document["worst"], document["observations"]) == (None, [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0:5"], "only one checkpoint"),
        (["--rename", "x"], "is not OLD=NEW"),
        (["--pattern", "x"], "no group called step"),
    ],
)
def test_what_cannot_be_opened_is_refused(
    tmp_path: Path, options: list[object], words: str
) -> None:
    refused(lca("inspect", record(tmp_path / "ck"), *options), words)


def test_names_that_steer_a_terminal_are_made_safe(tmp_path: Path) -> None:
    for step in (0, 10):
        write_step(tmp_path / "ck", step, {"\x1b[31mw": torch.full((2, 2), float("nan"))})
    result = lca("inspect", tmp_path / "ck")
    assert result.exit_code == 0
    assert {"\x1b", "\x07"} & {*result.stdout, *result.stderr} == set()
