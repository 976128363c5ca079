"""Plots show the numbers of a finding, nothing more; asserted on what is drawn, never on pixels."""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.animation
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lca_posthoc import findings, plots
from lca_posthoc.base import colours
from lca_posthoc.errors import InputError, ResourceError
from lca_posthoc.findings.names import shorten
from lca_posthoc.plots import style
from tests.helpers import sample_findings
from tests.helpers.cli import UNSAFE, steering
from tests.helpers.sample_findings import MADE

mpl.use("agg")
SINGLE = tuple(name for name in MADE if "ax" in inspect.signature(getattr(plots, name)).parameters)
SEVERAL = tuple(name for name in MADE if name not in SINGLE)
ONE_GROUP = ("blocks", "causes", "directions", "distribution", "helping", "oscillation", "units")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    settings = dict(mpl.rcParams)
    yield
    plt.close("all")
    assert dict(mpl.rcParams) == settings


def axes() -> Axes:
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def draw(name: str, given: xr.Dataset, **options: Any) -> Figure:
    """Without pyplot, and drawn: mathematics in labels fails only then."""
    if name in SINGLE:
        ax = getattr(plots, name)(given, ax=axes(), **options)
        figure = ax.figure
    else:
        figure = getattr(plots, name)(
            given, figure=Figure(figsize=(8, 8), layout="constrained"), **options
        )
    figure.canvas.draw()
    return figure


def words(figure: Figure) -> str:
    """Everything that is written in a figure, as it is seen."""
    drawn = figure.findobj(mpl.text.Text)
    return "\n".join(
        text.get_text().replace(r"\$", "$").replace("\u200b", "")
        for text in drawn
        if text.get_visible()
    )


def lines(ax: Axes) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]


def has(ax: Axes, values: Any) -> bool:
    return any(
        np.array_equal(each, np.asarray(values, dtype=float), equal_nan=True) for each in lines(ax)
    )


def lengths(ax: Axes) -> list[float]:
    """Of the bars, in order, those to the left negative."""
    return [patch.get_width() for patch in ax.patches]


# --- all of them ----------------------------------------------------------------------------------


def test_there_is_a_plot_of_every_finding() -> None:
    assert set(plots.__all__) - {"film"} == set(findings.__all__) - {"summary"} == set(MADE)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MADE)
def test_hostile_names_are_drawn_letter_by_letter_and_axes_say_their_units(name: str) -> None:
    given = MADE[name]()
    figure = draw(name, given)
    said = words(figure)
    assert "fc$2" in said or name in ("curve", "distribution")
    assert "units of loss" in said or name == "helping" or name == "peaks"
    for ax in figure.axes:
        if (
            ax.get_xticklabels()
            and ax.axison
            and any(text.get_text() for text in ax.get_xticklabels())
        ):
            assert ax.get_xlabel() or ax.get_ylabel() or ax.get_label() == "inset_axes", ax


@pytest.mark.parametrize("name", ["layers", "curve"])
def test_no_sign_of_a_name_steers_a_figure(name: str) -> None:
    hostile = f"fc{''.join(UNSAFE)}"
    finding = (
        sample_findings.layers(names=("fc1", hostile, "fc3")) if name == "layers" else MADE[name]()
    )
    finding.attrs |= {"loss": hostile, "left_out": hostile}
    shown = words(draw(name, finding))
    assert "fc???" in shown
    assert steering(shown) <= {"\n"}


@pytest.mark.parametrize("name", SINGLE)
def test_a_plot_of_one_panel_draws_where_it_is_told_and_leaves_pyplot_alone(name: str) -> None:
    ax = axes()
    before = plt.get_fignums()
    assert getattr(plots, name)(MADE[name](), ax=ax) is ax
    assert plt.get_fignums() == before
    assert ax.has_data()


@pytest.mark.parametrize("name", SEVERAL)
def test_a_plot_of_several_panels_draws_into_the_figure_it_is_given(name: str) -> None:
    figure = Figure(figsize=(8, 8))
    before = plt.get_fignums()
    assert getattr(plots, name)(MADE[name](), figure=figure) is figure
    assert plt.get_fignums() == before
    assert figure.axes


