"""The bars: what ours must reach beside others, as ratios of times of the same turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from .clocks import Clock
from .contestants import Contestant
from .machine import cache_bytes, cores_share_a_cache
from .measure import Case, launches, runners_of, take_turns
from .models import shapes_of, sizes_of
from .peers import installed_version
from .statistics import Ratio, paired_ratio
from .traffic import Streams, copied_bytes, floor_bytes, model_bytes

NARROW = 0.03
"""Of the ratio: an interval that is wider is measured on, and decides nothing."""

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
        Contestants of the numerator: the fastest of them, so that none may be absent.
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
        None where it was not measured.
    turns : int
    reason : str
        Why it is undecided, but for a limit within the interval.
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


def bars_of(device: str) -> list[Bar]:
    """Return a device's."""
    return cuda_bars() if device == "cuda" else cpu_bars(cores_share_a_cache())


def decide(
    bars: Sequence[Bar],
    contestants: Sequence[Contestant],
    reasons: Mapping[str, str],
    clock: Clock,
    streams: Streams,
    threads: int,
    seconds: float,
) -> list[Verdict]:
    """Measure bars of one device, model and rule, then judge them.

    Turns go on until every bar's interval is narrower than `NARROW` of the ratio or time is up:
    when they stop has nothing to do with where the limit is. Then a bar is met when the 95%
    interval is below its limit (above it, for one of `at_least`), missed when it is beyond, and
    undecided when it holds the limit, is wider than that, or is of fewer than `LEAST_TURNS` turns.
    One that lacks a contestant is undecided, too, and is not measured. On a GPU the number of
    launches is a bar.

    Parameters
    ----------
    bars : sequence of Bar
    contestants : sequence of Contestant
        Those that are installed and were found right.
    reasons : mapping of str
        Of others' names: why they are not.
    clock : Clock
    streams : Streams
    threads : int
    seconds : float
        The time limit.
    """
    there = {each.name for each in contestants}
    lacking = {bar: _lacking(bar, {}, there, reasons) for bar in bars}
    asked = [bar for bar in bars if not lacking[bar]]
    verdicts = [_undecided(bar, why) for bar, why in lacking.items() if why]
    if not asked:
        return verdicts
    wanted = {name for bar in asked for name in bar.contestants}
    taking_part = [each for each in contestants if each.name in wanted]
    first = asked[0]
    case = Case(first.device, first.rule, first.model, shapes_of(first.model), threads)
    begin = time.monotonic()
    runners = runners_of(case, taking_part)
    series: dict[str, list[float]] = {}
    for runner in runners:
        series[runner.contestant.name] = runner.times.cold
        series[HOST + runner.contestant.name] = runner.times.host
    if any(COPY in bar.over for bar in asked):
        series[COPY] = []
    for turn in take_turns(runners, clock, warm=False):
        if COPY in series:
            series[COPY].append(streams.copy_time(clock))
        failed = {each.contestant.name: each.failure for each in runners if each.failure}
        is_late = time.monotonic() - begin > seconds
        if not is_late and turn < LEAST_TURNS:
            continue
        found = [
            _undecided(bar, why)
            if (why := _lacking(bar, failed, there, reasons))
            else _verdict(bar, series, turn)
            for bar in asked
        ]
        if is_late or all(each.ratio is None or each.ratio.width < NARROW for each in found):
            break
    if clock.device == "cuda":
        found += [
            _launches(bar, launches(runner.step))
            for runner in runners
            for bar in asked
            if bar.over == (runner.contestant.name,) and runner.contestant.is_ours
        ]
    return found + verdicts


def _lacking(
    bar: Bar, failed: Mapping[str, str], there: Set[str], reasons: Mapping[str, str]
) -> str:
    """Return which contestants a bar lacks and why; "" for none."""
    why = {name: reasons.get(name, "does not take part") for name in bar.contestants - there}
    why |= {name: failed[name] for name in bar.contestants if name in failed}
    return "; ".join(f"{name}: {why[name]}" for name in sorted(why))


def _undecided(bar: Bar, reason: str) -> Verdict:
    text = bar.text or f"{' or '.join(bar.over)} / {bar.under}"
    return Verdict(bar, text, "undecided", None, 0, reason)


def _verdict(bar: Bar, series: Mapping[str, Sequence[float]], turns: int) -> Verdict:
    over = min(bar.over, key=lambda name: statistics.median(series[name]))
    under = series[bar.under] if bar.under else [1.0] * turns
    ratio = paired_ratio([bar.factor * x for x in series[over]], under)
    text = bar.text or f"{over} / {bar.under}"
    if turns < LEAST_TURNS:
        return Verdict(bar, text, "undecided", ratio, turns, f"{turns} turns before the time limit")
    if ratio.width >= NARROW:
        wide = f"an interval of {ratio.width:.0%} at the time limit"
        return Verdict(bar, text, "undecided", ratio, turns, wide)
    return Verdict(bar, text, bar.word(ratio), ratio, turns)


def line_of(verdict: Verdict) -> str:
    """Return what a bar came to, as a line."""
    bar, ratio = verdict.bar, verdict.ratio
    limit = f"{'at least' if bar.at_least else 'at most'} {bar.limit:.2f}"
    head = f"{bar.device}  {bar.model:10}  {bar.rule:8}  {verdict.text:34}  {limit:13}"
    if ratio is not None:
        head += f"  {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {verdict.turns} turns"
    return f"{head}  {verdict.word}" + (f" ({verdict.reason})" if verdict.reason else "")


def _launches(bar: Bar, count: int) -> Verdict:
    text = f"launches, {bar.over[0]}"
    one = Bar(bar.device, bar.model, bar.rule, bar.over, "", 1.0, text=text)
    ratio = Ratio(count, count, count)
    return Verdict(one, text, "met" if count == 1 else "missed", ratio, 1)
