import pytest
import torch

from ddfast.errors import UsageError
from ddfast.output.distilled import SOFT_LABELS, read_soft_labels, write_soft_labels
from ddfast.output.label_parts import is_whole_part, join_label_parts, largest_probabilities, write_label_part


def probabilities(images: int, tiles: int = 4, classes: int = 7) -> torch.Tensor:
    logits = torch.randn(images, tiles, classes, generator=torch.Generator().manual_seed(0))
    return logits.mul(2).round().softmax(dim=2)  # with ties


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 9])
def test_parts_join_to_the_bytes_of_the_whole(top_k, tmp_path):
    labels = probabilities(11)
    (tmp_path / "whole").mkdir()
    write_soft_labels(tmp_path / "whole", labels, 20.0, top_k)
    parts = []
    for index, part in enumerate(labels.split(4)):
        parts.append(tmp_path / f"part-{index}")
        write_label_part(parts[-1], *largest_probabilities(part, top_k))
    indexed = top_k is not None and top_k < 7
    join_label_parts(tmp_path, parts, (11, 4, top_k if indexed else 7), 20.0, indexed=indexed)
    assert (tmp_path / SOFT_LABELS).read_bytes() == (tmp_path / "whole" / SOFT_LABELS).read_bytes()
    assert len(read_soft_labels(tmp_path, 7).values) == 11


def test_a_damaged_part_is_noticed(tmp_path):
    path = tmp_path / "part"
    assert not is_whole_part(path)
    write_label_part(path, *largest_probabilities(probabilities(2), 3))
    whole = path.read_bytes()
    assert is_whole_part(path)
    for damaged in (whole[:-1], whole[1:], b"", whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]):
        path.write_bytes(damaged)
        assert not is_whole_part(path)


def test_parts_that_do_not_hold_all_images_are_refused(tmp_path):
    write_label_part(tmp_path / "part", *largest_probabilities(probabilities(2), None))
    with pytest.raises(UsageError, match="do not hold 3 images"):
        join_label_parts(tmp_path, [tmp_path / "part"], (3, 4, 7), 20.0, indexed=False)
    assert not (tmp_path / SOFT_LABELS).exists()


def test_labels_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        largest_probabilities(torch.tensor([[[float("nan"), 1.0]]]), None)
