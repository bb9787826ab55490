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
from slm.scorers import reading_answers, reading_choices, reading_numbers

SHORT_WORD = 4  # letters. A longer word is rarely a part of another one
PATTERN_SECONDS = 1.0  # of processor time, for a search by the scorer regex


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
    """1 if the letter of `choices` that the answer chooses is an expected letter.

    A declared letter counts first, in upper or lower case: "the answer is b", `\\boxed{B}`, a line "(B)", "**B**".
    Then a conclusion counts: "so B", "option B is correct". Else the first letter counts, and the reason says so.
    Letters that the answer refuses do not count: "A is wrong", "not A". Two letters decide nothing: "A or B".

    No letter, digit, hyphen or similar mark may touch the letter: "A-level", "C++" and "U.S.A." hold no choice.
    At the start of a sentence, A before a word is the article ("A cat sat there"). A is a choice if the next word is
    "is", "because" or "since". I before another word is the pronoun. Any other capital is a choice: "I pick A here".
    """
    if not expected or unreadable("choice", expected, choices):
        return Score(None, f"expected {_any_of(expected)}, which is not one of the choices {choices}")
    wanted = tuple(text.strip().upper() for text in expected)
    found = reading_choices.find_choice(output, choices)
    if found is None:
        return Score(0.0, f"expected {' or '.join(wanted)}, found no choice in {quoted(output)}")
    chose = f"chose {' and '.join(found.letters)}{f', {found.how}' if found.how else ''}"
    if set(found.letters) <= set(wanted):
        return Score(1.0, chose)
    return Score(0.0, f"expected {' or '.join(wanted)}, {chose}")


def number(output: str, expected: tuple[str, ...], tolerance: int | float = 0.0) -> Score:
    """1 if the number that the answer gives is within `tolerance` (absolute) of an expected number.

    A declared number counts first: `#### 42`, `\\boxed{42}`, "the answer is 42", a line of its own, bold, a conclusion.
    Else the last number counts, and the reason says so.

    The scorer reads 1,234.5, 1 234, 1.234,56, 12,34,567, -3, 2e3, 5 x 10^3, 2^10, 3/4, 1 1/2, $12, 5k, 50% (as 50) and
    words up to a hundred. It ignores ranges (5-10), subtractions (8 - 3) and names (H2O).
    The comparison uses decimals: 0.1 + 0.2 is 0.3, and long integers keep every digit.
    """
    wanted = [value for value in map(reading_numbers.number_of, expected) if value is not None]
    if not wanted:
        return Score(None, f"expected {_any_of(expected)}, which is not a number")
    found = reading_numbers.find_number(output)
    if found is None:
        return Score(0.0, f"expected {_any_of(expected)}, found no number in {quoted(output)}")
    with decimal.localcontext(decimal.Context(prec=60, traps=[])):
        near = [x for x in wanted if x == found.value or abs(x - found.value) <= decimal.Decimal(str(tolerance))]
    how = f", {found.how}" if found.how else ""
    if near:
        return Score(1.0, f"is {quoted(str(near[0]))}{how}")
    return Score(0.0, f"expected {_any_of(expected)}, got {quoted(str(found.value))}{how}")


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
    """1 if math-verify finds the answer equal to an expected text, as mathematics (1/2, 0.5 and 50% are equal).

    A declared answer counts first: `\\boxed{42}`, "the answer is 42". Markdown around the mathematics is taken off.
    """
    wanted = [(text, value) for text in expected if (value := _mathematics(text))]
    if not wanted:
        return Score(None, f"expected {_any_of(expected)}, which cannot be read as mathematics")
    import sympy
    from math_verify import verify

    sympy.core.random.seed(0)  # sympy tries random values: each answer gets the same ones at each time
    try:
        plain = reading_answers.without_markdown(output)
        passages = map(reading_answers.first_formula, reading_answers.declared(plain))
        given = next(filter(None, map(_mathematics, passages)), None) or _mathematics(plain)
    except MemoryError:
        raise
    except Exception as error:
        return Score(0.0, f"{quoted(output)} cannot be read as mathematics: {type(error).__name__}")
    equal = (text for text, value in wanted if verify(value, given, timeout_seconds=None, raise_on_error=True))
    return _verdict("is equal to", equal, output, expected)


def _mathematics(text: str) -> list:
    """What math-verify reads in a text, or an empty list."""
    import logging

    from math_verify import parse

    # math-verify's own time limit uses the wall clock, so it would depend on the machine's load
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns when it has no time limit
    # math-verify reads "2x+3" without dollars as 2. So a short text without words gets dollars around it.
    bare = len(text) <= 200 and not re.search(r"[$]|\\[(\[]|\\boxed|(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    return parse(f"${text.strip()}$" if bare else text, parsing_timeout=None, raise_on_error=True)


BUILT_IN: dict[str, Callable[..., Score]] = {
    function.__name__: function
    for function in (exact_match, contains, regex, choice, number, json_schema, token_f1, rouge_l, math)
}


def unreadable(name: str, expected: tuple[str, ...], choices: str = "ABCD") -> str | None:
    """The expected text that keeps the scorer `name` from scoring any answer, or None."""
    if name == "choice":
        return next((text for text in expected if len(text.strip()) != 1 or text.strip().upper() not in choices), None)
    readable: Callable[[str], object] | None = {"number": _is_number, "math": _mathematics}.get(name)
    return expected[0] if readable and expected and not any(map(readable, expected)) else None


def _is_number(text: str) -> bool:
    return reading_numbers.number_of(text) is not None


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
