"""Errors that a user can fix: every script prints them as one line."""


class UserError(Exception):
    """An error that the user can fix; the message reads `what is wrong: how to fix it`."""


class RankLost(UserError):
    """Another process of the run has ended or never came; printed on any rank, other errors on rank 0 only."""
