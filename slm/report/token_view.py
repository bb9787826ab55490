"""The report page's section on fidelity: how far each model is from the baseline, and the answers that differ the most.

The rows are plain data for html_page.html. The tokens are the baseline's answers. A colour says how far the two
distributions are apart at a token, and a table has what each model finds likeliest at the farthest tokens.
"""

from dataclasses import dataclass

import numpy as np

from slm.base.wording import counted
from slm.report.summary import Report, nats, percent
from slm.verdict import statistics
from slm.verdict.fidelity import LikelyTokens, TokenFidelity
from slm.verdict.statistics import Estimate

LEVELS = (0.01, 0.1, 0.5, 2.0)  # nats: a token's colour is that of the number of these that its divergence reaches
FARTHEST = 5  # tokens of an answer for which the likeliest tokens are shown


@dataclass(frozen=True)
class TokenRow:
    """One token of an answer as the page shows it."""

    text: str
    level: int  # 0 to len(LEVELS)
    told: str


@dataclass(frozen=True)
class AnswerRow:
    """One of the answers that differ the most."""

    id: str
    kl: str
    kept: str
    tokens: tuple[TokenRow, ...]
    left_out: int  # tokens at the end that are not shown
    # token, divergence, the baseline's likeliest tokens, the model's
    farthest: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class ModelRow:
    """One model beside the baseline."""

    place: int
    figures: tuple[tuple[str, str], ...]
    answers: tuple[AnswerRow, ...]  # those without any divergence are left out
    reason: str  # why nothing was compared; "" otherwise


def token_rows(report: Report) -> list[ModelRow]:
    """One row for each model that was to be compared token by token."""
    rows = []
    for place in report.candidates:
        compared = report.models[place].fidelity
        if report.baseline is None or compared is None:
            continue
        found = report.changes[place] if report.changes else {}
        if compared.reason or "fidelity/kl" not in found:
            rows.append(ModelRow(place, (), (), compared.reason or "no answer has a token"))
            continue
        by_id = {prompt.id: prompt for prompt in compared.prompts}
        answers = tuple(
            _answer(by_id[id], tokens) for id, tokens in (compared.worst or {}).items() if by_id[id].kl.any()
        )
        rows.append(ModelRow(place, _figures(found, compared.tokens), answers, ""))
    return rows


def _figures(found: dict[str, Estimate], tokens: int) -> tuple[tuple[str, str], ...]:
    nll = found["fidelity/nll_difference"]
    told = [
        ("divergence (KL)", f"{nats(found['fidelity/kl'])} nats"),
        ("likeliest token kept", percent(found["fidelity/top1"])),
        ("-log p minus the baseline's", f"{nll.mean:+.3f} [{nll.ci95_low:+.3f}, {nll.ci95_high:+.3f}] nats"),
    ]
    words = {"answers_changed": "other text", "flips/worse": "score fell", "flips/better": "score rose"}
    told += [(word, f"{percent(found[name])} of the prompts") for name, word in words.items() if name in found]
    return (*told, ("compared", f"{tokens:,} tokens of {counted(found['fidelity/kl'].n, 'answer')}"))


def _answer(prompt: TokenFidelity, tokens: tuple[LikelyTokens, ...]) -> AnswerRow:
    own = statistics.ratio_estimate(prompt.kl.tolist(), [1] * prompt.kl.size, kind="positive")
    shown = tuple(
        TokenRow(token.text, sum(token.kl >= level for level in LEVELS), f"{_nats(token.kl)} nats") for token in tokens
    )
    order = sorted(range(len(tokens)), key=lambda place: -tokens[place].kl)[:FARTHEST]
    farthest = tuple(
        (tokens[place].text, _nats(tokens[place].kl), _likely(tokens[place].baseline), _likely(tokens[place].model))
        for place in sorted(order)
    )
    kept = f"{int(np.sum(prompt.top1))} of {prompt.top1.size} kept"
    return AnswerRow(prompt.id, nats(own), kept, shown, prompt.kl.size - len(tokens), farthest)


def _nats(kl: float) -> str:
    return f"{kl:.2f}" if kl >= 0.01 else f"{kl:.1g}"


def _likely(tokens: tuple[tuple[str, float], ...]) -> tuple[str, ...]:
    return tuple(f"{text!r} {probability:.0%}" for text, probability in tokens)
