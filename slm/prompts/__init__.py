"""What is a prompt set? Rows, the one validator of rows, the file formats and the hash of a set.

This room imports `base` only.
Start with `prompt_rows.py`; a new file format goes into `readers.py`.
"""
