"""exp2 as fast as a GPU's special function units give it: float32, nothing but registers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

PROGRAMS, BLOCK, STEPS = 132 * 16 * 4, 1024, 512
PER_CALL = PROGRAMS * BLOCK * STEPS


@triton.jit
def exp2_kernel(result, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    # x = 2^-x settles at 0.64: never 0, infinite or constant, and a step needs the one before.
    x = tl.arange(0, BLOCK) * (1.0 / BLOCK)
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(result + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def repeated() -> Callable[[], object]:
    """A call of PER_CALL exponentials."""
    result = torch.empty(PROGRAMS * BLOCK, device="cuda")
    return lambda: exp2_kernel[(PROGRAMS,)](result, STEPS=STEPS, BLOCK=BLOCK, num_warps=4)
