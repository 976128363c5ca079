r"""Infer what an optimiser did from its states in checkpoints of consecutive steps.

A state names neither its optimiser's class nor, usually, the tensors it belongs to. Whether its
learning rate is that of the previous or of the next step depends on who saved it. The motion of the
weights reveals all three: a step of Adam moves a tensor by
$-\kappa\,m/(\sqrt{v/(1-\beta_2^t)}+\epsilon)$, with $\kappa=\eta/(1-\beta_1^t)$, and one of SGD
with momentum by $-\eta$ times its buffer, up to rounding. Only what the motion confirms is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from ..base.text import count
from ..checkpoints.headers import MAX_TENSORS
from ..checkpoints.optimizer_steps import FIRST, SECOND, GroupStep, OptimizerStep, to_metadata
from ..checkpoints.trajectory import normalise
from ..errors import InputError, few
from .series import Beside, Progress, Tensors, separate

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SAMPLE = 2**13  # numbers of a tensor whose motion is compared
_MOST_PAIRS = 256  # pairs of checkpoints used to identify tensors
_MOST_COMPARED = 2**20  # comparisons of motions with formulas, for one pair
# how much a motion may differ from a formula: rounding of the weights, and a share of the motion,
# because a bias correction in float32 changes it by 3e-5
_ROUNDINGS, _SHARE = 2.0, 1e-4
_MOST_STEPS = 2**53
_LARGEST = 1e300  # of settings
_OTHER = "they belong to an optimiser other than Adam, AdamW and SGD with momentum"
_NO_MEMORY = "they store no gradients, as with SGD without momentum, so they do not show a step"


class _Untold(Exception):
    """Give the reason why a state reveals nothing."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Hold the settings of a group; `decoupled` is None if an older torch did not store it."""

    optimizer: str
    lr: float
    weight_decay: float
    decoupled: bool | None
    maximize: bool
    momentum: float = 0.0
    dampening: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Member:
    """Hold the state of one tensor.

    Attributes:
        group: number of its group.
        steps: number of steps made with it; None if not counted.
        first: first moment, or momentum buffer.
        second: second moment, if any.
    """

    group: int
    steps: int | None
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _State:
    """Hold the state of an optimiser.

    Attributes:
        groups: settings of the groups.
        members: number → state of each tensor that had a gradient.
        names: number → name, if torch stored it.
    """

    groups: tuple[_Settings, ...]
    members: dict[int, _Member]
    names: dict[int, str]


# --- reading a state --------------------------------------------------------------------------------


def _parsed(saved: object) -> _State:
    """Parse the state from an optimiser's `state_dict`, without trusting it.

    Raises:
        _Untold: if it is not the state of a supported optimiser.
    """
    groups, states = (
        (saved.get("param_groups"), saved.get("state")) if isinstance(saved, Mapping) else (0, 0)
    )
    if not isinstance(groups, list) or not isinstance(states, Mapping) or not groups:
        raise _Untold("they have no groups of parameters")
    settings, members, names = [], dict[int, _Member](), dict[int, str]()
    for number, group in enumerate(groups):
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(numbers, list) or not all(type(index) is int for index in numbers):
            raise _Untold("their groups do not number their parameters")
        settings.append(_settings(group))
        for index in numbers:
            state = states.get(index)
            if isinstance(state, Mapping) and state:
                if index in members or len(members) >= MAX_TENSORS // 2:
                    raise _Untold("a parameter is in two groups, or there are too many")
                members[index] = _member(number, settings[-1], state)
        written = group.get("param_names")
        if isinstance(written, list) and len(written) == len(numbers):
            pairs = zip(numbers, written, strict=True)
            names |= {index: name for index, name in pairs if isinstance(name, str)}
    return _State(groups=tuple(settings), members=members, names=names)


def _settings(group: Mapping[str, object]) -> _Settings:
    """Return the settings of a group of Adam, AdamW or SGD with momentum.

    Raises:
        _Untold: if it is another optimiser's.
    """
    rate, decay = _number(group, "lr"), _number(group, "weight_decay")
    maximize = group.get("maximize") is True
    if "betas" in group and "amsgrad" in group:
        decoupled = group.get("decoupled_weight_decay")
        betas = group["betas"]
        if group["amsgrad"] is not False:
            raise _Untold("there is no formula for AMSGrad")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise _Untold("their betas are not a pair of numbers")
        first, second = (_number({"betas": beta}, "betas") for beta in betas)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise _Untold("their betas are not a pair of numbers")
        return _Settings(
            optimizer="Adam",
            maximize=maximize,
            decoupled=decoupled if isinstance(decoupled, bool) else None,
            betas=(first, second),
            eps=_number(group, "eps"),
            lr=rate,
            weight_decay=decay,
        )
    if "momentum" in group and "dampening" in group:
        if group.get("nesterov") is not False:
            raise _Untold("there is no formula for Nesterov's momentum")
        momentum, dampening = _number(group, "momentum"), _number(group, "dampening")
        return _Settings(
            optimizer="SGD",
            maximize=maximize,
            decoupled=False,
            momentum=momentum,
            dampening=dampening,
            lr=rate,
            weight_decay=decay,
        )
    raise _Untold(_OTHER)


