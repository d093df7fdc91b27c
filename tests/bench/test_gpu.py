"""The GPU run's plan, limits and tables, tried on the CPU. Its sections run here at tiny sizes."""

import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import load_entries
from bench.gpu import Outcome, Section
from bench.speed.op_cases import op_cases
from bench.speed.registry import Check, Settings
from bench.speed.results import rows_of, write_csv
from tests.bench.speed.test_results import ENTRY, SHARE, SPEED

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
    assert set(names) == {"ceilings", "budget", "tests", "roofline", "sanitizer", "profile", *load_entries()}
    assert names.index("ceilings") < names.index("roofline")
    assert max(each.limit for each in plan) <= 60 * gpu.MINUTES / 4
    certain = plan[: names.index("ops")]
    assert {"ceilings", "budget", "tests", "roofline", "score_pass", "sanitizer"} <= {e.name for e in certain}
    assert sum(each.limit for each in certain) <= 60 * gpu.MINUTES - 2 * gpu._RESERVE
    quick = gpu.sections("cpu", quick=True, work=tmp_path)
    assert all("--quick" in each.command for each in quick if each.name not in ("tests", "sanitizer"))
    host = {each.name: each.command for each in plan if each.name in ("host_time", "launchers")}
    assert all(command[command.index("--device") + 1] == "cpu" for command in host.values())


def test_a_slow_section_is_stopped_and_keeps_what_it_printed():
    slow = section("slow", "print('begun'); import time; time.sleep(60)")
    outcome = gpu.run_section(slow, limit=3.0)
    assert outcome.ended == "stopped after 3 s"
    assert outcome.output.strip() == "begun"
    assert outcome.seconds < 30


def test_what_a_section_started_ends_with_it():
    child = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; child = subprocess.Popen({child}); print(child.pid); child.wait()"
    outcome = gpu.run_section(section("parent", code), limit=2.0)
    assert outcome.ended == "stopped after 2 s"
    status = Path(f"/proc/{int(outcome.output)}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_an_open_ended_section_may_come_to_its_limit(tmp_path):
    command = section("", "print('..'); import time; time.sleep(9)").command
    tests = Section("sanitizer", "what", 2.0, command, open_ended=True)
    outcome = gpu.run_section(tests, 2.0)
    assert (outcome.ended, outcome.well) == ("stopped after 2 s", True)
    gpu.write_report(tmp_path, tmp_path / "work", torch.device("cpu"), [outcome])
    text = (tmp_path / "gpu.md").read_text()
    assert "## Memory accesses\n\nNo fault in what ran within 2 s: ..\n" in text
    assert "did not end well" not in text
    assert not Outcome(tests, "failed with exit code 9", "", 1.0).well
    assert not Outcome(section("slow", ""), "stopped after 2 s", "", 2.0).well


def test_a_section_has_its_own_environment():
    code = "import os; print(os.environ['HELD'])"
    held = Section("held", "what", 60.0, ("-c", code), environment=(("HELD", "here"),))
    assert gpu.run_section(held, 60.0).output.strip() == "here"


def test_where_there_is_no_sanitizer_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu.shutil.which", lambda name: None)
    for device, reason in (("cpu", "needs a GPU"), ("cuda", "is not installed")):
        (found,) = (each for each in gpu.sections(device, False, tmp_path) if each.name == "sanitizer")
        outcome = gpu.run_section(found, 60.0)
        assert outcome.ended == "done"
        gpu.write_report(tmp_path, tmp_path / "work", torch.device("cpu"), [outcome])
        assert reason in (tmp_path / "gpu.md").read_text().partition("## Memory accesses")[2]


def test_the_sanitizer_runs_the_ops_tests(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("bench.gpu.shutil.which", lambda name: str(tool))
    (found,) = (each for each in gpu.sections("cuda", False, tmp_path) if each.name == "sanitizer")
    outcome = gpu.run_section(found, 60.0)
    assert (outcome.ended, outcome.well) == ("failed with exit code 9", False)
    assert outcome.output.startswith("1 --tool memcheck --error-exitcode 9 ")
    assert outcome.output.strip().endswith("-m pytest tests/kernels tests/ops -k cuda -x")


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


def test_the_whole_report_is_nine_files(tmp_path, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "5")
    work = tmp_path / "work"
    threads = torch.get_num_threads()
    for name in ("ceilings", "budget", "roofline"):
        assert gpu.main(["--device", "cpu", "--quick", "--out", str(work), "--section", name]) == 0
    torch.set_num_threads(threads)
    write_csv(work / "speed" / "grad_norm.csv", rows_of(ENTRY, [SPEED, SHARE], torch.device("cpu")))
    outcomes = [
        Outcome(section("tests", ""), "done", "noise\n12 passed\n\n", 1.0),
        Outcome(section("profile", ""), "done", "a table", 1.0),
        Outcome(section("exact", ""), "not run: no time was left", "", 0.0),
    ]
    out = tmp_path / "out"
    gpu.write_report(out, work, torch.device("cpu"), outcomes)
    assert sorted(path.name for path in out.iterdir()) == [
        *("budget.csv", "ceilings.csv", "gpu.md", "log.txt", "profile.txt", "roofline.csv", "speed.csv"),
        "speed.png",
        "tests.txt",
    ]
    text = (out / "gpu.md").read_text()
    assert text.index("## Budget of the score pass") < text.index("| section | ended |")
    assert "The host binds: alone they would take" in text
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
