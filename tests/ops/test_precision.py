import pytest
import torch

from ddfast import ops
from ddfast.ops import precision
from ddfast.ops.precision import autocast, resolve_precision


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
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, hardware, dtype):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: hardware)
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


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="one of float32, auto, got 'bf16'"):
        resolve_precision("bf16", "cpu")


def test_an_op_computes_in_its_own_dtypes_under_autocast():
    input, grad = torch.randn(3, 4, 9, 9), torch.randn(3, 5, 7, 7)
    plain = ops.grad_sq_norm_conv2d(input, grad, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.grad_sq_norm_conv2d(input, grad, 3), plain)
