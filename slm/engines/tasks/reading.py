"""Reads what `tasks` names: tasks of lm-evaluation-harness, as a prompt set whose rows are their documents.

The library reads the files and the data, draws the examples before each question, and writes the questions. A task's
file can name Python functions (`!function`), which run with the user's rights. The command line names every task, and a
prompt set can't. A relative data file is looked for from the repository's root, from here and beside the task's file.

Not covered: tasks with pictures or sound, and tasks that run code which a model wrote (`unsafe_code`).
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slm.base.errors import BadInput, Unavailable
from slm.base.hashing import digest
from slm.base.wording import did_you_mean, one_line, quoted
from slm.models import checkpoints
from slm.prompts.prompt_rows import Prompt, ScorerCall, canonical_rows
from slm.prompts.prompt_sets import PromptSet

FEWSHOT_SEED = 1234  # the library's own
GENERATED = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p")
NEUTRAL = {"num_beams": 1, "top_k": None}  # other generation parameters, with the value that changes nothing
INSTALL = "pip install -r requirements-tasks.txt -c constraints.txt"
NAME = re.compile(r"[^\w.\- ]")  # characters that MLflow allows in no metric's name, or that part it
_HUB = ("ConnectionError", "OfflineModeIsEnabled", "HfHubHTTPError", "LocalEntryNotFoundError", "ReadTimeout")


@dataclass(frozen=True)
class TaskSet(PromptSet):
    """The documents of tasks as prompts, with the library's tasks."""

    loaded: Mapping[str, Any] = field(kw_only=True)  # of TaskManager.load: tasks and groups by name
    limit: int | None = field(kw_only=True)
    templated: bool = field(kw_only=True)  # whether each question goes into the model's chat template

    @property
    def tasks(self) -> dict[str, Any]:
        return dict(self.loaded["tasks"])

    @property
    def groups(self) -> dict[str, Any]:
        return dict(self.loaded.get("groups") or {})

    @property
    def needing_token_scores(self) -> list[str]:
        """The tasks that ask for log probabilities of given texts."""
        return [name for name, task in self.tasks.items() if task.OUTPUT_TYPE != "generate_until"]


