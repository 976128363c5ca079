"""Assumptions checked on a small sample before a long run; each failure names the usual
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
_DEPTH = 4  # how far from a loss's function its parameters' names are looked for


@dataclass(frozen=True)
class Identity:
    """The value of a loss and the Euclidean norm of its gradient, at one point on one sample."""

    loss: float
    gradient_norm: float

    def matches(self, other: Identity) -> bool:
        """Tell whether both are the same loss, up to what another machine's kernels may change."""
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
    """Return the Euclidean distance of two gradients; of one from 0 where there is no other."""
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
    """The magnitudes that differences are relative to: mean |value| of an element, and the larger
    norm of the gradients of a sample and its half.

    At a minimum the gradient of the sample is pure rounding, and the loss itself may cross zero.
    """

    value: float
    gradient: float

    def apart(self, one: Evaluation, other: Evaluation) -> float:
        """Return the larger of the relative differences of the values and of the gradients
        (Euclidean); NaN where one is NaN.
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
    """Return a loss's value and gradient norm on the first 256 examples, at the point the objective
    holds.

    Raises:
        InputError: where the forward pass changes the model.
    """
    with _model_unwritten(objective, name):
        return Identity(*_norm_over(objective, name, *sample_of(objective, name)))


def loss_of_sample(objective: Objective, name: str) -> float:
    """Return a loss on the sample `identify` takes, at the point the objective holds; in halves,
    where the loss does not depend on how it is cut: they take half the memory.
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
    """Return a loss on one batch and the Euclidean norm of its gradient, which is not held."""
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
    """Return a sample no larger than a batch, so that it fits wherever a batch fits; [None] for a
    term of the parameters.
    """
    split = objective.losses[name].split
    if split is None:
        return [None]
    start = _start(objective, name)
    return [objective.splits[split].sample(start, start + _count(objective, split))]


def weighty_part(objective: Objective, name: str, most: int) -> object:
    """Return a few neighbouring examples of a loss's split, some of which weigh something.

    Args:
        objective: evaluates the loss.
        name: of the loss, which has a split.
        most: examples.
    """
    split = objective.splits[objective.losses[name].on]
    start = _start(objective, name)
    parts = (
        split.sample(first, min(first + most, split.examples))
        for first in range(start, start + _count(objective, split.name), most)
    )
    return next(part for part in parts if objective.loss_values.weighs(name, part))


def _start(objective: Objective, name: str) -> int:
    """Return the position the sample starts at: some of its examples weigh something (targets may
    all be ignored, text all padding).

    Of stretches of the sample's size the first halves are tried, then the second halves, so that
    every example is tried in the end.
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
    """Tell whether weights come from the targets alone, so that they are the same at every
    checkpoint and need no forward pass.
    """
    return objective.loss_values.gave_weights.get(name) is False


def _groups_weigh(objective: Objective, name: str, sample: object) -> None:
    """Refuse weights that are negative, and groups whose elements all weigh nothing: such a group
    has no loss.
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
            "give none below 0."
        )
    if (
        order is not None
        and lowest is not None
        and (empty := _weightless(objective, name, order)) is not None
    ):
        raise InputError(
            f"the weights of group {order.labels[empty]!r} of loss {name!r} on split "
            f"{split.name!r} sum to 0 (are all its targets ignored?), so it has no loss. Give its "
            f"{'elements' if isinstance(order, ElementOrder) else 'examples'} to another group in "
            "group_by, or leave them out of the data."
        )


def _weightless(objective: Objective, name: str, order: Groups) -> int | None:
    """Return the position of the first group of which no element weighs anything; None where there
    is none.
    """
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
    """Return the position of the first group of elements that weigh nothing, wherever they are;
    None where there is none.
    """
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


def drop_weightless_replicates(objective: Objective, name: str) -> list[str]:
    """Give up standard errors where a random part of the examples weighs nothing; return a note
    that says so.
    """
    hidden = objective.replicates_of(name)
    order = None if hidden is None else objective.order(hidden)
    if hidden is None or order is None:
        return []
    if _weightless(objective, name, order) is None:
        return []
    del objective.data.replicated[hidden]
    return [
        f"loss {name!r} has no standard errors: a tenth of the subset weighs nothing. Take a "
        "larger one."
    ]


def _cut(count: int) -> int:
    return count // 2 + 1 if count > 2 else 1


def _count(objective: Objective, split: str) -> int:
    return min(_SAMPLE, objective.batch_sizes[split], objective.splits[split].examples)


