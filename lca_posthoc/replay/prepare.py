"""Prepare a run before its first span: describe the task, match it with the trajectory, probe it,
lay out the run.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from .. import results
from ..base.text import count
from ..checkpoints.paths import absolute, below
from ..checkpoints.trajectory import Checkpoint, TensorSpec, Trajectory
from ..cluster import Cluster, Crew, Done, Lost, Spec
from ..errors import InputError, Interrupted, ResourceError, SpanError, few
from ..numerics.long_segments import is_long
from ..numerics.precisions import PRECISIONS
from ..numerics.quadrature import COMPOSITE, RULES
from ..numerics.sampling import SegmentSample
from ..numerics.schema import (
    BYTES_OF_TOTALS,
    EXAMPLE_FIELDS,
    KEEP,
    KEEP_OF_A_SAMPLE,
    holds,
    in_units_of_loss,
    is_share,
    unit_of_totals,
)
from ..numerics.settings import Settings
from ..results import LossRecord, Manifest, StoredTensor, is_object_store
from ..results.keys import encode_all
from ..tasks.task import Entry, digest, parse_subsets
from .levels import MemoryOfLevels, highest_that_fits
from .parts import PartsAsked, about_signal
from .requests import (
    Admission,
    AdmissionRequest,
    CalibrationsRequest,
    DescribeRequest,
    Description,
    Failure,
    LossDescription,
    ProbeAnswer,
    ProbeRequest,
    Question,
    RunSettings,
    Sample,
    StoredPoints,
    TaskSetup,
    answered,
    from_plain,
    to_plain,
)
from .shards import about_shards, choose_shards, is_cut, refuse_uncut, why_not_cut
from .worker import admit, calibrations, describe, probe, sampled, versions

_SPAN_BYTES = 256 * 2**20
_SHORTEST_OF_LARGE, _LONGEST_SPAN = 8, 32
_WINDOWS = 64
_BEGUN = (
    "An existing run keeps its tolerance and its precision: to change them, write another run "
    "with --out."
)
_OTHER_SEGMENTS = (
    "the segments of this run differ from those of these checkpoints, --steps and --segments. "
    "Restore them, or write another run with --out."
)
Answer = TypeVar("Answer")

# more checkpoints for running statistics, which lag most early on
_EARLY = (2, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The place of a run, and how it is cut.

    Attributes:
        path: its directory.
        existing: the run that already exists, whose batch sizes and keys hold.
        span: segments per span; None to choose.
        workers: how many of this host will share the work; None for those of the cluster.
        segments: the final number of segments, while checkpoints are still being recorded.
        longest_span: the most segments per span that may be chosen.
    """

    path: Path
    existing: Manifest | None = None
    span: int | None = None
    workers: int | None = None
    segments: int | None = None
    longest_span: int = _LONGEST_SPAN

    def span_of(self, matched: _Match, workers: int, keep: str) -> int:
        """Return the segments per span.

        Args:
            matched: the task on its trajectory.
            workers: that share the spans.
            keep: the level of `--keep`.
        """
        of_examples = matched.numbers_of_examples
        return self.span or min(
            self.longest_span,
            choose_span(matched.planned, workers, matched.elements, keep, of_examples),
        )


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A run as it would be created now, at any level of `--keep`.

    Attributes:
        matched: the task on its trajectory.
        checkpoints: of the trajectory, files relative to its root.
        destination: of the run.
        workers: how many will share the work.
        settings: with or without a level.
        probed: a worker's answer to the probe.
        provenance: of the run.
    """

    matched: _Match
    checkpoints: list[Checkpoint]
    destination: Destination
    workers: int
    settings: Settings
    probed: ProbeAnswer
    provenance: dict[str, Any]

    def lower_levels(self, keep: str) -> Sequence[str]:
        """Return the levels of `--keep` that may replace one, the lowest first; none for an
        existing run.
        """
        return KEEP[: KEEP.index(keep)] if self.destination.existing is None else ()

    @property
    def gone(self) -> frozenset[int]:
        """Return the steps of the checkpoints whose files were removed."""
        return self.matched.trajectory.gone

    def in_the_end(self, manifest: Manifest) -> Manifest:
        """Return a manifest with placeholders for the checkpoints still to come."""
        last, position = manifest.checkpoints[-1], len(manifest.checkpoints) - 1
        coming = range(self.matched.planned - manifest.segments)
        more = [replace(last, step=last.step + 1 + number) for number in coming]
        return replace(
            manifest,
            checkpoints=[*manifest.checkpoints, *more],
            starts=[*manifest.starts, *(position + number for number in coming)],
        )

    def at(self, keep: str) -> Manifest:
        """Describe the run at a level of `--keep`."""
        matched, existing = self.matched, self.destination.existing
        recorded = existing.losses if existing else {}
        losses = _records(matched.described, self.probed, recorded, keep)
        shards = self._shards(losses, keep)
        # in shards, one span at a time keeps all workers busy
        span = self.destination.span_of(matched, self.workers if shards == 1 else 1, keep)
        return Manifest(
            root=absolute(matched.trajectory.root),
            tensors=_stored_tensors(matched),
            checkpoints=self.checkpoints,
            starts=matched.starts,
            breaks=sorted(matched.trajectory.breaks),
            span=span,
            window=choose_window(matched.planned, span, keep, matched.room_for_windows),
            settings={**self.settings, "keep": keep, "shards": shards},
            losses=losses,
            provenance=self.provenance,
            packed=is_object_store(self.destination.path) if existing is None else existing.packed,
        )

    def _shards(self, losses: dict[str, LossRecord], keep: str) -> int:
        """Return the number of shards: the one recorded or asked for, or a default for the level of
        `--keep`.
        """
        shards = self.settings["shards"]
        if shards is not None:
            return shards
        if self.matched.in_order_only:
            return 1
        return choose_shards(self.matched.planned, self.workers, losses, self.settings, keep)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A probed task on a trajectory.

    Requests to workers describe the task by `setup`; those that evaluate at a few checkpoints take
    them from `sample`. `manifest` describes the run as it would be created now, and `draft` at any
    level of `--keep`. `memory` is that of a worker, `notes` are for the user, and `short_of` names
    missing memory, if any.
    """

    setup: TaskSetup
    sample: Sample
    draft: Draft
    manifest: Manifest
    memory: MemoryOfLevels
    notes: list[str]
    short_of: str | None

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Return the examples per batch of each split."""
        return {
            record.on: record.batch_size
            for record in self.manifest.losses.values()
            if record.on is not None
        }


def prepare(
    cluster: Cluster,
    trajectory: Trajectory,
    task: Entry,
    parcel: str,
    losses: list[str],
    settings: Settings,
    destination: Destination,
    parts: PartsAsked,
) -> Preparation:
    """Describe and probe a task on one worker of the cluster, and lay out the run.

    Args:
        cluster: where to ask.
        trajectory: the checkpoints.
        task: where the task is.
        parcel: the key of the bytes delivered for it.
        losses: their names; empty for the first, `["all"]` for every one.
        settings: complete except for the level of `--keep`, which may be None to choose it.
        destination: of the run.
        parts: the parts of the motion that are asked for.

    Raises:
        InputError: for anything wrong with the task or its fit to the checkpoints.
        ResourceError: if the worker died.
        Interrupted: if the cluster drains.
    """
    existing = destination.existing
    settings = {**settings, "path_band": _path_band(settings, trajectory)}
    setup = TaskSetup(
        task=task,
        parcel=parcel,
        settings=RunSettings.of(settings),
        losses=losses,
        stored=sorted(trajectory.tensors),
        digests={},
    )
    described = ask(cluster, describe, DescribeRequest(setup=setup))
    signal = parts.signal(settings, described)
    if signal is not None and signal not in described.losses:
        setup = replace(setup, losses=[*described.losses, signal])
        described = ask(cluster, describe, DescribeRequest(setup=setup))
    notes = about_signal(signal, described, trajectory)
    settings = parts.settled(settings, described, signal)
    setup = replace(setup, settings=RunSettings.of(settings))
    _known_tensors(settings["tensors"], described.tensors)
    if existing is None:
        _known_splits(settings["subset"], described)
    starts = _chosen(trajectory, settings["segments"])
    if existing is not None and starts[: existing.segments] != existing.starts:
        raise InputError(_OTHER_SEGMENTS)
    matched = _match(trajectory, described, starts, destination.segments)
    setup = replace(setup, losses=list(described.losses), digests=described.digests)
    crew = cluster.crew()
    workers = destination.workers or crew.workers
    sample = Sample(
        points=_sampled_points(trajectory, matched.names, _looked_at_in_both_modes(matched.last)),
        last=matched.last,
        looked=_looked(trajectory),
        workers_per_host=destination.workers or crew.max_per_host,
        span_length=(
            existing.span if existing else destination.span_of(matched, workers, "parameters")
        ),
        first=trajectory.first_there,
    )
    recorded = existing.losses if existing else {}
    probed = ask(cluster, probe, _probe_request(setup, sample, matched, recorded))
    if probed.statistics is not None:
        settings = {**settings, "statistics": probed.statistics}
        setup = replace(setup, settings=RunSettings.of(settings))
    draft = Draft(
        matched=matched,
        checkpoints=relative(trajectory),
        destination=destination,
        workers=workers,
        settings=settings,
        probed=probed,
        provenance=_provenance(task, described.task_losses),
    )
    memory = MemoryOfLevels(
        levels=probed.levels,
        free=probed.free_memory,
        workers=sample.workers_per_host,
        losses=len(described.losses.keys() - recorded.keys()),
    )
    return _laid_out(setup, sample, draft, memory, notes)


def _path_band(settings: Settings, trajectory: Trajectory) -> str:
    """Return the setting of the path band: as asked for or recorded, or by default on if a segment
    is longer than one step.
    """
    steps = trajectory.steps
    any_long = any(is_long(steps[start + 1] - steps[start]) for start in trajectory.starts)
    return settings["path_band"] or ("on" if any_long else "off")


def calibrated(cluster: Cluster, ready: Preparation) -> Preparation:
    """Return the preparation with new losses calibrated, where the rule is the trapezoid.

    Args:
        cluster: one of its workers calibrates, at the run's level of `--keep`.
        ready: to calibrate.
    """
    manifest, existing = ready.manifest, ready.draft.destination.existing
    recorded = existing.losses if existing else {}
    new = {name: record for name, record in manifest.losses.items() if name not in recorded}
    if manifest.settings["rule"] != "trapezoid" or not new:
        return ready
    request = CalibrationsRequest(
        setup=ready.setup,
        sample=ready.sample,
        batch_sizes=ready.batch_sizes,
        keep=manifest.keep,
        along={name: record.along for name, record in new.items()},
    )
    shares = ask(cluster, calibrations, request).shares
    with_shares = {name: replace(record, calibration=shares[name]) for name, record in new.items()}
    return replace(ready, manifest=replace(manifest, losses={**manifest.losses, **with_shares}))


def _laid_out(
    setup: TaskSetup, sample: Sample, draft: Draft, memory: MemoryOfLevels, notes: list[str]
) -> Preparation:
    """Lay out a probed run at its level of `--keep`; `notes` come before its own."""
    existing = draft.destination.existing
    keep, about_keep = _level(draft, memory)
    manifest = draft.at(keep)
    shards, recorded = draft.settings["shards"], existing.losses if existing else {}
    if existing is None and shards is not None:
        refuse_uncut(shards, manifest.losses, draft.settings, keep)
    new = [name for name in manifest.losses if name not in recorded]
    all_cut = all(is_cut(manifest, name) for name in manifest.losses)
    idle = [] if all_cut else _idle(existing or manifest, draft.workers)
    notes = [
        *notes,
        *draft.probed.notes,
        *about_keep,
        *_not_told_apart(draft.matched.described, draft.probed, keep),
        *_about(draft.matched, manifest, recorded),
        *about_part(draft.matched.trajectory, manifest),
        *about_shards(manifest, draft.workers, new),
        *idle,
        *(why_not_cut(manifest, draft.matched.in_order_only) if idle and shards is None else []),
    ]
    return Preparation(
        setup=setup,
        sample=sample,
        draft=draft,
        manifest=manifest,
        memory=memory,
        notes=notes,
        short_of=_short_of(draft, memory, keep),
    )


def _not_told_apart(described: Description, probed: ProbeAnswer, keep: str) -> Iterator[str]:
    """Describe the losses whose examples should be separated within a batch but cannot be, and
    those with too many examples for texts.
    """
    for name, texts in probed.texts.items():
        if texts is None:
            yield (
                f"loss {name!r} has too many examples to record the text of each by Task.show "
                f"({count(described.losses[name].examples, 'example')}); --subset takes fewer."
            )
    for name, sites in probed.sites.items():
        if not sites.why:
            continue
        loss = described.losses[name]
        if loss.per is not None:
            yield (
                f"loss {name!r}: its {count(loss.examples, 'example')} are evaluated one at a time, "
                f"because those of a batch cannot be separated ({sites.why}). That takes as many passes "
                "over the model's weights; --subset takes fewer examples."
            )
        elif not holds(keep, "units"):
            yield (
                f"loss {name!r}: each batch holds examples of one group, which is slower where "
                "groups are small, because the shares of single examples cannot be separated "
                f"({sites.why})."
            )


def _level(draft: Draft, memory: MemoryOfLevels) -> tuple[str, list[str]]:
    """Return the level of `--keep`, asked for, recorded, or the highest that fits, with notes on
    it.
    """
    keep = draft.settings["keep"]
    if keep is not None:
        return keep, []

    def stored(level: str) -> int:
        manifest = draft.in_the_end(draft.at(level))
        return results.required_bytes(manifest, level, manifest.losses)

    levels = KEEP if draft.settings["segments"] is None else KEEP_OF_A_SAMPLE
    return highest_that_fits(memory, stored, draft.destination.path, levels)


def _short_of(draft: Draft, memory: MemoryOfLevels, keep: str) -> str | None:
    """Describe the memory that a replay lacks on a CPU; None where there is enough.

    A GPU reports out of memory itself, and its batches are then halved.
    """
    if draft.settings["device"] == "cuda":
        return None
    return memory.short_of(keep, lower=draft.lower_levels(keep))


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A described task on the trajectory it fits.

    `names` maps tensors to names inside the files; `to_come` is the final number of segments, None
    where all exist.
    """

    trajectory: Trajectory
    described: Description
    names: dict[str, str]
    leftovers: dict[str, str]
    starts: list[int]
    to_come: int | None = None

    @property
    def last(self) -> int:
        """Return the position of the last checkpoint of the trajectory."""
        return len(self.trajectory.checkpoints) - 1

    @property
    def planned(self) -> int:
        """Return the final number of segments."""
        return max(self.segments, self.to_come or 0)

    @property
    def segments(self) -> int:
        """Return the number of segments to replay."""
        return len(self.starts)

    @property
    def in_order_only(self) -> list[str]:
        """Return the splits whose examples can only be read in order, from the start at every pass."""
        losses = self.described.losses.values()
        splits = {loss.on for loss in losses if loss.in_order_only and loss.on is not None}
        return sorted(splits)

    @property
    def elements(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(spec.elements for spec in self.described.tensors)

    @property
    def numbers_of_examples(self) -> int:
        """Return how many numbers of single examples are kept for a segment."""
        kept = len(self.described.tensors) + len(EXAMPLE_FIELDS)
        return sum(loss.rows * kept for loss in self.described.losses.values())

    @property
    def room_for_windows(self) -> int:
        """Return how many windows of totals fit into a tenth of the checkpoints' space."""
        stored = sum(checkpoint.size for checkpoint in self.trajectory.checkpoints)
        stored = stored * (self.planned + 1) // (self.segments + 1)
        return stored // (10 * BYTES_OF_TOTALS * max(1, self.elements))


def _match(
    trajectory: Trajectory, described: Description, starts: list[int], to_come: int | None
) -> _Match:
    """Match a described task with a trajectory.

    Args:
        trajectory: the checkpoints.
        described: the task.
        starts: the positions of the checkpoints that segments start from.
        to_come: the final number of segments; None where all exist.

    Raises:
        InputError: if they do not fit.
    """
    without = ([*described.fixed, *described.added], described.patterns, described.unstored)
    return _Match(
        trajectory=trajectory,
        described=described,
        names=trajectory.match(described.tensors, *without),
        leftovers=trajectory.leftovers(described.tensors, *without),
        starts=starts,
        to_come=to_come,
    )


def _probe_request(
    setup: TaskSetup, sample: Sample, matched: _Match, recorded: dict[str, LossRecord]
) -> ProbeRequest:
    trajectory, described = matched.trajectory, matched.described
    return ProbeRequest(
        setup=setup,
        sample=sample,
        batch_sizes={
            record.on: record.batch_size for record in recorded.values() if record.on is not None
        },
        modes=_looked_at_in_both_modes(matched.last),
        half=trajectory.half_precision,
        ties=trajectory.ties(described.tensors),
        fixed=trajectory.sources_of(described.fixed),
        leftovers=matched.leftovers,
        recorded=list(recorded),
    )


def _stored_tensors(matched: _Match) -> list[StoredTensor]:
    """Return the tensors with their names inside the files and their keys in the store."""
    tensors = matched.described.tensors
    keys = encode_all(spec.name for spec in tensors)
    return [StoredTensor(spec, matched.names[spec.name], keys[spec.name]) for spec in tensors]


def _records(
    described: Description, probed: ProbeAnswer, recorded: dict[str, LossRecord], keep: str
) -> dict[str, LossRecord]:
    """Return the records of the chosen losses at a level of `--keep`; new keys differ from existing
    ones.
    """
    keys = encode_all(described.losses, [record.key for record in recorded.values()])
    return {
        name: _record(name, keys[name], loss, probed, keep)
        for name, loss in described.losses.items()
    }


def _about(matched: _Match, manifest: Manifest, recorded: dict[str, LossRecord]) -> Iterator[str]:
    """Describe new losses, and tensors that stay as the model builds them."""
    for name, record in manifest.losses.items():
        if name not in recorded:
            yield from _scale(name, record, manifest.settings)
    described = matched.described
    yield from _frozen(described.frozen)
    yield from _added(list(matched.trajectory.sources_of(described.added)))


def ask(cluster: Cluster, work: Callable[[Spec], Spec], request: Question[Answer]) -> Answer:
    """Return the answer of one worker to a request.

    Args:
        cluster: whose worker answers.
        work: the function to call there.
        request: its argument.

    Raises:
        LCAError: the error that the worker met; a SpanError becomes an InputError.
        ResourceError: if the worker died.
        Interrupted: if the cluster drains.
    """
    for outcome in cluster.map(work, [to_plain(request)]):
        if isinstance(outcome, Lost):
            raise ResourceError(
                f"a worker died while probing the task ({outcome.why}). Often memory: try "
                "fewer --workers or a smaller --batch-size, or --cluster inline to see the cause."
            )
        if isinstance(outcome, Done) and outcome.result is not None:
            answer = answered(type(request), outcome.result)
            return unwrapped(answer)
    raise Interrupted("stopped before the first span.")


def check_workers(
    cluster: Cluster, trajectory: Trajectory, device: str | None, token: tuple[Path, str]
) -> list[str]:
    """Ask every worker that somebody else started whether it can take part, and settle on a device.

    Args:
        cluster: of these workers.
        trajectory: the checkpoints they must read.
        device: "cuda", "cpu", or None for a GPU if every worker sees one.
        token: a file in the run's directory, which they must see and be able to write beside, and
            its contents.

    Returns:
        Notes for the user.

    Raises:
        ResourceError: naming the workers that cannot, why, and what to do.
    """
    checkpoints = relative(trajectory)
    request = AdmissionRequest(
        versions=versions(),
        device=device,
        token=token[0],
        text=token[1],
        root=absolute(trajectory.root),
        checkpoints=[checkpoints[trajectory.first_there], checkpoints[-1]],
    )
    answers = cluster.check_workers(admit, to_plain(request))
    _refuse_workers(answers)
    admitted = {name: from_plain(Admission, answer) for name, answer in answers.items()}
    cluster.settle_on(
        device or ("cuda" if all(answer.cuda for answer in admitted.values()) else "cpu")
    )
    return _sharing(cluster.crew(), admitted)


def _refuse_workers(answers: Mapping[str, Spec]) -> None:
    """Reject a cluster with workers that cannot take part.

    Raises:
        ResourceError: naming these workers.
    """
    refused = [
        f"worker {name} {error['message'] if isinstance(error, dict) else error}"
        for name, answer in answers.items()
        if (error := answer.get("error")) is not None
    ]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ResourceError(f"{'; '.join(refused[:3])}{more}.")


def _sharing(crew: Crew, admitted: dict[str, Admission]) -> list[str]:
    """Describe what makes workers slower than they could be."""
    notes, several = [], crew.several_threads
    if several:
        notes.append(
            f"worker{'s' if len(several) > 1 else ''} {', '.join(several[:3])} "
            f"ha{'ve' if len(several) > 1 else 's'} more than one thread, but a worker computes "
            "one span at a time: start more workers with --nthreads 1"
        )
    if crew.device == "cuda":
        sharing: dict[str | None, list[str]] = {}
        for name, answer in admitted.items():
            sharing.setdefault(answer.gpu, []).append(name)
        notes += [
            f"workers {', '.join(names)} share one GPU: give each its own with CUDA_VISIBLE_DEVICES"
            for names in sharing.values()
            if len(names) > 1
        ]
    return notes


def about_part(trajectory: Trajectory, manifest: Manifest) -> Iterator[str]:
    """Yield notes on the share of training that a run sees, where it does not see all of it.

    Args:
        trajectory: the checkpoints.
        manifest: of the run.
    """
    steps, starts = trajectory.steps, trajectory.starts
    if trajectory.breaks:
        seen, all_steps = manifest.steps_seen
        gaps = [(steps[start], steps[start + 1]) for start in sorted(trajectory.breaks)]
        first, last = max(gaps, key=lambda gap: gap[1] - gap[0])
        yield (
            f"{count(len(gaps), 'gap')} between checkpoints {'is' if len(gaps) == 1 else 'are'} "
            f"skipped, the longest {first}→{last}: the run sees {seen:,} of "
            f"{count(all_steps, 'training step')} ({seen / all_steps:.1%}), and sums include only "
            "these"
        )
    if manifest.sampled is not None:
        yield (
            f"--segments {manifest.sampled}: {manifest.segments:,} of {len(starts):,} segments are "
            "replayed, drawn at random all over training. Sums over training are estimates with "
            "standard errors; results that need every segment (turns, peaks, shares that help) are missing"
        )


def _added(names: list[str]) -> list[str]:
    """Describe the parts of a state dict in the checkpoints that are no tensors of the model's own."""
    if not names:
        return []
    return [
        f"the checkpoints hold {few([*map(repr, names)])}, in the task's model "
        f"no parameter{'s' if len(names) > 1 else ''} or buffer{'s' if len(names) > 1 else ''} but made by a hook of its "
        "state dict or by get_extra_state: the model keeps its own"
    ]


def _frozen(names: list[str]) -> list[str]:
    """Describe the frozen parameters that stay as the task's model builds them."""
    if not names:
        return []
    return [
        f"no checkpoint holds {few([*map(repr, names)])}, frozen in the task's model: they stay as "
        "it builds them, which must equal their values in training"
    ]


def _scale(name: str, record: LossRecord, settings: Settings) -> list[str]:
    """Warn if a loss or its change is so small that no tolerance, or every tolerance, can be met."""
    tolerance, (first, last) = settings["tolerance"], record.identity
    absolute = in_units_of_loss(tolerance, record.scale)
    if (
        first is None
        or last is None
        or math.isinf(absolute)
        or COMPOSITE.level_of(RULES[settings["rule"]]) is None
    ):
        return []
    least, change = min(abs(first["loss"]), abs(last["loss"])), abs(last["loss"] - first["loss"])
    rounding = PRECISIONS[settings["precision"]].rounding * least
    advice = f"{_advice(tolerance, first['loss'], change, rounding)} {_BEGUN}"
    option = f"--tolerance {tolerance}" + (f" (here {absolute:.2g})" if is_share(tolerance) else "")
    if absolute < rounding:
        return [
            f"loss {name!r}: {option} is below the rounding of a loss of {least:.2g} in "
            f"{settings['precision']}, about {rounding:.2g}: segments will use all "
            f"{2**COMPOSITE.finest} intervals and stay above it. {advice}"
        ]
    if record.on is not None and 0 < change < 10 * absolute:
        return [
            f"loss {name!r}: {option} is more than a tenth of its total change "
            f"({change:.2g} from the first checkpoint to the last, on a sample), so hardly any "
            f"segment will be refined. {advice}"
        ]
    return []


def _advice(tolerance: float | str, first: float, change: float, rounding: float) -> str:
    """Return the option to use instead: a share of the loss where that fits, else a hundredth of
    the change.
    """
    if not is_share(tolerance) and rounding <= abs(first) / 1000 <= change / 10:
        return "Give --tolerance 0.1%, a share of the loss at the first checkpoint."
    if change / 100 > rounding:
        return f"Give --tolerance {change / 100:.1g}, a hundredth of the change."
    return "Its change is near its rounding: give --precision float64, or --tolerance inf."


def _idle(manifest: Manifest, workers: int) -> list[str]:
    """Describe workers of the cluster that will be idle."""
    if manifest.spans >= workers:
        return []
    work = (
        count(manifest.segments, "segment")
        if manifest.span == 1
        else f"{count(manifest.spans, 'span')}, cut when the run was created,"
    )
    return [
        f"{work} keep{'s' * (manifest.spans == 1)} at most {manifest.spans} of {workers} workers "
        "busy"
    ]


def unwrapped(answer: Answer | Failure) -> Answer:
    """Return a worker's answer, or raise the error it met; a SpanError becomes an InputError,
    because no span has begun.
    """
    if isinstance(answer, Failure):
        error = answer.exception()
        raise (InputError(str(error)) if isinstance(error, SpanError) else error) from RuntimeError(
            answer.trace
        )
    return answer


def choose_span(segments: int, workers: int, elements: int, keep: str, of_examples: int = 0) -> int:
    """Return the segments per span: a power of two, at most 32, with at least two spans for each of
    several workers.

    A span holds at most 256 MiB of allocation where that is kept, or 8 segments: the totals of each
    span wait on disk, 19 bytes a parameter. Numbers of examples take at most as much.

    Args:
        segments: of the run.
        workers: that share the spans.
        elements: of all tensors whose allocation is kept.
        keep: a level of `--keep`.
        of_examples: numbers of single examples kept for a segment.
    """
    most = min(_LONGEST_SPAN, max(1, segments if workers == 1 else segments // (2 * workers)))
    if holds(keep, "parameters"):
        most = min(most, max(_SHORTEST_OF_LARGE, _SPAN_BYTES // (4 * max(1, elements))))
    most = min(most, max(1, _SPAN_BYTES // (4 * max(1, of_examples))))
    return int(2 ** (most.bit_length() - 1))


def choose_window(segments: int, span: int, keep: str, room: int) -> int:
    """Return the spans per window of totals: the fewest that give at most `room` windows; 1 where
    no totals are kept.

    Args:
        segments: of the run.
        span: segments per span.
        keep: a level of `--keep`.
        room: windows whose totals take at most a tenth of the space of the checkpoints.
    """
    if not holds(keep, "statistics"):
        return 1
    return -(-segments // (span * min(max(1, room), _WINDOWS)))


def relative(trajectory: Trajectory) -> list[Checkpoint]:
    """Return the checkpoints with their files relative to the trajectory's root, so that a
    directory can be moved.
    """
    return [
        replace(checkpoint, files=tuple(below(file, trajectory.root) for file in checkpoint.files))
        for checkpoint in trajectory.checkpoints
    ]


def _looked_at_in_both_modes(last: int) -> list[int]:
    """Return the positions of checkpoints where losses are evaluated with running statistics and
    with those of a batch.

    Args:
        last: position of the last checkpoint.
    """
    middle = (last - 1) // 2
    early = [index for index in _EARLY if index <= last]
    return sorted({0, 1, *early, middle, middle + 1, last - 1, last})


def _looked(trajectory: Trajectory) -> list[list[int]]:
    """Return where to search for a few segments that move, see `Sample`; the same for any part of
    the segments.
    """
    starts = trajectory.starts
    return [[starts[row] for row in rows] for rows in sampled(len(starts))]


def _sampled_points(
    trajectory: Trajectory, names: dict[str, str], modes: list[int]
) -> StoredPoints:
    """Return the checkpoints at which a task is probed, including those of `modes`."""
    starts = {index for places in _looked(trajectory) for index in places}
    positions = {*(end for index in starts for end in (index, index + 1)), *modes}
    positions.add(trajectory.first_there)
    checkpoints = relative(trajectory)
    return StoredPoints(
        root=absolute(trajectory.root),
        names=names,
        checkpoints={index: checkpoints[index] for index in sorted(positions)},
    )


def _record(
    name: str, key: str, loss: LossDescription, probed: ProbeAnswer, keep: str
) -> LossRecord:
    level = probed.levels[keep]
    # an existing loss needs neither scale nor sites
    sites = None if holds(keep, "units") and loss.per is None else probed.sites.get(name)
    return LossRecord(
        key=key,
        on=loss.on,
        kind=loss.kind,
        examples=loss.examples,
        total=loss.total,
        groups=loss.groups,
        counts=loss.counts,
        block=level.block[name],
        along=level.along[name],
        replicates=probed.replicates[name],
        batch_size=0 if loss.on is None else probed.batch_sizes.get(loss.on, 0),
        calibration=None,
        measured=probed.measured,
        identity=probed.identity[name],
        unit=unit_of_totals(known["loss"] for known in probed.identity[name] if known is not None),
        scale=probed.scale.get(name),
        sites=None if sites is None else sites.found,
        per=loss.per,
        rows=loss.rows if loss.per is not None else None,
        texts=probed.texts.get(name),
    )


def _chosen(trajectory: Trajectory, segments: str | None) -> list[int]:
    """Return the positions of the checkpoints that segments start from: all, or a random part in
    the order of drawing.
    """
    starts = trajectory.starts
    if segments is None:
        return starts
    return [starts[row] for row in SegmentSample.parse(segments).drawn(len(starts))]


def _known_tensors(patterns: list[str], table: list[TensorSpec]) -> None:
    """Reject a pattern of `--tensors` that matches no tensor with an allocation.

    Raises:
        InputError: naming the nearest tensors.
    """
    names = [tensor.name for tensor in table if tensor.kind != "state"]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = (
                f" Did you mean {pattern + '.*'!r}?"
                if any(name.startswith(f"{pattern}.") for name in names)
                else ""
            )
            raise InputError(
                f"--tensors {pattern!r} matches no tensor of the model.{near} It has "
                f"{', '.join(map(repr, names[:8]))}{f' and {len(names) - 8} more' if len(names) > 8 else ''}."
            )


def _known_splits(subsets: list[str], described: Description) -> None:
    """Reject a subset of a split that no chosen loss uses.

    Raises:
        InputError: naming the splits that losses use.
    """
    named = (described.statistics, *(loss.on for loss in described.losses.values()))
    splits = {split for split in named if split is not None}
    for split in parse_subsets(subsets):
        if split and split not in splits:
            raise InputError(
                f"--subset is for split {split!r}, which no chosen loss is on; they are on "
                f"{', '.join(map(repr, sorted(splits)))}."
            )


def _provenance(task: Entry, task_losses: list[str]) -> dict[str, Any]:
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": task.get("path") or task.get("module") or "an object",
        "task_function": task.get("function"),
        "task_sha256": digest(task),
        "task_losses": task_losses,
        "lca_posthoc": version("lca_posthoc"),
        **{name: version(name) for name in ("torch", "safetensors", "numpy", "zarr")},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
