"""Cluster the examples by the contributions of layers over training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from ..base.declarations import BY, Finding, Option
from ..base.text import count
from ..errors import InputError
from ..results import LossResults
from .common import Numbers, Variable, about, described, stretches, unfinished
from .per_example import ExampleReader, course, name_of_example, open_examples

FINDING = Finding(
    question="Which examples were learned alike, by the same layers at the same time",
    needs='a loss with `per="example"` or `per="element"`',
    place=84,
    examples=True,
    options=(
        BY,
        Option(
            name="clusters",
            flag="--clusters",
            kind="count",
            metavar="K",
            help="How many clusters; the figure shows what share of the variance other numbers "
            "leave out.  [default: 4]",
        ),
    ),
)
_SAME = 1e-9  # differences of shares by rounding are smaller
_ROUNDS = 50  # of k-means
_CARRIED, _AXES = 0.999, 50  # the share of the variance k-means sees, and the most directions
_TRIED = 8  # numbers of clusters whose share left out is reported


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The examples to cluster.

    `moves` (example, stretch, layer) holds each layer's contribution on each stretch, float64;
    `loss` (example, stretch) the loss at its end, `start` (example,) that at the start of training.
    `weighted` is the number of examples of nonzero weight, of which these were drawn.
    """

    positions: Numbers
    moves: Numbers
    loss: Numbers
    start: Numbers
    weighted: int

    @property
    def trajectories(self) -> Numbers:
        """Return the cumulative sums, (example, stretch × layer)."""
        return _trajectories(self.moves)


def clusters(
    results: LossResults,
    *,
    by: str | int = "module",
    clusters: int = 4,
    most: int = 1000,
    frames: int = 16,
    draws: int = 19,
    seeds: int = 5,
    texts: Mapping[int, str] | None = None,
) -> xr.Dataset:
    """Return clusters of examples whose contributions by layer went together over training.

    An example is a point: each layer's cumulative allocation at the end of each of `frames`
    stretches of training, in units of loss. K-means clusters the points
    (`scipy.cluster.vq.kmeans2`, started by k-means++, Arthur and Vassilvitskii 2007). Its clusters
    are means, which can be drawn as contributions of layers, and it minimises the squared distances
    to these means, which are the share of the variance that the clusters leave out. It uses the
    principal components that carry 99.9 % of the variance, 50 at most; the share is of the full
    variance. Of `seeds` runs, the one that leaves out the least is taken.

    *Stability* is the adjusted Rand index (Hubert and Arabie 1985) between the clusters of
    different seeds: 1 where they are equal, 0 on average for random clusters.

    *Null hypothesis*: each example was learned at times of its own. The contribution of a layer on
    a stretch is its mean over examples plus each example's deviation, in units of the spread of
    that stretch and layer. Each draw shuffles an example's deviations in time, in the same order
    for all layers, and clusters again. Stretches keep their mean and spread, and examples keep how
    much they deviate, but not when. `p` is the share of draws, with the data itself, that leave out
    as little. If it is large, clusters separate examples by size of contributions, not by time.

    Args:
        results: one loss of a run with `per="example"` or `per="element"`, at any level of
            `--keep`.
        by: as of `layers`.
        clusters: how many.
        most: the most examples; of more, a random one from each of as many stretches of equal
            length, by a fixed seed. Examples of weight 0 are excluded.
        frames: the most stretches.
        draws: of the null hypothesis.
        seeds: the number of k-means runs, with seeds 0, 1, ….
        texts: as of `examples`.

    Returns:
        `cluster` (example, or element), a `cluster_number`, 0 the largest. By `cluster_number`:
        `size`; `trajectory` (…, stretch, layer), the mean cumulative sum, and `loss` (…, stretch),
        in units of loss, with `stretch_start` and `stretch_end` in training steps; `loss_start`; and
        the coordinates `central_example` (`central_index`, `central_group`, `central_text`) of the
        example nearest to its mean. `left_out_share` (k), the share of the variance that k clusters
        leave out, `null_share` (draw) of the draws for `clusters`, and `p`; `stability` (pair of
        seeds) and `stability_mean`.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if the loss has no results per example or element, for any other `by`, for a
            number below one, fewer than two seeds, or more clusters than examples.
    """
    reader = open_examples(results, by, texts)
    data = _read(reader, most, frames)
    _check(len(data.positions), clusters, draws, seeds)
    space = _space(data.trajectories)
    labels, shares, several = _settled(space, clusters, seeds)
    null = _null(data.moves, clusters, seeds, draws)
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    labels = np.argsort(order, kind="stable")[labels]
    left_out = unfinished(results)
    if data.weighted < reader.count:
        left_out.append(f"Excluded: {count(reader.count - data.weighted, reader.per)} of weight 0.")
    if len(data.positions) < data.weighted:
        left_out.append(
            f"Clusters use {len(data.positions):,} of {count(data.weighted, reader.per)}, drawn at "
            "random all over the data."
        )
    if space.distinct == 1:
        left_out.append("All examples were learned alike, so there are no clusters.")
    pairs = [adjusted_rand(one, two) for one, two in _pairs(several)]
    return xr.Dataset(
        {
            **_of_clusters(data, labels, clusters),
            "cluster": described(((reader.per,), labels), "", "cluster, the largest first"),
            "left_out_share": described(
                (("k",), shares), "share", "share of the variance that k clusters leave out"
            ),
            "null_share": described(
                (("draw",), null), "share", "share left out in a draw of the null"
            ),
            "p": described(
                ((), (1 + int((null <= shares[clusters - 1] + _SAME).sum())) / (1 + draws)),
                "probability",
                "share of draws that leave out as little",
            ),
            "stability": described((("pair",), np.array(pairs)), "index", "adjusted Rand index"),
            "stability_mean": described(((), float(np.mean(pairs))), "index", "mean over pairs"),
        },
        coords={
            "layer": np.array(list(reader.layers), dtype=object),
            "k": np.arange(1, len(shares) + 1),
            **reader.coordinates(data.positions, reader.per),
            **_central(reader, data, labels, clusters),
            **_stretches(reader, frames),
        },
        attrs={
            **about(results, "clusters", left_out),
            "per": reader.per,
            "clusters": clusters,
        },
    )


