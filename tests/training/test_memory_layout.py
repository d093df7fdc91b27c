"""Networks lie in memory as they are fastest, and compute the same there."""

import pytest
import torch

from ddfast.models import create_model
from ddfast.training.device import memory_layout

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("arch", "layout"), [("convnet3", torch.channels_last), ("convnet3_in", torch.contiguous_format)]
)
def test_the_layout_reaches_every_map_and_changes_no_output(arch, layout):
    torch.manual_seed(0)
    model = create_model(arch, 3, 16, width=8).eval()
    images = torch.rand(4, 3, 16, 16)
    expected = model(images)
    assert memory_layout(model, CPU) == layout
    laid_out = model.to(memory_format=layout)
    maps = []
    for module in laid_out.blocks:
        module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    outputs = laid_out(images.contiguous(memory_format=layout))
    assert len(maps) == len(laid_out.blocks)
    assert all(each.is_contiguous(memory_format=layout) for each in maps)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_a_gpu_takes_channels_last():
    model = create_model("convnet3_in", 3, 16, width=8)
    assert memory_layout(model, torch.device("cuda")) == torch.channels_last
