from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

import ddfast
from ddfast.data.decoding import encode_image
from ddfast.errors import UsageError
from ddfast.output.distilled import (
    DistilledSet,
    Tile,
    class_folder,
    image_path,
    metadata_row,
    read_soft_labels,
    write_image,
    write_metadata,
    write_soft_labels,
)
from tests.data.rendering import smooth

CLASSES = ["cat", "dög & fox", "日本 犬"]
IPC, TILES, SIZE = 2, 4, 16


def pixels(label: int, index: int) -> torch.Tensor:
    return torch.from_numpy(smooth(SIZE, SIZE, seed=10 * label + index)).permute(2, 0, 1)


def probabilities(count: int = len(CLASSES) * IPC, classes: int = len(CLASSES)) -> torch.Tensor:
    logits = torch.randn(
        count, TILES, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return (logits / 2).softmax(dim=2)


def write_set(
    root: Path, format: str = "png", top_k: int | None = None, classes: list[str] = CLASSES
) -> Path:
    """A complete output folder, with everything beside the set that the pipeline leaves there."""
    rows = []
    for label, name in enumerate(classes):
        for index in range(IPC):
            write_image(root / image_path(label, name, index, format), pixels(label, index))
            tiles = [Tile(f"{name}/{n}.jpg", (n, 0, n + 8, 8), None if n else 0.5) for n in range(TILES)]
            rows.append(metadata_row(label, name, index, tiles, format))
    write_metadata(root, rows)
    write_soft_labels(root, probabilities(len(rows), len(classes)), temperature=20.0, top_k=top_k)
    (root / "mosaic.png").write_bytes(encode_image(pixels(0, 0)))
    (root / "report.html").write_text("<html></html>")
    (root / "scores").mkdir()
    (root / "scores" / "part-00000.parquet").write_bytes(b"")
    manifest = {
        "format_version": 1,
        "complete": True,
        "method": "infoutil",
        "class_names": classes,
        "image_size": SIZE,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "ipc": IPC,
        "factor": 2,
        "tiles": TILES,
        "counts": {"images": len(rows), "sources": 600, "quarantined": 0},
        "quarantined": {"count": 0, "files": []},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_set(tmp_path / "out")


# Names


def test_paths_are_those_of_the_format() -> None:
    assert image_path(0, "cat", 0) == "train/00000_cat/000000.png"
    assert image_path(12, "cat", 34, "jpeg") == "train/00012_cat/000034.jpg"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("tench, Tinca tinca", "00003_tench__Tinca_tinca"),
        ("T-shirt/top", "00003_T-shirt_top"),
        (".hidden", "00003_.hidden"),
        ("..", "00003_"),
        ("a\\b:c*d?", "00003_a_b_c_d_"),
        ("[train]", "00003__train_"),
        ("größe", "00003_größe"),
        ("gro\u0308ße", "00003_größe"),
        ("หมา", "00003_หมา"),
        ("", "00003_"),
        ("new\nline\0", "00003_new_line_"),
        ("ends.", "00003_ends"),
    ],
)
def test_class_folders_are_safe_and_readable(name: str, folder: str) -> None:
    assert class_folder(3, name) == folder


@given(st.integers(0, 99_999), st.text(max_size=400))
def test_any_class_name_gives_a_usable_folder(label: int, name: str) -> None:
    folder = class_folder(label, name)
    assert folder.startswith(f"{label:05d}_")
    assert len(folder.encode("utf-8")) <= 206
    assert not set(folder) & set('/\\:*?"<>|[]{} \0\n')
    assert not folder.endswith(".")
    assert unicodedata.is_normalized("NFC", folder)


