"""Dropout and other noise of training, seeded by what is being computed and never by who computes it."""

from __future__ import annotations

import hashlib

import torch


def noise_seed(seed: int, step: int, index: int) -> int:
    """63 bits for the micro-batch whose first row is `index` of the global batch of `step`, mixed by BLAKE2b."""
    text = f"{seed}/{step}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"lmtrain noise").digest(), "little") >> 1


def seed_noise(seed: int, step: int, index: int) -> None:
    """Seed torch before a micro-batch's forward pass: one rank with two micro-batches draws what two ranks draw."""
    torch.manual_seed(noise_seed(seed, step, index))
