"""Makes an ONNX GenAI folder from a checkpoint, in a process of its own that ends with the process that started it.

    python -m slm.models.graph_building int4|int8|as-built EMPTY_FOLDER BUILDER_ARGUMENTS...

as-built: onnxruntime-genai's model builder makes the folder. int4 and int8: this project quantizes, straight from the
checkpoint.

The builder (0.18) makes the graph. Its tensors are lazy: each one names checkpoint tensors that
transformers maps from the safetensors files. The builder would now write the whole graph in fp32. Instead, this process
keeps the graph. slm/models/quantization.py then reads, quantizes and writes one tensor at a time. So no fp32 model is
on the disk or in memory. The process gives the pages of tensors that were read back to the system.

Each line on stdout that begins with SHARE holds the share of the weights that are written.
"""

import ctypes
import math
import mmap
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slm.models import quantization
from slm.models.onnx_graph import Graph

BUILDER = "onnxruntime_genai.models.builder"
AS_BUILT = "as-built"
SHARE = "written: "
SMALL = 256  # elements; smaller tensors are kept in the graph
PAGES_BYTES = 2**28  # that are read before pages are given back
SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h
MAPS = Path("/proc/self/maps")


def main(precision: str, target: Path, arguments: list[str]) -> None:
    """Builds the graph with the builder's `arguments`, and writes it into the empty folder `target`."""
    if precision == AS_BUILT:
        _run_builder([*arguments, "-o", str(target)])
        return
    source = Path(arguments[arguments.index("-i") + 1])
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        model = _built([*arguments, "-o", scratch])
        large = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if math.prod(value.const_value.shape.numpy()) >= SMALL
        }

        unreturned = 0

        def content(name: str) -> np.ndarray:
            nonlocal unreturned
            array = large[name].numpy()
            unreturned += array.nbytes
            if unreturned > PAGES_BYTES:
                _give_back_pages(source)
                unreturned = 0
            return array

        graph = Graph(Path(scratch), _without_content(model, large), content)
        quantization.quantize(graph, target, precision, lambda share: print(f"{SHARE}{share:.4f}", flush=True))


def _built(arguments: list[str]) -> Any:
    """Runs the builder. Gives the graph that the builder would save, as onnx_ir.Model."""
    import onnx_ir
    import onnxruntime_genai.models  # noqa: F401  makes the builder's own package `builders` importable
    import torch
    from builders.base import Model

    kept: list[Any] = []
    Model.make_packed_matmul_float_class = lambda _, *products, **__: Packed([product.weight for product in products])
    onnx_ir.save = lambda model, *_, **__: kept.append(model)
    # the builder makes linear layers to hold views of packed weights; their own random weights are not used
    torch.nn.Linear.reset_parameters = lambda _: None
    _run_builder(arguments)
    return kept[0]


def _run_builder(arguments: list[str]) -> None:
    sys.argv = [BUILDER, *arguments]
    runpy.run_module(BUILDER, run_name="__main__")


def _end_with_parent() -> None:
    """Makes the system kill this process if its parent is killed (prctl(2)). Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


class Packed:
    """Weights (N, K) of several products, one below the other. They are joined where torch reads them, and not before.

    The builder would copy the weights of all layers at once. It reads `weight`, the transpose and the shape, and then
    calls torch.as_tensor.
    """

    def __init__(self, weights: list[Any], transposed: bool = False):
        self.weights, self.transposed = weights, transposed

    @property
    def weight(self) -> "Packed":
        return self

    @property
    def T(self) -> "Packed":
        return Packed(self.weights, not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def __dlpack__(self, **words):
        import torch

        joined = torch.cat([weight.detach() for weight in self.weights])
        return (joined.T if self.transposed else joined).__dlpack__(**words)

    def __dlpack_device__(self):
        return self.weights[0].detach().__dlpack_device__()


def _without_content(model: Any, large: dict[str, Any]) -> Any:
    """The graph as onnx.ModelProto. The tensors `large` name a file that does not exist."""
    import onnx_ir

    for name, tensor in large.items():
        external = onnx_ir.ExternalTensor("none", 0, 0, tensor.dtype, shape=tensor.shape, name=name)
        model.graph.initializers[name].const_value = external
    return onnx_ir.to_proto(model)


def _give_back_pages(source: Path) -> None:
    """Takes the mapped pages of the checkpoint out of this process. They are read again where they are needed."""
    if not MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    files = tuple(f" {path.resolve()}" for path in source.glob("*.safetensors"))  # a hub's cache has links
    for line in MAPS.read_text(encoding="utf-8").splitlines():
        if files and line.endswith(files):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


if __name__ == "__main__":
    _end_with_parent()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
