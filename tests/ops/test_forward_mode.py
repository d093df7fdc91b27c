"""Forward-mode derivatives: registered ops have no rule for tangents, so their references compute."""

import pytest
import torch
from torch.autograd import forward_ad

import ddfast
from ddfast import ops
from ddfast.models import create_model
from ddfast.ops import augment_parameters

PARAMETERS = augment_parameters(2, brightness=0.2, saturation=1.3, contrast=0.8, shift=(1, 2)).double()
BOXES, SOURCE = torch.tensor([[0.0, 0, 5, 5], [1, 1, 7, 7]]), torch.tensor([0, 1])
COALITIONS = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) < 0.5
LABELS = torch.tensor([0, 0, 1, 1])
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()


def frozen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ddfast.fuse(create_model("convnet3_in", 3, 8, width=8)).double()
    return network.requires_grad_(False)


CASES = {
    "siamese_augment": (lambda x: ops.siamese_augment(x, PARAMETERS), [IMAGES]),
    "convnet_block": (lambda x, w: ops.convnet_block(x, w, None, None, None), [IMAGES, normal(4, 3, 3, 3)]),
    "convnet_block_batch_norm": (
        lambda x, w: ops.convnet_block_batch_norm(x, w, None, None, None)[0],
        [IMAGES, normal(4, 3, 3, 3)],
    ),
    "crop_resize": (lambda x: ops.crop_resize(x, BOXES, 6, source=SOURCE), [IMAGES]),
    "crop_batch": (lambda x: ops.crop_batch(x, BOXES, 6, source=SOURCE, dtype=x.dtype), [IMAGES]),
    "masked_batch": (lambda x: ops.masked_batch(x, COALITIONS, grid=4, dtype=x.dtype), [IMAGES]),
    "shapley_heatmap": (
        lambda o, p: ops.shapley_heatmap(o, SOURCE, p, value="prob"),
        [normal(2, 5, 3), normal(5, 16)],
    ),
    "cmi": (lambda f: ddfast.cmi(f, LABELS), [normal(4, 5)]),
    "class_kl": (lambda f: ops.class_kl(f, LABELS, reduction="class"), [normal(4, 5)]),
    "fuse": (frozen(), [IMAGES]),
}


@pytest.mark.parametrize("name", CASES)
def test_tangents_are_those_of_differences(name):
    function, given = CASES[name]
    tangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double() for x in given]
    step = 1e-6
    ahead = function(*(x + step * t for x, t in zip(given, tangents, strict=True)))
    behind = function(*(x - step * t for x, t in zip(given, tangents, strict=True)))
    wanted = (ahead - behind) / (2 * step)
    assert wanted.abs().max() > 0.01
    _, found = torch.func.jvp(function, tuple(given), tuple(tangents))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(given, tangents, strict=True)]
        found = forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-6)
