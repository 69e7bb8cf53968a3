"""Bars: measured a model and rule at a time, a line each, with no package but torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from .bars import Bar, Verdict, decide, line_of
from .field import INTERRUPTED, Field, Request, interrupted, threads_of
from .measure import Row
from .results import save


def run_bars(request: Request, bars: Mapping[str, Sequence[Bar]], seconds: float) -> int:
    """Measure bars.

    Parameters
    ----------
    request : Request
    bars : mapping of str to sequence of Bar
        By device; of the request's models and rules.
    seconds : float
        The time limit of those that are measured together.

    Returns
    -------
    int
        The exit code: 0 where all are met, 1 where one is not, or `INTERRUPTED`.

    Raises
    ------
    WrongResultError
    """
    verdicts: list[Verdict] = []
    code = 0
    try:
        for device, of in bars.items():
            field = Field(request, device, _say)
            for group in _groups(of):
                first = group[0]
                _say(f"{device}, {first.model}, {first.rule}: {seconds / 60:.3g} minutes at most")
                with threads_of(request.threads):
                    found = decide(
                        group,
                        field.fit[first.rule],
                        {each.name: why for each, why in field.unfit[first.rule]},
                        field.clock,
                        field.streams,
                        request.threads,
                        seconds,
                    )
                verdicts += found
                for verdict in found:
                    _say(line_of(verdict))
                save(request.output, "bars", request.about, [_flat(v) for v in verdicts])
    except KeyboardInterrupt:
        _say(interrupted(len(verdicts), "bar", request.output))
        code = INTERRUPTED
    met = sum(verdict.word == "met" for verdict in verdicts)
    _say(f"{met} of {len(verdicts)} bars are met")
    return code or int(met < len(verdicts) or not verdicts)


def _say(words: str) -> None:
    print(words, flush=True)


def _groups(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars that are measured together; packages that take long do so among themselves."""
    found: dict[tuple[str, str, bool], list[Bar]] = {}
    for bar in bars:
        found.setdefault((bar.model, bar.rule, bar.at_least), []).append(bar)
    return list(found.values())


def _flat(verdict: Verdict) -> Row:
    ratio = {} if verdict.ratio is None else verdict.ratio._asdict()
    bar = asdict(verdict.bar)
    kept = {key: bar[key] for key in ("device", "model", "rule", "at_least", "limit")}
    return {
        **kept,
        "ratio": verdict.text,
        "word": verdict.word,
        **ratio,
        "turns": verdict.turns,
        "reason": verdict.reason,
    }
