"""Runs an ONNX GenAI folder with onnxruntime-genai, and chooses the runtime of a folder."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from .continuous_runtime import ContinuousRuntime
from .rows import Row
from .runtime import Runtime, exact_integers, physical_cores
from .sampling import next_token

ONNX_RUNTIMES = ("onnxruntime-genai", "onnxruntime")  # the names of OnnxRuntime and ContinuousRuntime


def onnx_runtime(folder: Path, config: dict) -> Runtime:
    """Opens an ONNX GenAI folder with ContinuousRuntime if ContinuousRuntime supports the graph, else with OnnxRuntime.

    The entry `runtime` of `config` may name one of ONNX_RUNTIMES.

    Raises:
        ValueError: ContinuousRuntime is named, and does not support the graph.
    """
    named = config.get("runtime") or "auto"
    if named == OnnxRuntime.library:
        return OnnxRuntime(folder, config)
    reason = unsupported(folder, config)
    if not reason:
        return ContinuousRuntime(folder, config)
    if named == ContinuousRuntime.library:
        raise ValueError(f"runtime: onnxruntime can't run this folder, {reason}; write runtime=onnxruntime-genai")
    return OnnxRuntime(folder, config)


def unsupported(folder: Path, config: dict) -> str:
    """Why ContinuousRuntime does not support an ONNX GenAI folder; "" if it does.

    ContinuousRuntime supports graphs with grouped-query attention and the usual inputs, on the CPU, whose caches hold
    the whole context.
    """
    content = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    decoder = content["model"]["decoder"]
    listed = decoder.get("session_options", {}).get("provider_options")
    known = {"input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names"}
    reasons = {
        "which is for a GPU": (config.get("execution_provider") or ("cpu" if not listed else "")) != "cpu",
        "which has past_present_share_buffer false": not content.get("search", {}).get("past_present_share_buffer"),
        "whose graph has other inputs": not set(decoder.get("inputs", {})) <= known,
        "whose caches hold a window of the context": bool((decoder.get("sliding_window") or {}).get("layers")),
        "which has several graphs": "pipeline" in decoder,
    }
    return next((reason for reason, found in reasons.items() if found), "")


class OnnxRuntime:
    """Runs onnxruntime-genai on a folder with genai_config.json."""

    library = "onnxruntime-genai"
    batch_size = 16
    refills = False
    reads = False
    passes_end = False

    def __init__(self, folder: Path, config: dict):
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # without this, the Linux wheel sends events
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._og = og
        settings = og.Config(str(folder))
        provider = config.get("execution_provider")
        if provider:
            settings.clear_providers()
            if provider != "cpu":
                settings.append_provider(provider)
        facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        listed = [*facts["decoder"].get("session_options", {}).get("provider_options", []), {}]
        if provider == "cuda" or (not provider and "cuda" in listed[0]):
            import onnxruntime

            onnxruntime.preload_dlls()  # CUDA's libraries from the folders of pip's packages
        # onnxruntime-genai's own default took one thread on two cores, at 0.6 times the speed
        threads = int(config.get("threads") or physical_cores())
        ours = {"session_options": {"intra_op_num_threads": threads} | exact_integers(facts["decoder"])}
        window = facts["decoder"].get("sliding_window") or {}
        if window.get("layers") == []:
            # For Phi-3, the builder (0.18) writes a window although no layer of the graph has one. The runtime then
            # makes caches of two windows. So two windows must be the context length.
            ours["sliding_window"] = window | {"window_size": facts["context_length"] // 2}
        settings.overlay(json.dumps({"model": {"decoder": ours}}))
        self._model = og.Model(settings)
        self._windowed = bool(window.get("layers"))
        end = facts["eos_token_id"]
        self.end_tokens = frozenset(end if isinstance(end, list) else [end])
        self.context_length = int(facts["context_length"])
        decoder = facts["decoder"]
        self.bytes_per_token = 8 * (
            decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        )  # a key and a value, each of at most four bytes
        self.vocabulary_size = int(facts["vocab_size"])
        self._padding = int(facts["pad_token_id"])

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of every row, by position in `rows`, until all rows are finished.

        Finished rows get token ids too. Rows are padded on the right. A graph with a pruned head gives only the logits
        of the last position, which may be padding. So the prompts go in without their last token, and that token is
        then forced as if it were generated. This costs one step. Each row gets the right logits, and the head is not
        computed over whole prompts. A batch of one row does the same. So a row's numbers, and in int4 its text, don't
        depend on the other rows.
        """
        og = self._og
        last = [row.prompt[-1] for row in rows]
        forced = len(rows[0].prompt) > 1 and last[0] not in self.end_tokens  # see alone_in_batch
        width = max(len(row.prompt) for row in rows)
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=width + max(row.room for row in rows), batch_size=len(rows), do_sample=False
        )
        generator = og.Generator(self._model, parameters)
        ids = np.full((len(rows), width - forced), self._padding, dtype=np.int32)
        for place, row in enumerate(rows):
            ids[place, : len(row.prompt) - forced] = row.prompt[: len(row.prompt) - forced]
        generator.append_tokens(ids if len(rows) > 1 else ids[0])
        if forced:
            self._choose(generator, dict(enumerate(last)), len(rows))
            generator.generate_next_token()
        while not (generator.is_done() or all(row.finish_reason for row in rows)):
            if any(not (row.takes_likeliest or row.finish_reason) for row in rows):
                logits = generator.get_logits().reshape(len(rows), -1)
                live = {place: row for place, row in enumerate(rows) if not row.finish_reason}
                chosen = {place: next_token(logits[place], row) for place, row in live.items()}
                self._choose(generator, chosen, len(rows))
            generator.generate_next_token()
            yield dict(enumerate(generator.get_next_tokens().tolist()))

    def join(self, rows: Mapping[int, Row], take: Callable[[], int]) -> Iterator[dict[int, int]]:
        raise NotImplementedError("onnxruntime-genai keeps a batch together")

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int | None]:
        raise NotImplementedError("onnxruntime-genai gives the logits of the last place only")

    def alone_in_batch(self, prompt: list[int]) -> bool:
        """Whether a prompt needs a batch of its own.

        This is so if its last token can't be forced, or if the graph's caches take no padding. An end token can't be
        forced, because it would end the row. The token of a one-token prompt can't be forced, because no token would go
        in before it.
        """
        return self._windowed or len(prompt) == 1 or prompt[-1] in self.end_tokens

    def lanes(self, rows: int) -> list[Runtime]:
        return [self]

    def _choose(self, generator, chosen: dict[int, int], rows: int) -> None:
        logits = np.full((rows, 1, self.vocabulary_size), -1e9, dtype=np.float32)
        for place, token in chosen.items():
            logits[place, 0, token] = 0.0
        generator.set_logits(logits)
