"""How does a checkpoint become a logged model? Sources and checks of weights, export to ONNX and quantization.

The wrapper that MLflow logs (`chat_model.py` and its parts in `chat_parts/`) is here too, and so is the manifest of a
model's files.
This room imports `base` only.
Start with `checkpoints.py`, then read `model_logging.py`.
"""
