"""Sets of Hugging Face's Hub: read by their name and pushed there, through `datasets` and a stand-in for the Hub."""

import logging
import sys

import datasets
import huggingface_hub
import pytest
from PIL import Image

import ddfast
from ddfast.cli import main
from ddfast.data import open_source
from ddfast.data.hub import _fetched
from ddfast.errors import UsageError
from ddfast.output.huggingface import export_huggingface, push


@pytest.fixture(autouse=True)
def forget():
    _fetched.cache_clear()
    yield
    _fetched.cache_clear()


@pytest.fixture
def hub(monkeypatch, toy_folder):
    """The Hub has one set, nobody/stripes, with the configurations default and small."""

    def rows(split, count):
        classes = ["across", "down", "rising"]
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        held = {"img": [], "label": []}
        for label, name in enumerate(classes):
            paths = [
                path for path in sorted((toy_folder / split / name).glob("*.png")) if path.stat().st_size > 50
            ]
            for path in paths[:count]:
                held["img"].append(Image.open(path))
                held["label"].append(label)
        return datasets.Dataset.from_dict(held, features=features)

    asked = []

    def load_dataset(name, configuration=None):
        asked.append((name, configuration))
        if name != "nobody/stripes":
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(LocalEntryNotFoundError)")
        count = 4 if configuration == "small" else 12
        return datasets.DatasetDict({"train": rows("train", count), "test": rows("test", 6)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_set_is_read_by_its_name(hub, toy_teacher, tmp_path):
    train, test = open_source("hf:nobody/stripes"), open_source("hf:nobody/stripes", "test")
    assert (len(train.samples), len(test.samples)) == (36, 18)
    assert (train.class_names, train.name) == (["across", "down", "rising"], "hf:nobody/stripes")
    assert hub == [("nobody/stripes", None)]  # it is fetched once
    assert len(open_source("hf:nobody/stripes:small").samples) == 12
    assert hub[-1] == ("nobody/stripes", "small")
    out = tmp_path / "set"
    run = ["distill", "random", "--data", "hf:nobody/stripes", "--teacher", str(toy_teacher), "--ipc", "2"]
    assert main([*run, "--out", str(out), "--quiet"]) == 0
    assert len(ddfast.DistilledSet(out)) == 6
    assert main(["report", str(out)]) == 0  # run.json knows where the data are


def test_a_set_that_cannot_be_had_is_one_line(hub, monkeypatch, capsys):
    with pytest.raises(UsageError) as caught:
        open_source("hf:nobody/nothing")
    assert str(caught.value) == (
        "hf:nobody/nothing could not be fetched: Couldn't reach 'nobody/nothing' on the Hub (LocalEntryNotFoundError); "
        "where there is no network give the folder of its Parquet files"
    )
    with pytest.raises(UsageError, match="hf: wants a name behind the colon"):
        open_source("hf:")
    chatter = logging.StreamHandler(sys.stderr)
    logging.getLogger("huggingface_hub").addHandler(chatter)
    try:
        capsys.readouterr()
        assert main(["distill", "dm", "--data", "hf:nobody/nothing", "--ipc", "1", "--out", "x"]) == 2
    finally:
        logging.getLogger("huggingface_hub").removeHandler(chatter)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    logging.getLogger("huggingface_hub.utils._http").warning("heard again")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"hf:nobody/stripes needs the package datasets: pip install datasets"
    ):
        open_source("hf:nobody/stripes")
    assert main(["distill", "dm", "--data", "hf:nobody/stripes", "--ipc", "1", "--out", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture
def shelf(monkeypatch):
    """What was pushed: rows by `datasets`, the rest of the folder by `huggingface_hub`."""
    taken = {}

    def push_to_hub(self, name, private=None):
        taken["rows"] = (name, private, self.features["label"].names, len(self), self[0]["image"].size)

    class HfApi:
        def upload_folder(self, **said):
            taken["folder"] = said

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push_to_hub)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return taken


@pytest.fixture(scope="module")
def distilled(toy_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pushed") / "set"
    ddfast.distill("random_hard", data=toy_folder, ipc=2, image_size=16, out=out, quiet=True)
    return out


def test_a_set_is_pushed_when_it_is_asked_for(distilled, shelf, tmp_path, capsys):
    export = ["export", str(distilled), "--to", "huggingface"]
    assert main([*export, "--out", str(tmp_path / "here")]) == 0
    assert shelf == {}
    assert main([*export, "--out", str(tmp_path / "there"), "--push-to-hub", "me/stripes", "--private"]) == 0
    assert shelf["rows"] == ("me/stripes", True, ["across", "down", "rising"], 6, (16, 16))
    assert shelf["folder"] == {
        "repo_id": "me/stripes",
        "repo_type": "dataset",
        "folder_path": str(tmp_path / "there"),
        "ignore_patterns": ["data/*"],
    }
    export_huggingface(distilled, tmp_path / "python", push_to_hub="me/again")
    assert shelf["rows"][:2] == ("me/again", False)
    capsys.readouterr()


def test_what_cannot_be_pushed_is_one_line_and_the_folder_stands(
    distilled, shelf, tmp_path, monkeypatch, capsys
):
    def refuse(self, name, private=None):
        raise PermissionError("401 Client Error:\nno token")

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", refuse)
    out = tmp_path / "out"
    with pytest.raises(UsageError) as caught:
        export_huggingface(distilled, out, push_to_hub="me/stripes")
    assert str(caught.value) == (
        f"{out} is written, but could not be pushed to me/stripes: 401 Client Error: no token; log in with hf "
        f"auth login, then hf upload me/stripes {out} --repo-type dataset"
    )
    assert (out / "README.md").is_file()
    for name in ("a/b/c", "", "two words", None):
        if name is not None:
            with pytest.raises(UsageError, match="push_to_hub must be OWNER/NAME"):
                export_huggingface(distilled, tmp_path / "none", push_to_hub=name)
    with pytest.raises(UsageError, match="private describes a set on the Hub"):
        export_huggingface(distilled, tmp_path / "none", private=True)
    with pytest.raises(UsageError, match="holds no data/train"):
        push(tmp_path, "me/stripes")
    assert not (tmp_path / "none").exists()
    capsys.readouterr()
    code = main(["export", str(distilled), "--out", str(tmp_path / "a.tar"), "--push-to-hub", "me/stripes"])
    assert (code, capsys.readouterr().err) == (
        2,
        "ddfast: --push-to-hub is of --to huggingface: give that as well\n",
    )
