"""torchvision's RoIAlign on dense maps, by these kernels: one import line moves a detector over.

    from torchvision.ops import roi_align          becomes
    from evad_kernels.ops_compat import roi_align

The same results for the same arguments, but deterministic forward and backward, all CPU threads, and float16 and
bfloat16 on every device with sums in float32. torch.fx traces it as one call; torch.jit.script and quantised tensors
are not served. Source: K. He et al., Mask R-CNN (ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn

from . import _boxes, _check
from .roi_align_3d import _Arguments, _samples

FORMS = "[R, 5], or a list of B [n_b, 4]"
MOST_SAMPLES = 4096  # of an adaptive bin along a side: all are in memory at once


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average the bins of boxes on a dense feature map, as ``torchvision.ops.roi_align``.

    Args:
        input: Features, [B, C, H, W], floating point.
        boxes: [R, 5] with the batch index first, or a list of B [n_b, 4]; x1, y1, x2, y2 in pixels.
        output_size: Bins of a box, one number or (height, width).
        spatial_scale: Cells a pixel, above 0.
        sampling_ratio: Samples a bin along each side. 0 or less: as many as a bin has cells, rounded up. How much work
            that is depends on the boxes, so it is done in plain PyTorch, waits for a GPU, and breaks a compiled graph.
        aligned: Shift by half a cell. Otherwise, as in older detectors, sides are at least one cell.
    Returns:
        [R, C, height, width]. Gradient flows to ``input``. A reversed or NaN box gives zeros.
    Raises:
        ValueError: a shape disagrees or a number is out of range, or an adaptive bin has more than 4,096 cells a side.
        TypeError: not floating point.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing (that of
            ``roi_align_3d``, which serves a ``sampling_ratio`` above 0).
    """
    op = "roi_align"
    _check.tensor(op, "input", input, 4, "[B, C, H, W]")
    _check.floating(op, "input", input)
    ratio = _check.as_integer(sampling_ratio)
    if ratio is None:
        _check.fail(op, "sampling_ratio", "an integer", sampling_ratio)
    B, C, H, W = input.shape
    if H == 0 or W == 0:
        _check.fail(op, "input", "[B, C, H, W] with at least one cell", list(input.shape))
    _check.countable(op, "input", H * W, "[B, C, H, W] with H * W")
    if isinstance(boxes, Tensor) and (boxes.ndim != 2 or boxes.shape[1] != 5):
        _check.fail(op, "boxes", f"{FORMS} with B = {B}", list(boxes.shape))
    boxes = _boxes.check_boxes(op, boxes, input, "input", forms=FORMS)
    output = _boxes.output_size(op, output_size)
    scale = _boxes.positive(op, "spatial_scale", spatial_scale)
    tokens = input.flatten(2).transpose(1, 2)  # [B, H*W, C]
    if ratio > 0:
        position = torch.arange(H * W, device=input.device).expand(B, H * W)
        arguments = _Arguments(op, tokens, position, None, boxes, (1, H, W), output, scale, ratio, bool(aligned))
        return _samples(arguments)[:, :, 0]
    dense = tokens.to(boxes.corners.dtype).view(B, 1, H, W, C)
    options = {"scale": scale, "output": output, "sampling_ratio": _adaptive, "aligned": bool(aligned)}
    if boxes.batch is None:
        return _bins(dense, boxes.corners, options).to(input.dtype)
    bins = dense.new_zeros(boxes.corners.shape[0], C, *output)
    for b in range(B):  # all at once, each box would have a copy of its image's map
        rows = (boxes.batch == b).nonzero()[:, 0]
        if rows.numel():
            bins = bins.index_copy(0, rows, _bins(dense[b : b + 1], boxes.corners[rows], options))
    return bins.to(input.dtype)


def _bins(dense: Tensor, corners: Tensor, options: dict) -> Tensor:
    """[R, C, height, width] of as many boxes an image, in the order of images, from [B, 1, H, W, C]."""
    return _boxes.bins_reference(dense, _boxes.Boxes(None, corners), **options)[:, :, 0].permute(0, 3, 1, 2)


def _adaptive(width: Tensor) -> Tensor:
    """As many samples as a bin has cells, rounded up; none where a side has no length, as in torchvision."""
    count = width.ceil().nan_to_num(1, 1, 1)
    if count.numel() and (most := int(count.max())) > MOST_SAMPLES:
        _check.fail("roi_align", "boxes", f"at most {MOST_SAMPLES} cells a bin and side to be adaptive", most)
    return count


torch.fx.wrap("roi_align")


class RoIAlign(nn.Module):
    """``roi_align`` as a module, as ``torchvision.ops.RoIAlign``."""

    def __init__(
        self, output_size: int | Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
