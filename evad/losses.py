"""What EVAD learns from: the actors at every localisation stage, their actions after every decoder block.

Source: EVAD, Appendix B, which takes the losses of WOO (Chen et al., ICCV 2021); set prediction is DETR's (Carion et
al., ECCV 2020). A stage's proposals are matched one to one to the ground truth, at the least total cost

    cost = l1_loss_weight * L1 - score_loss_weight * p_person - giou_loss_weight * GIoU,

L1 in parts of the clip's size. Matched proposals learn their box (L1, GIoU) and to be a person, the others to be
background. Actions are learned by the proposals that the last stage matched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import EVADConfig

if TYPE_CHECKING:
    from .detector import Predictions

PERSON, BACKGROUND = 0, 1  # columns of person_logits
TINY_AREA = 1e-6  # square pixels; a union of no area divides nothing


class Counts(NamedTuple):
    """What a batch's sums are divided by (0 counts as 1); numbers, or tensors of no dimension on the loss's device."""

    clips: float | Tensor
    boxes: float | Tensor  # of the ground truth
    matched: float | Tensor  # of these, how many a proposal answers for: at most num_proposals a clip


def count(targets: Sequence[dict[str, Tensor]], num_proposals: int) -> Counts:
    """``Counts`` of one batch."""
    boxes = [len(target["boxes"]) for target in targets]
    return Counts(len(boxes), sum(boxes), sum(min(number, num_proposals) for number in boxes))


class Matching(NamedTuple):
    """Proposals and the ground truth they answer for, a row a stage; int64 [stages, matched]."""

    clip: Tensor
    proposal: Tensor  # of the clip
    target: Tensor  # among the boxes of all clips, one clip after the other


def detection_losses(
    predictions: Predictions,
    targets: Sequence[dict[str, Tensor]],
    config: EVADConfig,
    counts: Counts | None = None,
) -> dict[str, Tensor]:
    """Every weighted term under its released name, and ``loss_total``, their mean.

    Args:
        predictions: Of every stage and block, for B clips.
        targets: One a clip: ``boxes`` [M, 4] x1, y1, x2, y2 in its pixels; ``labels`` [M, classes], multi-hot.
        config: The weights.
        counts: What sums are divided by; None for this batch's own. Data-parallel training gives the mean over ranks,
            so that the mean gradient is that of the whole batch (the released code does so for ``boxes`` alone).
    Returns:
        ``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last stage, with ``_0``, ``_1``, ... of the earlier ones;
        ``loss_bce`` of the last decoder block, with ``_0``, ... of the earlier ones; ``loss_total``. Without any box
        the terms of boxes and actions are 0, and still have a graph.
    """
    counts = counts or count(targets, config.num_proposals)
    logits, boxes = (torch.stack(stages).to(predictions.whwh.dtype) for stages in predictions.localized)
    true_boxes, labels = (
        torch.cat([target[name] for target in targets]).to(boxes.device, boxes.dtype, non_blocking=True)
        for name in ("boxes", "labels")
    )
    sizes = [len(target["boxes"]) for target in targets]
    matching = match(logits, boxes, true_boxes.split(sizes), predictions.whwh, config)
    stage = torch.arange(len(boxes), device=boxes.device)[:, None]
    found, true_boxes = boxes[stage, matching.clip, matching.proposal], true_boxes[matching.target]  # [S, matched, 4]

    kind = torch.full(logits.shape[:-1], BACKGROUND, device=logits.device)
    kind[stage, matching.clip, matching.proposal] = kind.new_full((), PERSON)  # a plain number would be copied to a GPU
    cross_entropy = F.cross_entropy(logits.movedim(-1, 1), kind, reduction="none")
    cross_entropy = (torch.where(kind == PERSON, 1.0, config.background_weight) * cross_entropy).sum((1, 2))
    num_background = counts.clips * logits.shape[2] - counts.matched
    num_boxes, num_matched = (number + (number == 0) for number in (counts.boxes, counts.matched))
    terms = {
        "loss_ce": config.score_loss_weight
        * cross_entropy
        / (counts.matched + config.background_weight * num_background),
        "loss_bbox": ((found - true_boxes) / predictions.whwh[matching.clip]).abs().sum((1, 2))
        * (config.l1_loss_weight / num_boxes),
        "loss_giou": (1 - giou(found, true_boxes)).sum(1) * (config.giou_loss_weight / num_boxes),
    }
    actions = torch.stack([block[matching.clip[-1], matching.proposal[-1]] for block in predictions.action_logits])
    labels = labels[matching.target[-1]].expand_as(actions)  # [blocks, matched, classes]
    actions = F.binary_cross_entropy_with_logits(actions.to(labels.dtype), labels, reduction="none").sum((1, 2))
    terms["loss_bce"] = actions * (config.action_loss_weight / (num_matched * labels.shape[-1]))

    losses = {}
    for name, values in terms.items():
        *earlier, losses[name] = values.unbind()
        losses |= {f"{name}_{number}": value for number, value in enumerate(earlier)}
    losses["loss_total"] = torch.stack(tuple(losses.values())).mean()
    return losses


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Sequence[Tensor], whwh: Tensor, config: EVADConfig) -> Matching:
    """Match every stage's proposals to the ground truth; one copy to the host serves all stages and clips.

    Args:
        logits: Person logits [S, B, n, 2] of S stages.
        boxes: Their boxes [S, B, n, 4], pixels.
        targets: The ground truth's boxes, [M, 4] a clip.
        whwh: Width, height, width, height of each clip, [B, 4].
    """
    from scipy.optimize import linear_sum_assignment

    true_boxes = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)  # [B, M, 4]
    whwh = whwh[:, None]
    distance = torch.cdist(boxes / whwh, true_boxes / whwh, p=1)  # [S, B, n, M]
    person = logits.softmax(-1)[..., PERSON, None]
    overlap = giou(boxes[..., None, :], true_boxes[:, None])
    cost = config.l1_loss_weight * distance - config.score_loss_weight * person - config.giou_loss_weight * overlap
    cost = cost.nan_to_num(1e9, 1e9, -1e9).cpu().numpy()  # of a model that diverges: the loss says so, not SciPy

    rows = []
    for stage in cost:
        first = 0
        for clip, target in enumerate(targets):
            proposal, true_box = linear_sum_assignment(stage[clip, :, : len(target)])
            rows += [(clip, *pair) for pair in zip(proposal, true_box + first, strict=True)]
            first += len(target)
    rows = torch.tensor(rows, dtype=torch.int64).view(len(cost), -1, 3).to(boxes.device, non_blocking=True)
    return Matching(*rows.unbind(-1))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes [..., 4], broadcast, in [-1, 1] (Rezatofighi et al., CVPR 2019)."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection).clamp(min=TINY_AREA)
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    hull = hull.clamp(min=TINY_AREA)
    return intersection / union - (hull - union) / hull
