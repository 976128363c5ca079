"""Assumptions checked on a small sample before a long run; each failure names the usual culprits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..recorder.staging import same_bytes
from ..trajectory import is_statistic
from .batches import Order
from .evaluate import Objective, unpack
from .sharing import tensors_of
from .sources import change_tensors
from .sums import Evaluation

_SAMPLE = 256
_AGREE = {"float32": 1e-4, "float64": 1e-4, "tf32": 1e-2, "bfloat16": 1e-2}
_REPEATS = 1e-6


@dataclass(frozen=True)
class Identity:
    """What a loss is at one point of one sample: its value and its gradient's Euclidean norm."""

    loss: float
    gradient_norm: float

    def matches(self, other: Identity) -> bool:
        """Whether both are the same loss, up to what another machine's kernels may change."""
        return all(
            abs(mine - theirs) <= 1e-3 * max(abs(mine), abs(theirs), 1e-12)
            for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)
        )


def _norm(evaluation: Evaluation) -> float:
    return math.sqrt(math.fsum(float((each**2).sum()) for each in evaluation.gradient.values()))


@dataclass(frozen=True)
class _Scale:
    """What differences are measured against: Σ|value| of an element, and the larger gradient of a sample and its half.

    At a minimum the gradient of the sample is pure rounding, and the loss itself may cross zero.
    """

    value: float
    gradient: float

    def apart(self, one: Evaluation, other: Evaluation) -> float:
        """The larger of the relative differences of the values and of the gradients (Euclidean); NaN where one is NaN."""
        gradients = math.sqrt(
            math.fsum(float(((one.gradient[name] - other.gradient[name]) ** 2).sum()) for name in one.gradient)
        )
        differences = [abs(one.loss - other.loss) / self.value, gradients / self.gradient]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def _scale(objective: Objective, name: str, whole: Evaluation, half: Evaluation, batch: Any) -> _Scale:
    def absolute(batch: Any) -> Any:
        values, weights = objective.values(name, batch)
        return values.abs(), weights

    value = max(float(objective.over(absolute, [batch], gradient=False).loss), 1e-12)
    return _Scale(value, max(_norm(whole), _norm(half), 1e-12 * value))


def identify(objective: Objective, name: str) -> Identity:
    """A loss's value and gradient norm on the first 256 examples, at the point the objective holds.

    Raises:
        InputError: where the forward pass changes the model.
    """
    with _model_unwritten(objective, name):
        found = _over(objective, name, *_sample(objective, name))
    return Identity(float(found.loss), _norm(found))


def _over(objective: Objective, name: str, *batches: Any, gradient: bool = True) -> Evaluation:
    return objective.over(partial(objective.values, name), batches, gradient=gradient)


def _sample(objective: Objective, name: str) -> list[Any]:
    """A sample no larger than a batch, so that whatever fits a batch fits the probe; a term of the parameters needs none."""
    split = objective.losses[name].split
    if split is None:
        return [None]
    start = _start(objective, name)
    return [objective.splits[split].sample(start, start + _count(objective, split))]


def _start(objective: Objective, name: str) -> int:
    """Where the sample starts: at the first examples that weigh anything (targets may all be ignored, text all padding)."""
    split = objective.splits[objective.losses[name].on]
    count = _count(objective, split.name)
    for start in range(0, split.examples, count):
        if objective.weighs(name, split.sample(start, start + _cut(count))):
            return start
    raise InputError(
        f"the weights of loss {name!r} on split {split.name!r} sum to 0 wherever they were looked at. Give elements a weight."
    )


def _groups_weigh(objective: Objective, name: str) -> None:
    """Refuse weights that are negative, and groups whose elements all weigh nothing: such a group has no loss."""
    split, order = objective.splits[objective.losses[name].on], objective.order(name)
    lowest = objective.lowest_weight(name, split.sample(0, _count(objective, split.name)))
    if lowest is not None and lowest < 0:
        raise InputError(
            f"a weight of loss {name!r} is {lowest:.6g}. Weights say how much an element counts: give none below 0."
        )
    if order is not None and lowest is not None and (empty := _weightless(objective, name, order)) is not None:
        raise InputError(
            f"the weights of group {order.labels[empty]!r} of loss {name!r} on split {split.name!r} sum to 0 (are all its targets "
            "ignored?), so it has no loss. Give its examples to another group in group_by, or leave them out of the data."
        )


