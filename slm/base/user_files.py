"""Finds files that parameters name, and executes a user's Python file to get a function of it.

The file is executed once, in this process and with its rights. The person who starts the process names the file.

Not covered: a time limit, and a sandbox. The hash does not include files that the file imports.
"""

import functools
import hashlib
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from slm.base.environment import REPOSITORY
from slm.base.errors import BadInput
from slm.base.wording import did_you_mean


def located(path: str) -> Path | None:
    """The path in the repository's root or else in the working folder. None if nothing is there."""
    try:
        given = Path(path).expanduser()
        return next((place for place in (REPOSITORY / given, given) if path and place.exists()), None)
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL
        return None


def function_of(parameter: str, spec: str) -> tuple[Any, str, str]:
    """What `file.py:function` names: the object, its name in the file, and the SHA-256 of the file.

    Raises:
        BadInput: there is no such file or function, or the file fails.
    """
    given, _, attribute = spec.rpartition(":")
    if not given or not attribute:
        raise BadInput(f"{parameter}: {spec!r} names no function; write {spec.strip(':')}:function")
    path = located(given)
    if path is None or not path.is_file():
        raise BadInput(f"{parameter}: {given!r} does not exist, from the repository's root or from here")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{parameter}: {given} can't be read: {error.strerror or error}") from None
    try:
        module = _module(path.resolve(), source)
    except ImportError as error:
        raise BadInput(f"{parameter}: {error}") from None
    if attribute not in vars(module):
        public = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise BadInput(f"{parameter}: {given} has no {attribute!r}{did_you_mean(attribute, public)}")
    return vars(module)[attribute], attribute, hashlib.sha256(source).hexdigest()


@functools.cache  # all functions of a file share one execution
def _module(path: Path, source: bytes) -> types.ModuleType:
    """
    Raises:
        ImportError: the file fails. The message says where and why.
    """
    module = types.ModuleType(f"user_file_{hashlib.sha256(bytes(path) + source).hexdigest()[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # a dataclass looks up its own module there
    sys.path.insert(0, str(path.parent))  # the file can import files of its folder, as a script can
    try:
        exec(compile(source, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        place = f"{path.name} line {lines[-1]}" if any(lines) else path.name
        text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())[:500]
        text = text.encode(errors="replace").decode()
        raise ImportError(f"{place}: {type(error).__name__}: {text}") from None
    finally:
        sys.path.remove(str(path.parent))
    return module
