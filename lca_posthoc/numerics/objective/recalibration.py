r"""Recompute statistics of normalisation layers from the data at one point, and the loss in another
mode.

With `recalibrated`, the statistics of a checkpoint are not the stored ones, which lag behind the
weights, but those of the data at its weights: one forward pass with batch statistics over one
split, in a fixed partition, and for every layer and channel, over its $n$ values,

$m = \frac1n\sum_b n_b m_b, \qquad v = \frac1n\sum_b n_b\,(v_b + (m_b - m)^2)$

from the means $m_b$ and biased variances $v_b$ of the batches. This is the variance within and
between batches, so that a single batch of all data has its own. Instance normalisation averages the
means and unbiased variances of instances, to which its running statistics converge. Sums are
float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checkpoints.trajectory import is_statistic
from ...errors import InputError, ResourceError
from ..schema import RecalibrationRecord
from .batches import Split, automatic_batch_size
from .containers import fresh
from .device_errors import is_out_of_memory
from .normalisation import NormalisationCall, normalising, replacing, running

if TYPE_CHECKING:
    from .evaluate import Objective

_MEAN, _VARIANCE = "running_mean", "running_var"


class _Pool:
    """Accumulate the mean and the variance of one layer's channels.

    `between` says whether the spread of the means counts.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, count: int, mean: Tensor, variance: Tensor, between: bool) -> None:
        mean, variance, whole = mean.double(), variance.double(), self.count + count
        apart = mean - self.mean
        self.squares = self.squares + count * variance
        if between:
            self.squares = self.squares + apart**2 * (self.count * count / whole)
        self.mean = self.mean + apart * (count / whole)
        self.count = whole

    @property
    def variance(self) -> Tensor:
        return self.squares / self.count


def statistics_of(objective: Objective) -> dict[str, tuple[str, str]]:
    """Return the layers whose running statistics are read from checkpoints: name → names of mean
    and variance.
    """
    stored = {
        spec.name for spec in objective.table if spec.kind == "buffer" and is_statistic(spec.name)
    }
    layers = {name.removesuffix(_MEAN) for name in stored if name.endswith(_MEAN)}
    return {
        layer.removesuffix("."): (layer + _MEAN, layer + _VARIANCE)
        for layer in sorted(layers)
        if layer + _VARIANCE in stored
    }