@pytest.mark.parametrize("name", MADE)
def test_without_a_place_it_makes_one_that_pyplot_shows(name: str) -> None:
    made = getattr(plots, name)(MADE[name]())
    figure = made if name in SEVERAL else made.figure
    assert plt.figure(plt.get_fignums()[-1]) is figure


@pytest.mark.parametrize("name", MADE)
def test_a_plot_leaves_its_finding_as_it_was(name: str) -> None:
    given = MADE[name]()
    copy = given.copy(deep=True)
    draw(name, given)
    xr.testing.assert_identical(given, copy)


@pytest.mark.parametrize("name", ONE_GROUP)
def test_of_many_groups_one_is_to_be_picked(name: str) -> None:
    given = MADE[name](groups=True)
    with pytest.raises(InputError, match=r"3 groups.*Pick one: found\.sel\(group=…\).*of 0, 1, 2"):
        draw(name, given)
    assert "group 1" in words(draw(name, given.sel(group=1)))


@pytest.mark.parametrize("name", MADE)
def test_what_is_left_out_is_said_at_the_foot(name: str) -> None:
    assert "80 of 220 segments" in words(
        draw(name, MADE[name]().assign_attrs(left_out="80 of 220 segments are there."))
    )


def test_what_several_panels_leave_out_is_said_once_each() -> None:
    figure = Figure(layout="constrained")
    for ax, left in zip(
        figure.subplots(1, 3), ("80 of 220.", "80 of 220.", "7 of 9."), strict=True
    ):
        plots.layers(sample_findings.layers().assign_attrs(left_out=left), ax=ax)
    assert "80 of 220.\n7 of 9." in words(figure)
    assert words(figure).count("80 of 220.") == 1


@pytest.mark.parametrize("name", MADE)
def test_another_finding_is_refused_by_name(name: str) -> None:
    other = "curve" if name != "curve" else "layers"
    with pytest.raises(
        InputError,
        match=rf"this is a result of findings\.{other}; plots\.{name} "
        rf"draws",
    ):
        getattr(plots, name)(MADE[other]())
    with pytest.raises(InputError, match="this is no result of a finding"):
        getattr(plots, name)(xr.Dataset())
    assert plt.get_fignums() == []


# --- one by one -----------------------------------------------------------------------------------


def test_curve_shows_the_loss_the_prediction_and_the_residual() -> None:
    given = sample_findings.curve()
    ax = draw("curve", given).axes[0]
    start = given["loss_start"].values[:1]
    assert has(ax, [*start, *given["loss"].values])
    assert has(ax, [*start, *given["predicted"].values])
    assert list(ax.lines[0].get_xdata()) == [0, *given["step_end"].values]
    (inset,) = ax.child_axes
    assert has(inset, given["residual_total"])
    bad = given["step_end"].values[~given["converged"].values]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"] == [list(bad)]
    assert "1 segment above the tolerance" in words(ax.figure)


def test_curve_is_a_dark_loss_over_a_light_band_and_many_groups_are_told_apart() -> None:
    given = sample_findings.curve()
    band, line = draw("curve", given).axes[0].lines[:2]
    assert (line.get_label(), band.get_label()) == ("loss", "start + Σ allocation")
    assert list(line.get_ydata()[1:]) == list(given["loss"].values)
    assert lab(to_hex(line.get_color()))[0] < 30 < 80 < lab(to_hex(band.get_color()))[0]
    assert band.get_linewidth() > line.get_linewidth()
    many = (
        sample_findings.curve(groups=True).isel(group=[0, 1, 2] * 4).assign_coords(group=range(12))
    )
    ax = draw("curve", many).axes[0]
    looks = {(text.get_text(), text.get_color()) for text in ax.texts}
    assert len({hue for _, hue in looks}) == 12
    pieces = [line for line in ax.lines if list(line.get_xdata()) == [1.015, 1.085]]
    assert [line.get_color() for line in pieces] == style.palette(12)
    assert {"loss", "start + Σ allocation"} <= set(words(ax.figure).splitlines())


