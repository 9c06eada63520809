"""The exception tree. Users see one line of it and the exit code of its class.

Every message says what was given, what was wanted and what to do. `assert` is for our own invariants.
"""

from __future__ import annotations

EXIT_STOPPED = 75
"""A run that was asked to stop (SIGTERM, SIGUSR1, the file STOP) saved and ended: start it again to go on."""


class LmtrainError(Exception):
    """Anything that the user can mend. `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(LmtrainError):
    """A key, a value or a combination of values that cannot be run."""

    exit_code = 2


class CorpusError(LmtrainError):
    """A source, a prepared corpus or a shard that is missing, damaged or not what it should be."""

    exit_code = 3


class TokenizerError(CorpusError):
    """A tokenizer that is missing, damaged or belongs to another corpus."""


class CheckpointError(LmtrainError):
    """A checkpoint that is missing, damaged or belongs to another run."""

    exit_code = 4


class EngineError(LmtrainError):
    """The engine cannot do what was asked on this machine, or the ranks lost one another."""

    exit_code = 5


class DivergenceError(LmtrainError):
    """Training produced non-finite numbers too many times in a row."""

    exit_code = 6


class InputError(LmtrainError):
    """An argument, a file or a prompt given on the command line that cannot be used."""

    exit_code = 7
