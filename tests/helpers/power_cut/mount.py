"""Mount a `Disk` for real until its power is cut; a process of its own serves it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

from .disk import Disk

NEVER = 2**62  # changes
HANGS = 120.0  # seconds after which a process is taken to hang
MOUNTED, CUT = b"mounted\n", b"cut\n"  # what the process that serves says
_REPOSITORY = Path(__file__).parents[3]


def why_not() -> str | None:
    """Return why no such file system can be mounted here; None where one can."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "to mount a file system of one's own takes root and /dev/fuse"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:  # the package, or the library that it calls
        return f"mfusepy or libfuse3 is missing: {error}"
    return None


class Mounted:
    """A disk that is mounted for the length of the context.

    After so many changes and flushes every further call waits. Whoever made it is to be killed
    meanwhile, so that nothing later is on the disk, and nobody sees an error.

    Args:
        place: an empty directory.
        disk: what is on it at first.
        changes: those after which its power is cut.

    Attributes:
        disk: what its readers saw last, and what of that is flushed; from the end of the context.
        changes: how many there were; likewise.
    """

    def __init__(self, place: Path, disk: Disk, changes: int = NEVER) -> None:
        self.place, self.disk, self.changes = place, disk, changes

    def __enter__(self) -> Mounted:
        descriptor, image = tempfile.mkstemp(prefix="lca-disk-")
        os.close(descriptor)
        self._image = Path(image)
        self._image.write_bytes(pickle.dumps(self.disk))
        arguments = [str(self.place), image, str(self.changes)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.power_cut.server", *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_REPOSITORY,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == MOUNTED, f"{self.place} cannot be mounted"
        return self

    def is_cut(self, *processes: int) -> bool:
        """Wait until the power is cut, or until one of some processes has ended.

        Args:
            processes: descriptors that become readable when they end.
        """
        stdout = self._process.stdout
        assert stdout is not None
        ready = wait([stdout, *processes], HANGS)
        assert ready, f"neither an end nor a cut within {HANGS} s"
        return stdout in ready and stdout.readline() == CUT

    def let_fail(self) -> None:
        """Let the calls fail that wait since the cut, so that who was killed can end."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"fail\n")

    def __exit__(self, *_: object) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        try:
            self.let_fail()
            subprocess.run(["umount", self.place], check=True, timeout=HANGS)
            self.changes = int(stdout.read().split()[-1])
            self.disk = pickle.loads(self._image.read_bytes())
        finally:
            self._process.kill()
            self._process.communicate()
            if os.path.ismount(self.place):
                subprocess.run(["umount", "--lazy", self.place], check=True)
            self._image.unlink()
