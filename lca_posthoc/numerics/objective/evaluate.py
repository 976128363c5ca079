r"""Loss and gradient of a whole split at one point.

$L(\theta) = \sum_e w_e\,\ell_e(\theta) \big/ \sum_e w_e$ over every element $e$ of the split, or of
each of its groups; one value per element, $w_e = 1$ unless the loss gives weights. Sums over
elements and batches accumulate in float64.

Losses over the same batches are evaluated in one pass over them: the forward pass is shared by
losses that are functions of the model's outputs, the backward pass by losses that have the same
values. What a loss comes to, bit for bit, depends on the order of its own batches alone, never on
which others are evaluated beside it.
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

COMPARED = 5  # examples of which each alone is compared with the same one in a batch


class Objective:
    """Evaluates the losses of a task at any point in the space of its model's tensors.

    `build_objective` builds one. Its model and data are those of the task; it reads and builds
    nothing of its own accord but another objective beside it.

    Attributes:
        task: states the losses.
        settings: device, precision, batches.
        reader: reads the data.
        losses: those that are evaluated, by name.
        data: their splits and batches.
        tensors: the model and its tensors.
        loss_values: computes the losses on a batch.
        recalibration: recomputes statistics of normalisation layers; None in other modes.
        evaluations: how often each loss and its gradient were computed over the whole split.
        forward_passes: how often each loss alone was.
        example_axes: where the examples are in what the model computes, by loss, see
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
        self._elements_of: dict[str, int] = {}  # of one example, by loss
        # by precision, whether a copy of the model gives the losses of this one
        self._copies_agree: dict[str, bool] = {}

    # --- what it is made of -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return where the model and the data live."""
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
        """Return the tensors that are read from checkpoints."""
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
        """Copy values into the module's own tensors, in place, see `ModelTensors.place`."""
        self.tensors.place(point)

    @contextlib.contextmanager
    def holding(self, point: MutableMapping[str, Tensor]) -> Iterator[None]:
        """Hold a point in the module instead of beside it, see `ModelTensors.holding`."""
        with self.tensors.holding(point):
            yield
            give_back(self.parameter_bytes)  # before the copy takes as much

    @property
    def splits(self) -> dict[str, Split]:
        """Return the splits of the losses, by name."""
        return self.data.splits

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Return the examples of a batch, by split."""
        return self.data.batch_sizes

    def order(self, name: str) -> Groups | None:
        """Return the groups of a loss, in the order of its batches, see `LossData.order`."""
        return self.data.order(name)

    def replicates_of(self, name: str) -> str | None:
        """Return the name of a loss on parts of its random subset, see `LossData`."""
        return self.data.replicates_of(name)

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the data and of the tensors that checkpoints do not hold, which must be
        equal in every process.
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
        """Fix the batch size of every split: the one recorded, the one given, or a deterministic
        choice at `point`.
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

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of the model's parameters, of which every batch reads all."""
        return sum(
            parameter.numel() * parameter.element_size() for parameter in self.model.parameters()
        )

    def saved_bytes(self, name: str) -> float:
        """Return the bytes autograd saves of a loss for one example."""
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
        """Compute as the run does, see `LossValues.mode`."""
        return self.loss_values.mode(layers)

    def values(self, name: str, batch: object) -> Values:
        """Return a loss's values and weights on a batch, see `LossValues.values`."""
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
        """Return each loss over its whole split at `point`, with its gradient unless only the value
        is asked for.

        Args:
            point: every tensor of the table, on the device.
            losses: names.
            gradient: False for a forward pass alone.
            along: directions, for sums of the gradient along them instead of the gradient.
            only: some of the groups, where the losses have the same ones.
            examples: directions along which the loss of every example is derived, for losses that
                are stated per example, with a gradient; None where examples are not told apart.
                Where they are the very motions of `along`, sums over tensors come with them.
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
        """Yield the sums of losses without groups over each of some parts of their splits at
        `point`.

        Args:
            point: every tensor of the table, on the device.
            parts: in each, by loss, the positions of the examples; None for a term of the
                parameters. Losses on one split have one part.
            along: directions, for sums of the gradient along them; None for a forward pass alone.
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
        """Add a term of the parameters."""
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
        """Return losses, given by the source of their values, from one pass over a split."""
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
        """Return where the examples of losses are whose shares are to be told apart; None where
        batches have one group each.
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
        """Return the sums of a source of values from a pass of its own in the order of the data,
        whose examples are told apart.
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
        """Return a loss that is stated per example, or per element, over its split, see
        `tell_examples` and `tell_elements`.
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
        """Return the sums of every example, at the point the module holds.

        Args:
            name: of a loss on a split.
            motions: directions; None for the loss alone.
            batches: in the order of the data; of one example each where `example_axes` does not
                have the loss.
            examples: of all batches.
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
        """Return the sums of every element of a loss, at the point the module holds.

        Args:
            name: of a loss on a split.
            motions: directions; None for the loss alone.
            batches: in the order of the data.
            elements: of all batches.
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
        """Return how many elements a loss has for one example.

        Raises:
            InputError: where two examples have not twice as many.
        """
        if name in self._elements_of:  # asked for at every evaluation
            return self._elements_of[name]
        split = self.splits[str(self.losses[name].split)]
        counts = []
        for examples in range(1, 1 + min(2, split.examples)):
            with self.mode():
                counts.append(self.values(name, fresh(split.sample(0, examples)))[0].numel())
        if counts[-1] != len(counts) * counts[0]:
            raise InputError(
                f"loss {name!r} is stated per element, and has {counts[0]} elements for the first "
                f"example and {counts[1]} for the first two. Pad examples to one shape, with "
                "weights of 0."
            )
        self._elements_of[name] = counts[0]
        return counts[0]

    def check_elements(self, name: str) -> None:
        """Compare derivatives of single elements with those of backward passes, at the point the
        module holds.

        Raises:
            InputError: where they cannot be told.
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
                    f"loss {name!r} is stated per element, but its values do not run over the "
                    "examples first. Return them with the examples along the first axis."
                )
            self._element_derivatives(name).check(batch)

    def find_examples(self, name: str) -> Check:
        """Find where the examples of a loss are in what the model computes, at the point the module
        holds, and why the shares of single examples in some tensors cannot be told.

        With the axes as its `example_axes`, the loss's groups take batches in the order of the
        data.

        Args:
            name: of a loss on a split.
        """
        split = self.splits[str(self.losses[name].split)]
        count = min(COMPARED, split.examples)
        positions = split.spread(count)
        if positions is None or count < 2:
            return unchecked("the data is one example, or can be read in its order alone")
        try:
            batch = split.at(positions)
            alone = {place: split.at(positions[place : place + 1]) for place in (1, count - 1)}
        except InputError:
            return unchecked("examples of several shapes make no batch")

        def values(data: object) -> Values:
            return self.values(name, fresh(data))

        with self.mode():
            if not same_elements(values, (batch, count), alone, self.dtype):
                return unchecked("the values of the loss do not run over the examples")
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
        """Return what is taken in of gradients: nothing, all, or their sums along directions."""
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
        """Run one pass over the batches of a split at the point the module holds, and hand what it
        computes to an accumulator of each source.

        Args:
            key: of the pass, see `LossData.passes`.
            sources: the losses of the pass, by the source of their values.
            accumulators: by source.
            only: some of the groups.
            part: some of the examples, where the batches are in the order of the data.
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
        """Return a loss over some batches, at the point the module holds.

        Args:
            values: returns a batch's values and weights.
            batches: in order.
            gradients: what is taken in of the gradient.
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
        """Return the precision a loss is computed in: that of the run, or the coarser one of an
        autocast it turns on itself.
        """
        return "bfloat16" if self.autocast(name) else self.precision

    def autocast(self, name: str) -> str | None:
        """Return the type to which a loss, or the model in it, casts by an autocast of its own;
        None where it turns none on.

        Autocast leaves float64 alone, and in bfloat16 the run's own is on already.
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
        """Return the same task, one precision higher, over the same data and batches.

        Its model is a copy of this one's, so that the task's factory is called once; where no copy
        agrees, the factory builds another.
        """
        finer = PRECISIONS[self.precision].reference
        assert finer is not None, f"{self.precision} is the highest precision"
        give_back(self.parameter_bytes)  # before the copy takes twice as much
        other = self.in_precision(finer.precision)
        other.data.share_orders(self.data)
        return other

    def release_reference(self) -> None:
        """Give up the objective one precision higher, with its model and its copy of the data."""
        self.__dict__.pop("reference", None)

    def in_precision(self, precision: str) -> Objective:
        """Return the same task in another precision, with batches of the same size and the tensors
        that checkpoints do not hold.
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
        """Tell whether another precision gives the values of every loss on a few examples, at the
        point this one holds.
        """
        other.place(self.point)
        try:
            return all(self._agrees_on(name, other) for name in self.losses)
        except InputError:
            return False

    def _agrees_on(self, name: str, other: Objective) -> bool:
        """Tell whether values agree within ten times what two precisions may differ by on a larger
        sample: single values may be small.
        """
        # half a batch, which takes as much memory in a precision of twice the bytes
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
        """Return the same with a loss for every entry of a loss that returns a dict, as its call on
        two examples tells.

        Raises:
            InputError: where an entry has no name of its own, or one was asked for that is not
                returned.
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
        """Return the names of the entries a loss returns; None where it returns none, or cannot be
        called before weights are placed.
        """
        loss = self.losses[name]
        if loss.split is None or loss.is_of_torch:
            return None
        try:
            batch = copied(self._first(name, 2))
            with self.mode():
                returned = self.loss_values.returned(name, batch).result
        except InputError:  # the probe says what is wrong, with the weights of a checkpoint
            return None
        stated, entry = origin(self.task, name)
        if entry is None and not isinstance(returned, Mapping):
            return None
        entries = entries_of(stated, returned, entry)
        for key in entries:
            if self.task.stated(f"{stated}/{key}") != (stated, key):
                raise InputError(
                    f"loss {stated!r} returns an entry {key!r}, and another loss of the task is "
                    f"called {stated + '/' + key!r}. Give one of them another name."
                )
        return entries


def _is_of_tensors(gradients: Gradients) -> bool:
    """Tell whether no more is taken in of gradients than a sum over each tensor."""
    if isinstance(gradients, SumsAlong):
        return gradients.is_of_tensors
    return not isinstance(gradients, WholeGradients)


def build_objective(
    build: Callable[[], Task], losses: list[str] | None, settings: ObjectiveSettings
) -> Objective:
    """Build a task and its model, open its data, and return the objective of its losses.

    Args:
        build: gives the task, called under the default dtype of the precision, in the thread that
            reads its data.
        losses: names of the losses, None for the first of the task, `["all"]` for every one.
        settings: device, precision, batches.

    Raises:
        InputError: where the task cannot be built, its model or its data cannot be used, or it has
            no such loss.
    """
    return _compose(build, losses, settings, Reader(), None)


def _compose(
    build: Callable[[], Task],
    losses: list[str] | None,
    settings: ObjectiveSettings,
    reader: Reader,
    model: nn.Module | None,
) -> Objective:
    """Build an objective, around a model that there is already or a new one of the task."""
    with default_dtype(settings.dtype):
        task = reader.build(build)
        chosen = {name: stated_loss(task, name) for name in task.choose(losses)}
        module = new_model(task) if model is None else model
        convert_module(module, settings.device, settings.dtype)
        module.eval()  # a statement: a model's own train() or eval() may return nothing
    data = open_data(task, chosen, settings, reader)
    loss_values = LossValues(task, chosen, module, settings)
    _complete(module, task, loss_values, reader)
    tensors = bind_tensors(module, task.fixed, settings)
    loss_values.restore = tensors.restore
    if settings.dtype == torch.float64 and model is None and (seeded := tensors.seeded()):
        # the ones that were trained with: a seed gives others in float64
        with default_dtype(torch.float32):
            tensors.copy_own(new_model(task), seeded)
    return Objective(task, settings, reader, data, tensors, loss_values)


def _complete(module: nn.Module, task: Task, loss_values: LossValues, reader: Reader) -> None:
    """Let lazily built modules infer their shapes from a batch."""
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
