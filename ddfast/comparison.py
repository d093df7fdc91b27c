"""`ddfast.compare`: distilled sets beside random sets of the same size, a coreset and the teacher.

Everything in a table is trained by one recipe: the same students, steps and augmentation, and of soft labels those of
the same teacher. Sets of other sizes, or labelled by other teachers, come into tables of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddfast.arguments import architecture_options, one_of, output_folder, path_of
from ddfast.data import open_source
from ddfast.data.sources import Source, check_outside
from ddfast.distillation import distill
from ddfast.errors import DDFastError, UsageError
from ddfast.files import atomic_write_text, make_folder
from ddfast.isolation import isolated
from ddfast.models.normalization import AUTO, NORMALIZATIONS
from ddfast.models.published import published
from ddfast.models.registry import check_model, list_models
from ddfast.models.teacher import Teacher, load_teacher
from ddfast.output.distilled import MANIFEST, DistilledSet
from ddfast.output.evaluations import keep_evaluation
from ddfast.pipeline.run import RUN
from ddfast.pipeline.teachers import load_again
from ddfast.progress import say
from ddfast.report import Arm, write_comparison
from ddfast.training.comparison import (
    COLUMNS,
    CSV_NAME,
    Better,
    Comparison,
    Row,
    Table,
    comparison_csv,
    in_words,
)
from ddfast.training.device import resolve_device
from ddfast.training.evaluation import (
    EvaluationResult,
    evaluate,
    read_distilled,
    rules_of,
    seeds_of,
    source_of_test_split,
)
from ddfast.training.image_sets import ImageSet, measure_accuracy, read_test_set
from ddfast.training.protocol import Protocol
from ddfast.wording import argument, plural

CORESETS = ("herding", "k_center", "k_means", "forgetting", "none")


# What is compared ----------------------------------------------------------------------------------------------


@dataclass
class _Given:
    """A set that was given, with its teachers where their files are there."""

    name: str
    opened: DistilledSet
    teacher: Teacher | None
    labeller: Teacher | None

    @property
    def size(self) -> tuple[float, ...]:
        """What the sets of a table have in common: images, their side, the tiles or regions that they stand for, and
        their normalisation, which is also that of the random images."""
        tiles = self.opened.factor if self.opened.pixels is not None else 1
        regions = 0 if self.boxes is None else self.boxes.shape[1]
        shape = len(self.opened), self.opened.image_size, self.opened.factor, tiles, regions
        return *shape, *map(float, (*self.opened.mean, *self.opened.std))

    @property
    def boxes(self) -> Tensor | None:
        """The regions that students see beside the images, int64 [N, P, 4]; None for none."""
        held = None if self.opened.pixels is None else self.opened.pixels.regions
        return None if held is None else held.boxes()

    @property
    def labelled_by(self) -> str | None:
        """Which teacher the soft labels are from, at which temperature and how many of them; None for hard ones."""
        if self.opened.stored is None:
            return None
        said = self.opened.manifest.get("label_teacher") or {}
        return f"{said.get('sha256')} {self.opened.temperature} {self.opened.manifest.get('label_top_k')}"


@isolated()
def compare(
    distilled: str | Path | DistilledSet | Sequence[str | Path | DistilledSet],
    data: str | Path,
    *,
    teacher: Teacher | str | Path | None = None,
    coreset: str = "herding",
    arch: str | None = None,
    arch_options: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 3,
    protocol: str | Protocol = "rded",
    epochs: int | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compare distilled sets with random sets of the same size, a coreset and the teacher.

    Every set is trained on twice: on its stored soft labels, where it has them, and on hard labels. Within a column of
    a table students, steps and augmentation are the same, and soft labels are those of the same teacher. A random set
    has as many images and tiles, drawn from as many images per class as the set could choose from.

    Args:
        distilled: output folders of `ddfast distill`, finished.
        data: the data they were distilled from.
        teacher: the teacher or its file, where that has moved; it labels the random sets and chooses the coreset.
            None: the one that a set's `run.json` names, where it is still there.
        coreset: "herding", "k_center", "k_means", "forgetting" or "none".
        arch: the students' architecture; None: the one that pixels were matched on, else the teacher's.
        arch_options: its keyword arguments.
        seeds: how many students each (seeds 0, 1, ...), or their seeds.
        protocol: a name of `PROTOCOLS` or one of your own. The column of hard labels takes its numbers too; one that is
            for hard labels has no other column.
        epochs: passes over each set; None: the protocol's.
        batch_size: images a step; None: the protocol's.
        precision: "float32", "bfloat16" or "auto".
        out: folder for `comparison.csv`, `report.html` and the sets that are made; None: beside the first set, with
            `-comparison` behind its name. Sets that are there already are taken as they are.
        device: "auto", "cpu" or "cuda".
        workers: decoding threads.
        quiet: print nothing.

    Raises:
        UsageError: an unfinished set, data of other classes, an unknown name, or a teacher that is not a set's.
    """
    alone = isinstance(distilled, (str, Path, DistilledSet))
    folders: list[Any] = [distilled] if alone else list(distilled)  # type: ignore[list-item, arg-type]
    if not folders:
        raise UsageError(f"{argument('distilled')}: a comparison needs at least one distilled set, got none")
    one_of(coreset, "coreset", CORESETS)
    rules, chosen, options = rules_of(protocol), seeds_of(seeds), architecture_options(arch_options)
    if arch is not None:
        check_model(arch, **options)
    roots = [
        Path(os.path.abspath(each.root if isinstance(each, DistilledSet) else path_of(each, "distilled")))
        for each in folders
    ]
    roots = list(dict.fromkeys(roots))
    out = output_folder(roots[0].with_name(f"{roots[0].name}-comparison") if out is None else out)
    _check_own(out)
    opened = [DistilledSet(root) for root in roots]
    for each in opened:
        source_of_test_split(data, each)  # refuses other classes, before anything is trained
    source, tested = open_source(data, "train"), source_of_test_split(data, opened[0])
    check_outside(out, source)
    notes: list[str] = []
    given = [
        _Given(name, each, *_teachers(each, teacher, notes))
        for name, each in zip(_names(roots), opened, strict=True)
    ]
    where = resolve_device(device)
    settings = {
        "seeds": chosen,
        "epochs": epochs,
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
        "quiet": quiet,
    }
    tests: dict[int, ImageSet] = {}
    tables = []
    for group in _groups(given):
        first = group[0].opened
        size = first.image_size
        if size not in tests:
            tests[size] = read_test_set(
                tested, size, enlarged=rules.enlarged_tests, workers=workers, quiet=quiet
            )
        students = {"arch": arch, "arch_options": options} if arch is not None else _students(group, options)
        trial = _Trial(rules, tests[size], {**settings, **students}, group[0].size[3] > 1, group[0].boxes)
        baselines = _Baselines(source, data, out, coreset, device, workers, quiet, notes)
        tables.append(_table(group, trial, baselines, where, precision))
        found = Comparison(tables, list(dict.fromkeys(notes)), out)
        _write(found, source, data)  # after every table: a run that ends early has those before
    return found


