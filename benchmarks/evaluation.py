"""`evaluate` from loaded model to logged result, against the bare loop and lm-evaluation-harness on the same prompts.

The embedded model, the first 150 rows of prompts/general.jsonl, greedy, 64 tokens at most. A figure is tokens per
second over all of it: rendering, generating, scoring, logging to sqlite. lm-eval gets the rendered prompts as a
generate_until task, and its time begins with the model loaded, as ours does.
"""

import json
import logging
import os
import time
from pathlib import Path

from benchmarks import first_prompts, peers
from benchmarks.generation import speed, wrapper
from benchmarks.ratios import Row, in_turn, ratios
from slm.base import console, parameters
from slm.evaluation import conclusion, scoring
from slm.models import checkpoints, onnx_export
from slm.models.chat_model import physical_cores
from slm.prompts import prompt_sets
from slm.tracking import lifecycle, mlflow_client

BARE_BATCH_SIZE = 16  # its best in benchmarks/generation.py


def measure(scratch: Path, provider: str) -> list[Row]:
    console.out.quiet = True
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    mlflow = mlflow_client.quiet_mlflow()
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("evaluating", artifact_location=f"{scratch}/store"))
    from slm.models import model_logging

    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    export = onnx_export.export(checkpoint, "int4", provider)
    generation = {"max_tokens": peers.MAX_TOKENS, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
    with mlflow.start_run():
        uris = {
            "onnx": model_logging.log_onnx(export, "chat", generation, "int4").model_uri,
            "pipeline": model_logging.log_pipeline(checkpoint, generation).model_uri,
        }
    whole = first_prompts.prompt_set()
    part = prompt_sets.PromptSet(**{**vars(whole), "prompts": whole.prompts[::5]})
    model = wrapper(onnx=export.folder)
    texts = {id(chosen): [model.render(list(row.messages)) for row in chosen.prompts] for chosen in (whole, part)}
    ids = [model.prepare({"messages": list(row.messages)})[0].prompt for row in whole.prompts]
    tokenizer = model._tokenizer

    def evaluate(name: str, prompt_set: prompt_sets.PromptSet) -> float:
        options = [f"--model_uris={uris[name]}", f"--max_tokens={peers.MAX_TOKENS}", "--resume=false"]
        args = parameters.parse("evaluate", "", options)
        with lifecycle.run("evaluate", args):
            start = time.perf_counter()
            scored, run_id = scoring.score_model(name, uris[name], prompt_set, args)
            conclusion.finish(name, [scoring.Result(scored, run_id)], args, prompt_set)
            seconds = time.perf_counter() - start - scored.model.load_seconds
        return sum(sample.output_tokens for sample in scored.samples) / seconds

    def compare(fidelity: str) -> float:
        """Seconds of a whole comparison: both models loaded, asked, and with fidelity=auto compared token by token."""
        options = [f"--max_tokens={peers.MAX_TOKENS}", "--resume=false", f"--fidelity={fidelity}"]
        args = parameters.parse("evaluate", "", options)
        start = time.perf_counter()
        with lifecycle.run("evaluate", args):
            results = scoring.score_models(list(uris.items()), whole, args, baseline=1)
            conclusion.finish("both", results, args, whole, baseline=1)
        return time.perf_counter() - start

    harness = {
        "onnxruntime-genai": lm_eval_model("onnxruntime-genai", pretrained=str(export.folder)),
        "hf": lm_eval_model("hf", pretrained=str(checkpoint.folder), dtype="float32", batch_size=16, device=provider),
    }

    def ask_harness(name: str) -> float:
        return harness_speed(harness[name], texts[id(part)], scratch, tokenizer)

    bare = peers.BareLoop(export.folder, physical_cores())
    full = in_turn(
        {
            "ours": lambda: evaluate("onnx", whole),
            "bare": lambda: speed(lambda: bare.generate(ids, BARE_BATCH_SIZE)),
        }
    )
    some = in_turn(
        {
            "onnx": lambda: evaluate("onnx", part),
            "lm-eval onnx": lambda: ask_harness("onnxruntime-genai"),
            "pipeline": lambda: evaluate("pipeline", part),
            "lm-eval hf": lambda: ask_harness("hf"),
        }
    )
    both = in_turn({name: lambda name=name: compare(name) for name in ("auto", "off")})
    return [
        Row("evaluate with fidelity: time", "without", 1.5, ratios(both["auto"], both["off"]), at_most=True),
        Row("evaluate, ONNX", "bare onnxruntime-genai loop", 0.9, ratios(full["ours"], full["bare"])),
        Row("evaluate, ONNX", "lm-eval, onnxruntime-genai", 1.5, ratios(some["onnx"], some["lm-eval onnx"])),
        Row("evaluate, pipeline", "lm-eval, hf, batches of 16", 1.5, ratios(some["pipeline"], some["lm-eval hf"])),
    ]


def lm_eval_model(name: str, **settings):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.registry import get_model

    return get_model(name)(**settings)


def harness_speed(model, texts: list[str], scratch: Path, tokenizer) -> float:
    from lm_eval import simple_evaluate

    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "answer": ""}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "task": "prompts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(scratch / "datasets")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": peers.MAX_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    start = time.perf_counter()
    found = simple_evaluate(model=model, tasks=[task], log_samples=True, bootstrap_iters=0)
    seconds = time.perf_counter() - start
    answers = [sample["resps"][0][0] for sample in found["samples"]["prompts"]]
    counts = [len(tokenizer.encode(answer, add_special_tokens=False).ids) for answer in answers]
    return sum(min(count + 1, peers.MAX_TOKENS) for count in counts) / seconds  # and the end token
