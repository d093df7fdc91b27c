"""One thread for every test, a small set and a teacher that has learned it.

One thread here and in the processes that tests start: tests run beside other work, and threads that wait for each other
at every operation are slow there. It also gives a run in a test and a run in a process of its own the same arithmetic.
"""

import hashlib
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("DDFAST_THREADS", "1")

from ddfast.training import train_teacher
from tests.training.conftest import toy_folder, toy_test, toy_train

__all__ = ["toy_folder", "toy_test", "toy_train"]


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory, toy_folder):
    """A teacher file: ConvNet-3 of width 8 at 16 px, and its checkpoint of epoch 2."""
    out = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    train_teacher(
        toy_folder,
        out=out,
        arch="convnet3",
        epochs=8,
        batch_size=32,
        image_size=16,
        checkpoint_epochs=(2,),
        arch_options={"width": 8},
        quiet=True,
    )
    return out


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but `run.json` and `evaluations.json`, which are outside the identity."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "evaluations.json")
    }
