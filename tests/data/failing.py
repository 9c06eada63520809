"""What worker processes are made to do, right and wrong; light, since every worker imports it."""

import os
import signal

from lmtrain.errors import TokenizerError


def die(number: int) -> int:
    """Be killed at number 2."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    """Raise one of our own errors."""
    raise TokenizerError(f"refused {number}")


def same(number: int) -> int:
    """Give back what was given."""
    return number
