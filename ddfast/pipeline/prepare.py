"""Preparation: what a method must know of the whole pool before it can score the first image.

Rank 0 makes it once and writes `prepared.parquet`, a value an image, whose hash stands in the manifest; every rank
reads that file. The state on the way stands in a hidden file, so that a killed preparation goes on where it was.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa

from ddfast.methods.base import Prepared
from ddfast.output.distilled import PREPARED
from ddfast.output.table import is_readable, make_table, read_facts, read_table, to_numpy, write_table
from ddfast.pipeline.plan import score_digest
from ddfast.pipeline.run import Run
from ddfast.state import FileCheckpoint

_STATE = ".preparation"
PREPARED_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)
"""One row an image of the pool, by ascending id; what the value is, the method says."""


def prepare(run: Run) -> None:
    """Make `prepared.parquet` where it is not there yet, and open it on every rank.

    Raises:
        UsageError: of the method; nothing is half-written.
    """
    run.ranks.on_main("prepare", lambda: _make(run))
    columns = run.ranks.together(
        "prepared", lambda: to_numpy(read_table(run.out / PREPARED, PREPARED_SCHEMA))
    )
    run.prepared = Prepared(columns["sample_id"], columns["value"])


def _make(run: Run) -> None:
    path, digest = run.out / PREPARED, score_digest(run.plan)
    if not is_readable(path, PREPARED_SCHEMA) or read_facts(path).get("scores") != digest:
        state = FileCheckpoint(run.out / _STATE, digest)
        values = run.selection.prepare(run.decoded_pool(), run.context, state)
        ids = run.source.samples.ids[run.pool()]
        table = make_table({"sample_id": ids, "value": values.numpy()}, PREPARED_SCHEMA)
        write_table(path, table, {"scores": digest})
    (run.out / _STATE).unlink(missing_ok=True)
    run.plan["prepared"] = {"file": PREPARED, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    run.save()
