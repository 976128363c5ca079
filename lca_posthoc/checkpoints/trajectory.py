"""Order, validate and read the checkpoints of one training run, which `discovery` finds.

Opening reads headers only; reading never maps a file into memory. The model's tensors come as a
table: this module does not depend on tasks, losses or runs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, NotFiniteError, SpanError, few
from .cache import cache
from .discovery import AT_A_TIME, Entry, Headers, counted, series, too_few
from .headers import HALF, TensorHeader, joined, read_header
from .layouts import step_in_name as step_in_name
from .leftovers import is_known
from .optimizer_steps import MomentsRecord, moments_path, record_of_moments
from .paths import is_remote, reached
from .places import Where, common_root, described, places_of
from .spacing import SameTensors, between_bursts, bursts_of, every_of, long_segments
from .steps import Choice, parse_steps

if TYPE_CHECKING:
    import torch

RESERVED = ("step", "group")  # dimensions of results, besides the names of allocated tensors
_WRAPPERS = frozenset(
    (
        # torch: compile, checkpoint_wrapper, FSDP
        *(
            "_orig_mod",
            "_checkpoint_wrapped_module",
            "_fsdp_wrapped_module",
        ),
        *("_forward_module", "_fpw_module"),  # Lightning's Fabric and its strategies; fairscale
    )
)
# DataParallel, DeepSpeed, AveragedModel; Opacus. Stripped only at the front, because models use the
# same names for their own parts.
_OUTERMOST = (
    "module",
    "_module",
)


@dataclass(frozen=True)
class TensorSpec:
    """Describe one tensor of the model.

    Attributes:
        name: its first name.
        kind: "parameter", "buffer" or "state"; a state is loaded but never gets an allocation.
        shape: its shape.
        aliases: its other names, if it is tied.
        unit_axis: the axis of the neurons or channels; None for scalars.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    unit_axis: int | None = None

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def units(self) -> int:
        """Return the number of neurons or channels."""
        return 1 if self.unit_axis is None else self.shape[self.unit_axis]


@dataclass(frozen=True)
class Checkpoint:
    """Identify the files of one training step.

    Attributes:
        step: training step.
        files: paths of the files.
        size: their total size in bytes.
        fingerprint: CRC32C of samples of the files.
        moments: record of the optimiser's moments beside them; None if there are none or nobody
            asked for them.
    """

    step: int
    files: tuple[Path, ...]
    size: int
    fingerprint: int
    moments: MomentsRecord | None = None

    @property
    def moments_file(self) -> Path:
        """Return the path of the moments, whether or not the file exists."""
        return moments_path(self.files[0].parent, self.step)

    def under(self, root: Path) -> Checkpoint:
        """Return the checkpoint with its file paths prefixed by a directory."""
        return replace(self, files=tuple(root / str(file) for file in self.files))


@dataclass(frozen=True)
class Consumed:
    """Hold the checkpoints of a run whose files it may have removed, and the steps after which no
    segment follows.
    """

    checkpoints: tuple[Checkpoint, ...]
    breaks: frozenset[int]


NOTHING_CONSUMED = Consumed((), frozenset())


