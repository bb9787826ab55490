"""The tour of docs/quickstart.md, word for word: champions, a bad candidate, the champion served and taken back.

Each command of the page is run, and each line that the page shows is compared with what was printed. Figures, ids and
paths may differ.
"""

import contextlib
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from support.commands import REPOSITORY, entry_point, free_port, running
from support.databases import sqlite_store, until

PAGE = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
TOUR = PAGE.split("## A support bot")[1].split("\n## ")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TOUR, re.DOTALL | re.MULTILINE)
CODES = [0, 0, 0, 0, 0, 3, 0, 0]  # of all commands but the server's


def shape(line: str) -> str:
    """A printed line without what differs from run to run."""
    line = re.sub(r"(worse|better) \([^)]*\)", r"\1", line)
    line = re.sub(r"\b[0-9a-f]{32}\b|(?<=tracking: )\S+|(?<=report: )\S+|127\.0\.0\.1:\d+", "#", line)
    return re.sub(r"(?<![\w/@-])[+-]?\d[\d,.]*\d|(?<![\w/@-])[+-]?\d", "#", line)


def test_a_line_between_those_of_the_page_is_seen():
    assert_printed("a 1\nb", "first\na 2\nb\nlast")
    with pytest.raises(AssertionError, match="isn't in"):
        assert_printed("a 1\nb", "a 2\nnew\nb")


def test_the_shape_of_a_line_keeps_its_words_and_states():
    assert shape("  pass         rows_failed max 0: 0") == "  pass         rows_failed max #: #"
    assert shape("x/2: 0 worse; 3 better (a-1, b-2)") == "x/2: # worse; # better"
    assert shape("gate: pass   run: " + "a" * 32) == "gate: pass   run: #"


@pytest.mark.slow
def test_the_tour_of_the_quickstart_prints_what_it_says(tmp_path):
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "mlruns", "site", "mutants", ".*_cache")
    shutil.copytree(REPOSITORY, clone, ignore=ignored)
    files = iter(("supportbot.jsonl", "tone.py", "gate.yaml"))
    environment = {"MLFLOW_TRACKING_URI": sqlite_store(tmp_path), "COLUMNS": "300"}
    codes, printed, port, log = [], "", free_port(), clone / "serve.log"
    with contextlib.ExitStack() as until_the_end:
        for language, block in BLOCKS:
            if language in ("jsonl", "yaml") or (language == "python" and len(codes) == 0):
                (clone / next(files)).write_text(block, encoding="utf-8")
            elif language == "python" and "import OpenAI" not in block:
                subprocess.run([sys.executable, "-c", block], cwd=clone, check=True)
            elif language == "python":
                printed = ask(block, port)
                asking = block
            elif language == "sh" and "-e serve" in block:
                server = until_the_end.enter_context(serving(block, clone, port, environment))
            elif language == "sh":
                for line in block.splitlines():
                    done = run(line, clone, environment)
                    codes.append(done.code)
                    printed = done.out + done.err
            elif "Serving" in block:
                last = shape(block.splitlines()[-1])
                until(lambda last=last: last in shape(log.read_text(encoding="utf-8")), server, seconds=240)
                assert_printed(block, log.read_text(encoding="utf-8"))
            else:
                assert_printed(block, printed)
        assert f"`{ask(asking, port).strip()}`" in TOUR  # of the version that serves after the rollback
    assert server.returncode == 130
    assert log.read_text(encoding="utf-8").splitlines()[-1] == "the server has stopped, after SIGINT"
    assert codes == CODES


def ask(block: str, port: int) -> str:
    """What the page's client prints."""
    asked = io.StringIO()
    with contextlib.redirect_stdout(asked):
        exec(block.replace(":5005", f":{port}"), {})
    return asked.getvalue()


def run(command: str, clone, environment: dict[str, str]):
    """A command `mlflow run .` of the page, without MLflow's own process."""
    words = shlex.split(command)
    assert words[:5] == ["mlflow", "run", ".", "--env-manager", "local"]
    name = words[words.index("-e") + 1] if "-e" in words else "evaluate"
    options = [f"--{words[at + 1]}" for at, word in enumerate(words) if word == "-P"]
    return entry_point(name, *options, cwd=clone, **environment)


@contextlib.contextmanager
def serving(command: str, clone, port: int, environment: dict[str, str]):
    """The process that serves as `command` says, with its output in serve.log; stopped as by Ctrl-C."""
    uri = re.search(r"model_uri=(\S+)", command)[1]
    words = [sys.executable, "-m", "entrypoints.serve", f"--model_uri={uri}", f"--port={port}"]
    health = f"http://127.0.0.1:{port}/health"
    with (
        (clone / "serve.log").open("w") as log,
        running(words, health, cwd=clone, output=log, end=signal.SIGINT, **environment) as process,
    ):
        yield process


def assert_printed(block: str, printed: str) -> None:
    """The lines of the page's block were printed one after another, and none between them."""
    shown, found = ([shape(line.rstrip()) for line in text.splitlines()] for text in (block, printed))
    begins = [at for at in range(len(found)) if found[at : at + len(shown)] == shown]
    assert begins, f"{block!r} isn't in:\n{printed}"
