"""What a run would cost, against what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

import lca_posthoc
from lca_posthoc.findings import summary
from lca_posthoc.plan import plan
from lca_posthoc.store import read_manifest, required_bytes
from tests.small import contents, record, write_task


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "left", "midpoint", "gauss-2"])
def test_evaluations_are_those_a_run_without_refinement_makes(tmp_path: Path, rule: str) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    before = contents(tmp_path)
    planned = plan(tmp_path / "ck", task, losses=["all"], rule=rule, workers=1)
    assert contents(tmp_path) == {
        **before,
        **{name: held for name, held in contents(tmp_path).items() if "pycache" in name},
    }
    options = {"rule": rule, "tolerance": float("inf"), "losses": ["all"]}
    run = lca_posthoc.run(tmp_path / "ck", task, cluster="inline", **options)
    assert {name: loss.evaluations for name, loss in planned.losses.items()} == {
        name: summary(run[name])["evaluations"] for name in run
    }
    manifest = read_manifest(run.path)
    assert planned.segments == manifest.segments
    assert planned.parameters == manifest.parameters
    assert planned.bytes == {
        keep: required_bytes(manifest, keep, manifest.losses.values()) for keep in ("parameters", "units", "tensors")
    }
    assert {name: loss.batch_size for name, loss in planned.losses.items()} == {
        name: record.batch_size for name, record in manifest.losses.items()
    }
    assert all(loss.seconds == loss.seconds_per_evaluation * loss.evaluations > 0 for loss in planned.losses.values())
    assert planned.seconds > 0
    assert planned.bytes["parameters"] >= sum(loss.bytes["parameters"] for loss in planned.losses.values()) / 2
    assert planned.free > 0
    assert planned.memory > 0


def test_what_cannot_be_spread_over_the_workers_is_said(tmp_path: Path) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    assert not any("busy" in note for note in plan(tmp_path / "ck", task, workers=6).notes)
    assert "6 segments keep at most 6 of 64 workers busy" in plan(tmp_path / "ck", task, workers=64).notes


def test_spans_are_shortened_until_every_worker_has_work(tmp_path: Path) -> None:
    record(tmp_path / "ck")
    task = write_task(tmp_path / "task.py")
    for workers, span in ((1, 2), (2, 1), (3, 1)):
        run = lca_posthoc.run(tmp_path / "ck", task, workers=workers, out=tmp_path / f"{workers}.lca")
        assert run.manifest.span == span
