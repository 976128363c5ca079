"""Draw every parameter as a pixel: one moment of training, or a film."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..base.colours import FAINT, HURTING, INK, MUTED
from ..base.text import safe_in_figure
from ..errors import InputError, ResourceError
from ..findings.names import fitting
from .style import DIVERGE, SMALL, colour_bar, expect, fresh_figure, heading, note, symmetric, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FILMS = (".mp4", ".gif")
# in inches
_WIDE, _LEFT, _RIGHT = 7.2, 0.5, 0.12
_TALLEST = 2.4  # height of a row of panels
_PICTURES = 4.2  # height of all rows together, approximately
_MANY = 8  # with more modules than this, panels stand closer together
_VECTOR = 0.16  # width of a vector beside a kernel
_TITLE, _GAP = 0.22, 0.12  # height above a row, gap between modules
# a frame counts as visible if a hundredth of its pixels exceed a tenth of the colour scale
_STRONGEST, _SEEN = (
    0.99,
    0.1,
)
_FOOT = 2.3  # height of the colour bar, the loss and a note


def microscope(found: xr.Dataset, *, at: int | None = None, figure: Figure | None = None) -> Figure:
    """Draw one moment of the film: a picture per tensor, on one colour scale, above the loss curve
    with the moment marked.

    Tensors of a module stand side by side, a bias as a narrow column beside its kernel. If there
    are many modules, those without a kernel, such as normalisation, stand behind the kernel they
    follow. Very wide and very narrow pictures are stretched. A pixel is a parameter, or a block of
    parameters of the size in the title.

    Args:
        found: of `findings.microscope`.
        at: index of the frame, from the end if negative; by default the last one with visible
            colours.
        figure: an empty figure to draw in; by default a new one.

    Returns:
        The figure.

    Raises:
        InputError: for a frame that does not exist.
    """
    expect(found, "microscope")
    frames = found.sizes["step"]
    at = _last_seen(found) if at is None else at
    if not -frames <= at < frames:
        raise InputError(
            f"there are {frames} frames, from 0 to {frames - 1}; there is no frame {at}."
        )
    stage = _Stage(found, figure)
    stage.show(at % frames)
    return stage.figure


def _last_seen(finding: xr.Dataset) -> int:
    """Return the last frame whose strongest pixels are visible: at the end of a schedule, frames
    are nearly blank.

    If no frame is visible enough, return the last that is not blank; if all are blank, the last of
    all.
    """
    scale, moved = float(finding.attrs["scale"]), -1
    for frame in reversed(range(finding.sizes["step"])):
        sizes = np.concatenate(
            [np.abs(variable.values[frame]).ravel() for variable in finding.data_vars.values()]
        )
        if float(np.quantile(sizes, _STRONGEST)) > _SEEN * scale:
            return frame
        if moved < 0 and sizes.any():
            moved = frame
    return moved


def film(found: xr.Dataset, path: str | Path, *, fps: int = 10) -> Path:
    """Write all frames as a film.

    Args:
        found: of `findings.microscope`.
        path: a .gif, or an .mp4, which needs ffmpeg.
        fps: frames per second.

    Returns:
        `path`.

    Raises:
        InputError: for any other kind of file, or no frames per second.
        ResourceError: if ffmpeg is missing.
    """
    expect(found, "microscope")
    from matplotlib.animation import FFMpegWriter, PillowWriter

    path = Path(path)
    if path.suffix.lower() not in FILMS:
        raise InputError(f"a film is {' or '.join(FILMS)}, got {path.name!r}.")
    if fps < 1:
        raise InputError(f"a film shows at least one frame per second, got {fps}.")
    if path.suffix.lower() == ".mp4" and not FFMpegWriter.isAvailable():
        raise ResourceError(
            f"{path}: an mp4 needs ffmpeg, which is not on PATH. Install it, or name a "
            f"{path.stem}.gif."
        )
    stage = _Stage(found, Figure())
    stage.figure.set_size_inches(_WIDE, stage.high)
    writer = FFMpegWriter(fps=fps) if path.suffix.lower() == ".mp4" else PillowWriter(fps=fps)
    with writer.saving(stage.figure, str(path), dpi=150):
        for frame in range(found.sizes["step"]):
            stage.show(frame)
            writer.grab_frame()
    return path


class _Stage:
    """A figure that is laid out once and then shows frames; positions are in inches."""

    def __init__(self, finding: xr.Dataset, figure: Figure | None) -> None:
        self.found = finding
        rows = _rows(finding, _modules(finding))
        self.titles, self.letter = _titles(finding, rows)
        heights = [min(_TALLEST, unit) for unit in _units(finding, rows)]
        self.high = sum(heights) + _TITLE * len(rows) + _FOOT
        self.figure = fresh_figure(figure, _WIDE, self.high)
        self.figure.set_layout_engine("none")
        norm = symmetric(scale=float(finding.attrs["scale"]))
        self.images: dict[str, AxesImage] = {}
        top = self.high
        for row, height, unit in zip(rows, heights, _units(finding, rows), strict=True):
            top -= height + _TITLE
            self._row(row, top, height, unit, norm)
        shown = next(iter(self.images.values()))
        bar = self._axes(_LEFT + 1.6, top - 0.27, _WIDE - _LEFT - _RIGHT - 3.2, 0.09)
        colour_bar(shown, bar, "Σ allocation (units of loss)", below=True, into=bar)
        ax = self._axes(_LEFT, 0.55, _WIDE - _LEFT - _RIGHT, 0.8)
        self.mark, self.dot = _loss(ax, finding)
        self.when = ax.set_title("", fontsize=SMALL, loc="right", color=HURTING)
        note(self.figure, finding)

    def _axes(self, start: float, bottom: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (start / _WIDE, bottom / self.high, width / _WIDE, height / self.high)
        )

    def _row(
        self, row: list[list[str]], bottom: float, height: float, unit: float, norm: Normalize
    ) -> None:
        """Draw a row of modules, each as wide as its aspect times `unit`; vectors within a module
        are narrow.
        """
        start = _LEFT
        for module in row:
            room = unit * _aspect(self.found, module)
            kernels = sum(_extent(self.found, name)[1] > 1 for name in module)
            vectors = len(module) - kernels
            thin = min(_VECTOR, 0.45 * room / max(1, vectors)) if kernels else room / len(module)
            broad = (room - thin * vectors) / max(1, kernels)
            place = start
            for name in module:
                width = broad if _extent(self.found, name)[1] > 1 else thin
                ax = self._axes(place, bottom, width - (0.03 if name != module[-1] else 0), height)
                self.images[name] = _picture(ax, self.found[name], norm)
                if name == module[0]:
                    ax.set_title(
                        self.titles[name], fontsize=self.letter, pad=2, loc="left", color=INK
                    )
                place += width
            start += room + _GAP

    def show(self, frame: int) -> None:
        finding = self.found
        for name, image in self.images.items():
            image.set_data(finding[name].isel(step=frame).values)
        start, end = finding["step"].values[frame], finding["step_end"].values[frame]
        self.mark.set_x(start)
        self.mark.set_width(end - start)
        self.dot.set_data([end], [finding["step:loss_end"].values[frame]])
        self.when.set_text(f"training steps {start:,} → {end:,}")


def _modules(finding: xr.Dataset) -> list[list[str]]:
    """Return the tensors of each module, in the model's order; if there are many modules, join
    those without a kernel to the one before.
    """
    modules: dict[str, list[str]] = {}
    for name in map(str, finding.data_vars):
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    if len(modules) <= _MANY:
        return list(modules.values())
    joined: list[list[str]] = []
    for module in modules.values():
        if joined and not any(_extent(finding, name)[1] > 1 for name in module):
            joined[-1] = joined[-1] + module
        else:
            joined.append(module)
    return joined


def _extent(finding: xr.Dataset, name: str) -> tuple[int, int]:
    rows, columns = (finding.sizes[f"{name}:{axis}"] for axis in ("row", "column"))
    return rows, columns


def _aspect(finding: xr.Dataset, module: Iterable[str]) -> float:
    """Return width over height of a module's panel: that of its kernel, clipped to avoid extreme
    shapes.
    """
    ratios = [
        columns / rows
        for rows, columns in (_extent(finding, name) for name in module)
        if columns > 1
    ]
    return float(np.clip(max(ratios, default=0.3), 0.3 if not ratios else 1.0, 4.0))


def _height(finding: xr.Dataset, row: list[list[str]]) -> float:
    room = _WIDE - _LEFT - _RIGHT - _GAP * (len(row) - 1)
    return min(_TALLEST, room / sum(_aspect(finding, module) for module in row))


def _units(finding: xr.Dataset, rows: list[list[list[str]]]) -> list[float]:
    """Return the width in inches of a module of aspect 1, for each row.

    Modules share the width of the figure, but the last row is no wider than the one above it.
    """
    units = [
        (_WIDE - _LEFT - _RIGHT - _GAP * (len(row) - 1))
        / sum(_aspect(finding, module) for module in row)
        for row in rows
    ]
    return [*units[:-1], min(units[-2:])]


def _rows(finding: xr.Dataset, modules: list[list[str]]) -> list[list[list[str]]]:
    """Fill rows with modules like lines of a paragraph, at the width that brings their total height
    nearest to `_PICTURES`.
    """
    layouts = [
        _broken(finding, modules, width) for width in (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
    ]
    return min(
        layouts, key=lambda rows: abs(sum(_height(finding, row) for row in rows) - _PICTURES)
    )


def _broken(finding: xr.Dataset, modules: list[list[str]], width: float) -> list[list[list[str]]]:
    rows: list[list[list[str]]] = [[]]
    for module in modules:
        if rows[-1] and sum(_aspect(finding, member) for member in [*rows[-1], module]) > width:
            rows.append([])
        rows[-1].append(module)
    return rows


def _picture(ax: Axes, variable: xr.DataArray, norm: Normalize) -> AxesImage:
    empty = np.zeros(variable.shape[1:], "float32")
    image = ax.imshow(empty, cmap=DIVERGE, norm=norm, aspect="auto", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_linewidth(0.4)
        spine.set_color(FAINT)
    return image


def _titles(finding: xr.Dataset, rows: list[list[list[str]]]) -> tuple[dict[str, str], float]:
    """Return the titles of panels by their first tensor, and the font size: name and shape, or the
    module's name in smaller letters where panels are narrow.
    """
    first, widths = [module[0] for row in rows for module in row], list[float]()
    for row, unit in zip(rows, _units(finding, rows), strict=True):
        widths += [unit * _aspect(finding, module) * 72 for module in row]
    size = SMALL - 0.5
    letters = [int(width / (0.62 * size)) for width in widths]
    whole = []
    for name in first:
        shape = "×".join(
            str(extent) for extent in finding[name].attrs.get("shape", _extent(finding, name))
        )
        pool = [int(block) for block in finding[name].attrs.get("pool", (1, 1))]
        whole.append(
            f"{name}  {shape}" + (f", {pool[0]}×{pool[1]} a pixel" if pool != [1, 1] else "")
        )
    if any(len(text) > most for text, most in zip(whole, letters, strict=True)):
        size = SMALL - 1.5
        # titles may extend over the gap
        letters = [int((width + 0.7 * _GAP * 72) / (0.62 * size)) for width in widths]
        whole = fitting([name.rpartition(".")[0] or name for name in first], letters)
    return dict(zip(first, map(safe_in_figure, whole), strict=True)), size


def _loss(ax: Axes, finding: xr.Dataset) -> tuple[Any, Any]:
    x = np.append(finding["step"].values[:1], finding["step_end"].values)
    ax.plot(
        x,
        np.append(finding["step:loss_start"].values[:1], finding["step:loss_end"].values),
        color=INK,
        linewidth=1,
    )
    mark = ax.axvspan(x[0], x[1], color=HURTING, alpha=0.25, linewidth=0)
    (dot,) = ax.plot(x[:1], finding["step:loss_end"].values[:1], "o", color=HURTING, markersize=3.5)
    tidy(ax, x="training step", y="loss")
    ax.set_title(heading(finding), loc="left", fontsize=SMALL, color=MUTED)
    return mark, dot
