"""Describe the examples of a loss: which were learned, when and by which layer, which were
forgotten, and how strongly they pulled against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..base.declarations import BY, Finding, Option
from ..base.text import count
from ..errors import InputError
from ..results import LossResults
from .bands import straight_lines
from .common import Numbers, Variable, about, described, largest, stretches, unfinished
from .errors import over_groups
from .layers import layers
from .per_example import ExampleReader, Part, course, name_of_example, open_examples

FINDING = Finding(
    question="Which examples were learned, when and by which layer; which were forgotten again; how "
    "strongly they pull against each other",
    needs='a loss with `per="example"` or `per="element"`',
    place=82,
    examples=True,
    options=(
        BY,
        Option(
            name="named",
            flag="--example",
            metavar="NUMBER",
            repeatable=True,
            help="Examples whose stories to show; EXAMPLE:INDEX for a loss with results per element "
            "(repeatable).  [default: the most forgotten]",
        ),
    ),
)
FATES = ("never learned", "learned and kept", "forgotten and learned again", "forgotten")
_LEAST = 0.1  # of the mean loss at the start; a smaller fall does not count as learning


@dataclass(frozen=True, kw_only=True)
class _Course:
    """The loss of some examples over training, each (example,).

    `row` is the segment at whose end the loss was lowest, -1 for the start of training; `half` is
    the first segment at whose end it had fallen half of the way there.
    """

    start: Numbers
    end: Numbers
    lowest: Numbers
    row: Numbers
    half: Numbers
    events: Numbers
    fate: Numbers


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The contributions of layers to the change of some examples' losses, each (example, layer),
    and the residual of each example, (example,).
    """

    total: Numbers
    since_lowest: Numbers
    residual: Numbers


