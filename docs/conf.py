"""How the site is built: `sphinx-build -W --keep-going -n docs OUT`. Nothing is fetched from a
network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import lca_posthoc

ROOT = Path(__file__).parents[1]

project = "lca_posthoc"
release = lca_posthoc.__version__
html_title = f"{project} {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
# formulas between dollar signs, which GitHub shows too
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
# the callbacks' own trainers, which need not be installed
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
nitpicky = True
nitpick_ignore_regex = [
    # other libraries' names
    ("py:class", r"(collections|pathlib|torch|xarray|xr|matplotlib)\..*|Axes|Figure"),
]

html_theme = "alabaster"
html_theme_options = {
    "description": "Which weights did the learning, from saved checkpoints of every iterate",
    "page_width": "1240px",
    "body_max_width": "none",
    "sidebar_width": "240px",
    "font_family": "system-ui, sans-serif",
    "head_font_family": "system-ui, sans-serif",
}
html_show_copyright = False
html_static_path = ["_static"]  # custom.css, which the theme takes by its name

_LITERAL = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_EMPHASIS = re.compile(
    r"(?<!\w)\*(?P<words>[^\s*|]|[^\s*|][^*|\n]*[^\s*|])\*(?!\w)|\*(?=\S)|[|\\]|_\b|(?<=\w)[:@](?=[\w/])"
)
_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def restructured(text: str) -> str:
    """Docstrings and help are plain text with `code` in backticks and in fences; this makes
    reStructuredText of it.
    """
    found, at = [], 0
    for fence in _FENCE.finditer(text):
        indent, language, code = fence.groups()
        body = "".join(
            f"   {line}" if line.strip() else line for line in code.splitlines(keepends=True)
        )
        found += [
            _inline(text[at : fence.start()]),
            f"{indent}.. code-block:: {language}\n\n{body}",
        ]
        at = fence.end()
    return "".join((*found, _inline(text[at:])))


def _inline(text: str) -> str:
    found, at = [], 0
    for literal in _LITERAL.finditer(text):
        found += [_escaped(text[at : literal.start()]), f"``{literal[2]}``"]
        at = literal.end()
    return "".join((*found, _escaped(text[at:])))


def _escaped(text: str) -> str:
    return _EMPHASIS.sub(lambda found: found[0] if found["words"] else f"\\{found[0]}", text)


def docstring(
    app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]
) -> None:
    """Before napoleon, which makes fields of the sections."""
    lines[:] = restructured("\n".join(lines)).split("\n")


def help_text(app: Sphinx, context: Any, lines: list[str]) -> None:
    """What `lca COMMAND --help` says; the examples in it, which sphinx-click gives as lines that
    begin with a bar, as code.
    """
    lines[:] = [line for each in _parts(lines) for line in each]


def _parts(lines: list[str]) -> Iterator[list[str]]:
    example: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("| "):
            example.append(f"   {line[2:]}")
            continue
        if example:
            yield [".. code-block:: sh", "", *example, ""]
            example = []
        yield [_inline(line)]


def options_text(app: Sphinx, context: Any, lines: list[str]) -> None:
    """The help of each option; what sphinx-click adds (directives, `:default:`, `**Required**`)
    stays as it is.
    """
    for at, line in enumerate(lines):
        # sphinx-click takes brackets off the ends
        if option := re.fullmatch(r"( *\.\. option:: .*<)(.*)>", line):
            shape = option[2]
            before, after = (
                "[" * (shape.count("]") - shape.count("[")),
                "]" * (shape.count("[") - shape.count("]")),
            )
            lines[at] = f"{option[1]}{before}{shape}{after}>"
        elif not re.match(r" *(\.\.|:\w+:|$)", line):
            before, required, text = line.rpartition("**Required** ")
            lines[at] = before + required + _inline(text)


def formula(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line as MathML, which browsers typeset without any script.

    Raises:
        SkipNode: always, because the node is written.
    """
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def displayed_formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own as MathML.

    Raises:
        SkipNode: always, because the node is written.
    """
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def outside(app: Sphinx, document: Any) -> None:
    """Links from a page to README.md and its like at the top of the repository lead to their pages
    of the site.
    """
    for link in document.findall(addnodes.pending_xref):
        target = Path(str(link["reftarget"]))
        if target.parent == ROOT:
            link["reftarget"] = f"project/{target.name}"


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", docstring, priority=100)
    app.connect("sphinx-click-process-description", help_text)
    app.connect("sphinx-click-process-options", options_text)
    app.connect("doctree-read", outside)
    app.add_html_math_renderer("mathml", (formula, None), (displayed_formula, None))
