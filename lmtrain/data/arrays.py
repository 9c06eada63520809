"""Records out of files of numbers: npz archives, idx files, CSV and parquet tables. A piece at a time, never by pickle.

Every reader yields arrays [N, ...] of about `piece_bytes`, in the order of the file. What is damaged is a CorpusError
that names the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from lmtrain.errors import CorpusError

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_MOST = 8  # dimensions
_DAMAGE = (OSError, EOFError, ValueError, OverflowError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile,
           csv.Error)  # fmt: skip
"""What damage makes readers raise: lengths that are none, kinds of compression that nobody has."""
_MOST_ROW = 1 << 31
"""Bytes of a record: more than that is a damaged header."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CorpusError(f"no such file: {path}") from None
    except _DAMAGE as error:
        raise CorpusError(f"{path} cannot be read, it may be damaged: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _pieces(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], piece_bytes: int) -> Iterator[np.ndarray]:
    """An array that lies in a stream row after row; ValueError when it ends early."""
    row = dtype.itemsize * math.prod(shape[1:])
    if row > _MOST_ROW:
        raise ValueError(f"its header says {'x'.join(map(str, shape))}")
    rows = max(1, piece_bytes // max(row, 1))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        data = file.read(count * row)
        if len(data) != count * row:
            raise ValueError(f"it ends in row {start + len(data) // max(row, 1)} of {shape[0]}")
        yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def npz(path: Path, name: str, piece_bytes: int) -> Iterator[np.ndarray]:
    """The array `name` of an npz archive; CorpusError names the arrays that there are when it is none of them."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        with _member(path, archive, name) as file:
            shape, fortran, dtype = _header(file)
            if not shape:
                raise CorpusError(f"{path}: the array {name!r} is a single number, wanted one row a record")
            if not fortran:
                yield from _pieces(file, shape, dtype, piece_bytes)
                return
        with np.load(path, allow_pickle=False) as whole:
            yield np.ascontiguousarray(whole[name])


def npz_number(path: Path, name: str) -> int:
    """A single whole number of an npz archive."""
    with _reading(path), zipfile.ZipFile(path) as archive, _member(path, archive, name) as file:
        shape, _, dtype = _header(file)
        if math.prod(shape) != 1 or dtype.kind not in "iu":
            raise CorpusError(f"{path}: {name!r} is an array of {dtype} of shape {shape}, wanted one whole number")
        return int(np.frombuffer(file.read(dtype.itemsize), dtype)[0])


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    if f"{name}.npy" not in archive.namelist():
        there = ", ".join(sorted(member.removesuffix(".npy") for member in archive.namelist()))
        raise CorpusError(f"{path} has no array {name!r}; it has {there}")
    return archive.open(f"{name}.npy")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read: Callable[..., Any] = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype}, not numbers")
    return shape, bool(fortran), dtype


def idx(path: Path, piece_bytes: int) -> Iterator[np.ndarray]:
    """An array in LeCun's idx format (that of MNIST), plain or .gz."""
    with _reading(path), _open(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not 1 <= head[3] <= _IDX_MOST:
            raise CorpusError(f"{path} is no idx file: it begins with {head.hex(' ')}")
        sizes = file.read(4 * head[3])
        if len(sizes) < 4 * head[3]:
            raise ValueError("it ends in its header")
        shape = tuple(np.frombuffer(sizes, ">u4").astype(int).tolist())
        dtype = np.dtype(_IDX_TYPES[head[2]])
        for piece in _pieces(file, shape, dtype, piece_bytes):
            yield piece.astype(dtype.newbyteorder("="), copy=False)
        if file.read(1):
            raise ValueError(f"it goes on after its {shape[0]} rows")


def csv_table(
    path: Path, *, columns: Sequence[str] | None, label: str | None, piece_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(float64 [N, D], labels) of a CSV file, plain or .gz. A first line that is not all numbers names the columns.

    Without names columns are called 0, 1, ... columns: those that are read, in this order; None = all but the label.
    """
    with _reading(path), _open(path) as raw:
        rows = csv.reader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        first = next(rows, None)
        if first is None:
            raise ValueError("it is empty")
        named = not all(_is_number(cell) for cell in first)
        names = [cell.strip() for cell in first] if named else [str(number) for number in range(len(first))]
        wanted, label_at = _chosen(path, names, columns, label)
        most = max(1, piece_bytes // (8 * max(len(wanted), 1)))
        held: list[list[float]] = []
        labels: list[float] = []
        for line in rows if named else _chain(first, rows):
            if not line:
                continue
            where = f"line {rows.line_num}"
            if len(line) != len(names):
                raise ValueError(f"{where} has {len(line)} columns, the first has {len(names)}")
            held.append([_number(line[at], f"{where}, column {names[at]}") for at in wanted])
            if label_at is not None:
                labels.append(_number(line[label_at], f"{where}, column {names[label_at]}"))
            if len(held) == most:
                yield np.array(held), None if label_at is None else np.array(labels)
                held, labels = [], []
        if held:
            yield np.array(held), None if label_at is None else np.array(labels)


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: {cell!r} is no number") from None


def _chosen(
    path: Path, names: Sequence[str], columns: Sequence[str] | None, label: str | None
) -> tuple[list[int], int | None]:
    """Indices of the columns that are read, and of the label."""
    for name in [*(columns or ()), *([label] if label is not None else [])]:
        if name not in names:
            raise CorpusError(f"{path} has no column {name!r}; it has {', '.join(names)}")
    wanted = [name for name in names if name != label] if columns is None else list(columns)
    return [names.index(name) for name in wanted], None if label is None else names.index(label)


def parquet_table(
    path: Path, *, columns: Sequence[str] | None, label: str | None, piece_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(float64 [N, D], labels) of a parquet file of columns of numbers; as `csv_table`."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted, label_at = _chosen(path, names, columns, label)
            read = [names[at] for at in wanted] + ([] if label is None else [label])
            for batch in file.iter_batches(max(1, piece_bytes // (8 * max(len(read), 1))), columns=read):
                at = {name: batch.column(name) for name in read}
                for name, column in at.items():
                    if column.null_count:
                        raise CorpusError(f"{path}, column {name}: {column.null_count} values are missing")
                x_ND = np.stack([np.asarray(at[names[i]], np.float64) for i in wanted], axis=1)
                yield x_ND, None if label_at is None else np.asarray(at[names[label_at]], np.float64)
    except FileNotFoundError:
        raise CorpusError(f"no such file: {path}") from None
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise CorpusError(f"{path} cannot be read, it may be damaged: {str(error).splitlines()[0]}") from None