def _check(examples: int, clusters: int, draws: int, seeds: int) -> None:
    """Reject impossible numbers.

    Raises:
        InputError: naming them.
    """
    if min(clusters, draws) < 1 or seeds < 2:
        raise InputError(
            "clusters needs at least one cluster, one draw and two seeds, got "
            f"{clusters}, {draws} and {seeds}."
        )
    if clusters > examples:
        raise InputError(
            f"there {'is' if examples == 1 else 'are'} {count(examples, 'example')} for {clusters} "
            "clusters. Ask for fewer clusters."
        )


def _read(reader: ExampleReader, most: int, frames: int) -> _Data:
    """Read the contributions of layers to some examples, summed over stretches.

    Raises:
        InputError: if no example has a weight.
    """
    weighted = np.flatnonzero(reader.weights(slice(None)) > 0)
    if not len(weighted):
        raise InputError(f"no {reader.per} has a weight, so there is nothing to cluster.")
    shown = reader.sample(most, weighted)
    borders = stretches(reader.segments, frames)
    ends = borders[1:] - 1
    parts = list[tuple[Numbers, Numbers, Numbers, Numbers]]()
    for block in reader.blocks():
        own = shown[(shown >= block.start) & (shown < block.stop)]
        if not len(own):
            continue
        moves = np.zeros((len(ends), len(own), len(reader.layers)))
        loss = np.zeros((len(ends), len(own)))
        for rows in reader.rows():
            segments = np.arange(rows.start, rows.stop)
            np.add.at(moves, np.searchsorted(ends, segments), reader.allocated(rows, own))
            last = (ends >= rows.start) & (ends < rows.stop)
            loss[last] = reader.read("loss_end", rows, own)[ends[last] - rows.start]
        start = reader.read("loss_start", slice(0, 1), own)[0]
        parts.append((own, moves.transpose(1, 0, 2), loss.T, start))
    positions, moves, loss, start = (np.concatenate(each) for each in zip(*parts, strict=True))
    return _Data(positions=positions, moves=moves, loss=loss, start=start, weighted=len(weighted))


def _trajectories(moves: Numbers) -> Numbers:
    """Return the cumulative sums of (example, stretch, layer), (example, stretch × layer)."""
    return np.cumsum(moves, axis=1).reshape(len(moves), -1)


