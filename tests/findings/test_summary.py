"""The headline figures against slow sums over the stored arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lca_posthoc
from lca_posthoc.findings import summary
from lca_posthoc.numerics.schema import KEEP
from tests.helpers.cli import record, write_task

SHARES = {"helping", "hurting", "zero"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> lca_posthoc.Run:
    root = tmp_path_factory.mktemp("summary")
    record(root / "ck", range(7))
    return lca_posthoc.run(root / "ck", write_task(root / "task.py"), cluster="inline", span=2)


def test_the_figures_are_those_of_the_arrays(run: lca_posthoc.Run) -> None:
    found, results = summary(run["train"]), run["train"]
    allocation = {
        name: values.values.astype("float64") for name, values in results.allocation.items()
    }
    flat = np.concatenate([values.ravel() for values in allocation.values()])
    assert found["segments"] == 6
    assert found["parameters"] * 6 == flat.size
    assert found["loss_change"] == pytest.approx(found["loss_end"] - found["loss_start"], abs=1e-12)
    assert found["allocated"] == pytest.approx(flat.sum(), rel=1e-6)
    assert found["residual"] == found["loss_change"] - found["allocated"]
    assert found["residual"] == pytest.approx(float(results.steps.residual.sum()), abs=1e-12)
    assert found["max_segment_residual"] == float(np.abs(results.steps.residual).max())
    assert found["helping"] == np.mean(flat < 0)
    assert found["hurting"] == np.mean(flat > 0)
    assert found["zero"] == np.mean(flat == 0)
    assert found["evaluations"] == int(results.steps.evaluations.sum()) + 3
    assert [each["name"] for each in found["tensors"]] == list(allocation)
    for each in found["tensors"]:
        assert each["allocated"] == pytest.approx(allocation[each["name"]].sum(), rel=1e-6)
        assert each["helping"] == np.mean(allocation[each["name"]] < 0)


@pytest.mark.parametrize("keep", KEEP)
def test_each_level_has_the_same_figures_and_sums_no_shares(
    run: lca_posthoc.Run, tmp_path: Path, keep: str
) -> None:
    root = run.path.parent
    other = lca_posthoc.run(
        root / "ck", root / "task.py", cluster="inline", span=2, keep=keep, out=tmp_path / "r.lca"
    )
    full: dict[str, Any] = dict(summary(run["train"]))
    found: dict[str, Any] = dict(summary(other["train"]))
    sums = keep in ("tensors", "units")
    assert set(full) - set(found) == (SHARES if sums else set())
    for parts in ("tensors", "modules"):
        for one, two in zip(full[parts], found[parts], strict=True):
            assert set(one) - set(two) == ({"helping"} if sums else set())
            assert two["allocated"] == pytest.approx(one["allocated"], rel=1e-6, abs=1e-12)
            assert {name: two[name] for name in two if name != "allocated"} == {
                name: one[name] for name in two if name != "allocated"
            }
    assert found["allocated"] == pytest.approx(full["allocated"], rel=1e-6)
    assert found["loss_change"] == full["loss_change"]
