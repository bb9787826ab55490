"""Describes the machine and the software of a run, as plain values for environment.json.

This module records the values, and slm/verdict/reproduction.py compares them. Three things are not recorded: the
load of the machine, clock rates, and accelerators that nvidia-smi does not list.
"""

import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from slm.base.errors import BadInput

REPOSITORY = Path(__file__).resolve().parents[2]
CPU_FLAGS = (  # onnxruntime and torch choose a kernel, and so the order of rounding, by these; x86, then Arm
    *("sse4_1", "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


CUDA_BUILDS = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-genai": "onnxruntime-genai-cuda"}


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for a block, and then restores their earlier values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def return_memory() -> None:
    """Gives the memory that was freed back to the system. glibc keeps it otherwise."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def check_cuda() -> None:
    """Checks that onnxruntime-genai can use a GPU of this machine.

    Raises:
        BadInput: there is no GPU, or the installed packages can't use it.
    """
    if not gpus():
        raise BadInput("execution_provider: 'cuda' needs an NVIDIA GPU, and nvidia-smi lists none; leave cpu")
    if installed_as("onnxruntime-genai") == "onnxruntime-genai":
        raise BadInput("execution_provider: 'cuda' needs onnxruntime's CUDA builds; requirements-cuda.txt says how")


@functools.cache
def describe() -> dict[str, Any]:
    """Machine, Python, installed packages, and this project's code, commit and constraints."""
    installed = {entry.metadata["Name"]: entry.version for entry in importlib.metadata.distributions()}
    needed = closure(map(installed_as, required(REPOSITORY / "requirements.txt")))
    packages = dict(sorted(installed.items(), key=lambda item: item[0].lower()))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_model": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus(),
        "code.sha256": code_sha256(REPOSITORY),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "constraints.sha256": hashlib.sha256((REPOSITORY / "constraints.txt").read_bytes()).hexdigest(),
        "needed": {name: version for name, version in packages.items() if canonicalize_name(name) in needed},
        "packages": packages,
    }


def code_sha256(folder: Path) -> str:
    """One hash over the paths and contents of this project's Python files. Other files do not change the hash."""
    files = sorted(path for name in ("slm", "entrypoints") for path in (folder / name).rglob("*.py"))
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def required(file: Path) -> list[str]:
    """The names in a requirements file."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line).name for line in lines if line and not line.startswith("-")]


def installed_as(name: str) -> str:
    """The installed name of a package. onnxruntime's CUDA builds have the same modules under other names."""
    other = CUDA_BUILDS.get(name)
    return other if other and _told(other) and not _told(name) else name


def version(name: str) -> str:
    """The installed version of a package, or of its CUDA build."""
    return importlib.metadata.version(installed_as(name))


def closure(names: Iterable[str]) -> dict[str, str]:
    """The versions of `names` and of all installed packages that `names` need, without extras."""
    found: dict[str, str] = {}
    waiting: list[str] = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found and (told := _told(name)):
            found[name] = told[0]
            waiting += told[1]
    return found


@functools.cache  # 100 packages take 0.05 s
def _told(name: str) -> tuple[str, tuple[str, ...]] | None:
    """A package's version, and the names of the packages that it needs. None if the package isn't installed."""
    try:
        told = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    needs = [Requirement(line) for line in told.get_all("Requires-Dist") or [] if "extra ==" not in line]
    met = (need for need in needs if not need.marker or need.marker.evaluate({"extra": ""}))
    return told["Version"], tuple(canonicalize_name(need.name) for need in met)


def differing(lines: Iterable[str]) -> list[str]:
    """The unmet lines of a requirements file, such as `torch==2.12.0 (2.13.0 here)` or `torch==2.12.0 (missing here)`.

    MLflow's own check reads the metadata of every installed package at each load, which takes a third of a second.
    """
    found = []
    for line in lines:
        with suppress(InvalidRequirement):  # the line is an option, or names no package
            need = Requirement(line)
            told = _told(installed_as(canonicalize_name(need.name)))
            if told is None or not need.specifier.contains(told[0], prereleases=True):
                found.append(f"{need} ({told[0] if told else 'missing'} here)")
    return found


def gpus_of(listed: str, told: str) -> list[dict[str, str]]:
    """GPUs from nvidia-smi's CSV (name, driver, memory). Only nvidia-smi's long form has the CUDA version."""
    cuda = re.search(r"CUDA Version\s*:\s*(\S+)", told)
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") == 2]
    return [
        {"name": name, "driver": driver, "memory": memory, "cuda": cuda[1] if cuda else ""}
        for name, driver, memory in rows
    ]


def gpus() -> list[dict[str, str]]:
    """The NVIDIA GPUs of this machine that nvidia-smi lists."""
    listed = _said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return gpus_of(listed, _said("nvidia-smi", "-q")) if listed else []


def _git(*words: str) -> str:
    """The output of a git command in this repository; "" without a repository or without git."""
    return _said("git", "-C", str(REPOSITORY), *words)


def _said(*command: str) -> str:
    """The output of a program; "" if the program is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    return next(iter(_cpu_lines("model name")), "") or platform.processor() or platform.machine()


def _cpu_model() -> str:
    """Family, model and stepping. `Intel(R) Xeon(R) Processor` is the name of several kinds. "" on Arm."""
    found = {name: _cpu_lines(name)[:1] for name in ("cpu family", "model", "stepping")}
    return ", ".join(f"{name} {value}" for name, values in found.items() for value in values)


def _cpu_flags() -> list[str]:
    words = next(iter(_cpu_lines("flags") or _cpu_lines("Features")), "").split()
    return sorted({*CPU_FLAGS} & {*words})


def _cpu_lines(name: str) -> list[str]:
    """The values of a name in /proc/cpuinfo. Empty if the file does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
