"""Every setting of a run, once: default, help and check, from which flags, keywords and the manifest derive.

A new setting is one field of `Settings`, and the place that uses it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from ddfast.arguments import (
    data_of,
    one_of,
    output_folder,
    path_of,
    positive_number,
    whole_number,
    whole_number_or,
)
from ddfast.errors import UsageError
from ddfast.wording import argument

LOADERS = ("auto", "dali", "dali-hw", "torchvision", "pillow")
"""What decodes; see `ddfast.data.loaders.resolve_loader`."""

PRECISIONS = ("float32", "bfloat16", "auto")
"""What models compute in; see `ddfast.ops.precision.compute_dtype`."""

POOL_MEMORY = 4
"""GiB of decoded images that are held at once."""

F = TypeVar("F", bound=Callable[..., Any])

Check = Callable[[Any, str], Any]
"""Takes a value and its keyword, returns the plain value that is meant, or raises UsageError."""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    stage: str | None = None,
    choices: tuple[str, ...] | None = None,
    type: type | None = None,
    check: Check | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    wants: tuple[str, ...] = (),
    manifest: str | None = None,
    python: str | None = None,
    is_place: bool = False,
) -> Any:
    """A field of a run's `Settings` or of a method's options.

    Args:
        default: its value where none is given; left out where one must be.
        help: what it is, with its unit.
        stage: of a method's option, the stage that it decides; default the one that scores or makes pixels.
        choices: the words that are valid.
        type: what the text of a flag is read as, int or float; default the default's own type.
        check: what makes a given value the plain one that is meant, or refuses it.
        flag: its flag where that is not made of its name.
        metavar: what stands for the value in the help.
        wants: stages of which a method must have one to take the setting, or "teacher"; empty: every method takes it.
        manifest: the key that holds it in the manifest, with a dot into an inner table; None where it decides no byte.
        is_place: of a method's option, that it is a path: `run.json` keeps it, and the manifest what is found there.
        python: what its documentation says in place of `help` where a Python value may be more than a flag's.
    """
    metadata = {
        "help": help,
        "stage": stage,
        "choices": choices,
        "type": type,
        "check": check,
        "flag": flag,
        "metavar": metavar,
        "wants": wants,
        "manifest": manifest,
        "python": python,
        "is_place": is_place,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a setting or option; one that is on by default is switched off by it."""
    name = field.metadata.get("flag") or "--" + field.name.replace("_", "-")
    return f"--no-{name[2:]}" if field.metadata.get("flag") is None and is_on(field) else name


def is_place(field: dataclasses.Field[Any]) -> bool:
    """Whether an option is a path."""
    return bool(field.metadata.get("is_place"))


