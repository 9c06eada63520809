"""A prepared corpus divided anew: fold i of k is a set of buckets, so that cross-validation prepares nothing again.

Equal documents have equal buckets, hence no copy of a document straddles two folds. What the corpus calls train, valid
and test is forgotten: all its documents are divided.

What must not be forgotten is what a tokenizer has seen (`seen_by_tokenizer`): it was trained on the corpus's own train
split, most of which is held out in one fold or another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lmtrain.data.corpus import PreparedCorpus
from lmtrain.data.layout import BUCKETS, GROUPS, canonical
from lmtrain.data.splits import fold_cells
from lmtrain.errors import CorpusError


def refold(corpus: PreparedCorpus, *, folds: int, fold: int) -> PreparedCorpus:
    """The same shards with fold `fold` (from 1) as test, the one before it as valid, the others as train.

    The fingerprint is another for every fold: a run cannot go on with another one. CorpusError where folds would not be
    what they seem: documents cut by a split of the tail, documents dropped for what another split held out, an empty
    fold.
    """
    manifest = corpus.manifest
    if manifest["split"].get("kind") == "tail":
        raise CorpusError(
            f"{corpus.path} is split by its tail, with too few documents for folds; cut the source into more documents "
            "(prepare.source.document) and prepare it with prepare.split.kind = hash"
        )
    if manifest.get("drop", {}).get("kind") in ("leakage", "both"):
        raise CorpusError(
            f"{corpus.path} was prepared with prepare.drop = {manifest['drop']['kind']}, for one held-out split; "
            "prepare it with drop = none or duplicates to cut it into folds"
        )
    splits = fold_cells(fold - 1, folds, groups=range(GROUPS))
    counts = {}
    for name, cells in splits.items():
        try:
            part = corpus.select(name, cells["groups"], [(low, high) for low, high in cells["buckets"]])
        except CorpusError:
            raise CorpusError(
                f"fold {fold} of {folds} of {corpus.path} leaves split {name!r} without a {corpus.unit}; use fewer"
            ) from None
        counts[name] = {key: getattr(part, key) for key in ("documents", "symbols", "bytes", "words")}
    identity = canonical({"of": corpus.fingerprint, "folds": folds, "fold": fold})
    changed: dict[str, Any] = {
        **manifest,
        "split": {"kind": "folds", "splits": splits, "cuts": [], "folds": folds, "fold": fold},
        "counts": counts,
        "fingerprint": hashlib.sha256(identity).hexdigest(),
    }
    changed.pop("words_eos", None)
    return PreparedCorpus(corpus.shelf, changed)


def seen_by_tokenizer(manifest: Mapping[str, Any], split: str) -> str | None:
    """What the tokenizer was trained on of a split of this corpus, in words; None when nothing, as far as is recorded.

    A tokenizer that was trained on another kind of source is not looked into: its buckets are of other documents.
    """
    saw = (manifest.get("tokenizer") or {}).get("saw")
    cells = manifest.get("split", {}).get("splits", {}).get(split)
    if not saw or not cells or "split" not in saw or saw.get("source") != manifest.get("source", {}).get("kind"):
        return None
    own, its = manifest["split"], saw["split"]
    if own["kind"] == its.get("kind") and not set(cells["groups"]) & set(its["groups"]):
        return None  # the source's own train, valid and test: they share no document
    shared = len(_buckets(cells["buckets"]) & _buckets(its["buckets"]))
    if not shared:
        return None
    return (
        f"the tokenizer was trained on {saw.get('documents', 'some')} documents of {shared} of the "
        f"{len(_buckets(cells['buckets']))} buckets of split {split!r}: its score may be too good; train the tokenizer "
        "on the rest, or use prepare.tokenizer.kind = bytes"
    )


def _buckets(runs: Any) -> set[int]:
    return {bucket for low, high in runs for bucket in range(low, min(high, BUCKETS))}
