"""Serves a logged chat model over OpenAI's API: /v1/chat/completions (streams too), /v1/models, /health, /metrics.

    mlflow run . -e serve -P model_uri=models:/phi3@champion
    PHI3_MLFLOW_API_KEY=… python -m entrypoints.serve --model_uri=models:/phi3@champion

Keys are read from the environment, or from the file that PHI3_MLFLOW_API_KEY_FILE names, since MLflow logs parameters.
Under `mlflow run` the run stays open until the server is stopped; by hand there is none. SIGTERM ends the server after
the requests under way (`drain`), with exit code 0. SIGINT does so too, with exit code 130. Put a proxy with TLS in
front before anything but this machine can reach it, and name the proxy's host in allowed_hosts. Without a key, only
loopback is listened at, unless open_to_all=true.
"""

import ipaddress
import os
import socket
import sys
from contextlib import nullcontext

from slm.base import model_uri, parameters
from slm.base.errors import BadInput
from slm.tracking import lifecycle

BACKLOG = 64  # connections that are accepted at once, before the first of them is counted


def parse_args(argv: list[str] | None) -> parameters.Parameters:
    return parameters.parse("serve", __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    return lifecycle.exit_code(lambda: serve(parse_args(argv)), stopped_by="the server has stopped, after {}")


def serve(args: parameters.Parameters) -> str:
    """The story of the server; returns "none", since there is no gate."""
    # What was asked for, checked before a model is loaded
    if not args.model_uri:
        raise BadInput("model_uri: is empty; name a logged chat model, as models:/name@alias")
    from slm.serving import keys

    listener = listen(args.host, args.port)
    api_keys = keys.of_environment()
    if not (api_keys or is_loopback(listener) or args.open_to_all):
        remedy = "set PHI3_MLFLOW_API_KEY, or write open_to_all=true"
        raise BadInput(f"host: {args.host} is open to others, who would need no key; {remedy}")

    import uvicorn

    from slm.base import console, environment, stopping
    from slm.serving import connections, http_app, traces, versions
    from slm.serving.access_log import AccessLog
    from slm.serving.protocol import Limits

    redact = traces.read_redact(args.redact)
    access_log = AccessLog(args.access_log) if args.access_log else None
    limits = Limits(args.max_waiting, args.request_timeout, args.max_tokens)
    if args.execution_provider == "cuda":
        environment.check_cuda()

    with lifecycle.run("serve", args) if "MLFLOW_RUN_ID" in os.environ else nullcontext():
        tracer = traces.opened(args.traces, args.trace_experiment, redact)
        # The model, and the server until a signal comes
        with console.step(f"Loading {args.model_uri}"):
            loaded = versions.load(args.model_uri, args.trust_code, args.served_model_name, settings=settings(args))
        host_names = [args.host, *args.allowed_hosts.split(",")]
        app = http_app.build(
            loaded,
            limits,
            keys=api_keys,
            host_names=host_names,
            follows=followed(args),
            tracer=tracer,
            access_log=access_log,
        )
        config = uvicorn.Config(
            app,
            http=connections.Guarded,
            ws="none",
            backlog=BACKLOG,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=args.drain,
        )
        name, *others = loaded.names
        console.out.print(f"Serving {name} at http://{args.host}:{args.port}/v1", markup=False)
        if others:
            console.out.print(f"A request may also name the model {', '.join(others)}", markup=False)
        stopping.allow(args.drain)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except stopping.Stopped as stopped:
            if str(stopped) != "SIGTERM":
                raise
            console.out.print("the server has stopped, after SIGTERM", markup=False)
    return "none"


def followed(args: parameters.Parameters):
    """What the server follows (versions.Alias), or None."""
    from slm.serving import versions

    if not (args.follow and model_uri.registered_alias(args.model_uri)):
        return None
    secret = os.environ.get("PHI3_MLFLOW_WEBHOOK_SECRET", "")
    return versions.Alias(args.model_uri, args.follow, args.trust_code, args.served_model_name, secret, settings(args))


def settings(args: parameters.Parameters) -> dict[str, int | str]:
    """What a model is loaded with, in the place of what it was logged with. Empty values change nothing."""
    return {name: getattr(args, name) for name in ("threads", "batch_size", "execution_provider")}


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a port in use is known before a model is loaded.

    Raises:
        BadInput: it can't be bound.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise BadInput(f"host, port: {host}:{port} can't be used: {error.strerror or error}") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


if __name__ == "__main__":
    sys.exit(main())
