"""The state of a worker process: the model and the data, built once in a cache keyed by what they
were built from; checkpoints on the device; one way of computing, and failures as plain strings.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from ...checkpoints.paths import located
from ...checkpoints.trajectory import Checkpoint, read_checkpoint
from ...cluster import Spec, Unusable, delivered
from ...errors import InputError, LCAError, ResourceError, SpanError, pack_error
from ...tasks import task
from ..requests import Failure, StoredPoints, TaskRequest, TaskSetup, from_plain, to_plain

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective
    from ..requests import Sample

Point = dict[str, "Tensor"]
Asked = TypeVar("Asked")

_STATES: OrderedDict[str, Objective] = OrderedDict()
# a model holds the values of one point, also where a worker has several threads
_ONE_AT_A_TIME = threading.RLock()
_KEPT = 2


def objective_of(setup: TaskSetup) -> Objective:
    """Return the objective of a task, built once per process."""
    task.use(setup.task, delivered(setup.parcel))
    key = _key(setup, setup.losses)
    if key not in _STATES:
        while len(_STATES) >= _KEPT:
            _STATES.popitem(last=False)
        built = build(setup, setup.settings.precision)
        _recall_statistics(built, setup)  # they are of data that must be the same too
        _same_data(built, setup)
        key = _key(setup, list(built.losses))  # by name, however they were asked for
        _STATES[key] = built
    _STATES.move_to_end(key)
    _recall_statistics(_STATES[key], setup)
    return _STATES[key]


def divided(setup: TaskSetup, objective: Objective) -> Objective:
    """Return the objective with a loss for every entry of losses that return a dict, which later
    requests name.
    """
    other = objective.divided()
    if other is not objective:
        _STATES.pop(_key(setup, list(objective.losses)), None)
        _STATES[_key(setup, list(other.losses))] = other
    return other


def _recall_statistics(objective: Objective, setup: TaskSetup) -> None:
    """Recalibrate as was settled when the run was created, if it was yet."""
    if objective.recalibration is not None:
        objective.recalibration.recall(setup.settings.statistics)


def _key(setup: TaskSetup, losses: list[str]) -> str:
    place = [setup.task.get(name) for name in ("kind", "path", "module", "function")]
    settings = setup.settings
    built_by = [
        settings.device,
        settings.precision,
        settings.norm_stats,
        settings.batch_size,
        settings.subset,
    ]
    return json.dumps(
        [place, task.digest(setup.task), losses, built_by, setup.stored], sort_keys=True
    )


def _same_data(objective: Objective, setup: TaskSetup) -> None:
    """Refuse a task that builds other data here than it did where it was probed."""
    digests = objective.digests if setup.digests else {}
    for what, digest in setup.digests.items():
        if digests[what] != digest:
            raise InputError(
                f"{what} is not the same in this worker process as where the task was probed: it "
                "is made anew in every process. Usual culprits: random augmentation, random_split "
                "without a seeded generator, tensors that checkpoints do not hold (frozen ones, "
                "Task.fixed, buffers) and the model builds at random."
            )


def build(setup: TaskSetup, precision: str) -> Objective:
    """Build the objective of a task in a precision, anew."""
    import torch

    from ...numerics.objective import ObjectiveSettings, build_objective

    settings = setup.settings
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no GPU is visible to this worker. Use --device cpu, or make one visible with "
            "CUDA_VISIBLE_DEVICES."
        )
    with _deterministic():  # once more: what the task's own code sets ends with this
        return build_objective(
            lambda: task.load(setup.task, delivered(setup.parcel)),
            setup.losses,
            ObjectiveSettings(
                device=device,
                precision=precision,
                norm_stats=settings.norm_stats,
                batch_size=settings.batch_size,
                subset=task.parse_subsets(settings.subset),
                stored=None if setup.stored is None else frozenset(setup.stored),
            ),
        )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Compute on one thread of the CPU, float32 as float32 everywhere, one kernel with and without
    gradients; put all back afterwards.
    """
    import torch

    from ...numerics.objective import float32

    cudnn = torch.backends.cudnn
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    kernels = cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with float32():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
        cudnn.benchmark, cudnn.deterministic = kernels


