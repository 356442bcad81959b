"""Numbers as people read them in logs and tables."""

import math


def compact(value: float) -> str:
    """A number in at most four characters or so: 873, 5.2k, 1.3M."""
    for suffix in ("", "k", "M", "G"):
        if abs(value) < 1000 or suffix == "G":
            return f"{value:.0f}{suffix}" if abs(value) >= 100 or not suffix else f"{value:.1f}{suffix}"
        value /= 1000
    raise AssertionError("unreachable")


def clock(seconds: float) -> str:
    """``02:10``, ``1:02:10`` or ``3d 04:00:00``."""
    whole = math.ceil(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{whole % 60:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes:02}:{whole % 60:02}"
