"""Where the ranks' signs of life come together: a process beside rank 0 that finds who is to blame, and tells all.

`python hub.py`, with a listening socket among its files and a JSON line of orders on stdin. The other end is the
keeper.py beside each rank. Messages are JSON lines over TCP: a keeper says hello with the token of the run, then that
it lives, and passes on what its rank shows (where it is, its stack), and in the end bye, or what made it fail.

Two things are judged. A connection that closes without a last word: that rank has ended. And a rank that has waited in
one collective for longer than the limit: somebody does not come. Silence alone, or slowness alone, is no offence: so
no run is ended here that could have gone on, as long as its collectives do not wait longer than that.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

LONGEST = 64 * 1024
"""Bytes of a message; who sends more is cut off."""
LONGEST_HELLO = 4 * 1024
"""The same before the token of the run was shown."""
LINGER = 5.0
"""Seconds after a verdict in which the keepers may take it, also those that have not come yet."""


@dataclass(slots=True)
class Rank:
    """What is known of one rank: `heard` is when its keeper last spoke, `shown` when the rank itself did.

    moves, waits: how far it is, and whether it waits there for the others; `waited` is for how many seconds.
    """

    host: str
    pid: int
    heard: float
    shown: float
    moves: int = -1
    waits: bool = False
    waited: float = 0.0
    begun: bool = False
    section: str = "start"
    stack: str = ""
    bye: bool = False

    @property
    def reached(self) -> tuple[int, bool]:
        """Of two ranks at one place the one that does not wait there is behind."""
        return self.moves, self.waits


@dataclass(slots=True)
class _Guest:
    """A connection: the bytes of a message that is not whole, and the rank once it said hello."""

    waiting: bytes = b""
    rank: int | None = None

    @property
    def longest(self) -> int:
        """Bytes that its next message may have."""
        return LONGEST_HELLO if self.rank is None else LONGEST


@dataclass(slots=True)
class Hub:
    """Listens for `world` ranks, until they have all left. Who keeps another one waiting for `limit` seconds is named.

    patience: the limit, if larger, until the first step is done. All in seconds.
    """

    listener: socket.socket
    world: int
    token: str
    limit: float
    patience: float
    beat: float
    verdict: dict[str, Any] | None = None
    _ranks: dict[int, Rank] = field(default_factory=dict)
    _guests: dict[socket.socket, _Guest] = field(default_factory=dict)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _until: float | None = None
    _due: float | None = None  # since when somebody has waited for too long

    def serve(self) -> None:
        """Until all have left; or, after a verdict, until it has been told."""
        self.listener.setblocking(False)
        self._selector.register(self.listener, selectors.EVENT_READ)
        starter, next_look, next_beat = os.getppid(), 0.0, 0.0
        while not self._done(alone=os.getppid() != starter):
            for key, _ in self._selector.select(self.beat / 4):
                if key.fileobj is self.listener:
                    self._welcome()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)
            now = time.monotonic()
            if now >= next_look and self.verdict is None:
                self._judge(now)
                next_look = now + self.beat / 4
            if now >= next_beat:
                self._tell({"kind": "beat"})
                next_beat = now + self.beat

    def _done(self, *, alone: bool) -> bool:
        all_came = len(self._ranks) == self.world
        if self._until is not None:
            return (all_came and not self._guests) or time.monotonic() > self._until
        if all_came and all(one.bye for one in self._ranks.values()):
            return True
        return alone and not self._guests

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
        for line in lines:
            try:
                if len(line) > known.longest:
                    raise ValueError("too long")
                self._take(known, json.loads(line))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # it is no keeper of ours
                return self._lost(guest)
        if len(known.waiting) > known.longest:
            return self._lost(guest)
        return None

    def _take(self, guest: _Guest, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if guest.rank is None:
            if message["token"] != self.token:
                raise ValueError("a stranger")
            rank = int(message["rank"])
            if not 0 <= rank < self.world or rank in self._ranks:
                raise ValueError("no rank that is awaited")
            self._ranks[rank] = Rank(str(message["host"]), int(message["pid"]), now, now)
            guest.rank = rank
            if self.verdict is not None:
                self._tell(self.verdict)
            return
        one = self._ranks[guest.rank]
        one.heard = now
        if message["kind"] == "beat":
            one.shown = now
            one.moves, one.waits, one.begun = int(message["moves"]), bool(message["waits"]), bool(message["begun"])
            one.waited = float(message["seconds"]) if one.waits else 0.0
            one.section, one.stack = str(message["section"]), str(message["stack"])
        elif message["kind"] == "bye":
            one.bye = True
        elif message["kind"] == "failed":
            one.bye = True
            what = f"{self._name(guest.rank)} failed in section {one.section!r}: {message['text']}"
            self._decide(guest.rank, what, code=int(message["code"]))

    def _lost(self, guest: socket.socket) -> None:
        self._selector.unregister(guest)
        rank = self._guests.pop(guest).rank
        guest.close()
        if rank is not None and not self._ranks[rank].bye:
            self._accuse(rank, "ended without a word: it was killed, or left early")

    def _judge(self, now: float) -> None:
        """When somebody has waited for too long, name the rank that it waits for."""
        begun = any(one.begun for one in self._ranks.values())  # nobody ends the first step without all the others
        limit = self.limit if begun else max(self.limit, self.patience)
        waiting = {rank: one for rank, one in self._ranks.items() if not one.bye and one.waited > limit}
        if not waiting:
            self._due = None
            return None
        if self._due is None:
            self._due = now
        longest = f"others have waited for it for {max(one.waited for one in waiting.values()):.1f} s"
        if absent := sorted(set(range(self.world)) - set(self._ranks)):
            return self._decide(absent[0], f"rank {absent[0]} of {self.world} has not come; {longest}")
        if left := [rank for rank, one in self._ranks.items() if one.bye]:
            return self._accuse(left[0], f"has left; {longest}")
        away = [one for one in self._ranks.values() if one.host != self._ranks[0].host]
        if len({one.host for one in away}) > 1 and all(now - one.heard > self._quiet for one in away):
            return self._accuse(0, f"hears nothing from any other host: its link is down; {longest}")
        if (last := self._suspect(now, waiting)) is not None:
            one = self._ranks[last]
            if one.shown >= self._due + self.beat:  # not a sign that was under way when it was stopped
                return self._accuse(last, f"makes no progress; {longest}")
            if now - one.shown <= self._quiet:
                return None  # its next sign of life, or none, will tell which of the two it is
            silent = f"has given no sign of life for {now - min(one.heard, one.shown):.1f} s"
            down = now - one.heard > self._quiet
            what = (
                f"does not come; its host {silent}: it, or its link, is down" if down else f"{silent}: it was stopped"
            )
            return self._accuse(last, f"{what}; {longest}")
        if len(waiting) == self.world:
            shortest = min(one.waited for one in waiting.values())
            every = f"every rank of {self.world} has waited for the others for {shortest:.1f} s"
            self._decide(-1, f"{every} in section {self._ranks[0].section!r}: the network between them has failed")
        return None

    @property
    def _quiet(self) -> float:
        """Seconds of silence that mean something when another rank has waited for the whole limit."""
        return self.limit / 2

    def _suspect(self, now: float, waiting: dict[int, Rank]) -> int | None:
        """The rank that those who wait wait for, as far as can be told."""
        furthest = max(one.reached for one in waiting.values())
        behind = [rank for rank, one in self._ranks.items() if one.reached < furthest]
        silent = [rank for rank, one in self._ranks.items() if now - one.shown > self._quiet]
        for found in (
            [rank for rank in silent if rank in behind],
            [rank for rank in behind if not self._ranks[rank].waits],
            silent,
            behind,
        ):
            if found:
                return min(found, key=lambda rank: (self._ranks[rank].reached, self._ranks[rank].shown))
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.world} on {self._ranks[rank].host} (pid {self._ranks[rank].pid})"

    def _accuse(self, rank: int, what: str) -> None:
        one = self._ranks[rank]
        stack = f"; the last stack that it showed:\n{one.stack}" if one.stack else ""
        self._decide(rank, f"{self._name(rank)} {what}; its section is {one.section!r}{stack}")

    def _decide(self, rank: int, text: str, *, code: int = 5) -> None:
        if self.verdict is None:
            self.verdict = {"kind": "verdict", "rank": rank, "text": text, "code": code}
            self._until = time.monotonic() + LINGER
            self._tell(self.verdict)

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for guest, known in list(self._guests.items()):
            if known.rank is not None:
                with contextlib.suppress(OSError):  # who cannot hear is found by its silence
                    guest.send(line)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the ranks, which may want to save
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection a rank
    orders = json.loads(sys.stdin.readline())
    Hub(socket.socket(fileno=orders.pop("listener")), **orders).serve()
