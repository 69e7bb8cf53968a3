"""The bars: what ours must reach beside others, as ratios of times of the same turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .clocks import Clock
from .contestants import Contestant
from .machine import cache_bytes
from .measure import Case, launches, runners_of, take_turns
from .models import shapes_of, sizes_of
from .peers import installed_version
from .statistics import Ratio, paired_ratio
from .traffic import Streams, copied_bytes, floor_bytes, model_bytes

NARROW = 0.03
"""Of the ratio: an interval that is wider is measured on."""

LEAST_TURNS = 15
"""Before an interval is believed."""

PYTHON_LARS = ("timm Lars", "pytorch-optimizer LARS", "torch-optimizer LARS")
PYTHON_LAMB = ("timm Lamb", "pytorch-optimizer Lamb", "torch-optimizer Lamb")

COPY = "copy"
"""A series of times beside the contestants': a large copy of each turn."""

HOST = "host, "
"""What the series of a contestant's host times begin with."""


@dataclass(frozen=True)
class Bar:
    """A ratio and its limit.

    Attributes
    ----------
    device, model, rule : str
    over : tuple of str
        Contestants of the numerator: the fastest that is there.
    under : str
        That of the denominator.
    limit : float
    at_least : bool
        Whether the ratio must be above the limit; else below.
    factor : float
        Of the ratio.
    text : str
        What the ratio is of, where it is of more than two contestants' times.
    """

    device: str
    model: str
    rule: str
    over: tuple[str, ...]
    under: str
    limit: float
    at_least: bool = False
    factor: float = 1.0
    text: str = ""

    @property
    def contestants(self) -> set[str]:
        """The names of those who must take part."""
        return {name.removeprefix(HOST) for name in (*self.over, self.under)} - {COPY, ""}

    def word(self, ratio: Ratio) -> str:
        """Return "met", "missed" or "undecided"."""
        if ratio.high < self.limit or ratio.low > self.limit:
            return "met" if (ratio.low > self.limit) == self.at_least else "missed"
        return "undecided"


@dataclass(frozen=True)
class Verdict:
    """What became of a bar.

    Attributes
    ----------
    bar : Bar
    text : str
        What the ratio is of.
    word : {"met", "missed", "undecided"}
    ratio : Ratio or None
        None where it could not be measured.
    turns : int
    reason : str
        Why there is no ratio.
    """

    bar: Bar
    text: str
    word: str
    ratio: Ratio | None
    turns: int
    reason: str = ""


def cpu_bars(share_a_cache: bool) -> list[Bar]:
    """Return the CPU's.

    Parameters
    ----------
    share_a_cache : bool
        Whether one cache serves all cores: what one measured, another updates from it.
    """
    bars = []
    small = 1.05 if share_a_cache else 1.15
    for model, plain, momentum, adam in (
        ("resnet50", 0.95, small, 1.10),
        ("bert-base", 0.95, 1.20, 1.25),
        ("ptb-large", 1.00, 1.40, 1.45),
    ):
        for rule, named, limit, python, ahead in (
            ("momentum", "LARS", momentum, PYTHON_LARS, 2.5),
            ("adam", "LAMB", adam, PYTHON_LAMB, 4.0),
        ):
            bars += [
                Bar("cpu", model, rule, ("plain",), "torch fused", plain),
                Bar("cpu", model, rule, (named,), "torch fused", limit),
                Bar("cpu", model, rule, ("DATE",), "torch fused", limit),
                Bar("cpu", model, rule, python, named, ahead, at_least=True),
            ]
    return bars


