"""Which folders, or shards, of a data set are its splits: `train/`, `test/`, `val/`, and their other spellings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from ddfast.data.sources import SPLIT_FOLDERS, is_hidden
from ddfast.errors import UsageError, shown

_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev"), "val"),
}
"""The words by which Hugging Face's datasets know a split and three more, and which split each means."""
_EXACT = frozenset(folder for group in SPLIT_FOLDERS.values() for folder in group)


def split_word(name: str) -> tuple[str, bool] | None:
    """Which split a name speaks of, "train", "test" or "val", and whether it says nothing else.

    Words are read in any case and parted by anything but letters, as in `Train`, `val2017` and `seg_test`. None for a
    name without such a word, or with words of two splits.
    """
    words = [word for word in re.split(r"[^a-z]+", name.casefold()) if word]
    kinds = {_WORDS[word] for word in words if word in _WORDS}
    return (kinds.pop(), len(words) == 1) if len(kinds) == 1 else None


def pick_split(
    folders: Collection[str], split: str, name: str, has_classes: Callable[[str], bool] = lambda folder: False
) -> str:
    """The one of `folders` that holds `split`; "" where nothing is split, which is a train split.

    A folder called exactly `train`, `test` or `val` comes first. One of another spelling counts where the names leave
    no doubt: beside one of those, beside one of the other split, or where there are no other folders.

    Args:
        folders: all that stand side by side, hidden ones included.
        split: "train" or "test".
        name: what the user calls the source, for messages.
        has_classes: whether a folder holds class folders or metadata and no loose images, as a split does.

    Raises:
        UsageError: the split is missing, or two folders may be it, or a folder may be a split or a class.
    """
    for candidate in SPLIT_FOLDERS[split]:
        if candidate in folders:
            return candidate
    spelled = _other_spellings(folders, name, has_classes)
    for kind in SPLIT_FOLDERS[split]:
        found = sorted(folder for folder, its_kind in spelled.items() if its_kind == kind)
        if len(found) > 1:
            raise UsageError(
                f"{name} has {shown(f'{folder}/' for folder in found)}, each of which may be the {split} split: "
                f"call the right one {kind}/"
            )
        if found:
            return found[0]
    known = [folder for group in SPLIT_FOLDERS.values() for folder in group if folder in folders]
    known += sorted(spelled)
    if split == "train" and not known:
        return ""
    wanted = " or ".join(f"{folder}/" for folder in SPLIT_FOLDERS[split])
    found_ones = ", ".join(f"{folder}/" for folder in known) or "no split folders, so that all of it is train"
    raise UsageError(f"{name} has no {split} split: wanted {wanted}, found {found_ones}")


def train_folder(
    folders: Collection[str], name: str, has_classes: Callable[[str], bool] = lambda folder: False
) -> str | None:
    """The folder of the train split; None where there is none beside the other splits, or nothing is split."""
    spelled = {} if "train" in folders else _other_spellings(folders, name, has_classes)
    if "train" not in folders and "train" not in spelled.values():
        return None
    return pick_split(folders, "train", name, has_classes)


def _other_spellings(
    folders: Collection[str], name: str, has_classes: Callable[[str], bool]
) -> dict[str, str]:
    """Folder -> "train", "test" or "val", of those that are splits by another name than that."""
    visible = [folder for folder in folders if not is_hidden(folder)]
    words = {folder: word for folder in visible if folder not in _EXACT and (word := split_word(folder))}
    likely = {folder: kind for folder, (kind, _) in words.items() if has_classes(folder)}
    kinds = {*likely.values(), *(_EXACT & set(visible))}
    whole = sorted(folder for folder in likely if words[folder][1])
    if _EXACT & set(visible) or ("train" in kinds and len(kinds) > 1):
        return likely
    if len(likely) == len(visible):
        return likely if whole or "train" in kinds else {}
    if whole:
        others = sorted(set(visible) - set(likely))
        raise UsageError(
            f"{name} has {shown([whole[0]])}/ beside {shown(others, 2)}: it may be a split, the folders in it the "
            f"classes, or a class of its own; put the class folders into {likely[whole[0]]}/, or rename it"
        )
    if len(words) == len(visible) > 1 and all(alone for _, alone in words.values()):
        said = {kind for kind, _ in words.values()}
        if "train" in said and len(said) > 1:
            raise UsageError(
                f"{name} has no class folders in {shown(f'{folder}/' for folder in sorted(words))}, whose names "
                "are those of splits: wanted one folder for each class in each, or other names if they are classes"
            )
    return {}
