"""How is a result shown? Console table, Markdown, JUnit, report.html, plots, and MLflow's evaluation view.

This room imports `engines` and the rooms below.
Start with `summary.py`.
"""
