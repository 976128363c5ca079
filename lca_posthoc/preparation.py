"""What stands before the first span: the task described, matched with the trajectory and probed, the run laid out."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .cluster import Cluster, Done, Lost, Spec
from .errors import InputError, Interrupted, ResourceError, SpanError, few, unpack
from .places import absolute, below
from .quadrature import COMPOSITE, RULES
from .records import ROUNDING, in_units_of_loss, is_share
from .settings import Settings
from .store import LossRecord, Manifest, StoredTensor
from .store.keys import encode_all
from .task import Entry, digest, parse_subsets
from .text import count
from .trajectory import Checkpoint, TensorSpec, Trajectory
from .worker import admit, describe, probe, sampled, versions

_SPAN_BYTES = 256 * 2**20
_LONGEST_SPAN = 32
_WINDOWS = 64
_BEGUN = "A run that has begun keeps its tolerance and its precision: with others, write another run with --out."
_EARLY = (2, 4, 16)  # checkpoints at which running statistics, which lag most early on, are looked at too


@dataclass(frozen=True)
class Preparation:
    """A probed task on a trajectory.

    `common` is what every spec to a worker holds, `probe_part` what a spec that evaluates at a few checkpoints holds beside it;
    `manifest` describes the run as it would be created now; `notes` are worth telling. `short_of` says what memory there is too
    little of, if any.
    """

    common: Spec
    probe_part: Spec
    manifest: Manifest
    notes: list[str]
    short_of: str | None

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Split → examples per batch."""
        return {record.on: record.batch_size for record in self.manifest.losses.values() if record.on is not None}


def prepare(
    cluster: Cluster,
    trajectory: Trajectory,
    task: Entry,
    parcel: str,
    wanted: list[str],
    settings: Settings,
    *,
    existing: Manifest | None = None,
    span: int | None = None,
    workers: int | None = None,
) -> Preparation:
    """Describe and probe a task on one worker of the cluster, and lay out the run.

    Args:
        cluster: where to ask.
        trajectory: the checkpoints.
        task: where the task is.
        parcel: the key of what was delivered of it.
        wanted: names of losses; empty for the first, `["all"]` for every one.
        settings: complete.
        existing: the run that is there already, whose batch sizes and keys hold.
        span: segments per span; chosen where None.
        workers: how many of this host will share the work; those of the cluster where None.

    Raises:
        InputError: for anything wrong with the task or its fit to the checkpoints.
        ResourceError: where the worker died.
        Interrupted: where the cluster drains.
    """
    held = sorted(trajectory.tensors)
    asked = {"task": task, "parcel": parcel, "settings": settings, "losses": wanted or None, "held": held}
    found = ask(cluster, describe, asked)
    _known_tensors(settings["tensors"], found["tensors"])
    if existing is None:
        _known_splits(settings["subset"], found["losses"], found["statistics"])
    table = [
        TensorSpec(**{**each, "shape": tuple(each["shape"]), "aliases": tuple(each["aliases"])})
        for each in found["tensors"]
    ]
    without = ([*found["fixed"], *found["added"]], found["patterns"], found["unstored"])
    names = trajectory.match(table, *without)
    common = {
        "task": task,
        "parcel": parcel,
        "settings": settings,
        "losses": list(found["losses"]),
        "names": names,
        "held": held,
        "root": absolute(trajectory.root),
        "digests": found["digests"],
    }
    recorded = existing.losses if existing else {}
    batch_sizes = {record.on: record.batch_size for record in recorded.values() if record.on is not None}
    segments = len(trajectory.checkpoints) - 1
    span = span or choose_span(segments, workers or cluster.workers, sum(spec.elements for spec in table))
    probe_part = {
        **_probe_part(trajectory, table),
        "fixed": trajectory.sources_of(found["fixed"]),
        "leftovers": trajectory.leftovers(table, *without),
        "workers": workers or cluster.crowd,
        "span": existing.span if existing else span,
    }
    probed = ask(cluster, probe, {**common, **probe_part, "recorded": list(recorded), "batch_sizes": batch_sizes})
    if probed["statistics"] is not None:
        settings = {**settings, "statistics": probed["statistics"]}
        common["settings"] = settings
    keys = encode_all(found["losses"], [record.key for record in recorded.values()])
    tensor_keys = encode_all(spec.name for spec in table)
    manifest = Manifest(
        root=absolute(trajectory.root),
        tensors=[StoredTensor(spec, names[spec.name], tensor_keys[spec.name]) for spec in table],
        checkpoints=relative(trajectory),
        span=span,
        window=_choose_window(segments, span),
        settings=settings,
        losses={name: _record(name, keys[name], loss, probed) for name, loss in found["losses"].items()},
        provenance=_provenance(task, found["task_losses"]),
    )
    added = list(trajectory.sources_of(found["added"]))
    new = {name: record for name, record in manifest.losses.items() if name not in recorded}
    scales = [note for name, record in new.items() for note in _scale(name, record, settings)]
    notes = [
        *probed["notes"],
        *scales,
        *_frozen(found["frozen"]),
        *_added(added),
        *_idle(existing or manifest, workers or cluster.workers),
    ]
    return Preparation(common, probe_part, manifest, notes, probed["short_of"])


