"""The study of the matching methods with the CMI regulariser, and of what they cost, at sizes that measure nothing."""

import csv
from types import SimpleNamespace

import pytest

from bench.studies import against_time, arms, cmi
from ddfast.errors import UsageError
from ddfast.training import train_proxies
from ddfast.training.student import steps_of_a_pass


@pytest.fixture
def words(toy_folder, toy_teacher, tmp_path):
    """Arguments that all runs here share."""
    train_proxies(
        toy_folder,
        out=tmp_path / "proxies",
        arch="convnet3_in",
        count=1,
        epochs=1,
        images_per_class=8,
        image_size=16,
        quiet=True,
    )
    return [
        *("--data", str(toy_folder), "--teacher", str(toy_teacher), "--proxies", str(tmp_path / "proxies")),
        *("--real-batch", "8", "--cmi", "10", "--students", "1", "--epochs", "1", "--images-per-class", "20"),
        *("--work", str(tmp_path / "work")),
    ]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_trains_every_arm_once_and_pairs_the_deltas(words, tmp_path, monkeypatch, capsys):
    words += ["--ipc", "1,2", "--iterations", "2", "--sets", "2,1:1", "--out", str(tmp_path / "page")]
    assert cmi.main(words) == 0
    counted = {}
    for row in rows_of(tmp_path / "page.csv"):
        counted[row["arm"], row["ipc"]] = counted.get((row["arm"], row["ipc"]), 0) + 1
    assert counted == {
        **dict.fromkeys([("random", "1"), ("herding", "1"), ("DM", "1")], 1),
        **dict.fromkeys([(arm, "2") for arm in ("random", "herding", "DM", "DM + CMI")], 2),
    }
    page = (tmp_path / "page.md").read_text()
    assert "over 2 sets (" in page
    assert "| convnet3_in | 2 | " in page
    assert "(48.9)" not in page  # the paper's are of CIFAR-10
    monkeypatch.setattr(arms, "evaluate", lambda *_, **__: 1 / 0)  # everything is kept
    assert cmi.main(words) == 0
    assert (tmp_path / "page.md").read_text() == page


@pytest.mark.parametrize(
    ("method", "options", "protocol"),
    [
        ("dc", ["outer_loop=2", "inner_loop=1"], "dc"),
        ("dsa", ["outer_loop=2", "inner_loop=1"], "dsa"),
        ("idc", ["inner_loop=2", "net_samples=8", "net_batch=8"], "idc"),
        ("idm", ["net_steps=1", "net_batch=8"], "dsa"),
    ],
)
def test_each_method_runs_by_its_own_protocol(words, tmp_path, method, options, protocol):
    name = method.upper()
    words += ["--method", method, "--ipc", "2", "--iterations", "1", "--sets", "1"]
    words += [word for option in options for word in ("--option", option)]
    words += ["--arms", f"random,{name},{name} + CMI", "--out", str(tmp_path / "page")]
    assert cmi.main(words) == 0
    rows = rows_of(tmp_path / "page.csv")
    assert [row["arm"] for row in rows] == ["random", name, f"{name} + CMI"]
    assert {row["protocol"] for row in rows} == {protocol}
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(option in (tmp_path / "page.md").read_text() for option in options)


def test_mtt_and_another_way_back_share_their_draws(words, tiny_experts, tmp_path):
    place = words.index("--real-batch")  # MTT sees no real images
    del words[place : place + 2]
    words += ["--method", "mtt", "--ipc", "1", "--iterations", "1", "--sets", "2", "--students", "1"]
    words += [
        "--option",
        f"experts={tiny_experts}",
        "--option",
        "syn_steps=3",
        "--option",
        "max_start_epoch=1",
    ]
    words += [
        "--option",
        "expert_epochs=1",
        "--also",
        "detached: unroll=detached",
        "--out",
        str(tmp_path / "page"),
    ]
    assert cmi.main(words) == 0
    rows = rows_of(tmp_path / "page.csv")
    assert [row["arm"] for row in rows] == [
        each for each in ("random", "herding", "MTT", "detached") for _ in "01"
    ]
    page = (tmp_path / "page.md").read_text()
    assert "- detached: unroll=detached" in page
    assert "experts=experts" in page
    top1 = {name: [float(row["top1"]) for row in rows if row["arm"] == name] for name in ("MTT", "detached")}
    gains = [ours - theirs for ours, theirs in zip(top1["detached"], top1["MTT"], strict=True)]
    assert f"- detached, IPC 1: {sum(gains) / 2:+.2f}" in page


@pytest.mark.parametrize("text", ["detached", "detached:", ": x", "detached: unroll"])
def test_a_malformed_arm_is_refused(words, text):
    with pytest.raises(SystemExit):
        cmi.parse(["--method", "dm", *words, "--also", text])