def test_odd_and_very_long_class_names_work_on_disk(tmp_path: Path) -> None:
    names = ["a" * 300, "a" * 299 + "b", "犬" * 120, "..", " ", "x/y"]
    opened = DistilledSet(write_set(tmp_path / "out", classes=names))
    assert opened.class_names == names
    folders = sorted(entry.name for entry in (tmp_path / "out" / "train").iterdir() if entry.is_dir())
    assert [int(folder[:5]) for folder in folders] == list(range(6))
    for index in range(len(opened)):
        assert torch.equal(opened[index][0], pixels(index // IPC, index % IPC))


# Images


def test_png_is_exact_and_repeatable() -> None:
    first = encode_image(pixels(0, 0))
    assert first == encode_image(pixels(0, 0).clone(memory_format=torch.contiguous_format))
    assert first.startswith(b"\x89PNG")
    with Image.open(io.BytesIO(first)) as picture:
        assert np.array_equal(np.asarray(picture), pixels(0, 0).permute(1, 2, 0).numpy())


def test_jpeg_keeps_full_colour_unless_told_otherwise() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8))
    full = encode_image(noise, "jpeg")
    literal = encode_image(noise, "jpeg", quality=75, subsampling="4:2:0")
    assert full == encode_image(noise, "jpeg")
    with Image.open(io.BytesIO(full)) as picture:
        assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3
        assert abs(np.asarray(picture).astype(int) - noise.permute(1, 2, 0).numpy()).mean() < 5
    with Image.open(io.BytesIO(literal)) as picture:
        assert picture.layer[0][1:3] == (2, 2)
    assert len(literal) < len(full)


def test_images_that_cannot_be_encoded_are_refused() -> None:
    for image in (
        torch.zeros(3, 4, 4),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="image must be uint8"):
            encode_image(image)
    with pytest.raises(ValueError, match="format must be one of"):
        encode_image(pixels(0, 0), "gif")
    with pytest.raises(ValueError, match="subsampling one of"):
        encode_image(pixels(0, 0), "jpeg", subsampling="4:1:1")


# Metadata


def test_metadata_rows(root: Path) -> None:
    lines = (root / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 6
    assert json.loads(lines[3]) == {
        "file_name": "00001_dög_&_fox/000001.png".replace("&", "_"),
        "label": 1,
        "label_name": "dög & fox",
        "tiles": [
            {"source": f"dög & fox/{n}.jpg", "box": [n, 0.0, n + 8, 8.0], "score": 0.5 if n == 0 else None}
            for n in range(TILES)
        ],
    }


def test_metadata_refuses_numbers_json_does_not_have(tmp_path: Path) -> None:
    row = metadata_row(0, "a", 0, [Tile("a/1", (0, 0, 1, 1), float("nan"))])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_metadata(tmp_path, [row])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Soft labels


def test_soft_labels_come_back_in_half_precision(root: Path) -> None:
    stored = read_soft_labels(root, 3)
    assert stored.temperature == 20.0
    assert stored.indices is None
    assert stored.values.dtype == torch.float16
    assert torch.equal(stored.dense(), probabilities().half().float())
    assert torch.equal(stored.dense(slice(1, 3)), probabilities()[1:3].half().float())


def test_soft_labels_are_one_tensor_any_reader_opens(root: Path) -> None:
    from safetensors import safe_open

    with safe_open(root / "soft_labels.safetensors", framework="np") as file:
        assert list(file.keys()) == ["soft_labels"]
        assert file.metadata() == {"temperature": "20.0"}
        assert file.get_tensor("soft_labels").shape == (6, TILES, 3)


def test_the_largest_are_kept_and_the_rest_is_spread(tmp_path: Path) -> None:
    given = torch.tensor([[[0.5, 0.1, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]]])
    write_soft_labels(tmp_path, given, 4.0, top_k=2)
    stored = read_soft_labels(tmp_path, 4)
    assert stored.indices is not None
    assert stored.indices.tolist() == [[[0, 2], [0, 1]]]
    assert stored.values.tolist() == [[[0.5, 0.25], [0.25, 0.25]]]
    assert stored.dense().tolist() == [[[0.5, 0.125, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]]]


@pytest.mark.parametrize("top_k", [3, 7])
def test_a_top_k_of_everything_stores_everything(tmp_path: Path, top_k: int) -> None:
    write_soft_labels(tmp_path, probabilities(), 20, top_k=top_k)
    assert read_soft_labels(tmp_path, 3).indices is None


def test_top_k_sums_to_one_and_keeps_the_order(tmp_path: Path) -> None:
    given = (torch.randn(5, 2, 50, generator=torch.Generator().manual_seed(1))).softmax(dim=2)
    write_soft_labels(tmp_path, given, 1.0, top_k=10)
    dense = read_soft_labels(tmp_path, 50).dense()
    assert dense.shape == given.shape
    assert torch.allclose(dense.sum(dim=2), torch.ones(5, 2), atol=1e-6)
    kept = given.topk(10, dim=2)
    assert torch.allclose(dense.gather(2, kept.indices), kept.values, rtol=1e-3)


def test_soft_labels_have_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    given = torch.arange(60, dtype=torch.float64).sin().view(3, 4, 5).softmax(dim=2)
    program = (
        "import sys, torch\n"
        "from ddfast.output.distilled import write_soft_labels\n"
        "given = torch.arange(60, dtype=torch.float64).sin().view(3, 4, 5).softmax(dim=2)\n"
        "for name, top_k in (('all', None), ('two', 2)):\n"
        "    write_soft_labels(f'{sys.argv[1]}/{name}', given, 20.0, top_k=top_k)\n"
    )
    for name in ("here/all", "here/two", "there/all", "there/two"):
        (tmp_path / name).mkdir(parents=True)
    write_soft_labels(tmp_path / "here" / "all", given, 20.0)
    write_soft_labels(tmp_path / "here" / "two", given, 20.0, top_k=2)
    checkout = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], check=True, cwd=checkout)
    for name in ("all", "two"):
        written = [
            (tmp_path / side / name / "soft_labels.safetensors").read_bytes() for side in ("here", "there")
        ]
        assert written[0] == written[1]


