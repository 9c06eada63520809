"""Trainings in processes of their own, a few at a time. Each is one `train_run` of a config file, its words in a log.

A process dies with the server that forks them, which ends with this process; runs go on from their checkpoints. SIGTERM
and SIGINT are passed on once as SIGTERM: each run saves and ends, and no other is started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lmtrain import run, schema
from lmtrain.errors import EngineError, LmtrainError
from lmtrain.protocol import Place
from lmtrain.stopping import die_with_parent

_TAIL = 2000


class Jobs:
    """Runs config files. stopped: whether a signal came."""

    def __init__(self, environment: Mapping[str, str], *, parallel: int = 1) -> None:
        self._environment = dict(environment)
        self._parallel = parallel
        self._running: dict[int, tuple[BaseProcess, Path]] = {}
        self.stopped = False

    def run(self, configs: Sequence[Path]) -> Iterator[tuple[Path, int]]:
        """(config file, exit code) of each as it ends. Words of x.yaml go to x.log.

        After a signal those that run are waited for, and no other is started.
        """
        waiting = list(configs)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lmtrain.run"])  # imported once, not by every training
        with self._signals():
            try:
                while (waiting and not self.stopped) or self._running:
                    while waiting and not self.stopped and len(self._running) < self._parallel:
                        path = waiting.pop(0)
                        started = context.Process(
                            target=_job, args=(str(path), str(path.with_suffix(".log")), self._environment)
                        )
                        started.start()
                        self._running[started.sentinel] = (started, path)
                    if self.stopped:  # also when the signal came while one was being started
                        self._pass_on()
                    for sentinel in connection.wait(list(self._running)):
                        process, path = self._running.pop(sentinel)  # type: ignore[arg-type]  # sentinels are numbers
                        process.join()
                        code = process.exitcode
                        yield path, 1 if code is None else code
            finally:
                self._end()

    def _end(self) -> None:
        """Leave no process behind when the one who asked gave up."""
        for process, _ in self._running.values():
            process.kill()
            process.join()
        self._running.clear()

    def _pass_on(self) -> None:
        for process, _ in self._running.values():
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopped = True
        self._pass_on()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            raise EngineError("signals are handled in the main thread; start trainings from it")
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _job(path: str, log: str, environment: Mapping[str, str]) -> None:
    """One training: the whole life of a process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it, and passes it on as SIGTERM
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(handle, number)
    try:
        code = run.train_run(schema.load(Path(path)), Place(), environment=environment)
    except LmtrainError as error:
        print(f"lmtrain: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    sys.exit(code)


def last_words(path: Path) -> str:
    """The last line of the log of a config file; "" when there is none."""
    try:
        lines = path.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-_TAIL:].splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
