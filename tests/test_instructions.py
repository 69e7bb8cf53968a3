"""What the CPU's inner loops execute for an element: a guard of their speed that is no timer.

A program steps through a step one instruction at a time (native/single_step.cpp); the difference
of two sizes, by the elements between them, leaves the loops. What they may execute and must read
and write follows from the formulas, whose operations the same program counts by running the rules'
text on values that count. ``pytest -s`` prints the table.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from compiled import CSRC, compile_cpp, out
from variants import VARIANTS

from date_kernels import native
from date_kernels.rules import RULES, row_of

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="single-steps by x86-64's trap flag"
)

VECTOR = {"baseline": 4, "avx2": 8, "avx512": 16}
"""Floats of a register."""

LANES = 16
"""Of a sum of squares (csrc/cpu/thread.h)."""

BLOCK = 1024
"""Elements that pass through a buffer at once."""

SMALL, LARGE = BLOCK, 2 * BLOCK
"""Elements: what they differ by is whole blocks, and so whole vectors and lanes, of one leaf."""

LINE = 16
"""Floats of a cache line, which one instruction prefetches."""

STRIP = 64
"""Elements whose lines are prefetched together (csrc/cpu/thread.h)."""

LOOP = 3
"""Instructions that advance, compare and branch."""


DECAY = 3
"""To ask whether there is one: a comparison and two branches."""


# What a formula asks for


@dataclass(frozen=True)
class Formula:
    """Operations of one element."""

    arithmetic: int = 0
    choices: int = 0
    states: int = 0

    def __add__(self, other: Formula) -> Formula:
        return Formula(
            self.arithmetic + other.arithmetic,
            self.choices + other.choices,
            self.states + other.states,
        )


@dataclass
class Budget:
    """Of one element: what its loops may execute, and the arrays that they read and write."""

    vector: int
    instructions: float = 0.0
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)

    def loop(
        self,
        formula: Formula,
        *,
        read: Mapping[str, int],
        written: Mapping[str, int],
        prefetched: int,
        buffered: int = 0,
    ) -> None:
        """A loop over vectors, within one over strips, whose lines of `prefetched` arrays another
        loop prefetches, each with a pointer to advance. A strip may ask whether there is a decay,
        as `squares` does, and take its operations' constants to registers.

        An operation reads one operand from memory, so that a value that two of them use may be
        loaded twice. Before AVX its result overwrites an operand, so that a move comes with it, and
        a choice is a comparison and three operations on masks instead of one.
        """
        first = VECTOR["baseline"] == self.vector
        operations = formula.arithmetic * (2 if first else 1) + formula.choices * (
            8 if first else 2
        )
        accesses = 2 * sum(read.values()) + sum(written.values()) + buffered
        self.instructions += (operations + accesses + LOOP) / self.vector
        constants = formula.arithmetic + formula.choices
        self.instructions += (2 * prefetched + LOOP) / LINE + (constants + DECAY + LOOP) / STRIP
        self._touch(read, written)

    def squares(
        self, formula: Formula, *, streams: int, read: Mapping[str, int], prefetched: int
    ) -> None:
        """A loop over lanes that adds up squares in double, `streams` of them.

        A vector is two of doubles, each converted, squared and added, and the upper half has to be
        taken out first, before AVX through memory. There 16 accumulators do not fit the registers
        beside the rest: each is loaded and stored. Whether the gradient has a decay is asked once
        for all lanes.
        """
        vectors = LANES // self.vector
        first = VECTOR["baseline"] == self.vector
        halves = vectors * streams * (2 * 3 + (2 if first else 1))
        loads = vectors * 2 * streams
        accumulators = 2 * streams * LANES // 2 if first else 0
        operations = vectors * formula.arithmetic * (2 if first else 1)
        lanes = halves + loads + accumulators + operations + prefetched + DECAY + LOOP
        self.instructions += lanes / LANES
        self._touch(read, {})

    def _touch(self, read: Mapping[str, int], written: Mapping[str, int]) -> None:
        for total, more in ((self.read, read), (self.written, written)):
            for array, count in more.items():
                total[array] = total.get(array, 0) + count


NOTHING = Formula()

PLAIN, SCAN, OF_GRADIENT, OF_UPDATE = "plain", "scan", "of gradient", "of update"

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("plain", {}),
    "decayed": ("plain", {"weight_decay": 0.01}),
    SCAN: ("scan", {}),
    OF_GRADIENT: ("whole", {"trust": True}),
    OF_UPDATE: ("whole", {"trust": True, "trust_of": "update"}),
}
"""By the table's column: a kind of item, and options."""


