"""Coresets by features: the rules on small cases worked out by hand, and their runs byte for byte."""

import dataclasses
import html
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ddfast
from ddfast import files
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.methods import get_method, list_methods
from ddfast.methods.selection.base import Table
from ddfast.methods.selection.k_means import lloyd, seed_clusters
from ddfast.models.registry import features
from ddfast.output.table import SELECTION_SCHEMA, feature_width, part_path, read_table, to_numpy
from ddfast.pipeline import select
from ddfast.pipeline.opening import reopen
from tests.conftest import digests
from tests.pipeline.test_pipeline import Killed, distil

ROOT = Path(__file__).resolve().parents[3]
CORESETS = ["herding", "k_center", "k_means", "forgetting"]
SMALL = {"forgetting": {"epochs": 3}}


def pick(name, points, needed, **options):
    """Chosen places and scores of features, one row a point (numbers stand for a line)."""
    values = torch.tensor(points, dtype=torch.float64).view(len(points), -1)
    picks, scores = get_method(name).from_options(options).pick(values, needed, 7)
    return picks.tolist(), scores.tolist()


def test_the_registry_has_the_coresets_behind_the_other_methods():
    assert list_methods()[:7] == ["infoutil", "rded", "random", *CORESETS]
    for name in CORESETS:
        assert get_method(name).name == name
        assert get_method(name).summary.startswith("whole images")


def test_herding_follows_the_mean_on_a_line():
    # mean 4. |4 - x| is 0 at 4; then |8 - 4 - x| is 1 at 3; then |12 - 7 - x| is 1 at 6.
    points = np.array([0.0, 3, 4, 6, 7])
    picks, scores = pick("herding", points.tolist(), 3)
    assert picks == [2, 1, 3]
    assert scores == pytest.approx([0, -0.5, -1 / 3])  # how far the means 4, 3.5 and 13/3 are from 4


def test_herding_weighs_what_it_has_already_chosen():
    # mean 5. 4 and 6 tie at |5 - x| = 1, and the first wins; then |10 - 4 - x| is 0 at 6, where the point nearest the
    # mean would be 6 as well; then |15 - 10 - x| is 4 at both that are left.
    picks, scores = pick("herding", [4, 9, 6, 1], 4)
    assert picks == [0, 2, 1, 3]
    assert scores == pytest.approx([-1, 0, -4 / 3, 0])


def test_k_center_takes_the_farthest_point_from_all_centres():
    # mean 5.2: nearest is 6. Farthest from 6 is 0 (6 away); then 11 (5 away from 6); 1 and 8 are left at 1 and 2.
    picks, scores = pick("k_center", [0, 1, 6, 8, 11], 4)
    assert picks == [2, 0, 4, 3]
    assert scores == [-6, -5, -2, -1]


def test_k_center_takes_each_point_once_where_images_repeat():
    assert pick("k_center", [3, 3, 3], 3) == ([0, 1, 2], [0, 0, 0])


def test_k_means_picks_the_middle_of_separated_clusters():
    low, high, far = [0, 1, 2.1], [100, 101, 102.2, 103], [1000, 1001.5]
    picks, scores = pick("k_means", [*low, *high, *far], 3)
    # Centres 1.0333, 101.55 and 1000.75; the clusters in the order of their sizes. Of the two in the last the first.
    assert picks == [4, 1, 7]
    assert scores == pytest.approx([-0.55, -1 / 30, -0.75])


def test_k_means_is_the_best_of_its_restarts():
    draws = np.random.default_rng(3).normal(size=(60, 5))
    values = torch.from_numpy(draws)

    def inertia(places):
        cluster = (values[:, None] - values[places][None]).square().sum(-1).argmin(1)
        return sum(
            float((values[cluster == c] - values[cluster == c].mean(0)).square().sum()) for c in range(6)
        )

    method = get_method("k_means").from_options({"restarts": 8})
    found = [method._clustered(values, 6, 5, restart)[0] for restart in range(8)]
    assert len(set(found)) > 1
    # Lloyd's algorithm never ends above where k-means++ began.
    for restart, value in enumerate(found):
        assert value <= inertia(seed_clusters(values, 6, 5, restart)) + 1e-9
    best = method._clustered(values, 6, 5, int(np.argmin(found)))[1]
    picks, _ = method.pick(values, 6, 5)
    assert sorted(best[picks].tolist()) == [0, 1, 2, 3, 4, 5]


