"""Check assumptions on a small sample before a long run; each error message names the usual
culprits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.trajectory import is_statistic
from ...errors import InputError, few
from ...tasks.task import Loss, every_name
from ..precisions import PRECISIONS
from .batches import Groups, Order, Split
from .containers import copied, fresh, named_parts, opened, same_bytes, tensors_of
from .directions import NoGradients, SquaredNorms, WholeGradients, blocks
from .element_groups import ElementOrder, element_codes
from .evaluate import Objective
from .returned import inputs_and_targets
from .sources import Positions
from .sums import Evaluation

_SAMPLE = 256
_REPEATS = 1e-6
_DEPTH = 4  # references followed from a loss's function to find the names of its parameters


@dataclass(frozen=True)
class Identity:
    """Hold the value of a loss and the Euclidean norm of its gradient, at one point on one sample."""

    loss: float
    gradient_norm: float

    def matches(self, other: Identity) -> bool:
        """Return whether both come from the same loss, up to what another machine's kernels may
        change.
        """
        return all(
            abs(value - other_value) <= 1e-3 * max(abs(value), abs(other_value), 1e-12)
            for value, other_value in zip(
                asdict(self).values(), asdict(other).values(), strict=True
            )
        )


def _norm(evaluation: Evaluation) -> float:
    """Return the Euclidean norm of a gradient."""
    return _distance(evaluation, None)


def _distance(one: Evaluation, other: Evaluation | None) -> float:
    """Return the Euclidean distance of two gradients, or of one from 0."""
    parts = []
    for name, gradient in one.gradient.items():
        flat = gradient.reshape(1, -1)
        beside = None if other is None else other.gradient[name].reshape(1, -1)
        for place in blocks(*flat.shape):
            piece = flat[place].double()
            piece = piece if beside is None else piece - beside[place]
            parts.append(float((piece**2).sum()))
    return math.sqrt(math.fsum(parts))


@dataclass(frozen=True)
class _Scale:
    """Hold the magnitudes that differences are relative to: mean |value| of an element, and the
    larger gradient norm of a sample and its half.

    At a minimum the gradient of the sample is pure rounding, and the loss itself may be near zero.
    """

    value: float
    gradient: float

    def apart(self, one: Evaluation, other: Evaluation) -> float:
        """Return the larger of the relative differences of the values and of the gradients
        (Euclidean), or NaN if one is NaN.

        Args:
            one: the first evaluation.
            other: the second evaluation.
        """
        gradients = _distance(one, other) / self.gradient
        differences = [float(abs(one.loss - other.loss)) / self.value, gradients]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


def _scale(
    objective: Objective, name: str, whole: Evaluation, half: object, batch: object
) -> _Scale:
    def absolute(batch: object) -> tuple[Tensor, Tensor | None]:
        values, weights = objective.values(name, batch)
        return values.abs(), weights

    value = max(float(objective.evaluate_on_batches(absolute, [batch], NoGradients()).loss), 1e-12)
    return _Scale(value, max(_norm(whole), _norm_over(objective, name, half)[1], 1e-12 * value))


def identify(objective: Objective, name: str) -> Identity:
    """Return a loss's value and gradient norm on the first 256 examples, at the point in the
    objective.

    Args:
        objective: the objective.
        name: name of the loss.

    Raises:
        InputError: if the forward pass changes the model.
    """
    with _model_unwritten(objective, name):
        return Identity(*_norm_over(objective, name, *sample_of(objective, name)))


def loss_of_sample(objective: Objective, name: str) -> float:
    """Return a loss on the sample that `identify` uses, at the point in the objective.

    If the loss does not depend on the batches, compute it in halves, which take half the memory.

    Args:
        objective: the objective.
        name: name of the loss.
    """
    split = objective.losses[name].split
    if split is None or objective.norm_stats == "batch":
        return _loss_over(objective, name, *sample_of(objective, name))
    start = _start(objective, name)
    stop = min(start + _count(objective, split), objective.splits[split].examples)
    cut = min(start + _cut(stop - start), stop)
    cuts = [range(start, cut), *([range(cut, stop)] if cut < stop else [])]
    return _loss_over(objective, name, *objective.splits[split].samples(cuts))


def _norm_over(objective: Objective, name: str, batch: object) -> tuple[float, float]:
    """Return a loss on one batch and the Euclidean norm of its gradient, without storing the
    gradient.
    """
    gradients = SquaredNorms(objective.tensors.differentiable)
    squared = objective.evaluate_on_batches(partial(objective.values, name), [batch], gradients)
    squares = math.fsum(float(part) for part in squared.gradient.values())
    return float(squared.loss), math.sqrt(squares / float(squared.weight))


def _over(objective: Objective, name: str, *batches: Any) -> Evaluation:
    """Return a loss on some batches with its gradient, in the type of the computation."""
    gradients = WholeGradients(objective.tensors.differentiable, objective.dtype)
    return objective.evaluate_on_batches(partial(objective.values, name), batches, gradients)


def _loss_over(objective: Objective, name: str, *batches: Any) -> float:
    """Return a loss on some batches."""
    values = partial(objective.values, name)
    return float(objective.evaluate_on_batches(values, batches, NoGradients()).loss)


def sample_of(objective: Objective, name: str) -> list[Any]:
    """Return a sample no larger than a batch, so that it fits in memory; [None] for a term of the
    parameters.

    Args:
        objective: the objective.
        name: name of the loss.
    """
    split = objective.losses[name].split
    if split is None:
        return [None]
    start = _start(objective, name)
    return [objective.splits[split].sample(start, start + _count(objective, split))]


def weighty_part(objective: Objective, name: str, most: int) -> object:
    """Return a few neighbouring examples of a loss's split, some of which have weight.

    Args:
        objective: evaluates the loss.
        name: name of the loss, which has a split.
        most: maximum number of examples.
    """
    split = objective.splits[objective.losses[name].on]
    start = _start(objective, name)
    parts = (
        split.sample(first, min(first + most, split.examples))
        for first in range(start, start + _count(objective, split.name), most)
    )
    return next(part for part in parts if objective.loss_values.weighs(name, part))


def _start(objective: Objective, name: str) -> int:
    """Return the position where the sample starts, so that some of its examples have weight
    (targets may all be ignored, text all padding).

    Try the first halves of windows of the sample's size, then the second halves, so that every
    example is tried eventually.

    Raises:
        InputError: if no example has weight.
    """
    split = objective.splits[objective.losses[name].on]
    count = _count(objective, split.name)
    known = objective.data.starts.get(name)
    if known is not None and (
        _weighs_alike(objective, name)
        or objective.loss_values.weighs(name, split.sample(known, known + count))
    ):
        return known
    cut = _cut(count)
    firsts = [
        range(start, min(start + cut, split.examples)) for start in range(0, split.examples, count)
    ]
    others = [range(first.stop, min(first.start + count, split.examples)) for first in firsts]
    for halves in (firsts, [other for other in others if other]):
        for half, batch in zip(halves, split.samples(halves), strict=True):
            if objective.loss_values.weighs(name, batch):
                objective.data.starts[name] = half.start // count * count
                return objective.data.starts[name]
    raise InputError(
        f"the weights of loss {name!r} on split {split.name!r} sum to 0 over all its "
        f"{split.examples} examples, so it is the mean of nothing. Give elements a weight."
    )


def _weighs_alike(objective: Objective, name: str) -> bool:
    """Return whether weights come only from the targets, so that they are equal at every checkpoint
    and need no forward pass.
    """
    return objective.loss_values.gave_weights.get(name) is False


def _groups_weigh(objective: Objective, name: str, sample: object) -> None:
    """Check that no weight is negative and every group has weight; a group without weight has no
    loss.

    Raises:
        InputError: if one is, or has none.
    """
    split, order = objective.splits[objective.losses[name].on], objective.order(name)
    first = [] if _start(objective, name) == 0 else [split.sample(0, _count(objective, split.name))]
    lows = [
        low
        for batch in (*first, sample)
        if (low := objective.loss_values.lowest_weight(name, batch)) is not None
    ]
    lowest = min(lows, default=None)
    if lowest is not None and lowest < 0:
        raise InputError(
            f"a weight of loss {name!r} is {lowest:.6g}. Weights say how much an element counts: "
            "return none below 0."
        )
    if (
        order is not None
        and lowest is not None
        and (empty := _weightless(objective, name, order)) is not None
    ):
        raise InputError(
            f"the weights of group {order.labels[empty]!r} of loss {name!r} on split "
            f"{split.name!r} sum to 0 (are all its targets ignored?), so it has no loss. Move its "
            f"{'elements' if isinstance(order, ElementOrder) else 'examples'} to another group in "
            "group_by, or leave them out of the data."
        )


def _weightless(objective: Objective, name: str, order: Groups) -> int | None:
    """Return the index of the first group without weight, or None."""
    split = objective.splits[objective.losses[name].on]
    if isinstance(order, ElementOrder):
        return _weightless_elements(objective, name, order, split)
    for group in range(len(order.labels)):
        with contextlib.closing(
            split.batches(objective.batch_sizes[split.name], order, range(group, group + 1))
        ) as batches:
            if not any(objective.loss_values.weighs(name, batch) for _, batch in batches):
                return group
    return None


def _weightless_elements(
    objective: Objective, name: str, order: ElementOrder, split: Split
) -> int | None:
    """Return the index of the first group of elements without weight in any example, or None."""
    weighs = torch.zeros(len(order.labels), dtype=torch.bool, device="cpu")
    size = objective.batch_sizes[split.name]
    with contextlib.closing(split.batches(size)) as batches:
        for codes, (_, batch) in zip(order.batches(size), batches, strict=False):
            weights = objective.loss_values.weights(name, batch)
            if weights is not None:
                codes = element_codes(codes, weights)[weights > 0]
            weighs[torch.unique(codes).long().cpu()] = True
            if bool(weighs.all()):
                return None
    return int(weighs.int().argmin())


def drop_impossible_replicates(objective: Objective, name: str) -> list[str]:
    """Drop standard errors if a random part of the examples has no weight, or if parts in one batch
    cannot be told apart; return a note about it.

    Args:
        objective: the objective.
        name: name of the loss.
    """
    hidden = objective.replicates_of(name)
    order = None if hidden is None else objective.order(hidden)
    if hidden is None or order is None:
        return []
    if _weightless(objective, name, order) is not None:
        why = "a tenth of the subset has no weight. Use a larger subset."
    elif objective.norm_stats == "batch" and not _has_a_value_for_each_example(objective, name):
        why = (
            "with --norm-stats batch the first axis of its values must run over the examples, so "
            "that the parts of the subset can be told apart."
        )
    else:
        return []
    del objective.data.replicated[hidden]
    return [f"loss {name!r} has no standard errors: {why}"]


def _has_a_value_for_each_example(objective: Objective, name: str) -> bool:
    """Return whether the first axis of a loss's values is as long as the batch, on a sample."""
    split = objective.splits[objective.losses[name].on]
    start = _start(objective, name)
    stop = min(start + _count(objective, split.name), split.examples)
    return _shape_of_values(objective, name, split.sample(start, stop))[:1] == (stop - start,)


