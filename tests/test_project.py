"""The package as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import splitfed


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, splitfed; print([m for m in ('torch', 'pydantic', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_resolves() -> None:
    assert dir(splitfed) == splitfed.__all__
    for name in splitfed.__all__:
        assert getattr(splitfed, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    assert not hasattr(splitfed, "nosuch")


def test_packages_re_export_and_never_compute(root: Path) -> None:
    for file in (root / "splitfed").rglob("__init__.py"):
        if file.parent in (root / "splitfed", root / "splitfed" / "assets"):
            continue  # lazy names; the path of a folder
        for node in ast.parse(file.read_text()).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"{file}: {ast.unparse(node)}"


def test_one_exact_version_of_torch_is_pinned(root: Path) -> None:
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert names == sorted(names)


def test_make_alone_explains_every_target(root: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    explained = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    targets = {
        line.removeprefix(".PHONY: ")
        for line in (root / "Makefile").read_text().splitlines()
        if line.startswith(".PHONY: ")
    }
    assert explained == targets
    assert {"setup", "demo", "test"} <= targets


def test_continuous_integration_runs_targets_that_exist(root: Path) -> None:
    script = (root / ".ci" / "run").read_text()
    (run,) = re.findall(r"for target in (.*); do", script)
    assert run.split()[:2] == ["setup", "test"]
    assert {"lint", "types", "contracts", "proto-check"} <= set(run.split())
    for target in run.split():
        subprocess.run(["make", "--dry-run", target], cwd=root, capture_output=True, timeout=60, check=True)


def test_a_python_that_is_not_there_is_named_in_one_sentence(root: Path, tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "setup", "PYTHON=python0", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("splitfed needs Python 3.11 or newer, but there is no python0: ")
