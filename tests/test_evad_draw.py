"""evad.draw: labels that can be read, pictures of what is kept."""

import numpy as np
import pytest

from evad import draw

ACTIONS = [
    ("walk", 0.87),
    ("talk to (e.g., self, a person, a group)", 0.55),
    ("ride (e.g., a bike, a car, a horse)", 0.3),
]


def crowd(number, seed=0):
    rng = np.random.default_rng(seed)
    corners = rng.random((number, 2)) * 0.8
    return [
        draw.Label([x, y, min(1, x + 0.05 + w), min(1, y + 0.1 + h)], score, ACTIONS)
        for (x, y), w, h, score in zip(
            corners, rng.random(number) * 0.3, rng.random(number) * 0.5, rng.random(number), strict=True
        )
    ]


@pytest.mark.parametrize(
    "size", [(96, 96), (320, 180), (640, 272), (480, 480), (1080, 1920), (3840, 2160), (1, 1), (7, 900)]
)
@pytest.mark.parametrize("number", [0, 1, 4, 30])
def test_labels_never_overlap_and_stay_inside(size, number, monkeypatch):
    placed = []
    original = draw._panel

    def panel(*args):
        placed.append(original(*args))
        return placed[-1]

    monkeypatch.setattr(draw, "_panel", panel)
    width, height = size
    picture = draw.Overlay(width, height, crowd(number), "a note").on(np.zeros((height, width, 3), np.uint8))
    assert picture.shape == (height, width, 3)
    panels = [place for place in placed if place is not None]
    assert all(x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height for x1, y1, x2, y2 in panels)
    assert not any(draw._overlap(a, b) for i, a in enumerate(panels) for b in panels[:i])
    if min(size) >= draw.LEGIBLE and number:
        assert panels


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.5, 0.5], [1.0, 0.2, 1.0, 0.9], [-3, -3, 9, 9], [0.9, 0.9, 0.1, 0.1]])
def test_odd_boxes_are_drawn(box):
    picture = draw.Overlay(640, 480, [draw.Label(box, 0.9, ACTIONS)]).on(np.zeros((480, 640, 3), np.uint8))
    assert picture.any()


def test_small_pictures_are_enlarged():
    for width, height in ((96, 96), (640, 272), (320, 240)):
        scale = draw.legible_scale(width, height)
        assert min(width, height) * scale >= draw.LEGIBLE > min(width, height) * (scale - 1)
    assert draw.legible_scale(1920, 1080) == 1


def test_long_names_are_shortened():
    face = draw.font(20)
    assert draw.shorten("walk", face, 500) == "walk"
    short = draw.shorten("a very long name of an action", face, 100)
    assert short.endswith("…") and face.getlength(short) <= 100
    assert [draw.brief(name) for name, _ in ACTIONS] == ["walk", "talk to", "ride"]
    assert draw.brief("push (another person)") == "push (another person)"