def test_a_line_does_not_cross_a_gap() -> None:
    given = sample_findings.curve(gap=True)
    ax = draw("curve", given).axes[0]
    start, loss = given["loss_start"].values, given["loss"].values
    assert has(ax, [start[0], *loss[:6], np.nan, start[6], *loss[6:]])
    mesh = draw("units", sample_findings.units(gap=True)).axes[0].collections[0]
    assert mesh.get_array().shape == (7, 13)
    assert np.ma.getmaskarray(np.ma.masked_invalid(mesh.get_array()))[:, 6].all()


def test_curve_shows_each_group_with_its_name_and_says_when_there_are_too_many() -> None:
    given = sample_findings.curve(groups=True)
    ax = draw("curve", given).axes[0]
    for group in given["group"].values:
        assert has(
            ax,
            [
                given["loss_start"].sel(group=group).values[0],
                *given["loss"].sel(group=group).values,
            ],
        )
    assert {text.get_text() for text in ax.texts} >= {"0", "1", "2"}
    many = given.isel(group=[0] * 40).assign_coords(group=range(40))
    with pytest.raises(InputError, match="40 groups, and a plot shows at most 28: pick some"):
        draw("curve", many)


def test_distribution_shows_counts_per_decade_and_the_fit() -> None:
    given = sample_findings.distribution()
    sizes, densities, unequal = draw("distribution", given).axes
    steps = [patch.get_data() for patch in sizes.patches]
    for side in (given["upper"].values <= 0, given["lower"].values >= 0):
        part = given.isel(bin=side)
        widths = abs(np.log10(abs(part["upper"].values)) - np.log10(abs(part["lower"].values)))
        wanted = part["count"].values / widths
        wanted = wanted[::-1] if part["upper"].values[-1] <= 0 else wanted
        assert any(np.allclose(each.values, wanted) for each in steps)
    fit = next(line for line in densities.lines if line.get_label() == "double Weibull")
    x, y = (np.asarray(each, dtype=float) for each in fit.get_data())
    import scipy.stats

    moved = float(given["count"].sum() / (given["count"].sum() + given["zero"]))
    assert np.nanmax(y) > 0
    assert np.allclose(
        y[~np.isnan(y)], moved * scipy.stats.dweibull.pdf(x, 0.53, scale=1e-6)[~np.isnan(y)]
    )
    assert {"helping 51.0 %", "hurting 46.0 %"} <= {text.get_text() for text in sizes.texts}
    assert [line.get_xdata()[0] for line in unequal.lines if len(line.get_xdata()) == 1] == [
        0.4,
        0.8,
    ]
    without = draw("distribution", sample_findings.distribution(fitted=False)).axes[1]
    assert "double Weibull" not in {line.get_label() for line in without.lines}


def test_helping_shows_shares_over_time_per_tensor_and_per_parameter() -> None:
    given = sample_findings.helping()
    time, tensors, _bar, often, names = draw("helping", given).axes
    for share in ("helping", "hurting", "zero"):
        assert has(time, given[share])
    (mesh,) = (each for each in tensors.collections if isinstance(each, QuadMesh))
    assert np.allclose(mesh.get_array(), 0.5 - given["tensor_helping"].values.T)
    assert mesh.norm.vmin == -mesh.norm.vmax
    assert has(often, given["expected"].values.reshape(5, 2).sum(1))  # of 12 segments in five bins
    wanted = given["parameters"].values.reshape(5, 2).sum(1)
    assert any(np.array_equal(patch.get_data().values, wanted) for patch in often.patches)
    assert time.get_xlim() == tensors.get_xlim()
    assert often.get_xlim() == names.get_xlim()
    dots = np.concatenate([line.get_xdata() for line in names.lines if line.get_marker() == "o"])
    assert np.array_equal(dots, [*given["hero_share"].values, *given["villain_share"].values])
    assert len(draw("helping", sample_findings.helping(whole=False)).axes) == 3


