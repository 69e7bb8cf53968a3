"""The studies, by name, in the order in which they are run."""

from collections.abc import Mapping

from .curvature import CurvatureStudy
from .study import Study
from .table3 import Rates, Table3

STUDIES: Mapping[str, Study] = {each.name: each for each in (Rates(), Table3(), CurvatureStudy())}
