"""Where are prompts answered? In this process (`local.py`), or on a cluster (`spark/`).

This room imports `verdict` and the rooms below.
Start with `engine.py`, the functions that each engine has, then `local.py`.
"""