def test_soft_labels_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float \[N, tiles, C\], got \[6, 3\]"):
        write_soft_labels(tmp_path, probabilities()[:, 0], 20)
    with pytest.raises(ValueError, match="finite"):
        write_soft_labels(tmp_path, probabilities() / 0, 20)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        write_soft_labels(tmp_path, probabilities(), 20, top_k=0)
    assert list(tmp_path.iterdir()) == []


# Opening


def test_a_set_opens_with_images_labels_and_soft_labels(root: Path) -> None:
    opened = DistilledSet(root)
    assert ddfast.DistilledSet is DistilledSet
    assert len(opened) == 6
    assert opened.class_names == CLASSES
    assert opened.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert opened.image_size == SIZE
    assert opened.mean == [0.485, 0.456, 0.406]
    assert opened.std == [0.229, 0.224, 0.225]
    assert opened.temperature == 20.0
    assert opened.manifest["method"] == "infoutil"
    assert opened.soft_labels.shape == (6, TILES, 3)
    assert opened.soft_labels.dtype == torch.float32
    for index in range(6):
        image, label, soft_label = opened[index]
        assert image.dtype == torch.uint8
        assert torch.equal(image, pixels(index // IPC, index % IPC))
        assert label == index // IPC
        assert soft_label.dtype == torch.float32
        assert torch.allclose(soft_label, probabilities()[index].float().mean(dim=0), atol=1e-3)
    assert torch.equal(opened[-1][0], opened[5][0])
    for index in (6, -7):
        with pytest.raises(IndexError, match="of a distilled set of 6 images"):
            opened[index]


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_a_transform_gets_a_picture(tmp_path: Path, format: str) -> None:
    opened = DistilledSet(write_set(tmp_path, format), transform=lambda picture: (picture.mode, picture.size))
    assert opened[0][0] == ("RGB", (SIZE, SIZE))


def test_a_set_of_top_k_labels_opens(tmp_path: Path) -> None:
    opened = DistilledSet(write_set(tmp_path, top_k=2))
    assert opened.stored.values.shape == (6, TILES, 2)
    assert opened.soft_labels.shape == (6, TILES, 3)
    assert float(opened[0][2].sum()) == pytest.approx(1, abs=1e-3)


def test_a_data_loader_batches_it(root: Path) -> None:
    images, labels, soft = next(iter(torch.utils.data.DataLoader(DistilledSet(root), batch_size=4)))
    assert images.shape == (4, 3, SIZE, SIZE)
    assert labels.tolist() == [0, 0, 1, 1]
    assert soft.shape == (4, 3)


def test_torchvision_opens_it_with_the_same_labels(root: Path) -> None:
    folder, opened = ImageFolder(str(root / "train")), DistilledSet(root)
    assert len(folder) == len(opened)
    assert len(folder.classes) == len(CLASSES)
    for index, (picture, label) in enumerate(folder):
        assert label == opened[index][1]
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), opened[index][0])


