#!/bin/sh
# Closes the loop once a week: compares the challenger with the champion on last week's traffic and on the fixed set,
# and moves the alias if both gates pass. A server that follows the alias then serves the challenger. docs/loop.md
#
# Replace phi3 in models:/phi3 by the name of your registered model, and phi3-traffic by the experiment that
# serve -P traces=0.05 -P trace_experiment=phi3-traffic writes to. There must be a champion, whose traffic it is.
# First set the alias challenger: MLflow's page of the version does it, or in Python
# mlflow.MlflowClient().set_registered_model_alias("phi3", "challenger", "1").
#
# A line for cron, on a machine with a clone and its environment (schedules/phi3-evaluate.service says how):
#
#   0 3 * * 1  cd /opt/phi3-mlflow && PATH="$PWD/.venv/bin:$PATH" MLFLOW_TRACKING_URI=https://… sh schedules/loop.sh
#
# The first verdict that is no pass ends the script with its exit code (3 regress, 5 inconclusive; 2 also if the week
# had no traffic). Options go on to both evaluations: sh schedules/loop.sh --max_tokens=128
#
# trust_code is left off: a schedule evaluates models of this project alone (docs/trust.md).
set -eu
: "${MLFLOW_TRACKING_URI:?name the tracking server}"
export MLFLOW_EXPERIMENT_NAME="${MLFLOW_EXPERIMENT_NAME:-phi3-evaluate}"
slot="${SLOT:-$(date -u +%G-W%V)}" # the week: a second start takes over its verdicts, or goes on with the same rows

compare() {
    python -m entrypoints.evaluate --model_uris=models:/phi3@challenger --baseline=models:/phi3@champion \
        --slot="$slot" --timeout=7200 "$@"
}

# Traffic has no expected answers: does the challenger go on as the champion does? Moves nothing
compare --prompts='traces:phi3-traffic?days=7&limit=200' --thresholds=gates/traffic.yaml "$@"
# The fixed set has them: is the challenger as good? Moves the alias
compare --prompts=prompts/general.jsonl --thresholds=gates/default.yaml --alias=champion "$@"