def _member(number: int, settings: _Settings, state: Mapping[object, object]) -> _Member:
    keys = {key for key, value in state.items() if value is not None}
    if settings.optimizer == "SGD":
        if keys != {"momentum_buffer"}:
            raise _Untold(_OTHER if keys else _NO_MEMORY)
        return _Member(
            group=number, steps=None, first=_tensor(state["momentum_buffer"]), second=None
        )
    if keys != {"step", "exp_avg", "exp_avg_sq"}:
        raise _Untold(_OTHER)
    steps = _number(state, "step")
    if not (steps.is_integer() and 1 <= steps < _MOST_STEPS):
        raise _Untold("their count of steps is invalid")
    first, second = _tensor(state["exp_avg"]), _tensor(state["exp_avg_sq"])
    if first.shape != second.shape:
        raise _Untold("their moments have two shapes")
    return _Member(group=number, steps=int(steps), first=first, second=second)


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor) and _is_plain(value) and value.dtype in _FLOATING:
        return value.detach()
    raise _Untold("their moments are not plain tensors of floating-point numbers")


def _number(values: Mapping[Any, object], name: str) -> float:
    value = values.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and _is_plain(value):
        value = value.item()
    if isinstance(value, int | float) and type(value) is not bool and abs(value) <= _LARGEST:
        return float(value)
    raise _Untold(f"their {name} is not a number")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


# --- the motion -------------------------------------------------------------------------------------


