"""Finds and describes logged models and registered versions. Sets the tags and aliases of versions."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm.answers import endpoints
from slm.base.errors import BadInput, exhausted
from slm.base.model_uri import registered_alias, registered_version, registered_word
from slm.base.wording import one_line
from slm.tracking.mlflow_client import download, is_infrastructure, quiet_mlflow
from slm.tracking.tags import NOTE

# MLflow's codes for a model, version or alias that isn't there, the last one for an alias
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A logged model's folder on this machine.

    The end of the block removes a downloaded copy. A folder of a store on this machine stays.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        before, tempfile.tempdir = tempfile.tempdir, scratch  # MLflow puts its copies there
        try:
            folder = download(uri)
        finally:
            tempfile.tempdir = before
        yield folder


def resolve(uri: str, trust_code: bool = False) -> str:
    """Checks a model URI, and replaces an alias with its present version. Reads descriptions, and loads no model.

    `latest` and the name of a stage, as in `models:/name/latest`, are replaced too.
    An endpoint must generate one token, and its URI gets the model's name. `trust_code` accepts code that was logged
    with a model and that this project does not know.

    Raises:
        BadInput: there is no such model, version or alias, or the model can't be used.
        Unavailable: an endpoint does not answer, or refuses the key.
    """
    if endpoints.is_endpoint(uri):
        return endpoints.connect(uri).uri
    mlflow = quiet_mlflow()
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    from slm.answers import forms
    from slm.models import wrappers

    named = registered_alias(uri)
    try:
        if named:
            uri = f"models:/{named[0]}/{mlflow.MlflowClient().get_model_version_by_alias(*named).version}"
        elif registered_word(uri):
            uri = "models:/{}/{}".format(*get_model_name_and_version(mlflow.MlflowClient(), uri))
        described = mlflow.models.get_model_info(uri)
        state = _state(uri)
    except Exception as error:
        if is_infrastructure(error) or exhausted(error):
            raise
        raise BadInput(f"{uri}: there is no such model{_registered_hint(uri)}: {one_line(error)}") from None
    if state != "READY":
        raise BadInput(f"{uri} is {state}: its logging never came to an end; log it again")
    wrappers.check(uri, described, trust_code, lambda: _code_of(uri))
    forms.check(uri, described)
    return uri


def is_of_others(uri: str) -> bool:
    """Whether the model is there and was not logged by this project. Reads its description only."""
    from slm.models import wrappers

    try:
        return not wrappers.is_ours(quiet_mlflow().models.get_model_info(uri))
    except Exception:  # `resolve` says what is wrong with it
        return False


def _registered_hint(uri: str) -> str:
    """` (did you mean …?)` where a text that is no URI names a registered model; else nothing."""
    name = uri.removeprefix("models:/").partition("@")[0].partition("/")[0]
    if not name or not has_model(name):
        return ""
    client = quiet_mlflow().MlflowClient()
    quoted = name.replace("'", "''")
    versions = client.search_model_versions(f"name = '{quoted}'", max_results=1000)
    newest = max((int(version.version) for version in versions), default=0)
    return f" (did you mean models:/{name}/{newest}?)" if newest else ""


def _code_of(uri: str) -> dict[str, bytes]:
    """The files of a logged model's wrapper, by path."""
    import json

    from slm.models import manifest, wrappers

    names = [wrappers.FILE]
    with suppress(BadInput, ValueError, KeyError, TypeError):  # models of 0.1.0 have one file
        files = json.loads(_file_of(uri, manifest.NAME))["files"]
        names += sorted(name for name in files if name.startswith(f"{wrappers.PARTS}/"))
    return {name: _file_of(uri, name) for name in names}


def _file_of(uri: str, name: str) -> bytes:
    """A small file of a logged model."""
    import tempfile

    logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", uri)
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        try:
            if logged:  # MLflow takes models:/m-…/name for a version
                uri = quiet_mlflow().get_logged_model(logged[1]).artifact_location
            found = quiet_mlflow().artifacts.download_artifacts(artifact_uri=f"{uri}/{name}", dst_path=scratch)
        except Exception as error:
            if is_infrastructure(error) or exhausted(error):
                raise
            raise BadInput(f"{uri} has no {name}: {one_line(error)}") from None
        return Path(found).read_bytes()


