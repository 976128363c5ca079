"""Figures of few and of many layers and steps: nothing warned about, nothing cut off, no label on
another, the strongest named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lca_posthoc import plots
from lca_posthoc.errors import InputError
from lca_posthoc.findings.helping import joined_shares
from lca_posthoc.findings.names import fitting
from lca_posthoc.plots import style
from tests.helpers import sample_findings
from tests.helpers.cli import lca, record, refused, run_lca, write_task

mpl.use("agg")
pytestmark = pytest.mark.filterwarnings("error", "ignore::lca_posthoc.errors.LCAWarning")

SIZES = ((6, 3), (41, 60), (200, 3))
DRAWN = [
    (name, size)
    for name in sample_findings.MADE
    for size in SIZES
    if not (name == "microscope" and size == (200, 3))
]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(name: str, layers: int, steps: int, **options: Any) -> Figure:
    made = getattr(plots, name)(sample_findings.large(name, layers, steps), **options)
    figure: Figure = made if isinstance(made, Figure) else made.figure
    figure.canvas.draw()
    return figure


def boxes(texts: list[Text]) -> list[Any]:
    return [
        text.get_window_extent() for text in texts if text.get_visible() and text.get_text().strip()
    ]


def apart(texts: list[Text]) -> bool:
    """Whether no text covers more than a hair of another."""
    shown = [box.padded(-1) for box in boxes(texts)]
    return not any(a.overlaps(b) for a, b in itertools.combinations(shown, 2))


def tick_labels(ax: Axes) -> list[list[Text]]:
    """Of either axis, those that are drawn: inside its limits."""
    found = []
    for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        low, high = sorted(limits)
        found.append(
            [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        )
    return found


@pytest.mark.parametrize(("name", "size"), DRAWN, ids=str)
def test_no_label_is_cut_off_or_covers_another(name: str, size: tuple[int, int]) -> None:
    figure = drawn(name, *size)
    assert max(figure.get_size_inches()) < 14
    page = figure.bbox.padded(2)
    for ax in figure.axes:
        along = tick_labels(ax)
        for texts in (*along, list(ax.texts)):
            assert apart(texts), [text.get_text() for text in texts]
        everything = [*along[0], *along[1], *ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label]
        for text in everything:
            if text.get_visible() and text.get_text().strip():
                box = text.get_window_extent()
                assert page.x0 <= box.x0, text
                assert box.x1 <= page.x1, text
                assert page.y0 <= box.y0, text
                assert box.y1 <= page.y1, text
    assert apart([ax.title for ax in figure.axes])


@pytest.mark.parametrize(
    ("layers", "top"), [(6, None), (41, None), (200, None), (41, 4), (200, 20), (29, 29)]
)
def test_the_strongest_layers_have_a_name_and_a_colour_and_the_others_are_grey(
    layers: int, top: int | None
) -> None:
    given = sample_findings.large("layers", layers, 30)
    ax = plots.layers(given, quantity="cumulative", top=top)
    figure = ax.figure
    figure.canvas.draw()
    last = given["cumulative"].values[-1]
    many = min(layers, top or 10)
    strong = set(np.argsort(-abs(last))[:many].tolist())
    grey = [line for line in ax.lines if line.get_color() == style.FAINT]
    assert len(grey) == layers - many
    ends = [text for text in ax.texts if "stages" in text.get_text() or "…" in text.get_text()]
    assert len(ends) == many
    said = "\n".join(text.get_text() for text in ends)
    assert all(f"{at:03d}" in said for at in strong)
    assert apart(ends)
    assert all(figure.bbox.padded(2).x1 >= box.x1 for box in boxes(ends))
    assert ax.get_window_extent().width > 0.25 * figure.bbox.width
    foot = getattr(figure, "_supxlabel", None)
    assert (foot is not None and f"In grey: {layers - many} more" in foot.get_text()) == (
        many < layers
    )


@pytest.mark.parametrize("name", ["layers", "compare", "generalisation", "oscillation"])
def test_of_many_rows_the_largest_are_drawn_and_the_others_counted(name: str) -> None:
    figure = drawn(name, 200, 3, top=12)
    rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(rows) == 12 + (name == "oscillation")
    assert (
        f"Not shown: {400 - 12 if name == 'oscillation' else 188} more"
        in figure._supxlabel.get_text()
    )  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="1 or more, got 0"):
        getattr(plots, name)(sample_findings.large(name, 6, 3), top=0)


@pytest.mark.parametrize("steps", [3, 60, 4500])
def test_long_runs_keep_whole_steps_on_their_axis(steps: int) -> None:
    for name in ("curve", "layers"):
        ax = drawn(name, 6, steps).axes[0]
        ticks = [tick for tick in ax.get_xticks() if 0 <= tick <= steps]
        assert ticks == [round(tick) for tick in ticks]


@pytest.mark.parametrize("blank", [0, 1, 3])
def test_the_microscope_shows_the_last_moment_on_which_anything_moved(blank: int) -> None:
    given = sample_findings.large("microscope", 6, 8)
    for name in given.data_vars:
        given[name].values[8 - blank :] = 0
    figure = plots.microscope(given)
    said = "\n".join(text.get_text() for text in figure.findobj(Text))
    assert f"training steps {7 - blank} → {8 - blank}" in said
    assert any(image.get_array().any() for ax in figure.axes for image in ax.images)
    still = given.map(np.zeros_like)
    still.attrs = given.attrs
    assert isinstance(plots.microscope(still), Figure)


@pytest.mark.parametrize("faint", [1, 3])
def test_the_microscope_passes_over_frames_that_are_all_but_blank(faint: int) -> None:
    given = sample_findings.large("microscope", 6, 8)
    for name in given.data_vars:
        given[name].values[8 - faint :] *= 1e-3
    said = "\n".join(text.get_text() for text in plots.microscope(given).findobj(Text))
    assert f"training steps {7 - faint} → {8 - faint}" in said


def test_words_above_traces_say_the_tensor_and_its_index() -> None:
    given = sample_findings.oscillation()
    names = [
        "conv1.weight[0, 1]",
        "layer1.0.conv2.weight[3, 2]",
        "layer3.0.downsample.0.weight[33, 14, 0, 0]",
    ]
    figure = plots.oscillation(given.assign_coords(parameter=("trace", names)))
    figure.canvas.draw()
    titles = [ax._left_title for ax in figure.axes if "[" in ax.get_title(loc="left")]
    said = [title.get_text().split("\n") for title in titles]
    assert [first for first, _ in said] == [
        "conv1.weight",
        "layer1.0.conv2.weight",
        "layer3.0.dow…mple.0.weight",
    ]
    assert [second.split(" ")[0] for _, second in said] == ["[0,", "[3,", "[33,"]
    assert apart(titles)


def test_names_of_groups_do_not_cover_each_other() -> None:
    classes = ["airplane", "automobile", "bird"]
    ax = plots.layers(sample_findings.layers(groups=True).assign_coords(group=classes))
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_xticklabels()] == classes
    assert apart(list(ax.get_xticklabels()))


def test_means_of_many_layers_say_their_unit_inside_the_page() -> None:
    ax = plots.layers(sample_findings.large("layers", 41, 3), quantity="mean")
    ax.figure.canvas.draw()
    box = ax.xaxis.label.get_window_extent()
    assert "units of loss" in ax.get_xlabel()
    assert ax.figure.bbox.x0 <= box.x0
    assert box.x1 <= ax.figure.bbox.x1


def test_the_words_of_a_distribution_cover_no_data() -> None:
    sizes = plots.distribution(sample_findings.distribution()).axes[0]
    sizes.figure.canvas.draw()
    top = sizes.get_window_extent().y1
    assert len(sizes.texts) == 4
    assert all(text.get_window_extent().y0 >= top for text in sizes.texts)
    assert apart([*sizes.texts, sizes._left_title])


@pytest.mark.parametrize("groups", [2, 12])
def test_marks_of_groups_within_a_row_are_explained(groups: int) -> None:
    names = tuple(f"class {at}" for at in range(groups))
    figure = plots.peaks(sample_findings.peaks(names, layers=tuple(f"fc{at}" for at in range(9))))
    said = figure._supxlabel.get_text()  # type: ignore[attr-defined]
    assert "Within a row, from the top: class 0, class 1" in said
    assert ("and 2 more" in said) == (groups == 12)


@pytest.mark.parametrize("count", [6, 20, 41])
def test_names_under_the_microscope_differ(count: int) -> None:
    figure = drawn("microscope", count, 3)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.images]
    titles = [title for title in titles if title]
    assert len(set(titles)) == len(titles) == count


CUT = {
    "in the middle": ([sample_findings.module(at) for at in range(30)], 5),
    "behind": ([f"blocks.0.{part}.{at}" for part in ("attention", "mlp") for at in range(9)], 9),
    "before": ([f"layer{at}.conv.weight" for at in range(12)], 7),
    "with a stranger": (["stem", *(f"stage.{at}.block" for at in range(12))], 8),
}


@pytest.mark.parametrize("case", CUT)
def test_names_that_are_cut_fit_and_differ(case: str) -> None:
    names, room = CUT[case]
    short = fitting(names, [room] * len(names))
    assert max(map(len, short)) <= room
    assert len(set(short)) == len(names)


@pytest.mark.parametrize("segments", [4, 7, 60, 97, 150])
def test_shares_of_segments_are_no_comb(segments: int) -> None:
    """Every parameter helps by chance: no bin is empty between two that are full."""
    helped = np.random.default_rng(segments).binomial(segments, 0.5, 20_000)
    counts = np.bincount(np.minimum(99, helped * 100 // segments), minlength=100)
    edges = np.linspace(0, 1, 101)
    given = sample_findings.helping().drop_dims("share").isel(step=np.zeros(segments, int))
    given = given.assign(parameters=("share", counts), expected=("share", counts.astype(float)))
    given = given.assign_coords(share_low=("share", edges[:-1]), share_high=("share", edges[1:]))
    _, parameters, expected = joined_shares(given)
    filled = np.flatnonzero(parameters)
    assert (parameters[filled[0] : filled[-1] + 1] > 0).all()
    assert parameters.sum() == expected.sum() == 20_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("looks")
    result = run_lca(
        record(root / "ck", range(7)),
        write_task(root / "task.py"),
        root / "r.lca",
        "--durability",
        "none",
    )
    assert result.exit_code == 0, result.output
    return root / "r.lca"


@pytest.mark.parametrize("finding", ["layers", "helping", "curve"])
def test_size_title_and_font_are_as_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finding: str
) -> None:
    figures = list[Any]()
    monkeypatch.setattr(plt, "close", figures.append)
    looks = ("--size", "6x5.5", "--title", "R$_5$: a_b", "--font", "DejaVu Serif")
    result = lca("plot", run, finding, *looks, "-o", tmp_path / "x.svg")
    assert result.exit_code == 0, result.output
    monkeypatch.undo()
    assert figures[0].get_size_inches().tolist() == [6.0, 5.5]
    assert figures[0]._suptitle.get_text() == r"R\$_5\$: a_b"
    assert figures[0]._suptitle.get_fontfamily() == ["DejaVu Serif"]
    assert mpl.rcParams["font.family"] == ["sans-serif"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("layers", "--size", "7"), "WIDTHxHEIGHT in inches"),
        (("layers", "--size", "0x3"), "each from 1 to 100"),
        (("layers", "--font", "No Such Family"), "'No Such Family' is not installed"),
        (("microscope", "--size", "7x4"), "do not go with microscope"),
        (("curve", "--top", "3"), "--top does not go with curve"),
        (("layers", "--top", "0"), "x>=1"),
    ],
    ids=str,
)
def test_looks_that_cannot_be_are_refused(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lca("plot", run, *arguments), words)
    assert list(tmp_path.iterdir()) == []
