"""Moves the registry alias: to the first champion, to a version that passed, and back.

The alias stays where somebody else moved it since the run began.
"""

from slm.base import console, model_uri
from slm.base.errors import BadInput, Unavailable
from slm.base.parameters import Parameters
from slm.models import manifest
from slm.tracking import mlflow_client, registry, run_records, tags


def alias_version(uri: str, alias: str) -> str:
    """The version that `alias` points to now, in the registered model of `uri`. "" if there is no such alias."""
    named = model_uri.registered_version(uri) or model_uri.registered_alias(uri)
    return registry.alias_version(named[0], alias) if named and alias else ""


def is_first(args: Parameters, uri: str, before: str) -> bool:
    """Whether the alias that `baseline` names is the one to be set, and isn't set yet. Says so.

    Then the model of `uri` may become the first version with this alias. Its gate has nothing to compare with.
    `before` is the version that has the alias, "" if none has it.
    """
    name, alias = model_uri.registered_alias(args.baseline) or ("", "")
    if not alias or alias != args.alias or not uri.startswith((f"models:/{name}/", f"models:/{name}@")):
        return False
    if before or not registry.has_model(name):
        return False
    console.out.print(
        f"{name}@{alias} isn't set: the first {alias}; rules against a baseline don't apply", markup=False
    )
    return True


def unchanged(args: Parameters, named: list[tuple[str, str]], baseline: int | None) -> str:
    """Says that the only candidate and the baseline are the same model. "" if they aren't, or with `force`.

    `named` has (label, resolved URI), and `baseline` is the place of the baseline in it.
    """
    if baseline is None or len(named) != 2 or args.force or not registry.have_same_files(named[0][1], named[1][1]):
        return ""
    told = [given if given == found else f"{given} ({found})" for given, found in named]
    return f"{told[0]} and {told[1]} are the same model; there is nothing to evaluate"


def skip(reason: str) -> None:
    """Prints and tags that the active run evaluates nothing."""
    line = f"skipped: {reason}"
    console.out.print(line, markup=False)
    run_records.tag_active_run({tags.GATE: "none", tags.SKIPPED: line})


def promote(uri: str, alias: str, before: str, manifest_sha256: str) -> None:
    """Moves the registry alias to the version that `uri` names.

    `before` is the alias's version at the start of the run. The tracking server must have recorded the manifest of the
    scored files for this version. If somebody else moved the alias to this version since, it stays there.

    Raises:
        Unavailable: somebody else moved the alias to another version since, or recorded other files. The alias does
            not move.
    """
    registered = model_uri.registered_version(uri)
    assert registered is not None  # checked before anything was scored
    name, version = registered
    if set(registry.recorded_manifests(uri)) != {manifest_sha256}:
        raise Unavailable(
            f"alias: {uri} isn't recorded to have the files that were scored ({manifest.TAG} "
            f"{manifest_sha256[:12]}); nothing was moved: run again"
        )
    now = registry.alias_version(name, alias)
    if now not in (before, version):
        moved = f"was {before or 'not set'} when this run began and is {now or 'not set'} now"
        raise Unavailable(f"alias: {name}@{alias} {moved}; version {version} passed and nothing was moved: run again")
    _move(name, alias, version, now)


def set_back(name: str, alias: str, version: str) -> None:
    """Moves an alias of the model `name` to `version`, or to the version that had the alias before.

    Raises:
        BadInput: there is no such alias or version, or it isn't known which version was before.
    """
    now = registry.alias_version(name, alias)
    if not now:
        raise BadInput(f"model_uri: models:/{name}@{alias} isn't set; evaluate -P alias={alias} sets it")
    if not version:
        version = registry.version_tags(name, now).get(f"{alias}.{tags.BEFORE}", "")
        if not version:
            raise BadInput(f"version: it isn't known which version had {name}@{alias} before version {now}; name one")
    if version == now:
        raise BadInput(f"version: {name}@{alias} is version {now} already")
    if not registry.has_version(name, version):
        raise BadInput(f"version: {name} has no version {version}")
    registry.set_alias(name, alias, version)
    line = f"{name}@{alias} is version {version} again, was {now}"
    console.out.print(line, markup=False)
    run_records.name_run(mlflow_client.quiet_mlflow().active_run().info.run_id, line)


def _move(name: str, alias: str, version: str, before: str) -> None:
    if before == version:
        console.out.print(f"{name}@{alias} stays version {version}")
        return
    registry.tag_version(name, version, {f"{alias}.{tags.BEFORE}": before} if before else {})
    registry.set_alias(name, alias, version)
    console.out.print(f"{name}@{alias} is now version {version}, " + (f"was {before}" if before else "the first"))
