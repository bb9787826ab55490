"""The cache: its owner, its modes, and clones of its files."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from support.commands import REPOSITORY, call, entry_point

from slm.answers import kept_answers
from slm.base import cache
from slm.base.errors import BadInput
from slm.scorers import judges

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", str(folder))
    return folder


def filled() -> Path:
    """A folder of the cache, made now; beside it an answer, as a run leaves it."""
    folder, _ = cache.folder("thing", {}, lambda folder: (folder / "model.safetensors").write_text("weights"))
    with kept_answers.opened("of a test", "all") as kept:
        kept.add("asked", {"text": "a secret answer"}, 0.1)
    return folder


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder.parent).as_posix(): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.fault("cache: others read the answers, judgements and records in it")
def test_a_cache_is_open_to_its_user_alone(own_cache):
    folder = filled()
    judges._append_judgement(cache.private("judgements") / "x.jsonl", {"key": "x"})
    assert own_cache.stat().st_mode & 0o777 == 0o700
    found = modes(own_cache)
    made = {
        name: mode
        for name, mode in found.items()
        if name.startswith(f"cache/{folder.name}/") or name[6:] == folder.name
    }
    assert made == {f"cache/{folder.name}": 0o755, f"cache/{folder.name}/model.safetensors": 0o644}
    others = {name: mode for name, mode in found.items() if name not in made}
    assert {mode for name, mode in others.items() if "." in name} == {0o600}  # answers, judgements, records, locks
    assert {name: mode for name, mode in others.items() if "." not in name} == {
        "cache/answers": 0o700,
        "cache/judgements": 0o700,
    }


@pytest.mark.fault("cache: made by an earlier version, and readable for all")
def test_a_cache_that_others_may_read_is_shut(own_cache):
    (own_cache / "answers").mkdir(parents=True)
    own_cache.chmod(0o755)
    cache.check()
    assert own_cache.stat().st_mode & 0o777 == 0o700
    assert cache.private("answers").stat().st_mode & 0o777 == 0o700


@pytest.mark.fault("cache: filled by another user")
@as_root
@pytest.mark.parametrize("what", ["cache", "link", "cache/answers"])
def test_a_cache_of_another_user_is_refused_in_one_line(own_cache, tmp_path, what):
    if what == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        own_cache.symlink_to(tmp_path / "theirs")
        os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    else:
        filled()
        os.chown(tmp_path / what, NOBODY, NOBODY)
    with pytest.raises(BadInput) as caught:
        filled()
    place = own_cache.resolve() if what != "cache/answers" else own_cache / "answers"
    remedy = "set PHI3_MLFLOW_CACHE to a folder of your own"
    assert str(caught.value) == f"cache: {place} belongs to user {NOBODY}, and this is user 0; {remedy}"


@pytest.mark.fault("cache: others may write into it")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_cache_that_others_may_write_into_is_refused_in_one_line(own_cache, mode):
    filled()
    own_cache.chmod(mode)
    with pytest.raises(BadInput, match=rf"^cache: others may write into .* \(mode {mode:04o}\); delete it, or, .*"):
        filled()


@pytest.mark.fault("cache: refused on the command line before anything is loaded, exit 2")
def test_on_the_command_line_a_foreign_cache_is_one_line(own_cache, tmp_path):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    done = entry_point("evaluate", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: cache: others may write into")
    assert not (tmp_path / "mlflow.db").exists()


CLONES = """
import os, sys
from pathlib import Path
from slm.base import cache

folder, _ = cache.folder("thing", {}, lambda folder: (folder / "model.safetensors").write_bytes(os.urandom(90 * 2**20)))
source = folder / "model.safetensors"
places = [Path(f"model{number}.safetensors") for number in range(4)]
for place in places:
    cache.place(source, place)  # 450 MB in all, on a disk of 330
assert not any(place.samefile(source) for place in places)
with places[0].open("r+b") as file:
    file.write(b"changed")
assert len({cache.file_sha256(path) for path in (source, *places[1:])}) == 1
assert cache.file_sha256(places[0]) != cache.file_sha256(source)
"""


@pytest.mark.fault("cache: a write into a logged model's weights reaches the cache and other models (btrfs, XFS)")
@as_root
def test_weights_are_cloned_where_the_file_system_can(tmp_path):
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(330 * 2**20)
    if not shutil.which("mkfs.xfs"):
        pytest.skip("mkfs.xfs is not installed: apt-get install xfsprogs")
    assert call("mkfs.xfs", "-q", image).code == 0
    mounted = ["unshare", "--mount", "bash", "-euc", f'mount -o loop {image} {place}; cd {place}; exec "$@"', "bash"]
    if (probe := call(*mounted, "true")).code:
        pytest.skip(f"no loop device can be mounted: {probe.err.strip()}")
    done = call(
        *mounted, sys.executable, "-c", CLONES, PYTHONPATH=str(REPOSITORY), PHI3_MLFLOW_CACHE=str(place / "cache")
    )
    assert done.code == 0, done.err
