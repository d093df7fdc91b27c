"""A distilled set as a folder of Hugging Face's: Parquet with a `ClassLabel`, and a dataset card.

    README.md                                   the card: what it is, how it was made, how to load it
    data/train-00000-of-00001.parquet           image (the bytes of its file), label, label_name, soft_label
    soft_labels.safetensors, pixels.safetensors copies, where the set has them: labels of each tile, unrounded pixels
    manifest.json                               a copy: every setting of the distillation

`datasets.load_dataset(folder, split="train")` opens it, and so does the Hub once the folder is uploaded there. The
features stand in the metadata of the Parquet files, so `datasets` is not needed to write them. Rows keep the order of
`train/metadata.jsonl`; equal sets give equal bytes with one version of pyarrow.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddfast.arguments import output_folder, path_of, whole_number
from ddfast.errors import UsageError, one_line
from ddfast.fetching import in_silence
from ddfast.files import arrow_file, atomic_folder, atomic_write_text
from ddfast.output.distilled import MANIFEST, SOFT_LABELS, DistilledSet
from ddfast.output.pixels import PIXELS
from ddfast.output.whitening import WHITENING
from ddfast.wording import argument, plural

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_PER_FILE = 10_000
_ROWS = 100  # of a row group: what a reader decodes at once
_SHOWN_CLASSES = 100
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def export_huggingface(
    root: str | Path,
    out: str | Path,
    *,
    images_per_file: int = IMAGES_PER_FILE,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a finished distilled set as a folder that `datasets.load_dataset` opens with readable labels.

    Args:
        root: the output folder of `ddfast distill`.
        out: the folder to write, which must not hold anything yet. It appears whole or not at all.
        images_per_file: rows in each Parquet file but the last.
        push_to_hub: name on the Hub, OWNER/NAME, that the library `datasets` then pushes the folder to, with the card;
            None: nothing leaves this machine. Who you are there says `hf auth login` or HF_TOKEN.
        private: whether a set that is new on the Hub is yours alone.

    Returns:
        `out`. Its columns: `image` (`Image`), `label` (`ClassLabel` in the set's order), `label_name`, and where the
        set has soft labels `soft_label`, float32 [C], the mean over the tiles.

    Raises:
        UsageError: no finished set in `root`, a folder that holds something, an image that cannot be read, no space, or
            a Hub that takes nothing; the folder then stands.
    """
    if push_to_hub is not None:
        _check_pushes(push_to_hub)
    elif private:
        raise UsageError(
            f"{argument('private')} describes a set on the Hub: give {argument('push_to_hub')} as well"
        )
    per_file = whole_number(images_per_file, "images_per_file", least=1)
    out = output_folder(out)
    opened = DistilledSet(path_of(root, "root"))
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: delete what it holds or choose another {argument('out')}")
    names = label_names(opened.display_names)
    files = max(1, -(-len(opened) // per_file))
    with atomic_folder(out) as folder:
        (folder / "data").mkdir()
        for number in range(files):
            places = range(number * per_file, min((number + 1) * per_file, len(opened)))
            path = folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
            _write_rows(path, opened, places, names)
        for name in (MANIFEST, SOFT_LABELS, PIXELS, WHITENING):
            if (opened.root / name).is_file():
                shutil.copyfile(opened.root / name, folder / name)
        atomic_write_text(folder / "README.md", card(opened))
    if push_to_hub is not None:
        push(out, push_to_hub, private=private)
    return out


def _check_pushes(name: str) -> None:
    """Refuse what cannot be pushed before anything is written."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        raise UsageError(f"{argument('push_to_hub')} must be OWNER/NAME, got {name!r}")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{argument('push_to_hub')} needs the package datasets: pip install datasets"
        ) from error


def push(folder: str | Path, name: str, *, private: bool = False) -> None:
    """Push a folder that `export_huggingface` wrote to the Hub: its rows through `datasets`, then card and labels.

    Args:
        folder: the exported folder.
        name: OWNER/NAME.
        private: whether a set that is new there is yours alone.

    Raises:
        UsageError: `datasets` is not installed, no such folder, or the Hub refuses it or cannot be reached.
    """
    _check_pushes(name)
    import datasets
    import huggingface_hub

    folder = Path(folder)
    files = sorted(str(path) for path in (folder / "data").glob("train-*.parquet"))
    if not files:
        raise UsageError(
            f"{folder} holds no data/train-*.parquet: make it with ddfast export --to huggingface"
        )
    try:
        with in_silence(), tempfile.TemporaryDirectory() as cache:
            datasets.Dataset.from_parquet(files, split="train", cache_dir=cache).push_to_hub(
                name, private=private
            )
        huggingface_hub.HfApi().upload_folder(
            repo_id=name, repo_type="dataset", folder_path=str(folder), ignore_patterns=["data/*"]
        )
    except Exception as error:  # the library, and each transport below it, has errors of its own
        raise UsageError(
            f"{folder} is written, but could not be pushed to {name}: {one_line(error)}; log in with hf auth login, "
            f"then hf upload {name} {folder} --repo-type dataset"
        ) from error


def label_names(class_names: Sequence[str]) -> list[str]:
    """The names of the `ClassLabel`: those of the classes; of equal ones, which it does not take, with their label."""
    count = Counter(class_names)
    return [name if count[name] == 1 else f"{name} ({label})" for label, name in enumerate(class_names)]


def _schema(names: Sequence[str], has_soft: bool) -> pa.Schema:
    """The columns, with the features as `datasets` reads them from a file's metadata."""
    import pyarrow as pa

    fields = [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
        pa.field("label_name", pa.string()),
    ]
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(names), "_type": "ClassLabel"},
        "label_name": {"dtype": "string", "_type": "Value"},
    }
    if has_soft:
        fields.append(pa.field("soft_label", pa.list_(pa.float32())))
        # "Sequence" and not "List": older versions of the library read it too.
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    info = json.dumps({"info": {"features": features}}, ensure_ascii=False)
    return pa.schema(fields, metadata={"huggingface": info})


