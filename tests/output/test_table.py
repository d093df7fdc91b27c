from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddfast.errors import UsageError
from ddfast.output.table import (
    SCORE_SCHEMA,
    SELECTION_SCHEMA,
    feature_width,
    is_readable,
    iter_table,
    make_table,
    part_path,
    read_facts,
    read_table,
    read_tables,
    score_schema,
    table_writer,
    to_numpy,
    write_table,
)


def score_columns(rows: int = 20, seed: int = 0) -> dict[str, object]:
    draw = np.random.default_rng(seed)
    return {
        "sample_id": draw.integers(-(2**63), 2**63 - 1, rows),
        "key": [f"klaße {n % 3}/{n}.jpg" for n in range(rows)],
        "label": draw.integers(0, 10, rows),
        "crop": np.arange(rows) % 5,
        "box": draw.uniform(0, 224, (rows, 4)).astype(np.float32),
        "grad_norm": torch.from_numpy(draw.random(rows)),
        "loss": draw.random(rows),
        "correct": draw.integers(0, 2, rows).astype(bool),
        "phi": torch.from_numpy(draw.normal(size=(rows, 16))),
    }


def test_the_score_schema_is_the_one_agreed_on() -> None:
    box = pa.list_(pa.float32(), 4)
    wanted = {
        "sample_id": pa.int64(),
        "key": pa.string(),
        "label": pa.int32(),
        "crop": pa.int16(),
        "box": box,
        "score": pa.float32(),
        "grad_norm": pa.float32(),
        "loss": pa.float32(),
        "correct": pa.bool_(),
        "phi": pa.list_(pa.float32()),
    }
    assert dict(zip(SCORE_SCHEMA.names, SCORE_SCHEMA.types, strict=True)) == wanted
    assert [f.name for f in SCORE_SCHEMA if f.nullable] == ["score", "grad_norm", "loss", "correct", "phi"]
    assert dict(zip(SELECTION_SCHEMA.names, SELECTION_SCHEMA.types, strict=True)) == {
        "label": pa.int32(),
        "image": pa.int32(),
        "tile": pa.int16(),
        "sample_id": pa.int64(),
        "key": pa.string(),
        "box": box,
        "score": pa.float32(),
    }


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    given = score_columns()
    write_table(tmp_path / "part-00000.parquet", make_table(given))
    table = read_table(tmp_path / "part-00000.parquet")
    assert table.schema == SCORE_SCHEMA
    found = to_numpy(table)
    assert found["sample_id"].dtype == np.int64
    assert found["box"].shape == (20, 4)
    assert found["phi"].shape == (20, 16)
    assert found["correct"].dtype == bool
    for name, values in given.items():
        expected = np.asarray(values)
        if expected.dtype == np.float64:
            expected = expected.astype(np.float32)
        assert (found[name] == expected).all(), name
    assert np.isnan(found["score"]).all()


def test_columns_may_be_missing_where_nothing_was_measured(tmp_path: Path) -> None:
    given = {k: v for k, v in score_columns(5).items() if k in ("sample_id", "key", "label", "crop", "box")}
    write_table(tmp_path / "t.parquet", make_table(given | {"phi": None, "loss": np.full(5, np.nan)}))
    found = to_numpy(read_table(tmp_path / "t.parquet"))
    assert found["phi"].shape == (5, 0)
    assert found["correct"].tolist() == [False] * 5
    for name in ("score", "grad_norm", "loss"):
        assert found[name].dtype == np.float32
        assert np.isnan(found[name]).all()


