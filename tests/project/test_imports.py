"""What scoring an ONNX model must not import: torch and transformers take seconds and hundreds of megabytes."""

import sys

from support.commands import REPOSITORY, call

SCORE = """
import sys
from entrypoints import evaluate

code = evaluate.main(sys.argv[1:])
print("imported:", sorted({"torch", "transformers"} & set(sys.modules)))
sys.exit(code)
"""


def test_an_onnx_model_is_scored_without_torch_and_transformers(tracking, int4_export, tmp_path):
    from slm.models import model_logging

    generation = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
    with tracking.start_run():
        uri = model_logging.log_onnx(int4_export, "chat", generation, "int4").model_uri
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "france", "prompt": "What is the capital of France?", "expected": "Paris"}\n')
    done = call(
        sys.executable,
        "-c",
        SCORE,
        f"--model_uris={uri}",
        f"--prompts={prompts}",
        "--max_tokens=8",
        cwd=tmp_path,
        PYTHONPATH=str(REPOSITORY),
        MLFLOW_TRACKING_URI=tracking.get_tracking_uri(),
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "imported: []"
