"""Data that hold something open: read in the thread that opened it, refused where it would have to
travel.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lca_posthoc import Loss, Task, run
from lca_posthoc.errors import InputError
from lca_posthoc.numerics.objective import (
    Objective,
    ObjectiveSettings,
    Split,
    build_objective,
    reader,
    sources,
)
from lca_posthoc.numerics.objective.reader import Reader
from lca_posthoc.tasks.task import pack_task

from ..helpers.cli import document, record, run_lca, task_namespace, write_task

N = 40
CPU = torch.device("cpu")
INPUTS, TARGETS = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
SETTING: contextvars.ContextVar[str] = contextvars.ContextVar("setting")


@pytest.fixture(params=[0.25, 0.0], ids=["resident", "streamed"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", request.param)
    return float(request.param)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "examples.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table examples (number integer primary key, x blob, y integer)")
        examples = [(at, INPUTS[at].numpy().tobytes(), int(TARGETS[at])) for at in range(N)]
        connection.executemany("insert into examples values (?, ?, ?)", examples)
    return path


def example(row: tuple[bytes, int]) -> tuple[Tensor, int]:
    return torch.frombuffer(bytearray(row[0]), dtype=torch.float32), row[1]


class Indexed(Dataset[Any]):
    """What is common to the data sets below: examples by number, through `connection()`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connection(self) -> sqlite3.Connection:
        raise NotImplementedError

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        question = "select x, y from examples where number = ?"
        return example(self.connection().execute(question, (index,)).fetchone())


class Opening(Indexed):
    """Opens when first asked."""

    opened: sqlite3.Connection | None = None

    def connection(self) -> sqlite3.Connection:
        self.opened = self.opened or sqlite3.connect(self.path)
        return self.opened


class Open(Indexed):
    """Is open from the start, counts by it, and closes it when it is gone through."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.opened = sqlite3.connect(path)

    def connection(self) -> sqlite3.Connection:
        return self.opened

    def __len__(self) -> int:
        return int(self.opened.execute("select count(*) from examples").fetchone()[0])


class OfItsThread(Indexed):
    """Keeps its connection where only the thread that made it finds it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.local = threading.local()
        self.local.connection = sqlite3.connect(path)

    def connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection = self.local.connection
        return connection


class OfItsContext(Indexed):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        SETTING.set(str(path))

    def connection(self) -> sqlite3.Connection:
        return sqlite3.connect(SETTING.get())


class Rows(IterableDataset[Any]):
    """Walks a cursor, and closes it in the thread that opened it, however far it came."""

    def __init__(self, path: Path) -> None:
        self.opened, self.closed = sqlite3.connect(path), 0

    def __iter__(self) -> Iterator[Any]:
        cursor = self.opened.execute("select x, y from examples order by number")
        try:
            yield from map(example, cursor)
        finally:
            cursor.close()
            self.closed += 1


KINDS: dict[str, Callable[[Path], Any]] = {
    "opened when first asked": Opening,
    "open from the start": Open,
    "of its thread": OfItsThread,
    "of its context": OfItsContext,
    "in a loader": lambda path: DataLoader(Open(path)),
    "a cursor": Rows,
}


def net() -> nn.Module:
    return nn.Linear(6, 3)


