from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import ddfast
from ddfast.errors import UsageError
from ddfast.methods.synthesis import CURVE
from ddfast.output import export_webdataset, pixels
from ddfast.output.mosaic import mosaic_labels, read_mosaic, write_mosaic
from ddfast.output.pixels import (
    read_curve,
    read_pixels,
    to_bytes,
    to_unit,
    write_before,
    write_curve,
    write_pixels,
)
from tests.output.made import MEAN, STD, smooth_pixels, write_made

NAMES = ["cat", "dög & fox", "日本"]
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


# Pixels


@pytest.mark.parametrize(("space", "factor", "rate"), [("normalized", 1, None), ("unit", 2, 0.0123)])
def test_pixels_come_back_bit_by_bit(tmp_path: Path, space: str, factor: int, rate: float | None) -> None:
    images = smooth_pixels(LABELS, 8)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 1e-42, -0.0  # denormal, negative zero
    write_pixels(tmp_path, images, LABELS, space=space, factor=factor, learned_rate=rate)
    found = read_pixels(tmp_path)
    assert found.images.numpy().tobytes() == images.numpy().tobytes()
    assert found.labels.dtype == torch.int64
    assert found.labels.equal(LABELS)
    assert (found.space, found.factor, found.learned_rate) == (space, factor, rate)


def test_others_open_the_file(tmp_path: Path) -> None:
    images = smooth_pixels(LABELS, 8)
    write_pixels(tmp_path, images, LABELS, space="unit", factor=2)
    assert load_file(tmp_path / "pixels.safetensors")["images"].equal(images)
    with safe_open(tmp_path / "pixels.safetensors", framework="pt") as file:
        assert file.metadata() == {"space": "unit", "factor": "2", "learned_rate": "null"}


def test_equal_pixels_give_equal_bytes_and_are_left_alone(tmp_path: Path) -> None:
    images = smooth_pixels(LABELS, 8)
    strided = images.clone(memory_format=torch.channels_last).requires_grad_()
    written = set()
    for given in (images, strided, images.repeat(1, 1, 1, 2)[..., :8]):
        write_pixels(tmp_path, given, LABELS.repeat_interleave(2)[::2], space="normalized")
        written.add((tmp_path / "pixels.safetensors").read_bytes())
    assert len(written) == 1
    assert strided.requires_grad
    assert not list(tmp_path.glob(".*"))


GOOD = {"images": smooth_pixels(LABELS, 8), "labels": LABELS}
FACTS = {"space": "normalized", "factor": "1", "learned_rate": "null"}


