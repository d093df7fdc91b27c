"""The score table and the selection: Parquet files with the same bytes for the same rows.

The score pass writes one file for each shard of sources, `scores/part-00000.parquet` and so on, one row a
candidate crop; selection is a sort over all of them. A checksum of the whole file stands in its footer, so that
a resumed run knows a committed shard from a damaged one without trusting any of its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddfast.errors import UsageError, one_line
from ddfast.files import arrow_file, atomic_path, atomic_write_bytes

_BOX = pa.list_(pa.float32(), 4)

SCORE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("crop", pa.int16(), nullable=False),
        pa.field("box", _BOX, nullable=False),
        pa.field("score", pa.float32()),
        pa.field("grad_norm", pa.float32()),
        pa.field("loss", pa.float32()),
        pa.field("correct", pa.bool_()),
        pa.field("phi", pa.list_(pa.float32())),
    ]
)
"""One row a candidate crop.

`box` is (x0, y0, x1, y1) in pixels of the fitted image, x1 and y1 exclusive; `grad_norm` the norm of the loss
gradient; `loss` in nats; `correct` whether the teacher's first choice is the label; `phi` the attribution of
the grid cells in row-major order; `score` what a method ranks by where it is none of these. Null: not
measured. The tables of the methods that choose by features have one column more, see `score_schema`.
"""

FEATURES = "features"

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("image", pa.int32(), nullable=False),
        pa.field("tile", pa.int16(), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("box", _BOX, nullable=False),
        pa.field("score", pa.float32()),
    ]
)
"""One row a tile: `image` counts 0..IPC-1 in its class, `tile` 0..factor^2-1 in row-major order."""

_ROW_GROUP = 1 << 16
# Everything that decides a file's bytes beside its rows.
_WRITER_OPTIONS: dict[str, Any] = {
    "version": "2.6",
    "data_page_version": "1.0",
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": ["key"],
    "write_statistics": True,
    "write_page_checksum": True,
    "store_schema": True,
}
# The checksum: BLAKE2b-128 of the file with zeros in its own place, as hex digits behind this key in the footer.
_CHECKSUM, _FACTS = "ddfast.checksum", "ddfast.facts"
_DIGITS = 32
_FOOTER_END = 8  # its length, 4 bytes, and the magic number
# pyarrow's readers raise ArrowException (some of them are OSError or ValueError as well), and OSError for the
# file.
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError)


def score_schema(width: int = 0) -> pa.Schema:
    """`SCORE_SCHEMA`, and behind it `features`, float32 [width] of every crop, where `width` is not 0."""
    if not width:
        return SCORE_SCHEMA
    return SCORE_SCHEMA.append(pa.field(FEATURES, pa.list_(pa.float32(), width), nullable=False))


def _fits(found: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether a file's schema is the wanted one. A score table may have features of any width."""
    width = _width(found)
    return bool(found == (score_schema(width) if wanted == SCORE_SCHEMA else wanted))


def _width(schema: pa.Schema) -> int:
    """Width of the `features` of a schema; 0 where it has none."""
    place = schema.get_field_index(FEATURES)
    kind = schema.field(place).type if place >= 0 else None
    return int(kind.list_size) if kind is not None and pa.types.is_fixed_size_list(kind) else 0


def make_table(columns: Mapping[str, Any], schema: pa.Schema = SCORE_SCHEMA) -> pa.Table:
    """A table of `schema` from arrays of M rows.

    Args:
        columns: column name -> array, CPU tensor or list; [M] or, for `box`, [M, 4], for `phi`, [M, d] and for
            `features`, [M, width]. A column that may be null can be left out or be None.
        schema: `SCORE_SCHEMA`, a `score_schema` or `SELECTION_SCHEMA`.

    Raises:
        ValueError: an unknown or a missing column, columns of different lengths, or values that do not fit
            the type.
    """
    unknown = sorted(set(columns) - set(schema.names))
    missing = [f.name for f in schema if columns.get(f.name) is None and not f.nullable]
    if unknown or missing:
        raise ValueError(f"columns must be those of {schema.names}; unknown {unknown}, missing {missing}")
    given = {name: values for name, values in columns.items() if values is not None}
    lengths = {name: len(values) for name, values in given.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one length, got {lengths}")
    rows = next(iter(lengths.values()))
    arrays = [_column(given.get(field.name), field, rows) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: Any, field: pa.Field, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, field.type)
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        flat = np.ascontiguousarray(np.asarray(values), dtype=np.float32)
        fixed = pa.types.is_fixed_size_list(field.type)
        if flat.ndim != 2 or (fixed and flat.shape[1] != field.type.list_size):
            raise ValueError(f"column {field.name!r} must have one row a crop, got shape {flat.shape}")
        items = pa.array(flat.reshape(-1), pa.float32())
        if fixed:
            return pa.FixedSizeListArray.from_arrays(items, type=field.type)
        offsets = np.arange(rows + 1, dtype=np.int32) * flat.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, type=field.type)
    if pa.types.is_string(field.type):
        return pa.array([str(value) for value in values], field.type)
    return pa.array(np.asarray(values), from_pandas=False).cast(field.type)


