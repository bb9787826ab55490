"""Logs the two wrappers. Its MLflow calls write a model, or look for a registered version of the same model.

Both wrappers are `chat_model.py` with its parts in `chat_parts`, as models from code. The weights are written at most
once. A store on this machine gets them directly from the checkpoint's folder (slm/base/cache.py, `place`). For another
store, the uploaded folder has links to them.

The pipeline model also has MLflow's transformers flavor, over the same files. `mlflow.transformers.load_model` gives
the pipeline. pyfunc keeps a contract that MLflow 3.17's own `llm/v1/chat` lacks: parameters per row, stop strings,
seeds, counts and batches. This module writes the flavor's entries itself. `mlflow.transformers.save_model` would load
the model, write its weights again in fp32, and request a model card from the hub.
"""

import functools
import importlib.metadata
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.llm import CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import AnyType, Array
from mlflow.utils.uri import is_databricks_unity_catalog_uri, is_oss_unity_catalog_uri

from slm.base import cache, environment
from slm.models import chat_model, manifest, onnx_export, wrappers
from slm.models.checkpoints import Checkpoint

PACKAGES = {
    "pipeline": (
        "mlflow",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "accelerate",
        "jinja2",
        "numpy",
        "llguidance",
    ),
    "onnx": ("mlflow", "onnxruntime-genai", "onnxruntime", "tokenizers", "jinja2", "numpy", "llguidance"),
}
SETTINGS = {  # 0 and "": the wrapper chooses
    "pipeline": {"batch_size": 0, "threads": 0, "dtype": "auto", "device": "auto"},
    "onnx": {"batch_size": 0, "threads": 0, "execution_provider": "", "runtime": "auto"},
}
NAME = 100  # characters of a checkpoint's name in the name of a logged model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def log_pipeline(checkpoint: Checkpoint, generation: dict, save_weights: bool = True, **log) -> ModelInfo:
    """Logs a checkpoint as a transformers chat model (task llm/v1/chat). `logged_name` names it.

    `generation` holds the defaults of temperature, top_p, seed and stop. It may hold batch_size, threads, dtype and
    device. The default of max_tokens is the wrapper's: an evaluation's limit would cut the answers of a served model.
    """
    return _log("pipeline", checkpoint, "chat", generation, save_weights=save_weights, **log)


def log_onnx(export: Checkpoint, schema: str, generation: dict, precision: str, **log) -> ModelInfo:
    """Logs an ONNX GenAI folder as a pyfunc model, with the `prompt` or the `chat` schema. `logged_name` names it.

    `generation` is as in `log_pipeline`, with execution_provider and runtime in the place of dtype and device.
    """
    return _log("onnx", export, schema, generation, metadata={"precision": precision}, **log)


def logged_name(checkpoint: str, wrapper: str, precision: str = "") -> str:
    """The name of a logged model: `Phi-3-mini-4k-instruct-onnx-int4`, or `…-pipeline`.

    `checkpoint` is the checkpoint's name. MLflow allows no `/ : . % ' "` in a name. The precision of a ready ONNX
    folder is unknown.
    """
    told = [checkpoint[:NAME], wrapper, *([precision] if precision not in ("", onnx_export.AS_GIVEN) else [])]
    return re.sub(r"[^\w-]+", "-", "-".join(told))


def _log(wrapper, checkpoint, schema, generation, *, metadata=None, save_weights=True, registered_model_name=""):
    template, special_tokens = checkpoint.chat_template
    facts = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "model.sha256": checkpoint.sha256,
        "chat_template": template,
        "special_tokens": special_tokens,
        "schema": schema,
        "wrapper": {"version": chat_model.VERSION, "sha256": wrappers.own_sha256()},
    } | ({"task": "llm/v1/chat"} if schema == "chat" else {})
    metadata = facts | (metadata or {})
    if registered_model_name:
        settings = _settings(wrapper, checkpoint, schema, generation, save_weights)
        left = _left_behind(registered_model_name, metadata, signature(schema, generation), settings)
        if left:
            return left
    return Model.log(
        artifact_path=None,
        name=logged_name(checkpoint.name, wrapper, metadata.get("precision", "")),
        flavor=sys.modules[__name__],
        flavor_name="transformers" if wrapper == "pipeline" else "pyfunc",
        registered_model_name=registered_model_name or None,
        metadata=metadata,
        params={"model": checkpoint.name, "precision": metadata.get("precision", ""), "schema": schema}
        | ({"revision": checkpoint.revision} if checkpoint.revision else {}),
        validate_serving_input=False,  # the next step loads and scores the model
        checkpoint=checkpoint,
        wrapper=wrapper,
        schema=schema,
        generation=generation,
        save_weights=save_weights,
    )


