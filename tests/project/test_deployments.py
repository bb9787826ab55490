"""Deployments: the files in deployments/ before their platforms' own validators, and what the images do.

There is no container engine, no cluster and no cloud: the steps of each Dockerfile run in a folder, as plain processes.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.commands import REPOSITORY, call, free_port, python_with, running
from support.databases import database
from support.effort import LONG
from support.questions import GENERATION

DEPLOYMENTS = REPOSITORY / "deployments"

# Fields that KServe adds to a pod's (v1beta1, the models of PyPI's kserve 0.21). The others go to Kubernetes' schema.
KSERVE_SPEC = {"predictor", "transformer", "explainer"}
KSERVE_COMPONENT = {
    "annotations",
    "autoScaling",
    "batcher",
    "canaryTrafficPercent",
    "containerConcurrency",
    "deploymentStrategy",
    "labels",
    "logger",
    "maxReplicas",
    "minReplicas",
    "scaleMetric",
    "scaleMetricType",
    "scaleTarget",
    "timeout",
}

AZURE = "azure-ai-ml==1.35.2"
LOADED = """
import sys
from azure.ai.ml import load_online_deployment, load_online_endpoint
(load_online_endpoint if "endpoint" in sys.argv[1].rsplit("/", 1)[1] else load_online_deployment)(source=sys.argv[1])
"""
azure = pytest.mark.skipif(not LONG, reason="PHI3_MLFLOW_TESTS=long installs Azure's package, which takes minutes")


# The files


@pytest.fixture(scope="session")
def azure_python():
    """A Python with Azure ML's loader, whose pins go with none of ours."""
    return python_with(AZURE.replace("==", "-"), AZURE)


def azure_loader(file: Path, request) -> str:
    return complaint(call(request.getfixturevalue("azure_python"), "-c", LOADED, file, PYTHONPATH=""))


def kubernetes(file: Path, request) -> str:
    return complaint(call("kubernetes-validate", "--strict", file))


def json_schema(schema: str):
    return lambda file, request: complaint(call("check-jsonschema", "--builtin-schema", schema, file))


def kserve(file: Path, request) -> str:
    """KServe's own fields by their names; the rest of the predictor as the spec of a pod, by Kubernetes' schema."""
    service = yaml.safe_load(file.read_text("utf-8"))
    if (service["apiVersion"], service["kind"]) != ("serving.kserve.io/v1beta1", "InferenceService"):
        return "not an InferenceService of v1beta1"
    unknown = set(service) - {"apiVersion", "kind", "metadata", "spec"} | set(service["spec"]) - KSERVE_SPEC
    if unknown or "predictor" not in service["spec"]:
        return f"unknown fields {sorted(unknown)}, or no predictor"
    predictor = service["spec"]["predictor"]
    own = {name: predictor.pop(name) for name in list(predictor) if name in KSERVE_COMPONENT}
    numbers = {"minReplicas", "maxReplicas", "timeout", "canaryTrafficPercent", "containerConcurrency", "scaleTarget"}
    wrong = sorted(name for name in numbers & set(own) if type(own[name]) is not int)
    if wrong:
        return f"not a whole number: {wrong}"
    pod = file.with_name("pod.yaml")
    pod.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": predictor}))
    return complaint(call("kubernetes-validate", "--strict", pod))


def shell(file: Path, request) -> str:
    return complaint(call("sh", "-n", file))


def dockerfile(file: Path, request) -> str:
    """The steps can be parsed, are known to Docker, copy what is there, and end as a user who is not root."""
    try:
        steps = steps_of(file.read_text("utf-8"))
    except ValueError as error:
        return str(error)
    missing = [
        word
        for name, text in steps
        if name == "COPY"
        for word in shlex.split(text)[:-1]
        if not word.startswith("--") and not (REPOSITORY / word).exists()
    ]
    users = [text for name, text in steps if name == "USER"]
    return f"missing {missing}" if missing else "" if users[-1:] == ["1000:1000"] else "runs as root"


def complaint(done) -> str:
    return f"exit code {done.code}\n{done.out}{done.err}" if done.code else ""


@dataclass(frozen=True)
class DeploymentFile:
    """What a file of deployments/ is held to."""

    validator: Callable[..., str]  # of a file and pytest's request: its complaint; "" where it accepts
    typos: tuple[tuple[str, str], ...]  # text that is there once, and what is refused in its place
    marks: tuple = ()


