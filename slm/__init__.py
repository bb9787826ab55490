"""The package of the entry points: a folder for each question ("room"), which imports only the rooms below it.

From the top: evaluation, report, engines, verdict, scorers, serving, tracking, answers, models, prompts, base.
"""