def test_k_means_seeds_are_drawn_by_squared_distance():
    values = torch.tensor([[0.0], [0.0], [1.0], [3.0]], dtype=torch.float64)
    drawn = torch.stack([seed_clusters(values, 2, 11, restart) for restart in range(1500)])
    first = torch.bincount(drawn[:, 0], minlength=4) / 1500
    assert first.tolist() == pytest.approx([0.25] * 4, abs=0.05)
    after_zero = drawn[drawn[:, 0] == 0][:, 1]
    assert set(after_zero.tolist()) == {2, 3}
    assert float((after_zero == 3).double().mean()) == pytest.approx(0.9, abs=0.05)


def test_k_means_fills_every_cluster_where_images_repeat():
    values = torch.tensor([[1.0], [1.0], [1.0], [5.0]], dtype=torch.float64)
    assert sorted(torch.bincount(lloyd(values, values[:3], 100), minlength=3).tolist()) == [1, 1, 2]
    picks, scores = get_method("k_means").from_options({}).pick(values, 3, 0)
    assert len(set(picks.tolist())) == 3
    assert 3 in picks
    assert scores.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["herding", "k_center"])
def test_a_small_ipc_is_the_beginning_of_a_large_one(name):
    points = np.random.default_rng(0).normal(size=(40, 8)).tolist()
    few, many = pick(name, points, 5), pick(name, points, 40)
    assert many[0][:5] == few[0]
    assert sorted(many[0]) == list(range(40))


def test_rules_rank_each_class_alone_in_the_order_of_ids():
    ids = np.array([30, 10, 20, 5, 50, 40])
    table = Table(
        {
            "sample_id": ids,
            "label": np.array([0, 0, 0, 1, 1, 1], dtype=np.int32),
            **{name: np.zeros(6, np.float32) for name in ("score", "grad_norm", "loss")},
            "crop": np.zeros(6, np.int16),
            "correct": np.zeros(6, bool),
            "features": np.array([[2], [0], [2], [1], [9], [2]], np.float32),
        },
        seed=3,
    )
    ranked, score = get_method("herding").from_options({}).rank(table, 2)
    # Class 0: mean 4/3; the two at 2 are equal, the one of id 20 is row 2; then |8/3 - 2 - x| is least at 0.
    # Class 1: mean 4: 2 is nearest (2), then |8 - 2 - x| is 3 at 9 and 5 at 1.
    assert {label: rows.tolist() for label, rows in ranked.items()} == {0: [2, 1], 1: [5, 4]}
    assert np.isnan(score[[0, 3]]).all()
    assert score[[2, 1, 5, 4]] == pytest.approx([-2 / 3, -1 / 3, -2, -1.5])
    ranked, _ = get_method("k_center").from_options({"unit_length": True}).rank(table, 1)
    assert ranked[1].tolist() == [3]  # all are 1 there: the lowest id


def test_no_option_of_a_method_is_called_as_one_of_distill():
    taken = set(inspect.signature(ddfast.distill).parameters)
    for name in list_methods():
        fields = dataclasses.fields(get_method(name).Options)
        assert all(field.metadata["help"] for field in fields)
        assert not taken & {field.name for field in fields}


def test_options_that_make_no_sense_are_refused():
    for name, options in (
        ("k_means", {"restarts": 0}),
        ("forgetting", {"epochs": 1}),
        ("forgetting", {"lr": 0}),
    ):
        with pytest.raises(UsageError, match=f"options of {name}: {next(iter(options))} must be"):
            get_method(name).from_options(options)


# Runs
# -----------------------------------------------------------------------------------------------------------


