"""Named tensors that survive a kill, and a disk that loses a bit of them."""

import pytest
import torch

from ddfast.errors import UsageError
from ddfast.files import atomic_write_bytes
from ddfast.state import FileCheckpoint, StateFile, serialize_tensors

TENSORS = {
    "pixels": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(3).bfloat16(),
    "none": torch.zeros(0, 5),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "step": torch.tensor(7),
    "flag": torch.tensor([True, False]),
}


def equal(found, wanted=TENSORS):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def checkpoint(tmp_path):
    made = FileCheckpoint(tmp_path / "group-00001.safetensors", "of this run")
    made.save(TENSORS)
    return made


def test_what_is_saved_comes_back(checkpoint, tmp_path):
    assert equal(checkpoint.load())
    assert FileCheckpoint(tmp_path / "group-00002.safetensors", "of this run").load() == {}


def test_another_run_s_state_and_another_group_s_are_none(checkpoint, tmp_path):
    path = tmp_path / "group-00001.safetensors"
    assert FileCheckpoint(path, "of another").load() == {}
    path.rename(tmp_path / "group-00002.safetensors")
    assert FileCheckpoint(tmp_path / "group-00002.safetensors", "of this run").load() == {}


def test_every_damaged_byte_is_noticed(checkpoint, tmp_path, capsys):
    path = tmp_path / "group-00001.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = checkpoint.load()
        assert found == {} or equal(found), place  # a bit of the header's blanks decides nothing
    for length in (0, 5, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        capsys.readouterr()
        assert checkpoint.load() == {}
        assert capsys.readouterr().err.strip().endswith("bytes): what it held is made anew")
    path.write_bytes(whole)
    assert equal(checkpoint.load())


def test_a_training_state_says_what_to_do_with_damage(tmp_path):
    state = StateFile(tmp_path / "teacher.state", "ddfast_training_state")
    state.write(TENSORS, {"epoch": 3})
    found, said = state.read()
    assert equal(found)
    assert said == {"epoch": 3}
    data = bytearray(state.path.read_bytes())
    data[-1] ^= 4
    state.path.write_bytes(data)
    with pytest.raises(UsageError, match=r"is damaged, its bytes are not those .*: delete it to begin anew$"):
        state.read("training state")
    state.path.write_bytes(data[:-3])
    with pytest.raises(
        UsageError, match=r"no complete safetensors training state .*: delete it to begin anew$"
    ):
        state.read("training state")


def test_states_of_versions_without_a_checksum_are_read(tmp_path):
    path = tmp_path / "group-00001.safetensors"
    atomic_write_bytes(path, serialize_tensors(TENSORS, {"scores": "of this run"}))
    assert equal(FileCheckpoint(path, "of this run").load())
    assert FileCheckpoint(path, "of another").load() == {}
    atomic_write_bytes(path, serialize_tensors(TENSORS, {"key": {"said": 1, "epoch": 2}}))
    assert StateFile(path, "key").read()[1] == {"said": 1, "epoch": 2}
