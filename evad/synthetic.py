"""Renders short clips of moving, articulated actors before a textured landscape, with the box of every actor.

For ``evad demo`` and tests: a video to work on with nothing to download. Everything is drawn from a seed: the same
arguments give the same pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 2  # drawn this much larger, then reduced: smooth edges


class Actor(NamedTuple):
    """One person.

    x, y: where the feet stand at time 0, parts of the picture's width and height. height: of the body, part of the
    picture's height. action: "walk", "wave", "jump" or "dance". heading: parts of the width walked per second,
    negative to the left.
    """

    action: str
    x: float
    y: float
    height: float
    heading: float = 0.0
    phase: float = 0.0
    shirt: tuple[int, int, int] = (200, 60, 60)
    trousers: tuple[int, int, int] = (40, 50, 90)
    skin: tuple[int, int, int] = (224, 172, 138)
    hair: tuple[int, int, int] = (60, 40, 30)


ACTORS = (
    Actor("wave", 0.88, 0.72, 0.33, 0.0, 0.3, (240, 196, 70), (78, 66, 92), (198, 140, 104), (30, 24, 24)),
    Actor("jump", 0.66, 0.80, 0.40, 0.0, 0.0, (66, 150, 140), (44, 52, 70), (232, 190, 160), (150, 84, 40)),
    Actor("walk", 0.06, 0.90, 0.50, 0.09, 0.0, (214, 76, 64), (48, 64, 112), (216, 164, 130), (58, 38, 28)),
    Actor("dance", 0.44, 0.94, 0.52, 0.0, 0.6, (122, 92, 178), (52, 44, 52), (146, 98, 70), (24, 20, 22)),
)


class Picture(NamedTuple):
    """One frame: ``image`` uint8 [H, W, 3]; ``boxes`` float32 [actors, 4], x1 y1 x2 y2 in pixels, clipped to it."""

    image: np.ndarray
    boxes: np.ndarray


def render(
    seconds: float = 4.0,
    *,
    fps: int = 30,
    width: int = 480,
    height: int = 360,
    actors: Sequence[Actor] = ACTORS,
    seed: int = 0,
) -> Iterator[Picture]:
    """Frames of one clip, in order; nearer actors (larger ``y``) in front."""
    layers = _landscape(width, height, seed)
    grain = np.random.default_rng(seed).normal(0, 2.5, (4, height, width, 1)).astype(np.float32)
    size = width * SUPERSAMPLE, height * SUPERSAMPLE
    limits = np.array([width, height, width, height], np.float32)
    for index in range(round(seconds * fps)):
        time = index / fps
        canvas = layers[0].copy()
        for layer, parallax in zip(layers[1:], (0.4, 1.0), strict=True):
            canvas.paste(layer, (-round(parallax * width * 0.03 * (1 + math.sin(0.5 * time))), 0), layer)
        canvas = canvas.resize(size, Image.Resampling.NEAREST)  # which reduce() undoes exactly
        draw = ImageDraw.Draw(canvas, "RGBA")
        boxes = [_draw(draw, actor, time, size) for actor in sorted(actors, key=lambda actor: actor.y)]
        image = np.asarray(canvas.reduce(SUPERSAMPLE), np.float32) + grain[index % 4]
        boxes = np.array(boxes, np.float32).reshape(-1, 4) / SUPERSAMPLE
        yield Picture(image.clip(0, 255).astype(np.uint8), boxes.clip(0, limits))


# Actors


def _pose(action: str, time: float, phase: float) -> tuple[dict[str, float], float]:
    """Angles of the limbs (radians from straight down, positive forwards) and the lift of the feet (body heights)."""
    swing = math.sin(2 * math.pi * (1.1 * time + phase))
    pose = {"lean": 0.0, "thigh_l": 0.06, "thigh_r": -0.06, "knee_l": 0.0, "knee_r": 0.0}
    pose |= {"arm_l": 0.12, "arm_r": -0.12, "elbow_l": 0.15, "elbow_r": -0.15}
    if action == "walk":
        pose |= {"lean": 0.06, "thigh_l": 0.55 * swing, "thigh_r": -0.55 * swing}
        pose |= {"knee_l": -0.7 * max(0.0, -swing), "knee_r": -0.7 * max(0.0, swing)}
        pose |= {"arm_l": -0.6 * swing, "arm_r": 0.6 * swing, "elbow_l": 0.45, "elbow_r": 0.45}
    elif action == "wave":
        pose |= {"arm_r": -2.5 + 0.15 * swing, "elbow_r": -0.5 + 0.7 * math.sin(2 * math.pi * (2 * time + phase))}
    elif action == "jump":
        beat = (0.8 * time + phase) % 1.0
        flight = math.sin(math.pi * (beat - 0.4) / 0.45) if 0.4 < beat < 0.85 else 0.0
        crouch = math.sin(math.pi * beat / 0.4) if beat < 0.4 else 0.0
        pose |= {"thigh_l": 0.1 + 0.8 * crouch + 0.3 * flight, "thigh_r": -0.1 + 0.8 * crouch - 0.3 * flight}
        pose |= {"knee_l": -1.5 * crouch - 0.5 * flight, "knee_r": -1.5 * crouch - 0.3 * flight, "lean": 0.35 * crouch}
        pose |= {"arm_l": 0.3 - 0.9 * crouch + 2.4 * flight, "arm_r": -0.3 - 0.9 * crouch - 2.4 * flight}
        return pose, 0.3 * flight
    elif action == "dance":
        fast = math.sin(2 * math.pi * (2.2 * time + phase))
        pose |= {"lean": 0.14 * swing, "thigh_l": 0.28 + 0.2 * swing, "thigh_r": -0.28 + 0.2 * swing}
        pose |= {"knee_l": -0.35 * abs(fast), "knee_r": 0.3 * abs(swing)}
        pose |= {"arm_l": 1.5 + 0.7 * swing, "arm_r": -1.5 + 0.7 * swing, "elbow_l": 0.8 * fast, "elbow_r": 0.8 * fast}
    return pose, 0.0


def _draw(draw: ImageDraw.ImageDraw, actor: Actor, time: float, size: tuple[int, int]) -> tuple[float, ...]:
    """Draw one actor; returns its box on the canvas."""
    width, height = size
    body = actor.height * height
    pose, lift = _pose(actor.action, time, actor.phase)
    facing = -1.0 if actor.heading < 0 else 1.0
    x = (actor.x + actor.heading * time) * width
    ground = actor.y * height
    thigh, shin, torso, upper, fore, head = (part * body for part in (0.24, 0.25, 0.31, 0.16, 0.16, 0.075))
    extent: list[tuple[float, float, float]] = []  # x, y, radius of all that is drawn

    def reach(start, length, angle):
        return start[0] + facing * length * math.sin(angle), start[1] + length * math.cos(angle)

    def limb(points, radius, colour):
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            draw.line((x0, y0, x1, y1), fill=colour, width=max(1, round(2 * radius)))
        for px, py in points:
            draw.ellipse((px - radius, py - radius, px + radius, py + radius), fill=colour)
            extent.append((px, py, radius))

    def leg(hip, side):
        knee = reach(hip, thigh, pose[f"thigh_{side}"])
        return [hip, knee, reach(knee, shin, pose[f"thigh_{side}"] + pose[f"knee_{side}"])]

    # The lower foot stands on the ground, the body hangs above it.
    lowest = max(leg((0.0, 0.0), side)[2][1] for side in "lr")
    hip = (x, ground - 0.03 * body - lowest - lift * body)
    neck = reach(hip, -torso, -pose["lean"])
    shade = 0.2 * body * (1 - lift)
    draw.ellipse((x - shade, ground - 0.16 * shade, x + shade, ground + 0.2 * shade), fill=(20, 30, 20, 90))

    def arm(side, colour, skin):
        shoulder = neck[0], neck[1] + 0.05 * body
        elbow = reach(shoulder, upper, pose[f"arm_{side}"])
        hand = reach(elbow, fore, pose[f"arm_{side}"] + pose[f"elbow_{side}"])
        limb([elbow, hand], 0.026 * body, skin)
        limb([shoulder, elbow], 0.034 * body, colour)

    def shoes(points):
        foot = points[2]
        limb([foot, (foot[0] + facing * 0.055 * body, foot[1] + 0.004 * body)], 0.028 * body, (36, 32, 36))

    dark_shirt, dark_trousers, dark_skin = (_shade(c, 0.78) for c in (actor.shirt, actor.trousers, actor.skin))
    arm("l", dark_shirt, dark_skin)
    for side, colour in (("l", dark_trousers), ("r", actor.trousers)):
        points = leg(hip, side)
        shoes(points)
        limb(points, 0.042 * body, colour)
    limb([hip, (neck[0], neck[1] + 0.04 * body)], 0.075 * body, actor.shirt)
    centre = neck[0] + facing * 0.01 * body, neck[1] - 0.085 * body
    limb([(neck[0], neck[1] - 0.01 * body), centre], 0.03 * body, dark_skin)
    limb([(centre[0] - facing * 0.012 * body, centre[1] - 0.018 * body)], head, actor.hair)
    limb([(centre[0] + facing * 0.012 * body, centre[1] + 0.012 * body)], 0.88 * head, actor.skin)
    arm("r", actor.shirt, actor.skin)
    points = np.array(extent)
    low, high = points[:, :2] - points[:, 2:], points[:, :2] + points[:, 2:]
    return (*low.min(0), *high.max(0))


def _shade(colour: Sequence[int], factor: float) -> tuple[int, ...]:
    return tuple(round(channel * factor) for channel in colour)


# Landscape


def _noise(width: int, height: int, cells: int, octaves: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in [0, 1], float32 [height, width]: octaves of random grids, enlarged and added."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells * 2**octave * height // width + 2, cells * 2**octave + 2), np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    total -= total.min()
    return total / total.max()


def _landscape(width: int, height: int, seed: int) -> list[Image.Image]:
    """Sky (opaque), hills and meadow (with alpha, wider than the picture: they drift)."""
    rng = np.random.default_rng(seed)
    wide = round(width * 1.12)
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]

    def blend(top, bottom, weight):
        return np.array(top, np.float32) * (1 - weight) + np.array(bottom, np.float32) * weight

    clouds = np.clip(_noise(width, height, 4, 5, rng) * 2.2 - 1.0, 0, 1)[..., None] * np.clip(1 - 1.7 * y, 0, 1)
    sky = blend((96, 156, 214), (226, 232, 224), np.clip(y * 1.8, 0, 1))
    layers = [Image.fromarray(blend(sky, (250, 250, 248), clouds).astype(np.uint8))]

    def ridge(base, rise, cells):
        line = _noise(wide, 8, cells, 4, rng)[0]
        return height * (base - rise * line)

    rows = np.arange(height, dtype=np.float32)[:, None]
    hills = np.zeros((height, wide, 4), np.float32)
    for base, rise, cells, near, far in (
        (0.56, 0.26, 4, (118, 146, 150), (150, 172, 172)),
        (0.60, 0.15, 7, (86, 122, 92), (122, 152, 112)),
    ):
        line = ridge(base, rise, cells)
        texture = _noise(wide, height, 40, 3, rng)[..., None]
        cover = np.clip(rows - line + 0.5, 0, 1)[..., None]  # of each pixel: a smooth edge
        hills[..., :3] = blend(hills[..., :3], blend(near, far, texture), np.where(hills[..., 3:] > 0, cover, 1))
        hills[..., 3:] = np.maximum(hills[..., 3:], 255 * cover)
    layers.append(Image.fromarray(hills.astype(np.uint8)))

    depth = np.clip((y - 0.56) / 0.44, 0, 1)
    coarse, fine = _noise(wide, height, 12, 4, rng)[..., None], _noise(wide, height, 160, 2, rng)[..., None]
    grass = blend((142, 166, 92), (84, 122, 58), depth) + 34 * (coarse - 0.5) + (18 + 26 * depth) * (fine - 0.5)
    centre = 0.30 + 0.22 * depth[:, 0] + 0.03 * np.sin(9 * depth[:, 0])
    column = np.linspace(0, 1, wide, dtype=np.float32)[None]
    edge = (0.015 + 0.16 * depth[:, 0]) * (0.92 + 0.16 * fine[..., 0])
    path = np.clip((edge - np.abs(column - centre)) * 60, 0, 1)[..., None]
    gravel = blend((206, 190, 158), (186, 164, 128), depth) + 30 * (fine - 0.5) + 14 * (coarse - 0.5)
    meadow = grass * (1 - path) + gravel * path
    alpha = np.clip((y - 0.56) * height / 4, 0, 1) * np.ones((1, wide, 1), np.float32) * 255
    layers.append(Image.fromarray(np.concatenate([meadow, alpha], 2).clip(0, 255).astype(np.uint8)))
    return layers