def recorded_manifests(uri: str) -> tuple[str, ...]:
    """The hashes of a logged model's manifest that the registry and the tracking server keep outside its folder.

    A model that another program logged has no hash until it was evaluated as a registered version.
    """
    from mlflow.exceptions import MlflowException

    from slm.models import manifest

    if endpoints.is_endpoint(uri):
        return ()
    mlflow = quiet_mlflow()
    client, found, version = mlflow.MlflowClient(), [], registered_version(uri)
    if version:
        registered = client.get_model_version(*version)
        found.append(registered.tags.get(manifest.TAG))
        uri = registered.source or ""
    logged = re.fullmatch(r"models:/(m-[0-9a-f]+)", uri)
    model_id = logged[1] if logged else None
    try:
        if uri.startswith("runs:/"):
            model_id = _model_of_run(client, uri)
        elif not model_id and not version:
            model_id = mlflow.models.get_model_info(uri).model_id
        if model_id:
            found.append(client.get_logged_model(model_id).tags.get(manifest.TAG))
    except MlflowException as error:
        if is_infrastructure(error) or logged:
            raise
    return tuple(dict.fromkeys(filter(None, found)))  # a model on this machine may belong to another server


def _state(uri: str) -> str:
    """The state of a logged model in MLflow. The registry says READY even for a version whose model is not READY."""
    mlflow = quiet_mlflow()
    version = registered_version(uri)
    if version:  # over HTTP, MLflow gives no model_id for a version
        uri = mlflow.MlflowClient().get_model_version(*version).source or ""
    model_id = re.fullmatch(r"models:/(m-[0-9a-f]+)", uri)
    return str(mlflow.get_logged_model(model_id[1]).status) if model_id else "READY"


def _model_of_run(client, uri: str) -> str | None:
    """The id of the newest LoggedModel that `runs:/RUN_ID/name` names on the tracking server. None if there is none."""
    run_id, _, name = uri.removeprefix("runs:/").partition("/")
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in (outputs.model_outputs if outputs else ())]
    named = sorted((model for model in models if model.name == name), key=lambda model: model.creation_timestamp)
    return named[-1].model_id if named else None


def version_source(uri: str) -> str:
    """The source URI of a registered version; "" for any other URI. The registry may reuse a version's number."""
    version = registered_version(uri)
    return quiet_mlflow().MlflowClient().get_model_version(*version).source if version else ""


def alias_version(name: str, alias: str) -> str:
    """The version that an alias names now; "" if there is none."""
    found = _found(lambda: quiet_mlflow().MlflowClient().get_model_version_by_alias(name, alias))
    return str(found.version) if found else ""


def version_tags(name: str, version: str) -> dict[str, str]:
    return dict(quiet_mlflow().MlflowClient().get_model_version(name, version).tags)


def tag_version(
    name: str, version: str, tags: dict[str, str], description: str = "", removed: Iterable[str] = ()
) -> None:
    """Sets a version's tags and, if there is one, its description. Removes the tags in `removed`."""
    client = quiet_mlflow().MlflowClient()
    for key in removed:
        client.delete_model_version_tag(name, version, key)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    if description:
        client.update_model_version(name, version, description)


def describe_model(model_id: str, description: str) -> None:
    """Sets the description of a logged model."""
    quiet_mlflow().MlflowClient().set_logged_model_tags(model_id, {NOTE: description})


def set_alias(name: str, alias: str, version: str) -> None:
    quiet_mlflow().MlflowClient().set_registered_model_alias(name, alias, version)


def has_model(name: str) -> bool:
    """Whether the registry has a model of this name."""
    return bool(_found(lambda: quiet_mlflow().MlflowClient().get_registered_model(name)))


def has_version(name: str, version: str) -> bool:
    """Whether the registry has this version of a model."""
    return bool(_found(lambda: quiet_mlflow().MlflowClient().get_model_version(name, version)))


def _found(ask: Callable[[], Any]) -> Any:
    """What the registry answers; None if it says that it has no such thing. Any other failure is raised."""
    try:
        return ask()
    except quiet_mlflow().exceptions.MlflowException as error:
        if error.error_code in ABSENT or "_DOES_NOT_EXIST" in str(error):
            return None
        raise


def have_same_files(first: str, second: str) -> bool:
    """Whether two resolved URIs name one model: the same version, or versions with the same files.

    MLmodel differs each time a model is logged. So its signature and metadata are compared in its place. A model that
    others logged lists no files, and is equal only to versions of the same logged model.
    """
    import json

    from slm.models import manifest

    if first == second:
        return True
    if endpoints.is_endpoint(first) or endpoints.is_endpoint(second):
        return False
    sources = [version_source(uri) for uri in (first, second)]
    if sources[0] and sources[0] == sources[1]:
        return True
    listed, told = [], []
    for uri in (first, second):
        try:
            files = json.loads(_file_of(uri, manifest.NAME))["files"]
        except (BadInput, ValueError, KeyError, TypeError):
            return False
        described = quiet_mlflow().models.get_model_info(uri)
        listed.append({name: record for name, record in files.items() if name != "MLmodel"})
        told.append((described.signature, described.metadata))
    return bool(listed[0]) and listed[0] == listed[1] and told[0] == told[1]
