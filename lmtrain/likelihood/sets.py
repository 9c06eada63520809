"""What a run is asked about: a split of a prepared corpus, a text file, images, an array of numbers, made-up data.

Shapes in names: N units, D symbols of a record, H, W, C the grid of an image.

A set is written as a path, or as `own` (the run's own corpus); a split may follow after a colon: `own:test`,
`corpora/mnist:test`. Text is a document a file; with `piece` it is cut into pieces of so many bytes, each a document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lmtrain.corpora import alike, require_same_symbols, told_classes
from lmtrain.data import images, pictures
from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.data.memory import MemoryCorpus
from lmtrain.data.memory_records import MemoryRecords
from lmtrain.data.remote import is_url
from lmtrain.data.transforms import noise
from lmtrain.data.view import View
from lmtrain.errors import ConfigError, CorpusError, InputError
from lmtrain.inference.cut import smallest
from lmtrain.protocol import Corpus, Split
from lmtrain.use import Opened

OWN = "own"
MADE = ("@permuted", "@constant", "@noise", "@shuffled")
"""Sets that are made of another one: pixels in random order, one grey, uniform symbols; words in random order."""


@dataclass(frozen=True)
class Set:
    """name: as it was written. documents_N: int64, ascending: those that are meant, a fixed subset by hash; None = all.

    content: what tells sets apart whatever the tokenizer: of files their bytes, of a prepared corpus its fingerprint.
    """

    name: str
    corpus: Corpus
    split: Split
    content: str
    documents_N: np.ndarray | None = None

    @property
    def numbers_N(self) -> np.ndarray:
        """int64 [N]: the documents that are meant."""
        return np.arange(self.split.documents, dtype=np.int64) if self.documents_N is None else self.documents_N

    def read(self, number: int) -> np.ndarray:
        """The symbols of one document."""
        if (size := self.corpus.record) is not None:
            return self.split.read(number * size, (number + 1) * size)
        return self.split.read(int(self._end_D[number - 1]) if number else 0, int(self._end_D[number]))

    @cached_property
    def _end_D(self) -> np.ndarray:
        return self.split.document_ends()

    def raw(self, number: int) -> bytes:
        """The bytes of a document of text, without its end symbol."""
        symbols = self.read(number).tolist()
        return self.corpus.decode(symbols[:-1] if symbols and symbols[-1] == self.corpus.bos else symbols)


def open_set(opened: Opened, given: str, *, split: str, piece: int | None = None, limit: int | None = None) -> Set:
    """The set that `given` names. limit: at most so many documents of it, a fixed subset by hash.

    Raises InputError, ConfigError or CorpusError in one line: no such file, no image, symbols of another kind.
    """
    found = _open(opened, given, split=split)
    if piece is not None:
        if opened.corpus.record is not None:
            raise ConfigError(f"--piece {piece} cuts text, and the run reads {opened.corpus.unit}s; leave it out")
        found = in_pieces(found, opened, piece)
    if limit is not None and limit < found.split.documents:
        return Set(
            found.name, found.corpus, found.split, found.content, np.sort(smallest(found.split.documents, limit))
        )
    return found


def _open(opened: Opened, given: str, *, split: str) -> Set:
    own = opened.corpus
    where, part = given, split
    if not Path(given).exists() and not is_url(given):
        head, colon, tail = given.rpartition(":")
        if colon and tail and (head == OWN or Path(head).exists()):
            where, part = head, tail
    path = Path(where)
    if where == OWN and not path.exists():
        return Set(given, own, own.split(part), own.fingerprint)
    if is_url(where) or (path / "manifest.json").exists():
        theirs = open_corpus(where)
        require_same_symbols(theirs, raw_corpus(own), what="the set")
        corpus = alike(theirs, own)
        return Set(given, corpus, corpus.split(part), corpus.fingerprint)
    if not path.exists():
        raise InputError(f"{given}: no such file or folder; wanted a corpus, a file, a folder of images or {OWN}:SPLIT")
    if own.record is None:
        return _texts(opened, given, path)
    if told_classes(opened.config):
        raise InputError(f"{given}: the model is told classes, and files have none; give a prepared corpus")
    return records_set(opened, given, _records(path, raw_corpus(own)))


def raw_corpus(own: Corpus) -> Corpus:
    """The corpus below the run's view."""
    return own.corpus if isinstance(own, View) else own


def records_set(opened: Opened, name: str, x_ND: np.ndarray) -> Set:
    """Records as they would be prepared, seen through the run's view."""
    held = MemoryRecords(raw_corpus(opened.corpus), x_ND, name=name)
    corpus = alike(held, opened.corpus)
    return Set(name, corpus, corpus.split("data"), held.fingerprint)


