"""Documents out of local files: text, JSON lines and parquet, plain or compressed with gzip or Zstandard.

Everything is read in order and in bounded memory: a document at a time, a row group of parquet. Any damage is a
CorpusError naming the file and the line or row.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast, final

import zstandard

from lmtrain.errors import CorpusError

Format = Literal["auto", "txt", "jsonl", "parquet"]
Unit = Literal["file", "line", "blank_line", "separator"]

FORMATS = {".txt": "txt", ".text": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
_READ = 1 << 20
_PARQUET_ROWS = 256
_ZSTD_STEP = 128


def expand(patterns: Iterable[str], *, format: Format = "auto") -> list[Path]:
    """The files of paths, folders (all that lies below and has a known ending) and globs (`**` too).

    In the order of the patterns, sorted within each, every file once. CorpusError when a pattern gives nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and (format != "auto" or _known(p)))
            if not below:
                raise CorpusError(f"the folder {pattern} holds no {', '.join(FORMATS)} file (or .gz / .zst of one)")
            found |= dict.fromkeys(below)
        elif path.is_file():
            found[path] = None
        elif glob.has_magic(pattern):
            matches = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
            matches = [p for p in matches if p.is_file()]
            if not matches:
                raise CorpusError(f"no file matches {pattern!r}")
            found |= dict.fromkeys(matches)
        else:
            raise CorpusError(f"no such file: {pattern}")
    return list(found)


def _known(path: Path) -> bool:
    return _inner(path) in FORMATS


def _inner(path: Path) -> str:
    """The ending that tells the format: `.jsonl` of `a.jsonl.zst`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def format_of(path: Path, format: Format) -> str:
    """txt, jsonl or parquet. CorpusError when it is not given and the name does not tell."""
    if format != "auto":
        return format
    if not _known(path):
        raise CorpusError(
            f"{path}: the ending does not tell what the file is (known: {', '.join(FORMATS)}, and .gz / .zst of them); "
            "set source.format to txt, jsonl or parquet"
        )
    return FORMATS[_inner(path)]


def read(
    path: Path, *, format: Format, document: Unit, separator: bytes = b"", field: str = "text"
) -> Iterator[tuple[bytes, str]]:
    """(raw bytes, name) of each document of a file. A null text gives b"", as an empty one does.

    document: what one document of a txt file is. `line`: a line without its line break, none for an empty line.
    `blank_line`: lines up to a blank one. `separator`: what stands between occurrences of `separator`, without the line
    breaks around it, none where nothing stands.
    field: the JSON field, or the parquet column, that holds the text.
    """
    kind = format_of(path, format)
    if kind == "parquet":
        yield from _parquet(path, field)
        return
    with _Opened(path) as file:
        if kind == "jsonl":
            yield from _jsonl(_lines(file), path, field)
        elif document == "file":
            yield file.read(), str(path)
        elif document == "line":
            for number, line in _lines(file):
                raw = line.removesuffix(b"\n").removesuffix(b"\r")
                if raw:
                    yield raw, f"{path}:{number}"
        elif document == "blank_line":
            yield from _paragraphs(_lines(file), path)
        else:
            yield from _separated(file, path, separator)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    return enumerate(file, start=1)


def _paragraphs(lines: Iterable[tuple[int, bytes]], path: Path) -> Iterator[tuple[bytes, str]]:
    held: list[bytes] = []
    first = 0
    for number, line in lines:
        if line.strip():
            if not held:
                first = number
            held.append(line)
        elif held:
            yield b"".join(held).rstrip(b"\r\n"), f"{path}:{first}"
            held = []
    if held:
        yield b"".join(held).rstrip(b"\r\n"), f"{path}:{first}"


def _separated(file: BinaryIO, path: Path, separator: bytes) -> Iterator[tuple[bytes, str]]:
    assert separator
    number = 0
    held: list[bytes] = []  # what was read of the current document; the last piece is searched again with the next
    for block in iter(lambda: file.read(_READ), b""):
        tail = held.pop() + block if held else block
        *whole, rest = tail.split(separator)
        for piece in whole:
            raw = b"".join([*held, piece]).strip(b"\r\n")
            held = []
            if raw:
                number += 1
                yield raw, f"{path}#{number}"
        # Keep as much apart as may be the beginning of a separator, so that no byte is copied more than a few times.
        cut = max(0, len(rest) - len(separator) + 1)
        held += [rest[:cut], rest[cut:]]
    raw = b"".join(held).strip(b"\r\n")
    if raw:
        yield raw, f"{path}#{number + 1}"


def _jsonl(lines: Iterable[tuple[int, bytes]], path: Path, field: str) -> Iterator[tuple[bytes, str]]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            raise CorpusError(f"{where}: not UTF-8, as JSON must be") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise CorpusError(f"{where}: a {type(value).__name__}, wanted an object with the field {field!r}")
        yield text_of(value, field, where=where), f"{path}:{number}"


def text_of(row: dict[str, object], field: str, *, where: str) -> bytes:
    """Raw bytes of a row's text; b"" for null. CorpusError when there is no such field or it is no text."""
    if field not in row:
        raise CorpusError(f"{where}: no field {field!r}; there are {', '.join(map(repr, row))}; set source.field")
    value = row[field]
    if value is None:
        return b""
    if isinstance(value, str):
        # A lone surrogate, which JSON can spell, is kept as the three bytes that it would have.
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    raise CorpusError(f"{where}: the field {field!r} is a {type(value).__name__}, wanted text")


