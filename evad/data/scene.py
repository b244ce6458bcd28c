"""Scenes of synthetic clips: who does what where, before which backdrop; rendered at any size and any time.

Time 0 is the keyframe; lengths are picture heights, so one scene can be rendered at any resolution.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .actors import MATERIALS, NAMES, RADII, Actor, Pose, reach, skeleton, stoop
from .capsules import paint


class Thing(NamedTuple):
    """A distractor: a rigid bundle of capsules that drifts and spins and is nobody."""

    position: np.ndarray  # [2] at time 0
    velocity: np.ndarray  # [2] a second
    spin: float  # radians a second
    ends: np.ndarray  # [P, 2, 2]
    radius: np.ndarray  # [P]
    colour: np.ndarray  # [P, 3]


class Backdrop(NamedTuple):
    """Smooth noise between three colours that fills a square of SPAN picture heights and repeats."""

    SPAN = 1.5

    octaves: tuple[np.ndarray, ...]  # [2, n, n] of rising n and falling amplitude
    palette: np.ndarray  # [3, 3]

    def tile(self, height: int) -> np.ndarray:
        """The square for pictures of ``height`` pixels, float32 [n, n, 3]."""
        size = round(self.SPAN * height)
        first, second = sum(_enlarge(_enlarge(grid, 1, size), 2, size) for grid in self.octaves)[..., None].clip(0, 1)
        low, middle, high = self.palette
        return low + first * (middle - low) + second * (high - middle) * first


def _enlarge(grid: np.ndarray, axis: int, size: int) -> np.ndarray:
    """``grid``, which repeats, enlarged along an axis in smooth steps."""
    cells = grid.shape[axis]
    place = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    low = place.astype(int)
    part = place - low
    part = (part * part * (3 - 2 * part)).reshape(-1, *[1] * (grid.ndim - 1 - axis))
    below, above = grid.take(low % cells, axis), grid.take((low + 1) % cells, axis)
    return below + part * (above - below)


class Scene(NamedTuple):
    actors: tuple[Actor, ...]  # nearer ones (larger ``ground``) later
    things: tuple[Thing, ...]
    posts: np.ndarray  # [n, 2] left and right edge of what stands in front, at time 0
    post_colours: np.ndarray  # [n, 3]
    backdrop: Backdrop
    drift: np.ndarray  # [2] of the backdrop a second
    shake: np.ndarray  # [2, 3, 3] for x and y: amplitude, cycles a second, phase of three waves
    grain: np.ndarray  # int8: noise, read from a place that depends on the time

    def camera(self, time: np.ndarray) -> np.ndarray:
        """Where the shaking camera shows what stands at the origin, [F, 2]."""
        amplitude, rate, phase = np.moveaxis(self.shake, -1, 0)  # [2, waves]
        return (amplitude * np.sin(2 * np.pi * (rate * time[:, None, None] + phase))).sum(-1)

    def figures(self, time: np.ndarray) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
        """Capsules of each actor and the boxes around them.

        Returns:
            For each actor (start [F, P, 2], end [F, P, 2], radius [F, P], colour [F, P, 3]), farther parts first; and
            boxes [F, actors, 4]: x1, y1, x2, y2 of the body, which what it carries is no part of.
        """
        camera = self.camera(time)
        figures, boxes = [], []
        for actor in self.actors:
            start, end = skeleton(actor.pose(time))
            feet = np.stack([actor.at(time), np.full_like(time, actor.ground)], -1) + camera  # [F, 2]
            depth = (start[..., 2] + end[..., 2]) / 2
            start, end = (_place(points[..., :2], feet, actor.height) for points in (start, end))
            radius = np.broadcast_to(RADII * actor.height, depth.shape)
            low, high = np.minimum(start, end) - radius[..., None], np.maximum(start, end) + radius[..., None]
            boxes.append(np.concatenate([low.min(1), high.max(1)], -1))
            colour = np.broadcast_to(actor.colours[MATERIALS], (*depth.shape, 3))
            colour = colour * (0.9 + 0.5 * depth.clip(-0.4, 0.2))[..., None]  # the far side lies in the shade
            hands = [end[:, NAMES.index(f"hand_{side}")] for side in "lr"]
            thing = self._thing(actor, time, feet, hands)
            start, end = (np.concatenate([points, thing[:, None]], 1) for points in (start, end))
            radius = np.concatenate([radius, np.full((len(time), 1), 0.095 * actor.height)], 1)
            own = np.broadcast_to(np.array(actor.thing_colour), (len(time), 1, 3))
            colour = np.concatenate([colour, own], 1)
            order = np.concatenate([depth, np.full((len(time), 1), 1.0)], 1).argsort(1, kind="stable")
            start, end, colour = (np.take_along_axis(a, order[..., None], 1) for a in (start, end, colour))
            figures.append((start, end, np.take_along_axis(radius, order, 1), colour))
        return figures, np.stack(boxes, 1) if boxes else np.zeros((len(time), 0, 4))

    def _thing(self, actor: Actor, time: np.ndarray, feet: np.ndarray, hands: list[np.ndarray]) -> np.ndarray:
        """Where what the actor carries is, [F, 2] in the picture."""
        bodily = [np.stack([actor.at(time), np.zeros_like(time)], -1) + (hand - feet) * (1, -1) for hand in hands]
        x, up = np.moveaxis(actor.thing_at(time, *bodily), -1, 0)
        return np.stack([x - actor.at(time) + feet[:, 0], feet[:, 1] - up], -1)

    def boxes(self, time: float = 0.0) -> np.ndarray:
        """Boxes of the actors at one time, [actors, 4], x1, y1, x2, y2 in picture heights, unclipped."""
        return self.figures(np.array([time]))[1][0]

    def render(self, times: np.ndarray, height: int, width: int) -> np.ndarray:
        """Frames at ``times`` (seconds), uint8 [F, H, W, 3]."""
        time = np.asarray(times, np.float64)
        canvas = self._backdrop(time, height, width)
        capsules = [self._drifting(time)] if self.things else []
        capsules += self.figures(time)[0]
        if capsules:
            start, end, radius, colour = (np.concatenate(part, 1) for part in zip(*capsules, strict=True))
            paint(canvas, start * height, end * height, radius * height, colour)
        offset = self.camera(time)[:, 0] * height
        for (left, right), colour in zip(self.posts * height, self.post_colours, strict=True):
            for frame, shift in zip(canvas, offset, strict=True):
                x1, x2 = (round(x + shift) for x in (left, right))
                frame[:, max(x1, 0) : max(x2, 0)] = colour
        for frame, moment in zip(canvas, time, strict=True):
            place = round(moment * 240) * 7919 % 4093
            frame += np.resize(self.grain[place:], frame.size).reshape(frame.shape)
        return canvas.clip(0, 255, out=canvas).astype(np.uint8)

    def _backdrop(self, time: np.ndarray, height: int, width: int) -> np.ndarray:
        tile = self.backdrop.tile(height)
        size = len(tile)
        tile = np.pad(tile, ((0, height), (0, width), (0, 0)), mode="wrap")
        offset = -np.rint((self.camera(time) + self.drift * time[:, None]) * height).astype(int) % size
        return np.stack([tile[y : y + height, x : x + width] for x, y in offset.tolist()])

    def _drifting(self, time: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = []
        for thing in self.things:
            angle = thing.spin * time
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # [2, 2, F]
            centre = thing.position + thing.velocity * time[:, None] + self.camera(time)
            ends = np.einsum("ijf,pej->fpei", turn, thing.ends) + centre[:, None, None]
            shape = ends.shape[:2]
            colour = np.broadcast_to(thing.colour, (*shape, 3))
            parts.append((ends[:, :, 0], ends[:, :, 1], np.broadcast_to(thing.radius, shape), colour))
        return tuple(np.concatenate(part, 1) for part in zip(*parts, strict=True))


def _place(points: np.ndarray, feet: np.ndarray, height: float) -> np.ndarray:
    """Points of a body [F, P, (right, up)] in the picture."""
    return feet[:, None] + points * (height, -height)


# Random scenes

WEIGHTS = {  # how often a group of actors has these actions
    ("hold still",): 1.5,
    ("walk left",): 0.8,
    ("walk right",): 0.8,
    ("walk left", "wave"): 0.25,
    ("walk right", "wave"): 0.25,
    ("jump",): 0.9,
    ("jump", "wave"): 0.2,
    ("turn",): 1.0,
    ("wave",): 1.0,
    ("pick up",): 1.1,
    ("hand over",): 0.75,  # two actors
    ("hold still", "hold still"): 0.3,  # two who only seem to
}


def random_scene(rng: np.random.Generator, aspect: float = 1.0) -> Scene:
    """A scene for pictures ``aspect`` times as wide as high: one to three actors, distractors, perhaps a post."""
    kinds, weights = tuple(WEIGHTS), np.array(list(WEIGHTS.values()))
    actors: list[Actor] = []
    number = rng.choice([1, 2, 3], p=[0.45, 0.45, 0.1])
    palette = (rng.uniform(40, 215) + rng.uniform(-50, 50, (3, 1)) + rng.uniform(-28, 28, (3, 3))).clip(0, 255)
    while len(actors) < number:
        actions = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        group = _pair if actions in (("hand over",), ("hold still", "hold still")) else _single
        for _ in range(20):
            more = group(rng, actions, aspect, palette.mean(0))
            if not _crowded([*actors, *more]):
                actors += more
                break
        else:
            number -= 1
    actors.sort(key=lambda actor: actor.ground)
    posts = rng.random(rng.choice(3, p=[0.8, 0.15, 0.05])) * aspect
    cells = (3, 6, 13, 29)
    noise = rng.random((2 * sum(n * n for n in cells),), np.float32) - 0.5
    octaves, used = [], 0
    for n, amplitude in zip(cells, rng.uniform(0.25, 0.7, len(cells)), strict=True):
        octaves.append((noise[used : used + 2 * n * n].reshape(2, n, n) * 1.6 * amplitude + 0.14).astype(np.float32))
        used += 2 * n * n
    waves = [rng.uniform(0, 0.005, (2, 3)), rng.uniform(0.3, 3.0, (2, 3)), rng.random((2, 3))]
    return Scene(
        tuple(actors),
        tuple(_thing(rng, aspect) for _ in range(rng.choice(3, p=[0.45, 0.4, 0.15]))),
        np.stack([posts, posts + rng.uniform(0.04, 0.08, len(posts))], -1),
        rng.uniform(20, 200, (len(posts), 3)),
        Backdrop(tuple(octaves), palette.astype(np.float32)),
        rng.uniform(-0.12, 0.12, 2) * (rng.random() < 0.7),
        np.stack(waves, -1),
        rng.integers(-7, 8, 40_000, np.int8),
    )


def _colours(rng: np.random.Generator, backdrop: np.ndarray) -> np.ndarray:
    """Shirt, trousers, skin, hair, emblem: clothes stand out from ``backdrop``, the emblem from the shirt."""
    clothes = rng.uniform(20, 240, (16, 3))
    clothes = clothes[(-np.abs(clothes - backdrop).mean(1).clip(max=60)).argsort(kind="stable")]
    shirt, trousers = clothes[:2]
    skin = np.array([235, 190, 155]) * rng.uniform(0.45, 1.05)
    emblem = np.where(shirt.mean() < 130, 250, 15) + rng.uniform(-15, 5, 3)
    return np.stack([shirt, trousers, skin, rng.uniform(10, 90, 3), emblem]).clip(0, 255)


def _base(rng: np.random.Generator, yaw: float) -> Pose:
    """A pose from all that actions pass through, so that no single one gives an action away."""
    pose = {"yaw": yaw, "knee": rng.uniform(0, 0.5)}
    stride = 0.65 * np.sin(2 * np.pi * rng.random())
    pose |= {"thigh_l": stride, "thigh_r": -stride}
    for side, out in (("l", 1), ("r", -1)):
        raised = rng.random() < 0.4
        pose[f"arm_{side}"] = 2.1 + 1.0 * np.sin(2 * np.pi * rng.random()) if raised else rng.uniform(0.1, 1.3)
        pose[f"elbow_{side}"] = rng.uniform(-0.1, 0.6)
        # sideways in the picture, where arms can be seen whichever way the body faces
        pose[f"plane_{side}"] = out * yaw + rng.uniform(-0.5, 0.5) + np.pi * (rng.random() < 0.3)
    if (kind := rng.random()) < 0.15:
        pose |= stoop(rng.random())
    elif kind < 0.25:
        pose |= reach(rng.random())
    return Pose(**pose)


def _sideways(rng: np.random.Generator) -> float:
    """A yaw from which bending and reaching can be seen."""
    return rng.choice([-1, 1]) * rng.uniform(0.3, 0.6) * np.pi


def _single(rng: np.random.Generator, actions: tuple[str, ...], aspect: float, backdrop: np.ndarray) -> list[Actor]:
    yaw = _sideways(rng) if "pick up" in actions or rng.random() < 0.4 else rng.uniform(-np.pi, np.pi)
    base = _base(rng, yaw)
    rates = {"walk": (0.8, 1.2), "jump": (1.0, 1.4), "turn": (0.6, 0.9), "pick": (0.55, 0.75)}
    verb = actions[0].split()[0]
    height = rng.uniform(0.57, 0.72)
    direction = {"walk left": -1, "walk right": 1}.get(actions[0], 0)
    actor = Actor(
        actions,
        x=rng.uniform(0.2, aspect - 0.2),
        ground=rng.uniform(height + 0.04, 0.98),
        height=height,
        base=base,
        colours=_colours(rng, backdrop),
        speed=direction * rng.uniform(0.2, 0.36),
        rate=rng.uniform(*rates.get(verb, (1.0, 1.0))),
        phase=rng.random(),
        wave_rate=rng.uniform(1.0, 1.5),
        wave_phase=rng.random(),
        waving=rng.choice(["l", "r", "lr"], p=[0.15, 0.15, 0.7]),
        gives=bool(rng.random() < 0.5),
        thing=str(rng.choice(["", "hand", "floor"], p=[0.5, 0.25, 0.25])),
        thing_colour=tuple(rng.choice(_BRIGHT)),
    )
    if direction and actor.thing == "floor":
        actor = actor._replace(thing="hand")
    if actor.actions == ("hold still",) and rng.random() < 0.3:  # as if in mid-air
        actor = actor._replace(base=base._replace(lift=0.38 * np.sin(np.pi * rng.random())))
    return [actor]


_BRIGHT = np.array([[250, 220, 40], [240, 70, 60], [70, 220, 90], [80, 150, 250], [250, 130, 220], [245, 245, 245]])


def _pair(rng: np.random.Generator, actions: tuple[str, ...], aspect: float, backdrop: np.ndarray) -> list[Actor]:
    """Two actors who face each other, close enough to hand a thing over."""
    height = rng.uniform(0.54, 0.68)
    reached = 0.88 * height / 2
    x, ground = rng.uniform(0.12 + reached, aspect - 0.12 - reached), rng.uniform(height + 0.04, 0.98)
    rate, phase, depth = rng.uniform(0.4, 0.6), rng.random(), rng.random()
    colour, first = tuple(rng.choice(_BRIGHT)), rng.integers(2)
    pair = []
    for index, side in enumerate((1, -1)):
        base = _base(rng, side * rng.uniform(0.38, 0.55) * np.pi)
        if actions == ("hold still", "hold still"):
            base = base._replace(**reach(depth))
        pair.append(
            Actor(
                actions[:1],
                x=x - side * reached,
                ground=ground + rng.uniform(-0.01, 0.01),
                height=height,
                base=base._replace(bend=0.0),
                colours=_colours(rng, backdrop),
                rate=rate,
                phase=phase,
                gives=index == first,
                thing="hand" if index == first else "",
                thing_colour=colour,
            )
        )
    return pair


def _crowded(actors: list[Actor]) -> bool:
    """Whether two actors of different groups stand in the same place at time 0."""
    boxes = [(a.x - 0.26 * a.height, a.ground - a.height, a.x + 0.26 * a.height, a.ground) for a in actors]
    for index, a in enumerate(boxes):
        for b in boxes[:index]:
            shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            if shared > 0.08 * min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)):
                return True
    return False


def _thing(rng: np.random.Generator, aspect: float) -> Thing:
    parts = rng.integers(1, 4)
    return Thing(
        rng.random(2) * (aspect, 1),
        rng.uniform(-0.25, 0.25, 2),
        rng.uniform(-3, 3),
        rng.uniform(-0.09, 0.09, (parts, 2, 2)),
        rng.uniform(0.015, 0.05, parts),
        rng.uniform(20, 240, (parts, 3)),
    )
