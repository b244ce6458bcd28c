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


class _Sheet:
    """A figure of a clip: time slices across, rows down, the keyframe's column outlined."""

    MARGIN, GAP, LABELS, HEAD = 28, 10, 214, 128

    def __init__(self, pruning: Pruning, rows: int, row_height: int, foot: int, title: str, subtitle: str) -> None:
        T = pruning.grid[0]
        height, width = pruning.frames[0].shape[:2]
        self.pruning, self.rows = pruning, rows
        self.tile_width = max(120, min(260, 1500 // T))
        self.tile_height = round(self.tile_width * height / width)
        self.row_height = max(self.tile_height + 30, row_height)
        self.left = [self.MARGIN + self.LABELS + t * (self.tile_width + self.GAP) for t in range(T)]
        size = self.left[-1] + self.tile_width + self.MARGIN, self.HEAD + rows * self.row_height + foot
        self.legend = self.MARGIN, size[1] - foot + 22  # where one has its place
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)
        for y, text, face, ink in ((22, title, font(26, True), INK), (58, subtitle, font(16), FAINT)):
            self.draw.text((self.MARGIN, y), shorten(text, face, size[0] - 2 * self.MARGIN), font=face, fill=ink)
        for t, x in enumerate(self.left):
            is_key = t == pruning.keyframe
            name = "keyframe" if is_key else f"{pruning.times[t * pruning.tubelet]:+.2f} s".replace("-", "−")
            place, face = (x + self.tile_width / 2, self.HEAD - 14), font(15, is_key)
            self.draw.text(place, name, font=face, fill=ACCENT if is_key else FAINT, anchor="mm")

    def top(self, row: int) -> int:
        return self.HEAD + row * self.row_height

    def label(self, row: int, lines: Sequence[str], colour=None) -> None:
        """What stands left of a row, its first line large; ``colour``: of a bar before it."""
        top, x = self.top(row), self.MARGIN if colour is None else self.MARGIN + 16
        if colour is not None:
            self.draw.rectangle((self.MARGIN, top, self.MARGIN + 6, top + self.tile_height), fill=colour)
        for index, text in enumerate(lines):
            y = top + self.tile_height / 2 + (index - (len(lines) - 1) / 2) * 23
            face = font(19 if index == 0 else 15, index == 0)
            reach = self.MARGIN + self.LABELS - 8 - x
            self.draw.text((x, y), shorten(text, face, reach), font=face, fill=INK, anchor="lm")

    def tile(self, row: int, t: int, image: np.ndarray, note: str = "") -> None:
        top, size = self.top(row), (self.tile_width, self.tile_height)
        self.image.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (self.left[t], top))
        place = (self.left[t] + self.tile_width / 2, top + self.tile_height + 11)
        self.draw.text(place, note, font=font(12), fill=FAINT, anchor="mm")

    def outline_keyframe(self) -> None:
        x = self.left[self.pruning.keyframe]
        outline = (x - 5, self.HEAD - 3, x + self.tile_width + 4, self.top(self.rows) - 7)
        self.draw.rounded_rectangle(outline, radius=6, outline=ACCENT, width=3)


def pruning_figure(pruning: Pruning, title: str, subtitle: str = "") -> Image.Image:
    """Time slices across, the input and every pruning layer down; dropped tokens faded, the keyframe outlined."""
    T, Gh, Gw = pruning.grid
    sheet = _Sheet(pruning, 1 + len(pruning.layers), 84, 66, title, subtitle)
    sheet.label(0, ["input", f"{pruning.total} tokens", f"{T} × {Gh} × {Gw}"])
    for t in range(T):
        sheet.tile(0, t, pruning.frames[t * pruning.tubelet])
    for row, (name, _) in enumerate(pruning.layers, start=1):
        kept = pruning.kept(row - 1)
        sheet.label(row, [name, f"{kept.sum()} of {pruning.total}", f"tokens kept ({kept.mean():.0%})"])
        for t in range(T):
            image = fade(pruning.frames[t * pruning.tubelet], kept[t], pruning.patch)
            sheet.tile(row, t, image, f"{kept[t].sum()} of {kept[t].size}")
    sheet.outline_keyframe()
    _legend(sheet.image, *sheet.legend, pruning)
    return sheet.image


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
    actors = actors[:most]
    kept = pruning.kept(-1) if pruning.layers else np.ones(pruning.grid, bool)
    sheet = _Sheet(pruning, 1 + len(actors), 118, 76, title, subtitle)

    def outline(row: int, drawn: Sequence[int]) -> None:
        for index in drawn:
            box = _pixels(actors[index].label.box, sheet.tile_width, sheet.tile_height, 3)
            corner = sheet.left[pruning.keyframe], sheet.top(row)
            place = tuple(c + o for c, o in zip(box, corner * 2, strict=True))
            sheet.draw.rectangle(place, outline=PANEL, width=5)
            sheet.draw.rectangle(place, outline=COLOURS[index % len(COLOURS)], width=3)

    sheet.label(0, ["input", f"{kept.sum()} of {kept.size}", "tokens get this far"])
    for t in range(pruning.grid[0]):
        sheet.tile(0, t, pruning.frames[t * pruning.tubelet])
    outline(0, range(len(actors)))
    for index, actor in enumerate(actors):
        row, peak = index + 1, max(float(actor.attention.max()), 1e-12)
        best = [f"{brief(name)} {score:.2f}" for name, score in actor.label.actions[:2]]
        lines = [f"person {actor.label.score:.2f}", *best, f"brightest token: {peak:.1%}"]
        sheet.label(row, lines, COLOURS[index % len(COLOURS)])
        for t in range(pruning.grid[0]):
            image, share = pruning.frames[t * pruning.tubelet], np.sqrt(actor.attention[t] / peak)
            image = attention_tile(image, kept[t], share, pruning.patch)
            sheet.tile(row, t, image, f"{actor.attention[t].sum():.0%} of its attention")
        outline(row, [index])
    sheet.outline_keyframe()
    _attention_legend(sheet.image, *sheet.legend)
    return sheet.image


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
