"""The examples of the documentation, on real data, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
needs_mnist = pytest.mark.skipif(
    not (Path(os.environ.get("LCA_DATA", "/nonexistent")) / "mnist.safetensors").is_file(),
    reason="LCA_DATA does not name a directory with mnist.safetensors",
)


def command(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_mnist
def test_mnist_fc_adds_up_without_refinement_and_draws_its_picture(tmp_path: Path) -> None:
    command(EXAMPLES / "mnist_fc.py", tmp_path / "ck")
    lca = [Path(sys.executable).with_name("lca")]
    run = [*lca, "run", tmp_path / "ck", "--task", EXAMPLES / "mnist_fc.py", "--loss", "all", "--json"]
    done = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["losses"]
    assert list(found) == ["train", "validation"]
    for each in found.values():
        assert each["segments"] == 220
        assert each["parameters"] == 84_060
        assert abs(each["residual"]) <= 1e-3 * abs(each["loss_change"])
        assert each["max_segment_residual"] <= 1e-3
        assert each["unconverged"] == 0
        assert each["evaluations"] <= 2 * 220 + 220 // 8 + 1
    command(EXAMPLES / "layers_picture.py", tmp_path / "ck.lca", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
