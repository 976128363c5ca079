"""DOC"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lca_posthoc
from lca_posthoc.checkpoints.trajectory import open_trajectory
from lca_posthoc.convert import convert
from lca_posthoc.errors import InputError, ResourceError
from tests.helpers.cli import (
    STEPS,
    contents,
    iterates,
    lca,
    record,
    refused,
    run_lca,
    says,
    step_file,
    task_namespace,
    write_step,
    write_task,
)
from tests.helpers.replayed_cases import arrays

from ..helpers.saved_checkpoints import State, equal, save, series, told

LONG = "all 6 segments are longer than one step"

# --- layouts --------------------------------------------------------------------------------------


class Hostile:
    """Unpickled as pickle does it, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def lightning(place: Path, step: int, state: State) -> None:
    inside = {
        "epoch": 0,
        "global_step": step,
        "loops": {},
        "optimizer_states": [{"state": {0: {"m": torch.ones(3)}}}],
    }
    save(
        place / f"epoch=1-step={step}.ckpt",
        {"state_dict": dict(state), "hyper_parameters": {"lr": 0.1}, **inside},
    )


def nanogpt(place: Path, step: int, state: State) -> None:
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    save(
        place / f"saved at {step + 7}",
        {"model": wrapped, "iter_num": step, "config": {"seed": 1}, "optimizer": {}},
    )


def tutorial(place: Path, step: int, state: State) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    save(
        place / f"model{step}.pth",
        {
            "model_state_dict": dict(state),
            "optimizer_state_dict": optimizer,
            "step": step,
            "loss": 1.5,
        },
    )


def counted_in_a_tensor(place: Path, step: int, state: State) -> None:
    save(place / f"saved at {step + 7}", {"model": dict(state), "iteration": torch.tensor(step)})


def hugging_face(place: Path, step: int, state: State) -> None:
    save(place / f"checkpoint-{step}" / "pytorch_model.bin", dict(state))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        save(place / f"checkpoint-{step}" / name, Hostile(place / "ran"))


