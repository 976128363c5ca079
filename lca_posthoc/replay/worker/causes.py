"""Compute the causes of the motion on a segment from the records of the optimiser's steps."""

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
    """Computes the causes of the motion on the segments of a span.

    Args:
        points: the checkpoints, with the one before the span if there is one.
        passed: those that the replay has gone through.
        objective: evaluates the losses.
        signal: the training loss.
    """

    def __init__(
        self, points: StoredPoints, passed: Passed, objective: Objective, signal: str
    ) -> None:
        self._points, self._passed, self._objective = points, passed, objective
        self._signal = signal
        # names in the files → names of the model
        self._names = {source: name for name, source in points.names.items()}
        # two, because each end of a segment is also an end of the next one
        self._headers = functools.lru_cache(2)(functools.partial(_headers_at, points))
        self._moments_of = functools.lru_cache(2)(self._moments_at)

    def of(self, index: int) -> SegmentCauses:
        """Return the causes of the motion on the segment from a checkpoint that the replay has
        passed.
        """
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
        """Return a function of a tensor's name: the distance from 1 to the next number of its
        stored type.
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
        """Return the record of the step that led to a checkpoint from the one before it; None
        otherwise.

        Raises:
            SpanError: if the record cannot be read.
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
        """Return the moments of a checkpoint, on the device of the objective.

        Raises:
            SpanError: if the file cannot be read.
        """
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
        """Return the moments around the segment from a checkpoint, and which of them are stored."""
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
    """Return the headers of a checkpoint's files.

    Raises:
        SpanError: if a file cannot be read.
    """
    try:
        return {path: read_header(path) for path in checkpoint_at(points, index).files}
    except InputError as error:
        raise SpanError(str(error)) from None


def _refuse_other_shapes(
    path: Path, stored: Mapping[str, TensorHeader], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Reject moments whose shapes differ from those of their tensors.

    Raises:
        InputError: naming the tensor.
    """
    for entry, header in stored.items():
        for name in (entry.removeprefix(FIRST), entry.removeprefix(SECOND)):
            if name != entry and name in shapes and shapes[name] != header.shape:
                raise InputError(
                    f"{path} holds moments of shape {list(header.shape)} of tensor {name!r}, which "
                    f"has shape {list(shapes[name])} in the checkpoint. They are of another model; "
                    "save them again, or remove the file: rest then includes what needs moments."
                )


class _MomentsFile:
    """The moments of one step, each read when it is asked for.

    Args:
        checkpoint: the one they belong to, with the record of their file.
        objective: on whose device tensors are.
        shapes: of the tensors of the checkpoint.

    Raises:
        InputError: if the file cannot be read, or its moments have other shapes than their tensors.
        SpanError: if the file is not the recorded one.
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
        """Return the names of the tensors for which moments with a prefix are stored."""
        return frozenset(
            name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix)
        )

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor on the device; None if the file has none of this name.

        Raises:
            SpanError: if the file cannot be read, or is not the recorded one.
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
        if is_remote(self._path) or sys.byteorder == "big":  # then read the whole tensor
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
            # after reading, so that the record is of the file that was read
            self._refuse_other(MomentsRecord(*size_and_fingerprint(self._path, file)))
        return tensor

    def _refuse_other(self, now: MomentsRecord | None) -> None:
        """Reject a file that differs from the recorded one, or is missing.

        Raises:
            SpanError: naming the file.
        """
        checkpoint = self._checkpoint
        if now != checkpoint.moments:
            raise SpanError(
                about_other_moments(self._path, checkpoint.step, checkpoint.moments, now)
            )