def run(method, toy_folder, toy_teacher, out, **settings):
    return distil(toy_folder, toy_teacher, out, method, **{"factor": 1, **SMALL.get(method, {}), **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, toy_teacher):
    """A finished run of every coreset."""
    root = tmp_path_factory.mktemp("coresets")
    return {name: run(name, toy_folder, toy_teacher, root / name) for name in CORESETS}


@pytest.mark.parametrize("method", ["herding", "k_center", "k_means"])
def test_the_score_table_keeps_the_teacher_s_features(method, undisturbed, toy_folder, toy_teacher):
    path = part_path(undisturbed[method] / "scores", 0)
    columns = to_numpy(read_table(path))
    teacher, source = ddfast.load_teacher(toy_teacher), ddfast.data.open_source(toy_folder, "train")
    assert columns["features"].shape == (36, 32)  # width 8, 16 px halved three times: 8 x 2 x 2
    assert feature_width(path) == 32
    image = ddfast.data.decoding.decode(source.read(source.by_id(int(columns["sample_id"][5])))).double()
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (teacher.mean, teacher.std))
    expected = features(teacher.model.double(), ((image / 255 - mean) / std)[None])[0]
    torch.testing.assert_close(
        torch.from_numpy(columns["features"][5].copy()).double(), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", CORESETS)
def test_a_coreset_is_whole_images_with_soft_labels(method, undisturbed):
    train = ddfast.DistilledSet(undisturbed[method])
    assert [row["tiles"][0]["box"] for row in train.rows] == [[0, 0, 16, 16]] * 6
    assert train.soft_labels.shape == (6, 1, 3)
    assert all(np.isfinite(row["tiles"][0]["score"]) for row in train.rows)
    assert len({row["tiles"][0]["source"] for row in train.rows}) == 6


@pytest.mark.parametrize("method", CORESETS)
def test_the_report_says_what_was_chosen(method, undisturbed):
    page = html.unescape((undisturbed[method] / "report.html").read_text("utf-8"))
    assert f"W{get_method(method).summary[1:]}." in page
    assert ("forgetting events" in page) == (method == "forgetting")


def test_features_stay_out_of_the_other_methods_tables(toy_folder, toy_teacher, tmp_path):
    out = run("random", toy_folder, toy_teacher, tmp_path / "run", until="score")
    assert feature_width(part_path(out / "scores", 0)) == 0


@pytest.mark.parametrize("method", CORESETS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_a_byte(
    batch_size, method, undisturbed, toy_folder, toy_teacher, tmp_path
):
    out = run(method, toy_folder, toy_teacher, tmp_path / "run", batch_size=batch_size)
    assert digests(out) == digests(undisturbed[method])


@pytest.mark.parametrize("method", CORESETS)
def test_a_run_that_dies_at_any_write_resumes_to_the_same_bytes(
    method, undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dying)
    deaths = 0
    while deaths < 40:
        left[0] = deaths
        try:
            run(method, toy_folder, toy_teacher, tmp_path / "run", resume=True)
            break
        except Killed:
            deaths += 1
    assert deaths >= 8
    assert digests(tmp_path / "run") == digests(undisturbed[method])


@pytest.mark.parametrize("method", CORESETS)
def test_groups_of_classes_select_what_the_whole_table_does(
    method, undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(select, "_FEATURE_BYTES", 12 * 32 * 4)  # one class of 12 images with 32 features
    monkeypatch.setattr(select, "_GROUP_SOURCES", 12)
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 16)
    out = run(method, toy_folder, toy_teacher, tmp_path / "run", until="select")
    assert len(list((out / "scores").iterdir())) == 3
    found = [
        read_table(folder / "selection.parquet", SELECTION_SCHEMA).to_pylist()
        for folder in (out, undisturbed[method])
    ]
    assert found[0] == found[1]


def test_groups_are_bounded_by_the_bytes_of_their_features():
    counts = np.array([300] * 100)
    assert len(select.class_groups(counts)) == 4  # 27 classes of 300 are less than 8192 sources
    # 128 MiB / (4 x 2048) = 16384 sources, so the sources bind; at 25088 features it is 1337, four classes.
    assert len(select.class_groups(counts, 2048)) == 4
    assert len(select.class_groups(counts, 25088)) == 25
    assert len(select.class_groups(counts, 10**9)) == 100


def test_a_shard_without_a_readable_image_has_no_features(toy_folder, toy_teacher, tmp_path, monkeypatch):
    whole = run("herding", toy_folder, toy_teacher, tmp_path / "whole", images_per_class=100, until="select")
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 1)
    out = run("herding", toy_folder, toy_teacher, tmp_path / "run", images_per_class=100, until="select")
    widths = [feature_width(path) for path in sorted((out / "scores").iterdir())]
    assert widths.count(0) == 2
    chosen = [to_numpy(read_table(o / "selection.parquet", SELECTION_SCHEMA)) for o in (whole, out)]
    assert chosen[0]["sample_id"].tolist() == chosen[1]["sample_id"].tolist()


@pytest.mark.parametrize("method", ["k_means", "forgetting"])
def test_two_ranks_give_the_bytes_of_one_process(method, toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 32)
    alone = run(method, toy_folder, toy_teacher, tmp_path / "alone", images_per_class=100)
    assert len(list((alone / "scores").iterdir())) == 6
    script = tmp_path / "small_shards.py"
    script.write_text(
        "import sys\nfrom ddfast.cli import main\nfrom ddfast.pipeline import plan\n"
        "plan.SHARD_SOURCES = 32\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
        ),
        *(
            "distill",
            method,
            "--data",
            str(toy_folder),
            "--teacher",
            str(toy_teacher),
            "--ipc",
            "2",
            "--quiet",
        ),
        *("--images-per-class", "100", "--factor", "1", "--out", str(tmp_path / "two")),
        *(["--epochs", "3"] if method == "forgetting" else []),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "two") == digests(alone)


