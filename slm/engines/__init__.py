"""Where are prompts answered? In this process (`local.py`), or on a cluster (`spark/`).

This room imports `verdict` and the rooms below.
Start with `local.py`.
"""
