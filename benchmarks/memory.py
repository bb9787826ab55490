"""What the process's memory grows by over 1,000 calls of each logged wrapper.

    python -m benchmarks.memory

The embedded model, as the ONNX int4 and as the pipeline wrapper, each logged, loaded through pyfunc and called with a
conversation of changing length. Resident memory is read after 100 calls and after 1,000 more.
"""

import gc
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

GENERATION = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}


def resident_bytes() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def growth_bytes(model, calls: int, first: int = 100) -> int:
    """Resident memory after `calls` calls, less that after the `first` calls before them."""

    def ask(number: int) -> None:
        question = f"What is {number} plus {number % 7}?" + " Take your time." * (number % 5)
        model.predict({"messages": [{"role": "user", "content": question}], "max_tokens": 1 + number % 2})

    for number in range(first):
        ask(number)
    before = resident_bytes()
    for number in range(calls):
        ask(number)
    return resident_bytes() - before


def main() -> None:
    import mlflow

    from slm.models import checkpoints, model_logging, onnx_export

    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    table = Table("wrapper", "before", "growth over 1,000 calls", title="memory, goal: growth under 20 MB")
    with tempfile.TemporaryDirectory() as scratch:
        mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
        experiment = mlflow.create_experiment("memory", artifact_location=f"{scratch}/artifacts")
        with mlflow.start_run(experiment_id=experiment):
            export = onnx_export.export(checkpoint, "int4", "cpu")
            logged = {
                "onnx int4": model_logging.log_onnx(export, "chat", GENERATION, "int4"),
                "pipeline": model_logging.log_pipeline(checkpoint, GENERATION),
            }
        for name, info in logged.items():
            model = mlflow.pyfunc.load_model(info.model_uri)
            before = resident_bytes()
            table.add_row(name, f"{before / 1e6:.0f} MB", f"{growth_bytes(model, 1000) / 1e6:.1f} MB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
