"""The wheel: built in isolation, without torch, and whole."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_builds_in_isolation_and_holds_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    command += ["--config-settings", f"build-dir={tmp_path / 'build'}"]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    [wheel] = tmp_path.glob("date_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"date_kernels": ROOT / "date_kernels", "date_optim": ROOT / "python/date_optim"}
    for package, folder in packages.items():
        for source in folder.glob("*.py*"):
            assert f"{package}/{source.name}" in names
        assert f"{package}/py.typed" in names
    assert [name for name in names if re.fullmatch(r"date_kernels/_native\.\S+\.so", name)]
    assert not [n for n in names if not re.match(r"(date_kernels|date_optim)[/-]", n)]
    metadata = zipfile.ZipFile(wheel).read(
        next(n for n in names if n.endswith(".dist-info/METADATA"))
    )
    needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.decode(), re.MULTILINE)
    assert sorted(needs) == ["numpy", "torch"]
