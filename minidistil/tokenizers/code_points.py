"""Sets of characters as patterns, for tables that must not depend on the Unicode version of this Python."""

import re


def characters(ranges, form="[%s]"):
    """Returns the pattern of one character in hexadecimal ranges."""
    return re.compile(form % re.sub("[0-9A-F]+ ?", lambda code: f"\\U{code[0].strip():0>8}", ranges))
