"""Says what two runs differ in, causes before effects, and which came first.

    python -m entrypoints.compare RUN_ID RUN_ID

Takes two evaluations (the runs that `mlflow run` made), whose models are compared in their order, or two scored models
(child runs). Code, packages, machine, model, template, prompts, parameters and scorers come first, then prompts as
rendered, token ids, answers and scores. Exits with 0 where every answer and score is the same, 3 where one differs, 2
where there is no such run, and 4 where the tracking server fails. It makes no run, so `mlflow run` doesn't know it.
"""

import argparse
import json
import sys

from slm.base.errors import BadInput
from slm.tracking import lifecycle, mlflow_client


def parse_args(argv: list[str] | None) -> list[str]:
    """The two run ids.

    Raises:
        BadInput: there are not two.
    """
    parser = argparse.ArgumentParser(
        prog="python -m entrypoints.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_ids", nargs="*", metavar="RUN_ID")
    args, unknown = parser.parse_known_args(argv)
    if unknown or len(args.run_ids) != 2:
        raise BadInput(f"compare: takes two run ids, got {' '.join([*args.run_ids, *unknown]) or 'none'}")
    return args.run_ids


def main(argv: list[str] | None = None) -> int:
    return lifecycle.exit_code(lambda: compare(*parse_args(argv)))


def compare(first_id: str, second_id: str) -> str:
    """The story: both runs read, compared model by model, shown; "pass" where they ended alike, else "regress"."""
    from slm.verdict import reproduction

    # Both runs, as they left themselves
    first, second = read(first_id, "environment.json"), read(second_id, "environment.json")
    models = [scored_models(run_id, whole) for run_id, whole in ((first_id, first), (second_id, second))]
    if len(models[0]) != len(models[1]):
        counts = f"{first_id} scored {len(models[0])} and {second_id} {len(models[1])}"
        raise BadInput(f"compare: takes runs of as many models, but {counts}; name their child runs instead")

    # Model by model, then the gate
    compared = [reproduction.compare(ours, theirs) for ours, theirs in zip(*models, strict=True)]
    show([model.label for model in models[0]], compared, reproduction.gate_changes(first, second))
    return "pass" if all(one.same for one in compared) else "regress"


def read(run_id: str, name: str):
    """A run's evaluation/environment.json, or its samples.jsonl as a list.

    Raises:
        BadInput: there is no such run or file, or it was written before runs left a record.
    """
    try:
        path = mlflow_client.download(f"runs:/{run_id}/evaluation/{name}")
    except BadInput as error:
        raise BadInput(f"compare: {error}") from None
    text = path.read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line]
    content = json.loads(text)
    if "fingerprint" not in content:
        raise BadInput(f"compare: run {run_id} was made before runs left a record; do it again first")
    return content


def scored_models(run_id: str, record: dict) -> list:
    """What a run scored: its child runs, or the run itself where it is one."""
    from slm.verdict.reproduction import Scored

    if "models" not in record:
        return [Scored(record, read(run_id, "samples.jsonl"))]
    ids = [model["run_id"] for model in record["models"]]
    return [Scored(read(child, "environment.json"), read(child, "samples.jsonl")) for child in ids]


def show(labels: list[str], compared: list, gate: list) -> None:
    """One table of what differs, what all models share once and first; then a line per model."""
    from rich.table import Table
    from rich.text import Text

    from slm.base import console

    table = Table("differs", "first run", "second run", header_style="bold")
    shared = [one for one in compared[0].changes if all(one in other.changes for other in compared)]
    shared = [one for one in shared if len(compared) > 1] + gate
    for one in shared:
        table.add_row(*map(Text, (one.what, one.first, one.second)))
    for label, comparison in zip(labels, compared, strict=True):
        table.add_section()
        for one in comparison.changes:
            if one not in shared:
                what = one.what if len(compared) == 1 or one.what.startswith(" ") else f"{label}: {one.what}"
                table.add_row(*map(Text, (what, one.first, one.second)))
    if table.row_count:
        console.out.print(table)
    for label, comparison in zip(labels, compared, strict=True):
        console.out.print(f"{label}, {comparison.answers} answers: {comparison.conclusion}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
