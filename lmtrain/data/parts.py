"""A corpus prepared by several machines: each makes the blocks i modulo n of `<out>`, one puts them together.

Part i of n is the folder `<out>.parts/i-of-n`, made as a corpus is (workplace.py: locked, restartable, renamed when it
is whole). Every part reads the whole source, since where a block begins depends on all that comes before it, but keeps,
surveys and tokenizes its own blocks alone. The tokenizer is fixed beforehand: nobody sees all of the text.

To merge, the folders of all parts are brought together below `<out>.parts`. Duplicates and leakage are then looked for
among all documents, and the manifest is the one that a preparation in one go writes. Every token file is read against
its hash on the way, so a copy that went wrong is found and its part named.

A part holds, beside the files of a corpus (layout.py): part.json (written last: every file, all blocks of the source,
the split), the survey of each block, and the compressed raw text where leakage is to be looked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmtrain.data import blocks, stages
from lmtrain.data.blocks import Progress, RawBlock, Workers, silent, worker_count
from lmtrain.data.layout import MANIFEST, canonical, file_sha256, write_file
from lmtrain.data.plan import Planner, digest, planned_source
from lmtrain.data.prepare import PrepareConfig, Prepared, read_source, report, write_manifest
from lmtrain.data.record_sources import RecordSource
from lmtrain.data.sources import SourceConfig, documents
from lmtrain.data.splits import Division
from lmtrain.data.workplace import PLAN, Workplace, clear, friendly
from lmtrain.data.writer import finished_block
from lmtrain.errors import ConfigError, CorpusError

PART = "part.json"
VERSION = 1
MOST_PARTS = 100_000


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`i/n`; ConfigError for anything but 0 <= i < n."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]) <= MOST_PARTS:
            raise ConfigError(f"--part {text}: wanted i/n with i from 0 to n - 1, such as 0/4, 1/4, 2/4 and 3/4")
        return cls(int(found[1]), int(found[2]))

    def folder(self, out: Path) -> Path:
        """Where this part of the corpus `out` is made."""
        return _together(out) / f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class PreparedPart:
    """What `prepare_part` made, or found already made (`reused`). blocks: of this part; source_blocks: of all."""

    path: Path
    part: Part
    reused: bool
    blocks: int
    source_blocks: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "path": str(self.path), "part": str(self.part)}

    def describe(self) -> str:
        """For people."""
        what = "is prepared already" if self.reused else "prepared"
        return (
            f"{self.path} {what}: {self.blocks} of {self.source_blocks} blocks, {self.bytes:,} bytes; when all "
            f"{self.part.count} parts lie in {self.path.parent}, --merge them"
        )


def prepare_part(
    config: PrepareConfig,
    out: Path | str,
    part: Part,
    *,
    processes: int = 1,
    progress: Progress | None = None,
    force: bool = False,
) -> PreparedPart:
    """Make part `part` of the corpus `out`; arguments and errors as those of `prepare`.

    ConfigError when the tokenizer would have to be trained.
    """
    if isinstance(config.source, RecordSource):
        raise ConfigError(f"--part {part} is for text; records ({config.source.kind}) are prepared in one go")
    if config.tokenizer.path is None and config.tokenizer.kind != "bytes":
        raise ConfigError(
            f"--part {part} wants a tokenizer that is fixed beforehand, since no part sees all of the text; train it "
            "with `lmtrain tokenizer train` and give prepare.tokenizer.path"
        )
    processes = worker_count(processes)
    folder = part.folder(Path(out))
    place = Workplace(folder, config.model_dump(mode="json"), last=PART)
    with friendly(folder):
        if not force and place.is_made():
            return _described(folder, part, reused=True)
        with place.locked(force=force):
            if not place.is_complete():
                with Workers(processes, lock=place.lock, progress=progress or silent) as workers:
                    _make(config, place.partial, part, workers)
            place.publish()
    return _described(folder, part, reused=False)


def _make(config: PrepareConfig, folder: Path, part: Part, workers: Workers) -> None:
    try:
        mine = (part.index, part.count)
        found = read_source(config, folder, workers.progress, part=mine, keep_raw=config.leakage)
        planner = Planner(config, folder, found, workers, text=lambda number: _block(config, number))
        division = planner.divide()
        own = [block for block in found if block.number % part.count == part.index]
        tokenizer = planner.tokenizer(division, set())[0]
        # From here on there is work to lose: another source or other settings are noticed by this file.
        write_file(folder / PLAN, json.dumps({"source": digest(found)}).encode())
        tasks = [(folder, block, division, config.leakage) for block in own]
        for _ in workers.map("survey", stages.keep_survey, tasks, own):
            pass
        threads = workers.processes if len(own) == 1 else 1
        todo = [(folder, block, division, tokenizer.sha256, threads, config.leakage) for block in own]
        for _ in workers.map("tokens", stages.encode, todo, own):
            pass
        names = [path for path in sorted(folder.rglob("*")) if path.is_file() and _belongs(path.name)]
        said = {
            "version": VERSION,
            "part": str(part),
            "source": digest(found),
            "blocks": [asdict(block) for block in found],
            "division": division.json(),
            "tokenizer": tokenizer.sha256,
            "settings": _settings(config),
            "files": {
                str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in names
            },
        }
        write_file(folder / PART, canonical(said))
    finally:
        stages.forget()


def _block(config: PrepareConfig, number: int) -> list[bytes]:
    """The raw documents of a block, from the source itself: it may be another part's."""
    assert isinstance(config.source, SourceConfig)
    for at, (raw, _) in enumerate(blocks.cut(documents(config.source), config.block_bytes, read=lambda size: None)):
        if at == number:
            return raw
    raise CorpusError(f"the source {config.source.kind} became shorter while it was prepared; prepare again")


