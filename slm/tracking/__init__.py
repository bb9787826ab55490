"""What does this project read from MLflow and write to it? Runs, datasets, metrics, tags, versions, aliases.

This room imports `answers` and the rooms below.
Start with `lifecycle.py`. `registry.py` reads and writes versions and aliases; `slm/evaluation/promotion.py` decides
when an alias moves.
"""
