"""srpo.py as a user runs it: every method and split, same seed same run, kill and resume, and input that is wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import srpo
from conftest import POLICY, ROOT
from data.driver import run_programs
from rollout import Rollout

TINY = "--engine hf --steps 2 --prompts_per_step 6 --train_data chain-5 --eval_data chain-5 --eval_problems 8 --eval_samples 1 --save_every 1 --rollouts_every 1".split()


def run(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "srpo.py"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_here(*args):
    """The same in this process: no seconds go into imports."""
    srpo.main([str(a) for a in args])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    ["", "--split 2x4 --localizer verifier", "--split 1x8 --seed_source fresh", "--method rrpo --seed_choice deepest", "--method rrpo --split 2x4",
     "--method rrpo --split 1x8 --mask_prefix false", "--length response", "--method grpo --clip 0.2 --updates 2", "--localizer oracle --oracle_samples 2"],
)  # fmt: skip
def test_every_method_and_split(tmp_path, capsys, flags):
    out = tmp_path / "run"
    run_here(*TINY, *flags.split(), "--out_dir", out)
    printed = capsys.readouterr()
    assert (
        str(out) in printed.out.splitlines()[-1]
        and "held-out pass rate" in printed.out
        and "pass " in printed.err
    )
    before, *steps = lines_of(out / "metrics.jsonl")
    assert before["step"] == 0 and [s["step"] for s in steps] == [1, 2]
    for step in steps:
        for key in ("pass_base", "pass_suffix", "zero_variance_base", "zero_variance_suffix", "reset_depth", "localized", "tokens", "trained_tokens", "masked_share",
                    "entropy", "grad_norm", "gap", "gap_prefix", "counters", "seconds", "total_tokens"):  # fmt: skip
            assert key in step
    rollouts = lines_of(out / "rollouts.jsonl")
    assert all(
        r["question"].startswith("mod97") and r["answer"].isdigit() and "".join(r["thoughts"])
        for r in rollouts
    )
    for step in steps:
        assert step["total_tokens"] == sum(
            sum(s["tokens"].values()) for s in steps if s["step"] <= step["step"]
        )
        mine = [r for r in rollouts if r["step"] == step["step"]]
        assert sum(r["group"] is not None for r in mine) == 6 * 8
        assert all(mine[r["seed"]]["reward"] == 0 for r in mine if r["seed"] is not None)
    if "grpo" in flags:
        assert not any(r["reset"] for r in rollouts) and steps[0]["tokens"]["suffix"] == 0
    else:
        assert steps[0]["tokens"]["suffix"] > 0
    AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step_2")
    AutoTokenizer.from_pretrained(out / "checkpoints" / "step_2")
    assert (out / "curve.png").stat().st_size > 5000
    assert {"config.json", "metrics.jsonl", "rollouts.jsonl", "curve.png", "checkpoints"} == {
        p.name for p in out.iterdir()
    }


def weights(out, step):
    return (out / "checkpoints" / f"step_{step}" / "model.safetensors").read_bytes()


LONGER = [*TINY, "--steps", "5", "--seed", "3", "--eval_every", "0"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*LONGER, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    return out


def same_run(out, uninterrupted):
    assert (
        weights(out, 5) == weights(uninterrupted, 5) != (POLICY / "model.safetensors").read_bytes()
    )
    drop = lambda lines: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]  # noqa: E731
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert drop(lines_of(out / name)) == drop(lines_of(uninterrupted / name))


def test_same_seed_same_run_and_other_seed_other_run(tmp_path, uninterrupted):
    run_here(*LONGER, "--out_dir", tmp_path / "again")  # the other one ran in a process of its own
    same_run(tmp_path / "again", uninterrupted)
    run_here(*LONGER, "--seed", "4", "--out_dir", tmp_path / "other")
    assert weights(tmp_path / "other", 5) != weights(uninterrupted, 5)


def test_kill_and_resume_equals_uninterrupted(tmp_path, uninterrupted):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "srpo.py"), *LONGER, "--out_dir", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = out / "metrics.jsonl"
    while not (out / "checkpoints" / "step_2").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with metrics.open("a") as file:  # as if killed in the middle of writing
        file.write('{"step": 4, "total_tok')
    (out / "checkpoints" / "tmp-step_9").mkdir()  # and in the middle of saving
    done = run("--resume", out)
    assert done.returncode == 0, done.stderr
    same_run(out, uninterrupted)


def test_killed_before_the_first_checkpoint(tmp_path, uninterrupted):
    out = tmp_path / "early"
    out.mkdir()
    shutil.copy(uninterrupted / "config.json", out)
    (out / "metrics.jsonl").write_text(
        '{"step": 0, "total_tokens": 0, "eval_pass_rate": 0.1}\n{"step": 1'
    )
    run_here("--resume", out)
    same_run(out, uninterrupted)


def test_ctrl_c_saves_and_ends_and_resumes(tmp_path, uninterrupted):
    out = tmp_path / "stopped"
    flags = [*LONGER, "--save_every", "100", "--out_dir", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "srpo.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "go on with: python srpo.py --resume" in stdout and "Traceback" not in stderr
    assert list((out / "checkpoints").glob("step_*"))
    run_here("--resume", out)
    assert weights(out, 5) == weights(uninterrupted, 5)


def test_resume_can_be_extended(tmp_path, uninterrupted):
    out = tmp_path / "extended"
    run_here(*LONGER, "--steps", "3", "--out_dir", out)
    run_here("--resume", out, "--steps", "5")
    assert weights(out, 5) == weights(uninterrupted, 5)


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    before = files_of(out)
    srpo.main(["--resume", str(out)])
    assert files_of(out) == before
    assert (
        f"-> {lines_of(out / 'metrics.jsonl')[-1]['eval_pass_rate']:.3f} in"
        in capsys.readouterr().out
    )


# ---------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *args):
    """Runs main in this process; returns its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        srpo.main([str(a) for a in args])
    assert end.value.code == 2
    complaint = capsys.readouterr().err.strip().splitlines()
    return complaint[-1] if "usage" in complaint[0] else "\n".join(complaint)


