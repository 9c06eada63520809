"""A small process beside a rank, which speaks for it to the hub, and kills it when it cannot even hear a verdict.

`python keeper.py`, with a socket to the rank as stdin. It has no part in what the rank computes, so it lives on when
the rank is stopped (SIGSTOP, a device that hangs), and it is gone at once when the rank is. Lines in JSON: orders
first, then what goes to the hub; and to the rank a verdict, when there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

GRACE = 2.0
"""Seconds that a rank has to leave when it knows the verdict."""
PARTING = 5.0
"""Seconds that the hub has to take a rank's last word."""
LONGEST = 64 * 1024
"""Bytes read at once, and bytes that may wait to be sent: while a link is down, signs of life are dropped beyond it."""


class Keeper:
    """Between one rank and the hub. `orders`: where, hello, limit, patience, beat; see lifeline.py."""

    def __init__(self, rank: socket.socket, orders: dict[str, Any]) -> None:
        self._rank, self._hello = rank, orders["hello"]
        self._where: tuple[str, int] = tuple(orders["where"])
        self._limit, self._patience, self._beat = orders["limit"], orders["patience"], orders["beat"]
        self._hub: socket.socket | None = None
        self._unsent = b""
        self._heard = time.monotonic()  # the hub
        self._waited, self._begun, self._over = 0.0, False, False  # over: the rank has said its last word
        self._condemned: tuple[float, str] | None = None

    def keep(self) -> None:
        """Until the rank ends, or has to be killed."""
        parent, waiting, shown = os.getppid(), {self._rank: b""}, 0.0
        self._call()
        while os.getppid() == parent:
            ends = [self._rank] if self._hub is None else [self._rank, self._hub]
            for end in select.select(ends, [], [], self._beat / 4)[0]:
                if (read := _read(end)) is None:
                    continue
                *lines, waiting[end] = (waiting.get(end, b"") + read).split(b"\n")
                (self._from_rank if end is self._rank else self._from_hub)(lines)
                if not read and end is self._rank:
                    self._part()
                    return
                if not read:
                    self._hub = None
                    self._condemn(self._about_first("ended without a word: its host goes down, or was cleaned up"))
            now = time.monotonic()
            if now - shown >= self._beat:
                self._speak(b'{"kind": "alive"}\n')
                shown = now
            self._speak()
            self._judge(now)
            if self._condemned is not None and now > self._condemned[0] + GRACE:
                with contextlib.suppress(OSError):
                    text = f"{self._condemned[1]}; it did not leave by itself and is killed"
                    print(text, file=sys.stderr, flush=True)
                os.kill(parent, signal.SIGKILL)
                return

    def _part(self) -> None:
        """The rank is gone. Its last word has to arrive: a connection closed on unread lines may drop what was sent."""
        if self._hub is None or not self._over:
            return
        with contextlib.suppress(OSError):
            self._hub.settimeout(PARTING)
            self._hub.sendall(self._unsent)
            self._hub.shutdown(socket.SHUT_WR)
            end = time.monotonic() + PARTING
            while self._hub.recv(LONGEST) and time.monotonic() < end:
                pass

    def _from_rank(self, lines: list[bytes]) -> None:
        for line in lines:
            message = json.loads(line)
            if message["kind"] == "beat":
                self._waited = message["seconds"] if message["waits"] else 0.0
                self._begun = message["begun"]
            else:
                self._over = True
            self._speak(line + b"\n")

    def _from_hub(self, lines: list[bytes]) -> None:
        self._heard = time.monotonic()
        for line in lines:
            message = json.loads(line)
            if message["kind"] == "verdict":
                self._condemn(message)

    def _judge(self, now: float) -> None:
        """What the hub would say of a rank, for when it is the hub that is not heard."""
        limit = self._limit if self._begun else max(self._limit, self._patience)
        silent = now - self._heard
        if self._waited > limit and silent > self._limit:
            what = f"does not come; this rank has waited for {self._waited:.1f} s; its host has given no sign of life"
            self._condemn(self._about_first(f"{what} for {silent:.1f} s: it, or the link to it, is down"))

    def _call(self) -> None:
        try:
            self._hub = socket.create_connection(self._where, timeout=max(self._limit, self._patience))
            self._hub.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._hub.setblocking(False)
        except OSError as error:
            self._condemn(self._about_first(f"cannot be reached: {error}"))
        self._heard = time.monotonic()
        self._speak(json.dumps(self._hello).encode() + b"\n")

    def _speak(self, line: bytes = b"") -> None:
        """Send what waits to be sent, as far as it goes now."""
        if len(self._unsent) < LONGEST or self._over:
            self._unsent += line
        if self._hub is not None and self._unsent:
            with contextlib.suppress(OSError):  # full, or gone; the latter is seen when reading
                self._unsent = self._unsent[self._hub.send(self._unsent) :]

    def _about_first(self, what: str) -> dict[str, Any]:
        """A verdict about rank 0, where the hub is that would have given one."""
        text = f"rank 0 of {self._hello['world']} at {self._where[0]} {what}"
        return {"kind": "verdict", "rank": 0, "text": text, "code": 5, "own": True}

    def _condemn(self, verdict: dict[str, Any]) -> None:
        if self._condemned is None and not self._over:
            self._condemned = time.monotonic(), f"lmtrain [rank {self._hello['rank']}]: {verdict['text']}"
            with contextlib.suppress(OSError):
                self._rank.sendall(json.dumps(verdict).encode() + b"\n")


def _read(one: socket.socket) -> bytes | None:
    """What has come; nothing when the other end is closed, None when there was nothing to read after all."""
    try:
        return one.recv(LONGEST)
    except BlockingIOError:
        return None
    except OSError:
        return b""


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the rank, which may want to save
    line = socket.socket(fileno=os.dup(0))
    first = b""
    while not first.endswith(b"\n") and (byte := line.recv(1)):
        first += byte
    if first:
        Keeper(line, json.loads(first)).keep()
