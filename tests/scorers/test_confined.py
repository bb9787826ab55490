"""The child process that bounds a call: what it answers, how it is ended, and whom it belongs to."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from support.commands import REPOSITORY

from slm.models import chat_model
from slm.models.chat_model import CallFailed, Confined

PROGRAM = """
import os, time
held = []

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return "burnt"

def hold(size):
    held.append(bytearray(size))
    return len(held)

def crash():
    if len(held):
        os.kill(os.getpid(), 11)
    held.append(1)

FUNCTIONS = {
    "same": (lambda value: value, [0]),
    "pid": (os.getpid, []),
    "session": (lambda: os.getsid(0), []),
    "print": (lambda text: os.write(1, text.encode()) and print(text), ["x"]),
    "sleep": (time.sleep, [0]),
    "burn": (burn, [0]),
    "slow to import": (lambda seconds: burn(seconds), [1.5]),
    "hold": (hold, [1]),
    "crash": (crash, []),
    "divide": (lambda a, b: a / b, [1, 1]),
}
"""


@pytest.fixture
def confined():
    made = Confined(PROGRAM, 1, 2**28)
    yield made
    made._end()


def is_there(pid: int) -> bool:
    """Whether a process is there, a zombie included."""
    return Path(f"/proc/{pid}").exists()


def wait_until(true, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize("value", [None, 1.5, "a\nb", "\ud800\0\u2028", ["x" * 3_000_000], {"a": [True, 10**30]}])
def test_arguments_and_answers_come_through_as_they_are(confined, value):
    assert confined.call("same", value) == value


def test_what_a_library_prints_is_no_answer(confined):
    confined.call("print", '{"answer": 1}\n')
    assert confined.call("same", 2) == 2


def test_an_exception_is_a_reason_in_one_line_and_the_child_goes_on(confined):
    pid = confined.call("pid")
    with pytest.raises(CallFailed, match=r"^failed: ZeroDivisionError: division by zero$"):
        confined.call("divide", 1, 0)
    with pytest.raises(CallFailed, match=r"^failed: KeyError: 'unknown'$"):
        confined.call("unknown")
    assert confined.call("pid") == pid


def test_too_much_processor_time_ends_the_call_and_leaves_no_zombie(confined):
    pid = confined.call("pid")
    with pytest.raises(CallFailed, match=r"^took more than 1 s of processor time$"):
        confined.call("burn", 3600)
    assert not is_there(pid)
    assert confined.call("same", 1) == 1


def test_each_call_has_the_whole_time(confined):
    for _ in range(3):
        assert confined.call("burn", 0.6) == "burnt"


def test_time_in_which_a_call_waits_does_not_count(confined):
    assert confined.call("sleep", 1.5) is None


def test_what_the_first_call_imports_does_not_count(confined):
    assert confined.call("slow to import", 0) == "burnt"


def test_too_much_memory_ends_the_call(confined):
    with pytest.raises(CallFailed, match=r"^took more than 256 MiB of memory$"):
        confined.call("hold", 2**29)
    assert confined.call("hold", 2**20) == 2  # another child: its first call held one, too


def test_a_call_does_not_fail_for_what_earlier_calls_left_behind(confined):
    assert [confined.call("hold", 100 * 2**20) for _ in range(4)] == [2, 3, 2, 3]


def test_a_crash_is_named(confined):
    with pytest.raises(CallFailed, match=r"^ended its process with SIGSEGV$"):
        confined.call("crash")


def test_a_child_that_was_killed_between_two_calls_is_replaced(confined):
    os.kill(confined.call("pid"), signal.SIGKILL)
    assert confined.call("same", 1) == 1


def test_many_threads_get_their_own_answers(confined):
    found = {}

    def ask(start: int) -> None:
        found[start] = [confined.call("same", number) for number in range(start, start + 100)]

    threads = [threading.Thread(target=ask, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: list(range(start, start + 100)) for start in range(0, 8000, 1000)}


class Asked(BaseException):
    pass


def test_a_signal_in_the_middle_of_a_call_gets_through_and_the_next_answer_is_its_own(confined):
    def stop(number, frame):
        raise Asked

    pid, before = confined.call("pid"), signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Asked):
            confined.call("sleep", 3600)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not is_there(pid)
    assert confined.call("same", "mine") == "mine"


def test_the_child_gets_no_signal_of_a_terminal(confined):
    assert confined.call("session") == confined.call("pid")


FORK = """
import os, sys
from slm.models.chat_model import Confined
confined = Confined("import os; FUNCTIONS = {'pid': (os.getpid, [])}", 1, 2**28)
first = confined.call("pid")
forked = os.fork()
if not forked:
    own = confined.call("pid")
    os._exit(own == first)
_, status = os.waitpid(forked, 0)
sys.exit(status or confined.call("pid") != first)
"""


def test_a_forked_process_has_a_child_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


OWNER = """
import atexit, sys, threading, time
atexit.register(time.sleep, 1)  # after the child was ended, the thread that called it goes on for a while
from slm.models.chat_model import Confined
how, mark = sys.argv[1:]
program = "import time; FUNCTIONS = {'sleep': (time.sleep, [0])}"
confined = Confined(f"{program} # {mark}", 1, 2**28)
confined.call("sleep", 0)
print("started", flush=True)
if how == "idle":
    time.sleep(3600)
threading.Thread(target=confined.call, args=("sleep", 1 if how == "busy" else 3600), daemon=True).start()
time.sleep(3600 if how == "busy" else 1)
"""


def marked(mark: str) -> list[str]:
    """The processes that have a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += [entry.parent.name] * (mark.encode() in entry.read_bytes())
    return found


@pytest.mark.parametrize("how", ["idle", "busy", "leaves"])
def test_the_child_ends_with_its_parent_however_that_ends(how):
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", OWNER, how, mark]
    owner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "started\n"
        assert len(marked(mark)) == 2
        if how != "leaves":
            owner.kill()
        owner.wait(60)
        assert wait_until(lambda: not marked(mark))
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_the_wrapper_renders_where_its_file_was_alone_and_is_gone(tmp_path, place, monkeypatch):
    """As a logged model is loaded: under another name, in a folder that may be temporary."""
    alone = tmp_path / "alone"
    alone.mkdir()
    file = alone / "wrapper_alone.py"
    shutil.copy(chat_model.__file__, file)
    shutil.copytree(Path(chat_model.__file__).parent / "chat_parts", alone / "chat_parts")
    if place == "zip":
        with zipfile.ZipFile(alone / "code.zip", "w") as archive:
            for path in (file, *(alone / "chat_parts").glob("*.py")):
                archive.write(path, path.relative_to(alone))
        file.unlink()
        shutil.rmtree(alone / "chat_parts")
        monkeypatch.syspath_prepend(str(alone / "code.zip"))
        spec = importlib.util.find_spec("wrapper_alone")
    else:
        spec = importlib.util.spec_from_file_location("wrapper_alone", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "wrapper_alone", module)
    spec.loader.exec_module(module)
    shutil.rmtree(alone)
    monkeypatch.chdir(tmp_path)
    try:
        text = module.render(TEMPLATE, {"bos_token": "<s>"}, [{"role": "user", "content": "Hi"}])
        assert text == "<s>user: Hi\n"
        with pytest.raises(module.Refused, match="division by zero"):
            module.render("{{ 1/0 }}", {}, [])
    finally:
        sys.modules["wrapper_alone.chat_parts.templates"]._templates._end()
        for name in [name for name in sys.modules if name.startswith("wrapper_alone.")]:
            del sys.modules[name]
