"""`serve` for a long time: mixed requests and moves of the alias. Memory, descriptors and threads stay as they are.

PHI3_MLFLOW_TESTS=long takes half an hour, in which the alias moves after each minute of requests. Otherwise, it moves
once. Under requests, memory goes up and down with their caches. So the figures are taken when the requests have ended.
SOAK_RECORD names a file for them.
"""

import json
import os
import random
import re
import shutil
import statistics
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import mlflow
import openai
import pytest
from support.commands import REPOSITORY, free_port, running_warm, serving
from support.databases import sqlite_store
from support.effort import LONG, SOAK_SECONDS
from support.openai_servers import wait_for
from support.questions import GENERATION

from slm.base import cache
from slm.tracking import registry

CLIENTS = 8
CYCLE = min(60, SOAK_SECONDS / 2)  # seconds of requests between two moves
TEMPLATE = REPOSITORY / "tests" / "support" / "tool_templates" / "qwen2.5.jinja"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}

# ---------------------------------------------------------------------------------------------------------------------
# The requests


def whole(client, asked):
    assert client.chat.completions.create(**asked, max_tokens=16).usage.completion_tokens


def streamed(client, asked):
    *_, last = client.chat.completions.create(**asked, max_tokens=24, stream=True)
    assert last.choices[0].finish_reason


def cancelled(client, asked):
    """The client leaves a stream after its first pieces."""
    with client.chat.completions.create(**asked, max_tokens=400, stream=True) as stream:
        for _, _ in zip(range(3), stream, strict=False):
            pass


def given_up(client, asked):
    """The client goes before the answer is there."""
    with suppress(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(**asked, max_tokens=400)


def structured(client, asked):
    content = client.chat.completions.create(**asked, response_format=FORMAT, max_tokens=60).choices[0].message.content
    assert {*json.loads(content)} == {"city", "days"}


def tools(client, asked):
    answer = client.chat.completions.create(**asked, tools=[TOOL], tool_choice=NAMED, max_tokens=80)
    assert {*json.loads(answer.choices[0].message.tool_calls[0].function.arguments)} == {"city", "days"}


def drawn(client, asked):
    answer = client.chat.completions.create(**asked, n=3, temperature=1, logprobs=True, top_logprobs=2, max_tokens=12)
    assert len(answer.choices) == 3


def response(client, asked):
    assert client.responses.create(model="bot", input=asked["messages"], max_output_tokens=12).output_text is not None


def completion(client, asked):
    assert client.completions.create(model="bot", prompt=asked["messages"][0]["content"], max_tokens=12).choices


def refused(client, asked):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, max_tokens=-1)


KINDS = (whole, whole, streamed, streamed, cancelled, given_up, structured, tools, drawn, response, completion, refused)


