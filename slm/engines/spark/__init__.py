"""Answers prompts on Apache Spark. Start with `scoring.py`."""
