"""What does every room use? Errors, the console, credentials, the cache, the environment, parameters, strict parsers.

This room imports no other room.
Start with `errors.py` and `parameters.py`.
"""