def _sampled(tensor: Tensor) -> Tensor:
    """Return a sample of a tensor, or all of a small one, in float64."""
    flat = tensor.reshape(-1)
    return flat[:: (max(1, len(flat) // _SAMPLE) - 1) | 1].double()


@dataclass(frozen=True)
class _Motion:
    """Hold the motion of a tensor over one step, on its sample.

    Args:
        start: weights before the step.
        moved: change of the weights.
        rounding: norm of the change that rounding of the weights may cause.
    """

    start: Tensor
    moved: Tensor
    rounding: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> _Motion:
        """Return the motion from one point to the next.

        Args:
            before: weights before the step.
            after: weights after the step.
        """
        start, end = _sampled(before), _sampled(after)
        largest = torch.maximum(start.abs(), end.abs())
        rounding = _ROUNDINGS * torch.finfo(after.dtype).eps * float(largest.norm())
        return cls(start, end - start, rounding)


@dataclass(frozen=True)
class _Formula:
    """Hold the step that a state implies for its tensor, on the sample.

    Attributes:
        added: what the step adds to the weights, without decoupled decay.
        decay: factor of the weights that decoupled decay adds.
        share: relative error that is allowed.
    """

    added: Tensor
    decay: float
    share: float

    @classmethod
    def of(cls, settings: _Settings, member: _Member) -> _Formula:
        """Compute the step of a member under some settings.

        Args:
            settings: settings of the step.
            member: the state after the step.
        """
        share = max(_SHARE, 4 * torch.finfo(member.first.dtype).eps)
        first = _sampled(member.first)
        if settings.betas is None or settings.eps is None or member.second is None:
            return cls(-settings.lr * first, 0.0, share)
        steps = member.steps or 1
        rate = settings.lr / (1 - settings.betas[0] ** steps)
        second = _sampled(member.second) / (1 - settings.betas[1] ** steps)
        decay = -settings.lr * settings.weight_decay if settings.decoupled else 0.0
        return cls(-rate * first / (second.sqrt() + settings.eps), decay, share)

    def error(self, motion: _Motion) -> float:
        """Return how much a motion differs from the step, relative to what rounding allows."""
        step = self.added + self.decay * motion.start
        allowed = motion.rounding + self.share * float(step.norm())
        difference = float((motion.moved - step).norm())
        if not difference:
            return 0.0
        return difference / allowed if allowed and math.isfinite(difference) else math.inf


def _variants(before: _State, after: _State) -> Iterator[tuple[_Settings, ...]]:
    """Yield the settings that the step between two states may have used.

    Learning rates come from one of the two states; nothing else may have changed.
    """
    plain = [[replace(group, lr=0.0) for group in state.groups] for state in (before, after)]
    if plain[0] != plain[1]:
        return
    for groups in dict.fromkeys((before.groups, after.groups)):
        unknown = any(group.decoupled is None and group.weight_decay for group in groups)
        for decoupled in (True, False) if unknown else (False,):
            yield tuple(
                replace(group, decoupled=decoupled) if group.decoupled is None else group
                for group in groups
            )


def _made_a_step(before: _Member | None, after: _Member) -> bool:
    """Return whether a member's count increased by one or, without a count, its buffer changed."""
    if after.steps is None:
        return before is None or not torch.equal(_sampled(before.first), _sampled(after.first))
    return after.steps == (1 if before is None else (before.steps or 0) + 1)


# --- a series ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Give access to a checkpoint that holds a state.

    Attributes:
        tensors: returns its weights.
        optimizer: returns the state.
        identity: returns a checksum of the file that holds the state.
        check: raises an error if that file is damaged.
    """

    tensors: Callable[[], Tensors]
    optimizer: Callable[[], object]
    identity: Callable[[], str]
    check: Callable[[], None]


@dataclass(frozen=True)
class _Point:
    """Hold the weights of a checkpoint and the state beside them."""

    tensors: Tensors
    state: _State


@dataclass
class _Follower:
    """Follow an optimiser through the checkpoints of a series.

    Args:
        sources: step → checkpoint.
        progress: called as `progress(what, done, total)`.
    """

    sources: Mapping[int, Source]
    progress: Progress
    reasons: dict[str, None] = field(default_factory=dict)
    _kept: dict[int, _Point | None] = field(default_factory=dict)
    _shapes: dict[int, torch.Size] = field(default_factory=dict)

    def point(self, step: int) -> _Point | None:
        """Return a checkpoint, or None if its state reveals nothing; the last two are cached."""
        if step not in self._kept:
            self._kept = {step - 1: self._kept[step - 1]} if step - 1 in self._kept else {}
            self._kept[step] = self._read(step)
        return self._kept[step]

    def _read(self, step: int) -> _Point | None:
        try:
            source = self.sources[step]
            point = _Point(source.tensors(), _parsed(source.optimizer()))
            self._compare_shapes(point)
            return point
        except _Untold as reason:
            self.reasons[str(reason)] = None
        except InputError as error:
            self.reasons[str(error).rstrip(".")] = None
        return None

    def _compare_shapes(self, point: _Point) -> None:
        """Check that members have the shapes of the weights, and of earlier members.

        Raises:
            _Untold: if one differs.
        """
        shapes = {tensor.shape for tensor in point.tensors.values()}
        for index, member in point.state.members.items():
            shape = member.first.shape
            if shape not in shapes or self._shapes.setdefault(index, shape) != shape:
                raise _Untold("their parameters are not those of the weights beside them")

    def pairs(self) -> Iterator[tuple[int, _Point, _Point]]:
        """Yield consecutive checkpoints with states, with the step of the later one."""
        steps = [step for step in self.sources if step - 1 in self.sources]
        for done, step in enumerate(steps):
            self.progress("following the optimiser at", done, len(steps))
            before, after = self.point(step - 1), self.point(step)
            if before is not None and after is not None:
                yield step, before, after

    def names(self) -> dict[int, str]:
        """Return the name of the tensor that each member belongs to, as far as motions determine
        it.

        Raises:
            _Untold: if the optimiser's steps do not explain the motion of a tensor, or nothing
                determines any name.
        """
        possible: dict[int, frozenset[str]] = {}
        pairs = 0
        for _, before, after in self.pairs():
            if pairs == _MOST_PAIRS:
                break
            pairs += 1
            possible = _narrowed(possible, before, after)
            if possible and all(len(names) == 1 for names in possible.values()):
                break
        names = {index: next(iter(names)) for index, names in possible.items() if len(names) == 1}
        if possible and not names:
            raise _Untold("the motion does not determine which tensors they belong to")
        if pairs and not names:
            raise _Untold(_NO_MEMORY)
        return names

    def record(
        self, step: int, before: _Point, after: _Point, names: Mapping[int, str]
    ) -> OptimizerStep | None:
        """Return the record of the step between two checkpoints, for the tensors whose motion it
        explains; None if it explains none.

        Args:
            step: step of the later checkpoint.
            before: the earlier checkpoint.
            after: the later checkpoint.
            names: number of a member → name of its tensor.
        """
        motions = {
            name: _Motion.of(before.tensors[name], after.tensors[name]) for name in names.values()
        }
        fits = []
        for settings in _variants(before.state, after.state):
            errors = {
                index: _Formula.of(settings[member.group], member).error(motions[names[index]])
                for index, member in after.state.members.items()
                if index in names and _made_a_step(before.state.members.get(index), member)
            }
            explained = [index for index, error in errors.items() if error <= 1]
            fits.append((explained, sum(errors[index] for index in explained), settings))
        explained, _, settings = max(
            fits, key=lambda fit: (len(fit[0]), -fit[1]), default=([], 0.0, ())
        )
        if not explained:
            return None
        groups = _groups(step, before, after, settings, names, explained)
        return OptimizerStep(since=step - 1, optimizer_steps=1, clip=None, groups=groups)


def _narrowed(
    possible: Mapping[int, frozenset[str]], before: _Point, after: _Point
) -> dict[int, frozenset[str]]:
    """Return the possible names of members after one more step, from shapes and from the motion the
    step implies.

    Raises:
        _Untold: if no step explains the motion, or there are too many possibilities.
    """
    members = after.state.members
    new = {index: _named(index, after) for index in members.keys() - possible.keys()}
    known = {**possible, **new}
    open_ones = [
        index
        for index, member in members.items()
        if (index in new or len(known[index]) > 1)
        and _made_a_step(before.state.members.get(index), member)
    ]
    if sum(len(known[index]) for index in open_ones) > _MOST_COMPARED:
        raise _Untold("too many tensors have one shape to tell which of them they belong to")
    wanted = {name for index in open_ones for name in known[index]}
    motions = {name: _Motion.of(before.tensors[name], after.tensors[name]) for name in wanted}
    allowed: dict[int, set[str]] = {}
    variants = [*_variants(before.state, after.state)]
    for settings in variants:
        fits = {}
        for index in open_ones:
            formula = _Formula.of(settings[members[index].group], members[index])
            fits[index] = {name for name in known[index] if formula.error(motions[name]) <= 1}
        if all(fits.values()):
            for index, names in fits.items():
                allowed[index] = allowed.get(index, set()) | names
    if open_ones and variants and not allowed:
        raise _Untold("their steps alone do not explain the motion of the weights")
    return _eliminated(known | {index: frozenset(names) for index, names in allowed.items()})


def _named(index: int, point: _Point) -> frozenset[str]:
    """Return the names of the tensors with a member's shape; only the name that torch stored, if it
    is one of them.
    """
    shape = point.state.members[index].first.shape
    names = [
        name
        for name, tensor in point.tensors.items()
        if tensor.shape == shape and tensor.dtype in _FLOATING
    ]
    written = point.state.names.get(index)
    alone = [name for name in names if written and normalise(name) == normalise(written)]
    return frozenset(alone or names)


def _eliminated(possible: Mapping[int, frozenset[str]]) -> dict[int, frozenset[str]]:
    """Remove names that certainly belong to other members: n members that share n possible names
    own those names.

    Raises:
        _Untold: if some members share fewer names than there are members.
    """
    left = dict(possible)
    waiting = sorted({*left.values()}, key=len)
    while waiting:
        names = waiting.pop(0)
        owners = [index for index, others in left.items() if others <= names]
        if len(owners) > len(names):
            raise _Untold("their parameters are not those of the weights beside them")
        if len(owners) < len(names):
            continue
        for index, others in left.items():
            if not others <= names and others & names:
                left[index] = others - names
                waiting.append(left[index])
    return left


def _groups(
    step: int,
    before: _Point,
    after: _Point,
    settings: Sequence[_Settings],
    names: Mapping[int, str],
    indices: Iterable[int],
) -> tuple[GroupStep, ...]:
    """Return what a step did with some members, grouped by equal treatment."""
    alike: dict[tuple[int, int, bool], list[int]] = {}
    for index in indices:
        member = after.state.members[index]
        steps = step if member.steps is None else member.steps
        key = member.group, max(1, steps), index in before.state.members
        alike.setdefault(key, []).append(index)
    return tuple(
        _group(
            settings[number],
            tuple(names[index] for index in members),
            tuple(_norm(settings[number], names[index], index, before, after) for index in members),
            steps,
            has_memory,
        )
        for (number, steps, has_memory), members in alike.items()
    )


def _group(
    settings: _Settings,
    tensors: tuple[str, ...],
    norms: tuple[float, ...],
    steps: int,
    has_memory: bool,
) -> GroupStep:
    is_adamw = settings.optimizer == "Adam" and bool(settings.decoupled)
    return GroupStep(
        optimizer="AdamW" if is_adamw else settings.optimizer,
        tensors=tensors,
        gradient_norms=norms,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        decoupled=is_adamw,
        momentum=settings.momentum,
        dampening=settings.dampening,
        nesterov=False,
        maximize=settings.maximize,
        betas=settings.betas,
        eps=settings.eps,
        amsgrad=False,
        centered=False,
        alpha=None,
        lr_decay=None,
        steps=steps,
        has_memory=has_memory,
    )


def _norm(settings: _Settings, name: str, index: int, before: _Point, after: _Point) -> float:
    """Return the norm of the gradient that SGD received, from its buffers; NaN for Adam, whose
    moments are stored.
    """
    if settings.optimizer != "SGD":
        return math.nan
    gradient, factor = after.state.members[index].first, 1.0
    earlier = before.state.members.get(index)
    if earlier is not None:
        factor = 1 - settings.dampening
        gradient = gradient - settings.momentum * earlier.first
    if not factor:
        return math.nan
    decayed = gradient / factor - settings.weight_decay * before.tensors[name]
    return float(torch.linalg.vector_norm(decayed, dtype=torch.float64))


def follow(
    sources: Mapping[int, Source], progress: Progress
) -> tuple[dict[int, Beside], list[str]]:
    """Return what the states reveal about the optimiser's steps, by training step, and notes.

    Args:
        sources: step → checkpoint of a series, in ascending order.
        progress: called as `progress(what, done, total)`.
    """
    follower = _Follower(sources, progress)
    try:
        names = follower.names()
    except _Untold as reason:
        return {}, [_nothing([str(reason)])]
    if not names:
        reasons = [*follower.reasons]
        return {}, [_nothing(reasons)] * bool(reasons)
    records, beside, members, pairs = dict[int, OptimizerStep](), dict[int, Beside](), set[int](), 0
    for step, before, after in follower.pairs():
        pairs += 1
        members |= after.state.members.keys()
        record = follower.record(step, before, after, names)
        if record is None:
            continue
        records[step] = record
        for place, point in ((step - 1, before), (step, after)):
            text = to_metadata(records[place]) if place in records else None
            beside[place] = _beside(sources[place], point, names, text)
    return beside, _notes(follower, names, len(members), records, pairs)


def _beside(source: Source, point: _Point, names: Mapping[int, str], record: str | None) -> Beside:
    """Return what to write beside a checkpoint."""
    size = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in _moments(point.state, names).items()
    )

    def moments() -> Tensors:
        source.check()
        try:
            return separate(_moments(_parsed(source.optimizer()), names))
        except _Untold:
            raise InputError(
                "an optimiser's state changed while it was imported. Run again when nothing "
                "writes there."
            ) from None

    told = repr((sorted(names.items()), record, source.identity())).encode()
    identity = f"{google_crc32c.value(told):08x}"
    return Beside(record=record, moments=moments if size else None, bytes=size, identity=identity)


def _moments(state: _State, names: Mapping[int, str]) -> Tensors:
    return {
        prefix + names[index]: tensor
        for index, member in state.members.items()
        if index in names and member.second is not None
        for prefix, tensor in ((FIRST, member.first), (SECOND, member.second))
    }


def _nothing(reasons: Sequence[str]) -> str:
    return (
        f"left out the optimiser's states: {few(reasons, 2)}. The import has weights, but not what "
        "moved them"
    )


def _notes(
    follower: _Follower,
    names: Mapping[int, str],
    members: int,
    records: Mapping[int, OptimizerStep],
    pairs: int,
) -> list[str]:
    """Note what is known about the optimiser, and what is not."""
    kinds = dict.fromkeys(group.optimizer for record in records.values() for group in record.groups)
    notes = [
        f"read {count(len(records), 'step')} of {few([*kinds])} from the optimiser's states, "
        "confirmed by the motion of the weights: `lca run --causes` uses them"
    ] * bool(records)
    if members > len(names):
        notes.append(
            f"the motion does not determine which tensors {members - len(names)} of "
            f"{count(members, 'state')} of the optimiser belong to: what moved them is not known"
        )
    if pairs > len(records):
        notes.append(
            f"the optimiser's states do not explain the motion on "
            f"{count(pairs - len(records), 'segment')} of {pairs:,}: what moved the weights there is "
            "not known"
        )
    lacking = [
        {*names.values()} - {name for group in record.groups for name in group.tensors}
        for record in records.values()
    ]
    tensors = sorted({name for missing in lacking for name in missing})
    if tensors:
        notes.append(
            f"no step of the optimiser explains the motion of {few([*map(repr, tensors)])} on some "
            "segments: what moved them there is not known"
        )
    if follower.reasons:
        notes.append(f"left out some of the optimiser's states: {few([*follower.reasons], 2)}")
    return notes
