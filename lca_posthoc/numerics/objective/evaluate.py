r"""Compute loss and gradient of a whole split at one point.

$L(\theta) = \sum_e w_e\,\ell_e(\theta) \big/ \sum_e w_e$ over every element $e$ of the split, or of
each of its groups: one value per element, and $w_e = 1$ unless the loss returns weights. Sums over
elements and batches accumulate in float64.

One pass over the batches evaluates all losses on them. Losses that are functions of the model's
outputs share the forward pass, and losses with the same values share the backward pass. The result
of a loss, bit for bit, depends only on the order of its own batches, never on which other losses
are evaluated with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...base.available_memory import give_back
from ...checkpoints.trajectory import TensorSpec
from ...errors import InputError
from ...tasks.task import Task, convert_module
from ..precisions import PRECISIONS
from ..schema import uses_of
from .batches import Groups, Order, Split, automatic_batch_size, saved_bytes
from .containers import copied, fresh
from .copies import copy_in
from .data import LossData, PassKey, ValueSource, open_data, origin, stated_loss
from .directions import Along, Gradients, Motion, NoGradients, SumsAlong, WholeGradients
from .element_groups import ElementOrder
from .element_shares import ElementDerivatives
from .every_example import EveryExample
from .example_axis import Axes
from .example_derivatives import Derivatives, SingleDerivatives, TappedDerivatives
from .example_sums import SumsByExample
from .model import ModelTensors, bind_tensors, new_model
from .passes import (
    Accumulator,
    Batches,
    GroupValues,
    batches_across_groups,
    batches_by_group,
    batches_of_examples,
    run_pass,
)
from .precision import default_dtype, dtype_of
from .reader import Reader
from .recalibration import Recalibration
from .returned import entries_of
from .settings import ObjectiveSettings
from .sums import Evaluation, PartialSums, Sums
from .tap_check import Check, Drawn, check, same_elements, unchecked
from .taps import Taps
from .values import LossValues, Values

COMPARED = 5  # examples that are computed alone and in a batch, to compare the two


class Objective:
    """Evaluate the losses of a task at any point in parameter space.

    `build_objective` creates one. The model and the data come from the task; an objective itself
    builds and reads nothing, except for a second objective in another precision.

    Attributes:
        task: defines the losses.
        settings: device, precision, batches.
        reader: reads the data.
        losses: the evaluated losses by name.
        data: splits and batches of the losses.
        tensors: the model and its tensors.
        loss_values: computes the losses on a batch.
        recalibration: recomputes statistics of normalisation layers; None in other modes.
        evaluations: number of passes over the whole split that computed each loss and its gradient.
        forward_passes: number of passes that computed each loss only.
        example_axes: by loss, the axis of the examples in each operation of the model, see
            `find_examples`.
    """

    def __init__(
        self,
        task: Task,
        settings: ObjectiveSettings,
        reader: Reader,
        data: LossData,
        tensors: ModelTensors,
        loss_values: LossValues,
    ) -> None:
        self.task, self.settings, self.reader = task, settings, reader
        self.data, self.tensors, self.loss_values = data, tensors, loss_values
        self.losses = loss_values.losses
        self.recalibration = Recalibration(self) if settings.norm_stats == "recalibrated" else None
        self.evaluations = dict.fromkeys([*self.losses, *data.replicated], 0)
        self.forward_passes = dict(self.evaluations)
        self.example_axes: dict[str, Axes] = {}
        self._autocast_of: dict[str, str | None] = {}
        self._elements_of: dict[str, int] = {}  # elements per example, by loss
        # by precision, whether a copy of the model reproduces the losses
        self._copies_agree: dict[str, bool] = {}

    # --- what it is made of -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return the device of the model and the data."""
        return self.settings.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of floating tensors."""
        return self.settings.dtype

    @property
    def precision(self) -> str:
        """Return the precision of the computation."""
        return self.settings.precision

    @property
    def norm_stats(self) -> str:
        """Return the mode of normalisation layers."""
        return self.settings.norm_stats

    @property
    def model(self) -> nn.Module:
        """Return the model."""
        return self.tensors.module

    @property
    def table(self) -> list[TensorSpec]:
        """Return the tensors read from checkpoints."""
        return self.tensors.table

    @property
    def allocated(self) -> list[TensorSpec]:
        """Return the tensors that take part in the allocation."""
        return self.tensors.allocated

    @property
    def point(self) -> dict[str, Tensor]:
        """Return the tensors of the table, as the module holds them."""
        return self.tensors.point

    def place(self, point: Mapping[str, Tensor]) -> None:
        """Copy values into the module's own tensors in place; see `ModelTensors.place`."""
        self.tensors.place(point)

    @contextlib.contextmanager
    def holding(self, point: MutableMapping[str, Tensor]) -> Iterator[None]:
        """Keep a point only in the module, not also outside it; see `ModelTensors.holding`."""
        with self.tensors.holding(point):
            yield
            give_back(self.parameter_bytes)  # the copy is about to take as much

    @property
    def splits(self) -> dict[str, Split]:
        """Return the splits of the losses, by name."""
        return self.data.splits

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Return the number of examples of a batch, by split."""
        return self.data.batch_sizes

    def order(self, name: str) -> Groups | None:
        """Return the groups of a loss in the order of its batches; see `LossData.order`."""
        return self.data.order(name)

    def replicates_of(self, name: str) -> str | None:
        """Return the name of the loss on parts of the random subset of this one; see `LossData`."""
        return self.data.replicates_of(name)

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the data and of the tensors that checkpoints lack; they must be equal in
        every process.
        """
        others = [] if self.recalibration is None else [self.recalibration.split]
        return {
            **self.data.digests(others),
            **self.tensors.digests,
            **self.data.group_digests(),
        }

    # --- batches ----------------------------------------------------------------------------------

    def settle_batch_sizes(
        self, point: Mapping[str, Tensor], recorded: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Fix the batch size of every split: the recorded one, else the one in the settings, else a
        deterministic choice at `point`.

        Args:
            point: every tensor of the table, on the device.
            recorded: batch sizes of an existing run, by split.
        """
        self.place(point)
        for name, split in self.splits.items():
            size = (recorded or {}).get(name) or self.settings.batch_size
            self.batch_sizes[name] = min(size or min(self._automatic(split)), split.examples)
        return dict(self.batch_sizes)

    def _automatic(self, split: Split) -> Iterator[int]:
        for name, loss in self.losses.items():
            if loss.split == split.name:
                yield automatic_batch_size(
                    self.saved_bytes(name), self.parameter_bytes, self.device
                )

    @cached_property
    def parameter_bytes(self) -> int:
        """Return the size of the model's parameters in bytes; every batch reads all of them."""
        return sum(
            parameter.numel() * parameter.element_size() for parameter in self.model.parameters()
        )

    def saved_bytes(self, name: str) -> float:
        """Return the bytes that autograd saves per example of a loss."""
        split = stated_loss(self.task, name).split
        assert split is not None
        with self.mode():
            return saved_bytes(self._split(split), lambda batch: self.values(name, fresh(batch)))

    def _split(self, name: str) -> Split:
        if self.recalibration is not None and self.recalibration.split.name == name:
            return self.recalibration.split
        return self.splits[name]

    # --- evaluation -------------------------------------------------------------------------------

    def mode(
        self, layers: contextlib.AbstractContextManager[None] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context that computes as the run does; see `LossValues.mode`."""
        return self.loss_values.mode(layers)

    def values(self, name: str, batch: object) -> Values:
        """Return a loss's values and weights on a batch; see `LossValues.values`.

        Args:
            name: name of the loss.
            batch: the batch, as its split returns it.
        """
        return self.loss_values.values(name, batch)

    def evaluate(
        self,
        point: Mapping[str, Tensor],
        losses: list[str],
        *,
        gradient: bool = True,
        along: Along | None = None,
        only: range | None = None,
        examples: Sequence[Motion] | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluate losses over their whole splits at `point`.

        Args:
            point: every tensor of the table, on the device.
            losses: names of the losses.
            gradient: False for a forward pass only.
            along: directions along which to sum the gradient, instead of returning it.
            only: range of groups to evaluate; the losses must have the same groups.
            examples: directions along which to differentiate the loss of every example, for losses
                that keep examples apart and with a gradient; None to skip this. If they are the
                same object as the motions of `along`, the sums over tensors come from the same
                pass.

        Returns:
            The evaluation of each loss, by name.
        """
        self.place(point)
        if along is not None:  # what is freed inside a pass lies scattered
            give_back(self.parameter_bytes)
        gradients = self._gradients(gradient, along)
        counts = self.evaluations if gradient else self.forward_passes
        for name in losses:
            counts[name] += only is None or only.start == 0
        evaluations: dict[str, Evaluation] = {}
        if examples is not None:
            evaluations = {
                name: self._every_example(name, examples if gradient else None)
                for name in losses
                if name in self.losses and self.losses[name].per is not None
            }
        alike = along is None or along.motions is examples
        told = evaluations.keys() if alike and _is_of_tensors(gradients) else set[str]()
        others = [name for name in losses if name not in told]
        for key, sources in self.data.passes(others).items():
            if key[0] is not None:
                of_pass = self._one_pass(key, sources, only, gradients)
            else:
                of_pass = {
                    name: self.evaluate_on_batches(partial(self.values, name), [None], gradients)
                    for names in sources.values()
                    for name in names
                }
            for name, evaluation in of_pass.items():
                if name in evaluations:
                    evaluation = replace(evaluation, examples=evaluations[name].examples)
                evaluations[name] = evaluation
        return {name: evaluations[name] for name in losses}

    def evaluate_parts(
        self,
        point: Mapping[str, Tensor],
        parts: Sequence[Mapping[str, range | None]],
        along: Along | None,
    ) -> Iterator[dict[str, PartialSums]]:
        """Yield the sums of losses without groups over parts of their splits at `point`.

        Args:
            point: every tensor of the table, on the device.
            parts: for each part, by loss, the positions of its examples; None for a term of the
                parameters. Losses on one split have the same part.
            along: directions along which to sum the gradient; None for a forward pass only.
        """
        self.place(point)
        if along is not None:
            give_back(self.parameter_bytes)
        gradients = self._gradients(along is not None, along)
        for part in parts:
            yield self._sums_over(part, gradients)

    def _sums_over(
        self, part: Mapping[str, range | None], gradients: Gradients
    ) -> dict[str, PartialSums]:
        sums: dict[str, Sums] = {}
        for key, sources in self.data.passes(part).items():
            of_source = {source: Sums(gradients, self.device, None, True) for source in sources}
            first = next(iter(sources.values()))[0]
            if key[0] is not None:
                self.accumulate(key, sources, of_source, part=part[first])
            else:
                for source, names in sources.items():
                    self._add_term(names[0], of_source[source])
            sums |= {name: of_source[source] for source, names in sources.items() for name in names}
        return {name: sums[name].partial() for name in part}

    def _add_term(self, name: str, sums: Sums) -> None:
        """Add a term of the parameters to the sums."""
        with self.mode():
            values, weights = self.values(name, fresh(None))
            values = values if sums.needs_graph else values.detach()
            sums.take(GroupValues(0, values, weights))

    def _one_pass(
        self,
        key: PassKey,
        sources: Mapping[ValueSource, list[str]],
        only: range | None,
        gradients: Gradients,
    ) -> dict[str, Evaluation]:
        """Evaluate losses, given by the source of their values, in one pass over a split."""
        order = self.data.order_at(key[1])
        groups = range(len(order.labels)) if order and only is None else only
        sums: dict[ValueSource, Sums] = {}
        together: dict[ValueSource, list[str]] = {}
        for source, names in sources.items():
            axes = self._axes(names, gradients)
            if axes is None or order is None or groups is None:
                together[source] = names
                sums[source] = self._sums(names, groups, gradients)
            else:
                sums[source] = self._by_example(key, source, names, groups, gradients, axes)
        if together:
            self.accumulate(key, together, sums, only)
        return {
            name: sums[source].evaluation(
                self.order(name) is not None, f"loss {name!r} on split {key[0]!r}", order
            )
            for source, names in sources.items()
            for name in names
        }

    def _axes(self, names: list[str], gradients: Gradients) -> Axes | None:
        """Return the axes of the examples if groups are separated within a batch; None if each
        batch holds a single group.
        """
        if not _is_of_tensors(gradients):
            return None
        return self.example_axes.get(self.data.replicated.get(names[0], names[0]))

    def _by_example(
        self,
        key: PassKey,
        source: ValueSource,
        names: list[str],
        groups: range,
        gradients: Gradients,
        axes: Axes,
    ) -> Sums:
        """Return the sums of one source of values from a separate pass in the order of the data,
        which separates the examples of each batch.
        """
        split, order = self.splits[str(key[0])], self.data.order_at(key[1])
        assert isinstance(order, Order)
        taps = derivatives = None
        if isinstance(gradients, SumsAlong):
            taps = Taps(self.tensors.differentiable, gradients.motions)
            derivatives = TappedDerivatives(taps, self.tensors.differentiable, axes)
        grouped = [self.order(name) is not None for name in names]
        sums = SumsByExample(derivatives, gradients, groups, not all(grouped), self.device)
        first = self.data.replicated.get(names[0], names[0])
        batches = batches_of_examples(split, self.batch_sizes[split.name], order)
        run_pass(self.loss_values, batches, {source: first}, {source: sums}, taps)
        return sums

    def _every_example(self, name: str, motions: Sequence[Motion] | None) -> Evaluation:
        """Evaluate a loss that keeps examples or elements apart over its split; see `tell_examples`
        and `tell_elements`.
        """
        split = self.splits[str(self.losses[name].split)]
        where = f"loss {name!r} on split {split.name!r}"
        if self.losses[name].per == "element":
            with contextlib.closing(split.batches(self.batch_sizes[split.name])) as grouped:
                elements = split.examples * self.elements_of(name)
                data = (batch for _, batch in grouped)
                return self.tell_elements(name, motions, data, elements).evaluation(None, where)
        size = 1 if name not in self.example_axes else self.batch_sizes[split.name]
        batches = batches_of_examples(split, size, None)
        sums = self.tell_examples(name, motions, batches, split.examples)
        order = self.order(name)
        assert not isinstance(order, ElementOrder), "groups of a loss per example are of examples"
        return sums.evaluation(order, where)

    def tell_examples(
        self, name: str, motions: Sequence[Motion] | None, batches: Batches, examples: int
    ) -> EveryExample:
        """Return the sums of every example at the point in the module.

        Args:
            name: name of a loss on a split.
            motions: directions to differentiate along; None for the loss only.
            batches: batches in the order of the data; of one example each if `example_axes` lacks
                the loss.
            examples: number of examples in all batches.
        """
        axes, tensors = self.example_axes.get(name), self.tensors.differentiable
        taps: Taps | None = None
        derivatives: Derivatives | None = None
        if motions is not None and axes is not None:
            taps = Taps(tensors, motions)
            derivatives = TappedDerivatives(taps, tensors, axes)
        elif motions is not None:
            derivatives = SingleDerivatives(tensors, motions)
        told = uses_of(signature for signature, _ in axes or ())
        uses = {} if motions is None else {tensor: len(told.get(tensor, "1")) for tensor in tensors}
        sums = EveryExample(uses, len(motions or ()), examples, self.device, derivatives)
        source = id(self.losses[name].source), origin(self.task, name)[1]
        run_pass(self.loss_values, batches, {source: name}, {source: sums}, taps)
        return sums

    def tell_elements(
        self,
        name: str,
        motions: Sequence[Motion] | None,
        batches: Iterable[object],
        elements: int,
    ) -> EveryExample:
        """Return the sums of every element of a loss at the point in the module.

        Args:
            name: name of a loss on a split.
            motions: directions to differentiate along; None for the loss only.
            batches: batches in the order of the data.
            elements: number of elements in all batches.
        """
        uses = {} if motions is None else dict.fromkeys(self.tensors.differentiable, 1)
        sums = EveryExample(uses, len(motions or ()), elements, self.device)
        derivatives = self._element_derivatives(name)
        with self.mode():
            for batch in batches:
                told = derivatives.shares(motions or (), batch)
                values = told.values.double().reshape(-1)
                weights = torch.ones_like(values) if told.weights is None else told.weights
                totals = torch.stack([values, weights.double().reshape(-1)], 1)
                moving = {
                    tensor: share[..., None] for tensor, share in told.shares.items() if share.any()
                }
                sums.put(totals, moving)
        return sums

    def _element_derivatives(self, name: str) -> ElementDerivatives:
        return ElementDerivatives(
            self.tensors.differentiable,
            lambda batch: self.values(name, fresh(batch)),
            dtype_of(self.precision_of(name)),
        )

    def elements_of(self, name: str) -> int:
        """Return the number of elements of a loss per example.

        Raises:
            InputError: if two examples do not have twice as many as one.
        """
        if name in self._elements_of:  # every evaluation asks
            return self._elements_of[name]
        split = self.splits[str(self.losses[name].split)]
        counts = []
        for examples in range(1, 1 + min(2, split.examples)):
            with self.mode():
                counts.append(self.values(name, fresh(split.sample(0, examples)))[0].numel())
        if counts[-1] != len(counts) * counts[0]:
            raise InputError(
                f"loss {name!r} is per element, and has {counts[0]} elements for the first example "
                f"and {counts[1]} for the first two. Pad examples to one shape, with weights of 0."
            )
        self._elements_of[name] = counts[0]
        return counts[0]

    def check_elements(self, name: str) -> None:
        """Compare derivatives of single elements with those of backward passes, at the point in the
        module.

        Raises:
            InputError: if single elements cannot be separated.
        """
        split = self.splits[str(self.losses[name].split)]
        positions = split.spread(min(COMPARED, split.examples))
        assert positions is not None, "data of a loss per element are read by position"
        batch, count = split.at(positions), len(positions)
        alone = {0: split.at(positions[:1])}

        def values(data: object) -> Values:
            return self.values(name, fresh(data))

        with self.mode():
            if not same_elements(values, (batch, count), alone, self.dtype):
                raise InputError(
                    f"loss {name!r} is per element, but the first axis of its values is not that of "
                    "the examples. Return them with the examples along the first axis."
                )
            self._element_derivatives(name).check(batch)

    def find_examples(self, name: str) -> Check:
        """Find the axis of the examples in each operation of the model, at the point in the module.

        With these axes in `example_axes`, the groups of the loss use batches in the order of the
        data.

        Args:
            name: name of a loss on a split.

        Returns:
            The axes, and why the shares of single examples in some tensors cannot be determined.
        """
        split = self.splits[str(self.losses[name].split)]
        count = min(COMPARED, split.examples)
        positions = split.spread(count)
        if positions is None or count < 2:
            return unchecked("the data is one example, or can only be read in its order")
        try:
            batch = split.at(positions)
            alone = {place: split.at(positions[place : place + 1]) for place in (1, count - 1)}
        except InputError:
            return unchecked("examples of different shapes do not form a batch")

        def values(data: object) -> Values:
            return self.values(name, fresh(data))

        with self.mode():
            if not same_elements(values, (batch, count), alone, self.dtype):
                return unchecked("the values of the loss have no axis of examples")
            return check(
                self.tensors.differentiable,
                [Motion(self.point, Drawn(self.point))],
                lambda data: values(data)[0],
                (batch, count),
                alone,
            )

    def _sums(self, names: list[str], groups: range | None, gradients: Gradients) -> Sums:
        grouped = [self.order(name) is not None for name in names]
        return Sums(gradients, self.device, groups if any(grouped) else None, not all(grouped))

    def _gradients(self, gradient: bool, along: Along | None = None) -> Gradients:
        """Return what to accumulate of gradients: nothing, all, or their sums along directions."""
        if not gradient:
            return NoGradients()
        tensors = self.tensors.differentiable
        return WholeGradients(tensors) if along is None else SumsAlong(tensors, along)

    def accumulate(
        self,
        key: PassKey,
        sources: Mapping[ValueSource, list[str]],
        accumulators: Mapping[ValueSource, Accumulator],
        only: range | None = None,
        part: range | None = None,
    ) -> None:
        """Run one pass over the batches of a split at the point in the module, and pass each
        source's results to its accumulator.

        Args:
            key: key of the pass, see `LossData.passes`.
            sources: losses of the pass, by the source of their values.
            accumulators: accumulator of each source.
            only: range of groups; None for all.
            part: range of examples, if the batches are in the order of the data; None for all.
        """
        split, order = self.splits[str(key[0])], self.data.order_at(key[1])
        size = self.batch_sizes[split.name]
        if order is not None and (self.norm_stats == "batch" or isinstance(order, ElementOrder)):
            batches = batches_across_groups(split, size, order, only)
        else:
            assert not isinstance(order, ElementOrder)
            batches = batches_by_group(split, size, order, only, part)
        names = {
            source: self.data.replicated.get(first, first)
            for source, (first, *_) in sources.items()
        }
        run_pass(self.loss_values, batches, names, accumulators)

    def evaluate_on_batches(
        self,
        values: Callable[[Any], Values],
        batches: Iterable[object],
        gradients: Gradients,
    ) -> Evaluation:
        """Evaluate a loss over some batches at the point in the module.

        Args:
            values: returns a batch's values and weights.
            batches: batches in order.
            gradients: what to accumulate of the gradient.
        """
        sums = Sums(gradients, self.device, None, True)
        with self.mode():
            for batch in batches:
                results, weights = values(fresh(batch))
                results = results if sums.needs_graph else results.detach()
                sums.take(GroupValues(0, results, weights))
        return sums.evaluation(False, "a loss", None)

    # --- precision --------------------------------------------------------------------------------

    def precision_of(self, name: str) -> str:
        """Return the precision a loss is computed in: that of the run, or the coarser one if the
        loss enables autocast itself.
        """
        return "bfloat16" if self.autocast(name) else self.precision

    def autocast(self, name: str) -> str | None:
        """Return the type that a loss or the model casts to with its own autocast, or None if
        neither enables it.

        Autocast does not affect float64, and in bfloat16 the run's own is already enabled.
        """
        if self.precision == "float64":
            return None
        if name not in self._autocast_of:
            self._autocast_of[name] = self.loss_values.autocast(name, self._first(name, 2))
        return self._autocast_of[name]

    def _first(self, name: str, count: int) -> object:
        """Return the first examples of a loss's split as a batch; None for a term of the
        parameters.
        """
        split = self.losses[name].split
        return None if split is None else self.splits[split].sample(0, count)

    @cached_property
    def reference(self) -> Objective:
        """Return an objective of the same task, data and batches, one precision higher.

        Its model is a copy of this one's, so that the task's factory is called once; if no copy
        reproduces the losses, the factory builds another model.
        """
        finer = PRECISIONS[self.precision].reference
        assert finer is not None, f"{self.precision} is the highest precision"
        give_back(self.parameter_bytes)  # the copy is about to take twice as much
        other = self.in_precision(finer.precision)
        other.data.share_orders(self.data)
        return other

    def release_reference(self) -> None:
        """Release `reference` with its model and its copy of the data."""
        self.__dict__.pop("reference", None)

    def in_precision(self, precision: str) -> Objective:
        """Return an objective of the same task in another precision, with the same batch sizes and
        the same tensors that checkpoints lack.
        """
        if self._copies_agree.get(precision, True):
            copied_model = copy_in(self.model, self.device, dtype_of(precision))
            if copied_model is not None:
                other = self._beside(precision, copied_model)
                if precision not in self._copies_agree:
                    self._copies_agree[precision] = self._agrees(other)
                if self._copies_agree[precision]:
                    return other
        return self._beside(precision, None)

    def _beside(self, precision: str, model: nn.Module | None) -> Objective:
        settings = replace(self.settings, precision=precision)
        other = _compose(lambda: self.task, list(self.losses), settings, self.reader, model)
        other.data.batch_sizes = self.batch_sizes
        if self.recalibration is not None and other.recalibration is not None:
            other.recalibration.recall(self.recalibration.recorded)
        other.tensors.copy_own(self.model, self.tensors.own())
        return other

    def _agrees(self, other: Objective) -> bool:
        """Return whether another precision reproduces every loss on a few examples, at the point in
        this objective.
        """
        other.place(self.point)
        try:
            return all(self._agrees_on(name, other) for name in self.losses)
        except InputError:
            return False

    def _agrees_on(self, name: str, other: Objective) -> bool:
        """Return whether values agree within ten times the tolerance for a larger sample, because
        single values may be small.
        """
        # half a batch takes as much memory in a precision of twice the width
        batch_size = self.batch_sizes.get(self.losses[name].on, 2)
        few_examples = min(32, max(min(2, batch_size), batch_size // 2))
        pair = []
        for objective in (self, other):
            batch = objective._first(name, few_examples)
            with objective.mode():
                pair.append(objective.values(name, fresh(batch))[0].detach().double())
        values, others = pair
        if values.shape != others.shape:
            return False
        tolerance = 10 * max(
            PRECISIONS[side.precision_of(name)].same_loss for side in (self, other)
        )
        return bool((values - others).abs().sum() <= tolerance * values.abs().sum())

    # --- losses that return dicts -----------------------------------------------------------------

    def divided(self) -> Objective:
        """Return an objective with a separate loss for every entry of a loss that returns a dict,
        judging by a call on two examples.

        Raises:
            InputError: if the name of an entry collides with another loss, or a requested entry is
                not returned.
        """
        names: list[str] = []
        known: dict[str, tuple[str, ...]] = {}
        for name in self.losses:
            stated, entry = origin(self.task, name)
            entries = known[stated] if stated in known else self._first_entries(name)
            if entries is not None:
                known[stated] = entries
            if entry is None:
                names += [name] if entries is None else [f"{name}/{key}" for key in entries]
            else:
                names.append(name)
        other = self
        if names != list(self.losses):
            other = _compose(lambda: self.task, names, self.settings, self.reader, self.model)
        other.loss_values.expect_entries(known)
        return other

    def _first_entries(self, name: str) -> tuple[str, ...] | None:
        """Return the names of the entries that a loss returns; None if it returns no dict, or
        cannot be called before weights are placed.

        Raises:
            InputError: if the name of an entry collides with another loss.
        """
        loss = self.losses[name]
        if loss.split is None or loss.is_of_torch:
            return None
        try:
            batch = copied(self._first(name, 2))
            with self.mode():
                returned = self.loss_values.returned(name, batch).result
        except InputError:  # the probe reports the error later, with the weights of a checkpoint
            return None
        stated, entry = origin(self.task, name)
        if entry is None and not isinstance(returned, Mapping):
            return None
        entries = entries_of(stated, returned, entry)
        for key in entries:
            if self.task.stated(f"{stated}/{key}") != (stated, key):
                raise InputError(
                    f"loss {stated!r} returns an entry {key!r}, and another loss of the task has the "
                    f"name {stated + '/' + key!r}. Rename one of them."
                )
        return entries


def _is_of_tensors(gradients: Gradients) -> bool:
    """Return whether the accumulated gradients are at most one sum per tensor."""
    if isinstance(gradients, SumsAlong):
        return gradients.is_of_tensors
    return not isinstance(gradients, WholeGradients)


def build_objective(
    build: Callable[[], Task], losses: list[str] | None, settings: ObjectiveSettings
) -> Objective:
    """Build a task and its model, open its data, and return the objective of its losses.

    Args:
        build: returns the task; called under the default dtype of the precision, in the thread that
            reads its data.
        losses: names of the losses; None for the first of the task, `["all"]` for all.
        settings: device, precision, batches.

    Raises:
        InputError: if the task cannot be built, its model or data cannot be used, or it lacks a
            loss.
    """
    return _compose(build, losses, settings, Reader(), None)


def _compose(
    build: Callable[[], Task],
    losses: list[str] | None,
    settings: ObjectiveSettings,
    reader: Reader,
    model: nn.Module | None,
) -> Objective:
    """Build an objective around an existing model or a new one of the task."""
    with default_dtype(settings.dtype):
        task = reader.build(build)
        chosen = {name: stated_loss(task, name) for name in task.choose(losses)}
        module = new_model(task) if model is None else model
        convert_module(module, settings.device, settings.dtype)
        module.eval()  # do not use the result: a model's own eval() may return nothing
    data = open_data(task, chosen, settings, reader)
    loss_values = LossValues(task, chosen, module, settings)
    _complete(module, task, loss_values, reader)
    tensors = bind_tensors(module, task.fixed, settings)
    loss_values.restore = tensors.restore
    if settings.dtype == torch.float64 and model is None and (seeded := tensors.seeded()):
        # use the values from training: the same seed draws others in float64
        with default_dtype(torch.float32):
            tensors.copy_own(new_model(task), seeded)
    return Objective(task, settings, reader, data, tensors, loss_values)


def _complete(module: nn.Module, task: Task, loss_values: LossValues, reader: Reader) -> None:
    """Run a batch through lazily built modules, so that they infer their shapes.

    Raises:
        InputError: if no loss calls the model.
    """
    if not any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        return
    name = next((name for name, loss in task.losses.items() if loss.split is not None), None)
    if name is None:
        raise InputError(
            "the model is lazily built, and no loss of the task calls it. Build it in Task.model."
        )
    loss_values.add_function(name)
    on, settings = task.losses[name].on, loss_values.settings
    split = Split(on, task.data[on], settings.device, settings.dtype, reader=reader)
    with loss_values.mode():
        loss_values.returned(name, split.sample(0, 2))
