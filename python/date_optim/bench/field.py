"""Who takes part in what the command line asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .check import why_not
from .clocks import CLOCKS, Clock, cold_bytes
from .contestants import Contestant, contestants, others
from .measure import Effort
from .peers import installed_version
from .traffic import Streams, stream_elements

INTERRUPTED = 130
"""The exit code of a command that was interrupted, as a shell has it."""


@dataclass(frozen=True)
class Request:
    """The command line, understood.

    Attributes
    ----------
    devices, rules, models, peers : list of str
    named : bool
        Whether the peers were named by whom asks: each has a row, then.
    threads : int
    quick : bool
    effort : Effort
        Of a case.
    output : Path
        Folder of the results.
    about : dict
        What a results file says beside its rows.
    """

    devices: list[str]
    rules: list[str]
    models: list[str]
    peers: list[str]
    named: bool
    threads: int
    quick: bool
    effort: Effort
    output: Path
    about: dict[str, Any]


class WrongResultError(Exception):
    """One of ours differs from the reference: nothing is timed."""


class Field:
    """Those who take part on a device, found right or not before anything is timed."""

    def __init__(self, request: Request, device: str, say: Callable[[str], None]) -> None:
        self.clock: Clock = CLOCKS[device]()
        self.streams = Streams(device)
        self.fit: dict[str, list[Contestant]] = {}
        self.unfit: dict[str, list[tuple[Contestant, str]]] = {}
        for rule in request.rules:
            self.fit[rule] = []
            self.unfit[rule] = others(rule, device, request.peers) if request.named else []
            for each in contestants(rule, device, request.peers):
                why = _why_absent(each) or why_not(each, device)
                if why is None:
                    self.fit[rule].append(each)
                elif each.is_ours:
                    raise WrongResultError(f"{rule}, {each.name} on {device}: {why}")
                else:
                    self.unfit[rule].append((each, why))
            names = ", ".join(each.name for each in self.fit[rule])
            say(f"{device}, {rule}: right against the reference: {names}")


def _why_absent(contestant: Contestant) -> str | None:
    if contestant.is_ours or installed_version(contestant.peer) is not None:
        return None
    return "not installed"


def protocol(device: str) -> dict[str, int]:
    """Return the bytes that times and rates are of on a device."""
    copied, stepped = stream_elements(device)
    return {
        "rewritten_bytes": cold_bytes(device),
        "copied_array_bytes": 4 * copied,
        "stepped_array_bytes": 4 * stepped,
    }


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let torch have so many threads, within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interrupted(count: int, what: str, folder: Path) -> str:
    """Return what a run that was interrupted says."""
    if not count:
        return f"interrupted: no {what} was measured"
    return f"interrupted: {count} {what}{'s are' if count > 1 else ' is'} kept in {folder}"
