r"""Tell what an optimiser did from its states in checkpoints of consecutive steps.

A state names neither its optimiser's class nor, as a rule, the tensors it belongs to, and whether
the learning rate in it is that of the step before or of the next depends on who saved it. The
motion of the weights tells all three: a step of Adam moved a tensor by
$-\kappa\,m/(\sqrt{v/(1-\beta_2^t)}+\epsilon)$, with $\kappa=\eta/(1-\beta_1^t)$, and one of SGD with
momentum by $-\eta$ times its buffer, to roundings. Only what the motion confirms is believed.
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
_MOST_PAIRS = 256  # of checkpoints from which names are told
_MOST_COMPARED = 2**20  # motions with formulas, of one pair
# by how much a motion may differ from that of a formula: roundings of the weights, and a share of
# the motion, which a bias correction in float32 changes by 3e-5
_ROUNDINGS, _SHARE = 2.0, 1e-4
_MOST_STEPS = 2**53
_LARGEST = 1e300  # of settings
_OTHER = "they are of another optimiser than Adam, AdamW and SGD with momentum"
_NO_MEMORY = "they remember no gradients, as of SGD without momentum, so that nothing tells a step"


class _Untold(Exception):
    """The reason why a state tells nothing."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The settings of a group; `decoupled` is None where older torch did not say."""

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
    """The state of one tensor: the number of its group, the steps made with it, None where they are
    not counted, and its moments or its momentum buffer.
    """

    group: int
    steps: int | None
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _State:
    """The state of an optimiser: its groups, the members that had a gradient by number, and names
    of these where torch wrote them.
    """

    groups: tuple[_Settings, ...]
    members: dict[int, _Member]
    names: dict[int, str]


# --- reading a state --------------------------------------------------------------------------------


def _parsed(saved: object) -> _State:
    """Return the state that an optimiser's `state_dict` holds, which anybody may have written.

    Raises:
        _Untold: where it is none of an optimiser that is followed.
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
    """Return the settings of a group of Adam, AdamW or SGD with momentum."""
    rate, decay = _number(group, "lr"), _number(group, "weight_decay")
    maximize = group.get("maximize") is True
    if "betas" in group and "amsgrad" in group:
        decoupled = group.get("decoupled_weight_decay")
        betas = group["betas"]
        if group["amsgrad"] is not False:
            raise _Untold("there is no formula for AMSGrad")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise _Untold("their betas are no pair of numbers")
        first, second = (_number({"betas": beta}, "betas") for beta in betas)
        if not (0 <= first < 1 and 0 <= second < 1):
            raise _Untold("their betas are no pair of numbers")
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
        raise _Untold("their count of steps is none")
    first, second = _tensor(state["exp_avg"]), _tensor(state["exp_avg_sq"])
    if first.shape != second.shape:
        raise _Untold("their moments have two shapes")
    return _Member(group=number, steps=int(steps), first=first, second=second)


def _tensor(value: object) -> Tensor:
    if isinstance(value, Tensor) and _is_plain(value) and value.dtype in _FLOATING:
        return value.detach()
    raise _Untold("their moments are no plain tensors of floating-point numbers")


def _number(values: Mapping[Any, object], name: str) -> float:
    value = values.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and _is_plain(value):
        value = value.item()
    if isinstance(value, int | float) and type(value) is not bool and abs(value) <= _LARGEST:
        return float(value)
    raise _Untold(f"their {name} is no number")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


# --- the motion -------------------------------------------------------------------------------------


def _sampled(tensor: Tensor) -> Tensor:
    """Return some numbers of a tensor, all of a small one, in float64."""
    flat = tensor.reshape(-1)
    return flat[:: (max(1, len(flat) // _SAMPLE) - 1) | 1].double()


@dataclass(frozen=True)
class _Motion:
    """The motion of a tensor over one step, on its sample.

    Args:
        start: the weights before it.
        moved: by how much they moved.
        rounding: the norm of what roundings of them may make of that.
    """

    start: Tensor
    moved: Tensor
    rounding: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> _Motion:
        """Return the motion from one point to the next."""
        start, end = _sampled(before), _sampled(after)
        largest = torch.maximum(start.abs(), end.abs())
        rounding = _ROUNDINGS * torch.finfo(after.dtype).eps * float(largest.norm())
        return cls(start, end - start, rounding)


@dataclass(frozen=True)
class _Formula:
    """The step that a state says was made with its tensor: what it added, on the sample, and the
    factor of the weights for the decay.
    """

    added: Tensor
    decay: float
    share: float

    @classmethod
    def of(cls, settings: _Settings, member: _Member) -> _Formula:
        """Return the step of a member under some settings."""
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
        """Return by how much a motion differs from the step, 1 being what roundings allow."""
        step = self.added + self.decay * motion.start
        allowed = motion.rounding + self.share * float(step.norm())
        difference = float((motion.moved - step).norm())
        if not difference:
            return 0.0
        return difference / allowed if allowed and math.isfinite(difference) else math.inf


def _variants(before: _State, after: _State) -> Iterator[tuple[_Settings, ...]]:
    """Yield the settings that the step between two states may have been made with: their learning
    rates are those of one of the two, and nothing else may have changed.
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
    """Tell whether a member's count rose by one, or its buffer changed where there is no count."""
    if after.steps is None:
        return before is None or not torch.equal(_sampled(before.first), _sampled(after.first))
    return after.steps == (1 if before is None else (before.steps or 0) + 1)


