"""Scores that a tracking server which had gone didn't get: kept in the cache, and uploaded later.

    python -m slm.tracking.unsent ~/.cache/phi3-mlflow/unsent/RUN_ID

This command uploads metrics, tags and answers into their child run. MLFLOW_TRACKING_URI names the server. The command
then ends the child run and removes the folder. The comparison and the reports of the parent run are not kept. To make
them again, repeat the evaluation's command. The answers are kept, so the evaluation generates nothing.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm.base import cache
from slm.base.errors import BadInput, Unavailable
from slm.tracking import lifecycle, mlflow_client
from slm.tracking.tags import UPLOADED


@contextmanager
def kept(run_id: str, scored, tags: dict[str, str]) -> Iterator[None]:
    """The block sends a scored model's results. If the server or the network fails, they are written into the cache.

    Raises:
        Unavailable: the block failed. The message has the command that uploads the results.
    """
    try:
        yield
    except Exception as error:
        if not mlflow_client.is_infrastructure(error):
            raise
        folder = cache.private("unsent", run_id)
        content = {"run_id": run_id, "model_id": scored.model.model_id, "metrics": scored.metrics, "tags": tags}
        with open(folder / "run.json", "w", encoding="utf-8", opener=cache.opener) as file:
            json.dump(content, file, indent=1)
        with open(folder / "samples.jsonl", "w", encoding="utf-8", opener=cache.opener) as file:
            file.writelines(f"{line}\n" for line in scored.sample_lines())
        said = " ".join(str(error).split())[:300]
        raise Unavailable(
            f"the tracking server doesn't take the scores: {said}; they are kept, and uploaded by "
            f"python -m slm.tracking.unsent {folder}"
        ) from error


def upload(folder: Path) -> str:
    """Sends the results that `kept` wrote into `folder`, and removes the folder. Returns the run's id.

    Raises:
        BadInput: the folder holds no such results.
    """
    try:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        run_id, metrics, tags = content["run_id"], content["metrics"], content["tags"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} holds no scores that were kept: {error}") from None
    mlflow = mlflow_client.quiet_mlflow()
    with mlflow.start_run(run_id=run_id):  # ends it FINISHED
        mlflow.log_metrics(metrics, model_id=content["model_id"])
        mlflow.set_tags(tags | {UPLOADED: "later"})
        mlflow.log_artifact(str(folder / "samples.jsonl"), "evaluation")
    shutil.rmtree(folder)
    return run_id


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slm.tracking.unsent", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder

    def story() -> str:
        print(f"uploaded to run {upload(folder)}")
        return "none"

    return lifecycle.exit_code(story)


if __name__ == "__main__":
    sys.exit(main())