def budget_of(step: str, vector: int, formulas: Mapping[str, Formula]) -> Budget:
    """What a step of a layer may cost for each element."""
    budget = Budget(vector)
    direction, update, applied = (formulas[of] for of in ("direction", "update", "applied"))
    states, weights, gradient = {"states": direction.states}, {"weights": 1}, {"gradient": 1}
    if step == SCAN:
        budget.squares(formulas["measured"], streams=1, read=gradient, prefetched=1)
    if step == OF_GRADIENT:
        budget.squares(formulas["measured"], streams=2, read=weights | gradient, prefetched=2)
    conclude = formulas.get("conclude")
    if step == OF_UPDATE:
        # Without decay the direction needs no weights. The update lies in a buffer.
        stored = states if conclude else {}
        read = gradient | states
        formula, prefetched = direction + update, sum((weights | read).values())
        budget.loop(formula, read=read, written=stored, prefetched=prefetched, buffered=1)
        budget.squares(NOTHING, streams=2, read=weights, prefetched=0)
        # A block's lanes go to registers and back, two streams of them, and the constants of two
        # loops to registers.
        budget.instructions += (2 * 2 * 2 * LANES + 2 * LANES) / BLOCK
    if step == OF_UPDATE and conclude:  # it is not advanced again: Note [Early commit]
        reads = weights | {"states": conclude.states}
        formula = conclude + update + applied
        budget.loop(formula, read=reads, written=weights, prefetched=sum(reads.values()))
    else:
        reads = weights | gradient | states
        formula, written = direction + update + applied, weights | states
        budget.loop(formula, read=reads, written=written, prefetched=sum(reads.values()))
    return budget


# What the processor executes


WIDTHS = {"BYTE": 1, "WORD": 2, "DWORD": 4, "QWORD": 8, "XMMWORD": 16, "YMMWORD": 32, "ZMMWORD": 64}

REGISTERS = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    *(f"r{i}" for i in range(8, 16)),
)
"""In the order of the program's output."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of the program, and what it did in one run."""

    address: int
    text: str
    count: int
    registers: Mapping[str, int]

    @cached_property
    def memory(self) -> tuple[range, bool] | None:
        """The bytes of its memory operand at its last execution, and whether it writes them."""
        operand = re.search(r"(\w+) PTR \[([^]]+)\]", self.text)
        if operand is None or "rip" in operand[2] or self.text.startswith(("nop", "prefetch")):
            return None
        begin = 0
        for sign, term, scale in re.findall(r"([+-]?)(\w+)(?:\*(\d))?", operand[2]):
            value = self.registers[term] if term in self.registers else int(term, 16)
            begin += int(f"{sign}1") * value * int(scale or 1)
        _, operands = self.text.split(None, 1)
        return range(begin, begin + WIDTHS[operand[1]]), operands.startswith(operand[0])


@dataclass(frozen=True)
class Run:
    """One run of the program."""

    formulas: Mapping[str, Formula]
    arrays: list[tuple[str, range]]
    instructions: Mapping[int, Instruction]


@dataclass(frozen=True)
class Program:
    """The program, and its disassembly: the text at each address."""

    path: Path
    disassembly: Mapping[int, str]

    def run(self, *arguments: object) -> Run:
        formulas, arrays, instructions = {}, [], {}
        for line in out(self.path, *(str(argument) for argument in arguments)).splitlines():
            first, *rest = line.split()
            if first == "formula":
                formulas[rest[0]] = Formula(*map(int, rest[1:]))
            elif first == "array":
                begin = int(rest[1], 16)
                arrays.append((rest[0], range(begin, begin + int(rest[2]))))
            else:
                at, registers = int(first, 16), [int(value, 16) for value in rest[1:]]
                instructions[at] = Instruction(
                    at,
                    self.disassembly.get(at, "in a library"),
                    int(rest[0]),
                    dict(zip(REGISTERS, registers, strict=True)),
                )
        return Run(formulas, arrays, instructions)


@dataclass(frozen=True)
class Measured:
    """Of one element: instructions, and how often its place in an array was read and written."""

    instructions: float
    read: Mapping[str, float]
    written: Mapping[str, float]


