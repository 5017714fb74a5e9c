"""srpo.py as a user runs it: every method and split, same seed same run, kill and resume, names and
help, and input that is wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import srpo
from conftest import IDEA, POLICY, ROOT, needs_sandbox
from data.driver import run_programs
from data.metrics import step_metrics
from data.programs import load_program
from data.runs import CONTENTS, append, name_of, read_run
from data.tasks import load_problems
from rollout import Rollout, records_of

SRPO = [sys.executable, str(ROOT / "srpo.py")]
TINY = (
    "--engine hf --steps 2 --prompts_per_step 6 --train_data chain-5 --eval_data chain-5 "
    "--eval_problems 8 --eval_samples 1 --save_every 1 --rollouts_every 1"
).split()


def run(*args):
    """The command in a process of its own."""
    return subprocess.run([*SRPO, *map(str, args)], capture_output=True, text=True, timeout=300)


def run_here(*args):
    """The same in this process: no seconds go into imports."""
    srpo.main([str(arg) for arg in args])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------ methods

STEP_KEYS = (
    "pass_base pass_suffix zero_variance_base zero_variance_suffix flat_groups reset_depth "
    "localized walk tokens trained_tokens masked_share entropy grad_norm gap gap_prefix counters "
    "seconds total_tokens"
).split()


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--split 2x4 --localizer verifier",
        "--split 1x8 --seed_source fresh",
        "--method rrpo",
        "--method rrpo --split 2x4",
        "--method rrpo --split 1x8 --mask_prefix false",
        "--length response",
        "--length step",
        "--method grpo --clip 0.2 --updates 2",
        "--localizer oracle --oracle_samples 2",
        "--method walk --rounds 2",
    ],
)
def test_every_method_and_split(tmp_path, capsys, flags):
    out = tmp_path / "run"
    run_here(*TINY, *flags.split(), "--out_dir", out)
    printed = capsys.readouterr()
    assert str(out) in printed.out.splitlines()[-1]
    assert "held-out pass rate" in printed.out
    assert "pass " in printed.err

    before, *steps = lines_of(out / "metrics.jsonl")
    rollouts = lines_of(out / "rollouts.jsonl")
    assert before["step"] == 0
    assert [step["step"] for step in steps] == [1, 2]
    check_steps_and_rollouts(steps, rollouts)
    if "grpo" in flags:
        assert not any(rollout["reset"] for rollout in rollouts)
        assert steps[0]["tokens"]["suffix"] == 0
    elif "walk" in flags:
        assert steps[0]["tokens"]["walk"] > 0
    else:
        assert steps[0]["tokens"]["suffix"] > 0

    AutoModelForCausalLM.from_pretrained(out / "checkpoints" / "step_2")
    AutoTokenizer.from_pretrained(out / "checkpoints" / "step_2")
    assert (out / "curve.png").stat().st_size > 5000
    names = {path.name for path in out.iterdir()}
    assert names == {*CONTENTS, "lock"}


def check_steps_and_rollouts(steps, rollouts):
    """Step lines have every key and add up; rollouts say what was trained, and their seeds."""
    total_tokens = 0
    for step in steps:
        assert set(STEP_KEYS) <= step.keys()
        total_tokens += sum(step["tokens"].values())
        assert step["total_tokens"] == total_tokens
        mine = [rollout for rollout in rollouts if rollout["step"] == step["step"]]
        trained = [rollout for rollout in mine if rollout["group"] is not None]
        if step["tokens"]["walk"] == 0:  # a walk trains 4, 5 or 8 rollouts of a prompt
            assert len(trained) == 6 * 8
        for rollout in mine:
            if rollout["seed"] is not None:
                assert mine[rollout["seed"]]["reward"] == 0
    for rollout in rollouts:
        assert rollout["question"].startswith("mod97")
        assert rollout["answer"].replace(" ", "").isdigit()
        assert "".join(rollout["thoughts"])


@pytest.fixture
def idea(tmp_path):
    """A file outside the project with methods in it."""
    path = tmp_path / "elsewhere" / "idea.py"
    path.parent.mkdir()
    path.write_text(IDEA)
    return path


def test_a_method_from_a_file_outside_the_project(tmp_path, capsys, idea):
    """VinePPO in six lines: different advantages for the thoughts of one rollout are trained."""
    out = tmp_path / "run"
    flags = ["--method", f"{idea}:vine", "--oracle_samples", "2", "--train_data", "chain-3"]
    run_here(*TINY, *flags, "--out_dir", out)
    assert f"\n{idea}:vine " in capsys.readouterr().out
    _, *steps = lines_of(out / "metrics.jsonl")
    rollouts = lines_of(out / "rollouts.jsonl")
    trained = [rollout for rollout in rollouts if rollout["advantages"] is not None]
    assert len(trained) == 2 * 6 * 4
    assert {rollout["purpose"] for rollout in trained} == {"base"}
    assert any(len(set(rollout["advantages"])) > 1 for rollout in trained)
    for step in steps:
        assert step["trained_tokens"] > 0 and step["grad_norm"] > 0
        assert step["tokens"]["value"] > step["tokens"]["base"] > 0
        assert step["tokens"]["suffix"] == 0
    run_here("--resume", out, "--steps", "3")
    assert lines_of(out / "metrics.jsonl")[-1]["step"] == 3


def test_a_file_may_have_the_name_of_one_of_ours(idea):
    named = idea.with_name("rollout.py")
    named.write_text(
        "from rollout import grpo\n\ndef mine(task):\n    return (yield from grpo(task))\n"
    )
    ours = sys.modules["rollout"]
    assert load_program(f"{named}:mine").__name__ == "mine"
    assert sys.modules["rollout"] is ours


def test_a_method_by_its_module(tmp_path, idea, monkeypatch):
    monkeypatch.syspath_prepend(idea.parent)
    run_here(*TINY, "--method", "idea:vine", "--steps", "1", "--out_dir", tmp_path / "run")
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["tokens"]["value"] > 0


def test_a_second_group_without_a_seed_and_tokens_of_a_new_purpose(tmp_path, capsys, idea):
    """Both are in the step line; a trained review has no reward; a second turn keeps its prompt."""
    out = tmp_path / "run"
    run_here(*TINY, "--method", f"{idea}:two_turns", "--localize_tokens", "5", "--out_dir", out)
    assert "pass 0." in capsys.readouterr().err
    _, *steps = lines_of(out / "metrics.jsonl")
    for step in steps:
        assert step["tokens"]["retry"] > 0 and step["tokens"]["review"] > 0
        assert step["total_tokens"] >= sum(step["tokens"].values())
        assert 0 <= step["pass_base"] <= 1 and step["pass_suffix"] is None
        assert step["flat_groups"] <= 12 / 18  # reviews have an advantage
        assert step["reset_depth"] is None and step["localized"] == {}
    for rollout in lines_of(out / "rollouts.jsonl"):
        turns = {"base": (0, None), "retry": (1, "+9"), "review": (2, "+8")}
        k, said = turns[rollout["purpose"]]
        assert rollout["group"][1] == k
        assert rollout["off_policy"] is False
        assert (rollout["reward"] is None) == (k == 2)
        assert ("prompt" in rollout) == (k > 0)
        if k > 0:
            prompt = rollout["prompt"]
            assert prompt.startswith(rollout["question"]) and said in prompt[-20:]


def test_a_step_that_measures_and_trains_nothing(tmp_path, idea):
    """No reward, and every advantage is zero: no update, and the logger does not crash."""
    out = tmp_path / "run"
    run_here(*TINY, "--method", f"{idea}:only_reviews", "--localize_tokens", "5", "--out_dir", out)
    _, *steps = lines_of(out / "metrics.jsonl")
    for step in steps:
        assert step["counters"] == {"no_update": 1} and step["trained_tokens"] == 0
        assert step["pass_base"] is None and step["pass_suffix"] is None
        assert step["tokens"]["review"] > 0 and step["flat_groups"] == 1
        assert step["zero_variance_base"] is None


@pytest.mark.parametrize(
    "method, complaint",
    [
        ("ppo", "no such method; use grpo, rrpo, srpo, walk, MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("no_such_module:vine", "cannot import it (ModuleNotFoundError"),
        (":vine", "cannot import it (ValueError"),
        ("{tmp}/missing.py:vine", "cannot import it (FileNotFoundError"),
        ("{tmp}/broken.py:vine", "cannot import it (SyntaxError"),
        ("{tmp}/elsewhere/idea.py:nothing", "nothing is no generator function of"),
        ("{tmp}/elsewhere/idea.py:", "is no generator function of"),
        ("{tmp}/elsewhere/idea.py:no_generator", "a program yields lists of requests and returns"),
        ("{tmp}/elsewhere/idea.py:not_even_a_function", "is no generator function of"),
        ("{tmp}/elsewhere/idea.py:of_two", "of_two must take one argument, the task"),
    ],
)
def test_a_bad_method_is_one_clear_line(tmp_path, capsys, untouched, idea, method, complaint):
    (tmp_path / "broken.py").write_text("def vine(task:\n")
    method = method.replace("{tmp}", str(tmp_path))
    line = refused(capsys, *TINY, "--method", method, "--out_dir", untouched)
    assert line.startswith(f"srpo.py: --method {method}: ") and complaint in line
    assert "\n" not in line


def test_a_method_that_returns_nothing_is_told(tmp_path, capsys, idea):
    method = f"{idea}:returns_nothing"
    with pytest.raises(SystemExit) as end:
        run_here(*TINY, "--method", method, "--out_dir", tmp_path / "run")
    assert end.value.code == 2
    complaint = f"--method {method} returned None: return a list of at least one rollout"
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_training_learns(tmp_path):
    """36 steps on an easier chain lift the held-out pass rate well beyond chance."""
    flags = (
        "--engine hf --train_data chain-4 --eval_data chain-4 --steps 36 --lr 1e-3 "
        "--eval_problems 128 --eval_samples 4 --eval_every 0 --rollouts_every 0"
    )
    run_here(*flags.split(), "--out_dir", tmp_path / "run")
    before, *_, after = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert after["eval_pass_rate"] > before["eval_pass_rate"] + 0.1


@needs_sandbox
def test_code_problems_need_a_sandbox(tmp_path, capsys, untouched, monkeypatch):
    """A run on code problems says what isolates them; where nothing does, it is refused before
    anything is written."""
    code = tmp_path / "code.jsonl"
    problems = []
    for i in (2, 3):
        question = f"mod97 1: +{i} start 2 ."
        problems.append({"question": question, "kind": "code", "tests": {"stdin": [["2", "4"]]}})
    append(code, problems)
    flags = [*TINY, "--train_data", code, "--eval_data", code, "--steps", "1"]
    flags += ["--eval_problems", "2"]

    run_here(*flags, "--out_dir", tmp_path / "run")
    assert "sandbox: bubblewrap, seccomp" in capsys.readouterr().out
    before, last = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert last["counters"]["no_code"] > 0  # the embedded policy does not write programs
    # All responses to 2 held-out problems, and nothing of the step between.
    samples = 2 * srpo.parse([str(flag) for flag in flags]).eval_samples
    assert before["eval_counters"] == last["eval_counters"] == {"no_code": samples}

    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap there
    line = refused(capsys, *flags, "--out_dir", untouched)
    assert "kind code cannot be graded on this machine" in line


# ------------------------------------------------------------------------------- the same run again

LONGER = [*TINY, "--steps", "5", "--seed", "3", "--eval_every", "0"]


def weights(out, step):
    return (out / "checkpoints" / f"step_{step}" / "model.safetensors").read_bytes()


def files_of(out):
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def without_seconds(lines):
    for line in lines:
        line.pop("seconds", None)
    return lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*LONGER, "--out_dir", out)
    assert done.returncode == 0, done.stderr
    return out


def same_run(out, uninterrupted):
    assert weights(out, 5) == weights(uninterrupted, 5)
    assert weights(out, 5) != (POLICY / "model.safetensors").read_bytes()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        ours, theirs = lines_of(out / name), lines_of(uninterrupted / name)
        assert without_seconds(ours) == without_seconds(theirs)


def test_same_seed_same_run_and_other_seed_other_run(tmp_path, uninterrupted):
    run_here(*LONGER, "--out_dir", tmp_path / "again")  # the other one ran in a process of its own
    same_run(tmp_path / "again", uninterrupted)
    run_here(*LONGER, "--seed", "4", "--out_dir", tmp_path / "other")
    assert weights(tmp_path / "other", 5) != weights(uninterrupted, 5)


def test_kill_and_resume_equals_uninterrupted(tmp_path, uninterrupted):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [*SRPO, *LONGER, "--out_dir", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("checkpoints/step_[2-9]")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "metrics.jsonl").open("a") as file:  # as if killed in the middle of writing
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
    process = subprocess.Popen(
        [*SRPO, *LONGER, "--save_every", "100", "--out_dir", str(out)],
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
    assert "go on with: python srpo.py --resume" in stdout
    assert "Traceback" not in stderr
    assert list((out / "checkpoints").glob("step_*"))
    run_here("--resume", out)
    assert weights(out, 5) == weights(uninterrupted, 5)


def test_resume_can_be_extended(tmp_path, uninterrupted):
    out = tmp_path / "extended"
    run_here(*LONGER, "--steps", "3", "--out_dir", out)
    run_here("--resume", out, "--steps", "5")
    assert weights(out, 5) == weights(uninterrupted, 5)


def test_a_run_in_bfloat16_is_resumed_exactly(tmp_path):
    """One process is a shard then, as on a GPU: float32 weights, and a bfloat16 copy samples."""
    flags = [*TINY, "--dtype", "bfloat16"]
    for folder, steps in (("whole", 3), ("parts", 1)):
        done = run(*flags, "--steps", steps, "--out_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    done = run("--resume", tmp_path / "parts", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "parts", 3) == weights(tmp_path / "whole", 3)
    saved = load_file(tmp_path / "whole/checkpoints/step_3/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    for line in lines_of(tmp_path / "whole" / "metrics.jsonl")[1:]:
        assert line["gap"] < 0.005  # the same bfloat16 arithmetic, at the same positions
    assert "dtype=bfloat16" in name_of(read_run(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    before = files_of(out)
    run_here("--resume", out)
    assert files_of(out) == before
    last = lines_of(out / "metrics.jsonl")[-1]["eval_pass_rate"]
    printed = capsys.readouterr().out
    assert f"-> {last:.3f} in" in printed
    assert "older run" not in printed


def test_an_older_run_is_resumed(tmp_path, capsys, uninterrupted):
    """A setting that config.json lacks gets its default, and says so; an unknown one is ignored."""
    out = tmp_path / "older"
    out.mkdir()
    config = json.loads((uninterrupted / "config.json").read_text())
    lacking = {"grad_clip", "oracle_tau"}
    for key in lacking | {"name"}:
        del config[key]
    config["seed_choice"] = "first"  # a setting that there is no more
    (out / "config.json").write_text(json.dumps(config))
    run_here("--resume", out)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "older run" in line]
    start, named = said.split(" an older run; it gets the default of ")
    assert start == f"--resume {out}:"
    assert set(named.split(", ")) == lacking
    same_run(out, uninterrupted)


# ----------------------------------------------------------------------------------- names and help


def name_with(flags):
    return srpo.parse(flags.split()).name()


@pytest.mark.parametrize(
    "flags, name",
    [
        ("", "srpo 1x4"),
        ("--clip 0.2", "srpo 1x4 clip=0.2"),
        ("--split 2x4", "srpo 2x4"),
        ("--split 1x8", "srpo 1x8"),
        ("--suffixes 8", "srpo 1x8 base=4"),
        ("--prefixes 2", "srpo 2x4 base=4"),
        ("--prefixes 3", "srpo 3x4"),
        ("--prefixes 3 --base 2", "srpo 3x4 base=2"),
        ("--method rrpo", "rrpo 1x4"),
        ("--method grpo", "grpo"),
    ],
)
def test_a_name_is_the_difference_from_the_defaults(flags, name):
    assert name_with(flags) == name


def test_other_settings_have_other_names():
    settings = [
        "",
        "--temperature 0.8",
        "--temperature 0.9",
        "--base 6",
        "--prompts_per_step 16",
        "--grad_clip 2",
        "--localize_fallback skip",
    ]
    names = {name_with(flags) for flags in settings}
    assert len(names) == len(settings)


@pytest.mark.parametrize("method", ["srpo", "grpo"])
@pytest.mark.parametrize(
    "flags", ["--seed 3", "--engine hf", "--micro_batch 8", "--out_dir runs/other"]
)
def test_what_does_not_change_the_method_is_not_in_the_name(method, flags):
    assert name_with(f"--method {method} {flags}") == name_with(f"--method {method}")


def test_a_run_knows_its_name_and_settings(uninterrupted):
    cfg = srpo.parse(LONGER)
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["name"] == cfg.name() == name_of(read_run(uninterrupted))
    assert "train_data=chain-5" in config["name"]
    assert config | vars(cfg) | {"out_dir": str(uninterrupted)} == config


def test_an_older_run_is_pooled_with_no_other(tmp_path, uninterrupted):
    """Without a name in its config.json a run keeps its folder's name."""
    config = json.loads((uninterrupted / "config.json").read_text())
    del config["name"]
    names = {name_of(read_run(uninterrupted))}
    for folder in (tmp_path / "first", tmp_path / "second"):
        shutil.copytree(uninterrupted, folder)
        (folder / "config.json").write_text(json.dumps(config))
        names.add(name_of(read_run(folder)))
    assert len(names) == 3


