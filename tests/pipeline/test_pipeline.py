import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import ddfast
from ddfast import files
from ddfast.cli import main
from ddfast.data.decoding import decode_fit
from ddfast.distillation import finish
from ddfast.errors import UsageError
from ddfast.methods import get_method, list_methods
from ddfast.models import create_model, save_teacher
from ddfast.output.table import SELECTION_SCHEMA, read_table, read_tables, to_numpy
from ddfast.pipeline.compose import compose
from ddfast.pipeline.opening import reopen
from ddfast.pipeline.relabel import relabel
from ddfast.pipeline.score import score
from ddfast.pipeline.select import change_ipc, select
from tests.conftest import digests


def distil(toy_folder, toy_teacher, out, method="infoutil", **settings):
    wanted = {"ipc": 2, "images_per_class": 12, "factor": 2, "quiet": True, **settings}
    return ddfast.distill(method, data=toy_folder, teacher=toy_teacher, out=out, **wanted)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, toy_teacher):
    return distil(toy_folder, toy_teacher, tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_output_folder_is_the_contract(undisturbed):
    names = set(digests(undisturbed))
    assert {
        "train/00000_across/000000.png",
        "train/00002_rising/000001.png",
        "train/metadata.jsonl",
        "soft_labels.safetensors",
        "scores/part-00000.parquet",
        "selection.parquet",
        "manifest.json",
        "report.html",
        "mosaic.png",
    } <= names
    assert not [name for name in names if ".tmp-" in name]
    train = ddfast.DistilledSet(undisturbed)
    assert len(train) == 6
    image, label, soft = train[5]
    assert image.shape == (3, 16, 16)
    assert label == 2
    assert train.soft_labels.shape == (6, 4, 3)
    torch.testing.assert_close(soft.sum(), torch.tensor(1.0), atol=2e-3, rtol=0)
    folder = torchvision.datasets.ImageFolder(undisturbed / "train")
    assert [target for _, target in folder.samples] == [0, 0, 1, 1, 2, 2]


def test_bad_files_are_quarantined_with_their_reason(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", images_per_class=100)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["quarantined"]["count"] == 2
    found = {row["path"]: row["reason"] for row in manifest["quarantined"]["files"]}
    assert set(found) == {"across/0000a.png", "down/empty.png"}
    assert all(found.values())
    assert manifest["counts"] == {"images": 6, "sources": 180, "quarantined": 2}


@pytest.mark.parametrize("method", [m for m in list_methods() if "score" in get_method(m).stages])
@pytest.mark.parametrize("factor", [1, 2])
def test_every_method_distils_at_every_factor(method, factor, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", method, factor=factor)
    train = ddfast.DistilledSet(out)
    assert train.soft_labels.shape == (6, factor**2, 3)
    assert train.manifest["method"] == method
    chosen = to_numpy(read_table(out / "selection.parquet", SELECTION_SCHEMA))
    for label in range(3):  # at most one crop of an image
        ids = chosen["sample_id"][chosen["label"] == label]
        assert len(set(ids.tolist())) == len(ids) == 2 * factor**2


@pytest.mark.parametrize("rank_by", ["grad_norm", "loss", "quantiles", "random"])
@pytest.mark.parametrize("within", ["max_norm", "min_loss", "clean"])
def test_every_ranking_selects_from_one_score_table(
    rank_by, within, undisturbed, toy_folder, toy_teacher, tmp_path
):
    run = tmp_path / "run"
    out = distil(
        toy_folder, toy_teacher, run, scores=undisturbed, until="select", rank_by=rank_by, within=within
    )
    chosen = to_numpy(read_table(out / "selection.parquet", SELECTION_SCHEMA))
    ids = chosen["sample_id"].tolist()
    assert len(set(ids)) == len(ids) == 3 * 2 * 4


def test_a_tile_is_the_crop_of_its_source(undisturbed, toy_folder):
    source = ddfast.data.open_source(toy_folder, "train")
    train = ddfast.DistilledSet(undisturbed)
    row = train.rows[0]
    image = train[0][0]
    for tile, (top, left) in zip(row["tiles"], ((0, 0), (0, 8), (8, 0), (8, 8)), strict=True):
        sample = next(s for s in source.samples if s.key == tile["source"])
        x0, y0, x1, y1 = (int(edge) for edge in tile["box"])
        crop = decode_fit(source.read(sample), 16)[:, y0:y1, x0:x1]
        assert crop.shape == (3, 8, 8)
        assert torch.equal(image[:, top : top + 8, left : left + 8], crop)


def test_soft_labels_are_those_of_the_teacher_on_enlarged_tiles(undisturbed, toy_teacher):
    train, teacher = ddfast.DistilledSet(undisturbed), ddfast.load_teacher(toy_teacher)
    tile = train[3][0][:, 8:, :8]  # row 1, column 0: tile 2
    full = torch.nn.functional.interpolate(
        tile[None].float(), size=(16, 16), mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = torch.tensor(teacher.mean).view(1, 3, 1, 1), torch.tensor(teacher.std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = torch.softmax(teacher.model((full / 255 - mean) / std) / 20, dim=1)[0]
    # Enlarged tiles are rounded to whole pixel values, labels to fp16.
    torch.testing.assert_close(train.soft_labels[3, 2], expected, atol=2e-3, rtol=0)


def test_scores_hold_what_selection_used(undisturbed):
    table = to_numpy(read_tables(undisturbed / "scores"))
    assert table["phi"].shape[1] == 16
    assert len(table["label"]) % 5 == 0
    chosen = to_numpy(read_table(undisturbed / "selection.parquet", SELECTION_SCHEMA))
    key = {
        (int(i), tuple(box)): norm
        for i, box, norm in zip(table["sample_id"], table["box"].tolist(), table["grad_norm"], strict=True)
    }
    for i, box, value in zip(chosen["sample_id"], chosen["box"].tolist(), chosen["score"], strict=True):
        assert key[(int(i), tuple(box))] == value


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_a_byte(batch_size, undisturbed, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", batch_size=batch_size)
    assert digests(out) == digests(undisturbed)


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def test_a_run_that_dies_at_any_write_resumes_to_the_same_bytes(
    undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dying)
    out, deaths = tmp_path / "run", 0
    while deaths < 40:
        left[0] = deaths  # every try gets one write further
        try:
            distil(toy_folder, toy_teacher, out, resume=True)
            break
        except Killed:
            deaths += 1
    assert deaths >= 10
    assert digests(out) == digests(undisturbed)


def test_kill_9_and_resume_give_the_same_bytes(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "ddfast", "distill", "infoutil", "--data", str(toy_folder)),
        *("--teacher", str(toy_teacher), "--ipc", "2", "--images-per-class", "12", "--factor", "2"),
        *("--out", str(out), "--resume", "--quiet"),
    ]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (out / "manifest.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert subprocess.run(command, check=False).returncode == 0
    assert digests(out) == digests(undisturbed)
    assert subprocess.run(command, check=False).returncode == 0  # finished: nothing to do


def test_the_caller_keeps_its_threads(toy_folder, toy_teacher, tmp_path):
    before = torch.get_num_threads()
    out = distil(toy_folder, toy_teacher, tmp_path / "out", threads=before + 1)
    assert json.loads((out / "manifest.json").read_text())["arithmetic"]["threads"] == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(UsageError):
        distil(toy_folder, toy_teacher, tmp_path / "out", threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_truncated_shard_is_scored_again(undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch):
    out = tmp_path / "run"
    distil(toy_folder, toy_teacher, out, until="score")
    shard = out / "scores" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    distil(toy_folder, toy_teacher, out, resume=True)
    assert digests(out) == digests(undisturbed)


def test_the_stages_one_at_a_time_give_the_same_bytes(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = tmp_path / "run"
    distil(toy_folder, toy_teacher, out, until="score")
    for stage in (select, compose, relabel, finish):
        stage(reopen(out, quiet=True))
    assert digests(out) == digests(undisturbed)


def test_selecting_again_for_another_ipc(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", ipc=1)
    run = reopen(out, quiet=True)
    change_ipc(run, 2)
    for stage in (score, select, compose, relabel, finish):
        stage(run)
    assert digests(out) == digests(undisturbed)


def test_selecting_again_keeps_a_finished_set(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", ipc=1)
    before = digests(out)
    change_ipc(reopen(out, quiet=True), 2)
    assert not (out / "train").exists()
    kept = tmp_path / "run-ipc1"
    assert digests(kept) == before
    for stage in (select, compose, relabel, finish):
        stage(reopen(out, quiet=True))
    assert digests(kept) == before
    assert len(ddfast.DistilledSet(kept)) == 3
    again = digests(out)
    change_ipc(reopen(out, quiet=True), 1)  # IPC 2 is kept as well
    assert digests(tmp_path / "run-ipc2") == again
    for stage in (select, compose, relabel, finish):
        stage(reopen(out, quiet=True))
    with pytest.raises(UsageError, match=r"run-ipc1, which exists"):
        change_ipc(reopen(out, quiet=True), 2)
    assert digests(out) == before


def test_a_damaged_score_table_leaves_the_finished_set_where_it_is(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", ipc=1)
    whole = digests(out)
    shard = out / "scores" / "part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    before = digests(out)
    with pytest.raises(UsageError, match=r"score table of .* is damaged: distil with resume=True mends it"):
        change_ipc(reopen(out, quiet=True), 2)
    assert digests(out) == before
    assert not (tmp_path / "run-ipc1").exists()
    distil(toy_folder, toy_teacher, out, ipc=1, resume=True)
    assert digests(out) == whole
    shutil.rmtree(shard.parent)
    assert distil(toy_folder, toy_teacher, out, ipc=1, resume=True).set is not None
    with pytest.raises(UsageError, match="no score table any more"):
        change_ipc(reopen(out, quiet=True), 2)


def test_a_score_table_serves_another_ipc_but_not_other_settings(
    undisturbed, toy_folder, toy_teacher, tmp_path
):
    one = distil(toy_folder, toy_teacher, tmp_path / "one", ipc=1, scores=undisturbed)
    again = distil(toy_folder, toy_teacher, tmp_path / "again", ipc=1)
    assert digests(one) == digests(again)
    with pytest.raises(UsageError, match="scored with other settings"):
        distil(toy_folder, toy_teacher, tmp_path / "two", n_samples=62, scores=undisturbed)
    other = 1 + json.loads((undisturbed / "manifest.json").read_text())["arithmetic"]["threads"]
    with pytest.raises(UsageError, match=r"scored with other settings.*arithmetic\.threads"):
        distil(toy_folder, toy_teacher, tmp_path / "two", threads=other, scores=undisturbed)
    assert not (tmp_path / "two").exists()


def test_an_early_label_teacher_changes_the_labels_alone(undisturbed, toy_folder, toy_teacher, tmp_path):
    early = toy_teacher.with_name("teacher-epoch2.safetensors")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", label_teacher=early)
    ours, theirs = digests(out), digests(undisturbed)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert "soft_labels.safetensors" in changed
    assert changed <= {"soft_labels.safetensors", "manifest.json", "report.html"}


def test_random_pixels_are_whole_images(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", "random", factor=1)
    for row in ddfast.DistilledSet(out).rows:
        assert row["tiles"][0]["box"] == [0, 0, 16, 16]


def test_another_seed_gives_another_set(undisturbed, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", seed=1)
    assert digests(out)["train/metadata.jsonl"] != digests(undisturbed)["train/metadata.jsonl"]


def test_jpeg_on_request(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", image_format="jpeg")
    assert len(list((out / "train").rglob("*.jpg"))) == 6
    assert ddfast.DistilledSet(out)[0][0].shape == (3, 16, 16)


def test_a_folder_that_holds_another_run_is_refused(undisturbed, toy_folder, toy_teacher, tmp_path):
    before = digests(undisturbed)
    with pytest.raises(UsageError, match=r"different run.*ipc"):
        distil(toy_folder, toy_teacher, undisturbed, ipc=1, resume=True)
    with pytest.raises(UsageError, match=r"finished run.*resume=True"):
        distil(toy_folder, toy_teacher, undisturbed)
    assert distil(toy_folder, toy_teacher, undisturbed, resume=True) == undisturbed
    assert digests(undisturbed) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="holds no ddfast run"):
        distil(toy_folder, toy_teacher, tmp_path / "notes")
    assert os.listdir(tmp_path / "notes") == ["mine.txt"]


def test_too_few_images_names_the_class_and_the_numbers(toy_folder, toy_teacher, tmp_path):
    with pytest.raises(UsageError, match=r"class 'across' has 60 usable images, IPC 16 x 4 tiles needs 64"):
        distil(toy_folder, toy_teacher, tmp_path / "run", ipc=16, images_per_class=100)
    # 61 files, one of them no image: counted by decoding before anything is written.
    with pytest.raises(
        UsageError, match=r"class 'across' has 60 usable images, IPC 61 x 1 tile needs 61 \(unreadable: 1 "
    ):
        distil(toy_folder, toy_teacher, tmp_path / "run", ipc=61, factor=1, images_per_class=100)
    with pytest.raises(UsageError, match="images_per_class is 12"):
        distil(toy_folder, toy_teacher, tmp_path / "run", ipc=10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ipc", [2, 40])
def test_a_class_of_which_nothing_can_be_read_says_why(toy_folder, toy_teacher, tmp_path, ipc):
    """Said after scoring where there are images enough by their number, and before it where it is close."""
    packed = tmp_path / "set.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(toy_folder.rglob("*/*/*")):
            archive.write(path, str(path.relative_to(toy_folder)))
    data = bytearray(packed.read_bytes())
    entry = 0
    while (entry := data.find(b"PK\x01\x02", entry)) >= 0:
        if b"/across/" in data[entry + 46 : entry + 62]:
            data[entry + 10] = 9
        entry += 46
    packed.write_bytes(data)
    with pytest.raises(
        UsageError, match=r"'across' has 0 usable images.* packed with Deflate64 \(zip method 9\)"
    ):
        distil(
            packed,
            toy_teacher,
            tmp_path / "run",
            "random",
            ipc=ipc,
            images_per_class=100,
            factor=1,
            preflight=False,
        )


def test_a_teacher_of_other_classes_is_refused(toy_folder, toy_teacher, tmp_path):
    teacher = ddfast.load_teacher(toy_teacher)
    teacher.class_names = ["down", "across", "rising"]
    with pytest.raises(UsageError, match="class order must match"):
        distil(toy_folder, teacher, tmp_path / "run")
    teacher.class_names = ["across", "down"]
    with pytest.raises(UsageError, match="knows 2 classes"):
        distil(toy_folder, teacher, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_returns_nan_is_refused(toy_folder, toy_teacher, tmp_path):
    teacher = ddfast.load_teacher(toy_teacher)
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(float("nan"))
    with pytest.raises(UsageError, match="NaN"):
        distil(toy_folder, teacher, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="NaN"):
        distil(toy_folder, teacher, tmp_path / "run", preflight=False)


def test_preflight_stops_a_teacher_near_chance(toy_folder, toy_teacher, tmp_path):
    teacher = ddfast.load_teacher(toy_teacher)
    model = teacher.model
    teacher.model = torch.nn.Sequential(model, Rotate()).eval()
    with pytest.raises(UsageError, match="near chance for 3 classes"):
        distil(toy_folder, teacher, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def rotated_file(toy_teacher, path):
    """The teacher with its outputs in another order than its file says, and that order."""
    teacher = ddfast.load_teacher(toy_teacher)
    fields = {
        name: getattr(teacher, name)
        for name in ("arch", "class_names", "image_size", "mean", "std", "arch_options")
    }
    with torch.no_grad():
        for parameter in (teacher.model.classifier.weight, teacher.model.classifier.bias):
            parameter.copy_(parameter.roll(1, dims=0))
    save_teacher(path, teacher.model, **fields)
    return [teacher.class_names[-1], *teacher.class_names[:-1]]


def test_preflight_names_the_order_that_a_teacher_must_have(toy_folder, toy_teacher, tmp_path, capsys):
    order = rotated_file(toy_teacher, tmp_path / "t.safetensors")
    found = r"of 180 training images correctly, near chance for 3 classes: it reads '\w+' images as '\w+'"
    with pytest.raises(UsageError, match=f"the teacher reads .* {found}.*with class_order"):
        distil(toy_folder, tmp_path / "t.safetensors", tmp_path / "run")
    with pytest.raises(UsageError, match=f"the label teacher reads .* {found}.*with label_class_order"):
        distil(toy_folder, toy_teacher, tmp_path / "run", label_teacher=tmp_path / "t.safetensors")
    assert not (tmp_path / "run").exists()
    distil(toy_folder, toy_teacher, tmp_path / "run", quiet=False, until="score")
    assert re.search(r"^teacher reads 1\d\d of 180 training images \(\d+%\)$", capsys.readouterr().err, re.M)
    (tmp_path / "order.txt").write_text("\n".join(order) + "\n")
    path = tmp_path / "t.safetensors"
    for teacher, given in (
        (path, order),
        (path, tmp_path / "order.txt"),
        (lambda: ddfast.load_teacher(path), order),
    ):
        distil(
            toy_folder,
            teacher,
            tmp_path / "one",
            class_order=given,
            label_teacher=toy_teacher,
            resume=True,
        )


def test_a_class_order_gives_the_set_of_the_right_teacher(toy_folder, toy_teacher, undisturbed, tmp_path):
    order = rotated_file(toy_teacher, tmp_path / "t.safetensors")
    out = tmp_path / "run"
    distil(toy_folder, tmp_path / "t.safetensors", out, class_order=order, until="score")
    for stage in (select, compose, relabel, finish):
        stage(reopen(out, quiet=True))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["teacher"]["class_order"] == manifest["label_teacher"]["class_order"] == order
    ours, theirs = digests(out), digests(undisturbed)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert changed <= {
        "manifest.json",
        "report.html",
        "scores/part-00000.parquet",
        "train/metadata.jsonl",
        "selection.parquet",
        "soft_labels.safetensors",
    }
    one, two = ddfast.DistilledSet(out), ddfast.DistilledSet(undisturbed)
    torch.testing.assert_close(one.soft_labels, two.soft_labels, atol=2e-3, rtol=0)
    with pytest.raises(UsageError, match=r"different run \(teacher.class_order"):
        distil(toy_folder, tmp_path / "t.safetensors", out, resume=True, preflight=False)


def test_the_stages_take_up_a_state_dict_with_its_class_order(toy_folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = create_model("convnet3", 3, 16)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "t.pt")
    (tmp_path / "order.json").write_text('{"0": "rising", "1": "down", "2": "across"}')
    words = (
        *(
            "score",
            "rded",
            "--data",
            toy_folder,
            "--teacher",
            tmp_path / "t.pt",
            "--teacher-arch",
            "convnet3",
        ),
        *("--image-size", 16, "--class-order", tmp_path / "order.json", "--ipc", 1, "--images-per-class", 4),
        *("--out", tmp_path / "run", "--no-preflight", "--quiet"),
    )
    assert main([str(word) for word in words]) == 0
    for stage in ("select", "compose", "relabel"):
        assert main([stage, str(tmp_path / "run"), "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["complete"]
    capsys.readouterr()


def test_a_teacher_of_the_caller_comes_back_as_it_was(toy_folder, toy_teacher, tmp_path):
    teacher = ddfast.load_teacher(toy_teacher)
    teacher.model.double().train()
    distil(toy_folder, teacher, tmp_path / "run")
    assert teacher.model.training
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float64}
    assert teacher.model.blocks[0].weight.is_contiguous()


@pytest.mark.parametrize("preflight", [True, False])
def test_a_teacher_that_returns_no_tensor_is_one_line(toy_folder, toy_teacher, tmp_path, preflight):
    teacher = ddfast.load_teacher(toy_teacher)
    teacher.model = InDict(teacher.model)
    with pytest.raises(UsageError, match=r"returns a dict, wanted logits, a tensor \[B, 3\]"):
        distil(toy_folder, teacher, tmp_path / "run", preflight=preflight)
    assert not (tmp_path / "run").exists()


class InDict(torch.nn.Module):
    """As Hugging Face's models return their logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return {"logits": self.model(images)}


def test_a_default_dtype_of_float64_changes_no_byte(undisturbed, toy_folder, toy_teacher, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        out = distil(toy_folder, toy_teacher, tmp_path / "run")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert digests(out) == digests(undisturbed)


class Rotate(torch.nn.Module):
    """Classes in another order: the usual mistake."""

    def forward(self, logits):
        return logits.roll(1, dims=1)


def test_no_space_left_is_one_clear_error(toy_folder, toy_teacher, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UsageError, match="no space left on"):
        distil(toy_folder, toy_teacher, tmp_path / "run")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match="known methods: infoutil, rded, random"):
        get_method("infoutill")
    with pytest.raises(UsageError, match="its presets: paper"):
        get_method("infoutil").from_options({}, "papers")
    with pytest.raises(UsageError, match="its options: attribution"):
        get_method("infoutil").from_options({"alfa": 1.0})
    with pytest.raises(UsageError, match="estimator must be one of auto, designed"):
        get_method("infoutil").from_options({"estimator": "best"})
    with pytest.raises(UsageError, match="crops must be at least 1"):
        get_method("rded").from_options({"crops": 0})


def test_numbers_and_paths_of_every_kind_make_the_same_run(undisturbed, toy_folder, toy_teacher, tmp_path):
    distil(
        *(str(toy_folder), Path(toy_teacher), tmp_path / "run"),
        ipc=np.int64(2),
        images_per_class="12",
        seed=np.int32(0),
        factor=np.int64(2),
        image_size=np.int64(16),
        batch_size=np.int64(16),
        workers=np.int64(1),
        n_samples=np.int64(32),
        alpha=np.float32(2),
    )
    assert digests(tmp_path / "run") == digests(undisturbed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ipc": 2.5}, r"ipc must be a whole number, got 2\.5"),
        ({"ipc": True}, "ipc must be a whole number, got True"),
        ({"ipc": [2]}, r"ipc must be a whole number, got \[2\]"),
        ({"images_per_class": None}, "images_per_class must be a whole number, got None"),
        ({"data": ["a"]}, r"data must be a path, got \['a'\]"),
        ({"out": None}, "out must be a path, got None"),
        ({"teacher": None}, "teacher must be a path, got None"),
        ({"data": "nowhere", "class_order": "nowhere.txt"}, "class order nowhere.txt cannot be read"),
        ({"label_class_order": ["a"]}, "label_class_order describes a label teacher: give label_teacher"),
        ({"teacher": torch.nn.Linear(1, 1)}, "teacher must be a ddfast Teacher"),
        ({"until": "scores"}, "until must be one of score, select, compose, relabel, got 'scores'"),
        ({"crop": 3}, "did you mean crops"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"alpha": "x"}, "alpha must be a finite number, got 'x'"),
        ({"correct_only": 1}, "correct_only must be true or false, got 1"),
        ({"n_samples": 2}, "n_samples >="),
        ({"device": "mps"}, "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_keyword(changed, message, toy_folder, toy_teacher, tmp_path):
    arguments = {"data": toy_folder, "teacher": toy_teacher, "ipc": 1, "out": tmp_path / "run", **changed}
    with pytest.raises(UsageError, match=message):
        ddfast.distill("infoutil", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run:1", "s3:run", "file:run", "100%#run", "größe"])
def test_a_folder_may_have_any_name(name, undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distil(toy_folder, toy_teacher, Path(name))
    assert digests(tmp_path / name) == digests(undisturbed)
    if ":" in name:
        made = ddfast.distill("dm", data=toy_folder, out=f"dm-{name}", ipc=1, iterations=1, real_batch=4,
                              image_size=16, arch="convnet3_in", quiet=True)  # fmt: skip
        assert made.set is not None


def test_a_folder_whose_name_is_no_unicode_is_refused(toy_folder, toy_teacher, tmp_path):
    with pytest.raises(UsageError, match="out must be valid UTF-8"):
        distil(toy_folder, toy_teacher, tmp_path / "caf\udce9")
    assert os.listdir(tmp_path) == []


def test_a_tilde_is_the_home_folder(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert distil(toy_folder, toy_teacher, "~/run") == tmp_path / "run"
    assert not (tmp_path / "~").exists()


def test_data_whose_path_is_no_unicode(undisturbed, toy_folder, toy_teacher, tmp_path):
    data = tmp_path / "caf\udce9"
    data.symlink_to(toy_folder)
    distil(data, toy_teacher, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(undisturbed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == str(data)


def test_paths_of_a_run_hold_from_any_folder(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(toy_folder.parent)
    out = distil(toy_folder.name, toy_teacher, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert reopen(out, quiet=True).source.fingerprint()
    assert json.loads((out / "run.json").read_text())["data"] == str(toy_folder)


def test_a_report_goes_without_other_data(toy_folder, toy_teacher, tmp_path, capsys):
    out = distil(toy_folder, toy_teacher, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(toy_folder, other)
    next((other / "train" / "across").glob("*.png")).unlink()
    assert main(["report", str(out), "--data", str(other)]) == 2
    assert "holds other images than the run was made of" in capsys.readouterr().err
    told = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**told, "data": str(other)}))
    assert main(["report", str(out)]) == 0
    assert "the report goes without sources" in capsys.readouterr().err


def test_select_where_the_run_is_the_current_folder(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(distil(toy_folder, toy_teacher, tmp_path / "run", ipc=1))
    assert main(["select", ".", "--ipc", "2", "--quiet"]) == 0
    assert (tmp_path / "run-ipc1").is_dir()
