"""The entry points' parameters. argparse, the checks and the logged values all come from one table.

`mlflow run` reads names and defaults from MLproject, so MLproject repeats them. A test keeps both equal. MLflow checks
no types, and passes on undeclared parameters. So this module checks all values, before a run imports or opens anything.
"""

import argparse
import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from slm.base import credentials
from slm.base.errors import BadInput
from slm.base.wording import quoted

CHARACTERS = 4000  # of one value. MLflow keeps at most 6,000 characters of a parameter
ALL = ("pipeline", "onnx", "evaluate")  # the entry points that log or score models
ENTRY_POINTS = (*ALL, "serve", "rollback")
HARDWARE = ("dtype", "device", "runtime")  # a value other than auto replaces what a model was logged with
ENGINES = {"local": "slm.engines.local", "spark": "slm.engines.spark.engine"}  # each engine's module, see slm/engines


@dataclass(frozen=True)
class Parameter:
    name: str
    default: str | int | float | bool
    entry_points: tuple[str, ...]
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    pattern: str = ""  # of a text that isn't empty
    remedy: str = ""  # what to write if the text does not match


PARAMETERS = (  # a name that means something else to `serve` has a second row
    Parameter("model", "smollm2-135m-instruct", ALL, "embedded name, local folder, .gguf file or hub id org/name"),
    Parameter("revision", "", ALL, "commit, branch or tag of the hub repository"),
    Parameter("subfolder", "", ALL, "folder in the hub repository, or in a local folder"),
    Parameter(
        "prompts",
        "prompts/smoke.jsonl",
        ALL,
        "prompt set: path, web address, URI that MLflow can download, traces:EXPERIMENT?days=7 or datasets:NAME",
    ),
    Parameter(
        "tasks",
        "",
        ("evaluate",),
        "tasks of lm-evaluation-harness in the place of `prompts`: names or YAML files, by commas",
    ),
    Parameter("limit", 0, ("evaluate",), "of `tasks`: documents per task; 0: all", low=0, high=10**7),
    Parameter(
        "num_fewshot",
        "",
        ("evaluate",),
        "of `tasks`: examples before each question; empty: as each task says",
        pattern=r"\d{1,3}",
        remedy="write a whole number, such as 5",
    ),
    Parameter(
        "apply_chat_template", False, ("evaluate",), "of `tasks`: put each question into the model's chat template"
    ),
    Parameter("fields", "", ALL, "columns of another shape, theirs:ours by commas: question:prompt,answer:expected"),
    Parameter("expected_pattern", "", ALL, "regular expression: the part of each `expected` to keep"),
    Parameter(
        "system_prompt",
        "",
        ALL,
        "system message of the rows that have none: prompts:/NAME/3 or @ALIAS of MLflow's prompt registry, or a file",
    ),
    Parameter("max_tokens", 64, ALL, "tokens generated at most per scored answer", low=1, high=2**20),
    Parameter("temperature", 0.0, ALL, "0 is greedy", low=0.0, high=2.0),
    Parameter("top_p", 1.0, ALL, "nucleus sampling", low=1e-6, high=1.0),
    Parameter("seed", 0, ALL, "of the sampling", low=0, high=2**62),
    Parameter("stop", "", ALL, "text that ends an answer, or a JSON list of such texts"),
    Parameter("batch_size", 0, (*ALL, "serve"), "rows generated together; 0: the wrapper chooses", low=0, high=4096),
    Parameter("dtype", "auto", ("pipeline", "evaluate"), "of the weights", ("auto", "fp32", "bf16", "fp16")),
    Parameter(
        "device",
        "auto",
        ("pipeline", "evaluate"),
        "auto, cpu, cuda or cuda:N",
        pattern=r"auto|cpu|cuda(:\d{1,3})?",
        remedy="write auto, cpu, cuda or cuda:0",
    ),
    Parameter("precision", "int4", ("onnx", "evaluate"), "of the export", ("int4", "int8", "fp16", "bf16", "fp32")),
    Parameter("execution_provider", "cpu", ("onnx", "evaluate"), "of onnxruntime-genai", ("cpu", "cuda")),
    Parameter(
        "runtime",
        "auto",
        ("onnx", "evaluate"),
        "what answers for an ONNX model; auto: the logged choice, else onnxruntime where it can run the graph",
        ("auto", "onnxruntime-genai", "onnxruntime"),
    ),
    Parameter(
        "schema",
        "prompt",
        ("onnx",),
        "what the logged model takes: texts, or conversations as `serve` needs",
        ("prompt", "chat"),
    ),
    Parameter(
        "registered_model_name",
        "",
        ALL,
        "registers the logged model under this name",
        pattern=r"[^/:@,]+",
        remedy="leave out / : @ and commas",
    ),
    Parameter("save_weights", True, ("pipeline",), "false logs hub id and revision instead of the weights"),
    Parameter(
        "model_uris",
        "",
        ("evaluate",),
        "models or endpoints to score, by commas; empty: both wrappers of `model`",
    ),
    Parameter("baseline", "", ("evaluate",), "model URI to compare with"),
    Parameter("thresholds", "", ("evaluate",), "YAML gate"),
    Parameter(
        "alias",
        "",
        ("evaluate",),
        "registry alias that a passing model is given",
        pattern=r"(?!latest$|v\d+$)[\w.-]+",
        remedy="write letters, digits, . _ -; MLflow keeps latest and v7 for itself",
    ),
    Parameter("scorers", "", ("evaluate",), "scorers added to each row's own: names or file.py:function, by commas"),
    Parameter(
        "judge",
        "",
        ("evaluate",),
        "model that judges: openai:/name, endpoints:/name, models:/name/1 or http://host/v1#model",
    ),
    Parameter(
        "fidelity",
        "auto",
        ("evaluate",),
        "compare the next-token distributions with the baseline's: auto (a sample of the answers), all, or off",
        ("auto", "all", "off"),
    ),
    Parameter(
        "texts",
        "",
        ("evaluate",),
        "texts whose perplexity is measured: plain text or JSONL with `text`, by path, web address or URI",
    ),
    Parameter("timeout", 0, ALL, "seconds after which the run is ended, its answers kept; 0: none", low=0, high=10**7),
    Parameter(
        "row_timeout", 0, ALL, "seconds after which a row without an answer has failed; 0: none", low=0, high=10**6
    ),
    Parameter("repeats", 1, ("evaluate",), "answers per prompt", low=1, high=1000),
    Parameter(
        "cut",
        "score",
        ("evaluate",),
        "how an answer counts that was cut at max_tokens: by its score, as wrong, or not at all",
        ("score", "wrong", "unscored"),
    ),
    Parameter("engine", "local", ("evaluate",), "where prompts are answered", tuple(ENGINES)),
    Parameter("spark_master", "", ("evaluate",), "of engine=spark: spark://host:7077, …; empty: all cores here"),
    Parameter(
        "resume",
        True,
        ("evaluate",),
        "reuse answers of an interrupted or an equal run, with the speeds of a run that gave exactly these answers",
    ),
    Parameter("traces", True, ("evaluate",), "show the answers in MLflow's evaluation view as well"),
    Parameter(
        "slot",
        "",
        ("evaluate",),
        "the scheduled time that this start is for: evaluated once, and never beside another",
        pattern=r"[\w:.+/@-]{1,200}",
        remedy="write letters, digits and : . + - / @, such as 2026-11-22T03:00Z",
    ),
    Parameter("check", False, ("evaluate",), "say what would run, what it can find and how long it takes; run nothing"),
    Parameter(
        "force",
        False,
        ("evaluate",),
        "evaluate although the slot is done, nothing changed, or the model is its own baseline",
    ),
    Parameter(
        "trust_code",
        False,
        ("evaluate", "serve"),
        "true runs code that was logged with a model, where this project doesn't know it",
    ),
    Parameter(
        "model_uri",
        "",
        ("serve", "rollback"),
        "logged chat model: models:/name@alias, models:/name/3, runs:/…, folder; of rollback: models:/name@alias",
    ),
    Parameter(
        "version",
        "",
        ("rollback",),
        "version that gets the alias; empty: the one that had it before",
        pattern=r"\d{1,9}",
        remedy="write a version's number, such as 3",
    ),
    Parameter(
        "served_model_name",
        "",
        ("serve",),
        "name that clients ask for; empty: the registered model's, and else the checkpoint's",
        pattern=r"[\w.:@/-]{1,200}",
        remedy="write letters, digits and . : @ / - _",
    ),
    Parameter(
        "follow",
        10.0,
        ("serve",),
        "seconds between two looks at the alias of model_uri, whose version is served; 0: never",
        low=0,
        high=86400,
    ),
    Parameter(
        "drain",
        10,
        ("serve",),
        "seconds that requests may still take after SIGTERM, while no new ones are accepted",
        low=0,
        high=3600,
    ),
    Parameter("max_tokens", 4096, ("serve",), "the most tokens that one request may ask for", low=1, high=2**20),
    Parameter(
        "max_waiting",
        64,
        ("serve",),
        "texts that wait for a batch at most; a further request gets 429",
        low=1,
        high=10**5,
    ),
    Parameter(
        "request_timeout",
        300.0,
        ("serve",),
        "seconds from a request's arrival to its last token at most; then it gets 504",
        low=0.1,
        high=86400,
    ),
    Parameter("workers", 1, ("serve",), "processes behind the port; each one loads the model", low=1, high=256),
    Parameter("threads", 0, ("serve",), "threads of the model's runtime; 0: one for each core", low=0, high=1024),
    Parameter(
        "execution_provider",
        "",
        ("serve",),
        "of an ONNX model, cpu or cuda; empty: as it was logged",
        ("", "cpu", "cuda"),
    ),
    Parameter("traces", 0.0, ("serve",), "share of the requests that are written to MLflow as traces", low=0, high=1),
    Parameter(
        "trace_experiment",
        "",
        ("serve",),
        "experiment of the traces; empty: the run's, or else that of MLflow's environment variables",
    ),
    Parameter("redact", "", ("serve",), "file.py:function that takes and returns each request and answer of a trace"),
    Parameter(
        "access_log", "", ("serve",), "one JSON line for each request, without prompts: stderr, or a file; empty: none"
    ),
    Parameter("host", "127.0.0.1", ("serve",), "address to listen at"),
    Parameter("port", 5005, ("serve",), "port to listen at", low=1, high=65535),
    Parameter(
        "allowed_hosts",
        "",
        ("serve",),
        "host names that requests may name beside loopback and `host`, by commas",
        pattern=r"(?=.*\w)[\w.:\[\]-]+(, *[\w.:\[\]-]+)*",
        remedy="write host names without scheme, path or *, such as llm.example.org",
    ),
    Parameter("open_to_all", False, ("serve",), "listen at an address that others reach, without a key"),
)