@dataclass(frozen=True, kw_only=True)
class _Space:
    """Points to cluster, (point, number), minus their mean.

    `reduced` holds them along the directions that carry most of their variance, in units of its
    root: k-means uses these, while the share left out is measured on the points themselves.
    `variance` is Σ of the squared distances to the mean, `distinct` the number of different points.
    """

    points: Numbers
    reduced: Numbers
    variance: float
    distinct: int


def _space(points: Numbers) -> _Space:
    """Return points with their principal components: as many as carry `_CARRIED`, at most `_AXES`."""
    points = points - points.mean(axis=0)
    variance = float((points**2).sum())
    wide = points.shape[1] > len(points)
    values, vectors = np.linalg.eigh(points @ points.T if wide else points.T @ points)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    axes = min(_AXES, 1 + int(np.searchsorted(np.cumsum(values), _CARRIED * values.sum())))
    along = vectors[:, :axes] * np.sqrt(values[:axes]) if wide else points @ vectors[:, :axes]
    return _Space(
        points=points,
        reduced=along / (np.sqrt(variance) or 1.0),
        variance=variance,
        distinct=len({row.tobytes() for row in along}),
    )


def _settled(space: _Space, clusters: int, seeds: int) -> tuple[Numbers, Numbers, list[Numbers]]:
    """Return the best labels, the share left out for each number of clusters tried, and the labels
    of every seed.
    """
    numbers = range(1, min(len(space.points), max(_TRIED, clusters)) + 1)
    labels, several, shares = np.zeros(0, dtype=int), list[Numbers](), list[float]()
    for number in numbers:
        tries = [_kmeans(space, number, seed) for seed in range(seeds)]
        best, share = min(tries, key=lambda labels_and_share: labels_and_share[1])
        shares.append(share)
        if number == clusters:
            labels, several = best, [labels_of_seed for labels_of_seed, _ in tries]
    return labels, np.array(shares), several


def _kmeans(space: _Space, clusters: int, seed: int) -> tuple[Numbers, float]:
    """Return k-means clusters from a seed, and the share of the variance they leave out."""
    from scipy.cluster.vq import kmeans2

    clusters = min(clusters, space.distinct)  # k-means++ needs as many
    if clusters == 1:
        labels = np.zeros(len(space.points), dtype=int)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster just makes one fewer
            _, labels = kmeans2(
                space.reduced,
                clusters,
                iter=_ROUNDS,
                minit="++",
                seed=np.random.default_rng(seed),
            )
    within = sum(_scatter(space.points[labels == label]) for label in np.unique(labels))
    return labels.astype(int), within / space.variance if space.variance else 0.0


def _scatter(points: Numbers) -> float:
    """Return Σ of the squared distances of points to their mean."""
    return float(((points - points.mean(axis=0)) ** 2).sum())


def _null(moves: Numbers, clusters: int, seeds: int, draws: int) -> Numbers:
    """Return the share left out where each example's deviations are shuffled in time, (draw,)."""
    mean, spread = moves.mean(axis=0), moves.std(axis=0)
    deviations = (moves - mean) / np.where(spread > 0, spread, 1.0)
    generator, shares = np.random.default_rng(0), list[float]()
    rows = np.arange(len(moves))[:, None]
    for _ in range(draws):
        times = generator.permuted(np.tile(np.arange(moves.shape[1]), (len(moves), 1)), axis=1)
        space = _space(_trajectories(mean + spread * deviations[rows, times]))
        shares.append(min(_kmeans(space, clusters, seed)[1] for seed in range(seeds)))
    return np.array(shares)