class Recalibration:
    """Run the pass over the data that gives an objective's normalisation layers their statistics at
    a point.

    The first loss of the task that is over a split determines the data and how the model is called,
    whichever losses are evaluated: a validation loss uses statistics of the training split, as a
    deployed network does.

    Attributes:
        loss: name of that loss.
        batch_size: examples per batch of the partition, in the order of the data; `settle` fixes
            it.
        kept: layers that keep their stored statistics, because training did not move them.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._opened: dict[str, Split] = {}
        self.recall(None)

    @property
    def split(self) -> Split:
        """Return the data that the statistics are computed from.

        Raises:
            InputError: if the task has no such loss over a split.
        """
        loss = self._objective.task.losses.get(self.loss)
        if loss is None or loss.split is None:
            what = (
                f"the task has no loss {self.loss!r}, whose data they come from"
                if self.loss
                else "no loss is over data"
            )
            raise InputError(
                f"--norm-stats recalibrated: statistics cannot be recomputed, because {what}."
            )
        self._objective.loss_values.add_function(self.loss)
        if loss.split in self._objective.splits:
            return self._objective.splits[loss.split]
        if loss.split not in self._opened:
            self._opened[loss.split] = self._objective.data.open_split(loss.split)
        return self._opened[loss.split]

    def recall(self, recorded: RecalibrationRecord | None) -> None:
        """Restore the settings that a run recorded; None for a new run."""
        over_data = (
            name for name, loss in self._objective.task.losses.items() if loss.split is not None
        )
        self.loss: str = recorded["loss"] if recorded else next(over_data, "")
        self.batch_size: int = recorded["batch_size"] if recorded else 0
        self.kept: list[str] = list(recorded["kept"]) if recorded else []

    def settle(self, batch_size: int | None, moved: Collection[str]) -> None:
        """Fix the partition and the layers at the point in the objective.

        Args:
            batch_size: examples per batch; None to choose it from shapes.
            moved: layers whose stored statistics moved in training.
        """
        self.kept = [layer for layer in statistics_of(self._objective) if layer not in moved]
        if batch_size is None:
            saved = self._objective.saved_bytes(self.loss)
            batch_size = automatic_batch_size(
                saved, self._objective.parameter_bytes, self._objective.device
            )
        self.batch_size = min(batch_size, self.split.examples)

    @property
    def recorded(self) -> RecalibrationRecord:
        """Return the settings that a run records, for `recall`."""
        split = self.split
        return {
            "loss": self.loss,
            "split": split.name,
            "examples": split.examples,
            "batch_size": self.batch_size,
            "kept": self.kept,
        }

    def at(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the point with the statistics of the data at its weights.

        A layer that the pass does not reach keeps its stored statistics: see `unreached`.

        Args:
            point: every tensor of the table, on the device; the objective holds it afterwards.

        Raises:
            InputError: if a batch is too small to have statistics.
            ResourceError: if a batch does not fit in memory.
        """
        result = {**point}
        for layer, pool in self._pools(point).items():
            if pool.count:
                mean, variance = statistics_of(self._objective)[layer]
                # keep float64, because they move by a small part of their size
                result[mean], result[variance] = pool.mean, pool.variance
        return result

    def unreached(self, point: Mapping[str, Tensor]) -> list[str]:
        """Return the layers that should be recalibrated but are not called in the pass."""
        return [layer for layer, pool in self._pools(point).items() if not pool.count]

    def _pools(self, point: Mapping[str, Tensor]) -> dict[str, _Pool]:
        objective, split = self._objective, self.split
        objective.place(point)
        layers = {
            layer: names
            for layer, names in statistics_of(objective).items()
            if layer not in self.kept
        }
        pools = {layer: _Pool() for layer in layers}
        buffers = dict(objective.model.named_buffers())
        by_mean = {id(buffers[mean]): pools[layer] for layer, (mean, _) in layers.items()}
        if not layers:
            return {}
        try:
            with (
                objective.mode(pooling(by_mean)),
                contextlib.closing(split.batches(self.batch_size)) as batches,
            ):
                for _, batch in batches:
                    objective.values(self.loss, fresh(batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(
                f"out of memory while statistics are recalibrated in batches of {self.batch_size} "
                f"({str(error)[:200]}). The batch is part of the loss and is not halved: use a "
                "device with more memory, or another run with a smaller --batch-size."
            ) from error
        return pools


@contextlib.contextmanager
def pooling(pools: Mapping[int, _Pool]) -> Iterator[None]:
    """Let layers use the statistics of each batch, and pool these in `pools` by the identity of the
    layer's running mean; other layers use their own.

    Raises:
        InputError: if a batch is too small to have statistics.
    """

    def pooled(call: NormalisationCall) -> Tensor:
        pool = None if call.from_input or call.mean is None else pools.get(id(call.mean))
        if pool is None or call.mean is None or call.variance is None:
            return running(call)
        mean, variance = torch.zeros_like(call.mean), torch.zeros_like(call.variance)
        count = call.input.numel() // call.input.shape[1]
        if call.over_batch and count == 1:
            raise InputError(
                "--norm-stats recalibrated: a batch has one value per channel of a batch-norm "
                "layer, which has no statistics (a batch of one example, perhaps the last). Give a "
                "--batch-size that leaves no batch of one."
            )
        output = call.with_input_statistics(mean, variance)
        if call.over_batch:
            pool.add(count, mean, variance * ((count - 1) / count), True)
        else:
            pool.add(call.input.shape[0], mean, variance, False)
        return output

    with replacing(pooled):
        yield


def in_both_modes(
    objective: Objective, name: str, batch: object, layers: Collection[str]
) -> tuple[float, float]:
    """Return a loss on one batch at the point in the objective: with running statistics, and with
    those of the batch.

    Args:
        objective: evaluates the loss.
        name: name of the loss.
        batch: a batch of its split.
        layers: layers that use the batch's statistics; the others, which did not move in training,
            keep their stored ones.
    """
    buffers, known = dict(objective.model.named_buffers()), statistics_of(objective)
    own = [buffers[name] for layer in layers for name in known[layer]]
    means = []
    for layers_mode in (normalising("running"), normalising("batch", own)):
        with objective.mode(layers_mode):
            values, weights = objective.values(name, fresh(batch))
        means.append(
            float(
                values.detach().double().sum()
                / (values.numel() if weights is None else weights.sum())
            )
        )
    return means[0], means[1]