def test_students_of_other_architectures_share_the_sets(words, tmp_path):
    words += [
        "--ipc",
        "2",
        "--iterations",
        "1",
        "--sets",
        "1",
        "--arms",
        "DM",
        "--out",
        str(tmp_path / "page"),
    ]
    words += ["--student", "convnet3_in", "--student", "convnet4_in"]
    assert cmi.main(words) == 0
    rows = rows_of(tmp_path / "page.csv")
    assert [row["student"] for row in rows] == ["convnet3_in", "convnet4_in"]
    assert len([path for path in (tmp_path / "work").glob("dm-*") if path.is_dir()]) == 1
    assert "## Students convnet4_in" in (tmp_path / "page.md").read_text()


def test_the_papers_numbers_stand_beside_those_of_cifar10(words):
    given = cmi.parse(["--method", "idc", *words, "--data", "x/cifar10-jpeg.zip"])
    subject = cmi.SUBJECTS["idc"]
    told = [cmi._paper(arm, 10, "convnet3_in", subject, given) for arm in ("random", "IDC", "IDC + CMI")]
    assert told == [26.0, 67.5, 70.0]
    assert cmi._paper("IDC + CMI", 10, "resnet18_in", subject, given) == 66.0
    other = cmi.parse(["--method", "idc", *words, "--data", "cifar100"])
    assert cmi._paper("IDC", 10, "convnet3_in", subject, other) is None


def test_the_cost_is_drawn_from_the_results_of_several_methods(tmp_path, capsys):
    head = ",".join(cmi.COLUMNS)
    first, second = tmp_path / "cmi_dm.csv", tmp_path / "cmi_idc.csv"
    rows = [
        "random,10,c,dsa,0,0,9,18,30.0,2.0,x",
        "DM,10,c,dsa,0,0,9,18,40.0,100.0,x",
        "DM,10,c,dsa,0,1,9,18,42.0,100.0,x",
    ]
    rows += ["DM,10,c,dsa,1,0,9,18,44.0,200.0,x"]
    first.write_text("\n".join([head, *rows, ""]))
    second.write_text(
        "\n".join([head, "random,10,c,idc,0,0,9,72,32.0,2.0,x", "IDC,10,c,idc,0,0,9,72,60.0,900.0,x", ""])
    )
    words = [str(first), str(second), "--add", "IDC=100", "--out", str(tmp_path / "cost")]
    assert against_time.main(words) == 0
    found = {(row["arm"], row["protocol"]): row for row in rows_of(tmp_path / "cost.csv")}
    assert (found["DM", "dsa"]["seconds"], found["DM", "dsa"]["top1"]) == ("150.0", "42.50")
    assert found["DM", "dsa"]["deviation"] == "2.12"  # of 41 and 44
    assert found["IDC", "idc"]["seconds"] == "1000.0"
    assert len(found) == 4
    assert (tmp_path / "cost.png").stat().st_size > 5_000
    assert "| IDC | 10 | c | idc | 72 | 16m40s | 60.0 ± 0.0 |" in (tmp_path / "cost.md").read_text()
    longer = tmp_path / "cmi_idm.csv"
    longer.write_text("\n".join([head, "random,10,c,dsa,0,0,36,72,33.0,2.0,x", ""]))
    points = against_time.read([first, longer], {})
    assert [against_time._name(point, points) for point in points] == ["random, 18", "DM", "random, 72"]
    longer.write_text("\n".join([head, "random,10,c,dsa,0,0,9,18,33.0,2.0,x", ""]))
    with pytest.raises(UsageError, match="other results of random at IPC 10 than a file before it"):
        against_time.read([first, longer], {})


@pytest.mark.parametrize(
    ("method", "protocol", "option", "updates"),
    [("idc", "idc", [], (700, 64)), ("idm", "dsa", [], (602, 256)), ("idc", "idc", ["factor=1"], None)],
)
def test_students_of_chosen_images_get_the_updates_of_those_that_decode(
    method, protocol, option, updates, monkeypatch
):
    teacher = SimpleNamespace(class_names=list("abcdefghij"), image_size=32, arch="convnet3_in")
    monkeypatch.setattr(cmi, "teacher_at", lambda path: teacher)
    arguments = SimpleNamespace(protocol=protocol, epochs={0: 100 if method == "idc" else 300}, option=option)
    arguments.method, arguments.teacher = method, [None]
    chosen = cmi._training("random", 10, "convnet3_in", arguments)
    own = cmi._training(cmi.SUBJECTS[method].name, 10, "convnet3_in", arguments)
    assert own.batch_size is None
    if updates is None:
        assert chosen == own
    else:
        passes = chosen.epochs + chosen.rules.passes_after
        assert (passes * steps_of_a_pass(100, min(chosen.batch_size, 100)), chosen.batch_size) == updates


def test_the_cost_refuses_results_without_seconds(tmp_path):
    old = tmp_path / "old.csv"
    old.write_text("arm,ipc,set,seed,epochs,top1,commits\n")
    with pytest.raises(UsageError, match="has no column student"):
        against_time.read([old], {})
