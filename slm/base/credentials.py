"""Recognises passwords, keys and tokens, so that this project neither stores nor shows them.

MLflow keeps parameters and tags, and consoles are logged. So `slm/base/parameters.py` refuses a parameter that holds a
secret before it opens a run, and every printed line and every tag goes through `scrubbed`. The patterns recognise:

- user and password in a URL, even if the password holds `/`, `#`, `?` or `@`;
- fields of a query and settings in a text, if a secret has such a name (`?sig=…`, `password=…`, `AccountKey=…`);
- the headers `Authorization: …`, `Bearer …` and `Basic …`;
- the tokens of well-known services, and private keys in PEM form;
- the values of this process's environment variables that have the name of a secret.

Not covered: any other password, because it looks like any other word. detect-secrets has more tokens, but its last
release is from May 2024. Its pattern for URLs misses the passwords above, and its search for random-looking text
would refuse commits and hashes.
"""

import base64
import binascii
import os
import re
from pathlib import Path
from urllib.parse import quote

SHOWN = "…"
NAMED = r"passw(?:or)?d|passphrase|secret|(?:api|access|account|private)[-_]?key"
A_TOKEN = r"(?:auth|access|api|bearer|hf|id|job|oauth|refresh|registry|security|session|tracking)[-_]?token"
# user:password@ and token@. After a colon without a port, `/`, `#` and `?` belong to the password.
IN_URL = re.compile(r"(?<=://)(?:[^\s/?#'\"]+|(?!\[)[^\s/@?#'\":]*:(?!\d{1,5}[/?#])[^\s'\"]{0,500})@")
IN_DATABASE_URL = re.compile(
    r"((?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|rediss?|mongodb|amqps?)(?:\+\w+)?://)[^\s/@?#\":]*:[^\s\"]{0,500}@",
    re.IGNORECASE,
)
IN_QUERY = re.compile(
    rf"([?&;#](?:[\w.-]*(?:{NAMED}|token|credential|signature)|sig|key|pwd|pass|auth|code|jwt)=)[^\s&;#'\"]+",
    re.IGNORECASE,
)
SETTING = re.compile(
    rf"(?<![\w.-])((?:[\w.-]*(?:{NAMED}|{A_TOKEN}|_pat|(?:db|user|sql|smtp)_?pass)|token|(?:\w*_)?pwd(?!=[/~]))"
    r"(?:=|[\"']?\s*[:=]\s*(?=[\"'])))(?!(?:none|null|true|false)\b)(?:'[^']+'|\"[^\"]+\"|[^\s&;'\"]+)",
    re.IGNORECASE,
)
WRITTEN = re.compile(  # in YAML, a configuration file or a header, if the value has a digit or a mark
    rf"((?:^|(?<=[\s,{{]))(?:[\w-]*(?:{NAMED}|{A_TOKEN}))\s*[:=]\s*)(?=\S*[\d_+/=!$%&*-])[^\s'\",;<\[{{]{{6,}}",
    re.IGNORECASE,
)
FLAG = re.compile(rf"(--(?:[\w-]*(?:{NAMED}|token))(?:=|\s+))(?!-)[^\s'\"]+", re.IGNORECASE)
HEADER = re.compile(
    r"(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest|api-?key)\s+|(?=\S{0,200}\d)(?=\S{8})))[^\s\"',;]+",
    re.IGNORECASE,
)
BEARER = re.compile(r"(\b(?i:bearer)\s+)(?=\S{0,200}(?:[\d_+/=]|[a-z][A-Z]))[\w+/=~.-]{7,}[\w+/=~-]")
BASIC = re.compile(r"(\b(?i:basic)\s+)([A-Za-z0-9+/]{4,}={0,2})")
PRIVATE_KEY = re.compile(
    rf"(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?!{SHOWN}).+?(?=-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
TOKEN = re.compile(
    r"\b(?:ASIA[A-Z0-9]{16}|hvs\.[\w-]{20,}|ya29\.[\w-]{20,}|dckr_pat_[\w-]{20,}|dop_v1_[0-9a-f]{32,}"
    r"|gsk_\w{20,}|nvapi-[\w-]{20,}|shp(?:at|ca|pa|ss)_[0-9a-fA-F]{20,}|T[A-Z0-9]{8,}/B[A-Z0-9]{8,}/\w{20,}"
    r"|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|dapi[0-9a-f]{32}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{50,}|[rs]k_live_[A-Za-z0-9]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
VARIABLE = re.compile(
    r"(?i)passw(?:or)?d(?:$|_)|(?:bind|smtp|db|root)_?(?:pw|pass)(?:$|_)|(?:redis|smtp)_?auth$|(?:^|_)cookie$|(?:^|_)"
    r"(?:token|secret|pass|passphrase|pwd|pat|(?:api_?|access_?|private_?)?key|credentials)(?:$|_)"
)
PASSWORD_IN_URL = re.compile(r"[\w+.-]+://[^\s/@:]*:(\S+)@[^\s@]+")  # DATABASE_URL and the like
LENGTH = 8  # a shorter value of a variable may be any word


def scrubbed(text: str) -> str:
    """Replaces every secret in the text with an ellipsis."""
    for value in _values():
        text = text.replace(value, SHOWN)
    text = IN_DATABASE_URL.sub(rf"\1{SHOWN}@", text)
    text = IN_URL.sub(f"{SHOWN}@", text)
    text = BASIC.sub(_without_basic, text)
    for pattern in (IN_QUERY, SETTING, WRITTEN, FLAG, HEADER, BEARER, PRIVATE_KEY):
        text = pattern.sub(rf"\1{SHOWN}", text)
    return TOKEN.sub(SHOWN, text)


def held_by(text: str) -> bool:
    return scrubbed(text) != text


def _without_basic(found: re.Match[str]) -> str:
    """Hides the word after `Basic` if the word is base64 of user:password. `Basic arithmetic` stays."""
    try:
        told = base64.b64decode(found[2], validate=True)
    except binascii.Error:
        return str(found[0])
    return f"{found[1]}{SHOWN}" if b":" in told and told.isascii() else str(found[0])


def _values() -> list[str]:
    """The secrets in this process's environment, plain and encoded for a URL, the longest first.

    The name of an existing file is not a secret.
    """
    named = [value for name, value in os.environ.items() if VARIABLE.search(name)]
    named += os.environ.get("PHI3_MLFLOW_API_KEY", "").split(",")  # the variable may hold several keys
    named += [found[1] for value in os.environ.values() for found in (PASSWORD_IN_URL.match(value),) if found]
    named = [value.strip() for value in named if len(value.strip()) >= LENGTH]
    secret = [value for value in named if not (value.startswith(("/", "~")) and _is_path(value))]
    return sorted({form for value in secret for form in (value, quote(value, safe=""))}, key=len, reverse=True)


def _is_path(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
