"""glibc's allocator, told to keep the large blocks that it has."""

import ctypes
import logging
import sys

logger = logging.getLogger("sharpwise.cli")

# From malloc.h, and the values: with these, activations are reused; by default glibc gives each tensor above 32 MB
# (128 kB at first) back to the kernel and page-faults it in again, which costs tiny models up to 1.75x.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ((_M_MMAP_THRESHOLD, 2**31 - 1), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))


def keep_large_blocks() -> bool:
    """Make malloc keep freed memory for this process; False where malloc is not glibc's, and then nothing is changed.

    The resident size no longer falls below its peak: for commands that train, never for a library import.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl and others have a mallopt that does nothing, but not this
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        logger.debug("malloc is not glibc's and stays as it is")
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    accepted = [mallopt(option, value) == 1 for option, value in _SETTINGS]  # each is worth something alone
    return all(accepted)
