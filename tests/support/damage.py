"""A model in memory that goes wrong while it answers."""

from contextlib import contextmanager


@contextmanager
def not_a_number(model):
    """Puts a NaN into the last norm of an OwnModel of torch's, and takes it out again: every logit is NaN meanwhile."""
    import torch

    weight = model.wrapper._runtime._model.model.norm.weight
    before = weight[0].item()
    with torch.no_grad():
        weight[0] = float("nan")
    try:
        yield
    finally:
        with torch.no_grad():
            weight[0] = before
