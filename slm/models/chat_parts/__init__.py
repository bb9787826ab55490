"""The parts of the logged wrapper. MLflow copies chat_model.py; this project copies this folder beside it.

A part imports only the other parts, by relative imports, and libraries. A logged copy needs no other file of this
project. All parts are imported when chat_model.py is imported, because a logged model's folder may be removed later.
"""
