"""A task that cannot be evaluated is refused before anything is created."""

from __future__ import annotations

import pytest

import lca_posthoc
from lca_posthoc.errors import InputError
from tests.helpers.cli import (
    contents,
    refused,
    run_lca,
    write_task,
)

from ..helpers.wrong_input import RETURN, TRAIN_DATA, TRAIN_LOSS, Place

DATASET = """
class Data:
    def __len__(self):
        return 30
    def __getitem__(self, index):
        {body}
train = Data()
"""

TASKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # the file
    "syntax error": (
        "def task():",
        "def task(:",
        ("cannot import task", "SyntaxError", "task.py", "line"),
    ),
    "import error": (
        "import torch\n",
        "import nosuch\n",
        ("cannot import task", "No module named 'nosuch'", "task.py:1"),
    ),
    "import of a name that is not there": (
        "from lca_posthoc import Loss",
        "from torch import nosuch, Loss",
        ("cannot import task", "ImportError", "nosuch", "task.py:3"),
    ),
    "raises when imported": (
        "generator =",
        "raise ValueError('no data today')\ngenerator =",
        ("cannot import task", "ValueError: no data today", "task.py:16"),
    ),
    "exits when imported": (
        "generator =",
        "raise SystemExit('set DATA')\ngenerator =",
        ("SystemExit", "set DATA", "task.py:16"),
    ),
    # the function
    "no task()": (
        "def task():",
        "def make():",
        ("task.py:task", "no such function", "def task() -> Task"),
    ),
    "task is no function": (
        "def task():",
        "task = 3\ndef make():",
        ("task.py:task", "def task() -> Task"),
    ),
    "returns a dict": (
        RETURN,
        "    return dict(",
        ("task.py:task() returned dict, not a Task", "return Task("),
    ),
    "returns nothing": (RETURN, "    Task(", ("returned NoneType, not a Task", "return Task(")),
    "raises": (
        RETURN,
        f"    raise KeyError('split')\n{RETURN}",
        ("task.py:task() raised KeyError: 'split'", "task.py:28"),
    ),
    "raises with a message of two lines": (
        RETURN,
        f"    raise OSError('one\\ntwo')\n{RETURN}",
        ("OSError", "one", "two"),
    ),
    "exits": (
        RETURN,
        f"    raise SystemExit(0)\n{RETURN}",
        ("task.py:task()", "SystemExit", "task.py:28"),
    ),
    "wants an argument": (
        "def task():",
        "def task(size):",
        ("task.py:task() raised TypeError", "'size'"),
    ),
    # the Task
    "a model made already": (
        "model=Net",
        "model=Net()",
        ("zero-argument factory", "got Net", "model=Net"),
    ),
    "a model that is a name": ("model=Net", "model='Net'", ("zero-argument factory", "got str")),
    "a model that raises": (
        "model=Net",
        "model=lambda: 1 / 0",
        ("Task.model() raised ZeroDivisionError",),
    ),
    "a model that is no module": (
        "model=Net",
        "model=lambda: 7",
        ("Task.model() returned int, not an nn.Module",),
    ),
    "no data": (
        'data={"train": train, "validation": validation}',
        "data={}",
        ("Task.data must name at least one split",),
    ),
    "no losses": (
        RETURN,
        "    return Task(Net, {'train': train}, {})\n    dict(",
        ("Task.losses must name at least one loss",),
    ),
    "an unknown split": (
        'on="validation")',
        'on="test")',
        ("loss 'validation'", "'test'", "'train', 'validation'"),
    ),
    "a loss that is no Loss": (
        TRAIN_LOSS,
        '"train": F.cross_entropy',
        ("losses['train'] must be a Loss", "Loss(fn, on='train')"),
    ),
    "a Loss of nothing": (
        TRAIN_LOSS,
        '"train": Loss(on="train")',
        ("Loss takes one of: a function", "Loss(call=fn"),
    ),
    "a Loss of a word": (
        TRAIN_LOSS,
        '"train": Loss("mse")',
        ("needs something to call", "got str 'mse'", "Loss(F.cross_entropy)"),
    ),
    # the data
    "an empty split": (
        TRAIN_DATA,
        "train = (inputs[:0], targets[:0])",
        ("split 'train' is empty", "at least one example"),
    ),
    "inputs and targets of different lengths": (
        TRAIN_DATA,
        "train = (inputs[:30], targets[:29])",
        ("split 'train'", "[29, 30]", "one target per input"),
    ),
    "a split of no tensors": (TRAIN_DATA, "train = ()", ("split 'train'", "(inputs, targets)")),
    "texts of no split": (
        "        data=",
        "        show=len,\n        data=",
        ("Task.show maps a split", "got builtin_function_or_method"),
    ),
    "data that is a number": (
        TRAIN_DATA,
        "train = 7",
        ("split 'train' is a int", "(inputs, targets)", "map-style Dataset"),
    ),
    "data that can be read once": (
        TRAIN_DATA,
        "train = iter([1, 2])",
        ("split 'train' is a list_iterator", "map-style Dataset"),
    ),
    "data that is a table": (
        TRAIN_DATA,
        "train = {'x': inputs, 'y': targets}",
        ("a batch is a dict of 2, not (inputs, targets)", "Loss(call=fn)"),
    ),
    "data that raises": (
        TRAIN_DATA,
        DATASET.format(body="raise ValueError('image 0 is damaged')"),
        ("split 'train'", "ValueError: image 0 is damaged"),
    ),
    "examples that cannot be collated": (
        TRAIN_DATA,
        DATASET.format(body="return None, 1"),
        ("split 'train'", "NoneType"),
    ),
    "three tensors for a plain function": (
        TRAIN_DATA,
        "train = (inputs, targets, targets)",
        ("tuple of 3, not (inputs, targets)", "Loss(call=fn)"),
    ),
    "inputs the model cannot take": (
        TRAIN_DATA,
        "train = (inputs[:30, :9], targets[:30])",
        ("failed on split 'train'", "RuntimeError", "shapes cannot be multiplied"),
    ),
    "targets out of range": (
        TRAIN_DATA,
        "train = (inputs[:30], targets[:30] + 9)",
        ("failed on split 'train'", "IndexError"),
    ),
    # the loss
    "a scalar": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: F.cross_entropy(outputs, targets))',
        ("returned a scalar", "one value per element", "reduction='none'"),
    ),
    "a scalar from a call": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch).mean())',
        ("returned a scalar", "(values, weights)"),
    ),
    "a number": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: 3.0)',
        ("returned a float, not a tensor",),
    ),
    "whole numbers": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: targets)',
        ("not a tensor of floating-point values",),
    ),
    "values and weights of different shape": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), torch.ones(3)))',
        ("weights [3]", "they must agree"),
    ),
    "weights that are a number": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), 1.0))',
        ("weights float", "they must agree"),
    ),
    "weights of nothing": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch), '
        "torch.zeros(len(batch[1]))))",
        ("weights", "sum to 0 ", "Give elements a weight"),
    ),
    "a loss that is random": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch) * '
        "torch.rand(len(batch[1])))",
        ("loss 'train' is not deterministic", "augmentation"),
    ),
    "dropout that stays on": (
        "torch.tanh(self.hidden(inputs))",
        "F.dropout(torch.tanh(self.hidden(inputs)))",
        ("loss 'train' is not deterministic", "dropout called with training=True"),
    ),
    "a mean taken inside": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: cross_entropy(model, batch).mean().expand(3))',
        ("loss 'train' depends on how split 'train' is cut into batches", "a mean taken inside"),
    ),
    "a mean with weights of its own": (
        TRAIN_LOSS,
        '"train": Loss(lambda x, y, reduction="mean": F.cross_entropy(x, y, ignore_index=0, '
        "reduction=reduction))",
        ("loss 'train'", "reduction='mean'", "ignore_index", "(values, weights)"),
    ),
    "outputs and targets that are broadcast": (
        TRAIN_LOSS,
        '"train": Loss(lambda outputs, targets: (outputs[:, :1] - targets) ** 2)',
        ("loss 'train'", "they were broadcast against each other", "Make their shapes agree"),
    ),
    "a loss that is not finite": (
        TRAIN_LOSS,
        '"train": Loss(call=lambda model, batch: (cross_entropy(model, batch) - 99).log())',
        ("loss 'train' is nan at the first checkpoint", "--steps"),
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_a_task_that_cannot_be_evaluated_is_refused(place: Place, case: str) -> None:
    old, new, words = TASKS[case]
    write_task(place.task, old, new)
    place.refuses(*words)


PLACES = {
    "no such file": (
        "nosuch.py",
        ("task file nosuch.py does not exist", "--task FILE, FILE:FUNCTION or pkg.module:FUNCTION"),
    ),
    "no such function": (
        "{task}:other",
        ("task.py:other", "no such function", "def task() -> Task"),
    ),
    "no such module": (
        "nosuch.module:task",
        ("cannot import task nosuch.module", "No module named 'nosuch'"),
    ),
    "a directory": ("{task.parent}", ("task file", "does not exist")),
    "nothing": ("", ("task",)),
    "a module that is not a name": ("no such task", ("cannot import task no such task",)),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_task_that_is_not_there_is_refused(place: Place, case: str) -> None:
    text, words = PLACES[case]
    before = contents(place.data)
    result = run_lca(place.checkpoints, text.format(task=place.task), place.out)
    refused(result, *words)
    assert contents(place.data) == before


def test_task_files_of_the_same_text_in_different_folders_read_their_own_neighbours(
    place: Place,
) -> None:
    """The second model has another shape than the checkpoints: refused, not replayed with the first
    folder's model.
    """
    text = place.task.read_text().replace(
        "import torch\n", "from pathlib import Path\nimport torch\n", 1
    )
    text = text.replace("(64, 8)", "(64, WIDTH)").replace("(8, 4)", "(WIDTH, 4)")
    for name, width in (("one", 8), ("two", 9)):
        folder = place.data.parent / name
        folder.mkdir()
        (folder / "width.txt").write_text(str(width))
        read = "WIDTH = int(Path(__file__).with_name('width.txt').read_text())"
        (folder / "task.py").write_text(text.replace("class Net", f"{read}\n\n\nclass Net"))
    assert (
        run_lca(
            place.checkpoints, place.data.parent / "one" / "task.py", place.data / "one.lca"
        ).exit_code
        == 0
    )
    place.task = place.data.parent / "two" / "task.py"
    place.refuses("'hidden.weight'", "[9, 64]")


def test_the_name_of_one_loss_is_no_list_of_names(place: Place) -> None:
    with pytest.raises(InputError, match=r"a list of names, such as \['train'\], got 'train'"):
        lca_posthoc.run(place.checkpoints, str(place.task), losses="train", out=place.out)  # type: ignore[arg-type]
    assert not place.out.exists()