def _weightless(objective: Objective, name: str, order: Order) -> int | None:
    """The first group of which no element weighs anything."""
    split = objective.splits[objective.losses[name].on]
    for at in range(len(order.labels)):
        with contextlib.closing(split.batches(objective.batch_sizes[split.name], order, range(at, at + 1))) as batches:
            if not any(objective.weighs(name, batch) for _, batch in batches):
                return at
    return None


def drop_weightless_replicates(objective: Objective, name: str) -> list[str]:
    """Give up standard errors where a random part of the examples weighs nothing; says so."""
    hidden = objective.replicates_of(name)
    order = None if hidden is None else objective.order(hidden)
    if hidden is None or order is None:
        return []
    if _weightless(objective, name, order) is None:
        return []
    del objective.replicated[hidden]
    return [f"loss {name!r} has no standard errors: a tenth of the subset weighs nothing. Take a larger one."]


def _cut(count: int) -> int:
    return count // 2 + 1 if count > 2 else 1


def _count(objective: Objective, split: str) -> int:
    return min(_SAMPLE, objective.batch_sizes[split], objective.splits[split].examples)


def check_loss(objective: Objective, name: str) -> list[str]:
    """Probe one loss at the point the objective holds; returns notes worth recording.

    Raises:
        InputError: where an evaluation writes into its batch or the model, two evaluations or two batch sizes disagree, or the
            loss is not its function's own mean.
    """
    _writes_nothing(objective, name)
    loss = objective.losses[name]
    if loss.split is None:
        first = _over(objective, name, None)
        _finite(name, first)
        scale = _Scale(max(abs(first.loss), 1e-12), max(_norm(first), 1e-12))
        return _repeats(objective, name, None, scale.apart(first, _over(objective, name, None)))
    split = objective.splits[loss.split]
    start = _start(objective, name)
    _groups_weigh(objective, name)
    stop = min(start + _count(objective, loss.split), split.examples)
    cut = min(start + _cut(stop - start), stop)
    sample, half = split.sample(start, stop), split.sample(start, cut)
    first = _over(objective, name, sample)
    _finite(name, first)
    scale = _scale(objective, name, first, _over(objective, name, half), sample)
    notes = _repeats(objective, name, sample, scale.apart(first, _over(objective, name, split.sample(start, stop))))
    if objective.norm_stats == "batch":
        objective.first_axis(name, sample, stop - start)
        _in_order(objective, name, sample, range(start, stop))
        _statistics_unused(objective, name, sample, float(first.loss), scale.value)
        batch_size = objective.batch_sizes[loss.split]
        last = (split.examples - 1) // batch_size * batch_size
        _over(objective, name, split.sample(last, split.examples))  # it may be too small for batch statistics
    elif cut < stop:
        parts = _over(objective, name, half, split.sample(cut, stop))
        _batches(objective, name, first, parts, scale.apart(first, parts))
        _from_all_over(objective, name, stop - start)
    if loss.reduces:
        _own_mean(objective, name, sample, float(first.loss), scale.value)
    return notes


def _from_all_over(objective: Objective, name: str, count: int) -> None:
    """The same on examples from all over the split: the first ones may be of one class, or all labelled."""
    split, loss = objective.splits[objective.losses[name].on], objective.losses[name]
    positions = split.spread(count)
    if positions is None or len(positions) < 2:
        return
    try:
        sample, *parts = (split.at(each) for each in (positions, *positions.tensor_split(2)))  # unlike each other
    except InputError:  # examples of several shapes, say, which stack in the order of the data alone
        return
    if not objective.weighs(name, parts[0]):
        return
    whole, apart = _over(objective, name, sample), _over(objective, name, *parts)
    scale = _scale(objective, name, whole, _over(objective, name, parts[0]), sample)
    _batches(objective, name, whole, apart, scale.apart(whole, apart))
    if loss.reduces:
        _own_mean(objective, name, sample, float(whole.loss), scale.value)


