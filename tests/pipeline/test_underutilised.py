"""UDD from the call to the folder, its students and its report; and mUE of any set."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.methods.matching.udd import UDD, corner_windows
from ddfast.output.pixels import Regions, read_pixels, write_pixels
from ddfast.training.evaluation import read_distilled
from tests.conftest import digests

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "ipc": 2,
    "iterations": 2,
    "inner_loop": 2,
    "net_samples": 4,
    "net_batch": 4,
    "real_batch": 3,
    "chooser_steps": 2,
    "image_size": 8,
    "policy": "activation",
    "sizes": "1/2,3/4",
    "lowest": 2,
    "threads": 1,
}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def distil(folder, out, **settings):
    return ddfast.distill("udd", data=folder, out=out, quiet=True, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder):
    return distil(toy_folder, tmp_path_factory.mktemp("udd") / "out")


def test_the_folder_holds_the_regions_and_what_chose_them(undisturbed):
    pixels = read_pixels(undisturbed)
    assert (pixels.space, pixels.factor) == ("unit", 1)
    assert torch.equal(pixels.regions.windows, corner_windows(8, "1/2,3/4"))
    assert pixels.regions.chosen.shape == (6, 2)
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["regions"]["chosen_by"].startswith("a convnet3_in after 2 steps on real images; it read ")
    assert manifest["options"]["synthesize"]["lowest"] == 2
    rows = ddfast.output.read_curve(undisturbed)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [("cfc" in row, "cfc_gradient_norm" in row) for row in rows] == [(False, False)] + [
        (True, True)
    ] * 3


def test_kill_9_and_resume_give_the_same_bytes(undisturbed, toy_folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ddfast", "distill", "udd", "--data", str(toy_folder), "--out", str(out)]
    code = (
        "import sys; from ddfast.pipeline import synthesize; synthesize._SAVE_SECONDS = 0.0; "
        f"from ddfast.cli import main; sys.exit(main({[*command[3:], *FLAGS, '--quiet']!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    while not (out / "state" / "group-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert main([*command[3:], *FLAGS, "--quiet", "--resume"]) == 0
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize(
    "place", ["ddfast.pipeline.synthesize.write_pixels", "ddfast.distillation.write_report"]
)
def test_a_run_that_stops_behind_its_last_step_chooses_the_same(
    place, undisturbed, toy_folder, tmp_path, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(place, stop)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, tmp_path / "out")
    torch.rand(7)
    distil(toy_folder, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)
    distil(toy_folder, tmp_path / "out", resume=True)  # a finished one stays
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_two_ranks_give_the_bytes_of_one_process(undisturbed, toy_folder, tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "ddfast", "distill", "udd", "--data", str(toy_folder), "--out", str(out), *FLAGS, "--quiet"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(undisturbed)


def test_a_teacher_that_is_given_chooses(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(UDD, "step", _still)
    out = distil(toy_folder, tmp_path / "out", teacher=toy_teacher, image_size=16)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["regions"]["chosen_by"] == "the teacher, a convnet3; policy activation"
    assert (manifest["mean"], manifest["std"]) == (
        list(ddfast.load_teacher(toy_teacher).mean),
        manifest["std"],
    )
    assert read_pixels(out).regions.chosen.shape == (6, 2)


def _still(self, number, state, pool, context):
    """A step that changes nothing."""
    state.curve.append({"step": float(number), "loss": 1.0})
    return 1.0


# Students ----------------------------------------------------------------------------------------------------


def test_students_see_the_images_and_their_regions(undisturbed):
    held = read_pixels(undisturbed)
    alone = read_distilled(undisturbed, regions="none")
    assert alone.boxes is None
    assert torch.equal(alone.decoded().images, alone.images)
    chosen, every = (read_distilled(undisturbed, regions=kind).decoded() for kind in ("chosen", "all"))
    assert torch.equal(read_distilled(undisturbed).decoded().images, chosen.images)
    assert chosen.images.shape == (6 * 3, 3, 8, 8)
    assert every.images.shape == (6 * 9, 3, 8, 8)
    assert chosen.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert chosen.decoded() is chosen
    for place in range(6):
        assert torch.equal(chosen.images[3 * place], alone.images[place])
        for number, window in enumerate(held.regions.chosen[place].tolist()):
            x0, y0, x1, y1 = held.regions.windows[window].tolist()
            crop = alone.images[place : place + 1, :, y0:y1, x0:x1]
            large = F.interpolate(crop, size=(8, 8), mode="bilinear", align_corners=False)[0]
            torch.testing.assert_close(chosen.images[3 * place + 1 + number], large)
            torch.testing.assert_close(every.images[9 * place + 1 + window], large)


def test_rounding_is_all_that_differs_in_8_bits(undisturbed):
    exact, rounded = (read_distilled(undisturbed, rounded=kind) for kind in (False, True))
    assert rounded.is_float
    assert torch.equal(rounded.boxes, exact.boxes)
    levels = (
        (rounded.decoded().images - exact.decoded().images).abs()
        * torch.tensor(exact.std).view(3, 1, 1)
        * 255
    )
    assert 0 < float(levels.max()) <= 0.5001
    again = read_distilled(exact, rounded=True)
    torch.testing.assert_close(again.images, rounded.images)


def test_evaluate_says_which_regions_it_used(undisturbed, toy_folder, tmp_path, capsys):
    found = {}
    for regions in ("none", "chosen", "all"):
        out = tmp_path / f"{regions}.json"
        command = ["evaluate", "--distilled", str(undisturbed), "--data", str(toy_folder), "--protocol", "dc"]
        options = ["--seeds", "1", "--epochs", "1", "--regions", regions, "--json", str(out), "--quiet"]
        assert main([*command, *options]) == 0
        said = capsys.readouterr().out
        words = {
            "none": "float32; ",
            "chosen": "and their chosen regions; ",
            "all": "and all of their regions; ",
        }
        assert words[regions] in said
        found[regions] = json.loads(out.read_text())
    assert [one["regions"] for one in found.values()] == ["none", "chosen", "all"]
    assert len({one["recipe"] for one in found.values()}) == 3
    assert len({one["digests"]["images"] for one in found.values()}) == 3
    assert main(["report", str(undisturbed)]) == 0
    page = (undisturbed / "report.html").read_text()
    assert "Images and their chosen regions." in page
    assert "Images and all of their regions." in page


def test_a_set_without_regions_keeps_its_recipe_and_has_none_to_give(undisturbed, toy_folder, tmp_path):
    data = dataclasses.replace(read_distilled(undisturbed), boxes=None)
    options = {"protocol": "dc", "arch": "convnet3_in", "seeds": 1, "epochs": 1, "quiet": True}
    plain, none = (ddfast.evaluate(data, toy_folder, regions=kind, **options) for kind in ("chosen", "none"))
    assert plain.recipe == none.recipe
    assert plain.regions == none.regions == "none"
    assert plain.top1 == none.top1
    with pytest.raises(UsageError, match="regions='all' needs the folder"):
        ddfast.evaluate(data, toy_folder, regions="all", **options)
    with pytest.raises(UsageError, match="regions must be one of none, chosen, all"):
        ddfast.evaluate(data, toy_folder, regions="some", **options)


def test_random_images_it_is_compared_with_show_their_regions_in_the_same_places(
    undisturbed, toy_folder, tmp_path
):
    found = ddfast.compare(
        undisturbed,
        toy_folder,
        coreset="none",
        protocol="dc",
        seeds=2,
        epochs=1,
        out=tmp_path / "c",
        quiet=True,
    )
    (table,) = found.tables
    results = [row.results["hard"] for row in table.rows]
    assert len(results) == 2
    assert {one.regions for one in results} == {"chosen"}
    assert len({one.recipe for one in results}) == len({one.steps for one in results}) == 1


# Storage -----------------------------------------------------------------------------------------------------

WINDOWS = torch.tensor([[0, 0, 4, 4], [4, 4, 8, 8]])


@pytest.mark.parametrize(
    ("windows", "chosen", "factor", "said"),
    [
        (WINDOWS.float(), torch.zeros(3, 1).long(), 1, r"windows must be int64 \[K, 4\], got float32"),
        (WINDOWS[:0], torch.zeros(3, 1).long(), 1, r"windows must be int64 \[K, 4\], got int64 \[0, 4\]"),
        (WINDOWS + 1, torch.zeros(3, 1).long(), 1, r"windows must lie in 8x8, got \[5, 5, 9, 9\]"),
        (WINDOWS[:, [2, 1, 0, 3]], torch.zeros(3, 1).long(), 1, "windows must lie in 8x8"),
        (WINDOWS, torch.zeros(2, 1).long(), 1, r"regions must be int64 \[3, P\], got int64 \[2, 1\]"),
        (WINDOWS, torch.full((3, 1), 2), 1, r"regions must lie in 0\.\.1, got 2\.\.2"),
        (WINDOWS, torch.full((3, 1), -1), 1, r"regions must lie in 0\.\.1"),
        (WINDOWS, torch.zeros(3, 0).long(), 1, "regions must be int64"),
        (WINDOWS, torch.zeros(3, 1).long(), 2, "have tiles, and regions beside them"),
    ],
)
def test_regions_that_do_not_fit_are_not_written(windows, chosen, factor, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        write_pixels(
            tmp_path,
            torch.zeros(3, 3, 8, 8),
            torch.tensor([0, 1, 1]),
            space="unit",
            factor=factor,
            regions=Regions(windows, chosen),
        )
    assert not list(tmp_path.iterdir())


def test_regions_come_back_and_the_file_without_them_is_as_it_was(tmp_path):
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 1])
    write_pixels(
        tmp_path, images, labels, space="unit", regions=Regions(WINDOWS, torch.tensor([[0], [1], [1]]))
    )
    found = read_pixels(tmp_path)
    assert torch.equal(found.images, images)
    assert found.regions.boxes().tolist() == [[[0, 0, 4, 4]], [[4, 4, 8, 8]], [[4, 4, 8, 8]]]
    assert torch.equal(found.regions.boxes("all"), WINDOWS.expand(3, 2, 4))
    write_pixels(tmp_path, images, labels, space="unit")
    assert read_pixels(tmp_path).regions is None
    assert b"windows" not in (tmp_path / "pixels.safetensors").read_bytes()


# Report, and utilization -------------------------------------------------------------------------------------


def test_the_report_shows_the_regions(undisturbed):
    page = (undisturbed / "report.html").read_text()
    assert "The regions that students see" in page
    assert page.count("regions of image") == 6
    assert "Chosen by a convnet3_in after 2 steps" in page
    assert "of CFC, weighted" in page


def test_utilization_prints_three_readings_and_draws_a_picture(undisturbed, toy_folder, tmp_path, capsys):
    out, told = tmp_path / "used.png", tmp_path / "used.json"
    command = [
        "utilization",
        str(undisturbed),
        "--steps",
        "2",
        "--quiet",
        "--out",
        str(out),
        "--json",
        str(told),
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(told.read_text())
    assert lines[0] == f"picture: {out}"
    assert "network: a convnet3_in after 2 steps on real images" in lines[1]
    assert lines[-1] == f"mUE {found['mue']:.3f}"
    assert f"as printed {found['printed']:.5f}, min to max {found['min_max']:.3f}" in lines[-2]
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_utilization_of_a_selected_set_with_a_teacher(toy_folder, toy_teacher, tmp_path):
    from ddfast.report.utilization import utilization

    root = ddfast.distill(
        "random", data=toy_folder, teacher=toy_teacher, ipc=1, out=tmp_path / "o", quiet=True
    )
    found = utilization(root, teacher=toy_teacher, picture=tmp_path / "p.png", quiet=True)
    assert found.images == 3
    assert 0 < found.mue <= 1
    assert found.network.startswith("convnet3, a teacher that reads ")
    with pytest.raises(UsageError, match="arch is missing"):
        utilization(root, quiet=True)
    (tmp_path / "o" / "run.json").unlink()
    with pytest.raises(UsageError, match="names no data: give data, or a teacher"):
        utilization(root, arch="convnet3_in", quiet=True)
