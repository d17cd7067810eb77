"""Batches in a fixed order, decoded by threads ahead of the network.

The order is a pure function of (seed, epoch). Threads suffice because the decoders let go of
Python's lock, and they share memory with the training loop: nothing is copied or pickled.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Request:
    """One batch to be made: which samples, for which step, at what size."""

    step: int
    """The optimizer step this batch belongs to, from 0."""
    epoch: int
    indices: np.ndarray
    """(B,) positions in the data set."""
    size: tuple[int, int]
    """Height and width, pixels."""
    positions: range
    """Where these samples stand in the step's global batch."""
    is_late: bool = False
    """In the last epochs, which go without mosaic and mixup of boxes."""


def eval_requests(
    chosen: np.ndarray, batch_size: int, size: tuple[int, int]
) -> Iterator[Request]:
    """The chosen samples in their order; the last batch may be smaller."""
    for start in range(0, len(chosen), batch_size):
        indices = chosen[start : start + batch_size]
        yield Request(start // batch_size, 0, indices, size, range(len(indices)))


Fill = Callable[[Request, int, np.ndarray], None]
"""Decode sample `i` of a request into its slot, uint8 (H, W, C)."""


def load(
    requests: Iterable[Request], fill: Fill, num_channels: int, num_workers: int, pin: bool = False
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Yield (request, images uint8 (B, C, H, W)) in the order of the requests.

    With `num_workers` threads up to BATCHES_AHEAD batches are decoded ahead; with 0 each is
    decoded when it is asked for. `pin` allocates page-locked memory for copies to a GPU.
    """

    def allocate(request: Request) -> torch.Tensor:
        shape = (len(request.indices), *request.size, num_channels)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pin)

    def finished(slots: torch.Tensor) -> torch.Tensor:
        return slots.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W), channels last in memory

    def fill_some(request: Request, slots: np.ndarray, members: range) -> None:
        for i in members:
            fill(request, i, slots[i])

    if num_workers == 0:
        for request in requests:
            slots = allocate(request)
            fill_some(request, slots.numpy(), range(len(request.indices)))
            yield request, finished(slots)
        return

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    ahead: deque = deque()

    def take() -> tuple[Request, torch.Tensor]:
        request, slots, parts = ahead.popleft()
        for part in parts:
            part.result()  # raises what the thread raised
        return request, finished(slots)

    try:
        for request in requests:
            slots = allocate(request)
            num_samples = len(request.indices)
            parts = [
                pool.submit(fill_some, request, slots.numpy(), range(i, num_samples, num_workers))
                for i in range(min(num_workers, num_samples))
            ]
            ahead.append((request, slots, parts))
            if len(ahead) > BATCHES_AHEAD:
                yield take()
        while ahead:
            yield take()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def first(batches: Iterator, count: int) -> list:
    """The first `count` batches; the loader's threads are ended."""
    with closing(batches):
        return [batch for _, batch in zip(range(count), batches, strict=False)]