@pytest.mark.parametrize("source", ["chain-3", "english-2-4"])
def test_the_first_held_out_problems_are_made_and_no_others(monkeypatch, source):
    """They are those that a run with more of them begins with."""
    made = []

    def load(source, seed, **n):
        made.append(len(problems := load_problems(source, seed, **n)))
        return problems

    monkeypatch.setattr(srpo, "load_problems", load)
    few, more = [
        srpo.load_data(srpo.Config(train_data="chain-2", eval_data=source, eval_problems=n))[1]
        for n in (8, 16)
    ]
    assert made == [4096, 8, 4096, 16]
    assert [p.to_json() for p in few] == [p.to_json() for p in more[:8]]


def test_the_embedded_policy_by_its_name_and_by_its_folder():
    """Both have its learning rate; another policy has not."""
    assert srpo.parse([]).lr == srpo.parse(["--model", str(POLICY)]).lr == 5e-4
    assert srpo.parse(["--model", "another"]).lr == 1e-6


# Titles of groups in --help, each with some of its settings.
GROUPS = {
    "method": ["--method", "--localizer", "--clip"],
    "data": ["--model", "--train_data", "--seed"],
    "sampling": ["--engine", "--temperature"],
    "training": ["--steps", "--lr", "--lora_rank"],
    "evaluating, logging and resuming": ["--eval_every", "--out_dir", "--resume"],
}


