"""Reads a model URI. This module sends no request to the registry."""

import re


def registered_version(uri: str) -> tuple[str, str] | None:
    """Name and version of `models:/name/version`. None for any other URI."""
    found = re.fullmatch(r"models:/([^/@]+)/(\d+)", uri)
    return (found[1], found[2]) if found else None


def registered_alias(uri: str) -> tuple[str, str] | None:
    """Name and alias of `models:/name@alias`. None for any other URI."""
    found = re.fullmatch(r"models:/([^/@]+)@([^/@]+)", uri)
    return (found[1], found[2]) if found else None


def registered_word(uri: str) -> tuple[str, str] | None:
    """Name and word of `models:/name/latest` or `models:/name/Production`, a stage. None for any other URI."""
    found = re.fullmatch(r"models:/([^/@]+)/([^/@]+)", uri)
    return (found[1], found[2]) if found and not registered_version(uri) else None


def can_be_promoted(uri: str) -> bool:
    """Whether a URI names one registered version, by its number or by an alias."""
    return bool(registered_version(uri) or registered_alias(uri))