def examples(
    results: LossResults,
    *,
    by: str | int = "module",
    named: Sequence[str | int] = (),
    most: int = 10_000,
    extremes: int = 10,
    frames: int = 500,
    least: float | None = None,
    texts: Mapping[int, str] | None = None,
) -> xr.Dataset:
    """Return which examples were learned, when, by which layer, and which were forgotten again.

    An example's loss changes by the sum of its allocations to all layers and a residual. This
    finding reads its losses at the start of training and at the end of every segment.

    *Forgotten* is the final loss minus the lowest: the measure of Chaudhry et al. (2018), who use
    accuracies of a task, for the loss of an example. *Events* are counted in analogy to Toneva et
    al. (2019), who count how often an example changes from classified correctly to incorrectly. A
    loss has no such border, so each example has its own: an example is learned when its loss has
    fallen by `least` below its start. It is forgotten, which is an event, when its loss then rises
    above the middle between the start and the lowest value since. To be learned again, the loss
    must fall by `least` below its highest value since the event or below its start, whichever is
    lower; that value then replaces the start. A loss as low as before the event is learned too. A
    rise by less than half of `least` is therefore never an event, one rise counts once, and an
    example that ends above its start is not learned.
    The most forgotten examples are chosen among those that are forgotten at the end.

    *Interference* of a layer is 1 − |Σ_x W_x a_x| / Σ_x W_x |a_x|, where a_x is the layer's
    allocation for the loss of example x and W_x the example's weight: 0 if the layer helped all
    examples or hurt all, 1 if its effects on different examples cancel.

    Memory: a fixed number of stored values at a time (`per_example`), and the result. Sums, counts
    and extremes include all examples except those of weight 0.

    Args:
        results: one loss of a run with `per="example"` or `per="element"`, at any level of
            `--keep`.
        by: as of `layers`.
        named: examples whose stories are added, by their number, or "EXAMPLE:INDEX" for elements.
        most: the most examples in the tables; of more, a random one from each of as many stretches
            of equal length, by a fixed seed.
        extremes: how many of the most helped, most hurt and most forgotten have a story, of each.
        frames: the most stretches of consecutive segments in a story.
        least: in units of loss; by default a tenth of the mean loss at the start.
        texts: descriptions of examples by number, such as their label or their words.

    Returns:
        By `layer`: `interference` (step, layer) of each segment, and `absolute`, the mean of |a|, in
        units of loss; `interference_mean` of all segments, weighted by Σ W|a|, and
        `interference_total` of the sums over training; `total`, the mean over examples of these
        sums, with its `error` and `verdict` as of `layers`; `helped_most`, `hurt_most` and
        `forgot_most`, for how many examples the layer helped or hurt most, or, of forgotten ones,
        raised the loss most since it was lowest. The interference of a layer without any
        allocation is NaN.

        By `example`, or `element`: `loss_start`, `loss_end`, `loss_lowest`, `forgotten`, `residual`
        in units of loss; `step_half` and `step_lowest`, the training steps by which the loss had
        fallen half of its way, and was lowest; `events`; `fate`, a position in `fate_name`;
        `weight`; `allocated` and `since_lowest` (example, layer): sums over training, and from the
        lowest loss on, so that Σ_layer since_lowest + the residuals since is `forgotten`.

        By `story`: `story_kind` ("named", "most forgotten", "most hurt", "most helped"),
        `story_example` (`story_index`, `story_group`, `story_text`), `story_change`,
        `story_forgotten`, `story_fate`, and `story_layer`, the layer with the largest part in it: the
        one that raised the loss most since it was lowest, for a forgotten or most forgotten
        example; else the one that changed it most in the direction in which it changed. And over
        `stretch`, which ends at step `stretch_end`: `story_loss` and `story_allocated` (story, stretch,
        layer), the cumulative sum. `fates` (fate_name) counts examples.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if the loss has no results per example or element, for any other `by`, an
            unknown example, or a bound below one.
    """
    reader = open_examples(results, by, texts)
    if extremes < 1:
        raise InputError(f"at least one extreme of each kind is needed, got {extremes}.")
    picked = [_position(reader, name) for name in named]
    mean, silent = _mean_at_start(reader)
    threshold = _LEAST * abs(mean) if least is None else least
    tallies = _Tallies(reader, extremes)
    shown, rows = reader.sample(most), _Rows()
    for part in reader.blocks():
        course = _course(reader, part, threshold)
        share = tallies.add(reader, part, course)
        rows.add(part, shown, reader.weights(part), course, share)
    sums = over_groups(results, layers(results, by=by)).sel(layer=list(reader.layers))
    left_out = [*unfinished(results), *sums.attrs["not_known"]]
    if len(shown) < reader.count:
        left_out.append(
            f"The table has {len(shown):,} of {count(reader.count, reader.per)}, drawn at random; "
            "sums, counts and extremes include all."
        )
    if lines := straight_lines(reader.table):
        left_out.append(f"{lines}.")
    if silent:
        left_out.append(f"Excluded: {count(silent, reader.per)} of weight 0.")
    chosen = [*(("named", position) for position in picked), *tallies.extremes()]
    coords: dict[str, object] = {
        "step": reader.table["step"].values,
        "step_end": ("step", reader.table["step_end"].values),
        "layer": np.array(list(reader.layers), dtype=object),
        "fate_name": np.array(FATES, dtype=object),
        **reader.coordinates(shown, reader.per),
    }
    stories, of_stories = _stories(reader, chosen, frames, threshold)
    return xr.Dataset(
        {
            **tallies.variables(),
            **rows.variables(reader),
            **stories,
            **{
                name: (("layer",), sums[name].values, sums[name].attrs)
                for name in ("error", "verdict")
            },
        },
        coords={**coords, **of_stories},
        attrs={
            **about(results, "examples", left_out),
            "per": reader.per,
            "count": reader.count,
            "least": threshold,
        },
    )


def _position(reader: ExampleReader, name: str | int) -> int:
    """Return the position of an example named by its number, or of an element "EXAMPLE:INDEX".

    Raises:
        InputError: for any other name.
    """
    numbers = str(name).split(":")
    if len(numbers) > 2 or not all(number.strip().isdecimal() for number in numbers):
        raise InputError(
            f"name an example by its number, such as 12, or an element by two, such as 12:3; got "
            f"{name!r}."
        )
    return reader.position(*map(int, numbers))


