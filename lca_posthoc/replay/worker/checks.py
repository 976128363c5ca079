"""Check before the first span what a task holds, whether it can be replayed, and what its losses
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ...base.available_memory import freed_at_once, give_back
from ...base.text import count as counted
from ...checkpoints.leftovers import counts, left_out_note, refuted
from ...checkpoints.trajectory import drop_options, is_statistic, read_checkpoint, read_stored
from ...errors import InputError, SpanError, few
from ...numerics.precisions import PRECISIONS
from ...numerics.schema import KEEP, is_share
from ..requests import (
    Calibrations,
    CalibrationsRequest,
    DescribeRequest,
    Description,
    LevelMemory,
    LossDescription,
    ProbeAnswer,
    ProbeRequest,
    Sample,
    Sites,
)
from .memory_estimate import block_of, bytes_needed, free_memory_each, kept_tensors
from .modes import moved_layers, notes_on_modes
from .state import (
    StoredPoint,
    checkpoint_at,
    differ,
    divided,
    first_point,
    objective_of,
    point_at,
    point_read_twice,
    reported,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Identity, Objective

_MANY_PASSES = 2  # backward passes for a batch
_BATCHES = 20  # with so many, ten parts take 1.5 backward passes for a batch, or fewer
_NEAR = 16  # segments to search for one that moves


@reported(DescribeRequest)
def describe(request: DescribeRequest) -> Description:
    """Return the contents of the task: the model's tensors, and each loss's split and kind."""
    objective = objective_of(request.setup)
    digests = objective.digests  # before any call, in which a model may fill its buffers
    objective = divided(request.setup, objective)
    return Description(
        tensors=objective.table,
        losses={name: _described(objective, name) for name in objective.losses},
        task_losses=list(objective.task.losses),
        digests=digests,
        frozen=objective.tensors.frozen,
        fixed=list(objective.tensors.fixed),
        added=objective.tensors.added,
        patterns=list(objective.task.fixed),
        unstored=list(objective.tensors.unstored),
        statistics=None if objective.recalibration is None else objective.recalibration.split.name,
    )


def _described(objective: Objective, name: str) -> LossDescription:
    from ...numerics.objective import ElementOrder

    loss, order = objective.losses[name], objective.order(name)
    if loss.per is not None and isinstance(order, ElementOrder):
        raise InputError(
            f"loss {name!r} has results per example, but its group_by labels single elements. State "
            "two losses of the same function, one with per and one with group_by."
        )
    split = None if loss.split is None else objective.splits[loss.split]
    return LossDescription(
        on=loss.split,
        kind=loss.kind,
        examples=split.examples if split else 0,
        total=split.total if split else 0,
        groups=order.labels if order else None,
        counts=order.counts if order else None,
        per=loss.per,
        rows=split.examples * (objective.elements_of(name) if loss.per == "element" else 1)
        if split and loss.per
        else 0,
        in_order_only=split is not None and split.in_order_only,
    )


def _replicates(objective: Objective, name: str) -> int:
    hidden = objective.replicates_of(name)
    order = None if hidden is None else objective.order(hidden)
    return 0 if order is None else len(order.labels)


def _costly_standard_errors(objective: Objective, name: str) -> Iterator[str]:
    """Yield a note if the standard errors of a random subset take several backward passes for each
    batch.
    """
    hidden = objective.replicates_of(name)
    if hidden is None or objective.norm_stats != "batch":
        return
    passes = objective.data.replicates_in_a_batch(hidden)
    if passes >= _MANY_PASSES:
        parts, size = _replicates(objective, name), objective.batch_sizes[objective.losses[name].on]
        yield (
            f"the standard errors of loss {name!r} take {passes:.2g} backward passes for each batch, "
            f"one for each of the {parts} parts of the subset in it. With {_BATCHES} batches or more, "
            f"--subset {_BATCHES * size:,} examples at --batch-size {size}, they take 1.5 or fewer"
        )


def _sites(
    objective: Objective, first: Mapping[str, Tensor], name: str, follows: str | None
) -> Sites:
    """Find where the examples of a loss are in the model's computations, where they must be
    separated.

    This is the case for a loss with per-example results, and where batches of one group each would
    be more than twice as many as in the order of the data.

    Args:
        objective: evaluates it.
        first: the first checkpoint.
        name: of the loss.
        follows: the grouped loss whose order its batches follow at the lowest level.

    Raises:
        InputError: if the elements of a loss with per-element results cannot be separated.
    """
    from ...numerics.objective import is_out_of_memory, recorded

    per_example = objective.losses[name].per is not None
    if not per_example and not _has_small_groups(objective, name, follows):
        return Sites(found=None, why="")
    objective.place(first)
    if objective.losses[name].per == "element":
        objective.check_elements(name)
        return Sites(found=None, why="")
    try:
        check = objective.find_examples(name)
    except Exception as error:  # of a model that behaves differently under hooks
        if is_out_of_memory(error):
            raise
        line = str(error).partition("\n")[0]
        return Sites(found=None, why=f"{type(error).__name__}: {line}")
    if check.untold:
        tensor, why = next(iter(check.untold.items()))
        return Sites(found=None, why=f"{tensor}: {why}" if tensor else why)
    return Sites(found=recorded(check.axes), why="")


def _texts(objective: Objective, names: Iterable[str]) -> dict[str, list[str] | None]:
    """Return the texts that `Task.show` gives the examples of losses with per-example results."""
    from ...numerics.objective import texts_of

    texts = {}
    for name in names:
        loss, show = objective.losses[name], objective.task.show.get(objective.losses[name].on)
        if loss.per is not None and show is not None:
            size = objective.batch_sizes[loss.on]
            texts[name] = texts_of(objective.splits[loss.on], size, show)
    return texts


def _has_small_groups(objective: Objective, name: str, follows: str | None) -> bool:
    """Tell whether batches of one group each would be more than twice as many as in the order of
    the data.

    Separating every example costs a third more than not separating them.
    """
    from ...numerics.objective import ElementOrder

    order = objective.order(objective.replicates_of(name) or follows or name)
    if order is None or isinstance(order, ElementOrder) or objective.norm_stats == "batch":
        return False
    size = objective.batch_sizes[str(objective.losses[name].split)]
    batches = sum(-(-count // size) for count in order.counts)
    return batches > 2 * -(-sum(order.counts) // size)


@reported(ProbeRequest)
def probe(request: ProbeRequest) -> ProbeAnswer:
    """Check the task on a small sample at the first checkpoint; identify each loss there and at the
    last one.
    """
    objective = objective_of(request.setup)
    with freed_at_once(objective.parameter_bytes):  # few evaluations, of whole gradients
        return _probed(request, objective)


def _probed(request: ProbeRequest, objective: Objective) -> ProbeAnswer:
    names, settings = list(objective.losses), request.setup.settings
    first = first_point(request.sample, objective)
    batch_sizes = objective.settle_batch_sizes(first, request.batch_sizes)
    _same_ties(request)
    _same_fixed(request, objective)
    # a recorded loss keeps its settings
    new = [name for name in names if name not in request.recorded]
    first, about_modes = _statistics(request, objective, first, new)
    notes = _leftovers(request, objective)
    notes += [note for name in names for note in _checks(request, objective, name)]
    notes += [note for name in new for note in _costly_standard_errors(objective, name)]
    if settings.precision == "float64":
        _same_in_float32(request, objective)
    notes += (
        (_never_updated(request, objective) if new else [])
        + _unmoved(request, objective)
        + about_modes
    )
    levels = {keep: _level_memory(request, objective, new, keep) for keep in KEEP}
    at_first: dict[str, Identity] = {}
    measured, more = _can_measure(request, objective, first, new, at_first)
    notes += more
    objective.release_reference()
    give_back(objective.parameter_bytes, cycles=True)
    identities = _identities(request, objective, first, names, at_first)
    return ProbeAnswer(
        batch_sizes=batch_sizes,
        identity=identities,
        levels=levels,
        free_memory=free_memory_each(request.sample.workers_per_host, objective.device),
        measured=measured,
        scale=_scales(request, objective, first, new),
        replicates={name: _replicates(objective, name) for name in names},
        sites={name: _sites(objective, first, name, levels[KEEP[0]].along[name]) for name in new},
        texts=_texts(objective, new),
        statistics=None if objective.recalibration is None else objective.recalibration.recorded,
        notes=notes,
    )


def _level_memory(
    request: ProbeRequest, objective: Objective, new: list[str], keep: str
) -> LevelMemory:
    """Return the memory that a replay of new losses needs at a level of `--keep`; the objective
    then takes its batches in the order of that level.
    """
    block = {name: block_of(request, objective, name, keep) for name in objective.losses}
    along = objective.data.share_batches([name for name in block if block[name] is not None])
    return LevelMemory(
        needs=bytes_needed(request, objective, new, block, keep),
        block=block,
        along={name: other if other in objective.losses else None for name, other in along.items()},
    )


def _scales(
    request: ProbeRequest, objective: Objective, first: Mapping[str, Tensor], names: list[str]
) -> dict[str, float]:
    """Return |loss| at the first checkpoint over the whole split, groups averaged by weight, where
    a tolerance is a share of it.

    Rounding to six digits makes it independent of the losses evaluated together.

    Raises:
        InputError: if a loss is 0 or not finite there.
    """
    settings = request.setup.settings
    tolerances = {
        "tolerance": settings.tolerance,
        "allocation-tolerance": settings.allocation_tolerance,
    }
    shares = {option: tolerance for option, tolerance in tolerances.items() if is_share(tolerance)}
    if not shares or not names:
        return {}
    scales = {}
    for name, evaluation in objective.evaluate(first, names, gradient=False).items():
        weight = np.atleast_1d(evaluation.weight)
        loss = np.atleast_1d(evaluation.loss)[weight > 0] @ weight[weight > 0] / weight.sum()
        scales[name] = abs(float(f"{loss:.6g}"))
        if not 0 < scales[name] < math.inf:
            option, share = next(iter(shares.items()))
            raise InputError(
                f"loss {name!r} is {loss:.6g} at the first checkpoint, so --{option} {share} "
                f"gives no bound. Give --{option} in units of loss, such as 1e-3."
            )
    return scales


def _statistics(
    request: ProbeRequest, objective: Objective, first: Mapping[str, Tensor], new: list[str]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Settle the statistics of normalisation layers; return the first point with them, which the
    objective then holds, and notes.
    """
    mode, recalibration = request.setup.settings.norm_stats, objective.recalibration
    if mode == "batch" or (mode == "running" and not new):
        return first, []
    if recalibration is None:
        notes = notes_on_modes(request, objective, new, moved_layers(request, objective))
        objective.place(first)
        return first, notes
    if request.setup.settings.statistics is None:
        asked_size = request.setup.settings.batch_size
        known = objective.batch_sizes.get(recalibration.split.name, asked_size)
        recalibration.settle(known, moved_layers(request, objective))
    point, unreached = recalibration.at(first), recalibration.unreached(first) if new else []
    notes = [
        f"{what}: {few([*map(repr, layers)])}"
        for what, layers in (
            (
                "statistics of these layers did not move in training and stay as they are stored",
                recalibration.kept,
            ),
            (
                f"loss {recalibration.loss!r} does not call these layers, whose statistics stay as "
                "they are stored",
                unreached,
            ),
        )
        if layers and new
    ]
    objective.place(point)
    return point, notes


