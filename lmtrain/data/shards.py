"""Prepared corpora on disk, by one name: writer (writer.py), reader (corpus.py), format (layout.py)."""

from __future__ import annotations

from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.data.layout import BUCKETS, DOCUMENT, GROUPS, document_hash, smallest_dtype
from lmtrain.data.writer import finish, finished_block, read_documents, write_block

__all__ = [
    "BUCKETS",
    "DOCUMENT",
    "GROUPS",
    "PreparedCorpus",
    "document_hash",
    "finish",
    "finished_block",
    "open_corpus",
    "read_documents",
    "smallest_dtype",
    "write_block",
]
