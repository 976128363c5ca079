"""Tensors that only the checkpoints hold: known buffers are left out with a note, weights never;
what is refused says what to paste.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lca_posthoc
from tests.helpers.cli import (
    Tensors,
    iterates,
    last_line,
    refused,
    run_lca,
    says,
    write_step,
    write_task,
)
from tests.helpers.replayed_cases import arrays

Extra = Callable[[int], Tensors]


def tril(*shape: int) -> torch.Tensor:
    return torch.ones(shape).tril()


SINE = torch.linspace(0, 1, 8).sin()
ROTARY = 1 / 10000 ** (torch.arange(4) / 4)
PLAIN = ("self.out = torch.nn.Linear(8, 4)", "self.out = torch.nn.Linear(8, 4)  # as it is")


def own(name: str, value: str) -> tuple[str, str]:
    """The task's model with a buffer it does not save."""
    return "self.out =", f"self.register_buffer({name!r}, {value}, persistent=False); self.out ="


# what a checkpoint holds beside the model at a step, the model, words of the note
LEFT_OUT: dict[str, tuple[Extra, tuple[str, str], str]] = {
    "masks of GPT-NeoX": (
        lambda step: {
            "layers.0.attention.bias": tril(1, 1, 6, 6).bool(),
            "layers.11.attention.bias": tril(1, 1, 6, 6).bool(),
            "layers.0.attention.masked_bias": torch.tensor(-1e9),
        },
        PLAIN,
        "'layers.*.attention.bias' (a causal mask); 'layers.*.attention.masked_bias'",
    ),
    "rotary frequencies": (
        lambda step: {"l.0.rotary_emb.inv_freq": ROTARY},
        PLAIN,
        "(rotary frequencies)",
    ),
    "rotary frequencies in half precision": (
        lambda step: {"l.0.rotary_emb.inv_freq": ROTARY.half()},
        own("inv_freq", "1 / 10000 ** (torch.arange(4) / 4)"),
        "(rotary frequencies)",
    ),
    "a mask of nanoGPT": (
        lambda step: {"h.0.attn.bias": tril(1, 1, 8, 8)},
        PLAIN,
        "'h.*.attn.bias'",
    ),
    "a local mask of GPT-Neo": (
        lambda step: {"h.1.attn.attention.bias": tril(1, 1, 8, 8).triu(-2).to(torch.uint8)},
        PLAIN,
        "(a causal mask)",
    ),
    "an added mask": (
        lambda step: {"attn.mask": torch.full((8, 8), -1e9).triu(1)},
        PLAIN,
        "'attn.mask' (a causal mask)",
    ),
    "positions of BERT": (
        lambda step: {
            "embeddings.position_ids": torch.arange(12).reshape(1, 12),
            "embeddings.token_type_ids": torch.zeros(1, 12, dtype=torch.int64),
        },
        PLAIN,
        "'embeddings.position_ids' (positions)",
    ),
    "a buffer that is no longer saved": (
        lambda step: {"pe": SINE},
        own("pe", "torch.linspace(0, 1, 8).sin()"),
        "'pe'",
    ),
    "what averages count": (lambda step: {"n_averaged": torch.tensor(step)}, PLAIN, "'n_averaged'"),
    "what a profiler counted": (
        lambda step: {"out.total_ops": torch.zeros(1).double()},
        PLAIN,
        "'out.total_ops'",
    ),
}


def series(place: Path, extra: Extra) -> Path:
    for step, state in enumerate(iterates()[:3]):
        write_step(place, step, {**state, **extra(step)})
    return place


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_model_computes_is_left_out_with_a_note_and_changes_no_number(
    tmp_path: Path, case: str
) -> None:
    extra, model, words = LEFT_OUT[case]
    task = write_task(tmp_path / "task.py", *model)
    made = []
    for name, more in (("with", extra), ("without", lambda step: {})):
        done = run_lca(series(tmp_path / name, more), task, tmp_path / f"{name}.lca")
        assert done.exit_code == 0, done.output
        assert ("left out tensors that only the checkpoints hold" in done.stderr) == (
            name == "with"
        )
        assert name == "without" or words in done.stderr
        made.append(arrays(lca_posthoc.open_run(tmp_path / f"{name}.lca")["train"].allocation))
    assert {name: each.tobytes() for name, each in made[0].items()} == {
        name: each.tobytes() for name, each in made[1].items()
    }


