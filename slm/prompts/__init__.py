"""What is a prompt set? Rows, the single check of rows, the file formats, and the hash of a prompt set.

This room imports only `base`.
Start with `prompt_rows.py`. A new file format goes into `readers.py`. `row_mapping.py` maps the columns of other
people's files, `other_shapes.py` names the shape of a row that is not ours, and `variants.py` finds related rows.
"""