@pytest.mark.parametrize(
    ("tensors", "facts", "said"),
    [
        ({"images": GOOD["images"].double()}, {}, r"float32 \[N, 3, H, W\], got float64"),
        ({"images": GOOD["images"].half()}, {}, "got float16"),
        ({"images": GOOD["images"][:, :1].contiguous()}, {}, r"got float32 \[6, 1, 8, 8\]"),
        ({"images": GOOD["images"][:0]}, {}, r"got float32 \[0, 3, 8, 8\]"),
        ({"images": GOOD["images"][0].clone()}, {}, r"got float32 \[3, 8, 8\]"),
        ({"labels": LABELS.int()}, {}, r"labels must be int64 \[6\], got int32"),
        ({"labels": LABELS[:5].clone()}, {}, r"labels must be int64 \[6\], got int64 \[5\]"),
        ({"labels": LABELS - 1}, {}, "labels must be 0 or more, got -1"),
        ({"images": GOOD["images"].clone().fill_(float("nan"))}, {}, "NaN or infinity in 1152 of 1152"),
        ({"images": GOOD["images"] * float("inf")}, {}, "NaN or infinity"),
        ({}, {"space": "linear"}, "space must be one of normalized, unit, got 'linear'"),
        ({}, {"factor": "9"}, "factor must be a whole number from 1 to 8, got 9"),
        ({}, {"factor": "true"}, "got True"),
        ({}, {"factor": "0"}, "got 0"),
        ({}, {"learned_rate": '"fast"'}, "learned_rate must be a finite number, got fast"),
        ({}, {"learned_rate": "NaN"}, "learned_rate must be a finite number, got nan"),
        ({}, {"factor": "{"}, "is damaged"),
        ({}, {"space": None}, "is damaged"),
        ({"images": None}, {}, "is damaged"),
    ],
)
def test_what_no_method_writes_is_refused_in_one_line(tmp_path: Path, tensors, facts, said) -> None:
    kept = {name: tensor for name, tensor in {**GOOD, **tensors}.items() if tensor is not None}
    known = {name: text for name, text in {**FACTS, **facts}.items() if text is not None}
    save_file(kept, tmp_path / "pixels.safetensors", known)
    with pytest.raises(UsageError, match=said) as found:
        read_pixels(tmp_path)
    assert "\n" not in str(found.value)
    assert "--resume" in str(found.value)


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    write_pixels(tmp_path, GOOD["images"], LABELS, space="normalized")
    before = (tmp_path / "pixels.safetensors").read_bytes()
    for changes in (
        {"images": GOOD["images"].double()},
        {"images": GOOD["images"] / 0},
        {"labels": LABELS[:3]},
        {"space": "rgb"},
        {"factor": 9},
        {"learned_rate": float("nan")},
    ):
        given = {"images": GOOD["images"], "labels": LABELS, "space": "normalized", **changes}
        with pytest.raises(UsageError, match="cannot write"):
            write_pixels(tmp_path, given.pop("images"), given.pop("labels"), **given)
    assert (tmp_path / "pixels.safetensors").read_bytes() == before


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pixels.safetensors"
    with pytest.raises(UsageError, match=r"has no pixels\.safetensors"):
        read_pixels(tmp_path)
    write_pixels(tmp_path, GOOD["images"], LABELS, space="normalized")
    whole = path.read_bytes()
    for bad in (
        b"",
        whole[:7],
        whole[:60],
        whole[:-1],
        whole[: len(whole) // 2],
        b"\xff" * 64,
        b"PK\x03\x04",
    ):
        path.write_bytes(bad)
        with pytest.raises(UsageError, match="is damaged") as found:
            read_pixels(tmp_path)
        assert "\n" not in str(found.value)


def test_eight_bits_are_rounded_to_nearest_and_clamped() -> None:
    levels = torch.tensor([-40.0, 0.0, 0.4, 0.6, 100.0, 127.2, 254.6, 255.0, 300.0])
    unit = (levels / 255).repeat(2, 3, 3, 1)
    wanted = torch.tensor([0, 0, 0, 1, 100, 127, 255, 255, 255], dtype=torch.uint8).repeat(2, 3, 3, 1)
    assert to_bytes(unit, MEAN, STD, "unit").equal(wanted)
    normalized = (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    kept = normalized.clone()
    assert to_bytes(normalized, MEAN, STD, "normalized").equal(wanted)
    assert torch.allclose(to_unit(normalized, MEAN, STD, "normalized"), unit, atol=1e-6)
    assert normalized.equal(kept)
    assert to_unit(unit, MEAN, STD, "unit").equal(unit)
    assert to_unit(unit, MEAN, STD, "unit").data_ptr() != unit.data_ptr()
    with pytest.raises(UsageError, match="space must be one of"):
        to_bytes(unit, MEAN, STD, "linear")


def test_every_grey_level_survives_the_way_through_the_normalised_space() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for mean, std in ((MEAN, STD), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        given = (levels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert to_bytes(given, mean, std, "normalized").equal(levels)


# Curve


def test_a_curve_comes_back_sorted_and_without_what_was_not_measured(tmp_path: Path) -> None:
    rows = [
        {"group": 1, "step": 2, "loss": 0.5},
        {"group": 0, "step": 10, "loss": 1.5, "cmi": None, "accuracy": float("nan")},
        {"group": 0.0, "step": 2.0, "loss": 0.1 + 0.2, "cmi": 1e-17, "gradient_norm": float("inf")},
    ]
    kept = [dict(row) for row in rows]
    write_curve(tmp_path, rows)
    assert read_curve(tmp_path) == [
        {"group": 0, "step": 2, "loss": 0.1 + 0.2, "cmi": 1e-17},
        {"group": 0, "step": 10, "loss": 1.5},
        {"group": 1, "step": 2, "loss": 0.5},
    ]
    first = (tmp_path / "curve.parquet").read_bytes()
    write_curve(tmp_path, reversed(rows))
    assert (tmp_path / "curve.parquet").read_bytes() == first
    assert str(rows) == str(kept)


def test_the_columns_of_a_curve(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_curve(tmp_path, [])
    schema = pq.read_schema(tmp_path / "curve.parquet")
    assert schema.names == ["group", "step", *CURVE]
    assert schema.types == [pa.int32(), pa.int64(), *[pa.float64()] * len(CURVE)]
    assert read_curve(tmp_path) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"group": 0, "loss": 1.0}, "needs a step"),
        ({"step": 0}, "needs a group"),
        ({"group": 0, "step": 1.5}, "needs a step that counts from 0, got 1.5"),
        ({"group": -1, "step": 1}, "needs a group"),
        ({"group": 0, "step": float("nan")}, "needs a step"),
        ({"group": 0, "step": 3, "los": 1.0}, "got 'los'"),
        ({"group": 0, "step": 7, "loss": 2.0}, "step 7 of group 0 twice"),
    ],
)
def test_a_row_that_is_none_is_refused(tmp_path: Path, row, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_curve(tmp_path, [{"group": 0, "step": 7}, row])
    assert not (tmp_path / "curve.parquet").exists()


def test_a_damaged_curve_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no curve\.parquet"):
        read_curve(tmp_path)
    write_curve(tmp_path, [{"group": 0, "step": 0, "loss": 1.0}])
    path = tmp_path / "curve.parquet"
    whole = path.read_bytes()
    for bad in (b"", whole[:-3], whole[: len(whole) // 2], b"PAR1" + bytes(50)):
        path.write_bytes(bad)
        with pytest.raises(UsageError, match="is damaged") as found:
            read_curve(tmp_path)
        assert "\n" not in str(found.value)


def test_a_curve_with_other_columns_is_read_and_a_table_of_another_kind_is_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = {"group": pa.array([0], pa.int32()), "step": pa.array([4], pa.int64())}
    pq.write_table(pa.table({**keys, "policy": pa.array([0.25])}), tmp_path / "curve.parquet")
    assert read_curve(tmp_path) == [{"group": 0, "step": 4, "policy": 0.25}]
    pq.write_table(pa.table({"label": [1], "image": [2]}), tmp_path / "curve.parquet")
    with pytest.raises(UsageError, match="is no curve: it has the columns label, image"):
        read_curve(tmp_path)


# Pictures of before and after


@pytest.mark.parametrize(("size", "side"), [(28, 28), (32, 32), (64, 64), (128, 96)])
def test_a_mosaic_gives_its_images_back(tmp_path: Path, size: int, side: int) -> None:
    draws = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (6, 3, size, size), generator=draws, dtype=torch.uint8)
    path = write_before(tmp_path, images, LABELS, NAMES)
    first = path.read_bytes()
    found = read_mosaic(path)
    assert list(found) == [0, 1, 2]
    assert {image.shape for row in found.values() for image in row} == {(3, side, side)}
    if size == side:
        together = np.concatenate([np.stack(row) for row in found.values()])
        assert np.array_equal(together, images.numpy())
    assert write_before(tmp_path, images, LABELS.tolist(), NAMES).read_bytes() == first


def test_a_mosaic_of_many_classes_shows_the_named_ones(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(300)]
    shown = mosaic_labels(300)
    assert len(shown) == 20
    assert shown[:3] == [0, 8, 15]
    everything = torch.arange(300).repeat_interleave(2)
    images = (everything % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    write_mosaic(tmp_path / "all.png", images, everything, names)
    some = [place for place, label in enumerate(everything.tolist()) if label in shown]
    write_mosaic(tmp_path / "some.png", images[some], everything[some], names)
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "some.png").read_bytes()
    assert {label: int(row[0][0, 0, 0]) for label, row in read_mosaic(tmp_path / "all.png").items()} == {
        label: label % 256 for label in shown
    }


def test_a_picture_of_something_else_gives_nothing(tmp_path: Path) -> None:
    from PIL import Image

    assert read_mosaic(tmp_path / "gone.png") == {}
    Image.new("RGB", (20, 20)).save(tmp_path / "other.png")
    assert read_mosaic(tmp_path / "other.png") == {}
    (tmp_path / "text.png").write_text("no picture")
    assert read_mosaic(tmp_path / "text.png") == {}


# The folder


def test_a_folder_of_pixels_opens(tmp_path: Path) -> None:
    stored = write_made(tmp_path, NAMES)
    opened = ddfast.DistilledSet(tmp_path)
    assert opened.pixels is not None
    assert opened.pixels.images.equal(stored)
    assert (opened.soft_labels, opened.stored, opened.temperature, opened.factor) == (None, None, None, 1)
    image, label, soft = opened[3]
    assert image.equal(to_bytes(stored, MEAN, STD, "normalized")[3])
    assert label == 1
    assert soft.tolist() == [0.0, 1.0, 0.0]
    assert soft.dtype == torch.float32
    assert opened[-1][1] == 2
    images, labels, softs = next(iter(DataLoader(opened, batch_size=6)))
    assert (images.shape, labels.tolist(), softs.shape) == ((6, 3, 16, 16), LABELS.tolist(), (6, 3))


def test_hard_labels_need_no_pixels(tmp_path: Path) -> None:
    write_made(tmp_path, NAMES, options={"select": {}})
    (tmp_path / "pixels.safetensors").unlink()
    opened = ddfast.DistilledSet(tmp_path)
    assert opened.pixels is None
    assert opened.soft_labels is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "pixels.safetensors").unlink(), r"has no pixels\.safetensors: finish it"),
        (
            lambda root: write_pixels(root, GOOD["images"], LABELS, space="unit"),
            "holds 8x8, manifest.json says 16",
        ),
        (
            lambda root: write_pixels(root, smooth_pixels(LABELS, 16), LABELS.flip(0), space="unit"),
            "other labels than",
        ),
        (
            lambda root: write_pixels(root, smooth_pixels(LABELS[:4], 16), LABELS[:4], space="unit"),
            r"pixels\.safetensors has 4",
        ),
        (lambda root: (root / "pixels.safetensors").write_bytes(b"x"), "is damaged"),
    ],
)
def test_pixels_that_do_not_fit_their_folder_are_refused(tmp_path: Path, damage, said: str) -> None:
    write_made(tmp_path, NAMES)
    damage(tmp_path)
    with pytest.raises(UsageError, match=said):
        ddfast.DistilledSet(tmp_path)


