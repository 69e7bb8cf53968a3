"""Directions that must never exist, read from imports and includes as compilers read them.

csrc -> torch; rules and trust_ratio.h -> tensors, devices, intrinsics; cpu <-> cuda;
date_kernels -> date_optim; the reference -> anything but NumPy; schedules -> torch; a package ->
tests or bench; either package -> torch's private names.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGES = {"date_kernels": ROOT / "date_kernels", "date_optim": ROOT / "python" / "date_optim"}
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
STANDARD = sys.stdlib_module_names


# --- Python ---------------------------------------------------------------------------------------


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the modules that a module imports, wherever in it; ``from a import b`` gives a.b."""
    found: set[str] = set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(path.read_text(), module, is_package=path.name == "__init__.py")


def roots(modules: set[str]) -> set[str]:
    return {module.split(".", maxsplit=1)[0] for module in modules}


def reached_from(module: str) -> set[str]:
    """Return all that a module of ours imports, directly or through other modules of ours.

    Packages' own ``__init__`` aside: importing ``date_optim.schedules`` runs it, but what it needs
    is not what schedules needs.
    """
    seen, todo, found = set(), [module], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        direct = imports_of(current)
        found |= direct
        names = direct | {name.rpartition(".")[0] for name in direct}
        todo += [name for name in names if name in MODULES and name not in PACKAGES]
    return found


def private_torch_names(source: str) -> set[str]:
    """Return names of torch with a leading underscore that a module imports or spells out.

    ``torch._C``, ``from torch._x import y``, ``nn.functional._z`` after ``from torch import nn``;
    also what it calls on tensors and optimizers, which have no name of torch before them.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".", maxsplit=1)[0]
                known[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    full = {name for name in known.values() if roots({name}) == {"torch"}}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if dotted := ".".join(chain_of(node, known)):
            full.add(dotted)
        inherited = hasattr(torch.Tensor, node.attr) or hasattr(torch.optim.Optimizer, node.attr)
        if is_private(node.attr) and inherited:
            found.add(node.attr)
    return found | {name for name in full if any(map(is_private, name.split(".")))}


def chain_of(node: ast.expr, known: dict[str, str]) -> list[str]:
    """Return ``a.b.c`` as its parts where a is a name of torch, else nothing."""
    if isinstance(node, ast.Name):
        name = known.get(node.id, "")
        return name.split(".") if roots({name}) == {"torch"} else []
    if isinstance(node, ast.Attribute) and (before := chain_of(node.value, known)):
        return [*before, node.attr]
    return []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_the_reader_of_imports() -> None:
    """Every form of an import is seen, or the tests below would pass on anything."""
    source = """
import a.b, c as d
from e.f import g as h
from . import i
from .j import k
from ..l import m
def f():
    import n
    if True:
        from .o import p
"""
    assert imports(source, "x.y.z") == {
        *("a.b", "c", "e.f.g", "x.y.i", "x.y.j.k", "x.l.m", "n", "x.y.o.p"),
    }
    assert imports("from .a import b", "x", is_package=True) == {"x.a.b"}
    assert imports("'import a'  # import b", "x") == set()


def test_the_reader_of_private_names() -> None:
    source = """
