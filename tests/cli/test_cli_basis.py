"""`lca basis`: what it prints, in a process of its own and as JSON, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lca_posthoc.checkpoints.basis import write_basis
from tests.helpers.cli import STEPS, lca, record, refused, says, write_step

PROCESS = [sys.executable, "-c", "from lca_posthoc.cli import main; main()"]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return record(tmp_path / "ck")


def test_the_command_writes_the_file_and_says_what_is_in_it(
    checkpoints: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b.safetensors"
    done = subprocess.run(
        [*PROCESS, "basis", str(checkpoints), "-o", str(out)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    basis = write_basis(checkpoints, tmp_path / "same", say=lambda text: None)
    assert out.read_bytes() == (tmp_path / "same").read_bytes()
    assert done.stderr == ""
    (part,) = basis.parts
    says(
        done.stdout,
        "6 segments, steps 0 to 60; directions over 556 parameters in 4 tensors",
        *(f"{value:.6g}" for value in part.singular_values),
        f"1: {100 * part.share(1):.3g} %, 2: {100 * part.share(2):.3g} %",
        f"wrote 6 directions, {out.stat().st_size / 1000:.3g} kB, to {out}",
    )
    # nothing else lies there, and the file is as readable as any other that one writes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "ck", "same"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


def test_json_has_every_number(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    result = lca("basis", checkpoints, "-o", out, "--directions", 3, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    (part,) = document["parts"]
    assert (document["schema"], document["file"]) == (1, str(out))
    assert (document["kind"], document["seed"]) == ("displacements", None)
    assert document["directions"] == len(part["singular_values"]) == 3
    assert part["directions"] == [0, 1, 2]
    assert list(part["shares"]) == ["1", "2", "3", "5"]
    values = part["singular_values"]
    assert part["shares"]["2"] == pytest.approx(
        (values[0] ** 2 + values[1] ** 2) / document["motion"]
    )
    assert part["tensors"] == list(load_file(out)) == sorted(load_file(out))


def test_matrices_and_random_directions_are_shown(checkpoints: Path, tmp_path: Path) -> None:
    matrices = lca("basis", checkpoints, "-o", tmp_path / "m", "--per-matrix", "--directions", 2)
    says(
        matrices.stdout,
        "hidden.weight",
        "out.weight",
        "2–3",
        "left out (of fewer than two axes): hidden.bias, out.bias",
        "wrote 4 directions",
    )
    random = lca("basis", checkpoints, "-o", tmp_path / "r", "--random", 5, "--seed", 1)
    says(random.stdout, "first directions on average capture", f"5: {500 / 556:.3g} %")
    says(random.stdout, "wrote 5 directions")
    document = json.loads(
        lca("basis", checkpoints, "-o", tmp_path / "s", "--random", 5, "--json").stdout
    )
    assert (document["kind"], document["seed"]) == ("random", 0)
    assert document["parts"][0]["singular_values"] == []


def test_names_that_steer_a_terminal_are_made_safe(tmp_path: Path) -> None:
    for step in (0, 10):
        tensors = {"\x1b[31mw": torch.full((2, 2), float(step)), "\x07n": torch.tensor(step)}
        write_step(tmp_path / "ck", step, tensors)
    for number, options in enumerate(([], ["--per-matrix"], ["--random", 1])):
        result = lca("basis", tmp_path / "ck", "-o", tmp_path / f"{number}", *options)
        assert result.exit_code == 0
        assert {"\x1b", "\x07"} & {*result.stdout, *result.stderr} == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--directions", 7], "6 independent directions"),
        (["--directions", 0], "--directions 0"),
        (["--seed", 1], "give --random too"),
        (["--steps", "0:5"], "only one checkpoint"),
        (["--rename", "x"], "is not OLD=NEW"),
    ],
)
def test_what_cannot_be_is_refused(
    checkpoints: Path, tmp_path: Path, options: list[object], words: str
) -> None:
    refused(lca("basis", checkpoints, "-o", tmp_path / "b", *options), words)
    assert not (tmp_path / "b").exists()


def test_one_file_is_never_written_over(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert lca("basis", checkpoints, "-o", out).exit_code == 0
    before = out.read_bytes()
    refused(lca("basis", checkpoints, "-o", out, "--random", 2), "already exists")
    assert out.read_bytes() == before


def test_identical_checkpoints_are_refused(tmp_path: Path) -> None:
    for step in STEPS:
        write_step(tmp_path / "ck", step, {"w": torch.ones(2, 3)})
    refused(lca("basis", tmp_path / "ck", "-o", tmp_path / "b"), "hold the same numbers")
