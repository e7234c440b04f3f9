"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. The command line exits with 2."""