def _shape_of_values(objective: Objective, name: str, batch: object) -> torch.Size:
    """Return the shape of a loss's values on a batch, which is not written into."""
    with objective.mode():
        return objective.values(name, fresh(batch))[0].shape


def _cut(count: int) -> int:
    return count // 2 + 1 if count > 2 else 1


def _count(objective: Objective, split: str) -> int:
    return min(_SAMPLE, objective.batch_sizes[split], objective.splits[split].examples)


def check_loss(objective: Objective, name: str) -> list[str]:
    """Check one loss at the point in the objective, and return notes to record.

    Args:
        objective: the objective.
        name: name of the loss.

    Raises:
        InputError: if an evaluation writes into its batch or the model, no gradient reaches any
            allocated tensor, two evaluations or two batch sizes disagree, or the loss differs from
            its function's own mean.
    """
    _writes_nothing(objective, name)
    loss = objective.losses[name]
    if loss.split is None:
        first = _over(objective, name, None)
        _has_gradient(objective, name, first)
        _finite(name, first)
        scale = _Scale(max(abs(float(first.loss)), 1e-12), max(_norm(first), 1e-12))
        notes = _repeats(objective, name, None, scale.apart(first, _over(objective, name, None)))
        return notes + _own_parameters(objective, name, None) + _casts(objective, name)
    split = objective.splits[loss.split]
    start = _start(objective, name)
    stop = min(start + _count(objective, loss.split), split.examples)
    cut = min(start + _cut(stop - start), stop)
    sample = split.sample(start, stop)
    first = _over(objective, name, sample)
    _has_gradient(objective, name, first)
    _elements_are_labelled(objective, name, sample, range(start, stop))
    _groups_weigh(objective, name, sample)
    _finite(name, first)
    halves = [split.sample(start, cut), *([split.sample(cut, stop)] if cut < stop else [])]
    scale = _scale(objective, name, first, _weighing(objective, name, halves), sample)
    notes = _repeats(
        objective,
        name,
        sample,
        scale.apart(first, _over(objective, name, split.sample(start, stop))),
    )
    if objective.norm_stats == "batch":
        _runs_over_examples(objective, name, sample, stop - start)
        _in_order(objective, name, sample, range(start, stop))
        _statistics_unused(objective, name, sample, float(first.loss), scale.value)
        batch_size = objective.batch_sizes[loss.split]
        last = (split.examples - 1) // batch_size * batch_size
        # the last batch may be too small for batch statistics
        _plain_mean(objective, name, split.sample(last, split.examples))
    elif cut < stop:
        parts = _over(objective, name, *halves)
        cuts = [range(start, stop), range(start, cut), range(cut, stop)]
        _batches(objective, name, first, parts, scale.apart(first, parts), cuts)
        _from_all_over(objective, name, stop - start)
    if loss.reduces:
        _own_mean(objective, name, sample, float(first.loss), scale.value)
    return notes + _own_parameters(objective, name, sample) + _casts(objective, name)


