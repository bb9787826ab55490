"""Finds the passages that declare an answer in a text that reasons. The scorers number, choice and math use them.

People look for a declaration first: `#### 42`, `\\boxed{42}`, "the answer is 42". Then they look for a line that has
nothing else, for bold text, and for a conclusion such as "so she has 42". Without any, they take the last number, or
the first letter. The scorers do the same, and say where they found the answer.

This module is pure. All patterns have bounded repetitions, and a text longer than READ characters is read at its end
only. So the time grows with the length of the text, whatever the text holds.
"""

import re
import unicodedata
from collections.abc import Iterator

READ = 20_000  # characters at the end of an answer
DECLARATIONS = 20  # the last ones of an answer
PASSAGE = 500  # characters of a declaration

_DASHES = dict.fromkeys(map(ord, "\u2212\ufe63\uff0d\u2011"), "-") | dict.fromkeys(map(ord, "\u2013\u2014"), "\u2013")
_BLANKS = dict.fromkeys(map(ord, "\u00a0\u202f\u2009\u2007\u2008"), "\u2009")  # all that stand between digits
_WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x3002: ". ", 0xFF61: ". "}
CHARACTERS = _WIDE | _DASHES | _BLANKS | {0xFF0C: ", ", 0x2044: "/"}
_THOUGHT = re.compile(r"</think(?:ing)?>")
_NEXT_TURN = re.compile(
    r"\n[ \t#*]{0,6}(?:(?:question|problem|user|human|q)[ \t]?\d{0,4}[* \t]{0,3}:|<\|(?:user|im_start|im_end|end))",
    re.IGNORECASE,
)
_IS = (
    r"(?:\b(?:is|was|are|equals|(?:would|should|must|will|has to) be|es|est|ist|lautet|\u00e8|\u00e9)\b(?!\s{0,3}\?)"
    r"|\u662f|\u4e3a|\u306f)"
)
_MARK = r"[^\n.:=?!,;\d+*/]{0,40}?[*]{0,3}[:=]"
_CUE = re.compile(
    r"^[ \t]{0,3}####(?!#)"
    r"|\\(?:boxed|fbox)\s?(?=\{)"
    r"|<answer>"
    r"|^[#*_> \t]{0,10}(?:the |my )?(?:final |correct )?(?:answer|answers)[*_: \t]{0,10}$"
    r"|(?<!/)(?:\b(?:answer|respuesta|r\u00e9ponse|risposta|resposta|antwort|l\u00f6sung|\u043e\u0442\u0432\u0435\u0442)\b"
    r"|\u7b54\u6848|\u7b54\u3048|\u0627\u0644\u062c\u0648\u0627\u0628|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)"
    rf"(?! ?questions?)(?:[^\n.:=?!,;]{{0,60}}?{_IS}|{_MARK})",
    re.IGNORECASE | re.MULTILINE,
)
_NO_CUE = re.compile(r"\b(?:if|whether|wrong|incorrect|common|false|previous|first)[ \t](?:the[ \t])?$", re.IGNORECASE)
LIST_MARK = re.compile(r"(?:^|\n)[ \t>*_]{0,6}$")
STOP = re.compile(
    r"[.!?](?=[ \t]{1,4}[\"'(*_$\u201c]{0,4}[A-Z])|[.!?][*_]{0,3}[ \t]{0,4}$|\n|\. {1,2}(?=[^\x00-\x7f])|</answer>",
    re.MULTILINE,
)
_IS_THE_ANSWER = re.compile(r"\bis (?:the|my) (?:correct |right |final |best )?answer\b", re.IGNORECASE)
_EMPTY = re.compile(r"[\s*_#:>`$\-|\\\[(]*")
_NOT = re.compile(r"[\s*_:]{0,6}(?:\w{1,12}[ \t])?(?:not|never)\b", re.IGNORECASE)
_BUT = re.compile(r"\b(?:but|rather|it'?s|it is)\b", re.IGNORECASE)
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*|(?<!\w)__([^_\n]{1,200})__(?!\w)")
_LINE_MARK = re.compile(
    r"^[ \t]{0,8}(?:>[ \t]?|#{1,6}[ \t]{1,4}(?=[^#\n])|[-*+][ \t]{1,4}|\d{1,2}[.)][ \t]{1,4}(?=\S))", re.MULTILINE
)
_EMPHASIS = re.compile(
    r"\*{2,3}(?=\S)|(?<=\S)\*{2,3}|(?<!\w)__|__(?!\w)|`"  # **bold**, __bold__, `code`
    r"|(?<![\w*)])\*(?=[^\s*])|(?<=[^\s*(])\*(?![\w*($\\ ])"  # *italics*
)
_FORMULA = re.compile(
    r"[\s*_:]{0,6}(?:\$\$[^$]{1,2000}\$\$|\$[^$\n]{1,2000}\$|\\\([^\n]{1,2000}?\\\)|\\\[.{1,2000}?\\\])",
    re.DOTALL,
)
_REMARK = re.compile(r"[\s(*_>-]{0,8}(?:to )?(?:check|verif|note\b|tip\b|hint\b|let me know|you can\b)", re.IGNORECASE)


