"""A tiny model, its iterates on disk and its task file, the command line in this process, and what
a refusal looks like.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from lca_posthoc.cli import cli

TASK = """\
import torch
import torch.nn.functional as F
from lca_posthoc import Loss, Task


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(64, 8)
        self.out = torch.nn.Linear(8, 4)

    def forward(self, inputs):
        return self.out(torch.tanh(self.hidden(inputs)))


generator = torch.Generator().manual_seed(1)
inputs = torch.randn(40, 64, generator=generator)
targets = torch.randint(0, 4, (40,), generator=generator)
train = (inputs[:30], targets[:30])
validation = (inputs[30:], targets[30:])


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def task():
    return Task(
        model=Net,
        data={"train": train, "validation": validation},
        losses={"train": Loss(F.cross_entropy, on="train"), "validation": Loss(F.cross_entropy, on="validation")},
    )
"""
STEPS = tuple(range(0, 70, 10))

# Signs that must never be shown as they are: each kind, at both ends of its range.
UNSAFE_NAMES = (
    *(
        "\x00",
        "\x07",
        "\x1b[31m",
        "\x1f",
        "\r",
        "\n",
        "\t",
        "\x7f",
        "\x80",
        "\x85",
        "\x9b31m",
        "\x9f",
    ),
    *("\u061c", "\u200e", "\u200f", "\u202a", "\u202e", "\u2066", "\u2069", "\u2028", "\u2029"),
)
UNSAFE = (*UNSAFE_NAMES, "\ud800", "\udfff")  # no name in a file has half a pair of surrogates

Tensors = Mapping[str, torch.Tensor]


@functools.cache
def task_namespace() -> dict[str, Any]:
    """What the task file defines, for tests that need its model or data."""
    namespace: dict[str, Any] = {}
    exec(TASK, namespace)
    return namespace


@functools.cache
def iterates() -> tuple[dict[str, torch.Tensor], ...]:
    """The weights of seven iterates of gradient descent with momentum on the task's training
    split.
    """
    made = task_namespace()
    torch.manual_seed(2)
    model, (inputs, targets) = made["Net"](), made["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    found = []
    for _ in STEPS:
        found.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return tuple(found)


def step_file(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.safetensors"


def write_step(directory: Path, step: int, tensors: Tensors, name: str | None = None) -> Path:
    """One checkpoint as `Recorder(every=10)` writes it, or under another name."""
    path = directory / name if name else step_file(directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt", "step": str(step), "every": "10"})
    return path


def record(
    directory: Path, steps: Sequence[int] = STEPS, dtype: torch.dtype = torch.float32
) -> Path:
    for step, tensors in zip(steps, iterates(), strict=False):
        write_step(directory, step, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return directory


def write_task(path: Path, old: str = "", new: str = "") -> Path:
    """The task file, with `old` replaced by `new`, which must change it."""
    text = TASK.replace(old, new) if old else TASK
    assert not old or text != TASK
    path.write_text(text)
    return path


def lca(*arguments: object) -> Result:
    """`lca …` in this process; an exception that is not an exit is a bug of the package and raised
    here.
    """
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def marker(run: Path, loss: str, span: int) -> Path:
    """The commit marker of a span."""
    (found,) = (run / "commits" / loss).glob(f"{span:06d}-*.json")
    return found


def run_lca(checkpoints: Path, task: object, out: Path, *options: object) -> Result:
    return lca("run", checkpoints, "--task", task, "--out", out, "--cluster", "inline", *options)


def document(result: Result) -> dict[str, Any]:
    """The one JSON document a successful command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


STAGES_OF_A_PLAN = (
    "lca: reading the headers",
    "lca: building the task",
    "lca: timing a few batches",
)


def last_line(result: Result) -> str:
    """The one line an error is: after any notes, beginning with `lca: `, without a traceback or
    control characters.
    """
    *before, last = result.stderr.splitlines() or [""]
    assert [line for line in before if not line.startswith(("note: ", *STAGES_OF_A_PLAN))] == [], (
        result.stderr
    )
    assert last.startswith("lca: "), result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in last, last
    assert steering(result.stderr) <= {"\n"}, repr(result.stderr)
    assert result.stdout == ""
    return last


def steering(text: str) -> set[str]:
    """Return the signs of a text that steer what shows it, as Unicode classes them."""
    return {
        sign
        for sign in set(text)
        if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(sign)
        in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or sign in ("\N{ARABIC LETTER MARK}", "\N{LEFT-TO-RIGHT MARK}", "\N{RIGHT-TO-LEFT MARK}")
    }


def says(text: str, *words: str) -> None:
    assert [word for word in words if word not in text] == [], text


def refused(result: Result, *words: str, code: int = 2) -> str:
    """Asserts the exit code and that the message holds every one of `words`."""
    line = last_line(result)
    says(line, *words)
    assert result.exit_code == code, (result.exit_code, line)
    return line


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file below `root` with its bytes, every directory with None."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }
