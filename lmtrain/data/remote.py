"""Bytes of files that lie elsewhere, by range, through fsspec: http(s), s3, gs, hf, memory, and what else it knows.

What fails in passing (a server that is down, a link that is cut, a time-out) is asked for again, with pauses that
double from 0.1 to 10 s, until `patience` is over. What will not come by waiting (no such file, no permission, a missing
package) is an error at once. Credentials are those of the machine (as the backend finds them), never of the URL.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem

from lmtrain.errors import ConfigError, CorpusError

ANSWER = 60.0
"""Seconds in which a request must be answered."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
SAY_AFTER = 2.0
"""Seconds of waiting after which it is said, and said again when they have doubled."""

DAMAGED = 3
"""How often bytes may arrive damaged."""

_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    ImportError,
    ValueError,
    TypeError,
)
_AGAIN = {408, 425, 429}


class Address(PurePosixPath):
    """A URL as a path: `/` appends a name, `str` gives the URL back."""

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}"


def is_url(path: object) -> bool:
    """Whether a corpus is named by a URL. `file://` is a local folder."""
    return isinstance(path, Address) or re.match(r"[a-z][a-z0-9+.-]*://", str(path)) is not None


def local(url: str) -> str:
    """`file:///a/b` as `/a/b`; anything else as it is."""
    return url.removeprefix("file://") if url.startswith("file:///") else url


class ClosedError(Exception):
    """The reader was closed while it waited."""


class Remote:
    """Reads ranges of the files below a URL.

    patience: seconds to go on trying. note: hears of waiting. Raises ConfigError for a URL that cannot be used.
    """

    def __init__(self, url: str, *, patience: float, note: Callable[[str], None]) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"the URL {parts.scheme}://{parts.hostname or ''}{parts.path} of a corpus carries credentials, a query "
                "or a fragment; give it without (runs record it) and let the machine's own settings hold credentials"
            )
        self.path = Address(url)
        self.closing = threading.Event()
        self.asked = self.failed = 0
        """Requests, and those that failed."""
        self._url, self._patience, self._note = url.rstrip("/"), patience, note
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: {error}; install what it names, or use another kind of URL") from None

    def read(
        self, name: str, start: int | None = None, stop: int | None = None, *, check: Callable[[bytes], str | None]
    ) -> bytes:
        """The bytes [start, stop) of a file, or all of it, once `check` finds nothing wrong (None) with them.

        CorpusError names the file and what is wrong: it is gone, it is damaged, or patience is over.
        """
        began = time.monotonic()
        pause, say_at, damaged = FIRST_PAUSE, SAY_AFTER, 0
        while True:
            try:
                self.asked += 1
                data = self._ask(name, start, stop)
                fault = check(data)
                if fault is None:
                    return data
                if start is not None and stop is not None and len(data) > stop - start:
                    raise CorpusError(
                        f"{self.path / name}: {stop - start} bytes were asked for and {len(data)} came; the server "
                        "does not answer range requests, use one that does"
                    )
                damaged += 1
                if damaged == DAMAGED:
                    raise CorpusError(f"{self.path / name} {fault}, {damaged} times; restore it from a copy")
                problem = fault
            except CorpusError:
                raise
            except Exception as error:  # every backend has its own
                self.failed += 1
                problem = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
                if _is_final(error):
                    raise CorpusError(f"{self.path / name} {_words(error, problem)}") from None
            waited = time.monotonic() - began
            if waited + pause > self._patience:
                raise CorpusError(
                    f"{self.path / name} could not be read for {waited:.0f} s ({problem}); look after the server, then "
                    "start again, or raise data.remote.patience"
                )
            if waited > say_at:
                say_at = 2 * waited
                self._note(f"waiting for {self.path / name} since {waited:.0f} s ({problem})")
            if self.closing.wait(pause * (0.75 + 0.5 * random.random())):  # ranks do not knock all at once
                raise ClosedError
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask(self, name: str, start: int | None, stop: int | None) -> bytes:
        more = {"timeout": ANSWER} if isinstance(self._files, AsyncFileSystem) else {}
        data: bytes = self._files.cat_file(f"{self._root}/{name}", start=start, end=stop, **more)
        return data


def _status(error: Exception) -> int:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else 0


def _is_final(error: Exception) -> bool:
    status = _status(error)
    return isinstance(error, _FINAL) or (400 <= status < 500 and status not in _AGAIN)


def _words(error: Exception, problem: str) -> str:
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        return "is gone, or never was there; restore it or prepare the corpus again"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"must not be read ({problem}); look after the machine's credentials"
    return f"cannot be read ({problem})"