FILES = {
    "Dockerfile.serve": DeploymentFile(
        dockerfile,
        (
            ("HEALTHCHECK --interval", "HEALTCHECK --interval"),
            ("USER 1000:1000", "USER root"),
            ("COPY slm/", "COPY slim/"),
        ),
    ),
    "Dockerfile.evaluate": DeploymentFile(
        dockerfile, (("ENTRYPOINT", "ENTRYPIONT"), ("USER 1000:1000", "USER root"), ("COPY gates/", "COPY gate/"))
    ),
    "compose.yaml": DeploymentFile(
        json_schema("vendor.compose-spec"),
        (
            ("read_only:", "readonly:"),
            ("retries: 12", "retrys: 12"),
            ("profiles: [evaluate]", "profiles: evaluate"),
            ("dockerfile_inline:", "dockerfile_in_line:"),
        ),
    ),
    "kubernetes.yaml": DeploymentFile(
        kubernetes,
        (
            ("startupProbe:", "startUpProbe:"),
            ("targetPort: http", "targetport: http"),
            ("averageUtilization:", "averageUtilisation:"),
            ("minAvailable: 1", "minAvailible: 1"),
        ),
    ),
    "kserve.yaml": DeploymentFile(
        kserve,
        (
            ("maxReplicas: 4", "maxReplica: 4"),
            ("minReplicas: 1", "minReplicas: one"),
            ("readinessProbe:", "readynessProbe:"),
            ("  predictor:", "  predicter:"),
            ("serving.kserve.io/v1beta1", "serving.kserve.io/v1"),
        ),
    ),
    "github-workflow.yaml": DeploymentFile(
        json_schema("vendor.github-workflows"),
        (("needs: gate", "need: gate"), ("timeout-minutes: 30", "timeout-minuts: 30")),
    ),
    "azureml-endpoint.yaml": DeploymentFile(azure_loader, (("auth_mode:", "auth_mod:"),), (azure,)),
    "azureml-blue.yaml": DeploymentFile(
        azure_loader,
        (("liveness_probe:", "livenes_probe:"), ("instance_count: 1", "instance_count: one")),
        (azure,),
    ),
    "azureml-green.yaml": DeploymentFile(azure_loader, (("scoring_route:", "scoreing_route:"),), (azure,)),
    "azureml-shift.sh": DeploymentFile(shell, (("esac", "easc"),)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=file.marks) for name, file in FILES.items()])
def test_each_file_passes_its_own_validator_and_each_typo_fails_it(tmp_path, request, name):
    file, text = FILES[name], (DEPLOYMENTS / name).read_text("utf-8")
    (tmp_path / name).write_text(text)
    assert file.validator(tmp_path / name, request) == ""
    for right, wrong in file.typos:
        assert text.count(right) == 1, right
        (tmp_path / name).write_text(text.replace(right, wrong))
        assert file.validator(tmp_path / name, request) != "", wrong


def test_every_file_in_deployments_is_validated():
    assert {path.name for path in DEPLOYMENTS.iterdir()} == set(FILES)


def test_the_workflow_deploys_only_after_a_gate_with_parameters_that_there_are():
    from slm.base.parameters import PARAMETERS

    jobs = yaml.safe_load((DEPLOYMENTS / "github-workflow.yaml").read_text("utf-8"))["jobs"]
    assert jobs["deploy"]["needs"] == "gate" and "if" not in jobs["deploy"]
    [command] = [step["run"] for step in jobs["gate"]["steps"] if step.get("name") == "Evaluate"]
    asked = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    assert set(asked) <= {parameter.name for parameter in PARAMETERS if "evaluate" in parameter.entry_points}
    assert asked["alias"] == "champion" and (REPOSITORY / asked["thresholds"]).is_file()


def test_blue_and_green_are_the_endpoint_s_and_differ_in_the_version_alone():
    read = {
        name: yaml.safe_load((DEPLOYMENTS / f"azureml-{name}.yaml").read_text("utf-8"))
        for name in ("endpoint", "blue", "green")
    }
    assert {read[name].pop("name") for name in ("blue", "green")} == {"blue", "green"}
    versions = {read[name]["environment_variables"].pop("MODEL_URI") for name in ("blue", "green")}
    assert versions == {"models:/phi3/1", "models:/phi3/2"}
    assert read["blue"] == read["green"] and read["blue"]["endpoint_name"] == read["endpoint"]["name"]


