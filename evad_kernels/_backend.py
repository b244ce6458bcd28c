"""The one table of backends: which implementation serves an op, and why another does not.

Backends
    reference   plain PyTorch, beside each op; every device and dtype; what the others are checked against
    cpu         C++ kernels of the native module (csrc/)
    triton      Triton kernels, so a GPU works without nvcc; on CPU tensors where Triton interprets (TRITON_INTERPRET=1)
    cuda        CUDA C++ kernels of the native module

``choose`` is plain Python on module globals, so torch.compile traces through it and recompiles when the choice changes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("reference", "cpu", "triton", "cuda")

# op -> its backends beside "reference", in order of preference where several serve one device.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "keyframe_attention": ("cpu", "triton"),
    "keyframe_attention_topk": ("cpu", "triton"),
    "select_tokens": ("cpu", "triton", "cuda"),
    "gather_tokens": ("cpu", "triton", "cuda"),
    "scatter_tokens": ("cpu", "triton", "cuda"),
    "roi_align_3d": ("cpu", "triton"),
    "roi_pool_3d": ("cpu", "cuda", "triton"),
    "pyramid_roi_align": ("cpu", "triton"),
}

# No GPU has run their tests yet: "auto" takes them where a trial on the device itself passes (_trial.py).
ON_TRIAL = {
    ("keyframe_attention", "triton"),
    ("keyframe_attention_topk", "triton"),
    ("select_tokens", "triton"),
    ("select_tokens", "cuda"),
    ("gather_tokens", "triton"),
    ("gather_tokens", "cuda"),
    ("scatter_tokens", "cuda"),
    ("scatter_tokens", "triton"),
    ("roi_align_3d", "triton"),
    ("roi_pool_3d", "cuda"),
    ("roi_pool_3d", "triton"),
    ("pyramid_roi_align", "triton"),
}
UNTESTED = "not yet tested on a GPU: auto tries it first, once on each"
NOT_IMPLEMENTED = "not implemented"

# As Triton itself reads it, at the import of a kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")

# backend -> the device type it serves
DEVICE = {"cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda", "cuda": "cuda"}

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/host_device.h: DType


def _load_native():
    """The compiled module and None, or None and the reason why it is missing."""
    try:
        # Not `from . import`: its error would blame a circular import.
        return importlib.import_module("._native", __package__), None
    except ImportError as error:
        note = Path(__file__).with_name("_native_missing.txt")
        return None, note.read_text().strip() if note.exists() else f"native module not built ({error})"


native, _native_missing = _load_native()
if native is None:
    warnings.warn(
        f"evad_kernels: the CPU kernels are missing: {_native_missing}. Ops run in plain PyTorch, which is slower.",
        stacklevel=2,
    )
elif not native.with_openmp:
    warnings.warn(
        "evad_kernels: the CPU kernels run on one thread: they were built by a compiler without OpenMP.", stacklevel=2
    )


def _missing(backend: str) -> str | None:
    """Why ``backend`` is not installed, or None. Asks for no GPU: that would start CUDA, which no fork survives."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _native_missing
    if backend == "cuda":
        return _native_missing if native is None else None if native.with_cuda else "built without nvcc"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


MISSING = {backend: _missing(backend) for backend in BACKENDS}  # asked once: choose() is on every call's path


def _validated(name: str, argument: str = "use_backend: name") -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {(*BACKENDS, 'auto')}, got {name!r}")
    return name


