"""The site: it builds without a warning or a network, its links lead somewhere, and it has every
page, command and public name.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import lca_posthoc
from lca_posthoc import findings, plots
from lca_posthoc.base.declarations import declared_findings
from lca_posthoc.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
]
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^.*<|>$")  # around the page, where the entry has a title of its own
LINK = re.compile(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)")
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there


class Page(HTMLParser):
    """What a page can be linked at, what it links to, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.fetched = {""}, list[str](), list[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])
        elif tag == "link" and "href" in given:
            self.fetched.append(given["href"])


@functools.cache
def page(path: Path) -> Page:
    return Page(path)


def lost(place: Path) -> list[str]:
    """Every link, picture, style and script of the pages in a directory that leads to nothing in
    it; other hosts' pages aside.
    """
    found = []
    for path in sorted(place.rglob("*.html")):
        for link in (*page(path).links, *page(path).fetched):
            to = urlsplit(link)
            if to.scheme or to.netloc:
                wrong = to.scheme not in ("http", "https") or link in page(path).fetched
            else:
                target = (path.parent / unquote(to.path)).resolve() if to.path else path
                known = (
                    page(target).anchors if target.suffix == ".html" and target.is_file() else {""}
                )
                wrong = not target.is_file() or unquote(to.fragment) not in known
            if wrong:
                found.append(f"{path.relative_to(place)}: {link}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    build = [
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-d",
        place / "doctrees",
        DOCS,
        place / "site",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, build)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": NOWHERE, "https_proxy": NOWHERE},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return place / "site"


def test_every_link_leads_to_a_page_and_a_place_in_it(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) >= len(list(DOCS.rglob("*.md")))
    assert lost(site) == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    """The test above can fail."""
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"></a><a href="b.html#there"></a><a '
        'href="https://example.org/x"></a><a href="#no"></a>'
        '<a href="b.html#no"></a><a href="c.html"></a><img src="no.png"><script '
        'src="https://example.org/x.js"></script>'
        '<link rel="stylesheet" href="no.css"><a href="FILE:FUNCTION"></a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there"></h1>')
    wrong = [
        "#no",
        "b.html#no",
        "c.html",
        "FILE:FUNCTION",
        "no.png",
        "https://example.org/x.js",
        "no.css",
    ]
    assert lost(tmp_path) == [f"a.html: {link}" for link in wrong]


def test_every_page_is_in_the_table_of_contents_and_the_index_shows_it_on_github_too() -> None:
    index = DOCS / "index.md"
    entries = [line for tree in TOCTREE.findall(index.read_text()) for line in tree.splitlines()]
    listed = [f"{ENTRY.sub('', line)}.md" for line in entries if line and not line.startswith(":")]
    assert len(listed) == len(set(listed))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} == {"index.md", *listed}
    shown = {re.sub(r"^\.\./", "project/", link) for link in LINK.findall(index.read_text())}
    assert shown == set(listed)


def test_links_between_pages_lead_to_files_of_the_repository() -> None:
    """As GitHub follows them, from the pages as they are."""
    for source in SOURCES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", source.read_text()):
            assert urlsplit(link).scheme or (source.parent / link).exists(), (source, link)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_section_with_all_its_options(site: Path, name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [
        each.lstrip("-")
        for option in command.params
        if isinstance(option, click.Option)
        for each in option.opts
    ]
    text = unescape(re.sub(r"<[^>]*>", "", (site / "reference" / "cli.html").read_text()))
    shapes = [
        option.metavar
        for option in command.params
        if isinstance(option, click.Option) and option.metavar
    ]
    assert [shape for shape in shapes if f"<{shape}>" not in text] == []
    wanted = {f"lca-{name}", *(f"cmdoption-lca-{name}-{option}" for option in options)}
    assert wanted - page(site / "reference" / "cli.html").anchors == set()


def test_every_public_name_is_described(site: Path) -> None:
    anchors = page(site / "reference" / "python.html").anchors
    wanted = [
        f"lca_posthoc.{name}" for name in lca_posthoc.__all__ if name not in ("findings", "plots")
    ]
    wanted += [f"lca_posthoc.{module}" for module in ("findings", "plots")]
    wanted = [
        f"{'module-' if name.endswith(('findings', 'plots')) else ''}{name}" for name in wanted
    ]
    wanted += [
        f"{module.__name__}.{name}" for module in (findings, plots) for name in module.__all__
    ]
    assert [name for name in wanted if name not in anchors] == []


def test_the_gallery_lists_every_example() -> None:
    text = (DOCS / "gallery.md").read_text()
    assert [
        path.name
        for path in (DOCS / "examples").iterdir()
        if path.suffix in (".py", ".ipynb") and f"(examples/{path.name})" not in text
    ] == []


def test_the_gallery_has_every_figure_with_the_line_that_makes_it() -> None:
    text = (DOCS / "gallery.md").read_text()
    lines = re.findall(r"^lca plot .*? (\w+)(?: --.*)? -o (\w+)\.png$", text, re.MULTILINE)
    assert lines == [(name, name) for name in declared_findings()]
    shown = re.findall(r"^!\[\w+\]\(images/figures/(\w+)\.png\)$", text, re.MULTILINE)
    assert shown == list(declared_findings())


def test_pictures_load_fast() -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / "images").rglob("*.*")}
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}


def test_no_page_names_a_path_of_the_machine_it_was_built_on(site: Path) -> None:
    paths = [str(ROOT), str(site.parent), sys.prefix]
    for path in (*SOURCES, *site.rglob("*.html"), *site.rglob("*.js")):
        text = path.read_text()
        assert [word for word in paths if word in text] == [], path