import torch
import torch.optim as optim
from torch import nn, _utils
from torch.optim.optimizer import _default_to_fused_or_foreach
from . import _native
torch._C._nn
optim._functional
nn.functional._x
torch.__version__
self._mine
tensor._version
super()._patch_step_function()
"""
    assert private_torch_names(source) == {
        "torch._utils",
        "torch.optim.optimizer._default_to_fused_or_foreach",
        "torch._C",
        "torch._C._nn",
        "torch.optim._functional",
        "torch.nn.functional._x",
        "_version",
        "_patch_step_function",
    }


def test_all_modules_are_there() -> None:
    assert {
        *("date_kernels", "date_kernels.reference", "date_kernels.rules", "date_kernels.plan"),
        *("date_optim", "date_optim.optimizer", "date_optim.schedules", "date_optim.trust_ratio"),
    } <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_package_knows_no_tests_and_no_benchmarks(module: str) -> None:
    # torch itself needs typing_extensions, which Python 3.10 needs here.
    allowed = {"date_kernels", "date_optim", "numpy", "torch", "typing_extensions", *STANDARD}
    if module.startswith("date_kernels.triton_"):
        allowed.add("triton")
    if module.startswith("date_optim.integrations."):
        allowed.add(module.rsplit(".", maxsplit=1)[1])
    if module.startswith("date_optim.bench."):  # the extra's
        allowed |= {"matplotlib", "rich"}
    assert roots(imports_of(module)) <= allowed


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("date_kernels")])
def test_the_kernels_know_no_optimizers(module: str) -> None:
    assert "date_optim" not in roots(imports_of(module))
    assert not any(name.startswith("torch.optim") for name in imports_of(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("date_optim")])
def test_the_optimizers_know_no_kernels(module: str) -> None:
    """The package's own names, and the table of rules."""
    for name in imports_of(module):
        if roots({name}) == {"date_kernels"}:
            assert name.startswith("date_kernels.rules.") or name.count(".") == 1, name
            assert name not in MODULES, name


def test_the_reference_needs_numpy_alone() -> None:
    assert roots(reached_from("date_kernels.reference")) <= {"numpy", *STANDARD}


@pytest.mark.parametrize(
    "module", ["date_kernels.rules", "date_optim.schedules", "date_optim.trust_ratio"]
)
def test_what_needs_the_standard_library_alone(module: str) -> None:
    assert roots(reached_from(module)) - {module.split(".", maxsplit=1)[0]} <= STANDARD


ALLOWED = {
    "date_optim.optimizer": {
        "torch._foreach_div_": "no public name divides many tensors in one launch",
    },
    "date_optim.bench.contestants": {
        "torch._dynamo.config.fail_on_recompile_limit_hit": (
            "no public name keeps a compiled step from going on uncompiled"
        ),
    },
    "date_optim.bench.clocks": {
        "torch.cuda._sleep": "no public name keeps a device busy while the host issues a step",
    },
}
"""By module: private names of torch that stay, and why."""


@pytest.mark.parametrize("module", MODULES)
def test_no_private_names_of_torch(module: str) -> None:
    found = private_torch_names(MODULES[module].read_text())
    whole = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    assert whole == set(ALLOWED.get(module, ()))


IMPORT = """
import sys
import numpy, torch

seen = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            seen.append(name)

def touched(*args, **kwargs):
    seen.append("torch.cuda")

sys.meta_path.insert(0, Watch())
torch.cuda.init = torch.cuda._lazy_init = touched
torch.cuda.is_available = torch.cuda.device_count = touched
import date_kernels, date_kernels.testing, date_optim
assert not seen, seen
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
assert not {"pytest", "hypothesis", "matplotlib", "rich", "date_optim.bench"} & set(sys.modules)
"""


def test_importing_is_quiet() -> None:
    """No CUDA context, not even a question for a device, and no eager triton."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


# --- C++ ------------------------------------------------------------------------------------------

SOURCES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh"}
)
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"])([^>\"\n]+)[>\"]", re.MULTILINE)


def includes(source: str) -> set[tuple[str, bool]]:
    """Return (name, whether it stands in angle brackets) of every include that is not a comment."""

    def blank(match: re.Match[str]) -> str:
        return match[0] if match[0].startswith('"') else " "

    return {
        (name, mark == "<") for mark, name in INCLUDE.findall(COMMENT_OR_STRING.sub(blank, source))
    }


def system_includes(path: Path) -> set[str]:
    return {name for name, is_system in includes(path.read_text()) if is_system}


def own_includes(path: Path) -> Iterator[Path]:
    for name, is_system in includes(path.read_text()):
        if not is_system:
            here, there = path.parent / name, CSRC / name
            assert here.exists() or there.exists(), f"{path.name} includes {name}: not in csrc"
            yield (here if here.exists() else there).resolve()


def included_by(path: Path) -> set[Path]:
    """Return a file and all of ours that it includes, directly or not."""
    seen: set[Path] = set()
    todo = [path.resolve()]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += own_includes(current)
    return seen


def relative(paths: set[Path]) -> set[str]:
    return {path.relative_to(CSRC.resolve()).as_posix() for path in paths}


def is_standard_cpp(name: str) -> bool:
    """C++'s own headers have no suffix; those of C, of a system or of intrinsics have one."""
    return re.fullmatch(r"[a-z_]+", name) is not None


