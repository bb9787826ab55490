"""How does a logged model answer OpenAI's API? Protocol, connections, batches, versions, traces, the HTTP app.

This room imports `tracking` and the rooms below.
Start with `http_app.py`.
"""
