"""Gradient norms of random ops, layers and networks against a float64 loop; `bench.trials.layers` draws many more."""

import pytest
import torch
from torch import nn

from bench.trials import layers
from ddfast.ops import grad_sq_norm_conv2d, grad_sq_norm_linear, reference

DRAWS = {**dict.fromkeys(layers.OPS, 400), **dict.fromkeys(layers.LAYERS, 100), "fallback": 12, "network": 30}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", layers.KINDS)
def test_random_draws_hold(kind):
    outcomes = {number: layers.trial(kind, number, seed=0) for number in range(DRAWS[kind])}
    counted = {number: reason for number, reason in outcomes.items() if reason is not layers.TORCH}
    assert not {number: reason for number, reason in counted.items() if reason is not None}
    assert len(counted) > 0.9 * len(outcomes)


def test_a_wrong_norm_is_found(monkeypatch):
    from ddfast.gradients import norms

    monkeypatch.setattr(norms, "ghost_norms", lambda *arguments: (torch.ones(len(arguments[1])), None))
    assert "where it is" in layers.trial("conv2d", 0, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (2, 5), (3, 1)])
def test_one_channel_in_and_out_counts_every_tap(kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    made = 9 - kernel[0] + 1, 8 - kernel[1] + 1
    x = torch.randn(2, 1, 9, 8, generator=generator).to(dtype)
    g = torch.randn(2, 1, *made, generator=generator).to(dtype)
    windows = x.double().unfold(2, kernel[0], 1).unfold(3, kernel[1], 1)
    expected = (windows * g.double()[..., None, None]).sum((1, 2, 3)).square().sum((1, 2))
    norms = grad_sq_norm_conv2d(x, g, kernel, bias=False)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_layer_on_two_dimensions_of_positions(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 9, generator=generator).to(dtype)
    g = torch.randn(2, 3, 5, 7, generator=generator).to(dtype)
    expected = reference.grad_sq_norm_linear(x.double(), g.double(), True)
    for permuted in (x, x.transpose(1, 3).contiguous().transpose(1, 3)):
        norms = grad_sq_norm_linear(permuted, g)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


def test_the_page_says_what_was_drawn(tmp_path, capsys):
    assert layers.main(["--draws", "60", "--seed", "3", "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| conv2d | 4 | 4 | 0 | 0 |" in page
    assert "--draws 60 --seed 3" in page
    assert "conv2d: 4 of 4 held" in capsys.readouterr().out
    assert layers.main(["--draw", "conv2d:2", "--seed", "3"]) == 0


def test_a_draw_on_which_torch_itself_fails_does_not_count():
    model = layers.Logits(nn.Conv2d(1, 5, 3)).eval()
    inputs = torch.randn(2, 1, 6, 6)
    assert layers._torch_holds(model, inputs)
    model.layers[0].forward = lambda x: (
        torch.zeros(len(x), 5, 4, 4, dtype=x.dtype) if x.dtype == torch.float32 else x
    )
    assert not layers._torch_holds(model, inputs)
