"""A run as large as asked, whole and checked like any other, made in seconds: a few spans are
written, the others link to them.

Its numbers are those of two spans that take turns, so that sums, counts, histogram and totals all
agree; the losses at the ends of the segments follow from them. Files of equal content are one file
on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lca_posthoc.checkpoints.trajectory import Checkpoint, TensorSpec
from lca_posthoc.numerics.objective import Motion
from lca_posthoc.numerics.schema import TOTAL_FIELDS, Totals, join_all, unit_of_totals
from lca_posthoc.numerics.segment_allocation import SegmentAllocation
from lca_posthoc.numerics.settings import resolve
from lca_posthoc.numerics.statistics import SpanStatistics
from lca_posthoc.replay.prepare import choose_span, choose_window
from lca_posthoc.results import ChunkWriter, LossRecord, Manifest, RunWriter, StoredTensor, create
from lca_posthoc.results.files import seal
from lca_posthoc.results.keys import encode_all
from lca_posthoc.results.layout import plan_arrays

Shapes = Mapping[str, tuple[int, ...]]

PATTERNS = 2  # spans that differ
LARGE: Shapes = {  # 9.85 million parameters; with 512 segments 20 GB of allocation
    "embedding.weight": (50_000, 128),
    "conv.weight": (256, 128, 3, 3),
    "conv.bias": (256,),
    "fc1.weight": (2048, 1024),
    "fc1.bias": (2048,),
    "fc2.weight": (1024, 1024),
    "fc2.bias": (1024,),
}


def laid_out(
    shapes: Shapes,
    segments: int,
    losses: Mapping[str, int | None],
    keep: str = "parameters",
    window: int | None = None,
) -> Manifest:
    """The manifest `lca run` makes for a model of these shapes; `losses` gives how many groups each
    has, None for none.
    """
    specs = [
        TensorSpec(name, "parameter", shape, (), 0 if shape else None)
        for name, shape in shapes.items()
    ]
    keys = encode_all(shapes)
    span = choose_span(segments, 2, sum(spec.elements for spec in specs), keep)
    assert segments % span == 0
    known = {"loss": 2.3, "gradient_norm": 1.0}
    records = {
        name: LossRecord(
            key=name,
            on=name,
            kind="function",
            examples=1000,
            total=1000,
            groups=None if groups is None else list(range(groups)),
            counts=None if groups is None else [1000 // groups] * groups,
            block=None,
            along=None,
            replicates=0,
            batch_size=250,
            calibration=None,
            measured=False,
            identity=[known, known],
            unit=unit_of_totals([known["loss"]]),
        )
        for name, groups in losses.items()
    }
    return Manifest(
        root="/nowhere",
        tensors=[StoredTensor(spec, spec.name, keys[spec.name]) for spec in specs],
        checkpoints=[
            Checkpoint(step, (Path(f"step_{step:08d}.safetensors"),), 8, 1)
            for step in range(segments + 1)
        ],
        starts=list(range(segments)),
        breaks=[],
        span=span,
        window=window or choose_window(segments, span, keep, segments // 85),
        settings=resolve({"keep": keep, "path_band": "off", "shards": 1}, None) | {"device": "cpu"},
        losses=records,
        provenance={"task_sha256": "0" * 64, "task_losses": list(losses)},
    )


def build(
    path: Path,
    shapes: Shapes,
    segments: int,
    losses: Mapping[str, int | None],
    keep: str = "parameters",
    window: int | None = None,
) -> int:
    """Make a complete run.

    Args:
        path: where.
        shapes: of its tensors, by name.
        segments: how many; a multiple of the length of a span.
        losses: how many groups each loss has; None for a loss without.
        keep: a level of `--keep`.
        window: spans per window of totals; as `lca run` chooses where None.

    Returns:
        Bytes of `allocation`, before compression.
    """
    manifest = laid_out(shapes, segments, losses, keep, window)
    writer = create(path, manifest, durable=False)
    for at, loss in enumerate(losses):
        with writer.chunks() as chunks:
            _fill(writer, loss, at, chunks)
    plans = [
        plan for record in manifest.losses.values() for plan in plan_arrays(manifest, keep, record)
    ]
    return sum(plan.bytes for plan in plans if plan.part == "allocation")


def _fill(writer: RunWriter, loss: str, seed: int, chunks: ChunkWriter) -> None:
    manifest, commits = writer.manifest, writer.commits(loss)
    statistics_of_patterns, totals = [], []
    for pattern in range(min(PATTERNS, manifest.spans)):
        statistics = _statistics(manifest, loss, PATTERNS * seed + pattern)
        writer.write_block(loss, pattern, statistics, chunks)
        totals.append(statistics.totals())
        statistics.begin(range(0))  # gives up the large arrays
        statistics_of_patterns.append(statistics)
    arrays = _small(manifest, loss, statistics_of_patterns)
    known = {plan.path for plan in plan_arrays(manifest, manifest.keep, manifest.losses[loss])}
    parts = {path.partition("/")[0] for path in arrays}
    writer._write(
        loss,
        parts,
        ((path, each) for path, each in arrays.items() if path in known),
        (slice(0, None),),
        chunks,
    )
    chunks.wait()
    sealed: dict[str, list[int]] = {}
    for span in range(manifest.spans):
        files, own = commits.planned_files(span), span % PATTERNS
        for file, like in zip(files, commits.planned_files(own), strict=True):
            if f"/{commits.key}/allocation/" in file or f"/{commits.key}/units/" in file:
                _link(writer.path, like, file, sealed)
        if manifest.window == 1:
            totals_of = tuple(f"data.zarr/{commits.key}/{part}/" for part in TOTAL_FIELDS)
            files = [file for file in files if not file.startswith(totals_of)]
        rows = manifest.rows(span)
        marker = {
            "evaluations": 2 * manifest.span,
            "forward_passes": 0,
            "seconds": 1.0,
            "ends": [1.0, 1.0],
            "worker": "none",
            "partial": None,
            "run": manifest.id,
            "loss": loss,
            "span": span,
            "steps": manifest.steps[rows],
            "files": {file: sealed.get(file) or seal(writer.path / file, False) for file in files},
        }
        if manifest.window == 1:
            marker["files"] |= _write_totals(writer, loss, span, totals, sealed)
        writer._commit(commits.marker(span), marker)
    if manifest.window > 1:
        for window in range(manifest.windows):
            files = _write_totals(writer, loss, window, totals, sealed)
            marker = {"run": manifest.id, "loss": loss, "window": window, "files": files}
            writer._commit(commits.window_marker(window), marker)


def _write_totals(
    writer: RunWriter,
    loss: str,
    window: int,
    totals: list[dict[str, Totals]],
    sealed: dict[str, list[int]],
) -> dict[str, list[int]]:
    """One window of totals: written where it is the first of its kind, else linked; returns its
    files with their seals.
    """
    manifest, commits = writer.manifest, writer.commits(loss)
    kinds = [
        tuple(span % PATTERNS for span in manifest.spans_of(each)) for each in range(window + 1)
    ]
    first, files = kinds.index(kinds[window]), commits.planned_totals(window)
    if first == window:
        joined = (
            (name, _joined([totals[pattern][name] for pattern in kinds[window]]))
            for name in totals[0]
        )
        with writer.chunks() as chunks:
            writer._write_totals(loss, window, joined, chunks)
        sealed |= {file: seal(writer.path / file, False) for file in files}
    for file, like in zip(files, commits.planned_totals(first), strict=True):
        _link(writer.path, like, file, sealed)
    return {file: sealed[file] for file in files}


def _link(run: Path, like: str, file: str, sealed: dict[str, list[int]]) -> None:
    if like not in sealed:
        sealed[like] = seal(run / like, False)
    if file != like:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(run / like, run / file)
        sealed[file] = sealed[like]


def _small(
    manifest: Manifest, loss: str, statistics_of_patterns: list[SpanStatistics]
) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of all segments that have no axis of parameters."""
    arrays = {}
    for part in ("steps", "tensors", "histogram"):
        for name in getattr(statistics_of_patterns[0], part):
            held = [
                getattr(statistics_of_patterns[span % PATTERNS], part)[name]
                for span in range(manifest.spans)
            ]
            arrays[f"{part}/{name}"] = np.concatenate(held)
    change = arrays["steps/loss_end"] - arrays["steps/loss_start"]
    arrays["steps/loss_end"] = 2.3 + np.cumsum(change, axis=0)
    arrays["steps/loss_start"] = arrays["steps/loss_end"] - change
    return arrays


