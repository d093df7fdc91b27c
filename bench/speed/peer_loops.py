"""The loops of the reference repositories, run as they stand: their own code, an iteration at a time.

Nothing of theirs is in this repository. `DDFAST_PEERS` names a folder with checkouts of those in `REPOSITORIES`, each
in a folder whose name ends in the repository's. A loop over iterations is taken out of its file by the syntax tree and
run in a namespace that holds what their `main` sets up before it; what a gate must know (which images, which
augmentation, which weights) is put there in place of their own draws.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.speed.registry import Unavailable

PEERS = "DDFAST_PEERS"
STRATEGY = "color_crop_cutout_flip_scale_rotate"
ENDLESS = 1 << 30

# Repositories by name, with their owners and a file that a checkout has.
REPOSITORIES = {
    "DatasetCondensation": ("VICO-UoE", "main_DM.py"),
    "CMIDD": ("ndhg1213", "main_DM.py"),
    "Efficient-Dataset-Condensation": ("snu-mllab", "condense.py"),
    "IDM": ("uitrbn", "IDM_cifar10.py"),
    "SRe2L": ("VILA-Lab", "recover_cifar.py"),
    "mtt-distillation": ("GeorgeCazenavette", "distill.py"),
}
_MODULES = (
    *("utils", "networks", "pretrain"),  # DatasetCondensation, CMIDD
    *("data", "misc", "models"),  # Efficient-Dataset-Condensation
    *("dc_utils", "dc_networks", "utils_edc", "augment_edc"),  # IDM
    *("recover_cifar", "reparam_module"),  # SRe2L, mtt-distillation
)


class PeerLoop:
    """A loop of a repository, one pass at a time.

    Attributes:
        names: its namespace: the synthetic images, their optimiser, `args`, ...; beside it `make_network`, which
            makes a ConvNet of theirs.
    """

    def __init__(self, path: Path, variable: str, names: dict[str, Any]) -> None:
        """`variable`: of the loop, the only one in the file that runs over it."""
        self._code = _loop(path, variable)
        self.names = {**names, "print": lambda *_: None}

    def step(self, number: int = 1) -> None:
        """A pass of theirs, in which the loop's variable has this value."""
        self.names["passes"] = (number,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of functions that PyTorch has since renamed
            exec(self._code, self.names)

    def over(self, path: Path, variable: str) -> PeerLoop:
        """Another loop, which goes on in the namespace of this one."""
        other = PeerLoop(path, variable, {})
        other.names = self.names
        return other

    @property
    def pixels(self) -> Tensor:
        """The synthetic images."""
        found: Tensor = self.names["image_syn"].detach()
        return found


def dm_loop(
    repository: str, images: Tensor, labels: Tensor, start: Tensor, ipc: int, real_batch: int
) -> PeerLoop:
    """The iterations of `main_DM.py`.

    Args:
        repository: "DatasetCondensation" or "CMIDD".
        images: float32 [N, 3, H, W], normalised.
        labels: int64 [N].
        start: float32 [classes * ipc, 3, H, W], what the synthetic images begin with.
        ipc: images per class.
        real_batch: real images a class and iteration.

    Raises:
        Unavailable: there is no checkout.
    """
    path = checkout(repository)
    (utils,) = _modules(path.parent, "utils")
    arguments = {"dsa": True, "dsa_strategy": STRATEGY, "dsa_param": utils.ParamDiffAug()}
    names = _condensation(utils, images, labels, start, ipc, real_batch, 1.0, arguments)
    return PeerLoop(path, "it", names)


def dsa_loops(
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    ipc: int,
    real_batch: int,
    outer_loop: int,
    inner_loop: int,
    batch_train: int = 256,
) -> tuple[PeerLoop, PeerLoop]:
    """DatasetCondensation's `main.py` with the method DSA: its iterations, and its steps on the last one's network.

    Args:
        images, labels, start, ipc, real_batch: see `dm_loop`.
        outer_loop: steps of the pixels on a network.
        inner_loop: epochs that the network trains between two steps.
        batch_train: images in a step of the network.

    Raises:
        Unavailable: there is no checkout.
    """
    path = checkout("DatasetCondensation").with_name("main.py")
    (utils,) = _modules(path.parent, "utils")
    arguments = {
        "dsa": True,
        "dsa_strategy": STRATEGY,
        "dsa_param": utils.ParamDiffAug(),
        "dis_metric": "ours",
        "lr_net": 0.01,
        "batch_train": batch_train,
        "outer_loop": outer_loop,
        "inner_loop": inner_loop,
    }
    names = _condensation(utils, images, labels, start, ipc, real_batch, 0.1, arguments)
    loop = PeerLoop(path, "it", {**names, "criterion": nn.CrossEntropyLoss(), "nn": nn})
    # So that what a gate puts into the namespace holds in here as well.
    loop.names["epoch"] = types.FunctionType(utils.epoch.__code__, loop.names)
    return loop, loop.over(path, "ol")


def idc_loops(
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    ipc: int,
    real_batch: int,
    factor: int,
    inner_loop: int,
    net_samples: int,
) -> tuple[PeerLoop, PeerLoop]:
    """Efficient-Dataset-Condensation's `condense.py` on CIFAR-10: its iterations, and its steps on the last network.

    Args:
        images: float32 [N, 3, H, W] in [0, 1].
        labels: int64 [N], ascending.
        start: float32 [classes * ipc, 3, H, W] in [0, 1].
        ipc, real_batch: see `dm_loop`.
        factor: tiles per side.
        inner_loop: steps of the pixels on a network.
        net_samples: real images that a network trains on after a step.

    Raises:
        Unavailable: there is no checkout.
    """
    path = checkout("Efficient-Dataset-Condensation")
    data, misc, augment, convnet = _modules(
        path.parent, "data", "misc.utils", "misc.augment", "models.convnet"
    )
    device, classes = start.device, int(labels.max()) + 1
    # A name of NumPy that is gone, and a permutation that goes to the GPU unless it is told where to.
    misc.np = _with(np, int=int)
    names: dict[str, Any] = {
        "np": np,
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "optim": torch.optim,
        "ceil": _ceil,
        "DiffAug": augment.DiffAug,
        "utils": misc,
        "MEANS": data.MEANS,
        "STDS": data.STDS,
        **{name: getattr(misc, name) for name in ("rand_bbox", "AverageMeter", "accuracy", "get_time")},
        "random_indices": functools.partial(misc.random_indices, device=device),
        "transforms": data.transforms,
        "time": importlib.import_module("time"),
    }
    _define(path, ("Synthesizer", "diffaug", "remove_aug", "dist", "add_loss", "matchloss"), names)
    _define(path.with_name("train.py"), ("train_epoch",), names)
    arguments = types.SimpleNamespace(
        ipc=ipc,
        factor=factor,
        decode_type="single",
        batch_syn_max=128,
        match="grad",
        metric="mse",
        bias=False,
        fc=False,
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        inner_loop=inner_loop,
        n_data=net_samples,
        net_epoch=1,
        mixup_net="cut",
        mix_p=0.5,
        beta=1.0,
        nclass=classes,
        dataset="cifar10",
        aug_type="color_crop_cutout",
        fix_iter=1,
        pt_from=-1,
        early=0,
        print_freq=ENDLESS,
        verbose=False,
        epoch_print_freq=ENDLESS,
    )

    def make_network(*_: object) -> nn.Module:
        network: nn.Module = convnet.ConvNet(classes, im_size=tuple(images.shape[-2:]))
        return network

    quiet = {"print": lambda *_: None}
    synset = _quietly(names, "Synthesizer")(arguments, classes, 3, *images.shape[-2:], device=device)
    synset.data.data = start.clone()
    aug, aug_rand = _quietly(names, "diffaug")(arguments, device=device)
    names |= {
        "args": arguments,
        "nclass": classes,
        "device": device,
        "synset": synset,
        "image_syn": synset.data,
        "aug": aug,
        "aug_rand": aug_rand,
        "loss_total": 0.0,
        **quiet,
        "define_model": make_network,
        "make_network": make_network,
        "ts": misc.TimeStamp(False),
        "it_log": ENDLESS,
        "it_test": (),
        "logger": lambda *_: None,
        "loader_real": _memory_loader(data, images, labels, real_batch, classes),
        "optim_img": torch.optim.SGD(synset.parameters(), lr=0.005 * ipc / 10, momentum=0.5),
    }
    loop = PeerLoop(path, "it", {})
    loop.names = names
    return loop, loop.over(path, "ot")


def idm_loop(
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    ipc: int,
    real_batch: int,
    net_steps: int,
    net_batch: int = 256,
) -> PeerLoop:
    """IDM's `IDM_cifar10.py` with its command for 10 images a class.

    torchnet, whose meter it counts accuracies with, needs a package that can no longer be built: a meter of the same
    numbers stands in for it.

    Args:
        images, labels, start, ipc, real_batch: see `dm_loop`.
        net_steps: that each of two networks trains after a step.
        net_batch: images in a step of a network.

    Raises:
        Unavailable: there is no checkout.
    """
    path = checkout("IDM")
    (utils,) = _modules(path.parent, "dc_utils")
    arguments = {
        "dsa": True,
        "dsa_strategy": STRATEGY,
        "dsa_param": utils.ParamDiffAug(),
        "aug": True,
        "aug_num": 1,
        "outer_loop": 1,
        "embed_last": 1000,
        "syn_ce": True,
        "ce_weight": 0.5,
        "ij_selection": "random",
        "train_net_num": 1,
        "net_begin": 0,
        "net_end": 100000,
        "net_generate_interval": 30,
        "net_push_num": 1,
        "net_num": 100,
        "net_decay": True,
        "lr_net": 0.01,
        "fetch_net_num": 2,
        "model_train_steps": net_steps,
        "trained_bs": net_batch,
    }
    names = _condensation(utils, images, labels, start, ipc, real_batch, 0.2, arguments)
    names |= {
        "torchnet": types.SimpleNamespace(meter=types.SimpleNamespace(ClassErrorMeter=_Meter)),
        "random": importlib.import_module("random"),
        "nn": nn,
        "criterion": nn.CrossEntropyLoss(),
        "net_num": 100,
        "net_list": [],
        "optimizer_list": [],
        "acc_meters": [],
    }
    return PeerLoop(path, "it", names)


def add_to_queue(loop: PeerLoop, networks: Sequence[nn.Module]) -> None:
    """Append networks to the queue of `idm_loop`, as their code does before its loop."""
    for network in networks:
        loop.names["net_list"].append(network.train())
        descent = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
        loop.names["optimizer_list"].append(descent)
        loop.names["acc_meters"].append(_Meter(accuracy=True))


class _Meter:
    """torchnet's ClassErrorMeter for the first choice, as an accuracy in percent."""

    def __init__(self, accuracy: bool) -> None:
        assert accuracy
        self.reset()

    def reset(self) -> None:
        self.n = self._right = 0

    def add(self, output: Tensor, target: Tensor) -> None:
        self.n += len(target)
        self._right += int((output.argmax(1) == target).sum())

    def value(self) -> list[float]:
        return [100 * self._right / self.n]


def _condensation(
    utils: Any,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    ipc: int,
    real_batch: int,
    lr_img: float,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The namespace that the `main` of DatasetCondensation, and of what grew from it, has before its loop."""
    classes = int(labels.max()) + 1
    indices = [torch.nonzero(labels == label).flatten().numpy() for label in range(classes)]
    image_syn = start.clone().requires_grad_(True)
    known = {"device": str(start.device), "ipc": ipc, "batch_real": real_batch, "Iteration": ENDLESS}

    def get_images(c: int | None = None, n: int = 0) -> Any:
        if c is not None:
            return images[np.random.permutation(indices[c])[:n]]  # noqa: NPY002 - theirs
        chosen = np.random.permutation(np.concatenate(indices))[:n]  # noqa: NPY002 - theirs
        return images[chosen], labels[chosen].to(images.device)

    return {
        **{name: value for name, value in vars(utils).items() if not name.startswith("__")},
        "args": types.SimpleNamespace(model="ConvNet", **known, **arguments),
        "eval_it_pool": (),
        "num_classes": classes,
        "channel": 3,
        "im_size": tuple(images.shape[-2:]),
        "image_syn": image_syn,
        "label_syn": torch.arange(classes, device=start.device).repeat_interleave(ipc),
        "optimizer_img": torch.optim.SGD([image_syn], lr=lr_img, momentum=0.5),
        "get_images": get_images,
        "copy": importlib.import_module("copy"),
        "make_network": functools.partial(utils.get_network, "ConvNet", 3, classes, tuple(images.shape[-2:])),
    }


def _memory_loader(data: Any, images: Tensor, labels: Tensor, batch: int, classes: int) -> Any:
    """Their loader of images that lie in memory. `train_epoch` copies to a GPU what says that it lies on the "cpu"."""

    class Images:
        targets = labels.tolist()
        nclass = classes

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, place: int) -> tuple[Tensor, int]:
            if place >= len(images):
                raise IndexError(place)
            return images[place], self.targets[place]

    return data.ClassMemDataLoader(Images(), batch_size=batch, drop_last=True, device=images.device)


def _ceil(value: float) -> int:
    return int(-(-value // 1))


def _with(module: types.ModuleType, **names: Any) -> types.ModuleType:
    """A module that has other names besides its own."""
    copied = types.ModuleType(module.__name__)
    copied.__dict__.update({**vars(module), **names})
    return copied


def _quietly(names: dict[str, Any], function: str) -> Callable[..., Any]:
    """A function of a namespace, without what it prints."""
    names["print"] = lambda *_: None
    found: Callable[..., Any] = names[function]
    return found


def checkout(repository: str) -> Path:
    """The file of a repository that its loops are in.

    Raises:
        Unavailable: there is no checkout.
    """
    owner, file = REPOSITORIES[repository]
    root = os.environ.get(PEERS)
    if root is None:
        raise Unavailable(f"{PEERS} names no folder with a checkout of {owner}/{repository}")
    found = sorted(path for path in Path(root).glob(f"*{repository}/**/{file}"))
    if not found:
        raise Unavailable(f"{PEERS} ({root}) holds no checkout of {owner}/{repository}")
    return found[0]


def _modules(folder: Path, *names: str) -> list[Any]:
    """Modules of a checkout.

    Raises:
        Unavailable: one needs a package that is not there.
    """
    with importable(folder):
        try:
            return [importlib.import_module(name) for name in names]
        except ModuleNotFoundError as error:
            raise Unavailable(f"{folder.name} needs {error.name}: pip install {error.name}") from error


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Their modules by their plain names, for the length of the block: two repositories have a `utils` each."""

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in _MODULES]:
            del sys.modules[name]

    forget()
    # A name of SciPy that is gone; they import it and never call it.
    moved = types.ModuleType("scipy.ndimage.interpolation")
    moved.rotate = None  # type: ignore[attr-defined]
    sys.modules.setdefault("scipy.ndimage.interpolation", moved)
    sys.path[:0] = [str(folder), str(folder.parent)]
    try:
        yield
    finally:
        del sys.path[:2]
        forget()


def _loop(path: Path, variable: str) -> types.CodeType:
    """The loop over a variable as a module of its own, over `passes` in place of what it ran over."""
    tree = ast.parse(path.read_text("utf-8"))
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == variable
    ]
    if len(loops) != 1:
        raise Unavailable(
            f"{path} has {len(loops)} loops over `{variable}`: another version than the one known here"
        )
    loops[0].iter = ast.copy_location(ast.Name("passes", ast.Load()), loops[0].iter)
    return compile(ast.Module(body=[loops[0]], type_ignores=[]), str(path), "exec")


def _define(path: Path, wanted: Sequence[str], names: dict[str, Any]) -> None:
    """Functions and classes of a file in a namespace, without the rest of it."""
    tree = ast.parse(path.read_text("utf-8"))
    found = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted
    ]
    if len(found) != len(wanted):
        raise Unavailable(
            f"{path} lacks some of {', '.join(wanted)}: another version than the one known here"
        )
    exec(compile(ast.Module(body=list(found), type_ignores=[]), str(path), "exec"), names)
