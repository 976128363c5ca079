"""What works where Linux's own is missing: recording, reading runs, findings, figures and reports; and
where it does not, the word is clear.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lca_posthoc
from tests.helpers.cli import contents
from tests.helpers.faults.clean_runs import clean_run, lay_out

ROOT = str(Path(lca_posthoc.__file__).parents[1])


def on_a_bare_system(
    script: str, place: Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    file = place / "script.py"
    file.write_text(script)
    command = [sys.executable, "-m", "tests.helpers.bare_system", str(file), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": ROOT, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = lay_out(tmp_path_factory.mktemp("place"), 6)
    clean_run(made, made / "run.lca")
    return made


RECORDING = """
import sys
import torch
from lca_posthoc import Recorder, open_trajectory

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with Recorder(sys.argv[1], model) as recorder:
    recorder.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(4)).sum().backward()
        optimizer.step()
trajectory = open_trajectory(sys.argv[1])
print(*(checkpoint.step for checkpoint in trajectory.checkpoints))
"""


def test_recording_and_opening_checkpoints_work(tmp_path: Path) -> None:
    done = on_a_bare_system(RECORDING, tmp_path, tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1", "2", "3", "4", "5"]


READING = """
import sys
from pathlib import Path
from lca_posthoc import findings, open_run, plots
from lca_posthoc.cli import main

if __name__ == "__main__":
    run, out = sys.argv[1], Path(sys.argv[2])
    opened = open_run(run)
    results = opened["train"]
    assert results.progress()["complete"] and not results.progress()["running"]
    assert results.allocation["out.weight"].shape[0] == 6
    plots.layers(findings.layers(results)).figure.savefig(out / "layers.png")
    for command in (
        ["status", run],
        ["summary", run],
        ["verify", run],
        ["inspect", sys.argv[3]],
        ["plot", run, "curve", "-o", str(out / "curve.png")],
        ["report", run, "-o", str(out / "report.html")],
        ["export", run, "-o", str(out / "tables"), "--format", "csv"],
    ):
        sys.argv = ["lca", *command]
        try:
            main()
        except SystemExit as end:
            assert end.code in (0, None), (command, end.code)
"""


def test_runs_are_read_and_reported(place: Path, tmp_path: Path) -> None:
    before = contents(place / "run.lca")
    done = on_a_bare_system(READING, tmp_path, place / "run.lca", tmp_path, place / "checkpoints")
    assert done.returncode == 0, done.stderr
    for name in ("layers.png", "curve.png", "report.html", "tables"):
        assert (tmp_path / name).exists(), name
    assert contents(place / "run.lca") == before


RUNNING = """
import sys
from lca_posthoc.cli import main

if __name__ == "__main__":
    sys.argv[2:2] = ["--task"]
    sys.argv[4:4] = ["--out"]
    sys.argv[:1] = ["lca", "run", "--cluster", "inline"]
    main()
"""


def test_a_replay_says_that_it_needs_linux(place: Path, tmp_path: Path) -> None:
    arguments = (place / "checkpoints", place / "small_task.py", tmp_path / "run.lca")
    done = on_a_bare_system(RUNNING, tmp_path, *arguments)
    assert done.returncode == 5, done.stderr
    assert "runs need Linux (on Windows: WSL)" in done.stderr
    assert "Traceback" not in done.stderr


IMPORTING = """
import importlib
import pkgutil
import lca_posthoc

# a program of its own, and what needs a package that is not asked for here
for found in pkgutil.walk_packages(lca_posthoc.__path__, "lca_posthoc."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print("all")
"""


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    done = on_a_bare_system(IMPORTING, tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["all"]), done.stderr


def test_the_system_is_as_bare_as_it_says(tmp_path: Path) -> None:
    """The tests above would otherwise show nothing."""
    script = "import os\nassert not hasattr(os, 'pread')\nimport fcntl\n"
    done = on_a_bare_system(script, tmp_path)
    assert done.returncode == 1
    assert "fcntl" in done.stderr.splitlines()[-1]