def _belongs(name: str) -> bool:
    return not name.endswith(".part") and name not in {"lock", "prepare.json", PLAN}


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What all parts and the merge must agree on; paths may differ among machines."""
    return {
        "prepare.split": config.split.model_dump(mode="json"),
        "prepare.block_bytes": config.block_bytes,
        "prepare.leakage": config.leakage,
        "prepare.source.kind": config.source.kind,
    }


def _together(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


def _said(folder: Path) -> dict[str, Any]:
    try:
        data = (folder / PART).read_bytes()
        said: dict[str, Any] = json.loads(data)
        if data == canonical(said) and said["version"] == VERSION:
            return said
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CorpusError(f"{folder / PART} is missing, damaged or of another version; prepare this part again")


def _described(folder: Path, part: Part, *, reused: bool) -> PreparedPart:
    every = [RawBlock(**block) for block in _said(folder)["blocks"]]
    own = [block for block in every if block.number % part.count == part.index]
    return PreparedPart(folder, part, reused, len(own), len(every), sum(block.bytes for block in own))


# ---- merging -------------------------------------------------------------------------------------------------------


def merge(
    config: PrepareConfig,
    out: Path | str,
    *,
    processes: int = 1,
    progress: Progress | None = None,
    force: bool = False,
) -> Prepared:
    """Make the corpus `out` of its parts, and remove them; arguments and errors as those of `prepare`.

    The source is not read and the tokenizer is that of the parts. CorpusError names a part that is missing, that was
    made otherwise than the others, or that is damaged.
    """
    out = Path(out)
    processes = worker_count(processes)
    place = Workplace(out, config.model_dump(mode="json"))
    with friendly(out):
        reused = not force and place.is_made()
        if not reused:
            parts = _parts(config, out)
            with place.locked(force=force):
                if not place.is_complete():
                    with Workers(processes, lock=place.lock, progress=progress or silent) as workers:
                        _merge(config, place.partial, parts, workers)
                place.publish()
        shutil.rmtree(_together(out), ignore_errors=True)
    return report(out, reused=reused)


def _parts(config: PrepareConfig, out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, what its part.json says) of all parts, in order; they belong together and to the config."""
    folder = _together(out)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    counts = sorted({int(found[1]) for name in names if (found := re.fullmatch(r"\d+-of-(\d+)", name))})
    if len(counts) != 1:
        what = "holds parts of " + " and of ".join(map(str, counts)) if counts else "holds no part"
        raise CorpusError(f"{folder} {what}; wanted 0-of-n .. (n-1)-of-n, each made by `lmtrain prepare --part i/n`")
    wanted = [Part(index, counts[0]).folder(out) for index in range(counts[0])]
    missing = [path.name for path in wanted if not (path / PART).exists()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CorpusError(f"{folder} lacks {shown}; finish or copy them, then merge")
    parts = [(path, _said(path)) for path in wanted]
    first, said_first = parts[0]
    for path, said in parts:
        for key in ("source", "blocks", "division", "tokenizer"):
            if said[key] != said_first[key]:
                raise CorpusError(
                    f"{path} and {first} differ in their {key}; prepare all parts of the same source with the same "
                    "tokenizer and split"
                )
        for key, ours in _settings(config).items():
            if said["settings"].get(key) != ours:
                raise ConfigError(
                    f"{key} = {ours}, but {path} was made with {said['settings'].get(key)}; set it back or make the "
                    "parts again"
                )
    return parts


def _merge(config: PrepareConfig, folder: Path, parts: list[tuple[Path, dict[str, Any]]], workers: Workers) -> None:
    try:
        said = parts[0][1]
        found = [RawBlock(**block) for block in said["blocks"]]
        if planned_source(folder) not in (None, said["source"]):  # a merge of other parts was killed here
            clear(folder)
        for path, its in parts:
            _take(path, its, folder)
        # The tokenizer of the parts, wherever it was on their machines; `take` has looked at its hash.
        own = config.tokenizer.model_copy(update={"path": str(folder / stages.TOKENIZER)})
        division = Division.from_json(said["division"])
        here = config.model_copy(update={"tokenizer": own})
        planner = Planner(here, folder, found, workers, division=division)
        plan = planner.saved() or planner.make()
        assert plan.tokenizer.sha256 == said["tokenizer"], "the parts' tokenizer is another than they say"
        tasks = [(folder, block, len(parts)) for block in found]
        written = dict(workers.map("tokens", _whole, tasks, found))
        write_manifest(config, folder, found, plan, [written[index] for index in range(len(found))])
    finally:
        stages.forget()


def _take(path: Path, said: dict[str, Any], folder: Path) -> None:
    """Link (or copy) the files of a part into the folder of the merge. What `_whole` does not look at is hashed."""
    for name, entry in said["files"].items():
        source, target = path / name, folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or name == MANIFEST:
            raise CorpusError(f"{path / PART} names the file {name}, which no part has; prepare this part again")
        if not source.is_file() or source.stat().st_size != entry["size"]:
            raise CorpusError(f"{source} is missing or has another size than {PART} says; copy or prepare it again")
        if not name.startswith(("tokens-", "raw-")) and file_sha256(source) != entry["sha256"]:
            raise CorpusError(f"{source} is damaged (sha256 differs from that in {PART}); copy or prepare it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.samefile(source):
            target.unlink()
        if not target.exists():
            with suppress(FileNotFoundError):
                target.with_name(target.name + ".part").unlink()
            _link(source, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        aside = target.with_name(target.name + ".part")
        shutil.copyfile(source, aside)
        aside.replace(target)


def _whole(folder: Path, block: RawBlock, parts: int) -> dict[str, Any]:
    """What the part wrote of a block, every byte looked at; its raw documents are not needed any more then."""
    info = finished_block(folder, block.number)
    if info is None:
        part = Part(block.number % parts, parts)
        raise CorpusError(
            f"block {block.number} of part {part} is damaged (sha256 differs); copy or prepare that part again"
        )
    blocks.raw_path(folder, block.number).unlink(missing_ok=True)
    return info
