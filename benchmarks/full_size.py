"""A model of Phi-3-mini's shape (3.8 B, random bf16 weights) through export, logging, loading and scoring.

    python -m benchmarks.full_size [cpu|cuda]

Random weights are honest for speed and memory, never for quality. Each phase runs in a process of its own, whose peak
memory is printed beside its seconds. Tokens per second, one prompt at a time, stand against the bytes that one token
reads (the weights) over the memory bandwidth measured here, which is the limit. Needs 20 GB of memory and 40 GB of disk
under the cache, and a quarter of an hour; with `cuda`, onnxruntime-genai-cuda in the place of onnxruntime-genai.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import logging_cost
from benchmarks.ratios import Row
from slm.base import cache

PHASES = """
import json, sys, time
from pathlib import Path
phase, provider, scratch = sys.argv[1:]
scratch = Path(scratch)
from slm.answers import loading
from slm.models import checkpoints, model_logging, onnx_export
from slm.prompts import prompt_sets
from slm.scorers.confined import CHECKS
from slm.tracking import mlflow_client
facts = {}
def checkpoint():
    return checkpoints.find(str(scratch / "phi-3-shaped")).fetch()
generation = {"max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
generation |= {"device": "cuda" if provider == "cuda" else "auto", "dtype": "bf16", "execution_provider": provider}
def log(name):
    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment(name, artifact_location=f"{scratch}/store"))
    found = checkpoint() if name == "pipeline" else onnx_export.export(checkpoint(), "int4", provider)
    with mlflow.start_run():
        if name == "onnx":
            return model_logging.log_onnx(found, "chat", generation, "int4").model_uri
        return model_logging.log_pipeline(found, generation).model_uri
def score(name):
    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    start = time.perf_counter()
    model = mlflow.pyfunc.load_model((scratch / f"{name}.uri").read_text())
    facts["load"] = time.perf_counter() - start
    rows = prompt_sets.read_prompt_set(Path("prompts/general.jsonl"), "general", CHECKS).prompts[:8]
    rows = [{"messages": list(row.messages), "max_tokens": 16} for row in rows]
    wrapper = model.unwrap_python_model()
    for label, batch_size in (("one", 1), ("together", 8)):
        start = time.perf_counter()
        count = sum(answer.output_tokens for _, [answer] in wrapper.answers(rows, batch_size=batch_size))
        facts[label] = count / (time.perf_counter() - start)
start = time.perf_counter()
if phase == "make":
    import shutil, torch
    from transformers import Phi3Config, Phi3ForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    source = checkpoints.find("smollm2-135m-instruct").fetch().folder
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    Phi3ForCausalLM(Phi3Config(vocab_size=49152, **ids)).save_pretrained(scratch / "phi-3-shaped")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, scratch / "phi-3-shaped" / name)
elif phase == "export":
    onnx_export.export(checkpoint(), "int4", provider)
elif phase.startswith("log"):
    (scratch / f"{phase.split()[1]}.uri").write_text(log(phase.split()[1]))
else:
    score(phase.split()[1])
facts["seconds"] = time.perf_counter() - start
import resource
usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
facts["peak"] = usage * 1024
print(json.dumps(facts))
"""


def bandwidth(provider: str) -> float:
    """Bytes per second that all threads together, or the GPU, read: the largest of 2 GB of numbers, best of five."""
    if provider == "cuda":
        import torch

        device = torch.ones(2**28, dtype=torch.float64, device="cuda")
        return max(device.nbytes / _seconds(lambda: device.max().item()) for _ in range(5))
    from concurrent.futures import ThreadPoolExecutor

    from slm.models.chat_model import physical_cores

    threads = physical_cores()
    data = np.ones(2**28, dtype=np.float64)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        return max(data.nbytes / _seconds(lambda: list(pool.map(np.max, parts))) for _ in range(5))


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(scratch: Path, provider: str) -> list[Row]:
    table = Table("phase", "seconds", "peak memory", "load, s", "tokens/s, one", "tokens/s, 8", title="Phi-3's shape")
    read, rows, found = bandwidth(provider), [], {}
    for phase in ("make", "export", "log onnx", "score onnx", "log pipeline", "score pipeline"):
        command = [sys.executable, "-c", PHASES, phase, provider, str(scratch)]
        place = cache.root() if phase == "make" else scratch / "cache"  # 3 GB that nobody wants later
        environment = os.environ | {"PHI3_MLFLOW_CACHE": str(place)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{phase}: {done.stderr[-2000:]}")
        facts = found[phase] = json.loads(done.stdout.splitlines()[-1])
        figures = [f"{facts[name]:.1f}" if name in facts else "" for name in ("load", "one", "together")]
        table.add_row(phase, f"{facts['seconds']:.0f}", f"{facts['peak'] / 1e9:.1f} GB", *figures)
    Console(width=120).print(table)
    checkpoint = sum(path.stat().st_size for path in (scratch / "phi-3-shaped").glob("*.safetensors"))
    peak = found["export"]["peak"] / checkpoint
    rows.append(Row("full size: export's peak memory", "the bf16 checkpoint's bytes", 1.5, (peak,), at_most=True))
    apart = scratch / "logging"
    apart.mkdir()
    rows += logging_cost.costs("pipeline, a user's", scratch / "phi-3-shaped", str(apart))
    weights = {"onnx": max(path.stat().st_size for path in (scratch / "store").rglob("*.data")), "pipeline": checkpoint}
    for name, size in weights.items():
        share = found[f"score {name}"]["one"] * size / read
        rows.append(Row(f"full size, {name}: bytes read per second, one prompt", "memory bandwidth", None, (share,)))
    return rows


if __name__ == "__main__":
    from benchmarks import ratios

    with tempfile.TemporaryDirectory(dir=cache.root()) as folder:
        ratios.show(measure(Path(folder), (sys.argv[1:] or ["cpu"])[0]))