class Clients:
    """Clients of the openai library in a closed loop. Each request is of a random kind, and some are long."""

    def __init__(self, address: str):
        self.done: Counter = Counter()
        self.failed: list[str] = []
        self._ended, self._go = threading.Event(), threading.Event()
        self._go.set()
        self._threads = [threading.Thread(target=self._ask, args=(address, seed)) for seed in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._go.set()
        for thread in self._threads:
            thread.join(120)

    @contextmanager
    def paused(self):
        """In the block, no client begins a request."""
        self._go.clear()
        yield
        self._go.set()

    def _ask(self, address: str, seed: int) -> None:
        draws = random.Random(seed)
        kinds = [*KINDS[seed:], *KINDS[:seed]]  # each kind is asked, also by a server that is slow
        while self._go.wait() and not self._ended.is_set():
            # the server closes a connection that has waited for ten seconds, perhaps while a request is on its way
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
                while self._go.is_set() and not self._ended.is_set():
                    kind = kinds.pop() if kinds else draws.choice(KINDS)
                    text = f"Plan {draws.randrange(10**6)}. " + "We go on by train. " * draws.choice((0, 2, 20))
                    try:
                        kind(client, {"model": "bot", "messages": [{"role": "user", "content": f"{text}Where to?"}]})
                        self.done[kind.__name__] += 1
                    except Exception as error:
                        self.failed.append(f"{kind.__name__}: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def figures(pid: int) -> dict[str, int]:
    """Of a process: resident memory in MB, open descriptors without sockets, sockets, and threads."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    links = []
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "descriptors": sum(not link.startswith("socket:") for link in links),
        "sockets": sum(link.startswith("socket:") for link in links),
        "threads": len([*(process / "task").iterdir()]),
    }


def settled(pid: int) -> dict[str, int]:
    """The figures of a server without requests, when it has given back its memory."""
    found = [figures(pid)]
    while len(found) < 90:
        time.sleep(1)
        found.append(figures(pid))
        memory = [one["memory"] for one in found[-15:]]
        if len(memory) == 15 and max(memory) - min(memory) < 5:
            break
    return found[-1]


def log_two(export, folder: Path) -> list[str]:
    """Logs the int4 model twice, with a template that takes tools; gives its versions."""
    from slm.models import checkpoints, model_logging

    shutil.copytree(export.folder, folder, copy_function=os.link)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.read_bytes())
    with_tools = checkpoints.rebuilt(replace(export, folder=folder, manifest=cache.manifest_of(folder)))
    experiment, made = mlflow.create_experiment("soak"), []
    for _ in range(2):
        with mlflow.start_run(experiment_id=experiment):
            info = model_logging.log_onnx(with_tools, "chat", GENERATION, "int4", registered_model_name="bot")
        made.append(str(info.registered_model_version))
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's figures")
def test_a_server_under_mixed_load_stays_as_large_as_it_is(int4_export, tmp_path):
    (tmp_path / "tracking").mkdir()
    store = f"--backend-store-uri={sqlite_store(tmp_path)}", f"--artifacts-destination={tmp_path / 'store'}"
    with serving(tmp_path / "tracking", *store) as uri, (tmp_path / "told").open("w") as told:
        mlflow.set_tracking_uri(uri)
        versions = log_two(int4_export, tmp_path / "with tools")
        registry.set_alias("bot", "champion", versions[0])
        address = f"http://127.0.0.1:{free_port()}"
        command = ["entrypoints.serve", "--model_uri=models:/bot@champion", f"--port={address.rpartition(':')[2]}"]
        command += ["--follow=1", "--traces=0.05", "--trace_experiment=soak", f"--access_log={tmp_path / 'access'}"]
        found = []
        words = command, f"{address}/health"
        with running_warm(*words, output=told, MLFLOW_TRACKING_URI=uri) as process, Clients(address) as clients:
            end = time.monotonic() + SOAK_SECONDS
            while time.monotonic() < end or len(found) < 2:
                version = versions[len(found) % 2]
                registry.set_alias("bot", "champion", version)
                assert wait_for(address, f'slm_served_version{{version="bot/{version}"}}', 1, 180)
                time.sleep(CYCLE)
                with clients.paused():
                    for name, value in (("slm_loaded_versions", 1), ("slm_generating", 0), ("slm_waiting", 0)):
                        assert wait_for(address, name, value, 180)
                    found.append(settled(process.pid) | {"requests": sum(clients.done.values())})
                if record := os.environ.get("SOAK_RECORD"):
                    Path(record).write_text(json.dumps(found))
        mlflow.set_tracking_uri(None)
    said = (tmp_path / "told").read_text()
    assert clients.failed == [], (clients.failed[:5], said)
    assert {kind.__name__ for kind in KINDS} == {*clients.done}
    assert said.count("Serving version ") == len(found) - 1, said
    assert not re.search(r"warning: (?!\d+ traces? dropped)", said), said
    third = max(len(found) // 3, 1)  # the first third fills caches, and a pool of up to six threads
    for name, most in (("descriptors", 4), ("threads", 6)):
        values = [one[name] for one in found[third - 1 :]]
        assert max(values) - min(values) <= most, (name, found)
    memory = [one["memory"] for one in found]
    second, last = (statistics.median(part) for part in (memory[third - 1 : 2 * third], memory[-third:]))
    assert last <= (1.1 if LONG else 1.5) * second, found