def _writes_nothing(objective: Objective, name: str) -> None:
    """Refuse a loss that writes into its batch or the model; the first evaluation of all, for writing again may change nothing."""
    split = objective.losses[name].split
    batch = None if split is None else objective.splits[split].sample(0, _count(objective, split))
    copy = change_tensors(batch, Tensor.clone)

    def values(batch: Any) -> tuple[Tensor, None]:
        return objective.values(name, batch)[0], None  # elements may all weigh nothing here

    with _model_unwritten(objective, name):
        objective.over(values, [copy])
    if (place := _written(batch, copy, "batch")) is not None:
        raise InputError(
            f"loss {name!r} writes into its batch ({place} is not what it was), which other losses and later passes are given as "
            f"well. Work on a copy: {place}.clone() of a tensor, dict(batch) where keys change, no inplace=True on the inputs."
        )


def _written(batch: Any, copy: Any, place: str) -> str | None:
    """The first place at which a copy of a batch, new before an evaluation, was written to."""
    if isinstance(batch, Tensor):
        kept = isinstance(copy, Tensor) and copy._version == 0 and _same_bytes(batch, copy)
        return None if kept else place
    if type(batch) is not type(copy):
        return place
    if isinstance(batch, Mapping):
        if batch.keys() != copy.keys():
            return place
        inside = [(key, batch[key], copy[key]) for key in batch]
    elif isinstance(batch, tuple | list):
        if len(batch) != len(copy):
            return place
        inside = [(at, *pair) for at, pair in enumerate(zip(batch, copy, strict=True))]
    else:
        return None if batch is copy else place
    found = (_written(one, other, f"{place}[{key!r}]") for key, one, other in inside)
    return next((each for each in found if each is not None), None)


@contextlib.contextmanager
def _model_unwritten(objective: Objective, name: str) -> Iterator[None]:
    """Refuse evaluations that write into a floating tensor of the model, whether or not its values change this time.

    Integers may count; an unallocated tensor may be replaced by another, as caches are. Of allocated ones the bytes are compared too,
    of others, such as the base of an adapter, which may be large, what torch counts of writes alone.
    """
    before = [
        (key, each, each._version, each.detach().clone() if each.requires_grad else None)
        for key, each in _floating(objective).items()
    ]
    yield
    after = _floating(objective)
    for key, tensor, version, values in before:
        replaced = after.get(key) is not tensor
        written = tensor._version != version or (values is not None and not _same_bytes(tensor, values))
        if (replaced and values is not None) or written:
            raise InputError(
                f"a forward pass of loss {name!r} changes tensor {key!r} of the model, in eval mode too, so that it is not the loss "
                "of the checkpoint. Usual culprits: Embedding(max_norm=...), weights clamped in forward, statistics updated "
                "without a look at self.training. Write in training mode only, or leave the tensor as it is and use a copy."
            )


