"""How a prepared corpus lies on disk: names, record types, checksums, atomic writes. Reader and writer share this page.

A corpus is a folder:
    manifest.json          what it is, counts, every file with size and sha256; canonical JSON that holds its own hash
    index.bin              int64 [4, columns + 1, blocks]: running sums inside each block, one plane a field of FIELDS
    tokens-NNNNN.bin       the symbols of block N, flat, little-endian, documents one after the other; float32 for reals
    documents-NNNNN.bin    one DOCUMENT row a document, in the same order
    checks-NNNNN.bin       uint32 CRC32C of every MiB of the token file; checks-index.bin the same of the index
    dropped.bin            one DROPPED row a document that no split has (only when there are any)
    symbol_bytes.bin       int64 [V], raw bytes that each symbol stands for
and the tokenizer's own files. All numbers are little-endian.

A record (an image, a row of a table) is a document of exactly `record` symbols, without an end symbol.

A cell is (group, bucket), a column is group * BUCKETS + bucket; a block's documents are sorted by column, so a shard,
the (block, column) range of a token file, is `index[:, column : column + 2, block]`. The index is stored column by
column: a split of a few runs of buckets reads a few rows of it, however many blocks there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from lmtrain.errors import CorpusError

VERSION = 1
MIB = 1 << 20
BUCKETS = 1000
GROUPS = 3
"""Group 0: train, or not split by the source; 1: the source's own valid; 2: the source's own test."""

DOCUMENT = np.dtype(
    [
        ("hash", "<u8"),
        ("hash2", "<u8"),
        ("offset", "<u8"),
        ("symbols", "<u8"),
        ("bytes", "<u8"),
        ("words", "<u8"),
        ("bucket", "<u2"),
        ("group", "<u1"),
        ("pad", "<u1"),
        ("label", "<u2"),
        ("pad2", "<u1", (2,)),
    ]
)
"""hash, hash2: first 16 bytes of sha256(raw). offset: symbols before it in the block. symbols: with the end symbol, of
which records have none. label: the class of a record, where the manifest says that there are `labels`."""

FIELDS = ("symbols", "documents", "bytes", "words")
"""The planes of the index."""

DROPPED = np.dtype(
    [(name, "<u8") for name in ("block", "row", "column", "offset", "symbols", "bytes", "words")],
)

MANIFEST = "manifest.json"
INDEX = "index.bin"
INDEX_CHECKS = "checks-index.bin"
DROPPED_FILE = "dropped.bin"
SYMBOL_BYTES = "symbol_bytes.bin"
INTEGERS: dict[str, np.dtype[Any]] = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
REALS = np.dtype("<f4")
DTYPES: dict[str, np.dtype[Any]] = {**INTEGERS, "float32": REALS}
MOST_LABELS = 1 << 16
KINDS = ("text", "image", "table")
"""What a manifest's `kind` may be."""


def tokens_name(block: int) -> str:
    """File of a block's symbols."""
    return f"tokens-{block:05d}.bin"


def documents_name(block: int) -> str:
    """File of a block's DOCUMENT rows."""
    return f"documents-{block:05d}.bin"


def checks_name(block: int) -> str:
    """File of the CRC32C of every MiB of a block's symbols."""
    return f"checks-{block:05d}.bin"


def smallest_dtype(alphabet: int) -> np.dtype[Any]:
    """The narrowest little-endian unsigned type that holds the symbols 0 .. alphabet - 1."""
    for dtype in INTEGERS.values():
        if alphabet <= 1 << (8 * dtype.itemsize):
            return dtype
    raise CorpusError(f"an alphabet of {alphabet} symbols does not fit 32 bits")


def document_hash(raw: bytes) -> tuple[int, int, int]:
    """(hash, hash2, bucket) of raw bytes: sha256's first 16 bytes as two numbers, and the first modulo 1,000."""
    digest = hashlib.sha256(raw).digest()
    first = int.from_bytes(digest[:8], "little")
    return first, int.from_bytes(digest[8:16], "little"), first % BUCKETS


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli) of read-only bytes."""
    return int(google_crc32c.value(data))


def crc32c_per_mib(data: memoryview) -> np.ndarray:
    """uint32 [ceil(len / 2^20)]: CRC32C of every MiB."""
    return np.array([crc32c(bytes(data[at : at + MIB])) for at in range(0, len(data), MIB)], "<u4")


def fsync_folder(folder: Path) -> None:
    """Make renames inside the folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes | memoryview | np.ndarray) -> dict[str, Any]:
    """Write aside, fsync, rename into place; {"size", "sha256"} of what was written. CorpusError when it cannot."""
    view = data.tobytes() if isinstance(data, np.ndarray) else data
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise CorpusError(f"{path} cannot be written: {error.strerror or error}") from None
    return {"size": len(view), "sha256": hashlib.sha256(view).hexdigest()}


def file_sha256(path: Path) -> str:
    """sha256 of a file; CorpusError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a manifest without its own `fingerprint`."""
    rest = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(canonical(rest)).hexdigest()


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """The one way a manifest is written: equal manifests are equal bytes, and no other bytes are accepted."""
    return (json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def columns(groups: Iterable[int], buckets: Iterable[tuple[int, int]]) -> np.ndarray:
    """int64, ascending: the columns of all cells of these groups and half-open bucket ranges."""
    chosen = np.zeros(BUCKETS, np.bool_)
    for lo, hi in buckets:
        chosen[lo:hi] = True
    in_group = np.flatnonzero(chosen)  # not np.unique: its first call imports numpy.ma, for as long as a batch takes
    parts = [group * BUCKETS + in_group for group in sorted(set(groups))]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def runs(columns_K: np.ndarray) -> list[tuple[int, int]]:
    """Ascending columns as half-open runs."""
    if not columns_K.size:
        return []
    breaks = np.flatnonzero(np.diff(columns_K) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(columns_K, breaks)]
