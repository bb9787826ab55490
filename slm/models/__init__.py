"""How does a checkpoint become a logged model? Sources and vetting of weights, export to ONNX, quantization, the
wrapper that MLflow logs, and the manifest of its files.

This room imports `base` and `prompts`.
Start with `checkpoints.py`, then `model_logging.py`; the logged wrapper is `chat_model.py`.
"""
