"""What a micro-batch of the score pass would wait for on a GPU, on a device that is not there (`tests.mimic`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

SCRIPT = """
import copy, json, logging, sys
from unittest import mock
import torch
from ddfast.data.samples import Sample
from ddfast.methods import get_method
from ddfast.methods.base import Context
from ddfast.pipeline.score import _micro_batch, _Rows
from ddfast.models import Teacher, create_model
from ddfast.ops.graphs import unrecorded
from ddfast.unchanged import unchanged
from tests.mimic import DEVICE, mimic, moved, recording, waits_of
from types import SimpleNamespace

SIZE, NAMES = 32, ["a", "b", "c"]
CLOSE = {"float32": {"rtol": 1e-4, "atol": 1e-5}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}
FIELDS = ("boxes", "phi", "grad_norm", "loss", "correct", "features", "damaged")
torch.manual_seed(0)
images = torch.randint(0, 256, (6, 3, SIZE, SIZE), dtype=torch.uint8)
pairs = [(Sample(10 + n, f"{n}.jpg", n % 3), image) for n, image in enumerate(images)]
refused = []
log = logging.getLogger("ddfast.ops.graphs")
log.setLevel(logging.INFO)
log.addHandler(mock.Mock(level=0, handle=lambda record: refused.append(record.getMessage())))


def rows_on(device, model, arch, method, factor, precision, pairs=pairs):
    teacher = Teacher(model, arch, NAMES, SIZE, (0.5,) * 3, (0.25,) * 3, sha256="")
    run = SimpleNamespace(plan={"image_size": SIZE}, device=device)
    context = Context(teacher, SIZE, factor, 0, precision, 4096, device)
    return _Rows(method.score(_micro_batch(run, pairs, 8), context)).wait()


def case(name, arch, factor, options, precision="float32"):
    torch.manual_seed(0)
    model = create_model(arch, 3, SIZE, **({"width": 8} if arch.startswith("convnet") else {})).eval()
    case = (arch, get_method(name).from_options(options).resolved(factor, 10), factor, precision)
    with unchanged(model):
        wanted = rows_on(torch.device("cpu"), model, *case)
    with mimic():
        there = moved(copy.deepcopy(model))
        with unchanged(there):
            for _ in range(2):
                rows_on(DEVICE, there, *case)
            waits = waits_of(lambda: rows_on(DEVICE, there, *case))
            found = rows_on(DEVICE, there, *case)
    # The host's fused convolutions round otherwise than the plain ones that run there.
    equal = {
        field: torch.allclose(getattr(found, field), getattr(wanted, field), **CLOSE[precision])
        for field in FIELDS
        if getattr(wanted, field) is not None
    }
    return {"waits": waits, "equal": equal, **recorded(model, *case)}


def recorded(model, *case):
    \"\"\"Six micro-batches, each of other images in the same places, as they are and as recordings are replayed.\"\"\"
    others = [pairs[first:] + pairs[:first] for first in range(len(pairs))]
    with mimic():
        there = moved(copy.deepcopy(model))
        with unchanged(there), unrecorded():
            wanted = [rows_on(DEVICE, there, *case, each) for each in others]
        refused.clear()
        there = moved(copy.deepcopy(model))
        with recording() as graphs, unchanged(there):
            found = [rows_on(DEVICE, there, *case, each) for each in others]
    differ = [
        (place, field)
        for place, rows in enumerate(wanted)
        for field in FIELDS
        if getattr(rows, field) is not None and not torch.equal(getattr(rows, field), getattr(found[place], field))
    ]
    return {"replays": [graph.replays for graph in graphs], "refused": refused[:], "differ": differ}


print(json.dumps([case(*each) for each in json.loads(sys.argv[1])]))
"""


CASES = [
    ("infoutil", "convnet3", 1, {}),
    ("infoutil", "resnet18_small", 1, {"estimator": "permutation"}),
    ("infoutil", "convnet3", 1, {"estimator": "kernel", "n_samples": 25, "norm": "last_layer"}),
    ("infoutil", "convnet3", 1, {"attribution": "grad_cam"}),
    ("infoutil", "convnet3", 2, {"attribution": "grad_cam", "scoring_input": "resize"}),
    ("rded", "convnet3", 1, {}),
    ("rded", "convnet3", 2, {"rank_by": "grad_norm"}),
    ("herding", "convnet3", 1, {}),
    ("k_center", "convnet3", 1, {}),
    ("random", "convnet3", 1, {}),
    ("infoutil", "convnet3", 1, {}, "bfloat16"),
]


@pytest.fixture(scope="module")
def found():
    """What every case found, from one process: the device is a mode of the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_micro_batch_waits_once_for_its_rows_and_finds_what_the_host_finds(number, found):
    """On a GPU its rows are read when the next one is under way; everything else is enqueued and left alone."""
    assert all(found[number]["equal"].values()), (CASES[number], found[number]["equal"])
    assert len(found[number]["waits"]) <= 1, (CASES[number], found[number]["waits"])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_passes_are_recorded_whole_and_replays_find_the_same(number, found):
    """Attribution is one graph where coalitions are sampled, the norms are one, and nothing in them is refused."""
    method, _, _, options = CASES[number][:4]
    passes = {"infoutil": 1 if "attribution" in options else 2, "rded": 1}.get(method, 0)
    assert found[number]["refused"] == []
    assert found[number]["differ"] == []
    assert len(found[number]["replays"]) == passes
    assert all(times >= 3 for times in found[number]["replays"])
