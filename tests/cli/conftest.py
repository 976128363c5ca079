"""Fixtures of what people see: a finished run whose names are long and strange."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ..helpers.cli import record, run_lca, task_namespace, write_task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `ck`, a task whose grouped loss has long labels, and a finished run `r.lca`."""
    root = tmp_path_factory.mktemp("screen")
    record(root / "ck")
    write_task(
        root / "task.py",
        '"validation": Loss(F',
        '"per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: '
        '[f"die größte Klasse von allen, Nummer {int(each)}" for each in targets]), "validation": '
        "Loss(F",
    )
    assert run_lca(root / "ck", root / "task.py", root / "r.lca", "--loss", "all").exit_code == 0
    return root


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "r.lca", tmp_path / "copy.lca")
    (tmp_path / "saved").mkdir()
    model = task_namespace()["Net"]()
    for step in range(2):
        torch.save(model.state_dict(), tmp_path / "saved" / f"step_{step}.pt")
    return tmp_path
