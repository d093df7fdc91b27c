import torch
from torch import nn

from bench.speed import roofline
from ddfast.masked_forward import folding
from ddfast.ops import winograd_weight


def test_tiles_of_equal_sets_are_counted_once():
    sets, reads = torch.tensor([[0, 1, 1], [2, 3, 0]]), torch.tensor([1, 2, 0])
    assert roofline.distinct_tiles(sets, reads) == (2 + 1 + 1) + (2 + 2 + 1)


def test_operations_of_convolutions():
    conv, x = nn.Conv2d(64, 32, 3, padding=1), torch.zeros(6, 64, 4, 6)
    direct = 2 * 9 * 64 * 32 * 24 * 6
    assert roofline.operations_of("conv", conv, (x,), torch.zeros(6, 32, 4, 6)) == (direct, direct)
    arguments = (x, winograd_weight(conv.weight), None, None, False)
    done = 2 * 16 * 64 * 32 * 6 * 6
    found = roofline.operations_of(folding._winograd_conv2d, None, arguments, torch.zeros(6, 32, 4, 6))
    assert found == (direct, done)
    shared = (*arguments, torch.zeros(2, 3, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    found = roofline.operations_of(folding._winograd_conv2d, None, shared, torch.zeros(6, 32, 4, 6))
    assert found == (direct, done / 3)
