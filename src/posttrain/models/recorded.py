"""A function of tensors that is recorded once on CUDA, as a graph, and replayed from then on.

A step of decoding is several hundred small kernels, and starting them one by one from Python takes longer than they
do. A CUDA graph starts them all at once (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). What is
replayed is what was recorded: the same kernels over the same memory. So everything that changes from call to call must
be an input, everything else must stay where it is, and calling the function twice must be as good as once.

Elsewhere the function itself is called, and the numbers are the same.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        aside, pool, _ = _aside(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                function(*self._inputs)  # what is made at the first call only must not be made while recording
                with _captured(pool) as graph:
                    self._output = function(*self._inputs)
        finally:
            torch.cuda.current_stream().wait_stream(aside)
        return graph


@contextmanager
def _captured(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Of what runs inside. Not `torch.cuda.graph`, which gives back every block that training has cached."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may go on allocating
    try:
        yield graph
    finally:
        graph.capture_end()


@functools.cache
def _aside(device: int) -> tuple[torch.cuda.Stream, Any, torch.cuda.CUDAGraph]:
    """A stream to record on, for cuBLAS keeps a workspace for each for ever; memory that recordings share, of which
    only one is replayed at a time; and a graph of nothing that keeps this memory, for without any it may not be used
    again."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is empty
        with _captured(pool) as keeper:
            pass
    return stream, pool, keeper
