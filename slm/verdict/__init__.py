"""What do the numbers say? Estimates, differences, the gate, and the changes between two runs.

The functions here are pure: they use no files, no clock and no MLflow.
This room imports `scorers` and the rooms below.
Start with `gate.py` and `statistics.py`.
"""