class Parameters(argparse.Namespace):
    """An entry point's parameters, each with its type. A parameter that the entry point lacks reads as in ABSENT.

    `vars` has only the parameters that the entry point declares: these are logged.
    """

    model: str
    revision: str
    subfolder: str
    prompts: str
    tasks: str
    limit: int
    num_fewshot: str
    apply_chat_template: bool
    fields: str
    expected_pattern: str
    system_prompt: str
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str
    batch_size: int
    dtype: str
    device: str
    precision: str
    execution_provider: str
    runtime: str
    schema: str
    registered_model_name: str
    save_weights: bool
    model_uris: str
    baseline: str
    thresholds: str
    alias: str
    scorers: str
    judge: str
    fidelity: str
    texts: str
    timeout: int
    row_timeout: int
    repeats: int
    cut: str
    engine: str
    spark_master: str
    resume: bool
    traces: float  # of evaluate: a bool
    slot: str
    check: bool
    force: bool
    trust_code: bool
    model_uri: str
    version: str
    served_model_name: str
    follow: float
    drain: int
    max_waiting: int
    request_timeout: float
    workers: int
    threads: int
    trace_experiment: str
    redact: str
    access_log: str
    host: str
    port: int
    allowed_hosts: str
    open_to_all: bool

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            return ABSENT[name]
        raise AttributeError(name)


