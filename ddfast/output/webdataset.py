"""A distilled set as WebDataset shards: tar files in which the files of one sample share a name.

    00000012.png               the image, its bytes unchanged (.jpg where the set is JPEG)
    00000012.cls               the label, a decimal number
    00000012.json              label, label_name, temperature, tiles; display_name where people read another name
    00000012.soft_label.npy    fp16 [tiles, C], or the top k [tiles, k]
    00000012.classes.npy       int32 [tiles, k], the classes of the top k, where only those are stored
    00000012.pixels.npy        float32 [3, S, S], what students train on, where the images were optimised

A set with hard labels has no soft_label.npy, and its temperature is null; one with pixels says in every JSON how to
read them: space, mean and std, factor, learned_rate. Where they are whitened, `zca.safetensors` stands beside the
shards.
`classes.txt` beside the shards names the classes, one a line in label order, so that `--data` takes the shards
as well. Samples keep the order of `train/metadata.jsonl`; equal sets give equal bytes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddfast.arguments import output_file, path_of, whole_number
from ddfast.errors import UsageError
from ddfast.files import atomic_path, atomic_write_bytes, atomic_write_text, make_folder
from ddfast.output.distilled import DistilledSet
from ddfast.output.whitening import WHITENING

IMAGES_PER_SHARD = 10_000
_NUMBER = re.compile(r"\{(0+)\.\.\}")


def export_webdataset(
    root: str | Path, out: str | Path, *, images_per_shard: int = IMAGES_PER_SHARD
) -> list[Path]:
    """Write a finished distilled set as tar shards.

    Args:
        root: the output folder of `ddfast distill`.
        out: path of the shards, with `{000000..}` where their number goes, counted from 0 with as many digits
            as there are zeros: `shards/train-{000000..}.tar`. Without it everything goes into one shard.
        images_per_shard: images in each shard but the last.

    Returns:
        The shards' paths, in order. Each appears by atomic rename, `classes.txt` last.

    Raises:
        UsageError: no finished set in `root`, a path that is no .tar or holds something already, more shards
            than the number has room for, an image that cannot be read, or no space.
    """
    images_per_shard = whole_number(images_per_shard, "images_per_shard", least=1)
    out = path_of(out, "out")
    _shard_paths(str(out), 1)  # its name, before the set is opened
    opened = DistilledSet(root)
    paths = _shard_paths(str(out), max(1, -(-len(opened) // images_per_shard)))
    names = paths[0].parent / "classes.txt"
    output_file(paths[0])
    whitening, kept = opened.root / WHITENING, paths[0].parent / WHITENING
    extra = [kept] if whitening.is_file() else []
    standing = [path for path in (*paths, *extra, names) if path.exists()]
    if standing:
        raise UsageError(f"{standing[0]} exists already: delete it or choose another path")
    broken = [name for name in opened.class_names if "\n" in name or "\r" in name]
    if broken:
        raise UsageError(f"class name with a line break: {broken[0]!r}; classes.txt cannot hold it")
    make_folder(paths[0].parent)
    for number, path in enumerate(paths):
        first = number * images_per_shard
        last = min(first + images_per_shard, len(opened))
        with (
            atomic_path(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard,
        ):
            for index in range(first, last):
                for name, data in _files(opened, index):
                    info = tarfile.TarInfo(name)  # time 0, owner 0: the bytes depend on the set alone
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))
    if extra:
        atomic_write_bytes(kept, whitening.read_bytes())
    atomic_write_text(names, "".join(f"{name}\n" for name in opened.class_names))
    return paths


def _shard_paths(out: str, count: int) -> list[Path]:
    if not out.endswith(".tar"):
        raise UsageError(f"shards must be named .tar, as in train-{{000000..}}.tar, got {out}")
    number = _NUMBER.search(out)
    if number is None:
        if count > 1:
            raise UsageError(
                f"{count} shards need a number in their name, as in train-{{000000..}}.tar, got {out}"
            )
        return [Path(out)]
    digits = len(number[1])
    if count > 10**digits:
        raise UsageError(f"{count} shards need more than the {digits} digits in {out}: add zeros")
    return [Path(f"{out[: number.start()]}{n:0{digits}d}{out[number.end() :]}") for n in range(count)]


def _files(opened: DistilledSet, index: int) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file of one sample."""
    row, key = opened.rows[index], f"{index:08d}"
    image, _ = opened.picture(row["file_name"])
    record = {**{name: row[name] for name in row if name != "file_name"}, "temperature": opened.temperature}
    if opened.display_names != opened.class_names:
        record["display_name"] = opened.display_names[row["label"]]
    pixels = opened.pixels
    if pixels is not None:
        record |= {"space": pixels.space, "factor": pixels.factor, "learned_rate": pixels.learned_rate}
        record |= {"mean": opened.mean, "std": opened.std}
        if pixels.regions is not None:
            record["regions"] = pixels.regions.boxes()[index].tolist()
        record |= {"whitening": WHITENING} if (opened.root / WHITENING).is_file() else {}
    yield f"{key}{Path(row['file_name']).suffix}", image
    yield f"{key}.cls", str(row["label"]).encode()
    yield f"{key}.json", json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    if opened.stored is not None:
        yield f"{key}.soft_label.npy", _npy(opened.stored.values[index].numpy())
        if opened.stored.indices is not None:
            yield f"{key}.classes.npy", _npy(opened.stored.indices[index].numpy())
    if pixels is not None:
        yield f"{key}.pixels.npy", _npy(pixels.images[index].numpy())


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