def _mean_at_start(reader: ExampleReader) -> tuple[float, int]:
    """Return the weighted mean loss at the start, and the number of examples without weight."""
    summed, weight, silent = 0.0, 0.0, 0
    for part in reader.blocks():
        weights = reader.weights(part)
        summed += float(weights @ reader.read("loss_start", slice(0, 1), part)[0])
        weight, silent = weight + float(weights.sum()), silent + int((weights == 0).sum())
    return summed / (weight or 1.0), silent


def _course(reader: ExampleReader, part: Part, least: float) -> _Course:
    """Return the course of the losses of a block of examples."""
    start = reader.read("loss_start", slice(0, 1), part)[0]
    lowest, row, end = start.copy(), np.full(len(start), -1), start
    events, high, low = np.zeros(len(start), dtype=int), start.copy(), start.copy()
    learned, ever = (np.zeros(len(start), dtype=bool) for _ in range(2))
    for rows in reader.rows():
        for position, end in enumerate(reader.read("loss_end", rows, part), rows.start):
            lower = end < lowest
            lowest[lower], row[lower] = end[lower], position
            high = np.where(learned, high, np.minimum(start, np.maximum(high, end)))
            newly = ~learned & ((high - end >= least) & (high > end) | ever & (end <= low))
            low = np.where(newly, end, np.where(learned, np.minimum(low, end), low))
            lost = learned & (end > (high + low) / 2)
            learned, ever = (learned | newly) & ~lost, ever | newly
            high = np.where(lost, end, high)
            events += lost
    half = np.full(len(start), -1)
    middle = (start + lowest) / 2
    for rows in reader.rows():
        reached = reader.read("loss_end", rows, part) <= middle
        first = (half < 0) & reached.any(axis=0) & (lowest < start)
        half[first] = rows.start + reached.argmax(axis=0)[first]
    fate = np.where(~ever, 0, np.where(events == 0, 1, np.where(learned, 2, 3)))
    return _Course(
        start=start, end=end, lowest=lowest, row=row, half=half, events=events, fate=fate
    )


