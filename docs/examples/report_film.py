"""The microscope of the report at work, as a picture that moves.

```sh
python docs/examples/report_film.py OUT
```

Trains the network of `lca demo` on the digits that ship with the package, replays its first 150
iterates, writes `OUT/report.html`, opens it in Debian's chromium (`pip install playwright`), and
pictures the microscope's frames into `OUT/report_film.gif`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import lca_posthoc as lca
from lca_posthoc.demo import train
from lca_posthoc.report import write_report

CHROMIUM = "/usr/bin/chromium"
SCREEN = {"width": 1000, "height": 640}
EVERY = 3  # frames of the microscope between two pictures
COLOURS = 128  # of the whole film
SHOWN, LAST = 150, 2500  # how long a picture is shown, in milliseconds


def pictures(report: Path) -> list[Image.Image]:
    """Return the microscope of a report at every third of its frames, as a browser shows it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SCREEN)
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        slider = page.locator("#frame")
        frames = int(slider.get_attribute("max") or 0) + 1
        shots = []
        for frame in range(0, frames, EVERY):
            slider.fill(str(frame))
            slider.blur()
            shots.append(page.locator("#microscope .scope").screenshot())
        browser.close()
    return [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]


def write_film(frames: list[Image.Image], path: Path) -> None:
    """Write pictures as a GIF with one palette, taken from the first, middle and last of them."""
    width, height = frames[0].size
    samples = Image.new("RGB", (width, 3 * height))
    for row, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        samples.paste(frame, (0, row * height))
    palette = samples.quantize(COLOURS, dither=Image.Dither.NONE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown = [SHOWN] * len(others) + [LAST]
    first.save(path, save_all=True, append_images=others, duration=shown, loop=0, optimize=True)


def main(out: Path) -> None:
    """Train, replay, write the report, and film its microscope."""
    train(out / "checkpoints")
    run = lca.run(
        out / "checkpoints",
        "lca_posthoc.demo:task",
        out=out / "run.lca",
        losses=["train"],
        cluster="inline",
        steps="0:150",
    )
    frames = pictures(write_report([run], out / "report.html"))
    write_film(frames, out / "report_film.gif")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
