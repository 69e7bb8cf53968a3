from typing import Any

from numpy import float64, int64
from numpy.typing import NDArray
from torch import Tensor

LEAF: int
MAX_STATES: int
TYPES: tuple[str, ...]
REPORT_FIELDS: tuple[str, ...]
FAMILIES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]

GPU: str
LAUNCH_WORDS: int

def cuda_why_not(device: int) -> str: ...
def cuda_launch(
    family: int,
    weights: int,
    gradient: int,
    tables: tuple[int, ...],
    counts: tuple[int, ...],
    carried: NDArray[int64],
    grad_scale: tuple[int, float],
    found_inf: tuple[int, float],
    max_grad_norm: float,
    skip_nonfinite: bool,
    judged: bool,
    device: int,
    stream: int,
) -> None: ...
def targets() -> list[tuple[str, bool]]: ...
def openmp_library() -> str: ...
def collect(
    members: list[list[Tensor]],
    params: list[Tensor],
    state: dict[Tensor, dict[str, Any]],
    states: list[dict[str, Any]],
    saved: list[dict[str, Any]],
    columns: list[tuple[str, list[Tensor | None]]],
) -> list[Tensor] | None: ...

class Memory:
    @staticmethod
    def knows(exchange: object) -> bool: ...
    def __init__(self, exchange: object, tensors: list[Tensor | None]) -> None: ...
    def fits(self, tensors: list[Tensor | None]) -> bool: ...
    @property
    def renewed(self) -> bool: ...
    @property
    def doubtful(self) -> NDArray[int64]: ...
    @property
    def addresses(self) -> NDArray[int64]: ...

class Engine:
    def __init__(
        self, family: int, target: int, layers: NDArray[int64], items: NDArray[int64]
    ) -> None: ...
    def check_counters(self) -> None: ...
    def run(
        self,
        tables: tuple[NDArray[int64], NDArray[float64]],
        threads: int,
        grad_scale: float,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None: ...
    def skip(self) -> None: ...
    @property
    def reports(self) -> NDArray[float64]: ...
    @property
    def verdict(self) -> tuple[float, float, bool]: ...