def ask(cluster: Cluster, work: Callable[[Spec], Spec], spec: Spec) -> Spec:
    """One answer from one worker."""
    for outcome in cluster.map(work, [spec]):
        if isinstance(outcome, Lost):
            raise ResourceError(
                f"a worker died while it looked at the task ({outcome.why}). Often memory: try fewer --workers or a smaller "
                "--batch-size, or --cluster inline to see the cause."
            )
        if isinstance(outcome, Done) and outcome.result is not None:
            return unwrapped(outcome.result)
    raise Interrupted("stopped before the first span.")


def muster(cluster: Cluster, trajectory: Trajectory, device: str | None, token: tuple[Path, str]) -> list[str]:
    """Ask every worker that somebody else started whether it can take part, and settle on a device.

    Args:
        cluster: they are of.
        trajectory: the checkpoints they must read.
        device: "cuda", "cpu", or None for a GPU if every worker sees one.
        token: a file of the run's directory, which they must see and be able to write beside, and its text.

    Returns:
        Notes worth telling.

    Raises:
        ResourceError: naming the workers that cannot, why, and what to do.
    """
    checkpoints = relative(trajectory)
    ends = [as_json(checkpoints[0]), as_json(checkpoints[-1])]
    driver = {"versions": versions(), "device": device, "token": [str(token[0]), token[1]], "checkpoints": ends}
    answers = cluster.muster(admit, {"driver": driver, "root": absolute(trajectory.root)})
    refused = [
        f"worker {name} {error['message'] if isinstance(error, dict) else error}"
        for name, answer in answers.items()
        if (error := answer.get("error")) is not None
    ]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ResourceError(f"{'; '.join(refused[:3])}{more}.")
    cluster.settle_on(device or ("cuda" if all(answer["cuda"] for answer in answers.values()) else "cpu"))
    return _sharing(cluster.device, cluster.several_threads, answers)


def _sharing(device: str | None, several: Sequence[str], answers: dict[str, Spec]) -> list[str]:
    """What makes workers slower than they could be."""
    notes = []
    if several:
        notes.append(
            f"worker{'s' if len(several) > 1 else ''} {', '.join(several[:3])} ha{'ve' if len(several) > 1 else 's'} more than one thread, "
            "but a worker computes one span at a time: start more workers with --nthreads 1"
        )
    if device == "cuda":
        held: dict[str, list[str]] = {}
        for name, answer in answers.items():
            held.setdefault(answer["gpu"], []).append(name)
        notes += [
            f"workers {', '.join(names)} share one GPU: give each its own with CUDA_VISIBLE_DEVICES"
            for names in held.values()
            if len(names) > 1
        ]
    return notes


def _added(names: list[str]) -> list[str]:
    """What checkpoints hold of the state dict that is no tensor of the model's own."""
    if not names:
        return []
    return [
        f"the checkpoints hold {few([*map(repr, names)])}, which in the task's model {'are' if len(names) > 1 else 'is'} no parameter or "
        "buffer but made by a hook of its state dict or by get_extra_state: the model keeps its own"
    ]


def _frozen(names: list[str]) -> list[str]:
    """Frozen parameters that are the task's own."""
    if not names:
        return []
    return [
        f"no checkpoint holds {few([*map(repr, names)])}, frozen in the task's model: they stay as it builds them, which must be as they "
        "were in training"
    ]


def _scale(name: str, record: LossRecord, settings: Settings) -> list[str]:
    """Say where a tolerance cannot be met, or is met by everything, for the size of a loss and of its change."""
    tolerance, (first, last) = settings["tolerance"], record.identity
    absolute = in_units_of_loss(tolerance, record.scale)
    if first is None or last is None or math.isinf(absolute) or COMPOSITE.level_of(RULES[settings["rule"]]) is None:
        return []
    least, change = min(abs(first["loss"]), abs(last["loss"])), abs(last["loss"] - first["loss"])
    rounding = ROUNDING[settings["precision"]] * least
    advice = f"{_advice(tolerance, first['loss'], change, rounding)} {_BEGUN}"
    asked = f"--tolerance {tolerance}" + (f" (here {absolute:.2g})" if is_share(tolerance) else "")
    if absolute < rounding:
        return [
            f"loss {name!r}: {asked} is below the rounding of a loss of {least:.2g} in {settings['precision']}, about {rounding:.2g}: "
            f"segments will take all {2**COMPOSITE.finest} intervals and stay above it. {advice}"
        ]
    if record.on is not None and 0 < change < 10 * absolute:
        return [
            f"loss {name!r}: {asked} is more than a tenth of what it changes by in all ({change:.2g} from the first checkpoint to the "
            f"last, on a sample), so hardly any segment will be refined. {advice}"
        ]
    return []


