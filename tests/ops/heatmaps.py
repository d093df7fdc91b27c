"""Heatmaps that a kernel of noisy_crop_boxes could get wrong, shared by the tests of the op and of the
kernel."""

import torch


def awkward_heatmaps(count: int, players: int, seed: int = 0) -> torch.Tensor:
    """[count, players] float32: plain noise, ties, constants, zeros, NaN, infinities, subnormals, huge
    values."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(count, players, generator=generator)
    scattered = torch.rand(count, players, generator=generator) < 0.1
    kind = torch.arange(count) % 10
    phi[kind == 1] = phi[kind == 1].round()  # ties
    phi[kind == 2] = 0.75
    phi[kind == 3] = 0.0
    phi[(kind == 4)[:, None] & scattered] = torch.nan
    phi[(kind == 5)[:, None] & scattered] = torch.inf
    phi[(kind == 6)[:, None] & scattered] = -torch.inf
    phi[kind == 7] *= 1e-20  # the variance is subnormal
    phi[kind == 8] *= 1e20  # the variance overflows
    return phi


def awkward_ids(count: int, seed: int = 0) -> torch.Tensor:
    """[count] int64 over the whole range, both ends included."""
    ids = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))
    ids[:4] = torch.tensor([0, -1, -(2**63), 2**63 - 1])[: len(ids)]
    return ids
