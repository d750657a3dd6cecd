"""Lengths of time as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:01:30."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def short(seconds: float) -> str:
    """The same, but 12.3 s of what is below a minute."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
