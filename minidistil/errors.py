"""Errors that a user can fix: every script prints them as one line."""


class UserError(Exception):
    """An error that the user can fix; the message reads `what is wrong: how to fix it`."""


class RankError(UserError):
    """An error that perhaps one process of a run has alone: printed on any rank, others on the first of a machine."""


class RankLost(RankError):
    """Another process of the run has ended or never came."""


def is_out_of_memory(error):
    """Whether an exception means exhausted memory, which PyTorch, Triton and cuBLAS say in different ways."""
    said = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(part in str(error) for part in said)
