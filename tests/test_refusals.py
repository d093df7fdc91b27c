"""What is refused before anything is written, and what a finished set that has lost a file gets back."""

import shutil

import pytest
import torch

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.training import train_teacher
from tests.conftest import digests

DM = {"ipc": 1, "iterations": 1, "real_batch": 4, "image_size": 16, "arch": "convnet3_in", "quiet": True}


@pytest.fixture(scope="module")
def made(toy_folder, tmp_path_factory):
    return ddfast.distill("dm", data=toy_folder, out=tmp_path_factory.mktemp("made") / "out", **DM)


@pytest.fixture(scope="module")
def chosen(toy_folder, toy_teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "out"
    return ddfast.distill("rded", data=toy_folder, teacher=toy_teacher, ipc=2, out=out, quiet=True)


def line_of(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("what", ["notes", "a set", "the data"])
def test_compare_writes_over_nothing(what, made, toy_folder, tmp_path, capsys):
    out = tmp_path / "there"
    if what == "notes":
        out.mkdir()
        (out / "report.html").write_text("precious")
    else:
        shutil.copytree(made if what == "a set" else toy_folder, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = [
        "compare",
        str(made),
        "--data",
        str(toy_folder),
        "--out",
        str(out),
        "--seeds",
        "1",
        "--epochs",
        "1",
    ]
    assert main([*words, "--quiet"]) == 2
    assert "there is not empty and holds no comparison; choose another --out" in line_of(capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_nothing_is_written_among_the_images_of_the_data(made, toy_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(toy_folder, data)
    names = sorted(path.name for path in (data / "train").iterdir())
    before = digests(data)
    for place in (data / "train" / names[0] / "run", data / "train" / "run"):
        with pytest.raises(UsageError, match=r"lies among the images of .* choose another out"):
            ddfast.distill("dm", data=data, out=place, **DM)
        with pytest.raises(UsageError, match="lies among the images of"):
            ddfast.compare(made, data, out=place, seeds=1, epochs=1, quiet=True)
    assert digests(data) == before
    assert ddfast.distill("dm", data=data, out=data / "run", **DM).is_dir()


@pytest.mark.parametrize("threads", [1025, 10**6])
def test_more_threads_than_a_system_starts_are_refused(threads, toy_folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=f"threads must be at most 1024, got {threads}"):
        ddfast.distill("dm", data=toy_folder, out=tmp_path / "out", threads=threads, **DM)
    monkeypatch.setenv("DDFAST_THREADS", str(threads))
    with pytest.raises(UsageError, match="DDFAST_THREADS must be a number from 1 to 1024"):
        ddfast.distill("dm", data=toy_folder, out=tmp_path / "out", **DM)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lost", ["soft_labels.safetensors", "train/metadata.jsonl", "a picture", "damaged labels"]
)
def test_a_finished_set_of_pictures_gets_back_what_it_lost(
    lost, chosen, toy_folder, toy_teacher, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(chosen, out)
    if lost == "damaged labels":
        (out / "soft_labels.safetensors").write_bytes(b"no labels")
    else:
        (next(out.glob("train/*/*.png")) if lost == "a picture" else out / lost).unlink()
    with pytest.raises(UsageError, match="--resume"):
        ddfast.DistilledSet(out)
    given = {"data": toy_folder, "teacher": toy_teacher, "ipc": 2, "resume": True}
    assert ddfast.distill("rded", out=out, **given) == out
    assert "is not whole" in capsys.readouterr().err
    assert digests(out) == digests(chosen)
    ddfast.distill("rded", out=out, **given)
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lost", "source"),
    [
        ("pixels.safetensors", "from the beginning"),
        ("curve.parquet", "from the beginning"),
        ("train/metadata.jsonl", "from its pixels"),
        ("a picture", "from its pixels"),
    ],
)
def test_a_finished_set_of_pixels_gets_back_what_it_lost(lost, source, made, toy_folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (next(out.glob("train/*/*.png")) if lost == "a picture" else out / lost).unlink()
    assert ddfast.distill("dm", data=toy_folder, out=out, resume=True, **{**DM, "quiet": False}) == out
    assert f"made again {source}" in capsys.readouterr().err
    assert digests(out) == digests(made)


def test_a_class_without_a_readable_image_is_refused(toy_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_folder, data)
    (name, *_) = sorted(path.name for path in (data / "train").iterdir())
    for path in (data / "train" / name).iterdir():
        path.write_bytes(b"no image")
    settings = {
        "arch": "convnet3",
        "arch_options": {"width": 8},
        "epochs": 1,
        "image_size": 16,
        "quiet": True,
    }
    with pytest.raises(UsageError, match=f"no image of {name} in the train split can be decoded"):
        train_teacher(data, out=tmp_path / "t.safetensors", **settings)
    assert not (tmp_path / "t.safetensors").exists()


def test_the_folder_of_a_result_is_made(made, toy_folder, tmp_path):
    words = [
        "evaluate",
        "--distilled",
        str(made),
        "--data",
        str(toy_folder),
        "--protocol",
        "dsa",
        "--seeds",
        "1",
    ]
    assert main([*words, "--epochs", "1", "--json", str(tmp_path / "new" / "r.json"), "--quiet"]) == 0
    assert (tmp_path / "new" / "r.json").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["images", "baseline"])
def test_attributions_refuse_what_is_no_number(value, what):
    model = ddfast.create_model("convnet3", num_classes=3, image_size=16).eval()
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    given = {}
    if what == "images":
        images[0, 0, 3, 3] = value
    else:
        given["baseline"] = value
    with pytest.raises(ValueError, match=f"{what} must hold finite numbers"):
        ddfast.shapley(model, images, labels, **given)


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_a_seed_is_a_whole_number(seed):
    model = ddfast.create_model("convnet3", num_classes=3, image_size=16).eval()
    with pytest.raises(ValueError, match="seed must be a whole number"):
        ddfast.shapley(model, torch.rand(1, 3, 16, 16), torch.tensor([0]), estimator="paired", seed=seed)


def test_an_unfinished_set_names_stages_that_it_has(toy_folder, tmp_path, capsys):
    with pytest.raises(UsageError):
        ddfast.distill(
            "dm", data=toy_folder, out=tmp_path / "out", **{**DM, "lr_img": 1e30, "iterations": 50}
        )
    with pytest.raises(UsageError, match="is unfinished") as caught:
        ddfast.DistilledSet(tmp_path / "out")
    assert "compose" not in str(caught.value)


@pytest.mark.parametrize("to", ["webdataset", "huggingface"])
def test_a_damaged_picture_is_not_exported(to, made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    picture = min(out.glob("train/*/*.png"))
    picture.write_bytes(b"\n")
    target = tmp_path / ("set.tar" if to == "webdataset" else "hub")
    assert main(["export", str(out), "--out", str(target), "--to", to]) == 2
    assert f"{picture.name} cannot be read (not an image" in line_of(capsys)
    assert not target.exists()
