"""Take down an optimiser's numbers at the moment it makes a step: learning rate, decay, the norms of
the gradients, and its moments.

A scheduler changes the learning rate after the step, and some optimisers overwrite gradients in it,
so that both are read before; a closure makes the gradients during the step, so that they are read
after its call. Numbers that lie on a CUDA device stay there until the iterate's bytes are copied:
nothing here waits for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

_MEMORIES = ("momentum_buffer", "exp_avg")
_MOMENTS = {FIRST: ("exp_avg",), SECOND: ("exp_avg_sq", "square_avg", "sum")}
# the moments that each weight will have, of optimisers that have made no step yet
_MOMENTS_OF: tuple[tuple[tuple[type[Optimizer], ...], int], ...] = (
    ((Adam, NAdam, RAdam, SparseAdam), 2),
    ((Adamax, RMSprop, Adagrad, Adadelta), 1),
)
_DECOUPLED = ("AdamW", "Muon", "Adafactor")  # always; others say so in their groups
_NUMBERS = ("lr", "weight_decay", "momentum", "dampening", "eps", "alpha", "lr_decay")
_MOST_CLIPS = 64  # that are remembered, of different tensors
_FLAGS = ("nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay")


class _Held:
    """Copies of numbers as they are now, which are on their way to the host where a CUDA device has
    them; `read` waits for them.

    Args:
        tensors: of one number each, on any devices.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, tensor in enumerate(tensors):
            places.setdefault((tensor.device, tensor.dtype), []).append(index)
        self._count = len(tensors)
        self._parts = [
            (indices, torch.stack([tensors[index].detach().reshape(()) for index in indices]))
            for indices in places.values()
        ]
        self._copied = []
        for position, (indices, part) in enumerate(self._parts):
            if part.is_cuda:
                self._parts[position] = indices, part.to("cpu", non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(part.device))
                self._copied.append(event)

    def read(self) -> list[float]:
        """Return the numbers, in the order they were given in."""
        for event in self._copied:
            event.synchronize()
        numbers = [math.nan] * self._count
        for indices, part in self._parts:
            for index, number in zip(indices, part.tolist(), strict=True):
                numbers[index] = float(number)
        return numbers


@dataclass(eq=False)
class _Member:
    """A trained tensor: how many steps were made with it, and how many since the iterate before."""

    reference: weakref.ref[Tensor]
    steps: int
    recent: int = 0


@dataclass(eq=False)
class _Clip:
    """A factor that gradients were multiplied by.

    Args:
        tensors: the ids of those it is of; None for all.
        factor: one number, perhaps on its way to the host.
        used: the ids of the optimisers that have made a step since.
    """

    tensors: frozenset[int] | None
    factor: _Held
    used: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Group:
    """The tensors of a group that a step moves.

    Args:
        numbers: the group's settings.
        indices: settings that are tensors: the index of each among the numbers held.
        flags: settings that are true or false.
        members: the tensors that have a gradient.
        has_memory: of each, whether the optimiser remembers earlier gradients of it.
        norms: the index of the first one's norm among the numbers held; None where it is not known.
    """

    numbers: dict[str, float]
    indices: dict[str, int]
    flags: dict[str, bool]
    members: list[_Member]
    has_memory: list[bool]
    norms: int | None


class _Step:
    """A step of one optimiser, in progress or made.

    Args:
        optimizer: the one that makes it.
        measures: False to leave the norms out, of a step that no iterate will follow.
    """

    def __init__(self, optimizer: Optimizer, measures: bool) -> None:
        kind = type(optimizer)
        is_torch = kind.__module__.startswith("torch.optim.")
        self.name = kind.__name__ if is_torch else f"{kind.__module__}.{kind.__qualname__}"
        self.depth = 1  # of calls of `step` within one another
        self.clip: _Clip | None = None
        self.groups: list[_Group] = []
        self._optimizer = weakref.ref(optimizer)
        self._measures = measures
        self._before = _Held([])
        self._scaler: dict[str, int] = {}  # the index of each number that a gradient scaler gives
        self._after = _Held([])
        self._counts: list[int | None] = []  # of steps with each tensor; None for one that is held

    def measure(self, member_of: Callable[[Tensor], _Member]) -> None:
        """Take the numbers that the step is made with; once more where gradients are made anew."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        scalars: list[Tensor] = []
        self.groups = []
        for group in optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            norms = None
            if self._measures:
                norms = len(scalars)
                scalars += _norms([parameter.grad for parameter in trained])
            states = [_state_of(optimizer, parameter) for parameter in trained]
            numbers, tensors = _numbers(group)
            self.groups.append(
                _Group(
                    numbers=numbers,
                    indices=_indices(tensors, len(scalars)),
                    flags={name: group.get(name) is True for name in _FLAGS},
                    members=[member_of(parameter) for parameter in trained],
                    has_memory=[
                        any(state.get(name) is not None for name in _MEMORIES) for state in states
                    ],
                    norms=norms,
                )
            )
            scalars += tensors.values()
        scaler = {
            name: number
            for name in ("grad_scale", "found_inf")  # of one that unscales gradients itself
            if isinstance(number := getattr(optimizer, name, None), Tensor)
        }
        self._scaler = _indices(scaler, len(scalars))
        self._before = _Held([*scalars, *scaler.values()])

    def finish(self) -> None:
        """Take the counts of steps, once the step is made."""
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
        """Return, for every tensor, its settings as a group without tensors, and its norm; None
        where a gradient scaler skipped the step on the device.

        Args:
            names: those in the file, by the ids of members.
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
    """Return consecutive indices of some names, from the first one on."""
    return {name: index for index, name in enumerate(names, first)}


