"""What do the numbers say? Estimates, differences, the gate, and what two runs have in common. Everything here is pure:
no file, no clock, no MLflow.

This room imports `scorers` and the rooms below.
Start with `gate.py` and `statistics.py`.
"""
