"""The built-in scorers. Each compares an answer with its row's expected texts: a value in [0, 1], with a reason.

A scorer may be unable to score: it cannot read an expected value, or a pattern runs out of time. It then gives
`value=None`. The answer is unscored, and unscored never counts as zero. No scorer here checks style or truth, calls a
model or reads a file. A scorer that needs a heavy library imports the library itself.

The scorers are plain functions without bounds. slm/scorers/confined.py runs them in a child process with bounds.
"""

import decimal
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slm.base import strict_json
from slm.base.wording import quoted

SHORT_WORD = 4  # letters. A longer word is rarely a part of another one
PATTERN_SECONDS = 1.0  # of processor time, for a search by the scorer regex

_CHOICE = r"(?<![^\W_]|[-'\u2019&.+/])[{choices}](?![^\W_]|[&+#/]|[-'\u2019][^\W_]|\.[A-Z]\.)"
_BEFORE_CHOICE = " \t*_\"'\u201c\u2018(["
_WORD = re.compile(r"[ \t]+[\"'\u201c\u2018]?(?!(?:is|because|since)\b)\w", re.ASCII)  # a word after the letter
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,6}(?![A-Za-z\d]))?|(?<![\w.])\.\d+"
# A name with digits matches first and is ignored. A minus after a letter, digit or bracket is a hyphen.
_NUMBER = re.compile(
    rf"(?<![A-Za-z])[A-Za-z]+\d[A-Za-z\d]*(?:\.\d+)*|((?:(?<![\w)\]}}])[-+])?(?:[$\u20ac\u00a3]-?)?(?:{_DIGITS}))",
    re.ASCII,
)
_MINUS = str.maketrans("\u2212\ufe63\uff0d", "---")


@dataclass(frozen=True)
class Score:
    """`value` is in [0, 1], or None for an unscored answer. `reason` explains the value in one line."""

    value: float | None
    reason: str


def exact_match(
    output: str, expected: tuple[str, ...], ignore_case: bool = False, ignore_punctuation: bool = False
) -> Score:
    """1 if the answer equals an expected text, without white space at both ends."""

    def plain(text: str) -> str:
        text = text.casefold() if ignore_case else text
        return " ".join(_without_punctuation(text).split()) if ignore_punctuation else text.strip()

    return _verdict("equals", (text for text in expected if plain(text) == plain(output)), output, expected)


def contains(output: str, expected: tuple[str, ...], ignore_case: bool = True, whole_word: bool | None = None) -> Score:
    """1 if an expected text occurs in the answer. With `whole_word`, no letter or digit may stand beside the text.

    By default, that holds for numbers and for words of up to SHORT_WORD letters: "no" isn't in "not", nor 10 in 100.
    """

    def found(text: str) -> bool:
        where, what = (output.casefold(), text.casefold()) if ignore_case else (output, text)
        if _is_short_word(text.strip()) if whole_word is None else whole_word:
            return re.search(rf"(?<![^\W_]){re.escape(what)}(?![^\W_])", where) is not None
        return what in where

    return _verdict("contains", (text for text in expected if text and found(text)), output, expected)


def regex(output: str, expected: tuple[str, ...], pattern: str | None = None, ignore_case: bool = False) -> Score:
    """1 if the answer has a match for `pattern`. Without `pattern`, each expected text is a pattern."""
    import regex  # reads the patterns of `re`, and has a time limit

    patterns = expected if pattern is None else (pattern,)
    found = []
    for text in patterns:
        try:
            if regex.search(text, output, regex.IGNORECASE if ignore_case else 0, timeout=PATTERN_SECONDS):
                found.append(text)
                break
        except TimeoutError:
            return Score(None, f"the pattern {quoted(text)} took longer than {PATTERN_SECONDS:g} s on this answer")
        except regex.error as error:
            return Score(None, f"{quoted(text)} is not a regular expression: {error}")
    return _verdict("matches", found, output, patterns)