# --- a series ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A checkpoint that holds a state: functions that return its weights, the state, and a checksum
    of the file that holds this; `check` raises where the file is damaged inside.
    """

    tensors: Callable[[], Tensors]
    optimizer: Callable[[], object]
    identity: Callable[[], str]
    check: Callable[[], None]


@dataclass(frozen=True)
class _Point:
    """A checkpoint: its weights and the state beside them."""

    tensors: Tensors
    state: _State


@dataclass
class _Follower:
    """Follow an optimiser through the checkpoints of a series.

    Args:
        sources: by step.
        progress: called as `progress(what, done, total)`.
    """

    sources: Mapping[int, Source]
    progress: Progress
    reasons: dict[str, None] = field(default_factory=dict)
    _kept: dict[int, _Point | None] = field(default_factory=dict)
    _shapes: dict[int, torch.Size] = field(default_factory=dict)

    def point(self, step: int) -> _Point | None:
        """Return a checkpoint, None where its state tells nothing; the last two are kept."""
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
        """Refuse members of other shapes than the weights have, or than before."""
        shapes = {tensor.shape for tensor in point.tensors.values()}
        for index, member in point.state.members.items():
            shape = member.first.shape
            if shape not in shapes or self._shapes.setdefault(index, shape) != shape:
                raise _Untold("their parameters are not those of the weights beside them")

    def pairs(self) -> Iterator[tuple[int, _Point, _Point]]:
        """Yield consecutive checkpoints with states, by the step of the later one."""
        steps = [step for step in self.sources if step - 1 in self.sources]
        for done, step in enumerate(steps):
            self.progress("following the optimiser at", done, len(steps))
            before, after = self.point(step - 1), self.point(step)
            if before is not None and after is not None:
                yield step, before, after

    def names(self) -> dict[int, str]:
        """Return the names of the tensors that members belong to, as far as motions tell them.

        Raises:
            _Untold: where a tensor moved by no step of the optimiser, or nothing tells any name.
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
            raise _Untold("which tensors they belong to cannot be told from the motion")
        if pairs and not names:
            raise _Untold(_NO_MEMORY)
        return names

    def record(
        self, step: int, before: _Point, after: _Point, names: Mapping[int, str]
    ) -> OptimizerStep | None:
        """Return the record of the step between two checkpoints, of the tensors whose motions it
        explains; None where it explains none.
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
    """Return the names that members may have after one more step, by their shapes and by the motion
    it would have made.
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
        raise _Untold("the weights did not move by their steps, or not by these alone")
    return _eliminated(known | {index: frozenset(names) for index, names in allowed.items()})


def _named(index: int, point: _Point) -> frozenset[str]:
    """Return the names of the tensors that have a member's shape; that which torch wrote alone,
    where it is one of them.
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
    """Return names without those that other members have for certain: some members that have as many
    names between them as they are have these for themselves.

    Raises:
        _Untold: where members have fewer names than they are.
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
    """Return what a step did with some members, those that it treated alike together."""
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
    """Return the norm of the gradient that SGD was given, which its buffers tell; NaN for Adam,
    whose moments are stored.
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
    """Return what states tell of the optimiser's steps, by training step, and notes.

    Args:
        sources: the checkpoints of a series by step, ascending.
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
    """Return what is written beside a checkpoint."""
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
        f"left out the optimiser's states: {few(reasons, 2)}. Weights are imported, and what moved "
        "them is not known"
    )


def _notes(
    follower: _Follower,
    names: Mapping[int, str],
    members: int,
    records: Mapping[int, OptimizerStep],
    pairs: int,
) -> list[str]:
    """Say what is known of the optimiser, and what is not."""
    kinds = dict.fromkeys(group.optimizer for record in records.values() for group in record.groups)
    notes = [
        f"took {count(len(records), 'step')} of {few([*kinds])} from the optimiser's states, as the "
        "motion of the weights confirms: `lca run --causes` reads them"
    ] * bool(records)
    if members > len(names):
        notes.append(
            f"which tensors {members - len(names)} of {count(members, 'state')} of the optimiser "
            "belong to cannot be told from their motion: what moved them is not known"
        )
    if pairs > len(records):
        notes.append(
            f"{count(pairs - len(records), 'segment')} of {pairs:,} did not move by a step that "
            "the optimiser's states tell: what moved the weights there is not known"
        )
    lacking = [
        {*names.values()} - {name for group in record.groups for name in group.tensors}
        for record in records.values()
    ]
    tensors = sorted({name for missing in lacking for name in missing})
    if tensors:
        notes.append(
            f"{few([*map(repr, tensors)])} moved by no step of the optimiser on some segments: "
            "what moved them there is not known"
        )
    if follower.reasons:
        notes.append(f"left out some of the optimiser's states: {few([*follower.reasons], 2)}")
    return notes