def _state_of(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """Return the state that an optimiser has of a tensor, without making one."""
    state = optimizer.state.get(parameter, {})
    return state if isinstance(state, Mapping) else {}


@torch.no_grad()
def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """Return ‖g‖₂ of each gradient, on its device; NaN of a sparse one."""
    if all(
        gradient.layout == torch.strided and gradient.dtype in (torch.float32, torch.float64)
        for gradient in gradients
    ):
        return [_whole(norm) for norm in torch._foreach_norm(gradients)]
    return [_norm(gradient) for gradient in gradients]


def _norm(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        return torch.tensor(math.nan)
    is_narrow = gradient.dtype in (torch.float16, torch.bfloat16)
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32 if is_narrow else None)
    return _whole(norm)


def _numbers(group: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the settings of a group that are numbers, and those that are tensors of one number."""
    settings = {name: group.get(name) for name in _NUMBERS}
    betas = group.get("betas")
    if isinstance(betas, tuple | list) and len(betas) == 2:
        settings |= {"beta1": betas[0], "beta2": betas[1]}
    numbers = {
        name: float(value)
        for name, value in settings.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
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
    """Return the settings of a step as a group without tensors; None where they are none that a
    record can hold, as of a wrapper that has its own elsewhere.
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
    """Return ‖g‖₂ of the gradients of all parameters together, one number on their device; 0 where
    there are none.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = _norms(gradients)
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    return total


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor by which torch clips gradients of a norm."""
    return torch.clamp(torch.div(max_norm, norm.detach() + 1e-6), max=1.0)


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


class PendingRecord:
    """A record of the step that led to an iterate, some of whose numbers may be on their way to the
    host still; `resolve` waits for them.
    """

    def __init__(
        self, since: int, most_steps: int, steps: Sequence[_Step], names: Mapping[int, str]
    ) -> None:
        self._since, self._most_steps, self._steps = since, most_steps, steps
        self._names = names  # by ids of members
        clips = {id(step.clip): step.clip for step in steps}
        self._clip = next(iter(clips.values())) if len(clips) == 1 else None

    def resolve(self) -> OptimizerStep | None:
        """Return the record; None where nothing is known of any tensor."""
        latest: dict[str, tuple[GroupStep, float]] = {}
        for step in self._steps:
            resolved = step.resolve(self._names)
            if resolved is None:
                return None
            latest |= resolved  # of a tensor that took part twice, the later step counts
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
    """Follow the numbers of every optimiser that trains a model.

    The model, the optimisers and the recorder are not kept alive.

    Args:
        model: the one that is recorded.
        trainers: tells which optimisers train it.
        measures: a method that tells whether the next step is one whose norms are wanted.
        step: the number of steps made before, for optimisers that do not count theirs.
        announced: those whose steps `begin` is called for; the steps of others are seen.
        optimizers: those whose moments there are before any step.
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
        self._made: dict[int, _Step] = {}  # the last of each, in the order they were made
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
        """Take the numbers of a step that begins, now or after the call of its closure.

        Args:
            optimizer: the one that makes the step.
            arguments: those of `step`, the optimiser first.
            options: its named arguments.

        Returns:
            What `step` is to be called with instead; None for no change.
        """
        running = self._running.get(id(optimizer))
        if running is not None:  # of a class whose `step` calls that of its base
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
        """Return a closure that takes numbers of the gradients it has made; where it fails, there
        is no step.
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
        """Note the factor that the gradients of some tensors, or of all, were multiplied by."""
        tensors = None if parameters is None else frozenset(map(id, parameters))
        number = factor if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
        # where a gradient scaler skipped a step, that of the skipped one is still there
        others = [clip for clip in self._clips if clip.tensors != tensors]
        self._clips = [*others, _Clip(tensors, _Held([_whole(number)]))][-_MOST_CLIPS:]

    def _clip_of(self, identity: int, step: _Step) -> _Clip | None:
        """Return the clipping before a step; None where there was none, or not one for all of its
        tensors.
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
        """Return the record of the steps made since `forget`; None where there were none.

        Args:
            since: the training step of the iterate before; None where there is none.
            names: of tensors in the file, by id.
        """
        for identity in list(self._running):  # of which the hook comes after the recorder's own
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
        """Begin anew to count steps, once an iterate is saved."""
        self._made = {}
        for member in self._members.values():
            member.recent = 0

    def moments(self, names: Mapping[int, str]) -> dict[str, Tensor]:
        """Return the moments that the optimisers have now, by their names in the file.

        Those that are sharded over processes are gathered, so every process must call this.

        Args:
            names: of tensors in the file, by id.
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
        """Return the bytes that the moments of an iterate take, those included that the first step
        will make.
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
    """Return those of some optimisers, and of the ones they wrap, that keep a state."""
    every = itertools.chain.from_iterable((outer, *optimizers_in(outer)) for outer in optimizers)
    return [
        optimizer
        for optimizer in every
        if isinstance(optimizer, Optimizer)
        and isinstance(getattr(optimizer, "state", None), Mapping)
    ]
