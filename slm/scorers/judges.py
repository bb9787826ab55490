"""MLflow's built-in judges as scorers: a language model says whether an answer is correct, relevant, safe, …

The judges and their prompts come from `mlflow.genai.scorers`. The judging model is one of three: a model URI of
MLflow's judges, an OpenAI-compatible address, or a chat model that this project logged. A logged model is served on
loopback while a run needs the model. The cache keeps each judgement with its request, so an interrupted run doesn't
pay twice. If a call fails or its judgement can't be read, the answer is unscored.

Not covered: judges that need a trace or a session, and several judgements at a time. This module does not check
whether the judge is right. Measure the judge on answers that people have judged.
"""

import json
import os
import secrets
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from slm.base import cache
from slm.base.environment import variables
from slm.base.errors import BadInput, Unavailable
from slm.base.hashing import digest
from slm.base.wording import did_you_mean, quoted
from slm.prompts.prompt_rows import Prompt, ScorerCall
from slm.scorers import feedback
from slm.scorers.built_in import Score
from slm.tracking import mlflow_client, registry

LOGGED = ("models:/", "runs:/", "mlflow-artifacts:/")
EXAMPLES = "openai:/gpt-4o-mini, endpoints:/name, models:/name/1 or http://host/v1#model"
OPENAI_ADDRESS = "https://api.openai.com/v1"
ANSWER_SECONDS = 10  # that an address has to answer a check
MOST_FAILURES = 3  # failed calls in a row. MLflow tries each call eleven times, over about three minutes
LOGGED_PARAMETERS = {"temperature": 0.0, "max_tokens": 512}  # of a logged judge. Its own defaults are for chat
RATINGS = ("yes", "no")  # of MLflow's judges
LONGEST_TEXT = 400  # characters of a logged judge's rationale. With an open end, a small model writes until it is cut


@dataclass(frozen=True)
class JudgeScorer:
    class_name: str  # in mlflow.genai.scorers
    arguments: tuple[str, ...]


JUDGES = {
    "correctness": JudgeScorer("Correctness", ("inputs", "outputs", "expectations")),
    "equivalence": JudgeScorer("Equivalence", ("outputs", "expectations")),
    "relevance_to_query": JudgeScorer("RelevanceToQuery", ("inputs", "outputs")),
    "completeness": JudgeScorer("Completeness", ("inputs", "outputs")),
    "summarization": JudgeScorer("Summarization", ("inputs", "outputs")),
    "guidelines": JudgeScorer("Guidelines", ("inputs", "outputs")),
    "safety": JudgeScorer("Safety", ("outputs",)),
    "fluency": JudgeScorer("Fluency", ("outputs",)),
}


@dataclass(frozen=True)
class JudgeModel:
    """The model that judges. The cache keeps its judgements under `identity`."""

    uri: str  # for MLflow's judges. For a logged model, the URI of that model
    identity: str
    base_url: str = ""  # empty: the provider's own address
    is_logged: bool = False


def call_error(name: str, expected: tuple[str, ...], options: dict) -> str | None:
    """The fault in this call of the judge `name`, or None."""
    known = ("guidelines",) if name == "guidelines" else ()
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            return f"scorer {name} has no option {quoted(option)}{did_you_mean(option, known)}; {has}"
    if known:
        lines = options.get("guidelines")
        lines = [lines] if isinstance(lines, str) else lines
        if not isinstance(lines, list) or not lines or not all(isinstance(x, str) and x.strip() for x in lines):
            shown = f" are {quoted(options['guidelines'])}" if options else " are missing"
            return f"the guidelines of scorer guidelines{shown}; a row gives them as {{guidelines: {{guidelines: …}}}}"
    if not expected and "expectations" in JUDGES[name].arguments:
        return f"scorer {name} needs `expected`"
    return None


def find(judge: str) -> JudgeModel:
    """The model that `judge` names. Reads a logged model's description. Loads no model, and sends no request to one.

    Raises:
        BadInput: `judge` names no model, or the model's key is missing.
    """
    if judge.startswith(("http://", "https://")):
        return _at_address(judge)
    if judge.startswith(LOGGED):
        return _logged(judge)
    provider, separator, name = judge.partition(":/")
    if not separator or not name.strip("/"):
        raise BadInput(f"judge: {judge!r} names no model; write {EXAMPLES}")
    mlflow_client.quiet_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.genai.judges.adapters.utils import get_adapter

    try:
        get_adapter(judge, "")
        if provider == "endpoints":
            from mlflow.deployments import get_deployments_target

            get_deployments_target()
    except MlflowException as error:
        raise BadInput(f"judge: {judge}: {feedback.one_line(error)}") from None
    if provider == "openai" and not os.environ.get("OPENAI_API_KEY"):
        raise BadInput(f"judge: {judge} needs a key; set OPENAI_API_KEY")
    return JudgeModel(judge, f"{judge} {_openai_address() if provider == 'openai' else ''}".strip())