def adjusted_rand(one: Numbers, other: Numbers) -> float:
    """Return the adjusted Rand index of two labellings (Hubert and Arabie 1985).

    With n_ij examples of cluster i of one and j of the other, and C(n) = n (n − 1) / 2: the pairs
    together in both, Σ C(n_ij), minus their expectation for shuffled labels, divided by the largest
    possible difference. Two labellings of one cluster each have index 1.

    >>> adjusted_rand(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    1.0
    >>> round(adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])), 3)
    -0.5

    Args:
        one: labels, (n,).
        other: labels, (n,).
    """
    table = np.zeros((int(one.max()) + 1, int(other.max()) + 1), dtype=int)
    np.add.at(table, (one, other), 1)
    together, of_one, of_other, every = (
        float((amounts * (amounts - 1) // 2).sum())
        for amounts in (table, table.sum(axis=1), table.sum(axis=0), np.array(len(one)))
    )
    expected = of_one * of_other / every if every else 0.0
    room = (of_one + of_other) / 2 - expected
    return 1.0 if room == 0 else (together - expected) / room


def _pairs(several: list[Numbers]) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield every pair of labellings."""
    for position, one in enumerate(several):
        yield from ((one, other) for other in several[position + 1 :])


def _of_clusters(data: _Data, labels: Numbers, clusters: int) -> dict[str, Variable]:
    """Return the means of each cluster; NaN for an empty one."""
    size = np.bincount(labels, minlength=clusters)
    member = np.arange(clusters)[:, None] == labels
    share = member / np.where(size > 0, size, np.nan)[:, None]
    sums = np.cumsum(data.moves, axis=1)
    return {
        "size": described((("cluster_number",), size), "examples", "examples of the cluster"),
        "trajectory": described(
            (("cluster_number", "stretch", "layer"), np.tensordot(share, sums, axes=1)),
            "loss",
            "Σ allocation so far, mean of the cluster",
        ),
        "loss": described(
            (("cluster_number", "stretch"), share @ data.loss), "loss", "loss, mean of the cluster"
        ),
        "loss_start": described(
            (("cluster_number",), share @ data.start), "loss", "loss at the start"
        ),
    }


def _central(
    reader: ExampleReader, data: _Data, labels: Numbers, clusters: int
) -> dict[str, object]:
    """Return the coordinates of the example nearest to each cluster's mean; for an empty cluster,
    of the first example.
    """
    points, nearest = data.trajectories, np.zeros(clusters, dtype=int)
    for cluster in np.unique(labels):
        own = np.flatnonzero(labels == cluster)
        distances = ((points[own] - points[own].mean(axis=0)) ** 2).sum(axis=1)
        nearest[cluster] = own[int(distances.argmin())]
    return {
        "cluster_number": np.arange(clusters),
        **reader.coordinates(data.positions[nearest], "cluster_number", "central_"),
    }


def _stretches(reader: ExampleReader, frames: int) -> dict[str, object]:
    """Return the training steps at which stretches start and end."""
    borders = stretches(reader.segments, frames)
    return {
        "stretch_start": ("stretch", reader.table["step"].values[borders[:-1]]),
        "stretch_end": ("stretch", reader.table["step_end"].values[borders[1:] - 1]),
    }


def one_cluster(finding: xr.Dataset, cluster: int) -> xr.Dataset:
    """Return the means of a cluster: `change` of the loss since the start, (step,), and `allocated`
    so far, (step, layer), with `step` and `step_end` of its stretches.

    Args:
        finding: with clusters.
        cluster: its number.
    """
    own = finding.isel(cluster_number=cluster)
    return course(finding, own["loss"] - own["loss_start"], own["trajectory"])


def central_name(finding: xr.Dataset, cluster: int) -> str:
    """Return the name of a cluster's central example, as `--example` takes it.

    Args:
        finding: with clusters.
        cluster: its number.
    """
    own = finding.isel(cluster_number=cluster)
    return name_of_example(own, "central_")


def judged(finding: xr.Dataset) -> str:
    """Describe what the clusters leave out, what chance would, and how stable they are."""
    number, null = int(finding.attrs["clusters"]), finding["null_share"].values
    share = float(finding["left_out_share"].sel(k=number))
    low, high = 100 * float(null.min()), 100 * float(null.max())
    return (
        f"{count(number, 'cluster')} of {count(finding['cluster'].size, str(finding.attrs['per']))} "
        f"{'leaves' if number == 1 else 'leave'} out {100 * share:.1f} % of the variance, and "
        f"{low:.1f} to {high:.1f} % if each example was learned at its own times (p = "
        f"{float(finding['p']):.2g} of {count(null.size, 'draw')}). Adjusted Rand index between "
        f"seeds: {float(finding['stability_mean']):.2f}."
    )