def test_a_labelled_set_still_needs_its_labels(tmp_path: Path) -> None:
    write_made(tmp_path, NAMES)
    facts = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    for teacher in ({"arch": "convnet3"}, "gone"):
        facts["label_teacher"] = teacher
        if teacher == "gone":
            del facts["label_teacher"]
        (tmp_path / "manifest.json").write_text(json.dumps(facts), "utf-8")
        with pytest.raises(UsageError, match=r"has no soft_labels\.safetensors"):
            ddfast.DistilledSet(tmp_path)


def test_shards_carry_the_pixels(tmp_path: Path) -> None:
    stored = write_made(tmp_path / "set", NAMES, space="unit", factor=2)
    (path,) = export_webdataset(tmp_path / "set", tmp_path / "all.tar")
    with tarfile.open(path) as shard:
        files = {info.name: shard.extractfile(info).read() for info in shard}
    assert len(files) == 6 * 4
    for index in range(6):
        key = f"{index:08d}"
        found = np.load(io.BytesIO(files[f"{key}.pixels.npy"]), allow_pickle=False)
        assert np.array_equal(found, stored[index].numpy())
        record = json.loads(files[f"{key}.json"])
        assert (record["space"], record["factor"], record["learned_rate"]) == ("unit", 2, None)
        assert (record["temperature"], record["tiles"], record["mean"]) == (None, [], MEAN)


def test_the_names_of_the_room_are_exported() -> None:
    assert ddfast.output.write_pixels is pixels.write_pixels
    assert ddfast.output.CURVE is CURVE
    assert {field.name for field in dataclasses.fields(ddfast.output.Pixels)} >= {"images", "labels", "space"}
