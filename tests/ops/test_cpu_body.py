"""Every body of the C++ ops that this CPU can run; a process has one, so each runs in its own."""

import os
import subprocess
import sys

import pytest
import torch

from ddfast.ops import reference
from ddfast.ops._dispatch import CPU_BODIES, cpu_body
from ddfast.ops._winograd import winograd_is_fast
from tests.ops import layouts

OPS = ("grad_sq_norm_linear", "grad_sq_norm_conv2d", "grad_sq_norm_norm", "normalization_backward")
BODIES = CPU_BODIES[: CPU_BODIES.index(cpu_body()) + 1] if cpu_body() in CPU_BODIES else ()
DTYPES = (torch.float32, torch.bfloat16)


def cases():
    """The ops of which there are several bodies, in both dtypes that these serve."""
    for op in OPS:
        for dtype in DTYPES:
            given = layouts.arguments(op)
            yield op, dtype, tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in given)


def in_process(body, program):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "DDFAST_CPU_BODY": body},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("body", BODIES)
def test_each_body_agrees_with_the_reference(body, tmp_path):
    program = (
        "import torch; from ddfast.ops._dispatch import cpu_body; from tests.ops.test_cpu_body import cases\n"
        f"assert cpu_body() == {body!r}\n"
        "found = [getattr(torch.ops.ddfast_native, op)(*given) for op, _, given in cases()]\n"
        f"torch.save(found, {str(tmp_path / 'found.pt')!r})"
    )
    done = in_process(body, program)
    assert done.returncode == 0, done.stderr
    for (op, dtype, given), found in zip(cases(), torch.load(tmp_path / "found.pt"), strict=True):
        wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in given)
        expected = getattr(reference, op)(*wide)
        found, expected = (r if isinstance(r, tuple | list) else (r,) for r in (found, expected))
        for one, wanted in zip(found, expected, strict=True):
            allowed = 2**-8 if one.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(
                one.double(),
                wanted,
                rtol=allowed,
                atol=allowed,
                msg=lambda text, at=f"{op} {dtype}": f"{at}: {text}",
            )


@pytest.mark.parametrize("body", BODIES)
def test_winograd_takes_avx512_and_no_more(body):
    program = "from ddfast.ops._winograd import winograd_is_fast; print(winograd_is_fast())"
    assert in_process(body, program).stdout.strip() == str(
        winograd_is_fast() and body not in ("portable", "avx2")
    )


def test_an_unknown_body_is_refused_in_one_line():
    program = "from ddfast.ops._dispatch import cpu_body; cpu_body()"
    last = in_process("avx9000", program).stderr.strip().splitlines()[-1]
    assert last.endswith("DDFAST_CPU_BODY must be portable, avx2, avx512 or avx512_bf16, got avx9000")
    assert "UsageError" in last
