"""What long work says of itself, on a terminal and in a log."""

import io
import re
import time

import pytest
from rich.console import Console

from slm.base import console


def test_a_log_is_told_every_15_seconds():
    assert console.LINE_SECONDS == 15


@pytest.fixture
def log(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=file, highlight=False, soft_wrap=True))
    monkeypatch.setattr(console, "LINE_SECONDS", 0.2)
    return file


def test_a_log_is_told_how_far_long_work_is(log):
    with console.progress("Scoring onnx", 4) as advance:
        advance(0)  # a kept answer
        advance(50)
        time.sleep(0.5)
    line = log.getvalue().splitlines()[0]
    assert re.fullmatch(r"Scoring onnx: 2 of 4 rows, \d+ tokens/s, about \d+ s left", line), line


def test_before_the_first_answer_nothing_is_foretold(log):
    with console.progress("Scoring onnx", 1200):
        time.sleep(0.3)
    assert log.getvalue() == "Scoring onnx: 0 of 1,200 rows\n"


def test_a_long_step_is_told_too_and_ends_with_its_seconds(log):
    with console.step("Exporting"):
        time.sleep(0.3)
    assert log.getvalue() == "Exporting: 0 s so far\nExporting (0.3 s)\n"


def test_short_work_leaves_no_line(log):
    with console.progress("Scoring onnx", 1) as advance:
        advance(5)
    time.sleep(0.3)
    assert log.getvalue() == ""


def test_a_terminal_has_the_bar_alone(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=file, force_terminal=True, width=120, highlight=False))
    monkeypatch.setattr(console, "LINE_SECONDS", 0.01)
    with console.progress("Scoring onnx", 2) as advance:
        advance(30)
        time.sleep(0.1)
    shown = file.getvalue()
    assert "1/2" in shown and "tokens/s" in shown and "rows" not in shown


@pytest.mark.parametrize(("seconds", "told"), [(40.4, "40 s"), (99.0, "99 s"), (700, "12 min"), (9000, "2.5 h")])
def test_a_duration_is_told_in_one_unit(seconds, told):
    assert console.duration(seconds) == told
