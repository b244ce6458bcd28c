"""Measures tiles of the Triton attention kernels on this machine's GPU and writes its rows of the table.

    python -m benchmarks.tune_keyframe_attention                          # prints every candidate's time
    python -m benchmarks.tune_keyframe_attention --write                  # and writes the table, row by row
    python -m benchmarks.tune_keyframe_attention --write --seconds 150    # as far as time goes, the paper's width first

One kernel's tile changes, the others stay, and the whole op is timed: ranks are those of the kernel. Candidates are
compiled and compared with the present tile by as many processes as there are cores, which leaves them in Triton's cache
on disk; then this one times those that are right and spill no register. B=8, H=12; N=512 stands for lengths below 1024,
N=1568 for those above. A row is written as soon as it is measured; rows of other types and widths stay. Not yet run on
a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import pprint
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from triton.runtime import JITFunction

from evad_kernels import keyframe_attention_triton as kernels
from evad_kernels import keyframe_attention_tuning as tuning
from evad_kernels.keyframe_attention_tuning import Tile

KERNELS = {  # the table's name -> the kernels that have its tile
    "forward": ("keyframe_attention_forward_kernel",),
    "score": ("keyframe_attention_score_kernel",),
    "query": ("keyframe_attention_backward_term_kernel", "keyframe_attention_backward_query_kernel"),
    "key": ("keyframe_attention_backward_key_kernel",),
}
LENGTHS = {1024: 1568, 0: 512}  # least N of a row: the length measured for it
ORDER = [  # type, width, least N: the most telling first
    *((torch.bfloat16, D, least) for D in (64, 128, 32) for least in LENGTHS),
    *((torch.float32, D, least) for D in (64, 128, 32) for least in LENGTHS),
    *((dtype, 256, least) for dtype in (torch.bfloat16, torch.float32) for least in LENGTHS),
]
ROUNDS = 15
RESERVE = 20  # seconds for candidates that compile when time is up, and for timing those of the row


def candidates(element_size: int, present: Tile) -> list[Tile]:
    sizes = (16, 32, 64, 128)
    stages, least, most = ((1, 2, 3), 2048, 16384) if element_size == 2 else ((1,), 512, 4096)
    tiles = (Tile(*numbers) for numbers in itertools.product(sizes, sizes, (4, 8), stages))
    return list(dict.fromkeys([present, *(tile for tile in tiles if least <= tile.rows * tile.keys <= most)]))


@functools.lru_cache(1)
def runs(dtype: torch.dtype, N: int, D: int) -> dict[str, Callable[[], tuple]]:
    """What to time for each kernel."""
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(8, N, 3, 12, D, device="cuda", generator=generator).to(dtype).permute(2, 0, 3, 1, 4)
    keyframe, select, scale = N // 8, N * 57 // 100, D**-0.5
    output, _, lse, index = kernels.forward_topk(*qkv, keyframe, select, 4.0, scale)
    grad = torch.randn(output.shape, device="cuda", generator=generator).to(dtype)

    def backward() -> tuple:
        return kernels.backward(*qkv, grad, None, lse, index, keyframe, 4.0, scale)

    return {
        "forward": lambda: kernels.forward(*qkv, N, 4.0, scale)[:1],
        "score": lambda: (kernels.score(*qkv[:2], lse, keyframe, 4.0, scale),),
        "query": backward,
        "key": backward,
    }


def with_tile(kernel: str, choice: Tile, run: Callable[[], object]) -> object:
    """``run()`` where one kernel has this tile."""
    present = kernels.tile
    kernels.tile = lambda asked, *rest: choice if asked == kernel else present(asked, *rest)
    try:
        return run()
    finally:
        kernels.tile = present


@functools.lru_cache(len(KERNELS))
def wanted(dtype: torch.dtype, N: int, D: int, kernel: str) -> tuple:
    return runs(dtype, N, D)[kernel]()


def tried(dtype: torch.dtype, N: int, D: int, kernel: str, choice: Tile) -> str | None:
    """Compiles and runs a candidate; why it cannot be taken, or None."""
    try:
        want, run = wanted(dtype, N, D, kernel), runs(dtype, N, D)[kernel]
        with launched() as compiled:
            got = with_tile(kernel, choice, run)
        assert_near(got, want)
    except Exception as error:  # what Triton raises for a tile too large differs between its versions
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    spills = max(spills for name, spills in compiled if name in KERNELS[kernel])
    return f"spills {spills} registers" if spills else None


def assert_near(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Within 1 % of each wanted tensor's largest magnitude: an importance is at most a thousandth."""
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-2 * y.abs().max().item())


