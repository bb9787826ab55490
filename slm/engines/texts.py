"""Reads whole texts with a loaded model: the log probability of each token, and the comparison with the baseline.

A text is read in windows of at most WINDOW tokens, so the memory does not depend on its length. The windows are those
of lm-evaluation-harness's loglikelihood_rolling (lm_eval.utils.get_rolling_token_windows with context_len=1): each
token is read once. The first window begins with the model's first token. Every further window begins with the last
token of the window before. The last window takes so many tokens of the windows before that it is full.

Not covered: endpoints and models of others.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from slm.answers import kept_answers
from slm.answers.asking import LoadedModel, NoTokenScores
from slm.base.hashing import digest
from slm.base.parameters import HARDWARE
from slm.engines import answering
from slm.engines.distributions import ENDLESS, Reference, Text
from slm.prompts.texts import Document, TextSet, read_texts
from slm.tracking import downloads
from slm.verdict import fidelity, perplexity
from slm.verdict.perplexity import TextScores
from slm.verdict.scored_model import FIGURES, ScoredModel

Scored = TypeVar("Scored", bound=ScoredModel)

WINDOW = 2048  # tokens, with those that only give context
TOGETHER = 16  # windows that are in memory at once


def read(given: str) -> TextSet:
    """The texts that `texts` names: a path in the repository, any path, or an address.

    Raises:
        BadInput: there is no such file, or it holds no texts.
        Unavailable: the server that has the file fails.
    """
    with downloads.named_file("texts", given) as path:
        return read_texts(path)


def windows(first: int, ids: Sequence[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (context, continuation) of at most `length` tokens together; all continuations are `ids`, in order."""
    size = length - 1
    whole = [first, *ids]
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        # whole[place + 1] is ids[place]; a context ends just before ids[begin]
        yield whole[max(0, end - size) : begin + 1], list(ids[begin:end])


def measured(
    model: LoadedModel,
    texts: TextSet,
    generation: dict,
    reuse: kept_answers.Reuse,
    reference: Reference | None,
    is_baseline: bool,
) -> TextScores:
    """Reads the texts. With `reference`, also holds the baseline's distributions, or compares the model with them.

    Texts that were read before are not read again (slm/answers/kept_answers.py). Distributions are not kept. If a token
    has no finite -log p, nothing is measured, and the result has the reason.
    """
    try:
        model.vocabulary()
    except NoTokenScores as missing:
        reason = f"it {missing}"
        if reference and is_baseline:
            reference.reason = f"the baseline, {model.facts.label}, {missing}"
        return TextScores(texts.name, reason=reason)
    hardware = {name: generation.get(name) for name in HARDWARE}
    with kept_answers.opened(["texts", answering.identity(model.facts, hardware)], reuse) as kept:
        sums = _sums(model, texts.documents, kept)
    endless = [document.id for document, (nll, _) in zip(texts.documents, sums, strict=True) if not math.isfinite(nll)]
    if endless:
        told = f"{ENDLESS} a token of {endless[0]}"
        if reference and is_baseline:
            reference.reason = f"the baseline, {model.facts.label}, {told}"
        return TextScores(texts.name, reason=f"it {told}")
    clusters = tuple(document.cluster for document in texts.documents)
    found = TextScores(texts.name, tuple(nll for nll, _ in sums), tuple(count for _, count in sums), clusters)
    if reference is None:
        return found
    if is_baseline:
        held = [
            Text(f"{document.id} window {number}", *window)
            for document in texts.documents
            for number, window in enumerate(_windows(model, document), 1)
        ]
        reference.hold(model, held)
        return found
    compared = reference.compared(model)
    by_id = {document.id: document.cluster or f"text {document.id}" for document in texts.documents}
    of_window = {window.id: by_id[window.id.rpartition(" window ")[0]] for window in compared.prompts}
    return replace(found, compared=compared, windows=of_window)


def added(scored: Scored, found: TextScores) -> Scored:
    """The scored model with what it thinks of the texts, and with the metrics of that."""
    metrics = fidelity.as_metrics(perplexity.estimates(found), FIGURES) | perplexity.plain_figures(found)
    return replace(scored, texts=found, metrics=scored.metrics | metrics)


def _windows(model: LoadedModel, document: Document) -> Iterator[tuple[list[int], list[int]]]:
    ids = model.token_ids(document.text, special=False)
    return windows(model.first_token(), ids, min(model.context_length(), WINDOW))


def _sums(model: LoadedModel, documents: Sequence[Document], kept: kept_answers.Answers) -> list[tuple[float, int]]:
    """For each text, the sum of -log p over its tokens, and their number."""
    keys = [digest([document.text, WINDOW]) for document in documents]
    missing = [place for place, key in enumerate(keys) if key not in kept.kept]
    sums = {place: [0.0, 0] for place in missing}
    waiting = ((place, window) for place in missing for window in _windows(model, documents[place]))
    last = -1  # the text whose windows are being read
    while some := list(islice(waiting, TOGETHER)):
        for number, scores in model.token_scores([window for _, window in some], None):
            entry = sums[some[number][0]]
            entry[0] -= float(scores.log_probabilities.sum(dtype="float64"))
            entry[1] += len(scores.log_probabilities)
        model.check_unchanged()
        newest = some[-1][0]
        for place in missing:  # all windows of the texts before the newest one have been read
            if last <= place < newest:
                kept.add(keys[place], {"text": "", "nll": sums[place]}, 0.0)
        last = newest
    if last >= 0:
        kept.add(keys[last], {"text": "", "nll": sums[last]}, 0.0)
    known = {place: kept.kept[key]["answer"]["nll"] for place, key in enumerate(keys) if place not in sums}
    return [(float(nll), int(count)) for nll, count in (known.get(place) or sums[place] for place in range(len(keys)))]
