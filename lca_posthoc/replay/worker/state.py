"""Hold the state of a worker process: a cache of model and data keyed by their origin, checkpoints
on the device, fixed compute settings, and failures as plain strings.
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
# a model holds the values of one point, even where a worker has several threads
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
        _recall_statistics(built, setup)  # statistics are of data that must be the same too
        _same_data(built, setup)
        key = _key(setup, list(built.losses))  # by name, in any order of asking
        _STATES[key] = built
    _STATES.move_to_end(key)
    _recall_statistics(_STATES[key], setup)
    return _STATES[key]


def divided(setup: TaskSetup, objective: Objective) -> Objective:
    """Return the objective with a loss for every entry of losses that return a dict, which later
    requests name.

    Args:
        setup: names the losses.
        objective: of the task's own losses.
    """
    other = objective.divided()
    if other is not objective:
        _STATES.pop(_key(setup, list(objective.losses)), None)
        _STATES[_key(setup, list(other.losses))] = other
    return other


def _recall_statistics(objective: Objective, setup: TaskSetup) -> None:
    """Recalibrate as settled when the run was created, if it has been."""
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
    """Reject a task that builds other data here than where it was probed.

    Raises:
        InputError: naming what differs, and usual reasons.
    """
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
    """Build a new objective of a task.

    Args:
        setup: the task.
        precision: of computation.

    Raises:
        ResourceError: if the task needs a GPU and none is visible.
    """
    import torch

    from ...numerics.objective import ObjectiveSettings, build_objective

    settings = setup.settings
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no GPU is visible to this worker. Use --device cpu, or make one visible with "
            "CUDA_VISIBLE_DEVICES."
        )
    with _deterministic():  # again, because the task's own code may change these settings
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
    """Compute on one CPU thread, without reduced float32 precision, and with the same kernels with
    and without gradients; restore all settings afterwards.
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
    """Turn a function that answers requests of a kind into one on plain data.

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
    """Return another error as one of this package, with a remedy where one is known."""
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
    """Return a checkpoint of the trajectory, with the whole paths of its files.

    Args:
        points: the checkpoints.
        index: its position.
    """
    return points.checkpoints[index].under(located(points.root))


def point_at(points: StoredPoints, index: int, objective: Objective) -> Point:
    """Return the point of a checkpoint at which losses are evaluated, see `point_of`.

    Args:
        points: the checkpoints.
        index: its position.
        objective: evaluates the losses.
    """
    return point_of(_read(points, index), objective)


def point_of(stored: Mapping[str, Tensor], objective: Objective) -> Point:
    """Return the point of a stored checkpoint at which losses are evaluated: on the device, as
    stored or with recalibrated statistics.

    Args:
        stored: the tensors as they were read.
        objective: evaluates the losses.
    """
    point = _all_placed(stored, objective)
    return point if objective.recalibration is None else objective.recalibration.at(point)


def stored_point_at(points: StoredPoints, index: int, objective: Objective) -> Point:
    """Return a checkpoint on the device, floating tensors in the precision of the run or in the
    stored one, if higher.

    Args:
        points: the checkpoints.
        index: its position.
        objective: whose device and precision the tensors get.
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
    """A checkpoint that reads each tensor when it is asked for, and keeps none.

    Args:
        points: the checkpoints.
        index: position of this one.
        objective: whose device and precision the tensors get.
        names: maps tensors to their names in the files; that of `points` by default.
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
    """Tell whether any of some tensors differs between two points; stop at the first that does.

    Args:
        before: one point.
        after: another point.
        names: of the tensors.
    """
    return any(bool((before[name] != after[name]).any()) for name in names)


def point_read_twice(
    points: StoredPoints, index: int, objective: Objective
) -> Mapping[str, Tensor]:
    """Return a point at which losses are evaluated, whose tensors are read whenever they are
    needed, unless statistics are recalibrated.

    Args:
        points: the checkpoints.
        index: its position.
        objective: evaluates the losses.
    """
    if objective.recalibration is not None:
        return point_at(points, index, objective)
    return StoredPoint(points, index, objective)


def first_point(sample: Sample, objective: Objective) -> Mapping[str, Tensor]:
    """Return the first existing checkpoint as stored, read on demand; its damage is wrong input.

    Args:
        sample: the probed checkpoints.
        objective: whose device and precision the tensors get.

    Raises:
        InputError: if it cannot be read.
    """
    point = StoredPoint(sample.points, sample.first, objective)
    try:
        for name in point:
            point[name]
    except SpanError as error:
        raise InputError(str(error)) from None
    return point
