"""The version of a model that answers: loads it, follows its alias in the registry, and replaces it under way.

The follower looks at the alias every few seconds, or at once when MLflow's webhook says that an alias has moved. It
loads the alias's version beside the one that answers, checks the files and one answer, and hands new requests to it.
Requests that have begun end on the old version. Then the old version is freed. A version that can't be loaded, or gives
no proper answer, is refused: the log, /metrics and a tag of the version say so, and the old version goes on. While the
registry or the disk fails, or if the alias is removed, the old version goes on too.

If the memory does not hold both versions, new requests wait while the old one ends and the new one is loaded.
"""

import asyncio
import base64
import hashlib
import hmac
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm.answers import endpoints
from slm.base import console, environment, model_uri
from slm.base.errors import BadInput, Unavailable, exhausted
from slm.base.wording import one_line
from slm.models import wrappers
from slm.models.chat_model import DEFAULTS
from slm.serving.batching import Metrics, Worker
from slm.serving.exchanges import Service
from slm.serving.protocol import OLD_FIELDS, ApiError, Limits, model_names
from slm.serving.traces import Tracer
from slm.tracking import mlflow_client, registry, tags

ROOM = 1.5  # times the size of a model's files: the memory that is needed to load it
RETIRED_SECONDS = 30.0  # without work, until the old version is freed: longer than a request's body may take to arrive
STAMP_SECONDS = 300  # an older webhook is refused
QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "logprobs": True}

# ---------------------------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class Loaded:
    wrapper: wrappers.Wrapper
    defaults: dict[str, Any]  # the parameters that were logged with the model
    names: tuple[str, ...]  # `protocol.model_names`
    version: str  # name/version of a registered model, else ""
    uri: str = ""  # without an alias
    model_id: str = ""  # of MLflow's LoggedModel


def load(
    uri: str,
    trust_code: bool = False,
    served_model_name: str = "",
    version: str = "",
    before_loading: Callable[[int], None] = lambda size: None,
    settings: Mapping[str, Any] | None = None,
) -> Loaded:
    """The model that `uri` names. `version` takes this version in the place of the alias's present one.

    `settings` replace those that the model was logged with. An empty value replaces nothing.
    `before_loading` gets the bytes of the model's files, after all checks and before the weights are read.

    Raises:
        BadInput: this project did not log it as a chat model, its files were changed, its code isn't trusted, or it
            has no such setting.
    """
    mlflow = mlflow_client.quiet_mlflow()
    if endpoints.is_endpoint(uri):
        raise BadInput(f"model_uri: {uri} is an endpoint, which serves already; name a logged model")
    given, alias = uri, model_uri.registered_alias(uri)
    uri = registry.resolve(f"models:/{alias[0]}/{version}" if alias and version else uri, trust_code)
    with registry.local_copy(uri) as folder:
        try:
            description = mlflow.models.Model.load(str(folder))
            if not wrappers.is_ours(description) or "schema" not in description.metadata:
                raise BadInput(f"model_uri: {uri} was not logged by this project")
            if description.metadata["schema"] != "chat":
                schema = description.metadata["schema"]
                raise BadInput(f"model_uri: {uri} has the {schema} schema; log it with schema=chat to serve it")
            given_settings = {name: value for name, value in (settings or {}).items() if value}
            for name in given_settings:
                if name not in description.flavors["python_function"].get("config", {}):
                    raise BadInput(f"{name}: {uri} has no such setting; leave it out")
            recorded, size = registry.recorded_manifests(uri), _size(folder)
            opened = wrappers.opened(uri, folder, recorded, trust_code, given_settings, lambda: before_loading(size))
        except (mlflow.exceptions.MlflowException, ValueError) as error:
            if mlflow_client.is_infrastructure(error):
                raise
            raise BadInput(f"model_uri: {uri}: {' '.join(str(error).split())}") from None
        except RuntimeError as error:
            about_gpu = any(word in str(error).lower() for word in ("cuda", "nvidia"))
            if not about_gpu or exhausted(error):
                raise
            raise BadInput(f"model_uri: {uri} can't be loaded: {one_line(error, 300)}") from None
    if not hasattr(opened.wrapper, "stream"):
        raise BadInput(f"model_uri: {uri} was logged by an older version of this project; log it again")
    defaults = {param.name: param.default for param in opened.description.signature.params}
    registered = model_uri.registered_version(uri)
    environment.return_memory()  # that loading took for a while
    names = model_names(given, uri, opened.wrapper.name, served_model_name)
    named = "/".join(registered) if registered else ""
    return Loaded(opened.wrapper, defaults, names, named, uri, opened.description.model_id or "")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_tenants(loaded: Loaded, several_keys: bool) -> None:
    """
    Raises:
        BadInput: the model can't keep several keys' prompts apart.
    """
    if several_keys and not getattr(loaded.wrapper, "separates_tenants", False):
        raise BadInput("model_uri: the model was logged by a version that serves one key alone; log the model again")


