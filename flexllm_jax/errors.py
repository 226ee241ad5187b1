"""What a script tells its user in one line, without a traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message names it, its value and the remedy."""