def read(specs: str, limit: int = 0, num_fewshot: str = "", templated: bool = False) -> TaskSet:
    """The tasks that `specs` names, by commas: names of the library's tasks, groups and tags, and YAML files.

    Raises:
        BadInput: lm-eval is missing, there is no such task or file, or a task is wrong or can't be answered here.
        Unavailable: the hub that holds a task's data can't be reached.
    """
    _check_installed()
    given = list(dict.fromkeys(filter(None, (spec.strip() for spec in specs.split(",")))))
    if not given:
        raise BadInput(f"tasks: {quoted(specs)} names no task; write tasks=gsm8k, or the path of a YAML file")
    with quiet():
        loaded = _loaded(given)
        for name, task in loaded["tasks"].items():
            _check(name, task)
            _set_fewshot(task, num_fewshot)
        prompts = [
            prompt
            for name, task in loaded["tasks"].items()
            for prompt in _prompts(name, task, loaded.get("groups") or {}, limit or None, templated)
        ]
    canonical = json.dumps(canonical_rows(prompts), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return TaskSet(
        name="+".join(Path(spec).stem if is_file(spec) else spec for spec in given)[:100],
        source=specs,
        prompts=tuple(prompts),
        sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        open_names=frozenset(map(plain, [*loaded["tasks"], *(loaded.get("groups") or {})])),
        loaded=loaded,
        limit=limit or None,
        templated=templated,
    )


def is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def plain(name: str) -> str:
    """A name as a part of a metric's name, in which MLflow allows few characters: `mmlu::law` becomes `mmlu--law`."""
    return NAME.sub("-", name)


def score_name(task: str, metric: str, filter_name: str) -> str:
    """`arc/acc`, or `gsm8k/exact_match/strict-match` of a task with named filters."""
    parts = [task, metric] + ([filter_name] if filter_name != "none" else [])
    return "/".join(map(plain, parts))


def is_mean(task: Any, metric: str) -> bool:
    """Whether the library's figure is the mean of the documents' values, of which a higher one is better."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric, mean) is mean and task.higher_is_better().get(metric, True) is not False


def counting_groups(task: str, metric: str, groups: Mapping[str, Any]) -> list[str]:
    """The groups whose figure for a metric is the mean over all documents of their tasks, this one included."""
    return [
        name
        for name, group in groups.items()
        if task in {child.task_name for child in group.get_all_tasks()}
        for entry in group.aggregate_metric_list or []
        if entry.metric == metric and entry.weight_by_size
    ]


def as_json(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as one text, for a prompt set and for a model that takes conversations.

    Without `add_generation_prompt`, the last message is the beginning of the answer.
    """
    return json.dumps(messages, ensure_ascii=False)


def fewshot_from_start(tasks: Mapping[str, Any]) -> None:
    """Lets each task draw the same examples as before."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's bars and notes: errors are raised."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, shown = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise BadInput(f"tasks: needs lm-eval, which is not installed; {INSTALL}")


def _loaded(given: list[str]) -> Mapping[str, Any]:
    """The library's tasks and groups. The library's own files are read only if a name, or a group in a file, needs
    them: that takes seconds."""
    from lm_eval.tasks import TaskManager

    configs: list[Any] = [_config(spec) if is_file(spec) else spec for spec in given]
    groups = [config for config in configs if isinstance(config, dict) and "group" in config]
    folders = [_path(spec).parent for spec, config in zip(given, configs, strict=True) if config in groups]
    try:
        whole = bool(groups) or any(isinstance(config, str) for config in configs)
        manager = TaskManager(include_path=list(folders) or None, include_defaults=whole)
    except Exception as error:
        raise BadInput(f"tasks: lm-eval can't read its tasks: {one_line(error)}") from None
    for config in configs:
        if isinstance(config, str) and config not in manager.all_tasks:
            hint = did_you_mean(config, manager.all_tasks)
            raise BadInput(f"tasks: {quoted(config)} is no task, group or tag of lm-eval{hint}; or write a YAML's path")
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for spec, config in zip(given, configs, strict=True):
        try:
            part = manager.load([config])
        except Exception as error:  # the user's file, its functions, and the data that it names
            told = f"tasks: {spec} can't be read: {type(error).__name__}: {one_line(error)}"
            if any(kind.__name__ in _HUB for kind in type(error).__mro__):
                raise Unavailable(f"{told}; a hub holds its data") from None
            raise BadInput(told) from None
        for name in part["tasks"]:
            if name in found["tasks"]:
                raise BadInput(f"tasks: {spec} has the task {name}, which is named twice; remove one")
        for kind in ("tasks", "groups"):
            found[kind] |= part.get(kind) or {}
    return found


def _path(spec: str) -> Path:
    path = checkpoints.located(spec)
    if path is None or not path.is_file():
        raise BadInput(f"tasks: {spec!r} does not exist, from the repository's root or from here")
    return path.resolve()


def _config(spec: str) -> dict[str, Any]:
    """The content of a YAML file, with its functions, and with the whole paths of its data files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _path(spec)
    try:
        config = load_yaml(path, resolve_func=True)
    except (Exception, SystemExit) as error:
        raise BadInput(f"tasks: {spec} can't be read: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config.get("task"), str) and "group" not in config:
        raise BadInput(f"tasks: {spec} names no `task`; it is no task of lm-eval")
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        options["data_files"] = _whole(options["data_files"], path.parent, spec)
    return dict(config)


def _whole(files: Any, folder: Path, spec: str) -> Any:
    if isinstance(files, dict):
        return {name: _whole(part, folder, spec) for name, part in files.items()}
    if isinstance(files, list):
        return [_whole(part, folder, spec) for part in files]
    if not isinstance(files, str) or "://" in files or "*" in files:
        return files
    found = checkpoints.located(files) or checkpoints.located(str(folder / files))
    if found is None:
        raise BadInput(f"tasks: {spec} names the data file {files!r}, which does not exist")
    return str(found.resolve())


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise BadInput(f"tasks: {name} runs code that the model writes (unsafe_code); that is not supported here")
    if getattr(task, "MULTIMODAL", False):
        raise BadInput(f"tasks: {name} has pictures or sound, and the models here read text; leave it out")
    if task.OUTPUT_TYPE == "generate_until":
        for option, value in (task.config.generation_kwargs or {}).items():
            if option not in GENERATED and not (option in NEUTRAL and value in (NEUTRAL[option], None)):
                known = ", ".join(GENERATED)
                raise BadInput(f"tasks: {name} sets {option}={value!r} in generation_kwargs; there are {known}")


def _set_fewshot(task: Any, num_fewshot: str) -> None:
    """The number of examples, as the library's evaluation sets it: a task that says 0 keeps 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot and own != 0:
        task.set_config(key="num_fewshot", value=int(num_fewshot))
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _prompts(name: str, task: Any, groups: Mapping[str, Any], limit: int | None, templated: bool) -> Iterator[Prompt]:
    """One prompt for each document, whose text is the first of its requests."""
    fewshot_from_start({name: task})
    try:
        task.build_all_requests(
            limit=limit,
            apply_chat_template=templated,
            fewshot_as_multiturn=True,
            chat_template=as_json if templated else None,
        )
    except Exception as error:
        raise BadInput(f"tasks: {name} can't be asked: {type(error).__name__}: {one_line(error)}") from None
    calls = _scorers(name, task, groups)
    tags = (name, *(group for group, content in groups.items() if name in map(_name, content.get_all_tasks())))
    seen = set()
    for instance in task.instances:
        if instance.doc_id in seen:
            continue
        seen.add(instance.doc_id)
        text = str(instance.args[0] or instance.args[-1])
        messages = tuple(json.loads(text)) if templated and task.OUTPUT_TYPE != "loglikelihood_rolling" else None
        yield Prompt(
            id=f"{name}/{instance.doc_id}",
            messages=messages,
            prompt=None if messages else text,
            expected=expected_of(task, instance.doc),
            scorers=calls,
            cluster=None,
            tags=tags,
        )


def _name(task: Any) -> str:
    return str(task.task_name)


def expected_of(task: Any, document: Any) -> tuple[str, ...]:
    """The right answers of a document as texts. Of a choice, the text and not its number."""
    target = task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    found = target if isinstance(target, list) else [target]
    return tuple(str(choices[one]) if isinstance(one, int) and 0 <= one < len(choices) else str(one) for one in found)


def _scorers(name: str, task: Any, groups: Mapping[str, Any]) -> tuple[ScorerCall, ...]:
    """The scores that a document gets, with a hash over all that they depend on."""
    config = copy.copy(task.dump_config())
    config["metadata"] = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    config.pop("dataset_kwargs", None)  # the paths of data files; the documents are in the rows
    sha256 = digest(json.loads(json.dumps([config, task.VERSION], default=str, sort_keys=True)))
    names = [
        score_name(owner, metric, filters.name)
        for metric in task.aggregation()
        if is_mean(task, metric)
        for filters in task._filters
        for owner in [name, *counting_groups(name, metric, groups)]
    ]
    return tuple(ScorerCall(one, {"task.sha256": sha256}) for one in names)
