"""From `mlflow run` in a warm environment to the first token, less what loading the model takes.

One prompt, one token, of a model that is logged already. The first token's time is that of the kept answer's file,
which is written as soon as there is one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.ratios import ROUNDS, Row
from slm.base import cache
from slm.models import checkpoints, onnx_export
from slm.tracking import mlflow_client


def measure(provider: str) -> list[Row]:
    mlflow = mlflow_client.quiet_mlflow()
    from slm.models import model_logging

    export = onnx_export.export(checkpoints.find("smollm2-135m-instruct").fetch(), "int4", provider)
    generation = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
        experiment = mlflow.create_experiment("start", artifact_location=f"{scratch}/store")
        with mlflow.start_run(experiment_id=experiment):
            uri = model_logging.log_onnx(export, "chat", generation, "int4").model_uri
        seconds = tuple(first_token(uri, experiment, Path(scratch), turn) for turn in range(ROUNDS + 1))[1:]
    return [Row("start: mlflow run to first token, less the model's load", "", 6, seconds, at_most=True, unit="s")]


def first_token(uri: str, experiment: str, scratch: Path, turn: int) -> float:
    import mlflow

    prompts, answers = scratch / f"{turn}.jsonl", scratch / f"cache-{turn}"
    prompts.write_text(json.dumps({"id": "one", "prompt": f"What comes after {turn}?", "expected": "x"}) + "\n")
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "-e", "evaluate"]
    command += [
        "--experiment-id",
        experiment,
        "-P",
        f"model_uris={uri}",
        "-P",
        f"prompts={prompts}",
        "-P",
        "max_tokens=1",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "PHI3_MLFLOW_CACHE": str(answers),
        "PATH": path,
    }
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    first = min(file.stat().st_mtime for file in (answers / "answers").rglob("*.jsonl"))
    runs = mlflow.search_runs([experiment], order_by=["start_time DESC"], max_results=2, output_format="list")
    load = next(run.data.metrics["model_load_seconds"] for run in runs if "model_load_seconds" in run.data.metrics)
    return first - start - load
