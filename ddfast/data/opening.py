"""Which source data are: a folder, an archive, shards, a named set, or images in memory."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

from ddfast.data.sources import IN_MEMORY, SPLIT_FOLDERS, Source, is_in_memory
from ddfast.errors import UsageError, shown


def open_source(data: Any, split: str = "train") -> Source:
    """Open one split of a labelled image set.

    Args:
        data: one of
            - a folder with `train/<class>/...` and `test/<class>/...` or `val/<class>/...`, or with the class
              folders alone, which are a train split; `training/`, `validation/`, `Test/`, `val2017/` and their
              like are read as splits where they cannot be classes. `metadata.jsonl`, `metadata.csv` or
              `metadata.parquet` labels the images as Hugging Face's imagefolder has it, by `file_name` and one of
              "label_name", "class_name", "label": where the images do not stand in class folders, and where its
              labels divide them otherwise than their folders do;
            - a .zip of the same layout, which may stand in one common folder;
            - WebDataset shards: an uncompressed .tar, or several as `part-{000..003}.tar` or `part-*.tar`,
              with that layout, or with pairs `key.jpg` and `key.cls` (a class number or name; `key.json` with
              "label" or "label_name" will do), the names of numbers in `classes.txt`, one a line, inside or
              beside the shards;
            - a torchvision set by name, as `cifar10`, downloaded once into `$DDFAST_DATA` or
              `~/.cache/ddfast`; `NAME:FOLDER` where its files lie, as `fashion_mnist:FOLDER` for IDX files;
            - an `.npz` of plain arrays: x_train, y_train, x_test and y_test, or images and labels;
            - Parquet files of the Hub's image layout: a `.parquet`, a folder of them, or `data/*.parquet`, with a
              column of images {bytes, path} and one of labels;
            - a set of Hugging Face's Hub, `hf:OWNER/NAME` or `hf:OWNER/NAME:CONFIGURATION`, fetched once;
            - a folder of CIFAR's own files, `cifar-10-batches-py` or `cifar-100-python`, or of IDX files,
              `train-images-idx3-ubyte.gz` and the like;
            - images in memory: (images, labels) as tensors, arrays or lists, a torch `Dataset` of (image, label), or a
              Hugging Face `Dataset` with a column of images and one of labels. It is a train split; a dict, or a
              `DatasetDict`, of such gives both: {"train": ..., "test": ...}. An image is a Pillow image, uint8 or float
              in [0, 1], [3, H, W], [H, W, 3] or [H, W]; a label is a class number from 0 on, or a class name. See
              `ddfast.data.memory` for keys, class names and what the fingerprint hashes.
        split: "train" or "test" ("test" is looked for in `test/`, then in `val/`).

    Labels of the test split follow the class order of the train split where there is one.

    Raises:
        UsageError: no such data, no images, one class only, an empty class, no such split, a damaged archive,
            or an archive member that points outside.
        ValueError: an unknown split.
    """
    from ddfast.data.archives import TarSource, ZipSource, find_shards
    from ddfast.data.folders import open_folder
    from ddfast.data.named_sets import NAMED_SETS, NamedSource

    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if is_in_memory(data):
        from ddfast.data.memory import open_memory

        return open_memory(data, split)
    name = os.fspath(data)
    if isinstance(name, str) and name.startswith(IN_MEMORY):
        raise UsageError(f"the images were held {name}: give the data again")
    if isinstance(name, str) and name.startswith("hf:"):
        from ddfast.data.hub import open_hub

        return open_hub(name, split)
    path = Path(os.path.expanduser(name))
    try:
        if name and os.path.isdir(path):  # "" would be the current folder
            return _special_folder(path, split, name) or open_folder(path, split, name)
        if os.path.isfile(path):
            if path.suffix.lower() == ".npz":
                from ddfast.data.npz import open_npz

                return open_npz(path, split, name)
            if path.suffix.lower() == ".parquet":
                from ddfast.data.parquet import open_parquet

                return open_parquet([path], split, name)
            if path.suffix.lower() == ".tar":
                return TarSource([path], split, name)
            if zipfile.is_zipfile(path):
                return ZipSource(path, split, name)
            if path.suffix.lower() == ".zip":
                raise UsageError(
                    f"cannot read {name}: not a zip archive, or its end is missing; copy it again"
                )
            packed = re.search(r"\.(tar\.\w+|t[gbx]z2?|tzst)$", name.lower())
            rest = ", so unpack it first" if packed else ", or an .npz or .parquet file"
            raise UsageError(f"cannot read {name}: wanted a folder, a .zip or an uncompressed .tar{rest}")
        if re.search(r"[*?\[]", name) and name.lower().endswith(".parquet"):
            from ddfast.data.parquet import matching_files, open_parquet

            return open_parquet(matching_files(os.fspath(path)), split, name)
        if re.search(r"[{*?\[]", name):
            return TarSource(find_shards(os.fspath(path)), split, name)
    except PermissionError as error:
        raise UsageError(f"cannot read {error.filename or name}: permission denied") from error
    kind, _, where = name.partition(":")
    kind = re.sub("[-_]", "", kind.lower())
    if kind in NAMED_SETS and where:
        return _named_in(kind, Path(os.path.expanduser(where)), split, name)
    if kind in NAMED_SETS:
        return NamedSource(kind, split)
    raise UsageError(
        f"no such folder or archive: {shown([name])}; wanted a folder, a .zip, .tar shards, an .npz, Parquet files or "
        f"one of {', '.join(NAMED_SETS)}"
    )


def _special_folder(path: Path, split: str, name: str) -> Source | None:
    """What a folder holds in the files of a known format: CIFAR's own, IDX, or Parquet; None for any other."""
    from ddfast.data.cifar import cifar_folder, open_cifar
    from ddfast.data.idx import idx_files, open_idx
    from ddfast.data.parquet import open_parquet, parquet_files

    if (folder := cifar_folder(path)) is not None:
        return open_cifar(folder, split, name)
    if files := idx_files(path):
        return open_idx(files, split, name)
    if tables := parquet_files(path):
        return open_parquet(tables, split, name)
    return None


def _named_in(kind: str, folder: Path, split: str, name: str) -> Source:
    """A set of torchvision's whose files lie in a folder; `UsageError` where they do not."""
    from ddfast.data.cifar import cifar_folder, open_cifar
    from ddfast.data.idx import idx_files, open_idx
    from ddfast.data.named_sets import NAMED_SETS, NamedSource, idx_classes

    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}, in which {kind} was to lie ({name})")
    if kind.startswith("cifar") and (place := cifar_folder(folder)) is not None:
        return open_cifar(place, split, name)
    if (class_names := idx_classes(kind)) is not None:
        files = idx_files(folder) or idx_files(folder / NAMED_SETS[kind][0])
        if not files:
            raise UsageError(
                f"{name}: no IDX files in {folder}: wanted train-images-idx3-ubyte.gz and the like"
            )
        return open_idx(files, split, name, class_names)
    return NamedSource(kind, split, folder, download=False)
