"""Where the ranks' signs of life come together: a thread of rank 0 that finds who holds the others up, and tells all.

Messages are JSON lines over TCP; lifeline.py is the other end. A rank says hello with the token of the run, then beats
(its section and stack), and in the end bye, or what made it fail. A connection that closes without either is a process
that was killed or left early; one that falls silent is a process that was stopped, or a host or link that is down.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

LONGEST = 64 * 1024
"""Bytes of a message; who sends more is cut off."""


@dataclass(slots=True)
class _Rank:
    """What is known of one rank. `heard` is the time of its last sign of life, `entered` that of its last section.

    `reached`: the sections that it entered, and whether it waits in a collective. Of two ranks in one section the one
    that does not wait is behind.
    """

    host: str
    pid: int
    heard: float
    entered: float
    reached: tuple[int, bool] = (-1, False)
    section: str = "start"
    stack: str = ""
    bye: bool = False

    def describe(self, rank: int, world: int) -> str:
        return f"rank {rank} of {world} on {self.host} (pid {self.pid})"


@dataclass(slots=True)
class _Guest:
    """A connection: the bytes of a message that is not whole, and the rank once it said hello."""

    waiting: bytes = b""
    rank: int | None = None


@dataclass(slots=True)
class Hub:
    """Listens for `world` ranks. A rank that is silent, or behind while another waits, for `limit` seconds is named."""

    listener: socket.socket
    world: int
    token: str
    limit: float
    beat: float
    verdict: dict[str, Any] | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _guests: dict[socket.socket, _Guest] = field(default_factory=dict)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _began: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Begin to listen. `finished` is set when every rank has said bye, or the verdict has been sent."""
        self.listener.setblocking(False)
        self._selector.register(self.listener, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="lmtrain-hub", daemon=True).start()

    def _run(self) -> None:
        next_beat = 0.0
        while True:
            for key, _ in self._selector.select(self.beat / 2):
                if key.fileobj is self.listener:
                    self._welcome()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)
            if self.verdict is None:
                self._judge()
            now = time.monotonic()
            if now >= next_beat:
                self._tell({"kind": "beat"})
                next_beat = now + self.beat
            if len(self._ranks) == self.world and all(one.bye for one in self._ranks.values()):
                self.finished.set()

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            guest, _ = self.listener.accept()
            guest.setblocking(False)
            guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._guests[guest] = _Guest()
            self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        known = self._guests[guest]
        try:
            read = guest.recv(LONGEST)
        except BlockingIOError:
            return None
        except OSError:
            read = b""
        if not read:
            return self._lost(guest)
        *lines, known.waiting = (known.waiting + read).split(b"\n")
        if len(known.waiting) > LONGEST:
            return self._lost(guest)
        for line in lines:
            try:
                message = json.loads(line)
                self._take(known, message)
            except (ValueError, KeyError, TypeError):  # no rank of ours talks like this
                return self._lost(guest)
        return None

    def _take(self, guest: _Guest, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if guest.rank is None:
            rank = int(message["rank"])
            if message["token"] != self.token or not 0 <= rank < self.world or rank in self._ranks:
                raise ValueError("a stranger")
            guest.rank = rank
            self._ranks[rank] = _Rank(str(message["host"]), int(message["pid"]), now, now)
            return
        one = self._ranks[guest.rank]
        one.heard = now
        if message["kind"] == "beat":
            one.reached = int(message["count"]), bool(message["waits"])
            one.section, one.stack = str(message["section"]), str(message["stack"])
            one.entered = now - float(message["seconds"])
        elif message["kind"] == "bye":
            one.bye = True
        elif message["kind"] == "failed":
            one.bye = True
            what = f"{one.describe(guest.rank, self.world)} failed in section {one.section!r}: {message['text']}"
            self._decide(guest.rank, what, code=int(message["code"]))

    def _lost(self, guest: socket.socket) -> None:
        self._selector.unregister(guest)
        rank = self._guests.pop(guest).rank
        guest.close()
        if rank is not None and not self._ranks[rank].bye:
            self._accuse(rank, "ended without a word: it was killed, or left early")

    def _judge(self) -> None:
        """Name a rank that is silent, one that has not come, or one that another one waits for."""
        now = time.monotonic()
        at_work = {rank: one for rank, one in self._ranks.items() if not one.bye}
        for rank, one in sorted(at_work.items(), key=lambda item: item[1].heard):
            silent = now - one.heard
            if silent > self.limit:
                return self._accuse(
                    rank, f"has given no sign of life for {silent:.1f} s: stopped, or its host or link is down"
                )
        if len(self._ranks) < self.world:
            if now - self._began > self.limit:
                absent = sorted(set(range(self.world)) - set(self._ranks))
                self._decide(absent[0], f"rank {absent[0]} of {self.world} has not come in {self.limit:.1f} s")
            return None
        if at_work:
            last, behind = min(at_work.items(), key=lambda item: item[1].reached)
            held = [now - one.entered for one in at_work.values() if one.reached > behind.reached]
            stuck = now - behind.entered
            if held and max(held) > self.limit and stuck > self.limit:
                return self._accuse(last, f"has made no progress for {stuck:.1f} s while others wait for it")
        return None

    def _accuse(self, rank: int, what: str) -> None:
        one = self._ranks[rank]
        stack = f"; the last stack that it showed:\n{one.stack}" if one.stack else ""
        self._decide(rank, f"{one.describe(rank, self.world)} {what}; its section is {one.section!r}{stack}")

    def _decide(self, rank: int, text: str, *, code: int = 5) -> None:
        if self.verdict is None:
            self.verdict = {"kind": "verdict", "rank": rank, "text": text, "code": code}
            self._tell(self.verdict)
            self.finished.set()

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for guest, known in list(self._guests.items()):
            if known.rank is not None:
                with contextlib.suppress(OSError):  # who cannot hear is found by its silence
                    guest.send(line)
