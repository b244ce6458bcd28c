"""Pictures: boxes with labels on a frame; which tokens each pruning layer keeps (paper, Figures 4 and 11); what each
actor attends to (Figure 12).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#ffb000", "#3fb8ff", "#ff5c8a", "#5ee07a", "#c58cff", "#ff7f32", "#2ee6d0", "#f4f06a", "#ff8ff0", "#9db4ff")
PAPER, INK, FAINT, ACCENT = "#ffffff", "#1d2430", "#69717f", "#e8590c"
DROPPED = np.array((236, 238, 242), np.float32)  # what a dropped token fades to
FADE = 0.86

PANEL = (16, 20, 28)
LEGIBLE = 480  # pixels of the short side from which boxes with text can be read


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries, ``size`` pixels high."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def text_width(text: str, face: ImageFont.FreeTypeFont) -> int:
    return round(face.getlength(text))


def shorten(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """``text``, or its beginning and "…" so that it fits ``width`` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


# Boxes and labels


class Label(NamedTuple):
    """One person: box in parts of the picture [x1, y1, x2, y2], person score, actions with scores, best first."""

    box: Sequence[float]
    score: float
    actions: Sequence[tuple[str, float]]


def legible_scale(width: int, height: int) -> int:
    """Whole factor that a small picture is enlarged by before text is drawn on it."""
    return max(1, -(-LEGIBLE // min(width, height)))


class Overlay:
    """Boxes and labels of one keyframe, drawn once and laid over each frame that shows them."""

    def __init__(self, width: int, height: int, labels: Sequence[Label], note: str = ""):
        """
        Args:
            width, height: Pixels of the pictures.
            labels: Whom to draw; the first are placed first, and never hidden by later ones.
            note: A line at the bottom.
        """
        self._image = Image.new("RGBA", (width, height))
        draw = ImageDraw.Draw(self._image)
        size = max(12, round(min(width, height) / 36))
        line = max(2, round(min(width, height) / 180))
        boxes = [_pixels(label.box, width, height, line) for label in labels]
        for index, box in reversed(list(enumerate(boxes))):
            draw.rectangle(box, outline=(0, 0, 0, 150), width=line + 2)
            draw.rectangle(box, outline=COLOURS[index % len(COLOURS)], width=line)
        taken: list[tuple[float, ...]] = []
        if note:
            taken.append(_note(draw, note, width, height, size))
        for index, (label, box) in enumerate(zip(labels, boxes, strict=True)):
            others = boxes[:index] + boxes[index + 1 :]
            place = _panel(draw, label, box, others, COLOURS[index % len(COLOURS)], size, (width, height), taken)
            if place is not None:
                taken.append(place)

    def on(self, image: np.ndarray) -> np.ndarray:
        """``image`` (uint8 [height, width, 3]) with the overlay on it."""
        picture = Image.fromarray(image)
        picture.paste(self._image, (0, 0), self._image)
        return np.asarray(picture)


def _pixels(box, width, height, line) -> tuple[float, float, float, float]:
    """A box on the canvas, in order and at least as large as its outline."""
    x1, x2 = sorted(min(max(x, 0.0), 1.0) * (width - 1) for x in (box[0], box[2]))
    y1, y2 = sorted(min(max(y, 0.0), 1.0) * (height - 1) for y in (box[1], box[3]))
    return x1, y1, max(x2, min(x1 + 2 * line, width - 1)), max(y2, min(y1 + 2 * line, height - 1))


def _note(draw, note, width, height, size) -> tuple[float, ...]:
    face = font(max(11, round(0.8 * size)))
    note = shorten(note, face, width - 2 * size)
    pad = size // 3
    box = (0, height - face.size - 2 * pad, text_width(note, face) + 3 * pad, height)
    draw.rectangle(box, fill=(0, 0, 0, 170))
    draw.text((1.5 * pad, (box[1] + box[3]) / 2), note, font=face, fill="#e8eaee", anchor="lm")
    return box


def _panel(draw, label: Label, own, others, colour, size, canvas, taken) -> tuple[float, ...] | None:
    """Draw a person's label by the box ``own``: on no other label, and over other people as little as possible.

    With fewer lines, or not at all, where there is no room.
    """
    width, height = canvas
    face, bold = font(size), font(size, bold=True)
    pad, row = size // 3, round(1.4 * size)
    score_width = text_width("0.00", face)
    widest = min(0.46 * width, 18 * size) - score_width - 4 * pad
    rows = [("person", label.score, bold, colour)]
    rows += [(shorten(brief(name), face, widest), score, face, "#ffffff") for name, score in label.actions]
    for shown in sorted({len(rows), min(2, len(rows)), 1}, reverse=True):
        body = max(text_width(name, writer) for name, _, writer, _ in rows[:shown])
        panel_width, panel_height = round(body + score_width + 5 * pad), row * shown + pad
        places = []
        for x, y in _corners(own, panel_width, panel_height, row):
            x = round(min(max(x, 0), max(width - panel_width, 0)))
            y = round(min(max(y, 0), max(height - panel_height, 0)))
            place = (x, y, x + panel_width, y + panel_height)
            if place[2] <= width and place[3] <= height and not any(_overlap(place, other) for other in taken):
                places.append(place)
        if places:
            place = min(
                places, key=lambda place: sum(_overlap(place, other) for other in others)
            )  # the first of equals
            break
    else:
        return None
    x, y, right, below = place
    draw.rectangle((x, y, right - 1, below - 1), fill=(*PANEL, 215))
    draw.rectangle((x, y, x + max(2, pad // 2), below - 1), fill=colour)
    bar_colour = tuple(round(0.62 * ground + 0.38 * ink) for ground, ink in zip(PANEL, _rgb(colour), strict=True))
    for index, (name, score, writer, ink) in enumerate(rows[:shown]):
        middle = y + pad / 2 + row * (index + 0.5)
        if index:  # the score as a bar behind the name
            reach = (right - x - 2 * pad) * min(max(score, 0.0), 1.0)
            bar = (x + pad, middle - 0.44 * row, x + pad + reach, middle + 0.44 * row)
            draw.rectangle(bar, fill=(*bar_colour, 235))
        draw.text((x + 1.8 * pad, middle), name, font=writer, fill=ink, anchor="lm")
        draw.text((right - 1.5 * pad, middle), f"{score:.2f}", font=face, fill="#e4e7ec", anchor="rm")
    return place


def _corners(box, width, height, step) -> list[tuple[float, float]]:
    """Top left corners for a label of this size: above, below and beside the box, then within it."""
    x1, y1, x2, y2 = box
    return [
        *((x1, y1 - height), (x2 - width, y1 - height), (x1, y2), (x2 - width, y2)),
        *((x2, y1), (x1 - width, y1), (x2, y2 - height), (x1 - width, y2 - height)),
        *((x, y) for y in np.arange(y1, max(y2 - height, y1) + 1, step) for x in (x1, x2 - width)),
    ]


def brief(name: str) -> str:
    """A class name without its examples: "ride (e.g., a bike, a car, a horse)" is "ride"."""
    return re.sub(r"\s*\(e\.g\.,[^)]*\)", "", name)


def _overlap(a, b) -> float:
    """Pixels that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


# Kept tokens


class Pruning(NamedTuple):
    """What a model kept of one clip.

    frames: the clip as the model saw it, before normalisation and padding, T_in x uint8 [h, w, 3]. times: of each frame
    from the keyframe, seconds. tubelet: frames a token spans; patch: pixels it spans. grid: (T, Gh, Gw) cells, padding
    included. keyframe: its index in T. layers: (name, positions kept) for every layer that prunes, first to last.
    """

    frames: Sequence[np.ndarray]
    times: Sequence[float]
    tubelet: int
    patch: int
    grid: tuple[int, int, int]
    keyframe: int
    layers: Sequence[tuple[str, np.ndarray]]

    def kept(self, layer: int) -> np.ndarray:
        """Which cells a layer keeps, bool [T, Gh, Gw]."""
        mask = np.zeros(int(np.prod(self.grid)), bool)
        mask[np.asarray(self.layers[layer][1])] = True
        return mask.reshape(self.grid)

    @property
    def total(self) -> int:
        return int(np.prod(self.grid))


def fade(image: np.ndarray, kept: np.ndarray, patch: int) -> np.ndarray:
    """``image`` with its dropped cells faded out; ``kept`` is bool [Gh, Gw], cells of ``patch`` pixels."""
    height, width = image.shape[:2]
    inside = kept.repeat(patch, 0).repeat(patch, 1)[:height, :width, None]
    return np.where(inside, image, image * (1 - FADE) + DROPPED * FADE).astype(np.uint8)


def _heads(draw: ImageDraw.ImageDraw, pruning: Pruning, left: Sequence[int], tile_width: int, y: int) -> None:
    """Over each column when it is."""
    for t, x in enumerate(left):
        is_key = t == pruning.keyframe
        name = "keyframe" if is_key else f"{pruning.times[t * pruning.tubelet]:+.2f} s".replace("-", "−")
        draw.text((x + tile_width / 2, y), name, font=font(15, is_key), fill=ACCENT if is_key else FAINT, anchor="mm")


def pruning_figure(pruning: Pruning, title: str, subtitle: str = "") -> Image.Image:
    """Time slices across, the input and every pruning layer down; dropped tokens faded, the keyframe outlined."""
    T = pruning.grid[0]
    tile_width = max(120, min(260, 1500 // T))
    height, width = pruning.frames[0].shape[:2]
    tile_height = round(tile_width * height / width)
    margin, gap, label_width, head, foot = 28, 10, 214, 128, 66
    row_height = max(tile_height + 30, 84)
    rows = 1 + len(pruning.layers)
    size = margin * 2 + label_width + T * (tile_width + gap) - gap, head + rows * row_height + foot
    figure = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((margin, 22), shorten(title, font(26, True), size[0] - 2 * margin), font=font(26, True), fill=INK)
    draw.text((margin, 58), shorten(subtitle, font(16), size[0] - 2 * margin), font=font(16), fill=FAINT)

    left = [margin + label_width + t * (tile_width + gap) for t in range(T)]
    _heads(draw, pruning, left, tile_width, head - 14)
    for row in range(rows):
        top = head + row * row_height
        kept = None if row == 0 else pruning.kept(row - 1)
        if row == 0:
            lines = ["input", f"{pruning.total} tokens", f"{T} × {pruning.grid[1]} × {pruning.grid[2]}"]
        else:
            lines = [pruning.layers[row - 1][0], f"{kept.sum()} of {pruning.total}", f"tokens kept ({kept.mean():.0%})"]
        for index, text in enumerate(lines):
            y = top + tile_height / 2 + (index - (len(lines) - 1) / 2) * 23
            draw.text((margin, y), text, font=font(19 if index == 0 else 15, index == 0), fill=INK, anchor="lm")
        for t in range(T):
            image = pruning.frames[t * pruning.tubelet]
            if kept is not None:
                image = fade(image, kept[t], pruning.patch)
            tile = Image.fromarray(image).resize((tile_width, tile_height), Image.Resampling.LANCZOS)
            figure.paste(tile, (left[t], top))
            if kept is not None:
                text = f"{kept[t].sum()} of {kept[t].size}"
                place = (left[t] + tile_width / 2, top + tile_height + 11)
                draw.text(place, text, font=font(12), fill=FAINT, anchor="mm")
    x = left[pruning.keyframe]
    outline = (x - 5, head - 3, x + tile_width + 4, head + rows * row_height - 7)
    draw.rounded_rectangle(outline, radius=6, outline=ACCENT, width=3)
    _legend(figure, margin, size[1] - foot + 22, pruning)
    return figure


def _legend(figure: Image.Image, x: int, y: int, pruning: Pruning) -> None:
    draw = ImageDraw.Draw(figure)
    sample = pruning.frames[pruning.keyframe * pruning.tubelet]
    side = min(2 * pruning.patch, *sample.shape[:2])
    top, left = (sample.shape[0] - side) * 2 // 3, (sample.shape[1] - side) // 2
    patch = np.ascontiguousarray(sample[top : top + side, left : left + side])
    dropped = fade(patch, np.zeros((2, 2), bool), pruning.patch)
    entries = (
        (patch, "kept token"),
        (dropped, "dropped token: no later layer sees it"),
        (None, "keyframe, where people are found: all its tokens are kept"),
    )
    for image, text in entries:
        if image is None:
            draw.rounded_rectangle((x, y, x + 22, y + 22), radius=4, outline=ACCENT, width=3)
        else:
            figure.paste(Image.fromarray(image).resize((22, 22)), (x, y))
            draw.rectangle((x, y, x + 22, y + 22), outline="#b8bec8")
        draw.text((x + 32, y + 11), text, font=font(15), fill=INK, anchor="lm")
        x += 32 + text_width(text, font(15)) + 36


def pruning_animation(pruning: Pruning, title: str, subtitle: str = "") -> Iterator[np.ndarray]:
    """The same as moving pictures: the input and every pruning layer side by side, one picture a frame of the clip."""
    height, width = pruning.frames[0].shape[:2]
    columns = 1 + len(pruning.layers)
    tile_width = max(240, min(420, 1680 // columns))
    tile_height = round(tile_width * height / width)
    margin, gap, head = 24, 12, 108
    size = margin * 2 + columns * (tile_width + gap) - gap, head + tile_height + 76
    masks = [pruning.kept(layer) for layer in range(len(pruning.layers))]
    names = ["input", *(name for name, _ in pruning.layers)]
    counts = [
        f"{pruning.total} tokens",
        *(f"{mask.sum()} of {pruning.total} kept ({mask.mean():.0%})" for mask in masks),
    ]
    base = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), PAPER)
    draw = ImageDraw.Draw(base)
    draw.text((margin, 18), shorten(title, font(22, True), size[0] - 2 * margin), font=font(22, True), fill=INK)
    draw.text((margin, 50), shorten(subtitle, font(14), size[0] - 2 * margin), font=font(14), fill=FAINT)
    left = [margin + column * (tile_width + gap) for column in range(columns)]
    for x, name, count in zip(left, names, counts, strict=True):
        draw.text((x, head - 16), name, font=font(17, True), fill=INK, anchor="lm")
        draw.text((x + tile_width, head - 16), count, font=font(14), fill=FAINT, anchor="rm")
    end = margin + columns * (tile_width + gap) - gap
    for index, frame in enumerate(pruning.frames):
        t = index // pruning.tubelet
        picture = base.copy()
        draw = ImageDraw.Draw(picture)
        for column, x in enumerate(left):
            image = frame if column == 0 else fade(frame, masks[column - 1][t], pruning.patch)
            tile = Image.fromarray(image).resize((tile_width, tile_height), Image.Resampling.LANCZOS)
            picture.paste(tile, (x, head))
            if t == pruning.keyframe:
                draw.rectangle((x - 3, head - 3, x + tile_width + 2, head + tile_height + 2), outline=ACCENT, width=3)
        y = head + tile_height + 30
        span = (end - margin) / len(pruning.frames)
        for step in range(len(pruning.frames)):
            is_key = step // pruning.tubelet == pruning.keyframe
            fill = ACCENT if is_key else "#c9ced6"
            x = margin + step * span
            draw.rectangle(
                (x + 1, y, x + span - 2, y + (10 if step == index else 4)), fill=INK if step == index else fill
            )
        time = f"{pruning.times[index]:+.2f} s".replace("-", "−")
        name = f"{time}, keyframe: all its tokens are kept" if t == pruning.keyframe else f"{time} from the keyframe"
        draw.text((margin, y + 28), name, font=font(14), fill=ACCENT if t == pruning.keyframe else FAINT, anchor="lm")
        yield np.asarray(picture)


# What actors attend to


class Attending(NamedTuple):
    """One actor: as it is labelled, and the attention it pays to each token, [T, Gh, Gw], 0 to those dropped."""

    label: Label
    attention: np.ndarray


HEAT = np.array([(68, 1, 84), (178, 38, 96), (240, 98, 47), (252, 180, 44), (255, 251, 180)], np.float32)
SHOWN = 0.75  # share of a cell's colour that its attention is, the rest is the picture


def heat(share: np.ndarray) -> np.ndarray:
    """Colours [..., 3] of shares in [0, 1]: dark violet, red, orange, pale yellow."""
    place = np.clip(share, 0, 1)[..., None] * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    low, part = low[..., 0], place - low
    return HEAT[low] + part * (HEAT[low + 1] - HEAT[low])


def attention_tile(image: np.ndarray, kept: np.ndarray, share: np.ndarray, patch: int) -> np.ndarray:
    """A picture under the colours of ``share`` [Gh, Gw], in [0, 1]; dropped cells (``kept`` false) faded out."""
    height, width = image.shape[:2]
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
    colour, lit = (part.repeat(patch, 0).repeat(patch, 1)[:height, :width] for part in (heat(share), kept[..., None]))
    return np.where(lit, grey * (1 - SHOWN) + colour * SHOWN, fade(grey, kept, patch)).astype(np.uint8)


def attention_figure(
    pruning: Pruning, actors: Sequence[Attending], title: str, subtitle: str = "", *, most: int = 6
) -> Image.Image:
    """Time slices across, the input and each actor down: the brighter a token, the more the actor attends to it.

    Colours are of one scale for an actor's whole row, by the root of the attention: a trained model's is concentrated
    on few tokens, beside which the others would all be dark. At most ``most`` actors are drawn, the first ones.
    """
    T = pruning.grid[0]
    tile_width = max(120, min(260, 1500 // T))
    height, width = pruning.frames[0].shape[:2]
    tile_height = round(tile_width * height / width)
    margin, gap, label_width, head, foot = 28, 10, 214, 128, 76
    row_height = max(tile_height + 30, 118)
    actors = actors[:most]
    size = margin * 2 + label_width + T * (tile_width + gap) - gap, head + (1 + len(actors)) * row_height + foot
    figure = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(figure)
    draw.text((margin, 22), shorten(title, font(26, True), size[0] - 2 * margin), font=font(26, True), fill=INK)
    draw.text((margin, 58), shorten(subtitle, font(16), size[0] - 2 * margin), font=font(16), fill=FAINT)
    left = [margin + label_width + t * (tile_width + gap) for t in range(T)]
    _heads(draw, pruning, left, tile_width, head - 14)
    kept = pruning.kept(-1) if pruning.layers else np.ones(pruning.grid, bool)

    for row, actor in enumerate([None, *actors]):
        top = head + row * row_height
        colour = COLOURS[(row - 1) % len(COLOURS)]
        lines = ["input", f"{kept.sum()} of {kept.size}", "tokens get this far"]
        if actor is not None:
            peak = max(float(actor.attention.max()), 1e-12)
            best = [f"{brief(name)} {score:.2f}" for name, score in actor.label.actions[:2]]
            lines = [f"person {actor.label.score:.2f}", *best, f"brightest token: {peak:.1%}"]
        for index, text in enumerate(lines):
            y = top + tile_height / 2 + (index - (len(lines) - 1) / 2) * 23
            face = font(19 if index == 0 else 15, index == 0)
            draw.text((margin + 16, y), shorten(text, face, label_width - 24), font=face, fill=INK, anchor="lm")
        if actor is not None:
            draw.rectangle((margin, top, margin + 6, top + tile_height), fill=colour)
        for t in range(T):
            image = pruning.frames[t * pruning.tubelet]
            if actor is not None:
                image = attention_tile(image, kept[t], np.sqrt(actor.attention[t] / peak), pruning.patch)
            tile = Image.fromarray(image).resize((tile_width, tile_height), Image.Resampling.LANCZOS)
            figure.paste(tile, (left[t], top))
            if t == pruning.keyframe:
                for index, other in enumerate(actors):
                    if actor is None or other is actor:
                        box = _pixels(other.label.box, tile_width, tile_height, 3)
                        place = tuple(c + o for c, o in zip(box, (left[t], top) * 2, strict=True))
                        draw.rectangle(place, outline=PANEL, width=5)
                        draw.rectangle(place, outline=COLOURS[index % len(COLOURS)], width=3)
            if actor is not None:
                text = f"{actor.attention[t].sum():.0%} of its attention"
                place = (left[t] + tile_width / 2, top + tile_height + 11)
                draw.text(place, text, font=font(12), fill=FAINT, anchor="mm")
    x = left[pruning.keyframe]
    outline = (x - 5, head - 3, x + tile_width + 4, head + (1 + len(actors)) * row_height - 7)
    draw.rounded_rectangle(outline, radius=6, outline=ACCENT, width=3)
    _attention_legend(figure, margin, size[1] - foot + 22)
    return figure


def _attention_legend(figure: Image.Image, x: int, y: int) -> None:
    draw = ImageDraw.Draw(figure)
    bar = np.broadcast_to(heat(np.linspace(0, 1, 160)), (22, 160, 3)).astype(np.uint8)
    for text, width, image in (
        ("no attention", 0, None),
        ("", 160, bar),
        ("the actor's brightest token", 0, None),
        ("", 22, np.broadcast_to(DROPPED, (22, 22, 3)).astype(np.uint8)),
        ("dropped before the decoder", 0, None),
        ("shares below 100% in all: the rest goes to other boxes", 0, None),
    ):
        if image is not None:
            figure.paste(Image.fromarray(image), (x, y))
            draw.rectangle((x, y, x + width, y + 22), outline="#b8bec8")
        draw.text((x, y + 11), text, font=font(15), fill=INK, anchor="lm")
        x += max(width, text_width(text, font(15))) + (10 if width or text == "no attention" else 40)