@pytest.mark.parametrize(
    ("words", "code", "traffic"),
    [
        (("blue", "green", "10"), 0, "blue=90 green=10"),
        (("green", "blue", "100"), 0, "green=0 blue=100"),
        (("blue", "green", "101"), 2, ""),
        (("blue", "green", "ten"), 2, ""),
    ],
)
def test_the_traffic_shift_gives_shares_that_add_up_to_100_and_refuses_others(tmp_path, words, code, traffic):
    (tmp_path / "az").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')  # prints the command
    (tmp_path / "az").chmod(0o755)
    done = subprocess.run(
        ["sh", str(DEPLOYMENTS / "azureml-shift.sh"), *words],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    expected = f"ml\nonline-endpoint\nupdate\n--name\nphi3-serve\n--traffic\n{traffic}\n"
    assert done.stdout == (expected if code == 0 else "")
    assert ("must be a number from 0 to 100" in done.stderr) == (code == 2)


# What the images do

INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
INSTRUCTIONS |= {"CMD", "ENTRYPOINT"}


def steps_of(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their text, in order; lines that go on are joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", text).replace("\\\n", " ")
    steps = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]
    unknown = [name for name, _ in steps if name not in INSTRUCTIONS]
    if unknown:
        raise ValueError(f"unknown instructions: {unknown}")
    for name, rest in steps:
        if name in ("CMD", "ENTRYPOINT"):
            json.loads(rest)
    return steps


@dataclass
class Image:
    """What the steps of a Dockerfile leave, in a folder in the place of `/`.

    Not run: FROM (this environment's Python stands in), useradd, and the installation of the packages (this
    environment stands in as .venv). The steps that copy and make folders are run, and processes start as the image's
    user if the tests run as root and this user can start this environment's Python.
    """

    folder: Path
    environment: dict[str, str]
    workdir: Path
    user: dict
    command: list[str]
    entry: list[str]
    health: list[str]

    def start(self, *words: str, output=None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.entry, *(words or self.command)],
            cwd=self.workdir,
            env=self.environment | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **self.user,
        )

    def healthy(self, **environment: str) -> bool:
        variables = self.environment | environment
        return (
            subprocess.run(self.health, cwd=self.workdir, env=variables, capture_output=True, **self.user).returncode
            == 0
        )


def built(name: str, folder: Path) -> Image:
    image, skipped, owned = Image(folder, {}, folder, {}, [], [], []), [], []

    def inside(text: str) -> str:
        return re.sub(r"/(opt|var/cache)/phi3-mlflow", lambda found: f"{folder}{found[0]}", text)

    for step, text in steps_of((DEPLOYMENTS / name).read_text("utf-8")):
        if step == "WORKDIR":
            image.workdir = Path(inside(text))
            image.workdir.mkdir(parents=True)
        elif step == "COPY":
            *sources, target = shlex.split(text)
            for source in sources:
                kept = shutil.ignore_patterns("__pycache__")
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, image.workdir / target, ignore=kept)
                else:
                    shutil.copy(REPOSITORY / source, image.workdir / target)
        elif step == "ENV":
            image.environment |= dict(word.split("=", 1) for word in shlex.split(inside(text)))
        elif step == "RUN":
            for command in text.split("&&"):
                words = shlex.split(inside(command))
                if words[0] == "install":
                    owner = [word for word in words if word not in ("-o", "-g", "phi3")]
                    subprocess.run(owner, check=True)
                    owned.append(words[-1])
                elif words[1:3] == ["-m", "venv"]:
                    (image.workdir / words[3]).symlink_to(sys.prefix)
                else:
                    skipped.append(words[0])
                    if words[0].endswith("pip"):
                        assert words[1:] == ["install", "--no-cache-dir", "--require-hashes", "-r", "locked.txt"]
                        assert (image.workdir / "locked.txt").is_file()
        elif step == "USER":
            number = int(text.split(":")[0])
            wanted = {"user": number, "group": number, "extra_groups": []}
            start = ["/bin/sh", "-c", f"exec {shlex.quote(sys.executable)} -c 'import mlflow.version'"]
            possible = os.geteuid() == 0 and not subprocess.call(start, cwd="/", stderr=subprocess.DEVNULL, **wanted)
            image.user = wanted if possible else {}
            for path in owned if possible else ():
                os.chown(path, number, number)
        elif step == "HEALTHCHECK" and text != "NONE":
            image.health = json.loads(text.partition("CMD ")[2])
        elif step == "CMD":
            image.command = json.loads(text)
        elif step == "ENTRYPOINT":
            image.entry = json.loads(text)
    assert skipped == ["useradd", ".venv/bin/pip"]
    return image