def test_hugging_face_opens_it_with_labels(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # read when the library is imported
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache")
    )
    opened = DistilledSet(root)
    assert len(loaded) == len(opened)
    assert [row["label"] for row in loaded] == opened.labels.tolist()
    assert [row["label_name"] for row in loaded] == [CLASSES[label] for label in opened.labels]
    for row, (image, _, _) in zip(loaded, opened, strict=True):
        assert torch.equal(torch.from_numpy(np.array(row["image"])).permute(2, 0, 1), image)
    assert loaded[0]["tiles"][1]["source"] == "cat/1.jpg"


# What is not a finished set


def edit_manifest(root: Path, **changes: Any) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def edit_rows(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = root / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def truncate(path: Path, length: int) -> None:
    os.truncate(path, length)


IMAGE = "train/00000_cat/000000.png"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda r: (r / "manifest.json").unlink(),
        "no manifest.json: not a distilled set, or an unfinished",
    ),
    "manifest cut": (lambda r: truncate(r / "manifest.json", 40), "manifest.json is damaged"),
    "manifest empty": (lambda r: truncate(r / "manifest.json", 0), "manifest.json is damaged"),
    "manifest a list": (lambda r: (r / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "manifest nested": (lambda r: (r / "manifest.json").write_text("[" * 99_999), "manifest.json is damaged"),
    "manifest binary": (
        lambda r: (r / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "manifest.json is damaged",
    ),
    "unfinished": (
        lambda r: edit_manifest(r, complete=False),
        "is unfinished: finish it with the same distill",
    ),
    "newer": (lambda r: edit_manifest(r, format_version=2), "format version 2, this ddfast reads up to 1"),
    "no version": (lambda r: edit_manifest(r, format_version=None), "format version None"),
    "no classes": (lambda r: edit_manifest(r, class_names=None), "no usable 'class_names'"),
    "no size": (lambda r: edit_manifest(r, image_size="big"), "no usable 'image_size'"),
    "no counts": (lambda r: edit_manifest(r, counts=None), "no usable 'counts'"),
    "odd mean": (lambda r: edit_manifest(r, mean=[1, 2]), "no usable 'mean'"),
    "huge mean": (lambda r: edit_manifest(r, mean=[1, 2, 10**400]), "no usable 'mean'"),
    "odd std": (lambda r: edit_manifest(r, std=["a", "b", "c"]), "no usable 'std'"),
    "other count": (
        lambda r: edit_manifest(r, counts={"images": 7}),
        "manifest.json has 7, train/metadata.jsonl has 6",
    ),
    "other classes": (lambda r: edit_manifest(r, class_names=["a"]), "label 1 is none of 0 to 0"),
    "more classes": (lambda r: edit_manifest(r, class_names=list("abcd")), "wanted fp16"),
    "no metadata": (lambda r: (r / "train/metadata.jsonl").unlink(), "has no train/metadata.jsonl"),
    "metadata cut": (
        lambda r: truncate(r / "train/metadata.jsonl", 300),
        "metadata.jsonl, line 1 is damaged",
    ),
    "row missing": (
        lambda r: edit_rows(r, lambda rows: rows.pop()),
        "manifest.json has 6, train/metadata.jsonl has 5",
    ),
    "row twice": (
        lambda r: edit_rows(r, lambda rows: rows.__setitem__(1, rows[0])),
        "that train/metadata.jsonl does not",
    ),
    "label text": (
        lambda r: edit_rows(r, lambda rows: rows[2].update(label="1")),
        "line 3: label '1' is none of",
    ),
    "label true": (
        lambda r: edit_rows(r, lambda rows: rows[2].update(label=True)),
        "line 3: label True is none of",
    ),
    "path up": (
        lambda r: edit_rows(r, lambda rows: rows[0].update(file_name="../x.png")),
        "is not <class folder>",
    ),
    "path absolute": (
        lambda r: edit_rows(r, lambda rows: rows[0].update(file_name="/x.png")),
        "is not <class folder>",
    ),
    "path missing": (lambda r: edit_rows(r, lambda rows: rows[0].pop("file_name")), "file_name None is not"),
    "image missing": (lambda r: (r / IMAGE).unlink(), "lacks 1 image (00000_cat/000000.png)"),
    "images gone": (lambda r: shutil.rmtree(r / "train/00000_cat"), "lacks 2 images"),
    "image surplus": (
        lambda r: shutil.copy(r / IMAGE, r / "train/00000_cat/9.png"),
        "does not list (00000_cat/9.png)",
    ),
    "no soft labels": (lambda r: (r / "soft_labels.safetensors").unlink(), "has no soft_labels.safetensors"),
    "soft labels cut": (
        lambda r: truncate(r / "soft_labels.safetensors", 150),
        "soft_labels.safetensors is damaged",
    ),
    "soft labels empty": (
        lambda r: truncate(r / "soft_labels.safetensors", 0),
        "soft_labels.safetensors is damaged",
    ),
    "soft labels fewer": (
        lambda r: write_soft_labels(r, probabilities(5), 20),
        "soft_labels.safetensors has 5",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_a_finished_set_says_why_in_one_line(root: Path, damage: str) -> None:
    DistilledSet(root)
    act, words = DAMAGE[damage]
    act(root)
    with pytest.raises(UsageError) as caught:
        DistilledSet(root)
    message = str(caught.value)
    assert words in message
    assert str(root) in message
    assert "\n" not in message


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no such folder: .*none; wanted the output folder of ddfast distill"
    ):
        DistilledSet(tmp_path / "none")


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"soft_labels": torch.zeros(6, 4, 3)}, {"temperature": "20"}, "wanted fp16"),
        ({"soft_labels": torch.zeros(6, 3).half()}, {"temperature": "20"}, "wanted fp16"),
        ({"other": torch.zeros(6, 4, 3).half()}, {"temperature": "20"}, "is damaged"),
        ({"soft_labels": torch.zeros(6, 4, 3).half()}, None, "is damaged"),
        ({"soft_labels": torch.zeros(6, 4, 3).half()}, {"temperature": "warm"}, "is damaged"),
        (
            {"soft_labels": torch.full((6, 4, 3), float("nan")).half()},
            {"temperature": "1"},
            "NaN or infinity",
        ),
        (
            {
                "soft_labels": torch.zeros(6, 4, 2).half(),
                "indices": torch.full((6, 4, 2), 3, dtype=torch.int32),
            },
            {"temperature": "1"},
            "indices that do not fit",
        ),
        (
            {"soft_labels": torch.zeros(6, 4, 2).half(), "indices": torch.zeros(6, 4, 2)},
            {"temperature": "1"},
            "indices that do not fit",
        ),
    ],
)
def test_soft_labels_of_another_kind_are_refused(
    root: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, words: str
) -> None:
    from safetensors.torch import save

    (root / "soft_labels.safetensors").write_bytes(save(tensors, metadata))
    with pytest.raises(UsageError, match=words):
        DistilledSet(root)


def test_a_pickle_is_not_opened(root: Path) -> None:
    torch.save({"soft_labels": probabilities()}, root / "soft_labels.safetensors")
    with pytest.raises(UsageError, match="is damaged"):
        DistilledSet(root)


def test_a_damaged_image_names_its_file(root: Path) -> None:
    opened = DistilledSet(root)
    (root / IMAGE).write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"000000\.png cannot be read \(not an image"):
        opened[0]
    (root / IMAGE).write_bytes(encode_image(pixels(0, 0)[:, 1:]))
    with pytest.raises(UsageError, match=r"000000\.png is 16x15, manifest\.json says 16"):
        opened[0]
    (root / IMAGE).unlink()
    with pytest.raises(UsageError, match=r"000000\.png cannot be read"):
        opened[0]
    assert opened[1][1] == 0
