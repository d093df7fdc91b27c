"""Designs that were searched for long, for the grids and budgets that are used most.

`python -m bench game_prior` prints them: the least expected error of up to 25 starts of `design_search`. A coalition is
the four hexadecimal digits of its number, whose bit i says whether player i is there; the empty and the full one come
first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddfast.attribution.estimators.game_prior import Grid

_DIGITS = 4

_DESIGNS: dict[Grid, dict[int, str]] = {
    (4, 4): {
        17: "0000fffff9eef59e052213fc623b18373b002cddcad2f647ceadef745d4bae7af4f0",
        24: "0000ffffbf91dbde7d7af73e1420fe44e8ad24de1817327001bc028bbfeee7e8ef77f5f60043509b576d7fe6cefecd8f",
        32: (
            "0000ffffffdffdfffbffcffd08108004118002004004fffaf7ef7ffa30028009f7ffff6feefb00907ffd00200004ee7e"
            "0800bffa0400004080026ef6ffbfdef6"
        ),
        48: (
            "0000ffff8008fd99fbff08103717734005c4fff68004ce8e39f9fffd0009ffe77ff7dffb7ffb9cbf1b9c8fb1ff6f0002"
            "e463f7ef705f0266fca00018002010020090fef780100040ffbfeffd4004fa3b7fef2004ffdf04000108bffbfdff0200"
        ),
        64: (
            "0000fffffbfffdffffdfffbfd37104000020004002003737bffb7fef7ffffffbfff6ff7ff6fffffefffd100209000009"
            "00048000200080100080c8d8effd000208004004dfff731001fffe080001f7ff34b8e58b4a2dcc32b3cd1a74b55a5697"
            "a9602c8e35d2785ff1a60e5959a187a0556caa929cef9d1d62e21babe4454b46"
        ),
        96: (
            "0000ffffdc46fbffffbf0020ffec4a45753dfeffaa25f62efdff0040bfffc8d3fffe9d8ed1a9fff7e29683a220001bd8"
            "3b0a467b08008000100000017fef7231b99501007fecf7ef0080efff345cff6f00109a62506c2874ffdfcf900002fffd"
            "b49171c6dfff76cdc93613570fce8ab93ca223fe5f04000819f3c5a7c31df7f0080fa53ce173b95a16a5a2489e52ec09"
            "9603e7412d43b0af0004fffb69a995662e9d5abcee2005d91c3bd3cb0200d95926aaecff40004c69373781c50400559a"
        ),
        128: (
            "0000ffff6204ffbfffdfb91ea86ce53f8dbb19d10020dffffffd6445792cfeff9e2ec8ceeffffb52f7c832c7f7ff0002"
            "12bd01002000000408000080a61d10008000ffef614e4e4bfffb4000bfffff7f0200fdff1b4da318fff7fffe3e812559"
            "73a80c5fd169f02693648a8c94485897d386e9a19a116c32147c6ad97858573349f40629fdc3fca8b05383dab2a33656"
            "0a37759066edc566c113ac0b000100107fffc7a4d4f125ee4b2a3ca53131ca3d9534fff0020f55da95872aea87412b8b"
            "a672d8ba0040e089d60a28b644af9877179b000823794d8c42f3b49e709d81af1d600400dd098ed4b1c55a614f1570e3"
            "0ff63e38ad54fbffee92e0f82f06525c"
        ),
    },
}


# Coalitions in the order of `settled_shapley`: the design of its first round, then what each round adds to it.
_ROUNDS: dict[Grid, str] = {
    (4, 4): (
        "0000ffffffdffdfffbffcffd08108004118002004004fffaf7ef7ffa30028009f7ffff6feefb00907ffd00200004ee7e"
        "0800bffa0400004080026ef6ffbfdef680012100037ffc9c663199cedec96bab9cab7fec8f90706f26061454e542d971"
        "a1b5058d7ef72c69d39641588d27ba5365d252e16b45e00144a41fff5c1b9a2d798072dc38f371330100b7c0867bd4b0"
        "a3833a66b59637992004552d3d2910046ff7c1ea190f5b4ab37880d93336df732c3c0abcc83eccc706a2a95dd0574e15"
        "4f0c8ac024bfdffa2f5ef2a815e0fa12464fa92a58a54a7897248474ca8e09fe84882b09bc4cd3519062e9e5a21d31cb"
        "2c93c501f60b7574129a685a9914df72"
    ),
}


def kept_rounds(grid: Grid) -> Tensor | None:
    """The coalitions of all rounds that are kept for a grid, bool [K, d], or None."""
    return _coalitions(_ROUNDS[grid], grid) if grid in _ROUNDS else None


def kept_design(grid: Grid | None, n_samples: int) -> Tensor | None:
    """The coalitions that are kept for a grid and a budget, bool [n_samples, d], or None."""
    digits = _DESIGNS.get(grid, {}).get(n_samples) if grid is not None else None
    return None if digits is None or grid is None else _coalitions(digits, grid)


def _coalitions(digits: str, grid: Grid) -> Tensor:
    number = torch.tensor([int(digits[i : i + _DIGITS], 16) for i in range(0, len(digits), _DIGITS)])
    return number[:, None] >> torch.arange(grid[0] * grid[1]) & 1 == 1