def check_reachable(judge: JudgeModel) -> None:
    """Requests the list of models from an OpenAI-compatible address. Only a refused key or no answer is an error.

    Raises:
        BadInput: the address refuses the key.
        Unavailable: the address doesn't answer.
    """
    import requests

    if judge.is_logged or not judge.uri.startswith("openai:/"):
        return
    address = judge.base_url or _openai_address()
    headers = {"Authorization": f"Bearer {_key()}"}
    try:
        status = requests.get(f"{address}/models", headers=headers, timeout=ANSWER_SECONDS).status_code
    except requests.exceptions.RequestException as error:
        raise Unavailable(f"judge: {address} doesn't answer ({type(error).__name__})") from None
    if status in (401, 403):
        raise BadInput(f"judge: {address} refuses the key ({status}); set OPENAI_API_KEY")


@contextmanager
def opened(model: JudgeModel, resume: bool = True) -> Iterator["Judge"]:
    """The judge in use. With `resume`, judgements come from the cache. The end of the block frees a logged model."""
    with ExitStack() as stack:
        yield Judge(model, resume, stack)


class Judge:
    """A judge in use. A logged model is loaded for its first judgement."""

    def __init__(self, model: JudgeModel, resume: bool, stack: ExitStack):
        self.model = model
        self._stack = stack
        self._reached: tuple[str, dict[str, str]] | None = None  # the URI and the environment for MLflow's judges
        self._failures = 0
        self._path = cache.private("judgements") / f"{digest(model.identity)[:16]}.jsonl"
        self._known = _read_judgements(self._path) if resume else {}

    def score(self, call: ScorerCall, prompt: Prompt, output: str) -> Score:
        """The judgement on one answer. If a row has several expected texts, the judge must accept one of them."""
        scorer = JUDGES[call.name]
        given = feedback.arguments_of(prompt, output)
        given = {name: given[name] for name in scorer.arguments}
        if "expectations" not in given:
            return self._judgement(call, given)
        if not prompt.expected:
            return Score(None, "nothing is expected of this row")
        scores = []
        for text in prompt.expected:
            scores.append(self._judgement(call, given | {"expectations": {"expected_response": text}}))
            if scores[-1].value == 1:
                return scores[-1]
        return next((score for score in scores if score.value is None), scores[-1])

    def _judgement(self, call: ScorerCall, given: dict) -> Score:
        import mlflow

        key = digest([self.model.identity, mlflow.__version__, call.name, call.options, given])
        if key in self._known:
            return self._known[key]
        if self._failures >= MOST_FAILURES:
            return Score(None, f"{call.name} was not asked for: the judge failed {self._failures} times in a row")
        score = self._ask(call, given)
        if score.value is not None:
            self._known[key] = score
            _append_judgement(self._path, {"key": key, "judge": self.model.uri, "scorer": call.name} | vars(score))
        return score

    def _ask(self, call: ScorerCall, given: dict) -> Score:
        from mlflow.exceptions import MlflowException
        from mlflow.genai import scorers

        if self._reached is None:
            self._reached = self._stack.enter_context(_reached(self.model))
        uri, environment = self._reached
        try:
            with variables(environment):  # MLflow's judges read address and key only from the environment
                judge = getattr(scorers, JUDGES[call.name].class_name)(model=uri, **call.options)
                value = judge(**given)
        except Exception as error:
            # A refused request (the prompt is too long) or an answer that is no JSON does not predict the next call
            from_mlflow = isinstance(error, MlflowException)
            refused = getattr(error.__cause__, "status_code", None) == 400
            code = error.error_code if isinstance(error, MlflowException) else ""
            failed = from_mlflow and not refused and code != "BAD_REQUEST"
            self._failures = self._failures + 1 if failed else 0
            text = str(error) if from_mlflow else f"{type(error).__name__}: {error}"
            return Score(None, f"{call.name} got no judgement: {feedback.one_line(text)}")
        self._failures = 0
        return feedback.scores_of(call.name, value)[call.name]


# ---------------------------------------------------------------------------------------------------------------------
# What `judge` means


