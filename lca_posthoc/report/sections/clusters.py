"""Show clusters of examples that were learned alike."""

from __future__ import annotations

import numpy as np
import xarray as xr

from ...findings.clusters import central_name, judged, one_cluster
from ..content import Block, Cell, Column, Section, Table, View, clean, count
from ..downsample import lines, over_steps, thinned
from ..figures import INK, add_level, add_lines, add_many, steps_figure
from ..panels import Panel, Room
from .layers import largest

_DRAWN = 6  # layers
_CLUSTERS = 24
_TEXT = 200  # characters of an example's text


def section() -> Section:
    """Return one figure: the effects of layers on the examples of a cluster."""
    chart = steps_figure("change since the start (units of loss)", 320)
    add_level(chart, 0)
    tip = [("layer", "@name"), ("step", "$snap_x{0}"), ("Σ so far", "$snap_y{%.5g}")]
    add_many(chart, "cluster layers", tip)
    add_lines(
        chart,
        "cluster loss",
        INK,
        width=2.5,
        tip=[("its loss", "changed"), ("step", "@x{0}"), ("since the start", "@y{%.5g}")],
    )
    return Section(
        name="clusters",
        title="Examples learned alike",
        reading="Examples on which the layers had similar effects at the same time, found by k-means. "
        "The text below the figure tells how much of the effects on single examples the clusters "
        "leave out, how much they would if each example had been learned at its own times, and "
        "whether another start finds the same clusters. Read the clusters with it.",
        figures={"clusters": chart},
        headings={
            "clusters": "Mean of one cluster: its loss (thick) and the cumulative sum of each layer"
        },
    )


def block(panel: Panel, room: Room) -> Block:
    """Return the means of every cluster, and the table of clusters.

    Args:
        panel: of the loss.
        room: the bytes for its data.
    """
    finding, left_out = panel.find("clusters")
    if finding is None:
        return Block(notes=[left_out])
    notes = [left_out] if left_out else []
    names = [clean(name, 60) for name in finding["layer"].values]
    size = np.nan_to_num(np.abs(finding["trajectory"].values)).max(axis=(0, 1))
    drawn = largest(size, _DRAWN)
    if len(drawn) < len(names):
        notes.append(
            f"Lines show the {len(drawn)} of {len(names):,} layers with the largest effects."
        )
    filled = int((finding["size"].values > 0).sum())
    shown = min(filled, _CLUSTERS)
    if shown < filled:
        notes.append(f"{count(filled - shown, 'smaller cluster')} are not drawn.")
    most = room.points(shown * (len(drawn) + 1), 0.2)
    views: dict[str, View] = {
        f"|{cluster}": _view(one_cluster(finding, cluster), names, drawn, most)
        for cluster in range(shown)
    }
    per = str(finding.attrs["per"])
    return Block(
        captions={"clusters": judged(finding)},
        views={"clusters": views},
        choice="Cluster",
        choices=[
            f"{cluster + 1}: {count(finding['size'].values[cluster], per)}"
            for cluster in range(shown)
        ],
        tables=[_table(finding, shown, per)],
        notes=notes,
    )


def _view(cluster: xr.Dataset, names: list[str], drawn: list[int], most: int) -> View:
    """Return the lines of a cluster."""
    series = np.concatenate(
        [cluster["allocated"].values[:, drawn].T, cluster["change"].values[None]]
    )
    before = np.concatenate([np.zeros((len(series), 1)), series[:, :-1]], axis=1)
    x, ys = over_steps(cluster["step"].values, cluster["step_end"].values, before, series)
    xs, packed = lines(x, ys[:-1], most)
    return {
        "cluster layers": {
            "xs": xs,
            "ys": packed,
            "name": [names[layer] for layer in drawn],
            "colour": "@palette",
        },
        "cluster loss": thinned(x, ys[-1], most),
    }


def _table(finding: xr.Dataset, shown: int, per: str) -> Table:
    """Return the size of each cluster, its figures, and its central example."""
    grouped, worded = "central_group" in finding.coords, "central_text" in finding.coords
    rows: list[list[Cell]] = []
    for cluster in range(shown):
        own = finding.isel(cluster_number=cluster)
        total = own["trajectory"].isel(stretch=-1).values
        rows.append(
            [
                str(cluster + 1),
                int(own["size"]),
                float(own["loss"].values[-1] - own["loss_start"]),
                clean(finding["layer"].values[int(np.abs(total).argmax())], 60),
                central_name(finding, cluster),
                *([clean(own["central_group"].item(), 60)] if grouped else []),
                *([clean(own["central_text"].item(), _TEXT)] if worded else []),
            ]
        )
    columns = [
        Column("cluster", "name"),
        Column(f"{per}s", "count"),
        Column("change of the loss", "bar"),
        Column("mostly by", "text"),
        Column(f"central {per}", "text"),
        *([Column("group", "text")] if grouped else []),
        *([Column("it is", "text")] if worded else []),
    ]
    return Table(title="Clusters, the largest first", columns=columns, rows=rows, open=True)