def _same_ties(request: ProbeRequest) -> None:
    """Reject names that the task ties but whose values differ in the checkpoints: the trained model
    did not tie them.

    Check both ends, because copies that were trained apart start equal.

    Raises:
        InputError: naming both tensors.
    """
    if not request.ties:
        return
    sources_by_name = {source: source for sources in request.ties.values() for source in sources}
    for index in (request.sample.first, request.sample.last):
        checkpoint = checkpoint_at(request.sample.points, index)
        try:
            tensors = read_checkpoint(checkpoint, sources_by_name)
        except SpanError:  # a run that diverged: its last spans will fail and report it
            continue
        for name, (first, *others) in request.ties.items():
            for source in others:
                if not bool((tensors[source] == tensors[first]).all()):
                    raise InputError(
                        f"the task's model ties {name!r}, but {first!r} and {source!r} differ in "
                        f"{checkpoint.files[0]} (step {checkpoint.step}). Build the model that was "
                        "trained."
                    )


def _same_fixed(request: ProbeRequest, objective: Objective) -> None:
    """Reject tensors that the task fixes but that differ, at either end, between the checkpoints
    and the task's model.

    Raises:
        InputError: naming the tensor.
    """
    import torch

    if not request.fixed:
        return
    for index in (request.sample.first, request.sample.last):
        checkpoint = checkpoint_at(request.sample.points, index)
        try:
            tensors = read_stored(checkpoint, request.fixed)
        except SpanError:  # its spans will fail and report it
            continue
        for name, tensor in tensors.items():
            built = objective.tensors.fixed[name].cpu()
            if not torch.equal(built.to(tensor.dtype).to(built.dtype), tensor.to(built.dtype)):
                raise InputError(
                    f"Task.fixed names {name!r}, but {checkpoint.files[0]} (step {checkpoint.step}) "
                    "holds another value than the task's model builds. Leave it out of fixed, so "
                    "that it is read from there, or build the model that was trained."
                )


