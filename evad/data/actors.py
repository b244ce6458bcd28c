"""Articulated people for synthetic clips: a body of capsules in three dimensions, its pose, and what moves it.

A still actor may have any pose that a moving one passes through, and which way it faces says nothing about where it
goes, so one frame does not tell the actions apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ACTIONS = ("hold still", "walk left", "walk right", "jump", "turn", "wave", "pick up", "hand over")


class Pose(NamedTuple):
    """Numbers, or arrays of one a moment. Angles in radians, lengths in body heights; l and r are the body's own."""

    yaw: float  # where the body faces: 0 the viewer, pi/2 to the right
    lift: float = 0.0  # of the feet above the ground
    bend: float = 0.0  # of the torso, forwards
    thigh_l: float = 0.0  # forwards from straight down
    thigh_r: float = 0.0
    knee: float = 0.0  # both knees
    arm_l: float = 0.0  # away from straight down; pi is straight up
    arm_r: float = 0.0
    plane_l: float = 0.0  # in which the arm moves: 0 sideways, pi/2 forwards
    plane_r: float = 0.0
    elbow_l: float = 0.0
    elbow_r: float = 0.0


# Body heights.
THIGH, SHIN, TORSO, ARM, SHOULDER, HIP = 0.21, 0.20, 0.28, 0.19, 0.15, 0.08
NECK, HEAD = 0.135, 0.10
# name, radius, material; thin limbs vanish in small clips
BODY = (
    ("thigh_l", 0.07, 1),
    ("thigh_r", 0.07, 1),
    ("shin_l", 0.055, 1),
    ("shin_r", 0.055, 1),
    ("torso", 0.12, 0),
    ("emblem", 0.085, 4),
    ("hair", HEAD, 3),
    ("face", 0.085, 2),
    ("sleeve_l", 0.07, 0),
    ("sleeve_r", 0.07, 0),
    ("hand_l", 0.07, 2),
    ("hand_r", 0.07, 2),
)
NAMES = tuple(name for name, _, _ in BODY)
RADII = np.array([radius for _, radius, _ in BODY], np.float32)
MATERIALS = np.array([material for _, _, material in BODY])  # shirt, trousers, skin, hair, emblem


