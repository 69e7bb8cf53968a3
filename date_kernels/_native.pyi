from numpy import float64, int64
from numpy.typing import NDArray

LEAF: int
MAX_STATES: int
TYPES: tuple[str, ...]
TRUST_FIELDS: tuple[str, ...]
REPORT_FIELDS: tuple[str, ...]
FAMILIES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]

def targets() -> list[tuple[str, bool]]: ...
def openmp_library() -> str: ...

class Engine:
    def __init__(
        self, family: int, target: int, layers: NDArray[int64], items: NDArray[int64]
    ) -> None: ...
    def assign_rows(self) -> list[tuple[int, int]]: ...
    def run(
        self,
        gradients: list[int],
        tables: tuple[NDArray[float64], NDArray[float64]],
        threads: int,
        max_grad_norm: float,
        skip_nonfinite: bool,
    ) -> None: ...
    def skip(self) -> None: ...
    @property
    def reports(self) -> NDArray[float64]: ...
    @property
    def verdict(self) -> tuple[float, float, bool]: ...
