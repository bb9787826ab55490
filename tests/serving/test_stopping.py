"""SIGTERM in bad moments: under load, with traces that wait, and while the registry does not answer."""

import json
import re
import signal
import threading
from pathlib import Path

import mlflow
import openai
import pytest
from support.commands import free_port, running_warm
from support.databases import sqlite_store
from support.faulty_proxy import in_front_of
from support.openai_servers import NAME, ask, serving
from support.questions import GENERATION


class Clients:
    """So many clients in a closed loop, until the server takes no more requests. Keeps how each request ended."""

    def __init__(self, address: str, number: int):
        self.answers: list[str] = []  # request ids
        self.failed: list[str] = []
        self.some = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._ask, args=(address,)) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(120)

    def _ask(self, address: str) -> None:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while True:
                try:
                    told = client.chat.completions.with_raw_response.create(
                        model=NAME, messages=[{"role": "user", "content": "Count."}], max_tokens=8
                    )
                    assert told.parse().usage.completion_tokens
                    self.answers.append(told.headers["x-request-id"])
                    self.some.release()
                except openai.APIConnectionError:  # the socket is closed: the server has not begun the request
                    return
                except Exception as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                    return


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("serving: SIGTERM under load, with traces that wait")
def test_every_request_that_was_taken_is_answered_logged_and_traced(store, tmp_path):
    log, told = tmp_path / "access", tmp_path / "told"
    options = f"--access_log={log}", "--traces=1", "--trace_experiment=ended", "--drain=60"
    with told.open("w") as output, serving(store, *options, output=output) as (process, address):
        clients = Clients(address, 8)
        for _ in range(20):
            assert clients.some.acquire(timeout=120)
        process.send_signal(signal.SIGTERM)
        clients.wait()
        assert process.wait(60) == 0
    said = told.read_text()
    assert clients.failed == [] and len(clients.answers) >= 20, said
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    chats = [line for line in lines if line["path"] == "/v1/chat/completions"]
    assert {line["status"] for line in chats} == {200}
    assert sorted(line["request_id"] for line in chats) == sorted(clients.answers)
    mlflow.set_tracking_uri(store[0])
    experiment = mlflow.get_experiment_by_name("ended").experiment_id
    traces = mlflow.search_traces(locations=[experiment], max_results=500, return_type="list")
    dropped = sum(int(number) for number in re.findall(r"warning: (\d+) traces? dropped", said))
    assert {trace.info.tags["request.id"] for trace in traces} <= set(clients.answers)
    assert len(traces) + dropped == len(clients.answers), said
    assert said.count("the server has stopped, after SIGTERM") == 1 and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.fault("serving: Ctrl-C under mlflow run")
def test_ctrl_c_ends_the_run_of_mlflow_run_killed_and_tells_of_no_answers(store, tmp_path):
    mlflow.set_tracking_uri(store[0])
    client = mlflow.MlflowClient()
    run_id = client.create_run(client.create_experiment("ctrl-c")).info.run_id
    told = tmp_path / "told"
    with told.open("w") as output, serving(store, output=output, MLFLOW_RUN_ID=run_id) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert told.read_text().splitlines()[-1] == "the server has stopped, after SIGINT"
    assert client.get_run(run_id).info.status == "KILLED"
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
@pytest.mark.fault("serving: SIGTERM while the registry does not answer")
def test_a_follower_that_waits_for_the_registry_does_not_keep_the_server(tmp_path, int4_export):
    from support.commands import serving as tracking_server

    from slm.models import model_logging
    from slm.tracking import registry

    options = f"--backend-store-uri={sqlite_store(tmp_path)}", f"--artifacts-destination={tmp_path / 'store'}"
    released = threading.Event()
    with tracking_server(tmp_path, *options) as uri, in_front_of(uri) as faults:
        mlflow.set_tracking_uri(uri)
        with mlflow.start_run():
            model_logging.log_onnx(int4_export, "chat", GENERATION, "int4", registered_model_name="bot")
        registry.set_alias("bot", "champion", "1")
        mlflow.set_tracking_uri(None)
        address = f"http://127.0.0.1:{free_port()}"
        command = ["entrypoints.serve", "--model_uri=models:/bot@champion", f"--port={address.rpartition(':')[2]}"]
        with (
            (tmp_path / "told").open("w") as output,
            running_warm(
                [*command, "--follow=0.2"], f"{address}/health", output=output, MLFLOW_TRACKING_URI=faults.uri
            ) as process,
        ):
            looks = threading.Event()

            def hang() -> None:
                looks.set()
                released.wait(120)

            faults.add(hang, "GET", "registered-models/alias")
            assert looks.wait(60)
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                assert client.chat.completions.create(model="bot", messages=[{"role": "user", "content": "Hi"}]).choices
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            released.set()
    assert "Traceback" not in Path(tmp_path / "told").read_text()


@pytest.mark.slow
@pytest.mark.fault("serving: the key file is removed while the server runs")
def test_a_server_whose_key_file_is_removed_goes_on_with_the_keys_of_before(store, tmp_path):
    keys, told = tmp_path / "keys", tmp_path / "told"
    keys.write_text("first\n")
    with (
        told.open("w") as output,
        serving(store, output=output, PHI3_MLFLOW_API_KEY_FILE=str(keys)) as (process, address),
        openai.OpenAI(base_url=f"{address}/v1", api_key="first", max_retries=0) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key="second", max_retries=0) as other,
    ):
        assert ask(client, max_tokens=1).choices
        keys.unlink()
        for _ in range(3):
            assert ask(client, max_tokens=1).choices
            with pytest.raises(openai.AuthenticationError):
                ask(other, max_tokens=1)
        keys.write_text("second\n")
        assert ask(other, max_tokens=1).choices
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert told.read_text().count("the keys of before stay\n") == 1
