"""Inference outside of Python: EVAD as a torch.export program, or as ONNX of standard operators.

Exported is the forward for clips of one size and any number of them, from normalised clips [B, 3, T, H, W] to person
logits, boxes, action logits and kept positions (``EVADOutput``, without its names). The ops enter as their
plain-PyTorch reference, which every exporter can take apart; ``select_detections`` and preprocessing stay outside.

For C++, AOTInductor compiles the program: ``torch._inductor.aoti_compile_and_package(export_program(model, size),
package_path="evad.pt2")``; ``aoti_load_package`` runs the package without this one (tested on a CPU).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import evad_kernels

from .detector import EVAD


class Inference(nn.Module):
    """``EVAD.forward`` with a flat tuple of tensors as its result: what exporters want."""

    def __init__(self, model: EVAD) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        person_logits, boxes, action_logits, kept = self.model(clips)
        return person_logits, boxes, action_logits, *kept


def output_names(model: EVAD) -> list[str]:
    """Names of the exported outputs, in order."""
    pruning = len(model.config.pruning_blocks) if model.config.keep_rate < 1 else 0
    return ["person_logits", "boxes", "action_logits", *(f"kept_{number}" for number in range(pruning))]


def export_program(model: EVAD, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """Trace inference with torch.export.

    Args:
        model: The model; exported in evaluation mode, at its present keep rate, dtype and device.
        size: Height and width of the clips, pixels.
    Returns:
        A program that ``torch.export.save`` writes and that takes any number of clips of that size. Its operators are
        PyTorch's own, so that loading it needs neither evad nor evad_kernels.
    """
    weight = model.encoder.patch_embed.weight
    clips = torch.zeros(2, 3, model.config.num_frames, *size, dtype=weight.dtype, device=weight.device)
    training = model.training
    try:
        with torch.no_grad(), evad_kernels.use_backend("reference"):
            batch = torch.export.Dim("batch", min=1)
            return torch.export.export(Inference(model.eval()), (clips,), dynamic_shapes=({0: batch},))
    finally:
        model.train(training)


def export_onnx(model: EVAD, path: str | Path, size: tuple[int, int]) -> None:
    """Write inference as an ONNX file of standard operators (opset 18), any number of clips of one size.

    Args:
        model: As for ``export_program``.
        path: Where to; input ``clips``, outputs as ``output_names`` has them.
        size: Height and width of the clips, pixels.
    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    from onnxscript import opset18

    def stable_sort(x, stable=None, dim=-1, descending=False):  # TopK's ties go to the lower index too
        size = opset18.Gather(opset18.Shape(x), opset18.Constant(value_ints=[dim]), axis=0)
        return opset18.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    torch.onnx.export(
        export_program(model, size),
        f=path,
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["clips"],
        output_names=output_names(model),
        custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        external_data=False,
    )
