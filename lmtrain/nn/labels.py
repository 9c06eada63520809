"""Class conditioning: whether a model is told the class of a record, and a learned vector for each class.

B rows, D width.
"""

from __future__ import annotations

from torch import Tensor

from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.protocol import Cond, Spec


def label_classes(spec: Spec, *, conditional: bool) -> int:
    """How many classes a model is conditioned on, 0 if it is not; ConfigError for a corpus without labels."""
    if conditional and not spec.labels:
        raise ConfigError(
            "model.conditional = true, but the records of this corpus have no labels; set it to false, "
            "or prepare a corpus with labels"
        )
    return spec.labels if conditional else 0


def given_labels(cond: Cond) -> Tensor:
    """int64 [B] labels; InputError when none were given."""
    if cond.label_B is None:
        raise InputError("this model is conditioned on classes (model.conditional), but its rows come without labels")
    return cond.label_B


def class_embedding(conditional: bool, *, spec: Spec, width: int, std: float) -> SymbolMatrix | None:
    """One vector a class, N(0, std^2); None when not `conditional`; ConfigError where the corpus has no classes."""
    classes = label_classes(spec, conditional=conditional)
    return SymbolMatrix(classes, width, alphabet=classes, std=std) if classes else None


def class_vectors(embed: SymbolMatrix, cond: Cond) -> Tensor:
    """[B, D]: the vector of each row's class; InputError when the rows come without labels."""
    out: Tensor = embed(given_labels(cond))
    return out