def _parquet(path: Path, field: str) -> Iterator[tuple[bytes, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() in PACKED:
        raise CorpusError(f"{path}: parquet is compressed inside; unpack the file")
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise CorpusError(f"{path}: no column {field!r}; there are {', '.join(names)}; set source.field")
            kind = file.schema_arrow.field(field).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            textual = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
            if not any(check(kind) for check in textual):
                raise CorpusError(f"{path}: the column {field!r} is of type {kind}, wanted text; there are {names}")
            # One row group at a time: iterating over all of them keeps what was read until the file's end.
            for group in range(file.num_row_groups):
                batches = file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field], use_threads=False)
                for value in (value for batch in batches for value in batch.column(0).to_pylist()):
                    row += 1
                    yield text_of({field: value}, field, where=f"{path} row {row}"), f"{path}#{row}"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as parquet after row {row}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@final
class _Opened:
    """A file's bytes, unpacked; faults of the file system and of the packing become CorpusError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> BinaryIO:
        try:
            raw = self._path.open("rb")
        except OSError as error:
            raise CorpusError(f"{self._path} cannot be opened: {error.strerror}") from None
        self._raw = raw
        suffix = self._path.suffix.lower()
        if suffix == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        if suffix == ".zst":
            return cast(BinaryIO, io.BufferedReader(_Zstd(raw), _READ))
        return raw

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._raw.close()
        if isinstance(error, OSError | EOFError | zlib.error | zstandard.ZstdError):
            raise CorpusError(f"{self._path} is damaged or cut short: {_one_line(error)}") from None


@final
class _Zstd(io.RawIOBase):
    """All frames of a Zstandard file. The library's own reader ends in silence where a file was cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True  # nothing of the current frame was read
        self._packed = b""
        self._at = 0
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        while not self._ready:
            if self._frame.eof:
                self._at -= len(self._frame.unused_data)
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._fresh = True
            if self._at == len(self._packed):
                self._packed, self._at = self._file.read(_READ), 0
            if not self._packed:
                if self._fresh:
                    return 0
                raise EOFError("the last frame has no end")
            # A few bytes may stand for 128 KiB, and all that comes out of a call is held.
            step = self._packed[self._at : self._at + _ZSTD_STEP]
            self._at += len(step)
            self._fresh = False
            self._ready = self._frame.decompress(step)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