@pytest.fixture(scope="module")
def tracking(int4_export, tmp_path_factory):
    """The server of compose.yaml on PostgreSQL, with phi3 version 1 as its champion and challenger; gives its URI."""
    import mlflow

    from slm.models import model_logging

    folder, port = tmp_path_factory.mktemp("tracking"), free_port()
    command = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text("utf-8"))["services"]["mlflow"]["command"]
    there = "postgresql+psycopg://mlflow:${POSTGRES_PASSWORD}@postgres:5432/mlflow"
    with database() as (uri, up), up(), (folder / "log").open("w") as log:
        here = {there: uri.replace("postgresql:", "postgresql+psycopg:"), "/artifacts": str(folder / "artifacts")}
        here |= {
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={port}",
            "127.0.0.1:5000": f"127.0.0.1:{port}",
        }
        line = "\n".join(command)
        for old, new in here.items():
            assert line.count(old) == 1, old
            line = line.replace(old, new)
        words = [sys.executable, "-m", *line.replace("--workers=2", "--workers=1").split("\n")]
        address = f"http://127.0.0.1:{port}"
        with running(words, f"{address}/health", folder, log, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
            mlflow.set_tracking_uri(address)
            with mlflow.start_run(experiment_id=mlflow.create_experiment("phi3-evaluate")):
                info = model_logging.log_onnx(int4_export, "chat", GENERATION, "int4")
            mlflow.register_model(info.model_uri, "phi3")
            for alias in ("champion", "challenger"):
                mlflow.MlflowClient().set_registered_model_alias("phi3", alias, "1")
            yield address
            mlflow.set_tracking_uri(None)


@pytest.fixture
def root():
    """A folder that the image's user can enter; pytest's own can't be entered by others."""
    folder = Path(tempfile.mkdtemp(prefix="phi3-mlflow-image-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("host", "status"), [("mlflow:5000", 200), ("localhost:5000", 200), ("example.com", 403)])
def test_compose_s_tracking_server_answers_under_its_names_alone(tracking, host, status):
    asked = urllib.request.Request(f"{tracking}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host})
    try:
        with urllib.request.urlopen(asked) as answer:
            assert answer.status == status
    except urllib.error.HTTPError as error:
        assert error.code == status


@pytest.mark.slow
def test_the_serving_image_becomes_healthy_answers_and_ends_on_sigterm(tracking, root):
    image = built("Dockerfile.serve", root)
    assert not [path for path in root.rglob("*") if path.suffix in (".onnx", ".data", ".safetensors", ".gguf")]
    variables = {"PORT": str(free_port()), "MLFLOW_TRACKING_URI": tracking, "PHI3_MLFLOW_API_KEY": "a-key-of-a-client"}
    variables |= {"ALLOWED_HOSTS": "serve", "SERVE_OPTIONS": "--threads=1 --access_log=stderr"}
    assert not image.healthy(**variables)
    log = root / "log"
    with log.open("w") as output:
        process = image.start(output=output, **variables)
        try:
            for _ in range(600):
                if image.healthy(**variables):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            else:
                raise AssertionError(log.read_text())
            if image.user:
                status = Path(f"/proc/{process.pid}/status").read_text()
                assert re.search(r"^Uid:\s+1000\s+1000", status, re.MULTILINE)
            question = {"model": "phi3", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            headers = {"Content-Type": "application/json", "Authorization": "Bearer a-key-of-a-client", "Host": "serve"}
            address = f"http://127.0.0.1:{variables['PORT']}/v1/chat/completions"
            asked = urllib.request.Request(address, json.dumps(question).encode(), headers)
            with urllib.request.urlopen(asked) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] >= 1
        finally:
            process.send_signal(signal.SIGTERM)  # to this process alone, as an engine sends it
            code = process.wait(60)
    assert code in (0, 128 + signal.SIGTERM), log.read_text()
    assert '"path": "/v1/chat/completions", "status": 200' in log.read_text()
    assert not image.healthy(**variables)


@pytest.mark.slow
def test_the_serving_image_without_a_key_refuses_to_start(tracking, root):
    image = built("Dockerfile.serve", root)
    process = image.start(output=subprocess.PIPE, PORT=str(free_port()), MLFLOW_TRACKING_URI=tracking)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and b"set PHI3_MLFLOW_API_KEY, or write open_to_all=true" in out


@pytest.mark.slow
def test_the_evaluating_image_runs_its_command_and_evaluates_a_version_of_the_registry(tracking, root):
    image = built("Dockerfile.evaluate", root)
    process = image.start(output=subprocess.PIPE, MLFLOW_TRACKING_URI=tracking)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out.decode()  # the challenger is the champion: nothing to do
    words = ("--model_uris=models:/phi3/1", "--prompts=prompts/smoke.jsonl", "--max_tokens=4", "--traces=false")
    process = image.start(*words, output=subprocess.PIPE, MLFLOW_TRACKING_URI=tracking)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and b"gate: none" in out, out.decode()
