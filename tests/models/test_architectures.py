"""Architectures other than the embedded model's: Phi-3 with its own tokenizer, and small Llamas, Qwens and Gemmas.

Their weights are random, so nothing here says anything about quality. Windows are shorter than the prompts, norms and
biases are random too, and what both wrappers give is compared, token by token, with transformers' own `generate`.

Phi-3's vocabulary, template and reference ids (by llama.cpp) come with the source archive of llama-cpp-python; pip
fetches it, and nothing is compiled. Not covered: Gemma 3 inside its vision model, and Olmo, whose export by the builder
(0.18) gives another text than transformers.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import REPOSITORY, entry_point, without_gpu
from support.databases import sqlite_store
from support.token_ids import greedy, next_tokens

pytestmark = pytest.mark.slow

ARCHIVE = "llama_cpp_python==0.3.9"
GENERATION = {"max_tokens": 24, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": []}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LENGTHS = (40, 23, 9, 2)  # of the prompts, in tokens; windows are 16


def random_checkpoint(model, folder: Path, end: int | list[int], pad: int) -> Path:
    """Saves a small model after its norms and biases were made random too."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    model.save_pretrained(folder)
    return folder


def generated(model, prompt: list[int], max_tokens: int) -> list[int]:
    """transformers' own greedy continuation."""
    import torch

    output = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Every architecture, with the embedded model's tokenizer

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [4.0] * 8}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": False}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "mistral, sliding": ("Mistral", {"sliding_window": 16}),
    "phi-3, sliding": ("Phi3", {"original_max_position_embeddings": 512, "sliding_window": 16}),
    "phi-3, long": ("Phi3", {"original_max_position_embeddings": 128, "rope_parameters": LONG}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2, every other layer sliding": ("Gemma2", GEMMA),
    "gemma3, two of three layers sliding": (
        "Gemma3",
        GEMMA | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small_model(request, checkpoint, tmp_path_factory):
    """(transformers' model, its checkpoint)"""
    import torch
    import transformers

    from slm.models import checkpoints

    name, settings = ARCHITECTURES[request.param]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    ids = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = config_class(**(SHAPE | ids | {"max_position_embeddings": 512} | settings))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    folder = random_checkpoint(model, tmp_path_factory.mktemp("architectures") / name, 2, 2)
    transformers.AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(folder)
    return model, checkpoints.find(str(folder)).fetch()


def some_prompts() -> list[list[int]]:
    """Random token ids, of LENGTHS."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return [torch.randint(20, 49152, (length,), generator=generator).tolist() for length in LENGTHS]


def test_both_wrappers_give_the_greedy_tokens_of_transformers(small_model):
    from slm.models import onnx_export
    from slm.models.chat_model import ContinuousRuntime, OnnxRuntime, TransformersRuntime, onnx_runtime

    model, saved = small_model
    prompts = some_prompts()
    expected = [generated(model, prompt, 24) for prompt in prompts]
    assert min(len(set(tokens)) for tokens in expected) > 6  # else nothing is compared
    rooms = [24, 20, 12, 6]  # rows leave the batch one after another
    cut = [tokens[:room] for tokens, room in zip(expected, rooms, strict=True)]
    export = onnx_export.export(saved, "fp32", "cpu")
    places = onnx_runtime(export.folder, {})
    assert isinstance(places, ContinuousRuntime)
    for runtime in (TransformersRuntime(saved.folder, {}), OnnxRuntime(export.folder, {}), places):
        assert runtime.end_tokens == {2}
        assert runtime.context_length == 512
        assert [greedy(runtime, [prompt], [24])[0] for prompt in prompts] == expected
        assert greedy(runtime, prompts, rooms) == cut
        assert greedy(runtime, prompts, rooms, places=2) == cut


def test_both_wrappers_score_given_tokens_as_transformers_does(small_model):
    import types

    import numpy as np
    import torch

    from slm.models import onnx_export
    from slm.models.chat_model import SmallLanguageModel

    model, saved = small_model
    rows = [(prompt, given) for prompt, given in zip(some_prompts(), [*some_prompts()[1:], [7]], strict=True)]
    rows.append((rows[0][0], [8, 9]))  # begins like the first one
    artifacts = {"checkpoint": saved.folder, "onnx": onnx_export.export(saved, "fp32", "cpu").folder}
    for name, folder in artifacts.items():
        wrapper = SmallLanguageModel()
        wrapper.load_context(types.SimpleNamespace(artifacts={name: str(folder)}, model_config={"schema": "prompt"}))
        found = dict(wrapper.token_scores(rows))
        for place, (context, given) in enumerate(rows):
            with torch.inference_mode():
                logits = model(torch.tensor([context + given])).logits[0, len(context) - 1 : -1]
            theirs = torch.log_softmax(logits.float(), -1)[range(len(given)), given]
            np.testing.assert_allclose(found[place].log_probabilities, theirs, atol=2e-3, err_msg=f"{name}, {place}")


@pytest.mark.parametrize("small_model", ["phi-3, sliding", "qwen2"], indirect=True)
def test_a_large_models_int4_has_the_products_of_the_builders_own_and_nearer_weights(
    small_model, tmp_path, monkeypatch
):
    import numpy as np

    from slm.models import onnx_export, quantization
    from slm.models.onnx_graph import Graph

    _, saved = small_model
    monkeypatch.setattr(quantization, "LANE_BYTES", 0)
    monkeypatch.setattr(quantization, "balanced", lambda *_: quantization.Balance({}, {}, {}))  # else other weights
    without_feedback(monkeypatch)  # else other weights
    whole = onnx_export.export(saved, "fp32", "cpu").folder
    quantization.quantize(Graph(whole), tmp_path, "int4")
    theirs = onnx_export.export(saved, "int4", "cpu", onnx_export.OPTIONS | onnx_export.K_QUANT).folder
    products = {output: node.input[1] for output, node in Graph(whole).products.items()}
    fp32 = {output: Graph(whole).array(name).T for output, name in products.items()}
    facts, errors = [], []
    for graph in map(Graph, (tmp_path, theirs)):
        nodes = {node.output[0]: node for node in graph.model.graph.node if node.op_type == "MatMulNBits"}
        own = {output: {attribute.name: attribute.i for attribute in node.attribute} for output, node in nodes.items()}
        facts.append(own)
        found = {output: dequantized(*map(graph.array, node.input[1:]), own[output]) for output, node in nodes.items()}
        errors.append({output: float(np.square(found[output] - fp32[output]).sum()) for output in found})
    assert facts[0] == facts[1] and len(facts[0]) == 3 * 5 + 1
    assert {own["bits"] for own in facts[0].values()} == {4, 8}
    assert all(errors[0][output] < errors[1][output] for output in errors[0])


@pytest.mark.parametrize("small_model", ["phi-3, sliding", "gemma2, every other layer sliding"], indirect=True)
def test_activations_are_those_of_transformers_however_the_graph_is_cut(small_model, monkeypatch):
    import numpy as np
    import torch

    from slm.models import activations, onnx_export
    from slm.models.onnx_graph import Graph

    model, saved = small_model
    graph = Graph(onnx_export.export(saved, "fp32", "cpu").folder)
    seen = {}

    def watch(name: str):
        def hook(_, inputs) -> None:
            seen[name] = inputs[0].flatten(0, 1).numpy()

        return hook

    hooks = []
    for number, layer in enumerate(model.model.layers):
        for name, module in {"attn/o_proj": layer.self_attn.o_proj, "mlp/down_proj": layer.mlp.down_proj}.items():
            hooks.append(module.register_forward_pre_hook(watch(f"/model/layers.{number}/{name}/MatMul")))
    with torch.inference_mode():
        model(torch.from_numpy(activations._inputs(graph)["input_ids"]))
    for hook in hooks:
        hook.remove()
    for size in (activations.PART_BYTES, 200_000, 1):
        monkeypatch.setattr(activations, "PART_BYTES", size)
        found = activations.activations(graph, moments=True)
        assert found.keys() == {node.input[0] for node in graph.products.values()}
        by_name = {node.name: found[node.input[0]] for node in graph.products.values()}
        for name, rows in seen.items():
            peaks, moments = by_name[name]
            np.testing.assert_allclose(peaks, np.abs(rows).max(0), rtol=1e-3, atol=1e-4, err_msg=name)
            expected = rows.T @ rows / len(rows)
            assert moments.shape == (1, *expected.shape)  # one group
            np.testing.assert_allclose(moments[0], expected, rtol=1e-3, atol=1e-3 * expected.max(), err_msg=name)


@pytest.mark.parametrize("small_model", ["qwen2"], indirect=True)
def test_calibration_leaves_out_token_ids_beyond_the_models_vocabulary(small_model, tmp_path):
    import shutil

    from slm.models import activations, onnx_export
    from slm.models.onnx_graph import Graph

    _, saved = small_model
    folder = shutil.copytree(onnx_export.export(saved, "fp32", "cpu").folder, tmp_path / "fp32")
    file = folder / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    before = activations._inputs(Graph(folder))["input_ids"]
    for most in (int(before.max()), 1):  # the second leaves nothing of the text
        config["model"]["vocab_size"] = most
        file.write_text(json.dumps(config), encoding="utf-8")
        ids = activations._inputs(Graph(folder))["input_ids"]
        assert ids.shape[0] == len(activations.CONVERSATIONS) and ids.shape[1] >= 1
        assert 0 <= ids.min() <= ids.max() < most


def without_feedback(monkeypatch) -> None:
    from slm.models import quantization

    def plain(graph, moments):
        return {name: one._replace(moments=None) for name, one in original(graph, moments).items()}

    original = quantization.activations
    monkeypatch.setattr(quantization, "activations", plain)


def dequantized(integers, scales, zeros, facts):
    """The weights (N, K) of a MatMulNBits, as its documentation defines them."""
    import numpy as np

    def unpacked(array):
        return np.stack([array & 15, array >> 4], -1).reshape(*array.shape[:-1], -1) if facts["bits"] == 4 else array

    rows, count = facts["N"], -(-facts["K"] // facts["block_size"])
    integers = unpacked(integers).reshape(rows, count, -1).astype(np.float32)
    zeros = unpacked(zeros.reshape(rows, -1))[:, :count, None]
    return ((integers - zeros) * scales.reshape(rows, count, 1)).reshape(rows, -1)[:, : facts["K"]]


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.1), ("int4", 0.4)])
@pytest.mark.parametrize("small_model", ["phi-3, long", "qwen2", "gemma2, every other layer sliding"], indirect=True)
def test_integers_stay_close_to_fp32_and_no_row_depends_on_another(small_model, precision, most):
    import numpy as np

    from slm.models import onnx_export
    from slm.models.chat_model import onnx_runtime

    _, saved = small_model
    prompts = some_prompts()
    folders = [onnx_export.export(saved, name, "cpu").folder for name in ("fp32", precision)]
    whole, integer = (next_tokens(folder, prompts) for folder in folders)
    error = np.abs(whole - integer).mean() / whole.std()
    assert 0 < error < most
    runtime = onnx_runtime(folders[1], {})
    alone = [greedy(runtime, [prompt], [12])[0] for prompt in prompts]
    assert greedy(runtime, prompts, [12] * 4) == greedy(runtime, prompts, [12] * 4, places=2) == alone


@pytest.mark.parametrize("small_model", ["qwen2"], indirect=True)
def test_an_export_has_the_same_bytes_every_time(small_model, tmp_path):
    from slm.base import cache
    from slm.models import onnx_export

    code = (
        "import sys\nfrom pathlib import Path\nfrom slm.models import graph_building\n"
        "_, folder, *words = sys.argv\n"
        "for precision in ('int4', 'int8'): graph_building.main(precision, Path(folder, precision), words)"
    )
    made = {}
    for seed in "12":  # the order of sets of names
        for precision in ("int4", "int8"):
            (tmp_path / seed / precision).mkdir(parents=True)
        command = [sys.executable, "-c", code, str(tmp_path / seed), "-i", str(small_model[1].folder)]
        command += ["-c", str(tmp_path / "scratch"), "-p", "fp32", "-e", "cpu"]
        environment = os.environ | onnx_export.SETTINGS | {"PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        made[seed] = {folder.name: cache.manifest_of(folder) for folder in (tmp_path / seed).iterdir()}
    assert made["1"] == made["2"] and made["1"]["int4"] != made["1"]["int8"]
    for files in made["1"].values():
        assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= files.keys()


@pytest.mark.parametrize("small_model", ["qwen2"], indirect=True)
def test_weights_that_fill_no_whole_blocks_keep_eight_bits(small_model, tmp_path, monkeypatch):
    from slm.base import cache
    from slm.models import onnx_export, quantization, rounding
    from slm.models.onnx_graph import Graph

    source = onnx_export.export(small_model[1], "fp32", "cpu").folder
    made = {}
    for block in (32, 40):  # the model's 64 and 128 are no multiples of 40
        monkeypatch.setattr(rounding, "BLOCK", block)
        for precision in ("int4", "int8"):
            target = tmp_path / f"{precision}-{block}"
            target.mkdir()
            quantization.quantize(Graph(source), target, precision)
            made[precision, block] = cache.manifest_of(target)
    assert made["int4", 40] == made["int8", 40]
    assert made["int4", 32] != made["int8", 32]


@pytest.mark.parametrize("small_model", ["qwen2"], indirect=True)
def test_a_graph_with_logits_of_every_place_gives_the_same_tokens(small_model):
    """As most ready ONNX folders have, which were exported without prune_lm_head."""
    from slm.models import onnx_export
    from slm.models.chat_model import onnx_runtime

    model, saved = small_model
    prompts = some_prompts()
    runtime = onnx_runtime(onnx_export.export(saved, "fp32", "cpu", {}).folder, {})
    assert runtime._session.get_outputs()[0].shape[1] != 1
    expected = [generated(model, prompt, 12) for prompt in prompts]
    assert greedy(runtime, prompts, [12] * len(prompts), places=2) == expected


@without_gpu
@pytest.mark.parametrize("small_model", ["qwen2", "phi-3, sliding"], indirect=True)
def test_an_export_for_cuda_names_its_provider_and_gives_the_numbers_of_fp32_on_a_cpu(small_model):
    """As far as a graph for a GPU can be tested without one."""
    import numpy as np

    from slm.models import onnx_export
    from slm.models.chat_model import ContinuousRuntime, onnx_runtime

    _, source = small_model
    whole, half = (onnx_export.export(source, *names).folder for names in (("fp32", "cpu"), ("fp16", "cuda")))
    decoder = json.loads((half / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    assert [*decoder["session_options"]["provider_options"][0]] == ["cuda"]
    expected, found = (next_tokens(folder, some_prompts()) for folder in (whole, half))
    assert 0 < np.abs(expected - found).mean() / expected.std() < 0.01
    assert isinstance(onnx_runtime(half, {"execution_provider": "cpu"}), ContinuousRuntime)
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        onnx_runtime(half, {})


@pytest.mark.parametrize("described", [True, False])
def test_a_folder_with_caches_as_short_as_the_window_is_answered_row_by_row(
    checkpoint, tmp_path, monkeypatch, described
):
    """As the builder makes them when it is called by hand; without `layer_types` it forgets the window itself."""
    import torch
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    from slm.models import checkpoints, onnx_export
    from slm.models.chat_model import OnnxRuntime, onnx_runtime

    ids = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    limits = {"max_position_embeddings": 512, "original_max_position_embeddings": 512, "sliding_window": 16}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**SHAPE, **ids, **limits)).eval()
    folder = random_checkpoint(model, tmp_path / "model", 2, 2)
    AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(folder)
    if not described:
        monkeypatch.setattr(onnx_export, "_for_builder", lambda config: {})
        model.config.sliding_window = None
    options = onnx_export.OPTIONS | {"windowed_kv_cache": "true"}
    export = onnx_export.export(checkpoints.find(str(folder)).fetch(), "fp32", "cpu", options)
    runtime = onnx_runtime(export.folder, {})
    assert isinstance(runtime, OnnxRuntime) == described  # ContinuousRuntime doesn't know such caches
    prompt = torch.randint(20, 49152, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    assert runtime.alone_in_batch(prompt) == described
    reference = Phi3ForCausalLM.from_pretrained(folder, sliding_window=model.config.sliding_window)
    assert greedy(runtime, [prompt], [24]) == [generated(reference, prompt, 24)]


# ---------------------------------------------------------------------------------------------------------------------
# Phi-3


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as llama.cpp has it."""

    file: Path
    texts: list[str]
    ids: list[list[int]]  # of the texts, by llama.cpp


VOCABULARIES = ("phi-3", "llama-bpe", "qwen2")


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, Vocabulary]:
    from slm.base import cache

    files = {f"ggml-vocab-{name}.gguf{end}" for name in VOCABULARIES for end in ("", ".inp", ".out")}

    def build(target: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ARCHIVE.split("==")[0], "--dest", str(target), ARCHIVE]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        [archive] = target.glob("*.tar.gz")
        with tarfile.open(archive) as content:
            for member in content:
                if Path(member.name).name in files:
                    (target / Path(member.name).name).write_bytes(content.extractfile(member).read())
        archive.unlink()

    folder, _ = cache.folder("llama-cpp-vocabularies", {"archive": ARCHIVE, "names": " ".join(VOCABULARIES)}, build)
    found = {}
    for name in VOCABULARIES:
        file = folder / f"ggml-vocab-{name}.gguf"
        texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
        lines = Path(f"{file}.out").read_text(encoding="utf-8").splitlines()
        ids = [[int(word) for word in line.split()] for line in lines]
        found[name] = Vocabulary(file, texts[: len(ids)], ids)  # nothing follows the last separator
    return found


@pytest.fixture(scope="module")
def vocabulary(vocabularies) -> Vocabulary:
    return vocabularies["phi-3"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_gguf_files_tokenizer_gives_the_tokens_that_llama_cpp_records(vocabularies, tmp_path, name):
    from tokenizers import Tokenizer

    from slm.models import gguf

    found = vocabularies[name]
    gguf.save_tokenizer(found.file, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in found.texts] == found.ids
    assert len(found.ids) == 46


@pytest.fixture(scope="module")
def phi3(vocabulary, tmp_path_factory):
    """A small random Phi-3 with its real tokenizer, special tokens and chat template."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    from slm.models import checkpoints, gguf

    folder = tmp_path_factory.mktemp("phi-3") / "phi-3-small"
    gguf.save_tokenizer(vocabulary.file, folder)
    config = Phi3Config(**SHAPE, sliding_window=2047)  # the vocabulary, limits and special ids are Phi-3's by default
    torch.manual_seed(0)
    random_checkpoint(Phi3ForCausalLM(config).eval(), folder, [32000, 32001, 32007], 32000)
    return checkpoints.find(str(folder)).fetch()


@pytest.fixture(scope="module")
def phi3_export(phi3):
    from slm.models import onnx_export

    return onnx_export.export(phi3, "fp32", "cpu")


@pytest.fixture(scope="module")
def models(phi3, phi3_export, tmp_path_factory):
    """The wrappers of the small Phi-3 as logged, loaded through pyfunc."""
    import mlflow

    from slm.models import model_logging

    folder = tmp_path_factory.mktemp("store")
    mlflow.set_tracking_uri(sqlite_store(folder))
    experiment = mlflow.create_experiment("phi-3", artifact_location=str(folder / "artifacts"))
    with mlflow.start_run(experiment_id=experiment):
        logged = {
            "pipeline": model_logging.log_pipeline(phi3, GENERATION),
            "onnx chat": model_logging.log_onnx(phi3_export, "chat", GENERATION, "fp32"),
            "onnx prompt": model_logging.log_onnx(phi3_export, "prompt", GENERATION, "fp32"),
        }
    yield {name: mlflow.pyfunc.load_model(info.model_uri) for name, info in logged.items()}
    mlflow.set_tracking_uri(None)


JOKE = "<|system|>You are a stand-up comedian.<|end|>\n<|user|>\nTell me a joke about atom<|end|>\n<|assistant|>"
CONVERSATIONS = [
    [{"role": "user", "content": "Tell me a joke about atom"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! Größe? 日本 🎉"},
        {"role": "user", "content": "  And   then?\n\nGo on, in a longer sentence than the one before."},
    ],
    [{"role": "user", "content": "1"}],
]


def text(completion: dict) -> str:
    return completion["choices"][0]["message"]["content"]


def test_phi3_special_tokens_take_the_line_break_after_them_along(phi3):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(phi3.folder / "tokenizer.json"))
    encoded = tokenizer.encode(JOKE, add_special_tokens=False)
    words = [tokenizer.encode(text, add_special_tokens=False).ids for text in re.split(r"<\|\w+\|>\s*", JOKE) if text]
    assert encoded.ids == [32006, *words[0], 32007, 32010, *words[1], 32007, 32001]


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [
        (JOKE, [32006]),
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", [32010]),
        ("<s><|user|>\nHi<|end|>\n<|assistant|>\n", [1, 32010]),
        ("Tell me a joke about atom", [1, 24948]),
    ],
)
def test_a_phi3_prompt_passes_through_untouched_and_gets_no_second_bos(models, phi3, prompt, begin):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(phi3.folder)
    wrapper = models["onnx prompt"].unwrap_python_model()
    seen = []
    steps = wrapper._runtime.steps
    wrapper._runtime.steps = lambda rows, places, take: (
        seen.extend(row.prompt for row in rows) or steps(rows, places, take)
    )
    try:
        [(_, [answer])] = wrapper.answers([{"prompt": prompt, "max_tokens": 3}])
    finally:
        del wrapper._runtime.steps
    assert seen == [tokenizer(prompt, add_special_tokens=not prompt.startswith("<"))["input_ids"]]
    assert seen[0][: len(begin)] == begin
    assert seen[0].count(1) == begin.count(1)
    assert answer.prompt_tokens == len(seen[0])


@pytest.mark.parametrize("name", ["pipeline", "onnx chat"])
def test_phi3_conversations_are_rendered_as_transformers_renders_them(models, phi3, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(phi3.folder)
    answers = models[name].predict([{"messages": messages} for messages in CONVERSATIONS])
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        rendered = models[name].unwrap_python_model().render(messages)
        assert rendered == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert ids.count(1) == 1


def test_both_phi3_wrappers_give_the_same_text_batched_and_one_by_one(models):
    rows = [{"messages": messages, "max_tokens": 24 - 6 * at} for at, messages in enumerate(CONVERSATIONS)]
    whole = models["pipeline"].predict(rows)
    assert len({text(answer) for answer in whole}) == len(rows)
    others = [
        models["onnx chat"].predict(rows),
        *([model.predict([row])[0] for row in rows] for model in (models["pipeline"], models["onnx chat"])),
    ]
    for answers in others:
        assert list(map(text, answers)) == list(map(text, whole))
        assert [answer["usage"] for answer in answers] == [answer["usage"] for answer in whole]
    render = models["onnx prompt"].unwrap_python_model().render
    for row, answer in zip(rows, whole, strict=True):
        prompt = {"prompt": render(row["messages"])}
        assert models["onnx prompt"].predict(prompt, params={"max_tokens": row["max_tokens"]}) == [text(answer)]


@pytest.mark.parametrize("name", ["pipeline", "onnx chat"])
def test_each_of_phi3s_end_tokens_ends_an_answer_and_is_counted_but_not_shown(models, name):
    wrapper = models[name].unwrap_python_model()
    assert wrapper._runtime.end_tokens == {32000, 32001, 32007}
    assert wrapper._runtime.context_length == 4096
    steps = wrapper._runtime.steps
    for end in sorted(wrapper._runtime.end_tokens):
        wrapper._runtime.steps = lambda rows, places, take, end=end: iter([{0: 1128}, {0: end}, {0: 1128}])
        try:
            [(_, [answer])] = wrapper.answers([{"messages": CONVERSATIONS[0]}])
        finally:
            wrapper._runtime.steps = steps
        assert (answer.text, answer.finish_reason, answer.output_tokens) == ("How", "stop", 2)


def test_a_phi3_prompt_longer_than_its_window_is_answered_alike(models):
    rows = [{"messages": [{"role": "user", "content": "atom joke " * count}], "max_tokens": 4} for count in (1300, 3)]
    ours, theirs = models["pipeline"].predict(rows), models["onnx chat"].predict(rows)
    assert ours[0]["usage"]["prompt_tokens"] > 2047
    assert list(map(text, ours)) == list(map(text, theirs))


@pytest.fixture
def two_rows(tmp_path) -> Path:
    path = tmp_path / "two.jsonl"
    rows = [
        {"id": "joke", "prompt": JOKE, "expected": "atom", "scorers": ["contains"]},
        {"id": "hi", "messages": [{"role": "user", "content": "Hi"}], "expected": "Hello", "scorers": ["contains"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def samples(tracking) -> list[dict]:
    """What the one scored run of the default experiment left."""
    runs = tracking.MlflowClient().search_runs(["0"])
    [scored] = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    path = tracking.artifacts.download_artifacts(run_id=scored.info.run_id, artifact_path="evaluation/samples.jsonl")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "place"), [("pipeline", "checkpoint"), ("onnx", "folder"), ("onnx", "parent and subfolder")]
)
def test_the_readme_s_phi3_commands_run_on_local_folders(tracking, two_rows, phi3, phi3_export, name, place, tmp_path):
    where = {
        "checkpoint": [f"--model={phi3.folder}"],
        "folder": [f"--model={phi3_export.folder}"],
        "parent and subfolder": [
            f"--model={phi3_export.folder.parent}",
            f"--subfolder={phi3_export.folder.name}",
        ],
    }[place]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = entry_point(name, *where, f"--prompts={two_rows}", "--max_tokens=4", MLFLOW_TRACKING_URI=uri)
    assert done.code == 0, done.err
    answered = samples(tracking)
    assert {answer["id"] for answer in answered} == {"joke", "hi"}
    assert all(answer["error"] is None and answer["output_tokens"] <= 4 for answer in answered)


def test_a_phi3_gguf_file_keeps_its_window_and_ends_its_turns(vocabulary, tmp_path):
    """A small random Phi-3 in llama.cpp's format, with the real vocabulary."""
    import gguf
    import numpy as np

    from slm.models import checkpoints

    source = gguf.GGUFReader(vocabulary.file)
    file = tmp_path / "phi-3-small.gguf"
    writer = gguf.GGUFWriter(file, "phi3")
    sizes = {
        "context_length": 4096,
        "rope.scaling.original_context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "block_count": 1,
        "attention.head_count": 4,
        "attention.head_count_kv": 4,
        "rope.dimension_count": 16,
        "attention.sliding_window": 2047,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"phi3.{key}", value)
    writer.add_float32("phi3.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("phi3.rope.freq_base", 1e4)
    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (32064, 64),
        "output_norm": (64,),
        "output": (32064, 64),
        "blk.0.attn_norm": (64,),
        "blk.0.attn_qkv": (192, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_norm": (64,),
        "blk.0.ffn_up": (256, 64),
        "blk.0.ffn_down": (64, 128),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    converted = checkpoints.find(str(file)).fetch().folder
    config = json.loads((converted / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("phi3", 2047)
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == [32000, 32007]
    added = json.loads((converted / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert {token["content"] for token in added if not token["rstrip"]} == {"<unk>", "<s>", "<|endoftext|>"}
