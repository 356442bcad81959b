"""Errors that are addressed to the person who runs the program.

Everything a user can cause (a wrong key, a missing file, a layout that does not divide) is a :class:`UserError`. The
command line prints it as one line, ``error: where: what, and what to do``, and exits with code 2. Mistakes of our own
stay ``assert``.
"""


class UserError(ValueError):
    """Something the user can mend.

    Args:
        where: the field, file (with line number) or tensor that is wrong, e.g. ``parallel.tensor`` or
            ``data.jsonl:17``.
        what: what is wrong, with both numbers, and what to change.
    """

    def __init__(self, where: str, what: str) -> None:
        self.where = where
        self.what = what
        super().__init__(f"{where}: {what}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str]]:
        """Pickle with both arguments, so that it survives worker processes."""
        return type(self), (self.where, self.what)


class ConfigError(UserError):
    """A recipe, an override, or a layout that cannot be run."""


class DataError(UserError):
    """A file of the training data that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is absent, unfinished, damaged, or of another architecture."""
