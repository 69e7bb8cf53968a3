"""Examples in docstrings and in the README run; the README's table is the committed run's."""

import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import report
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "date_kernels.dispatch",
        "date_optim.optimizers",
        "date_optim.recipe",
        "date_optim.telemetry",
        "date_optim.trust_ratio",
    ],
)
def test_examples_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


# torch's own modules, as torch.compile imports them.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_the_page_on_torch_runs(tmp_path: Path) -> None:
    """Block after block, and then steps by what they leave."""
    page = (ROOT / "docs/torch.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    batches = 2 * [(torch.randn(8, 20), torch.arange(8) % 3)]
    rows: list[int] = []
    names: dict[str, Any] = {
        "batches": batches,
        "folder": tmp_path,
        "log": lambda numbers, step: rows.append(step),
    }
    for block in blocks:
        exec(block, names)
    model, opt = names["model"], names["opt"]
    before = [param.clone() for param in model.parameters()]
    loss = torch.nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
    torch.autograd.backward(loss)  # the hooks step
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.grad is None
        assert not torch.equal(param, old)
        param.grad = torch.ones_like(param)
    opt.step()
    assert rows == [1]
    names["file"].close()
    assert json.loads((tmp_path / "ratios.jsonl").read_text(encoding="utf-8"))["step"] == 1
    before = [param.clone() for param in model.parameters()]
    names["compiled_step"]()
    assert not any(map(torch.equal, before, model.parameters()))


def test_the_page_on_schedules_runs() -> None:
    """To the change of the batch size, and its comments are right."""
    page = (ROOT / "docs/schedules.md").read_text(encoding="utf-8")
    model = torch.nn.Linear(3, 2)
    names: dict[str, Any] = {
        "torch": torch,
        "LambdaLR": torch.optim.lr_scheduler.LambdaLR,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": torch.nn.functional.cross_entropy,
        "batches": 102 * [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))],
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    recipe, scheduler = names["recipe"], names["scheduler"]
    assert (round(recipe.peak, 9), recipe.warmup_epochs, recipe.iterations) == (32, 10, 3519)
    assert scheduler.recipe == recipe.then(65_536, after=100)
    assert scheduler.recipe.iterations == 100 + -(-(3519 - 100) // 2)


def test_the_readmes_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    model = torch.nn.Sequential()
    layer = torch.nn.Linear(3, 2)
    model.add_module("conv1", layer)
    before = layer.weight.clone()
    batches = 2 * [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))]
    names = {"model": model, "batches": batches, "loss": torch.nn.functional.cross_entropy}
    exec(example[1], names)
    assert not torch.equal(layer.weight, before)


def test_the_readmes_table_is_the_committed_runs() -> None:
    document = json.loads((ROOT / "docs/demo/demo.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| (\d+) \| .* \| (\d+) \| (\S+)% \| (\S+) - (\S+) \|$", README, re.M)
    assert rows == [
        (
            str(method["batch_size"]),
            str(method["iterations"]),
            *(f"{x:.1f}" for x in (accuracy["mean"], *accuracy["range"])),
        )
        for method, accuracy in zip(
            document["methods"].values(), document["test_accuracy"].values(), strict=True
        )
    ]
    pairs, (low, high) = (
        document["bounded_minus_plain"],
        document["bounded_minus_plain"]["interval"],
    )
    differences = ", ".join(f"{x:+.1f}" for x in pairs["differences"])
    said = (
        f"is {pairs['mean']:+.1f} points on average ({differences}) "
        f"with a 95% interval of [{low:+.1f}, {high:+.1f}]"
    )
    assert said in " ".join(README.split())
    gaps = [f"{gap:.1f}" for gap in document["unbounded_behind_both"]]
    assert f"falls {', '.join(gaps[:-1])} and {gaps[-1]} points behind" in README
    assert document["commit"][:7] in README


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_the_tables_are_the_committed_results(path: Path) -> None:
    """``python bench/report.py`` makes them so."""
    page = path.read_text(encoding="utf-8")
    assert report.filled(page) == page
    opened = re.findall(r"<!-- results: (.+?) -->", page)
    assert opened == [name for _, name, _ in report.BLOCK.findall(page)]
    assert opened


def test_a_result_that_changes_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((report.RESULTS / "nvidia-h200.json").read_text(encoding="utf-8"))
    for row in document["rows"]:
        row["us_p50"] = 123456.0
    monkeypatch.setattr(report, "documents", lambda key: iter([document]))
    assert report.filled(README).count("| 123456 |") == 3 * 3  # neighbours share a bar
