"""Several processes on one run: torchrun, restarts with another number of them, and how they stop together."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddfast.errors import UsageError
from ddfast.ops import precision
from ddfast.ops._dispatch import cpu_body
from ddfast.pipeline import opening, plan
from ddfast.ranks import Ranks, _agree_on_round, join
from tests.conftest import digests
from tests.pipeline.test_pipeline import distil

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks, toy_folder, toy_teacher, out, *extra, program=("-m", "ddfast")):
    """Exit code and error output of a distillation by `ranks` processes, started again where they may resume."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("--max-restarts", "1" if "--resume" in extra else "0", *program),
        *("distill", "infoutil", "--data", str(toy_folder), "--teacher", str(toy_teacher)),
        *("--ipc", "2", "--images-per-class", "100", "--factor", "2", "--out", str(out), "--quiet", *extra),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards in a small set; `plan.py` takes the number from there in every process that is forked."""
    monkeypatch.setattr("ddfast.pipeline.plan.SHARD_SOURCES", 32)


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
from ddfast.cli import main
died, rename = Path(sys.argv[1]), os.replace
def replace(source, target):
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1" and not died.exists():
    os.replace = replace
sys.exit(main(sys.argv[2:]))
"""


def test_two_ranks_of_which_one_dies_once_give_the_bytes_of_one_process(toy_folder, toy_teacher, tmp_path):
    alone = distil(toy_folder, toy_teacher, tmp_path / "alone", images_per_class=100)
    program, died = tmp_path / "dies_once.py", tmp_path / "died"
    program.write_text(DIES_ONCE)
    code, said = torchrun(
        2, toy_folder, toy_teacher, tmp_path / "two", "--resume", program=(str(program), str(died))
    )
    assert code == 0, said
    assert died.exists()
    assert digests(tmp_path / "two") == digests(alone)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["ranks"] == 2


def test_an_error_of_all_ranks_is_said_and_nothing_is_written(toy_folder, toy_teacher, tmp_path):
    code, said = torchrun(2, toy_folder, toy_teacher, tmp_path / "run", "--images-per-class", "3")
    assert code != 0
    assert "ddfast: IPC 2 x 4 tiles needs 8 images a class, --images-per-class is 3: raise it" in said
    assert not (tmp_path / "run").exists()


def test_every_rank_s_share_is_done_by_somebody_once(small_shards, toy_folder, toy_teacher, tmp_path):
    settings = {"images_per_class": 100, "until": "score"}
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole", **settings)
    shards = sorted(path.name for path in (whole / "scores").iterdir())
    assert len(shards) == 6
    shares = [list(Ranks(rank=rank, size=3).share(len(shards))) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(6))