def measure(small: Run, large: Run) -> Measured:
    """What the larger run did more, by element."""
    more = {
        at: large.instructions[at].count - (of.count if (of := small.instructions.get(at)) else 0)
        for at in large.instructions
    }
    loops = [
        range(int(target[1], 16), at + 1)
        for at, instruction in large.instructions.items()
        if more[at] > 0
        and (target := re.match(r"j\w+ +([0-9a-f]+)", instruction.text))
        and int(target[1], 16) <= at
    ]
    # Operands in the same bytes, of the same loop, are one access: what two operations use.
    touched: dict[tuple[Any, ...], set[int]] = {}
    for at, instruction in large.instructions.items():
        if more[at] == 0 or instruction.memory is None:
            continue
        operand, writes = instruction.memory
        inner = min((loop for loop in loops if at in loop), key=len, default=None)
        for name, array in large.arrays:
            if operand.start in array:
                access = (name, writes, more[at], inner, array)
                touched.setdefault(access, set()).update(operand)
    floats: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for (name, writes, count, *_), memory in touched.items():
        total = floats[writes]
        total[name] = total.get(name, 0) + count * len(memory) / 4 / (LARGE - SMALL)
    return Measured(sum(more.values()) / (LARGE - SMALL), read=floats[False], written=floats[True])


@pytest.fixture(scope="module", params=VECTOR)
def target(request: pytest.FixtureRequest) -> str:
    """An instruction set that runs here."""
    name: str = request.param
    if not dict(native.module().targets())[name]:
        pytest.skip(f"this processor has no {name}")
    return name


@pytest.fixture(scope="module")
def program(
    target: str, object_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Program:
    """native/single_step.cpp, over an object file of the build's own."""
    path = tmp_path_factory.mktemp("single_step") / "single_step"
    # Instructions lie where the disassembly says, and the first call of a function is like others.
    linked = ["-no-pie", "-Wl,-z,now", "-fopenmp"]
    if target != "baseline":  # the instruction sets that are not asked for stay null
        linked += ["-DDK_X86_TARGETS", "-Wl,--unresolved-symbols=ignore-in-object-files"]
    sources = (HERE / "native/single_step.cpp", CSRC / "cpu/launch.cpp", object_of(target))
    compile_cpp("-O1", *linked, *sources, "-o", path)
    listing = out("objdump", "--disassemble", "--no-show-raw-insn", "-Mintel", path)
    lines = re.finditer(r"^ +([0-9a-f]+):\t(\S.*)$", listing, re.MULTILINE)
    return Program(path, {int(line[1], 16): line[2] for line in lines})


def _loops() -> dict[tuple[Any, ...], str]:
    """A variant by what selects its loop."""
    selects = ("momentum", "nesterov", "centered", "amsgrad")
    return {
        (rule, *(bool(options.get(option)) for option in selects)): name
        for name, (rule, options) in reversed(VARIANTS.items())
    }


@dataclass(frozen=True)
class Case:
    """A variant's step: what it does and what it may cost."""

    variant: str
    step: str
    measured: Measured
    budget: Budget

    @classmethod
    def of(cls, program: Program, target: str, variant: str, step: str) -> Case:
        family, options = VARIANTS[variant]
        kind, more = STEPS[step]
        rule = RULES[family]
        row = row_of(rule, rule.complete({"lr": 0.1, **options, **more}), excluded=False)
        _, fields, _ = native.module().FAMILIES[family]
        numbers = [float(row[name]) for name in fields]
        small, large = (
            program.run(target, family, kind, size, *numbers) for size in (SMALL, LARGE)
        )
        budget = budget_of(step, VECTOR[target], large.formulas)
        return cls(variant, step, measure(small, large), budget)

    def __str__(self) -> str:
        arrays = (
            f"{name} {self.measured.read.get(name, 0):g}/{self.measured.written.get(name, 0):g}"
            for name in ("weights", "gradient", "states")
        )
        numbers = f"{self.measured.instructions:8.3f}{self.budget.instructions:8.3f}"
        return f"{self.variant:28}{self.step:13}{numbers}  {', '.join(arrays)}"

    @property
    def holds(self) -> bool:
        """Whether the budget is kept, and each array read and written as often as it must be."""
        measured, budget = self.measured, self.budget
        return (
            0 < measured.instructions <= budget.instructions
            and measured.read == pytest.approx({k: n for k, n in budget.read.items() if n})
            and measured.written == pytest.approx({k: n for k, n in budget.written.items() if n})
        )


@pytest.mark.parametrize("variant", _loops().values())
def test_loops_execute_what_their_formulas_ask_for(
    program: Program, target: str, variant: str
) -> None:
    """Every rule and variant, in every kind of step."""
    cases = [Case.of(program, target, variant, step) for step in STEPS]
    print(f"\n{target:28}{'step':13}{'executed':>8}{'budget':>8}  reads/writes, by element")
    print(*cases, sep="\n")
    broken = [str(case) for case in cases if not case.holds]
    assert not broken, "\n".join(["these loops do more than they must:", *broken])
