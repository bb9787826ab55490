"""Words that many messages share: a value in quotes, the nearest name."""

import difflib
import json
import reprlib
from collections.abc import Iterable

LONGEST = 300  # characters of a value in a message
_short = reprlib.Repr()
_short.maxstring = 60


def quoted(value: object) -> str:
    """A value as one short line for a message. Text is quoted and escaped, and long text is cut in the middle."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        text = _short.repr(value)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 100]}...{text[-97:]}"  # mappings nest
    except ValueError:  # CPython refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"


def counted(number: int, what: str) -> str:
    """`1 prompt`, `1,200 prompts`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def part_of(number: int, whole: int, what: str) -> str:
    """`1 of 24 answers is`, `1,200 of 2,400 answers are`: the beginning of a sentence."""
    return f"{number:,} of {counted(whole, what)} {'is' if number == 1 else 'are'}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(word)[:100].lower(), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_line(error: object, longest: int = 500) -> str:
    """An error's message in one line of at most `longest` characters. An empty message gives the type's name."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
