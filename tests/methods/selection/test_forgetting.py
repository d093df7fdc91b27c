"""Forgetting events on histories written by hand, and the training that makes them."""

import pytest
import torch

from ddfast.data import pool
from ddfast.errors import UsageError
from ddfast.methods.selection.forgetting import History
from ddfast.output.table import SELECTION_SCHEMA, read_facts, read_table, to_numpy
from ddfast.pipeline import prepare
from ddfast.pipeline.opening import reopen
from ddfast.state import FileCheckpoint
from tests.conftest import digests
from tests.pipeline.test_pipeline import distil

SETTINGS = {"method": "forgetting", "factor": 1, "epochs": 4}


def test_events_are_transitions_from_right_to_wrong():
    # One column an image, one row an epoch; "-" is an epoch in which the image was not visited.
    script = """
        0 1 0 1 1 1
        0 1 1 0 1 0
        0 1 1 1 - 0
        0 1 0 0 0 1
        0 1 0 1 1 0
    """
    history = History(6)
    for line in script.split("\n"):
        visits = [(place, word) for place, word in enumerate(line.split()) if word != "-"]
        for part in (visits[::2], visits[1::2]):  # two batches an epoch
            places = torch.tensor([place for place, _ in part], dtype=torch.int64)
            history.visit(places, torch.tensor([word == "1" for _, word in part], dtype=torch.bool))
    # The first was never read correctly; the second never forgotten.
    assert history.events.tolist() == [0, 0, 1, 2, 1, 2]
    assert history.forgotten(5).tolist() == [5, 0, 1, 2, 1, 2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, toy_teacher):
    return distil(toy_folder, toy_teacher, tmp_path_factory.mktemp("forgetting") / "run", **SETTINGS)


def test_the_most_often_forgotten_images_of_each_class_are_chosen(undisturbed):
    table = to_numpy(read_table(undisturbed / "scores" / "part-00000.parquet"))
    prepared = to_numpy(read_table(undisturbed / "prepared.parquet", prepare.PREPARED_SCHEMA))
    value = dict(zip(prepared["sample_id"].tolist(), prepared["value"].tolist(), strict=True))
    assert len(set(value.values())) > 1  # some are forgotten, some are not
    assert table["score"].tolist() == [value[sample] for sample in table["sample_id"].tolist()]
    assert max(value.values()) <= 4
    chosen = to_numpy(read_table(undisturbed / "selection.parquet", SELECTION_SCHEMA))
    for label in range(3):
        mine = table["label"] == label
        order = sorted(zip(-table["score"][mine], table["sample_id"][mine], strict=True))
        assert chosen["sample_id"][chosen["label"] == label].tolist() == [sample for _, sample in order[:2]]


def test_a_training_that_is_stopped_after_an_epoch_goes_on_from_there(
    undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    save, epochs = FileCheckpoint.save, []

    def stopping(self, tensors):
        save(self, tensors)
        epochs.append(int(tensors["epoch"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(FileCheckpoint, "save", stopping)
    out = tmp_path / "run"
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, toy_teacher, out, resume=True, **SETTINGS)
    assert epochs == [1, 2, 3]
    distil(toy_folder, toy_teacher, out, resume=True, **SETTINGS)
    assert epochs == [1, 2, 3]
    assert digests(out) == digests(undisturbed)


def test_a_damaged_table_is_made_again_and_a_state_of_another_run_is_left(
    undisturbed, toy_folder, toy_teacher, tmp_path
):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score", **SETTINGS)
    path = out / "prepared.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    other = FileCheckpoint(out / prepare._STATE, "0" * 32)
    other.save({"epoch": torch.tensor(3)})
    distil(toy_folder, toy_teacher, out, resume=True, **SETTINGS)
    assert digests(out) == digests(undisturbed)
    assert read_facts(path)["scores"] != "0" * 32


def test_a_pool_that_does_not_fit_is_decoded_in_every_pass(
    undisturbed, toy_folder, toy_teacher, tmp_path, monkeypatch
):
    run = reopen(undisturbed, quiet=True)
    run.plan["images_per_class"] = 100  # all, the unreadable ones too
    held = run.decoded_pool()
    monkeypatch.setattr(pool, "MEMORY_LIMIT", 1)
    streamed = run.decoded_pool()
    order = torch.randperm(len(held.labels), generator=torch.Generator().manual_seed(0))
    assert len(order) == 182
    pairs = list(zip(held.batches(order, 32), streamed.batches(order, 32), strict=True))
    assert [len(places) for (places, _, _), _ in pairs] == [32] * 5 + [20]
    for ours, theirs in pairs:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    out = distil(toy_folder, toy_teacher, tmp_path / "run", **SETTINGS)
    assert digests(out) == digests(undisturbed)


def test_another_architecture_can_be_named(toy_folder, toy_teacher, tmp_path):
    settings = {**SETTINGS, "epochs": 2, "until": "score"}
    distil(toy_folder, toy_teacher, tmp_path / "run", arch="resnet18_small", **settings)
    assert (tmp_path / "run" / "prepared.parquet").is_file()
    with pytest.raises(UsageError, match="arch of forgetting: unknown model 'convnet9'"):
        distil(toy_folder, toy_teacher, tmp_path / "wrong", arch="convnet9", **settings)


def test_a_rate_that_diverges_is_named(toy_folder, toy_teacher, tmp_path):
    with pytest.raises(UsageError, match=r"the loss became (nan|inf) in epoch \d: lower --lr \(now 1e\+30\)"):
        distil(toy_folder, toy_teacher, tmp_path / "run", lr=1e30, **SETTINGS)
