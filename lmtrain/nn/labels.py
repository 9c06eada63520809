"""Class labels that a model is conditioned on."""

from __future__ import annotations

from torch import Tensor

from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Cond, Spec


def label_classes(spec: Spec, *, conditional: bool) -> int:
    """How many classes a model is conditioned on, 0 if it is not; ConfigError for a corpus without labels."""
    if conditional and not spec.labels:
        raise ConfigError(
            "model.conditional = true needs a corpus with class labels, and this one has none; set it to false"
        )
    return spec.labels if conditional else 0


def given_labels(cond: Cond) -> Tensor:
    """int64 [B] labels; InputError when none were given."""
    if cond.label_B is None:
        raise InputError("the model is conditioned on class labels, and none were given; say which class")
    return cond.label_B
