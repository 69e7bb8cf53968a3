"""What a study is: cases that give one result each, and what their results say together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from .training import Training

Size = Literal["full", "quick", "slice"]
"""All of a study; what shows its point within minutes; what a test runs within seconds."""

SIZES: tuple[Size, ...] = ("full", "quick", "slice")

Result = Mapping[str, Any]
"""What `papers.training.train` returns."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes
    ----------
    name : str
        Unique in its study; the name of its files.
    settings : mapping
        All that decides its result, fit for JSON: a result is kept as long as these are the same.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of strings: of equally many columns in each row and in the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Study(ABC):
    """One of the papers' studies.

    Attributes
    ----------
    name : str
        On the command line, and of its files.
    title : str
        What it repeats.
    """

    name: str
    title: str

    @abstractmethod
    def cases(self, size: Size) -> list[Case]:
        """List its runs."""

    @abstractmethod
    def training(self, settings: Mapping[str, Any], data: Path | None, device: str) -> Training:
        """Make what `papers.training.train` trains.

        Parameters
        ----------
        settings : mapping
            A case's.
        data : Path, optional
            The folder of the data; without it where Debian's package puts them.
        device : {"cpu", "cuda"}

        Raises
        ------
        DataError
            If the data are not there or not what they should be.
        """

    @abstractmethod
    def tables(self, results: Sequence[Result]) -> dict[str, Table]:
        """Make the tables of the results, by their titles."""

    @abstractmethod
    def draw(self, results: Sequence[Result]) -> Figure:
        """Draw the results."""