_requested = _validated(os.environ.get("EVAD_KERNELS_BACKEND") or "auto", "EVAD_KERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside on one backend, in all threads: no other may enter or leave one meanwhile.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" for the best available. A backend asked for by name never
            falls back: an op that it cannot serve raises.
    Raises:
        ValueError: no such backend.
    """
    global _requested
    before, _requested = _requested, _validated(name)
    try:
        yield
    finally:
        _requested = before


def choose(op: str, tensor: Tensor, *, triton: str | None = None) -> str:
    """The backend that serves ``op`` on ``tensor``'s device.

    Args:
        triton: Why this op's Triton kernels cannot take its inputs, or None.
    Raises:
        RuntimeError: the backend asked for by name does not serve this op, device or machine.
    """
    device = tensor.device.type
    requested = _asked()
    if requested == "auto":
        if device == "meta":  # shapes alone: the op's fake, whatever this machine can run
            return IMPLEMENTED[op][0]
        if forward_ad._current_level >= 0:  # kernels have no tangents: torch would take them for zero
            return "reference"
        for backend in IMPLEMENTED[op]:
            if DEVICE[backend] != device or _refusal(backend, tensor, triton) is not None:
                continue
            if (op, backend) not in ON_TRIAL or _passes(op, backend, tensor.device, tensor.dtype):
                return backend
        return "reference"
    if requested != "reference":
        reason = unavailable(op, requested, device) or _refusal(requested, tensor, triton)
        if reason is not None:
            raise RuntimeError(refused(op, requested, reason))
        if DEVICE[requested] != device:
            raise RuntimeError(
                f"{op}: backend must serve the tensor's device ({device}), got {requested!r}, "
                f"which serves {DEVICE[requested]}"
            )
    return requested


_trying: dict[int, str] = {}  # thread that holds a trial -> the backend that it tries
_trials = threading.Lock()
_verdicts: dict[tuple[str, str, torch.device, torch.dtype], str | None] = {}  # of trials: None, or what is wrong


def _passes(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``auto`` may take kernels that are on trial; tries them where they were not tried."""
    tried = (op, backend, device, dtype)
    if tried not in _verdicts:
        if device.type == "cuda" and not torch.cuda.is_available():
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # a trial waits for the device
            warnings.warn(
                f"evad_kernels: {op}: plain PyTorch is captured: call it once before, so that {backend} is tried",
                stacklevel=4,
            )
            return False
        if torch._C._current_graph_task_id() != -1:
            return False  # in a backward: the trial's own would wait for this thread
        # In a thread of its own nothing of the caller's holds: no autocast, no modes, hooks or streams.
        thread = threading.Thread(target=_try, args=tried)
        thread.start()
        thread.join()
        if _verdicts.get(tried) is not None:
            warnings.warn(
                f"evad_kernels: {op}: the {backend} kernels failed their trial on {device} in {dtype}, so auto leaves "
                f"them alone: {_verdicts[tried]}",
                stacklevel=4,
            )
    return _verdicts.get(tried, "") is None


# Where torch.compile traces, it is called there and then. As torch.compiler.assume_constant_result, which imports all
# of torch._dynamo for it.
_passes._dynamo_marked_constant = True


def _try(*tried) -> None:
    """Hold a trial, unless another thread has meanwhile; no verdict where memory is short."""
    op, backend, device, dtype = tried
    with _trials:
        if tried in _verdicts:
            return
        _trying[threading.get_ident()] = backend
        try:
            _verdicts[tried] = importlib.import_module("._trial", __package__).failure(op, device, dtype)
        except torch.OutOfMemoryError:
            pass
        except BaseException as error:  # a compiler's, a driver's: whatever it is, the kernels are not to be used
            _verdicts[tried] = f"{type(error).__name__}: {error}"
        finally:
            del _trying[threading.get_ident()]


def _asked() -> str:
    """What ``use_backend`` asks for, and in the thread of a trial what is tried."""
    if torch.compiler.is_dynamo_compiling() or not _trying:
        return _requested
    return _trying.get(threading.get_ident(), _requested)


def _failed(op: str, backend: str, tensor: Tensor) -> bool:
    return _verdicts.get((op, backend, tensor.device, tensor.dtype)) is not None


def _refusal(backend: str, tensor: Tensor, triton: str | None) -> str | None:
    """Why ``backend`` cannot take ``tensor``, or None."""
    if backend == "triton" and tensor.dtype == torch.float64:
        return "Triton kernels compute in float32, float64 is for reference and cpu"
    return MISSING[backend] or (triton if backend == "triton" else None)


def in_force(op: str, backends: Iterable[str], tensor: Tensor) -> str:
    """Which of ``backends``, all of ``tensor``'s device, runs ``op`` now: the one asked for, else the first available.

    Raises:
        RuntimeError: none of them can.
    """
    if (requested := _asked()) in backends:
        candidates = [requested]
    else:
        candidates = sorted((b for b in IMPLEMENTED[op] if b in backends), key=lambda b: _failed(op, b, tensor))
    for backend in candidates:
        if _refusal(backend, tensor, None) is None:
            return backend
    raise RuntimeError(refused(op, candidates[0], _refusal(candidates[0], tensor, None)))


def refused(op: str, backend: str, reason: str) -> str:
    """The one wording of a backend that does not serve."""
    return f"{op}: backend must be available, got {backend!r}: {reason}"


def unavailable(op: str, backend: str, device: str = "cpu") -> str | None:
    """Why ``backend`` cannot serve ``op`` here, or None; a tensor on ``device`` shows that there is one."""
    if backend != "reference" and backend not in IMPLEMENTED[op]:
        return NOT_IMPLEMENTED
    if DEVICE.get(backend) == "cuda" != device and not torch.cuda.is_available():
        return "no CUDA device"
    return MISSING[backend]


class Backends(dict):
    """``{op: {backend: None if available, else the reason}}``; prints as a table."""

    def __str__(self) -> str:
        reasons = list(dict.fromkeys(reason for row in self.values() for reason in row.values() if reason))
        rows = {
            op: {b: "yes" if r is None else f"{_answer(r)} ({reasons.index(r) + 1})" for b, r in row.items()}
            for op, row in self.items()
        }
        width = max(map(len, rows), default=0)
        lines = (
            f"{op:<{width}}" + "".join(f"  {row[b]:<{max(len(b), 7)}}" for b in BACKENDS)
            for op, row in {"": {b: b for b in BACKENDS}, **rows}.items()
        )
        notes = (f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        return "\n".join(line.rstrip() for line in (*lines, *notes))

    __repr__ = __str__


def _answer(reason: str) -> str:
    return "yes" if reason == UNTESTED else "no"


def backends() -> Backends:
    """Which backend serves which op on this machine, and why not.

    Returns:
        ``{op: {backend: None if available, else the reason}}``, printing as a table. What ``auto`` takes only after a
        trial has that as its reason, or how it failed one.
    """

    def reason(op: str, backend: str) -> str | None:
        failed = (why for (*tried, _, _), why in list(_verdicts.items()) if tried == [op, backend] and why is not None)
        return unavailable(op, backend) or next(failed, UNTESTED if (op, backend) in ON_TRIAL else None)

    return Backends({op: {backend: reason(op, backend) for backend in BACKENDS} for op in IMPLEMENTED})


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where sums and weights must not become half; "meta" has no autocast."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` with its last dimension contiguous, copied only if it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def launch(kernel: str, where: Tensor, *arguments: object) -> None:
    """Run a native kernel on ``where``'s device: on torch's CPU threads, or on the GPU's current stream."""
    if where.is_cuda:
        with torch.cuda.device(where.device):
            getattr(native.cuda, kernel)(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(native, kernel)(*arguments, torch.get_num_threads())
