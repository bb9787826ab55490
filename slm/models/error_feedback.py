"""Rounds weights one input column after another, and moves each column's error to the columns that are still real.

This is GPTQ (arXiv:2210.17323). The products of a calibration text's inputs say how columns stand in for each other.
GPTQ takes all columns of a product together. Here, a group has at most GROUP columns, and groups are independent. So a
text of a thousand tokens determines the products, a model's products fit in memory, and all groups are rounded at once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK = 32
GROUP = 128  # columns, at most; memory and time grow with it
DAMPING = 0.3  # of the mean square, added to each square: a short text says too little about other texts

# Takes a block's real weights (BLOCK, lanes) and the importance of each. Moves the weights, in place, by what is no
# multiple of a step. Gives the steps, and the smallest and the largest integer: (lanes,) each.
Fit = Callable[[Any, Any], tuple[Any, Any, Any]]


def second_moments(rows: np.ndarray) -> np.ndarray:
    """The mean products of the inputs (tokens, K) within each group of columns: float32 (groups, columns, columns).

    Columns beyond K are zero. The number of columns is a multiple of BLOCK, the same in each group.
    """
    import torch

    count = -(-rows.shape[1] // BLOCK)
    groups = -(-count * BLOCK // GROUP)
    size = -(-count // groups) * BLOCK
    padded = np.pad(rows, ((0, 0), (0, groups * size - rows.shape[1])))
    parts = torch.from_numpy(padded).reshape(len(rows), groups, size).transpose(0, 1)
    found = torch.bmm(parts.transpose(1, 2), parts) / len(rows)
    found[~found.isfinite().all(2).all(1)] = 0
    return found.numpy()


class Feedback:
    """What the errors of columns cost, and what other columns can do about it.

    `moments` are those of `second_moments`. `inputs` (K,) divides a product's inputs, if given.
    """

    def __init__(self, moments: np.ndarray, inputs: np.ndarray | None):
        import torch

        groups, size, _ = moments.shape
        given = torch.from_numpy(moments)
        if inputs is not None:
            factors = torch.from_numpy(np.pad(inputs, (0, groups * size - len(inputs)), constant_values=1))
            given = given / (factors.reshape(groups, size, 1) * factors.reshape(groups, 1, size))
        mean = given.diagonal(dim1=1, dim2=2).mean(1)
        given = given * mean.reciprocal().nan_to_num_(0, 0, 0)[:, None, None]  # a group without activations: zeros
        lower = torch.linalg.cholesky(given + DAMPING * torch.eye(size))
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        own = upper.diagonal(dim1=1, dim2=2)
        self.groups, self.size = groups, size
        self._shares = (upper / own[..., None]).contiguous()  # of column i's error that column j takes: (groups, i, j)
        self._by_column = self._shares.permute(1, 2, 0).contiguous()[..., None]
        self._importance = own.square().reciprocal().t().contiguous()  # of an error that later columns reduce

    def rounded(self, values: np.ndarray, fit: Fit) -> np.ndarray:
        """Weights (N, K) as integers: int8 (N, groups * size). `fit` is called for the blocks of each place in a group.

        The lanes of `fit` are groups times N.
        """
        import torch

        count, groups, size = len(values), self.groups, self.size
        padded = np.pad(values, ((0, 0), (0, groups * size - values.shape[1])))
        left = torch.from_numpy(padded).reshape(count, groups, size).permute(2, 1, 0).contiguous()
        errors, integers = torch.empty(BLOCK, groups, count), torch.empty(groups, count)
        for begin in range(0, size, BLOCK):
            end = begin + BLOCK
            block = left[begin:end]
            importance = self._importance[begin:end]
            importance = (importance / importance.mean(0))[..., None].expand(BLOCK, groups, count)
            found = fit(block.view(BLOCK, -1), importance.reshape(BLOCK, -1))
            step, first, last = (array.reshape(groups, count) for array in found)
            per_step = step.reciprocal().nan_to_num_(0, 0, 0)
            for at, column in enumerate(block):
                torch.mul(column, per_step, out=integers).round_()
                torch.clamp(integers, first, last, out=integers)
                error = torch.addcmul(column, integers, step, value=-1, out=errors[at])
                column.copy_(integers)
                block[at + 1 :].addcmul_(self._by_column[begin + at, begin + at + 1 : end], error, value=-1)
            if end < size:
                shares = self._shares[:, begin:end, end:].transpose(1, 2)
                left[end:] -= torch.bmm(shares, errors.transpose(0, 1)).transpose(0, 1)
        return left.to(torch.int8).permute(2, 1, 0).reshape(count, groups * size).numpy()

    def of_blocks(self, arrays: tuple) -> np.ndarray:
        """What `fit` found at each call, an array (lanes,), as an array (N, blocks)."""
        import torch

        found = torch.stack(arrays).reshape(len(arrays), self.groups, -1)
        return found.permute(2, 1, 0).reshape(found.shape[2], -1).numpy()
