"""How commands end: a user's mistake, a stop after saving, faults of a disk that read like a mistake."""

import errno
import os

EXIT_USER, EXIT_AGAIN = 2, 42  # a user's mistake; saved and to be run again


class UserError(Exception):
    """Bad usage, data or config: one clear line that names the file, record or key and what to do.

    The command line prints the line and exits with 2; such a failure is never worth a retry.
    """


class RetryableError(Exception):
    """What another try may mend, told in one line: the command line prints it and exits with 1, a fault."""


class PreemptedError(Exception):
    """Work stopped on a signal after saving: the process exits with 42 and is to be run again."""


_REFUSALS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
_NUMBERS = {getattr(errno, name) for name in _REFUSALS if hasattr(errno, name)}
_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]


def disk_fault(error: BaseException) -> OSError | None:
    """What the disk refused for good (full, read-only, no rights, a file for a folder), or None.

    Libraries that write from C++ or Rust raise types of their own, which a full disk is told by the text of.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _NUMBERS:
            return link
        for text in _FULL:
            if text.lower() in str(link).lower():
                return OSError(errno.ENOSPC, text)
        link = link.__cause__ or link.__context__
    return None
