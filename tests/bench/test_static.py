import dataclasses

import pytest
import torch
from ddfast.kernels.ahead_of_time import Binary

from bench.static import Case, Row, cases, examine, faults, launchers, main, page, report, table

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
    return Case("op", "float32", lambda: None, **fields)


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
    assert "| `_masked_batch` | masked_batch, uint8 to bfloat16 | 90 |" in page(rows, chosen)


def test_a_fault_shows_in_the_table_and_the_exit_code(monkeypatch, tmp_path, capsys):
    bad = row(spilled_bytes=8, faults=("8 bytes spilled",))
    monkeypatch.setattr("bench.static.cases", lambda: [case()])
    monkeypatch.setattr("bench.static.report", lambda *args: [[row(), bad]])
    assert main(["--out", str(tmp_path / "static.md")]) == 1
    assert "_op (op, float32, sm_90): 8 bytes spilled" in capsys.readouterr().err
    written = (tmp_path / "static.md").read_text()
    assert "2 kernels, 1 with a fault" in written
    cells = [line.split(" | ") for line in table([bad]).splitlines()]
    assert [len(line) for line in cells] == [len(cells[0])] * 3
    monkeypatch.setattr("bench.static.report", lambda *args: [[row()]])
    assert main([]) == 0


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    def broken(calls, capabilities):
        raise RuntimeError("a pass\nPassManager::run failed")

    monkeypatch.setattr("bench.static.launches", lambda case: [])
    monkeypatch.setattr("ddfast.kernels.ahead_of_time.compile_launches", broken)
    (found,) = examine(case(), [90])
    assert found.faults == ("does not compile: PassManager::run failed",)
    assert (found.kernel, found.capability) == ("_op", 90)


def test_an_op_that_is_never_called_is_an_error():
    from bench.static import launches

    with pytest.raises(RuntimeError, match="never reached the op"):
        launches(Case("masked_batch", "nothing", lambda: torch.ones(1) + 1))
