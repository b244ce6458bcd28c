"""Pictures of what results/*.json hold; each function draws one, and says whether there was anything to draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

COLOURS = ("#c0392b", "#2980b9", "#27ae60", "#8e44ad", "#d35400", "#7f8c8d")
Curve = tuple[str, Mapping[str, float], Mapping[str, float]]  # label, and two values of each keep rate


def attention(rows: list[dict], path: Path) -> bool:
    """Time of keyframe_attention_topk against the number of tokens, with its floor."""
    pattern = re.compile(r"(\w+) N(\d+) B(\d+)$")
    of_op = [row for row in rows if row["op"] == "keyframe_attention_topk"]
    found = [(match[1], int(match[2]), int(match[3]), row) for row in of_op if (match := pattern.match(row["case"]))]
    if not found:
        return False
    compiled = {row["case"]: row["times"] for row in rows if row["op"].endswith("beside compilers")}
    batches = [batch for _, _, batch, _ in found]
    batch = max(batches, key=lambda batch: (batches.count(batch), batch))  # the one with most lengths
    shown = [(dtype, N, row) for dtype, N, of_batch, row in found if of_batch == batch]
    lengths = {dtype: len({N for name, N, _ in shown if name == dtype}) for dtype, _, _ in shown}
    dtypes = sorted(dtype for dtype, number in lengths.items() if number > 1 or number == max(lengths.values()))
    figure, axes = _axes(len(dtypes), legend=2.6, sharey=True)
    styles = {
        "ours": {"color": "#c0392b", "linewidth": 2.5, "marker": "o"},
        "eager": {"color": "#7f8c8d", "marker": "s"},
        "SDPA + column sum": {"color": "#2980b9", "marker": "^"},
        "SDPA flash + flash-colreduce": {"color": "#2980b9", "marker": "^"},
        "SDPA cudnn + flash-colreduce": {"color": "#8e44ad", "marker": "^"},
        "FlexAttention, roles swapped": {"color": "#27ae60", "marker": "D"},
        "SDPA alone": {"color": "#2980b9", "linestyle": "--", "marker": "v"},
        "SDPA flash alone": {"color": "#2980b9", "linestyle": "--", "marker": "v"},
        "SDPA cudnn alone": {"color": "#8e44ad", "linestyle": "--", "marker": "v"},
    }
    for axis, dtype in zip(axes, dtypes, strict=True):
        chosen = sorted((N, row) for name, N, row in shown if name == dtype)
        for name, style in styles.items():
            times = [(N, compiled.get(row["case"], {}) | row["times"]) for N, row in chosen]
            points = [(N, of_row[name]["ms"]) for N, of_row in times if name in of_row]
            label = {"ours": "keyframe_attention_topk"}.get(name, name.replace("alone", "alone (no importance)"))
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.plot(
            [N for N, _ in chosen],
            [row["floor"]["ms"] for _, row in chosen],
            color="black",
            linestyle=":",
            label="floor",
        )
        axis.set(xscale="log", yscale="log", title=dtype, xlabel="tokens")
        axis.set_xticks([N for N, _ in chosen], [str(N) for N, _ in chosen])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[0].set_ylabel(f"ms (12 heads of 64, batch {batch})")
    return _save(figure, axes[0], path)


def harvest(curves: Iterable[Curve], path: Path) -> bool:
    """Speed-up over rate 1.0 by keep rate, and what the operations saved allow (dotted). Curves: measured, ideal."""
    curves = [curve for curve in curves if len(curve[1]) > 2]
    if not curves:
        return False
    figure, (axis,) = _axes(1)
    for colour, (label, measured, ideal) in zip(COLOURS, curves, strict=False):
        _by_rate(axis, measured, colour, label=label)
        _by_rate(axis, ideal, colour, linestyle=":", marker="")
    axis.plot([], [], color="black", linestyle=":", label="as operations go")
    axis.set(xlabel="keep rate", ylabel="speed-up over rate 1.0", xlim=(1.02, 0.48))
    return _save(figure, axis, path)


def training(curves: Iterable[Curve], paper: Mapping[str, float], path: Path) -> bool:
    """Memory and time of a training step by keep rate, per cent of rate 1.0, and the paper's at 0.7 (its Fig. 8)."""
    curves = [curve for curve in curves if len(curve[1]) > 1]
    if not curves:
        return False
    figure, axes = _axes(2)
    for axis, place, what in zip(axes, (1, 2), ("memory", "time"), strict=True):
        for colour, curve in zip(COLOURS, curves, strict=False):
            _by_rate(
                axis,
                {rate: 100 * value / curve[place]["1.0"] for rate, value in curve[place].items()},
                colour,
                label=curve[0],
            )
        axis.plot(0.7, 100 * (1 - paper[what]), "k*", markersize=11, label="the paper, ViT-B 224")
        axis.set(xlabel="keep rate", title=f"{what} of a step, % of rate 1.0", xlim=(1.02, 0.58), ylim=(0, None))
    return _save(figure, axes[0], path)


def _axes(number: int, legend: float = 1.2, **options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(legend + 3.7 * number, 3.8), squeeze=False, **options)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def _by_rate(axis, values: Mapping[str, float], colour: str, **style) -> None:
    points = sorted((float(rate), value) for rate, value in values.items())
    axis.plot(*zip(*points, strict=True), color=colour, **{"marker": "o", **style})


def _save(figure, axis, path: Path) -> bool:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.legend(*axis.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    return True
