"""How fast the wrappers generate, against the least that others put around the same weights.

The embedded model, the first 150 rows of prompts/general.jsonl, greedy, 64 tokens at most; a figure is tokens per
second, end tokens included. Every peer is first tried at several batch sizes, and stands at its best. What a wrapper
still holds of an earlier round's prompts is dropped before each, since a prompt set is asked once.
"""

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import first_prompts, peers, precision
from benchmarks.ratios import Row, best, in_turn, ratios
from slm.models import checkpoints, onnx_export
from slm.models.chat_model import Answer, SmallLanguageModel, integers_saturate, physical_cores
from slm.prompts.prompt_rows import Prompt

BATCH_SIZES = (8, 16, 32)
WITHOUT_VNNI = "integers of 8 bits are multiplied as fast as that by processors with VNNI"


class Context:
    """What MLflow hands to load_context."""

    def __init__(self, **artifacts):
        self.artifacts, self.model_config = {name: str(folder) for name, folder in artifacts.items()}, {}


def wrapper(**artifacts) -> SmallLanguageModel:
    model = SmallLanguageModel()
    model.load_context(Context(**artifacts))
    return model


def prompt_rows() -> tuple[Prompt, ...]:
    return first_prompts.prompt_set().prompts


def questions() -> list[dict]:
    return [{"messages": list(row.messages), "max_tokens": peers.MAX_TOKENS} for row in prompt_rows()]


def forget(model: SmallLanguageModel) -> None:
    if hasattr(model._runtime, "_idle"):
        model._runtime._idle.clear()


def speed(generate: Callable[[], int]) -> float:
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


def answered(model: SmallLanguageModel, rows: list[dict]) -> Callable[[], float]:
    """Tokens per second of a set asked at once, through predict."""

    def generate() -> int:
        return sum(answer["usage"]["completion_tokens"] for answer in model.predict(None, rows))

    return lambda: forget(model) or speed(generate)


def asked_singly(model: SmallLanguageModel, rows: list[dict]) -> Callable[[], float]:
    def generate() -> int:
        return sum(model.predict(None, [row])[0]["usage"]["completion_tokens"] for row in rows)

    return lambda: forget(model) or speed(generate)


def answers(model: SmallLanguageModel, rows: list[dict]) -> list[Answer]:
    found = dict(model.answers(rows))
    return [found[place][0] for place in range(len(rows))]