@pytest.mark.parametrize(
    ("still", "idle", "said"),
    [
        ((1,), (), "did not move"),
        ((), (0, 2), "moved without effect"),
        ((0,), (1,), "did not move or moved without effect"),
        (tuple(range(len(sample_findings.TENSORS))), (), "did not move"),
    ],
)
def test_what_has_no_effect_is_not_drawn_as_what_hurts_most(
    still: tuple[int, ...], idle: tuple[int, ...], said: str
) -> None:
    given = sample_findings.helping()
    for name in ("tensor_helping", "tensor_hurting"):
        given[name].loc[{"tensor": given["tensor"][[*still, *idle]]}] = 0.0
    given["tensor_moved"].loc[{"tensor": given["tensor"][list(still)]}] = 0
    tensors = draw("helping", given).axes[1]
    shares, grey = (each for each in tensors.collections if isinstance(each, QuadMesh))
    rows = np.isin(np.arange(given.sizes["tensor"]), [*still, *idle])
    assert np.array_equal(np.ma.getmaskarray(shares.get_array()).all(1), rows)
    assert np.array_equal(~np.ma.getmaskarray(grey.get_array()).all(1), rows)
    assert to_hex(grey.get_cmap()(0.0)) == colours.STILL
    assert [text.get_text() for text in tensors.get_legend().get_texts()] == [said]


@pytest.mark.parametrize("only", [False, True])
def test_oscillation_shows_intervals_and_traces(only: bool) -> None:
    given = sample_findings.oscillation(only=only)
    first, *traces = draw("oscillation", given).axes
    for signal in given["signal"].values:
        line = next(line for line in first.lines if line.get_label() == signal)
        assert list(line.get_xdata()) == [
            given["overall_interval"].sel(signal=signal),
            *given["interval"].sel(signal=signal),
        ]
    assert len(traces) == 3 * (1 if only else 3)
    allocation = given["allocation"].values
    for at, ax in enumerate(traces[-3:]):
        drawn = sum(patch.get_data().values for patch in ax.patches)
        assert np.array_equal(drawn, allocation[at])
        helped, hurt = ax.patches
        assert (helped.get_data().values <= 0).all()
        assert (hurt.get_data().values >= 0).all()
        assert [to_hex(each.get_facecolor()) for each in (helped, hurt)] == [
            colours.HELPING,
            colours.HURTING,
        ]
    if not only:
        assert all(has(ax, given["weight"].isel(trace=at)) for at, ax in enumerate(traces[:3]))
        assert list(traces[0].lines[0].get_xdata()) == list(given["step"].values)


def test_oscillation_draws_what_there_is_and_says_when_there_is_nothing() -> None:
    assert len(draw("oscillation", sample_findings.oscillation(traces=0)).axes) == 1
    only_traces = (
        sample_findings.oscillation()
        .drop_vars(["turns", "interval", "overall_turns", "overall_interval"])
        .drop_dims("tensor")
    )
    assert len(draw("oscillation", only_traces).axes) == 9
    with pytest.raises(InputError, match="nothing to draw yet: Turns need"):
        draw(
            "oscillation",
            only_traces.drop_dims("trace").assign_attrs(left_out="Turns need every segment."),
        )


def test_layers_are_lines_from_zero_with_their_totals_beside_them() -> None:
    given = sample_findings.layers()
    ax = draw("layers", given).axes[0]
    for layer in given["layer"].values:
        assert has(ax, [0, *given["cumulative"].sel(layer=layer).values])
    assert any(text.get_text().startswith("fc1  −") for text in ax.texts)


@pytest.mark.parametrize("show", ["total", "mean"])
def test_layers_are_bars_by_sign(show: str) -> None:
    names = tuple(f"layer{at}" for at in range(15))
    given = sample_findings.layers(names=names)
    ax = draw("layers", given, quantity=show).axes[0]
    assert lengths(ax) == list(given[show].values)
    assert [to_hex(patch.get_facecolor()) for patch in ax.patches] == [
        colours.HELPING if value < 0 else colours.HURTING for value in given[show].values
    ]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(names)
    if show == "total":
        assert lengths(draw("layers", given).axes[0]) == lengths(ax)  # too many for lines


