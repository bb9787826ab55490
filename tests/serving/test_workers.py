"""`serve` in several processes: one port, one alias, one set of figures, and no process needs another one."""

import json
import re
import signal
import time
import urllib.request
from contextlib import contextmanager

import mlflow
import openai
import psutil
import pytest
from support.commands import free_port, in_process, running_warm, serving
from support.databases import sqlite_store
from support.moving_alias import ALIAS, Clients, champion, damage, log, source_of
from support.openai_servers import metric, wait_for

from slm.base import parameters
from slm.base.errors import BadInput
from slm.models.chat_parts.runtime import physical_cores
from slm.serving import process as one_process
from slm.serving import server, versions
from slm.tracking import registry, tags

OK, REPLACED = 'slm_requests_total{outcome="ok"}', "slm_replaced_processes_total"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, int4_export):
    """An MLflow server: its URI, and three versions of a model, of which the last one is broken."""
    folder = tmp_path_factory.mktemp("workers")
    options = f"--backend-store-uri={sqlite_store(folder)}", f"--artifacts-destination={folder / 'store'}"
    with serving(folder, *options) as uri:
        mlflow.set_tracking_uri(uri)
        made = [log(int4_export, "workers") for _ in range(3)]
        damage(next(found for found in (folder / "store").rglob(source_of(made[2])) if found.is_dir()))
        yield uri, made
        mlflow.set_tracking_uri(None)


@contextmanager
def two(uri: str, output, *options: str, key: str = "none", **environment: str):
    """A server of two processes that follows the alias. Gives the process that starts them, and its address."""
    address = f"http://127.0.0.1:{free_port()}"
    command = ["entrypoints.serve", f"--model_uri={ALIAS}", f"--port={address.rpartition(':')[2]}", "--workers=2"]
    words = [*command, "--follow=0.5", *options], f"{address}/health"
    with running_warm(*words, output=output, MLFLOW_TRACKING_URI=uri, **environment) as process:
        assert wait_for(address, "slm_processes", 2, 120, key)
        yield process, address


def children(process) -> list[psutil.Process]:
    return [one for one in psutil.Process(process.pid).children() if "slm.serving.process" in one.cmdline()]


def clients_of(child: psutil.Process, address: str) -> int:
    """The connections that a process holds."""
    port = int(address.rpartition(":")[2])
    return sum(one.laddr.port == port and one.status == "ESTABLISHED" for one in child.net_connections("tcp"))


def named(version: str) -> str:
    return f'slm_served_version{{version="bot/{version}"}}'


