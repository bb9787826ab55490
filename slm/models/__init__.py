"""How does a checkpoint become a logged model? Sources and checks of weights, export to ONNX and quantization.

The wrapper that MLflow logs (`chat_model.py`) and the manifest of a model's files are here too.
This room imports `base` only.
Start with `checkpoints.py`, then read `model_logging.py`.
"""
