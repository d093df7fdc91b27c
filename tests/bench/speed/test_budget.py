"""The budget of the score pass: which part a call on the device belongs to, what adds up, and what binds."""

import pytest
import torch

from bench.speed import budget
from bench.speed.budget import DECODING, REST, Budget, Part, accounted
from bench.speed.registry import Settings
from bench.speed.score_pass import ONCE, SEAMS

SCORING, AUTOGRAD, DECODER = 1, 2, 3


def span(cat, name, ts, dur, tid=SCORING, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def mark(name, ts, dur):
    return span("user_annotation", f"part {name}", ts, dur)


TRACE = [
    {"ph": "M", "name": "process_name"},
    mark("the rest", 0, 10_000),
    mark("norms", 1_000, 4_000),
    mark("norms: forward", 2_000, 1_000),
    mark("norms: backward with norms", 3_000, 1_000),  # begins where the one before it ends
    span("cuda_runtime", "cudaLaunchKernel", 2_100, 5, correlation=1),
    span("kernel", "conv", 2_200, 2_000, tid=7, correlation=1),  # runs on after its part has ended
    span("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 3_050, 100, tid=AUTOGRAD),
    span("cuda_driver", "cuLaunchKernelEx", 3_100, 5, tid=AUTOGRAD, correlation=2),
    span("kernel", "_direct", 4_000, 400, tid=7, correlation=2),  # 200 of it beside `conv`
    span("cuda_runtime", "cudaGraphLaunch", 4_500, 5, correlation=3),  # in `norms`, behind its inner parts
    span("kernel", "a", 5_000, 100, tid=7, correlation=3),
    span("kernel", "b", 5_100, 100, tid=7, correlation=3),
    span("cuda_runtime", "cudaMemcpyAsync", 6_000, 5, correlation=4),
    span("gpu_memcpy", "Memcpy DtoH", 6_100, 50, tid=7, correlation=4),
    span("cuda_runtime", "cudaStreamSynchronize", 6_010, 300, correlation=5),
    span(
        "cuda_runtime", "cudaLaunchKernel", 2_500, 5, tid=DECODER, correlation=6
    ),  # while `forward` is marked
    span("kernel", "idct", 8_000, 600, tid=8, correlation=6),
    span("kernel", "of an unknown call", 9_000, 10, tid=8, correlation=99),
]


def test_calls_belong_to_the_innermost_part_of_the_scoring_thread():
    found, busy = accounted(TRACE, batches=2)
    device = {name: 2 * part.device for name, part in found.items()}
    assert device == pytest.approx(
        {
            "norms": 0.2,
            "norms: forward": 2.0,
            "norms: backward with norms": 0.4,
            REST: 0.06,
            DECODING: 0.6,
        }
    )
    assert {name: 2 * part.launches for name, part in found.items()} == {
        "norms": 1, "norms: forward": 1, "norms: backward with norms": 1, REST: 1, DECODING: 1
    }  # fmt: skip
    assert 2 * found["norms"].kernels == 2
    assert (2 * found[REST].waits, 2 * found[REST].waiting) == (1, pytest.approx(0.3))
    # 2,200 to 4,400, 5,000 to 5,200, and 50, 600 and 10: what overlaps counts once.
    assert 2 * busy == pytest.approx((2200 + 200 + 50 + 600 + 10) / 1e3)


def test_what_is_done_once_is_no_micro_batchs():
    recording = [
        mark(ONCE, -9_000, 8_000),
        mark("norms", -8_000, 2_000),
        span("cuda_runtime", "cudaLaunchKernel", -7_000, 5, correlation=11),
        span("kernel", "conv", -6_900, 500, tid=7, correlation=11),
        span("cuda_runtime", "cudaDeviceSynchronize", -1_500, 300, correlation=12),
    ]
    assert accounted([*recording, *TRACE], batches=2) == accounted(TRACE, batches=2)


def test_a_part_that_calls_nothing_is_there():
    assert set(accounted([mark("upload", 0, 5)], 1)[0]) == {"upload"}


def of(wall, busy, decode, **parts):
    return Budget("a case", 16, wall, busy, decode, {name: Part(*numbers) for name, numbers in parts.items()})


@pytest.mark.parametrize(
    ("found", "binds"),
    [
        (of(10, 3, 2, norms=(9, 1)), "The host binds"),
        (of(10, 9, 2, norms=(10, 8)), "The device binds"),
        (of(10, 3, 9.5, norms=(4, 1), **{"wait for images": (6, 0)}), "Decoding binds"),
    ],
)
def test_what_binds_is_what_takes_longest_alone(found, binds):
    assert found.binds.startswith(binds)


def test_the_page_adds_up_and_names_the_lines_that_waited():
    found = Budget(
        "a case", 16, 10.0, 4.0, 1.0,
        {"norms": Part(7.25, 1.5, 3.0, 12, 14, 2), "norms: crops": Part(),
         REST: Part(2.75, 0, 1, 1, 1, 0), DECODING: Part(0, 0, 0.5)},
        {"scoring.py:103": 1.0, "engine.py:9": 3.0},
        ["a:gone"],
    )  # fmt: skip
    page = found.page()
    assert "| together | 10.00 | 1.50 | 4.50 | 13 | 15 | 2.0 |" in page
    assert "1600 sources a second" in page
    assert "| norms: the rest | 7.25 |" in page
    assert "| norms: crops | 0.00 |" in page
    assert "busy 40 %" in page
    assert page.index("engine.py:9: 3.0") < page.index("scoring.py:103: 1.0")
    assert "not there any more: a:gone" in page
    assert [tuple(row) for row in found.rows()] == [budget.COLUMNS] * 4


def test_the_pass_is_cut_into_parts_that_add_up(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    before = torch.get_num_threads()
    try:
        found = budget.measured(Settings(torch.device("cpu"), quick=True))
    finally:
        torch.set_num_threads(before)
    assert set(found.parts) == {*SEAMS, REST} - {ONCE}
    assert found.missing == []
    assert found.sources == 16
    assert sum(part.host for part in found.parts.values()) == pytest.approx(found.wall)
    assert all(part.host > 0 for part in found.parts.values())
    assert found.busy == 0
