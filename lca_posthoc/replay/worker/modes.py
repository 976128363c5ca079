"""Check before the first span which normalisation statistics moved in training, and whether the
loss depends on them.

Running statistics lag behind the weights. Where the loss with them changes differently from the
loss with batch statistics, as in training, so do the allocations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...checkpoints.trajectory import read_checkpoint
from ...errors import InputError, SpanError
from ..requests import ProbeRequest
from .state import checkpoint_at, stored_point_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.objective import Objective

SHARE = 0.1  # share of the loss change above which the two count as different
SAMPLE = 256  # examples on which both are evaluated, as one batch
# the least examples for comparable batch statistics, where the run's own batches are smaller
_LEAST = 32
_SAVED_BYTES = 2**28  # bytes that such a larger batch may save for autograd


def moved_layers(request: ProbeRequest, objective: Objective) -> list[str]:
    """Return the layers whose stored running statistics differ between any probed checkpoints.

    Args:
        request: names the checkpoints.
        objective: holds the model.
    """
    from ...numerics.objective import statistics_of

    layers = statistics_of(objective)
    if not layers:
        return []
    points = request.sample.points
    sources = {name: points.names[name] for names in layers.values() for name in names}
    moved = set[str]()
    first: dict[str, Tensor] = {}
    for index in request.modes:
        try:
            stored = read_checkpoint(checkpoint_at(points, index), sources)
        except SpanError:  # its spans will fail and report it
            continue
        first = first or stored
        moved |= {
            layer
            for layer, names in layers.items()
            if any(bool((stored[one] != first[one]).any()) for one in names)
        }
    return [layer for layer in layers if layer in moved]


def notes_on_modes(
    request: ProbeRequest, objective: Objective, names: list[str], moved: list[str]
) -> list[str]:
    """Compare losses with running statistics and with batch statistics at a few checkpoints.

    Args:
        request: of the probe.
        objective: in `running` mode.
        names: of the losses.
        moved: the layers whose statistics moved; if there are none, both modes match training.

    Returns:
        One note on all losses whose changes differ by more than `SHARE` of the larger one, with
            both figures and the way out; or none.
    """
    from ...numerics.objective import in_both_modes, is_out_of_memory

    batches = {
        name: batch for name in names if moved and (batch := _sample(objective, name)) is not None
    }
    values: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in batches}
    for index in request.modes if batches else ():
        try:
            objective.place(stored_point_at(request.sample.points, index, objective))
        except SpanError:
            continue
        for name, (_, batch) in batches.items():
            try:
                values[name][index] = in_both_modes(objective, name, batch, moved)
            except (
                Exception
                # the batch has no statistics, or does not fit: there is nothing to compare with
            ) as error:
                if not isinstance(error, InputError) and not is_out_of_memory(error):
                    raise
                continue
    differing = [
        (sentence, batches[name][0])
        for name, pairs in values.items()
        if (sentence := _compared(request, name, batches[name][0], pairs)) is not None
    ]
    if not differing:
        return []
    sizes = sorted({count for _, count in differing})
    return [
        f"{'; '.join(sentence for sentence, _ in differing)}. Allocations here are of the "
        "former: layers may help in the one and hurt in the other. For the other: --norm-stats "
        f"batch --batch-size {sizes[0]} --out OTHER.lca; for running statistics without the lag: "
        "--norm-stats recalibrated --out OTHER.lca"
    ]


def _sample(objective: Objective, name: str) -> tuple[int, Any] | None:
    """Return a batch and its number of examples, drawn from all over the split where examples have
    positions.
    """
    loss = objective.losses[name]
    if loss.split is None:
        return None
    split = objective.splits[loss.split]
    own = objective.batch_sizes[loss.split]
    count = min(
        SAMPLE,
        split.examples,
        max(own, min(_LEAST, int(_SAVED_BYTES / objective.saved_bytes(name)))),
    )
    positions = split.spread(count)
    try:
        return count, split.sample(0, count) if positions is None else split.at(positions)
    except InputError:  # examples of several shapes stack only in the order of the data
        return count, split.sample(0, count)


def _compared(
    request: ProbeRequest, name: str, count: int, pairs: dict[int, tuple[float, float]]
) -> str | None:
    """Describe how a loss changes in both modes, where it differs."""
    if len(pairs) < 2:
        return None
    indices = list(pairs)
    running, batch = ([pairs[index][mode] for index in indices] for mode in (0, 1))
    finite = [
        row
        for row in range(len(indices))
        if math.isfinite(running[row]) and math.isfinite(batch[row])
    ]
    strange = [
        row
        for row in range(len(indices))
        if math.isfinite(running[row]) != math.isfinite(batch[row])
    ]
    if not finite or (finite[0] != 0 and not strange):
        return None
    apart = {
        row: abs((running[row] - running[finite[0]]) - (batch[row] - batch[finite[0]]))
        for row in finite
    }
    change = max(
        max(side[row] for row in finite) - min(side[row] for row in finite)
        for side in (running, batch)
    )
    worst = strange[0] if strange else max(finite, key=lambda row: apart[row])
    if not strange and not apart[worst] > max(SHARE * change, 1e-6 * abs(running[worst])):
        return None
    step = checkpoint_at(request.sample.points, indices[worst]).step
    share = "" if strange else f", {apart[worst] / change:.0%} of the loss change apart"
    return (
        f"loss {name!r} goes {running[0]:.4g} → {running[-1]:.4g} with the running statistics of "
        f"the checkpoints, and {batch[0]:.4g} → {batch[-1]:.4g} with those of the batch, as in "
        f"training (on {count} example{'' if count == 1 else 's'}; furthest apart at step {step}: "
        f"{running[worst]:.4g} and {batch[worst]:.4g}{share})"
    )
