"""How does a logged model answer OpenAI's API? Protocol, connections, fair batches, the HTTP application.

This room imports `tracking` and the rooms below.
Start with `http_app.py`.
"""