def pruning(T=4, tubelet=4, patch=12, grid=(8, 10), height=92, width=118, layers=(0.7, 0.49)):
    rng = np.random.default_rng(0)
    total, cells = T * grid[0] * grid[1], grid[0] * grid[1]
    key = np.arange(T // 2 * cells, (T // 2 + 1) * cells)
    others = np.setdiff1d(np.arange(total), key)
    kept = [
        (f"layer {i}", np.r_[key, rng.permutation(others)[: int(share * total) - cells]])
        for i, share in enumerate(layers)
    ]
    frames = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(T * tubelet)]
    times = [(i - T * tubelet // 2) / 30 for i in range(T * tubelet)]
    return draw.Pruning(frames, times, tubelet, patch, (T, *grid), T // 2, kept)


def test_fade_touches_only_dropped_cells():
    image = np.random.default_rng(0).integers(0, 200, (92, 118, 3), dtype=np.uint8)
    kept = np.random.default_rng(1).random((8, 10)) < 0.5
    faded = draw.fade(image, kept, 12)
    for y, x in np.ndindex(8, 10):
        cell = np.s_[12 * y : 12 * (y + 1), 12 * x : 12 * (x + 1)]
        assert (faded[cell] == image[cell]).all() == kept[y, x]
    assert faded[~kept.repeat(12, 0).repeat(12, 1)[:92, :118]].min() > 180


def test_counts_of_kept_tokens():
    example = pruning()
    assert example.total == 320
    assert example.kept(0)[example.keyframe].all()
    assert [int(example.kept(i).sum()) for i in range(2)] == [224, 156]


@pytest.mark.parametrize(
    "options", [{}, {"T": 8, "tubelet": 2}, {"layers": ()}, {"height": 96, "width": 20, "grid": (8, 2)}]
)
def test_pruning_pictures(options):
    example = pruning(**options)
    figure = np.asarray(draw.pruning_figure(example, "A title " * 40, "and more"))
    assert figure.shape[2] == 3 and (figure[0] == 255).all() and (figure[:, 0] == 255).all()
    pictures = list(draw.pruning_animation(example, "title", "subtitle"))
    assert len(pictures) == len(example.frames)
    assert len({picture.shape for picture in pictures}) == 1
    assert all(side % 2 == 0 for side in pictures[0].shape[:2])


def outlined(picture):
    """Where the columns of pixels are that the outline's sides fill, from the left."""
    return np.flatnonzero((picture == draw._rgb(draw.ACCENT)).all(-1).mean(0) > 0.5)


def test_keyframe_is_outlined():
    """Around the keyframe's column of the figure; in moving pictures around every tile while the keyframe is shown."""
    example = pruning()
    colours = [(20 + 50 * t, 60, 120) for t in range(4)]
    frames = [np.full((92, 118, 3), colours[i // 4], np.uint8) for i in range(16)]
    example = example._replace(frames=frames)
    figure = np.asarray(draw.pruning_figure(example, "title"))
    sides = outlined(figure)
    assert len(sides) == 6 and np.ptp(sides[:3]) == np.ptp(sides[3:]) == 2
    inside = figure[200, sides[2] + 1 : sides[3]]  # in the row of the input
    assert (inside[5:-5] == colours[example.keyframe]).all()
    outside = np.delete(figure, np.s_[sides[0] : sides[5] + 1], axis=1)[200]
    assert not (outside == colours[example.keyframe]).all(-1).any()
    for index, picture in enumerate(draw.pruning_animation(example, "title")):
        assert len(outlined(picture)) == (18 if index // 4 == example.keyframe else 0)  # input and two layers


def test_attention_tile_shows_kept_cells_alone():
    """Colours of a kept cell follow its share; a dropped one is nearly white, whatever its share."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (92, 118, 3), dtype=np.uint8)
    kept, share = rng.random((8, 10)) < 0.5, rng.random((8, 10))
    tile = draw.attention_tile(image, kept, share, 12).astype(int)
    assert (np.ptp(tile, axis=2) <= 8)[~kept.repeat(12, 0).repeat(12, 1)[:92, :118]].all()
    flat = np.zeros_like(image)
    colours = draw.attention_tile(flat, kept, share, 12)[::12, ::12][kept].astype(float).sum(-1)
    order = share[kept].argsort()
    assert (np.diff(colours[order]) > -3).all() and colours.max() > 2 * colours.min()


def test_heat_is_a_scale_from_dark_to_bright():
    colours = draw.heat(np.linspace(0, 1, 50)).sum(-1)
    assert (np.diff(colours) > 0).all() and (draw.heat(np.array([-1.0, 2.0])) == draw.HEAT[[0, -1]]).all()


@pytest.mark.parametrize("options", [{}, {"T": 8, "tubelet": 2}, {"layers": ()}])
@pytest.mark.parametrize("number", [1, 9])
def test_attention_picture(options, number):
    """Brightest where the actor looks; the box is on the keyframe alone; at most six actors."""
    example = pruning(**options)
    rng = np.random.default_rng(0)
    labels = crowd(number)
    actors = [draw.Attending(label, rng.random(example.grid) / 999) for label in labels]
    figure = draw.attention_figure(example, actors, "A title " * 40, "and more")
    one = draw.attention_figure(example, actors[:1], "A title", "")
    assert figure.width == one.width
    assert (figure.height > one.height) == (number > 1)
    assert figure.height == draw.attention_figure(example, actors[:6], "A title", "").height
    picture = np.asarray(figure)
    assert (picture[0] == 255).all() and (picture[:, 0] == 255).all()
