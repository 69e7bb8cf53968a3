"""Every variant of every rule, in every form of momentum scaling that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from date_kernels.rules import RULES

FORMS = ("outside", "inside", "ratio_inside")


def _all() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for rule in RULES.values():
        for variant, options in rule.variants.items():
            for form in FORMS if options.get("momentum") else FORMS[:1]:
                name = f"{rule.name}-{variant}" + ("" if form == "outside" else f"-{form}")
                yield name, rule.name, {**options, "momentum_scaling": form}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (rule, options) for name, rule, options in _all()
}
"""By name: a rule and the options that select one of its variants."""
