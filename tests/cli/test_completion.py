"""Completion with the Tab key, in every shell that is documented."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.cli import record, run_lca, write_task
from tests.helpers.shells import SHELLS, Shell

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
HEAVY = ("torch", "xarray", "distributed", "matplotlib", "bokeh", "scipy")
# what is typed before Tab, and the arguments that `lca` then gets
CASES = {
    "a command": ("summ", ["summary"]),
    "an option": ("run ck --toler", ["run", "ck", "--tolerance"]),
    "a choice": ("run ck --keep par", ["run", "ck", "--keep", "parameters"]),
    "a setting's choice": ("plan ck --rule simp", ["plan", "ck", "--rule", "simpson"]),
    "a choice of a finding": (
        "plot r.lca layers --quantity cumu",
        ["plot", "r.lca", "layers", "--quantity", "cumulative"],
    ),
    "a finding to draw": ("plot r.lca osc", ["plot", "r.lca", "oscillation"]),
    "a finding to export": ("export r.lca --finding osc", ["export", "r.lca", "--finding", "oscillation"]),
    "a loss": ("summary r.lca --loss val", ["summary", "r.lca", "--loss", "validation"]),
    "a loss to draw": (
        "plot r.lca layers --loss val",
        ["plot", "r.lca", "layers", "--loss", "validation"],
    ),
    "a loss of a run with a label": ("compare a=r.lca --loss val", ["compare", "a=r.lca", "--loss", "validation"]),
    "no loss of what is no run": ("summary ck --loss val", ["summary", "ck", "--loss", "val"]),
    "a run": ("status r.l", ["status", "r.lca"]),
    "a run to draw": ("plot r.l", ["plot", "r.lca"]),
    "a task": ("run ck --task tas", ["run", "ck", "--task", "task.py"]),
    "nothing": ("nosuch", ["nosuch"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints `ck`, a task and a finished run `r.lca` of both losses."""
    root = tmp_path_factory.mktemp("completion") / "work"
    record(root / "ck", range(7))
    task = write_task(root / "task.py")
    assert run_lca(root / "ck", task, root / "r.lca", "--loss", "all").exit_code == 0
    shutil.rmtree(root / "__pycache__", ignore_errors=True)
    return root


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest, place: Path) -> Shell:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    prepared = Shell(request.param, place.parent / request.param, place)
    prepared.prepare()
    return prepared


@pytest.mark.parametrize("case", CASES)
def test_tab_completes_and_imports_nothing_that_computes(shell: Shell, case: str) -> None:
    begun, arguments = CASES[case]
    # zsh takes the slash behind a directory off when Enter follows
    assert [word.removesuffix("/") for word in shell.completed(begun)] == arguments
    assert shell.modules() & set(HEAVY) == set()
    assert "lca_posthoc.cli" in shell.modules()


def test_the_page_says_how_for_every_shell() -> None:
    assert re.findall(r"`_LCA_COMPLETE=(\w+)_source lca >", PAGE.read_text()) == [*SHELLS]