def _write_rows(path: Path, opened: DistilledSet, places: range, names: Sequence[str]) -> None:
    """One Parquet file, a row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(names, opened.stored is not None)
    with arrow_file(path, "wb") as raw, pq.ParquetWriter(raw, schema) as writer:
        for first in range(places.start, places.stop, _ROWS):
            group = range(first, min(first + _ROWS, places.stop))
            rows = [opened.rows[place] for place in group]
            columns: dict[str, list[Any]] = {
                "image": [_image(opened, row["file_name"]) for row in rows],
                "label": [row["label"] for row in rows],
                "label_name": [opened.display_names[row["label"]] for row in rows],
            }
            if opened.stored is not None:
                dense = opened.stored.dense(slice(group.start, group.stop)).mean(dim=1)
                columns["soft_label"] = list(dense.numpy())
            writer.write_table(pa.Table.from_pydict(columns, schema=schema), row_group_size=_ROWS)


def _image(opened: DistilledSet, file_name: str) -> dict[str, Any]:
    return {"bytes": opened.picture(file_name)[0], "path": file_name.rpartition("/")[2]}


def card(opened: DistilledSet) -> str:
    """The dataset card, README.md: YAML for the Hub, then words."""
    plan = opened.manifest
    method, ipc = str(plan.get("method")), plan.get("ipc")
    size = next((name for limit, name in _SIZES if len(opened) < limit), "n>1M")
    labelled_by = plan.get("label_teacher") or plan.get("teacher")
    facts = {
        "Method": method,
        "Images": f"{len(opened)}, {ipc} per class (IPC {ipc})",
        "Classes": str(len(opened.class_names)),
        "Image size": f"{opened.image_size} px",
        "Labels": "hard"
        if opened.stored is None
        else f"hard, and soft from a teacher of architecture {(labelled_by or {}).get('arch')}",
        "Mean, std": f"{opened.mean}, {opened.std} of pixels in [0, 1]",
        "Made with": f"ddfast {(plan.get('versions') or {}).get('ddfast', '')}".strip(),
    }
    extras = []
    if opened.stored is not None:
        tiles = opened.stored.values.shape[1]
        extras.append(
            f"`soft_label` is the mean over the {plural(tiles, 'tile')} of an image of the teacher's probabilities at "
            f"temperature {opened.temperature:g}; `{SOFT_LABELS}` holds them tile by tile."
        )
    if opened.pixels is not None:
        extras.append(
            f"The images were optimised in float32: `{PIXELS}` holds them ({opened.pixels.space} pixels), unrounded."
        )
    if (opened.root / WHITENING).is_file():
        extras.append(
            f"Those pixels are whitened (ZCA) in place of a normalisation: `{WHITENING}` whitens test images."
        )
    shown = [" ".join(name.split()).replace("|", "\\|") for name in opened.display_names[:_SHOWN_CLASSES]]
    more = len(opened.class_names) - len(shown)
    lines = [
        "---",
        "license: other",
        "license_name: that-of-the-source-data",
        "task_categories:",
        "- image-classification",
        f"size_categories:\n- {size}",
        "tags:",
        "- dataset-distillation",
        f"- {json.dumps(method)}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: data/train-*.parquet",
        "---",
        "",
        f"# A data set distilled by {method}: {ipc} {'image' if ipc == 1 else 'images'} per class",
        "",
        "A tiny training set that stands in for a large one: models are trained on it and tested on the test split of",
        "the data it was distilled from.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        *(line for extra in extras for line in (extra, "")),
        f"Every setting stands in `{MANIFEST}`.",
        "",
        "## How to load it",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'distilled = load_dataset("FOLDER_OR_HUB_NAME", split="train")',
        'distilled.features["label"].names  # the classes, in label order',
        "```",
        "",
        "## Classes",
        "",
        ", ".join(shown) + (f", and {more} more" if more else ""),
        "",
        "## Licence",
        "",
        "It inherits that of the data it was distilled from.",
        "",
    ]
    return "\n".join(lines)
