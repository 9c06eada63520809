"""Verified checkpoints by parameter name: saved on any number of ranks at any ZeRO stage, resumed on any other."""

from lmtrain.checkpoint.exporting import export
from lmtrain.checkpoint.manifest import Manifest, differences, same_run
from lmtrain.checkpoint.names import Saved, Which
from lmtrain.checkpoint.reader import Reader, faults, load_weights, verify
from lmtrain.checkpoint.store import CheckpointConfig, Checkpoints

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "Manifest",
    "Reader",
    "Saved",
    "Which",
    "differences",
    "export",
    "faults",
    "load_weights",
    "same_run",
    "verify",
]
