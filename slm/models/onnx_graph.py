"""An ONNX graph as quantization reads it, and the nodes and tensors that quantization writes."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slm.models import rounding

ALIGNED = 64  # bytes


class Graph:
    """The graph of an ONNX GenAI folder: its nodes by output and by input, and its tensors.

    The tensors are mapped from the folder's file. With `model` and `arrays`, the folder holds no graph: `model` is the
    graph (onnx.ModelProto) without the content of its large tensors, and `arrays` gives a tensor's content by its name.
    """

    def __init__(self, folder: Path, model=None, arrays: Callable[[str], np.ndarray] | None = None):
        import onnx

        self.folder = folder
        self.facts = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self.file = folder / self.facts["filename"]
        self.model = model or onnx.load(self.file, load_external_data=False)
        self._arrays = arrays or self._mapped
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.producers: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.model.graph.node:
            self.producers |= dict.fromkeys(filter(None, node.output), node)
            for name in node.input:
                self.consumers[name].append(node)
        # by output: y (…, N) = x (…, K) times constant weights (K, N)
        self.products = {
            node.output[0]: node
            for node in self.model.graph.node
            if node.op_type == "MatMul" and len(getattr(self.tensors.get(node.input[1]), "dims", ())) == 2
        }

    def array(self, name: str) -> np.ndarray:
        """A tensor's content. A large tensor may be computed at every call."""
        import onnx

        tensor = self.tensors[name]
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        return self._arrays(name) if external else onnx.numpy_helper.to_array(tensor)

    def _mapped(self, name: str) -> np.ndarray:
        import onnx

        tensor = self.tensors[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        return np.memmap(self.folder / place["location"], dtype, "r", int(place.get("offset", 0)), shape)

    def before_pruning(self, name: str) -> str:
        """The norm's output from which the head takes the last position, if `name` is the head's input; else `name`."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Gather", "Unsqueeze") and len(self.consumers[name]) == 1:
            name = node.input[0]
            node = self.producers.get(name)
        return name

    def embedding(self, node) -> tuple[str, bool] | None:
        """The table (vocabulary, channels) that a Gather reads by token id: its name, and whether it is transposed.

        Gives None for other nodes, and for tables whose number of channels is not a multiple of BLOCK.
        """
        if node.op_type != "Gather" or node.input[1] != "input_ids":
            return None
        made = self.producers.get(node.input[0])
        tied = made is not None and made.op_type == "Transpose"  # of the head's weights
        name = made.input[0] if made is not None and tied else node.input[0]
        dims = getattr(self.tensors.get(name), "dims", ())
        return (name, tied) if len(dims) == 2 and dims[0 if tied else 1] % rounding.BLOCK == 0 else None

    def table(self, name: str, transposed: bool) -> np.ndarray:
        """The rows (vocabulary, channels) of a table that `embedding` found."""
        return self.array(name).T if transposed else self.array(name)


class Writer:
    """Collects the nodes and tensors of a quantized graph. Large tensors are written to their file at once."""

    def __init__(self, data, location: str):
        self._data, self._location = data, location
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def tensor(self, name: str, array: np.ndarray | np.generic) -> str:
        from onnx import TensorProto, helper, numpy_helper

        if array.size < 256:
            self.tensors[name] = numpy_helper.from_array(np.asarray(array), name)
            return name
        self._data.write(bytes(-self._data.tell() % ALIGNED))
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._data.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(np.ascontiguousarray(array))
        self.tensors[name] = tensor
        return name

    def fours(self, name: str, array: np.ndarray) -> str:
        """Writes a tensor of integers from -8 to 7, two in a byte."""
        from onnx import TensorProto

        self.tensor(name, rounding.pairs(array.reshape(-1).view(np.uint8) & 15))
        self.tensors[name].data_type, self.tensors[name].dims[:] = TensorProto.INT4, array.shape
        return name

    def node(self, operator: str, inputs: list[str], output: str, **words) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **words))
        return output

    def gather(self, inputs: list[str], output: str, block_size: int, factor: np.ndarray | None) -> None:
        """Adds a node that reads rows of an 8-bit table. If the table's columns have a factor (K,), a Div follows.

        Inputs: table (N, K), token ids, scales (N, blocks) and, if any, zero points.
        """
        words = {"bits": 8, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1, "domain": "com.microsoft"}
        found = output if factor is None else f"{output}/balanced"
        self.node("GatherBlockQuantized", inputs, found, **words)
        if factor is not None:
            self.node("Div", [found, self.tensor(f"{inputs[0]}_factor", factor)], output)

    def blocks(self, name: str, rows: Callable[[], np.ndarray], bits: int, *facts: np.ndarray | None) -> list[str]:
        """The names of a product's weights in blocks, their scales and their zero points. Each is written only once.

        `facts` are the other arguments of `rounding.blocks`.
        """
        names = [f"{name}_{part}" for part in (f"Q{bits}", "scales", "zeros")]
        if names[0] not in self.tensors:
            for part, array in zip(names, rounding.blocks(rows(), bits, *facts), strict=True):
                self.tensor(part, array)
        return names