@pytest.fixture
def untouched(tmp_path):
    """An output folder that must not come into being."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--train_data missing.jsonl", "missing.jsonl: no such data file"),
        ("--eval_data {tmp}/empty.jsonl", "empty.jsonl: holds no problems"),
        ("--train_data {tmp}/malformed.jsonl", "malformed.jsonl, line 2: not JSON"),
        ("--train_data {tmp}/field.jsonl", "field.jsonl, line 1: field 'answer' is missing"),
        (
            "--train_data {tmp}/long.jsonl",
            "the prompt of problem 0 has 500 tokens, the model's context is 384",
        ),
        ("--train_data chain-0", "1 to 24 steps"),
        ("--method ppo", "invalid choice: 'ppo'"),
        ("--steps many", "invalid int value: 'many'"),
        ("--steps 0", "--steps must be at least 1"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--top_p 1.5", "--top_p must be in (0, 1]"),
        ("--prefixes -1", "--prefixes must not be negative"),
        ("--method grpo --base 1", "at least 2 trained rollouts"),
        ("--method rrpo --localizer verifier", "rrpo resets at random"),
        ("--train_data {tmp}/good.jsonl --localizer verifier", "needs a step checker"),
        ("--tp 2", "--tp 2 must divide the number of processes, 1"),
        ("--engine_memory 0", "--engine_memory must be in (0, 1]"),
        ("--model {tmp}/nothing", "cannot be loaded"),
        ("--model {tmp}", "cannot be loaded"),
        ("--model {tmp}/no_pad", "its tokenizer has no pad token"),
        ("--resume {tmp}/nothing", "no run of this program is there"),
        ("--no_such_flag 1", "no_such_flag"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, untouched, flags, complaint):
    good = '{"question": "1+1", "answer": "2", "kind": "integer"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "malformed.jsonl").write_text(good + '{"question": \n')
    (tmp_path / "field.jsonl").write_text('{"question": "1+1", "kind": "integer"}')
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"question": "= " * 500, "answer": "2", "kind": "integer"})
    )
    if "no_pad" in flags:
        shutil.copytree(POLICY, tmp_path / "no_pad")
        config = json.loads((tmp_path / "no_pad" / "tokenizer_config.json").read_text())
        config.pop("pad_token")
        (tmp_path / "no_pad" / "tokenizer_config.json").write_text(json.dumps(config))
    line = refused(
        capsys, *TINY, *flags.replace("{tmp}", str(tmp_path)).split(), "--out_dir", untouched
    )
    assert complaint in line and "\n" not in line


def test_without_vllm(tmp_path, capsys, monkeypatch, untouched):
    """auto says why it takes transformers; asking for vLLM itself is refused before anything is written."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    line = refused(capsys, *TINY, "--engine", "vllm", "--out_dir", untouched)
    assert (
        "--engine vllm: vLLM cannot be used: ModuleNotFoundError" in line
        and "use --engine hf" in line
        and "\n" not in line
    )
    srpo.main([*TINY, "--engine", "auto", "--steps", "1", "--out_dir", str(tmp_path / "auto")])
    assert capsys.readouterr().out.startswith(
        "engine: hf (vLLM cannot be used: ModuleNotFoundError"
    )