class _Tallies:
    """Sums, counts and extremes over all examples."""

    def __init__(self, reader: ExampleReader, extremes: int) -> None:
        shape = (reader.segments, len(reader.layers))
        self.signed, self.absolute = np.zeros(shape), np.zeros(shape)
        self.total, self.total_absolute = np.zeros(shape[1]), np.zeros(shape[1])
        self.weight, self.weights = 0.0, np.zeros((shape[0], 1))
        self.most = {name: np.zeros(shape[1], dtype=int) for name in ("helped", "hurt", "forgot")}
        self.fates = np.zeros(len(FATES), dtype=int)
        self._extremes = extremes
        self._best: dict[str, list[tuple[float, int]]] = {
            "most forgotten": [],
            "most hurt": [],
            "most helped": [],
        }

    def add(self, reader: ExampleReader, part: slice, course: _Course) -> _Share:
        """Add a block of examples, and return the layers' contributions to each of them."""
        shape = (len(course.start), len(reader.layers))
        total, since, residual = np.zeros(shape), np.zeros(shape), np.zeros(shape[0])
        for rows in reader.rows():
            values, weights = reader.allocated(rows, part), reader.read("weight", rows, part)
            self.signed[rows] += np.einsum("sx,sxl->sl", weights, values)
            self.absolute[rows] += np.einsum("sx,sxl->sl", weights, np.abs(values))
            self.weights[rows, 0] += weights.sum(axis=1)
            residual += reader.read("residual", rows, part).sum(axis=0)
            total += values.sum(axis=0)
            after = np.arange(rows.start, rows.stop)[:, None] > course.row
            since += np.einsum("sx,sxl->xl", after.astype(float), values)
        weights = reader.weights(part)
        self._count(total, since, course, weights)
        self._keep(part.start, course, weights)
        return _Share(total=total, since_lowest=since, residual=residual)

    def _count(self, total: Numbers, since: Numbers, course: _Course, weights: Numbers) -> None:
        """Count the layers with the largest contributions, and add the layers' sums over training."""
        self.total += weights @ total
        self.total_absolute += weights @ np.abs(total)
        self.weight += float(weights.sum())
        counts = weights > 0
        self.fates += np.bincount(course.fate[counts], minlength=len(FATES))
        forgotten = counts & (course.fate == FATES.index("forgotten"))
        for name, values, among in (
            ("helped", -total, counts),
            ("hurt", total, counts),
            ("forgot", since, forgotten),
        ):
            among = among & (values.max(axis=1) > 0)
            self.most[name] += np.bincount(values[among].argmax(axis=1), minlength=values.shape[1])

    def _keep(self, start: int, course: _Course, weights: Numbers) -> None:
        """Keep the extremes of earlier blocks and of this one."""
        change = course.end - course.start
        forgotten = course.fate == FATES.index("forgotten")
        for kind, values in (
            ("most forgotten", np.where(forgotten, course.end - course.lowest, 0.0)),
            ("most hurt", change),
            ("most helped", -change),
        ):
            values = np.where((weights > 0) & np.isfinite(values), values, 0.0)
            entries = [
                (float(values[position]), -(start + position))
                for position in largest(values, self._extremes)
                if values[position] > 0
            ]
            self._best[kind] = sorted([*self._best[kind], *entries])[-self._extremes :]

    def extremes(self) -> Iterator[tuple[str, int]]:
        """Yield the kind and the position of each extreme, the largest of a kind first."""
        for kind, entries in self._best.items():
            yield from ((kind, -negative) for _, negative in reversed(entries))

    def variables(self) -> dict[str, Variable]:
        """Return the results by layer, and the counts."""
        weight = self.weight or 1.0
        mean = _interference(np.abs(self.signed).sum(axis=0), self.absolute.sum(axis=0))
        words = {
            "helped": "examples this layer helped most",
            "hurt": "examples this layer hurt most",
            "forgot": "forgotten examples whose loss this layer raised most since it was lowest",
        }
        return {
            "interference": described(
                (("step", "layer"), _interference(np.abs(self.signed), self.absolute)),
                "share",
                "1 − |Σ_x W a| / Σ_x W|a| of the segment",
            ),
            "absolute": described(
                (("step", "layer"), self.absolute / np.where(self.weights, self.weights, 1)),
                "loss",
                "Σ_x W|a| / Σ_x W of the segment",
            ),
            "interference_mean": described(
                (("layer",), mean), "share", "interference, over all segments"
            ),
            "interference_total": described(
                (("layer",), _interference(np.abs(self.total), self.total_absolute)),
                "share",
                "interference of the sums over training",
            ),
            "total": described(
                (("layer",), self.total / weight), "loss", "Σ allocation over training, mean"
            ),
            **{
                f"{name}_most": described((("layer",), self.most[name]), "examples", text)
                for name, text in words.items()
            },
            "fates": described((("fate_name",), self.fates), "examples", "examples by their fate"),
        }


def _interference(of_sum: Numbers, of_sizes: Numbers) -> Numbers:
    """Return 1 − |Σ W a| / Σ W|a|, never below 0; NaN where all a are 0."""
    with np.errstate(invalid="ignore"):
        shares: Numbers = np.maximum(0.0, 1 - of_sum / np.where(of_sizes > 0, of_sizes, np.nan))
    return shares


