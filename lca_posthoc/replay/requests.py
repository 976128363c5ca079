"""Define the questions a driver asks its workers, their answers, and the conversion to and from
plain data.

A scheduler sees plain data alone (JSON-like, plus bytes): `to_plain` converts where it is sent,
`from_plain` where it arrives. Both ends check every field by its type; an unknown or a missing
field is an error.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..checkpoints.paths import is_path, path_of
from ..checkpoints.trajectory import Checkpoint, TensorSpec
from ..cluster import Spec
from ..errors import LCAError, PackedError, unpack_error
from ..numerics.nodes import Node
from ..numerics.schema import DirectionsRecord, RecalibrationRecord, SiteRecord
from ..tasks.task import Entry

T = TypeVar("T")
A = TypeVar("A")

# --- the fields all questions share ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that workers compute by, under the names of `settings.Settings`.

    `statistics` is what recalibration settled when the run was created; None before, and in other
    modes. `directions` is the file of `--along`; None without it.
    """

    device: str
    precision: str
    precision_check: str
    norm_stats: str
    batch_size: int | None
    subset: list[str]
    tensors: list[str]
    signal: str | None
    path_band: str
    rule: str
    tolerance: float | str
    allocation_tolerance: float | str
    statistics: RecalibrationRecord | None
    directions: DirectionsRecord | None

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> RunSettings:
        """Select these settings from all settings of a run."""
        settled = ("statistics", "directions")
        names = [field.name for field in fields(cls) if field.name not in settled]
        plain = {name: settings[name] for name in names}
        return from_plain(cls, plain | {name: settings.get(name) for name in settled})


@dataclass(frozen=True, kw_only=True)
class TaskSetup:
    """The task that a worker builds.

    Attributes:
        task: where it is, see `task.pack_task`.
        parcel: the key of the bytes that were delivered for it.
        settings: of the run.
        losses: their names; empty for the task's first, `["all"]` for every one.
        stored: the names of all tensors inside the checkpoints; None where they do not matter.
        digests: of the data and of the tensors that no checkpoint holds, where the task was
            described; empty before.
    """

    task: Entry
    parcel: str
    settings: RunSettings
    losses: list[str]
    stored: list[str] | None
    digests: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class StoredPoints:
    """Some checkpoints of a trajectory by position, with files relative to `root`; `names` maps
    tensors to names inside the files.
    """

    root: str
    names: dict[str, str]
    checkpoints: dict[int, Checkpoint]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The checkpoints at which a task is probed before its first span, and sizes of the run.

    Attributes:
        points: these checkpoints.
        last: position of the last checkpoint of the trajectory.
        looked: places to search for a few segments that move, by the checkpoints they start from;
            each search ends at the first segment that moves.
        workers_per_host: how many share the memory of a host.
        span_length: segments of a span.
        first: position of the first checkpoint whose files exist; those before it were removed
            after their replay.
    """

    points: StoredPoints
    last: int
    looked: list[list[int]]
    workers_per_host: int
    span_length: int
    first: int = 0


class Question(Generic[A]):
    """A request whose answer is an `A`."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error of a worker, packed by `errors.pack_error`, and where it was raised."""

    error: PackedError
    trace: str

    def exception(self) -> LCAError:
        """Return the error as an exception."""
        return unpack_error(self.error)


# --- may this worker take part? -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A worker that can take part: whether it sees a GPU, and the identifier of the first one."""

    cuda: bool
    gpu: str | None


@dataclass(frozen=True, kw_only=True)
class AdmissionRequest(Question[Admission]):
    """The driver's description of itself, for a worker that somebody else started.

    Attributes:
        versions: of Python and of the packages that decide bits.
        device: "cuda" or "cpu"; None where the workers decide.
        token: a file in the run's directory, which the worker must see and be able to write beside.
        text: the contents of that file.
        root: of the checkpoints.
        checkpoints: some that the worker must be able to read, files relative to `root`.
    """

    versions: dict[str, str]
    device: str | None
    token: Path
    text: str
    root: str
    checkpoints: list[Checkpoint]


# --- what is the task? ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossDescription:
    """The description of one loss.

    It has the loss's split (None for a term of the parameters), its kind, its number of examples
    out of the split's total, its groups, the axis and number of its per-example results, and
    whether its examples can only be read in order, from the start at every pass.
    """

    on: str | None
    kind: str
    examples: int
    total: int
    groups: list[int] | list[str] | None
    counts: list[int] | None
    per: str | None
    rows: int
    in_order_only: bool


@dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of a task.

    Attributes:
        tensors: of the model, those that checkpoints hold.
        losses: the chosen ones; a loss that returns a dict has one for every entry.
        task_losses: the names of all of the task's losses.
        digests: see `TaskSetup`.
        frozen: parameters that no checkpoint holds.
        fixed: tensors that stay as the task's model builds them.
        added: names that hooks add to the model's state dict.
        patterns: of tensors the task fixes.
        unstored: buffers outside the state dict.
        statistics: the split on which statistics are recalibrated; None in other modes.
    """

    tensors: list[TensorSpec]
    losses: dict[str, LossDescription]
    task_losses: list[str]
    digests: dict[str, str]
    frozen: list[str]
    fixed: list[str]
    added: list[str]
    patterns: list[str]
    unstored: list[str]
    statistics: str | None


@dataclass(frozen=True, kw_only=True)
class TaskRequest(Question[A]):
    """A question about a task; every question is one, except admission."""

    setup: TaskSetup


@dataclass(frozen=True, kw_only=True)
class DescribeRequest(TaskRequest[Description]):
    """Describe the task."""


# --- can it be replayed, and at what cost? --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleRequest(TaskRequest[A]):
    """A question about a task on a sample of the trajectory; `batch_sizes` holds the recorded ones,
    by split.
    """

    sample: Sample
    batch_sizes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class LevelMemory:
    """The memory that a replay needs at one level of `--keep`.

    Attributes:
        needs: bytes a worker needs beside model and data while it replays all new losses.
        block: by loss, the groups evaluated at a time; None for all.
        along: by loss, the grouped loss whose order the batches follow.
    """

    needs: float
    block: dict[str, int | None]
    along: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The places of a loss's examples in the model's computations, or why they cannot be separated;
    None and "" where batches follow the order of the data.
    """

    found: list[SiteRecord] | None
    why: str


@dataclass(frozen=True, kw_only=True)
class ProbeAnswer:
    """The outcome of a probe, by loss unless stated. See `store.LossRecord` for what a run records
    of it.

    Attributes:
        batch_sizes: of each split.
        identity: at the first and the last checkpoint; None where not finite.
        levels: the memory a replay needs, by level of `--keep`.
        free_memory: bytes that are free for each worker beside model and data.
        scale: |loss| at the first checkpoint, where a tolerance is a share of it.
        replicates: random parts, for standard errors.
        sites: where the examples are in the model's computations.
        texts: of the examples, by `Task.show`, for losses with per-example results; None where
            there are too many.
        measured: whether a few segments can be evaluated one precision higher as well.
        statistics: what recalibration settled; None in other modes.
        notes: for the user.
    """

    batch_sizes: dict[str, int]
    identity: dict[str, list[dict[str, float] | None]]
    levels: dict[str, LevelMemory]
    free_memory: float
    scale: dict[str, float]
    replicates: dict[str, int]
    sites: dict[str, Sites]
    texts: dict[str, list[str] | None]
    measured: bool
    statistics: RecalibrationRecord | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class ProbeRequest(SampleRequest[ProbeAnswer]):
    """Check that the task can be replayed on these checkpoints, and identify its losses.

    Attributes:
        modes: positions of checkpoints where running statistics are checked.
        half: tensors stored with fewer than 32 bits a number.
        ties: maps a tensor to the names inside the files that must hold one value.
        fixed: maps a tensor the task fixes to its name inside the files.
        leftovers: maps a tensor that only the checkpoints hold to its name inside the files.
        recorded: the losses the run already has.
    """

    modes: list[int]
    half: list[str]
    ties: dict[str, list[str]]
    fixed: dict[str, str]
    leftovers: dict[str, str]
    recorded: list[str]


@dataclass(frozen=True, kw_only=True)
class Calibrations:
    """The trapezoid's error as a share of Σ|(g₁ − g₀)·Δθ|, by loss; None where no sampled segment
    moves.
    """

    shares: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class CalibrationsRequest(SampleRequest[Calibrations]):
    """Calibrate the trapezoid's error of some losses.

    Attributes:
        keep: the level of `--keep`, which decides whether the error is of sums or of parameters.
        along: the losses, each with the grouped loss whose order its batches follow.
    """

    keep: str
    along: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Compressions:
    """The share of bytes that compression leaves of each kind of array, by loss; see
    `results.compressed_share`.
    """

    compressed: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class CompressionsRequest(SampleRequest[Compressions]):
    """Compress a sample of allocations, in a window of totals over `segments_of_window`."""

    segments_of_window: int


