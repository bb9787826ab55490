"""What the benchmarks share: two sides measured in turn, and the table of their ratios.

Machines are shared and noisy, so no absolute figure is kept: a row is the median, over rounds, of the ratio of two
sides that ran one after the other.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One line of the table: a ratio (or a figure, where nothing stands against it) per round, and its goal."""

    name: str
    against: str
    goal: float | None  # None: shown for what it is
    rounds: tuple[float, ...]
    at_most: bool = False  # else at least
    unit: str = ""
    note: str = ""  # what was chosen for the other side, or found beside the ratio
    why: str = ""  # it falls short, where it does

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def in_turn(sides: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Each side's figure, round by round; the order is turned around from round to round."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            figures[name].append(sides[name]())
    return figures


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, ...]:
    return tuple(one / other for one, other in zip(ours, theirs, strict=True))


def best(candidates: dict[str, Callable[[], float]]) -> str:
    """The candidate with the highest figure, each asked once."""
    return max(candidates, key=lambda name: candidates[name]())


def show(rows: list[Row]) -> None:
    table = Table(title=f"{os.cpu_count()} cores; medians of rounds measured in turn")
    for column in ("row", "against", "goal", "found", "rounds", ""):
        table.add_column(column, justify="right" if column in ("goal", "found", "rounds") else "left")
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        table.add_row(
            row.name,
            row.against,
            "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}{unit}",
            f"{row.value:.2f}{unit}",
            f"{min(row.rounds):.2f} to {max(row.rounds):.2f}",
            "met" if row.met else "falls short",
        )
    console = Console(width=150)
    console.print(table)
    for row in rows:
        told = "; ".join(filter(None, (row.note, "" if row.met else row.why)))
        if told:
            console.print(f"{row.name}, against {row.against}: {told}", style=None if row.met else "yellow")