def _at_address(judge: str) -> JudgeModel:
    address, _, name = judge.partition("#")
    try:
        parts = urllib.parse.urlsplit(address)
        usable = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or not name:
        raise BadInput(f"judge: {judge!r} is not an address and a model's name; write http://host:8000/v1#model")
    if parts.username or parts.password or parts.query:
        raise BadInput("judge: parameters are logged, so no key belongs in the address; set OPENAI_API_KEY")
    address = address.rstrip("/")
    return JudgeModel(f"openai:/{name}", f"{address}#{name}", address)


def _logged(uri: str) -> JudgeModel:
    resolved = registry.resolve(uri, trust_code=True)  # no model is loaded yet
    facts = mlflow_client.quiet_mlflow().models.get_model_info(resolved).metadata or {}
    if "model.sha256" not in facts or facts.get("schema") != "chat":
        raise BadInput(f"judge: {uri} is not a chat model that this project logged; write {EXAMPLES}")
    registry.resolve(resolved)  # this project logged the model, but its code may still be unknown
    identity = f"{facts['model.sha256']} {LOGGED_PARAMETERS} {RATINGS} {LONGEST_TEXT}"
    return JudgeModel(resolved, identity, is_logged=True)


def _openai_address() -> str:
    """The address for openai:/ URIs. MLflow reads the same variables in the same order."""
    given = os.environ.get("OPENAI_API_BASE")
    return ((os.environ.get("OPENAI_BASE_URL") if given is None else given) or OPENAI_ADDRESS).rstrip("/")


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"  # MLflow refuses an empty key. Other servers may ignore it


# ---------------------------------------------------------------------------------------------------------------------
# How MLflow reaches the judge


@contextmanager
def _reached(model: JudgeModel) -> Iterator[tuple[str, dict[str, str]]]:
    """The URI for MLflow's judges, and the environment variables with its address and key."""
    if not model.is_logged:
        at_address = {"OPENAI_API_BASE": model.base_url, "OPENAI_API_KEY": _key()}
        yield model.uri, at_address if model.base_url else {}
        return
    with _served(model.uri) as (name, address, key):
        # requests prefers the lower-case name. A proxy could not reach this process
        yield f"openai:/{name}", {"OPENAI_API_BASE": address, "OPENAI_API_KEY": key, "no_proxy": "127.0.0.1"}


def strict_format(row: dict) -> dict:
    """The `response_format` of a judge's request, with bounds that MLflow's schema lacks. {} without a schema.

    MLflow's schema has a `rationale` without an end. For some judges, it allows any text as a `result`.
    """
    asked = row.get("response_format") or {}
    schema = (asked.get("json_schema") or {}).get("schema") or {}
    properties = schema.get("properties")
    if asked.get("type") != "json_schema" or not isinstance(properties, dict):
        return {}
    bounded = {name: _bounded(name, content) for name, content in properties.items()}
    told = asked["json_schema"] | {"schema": schema | {"properties": bounded}}
    return {"response_format": asked | {"json_schema": told}}


def _bounded(name: str, content: dict) -> dict:
    if not isinstance(content, dict) or content.get("type") != "string" or "enum" in content:
        return content
    return content | ({"enum": list(RATINGS)} if name == "result" else {"maxLength": LONGEST_TEXT})


@contextmanager
def _served(uri: str) -> Iterator[tuple[str, str, str]]:
    """Serves a logged chat model over OpenAI's API, only for this process. Gives the model's name, address and key.

    Raises:
        BadInput: the model can't be loaded.
    """
    import uvicorn

    from slm.serving import http_app, versions
    from slm.serving.keys import Keys

    try:
        loaded = versions.load(uri)
    except BadInput as error:
        raise BadInput(f"judge: {str(error).removeprefix('model_uri: ')}") from None
    model = loaded.wrapper
    if hasattr(model, "fields"):  # else the wrapper is too old for a schema, and MLflow asks again without one
        prepare = model.prepare
        setattr(model, "prepare", lambda row, *rest: prepare(row | strict_format(row), *rest))  # noqa: B010
    key = secrets.token_urlsafe()
    app = http_app.build(replace(loaded, defaults=loaded.defaults | LOGGED_PARAMETERS), keys=Keys(key))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=3)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="judge", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield model.name, f"http://127.0.0.1:{listener.getsockname()[1]}/v1", key
        finally:
            server.should_exit = True
            thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Judgements that were paid for


def _read_judgements(path: Path) -> dict[str, Score]:
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            known[entry["key"]] = Score(entry["value"], entry["reason"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    return known


def _append_judgement(path: Path, entry: dict) -> None:
    with open(path, "ab+", opener=cache.opener) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        mended = b"" if file.read(1) in (b"", b"\n") else b"\n"  # after a line that was cut off
        file.write(mended + json.dumps(entry).encode() + b"\n")
