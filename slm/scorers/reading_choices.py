"""Finds the letter that an answer to a multiple-choice question chooses.

Letters that the answer refuses do not count: "A is wrong", "not A". This module is pure. All patterns have bounded
repetitions.
"""

import re
import string
from typing import NamedTuple

from slm.scorers.reading_answers import BOLD, LIST_MARK, declared, full_lines, plain_text

FIRST_LETTER = "the first letter"
_ALONE = r"(?<![^\W_]|[-'\u2019&.+/]){letter}(?![^\W_]|[&+#/]|[-'\u2019][^\W_]|\.[A-Z]\.)"
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed|fbox)\s?\{([^{}\n]{0,200})\}")
_BEFORE_CHOICE = " \t*_\"'\u201c\u2018(["
_WORD_AFTER = re.compile(r"[ \t]+[\"'\u201c\u2018]?(?!(?:is|because|since)\b)\w", re.ASCII)
_FLUFF = re.compile(
    r"(?:[\s*_\"'\u201c\u2018`(\[{:$\\#>|-]|\b(?:definitely|clearly|probably|most likely|likely|therefore|thus"
    r"|the letter|letter|the option|option|the choice|choice)\b){0,30}",
    re.IGNORECASE,
)
_OPEN, _CLOSE = r"[\s*_\"'\u201c\u2018(\[`$\\:]{0,6}", r"[)\]*_\"'\u201d`$.:]{0,4}"
_TRUE = r"(?:correct|right|true|best|better|valid|the (?:correct|right|best|only|answer)|my (?:answer|choice))\b"
_FALSE = r"(?:incorrect|wrong|false|not|out\b|impossible|n[o']t)\b"
_TO_BE = r"(?:is|are|was|were|looks?|seems?|fits?|must be|has to be|can|could|does|do)"
_AFFIRMS_BEFORE = re.compile(
    r"(?:(?:\b(?:so|therefore|thus|hence|consequently|must be|should be|it is|it's|that is|leaves|leaving"
    r"|choose|pick|select|go with|(?:choice|option|letter|one) is|correct|right|selected(?: option)?|i take)"
    r"\b|\u9009)"
    r"(?! (?:not|n't))[,:]?)"
    rf"{_OPEN}(?:(?:the )?(?:correct |right )?(?:option|choice|letter) )?[(\"*]{{0,3}}$",
    re.IGNORECASE,
)
_AFFIRMS_AFTER = re.compile(
    rf"{_CLOSE}[ \t]{{0,3}}(?:(?:it|this|that) is\b|(?:is|are|looks|seems|fits|must be|has to be) "
    rf"(?:both |all |clearly |most )?{_TRUE}"
    rf"|(?:fits|is) (?:better|the best)|[-\u2013|:][ \t]{{0,3}}{_TRUE})",
    re.IGNORECASE,
)
_TICK = re.compile(
    r"[\u2713\u2714\u2705]|[-\u2013:.][ \t]{0,3}(?:this is |is )?(?:the )?(?:correct|right|true)\b", re.IGNORECASE
)
_DENIES_BEFORE = re.compile(
    r"(?:\b(?:not|cannot be|rules? out|ruled out|ruling out|eliminat(?:e|es|ed|ing)|excludes?|excluded|neither"
    r"|nor|than|instead of|discard|neither is)|n't(?: be)?)(?: be)?[ \t]"
    rf"(?:option |choice )?{_OPEN}$",
    re.IGNORECASE,
)
_DENIES_AFTER = re.compile(
    rf"{_CLOSE}[ \t]{{0,3}}(?:{_TO_BE}(?:n't|n\u2019t)\b|{_TO_BE}[ \t](?:all |both |clearly |also )?(?:{_FALSE}|n't)"
    rf"|[-\u2013|:][ \t]{{0,3}}{_FALSE}|[^\n]{{0,60}}[\u274c\u2717\u2718])",
    re.IGNORECASE,
)
_AND = r"(?:,[ \t]?(?:and |or )?|[ \t]?(?:and|or|&|\u548c|\u6216)[ \t]|/)"


class FoundChoice(NamedTuple):
    letters: tuple[str, ...]  # several if the answer doesn't decide: "A or B"
    how: str


class _Letter(NamedTuple):
    """A letter of the choices, or several in a row, as in "A, B and C"."""

    letters: tuple[str, ...]
    start: int
    end: int
    denied: bool


def find_choice(answer: str, choices: str) -> FoundChoice | None:
    """The letter that the answer chooses, and where it was found. None if there is no letter."""
    plain = plain_text(answer)
    text = _WRAPPED.sub(r"\1", plain)
    if letter := _only_letter(text, choices):
        return FoundChoice((letter,), "")
    for passage in declared(plain):
        if letters := _declared_letters(_WRAPPED.sub(r"\1", passage), choices):
            return FoundChoice(letters, "")
    filled = full_lines(text)
    for at in (-1, 0):
        if filled and (letter := _only_letter(filled[at], choices)):
            return FoundChoice((letter,), "")
    found = _letters(text, choices)
    return _bold_letter(text, choices) or _affirmed(text, found) or _first_letter(found)