def check_loss(objective: Objective, name: str) -> list[str]:
    """Probe one loss at the point the objective holds, and return notes worth recording.

    Raises:
        InputError: where an evaluation writes into its batch or the model, no gradient reaches any
            allocated tensor, two evaluations or two batch sizes disagree, or the loss is not its
            function's own mean.
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
        # it may be too small for batch statistics
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
    """Return the first of some batches of which any element weighs something; None where there is
    none.
    """
    return next((batch for batch in batches if objective.loss_values.weighs(name, batch)), None)


def _plain_mean(objective: Objective, name: str, batch: object) -> Evaluation:
    """Return the plain mean of a batch's values, whose elements may all weigh nothing, and its
    gradient.
    """
    return objective.evaluate_on_batches(
        lambda batch: (objective.values(name, batch)[0], None),
        [batch],
        SquaredNorms(objective.tensors.differentiable),
    )


def _has_gradient(objective: Objective, name: str, first: Evaluation) -> None:
    """Refuse a loss of which no batch of the whole split has a gradient for any allocated tensor;
    `first` is of a sample.

    A gradient that is 0 by value, as behind a ReLU that is off, is one.
    """
    allocated = {spec.name for spec in objective.allocated}
    if allocated - first.unreached:
        return
    if not allocated:
        raise InputError(
            f"loss {name!r} has no tensor to be allocated to: every one of the model is frozen or "
            "fixed, and no checkpoint holds it. Build the model with what was trained not frozen, "
            "and leave that out of Task(fixed=[…])."
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
        f"loss {name!r}{where} has no gradient for any tensor of the model, so that nothing of its "
        "change can be allocated. Look for torch.no_grad() or inference_mode() around it (as "
        "evaluation functions have), for detach(), .data, .item() or numpy on the way, for a count "
        "such as accuracy (argmax, comparisons), or for a module that merges or caches weights in "
        "eval mode: give the loss that was minimised, as training computes it."
    )


def _own_parameters(objective: Objective, name: str, batch: object) -> list[str]:
    """Say which parameters beside the model's a loss is computed with and has a gradient for."""
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
        "holds: they stay as the task builds them. If they were trained too, this is another loss "
        "than the one that was: put the model and the loss into one module, record that, and state "
        "the loss as Loss(call=fn). If they never were, requires_grad_(False) on them says so"
    ]


def _leaves(values: Tensor) -> list[Tensor]:
    """Return the tensors at the leaves of the graph that values came from, in a fixed order."""
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
    """Return the objects a callable or a container refers to."""
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
        except ValueError:  # of a name that is bound to nothing yet
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
        f"loss {name!r}, or the model in it, turns on autocast to {dtype} itself: it is not "
        f"computed in {objective.precision}, and the residual of a segment cannot be refined below "
        "what that rounds. Take autocast out of the task's loss (or pass enabled=False) for "
        f"{objective.precision}; --precision bfloat16 has its own"
    ]


