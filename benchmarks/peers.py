"""What the wrappers are measured against: the same weights, run by others, with the least around them.

Each peer takes token ids, or conversations, and gives the number of tokens that it generated, end tokens included and
nothing after them. Its settings are the best found here; what is tried is in benchmarks/generation.py.
"""

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np

MAX_TOKENS = 64


class BareLoop:
    """onnxruntime-genai's generator in a loop: batches in the order given, nothing read but the tokens."""

    def __init__(self, folder: Path, threads: int):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self._end, self._padding = facts["eos_token_id"], facts["pad_token_id"]

    def generate(self, prompts: list[list[int]], batch_size: int, max_tokens: int = MAX_TOKENS) -> int:
        count = 0
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            width = max(map(len, batch))
            parameters = self._og.GeneratorParams(self._model)
            parameters.set_search_options(max_length=width + max_tokens, batch_size=len(batch), do_sample=False)
            generator = self._og.Generator(self._model, parameters)
            ids = np.full((len(batch), width), self._padding, dtype=np.int32)
            for place, prompt in enumerate(batch):
                ids[place, : len(prompt)] = prompt
            generator.append_tokens(ids if len(batch) > 1 else ids[0])
            live = np.ones(len(batch), dtype=bool)
            room = max_tokens
            while room and live.any() and not generator.is_done():
                generator.generate_next_token()
                count += int(live.sum())
                live &= generator.get_next_tokens() != self._end
                room -= 1
        return count


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level calls: sequences side by side, an ended one refilled.

    A sequence keeps the beginning that it shares with the one before it, as llama.cpp's own server does. `repack` lays
    the weights out anew for this processor's widest instructions, which is llama.cpp's default.
    """

    def __init__(self, file: Path, threads: int, sequences: int, repack: bool, gpu: bool = False, span: int = 256):
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_QUIET, None)
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = repack
        model.n_gpu_layers = 999 if gpu else 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * span, sequences
        settings.n_batch = settings.n_ubatch = 2048
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified, settings.flash_attn_type = True, 1  # 124 tokens/s with 8 sequences, where 83 without
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._width = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._end = llama_cpp.llama_vocab_eos(vocabulary)
        self._held: list[list[int]] = [[] for _ in range(sequences)]

    def generate(self, prompts: list[list[int]], max_tokens: int = MAX_TOKENS) -> int:
        waiting, live = deque(prompts), {}  # live: sequence -> [tokens to put in, place of the first, generated]
        count = 0
        while waiting or live:
            for sequence in range(len(self._held)):
                if waiting and sequence not in live:
                    prompt = waiting.popleft()
                    pairs = zip(self._held[sequence], prompt[:-1], strict=False)
                    kept = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
                    kept = min(len(self._held[sequence]), len(prompt) - 1) if kept is None else kept
                    self._api.llama_memory_seq_rm(self._memory, sequence, kept, -1)
                    self._held[sequence] = prompt
                    live[sequence] = [prompt[kept:], kept, 0]
            size, last = 0, {}
            for sequence, (tokens, first, _) in live.items():
                for place, token in enumerate(tokens):
                    self._batch.token[size], self._batch.pos[size] = token, first + place
                    self._batch.n_seq_id[size], self._batch.seq_id[size][0] = 1, sequence
                    self._batch.logits[size] = place == len(tokens) - 1
                    size += 1
                last[sequence] = size - 1
            self._batch.n_tokens = size
            if self._api.llama_decode(self._context, self._batch):
                raise RuntimeError("llama.cpp could not decode")
            for sequence, place in last.items():
                logits = np.ctypeslib.as_array(
                    self._api.llama_get_logits_ith(self._context, place), shape=(self._width,)
                )
                token, (tokens, first, made) = int(logits.argmax()), live[sequence]
                count += 1
                if token == self._end or made + 1 == max_tokens:
                    del live[sequence]
                else:
                    live[sequence] = [[token], first + len(tokens), made + 1]
        return count


def llama_cpp_repacks(file: Path) -> bool:
    """Whether llama.cpp gets through a prompt with repacked weights here: with AMX, 0.3.36 has crashed."""
    code = "import sys; from benchmarks import peers; peers.LlamaCpp(sys.argv[1], 1, 1, True).generate([[1, 2, 3]], 1)"
    return subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False).returncode == 0


class Generate:
    """transformers' own `generate`: padded on the left, rows of like length together."""

    def __init__(self, folder: Path, device: str):
        import torch
        import transformers

        self._torch, self._device = torch, device
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval().to(device)

    def generate(self, prompts: list[list[int]], batch_size: int, max_tokens: int = MAX_TOKENS) -> int:
        count, end = 0, self._model.generation_config.eos_token_id
        ordered = sorted(prompts, key=len, reverse=True)
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            width = max(map(len, batch))
            ids = self._torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in batch])
            mask = self._torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with self._torch.inference_mode():
                ids, mask = ids.to(self._device), mask.to(self._device)
                output = self._model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=end
                )
            for row in output[:, width:].tolist():
                count += row.index(end) + 1 if end in row else len(row)
        return count


class StockChat:
    """mlflow's own llm/v1/chat pyfunc of the same checkpoint: one conversation after another, on a GPU where one is."""

    def __init__(self, folder: Path, scratch: Path):
        import mlflow
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        mlflow.transformers.save_model(
            pipeline, str(scratch / "stock"), task="llm/v1/chat", pip_requirements=["transformers"]
        )
        self._model = mlflow.pyfunc.load_model(str(scratch / "stock"))

    def generate(self, conversations: list[list[dict]], max_tokens: int = MAX_TOKENS) -> int:
        answers = [self._model.predict({"messages": one, "max_tokens": max_tokens})[0] for one in conversations]
        return sum(answer["usage"]["completion_tokens"] for answer in answers)


def _silent():
    import ctypes

    return ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


_QUIET = _silent()
