"""Passwords, keys and tokens, recognised so that none is stored or shown.

MLflow keeps parameters and tags, and consoles are logged. So a parameter that holds a secret is refused before a run is
opened, and what is printed or written into a tag goes through `scrubbed`. Known are: user and password in a URL, a
query that carries a key or a signature, the forms that tokens of well-known services have, and the values of this
process's own environment variables that are named like secrets. Any other password looks like any other word.
"""

import os
import re

SHOWN = "…"
NAME = r"(?:[\w.-]*(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key|credential|signature)|sig|key|pwd)"
IN_URL = re.compile(r"(?<=://)[^\s/@?#'\"]+@")  # user:password@, token@
IN_QUERY = re.compile(rf"([?&;]{NAME}=)[^\s&;#'\"]+", re.IGNORECASE)
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abpr]-[\w-]{10,}|AKIA[A-Z0-9]{16}|dapi[0-9a-f]{32}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
VARIABLE = re.compile(r"(?i)(?:^|_)(?:token|secret|passw(?:or)?d|(?:api_?|access_?|private_?)?key|credentials)(?:$|_)")
LENGTH = 8  # of a variable's value, below which it may be any word


def scrubbed(text: str) -> str:
    """The text with an ellipsis in the place of every secret."""
    for value in _values():
        text = text.replace(value, SHOWN)
    return TOKEN.sub(SHOWN, IN_QUERY.sub(rf"\1{SHOWN}", IN_URL.sub(f"{SHOWN}@", text)))


def held_by(text: str) -> bool:
    return scrubbed(text) != text


def _values() -> list[str]:
    """What this process's environment keeps secret, the longest first."""
    named = [value for name, value in os.environ.items() if VARIABLE.search(name)]
    named += os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")  # which may hold several keys
    named = [value.strip() for value in named if len(value.strip()) >= LENGTH]
    return sorted((value for value in named if not value.startswith(("/", "~"))), key=len, reverse=True)