def _leftovers(request: ProbeRequest, objective: Objective) -> list[str]:
    """Return notes on skipped tensors that only the checkpoints hold.

    Raises:
        InputError: if one holds something unexpected, or moves between the first and the last
            checkpoint.
    """
    from ...recording.staging import same_bytes

    leftovers = request.leftovers
    if not leftovers:
        return []
    fixed = objective.tensors.fixed_of(leftovers)
    ends = []
    for index in (request.sample.first, request.sample.last):
        checkpoint = checkpoint_at(request.sample.points, index)
        try:
            ends.append((checkpoint, read_stored(checkpoint, leftovers)))
        except SpanError:  # its spans will fail and report it
            continue
    for checkpoint, tensors in ends:
        for name, tensor in tensors.items():
            wrong = "" if name in fixed else refuted(name, tensor, objective.tensors.unstored)
            first = {name: ends[0][1][name]}
            if not wrong and not counts(name) and not same_bytes({name: tensor}, first):
                wrong = (
                    "and it moves between the first and the last checkpoint, as trained tensors do"
                )
            if wrong:
                raise InputError(
                    f"tensor {name!r} is in {checkpoint.files[0]} (step {checkpoint.step}) but "
                    f"not in the task's model, {wrong}. Build the model that was trained; if "
                    f"the loss is the same without it, leave it out: {drop_options([name])}"
                )
    return [left_out_note([name for name in leftovers if name not in fixed], fixed)]


