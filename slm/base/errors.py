"""The two errors that end a run early: a mistake of the user, and a failure of the infrastructure.

Each error has one line with the fault, the value and the remedy. The entry points print that line, write it into
the run's `error` tag, and exit with the class's code. Any other exception is a bug and keeps its traceback.
"""

import errno

# Messages of the system or of a library, if disk or memory is used up, or if a disk can't be written
EXHAUSTED = {
    "No space left on device": "the disk is full",
    "database or disk is full": "the disk is full",
    "Disk quota exceeded": "the disk quota is used up",
    "[Errno 27] File too large": "a file may not grow that large here (ulimit -f)",
    "Read-only file system": "the disk is read-only",
    "readonly database": "the disk is read-only",
    "[Errno 13] Permission denied": "a file or folder may not be written",
    "Cannot allocate memory": "the memory is used up",
    "can't allocate memory": "the memory is used up",
    "bad_alloc": "the memory is used up",
    "bad allocation": "the memory is used up",
    "failed to map segment from shared object": "the memory is used up",  # when a library is imported
    "CUDA out of memory": "the GPU's memory is used up; a smaller batch_size takes less",
    "CUDA error: out of memory": "the GPU's memory is used up; a smaller batch_size takes less",
    "CUDA failure 2: out of memory": "the GPU's memory is used up; a smaller batch_size takes less",
}
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOMEM)


class BadInput(Exception):
    """A parameter, a file or a model of the user is wrong. Raised before any model is loaded."""

    exit_code = 2


class Unavailable(Exception):
    """A server, a store or a hub did not answer, or refused."""

    exit_code = 4


def exhausted(error: BaseException) -> str:
    """One line that names the used-up or read-only disk, or the used-up memory, behind an error; else ""."""
    if isinstance(error, BadInput | Unavailable):
        return ""
    if isinstance(error, MemoryError):
        return "the memory is used up; a smaller batch_size or model takes less"
    text = " ".join(str(error).split())[:400]
    if isinstance(error, OSError) and error.errno not in (*ERRNOS, None):
        return ""
    found = next((told for said, told in EXHAUSTED.items() if said in text), "")
    return f"{found}: {text}" if found else ""
