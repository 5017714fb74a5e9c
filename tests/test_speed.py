"""The measuring scripts: what they compare is the same work, and a failure shows.

No test asserts a speed."""

import sys
import time

import pytest
import torch

from loss import backward
from tests import gpu, speed
from tests.speed import never


@pytest.fixture(scope="module")
def ours():
    return speed.Ours(speed.embedded(problems=3, samples=4))


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_plain_loop_computes_our_gradient(ours):
    work = ours.work
    items = ours.weighted(ours.sample())
    backward(work.model, items, work.tokenizer.pad_token_id, ours.cfg)
    expected = gradients(work.model)
    work.model.zero_grad()
    speed.plain_loss(work.model, items, work.tokenizer.pad_token_id).backward()
    assert (gradients(work.model) - expected).norm() < 1e-4 * expected.norm()
    work.model.zero_grad()


def test_all_rows_have_the_same_tokens(ours):
    """So that contenders can be compared: no row ends early."""
    rollouts = ours.sample()
    assert {len(rollout.token_ids) for rollout in rollouts} == {ours.work.length}
    assert len(rollouts) * ours.work.length == ours.work.tokens


def test_operations_of_a_forward(ours):
    """By hand for the embedded policy: 3 layers, width 96, heads 3 x 32, 384 inside, 153 words."""
    matrices = 3 * (4 * 96 * 96 + 3 * 96 * 384)
    spans = [speed.Span(0, 2), speed.Span(2, 5)]  # 5 tokens, which attend to 1 + 2 + 3 + 4 + 5
    attention = 3 * 4 * 96 * 15
    expected = 2 * 5 * matrices + attention + 2 * 153 * 96 * 7
    assert speed.operations(ours.work.model, spans, heads=7) == expected


def test_speed_runs(capsys, tmp_path):
    flags = "--only embedded --problems 2 --samples 2 --repeats 1"
    threads = torch.get_num_threads()
    speed.main(flags.split())
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "| embedded, training | plain loop |" in out
    assert "| embedded, whole step | ours |" in out
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tests/speed.py -->\nold\n<!-- /tests/speed.py -->\nb\n")
    speed.renew(page, "tests/speed.py", out.strip())
    assert page.read_text().splitlines()[2:-2] == out.strip().splitlines()
    assert "old" not in page.read_text()


def test_a_check_that_fails_hangs_or_cannot_run_shows(tmp_path):
    def ended(program, limit=30):
        return gpu.run_limited([sys.executable, "-c", program], limit, tmp_path / "log")

    assert ended("pass").state == "ok"
    failed = ended("raise SystemExit('the gradient is off')")
    assert failed.state == "FAILED" and "the gradient is off" in failed.why
    refused = ended(f"print('no vLLM'); raise SystemExit({gpu.NOT_DONE})")
    assert (refused.state, refused.why) == ("not done", "no vLLM")


def test_a_check_that_hangs_is_stopped_with_what_it_started(tmp_path):
    beats = tmp_path / "beats"
    program = f"(while :; do echo x >> {beats}; sleep 0.1; done) & sleep 60"
    ended = gpu.run_limited(["sh", "-c", program], 2, tmp_path / "log")
    assert ended.state == "FAILED" and "stopped after 2 s" in ended.why
    size = beats.stat().st_size
    assert size > 0
    time.sleep(0.5)
    assert beats.stat().st_size == size


def test_the_table_and_the_exit_code_tell(tmp_path, monkeypatch, capsys):
    """A failure stops no other check, and what the failed one found before stays in the table."""
    report = {"run": "print('x'); raise SystemExit('broken')", "engine": "pass"}

    def run_limited(command, limit, log):
        name = command[command.index("--check") + 1]
        gpu.Report(log.with_suffix(".jsonl")).add("a part", "found")
        return real([sys.executable, "-c", report[name]], limit, log)

    real = gpu.run_limited
    monkeypatch.setattr(gpu, "run_limited", run_limited)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="failed: run"):
        gpu.main(["--only", "run", "engine", "--out", str(out)])
    page = (out / "table.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("| a part | found |") == 2
    assert "**FAILED** exit code 1: broken" in page and "**ok**" in page
    with pytest.raises(SystemExit, match="remove it, or give another --out"):
        gpu.main(["--only", "run", "--out", str(out)])


def test_a_check_tells_what_it_found_or_why_it_cannot_run(tmp_path, monkeypatch):
    gpu.check_here("shards", tmp_path)
    found = gpu.Report(tmp_path / "shards.jsonl").lines()
    assert [what for what, _, _ in found][0] == "collectives of one process"
    monkeypatch.setattr(gpu, "find_spec", never)  # vLLM is not installed
    with pytest.raises(SystemExit) as stop:
        gpu.check_here("vllm", tmp_path)
    assert stop.value.code == gpu.NOT_DONE
