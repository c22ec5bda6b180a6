"""Errors that a user can cause and mend."""


class UserError(ValueError):
    """One sentence: what was wrong, what was expected, what to do.  The `llmkern` command prints it alone."""
