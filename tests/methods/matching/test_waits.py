"""What a step of SRe2L would wait for on a GPU, on a device that is not there (`tests.mimic`)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]

SCRIPT = """
import copy, json, sys
import torch
from ddfast.methods.base import Context
from ddfast.methods.matching.sre2l import SRe2L
from ddfast.models import Teacher, create_model
from tests.mimic import DEVICE, mimic, moved, waits_of

SIZE, NAMES = 16, ("a", "b", "c")
torch.manual_seed(0)
model = create_model("convnet3", 3, SIZE, width=8).train()
model(torch.randn(8, 3, SIZE, SIZE))
model.eval()


def run(device, model, options):
    method = SRe2L.from_options({"iterations": 40, "batch": 6, **options})
    teacher = Teacher(model, "convnet3", list(NAMES), SIZE, (0.5,) * 3, (0.25,) * 3, sha256="")
    numbers = {"factor": 1, "seed": 0, "precision": "float32", "forward_batch": 1, "ipc": 2}
    context = Context(
        teacher, SIZE, device=device, class_names=NAMES, mean=teacher.mean, std=teacher.std, **numbers
    )
    state = method.begin(method.groups(3, 2)[0], None, context)

    def step():
        method.step(state.step, state, None, context)
        state.step += 1

    return step, state


def case(options):
    wanted_step, wanted = run(torch.device("cpu"), model, options)
    for _ in range(3):
        wanted_step()
    with mimic():
        step, found = run(DEVICE, moved(copy.deepcopy(model)), options)
        step()
        waits = [waits_of(step) for _ in range(2)]
        pixels = found.pixels.cpu()
    return {"waits": waits, "equal": torch.allclose(pixels, wanted.pixels, rtol=1e-4, atol=1e-4)}


print(json.dumps([case(each) for each in json.loads(sys.argv[1])]))
"""

CASES = [{}, {"crop": True}, {"cmi_ratio": 0.2}]


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
def test_a_step_waits_once_for_its_numbers_and_makes_what_the_host_makes(number, found):
    assert found[number]["equal"], CASES[number]
    assert [len(waits) for waits in found[number]["waits"]] == [1, 1], found[number]["waits"]
