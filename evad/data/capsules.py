"""Paints capsules (thick lines with round ends) on frames, with smooth edges and in a given order."""

from __future__ import annotations

import numpy as np


def paint(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, radius: np.ndarray, colour: np.ndarray) -> None:
    """Paint P capsules on each of F frames, later ones over earlier ones.

    A pixel is covered by as much of it as lies within: exact for straight edges along the axes, close for others.

    Args:
        canvas: Frames, [F, H, W, 3], float32; changed in place.
        start, end: Centres of the round ends, x and y in pixels, [F, P, 2]; NaN paints nothing.
        radius: Pixels, [F, P].
        colour: [F, P, 3].
    """
    H, W = canvas.shape[1:3]
    low = np.floor(np.minimum(start, end) - radius[..., None] - 0.5)
    high = np.ceil(np.maximum(start, end) + radius[..., None] + 0.5)
    shown = (np.isfinite(low) & (low < (W, H)) & (high > 0)).all(-1) & (radius > 0)
    if not shown.any():
        return
    frame = np.nonzero(shown)[0]
    low, high, start, end = (points[shown].astype(np.float32) for points in (low, high, start, end))
    columns, rows = (np.arange(size, dtype=np.float32) + 0.5 for size in (high - low).max(0).astype(int))
    x = low[:, :1] + columns - start[:, :1]  # [n, columns], from the start
    y = low[:, 1:] + rows - start[:, 1:]
    dx, dy = (end - start).T[:, :, None]
    length = np.maximum(dx * dx + dy * dy, 1e-6)
    along = (y * dy / length)[:, :, None] + (x * dx / length)[:, None]  # [n, rows, columns]
    along.clip(0, 1, out=along)
    away = np.square(x[:, None] - along * dx[:, None]) + np.square(y[:, :, None] - along * dy[:, None])
    cover = np.sqrt(away, out=away)
    np.subtract(radius[shown].astype(np.float32)[:, None, None] + 0.5, cover, out=cover).clip(0, 1, out=cover)
    colour = colour[shown].astype(np.float32)
    left, top = low.astype(int).T.tolist()
    right, bottom = high.astype(int).T.tolist()
    for n, (f, x1, y1, x2, y2) in enumerate(zip(frame.tolist(), left, top, right, bottom, strict=True)):
        u, v = max(x1, 0), max(y1, 0)
        region = canvas[f, v:y2, u:x2]
        inside = cover[n, v - y1 : v - y1 + region.shape[0], u - x1 : u - x1 + region.shape[1], None]
        region += inside * (colour[n] - region)
