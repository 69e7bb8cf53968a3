"""``python -m date_optim.bench``: the command line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from .bars import Bar, bars_of
from .contestants import RULES
from .field import Request, WrongResultError, protocol
from .machine import describe
from .measure import Effort
from .models import MODELS
from .peers import PEERS
from .results import results_name
from .run_bars import run_bars
from .sweeps import SWEEPS

_EXTRA = ("rich", "matplotlib")

_QUICK_MODELS = ("lenet", "resnet50")
_USUAL_MODELS = ("resnet50", "bert-base", "ptb-large")
_USUAL_RULES = ("momentum", "adam")
_WIDTH = 120  # of tables in a file
_COMPILED = "torch-compiled"
_MINUTES = 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m date_optim.bench",
        description="Times optimizers' steps beside what one would use instead.",
    )
    parser.add_argument("--device", default=None, choices=("cpu", "cuda", "all"))
    parser.add_argument(
        "--rules", nargs="+", choices=RULES, metavar="RULE", help=f"of {', '.join(RULES)}"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a minute: {', '.join(_QUICK_MODELS)}, few turns, nothing compiled",
    )
    parser.add_argument("--threads", type=int, help="of torch and ours; torch's number by default")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="of JSON, CSV and PNG; bench-results/DEVICE-TIME by default",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--bars", action="store_true", help="hold ours to the project's bars")
    kind.add_argument("--sweep", choices=SWEEPS, help="time against one quantity")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time limit of the bars that are measured together; {_MINUTES} by default",
    )
    return parser


def _devices(asked: str | None, parser: argparse.ArgumentParser) -> list[str]:
    has_gpu = torch.cuda.is_available()
    if asked in ("cuda", "all") and not has_gpu:
        parser.error(f"--device {asked}: torch sees no GPU; there is cpu")
    if asked is None:
        return ["cuda" if has_gpu else "cpu"]
    return ["cpu", "cuda"] if asked == "all" else [asked]


def _refuse(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with an error where an option would be ignored."""
    if asked.threads is not None and asked.threads < 1:
        parser.error(f"--threads {asked.threads}: must be at least 1")
    if asked.minutes is not None and not asked.minutes > 0:
        parser.error(f"--minutes {asked.minutes:g}: must be above 0")
    together = [
        ("--sweep", asked.sweep, "--models", asked.models, "a sweep has shapes of its own"),
        ("--bars", asked.bars, "--quick", asked.quick, "bars go on until they are decided"),
        (
            "--sweep threads",
            asked.sweep == "threads",
            "--threads",
            asked.threads,
            "it goes through their numbers",
        ),
        ("without --bars", not asked.bars, "--minutes", asked.minutes, "it is the bars' limit"),
    ]
    for first, is_there, second, is_too, why in together:
        if is_there and is_too:
            parser.error(
                f"{second} does not go {first if 'out' in first else 'with ' + first}: {why}"
            )


def _bars(
    asked: argparse.Namespace,
    devices: list[str],
    rules: list[str],
    models: list[str],
    parser: argparse.ArgumentParser,
) -> dict[str, list[Bar]]:
    """Return the bars asked for, by device."""
    every = {device: bars_of(device) for device in devices}
    for option, named, key in (
        ("--rules", asked.rules, "rule"),
        ("--models", asked.models, "model"),
    ):
        known = sorted({str(getattr(bar, key)) for of in every.values() for bar in of})
        without = [name for name in named or () if name not in known]
        if without:
            parser.error(f"{option} {without[0]}: no bar is of it; there are {', '.join(known)}")
    return {
        device: [bar for bar in of if bar.rule in rules and bar.model in models]
        for device, of in every.items()
    }


def _output(asked: argparse.Namespace, devices: list[str], parser: argparse.ArgumentParser) -> Path:
    """Return the folder of the results, which holds none of the kind yet."""
    if asked.output is None:
        return Path("bench-results", f"{'-'.join(devices)}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder: Path = asked.output
    if folder.exists() and not folder.is_dir():
        parser.error(f"--output {folder}: is a file, not a folder")
    name = results_name(asked.bars, asked.sweep)
    if folder.joinpath(f"{name}.json").exists():
        parser.error(f"--output {folder}: holds a {name}.json already, which stays as it is")
    return folder


def main(words: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    words : sequence of str, optional
        Its arguments; those of the process by default.

    Returns
    -------
    int
        The exit code.
    """
    arguments = sys.argv[1:] if words is None else list(words)
    parser = _parser()
    asked = parser.parse_args(arguments)
    devices = _devices(asked.device, parser)
    _refuse(asked, parser)
    rules = list(asked.rules or _USUAL_RULES)
    models = list(
        asked.models or (MODELS if asked.bars else _QUICK_MODELS if asked.quick else _USUAL_MODELS)
    )
    bars = _bars(asked, devices, rules, models, parser) if asked.bars else {}
    output = _output(asked, devices, parser)
    missing = [name for name in _EXTRA if not asked.bars and find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(missing)
        print(
            f'{names} {verb} not installed: pip install "date-kernels[bench]" brings what tables '
            "and plots need.",
            file=sys.stderr,
        )
        return 2
    peers = asked.peers
    if peers is None and asked.sweep:
        peers = ["torch-fused", "torch-foreach"]
    elif peers is None:
        peers = [peer for peer in PEERS if peer != _COMPILED or not (asked.quick or asked.bars)]
    request = Request(
        devices=devices,
        rules=rules,
        models=models,
        peers=list(peers),
        named=asked.peers is not None,
        threads=asked.threads or torch.get_num_threads(),
        quick=asked.quick,
        effort=Effort(turns=5, seconds=4) if asked.quick else Effort(turns=21, seconds=120),
        output=output,
        about={
            **describe(devices, arguments),
            "protocol": {device: protocol(device) for device in devices},
        },
    )
    try:
        if asked.bars:
            return run_bars(request, bars, 60 * (asked.minutes or _MINUTES))
        from rich.console import Console  # noqa: PLC0415 - of the extra, which bars go without

        from .run import run_cases  # noqa: PLC0415 - as above

        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        return run_cases(request, asked.sweep or "", console)
    except WrongResultError as error:
        print(f"wrong result, nothing is timed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
