"""JSON that nests deeper than Python goes, in every file of JSON that a run or a network folder keeps."""

import json

import pytest
import torch

import ddfast
from ddfast.errors import UsageError
from ddfast.pipeline.plan import read_plan
from ddfast.report.folder import read_folder
from ddfast.state import read_tensors, serialize_tensors
from ddfast.training import train_proxies

DEEP = "[" * 100_000


def test_a_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(UsageError, match="is damaged: delete"):
        read_plan(tmp_path)
    with pytest.raises(UsageError, match="is no distilled set with images"):
        read_folder(tmp_path)


def test_metadata_of_tensors():
    from safetensors.torch import save

    data = save({"x": torch.zeros(1)}, {"said": DEEP})
    tensors, said = read_tensors("x.safetensors", data, what="state")
    assert torch.equal(tensors["x"], torch.zeros(1))
    assert said == {"said": DEEP}  # what is no JSON is text
    assert read_tensors("x", serialize_tensors(tensors, {"said": [1]}), what="state")[1] == {"said": [1]}


def test_run_json_of_a_run_that_goes_on(toy_folder, tmp_path):
    settings = {
        "data": toy_folder,
        "ipc": 1,
        "iterations": 1,
        "real_batch": 4,
        "image_size": 16,
        "quiet": True,
    }
    out = ddfast.distill("dm", out=tmp_path / "out", until="synthesize", **settings)
    (out / "run.json").write_text(DEEP)
    ddfast.distill("dm", out=out, resume=True, **settings)
    assert json.loads((out / "manifest.json").read_text())["complete"]


def test_the_table_of_a_folder_of_networks(toy_folder, tmp_path):
    (tmp_path / "proxies.json").write_text(DEEP)
    settings = {"arch": "convnet3_in", "image_size": 16, "images_per_class": 4, "quiet": True}
    with pytest.raises(UsageError, match="is no table of proxies, or damaged"):
        train_proxies(toy_folder, count=1, epochs=1, out=tmp_path, resume=True, **settings)
