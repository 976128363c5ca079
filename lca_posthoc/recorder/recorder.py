"""Save every iterate of a training run, while it goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import nn

from ..errors import InputError, LCAError, ResourceError, amount
from ..places import here, nearest
from .staging import Layout, Stager, refuse_flattened, tensors_of, transient_names
from .takeover import Takeover, trains
from .writer import Writer, step_of


class Recorder:
    """Saves a model's parameters and persistent buffers, one safetensors file per optimiser step.

    `save` copies them into memory and returns; a thread writes them under a temporary name and renames, so that a file that is there
    is whole, also when training is killed. At most three iterates, or 64 MiB, wait in memory; a disk that is slower than training slows
    it down, and nothing is left out. Once a second, and at `flush` and `close`, files are flushed to the disk: a power failure
    may damage those of the last second. What cannot be written is an error of the next `save`, `flush` or `close`.

    Where several processes train together (`torch.distributed`), all make a recorder and the first one writes.

    Args:
        directory: created with the first iterate; gets `step_00000000.safetensors` and so on. One that holds iterates is gone on
            with: a step that is there already must have the same weights, and is left alone.
        model: the module that is being trained; tied tensors are written once, under their first name. Keep it in float32 (under
            `torch.autocast` it is): most of the motion is lost in fewer bits.
        every: only steps that are multiples of it.
        steps: only these.
        until: only steps up to this one.
        on_full: "stop" raises an error where the disk is full; "pause" lets training go on and leaves iterates out, with a warning,
            until there is space.

    Raises:
        InputError: where an argument is not as described.
        ResourceError: where `steps` or `until` tell how many iterates will come and there is no space for them.

    ```python
    with Recorder("checkpoints", model) as recorder:
        recorder.attach(optimizer)             # the initial weights, and every step from here on
        train()
    ```
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        *,
        every: int = 1,
        steps: Collection[int] | None = None,
        until: int | None = None,
        on_full: Literal["stop", "pause"] = "stop",
    ) -> None:
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
        self.directory = here(
            directory, "iterates are written to this machine's file systems. Name a directory."
        ).expanduser()
        self._model = model
        self._every, self._steps, self._until = every, None if steps is None else frozenset(steps), until
        self._pauses = on_full == "pause"
        self._last = -1
        self._attached: list[Callable[[], object]] = []  # what detaches
        self._series: _Series | None = None
        self._closed = False
        self._step = 0
        if until is not None or self._steps is not None:
            self.require_space(until if until is not None else max(self._steps or (), default=0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as error:
            if value is None:
                raise
            if error is not value:
                value.add_note(f"the recorder, too: {error}")

    @property
    def left_out(self) -> list[int]:
        """The steps that found no space, under `on_full="pause"`."""
        return [] if self._series is None else self._series.left_out

    def attach(self, *optimizers: torch.optim.Optimizer, step: int = 0) -> Self:
        """Save the model as it is now, and from here on after every step of the optimisers, in any loop.

        Gradient accumulation counts once; a step that `torch.amp.GradScaler` skips counts not at all. Steps of several optimisers
        are counted together.

        Args:
            optimizers: of the model.
            step: the optimiser steps that were made before, where training is resumed.

        Raises:
            InputError: where an optimiser does not train the model, or one is attached already; further as `save`.
        """
        if not optimizers or any(not hasattr(each, "_optimizer_step_post_hooks") for each in optimizers):
            given = ", ".join(type(each).__name__ for each in optimizers) or "nothing"
            raise InputError(
                f"attach was given {given}; it takes the optimisers, as attach(first, second), and not what wraps one: accelerate's has "
                "it as .optimizer."
            )
        if self._attached:
            raise InputError("this recorder is attached already. Give all optimisers at once: attach(first, second).")
        if not all(trains(optimizer, self._model) for optimizer in optimizers):
            raise InputError(
                "the optimiser has none of the model's parameters. Give the recorder the very model that is trained, and attach once "
                "model and optimiser are made."
            )
        self.save(step)
        self._step = step
        self._attached = [
            weakref.finalize(self, Takeover(self._model, optimizers).end),
            *(optimizer.register_step_post_hook(self._after_step).remove for optimizer in optimizers),
        ]
        return self

    def _after_step(self, *_: Any) -> None:
        self._step += 1  # whatever happens to this one, an interrupt perhaps, the next has its own number
        self.save(self._step)

    def save(self, step: int) -> None:
        """Save the model as it is now as the iterate of `step`, where it is one of those to be recorded.

        Raises:
            InputError: where the step does not come after the one before, the model's tensors have changed, or the directory holds
                another iterate of an earlier step.
            ResourceError: where an earlier iterate could not be written, or another process records into the directory.
        """
        if self._closed:
            raise InputError("this recorder is closed. Make another one, which goes on with the directory.")
        if not _is_step(step) or step <= self._last:
            before = f"after step {self._last}" if self._last >= 0 else "from 0, the initial weights"
            by_itself = "; an attached recorder saves by itself" if self._attached else ""
            raise InputError(
                f"step {step!r} cannot be saved: optimiser steps are counted upwards, {before}{by_itself}."
            )
        if self._is_wanted(step):
            if self._series is None:
                self._series = _Series(self.directory, self._model, self._pauses, self._every)
                weakref.finalize(self, self._series.finish)
                self._series.warn_of_gap(step, self._is_wanted)
            self._series.save(step)
        elif self._series is not None:
            self._series.check()
        self._last = step

    def flush(self) -> None:
        """Wait until every iterate saved so far is on the disk: before a checkpoint that training may be resumed from.

        Raises:
            ResourceError, InputError: as `save`.
        """
        if self._series is not None:
            self._series.flush()

    def close(self) -> None:
        """`flush`, and detach from the optimiser; done at the end of a `with` block, and at the latest when Python exits.

        Raises:
            ResourceError, InputError: as `save`.
        """
        for detach in self._attached:
            detach()
        self._attached = []
        self._closed = True
        if self._series is not None:
            self._series.close()

    def require_space(self, until: int) -> None:
        """Check that the iterates from here to a step find space; where recording pauses on a full disk, warn.

        Raises:
            ResourceError: with both figures, where they do not.
        """
        size = Layout(tensors_of(self._model, transient_names(self._model))).bytes
        place = nearest(self.directory.absolute())
        first = 1 + max(self._last, _highest(self.directory) if self.directory.exists() else -1)
        last = until if self._until is None else min(until, self._until)
        if self._steps is None:
            iterates = max(0, last // self._every - (first - 1) // self._every)
        else:
            iterates = sum(first <= step <= last and self._is_wanted(step) for step in self._steps)
        needed, free = iterates * size, shutil.disk_usage(place).free
        if needed > free and _writes():
            text = (
                f"{iterates:,} iterates of {amount(size)} take {amount(needed)}, and {place} has {amount(free)} free. Record fewer "
                "(every=, steps=, until=) or elsewhere."
            )
            if not self._pauses:
                raise ResourceError(text)
            warnings.warn(text, stacklevel=2)

    def _is_wanted(self, step: int) -> bool:
        return (
            step % self._every == 0
            and (self._steps is None or step in self._steps)
            and (self._until is None or step <= self._until)
        )


class _Series:
    """The files of one directory, from the first iterate on; in a process that does not write, only its part in gathering them."""

    def __init__(self, directory: Path, model: nn.Module, pauses: bool, every: int) -> None:
        refuse_flattened(model)
        self._model, self._without = model, transient_names(model)
        self._writer: Writer | None = None
        self._lock: int | None = None
        self._process, self._before = os.getpid(), -1
        tensors = tensors_of(model, self._without)
        if not _writes():
            return
        self._layout = Layout(tensors, every)
        if self._layout.half_precision:
            warnings.warn(
                f"{self._layout.half_precision[0]} has fewer than 32 bits a number, as {len(self._layout.half_precision)} of "
                f"{len(tensors)} tensors: a step smaller than its spacing is lost, and most of them are. Keep the weights in float32 and "
                "train under torch.autocast.",
                stacklevel=4,
            )
        self._stager = Stager(self._layout)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{directory} cannot be made a directory: {error.strerror}. Record elsewhere."
            ) from error
        self._lock, locked = _lock(directory)
        for left in directory.glob(".step_*.safetensors.*.tmp") if locked else ():  # of a process that was killed
            left.unlink()
        self._before = _highest(directory)
        self._writer = Writer(directory, self._layout, self._before, pauses)

    def warn_of_gap(self, step: int, is_wanted: Callable[[int], bool]) -> None:
        """Say where iterates are missing between those of the directory and the first one now."""
        if self._before < 0:
            return
        missing = [each for each in range(self._before + 1, step) if is_wanted(each)]
        if missing:
            warnings.warn(
                f"the directory ends at step {self._before} and is gone on with at step {step}: the {len(missing)} between are missing, "
                "and the segment across them is a long one",
                stacklevel=4,
            )

    @property
    def left_out(self) -> list[int]:
        return [] if self._writer is None else list(self._writer.left_out)

    def save(self, step: int) -> None:
        self.check()
        tensors = tensors_of(self._model, self._without)
        if self._writer is not None:
            if tensors.keys() != self._layout.places.keys():  # a cache, perhaps, made on the way and not persistent
                self._without = transient_names(self._model)
                tensors = {name: each for name, each in tensors.items() if name not in self._without}
            self._layout.check(tensors)
            staging = self._writer.buffer()
            try:
                self._stager.stage(tensors, staging)
            except BaseException:
                self._writer.give_back(staging)
                raise
            self._writer.write(step, staging)

    def check(self) -> None:
        if self._writer is not None:
            self._writer.check()

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finish(self) -> None:
        """`close` where nobody does it, without an error that was raised before."""
        if self._writer is not None and self._writer.raised:
            with contextlib.suppress(LCAError):
                self.close()
        else:
            self.close()

    def close(self) -> None:
        lock, self._lock = self._lock, None
        if self._writer is not None and lock is not None:
            try:
                self._writer.close()
            finally:
                # forked processes hold the same lock: none of theirs ends it, and ours does for all
                if self._process == os.getpid():
                    with contextlib.suppress(OSError):  # file systems without locks
                        fcntl.flock(lock, fcntl.LOCK_UN)
                os.close(lock)


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _writes() -> bool:
    """Whether this process is the one that writes."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _lock(directory: Path) -> tuple[int, bool]:
    """Hold a directory as long as this process lives: a descriptor, and whether it is locked.

    File systems without locks are gone on with; that no file is replaced holds there too.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ResourceError(
            f"another recorder writes into {directory}. Close it, or record into another directory; where several processes train "
            "together, make the recorder after torch.distributed.init_process_group."
        ) from None
    except OSError:
        return descriptor, False
    return descriptor, True


def _highest(directory: Path) -> int:
    """The last step of which there is a file; −1 where there is none."""
    return max((step for path in directory.iterdir() if (step := step_of(path.name)) is not None), default=-1)
