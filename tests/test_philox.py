import hashlib

import pytest
import torch

from ddfast.ops import normal_quantiles
from ddfast.philox import as_signed_64_bit, philox4x32

ALL_ONES = 0xFFFFFFFF


# Random123's kat_vectors, the rows "philox4x32 10": counter, key, result.
@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (ALL_ONES, ALL_ONES, ALL_ONES, ALL_ONES),
            0xFFFFFFFF_FFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, seed, expected):
    assert philox4x32(torch.tensor(counter), seed).tolist() == list(expected)


def philox_in_python_integers(counter, seed):
    """The round function of the paper in unbounded integers, to hold against the split multiplications."""
    c, key = list(counter), [seed & ALL_ONES, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & ALL_ONES, first >> 32 ^ c[3] ^ key[1], first & ALL_ONES]
        key = [key[0] + 0x9E3779B9 & ALL_ONES, key[1] + 0xBB67AE85 & ALL_ONES]
    return c


def test_agrees_with_unbounded_integers_over_leading_dimensions():
    counters = torch.randint(0, 2**32, (3, 50, 4), generator=torch.Generator().manual_seed(0))
    seed = 0xFEDCBA98_76543210
    words = philox4x32(counters, seed)
    expected = [philox_in_python_integers(counter, seed) for counter in counters.flatten(0, 1).tolist()]
    assert words.flatten(0, 1).tolist() == expected
    assert philox4x32(counters[:0], seed).shape == (0, 50, 4)


def test_a_negative_seed_is_its_unsigned_twin():
    counters = torch.arange(8).view(2, 4)
    assert torch.equal(philox4x32(counters, -5), philox4x32(counters, 2**64 - 5))
    assert as_signed_64_bit(2**64 - 5) == -5
    assert as_signed_64_bit(2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize(
    ("counters", "seed", "error", "message"),
    [
        (torch.zeros(2, 4), 0, TypeError, "counters must be int64, got torch.float32"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            0,
            ValueError,
            r"counters must be \[\.\.\., 4\], got \(2, 3\)",
        ),
        (torch.zeros(2, 4, dtype=torch.int64), 2**64, ValueError, "seed must fit in 64 bits"),
        (torch.zeros(2, 4, dtype=torch.int64), -(2**63) - 1, ValueError, "seed must fit in 64 bits"),
    ],
)
def test_errors(counters, seed, error, message):
    with pytest.raises(error, match=message):
        philox4x32(counters, seed)


def test_quantiles_are_pinned():
    digest = hashlib.sha256(normal_quantiles().numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "2c16799c940f1cbb31cfb5523ec21977d44f7952731810333415078db4e9f241"


def test_quantiles_are_those_of_the_standard_normal():
    quantiles = normal_quantiles().double()
    exact = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    assert (quantiles - exact).abs().max() <= 2.0**-17
    assert torch.equal(quantiles, -quantiles.flip(0))
    assert torch.equal(quantiles * 65536, (quantiles * 65536).round())
    # No midpoint is so near a rounding boundary that another libm could fall on its other side.
    assert ((exact * 65536) % 1 - 0.5).abs().min() > 1e-6


def test_the_quantiles_are_a_copy():
    normal_quantiles().zero_()
    assert normal_quantiles()[-1] > 3.6
