"""Files of scores: JSON lines or Parquet by the name's ending, each with a head that says how they were made.

JSON lines: the first line is the head, every other one a unit. Parquet: a row a unit, the head in the file's metadata
under `lmtrain`. The head has all that two files need to be compared (comparing.py): what was scored, how, and the sums
of each group of units that an interval is drawn from.

Shapes in names: U units, G groups of units.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.errors import InputError
from lmtrain.journal import strict
from lmtrain.likelihood.scoring import Scored

VERSION = 1
ENDINGS = (".jsonl", ".parquet")
_KEY = b"lmtrain"
_HEAD = ("set", "run", "content", "split", "how", "measure", "offset_per_record", "share", "unit", "units", "symbols",
         "bytes", "groups")  # fmt: skip
"""Of the head of a set: what a comparison reads."""


def head_of(scored: Scored, *, run: str, step: int) -> dict[str, Any]:
    """What a set's scores depend on, and their sums: JSON values."""
    result = scored.result
    return {
        "set": scored.set.name,
        "run": run,
        "step": step,
        "content": scored.set.content,
        "split": scored.set.split.name,
        "symbols_mean": scored.set.corpus.meaning,
        "how": result.how,
        "temperature": result.temperature,
        "measure": scored.measure,
        "offset_per_record": scored.set.corpus.measure.offset,
        "share": result.share,
        "unit": result.unit,
        "units": result.units,
        "nats": result.score.nats,
        "symbols": result.score.symbols,
        "bytes": result.score.bytes,
        "groups": scored.groups_GJ.tolist(),
    }


def write(path: Path, sets: Sequence[Scored], heads: Sequence[Mapping[str, Any]]) -> None:
    """Whole or not at all. InputError for another ending than `ENDINGS`, or when it cannot be written."""
    rows = [row for scored in sets for row in _rows(scored)]
    write_rows(path, {"lmtrain_scores": VERSION, "sets": list(heads)}, rows)


def write_rows(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A head and rows of JSON values, numbers that are not finite as null. InputError as `write` raises it."""
    check_name(path)
    head, rows = strict(head), [strict(row) for row in rows]
    if path.suffix == ".jsonl":
        data = "".join(json.dumps(line) + "\n" for line in [head, *rows]).encode()
    else:
        data = _parquet(head, rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def check_name(path: Path) -> None:
    """InputError when the file's ending does not say what it is."""
    if path.suffix not in ENDINGS:
        raise InputError(f"--out {path}: the ending {path.suffix!r} says no format; wanted {' or '.join(ENDINGS)}")


def _rows(scored: Scored) -> Iterator[dict[str, Any]]:
    value_U = scored.value_U
    for u, number in enumerate(scored.number_U.tolist()):
        row = {
            "set": scored.set.name,
            "unit": number,
            "nats": float(scored.nats_U[u]),
            "symbols": int(scored.symbols_U[u]),
            "bytes": int(scored.bytes_U[u]),
            scored.measure.replace(" ", "_"): float(value_U[u]),
        }
        if scored.nats_N is not None and scored.x_N is not None and scored.begin_U is not None:
            low = int(scored.begin_U[u])
            these = slice(low, low + row["symbols"])
            row["symbol"] = scored.x_N[these].tolist()
            row["symbol_nats"] = [float(v) for v in scored.nats_N[these].astype(np.float32)]
        yield row


def _parquet(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(head).encode()}), out)
    return out.getvalue()


def heads(path: Path) -> list[dict[str, Any]]:
    """The heads of the sets in a file of scores. InputError when it is none, or of another version."""
    try:
        head = _head(path)
        version = head["lmtrain_scores"]
        sets: list[dict[str, Any]] = head["sets"]
        if version == VERSION and not (sets and all(set(_HEAD) <= set(each) for each in sets)):
            raise ValueError("heads of sets are missing, or not whole")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is no file of scores; give what `lmtrain score --out` wrote, or a run folder"
        ) from None
    if version != VERSION:
        raise InputError(f"{path} is a file of scores of version {version}, this reads {VERSION}; score afresh")
    return sets


def _head(path: Path) -> Any:
    if path.suffix not in ENDINGS:
        raise ValueError(f"the ending {path.suffix!r}")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return json.loads(file.readline())
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads((pq.read_schema(path).metadata or {})[_KEY])
    except pa.ArrowInvalid as error:
        raise ValueError(str(error)) from None