def _checks(request: ProbeRequest, objective: Objective, name: str) -> list[str]:
    from ...numerics.objective import check_loss, drop_impossible_replicates, refuse_mixed

    # first, because it names the module that mixes examples
    if objective.losses[name].per is not None:
        refuse_mixed(objective, name)
    notes: list[str] = check_loss(objective, name) + drop_impossible_replicates(objective, name)
    reduction = objective.losses[name].replaced
    if reduction is not None:
        notes.append(
            f"loss {name!r} has reduction={reduction!r}, but here it is the mean over its "
            "elements; training may have minimised a multiple of that"
        )
    return notes


def _same_in_float32(request: ProbeRequest, objective: Objective) -> None:
    """Reject float64 where float32 constants in the code make it another function.

    Raises:
        InputError: with both values.
    """
    from ...numerics.objective import identify

    single = objective.in_precision("float32")
    single.place(point_at(request.sample.points, request.sample.first, single))
    for name in objective.losses:
        wide, narrow = identify(objective, name).loss, identify(single, name).loss
        if abs(wide - narrow) > PRECISIONS[single.precision_of(name)].same_loss * max(
            abs(wide), abs(narrow), 1e-12
        ):
            raise InputError(
                f"loss {name!r} is {wide:.6g} in float64 but {narrow:.6g} in float32 at the first "
                "checkpoint: the model or the loss holds float32 constants (a mask, say). Use "
                "--precision float32."
            )


def _identities(
    request: ProbeRequest,
    objective: Objective,
    first: Mapping[str, Tensor],
    names: list[str],
    at_first: dict[str, Identity],
) -> dict[str, list[dict[str, float] | None]]:
    """Return the identity of each loss at the first and at the last checkpoint.

    `at_first` holds the known ones at the first. If the first checkpoint was removed, no identity
    is known there, and the first existing one only shows that weights are constants.
    """
    from ...numerics.objective import identify, weights_of_sample

    identities: dict[str, list[dict[str, float] | None]] = {name: [] for name in names}
    weights: dict[str, Tensor | None] = {}
    begin = request.sample.first
    for index in (begin, request.sample.last):
        try:
            there = (
                first
                if index == begin
                else point_read_twice(request.sample.points, index, objective)
            )
            objective.place(there)
        except SpanError:  # a run that diverged: its last spans will fail and report it
            for name in names:
                identities[name].append(None)
            continue
        point = there
        for name in names:
            known = at_first.get(name) if index == begin else None
            identity = asdict(known or identify(objective, name))
            is_known = all(map(math.isfinite, identity.values()))
            identities[name].append(identity if is_known else None)
            now = weights_of_sample(objective, name)
            _same_weights(name, weights.setdefault(name, now), now)
    if identities and point is not first:
        _nothing_derived(
            request, objective, point, {name: ends[-1] for name, ends in identities.items()}
        )
    if begin > 0:
        identities = {name: [None, ends[-1]] for name, ends in identities.items()}
    return identities


