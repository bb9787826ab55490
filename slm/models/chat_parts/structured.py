"""Structured output: a grammar says which token may follow, by llguidance (arXiv:2403.06988 tells of the method).

A request's `response_format` becomes a grammar in llguidance's own form. A stranger may have written the schema. So a
child process with bounds checks the grammar before this process reads it. Each row has a matcher of its own, and so the
rows of a batch may have different grammars.

Not covered: keywords of JSON Schema that llguidance lacks, such as `not`, `if` and `uniqueItems`. A schema that has one
is refused by the keyword's name. Between the parts of an answer stand at most WHITESPACE characters of white space.
Otherwise, a weak model can go on with line ends until its tokens are used up.
"""

import functools
import inspect
import json
import threading
from typing import Any

from .confined import CallFailed, Confined
from .fields import did_you_mean
from .rows import Refused, Row

WHITESPACE = 20
GUIDANCE: Any = {  # llguidance's options for a schema
    "whitespace_pattern": rf"[ \n\t]{{0,{WHITESPACE}}}",
    "coerce_one_of": False,
    "lenient": False,
}
GRAMMAR_SECONDS = 5  # of processor time for the check of one grammar
GRAMMAR_BYTES = 2**30  # of memory for it
KEPT = 64  # grammars
KINDS = ("text", "json_object", "json_schema")
SCHEMA_KEYS = ("name", "description", "schema", "strict")
FORM = "response_format"


def schema_of(response_format: Any) -> dict | None:
    """The JSON schema that an answer must satisfy. None: the answer is free text.

    Raises:
        Refused: response_format has a wrong form.
    """
    if not response_format:
        return None
    kind = response_format.get("type")
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise Refused(f"{FORM}.type: {kind!r:.40} is none of {', '.join(KINDS)}{hint}", FORM)
    _only(response_format, ("type", "json_schema") if kind == "json_schema" else ("type",), FORM)
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    told = response_format.get("json_schema")
    if not isinstance(told, dict) or not isinstance(told.get("schema"), dict):
        raise Refused(f"{FORM}.json_schema.schema must be a JSON schema, which is an object", FORM)
    _only(told, SCHEMA_KEYS, f"{FORM}.json_schema")
    return told["schema"]


def _only(entries: dict, known: tuple[str, ...], where: str) -> None:
    for name in entries:
        if name not in known:
            raise Refused(f"{where}.{name!s:.40}: there is no such field{did_you_mean(name, known)}", FORM)


@functools.lru_cache(maxsize=KEPT)
def _schema_grammar(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=GUIDANCE)


def schema_grammar(schema: dict) -> str:
    """A JSON schema as a grammar of llguidance. `checked_grammar` says whether it can be used.

    Raises:
        Refused: the schema is nested too deeply.
    """
    try:
        return _schema_grammar(json.dumps(schema))
    except (RecursionError, ValueError) as error:
        raise Refused(f"{FORM}: the schema can't be read ({' '.join(str(error).split()):.200})", FORM) from None


def _grammar_error(grammar: str) -> str:
    """Runs in the confined process. Gives what is wrong with a grammar in one line, or nothing."""
    from llguidance import LLMatcher

    _, messages = LLMatcher.validate_grammar_with_warnings(grammar)  # a warning is a keyword that has no effect
    return " ".join("; ".join(messages).split())[:300]


_checks = Confined(
    "\n".join(
        [
            inspect.getsource(_grammar_error),  # read at import: this file may be gone later
            'FUNCTIONS = {\'check\': (_grammar_error, [\'{"grammars": [{"json_schema": {"type": "object"}}]}\'])}',
        ]
    ),
    GRAMMAR_SECONDS,
    GRAMMAR_BYTES,
)


@functools.lru_cache(maxsize=KEPT)
def checked_grammar(grammar: str, what: str = FORM) -> str:
    """A grammar in llguidance's form that a matcher can follow. `what` names the request's field in the error.

    Raises:
        Refused: the grammar has something that llguidance lacks, or its check exceeds a bound.
    """
    try:
        error = _checks.call("check", grammar)
    except CallFailed as reason:
        raise Refused(f"{what}: the check of the schema {reason}; write a simpler schema", what) from None
    if error:
        raise Refused(f"{what}: the schema can't be used: {error}", what)
    return grammar


class Constraints:
    """Gives rows their matchers. The tokenizer's tokens are read at the first use, which takes about a second."""

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: frozenset[int]):
        self._tokenizer, self._vocabulary_size, self._end_tokens = tokenizer, vocabulary_size, end_tokens
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._matchers: dict[str, Any] = {}  # by grammar; each row gets a copy

    @property
    def tokens(self) -> Any:
        """llguidance's LLTokenizer."""
        with self._lock:
            if self._tokens is None:
                from llguidance import LLTokenizer

                size = max(self._vocabulary_size, self._tokenizer.get_vocab_size(with_added_tokens=True))
                self._tokens = LLTokenizer(self._tokenizer.to_str(), n_vocab=size, eos_token=sorted(self._end_tokens))
            return self._tokens

    def constrain(self, row: Row, grammar: str, what: str = FORM) -> None:
        """Lets a row have only tokens that the grammar allows. `checked_grammar` has checked its schemas.

        Raises:
            Refused: the grammar does not fit this tokenizer.
        """
        from llguidance import LLMatcher

        tokens = self.tokens
        with self._lock:
            matcher = self._matchers.get(grammar)
            if matcher is None:
                matcher = LLMatcher(tokens, grammar, log_level=0)
                if matcher.is_error():
                    reason = " ".join(matcher.get_error().split())
                    raise Refused(f"{what}: the schema can't be used: {reason:.300}", what)
                while len(self._matchers) >= KEPT:
                    del self._matchers[next(iter(self._matchers))]
                self._matchers[grammar] = matcher
            row.matcher = matcher.deep_copy()
