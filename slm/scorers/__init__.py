"""How is an answer scored? Built-in scorers, users' own scorers and judges.

This room imports `serving`, because a logged judge is served. This room also imports the rooms below.
Start with `scorer_calls.py`. Add a new built-in scorer to `built_in.py`.
"""