class _Rows:
    """The rows of the table of examples."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Numbers]] = {}

    def add(
        self, part: slice, shown: Numbers, weights: Numbers, course: _Course, share: _Share
    ) -> None:
        """Add the rows of a block."""
        picked = shown[(shown >= part.start) & (shown < part.stop)] - part.start
        columns = {**vars(course), **vars(share), "weight": weights}
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values[picked])

    def variables(self, reader: ExampleReader) -> dict[str, Variable]:
        """Return the table of examples."""
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        one, both = (reader.per,), (reader.per, "layer")
        ends = np.append(reader.table["step_end"].values, reader.table["step"].values[0])
        lines: dict[str, tuple[Numbers, str, str]] = {
            "loss_start": (columns["start"], "loss", "loss at the start"),
            "loss_end": (columns["end"], "loss", "loss at the end"),
            "loss_lowest": (columns["lowest"], "loss", "lowest loss"),
            "forgotten": (columns["end"] - columns["lowest"], "loss", "loss above its lowest"),
            "residual": (columns["residual"], "loss", "Σ residual over training"),
            "step_half": (ends[columns["half"]], "step", "loss half of its way down"),
            "step_lowest": (ends[columns["row"]], "step", "loss lowest"),
            "events": (columns["events"], "events", "times it was forgotten"),
            "fate": (columns["fate"], "", "position in fate_name"),
            "weight": (columns["weight"], "weight", "weight in the loss"),
        }
        return {
            **{name: described((one, values), *words) for name, (values, *words) in lines.items()},
            "allocated": described((both, columns["total"]), "loss", "Σ allocation over training"),
            "since_lowest": described(
                (both, columns["since_lowest"]), "loss", "Σ allocation since the lowest loss"
            ),
        }


def _stories(
    reader: ExampleReader, chosen: list[tuple[str, int]], frames: int, least: float
) -> tuple[dict[str, Variable], dict[str, object]]:
    """Return the losses and layers of some examples over training, and their coordinates."""
    borders = stretches(reader.segments, frames)
    ends, names = borders[1:] - 1, np.array(list(reader.layers), dtype=object)
    positions = np.array([position for _, position in chosen], dtype=int)
    part, back = np.unique(positions, return_inverse=True)
    course = _course(reader, part, least)
    summed, since = np.zeros((len(ends), len(part), len(names))), np.zeros((len(part), len(names)))
    loss = np.zeros((len(part), len(ends)))
    for rows in reader.rows():
        segments, values = np.arange(rows.start, rows.stop), reader.allocated(rows, part)
        np.add.at(summed, np.searchsorted(ends, segments), values)
        since += np.einsum("sx,sxl->xl", (segments[:, None] > course.row).astype(float), values)
        last = (ends >= rows.start) & (ends < rows.stop)
        loss[:, last] = reader.read("loss_end", rows, part)[ends[last] - rows.start].T
    so_far = np.cumsum(summed, axis=0).transpose(1, 0, 2)
    change, forgotten = course.end - course.start, course.fate == FATES.index("forgotten")
    culprits = [
        _culprit(_told_by(kind, forgotten[place], change[place]), so_far[place, -1], since[place])
        for (kind, _), place in zip(chosen, back, strict=True)
    ]
    dims = ("story", "stretch")
    variables = {
        "story_loss": described((dims, loss[back]), "loss", "loss at the end of the stretch"),
        "story_start": described((("story",), course.start[back]), "loss", "loss at the start"),
        "story_allocated": described(
            ((*dims, "layer"), so_far[back]), "loss", "Σ allocation so far"
        ),
        "story_change": described((("story",), change[back]), "loss", "change of the loss"),
        "story_forgotten": described(
            (("story",), (course.end - course.lowest)[back]),
            "loss",
            "loss above its lowest at the end",
        ),
    }
    coords: dict[str, object] = {
        "stretch_start": ("stretch", reader.table["step"].values[borders[:-1]]),
        "stretch_end": ("stretch", reader.table["step_end"].values[ends]),
        "story_kind": ("story", np.array([kind for kind, _ in chosen], dtype=object)),
        "story_fate": ("story", np.array(FATES, dtype=object)[course.fate[back]]),
        "story_layer": ("story", names[np.array(culprits, dtype=int)]),
        **reader.coordinates(positions, "story", "story_"),
    }
    return variables, coords


def _told_by(kind: str, forgotten: bool, change: float) -> str:
    """Return the kind of extreme that a story is told as; a named example is one by its fate, or
    else by the change of its loss.

    >>> _told_by("named", True, 0.5), _told_by("named", False, 0.5), _told_by("named", False, -0.5)
    ('most forgotten', 'most hurt', 'most helped')

    Args:
        kind: kind of the story.
        forgotten: whether the example is forgotten at the end.
        change: of its loss over training.
    """
    if kind != "named":
        return kind
    return "most forgotten" if forgotten else "most hurt" if change > 0 else "most helped"


def _culprit(kind: str, total: Numbers, since: Numbers) -> int:
    """Return the layer with the largest part in what makes an extreme."""
    of_kind = {"most helped": -total, "most hurt": total, "most forgotten": since}
    return int(np.argmax(of_kind[kind]))


def heat_rows(finding: xr.Dataset, most: int) -> tuple[Numbers, int]:
    """Return the table of examples as a picture of the layers' contributions, most helped first.

    Args:
        finding: with the table.
        most: rows of the picture.

    Returns:
        (row, layer) in units of loss, at most `most` rows, and how many examples each row averages;
        the last may average fewer. Examples of weight 0 are excluded.
    """
    per = str(finding.attrs["per"])
    counting = np.flatnonzero(finding["weight"].values > 0)
    change = (finding["loss_end"] - finding["loss_start"]).values[counting]
    order = counting[np.argsort(change, kind="stable")]
    values = finding["allocated"].transpose(per, "layer").values[order]
    together = max(1, -(-len(order) // most))
    starts = np.arange(0, len(order), together)
    if not len(starts):
        return values, together
    counts = np.diff(np.append(starts, len(order)))[:, None]
    return np.add.reduceat(values, starts, axis=0) / counts, together


def interference_over(finding: xr.Dataset, frames: int) -> xr.Dataset:
    """Return the interference of each layer over stretches of segments.

    Args:
        finding: with the interference of each segment.
        frames: the most stretches.

    Returns:
        `interference` (step, layer), the mean of segments weighted by Σ W|a|, with `step` and
        `step_end` of the stretches.
    """
    borders = stretches(finding.sizes["step"], frames)
    sizes = finding["absolute"].transpose("step", "layer").values
    shares = np.nan_to_num(finding["interference"].transpose("step", "layer").values)
    starts = borders[:-1]
    of_sizes = np.add.reduceat(sizes, starts, axis=0)
    undone = np.add.reduceat(sizes * shares, starts, axis=0)
    with np.errstate(invalid="ignore"):
        values = undone / np.where(of_sizes > 0, of_sizes, np.nan)
    return xr.Dataset(
        {"interference": (("step", "layer"), values)},
        coords={
            "step": finding["step"].values[starts],
            "step_end": ("step", finding["step_end"].values[borders[1:] - 1]),
            "layer": finding["layer"].values,
        },
    )


def stories_to_show(finding: xr.Dataset) -> list[int]:
    """Return the positions of the stories to show: all named ones, else the first; empty where there
    is none.
    """
    kinds = finding["story_kind"].values
    return np.flatnonzero(kinds == "named").tolist() or list(range(len(kinds)))[:1]


def one_story(finding: xr.Dataset, position: int) -> xr.Dataset:
    """Return one story: `change` of the loss since the start, (step,), and `allocated` so far,
    (step, layer), with `step` and `step_end` of its stretches.

    Args:
        finding: with stories.
        position: of the story.
    """
    one = finding.isel(story=position)
    return course(finding, one["story_loss"] - one["story_start"], one["story_allocated"])


def story_name(finding: xr.Dataset, position: int) -> str:
    """Return the name of a story's example, as `--example` takes it.

    Args:
        finding: with stories.
        position: of the story.
    """
    return name_of_example(finding.isel(story=position), "story_")


def fates(finding: xr.Dataset) -> str:
    """Count the examples that were learned, kept and forgotten, in words; examples of weight 0 are
    in no count.
    """
    parts = [
        f"{int(number):,} {name}"
        for name, number in zip(finding["fate_name"].values, finding["fates"].values, strict=True)
    ]
    per, least = str(finding.attrs["per"]), float(finding.attrs["least"])
    weighted, every = int(finding["fates"].sum()), int(finding.attrs["count"])
    whole = count(every, per) if weighted == every else f"{weighted:,} of {count(every, per)}"
    return (
        f"{whole}: {', '.join(parts)}. Learned: the loss fell by {least:.2g} or more below its start; "
        "forgotten: it then rose by more than half of that fall."
    )
