"""Numbers as people read them."""

from __future__ import annotations


def of_bytes(count: float) -> str:
    """`512 MiB`, `3.2 GiB`."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            amount = count / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:,.0f} {unit}"
    return f"{count:.0f} bytes"


def of_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def of_parameters(count: int) -> str:
    """`999`, `3.8 M`, `8.0 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            amount = count / size
            return f"{amount:.1f} {unit}" if amount < 100 else f"{amount:.0f} {unit}"
    return str(count)


def of_share(share: float) -> str:
    """`41%`, and a digit more where that would be 0 or 1%."""
    return f"{share:.0%}" if share >= 0.095 or share == 0 else f"{share:.1%}" if share >= 0.001 else f"{share:.2%}"


def counted(count: int, thing: str, plural: str | None = None) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {thing if count == 1 else plural or thing + 's'}"
