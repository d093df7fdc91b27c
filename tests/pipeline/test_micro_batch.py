"""The micro-batch of the score pass: black where there is no image, and put together where the images are."""

from types import SimpleNamespace

import pytest
import torch

from ddfast.data.samples import Sample
from ddfast.errors import BadImage, UsageError
from ddfast.methods.selection.base import Candidates
from ddfast.ops import transfer
from ddfast.pipeline.score import _micro_batch, _Shard


def pairs(device="cpu"):
    images = [torch.full((3, 4, 4), n, dtype=torch.uint8, device=device) for n in (1, 2)]
    samples = [Sample(10 + n, f"{n}.jpg", n) for n in range(3)]
    return list(zip(samples, [BadImage("truncated"), *images], strict=True))


def run_on(device):
    return SimpleNamespace(plan={"image_size": 4}, device=torch.device(device))


def test_black_images_stand_where_a_file_is_bad_and_behind_the_last():
    batch = _micro_batch(run_on("cpu"), pairs(), 5)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.images.shape == (5, 3, 4, 4)
    assert batch.images.flatten(1).unique(dim=1).flatten().tolist() == [0, 1, 2, 0, 0]
    assert batch.labels.tolist() == [0, 1, 2, 0, 0]
    assert batch.ids.tolist() == [0, 11, 12, 0, 0]


def test_images_on_the_device_do_not_come_to_the_host():
    # "meta" stands for a GPU: nothing can be copied out of it.
    batch = _micro_batch(run_on("meta"), pairs("meta"), 5)
    assert (batch.images.device.type, batch.images.shape) == ("meta", (5, 3, 4, 4))
    assert batch.labels.device.type == batch.ids.device.type == "cpu"


def test_images_on_the_host_go_to_the_device_together(monkeypatch):
    monkeypatch.setattr(transfer, "pinned", lambda tensor: tensor)  # there is no driver to pin memory
    assert _micro_batch(run_on("meta"), pairs(), 5).images.device.type == "meta"


def test_a_teacher_that_returned_nan_is_refused_when_its_rows_arrive(tmp_path):
    shard = _Shard(SimpleNamespace(out=tmp_path), 0, 3, "digest")
    damaged = Candidates(torch.zeros(5, 1, 4, dtype=torch.int32), damaged=torch.tensor(2))
    with pytest.raises(UsageError, match="returns NaN or infinity for real images"):
        shard.add(pairs(), damaged)
    assert not list(tmp_path.iterdir())