def _statistics(manifest: Manifest, loss: str, seed: int) -> SpanStatistics:
    """One span, as a worker gathers it."""
    record = manifest.losses[loss]
    groups = None if record.groups is None else len(record.groups)
    table = [tensor.spec for tensor in manifest.allocated]
    statistics = SpanStatistics(
        table, manifest.span, manifest.keep, torch.device("cpu"), groups, unit=record.unit
    )
    for at, segment in enumerate(_segments(table, manifest.span, groups, seed)):
        statistics.add(at, segment)
    return statistics


def _segments(
    table: list[TensorSpec], count: int, groups: int | None, seed: int
) -> Iterator[SegmentAllocation]:
    """Segments with heavy tails, a little help on the whole, and rows of an embedding that no batch
    touched.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = () if groups is None else (groups,)
    for _ in range(count):
        motion, gradient, allocation = {}, {}, {}
        for spec in table:
            moved = 1e-3 * torch.randn(spec.shape, generator=generator)
            slope = 1e-3 * torch.randn((*axis, *spec.shape), generator=generator) - 0.03 * moved
            if spec.name.startswith("embedding"):
                moved *= torch.rand(spec.shape[0], 1, generator=generator) < 0.1
            motion[spec.name], gradient[spec.name] = moved.double(), slope.double()
            allocation[spec.name] = motion[spec.name] * gradient[spec.name]
        sums = {name: each.reshape(*axis, -1).sum(-1).numpy() for name, each in allocation.items()}
        allocated = np.stack(list(sums.values())).sum(0)
        start, residual = np.zeros(axis), np.full(axis, 1e-6)
        numbers: dict[str, Any] = {
            "loss_start": start,
            "loss_end": start + allocated + residual,
            "weight": np.full(axis, 1000.0 / (groups or 1)),
            "residual": residual,
            "error_bound": np.full(axis, 1e-6),
        }
        yield SegmentAllocation(
            points=Motion(
                {name: torch.zeros_like(moved) for name, moved in motion.items()}, motion
            ),
            nodes=[(1.0, gradient)],
            sums=sums,
            distance={name: float(moved.abs().sum()) for name, moved in motion.items()},
            evaluations=2,
            level=1,
            converged=True,
            unreached=frozenset(),
            **numbers,
        )  # type: ignore[arg-type]


def _joined(stretches: list[Totals]) -> Totals:
    """Join the totals of stretches that follow each other."""
    return join_all(stretches, [True] * (len(stretches) - 1))