def test_layers_of_groups_are_a_picture_with_zero_in_the_middle() -> None:
    given = sample_findings.layers(groups=True)
    ax, _ = draw("layers", given).axes
    (image,) = ax.images
    assert np.array_equal(image.get_array(), given["total"].values)
    assert image.norm.vmin == -image.norm.vmax
    assert to_hex(image.cmap(image.norm(0.0))) == colours.NEUTRAL
    with pytest.raises(InputError, match="Pick one"):
        draw("layers", given, quantity="cumulative")
    with pytest.raises(
        InputError, match="quantity is one of 'cumulative', 'total', 'mean', got 'sum'"
    ):
        draw("layers", given, quantity="sum")


def test_units_are_rows_of_one_scale() -> None:
    given = sample_findings.units()
    ax = draw("units", given).axes[0]
    (mesh,) = (each for each in ax.collections if isinstance(each, QuadMesh))
    assert np.array_equal(mesh.get_array(), given["allocated"].values.T)
    assert mesh.norm.vmin == -mesh.norm.vmax
    assert len([text for text in ax.get_yticklabels() if text.get_text()]) == 2
    one = draw("units", given, layer="_fc$2").axes[0].collections[0]
    assert np.array_equal(one.get_array(), given["allocated"].values.T[4:])
    with pytest.raises(InputError, match="no units of layer 'fc9'; there are 'fc1'"):
        draw("units", given, layer="fc9")


@pytest.mark.parametrize("groups", [(0, 1, 2), ("all",), ("$a$", "_b")])
def test_peaks_are_marks_per_group_and_layer_beside_their_null(groups: tuple[Any, ...]) -> None:
    given = sample_findings.peaks(groups)
    raster, null = draw("peaks", given).axes
    marks = sum(len(each.get_segments()) for each in raster.collections)
    assert marks == int(given["peak"].sum() + given["aligned"].sum())
    (observed,) = null.collections
    assert observed.get_segments()[0][0][0] == int(given["observed_total"])
    assert "p = 0.04" in words(raster.figure)
    assert "p = 0.03" in words(raster.figure)


def test_peaks_of_one_group_or_many_layers_have_a_named_row_per_layer() -> None:
    few, _ = draw("peaks", sample_findings.peaks(("all",))).axes
    assert [text.get_text() for text in few.get_yticklabels()] == style.labels(
        sample_findings.LAYERS
    )
    layers = tuple(f"block.{at}" for at in range(41))
    for groups in (("all",), (0, 1)):
        given = sample_findings.peaks(groups, layers)
        raster, null = draw("peaks", given).axes
        assert [text.get_text() for text in raster.get_yticklabels()] == list(layers)
        assert sum(len(each.get_segments()) for each in raster.collections) == int(
            given["peak"].sum()
        )
        assert len(raster.get_legend().get_texts()) == 1
        assert raster.get_position().width > 0.4
        assert "has no" not in words(null.figure)  # as chance would align some
    none = given.assign(expected_total=0.0, shift=0 * given["shift"], local=0 * given["local"])
    assert "asking all 41 layers to\npeak together has no\npower" in words(draw("peaks", none))


def test_generalisation_joins_train_and_validation() -> None:
    given = (
        sample_findings.generalisation()
        .rename(validation="held$out")
        .assign_attrs(second="held$out")
    )
    ax = draw("generalisation", given).axes[0]
    for name, label in (("train", "train"), ("held$out", r"held\$out")):
        line = next(line for line in ax.lines if line.get_label() == label)
        assert np.array_equal(line.get_xdata(), given[name])
    counts = given["parameters"].sum("tensor").values
    assert f"{100 * counts[0] / counts.sum():.1f} % both helped" in ax.get_xlabel()
    unfinished = given.drop_vars(["parameters", "allocated_train", "allocated_validation"])
    assert "both" not in draw("generalisation", unfinished).axes[0].get_xlabel()


