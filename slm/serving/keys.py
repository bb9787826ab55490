"""The API keys of a server: of its environment, or of a file that may change while the server runs."""

import hashlib
import hmac
import os
from pathlib import Path

from slm.base import console
from slm.base.errors import BadInput

VARIABLE, FILE_VARIABLE = "PHI3_MLFLOW_API_KEY", "PHI3_MLFLOW_API_KEY_FILE"


def read_keys(text: str, source: str = VARIABLE) -> list[str]:
    """The API keys in one text, separated by commas or lines. An empty variable holds no key.

    Raises:
        BadInput: the text has only commas and blanks, which would open the server to everybody.
    """
    keys = list(dict.fromkeys(filter(None, map(str.strip, text.replace("\n", ",").split(",")))))
    if not keys and (text or source != VARIABLE):
        raise BadInput(f"{source}: holds no key; write one, or several with commas, or unset the variable")
    return keys


class Keys:
    """The keys that open the server. None of them: the server is open.

    A file with one key per line is read again when it changes. If it can't be read then, or holds no key, the keys of
    before stay.
    """

    def __init__(self, text: str = "", file: str = ""):
        """
        Raises:
            BadInput: both are given, the file can't be read, or one of them holds no key.
        """
        if text and file:
            raise BadInput(f"{VARIABLE}, {FILE_VARIABLE}: are both set; unset one of them")
        self._file, self._stamp, self._said = Path(file) if file else None, (0, 0, 0), ""
        if self._file is None:
            self._set(read_keys(text))
        elif told := self._read():
            raise BadInput(f"{FILE_VARIABLE}: {told}")

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def several(self) -> bool:
        """Whether clients may have different keys, now or later."""
        return self._file is not None or len(self._keys) > 1

    def tenant(self, authorization: str) -> str | None:
        """A name for the key in the header `authorization`, which doesn't tell the key. None if no key is right."""
        if self._file is not None and (told := self._read()) != self._said:
            self._said = told
            if told:
                console.err.print(f"warning: {FILE_VARIABLE}: {told}; the keys of before stay", markup=False)
        if not self._keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        found = [hmac.compare_digest(given.encode(), key.encode()) for key in self._keys]
        return self._names[found.index(True)] if scheme.lower() == "bearer" and any(found) else None

    def _set(self, keys: list[str]) -> None:
        self._keys = keys
        self._names = [f"key {hashlib.sha256(key.encode()).hexdigest()[:12]}" for key in keys]

    def _read(self) -> str:
        """Reads the file if it has changed. Returns why that fails, or ""."""
        assert self._file is not None
        try:
            status = self._file.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return ""
            self._set(read_keys(self._file.read_text(encoding="utf-8"), str(self._file)))
        except OSError as error:
            return f"{self._file}: {error.strerror or error}"
        except UnicodeDecodeError:
            return f"{self._file}: is no text"
        except BadInput as error:
            return str(error)
        self._stamp = stamp
        return ""


def of_environment() -> Keys:
    return Keys(os.environ.get(VARIABLE, ""), os.environ.get(FILE_VARIABLE, ""))
