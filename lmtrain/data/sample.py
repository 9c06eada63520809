"""Cutting documents into chunks, and the bounded sample of chunks that a tokenizer is trained on.

The sample is a function of the documents' content alone: not of their order, nor of how many processes read them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

CHUNK_LEAST = 1024
CHUNK_MOST = 4096

# SentencePiece writes a space as U+2581, skips sentences with U+2585 (its mark of unknown pieces), cuts at TAB, takes
# NUL for a fault and drops line breaks at a sentence's end. None of them is part of a piece: they are byte symbols.
_SEPARATORS = re.compile("[\n\x00\t\u2581\u2585\udc80-\udcff]+")
# The unigram trainer's suffix array takes time proportional to the length of whatever is repeated: 2 MB of spaces in
# lines of 4,096 took seven minutes. Lines are cut before a space where there is one, which no piece crosses.
_LINE = re.compile(r".{1,256}(?= |$)|.{1,256}", re.DOTALL)


def chunks(text: str) -> Iterator[str]:
    """Cut text after a line break, else before a space, else anywhere, into 1,024 .. 4,096 characters each.

    SentencePiece adds the scores of a whole sentence in float32 and its BPE keeps a heap of a whole sentence, so that
    on megabytes the one loses digits and the other time. No piece holds a line break, nor a space after a letter, so
    the cuts fall between pieces anyway (but for runs of spaces, and for 4,096 characters without any).
    """
    start = 0
    while len(text) - start > CHUNK_MOST:
        stop = text.find("\n", start + CHUNK_LEAST - 1, start + CHUNK_MOST) + 1
        if stop == 0:
            stop = text.rfind(" ", start + CHUNK_LEAST, start + CHUNK_MOST)
        if stop == -1:
            stop = start + CHUNK_MOST
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


class Sample:
    """The chunks of smallest hash whose bytes together stay within a budget; all of them where they fit.

    Memory is bounded by about twice the budget.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: list[tuple[bytes, str, int]] = []
        self._size = 0
        self._cutoff: bytes | None = None  # chunks of this hash and above do not fit
        self.documents = 0
        self.bytes = 0

    def add(self, raw: bytes) -> None:
        """One document more."""
        self.documents += 1
        self.bytes += len(raw)
        for chunk in chunks(raw.decode("utf-8", "surrogateescape")):
            encoded = chunk.encode("utf-8", "surrogateescape")
            priority = hashlib.blake2b(encoded, digest_size=16).digest()
            if self._cutoff is None or priority < self._cutoff:
                self._kept.append((priority, chunk, len(encoded)))
                self._size += len(encoded)
        if self._size > 2 * self._budget:
            self._cut()

    def _cut(self) -> None:
        self._kept.sort(key=lambda item: item[0])
        total = 0
        for index, (priority, _, size) in enumerate(self._kept):
            total += size
            if total > self._budget:
                # Chunks equal to the first that does not fit are left out with it, wherever they stand.
                keep = index
                while keep and self._kept[keep - 1][0] == priority:
                    keep -= 1
                del self._kept[keep:]
                self._cutoff = priority
                break
        self._size = sum(size for _, _, size in self._kept)

    def lines(self) -> tuple[list[str], int]:
        """(lines of at most 256 characters, sorted, without line breaks; raw bytes of the sampled chunks)."""
        if self._size > self._budget:
            self._cut()
        out = [line for _, chunk, _ in self._kept for text in _SEPARATORS.split(chunk) for line in _LINE.findall(text)]
        return sorted(out), self._size
