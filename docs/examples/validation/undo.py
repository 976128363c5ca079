r"""Undo the motion of one layer, or of one unit, over a stretch of training: does the loss rise by
what its allocation says?

```sh
export LCA_DATA=DIR
python docs/examples/validation/undo.py PLACE --network mnist_fc --seeds 0:5
```

The stretches are the first, the second and the last third of training, and the first steps of each.
At the end of a stretch a part of the network is put back to where it was at its beginning; all else
stays. Every layer is undone in turn, and twelve units that are drawn anew for each stretch. The part
is also moved alone, at the beginning of the stretch: what it does at the end and what it does alone
differ by what it does together with the others, of which their mean gives it half.
"""

from __future__ import annotations

from pathlib import Path

from measures import Part, Recorded, drawn, layers, recorded_training, rise_if_undone, units
from networks import Network
from seeds import Comparison, Outcome, compared, main

SHORT = 5
UNITS = 12


def stretches(steps: int) -> list[tuple[str, int, int]]:
    """Return what each stretch is, and the steps it runs from and to."""
    starts = [steps * third // 3 for third in range(3)]
    long = [("a third", start, steps * (third + 1) // 3) for third, start in enumerate(starts)]
    return [(f"{SHORT} steps", start, min(start + SHORT, end)) for _, start, end in long] + long


def undone(training: Recorded, start: int, end: int, kind: str, seed: int) -> list[Comparison]:
    """Undo every layer and some units over one stretch."""
    before, after = training.points[start], training.points[end]
    loss_before, loss_after = training.loss.value(before), training.loss.value(after)
    predicted = rise_if_undone(training, start, end)

    def rise(part: Part) -> float:
        return training.loss.value(part.replaced(after, before)) - loss_after

    def mean_of_both(part: Part) -> float:
        fall_alone = loss_before - training.loss.value(part.replaced(before, after))
        return (rise(part) + fall_alone) / 2

    some_units = drawn(units(training.replay, after), UNITS, 1000 * seed + start)
    condition = f"steps {start} to {end}"
    return [
        compared(f"{what} over {kind}, {done}", condition, parts, act, predicted)
        for done, act in (("undone", rise), ("mean of undone and alone", mean_of_both))
        for what, parts in (("a layer", layers(after)), ("a unit", some_units))
    ]


def undo(place: Path, name: str, network: Network, seed: int) -> Outcome:
    """Undo every layer and some units over every stretch."""
    training = recorded_training(place, name, network, seed)
    comparisons = [
        comparison
        for kind, start, end in stretches(network.size.steps)
        for comparison in undone(training, start, end, kind, seed)
    ]
    first, last = training.points[0], training.points[-1]
    return Outcome(training.loss.value(first), training.loss.value(last), comparisons)


if __name__ == "__main__":
    main("undo", __doc__, undo)