def hugging_face_shards(place: Path, step: int, state: State) -> None:
    directory, names = place / f"checkpoint-{step}", list(state)
    parts = {
        "pytorch_model-00001-of-00002.bin": names[:1],
        "pytorch_model-00002-of-00002.bin": names[1:],
    }
    for file, part in parts.items():
        save(directory / file, {name: state[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def trainer_state(place: Path, step: int, state: State) -> None:
    save(place / f"saved-{step + 1}" / "pytorch_model.bin", dict(state))
    (place / f"saved-{step + 1}" / "trainer_state.json").write_text(
        json.dumps({"global_step": step})
    )


def with_settings(place: Path, step: int, state: State, **options: Any) -> Path:
    """What scripts put beside the weights: parsed arguments, numbers of numpy, the state of its
    generator.
    """
    arguments = argparse.Namespace(
        lr=0.1, output=place, best=np.float32(0.5), nested=argparse.Namespace(seed=1)
    )
    beside = {
        "args": arguments,
        "best": np.float64(1.5),
        "epoch": np.int64(3),
        "random": np.random.get_state(),
    }
    return save(place / f"checkpoint{step:04d}.pth", {"model": dict(state), **beside}, **options)


def with_settings_of_an_older_numpy(place: Path, step: int, state: State) -> None:
    path = with_settings(place, step, state, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert b"numpy._core.multiarray\n" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))


LAYOUTS: dict[str, Callable[[Path, int, State], object]] = {
    "state dicts": lambda place, step, state: save(place / f"step_{step}.pt", dict(state)),
    "module": lambda place, step, state: save(
        place / f"step_{step}.pt", {"module": dict(state), "epoch": 1}
    ),
    "Parameters": lambda place, step, state: save(
        place / f"step_{step}.pt", {name: torch.nn.Parameter(each) for name, each in state.items()}
    ),
    "before zip": lambda place, step, state: save(
        place / f"ckpt-{step}.pt", {"model": dict(state)}, _use_new_zipfile_serialization=False
    ),
    "another suffix": lambda place, step, state: save(
        place / f"checkpoint_{step}.pth.tar", {"state_dict": dict(state)}
    ),
    "one file in a directory": lambda place, step, state: save(
        place / f"step{step}" / "model.pt", dict(state)
    ),
    "adapters": lambda place, step, state: save(
        place / f"checkpoint-{step}" / "adapter_model.bin", dict(state)
    ),
    "Lightning": lightning,
    "nanoGPT": nanogpt,
    "a tensor that counts": counted_in_a_tensor,
    "tutorial": tutorial,
    "Hugging Face": hugging_face,
    "Hugging Face, sharded": hugging_face_shards,
    "trainer state": trainer_state,
    "settings": with_settings,
    "settings, an older numpy": with_settings_of_an_older_numpy,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, layout: str) -> None:
    for step, state in zip(STEPS, iterates(), strict=True):
        LAYOUTS[layout](tmp_path / "saved", step, state)
    heard = told(tmp_path / "saved", tmp_path / "st")
    prefix = "_orig_mod." if layout == "nanoGPT" else ""
    named = [{f"{prefix}{name}": tensor for name, tensor in state.items()} for state in iterates()]
    equal(tmp_path / "st", dict(zip(STEPS, named, strict=True)))
    assert [note for note in heard if not note.startswith(LONG)] == []
    assert open_trajectory(tmp_path / "st").steps == list(STEPS)
    assert not (tmp_path / "saved" / "ran").exists()


def test_places_with_the_step_in_them_are_imported(tmp_path: Path) -> None:
    """The same reading of places as that of a run; a number inside a file yields to the place's."""
    for step, state in zip(STEPS, iterates(), strict=True):
        folder = tmp_path / "saved" / f"step{step}" / "last"
        save(folder / "pytorch_model.bin", {"step": 3, "model": state})
        save(folder / "optimizer.bin", {"step": 9})
    place = str(tmp_path / "saved" / "step{step}" / "last" / "pytorch_model.bin")
    told(place, tmp_path / "all")  # type: ignore[arg-type]
    wanted = dict(zip(STEPS, iterates(), strict=True))
    equal(tmp_path / "all", wanted)
    some = [*STEPS[:1], *STEPS[-2:]]
    listed = ",".join(map(str, some))
    assert lca("import", place, tmp_path / "some", "--steps", listed).exit_code == 0
    equal(tmp_path / "some", {step: wanted[step] for step in some})
    out = tmp_path / "x"
    refused(lca("import", place, out, "--steps", f"{STEPS[0]},77"), "names step 77 without")
    refused(lca("import", place, out, "--pattern", r"(?P<step>\d+)"), "--pattern does not apply")
    refused(lca("import", tmp_path / "saved", out, "--steps", "0:5"), "needs a path with")
    hint = lca("run", tmp_path / "saved", "--task", write_task(tmp_path / "task.py"))
    refused(hint, f"name the files in them: lca import '{place}' …")


def test_what_lightning_writes_is_imported(tmp_path: Path) -> None:
    import lightning

    inputs, targets = task_namespace()["train"]
    kept: dict[int, State] = {}

    class Module(lightning.LightningModule):
        def __init__(self, rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = task_namespace()["Net"]()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            kept[self.global_step] = {
                name: tensor.clone() for name, tensor in self.state_dict().items()
            }

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), self.hparams.rate, momentum=0.9)

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=10
    )
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "lit", every_n_train_steps=1, save_top_k=-1, save_last=True
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    lightning.Trainer(max_epochs=2, callbacks=[saving], **quiet).fit(Module(), data)
    heard = told(tmp_path / "lit", tmp_path / "st")
    equal(tmp_path / "st", kept)
    says(
        " ".join(heard),
        "left out last.ckpt: it is epoch=1-step=6.ckpt (step 6) again",
        "the first checkpoint is step 1",
    )
    task = write_task(tmp_path / "task.py")
    assert run_lca(tmp_path / "st", task, tmp_path / "run", "--rename", r"^model\.=").exit_code == 0


def test_a_run_on_what_was_imported_is_the_run_on_what_was_recorded(tmp_path: Path) -> None:
    task, made = write_task(tmp_path / "task.py"), {}
    for name, place in {
        "recorded": record(tmp_path / "recorded"),
        "imported": tmp_path / "st",
    }.items():
        if name == "imported":
            assert lca("import", series(tmp_path / "saved"), place).exit_code == 0
        assert run_lca(place, task, tmp_path / name / "run").exit_code == 0
        made[name] = lca_posthoc.open_run(tmp_path / name / "run")["train"]
    for part in ("allocation", "steps", "tensors", "totals"):
        one, other = (arrays(getattr(made[name], part)) for name in ("recorded", "imported"))
        assert {name: each.tobytes() for name, each in one.items()} == {
            name: each.tobytes() for name, each in other.items()
        }


