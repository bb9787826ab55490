"""The loop, with real parts: traffic becomes traces, traces a prompt set, and the server follows the gate's verdict."""

import mlflow
import openai
import pytest
from support.commands import REPOSITORY, call, free_port, running_warm
from support.openai_servers import wait_for
from support.questions import GENERATION

from slm.tracking import registry

QUESTIONS = [f"Where does the {river} end?" for river in ("Rhine", "Danube", "Volga", "Thames", "Seine", "Ebro")]
TRAFFIC_GATE = "fidelity/kl/mean: {max: 5}\nrows_failed: {max: 0}\n"
STRICT_GATE = "fidelity/kl/mean: {max: 0.0001}\n"
FIXED_GATE = "score/mean: {max_drop: 0.9}\nrows_failed: {max: 0}\nrows_unscored: {max: 0}\n"


@pytest.fixture(scope="module")
def versions(tracking_server, int8_export, int4_export):
    """The registered model `loop`: version 1, in int8, is the champion, and version 2, in int4, the challenger."""
    from slm.models import model_logging

    mlflow.set_tracking_uri(tracking_server)
    experiment = mlflow.create_experiment("loop models")
    for export, precision in ((int8_export, "int8"), (int4_export, "int4")):
        with mlflow.start_run(experiment_id=experiment):
            model_logging.log_onnx(export, "chat", GENERATION, precision, registered_model_name="loop")
    registry.set_alias("loop", "champion", "1")
    registry.set_alias("loop", "challenger", "2")
    yield tracking_server
    mlflow.set_tracking_uri(None)


def ask(client: openai.OpenAI, question: str, **options) -> str:
    """The version that answers."""
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="loop", messages=messages, max_tokens=8, **options).system_fingerprint


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_traffic_decides_on_the_next_version_and_the_server_follows(versions, tmp_path):
    script = (REPOSITORY / "schedules" / "loop.sh").read_text()
    smoke = (REPOSITORY / "prompts" / "smoke.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fixed.jsonl").write_text("".join(smoke[:8]))
    (tmp_path / "gate.yaml").write_text(FIXED_GATE)
    for old, new in (
        ("models:/phi3", "models:/loop"),
        ("prompts/general.jsonl", tmp_path / "fixed.jsonl"),
        ("gates/traffic.yaml", tmp_path / "traffic.yaml"),
        ("gates/default.yaml", tmp_path / "gate.yaml"),
    ):
        assert old in script
        script = script.replace(old, str(new))

    def loop(gate: str, slot: str):
        (tmp_path / "traffic.yaml").write_text(gate)
        settings = {"MLFLOW_TRACKING_URI": versions, "MLFLOW_EXPERIMENT_NAME": "loop", "SLOT": slot}
        return call("sh", "-c", script, "loop.sh", "--max_tokens=8", **settings)

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["entrypoints.serve", "--model_uri=models:/loop@champion", f"--port={port}", "--follow=1"]
    command += ["--traces=1", "--trace_experiment=phi3-traffic"]
    with (
        (tmp_path / "log").open("w") as output,
        running_warm(command, f"{address}/health", output=output, MLFLOW_TRACKING_URI=versions),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        # Traffic, answered by the champion
        assert {ask(client, question, user="ada") for question in QUESTIONS[:2]} == {"loop/1"}
        assert {ask(client, question) for question in (*QUESTIONS[2:], QUESTIONS[2])} == {"loop/1"}
        assert wait_for(address, "slm_logged_traces_total", 7, seconds=60)

        # A gate on the traffic that the challenger breaks: nothing moves
        refused = loop(STRICT_GATE, "week-1")
        assert refused.code == 3, refused.out + refused.err
        assert "traces-phi3-traffic: 6 rows of 7 traces in phi3-traffic; left out: 1 with the messages" in refused.out
        assert "6 prompts in 5 clusters can find no difference in scores" in refused.out
        assert registry.alias_version("loop", "champion") == "1" and ask(client, QUESTIONS[0]) == "loop/1"

        # One that it keeps: then the fixed set decides, the alias moves, and the server follows
        passed = loop(TRAFFIC_GATE, "week-2")
        assert passed.code == 0, passed.out + passed.err
        assert passed.out.count("gate: pass") == 2 and "loop@champion is now version 2, was 1" in passed.out
        assert wait_for(address, 'slm_served_version{version="loop/2"}', 1, seconds=120), (tmp_path / "log").read_text()
        assert ask(client, QUESTIONS[0]) == "loop/2"

        # The traces tell the versions apart, and the next week finds nothing to compare
        assert wait_for(address, "slm_logged_traces_total", 9, seconds=60)
        traffic = mlflow.get_experiment_by_name("phi3-traffic").experiment_id
        found = mlflow.MlflowClient().search_traces(locations=[traffic], include_spans=False)
        told = [trace.info.tags["model.version"] for trace in found]
        assert sorted(told) == ["loop/1"] * 8 + ["loop/2"]
        again = loop(TRAFFIC_GATE, "week-3")
        skipped = "\nskipped: models:/loop@challenger (models:/loop/2) and models:/loop@champion (models:/loop/2) are"
        assert again.code == 0 and again.out.count(skipped) == 2, again.out
    mlflow.set_tracking_uri(versions)
    runs = mlflow.search_runs(experiment_names=["loop"], filter_string="tags.slot = 'week-2'", output_format="list")
    told = {run.data.params["prompts"]: run.data.tags["gate"] for run in runs}
    assert told == {"traces:phi3-traffic?days=7&limit=200": "pass", str(tmp_path / "fixed.jsonl"): "pass"}
