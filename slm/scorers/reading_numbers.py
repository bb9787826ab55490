"""Finds the number that an answer gives, and reads numbers as people write them.

It reads 1,234.5, 1 234, 1.234,56, 12,34,567, 3/4, 1 1/2, 2^10, 5 x 10^3, 5k, -3 and words up to a hundred. Ranges
(5-10), subtractions (8 - 3), dates, times and names (H2O) are no numbers. It does not compute: "6 * 7" is not 42.

This module is pure. All patterns have bounded repetitions.
"""

import decimal
import re
from decimal import Decimal
from typing import NamedTuple

from slm.scorers.reading_answers import (
    BOLD,
    CHARACTERS,
    LIST_MARK,
    declared,
    full_lines,
    last_end,
    plain_text,
    sentences,
)

CONTEXT = decimal.Context(prec=60, traps=[])
LAST_NUMBER = "the last number"

_CONCLUDES = re.compile(
    r"(?:^|[.!?,;:\n(]\s{0,4}|\band |\bis )[*_]{0,3}"
    r"(?:therefore|thus|hence|so|consequently|in (?:total|conclusion|all)|altogether|finally|overall)\b"
    r"|\u6240\u4ee5|\u56e0\u6b64",
    re.IGNORECASE,
)
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_VULGAR = {"\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4", "\u2155": "1/5"}
_VULGAR |= {"\u2156": "2/5", "\u2157": "3/5", "\u2158": "4/5", "\u2159": "1/6", "\u215b": "1/8", "\u215c": "3/8"}
_VULGAR |= {"\u215d": "5/8", "\u215e": "7/8"}
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"<<[^<>\n]{0,200}>>", ""),  # a calculator's notes in GSM8K
        (r"\{,\}", ","),
        (r"(?<=\d)(?:\\[,;:! ]|~)(?=\d)", "\u2009"),
        (r"\\([$%#])", r"\1"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s?\{([^{}\n]{0,200})\}", r" \1 "),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\frac\s?(\d)\s?(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\times\b", "\u00d7"),
        (r"\\cdot\b", "\u00b7"),
        (r"\\div\b", "\u00f7"),
        (r"\\(?:approx|to|rightarrow|Rightarrow|implies)\b", "="),
        (r"[\u2248\u2192\u21d2\u2245]", "="),
        (r"\\(?:left|right|quad|qquad|displaystyle)\b|\\[()\[\],;:! ]", " "),
        (r"\^\s?\{\\circ\}|\^\s?\\circ", "\u00b0"),
        (r"\^\s?\{\s?([-+]?\d{1,6})\s?\}", r"^\1"),
        (r"(?<=\d)\s?\*\*\s?(?=[-+]?\d)", "^"),
        (r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]{1,6}", lambda match: "^" + match[0].translate(_SUPERSCRIPTS)),
        (rf"[{''.join(_VULGAR)}]", lambda match: f" {_VULGAR[match[0]]}"),
    )
]
_MARKS = re.compile(r"\*{2,3}|__|`")
_GROUPED = (
    r"\d{1,3}(?:,\d{3}){1,20}(?![\d,])|\d{1,2}(?:,\d{2}){1,12},\d{3}(?![\d,])"  # 1,234,567 and 12,34,567
    r"|\d{1,3}(?:[\u2009'\u2019]\d{3}){1,20}(?!\d)|(?<!\d )\d{1,3}(?: \d{3}){1,6}(?! ?\d)"  # 1 234 567
)
_COMMA = (
    r"\d{1,3}(?:\.\d{3}){1,20},\d{1,9}(?![\d,])|\d{1,3}(?:\.\d{3}){2,20}(?![\d.])"  # 1.234,56 and 1.234.567
    r"|(?<![\d,.])(?<![(\[{])(?:\d{1,3}(?:[\u2009 ]\d{3}){1,6}|0),\d{1,9}(?![\d,])"  # 1 234,56 and 0,123
    r"|(?<![\d,.])(?<![(\[{])\d{1,12},\d{1,2}(?!\d|,\d|\.\d)"  # 3,14
)
_DIGITS = rf"(?:{_GROUPED}|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,6}}(?![A-Za-z\d]))?|(?<![\w.])\.\d+"
_SIGN = r"(?:(?<![\w)\]}])[-+]|(?:(?<=[=:(])|(?<=[=:(] ))- ?|\b(?:minus|negative) )?(?:[$\u20ac\u00a3\u20b9]\s?-?)?"
_TOKEN = re.compile(
    r"(?P<name>(?<![A-Za-z\\])[A-Za-z]{1,40}\d[A-Za-z\d]{0,40}(?:\.\d+)*"  # H2O
    r"|[A-Za-z)\]}][ \u2009]?\^[ \u2009]?[-+]?\d+"  # x^2
    r"|(?:\\sqrt|\u221a)[ \u2009]?(?:\[\d{1,3}\])?(?:\{[^{}\n]{0,200}\}|\d+)"
    r"|\d{1,4}[:/]\d{1,4}[:/]\d{1,4}(?![\d/:])|(?<!\d)\d{1,4}:\d{1,4}(?![\d:])"  # dates and times
    r"|\d+(?:\.\d+)?[ \u2009]?(?:\\pi\b|\u03c0|\\sqrt|\u221a))"
    rf"|(?P<number>(?P<sign>{_SIGN})(?:"
    r"(?:(?P<whole>\d{1,9})[ \u2009]{0,2})?(?:\\frac[ \u2009]?\{(?P<over>[^{}\n]{1,60})\}"
    r"[ \u2009]?\{(?P<under>[^{}\n]{1,60})\}"
    r"|(?<![\d.,/])(?P<top>\d{1,30})/(?P<bottom>\d{1,30})(?![\d/]|[.,]\d))"
    rf"|(?P<comma>{_COMMA})"
    r"|(?P<base>\d{1,30}(?:\.\d{1,30})?)[ \u2009]?\^[ \u2009]?\(?(?P<power>[-+]?\d{1,4})(?!\d|\.\d)"
    rf"|(?P<digits>{_DIGITS})"
    r"(?:[ \u2009]?[\u00d7\u00b7*x][ \u2009]?10[ \u2009]?\^[ \u2009]?\(?(?P<ten>[-+]?\d{1,4})(?!\d))?"
    r"(?:(?P<suffix>[kKM]|bn|mn)(?![A-Za-z\d])"
    r"|[ \u2009](?P<magnitude>hundred|thousand|million|billion|trillion|lakh|crore)\b)?"
    r"))",
    re.ASCII,
)
_MAGNITUDES = {"k": 3, "K": 3, "M": 6, "mn": 6, "bn": 9, "hundred": 2, "thousand": 3, "million": 6, "billion": 9}
_MAGNITUDES |= {"trillion": 12, "lakh": 5, "crore": 7}
_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_WORDS = {word: value for value, word in enumerate(_ONES)} | _TENS | {"fourty": 40, "hundred": 100}
_WORD = re.compile(
    r"(?<![\w-])(?P<sign>minus |negative )?(?:(?P<hundred>(?:one |a )?hundred)"
    rf"|(?P<tens>{'|'.join(_TENS)}|fourty)(?:[- ](?P<unit>{'|'.join(_ONES[1:10])}))?"
    rf"|(?P<one>{'|'.join(_ONES)}))(?![\w-])",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"(?:no|any|every|each|this|that|which|some|the|other|another|only) $", re.IGNORECASE)