def test_the_entry_asked_for_is_taken(tmp_path: Path) -> None:
    for step, state in zip(STEPS, iterates(), strict=True):
        twice = {name: 2 * tensor for name, tensor in state.items()}
        save(
            tmp_path / "saved" / f"step_{step}.pt",
            {"model": dict(state), "module": dict(state), "ema": twice},
        )
    told(tmp_path / "saved", tmp_path / "st", key="ema")
    wanted = [{name: 2 * tensor for name, tensor in state.items()} for state in iterates()]
    equal(tmp_path / "st", dict(zip(STEPS, wanted, strict=True)))


def test_a_running_average_is_taken_without_its_count(tmp_path: Path) -> None:
    for step, state in zip(STEPS, iterates(), strict=True):
        model = task_namespace()["Net"]()
        model.load_state_dict(state)
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        save(tmp_path / "saved" / f"step_{step}.pt", {"model": {}, "ema": average.state_dict()})
    note, long = told(tmp_path / "saved", tmp_path / "st", key="ema")
    says(long, LONG)
    says(note, "left out 'n_averaged'", "torch.optim.swa_utils")
    equal(
        tmp_path / "st",
        {
            step: {f"module.{name}": each for name, each in state.items()}
            for step, state in zip(STEPS, iterates(), strict=True)
        },
    )
    assert (
        run_lca(tmp_path / "st", write_task(tmp_path / "task.py"), tmp_path / "run").exit_code == 0
    )


def test_a_pattern_names_the_step_beats_what_is_inside_and_leaves_out_the_rest(
    tmp_path: Path,
) -> None:
    for epoch, state in enumerate(iterates()):
        save(
            tmp_path / "saved" / f"epoch_{epoch}.pt", {"state_dict": dict(state), "global_step": 5}
        )
    save(tmp_path / "saved" / "best.pt", Hostile(tmp_path / "ran"))
    told(tmp_path / "saved", tmp_path / "st", pattern=r"epoch_(?P<step>\d+)")
    equal(tmp_path / "st", dict(enumerate(iterates())))


# --- tensors --------------------------------------------------------------------------------------


DTYPES = [
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = {"scalar": (), "none": (0,), "one": (1,), "empty": (3, 0, 2), "matrix": (2, 3)}
    state = {name: torch.ones(shape).to(dtype) for name, shape in shapes.items()}
    for step in (1, 2):
        save(tmp_path / "saved" / f"step_{step}.pt", state)
    heard = told(tmp_path / "saved", tmp_path / "st")
    found = load_file(step_file(tmp_path / "st", 1))
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    half = dtype.is_floating_point and dtype.itemsize < 4
    assert any("5 of 5 tensors are stored in half precision" in each for each in heard) == half


def test_tied_tensors_are_written_once_and_views_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "emb.weight": base,
        "head.weight": base,
        "columns": base.T,
        "part": base[1],
        "other shape": base.reshape(12),
        "every second": base[:, ::2],
        "spread": torch.tensor([5.0]).expand(3),
        "equal but apart": base.clone(),
    }
    for step in (1, 2):
        save(
            tmp_path / "saved" / f"step_{step}.pt",
            {**state, "_extra_state": {"scale": 1}, "epoch": 3},
        )
    heard = told(tmp_path / "saved", tmp_path / "st")
    found = load_file(step_file(tmp_path / "st", 2))
    assert found.keys() == state.keys() - {"head.weight"}
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert [each for each in heard if "left out" in each] == [
        "left out 'head.weight' of every checkpoint: it is 'emb.weight' again, tied to it",
        "left out '_extra_state' of every checkpoint: it is not a tensor but a dict",
        "left out 'epoch' of every checkpoint: it is not a tensor but a int",
    ]


# --- refusals -------------------------------------------------------------------------------------


def with_odd(place: Path, document: Any, name: str = "step_70.pt") -> Path:
    series(place)
    save(place / name, document)
    return place