def _floating(objective: Objective) -> dict[str, Tensor]:
    held = {**dict(objective.model.named_parameters()), **dict(objective.model.named_buffers())}
    return {key: each for key, each in held.items() if each.is_floating_point() or each.is_complex()}


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike to the bit, NaN and the sign of zero included."""
    if one.layout != torch.strided:  # sparse: writing into it moves its version all the same
        return (one.dtype, one.shape, one.layout) == (other.dtype, other.shape, other.layout)
    return other.layout == torch.strided and same_bytes({"": one.detach()}, {"": other.detach()})


def _finite(name: str, evaluation: Evaluation) -> None:
    if not math.isfinite(evaluation.loss) or not math.isfinite(_norm(evaluation)):
        raise InputError(
            f"loss {name!r} is {evaluation.loss} at the first checkpoint, its gradient norm {_norm(evaluation)}. Start later "
            "with --steps A:, or look for a division or a logarithm of zero in the loss."
        )


def _repeats(objective: Objective, name: str, batch: Any, apart: float) -> list[str]:
    if not apart <= _REPEATS:
        module = _random_module(objective, name, batch)
        raise InputError(
            f"loss {name!r} is not deterministic: two evaluations at one point differ by {apart:.1e}"
            + (f"; the first module to differ is {module}" if module else "")
            + ". Usual culprits: random augmentation in the data set, dropout called with training=True, noise or sampling in "
            "the model or the loss."
        )
    return (
        [f"loss {name!r}: kernels do not repeat bit for bit (two evaluations differ by {apart:.1e})"]
        if apart > 0
        else []
    )


def _random_module(objective: Objective, name: str, batch: Any) -> str | None:
    """The first module whose outputs differ between two forward passes over one batch, innermost first."""
    seen: list[list[tuple[str, list[Tensor]]]] = []
    label: str

    def record(label: str) -> Any:
        return lambda module, inputs, outputs: seen[-1].append((label, [each.clone() for each in tensors_of(outputs)]))

    hooks = [
        module.register_forward_hook(
            record(f"{label!r} ({type(module).__name__})" if label else "the model's own forward")
        )
        for label, module in objective.model.named_modules()
    ]
    try:
        for _ in range(2):
            seen.append([])
            _over(objective, name, batch, gradient=False)
    finally:
        for hook in hooks:
            hook.remove()
    for (label, one), (_, other) in zip(*seen, strict=False):
        if not all(map(torch.equal, one, other)):
            return label
    return None


def _batches(objective: Objective, name: str, whole: Evaluation, parts: Evaluation, apart: float) -> None:
    if not apart <= _AGREE[objective.precision]:
        raise InputError(
            f"loss {name!r} depends on how split {objective.losses[name].split!r} is cut into batches: one batch or two give values "
            f"{whole.loss:.6g} and {parts.loss:.6g}, {apart:.1e} apart. Usual culprits: batch statistics (use --norm-stats batch "
            "--batch-size N), a loss that compares examples with each other, a mean taken inside Loss(call=fn)."
        )


def _in_order(objective: Objective, name: str, sample: Any, examples: range) -> None:
    """In batch mode a batch holds several groups: examples given in reverse must have their values in reverse."""
    split = objective.splits[objective.losses[name].on]
    if objective.order(name) is None:
        return
    reverse = Order([0], [torch.tensor(examples).flip(0)])
    found: list[Tensor] = []

    def values(batch: Any) -> tuple[Tensor, None]:
        found.append(objective.values(name, batch)[0].double())
        return found[-1], None

    with contextlib.closing(split.batches(objective.batch_sizes[split.name], reverse)) as batches:
        objective.over(values, [sample, next(batches)[1]], gradient=False)
    one, other = found[0], found[1].flip(0)
    if one.shape != other.shape or not (one - other).abs().sum() <= _AGREE[objective.precision] * one.abs().sum():
        raise InputError(
            f"loss {name!r} on split {split.name!r} does not give its values in the order of the examples, so that groups cannot be "
            "told apart with --norm-stats batch. Usual culprit: a collate_fn that reorders a batch. Let it keep the order "
            "(pack_padded_sequence does with enforce_sorted=False)."
        )


def _statistics_unused(objective: Objective, name: str, batch: Any, before: float, scale: float) -> None:
    """In batch mode, moving the running statistics must not move the loss."""
    statistics = [tensor for key, tensor in objective.model.named_buffers() if is_statistic(key)]
    kept = [tensor.clone() for tensor in statistics]
    for tensor in statistics:
        tensor.mul_(1.5).add_(0.5)
    after = float(_over(objective, name, batch, gradient=False).loss)
    for tensor, values in zip(statistics, kept, strict=True):
        tensor.copy_(values)
    if not abs(after - before) <= _AGREE[objective.precision] * scale:
        raise InputError(
            f"loss {name!r} reads running statistics in spite of --norm-stats batch ({before:.6g} becomes {after:.6g} when they "
            "move). Usual culprits: batch_norm imported by name from torch.nn.functional, a scripted module, statistics that are "
            "not the model's buffers themselves. Call F.batch_norm with those or use the torch.nn layers."
        )


def _own_mean(objective: Objective, name: str, batch: Any, ours: float, scale: float) -> None:
    inputs, targets = unpack(batch)

    def mean(_: Any) -> tuple[Tensor, None]:
        return objective.functions[name].mean()(objective.model(inputs), targets).reshape(1), None

    theirs = float(objective.over(mean, [batch], gradient=False).loss)
    if not abs(ours - theirs) <= _AGREE[objective.precision] * scale:
        raise InputError(
            f"the mean of loss {name!r} over its elements is {ours:.6g}, but its own reduction='mean' gives {theirs:.6g}. Usual "
            "culprits: ignore_index or class weights. Say how elements are weighted: Loss(call=fn) returning (values, weights)."
        )
