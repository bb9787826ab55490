"""How often number and choice give the right verdict, beside the regular expressions of lm-eval, on the same answers.

    python -m benchmarks.scorer_reading

The answers are those of tests/scorers/adversarial. lm-eval's GSM8K task has two filters: strict-match and
flexible-extract. Its exact_match then ignores commas, dollars, and a dot at the end. For choices, its filter
multi_choice_regex falls back to the first letter after a colon. With lm-eval installed, its own filters run. Without
it, the same expressions run here, and the table says so.
"""

import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from rich.console import Console
from rich.table import Table

from slm.scorers.built_in import BUILT_IN

SETS = Path(__file__).resolve().parents[1] / "tests" / "scorers" / "adversarial"
STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
LETTER = r"\(([A-Z])\)"


def found(pattern: str, which: int, output: str) -> str:
    """What lm-eval's filter `regex` takes from an answer."""
    try:
        from lm_eval.filters.extraction import RegexFilter
    except ImportError:
        matches = re.findall(pattern, output)
        match = matches[which] if matches else "[invalid]"
        return (next(filter(None, match), "") if isinstance(match, tuple) else match).strip()
    return RegexFilter(pattern, which).apply([[output]], [{}])[0][0]


def equal(text: str, expected: list[str]) -> bool:
    """lm-eval's exact_match of GSM8K, and equal decimals as well: 18.00 is 18."""
    text = re.sub(r"[,$]|\.$", "", text)
    try:
        return text in expected or Decimal(text) in [Decimal(item.replace(",", "")) for item in expected]
    except InvalidOperation:
        return False


def letter(output: str) -> str:
    first = found(LETTER, 0, output)
    return first if len(first) == 1 else found(r":[\s]*([A-D])", 0, output)


def ours(name: str):
    def right(row: dict) -> bool:
        return BUILT_IN[name](row["output"], tuple(row["expected"]), **row["options"]).value == 1

    return right


def main() -> None:
    sides = {
        "number": {
            "number of this project": ours("number"),
            "lm-eval strict-match": lambda row: equal(found(STRICT, 0, row["output"]), row["expected"]),
            "lm-eval flexible-extract": lambda row: equal(found(FLEXIBLE, -1, row["output"]), row["expected"]),
        },
        "choice": {
            "choice of this project": ours("choice"),
            "lm-eval multi_choice_regex, without choice texts": lambda row: letter(row["output"]) in row["expected"],
        },
    }
    try:
        import lm_eval  # noqa: F401

        source = "lm-eval's own filters"
    except ImportError:
        source = "lm-eval's expressions, lm-eval is not installed"
    table = Table("set", "reader", "right verdicts", title=source)
    for name, readers in sides.items():
        rows = [json.loads(line) for line in (SETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for reader, right in readers.items():
            count = sum(right(row) == row["right"] for row in rows)
            table.add_row(name, reader, f"{count} of {len(rows)}, {count / len(rows):.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