def choice(output: str, expected: tuple[str, ...], choices: str = "ABCD") -> Score:
    """1 if the first stand-alone letter of `choices` in the answer is an expected letter.

    An answer of one letter counts in upper and lower case: "b", "(B)", "**B**". In a longer answer, only capitals
    count. No letter, digit, hyphen or similar mark may touch the capital: "A-level", "C++" and "U.S.A." hold no choice.
    At the start of a sentence, A before a word is the article ("A cat sat there"). A is a choice if the next word is
    "is", "because" or "since". I before another word is the pronoun. Any other capital is a choice: "I pick A here".
    """
    wanted = tuple(text.strip().upper() for text in expected)
    if not wanted or any(len(letter) != 1 or letter not in choices for letter in wanted):
        return Score(None, f"expected {_any_of(expected)}, which is not one of the choices {choices}")
    letter = _chosen(output, choices)
    if letter is None:
        return Score(0.0, f"expected {' or '.join(wanted)}, found no choice in {quoted(output)}")
    if letter in wanted:
        return Score(1.0, f"chose {letter}")
    return Score(0.0, f"expected {' or '.join(wanted)}, chose {letter}")


def number(output: str, expected: tuple[str, ...], tolerance: int | float = 0.0) -> Score:
    """1 if the last number in the answer is within `tolerance` (absolute) of an expected number.

    The scorer reads 1,234.5, -3, 2e3, .5, $12 and 50% (as 50). It ignores numbers that are part of a name (H2O).
    The comparison uses decimals: 0.1 + 0.2 is 0.3, and long integers keep every digit.
    """
    wanted = [value for value in map(_whole_number, expected) if value is not None]
    if not wanted:
        return Score(None, f"expected {_any_of(expected)}, which is not a number")
    numbers = _numbers(output)
    if not numbers:
        return Score(0.0, f"expected {_any_of(expected)}, found no number in {quoted(output)}")
    with decimal.localcontext(decimal.Context(prec=60, traps=[])):
        near = [x for x in wanted if x == numbers[-1] or abs(x - numbers[-1]) <= decimal.Decimal(str(tolerance))]
    return _verdict("is", map(str, near), str(numbers[-1]), expected)


