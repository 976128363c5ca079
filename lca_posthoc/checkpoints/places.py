"""Parse where the checkpoints of one series lie: a directory, a template with `{step}`, the cache
of a hub, or several of these.

`ROOT/step{step}/model.safetensors` and `hf://ORG/NAME@step{step}` stand for the file or directory
of every step. The cache of a hub names revisions in `refs/` and keeps their files in
`snapshots/HASH/`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from ..errors import InputError
from .paths import below, is_remote, located

STEP = "{step}"
Where = str | Path | Sequence[str | Path]

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_LONGEST_REF = 200  # bytes of a file that names a commit


@dataclass(frozen=True)
class Place:
    """Name one place: a directory, and the path below it that contains `{step}`.

    `rest` is empty for a directory that is to be searched.
    """

    root: Path
    rest: str = ""

    def __str__(self) -> str:
        return f"{str(self.root).rstrip('/')}/{self.rest}" if self.rest else str(self.root)

    @property
    def is_listed(self) -> bool:
        """Return whether the steps can be listed; revisions of a hub cannot."""
        first = self.rest.partition("/")[0]
        return not (is_remote(self.root) and "@" in first.partition(STEP)[0])

    def of_step(self, step: int) -> Path:
        """Return the path of one step."""
        return self.root / self.rest.replace(STEP, str(step))

    def all_steps(self) -> list[tuple[int, Path]]:
        """Return the existing steps with their paths, in order of path.

        Raises:
            OSError: if the place cannot be listed.
        """
        before, *after = map(re.escape, self.rest.split(STEP))
        regex = re.compile(before + "(?P<step>[0-9]{1,18})" + "(?P=step)".join(after))
        pattern = "*".join(map(glob.escape, self.rest.split(STEP)))
        matches = (
            (regex.fullmatch(below(path, self.root).as_posix()), path)
            for path in sorted(self.root.glob(pattern))
        )
        return [(int(match["step"]), path) for match, path in matches if match]


def place_of(where: str | Path) -> Place:
    """Parse one argument into a place.

    Raises:
        InputError: if `{step}` is in a part of an address that cannot vary.
    """
    if STEP not in str(where):
        return Place(located(where))
    parts = str(where).split("/")
    first = next(index for index, part in enumerate(parts) if STEP in part)
    root = "/".join(parts[:first])
    if root.endswith(":/"):
        raise InputError(
            f"{where} has {STEP} in the name of the place itself. Only what comes after it can "
            f"have the step in it, such as {root}/{parts[first].replace(STEP, 'NAME')}/step{STEP}."
        )
    return Place(located(root or ("/" if first else ".")), "/".join(parts[first:]))


def arguments_of(where: Where) -> list[str | Path]:
    """Return the arguments that name places, as a list."""
    return [where] if isinstance(where, str | Path) else [*where]


def places_of(where: Where) -> list[Place]:
    """Parse one or several arguments into places; several places become absolute.

    Raises:
        InputError: if there is none, or some are remote and others are not.
    """
    places = [place_of(argument) for argument in arguments_of(where)]
    if not places:
        raise InputError("no checkpoints are named. Give the directory that holds them.")
    if len(places) == 1:
        return places
    if len({is_remote(place.root) for place in places}) > 1:
        raise InputError(
            "some of the places are remote and others are not. Copy the checkpoints of one "
            "training to one side first."
        )
    return [
        place if is_remote(place.root) else replace(place, root=Path(os.path.abspath(place.root)))
        for place in places
    ]


def common_root(places: Sequence[Place]) -> Path:
    """Return the deepest directory that contains all places; a single place keeps its root as
    given.

    Raises:
        InputError: if they have none, such as buckets of two services.
    """
    if len(places) == 1:
        return places[0].root
    if not is_remote(places[0].root):
        return Path(os.path.commonpath([place.root for place in places]))
    parts = [str(place.root).split("/") for place in places]
    levels = zip(*parts, strict=False)
    shared = [names[0] for names in takewhile(lambda names: len({*names}) == 1, levels)]
    if len(shared) < 3:  # protocol, empty part, name of the bucket
        raise InputError(
            f"{places[0]} and {places[-1]} have no directory in common, to which a run could "
            "refer. Copy them to one place first."
        )
    return located("/".join(shared))


def described(places: Sequence[Place], root: Path) -> tuple[str, ...]:
    """Return the places relative to a directory; an empty tuple if there is a single directory to
    search.

    Args:
        places: the places.
        root: directory that contains them, see `common_root`.
    """
    if len(places) == 1 and not places[0].rest:
        return ()
    return tuple((below(place.root, root) / place.rest).as_posix() for place in places)


def found_again(root: str | Path, places: Sequence[str]) -> Where:
    """Return the arguments that name the places again; the inverse of `described`.

    Args:
        root: the directory, which may have moved since.
        places: the result of `described`.
    """
    return [f"{str(root).rstrip('/')}/{place}" for place in places] if places else root


def revisions(root: Path) -> list[tuple[str, Path]] | None:
    """Return each revision in a hub's cache with the directory of its files; None if a directory is
    not such a cache.
    """
    if is_remote(root) or not ((root / "refs").is_dir() and (root / "snapshots").is_dir()):
        return None
    return [
        (path.relative_to(root / "refs").as_posix(), root / "snapshots" / commit)
        for path, commit in _commits(root / "refs")
    ]


def _commits(refs: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file that names a commit, with the commit."""
    for path in sorted(refs.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                text = file.read(_LONGEST_REF).decode("ascii", "replace").strip()
            if _COMMIT.fullmatch(text):
                yield path, text