def reported(kind: type[Asked]) -> Callable[[Callable[[Asked], object]], Callable[[Spec], Spec]]:
    """Make a function that answers requests of a kind a task on plain data.

    Failures come back as plain strings: an exception that cannot be unpickled elsewhere would hide
    its cause.
    """

    def task_of(work: Callable[[Asked], object]) -> Callable[[Spec], Spec]:
        @functools.wraps(work)
        def reported(spec: Spec) -> Spec:
            from ...numerics.objective import spoils_device

            request: Asked | None = None
            try:
                request = from_plain(kind, spec)
                with _ONE_AT_A_TIME, _deterministic():
                    return to_plain(work(request))
            except Exception as error:
                if spoils_device(error):
                    raise Unusable(f"{type(error).__name__}: {error}") from None
                problem = error if isinstance(error, LCAError) else _as_ours(error, request)
                return to_plain(Failure(error=pack_error(problem), trace=traceback.format_exc()))

        return reported

    return task_of


def _as_ours(error: Exception, request: object) -> LCAError:
    """Return an error of ours that says what another one says, and what to do where that is
    known.
    """
    from ...numerics.objective import is_out_of_memory, without_cudnn

    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(
                f"no space left for the result ({error}). Free some and run again."
            )
        return SpanError(str(error))
    if is_out_of_memory(error):
        size = request.setup.settings.batch_size if isinstance(request, TaskRequest) else None
        hint = "Give a smaller --batch-size" + ("" if size is None else f" than {size}")
        return ResourceError(f"out of memory ({str(error)[:200]}). {hint}.")
    return SpanError(f"{type(error).__name__}: {error}{without_cudnn(error)}")


def checkpoint_at(points: StoredPoints, index: int) -> Checkpoint:
    """Return a checkpoint of the trajectory, by its position, with the whole paths of its files."""
    return points.checkpoints[index].under(located(points.root))


def point_at(points: StoredPoints, index: int, objective: Objective) -> Point:
    """Return a checkpoint as losses are evaluated there, see `point_of`."""
    return point_of(_read(points, index), objective)


def point_of(stored: Mapping[str, Tensor], objective: Objective) -> Point:
    """Return a checkpoint that was read as losses are evaluated there: on the device as it is
    stored, or with statistics recalibrated to its weights.
    """
    point = _all_placed(stored, objective)
    return point if objective.recalibration is None else objective.recalibration.at(point)


def stored_point_at(points: StoredPoints, index: int, objective: Objective) -> Point:
    """Return a checkpoint on the device, floating tensors in the precision of the run or the one
    they were stored in, if higher.
    """
    return _all_placed(_read(points, index), objective)


def _read(points: StoredPoints, index: int) -> Point:
    return read_checkpoint(checkpoint_at(points, index), points.names)


def _all_placed(stored: Mapping[str, Tensor], objective: Objective) -> Point:
    return {name: _placed(tensor, objective) for name, tensor in stored.items()}


def _placed(tensor: Tensor, objective: Objective) -> Tensor:
    if tensor.is_floating_point() and tensor.element_size() <= objective.dtype.itemsize:
        return tensor.to(objective.device, objective.dtype)
    return tensor.to(objective.device)


class StoredPoint(Mapping[str, "Tensor"]):
    """A checkpoint each of whose tensors is read when it is asked for, and not kept.

    Args:
        points: the checkpoints.
        index: position of this one.
        objective: whose device and precision the tensors are in.
        names: the tensors, and what they are called in the files; those of `points` by default.
    """

    def __init__(
        self,
        points: StoredPoints,
        index: int,
        objective: Objective,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint, self._objective = checkpoint_at(points, index), objective
        self._names = points.names if names is None else names

    def __getitem__(self, name: str) -> Tensor:
        stored = read_checkpoint(self._checkpoint, {name: self._names[name]})
        return _placed(stored[name], self._objective)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def differ(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    """Tell whether any of some tensors is another one at two points; those after the first that is
    are not looked at.
    """
    return any(bool((before[name] != after[name]).any()) for name in names)


def point_read_twice(
    points: StoredPoints, index: int, objective: Objective
) -> Mapping[str, Tensor]:
    """Return a checkpoint as losses are evaluated there, whose tensors are read whenever they are
    needed, where that is all there is to do.
    """
    if objective.recalibration is not None:
        return point_at(points, index, objective)
    return StoredPoint(points, index, objective)


def first_point(sample: Sample, objective: Objective) -> Mapping[str, Tensor]:
    """Return the first checkpoint that is there as it is stored, read where it is needed; what is
    wrong with it is wrong input.
    """
    point = StoredPoint(sample.points, sample.first, objective)
    try:
        for name in point:
            point[name]
    except SpanError as error:
        raise InputError(str(error)) from None
    return point
