from pathlib import Path

import numpy as np
import torch

from evad_kernels import pyramid_roi_align

GOLDEN = Path(__file__).parent / "golden" / "op_roi_and_boxes.npz"


def test_golden():
    golden = {key: torch.tensor(value) for key, value in np.load(GOLDEN).items() if key.startswith("ml/")}
    levels = [golden[f"ml/p{number}"] for number in (2, 3, 4, 5)]
    actual = pyramid_roi_align(levels, golden["ml/boxes"])
    torch.testing.assert_close(actual.flatten(0, 1), golden["ml/out"], atol=1e-6, rtol=0)
