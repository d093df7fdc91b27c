import dataclasses
from unittest import mock

import pytest
import torch
from ddfast.kernels.ahead_of_time import Binary

from bench.speed.static import (
    MATCHED,
    SOURCES,
    Case,
    Gpu,
    Row,
    cases,
    examine,
    faults,
    launchers,
    launches,
    main,
    page,
    report,
    table,
)

PTX = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    @%p1 ld.global.L1::evict_first.b32 %r5, [%rd2];
    cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
    st.global.v2.b64 [%rd4], {%rd5, %rd6};
    st.shared.v4.b32 [%r8], {%r1, %r2, %r3, %r4};
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1};
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2;
"""


def test_widths_and_matrix_instructions_are_read_from_the_ptx():
    binary = Binary("_kernel", 0, 90, PTX, 32, 0, 0, 4)
    assert sorted(binary.load_bytes) == [4, 16, 16]
    assert binary.store_bytes == [16]
    assert binary.matrix_instructions == {"mma.sync": 1, "wgmma.mma_async": 2}


def case(**fields):
    return Case("op", "float32", lambda sources: None, **fields)


def row(**fields):
    good = Row("op", "float32", "_op", 90, 32, 0, 1024, 4, 16, 16, "", ())
    return dataclasses.replace(good, **fields)


@pytest.mark.parametrize(
    ("found", "of", "told"),
    [
        (row(), case(), ()),
        (row(spilled_bytes=8), case(), ("8 bytes spilled",)),
        (row(load_bytes=4), case(), ("widest load 4 bytes, 16 fit",)),
        (row(store_bytes=4), case(), ("widest store 4 bytes, 16 fit",)),
        (row(load_bytes=4), case(load=4, why="gathered"), ()),
        (row(), case(matrix=True), ("no matrix instruction",)),
        (row(matrix="2 mma.sync"), case(matrix=True), ()),
        (row(kernel="_other", load_bytes=1), case(), ()),  # not the main kernel: its registers only
        (row(kernel="_other", spilled_bytes=8), case(), ("8 bytes spilled",)),
    ],
)
def test_faults(found, of, told):
    assert faults(of, found) == told


def test_narrow_accesses_need_a_reason():
    with pytest.raises(ValueError, match="say why"):
        case(load=8)


def test_every_launcher_has_a_case():
    assert {case.op for case in cases()} == set(launchers())


def test_every_kernel_compiles_without_a_fault():
    chosen = cases()
    found = list(report(chosen, capabilities=(90,)))  # for the others, see tests/kernels
    assert len(found) == len(chosen)
    rows = [row for of_case in found for row in of_case]
    assert {row.capability for row in rows} == {90}
    assert [(row.kernel, row.what, row.capability, row.faults) for row in rows if row.faults] == []
    assert "| `_masked_batch` | masked_batch, uint8 to bfloat16 | 90 | all 1024 | 16, 128 | " in page(
        rows, chosen
    )
    by_case = {}
    for row in rows:
        by_case.setdefault((row.op, row.what), set()).update(sources for sources, _ in row.programs)
    assert by_case == {(case.op, case.what): set(case.sizes) for case in chosen}
    assert {case.sizes for case in chosen} == {SOURCES, MATCHED}
    # One program an image.
    (tail,) = (row for row in rows if (row.op, row.what) == ("shapley_crop_boxes", "logit"))
    assert tail.programs == ((16, 16), (128, 128))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "resident"),
    [
        (32, 4, 0, 16),  # 64 warps
        (16, 1, 0, 32),  # 32 programs
        (128, 4, 0, 4),  # 65,536 registers
        (129, 4, 0, 3),  # by 256 to a warp: 4,352 for each
        (32, 4, 100_000, 2),  # 228 KiB with 1,024 bytes of the system's
        (255, 8, 220_000, 1),
    ],
)
def test_what_a_multiprocessor_holds_at_once(registers, warps, shared, resident):
    found = row(registers=registers, warps=warps, shared_bytes=shared)
    assert Gpu("H200", 132, 228 << 10).resident(found) == resident


def test_waves_are_of_the_gpu_with_that_capability():
    found = row(registers=32, warps=4, programs=((16, 132 * 16), (128, 132 * 16 * 8)))
    assert found.waves == [1, 8]
    assert dataclasses.replace(found, capability=80).waves == pytest.approx([132 / 108, 8 * 132 / 108])
    assert dataclasses.replace(found, capability=120).waves == []
    assert "| 16, 128 | 2 112, 16 896 | 1, 8 |" in table([found])


def test_a_launch_tells_its_programs_and_its_tile():
    from triton.runtime.jit import JITFunction

    from bench.speed.static import _launched

    with mock.patch.object(JITFunction, "run", return_value=None), _launched() as shapes:
        JITFunction.run(None, grid=(3, 4), warmup=False, BLOCK_O=64, BLOCK_I=32, num_warps=4)
        JITFunction.run(None, grid=lambda options: (options["BLOCK"], 2), warmup=False, BLOCK=8)
    assert shapes == [(12, "O 64, I 32"), (16, "all 8")]


def test_a_fault_shows_in_the_table_and_the_exit_code(monkeypatch, tmp_path, capsys):
    bad = row(spilled_bytes=8, faults=("8 bytes spilled",))
    monkeypatch.setattr("bench.speed.static.cases", lambda: [case()])
    monkeypatch.setattr("bench.speed.static.report", lambda *args: [[row(), bad]])
    assert main(["--out", str(tmp_path / "static.md")]) == 1
    assert "_op (op, float32, sm_90): 8 bytes spilled" in capsys.readouterr().err
    written = (tmp_path / "static.md").read_text()
    assert "2 kernels, 1 with a fault" in written
    cells = [line.split(" | ") for line in table([bad]).splitlines()]
    assert [len(line) for line in cells] == [len(cells[0])] * 3
    monkeypatch.setattr("bench.speed.static.report", lambda *args: [[row()]])
    assert main([]) == 0


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    def broken(calls, capabilities):
        raise RuntimeError("a pass\nPassManager::run failed")

    monkeypatch.setattr("bench.speed.static.launches", lambda case, sources: [])
    monkeypatch.setattr("ddfast.kernels.ahead_of_time.compile_launches", broken)
    (found,) = examine(case(), [90])
    assert found.faults == ("does not compile: PassManager::run failed",)
    assert (found.kernel, found.capability) == ("_op", 90)


def test_an_op_that_is_never_called_is_an_error():
    with pytest.raises(RuntimeError, match="never reached the op"):
        launches(Case("masked_batch", "nothing", lambda sources: torch.ones(1) + 1))
