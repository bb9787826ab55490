"""Answers lm-evaluation-harness's tasks in this process. Start with `engine.py`."""
