"""Evaluates the challenger against the champion every night, and moves the alias on a pass. Airflow 3.

Replace ORG, COMMIT and /opt/phi3-mlflow, and phi3 in models:/phi3 by the name of your registered model.
First set the alias challenger: MLflow's page of the version does it, or in Python
mlflow.MlflowClient().set_registered_model_alias("phi3", "challenger", "1"). There need be no champion: the first
start makes the challenger the first one, if it keeps the rules that compare with nothing.

Copy it to the DAGs folder. Each worker needs a clone of the project, at the commit that is to judge, with an
environment of its own, since Airflow's pins and this project's don't go together:

    git clone https://github.com/ORG/phi3-mlflow /opt/phi3-mlflow && cd /opt/phi3-mlflow && git checkout COMMIT
    python3.11 -m venv .venv && .venv/bin/pip install --require-hashes -r locked.txt

and in its own environment MLFLOW_TRACKING_URI (with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the
server wants them): not in the DAG, whose rendered fields are shown in the browser. `mlflow run` makes every failure
exit code 1, and the task fails: its log shows the verdict, and in MLflow the tags slot and gate.

trust_code is left off: a schedule evaluates models of this project alone (docs/trust.md).
"""

from datetime import UTC, datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "phi3_evaluate",
    description="Evaluate the challenger against the champion",
    schedule="0 3 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # missed nights would all score the model of today
    max_active_runs=1,  # one at a time
    dagrun_timeout=timedelta(hours=3),
    tags=["mlflow", "phi3"],
):
    BashOperator(
        task_id="evaluate",
        cwd="/opt/phi3-mlflow",
        bash_command=(
            ". .venv/bin/activate && mlflow run . --env-manager local"
            " -P model_uris=models:/phi3@challenger -P baseline=models:/phi3@champion -P alias=champion"
            " -P prompts=prompts/general.jsonl -P thresholds=gates/default.yaml"
            ' -P slot="$SLOT"'
        ),
        # The run's id holds its scheduled time, and a retry keeps it. As a variable it can't become a command: a run
        # that is started by hand may be called anything.
        env={"SLOT": "{{ run_id }}", "MLFLOW_EXPERIMENT_NAME": "phi3-evaluate"},
        append_env=True,
        execution_timeout=timedelta(hours=2),  # SIGTERM
        retries=1,  # for the infrastructure; a verdict is taken over from the first try
        retry_delay=timedelta(minutes=10),
    )
