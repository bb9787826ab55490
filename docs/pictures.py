"""Makes the pictures of the README from a real run: the report page, and the console.

    mlflow run . --env-manager local 2>&1 | tee run.log
    python -m docs.pictures run.log

Chromium takes the pictures. The log names the run and its tracking server.
"""

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).with_name("pictures")
CONSOLE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #1b1f24; color: #d8dee4; padding: 18px 22px }}
pre {{ font: 14px/1.35 "DejaVu Sans Mono", monospace; margin: 0; white-space: pre-wrap }}
</style><pre>{}</pre>"""


def main() -> None:
    log = Path(sys.argv[1]).read_text(encoding="utf-8")
    run_id, server = re.search(r"run: ([0-9a-f]{32})\s+tracking: (\S+)", log).groups()
    import mlflow

    mlflow.set_tracking_uri(server)
    shown = "\n".join(line for line in log.splitlines() if " INFO mlflow" not in line)
    shown = re.sub(r"tracking: sqlite:\S*", "tracking: sqlite:////home/me/phi3-mlflow/mlflow.db", shown)
    shown = re.sub(r"report: \S*(?=/mlruns/)", "report: /home/me/phi3-mlflow", shown)
    with tempfile.TemporaryDirectory() as scratch:
        report = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/evaluation/report.html", dst_path=scratch)
        photograph(Path(report), FOLDER / "report.png", 1100, 1250)
        console = Path(scratch) / "console.html"
        text = f"$ mlflow run . --env-manager local\n{shown.strip()}"
        console.write_text(CONSOLE.format(html.escape(text)), encoding="utf-8")
        photograph(console, FOLDER / "console.png", 1100, 40 + 19 * (text.count("\n") + 3))


def photograph(page: Path, target: Path, width: int, height: int) -> None:
    """A picture of a page, in a light colour scheme, as a browser shows it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [*command, f"--screenshot={target}", f"--window-size={width},{height}", page.as_uri()],
        check=True,
        capture_output=True,
    )


if __name__ == "__main__":
    main()