def test_unwritable_out_dir(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "choose another --out_dir" in refused(
        capsys, *TINY, "--out_dir", tmp_path / "file" / "run"
    )
    assert "choose another --out_dir" in refused(capsys, *TINY, "--out_dir", "/proc/run")


def files_of(out):
    return {p: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_run_is_never_overwritten(capsys, uninterrupted):
    before = files_of(uninterrupted)
    assert "already holds a run" in refused(capsys, *TINY, "--out_dir", uninterrupted)
    assert files_of(uninterrupted) == before


@pytest.mark.parametrize("damage", ["byte", "missing", "manifest", "foreign"])
def test_resume_from_a_damaged_or_foreign_checkpoint(tmp_path, capsys, uninterrupted, damage):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    newest = out / "checkpoints" / "step_5"
    if damage == "byte":
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "model.safetensors").write_bytes(content)
    elif damage == "missing":
        (newest / "trainer.json").unlink()
    elif damage == "manifest":
        (newest / "manifest.json").write_text("{")
    else:
        shutil.rmtree(newest)
        shutil.copytree(POLICY, newest)
    before = files_of(out)
    line = refused(capsys, "--resume", out, "--steps", "9")
    assert "step_5 is damaged" in line and "remove" in line and "\n" not in line
    assert files_of(out) == before


def test_resume_with_other_settings(capsys, uninterrupted):
    before = files_of(uninterrupted)
    assert "that run has grad_clip = 1.0" in refused(
        capsys, "--resume", uninterrupted, "--grad-clip", "2"
    )
    line = refused(capsys, "--resume", uninterrupted, "--lr", "0.5")
    assert "that run has lr = 0.0005, not 0.5; leave --lr out" in line
    assert files_of(uninterrupted) == before


def test_exit_code_of_the_real_command(tmp_path):
    done = run("--train_data", tmp_path / "none.jsonl", "--out_dir", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("srpo.py: ")
        and not (tmp_path / "out").exists()
    )


def test_help_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    with pytest.raises(SystemExit, match="0"):
        run_here("--help")
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in srpo.Config.__dataclass_fields__)


def test_training_learns(tmp_path, capsys):
    """Sixteen steps on an easier chain lift the held-out pass rate well beyond chance."""
    srpo.main(
        "--engine hf --train_data chain-4 --eval_data chain-4 --steps 16 --lr 1e-3 --eval_problems 128 --eval_samples 4 --eval_every 0 --rollouts_every 0 --out_dir".split()
        + [str(tmp_path / "run")]
    )
    before, *_, after = lines_of(Path(tmp_path) / "run" / "metrics.jsonl")
    assert after["eval_pass_rate"] > before["eval_pass_rate"] + 0.1


def test_code_problems_need_a_sandbox(tmp_path, capsys, untouched, monkeypatch):
    """A run on code problems says what isolates them; where nothing does, it is refused before anything is written."""
    tests = {"stdin": [["2", "4"]]}
    (tmp_path / "code.jsonl").write_text(
        "".join(
            json.dumps({"question": f"mod97 1: +{i} start 2 .", "kind": "code", "tests": tests})
            + "\n"
            for i in (2, 3)
        )
    )
    flags = [
        *TINY,
        "--train_data",
        tmp_path / "code.jsonl",
        "--eval_data",
        tmp_path / "code.jsonl",
        "--steps",
        "1",
        "--eval_problems",
        "2",
    ]
    srpo.main([str(f) for f in [*flags, "--out_dir", tmp_path / "run"]])
    assert "sandbox: Landlock, seccomp" in capsys.readouterr().out
    assert (
        lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["counters"]["no_code"] > 0
    )  # the embedded policy does not write programs
    monkeypatch.setattr("data.sandbox.ARCHES", {})
    assert "kind code cannot be graded on this machine" in refused(
        capsys, *flags, "--out_dir", untouched
    )


def test_step_line_knows_clean_and_erroneous_prefixes(policy, tmp_path):
    """Resets at, before and after the true first wrong thought: the first two leave a clean prefix, and nothing else counts as exact."""
    tasks = policy.tasks(5, 24, seed=3)
    rollouts, expected, late = [], {True: [], False: []}, []
    for task in tasks:
        ((seed,),) = run_programs([only(task)], policy.engine).results
        truth = task.problem.check_steps(seed.thoughts(policy.tokenizer))
        if truth is None or not 1 < truth < len(seed.thought_ends):
            continue
        d = (0, -1, 1)[len(late) % 3]
        late.append(d)
        for i in range(2):
            rollouts.append(Rollout(task.problem.index, "suffix", seed.prompt_ids, seed.token_ids, seed.logps, seed.thought_ends, "answer", prefix_len=len(seed.prefix(truth + d)),
                                    reward=float(i and d == 0), group=(task.slot, 1), seed=seed, reset=truth + d, localized="self"))  # fmt: skip
            expected[d <= 0].append(rollouts[-1].reward)
    assert len(late) >= 6
    line = srpo.step_metrics(rollouts, [], tasks)
    assert line["localized_exact"] == pytest.approx(np.mean([d == 0 for d in late])) and line[
        "localized_clean"
    ] == pytest.approx(np.mean([d <= 0 for d in late]))
    assert line["pass_suffix_clean"] == pytest.approx(np.mean(expected[True])) and line[
        "pass_suffix_erroneous"
    ] == pytest.approx(np.mean(expected[False]))
    srpo.write_rollouts(tmp_path / "r.jsonl", 1, [], [rollouts[0].seed], tasks)
    (record,) = lines_of(tmp_path / "r.jsonl")
    assert record["first_wrong"] == rollouts[0].reset  # the first of them was reset at the truth


def only(task):
    (base,) = yield [task.request("base", 1)]
    return base
