"""How is any logged model or endpoint asked? Forms of input, endpoints, loading, and answers kept on disk.

This room imports `models` and the rooms below.
Start with `loading.py`.
"""
