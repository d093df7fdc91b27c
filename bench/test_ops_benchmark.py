"""pytest-benchmark entries of the ops: `python -m pytest bench/test_ops_benchmark.py`.

Not collected by `make test`. Every op and its plain version form one group; both pass the gate first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from bench.speed.measuring import synchronise
from bench.speed.op_cases import OpCase, op_cases
from bench.speed.registry import Settings, passed

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("pytest_benchmark")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
NAMES = [case.name for case in op_cases(Settings(torch.device("cpu"), quick=True))]


@pytest.fixture(scope="module", params=DEVICES)
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(torch.device(request.param))


@pytest.fixture(scope="module", params=range(len(NAMES)), ids=[name.split(",")[0] for name in NAMES])
def case(request: pytest.FixtureRequest, settings: Settings) -> OpCase:
    found = next(case for number, case in enumerate(op_cases(settings)) if number == request.param)
    passed(found.name, found.check())
    return found


@pytest.mark.parametrize("body", ["ddfast", "plain"])
def test_op(benchmark: BenchmarkFixture, settings: Settings, case: OpCase, body: str) -> None:
    run = case.ours if body == "ddfast" else case.plain
    benchmark.group = case.name

    def once() -> None:
        run()
        synchronise(settings.device)

    benchmark.pedantic(once, rounds=20, warmup_rounds=2)