@contextlib.contextmanager
def launched() -> Iterator[list[tuple[str, int]]]:
    """Name and spilled registers of each launch inside."""
    run, compiled = JITFunction.run, []

    def run_and_keep(self, *arguments, **options):
        kernel = run(self, *arguments, **options)
        compiled.append((self.__name__, kernel.n_spills))
        return kernel

    JITFunction.run = run_and_keep
    try:
        yield compiled
    finally:
        JITFunction.run = run


def milliseconds(run: Callable[[], object]) -> float:
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


def right(pool: ProcessPoolExecutor, what: tuple, choices: Iterable[tuple[str, Tile]], end: float) -> list:
    """The candidates (kernel, tile) that compiled and were right before ``end``."""
    futures = {pool.submit(tried, *what, *choice): choice for choice in filter(None, choices)}
    found = []
    try:
        for future in as_completed(futures, timeout=max(0.0, end - time.monotonic())):
            reason = future.result()
            if reason is None:
                found.append(futures[future])
            else:
                print(f"  {' '.join(map(str, futures[future]))}: {reason}", flush=True)
    except TimeoutError:
        print("  no time for the rest", flush=True)
        for future in futures:
            future.cancel()
        wait(futures)  # what is timed next runs alone
    return found


def table_with(rows: dict, architecture: int) -> dict:
    """The table with the measured rows {(element_size, kernel, D, least N): tile} in the place of others."""
    table = {key: {kernel: list(found) for kernel, found in value.items()} for key, value in tuning.TABLE.items()}
    for element_size in {key[0] for key in rows}:
        if (architecture, element_size) not in table:
            older = max((known for known, size in table if size == element_size and known <= architecture), default=80)
            table[architecture, element_size] = {
                kernel: list(found) for kernel, found in table[older, element_size].items()
            }
    for (element_size, kernel, D, least), choice in rows.items():
        of_kernel = table[architecture, element_size][kernel]
        of_kernel[:] = [row for row in of_kernel if row[:2] != (least, D)] + [(least, D, tuple(choice))]
        of_kernel.sort(key=lambda row: (row[1], row[0]))
    return table


def write(rows: dict, architecture: int) -> None:
    path = Path(tuning.__file__)
    before, rest = path.read_text().split("TABLE = {\n")
    after = rest.partition("\n}\n")[2]
    lines = before.splitlines(keepends=True)
    measured = tuple(sorted({*tuning.MEASURED, architecture}))
    before = "".join(f"MEASURED = {measured!r}  # architectures\n" if x.startswith("MEASURED = ") else x for x in lines)
    table = pprint.pformat(table_with(rows, architecture), width=116, sort_dicts=True)
    path.write_text(f"{before}TABLE = {{\n {table[1:-1]},\n}}\n{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table (then run ruff format)")
    parser.add_argument("--seconds", type=float, default=3600, help="write the last row about then (3600)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    end = time.monotonic() + arguments.seconds - RESERVE
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    rows = {}
    workers = max(1, (os.cpu_count() or 1) - 2)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    for dtype, D, least in ORDER:
        if time.monotonic() > end:
            break
        what = dtype, LENGTHS[least], D
        print(f"{torch.cuda.get_device_name()} {dtype} D={D} N={LENGTHS[least]}", flush=True)
        choices = [
            [
                (kernel, choice)
                for choice in candidates(dtype.itemsize, tuning.tile(kernel, here, dtype.itemsize, D, what[1]))
            ]
            for kernel in KERNELS
        ]
        try:  # each kernel's present tile first: the rest may find no time
            found = right(pool, what, itertools.chain(*itertools.zip_longest(*choices)), end)
        except BrokenProcessPool:
            print("  a candidate ended its process: this row stays as it is", flush=True)
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
            continue
        times = {kernel: {} for kernel in KERNELS}
        for kernel, choice in found:
            times[kernel][choice] = with_tile(kernel, choice, lambda: milliseconds(runs(*what)[kernel]))  # noqa: B023
            print(f"  {kernel} {tuple(choice)}: {times[kernel][choice]:.4f} ms", flush=True)
        for kernel, of_kernel in times.items():
            if of_kernel:
                best = min(of_kernel, key=of_kernel.get)
                rows[dtype.itemsize, kernel, D, least] = best
                print(f"  best {kernel}: {tuple(best)}, {of_kernel[best]:.4f} ms", flush=True)
        if arguments.write:
            write(rows, here)
        runs.cache_clear()
    pool.shutdown(wait=False, cancel_futures=True)
    if not arguments.write:
        pprint.pprint(rows, width=116)


if __name__ == "__main__":
    main()