def to_numpy(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as NumPy arrays.

    Null numbers become NaN and null truth values False; `box` is float32 [M, 4] and `features` [M, width]; `phi`
    is float32 [M, d], NaN in rows that have none, d = 0 where no row has any; strings are object arrays.

    Raises:
        ValueError: `phi` has rows of different lengths.
    """
    columns: dict[str, np.ndarray] = {}
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty table
            column = pa.array([], field.type)
        if pa.types.is_fixed_size_list(field.type):
            columns[field.name] = (
                column.flatten().to_numpy(zero_copy_only=False).reshape(-1, field.type.list_size)
            )
        elif pa.types.is_list(field.type):
            columns[field.name] = _matrix(column, field.name)
        elif pa.types.is_boolean(field.type):
            columns[field.name] = column.fill_null(False).to_numpy(zero_copy_only=False)
        else:
            columns[field.name] = column.to_numpy(zero_copy_only=False)
    return columns


def _matrix(column: pa.ListArray, name: str) -> np.ndarray:
    present = np.asarray(column.is_valid())
    items = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    count = int(present.sum())
    width = len(items) // count if count else 0
    lengths = np.asarray(column.drop_null().value_lengths())
    if count and not (lengths == width).all():
        raise ValueError(f"column {name!r} has rows of different lengths")
    matrix = np.full((len(column), width), np.nan, np.float32)
    matrix[present] = items.reshape(count, width)
    return matrix


def part_path(folder: str | Path, index: int) -> Path:
    """`folder/part-00000.parquet`: where shard `index` of a table stands."""
    return Path(folder) / f"part-{index:05d}.parquet"


def write_table(path: str | Path, table: pa.Table, facts: Mapping[str, Any] | None = None) -> None:
    """Write a table atomically, with `facts` (JSON values) in its footer, which `read_facts` gives back.

    Equal rows and facts give equal bytes with one pyarrow version: fixed compression and row groups, one chunk a
    column, no time stamps. Pages carry checksums, which `read_table` verifies, and the file carries one.

    Raises:
        UsageError: no space, no permission, an impossible path.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema.remove_metadata(), **_WRITER_OPTIONS) as writer:
        writer.write_table(_in_one_chunk(table), row_group_size=_ROW_GROUP)
        _add_facts(writer, facts)
    data = bytearray(sink.getvalue())
    place = _checksum_place(bytes(data[-_footer_size(data) :]), len(data))
    data[place : place + _DIGITS] = hashlib.blake2b(data, digest_size=_DIGITS // 2).hexdigest().encode()
    atomic_write_bytes(path, bytes(data))


@contextmanager
def table_writer(path: str | Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Write a table block by block: yields what takes a block; each becomes a row group and leaves the memory.

    The file appears, checksum and all, when the block of `with` ends without an exception. Equal blocks give equal
    bytes. Raises `UsageError` as `write_table` does.
    """
    with atomic_path(path) as temporary:
        with arrow_file(temporary, "wb") as raw, pq.ParquetWriter(raw, schema, **_WRITER_OPTIONS) as writer:
            yield lambda table: writer.write_table(
                _in_one_chunk(table), row_group_size=max(1, table.num_rows)
            )
            _add_facts(writer, None)
        _seal(temporary)


def _add_facts(writer: pq.ParquetWriter, facts: Mapping[str, Any] | None) -> None:
    given = {_FACTS: json.dumps(facts, ensure_ascii=False, sort_keys=True)} if facts is not None else {}
    writer.add_key_value_metadata({**given, _CHECKSUM: "0" * _DIGITS})


def _footer_size(end: bytes | bytearray) -> int:
    """Size of the footer in bytes, its length and magic included, from the last bytes of a file. 0: no footer."""
    size = int.from_bytes(end[-_FOOTER_END:-4], "little") + _FOOTER_END
    return size if end[-4:] == b"PAR1" else 0


def _checksum_place(footer: bytes, file_size: int) -> int:
    """Where in a file of `file_size` bytes, which ends in `footer`, the checksum's digits stand. -1: nowhere."""
    key = footer.rfind(_CHECKSUM.encode())
    # Between key and value Thrift's compact protocol has one byte for the field and one for the length.
    return -1 if key < 0 else file_size - len(footer) + key + len(_CHECKSUM) + 2


def _digest(path: Path) -> tuple[int, str, str]:
    """Place of the checksum of a file (-1: it has none), the digits that stand there, and those that should."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _FOOTER_END))
        footer = _footer_size(file.read())
        if not _FOOTER_END < footer <= size:
            return -1, "", ""
        file.seek(size - footer)
        place = _checksum_place(file.read(), size)
        if not 0 <= place <= size - _DIGITS:
            return -1, "", ""
        digest = hashlib.blake2b(digest_size=_DIGITS // 2)
        file.seek(0)
        left = place
        while left:
            part = file.read(min(left, 1 << 20))
            digest.update(part)
            left -= len(part)
        found = file.read(_DIGITS)
        digest.update(b"0" * _DIGITS)
        while part := file.read(1 << 20):
            digest.update(part)
    return place, found.decode("ascii", "replace"), digest.hexdigest()


def _seal(path: Path) -> None:
    """Put the checksum of a written file in its place."""
    place, _, digest = _digest(path)
    with open(path, "rb+") as file:
        file.seek(place)
        file.write(digest.encode())


def _in_one_chunk(table: pa.Table) -> pa.Table:
    return pa.Table.from_arrays(
        [_one_chunk(table.column(field.name), field.type) for field in table.schema],
        schema=table.schema.remove_metadata(),
    )


def _one_chunk(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    if column.num_chunks == 0:
        return pa.array([], kind)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def read_table(
    path: str | Path, schema: pa.Schema = SCORE_SCHEMA, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read one file, verifying its checksums.

    Raises:
        UsageError: the file is missing, truncated, damaged, or of another schema.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such table: {path}")
    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            found = file.schema_arrow.remove_metadata()
            if not _fits(found, schema):
                raise UsageError(
                    f"{path} has other columns than wanted: {', '.join(found.names)}; delete it and resume"
                )
            return file.read(columns=list(columns) if columns is not None else None).replace_schema_metadata()
    except _READ_ERRORS as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and resume") from error


def iter_table(path: str | Path, schema: pa.Schema = SCORE_SCHEMA) -> Iterator[pa.Table]:
    """A file's row groups in order, one in memory: the blocks it was written in. Raises as `read_table` does."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such table: {path}")
    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            if file.schema_arrow.remove_metadata() != schema:
                raise UsageError(f"{path} has other columns than wanted; delete it and resume")
            for index in range(file.num_row_groups):
                yield file.read_row_group(index).replace_schema_metadata()
    except _READ_ERRORS as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and resume") from error


def feature_width(path: str | Path) -> int:
    """Width of the `features` of a score table; 0 where it has none. Raises `UsageError` for a damaged file."""
    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw) as file:
            return _width(file.schema_arrow)
    except _READ_ERRORS as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and resume") from error


def read_facts(path: str | Path) -> dict[str, Any]:
    """The `facts` that a table was written with; {} where it has none. Raises `UsageError` for a damaged file."""
    try:
        with arrow_file(path) as raw, pq.ParquetFile(raw) as file:
            found = file.metadata.metadata or {}
        return dict(json.loads(found.get(_FACTS.encode(), b"{}")))
    except _READ_ERRORS as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and resume") from error


def is_readable(path: str | Path, schema: pa.Schema = SCORE_SCHEMA) -> bool:
    """Whether a file is whole: of this schema, and every byte is what `write_table` wrote.

    Neither a truncated shard nor one with a single changed bit is; nor is a table that something else wrote.
    """
    path = Path(path)
    try:
        place, found, wanted = _digest(path)
        if place < 0 or found != wanted:
            return False
        with arrow_file(path) as raw, pq.ParquetFile(raw) as file:
            return _fits(file.schema_arrow.remove_metadata(), schema)
    except _READ_ERRORS:
        return False


def read_tables(
    folder: str | Path, schema: pa.Schema = SCORE_SCHEMA, columns: Sequence[str] | None = None
) -> pa.Table:
    """All of `folder/part-*.parquet` as one table, in the order of their names.

    Raises:
        UsageError: there are none, or one of them is truncated, damaged or of another schema.
    """
    paths = sorted(Path(folder).glob("part-*.parquet"))
    if not paths:
        raise UsageError(f"no part-*.parquet in {folder}: run the score stage first")
    return pa.concat_tables([read_table(path, schema, columns) for path in paths])
