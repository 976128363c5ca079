"""Save every iterate of a training run while it proceeds."""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..base.locks import DirectoryLock
from ..base.text import count
from ..checkpoints.layouts import MOMENTS
from ..checkpoints.paths import here, nearest
from ..checkpoints.recorded import (
    SIGN,
    RecorderSign,
    make_directory,
    segments_between,
    steps_there,
    write_sign,
)
from ..checkpoints.trajectory import reserved
from ..errors import InputError, LCAError, ResourceError, amount, few
from .moments import MomentStager
from .optimizer_guard import Takeover, Trainers, trains
from .optimizer_numbers import StepNumbers, clip_factor, stateful
from .outermost import Call, Outermost, Told, can_follow, runs_hooks
from .ring import Bound, Ring
from .staging import Contents, Layout, Stager, refuse_flattened
from .writer import Writer


class Recorder:
    """Save a model's parameters and persistent buffers, one safetensors file per optimiser step.

    `save` copies them into memory and returns. A thread writes each file under a temporary name and
    renames it, so that an existing file is complete even if training is killed. At most three
    iterates, or 64 MiB, wait in memory; a disk slower than training slows training down, and
    nothing is left out. Files are flushed to the disk once a second, and at `flush` and `close`: a
    power failure may damage those of the last second. If an iterate cannot be written, the next
    `save`, `flush` or `close` raises the error.

    If several processes train together (`torch.distributed`), each makes a recorder and the first
    one writes.

    Args:
        directory: created with the first iterate; receives `step_00000000.safetensors` and so on. A
            directory that already holds iterates is continued: a step it has must have the same
            weights, and its file is not rewritten.
        model: the module that is trained; tied tensors are written once, under their first name.
            Keep it in float32 (under `torch.autocast` it is): fewer bits lose most of the motion.
        every: record only the steps that are multiples of it.
        bursts: `(every, length)`: record `length` consecutive iterates every `every` steps,
            starting at step 0. A replay uses the bursts and skips the gaps between them.
        steps: record only these steps.
        until: record only steps up to this one.
        frozen: whether to write parameters that have no gradient when recording starts. Buffers are
            always written.
        on_full: "stop" raises an error if the disk is full; "pause" lets training continue and
            leaves iterates out, with a warning, until there is space.
        at_most: the number of iterates, or of bytes such as "20 GB", that may wait for a replay.
            `lca run DIRECTORY --follow --consume`, running beside training, removes iterates it no
            longer needs. While there is no room, recording and training wait. None for no limit.

    Raises:
        InputError: if an argument is invalid, or `at_most` is too small for a replay.
        ResourceError: if `steps` or `until` determine the number of iterates and the disk lacks the
            space for them.

    ```python
    with Recorder("checkpoints", model) as recorder:
        recorder.attach(optimizer)             # saves the initial weights, and every step from now on
        train()
    ```
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        *,
        every: int = 1,
        bursts: tuple[int, int] | None = None,
        steps: Collection[int] | None = None,
        until: int | None = None,
        frozen: bool = True,
        on_full: Literal["stop", "pause"] = "stop",
        at_most: int | str | None = None,
    ) -> None:
        _refuse_arguments(model, every, steps, until, on_full)
        _refuse_bursts(bursts, every)
        self._bound = Bound.of(at_most)
        self.directory = here(
            directory, "iterates are written to this machine's file systems. Name a directory."
        ).expanduser()
        self._model = model
        self._every, self._until = every, until
        self._bursts = None if bursts is None else (bursts[0], bursts[1])
        self._steps = None if steps is None else frozenset(steps)
        self._frozen = bool(frozen)
        self._pauses = on_full == "pause"
        self._last = -1
        self._saved: int | None = None  # the last step that was recorded
        self._numbers: StepNumbers | None = None
        self._moments: MomentStager | None = None
        self._ends_following: Callable[[], object] | None = None
        self._attached: list[Callable[[], object]] = []  # functions that detach
        self._series: _Series | None = None
        self._closed = False
        # step of the attached optimisers; whether its iterate is still to be saved
        self._step, self._is_due = 0, False
        self._buffers: dict[str, Tensor] = {}  # buffers of a step whose end goes undetected
        self._require_space_for_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None and self._series is not None:
            self._series.give_up_waiting()
        try:
            self._close(finished=value is None)
        except Exception as error:
            if value is None:
                raise
            if error is not value:
                value.add_note(f"the recorder, too: {error}")

    @property
    def left_out(self) -> list[int]:
        """Return the steps left out for lack of space under `on_full="pause"`."""
        return [] if self._series is None else self._series.left_out

    def attach(
        self,
        *optimizers: torch.optim.Optimizer,
        step: int = 0,
        save: Literal["scalars", "moments"] = "scalars",
    ) -> Self:
        """Save the model now, and after every step of the optimisers, in any training loop.

        Each iterate also records what the optimisers did.

        Gradient accumulation counts once. A step that `torch.amp.GradScaler` skips does not count,
        unless a `fused` optimiser skips it on the device itself: its iterate then equals the
        previous one and has no record. Steps of several optimisers are counted together. If
        something wraps an optimiser (Lookahead, SAM, accelerate's), give the wrapper or the
        optimiser inside: the model is saved once the outermost of them finishes the step.

        Args:
            optimizers: optimisers that train the model; a wrapper needs `step`, `zero_grad` and
                `param_groups`.
            step: number of optimiser steps before this call, if training is resumed.
            save: "scalars" writes the numbers of each step into the file of the iterate it led to:
                learning rate, decay, momentum or betas of each parameter group, and the norm of
                each gradient. "moments" also saves `exp_avg` and `exp_avg_sq` of the Adam family
                (for RMSprop and Adagrad, the one they have) in separate files in the directory
                `moments`. That takes three times the bytes of iterates alone, on disk, in flight
                (three sets, or 64 MiB of iterates and as much of moments) and, for tensors on a
                CUDA device, once on the device. Optimisers without moments are recorded as with
                "scalars".

        Raises:
            InputError: if an optimiser does not train the model, or one is already attached; also
                as for `save`.
            ResourceError: if `steps` or `until` determine the number of iterates and the disk lacks
                the space for their moments.
        """
        self._refuse_optimizers(optimizers)
        trainers = Trainers(self._model)
        self._follow(optimizers, save, trainers, step, filter(runs_hooks, optimizers))
        try:
            self._require_space_for_all()
            self.save(step)
        except BaseException:
            self._end_following()
            raise
        self._step = step
        takeover = Takeover(trainers, optimizers)
        listener = Told(self._begins_step, self._made_step, self._hold_buffers, self._save_step)
        outermost = Outermost(listener, takeover, optimizers)
        self._attached = [
            weakref.finalize(self, takeover.end),
            # the optimisers keep it alive, and it keeps this recorder alive
            functools.partial(_end, weakref.ref(outermost)),
        ]
        return self

    def follow(
        self,
        *optimizers: torch.optim.Optimizer,
        step: int = 0,
        save: Literal["scalars", "moments"] = "scalars",
    ) -> Self:
        """Record what optimisers do, as `attach` does, but leave it to the caller to `save` each
        iterate.

        The next iterate saved has no record, because nobody observed the steps that led to it.

        Args:
            optimizers: optimisers whose existing moments the next iterate saves; the steps of all
                optimisers that train the model are detected.
            step: as for `attach`.
            save: as for `attach`.

        Raises:
            InputError: if `save` is neither "scalars" nor "moments".
        """
        self._follow(optimizers, save, Trainers(self._model), step)
        return self

    def _follow(
        self,
        optimizers: Sequence[object],
        save: str,
        trainers: Trainers,
        step: int,
        announced: Iterable[torch.optim.Optimizer] = (),
    ) -> None:
        if save not in ("scalars", "moments"):
            raise InputError(f"save={save!r}: choose 'scalars' or 'moments'.")
        self._end_following()
        self._saved = None
        self._numbers = StepNumbers(
            self._model,
            trainers,
            weakref.WeakMethod(self._measures_next),
            step,
            announced,
            stateful(optimizers),
        )
        self._moments = MomentStager() if save == "moments" else None
        self._ends_following = weakref.finalize(self, self._numbers.end)

    def _end_following(self) -> None:
        if self._ends_following is not None:
            self._ends_following()
        self._ends_following = self._numbers = self._moments = None

    def _measures_next(self) -> bool:
        return self._is_wanted(1 + max(self._step, self._last))

    def _begins_step(
        self,
        optimizer: torch.optim.Optimizer,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Call | None:
        return None if self._numbers is None else self._numbers.begin(optimizer, arguments, options)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, **options: Any
    ) -> Tensor:
        """Clip gradients as `torch.nn.utils.clip_grad_norm_` does, and note the factor in the
        record of the next step.

        Args:
            parameters: parameters whose gradients are clipped together.
            max_norm: the largest norm that is left unchanged.
            options: further options of torch's function.

        Returns:
            The norm before clipping, a scalar.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm, **options)
        if self._numbers is not None:
            self._numbers.note_clipping(clip_factor(norm, max_norm), parameters)
        return norm

    def note_clipping(self, factor: float | Tensor) -> None:
        """Note the factor that multiplied all gradients before the next step.

        Call this for clipping by other means than `clip_grad_norm_`; 1 means unchanged.
        """
        if self._numbers is not None:
            self._numbers.note_clipping(factor, None)

    def _refuse_optimizers(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        if not optimizers or not all(map(can_follow, optimizers)):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "nothing"
            raise InputError(
                f"attach was given {names}; it takes the optimisers, as attach(first, second), or "
                "wrappers that have step, zero_grad and param_groups. For anything else save "
                "explicitly: recorder.save(0), then recorder.save(step) after each step."
            )
        if self._attached:
            raise InputError(
                "this recorder is already attached. Give all optimisers at once: attach(first, "
                "second)."
            )
        if not all(trains(optimizer, self._model) for optimizer in optimizers):
            raise InputError(
                "the optimiser has none of the model's parameters. Give the recorder the very "
                "model that is trained, and attach after creating model and optimiser."
            )

    def _made_step(self) -> None:
        # count first: even if an interrupt prevents saving, the next step has its own number
        self._step += 1
        self._is_due = True

    def _hold_buffers(self) -> None:
        """Copy the buffers now, before a forward pass changes them; the weights follow when the
        step is over.
        """
        if self._is_due and self._series is not None and self._is_wanted(self._step):
            self._buffers = self._series.copied_buffers()

    def _save_step(self) -> None:
        """Save the last step if it is not saved yet."""
        if self._is_due:
            self._is_due = False
            buffers, self._buffers = self._buffers, {}
            self._save(self._step, buffers)

    def save(self, step: int) -> None:
        """Save the current model as the iterate of `step`, if that step is to be recorded.

        Raises:
            InputError: if the step does not come after the previous one, the model's tensors have
                changed, or the directory holds a different iterate of the step.
            ResourceError: if an earlier iterate could not be written, or another process records
                into the directory.
        """
        if self._closed:
            raise InputError(
                "this recorder is closed. Make a new one, which continues the directory."
            )
        self._save_step()
        self._save(step, {})

    def _save(self, step: int, buffers: dict[str, Tensor]) -> None:
        if not _is_step(step) or step <= self._last:
            before = (
                f"after step {self._last}" if self._last >= 0 else "from 0, the initial weights"
            )
            by_itself = "; an attached recorder saves by itself" if self._attached else ""
            raise InputError(
                f"step {step!r} cannot be saved: optimiser steps are counted upwards, "
                f"{before}{by_itself}."
            )
        if self._is_wanted(step):
            if self._series is None:
                self._series = self._begun_series(step)
                weakref.finalize(self, self._series.finish)
                self._series.warn_of_gap(step, self._is_wanted)
            self._series.save(step, buffers, self._numbers, self._moments, self._saved)
            self._saved = step
        elif self._series is not None:
            self._series.check()
        self._last = step

    def _begun_series(self, step: int) -> _Series:
        """Open the directory for writing, from a step on."""
        beside = 0
        if self._numbers is not None and self._moments is not None:
            beside = self._numbers.moment_bytes(self._model)
        return _Series(
            self.directory,
            self._model,
            self._frozen,
            self._pauses,
            self._every,
            self._bursts,
            _RingAsked(self._bound, beside, self._segments_in_the_end(step)),
        )

    def _segments_in_the_end(self, step: int) -> int | None:
        """Return how many segments the directory will finally have if recording starts at a step;
        None if unknown.
        """
        if self._until is None and self._steps is None:
            return None
        last = self._until if self._until is not None else max(self._steps or (-1,))
        before = [earlier for earlier in steps_there(self.directory) if earlier < step]
        coming = filter(self._is_wanted, range(step, last + 1))
        return segments_between([*before, *coming], self._bursts)

    def flush(self) -> None:
        """Wait until every saved iterate is on the disk; call this before writing a checkpoint to
        resume from.

        Raises:
            ResourceError: as for `save`.
            InputError: as for `save`.
        """
        self._save_step()
        if self._series is not None:
            self._series.flush()

    def close(self) -> None:
        """Detach from the optimisers, then `flush`.

        The end of a `with` block calls this, or at the latest the exit of Python. If an error,
        including Ctrl-C, ends the block, training does not count as finished: a replay that follows
        waits until training resumes.

        Raises:
            ResourceError: as for `save`.
            InputError: as for `save`.
        """
        self._close(finished=True)

    def _close(self, *, finished: bool) -> None:
        """Close, and state whether training finished."""
        for detach in self._attached:
            detach()
        self._attached = []
        self._closed = True
        try:
            self._save_step()
        finally:
            self._end_following()
            if self._series is not None:
                self._series.close(finished=finished)

    def _require_space_for_all(self) -> None:
        """Raise an error or warn if the number of iterates is known and the disk lacks the space
        for them.
        """
        if self._until is not None or self._steps is not None:
            self.require_space(
                self._until if self._until is not None else max(self._steps or (), default=0)
            )

    def require_space(self, until: int) -> None:
        """Raise an error if the disk lacks the space for all iterates up to a step; only warn if
        recording pauses on a full disk.

        Raises:
            ResourceError: with the space needed and the space free.
        """
        size = Layout(Contents(self._model, self._frozen).tensors()).bytes
        if self._numbers is not None and self._moments is not None:
            size += self._numbers.moment_bytes(self._model)
        place = nearest(self.directory.absolute())
        first = 1 + max(self._last, _highest(self.directory) if self.directory.exists() else -1)
        last = until if self._until is None else min(until, self._until)
        if self._steps is None:
            iterates = max(0, self._wanted_up_to(last) - self._wanted_up_to(first - 1))
        else:
            iterates = sum(first <= step <= last and self._is_wanted(step) for step in self._steps)
        self._bound.refuse_large(size)
        iterates = min(iterates, self._bound.iterates or iterates)
        needed = min(iterates * size, self._bound.bytes or iterates * size)
        free = shutil.disk_usage(place).free
        if needed > free and _writes():
            text = (
                f"{count(iterates, 'iterate')} of {amount(size)} take{'s' * (iterates == 1)} "
                f"{amount(needed)}, and {place} has {amount(free)} free. Record fewer (every=, "
                "bursts=, steps=, until=) or elsewhere."
            )
            if not self._pauses:
                raise ResourceError(text)
            warnings.warn(text, stacklevel=2)

    def _wanted_up_to(self, step: int) -> int:
        """Return the number of iterates from step 0 to `step`, if `steps` is not given."""
        if self._bursts is None:
            return step // self._every + 1
        bursts, rest = divmod(step + 1, self._bursts[0])
        return bursts * self._bursts[1] + min(rest, self._bursts[1])

    def _is_wanted(self, step: int) -> bool:
        return (
            step % self._every == 0
            and (self._bursts is None or step % self._bursts[0] < self._bursts[1])
            and (self._steps is None or step in self._steps)
            and (self._until is None or step <= self._until)
        )


def _refuse_arguments(
    model: nn.Module, every: int, steps: Collection[int] | None, until: int | None, on_full: str
) -> None:
    """Check the arguments of a recorder.

    Raises:
        InputError: if one is invalid.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}, not an nn.Module.")
    if not _is_step(every) or every < 1:
        raise InputError(f"every={every}: record every step (1), every second (2), and so on.")
    if steps is not None and not (isinstance(steps, Collection) and all(map(_is_step, steps))):
        raise InputError(f"steps={steps!r}: name optimiser steps, whole numbers from 0.")
    if until is not None and not _is_step(until):
        raise InputError(f"until={until!r}: name an optimiser step, a whole number from 0.")
    if on_full not in ("stop", "pause"):
        raise InputError(f"on_full={on_full!r}: choose 'stop' or 'pause'.")


def _refuse_bursts(bursts: object, every: int) -> None:
    """Check that bursts have a segment and a gap, and are not combined with `every`.

    Raises:
        InputError: otherwise.
    """
    if bursts is None:
        return
    pair = bursts if isinstance(bursts, (tuple, list)) and len(bursts) == 2 else (0, 0)
    if not all(map(_is_step, pair)) or not 2 <= pair[1] < pair[0]:
        raise InputError(
            f"bursts={bursts!r}: give (every, length), such as (100, 8): 8 consecutive iterates "
            "every 100 steps; 2 or more, and fewer than from one burst to the next."
        )
    if every != 1:
        raise InputError(
            f"bursts={bursts!r} records consecutive iterates, every={every} does not. Give one of "
            "the two."
        )


def _locked(directory: Path) -> DirectoryLock:
    """Create and lock a directory for one recorder, and remove files that a killed process left
    unfinished.

    Raises:
        ResourceError: if it cannot be created, or another recorder has the lock.
    """
    try:
        make_directory(directory)
    except OSError as error:
        raise ResourceError(
            f"{directory} cannot be created as a directory: {error.strerror}. Record elsewhere."
        ) from error
    try:
        lock = DirectoryLock(directory)
    except BlockingIOError:
        raise ResourceError(
            f"another recorder writes into {directory}. Close it, or record into another "
            "directory; where several processes train together, make the recorder after "
            "torch.distributed.init_process_group."
        ) from None
    # left by a killed process
    unfinished = (
        *directory.glob(".step_*.safetensors.*.tmp"),
        *(directory / MOMENTS).glob(".step_*.safetensors.*.tmp"),
        *directory.glob(f"{SIGN}.*.tmp"),
    )
    for path in unfinished if lock.locked else ():
        path.unlink()
    return lock


@dataclass(frozen=True)
class _RingAsked:
    """Hold what a series needs to limit the iterates that wait for a replay.

    Attributes:
        bound: the limit.
        moments: size of an iterate's moments in bytes.
        segments: final number of segments; None if unknown.
    """

    bound: Bound
    moments: int
    segments: int | None


class _Series:
    """Write the files of one directory, from the first iterate on.

    A process that does not write only helps to gather the tensors.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        frozen: bool,
        pauses: bool,
        every: int,
        bursts: tuple[int, int] | None,
        ring: _RingAsked,
    ) -> None:
        refuse_flattened(model)
        self._directory = directory
        self._contents = Contents(model, frozen)
        self._said_moved = False
        self._writer: Writer | None = None
        self._lock: DirectoryLock | None = None
        self._sign: RecorderSign | None = None
        self._before = -1
        tensors = self._contents.tensors()
        if not _writes():
            return
        self._refuse_reserved()
        self._layout = Layout(tensors, every, bursts)
        self._warn_of_contents(len(tensors))
        self._stager = Stager(self._layout)
        ring.bound.refuse_large(self._layout.bytes + ring.moments)
        self._lock = _locked(directory)
        self._before = _highest(directory)
        self._sign = RecorderSign.of_this_process(
            ring.segments, bursts, ring.bound.iterates, ring.bound.bytes
        )
        try:
            self._put_sign(self._sign)
        except BaseException:
            self._lock.release()
            raise
        self._writer = Writer(
            directory, self._layout, self._before, pauses, Ring(directory, ring.bound)
        )

    def _refuse_reserved(self) -> None:
        for name in reserved(self._contents.allocated):
            raise InputError(
                f"the model has a tensor called {name!r}, which results use as the name of a "
                "dimension: `lca run` could not allocate to it. Rename it in the model before you "
                "train; an integer tensor, such as a counter, may keep the name."
            )

    def _warn_of_contents(self, tensors: int) -> None:
        """Warn about entries that are not recorded, and about weights of low precision."""
        if self._contents.unwritten:
            entries = ", ".join(
                f"{name!r} (a {kind})" for name, kind in self._contents.unwritten.items()
            )
            warnings.warn(
                f"the model's state dict holds {entries}, which is not a tensor of numbers and is "
                "not recorded. A replay uses what the task's model builds.",
                stacklevel=6,
            )
        if self._layout.half_precision:
            warnings.warn(
                f"{self._layout.half_precision[0]} has fewer than 32 bits per number, like "
                f"{len(self._layout.half_precision)} of {count(tensors, 'tensor')}: steps smaller "
                "than the spacing of its numbers are lost, and most are smaller. Keep the weights in "
                "float32 and train under torch.autocast.",
                stacklevel=6,
            )

    def warn_of_gap(self, step: int, is_wanted: Callable[[int], bool]) -> None:
        """Warn if iterates are missing between the directory's last one and the first one now.

        Args:
            step: step of the first iterate now.
            is_wanted: returns whether a step is to be recorded.
        """
        if self._before < 0:
            return
        missing = [number for number in range(self._before + 1, step) if is_wanted(number)]
        if missing:
            warnings.warn(
                f"the directory ends at step {self._before} and continues at step {step}: the "
                f"{len(missing)} iterates between are missing, and one long segment spans them",
                stacklevel=5,
            )

    @property
    def left_out(self) -> list[int]:
        return [] if self._writer is None else list(self._writer.left_out)

    def copied_buffers(self) -> dict[str, Tensor]:
        return self._contents.copied_buffers()

    def save(
        self,
        step: int,
        buffers: Mapping[str, Tensor],
        numbers: StepNumbers | None,
        moments: MomentStager | None,
        since: int | None,
    ) -> None:
        """Save an iterate.

        Args:
            step: training step.
            buffers: buffers copied earlier, by name; they replace the current ones.
            numbers: follows the optimisers; None if nothing does.
            moments: stages the moments; None if they are not saved.
            since: step of the previous iterate; None if there is none.
        """
        self.check()
        tensors = {**self._contents.tensors(), **buffers}
        names = self._contents.names_by_id
        record = None if numbers is None else numbers.take(since, names)
        beside = {} if numbers is None or moments is None else numbers.moments(names)
        if self._writer is not None:
            self._layout.check(tensors)
            staging = self._writer.buffer()
            try:
                self._stager.stage(tensors, staging)
                staged = None if moments is None else moments.stage(beside)
            except BaseException:
                self._writer.give_back(staging)
                raise
            self._writer.write(step, staging, record, staged)
        if numbers is not None:
            numbers.forget()

    def check(self) -> None:
        if self._writer is not None:
            self._writer.check()

    def flush(self) -> None:
        self._warn_of_moved()
        if self._writer is not None:
            self._writer.flush()

    def _warn_of_moved(self) -> None:
        """Warn once about parameters that move without a gradient and are not written."""
        moved = [] if self._writer is None or self._said_moved else self._contents.moved_unwritten()
        if moved:
            self._said_moved = True
            warnings.warn(
                f"parameter {few([*map(repr, moved)], 1)} moved although frozen (as a teacher's "
                "moving average does), and frozen=False leaves it out of the files: a replay would "
                "not see it move. Record again with frozen=True.",
                stacklevel=4,
            )

    def finish(self) -> None:
        """Close if the user did not, without raising an error a second time."""
        if self._writer is not None and self._writer.raised:
            with contextlib.suppress(LCAError):
                self.close(finished=True)
        else:
            self.close(finished=True)

    def give_up_waiting(self) -> None:
        if self._writer is not None:
            self._writer.give_up_waiting()

    def close(self, *, finished: bool) -> None:
        lock, self._lock = self._lock, None
        if self._writer is not None and lock is not None and self._sign is not None:
            self._warn_of_moved()
            try:
                self._writer.close()
            except BaseException:
                with contextlib.suppress(LCAError):  # the original error matters more
                    self._put_sign(replace(self._sign, state="failed"))
                raise
            else:
                self._put_sign(replace(self._sign, state="closed" if finished else "failed"))
            finally:
                lock.release()

    def _put_sign(self, sign: RecorderSign) -> None:
        try:
            write_sign(self._directory, sign)
        except OSError as error:
            raise ResourceError(
                f"cannot write into {self._directory}: {error.strerror}. Make room or permit it, "
                "or record elsewhere."
            ) from error


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _writes() -> bool:
    """Return whether this process writes the files."""
    distributed = torch.distributed
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )


def _end(outermost: weakref.ref[Outermost]) -> None:
    """Stop following the optimisers, if they still exist."""
    if (following := outermost()) is not None:
        following.end()


def _highest(directory: Path) -> int:
    """Return the last step that has a file, or −1."""
    return max(steps_there(directory), default=-1)
