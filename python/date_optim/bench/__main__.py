"""``python -m date_optim.bench``: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from .contestants import RULES
from .machine import describe
from .measure import Effort
from .models import MODELS
from .peers import PEERS
from .sweeps import SWEEPS

_EXTRA = ("rich", "matplotlib")

_QUICK_MODELS = ("lenet", "resnet50")
_USUAL_MODELS = ("resnet50", "bert-base", "ptb-large")
_USUAL_RULES = ("momentum", "adam")
_WIDTH = 120  # of tables in a file
_COMPILED = "torch-compiled"


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
    parser.add_argument("--output", type=Path, metavar="DIR", help="leave JSON, CSV and PNG there")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--bars", action="store_true", help="hold ours to the project's bars")
    kind.add_argument("--sweep", choices=SWEEPS, help="time against one quantity")
    parser.add_argument(
        "--minutes", type=float, default=5, help="time limit of the bars that are measured together"
    )
    return parser


def _devices(asked: str | None, parser: argparse.ArgumentParser) -> list[str]:
    has_gpu = torch.cuda.is_available()
    if asked in ("cuda", "all") and not has_gpu:
        parser.error(f"--device {asked}: torch sees no GPU; there is cpu")
    if asked is None:
        return ["cuda" if has_gpu else "cpu"]
    return ["cpu", "cuda"] if asked == "all" else [asked]


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
    if asked.threads is not None and asked.threads < 1:
        parser.error(f"--threads {asked.threads}: must be at least 1")
    devices = _devices(asked.device, parser)
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(missing)
        print(
            f'{names} {verb} not installed: pip install "date-kernels[bench]" brings what tables '
            "and plots need.",
            file=sys.stderr,
        )
        return 2
    from rich.console import Console  # noqa: PLC0415 - of the extra

    from .run import Request, WrongResultError, run_bars, run_cases  # noqa: PLC0415 - as above

    peers = asked.peers
    if peers is None and asked.sweep:
        peers = ["torch-fused", "torch-foreach"]
    elif peers is None:
        peers = [peer for peer in PEERS if peer != _COMPILED or not (asked.quick or asked.bars)]
    models = asked.models or (
        MODELS if asked.bars else _QUICK_MODELS if asked.quick else _USUAL_MODELS
    )
    request = Request(
        devices=devices,
        rules=list(asked.rules or _USUAL_RULES),
        models=list(models),
        peers=list(peers),
        threads=asked.threads or torch.get_num_threads(),
        quick=asked.quick,
        effort=Effort(turns=5, seconds=4) if asked.quick else Effort(turns=21, seconds=120),
        output=asked.output,
        about=describe(devices, arguments),
    )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        if asked.bars:
            return run_bars(request, 60 * asked.minutes, console)
        return run_cases(request, asked.sweep or "", console)
    except WrongResultError as error:
        print(f"wrong result, nothing is timed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