def test_the_stages_one_at_a_time_by_command_line(undisturbed, toy_folder, toy_teacher, tmp_path, capsys):
    for method in CORESETS:
        out = tmp_path / method
        words = [
            "--data",
            toy_folder,
            "--teacher",
            toy_teacher,
            "--ipc",
            2,
            "--images-per-class",
            12,
            "--quiet",
        ]
        words += ["--factor", 1, "--out", out, *(["--epochs", 3] if method == "forgetting" else [])]
        assert main(["score", method, *map(str, words)]) == 0
        for stage in ("select", "compose", "relabel"):
            assert main([stage, str(out), "--quiet"]) == 0
        assert digests(out) == digests(undisturbed[method])
    capsys.readouterr()


def test_help_explains_the_options(capsys):
    for method, words in (
        ("herding", ["--unit-length"]),
        ("k_means", ["--restarts", "(default: 10)", "--iterations"]),
        ("forgetting", ["--epochs", "(default: 50)", "--arch", "--lr", "--train-batch-size"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["distill", method, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words)


def test_another_ipc_needs_no_second_pass(undisturbed, toy_folder, toy_teacher, tmp_path):
    for method in CORESETS:
        shared = run(
            method, toy_folder, toy_teacher, tmp_path / f"{method}-shared", ipc=1, scores=undisturbed[method]
        )
        anew = run(method, toy_folder, toy_teacher, tmp_path / method, ipc=1)
        assert digests(shared) == digests(anew)


def test_another_seed_draws_other_clusters():
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(80, 3)))
    method = get_method("k_means").from_options({"restarts": 1})
    found = {tuple(sorted(method.pick(values, 8, key)[0].tolist())) for key in range(6)}
    assert len(found) > 1


def test_a_teacher_that_returns_nan_is_refused(toy_folder, toy_teacher, tmp_path):
    teacher = ddfast.load_teacher(toy_teacher)
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(float("nan"))
    with pytest.raises(UsageError, match="NaN"):
        run("herding", toy_folder, teacher, tmp_path / "run", preflight=False)


def test_the_manifest_names_the_prepared_table(undisturbed):
    plans = {name: json.loads((out / "manifest.json").read_text()) for name, out in undisturbed.items()}
    assert [name for name, plan in plans.items() if "prepared" in plan] == ["forgetting"]
    found = digests(undisturbed["forgetting"])
    assert plans["forgetting"]["prepared"] == {
        "file": "prepared.parquet",
        "sha256": found["prepared.parquet"],
    }
    assert reopen(undisturbed["forgetting"], quiet=True).complete
