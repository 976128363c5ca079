"""The causes of the motion on a segment: what the checkpoints say of the optimiser's steps, and the
points the formulas need.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoints.headers import (
    Header,
    TensorHeader,
    read_header,
    size_and_fingerprint,
    tensor_places,
)
from ...checkpoints.optimizer_steps import (
    FIRST,
    SECOND,
    MomentsRecord,
    OptimizerStep,
    about_other_moments,
    optimizer_step_in,
    record_of_moments,
)
from ...checkpoints.paths import is_remote
from ...checkpoints.trajectory import Checkpoint
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
            return _MomentsFile(checkpoint, self._objective, shapes)
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
        checkpoint: they belong to, with the record of their file.
        objective: on whose device tensors are.
        shapes: of the tensors of the checkpoint.

    Raises:
        InputError: where the file cannot be read, or its moments are of tensors of other shapes.
        SpanError: where the file is not the one that is recorded.
    """

    def __init__(
        self, checkpoint: Checkpoint, objective: Objective, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._checkpoint, self._path = checkpoint, checkpoint.moments_file
        self._objective = objective
        self._tensors = frozenset[str]()
        self._refuse_other(record_of_moments(self._path))
        if checkpoint.moments is not None:
            stored = read_header(self._path).tensors
            _refuse_other_shapes(self._path, stored, shapes)
            self._tensors = frozenset(stored)
        self._places: dict[str, tuple[TensorHeader, range]] | None = None
        self._whole: dict[str, Tensor] | None = None

    def tensors(self, prefix: str) -> frozenset[str]:
        """Return the names of the tensors that moments of a prefix are stored of."""
        return frozenset(
            name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)
        )

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor on the device; None where the file has none of this name.

        Raises:
            SpanError: where the file cannot be read, or is not the one that is recorded.
        """
        from safetensors import SafetensorError

        if name not in self._tensors:
            return None
        try:
            return self._read(name).to(self._objective.device)
        except (OSError, InputError, SafetensorError) as error:
            raise SpanError(
                f"cannot read {self._path} (step {self._checkpoint.step}): {error}. Restore the "
                "file and run again."
            ) from None

    def _read(self, name: str) -> Tensor:
        from ...checkpoints.reading import fingerprint_and_tensors, read_place

        recorded = self._checkpoint.moments
        assert recorded is not None, "where no file is recorded none is read"
        if is_remote(self._path) or sys.byteorder == "big":  # read whole, then
            if self._whole is None:
                own, whole = fingerprint_and_tensors(
                    self._path, recorded.fingerprint, self._tensors
                )
                self._refuse_other(replace(recorded, fingerprint=own))
                self._whole = whole
            return self._whole[name]
        with self._path.open("rb") as file:
            if self._places is None:  # a header takes longer to parse than a tensor to read
                self._places = tensor_places(self._path, file)
            tensor = read_place(file, *self._places[name])
            # after the tensor was read: it is that of the file it is from
            self._refuse_other(MomentsRecord(*size_and_fingerprint(self._path, file)))
        return tensor

    def _refuse_other(self, now: MomentsRecord | None) -> None:
        """Refuse a file, or that there is none, where something else is recorded."""
        checkpoint = self._checkpoint
        if now != checkpoint.moments:
            raise SpanError(
                about_other_moments(self._path, checkpoint.step, checkpoint.moments, now)
            )
