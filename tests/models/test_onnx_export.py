"""Exports as processes: what they write, what a kill leaves, two at once, and a full disk."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import REPOSITORY

from slm.base import cache
from slm.models import onnx_export

EXPORT = """
import sys
from slm.models import checkpoints, onnx_export
shares = []
found = onnx_export.export(checkpoints.find(sys.argv[1]).fetch(), sys.argv[2], "cpu", tell=shares.append)
assert shares == sorted(shares) and (not shares or shares[-1] == 1), shares
print(len(shares), found.folder)
"""


@pytest.fixture
def embedded(checkpoint, monkeypatch, tmp_path) -> Path:
    """The embedded model's folder. The cache is empty."""
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))
    return checkpoint.folder


def export(folder: Path, precision: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", EXPORT, str(folder), precision]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, **(pipes | options))


def test_two_exports_at_once_write_one_folder_and_no_file_as_large_as_fp32(embedded, tmp_path):
    largest = 2 * 10**8  # bytes; the weights have 135 million parameters

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    both = [export(embedded, "int4", preexec_fn=limit) for _ in "12"]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    (count, folder), (other_count, other) = (answer.split() for answer, _ in told)
    assert folder == other and sorted([int(count) > 100, int(other_count) > 100]) == [False, True]  # only one worked
    assert sum(path.stat().st_size for path in embedded.glob("*.safetensors")) > 2 * largest
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        Path(folder).name + suffix for suffix in ("", ".json", ".lock")
    }


@pytest.mark.fault("models: an export is killed")
def test_a_killed_export_ends_its_process_and_leaves_nothing_after_the_next_one(embedded, tmp_path, small_checkpoint):
    process = export(embedded, "int8")
    folder = wait_for(lambda: next((tmp_path / "cache").glob("*.building/model.onnx.data"), None)).parent
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(children) == 1
    wait_for(lambda: not Path(f"/proc/{children[0]}").exists())
    assert folder.exists() and not folder.with_suffix("").exists()
    done = export(small_checkpoint, "int4")
    assert done.communicate() and done.returncode == 0
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert not folder.exists() and left == {"", ".json", ".lock"}


def wait_for(found):
    end = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.fixture
def small_checkpoint(checkpoint, tmp_path) -> Path:
    import torch
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=49152, num_key_value_heads=2, eos_token_id=2, pad_token_id=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    transformers.AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.fault("models: the disk is too small for an export")
@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_a_disk_that_is_too_small_is_known_before_an_export_begins(embedded, tmp_path, precision):
    (tmp_path / "cache").mkdir(mode=0o700)
    mounted = f"mount -t tmpfs -o size=100m,mode=700 none {tmp_path / 'cache'}"
    script = f'{mounted} && exec "$@"'
    command = ["unshare", "--mount", "--map-root-user", "bash", "-c", script, "export"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk of its own")
    done = subprocess.run(
        [*command, sys.executable, "-c", EXPORT, str(embedded), precision],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    line = done.stderr.strip().splitlines()[-1]
    needed = {"int4": "0.2 GB", "fp32": "0.6 GB"}[precision]
    assert "Unavailable: model: " in line and f"can't be exported in {precision}: the export needs {needed}" in line
    assert line.endswith("set PHI3_MLFLOW_CACHE to a folder on another disk")


def test_an_export_is_never_larger_than_what_is_asked_of_the_disk(checkpoint, int4_export, int8_export, fp32_export):
    from safetensors import safe_open

    with safe_open(next(checkpoint.folder.glob("*.safetensors")), "numpy") as file:
        names = file.keys()
        weights = sum(file.get_tensor(name).size for name in names)
    for precision, found in {"int4": int4_export, "int8": int8_export, "fp32": fp32_export}.items():
        size = sum(record.size for record in cache.manifest_of(found.folder).values())
        assert size < onnx_export.BYTES_PER_WEIGHT[precision] * weights + onnx_export.SPARE_BYTES
