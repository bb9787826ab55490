"""Servers of OpenAI's API over a logged model, and what their clients do."""

import re
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import openai
from support.commands import free_port, running_warm
from support.questions import PARIS

NAME = "smollm2-135m-instruct"
LONG = [{"role": "user", "content": "Write a very long story about a lighthouse."}]


@contextmanager
def serving(store, *options, output=None, **environment):
    """A server process and its address; stopped at the end where the test left it running."""
    address = f"http://127.0.0.1:{free_port()}"
    command = ["entrypoints.serve", f"--model_uri={store[1]['chat']}"]
    command += [f"--port={address.rpartition(':')[2]}", *options]
    words = command, f"{address}/health"
    with running_warm(*words, output=output, MLFLOW_TRACKING_URI=store[0], **environment) as process:
        yield process, address


@contextmanager
def with_tools(model, template: Path):
    """The server `here` over the model with another chat template, which takes tools. The model gets its own back."""
    kept = model.template, model.tool_template
    model.template = model.tool_template = template.read_text(encoding="utf-8")
    try:
        with here(model) as found:
            yield found
    finally:
        model.template, model.tool_template = kept


@contextmanager
def here(model, api_key="", host_names=(), http="auto", defaults=(), key_file="", watches=None, **limits):
    """A server in this process, with limits of its own; gives its address and a client with the first key.

    `defaults` are pairs of a parameter and its value, for requests that do not give the parameter. `watches` are
    the tracer and the access log.
    """
    import threading

    import uvicorn

    from slm.serving import http_app, protocol, versions
    from slm.serving.keys import Keys

    loaded = versions.Loaded(model, dict(defaults), (model.name,), "")
    app = http_app.build(loaded, protocol.Limits(**limits), Keys(api_key, key_file), host_names, **(watches or {}))
    port = free_port()
    config = uvicorn.Config(app, port=port, http=http, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(1000):
            if server.started:
                break
            time.sleep(0.01)
        address = f"http://127.0.0.1:{port}"
        key = api_key.split(",")[0] or "none"
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60) as client:
            yield address, client
    finally:
        server.should_exit = True
        thread.join(20)


def ask(client, messages=PARIS, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def metric(address: str, name: str, key: str = "none") -> float:
    request = urllib.request.Request(f"{address}/metrics", headers={"Authorization": f"Bearer {key}"})
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_for(address: str, name: str, value: float, seconds: float = 30, key: str = "none") -> bool:
    for _ in range(int(seconds / 0.1)):
        if metric(address, name, key) == value:
            return True
        time.sleep(0.1)
    return False


def content(completion) -> str:
    return completion.choices[0].message.content