def _advice(tolerance: float | str, first: float, change: float, rounding: float) -> str:
    """Return the option to give instead: a share of the loss where that fits, else a hundredth of the change."""
    if not is_share(tolerance) and rounding <= abs(first) / 1000 <= change / 10:
        return "Give --tolerance 0.1%, a share of the loss at the first checkpoint."
    if change / 100 > rounding:
        return f"Give --tolerance {change / 100:.1g}, a hundredth of the change."
    return "What it changes by is near its rounding: give --precision float64, or --tolerance inf."


def _idle(manifest: Manifest, workers: int) -> list[str]:
    """What cannot be spread over the workers there are."""
    if manifest.spans >= workers:
        return []
    what = (
        count(manifest.segments, "segment")
        if manifest.span == 1
        else f"{count(manifest.spans, 'span')}, cut when the run was created,"
    )
    return [f"{what} keep{'s' * (manifest.spans == 1)} at most {manifest.spans} of {workers} workers busy"]


def unwrapped(answer: Spec) -> Spec:
    """A worker's answer, or the error it met; before the first span that is never "some spans failed"."""
    if "error" in answer:
        error = unpack(answer["error"])
        raise (InputError(str(error)) if isinstance(error, SpanError) else error) from RuntimeError(answer["trace"])
    return answer


def choose_span(segments: int, workers: int, elements: int) -> int:
    """Segments per span: a power of two, at most 32, at most 256 MiB of allocation, at least two spans per worker."""
    most = min(_LONGEST_SPAN, max(1, segments // (2 * workers)), max(1, _SPAN_BYTES // (4 * max(1, elements))))
    return int(2 ** (most.bit_length() - 1))


def _choose_window(segments: int, span: int) -> int:
    """Spans per window of totals: a power of two that gives at most 64 windows."""
    window = 1
    while -(-segments // (span * window)) > _WINDOWS:
        window *= 2
    return window


def relative(trajectory: Trajectory) -> list[Checkpoint]:
    """Checkpoints with their files relative to the trajectory's root, so that a directory can be moved."""
    return [
        Checkpoint(each.step, tuple(below(file, trajectory.root) for file in each.files), each.size, each.fingerprint)
        for each in trajectory.checkpoints
    ]


def as_json(checkpoint: Checkpoint) -> list[Any]:
    """A checkpoint inside a spec."""
    return [checkpoint.step, [str(file) for file in checkpoint.files], checkpoint.size, checkpoint.fingerprint]


def _probe_part(trajectory: Trajectory, table: list[TensorSpec]) -> dict[str, Any]:
    ends = len(trajectory.checkpoints) - 1
    looked = {index for places in sampled(ends) for index in places}
    middle = (ends - 1) // 2
    modes = sorted({0, 1, *(index for index in _EARLY if index <= ends), middle, middle + 1, ends - 1, ends})
    wanted = {*(end for index in looked for end in (index, index + 1)), *modes}
    checkpoints = relative(trajectory)
    return {
        "ends": ends,
        "modes": modes,
        "half": trajectory.half_precision,
        "ties": trajectory.ties(table),
        "checkpoints": {str(index): as_json(checkpoints[index]) for index in sorted(wanted)},
    }


def _record(name: str, key: str, loss: dict[str, Any], probed: Spec) -> LossRecord:
    return LossRecord(
        key=key,
        on=loss["on"],
        kind=loss["kind"],
        examples=loss["examples"],
        total=loss["total"],
        groups=loss["groups"],
        counts=loss["counts"],
        block=probed["block"][name],
        along=probed["along"][name],
        replicates=probed["replicates"][name],
        batch_size=probed["batch_sizes"].get(loss["on"], 0),
        calibration=probed["calibration"][name],
        measured=probed["measured"],
        identity=probed["identity"][name],
        scale=probed["scale"].get(name),
    )


def _known_tensors(patterns: list[str], tensors: list[dict[str, Any]]) -> None:
    names = [each["name"] for each in tensors if each["kind"] != "state"]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = f" Did you mean {pattern + '.*'!r}?" if any(name.startswith(f"{pattern}.") for name in names) else ""
            raise InputError(
                f"--tensors {pattern!r} matches no tensor of the model.{near} It has {', '.join(map(repr, names[:8]))}"
                f"{f' and {len(names) - 8} more' if len(names) > 8 else ''}."
            )


def _known_splits(subsets: list[str], losses: dict[str, Any], of_statistics: str | None) -> None:
    splits = {of_statistics, *(loss["on"] for loss in losses.values())} - {None}
    for split in parse_subsets(subsets):
        if split and split not in splits:
            raise InputError(
                f"--subset is for split {split!r}, which no chosen loss is on; they are on {', '.join(map(repr, sorted(splits)))}."
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
