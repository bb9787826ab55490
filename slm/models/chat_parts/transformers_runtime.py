"""Runs a causal LM of transformers."""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .rows import Row
from .runtime import CACHE_BYTES, LOGITS_BYTES, Runtime
from .sampling import next_token

READ_TOKENS = 2**11  # that go through transformers at once, where known tokens are read
LEAST_TOKENS = 16  # of each row; a row that ends within them is padded
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class TransformersRuntime:
    """Runs a causal LM of transformers. Finished rows are dropped from its cache."""

    library = "transformers"
    batch_size = 32
    refills = False
    reads = True
    passes_end = True

    def __init__(self, folder: Path, config: dict):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        device = config.get("device") or "auto"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.get("dtype") or "auto"
        self._torch = torch
        # OpenMP keeps a thread pool for every thread that calls it. So calls from a server's many threads are several
        # times slower than calls from this one thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch")
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        self._model = network.to(device)
        self._model.eval()
        if config.get("threads") and device == "cpu":
            torch.set_num_threads(int(config["threads"]))
        if device == "cpu" and self._model.dtype in (torch.float32, torch.bfloat16):
            self._thread.submit(self._pack).result()
        settings, defaults = self._model.config, self._model.generation_config
        end = defaults.eos_token_id if defaults.eos_token_id is not None else settings.eos_token_id
        self.end_tokens = frozenset(end if isinstance(end, list) else [end] if end is not None else [])
        self.context_length = int(getattr(settings, "max_position_embeddings", 0) or 2**20)
        self.vocabulary_size = int(settings.get_text_config().vocab_size)
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        self.bytes_per_token = 8 * settings.num_hidden_layers * heads * width

    def steps(
        self, rows: list[Row], places: int = 0, take: Callable[[], int] | None = None
    ) -> Iterator[dict[int, int]]:
        """Yields the next token id of every unfinished row, by position in `rows`."""
        torch = self._torch
        from transformers import DynamicCache

        device = self._model.device
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):  # padding on the left: the last column holds each row's last token
            ids[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[place, width - len(row.prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self._model.config)
        live = list(range(len(rows)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while live:
            logits, tokens = self._thread.submit(self._forward, ids, mask, positions, cache).result()
            for at, place in enumerate(live):
                row = rows[place]
                if not row.takes_likeliest:
                    tokens[at] = next_token(logits[at].float().cpu().numpy(), row)
            yield dict(zip(live, tokens, strict=True))
            kept = [at for at, place in enumerate(live) if not rows[place].finish_reason]
            if not kept:
                return
            ids = torch.tensor(tokens, device=device)[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if len(kept) < len(live):
                chosen = torch.tensor(kept, device=device)
                self._thread.submit(self._select, cache, chosen).result()
                ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
                live = [live[at] for at in kept]

    def join(self, rows: Mapping[int, Row], take: Callable[[], int]) -> Iterator[dict[int, int]]:
        raise NotImplementedError("a batch of transformers takes no further rows")

    def read(self, rows: list[Row], take: Callable[[], int] | None = None) -> Iterator[int | None]:
        """Calls `Row.see` for all given tokens of the rows. Yields each row's position when the row is done.

        Rows with one prompt share the keys and values of all its tokens but the last. Prompts of similar length go
        through together, and then their rows, piece by piece. A row that has ended leaves the batch.
        """
        waiting = sorted(range(len(rows)), key=lambda position: (len(rows[position].prompt), rows[position].prompt))
        while waiting:
            batch: list[int] = []
            prompts: dict[tuple[int, ...], int] = {}
            for position in waiting[: self.batch_size]:
                row = rows[position]
                span = len(row.prompt) + max(rows[member].room for member in [*batch, position])
                fits = (len(batch) + 1) * span * self.bytes_per_token <= CACHE_BYTES
                fits &= tuple(row.prompt) in prompts or (len(prompts) + 1) * len(row.prompt) <= READ_TOKENS
                if batch and not fits:
                    break
                batch.append(position)
                prompts.setdefault(tuple(row.prompt), len(prompts))
            del waiting[: len(batch)]
            batch.sort(key=lambda position: rows[position].room, reverse=True)
            members = [rows[position] for position in batch]
            sources = [prompts[tuple(row.prompt)] for row in members]
            self._read_together(members, sources, [list(prompt) for prompt in prompts])
            yield from batch

    def _read_together(self, rows: list[Row], sources: list[int], prompts: list[list[int]]) -> None:
        """Reads rows, the longest first; `sources` has the place of each row's prompt in `prompts`."""
        torch = self._torch
        from transformers import DynamicCache

        device, cache = self._model.device, DynamicCache(config=self._model.config)
        width = max(map(len, prompts)) - 1  # the last token of a prompt goes in with the given tokens
        mask = torch.zeros((len(prompts), width), dtype=torch.long, device=device)
        ids = torch.zeros_like(mask)
        for place, prompt in enumerate(prompts):  # padding on the left
            mask[place, width - len(prompt) + 1 :] = 1
            ids[place, width - len(prompt) + 1 :] = torch.tensor(prompt[:-1], dtype=torch.long)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        size = max(READ_TOKENS // len(prompts), 1)
        for end in range(size, width + size, size):
            here = slice(end - size, end)
            self._thread.submit(self._logits, ids[:, here], mask[:, :end], positions[:, here], cache, 1).result()
        if width and sources != list(range(len(prompts))):
            self._thread.submit(self._select, cache, torch.tensor(sources, device=device)).result()
        mask = mask[sources]
        begun = torch.tensor([len(row.prompt) - 1 for row in rows], device=device)[:, None]
        first = 0
        while first < rows[0].room:
            live = sum(row.room > first for row in rows)
            if live < len(rows):
                rows, mask, begun = rows[:live], mask[:live], begun[:live]
                self._thread.submit(self._select, cache, torch.arange(live, device=device)).result()
            end = min(max(rows[-1].room, first + LEAST_TOKENS), rows[0].room)
            places = range(first, min(end, first + max(LOGITS_BYTES // (4 * live * self.vocabulary_size), 1)))
            given = [(row.prompt[-1:] + row.forced)[places.start : min(places.stop, row.room)] for row in rows]
            ids = torch.tensor([part + [0] * (len(places) - len(part)) for part in given], device=device)
            real = torch.tensor([[1] * len(part) + [0] * (len(places) - len(part)) for part in given], device=device)
            mask = torch.cat([mask, real], dim=1)
            positions = begun + torch.arange(places.start, places.stop, device=device)
            logits = self._thread.submit(self._logits, ids, mask, positions, cache, len(places)).result()
            for of_row, part, row in zip(logits, given, rows, strict=True):
                row.see(first, of_row[: len(part)].numpy())
            first = places.stop

    def alone_in_batch(self, prompt: list[int]) -> bool:
        return False

    def lanes(self, rows: int) -> list[Runtime]:
        return [self]

    def _pack(self) -> None:
        """Changes the weights of linear layers, once, to the memory layout of oneDNN.

        For a few rows, oneDNN's product is up to four times as fast as MKL's. torch.compile uses the same operators for
        the linear layers of a frozen model.
        """
        torch = self._torch
        if not torch.backends.mkldnn.is_available():
            return
        reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        embedded = self._model.get_input_embeddings().weight.data_ptr()

        def packed(weight, bias, input):
            return linear(input, weight, bias, "none", [], "")

        with torch.inference_mode():
            for layer in self._model.modules():
                if type(layer) is torch.nn.Linear:
                    layer.forward = functools.partial(packed, reorder(layer.weight.data, self.batch_size), layer.bias)
                    if layer.weight.data_ptr() != embedded:  # tied embeddings still need these numbers
                        layer.weight.data = layer.weight.data.new_empty(0)

    def _forward(self, ids, mask, positions, cache):
        """The logits of the last position, shape (rows, vocabulary), and each row's likeliest token."""
        with self._torch.inference_mode():  # state of a thread: must not stay on across a yield
            logits = self._called(ids, mask, positions, cache, 1)[:, -1]
            return logits, logits.argmax(-1).tolist()

    def _logits(self, ids, mask, positions, cache, kept: int):
        """The logits of the last `kept` positions in float32 and in main memory, shape (rows, kept, vocabulary)."""
        with self._torch.inference_mode():
            return self._called(ids, mask, positions, cache, kept).float().cpu()

    def _called(self, ids, mask, positions, cache, kept: int):
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        ).logits

    def _select(self, cache, chosen) -> None:
        with self._torch.inference_mode():
            cache.batch_select_indices(chosen)