@dataclass(frozen=True, kw_only=True)
class LossCosts:
    """The costs of one evaluation of a loss.

    Attributes:
        seconds: of value and gradient.
        forward: of these seconds, those of the forward pass.
        higher: seconds of an evaluation one precision higher; 0 where there is none.
        fastest: the batch size that took the least time of those tried; 0 for a term of the
            parameters.
        largest: the largest batch size that fits in memory; 0 for a term of the parameters.
        examples: seconds of computing every example's share along two motions; 0 where there is
            none.
    """

    seconds: float
    forward: float
    higher: float
    fastest: int
    largest: int
    examples: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of evaluating, in seconds and bytes.

    Attributes:
        losses: each on its own.
        compressed: see `Compressions`.
        together: seconds of one evaluation of all losses, passes shared, by level of `--keep`.
        higher: the same, one precision higher.
        recalibrating: seconds of a pass that recalibrates statistics; 0 in other modes.
        memory: bytes a worker needs, by level of `--keep`.
    """

    losses: dict[str, LossCosts]
    compressed: dict[str, dict[str, float]]
    together: dict[str, float]
    higher: float
    recalibrating: float
    memory: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class CostsRequest(SampleRequest[Costs]):
    """Time a few batches; `measured` tells whether some segments are evaluated one precision higher
    as well.
    """

    segments_of_window: int
    measured: bool


# --- replay ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunRequest(TaskRequest[A]):
    """A question about a run that is laid out.

    Attributes:
        points: the checkpoints it reads.
        run: the directory.
        batch_sizes: of each split.
    """

    points: StoredPoints
    run: str
    batch_sizes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class LossesAnswer:
    """Losses over all of their data, groups averaged; losses that cannot be evaluated are missing."""

    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LossesRequest(RunRequest[LossesAnswer]):
    """Evaluate losses at checkpoints; `meetings` maps positions of checkpoints to names of losses."""

    meetings: dict[int, list[str]]


@dataclass(frozen=True, kw_only=True)
class LossSpan:
    """One loss on one span; its marker records all of it.

    Attributes:
        evaluations: of gradients.
        forward_passes: without a gradient.
        batch_size: 0 for a term of the parameters.
        worst_residual: the largest |residual| of a segment.
        unconverged: segments that did not reach their tolerances.
        silent: tensors that moved but that no gradient reached.
        hidden: those of them that the loss depends on nevertheless.
        ends: the loss at the first and the last checkpoint, groups averaged.
    """

    evaluations: int
    forward_passes: int
    batch_size: int
    worst_residual: float
    unconverged: int
    silent: list[str]
    hidden: list[str]
    ends: list[float]

    @classmethod
    def of(cls, marker: Mapping[str, Any]) -> LossSpan:
        """Read the fields from a marker; older markers lack `hidden`."""
        summary = {"hidden": [], **marker}
        return from_plain(cls, {field.name: summary[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class SpanAnswer:
    """A span that is committed for all of its pending losses: segments, seconds of its worker, and
    the worker's peak memory in bytes.
    """

    losses: dict[str, LossSpan]
    segments: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class SpanRequest(RunRequest[SpanAnswer]):
    """Replay one span.

    Attributes:
        durable: whether to flush it to disk before it counts.
        span: its number.
        pending: the losses to replay: those computed whole, or those whose sums over shards are
            complete.
        looks_back: segments to check, which tell whether anything moved in its stretch of segments
            before it; None where something did, or nothing comes before it.
    """

    durable: bool
    span: int
    pending: list[str]
    looks_back: list[int] | None


@dataclass(frozen=True, kw_only=True)
class ShardAnswer:
    """Sums over shards that are written: seconds of their worker, and its peak memory in bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardRequest(RunRequest[ShardAnswer]):
    """Evaluate losses over some shards of their data at nodes of a span.

    Attributes:
        durable: whether to flush the sums to disk before they count.
        span: its number.
        losses: at every node.
        nodes: where.
        shards: their numbers; a loss with fewer shards uses those that it has.
        distances: segments whose Σ|θ′ − θ| is needed too.
        file: name of the file for the sums.
    """

    durable: bool
    span: int
    losses: list[str]
    nodes: list[Node]
    shards: list[int]
    distances: list[int]
    file: str


def work_of(spec: Spec) -> SpanRequest | ShardRequest:
    """Return the replay request that plain data encodes."""
    if "shards" in spec:
        return from_plain(ShardRequest, spec)
    return from_plain(SpanRequest, spec)


# --- to and from plain data -----------------------------------------------------------------------


def to_plain(request: object) -> Spec:
    """Convert a request or an answer to plain data: dictionaries with string keys, lists, strings,
    numbers, bytes, None.

    >>> to_plain(LossesAnswer(losses={"train": 0.5}))
    {'losses': {'train': 0.5}}

    Raises:
        TypeError: if it holds anything else, such as a tensor.
    """
    plain = _plain(request)
    if not isinstance(plain, dict):
        raise TypeError(f"a request or an answer is a dataclass, not {type(request).__name__}.")
    return plain


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain_key(key): _plain(item) for key, item in value.items()}
    if is_path(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} is no plain data and is not sent between processes.")


