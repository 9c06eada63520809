"""Counting parameters, also while an engine keeps them in pieces."""

from __future__ import annotations

from torch import nn


def parameters(module: nn.Module) -> int:
    """Elements of all parameters of a module; one that is handed out among ranks (`ds_numel`) counts whole."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def without(module: nn.Module, *embeddings: nn.Module | None) -> dict[str, int]:
    """`total` parameters of a model, and `without_embeddings`: less the given parts of it."""
    total = parameters(module)
    return {
        "total": total,
        "without_embeddings": total - sum(parameters(part) for part in embeddings if part is not None),
    }
