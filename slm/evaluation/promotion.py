"""Moves the registry alias to the version that passed, unless somebody else moved the alias since the run began."""

from slm.base import console, model_uri
from slm.base.errors import Unavailable
from slm.models import manifest
from slm.tracking import registry


def alias_version(uri: str, alias: str) -> str:
    """The version that `alias` points to now, in the registered model of `uri`. "" if there is no such alias."""
    version = model_uri.registered_version(uri)
    return registry.alias_version(version[0], alias) if version and alias else ""


def promote(uri: str, alias: str, before: str, manifest_sha256: str) -> None:
    """Moves the registry alias to the version that `uri` names.

    `before` is the alias's version at the start of the run. The tracking server must have recorded the manifest of the
    scored files for this version.

    Raises:
        Unavailable: somebody else moved the alias since, or recorded other files. The alias does not move.
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
    if now != before:
        moved = f"was {before or 'not set'} when this run began and is {now or 'not set'} now"
        raise Unavailable(f"alias: {name}@{alias} {moved}; version {version} passed and nothing was moved: run again")
    registry.set_alias(name, alias, version)
    console.out.print(f"{name}@{alias} is now version {version}" + (f", was {before}" if before != version else ""))
