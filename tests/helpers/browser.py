"""Pages opened in Debian's chromium, with everything that goes wrong in them or leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
_QUIET = (
    *(
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
    ),
    *("--disable-sync", "--no-first-run", "--disable-quic"),
)
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


class Page:
    """An open page, and its `faults`: errors and warnings of the console, exceptions, requests for
    anything but the file.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.faults, self.requests = page, list[str](), list[str]()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on(
            "dialog",
            lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        )
        page.on("request", lambda request: self._asked(request.url, url))
        page.goto(url)
        page.wait_for_selector("html[data-ready]", timeout=120_000)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _asked(self, asked: str, url: str) -> None:
        self.requests.append(asked)
        if asked != url and not asked.startswith(("data:", "blob:")):
            self.faults.append(f"request: {asked}")

    def text(self, selector: str) -> str:
        """What the first visible element says."""
        return str(self.page.locator(f"{selector} >> visible=true").first.inner_text()).strip()

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())

    def js(self, expression: str, given: Any = None) -> Any:
        return self.page.evaluate(expression, given)

    def picture(self) -> str:
        """What the microscope shows."""
        return str(self.js("document.getElementById('picture').toDataURL()"))

    def source(self, figure: str, name: str) -> dict[str, Any]:
        """The data a figure draws."""
        return dict(
            self.js(
                """([figure, name]) => Object.fromEntries(Object.entries(lcaFigures.one(figure).document.get_model_by_name(name).data)
                .map(([key, column]) => [key, Array.from(column, (each) => ArrayBuffer.isView(each) ? Array.from(each) : each)]))""",
                [figure, name],
            )
        )


class Browser:
    """Chromium, running."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    @contextmanager
    def opened(self, path: Path, size: str = "desktop", scheme: str = "light") -> Iterator[Page]:
        """A file, on a screen of that size and in that colour scheme."""
        width, height = SIZES[size]
        context = self._chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=size == "phone",
        )
        try:
            yield Page(context.new_page(), path.resolve().as_uri())
        finally:
            context.close()


@contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, started and stopped; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=list(_QUIET))
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
