"""What the README shows as code really runs."""

import re

import pytest

import localize
import loss
import rollout
import srpo
from conftest import ROOT
from data import problems
from rollout import PROGRAMS, run_programs

README = (ROOT / "README.md").read_text()


def test_the_worked_example_runs(policy):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "PROGRAMS[" in block]
    try:
        exec(code, {})
        buffers, generated, _ = run_programs([PROGRAMS["halfway"](task) for task in policy.tasks(6, 8)], policy.engine)
    finally:
        PROGRAMS.pop("halfway", None)
    rollouts = [r for buffer in buffers for r in buffer]
    assert len(rollouts) == 64 and len(generated) == 64
    loss.set_advantages(rollouts)
    assert any(r.reset and r.prefix_len for r in rollouts)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:rollout|localize|loss|srpo|data\.problems)\.[A-Za-z_.]+)`", README)) - {"rollout.py", "localize.py", "loss.py", "srpo.py"}))
def test_every_name_in_the_paper_table_exists(name):
    module, *path = name.removeprefix("data.").split(".")
    found = {"rollout": rollout, "localize": localize, "loss": loss, "srpo": srpo, "problems": problems}[module]
    for part in path:
        assert hasattr(found, part) or part in getattr(found, "__dataclass_fields__", {})
        found = getattr(found, part, None)
