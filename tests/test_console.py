"""What stands on the screen: one line at a time without a terminal, a bar on one."""

from __future__ import annotations

import io

import pytest

from lmtrain.console import Console, duration, evaluation_line, quantity, training_line

ROW = {
    "step": 20,
    "train/loss": 3.25,
    "train/bits_per_byte": 2.5,
    "train/grad_norm": 0.75,
    "train/lr": 3e-4,
    "train/tokens": 2000,
    "train/skipped": 0,
    "perf/tokens_per_s": 12345.0,
    "perf/mfu": 0.421,
    "perf/data_wait": 0.03,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_has_what_a_person_asks_for() -> None:
    line = training_line(ROW, eta=3725, meaning="MFU")
    for part in ("loss 3.2500", "2.500 bits/byte", "12.3k tok/s", "42.1% MFU", "grad 0.75", "lr 3.00e-04"):
        assert part in line
    assert "data wait 3%" in line
    assert "ETA 1h 02m" in line
    assert "skipped" not in line
    assert "42.1% of GEMM peak" in training_line(ROW, eta=0, meaning="fraction of measured GEMM peak")
    bad = {**ROW, "train/loss": None, "train/grad_norm": None, "train/skipped": 3, "perf/mfu": None}
    line = training_line(bad, eta=0, meaning="MFU")
    assert "loss not finite" in line
    assert "skipped 3" in line
    assert "MFU" not in line


def test_lines_without_a_terminal_keep_their_distance_but_the_ends_are_shown() -> None:
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, clock=lambda: now[0])
    console.start(step=0, steps=100, meaning="MFU")
    for step in range(1, 101):
        now[0] += 1.0
        console.step({**ROW, "step": step}, eta=100 - step)
    console.stop()
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()]
    assert shown[0] == 1
    assert shown[-1] == 100
    assert shown[:-1] == list(range(1, 100, 5))
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_bar_and_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    console = Console(file=out)
    console.start(step=5, steps=100, meaning="MFU")
    console.step(ROW, eta=60)
    console.warn("mind [this]")
    console.stop()
    console.say("after")
    text = out.getvalue()
    assert "20/100" in text
    assert "ETA 1m 00s" in text
    assert "warning: mind [this]" in text  # brackets are text, not markup
    assert text.rstrip().endswith("after")


def test_a_held_out_result_says_how_it_was_measured() -> None:
    row = {"eval/valid/loss": 1.5, "eval/valid/perplexity": 4.48, "eval/valid/bits_per_byte": 2.1234}
    how = {"mode": "sliding", "context": 64, "stride": 16, "subset": True}
    line = evaluation_line("valid", {**row, **how})
    assert line == ("valid: loss 1.5000  perplexity 4.48  2.1234 bits/byte  (sliding, context 64, stride 16, subset)")
    assert evaluation_line("x", {"eval/x/loss": None}) == "x: not finite"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"), (18420, "5h 07m"), (183600, "2d 03h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (999, "999"), (1e3, "1k"), (1234567, "1.23M"), (2e12, "2T")])
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text
