"""How does a logged model or an endpoint answer prompts? Input forms, endpoints, loading, and answers kept on disk.

This room imports `models` and the rooms below.
Start with `loading.py`.
"""
