"""The main job against each kind of tracking server, from a git URL, and all of it read back.

The servers are real, on loopback, and started here: PostgreSQL from the machine's own binaries, S3 from moto. What
Databricks and Azure ML answer can't be tried without an account; that their addresses are understood can.
"""

import signal
import sys
from contextlib import ExitStack, contextmanager

import pytest
from support.commands import LINKS, REPOSITORY, call, entry_point, free_port, serving
from support.databases import database, sqlite_store, stopped_after, until
from support.project_runs import check_child, few_prompts, parent_and_children, run_from_git

pytestmark = pytest.mark.slow

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
AZURE = "azureml://eastus.api.azureml.ms/mlflow/v1.0/subscriptions/s/resourceGroups/g/providers/"
AZURE += "Microsoft.MachineLearningServices/workspaces/w"


@pytest.fixture(scope="module")
def postgresql():
    """A PostgreSQL that runs; gives the URI of an empty database."""
    with database() as (uri, running), running():
        yield uri


@pytest.fixture(scope="module")
def s3():
    """An S3 server with the bucket "mlflow"; gives a client and the settings that reach it."""
    import boto3

    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    settings = keys | {"MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    client = boto3.client(
        "s3",
        endpoint_url=settings["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with stopped_after(command, signal.SIGTERM) as process:
        until(lambda: process.poll() is None and reached(port), process)
        client.create_bucket(Bucket="mlflow")
        yield client, settings


def reached(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def signed_in(uri: str, user: str, password: str):
    """This process's MLflow as a user of a server with basic auth."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", user)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def with_auth(tmp_path_factory):
    """A server with basic auth that knows the user "ada", who is no admin; gives its URI."""
    from mlflow.server.auth.client import AuthServiceClient

    folder = tmp_path_factory.mktemp("auth")
    config = folder / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\nadmin_password = of-the-admin\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        "auth_cache_ttl_seconds = 60\n"  # without it, each request costs 0.2 s of password hashing
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-test"}
    store = f"--backend-store-uri={sqlite_store(folder)}", f"--artifacts-destination={folder}/store"
    with serving(folder, "--app-name=basic-auth", *store, **settings) as uri:
        with signed_in(uri, "admin", "of-the-admin"):
            AuthServiceClient(uri).create_user("ada", "of-ada-and-long")
        yield uri


@pytest.fixture(params=["sqlite", "postgresql", "s3", "basic-auth"])
def tracking_uri(request, tmp_path):
    """What MLFLOW_TRACKING_URI is set to, for each kind of server; credentials are in the environment."""
    kind, value = request.param, request.getfixturevalue
    folder = tmp_path / "server"
    folder.mkdir()
    with ExitStack() as stack:
        if kind == "sqlite":
            yield ""  # nothing is set: sqlite where `mlflow run` is called
        elif kind == "basic-auth":
            uri = value("with_auth")
            stack.enter_context(signed_in(uri, "ada", "of-ada-and-long"))
            yield uri
        else:
            store, settings = str(folder / "store"), {}
            if kind == "s3":
                store, settings = "s3://mlflow/artifacts", value("s3")[1]
            options = f"--backend-store-uri={value('postgresql')}", f"--artifacts-destination={store}"
            yield stack.enter_context(serving(folder, *options, **settings))


def test_a_run_from_a_git_url_is_read_back_whole(request, tracking_uri, git_server, tmp_path, monkeypatch):
    import mlflow

    kind = request.node.callspec.params["tracking_uri"]
    name, folder = f"model-{kind}", tmp_path / kind
    folder.mkdir()
    prompts = few_prompts(tmp_path)
    options = ("schema=chat", "precision=int8", "max_tokens=8", f"prompts={prompts}", f"registered_model_name={name}")
    done, experiment = run_from_git(git_server, tracking_uri, folder, "onnx", *options)
    assert done.code == 0, done.err

    uri = tracking_uri or f"sqlite:///{folder}/mlflow.db"
    gate = tmp_path / "gate.yaml"
    gate.write_text("rows_failed: {max: 0}\n")
    options = (f"--model_uris=models:/{name}/1", f"--prompts={prompts}", f"--thresholds={gate}", "--alias=champion")
    options += ("--max_tokens=8",)
    passed = entry_point("evaluate", *options, MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME=f"{experiment}-gate")
    assert passed.code == 0, passed.err
    assert f"{name}@champion is now version 1" in passed.out

    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    parent, children = parent_and_children(client, experiment)
    assert (parent.info.status, children["onnx int8"].info.status) == ("FINISHED", "FINISHED")
    assert parent.data.tags["mlflow.source.git.commit"] == git_server.commit
    assert parent.data.params["max_tokens"] == "8"
    logged, samples = check_child(client, children["onnx int8"], 8)  # metrics, tags, dataset, LoggedModel, artifacts
    version = client.get_model_version_by_alias(name, "champion")
    assert (str(version.version), version.source) == ("1", logged.model_uri)
    assert version.tags["model.sha256"] == children["onnx int8"].data.tags["model.sha256"]
    assert version.tags["gate"] == "pass"
    [answer] = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(QUESTION)
    [asked] = [sample for sample in samples if sample["id"] == "capitals-france"]
    assert "Paris" in answer["choices"][0]["message"]["content"] and "Paris" in asked["output"]

    if kind in ("postgresql", "s3"):
        import psycopg

        with psycopg.connect(request.getfixturevalue("postgresql")) as database:
            status = database.execute("SELECT status FROM runs WHERE run_uuid = %s", [parent.info.run_id]).fetchall()
        assert status == [("FINISHED",)]
    if kind == "s3":
        found = request.getfixturevalue("s3")[0].list_objects_v2(Bucket="mlflow", Prefix="artifacts")["Contents"]
        keys = {entry["Key"].rpartition("/")[2] for entry in found}
        assert {"MLmodel", "model.onnx.data", "samples.jsonl"} <= keys


@pytest.mark.parametrize(("user", "password"), [("ada", "wrong"), ("", "")])
def test_a_refused_user_is_one_line_and_exit_4_with_mlflows_own_retries(with_auth, user, password):
    credentials = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    settings = credentials | {"MLFLOW_TRACKING_URI": with_auth, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7"}
    done = entry_point("onnx", timeout=100, **settings)  # the retries alone would take 247 s
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(f"error: tracking store {with_auth} can't be used: ") and done.err.count("\n") == 1
    assert "401" in done.err


@pytest.mark.parametrize(
    ("uri", "code", "told"),
    [
        ("databricks", 4, "set DATABRICKS_HOST and DATABRICKS_TOKEN"),
        ("databricks://nobody", 4, "or name a profile"),
        (AZURE, 2, "it needs the package azureml-mlflow"),
        ("foo://server", 2, "unsupported URI 'foo://server'"),
        ("file:///nowhere/mlruns", 2, "maintenance mode"),
        ("sqlite:////proc/nowhere/mlflow.db", 4, "No such file or directory"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line(uri, code, told, tmp_path):
    done = entry_point("onnx", MLFLOW_TRACKING_URI=uri, HOME=str(tmp_path))
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("error: ") and told in done.err and done.err.count("\n") == 1


def test_no_line_shows_the_password_of_an_address():
    done = entry_point("onnx", MLFLOW_TRACKING_URI="http://ada:secret@127.0.0.1:1", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert done.code == 4 and "http://…@127.0.0.1:1" in done.err
    assert "secret" not in done.err + done.out


def test_azure_mls_address_is_taken_by_its_plugin_beside_our_mlflow(tmp_path):
    needs = REPOSITORY / "requirements-azureml.txt"
    install = (sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--target", tmp_path, "-r", needs)
    installed = call(*install, **LINKS)
    assert installed.code == 0, installed.err
    ask = "from mlflow.tracking._tracking_service.utils import _get_store as s; print(type(s()).__module__)"
    done = call(sys.executable, "-c", ask, PYTHONPATH=str(tmp_path), MLFLOW_TRACKING_URI=AZURE)
    assert done.out.startswith("azureml."), done.err
