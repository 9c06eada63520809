"""Counting parameters, also while an engine keeps them in pieces."""

from __future__ import annotations

from torch import nn


def parameters(module: nn.Module) -> int:
    """Elements of all parameters of a module; one that is handed out among ranks (`ds_numel`) counts whole."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())
