"""`serve` moves with its alias: under load, to a good version, not to a broken one, and back."""

import math
import re
import subprocess
import tempfile
import threading
import time
import weakref

import mlflow
import pytest
from fastapi.testclient import TestClient
from support.commands import free_port, running_warm, serving
from support.databases import database, sqlite_store
from support.effort import LOAD_SECONDS
from support.faulty_proxy import in_front_of
from support.moving_alias import ALIAS, Clients, champion, damage, log, source_of
from support.openai_servers import metric, wait_for

from slm.base.errors import BadInput
from slm.serving import http_app, protocol, versions
from slm.tracking import registry, tags

# ---------------------------------------------------------------------------------------------------------------------
# Under load, on PostgreSQL


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """An MLflow server on PostgreSQL: its URI, and the folder of its artifacts."""
    folder = tmp_path_factory.mktemp("following")
    with database() as (uri, running), running():
        options = f"--backend-store-uri={uri}", f"--artifacts-destination={folder / 'store'}"
        with serving(folder, *options) as address:
            yield address, folder / "store"


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.fault("serving: a broken version gets the alias under load")
def test_the_alias_moves_under_load_and_no_request_fails(tracked, int4_export, tmp_path):
    uri, store = tracked
    mlflow.set_tracking_uri(uri)
    first, second, broken = (log(int4_export, "load") for _ in range(3))
    damage(next(folder for folder in store.rglob(source_of(broken)) if folder.is_dir()))
    champion(first)
    address = f"http://127.0.0.1:{free_port()}"
    command = ["entrypoints.serve", f"--model_uri={ALIAS}", f"--port={address.rpartition(':')[2]}", "--follow=1"]
    part = LOAD_SECONDS / 4
    # when the alias moved, when the server had followed, and the version that answers then
    moves = [(0.0, 0.0, f"bot/{first}")]
    with (
        (tmp_path / "log").open("w") as output,
        running_warm(command, f"{address}/health", output=output, MLFLOW_TRACKING_URI=uri),
        Clients(address, 8) as clients,
    ):
        time.sleep(part)
        for version in (second, broken, first):
            moved = time.time()
            champion(version)
            sign = (
                "slm_refused_versions_total" if version == broken else f'slm_served_version{{version="bot/{version}"}}'
            )
            assert wait_for(address, sign, 1, seconds=120)
            moves.append((moved, time.time(), f"bot/{second if version == broken else version}"))
            time.sleep(part)
        figures = [metric(address, name) for name in ("slm_refused_versions_total", sign)]
    said = (tmp_path / "log").read_text()
    mlflow.set_tracking_uri(None)
    assert clients.failed == [] and len(clients.answers) > 100, said
    for begin, named, header in clients.answers:
        past = [move for move in moves if move[0] <= begin]
        following = begin <= past[-1][1] and len(past) > 1
        allowed = {version for _, _, version in past[-2 if following else -1 :]}
        assert named == header and named in allowed, (named, allowed, said)
    assert {named for _, named, _ in clients.answers} == {f"bot/{first}", f"bot/{second}"}
    assert re.search(rf"warning: version {broken} is refused: models:/bot/{broken}: .*model.onnx.data", said), said
    assert figures == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What may happen on the way


@pytest.fixture(scope="module")
def server(tmp_path_factory, int4_export):
    """An MLflow server with three versions of the same model, behind a proxy."""
    folder = tmp_path_factory.mktemp("registry")
    options = f"--backend-store-uri={sqlite_store(folder)}", f"--artifacts-destination={folder / 'store'}"
    with serving(folder, *options) as uri, in_front_of(uri) as faults:
        mlflow.set_tracking_uri(uri)
        for _ in range(3):
            log(int4_export, "one by one")
        mlflow.set_tracking_uri(None)
        yield uri, faults


@pytest.fixture
def follower(server, monkeypatch):
    """What follows bot@champion, which is version 1 and is served. No thread looks by itself."""
    uri, faults = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(versions, "RETIRED_SECONDS", 0.3)
    faults.faults.clear()
    mlflow.set_tracking_uri(faults.uri)
    champion("1")
    served = versions.Served(versions.load(ALIAS), protocol.Limits(), several_keys=False)
    served.start()
    yield versions.Follower(served, versions.Alias(ALIAS, 3600, secret="a secret"))
    served.stop(10)
    mlflow.set_tracking_uri(uri)
    champion("1")
    mlflow.set_tracking_uri(None)


