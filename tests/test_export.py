"""Every op in a program of torch.export that takes any batch, saved here and run by another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import evad_kernels
from evad_kernels import use_backend

GRID = (2, 4, 5)


def cases(B):
    """Op: tensors and the op's other arguments, for a batch of ``B``."""
    generator = torch.Generator().manual_seed(B)
    q, k, v = torch.randn(3, B, 2, 21, 16, generator=generator).unbind(0)
    importance = torch.rand(B, 19, generator=generator)
    tokens = torch.randn(B, 13, 6, generator=generator)
    position = torch.stack([torch.randperm(40, generator=generator)[:13] for _ in range(B)])
    index = torch.stack([torch.randperm(10, generator=generator)[:5].sort().values for _ in range(B)])
    corners = 60 * torch.rand(B, 3, 2, generator=generator)
    boxes = torch.cat([corners, corners + 30], dim=-1)
    levels = [torch.randn(B, 6, 16 // 2**level, 20 // 2**level, generator=generator) for level in range(4)]
    fill = torch.randn(6, generator=generator)
    return {
        "keyframe_attention": ((q, k, v), {"num_keyframe": 4, "keyframe_weight": 2.0}),
        "keyframe_attention_topk": ((q, k, v), {"num_keyframe": 4, "num_select": 7}),
        "select_tokens": ((importance,), {"num_select": 6}),
        "gather_tokens": ((tokens, index), {"num_keyframe": 3}),
        "scatter_tokens": ((tokens, position), {"grid": GRID, "fill": fill}),
        "roi_align_3d": ((tokens, position, boxes), {"grid": GRID, "output_size": 3, "background": fill}),
        "roi_pool_3d": ((tokens, position, boxes), {"grid": GRID, "background": fill}),
        "pyramid_roi_align": ((*levels, boxes), {"output_size": 3}),
    }


class Op(nn.Module):
    def __init__(self, op, options):
        super().__init__()
        self.op, self.options = op, options

    def forward(self, *tensors):
        if self.op == "pyramid_roi_align":
            tensors = (list(tensors[:4]), tensors[4])
        results = getattr(evad_kernels, self.op)(*tensors, **self.options)
        return results if isinstance(results, torch.Tensor) else tuple(results)


def export(op, tensors, options):
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(Op(op, options), tensors, dynamic_shapes=(tuple({0: batch} for _ in tensors),))


RUN = """
import sys, torch
{first}
for op in {ops}:
    program, results = torch.export.load(op + ".pt2").module(), []
    for tensors in torch.load(op + ".in.pt"):
        result = program(*tensors)
        results.append([result] if isinstance(result, torch.Tensor) else list(result))
    torch.save(results, op + ".out.pt")
{last}
"""


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_runs_in_another_process_with_another_batch(backend, tmp_path):
    """Exported on the reference a program is PyTorch alone; on a backend it holds that backend's op."""
    batches = {B: cases(B) for B in (2, 1, 3)}
    with use_backend(backend):
        for op, (tensors, options) in batches[2].items():
            torch.export.save(export(op, tensors, options), tmp_path / f"{op}.pt2")
            torch.save([batches[B][op][0] for B in batches], tmp_path / f"{op}.in.pt")
    alone = backend == "reference"
    code = RUN.format(
        ops=list(batches[2]),
        first="" if alone else "import evad_kernels",
        last="assert 'evad_kernels' not in sys.modules" if alone else "",
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for op in batches[2]:
        for B, outputs in zip(batches, torch.load(tmp_path / f"{op}.out.pt"), strict=True):
            tensors, options = cases(B)[op][0], batches[2][op][1]
            with use_backend(backend):
                want = Op(op, options)(*tensors)
            for got, expected in zip(outputs, [want] if isinstance(want, torch.Tensor) else want, strict=True):
                torch.testing.assert_close(got, expected, msg=lambda m, op=op, B=B: f"{op}, batch {B}: {m}")
