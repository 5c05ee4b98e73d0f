"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Bad usage, data or config: one clear line that names the file, record or key and what to do.

    The command line prints the line and exits with 2; such a failure is never worth a retry.
    """
