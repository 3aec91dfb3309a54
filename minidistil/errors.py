"""Errors that a user can mend: every script shows them as one line."""


class UserError(Exception):
    """Something the user can mend; the message reads `what is wrong: how to mend it`."""


class RankLost(UserError):
    """Another process of the run has ended or never came: worth a line on each, where else rank 0 alone speaks."""
