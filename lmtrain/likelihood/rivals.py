"""What general compressors make of the same bytes (the only import of brotli)."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterable

COMPRESSORS: dict[str, Callable[[bytes], int]] = {
    "gzip -9": lambda raw: len(gzip.compress(raw, 9, mtime=0)),
    "bzip2 -9": lambda raw: len(bz2.compress(raw, 9)),
    "xz -9e": lambda raw: len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    "zstd -19": lambda raw: _zstd(raw),
    "brotli -11": lambda raw: _brotli(raw),
}
"""Name -> bytes of a file that holds `raw`, at the strongest setting that its manual calls usual."""


def _zstd(raw: bytes) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=19).compress(raw))


def _brotli(raw: bytes) -> int:
    import brotli

    # The widest window of the standard, as the command `brotli` takes for large files.
    return len(brotli.compress(raw, quality=11, lgwin=24))


def sizes(raw: bytes, names: Iterable[str] = tuple(COMPRESSORS)) -> dict[str, int]:
    """Bytes that each compressor makes of `raw`."""
    return {name: COMPRESSORS[name](raw) for name in names}
