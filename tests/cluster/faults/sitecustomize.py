"""Python imports this by itself when it starts: a rank under test does on SIGUSR2 what the file `fault` says."""

import os
import signal
import time
from pathlib import Path


def commit(number, frame):
    deed = Path("fault").read_text()
    if deed == "raise":
        raise ValueError("planted")
    if deed == "exit":
        os._exit(0)
    time.sleep(1000)


if "RANK" in os.environ:
    signal.signal(signal.SIGUSR2, commit)