def test_candidates_are_bars() -> None:
    given = sample_findings.candidates()
    layers, tensors, units, parameters = draw("candidates", given).axes
    assert lengths(layers) == list(given["total"].values)
    assert [text.get_text() for text in layers.texts] == [" freeze?"]
    assert lengths(tensors) == [*given["silent"].values, *given["never_helped"].values]
    assert " 1 of 5 units dead" in [text.get_text() for text in tensors.texts]
    assert lengths(units) == list(given["unit_total"].values)
    assert lengths(parameters) == list(given["parameter_allocated"].values)
    assert len(draw("candidates", sample_findings.candidates(units=False)).axes) == 3


def test_of_many_candidates_the_largest_are_named_and_the_others_counted() -> None:
    given = sample_findings.candidates()
    many = given.isel(layer=[0, 1, 2] * 10).assign_coords(layer=[f"block.{at}" for at in range(30)])
    layers = draw("candidates", many).axes[0]
    shown = [text.get_text() for text in layers.get_yticklabels()]
    assert len(shown) == 15
    assert len(lengths(layers)) == 15
    # the largest sums
    assert {name for at, name in enumerate(many["layer"].values) if at % 3 == 0} <= set(shown)
    assert "and 15 more, each 0.3 at most" in words(layers.figure)


def test_a_panel_without_candidates_is_left_out() -> None:
    given = sample_findings.candidates()
    none = {name: 0 * given[name] for name in ("never_helped", "silent", "dead_units")}
    figure = draw("candidates", given.assign(none))
    assert len(figure.axes) == 3
    assert "Every parameter helped on some segment." in words(figure)


def test_labels_of_many_layers_of_units_do_not_cover_each_other() -> None:
    given = sample_findings.units().isel(unit=[0, 4] * 100)
    sizes = {f"l{at}": 1 if at % 3 else 4 for at in range(100)}
    names = [name for name, count in sizes.items() for _ in range(count)][:200]
    ax = draw("units", given.assign_coords(layer=("unit", names))).axes[0]
    boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
    assert 10 < len(boxes) < 100
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_compare_shows_means_intervals_and_single_runs() -> None:
    given = sample_findings.compare()
    ax = draw("compare", given).axes[0]
    for at, label in enumerate(["adam (3 runs)", "\u200b_sgd\\$ (1 run)"]):
        line = next(line for line in ax.lines if line.get_label() == label)
        assert np.array_equal(line.get_xdata(), given["mean"].values[at])
    dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "."]
    assert np.array_equal(dots[0], given["total"].values[0].ravel(), equal_nan=True)
    filled = [
        line.get_xdata()
        for line in ax.lines
        if line.get_marker() in ("o", "s") and line.get_markerfacecolor() != "white"
    ]
    assert [bool(np.isfinite(each).all()) for each in filled] == [True, False]
    ends = [segment[:, 0] for segment in ax.collections[0].get_segments()]
    assert np.array_equal(ends, np.stack([given["low"].values[0], given["high"].values[0]], axis=1))
    assert "Broad bars" not in words(ax.figure)


def test_compare_shows_by_how_much_other_paths_would_change_the_means_that_have_a_band() -> None:
    given = sample_findings.compare()
    band = given["path_band"].copy()
    band[0] = [0.1, 0.2, 0.3]  # the runs of the other label are of single steps
    ax = draw("compare", given.assign(path_band=band)).axes[0]
    broad = [bars for bars in ax.collections if bars.get_linewidth() == 4]
    (ends,) = [[segment[:, 0] for segment in bars.get_segments()] for bars in broad]
    mean = given["mean"].values[0]
    np.testing.assert_allclose(ends, np.stack([mean - band[0], mean + band[0]], axis=1))
    assert "Broad bars" in words(ax.figure)