def _check_own(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier comparison: nothing of it is written over.

    Raises:
        UsageError: it does.
    """
    held = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    visible = {name for name in held if not name.startswith(".")}
    if visible and (MANIFEST in held or not visible & {CSV_NAME, "sets"}):
        raise UsageError(f"{out} is not empty and holds no comparison; choose another {argument('out')}")


def _names(roots: Sequence[Path]) -> list[str]:
    """The folders' own names, or where two are equal or meant for other rows, their paths."""
    short = [root.name for root in roots]
    taken = {"random", "teacher", *CORESETS}
    return [
        name if short.count(name) == 1 and name not in taken else str(root)
        for name, root in zip(short, roots, strict=True)
    ]


def _teachers(
    opened: DistilledSet, given: Teacher | str | Path | None, notes: list[str]
) -> tuple[Teacher | None, Teacher | None]:
    """The teacher that chooses, and the one whose soft labels the set has; None where it cannot be had.

    Raises:
        UsageError: the given one is neither.
    """
    plan, facts = opened.manifest, _facts(opened.root)
    main, labels = plan.get("teacher"), plan.get("label_teacher")
    found: dict[str, Teacher | None] = {"teacher": None, "label_teacher": None}
    seen, failed = False, None
    for role, said in (("teacher", main), ("label_teacher", labels)):
        if not isinstance(said, dict):
            continue
        same = isinstance(main, dict) and main.get("sha256") == said.get("sha256")
        named = facts.get("teacher" if same else role)
        for spec in [named] if given is None else [given, named]:
            try:
                teacher = spec if isinstance(spec, Teacher) else load_again(spec, plan, role)
            except (DDFastError, OSError) as error:
                if spec is given:
                    failed = error
                else:
                    notes.append(f"{opened.root}: {error}")
                continue
            if teacher.sha256 == said.get("sha256"):
                found[role] = teacher
                seen = seen or spec is given
                failed = None if spec is given else failed
                break
    known = [str(one.get("sha256")) for one in (main, labels) if isinstance(one, dict)]
    if given is not None and known and not seen:
        if failed is not None:
            raise failed
        raise UsageError(
            f"{argument('teacher')} {given} is not the teacher of {opened.root}, whose SHA-256 begins with "
            f"{' or '.join(dict.fromkeys(digest[:12] for digest in known))}"
        )
    if (
        given is not None and main is None and labels is None
    ):  # a set that asked none: it only chooses the coreset
        found["teacher"] = given if isinstance(given, Teacher) else _chooses(given, opened)
    return found["teacher"], found["label_teacher"]


def _chooses(given: str | Path, opened: DistilledSet) -> Teacher:
    """A teacher that a set knows nothing of; published ones call the classes as the set does."""
    return load_teacher(str(given), class_names=None if published(given) is None else opened.class_names)


def _facts(root: Path) -> dict[str, Any]:
    """`run.json`, as far as it is there."""
    try:
        found = json.loads((root / RUN).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _groups(given: Sequence[_Given]) -> list[list[_Given]]:
    """Sets that may stand in one table, in the order in which they were given."""
    groups: list[list[_Given]] = []
    for one in sorted(
        given, key=lambda each: each.labelled_by is None
    ):  # those with hard labels join the others
        for group in groups:
            if group[0].size == one.size and one.labelled_by in (None, group[0].labelled_by):
                group.append(one)
                break
        else:
            groups.append([one])
    order = {id(one): place for place, one in enumerate(given)}
    return sorted(groups, key=lambda group: min(order[id(one)] for one in group))


def _students(group: Sequence[_Given], options: Mapping[str, Any]) -> dict[str, Any]:
    """The students' architecture where none is given: what pixels were matched on, else the teacher's.

    Raises:
        UsageError: no set says one.
    """
    for one in group:
        made = (one.opened.manifest.get("options") or {}).get("synthesize") or {}
        if isinstance(made.get("arch"), str):
            return {"arch": made["arch"], "arch_options": options}
    for one in group:
        for teacher in filter(None, (one.labeller, one.teacher)):
            found = {**teacher.arch_options, **options}
            try:
                check_model(teacher.arch, one.opened.image_size, **found)
            except UsageError:
                continue
            return {"arch": teacher.arch, "arch_options": found}
    for one in group:  # the teacher's file is gone; the manifest names what it was
        for said in (one.opened.manifest.get("label_teacher"), one.opened.manifest.get("teacher")):
            named = said.get("arch") if isinstance(said, dict) else None
            if named in list_models():
                return {"arch": named, "arch_options": options}
    raise UsageError(f"{argument('arch')} is missing: no set says which architecture to train")


# Students ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """How students of a table are trained.

    `decoded`: on the tiles of every image, as those of optimised ones are. `boxes`: of the first set's images, where
    they have regions; images that were drawn or chosen show theirs in the same places.
    """

    rules: Protocol
    test: ImageSet
    settings: Mapping[str, Any]
    decoded: bool
    boxes: Tensor | None = None

    def results(self, opened: DistilledSet, columns: Iterable[str]) -> dict[str, EvaluationResult]:
        """The accuracies of students of a set, by column."""
        found = {}
        for column in columns:
            if column == "soft" and (self.rules.labels == "hard" or opened.stored is None):
                continue
            images: Any = opened
            if self.boxes is not None and opened.pixels is None:
                held = read_distilled(opened)
                images = replace(held, boxes=self.boxes[torch.arange(len(held.labels)) % len(self.boxes)])
            # As those of optimised images do, students of pictures see their tiles, in as many passes.
            rules = replace(self.rules, labels=column, decode=self.rules.decode or self.decoded)
            say(f"{opened.root}: {column} labels", quiet=bool(self.settings["quiet"]))
            result = evaluate(images, self.test, protocol=rules, **self.settings)
            if (
                column == "soft" and images is not opened
            ):  # of images in memory nobody knows who labelled them
                said = opened.manifest.get("label_teacher") or {}
                digests = {**result.digests, "teacher": str(said.get("sha256"))[:12]}
                result = replace(result, digests=digests)
            found[column] = result
        return found


@dataclass(frozen=True)
class _Baselines:
    """Makes the sets that others are measured by."""

    source: Source
    data: str | Path
    out: Path
    coreset: str
    device: str
    workers: int | None
    quiet: bool
    notes: list[str]

    def pool(self, of: _Given) -> int | str:
        """Images of each class that a set could choose from; "all" where no class has more."""
        said = of.opened.manifest.get("images_per_class", "all")
        most = np.bincount(self.source.samples.labels).max()
        return "all" if not isinstance(said, int) or said >= most else said

    def random(self, of: _Given, labeller: Teacher | None) -> DistilledSet:
        """As many whole images, drawn; with the soft labels of `labeller`, else with hard ones."""
        return self._made("random" if labeller is not None else "random_hard", of, labeller, labeller)

    def best_coreset(self, of: _Given, teacher: Teacher, labeller: Teacher | None) -> DistilledSet:
        """As many whole images, chosen by a teacher."""
        return self._made(self.coreset, of, teacher, labeller)

    def _made(
        self, method: str, of: _Given, teacher: Teacher | None, labeller: Teacher | None
    ) -> DistilledSet:
        plan, opened = of.opened.manifest, of.opened
        pool = self.pool(of)
        marks: list[str] = []
        said: dict[str, Any] = {}
        if teacher is None:
            said["normalization"] = own = (opened.mean, opened.std)
            if [list(values) for values in own] != [list(values) for values in NORMALIZATIONS[AUTO]]:
                marks.append(hashlib.sha256(repr(own).encode()).hexdigest()[:6])
        else:
            said["teacher"] = teacher
            marks.append(teacher.sha256[:6])
            if labeller is not None and labeller.sha256 != teacher.sha256:
                said["label_teacher"] = labeller
                marks.append(labeller.sha256[:6])
            said["label_top_k"] = plan.get("label_top_k") or "all"
        if plan.get("display_names"):
            said["class_names"] = dict(zip(plan["class_names"], plan["display_names"], strict=True))
        ipc, factor = int(plan["ipc"]), opened.factor
        if opened.image_size % factor:
            # Tiles of padded images have no counterpart among pictures: as many whole images stand for them.
            self.notes.append(
                f"{plural(factor, 'tile')} per side do not divide {opened.image_size} px: beside {opened.root.name} "
                "stand as many whole images as it has tiles, in more bytes"
            )
            ipc, factor = ipc * factor**2, 1
        parts = [method, f"ipc{ipc}", f"{opened.image_size}px", f"{factor}tiles"]
        name = "-".join([*parts, f"pool{pool}", f"seed{plan.get('seed', 0)}", *marks])
        return DistilledSet(
            distill(
                method,
                data=self.data,
                out=make_folder(self.out / "sets") / name,
                ipc=ipc,
                seed=int(plan.get("seed", 0)),
                images_per_class=pool,
                factor=str(factor),
                image_size=opened.image_size,
                device=self.device,
                workers=self.workers,
                quiet=self.quiet,
                resume=True,
                **said,
            )
        )


def _table(
    group: Sequence[_Given], trial: _Trial, baselines: _Baselines, where: Any, precision: str
) -> Table:
    """Train on the sets of a group and on what they are measured by."""
    notes, first = baselines.notes, group[0].opened
    labeller = next((one.labeller for one in group if one.labeller is not None), None)
    teacher = next((one.teacher for one in group if one.teacher is not None), labeller)
    has_soft = trial.rules.labels == "soft" and any(one.opened.stored is not None for one in group)
    if has_soft and labeller is None:
        notes.append(
            f"{group[0].name}: the teacher of its soft labels is not there, so the random set has hard labels only; "
            f"{argument('teacher')} says where it is"
        )
    drawn: dict[Any, Row] = {}
    random_of: dict[str, str] = {}
    for one in group:
        pool = baselines.pool(one)
        if pool not in drawn:
            made = baselines.random(one, labeller if has_soft else None)
            name = "random" if not drawn else f"random, {pool} a class"
            drawn[pool] = Row(name, "random", made.root, "random", trial.results(made, COLUMNS))
        random_of[one.name] = drawn[pool].name
    rows = [
        Row(
            one.name,
            "set",
            one.opened.root,
            str(one.opened.manifest.get("method")),
            trial.results(one.opened, COLUMNS),
            random_of[one.name],
        )
        for one in group
    ]
    rows += drawn.values()
    if baselines.coreset != "none":
        if teacher is None:
            notes.append(
                f"no {baselines.coreset} coreset beside {group[0].name}: it needs a teacher, and there is none"
            )
        else:
            made = baselines.best_coreset(group[0], teacher, labeller if has_soft else None)
            columns = COLUMNS if has_soft and labeller is not None else ("hard",)
            method = baselines.coreset
            rows.append(Row(method, "coreset", made.root, method, trial.results(made, columns)))
    reference = None
    shown = labeller or teacher
    if shown is not None:
        top1 = shown.top1
        if shown.image_size == first.image_size:
            model = copy.deepcopy(shown.model).to(where)
            top1 = measure_accuracy(model, trial.test, shown.mean, shown.std, where, precision).top1
        reference = None if top1 is None else (shown.arch, float(top1))
    return Table(rows, int(first.manifest["ipc"]), len(first), first.image_size, reference)


# What is written -----------------------------------------------------------------------------------------------


def _write(found: Comparison, source: Source, data: str | Path) -> None:
    """The CSV, a page for each table, and the results in the folders of the sets that were given."""
    make_folder(found.out)
    atomic_write_text(found.csv, comparison_csv(found))
    for number, table in enumerate(found.tables, start=1):
        out = found.out if number == 1 else found.out / f"table-{number}"
        column = COLUMNS[0] if all(COLUMNS[0] in row.results for row in table.rows) else COLUMNS[1]
        arms = [
            Arm(row.name, row.folder, row.results[column].top1, note=_note(row, column)) for row in table.rows
        ]
        shown = table.recipe(column)
        digits = ", ".join(f"{name} labels {table.recipe(name).recipe}" for name in table.columns)
        write_comparison(
            out,
            title=f"{plural(table.images, 'image')} beside as many random ones",
            arms=arms,
            facts={
                "Students": f"{len(shown.seeds)} of {shown.arch} each",
                "Protocol": f"{shown.protocol}, {shown.steps} steps of batch {shown.batch_size}",
                "Recipe": digits,
                "Data": source.name,
            },
            source=source,
            lead=" ".join(f"{in_words(one)}." for one in table.better()),
            reference=None if table.teacher is None else ("teacher", table.teacher[1]),
            bars_note=f"Top-1 on the test images of students trained with {column} labels.",
        )
        better = {one.name: one for one in table.better()}
        for row in table.rows:
            for column, result in row.results.items():
                if row.kind == "set":
                    _keep(row.folder, result, better[row.name] if better[row.name].labels == column else None)


def _keep(folder: Path, result: EvaluationResult, better: Better | None) -> None:
    said = {} if better is None else {"better_than_random": {"points": better.points, "error": better.error}}
    try:
        keep_evaluation(folder, {**result.as_dict(), **said})
    except UsageError as error:  # the comparison stands without it
        say(f"the result is not kept in the folder: {error}")


def _note(row: Row, column: str) -> str:
    others = [
        f"{name} labels {str(result).removeprefix('top1 ')}"
        for name, result in row.results.items()
        if name != column
    ]
    return "; ".join([f"made by {row.method}" if row.kind == "set" else "", *others]).strip("; ")