def _weighing(objective: Objective, name: str, batches: list[Any]) -> object:
    """Return the first batch in which any element has weight, or None."""
    return next((batch for batch in batches if objective.loss_values.weighs(name, batch)), None)


def _plain_mean(objective: Objective, name: str, batch: object) -> Evaluation:
    """Return the unweighted mean of a batch's values, because all may have weight 0, and its
    gradient.
    """
    return objective.evaluate_on_batches(
        lambda batch: (objective.values(name, batch)[0], None),
        [batch],
        SquaredNorms(objective.tensors.differentiable),
    )


def _has_gradient(objective: Objective, name: str, first: Evaluation) -> None:
    """Check that some batch of the split has a gradient for some allocated tensor; `first` belongs
    to a sample.

    A gradient whose values are all 0, as behind an inactive ReLU, counts.

    Raises:
        InputError: if none has.
    """
    allocated = {spec.name for spec in objective.allocated}
    if allocated - first.unreached:
        return
    if not allocated:
        raise InputError(
            f"loss {name!r} has no tensor to allocate to: every tensor of the model is frozen or "
            "fixed, and no checkpoint holds one. Do not freeze trained tensors when you build the "
            "model, and leave them out of Task(fixed=[…])."
        )
    loss = objective.losses[name]
    if loss.split is not None:
        split, count = objective.splits[loss.split], _count(objective, loss.split)
        cuts = [
            range(start, min(start + count, split.examples))
            for start in range(0, split.examples, count)
        ]
        if any(
            allocated - _plain_mean(objective, name, batch).unreached
            for batch in split.samples(cuts)
        ):
            return
    where = "" if loss.split is None else f" on split {loss.split!r}"
    raise InputError(
        f"loss {name!r}{where} has no gradient for any tensor of the model, so its change cannot be "
        "allocated. Look for torch.no_grad() or inference_mode() around it (as in evaluation "
        "functions), for detach(), .data, .item() or numpy on the way, for a count such as accuracy "
        "(argmax, comparisons), or for a module that merges or caches weights in eval mode. Give the "
        "loss that was minimised, as training computes it."
    )