@dataclass(frozen=True)
class Trajectory:
    """Hold all checkpoints in order of step, with the tensors that every one of them contains.

    Attributes:
        root: directory that contains all places.
        checkpoints: the checkpoints in order of step.
        tensors: normalised name → type and shape of each tensor.
        sources: normalised name → name in the files.
        notes: notes for the user.
        breaks: positions in `checkpoints` after which no segment follows; the steps up to the next
            checkpoint are left out.
        places: where the checkpoints lie below `root`; empty for `root` itself.
        gone: steps whose files a replay removed after using them.
    """

    root: Path
    checkpoints: tuple[Checkpoint, ...]
    tensors: dict[str, TensorHeader]
    sources: dict[str, str]
    notes: tuple[str, ...]
    breaks: frozenset[int] = frozenset()
    places: tuple[str, ...] = ()
    gone: frozenset[int] = frozenset()

    def up_to(self, checkpoints: int) -> Trajectory:
        """Return the trajectory with only its first checkpoints."""
        breaks = frozenset(start for start in self.breaks if start < checkpoints - 1)
        return replace(self, checkpoints=self.checkpoints[:checkpoints], breaks=breaks)

    @property
    def first_there(self) -> int:
        """Return the position of the first checkpoint whose files still exist."""
        return next(
            index
            for index, checkpoint in enumerate(self.checkpoints)
            if checkpoint.step not in self.gone
        )

    @property
    def steps(self) -> list[int]:
        """Return the training steps, ascending."""
        return [checkpoint.step for checkpoint in self.checkpoints]

    @property
    def starts(self) -> list[int]:
        """Return the position in `checkpoints` where each segment starts, ascending; it ends at the
        next position.
        """
        return [
            position for position in range(len(self.checkpoints) - 1) if position not in self.breaks
        ]

    @property
    def half_precision(self) -> list[str]:
        """Return the tensors stored with fewer than 32 bits per number, which loses most of the
        motion.
        """
        return [name for name, header in self.tensors.items() if header.dtype in HALF]

    def sources_of(self, names: Iterable[str]) -> dict[str, str]:
        """Map names of the model's tensors to their names in the files, leaving out those the files
        lack.
        """
        return {
            name: self.sources[normalise(name)] for name in names if normalise(name) in self.sources
        }

    def match(
        self,
        table: Sequence[TensorSpec],
        fixed: Iterable[str] = (),
        patterns: Sequence[str] = (),
        unstored: Collection[str] = (),
    ) -> dict[str, str]:
        """Map every tensor of the table to its name in the files.

        The files may also hold tensors that are `fixed`; these are not read.

        Args:
            table: the model's tensors.
            fixed: names of the model's tensors that `Task.fixed` selects.
            patterns: patterns of `Task.fixed`.
            unstored: names of the model's buffers that are not saved.

        Raises:
            InputError: if a tensor is missing, has another shape or a reserved name, or if the
                files hold an extra tensor that is not one of `leftovers`.
        """
        _refuse_reserved([spec.name for spec in table if spec.kind != "state"])
        names, used = {}, set()
        for spec in table:
            present = [
                name for name in map(normalise, (spec.name, *spec.aliases)) if name in self.tensors
            ]
            if not present:
                raise InputError(self._missing(spec, table))
            header = self.tensors[present[0]]
            if header.shape != spec.shape:
                raise InputError(
                    f"tensor {spec.name!r} has shape {list(header.shape)} in "
                    f"{self.checkpoints[0].files[0]} (step {self.steps[0]}) but {list(spec.shape)} "
                    "in the task's model. Build the model that was trained."
                )
            names[spec.name] = self.sources[present[0]]
            used.update(present)
        used.update(map(normalise, fixed))
        extra = sorted(
            set(self.tensors) - used - set(self.leftovers(table, fixed, patterns, unstored))
        )
        if extra:
            raise InputError(self._left_over(extra))
        return names

    def _left_over(self, extra: list[str]) -> str:
        """Return the error message for tensors that the task's model does not have."""
        pronoun = "it" if len(extra) == 1 else "them"
        return (
            f"{_some(extra)} {'is' if len(extra) == 1 else 'are'} in "
            f"{self.checkpoints[0].files[0]} (step {self.steps[0]}) but not in the task's model. "
            "Build the model that was trained, or map the names with --rename OLD=NEW. If the "
            f"model computes the same without {pronoun}, leave {pronoun} out: "
            f"{drop_options(extra, set(self.tensors) - set(extra))}"
        )

    def leftovers(
        self,
        table: Sequence[TensorSpec],
        fixed: Iterable[str] = (),
        patterns: Sequence[str] = (),
        unstored: Collection[str] = (),
    ) -> dict[str, str]:
        """Map tensors that the files hold and the model does not save to their names in the files.

        They may be left out. They are the tensors that `Task.fixed` names, the model's own unsaved
        buffers, and buffers that older library releases are known to have saved. The caller must
        check in the files that they are what they seem to be.

        Args:
            table: as for `match`.
            fixed: as for `match`.
            patterns: as for `match`.
            unstored: as for `match`.
        """
        used = {normalise(name) for spec in table for name in (spec.name, *spec.aliases)} | set(
            map(normalise, fixed)
        )
        own = set(map(normalise, unstored))
        return {
            name: self.sources[name]
            for name, header in sorted(self.tensors.items())
            if name not in used
            and (
                name in own
                or any(fnmatchcase(name, pattern) for pattern in patterns)
                or is_known(name, header, used & set(self.tensors))
            )
        }

    def ties(self, table: Sequence[TensorSpec]) -> dict[str, list[str]]:
        """Map each tied tensor that the files hold under several names to its names in the files."""
        ties = {}
        for spec in table:
            present = dict.fromkeys(map(normalise, (spec.name, *spec.aliases)))
            sources = [self.sources[name] for name in present if name in self.sources]
            if len(sources) > 1:
                ties[spec.name] = sources
        return ties

    def _missing(self, spec: TensorSpec, table: Sequence[TensorSpec]) -> str:
        known = {normalise(name) for other in table for name in (other.name, *other.aliases)}
        unused = sorted(set(self.tensors) - known)
        hint = f"; the file has {_some(unused)} instead" if unused else ""
        return (
            f"tensor {spec.name!r} of the task's model (shape {list(spec.shape)}) is missing in "
            f"{self.checkpoints[0].files[0]} (step {self.steps[0]}){hint}. Build the model that "
            "was trained, or map the names with --rename OLD=NEW. If the tensor never moves and is "
            "not stored, freeze it in the model or name it in Task(fixed=[…])."
        )