def check_answer(model: wrappers.Wrapper) -> None:
    """
    Raises:
        BadInput: the model gives no token, or a token without a finite probability.
    """
    fields = getattr(model, "fields", OLD_FIELDS)
    try:
        [row, *_] = model.prepare({name: value for name, value in QUESTION.items() if name in fields})
        for _ in model.stream([row]):
            pass
    except Exception as error:
        if exhausted(error):
            raise
        raise BadInput(f"it can't answer: {type(error).__name__}: {one_line(error)}") from None
    values = [one.value for one in getattr(row, "log_probabilities", ())]  # rows of older wrappers have none
    if not row.output or not all(value <= 0 for value in values):  # NaN is not
        raise BadInput("its test answer has no token, or a token without a probability")


# ---------------------------------------------------------------------------------------------------------------------
# The version that answers


class Served:
    """The version that answers now, and its replacement by another one."""

    def __init__(self, loaded: Loaded, limits: Limits, several_keys: bool, tracer: Tracer | None = None):
        self.limits, self.several_keys, self.tracer = limits, several_keys, tracer
        self.metrics = Metrics()
        self.started = int(time.time())
        self._now: Service | None = self._service(loaded)
        self._retired: list[Service] = []
        self.metrics.serve(loaded.version)

    async def present(self) -> Service:
        """The version that answers. While one ends and the next one is being loaded, this waits.

        Raises:
            ApiError: the time of a request is up.
        """
        until = time.monotonic() + self.limits.seconds
        while (service := self._now) is None:
            if time.monotonic() > until:
                raise ApiError(503, "the next version of the model is not there yet", "server_error")
            await asyncio.sleep(0.05)
        return service

    def start(self) -> None:
        if self._now:
            self._now.worker.start()

    def stop(self, seconds: float) -> None:
        for service in [*self._retired, *([self._now] if self._now else [])]:
            service.worker.stop(seconds)

    def is_alive(self) -> bool:
        return self._now is None or self._now.worker.is_alive()

    def serves(self, version: str) -> bool:
        """Whether all new requests get this version."""
        return self.version == version

    def is_ready(self) -> bool:
        """Whether a new request is answered at once. Without memory for two versions, it waits for the next one."""
        return self._now is not None

    def replace(self, loaded: Loaded) -> None:
        """Hands new requests to another version. The old one ends its requests, and is then freed."""
        service, old = self._service(loaded), self._now
        service.worker.start()
        self._now = service
        self.metrics.serve(loaded.version)
        if old is not None:
            self._retired.append(old)
            threading.Thread(target=self._retire, args=(old, RETIRED_SECONDS), name="retiring", daemon=True).start()

    def end(self) -> None:
        """Ends the version that answers and frees it, before the next one is there. New requests wait meanwhile."""
        old, self._now = self._now, None
        if old is not None:
            self._retired.append(old)
            self._retire(old, 1.0)

    def _retire(self, service: Service, seconds: float) -> None:
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < seconds:
            time.sleep(0.1)
            if not service.worker.is_idle():
                idle_since = time.monotonic()
        service.worker.stop(60.0)
        self.metrics.workers.remove(service.worker)
        self._retired.remove(service)
        del service
        environment.return_memory()
        self.metrics.versions -= 1

    def _service(self, loaded: Loaded) -> Service:
        model = loaded.wrapper
        model.name = loaded.names[0]  # in every answer
        self.names, self.version = loaded.names, loaded.version
        worker = Worker(model, self.limits, self.metrics)
        self.metrics.versions += 1
        most = min(loaded.defaults.get("max_tokens") or DEFAULTS["max_tokens"], self.limits.max_tokens)
        return Service(
            model,
            worker,
            self.limits,
            loaded.names,
            loaded.defaults | {"max_tokens": most},
            self.several_keys,
            loaded.version,
            loaded.uri,
            loaded.model_id,
            self.tracer,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Its alias


@dataclass(frozen=True)
class Alias:
    """What a server follows."""

    uri: str  # models:/name@alias
    seconds: float  # between two looks
    trust_code: bool = False
    served_model_name: str = ""
    secret: str = ""  # of MLflow's webhook
    settings: Mapping[str, Any] = field(default_factory=dict)  # see `load`


class Follower:
    """The thread that looks at the alias, and moves to its version."""

    def __init__(self, served: Served, alias: Alias):
        self.served, self.alias = served, alias
        named = model_uri.registered_alias(alias.uri)
        assert named is not None
        self.name, self.word = named
        self._refused: set[tuple[str, str]] = set()  # (version, source): the registry may reuse a number
        self._said = ""
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._follow, name="following", daemon=True)
        self.start = self._thread.start

    def wake(self) -> None:
        """Looks at once."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def is_signed(self, body: bytes, headers) -> bool:
        """Whether MLflow sent a webhook, with the secret that both know, within the last minutes."""
        delivery, stamp = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
        if not stamp.isdigit() or abs(time.time() - int(stamp)) > STAMP_SECONDS:
            return False
        signed = hmac.new(self.alias.secret.encode(), f"{delivery}.{stamp}.".encode() + body, hashlib.sha256)
        expected = f"v1,{base64.b64encode(signed.digest()).decode()}"
        return hmac.compare_digest(expected, headers.get("x-mlflow-signature", ""))

    def _follow(self) -> None:
        while not self._stopping:
            self._wake.wait(self.alias.seconds)
            self._wake.clear()
            if self._stopping:
                return
            try:
                self.look()
            except Exception as error:  # whatever happened, the version that answers goes on
                traceback.print_exception(error)

    def look(self) -> None:
        """Moves to the alias's version, if that is another one."""
        try:
            version = registry.alias_version(self.name, self.word)
            source = registry.version_source(f"models:/{self.name}/{version}") if version else ""
        except Exception as error:
            self._look_failed(f"the registry can't be read: {one_line(error)}")
            return
        self.served.metrics.looked(time.time())
        if not self.served.is_ready():
            self._restore()
        if not version:
            self._say(f"{self.alias.uri} is not set any more")
        elif self.served.serves(f"{self.name}/{version}"):
            self._said = ""
        elif (version, source) not in self._refused:
            self._move(version, source)

    def _move(self, version: str, source: str) -> None:
        console.out.print(f"{self.alias.uri} is version {version} now; loading it", markup=False)
        start, gap = time.monotonic(), None
        try:
            gap = self.move(version)
        except Exception as error:
            refused, reason = judged(error)
            if refused:
                self._refuse(version, source, reason)
            else:
                self._look_failed(f"models:/{self.name}/{version} can't be loaded yet: {reason}")
        if gap is None:  # the error is gone, and with it the last hold of the refused model
            environment.return_memory()
            if not self.served.is_ready():
                self._restore()
            return
        waited = f"; requests waited for {gap:.1f} s" if gap else ""
        console.out.print(f"Serving version {version}, {time.monotonic() - start:.1f} s later{waited}", markup=False)
        self._said = ""

    def move(self, version: str) -> float:
        """Loads a version, checks it, and hands new requests to it. Returns the seconds that requests waited.

        Raises:
            Exception: the version can't be loaded, or it gives no proper answer. See `judged`.
        """
        began = 0.0

        def make_room(size: int) -> None:
            nonlocal began
            if missing := lacks_memory(size):
                told = f"models:/{self.name}/{version} {missing}: {self.served.version} ends first, and requests wait"
                console.out.print(told, markup=False)
                began = time.monotonic()
                self.served.end()

        loaded = self._load(version, make_room)
        check_tenants(loaded, self.served.several_keys)
        check_answer(loaded.wrapper)
        self.served.replace(loaded)
        return time.monotonic() - began if began else 0.0

    def _restore(self) -> None:
        """Loads the version again that ended before the next one could be loaded."""
        try:
            self.served.replace(self._load(self.served.version.rpartition("/")[2]))
        except Exception as error:
            self._look_failed(f"{self.served.version} can't be loaded again yet: {one_line(error)}")

    def _load(self, version: str, before_loading: Callable[[int], None] = lambda size: None) -> Loaded:
        alias = self.alias
        words = alias.uri, alias.trust_code, alias.served_model_name, version, before_loading, alias.settings
        return load(*words)

    def _refuse(self, version: str, source: str, reason: str) -> None:
        self._refused.add((version, source))
        self.served.metrics.refused_versions.inc()
        self._say(f"version {version} is refused: {reason}")
        with suppress(Exception):  # the log says it too
            registry.tag_version(self.name, version, {tags.SERVE_REFUSED: reason[:500]})

    def _look_failed(self, text: str) -> None:
        self.served.metrics.failed_looks.inc()
        self._say(text)

    def _say(self, text: str) -> None:
        """Prints a line once, until something else happens."""
        if text != self._said:
            self._said = text
            console.err.print(f"warning: {text}; {self.served.version or 'no version'} goes on", markup=False)


def judged(error: Exception) -> tuple[bool, str]:
    """Whether a version that could not be moved to is at fault, and why. Otherwise, a later try may succeed."""
    full = exhausted(error)
    later = full or isinstance(error, Unavailable) or mlflow_client.is_infrastructure(error)
    return not later, full or one_line(error)


def lacks_memory(size: int, processes: int = 1) -> str:
    """What is missing to load a model of so many bytes, for each of these processes. "" if nothing is missing."""
    free, needed = _free_memory(), ROOM * size * processes
    if free is None or free >= needed:
        return ""
    return f"needs about {needed / 2**20:,.0f} MB, and {free / 2**20:,.0f} MB are free"


def _free_memory() -> int | None:
    """Bytes that this process may still take. None if the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    with suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text(encoding="ascii"))
        left = most - int((group / "memory.current").read_text(encoding="ascii"))
        free = left if free is None else min(free, left)
    return free
