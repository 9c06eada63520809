"""In what precision sums and exponentials are taken."""

from __future__ import annotations

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what a head computes in, whatever the weights are."""
    return torch.float64 if dtype == torch.float64 else torch.float32
