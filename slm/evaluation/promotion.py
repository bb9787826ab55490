"""The registry alias: moved to the version that passed, when nobody else has moved the alias since."""

from slm.base import console, model_uri
from slm.base.errors import Unavailable
from slm.models import manifest
from slm.tracking import registry


def alias_version(uri: str, alias: str) -> str:
    """The version that `alias` has now, of the registered model that `uri` names a version of; "" where none."""
    version = model_uri.registered_version(uri)
    return registry.alias_version(version[0], alias) if version and alias else ""


def promote(uri: str, alias: str, before: str, manifest_sha256: str) -> None:
    """Moves the registry alias to the version that `uri` names; `before` is the version it had when the run began.

    The version must be recorded to have the files that were scored, by the hash of their manifest.

    Raises:
        Unavailable: somebody else moved it since, or recorded other files.
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