def hidden_from_autograd(objective: Objective, name: str, tensors: Collection[str]) -> list[str]:
    """Return those of some tensors without gradient that a loss depends on all the same, through
    detach() or no_grad().

    The loss of a sample is computed with these tensors moved, at the point the objective holds,
    which stays as it is.
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
        except InputError:  # it is read, and cannot be what it was moved to
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
    """Check batches and the mean on examples from all over the split too: the first ones may be of
    one class, or all labelled.
    """
    split, loss = objective.splits[objective.losses[name].on], objective.losses[name]
    positions = split.spread(count)
    # the sample was all of it
    if positions is None or len(positions) < 2 or count == split.examples:
        return
    try:
        # unlike each other
        sample, *parts = (split.at(part) for part in (positions, *positions.tensor_split(2)))
    except InputError:
        # examples of several shapes, say, which stack in the order of the data alone
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
    """Refuse a loss that writes into its batch or the model.

    This must be the first evaluation of all, for a second write may change nothing.
    """
    split = objective.losses[name].split
    batch = None if split is None else objective.splits[split].sample(0, _count(objective, split))
    copies: list[Any] = []

    def values(copy: object) -> tuple[Tensor, None]:
        copies.append(copy)
        return objective.values(name, copy)[0], None  # elements may all weigh nothing here

    with _model_unwritten(objective, name):
        objective.evaluate_on_batches(
            values, [copied(batch)], SquaredNorms(objective.tensors.differentiable)
        )  # of a clone, no write is counted yet
    (copy,) = copies
    if (place := _written(batch, copy, "batch")) is not None:
        raise InputError(
            f"loss {name!r} writes into its batch ({place} is not what it was), which other losses "
            f"and later passes are given as well. Work on a copy: {place}.clone() of a tensor, "
            "dict(batch) where keys change, no inplace=True on the inputs."
        )


def _written(
    batch: object, copy: object, place: str, known: frozenset[int] = frozenset()
) -> str | None:
    """Return the first place at which a copy of a batch, new before an evaluation, was written to.

    Of objects only the tensors count: they may note something on themselves.
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
    """Refuse evaluations that write into a floating tensor of the model, whether or not its values
    change this time.

    Integers may count; an unallocated tensor may be replaced by another, as caches are. Sums of
    bytes are compared of allocated tensors only: of others, such as the base of an adapter, which
    may be large, torch's count of writes must do.
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
                f"a forward pass of loss {name!r} changes tensor {key!r} of the model, in eval "
                "mode too, so that it is not the loss of the checkpoint. Usual culprits: "
                "Embedding(max_norm=...), weights clamped in forward, statistics updated without a "
                "look at self.training. Write in training mode only, or leave the tensor as it is "
                "and use a copy."
            )


def _bit_sums(tensor: Tensor) -> Tensor:
    """Return what the bits of each 1,024 numbers add up to as integers: a write changes it, and it
    takes a hundredth of the tensor's memory.
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
            # what a transform wraps is gone when it ends
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
    """Refuse a loss that one batch and its parts do not agree on, by more than sums of many
    elements round.

    Args:
        objective: evaluates it.
        name: of the loss.
        whole: the loss over one batch.
        parts: the same over the batch in two.
        apart: how far the two are apart.
        cuts: the positions of the examples of the batch, and of its parts.
    """
    if not apart <= PRECISIONS[
        objective.precision_of(name)
    ].agree and not _agree_one_precision_higher(objective, name, cuts):
        cast = objective.autocast(name)
        raise InputError(
            f"loss {name!r} depends on how split {objective.losses[name].split!r} is cut into "
            f"batches: one batch or two give values {whole.loss:.6g} and {parts.loss:.6g}, "
            f"and values or gradients differ by {apart:.1e} of their size. Usual culprits: batch statistics (use --norm-stats batch "
            "--batch-size N), a loss that compares examples with each other, a mean taken inside "
            "Loss(call=fn)."
            + (f" It also turns on autocast to {cast} itself, which rounds." if cast else "")
        )


def _agree_one_precision_higher(objective: Objective, name: str, cuts: Sequence[Positions]) -> bool:
    """Tell whether a batch and its parts agree one precision higher: then they differ by rounding
    alone.
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
    except InputError:  # the task does not run in it
        return False
    return scale.apart(whole, joined) <= finer.agree


def weights_of_sample(objective: Objective, name: str) -> Tensor | None:
    """Return the weights of a loss's elements on the sample that identifies it, at the point the
    objective holds.

    None for a term of the parameters, and where the weights come from the targets alone or all are
    1.
    """
    (sample,) = sample_of(objective, name)
    return (
        None
        if sample is None or _weighs_alike(objective, name)
        else objective.loss_values.weights(name, sample)
    )


def _runs_over_examples(objective: Objective, name: str, batch: object, examples: int) -> None:
    """Refuse a grouped loss whose values do not run over the examples, where a batch holds
    several groups.
    """
    if not isinstance(objective.order(name), Order):
        return
    with objective.mode():
        values = objective.values(name, fresh(batch))[0]
    if values.shape[0] != examples:
        raise InputError(
            f"loss {name!r} gives values of shape {list(values.shape)} for a batch of {examples} "
            "examples; with --norm-stats batch the first axis must run over the examples, so that "
            "their groups can be told apart."
        )


def _elements_are_labelled(
    objective: Objective, name: str, sample: object, examples: range
) -> None:
    """Refuse groups of elements that are not those of the loss: of another shape, or in another
    order.
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
    if objective.norm_stats != "batch":  # where it is done for all groups
        _in_order(objective, name, sample, examples)


def _in_order(objective: Objective, name: str, sample: object, examples: range) -> None:
    """Refuse a loss whose values do not follow the order of the examples, where a batch holds
    several groups.
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
            f"loss {name!r} on split {split.name!r} does not give its values in the order of the "
            "examples, so that groups cannot be told apart in a batch that holds several. Usual "
            "culprit: a collate_fn that reorders a batch. Let it keep the order "
            "(pack_padded_sequence does with enforce_sorted=False)."
        )


def _statistics_unused(
    objective: Objective, name: str, batch: object, before: float, scale: float
) -> None:
    """Refuse a loss that changes with the running statistics in batch mode, which does not use
    them.
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
            f"loss {name!r} reads running statistics in spite of --norm-stats batch ({before:.6g} "
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
            "Say how elements are weighted: Loss(call=fn) returning (values, weights)."
        )