def test_help_explains_every_setting_in_its_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    with pytest.raises(SystemExit, match="0"):
        run_here("--help")
    said = capsys.readouterr().out
    for setting in fields(srpo.Config):
        assert f"--{setting.name}" in said
    section_of = {section.split(":\n")[0]: section for section in said.split("\n\n")}
    assert list(section_of)[-len(GROUPS) :] == list(GROUPS)
    for title, flags in GROUPS.items():
        for flag in flags:
            assert f"\n  {flag} " in section_of[title]
    for option in re.split(r"\n  (?=-)", said):  # no default is said twice
        assert option.count("(default: ") <= 1
        assert not ("unset: " in option and "(default: " in option)
    assert " /" not in said  # nothing names a folder of this machine


@pytest.mark.parametrize("method", ["grpo", "rrpo", "srpo", "walk"])
def test_resets_on_problems_that_can_be_guessed_are_warned_of(tmp_path, capsys, method):
    guessed = [
        {"question": "(A) 1 (B) 2 ?", "answer": "B", "kind": "choice"},
        {"question": "1 > 2 ?", "answer": "no", "kind": "yes_no"},
    ]
    number = {"question": "1+1", "answer": "2", "kind": "integer"}
    append(tmp_path / "some.jsonl", [*guessed, number])
    append(tmp_path / "none.jsonl", [number])
    said = {}
    for name in ("some", "none"):
        data = str(tmp_path / f"{name}.jsonl")
        srpo.load_data(srpo.Config(method=method, train_data=data, eval_data="chain-1").resolve())
        said[name] = capsys.readouterr().out
    warning = "warning: 2 of 3 training problems can be guessed (choice, yes_no)"
    assert (warning in said["some"]) == (method != "grpo")
    assert "can be guessed" not in said["none"]


