"""Deployments: the files in deployments/ before their platforms' own validators, and what the images do.

There is no container engine, no cluster and no cloud: the steps of each Dockerfile run in a folder, as plain processes.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.commands import REPOSITORY, call

DEPLOYMENTS = REPOSITORY / "deployments"

# Fields that KServe (v1beta1, the models of PyPI's kserve 0.21) adds to a pod's. The pod's own fields go to Kubernetes' schema.
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


# The files


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