def _own_parameters(objective: Objective, name: str, batch: object) -> list[str]:
    """Note the parameters outside the model that a loss depends on and has a gradient for."""
    with objective.mode():
        values, _ = objective.values(name, fresh(batch))
    of_model = {id(tensor) for tensor in every_name(objective.model).values()}
    own = [
        leaf
        for leaf in _leaves(values)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in of_model
    ]
    if not own:
        return []
    names = _names_beside(objective.loss_values.functions[name])
    named = few(
        [
            repr(names[id(leaf)]) if id(leaf) in names else f"one of shape {list(leaf.shape)}"
            for leaf in own
        ],
        5,
    )
    return [
        f"loss {name!r} has parameters of its own, {named}, which no checkpoint of the model "
        "holds: they stay as the task builds them. If they were trained, this is not the loss that "
        "was minimised: put the model and the loss into one module, record that, and write the loss "
        "as Loss(call=fn). If they were not, call requires_grad_(False) on them"
    ]


def _leaves(values: Tensor) -> list[Tensor]:
    """Return the leaf tensors of the graph of some values, in a fixed order."""
    leaves: dict[int, Tensor] = {}
    seen, waiting = set(), [values.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions]
    return list(leaves.values())


def _names_beside(loss: Loss) -> dict[int, str]:
    """Return the names, by identity, of the parameters of modules that a loss's function is, holds,
    is bound to, or refers to.
    """
    names: dict[int, str] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [
        (function, 0) for function in (loss.fn, loss.call, loss.term) if function is not None
    ]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            names |= {id(tensor): key for key, tensor in value.named_parameters()}
        waiting += [(inside, depth + 1) for inside in _inside(value)]
    return names