def _same_weights(name: str, first: Tensor | None, now: Tensor | None) -> None:
    """Reject weights that differ at another checkpoint, such as a second value that tells whether
    an answer was right.

    Raises:
        InputError: naming the loss.
    """
    if first is not None and now is not None and not bool((first == now).all()):
        raise InputError(
            f"loss {name!r} returned two values for every element. The second was used as "
            "its weight, but it differs between the first and the last checkpoint, so it depends on "
            "the model. Return the values alone, or (values, weights) with weights that are "
            "constants."
        )


def _nothing_derived(
    request: ProbeRequest,
    objective: Objective,
    last: Mapping[str, Tensor],
    identities: dict[str, dict[str, float] | None],
) -> None:
    """Reject modules that merge or cache weights in eval mode: the loss would ignore weights set
    later.

    Raises:
        InputError: with both values of the loss.
    """
    from ...numerics.objective import identify

    objective.tensors.renew(last)
    for name, before in identities.items():
        if before is None:
            continue
        value, anew = before["loss"], identify(objective, name).loss
        if not abs(value - anew) <= PRECISIONS[request.setup.settings.precision].same_loss * max(
            abs(value), abs(anew), 1e-12
        ):
            raise InputError(
                f"loss {name!r} at the last checkpoint is {value:.6g}, but {anew:.6g} after "
                "setting the model to eval mode again: a module merges or caches weights in eval mode. Build "
                "it so that it does not (merge_weights=False in loralib)."
            )


def _can_measure(
    request: ProbeRequest,
    objective: Objective,
    first: Mapping[str, Tensor],
    names: list[str],
    at_first: dict[str, Identity],
) -> tuple[bool, list[str]]:
    """Tell whether some segments can also be evaluated one precision higher, with a note where not.

    Adds the losses' identities at the first checkpoint to `at_first`.

    Raises:
        InputError: if a loss differs between the precisions.
    """
    from ...numerics.objective import identify, loss_of_sample

    precision = request.setup.settings.precision
    finer = PRECISIONS[precision].reference
    if finer is None or not names:
        return False, []
    try:
        reference = objective.reference
        reference.place(first)
        for name in names:
            at_first[name] = identify(objective, name)
            narrow, wide = at_first[name].loss, loss_of_sample(reference, name)
            if not abs(narrow - wide) <= PRECISIONS[objective.precision_of(name)].same_loss * max(
                abs(narrow), abs(wide), 1e-12
            ):
                raise InputError(
                    f"loss {name!r} is {narrow:.6g} in {precision} but {wide:.6g} in "
                    f"{finer.precision}"
                )
    except InputError as error:
        return False, [
            f"the error of {precision} is not measured, because the task does not run in "
            f"{finer.precision}: {error}"
        ]
    return True, []


def sampled(ends: int) -> list[range]:
    """Return where to search for a few segments that move: from the first on, from the middle on,
    and from the last back.

    Args:
        ends: segments of the trajectory.

    >>> sampled(3), [(each[0], each[-1]) for each in sampled(1000)]
    ([range(0, 3), range(1, 3), range(2, -1, -1)], [(0, 15), (499, 514), (999, 984)])
    """
    middle, last = (ends - 1) // 2, ends - 1
    return [
        range(min(_NEAR, ends)),
        range(middle, min(middle + _NEAR, ends)),
        range(last, max(-1, last - _NEAR), -1),
    ]


def moving(
    sample: Sample, objective: Objective
) -> Iterator[tuple[int, tuple[StoredPoint, StoredPoint] | None]]:
    """Yield a few segments, each once: with both ends if a parameter moves, else with None.

    Unreadable segments are skipped: their spans will fail and report it.

    Args:
        sample: where to search.
        objective: whose device and precision the ends get.
    """
    trained = [tensor.name for tensor in objective.table if tensor.kind == "parameter"]
    looked: dict[int, bool] = {}
    for places in sample.looked:
        for index in places:
            if index not in looked:
                before, after = (
                    StoredPoint(sample.points, end, objective) for end in (index, index + 1)
                )
                try:
                    looked[index] = differ(before, after, trained)
                except SpanError:
                    continue
                yield index, (before, after) if looked[index] else None
            if looked[index]:
                break


