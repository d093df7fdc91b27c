"""Steps recorded as on a GPU, on a device that is not there and with a stand-in for its graphs (`tests.mimic`).

The stand-in replays operations on memory, so that whatever a recording takes by its value, draws, or leaves to the host
shows in the pixels; these are held against those of the same steps that run as they are, to the bit.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]

SCRIPT = """
import contextlib, dataclasses, functools, json, logging, sys
from unittest import mock
import torch
from ddfast.gradients.unrolled import unrolled_gradient
from ddfast.methods import get_method
from ddfast.methods.matching import mtt, networks
from ddfast.methods.matching.cmi import Regulariser
from ddfast.models import create_model
from ddfast.ops.graphs import unrecorded
from ddfast.seeding import seeded
from ddfast.unchanged import still_unchanged
from tests.methods.matching.conftest import TensorPool, context_of
from tests.mimic import DEVICE, mimic, moved, recording, waits_of

CLASSES, SIZE, IPC = 3, 8, 2
small = functools.partial(create_model, width=8)
pool = TensorPool((9, 8, 8), SIZE)
lines = []
log = logging.getLogger("ddfast.ops.graphs")
log.setLevel(logging.INFO)
log.addHandler(mock.Mock(level=0, handle=lambda record: lines.append(record.getMessage())))


def proxies():
    made = []
    for number in range(3):
        with seeded("proxy", number):
            made.append(moved(small("convnet3_in", CLASSES, SIZE)))
    return made


class Drawing(torch.nn.Module):
    \"\"\"A network that draws.\"\"\"

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(torch.nn.functional.dropout(images, 0.5))

    def features(self, images):
        return self.network.features(torch.nn.functional.dropout(images, 0.5))


class Held:
    \"\"\"Experts in memory.\"\"\"

    whitening = None

    def __len__(self):
        return 2

    def weights(self, expert, epoch):
        with seeded("expert", expert, epoch):
            return {name: each.detach() for name, each in small("convnet3_in", CLASSES, SIZE).named_parameters()}


def unrolled(**options):
    \"\"\"The gradients of three trainings of a network that is held unchanged.\"\"\"
    torch.manual_seed(0)
    network, known, results = moved(small("convnet3_in", CLASSES, SIZE)), {}, {}
    for call in range(3):
        draws = torch.Generator().manual_seed(call)
        batches = [
            (torch.randn(2, 3, SIZE, SIZE, generator=draws).to(DEVICE),
             torch.rand(2, CLASSES, generator=draws).softmax(1).to(DEVICE))
            for _ in range(3)
        ]
        with still_unchanged(network, known):
            found = unrolled_gradient(
                network,
                {name: weight.detach() for name, weight in network.named_parameters()},
                batches,
                lambda weights: sum(weight.square().sum() for weight in weights.values()),
                0.05 * (call + 1),
                **options,
            )
        tensors = [found.value, found.lr, *found.images, *found.targets, *found.params.values()]
        results |= {f"{call} {place}": tensor.cpu() for place, tensor in enumerate(tensors)}
    return results, [], []


def run(name, options, fault):
    if name == "unrolled":
        return unrolled(**options)
    factor = 2 if name in ("idc", "idm") else 1
    method = get_method(name).from_options(options).resolved(factor, IPC)
    context = dataclasses.replace(context_of(CLASSES, ipc=IPC, size=SIZE), device=DEVICE)
    if name == "mtt":
        method._experts = Held()
    if "proxies" in options:
        method._regulariser = Regulariser(proxies())
    if fault == "draws":
        at = method.networks.at
        drawing = Drawing(torch.nn.Identity())

        def wrapped(*arguments):
            drawing.network = at(*arguments)
            return drawing

        method.networks.at = wrapped
    state = method.begin(method.groups(CLASSES, IPC)[0], pool, context)

    def step():
        method.step(state.step, state, pool, context)
        state.step += 1

    waits = [waits_of(step) for _ in range(method.steps)]
    method.close()
    for name in {"_matching", "_contrasting"} & set(dir(method)):  # MTT has steps of its own
        assert not getattr(method, name)._recorded
    return {name: tensor.cpu() for name, tensor in state.tensors.items()}, state.curve, waits


def case(name, options, fault):
    with unrecorded():
        wanted, curve, _ = run(name, options, fault)
    lines.clear()
    with contextlib.ExitStack() as stack:
        graphs = stack.enter_context(recording())
        if fault == "cannot":
            refused = mock.Mock(side_effect=RuntimeError("no"))
            stack.enter_context(mock.patch.object(torch.cuda, "graph", refused))
        found, noted, waits = run(name, options, fault)
    return {
        "equal": found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted),
        "curves": noted == curve,
        "replays": [graph.replays for graph in graphs if graph.replays],
        "changed": [graph.changed for graph in graphs if graph.replays],
        "waits": [len(each) for each in waits],
        "lines": list(lines),
    }


