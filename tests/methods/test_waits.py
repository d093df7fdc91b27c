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

name, arch, size, factor = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
torch.manual_seed(0)
options = {"width": 8} if arch.startswith("convnet") else {}
model = create_model(arch, 3, size, **options).eval()
names = ["a", "b", "c"]
teacher = Teacher(model, arch, names, size, (0.5,) * 3, (0.25,) * 3, sha256="")
images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
pairs = [(Sample(10 + n, f"{n}.jpg", n % 3), image) for n, image in enumerate(images)]
method = get_method(name).from_options(json.loads(sys.argv[4])).resolved(factor)


def rows_on(device, teacher):
    run = SimpleNamespace(plan={"image_size": size}, device=device)
    context = Context(teacher, size, factor, 0, "float32", 4096, device)
    return _Rows(method.score(_micro_batch(run, pairs, 8), context)).wait()


with unchanged(model):
    wanted = rows_on(torch.device("cpu"), teacher)
with mimic():
    there = moved(copy.deepcopy(model))
    teacher = Teacher(there, arch, names, size, teacher.mean, teacher.std, sha256="")
    with unchanged(there):
        for _ in range(2):
            rows_on(DEVICE, teacher)
        waits = waits_of(lambda: rows_on(DEVICE, teacher))
        found = rows_on(DEVICE, teacher)
fields = ["boxes", "phi", "grad_norm", "loss", "correct", "features", "damaged"]
fields = [f for f in fields if getattr(wanted, f) is not None]
# The host's fused convolutions round otherwise than the plain ones that run there.
equal = {f: torch.allclose(getattr(found, f), getattr(wanted, f), rtol=1e-4, atol=1e-5) for f in fields}
print(json.dumps({"waits": waits, "equal": equal}))
"""


@pytest.mark.parametrize(
    ("method", "arch", "factor", "options"),
    [
        ("infoutil", "convnet3", 1, {}),
        ("infoutil", "resnet18_small", 1, {"estimator": "permutation"}),
        ("infoutil", "convnet3", 1, {"estimator": "kernel", "n_samples": 25, "norm": "last_layer"}),
        ("infoutil", "convnet3", 1, {"attribution": "grad_cam"}),
        ("infoutil", "convnet3", 2, {"attribution": "grad_cam", "scoring_input": "resize"}),
        ("rded", "convnet3", 1, {}),
        ("rded", "convnet3", 2, {"rank_by": "grad_norm"}),
        ("herding", "convnet3", 1, {}),
        ("k_center", "resnet18_small", 1, {}),
        ("random", "convnet3", 1, {}),
    ],
)
def test_a_micro_batch_waits_once_for_its_rows_and_finds_what_the_host_finds(method, arch, factor, options):
    """On a GPU its rows are read when the next one is under way; everything else is enqueued and left alone."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, method, arch, "32", json.dumps(options), str(factor)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found["equal"].values()), found["equal"]
    assert len(found["waits"]) <= 1, found["waits"]