def test_features_are_one_column_more(tmp_path: Path) -> None:
    features = np.random.default_rng(1).normal(size=(20, 7)).astype(np.float32)
    schema = score_schema(7)
    assert schema.names == [*SCORE_SCHEMA.names, "features"]
    assert schema.field("features").type == pa.list_(pa.float32(), 7)
    assert score_schema() == SCORE_SCHEMA
    path = tmp_path / "part-00000.parquet"
    write_table(path, make_table(score_columns() | {"features": features}, schema))
    assert is_readable(path)
    assert feature_width(path) == 7
    assert (to_numpy(read_table(path))["features"] == features).all()
    assert (to_numpy(read_tables(tmp_path, columns=["features", "label"]))["features"] == features).all()
    assert to_numpy(read_table(path, columns=["label"])).keys() == {"label"}
    with pytest.raises(ValueError, match=r"column 'features' .* got shape \(20, 6\)"):
        make_table(score_columns() | {"features": features[:, :6]}, schema)
    with pytest.raises(ValueError, match=r"missing \['features'\]"):
        make_table(score_columns(), schema)
    other = SCORE_SCHEMA.append(pa.field("features", pa.list_(pa.float32()), nullable=False))
    write_table(path, other.empty_table())  # of no fixed width
    assert not is_readable(path)
    assert feature_width(path) == 0
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match="is damaged"):
        feature_width(path)


def test_phi_of_some_rows_is_nan_in_the_others() -> None:
    first = make_table(score_columns(3))
    second = make_table({k: v for k, v in score_columns(2).items() if k != "phi"})
    found = to_numpy(pa.concat_tables([second, first]))
    assert np.isnan(found["phi"][:2]).all()
    assert np.isfinite(found["phi"][2:]).all()
    assert found["phi"].shape == (5, 16)


def test_an_empty_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", make_table({k: v[:0] for k, v in score_columns(3).items()}))  # type: ignore[index]
    table = read_table(tmp_path / "t.parquet")
    assert table.num_rows == 0
    found = to_numpy(table)
    assert found["box"].shape == (0, 4)
    assert found["phi"].shape[0] == 0
    write_table(tmp_path / "u.parquet", SCORE_SCHEMA.empty_table())
    assert (tmp_path / "u.parquet").read_bytes() == (tmp_path / "t.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": [1] * 20}, r"unknown \['extra'\]"),
        ({"label": None}, r"missing \['label'\]"),
        ({"label": [1, 2]}, "columns must have one length"),
        ({"box": np.zeros((20, 3))}, r"column 'box' .* got shape \(20, 3\)"),
        ({"phi": np.zeros(20)}, r"column 'phi' .* got shape \(20,\)"),
        ({"crop": [40_000] * 20}, "40000"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_table(score_columns() | change)


def test_equal_rows_give_equal_bytes_however_they_are_chunked(tmp_path: Path) -> None:
    whole = make_table(score_columns(30))
    noted = whole.replace_schema_metadata({"when": "now"})
    pieces = pa.concat_tables(
        [noted.slice(0, 7).replace_schema_metadata(), whole.slice(7, 1), whole.slice(8)]
    )
    for name, table in {"a": whole, "b": noted, "c": pieces}.items():
        write_table(tmp_path / name, table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_equal_rows_give_equal_bytes_in_another_process(tmp_path: Path) -> None:
    columns = {
        "sample_id": list(range(-40, 40)),
        "key": [f"class {n % 3}/{n}.jpg" for n in range(80)],
        "label": [n % 3 for n in range(80)],
        "crop": [n % 5 for n in range(80)],
        "box": [[n, 0, n + 0.5, 1] for n in range(80)],
    }
    program = (
        "import sys\n"
        "from ddfast.output.table import make_table, write_table\n"
        f"write_table(sys.argv[1], make_table({columns!r}))\n"
    )
    write_table(tmp_path / "here", make_table(columns))
    checkout = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], check=True, cwd=checkout)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