def promote(address: str, version: str) -> None:
    """Gives a version the alias, and says so as MLflow's webhook does."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    champion(version)
    stamp, body = str(int(time.time())), "{}"
    signature = _generate_hmac_signature("a secret", "7", stamp, body)
    headers = {"X-MLflow-Delivery-Id": "7", "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": signature}
    headers["Content-Type"] = "application/json"
    asked = urllib.request.Request(f"{address}/webhooks/mlflow", body.encode(), headers)
    assert urllib.request.urlopen(asked, timeout=60).status == 200


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("serving: a broken version gets the alias of several processes")
def test_both_processes_answer_follow_one_decision_and_count_together(tracked, tmp_path):
    uri, (first, second, broken) = tracked
    champion(first)
    options = "--traces=0.3", "--trace_experiment=two", f"--access_log={tmp_path / 'access'}", "--follow=3600"
    secret = {"PHI3_MLFLOW_WEBHOOK_SECRET": "a secret"}
    with (tmp_path / "told").open("w") as told, two(uri, told, *options, **secret) as (process, address):
        with Clients(address, 8) as clients:
            clients.wait_for(16)
            assert all(clients_of(child, address) for child in children(process))
            times = [0.0]  # when a move began, when both processes had moved, and so on
            for version, before in ((second, first), (broken, second), (first, second)):
                times.append(time.time())
                promote(address, version)
                if version == broken:
                    assert wait_for(address, "slm_refused_versions_total", 1, 120)
                    assert (metric(address, named(second)), metric(address, named(broken))) == (1, 0)
                else:
                    assert wait_for(address, named(version), 1, 120) and wait_for(address, named(before), 0, 120)
                times.append(time.time())
                clients.wait_for(len(clients.answers) + 16)
        for _ in range(600):
            sampled, logged = (metric(address, f"slm_{word}_traces_total") for word in ("sampled", "logged"))
            if sampled == logged:
                break
            time.sleep(0.1)
        counted = [metric(address, name) for name in (OK, "slm_request_seconds_count", "slm_refused_versions_total")]
        left = children(process)
        process.kill()
        for child in left:
            child.wait(60)  # none is left without the process that started it
    said = (tmp_path / "told").read_text()
    assert clients.failed == [], said

    def between(start: int, end: int) -> set[str]:
        return {answer[1] for answer in clients.answers if times[start] <= answer[0] < times[end]}

    times.append(float("inf"))
    assert [between(at, at + 1) for at in (0, 2, 4, 6)] == [{f"bot/{one}"} for one in (first, second, second, first)]
    assert between(3, 4) <= {f"bot/{second}"} and between(0, 7) == {f"bot/{first}", f"bot/{second}"}
    assert counted == [len(clients.answers), len(clients.answers), 1]
    lines = [json.loads(line) for line in (tmp_path / "access").read_text().splitlines()]
    assert sum(line["path"] == "/v1/chat/completions" for line in lines) == len(clients.answers)
    experiment = mlflow.get_experiment_by_name("two").experiment_id
    traces = mlflow.search_traces(locations=[experiment], max_results=5000, return_type="list")
    assert len({trace.info.tags["request.id"] for trace in traces}) == len(traces) == logged == sampled > 0
    assert said.count(f"version {broken} is refused: ") == said.count(f"bot@champion is version {broken} now") == 1
    assert "model.onnx.data" in registry.version_tags("bot", broken)[tags.SERVE_REFUSED]


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("serving: one of several processes is killed under load")
def test_a_killed_process_costs_its_own_requests_alone_and_is_replaced(tracked, tmp_path):
    uri, (first, *_) = tracked
    champion(first)
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    experiment = mlflow.create_experiment("ended")
    run = mlflow.MlflowClient().create_run(experiment)
    options = "--drain=60", "--traces=1", f"--access_log={tmp_path / 'access'}"
    environment = {"PHI3_MLFLOW_API_KEY_FILE": str(keys), "MLFLOW_RUN_ID": run.info.run_id}
    with (
        (tmp_path / "told").open("w") as told,
        two(uri, told, *options, key="old", **environment) as (process, address),
    ):
        with Clients(address, 8, key="old") as clients:
            clients.wait_for(16)
            answers, failed = clients.answers, clients.failed
            killed, other = children(process)
            most = clients_of(killed, address)
            killed.kill()
            assert wait_for(address, REPLACED, 1, 30, "old") and wait_for(address, "slm_processes", 2, 120, "old")
            clients.wait_for(len(clients.answers) + 16)
        assert len(clients.failed) <= most and other in children(process)
        assert {text.partition(":")[0] for text in clients.failed} <= {"APIConnectionError"}
        assert len(clients.answers) <= metric(address, OK, "old") <= len(clients.answers) + len(clients.failed)
        assert metric(address, named(first), "old") == 1

        keys.write_text("new\n")
        with Clients(address, 8, key="new") as clients:
            clients.wait_for(32)
            assert all(clients_of(child, address) for child in children(process))
            old = openai.OpenAI(base_url=f"{address}/v1", api_key="old", max_retries=0)
            for _ in range(4):
                with pytest.raises(openai.AuthenticationError):
                    old.models.list()
            left = children(process)
            for _ in range(2):
                process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0
    said = (tmp_path / "told").read_text()
    assert {text.partition(":")[0] for text in clients.failed} == {"APIConnectionError"}, clients.failed[:3]
    assert not any(child.is_running() for child in left)
    lines = [json.loads(line) for line in (tmp_path / "access").read_text().splitlines()]
    taken = sum((line["path"], line["status"]) == ("/v1/chat/completions", 200) for line in lines)
    assert 0 <= taken - len(answers) - len(clients.answers) <= len(failed)
    assert re.findall(r"warning: process (\d) of serve \(pid (\d+)\) has ended with (\w+)", said) in (
        [(place, str(killed.pid), "SIGKILL")] for place in "12"
    )
    assert said.count("the server has stopped, after SIGTERM") == 1 and "Traceback" not in said, said
    ended = mlflow.get_run(run.info.run_id).info
    assert ended.status == "FINISHED"
    assert re.fullmatch(r"serve \w+@champion, stopped by SIGTERM", ended.run_name)
    traces = mlflow.search_traces(locations=[experiment], max_results=5000, return_type="list")
    assert {trace.info.trace_metadata["mlflow.sourceRun"] for trace in traces} == {run.info.run_id}


@pytest.mark.usefixtures("all_cores")
def test_what_can_not_be_served_is_one_line_and_no_process_is_left(tracked):
    port = f"--port={free_port()}"
    many = in_process("serve", "--model_uri=models:/bot/1", port, "--workers=200")
    assert (many.code, many.out) == (2, "") and "error: workers: 200 processes are more than the " in many.err
    broken = in_process("serve", f"--model_uri=models:/bot/{tracked[1][2]}", port, "--workers=2")
    assert broken.code == 2 and broken.err.startswith("error: models:/bot/"), broken
    assert broken.err.count("\n") == 1 and "model.onnx.data" in broken.err
    assert not [one for one in psutil.Process().children() if "slm.serving.process" in one.cmdline()]


def test_memory_for_all_processes_is_looked_at_before_the_weights_are_read(tracked, monkeypatch):
    args = parameters.parse("serve", "", ["--model_uri=models:/bot/1", "--workers=8"])
    orders = {"args": vars(args), "version": "", "processes": 8, "experiment_id": "", "run_id": ""}
    monkeypatch.setattr(versions, "_free_memory", lambda: 500 * 2**20)
    with pytest.raises(BadInput, match=r"workers: models:/bot/1, loaded 8 times, needs about [\d,]+ MB, and 500 MB"):
        one_process.serve(orders, None, iter(()), None)


def test_processes_share_the_cores():
    args = parameters.parse("serve", "", ["--workers=2"])
    assert server.settings(args)["threads"] == max(1, physical_cores() // 2)
    args.threads = 3
    assert server.settings(args)["threads"] == 3