def damaged(place: Path, keep: float, **options: Any) -> Path:
    series(place)
    path = save(place / "step_70.pt", dict(iterates()[0]), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    return place


def empty(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"")
    return place


def named(place: Path, *names: str) -> Path:
    for name, state in zip(names, iterates(), strict=False):
        save(place / name, dict(state))
    return place


def twice(place: Path, names: tuple[str, str] = ("step_10.pt", "ckpt_10.pt")) -> Path:
    return named(place, "step_5.pt", *names)


STATE = dict(iterates()[0])
SPARSE = torch.eye(3).to_sparse()
ODD_TENSORS = {
    "sparse": ({**STATE, "s": SPARSE}, ("'s'", "cannot hold", "sparse_coo")),
    "complex128": (
        {**STATE, "c": torch.ones(2, dtype=torch.complex128)},
        ("'c'", "cannot hold", "complex128"),
    ),
    "reserved": ({**STATE, "__metadata__": torch.ones(2)}, ("'__metadata__'", "reserves")),
    "not text": ({**STATE, "\ud800": torch.ones(2)}, ("not text",)),
    "another shape": (
        {**STATE, "out.bias": torch.ones(5)},
        ("'out.bias' is F32 [5]", "F32 [4] in", "one model"),
    ),
    "another dtype": (
        {**STATE, "out.bias": STATE["out.bias"].double()},
        ("'out.bias' is F64 [4]", "F32 [4]"),
    ),
    "one more": ({**STATE, "zzz": torch.ones(5)}, ("'zzz' is F32 [5]", "absent in")),
    "one less": ({"out.bias": STATE["out.bias"]}, ("'hidden.bias' is absent in", "F32 [8]")),
    "a list": ([1, 2], ("step_70.pt holds a list", "model.state_dict()")),
    "no tensors": ({"lr": 0.1}, ("holds no state dict", "'lr'")),
    "nothing": ({}, ("holds no state dict", "keys are none")),
    "two entries": (
        {"model": STATE, "module": STATE},
        ("is not clear", "'model', 'module'", "--key"),
    ),
    "unknown entries": (
        {"generator": STATE, "critic": STATE, "epoch": 1},
        ("is not clear", "'generator', 'critic', 'epoch'", "--key"),
    ),
    "a tensor beside": (
        {"weights": STATE, "best": torch.ones(3)},
        ("is not clear", "'weights'", "--key"),
    ),
}
Made = tuple[Callable[[Path], Path], tuple[str, ...], tuple[object, ...]]
REFUSED: dict[str, Made] = {
    **{
        f"a checkpoint with {name}": (lambda place, odd=odd: with_odd(place, odd), words, ())
        for name, (odd, words) in ODD_TENSORS.items()
    },
    "not there": (lambda place: place, ("does not exist",), ()),
    "nothing in it": (
        lambda place: empty(place, "README.md"),
        ("no checkpoints of a format", "HDF5"),
        (),
    ),
    "one file": (
        lambda place: series(place) / "step_0.pt",
        ("is one checkpoint", "Give the directory"),
        (),
    ),
    "a link to nothing": (
        lambda place: (series(place) / "step_70.pt").symlink_to("nowhere") or place,
        ("step_70.pt cannot be read",),
        (),
    ),
    "one checkpoint": (
        lambda place: named(place, "step_1.pt"),
        ("only one checkpoint", "at least two"),
        (),
    ),
    "a pattern that leaves one": (
        series,
        ("only one checkpoint", "_6"),
        ("--pattern", r"_6(?P<step>\d)\."),
    ),
    "a pattern that is none": (series, ("not a regular expression",), ("--pattern", "(")),
    "a pattern without a step": (series, ("no group called step",), ("--pattern", r"\d+")),
    "a key that is not there": (
        series,
        ("--key 'ema'", "holds no tensors there"),
        ("--key", "ema"),
    ),
    "options of HDF5": (series, ("--dataset does not apply", "PyTorch"), ("--dataset", "w")),
    "an empty file": (
        lambda place: empty(series(place), "step_9.pt").parent / place.name,
        ("step_9.pt cannot be read",),
        (),
    ),
    "a file cut short": (
        lambda place: damaged(place, 0.7),
        ("step_70.pt cannot be read", "Save it again"),
        (),
    ),
    "epochs": (
        lambda place: named(place, "epoch_1.pt", "epoch_2.pt"),
        ("state an epoch and no training step", "span all steps", "--pattern"),
        (),
    ),
    "no step": (
        lambda place: with_odd(place, STATE, "best.pt"),
        ("cannot tell the training step", "best.pt"),
        (),
    ),
    "two steps": (
        lambda place: save(place / "step_9.pt", {"model": dict(STATE), "step": 3}).parent,
        ("is called step 9 and states 3 inside", "--pattern"),
        (),
    ),
    "two of one step": (twice, ("both claim step 10 and differ", "ckpt_10.pt", "step_10.pt"), ()),
    "several models": (
        lambda place: named(place, "step_1/a.pt", "step_1/b.pt", "step_2/a.pt"),
        ("step_1 holds 2 files", "a.pt, b.pt"),
        (),
    ),
    "DeepSpeed": (
        lambda place: empty(place, "global_step5/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("mp_rank_00_model_states.pt", "cannot be read as a checkpoint"),
        ("--key", "module"),
    ),
    "DeepSpeed in a trainer's": (
        lambda place: empty(
            place, "checkpoint-5/global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
        ),
        ("DeepSpeed shards without the file that says how to join them",),
        (),
    ),
    "Megatron": (
        lambda place: empty(place, "iter_0000005/mp_rank_00/model_optim_rng.pt"),
        ("Megatron shards", "tools/checkpoint/convert.py"),
        (),
    ),
    "distributed checkpoints": (
        lambda place: empty(place, "step_5/__0_0.distcp", "step_5/.metadata"),
        (".metadata is not a table of contents of torch.distributed.checkpoint",),
        (),
    ),
    "distributed checkpoints without a table": (
        lambda place: empty(place, "step_5/__0_0.distcp", "step_6/__0_0.distcp"),
        ("torch.distributed.checkpoint shards without the file that says how to join",),
        (),
    ),
    "safetensors": (record, ("need no import", "lca run"), ()),
    "a trainer's safetensors": (
        lambda place: write_step(place / "checkpoint-5", 5, STATE, "model.safetensors").parents[1],
        ("need no import",),
        (),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_and_nothing_is_written(
    tmp_path: Path, case: str
) -> None:
    make, words, options = REFUSED[case]
    source = make(tmp_path / "saved")
    refused(lca("import", source, tmp_path / "st", *options), *words)
    assert not (tmp_path / "st").exists()


@pytest.mark.parametrize("within", [False, True], ids=["whole", "beside tensors"])
@pytest.mark.parametrize("how", ["torch", "torch before zip", "pickle"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "forced by the environment"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, within: bool, forced: bool
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ran, bad = tmp_path / "ran", series(tmp_path / "saved") / "step_70.pt"
    hostile = {**STATE, "x": Hostile(ran)} if within else Hostile(ran)
    if how == "pickle":
        bad.write_bytes(pickle.dumps(hostile))
    else:
        save(bad, hostile, _use_new_zipfile_serialization=how == "torch")
    words = ("posix.mkdir",) if how == "torch" else ()
    refused(lca("import", tmp_path / "saved", tmp_path / "st"), "step_70.pt", *words)
    assert not ran.exists()
    assert not (tmp_path / "st").exists()
    pickle.loads(pickle.dumps(Hostile(ran)))
    assert ran.exists()  # it would have


def test_numpy_is_given_nothing_of_a_file_to_make(tmp_path: Path) -> None:
    """A dtype that says its bytes are pointers: numpy would follow them."""

    def called(module: str, name: str) -> bytes:
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    objects = called("numpy", "dtype") + text("O") + b"\x85R"
    fields = (
        b"}"
        + text("a")
        + objects
        + number(0)
        + b"\x86s"
        + text("b")
        + objects
        + number(8)
        + b"\x86s"
    )
    names = text("a") + text("b") + b"\x86"
    state = (
        b"("
        + number(3)
        + text("|")
        + b"N"
        + names
        + fields
        + number(16)
        + number(1)
        + number(0)
        + b"t"
    )
    pointers = called("numpy", "dtype") + text("V16") + b"\x89\x88\x87R" + state + b"b"
    data = called("_codecs", "encode") + text("A" * 16) + text("latin1") + b"\x86R"
    made = called("numpy._core.multiarray", "scalar") + pointers + data + b"\x86R"
    hashed = called("collections", "OrderedDict") + b"]" + made + b"a\x85R"
    path = series(tmp_path / "saved") / "step_70.pt"
    save(tmp_path / "whole", {})
    with zipfile.ZipFile(tmp_path / "whole") as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            pickled = b"\x80\x02}" + text("x") + hashed + b"s."
            archive.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    main = "from lca_posthoc.cli import main; main()"
    command = [sys.executable, "-c", main, "import", tmp_path / "saved", tmp_path / "st"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    says(done.stderr, "step_70.pt cannot be read as a checkpoint")


# --- what is there already ------------------------------------------------------------------------


def flipped(path: Path, state: State) -> None:
    """One bit of a weight."""
    data = bytearray(path.read_bytes())
    data[data.index(state["out.weight"].numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_although_torch_loads_the_file(tmp_path: Path) -> None:
    source = series(tmp_path / "saved")
    flipped(source / "step_30.pt", iterates()[3])
    torch.load(source / "step_30.pt", weights_only=True)
    with pytest.raises(
        InputError,
        match=r"step_30\.pt is damaged: .*data/\d does not match "
        r"its checksum",
    ):
        told(source, tmp_path / "st")
    equal(tmp_path / "st", dict(zip(STEPS[:3], iterates(), strict=False)))


def test_files_without_checksums_are_imported(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        told(series(tmp_path / "saved"), tmp_path / "st")
    finally:
        torch.serialization.set_crc32_options(before)
    equal(tmp_path / "st", dict(zip(STEPS, iterates(), strict=True)))


def test_a_file_of_an_older_torch_cut_short_is_refused(tmp_path: Path) -> None:
    source = damaged(tmp_path / "saved", 0.7, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"step_70\.pt cannot be read as a checkpoint"):
        told(source, tmp_path / "st")


def test_a_copy_of_the_last_checkpoint_stands_behind_its_original(tmp_path: Path) -> None:
    """It is another one the next time."""
    source, place = series(tmp_path / "saved", STEPS[:5]), tmp_path / "st"
    for step, state in zip(STEPS[4:], iterates()[4:], strict=True):
        save(source / f"step_{step}.pt", {"state_dict": dict(state), "global_step": step})
        save(source / "last.pt", {"state_dict": dict(state), "global_step": step, "more": 1})
        assert f"left out last.pt: it is step_{step}.pt (step {step}) again" in told(source, place)
    equal(place, dict(zip(STEPS, iterates(), strict=True)))


def test_a_directory_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    series(tmp_path / "saved")
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"cannot read .*saved: Permission denied"):
        told(tmp_path / "saved", tmp_path / "st")


def test_what_is_there_is_left_alone_and_what_is_new_is_added(tmp_path: Path) -> None:
    told(series(tmp_path / "saved", STEPS[:5]), tmp_path / "st")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "st").iterdir()}
    series(tmp_path / "saved")
    result = lca("import", tmp_path / "saved", tmp_path / "st")
    says(result.stdout, "wrote 2 of 7 checkpoints (steps 0 to 60)", "5 were there")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    equal(tmp_path / "st", dict(zip(STEPS, iterates(), strict=True)))


def other_numbers(place: Path) -> None:
    """The same model, another training."""
    save(
        place / "saved" / "step_20.pt", {name: tensor + 1 for name, tensor in iterates()[2].items()}
    )


OCCUPIED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "something else": (
        lambda place: (place / "st" / "notes.txt").write_text(""),
        ("not empty", "'notes.txt'"),
    ),
    "another step": (
        lambda place: write_step(place / "st", 5, STATE),
        ("step_00000005", "not in this series"),
    ),
    "a file of another making": (
        lambda place: write_step(place / "st", 20, iterates()[2]),
        ("step_00000020", "not imported from"),
    ),
    "another series": (other_numbers, ("step_00000020", "not imported from", "step_20.pt")),
    "a file cut short": (
        lambda place: os.truncate(step_file(place / "st", 20), 300),
        ("step_00000020.safetensors is not a whole safetensors file",),
    ),
}


@pytest.mark.parametrize("case", OCCUPIED)
def test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, case: str
) -> None:
    make, words = OCCUPIED[case]
    told(series(tmp_path / "saved"), tmp_path / "st")
    step_file(tmp_path / "st", 60).unlink()
    make(tmp_path)
    before = contents(tmp_path / "st")
    refused(lca("import", tmp_path / "saved", tmp_path / "st"), *words)
    assert contents(tmp_path / "st") == before


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "st").write_text("mine")
    refused(lca("import", series(tmp_path / "saved"), tmp_path / "st"), "is not a directory")
    refused(lca("import", tmp_path / "saved", tmp_path / "st" / "below"), "cannot be created")
    assert (tmp_path / "st").read_text() == "mine"


def test_two_imports_into_one_directory_are_refused(tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        if (what, done) == ("writing", 1):
            with pytest.raises(ResourceError, match="another import writes into"):
                told(tmp_path / "saved", tmp_path / "st")

    told(series(tmp_path / "saved"), tmp_path / "st", progress=second)
    equal(tmp_path / "st", dict(zip(STEPS, iterates(), strict=True)))


def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    def change(what: str, done: int, total: int) -> None:
        if (what, done) == ("writing", 3):
            save(tmp_path / "saved" / "step_50.pt", {"w": torch.ones(2)})

    with pytest.raises(InputError, match=r"step_50\.pt changed while it was imported"):
        told(series(tmp_path / "saved"), tmp_path / "st", progress=change)
    equal(tmp_path / "st", dict(zip(STEPS[:5], iterates(), strict=False)))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_modes_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        told(series(tmp_path / "saved"), tmp_path / "st")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "st").iterdir()} == {0o666 & ~umask}


# --- interruptions, space, memory -----------------------------------------------------------------


SCRIPT = """
import os, resource, signal, sys
from lca_posthoc.convert import write
from lca_posthoc.cli import main

save_file, count = write.save_file, 0

def fault(tensors, path, metadata):
    global count
    count += 1
    {fault}
    save_file(tensors, path, metadata=metadata)

write.save_file = fault
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs have not
sys.argv[1:] = ["import", *sys.argv[1:]]
main()
"""
FAULTS = {
    "killed": (
        "if count == 4: path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)",
        -signal.SIGKILL,
        "",
    ),
    "interrupted": (
        "if count == 4: path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGINT)",
        130,
        "again to resume",
    ),
    "full": (
        "if count == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
        5,
        "cannot be written",
    ),
}


def imported_with(fault: str, source: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(fault=fault), source, directory],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(lca_posthoc.__file__).parents[1])},
    )