to = torch.nn.Module.to
there = lambda self, device: moved(self) if device == DEVICE else to(self, device)
with contextlib.ExitStack() as stack:
    stack.enter_context(mimic())
    stack.enter_context(mock.patch.object(torch.nn.Module, "to", there))
    for module in (networks, mtt):
        stack.enter_context(mock.patch.object(module, "create_model", small))
    print(json.dumps([case(*each) for each in json.loads(sys.argv[1])]))
"""

DM = {"real_batch": 3, "iterations": 6}
DC = {"real_batch": 3, "iterations": 1, "outer_loop": 4, "inner_loop": 1, "net_batch": 3}
IDC = {"real_batch": 3, "iterations": 1, "inner_loop": 4, "net_samples": 7, "net_batch": 3}

CASES = {
    "dm": ("dm", DM, ""),
    "dm, two shapes": ("dm", {**DM, "class_batch": 2, "cfc": 30.0}, ""),
    "dm with cmi": ("dm", {**DM, "iterations": 10, "cmi": 100.0, "cmi_every": 2, "proxies": "p"}, ""),
    "dc": ("dc", DC, ""),
    "dsa": ("dsa", {**DC, "distance": "cosine"}, ""),
    "idc with batch norm": ("idc", {**IDC, "arch": "convnet3"}, ""),
    "idm": (
        "idm",
        {**DM, "queue": 3, "queue_every": 2, "net_steps": 1, "net_batch": 6},
        "",
    ),
    "udd": ("udd", {**IDC, "policy": "vote", "jitter": "salt_pepper"}, ""),
    "mtt": (
        "mtt",
        {"experts": "e", "iterations": 3, "syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 2},
        "",
    ),
    "unrolled": ("unrolled", {"momentum": 0.5, "weight_decay": 0.01}, ""),
    "a network that draws": ("dm", DM, "draws"),
    "a recording that fails": ("dm", DM, "cannot"),
}


@pytest.fixture(scope="module")
def found():
    """What every case found, from one process: the device is a mode of the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(CASES.values()))],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_make_what_steps_that_run_as_they_are_make(name, found):
    assert found[name]["equal"]
    assert found[name]["curves"]


def test_a_step_is_one_replay_that_writes_nowhere_else_and_waits_for_its_numbers_alone(found):
    assert found["dm"]["replays"] == [4]  # the third of six is recorded
    assert found["dm"]["changed"] == [0]
    assert found["dm"]["waits"] == [1] * 6
    assert found["dm"]["lines"] == []


def test_every_shape_has_a_recording_of_its_own(found):
    # Of two classes and of one: the loss, and, from the second step on, its contrast.
    assert found["dm, two shapes"]["replays"] == [4, 4, 3, 3]
    assert found["dm, two shapes"]["changed"] == [0] * 4


def test_all_proxies_of_a_kind_share_a_recording(found):
    # Six steps of ten have a gradient of CMI besides, or its value alone.
    assert sorted(found["dm with cmi"]["replays"]) == [3, 3, 8]
    assert found["dm with cmi"]["changed"] == [0] * 3
    assert found["dm with cmi"]["waits"] == [1] * 10


@pytest.mark.parametrize("name", ["dc", "dsa", "idc with batch norm", "idm", "udd"])
def test_training_steps_are_recorded_as_well_and_change_weights_and_velocities_alone(name, found):
    parameters, statistics = 14, 9
    most = {"idc with batch norm": 2 * parameters + statistics, "idm": 2 * parameters, "udd": 2 * parameters}
    changed = found[name]["changed"]
    assert min(changed) == 0 < max(changed)
    assert all(each <= most.get(name, parameters) for each in changed)
    assert found[name]["lines"] == []


def test_a_step_of_the_recursion_and_one_back_are_recorded_and_serve_all_iterations(found):
    # Of nine steps, of six back, and of three back to where nobody asks for the weights; two of each run as they are.
    assert sorted(found["mtt"]["replays"]) == [1, 4, 7]
    assert found["mtt"]["changed"] == [0] * 3
    assert found["mtt"]["lines"] == []
    # With momentum the first step of the three is of a kind of its own as well.
    assert sorted(found["unrolled"]["replays"]) == [1, 1, 4, 4]


def test_what_cannot_be_recorded_says_so_once(found):
    line = "the step of dm runs without a CUDA graph: it "
    assert found["a network that draws"]["lines"] == [line + "draws random numbers (aten::native_dropout)"]
    assert found["a network that draws"]["replays"] == []
    assert found["a recording that fails"]["lines"] == [line + "cannot be recorded: no"]
    assert found["a recording that fails"]["replays"] == []
