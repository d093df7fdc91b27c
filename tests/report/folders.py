"""Builds a small distilled folder in the pipeline's formats, from rendered shapes and made-up scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ddfast.data import open_source, sample_id
from ddfast.demo.shapes import ShapesConfig, render
from ddfast.errors import BadImage
from ddfast.ops import crop_resize
from ddfast.output.distilled import (
    Tile,
    image_path,
    metadata_row,
    write_image,
    write_metadata,
    write_soft_labels,
)
from ddfast.output.table import SCORE_SCHEMA, SELECTION_SCHEMA, make_table, part_path, write_table

CROPS = 5


def build_data(
    root: Path, names: list[str], sources: int, size: int, file_name: str = "img {index}.png", config=None
) -> None:
    """An ImageFolder of rendered shapes under class names of one's own."""
    from PIL import Image

    for label, name in enumerate(names):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for index in range(sources):
            pixels, _ = render(label % 10, index, "train", config or ShapesConfig(image_size=size))
            Image.fromarray(pixels).save(folder / file_name.format(index=index))


def build_run(
    root: Path,
    data: Path,
    *,
    ipc: int = 2,
    factor: int = 2,
    method: str = "infoutil",
    size: int = 64,
    quarantined: list[dict[str, str]] | None = None,
) -> Path:
    """A folder as it stands when the pipeline asks for its report."""
    source = open_source(data, "train")
    names = source.class_names
    draws = np.random.default_rng(0)
    scored = {name: [] for name in SCORE_SCHEMA.names}
    picked = {name: [] for name in SELECTION_SCHEMA.names}
    rows, labels = [], []
    tile = size // factor
    for label, name in enumerate(names):
        samples = [s for s in source.samples if s.label == label]
        good = []
        for sample in samples:
            image = decoded(source, sample, size)
            if isinstance(image, BadImage):
                continue
            phi = draws.normal(size=16).astype(np.float32)
            boxes = candidate_boxes(draws, size, method)
            for crop, box in enumerate(boxes):
                norm, loss = draws.lognormal(0, 1.5), draws.exponential(0.5)
                values = {
                    "sample_id": sample.id,
                    "key": sample.key,
                    "label": label,
                    "crop": crop,
                    "box": box,
                    "score": draws.uniform() if method == "random" else np.nan,
                    "grad_norm": np.nan if method != "infoutil" else norm,
                    "loss": np.nan if method == "random" else loss,
                    "correct": loss < 0.8,
                    "phi": phi,
                }
                for column, value in values.items():
                    scored[column].append(value)
            good.append((sample, image, len(scored["crop"]) - 1))
        for image_index in range(ipc):
            tiles, sources = [], []
            for place in range(factor**2):
                sample, image, row = good[(image_index * factor**2 + place) % len(good)]
                box = scored["box"][row]
                column = {"infoutil": "grad_norm", "rded": "loss", "random": "score"}[method]
                score = float(np.float32(scored[column][row])) * (-1 if method == "rded" else 1)
                tiles.append(
                    crop_resize(image[None], torch.tensor([box], dtype=torch.float32)[None], tile)[0, 0]
                )
                sources.append(Tile(sample.key, box, score))
                chosen = {"label": label, "image": image_index, "tile": place, "sample_id": sample.id}
                chosen |= {"key": sample.key, "box": box, "score": score}
                for name_, value in chosen.items():
                    picked[name_].append(value)
            grid = (
                torch.stack(tiles)
                .view(factor, factor, 3, tile, tile)
                .permute(2, 0, 3, 1, 4)
                .reshape(3, size, size)
            )
            write_image(root / image_path(label, name, image_index), grid)
            rows.append(metadata_row(label, name, image_index, sources))
            logits = torch.full((factor**2, len(names)), 0.0)
            logits[:, label] = 9.0
            labels.append(logits + torch.tensor(draws.normal(size=(factor**2, len(names)))))
    write_metadata(root, rows)
    write_soft_labels(root, torch.softmax(torch.stack(labels) / 20, dim=-1).float(), 20.0)
    columns = {name: np.array(values) for name, values in scored.items()}
    columns["key"] = scored["key"]
    if method != "infoutil":
        columns["phi"] = None
    write_table(part_path(root / "scores", 0), make_table(columns))
    picked["box"] = np.array(picked["box"])
    write_table(root / "selection.parquet", make_table(picked, SELECTION_SCHEMA))
    bad = quarantined or []
    teacher = {"arch": "convnet4", "sha256": "0" * 64, "top1": 91.25, "epoch": 12}
    manifest = {
        "format_version": 1,
        "complete": False,
        "method": method,
        "preset": None,
        "options": {"score": {"grid": 4, "alpha": 2.0}, "select": {"rank_by": "grad_norm", "order": "high"}},
        "seed": 0,
        "ipc": ipc,
        "factor": factor,
        "tiles": factor**2,
        "image_size": size,
        "images_per_class": 300,
        "format": "png",
        "class_names": names,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "teacher": teacher,
        "label_teacher": teacher,
        "label_temperature": 20.0,
        "data": {"fingerprint": source.fingerprint(), "images": len(source.samples)},
        "arithmetic": {"micro_batch": 16, "precision": "float32", "device": "cpu"},
        "versions": {"ddfast": "0.1.0"},
        "counts": {"images": len(rows), "sources": len({*scored["sample_id"]}), "quarantined": len(bad)},
        "quarantined": {"count": len(bad), "files": bad},
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return root


def decoded(source, sample, size: int):
    from ddfast.data import decode_fit

    try:
        return decode_fit(source.read(sample), size)
    except BadImage as error:
        return error


def candidate_boxes(draws, size: int, method: str) -> list[list[float]]:
    if method == "random":
        return [[0.0, 0.0, float(size), float(size)]]
    half = size // 2
    return [
        [float(x), float(y), float(x + half), float(y + half)]
        for x, y in draws.integers(0, 3, (CROPS, 2)) * (size // 4)
    ]


__all__ = ["build_data", "build_run", "sample_id"]