@pytest.mark.parametrize("at", [0, 5, -1])
def test_the_microscope_shows_a_frame_of_every_tensor_on_one_scale(at: int) -> None:
    given = sample_findings.microscope()
    figure = draw("microscope", given, at=at)
    images = [image for ax in figure.axes for image in ax.images]
    assert len(images) == len(given.data_vars)
    for image, name in zip(images, given.data_vars, strict=True):
        assert np.array_equal(image.get_array(), given[name].values[at])
        assert (image.norm.vmin, image.norm.vmax) == (-given.attrs["scale"], given.attrs["scale"])
    start, end = given["step"].values[at], given["step_end"].values[at]
    assert f"training steps {start} → {end}" in words(figure)
    for ax in figure.axes:
        place = ax.get_position()
        assert min(place.x0, place.y0, 1 - place.x1, 1 - place.y1) >= 0
        assert min(place.width, place.height) > 0.005


def test_pictures_of_very_many_modules_and_of_vectors_alone_have_their_place() -> None:
    one = sample_findings.microscope()
    many = one.assign_attrs(scale=0.0)
    for at in range(30):
        many[f"block{at}.scale"] = (
            ("step", f"{at}:row", f"{at}:column"),
            np.zeros((sample_findings.STEPS, 64, 1), "float32"),
        )
        many[f"block{at}.conv"] = (
            ("step", f"{at}c:row", f"{at}c:column"),
            np.zeros((sample_findings.STEPS, 8, 8), "float32"),
        )
        many = many.rename(
            {f"{at}:row": f"block{at}.scale:row", f"{at}:column": f"block{at}.scale:column"}
        )
        many = many.rename(
            {f"{at}c:row": f"block{at}.conv:row", f"{at}c:column": f"block{at}.conv:column"}
        )
    figure = plots.microscope(many)
    wide, high = figure.get_size_inches()
    assert high < 1.5 * wide
    boxes = [ax.get_position() for ax in figure.axes]
    assert not any(
        a.overlaps(b) and a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9))
        for a, b in itertools.combinations(boxes, 2)
    )


def test_there_is_no_frame_that_is_not_there() -> None:
    with pytest.raises(InputError, match="there are 12 frames, from 0 to 11; there is no frame 12"):
        plots.microscope(sample_findings.microscope(), at=12)


# --- films ----------------------------------------------------------------------------------------


def test_a_film_is_a_gif_of_all_frames(tmp_path: Path) -> None:
    from PIL import Image

    before = plt.get_fignums()
    given = sample_findings.microscope().isel(step=slice(4))
    assert plots.film(given, tmp_path / "a.gif", fps=20) == tmp_path / "a.gif"
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 4
    assert plt.get_fignums() == before


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_a_film_is_an_mp4(tmp_path: Path) -> None:
    plots.film(sample_findings.microscope().isel(step=slice(3)), tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"


def test_without_ffmpeg_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        matplotlib.animation.FFMpegWriter, "isAvailable", classmethod(lambda cls: False)
    )
    with pytest.raises(ResourceError, match=r"ffmpeg, which is not on PATH.*a\.gif") as refused:
        plots.film(sample_findings.microscope(), tmp_path / "a.mp4")
    assert refused.value.exit_code == 5
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(("name", "fps"), [("a.png", 10), ("a", 10), ("a.gif", 0)])
def test_another_kind_of_film_is_refused(tmp_path: Path, name: str, fps: int) -> None:
    with pytest.raises(InputError):
        plots.film(sample_findings.microscope(), tmp_path / name, fps=fps)


# --- words ----------------------------------------------------------------------------------------


def test_long_names_are_cut_in_the_middle_and_stay_unlike_each_other() -> None:
    names = [
        f"transformer.h.{at}.attn.c_attn.{part}" for at in range(24) for part in ("weight", "bias")
    ]
    short = shorten(names, 24)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) < 34
    assert all("…" in each for each in short)
    assert (
        shorten(["a" * 40, "a" * 40], 10) == ["a" * 40] * 2
        or len(shorten(["a" * 40, "a" * 40], 10)) == 2
    )


