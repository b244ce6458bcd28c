"""Where clips come from: a video file, or a folder of its frames as pictures."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..video import Video, VideoError, read_clip

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".ts", ".flv", ".wmv")
LATE = 1.0  # seconds after the last frame that a keyframe may be; clips clamp to that frame


class Sampling(NamedTuple):
    """Which frames a clip has: sample i is ``stride`` * (i - num_frames // 2) frames from the keyframe."""

    num_frames: int
    stride: int
    rate: float = 30.0  # frames a second that stride counts
    fps: float = 30.0  # of folders of frames
    by_frame: bool = False  # keyframes are given by the frame's number (from 0); stride counts the video's own frames


def find(root: Path, video: str) -> Path | None:
    """A folder ``video`` within ``root``, or a file of that name with a video's ending (small or capitals)."""
    path = root / video
    if path.is_dir() or (path.is_file() and path.suffix.lower() in VIDEOS):
        return path
    files = (path.with_name(path.name + ending) for suffix in VIDEOS for ending in (suffix, suffix.upper()))
    return next((file for file in files if file.is_file()), None)


def read_frames(path: Path, at: float, sampling: Sampling, prepare: Callable[[np.ndarray], object]) -> list:
    """The samples of the clip around ``at``, each as ``prepare`` makes it of uint8 [H, W, 3] RGB.

    Samples before the first or after the last frame clamp to it.

    Raises:
        VideoError: a file that is no video, or a picture that is missing or broken.
    """
    return (_from_folder if path.is_dir() else _from_file)(path, at, sampling, prepare)


def _from_file(path: Path, at: float, sampling: Sampling, prepare) -> list:
    with Video(path) as video:
        fps = video.fps if sampling.by_frame else sampling.rate
        time = at / fps if sampling.by_frame else at
        if video.duration is not None and time > video.duration + LATE:
            raise VideoError(f"{path}: has no frame at {time:g} s, it ends at {video.duration:.2f} s")
        return read_clip(
            video,
            time,
            num_frames=sampling.num_frames,
            stride=sampling.stride,
            fps=fps,
            prepare=lambda frame: prepare(frame.rgb()),
        ).samples


def _from_folder(path: Path, at: float, sampling: Sampling, prepare) -> list:
    frames = _numbered(path)
    fps = 0.0 if sampling.by_frame else sampling.fps
    centre = frames.first + (int(at) if sampling.by_frame else round(at * fps))
    if centre > frames.last + LATE * fps:
        raise VideoError(f"{path}: has no frame {centre}, the last is {frames.last}")
    stride = sampling.stride * (1 if sampling.by_frame else fps / sampling.rate)
    offsets = ((np.arange(sampling.num_frames) - sampling.num_frames // 2) * stride).round().astype(int)
    numbers = (centre + offsets).clip(frames.first, frames.last).tolist()
    prepared = {number: prepare(_picture(path / frames.name(number))) for number in dict.fromkeys(numbers)}
    return [prepared[number] for number in numbers]


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise VideoError(f"{path}: this frame is missing") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{path}: not a picture that can be read ({error})") from error


class _Numbered(NamedTuple):
    """Pictures called prefix, number, suffix."""

    prefix: str
    digits: int
    suffix: str
    first: int
    last: int

    def name(self, number: int) -> str:
        return f"{self.prefix}{number:0{self.digits}d}{self.suffix}"


@functools.lru_cache(maxsize=4096)
def _numbered(path: Path) -> _Numbered:
    """The pictures of a folder, by the number that ends their names: "video_000123.jpg" is 123."""
    found = [
        (int(match[2]), match)
        for name in os.listdir(path)
        if (match := _NUMBERED.fullmatch(name)) and match[3].lower() in PICTURES
    ]
    if not found:
        raise VideoError(f"{path}: has no numbered pictures ({', '.join(PICTURES)})")
    first, match = min(found, key=lambda pair: pair[0])
    return _Numbered(match[1], len(match[2]), match[3], first, max(number for number, _ in found))


_NUMBERED = re.compile(r"(.*?)(\d+)(\.[a-zA-Z]+)")
