"""What a run ran on and with, as plain values for environment.json.

Recorded, not judged: whether two runs can be compared byte by byte is for the reader of both files. GPUs are not
listed yet.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def describe() -> dict:
    """Machine, Python, installed packages, and this project's commit and constraints."""
    constraints = REPOSITORY / "constraints.txt"
    packages = {entry.metadata["Name"]: entry.version for entry in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "constraints.sha256": hashlib.sha256(constraints.read_bytes()).hexdigest(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(*words: str) -> str:
    """What git says of this repository; "" where this is none, or git is not there."""
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