def is_on(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting is a switch that is on by default."""
    return field.default is True


def plain(field: dataclasses.Field[Any], value: Any) -> Any:
    """A given value of a setting or option as the plain one that is meant.

    Raises:
        UsageError: its choices or its check refuse it.
    """
    if field.metadata.get("choices") is not None:
        number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return one_of(str(value) if number else value, field.name, field.metadata["choices"])
    check = field.metadata.get("check")
    if check is None or (value is None and field.default is None):
        return value
    return check(value, field.name)


def _whole(least: int, most: int | None = None) -> Check:
    return lambda value, keyword: whole_number(value, keyword, least=least, most=most)


def _whole_or(*words: str) -> Check:
    return lambda value, keyword: whole_number_or(value, keyword, words)


def _images(value: Any, keyword: str) -> int | str:
    """A number of images, or a word for one; other words are told of as no numbers."""
    words = ("auto", "all")
    return value if isinstance(value, str) and value in words else whole_number(value, keyword, least=1)


def _switch(value: Any, keyword: str) -> bool:
    return bool(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a run. A method's own are in its `Options`."""

    data: Any = option(
        help="folder with train/ and val/ or test/, a .zip or .tar shards of that layout, Parquet files, an .npz, "
        "CIFAR's or MNIST's own files, a torchvision set (NAME, or NAME:FOLDER where its files lie), or hf:NAME of "
        "Hugging Face's Hub",
        metavar="PATH",
        check=data_of,
        python="folder, archive or set by name, or images in memory: (images, labels), a torch or Hugging Face "
        "Dataset, or {'train': ..., 'test': ...} of these, as `ddfast.data.open_source` takes them",
    )
    teacher: Any = option(
        None,
        "teacher file, .pt state dict, or published weights: torchvision:NAME, timm:NAME, hf:NAME",
        metavar="FILE",
        wants=("teacher",),
        python="teacher file, `torchvision:NAME`, `timm:NAME`, `hf:NAME`, a loaded `Teacher` that knows its file, or a "
        "function without arguments that loads one once the other settings are checked. Methods that choose crops need "
        "one, and sre2l",
    )
    ipc: int = option(help="images per class, a whole number", type=int, check=_whole(1), manifest="ipc")
    out: Any = option(
        help="output folder, a new one",
        metavar="FOLDER",
        check=output_folder,
        python="output folder, made here; see the README for what it holds",
    )
    label_teacher: Any = option(
        None,
        "another teacher for the soft labels, an early checkpoint for example; default --teacher",
        metavar="FILE",
        wants=("relabel",),
        python="another teacher for the soft labels, an early checkpoint for example; None: `teacher`",
    )
    seed: int = option(
        0,
        "decides the pool, the coalitions, the noise and the random draws",
        check=_whole(0, 2**63 - 1),
        manifest="seed",
    )
    images_per_class: int | str = option(
        "auto",
        "sources that the run may choose from of each class: a number, all, or auto: 300 for methods that choose "
        "crops, all for the others",
        metavar="N",
        check=_images,
        manifest="images_per_class",
    )
    factor: str | int = option(
        "auto",
        "tiles per side of an image; auto: what the method says, of those that choose crops 1 up to 64 px and 2 above",
        choices=("auto", "1", "2"),
        manifest="factor",
    )
    image_size: int | None = option(
        None,
        "side of the images in pixels; default the teacher's, and without one that of the first image, 224 at most",
        type=int,
        metavar="PX",
        check=_whole(1),
        manifest="image_size",
    )
    image_format: str = option(
        "png", "format of the images", flag="--format", choices=("png", "jpeg"), manifest="format"
    )
    preset: str | None = option(
        None,
        "named option values of the method, `paper` for infoutil; default none",
        metavar="NAME",
        manifest="preset",
    )
    precision: str = option(
        "float32",
        "float32, bfloat16, or auto: bfloat16 where it is known to be faster; chosen once for all processes of a run",
        metavar="{float32,bfloat16,auto}",
        check=lambda value, keyword: one_of(value, keyword, PRECISIONS),
        manifest="arithmetic.precision",
    )
    device: str = option(
        "auto",
        "auto, cpu, cuda or cuda:N, the GPU of that number from 0; auto: a GPU where there is one",
        metavar="NAME",
    )
    batch_size: str | int = option(
        "auto",
        "images in flight, a number or auto: four micro-batches; never changes the result",
        metavar="N",
        check=_whole_or("auto"),
    )
    workers: int | None = option(
        None, "decoding threads; default one a core, 0: none of their own", type=int, check=_whole(0)
    )
    loader: str = option(
        "auto",
        "what decodes, dali-hw a GPU's JPEG engine; part of the arithmetic: a resumed run keeps what it began with",
        choices=LOADERS,
        manifest="arithmetic.loader",
    )
    threads: str | int = option(
        "auto",
        "CPU threads of one process, part of the arithmetic; auto: DDFAST_THREADS or every usable core, 16 at most and "
        "4 beside a GPU, and on resumption what the run began with",
        metavar="N",
        check=_whole_or("auto"),
        manifest="arithmetic.threads",
    )
    label_top_k: str | int | None = option(
        "auto",
        "probabilities stored of each soft label: a number, all, or auto: all of up to 2048 classes, else 256",
        metavar="N",
        wants=("relabel",),
        check=_whole_or("auto", "all"),
        manifest="label_top_k",
    )
    scores: Any = option(
        None,
        "folder of a run whose score table has the same settings: it is copied, not computed; default none",
        metavar="FOLDER",
        wants=("score",),
        check=path_of,
    )
    resume: bool = option(
        False, "continue an unfinished run, start a missing one, leave a finished one", check=_switch
    )
    preflight: bool = option(
        True,
        "skip the try of the teacher on training images",
        check=_switch,
        python="try the teacher on 64 to 512 training images first, and refuse it where they speak for another "
        "class order or no better than chance",
    )
    class_order: Any = option(
        None,
        "classes in the order of the teacher's outputs, one a line or JSON; default the data's order",
        metavar="FILE",
        wants=("teacher",),
        python="the classes in the order of the teacher's outputs where that is not the data's: names, {index: name}, "
        "or a text or JSON file of them. The outputs are put into the data's order",
    )
    label_class_order: Any = option(
        None,
        "the same of the label teacher; default --class-order where its file does not name its classes",
        metavar="FILE",
        wants=("relabel",),
        python="the same of the label teacher; None: `class_order` too where its file does not name its classes",
    )
    class_names: Any = option(
        None,
        "names to show for classes whose own are WordNet ids or the like: a class and its name a line, one name a "
        "line, or JSON; the folder names stay the keys; default the data's own",
        metavar="FILE",
        python="names to show for classes whose own are WordNet ids or the like: {class: name}, names in the order of "
        "the classes, or a text or JSON file of them. The data's own stay the keys",
    )
    normalization: Any = option(
        "auto",
        "mean and deviation of the pixels, where no teacher file says them: imagenet, cifar10, tinyimagenet, none, "
        "numbers as mean,mean,mean/std,std,std, or auto: imagenet, as train-teacher uses",
        metavar="NAME",
        python="mean and deviation of the pixels where no teacher says them: a name (imagenet, cifar10, ...), "
        "(means, deviations), or auto, what train_teacher uses",
    )
    pool_memory: float = option(
        POOL_MEMORY,
        "GiB of decoded images held at once, above which they are decoded anew; never changes the result",
        type=float,
        metavar="GIB",
        check=lambda value, keyword: positive_number(value, keyword, zero=True),
    )
    evaluate_every: int = option(
        0,
        "steps after which a student is trained and tested for the curve; 0: never",
        metavar="N",
        wants=("synthesize",),
        check=_whole(0),
        manifest="evaluate_every",
    )
    log_dir: Any = option(
        None,
        "folder of history.jsonl, the run's numbers as they come, and of TensorBoard's files where it is installed; "
        "never inside of --out; default none",
        metavar="FOLDER",
        check=path_of,
        python="folder of `history.jsonl`, the run's numbers as they come, and of TensorBoard's files where it is "
        "installed; never inside of `out`",
    )
    wandb: str | None = option(
        None,
        "project of Weights & Biases that gets the same numbers, where wandb is installed; default none",
        metavar="PROJECT",
    )
    quiet: bool = option(False, "print nothing but the result", check=_switch)

    def checked(self) -> Settings:
        """The same with plain Python values.

        Raises:
            UsageError: a value that no run could use; the message names it as its caller does.
        """
        return dataclasses.replace(self, **{f.name: plain(f, getattr(self, f.name)) for f in fields()})

    def check_taken(self, method: str, offers: Collection[str]) -> None:
        """Refuse a setting that means nothing to a method.

        Args:
            method: its name.
            offers: its stages, and "teacher" where it uses one.

        Raises:
            UsageError: one is given.
        """
        for each in fields():
            if not is_taken(each, offers) and _is_given(getattr(self, each.name), each.default):
                lacks = _LACKS[each.metadata["wants"][0]]
                raise UsageError(f"{argument(each.name)} is nothing to {method}, which {lacks}: leave it out")

    def in_manifest(self, offers: Collection[str]) -> dict[str, Any]:
        """What the manifest holds of the settings that a method takes, by its key there."""
        return {
            each.metadata["manifest"]: getattr(self, each.name)
            for each in fields()
            if each.metadata["manifest"] is not None and is_taken(each, offers)
        }


def _is_given(value: Any, default: Any) -> bool:
    return value is not None if default is None else bool(value != default)


_LACKS = {
    "teacher": "uses no teacher",
    "relabel": "keeps hard labels",
    "score": "scores no images",
    "synthesize": "makes no pixels",
}


def fields() -> tuple[dataclasses.Field[Any], ...]:
    """The settings of a run."""
    return dataclasses.fields(Settings)


def is_taken(field: dataclasses.Field[Any], offers: Collection[str]) -> bool:
    """Whether a method with these stages (and "teacher", where it uses one) takes a setting."""
    wants = field.metadata["wants"]
    return not wants or any(name in offers for name in wants)


def described(function: F) -> F:
    """A function whose `**settings` are those of a run, with their names and defaults in its signature.

    The line `{settings}` of its docstring becomes a paragraph for every setting.
    """
    signature = _signature(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)  # names an argument that is missing
        return function(*args, **kwargs)

    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__doc__ = _documented(function.__doc__ or "")
    return cast(F, called)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    parameters: list[inspect.Parameter] = []
    given = inspect.signature(function)
    for parameter in given.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            parameters += map(_parameter, fields())
            parameter = parameter.replace(name="options")
        parameters.append(parameter)
    return given.replace(parameters=parameters)


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type
    )


def _documented(text: str) -> str:
    line = next((line for line in text.splitlines() if line.strip() == "{settings}"), None)
    if line is None:  # docstrings are switched off
        return text
    indent = line[: len(line) - len(line.lstrip())]
    told = [f"{each.name}: {each.metadata['python'] or each.metadata['help']}." for each in fields()]
    filled = [
        textwrap.fill(one, 112, initial_indent=indent, subsequent_indent=f"{indent}    ") for one in told
    ]
    return text.replace(line, "\n".join(filled))
