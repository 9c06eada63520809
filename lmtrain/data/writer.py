"""Writes a prepared corpus: block by block, then the index and the manifest. `open_corpus` reads it (corpus.py).

A block may be written by any process at any time: its bytes depend on its documents alone. What is finished leaves
`block-NNNNN.json` behind, so that a preparation that was killed goes on after the last finished block.

Nothing here needs torch: the processes that prepare start without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.data.layout import (
    BUCKETS,
    DOCUMENT,
    DROPPED,
    DROPPED_FILE,
    DTYPES,
    FIELDS,
    GROUPS,
    INDEX,
    INDEX_CHECKS,
    MANIFEST,
    REALS,
    SYMBOL_BYTES,
    VERSION,
    canonical,
    checks_name,
    columns,
    crc32c_per_mib,
    document_hash,
    documents_name,
    file_sha256,
    fingerprint,
    fsync_folder,
    tokens_name,
    write_file,
)
from lmtrain.errors import CorpusError

__all__ = ["finish", "finished_block", "read_documents", "write_block"]


def _marker(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.json"


def write_block(
    folder: Path,
    number: int,
    documents: Sequence[tuple[Any, np.ndarray, int, int]],
    *,
    dtype: np.dtype[Any] | str,
    labels: Sequence[int] | np.ndarray | None = None,
) -> dict[str, Any]:
    """Write one block and its restart marker; returns the marker's content, which `finish` wants.

    documents: (raw bytes or an object with `.raw`, symbols with the end symbol, group, words) in order of arrival.
    dtype: uint8, uint16 or uint32, what `smallest_dtype(alphabet)` gives; or float32. labels: class of each document.
    Raises CorpusError for a symbol that does not fit, a document without symbols, an unknown group, a full disk.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in DTYPES.values():
        raise CorpusError(f"symbols of type {dtype} cannot be stored; use one of {', '.join(DTYPES)}")
    rows = np.zeros(len(documents), DOCUMENT)
    for row, (document, symbols, group, words) in zip(rows, documents, strict=True):
        raw = document if isinstance(document, bytes) else document.raw
        if not 0 <= group < GROUPS:
            raise CorpusError(f"group {group} of a document in block {number}; wanted 0, 1 or 2")
        if not len(symbols):
            raise CorpusError(f"a document in block {number} has no symbols; even an empty one has its end symbol")
        row["hash"], row["hash2"], row["bucket"] = document_hash(raw)
        row["symbols"], row["bytes"], row["words"], row["group"] = len(symbols), len(raw), words, group

    if labels is not None:
        rows["label"] = labels
    order = np.argsort(_columns(rows), kind="stable")
    rows = rows[order]
    rows["offset"] = np.cumsum(rows["symbols"]) - rows["symbols"]
    tokens = np.empty(int(rows["symbols"].sum()), dtype)
    largest = -1
    for row, at in zip(rows, order.tolist(), strict=True):
        symbols = np.asarray(documents[at][1])
        tokens_of = slice(int(row["offset"]), int(row["offset"] + row["symbols"]))
        if dtype == REALS:
            if not np.isfinite(symbols).all():
                raise CorpusError(f"a number of block {number} is not finite; leave such records out")
            tokens[tokens_of] = symbols
            continue
        top = int(symbols.max())
        if int(symbols.min()) < 0 or top > np.iinfo(dtype).max:
            raise CorpusError(f"a symbol of block {number} lies outside {dtype.name}: {symbols.min()} .. {top}")
        largest = max(largest, top)
        tokens[tokens_of] = symbols

    data = tokens.data.cast("B") if tokens.size else memoryview(b"")
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {
        "number": number,
        "dtype": dtype.name,
        "largest": largest,
        "documents": len(rows),
        "symbols": int(tokens.size),
        "bytes": int(rows["bytes"].sum()),
        "words": int(rows["words"].sum()),
        "files": {
            tokens_name(number): write_file(folder / tokens_name(number), data),
            documents_name(number): write_file(folder / documents_name(number), rows),
            checks_name(number): write_file(folder / checks_name(number), crc32c_per_mib(data)),
        },
    }
    write_file(_marker(folder, number), canonical({**info, "fingerprint": fingerprint(info)}))
    return info


