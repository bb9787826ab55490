"""What the console says at the end of an evaluation."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.scored import prompts, report, scored

from slm.base import console
from slm.evaluation import conclusion
from slm.verdict import gate

RUN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("state", "colour"), [("pass", "32"), ("regress", "31"), ("inconclusive", "33"), ("none", None)]
)
def test_the_verdict_has_its_colour_on_a_terminal(tracking, monkeypatch, state, colour):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", terminal)
    experiment = tracking.create_experiment(state)
    with tracking.start_run(experiment_id=experiment):
        conclusion.show(report([scored([{"contains": 1.0}], prompts(1))], prompts(1), gate.Verdict(state, ())))
    [line] = [line for line in out.getvalue().splitlines() if line.startswith("gate: ")]
    code = f"1;{colour}" if colour else "1"
    assert line.startswith(f"gate: \x1b[{code}m{state}\x1b[0m   run: r   tracking: sqlite:///")


@pytest.mark.parametrize(
    ("server", "artifacts", "place"),
    [
        ("sqlite:///mlflow.db", "/runs/r/artifacts", "/runs/r/artifacts/evaluation/report.html"),
        ("sqlite:///mlflow.db", "file:///runs/r/artifacts", "/runs/r/artifacts/evaluation/report.html"),
        (
            "https://host/",
            "mlflow-artifacts:/1/r/artifacts",
            f"https://host/#/experiments/1/runs/{RUN}/artifacts/evaluation/report.html",
        ),
        ("databricks", "dbfs:/r/artifacts", "dbfs:/r/artifacts/evaluation/report.html"),
    ],
)
def test_the_report_is_named_by_its_file_or_by_the_page_that_shows_it(server, artifacts, place):
    run = SimpleNamespace(artifact_uri=artifacts, experiment_id="1", run_id=RUN)
    assert conclusion.report_place(server, run) == place
