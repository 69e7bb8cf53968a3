"""Every variant of every rule, in every form of momentum scaling that it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from date_kernels.rules import RULES, Rule

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


def _full(rule: Rule) -> str:
    def states(variant: str) -> int:
        return len(rule.used(rule.complete({"lr": 1.0, **rule.variants[variant]})))

    return f"{rule.name}-{max(rule.variants, key=states)}"


FULL = {rule.name: _full(rule) for rule in RULES.values()}
"""A variant of each rule that has all of its states."""
