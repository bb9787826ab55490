"""How is any logged model or endpoint asked? Questions, input forms, endpoints, loading, and answers kept on disk.

This room imports `models` and the rooms below.
Start with `asking.py`, then read `loading.py`.
"""
