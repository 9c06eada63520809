"""Where a corpus is made: `<out>.partial`, held by one preparation at a time, renamed to `<out>` when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmtrain.data.layout import MANIFEST, canonical, fsync_folder, write_file
from lmtrain.errors import CorpusError

RECIPE = "prepare.json"
"""The settings that a corpus was made with; beside the manifest, not part of it, since it may hold paths."""

PLAN = "plan.json"
"""What was decided before the first token is written (plan.py): from here on there is work to lose."""

LOCK = "lock"
PATIENCE = 5.0
"""Seconds to wait for the lock: the workers of a preparation that was killed take a moment to notice."""


class Workplace:
    """The folders of one preparation. `recipe`: its settings as plain values.

    last: the file that is written last and has all others in `files`: a corpus's manifest, or that of a part.
    """

    def __init__(self, out: Path, recipe: Mapping[str, Any], *, last: str = MANIFEST) -> None:
        self.out = out
        self.last = last
        self.partial = out.with_name(out.name + ".partial")
        self.recipe = dict(recipe)
        self.lock: int | None = None

    def is_made(self) -> bool:
        """Is `out` a corpus made with these settings? False if there is nothing; CorpusError names what differs."""
        if not self._is_there():
            return False
        if difference := _difference(self.out / RECIPE, self.recipe):
            raise CorpusError(
                f"{self.out} holds a corpus that was prepared otherwise ({difference}); give another folder, or "
                "--force to replace it"
            )
        return True

    def _is_there(self) -> bool:
        """Is there a corpus? CorpusError when there is something else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        if not self.out.is_dir():
            raise CorpusError(f"{self.out} is a file; wanted a folder for the corpus, new or empty")
        if not (self.out / self.last).exists():
            raise CorpusError(f"{self.out} is a folder that holds no corpus; give a new or empty one")
        return True

    @contextmanager
    def locked(self, *, force: bool) -> Iterator[None]:
        """Hold `<out>.partial`, made if needed.

        What was begun with other settings is thrown away with `force`, and when it did not come to its plan.
        """
        self._is_there()
        self.lock = self._acquire()
        try:
            if (self.partial / RECIPE).exists() and (difference := _difference(self.partial / RECIPE, self.recipe)):
                if not force and (self.partial / PLAN).exists():
                    raise CorpusError(
                        f"{self.partial} is an unfinished preparation with other settings ({difference}); finish it "
                        "with those, or --force to begin again"
                    )
                clear(self.partial)
            if force and self.is_complete():
                clear(self.partial)
            write_file(self.partial / RECIPE, canonical(self.recipe))
            yield
        finally:
            os.close(self.lock)
            self.lock = None

    def _acquire(self) -> int:
        until = time.monotonic() + PATIENCE
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # published, hence renamed, between the two lines above
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Published and begun again meanwhile? Then this lock is on a file that nobody else will look at.
                if os.stat(self.partial / LOCK).st_ino == os.fstat(handle).st_ino:
                    return handle
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError as error:
                os.close(handle)
                raise CorpusError(
                    f"{self.partial} cannot be locked ({error.strerror}); put the corpus on a local disk"
                ) from None
            os.close(handle)
            if time.monotonic() > until:
                raise CorpusError(f"another preparation of {self.out} is at work; wait for it, or give another folder")
            time.sleep(0.05)

    def is_complete(self) -> bool:
        """Was everything written, and only the renaming left?"""
        return (self.partial / self.last).exists()

    def abandon(self) -> None:
        """There is nothing to be done: leave no folder behind."""
        shutil.rmtree(self.partial)

    def publish(self) -> None:
        """Remove what only the work needed, and rename the folder into place."""
        names = set(json.loads((self.partial / self.last).read_bytes())["files"]) | {self.last, RECIPE}
        for path in sorted(self.partial.rglob("*"), reverse=True):
            if path.is_file() and str(path.relative_to(self.partial)) not in names:
                path.unlink()
        fsync_folder(self.partial)
        old = self.out.with_name(self.out.name + ".old")
        if self.out.is_dir() and any(self.out.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        fsync_folder(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove everything but the lock and the settings."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, RECIPE):
            path.unlink()


def _difference(path: Path, wanted: Mapping[str, Any]) -> str | None:
    """The first keys whose values differ, with both; None when the settings are the same."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return f"it has no {path.name}"
    except (OSError, ValueError):
        return f"its {path.name} cannot be read"
    there, here = dict(_flat(found)), dict(_flat(wanted))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    shown = [f"{key} = {there.get(key)!r} there, {here.get(key)!r} here" for key in keys]
    return "; ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") or None


def _flat(value: Any, prefix: str = "prepare") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}")
    else:
        yield prefix, value


@contextmanager
def friendly(out: Path) -> Iterator[None]:
    """Turn what the operating system says into one line that tells what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CorpusError(
                f"no room to write {where}: {error.strerror}; make some and start again, finished blocks are kept"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise CorpusError(f"{where} cannot be written: {error.strerror}; give another folder") from None
        raise CorpusError(f"{where}: {error.strerror or error}") from None