def _settings(wrapper: str, checkpoint: Checkpoint, schema: str, generation: dict, save_weights: bool) -> dict:
    """The model_config that is logged. MLflow lets a loader override only entries that model_config has."""
    settings = {name: generation.get(name) or default for name, default in SETTINGS[wrapper].items()}
    settings |= {"schema": schema, "model_name": checkpoint.name}
    return settings if save_weights else settings | {"hub_id": checkpoint.hub_id, "revision": checkpoint.revision}


def _left_behind(registered_name: str, metadata: dict, wanted: ModelSignature, settings: dict) -> ModelInfo | None:
    """A registered version of exactly this model from a run that ended too early, or None.

    Its use avoids a second registration of the same model.
    """
    client, quoted = mlflow.MlflowClient(), registered_name.replace("'", "''")
    for version in client.search_model_versions(f"name = '{quoted}'", max_results=10):
        source = version.source or ""
        if not source.startswith("models:/m-"):
            continue
        logged = client.get_logged_model(source.removeprefix("models:/"))
        if logged.status != "READY" or not logged.source_run_id:
            continue
        if client.get_run(logged.source_run_id).info.status == "FINISHED":
            continue
        info = mlflow.models.get_model_info(source)
        config = info.flavors["python_function"].get("config")
        if (info.metadata, info.signature, config) == (metadata, wanted, settings):
            info.registered_model_version = version.version
            return info
    return None


def save_model(path, mlflow_model, checkpoint, wrapper, schema, generation, save_weights=True, **_):
    """Writes an MLflow model folder. `Model.log` calls this function.

    If a store on this machine already has the weights' files, the folder does not have them.
    """
    path = Path(path)
    settings = _settings(wrapper, checkpoint, schema, generation, save_weights)
    question = "What is the capital of France?"
    example = {"prompt": question} if schema == "prompt" else {"messages": [{"role": "user", "content": question}]}
    # MLflow would compare the requirements with the installed packages, which takes a third of a second
    unchecked = mock.patch("mlflow.utils.environment.warn_dependency_requirement_mismatches")
    with tempfile.TemporaryDirectory() as scratch, unchecked:
        mlflow.pyfunc.save_model(
            path=path,
            python_model=chat_model.__file__,
            mlflow_model=mlflow_model,
            signature=signature(schema, generation),
            input_example=example,
            model_config=settings,
            pip_requirements=requirements(wrapper, Path(scratch)),
        )
    for file, content in wrappers.own_code().items():  # MLflow has copied chat_model.py alone
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_bytes(content)
    artifact, place = ("onnx", wrappers.PLACES[0]) if wrapper == "onnx" else ("checkpoint", wrappers.PLACES[1])
    pyfunc = mlflow_model.flavors["python_function"]
    placed: dict[str, Any] = {}
    if save_weights:
        put = functools.partial(_put, checkpoint, path, _store_here(mlflow_model.artifact_path))
        placed |= put(place, checkpoint.manifest)
        pyfunc["artifacts"] = {artifact: {"path": place, "uri": place}}
        mlflow_model.model_size_bytes = checkpoint.bytes
    if wrapper == "pipeline":
        mlflow_model.flavors["transformers"] = _transformers_flavor(checkpoint, save_weights)
        if save_weights:
            placed |= put("components/tokenizer", [name for name in TOKENIZER_FILES if name in checkpoint.manifest])
    mlflow_model.save(str(path / "MLmodel"))
    written = manifest.write(path, place, placed)
    if mlflow_model.model_id:  # only a logged model has an id, not a saved one
        mlflow.MlflowClient().set_logged_model_tags(mlflow_model.model_id, {manifest.TAG: written.sha256})


