"""Errors that a user can mend: every script shows them as one line."""


class UserError(Exception):
    """Something the user can mend; the message reads `what is wrong: how to mend it`."""


class RankLost(UserError):
    """Another process of the run has ended: worth a line on whichever is left, where else rank 0 alone speaks."""
