"""One of several processes of `serve`. slm/serving/processes.py starts it, and says what it serves and when it moves.

    python -m slm.serving.process CHANNEL LISTENER    two open descriptors

If the process that started it ends, this one ends too, after the requests under way.
"""

import os
import signal
import socket
import sys
import threading
import time

from slm.base import console, stopping
from slm.base.errors import BadInput
from slm.base.parameters import Parameters
from slm.serving import keys, server, traces, versions
from slm.serving.access_log import AccessLog
from slm.serving.processes import Channel
from slm.serving.server import SharedListener

READ_SECONDS = 0.5  # between two readings of the gauges that change by themselves


class _Follower(versions.Follower):
    """Moves when the other process says so."""

    channel: Channel

    def _follow(self) -> None:
        pass

    def wake(self) -> None:
        self.channel.send(wake=True)


def main() -> None:
    channel, listener = Channel(socket.socket(fileno=int(sys.argv[1]))), SharedListener(fileno=int(sys.argv[2]))
    messages = iter(channel)
    orders = next(messages, None)
    try:
        if orders is not None:
            with stopping.listening(lambda reason: None):
                serve(orders, channel, messages, listener)
    except stopping.Stopped:
        pass
    except Exception as error:
        mistake, reason = versions.judged(error)
        channel.send(failed=reason, mistake=mistake)
        if mistake and not isinstance(error, BadInput):
            raise


def serve(orders: dict, channel: Channel, messages, listener: SharedListener) -> None:
    args = Parameters(**orders["args"])
    redact = traces.read_redact(args.redact)
    tracer = traces.Tracer(args.traces, orders["experiment_id"], redact, orders["run_id"]) if args.traces else None
    log = AccessLog(args.access_log) if args.access_log else None

    def check_memory(size: int) -> None:
        number = orders["processes"]
        if number > 1 and (missing := versions.lacks_memory(size, number)):
            raise BadInput(f"workers: {args.model_uri}, loaded {number} times, {missing}; write less")

    loaded = versions.load(
        args.model_uri,
        args.trust_code,
        args.served_model_name,
        orders["version"],
        check_memory,
        server.settings(args),
    )
    app = server.application(args, loaded, keys.of_environment(), tracer, log, _Follower)
    follower, served = app.state.follower, app.state.served
    if follower:
        follower.channel = channel

    def hear() -> None:
        for message in messages:
            try:
                channel.send(moved=follower.move(message["move"]))
            except Exception as error:
                refused, reason = versions.judged(error)
                channel.send(refused=refused, reason=reason)
                if not served.is_ready():  # the next process loads the version that was served
                    break
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        while served.is_alive():
            served.metrics.read()
            time.sleep(READ_SECONDS)
        console.err.print("error: the generating thread has ended", markup=False)
        os.kill(os.getpid(), signal.SIGTERM)

    def started() -> None:
        for work in (hear, watch):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        channel.send(ready=loaded.version, names=loaded.names)

    stopping.allow(args.drain)
    server.answer(app, listener, args.drain, started)


if __name__ == "__main__":
    main()