_CURRENCY = "$\u20ac\u00a3\u20b9"
_LEFT_DASH = re.compile(rf"[\d%)\]}}][{_CURRENCY}]?[ \t]{{0,2}}[-\u2013][ \t]{{0,2}}[{_CURRENCY}]?$")
_RIGHT_DASH = re.compile(rf"[%{_CURRENCY}]?[ \t]{{0,2}}[-\u2013][ \t]{{0,2}}[{_CURRENCY}]?[\d(]")
_UNIT = r"(?:[A-Za-z/]{1,14}[ \t]{1,3})?"
_LEFT_OPERATOR = re.compile(
    rf"[\d%)\]}}][ \t]{{0,3}}{_UNIT}"
    r"(?:[+*\u00d7\u00f7\u00b7/^-]|\bx|\b(?:of|times|plus|minus|divided by|multiplied by))[ \t]{0,3}"
    rf"[{_CURRENCY}(]{{0,2}}$"
)
_RIGHT_OPERATOR = re.compile(
    rf"%?[ \t]{{0,3}}(?:{_UNIT}(?:[+*\u00d7\u00f7\u00b7/-]|x|of|times|plus|minus|divided by|multiplied by)"
    rf"[ \t]{{0,3}}[{_CURRENCY}(]{{0,2}}\d|=)"
)
_LABEL = re.compile(
    r"(?:\b(?:step|part|question|problem|pages?|figure|table|method|equation|section|example|index)|#)[ \t]?$",
    re.IGNORECASE,
)
_AFTERLIST_MARK = re.compile(r"[.)][*_ \t]{1,4}\S")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")
_NEGATED = re.compile(r"\b(?:not|isn't|wasn't|than|never)[ \t](?:just |only )?$", re.IGNORECASE)
_LINKS = re.compile(
    r"=|\b(?:is|are|was|were|be|equals?|gets?|gives?|makes?|has|have|had|needs?|costs?|earns?|takes?|travels?|pays?|leaves?"
    r"|totals?|totall?ing|becomes?|weighs?|contains?|sold|spent|made|cost|returns?|prints?|says?|i\.e\.)(?![\w'])",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:[\s*_#:>`$\-|\\\[({~\"'\u201c=]|\b(?:approximately|about|roughly|exactly|simply|equal to|that|a total of)\b"
    r"|(?<![A-Za-z])[a-zA-Z] ?=){0,20}",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"[ \t]?(?:%|\u00b0 ?[CF]?|[\u20ac$\u00a3\u20b9]|(?:[^\W\d_]{1,20}(?:[/^][\w^]{1,8})?[ \t]?){0,4}(?:\^\d)?)",
    re.ASCII,
)


class FoundNumber(NamedTuple):
    value: Decimal
    how: str  # "" for a declared answer, else where the number was found


class _Candidate(NamedTuple):
    value: Decimal
    start: int
    end: int
    doubtful: bool  # part of a calculation, a list mark or similar


def number_of(text: str) -> Decimal | None:
    """The number that the whole text is, as "1,200", "3/4" or "seven", or None."""
    text = _rewritten(text[:1000].translate(CHARACTERS) if len(text) <= 1000 else "").strip().strip("$").strip()
    text = text.rstrip("%").rstrip()
    if not text:
        return None
    for found in (*_candidates(text), *_word_candidates(text)):
        if found.start == 0 and found.end == len(text):
            return found.value
    return None


def find_number(answer: str) -> FoundNumber | None:
    """The number that the answer gives, and where it was found. None if there is no number."""
    text = plain_text(answer)
    for passage in declared(text):
        value = _picked(_rewritten(passage), leads=True)
        if value is not None:
            return FoundNumber(value, "")
    text = re.sub(r"```\w{0,20}", "", text)
    filled = full_lines(text)
    for at in (-1, 0):
        value = _alone(filled[at]) if filled else None
        if value is not None:
            return FoundNumber(value, "")
    return _bold_number(text) or _concluded(text) or _last_number(text)


def _rewritten(text: str) -> str:
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return _MARKS.sub("", text)


def _alone(line: str) -> Decimal | None:
    """The number of a line that holds only a number and perhaps a unit."""
    if len(line) > 200:
        return None
    text = _rewritten(line).strip().strip("*_#>|$ \t\"'").lstrip("=").strip()
    text = re.sub(r"^[A-Za-z] ?= ?", "= ", text)
    text = re.sub(r"^- (?=\d)", "", text).rstrip(".!$").rstrip()
    found = _candidates(text)
    if len(found) == 1 and not text[: found[0].start].strip("= ") and _BARE.fullmatch(text, found[0].end):
        return found[0].value
    words = _word_candidates(text)
    return (
        words[0].value if len(words) == 1 and not found and (words[0].start, words[0].end) == (0, len(text)) else None
    )


def _bold_number(text: str) -> FoundNumber | None:
    bold = [match for match in BOLD.finditer(text) if re.search(r"\d", match[1] or match[2] or "")]
    bold = [match for match in bold if not re.search(r":\s*$|^\s*(?:step|part|note)\b", match[1] or match[2], re.I)]
    if not bold or re.search(r"=[ \t]{0,3}[$*]{0,3}\d", text[bold[-1].end() :]):
        return None
    value = _picked(_rewritten(bold[-1][1] or bold[-1][2]), leads=True)
    return None if value is None else FoundNumber(value, "the number in bold")


def _concluded(text: str) -> FoundNumber | None:
    """The number of the last sentence with a number, if that sentence draws a conclusion."""
    for sentence in reversed(sentences(text)):
        rewritten = _rewritten(sentence[-1000:])
        if any(not found.doubtful for found in _candidates(rewritten)):
            mark = last_end(_CONCLUDES, rewritten)
            value = _picked(rewritten[mark:], leads=False) if mark else None
            return None if value is None else FoundNumber(value, "the conclusion")
    return None


def _last_number(text: str) -> FoundNumber | None:
    rewritten = _rewritten(text)
    found = _candidates(rewritten[-2000:]) or _candidates(rewritten)
    sure = [candidate for candidate in found if not candidate.doubtful] or found
    if sure:
        return FoundNumber(sure[-1].value, LAST_NUMBER)
    if re.search(r"\d", rewritten):
        return None  # the digits are a range, a subtraction or names
    for sentence in reversed(sentences(rewritten)):
        words = _word_candidates(sentence)
        if words:
            value = _chosen_candidate(sentence, words)
            return FoundNumber(value, LAST_NUMBER)
    return None


def _picked(passage: str, leads: bool) -> Decimal | None:
    """The number that a passage gives: the one that it starts with, or the one after its last "=", "is" or similar."""
    found, words = _candidates(passage), _word_candidates(passage)
    lead = _LEAD.match(passage)
    start = lead.end() if lead else 0
    if leads:
        for candidate in (*found, *words):
            if candidate.start <= start < candidate.end and not candidate.doubtful:
                return candidate.value
    found = found or words
    return _chosen_candidate(passage, found) if found else None


def _chosen_candidate(passage: str, found: list[_Candidate]) -> Decimal:
    found = [candidate for candidate in found if not candidate.doubtful] or found
    for link in reversed(list(_LINKS.finditer(passage))[-20:]):
        after = [
            candidate for candidate in found if candidate.start >= link.end() - 1 or candidate.start == link.start()
        ]
        if after and after[0].start - link.end() <= 40:
            return after[0].value
    return found[-1].value


def _candidates(text: str) -> list[_Candidate]:
    """All numbers of a rewritten text, except those of ranges, subtractions, names and negations."""
    found = []
    for token in _TOKEN.finditer(text):
        if token["number"] is None or (value := _value(token)) is None:
            continue
        start, end = token.span()
        before, after = text[max(start - 40, 0) : start], text[end : end + 40]
        if token["sign"].lower().startswith(("minus", "negative")) and re.search(r"\d ?$", before):
            continue
        signed = token["sign"].strip(_CURRENCY + " ")[:1] in ("-", "+")
        if signed and re.search(r"\d[%)]?[ \t]{1,2}$", before):  # 8 -3
            continue
        if _LEFT_DASH.search(before) or _RIGHT_DASH.match(after) or _NEGATED.search(before):
            continue
        listed = LIST_MARK.search(before) if start <= 40 or "\n" in before else None
        doubtful = bool(
            _LEFT_OPERATOR.search(before)
            or _RIGHT_OPERATOR.match(after)
            or _LABEL.search(before)
            or _ORDINAL.match(after)
            or (listed and _AFTERLIST_MARK.match(after))
        )
        found.append(_Candidate(value, start, end, doubtful))
    return found


def _value(token: re.Match) -> Decimal | None:
    with decimal.localcontext(CONTEXT):
        if token["over"] is not None or token["top"] is not None:
            top, bottom = (
                _decimal(token[name]) for name in (("over", "under") if token["over"] else ("top", "bottom"))
            )
            if top is None or not bottom:
                return None
            value = top / bottom
            if token["whole"]:
                value += int(token["whole"])
        elif token["comma"] is not None:
            value = Decimal(re.sub(r"[.\s]", "", token["comma"]).replace(",", "."))
        elif token["base"] is not None:
            value = Decimal(token["base"]) ** int(token["power"])
        else:
            value = Decimal(re.sub(r"[,\s'\u2019]", "", token["digits"]))
            shift = int(token["ten"] or 0) + _MAGNITUDES.get(token["suffix"] or token["magnitude"] or "", 0)
            value = value * Decimal(10) ** shift if shift else value
        negative = "-" in token["sign"] or token["sign"].lower().startswith(("minus", "negative"))
        return value.copy_negate() if negative else value


def _decimal(text: str) -> Decimal | None:
    text = text.strip().replace(",", "")
    return Decimal(text) if re.fullmatch(r"[-+]?\d{1,30}(?:\.\d{1,30})?", text, re.ASCII) else None


def _word_candidates(text: str) -> list[_Candidate]:
    """The number words up to a hundred. "one" is doubtful, because it often is a pronoun."""
    found = []
    for word in _WORD.finditer(text):
        before, after = text[max(word.start() - 12, 0) : word.start()], text[word.end() : word.end() + 4]
        if (
            word["one"]
            and word["one"].lower() == "one"
            and (_PRONOUN.search(before) or after.startswith((" of", " is")))
        ):
            continue
        if word["hundred"]:
            value = 100
        elif word["tens"]:
            value = _WORDS[word["tens"].lower()] + _WORDS.get((word["unit"] or "zero").lower(), 0)
        else:
            value = _WORDS[word["one"].lower()]
        doubtful = value == 1
        found.append(_Candidate(Decimal(-value if word["sign"] else value), word.start(), word.end(), doubtful))
    return found
