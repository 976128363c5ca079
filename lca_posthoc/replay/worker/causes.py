"""The causes of the motion on a segment: what the checkpoints say of the optimiser's steps, and the
points the formulas need.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.headers import Header, TensorHeader, read_header, tensor_places
from ...checkpoints.optimizer_steps import (
    FIRST,
    SECOND,
    OptimizerStep,
    moments_of,
    optimizer_step_in,
)
from ...checkpoints.paths import is_remote
from ...errors import InputError, SpanError
from .passed import Passed
from .state import checkpoint_at

if TYPE_CHECKING:
    from torch import Tensor

    from ...numerics.causes import Moments, SegmentCauses, StoredMoments
    from ...numerics.objective import Objective
    from ..requests import StoredPoints


class CausesOfSpan:
    """Tells the causes of the motion on the segments of a span.

    Args:
        points: the checkpoints, the one before the span among them where there is one.
        passed: those that the replay has gone through.
        objective: evaluates the losses.
        signal: the training loss.
    """

    def __init__(
        self, points: StoredPoints, passed: Passed, objective: Objective, signal: str
    ) -> None:
        self._points, self._passed, self._objective = points, passed, objective
        self._signal = signal
        # names in the files → of the model
        self._names = {source: name for name, source in points.names.items()}
        # both ends of a segment, each of which is one of the next one too
        self._headers = functools.lru_cache(2)(functools.partial(_headers_at, points))
        self._moments_of = functools.lru_cache(2)(self._moments_at)

    def of(self, index: int) -> SegmentCauses:
        """Return the causes of the motion from a checkpoint on, which has gone by."""
        from ...numerics.causes import SegmentCauses, formulas

        moments, stored = self._moments(index)
        by_source = formulas(
            self._step(index + 1),
            self._step(index),
            self._points.checkpoints[index].step,
            stored,
        )
        follows = any(formula.follows_motion for formula in by_source.values())
        return SegmentCauses(
            self._signal,
            {
                self._names[source]: formula
                for source, formula in by_source.items()
                if source in self._names
            },
            self._passed.at(index),
            self._passed.at(index - 1) if follows else None,
            moments,
            self._spacing(index),
        )

    def _spacing(self, index: int) -> Callable[[str], float]:
        """Return what tells, of a tensor, the distance from 1 to the next number of the type that a
        checkpoint stores it in.
        """
        import torch

        from ...checkpoints.reading import DTYPES

        types = {
            name: stored.dtype
            for header in self._headers(index).values()
            for name, stored in header.tensors.items()
        }
        return lambda name: torch.finfo(DTYPES[types[self._points.names[name]]]).eps

    def _step(self, index: int) -> OptimizerStep | None:
        """Return the record of the step that led to a checkpoint, where it followed on the
        checkpoint before; None otherwise.
        """
        before = self._points.checkpoints.get(index - 1)
        if before is None:
            return None
        try:
            step = optimizer_step_in(self._headers(index))
        except InputError as error:
            raise SpanError(str(error)) from None
        return step if step is not None and step.since == before.step else None

    def _moments_at(self, index: int) -> _MomentsFile:
        """Return the moments of a checkpoint, on the device of the objective."""
        checkpoint = checkpoint_at(self._points, index)
        shapes = {
            name: stored.shape
            for header in self._headers(index).values()
            for name, stored in header.tensors.items()
        }
        try:
            path = moments_of(checkpoint)
            return _MomentsFile(path, checkpoint.step, self._objective, shapes)
        except InputError as error:
            raise SpanError(str(error)) from None

    def _moments(self, index: int) -> tuple[Moments, StoredMoments]:
        """Return the moments around the segment from a checkpoint on, and which there are."""
        from ...numerics.causes import Moments, StoredMoments

        before, after = (self._moments_of(place) for place in (index, index + 1))
        sources = self._points.names
        return (
            Moments(
                first_before=lambda name: before.tensor(FIRST + sources[name]),
                first_after=lambda name: after.tensor(FIRST + sources[name]),
                second_before=lambda name: before.tensor(SECOND + sources[name]),
                second_after=lambda name: after.tensor(SECOND + sources[name]),
            ),
            StoredMoments(
                first_before=before.tensors(FIRST),
                first_after=after.tensors(FIRST),
                second_before=before.tensors(SECOND),
                second_after=after.tensors(SECOND),
            ),
        )


def _headers_at(points: StoredPoints, index: int) -> dict[Path, Header]:
    """Return the headers of a checkpoint's files."""
    try:
        return {path: read_header(path) for path in checkpoint_at(points, index).files}
    except InputError as error:
        raise SpanError(str(error)) from None


def _refuse_other_shapes(
    path: Path, stored: Mapping[str, TensorHeader], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse moments that have other shapes than the tensors they are of."""
    for entry, header in stored.items():
        for name in (entry.removeprefix(FIRST), entry.removeprefix(SECOND)):
            if name != entry and name in shapes and shapes[name] != header.shape:
                raise InputError(
                    f"{path} holds moments of shape {list(header.shape)} of tensor {name!r}, which "
                    f"has shape {list(shapes[name])} in the checkpoint. They are of another model; "
                    "save them again, or take the file away: what needs moments is then in rest."
                )


class _MomentsFile:
    """The moments of one step, each of which is read when it is asked for.

    Args:
        path: of the file; None where there is none.
        step: of the checkpoint it belongs to.
        objective: on whose device tensors are.
        shapes: of the tensors of the checkpoint.

    Raises:
        InputError: where the file cannot be read, or its moments are of tensors of other shapes.
    """

    def __init__(
        self,
        path: Path | None,
        step: int,
        objective: Objective,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._path, self._step, self._objective = path, step, objective
        self._tensors = frozenset[str]()
        if path is not None:
            stored = read_header(path).tensors
            _refuse_other_shapes(path, stored, shapes)
            self._tensors = frozenset(stored)
        self._places: dict[str, tuple[TensorHeader, range]] | None = None
        self._whole: dict[str, Tensor] | None = None

    def tensors(self, prefix: str) -> frozenset[str]:
        """Return the names of the tensors that moments of a prefix are stored of."""
        return frozenset(
            name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)
        )

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor on the device; None where the file has none of this name."""
        from safetensors import SafetensorError

        if self._path is None or name not in self._tensors:
            return None
        try:
            return self._read(self._path, name).to(self._objective.device)
        except (OSError, InputError, SafetensorError) as error:
            raise SpanError(
                f"cannot read {self._path} (step {self._step}): {error}. Restore the file and run "
                "again."
            ) from None

    def _read(self, path: Path, name: str) -> Tensor:
        from ...checkpoints.reading import fingerprint_and_tensors, read_place

        if is_remote(path) or sys.byteorder == "big":  # read whole, then
            if self._whole is None:
                _, self._whole = fingerprint_and_tensors(path, self._step, self._tensors)
            return self._whole[name]
        with path.open("rb") as file:
            if self._places is None:  # a header takes longer to parse than a tensor to read
                self._places = tensor_places(path, file)
            return read_place(file, *self._places[name])