def signature(schema: str, generation: dict) -> ModelSignature:
    """The signature of a schema. `prompt`: {"prompt": string} -> string. `chat`: OpenAI's fields -> a completion.

    The columns have the type Any. MLflow would refuse a whole number in a column of numbers, a single stop string, and
    parts of text, before the wrapper can say what is wrong. The wrapper checks each value (chat_parts/fields.py). The
    type of `messages` is an array, because MLflow reads a dict without such a column as a table.
    """
    params = ParamSchema([_param(field, generation) for field in chat_model.FIELDS if field.parameter])
    if schema == "prompt":  # without optional columns: spark_udf then needs no names of columns
        return ModelSignature(
            Schema([ColSpec(DataType.string, "prompt", required=True)]), Schema([ColSpec(DataType.string)]), params
        )
    fields: Any = [ColSpec(Array(AnyType()), "messages")]
    fields += [
        ColSpec(AnyType(), field.name, required=False) for field in chat_model.FIELDS if field.name != "messages"
    ]
    return ModelSignature(Schema(fields), CHAT_MODEL_OUTPUT_SCHEMA, params)


def _param(field: chat_model.Field, generation: dict) -> ParamSpec:
    """A parameter of a call. The model's own default comes first. An evaluation's max_tokens is no default."""
    default = field.default if field.name == "max_tokens" else generation.get(field.name, field.default)
    kinds = {"long": int, "double": float, "string": list}
    shape = (-1,) if field.kind == "texts" else None
    return ParamSpec(field.name, DataType[field.parameter], kinds[field.parameter](default), shape)


def requirements(wrapper: str, scratch: Path) -> list[str]:
    """The packages that serving needs, at the versions installed here. A constraints file fixes their dependencies."""
    # torch's CPU and CUDA builds differ only after the plus sign
    names = [environment.installed_as(name) for name in PACKAGES[wrapper]]
    found = environment.closure(names)
    lines = {name: f"{name}=={version.split('+')[0]}" for name, version in found.items()}
    if "torch" in names:  # torch's CUDA build pins its libraries itself; the CPU build has none
        lines = {name: line for name, line in lines.items() if not name.startswith(("nvidia-", "cuda-", "triton"))}
    constraints = scratch / "constraints.txt"
    constraints.write_text("".join(f"{lines[name]}\n" for name in sorted(lines)), encoding="utf-8")
    asked = [lines[name].replace("onnxruntime-gpu==", "onnxruntime-gpu[cuda,cudnn]==") for name in names]
    return [*asked, f"-c {constraints}"]


def _transformers_flavor(checkpoint: Checkpoint, save_weights: bool) -> dict:
    """The MLmodel entries from which mlflow.transformers.load_model builds the pipeline."""
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((checkpoint.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    flavor = {
        "transformers_version": importlib.metadata.version("transformers"),
        "code": None,
        "task": "text-generation",
        "inference_task": "llm/v1/chat",
        "instance_type": "TextGenerationPipeline",
        "framework": "pt",
        "pipeline_model_type": config["architectures"][0],
        "source_model_name": checkpoint.hub_id or str(checkpoint.name),
        "tokenizer_type": tokenizer.get("tokenizer_class") or "PreTrainedTokenizerFast",
        "components": ["tokenizer"],
    }
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        flavor["torch_dtype"] = f"torch.{dtype}"
    if save_weights:
        return flavor | {"model_binary": "model"}
    return flavor | {
        "source_model_revision": checkpoint.revision,
        "tokenizer_name": checkpoint.hub_id,
        "tokenizer_revision": checkpoint.revision,
    }


def _store_here(location: str | None) -> Path | None:
    """A logged model's folder in a store on this machine. None if the folder is uploaded.

    Unity Catalog also gives None: it makes a version from the folder that MLflow wrote, not from the logged model.
    """
    registry = mlflow.get_registry_uri()
    if location is None or is_databricks_unity_catalog_uri(registry) or is_oss_unity_catalog_uri(registry):
        return None
    repository = get_artifact_repository(location)
    return Path(repository.artifact_dir) if isinstance(repository, LocalArtifactRepository) else None


def _put(checkpoint: Checkpoint, path: Path, store: Path | None, place: str, names) -> dict[str, cache.FileRecord]:
    """Puts the checkpoint's files at `place`: into the store, or as links into the folder `path`, which is uploaded.

    Gives the files' records, by path in the model's folder.
    """
    for name in names:
        target = (store or path) / place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in checkpoint.rewritten:
            target.write_bytes(checkpoint.rewritten[name])
        elif store:
            cache.place(checkpoint.folder / name, target)
        else:
            target.symlink_to((checkpoint.folder / name).resolve())
    return {f"{place}/{name}": checkpoint.manifest[name] for name in names}
