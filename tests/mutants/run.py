"""Break each promise of the code on purpose, and fail unless the test that guards it notices.

A mutant is a patch beside this file, one plausible mistake. Its first lines say what must hold
and which test fails where it does not, a pytest node id under ``tests/``::

    Promise: a leaf's last elements count in its sums
    Test: test_engine_native.py::test_formulas_in_double_are_the_references

A test that cannot be collected, a crash or a hang is no catch: it does not tell what is wrong.
As many mutants at a time as there are processors, each in a copy of the tree.

    python tests/mutants/run.py [--keep] [NAME ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

BUILD_S, TEST_S, ALL_TESTS_S = 600, 300, 3600
"""When to give up: on a build, on the test of a mutant, on all of these tests without one."""

FAILED = 1
"""pytest's exit status where tests ran and failed; others are crashes and mistakes of its use."""

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Mutant:
    """One patch and what its header says."""

    patch: Path
    promise: str
    test: str
    native: bool

    @classmethod
    def read(cls, patch: Path) -> Mutant:
        """Read the header; every mutant has both lines."""
        text = patch.read_text()
        promise, test = (
            re.search(rf"^{key}: (.+)$", text, re.MULTILINE) for key in ("Promise", "Test")
        )
        if promise is None or test is None:
            sys.exit(f"{patch} must start with the lines 'Promise: ...' and 'Test: ...'")
        return cls(patch, promise[1], f"tests/{test[1]}", "+++ b/csrc/" in text)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant, "caught" at best, what its test printed, and how long it took."""

    word: str
    text: str
    seconds: float


class Copy:
    """The working tree in a folder of its own, built there, and a Python that imports it alone."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        self.build_folder = folder / "build"
        # cmake, ninja and others of the running environment; git must take the copy for no
        # repository's.
        self.environment = {
            **os.environ,
            "DATE_KERNELS_CUDA": "OFF",  # its kernels compile for minutes
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_CEILING_DIRECTORIES": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have its original's size and second
        }
        for name in out("git", "ls-files", "-coz", "--exclude-standard", cwd=ROOT).split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)

        # The editable installation's hook would come first. It is a .pth file of site-packages,
        # and those of a folder that is itself named by a .pth file are not read.
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv/bin/python"
        site = Path(self.out(self.python, "-c", "import site; print(site.getsitepackages()[0])"))
        libraries = dict.fromkeys(sysconfig.get_path(of) for of in ("purelib", "platlib"))
        path = (self.root, self.root / "python", *libraries)
        (site / "copy.pth").write_text("".join(f"{entry}\n" for entry in path))

        self.out(
            *("cmake", "-G", "Ninja", "-S", self.root, "-B", self.build_folder),
            f"-DPython_EXECUTABLE={self.python}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.root / 'date_kernels'}",
            # The last -O counts: the same bits in a third of the compiler's time.
            "-DCMAKE_CXX_COMPILE_OBJECT="
            "<CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O1 -o <OBJECT> -c <SOURCE>",
        )
        if (done := self.build()).returncode != 0:
            sys.exit(f"the tree does not build\n{done.stdout}")
        code = "import date_kernels as d, date_optim as o; print(d._native.__file__, o.__file__)"
        imported = self.out(self.python, "-c", code).split()
        assert all(Path(file).is_relative_to(self.root) for file in imported), imported

    def out(self, *command: str | Path) -> str:
        """The standard output of a command that succeeds in the copy."""
        return out(*command, cwd=self.root, env=self.environment)

    def run(self, *command: str | Path, timeout: int) -> Done:
        """Run a command that may fail in the copy."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def build(self) -> Done:
        """Compile what has changed."""
        return self.run("cmake", "--build", self.build_folder, timeout=BUILD_S)

    def test(self, *tests: str, timeout: int = TEST_S) -> Done:
        """Run tests up to the first that fails."""
        options = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
        return self.run(self.python, "-m", "pytest", *options, *tests, timeout=timeout)

    def apply(self, mutant: Mutant, *options: str) -> Done:
        """Apply a patch."""
        return self.run("git", "apply", *options, mutant.patch, timeout=BUILD_S)

    def judge(self, mutant: Mutant) -> Verdict:
        """Apply a mutant, test it and take it back."""
        begin = time.monotonic()
        word, text = self._judge(mutant)
        return Verdict(word, text, time.monotonic() - begin)

    def _judge(self, mutant: Mutant) -> tuple[str, str]:
        if (done := self.apply(mutant)).returncode != 0:
            return "does not apply", done.stdout
        try:
            if mutant.native and (done := self.build()).returncode != 0:
                return "does not build", done.stdout
            done = self.test(mutant.test)
        except subprocess.TimeoutExpired:
            return "HANGS", ""
        finally:
            self.apply(mutant, "--reverse")
        if done.returncode == 0:
            return "SURVIVED", done.stdout
        failed = re.search(rf"^FAILED {re.escape(mutant.test)}(?!\w)", done.stdout, re.MULTILINE)
        if done.returncode != FAILED or failed is None:
            return f"ends in exit status {done.returncode}", done.stdout
        return "caught", done.stdout


def out(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """The standard output of a command that succeeds."""
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the mutants; 0 where all are caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--keep", action="store_true", help="leave the copies where they are")
    chosen = parser.parse_args(arguments)
    patches = sorted(HERE.glob("*.patch"))
    if unknown := set(chosen.names) - {patch.stem for patch in patches}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    mutants = [Mutant.read(p) for p in patches if p.stem in chosen.names or not chosen.names]
    mutants.sort(key=lambda mutant: mutant.native)  # what needs no compiler runs on the first build

    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        first = Copy(folder / "0")
        tests = dict.fromkeys(mutant.test for mutant in mutants)
        done = first.test(*tests, timeout=ALL_TESTS_S)
        if done.returncode != 0:
            print(f"the tests fail without a mutant\n{done.stdout}")
            return 1
        print(f"{len(mutants)} mutants; without one their tests pass", flush=True)
        workers = min(os.cpu_count() or 1, len(mutants))
        copies: SimpleQueue[Copy] = SimpleQueue()
        for copy in (first, *(Copy(folder / str(number)) for number in range(1, workers))):
            copies.put(copy)

        def judge(mutant: Mutant) -> Verdict:
            copy = copies.get()
            try:
                return copy.judge(mutant)
            finally:
                copies.put(copy)

        missed = 0
        with ThreadPoolExecutor(workers) as pool:
            for mutant, verdict in zip(mutants, pool.map(judge, mutants), strict=True):
                missed += verdict.word != "caught"
                print(
                    f"{verdict.word:<10} {verdict.seconds:5.1f} s  {mutant.patch.stem}", flush=True
                )
                if verdict.word != "caught":
                    print(f"  promise: {mutant.promise}\n  test: {mutant.test}\n{verdict.text}")
    finally:
        if chosen.keep:
            print(f"the copies are in {folder}")
        else:
            shutil.rmtree(folder)
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(mutants) - missed} of {len(mutants)} mutants caught in {minutes:.1f} minutes")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
