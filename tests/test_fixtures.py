"""The recorded trajectories that travel with the project: every layout gives the stored float64
results.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lca_posthoc
from lca_posthoc.errors import InputError, SpanError

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.mark.parametrize("layout", ["recorded", "trainer", "sharded", "wrapped"])
def test_every_layout_gives_the_stored_results(tmp_path: Path, layout: str) -> None:
    reference = load_file(FIXTURES / "reference.safetensors")
    options = {"tolerance": float("inf"), "cluster": "inline", "out": tmp_path / "run.lca"}
    train = lca_posthoc.run(FIXTURES / layout, FIXTURES / "task.py", **options)["train"]
    assert train.steps.step.values.tolist() == list(range(6))
    np.testing.assert_allclose(train.steps.loss_start, reference["loss"][:-1], rtol=1e-6)
    np.testing.assert_allclose(train.steps.loss_end, reference["loss"][1:], rtol=1e-6)
    assert len(train.allocation) == 4
    for name, found in train.allocation.items():
        true = reference[f"allocation/{name}"]
        assert np.abs(found.values - true).sum() <= 1e-5 * np.abs(true).sum()


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"step_00000003\.safetensors is not a whole safetensors "
        r"file.*20 too few",
    ):
        lca_posthoc.run(
            FIXTURES / "truncated", FIXTURES / "task.py", cluster="inline", out=tmp_path / "run.lca"
        )


def test_nan_fails_its_spans_by_step_and_tensor(tmp_path: Path) -> None:
    out = tmp_path / "run.lca"
    with pytest.raises(SpanError, match=r"'out\.weight' holds 1 NaN or Inf .*\(step 3\)"):
        lca_posthoc.run(FIXTURES / "nan", FIXTURES / "task.py", cluster="inline", out=out, span=1)
    assert lca_posthoc.open_run(out)["train"].steps.step.values.tolist() == [0, 1, 4, 5]
