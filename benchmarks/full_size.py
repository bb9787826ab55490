"""A model of Phi-3-mini's true shape (3.8 B, random bf16 weights) through export, logging, loading and scoring.

    python -m benchmarks.full_size [cpu|cuda] [FOLDER_OF_LLAMA_CPPS_PROGRAMS ggml-vocab-phi-3.gguf]

With llama.cpp's programs (llama-quantize, llama-bench, llama-batched-bench), the same weights go through them too.
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
    if name == "onnx":
        speeds(wrapper._runtime)
def speeds(runtime):
    from slm.models.chat_model import GREEDY, Row
    def run(rows, prompt, room):  # as llama-bench: random tokens, and no end; seconds to the first tokens, and after
        generator = __import__("random").Random(0)
        prompts = [[generator.randrange(100, 30000) for _ in range(prompt)] for _ in range(rows)]
        batch = [Row((number, 0), ids, GREEDY, room, 0) for number, ids in enumerate(prompts)]
        start, first, after = time.perf_counter(), None, 0
        for tokens in runtime.steps(batch):
            if first is not None:
                after += len(tokens)
            for place, token in tokens.items():
                batch[place].output.append(token)
                if len(batch[place].output) == room:
                    batch[place].end("length")
            if first is None and all(row.output for row in batch):
                first = time.perf_counter()
        return first - start, after / max(time.perf_counter() - first, 1e-9)
    run(1, 8, 2)
    for prompt in (512, 2048):
        facts[f"prompt of {prompt}"] = prompt / run(1, prompt, 1)[0]
    for rows in (1, 8, 32):
        facts[f"{rows} streams"] = run(rows, 16, 33)[1]
start = time.perf_counter()
if phase == "make":
    from benchmarks import phi3_shape
    phi3_shape.checkpoint(scratch / "phi-3-shaped", checkpoints.find("smollm2-135m-instruct").fetch().folder)
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


SPEEDS = ("prompt of 512", "prompt of 2048", "1 streams", "8 streams", "32 streams")
GOALS = {"prompt of 512": 1.0, "prompt of 2048": 1.0, "1 streams": 1.0, "8 streams": 1.2, "32 streams": 1.2}


def llama_cpp(scratch: Path, programs: Path, vocabulary: Path) -> dict[str, float]:
    """What llama.cpp does with the same weights: seconds of the quantizer to Q4_K_M, and tokens per second."""
    from benchmarks import phi3_shape
    from slm.models.chat_model import physical_cores

    threads = str(physical_cores())
    whole, quantized = scratch / "f16.gguf", scratch / "q4_k_m.gguf"
    phi3_shape.gguf(scratch / "phi-3-shaped", whole, vocabulary)

    def call(program: str, *words: str) -> str:
        return subprocess.run([programs / program, *words], check=True, capture_output=True, text=True).stdout

    facts = {"quantize": _seconds(lambda: call("llama-quantize", str(whole), str(quantized), "Q4_K_M", threads))}
    whole.unlink()
    facts["bytes"] = quantized.stat().st_size
    bench = ["-m", str(quantized), "-t", threads]
    found = json.loads(call("llama-bench", *bench, "-p", "512,2048", "-n", "32", "-r", "2", "-o", "json"))
    for entry in found:
        name = f"prompt of {entry['n_prompt']}" if entry["n_prompt"] else "1 streams"
        facts[name] = entry["avg_ts"]
    sizes = ["-c", "4096", "-npp", "16", "-ntg", "32", "-npl", "8,32", "--output-format", "jsonl"]
    for line in call("llama-batched-bench", *bench, *sizes).splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            facts[f"{entry['pl']} streams"] = entry["speed_tg"]
    quantized.unlink()
    return facts


def measure(scratch: Path, provider: str, peer: tuple[Path, Path] | None = None) -> list[Row]:
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
    peak = found["export"]["peak"] / 1e9
    rows.append(Row("full size: export's peak memory", "", 3.0, (peak,), at_most=True, unit="GB"))
    ours = found["score onnx"]
    theirs = llama_cpp(scratch, *peer) if peer else {}
    if theirs:
        share = found["export"]["seconds"] / theirs["quantize"]
        rows.append(Row("full size: export to int4", "llama-quantize, f16 to Q4_K_M", 1.0, (share,), at_most=True))
    for name in SPEEDS if "1 streams" in ours else ():
        if theirs:
            note = f"{ours[name]:.1f} and {theirs[name]:.1f} tokens/s"
            share = ours[name] / theirs[name]
            rows.append(Row(f"full size: {name}", "llama.cpp, Q4_K_M", GOALS[name], (share,), note=note))
        else:
            rows.append(Row(f"full size: {name}", "", None, (ours[name],), unit="tokens/s"))
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
        given = [*sys.argv[1:], "cpu"][:1]
        ratios.show(measure(Path(folder), given[0], (Path(sys.argv[2]), Path(sys.argv[3])) if sys.argv[3:] else None))