def drop_options(names: Collection[str], others: Collection[str] = ()) -> str:
    """Return shell-quoted `--rename` options that leave tensors out; one option covers names that
    differ only in a number.

    An option keeps the number if the shared form would match a tensor in `others`.

    >>> drop_options(["h.0.attn.bias", "h.11.attn.bias"], ["h.0.attn.weight"])
    "--rename '^h\\\\.\\\\d+\\\\.attn\\\\.bias$='"

    Args:
        names: names of the tensors to leave out.
        others: names of tensors to keep.
    """
    rules: dict[str, None] = {}
    for name in sorted(names):
        exact = rf"^{re.escape(name)}$".replace("=", r"\x3d")
        joined = re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", exact)
        hits = [other for other in others if re.search(joined, other)]
        rules[exact if hits else joined] = None
    return " ".join(f"--rename {shlex.quote(rule + '=')}" for rule in rules)


def _some(names: Sequence[str]) -> str:
    return ("tensor " if len(names) == 1 else "tensors ") + few([*map(repr, names)])


def is_statistic(name: str) -> bool:
    """Return whether a tensor is the running mean or variance of a normalisation layer, judging by
    its name.
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def normalise(name: str) -> str:
    """Remove from a tensor's name what wrappers around the model or its parts add.

    >>> normalise("module._orig_mod.fc._checkpoint_wrapped_module.weight")
    'fc.weight'
    """
    *path, last = name.split(".")
    path = [part for part in path if part not in _WRAPPERS]
    while path and path[0] in _OUTERMOST:
        path = path[1:]
    return ".".join([*path, last])


def reserved(names: Sequence[str]) -> list[str]:
    """Return the names of allocated tensors that collide with dimensions of results.

    >>> reserved(["step", "fc.step", "fc", "fc:0"])
    ['step', 'fc:0']
    """
    dimensions = {*RESERVED, "total", *(f"{name}:unit" for name in names)}
    return [
        name
        for name in names
        if name in dimensions
        or (name.rpartition(":")[0] in names and name.rpartition(":")[2].isdigit())
    ]


def open_trajectory(
    directory: Where,
    *,
    pattern: str | None = None,
    rename: Sequence[str] = (),
    steps: str | None = None,
    consumed: Consumed = NOTHING_CONSUMED,
    compare: bool = True,
    moments: bool = False,
) -> Trajectory:
    """Open a series of safetensors iterates: files, `checkpoint-N/` directories, or sharded ones
    with an index.

    Args:
        directory: one or several places of one series: a directory, a template with `{step}`, or
            the cache of a hub. fsspec reads a URL, such as `s3://…`, through its driver.
        pattern: regular expression with a group `step`, searched for in each name; names that do
            not match are skipped.
        rename: `OLD=NEW` pairs, applied in turn to every tensor name; OLD is a regular expression.
            A tensor whose name becomes empty is left out.
        steps: comma-separated, ascending list of single training steps and ranges `A:B` or `A:B:K`,
            which include both ends and take every K-th checkpoint. No segment joins one range to
            the next.
        consumed: checkpoints that belong to the trajectory although their files may be gone.
        compare: whether to look for checkpoints with identical tensors and note them.
        moments: whether to record the optimiser's moments beside each checkpoint.

    Raises:
        InputError: if the checkpoints cannot be used; the message names the file and the step, and
            says what to do.
    """
    places = places_of(directory)
    root, where = common_root(places), few([*map(str, places)])
    wanted = parse_steps(":" if steps is None else steps)
    if is_remote(root):
        cache()  # raises for an invalid size before anything is fetched
    rules = [_rename_rule(text) for text in rename]
    regex = compile_pattern(pattern) if pattern else None
    headers = Headers()
    try:
        with reached(root):
            entries, notes = series(places, wanted, regex, headers)
            which = f" whose name --pattern {pattern!r} matches" if pattern else ""
            stored = {entry.step for entry in entries}
            gone = [one for one in consumed.checkpoints if one.step not in stored]
            if not entries or len(entries) + len(gone) < 2:
                raise InputError(too_few(places, [entry.step for entry in entries], which))
            choice = wanted.choose([entry.step for entry in entries])
            used = [entries[position] for position in choice.used]
            if is_remote(root):
                headers.fetch([file for entry in used for file in entry.files])
            named = [f"--pattern '{regex.pattern}'"] if regex is not None else []
            named += [str(place) for place in places if place.rest]
            notes += counted(root, used, few(named), headers)
    except OSError as error:
        raise InputError(f"cannot look into {where}: {error.strerror}.") from None
    if not used or len(used) + len(gone) < 2:
        raise InputError(
            too_few(places, [entry.step for entry in used], f" among steps {steps}{which}")
        )
    if wanted.singles is None:  # a list of single steps joins all of them
        choice = replace(choice, breaks=choice.breaks | _ends_of_bursts(entries, choice, headers))
    opened = _validated(
        root, entries, choice, rules, notes, headers, compare=compare, has_gaps=bool(gone)
    )
    whole = _with_gone(replace(opened, places=described(places, root)), gone, consumed.breaks)
    if not whole.starts:
        raise InputError(
            f"no segment joins any two of the {len(whole.checkpoints)} checkpoints chosen in {root}: "
            "none runs between ranges of --steps or between bursts. Choose two or more checkpoints "
            "of one range."
        )
    return _with_moments(whole, consumed.checkpoints) if moments else whole


def _with_moments(trajectory: Trajectory, consumed: Iterable[Checkpoint]) -> Trajectory:
    """Return a trajectory with the records of the existing moments.

    Args:
        trajectory: the opened trajectory.
        consumed: checkpoints whose files a replay may have removed, moments first; their recorded
            moments stay recorded.
    """
    recorded = {checkpoint.step: checkpoint.moments for checkpoint in consumed}
    checkpoints = trajectory.checkpoints
    with ThreadPoolExecutor(AT_A_TIME if is_remote(trajectory.root) else 1) as pool:
        records = pool.map(record_of_moments, (one.moments_file for one in checkpoints))
        return replace(
            trajectory,
            checkpoints=tuple(
                replace(checkpoint, moments=record or recorded.get(checkpoint.step))
                for checkpoint, record in zip(checkpoints, records, strict=True)
            ),
        )


def _with_gone(
    there: Trajectory, gone: Sequence[Checkpoint], recorded_breaks: Collection[int]
) -> Trajectory:
    """Return a trajectory that includes the checkpoints whose files were removed.

    Args:
        there: trajectory of the existing files.
        gone: the other checkpoints.
        recorded_breaks: recorded steps after which no segment follows, for the removed checkpoints
            and their neighbours.
    """
    if not gone:
        return there
    removed = frozenset(checkpoint.step for checkpoint in gone)
    checkpoints = sorted((*gone, *there.checkpoints), key=lambda one: one.step)
    steps = there.steps
    of_files = {steps[place] for place in there.breaks}
    breaks = frozenset(
        place
        for place, (before, after) in enumerate(pairwise(one.step for one in checkpoints))
        if before in (recorded_breaks if removed & {before, after} else of_files)
    )
    return replace(there, checkpoints=tuple(checkpoints), breaks=breaks, gone=removed)


def extended(
    trajectory: Trajectory,
    files: Mapping[int, Path],
    rename: Sequence[str] = (),
    *,
    moments: bool = False,
) -> Trajectory:
    """Return a trajectory with newer checkpoints appended, of one file each.

    Args:
        trajectory: the earlier trajectory; the file of its last checkpoint still exists.
        files: step → file of each later checkpoint.
        rename: as for `open_trajectory`.
        moments: as for `open_trajectory`.

    Raises:
        InputError: if a file holds other tensors or cannot be read.
    """
    rules = [_rename_rule(text) for text in rename]
    known = {source: trajectory.tensors[name] for name, source in trajectory.sources.items()}
    last = trajectory.checkpoints[-1]
    more, bursts = [last], [bursts_of(read_header(last.files[0]))]
    for step, path in sorted(files.items()):
        header = read_header(path)
        stored = header.tensors
        if stored.keys() != known.keys():
            names = _names(stored, rules, path, {})
            stored = {source: stored[source] for source in names.values()}
        if stored != known:
            raise InputError(_difference(stored, known, step, path))
        checkpoint = Checkpoint(step, (path,), header.size, joined([header.fingerprint]))
        record = record_of_moments(checkpoint.moments_file) if moments else None
        more.append(replace(checkpoint, moments=record))
        bursts.append(bursts_of(header))
    all_of_them = Choice(tuple(range(len(more))), frozenset())
    ends = between_bursts([checkpoint.step for checkpoint in more], bursts, all_of_them)
    before = len(trajectory.checkpoints) - 1
    return replace(
        trajectory,
        checkpoints=(*trajectory.checkpoints, *more[1:]),
        breaks=trajectory.breaks | {before + place for place in ends},
    )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile the argument of `--pattern`, which must have a group `step`.

    Raises:
        InputError: if it is not a regular expression or has no such group.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pattern {pattern!r} is not a regular expression: {error}.") from None
    if "step" not in regex.groupindex:
        raise InputError(
            f"--pattern {pattern!r} has no group called step. Write the number as (?P<step>\\d+)."
        )
    return regex


def _refuse_reserved(names: list[str]) -> None:
    """Raise an error for names that collide with dimensions of results.

    Raises:
        InputError: if there are any.
    """
    for name in reserved(names):
        raise InputError(
            f"the model has a tensor called {name!r}, which results use as the name of a dimension. "
            "Rename it in the task's model, to NEW perhaps, and in the checkpoints with --rename "
            f"'^{re.escape(name)}$=NEW'."
        )


def _rename_rule(text: str) -> tuple[re.Pattern[str], str]:
    old, equals, new = text.partition("=")
    if not equals or not old:
        raise InputError(
            f"--rename {text!r} is not OLD=NEW. For example: --rename '^backbone\\.=encoder.'"
        )
    try:
        return re.compile(old), new
    except re.error as error:
        raise InputError(
            f"--rename {text!r}: {old!r} is not a regular expression: {error}."
        ) from None


def _validated(
    root: Path,
    entries: Sequence[Entry],
    choice: Choice,
    rules: list[tuple[re.Pattern[str], str]],
    notes: list[str],
    headers: Headers,
    *,
    compare: bool,
    has_gaps: bool,
) -> Trajectory:
    checkpoints: list[Checkpoint] = []
    tensors: dict[str, TensorHeader] = {}
    sources: dict[str, str] = {}
    dropped: dict[str, None] = {}
    same = SameTensors() if compare else None
    intervals = _intervals(entries, choice, headers)
    for entry in (entries[position] for position in choice.used):
        step, files = entry.step, entry.files
        file_headers = [headers.pop(file) for file in files]
        stored = {
            name: tensor for header in file_headers for name, tensor in header.tensors.items()
        }
        if not checkpoints:
            sources = _names(stored, rules, files[0], dropped)
            tensors = {name: stored[source] for name, source in sources.items()}
        known = {source: tensors[name] for name, source in sources.items()}
        if stored.keys() != known.keys():
            sources_here = _names(stored, rules, files[0], dropped).values()
            stored = {source: stored[source] for source in sources_here}
        if stored != known:
            raise InputError(_difference(stored, known, step, files[0]))
        checkpoints.append(
            Checkpoint(
                step,
                files,
                sum(header.size for header in file_headers),
                joined(header.fingerprint for header in file_headers),
            )
        )
        if same is not None:
            same.add(step, files, file_headers)
    if dropped:
        names = few([*map(repr, dropped)], 6)
        notes = [
            *notes,
            f"left out {names}: --rename makes the name empty, so the result does not cover them",
        ]
    notes = [
        *choice.notes,
        *notes,
        # consumed checkpoints cannot be examined any more
        *([] if has_gaps else _late(checkpoints[0].step)),
        *([] if has_gaps else long_segments([entry.step for entry in entries], intervals, choice)),
        *(same.notes() if same is not None else ()),
    ]
    return Trajectory(
        root=root,
        checkpoints=tuple(checkpoints),
        tensors=tensors,
        sources=sources,
        notes=tuple(notes),
        breaks=choice.breaks,
    )


def _intervals(entries: Sequence[Entry], choice: Choice, headers: Headers) -> list[int]:
    """Return the `every` that each checkpoint was recorded with; 1 if its header was not read."""
    used = set(choice.used)
    intervals = []
    for position, entry in enumerate(entries):
        file = entry.files[0]
        header = headers[file] if position in used else headers.get(file)
        intervals.append(1 if header is None else every_of(header))
    return intervals


def _ends_of_bursts(entries: Sequence[Entry], choice: Choice, headers: Headers) -> frozenset[int]:
    """Return the positions among the used checkpoints where a burst of the recorder ends."""
    used = [entries[position] for position in choice.used]
    bursts = [bursts_of(headers[entry.files[0]]) for entry in used]
    return between_bursts([entry.step for entry in used], bursts, choice)


def _names(
    tensors: Mapping[str, TensorHeader],
    rules: list[tuple[re.Pattern[str], str]],
    file: Path,
    dropped: dict[str, None],
) -> dict[str, str]:
    """Map the name of each tensor to its name in the file; add to `dropped` the tensors whose names
    the rules make empty.

    Raises:
        InputError: if a rule cannot be applied, or two tensors get the same name.
    """
    sources: dict[str, str] = {}
    for source in tensors:
        name = normalise(source)
        for regex, new in rules:
            try:
                name = regex.sub(new, name)
            except (re.error, IndexError) as error:
                raise InputError(
                    f"--rename {f'{regex.pattern}={new}'!r} cannot be applied to {name!r}: {error}."
                ) from None
        if not name and source:
            dropped[source] = None
            continue
        if name in sources:
            raise InputError(
                f"{sources[name]!r} and {source!r} in {file} both become {name!r}. Tell them apart "
                "with --rename OLD=NEW."
            )
        sources[name] = source
    return sources


def _difference(
    stored: Mapping[str, TensorHeader], known: Mapping[str, TensorHeader], step: int, file: Path
) -> str:
    for name in sorted({*stored, *known}):
        if stored.get(name) != known.get(name):
            break
    this = f"{stored[name].dtype} {list(stored[name].shape)}" if name in stored else "absent"
    first = f"{known[name].dtype} {list(known[name].shape)}" if name in known else "absent"
    return (
        f"tensor {name!r} is {this} in {file} (step {step}) but {first} at the first step. All "
        "checkpoints must come from one model; leave the odd ones out with --steps. If the model "
        f"computes the same without the tensor, leave it out with {drop_options([normalise(name)])}"
    )


def _late(first: int) -> list[str]:
    """Return a note if the first checkpoint does not hold the initial weights."""
    return (
        [f"the first checkpoint is step {first}: the result does not include earlier changes"]
        if first > 0
        else []
    )


def read_checkpoint(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Read the tensors of one checkpoint onto the CPU, by the model's names, in their stored types.

    Every number is finite.

    Args:
        checkpoint: the files, with their size and fingerprint from when the trajectory was opened.
        names: the model's name of each tensor → its name in the files.

    Raises:
        SpanError: if a file changed since the trajectory was opened, or cannot be read.
        NotFiniteError: if a number is not finite.
    """
    import torch  # here, because a driver that only looks at headers need not load torch

    tensors = read_stored(checkpoint, names)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            bad = int((~torch.isfinite(tensor.float())).sum())
            mask = (
                ""
                if bool(tensor.isnan().any())
                else f" If it is a mask that never moves, name it in Task(fixed=[{name!r}])."
            )
            raise NotFiniteError(
                f"tensor {name!r} holds {bad:,} NaN or Inf in {checkpoint.files[0]} (step "
                f"{checkpoint.step}). The segments that touch this step cannot be allocated; move "
                f"the file away and write another run with --out.{mask}",
                checkpoint.step,
            )
    return tensors


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every number of a floating tensor is finite."""
    import torch

    if not tensor.numel():
        return True
    # Minimum and maximum propagate NaN and Inf; testing every number takes twenty times as long.
    ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return bool(torch.isfinite(torch.stack(ends)).all())


def read_stored(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Read the tensors of one checkpoint as `read_checkpoint` does, without checking their numbers.

    Read only the bytes of these tensors, each once and into the memory that the tensor keeps.

    Args:
        checkpoint: as for `read_checkpoint`.
        names: as for `read_checkpoint`.

    Raises:
        SpanError: if a file changed since the trajectory was opened, or cannot be read.
    """
    from safetensors import SafetensorError

    from .reading import fingerprint_and_tensors

    tensors: dict[str, torch.Tensor] = {}
    fingerprints = []
    for path in checkpoint.files:
        try:
            own, part = fingerprint_and_tensors(path, checkpoint.fingerprint, set(names.values()))
        except (OSError, InputError, SafetensorError) as error:
            raise SpanError(
                f"cannot read {path} (step {checkpoint.step}): {error}. Restore the file and run "
                "again."
            ) from None
        fingerprints.append(own)
        tensors |= part
    if joined(fingerprints) != checkpoint.fingerprint:
        raise SpanError(
            f"{checkpoint.files[0]} (step {checkpoint.step}) changed since the run was created. "
            "Restore it, or start a new run with --out."
        )
    return {name: tensors[source] for name, source in names.items()}
