"""One process of `serve`: the application over a loaded model, and the loop that answers until a signal comes."""

import math
import os
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from slm.base import console, model_uri
from slm.base.parameters import Parameters
from slm.models.chat_parts.runtime import physical_cores
from slm.serving import connections, http_app, traces, versions
from slm.serving.access_log import AccessLog
from slm.serving.keys import Keys
from slm.serving.protocol import Limits

BACKLOG = 64  # connections that the system accepts, before the first of them is counted


def run(
    args: Parameters, listener: socket.socket, keys: Keys, redact: traces.Redact | None, log: AccessLog | None
) -> None:
    """Loads the model and answers, in this process alone.

    Raises:
        stopping.Stopped: a signal came, and the requests have ended.
    """
    tracer = traces.opened(args.traces, args.trace_experiment, redact)
    with console.step(f"Loading {args.model_uri}"):
        loaded = versions.load(args.model_uri, args.trust_code, args.served_model_name, settings=settings(args))
    app = application(args, loaded, keys, tracer, log)
    tell(args, loaded.names)
    answer(app, listener, args.drain)


def tell(args: Parameters, names: tuple[str, ...]) -> None:
    name, *others = names
    where = f" in {args.workers} processes" if args.workers > 1 else ""
    console.out.print(f"Serving {name} at http://{args.host}:{args.port}/v1{where}", markup=False)
    if others:
        console.out.print(f"A request may also name the model {', '.join(others)}", markup=False)


def settings(args: Parameters) -> dict[str, int | str]:
    """What a model is loaded with, in the place of what it was logged with. Empty values change nothing.

    Several processes share the cores.
    """
    given = {name: getattr(args, name) for name in ("threads", "batch_size", "execution_provider")}
    if args.workers > 1 and not args.threads:
        given["threads"] = max(1, physical_cores() // args.workers)
    return given


def followed(args: Parameters) -> versions.Alias | None:
    """What the server follows, or None."""
    if not (args.follow and model_uri.registered_alias(args.model_uri)):
        return None
    secret = os.environ.get("PHI3_MLFLOW_WEBHOOK_SECRET", "")
    return versions.Alias(args.model_uri, args.follow, args.trust_code, args.served_model_name, secret, settings(args))


def application(
    args: Parameters,
    loaded: versions.Loaded,
    keys: Keys,
    tracer: traces.Tracer | None,
    log: AccessLog | None,
    follower: type[versions.Follower] = versions.Follower,
) -> FastAPI:
    """
    Raises:
        BadInput: the model can't keep several keys' prompts apart.
    """
    limits = Limits(math.ceil(args.max_waiting / args.workers), args.request_timeout, args.max_tokens)
    hosts = [args.host, *args.allowed_hosts.split(",")]
    return http_app.build(loaded, limits, keys, hosts, followed(args), tracer, log, follower)


def answer(app: FastAPI, listener: socket.socket, drain: int, started: Callable[[], None] | None = None) -> None:
    """Answers until a signal comes, and then ends the requests under way, within `drain` seconds.

    With `started`, several processes take connections from `listener`. It is called when this process takes them.

    Raises:
        stopping.Stopped: a signal came, and the requests have ended.
    """
    config = uvicorn.Config(
        app,
        http=connections.Guarded,
        loop="asyncio" if started else "auto",
        ws="none",
        backlog=1 if started else BACKLOG,  # asyncio also takes so many connections at once
        timeout_keep_alive=connections.KEEP_ALIVE_SECONDS,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain,
    )
    _Server(config, started).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, told: Callable[[], None] | None):
        super().__init__(config)
        self.told = told

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.told:
            self.told()


class SharedListener(socket.socket):
    """A listening socket of several processes.

    Each process takes one connection at a time. So a process that waits takes the next one, before a busy process does.
    """

    def listen(self, backlog: int = BACKLOG) -> None:
        super().listen(BACKLOG)  # asyncio gives the number of connections that it takes at once