def _inside(value: object) -> list[Any]:
    """Return the objects that a callable or a container refers to."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        try:
            refers = inspect.getclosurevars(value)
        except ValueError:  # a name is not bound yet
            return []
        return [*refers.nonlocals.values(), *refers.globals.values(), *(value.__defaults__ or ())]
    return (
        []
        if isinstance(value, nn.Module | type | ModuleType)
        else list(getattr(value, "__dict__", {}).values())
    )


def _casts(objective: Objective, name: str) -> list[str]:
    dtype = objective.autocast(name)
    if dtype is None:
        return []
    return [
        f"loss {name!r}, or the model in it, enables autocast to {dtype} itself: it is not computed "
        f"in {objective.precision}, and its rounding limits how far the residual of a segment can be "
        "refined. Remove autocast from the task's loss (or pass enabled=False) for "
        f"{objective.precision}; --precision bfloat16 enables its own"
    ]


def hidden_from_autograd(objective: Objective, name: str, tensors: Collection[str]) -> list[str]:
    """Return the tensors without gradient that a loss nevertheless depends on, through detach() or
    no_grad().

    Compute the loss of a sample with these tensors changed, and then restore the point in the
    objective.

    Args:
        objective: the objective.
        name: name of the loss.
        tensors: names of the tensors to test.
    """
    own = {**dict(objective.model.named_parameters()), **dict(objective.model.named_buffers())}
    (sample,) = sample_of(objective, name)

    def value() -> float:
        return _loss_over(objective, name, sample)

    before = value()

    def matters(names: list[str]) -> bool:
        stored = {key: own[key].detach().clone() for key in names}
        with torch.no_grad():
            for key in names:
                own[key].mul_(1.5).add_(0.5)
        try:
            return value() != before
        except InputError:  # the tensor matters: the loss rejects its changed value
            return True
        finally:
            with torch.no_grad():
                for key, tensor in stored.items():
                    own[key].copy_(tensor)

    def among(names: list[str]) -> list[str]:
        if not names or not matters(names):
            return []
        if len(names) == 1:
            return names
        half = len(names) // 2
        return among(names[:half]) + among(names[half:])

    return among(sorted(tensors))


def _from_all_over(objective: Objective, name: str, count: int) -> None:
    """Check batches and the mean also on evenly spaced examples, because the first ones may all
    belong to one class, or all be labelled.
    """
    split, loss = objective.splits[objective.losses[name].on], objective.losses[name]
    positions = split.spread(count)
    # the sample already was the whole split
    if positions is None or len(positions) < 2 or count == split.examples:
        return
    try:
        # examples that differ from each other
        sample, *parts = (split.at(part) for part in (positions, *positions.tensor_split(2)))
    except InputError:
        # for example, examples of different shapes that only stack in the order of the data
        return
    half = _weighing(objective, name, parts)
    if half is None:
        return
    whole, apart = _over(objective, name, sample), _over(objective, name, *parts)
    scale = _scale(objective, name, whole, half, sample)
    cuts = [positions, *positions.tensor_split(2)]
    _batches(objective, name, whole, apart, scale.apart(whole, apart), cuts)
    if loss.reduces:
        _own_mean(objective, name, sample, float(whole.loss), scale.value)


def _writes_nothing(objective: Objective, name: str) -> None:
    """Check that a loss does not write into its batch or the model.

    Call this before any other evaluation, because a second write may not change anything.

    Raises:
        InputError: if it writes.
    """
    split = objective.losses[name].split
    batch = None if split is None else objective.splits[split].sample(0, _count(objective, split))
    copies: list[Any] = []

    def values(copy: object) -> tuple[Tensor, None]:
        copies.append(copy)
        return objective.values(name, copy)[0], None  # unweighted: all weights may be 0 here

    with _model_unwritten(objective, name):
        objective.evaluate_on_batches(
            values, [copied(batch)], SquaredNorms(objective.tensors.differentiable)
        )  # a clone has no counted writes yet
    (copy,) = copies
    if (place := _written(batch, copy, "batch")) is not None:
        raise InputError(
            f"loss {name!r} writes into its batch ({place} changed), which other losses and later "
            f"passes use too. Work on a copy: {place}.clone() for a tensor, dict(batch) if keys "
            "change, no inplace=True on the inputs."
        )


def _written(
    batch: object, copy: object, place: str, known: frozenset[int] = frozenset()
) -> str | None:
    """Return the first place where an evaluation wrote into its copy of a batch.

    For objects, only tensors count: they may store notes in their attributes.
    """
    if isinstance(batch, Tensor):
        unwritten = isinstance(copy, Tensor) and copy._version == 0 and same_bytes(batch, copy)
        return None if unwritten else place
    if batch is copy or id(batch) in known:
        return None
    inside, in_copy = named_parts(batch, place), dict(named_parts(copy, place))
    if type(batch) is not type(copy):
        return place
    if opened(batch) is not None:
        if [name for name, _ in inside] != list(in_copy):
            return place
    elif not (
        inside := [(name, part) for name, part in inside if any(True for _ in tensors_of(part))]
    ):
        return place
    places = (_written(part, in_copy.get(name), name, known | {id(batch)}) for name, part in inside)
    return next((name for name in places if name is not None), None)


@contextlib.contextmanager
def _model_unwritten(objective: Objective, name: str) -> Iterator[None]:
    """Check that evaluations do not write into a floating tensor of the model, even if its values
    happen to stay equal.

    Integers may count, and unallocated tensors may be replaced, as caches are. Sums of bytes are
    compared for allocated tensors only; for others, such as the base of an adapter, which may be
    large, torch's count of writes must suffice.

    Raises:
        InputError: if they write.
    """
    before = [
        (key, tensor, tensor._version, _bit_sums(tensor) if tensor.requires_grad else None)
        for key, tensor in _floating(objective).items()
    ]
    yield
    after = _floating(objective)
    for key, tensor, version, sums in before:
        replaced = after.get(key) is not tensor
        written = tensor._version != version or (
            sums is not None and not torch.equal(_bit_sums(tensor), sums)
        )
        if (replaced and sums is not None) or written:
            raise InputError(
                f"a forward pass of loss {name!r} changes tensor {key!r} of the model even in eval "
                "mode, so the loss is not that of the checkpoint. Usual culprits: "
                "Embedding(max_norm=...), weights clamped in forward, statistics updated without "
                "checking self.training. Write in training mode only, or use a copy of the tensor."
            )


def _bit_sums(tensor: Tensor) -> Tensor:
    """Sum the bits of each 1,024 numbers as integers: a write changes the sums, and they take a
    hundredth of the tensor's memory.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    bits = flat.view(integers.get(flat.element_size(), torch.int64))
    rows = bits[: len(bits) // 1024 * 1024].view(-1, 1024)
    sums = [rows[place].sum(1, dtype=torch.int64) for place in blocks(*rows.shape)]
    return torch.cat([*sums, bits[rows.numel() :].sum(dtype=torch.int64)[None]])


def _floating(objective: Objective) -> dict[str, Tensor]:
    tensors = {**dict(objective.model.named_parameters()), **dict(objective.model.named_buffers())}
    return {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }


def _finite(name: str, evaluation: Evaluation) -> None:
    if not math.isfinite(evaluation.loss) or not math.isfinite(_norm(evaluation)):
        raise InputError(
            f"loss {name!r} is {evaluation.loss} at the first checkpoint, its gradient norm "
            f"{_norm(evaluation)}. Start later with --steps A:, or look for a division or a "
            "logarithm of zero in the loss."
        )


def _repeats(objective: Objective, name: str, batch: object, apart: float) -> list[str]:
    if not apart <= _REPEATS:
        module = _random_module(objective, name, batch)
        raise InputError(
            f"loss {name!r} is not deterministic: two evaluations at one point differ by "
            f"{apart:.1e}"
            + (f"; the first module to differ is {module}" if module else "")
            + ". Usual culprits: random augmentation in the data set (lca_posthoc.Draws makes it "
            "seeded draws), dropout called with "
            "training=True, noise or sampling in the model or the loss."
        )
    return (
        [
            f"loss {name!r}: kernels do not repeat bit for bit (two evaluations differ by "
            f"{apart:.1e})"
        ]
        if apart > 0
        else []
    )


def _random_module(objective: Objective, name: str, batch: object) -> str | None:
    """Return the first module whose outputs differ between two forward passes over one batch,
    innermost first.
    """
    seen: list[list[tuple[str, list[Tensor]]]] = []
    label: str

    def record(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, outputs: object) -> None:
            # tensors wrapped by a transform are invalid after it
            if not torch._C._are_functorch_transforms_active():
                seen[-1].append(
                    (label, [tensor.detach().clone() for tensor in tensors_of(outputs)])
                )

        return hook

    hooks = [
        module.register_forward_hook(
            record(f"{label!r} ({type(module).__name__})" if label else "the model's own forward")
        )
        for label, module in objective.model.named_modules()
    ]
    try:
        for _ in range(2):
            seen.append([])
            _loss_over(objective, name, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for (label, one), (_, other) in zip(*seen, strict=False):
        if not all(map(same_bytes, one, other)):
            return label
    return None


def _batches(
    objective: Objective,
    name: str,
    whole: Evaluation,
    parts: Evaluation,
    apart: float,
    cuts: Sequence[Positions],
) -> None:
    """Check that one batch and its parts agree on a loss, up to the rounding of sums of many
    elements.

    Args:
        objective: evaluates the loss.
        name: name of the loss.
        whole: the loss over one batch.
        parts: the loss over the batch cut in two.
        apart: relative difference of the two.
        cuts: positions of the examples of the batch, and of its parts.

    Raises:
        InputError: if they disagree.
    """
    if not apart <= PRECISIONS[
        objective.precision_of(name)
    ].agree and not _agree_one_precision_higher(objective, name, cuts):
        cast = objective.autocast(name)
        raise InputError(
            f"loss {name!r} depends on how split {objective.losses[name].split!r} is cut into "
            f"batches: one batch or two give values {whole.loss:.6g} and {parts.loss:.6g}, "
            f"and values or gradients differ by {apart:.1e} of their size. Usual culprits: batch "
            "statistics (use --norm-stats batch --batch-size N), a loss that compares examples with "
            "each other, a mean taken inside Loss(call=fn)."
            + (f" It also enables autocast to {cast} itself, which rounds." if cast else "")
        )


def _agree_one_precision_higher(objective: Objective, name: str, cuts: Sequence[Positions]) -> bool:
    """Return whether a batch and its parts agree one precision higher; their difference is then
    only rounding.
    """
    finer = PRECISIONS[objective.precision].reference
    if finer is None:
        return False
    try:
        reference = objective.reference
        reference.place(objective.point)
        sample, *parts = (
            reference.splits[objective.losses[name].on].at(positions) for positions in cuts
        )
        whole, joined = _over(reference, name, sample), _over(reference, name, *parts)
        scale = _scale(reference, name, whole, _weighing(reference, name, parts), sample)
    except InputError:  # the task does not run in that precision
        return False
    return scale.apart(whole, joined) <= finer.agree


def weights_of_sample(objective: Objective, name: str) -> Tensor | None:
    """Return the weights of a loss's elements on the sample that identifies it, at the point in the
    objective.

    Return None for a term of the parameters, or if the weights come only from the targets or all
    are 1.

    Args:
        objective: the objective.
        name: name of the loss.
    """
    (sample,) = sample_of(objective, name)
    return (
        None
        if sample is None or _weighs_alike(objective, name)
        else objective.loss_values.weights(name, sample)
    )


def _runs_over_examples(objective: Objective, name: str, batch: object, examples: int) -> None:
    """Check that the first axis of a grouped loss's values runs over the examples, if batches mix
    groups.

    Raises:
        InputError: if it does not.
    """
    if not isinstance(objective.order(name), Order):
        return
    shape = _shape_of_values(objective, name, batch)
    if shape[0] != examples:
        raise InputError(
            f"loss {name!r} gives values of shape {list(shape)} for a batch of {examples} "
            "examples; with --norm-stats batch the first axis must run over the examples, so that "
            "their groups can be told apart."
        )


def _elements_are_labelled(
    objective: Objective, name: str, sample: object, examples: range
) -> None:
    """Check that groups of elements match the loss's values in shape and order.

    Raises:
        InputError: if they do not.
    """
    order = objective.order(name)
    if not isinstance(order, ElementOrder):
        return
    with objective.mode():
        values = objective.values(name, fresh(sample))[0]
    try:
        element_codes(order.codes[examples.start : examples.stop].flatten(0, 1), values)
    except InputError as error:
        where = f"loss {name!r} on split {objective.losses[name].on!r}"
        raise InputError(f"{where}: {error}") from error
    if objective.norm_stats != "batch":  # batch mode checks this for all groups
        _in_order(objective, name, sample, examples)


def _in_order(objective: Objective, name: str, sample: object, examples: range) -> None:
    """Check that a loss's values follow the order of the examples, if batches mix groups.

    Raises:
        InputError: if they do not.
    """
    split = objective.splits[objective.losses[name].on]
    if objective.order(name) is None:
        return
    reverse = Order([0], [torch.tensor(examples, device="cpu").flip(0)])
    results: list[Tensor] = []

    def values(batch: object) -> tuple[Tensor, None]:
        results.append(objective.values(name, batch)[0].double())
        return results[-1], None

    with contextlib.closing(split.batches(objective.batch_sizes[split.name], reverse)) as batches:
        objective.evaluate_on_batches(values, [sample, next(batches)[1]], NoGradients())
    one, other = (values.reshape(len(examples), -1) for values in results)
    other = other.flip(0)
    if (
        one.shape != other.shape
        or not (one - other).abs().sum()
        <= PRECISIONS[objective.precision_of(name)].agree * one.abs().sum()
    ):
        raise InputError(
            f"loss {name!r} on split {split.name!r} does not return its values in the order of the "
            "examples, so groups cannot be separated in a batch that holds several. Usual "
            "culprit: a collate_fn that reorders a batch. Let it keep the order "
            "(pack_padded_sequence does with enforce_sorted=False)."
        )


def _statistics_unused(
    objective: Objective, name: str, batch: object, before: float, scale: float
) -> None:
    """Check that a loss in batch mode does not depend on the running statistics.

    Raises:
        InputError: if it does.
    """
    statistics = [tensor for key, tensor in objective.model.named_buffers() if is_statistic(key)]
    before_move = [tensor.clone() for tensor in statistics]
    for tensor in statistics:
        tensor.mul_(1.5).add_(0.5)
    after = _loss_over(objective, name, batch)
    for tensor, values in zip(statistics, before_move, strict=True):
        tensor.copy_(values)
    if not abs(after - before) <= PRECISIONS[objective.precision_of(name)].agree * scale:
        raise InputError(
            f"loss {name!r} reads running statistics despite --norm-stats batch ({before:.6g} "
            f"becomes {after:.6g} when they move). Usual culprits: batch_norm imported by name "
            "from torch.nn.functional, a scripted module, statistics that are not the model's "
            "buffers themselves. Call F.batch_norm with those or use the torch.nn layers."
        )


def _own_mean(objective: Objective, name: str, batch: object, loss: float, scale: float) -> None:
    inputs, targets = inputs_and_targets(batch)

    def mean(_: object) -> tuple[Tensor, None]:
        return objective.loss_values.entry(
            name, objective.loss_values.functions[name].mean()(objective.model(inputs), targets)
        ).reshape(1), None

    reduced = float(objective.evaluate_on_batches(mean, [batch], NoGradients()).loss)
    if not abs(loss - reduced) <= PRECISIONS[objective.precision_of(name)].agree * scale:
        raise InputError(
            f"the mean of loss {name!r} over its elements is {loss:.6g}, but its own "
            f"reduction='mean' gives {reduced:.6g}. Usual culprits: ignore_index or class weights. "
            "State the weights of elements: Loss(call=fn) that returns (values, weights)."
        )
