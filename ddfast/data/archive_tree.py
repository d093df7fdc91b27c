"""The files of archives as one tree of checked paths, and what it holds of a split."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ddfast.data.labels import class_names_of, label_in, label_in_text
from ddfast.data.metadata import METADATA_FILES, MetadataFile, labels_in, overrides_folders
from ddfast.data.sources import (
    SPLIT_FOLDERS,
    checked_classes,
    ending_left_out,
    is_hidden,
    is_image,
    order_remark,
    path_inside,
    spellings,
)
from ddfast.data.splits import pick_split, split_word, train_folder
from ddfast.errors import UsageError, shown

_MAX_LINKED = 2_000_000  # files that links to folders may add
_MAX_LINKS = 40  # links followed from one to the next, as Linux does
_MAIN_IMAGES = {"img", "image", "input", "rgb", "jpg", "jpeg", "png", "photo", "main", "original"}
_SPLIT_NAMES = {folder for group in SPLIT_FOLDERS.values() for folder in group}


@dataclass(frozen=True, slots=True)
class Member:
    """Where a file lies in an archive: `stored` bytes at `offset` that unpack to `size` bytes.

    In a tar, `method` is None and the bytes are the file's. In a zip it is the compression method, and a
    local header comes first.
    """

    archive: int
    offset: int
    stored: int
    size: int
    method: int | None = None
    crc: int = 0
    encrypted: bool = False


class Members:
    """Members in columns, some 30 bytes each."""

    _CODES = "iqqqiIb"  # archive, offset, stored, size, method (-1: none), crc, encrypted

    def __init__(self) -> None:
        self._columns = [array(code) for code in self._CODES]

    def append(self, member: Member) -> int:
        """Keep a member; returns its row. Raises `OverflowError` for numbers that no archive can hold."""
        method = -1 if member.method is None else member.method
        values = (
            member.archive,
            member.offset,
            member.stored,
            member.size,
            method,
            member.crc,
            member.encrypted,
        )
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        return len(self._columns[0]) - 1

    def take(self, rows: Iterable[int]) -> Members:
        """Some of them, in this order."""
        taken, rows = Members(), list(rows)
        for column, source in zip(taken._columns, self._columns, strict=True):
            column.extend(array(column.typecode, map(source.__getitem__, rows)))
        return taken

    def sizes(self) -> np.ndarray:
        """Unpacked sizes in bytes, int64 [N]."""
        return np.array(self._columns[3], np.int64)

    def __getitem__(self, row: int) -> Member:
        archive, offset, stored, size, method, crc, encrypted = (column[row] for column in self._columns)
        return Member(archive, offset, stored, size, None if method < 0 else method, crc, bool(encrypted))


@dataclass(frozen=True, slots=True)
class Layout:
    """What an archive holds of one split."""

    keys: list[tuple[str, int]]  # (key, label) of every image
    class_names: list[str]  # in label order
    rows: dict[str, int]  # key -> its row in `members`
    members: Members
    left_out: dict[str, int]  # see `Source`
    remarks: list[str]


class Tree:
    """The files of an archive, or of several, as one tree of checked paths."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._table = Members()
        self._members: dict[str, int] = {}  # path -> row of the table
        self._folders: set[str] = set()  # those stored in their own right, which may be empty
        self._links: dict[str, str] = {}
        self.metadata: dict[str, bytes] = {}  # path of a metadata file -> its content
        self.class_lists: dict[str, bytes] = {}  # path of a classes.txt -> its content

    def check(self, name: str) -> str:
        """The path without `.` and double slashes. Raises `UsageError` for one that points outside."""
        inside = path_inside(name)
        if inside is None:
            raise UsageError(f"{self.name} has a member that points outside of it: {shown([name])}; refused")
        return inside

    def add_folder(self, name: str) -> None:
        """A folder of its own."""
        self._folders.add(self.check(name))

    def add(self, name: str, member: Member, once: bool = False) -> None:
        """A file. Of two of one name the last counts, as when unpacking; `once` makes that a `UsageError`."""
        inside = self.check(name)
        if once and inside in self._members:
            raise UsageError(f"{self.name} has {shown([inside])} twice; names must be unique over all shards")
        self._members[inside] = self._table.append(member)

    def add_link(self, name: str, target: str, base: str | None = None) -> None:
        """A link, relative to `base` (default: the folder it stands in). `UsageError` if it leads outside."""
        inside = self.check(name)
        place = (inside.rpartition("/")[0] if base is None else base).split("/")
        place = [part for part in place if part]
        outside = target.startswith(("/", "\\"))
        for part in target.split("/"):
            if part == "..":
                outside = outside or not place
                place = place[:-1]
            elif part not in ("", "."):
                place.append(part)
        if outside:
            raise UsageError(f"{self.name} has a link that points outside of it: {shown([name])}; refused")
        self._links[inside] = "/".join(place)

    def _visible(self) -> dict[str, int]:
        """Files and links to files, without those that are hidden or stand in a hidden folder."""
        members = dict(self._members)
        ordered: list[str] = []
        for link, target in self._links.items():
            for _ in range(_MAX_LINKS):  # of a circle of links nothing remains
                target = self._links.get(target, target)
            if target in self._members:
                members[link] = self._members[target]
            elif not f"{link}/".startswith(f"{target}/"):  # a link to a folder, and to none that it stands in
                ordered = ordered or sorted(self._members)
                # "0" is what comes after "/": these are the files under the target.
                first, last = bisect_left(ordered, f"{target}/"), bisect_left(ordered, f"{target}0")
                if len(members) + last - first > len(self._members) + _MAX_LINKED:
                    raise UsageError(
                        f"{self.name} has links to folders that hold over {_MAX_LINKED} files; refused"
                    )
                for path in ordered[first:last]:
                    members[link + path[len(target) :]] = self._members[path]
        return {path: member for path, member in members.items() if not _in_hidden(path)}

    def _all_folders(self, paths: Iterable[str]) -> set[str]:
        """Every visible folder: those stored, those that files stand in, and their parents."""
        folders: set[str] = set()
        stored = (folder for folder in self._folders if not _in_hidden(folder))
        for folder in (*stored, *(path.rpartition("/")[0] for path in paths)):
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        return folders

    def splits_below(self) -> bool:
        """Whether the folders in the top folders are splits, as in `train/train/`."""
        return any(path.split("/")[1] in _SPLIT_NAMES for path in self._members if path.count("/") > 1)

    def layout(self, split: str) -> Layout:
        """One split of the ImageFolder layout. Raises `UsageError` as `open_source` does."""
        visible = self._visible()
        # "train/" -> the folders in it, "" -> those at the top
        children: dict[str, set[str]] = defaultdict(set)
        for path in self._all_folders(visible):
            parent, slash, child = path.rpartition("/")
            children[parent + slash].add(child)
        root = ""
        if len(children[""]) == 1 and not children[""] & _SPLIT_NAMES:
            (common,) = children[""]
            word = split_word(common)
            root = f"{common}/" if children[f"{common}/"] and not (word and word[1]) else ""

        def has_classes(folder: str) -> bool:
            inside = f"{root}{folder}/"
            loose = (path[len(inside) :] for path in visible if path.startswith(inside))
            images = any("/" not in path and is_image(path) for path in loose)
            metadata = any(inside + file in self.metadata for file in METADATA_FILES)
            return metadata or (bool(children[inside]) and not images)

        folder = pick_split(children[root], split, self.name, has_classes)
        train = train_folder(children[root], self.name, has_classes)
        here = self._contents(root, folder, children, visible)
        there = None if train is None or train == folder else self._contents(root, train, children, visible)
        train_classes = None if there is None else self._classes_of(there)
        if here.said is not None:
            return self._labelled_layout(here, there)
        spelled = spellings(here.counts, train_classes, here.shown)
        class_names = checked_classes(
            {spelled[class_name]: count for class_name, count in here.counts.items()},
            here.shown,
            loose_images=here.loose_images,
            train_classes=train_classes,
            left_out=here.left_out,
        )
        rows: dict[str, int] = {}
        for key in _keys_below(here.prefix, visible):
            class_name, _, path = key.partition("/")
            name = spelled[class_name]
            rows[key if name == class_name else f"{name}/{path}"] = visible[here.prefix + key]
        listed = self._names_file(here)
        remarks = [] if listed is None else order_remark(listed, class_names, self.name)
        return self._layout(class_names, rows, here.left_out, remarks)

    def _contents(
        self, root: str, folder: str, children: Mapping[str, set[str]], visible: Mapping[str, int]
    ) -> _SplitContents:
        """What stands in the folder of a split."""
        prefix = f"{root}{folder}/" if folder else root
        contents = _SplitContents(prefix, f"{self.name}/{prefix}".rstrip("/"))
        contents.counts = dict.fromkeys(children[prefix], 0)
        for path in visible:
            if not path.startswith(prefix):
                continue
            class_name, slash, _ = path[len(prefix) :].partition("/")
            if not is_image(path):
                if ending := ending_left_out(path.rpartition("/")[2]):
                    contents.left_out[ending] += 1
            elif slash:
                contents.counts[class_name] += 1
            else:
                contents.loose_images = True
        files = []
        for path, data in self.metadata.items():
            where = f"{self.name}/{path}"
            stands_in = path[: -len(path.rpartition("/")[2])]
            below = stands_in[len(prefix) :]
            if stands_in.startswith(prefix) and below.count("/") <= 1 and path in visible:
                files.append(MetadataFile(where, data, below))
            elif folder and stands_in == root:
                files.append(MetadataFile(where, data, "", f"{folder}/"))
        needed = contents.loose_images or len(contents.counts) < 2
        said = labels_in(files, self.name, needed=needed) if files else {}
        if said and not needed:
            images = _keys_below(prefix, visible)
            if not overrides_folders(said, contents.counts, lambda: images, contents.shown):
                said = {}
        contents.said = said or None
        return contents

    def _classes_of(self, train: _SplitContents) -> list[str]:
        """The classes of a train split, in any order."""
        if train.said is None:
            return list(train.counts)
        names = class_names_of(set(train.said.values()), self._names_file(train), self.name)
        return list(dict.fromkeys(names.values()))

    def _names_file(self, contents: _SplitContents) -> bytes | None:
        """The `classes.txt` of a split that metadata labels, or the one beside its folder."""
        beside = "/".join([*contents.prefix.split("/")[:-2], "classes.txt"])
        return self.class_lists.get(f"{contents.prefix}classes.txt", self.class_lists.get(beside))

    def _labelled_layout(self, here: _SplitContents, there: _SplitContents | None) -> Layout:
        """One split of images that metadata labels."""
        said = here.said or {}
        train = {} if there is None else there.said or {}
        names = class_names_of({*said.values(), *train.values()}, self._names_file(here), self.name)
        train_classes = None if there is None else list(there.counts)
        if train:
            train_classes = list(dict.fromkeys(names[label] for label in train.values()))
        spelled = spellings({names[label] for label in said.values()}, train_classes, here.shown)
        counts = Counter(spelled[names[label]] for label in said.values())
        class_names = checked_classes(counts, here.shown, train_classes=train_classes, left_out=here.left_out)
        visible = self._visible()
        missing = self._table.append(Member(archive=0, offset=0, stored=0, size=-1))
        rows = {
            f"{spelled[names[label]]}/{path}": visible.get(here.prefix + path, missing)
            for path, label in said.items()
        }
        return self._layout(class_names, rows, here.left_out)

    def _layout(
        self,
        class_names: list[str],
        rows: dict[str, int],
        left_out: Mapping[str, int],
        remarks: Sequence[str] = (),
        class_of: Mapping[str, str] | None = None,
    ) -> Layout:
        """`class_of` has the class of every row; None: its first folder is."""
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        keys = [(key, labels[class_of[key] if class_of else key.partition("/")[0]]) for key in rows]
        return Layout(keys, class_names, rows, self._table, dict(left_out), list(remarks))

    def is_paired(self, labels: Mapping[str, bytes]) -> bool:
        """Whether labels stand beside the images: some image has a .cls, or every image a .json with a label.

        Images in class folders are no pairs where the .json files all say one label, or divide them as the folders do.
        """
        if not labels:
            return False
        stems = {_labelled_stem(path, labels) for path in self._visible() if is_image(path)}
        if any(f"{stem}.cls" in labels for stem in stems):
            return True
        said = {stem: _label_of(None, labels.get(f"{stem}.json")) for stem in stems}
        folders = {_class_folder(stem) for stem in stems}
        if (
            "" in folders or len(folders) < 2
        ):  # no class folders: a .json without a label, or none, is refused later
            return any(label is not None for label in said.values())
        found = set(said.values())
        if None in found or any(f"{stem}.json" not in labels for stem in stems):
            return False
        pairs = {(_class_folder(stem), label) for stem, label in said.items()}
        return len(found) > 1 and not len(pairs) == len(folders) == len(found)

    def paired_layout(self, labels: Mapping[str, bytes], names_file: bytes | None, split: str) -> Layout:
        """One split of images with `key.cls` or `key.json` beside them. Raises as `open_source` does.

        An image belongs to the label whose key is the longest that its name begins with, up to a dot. Of several
        images of one key those named `key.<extension>` are samples (`key.mask.png` is none); where there is none such,
        the only one is, or the only one called `key.img.<extension>` or the like.
        """
        visible = self._visible()
        said: dict[str, int | str] = {}  # path -> class number or name
        others: dict[str, list[str]] = defaultdict(list)  # key -> images called otherwise
        for path in visible:
            if is_image(path):
                stem = _labelled_stem(path, labels)
                if path.rpartition(".")[0] == stem:
                    said[path] = self._label_beside(stem, path, labels)
                else:
                    others[stem].append(path)
        plain = {path.rpartition(".")[0] for path in said} if others else set()
        for stem, paths in others.items():
            if stem not in plain:
                path = self._main_image(stem, paths)
                said[path] = self._label_beside(stem, path, labels)
        names = class_names_of(said.values(), names_file, self.name, slashes=True)
        tops = {path.partition("/")[0] for path in said if "/" in path}
        flat = {path.partition("/")[0] for path in said if path.count("/") == 1}
        # Pairs stand in a split's folder directly: one of another spelling counts beside its counterpart only.
        kinds = {word[0] for top in tops if (word := split_word(top)) and word[1]}
        apart = "train" in kinds and len(kinds) > 1
        folders = {top for top in tops if top in _SPLIT_NAMES or (apart and top in flat and split_word(top))}
        folder = pick_split(folders, split, self.name, lambda folder: apart)
        train = train_folder(folders, self.name, lambda folder: apart)
        prefix = f"{folder}/" if folder else ""
        place = f"{self.name}/{folder}" if folder else self.name
        found = {names[label] for path, label in said.items() if path.startswith(prefix)}
        train_classes = None
        if train is not None and train != folder:
            train_classes = {names[label] for path, label in said.items() if path.startswith(f"{train}/")}
        spelled = spellings(found, train_classes or None, place)
        counts: dict[str, int] = defaultdict(int)
        rows: dict[str, int] = {}
        class_of: dict[str, str] = {}
        for path, label in said.items():
            if path.startswith(prefix):
                class_name = spelled[names[label]]
                counts[class_name] += 1
                key = f"{class_name.replace('/', '-')}/{path[len(prefix) :]}"
                rows[key], class_of[key] = visible[path], class_name
        sampled = {path.rpartition(".")[0] for path in said} | {_labelled_stem(path, labels) for path in said}
        left_out: Counter[str] = Counter()
        for path in visible:
            file = path.rpartition("/")[2]
            # What shares a sample's key is a field of it, and what begins with "_" is WebDataset's own.
            if not path.startswith(prefix) or is_image(path) or file.startswith("_"):
                continue
            if _labelled_stem(path, labels) not in sampled and (ending := ending_left_out(file)):
                left_out[ending] += 1
        class_names = checked_classes(counts, place, train_classes=train_classes or None, left_out=left_out)
        return self._layout(class_names, rows, left_out, class_of=class_of)

    def _label_beside(self, stem: str, path: str, labels: Mapping[str, bytes]) -> int | str:
        label = _label_of(labels.get(f"{stem}.cls"), labels.get(f"{stem}.json"))
        if label is None:
            raise UsageError(
                f"{self.name} has no label for {shown([path])}: wanted a class number or name in "
                f'{shown([stem])}.cls, or "label" in {shown([stem])}.json'
            )
        return label

    def _main_image(self, stem: str, paths: list[str]) -> str:
        """The sample among images of one key, none of which is called `key.<extension>`."""
        main = [path for path in paths if path[len(stem) + 1 :].casefold().split(".")[0] in _MAIN_IMAGES]
        if len(paths) == 1 or len(main) == 1:
            return (paths if len(paths) == 1 else main)[0]
        raise UsageError(
            f"{self.name} has {shown(sorted(paths))} beside one label: call the sample {shown([stem])}.img and its "
            "extension, or give each a label of its own"
        )