def finished_block(folder: Path, number: int) -> dict[str, Any] | None:
    """What `write_block` returned for a block that is whole on disk; None when it must be written (again)."""
    try:
        data = _marker(folder, number).read_bytes()
        info: dict[str, Any] = json.loads(data)
        if data != canonical(info) or info.pop("fingerprint") != fingerprint(info):
            return None
        for name, entry in info["files"].items():
            if (folder / name).stat().st_size != entry["size"] or file_sha256(folder / name) != entry["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, CorpusError):
        return None
    return info


def read_documents(folder: Path, number: int) -> np.ndarray:
    """The DOCUMENT rows of a written block (for finding duplicates before `finish`); CorpusError when unreadable."""
    path = folder / documents_name(number)
    try:
        return np.fromfile(path, DOCUMENT)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None


def finish(
    folder: Path,
    *,
    header: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    dropped: Iterable[str] = (),
    symbol_bytes_V: np.ndarray | None = None,
    files: Iterable[str] = (),
) -> str:
    """Write index and manifest (last, atomically), remove the restart markers; returns the fingerprint.

    header: kind, alphabet, bos, tokenizer {kind, sha256, file} (records: None, and `record`, their symbols), split
        {kind, splits: {name: {groups: [g, ...], buckets: [lo, hi] or [[lo, hi], ...] half-open}}}; more keys (reports)
        go into the manifest as they are. No times, host names or paths.
    blocks: what `write_block` returned, numbers 0 .. n - 1.
    dropped: "block:row" of documents that no split shall have; row counts in the block's documents file.
    symbol_bytes_V: raw bytes that each symbol stands for (text).
    files: further files in the folder, relative; a tokenizer's file or folder is taken from the header.
    Raises CorpusError: blocks that do not belong together, splits that overlap, an empty split (naming the counts).
    """
    blocks = sorted(blocks, key=lambda info: int(info["number"]))
    _check_blocks(blocks, alphabet=int(header["alphabet"]))
    names: dict[str, Any] = {}
    for info in blocks:
        names.update(info["files"])

    index = np.zeros((len(FIELDS), GROUPS * BUCKETS + 1, len(blocks)), "<i8")
    dropped_rows = _dropped(folder, dropped, blocks=len(blocks))
    for number in range(len(blocks)):
        rows = read_documents(folder, number)
        ends = np.searchsorted(_columns(rows), np.arange(GROUPS * BUCKETS + 1))
        for field, name in enumerate(FIELDS):
            one = np.ones(len(rows), np.int64) if name == "documents" else rows[name].astype(np.int64)
            index[field, :, number] = np.concatenate([[0], np.cumsum(one)])[ends]
    data = index.data.cast("B")
    names[INDEX] = write_file(folder / INDEX, data)
    names[INDEX_CHECKS] = write_file(folder / INDEX_CHECKS, crc32c_per_mib(data))
    if len(dropped_rows):
        names[DROPPED_FILE] = write_file(folder / DROPPED_FILE, dropped_rows)
    if symbol_bytes_V is not None:
        if symbol_bytes_V.shape != (header["alphabet"],):
            raise CorpusError(
                f"byte counts for {len(symbol_bytes_V)} symbols were given, the alphabet has {header['alphabet']}"
            )
        names[SYMBOL_BYTES] = write_file(folder / SYMBOL_BYTES, symbol_bytes_V.astype("<i8"))
    for name in sorted({*files, *_tokenizer_files(folder, header)}):
        path = folder / name
        names[name] = {"sha256": file_sha256(path), "size": path.stat().st_size}

    split = dict(header["split"])
    split["splits"] = {name: _normal(name, wanted) for name, wanted in split["splits"].items()}
    manifest = {
        **header,
        "version": VERSION,
        "dtype": blocks[0]["dtype"],
        "blocks": len(blocks),
        "split": split,
        "counts": _counts(split["splits"], index, dropped_rows, record=header.get("record")),
        "dropped": [f"{row['block']}:{row['row']}" for row in dropped_rows],
        "files": names,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    write_file(folder / MANIFEST, canonical(manifest))
    for number in range(len(blocks)):
        _marker(folder, number).unlink(missing_ok=True)
    fsync_folder(folder)
    return str(manifest["fingerprint"])


def _columns(rows: np.ndarray) -> np.ndarray:
    out: np.ndarray = rows["group"].astype(np.int64) * BUCKETS + rows["bucket"]
    return out


def _check_blocks(blocks: Sequence[Mapping[str, Any]], *, alphabet: int) -> None:
    if [int(info["number"]) for info in blocks] != list(range(len(blocks))):
        raise CorpusError(f"blocks {[info['number'] for info in blocks]} were given; wanted 0 .. n - 1, each once")
    if not sum(int(info["documents"]) for info in blocks):
        raise CorpusError("the source gave no documents; there is nothing to train on")
    types = sorted({str(info["dtype"]) for info in blocks})
    if len(types) > 1:
        raise CorpusError(f"blocks hold symbols of different types ({', '.join(types)}); prepare the corpus afresh")
    largest = max(int(info["largest"]) for info in blocks)
    if largest >= alphabet:
        raise CorpusError(f"a block holds symbol {largest}, the alphabet has {alphabet}: another tokenizer's blocks?")


def _dropped(folder: Path, dropped: Iterable[str], *, blocks: int) -> np.ndarray:
    wanted = sorted({(int(text.partition(":")[0]), int(text.partition(":")[2])) for text in dropped})
    out = np.zeros(len(wanted), DROPPED)
    rows = np.zeros(0, DOCUMENT)
    at = -1
    for entry, (block, row) in zip(out, wanted, strict=True):
        if block != at and 0 <= block < blocks:
            rows, at = read_documents(folder, block), block
        if block != at or not 0 <= row < len(rows):
            raise CorpusError(f"document {block}:{row} is to be dropped, but there is none")
        entry["block"], entry["row"], entry["column"] = block, row, _columns(rows[row])
        for name in ("offset", "symbols", "bytes", "words"):
            entry[name] = rows[row][name]
    return out


def _tokenizer_files(folder: Path, header: Mapping[str, Any]) -> list[str]:
    file = (header.get("tokenizer") or {}).get("file")
    if file is None:
        return []
    path = folder / file
    if path.is_dir():
        return [str(inner.relative_to(folder)) for inner in path.rglob("*") if inner.is_file()]
    return [str(file)]


def _normal(name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A split's cells with its bucket ranges as a list of half-open pairs."""
    buckets = list(wanted.get("buckets", [0, BUCKETS]))
    if len(buckets) == 2 and all(isinstance(bound, int) for bound in buckets):
        buckets = [buckets]
    for pair in buckets:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and 0 <= pair[0] <= pair[1] <= BUCKETS):
            raise CorpusError(
                f"split {name!r} has buckets {pair!r}; wanted [low, high] with 0 <= low <= high <= {BUCKETS}"
            )
    groups = sorted({int(group) for group in wanted.get("groups", [0])})
    if not groups or groups[0] < 0 or groups[-1] >= GROUPS:
        raise CorpusError(f"split {name!r} has groups {groups}; wanted some of 0, 1, 2")
    return {"groups": groups, "buckets": [[int(lo), int(hi)] for lo, hi in buckets]}


def _counts(
    splits: Mapping[str, Any], index: np.ndarray, dropped: np.ndarray, *, record: int | None
) -> dict[str, dict[str, int]]:
    """Counts per split; CorpusError when splits overlap or one is empty. Records have dimensions: their symbols."""
    totals = {field: np.diff(index[at].sum(axis=1)) for at, field in enumerate(FIELDS)}
    for row in dropped:
        for field in FIELDS:
            totals[field][int(row["column"])] -= 1 if field == "documents" else int(row[field])
    counts: dict[str, dict[str, int]] = {}
    owner: dict[int, str] = {}
    for name, cells in splits.items():
        wanted = columns(cells["groups"], [(lo, hi) for lo, hi in cells["buckets"]])
        for column in wanted.tolist():
            other = owner.setdefault(column, name)
            if other != name:
                raise CorpusError(
                    f"splits {other!r} and {name!r} both hold group {column // BUCKETS}, bucket {column % BUCKETS}"
                )
        counts[name] = {field: int(totals[field][wanted].sum()) for field in FIELDS}
        if record is not None:
            counts[name]["dims"] = counts[name]["symbols"]
    for name, count in counts.items():
        if not count["documents"]:
            others = ", ".join(f"{other} {c['documents']}" for other, c in counts.items())
            raise CorpusError(
                f"split {name!r} is empty (documents: {others}); give it more buckets or split by the documents' tails"
            )
    return counts