def test_other_readers_open_it(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", make_table(score_columns()))
    plain = pq.read_table(tmp_path / "t.parquet")
    assert plain.column("key").to_pylist()[:2] == ["klaße 0/0.jpg", "klaße 1/1.jpg"]
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_parts_are_read_in_order(tmp_path: Path) -> None:
    for index in (2, 0, 11):
        write_table(
            part_path(tmp_path, index), make_table(score_columns(4, seed=index) | {"crop": [index] * 4})
        )
    (tmp_path / ".part-00003.parquet.tmp-1").write_bytes(b"half")
    assert part_path(tmp_path, 11).name == "part-00011.parquet"
    table = read_tables(tmp_path)
    assert to_numpy(table)["crop"].tolist() == [0] * 4 + [2] * 4 + [11] * 4
    assert read_tables(tmp_path, columns=["label", "loss"]).column_names == ["label", "loss"]


def test_no_parts_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no part-\*\.parquet in .*: run the score stage first"):
        read_tables(tmp_path)
    with pytest.raises(UsageError, match="no such table"):
        read_table(tmp_path / "none.parquet")


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = part_path(tmp_path, 0)
    write_table(path, make_table(score_columns(40)))
    data = path.read_bytes()
    assert is_readable(path)
    for length in [0, 1, 4, 8, *range(12, len(data), 97), len(data) - 8, len(data) - 1]:
        path.write_bytes(data[:length])
        assert not is_readable(path), length
        with pytest.raises(UsageError, match=r"is damaged .*: delete it and resume") as caught:
            read_tables(tmp_path)
        assert "\n" not in str(caught.value)
    assert not is_readable(tmp_path / "none.parquet")


def test_a_flipped_byte_in_any_page_is_noticed(tmp_path: Path) -> None:
    path = part_path(tmp_path, 0)
    write_table(path, make_table(score_columns(40)))
    data = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(0)
    flipped = 0
    for index in range(group.num_columns):
        column = group.column(index)
        if column.total_compressed_size < 60:
            continue
        broken = bytearray(data)
        start = column.dictionary_page_offset or column.data_page_offset
        broken[start + column.total_compressed_size - 20] ^= 0x55
        flipped += 1
        path.write_bytes(broken)
        assert not is_readable(path), column.path_in_schema
    assert flipped >= 5


def test_another_schema_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "part-00000.parquet")
    with pytest.raises(UsageError, match="has other columns than wanted: a"):
        read_tables(tmp_path)
    assert not is_readable(tmp_path / "part-00000.parquet")


def test_a_selection_comes_back(tmp_path: Path) -> None:
    table = make_table(
        {
            "label": [0, 0, 1],
            "image": [0, 1, 0],
            "tile": [0, 0, 0],
            "sample_id": [-5, 6, 7],
            "key": ["a/1", "a/2", "b/1"],
            "box": np.arange(12).reshape(3, 4),
            "score": np.float32([0.1, 0.2, 0.3]),
        },
        SELECTION_SCHEMA,
    )
    write_table(tmp_path / "selection.parquet", table)
    assert read_table(tmp_path / "selection.parquet", SELECTION_SCHEMA) == table
    assert not is_readable(tmp_path / "selection.parquet")


def test_any_changed_byte_makes_a_file_unreadable(tmp_path):
    path = tmp_path / "part-00000.parquet"
    write_table(
        path, make_table(score_columns(12)), {"quarantined": [{"path": "a/ü.jpg", "reason": "no image"}]}
    )
    whole = path.read_bytes()
    assert is_readable(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert not is_readable(path), place
    path.write_bytes(whole + b"\0")
    assert not is_readable(path)


def test_facts_come_back(tmp_path):
    facts = {"quarantined": [{"path": "a/ü.jpg", "reason": "no image"}]}
    write_table(tmp_path / "with.parquet", make_table(score_columns(3)), facts)
    write_table(tmp_path / "without.parquet", make_table(score_columns(3)))
    assert read_facts(tmp_path / "with.parquet") == facts
    assert read_facts(tmp_path / "without.parquet") == {}
    assert read_table(tmp_path / "with.parquet") == read_table(tmp_path / "without.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "with.parquet").read_bytes()[:-3])
    with pytest.raises(UsageError, match="damaged"):
        read_facts(tmp_path / "cut.parquet")


def test_a_table_written_in_blocks_reads_in_blocks(tmp_path):
    path, blocks = tmp_path / "t.parquet", [make_table(score_columns(n)) for n in (5, 1, 7)]
    with table_writer(path, SCORE_SCHEMA) as write:
        for block in blocks:
            write(block)
        assert not path.exists()
    assert is_readable(path)
    assert read_table(path) == pa.concat_tables(blocks).combine_chunks()
    assert list(iter_table(path)) == blocks
    path.unlink()
    with pytest.raises(ValueError, match="schema"), table_writer(path, SCORE_SCHEMA) as write:
        write(pa.table({"a": [1]}).select([]))
    assert not list(tmp_path.iterdir())
