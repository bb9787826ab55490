"""Compares models token by token: holds the baseline's next-token distributions, and reads another model's beside them.

A sample of the answers tells how far two models are apart, and reading all of a large set would take as long as
generating it. So whole answers are compared until they have SAMPLE_TOKENS tokens and are SAMPLE_ANSWERS, unless all are
asked for.

The baseline's distributions are in a file without a name, in float32. So the space is free again when this process
ends, however it ends. The file has at most SCRATCH_BYTES, and at most half of the free space: if the answers have more
tokens, fewer are compared. Every model of this project can be read that has `token_scores`. A model whose
probabilities are no finite numbers, such as one whose fp16 overflows, is not compared.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm.answers import asking
from slm.answers.asking import LoadedModel, NoTokenScores
from slm.base import cache
from slm.base.wording import counted
from slm.prompts.prompt_rows import Prompt
from slm.verdict import fidelity
from slm.verdict.fidelity import Fidelity, LikelyTokens, TokenFidelity

SCRATCH_BYTES = 4 * 2**30
SAMPLE_TOKENS = 2000
SAMPLE_ANSWERS = 50
WORST = 8  # prompts whose tokens are shown
SHOWN_TOKENS = 256  # of one prompt
LIKELY = 3  # tokens that are shown at one place
ENDLESS = "gives no probability (NaN), or the probability 0, for"  # the words before what has no finite -log p


@dataclass(frozen=True)
class Text:
    """One prompt as the baseline gets it, and the tokens of its greedy answer."""

    id: str
    context: list[int]
    continuation: list[int]


class Reference:
    """The baseline's distributions over its own answers, for the models that are compared with it."""

    def __init__(self, is_sample: bool = False, on_texts: "Reference | None" = None) -> None:
        self.is_sample = is_sample  # whether a sample of the answers is enough
        self.on_texts = on_texts  # the same over the windows of `texts`
        self.elsewhere: Any = None  # what an engine keeps of the baseline that reads in another process
        self.reason = "the baseline has not been read"
        self._texts: tuple[Text, ...] = ()
        self._vocabulary = ""
        self._left_out, self._why_left_out = 0, ""
        self._held: np.ndarray | None = None
        self._first: dict[str, int] = {}  # prompt id -> the place of its first token in `_held`

    def hold(self, model: LoadedModel, texts: list[Text]) -> None:
        """Reads the baseline. If that is not possible, `reason` says why, and every comparison has that reason."""
        label = model.facts.label
        try:
            self._vocabulary = model.vocabulary()
        except NoTokenScores as missing:
            self.reason = f"the baseline, {label}, {missing}"
            return
        texts = [text for text in texts if text.continuation]
        if not texts:
            self.reason = f"the baseline, {label}, gave no answer"
            return
        folder = cache.private("distributions")
        width = model.vocabulary_size()
        room = min(SCRATCH_BYTES, shutil.disk_usage(folder).free // 2) // (4 * width)
        sample = _sample(texts) if self.is_sample else texts
        self._texts = _fitting(sample, room)
        self._left_out = len(texts) - len(self._texts)
        bounded = len(self._texts) < len(sample)
        self._why_left_out = "the scratch space is bounded" if bounded else "fidelity=all compares all"
        if not self._texts:
            self.reason = f"there is no room for the distributions of one answer in {folder}"
            return
        places = 0
        for text in self._texts:
            self._first[text.id] = places
            places += len(text.continuation)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(4 * width * places)
            held = np.memmap(file, dtype=np.float32, mode="r+", shape=(places, width))

        def see(row: int, first: int, log_probabilities: np.ndarray) -> None:
            begin = self._first[self._texts[row].id] + first
            held[begin : begin + len(log_probabilities)] = log_probabilities

        for _ in model.token_scores([(text.context, text.continuation) for text in self._texts], see):
            pass
        if lacking := int(np.isnan(held[:, 0]).sum()):  # a logit that is no number leaves none at its place
            self.reason = f"the baseline, {label}, {ENDLESS} {lacking:,} of {counted(places, 'token')}"
            return
        self._held, self.reason = held, ""

    def compared(self, model: LoadedModel) -> Fidelity:
        """The model beside the baseline, at every token of the baseline's answers."""
        if self._held is None:
            return Fidelity(reason=self.reason)
        try:
            if model.vocabulary() != self._vocabulary:
                return Fidelity(reason="it has another vocabulary than the baseline")
        except NoTokenScores as missing:
            return Fidelity(reason=f"it {missing}")
        longest = max(len(text.context) + len(text.continuation) for text in self._texts)
        if model.context_length() < longest:
            return Fidelity(reason=f"its context has {model.context_length():,} tokens, and a text has {longest:,}")
        found = {
            text.id: TokenFidelity(
                text.id, *(np.zeros(len(text.continuation), dtype=kind) for kind in (float, bool, float))
            )
            for text in self._texts
        }

        def see(row: int, first: int, log_q: np.ndarray) -> None:
            text = self._texts[row]
            places = slice(first, first + len(log_q))
            kl, top1, nll = fidelity.compare(self._of(text, places), log_q, text.continuation[places])
            entry = found[text.id]
            entry.kl[places], entry.top1[places], entry.nll_difference[places] = kl, top1, nll

        for _ in model.token_scores([(text.context, text.continuation) for text in self._texts], see):
            pass
        prompts = tuple(found.values())
        endless = sum(int(np.sum(~np.isfinite(prompt.kl + prompt.nll_difference))) for prompt in prompts)
        if endless:
            tokens = sum(prompt.kl.size for prompt in prompts)
            return Fidelity(reason=f"it {ENDLESS} {endless:,} of {counted(tokens, 'token')}")
        worst = list(fidelity.prompt_means(prompts))[:WORST]
        return Fidelity(prompts, self._left_out, self._why_left_out, self._likely(model, worst, found))

    def close(self) -> None:
        """Frees the space."""
        self._held = None
        if self.on_texts:
            self.on_texts.close()

    def _of(self, text: Text, places: slice) -> np.ndarray:
        assert self._held is not None
        begin = self._first[text.id]
        return np.asarray(self._held[begin + places.start : begin + places.stop])

    def _likely(
        self, model: LoadedModel, worst: list[str], found: Mapping[str, TokenFidelity]
    ) -> dict[str, tuple[LikelyTokens, ...]]:
        """Reads the prompts with the largest divergence once more, for the likeliest tokens of both models."""
        by_id = {text.id: text for text in self._texts}
        texts = [by_id[id] for id in worst]
        shown: dict[str, dict[int, LikelyTokens]] = {id: {} for id in worst}

        def see(row: int, first: int, log_q: np.ndarray) -> None:
            text = texts[row]
            log_p = self._of(text, slice(first, first + len(log_q)))
            for place, (p, q) in enumerate(zip(log_p, log_q, strict=True), first):
                if place < SHOWN_TOKENS:
                    kl = float(found[text.id].kl[place])
                    likely = (_likeliest(model, p), _likeliest(model, q))
                    shown[text.id][place] = LikelyTokens(model.text_of([text.continuation[place]]), kl, *likely)

        for _ in model.token_scores([(text.context, text.continuation[:SHOWN_TOKENS]) for text in texts], see):
            pass
        return {id: tuple(tokens[place] for place in sorted(tokens)) for id, tokens in shown.items()}


def greedy(model: LoadedModel, prompts: Sequence[Prompt], generation: dict) -> dict[str, tuple[int, ...]]:
    """The tokens of the model's greedy answers, by prompt id."""
    asked = asking.questions(model, prompts, generation | {"temperature": 0.0}, 1)
    answered = asking.answers(model, asked, generation.get("batch_size") or 0)
    return {question.prompt.id: tuple(answer.get("token_ids") or ()) for question, answer in answered}


def _likeliest(model: LoadedModel, log_probabilities: np.ndarray) -> tuple[tuple[str, float], ...]:
    some = np.argpartition(-log_probabilities, LIKELY)[:LIKELY]
    ordered = some[np.argsort(-log_probabilities[some], kind="stable")]
    return tuple((model.text_of([int(token)]), float(np.exp(log_probabilities[token]))) for token in ordered)


def _drawn(texts: list[Text]) -> list[Text]:
    """The texts in the order of a draw. A hash of the prompt's id draws, so the order never changes."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.id.encode()).digest())


def _sample(texts: list[Text]) -> list[Text]:
    """The first texts of the draw, until they have SAMPLE_TOKENS tokens and are SAMPLE_ANSWERS, in their own order."""
    kept: set[str] = set()
    tokens = 0
    for text in _drawn(texts):
        if tokens >= SAMPLE_TOKENS and len(kept) >= SAMPLE_ANSWERS:
            break
        kept.add(text.id)
        tokens += len(text.continuation)
    return [text for text in texts if text.id in kept]


def _fitting(texts: list[Text], places: int) -> tuple[Text, ...]:
    """The texts that fit into so many places, in their own order. The first ones of the draw come first."""
    kept = set()
    for text in _drawn(texts):
        if len(text.continuation) <= places:
            kept.add(text.id)
            places -= len(text.continuation)
    return tuple(text for text in texts if text.id in kept)
