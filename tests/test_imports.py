"""The house: imports point down only.

LAYERS lists every Python file of the project, the lowest first. A file may import only files of
earlier layers, also inside its functions. So no two files need each other, and a file can be read,
tested and forked knowing only those before it. Nothing but tests imports a recipe or an experiment.

A new file gets a place in LAYERS. Files of one layer know nothing of each other.

Left out: imports whose name is a string (importlib, the program of a child process).
"""

import ast
import json
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

from conftest import ROOT

LAYERS = [
    ["data/faults.py", "data/inside.py"],
    ["data/lines.py", "data/mathematics.py", "data/sandbox.py"],
    ["data/verifiers.py", "data/parallel.py", "data/settings.py"],
    ["data/labelled.py", "data/problems.py", "data/driver.py"],
    ["data/chains.py", "data/english.py", "data/policies.py"],
    ["data/contexts.py", "data/hard_chains.py", "data/thoughts.py"],
    ["data/tasks.py"],
    # the record, the programs, the engines
    ["rollout.py"],
    ["data/metrics.py", "data/programs.py", "localize.py"],
    ["loss.py"],
    # what a run writes, and what is read from it
    ["data/runs.py"],
    ["data/curves.py"],
    ["data/report.py"],
    ["eval.py"],
    # the algorithm box
    ["srpo.py"],
    ["tests/arms.py", "tests/tabular.py"],
    # recipes, experiments, and what tests share
    [
        "data/prepare.py",
        "data/build_policy.py",
        "data/warm_start.py",
        "tests/faults.py",
        "tests/ideas.py",
        "tests/luck.py",
        "tests/methods.py",
        "tests/speed.py",
        "tests/better.py",
        "tests/gradient.py",
        "tests/sgd.py",
        "tests/study.py",
        "tests/theory.py",
        "tests/walk_gain.py",
        "tests/warm.py",
        "tests/conftest.py",
    ],
    ["tests/answers.py", "tests/gpu.py", "tests/study_tables.py"],
    # these may also import each other
    ["tests/test_*.py"],
]


def project_files() -> list[str]:
    """Every Python file of the project, as a path below its root."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("tests/**/*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def layer_of(file: str) -> int:
    """Number of the file's layer, from 0."""
    for number, patterns in enumerate(LAYERS):
        if any(fnmatchcase(file, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{file} has no place in LAYERS of tests/test_imports.py")


def file_of(module: str) -> str | None:
    """The project's file of a module, None for others. Tests also find each other by bare names."""
    path = module.replace(".", "/") + ".py"
    for file in (path, f"tests/{path}"):
        if (ROOT / file).is_file():
            return file
    return None


def modules_in(source: str) -> set[str]:
    """Names of everything that a program imports anywhere: `from a import b` gives a and a.b."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import; write the name in full"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def imports_of(file: str) -> set[str]:
    """The project's files that a file imports."""
    modules = modules_in((ROOT / file).read_text(encoding="utf-8"))
    return {file_of(module) for module in modules} - {None}


def test_modules_in():
    source = """
import os, data.runs as runs
from data import curves
from loss import backward
def f():
    if True:
        from data.report import page
"""
    found = {file_of(module) for module in modules_in(source)} - {None}
    assert found == {"data/runs.py", "data/curves.py", "loss.py", "data/report.py"}


def test_layers_name_no_file_that_is_gone():
    files = project_files()
    for patterns in LAYERS:
        for pattern in patterns:
            assert any(fnmatchcase(file, pattern) for file in files), f"no file {pattern}"


@pytest.mark.parametrize("file", project_files())
def test_imports_point_down(file):
    layer = layer_of(file)
    is_test = file.startswith("tests/test_")
    for imported in sorted(imports_of(file)):
        if is_test and imported.startswith("tests/test_"):
            continue
        assert layer_of(imported) < layer, f"{file} imports {imported}, which is not below it"


PROGRAM = """
import gc, json, runpy, sys
sys.argv = ["srpo.py", "--help"]
try:
    runpy.run_path("srpo.py", run_name="__main__")
except SystemExit:
    print(json.dumps([sorted(sys.modules), gc.isenabled(), gc.get_freeze_count()]))
"""


def test_training_loads_nothing_that_it_never_runs():
    """srpo.py holds no plotting library, report or experiment when it starts to do something.

    The garbage collector is on again, and passes over what the imports made.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules, collecting, frozen = json.loads(done.stdout.splitlines()[-1])
    loaded = set(modules)
    assert {"rollout", "localize", "loss"} <= loaded
    unwanted = {"matplotlib", "data.report", "study", "theory", "tests.study", "tests.theory"}
    assert not loaded & unwanted
    assert collecting
    assert frozen > 100_000
