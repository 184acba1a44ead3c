"""Parsers of option values: sizes with units, ratios, devices."""

import re
from fractions import Fraction

import torch
import typer

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}{end}": 1000**k for k, prefix in enumerate("KMGT", start=1) for end in ("", "B")}
_UNITS |= {f"{prefix}IB": 1024**k for k, prefix in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_size(text: str | int) -> int:
    """Convert a size such as `60MB`, `1.5 GiB` or `60000` to bytes.

    Args:
        text: a number and a unit: B, KB, MB, GB, TB are powers of 1,000, KiB, MiB, GiB, TiB of 1,024; in
            upper or lower case, the B may be left out.

    Raises:
        typer.BadParameter: not a size, or less than one byte.

    Examples:
        >>> parse_size("60MB"), parse_size("1.5KiB"), parse_size("60_000")
        (60000000, 1536, 60000)
    """
    match = _SIZE.fullmatch(str(text).strip())
    factor = None if match is None else _UNITS.get(match[2].upper())
    if match is None or factor is None:
        raise typer.BadParameter(
            f"{text!r} is not a size; write bytes, such as 60000, or a unit: 60MB, 1.5GiB."
        )
    size = int(Fraction(match[1].replace("_", "")) * factor)
    if size < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte.")
    return size


def parse_share(text: str | float) -> float:
    """Parse a keep ratio in `(0, 1]`.

    Raises:
        typer.BadParameter: not a number, or outside; above 1 it says how a percentage is written.

    Examples:
        >>> parse_share("0.5")
        0.5
    """
    try:
        share = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number; write a share such as 0.5.") from None
    if 1 < share <= 100:
        raise typer.BadParameter(
            f"{text} is above 1, and would keep more parameters than there are; if it is a percentage, write "
            f"{share / 100:g} for {share:g} %."
        )
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text} does not lie in (0, 1]; write a share such as 0.5 for one half.")
    return share


def parse_device(text: str | torch.device) -> torch.device:
    """Parse the name of a device that is available on this machine.

    Raises:
        typer.BadParameter: torch knows no such device, or it is not there; lists those that are.

    Examples:
        >>> parse_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(text)
        usable = device.type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # unknown, absent, or not built in
        usable = False
    if not usable:
        found = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            found += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        raise typer.BadParameter(f"{text!s:.60} cannot be used here; choose one of {', '.join(found)}.")
    return device