def figure(served: versions.Served, name: str) -> float:
    return served.metrics.registry.get_sample_value(name)


def test_a_moved_alias_is_followed_and_the_old_version_is_freed(follower, capsys):
    served, old = follower.served, weakref.ref(follower.served._now.model)
    follower.look()
    assert served.version == "bot/1" and capsys.readouterr() == ("", "")
    champion("2")
    follower.look()
    assert served.version == "bot/2" and served.names[:4] == ("bot", "bot/2", "bot@champion", ALIAS)
    out, err = capsys.readouterr()
    assert out.startswith("models:/bot@champion is version 2 now; loading it\nServing version 2, ") and err == ""
    for _ in range(100):
        if old() is None:
            break
        time.sleep(0.1)
    assert old() is None and len(served.metrics.workers) == 1


@pytest.mark.fault("serving: the registry is down")
def test_a_registry_that_is_down_leaves_the_version_that_answers(server, follower, capsys):
    champion("2")
    server[1].add("cut")
    for _ in range(2):
        follower.look()
    assert follower.served.version == "bot/1" and figure(follower.served, "slm_alias_failed_total") == 2
    err = capsys.readouterr().err
    assert err.startswith("warning: the registry can't be read: ") and err.endswith("; bot/1 goes on\n")
    assert err.count("\n") == 1
    server[1].faults.clear()
    follower.look()
    assert follower.served.version == "bot/2"


@pytest.mark.fault("serving: the alias is removed")
def test_a_removed_alias_leaves_the_version_that_answers(follower, capsys):
    mlflow.MlflowClient().delete_registered_model_alias("bot", "champion")
    for _ in range(2):
        follower.look()
    assert follower.served.version == "bot/1"
    assert capsys.readouterr().err == "warning: models:/bot@champion is not set any more; bot/1 goes on\n"


@pytest.mark.fault("serving: the served version is deleted")
def test_a_deleted_version_goes_on_answering(server, follower, int4_export):
    mlflow.set_tracking_uri(server[0])
    version = log(int4_export, "one by one")
    champion(version)
    follower.look()
    assert follower.served.version == f"bot/{version}"
    mlflow.MlflowClient().delete_model_version("bot", version)
    follower.look()
    assert follower.served.version == f"bot/{version}"
    versions.check_answer(follower.served._now.model)


@pytest.mark.fault("serving: a version's download is cut")
def test_a_download_that_is_cut_is_tried_again(server, follower, capsys):
    champion("2")
    server[1].add("cut", "GET", "model.onnx.data", range(1))
    follower.look()
    assert follower.served.version == "bot/1" and not follower._refused
    assert "models:/bot/2 can't be loaded yet: " in capsys.readouterr().err
    follower.look()
    assert follower.served.version == "bot/2"


@pytest.mark.fault("serving: the disk is full while a version is fetched")
def test_a_full_disk_leaves_the_version_that_answers(follower, monkeypatch, capsys, small_disk):
    champion("2")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(small_disk))
        follower.look()
    assert follower.served.version == "bot/1" and not follower._refused
    assert "models:/bot/2 can't be loaded yet: " in (err := capsys.readouterr().err) and "disk is full" in err
    assert not [*small_disk.rglob("*.onnx*")]
    follower.look()
    assert follower.served.version == "bot/2"


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_version_that_gives_no_proper_answer_is_refused_once_and_tagged(follower, monkeypatch, capsys):
    champion("3")
    looks, load = [], versions.load

    def loaded(*words):
        looks.append(1)
        made = load(*words)
        runtime = made.wrapper._runtime
        logits = runtime.next_logits
        monkeypatch.setattr(runtime, "next_logits", lambda *words: logits(*words) * math.nan)
        return made

    monkeypatch.setattr(versions, "load", loaded)
    for _ in range(2):
        follower.look()
    assert follower.served.version == "bot/1" and looks == [1]
    assert figure(follower.served, "slm_refused_versions_total") == 1
    err = capsys.readouterr().err
    reason = "its test answer has no token, or a token without a probability"
    assert err.endswith(f"warning: version 3 is refused: {reason}; bot/1 goes on\n")
    assert registry.version_tags("bot", "3")[tags.SERVE_REFUSED] in err


