"""What happens in an evaluation, in order? Reading the request, scoring, comparing, the gate, the alias, schedules.

This room imports every other room.
Start with `entrypoints/evaluate.py`, then `scoring.py` and `conclusion.py`; an alias moves in `promotion.py`.
"""