def skeleton(pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Ends of every capsule of BODY, [F, parts, 3] each: to the right, up and towards the viewer, from the ground.

    The lower foot stands on the ground, or ``lift`` above it.
    """
    pose = Pose(*np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, np.float64)) for value in pose)))

    def vector(forward, side, up):
        return np.stack(np.broadcast_arrays(forward, side, up), -1)

    def leg(hip, angle):
        knee = hip + THIGH * vector(np.sin(angle), 0, -np.cos(angle))
        angle = angle - pose.knee
        return knee, knee + SHIN * vector(np.sin(angle), 0, -np.cos(angle))

    def arm(shoulder, side, angle, plane, elbow):
        def along(angle):
            return ARM * vector(np.sin(angle) * np.sin(plane), side * np.sin(angle) * np.cos(plane), -np.cos(angle))

        middle = shoulder + along(angle)
        return middle, middle + along(angle + elbow)

    zero = np.zeros_like(pose.yaw)
    hips = [vector(zero, side * HIP, 0) for side in (1, -1)]
    legs = [leg(hip, angle) for hip, angle in zip(hips, (pose.thigh_l, pose.thigh_r), strict=True)]
    spine = vector(np.sin(pose.bend), 0, np.cos(pose.bend))
    ahead = vector(np.cos(pose.bend), 0, -np.sin(pose.bend))
    waist, chest = 0.04 * spine, TORSO * spine
    shoulders = [0.96 * chest + vector(zero, side * SHOULDER, 0) for side in (1, -1)]
    arms = [
        arm(shoulder, side, *angles)
        for shoulder, side, angles in zip(
            shoulders,
            (1, -1),
            ((pose.arm_l, pose.plane_l, pose.elbow_l), (pose.arm_r, pose.plane_r, pose.elbow_r)),
            strict=True,
        )
    ]
    head = chest + NECK * spine
    capsules = {
        "torso": (waist, 0.9 * chest),
        "emblem": (0.45 * chest + 0.06 * ahead, 0.75 * chest + 0.06 * ahead),
        "hair": (head, head),
        "face": (head + 0.045 * ahead, head + 0.045 * ahead - 0.01 * spine),
    }
    for index, side in enumerate("lr"):
        knee, foot = legs[index]
        elbow, hand = arms[index]
        capsules |= {f"thigh_{side}": (hips[index], knee), f"shin_{side}": (knee, foot)}
        capsules |= {f"sleeve_{side}": (shoulders[index], elbow), f"hand_{side}": (elbow, hand)}
    ends = np.stack([np.stack(capsules[name], -2) for name in NAMES], 1)  # [F, parts, 2, (forward, side, up)]
    lowest = np.minimum(legs[0][1][:, 2], legs[1][1][:, 2]) - 0.055
    forward, side, up = np.moveaxis(ends, -1, 0)
    sin, cos = np.sin(pose.yaw)[:, None, None], np.cos(pose.yaw)[:, None, None]
    up = up + (pose.lift - lowest)[:, None, None]
    points = np.stack([forward * sin + side * cos, up, forward * cos - side * sin], -1)
    return points[:, :, 0], points[:, :, 1]


class Actor(NamedTuple):
    """One person. Lengths are picture heights, ``x`` and ``ground`` from the top left corner."""

    actions: tuple[str, ...]  # of ACTIONS
    x: float  # at time 0
    ground: float  # where the feet stand
    height: float
    base: Pose  # what no action moves
    colours: np.ndarray  # [5, 3]: shirt, trousers, skin, hair, emblem
    speed: float = 0.0  # of walking, to the right, a second
    rate: float = 1.0  # cycles a second of what the legs or the body do
    phase: float = 0.0  # cycles at time 0
    wave_rate: float = 1.0
    wave_phase: float = 0.0
    waving: str = "r"  # arms that wave: "l", "r" or "lr"
    gives: bool = False  # hands over first (the other takes)
    thing: str = ""  # at rest: in the "hand", on the "floor", or none
    thing_colour: tuple[float, float, float] = (0, 0, 0)

    def at(self, time: np.ndarray) -> np.ndarray:
        """Where the feet are along x at each time."""
        return self.x + self.speed * time

    def cycle(self, time: np.ndarray) -> np.ndarray:
        """Part of the present cycle that is over, in [0, 1)."""
        return (self.rate * time + self.phase) % 1.0

    def pose(self, time: np.ndarray) -> Pose:
        """The pose at each time [F], seconds."""
        base, cycle = self.base, self.cycle(time)
        moved = {"yaw": np.full_like(time, base.yaw)}
        if self.speed:
            stride = 0.65 * np.sin(2 * np.pi * cycle)
            moved |= {"thigh_l": stride, "thigh_r": -stride, "knee": 0.25 + 0.25 * np.cos(4 * np.pi * cycle)}
        if "jump" in self.actions:
            rise = np.sin(np.pi * cycle)
            moved |= {"lift": 0.38 * rise, "knee": 1.2 * (1 - rise) ** 2, "thigh_l": 0.6 * (1 - rise) ** 2}
            moved |= {"thigh_r": moved["thigh_l"]}
        if "turn" in self.actions:
            direction = 1 if self.gives else -1
            moved["yaw"] = base.yaw + direction * 2 * np.pi * (self.rate * time + self.phase)
        if "pick up" in self.actions:
            moved |= stoop(0.5 - 0.5 * np.cos(2 * np.pi * cycle))
        if "hand over" in self.actions:
            moved |= reach(0.5 - 0.5 * np.cos(4 * np.pi * cycle))
        if "wave" in self.actions:
            swing = np.sin(2 * np.pi * (self.wave_rate * time + self.wave_phase))
            for side in self.waving:
                moved |= {f"arm_{side}": 2.1 + 1.0 * swing, f"elbow_{side}": 0.2 + 0.35 * swing}
        return base._replace(**moved)

    def thing_at(self, time: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Where the thing is, [F, 2] as the hands ``left`` and ``right`` are given; NaN where there is none."""
        if "hand over" in self.actions:
            cycle = self.cycle(time)
            own = ((cycle < 0.25) | (cycle >= 0.75)) == self.gives
            return np.where(own[:, None], (left + right) / 2, np.nan)
        hand = right
        if "pick up" in self.actions or self.thing == "floor":
            low = skeleton(self.base._replace(**stoop(1.0)))[1][0, NAMES.index("hand_r"), :2]
            floor = np.stack([self.at(time) + self.height * low[0], np.full_like(time, self.height * low[1])], -1)
            if self.thing == "floor" and "pick up" not in self.actions:
                return floor
            return np.where((self.cycle(time) < 0.5)[:, None], floor, hand)
        return hand if self.thing == "hand" else np.full_like(hand, np.nan)


def stoop(depth) -> dict:
    """Bend down to the floor, ``depth`` from 0 (upright) to 1."""
    return {
        "bend": 0.15 + 1.35 * depth,
        "knee": 1.1 * depth,
        "thigh_l": 0.75 * depth,
        "thigh_r": 0.75 * depth,
        "arm_r": 0.9 - 0.7 * depth,
        "plane_r": np.pi / 2,
        "elbow_r": 0.6 * (1 - depth),
    }


def reach(depth) -> dict:
    """Stretch both arms forwards, ``depth`` from 0 (to the chest) to 1."""
    angle, elbow = 0.1 + 1.35 * depth, 1.9 * (1 - depth)
    return {
        "arm_l": angle,
        "arm_r": angle,
        "elbow_l": elbow,
        "elbow_r": elbow,
        "plane_l": 1.35,
        "plane_r": 1.35,
        "bend": 0.25 * depth,
    }
