"""The demo at toy size: what it writes and prints, that it takes up what stands, and what it refuses."""

import json
from dataclasses import replace

import pytest

from ddfast.demo import demo
from ddfast.demo.demo import CONTESTANTS, DemoSettings, holds, run_demo
from ddfast.demo.shapes import Box, ShapesConfig, read_boxes
from ddfast.errors import UsageError
from ddfast.output import DistilledSet

TOY = DemoSettings(
    shapes=ShapesConfig(
        image_size=32, train_per_class=12, test_per_class=3, clutter=0.0, turn=0.0, radius=(0.2, 0.22)
    ),
    arch="convnet3",
    width=16,
    teacher_epochs=16,
    teacher_batch=24,
    teacher_lr=0.05,
    images_per_class=8,
    ipc=1,
    student_epochs=4,
    students=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, quiet=True, settings=TOY)


def files_of(out):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def test_the_folder_holds_every_stage(finished):
    out, result = finished
    assert result.report == out / "report.html"
    assert (out / "mosaic.png").is_file()
    assert (out / "teacher.safetensors").is_file()
    for contestant in CONTESTANTS:
        distilled = DistilledSet(out / contestant.folder)
        assert len(distilled) == 10
        assert distilled.manifest["method"] == contestant.method
        assert distilled.manifest["factor"] == contestant.factor == 2


def test_both_sets_are_judged_by_the_same_teacher_and_students(finished):
    out, result = finished
    assert [one.name for one in result.standings] == ["InfoUtil", "random"]
    for contestant, one in zip(CONTESTANTS, result.standings, strict=True):
        held = json.loads((out / f"evaluation-{contestant.folder}.json").read_text())
        assert held["result"]["top1"] == one.top1
        assert len(one.top1) == 2
        assert held["result"]["labels"] == "online"
        assert held["result"]["arch_options"] == {"width": 16}
        assert (
            held["depends_on"]["teacher"]
            == DistilledSet(out / contestant.folder).manifest["teacher"]["sha256"]
        )


def test_covered_counts_the_crops_that_hold_the_centre(finished):
    out, result = finished
    boxes = read_boxes(out / "data")
    tiles = [t for row in DistilledSet(out / "infoutil").rows for t in row["tiles"]]
    found = [holds(t["box"], boxes[t["source"]].centre) for t in tiles]
    assert result.standings[0].covered == sum(found) / len(found)
    assert len(found) == 40
    assert result.standings[1].covered is None  # whole images cover everything: no number


def test_running_it_again_takes_up_what_stands(finished, capsys, monkeypatch):
    out, result = finished
    before = files_of(out)

    def again(*_, **__):
        raise AssertionError("a stage that was finished ran again")

    monkeypatch.setattr(demo, "write_shapes", again)
    monkeypatch.setattr("ddfast.training.evaluate", again)
    assert run_demo(out, settings=TOY) == result
    said = capsys.readouterr()
    assert "stand in" in said.err
    assert "InfoUtil" in said.out
    assert "whole images" in said.out
    assert str(out / "report.html") in said.out
    assert files_of(out) == before


def test_a_lost_stage_is_done_again_to_the_same_bytes(finished):
    out, result = finished
    before = files_of(out)
    (out / "evaluation-random.json").unlink()
    (out / "data" / "shapes.json").unlink()
    (out / "report.html").unlink()
    assert run_demo(out, quiet=True, settings=TOY) == result
    assert files_of(out) == before


def test_another_seed_or_size_in_the_same_folder_is_refused(finished):
    out, _ = finished
    before = files_of(out)
    with pytest.raises(UsageError, match="another seed, version or settings"):
        run_demo(out, seed=1, quiet=True, settings=TOY)
    with pytest.raises(UsageError, match="another seed, version or settings"):
        run_demo(out, quiet=True, settings=replace(TOY, ipc=2))
    assert files_of(out) == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="holds no ddfast demo"):
        run_demo(tmp_path, quiet=True, settings=TOY)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="is a file"):
        run_demo(tmp_path / "thesis.tex", quiet=True, settings=TOY)


def test_holds_is_half_open():
    box = (10, 10, 20, 20)
    assert holds(box, (10, 10))
    assert not holds(box, (20, 15))
    assert not holds(box, (15, 20))
    assert Box(10, 12, 21, 20).centre == (15.5, 16)