def over_onnx(provider: str) -> list[Row]:
    """The ONNX wrapper against onnxruntime-genai and llama.cpp."""
    source = checkpoints.find("smollm2-135m-instruct")
    folder, threads = onnx_export.export(source.fetch(), "int4", provider).folder, physical_cores()
    model = wrapper(onnx=folder)
    rows = questions()
    ids = [model.prepare(row)[0].prompt for row in rows]
    few = slice(0, None, 5)  # for what is asked one at a time
    bare = peers.BareLoop(folder, threads)
    batch_size = int(
        best({str(size): lambda size=size: speed(lambda: bare.generate(ids[:32], size)) for size in BATCH_SIZES})
    )
    file = checkpoints._packaged_file(checkpoints.EMBEDDED[source.name])
    repack = peers.llama_cpp_repacks(file)
    gpu = provider == "cuda"
    single = peers.LlamaCpp(file, threads, 1, repack, gpu)
    several = {size: peers.LlamaCpp(file, threads, size, repack, gpu) for size in (1, 4, *BATCH_SIZES)}
    sequences = int(
        best({str(size): lambda size=size: speed(lambda: several[size].generate(ids[:32])) for size in several})
    )

    first = in_turn(
        {
            "ours": answered(model, rows[:32]),
            "bare": lambda: speed(lambda: bare.generate(ids[:32], batch_size)),
        }
    )
    whole = in_turn(
        {
            "set": answered(model, rows),
            "llama.cpp": lambda: speed(lambda: several[sequences].generate(ids)),
        }
    )
    one = in_turn(
        {
            "ours": asked_singly(model, rows[few]),
            "llama.cpp": lambda: speed(lambda: single.generate(ids[few])),
        }
    )
    long = [[7 + turn, *(ids[0] * 40)[:999]] for turn in range(20)]  # no two begin alike

    def first_token(turn: int) -> float:
        row = model.prepare({"messages": rows[0]["messages"], "max_tokens": 1})[0]
        row.prompt = long[turn]
        start = time.perf_counter()
        next(model.stream([row]))
        return time.perf_counter() - start

    def bare_first_token(turn: int) -> float:
        return 1 / speed(lambda: bare.generate([long[turn]], 1, max_tokens=1))

    turns = {"bare": iter(range(len(long))), "ours": iter(range(len(long)))}
    waited = in_turn(
        {"bare": lambda: bare_first_token(next(turns["bare"])), "ours": lambda: first_token(next(turns["ours"]))},
        rounds=len(long),
    )
    return [
        Row(
            "ONNX predict, 32 chat prompts",
            f"bare onnxruntime-genai loop, batches of {batch_size}",
            0.97,
            ratios(first["ours"], first["bare"]),
        ),
        Row("ONNX, prompt set", "the same, one prompt at a time", 1.5, ratios(whole["set"], one["ours"])),
        Row("ONNX, one prompt at a time", "llama.cpp, one at a time", 1.0, ratios(one["ours"], one["llama.cpp"])),
        Row("ONNX, prompt set", f"llama.cpp, {sequences} sequences", 1.3, ratios(whole["set"], whole["llama.cpp"])),
        Row(
            "ONNX, first token of 1,000",
            "bare onnxruntime-genai loop",
            0.97,
            ratios(waited["bare"], waited["ours"]),
        ),
    ]


def over_transformers(scratch: Path, provider: str) -> list[Row]:
    """The pipeline wrapper against transformers and mlflow; the ONNX wrapper against it."""
    checkpoint = checkpoints.find("smollm2-135m-instruct").fetch()
    model = wrapper(checkpoint=checkpoint.folder)
    onnx = {name: wrapper(onnx=onnx_export.export(checkpoint, name, provider).folder) for name in ("int4", "int8")}
    rows = questions()
    ids = [model.prepare(row)[0].prompt for row in rows]
    plain, stock = peers.Generate(checkpoint.folder, provider), peers.StockChat(checkpoint.folder, scratch)
    batch_size = int(
        best({str(size): lambda size=size: speed(lambda: plain.generate(ids[:32], size)) for size in BATCH_SIZES})
    )
    figures = in_turn(
        {
            "pipeline": answered(model, rows),
            "generate": lambda: speed(lambda: plain.generate(ids, batch_size)),
            "stock": lambda: speed(lambda: stock.generate([row["messages"] for row in rows[::30]])),
            **{name: answered(other, rows) for name, other in onnx.items()},
        }
    )
    given = {name: answers(other, rows) for name, other in (onnx | {"fp32": model}).items()}
    scores = {name: precision.score(prompt_rows(), texts) for name, texts in given.items()}
    against_fp32 = [
        Row(
            f"ONNX {name}, prompt set",
            "pipeline, fp32",
            5.0,
            ratios(figures[name], figures["pipeline"]),
            note=f"{precision.agreement(given[name], given['fp32']):.0%} of fp32's answers to the letter, "
            f"score {scores[name]:.3f}, fp32's {scores['fp32']:.3f}",
            why=WITHOUT_VNNI if provider == "cpu" and integers_saturate() else "",
        )
        for name in onnx
    ]
    return [
        Row(
            "pipeline, prompt set",
            f"transformers generate, batches of {batch_size}",
            0.95,
            ratios(figures["pipeline"], figures["generate"]),
        ),
        Row("pipeline, prompt set", "mlflow's stock llm/v1/chat", 3.0, ratios(figures["pipeline"], figures["stock"])),
        *against_fp32,
    ]