files = pytest.mark.parametrize(
    "path", SOURCES, ids=[path.relative_to(CSRC).as_posix() for path in SOURCES]
)


def test_the_reader_of_includes() -> None:
    source = """
#include <a>
  #  include "b/c.h"
// #include <d>
/* #include <e>
#include "f.h" */
const char* s = "// no comment"; /* " */
#include <g.h>  // "
"""
    assert includes(source) == {("a", True), ("b/c.h", False), ("g.h", True)}
    assert [is_standard_cpp(name) for name in ("cmath", "immintrin.h", "torch/all", "omp.h")] == [
        *(True, False, False, False)
    ]


@files
def test_no_header_of_torch(path: Path) -> None:
    for name in system_includes(path):
        assert name.split("/")[0].lower() not in {"torch", "aten", "c10", "caffe2"}, name
        assert not name.startswith("pybind11") or path.name == "bindings.cpp"


@files
def test_cpu_and_cuda_do_not_meet(path: Path) -> None:
    """The bindings and nothing else may know both."""
    devices = {name.split("/")[0] for name in relative(included_by(path))} & {"cpu", "cuda"}
    assert len(devices) <= 1 or path.name == "bindings.cpp"
    if "cpu" in path.parts:
        assert not any("cuda" in name for name in system_includes(path))


RULES = [path for path in SOURCES if path.parent.name == "rules"]


@pytest.mark.parametrize("path", RULES, ids=[path.name for path in RULES])
def test_a_rule_knows_numbers(path: Path) -> None:
    """No plan, no device, no intrinsics."""
    own = {path.resolve() for path in (*RULES, CSRC / "arch.h", CSRC / "row.h")}
    for included in included_by(path):
        assert included in own, included
        assert all(map(is_standard_cpp, system_includes(included)))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("arch.h", set()),
        ("plan.h", set()),
        ("row.h", {"arch.h"}),
        ("convert.h", {"arch.h", "plan.h"}),
        ("trust_ratio.h", {"arch.h", "plan.h", "row.h"}),
        ("engine.h", {"arch.h", "plan.h", "row.h", "trust_ratio.h"}),
    ],
)
def test_what_all_devices_share(name: str, allowed: set[str]) -> None:
    """An engine knows chunks; a plan's structs and the ratio are plain numbers."""
    reached = included_by(CSRC / name)
    assert relative(reached) <= {name, *allowed}
    assert all(is_standard_cpp(header) for path in reached for header in system_includes(path))


# --- imports --------------------------------------------------------------------------------------


def run(code: str, *paths: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_import_neither_loads_triton_nor_starts_a_gpu() -> None:
    run("""
        import sys, torch
        before = "triton" in sys.modules
        import date_kernels, date_optim
        assert ("triton" in sys.modules) == before
        assert not torch.cuda.is_initialized()
    """)


def test_the_kernels_alone_are_complete_under_any_name(tmp_path: Path) -> None:
    """Without the compiled module, twice in one process, as a hub of kernels loads them."""
    for name in ("first", "second"):
        ignored = shutil.ignore_patterns("_native*", "__pycache__")
        shutil.copytree(PACKAGES["date_kernels"], tmp_path / name, ignore=ignored)
    run(
        """
        import os
        import torch, first, second
        assert first.RULES is not second.RULES
        for package in (first, second):
            assert "missing" in package.info().backends["cpu"]
            for backend in ("reference", "triton"):
                if package.info().backends[backend] is not None:
                    continue
                w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
                if torch.cuda.is_available() and backend == "triton":
                    w, g = w.cuda(), g.cuda()
                group = {"params": [0], "lr": 0.1, "trust": True, "trust_upper": 1.0}
                found = package.step("sgd", [w], [g], {}, [None], [group], backend=backend)
                assert found.raw_ratio.tolist() == [2.5]
                assert w.tolist() == [3.0, torch.tensor(3.8).item()], backend
        """,
        tmp_path,
    )