# values for an entry point without the parameter: the default, but such an entry point reuses and traces nothing
DEFAULTS = {parameter.name: parameter.default for parameter in reversed(PARAMETERS)}  # the first row of a name counts
ABSENT = DEFAULTS | {"resume": False, "traces": False}


class _Parser(argparse.ArgumentParser):
    """argparse that raises BadInput for a mistake. For an unknown name, the message has the nearest name."""

    entry_point = ""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = (unknown.split() or [""])[0].split("=")[0].lstrip("-")
            name = name if name.isidentifier() and len(name) < 80 else quoted(name)
            elsewhere = [point for entry in PARAMETERS if entry.name == name for point in entry.entry_points]
            mine = [parameter.name for parameter in PARAMETERS if self.entry_point in parameter.entry_points]
            near = difflib.get_close_matches(name, mine, 1)
            if self.entry_point in elsewhere:  # it lacks its two hyphens
                message = f"{name}: there is no such parameter in this form; write --{name}=…"
            elif elsewhere:
                message = f"{name}: is a parameter of {' and '.join(elsewhere)}, not of {self.entry_point}"
            else:
                message = f"{name}: there is no such parameter" + (f"; did you mean {near[0]}?" if near else "")
        raise BadInput(message)


def parse(entry_point: str, description: str, argv: list[str] | None) -> Parameters:
    """The entry point's parameters from its command line. Each has its type and is in its range of the table.

    Raises:
        BadInput: a name is unknown, or a value is not allowed.
    """
    parser = _Parser(
        prog=f"python -m entrypoints.{entry_point}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.entry_point = entry_point
    table = [parameter for parameter in PARAMETERS if entry_point in parameter.entry_points]
    for parameter in table:
        shown = json.dumps(parameter.default)
        parser.add_argument(
            f"--{parameter.name}", default=parameter.default, metavar="…", help=f"{parameter.help} (default: {shown})"
        )
    args = Parameters(**vars(parser.parse_args(argv)))
    for parameter in table:
        setattr(args, parameter.name, _value(parameter, getattr(args, parameter.name)))
    return args


def written(value: str | int | float | bool) -> str:
    """The value as it is stored and given: `true`, not Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(parameter: Parameter, given: Any) -> str | int | float | bool:
    kind = type(parameter.default)
    if credentials.held_by(str(given)):
        shown = quoted(credentials.scrubbed(str(given)))
        remedy = "parameters are stored: give it in the environment, and revoke it if `mlflow run` was given it"
        raise BadInput(f"{parameter.name}: {shown} held a password, key or token; {remedy}")
    if len(str(given)) > CHARACTERS:
        raise BadInput(
            f"{parameter.name}: {quoted(given)} is longer than {CHARACTERS:,} characters; put it into a file"
        )
    if not (str(given).isprintable() if parameter.name != "stop" else _is_text(given)):
        raise BadInput(f"{parameter.name}: {quoted(given)} holds what can't be printed; remove it")
    if kind is bool:
        truth = {"true": True, "false": False}
        if str(given).lower() not in truth:
            raise BadInput(f"{parameter.name}: {quoted(given)} is neither true nor false")
        return truth[str(given).lower()]
    if kind is str:
        if parameter.choices and given not in parameter.choices:
            near = difflib.get_close_matches(given, parameter.choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(filter(None, parameter.choices))
            raise BadInput(f"{parameter.name}: {quoted(given)} is none of {known}{hint}")
        if parameter.pattern and given and not re.fullmatch(parameter.pattern, given):
            raise BadInput(f"{parameter.name}: {quoted(given)} can't be one; {parameter.remedy}")
        return str(given)
    try:
        value: float = float(given) if kind is float else int(given)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise BadInput(f"{parameter.name}: {quoted(given)} is not {words}") from None
    if not parameter.low <= value <= parameter.high:  # NaN fails too
        shown = given if len(str(given)) < 30 else quoted(given)
        raise BadInput(f"{parameter.name}: {shown} is out of range; {parameter.low:g} to {parameter.high:g}")
    return value


def _is_text(given: str) -> bool:
    """Whether the text can be written as UTF-8. A byte that isn't UTF-8 arrives here as half a character."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return False
    return True


def stop_strings(stop: str) -> list[str]:
    """The `stop` parameter as a list. `stop` is a JSON list of texts, or one text.

    Raises:
        BadInput: a JSON list holds something other than non-empty texts, or is nested too deeply.
    """
    if not stop.startswith("["):
        return [stop] if stop else []
    try:
        texts = json.loads(stop)
    except ValueError:
        return [stop]
    except RecursionError:
        raise BadInput(f"stop: {quoted(stop)} is nested too deeply; write a list of texts") from None
    if not all(isinstance(text, str) and text and _is_text(text) for text in texts):
        raise BadInput(f"stop: {quoted(stop)} must be a list of non-empty texts")
    return [str(text) for text in texts]
