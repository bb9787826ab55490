"""The names of the tags that this project writes to runs and registered versions.

docs/reading-results.md says what users read there. The tag of the manifest is in slm/models/manifest.py, because a
model is logged with it. MLflow's own tags begin with `mlflow.`.
"""

# what was evaluated, and the verdict
GATE = "gate"
PROMPTS = "prompts"
PROMPTS_SHA256 = "prompts.sha256"
SYSTEM_PROMPT = "system_prompt"  # resolved: a version, and no alias
SYSTEM_PROMPT_SHA256 = "system_prompt.sha256"
MODEL_NAME = "model.name"
MODEL_URI = "model.uri"  # resolved: a version, and no alias
MODEL_SHA256 = "model.sha256"
JUDGE = "judge"
ENGINE = "engine"
FINGERPRINT = "fingerprint"
OUTPUTS_SHA256 = "outputs.sha256"

# of a registered version
EVALUATION_RUN = "evaluation.run"
BEFORE = "before"  # `<alias>.before`: the version that had the alias when this version got it
SERVE_REFUSED = "serve.refused"  # why a server did not move to this version
GIT_COMMIT = "git_commit"
SOURCE = "source"
REVISION = "revision"
PRECISION = "precision"

# of a run that ends, or may end, too early
ERROR = "error"
PROCESS = "process"
SEEN = "process.seen"
UPLOADED = "uploaded"  # later: slm/tracking/unsent.py sent the scores after the server came back
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"  # the description on the page of a run or of a logged model

# of a start with a slot
SLOT = "slot"
SUBJECT = "slot.subject"
ASKED = "slot.asked"
INPUTS = "slot.inputs"
VERDICT = "slot.verdict"  # the last tag of a start that is done
EARLIER = "unchanged.run"
SKIPPED = "skipped"


def is_of_score(tag: str) -> bool:
    """Whether a version's tag holds a score, see `of_score`."""
    return tag == "score" or tag.startswith("score.")


def of_score(scorer: str, overall: str) -> str:
    """The tag for a scorer's mean: `score` for the overall score, and `score.<scorer>` for others."""
    return scorer if scorer == overall else f"score.{scorer}"