def json_schema(output: str, expected: tuple[str, ...], schema: dict | None = None) -> Score:
    """1 if the answer is JSON and fits `schema`. A code fence around the whole answer is taken off, and told.

    Expected texts are ignored.
    """
    fence = re.fullmatch(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```", output.strip(), re.DOTALL)
    try:
        value = json.loads(fence[1] if fence else output, parse_constant=strict_json.no_constant)
    except (ValueError, RecursionError) as error:
        around = "has text around its code fence" if not fence and "```" in output else f"not JSON: {error}"
        return Score(0.0, f"{around}; got {quoted(output)}")
    told = ", in a code fence" if fence else ""
    if schema is None:
        return Score(1.0, f"is JSON{told}")
    import jsonschema
    import referencing

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    # A registry of our own, because the default one fetches a remote $ref from the network.
    errors = kind(schema, registry=referencing.Registry()).iter_errors(value)
    worst = jsonschema.exceptions.best_match(errors)
    if worst is None:
        return Score(1.0, f"fits the schema{told}")
    return Score(0.0, f"does not fit the schema at {worst.json_path}: {quoted(worst.message)}")


def token_f1(output: str, expected: tuple[str, ...]) -> Score:
    """The best F1 of shared words over all expected texts. Words are normalised as in SQuAD (Rajpurkar et al. 2016)."""

    def words(text: str) -> list[str]:
        text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(text: str) -> float:
        wanted, given = words(text), words(output)
        if not wanted or not given:
            return float(wanted == given)
        shared = (Counter(wanted) & Counter(given)).total()
        return 2 * shared / (len(wanted) + len(given))

    return _best("token F1", f1, output, expected)


def rouge_l(output: str, expected: tuple[str, ...]) -> Score:
    """The best ROUGE-L F measure over all expected texts (Lin 2004), from rouge-score without stemming."""
    from rouge_score import rouge_scorer

    # rouge-score reads only a-z and 0-9. A text in another script has no tokens and would always score 0.
    readable = tuple(text for text in expected if re.search(r"[a-z0-9]", text.lower()))
    if expected and not readable:
        return Score(None, f"expected {_any_of(expected)}, in which ROUGE finds no word: it reads a-z and 0-9 only")
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    return _best("ROUGE-L", lambda text: scorer.score(text, output)["rougeL"].fmeasure, output, readable)


def math(output: str, expected: tuple[str, ...]) -> Score:
    """1 if math-verify finds the answer equal to an expected text, as mathematics (1/2, 0.5 and 50% are equal)."""
    import logging

    from math_verify import parse, verify

    # math-verify's own time limit uses the wall clock, so it would depend on the machine's load
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns when it has no time limit

    def read(text: str) -> list:
        # math-verify reads "2x+3" without dollars as 2. So a short text without words gets dollars around it.
        bare = len(text) <= 200 and not re.search(r"[$]|\\[(\[]|\\boxed|(?<![\\A-Za-z])[A-Za-z]{2,}", text)
        return parse(f"${text.strip()}$" if bare else text, parsing_timeout=None, raise_on_error=True)

    wanted = [(text, value) for text in expected if (value := read(text))]
    if not wanted:
        return Score(None, f"expected {_any_of(expected)}, which cannot be read as mathematics")
    try:
        given = read(output)
    except MemoryError:
        raise
    except Exception as error:
        return Score(0.0, f"{quoted(output)} cannot be read as mathematics: {type(error).__name__}")
    equal = (text for text, value in wanted if verify(value, given, timeout_seconds=None, raise_on_error=True))
    return _verdict("is equal to", equal, output, expected)


BUILT_IN: dict[str, Callable[..., Score]] = {
    function.__name__: function
    for function in (exact_match, contains, regex, choice, number, json_schema, token_f1, rouge_l, math)
}


def _chosen(output: str, choices: str) -> str | None:
    alone = output.strip(string.whitespace + string.punctuation)
    if len(alone) == 1 and alone.upper() in choices:
        return alone.upper()
    for match in re.finditer(_CHOICE.replace("{choices}", re.escape(choices)), output, re.ASCII):
        letter, before = match[0], match.start()
        while before and output[before - 1] in _BEFORE_CHOICE:
            before -= 1
        starts = not before or output[before - 1] in ".!?:\n"
        if not _WORD.match(output, match.end()) or not (letter == "I" or (letter == "A" and starts)):
            return letter
    return None


def _numbers(text: str) -> list[decimal.Decimal]:
    found = (match[1] for match in _NUMBER.finditer(text.translate(_MINUS)) if match[1])
    return [decimal.Decimal(re.sub(r"[$\u20ac\u00a3,]", "", text)) for text in found]


def _whole_number(text: str) -> decimal.Decimal | None:
    match = _NUMBER.fullmatch(text.translate(_MINUS).strip().rstrip("%").rstrip())
    return _numbers(text)[0] if match and match[1] else None


def _without_punctuation(text: str) -> str:
    return "".join(m for m in text if m not in string.punctuation and not unicodedata.category(m).startswith("P"))


def _is_short_word(text: str) -> bool:
    """Whether a text is a number, or a word of few Latin letters. Other scripts may have no blanks between words."""
    return text.isascii() and (text.isdigit() or (text.isalnum() and len(text) <= SHORT_WORD))


def _any_of(expected: tuple[str, ...]) -> str:
    more = [f"{len(expected) - 3} more"] if len(expected) > 3 else []
    return " or ".join([*map(quoted, expected[:3]), *more]) or "nothing"


def _verdict(verb: str, hits: Iterable[str], output: str, expected: tuple[str, ...]) -> Score:
    if not expected:
        return Score(None, "nothing is expected of this row")
    hit = next(iter(hits), None)
    if hit is not None:
        return Score(1.0, f"{verb} {quoted(hit)}")
    return Score(0.0, f"expected {_any_of(expected)}, got {quoted(output)}")


def _best(measure: str, value_of: Callable[[str], float], output: str, expected: tuple[str, ...]) -> Score:
    if not expected:
        return Score(None, "nothing is expected of this row")
    value, text = max(((value_of(text), text) for text in expected), key=lambda pair: pair[0])
    return Score(value, f"{measure} {value:.2f} with {quoted(text)}, got {quoted(output)}")
