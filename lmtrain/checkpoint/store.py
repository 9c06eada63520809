"""The checkpoints of a run: which are kept, which one is resumed, and the order of events that makes a save safe.

A checkpoint is the folder `step-00000010`; when step 10 is saved again (after a resume), `step-00000010.2`. It gets
that name by one rename, after all of it is on disk. Every other name is something else: `step-00000010.<token>.writing`
(being made), `.removing` (being removed), `.aside` (of a past that the run went back before). A kill at any instant
leaves the older checkpoints as they were.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lmtrain.checkpoint.background import Background
from lmtrain.checkpoint.flight import Flight
from lmtrain.checkpoint.manifest import differences
from lmtrain.checkpoint.names import LEFT_OVER, Saved, Which, name_of, saved_in
from lmtrain.checkpoint.ranks import share, tell, together
from lmtrain.checkpoint.reader import Reader, check_fits, faults
from lmtrain.checkpoint.saving import made_by, sync_folder, write_manifest, write_share
from lmtrain.config import Config
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Engine

_PATIENCE = 0.01
"""Seconds between two looks at a save in the background that is waited for."""


class CheckpointConfig(Config):
    """Which checkpoints are kept. The best one and the newest `keep` always are."""

    keep: int = Field(2, ge=2, description="newest checkpoints to keep; at least 2, so that one may be damaged")
    keep_every: int = Field(0, ge=0, description="keep those whose step is a multiple of this for good; 0 = none")
    file_mib: int = Field(512, ge=1, description="largest size of a file; fragments are cut where they do not fit")
    background: bool = Field(False, description="save while training goes on, from a copy in memory")


class Checkpoints:
    """The checkpoints in one folder.

    note: is told, on rank 0, what was passed over or removed and why. watch: is told of every save, on every rank (see
    `Flight.told`); without it `note` is told of failures. loaded: `step`, `bytes` and `seconds` of what was restored.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        note: Callable[[str], None] | None = None,
        watch: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.loaded: dict[str, Any] | None = None
        self._note = note or logging.getLogger(__name__).warning
        self._watch = watch
        self._background = Background(file_bytes=self._file_bytes)
        self._flight: Flight | None = None
        self._cleaner: threading.Thread | None = None
        self._bad: set[Path] = set()
        self._is_best: dict[Path, bool] = {}
        self._resumed: int | None = None

    # ---- reading -----------------------------------------------------------------------------------------------

    def list(self) -> list[Saved]:
        """All checkpoints by name, oldest first, good or bad; other files in the folder are ignored."""
        return saved_in(self.folder)

    def any(self) -> bool:
        """Whether there is any checkpoint, good or bad: whether the folder was used."""
        return bool(self.list())

    def newest(self) -> Saved | None:
        """The newest checkpoint that verifies, or None; damaged ones are noted and passed over."""
        for saved in reversed(self.list()):
            found = faults(saved.path)
            if not found:
                return saved
            self._pass_over(saved, found)
        return None

    def find(self, which: Which = None) -> Saved:
        """The checkpoint of a step, the best or the newest, wholly verified, in one process.

        Raises CheckpointError that names the damaged file, or the steps that there are. Only the newest is passed over
        when it is damaged: who asks for a step or for the best gets that one or an error.
        """
        if which is None:
            saved = self.newest()
            if saved is None:
                raise self._none_left()
            return saved
        saved = self._named(which)
        found = faults(saved.path)
        if found:
            raise CheckpointError("; ".join(found[:3]))
        return saved

    def best(self) -> Saved | None:
        """The newest one that was saved as the best so far and whose manifest is whole, or None."""
        for saved in reversed(self.list()):
            try:
                if saved.manifest().best:
                    return saved
            except CheckpointError:
                continue
        return None

    def _named(self, which: int | Literal["best"]) -> Saved:
        if which == "best":
            saved = self.best()
            if saved is None:
                raise CheckpointError(f"{self.folder} has no checkpoint that was saved as the best; {self._steps()}")
            return saved
        of_step = [saved for saved in self.list() if saved.step == which]
        if not of_step:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {which}; {self._steps()}")
        return of_step[-1]

    def _steps(self) -> str:
        steps = sorted({saved.step for saved in self.list()})
        return f"its steps are {', '.join(map(str, steps))}" if steps else "it has none at all"

    def _none_left(self) -> CheckpointError:
        if not self.any():
            return CheckpointError(f"{self.folder} has no checkpoint; train first, or give another folder")
        return CheckpointError(f"{self.folder}: no checkpoint verifies ({self._steps()}); each fault was reported")

    def _pass_over(self, saved: Saved, found: Sequence[str]) -> None:
        self._bad.add(saved.path)
        more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
        self._note(f"checkpoint {saved.path.name} is passed over: {found[0]}{more}")

    # ---- resuming ----------------------------------------------------------------------------------------------

    def restore(self, engine: Engine, step: Which = None) -> tuple[int, dict[str, Any]]:
        """Put a checkpoint into the engine; returns (step, the state given when it was saved). Collective.

        The ranks divide the reading of every byte among them first; None takes the newest that verifies. When the
        world, the machine or the versions are not those that saved, rank 0 notes it: the run goes on, not bit for bit.
        Raises CheckpointError on all ranks: nothing verifies, the named one is damaged, another model's.
        """
        began = time.perf_counter()
        while True:
            saved = self._choose(engine, step)
            found = faults(saved.path, part=(engine.rank, engine.world))
            told = share(engine, found[0] if found else "")
            bad = sorted({text for text in told if text})
            if not bad:
                break
            if step is not None:
                raise CheckpointError("; ".join(bad[:3]))
            self._bad.add(saved.path)
            if engine.rank == 0:
                self._pass_over(saved, bad)
        reader = Reader(saved.path, verified=True)
        check_fits(saved.path, reader.manifest, engine.model)
        changed = differences(reader.manifest.made_by, made_by(engine))
        if changed and engine.rank == 0:
            self._note(f"{saved.path.name} was saved elsewhere ({'; '.join(changed)}): it goes on, not bit for bit")
        engine.restore(reader, scalars=reader.manifest.scalars)
        self._resumed = reader.manifest.step
        seconds = time.perf_counter() - began
        self.loaded = {"step": reader.manifest.step, "bytes": reader.manifest.bytes, "seconds": seconds}
        return reader.manifest.step, dict(reader.manifest.state)

    def _choose(self, engine: Engine, which: Which) -> Saved:
        """The next candidate, chosen by rank 0 alone: listings of a shared file system may differ for a while."""
        chosen: list[Saved] = []

        def choose() -> None:
            if engine.rank:
                return
            if which is not None:
                chosen.append(self._named(which))
                return
            untried = [saved for saved in self.list() if saved.path not in self._bad]
            if not untried:
                raise self._none_left()
            chosen.append(untried[-1])

        together(engine, choose, what="nothing to resume")
        step, generation = tell(engine, (chosen[0].step, chosen[0].generation) if chosen else (0, 0))
        return Saved(step, generation, self.folder / name_of(step, generation))

    # ---- saving ------------------------------------------------------------------------------------------------

    def prepare(self, engine: Engine) -> None:
        """Before the first step: make ready for saves in the background, where they are wanted. Collective.

        Raises CheckpointError on all ranks when one of them has not the memory for its copy.
        """
        if self.config.background:
            together(engine, lambda: self._background.prepare(engine), what="saving in the background is not possible")

    def save(
        self, engine: Engine, *, step: int, state: Mapping[str, Any], best: bool = False, wait: bool = True
    ) -> Path | None:
        """Save the engine and `state` (JSON values, the same on every rank) as the checkpoint of `step`. Collective.

        Returns the checkpoint's folder, complete and on disk. Raises CheckpointError on all ranks, naming the rank and
        its trouble, when any of them failed; what was made is removed then and older checkpoints are as they were.

        wait=False, where `checkpoint.background` is set: returns None when the copy is made; `attend`, or the next
        save, makes a checkpoint of it when all ranks have written. A failure is reported then, never raised.
        One at a time: in both cases the save on its way, if there is one, is waited for first.
        """
        self.attend(engine, wait=True)
        began = time.perf_counter()
        (token,) = tell(engine, (secrets.randbits(48),))
        behind = self.config.background and not wait
        flight = Flight(step, best, self.folder / f"{name_of(step, 1)}.{token:012x}.writing", began, behind)

        def begin() -> None:
            if engine.rank == 0:
                if not self.folder.is_dir():
                    self.folder.mkdir(parents=True)
                    sync_folder(self.folder.parent)
                self._sweep()
                flight.aside.mkdir()

        def write() -> None:
            started = time.perf_counter()
            write_share(engine, flight.aside, file_bytes=self._file_bytes, state=state)
            flight.writing = time.perf_counter() - started

        try:
            together(engine, begin, what=flight.what)
            if behind:
                together(engine, lambda: self._background.copy(engine, state=state), what=flight.what)
                together(engine, lambda: self._background.begin(flight.aside), what=flight.what)
            else:
                together(engine, write, what=flight.what)
                flight.wrote(engine, flight.writing)
                self._publish(engine, flight)
        except CheckpointError as error:
            self._give_up(engine, flight)
            if not behind:
                raise
            flight.blocked = time.perf_counter() - began
            self._tell(engine, flight, failed=str(error))
            return None
        flight.blocked = time.perf_counter() - began
        if behind:
            self._flight = flight
            return None
        self._tell(engine, flight)
        return self.folder / name_of(step, flight.generation)

    def attend(self, engine: Engine, *, wait: bool = False) -> None:
        """See to the save in the background, if there is one: when all ranks have written, make a checkpoint of it.

        Collective, at the boundary of any step; wait: until it is done. A failure is reported, not raised.
        """
        flight = self._flight
        if flight is None:
            return
        began = time.perf_counter()
        while engine.agree(int(self._background.running())):
            if not wait:
                flight.blocked += time.perf_counter() - began
                return
            time.sleep(_PATIENCE)
        self._flight = None
        seconds: list[float] = []
        failed = None
        try:
            together(engine, lambda: seconds.append(self._background.outcome()), what=flight.what)
            flight.wrote(engine, seconds[0])
            self._publish(engine, flight)
        except CheckpointError as error:
            self._give_up(engine, flight)
            failed = str(error)
        flight.blocked += time.perf_counter() - began
        self._tell(engine, flight, failed=failed)

    def close(self) -> None:
        """End what goes on in the background; a save on its way is lost unless `attend` has seen to it."""
        self._background.close()
        self._flight = None
        if self._cleaner is not None:
            self._cleaner.join()

    def _publish(self, engine: Engine, flight: Flight) -> None:
        """All ranks have written: a manifest, the name, and what need not be kept any longer is removed. Collective."""

        def finish() -> None:
            if engine.rank == 0:
                flight.bytes = write_manifest(engine, flight.aside, step=flight.step, best=flight.best).bytes
                self._leave_past()
                same = (saved.generation for saved in self.list() if saved.step == flight.step)
                flight.generation = max(same, default=0) + 1
                os.rename(flight.aside, self.folder / name_of(flight.step, flight.generation))
                sync_folder(self.folder)

        together(engine, finish, what=flight.what)
        flight.generation, flight.bytes = tell(engine, (flight.generation, flight.bytes))
        if engine.rank == 0:
            new = Saved(flight.step, flight.generation, self.folder / name_of(flight.step, flight.generation))
            self._is_best[new.path] = flight.best
            self._prune(new)

    def _give_up(self, engine: Engine, flight: Flight) -> None:
        """All ranks know that it failed, and none of them writes any more when what there is of it is removed."""
        self._background.abandon()
        engine.agree(0)
        if engine.rank == 0:
            shutil.rmtree(flight.aside, ignore_errors=True)

    def _tell(self, engine: Engine, flight: Flight, *, failed: str | None = None) -> None:
        if self._watch is not None:
            self._watch(flight.told(failed=failed))
        elif failed and engine.rank == 0:
            self._note(failed)

    @property
    def _file_bytes(self) -> int:
        return int(self.config.file_mib * 2**20)

    def _leave_past(self) -> None:
        """After going back to a checkpoint, what was saved later is of another past: never resumed, never removed."""
        if self._resumed is None:
            return
        for saved in self.list():
            if saved.step > self._resumed:
                self._rename(saved, "aside")
                self._note(f"checkpoint {saved.path.name} lies after step {self._resumed} that was resumed: set aside")
        self._resumed = None

    def _prune(self, new: Saved) -> None:
        """Remove what need not be kept. What goes wrong here is noted: the new checkpoint is safe already."""
        try:
            present = self.list()
            good = {saved.step: saved for saved in present if saved == new or self._looks_good(saved)}
            whole = list(good.values())
            latest = whole[-self.config.keep :]
            keep = {new, *latest}
            if self.config.keep_every:
                keep |= {saved for saved in whole if saved.step % self.config.keep_every == 0}
            keep |= set([saved for saved in whole if self._is_best[saved.path]][-1:])
            for saved in present:
                # A damaged one stays to be looked at until enough good ones are newer.
                if saved not in keep and (saved.step in good or saved.step < latest[0].step):
                    self._remove(self._rename(saved, "removing"))
        except (OSError, CheckpointError) as error:
            self._note(f"old checkpoints in {self.folder} could not be removed: {error}")

    def _remove(self, path: Path) -> None:
        """Remove a folder that has lost its name already; in the background where saves are: it may be large."""
        if not self.config.background:
            shutil.rmtree(path)
            return
        before = self._cleaner

        def clean() -> None:
            if before is not None:
                before.join()
            shutil.rmtree(path, ignore_errors=True)

        self._cleaner = threading.Thread(target=clean, name="remove-checkpoints", daemon=True)
        self._cleaner.start()

    def _looks_good(self, saved: Saved) -> bool:
        """By manifest and sizes; looked up once, checkpoints do not change."""
        if saved.path not in self._is_best:
            if faults(saved.path, contents=False):
                return False
            self._is_best[saved.path] = saved.manifest().best
        return True

    def _rename(self, saved: Saved, ending: str) -> Path:
        """Take its name from a checkpoint at once, so that nothing half removed can be taken for one."""
        away = self.folder / f"{saved.path.name}.{secrets.randbits(48):012x}.{ending}"
        os.rename(saved.path, away)
        sync_folder(self.folder)
        return away

    def _sweep(self) -> None:
        """Remove what killed processes left."""
        if self._cleaner is not None:
            self._cleaner.join()
        for name in os.listdir(self.folder):
            path = self.folder / name
            if LEFT_OVER.fullmatch(name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
