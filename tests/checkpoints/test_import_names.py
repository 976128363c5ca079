"""Numbers in names that are no steps, state dicts inside others, classes of other programs, formats
only their own programs read.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import pathlib
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lca_posthoc.checkpoints.trajectory import open_trajectory
from lca_posthoc.convert import convert
from lca_posthoc.errors import InputError
from tests.helpers.cli import contents, iterates, lca, refused, says, step_file

State = Mapping[str, torch.Tensor]
STATES = [dict(state) for state in iterates()[:4]]


def save(place: Path, document: Callable[[int, State], Any], name: str = "step_{}.pt") -> Path:
    """A file of torch.save for each of four states."""
    for step, state in enumerate(STATES):
        path = place / name.format(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(document(step, state), path)
    return place


def told(source: Path, directory: Path, **options: Any) -> list[str]:
    heard: list[str] = []
    convert(source, directory, say=heard.append, **options)
    return heard


def holds(directory: Path, wanted: Mapping[int, State]) -> None:
    assert sorted(path.name for path in directory.iterdir()) == [
        step_file(directory, step).name for step in wanted
    ]
    for step, state in wanted.items():
        written = load_file(step_file(directory, step))
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in state.items())


# --- numbers that count epochs or saves -----------------------------------------------------------

Document = Callable[[int, State], Any]
# the files' names, what they hold, a pattern the refusal names
EPOCHS: dict[str, tuple[str, Document, str]] = {
    "the same number": (
        "checkpoint-{}.pth",
        lambda n, state: {"model": state, "epoch": n},
        "checkpoint-",
    ),
    "the next epoch": (
        "checkpoint_000{}.pth.tar",
        lambda n, state: {"state_dict": state, "epoch": n + 1},
        "checkpoint_",
    ),
    "the one before": (
        "ckpt{}.pt",
        lambda n, state: {"model": state, "epoch": n - 1 if n else -1},
        "ckpt",
    ),
    "a tensor": (
        "ckpt_{}.pt",
        lambda n, state: {"model": state, "epoch": torch.tensor(n)},
        "ckpt_",
    ),
    "a fraction": ("ckpt_{}.pt", lambda n, state: {"model": state, "epoch": float(n)}, "ckpt_"),
    "mmcv's": (
        "ckpt_{}.pth",
        lambda n, state: {"state_dict": state, "meta": {"epoch": n}},
        "ckpt_",
    ),
    "one level down": (
        "checkpoint{}.pt",
        lambda n, state: {"app": {"model": state, "epoch": n}},
        "checkpoint",
    ),
    "in the name": ("net_epoch_{}.pt", lambda n, state: {"model": state}, "epoch_"),
    "the best one's": (
        "best_epoch{}.pt",
        lambda n, state: {"model": state, "best_epoch": 2},
        "epoch",
    ),
}


@pytest.mark.parametrize("case", EPOCHS)
def test_numbers_that_count_epochs_are_refused_with_the_line_that_works(
    tmp_path: Path, case: str
) -> None:
    name, document, word = EPOCHS[case]
    source = save(tmp_path / "saved", document, name)
    pattern = f"{word}(?P<step>\\d+)"
    refused(
        lca("import", source, tmp_path / "st"),
        "epoch",
        f"--pattern '{pattern}'",
        "span all steps of an epoch",
    )
    assert not (tmp_path / "st").exists()
    heard = told(source, tmp_path / "st", pattern=pattern)
    holds(tmp_path / "st", dict(enumerate(STATES)))
    in_name = case in ("in the name", "the best one's")
    assert any("every segment spans all steps of an epoch" in note for note in heard) != in_name


STEPS: dict[str, tuple[str, Document, list[int], str | None]] = {
    "several steps an epoch": (
        "checkpoint-{}00.pth",
        lambda n, state: {"model": state, "epoch": n},
        [0, 100, 200, 300],
        None,
    ),
    "all in one epoch": (
        "checkpoint-{}.pth",
        lambda n, state: {"model": state, "epoch": 0},
        [0, 1, 2, 3],
        None,
    ),
    "another run's best": (
        "ckpt_{}.pt",
        lambda n, state: {"model": state, "best_epoch": n},
        [0, 1, 2, 3],
        None,
    ),
    "the name says step": (
        "step_{}.pt",
        lambda n, state: {"model": state, "epoch": n},
        [0, 1, 2, 3],
        "the name calls the number a training step, so it is read as one",
    ),
    "a step inside": (
        "ckpt_{}.pt",
        lambda n, state: {"model": state, "epoch": n, "global_step": 50 * n},
        [0, 50, 100, 150],
        "ckpt_1.pt is read as step 50, its global_step",
    ),
    "a step inside, no epoch": (
        "ckpt_{}.pt",
        lambda n, state: {"model": state, "global_step": 50 * (n + 1)},
        [50, 100, 150, 200],
        "ckpt_0.pt is read as step 50, its global_step",
    ),
    "Lightning's": (
        "epoch={0}-step={0}0.ckpt",
        lambda n, state: {"state_dict": state, "epoch": n, "global_step": 10 * n},
        [0, 10, 20, 30],
        None,
    ),
    "mmcv's iterations": (
        "epoch_{}.pth",
        lambda n, state: {"state_dict": state, "meta": {"epoch": n, "iter": 7 * n}},
        [0, 7, 14, 21],
        None,
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_numbers_that_count_steps_are_steps(tmp_path: Path, case: str) -> None:
    name, document, steps, words = STEPS[case]
    heard = told(save(tmp_path / "saved", document, name), tmp_path / "st")
    holds(tmp_path / "st", dict(zip(steps, STATES, strict=True)))
    ours = [
        note
        for note in heard
        if "longer than one step" not in note and "first checkpoint" not in note
    ]
    assert [words is not None and words in note for note in ours] == [True] * (words is not None)


def test_steps_that_go_down_as_epochs_go_up_are_refused(tmp_path: Path) -> None:
    source = save(
        tmp_path / "saved",
        lambda n, state: {"model": state, "epoch": n, "step": 9 - n},
        "epoch_{}.pt",
    )
    refused(lca("import", source, tmp_path / "st"), "count within an epoch", "--pattern")


def test_epochs_in_the_metadata_of_safetensors_are_told_from_steps(tmp_path: Path) -> None:
    for number, state in enumerate(STATES):
        for name, step in (
            (f"checkpoint-{number}", number),
            (f"checkpoint-{number}0", 10 * number),
            (f"step_{number}", 0),
        ):
            place = tmp_path / name.split("-")[0] / str(step != number)
            place.mkdir(parents=True, exist_ok=True)
            save_file(state, place / f"{name}.safetensors", metadata={"epoch": str(number + 1)})
    epochs, tens = tmp_path / "checkpoint" / "False", tmp_path / "checkpoint" / "True"
    (epochs / "checkpoint-00.safetensors").unlink(missing_ok=True)
    with pytest.raises(
        InputError,
        match=r"the number in the name is the epoch .*--pattern "
        r"'checkpoint-\(\?P<step>",
    ):
        open_trajectory(epochs)
    meant = open_trajectory(epochs, pattern=r"checkpoint-(?P<step>\d+)")
    assert meant.steps == [0, 1, 2, 3]
    says(meant.notes[0], "every segment spans all steps of an epoch")
    assert open_trajectory(tens, steps="10:").steps == [10, 20, 30]


def accelerate(place: Path, names: str, weights: str) -> Path:
    """What `Accelerator.save_state` writes."""
    for number, state in enumerate(STATES):
        directory = place / names.format(number)
        directory.mkdir(parents=True)
        if weights.endswith(".safetensors"):
            save_file(state, directory / weights)
        else:
            torch.save(state, directory / weights)
        for beside in (
            "optimizer.bin",
            "scheduler.bin",
            "sampler.bin",
            "random_states_0.pkl",
            "custom_checkpoint_0.pkl",
        ):
            torch.save({"exp_avg": torch.ones(2)}, directory / beside)
    return place


@pytest.mark.parametrize("command", ["import", "run"])
def test_saves_that_accelerate_counts_are_no_steps(tmp_path: Path, command: str) -> None:
    weights = {"import": "pytorch_model.bin", "run": "model.safetensors"}[command]
    places = {
        names: accelerate(tmp_path / str(n), names, weights)
        for n, names in enumerate(("checkpoint_{}", "checkpoint-{}00", "checkpoint_{}00"))
    }

    def steps(place: Path, **options: str) -> list[int]:
        if command == "run":
            return open_trajectory(place, **options).steps
        told(place, place.with_suffix(".st"), **options)
        return open_trajectory(place.with_suffix(".st")).steps

    with pytest.raises(
        InputError,
        match=r"accelerate's save_state counts its saves.*--pattern "
        r"'checkpoint_\(\?P<step>",
    ):
        steps(places["checkpoint_{}"])
    assert steps(places["checkpoint_{}"], pattern=r"checkpoint_(?P<step>\d+)") == [0, 1, 2, 3]
    assert (
        steps(places["checkpoint-{}00"]) == steps(places["checkpoint_{}00"]) == [0, 100, 200, 300]
    )


def test_what_accelerate_itself_saves_is_recognised(tmp_path: Path) -> None:
    script = (
        "import sys, torch, accelerate\n"
        "from accelerate.utils import ProjectConfiguration\n"
        "config = ProjectConfiguration(project_dir=sys.argv[1], automatic_checkpoint_naming=True)\n"
        "accelerator = accelerate.Accelerator(project_config=config, cpu=True)\n"
        "model = accelerator.prepare(torch.nn.Linear(2, 2))\n"
        "for _ in range(3):\n"
        "    accelerator.save_state()\n"
        "    torch.nn.init.uniform_(model.weight)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path], check=True, capture_output=True, timeout=120
    )
    with pytest.raises(
        InputError,
        match=r"checkpoint_0, checkpoint_1, checkpoint_2: accelerate"
        r"'s save_state counts",
    ):
        open_trajectory(tmp_path / "checkpoints")


def test_names_of_two_trainings_in_one_directory_are_said(tmp_path: Path) -> None:
    for number, state in enumerate(STATES):
        save_file(state, tmp_path / f"{'ab'[number % 2]}_step_{number}.safetensors")
    assert any(
        "names are of 2 kinds: 'a_step_#.safetensors' (2), 'b_step_#" in note
        for note in open_trajectory(tmp_path).notes
    )
    save_file(STATES[0], tmp_path / "A_Step_2.safetensors")
    with pytest.raises(InputError, match="both claim step 2"):
        open_trajectory(tmp_path)


# --- state dicts inside others --------------------------------------------------------------------


def adam(state: State) -> dict[str, Any]:
    moments = {
        name: {"exp_avg": torch.ones_like(each), "step": torch.tensor(1.0)}
        for name, each in state.items()
    }
    return {"state": moments, "param_groups": [{"lr": 0.1}]}


def twice(state: State) -> dict[str, torch.Tensor]:
    return {name: 2 * each for name, each in state.items()}


# what a file holds, --key
TAKEN: dict[str, tuple[Callable[[State], Any], str | None]] = {
    "as the tutorial of DCP": (
        lambda state: {"app": {"model": state, "optim": {"state": adam(state)["state"]}}},
        None,
    ),
    "by its path": (lambda state: {"app": {"model": state, "optim": adam(state)}}, "app.model"),
    "two levels down": (lambda state: {"a": {"b": {"c": state}}, "lr": 0.1}, None),
    "under another name": (
        lambda state: {"weights": state, "epoch": torch.tensor(3), "loss": torch.tensor(0.5)},
        None,
    ),
    "beside an optimiser of another name": (lambda state: {"net": state, "sgd": adam(state)}, None),
    "beside the parts of an optimiser": (
        lambda state: {"net": state, "trainer": {"moments": adam(state)["state"]}},
        None,
    ),
    "beside an optimiser laid flat": (
        lambda state: {
            "net": state,
            "extra": {f"state.{name}.exp_avg": each for name, each in state.items()},
        },
        None,
    ),
    "beside an optimiser that knows its parameters by number": (
        lambda state: {
            "generator": state,
            "g_optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        },
        None,
    ),
    "beside a best score": (
        lambda state: {"net": state, "callbacks": {"best": {"score": torch.tensor(0.1)}}},
        None,
    ),
    "a name with a dot": (lambda state: {"app.model": state, "app": {"other": state}}, "app.model"),
    "one of two": (lambda state: {"run": {"model": twice(state), "ema": state}}, "run.ema"),
    "an average of its own": (
        lambda state: {
            "ema": {f"ema_model.{name}": each for name, each in state.items()}
            | {"initted": torch.tensor(True), "step": torch.tensor(4)}
        },
        None,
    ),
    "an average with its rate": (
        lambda state: {
            "net": {f"module.{name}": each for name, each in state.items()}
            | {"decay": torch.tensor(0.9), "num_updates": torch.tensor(4)}
        },
        None,
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_the_only_state_dict_is_taken_wherever_it_lies(tmp_path: Path, case: str) -> None:
    document, key = TAKEN[case]
    told(save(tmp_path / "saved", lambda step, state: document(state)), tmp_path / "st", key=key)
    prefix = {"an average of its own": "ema_model.", "an average with its rate": "module."}.get(
        case, ""
    )
    holds(
        tmp_path / "st",
        {
            step: {prefix + name: each for name, each in state.items()}
            for step, state in enumerate(STATES)
        },
    )


UNCLEAR: dict[str, tuple[Callable[[State], Any], str | None, tuple[str, ...]]] = {
    "two, nested": (
        lambda state: {"app": {"model": state, "ema": state, "optim": adam(state)}},
        None,
        ("is not clear", "'app.model', 'app.ema': name one with --key"),
    ),
    "parts of a model": (
        lambda state: {"model": {"encoder": state, "decoder": state}},
        None,
        ("'model.encoder', 'model.decoder'",),
    ),
    "a key half the way": (
        lambda state: {"app": {"model": state}},
        "app",
        ("--key 'app'", "'app.model'"),
    ),
    "a key to nothing": (lambda state: {"app": {"model": state}}, "app.net", ("'app.model'",)),
    "a key of two meanings": (
        lambda state: {"a.b": state, "a": {"b": state}},
        "a.b",
        ("holds two state dicts",),
    ),
    "an optimiser alone": (
        lambda state: {"optim": adam(state), "epoch": 1},
        None,
        ("holds no state dict",),
    ),
    "a tensor beside": (
        lambda state: {"net": state, "best": torch.ones(4)},
        None,
        ("is not clear", "'net'"),
    ),
    "a model that is an object, and its average": (
        lambda state: {"model": torch.nn.Linear(2, 2), "ema": state},
        None,
        ("is not clear", "'model' is an object of torch.nn.modules.linear.Linear"),
    ),
    "a model in a mapping of another kind": (
        lambda state: {"model": collections.defaultdict(list, state), "ema": state},
        None,
        ("is not clear", "'model' is an object of"),
    ),
    "weights under a name of optimisers": (
        lambda state: {"opt": state, "ref": state},
        None,
        ("is not clear", "'opt', 'ref'"),
    ),
}


def test_weights_called_as_slots_of_optimisers_are_a_model(tmp_path: Path) -> None:
    states = [{"mu": torch.full((3,), float(step)), "v": torch.ones(2)} for step in range(4)]
    source = save(tmp_path / "saved", lambda step, state: {"model": states[step]})
    told(source, tmp_path / "st")
    holds(tmp_path / "st", dict(enumerate(states)))


def test_a_trained_number_beside_wrapped_weights_is_no_counter(tmp_path: Path) -> None:
    source = save(
        tmp_path / "saved",
        lambda step, state: {"module.w": state["out.bias"], "decay": torch.tensor(0.1 * step)},
    )
    told(source, tmp_path / "st")
    assert all("decay" in load_file(path) for path in (tmp_path / "st").iterdir())


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_is_refused_with_every_key_that_would_do(
    tmp_path: Path, case: str
) -> None:
    document, key, words = UNCLEAR[case]
    source = save(tmp_path / "saved", lambda step, state: document(state))
    refused(lca("import", source, tmp_path / "st", *(("--key", key) if key else ())), *words)


def test_an_average_beside_the_model_is_said(tmp_path: Path) -> None:
    source = save(
        tmp_path / "saved",
        lambda step, state: {"state_dict": state, "state_dict_ema": twice(state)},
    )
    (note,) = told(source, tmp_path / "st")
    says(note, "took entry 'state_dict'", "'state_dict_ema'", "--key")
    holds(tmp_path / "st", dict(enumerate(STATES)))


# --- objects of other classes ---------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Settings(dict[str, Any]):
    """A mapping with attributes, as EasyDict and its like."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Spelled:
    """Pickles as a path of another system, or of another Python, does."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __reduce__(self) -> tuple[Any, ...]:
        made = type(self.name, (), {"__init__": lambda self, *_: None})
        made.__module__, made.__qualname__ = self.module, self.name
        return made, ("C:\\", "runs")


def spelled(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> Spelled:
    """An object whose pickle asks for a class that is there while it is written, and nowhere
    after.
    """
    value = Spelled(module, name)
    made = value.__reduce__()[0]
    monkeypatch.setattr(Spelled, "__reduce__", lambda self: (made, ("C:\\", "runs")))
    holder = types.ModuleType(module)
    setattr(holder, name, made)
    if module not in ("pathlib", "pathlib._local"):
        monkeypatch.setitem(
            sys.modules, module.partition(".")[0], types.ModuleType(module.partition(".")[0])
        )
    monkeypatch.setitem(sys.modules, module, holder)
    return value


READ_PAST: dict[str, Callable[[], Any]] = {
    "a namespace": lambda: argparse.Namespace(lr=0.1, nested=types.SimpleNamespace(out=Path("/a"))),
    "pure paths": lambda: [pathlib.PureWindowsPath("C:/a"), pathlib.PurePosixPath("/a")],
    "dates": lambda: [
        datetime.datetime(2026, 1, 1),
        datetime.timedelta(1),
        datetime.date(2026, 1, 1),
    ],
    "an enumeration": lambda: Colour.RED,
    "a mapping with attributes": lambda: Settings(lr=0.1, inner=Settings(seed=1)),
    "a default mapping": lambda: collections.defaultdict(int, {"a": 1}),
    "an object": lambda: Plain({"a": [Plain(1)]}),
    "slots": lambda: Slotted(3),
    "a schedule": lambda: torch.optim.lr_scheduler.LambdaLR.__new__(
        torch.optim.lr_scheduler.LambdaLR
    ),
    "a mapping and a namespace": lambda: [Settings(a=1), argparse.Namespace(b=2)],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["", "before zip"])
@pytest.mark.parametrize("case", READ_PAST)
def test_settings_of_other_classes_are_read_past_and_those_of_others_packages_said(
    tmp_path: Path, case: str, zipped: bool
) -> None:
    for step, state in enumerate(STATES):
        (tmp_path / "saved").mkdir(exist_ok=True)
        saved = {"model": state, "args": READ_PAST[case]()}
        torch.save(
            saved, tmp_path / "saved" / f"step_{step}.pt", _use_new_zipfile_serialization=zipped
        )
    heard = told(tmp_path / "saved", tmp_path / "st")
    holds(tmp_path / "st", dict(enumerate(STATES)))
    foreign = case in (
        "an enumeration",
        "a mapping with attributes",
        "an object",
        "slots",
        "a mapping and a namespace",
    )
    assert [
        "skipped objects of tests.checkpoints.test_import_names." in note for note in heard
    ] == [True] * foreign


OF_WINDOWS = [
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "WindowsPath"),
    ("pathlib._local", "PureWindowsPath"),
    ("omegaconf.dictconfig", "DictConfig"),
]


@pytest.mark.parametrize(("module", "name"), OF_WINDOWS)
def test_classes_that_are_not_here_are_read_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    with monkeypatch.context() as there:
        value = spelled(there, module, name)
        source = save(
            tmp_path / "saved", lambda step, state: {"model": state, "args": {"output": value}}
        )
    told(source, tmp_path / "st")
    holds(tmp_path / "st", dict(enumerate(STATES)))


def test_an_object_is_never_made_and_its_module_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that would tell, and a class whose state would."""
    (tmp_path / "spy_of_imports.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        "class Spy:\n    def __setstate__(self, state):\n        "
        "pathlib.Path(__file__).with_suffix('.ran').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import spy_of_imports  # type: ignore[import-not-found]

    spy = spy_of_imports.Spy()
    spy.value = 1
    source = save(tmp_path / "saved", lambda step, state: {"model": state, "spy": spy})
    (tmp_path / "spy_of_imports.ran").unlink()
    monkeypatch.delitem(sys.modules, "spy_of_imports")
    (note,) = told(source, tmp_path / "st")
    says(note, "spy_of_imports.Spy", "neither imported nor called")
    assert "spy_of_imports" not in sys.modules
    assert not (tmp_path / "spy_of_imports.ran").exists()


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


HIDDEN: dict[str, tuple[Callable[[State], Any], tuple[str, ...]]] = {
    "a whole model": (
        lambda state: torch.nn.Linear(2, 2),
        ("holds an object of torch.nn.modules.linear.Linear",),
    ),
    "a whole model as an entry": (
        lambda state: {"model": torch.nn.Linear(2, 2), "epoch": 1},
        ("holds no state dict", "'model' is an object of torch.nn.modules.linear.Linear"),
    ),
    "a weight of another class": (
        lambda state: {**state, "packed": Plain(torch.ones(2))},
        ("'packed'", "an object of tests.checkpoints.test_import_names.Plain with tensors in it"),
    ),
    "a weight deep in a mapping": (
        lambda state: {**state, "packed": Settings(inner=[Plain({"w": torch.ones(2)})])},
        ("'packed'", "with tensors in it"),
    ),
    "a class that starts a program": (
        lambda state: {"model": state, "x": Call(subprocess.Popen, ["touch", "ran"])},
        ("Popen", "could run any code"),
    ),
    "a function": (
        lambda state: {"model": state, "x": Call(eval, "1")},
        ("eval", "could run any code"),
    ),
    "a function of a package": (
        lambda state: {"model": state, "x": Call(pickle.loads, b"")},
        ("loads", "could run any code"),
    ),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_no_weight_hides_and_nothing_is_called(tmp_path: Path, case: str) -> None:
    document, words = HIDDEN[case]
    (tmp_path / "saved").mkdir()
    torch.save(STATES[0], tmp_path / "saved" / "step_0.pt")
    torch.save(document(STATES[1]), tmp_path / "saved" / "step_1.pt")
    refused(lca("import", tmp_path / "saved", tmp_path / "st"), "step_1.pt", *words)
    assert not (tmp_path / "st").exists()


# --- formats only their own programs read ---------------------------------------------------------


def files(**held: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        for name, data in held.items():
            path = place / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return place

    return make


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "GGUF": (
        files(**{"model-1.gguf": b"GGUF", "model-2.gguf": b"GGUF"}),
        "holds GGUF, a format for inference",
    ),
    "GGUF by steps": (
        files(**{"step_1__m.gguf": b"GGUF", "step_2__m.gguf": b"GGUF"}),
        "holds GGUF",
    ),
    "one file of GGUF": (lambda place: files(model=b"GGUF3")(place) / "model", "holds GGUF"),
    "Megatron": (
        files(**{"iter_0000005__mp_rank_00__model_optim_rng.pt": b""}),
        "tools/checkpoint/convert.py",
    ),
}


# what `lca import` reads and a run does not
IMPORTED: dict[str, Callable[[Path], Path]] = {
    "distributed": files(**{"step_1__0_0.distcp": b"", "step_2__0_0.distcp": b""}),
    "accelerate's of FSDP": files(**{"checkpoint_0__pytorch_model_fsdp_0__0_0.distcp": b""}),
    "DeepSpeed": files(**{"global_step5__mp_rank_00_model_states.pt": b""}),
}


@pytest.mark.parametrize("case", IMPORTED)
def test_a_run_names_the_import_of_shards(tmp_path: Path, case: str) -> None:
    place = IMPORTED[case](tmp_path / "ck")
    (tmp_path / "task.py").write_text("")
    before = contents(tmp_path)
    task = ("--task", tmp_path / "task.py")
    lines = {
        refused(lca("run", place, *task, "--out", tmp_path / "run"), "`lca import SOURCE DIR`"),
        refused(lca("plan", place, *task), "`lca import SOURCE DIR`"),
    }
    assert len(lines) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", UNREADABLE)
def test_run_and_import_refuse_with_the_same_words(tmp_path: Path, case: str) -> None:
    make, words = UNREADABLE[case]
    place = make(tmp_path / "ck")
    (tmp_path / "task.py").write_text("")
    before = contents(tmp_path)
    lines = {
        refused(lca("import", place, tmp_path / "st"), words),
        refused(
            lca("run", place, "--task", tmp_path / "task.py", "--out", tmp_path / "run"), words
        ),
        refused(lca("plan", place, "--task", tmp_path / "task.py"), words),
    }
    assert len(lines) == 1
    assert contents(tmp_path) == before
