"""Class conditioning: a learned vector for each class, added to what a network reads.

B rows, D width.
"""

from __future__ import annotations

from torch import Tensor

from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.protocol import Cond, Spec


def class_embedding(conditional: bool, *, spec: Spec, width: int, std: float) -> SymbolMatrix | None:
    """One vector a class, N(0, std^2); None when not `conditional`; ConfigError where the corpus has no classes."""
    if not conditional:
        return None
    if not spec.labels:
        raise ConfigError(
            "model.conditional = true, but the records of this corpus have no labels; set it to false, "
            "or prepare a corpus with labels"
        )
    return SymbolMatrix(spec.labels, width, alphabet=spec.labels, std=std)


def class_vectors(embed: SymbolMatrix, cond: Cond) -> Tensor:
    """[B, D]: the vector of each row's class; InputError when the rows come without labels."""
    if cond.label_B is None:
        raise InputError("this model is conditioned on classes (model.conditional), but its rows come without labels")
    out: Tensor = embed(cond.label_B)
    return out
