"""What this machine can do at most: copies, matrix products and exponentials, measured with torch's own kernels.

    python -m benchmarks.ceilings [cuda]

On a GPU torch's exponential waits for memory, so exp2 is measured in registers, by a Triton kernel.

A floor is the time that an op's bytes, multiply-adds or exponentials alone would take at those rates, whichever is
longest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from evad.profile import bfloat16_is_slow


class Work(NamedTuple):
    """What an op must do at least, whoever computes it."""

    bytes: float = 0  # read and written once
    flops: float = 0  # of matrix products, a multiply-add is 2
    exps: float = 0
    dtype: torch.dtype = torch.float32  # of the matrix products


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of what the function launches on the current stream; a call is a replay."""
    stream = torch.cuda.Stream() if torch.cuda.current_stream() == torch.cuda.default_stream() else None
    stream = stream or torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    stream.synchronize()
    torch.cuda.empty_cache()  # a graph has memory of its own: it cannot take what those calls left
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


class Ceilings:
    """Rates of one device, each measured when first asked for."""

    def __init__(self, device: str):
        self.device = device
        self._rates: dict[tuple, float] = {}

    def seconds(self, work: Work) -> dict[str, float]:
        """What bytes, multiply-adds and exponentials would take, each alone."""
        return {
            "bytes": work.bytes / self.copy(work.bytes) if work.bytes else 0,
            "flops": work.flops / self.matmul(work.dtype) if work.flops else 0,
            "exp": work.exps / self.exp() if work.exps else 0,
        }

    def floor(self, work: Work) -> dict:
        """``ms``, and ``bound``: which of the three rates sets it."""
        seconds = self.seconds(work)
        bound = max(seconds, key=seconds.get)
        return {"ms": float(f"{1e3 * seconds[bound]:.4g}"), "bound": bound}

    def copy(self, size: float = 2**30) -> float:
        """Bytes/s, read plus written, of a copy that moves about ``size`` bytes (small ones stay in cache)."""
        elements = 2 ** max(10, min(27, int(size).bit_length() - 3))  # float32, half of the bytes on each side

        def make():
            source, target = (torch.randn(elements, device=self.device) for _ in range(2))
            return lambda: target.copy_(source)

        return self._rate(("copy", elements), make, 8 * elements)

    def matmul(self, dtype: torch.dtype) -> float:
        """Operations/s of a large square matrix product; in bfloat16 as in float32 on CPUs where that is faster."""
        if dtype == torch.bfloat16 and bfloat16_is_slow(self.device):
            dtype = torch.float32
        size = 2048 if self.device == "cpu" else 8192

        def make():
            # Random: a GPU multiplies ones or zeros faster than anything that is used.
            a, b, c = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(3))
            return lambda: torch.mm(a, b, out=c)

        return self._rate(("matmul", dtype), make, 2 * size**3)

    def exp(self) -> float:
        """Exponentials/s, float32, in cache; on a GPU in registers."""
        if self.device != "cpu":
            from benchmarks._exp2 import PER_CALL, repeated

            return self._rate(("exp",), repeated, PER_CALL)
        elements = 2**18

        def make():
            source, target = (torch.zeros(elements, device=self.device) for _ in range(2))
            return lambda: torch.exp(source, out=target)

        return self._rate(("exp",), make, elements)

    def _rate(self, key: tuple, make, amount: float) -> float:
        if key not in self._rates:
            with torch.inference_mode():
                function = make() if self.device == "cpu" else captured(make())
                self._rates[key] = amount / min(self._seconds(function) for _ in range(12))
        return self._rates[key]

    def _seconds(self, function) -> float:
        """Of one call, from a batch of calls that takes about 10 ms."""
        calls = 1
        while True:
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            if self.device != "cpu":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - begin
            if elapsed > 5e-3:
                return elapsed / calls
            calls = max(2 * calls, int(calls * 7e-3 / max(elapsed, 1e-6)))

    def summary(self) -> dict[str, float]:
        """The rates in the usual units."""
        return {
            "copy GB/s": round(self.copy() / 1e9, 1),
            "matmul float32 TFLOP/s": round(self.matmul(torch.float32) / 1e12, 3),
            "matmul bfloat16 TFLOP/s": round(self.matmul(torch.bfloat16) / 1e12, 3),
            "exp G/s": round(self.exp() / 1e9, 2),
        }


if __name__ == "__main__":
    for name, rate in Ceilings(sys.argv[1] if len(sys.argv) > 1 else "cpu").summary().items():
        print(f"{name:24} {rate:10}")
