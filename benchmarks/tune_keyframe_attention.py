"""Measures tiles of the Triton attention kernels on this machine's GPU and writes its rows of the table.

    python -m benchmarks.tune_keyframe_attention             # a few minutes; prints every candidate's time
    python -m benchmarks.tune_keyframe_attention --write     # and writes evad_kernels/keyframe_attention_tuning.py

One kernel's tile changes, the others stay, and the whole op is timed: ranks are those of the kernel. A candidate that
does not compile, or whose results are not close to those of the present tile, has no time. B=8, H=12; N=512 stands for
lengths below 1024, N=1568 for those above. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pprint
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from evad_kernels import keyframe_attention_triton as kernels
from evad_kernels import keyframe_attention_tuning as tuning
from evad_kernels._triton import architecture
from evad_kernels.keyframe_attention_tuning import Tile

LENGTHS = {0: 512, 1024: 1568}  # least N of a row: the length measured for it
WIDTHS = (32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float32)
ROUNDS = 15


def candidates(element_size: int) -> list[Tile]:
    sizes = (16, 32, 64, 128)
    stages = (1, 2, 3, 4) if element_size == 2 else (1,)
    return [
        Tile(rows, keys, warps, stage)
        for rows, keys, warps, stage in itertools.product(sizes, sizes, (4, 8), stages)
        if 512 <= rows * keys <= 16384 and rows * keys >= 256 * warps // 4
    ]


def runs(dtype: torch.dtype, N: int, D: int) -> dict[str, Callable[[], tuple]]:
    """What to time for each kernel."""
    qkv = torch.randn(8, N, 3, 12, D, device="cuda").to(dtype).permute(2, 0, 3, 1, 4)
    keyframe, select, scale = N // 8, N * 57 // 100, D**-0.5
    output, _, lse, index = kernels.forward_topk(*qkv, keyframe, select, 4.0, scale)
    grad = torch.randn_like(output)

    def backward() -> tuple:
        return kernels.backward(*qkv, grad, None, lse, index, keyframe, 4.0, scale)

    return {
        "forward": lambda: kernels.forward(*qkv, N, 4.0, scale)[:1],
        "score": lambda: kernels.forward(*qkv, keyframe, 4.0, scale)[:2],
        "query": backward,
        "key": backward,
    }


def milliseconds(run: Callable[[], tuple]) -> float:
    """Median of ROUNDS, each of about 2 ms of calls between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def several(calls: int) -> float:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    run()
    calls = max(1, math.ceil(2 / several(1)))
    return median(several(calls) for _ in range(ROUNDS))


def measured(kernel: str, run: Callable[[], tuple], element_size: int) -> dict[Tile, float]:
    """Time of each candidate that runs and is right."""
    present = kernels.tile
    want = run()
    times = {}
    for choice in candidates(element_size):
        kernels.tile = lambda asked, *rest, choice=choice: choice if asked == kernel else present(asked, *rest)
        try:
            torch.testing.assert_close(run(), want, atol=2e-2, rtol=2e-2)
            times[choice] = milliseconds(run)
        except Exception as error:  # what Triton raises for a tile too large differs between its versions
            print(f"  {choice}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        else:
            print(f"  {choice}: {times[choice]:.3f} ms")
        finally:
            kernels.tile = present
    return times


def write(rows: dict, here: int) -> None:
    path = Path(tuning.__file__)
    before, rest = path.read_text().split("TABLE = {\n")
    after = rest.partition("\n}\n")[2]
    before = before.replace(
        f"MEASURED = {tuning.MEASURED!r}", f"MEASURED = {tuple(sorted({*tuning.MEASURED, here}))!r}"
    )
    table = pprint.pformat(tuning.TABLE | rows, width=116, sort_dicts=True)
    path.write_text(f"{before}TABLE = {{\n {table[1:-1]},\n}}\n{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table (then run ruff format)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    here = architecture(torch.empty(0, device="cuda"))
    rows = {}
    for dtype in DTYPES:
        of_type = rows[here, dtype.itemsize] = {kernel: [] for kernel in ("forward", "score", "query", "key")}
        for D, (least, N) in itertools.product(WIDTHS, LENGTHS.items()):
            for kernel, run in runs(dtype, N, D).items():
                print(f"{torch.cuda.get_device_name()} {dtype} D={D} N={N} {kernel}")
                times = measured(kernel, run, dtype.itemsize)
                best = min(times, key=times.get)
                print(f"  best: {best}")
                of_type[kernel].append((least, D, tuple(best)))
    if arguments.write:
        write(rows, here)
    else:
        pprint.pprint(rows, width=116)


if __name__ == "__main__":
    main()
