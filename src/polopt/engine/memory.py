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

    Sampling and the update each free hundreds of megabytes in blocks of sizes that the other has little use for. Pages that
    are taken again cost time, so this is for the border between them, not for every micro-batch.
    """
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)
