"""Serves a logged chat model over OpenAI's API: /v1/chat/completions (streams too), /v1/models, /health, /metrics.

    mlflow run . --env-manager local -e serve -P model_uri=models:/phi3@champion
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

from slm.base import parameters
from slm.base.errors import BadInput
from slm.tracking import lifecycle


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

    from slm.base import console, environment, stopping
    from slm.serving import processes, server, traces
    from slm.serving.access_log import AccessLog
    from slm.tracking import run_records

    redact = traces.read_redact(args.redact)
    access_log = AccessLog(args.access_log) if args.access_log else None
    processes.check(args.workers)
    if args.execution_provider == "cuda":
        environment.check_cuda()

    # The model, and the server until a signal comes
    with lifecycle.run("serve", args) if "MLFLOW_RUN_ID" in os.environ else nullcontext() as run:
        if run:
            name = f"serve {args.model_uri.removeprefix('models:/')}"
            run_records.name_run_under_way(run.info.run_id, name)
        stopping.allow(args.drain)
        try:
            if args.workers > 1:
                processes.run(args, listener)
            else:
                server.run(args, listener, api_keys, redact, access_log)
        except stopping.Stopped as stopped:
            if str(stopped) != "SIGTERM":
                raise
            console.out.print("the server has stopped, after SIGTERM", markup=False)
            if run:
                lifecycle.name_end(run.info.run_id, "stopped by SIGTERM")
    return "none"


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
