"""The examples of the documentation, on real data, as a user runs them.

Those on the digits that ship with the package end in assertions of their own.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from safetensors import safe_open

from lca_posthoc import open_run
from lca_posthoc.base.declarations import declared_findings
from tests.helpers.browser import CHROMIUM

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def needs(file: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (Path(os.environ.get("LCA_DATA", "/nonexistent")) / file).is_file(),
        reason=f"LCA_DATA does not name a directory with {file}",
    )


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_all_losses(checkpoints: Path, task: Path) -> dict[str, Any]:
    """What `lca run --loss all --json` says of each loss."""
    lca = [Path(sys.executable).with_name("lca")]
    run = [*lca, "run", checkpoints, "--task", task, "--loss", "all", "--json"]
    done = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["losses"]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("digits_*.py")))
def test_a_script_of_the_gallery_holds_what_it_asserts_and_draws_its_figure(
    name: str, tmp_path: Path
) -> None:
    command(EXAMPLES / f"{name}.py", tmp_path)
    (picture,) = tmp_path.glob("*.png")
    assert f"digits_{picture.name}" == f"{name}.png"
    assert picture.stat().st_size > 10_000


def test_every_line_of_the_gallery_draws_its_figure(tmp_path: Path) -> None:
    command(EXAMPLES / "every_figure.py", tmp_path, 32)
    assert {picture.stem for picture in tmp_path.glob("*.png")} == {*declared_findings()}


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
def test_the_microscope_is_filmed(tmp_path: Path) -> None:
    command(EXAMPLES / "report_film.py", tmp_path)
    film = tmp_path / "report_film.gif"
    with Image.open(film) as pictures:
        assert getattr(pictures, "n_frames", 1) > 20
    assert film.stat().st_size < 1_000_000


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_runs_from_top_to_bottom_and_is_stored_without_outputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(home, str(tmp_path))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    shown = {output.output_type for cell in cells for output in cell.outputs}
    assert {"execute_result", "display_data", "stream"} <= shown


@needs("mnist.safetensors")
def test_forgotten_images_close_on_their_own_loss_and_are_drawn(tmp_path: Path) -> None:
    shown = command(EXAMPLES / "mnist_forgotten.py", tmp_path, 25)
    assert "of 2,000 images" in shown
    assert (tmp_path / "forgotten.png").stat().st_size > 10_000


@needs("tinyshakespeare.txt")
def test_kinds_of_characters_are_allocated_and_drawn(tmp_path: Path) -> None:
    shown = command(EXAMPLES / "shakespeare_tokens.py", tmp_path, 4)
    assert all(kind in shown for kind in ("newline", "name", "double", "other"))
    assert (tmp_path / "kinds.png").stat().st_size > 10_000


@needs("mnist.safetensors")
def test_mnist_fc_adds_up_without_refinement_and_draws_its_picture(tmp_path: Path) -> None:
    command(EXAMPLES / "mnist_fc.py", tmp_path / "ck", 20)
    found = run_all_losses(tmp_path / "ck", EXAMPLES / "mnist_fc.py")
    assert list(found) == ["train", "validation"]
    spans = -(-20 // open_run(tmp_path / "ck.lca").manifest.span)
    for each in found.values():
        assert each["segments"] == 20
        assert each["parameters"] == 84_060
        assert abs(each["residual"]) <= 1e-3 * abs(each["loss_change"])
        assert each["max_segment_residual"] <= 1e-3
        assert each["unconverged"] == 0
        assert each["evaluations"] <= 2 * 20 + spans + 1
    picture = tmp_path / "layers.png"  # the gallery's
    lca = Path(sys.executable).with_name("lca")
    subprocess.run([lca, "plot", tmp_path / "ck.lca", "layers", "-o", picture], check=True)
    assert picture.stat().st_size > 10_000


@needs("tinyshakespeare.txt")
def test_tiny_shakespeare_adds_up_and_its_loss_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    command(EXAMPLES / "tiny_shakespeare.py", tmp_path / "ck")
    found = run_all_losses(tmp_path / "ck", EXAMPLES / "tiny_shakespeare.py")
    assert list(found) == ["train", "speakers"]
    for each in found.values():
        assert each["segments"] == 60
        assert each["unconverged"] == 0
        residual, change = np.abs(each["residual"]), np.abs(each["loss_change"])
        assert (residual <= 1e-3 * change).all()

    with safe_open(tmp_path / "ck" / "checkpoint-60" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert [name for name in names if "wte" in name or "head" in name] == ["transformer.wte.weight"]
    run = open_run(tmp_path / "ck.lca")
    tied = [each.spec for each in run.manifest.tensors if each.spec.aliases]
    assert [(spec.name, spec.aliases) for spec in tied] == [
        ("transformer.wte.weight", ("lm_head.weight",))
    ]
    assert "lm_head.weight" not in run["train"].allocation

    speeches, _ = runpy.run_path(str(EXAMPLES / "tiny_shakespeare.py"))["data"]()
    labels = speeches["input_ids"].masked_fill(speeches["attention_mask"] == 0, -100)
    assert 0 < (labels == -100).float().mean() < 0.5
    for step, loss in ((0, "loss_start"), (60, "loss_end")):
        model = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path / "ck" / f"checkpoint-{step}"
        ).eval()
        assert model.num_parameters() == found["train"]["parameters"]
        with torch.no_grad():
            assert found["train"][loss] == pytest.approx(
                float(model(**speeches, labels=labels).loss), rel=1e-5
            )
        weights = run["speakers"].steps["weight"].values[0]
        assert weights.sum() == (labels[:, 1:] != -100).sum()
        assert found["train"][loss] == pytest.approx(
            np.average(found["speakers"][loss], weights=weights), rel=1e-6
        )