def test_names_of_parameters_keep_their_index_and_stay_unlike_each_other() -> None:
    names = [
        f"transformer.blocks.{at}_1.conv{of}.weight[{at}, 2, 0]" for at in range(9) for of in (1, 2)
    ]
    short = style.parameter_labels(names, 24)
    assert len(set(short)) == len(names)
    assert all(
        name.partition("[")[2] == each.partition("[")[2]
        for name, each in zip(names, short, strict=True)
    )
    assert max(map(len, short)) < 40


@pytest.mark.parametrize(
    ("names", "most", "wanted"),
    [
        (["layer1.0.conv1.weight[0, 1, 2, 0]"], 38, ["layer1.0.conv1.weight[0, 1, 2, 0]"]),
        (
            ["layer3.0.downsample.0.weight[33, 14, 0, 0]"],
            38,
            ["layer3.0.dow…le.0.weight[33, 14, 0, 0]"],
        ),
        (
            ["conv1.weight[0, 1]", "layer1.0.conv1.weight[9, 1]"],
            40,
            ["conv1.weight[0, 1]", "layer1.0.conv1.weight[9, 1]"],
        ),
    ],
    ids=["it fits", "it is cut in the middle", "several fit"],
)
def test_a_parameter_says_its_layer(names: list[str], most: int, wanted: list[str]) -> None:
    assert style.parameter_labels(names, most) == wanted


def test_labels_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    at = style.spread([0.5, 0.51, 0.52, 0.1, 0.0, -0.2], 0.08)
    assert min(b - a for a, b in itertools.pairwise(sorted(at))) >= 0.08 - 1e-5
    assert min(at) >= 0
    assert np.argsort(at).tolist() == [5, 4, 3, 0, 1, 2]


# --- colours --------------------------------------------------------------------------------------

# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}


def lab(colour: str, sight: str = "normal") -> np.ndarray[Any, Any]:
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHT[sight] @ linear, 0, 1)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ seen / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(a: str, b: str) -> float:
    """The CIE 1976 distance of two colours to whom it is smallest; about 2.3 is just noticeable."""
    return min(float(np.linalg.norm(lab(a, sight) - lab(b, sight))) for sight in SIGHT)


def test_the_distance_is_that_of_the_book() -> None:
    assert np.allclose(lab("#ffffff"), [100, 0, 0], atol=0.01)
    assert np.allclose(lab("#ff0000"), [53.24, 80.09, 67.20], atol=0.05)
    assert apart("#ff0000", "#8a7a00") < 25  # a red and an olive that are one to the red-blind


def test_helping_and_hurting_are_far_apart_to_everybody() -> None:
    assert apart(colours.HELPING, colours.HURTING) > 40


@pytest.mark.parametrize(
    ("scale", "neutral"),
    [(colours.DIVERGING, colours.NEUTRAL), (colours.DIVERGING_DARK, colours.NEUTRAL_DARK)],
)
def test_the_scale_is_balanced_and_its_sides_are_told_apart(
    scale: tuple[str, ...], neutral: str
) -> None:
    half = len(scale) // 2
    assert scale[half] == neutral
    lightness = [float(lab(colour)[0]) for colour in scale]
    helping, hurting = lightness[: half + 1][::-1], lightness[half:]
    for side in (helping, hurting):  # away from the middle it only goes one way
        assert len({np.sign(b - a) for a, b in itertools.pairwise(side)}) == 1
    assert max(abs(a - b) for a, b in zip(helping, hurting, strict=True)) < 4
    for away in range(2, half + 1):
        assert apart(scale[half - away], scale[half + away]) > 15
        assert apart(scale[half - away], neutral) > 8 < apart(scale[half + away], neutral)


@pytest.mark.parametrize(
    "palette", [colours.LAYERS, colours.LAYERS_DARK, colours.CAUSES, colours.CAUSES_DARK]
)
def test_layers_and_causes_are_told_apart_and_look_like_neither_side(
    palette: tuple[str, ...],
) -> None:
    assert min(apart(a, b) for a, b in itertools.combinations(palette, 2)) > 19
    assert min(apart(a, b) for a in palette for b in (colours.HELPING, colours.HURTING)) > 11
