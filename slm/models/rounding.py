"""Rounds weights to integers of 4 or 8 bits. Weights are numpy arrays of shape (N, K): one row for each output channel.

The searches run in torch, on all cores, over parts that fit in a core's cache. Two kinds of CPU add numbers in another
order. If two candidates have nearly the same error, each CPU may take another one. So an export's bytes may differ
between two kinds of CPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from slm.models.chat_parts.runtime import physical_cores
from slm.models.error_feedback import BLOCK, Feedback

SMALLEST = 1e-5  # of a channel's largest value
PAIR = 128  # the largest sum of two neighbours of one sign: 255 * 128 < 2**15
SLICE = 2**18  # weights that are rounded at once: they fit in a core's cache
LANES = 2**20  # weights that are rounded at once with feedback: enough for each of its small steps
FEWER = (-2.0, -1.0, 0.0)  # the same with feedback, where more of them gain nothing measurable
WIDER = {4: (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5), 8: (0.0,)}  # steps that are tried, by bits; see `blocks`


def blocks(
    rows: np.ndarray,
    bits: int,
    inputs: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
    moments: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, K), multiplied by `inputs` (K,) and divided by `outputs` (N,), as blocks along K.

    A weight is scale * (integer - zero point), as in MatMulNBits.

    Gives uint8 (N, blocks, BLOCK * bits / 8), with the lower half of a byte first; float32 scales (N, blocks); and zero
    points (N, blocks). With 4 bits, two zero points share a byte: (N, blocks / 2 rounded up).

    The squared error of a block counts large weights more, as k-quant in llama.cpp and onnxruntime does. k-quant
    searches a real minimum, and rounds it to a zero point afterwards. Here, each candidate has a whole zero point, and
    the scale with the least error follows from the integers. A candidate divides the block's range into
    2**bits - 1 + WIDER steps. A negative WIDER clips the block's outermost weights.

    With `moments`, of the product's inputs before they are divided by `inputs`, columns take each other's errors
    (slm/models/error_feedback.py). An error then counts as much as later columns leave of it.
    """
    count = -(-rows.shape[1] // BLOCK)
    last = 2**bits - 1
    feedback = _feedback(moments, inputs)

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        values = np.zeros((end - begin, count * BLOCK), np.float32)
        values[:, : rows.shape[1]] = _scaled(rows, begin, end, inputs, outputs)
        if feedback:
            found: list[tuple[Any, Any]] = []

            def fit(block, importance):
                found.append(_nearest(block.clone(), last, FEWER, importance))
                scales, zeros = found[-1]
                return scales, -zeros, last - zeros

            integers = feedback.rounded(values, fit)[:, : count * BLOCK]
            scales, zeros = (feedback.of_blocks(arrays)[:, :count] for arrays in zip(*found, strict=True))
            integers = integers.reshape(end - begin, count, BLOCK) + zeros[..., None]
        else:
            own = torch.from_numpy(values).reshape(-1, BLOCK).t().contiguous()
            scales, zeros = _nearest(own.clone(), last, WIDER[bits])
            own.mul_(1 / scales).round_().clamp_(-zeros, last - zeros).add_(zeros)
            integers = own.t().reshape(end - begin, count, BLOCK).numpy()
            scales, zeros = (array.numpy().reshape(end - begin, count) for array in (scales, zeros))
        integers, zeros = (array.astype(np.uint8) for array in (integers, zeros))
        if bits == 4:
            integers, zeros = (pairs(array) for array in (integers, np.pad(zeros, ((0, 0), (0, count % 2)))))
        return integers, scales, zeros

    return _in_parts(part, rows, SLICE if moments is None else LANES)


def _feedback(moments: np.ndarray | None, inputs: np.ndarray | None) -> Feedback | None:
    with _one_thread_each():  # more threads cost more than such small matrices take
        return None if moments is None else Feedback(moments, inputs)


def _nearest(values, last: int, wider: tuple[float, ...], importance=None):
    """The scales and zero points of blocks. `values` (BLOCK, blocks) is float32, and is overwritten.

    `importance`, of the same shape, multiplies the errors of weights.
    """
    import torch

    # each block's range holds 0, which the zero point stands for; the range becomes 1, so that no square overflows
    low, high = values.amin(0).clamp_(max=0), values.amax(0).clamp_(min=0)
    span = (high - low).clamp_(min=torch.finfo(torch.float32).tiny)
    values /= span
    low /= span
    weights = values.abs()
    weights += values.square().mean(0).sqrt_()
    if importance is not None:
        weights *= importance
    weighted = weights * values
    integers, scratch = torch.empty_like(values), torch.empty_like(values)
    scales, zeros = torch.full_like(span, 1 / last), torch.zeros_like(span)
    most = torch.full_like(span, -1.0)

    def consider(steps, zero) -> None:
        """Takes the candidate where its error is smaller: the sum of weighted values² less what `gain` explains."""
        torch.clamp(torch.mul(values, steps, out=integers).round_(), -zero, last - zero, out=integers)
        product = torch.mul(weighted, integers, out=scratch).sum(0)
        square = torch.mul(weights, integers, out=scratch).mul_(integers).sum(0)
        gain = (product.square() / square).nan_to_num_(0.0)  # a block of zeros
        better = (gain > most) & (product > 0)
        torch.where(better, gain, most, out=most)
        torch.where(better, product / square, scales, out=scales)
        torch.where(better, zero, zeros, out=zeros)

    for more in wider:
        steps = last + more
        consider(steps, torch.round(-low * steps).clamp_(0, last))
    consider(1 / scales, zeros.clone())
    return scales.mul_(span), zeros


def pairs(array: np.ndarray) -> np.ndarray:
    """Puts two neighbours of the last axis, each of 4 bits in a byte, into one byte."""
    return array[..., ::2] | array[..., 1::2] << 4


def _in_parts(work: Callable, rows: np.ndarray, weights: int = SLICE) -> Any:
    """Calls `work` for parts of the rows with so many `weights`, on all cores, and joins the arrays that it gives.

    `work` takes the first row of a part, and the row after its last row.
    """
    step = max(weights // rows.shape[1], 1)
    begins = range(0, len(rows), step)
    with _one_thread_each(), ThreadPoolExecutor(physical_cores()) as pool:
        parts = pool.map(work, begins, [min(begin + step, len(rows)) for begin in begins])
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's own threads would share the cores with the pool's."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def channels(rows: np.ndarray, inputs: np.ndarray | None, outputs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights (N, K), multiplied by `inputs` (K,) and divided by `outputs` (N,), as int8; and their scales (N,)."""

    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        values = _scaled(rows, begin, end, inputs, outputs)
        scales = _channel_scales(values).astype(np.float32)
        return np.rint(values / scales[:, None]).astype(np.int8), scales

    return _in_parts(part, rows)


def nibbles(
    rows: np.ndarray, inputs: np.ndarray | None, outputs: np.ndarray | None, moments: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights (N, K), multiplied by `inputs` (K,) and divided by `outputs` (N,), as blocks along K.

    A weight is step * integer + offset, in units of its channel's scale. Gives the integers, -8 to 7, (blocks, BLOCK,
    N); the steps, 1 to 15, and the offsets, both (blocks, 1, N); and the scales (N,). The integers, steps, offsets and
    weights are int8.

    For each block, 25 pairs of a step and an offset are tried, near the pair that covers the block. The pair with the
    least squared error is taken. Large weights count more, as in llama.cpp's Q4_1. `moments` are those of `blocks`.
    """
    count = rows.shape[1] // BLOCK
    feedback = _feedback(moments, inputs)

    def part(begin: int, end: int) -> tuple[np.ndarray, ...]:
        import torch

        plain = _scaled(rows, begin, end, inputs, outputs).reshape(end - begin, -1, BLOCK)
        scales = _channel_scales(plain.reshape(end - begin, -1))
        width = plain.max(2) - plain.min(2)
        scales = np.maximum(scales, width.max(1) / (15 * 15))[:, None]  # at most 15 steps of 15
        plain /= scales[..., None]
        if feedback:
            found: list[tuple[Any, Any]] = []

            def fit(block, importance):
                found.append(_step_and_offset(block, importance))
                steps, offsets = found[-1]
                block -= offsets
                return steps, *_ends(steps, offsets)

            integers = feedback.rounded(plain.reshape(end - begin, -1), fit)[:, : count * BLOCK].reshape(plain.shape)
            steps, offsets = (feedback.of_blocks(arrays)[:, :count] for arrays in zip(*found, strict=True))
        else:
            values = (
                torch.from_numpy(plain).permute(2, 0, 1).contiguous()
            )  # (BLOCK, rows, blocks): sums are of whole rows
            steps, offsets = _step_and_offset(values)
            values.sub_(offsets).div_(steps).round_().clamp_(*_ends(steps, offsets))
            integers, steps, offsets = values.permute(1, 2, 0).numpy(), steps.numpy(), offsets.numpy()
        taken = [np.ascontiguousarray(a, np.int8) for a in (integers, steps[..., None], offsets[..., None])]
        _ease(plain, *taken)
        return *taken, scales.reshape(-1).astype(np.float32)

    integers, steps, offsets, scales = _in_parts(part, rows, SLICE if moments is None else LANES)
    integers, steps, offsets = (array.transpose(1, 2, 0) for array in (integers, steps, offsets))
    return integers, steps, offsets, scales


def _step_and_offset(values, importance=None):
    """The step and the offset of each block of weights (BLOCK, ...), which are in units of their channel's scale."""
    import torch

    low, high = values.amin(0), values.amax(0)
    weights = values.abs()
    weights += values.square().mean(0).sqrt_()
    if importance is not None:
        weights *= importance
    error = torch.empty_like(values)
    least = torch.full_like(low, torch.inf)
    steps, offsets = torch.zeros_like(low), torch.zeros_like(low)
    for more in (-3, -2, -1, 0, 1):
        step = (torch.ceil((high - low) / 15) + more).clamp_(1, 15)
        for shift in (-0.5, -0.25, 0, 0.25, 0.5):
            offset = torch.round((low + high + step) / 2 + shift * step).clamp_(-127, 127)
            torch.sub(values, offset, out=error).div_(step).round_().clamp_(*_ends(step, offset))
            found = error.mul_(step).add_(offset).sub_(values).square_().mul_(weights).sum(0)
            better = found < least
            torch.where(better, step, steps, out=steps)
            torch.where(better, offset, offsets, out=offsets)
            torch.where(better, found, least, out=least)
    return steps, offsets


def _ends(step, offset):
    """The smallest and the largest integer of 4 bits whose weight has 8 bits."""
    import torch

    return torch.ceil((-127 - offset) / step).clamp_(min=-8), torch.floor((127 - offset) / step).clamp_(max=7)


def _channel_scales(values: np.ndarray) -> np.ndarray:
    """The scales (N,) of weights (N, K).

    In these units, two rounded neighbours of one sign add up to at most PAIR.
    """
    pairs = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).reshape(len(values), -1, 2)
    largest = [np.maximum(sign * pairs, 0).sum(2).max(1) for sign in (1, -1)]
    return np.maximum(np.maximum(*largest), SMALLEST) / (PAIR - 1)  # rounding adds at most 0.5 to each weight


def _ease(values: np.ndarray, integers: np.ndarray, steps: np.ndarray, offsets: np.ndarray) -> None:
    """Moves integers step by step, in place, until no two neighbours of one sign add up to more than PAIR.

    A weight is step * integer + offset. In a pair above PAIR, the weight that exceeds its value by more moves. A weight
    whose integer is already the last of the 16 stays. Shapes: values and integers (N, blocks, BLOCK), steps and offsets
    (N, blocks, 1).
    """
    weights = steps * integers.astype(np.float32) + offsets
    for sign, last in ((1, -8), (-1, 7)):
        one_sided = np.maximum(sign * weights, 0)
        row, block, pair = np.nonzero(one_sided[..., ::2] + one_sided[..., 1::2] > PAIR)
        place = row[:, None], block[:, None], 2 * pair[:, None] + np.arange(2)
        step, offset = (array[row, block].astype(np.float32) for array in (steps, offsets))
        fours, wanted = integers[place], values[place]  # (pairs, 2)
        while True:
            found = step * fours + offset
            beyond = np.where(fours == last, -np.inf, sign * (found - wanted))
            further = (beyond == beyond.max(1, keepdims=True)) & (fours != last)
            giving = further & (np.maximum(sign * found, 0).sum(1, keepdims=True) > PAIR)
            if not giving.any():
                break
            fours -= (sign * giving).astype(np.int8)
        integers[place] = fours


def _scaled(
    rows: np.ndarray, begin: int, end: int, inputs: np.ndarray | None, outputs: np.ndarray | None
) -> np.ndarray:
    values = rows[begin:end].astype(np.float32)
    if inputs is not None:
        values *= inputs
    if outputs is not None:
        values /= outputs[begin:end, None]
    return values
