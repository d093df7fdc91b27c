"""The pool, the select by groups of classes, and what a shard says of itself."""

import json
import shutil

import numpy as np
import pytest
import torch

import ddfast
from ddfast.errors import UsageError
from ddfast.output.table import SELECTION_SCHEMA, is_readable, part_path, read_facts, read_table
from ddfast.philox import philox4x32
from ddfast.pipeline import select
from ddfast.pipeline.opening import reopen
from ddfast.pipeline.plan import top_k_of
from ddfast.pipeline.select import class_groups
from ddfast.seeding import stream
from tests.conftest import digests
from tests.pipeline.test_pipeline import distil


def test_the_pool_is_the_first_of_each_class_s_shuffle_in_id_order(toy_folder, toy_teacher, tmp_path):
    run = reopen(distil(toy_folder, toy_teacher, tmp_path / "run", until="score"), quiet=True)
    expected = []
    for label in range(3):
        rows = []
        for place, sample in enumerate(run.source.samples):
            if sample.label == label:
                counter = torch.tensor([[sample.id & 0xFFFFFFFF, (sample.id >> 32) & 0xFFFFFFFF, 0, 0]])
                words = philox4x32(counter, stream(0, "pool"))[0].tolist()
                rows.append((*words[:2], sample.id, place))
        expected += [row[3] for row in sorted(rows)[:12]]
    assert sorted(expected, key=lambda place: run.source.samples[place].id) == run.pool().tolist()


def test_groups_hold_whole_classes_and_few_sources():
    assert class_groups(np.array([5, 5, 5])) == [range(3)]
    counts = np.array([8000, 100, 100, 9000, 8192, 0, 1])
    assert class_groups(counts) == [range(2), range(2, 3), range(3, 4), range(4, 6), range(6, 7)]
    assert class_groups(np.array([9000, 9000])) == [range(1), range(1, 2)]


@pytest.mark.parametrize("method", ["infoutil", "rded", "random"])
def test_groups_of_classes_select_what_the_whole_table_does(
    method, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    one = distil(toy_folder, toy_teacher, tmp_path / "one", method, until="select")
    monkeypatch.setattr(select, "_GROUP_SOURCES", 12)
    monkeypatch.setattr(select, "_BUFFERED_ROWS", 8)
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 16)
    three = distil(toy_folder, toy_teacher, tmp_path / "three", method, until="select")
    assert len(list((three / "scores").iterdir())) == 3
    found = [read_table(out / "selection.parquet", SELECTION_SCHEMA).to_pylist() for out in (one, three)]
    assert found[0] == found[1]
    assert not [path for path in three.iterdir() if "groups" in path.name]


def test_selection_before_all_is_scored_names_what_is_missing(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    part_path(out / "scores", 0).unlink()
    run = reopen(out, quiet=True)
    with pytest.raises(UsageError, match=r"part-00000.parquet is missing: .*resume"):
        ddfast.pipeline.select.select(run)
    assert not (out / "selection.parquet").exists()


def test_a_shard_of_another_place_or_run_is_scored_again(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 16)
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole")
    other = distil(toy_folder, toy_teacher, tmp_path / "other", seed=1, until="score")
    facts = read_facts(part_path(whole / "scores", 1))
    assert facts["shard"] == 1
    assert facts["scores"] != read_facts(part_path(other / "scores", 1))["scores"]
    for donor, index in ((whole, 0), (other, 1)):
        out = distil(toy_folder, toy_teacher, tmp_path / f"run-{index}", until="score")
        shutil.copyfile(part_path(donor / "scores", index), part_path(out / "scores", 1))
        assert is_readable(part_path(out / "scores", 1))
        distil(toy_folder, toy_teacher, out, resume=True)
        assert digests(out) == digests(whole)


def test_a_damaged_image_of_an_earlier_attempt_is_written_again(toy_folder, toy_teacher, tmp_path):
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="compose")
    images = sorted((out / "train").rglob("*.png"))
    images[1].write_bytes(images[1].read_bytes()[:-5])
    content = bytearray(images[2].read_bytes())
    content[len(content) // 2] ^= 1
    images[2].write_bytes(content)
    distil(toy_folder, toy_teacher, out, resume=True)
    assert digests(out) == digests(whole)


def test_quarantined_files_stand_in_a_table_whatever_their_number(
    toy_folder, toy_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("ddfast.pipeline.quarantine._LISTED", 1)
    out = distil(toy_folder, toy_teacher, tmp_path / "run", images_per_class=100)
    rows = [json.loads(line) for line in (out / "quarantined.jsonl").read_text("utf-8").splitlines()]
    assert sorted(row["path"] for row in rows) == ["across/0000a.png", "down/empty.png"]
    listed = json.loads((out / "manifest.json").read_text())["quarantined"]
    assert listed["count"] == 2
    assert [row["path"] for row in listed["files"]] == ["across/0000a.png"]


def test_the_largest_soft_labels_alone_can_be_stored(toy_folder, toy_teacher, tmp_path):
    whole = ddfast.DistilledSet(distil(toy_folder, toy_teacher, tmp_path / "whole"))
    two = ddfast.DistilledSet(distil(toy_folder, toy_teacher, tmp_path / "two", label_top_k=2))
    assert two.stored.values.shape == (6, 4, 2)
    values, classes = whole.stored.values.float().topk(2)
    assert torch.equal(two.stored.values.float(), values)
    assert torch.equal(two.stored.indices.long(), classes)


def test_many_classes_store_the_largest_labels_by_default():
    assert [top_k_of("auto", classes) for classes in (10, 2048, 2049)] == [None, None, 256]
    assert [top_k_of(given, 100) for given in ("all", 100, "7")] == [None, None, 7]
    with pytest.raises(UsageError, match="label_top_k must be auto, all or a positive number, got some"):
        top_k_of("some", 10)