def cuda_bars() -> list[Bar]:
    """Return those of a GPU, whose cache decides how many bytes a ratio costs."""
    bars = []
    cache, copied = cache_bytes("cuda"), copied_bytes("cuda")
    for model in ("resnet50", "bert-large", "llama-1b"):
        sizes = sizes_of(shapes_of(model))
        for rule, named, of in (("momentum", "LARS", "gradient"), ("adam", "LAMB", "update")):
            fused = ("torch fused",)
            bars.append(Bar("cuda", model, rule, ("plain",), *fused, 1.0))
            for name, trust in ((named, of), ("DATE", "gradient")):
                moved, floor = model_bytes(rule, trust, sizes, cache), floor_bytes(rule, sizes)
                bars += [
                    Bar(
                        "cuda",
                        model,
                        rule,
                        (COPY,),
                        name,
                        0.9,
                        at_least=True,
                        factor=moved / copied,
                        text=f"copy of its model bytes / {name}",
                    ),
                    Bar("cuda", model, rule, (name,), *fused, 1.1 * moved / floor),
                ]
            if rule == "adam" and installed_version("apex") is not None:
                each = model_bytes(rule, of, sizes, cache) / sum(sizes)
                apex = ("apex FusedLAMB",)
                bars.append(Bar("cuda", model, rule, apex, named, 0.9 * 52 / each, at_least=True))
            allowed = 30 + 0.8 * len(sizes)
            bars += [
                Bar(
                    "cuda",
                    model,
                    rule,
                    (HOST + named,),
                    "",
                    1.0,
                    factor=1 / allowed,
                    text=f"host, {named} / {allowed:.0f} us",
                ),
                Bar("cuda", model, rule, (HOST + named,), HOST + fused[0], 1 / 3),
            ]
    return bars


def decide(
    bars: Sequence[Bar],
    contestants: Sequence[Contestant],
    clock: Clock,
    streams: Streams,
    threads: int,
    seconds: float,
) -> list[Verdict]:
    """Measure bars of one device, model and rule until each is decided or time is up.

    A bar is decided when its interval is narrower than `NARROW` of the ratio and does not hold the
    limit. On a GPU the number of launches is a bar, too.

    Parameters
    ----------
    bars : sequence of Bar
    contestants : sequence of Contestant
        Those that are installed and were found right.
    clock : Clock
    streams : Streams
    threads : int
    seconds : float
        The time limit.
    """
    wanted = {name for bar in bars for name in bar.contestants}
    taking_part = [each for each in contestants if each.name in wanted]
    first = bars[0]
    case = Case(first.device, first.rule, first.model, shapes_of(first.model), threads)
    runners = runners_of(case, taking_part)
    series: dict[str, list[float]] = {}
    for runner in runners:
        series[runner.contestant.name] = runner.times.cold
        series[HOST + runner.contestant.name] = runner.times.host
    if any(COPY in bar.over for bar in bars):
        series[COPY] = []
    begin = time.monotonic()
    for turn in take_turns(runners, clock, warm=False):
        if COPY in series:
            series[COPY].append(streams.copy_time(clock))
        is_late = time.monotonic() - begin > seconds
        if not is_late and turn < LEAST_TURNS:
            continue
        verdicts = [_verdict(bar, series, turn) for bar in bars]
        if is_late or all(map(_is_settled, verdicts)):
            break
    if clock.device == "cuda":
        verdicts += [
            _launches(bar, launches(runner.step))
            for runner in runners
            for bar in bars
            if bar.over == (runner.contestant.name,) and runner.contestant.is_ours
        ]
    return verdicts


def _is_settled(verdict: Verdict) -> bool:
    ratio = verdict.ratio
    return ratio is None or (verdict.word != "undecided" and ratio.width < NARROW)


def _verdict(bar: Bar, series: Mapping[str, Sequence[float]], turns: int) -> Verdict:
    there = [name for name in bar.over if series.get(name)]
    if not there or (bar.under and not series.get(bar.under)):
        missing = [name for name in (*bar.over, bar.under) if name and not series.get(name)]
        text = bar.text or f"{' or '.join(bar.over)} / {bar.under}"
        return Verdict(bar, text, "undecided", None, 0, f"not there: {', '.join(missing)}")
    over = min(there, key=lambda name: statistics.median(series[name]))
    under = series[bar.under] if bar.under else [1.0] * turns
    ratio = paired_ratio([bar.factor * x for x in series[over]], under)
    word = bar.word(ratio) if turns >= LEAST_TURNS else "undecided"
    return Verdict(bar, bar.text or f"{over} / {bar.under}", word, ratio, turns)


def _launches(bar: Bar, count: int) -> Verdict:
    text = f"launches, {bar.over[0]}"
    one = Bar(bar.device, bar.model, bar.rule, bar.over, "", 1.0, text=text)
    ratio = Ratio(count, count, count)
    return Verdict(one, text, "met" if count == 1 else "missed", ratio, 1)
