"""The loops of SRe2L and of MTT, run as they stand; see `bench.speed.peer_loops`."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.speed.peer_loops import STRATEGY, checkout, importable
from bench.speed.registry import Unavailable


class RecoveryLoop:
    """The loop of SRe2L's `recover_cifar.py` over images that are given, on CPU or GPU.

    Attributes:
        names: its namespace: `inputs`, `optimizer`, `model_teacher`, `random`, ...
    """

    def __init__(self, teacher: nn.Module, start: Tensor, targets: Tensor, iterations: int) -> None:
        """Set up as their `get_images` does, with the numbers of their `recover_cifar.sh`.

        Args:
            teacher: eval mode, without gradients of its parameters; it gets their hooks.
            start: float32 [N, 3, 32, 32], normalised, what the images begin with.
            targets: int64 [N].
            iterations: of the whole run, for the learning rate.

        Raises:
            Unavailable: there is no checkout.
        """
        folder = checkout("SRe2L").parent
        with importable(folder):
            theirs = importlib.import_module("recover_cifar")
        self._code = _loop_body(folder / "recover_cifar.py", "iteration", None)
        inputs = start.clone().requires_grad_(True)
        arguments = types.SimpleNamespace(r_bn=0.01, first_bn_multiplier=10.0, verifier=False)
        names = vars(theirs)
        self.names: dict[str, Any] = {
            **{name: value for name, value in names.items() if not name.startswith("__")},
            "args": arguments,
            "model_teacher": teacher,
            "hook_for_display": None,
            "loss_r_feature_layers": [
                names["BNFeatureHook"](module)
                for module in teacher.modules()
                if isinstance(module, nn.BatchNorm2d)
            ],
            "save_every": 100,
            "best_cost": 1e4,
            "targets": targets,
            "inputs": inputs,
            "lim_0": 4,
            "lim_1": 4,
            "optimizer": torch.optim.Adam([inputs], lr=0.25, betas=(0.5, 0.9), eps=1e-8),
            "lr_scheduler": names["lr_cosine_policy"](0.25, 0, iterations),
            "criterion": nn.CrossEntropyLoss(),
            "iteration": 0,
        }

    def step(self) -> None:
        """One iteration of theirs."""
        exec(self._code, self.names)
        self.names["iteration"] += 1

    @property
    def pixels(self) -> Tensor:
        """The synthetic images."""
        found: Tensor = self.names["inputs"].detach()
        return found

    @property
    def gradient(self) -> Tensor:
        """That of the last iteration."""
        found: Tensor = self.names["inputs"].grad
        return found


class TrajectoryLoop:
    """The loop of MTT's `distill.py` over synthetic images and an expert that are given.

    Attributes:
        names: its namespace: `image_syn`, `syn_lr`, `DiffAugment`, ...
    """

    def __init__(
        self, start: Tensor, ipc: int, trajectory: Sequence[Sequence[Tensor]], rate: float, **settings: Any
    ) -> None:
        """Set up as their `main` does.

        Args:
            start: [classes * ipc, 3, H, W], what the synthetic images begin with, class by class.
            ipc: images per class.
            trajectory: an expert's parameters after every epoch, in their network's order; students begin at the first.
            rate: learning rate of the students.
            **settings: their arguments `syn_steps`, `expert_epochs` and `no_aug`, and others to put in their place.

        Raises:
            Unavailable: there is no checkout.
        """
        folder = checkout("mtt-distillation").parent
        with importable(folder):
            try:
                utils = importlib.import_module("utils")
                reparametrised = importlib.import_module("reparam_module").ReparamModule
            except ModuleNotFoundError as error:
                raise Unavailable(f"mtt-distillation needs {error.name}: pip install {error.name}") from error
        self._code = _loop_body(folder / "distill.py")
        classes, device = len(start) // ipc, start.device
        image_syn = start.clone().requires_grad_(True)
        syn_lr = torch.tensor(rate, dtype=start.dtype, device=device).requires_grad_(True)
        given = {
            "model": "ConvNet",
            "device": str(device),
            "ipc": ipc,
            "batch_syn": classes * ipc,
            "dsa": True,
            "dsa_strategy": STRATEGY,
            "dsa_param": utils.ParamDiffAug(),
            "no_aug": False,
            "distributed": False,
            "load_all": True,
            "max_start_epoch": 1,
            "texture": False,
            "zca": False,
        }
        self.names: dict[str, Any] = {
            **{name: value for name, value in vars(utils).items() if not name.startswith("__")},
            "args": types.SimpleNamespace(**{**given, **settings}),
            "wandb": types.SimpleNamespace(log=lambda *_, **__: None),
            "ReparamModule": reparametrised,
            "nn": torch.nn,
            "np": np,
            "torch": torch,
            "eval_it_pool": (),
            "num_classes": classes,
            "channel": 3,
            "im_size": tuple(start.shape[-2:]),
            "image_syn": image_syn,
            "label_syn": torch.arange(classes, device=device).repeat_interleave(ipc),
            "syn_lr": syn_lr,
            "optimizer_img": torch.optim.SGD([image_syn], lr=1e-9, momentum=0.5),
            "optimizer_lr": torch.optim.SGD([syn_lr], lr=1e-9, momentum=0.5),
            "criterion": torch.nn.CrossEntropyLoss(),
            "buffer": [trajectory],
        }

    def step(self) -> None:
        """One iteration of theirs. The gradients stay in `image_syn` and `syn_lr`."""
        with contextlib.redirect_stdout(io.StringIO()):
            exec(self._code, self.names)


def _loop_body(path: Path, name: str = "it", first: int | None = 1) -> types.CodeType:
    """The body of `for it in range(...)`, or of another variable, as a module of its own with `it` = 1, or as it is."""
    tree = ast.parse(path.read_text("utf-8"))
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id == name
    ]
    if len(loops) != 1:
        raise Unavailable(
            f"{path} has {len(loops)} loops over `{name}`: another version than the one known here"
        )
    set_it = [] if first is None else ast.parse(f"{name} = {first}").body
    return compile(ast.Module(body=[*set_it, *loops[0].body], type_ignores=[]), str(path), "exec")
