"""Model files of a few bytes, real enough to be read: for tests of what is found, fetched and refused."""

from pathlib import Path


def safetensors() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"weight": np.arange(6, dtype=np.float32)})


def onnx_graph(location: str = "model.onnx.data", length: int = 24) -> bytes:
    """A graph of one weight, whose data is `length` bytes of another file."""
    import onnx

    weight = onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[6])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [6])
    node = onnx.helper.make_node("Identity", ["weight"], ["y"])
    return onnx.helper.make_model(onnx.helper.make_graph([node], "tiny", [], [y], [weight])).SerializeToString()


def gguf(path: Path, architecture: str) -> Path:
    """A whole GGUF file with one small tensor, of whatever architecture."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
