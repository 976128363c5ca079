"""Requests and answers come back from plain data as they were sent, and nothing else comes back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lca_posthoc.checkpoints.optimizer_steps import MomentsRecord
from lca_posthoc.checkpoints.trajectory import Checkpoint, TensorSpec
from lca_posthoc.errors import InputError, NotFiniteError, pack_error
from lca_posthoc.numerics.nodes import Curve, Line, Node, Tangent
from lca_posthoc.numerics.settings import DEFAULTS
from lca_posthoc.replay import requests
from lca_posthoc.replay.requests import (
    Admission,
    AdmissionRequest,
    Calibrations,
    CalibrationsRequest,
    Compressions,
    CompressionsRequest,
    Costs,
    CostsRequest,
    DescribeRequest,
    Description,
    Failure,
    LevelMemory,
    LossCosts,
    LossDescription,
    LossesAnswer,
    LossesRequest,
    LossSpan,
    ProbeAnswer,
    ProbeRequest,
    RunSettings,
    Sample,
    ShardAnswer,
    ShardRequest,
    Sites,
    SpanAnswer,
    SpanRequest,
    StoredPoints,
    TaskSetup,
    answered,
    from_plain,
    to_plain,
)

STATISTICS = {"loss": "a", "split": "s", "examples": 3, "batch_size": 2, "kept": ["bn"]}
SETTINGS = RunSettings.of(
    {**DEFAULTS, "device": "cpu", "path_band": "off", "tolerance": "0.1%", "statistics": STATISTICS}
)
SETUP = TaskSetup(
    task={"kind": "file", "path": "/there/task.py", "function": "task", "sha256": "0" * 64},
    parcel="key",
    settings=SETTINGS,
    losses=["a", "b/c"],
    stored=None,
    digests={"split 'a'": "1" * 64},
)
CHECKPOINTS = [
    Checkpoint(step, (Path(f"{step}/x.safetensors"), Path("y.safetensors")), 8, 7, moments)
    for step, moments in ((0, None), (10, MomentsRecord(16, 5)))
]
POINTS = StoredPoints(
    root="s3://place/run", names={"w": "module.w"}, checkpoints=dict(enumerate(CHECKPOINTS))
)
SAMPLED: dict[str, Any] = {
    "setup": SETUP,
    "sample": Sample(
        points=POINTS, last=1, looked=[[0], [0], [0]], workers_per_host=2, span_length=4
    ),
    "batch_sizes": {"a": 32},
}
OF_RUN: dict[str, Any] = {
    "setup": SETUP,
    "points": POINTS,
    "run": "/there/run.lca",
    "batch_sizes": {"a": 32},
}
LOSS_SPAN = LossSpan(
    evaluations=9,
    forward_passes=0,
    batch_size=32,
    worst_residual=1e-4,
    unconverged=0,
    silent=["w"],
    hidden=[],
    ends=[1.0, 0.5],
)
PROBED: dict[str, Any] = {
    "free_memory": 2e9,
    "scale": {"a": 2.0},
    "replicates": {"a": 8},
    "sites": {
        "a": Sites(
            found=[{"operation": "linear", "tensors": ["w"], "axis": 0, "is_inner": False}], why=""
        ),
        "b": Sites(found=None, why="one example"),
    },
    "measured": True,
}
SENT = (
    AdmissionRequest(
        versions={"torch": "2"},
        device=None,
        token=Path("/there/token"),
        text="x",
        root="/r",
        checkpoints=CHECKPOINTS,
    ),
    Admission(cuda=False, gpu=None),
    DescribeRequest(setup=dataclasses.replace(SETUP, stored=["w"])),
    Description(
        tensors=[TensorSpec("w", "parameter", (2, 3), ("v",), 0), TensorSpec("n", "buffer", ())],
        losses={
            "a": LossDescription(
                on="a",
                kind="function",
                examples=3,
                total=4,
                groups=[1, 2],
                counts=[2, 1],
                per="example",
                rows=3,
                in_order_only=False,
            ),
            "b": LossDescription(
                on="a",
                kind="call",
                examples=3,
                total=4,
                groups=["x", "y"],
                counts=[2, 1],
                per=None,
                rows=0,
                in_order_only=False,
            ),
            "c": LossDescription(
                on=None,
                kind="term",
                examples=0,
                total=0,
                groups=None,
                counts=None,
                per=None,
                rows=0,
                in_order_only=False,
            ),
        },
        task_losses=["a"],
        digests={},
        frozen=[],
        fixed=["f"],
        added=[],
        patterns=["f*"],
        unstored=[],
        statistics="a",
    ),
    ProbeRequest(
        **SAMPLED,
        modes=[0, 1],
        half=[],
        ties={"w": ["w", "v"]},
        fixed={},
        leftovers={},
        recorded=["a"],
    ),
    ProbeAnswer(
        batch_sizes={"a": 32},
        identity={"a": [{"loss": 1.0, "gradient_norm": 2.0}, None]},
        levels={
            "tensors": LevelMemory(
                needs=1e6, block={"a": None, "b": 4}, along={"a": "b", "b": None}
            )
        },
        statistics=None,
        notes=["one"],
        texts={"a": ["<b>", "two"], "b": None},
        **PROBED,
    ),
    CalibrationsRequest(**SAMPLED, keep="units", along={"a": "b", "b": None}),
    Calibrations(shares={"a": None, "b": 0.25}),
    CompressionsRequest(**SAMPLED, segments_of_window=16),
    Compressions(compressed={"a": {"allocation": 0.5}}),
    CostsRequest(**SAMPLED, segments_of_window=16, measured=False),
    Costs(
        losses={
            "a": LossCosts(
                seconds=1.0, forward=0.5, higher=0.0, fastest=64, largest=128, examples=1.5
            )
        },
        compressed={},
        together={"tensors": 1.0},
        higher=0.0,
        recalibrating=0.0,
        memory={"tensors": 1e9},
    ),
    LossesRequest(**OF_RUN, meetings={3: ["a"], 12: ["b"]}),
    LossesAnswer(losses={"a": 0.5}),
    SpanRequest(**OF_RUN, durable=True, span=3, pending=["a"], looks_back=[0, 1]),
    SpanRequest(**OF_RUN, durable=True, span=3, pending=["a"], looks_back=None),
    ShardRequest(
        **OF_RUN,
        durable=True,
        span=3,
        losses=["a"],
        nodes=[
            Node(Line(0), 0.25, (Line(0),)),
            Node(Line(1, 0), 0.0, ()),
            Node(Line(2, 0), 0.0, (Line(1), Tangent(1, 1, 2), Line(0, 2))),
            Node(Curve(1, (-1, 2)), 0.5, (Line(1), Curve(1, (-1, 2)))),
        ],
        shards=[1, 2],
        distances=[0],
        file="000003-a.sums",
    ),
    ShardAnswer(seconds=0.5, peak_bytes=2**30),
    SpanAnswer(losses={"a": LOSS_SPAN}, segments=4, seconds=1.5, peak_bytes=2**30),
    Failure(error=pack_error(InputError("no such loss")), trace="line 1"),
)
NAMES = [type(sent).__name__ for sent in SENT]


@pytest.mark.parametrize("sent", SENT, ids=NAMES)
def test_what_is_sent_arrives_as_it_was(sent: object) -> None:
    """JSON in between: nothing but texts, numbers, lists and dictionaries by text is on the way."""
    assert from_plain(type(sent), json.loads(json.dumps(to_plain(sent)))) == sent


def test_every_request_and_answer_is_among_them() -> None:
    defined = {
        name
        for name, kind in vars(requests).items()
        if dataclasses.is_dataclass(kind) and kind.__module__ == requests.__name__  # type: ignore[attr-defined]
    }
    parts = {
        "RunSettings",
        "TaskSetup",
        "StoredPoints",
        "Sample",
        "LossDescription",
        "LevelMemory",
        "LossCosts",
        "LossSpan",
        "Sites",
    }
    assert defined - parts - {"TaskRequest", "SampleRequest", "RunRequest"} == set(NAMES)


@pytest.mark.parametrize("sent", SENT, ids=NAMES)
def test_a_missing_or_an_unknown_field_is_an_error(sent: object) -> None:
    plain = to_plain(sent)
    first = next(iter(plain))
    with pytest.raises(ValueError, match=r"unknown \(surplus\)"):
        from_plain(type(sent), {**plain, "surplus": 1})
    with pytest.raises(ValueError, match=rf"missing \({first}\)"):
        from_plain(type(sent), {name: value for name, value in plain.items() if name != first})


OTHER: dict[str, tuple[type, dict[str, object], str]] = {
    "a text for a number": (SpanRequest, {"span": "3"}, "SpanRequest: span: expected int"),
    "a fraction for a whole number": (SpanRequest, {"span": 3.5}, "span: expected int"),
    "true for a number": (SpanRequest, {"span": True}, "span: expected int"),
    "a number for true": (SpanRequest, {"durable": 1}, "durable: expected bool"),
    "None for a text": (SpanRequest, {"run": None}, "run: expected str"),
    "a text for a list": (SpanRequest, {"pending": "train"}, "pending: expected list"),
    "a list for a table": (SpanRequest, {"batch_sizes": []}, "batch_sizes: expected dict"),
    "a text in a table": (SpanRequest, {"batch_sizes": {"a": "b"}}, "batch_sizes: expected"),
    "a position that is no number": (LossesRequest, {"meetings": {"x": []}}, "meetings: "),
    "a list for a request": (SpanRequest, {"setup": []}, "setup: expected the fields of TaskSetup"),
    "a field too many inside": (
        SpanRequest,
        {"points": {"root": "", "names": {}, "more": 1}},
        "points: fields are",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_value_of_another_type_is_an_error_that_names_the_field(case: str) -> None:
    kind, change, message = OTHER[case]
    plain = next(to_plain(sent) for sent in SENT if type(sent) is kind)
    with pytest.raises(ValueError, match=message):
        from_plain(kind, {**plain, **change})


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2), object(), {1.5: "a"}, SETUP.__class__],
    ids=["tensor", "object", "key", "class"],
)
def test_what_is_no_plain_data_is_not_sent(value: object) -> None:
    with pytest.raises(TypeError):
        to_plain(Failure(error={"kind": value}, trace=""))  # type: ignore[dict-item]


def test_an_answer_is_that_of_its_request_or_a_failure() -> None:
    assert answered(LossesRequest, {"losses": {"a": 1.0}}) == LossesAnswer(losses={"a": 1.0})
    failed = answered(
        LossesRequest, to_plain(Failure(error=pack_error(NotFiniteError("NaN", 7)), trace=""))
    )
    assert isinstance(failed, Failure)
    error = failed.exception()
    assert isinstance(error, NotFiniteError)
    assert (str(error), error.step) == ("NaN", 7)


def test_a_marker_that_does_not_tell_what_is_hidden_is_read() -> None:
    """Runs of earlier releases are resumed."""
    marker = {**to_plain(LOSS_SPAN), "run": "0" * 32, "seconds": 1.0}
    del marker["hidden"]
    assert LossSpan.of(marker) == LOSS_SPAN
