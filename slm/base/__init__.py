"""What does every room use? Errors, the console, credentials, the cache, the environment, parameters, strict parsers.

No other room may be imported here.
Start with `errors.py` and `parameters.py`.
"""
