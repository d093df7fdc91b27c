"""The score table and the selection: Parquet files with the same bytes for the same rows.

The score pass writes one file for each shard of sources, `scores/part-00000.parquet` and so on, one row a
candidate crop; selection is a sort over all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddfast.data.files import atomic_write_bytes
from ddfast.data.sources import one_line
from ddfast.errors import UsageError

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
measured.
"""

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
_COMPRESSION_LEVEL = 3
# pyarrow's readers raise ArrowException (some of them are OSError or ValueError as well), and OSError for the
# file.
_READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)


def make_table(columns: Mapping[str, Any], schema: pa.Schema = SCORE_SCHEMA) -> pa.Table:
    """A table of `schema` from arrays of M rows.

    Args:
        columns: column name -> array, CPU tensor or list; [M] or, for `box`, [M, 4] and for `phi`, [M, d]. A
            column that may be null can be left out or be None.
        schema: `SCORE_SCHEMA` or `SELECTION_SCHEMA`.

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
        if flat.ndim != 2 or (field.type == _BOX and flat.shape[1] != 4):
            raise ValueError(f"column {field.name!r} must have one row a crop, got shape {flat.shape}")
        items = pa.array(flat.reshape(-1), pa.float32())
        if field.type == _BOX:
            return pa.FixedSizeListArray.from_arrays(items, type=field.type)
        offsets = np.arange(rows + 1, dtype=np.int32) * flat.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, type=field.type)
    if pa.types.is_string(field.type):
        return pa.array([str(value) for value in values], field.type)
    return pa.array(np.asarray(values), from_pandas=False).cast(field.type)


def to_numpy(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as NumPy arrays.

    Null numbers become NaN and null truth values False; `box` is float32 [M, 4]; `phi` is float32 [M, d], NaN
    in rows that have none, d = 0 where no row has any; strings are object arrays.

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


def write_table(path: str | Path, table: pa.Table) -> None:
    """Write a table atomically.

    Equal rows give equal bytes with one pyarrow version: fixed compression and row groups, one chunk a
    column, no time stamps, no metadata beside the schema. Pages carry checksums, which `read_table` verifies.

    Raises:
        UsageError: no space, no permission, an impossible path.
    """
    table = pa.Table.from_arrays(
        [_one_chunk(table.column(field.name), field.type) for field in table.schema],
        schema=table.schema.remove_metadata(),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROW_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=_COMPRESSION_LEVEL,
        use_dictionary=["key"],
        write_statistics=True,
        write_page_checksum=True,
        store_schema=True,
    )
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


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
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = file.schema_arrow.remove_metadata()
            if found != schema:
                raise UsageError(
                    f"{path} has other columns than wanted: {', '.join(found.names)}; delete it and resume"
                )
            return file.read(columns=list(columns) if columns is not None else None).replace_schema_metadata()
    except _READ_ERRORS as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): delete it and resume") from error


def is_readable(path: str | Path, schema: pa.Schema = SCORE_SCHEMA) -> bool:
    """Whether a file is whole: footer, schema, every page and its checksum. A truncated shard is not."""
    try:
        read_table(path, schema)
    except UsageError:
        return False
    return True


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
