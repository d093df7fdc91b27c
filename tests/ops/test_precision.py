import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from ddfast import ops
from ddfast.ops import precision
from ddfast.ops.precision import autocast, repeatable_convolutions, resolve_precision


def product_dtype():
    return (torch.ones(4, 4) @ torch.ones(4, 4)).dtype


def test_float32_never_autocasts():
    assert resolve_precision("float32", "cpu") is None
    assert resolve_precision("float32", torch.device("cuda")) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype() == torch.bfloat16
        with autocast("float32", "cpu"):
            assert product_dtype() == torch.float32


@pytest.mark.parametrize(("hardware", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_auto_is_bfloat16_where_the_cpu_gains_from_it(monkeypatch, hardware, dtype):
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: hardware)
    assert resolve_precision("auto", "cpu") == dtype
    with autocast("auto", "cpu"):
        assert product_dtype() == (dtype or torch.float32)


def test_auto_on_a_device_without_autocast_is_float32():
    assert resolve_precision("auto", "meta") is None
    with autocast("auto", "meta"):
        assert product_dtype() == torch.float32


@pytest.mark.parametrize("capabilities", [{"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_f": True}, {}])
def test_capabilities_decide(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.cpu_multiplies_bfloat16() == ("avx512_f" not in capabilities and bool(capabilities))


def test_older_torch_is_asked_through_its_predicates(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert precision.cpu_multiplies_bfloat16()


@pytest.mark.parametrize(
    ("capabilities", "vendor", "gains"),
    [
        ({"avx512_bf16": True}, "AuthenticAMD", True),
        ({"avx512_bf16": True}, "GenuineIntel", False),
        ({"avx512_bf16": True}, "", False),
        ({"avx512_bf16": True, "amx_bf16": True}, "GenuineIntel", True),
        ({"avx512_f": True}, "AuthenticAMD", False),
        ({}, "GenuineIntel", False),
    ],
)
def test_auto_takes_what_is_known_to_be_faster(monkeypatch, capabilities, vendor, gains):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(precision, "cpu_vendor", lambda: vendor)
    assert precision.cpu_gains_from_bfloat16() == gains
    assert precision.compute_dtype("auto", "cpu") == ("bfloat16" if gains else "float32")
    assert precision.compute_dtype("bfloat16", "cpu") == "bfloat16"  # whoever asks for it gets it
    assert precision.compute_dtype("float32", "cpu") == "float32"


def test_bfloat16_by_name_computes_in_it():
    with autocast("bfloat16", "cpu"):
        assert product_dtype() == torch.bfloat16
    assert resolve_precision("bfloat16", "meta") is None


def test_the_instructions_name_torch_s_kernels_and_the_bfloat16_units(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert precision.cpu_instructions() == "AVX2 amx_bf16"


@pytest.fixture
def switches():
    """The backends with a switch for TF32, which are put back as they were."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_tf32_is_told(switches, convolutions, products):
    switches[0].allow_tf32, switches[1].allow_tf32 = convolutions, products
    told = ["convolutions"] * convolutions + ["products"] * products
    assert precision.tf32("cuda:1") == (", ".join(told) or "none")
    assert precision.tf32("cpu") == "none"


def test_tf32_is_told_where_the_new_names_were_set_apart():
    program = (
        "import torch; from ddfast.ops.precision import tf32; "
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'; print(tf32('cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of float32, bfloat16, auto, got 'bf16'"):
        resolve_precision("bf16", "cpu")


def test_an_op_computes_in_its_own_dtypes_under_autocast():
    input, grad = torch.randn(3, 4, 9, 9), torch.randn(3, 5, 7, 7)
    plain = ops.grad_sq_norm_conv2d(input, grad, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.grad_sq_norm_conv2d(input, grad, 3), plain)


def test_repeatable_convolutions_are_asked_for_in_a_block_alone():
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    try:
        for given in ((False, True), (True, False)):
            backend.deterministic, backend.benchmark = given
            with suppress(KeyboardInterrupt), repeatable_convolutions():
                assert (backend.deterministic, backend.benchmark) == (True, False)
                raise KeyboardInterrupt
            assert (backend.deterministic, backend.benchmark) == given
    finally:
        backend.deterministic, backend.benchmark = before
