"""The report: one file, harmless whatever things are called, whole without a network, and true to
the numbers of the run.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as some

from lca_posthoc import open_run
from lca_posthoc.findings import layers, microscope
from lca_posthoc.report import MOST_BYTES, page, write_report
from lca_posthoc.report import microscope as scope
from lca_posthoc.report.content import Column, Table
from lca_posthoc.report.downsample import (
    kept,
    lines,
    numbers,
    over_segments,
    over_steps,
    picture,
    thinned,
)
from lca_posthoc.report.panels import choose
from lca_posthoc.report.sections import candidates
from tests.helpers.browser import CHROMIUM, SIZES, Browser, browser
from tests.helpers.cli import lca, record, refused, run_lca, says, steering, write_task
from tests.helpers.example_runs import tell
from tests.helpers.large_runs import NASTY, deep, hostile
from tests.helpers.sample_findings import module
from tests.helpers.synthetic_runs import build

GROUPS = (
    '"validation": Loss(F.cross_entropy, on="validation")}',
    '"validation": Loss(F.cross_entropy, on="validation"), '
    '"per_class": Loss(F.cross_entropy, on="train", group_by=lambda inputs, targets: targets)}',
)


class Tags(HTMLParser):
    """How often each tag starts, its attributes, what it points to, and the text outside of scripts
    and styles.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = dict[str, int](), set[str](), "", ""
        self.targets = list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.targets += [
            value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")
        ]
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six segments with a loss for training, one for validation, and one by class."""
    place = tmp_path_factory.mktemp("small")
    task = write_task(place / "task.py", *GROUPS)
    result = run_lca(
        record(place / "checkpoints", range(7)),
        task,
        place / "small.lca",
        "--loss",
        "all",
        "--durability",
        "none",
    )
    assert result.exit_code == 0, result.output
    return place / "small.lca"


@pytest.fixture(scope="module")
def small_page(small: Path) -> Path:
    return write_report([open_run(small)], small.parent / "small.html")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    return write_report([hostile(place)], place / "hostile.html")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


def part(text: str, name: str) -> Any:
    """One of the two documents that the page carries."""
    found = re.search(f'<script type="application/json" id="{name}">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


# --- series ---------------------------------------------------------------------------------------

SERIES = some.lists(some.floats(-1e6, 1e6) | some.just(float("nan")), min_size=1, max_size=300)


@given(SERIES, some.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes_in_their_order(
    values: list[float], most: int
) -> None:
    series = np.array(values)
    at = kept(series, most)
    assert len(at) <= max(most, 4)
    assert (np.diff(at) > 0).all()
    assert {at[0], at[-1]} == {0, len(series) - 1}
    known = series[~np.isnan(series)]
    if len(known):
        left = series[at]
        assert np.nanmin(left) == known.min()
        assert np.nanmax(left) == known.max()


def test_a_peak_in_any_stretch_of_a_long_series_stays() -> None:
    series = np.zeros(100_000)
    series[31_234], series[77_777] = 5.0, -7.0
    at = kept(series)
    assert len(at) <= 2000
    assert {31_234, 77_777} <= set(at.tolist())


def unpacked(column: dict[str, Any]) -> np.ndarray[Any, Any]:
    kind = next(iter(column))
    return np.frombuffer(base64.b64decode(column[kind]), {"f": "<f4", "d": "<f8"}[kind])


def test_numbers_come_back_and_large_steps_stay_exact() -> None:
    assert unpacked(numbers([0.5, -2.25])).tolist() == [0.5, -2.25]
    assert unpacked(numbers([2**24 + 1, 2**53 - 1])).tolist() == [2**24 + 1, 2**53 - 1]


def test_lines_that_are_not_thinned_share_their_steps() -> None:
    xs, ys = lines([1, 2, 3], [[1, 2, 3], [4, 5, 6]])
    assert (xs["same"], unpacked(xs["v"]).tolist()) == (2, [1, 2, 3])
    assert (ys["n"], unpacked(ys["v"]).tolist()) == ([3, 3], [1, 2, 3, 4, 5, 6])


def test_no_line_is_drawn_over_missing_segments() -> None:
    step = np.concatenate([np.arange(3000), np.arange(5000, 9000)])
    line = thinned(*over_segments(step, np.sin(step), step + 1), 100)
    x, y = unpacked(line["x"]), unpacked(line["y"])
    assert np.isnan(x).sum() == np.isnan(y).sum() == 1
    assert np.nanmax(np.diff(x)) < 500
    xs, ys = lines(*over_steps(step, step + 1, [np.sin(step)], [np.sin(step + 1)]), 100)
    assert np.isnan(unpacked(xs["v"])).sum() == np.isnan(unpacked(ys["v"])).sum() == 1
    assert xs["n"] == ys["n"] == [len(unpacked(ys["v"]))]


@given(some.lists(some.floats(-1e3, 1e3), min_size=4, max_size=4))
def test_a_picture_keeps_signs_zeros_and_values_to_a_level(values: list[float]) -> None:
    matrix = np.array(values).reshape(2, 2)
    packed = picture(matrix)
    levels = (
        np.frombuffer(base64.b64decode(packed["b"]), "i1").astype(float).reshape(packed["shape"])
    )
    found = np.sign(levels) * (levels / 127) ** 2 * packed["peak"]
    assert (found * matrix >= 0).all()
    assert (abs(found - matrix) <= packed["peak"] / 127 + 1e-12).all()
    assert (found[matrix == 0] == 0).all()


# --- the file -------------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_says_where(small: Path, tmp_path: Path) -> None:
    result = lca("report", small, "-o", tmp_path / "it.html")
    assert result.exit_code == 0, result.output
    says(result.stdout, f"wrote {tmp_path / 'it.html'} (")
    assert [path.name for path in tmp_path.iterdir()] == ["it.html"]
    found = Tags((tmp_path / "it.html").read_text())
    assert [
        target for target in found.targets if not target.startswith("#") and target != "data:,"
    ] == []
    shown = found.text
    says(shown, "What was left out", "task_sha256", "Layers that hurt", "residual", "small.lca")
    order = [
        shown.index(title)
        for title in ("Headline", "Microscope", "Loss curve", "Candidates", "Provenance")
    ]
    assert order == sorted(order)


def test_a_loss_or_a_file_that_cannot_be_is_refused(small: Path, tmp_path: Path) -> None:
    refused(
        lca("report", small, "--loss", "test", "-o", tmp_path / "it.html"),
        "no run has a loss 'test'",
        "'per_class'",
    )
    refused(lca("report", small, "-o", tmp_path / "nowhere" / "it.html"), "cannot be written", "-o")
    assert list(tmp_path.iterdir()) == []


def test_only_the_named_losses_are_shown_and_the_others_are_named(
    small: Path, tmp_path: Path
) -> None:
    write_report([open_run(small)], tmp_path / "it.html", losses=["per_class"])
    text = (tmp_path / "it.html").read_text()
    data = part(text, "data")
    assert [panel["label"] for panel in data["panels"]] == ["per_class"]
    assert [label for _, label in data["panels"][0]["groups"]] == [
        "mean over groups",
        "0",
        "1",
        "2",
        "3",
    ]
    says(
        Tags(text).text,
        "Losses that are not shown in full: train and validation. Name the ones to show with "
        "--loss NAME.",
    )


def test_what_the_page_carries_are_the_numbers_of_the_run(small: Path, small_page: Path) -> None:
    run, data = open_run(small), part(small_page.read_text(), "data")
    for key, panel in enumerate(data["panels"]):
        found = layers(run[panel["label"]])
        for group, view in data["views"]["@layers"][str(key)].items():
            position = group.strip("|")
            expected = found["total"]
            if "group" in expected.dims:
                weight = run["per_class"].steps["weight"][0].values
                expected = (
                    expected.values @ (weight / weight.sum())
                    if not position
                    else expected.isel(group=int(position))
                )
            np.testing.assert_allclose(view["1"], np.asarray(expected), rtol=1e-6)


def test_of_a_mean_over_groups_no_share_is_claimed(small: Path, tmp_path: Path) -> None:
    write_report([open_run(small)], tmp_path / "it.html", losses=["per_class"])
    text = (tmp_path / "it.html").read_text()
    views = part(text, "data")["views"]["@layers"]["0"]
    assert set(views["|"]["5"]) == {None}
    assert all(0 <= share <= 1 for share in views["2|"]["5"])
    by_layer = layers(open_run(small)["per_class"])
    assert views["2|"]["3"] == by_layer["verdict"].isel(group=2).values.tolist()
    says(
        Tags(text).text,
        "pick a group for its layers' shares",
        "largest |residual| of a segment in one group",
    )


SUMS = ["curve", "layers", "peaks", "generalisation", "candidates"]
SECTIONS = {
    "tensors": SUMS,
    "units": ["units", *SUMS],
    "statistics": ["helping", "distribution", "oscillation", "units", *SUMS],
}
MORE = {
    "tensors": "--keep units (Neurons and channels), --keep statistics (Who helps, Sizes, "
    "Oscillation), --keep parameters (Microscope).",
    "units": "--keep statistics (Who helps, Sizes, Oscillation), --keep parameters (Microscope).",
    "statistics": "--keep parameters (Microscope).",
}


@pytest.fixture(scope="module")
def levels(small: Path) -> dict[str, Path]:
    """The small run at every level of `--keep`."""
    place = small.parent
    for keep in SECTIONS:
        asked = ("--loss", "all", "--durability", "none", "--keep", keep)
        result = run_lca(place / "checkpoints", place / "task.py", place / f"{keep}.lca", *asked)
        assert result.exit_code == 0, result.output
    return {keep: place / f"{keep}.lca" for keep in SECTIONS} | {"parameters": small}


@pytest.mark.parametrize("keep", SECTIONS)
def test_a_page_has_what_its_level_keeps_and_says_once_what_others_would_add(
    levels: dict[str, Path], keep: str, tmp_path: Path
) -> None:
    text = write_report([open_run(levels[keep])], tmp_path / "it.html").read_text()
    assert part(text, "frames") is None
    shown = re.findall('<section id="([a-z]+)" data-panels', text)
    assert sorted(shown) == sorted(SECTIONS[keep])
    assert re.findall('<a href="#([a-z]+)">', text) == ["headline", *shown, "provenance"]
    words = re.sub(r"\s+", " ", Tags(text).text)
    said = f"This run was made with --keep {keep}; more is available with {MORE[keep]}"
    assert words.count(said) == 1
    assert "--keep" not in words.replace(said, "")
    counted = keep == "statistics"
    assert (">helping</th>" in text) == counted
    assert ("of parameters × segments" in words) == counted
    assert (set(part(text, "data")["views"]["@layers"]["0"]["|"]) == set("12345")) == counted
    assert not re.search(r"\bnan\b", words, re.IGNORECASE)


def test_a_page_that_would_be_too_large_is_made_smaller(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "BYTES", 20_000)
    size = write_report([open_run(small)], tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr(page, "MOST_BYTES", size - 1)
    assert (
        write_report([open_run(small)], tmp_path / "smaller.html").stat().st_size
        < size
        < MOST_BYTES
    )
    says(
        Tags((tmp_path / "smaller.html").read_text()).text,
        "Values under the microscope are rounded",
    )
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    refused(
        lca("report", small, "-o", tmp_path / "none.html"), "larger than", "--loss NAME", code=1
    )
    assert not (tmp_path / "none.html").exists()


def test_of_very_many_tensors_the_largest_are_under_the_microscope(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lca_posthoc.report.microscope.TENSORS", 2)
    write_report([open_run(small)], tmp_path / "it.html", losses=["train"])
    text = (tmp_path / "it.html").read_text()
    assert [tensor["name"] for tensor in part(text, "frames")["tensors"]] == [
        "hidden.weight",
        "out.weight",
    ]
    says(Tags(text).text, "The microscope shows the 2 largest of 4 tensors.")


def test_small_tensors_are_not_pooled_because_a_large_one_is(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lca_posthoc.report.microscope.TENSORS", 70)
    [panel], _ = choose([open_run(small)], ["train"])
    found, notes = scope.microscope(panel, 6 * 300)
    assert found is not None
    pools = {tensor["name"]: tensor["pool"] for tensor in found["tensors"]}
    assert {name for name, pool in pools.items() if pool != [1, 1]} == {"hidden.weight"}
    assert list(pools) == list(open_run(small)["train"].tensors["tensor"].values)
    says(" ".join(notes), "1 tensor of 4 is pooled")


def test_names_add_no_tag_and_no_attribute(small_page: Path, hostile_page: Path) -> None:
    text = hostile_page.read_text()
    found, plain = Tags(text), Tags(small_page.read_text())
    assert set(found.tags) <= set(plain.tags)
    assert found.tags["script"] == plain.tags["script"] == 6
    assert "img" not in found.tags
    assert found.tags["svg"] == plain.tags["svg"] == 1
    assert [name for name in found.attributes if name.startswith("on")] == []
    says(found.text, *(name for name in NASTY[:6] if "$" not in name))
    assert steering(text) <= steering(small_page.read_text())


class Asked:
    """A panel whose finding names the first `most` of some dead units."""

    def __init__(self, dead: int) -> None:
        self.dead = dead

    def find(self, name: str, *, most: int = 20) -> tuple[xr.Dataset, str]:
        names = np.array([f"fc[{at}]" for at in range(min(most, self.dead))], dtype=object)
        return xr.Dataset(coords={"dead_name": ("dead", names)}), ""


@pytest.mark.parametrize(
    ("dead", "said"),
    [
        (0, "none"),
        (2, "2 (fc[0] and fc[1])"),
        (30, "30, such as fc[0], fc[1], fc[2], fc[3], fc[4] and fc[5]"),
        (2000, "at least 1,000, such as fc[0], fc[1], fc[2], fc[3], fc[4] and fc[5]"),
    ],
)
def test_a_dead_unit_counts_once(dead: int, said: str) -> None:
    panel: Any = Asked(dead)
    assert candidates._dead(panel, panel.find("candidates")[0]) == said


# --- in a browser ---------------------------------------------------------------------------------


def test_a_hostile_run_stays_harmless_in_a_browser(chromium: Browser, hostile_page: Path) -> None:
    for size, scheme in (("desktop", "light"), ("phone", "dark")):
        with chromium.opened(hostile_page, size, scheme) as opened:
            for panel in ("1", "2", "0"):
                opened.page.select_option("#panel", panel)
            for figure in ("layers", "peaks"):
                opened.page.locator(f"#f-{figure}").scroll_into_view_if_needed()
                box = opened.page.locator(f"#f-{figure}").bounding_box()
                for across in range(10, 100, 10):
                    opened.page.mouse.move(
                        box["x"] + box["width"] * across / 100,
                        box["y"] + box["height"] * across / 100,
                    )
            assert opened.faults == []
            assert opened.count("img") == opened.count("main svg:not(#track)") == 0
            assert opened.count("script") == 6
            assert opened.js("document.documentElement.scrollWidth <= innerWidth")


def test_a_hundred_layers_and_ten_groups(chromium: Browser, tmp_path: Path) -> None:
    run = deep(tmp_path)
    path = write_report([run], tmp_path / "it.html")
    assert path.stat().st_size <= MOST_BYTES
    says(Tags(path.read_text()).text, "Layers: 40 layers with smaller sums are not shown.")
    ticks = part(path.read_text(), "data")["views"]["peaks"]["0"]["|"]["@ticks"]["y"]
    assert (len(ticks), ticks[0], ticks[-1]) == (40, "block0", "last")
    with chromium.opened(path) as opened:
        assert opened.count("table[data-live='layers'][data-panel='0'] tbody tr") == 60
        assert len(opened.source("layers", "layers")["xs"]) == 6
        opened.page.select_option("#panel", "1")
        assert opened.count("#group option") == 11
        before = opened.text("table[data-live='layers'] td.bar .number")
        lines_before = opened.source("layers", "layers")["ys"]
        opened.page.select_option("#group", "7")
        found = layers(run["per_class"])["total"].isel(group=7)
        first = str(
            opened.js(
                "document.querySelector(\"table[data-live='layers'][data-panel='1'] "
                'tbody th").title'
            )
        )
        assert opened.text("table[data-live='layers'] td.bar .number") != before
        shown = opened.text("table[data-live='layers'] td.bar .number").replace("−", "-")
        assert float(shown) == pytest.approx(float(found.sel(layer=first)), rel=1e-3)
        assert opened.source("layers", "layers")["ys"] != lines_before
        assert opened.faults == []


def test_the_microscope_moves_and_says_the_right_value(
    chromium: Browser, small: Path, small_page: Path
) -> None:
    frames = microscope(open_run(small)["train"])
    name, row, column = "hidden.weight", 3, 17
    with chromium.opened(small_page) as opened:
        opened.page.locator("#microscope").scroll_into_view_if_needed()
        pictures = set()
        for frame in range(6):
            opened.page.locator("#frame").fill(str(frame))
            pictures.add(opened.picture())
            assert opened.text("#now").startswith(f"Step {frame} to {frame + 1}, loss ")
            opened.page.mouse.move(
                *opened.js(
                    "([name, row, column]) => lcaMicroscope.locate(name, row, column)",
                    [name, row, column],
                )
            )
            said = opened.text("#tip")
            where, value = re.match(r"(.*): ([^,]*), (?:helped|hurt)$", said).groups()  # type: ignore[union-attr]
            assert where == f"{name}[{row}, {column}]"
            expected = float(frames[name][frame, row, column])
            assert float(value.replace("−", "-")) == pytest.approx(expected, rel=1e-3)
        assert len(pictures) == 6
        opened.page.locator("#picture").focus()
        opened.page.keyboard.press("ArrowRight")
        assert opened.text("#cell").startswith(f"{name}[{row}, {column + 1}]")
        opened.page.select_option("#layer", label="out")
        assert opened.js("lcaMicroscope.locate('out.weight', 0, 0)[0] > 0")
        opened.page.keyboard.press("Tab")
        before = opened.js("document.querySelector('#track .mark').getAttribute('x1')")
        opened.page.locator("#play").click()
        opened.page.wait_for_selector("#play[aria-pressed='false']")
        assert opened.js("document.querySelector('#frame').value") == "5"
        assert opened.js("document.querySelector('#track .mark').getAttribute('x1')") >= before
        assert opened.faults == []


def test_losses_steps_layers_and_colours_can_be_picked(
    chromium: Browser, small: Path, small_page: Path
) -> None:
    with chromium.opened(small_page) as opened:
        train = opened.source("curve", "true")["y"]
        assert train[0] == pytest.approx(
            float(open_run(small)["train"].steps["loss_start"][0]), rel=1e-6
        )
        opened.page.locator("[data-show='1']").click()
        assert opened.source("curve", "true")["y"] != train
        assert opened.text("#headline .measured").startswith("Loss validation")
        opened.page.locator("#from").fill("2")
        opened.page.locator("#from").press("Tab")
        assert opened.js("lcaFigures.one('curve').model.x_range.start") == 2
        assert opened.js("lcaFigures.one('layers').model.x_range.start") == 2
        opened.page.locator("#all").click()
        assert opened.js("lcaFigures.one('layers').model.x_range.start") < 0.5
        opened.page.locator("table[data-live='layers'][data-panel='1'] input").first.uncheck()
        assert opened.text("#n-layers") == "out"
        assert opened.source("layers", "layers")["name"] == ["out"]
        background = "getComputedStyle(document.body).backgroundColor"
        light, axis = (
            opened.js(background),
            "String(lcaFigures.one('curve').model.below[0].major_label_text_color)",
        )
        was = opened.js(axis)
        opened.page.locator("#theme").click()
        assert opened.js(background) != light
        assert opened.js(axis) != was
        assert opened.faults == []


# sections that can be seen, with nothing to see under their title and how to read them
EMPTY = """[...document.querySelectorAll('main > section')].filter((each) => each.offsetParent
    && ![...each.querySelectorAll('figure, table, summary, dl, ul, p:not(.how), canvas')].some((one) => one.offsetParent))
    .map((each) => each.id)"""
SEEN = """[...document.querySelectorAll('main > section[data-panels]')].filter((each) => each.offsetParent).map((each) => each.id)"""
LINKED = """[...document.querySelectorAll('nav li[data-panels] a')].filter((each) => each.offsetParent).map((each) => each.hash.slice(1))"""


@pytest.mark.parametrize("keep", ["tensors", "units"])
def test_a_page_of_sums_is_whole_in_a_browser(
    chromium: Browser, levels: dict[str, Path], keep: str, tmp_path: Path
) -> None:
    path = write_report([open_run(levels[keep])], tmp_path / "it.html")
    with chromium.opened(path) as opened:
        for panel in ("1", "2", "0"):
            opened.page.select_option("#panel", panel)
            assert opened.js(EMPTY) == []
            assert opened.js(SEEN) == opened.js(LINKED)
            seen = opened.text("main")
            assert not re.search(r"\bhelping\b|shares? of parameters|\bNaN\b", seen, re.IGNORECASE)
        opened.page.select_option("#panel", "2")
        opened.page.select_option("#group", "1")
        assert not re.search(r"NaN|undefined", opened.text("main"))
        assert opened.faults == []


def test_examples_of_another_loss_are_shown_with_its_name(
    chromium: Browser, tmp_path: Path
) -> None:
    path = write_report(
        [tell(tmp_path).run], tmp_path / "it.html", losses=["plain", "train", "classes"]
    )
    with chromium.opened(path) as opened:
        for panel in ("0", "2"):
            opened.page.select_option("#panel", panel)
            assert {"examples", "clusters"} <= set(opened.js(SEEN))
            assert opened.js(SEEN) == opened.js(LINKED)
            assert opened.js(EMPTY) == []
            for name in ("examples", "clusters"):
                says(opened.text(f"#{name} .note"), "This section shows loss train.")
        first = opened.source("story", "story loss")
        opened.page.select_option("#examples select", "1")
        other = opened.source("story", "story loss")
        assert other["y"] != first["y"]
        opened.page.locator("#examples .note [data-show]").click()
        assert opened.page.locator("#panel").input_value() == "1"
        assert opened.source("story", "story loss") == other  # of the example that was picked
        assert opened.page.locator("#examples .note >> visible=true").count() == 0
        assert opened.faults == []


def test_runs_of_two_levels_stand_beside_each_other_each_with_what_it_has(
    chromium: Browser, levels: dict[str, Path], tmp_path: Path
) -> None:
    runs = [open_run(levels[keep]) for keep in ("tensors", "parameters")]
    path = write_report(runs, tmp_path / "it.html", losses=["train"])
    text = path.read_text()
    says(Tags(text).text, "tensors.lca was made with --keep tensors; more is available with")
    assert part(text, "frames") is not None
    table = text.split("<caption>Losses and runs</caption>")[1].split("</table>")[0]
    assert table.count(">helping</th>") == 1
    compared = text.split('<section id="compare"')[1].split("</section>")[0]
    assert "helping</th>" not in compared
    with chromium.opened(path) as opened:
        assert opened.text("#microscope p.small").startswith("Loss small.lca · train.")
        few = opened.js(SEEN)
        assert not {"helping", "distribution", "oscillation", "units"} & set(few)
        assert opened.js(EMPTY) == []
        opened.page.select_option("#panel", "1")
        assert set(opened.js(SEEN)) - set(few) == {
            *("helping", "distribution", "oscillation", "units")
        }
        assert opened.js(SEEN) == opened.js(LINKED)
        assert opened.js(EMPTY) == []
        opened.page.wait_for_function("lcaFigures.one('helping')")
        assert opened.js("document.getElementById('f-helping').clientHeight") > 150
        assert opened.faults == []


NAMELESS = """[...document.querySelectorAll('button, select, input, canvas[role], [role=region]')].filter((each) => each.offsetParent
    && !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim())).map((each) => each.outerHTML)"""
UNTOLD = """[...document.querySelectorAll('figure')].filter((each) => !each.querySelector('h3').textContent.trim()
    || !document.getElementById(each.getAttribute('aria-labelledby'))).map((each) => each.dataset.figure)"""


def test_the_page_prints_and_can_be_used_without_a_mouse(
    chromium: Browser, small_page: Path
) -> None:
    with chromium.opened(small_page, scheme="dark") as opened:
        assert len(opened.page.pdf()) > 50_000
        opened.page.emulate_media(media="print")
        assert opened.js("getComputedStyle(document.getElementById('controls')).display") == "none"
        opened.page.emulate_media(media="screen")
        assert opened.js(NAMELESS) == opened.js(UNTOLD) == []
        levels = opened.js(
            "[...document.querySelectorAll('h1, h2, h3')].map((each) => Number(each.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert opened.faults == []


DRAWN = """[...document.querySelectorAll('figure[data-figure]')].filter((each) => !each.hidden).map(({ dataset: { figure } }) =>
    [figure, Boolean(lcaFigures.one(figure)), document.getElementById(`f-${figure}`).clientHeight])"""


@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_every_figure_is_there_when_the_page_is_loaded(
    chromium: Browser, small_page: Path, size: str
) -> None:
    """Printing and photographs wait for no more than that, and nobody scrolls."""
    width, height = SIZES[size]
    context = chromium._chromium.new_context(viewport={"width": width, "height": height})
    try:
        opened = context.new_page()
        opened.goto(small_page.resolve().as_uri(), wait_until="load")
        drawn = opened.evaluate(DRAWN)
        assert len(drawn) > 8
        assert [name for name, there, high in drawn if not there or high < 150] == []
        assert opened.evaluate("document.querySelectorAll('iframe').length") == 0
        assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        context.close()


def test_the_command_line_of_chromium_prints_every_figure(
    chromium: Browser, small_page: Path, tmp_path: Path
) -> None:
    """Without figures, which are vectors or pictures, a page of text is left: text alone has no
    images and a fifth of the bytes.
    """
    assert CHROMIUM.exists()
    printed = tmp_path / "page.pdf"
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--no-pdf-header-footer",
    )
    done = subprocess.run(
        [str(CHROMIUM), *options, f"--print-to-pdf={printed}", small_page.resolve().as_uri()],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-500:]
    figures = part(small_page.read_text(), "data")["figures"]
    # some have nothing to show
    assert printed.read_bytes().count(b"/Subtype /Image") >= len(figures) - 3


def test_bars_of_runs_beside_each_other_have_one_scale_and_the_headline_its_run(
    small: Path, tmp_path: Path
) -> None:
    shutil.copytree(small, tmp_path / "other.lca")
    path = write_report(
        [open_run(small), open_run(tmp_path / "other.lca")], tmp_path / "it.html", losses=["train"]
    )
    text = path.read_text()
    headline = text.split('<section id="headline"')[1].split("</section>")[0]
    assert re.findall(r"<h3><bdi>(.*?)</bdi></h3>", headline) == [
        "small.lca · train",
        "other.lca · train",
    ]
    says(
        Tags(text).text,
        "bars on one scale",
        "share trainings: they differ in how they were measured",
    )
    table = Table(
        title="",
        columns=[Column("", "name"), Column("a", "bar"), Column("b", "bar")],
        rows=[["x", 1.0, -4.0]],
        shared=True,
    )
    assert table.extents == [4.0, 4.0, 4.0]


def test_several_runs_are_compared_first(chromium: Browser, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.lca"
    checkpoints = record(tmp_path / "checkpoints", range(7))
    assert (
        run_lca(
            checkpoints,
            write_task(tmp_path / "t.py"),
            other,
            "--steps",
            "0:4",
            "--durability",
            "none",
        ).exit_code
        == 0
    )
    result = lca("report", small, other, "-o", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    with chromium.opened(tmp_path / "both.html") as opened:
        titles = opened.js(
            "[...document.querySelectorAll('main > section > h2')].map((each) => each.textContent)"
        )
        assert titles.index("Run against run") < titles.index("Loss curve")
        assert opened.source("compare", "runs")["name"] == ["small.lca", "other.lca"]
        assert opened.text("#n-compare") == "small.lca\nother.lca"
        assert opened.faults == []


def test_repeats_are_compared_over_their_labels_whatever_is_shown_in_full(
    chromium: Browser, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lca_posthoc.report.panels.MOST_PANELS", 2)
    for name in ("a0", "a1", "b0", "b1"):
        shutil.copytree(small, tmp_path / f"{name}.lca")
    options = (
        f"first={tmp_path}/a?.lca",
        f"second={tmp_path}/b?.lca",
        "--loss",
        "train",
        "-o",
        tmp_path / "it.html",
    )
    result = lca("report", *options)
    assert result.exit_code == 0, result.output
    says(
        Tags((tmp_path / "it.html").read_text()).text,
        "The first 2 of 4 runs are shown in full",
        "p against the first label",
    )
    with chromium.opened(tmp_path / "it.html") as opened:
        runs = opened.source("compare", "runs")
        assert len(runs["name"]) == 4
        assert len(set(runs["colour"])) == 2
        assert opened.text("#n-compare") == "first\nsecond"
        assert opened.faults == []


def test_long_names_that_differ_in_their_middle_fit_a_phone_and_are_told_apart(
    chromium: Browser, tmp_path: Path
) -> None:
    shapes = {
        f"{module(at)}.{part}": shape
        for at in range(12)
        for part, shape in (("weight", (6, 4)), ("bias", (6,)))
    }
    build(tmp_path / "r.lca", shapes, 4, {"train": None})
    path = write_report([open_run(tmp_path / "r.lca")], tmp_path / "it.html")
    text = path.read_text()
    assert len({tensor["short"] for tensor in part(text, "frames")["tensors"]}) == 12
    assert len(set(part(text, "data")["views"]["peaks"]["0"]["|"]["@ticks"]["y"])) == 12
    for size in SIZES:
        with chromium.opened(path, size) as opened:
            assert opened.js("document.documentElement.scrollWidth <= innerWidth"), size
            titles = opened.js("lcaMicroscope.titles()")
            assert len(set(titles)) == len(titles) == 12
            cut = (
                "[...document.querySelectorAll('tbody th.name')].filter((each) => each.scrollWidth "
                "> each.clientWidth + 1).length"
            )
            assert size != "phone" or opened.js(cut) == 0
            assert opened.faults == []


def test_kernels_under_the_microscope_have_their_whole_names(
    chromium: Browser, tmp_path: Path
) -> None:
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (6, 4)}
    for block in blocks:
        for at in (1, 2):
            shapes |= {
                f"{block}.conv{at}.weight": (6, 4),
                f"{block}.bn{at}.weight": (6,),
                f"{block}.bn{at}.bias": (6,),
            }
    build(tmp_path / "r.lca", shapes, 3, {"train": None})
    path = write_report([open_run(tmp_path / "r.lca")], tmp_path / "it.html")
    kernels = {"conv1", *(f"{block}.conv{at}" for block in blocks for at in (1, 2))}
    for size in SIZES:
        with chromium.opened(path, size) as opened:
            titles = opened.js("lcaMicroscope.titles()")
            assert kernels <= set(titles), size
            assert len(set(titles)) == len(titles)