def _only_letter(text: str, choices: str) -> str | None:
    alone = text.strip(string.whitespace + string.punctuation + "\u00ab\u00bb\u201c\u201d")
    alone = re.sub(r"^(?:option|choice|letter)[ \t]{1,3}[(*\"]{0,3}", "", alone, flags=re.IGNORECASE)
    return alone.upper() if len(alone) == 1 and alone.upper() in choices else None


def _declared_letters(passage: str, choices: str) -> tuple[str, ...]:
    """The letters at the start of a passage, in either case, or else the first that is not denied."""
    fluff = _FLUFF.match(passage)
    start = fluff.end() if fluff else 0
    letter = re.compile(_ALONE.replace("{letter}", f"[{choices}]"), re.ASCII | re.IGNORECASE).match(passage, start)
    found = _letters(passage, choices)
    if letter:
        for several in found:
            if several.start == letter.start():
                return () if several.denied and len(several.letters) > 1 else several.letters
        follows = passage[letter.end() : letter.end() + 3]
        article = letter[0] in "aAI" and _WORD_AFTER.match(passage, letter.end())
        if not article and not re.match(r"['\u2019]", follows):
            return (letter[0].upper(),)
    return next((several.letters for several in found if not several.denied), ())


def _letters(text: str, choices: str) -> list[_Letter]:
    """All stand-alone letters. Small ones count in brackets, before a bracket and after "option"."""
    small = f"[{choices.lower()}]"
    capital = _ALONE.replace("{letter}", f"[{choices}]")
    one = rf"(?:{capital}|(?<=\(){small}(?=\))|(?<=ption ){small}\b|(?<![^\s*(]){small}(?=\)))"
    pattern = re.compile(rf"{one}(?:[)*]{{0,2}}{_AND}{{1,2}}[(*]{{0,2}}{one}){{0,25}}", re.ASCII)
    found = []
    for match in pattern.finditer(text):
        names = tuple(dict.fromkeys(name.upper() for name in re.findall(one, match[0], re.ASCII)))
        before, after = text[max(match.start() - 60, 0) : match.start()], text[match.end() : match.end() + 80]
        if len(names) == 1 and _is_word(text, match):
            continue
        denied = bool(_DENIES_BEFORE.search(before) or _DENIES_AFTER.match(after))
        found.append(_Letter(names, match.start(), match.end(), denied))
    return found


def _is_word(text: str, match: re.Match) -> bool:
    """Whether the letter is the article A at the start of a sentence, or the pronoun I."""
    before = match.start()
    while before and text[before - 1] in _BEFORE_CHOICE:
        before -= 1
    starts = not before or text[before - 1] in ".!?:,\n"
    return bool(_WORD_AFTER.match(text, match.end())) and (match[0] == "I" or (match[0] == "A" and starts))


def _bold_letter(text: str, choices: str) -> FoundChoice | None:
    """The only letter in bold, unless it begins an item of a list."""
    names = set()
    for bold in BOLD.finditer(text):
        inside = bold[1] or bold[2] or ""
        listed = LIST_MARK.search(text[max(bold.start() - 40, 0) : bold.start()]) and inside.strip().endswith(":")
        letter = re.match(
            rf"[\s(\"]{{0,3}}(?:option |choice )?[(]?([{choices}])(?![^\W_]|['\u2019]| \w)", inside, re.IGNORECASE
        )
        if letter and not listed and not _DENIES_AFTER.match(text, bold.end()):
            names.add(letter[1].upper())
    return FoundChoice((names.pop(),), "the letter in bold") if len(names) == 1 else None


def _affirmed(text: str, found: list[_Letter]) -> FoundChoice | None:
    """The last letter that the text calls correct, or gives as its conclusion."""
    for letter in reversed(found):
        if letter.denied:
            continue
        before, after = text[max(letter.start - 60, 0) : letter.start], text[letter.end : letter.end + 80]
        label = LIST_MARK.search(before) if letter.start <= 60 or "\n" in before else None
        ticked = label and _TICK.search(text[letter.end : letter.end + 200].partition("\n")[0])
        if ticked or _AFFIRMS_BEFORE.search(before) or _AFFIRMS_AFTER.match(after):
            return FoundChoice(letter.letters, "the conclusion")
    return None


def _first_letter(found: list[_Letter]) -> FoundChoice | None:
    first = next((letter for letter in found if not letter.denied), None)
    return None if first is None else FoundChoice(first.letters, FIRST_LETTER)