def plain_text(text: str) -> str:
    """The end of the text with ASCII digits and marks, without thoughts and without a next turn of the model's own."""
    text = text[-READ:].translate(CHARACTERS)
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f]", _ascii_digit, text)
    after = text[last_end(_THOUGHT, text) :]
    text = after if after.strip() else text
    turn = _NEXT_TURN.search(text)
    if (
        turn
        and text[: turn.start()].strip()
        and (_cues(text[: turn.start()]) or len(full_lines(text[: turn.start()])) == 1)
    ):
        return text[: turn.start()]
    return text


def _ascii_digit(match: re.Match) -> str:
    value = unicodedata.decimal(match[0], None)
    return match[0] if value is None else str(value)


def last_end(pattern: re.Pattern, text: str) -> int:
    return max((match.end() for match in pattern.finditer(text)), default=0)


def full_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _cues(text: str) -> list[re.Match]:
    return [
        match for match in _CUE.finditer(text) if not _NO_CUE.search(text[max(match.start() - 20, 0) : match.start()])
    ]


def declared(text: str) -> Iterator[str]:
    """The passages that declare an answer, the last one first: what follows "the answer is", or stands in a box."""
    for cue in reversed(_cues(text)[-DECLARATIONS:]):
        if cue[0].startswith("\\"):
            yield _braced(text, cue.end())
            continue
        start = cue.end()
        empty = _EMPTY.match(text, start)
        assert empty is not None
        if "\n" in text[start : empty.end()]:  # the answer is on one of the next lines
            start = empty.end() if empty.end() == len(text) else max(text.rfind("\n", start, empty.end()) + 1, start)
        most = max(start, empty.end()) + PASSAGE
        stop = STOP.search(text, max(start, empty.end()), most)
        passage = text[start : stop.start() if stop else most]
        if _NOT.match(passage):
            other = _BUT.search(passage)
            if not other:
                continue
            passage = passage[other.end() :]
        yield passage
    for after in reversed(list(_IS_THE_ANSWER.finditer(text))[-DECLARATIONS:]):  # "12 is the answer"
        before = text[max(after.start() - 60, 0) : after.start()]
        yield before[last_end(STOP, before) :].rpartition(", ")[2]


def without_markdown(text: str) -> str:
    """The text without bold, code marks, headings, list marks, quotes and tables. Formulas stay as they are."""
    text = plain_text(text)
    text = _LINE_MARK.sub("", re.sub(r"```\w{0,20}", "", text))
    # math-verify would read "7/12." at the end of a sentence as 7/12.0, which is no fraction
    return re.sub(r"(?<=\d)\.(?=\s|$)", "", _EMPHASIS.sub("", text))


def first_formula(passage: str) -> str:
    """The formula in dollars or brackets at the start of a passage, or else the whole passage."""
    formula = _FORMULA.match(passage)
    return formula[0] if formula else passage


def _braced(text: str, start: int) -> str:
    """What stands in the braces that open at `start`, or the rest of the line if they do not close."""
    depth = 0
    for at in range(start, min(start + PASSAGE, len(text))):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start + 1 : at]
    return text[start + 1 : start + PASSAGE].partition("\n")[0]


def sentences(text: str) -> list[str]:
    """The sentences, without remarks after the last one, such as how to check the answer."""
    found, start = [], 0
    for stop in STOP.finditer(text):
        found.append(text[start : stop.end()])
        start = stop.end()
    found = [sentence for sentence in [*found, text[start:]] if sentence.strip()]
    while len(found) > 1 and _REMARK.match(found[-1]):
        found.pop()
    return found
