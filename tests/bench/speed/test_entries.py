"""Every speed entry at tiny sizes, its gate with a wrong contender, and the runner's files. No time is asserted."""

import csv

import pytest
import torch

import ddfast
from bench.__main__ import load_entries, main
from bench.speed import attribution, op_cases
from bench.speed.registry import GateFailed, Settings, Unavailable
from bench.speed.results import COLUMNS
from bench.speed.subjects import group_norm_resnet18, random_resnet18, subject
from ddfast.errors import UsageError

QUICK = Settings(torch.device("cpu"), quick=True)


def test_the_list_names_every_entry_and_command(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in (*load_entries(), "all", "compare", "kill", "static", "gpu"):
        assert f"  {name} " in listed


def test_an_unknown_bench_lists_the_known_ones(capsys):
    assert main(["speed"]) == 2
    told = capsys.readouterr().err
    assert "known: captum, masked_forward" in told
    assert all(f" {name}," in told for name in ("all", "compare", "gpu", "kill"))


def test_all_entries_pass_their_gates_and_write_their_files(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DDFAST_PEERS", raising=False)
    before = torch.get_num_threads()
    try:
        code = main(["all", "--quick", "--threads", str(before), "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(before)
    assert code == 0, capsys.readouterr().out
    # Their peers are checkouts that this one does not bring.
    missing = {
        *("dm_iteration", "dm_cmi_iteration", "dsa_iteration", "idc_step", "idm_iteration"),
        *("mtt_iteration", "sre2l_step"),
    }
    assert not [name for name in missing if (tmp_path / f"{name}.csv").exists()]
    entries = [name for name in load_entries() if name not in missing]
    for name in entries:
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows, name
        assert tuple(rows[0]) == COLUMNS
        assert all(row["entry"] == name and row["gate"] for row in rows)
        assert all(row["ratio_p50"] or row["share_p50"] or row["seconds_p50"] for row in rows)
    text = (tmp_path / "speed_cpu.md").read_text()
    assert all(f"| {name} |" in text for name in entries)
    assert (tmp_path / "speed_cpu.png").stat().st_size > 10_000


def test_quick_results_never_land_among_the_real_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ops", "--quick"])
    assert stopped.value.code == 2
    assert "needs a folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("masked_forward", "shapley"),
        ("exact", "shapley"),
        ("grad_norm", "grad_norm"),
    ],
)
def test_an_entry_refuses_to_time_a_wrong_engine(monkeypatch, entry, wrong):
    right = getattr(ddfast, wrong)
    monkeypatch.setattr(ddfast, wrong, lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    with pytest.raises(GateFailed, match="refuses to time"):
        load_entries()[entry].run(Settings(torch.device("cpu"), quick=True))


def test_an_estimator_that_never_reaches_captums_error_is_refused():
    truth = torch.ones(2, 16, dtype=torch.float64)
    budget, error = attribution._least_budget(lambda budget, seed: truth * (1 + 1 / budget), truth, 1 / 39**2)
    assert budget == 40
    assert error == pytest.approx(1 / 40**2)
    with pytest.raises(GateFailed, match="no budget up to 256 evaluations"):
        attribution._least_budget(lambda budget, seed: truth * 2, truth, 0.1)


def test_ops_refuse_a_wrong_op(monkeypatch):
    right = op_cases.ops.shapley_heatmap
    monkeypatch.setattr(op_cases.ops, "shapley_heatmap", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    with pytest.raises(GateFailed, match="shapley_heatmap"):
        load_entries()["ops"].run(QUICK)


def test_a_failed_gate_is_told_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    right = ddfast.grad_norm
    monkeypatch.setattr(ddfast, "grad_norm", lambda *args, **kwargs: right(*args, **kwargs) * 2)
    assert main(["grad_norm", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "refuses to time" in capsys.readouterr().out
    assert not (tmp_path / "grad_norm.csv").exists()


def test_a_missing_peer_is_told(monkeypatch, tmp_path, capsys):
    def missing(package):
        raise Unavailable(f"{package} is not installed")

    monkeypatch.setattr("bench.speed.norms.require", missing)
    assert main(["grad_norm_opacus", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "not measured: opacus is not installed" in capsys.readouterr().out


def test_every_fused_op_has_a_case():
    served = {case.op for case in op_cases.op_cases(QUICK)}
    assert served | {"crop_resize_backward"} == {path.op for path in ddfast.ops.paths()}


def test_direct_enumeration_by_the_definition():
    # v(s) = sum of weights of s plus an interaction, whose Shapley values are known in closed form.
    weights, interaction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 3.0
    code = torch.arange(8)
    present = (code[:, None] >> torch.arange(3)) & 1
    values = present.double() @ weights + interaction * (present[:, 0] * present[:, 2])
    phi = attribution.shapley_of_values(values, 3)
    torch.testing.assert_close(phi, weights + torch.tensor([1.5, 0.0, 1.5], dtype=torch.float64))


def test_players_are_those_of_the_engine():
    images = torch.ones(1, 1, 7, 10)
    players = attribution.player_map(3, 4, 7, 10)
    masked = ddfast.ops.masked_batch(images, torch.eye(12, dtype=torch.bool), grid=(3, 4))
    for player in range(12):
        assert torch.equal(masked[player, 0] == 1, players == player)


def test_subjects_are_the_same_every_time():
    first, second = random_resnet18(32, classes=5), random_resnet18(32, classes=5)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not first.training
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(group_norm_resnet18(5)(images), group_norm_resnet18(5)(images))
    one, other = (subject(QUICK, 2, 32) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)


def test_a_teacher_needs_its_data(tmp_path):
    with pytest.raises(UsageError, match="go together"):
        subject(Settings(torch.device("cpu"), teacher=tmp_path / "t.safetensors"), 2, 32)