@dataclass
class _SplitContents:
    """What stands in the folder of a split of an archive.

    Attributes:
        prefix: path of the folder, with a slash at its end; "" for the top.
        shown: for messages.
        counts: class folder -> how many images it holds.
        said: path -> label, where metadata labels the images.
        loose_images: whether images stand beside the class folders.
        left_out: see `Source`.
    """

    prefix: str
    shown: str
    counts: dict[str, int] = field(default_factory=dict)
    said: dict[str, int | str] | None = None
    loose_images: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


def _in_hidden(path: str) -> bool:
    return any(is_hidden(part) for part in path.split("/"))


def _class_folder(path: str) -> str:
    """The folder that a file stands in, below that of its split; "" for none."""
    top, _, below = path.rpartition("/")[0].partition("/")
    return below if split_word(top) else f"{top}/{below}".rstrip("/")


def _keys_below(prefix: str, paths: Iterable[str]) -> Iterator[str]:
    """ "class/relative path" of the images in the class folders of a split."""
    for path in paths:
        if path.startswith(prefix) and is_image(path) and "/" in (key := path[len(prefix) :]):
            yield key


def _labelled_stem(path: str, labels: Mapping[str, bytes]) -> str:
    """The key of an image: the longest that has a label, else WebDataset's, up to the first dot of the name."""
    folder, slash, name = path.rpartition("/")
    parts = name.split(".")
    stems = [folder + slash + ".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    for ending in (".cls", ".json"):
        for stem in stems:
            if stem + ending in labels:
                return stem
    return stems[-1]


def _label_of(cls: bytes | None, record: bytes | None) -> int | str | None:
    """The class number or name in a .cls, else in a .json."""
    if cls is not None:
        return label_in_text(cls.decode("utf-8-sig", "replace"))
    try:
        fields = json.loads(record or b"null")
    except (ValueError, RecursionError):
        return None
    return label_in(fields) if isinstance(fields, dict) else None