# ---------------------------------------------------------------------------------------- bad input


def refused(capsys, *args):
    """Runs main in this process; returns its one line of complaint."""
    with pytest.raises(SystemExit) as end:
        run_here(*args)
    assert end.value.code == 2
    complaint = capsys.readouterr().err.strip().splitlines()
    return complaint[-1] if "usage" in complaint[0] else "\n".join(complaint)


@pytest.fixture
def untouched(tmp_path):
    """An output folder that must not come into being."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


def write_bad_inputs(folder):
    good = '{"question": "1+1", "answer": "2", "kind": "integer"}\n'
    (folder / "good.jsonl").write_text(good)
    (folder / "empty.jsonl").write_text("")
    (folder / "malformed.jsonl").write_text(good + '{"question": \n')
    (folder / "field.jsonl").write_text('{"question": "1+1", "kind": "integer"}')
    long = {"question": "= " * 500, "answer": "2", "kind": "integer"}
    (folder / "long.jsonl").write_text(json.dumps(long))
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copytree(POLICY, folder / "no_pad")
    config_path = folder / "no_pad" / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config.pop("pad_token")
    config_path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--train_data missing.jsonl", "missing.jsonl: no such data file"),
        ("--eval_data {tmp}/empty.jsonl", "empty.jsonl: holds no problems"),
        ("--train_data {tmp}/malformed.jsonl", "malformed.jsonl, line 2: not JSON"),
        ("--train_data {tmp}/field.jsonl", "field.jsonl, line 1: field 'answer' is missing"),
        (
            "--train_data {tmp}/long.jsonl",
            "the prompt of problem 1 has 500 tokens, the context is 384; remove it, or raise",
        ),
        ("--train_data chain-0", "1 to 24 steps"),
        ("--method ppo", "--method ppo: no such method"),
        ("--off_policy_shape -0.1", "--off_policy_shape must be at least 0"),
        ("--length whole", "invalid choice: 'whole'"),
        ("--steps many", "invalid int value: 'many'"),
        ("--steps 0", "--steps must be at least 1"),
        ("--temperature 0", "--temperature must be at least 0.01"),
        ("--top_p 1.5", "--top_p must be above 0 and at most 1, not 1.5"),
        ("--prefixes -1", "--prefixes must be at least 0"),
        ("--method grpo --base 1", "at least 2 trained rollouts"),
        ("--method grpo --prefixes 1", "has no suffix groups"),
        ("--method walk --suffixes 4", "has no suffix groups"),
        ("--method grpo --split 2x4", "--split is of srpo and rrpo"),
        ("--method grpo --localizer oracle", "grpo never resets"),
        ("--split 2x4 --max_seed_draws 0", "then there is no seed"),
        ("--seed_source fresh --max_seed_draws 0", "then there is no seed"),
        ("--train_data english-3", "english-3, problem 1: the policy has no tokens for"),
        ("--method rrpo --localizer verifier", "rrpo resets at random"),
        ("--train_data {tmp}/good.jsonl --localizer verifier", "needs a step checker"),
        ("--tp 2", "--tp 2 must divide the number of processes, 1"),
        ("--engine_memory 0", "--engine_memory must be above 0"),
        ("--model {tmp}/nothing", "cannot be loaded"),
        ("--model {tmp}", "cannot be loaded"),
        ("--model {tmp}/run", "a run directory; give one of its checkpoints/step_N"),
        ("--model {tmp}/no_pad", "its tokenizer has no pad token"),
        ("--resume {tmp}/nothing", "no run of this program is there"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--grad_clip -1", "--grad_clip must be above 0"),
        ("--grad_clip inf", "--grad_clip must be above 0 and at most 1000000000, not inf"),
        ("--lr nan", "--lr must be at least 0 and at most 1, not nan"),
        ("--weight_decay inf", "--weight_decay must be at least 0"),
        ("--clip nan", "--clip must be at least 0"),
        ("--correct nan", "--correct must be at least 0 and at most 1, not nan"),
        ("--temperature nan", "--temperature must be at least 0.01"),
        ("--localize_temperature 0.001", "--localize_temperature must be 0 (greedy) or"),
        ("--context 0", "--context must be at least 1"),
        ("--context 400", "--context 400: the model takes 384 tokens at most"),
        ("--method ./vine:vine", "--method ./vine:vine: cannot import it (TypeError"),
        (f"--seed {10**30}", "--seed must be at least 0 and at most 1000000000"),
        ("--model a\nb", "--model must be printable text"),
        ("--train_data chain-" + "9" * 5000, "no such data file"),
        ("--train_data " + "x" * 5000, "no such data file"),
        ("--tracker no_such", "invalid choice: 'no_such'"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, untouched, flags, complaint):
    write_bad_inputs(tmp_path)
    flags = flags.replace("{tmp}", str(tmp_path)).split(" ")
    line = refused(capsys, *TINY, *flags, "--out_dir", untouched)
    assert complaint in line
    assert "\n" not in line


def test_without_vllm(tmp_path, capsys, monkeypatch, untouched):
    """auto says why it takes transformers; asking for vLLM itself is refused before anything is
    written."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    line = refused(capsys, *TINY, "--engine", "vllm", "--out_dir", untouched)
    assert "--engine vllm: vLLM cannot be used: ModuleNotFoundError" in line
    assert "use --engine hf" in line
    assert "\n" not in line
    run_here(*TINY, "--engine", "auto", "--steps", "1", "--out_dir", tmp_path / "auto")
    said = capsys.readouterr().out
    assert said.startswith("engine: hf (vLLM cannot be used: ModuleNotFoundError")


