"""RDED's two rankings on a table small enough to sort by eye."""

import numpy as np
import pytest

from ddfast.methods import get_method
from ddfast.methods.selection.base import Table

TABLE = Table(
    {
        "sample_id": np.array([1, 1, 2, 2]),
        "label": np.zeros(4, dtype=np.int64),
        "crop": np.array([0, 1, 0, 1]),
        "score": np.full(4, np.nan),
        "grad_norm": np.array([1.0, 3.0, 2.0, 9.0]),
        "loss": np.array([2.0, 1.0, 0.5, 4.0]),
        "correct": np.ones(4, dtype=bool),
    }
)


@pytest.mark.parametrize(("rank_by", "expected"), [("loss", [2, 1]), ("grad_norm", [3, 1])])
def test_best_crop_of_each_image_then_best_images(rank_by, expected):
    method = get_method("rded").from_options({"rank_by": rank_by})
    ranked, score = method.rank(TABLE, 2)
    assert ranked[0].tolist() == expected
    assert score[ranked[0]].tolist() == sorted(score[ranked[0]], reverse=True)