@reported(CalibrationsRequest)
def calibrations(request: CalibrationsRequest) -> Calibrations:
    """Return the trapezoid's error as a share of Σ|(g₁ − g₀)·Δθ|: the largest on the sampled moving
    segments, at the requested level of `--keep`.
    """
    from ...numerics.allocation import calibrate
    from ...numerics.statistics import unit_axes

    objective = objective_of(request.setup)
    objective.batch_sizes.update(request.batch_sizes)
    for name, grouped in request.along.items():
        objective.data.set_batch_order(name, grouped)
    axes = unit_axes(objective.allocated, kept_tensors(request, objective), request.keep)
    largest: dict[str, float | None] = dict.fromkeys(request.along)
    for index, pair in moving(request.sample, objective):
        if pair is None:
            continue
        start, end = (
            point_read_twice(request.sample.points, place, objective)
            for place in (index, index + 1)
        )
        shares = calibrate(start, end, objective, list(request.along), axes)
        for name, share in shares.items():
            if math.isfinite(share):
                largest[name] = max(largest[name] or 0.0, share)
    return Calibrations(shares=largest)


def _never_updated(request: ProbeRequest, objective: Objective) -> list[str]:
    """Describe running statistics that still are those of a new model in every probed checkpoint,
    or in the task's model where it fixes them.
    """
    import torch

    if request.setup.settings.norm_stats != "running":
        return []
    trained, parameters = (
        {spec.name for spec in objective.table},
        dict(objective.model.named_parameters()),
    )
    # ignoring parts that were not trained, such as the base of an adapter
    buffers = {
        name: tensor
        for name, tensor in objective.model.named_buffers()
        if is_statistic(name)
        and f"{name.rpartition('running_')[0]}weight" not in parameters.keys() - trained
    }
    sources = {
        name: request.sample.points.names[name]
        for name in buffers
        if name in request.sample.points.names
    }
    new = {name: float(name.endswith("running_var")) for name in buffers}
    unchanged = {
        name for name in buffers if name in sources or torch.all(buffers[name] == new[name])
    }
    sample = request.sample
    for index in {sample.first, (sample.last - 1) // 2, sample.last}:
        try:
            stored = (
                read_checkpoint(checkpoint_at(request.sample.points, index), sources)
                if sources
                else {}
            )
        except SpanError:  # its spans will fail and report it
            continue
        unchanged -= {
            name for name, tensor in stored.items() if not bool((tensor == new[name]).all())
        }
    layers = [{f"{prefix}running_mean", f"{prefix}running_var"} for prefix in _prefixes(unchanged)]
    named = [repr(name) for layer in layers if layer <= unchanged for name in sorted(layer)]
    if not named:
        return []
    return [
        "running statistics are still 0 and 1, as in a new model, in every checkpoint "
        f"checked ({few(named)}): they were never updated, or not saved, so with --norm-stats "
        "running the loss is not the one in training. If training normalised by batches, use "
        "--norm-stats batch --batch-size N; if they are stored elsewhere, load them in "
        "Task.model and name them in Task(fixed=[…])"
    ]


def _prefixes(names: Iterable[str]) -> list[str]:
    return sorted({name.removesuffix("running_mean").removesuffix("running_var") for name in names})


def _unmoved(request: ProbeRequest, objective: Objective) -> list[str]:
    """Describe the share of half-precision parameters that did not move on a few segments; segments
    on which none did are skipped.
    """
    if not request.half:
        return []
    same = count = still = 0
    for _, pair in moving(request.sample, objective):
        if pair is None:
            still += 1
            continue
        before, after = pair
        for name, values in before.items():
            if values.is_floating_point():
                same += int((values == after[name]).sum())
                count += values.numel()
    stored = f"checkpoints are stored in half precision ({counted(len(request.half), 'tensor')})"
    if not count:
        return [
            f"{stored}, and nothing moves at all on the {still} sampled segments. Record float32 "
            "weights."
        ]
    apart = f" ({still} more, on which nothing moves, are not counted)" if still else ""
    return [
        f"{stored}: {same / count:.1%} of the parameters do not move at all on sampled "
        f"segments{apart}, so their allocation is 0. Record float32 weights."
    ]
