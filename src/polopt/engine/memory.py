"""Keeping a process near the size of the tensors it holds."""

import ctypes
import os
import sys

KERNELS = 64
"""Matrix products whose kernels are kept; one layer's forward and backward pass needs about 30."""


def bound_kernel_caches() -> None:
    """Let the CPU's matrix products keep few kernels, unless the environment says how many.

    oneDNN, and torch's layer above it, each keep one of about half a megabyte for each of the last 1024 shapes. The shapes
    of sampling and of micro-batches hardly ever come again, so that is a gigabyte for nothing. It has an effect before the
    process's first such product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_GLIBC = _LIBRARY if hasattr(_LIBRARY, "malloc_trim") else None


def return_free_memory() -> None:
    """Give the system back the pages in which nothing is stored, where the C library can do so (glibc).

    Sampling, a model's layers and its logits each free hundreds of megabytes in blocks of sizes that the others have little
    use for. Pages that are taken again cost time, so this is for the borders between them.
    """
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)


_TUNABLE = "glibc.malloc.tcache_count"


def restart_without_thread_cache() -> None:
    """Replace this process by itself with glibc's per-thread cache of small blocks off, unless the environment sets it.

    glibc cuts the few bytes around a block that make it aligned, as all of torch's are, off its ends and keeps them in that
    cache. A freed block is then a little too short for the next of its size: among tensors that stay, most of half a gigabyte
    of such holes in an update of 135 million parameters. It can be set at the start of a process only.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _GLIBC is None or not sys.executable or _TUNABLE in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=0"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
