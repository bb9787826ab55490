"""What a graph, or a wrapper's runtime, says comes next, in token ids."""

import json
from pathlib import Path

import numpy as np


def greedy(runtime, prompts: list[list[int]], max_tokens: list[int], places: int = 0) -> list[list[int]]:
    """The token ids that a wrapper's runtime gives for one batch, or by refilling `places`, where it can."""
    from slm.models.chat_model import Row, Sampling

    sampling = Sampling(max_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=(), n=1)
    batch = [
        Row((index, 0), prompt, sampling, room, 0)
        for index, (prompt, room) in enumerate(zip(prompts, max_tokens, strict=True))
    ]
    for tokens in runtime.steps(batch, places):
        for place, token in tokens.items():
            row = batch[place]
            if not row.finish_reason:
                row.output.append(token)
                ended = token in runtime.end_tokens
                if ended or len(row.output) == row.room:
                    row.end("stop" if ended else "length")
        if all(row.finish_reason for row in batch):
            return [row.output for row in batch]
    raise AssertionError("the runtime ended before its rows")


def next_tokens(folder: Path, prompts: list[list[int]], entries: dict[str, str] | None = None) -> np.ndarray:
    """Log probabilities of the token that follows each prompt, (prompts, vocabulary), by onnxruntime alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for entry in (entries or {}).items():
        options.add_session_config_entry(*entry)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    half = session.get_outputs()[1].type == "tensor(float16)"
    past = np.zeros((1, facts["num_key_value_heads"], 0, facts["head_size"]), np.float16 if half else np.float32)
    found = []
    for prompt in prompts:
        ids = np.array([prompt])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(prompt))[None]}
        given = {entry.name: given.get(entry.name, past) for entry in session.get_inputs()}
        found.append(session.run(["logits"], given)[0][0, -1])
    logits = np.array(found, dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
