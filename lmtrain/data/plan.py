"""What is decided before a token is written: the split, what is dropped, the tokenizer. Saved as plan.json.

What is found out about the documents on the way (counts, duplicates, leakage) is in the plan as well: the manifest
will report it.

Shapes: D documents of the corpus in the order of blocks and rows, K distinct held-out n-grams.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtrain.data import blocks, duplicates, stages
from lmtrain.data.blocks import RawBlock, Workers
from lmtrain.data.layout import write_file
from lmtrain.data.splits import Division, divide
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokenizer import load as load_tokenizer
from lmtrain.data.tokenizer import train as train_a_tokenizer
from lmtrain.data.workplace import PLAN
from lmtrain.errors import CorpusError, TokenizerError

if TYPE_CHECKING:
    from lmtrain.data.prepare import PrepareConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions. dropped: (block, row) of documents that no split shall have. counts, reports: for the manifest.

    saw: what the tokenizer was trained on, None if on nothing.
    """

    division: Division
    tokenizer: Tokenizer
    saw: dict[str, Any] | None
    dropped: list[tuple[int, int]]
    counts: dict[str, dict[str, int]]
    reports: dict[str, Any]


def digest(found: Sequence[RawBlock]) -> str:
    """sha256 of the source, as cut into blocks."""
    return hashlib.sha256("".join(block.sha256 for block in found).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return value


def planned_source(folder: Path) -> str | None:
    """`digest` of the source that the saved plan is for; None when there is no plan."""
    value = _read(folder)
    return None if value is None else str(value["source"])


@dataclass(frozen=True, slots=True)
class _Documents:
    """The surveys of all blocks, end to end. block_D, row_D: where each document is."""

    hash_D2: np.ndarray
    split_D: np.ndarray
    bytes_D: np.ndarray
    words_D: np.ndarray
    lines_D: np.ndarray
    block_D: np.ndarray
    row_D: np.ndarray

    def counts(self, names: Sequence[str], kept_D: np.ndarray) -> dict[str, dict[str, int]]:
        """What each split has of the documents that are kept."""
        out = {}
        for index, name in enumerate(names):
            mine = (self.split_D == index) & kept_D
            words, lines = int(self.words_D[mine].sum()), int(self.lines_D[mine].sum())
            size = int(self.bytes_D[mine].sum())
            out[name] = {"documents": int(mine.sum()), "bytes": size, "words": words, "words_eos": words + lines}
        return out


class Planner:
    """Makes the plan for the blocks `found` in `folder`, or reads it back.

    division: the split, when it is decided already. text: raw documents of a block, when the folder has not all.
    """

    def __init__(
        self,
        config: PrepareConfig,
        folder: Path,
        found: Sequence[RawBlock],
        workers: Workers,
        *,
        division: Division | None = None,
        text: Callable[[int], list[bytes]] | None = None,
    ) -> None:
        self.config, self.folder, self.found, self.workers = config, folder, found, workers
        self._division = division
        self._text = text or (lambda number: blocks.load(folder, number)[0])

    def saved(self) -> Plan | None:
        """The decisions of an attempt that was killed after it had made them."""
        value = _read(self.folder)
        if value is None:
            return None
        tokenizer = load_tokenizer(self.folder / stages.TOKENIZER, sha256=value["tokenizer"])
        dropped = [(int(block), int(row)) for block, row in value["dropped"]]
        division = Division.from_json(value["division"])
        return Plan(division, tokenizer, value["saw"], dropped, value["counts"], value["reports"])

    def make(self) -> Plan:
        """Decide everything, and save the decisions."""
        drop = self.config.drop
        division = self._division or self.divide()
        known, held_K = self._survey(division)
        everything_D = np.ones(len(known.split_D), np.bool_)
        _check_filled(known.counts(division.names, everything_D))

        same = duplicates.duplicates(known.hash_D2, known.split_D, division.names)
        copies_D = same.drop_D if drop in ("duplicates", "both") else ~everything_D
        leakage, leaking_D = self._leakage(division, known, held_K, copies_D)
        dropped_D = copies_D | leaking_D
        dropped = list(zip(known.block_D[dropped_D].tolist(), known.row_D[dropped_D].tolist(), strict=True))
        counts = known.counts(division.names, ~dropped_D)
        if not counts["train"]["documents"]:
            raise CorpusError(
                f"prepare.drop = {drop} drops all {len(dropped):,} training documents; use another kind of drop or a "
                "larger prepare.drop_share"
            )
        tokenizer, saw = self.tokenizer(division, set(dropped))
        reports = {
            "duplicates": {"within": same.within, "across": same.across},
            "leakage": leakage,
            "drop": {"kind": drop, "duplicates": int(copies_D.sum()), "leakage": int(leaking_D.sum())},
        }
        value = {
            "source": digest(self.found),
            "division": division.json(),
            "tokenizer": tokenizer.sha256,
            "saw": saw,
            "dropped": dropped,
            "counts": counts,
            "reports": reports,
        }
        write_file(self.folder / PLAN, json.dumps(value, sort_keys=True).encode())
        return Plan(division, tokenizer, saw, dropped, counts, reports)

    def divide(self) -> Division:
        """Decide the split."""
        groups: Counter[int] = Counter()
        for block in self.found:
            groups.update({int(group): number for group, number in block.groups.items()})
        total = sum(block.bytes for block in self.found)
        return divide(self.config.split, documents=groups, total_bytes=total, boundary=self._boundary)

    def _boundary(self, at: int) -> int:
        """`at`, or up to three bytes before it: where a UTF-8 character begins, if the text is UTF-8."""
        block = next(block for block in reversed(self.found) if block.start <= at)
        position = block.start
        for raw in self._text(block.number):
            inside = at - position
            if inside < len(raw):
                for back in range(min(4, inside + 1)):
                    if raw[inside - back] & 0xC0 != 0x80:
                        return at - back
                return at
            position += len(raw)
        return at

    def _survey(self, division: Division) -> tuple[_Documents, np.ndarray]:
        """(hashes and counts of all documents, the distinct held-out n-grams)."""
        surveys: list[stages.Survey | None] = [None] * len(self.found)
        held: list[np.ndarray] = []
        tasks = [(self.folder, block, division, self.config.leakage) for block in self.found]
        for index, survey in self.workers.map("survey", stages.survey, tasks, self.found):
            held.append(survey.held_K)
            surveys[index] = replace(survey, held_K=survey.held_K[:0])
        whole = [survey for survey in surveys if survey is not None]
        size = [len(survey.split_D) for survey in whole]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(survey, name) for survey in whole])

        known = _Documents(
            **{name: joined(name) for name in ("hash_D2", "split_D", "bytes_D", "words_D", "lines_D")},
            block_D=np.repeat(np.arange(len(size)), size),
            row_D=np.concatenate([np.arange(number) for number in size]),
        )
        return known, duplicates.merge(held)

    def _leakage(
        self, division: Division, known: _Documents, held_K: np.ndarray, copies_D: np.ndarray
    ) -> tuple[dict[str, Any] | None, np.ndarray]:
        """(report, documents to be dropped for it). Training documents that are dropped as copies are not looked at."""
        config, found = self.config, self.found
        drop_D = np.zeros(len(copies_D), np.bool_)
        if not config.leakage:
            return None, drop_D
        held = write_file(self.folder / stages.HELD_OUT, held_K)["sha256"]
        first = np.searchsorted(known.block_D, np.arange(len(found)))
        copies = [known.row_D[copies_D & (known.block_D == block.number)].tolist() for block in found]
        tasks = [(self.folder, block, division, held, copies[block.number]) for block in found]
        in_train_K = np.zeros(len(held_K), np.bool_)
        sharing = 0
        for index, leak in self.workers.map("leakage", stages.leaks, tasks, found):
            in_train_K[leak.position] = True
            sharing += len(leak.row_R)
            if config.drop in ("leakage", "both"):
                drop_D[first[index] + leak.row_R[leak.shared_R > config.drop_share * leak.total_R]] = True

        in_train = write_file(self.folder / stages.FOUND, in_train_K)["sha256"]
        sums = np.zeros((len(division.names), 3), np.int64)
        again = [(self.folder, block, division, held, in_train) for block in found]
        for _, part in self.workers.map("held-out", stages.affected, again, found):
            sums += np.array(part, np.int64)
        counts = known.counts(division.names, ~copies_D)
        splits: dict[str, Any] = {}
        for name, (affected, ngrams, shared) in list(zip(division.names, sums.tolist(), strict=True))[1:]:
            splits[name] = {
                "documents": counts[name]["documents"],
                "documents_affected": affected,
                "ngrams": ngrams,
                "ngrams_in_train": shared,
                "share": shared / ngrams if ngrams else 0.0,
            }
        train = {"documents": counts["train"]["documents"], "documents_affected": sharing}
        return {"ngram": duplicates.NGRAM, "splits": splits, "train": train}, drop_D

    def tokenizer(self, division: Division, dropped: set[tuple[int, int]]) -> tuple[Tokenizer, dict[str, Any] | None]:
        """(tokenizer, which documents it was trained on; None if on none)."""
        config = self.config.tokenizer
        if config.path is not None:
            tokenizer = load_tokenizer(config.path)
            for name, wanted, given in (
                ("kind", config.kind, tokenizer.kind),
                ("vocab", config.vocab, tokenizer.vocab),
            ):
                if wanted not in (None, given):
                    raise TokenizerError(
                        f"prepare.tokenizer.{name} = {wanted}, but {config.path} has {name} {given}; leave {name} out"
                    )
        else:
            total = sum(block.bytes for block in self.found)
            self.workers.progress("tokenizer", 0, total)
            split = {"kind": division.kind, **division.splits["train"], "dropped": len(dropped)}
            recipe = {"source": self.config.source.kind, "split": split}
            tokenizer = train_a_tokenizer(config, self._training_documents(division, dropped), recipe=recipe)
            self.workers.progress("tokenizer", total, total)
        tokenizer.save(self.folder / stages.TOKENIZER)
        return tokenizer, tokenizer.recipe.get("trained_on")

    def _training_documents(self, division: Division, dropped: set[tuple[int, int]]) -> Iterator[bytes]:
        """What a tokenizer may see: the training documents, without those that are dropped."""
        done, total = 0, sum(block.bytes for block in self.found)
        for block in self.found:
            rows = stages.rows(self.folder, block, division)
            for row in np.flatnonzero(rows.split_D == 0).tolist():
                if (block.number, row) not in dropped:
                    yield rows.raw[row]
            done += block.bytes
            self.workers.progress("tokenizer", min(done, total - 1), total)  # training itself is still to come


def _check_filled(counts: dict[str, dict[str, int]]) -> None:
    for name, count in counts.items():
        if not count["documents"]:
            shown = ", ".join(f"{other} {its['documents']:,}" for other, its in counts.items())
            raise CorpusError(
                f"split {name!r} is empty (documents: {shown}); with so few documents use split.kind = tail, or other "
                "fractions"
            )