REFUSED: dict[str, tuple[Extra, tuple[str, str], tuple[str, ...]]] = {
    "a layer": (
        lambda step: {"extra.weight": torch.ones(3, 3)},
        PLAIN,
        ("'extra.weight'", "not in the task's model"),
    ),
    "a trained bias of attention": (
        lambda step: {"attn.bias": torch.ones(8) * step},
        PLAIN,
        ("'attn.bias'",),
    ),
    "a trained bias by position": (
        lambda step: {"attn.bias": torch.ones(1, 1, 4, 4) * step},
        PLAIN,
        ("'attn.bias'", "its numbers are not those of a causal mask"),
    ),
    "frequencies that are trained": (
        lambda step: {"rotary.inv_freq": ROTARY * (1 + step)},
        PLAIN,
        ("'rotary.inv_freq'", "moves between the first and the last checkpoint"),
    ),
    "frequencies of another base": (
        lambda step: {"rotary.inv_freq": ROTARY},
        own("inv_freq", "1 / 500000 ** (torch.arange(4) / 4)"),
        ("'rotary.inv_freq'", "not what the model itself computes"),
    ),
    "frequencies of another length": (
        lambda step: {"rotary.inv_freq": ROTARY},
        own("inv_freq", "1 / 10000 ** (torch.arange(2) / 2)"),
        ("'rotary.inv_freq'", "not what the model itself computes"),
    ),
    "a buffer with other values": (
        lambda step: {"pe": SINE * 2},
        own("pe", "torch.linspace(0, 1, 8).sin()"),
        ("'pe'", "not what the model itself computes"),
    ),
    "a count of a layer the model has not": (
        lambda step: {"norm.num_batches_tracked": torch.tensor(step)},
        PLAIN,
        ("'norm.num_batches_tracked'",),
    ),
    "positions in another order": (
        lambda step: {"position_ids": torch.arange(8).flip(0)},
        PLAIN,
        ("'position_ids'", "its numbers are not those of positions (0, 1, 2, …)"),
    ),
    "many": (
        lambda step: (
            {f"h.{layer}.ln.weight": torch.ones(2) for layer in range(9)} | {"a=b": torch.ones(1)}
        ),
        PLAIN,
        ("and 7 more", r"--rename '^h\.\d+\.ln\.weight$='"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_weight_the_model_lacks_is_refused_and_the_options_named_leave_it_out(
    tmp_path: Path, case: str
) -> None:
    extra, model, words = REFUSED[case]
    task = write_task(tmp_path / "task.py", *model)
    line = refused(
        run_lca(series(tmp_path / "ck", extra), task, tmp_path / "run"), *words, "Build the model"
    )
    advice = shlex.split(line[line.index("--rename '") :].removesuffix("."))
    done = run_lca(tmp_path / "ck", task, tmp_path / "run", *advice)
    assert done.exit_code == 0, done.output
    says(done.stderr, "--rename makes the name empty", repr(next(iter(extra(0)))))
    assert lca_posthoc.open_run(tmp_path / "run")["train"].allocation.sizes["step"] == 2


def test_a_name_alone_may_be_dropped_and_an_empty_end_of_one_drops_nothing(tmp_path: Path) -> None:
    task, ck = (
        write_task(tmp_path / "task.py"),
        series(tmp_path / "ck", lambda step: {"old.w": torch.ones(2)}),
    )
    refused(run_lca(ck, task, tmp_path / "run", "--rename", "w$="), "'old.'")
    assert run_lca(ck, task, tmp_path / "run", "--rename", "old.w=").exit_code == 0
    refused(
        run_lca(ck, task, tmp_path / "other", "--rename", "old.w=", "--rename", "^out.bias$="),
        "'out.bias'",
        "missing",
    )


def test_a_tensor_that_comes_later_is_refused_and_can_be_dropped(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task.py")
    ck = series(tmp_path / "ck", lambda step: {"late.w": torch.ones(2)} if step == 2 else {})
    line = refused(
        run_lca(ck, task, tmp_path / "run"), "'late.w'", "absent at the first step", "--rename"
    )
    advice = shlex.split(re.search(r"--rename '[^']*'", line)[0])
    assert run_lca(ck, task, tmp_path / "run", *advice).exit_code == 0


@pytest.mark.parametrize("moves", [False, True])
def test_fixed_patterns_leave_out_what_only_the_files_hold_unless_it_moves(
    tmp_path: Path, moves: bool
) -> None:
    task = write_task(tmp_path / "task.py", "losses={", "fixed=['old.*'], losses={")
    done = run_lca(
        series(tmp_path / "ck", lambda step: {"old.w": torch.ones(2) + moves * step}),
        task,
        tmp_path / "run",
    )
    if moves:
        says(last_line(done), "'old.w'", "moves between the first and the last checkpoint")
    else:
        says(done.stderr, "'old.w' (named in Task.fixed)")
    assert done.exit_code == 2 * moves
