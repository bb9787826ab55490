"""How is an answer scored? Built-in scorers, users' own scorers and judges.

This room imports `serving` (a logged judge is served) and the rooms below.
Start with `scorer_calls.py`; a new built-in scorer goes into `built_in.py`.
"""