def test_a_resumed_run_keeps_its_engine(tmp_path, capsys, monkeypatch):
    """Where auto took transformers, --resume takes no other engine, whatever works by then."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    out = tmp_path / "auto"
    run_here(*TINY, "--engine", "auto", "--steps", "1", "--out_dir", out)
    assert json.loads((out / "config.json").read_text())["engine"] == "hf"
    assert "that run has engine = hf, not vllm" in refused(
        capsys, "--resume", out, "--engine", "vllm"
    )
    capsys.readouterr()
    run_here("--resume", out, "--steps", "2")
    assert capsys.readouterr().out.startswith("engine: hf (asked for)")


def test_unwritable_out_dir(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        assert "choose another --out_dir" in refused(capsys, *TINY, "--out_dir", out)


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
    assert "step_5 is damaged" in line
    assert "remove" in line
    assert "\n" not in line
    assert files_of(out) == before


def test_resume_with_other_settings(capsys, uninterrupted):
    before = files_of(uninterrupted)
    line = refused(capsys, "--resume", uninterrupted, "--grad-clip", "2")
    assert "that run has grad_clip = 1.0" in line
    line = refused(capsys, "--resume", uninterrupted, "--lr", "0.5")
    assert "that run has lr = 0.0005, not 0.5; leave --lr out" in line
    assert files_of(uninterrupted) == before


def test_exit_code_of_the_real_command(tmp_path):
    done = run("--train_data", tmp_path / "none.jsonl", "--out_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("srpo.py: ")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the step line


def one_response(task):
    """A program: one response to the prompt."""
    (base,) = yield [task.request("base", 1)]
    return base


def suffix_of(task, seed, reset, reward):
    """A suffix rollout of `seed`, reset at thought `reset`."""
    return Rollout(
        problem=task.problem.index,
        purpose="suffix",
        prompt_ids=seed.prompt_ids,
        token_ids=seed.token_ids,
        logps=seed.logps,
        thought_ends=seed.thought_ends,
        finish="answer",
        prefix_len=len(seed.prefix(reset)),
        advantages=[0.0] * len(seed.thought_ends),
        reward=reward,
        group=(task.slot, 1),
        seed=seed,
        reset=reset,
        localized="self",
    )


def test_step_line_knows_clean_and_erroneous_prefixes(policy, tmp_path):
    """Resets at, before and after the true first wrong thought: the first two leave a clean prefix,
    and nothing else counts as exact."""
    tasks = policy.tasks(5, 24, seed=3)
    rollouts, offsets = [], []  # offsets: reset minus truth
    clean_rewards, erroneous_rewards = [], []
    for task in tasks:
        ((seed,),) = run_programs([one_response(task)], policy.engine).results
        truth = task.first_wrong(seed)
        if truth is None or not 1 < truth < len(seed.thought_ends):
            continue
        offset = (0, -1, 1)[len(offsets) % 3]
        offsets.append(offset)
        for i in range(2):
            reward = float(i == 1 and offset == 0)
            rollouts.append(suffix_of(task, seed, truth + offset, reward))
            (clean_rewards if offset <= 0 else erroneous_rewards).append(reward)
    assert len(offsets) >= 6
    exact = np.mean([offset == 0 for offset in offsets])
    clean = np.mean([offset <= 0 for offset in offsets])

    review = replace(rollouts[0], purpose="localization", reward=None)
    line = step_metrics(rollouts, [*rollouts, review], tasks)
    assert line["verifier_calls"] == len(rollouts)
    assert line["pass_suffix"] == pytest.approx(np.mean([r.reward for r in rollouts]))
    assert line["zero_variance_suffix"] == pytest.approx(1 - exact)
    depths = [r.reset / len(r.thought_ends) for r in rollouts]
    assert line["reset_depth"] == pytest.approx(np.mean(depths))
    lengths = [len(r.token_ids) for r in rollouts]
    assert line["response_tokens"] == pytest.approx(np.mean(lengths))
    masked = sum(r.prefix_len for r in rollouts)
    assert 0 < line["masked_share"] == pytest.approx(masked / sum(lengths))
    assert line["localized_exact"] == pytest.approx(exact)
    assert line["localized_clean"] == pytest.approx(clean)
    assert line["pass_suffix_clean"] == pytest.approx(np.mean(clean_rewards))
    assert line["pass_suffix_erroneous"] == pytest.approx(np.mean(erroneous_rewards))

    append(tmp_path / "rollouts.jsonl", records_of(1, [rollouts[0].seed], tasks))
    (record,) = lines_of(tmp_path / "rollouts.jsonl")
    assert record["first_wrong"] == rollouts[0].reset  # the first of them was reset at the truth
