"""A function of tensors that is recorded once on CUDA, as a graph, and replayed from then on.

A step of decoding is several hundred small kernels, and starting them one by one from Python takes longer than they
do. A CUDA graph starts them all at once (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). What is
replayed is what was recorded: the same kernels over the same memory. So everything that changes from call to call must
be an input, everything else must stay where it is, and calling the function twice must be as good as once.

Elsewhere the function itself is called, and the numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class Recording:
    """Of one function over one set of buffers; whoever replaces a buffer begins another."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._output = torch.zeros(0)

    def run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """`function(*inputs)`. The inputs' shapes are those of the first call."""
        if not inputs[0].is_cuda:
            return function(*inputs)
        with torch.cuda.device(inputs[0].device):
            if self._graph is None:
                self._graph = self._record(function, inputs)
            for kept, given in zip(self._inputs, inputs, strict=True):
                kept.copy_(given)
            self._graph.replay()
            return self._output.clone()  # the next replay writes over it

    def _record(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.cuda.CUDAGraph:
        self._inputs = tuple(one.clone() for one in inputs)
        aside, pool = _aside(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            function(*self._inputs)  # what is made at the first call only must not be made while recording
            # Not `torch.cuda.graph`, which gives back every block that training has cached.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on allocating
            try:
                self._output = function(*self._inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(aside)
        return graph


@functools.cache
def _aside(device: int) -> tuple[torch.cuda.Stream, Any]:
    """A stream to record on, for cuBLAS keeps a workspace for each for ever; and memory that recordings share, of which
    only one is replayed at a time."""
    return torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