def objective_of(build: Callable[[], Any], **losses: Loss) -> Objective:
    def task() -> Task:
        return Task(net, {"train": build()}, losses or {"train": Loss(F.cross_entropy)})

    return build_objective(
        task,
        ["all"],
        ObjectiveSettings(device=CPU, precision="float32", norm_stats="running", batch_size=7),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_handles_are_used_in_the_thread_that_opened_them(
    kind: str, table: Path, share: float
) -> None:
    """By the probe, by passes that are left early or are two at once, by groups, and one precision
    higher.
    """
    objective = objective_of(lambda: KINDS[kind](table))
    plain = objective_of(lambda: (INPUTS, TARGETS))
    torch.manual_seed(0)
    point = {name: tensor.detach().clone() for name, tensor in net().state_dict().items()}
    for each in (objective, plain):
        each.settle_batch_sizes(point)
    split = objective.splits["train"]
    passing = split.batches(3)
    next(passing)
    passing.close()
    for (_, one), (_, other) in zip(split.batches(5), split.batches(5), strict=True):
        assert torch.equal(one[0], other[0])
    if kind != "a cursor":
        assert objective.digests == plain.digests
        labels = split.order(lambda inputs, targets: [int(each) for each in targets])
        assert [len(each) for each in labels.members] == plain.splits["train"].order(TARGETS).counts
    ours, truth = (each.evaluate(point, ["train"])["train"] for each in (objective, plain))
    assert ours.loss == truth.loss
    assert all(torch.equal(ours.gradient[name], truth.gradient[name]) for name in truth.gradient)
    wide = {name: tensor.double() for name, tensor in point.items()}
    higher = [each.reference.evaluate(wide, ["train"])["train"].loss for each in (objective, plain)]
    assert higher[0] == higher[1]


def test_a_grouping_may_use_the_handle_too(table: Path) -> None:
    data: list[Open] = []

    def build() -> Open:
        data.append(Open(table))
        return data[0]

    def label(inputs: Tensor, targets: Tensor) -> list[int]:
        return [len(data[0]) + int(target) for target in targets]

    objective = objective_of(build, grouped=Loss(F.cross_entropy, group_by=label))
    order = objective.order("grouped")
    assert order is not None
    assert order.labels == [N, N + 1, N + 2]


def test_data_that_outlive_an_objective_are_read_by_the_same_thread(table: Path) -> None:
    data = Opening(table)
    for _ in range(2):
        assert objective_of(lambda: data).splits["train"].sample(0, 2)[1].tolist() == [0, 1]


def test_a_cursor_is_closed_where_it_was_opened_when_a_pass_ends_early(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_RESIDENT_SHARE", 0)
    made: list[Rows] = []
    objective = objective_of(lambda: made.append(Rows(table)) or made[0])  # type: ignore[func-returns-value]
    before, passing = made[0].closed, objective.splits["train"].batches(3)
    next(passing)
    passing.close()
    assert made[0].closed == before + 1


# --- the thread that reads ------------------------------------------------------------------------


def test_an_error_keeps_its_place_and_the_thread_goes_on() -> None:
    reading = Reader()

    def fails() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here") as caught:
        reading.call(fails)
    assert caught.traceback[-1].name == "fails"
    assert reading.call(threading.current_thread) is Reader().call(threading.current_thread)


def test_a_read_within_a_read_does_not_wait_for_itself() -> None:
    reading = Reader()
    split = Split("train", (INPUTS, TARGETS), CPU, torch.float32)
    assert reading.call(lambda: reading.call(lambda: len(list(split.batches(7))))) == 6


def test_an_interrupted_wait_leaves_the_read_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that does not end is not waited for by the next one."""
    monkeypatch.setattr(reader, "_lane", None)
    release, begun, reading = threading.Event(), threading.Event(), Reader()
    future = reading.submit(lambda: (begun.set(), release.wait()))
    begun.wait()

    def interrupted(timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reading.result(future)
    assert Reader().call(lambda: 5) == 5
    release.set()


def test_values_of_the_context_are_those_of_whoever_began() -> None:
    token = SETTING.set("mine")
    reading = Reader()
    SETTING.reset(token)
    assert reading.call(SETTING.get) == "mine"


def test_threads_of_computation_and_the_default_device_are_the_caller_s() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert Reader().call(torch.get_num_threads) == threads
    finally:
        torch.set_num_threads(before)
    reading = Reader()
    try:
        reading.build(lambda: torch.set_default_device("meta"))
        # what a task file sets, its model and its losses see as well
        assert torch.get_default_device().type == "meta"
        assert reading.call(lambda: torch.ones(1).device.type) == "meta"
        torch.set_default_device(None)
        assert reading.build(lambda: torch.ones(1).device.type) == "cpu"
    finally:
        torch.set_default_device(None)
        reading.build(lambda: None)


def test_a_run_within_an_import_does_not_wait_for_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pickled by reference to a module that is still being imported is found by the thread
    that imports it.
    """
    (tmp_path / "importing_this.py").write_text(
        "import torch\nimport torch.nn.functional as F\nfrom lca_posthoc import Loss, Task\n"
        "from lca_posthoc.numerics.objective import ObjectiveSettings, build_objective\n"
        "from lca_posthoc.tasks.task import load, pack_task\n"
        "class Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(6, 3)\n"
        "data = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)\n"
        "packed = pack_task(Task(Net, {'train': data}, {'train': Loss(F.cross_entropy)}))\n"
        "settings = ObjectiveSettings(device=torch.device('cpu'), precision='float32',\n"
        "                             norm_stats='running', batch_size=2)\n"
        "objective = build_objective(lambda: load(*packed), None, settings)\n"
        "batches = [batch for _, batch in objective.splits['train'].batches(2)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import importing_this  # type: ignore[import-not-found]

    assert len(importing_this.batches) == 2


# --- runs -----------------------------------------------------------------------------------------


SERVED = """\
import sqlite3
from pathlib import Path
class Table(torch.utils.data.Dataset):
    def __init__(self):
        self.connection = sqlite3.connect(str(Path(__file__).parent / "rows.db"))
    def __len__(self):
        return 30
    def __getitem__(self, index):
        return inputs[self.connection.execute("select n from rows where n = ?", (index,)).fetchone()[0]], targets[index]
def task():
    train = Table()
"""


def test_a_run_reads_a_connection_the_task_has_open(tmp_path: Path) -> None:

    with contextlib.closing(sqlite3.connect(tmp_path / "rows.db")) as connection, connection:
        connection.execute("create table rows (n integer primary key)")
        connection.executemany("insert into rows values (?)", [(at,) for at in range(30)])
    checkpoints = record(tmp_path / "checkpoints", range(3))
    task = write_task(tmp_path / "task.py", "def task():\n", SERVED)
    document(run_lca(checkpoints, task, tmp_path / "served.lca", "--json"))
    document(
        run_lca(checkpoints, write_task(tmp_path / "plain.py"), tmp_path / "plain.lca", "--json")
    )
    import lca_posthoc

    served, plain = (
        lca_posthoc.open_run(tmp_path / name)["train"] for name in ("served.lca", "plain.lca")
    )
    for name in plain.allocation.data_vars:
        assert (served.allocation[name].values == plain.allocation[name].values).all()


# --- what cannot travel ---------------------------------------------------------------------------


class Holding(Dataset[Any]):
    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], TARGETS[index]


DATABASE, LOCK = sqlite3.connect(":memory:", check_same_thread=False), threading.Lock()
COLUMNS = (INPUTS, TARGETS)
PLAIN = {"train": Loss(F.cross_entropy)}
STAYS: dict[str, tuple[Callable[[], Task], str]] = {
    "a connection": (
        lambda: Task(net, {"train": Holding(DATABASE)}, PLAIN),
        r"split 'train' holds a sqlite3\.Connection, at thing of its Holding",
    ),
    "a lock in a list in a dict": (
        lambda: Task(net, {"train": COLUMNS, "test": Holding({"a": [LOCK]})}, PLAIN),
        r"split 'test' holds a _thread\.lock, at thing\['a'\]\[0\] of its Holding",
    ),
    "a generator": (
        lambda: Task(net, {"train": (each for each in COLUMNS)}, PLAIN),
        r"split 'train' holds a builtins\.generator \(",
    ),
    "a loader's data set": (
        lambda: Task(net, {"train": DataLoader(Holding(LOCK))}, PLAIN),
        r"split 'train' holds a _thread\.lock, at dataset\.thing of its DataLoader",
    ),
    "a file that is written": (
        lambda: Task(net, {"train": Holding(sys.stdout.buffer)}, PLAIN),
        r"split 'train' holds a _io\.\w+, at thing of its Holding",
    ),
    "a model's factory": (
        lambda: Task(functools.partial(lambda lock: net(), LOCK), {"train": COLUMNS}, PLAIN),
        r"the model holds a _thread\.lock, at args\[0\] of its partial",
    ),
    "a variable of a loss": (
        lambda: Task(
            net,
            {"train": COLUMNS},
            {"mine": Loss(call=(lambda lock: lambda model, batch: lock)(LOCK))},
        ),
        r"loss 'mine' holds a _thread\.lock, at call\.lock of its Loss",
    ),
    "a thread": (
        lambda: Task(net, {"train": Holding(threading.Thread())}, PLAIN),
        r"split 'train' holds a ",
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_a_task_that_cannot_travel_is_refused_by_what_it_holds_and_where(case: str) -> None:
    make, message = STAYS[case]
    with pytest.raises(InputError, match=message + ".*in __getitem__.*task file") as caught:
        pack_task(make())
    assert "pickle" in str(caught.value)


def test_a_run_of_such_a_task_is_refused_in_this_process_too(tmp_path: Path) -> None:
    checkpoints = record(tmp_path / "checkpoints", range(2))
    task = Task(task_namespace()["Net"], {"train": Holding(DATABASE)}, PLAIN)
    with pytest.raises(InputError, match=r"split 'train' holds a sqlite3\.Connection"):
        run(checkpoints, task, out=tmp_path / "run.lca", cluster="inline")
    assert not (tmp_path / "run.lca").exists()
