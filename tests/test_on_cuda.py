"""The script that measures on a GPU, tried whole on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "benchmarks" / "on_cuda.py"
PARTS = {  # and a line that each of them has
    "machine": r"\| torch \| \d",
    "peak": r"\| float32 \| \d+\.\d\d \|",
    "waits": r"\| tensors \| told on CUDA alone \|",
    "memory": r"\| parameters \| \d+ \|",
    "determinism": r"\| mnist-lenet \| \d+ \| 0 \|",
    "copies": r"\| mnist-lenet \| \d+\.\d+ \| \d+\.\d+ \| [1-9]\d* \| 0 \|",
    "memory that runs out": r"told on CUDA alone",
    "speed": r"\| ours, keep tensors \| -?\d",  # a difference of two short times
    "large": r"\| 64,2,256,2 \| 124,672 \| \d",
    "recorder": r"\| digits, 64-50-20-10 \| scalars over iterates \|",
    "numerics": r"\| test_draws\.py \| [1-9]\d* \| 0 \|",
}


def test_the_script_for_a_gpu_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    table = tmp_path / "small.md"
    options = ("--device", "cpu", "--small", "--seconds", 2400, "--table", table)
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])},
    )
    assert done.returncode == 0, done.stderr
    written = table.read_text()
    assert "(ended" not in written, written
    parts = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", written, re.MULTILINE | re.DOTALL))
    assert list(parts) == list(PARTS)
    for name, line in PARTS.items():
        assert re.search(line, parts[name]), written
