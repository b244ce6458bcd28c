from pathlib import Path

import numpy as np
import pytest
import torch

from evad_kernels import roi_align_3d, roi_pool_3d

GOLDEN = Path(__file__).parent / "golden" / "op_roi_and_boxes.npz"


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden(case):
    golden = {key: torch.tensor(value) for key, value in np.load(GOLDEN).items() if key.startswith(case)}
    dense = golden[f"{case}/dense"]
    B, C, *grid = dense.shape
    tokens = dense.flatten(2).transpose(1, 2).contiguous().requires_grad_()
    position = torch.arange(tokens.shape[1]).expand(B, -1)
    boxes = golden[f"{case}/boxes"]
    align = roi_align_3d(tokens, position, boxes, grid=tuple(grid))
    torch.testing.assert_close(align, golden[f"{case}/roi_7x7"], atol=1e-6, rtol=0)
    pooled = roi_pool_3d(tokens, position, boxes, grid=tuple(grid)).view(B, -1, C)
    torch.testing.assert_close(pooled, golden[f"{case}/pooled"], atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(pooled, tokens, golden[f"{case}/grad_coeff"])
    want = golden[f"{case}/grad_dense"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(grad, want, atol=1e-6, rtol=0)