def _plain_key(key: object) -> str:
    if not isinstance(key, str | int):
        raise TypeError(f"a key is a text or a whole number, not {type(key).__name__}.")
    return str(key)


def from_plain(kind: type[T], plain: object) -> T:
    """Return the request or the answer that plain data encodes, the inverse of `to_plain`.

    >>> from_plain(LossesAnswer, {"losses": {"train": 0.5}})
    LossesAnswer(losses={'train': 0.5})
    >>> from_plain(LossesAnswer, {"loss": {}})
    Traceback (most recent call last):
    ValueError: LossesAnswer: fields are missing (losses) or unknown (loss).

    Args:
        kind: the class of the request or answer.
        plain: as `to_plain` returns it.

    Raises:
        ValueError: naming the field that is missing, unknown, or of another type.
    """
    try:
        return typing.cast("T", _read(kind, plain))
    except ValueError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


def answered(request: type[Question[A]], plain: object) -> A | Failure:
    """Return a worker's answer to a kind of request, or the error it met.

    Args:
        request: the class of the request.
        plain: the answer or the error, as plain data.
    """
    if isinstance(plain, dict) and "error" in plain:
        return from_plain(Failure, plain)
    return from_plain(_answer_of(request), plain)


def _answer_of(request: type[Question[A]]) -> type[A]:
    """Return the type argument of a request's base class."""
    (base,) = vars(request)["__orig_bases__"]
    return typing.cast("type[A]", typing.get_args(base)[0])


@functools.cache
def _types(kind: type) -> dict[str, object]:
    """Return the types of a dataclass's fields."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _read(kind: Any, plain: object) -> object:
    if is_dataclass(kind):
        return _read_fields(typing.cast("type", kind), plain)
    if typing.is_typeddict(kind):
        return _read_items(kind, plain)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _read_any_of(inner, plain)
    if origin in (list, tuple) and isinstance(plain, list | tuple):
        return origin(_read(inner[0], item) for item in plain)
    if origin is dict and isinstance(plain, dict):
        key_of = int if inner[0] is int else str
        return {key_of(key): _read(inner[1], item) for key, item in plain.items()}
    if kind is Any or (kind is types.NoneType and plain is None):
        return plain
    if kind is Path and isinstance(plain, str):
        return path_of(plain)
    if kind in (str, bytes, bool) and isinstance(plain, kind):
        return plain
    if kind in (int, float) and isinstance(plain, int | kind) and not isinstance(plain, bool):
        return plain
    raise ValueError(f"expected {getattr(kind, '__name__', kind)}, not {str(plain)[:100]!r}.")


def _read_fields(kind: type, plain: object) -> object:
    if not isinstance(plain, dict):
        raise ValueError(f"expected the fields of {kind.__name__}, not {str(plain)[:100]!r}.")
    hints = _types(kind)
    if plain.keys() != hints.keys():
        missing, unknown = (
            ", ".join(map(str, names)) or "none" for names in _difference(hints, plain)
        )
        raise ValueError(f"fields are missing ({missing}) or unknown ({unknown}).")
    values = {}
    for name, hint in hints.items():
        try:
            values[name] = _read(hint, plain[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return kind(**values)


def _read_items(kind: Any, plain: object) -> object:
    """Read a `TypedDict`, whose entries may be optional.

    Raises:
        ValueError: naming the entry that is missing or unknown.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"expected the entries of {kind.__name__}, not {str(plain)[:100]!r}.")
    hints = typing.get_type_hints(kind, include_extras=True)
    unknown = [str(name) for name in plain if name not in hints]
    if unknown:
        raise ValueError(f"entries are unknown ({', '.join(unknown)}).")
    values = {}
    for name, hint in hints.items():
        marked = typing.get_origin(hint) in (typing.Required, typing.NotRequired)
        required = typing.get_origin(hint) is typing.Required if marked else kind.__total__
        if name in plain:
            values[name] = _read(typing.get_args(hint)[0] if marked else hint, plain[name])
        elif required:
            raise ValueError(f"the entry {name} is missing.")
    return values


def _difference(
    expected: Mapping[str, object], plain: Mapping[str, object]
) -> tuple[list[str], list[str]]:
    return [name for name in expected if name not in plain], [
        name for name in plain if name not in expected
    ]


def _read_any_of(kinds: tuple[Any, ...], plain: object) -> object:
    if plain is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        try:
            return _read(kind, plain)
        except ValueError as error:
            problem = error
    raise problem
