"""What is read from and written to MLflow? The life of a run, datasets, metrics, tags, registered versions, aliases.

This room imports `answers` and the rooms below.
Start with `lifecycle.py`; aliases move in `registry.py`.
"""
