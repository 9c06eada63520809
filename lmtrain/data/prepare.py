"""From a source to a prepared corpus: `prepare`. Restartable, and the same files for any number of processes.
Sources of records (images, tables) go another, shorter way: records.py.

In `<out>.partial`, which one preparation at a time holds by flock:
  read       the source once, in this process: blocks of raw documents (blocks.py)
  survey     hash and count every document, resolve the split, gather the held-out 13-grams
  leakage    look for them in the training documents; decide what is dropped
  tokenizer  train it on what is left of the train split, or take an existing one; all decisions go to plan.json
  tokens     write block after block (writer.py)
then index and manifest, and the folder is renamed to `<out>`. Survey, leakage and tokens run in worker processes. What
was killed goes on where it was: the source is read again and compared, the plan and the finished blocks are kept.

Memory: about 8 * block_bytes a process, 16 bytes a held-out 13-gram, 60 bytes a document; a document larger than a
block is a block of its own. Disk besides the corpus: the raw text, compressed, until its tokens are written.

Documents without a byte are left out. Words are `len(raw.split())`: maximal runs of bytes other than ASCII white space.
`words_eos`, the count of PTB and WikiText, adds one `<eos>` a line: words + line feeds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lmtrain.config import Config
from lmtrain.data import blocks, stages
from lmtrain.data.blocks import Progress, RawBlock, Workers, silent, worker_count
from lmtrain.data.known import KINDS as KNOWN
from lmtrain.data.known import KnownSource
from lmtrain.data.layout import MANIFEST
from lmtrain.data.plan import Plan, Planner, digest, planned_source
from lmtrain.data.record_sources import KINDS as RECORDS
from lmtrain.data.record_sources import RecordSource
from lmtrain.data.records import check_config, prepare_records
from lmtrain.data.sources import SourceConfig, documents
from lmtrain.data.splits import NAMES, SplitConfig
from lmtrain.data.tokenizer import TokenizerConfig
from lmtrain.data.workplace import Workplace, clear, friendly
from lmtrain.data.writer import finish, finished_block
from lmtrain.errors import ConfigError, CorpusError

__all__ = ["PrepareConfig", "Prepared", "Progress", "SplitConfig", "prepare", "train_tokenizer"]


class PrepareConfig(Config):
    """What a corpus is made of and how. All of it is part of the corpus; how many processes make it is not."""

    source: SourceConfig | RecordSource | KnownSource = Field(
        SourceConfig(), description="where the documents (text) or records (images, tables) come from"
    )
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="which symbols they are written in")
    split: SplitConfig = Field(SplitConfig(), description="what is held out")
    block_bytes: int = Field(64 << 20, ge=1, description="raw bytes of a block, the unit of work and of a token file")
    leakage: bool = Field(True, description="look for held-out 13-grams in the training documents")
    drop: Literal["none", "duplicates", "leakage", "both"] = Field(
        "none",
        description="leave out of train: duplicates (documents that came before, or that are held out), documents that "
        "share 13-grams with held-out text, or both",
    )
    drop_share: float = Field(
        0.0, ge=0, lt=1, description="leakage: drop documents with more than this share of their 13-grams held out"
    )

    @field_validator("source", mode="wrap")
    @classmethod
    def _by_kind(cls, tree: Any, handler: Any) -> Any:
        if not isinstance(tree, Mapping):
            return handler(tree)
        kind = tree.get("kind")
        return (RecordSource if kind in RECORDS else KnownSource if kind in KNOWN else SourceConfig).model_validate(
            tree
        )

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained on what this split trains on."""
        return (
            not isinstance(self.source, RecordSource | KnownSource)
            and self.tokenizer.path is None
            and self.tokenizer.kind != "bytes"
        )

    @model_validator(mode="after")
    def _agree(self) -> PrepareConfig:
        if isinstance(self.source, RecordSource | KnownSource):
            check_config(self)
        if not self.leakage and self.drop in ("leakage", "both"):
            raise ValueError(f"drop = {self.drop} needs leakage = true")
        if self.drop_share and self.drop not in ("leakage", "both"):
            raise ValueError(f"drop_share = {self.drop_share:g} belongs to drop = leakage or both, not {self.drop}")
        return self


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` made, or found already made (`reused`)."""

    path: Path
    fingerprint: str
    reused: bool
    manifest: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        keys = ("counts", "words_eos", "tokenizer", "split", "duplicates", "leakage", "drop")
        facts = {key: self.manifest.get(key) for key in keys}
        facts |= {
            key: self.manifest[key] for key in ("kind", "alphabet", "record", "grid", "labels") if key in self.manifest
        }
        return {"path": str(self.path), "fingerprint": self.fingerprint, "reused": self.reused, **facts}

    def describe(self) -> str:
        """For people: a line a fact."""
        manifest = self.manifest
        lines = [f"{self.path} {'is prepared already' if self.reused else 'prepared'} ({self.fingerprint[:12]})"]
        names = [name for name in NAMES if name in manifest["counts"]]
        for name in names:
            count = manifest["counts"][name]
            what = f"documents, {count['symbols']:,} symbols, {count['words']:,} words, {count['bytes']:,} bytes"
            lines.append(f"  {name}: {count['documents']:,} {'records' if 'record' in manifest else what}")
        if "record" in manifest:
            shape = "x".join(map(str, manifest["grid"] or [manifest["record"]]))
            values = f"{manifest['alphabet']} levels" if manifest["alphabet"] else "real numbers"
            lines.append(f"  a record: {manifest['kind']} {shape} of {values}, {manifest['labels'] or 'no'} classes")
        same = manifest["duplicates"]
        inside = ", ".join(f"{same['within'][name]} in {name}" for name in names)
        across = ", ".join(f"{count} in {pair}" for pair, count in same["across"].items())
        lines.append(f"  exact duplicates: {inside}; {across}")
        if leak := manifest["leakage"]:
            words = f"{leak['ngram']}-gram"
            for name in names[1:]:
                found = leak["splits"][name]
                lines.append(
                    f"  leakage: {found['documents_affected']} of {found['documents']} documents of {name} share a "
                    f"{words} with train, and {100 * found['share']:.3g} % of its {words}s are there"
                )
        if manifest["drop"]["kind"] != "none":
            dropped = manifest["drop"]
            lines.append(f"  dropped from train: {dropped['duplicates']} duplicates, {dropped['leakage']} leaking")
        return "\n".join(lines)


def prepare(
    config: PrepareConfig,
    out: Path | str,
    *,
    processes: int = 1,
    progress: Progress | None = None,
    force: bool = False,
) -> Prepared:
    """Make the corpus `out` as `config` says, or leave it when it was made so.

    processes: worker processes (0 = one a core). They are spawned: a script that calls this with more than one must
        guard its main part by `if __name__ == "__main__"`.
    progress: called as progress(stage, raw bytes done, raw bytes in all, or None while that is not known).
    force: make it anew and replace a prepared corpus that is there, whatever it was made of.
    Raises CorpusError (source, disk, another preparation at work, a corpus made otherwise), ConfigError,
    TokenizerError.
    """
    out = Path(out)
    processes = worker_count(processes)
    place = Workplace(out, config.model_dump(mode="json"))
    with friendly(out):
        if not force and place.is_made():
            return report(out, reused=True)
        with place.locked(force=force):
            if not force and place.is_made():  # by another process, meanwhile
                place.abandon()
                return report(out, reused=True)
            if not place.is_complete() and isinstance(config.source, RecordSource | KnownSource):
                prepare_records(config, place.partial, progress or silent)
            elif not place.is_complete():
                with Workers(processes, lock=place.lock, progress=progress or silent) as workers:
                    _prepare(config, place.partial, workers)
            place.publish()
    return report(out, reused=False)


def train_tokenizer(config: PrepareConfig, out: Path | str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train the tokenizer that `prepare` would train, and save it in `out`; returns its recipe.

    It sees the train split alone, without what would be dropped. Raises as `prepare` does.
    """
    if isinstance(config.source, RecordSource | KnownSource):
        raise ConfigError(f"prepare.source.kind = {config.source.kind} gives records, which need no tokenizer")
    if config.tokenizer.path is not None:
        raise ConfigError(f"prepare.tokenizer.path = {config.tokenizer.path} is trained already; leave it out to train")
    out = Path(out)
    with friendly(out), Workers(1, progress=progress or silent) as workers:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
            found = read_source(config, Path(folder), workers.progress)
            tokenizer = Planner(config, Path(folder), found, workers).make().tokenizer
        tokenizer.save(out)
    return dict(tokenizer.recipe)


def report(path: Path, *, reused: bool) -> Prepared:
    """What is prepared in `path`."""
    from lmtrain.data.corpus import open_corpus  # needs torch, which the processes that prepare start without

    corpus = open_corpus(path)
    return Prepared(path, corpus.fingerprint, reused, dict(corpus.manifest))


def _prepare(config: PrepareConfig, folder: Path, workers: Workers) -> None:
    """All stages, in a folder that is held."""
    try:
        found = read_source(config, folder, workers.progress)
        planner = Planner(config, folder, found, workers)
        plan = planner.saved() or planner.make()
        threads = workers.processes if len(found) == 1 else 1  # a single block has the machine for itself
        tasks = [(folder, block, plan.division, plan.tokenizer.sha256, threads) for block in found]
        written = dict(workers.map("tokens", stages.encode, tasks, found))
        write_manifest(config, folder, found, plan, [written[index] for index in range(len(found))])
    finally:
        stages.forget()


def read_source(
    config: PrepareConfig, folder: Path, progress: Progress, *, part: tuple[int, int] = (0, 1), keep_raw: bool = False
) -> list[RawBlock]:
    """Cut the source into blocks and keep them. If an earlier attempt read something else, nothing of it is kept.

    part: (i, n): describe all blocks, keep those whose number is i modulo n. keep_raw: also those that are finished.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        if (done + size) >> 20 != done >> 20:
            progress("read", done + size, None)
        done += size

    out: list[RawBlock] = []
    start = 0
    assert isinstance(config.source, SourceConfig)
    for raw, groups in blocks.cut(documents(config.source), config.block_bytes, read=count):
        block = blocks.describe(len(out), start, raw, groups)
        if block.number % part[1] == part[0]:
            before = blocks.kept(folder, block.number)
            if before is not None and before != block:
                break
            is_raw = before is not None and blocks.raw_path(folder, block.number).exists()
            if not is_raw and (keep_raw or before is None or not finished_block(folder, block.number)):
                blocks.keep(folder, block, raw, groups)
        out.append(block)
        start += block.bytes
    more = range(len(out), len(out) + part[1])  # one of these numbers is the part's
    if any(blocks.kept(folder, number) is not None for number in more) or (
        planned_source(folder) not in (None, digest(out))
    ):
        clear(folder)
        return read_source(config, folder, progress, part=part, keep_raw=keep_raw)
    if not out:
        raise CorpusError(f"the source {config.source.kind} gave no text; there is nothing to prepare")
    progress("read", done, done)
    return out


def write_manifest(
    config: PrepareConfig, folder: Path, found: list[RawBlock], plan: Plan, written: list[dict[str, Any]]
) -> None:
    """Write index and manifest."""
    tokenizer = plan.tokenizer
    header = {
        "kind": "text",
        "alphabet": tokenizer.vocab,
        "bos": tokenizer.end,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "file": stages.TOKENIZER,
            "saw": plan.saw,
        },
        "split": plan.division.json(),
        "source": {"kind": config.source.kind, "sha256": digest(found)},
        "block_bytes": config.block_bytes,
        "words_eos": {name: count["words_eos"] for name, count in plan.counts.items()},
        **plan.reports,
    }
    dropped = [f"{block}:{row}" for block, row in plan.dropped]
    finish(folder, header=header, blocks=written, dropped=dropped, symbol_bytes_V=tokenizer.symbol_bytes())
    counts = json.loads((folder / MANIFEST).read_bytes())["counts"]
    for name, count in plan.counts.items():
        agree = all(counts[name][key] == count[key] for key in ("documents", "bytes", "words"))
        assert agree, f"split {name} was surveyed as {count}, but written as {counts[name]}"
