"""What a micro-batch of the score pass would wait for on a GPU, on a device that is not there (`tests.mimic`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

SCRIPT = """
import copy, json, os, sys
import torch
from ddfast.data.samples import Sample
from ddfast.methods import get_method
from ddfast.methods.base import Context
from ddfast.pipeline.score import _micro_batch, _Rows
from ddfast.models import Teacher, create_model
from ddfast.unchanged import unchanged
from tests.mimic import DEVICE, mimic, moved, waits_of
from types import SimpleNamespace

SIZE, NAMES = 32, ["a", "b", "c"]
FIELDS = ("boxes", "phi", "grad_norm", "loss", "correct", "features", "damaged")
torch.manual_seed(0)
images = torch.randint(0, 256, (6, 3, SIZE, SIZE), dtype=torch.uint8)
pairs = [(Sample(10 + n, f"{n}.jpg", n % 3), image) for n, image in enumerate(images)]


def rows_on(device, model, arch, method, factor):
    teacher = Teacher(model, arch, NAMES, SIZE, (0.5,) * 3, (0.25,) * 3, sha256="")
    run = SimpleNamespace(plan={"image_size": SIZE}, device=device)
    context = Context(teacher, SIZE, factor, 0, "float32", 4096, device)
    return _Rows(method.score(_micro_batch(run, pairs, 8), context)).wait()


def case(name, arch, factor, options):
    torch.manual_seed(0)
    model = create_model(arch, 3, SIZE, **({"width": 8} if arch.startswith("convnet") else {})).eval()
    case = (arch, get_method(name).from_options(options).resolved(factor, 10), factor)
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
        field: torch.allclose(getattr(found, field), getattr(wanted, field), rtol=1e-4, atol=1e-5)
        for field in FIELDS
        if getattr(wanted, field) is not None
    }
    return {"waits": waits, "equal": equal}


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
