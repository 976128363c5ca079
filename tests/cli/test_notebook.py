"""A replay in a real notebook: its progress is one output, which ends with all that is done."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lca_posthoc import open_run
from tests.helpers.terminal import environment

CELL = """\
import lca_posthoc

lca_posthoc.run({ck!r}, {task!r}, out={out!r}, cluster={cluster!r}, workers={workers})
"""


@pytest.mark.parametrize(("cluster", "workers"), [("inline", None), ("local", 1)])
def test_a_notebook_shows_how_far_it_is_in_one_output(
    place: Path, tmp_path: Path, cluster: str, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    names = {
        "ck": str(place / "ck"),
        "task": str(place / "task.py"),
        "out": str(tmp_path / "s.lca"),
    }
    cell = nbformat.v4.new_code_cell(CELL.format(**names, cluster=cluster, workers=workers))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(env=environment())
    progress, result = cell.outputs
    assert (progress.output_type, result.output_type) == ("display_data", "execute_result")
    assert '<progress value="6" max="6">' in progress.data["text/html"]
    assert "6 of 6 segments" in progress.data["text/html"]
    assert "train" in result.data["text/plain"]
    assert open_run(tmp_path / "s.lca")["train"].complete
