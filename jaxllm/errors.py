"""The one exception for what a user can mend: a bad file, a bad argument, a missing package."""


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints it on stderr and exits with code 2; everything else that is raised is a bug of ours.
    """
