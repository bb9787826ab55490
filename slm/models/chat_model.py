"""The logged wrapper: answers chat or plain prompts with transformers, onnxruntime or onnxruntime-genai.

MLflow copies this file into the logged model, and runs the copy at load (models from code, no pickle). This project
copies the folder chat_parts beside it. So neither imports any other file of this project. Each runtime's libraries are
imported only where they are used. An ONNX GenAI folder needs neither torch nor transformers. On the CPU, most folders
need only onnxruntime (ContinuousRuntime).
All runtimes share the code that renders, tokenizes, samples, finds stop strings and builds answers.
In fp32, all runtimes give the same greedy text.

The table in chat_parts/fields.py says what happens to each field of a request.

Not covered: images and beam search. A request for images is refused, and so are tools that a template ignores.

Hugging Face's `tokenizers` reads the checkpoint's own tokenizer.json. The encoder of onnxruntime-genai is not used,
because it cuts a text at its first NUL.
"""

from pathlib import Path
from typing import Any

from mlflow.models import set_model

__path__: list[str]
if not __package__:
    # MLflow runs each logged copy as a module with a name of its own, in no package. The copy becomes a package of that
    # name. So two versions of the parts can be loaded in one process.
    __path__ = [str(Path(__file__).parent)]
    specification: Any = __spec__
    specification.submodule_search_locations = __path__
    __package__ = __name__

from .chat_parts.confined import CallFailed, Confined
from .chat_parts.continuous_runtime import KEEP, LANE_BYTES, ContinuousRuntime
from .chat_parts.fields import DEFAULTS, FIELDS, Field, Request, checked
from .chat_parts.genai_runtime import ONNX_RUNTIMES, OnnxRuntime, onnx_runtime
from .chat_parts.generation import Generation
from .chat_parts.model import SmallLanguageModel, usage
from .chat_parts.rows import GREEDY, Answer, Refused, Row, Sampling, SeeDistributions, TokenLogProbability, TokenScores
from .chat_parts.runtime import EXACT_INTEGERS, Runtime, exact_integers, integers_saturate, physical_cores
from .chat_parts.sampling import next_token, sample, sampling_of
from .chat_parts.templates import messages_of, read_chat_template, render
from .chat_parts.transformers_runtime import DTYPES, TransformersRuntime

VERSION = "0.2.0"  # of this file and its parts. The repository's own copy runs a logged model of the same version

__all__ = [
    "DEFAULTS",
    "DTYPES",
    "EXACT_INTEGERS",
    "FIELDS",
    "GREEDY",
    "KEEP",
    "LANE_BYTES",
    "ONNX_RUNTIMES",
    "VERSION",
    "Answer",
    "CallFailed",
    "Confined",
    "ContinuousRuntime",
    "Field",
    "Generation",
    "OnnxRuntime",
    "Refused",
    "Request",
    "Row",
    "Runtime",
    "Sampling",
    "SeeDistributions",
    "SmallLanguageModel",
    "TokenLogProbability",
    "TokenScores",
    "TransformersRuntime",
    "checked",
    "exact_integers",
    "integers_saturate",
    "messages_of",
    "next_token",
    "onnx_runtime",
    "physical_cores",
    "read_chat_template",
    "render",
    "sample",
    "sampling_of",
    "usage",
]

set_model(SmallLanguageModel())
