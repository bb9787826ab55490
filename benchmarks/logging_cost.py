"""What logging a model costs beside copying its files: bytes written, time, memory.

Each measurement, `cp` too, runs in a process of its own, into a local store beside the checkpoint. Before the clock
starts, all is imported, and the files were copied once and removed: the host of a virtual machine takes away what was
free for some seconds, and the page cache then is five times as slow to fill, for either side. Bytes are those the
process wrote (proc(5), io: wchar, which copy_file_range counts in too); memory is the peak above what was resident
before. Weights of the project's cache are linked, those of a user's folder copied: one such folder is the checkpoint
beside a file of 1.6 GB.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.ratios import Row, in_turn, ratios
from slm.base import cache
from slm.models import checkpoints, onnx_export

PROBE = """
import json, shutil, subprocess, sys, time
from pathlib import Path
from slm.answers import loading
from slm.base import cache
from slm.models import checkpoints, model_logging
from slm.tracking import mlflow_client
name, folder, scratch = sys.argv[1:]
mlflow = mlflow_client.quiet_mlflow()
mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
files = [path for path in Path(folder).iterdir()]
manifest = {path.name: cache.FileRecord("0" * 64, path.stat().st_size) for path in files}
checkpoint = checkpoints.Checkpoint(name, Path(folder), "benchmark", "", manifest)
generation = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
found = mlflow.get_experiment_by_name("logging")
experiment = found.experiment_id if found else mlflow.create_experiment("logging", artifact_location=f"{scratch}/store")
def written():
    return int(next(line for line in open("/proc/self/io") if line.startswith("wchar")).split()[1])
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
with mlflow.start_run(experiment_id=experiment):
    subprocess.run(["cp", "-rL", folder, f"{scratch}/before"], check=True)
    shutil.rmtree(f"{scratch}/before")
    loading.reset_peak_memory()
    before, bytes, start = resident(), written(), time.perf_counter()
    if name == "cp":
        subprocess.run(["cp", "-rL", folder, f"{scratch}/store"], check=True)
    elif name == "onnx":
        model_logging.log_onnx(checkpoint, "chat", generation, "fp32")
    else:
        model_logging.log_pipeline(checkpoint, generation)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, written() - bytes, loading.peak_memory_bytes() - before]))
"""


def measure() -> list[Row]:
    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    rows = []
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        large = Path(scratch) / "large"
        shutil.copytree(checkpoint.folder, large)
        with (large / "model-2.safetensors").open("wb") as file:
            for _ in range(24):
                file.write(os.urandom(2**20) * 64)
        folders = {
            "pipeline": checkpoint.folder,
            "pipeline, a user's": large,
            "onnx": onnx_export.export(checkpoint, "fp32", "cpu").folder,
        }
        probe(scratch, "pipeline", checkpoint.folder)  # makes the store's tables
        for name, folder in folders.items():
            rows += costs(name, folder, scratch)
    return rows


def costs(name: str, folder: Path, scratch: str) -> list[Row]:
    size = sum(path.stat().st_size for path in folder.iterdir())
    found: dict[str, list[tuple[float, int, int]]] = {name: [], "cp": []}

    def put(by: str) -> float:
        os.sync()  # neither side waits for what the other has left to the disk
        found[by].append(probe(scratch, by, folder, "user" in name))
        shutil.rmtree(f"{scratch}/store")
        return found[by][-1][0]

    turns = in_turn({by: lambda by=by: put(by) for by in found})
    logged = found[name]
    written = tuple(bytes / size for _, bytes, _ in logged)
    label = f"logging, {name}, {size / 1e9:.1f} GB"
    if name == "onnx":
        limit, against, unit, memory = 200, "", "MB", tuple(peak / 1e6 for *_, peak in logged)
    else:
        limit, against, unit, memory = 0.3, "its bytes", "", tuple(peak / size for *_, peak in logged)
    return [
        Row(f"{label}: time", "cp -r", 1.5, ratios(turns[name], turns["cp"]), at_most=True),
        Row(f"{label}: bytes written", "its bytes", 1.05, written, at_most=True),
        Row(f"{label}: peak memory", against, limit, memory, at_most=True, unit=unit),
    ]


def probe(scratch: str, name: str, folder: Path, users: bool = False) -> tuple[float, int, int]:
    command = [sys.executable, "-c", PROBE, name, str(folder), scratch]
    environment = os.environ | ({"PHI3_MLFLOW_CACHE": f"{scratch}/cache"} if users else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))