def test_a_version_that_mixes_tenants_is_refused_where_there_are_several_keys(follower, monkeypatch, capsys):
    champion("2")
    monkeypatch.setattr(follower.served, "several_keys", True)
    monkeypatch.setattr(type(follower.served._now.model), "separates_tenants", False)
    follower.look()
    assert follower.served.version == "bot/1"
    assert "version 2 is refused: model_uri: the model was logged by a version that serves" in capsys.readouterr().err


def test_without_memory_for_two_the_old_version_ends_first(follower, monkeypatch, capsys):
    champion("2")
    monkeypatch.setattr(versions, "_free_memory", lambda: 10 * 2**20)
    follower.look()
    assert follower.served.version == "bot/2"
    out = capsys.readouterr().out
    assert "models:/bot/2 needs about " in out and "10 MB are free: bot/1 ends first, and requests wait\n" in out
    assert re.search(r"Serving version 2, [\d.]+ s later; requests waited for [\d.]+ s\n$", out)


def test_a_version_that_fails_in_the_gap_gives_way_to_the_old_one(follower, monkeypatch, capsys):
    champion("3")
    monkeypatch.setattr(versions, "_free_memory", lambda: 10 * 2**20)
    refused, left, restore = [], [], follower._restore

    def refuse(model):
        refused.append(weakref.ref(model))
        raise BadInput("it says nothing")

    monkeypatch.setattr(follower, "_restore", lambda: left.append(refused[0]()) or restore())
    with monkeypatch.context() as patch:
        patch.setattr(versions, "check_answer", refuse)
        follower.look()
    assert left == [None]  # there is no memory for the refused model beside the old one
    assert follower.served.version == "bot/1"
    assert "warning: version 3 is refused: it says nothing; bot/1 goes on\n" in capsys.readouterr().err


def test_a_version_that_cannot_come_back_at_once_comes_back_at_a_later_look(server, follower, monkeypatch):
    champion("3")
    monkeypatch.setattr(versions, "_free_memory", lambda: 10 * 2**20)
    with monkeypatch.context() as patch:
        patch.setattr(versions, "check_answer", lambda model: server[1].add("cut", "GET", "model.onnx.data") or 1 / 0)
        follower.look()
    assert not follower.served.is_ready() and follower.served.version == "bot/1"
    server[1].faults.clear()
    follower.look()
    assert follower.served.is_ready() and follower.served.version == "bot/1"


def test_the_next_version_is_loaded_with_the_servers_settings(follower):
    alias = versions.Alias(ALIAS, 3600, settings={"batch_size": 7, "threads": 1})
    champion("2")
    versions.Follower(follower.served, alias).look()
    model = follower.served._now.model
    assert follower.served.version == "bot/2" and model.batch_size == 7
    assert model._runtime._session.get_session_options().intra_op_num_threads == 1


def test_mlflows_webhook_wakes_the_follower_and_nobody_elses(follower):
    from mlflow.webhooks.delivery import _generate_hmac_signature

    alias = versions.Alias(ALIAS, 3600, secret="a secret")
    app = http_app.build(versions.load(ALIAS), follows=alias)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        woken = app.state.follower._wake = threading.Event()

        def status(secret: str, body: str = '{"data": {}}', age: int = 0) -> int:
            stamp = str(int(time.time()) - age)
            signature = _generate_hmac_signature(secret, "7", stamp, body)
            headers = {"X-MLflow-Delivery-Id": "7", "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": signature}
            headers["Content-Type"] = "application/json"
            return client.post("/webhooks/mlflow", content=body, headers=headers).status_code

        assert [status("another"), status("a secret", age=600)] == [401, 401] and not woken.is_set()
        assert status("a secret") == 200 and woken.is_set()


def test_answers_name_their_version_in_each_form(follower):
    app = http_app.build(versions.load(ALIAS))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").json()["data"][0]["version"] == "bot/1"
        assert client.get("/health").json() == {"status": "ok", "model": "bot", "version": "bot/1"}
        asked = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
            "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
            "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
            "/tokenize": {"prompt": "Hi"},
        }
        for path, body in asked.items():
            told = client.post(path, json=body)
            assert told.headers["x-model-version"] == "bot/1"
            if "completions" in path:
                assert told.json()["system_fingerprint"] == "bot/1"
                streamed = client.post(path, json=body | {"stream": True})
                assert streamed.headers["x-model-version"] == "bot/1"
                assert '"system_fingerprint": "bot/1"' in streamed.text.splitlines()[0]
