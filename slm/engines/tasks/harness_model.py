"""A model in the form in which lm-evaluation-harness asks models: the library's TemplateLM over a loaded model.

Each request of the library is one question: a text to go on with, a continuation to read, or a text to read. Every
answer is kept on disk as it comes (slm/answers/kept_answers.py), so a stopped run goes on where it stopped.

Not covered: a request that is longer than the model's context. The library cuts its beginning; here its document fails,
and the reason says so.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import lm_eval.models.utils as library
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slm.answers import asking, forms, kept_answers
from slm.answers.asking import Answer, LoadedModel
from slm.base.errors import BadInput
from slm.base.hashing import digest
from slm.models import chat_model
from slm.prompts.prompt_rows import Prompt

MAX_GEN_TOKS = 256  # the library's own, where a task names no number


@dataclass
class Asked:
    """What one document asked and got."""

    answers: list[Answer] = field(default_factory=list)  # of its generated texts
    sent: tuple[str, list[int] | None] = ("", None)  # the text and the token ids of its first request
    generated: tuple[int, ...] = ()  # the tokens of its first greedy answer, or of its likeliest continuation
    likeliest: float = -float("inf")  # the log probability of that continuation
    error: str = ""  # why a request got no answer


class HarnessModel(TemplateLM):
    """Answers the library's requests with a loaded model. `documents` has what each (task, document) asked and got."""

    def __init__(
        self,
        model: LoadedModel,
        kept: kept_answers.Answers,
        advance: Callable[[int], None],
        seed: int = 0,
        batch_size: int = 0,
    ):
        super().__init__()
        self.model, self.kept, self.advance = model.for_texts(), kept, advance
        self.seed, self.rows_at_once = seed, batch_size
        self.documents: dict[tuple[str, int], Asked] = defaultdict(Asked)
        self.keys: list[str] = []  # of all requests, for the kept measurements
        self.reused = 0  # requests
        self.seconds = 0.0  # of answers that were generated now
        self._as_logged = model  # renders chat templates

    # -- what the library asks for ------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        times: Counter[int] = Counter()
        questions = []
        for request in requests:
            questions.append(self._question(request.args[0], request.args[1], times[id(request)]))
            times[id(request)] += 1
        found: list[Answer | None] = []
        for question in questions:
            known = self.kept.kept.get(question.key)
            found.append(known["answer"] if known else None)
        missing = [place for place, answer in enumerate(found) if answer is None]
        for _ in range(len(found) - len(missing)):
            self.advance(0)
        before = time.perf_counter()
        asked = [questions[place] for place in missing]
        places = {id(question): place for question, place in zip(asked, missing, strict=True)}
        for question, given in asking.answers(self.model, asked, self.rows_at_once):
            now = time.perf_counter()
            found[places[id(question)]] = given
            if not given.get("error"):
                self.model.check_unchanged()
                self.kept.add(question.key, given, now - before)
            self.seconds += now - before
            before = now
            self.advance(given["output_tokens"] or 0)
        texts = []
        for request, question, answer in zip(requests, questions, found, strict=True):
            assert answer is not None
            document = self._of(request)
            if not document.answers:
                document.sent = (question.text, question.token_ids)
                if not question.row.get("temperature"):
                    document.generated = tuple(answer.get("token_ids") or ())
            document.answers.append(answer)
            document.error = document.error or answer["error"]
            # a model of others may not take stop strings
            stops = library.normalize_gen_kwargs(request.args[1])["until"]
            texts.append(library.postprocess_generated_text(answer["text"], stops, None))
        self._count((question.key for question in questions), len(found) - len(missing))
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._requests = requests
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """The sum of the log probabilities of each continuation, and whether all its tokens are the likeliest ones."""
        rows = [(context, continuation) for _, context, continuation in requests]
        found = self._read([[row] for row in rows], ["loglikelihood"] * len(rows))
        for request, row, (value, _, error) in zip(self._requests, rows, found, strict=True):
            document = self._of(request)
            document.error = document.error or error
            if not document.sent[1]:
                document.sent = (request.args[0], row[0])
            if row[0] == document.sent[1] and value > document.likeliest and not error:
                document.likeliest, document.generated = value, tuple(row[1])
        return [(value, greedy) for value, greedy, _ in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log probability of each text. A long text is read in windows of the context length, each token once."""
        length, first = self.model.context_length() - 1, self.prefix_token_id
        windows = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, first, length, 1)]
            for (text,) in (request.args for request in requests)
            for tokens in [self.tok_encode(text)]
        ]
        found = self._read(windows, ["loglikelihood_rolling"] * len(windows))
        for request, parts, (_, _, error) in zip(requests, windows, found, strict=True):
            document = self._of(request)
            document.error = document.error or error
            if len(parts) == 1:
                document.sent, document.generated = (request.args[0], parts[0][0]), tuple(parts[0][1])
        return [value for value, _, _ in found]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. A chat model of others gets the conversation itself, as JSON."""
        if not self._as_logged.facts.is_ours:
            return json.dumps(chat_history, ensure_ascii=False)
        if add_generation_prompt:
            return self._rendered(chat_history)
        return self._rendered(chat_history[:-1]) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text. As in the library, a text that begins with the first token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.model.text_of([self.prefix_token_id]))
        return self.model.token_ids(string, special=add_special_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.model.first_token()

    @property
    def prefix_token_id(self) -> int:
        return self.model.first_token()

    @property
    def tokenizer_name(self) -> str:
        return self.model.facts.identity

    # -----------------------------------------------------------------------------------------------------------------

    def _of(self, request: Any) -> Asked:
        return self.documents[request.task_name, request.doc_id]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        facts = self._as_logged.facts
        if not facts.form.template:
            raise BadInput(f"apply_chat_template: {facts.label} has no chat template; leave it false")
        try:
            return forms.text_of(messages, facts.form)
        except chat_model.Refused as refusal:
            told = f"the chat template of {facts.label} refuses a question: {refusal}"
            raise BadInput(f"apply_chat_template: {told}; leave it false") from None

    def _question(self, context: str, given: dict[str, Any], repeat: int) -> asking.Question:
        """One request for a text, as the model gets it."""
        prompt, facts = _prompt(context, self.model.facts.is_chat), self.model.facts
        row = asking.row_of(facts, prompt, repeat, _generation(given, self.seed))
        if "refused" in row:
            return asking.Question(prompt, repeat, row, digest([row, repeat]), "", None)
        text, ids = self.model.sent(row)
        if text.startswith("refused: ") and ids is None and facts.is_ours:
            row = {"refused": text.removeprefix("refused: ")}
        return asking.Question(prompt, repeat, row, digest([row, repeat]), text, ids)

    def _read(
        self, requests: list[list[tuple[list[int], list[int]]]], kinds: list[str]
    ) -> list[tuple[float, bool, str]]:
        """For each request of one or more rows (context, continuation): the log probability of all its tokens, whether
        each of them is the likeliest one, and why it could not be read ("": it could)."""
        length = self.model.context_length()
        keys = [digest([kind, rows]) for kind, rows in zip(kinds, requests, strict=True)]
        found: dict[str, tuple[float, bool, str]] = {}
        for key, rows in zip(keys, requests, strict=True):
            longest = max((len(context) + len(continuation) for context, continuation in rows), default=0)
            if key in self.kept.kept:
                value, greedy = self.kept.kept[key]["answer"]["log_probability"]
                found[key] = (value, greedy, "")
            elif longest > length:
                found[key] = (0.0, False, f"a request has {longest} tokens; the context length is {length}")
        known = sum(key in self.kept.kept for key in keys)
        left = {key: rows for key, rows in zip(keys, requests, strict=True) if key not in found}
        flat = [(key, row) for key, rows in left.items() for row in rows]
        waiting = Counter(key for key, _ in flat)
        sums: dict[str, tuple[float, bool]] = dict.fromkeys(left, (0.0, True))
        before = time.perf_counter()
        for place, scores in self.model.token_scores([row for _, row in flat], None):
            key = flat[place][0]
            value, greedy = sums[key]
            sums[key] = (
                value + float(scores.log_probabilities.sum(dtype="float64")),
                greedy and bool(scores.likeliest.all()),
            )
            waiting[key] -= 1
            if not waiting[key]:
                now = time.perf_counter()
                self.model.check_unchanged()
                self.kept.add(key, {"text": "", "log_probability": sums[key]}, now - before)
                found[key] = (*sums[key], "")
                before = now
                self.advance(0)
        for key in left:
            found.setdefault(key, (*sums[key], ""))  # of an empty text
        for _ in range(len(keys) - len(left)):
            self.advance(0)
        self._count(keys, known)
        return [found[key] for key in keys]

    def _count(self, keys: Iterable[str], reused: int) -> None:
        self.keys += keys
        self.reused += reused


def _prompt(context: str, is_chat: bool) -> Prompt:
    messages = None
    if is_chat and context.startswith('[{"role": '):  # as apply_chat_template writes it
        messages = tuple(json.loads(context))
    return Prompt("", messages, None if messages else context, (), (), None, ())


def _generation(given: dict[str, Any], seed: int) -> dict[str, Any]:
    """A task's generation parameters under our names."""
    options = library.normalize_gen_kwargs(given, MAX_GEN_TOKS)
    return {
        "max_tokens": options["max_gen_toks"],
        "temperature": float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
        "top_p": float(options.get("top_p", 1.0)),
        "seed": seed,
        "stop": [text for text in options["until"] if text],
    }