SCRIPT = """
import os, sys, time
from pathlib import Path
from ddfast.errors import UsageError
from ddfast.ranks import PeerError, join
ranks = join()
assert (ranks.size, ranks.main) == (2, ranks.rank == 0)
assert ranks.together("plain", lambda: ranks.rank) == ranks.rank
order = []
ranks.main_first("first", lambda: time.sleep(0.2 if ranks.main else 0))
def fail():
    raise UsageError("no such data: wanted a folder \\u00fc" + "x" * 5000)
for blamed in (0, 1):
    try:
        ranks.together("failing", fail if ranks.rank == blamed else lambda: None)
    except PeerError as error:
        assert ranks.rank != blamed and error.shared
        assert str(error).startswith(f"rank {blamed} stopped: no such data: wanted a folder \\u00fc")
    except UsageError as error:
        assert ranks.rank == blamed and error.shared
    else:
        raise AssertionError("both must fail")
try:
    ranks.meet("here" if ranks.main else "there")
except UsageError as error:
    assert "met at here and there" in str(error)
seen = Path(sys.argv[1])
if ranks.rank == 1:
    while not seen.exists():  # an exit at once could end rank 0's last meeting
        time.sleep(0.01)
    os._exit(0)
seen.touch()
try:
    ranks.meet("alone")
except PeerError as error:
    print(error, flush=True)
os._exit(0)  # an interpreter that ends beside a dead peer's group may abort in gloo's threads, seen once
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_ranks_stop_together_with_the_reason_of_the_one_that_failed(tmp_path):
    processes = []
    port = free_port()
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tmp_path / "seen")],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0].startswith("lost another rank: it was killed")
    assert "--resume" in said[0]


def agreed_by(store, size):
    """What `size` ranks agree on, each in a thread, the last first."""
    with ThreadPoolExecutor(size) as pool:
        found = [pool.submit(_agree_on_round, store, rank, size) for rank in reversed(range(size))]
        return {future.result(timeout=60) for future in found}


def test_a_restart_agrees_on_a_name_that_no_start_before_it_had():
    # torchrun's store keeps what the dead have said, be it all of it or some.
    store = torch.distributed.HashStore()
    names = [agreed_by(store, 3), agreed_by(store, 3), agreed_by(store, 2)]
    store.set("ddfast/nonce/1", "of a process that died before the others came")
    names += [agreed_by(store, 2), agreed_by(store, 3)]
    assert [len(name) for name in names] == [1] * 5
    assert len(set.union(*names)) == 5


def test_processes_that_never_come_are_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr("ddfast.ranks._JOIN_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="not all were there"):
        _agree_on_round(torch.distributed.HashStore(), 1, 2)


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join()
    assert (ranks.size, ranks.main, list(ranks.share(3))) == (1, True, [0, 1, 2])
    ranks.meet("anywhere")
    with pytest.raises(UsageError, match="its own"):
        ranks.on_main("here", fail)


def fail():
    raise UsageError("its own")


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"2 processes of this run do not find each other .*torchrun"):
        join()


def test_the_number_of_threads_does_not_depend_on_torchrun(monkeypatch):
    from ddfast.pipeline.plan import threads_of

    monkeypatch.delenv("DDFAST_THREADS")
    monkeypatch.setattr("ddfast.pipeline.plan.usable_cores", lambda: 6)
    for value in ("1", "6"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert threads_of("auto", torch.device("cpu")) == 6
    assert threads_of("auto", torch.device("cuda")) == 4
    assert threads_of("3", torch.device("cpu")) == 3
    monkeypatch.setenv("DDFAST_THREADS", "2")
    assert threads_of("auto", torch.device("cpu")) == 2
    with pytest.raises(UsageError, match="threads must be auto or a positive number, got 0"):
        threads_of(0, torch.device("cpu"))


def test_a_run_keeps_its_threads_and_its_loader(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", threads=1, loader="pillow", until="score")
    with pytest.raises(UsageError, match="was started with threads=1"):
        distil(toy_folder, toy_teacher, out, threads=2, resume=True)
    with pytest.raises(
        UsageError, match=r'different run \(arithmetic.loader: it has "pillow", this one "torchvision"'
    ):
        distil(toy_folder, toy_teacher, out, loader="torchvision", resume=True)
    distil(toy_folder, toy_teacher, out, resume=True)
    assert json.loads((out / "manifest.json").read_text())["arithmetic"]["loader"] == "pillow"


def test_a_run_keeps_the_limits_that_decide_what_it_leaves_out(
    toy_folder, toy_teacher, tmp_path, monkeypatch
):
    monkeypatch.setenv("DDFAST_MAX_PIXELS", "100000")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    for variable, other in (("DDFAST_MAX_PIXELS", "200000"), ("DDFAST_MAX_FILE_BYTES", "5000000")):
        with monkeypatch.context() as changed:
            changed.setenv(variable, other)
            with pytest.raises(
                UsageError, match=rf"different run \(arithmetic.{variable[7:].lower()}: it has"
            ):
                distil(toy_folder, toy_teacher, out, resume=True)
    monkeypatch.delenv("DDFAST_MAX_PIXELS")
    distil(toy_folder, toy_teacher, out, resume=True)
    assert json.loads((out / "manifest.json").read_text())["arithmetic"]["max_pixels"] == 100000


def arithmetic_of(out):
    return json.loads((out / "manifest.json").read_text())["arithmetic"]


def test_the_manifest_says_what_of_the_machine_decides_the_last_bits(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    said = arithmetic_of(out)
    assert said["instructions"].split()[0] == torch.backends.cpu.get_cpu_capability()
    assert said["ops"] == (cpu_body() if cpu_body() == "reference" else f"c++ {cpu_body()}")
    assert (said["tf32"], said["compute_dtype"]) == ("none", "float32")


@pytest.mark.parametrize("key", ["instructions", "ops", "tf32"])
def test_all_that_a_machine_decides_is_compared_and_what_is_not_known_is_not(key):
    here = plan.machine_arithmetic(torch.device("cpu"))
    plan.check_machine(here, here, "it")
    plan.check_machine({name: value for name, value in here.items() if name != key}, {**here, key: "?"}, "it")
    with pytest.raises(UsageError, match=rf"^it was started with {key} .*, or set DDFAST_MIXED_MACHINES=1"):
        plan.check_machine(here, {**here, key: "?"}, "it")


def test_another_machine_is_refused_unless_it_is_asked_for(toy_folder, toy_teacher, tmp_path, monkeypatch):
    key, other = "instructions", "AVX2"
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    before = digests(out)
    here = arithmetic_of(out)[key]
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(plan, "cpu_instructions", lambda: other)
        words = re.escape(f"was started with {key} {here!r} and would end in other bytes with {other!r}")
        for go_on in (
            lambda: distil(toy_folder, toy_teacher, out, resume=True),
            lambda: distil(toy_folder, toy_teacher, tmp_path / "other", scores=out),
            lambda: opening.reopen(out),
        ):
            with pytest.raises(UsageError, match=words) as refused:
                go_on()
            assert "\n" not in str(refused.value)
        assert digests(out) == before
        distil(toy_folder, toy_teacher, whole, resume=True)  # nothing is left to compute
        elsewhere.setenv("DDFAST_MIXED_MACHINES", "1")
        distil(toy_folder, toy_teacher, out, resume=True)
    assert json.loads((out / "manifest.json").read_text())["mixed_machines"] is True
    assert arithmetic_of(out)[key] == here


def test_ranks_on_other_machines_are_refused(toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    plan = json.loads((out / "manifest.json").read_text())
    other = {
        **plan,
        "arithmetic": {**plan["arithmetic"], "instructions": "AVX2", "compute_dtype": "bfloat16"},
    }
    second = SimpleNamespace(ranks=Ranks(rank=1, size=2), out=out, plan=other)
    with pytest.raises(UsageError, match=r"rank 1 .* started with instructions '.*with 'AVX2'"):
        opening._follow(second, "cpu")
    second.plan["arithmetic"]["instructions"] = plan["arithmetic"]["instructions"]
    opening._follow(second, "cpu")
    assert second.plan["arithmetic"]["compute_dtype"] == "float32"  # rank 0 has chosen


def test_what_auto_is_stands_from_the_start_of_a_run(toy_folder, toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: False)
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole", precision="auto")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", precision="auto", until="score")
    assert arithmetic_of(out)["compute_dtype"] == "float32"
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: True)
    distil(toy_folder, toy_teacher, out, precision="auto", resume=True)
    assert digests(out) == digests(whole)
    assert opening.reopen(out).context.precision == "float32"
    assert distil(toy_folder, toy_teacher, tmp_path / "new", precision="auto", until="score")
    assert arithmetic_of(tmp_path / "new")["compute_dtype"] == "bfloat16"


def test_a_manifest_of_an_earlier_version_goes_on(toy_folder, toy_teacher, tmp_path):
    whole = distil(toy_folder, toy_teacher, tmp_path / "whole")
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    plan = json.loads((out / "manifest.json").read_text())
    for key in ("instructions", "ops", "tf32", "compute_dtype"):
        del plan["arithmetic"][key]
    (out / "manifest.json").write_text(json.dumps(plan))
    distil(toy_folder, toy_teacher, out, resume=True)
    assert (out / "soft_labels.safetensors").read_bytes() == (whole / "soft_labels.safetensors").read_bytes()
    assert "instructions" not in arithmetic_of(out)


def test_auto_of_an_earlier_version_is_what_it_was(monkeypatch):
    manifest = {"arithmetic": {"precision": "auto", "device": "cpu"}}
    monkeypatch.setattr(precision, "cpu_gains_from_bfloat16", lambda: False)
    for multiplies, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(plan, "cpu_multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        assert plan.dtype_of(manifest) == dtype


@pytest.mark.parametrize(
    "damage", [{}, {"max_pixels": "100"}, {"loader": None}, {"compute_dtype": "fp8"}, {"ops": 3}]
)
def test_a_manifest_without_its_arithmetic_is_refused(damage, toy_folder, toy_teacher, tmp_path):
    out = distil(toy_folder, toy_teacher, tmp_path / "run", until="score")
    plan = json.loads((out / "manifest.json").read_text())
    plan["arithmetic"] = {**plan["arithmetic"], **damage} if damage else []
    (out / "manifest.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="is no manifest of this version of ddfast"):
        distil(toy_folder, toy_teacher, out, resume=True)
