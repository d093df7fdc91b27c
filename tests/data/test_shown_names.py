"""Names to show for classes whose own are WordNet ids: read, kept beside the keys, and shown."""

import json

import pytest
import torch

import ddfast
from ddfast.cli import main
from ddfast.data.shown_names import check_shown_names, read_shown_names
from ddfast.errors import UsageError

IDS = ["n01440764", "n01443537", "n02012849"]
NAMES = ["tench, Tinca tinca", "goldfish", "crane"]


def file_of(tmp_path, text, name="names.txt"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02012849 crane\n",
        "n02012849\tcrane\nn01440764\ttench, Tinca tinca\nn99999999\tnothing of ours\nn01443537\tgoldfish\n",
        'n01440764,"tench, Tinca tinca"\nn01443537,goldfish\nn02012849,crane\n',
        "n01440764: tench, Tinca tinca\nn01443537: goldfish\nn02012849: crane",
        "n01440764 = tench, Tinca tinca\r\nn01443537 = goldfish\r\nn02012849 = crane\r\n",
        "n01440764 449 tench, Tinca tinca\nn01443537 450 goldfish\nn02012849 451 crane\n",
        "\ufefftench, Tinca tinca\n\ngoldfish\ncrane\n\n",
        json.dumps(dict(zip(IDS, NAMES, strict=True))),
        json.dumps(NAMES),
        json.dumps(
            {str(place): [key, name] for place, (key, name) in enumerate(zip(IDS, NAMES, strict=True))}
        ),
        json.dumps([list(pair) for pair in zip(IDS, NAMES, strict=True)]),
    ],
)
def test_files_of_classes_and_names_are_read(text, tmp_path):
    assert read_shown_names(file_of(tmp_path, text), IDS) == NAMES


def test_names_in_memory_are_read():
    assert read_shown_names(dict(zip(IDS, NAMES, strict=True)), IDS) == NAMES
    assert read_shown_names(NAMES, IDS) == NAMES
    assert read_shown_names(dict(zip(IDS[::-1], NAMES[::-1], strict=True)), IDS) == NAMES


def test_classes_of_several_words_keep_theirs():
    lines = ["traffic: cars and all", "traffic light: lamp at a crossing", "7: seven"]
    assert read_shown_names(lines, ["traffic", "traffic light", "7"]) == [
        "cars and all",
        "lamp at a crossing",
        "seven",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n01440764 tench\nn01443537 goldfish\n",
            "names 2 of 3 classes, not n02012849: give a line for each",
        ),
        ("one\ntwo\n", "names 0 of 3 classes, not n01440764, n01443537, n02012849"),
        ("", "must be {class: name} or names"),
        ('{"n01440764": "tench"}', "names 1 of 3 classes"),
        ('["a", "b"]', "names 0 of 3 classes"),
        ('["a", "b", " "]', "names 2 of 3 classes"),
        ("{}", "must be"),
    ],
)
def test_what_names_too_few_is_refused_in_one_line(text, message, tmp_path):
    with pytest.raises(UsageError) as caught:
        read_shown_names(file_of(tmp_path, text), IDS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_before_the_data(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        check_shown_names(tmp_path / "nowhere.txt")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match=r"broken\.json is no JSON"):
        check_shown_names(tmp_path / "broken.json")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no UTF-8 text"):
        check_shown_names(str(tmp_path / "bytes.txt"))
    with pytest.raises(UsageError, match="must be"):
        check_shown_names(7)


def test_names_stand_in_manifest_report_and_exports_and_folders_stay_the_keys(
    toy_folder, toy_teacher, tmp_path, capsys
):
    names = file_of(
        tmp_path, "across <stripes> that run across\ndown stripes down\nrising stripes that rise\n"
    )
    wanted = ["<stripes> that run across", "stripes down", "stripes that rise"]
    run = [
        "distill",
        "random",
        "--data",
        str(toy_folder),
        "--teacher",
        str(toy_teacher),
        "--ipc",
        "2",
        "--quiet",
    ]
    assert main([*run, "--class-names", str(names), "--out", str(tmp_path / "set")]) == 0
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["class_names"], manifest["display_names"]) == (["across", "down", "rising"], wanted)
    assert sorted(path.name for path in (tmp_path / "set" / "train").iterdir() if path.is_dir()) == [
        "00000_across",
        "00001_down",
        "00002_rising",
    ]
    opened = ddfast.DistilledSet(tmp_path / "set")
    assert (opened.classes, opened.display_names) == (["across", "down", "rising"], wanted)
    page = (tmp_path / "set" / "report.html").read_text()
    assert "&lt;stripes&gt; that run across" in page
    assert "<stripes>" not in page
    assert main(["report", str(tmp_path / "set"), "--data", str(toy_folder)]) == 0
    assert (tmp_path / "set" / "report.html").read_text() == page
    out = tmp_path / "hub"
    assert main(["export", str(tmp_path / "set"), "--to", "huggingface", "--out", str(out)]) == 0
    import pyarrow.parquet as pq

    schema = pq.read_schema(out / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == wanted
    assert "stripes that rise" in (out / "README.md").read_text()
    assert main(["export", str(tmp_path / "set"), "--out", str(tmp_path / "all.tar")]) == 0
    assert (tmp_path / "classes.txt").read_text() == "across\ndown\nrising\n"
    # The same run without names has the same pixels; its manifest says no others.
    assert main([*run, "--out", str(tmp_path / "plain")]) == 0
    plain = ddfast.DistilledSet(tmp_path / "plain")
    assert "display_names" not in plain.manifest
    assert plain.display_names == plain.classes
    assert all(torch.equal(a[0], b[0]) for a, b in zip(opened, plain, strict=True))
    assert "display_name" not in json.dumps(plain.rows)
    # A manifest is a file of flags, and a run of other names is another run.
    capsys.readouterr()
    assert (
        main(["distill", "--config", str(tmp_path / "set" / "manifest.json"), "--out", str(tmp_path / "2")])
        == 0
    )
    assert ddfast.DistilledSet(tmp_path / "2").display_names == wanted
    capsys.readouterr()
    assert main([*run, "--out", str(tmp_path / "set"), "--resume"]) == 2
    assert "already holds a different run (display_names: " in capsys.readouterr().err


def test_equal_names_are_told_apart_for_hugging_face(toy_folder, tmp_path):
    from ddfast.output.huggingface import export_huggingface

    made = ddfast.distill(
        "random_hard",
        data=toy_folder,
        ipc=1,
        image_size=16,
        class_names=["crane", "crane", "maillot"],
        out=tmp_path / "set",
        quiet=True,
    )
    export_huggingface(made.path, tmp_path / "hub")
    import pyarrow.parquet as pq

    schema = pq.read_schema(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == ["crane (0)", "crane (1)", "maillot"]