def text_set(opened: Opened, name: str, documents: list[bytes]) -> Set:
    """Documents of text under the run's tokenizer; empty ones are left out."""
    own = raw_corpus(opened.corpus)
    if not isinstance(own, PreparedCorpus) or own.record is not None:
        raise InputError(f"{name}: the run reads {own.unit}s, not text")
    tokenizer = own.tokenizer
    held = MemoryCorpus(tokenizer, [raw for raw in documents if raw], name=name)
    digest = hashlib.sha256()
    for raw in documents:
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return Set(name, held, held.split(), digest.hexdigest())


def _texts(opened: Opened, given: str, path: Path) -> Set:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        return text_set(opened, given, [file.read_bytes() for file in files])
    except OSError as error:
        raise InputError(f"{error.filename or given} cannot be read: {error.strerror}") from None


def in_pieces(whole: Set, opened: Opened, piece: int) -> Set:
    """Every document cut into pieces of `piece` bytes; a shorter rest is left out, unless it is the whole document."""
    pieces: list[bytes] = []
    for number in whole.numbers_N.tolist():
        raw = whole.raw(number)
        pieces += [raw[at : at + piece] for at in range(0, max(len(raw) - piece, 0) + 1, piece)]
    return text_set(opened, whole.name, pieces)


def _records(path: Path, like: Corpus) -> np.ndarray:
    """[N, D] of a folder of images, an image, or an npy file."""
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} cannot be read as an array: {error}") from None
        if not array.size:
            raise InputError(f"{path} is an array of shape {array.shape}: there is nothing in it to be scored")
        return np.asarray(array).reshape(len(array), -1) if array.ndim > 1 else np.asarray(array)
    if like.grid is None or not like.alphabet:
        raise InputError(f"{path}: the run reads {like.unit}s of {like.record} numbers; give an .npy file of them")
    height, width, channels = like.grid
    files = images.below(path) if path.is_dir() else [(path, None)]
    held = []
    for file, _ in files:
        try:
            pixels = images.decode(file.read_bytes(), channels=channels, where=str(file))
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from None
        except CorpusError as error:
            raise InputError(f"{error}; wanted images of {width} x {height} pixels, or an .npy file") from None
        if pixels.shape[:2] != (height, width):
            raise InputError(
                f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels, the run reads {width} x {height}; scale it"
            )
        held.append(pixels)
    return pictures.symbols(np.stack(held), alphabet=like.alphabet)


# ---- sets made of others ---------------------------------------------------------------------------------------------


def made_of(kind: str, source: Set, opened: Opened, *, seed: int) -> Set:
    """A set of as many units as `source` has, made of it: one of `MADE`. Each unit is a function of (seed, its number).

    @permuted: its symbols in random order. @constant: one symbol throughout, drawn uniformly. @noise: uniform symbols.
    @shuffled: the words of a text (what white space parts) in random order, joined by single spaces.
    Raises InputError for a kind that the run's units cannot have.
    """
    own = raw_corpus(opened.corpus)
    if kind not in MADE:
        raise InputError(f"{kind!r} is none of {', '.join(MADE)}")
    if own.record is None:
        if kind != "@shuffled":
            raise InputError(f"{kind} is made of records, and the run reads text; @shuffled is for text")
        return text_set(opened, kind, [_words(source.raw(n), seed, n) for n in source.numbers_N.tolist()])
    if not opened.corpus.alphabet:
        raise InputError(f"{kind} is made of symbols, and the run reads real numbers")
    if told_classes(opened.config):
        raise InputError(f"{kind}: the model is told classes, and made-up records have none")
    if kind == "@shuffled":
        raise InputError("@shuffled is for text; of records, @permuted")
    x_ND = np.stack([_altered(source, kind, seed, number) for number in source.numbers_N.tolist()])
    corpus = MemoryRecords(source.corpus, x_ND, name=kind)
    return Set(kind, corpus, corpus.split("data"), corpus.fingerprint)


def _altered(source: Set, kind: str, seed: int, number: int) -> np.ndarray:
    """One record as the model reads it, changed."""
    x_D = np.asarray(source.read(number), np.int64)
    drawn_D = noise(kind, seed, np.array([number]), len(x_D))[0]
    if kind == "@permuted":
        return x_D[np.argsort(drawn_D, kind="stable")]
    alphabet = source.corpus.alphabet
    symbol_D = np.floor(drawn_D * alphabet).astype(np.int64)
    return symbol_D if kind == "@noise" else np.full_like(x_D, symbol_D[0])


def _words(raw: bytes, seed: int, number: int) -> bytes:
    words = raw.split()
    order = np.argsort(noise("@shuffled", seed, np.array([number]), max(len(words), 1))[0], kind="stable")
    return b" ".join(words[i] for i in order.tolist()) if words else raw
