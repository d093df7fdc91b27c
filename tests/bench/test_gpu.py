"""The GPU run's plan, limits and tables, tried on the CPU. Its sections run here at tiny sizes."""

import time

import pytest
import torch

from bench import gpu
from bench.__main__ import load_entries
from bench.gpu import Outcome, Section
from bench.op_cases import op_cases
from bench.registry import Check, Settings
from bench.results import rows_of, write_csv
from tests.bench.test_results import ENTRY, SHARE, SPEED

QUICK = Settings(torch.device("cpu"), quick=True)


def section(name, code, limit=60.0):
    return Section(name, "what", limit, ("-c", code))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "no CUDA device" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_cpu_only_tries_the_path(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    assert stopped.value.code == 2
    assert "add --quick" in capsys.readouterr().err


def test_the_plan_holds_every_speed_entry_and_fits_its_limits(tmp_path):
    plan = gpu.sections("cuda", quick=False, work=tmp_path)
    names = [each.name for each in plan]
    assert len(set(names)) == len(names)
    assert set(names) == {"ceilings", "tests", "roofline", "profile", *load_entries()}
    assert names.index("ceilings") < names.index("roofline")
    assert max(each.limit for each in plan) <= 60 * gpu.MINUTES / 4
    quick = gpu.sections("cpu", quick=True, work=tmp_path)
    assert all("--quick" in each.command for each in quick if each.name != "tests")


def test_a_slow_section_is_stopped_and_keeps_what_it_printed():
    slow = section("slow", "print('begun'); import time; time.sleep(60)")
    outcome = gpu.run_section(slow, limit=3.0)
    assert outcome.ended == "stopped after 3 s"
    assert outcome.output.strip() == "begun"
    assert outcome.seconds < 30


def test_a_failing_section_does_not_lose_the_others(tmp_path):
    plan = [section("bad", "raise SystemExit('broken')"), section("good", "print('fine')")]
    told = []
    outcomes = gpu.run_sections(plan, time.monotonic() + 60, lambda so_far: told.append(len(so_far)))
    assert [each.ended for each in outcomes] == ["failed with exit code 1", "done"]
    assert told == [1, 2]
    gpu.write_report(tmp_path, tmp_path / "work", torch.device("cpu"), outcomes)
    text = (tmp_path / "gpu.md").read_text()
    assert "| bad | failed with exit code 1 |" in text
    assert "broken" in text
    assert "== good: done\nfine" in (tmp_path / "log.txt").read_text()


def test_nothing_starts_when_the_time_is_over():
    outcomes = gpu.run_sections([section("late", "print(1)")], time.monotonic() + 1, lambda so_far: None)
    assert outcomes[0].ended == "not run: no time was left"


def test_the_whole_report_is_eight_files(tmp_path):
    work = tmp_path / "work"
    gpu.write_rows(work / "ceilings.csv", gpu.CEILING_COLUMNS, gpu.ceilings(QUICK))
    gpu.rooflines(QUICK, work)
    write_csv(work / "speed" / "grad_norm.csv", rows_of(ENTRY, [SPEED, SHARE], torch.device("cpu")))
    outcomes = [
        Outcome(section("tests", ""), "done", "noise\n12 passed\n\n", 1.0),
        Outcome(section("profile", ""), "done", "a table", 1.0),
        Outcome(section("exact", ""), "not run: no time was left", "", 0.0),
    ]
    out = tmp_path / "out"
    gpu.write_report(out, work, torch.device("cpu"), outcomes)
    assert sorted(path.name for path in out.iterdir()) == [
        *("ceilings.csv", "gpu.md", "log.txt", "profile.txt", "roofline.csv", "speed.csv", "speed.png"),
        "tests.txt",
    ]
    text = (out / "gpu.md").read_text()
    assert "## Tests\n\n12 passed\n" in text
    assert text.count("| masked_batch, ") == 2
    assert "| grad_norm | ResNet-18 | float32 | vmap | **6**" in text
    assert "exact: not run: no time was left" in text


def test_a_roofline_is_the_larger_of_two_limits():
    case = next(case for case in op_cases(QUICK) if case.op == "grad_sq_norm_linear")
    slow_memory = {"copy": 1.0, "tf32": 1e30}
    slow_matrix = {"copy": 1e30, "tf32": 3.0}
    by_bytes = gpu.roofline(case, slow_memory, QUICK.device)
    by_operations = gpu.roofline(case, slow_matrix, QUICK.device)
    assert (by_bytes["limit"], float(by_bytes["limit_seconds"])) == ("bytes", case.bytes)
    assert (by_operations["limit"], float(by_operations["limit_seconds"])) == ("operations", case.operations)
    assert float(by_bytes["share"]) == pytest.approx(case.bytes / float(by_bytes["seconds"]), rel=1e-2)


def test_a_wrong_op_has_no_roofline(monkeypatch):
    import dataclasses

    case = next(iter(op_cases(QUICK)))
    wrong = dataclasses.replace(case, check=lambda: [Check("pixels", 1.0, 1e-6)])
    row = gpu.roofline(wrong, {"copy": 1.0, "tf32": 1.0}, QUICK.device)
    assert (row["seconds"], row["share"]) == ("", "")
    assert "refuses to time" in row["gate"]


def test_a_roofline_needs_ceilings(tmp_path):
    with pytest.raises(SystemExit, match="ceilings were not measured"):
        gpu.rooflines(QUICK, tmp_path)


def test_the_profile_names_the_ops(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    assert "ddfast::" in gpu.profiled(QUICK)
