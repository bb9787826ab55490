"""Writes the table of rooms and their sizes into docs/architecture.md, from the files of slm/.

python -m docs.sizes
"""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
PACKAGE = Path(__file__).resolve().parents[1] / "slm"
TABLE = re.compile(r"\| room \| files \| lines \| longest file \|\n(?:\|.*\n)+")


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def table() -> str:
    """The rooms in the order of their names. Lines are rounded, so that a small change is no change here."""
    rows = ["| room | files | lines | longest file |", "|---|---:|---:|---|"]
    for room in sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()):
        sizes = {path.relative_to(room).as_posix(): lines_of(path) for path in room.rglob("*.py")}
        longest = max(sizes, key=lambda name: sizes[name])
        lines = round(sum(sizes.values()), -2)
        rows.append(f"| `{room.name}` | {len(sizes)} | {lines:,} | `{longest}`, {round(sizes[longest], -1):,} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
