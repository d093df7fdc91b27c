import re

import pytest
import torch

from ddfast.ops import normal_quantiles, reference
from tests.kernels.harness import WHERE, compile_ahead, run
from tests.ops.heatmaps import awkward_heatmaps, awkward_ids

LAUNCHER = "noisy_crop_boxes.noisy_crop_boxes"

# seed, rows, cols, pool, crops, clean_last, alpha, image height and width, crop height and width
GEOMETRIES = [
    (2**40 + 3, 4, 4, 2, 2, True, 2.0, 32, 32, 16, 16),
    (-1, 3, 5, 1, 5, False, 0.1, 31, 17, 31, 1),
    (1, 5, 3, 3, 1, True, 2.0, 50, 40, 20, 30),
    (0, 1, 1, 1, 3, False, 2.0, 5, 6, 4, 6),
    (16, 4, 4, 4, 2, False, 1 / 3, 65, 63, 33, 32),
]


def case(geometry, count):
    _, rows, cols, *_ = geometry
    return awkward_heatmaps(count, rows * cols), awkward_ids(count), normal_quantiles(), *geometry


def strided_and_empty():
    phi, ids, quantiles, *geometry = case(GEOMETRIES[0], 20)
    return [
        (phi.mT.contiguous().mT[::2], ids[::2], quantiles, *geometry),
        (phi[:0], ids[:0], quantiles, *geometry),
        (phi, ids, quantiles, *geometry[:4], 0, *geometry[5:]),  # no crops
    ]


@pytest.mark.parametrize("where", WHERE)
def test_has_the_bits_of_the_reference(where):
    cases = [case(geometry, 2000 if index == 0 else 100) for index, geometry in enumerate(GEOMETRIES)]
    cases += strided_and_empty()
    for arguments, boxes in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        assert torch.equal(boxes, reference.noisy_crop_boxes(*arguments))


def test_compiles_for_every_gpu_to_ieee_arithmetic():
    binaries = compile_ahead(LAUNCHER, [case(geometry, 64) for geometry in GEOMETRIES[:2]])
    for binary in binaries:
        assert binary.spilled_bytes == 0
        assert binary.store_bytes == [16]
        arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt)\.\S*f32", binary.ptx))
        # Rounded to nearest and neither fused, nor approximate, nor flushing subnormals to zero.
        assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
