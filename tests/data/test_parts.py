"""A corpus made by several machines, in parts, is the corpus that one machine makes: same files, same manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmtrain.data import parts, prepare
from lmtrain.data.parts import Part
from lmtrain.data.shards import open_corpus
from lmtrain.errors import ConfigError, CorpusError
from tests.data.making import BYTES, config, files, jsonl, prose
from tests.data.test_duplicates import talk
from tests.house import lmtrain


def tree_of(folder: Path, **more: Any) -> dict[str, Any]:
    """Documents with copies among them and held-out sentences in train, in some ten blocks."""
    own = [b"%d: " % i + raw for i, raw in enumerate(talk(5, 150))]
    source = jsonl(folder / "text.jsonl", [*own, *own[:9], *(own[i] + b" again" for i in range(40))])
    return {"source": source, "tokenizer": BYTES, "block_bytes": 8_000, "split": {"kind": "hash"}, **more}


def in_parts(settings: prepare.PrepareConfig, out: Path, count: int, processes: int = 1) -> prepare.Prepared:
    for index in reversed(range(count)):
        parts.prepare_part(settings, out, Part(index, count), processes=processes)
    return parts.merge(settings, out, processes=processes)


@pytest.mark.slow
def test_one_part_and_five_with_one_process_and_three_give_the_same_corpus(tmp_path: Path) -> None:
    """With a SentencePiece model fixed beforehand, dropping what is double and what leaks."""
    documents = prose(0, 240)
    tree = {
        "source": jsonl(tmp_path / "text.jsonl", [*documents, *documents[:20]]),
        "tokenizer": {"kind": "sentencepiece-unigram", "vocab": 300},
        "block_bytes": 40_000,
        "drop": "both",
        "drop_share": 0.5,
        "split": {"kind": "hash", "valid": 0.1, "test": 0.1},
    }
    prepare.train_tokenizer(config(tree), tmp_path / "tokenizer")
    settings = config({**tree, "tokenizer": {**tree["tokenizer"], "path": str(tmp_path / "tokenizer")}})
    whole = prepare.prepare(settings, tmp_path / "whole")
    assert whole.manifest["drop"]["duplicates"] > 0
    assert whole.manifest["drop"]["leakage"] > 0
    assert whole.manifest["blocks"] > 5
    for count in (1, 5):
        for processes in (1, 3):
            out = tmp_path / f"{count}-{processes}"
            made = in_parts(settings, out, count, processes)
            assert made.fingerprint == whole.fingerprint
            assert files(out) == files(tmp_path / "whole")
            assert not list(tmp_path.glob(f"{out.name}.*"))  # no folder of work is left
    open_corpus(out).verify()


@pytest.mark.parametrize(
    "more",
    [
        {"drop": "both"},
        {"leakage": False, "drop": "duplicates"},
        {"split": {"kind": "tail", "valid": 0.2, "test": 0.2}},
        {"block_bytes": 1 << 20},  # one block: three of the four parts have nothing
    ],
    ids=["both", "no leakage", "tail", "one block"],
)
def test_parts_of_other_kinds(tmp_path: Path, more: dict[str, Any]) -> None:
    settings = config(tree_of(tmp_path, **more))
    whole = prepare.prepare(settings, tmp_path / "whole")
    made = in_parts(settings, tmp_path / "out", 4)
    assert made.fingerprint == whole.fingerprint
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_cut_of_a_tail_falls_between_characters_in_whoever_has_the_block(tmp_path: Path) -> None:
    """Two-byte characters: one of two cuts must move, and the block it lies in belongs to one part only."""
    source = jsonl(tmp_path / "text.jsonl", [("é" * 500).encode()] * 9)
    for valid in (1401, 1402):
        tree = {"source": source, "tokenizer": BYTES, "block_bytes": 900, "split": {"kind": "tail", "valid": valid}}
        whole = prepare.prepare(config(tree), tmp_path / f"whole{valid}")
        assert in_parts(config(tree), tmp_path / f"parts{valid}", 3).fingerprint == whole.fingerprint


def test_a_part_made_on_another_machine_is_merged_from_its_copy(tmp_path: Path) -> None:
    """Another path of the source and of the corpus; the source and the tokenizer are not there any more to merge."""
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    here, there = (config(tree_of(tmp_path / name)) for name in ("here", "there"))
    parts.prepare_part(here, tmp_path / "here" / "out", Part(0, 2))
    parts.prepare_part(there, tmp_path / "there" / "out", Part(1, 2))
    folder = "out.parts/1-of-2"
    shutil.copytree(tmp_path / "there" / folder, tmp_path / "here" / folder)
    whole = prepare.prepare(here, tmp_path / "whole")
    (tmp_path / "here" / "text.jsonl").unlink()
    assert parts.merge(here, tmp_path / "here" / "out").fingerprint == whole.fingerprint


def test_a_part_is_done_once_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tree_of(tmp_path))
    whole = prepare.prepare(settings, tmp_path / "whole")
    out = tmp_path / "out"
    write, number = parts.stages.write_block, 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal number
        number += 1
        if number == 3:
            raise KeyboardInterrupt
        return write(*arguments, **named)

    monkeypatch.setattr(parts.stages, "write_block", failing)
    with pytest.raises(KeyboardInterrupt):
        parts.prepare_part(settings, out, Part(1, 2))
    kept = out.with_name("out.parts") / "1-of-2.partial"
    assert len(list(kept.glob("block-*.json"))) == 2
    assert not parts.prepare_part(settings, out, Part(1, 2)).reused
    assert number == 2 + 1 + whole.manifest["blocks"] // 2 - 2  # what was finished was not written again
    assert parts.prepare_part(settings, out, Part(1, 2)).reused
    parts.prepare_part(settings, out, Part(0, 2))

    # A merge that is interrupted goes on, too; the parts are there until the corpus is.
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_manifest", failing)
        number = 2
        with pytest.raises(KeyboardInterrupt):
            parts.merge(settings, out)
    assert parts.merge(settings, out).fingerprint == whole.fingerprint
    assert parts.merge(settings, out).reused
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl", "whole", "out"}


def test_what_does_not_belong_together_is_refused_by_name(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    settings, out = config(tree), tmp_path / "out"
    folder = tmp_path / "out.parts"
    with pytest.raises(CorpusError, match="holds no part"):
        parts.merge(settings, out)
    parts.prepare_part(settings, out, Part(0, 3))
    with pytest.raises(CorpusError, match="lacks 1-of-3, 2-of-3"):
        parts.merge(settings, out)
    parts.prepare_part(settings, out, Part(1, 3))
    other = config({**tree, "source": jsonl(tmp_path / "other.jsonl", talk(9, 80))})
    parts.prepare_part(other, out, Part(2, 3))
    with pytest.raises(CorpusError, match=r"2-of-3 and .*0-of-3 differ in their source"):
        parts.merge(settings, out)
    with pytest.raises(CorpusError, match="prepared otherwise"):
        parts.prepare_part(settings, out, Part(2, 3))
    parts.prepare_part(settings, out, Part(2, 3), force=True)
    with pytest.raises(ConfigError, match=r"prepare\.leakage = False, but .*0-of-3 was made with True"):
        parts.merge(config({**tree, "leakage": False}), out)
    parts.prepare_part(settings, out, Part(0, 2))
    with pytest.raises(CorpusError, match="holds parts of 2 and of 3"):
        parts.merge(settings, out)
    shutil.rmtree(folder / "0-of-2")

    for name, wanted in (
        ("tokens-00002.bin", "block 2 of part 2/3 is damaged"),
        ("survey-00002.npz", "survey-00002.npz is damaged"),
        ("part.json", "part.json is missing, damaged"),
    ):
        path = folder / "2-of-3" / name
        before = path.read_bytes()
        path.write_bytes(before[:40] + bytes([before[40] ^ 1]) + before[41:])
        with pytest.raises(CorpusError, match=wanted):
            parts.merge(settings, out)
        path.write_bytes(before)
    said = json.loads((folder / "2-of-3" / "part.json").read_bytes())
    assert "text.jsonl" not in json.dumps(said)  # no paths of the machine
    assert parts.merge(settings, out).fingerprint == prepare.prepare(settings, tmp_path / "whole").fingerprint


def test_the_tokenizer_must_be_fixed_beforehand(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, tokenizer={"kind": "characters"})
    with pytest.raises(ConfigError, match=r"lmtrain tokenizer train.*prepare\.tokenizer\.path"):
        parts.prepare_part(config(tree), tmp_path / "out", Part(0, 2))


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "1/2/3", "a/b", "1 / 2", "0/999999"])
def test_a_part_that_there_is_not(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted i/n"):
        Part.parse(text)


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"prepare": tree_of(tmp_path), "data": {"corpus": str(tmp_path / "out")}}))
    ran = lmtrain("prepare", path, "--part", "0/2", "--merge")
    assert (ran.code, "--part and --merge" in ran.err) == (7, True)
    for part in ("0/2", "1/2"):
        ran = lmtrain("prepare", path, "-p", "1", "--part", part, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["part"] == part
    ran = lmtrain("prepare", path, "-p", "1", "--merge", "--json")
    assert ran.code == 0, ran.err
    whole = lmtrain("prepare", path, f"data.corpus={tmp_path}/whole", "-p", "1", "--json")
    assert json.loads(ran.out)["fingerprint"] == json.loads(whole.out)["fingerprint"]
