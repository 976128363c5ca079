"""Shells at a terminal, in which somebody types a command and presses Tab."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .terminal import PACKAGE, environment

PATIENCE = 120.0  # seconds in which a shell answers, or ends
SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--private", "--no-config", "-i"],
}
SETUP = {
    "bash": 'source "$COMPLETION"',
    "zsh": 'autoload -Uz compinit && compinit -D && source "$COMPLETION"',
    "fish": 'source "$COMPLETION"',
}
# Completes as the real command does, and notes which modules that took; any other call is written down.
LCA = """\
#!/bin/sh
if [ -n "$_LCA_COMPLETE" ]; then
    exec {python} {completing}
fi
printf '%s\\n' "$@" > "$TYPED"
"""
COMPLETING = """\
import atexit, os, sys
sys.path.insert(0, {package!r})
sys.argv[0] = "lca"

@atexit.register
def note_modules():
    with open(os.environ["MODULES"], "a") as file:
        print(*sys.modules, file=file)

from lca_posthoc.cli import main
main()
"""


@dataclass
class Shell:
    """A kind of shell, with `lca` and its completion, that works in a directory."""

    name: str
    root: Path
    work: Path

    def prepare(self) -> None:
        """Put `lca` on the path, and write the script that teaches the shell to complete it."""
        self.root.mkdir()
        completing = self.root / "completing.py"
        completing.write_text(COMPLETING.format(package=PACKAGE))
        lca = self.root / "lca"
        lca.write_text(LCA.format(python=shlex.quote(sys.executable), completing=completing))
        lca.chmod(0o755)
        # else fish would begin to read all manuals
        (self.root / "fish" / "generated_completions").mkdir(parents=True)
        script = subprocess.run(
            [str(lca)],
            env=self.environment() | {"_LCA_COMPLETE": f"{self.name}_source"},
            capture_output=True,
            check=True,
        )
        (self.root / "completion").write_bytes(script.stdout)
        (self.root / "modules").unlink()

    def environment(self) -> dict[str, str]:
        return environment(
            PATH=f"{self.root}:{os.environ['PATH']}",
            HOME=str(self.root),
            XDG_DATA_HOME=str(self.root),
            XDG_CONFIG_HOME=str(self.root),
            COMPLETION=str(self.root / "completion"),
            TYPED=str(self.root / "typed"),
            MODULES=str(self.root / "modules"),
            LC_ALL="C.UTF-8",
        )

    def completed(self, begun: str) -> list[str]:
        """The arguments `lca` gets where this is typed, then Tab and Enter."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            ["setsid", "--ctty", *SHELLS[self.name]],
            cwd=self.work,
            env=self.environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, f"{SETUP[self.name]}; echo re''ady\n".encode())
        _read_until(ours, "ready")
        os.write(ours, f"lca {begun}\t\n".encode())
        os.write(ours, b"exit\n")
        _read_until(ours, None)
        assert process.wait(PATIENCE) == 0
        return (self.root / "typed").read_text().splitlines()

    def modules(self) -> set[str]:
        """What completing imported so far."""
        return set((self.root / "modules").read_text().split())


def _read_until(terminal: int, word: str | None) -> str:
    """Read what a terminal shows until a word is there; None for the end of its program."""
    shown, end = b"", time.monotonic() + PATIENCE
    while word is None or word.encode() not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, shown
        try:
            block = os.read(terminal, 65536)
        except OSError:  # nobody has the other side any more
            block = b""
        if not block:
            assert word is None, shown
            break
        shown += block
    return shown.decode(errors="replace")