@pytest.mark.parametrize("case", FAULTS)
def test_what_an_interrupted_import_leaves_is_whole_and_it_goes_on(
    tmp_path: Path, case: str
) -> None:
    fault, code, words = FAULTS[case]
    source, place = series(tmp_path / "saved"), tmp_path / "st"
    done = imported_with(fault, source, place)
    assert done.returncode == code, done.stderr
    says(done.stderr, words)
    assert "Traceback" not in done.stderr
    assert open_trajectory(place).steps == list(STEPS[:3])
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        step_file(place, step).name for step in STEPS[:3]
    ]
    assert case == "killed" or not (place / ".import").exists()
    before = contents(place)
    says(lca("import", source, place).stdout, "wrote 4 of 7", "3 were there")
    equal(place, dict(zip(STEPS, iterates(), strict=True)))
    convert(source, tmp_path / "clean", say=lambda note: None)
    assert contents(place) == contents(tmp_path / "clean")
    assert {
        name: data for name, data in before.items() if not name.startswith(".")
    }.items() <= contents(place).items()


def test_space_is_looked_at_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "saved")
    monkeypatch.setattr(
        "lca_posthoc.convert.write.shutil.disk_usage",
        lambda place: type("Usage", (), {"free": 10_000}),
    )
    refused(
        lca("import", tmp_path / "saved", tmp_path / "st"), "7 files of", "10 kB are free", code=5
    )
    assert list((tmp_path / "st").iterdir()) == []


MEASURED = """
import sys
from lca_posthoc.base.available_memory import peak_memory
from lca_posthoc.convert import convert

for source in sys.argv[1:]:
    convert(source, source + ".st", say=lambda note: None)
    print(peak_memory() // 1024)
"""


@pytest.mark.moment
def test_memory_is_that_of_one_checkpoint(tmp_path: Path) -> None:
    """Sixteen of them take no more than two."""
    weight, places = torch.zeros(4 * 2**20), [tmp_path / "few", tmp_path / "many"]
    for place, count in zip(places, (2, 16), strict=True):
        for step in range(count):
            save(place / f"step_{step}.pt", {"w": weight + step})
    environment = {**os.environ, "PYTHONPATH": str(Path(lca_posthoc.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *places],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    few, many = map(int, done.stdout.split())
    assert many - few < 16 * 2**10  # kB: one checkpoint
