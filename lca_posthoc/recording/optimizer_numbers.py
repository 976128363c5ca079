"""Record an optimiser's numbers at the moment of its step: learning rate, decay, gradient norms,
and moments.

A scheduler changes the learning rate after the step, and some optimisers overwrite gradients in it,
so both are read before. A closure computes the gradients during the step, so then they are read
after its call. Numbers on a CUDA device stay there until the iterate's bytes are copied: nothing
here waits for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import (
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..checkpoints.optimizer_steps import FIRST, SECOND, GroupStep, OptimizerStep
from .optimizer_guard import Trainers
from .outermost import Call, optimizers_in

_MOMENTS = {FIRST: ("exp_avg",), SECOND: ("exp_avg_sq", "square_avg", "sum")}
# number of moments per weight, for optimisers that have not made a step yet
_MOMENTS_OF: tuple[tuple[tuple[type[Optimizer], ...], int], ...] = (
    ((Adam, NAdam, RAdam, SparseAdam), 2),
    ((Adamax, RMSprop, Adagrad, Adadelta), 1),
)
_DECOUPLED = ("AdamW", "Muon", "Adafactor")  # always decoupled; others state it in their groups
_NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps", "alpha", "lr_decay")
_WIDE = frozenset((torch.float32, torch.float64))
_PIECE = 2**18  # numbers whose squares a CPU sums in float32 with enough accuracy
_MOST_CLIPS = 64  # remembered clippings, of different tensors
_FLAGS = ("nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay")


class _Held:
    """Hold copies of scalars; those from a CUDA device may still be on their way to the host.

    `read` waits for them.

    Args:
        tensors: tensors of one number each, on any devices.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._parts: list[tuple[Sequence[int], Tensor]] = []
        self._copied: list[torch.cuda.Event] = []
        scalars = [tensor if tensor.dim() == 0 else tensor.reshape(()) for tensor in tensors]
        if not scalars:
            return
        try:
            self._hold(range(len(scalars)), scalars)
        except RuntimeError:  # on several devices
            for device in {tensor.device for tensor in scalars}:
                indices = [index for index, tensor in enumerate(scalars) if tensor.device == device]
                self._hold(indices, [scalars[index] for index in indices])

    @torch.no_grad()
    def _hold(self, indices: Sequence[int], scalars: list[Tensor]) -> None:
        part = torch.stack(scalars)  # promotes mixed types to a common one
        if part.is_cuda:
            device = part.device
            part = part.to("cpu", non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._copied.append(event)
        self._parts.append((indices, part))

    def read(self) -> list[float]:
        """Return the numbers in the order they were given."""
        for event in self._copied:
            event.synchronize()
        numbers = [math.nan] * self._count
        for indices, part in self._parts:
            for index, number in zip(indices, part.tolist(), strict=True):
                numbers[index] = float(number)
        return numbers


@dataclass(eq=False)
class _Member:
    """Count the steps made with a trained tensor: all of them, and those since the last iterate."""

    reference: weakref.ref[Tensor]
    steps: int
    recent: int = 0


@dataclass(eq=False)
class _Clip:
    """Hold a factor that multiplied gradients.

    Args:
        tensors: ids of the tensors it applies to; None for all.
        factor: one number, perhaps still on its way to the host.
        used: ids of the optimisers that have made a step since.
    """

    tensors: frozenset[int] | None
    factor: _Held
    used: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Group:
    """Hold the tensors of a parameter group that a step moves.

    Args:
        numbers: numeric settings of the group.
        indices: settings that are tensors → index among the held numbers.
        flags: boolean settings.
        members: tensors that have a gradient.
        has_memory: for each member, whether the optimiser remembers earlier gradients.
        norms: index of the first member's norm among the held numbers; None if unknown.
    """

    numbers: dict[str, float]
    indices: dict[str, int]
    flags: dict[str, bool]
    members: list[_Member]
    has_memory: list[bool]
    norms: int | None


class _Step:
    """Record a step of one optimiser, in progress or finished.

    Args:
        optimizer: the optimiser.
        measures: False to skip the norms, for a step that no iterate will follow.
    """

    def __init__(self, optimizer: Optimizer, measures: bool) -> None:
        kind = type(optimizer)
        is_torch = kind.__module__.startswith("torch.optim.")
        self.name = kind.__name__ if is_torch else f"{kind.__module__}.{kind.__qualname__}"
        self.depth = 1  # of nested calls of `step`
        self.clip: _Clip | None = None
        self.groups: list[_Group] = []
        self._optimizer = weakref.ref(optimizer)
        self._measures = measures
        self._before = _Held([])
        self._scaler: dict[str, int] = {}  # index of each number set by a gradient scaler
        self._after = _Held([])
        self._counts: list[int | None] = []  # steps of each tensor; None if among the held numbers

    def measure(self, member_of: Callable[[Tensor], _Member]) -> None:
        """Read the numbers that the step uses; called again whenever a closure recomputes the
        gradients.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return
        scalars: list[Tensor] = []
        self.groups = []
        for group in optimizer.param_groups:
            trained, gradients, has_memory = [], [], []
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    trained.append(parameter)
                    gradients.append(gradient)
                    has_memory.append(_remembers(_state_of(optimizer, parameter)))
            if not trained:
                continue
            norms = None
            if self._measures:
                norms = len(scalars)
                scalars += _norms(gradients)
            numbers, tensors = _numbers(group)
            self.groups.append(
                _Group(
                    numbers=numbers,
                    indices=_indices(tensors, len(scalars)),
                    flags={name: group.get(name) is True for name in _FLAGS},
                    members=[member_of(parameter) for parameter in trained],
                    has_memory=has_memory,
                    norms=norms,
                )
            )
            scalars += tensors.values()
        scaler = {
            name: number
            for name in (
                "grad_scale",
                "found_inf",
            )  # set if the optimiser unscales gradients itself
            if isinstance(number := getattr(optimizer, name, None), Tensor)
        }
        self._scaler = _indices(scaler, len(scalars))
        self._before = _Held([*scalars, *scaler.values()])

    def finish(self) -> None:
        """Read the step counts after the step."""
        optimizer = self._optimizer()
        scalars: list[Tensor] = []
        self._counts = []
        for member in itertools.chain.from_iterable(group.members for group in self.groups):
            member.steps += 1
            member.recent += 1
            parameter = member.reference()
            count = None
            if optimizer is not None and parameter is not None:
                count = _state_of(optimizer, parameter).get("step")
            if isinstance(count, Tensor):
                scalars.append(count)
                self._counts.append(None)
            else:
                self._counts.append(count if type(count) is int else member.steps)
        self._after = _Held(scalars)

    def resolve(self, names: Mapping[int, str]) -> dict[str, tuple[GroupStep, float]] | None:
        """Return the settings of each tensor, as a group without tensors, and its norm.

        Return None if a gradient scaler skipped the step on the device.

        Args:
            names: id of a member → its name in the file.
        """
        before, after = self._before.read(), iter(self._after.read())
        if "found_inf" in self._scaler and before[self._scaler["found_inf"]]:
            return None
        scale = before[self._scaler["grad_scale"]] if "grad_scale" in self._scaler else 1.0
        counts = iter(self._counts)
        resolved: dict[str, tuple[GroupStep, float]] = {}
        for group in self.groups:
            numbers = group.numbers | {name: before[index] for name, index in group.indices.items()}
            kinds: dict[tuple[int, bool], GroupStep | None] = {}
            for index, member in enumerate(group.members):
                count = next(counts)
                key = round(next(after)) if count is None else count, group.has_memory[index]
                if key not in kinds:
                    kinds[key] = _without_tensors(self.name, numbers, group.flags, *key)
                kind = kinds[key]
                if kind is not None and id(member) in names:
                    norm = math.nan if group.norms is None else before[group.norms + index] / scale
                    resolved[names[id(member)]] = kind, norm
        return resolved


def _indices(names: Iterable[str], first: int) -> dict[str, int]:
    """Number names consecutively, starting at `first`."""
    return {name: index for index, name in enumerate(names, first)}


def _state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the optimiser's state of a tensor without creating one."""
    state = optimizer.state.get(parameter)
    return state if isinstance(state, dict) else {}


def _remembers(state: Mapping[str, object]) -> bool:
    """Return whether a state holds earlier gradients."""
    return state.get("exp_avg") is not None or state.get("momentum_buffer") is not None


@torch.no_grad()
def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """Return ‖g‖₂ of each gradient on its device; NaN for a sparse one."""
    if all(
        gradient.layout is torch.strided and gradient.dtype in _WIDE and not _is_long(gradient)
        for gradient in gradients
    ):
        norms = torch._foreach_norm(gradients)
        return list(norms) if type(norms[0]) is Tensor else list(map(_whole, norms))
    return [_norm(gradient) for gradient in gradients]


def _norm(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        return torch.tensor(math.nan)
    is_narrow = gradient.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if is_narrow else None
    if _is_long(gradient):
        rows = max(1, _PIECE * len(gradient) // gradient.numel())
        norms = [
            torch.linalg.vector_norm(gradient[first : first + rows], dtype=dtype)
            for first in range(0, len(gradient), rows)
        ]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total
    return _whole(torch.linalg.vector_norm(gradient, dtype=dtype))


def _is_long(gradient: Tensor) -> bool:
    """Return whether float32 is too narrow for the sum of a gradient's squares.

    On a CPU, which adds them one by one, the error is 1e-5 for a million numbers and 4e-3 for fifty
    million.
    """
    return gradient.device.type == "cpu" and gradient.numel() > _PIECE and type(gradient) is Tensor


def _numbers(group: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the numeric settings of a group, and those that are tensors of one number."""
    settings = {name: group.get(name) for name in _NUMBERS}
    betas = group.get("betas")
    if isinstance(betas, tuple | list) and len(betas) == 2:
        settings |= {"beta1": betas[0], "beta2": betas[1]}
    numbers = {
        name: float(value)
        for name, value in settings.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }
    tensors = {
        name: value
        for name, value in settings.items()
        if isinstance(value, Tensor) and value.numel() == 1
    }
    return numbers, tensors


def _without_tensors(
    name: str, numbers: Mapping[str, float], flags: Mapping[str, bool], steps: int, has_memory: bool
) -> GroupStep | None:
    """Return the settings of a step as a group without tensors.

    Return None if a record cannot hold them, as for a wrapper that keeps its settings elsewhere.
    """
    if "lr" not in numbers or not all(map(math.isfinite, numbers.values())):
        return None
    betas = numbers.get("beta1", -1.0), numbers.get("beta2", -1.0)
    return GroupStep(
        optimizer=name[:512],
        tensors=(),
        gradient_norms=(),
        lr=numbers["lr"],
        weight_decay=numbers.get("weight_decay", 0.0),
        decoupled=name in _DECOUPLED or flags["decoupled_weight_decay"],
        momentum=numbers.get("momentum", 0.0),
        dampening=numbers.get("dampening", 0.0),
        nesterov=flags["nesterov"],
        maximize=flags["maximize"],
        betas=betas if all(0 <= beta < 1 for beta in betas) else None,
        eps=numbers.get("eps"),
        amsgrad=flags["amsgrad"],
        centered=flags["centered"],
        alpha=numbers.get("alpha") if name == "RMSprop" else None,
        lr_decay=numbers.get("lr_decay"),
        steps=max(1, steps),
        has_memory=has_memory,
    )


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return ‖g‖₂ of all gradients together, as a scalar on their device; 0 if there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = _norms(gradients)
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    return total


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor by which torch clips gradients.

    Args:
        norm: ‖g‖₂ of all gradients together, a scalar.
        max_norm: the largest norm that is left unchanged.
    """
    return torch.clamp(torch.div(max_norm, norm.detach() + 1e-6), max=1.0)


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


class PendingRecord:
    """Hold a record of the step that led to an iterate; some numbers may still be on their way to
    the host.

    `resolve` waits for them.
    """

    def __init__(
        self, since: int, most_steps: int, steps: Sequence[_Step], names: Mapping[int, str]
    ) -> None:
        self._since, self._most_steps, self._steps = since, most_steps, steps
        self._names = names  # by ids of members
        clips = {id(step.clip): step.clip for step in steps}
        self._clip = next(iter(clips.values())) if len(clips) == 1 else None

    def resolve(self) -> OptimizerStep | None:
        """Return the record, or None if nothing is known of any tensor."""
        latest: dict[str, tuple[GroupStep, float]] = {}
        for step in self._steps:
            resolved = step.resolve(self._names)
            if resolved is None:
                return None
            latest |= resolved  # the last step of each tensor counts
        tensors: dict[GroupStep, list[str]] = {}
        for name, (kind, _) in latest.items():
            tensors.setdefault(kind, []).append(name)
        groups = tuple(
            dataclasses.replace(
                kind,
                tensors=tuple(names),
                gradient_norms=tuple(latest[name][1] for name in names),
            )
            for kind, names in tensors.items()
        )
        if not groups:
            return None
        return OptimizerStep(
            since=self._since,
            optimizer_steps=self._most_steps,
            clip=self._factor(),
            groups=groups,
        )

    def _factor(self) -> float | None:
        factor = math.nan if self._clip is None else self._clip.factor.read()[0]
        return factor if math.isfinite(factor) and factor >= 0 else None


class StepNumbers:
    """Follow the numbers of every optimiser that trains a model, without keeping any of them alive.

    Args:
        model: the recorded model.
        trainers: determines which optimisers train it.
        measures: method that returns whether the next step needs norms.
        step: number of earlier steps, for optimisers that do not count their own.
        announced: optimisers whose steps are reported by calls of `begin`; hooks detect the steps
            of others.
        optimizers: optimisers that may already have moments.
    """

    def __init__(
        self,
        model: nn.Module,
        trainers: Trainers,
        measures: weakref.WeakMethod[Callable[[], bool]],
        step: int,
        announced: Iterable[Optimizer],
        optimizers: Iterable[Optimizer],
    ) -> None:
        self._trainers, self._measures = trainers, measures
        self._announced = [weakref.ref(optimizer) for optimizer in announced]
        self._optimizers: list[weakref.ref[Optimizer]] = []
        for optimizer in optimizers:
            self._remember(optimizer)
        self._members = {
            id(parameter): _Member(weakref.ref(parameter), step) for parameter in model.parameters()
        }
        self._running: dict[int, _Step] = {}  # by ids of optimisers
        self._made: dict[int, _Step] = {}  # the last step of each optimiser, in order of time
        self._clips: list[_Clip] = []
        self._handles = [
            register_optimizer_step_pre_hook(self._before_any),
            register_optimizer_step_post_hook(self._after_any),
        ]

    def end(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, optimizer: Optimizer) -> None:
        if not any(reference() is optimizer for reference in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))

    # --- the steps --------------------------------------------------------------------------------

    def _before_any(
        self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Call | None:
        is_announced = any(reference() is optimizer for reference in self._announced)
        if is_announced or not self._trainers.include(optimizer):
            return None
        return self.begin(optimizer, arguments, options)

    def begin(
        self, optimizer: Optimizer, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Call | None:
        """Read the numbers of a step that starts, now or after its closure ran.

        Args:
            optimizer: the optimiser.
            arguments: positional arguments of `step`, the optimiser first.
            options: keyword arguments of `step`.

        Returns:
            The arguments to call `step` with instead; None for no change.
        """
        running = self._running.get(id(optimizer))
        if running is not None:  # a `step` that calls the `step` of its base class
            running.depth += 1
            return None
        measures = self._measures()
        step = _Step(optimizer, measures is not None and measures())
        self._running[id(optimizer)] = step
        self._remember(optimizer)
        if len(arguments) > 1 and callable(arguments[1]):
            closure = self._followed(arguments[1], step, id(optimizer))
            return (arguments[0], closure, *arguments[2:]), options
        if callable(options.get("closure")):
            closure = self._followed(options["closure"], step, id(optimizer))
            return arguments, {**options, "closure": closure}
        step.measure(self._member_of)
        return None

    def _followed(
        self, closure: Callable[..., Any], step: _Step, identity: int
    ) -> Callable[..., Any]:
        """Wrap a closure so that the numbers are read after it computed the gradients; if it fails,
        there is no step.
        """

        @functools.wraps(closure)
        def followed(*arguments: object, **options: object) -> Any:
            try:
                loss = closure(*arguments, **options)
            except BaseException:
                self._running.pop(identity, None)
                raise
            step.measure(self._member_of)
            return loss

        return followed

    def _after_any(self, optimizer: Optimizer, *_: object) -> None:
        running = self._running.get(id(optimizer))
        if running is not None:
            running.depth -= 1
            if not running.depth:
                self._finish(id(optimizer))

    def _finish(self, identity: int) -> None:
        step = self._running.pop(identity)
        step.finish()
        step.clip = self._clip_of(identity, step)
        self._made.pop(identity, None)
        self._made[identity] = step

    def _member_of(self, parameter: Tensor) -> _Member:
        member = self._members.get(id(parameter))
        if member is None or member.reference() is not parameter:
            member = self._members[id(parameter)] = _Member(weakref.ref(parameter), 0)
        return member

    # --- clipping ---------------------------------------------------------------------------------

    def note_clipping(self, factor: float | Tensor, parameters: Iterable[Tensor] | None) -> None:
        """Note the factor that multiplied gradients.

        Args:
            factor: the factor, a scalar.
            parameters: the parameters it applies to; None for all.
        """
        tensors = None if parameters is None else frozenset(map(id, parameters))
        number = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
        # if a gradient scaler skipped a step, the clipping of that step is still here
        others = [clip for clip in self._clips if clip.tensors != tensors]
        self._clips = [*others, _Clip(tensors, _Held([_whole(number)]))][-_MOST_CLIPS:]

    def _clip_of(self, identity: int, step: _Step) -> _Clip | None:
        """Return the clipping before a step; None if there was none, or not a single one for all of
        its tensors.
        """
        if not self._clips:
            return None
        moved = {id(member.reference()) for group in step.groups for member in group.members}
        clips = [
            clip
            for clip in self._clips
            if identity not in clip.used and (clip.tensors is None or clip.tensors & moved)
        ]
        for clip in clips:
            clip.used.add(identity)
        is_whole = len(clips) == 1 and (clips[0].tensors is None or moved <= clips[0].tensors)
        return clips[0] if is_whole else None

    # --- the recorder's side ----------------------------------------------------------------------

    def take(self, since: int | None, names: Mapping[int, str]) -> PendingRecord | None:
        """Return the record of the steps made since `forget`, or None if there were none.

        Args:
            since: training step of the previous iterate; None if there is none.
            names: id of a tensor → its name in the file.
        """
        for identity in list(self._running):  # whose hook would run after the recorder's
            self._finish(identity)
        if since is None or not self._made:
            return None
        most = max(member.recent for member in self._members.values())
        named = {
            id(member): names[identity]
            for identity, member in self._members.items()
            if identity in names
        }
        return PendingRecord(since, most, [*self._made.values()], named)

    def forget(self) -> None:
        """Restart counting steps, after an iterate is saved."""
        self._made = {}
        for member in self._members.values():
            member.recent = 0

    def moments(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """Return the current moments by their names in the file.

        Moments sharded over processes are gathered, so every process must call this.

        Args:
            names: id of a tensor → its name in the file.
        """
        moments = {}
        for optimizer in self._living():
            for parameter in optimizer.state:
                if id(parameter) in names:
                    state = _state_of(optimizer, parameter)
                    for prefix, keys in _MOMENTS.items():
                        for key in keys:
                            if _is_moment(state.get(key), parameter):
                                moments[prefix + names[id(parameter)]] = _whole(state[key].detach())
        return moments

    def moment_bytes(self, model: nn.Module) -> int:
        """Return the size of an iterate's moments in bytes, including those that the first step
        will create.
        """
        identities = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        sizes: dict[int, int] = {}
        for optimizer in self._living():
            copies = next((n for kinds, n in _MOMENTS_OF if isinstance(optimizer, kinds)), 0)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in identities:
                        size = copies * parameter.numel() * parameter.element_size()
                        sizes[id(parameter)] = max(size, sizes.get(id(parameter), 0))
        return sum(sizes.values())

    def _living(self) -> Iterator[Optimizer]:
        for reference in self._optimizers:
            if (optimizer := reference()) is not None:
                yield optimizer


def _is_moment(value: object, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.shape == parameter.shape
    )


def stateful(optimizers: Iterable[object]) -> list[Optimizer]:
    """Return the optimisers that keep a state, among those given and those they wrap."""
    every = itertools.chain.from_iterable((outer, *optimizers_in(outer)) for outer in optimizers)
    return [
        optimizer
        for optimizer in every
        if isinstance(optimizer, Optimizer)
        and isinstance(getattr(optimizer, "state", None), Mapping)
    ]
