"""The run directory and the models: what is locked, compared, refused and kept when something goes
wrong. srpo.py as a whole is in test_run.py."""

import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import files_of, lines_of, refused, run_here
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import srpo
from conftest import IDEA, POLICY, ROOT
from data import parallel, policies, runs
from data.faults import UserError

TINY = (
    "--engine hf --steps 2 --prompts_per_step 2 --eval_data chain-3 --eval_problems 2 "
    "--eval_samples 1 --save_every 1 --max_thoughts 3"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps on a file of problems."""
    folder = tmp_path_factory.mktemp("finished")
    lines = []
    for answer in range(6):
        lines.append(json.dumps({"question": "1: +2", "answer": str(answer), "kind": "integer"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    run_here(*TINY, "--train_data", folder / "data.jsonl", "--out_dir", folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, with a copy of its data."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "run" / "config.json", train_data=str(tmp_path / "data.jsonl"))
    for origin in (tmp_path / "run").glob("checkpoints/*/origin.json"):
        settings = json.loads(origin.read_text())["settings"]
        edit(origin, settings=settings | {"train_data": str(tmp_path / "data.jsonl")})
        (origin.parent / "manifest.json").unlink()
        runs.write_manifest(origin.parent)
    return tmp_path / "run"


def edit(path, **changes):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def steps_of(out):
    return [line["step"] for line in lines_of(out / "metrics.jsonl")]


# ------------------------------------------------------------------------------------ one at a time

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


@contextmanager
def another_program(lock):
    """Another process has a run's lock. It is killed at the end."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    yield
    holder.kill()
    holder.communicate()


def test_a_run_is_written_by_one_program(capsys, run):
    before = files_of(run)
    with another_program(run / "lock"):
        line = refused(capsys, "--resume", run, "--steps", "3")
    assert "another process writes this run" in line and "\n" not in line
    assert files_of(run) == before
    run_here("--resume", run, "--steps", "3")  # the lock went with the program
    assert steps_of(run) == [0, 1, 2, 3]


def test_two_new_runs_in_one_directory(tmp_path):
    """The second one has loaded its model while the first one started."""
    out = tmp_path / "run"
    out.mkdir()
    with another_program(out / "lock"):
        runs.check_new(out)
        with pytest.raises(UserError, match="another process writes this run"):
            runs.start(out, {})
    runs.start(out, {"method": "grpo"})
    with pytest.raises(UserError, match="already holds a run"):
        runs.start(out, {"method": "srpo"})
    assert runs.read_settings(out)["method"] == "grpo"
    runs.leave(out)


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data.parallel import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(100)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_a_process_ends_with_the_agent_that_started_it():
    """As torchrun's processes do, when torchrun is killed. A pipe that all of them hold tells."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, ROOT], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    start = time.monotonic()
    parent.communicate(timeout=90)  # returns when the child has closed the pipe too
    assert time.monotonic() - start < 60


def test_a_process_whose_agent_ended_before_it_could_notice(monkeypatch):
    """It does not wait for hours where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for name, value in about.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(parallel, "JOIN", timedelta(seconds=1))
    with pytest.raises(UserError, match="torchrun's agent does not answer .*start torchrun again"):
        parallel.store_of_agent()


TWICE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from data.driver import graders
from data.parallel import StopRequest
stop = StopRequest()
for _ in range(100):
    graders().apply_async(time.sleep, [100])
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if stop.requested:
        print("stopping", flush=True)
"""


def test_the_second_ctrl_c_ends_at_once():
    """Whatever is still queued for grading."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", TWICE, ROOT], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in stderr


# ---------------------------------------------------------------------------------- old directories


@pytest.mark.parametrize("name", [name for name in runs.CONTENTS if name != "config.json"])
def test_a_directory_with_parts_of_a_run_is_not_new(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name} of a run without its config.json"):
        runs.check_new(tmp_path)


def test_a_directory_with_other_files_is_new(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    runs.check_new(tmp_path)


@pytest.mark.parametrize(
    "out", ["/dev/null", "{tmp}/file", "{tmp}/file/below", "/proc/run", "{tmp}/" + "x" * 999]
)
def test_no_directory(tmp_path, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out_dir"):
        runs.check_new(Path(out.replace("{tmp}", str(tmp_path))))


def test_other_entries_beside_the_checkpoints_stay(run):
    strangers = ["step_1_best", "step_5.bak", "step_00009", "step_", "tmp-mine"]
    for name in strangers:
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "note").write_text("mine")
    (run / "checkpoints" / "step_7").write_text("a file")
    (run / "checkpoints" / "tmp-step_3").mkdir()  # of a run that was killed
    run_here("--resume", run, "--steps", "3")
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {*strangers, "step_7", "step_2", "step_3"}


# --------------------------------------------------------------------------------- what has changed


def change_data(run, how):
    """Edits the run's problems."""
    path = run.parent / "data.jsonl"
    lines = path.read_text().splitlines()
    if how == "edited":
        lines[3] = lines[3].replace('"3"', '"4"')
    elif how == "shuffled":
        lines[1], lines[2] = lines[2], lines[1]
    elif how == "appended":
        lines.append(lines[0])
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("how", ["edited", "shuffled", "appended"])
def test_changed_problems_are_noticed(capsys, run, how):
    change_data(run, how)
    before = files_of(run)
    line = refused(capsys, "--resume", run, "--steps", "3")
    assert "the training problems changed" in line and "--allow_changes true" in line
    assert "\n" not in line
    assert files_of(run) == before
    if how == "edited":
        run_here("--resume", run, "--steps", "3", "--allow_changes", "true")
        assert "going on with changes: the training problems changed" in capsys.readouterr().out
        assert steps_of(run) == [0, 1, 2, 3]
        run_here("--resume", run, "--steps", "4")  # the new checkpoint has the new problems


@pytest.mark.parametrize(
    "file, change, part",
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "model config"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "tokenizer"),
    ],
)
def test_another_model_has_another_fingerprint(tmp_path, file, change, part):
    shutil.copytree(POLICY, tmp_path, dirs_exist_ok=True)
    same = policies.fingerprint(*policies.load_policy(tmp_path))
    assert same == policies.fingerprint(*policies.load_policy(POLICY))
    edit(tmp_path / file, **change)
    other = policies.fingerprint(*policies.load_policy(tmp_path))
    assert [name for name in same if same[name] != other[name]] == [part]


def test_a_changed_method_file_is_noticed(capsys, tmp_path):
    file, out = tmp_path / "idea.py", tmp_path / "run"
    file.write_text(
        "from rollout import grpo\n\ndef idea(task):\n    return (yield from grpo(task))\n"
    )
    flags = ["--train_data", "chain-3", "--method", f"{file}:idea"]
    run_here(*TINY, *flags, "--steps", "1", "--out_dir", out)
    file.write_text(file.read_text() + "# changed\n")
    line = refused(capsys, "--resume", out, "--steps", "2")
    assert "the file of --method changed" in line and "--allow_changes true" in line
    run_here("--resume", out, "--steps", "2", "--allow_changes", "true")
    assert steps_of(out) == [0, 1, 2]


def test_the_base_of_adapters_has_a_digest(capsys, run, tmp_path):
    """A checkpoint of adapters lacks the base's weights: another base would be another run."""
    pytest.importorskip("peft", reason="peft is not installed; see Run it in README.md")
    model, _ = policies.load_policy(POLICY)
    digest = policies.digest_of_weights(model)
    assert digest == policies.digest_of_weights(model.bfloat16())
    with torch.no_grad():
        model.get_output_embeddings().weight[-1, -1] += 1
    assert policies.digest_of_weights(model) != digest
    flags = ["--train_data", tmp_path / "data.jsonl", "--lora_rank", "2"]
    run_here(*TINY, *flags, "--out_dir", tmp_path / "adapted")
    newest = tmp_path / "adapted" / "checkpoints" / "step_2"
    inputs = json.loads((newest / "origin.json").read_text())["inputs"]
    assert inputs["base weights"] == runs.digest_of(digest)
    now = runs.Origin({}, inputs | {"base weights": policies.digest_of_weights(model)})
    with pytest.raises(UserError, match="the base weights changed; put that back"):
        runs.check_origin(newest, now, allow_changes=False)
    runs.check_origin(run / "checkpoints" / "step_2", now, allow_changes=True)
    said = capsys.readouterr().out
    assert "of an older version; nothing tells whether the base weights changed" in said


def test_edited_settings(capsys, run):
    """In config.json: those that may change hold, the others are refused, all of them."""
    edit(run / "config.json", lr=1e-4, seed=7, micro_batch=8)
    line = refused(capsys, "--resume", run)
    assert "lr was 0.0005 and is 0.0001" in line and "seed was 0 and is 7" in line
    assert "micro_batch" not in line and "\n" not in line
    run_here("--resume", run, "--steps", "3", "--allow_changes", "true")
    newest = run / "checkpoints" / "step_3"
    assert json.loads((newest / "origin.json").read_text())["settings"]["seed"] == 7
    dcp_to_torch_save(newest / "state", run / "state.pt")
    (group,) = torch.load(run / "state.pt")["optimizer"]["param_groups"]
    assert group["lr"] == 1e-4


@pytest.mark.parametrize("change", ["--method grpo", "--split 2x4"])
def test_method_and_split_stay(capsys, run, change):
    """They set the defaults of other settings, which the run has by now."""
    line = refused(capsys, "--resume", run, *change.split(), "--allow_changes", "true")
    assert "cannot change; start a new run" in line and "\n" not in line


def test_a_program_may_move(tmp_path, capsys):
    """To another file with the same text; the files of both are compared."""
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(IDEA)
    out = tmp_path / "run"
    start = ["--method", f"{tmp_path}/a.py:vine", "--oracle_samples", "2", "--out_dir", out]
    run_here(*TINY, *start, "--steps", "1")
    run_here("--resume", out, "--method", f"{tmp_path}/b.py:vine", "--allow_changes", "true")
    line = refused(capsys, "--resume", out, "--method", "grpo", "--allow_changes", "true")
    assert "--method cannot change; start a new run" in line


def test_a_type_that_was_not_recorded_is_no_change(run):
    edit(run / "config.json", dtype=None)
    newest = runs.newest_checkpoint(run)
    origin = json.loads((newest / "origin.json").read_text())
    origin["settings"]["dtype"] = None
    now = runs.Origin(origin["settings"] | {"dtype": "float32"}, origin["inputs"])
    (newest / "origin.json").write_text(json.dumps(origin))
    runs.check_origin(newest, now, allow_changes=False)


def test_steps_of_a_resume_are_remembered(capsys, run):
    run_here("--resume", run, "--steps", "4")
    shutil.rmtree(run / "checkpoints" / "step_4")
    run_here("--resume", run)
    assert steps_of(run) == [0, 1, 2, 3, 4]
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 4 and config["resume"] is None
    line = refused(capsys, "--resume", run, "--steps", "3")
    assert "--steps 3: " in line and "ask for 4 or more" in line


# ---------------------------------------------------------------------------- damage and full disks


@contextmanager
def full_disk(size):
    """No file can grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_the_start(tmp_path):
    """The directory can be used when there is room again."""
    out = tmp_path / "run"
    with full_disk(50), pytest.raises(UserError, match="cannot write .*config.json"):
        runs.start(out, {"method": "srpo"})
    runs.check_new(out)
    runs.start(out, {"method": "srpo"})
    runs.leave(out)


def test_a_full_disk_at_a_save(capsys, run):
    """A clear line, the old checkpoints are whole, and the run goes on when there is room again."""
    before = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in before] == ["step_1", "step_2"]
    for size in (10**6, 10**5):  # the optimizer's state does not fit; nor do the weights
        with full_disk(size):
            line = refused(capsys, "--resume", run, "--steps", "3")
        assert "cannot write" in line and "what was saved before is whole" in line
    for checkpoint in before:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest.keys() > {"model.safetensors", "trainer.json"}
        for file, sha in manifest.items():
            assert runs.digest(checkpoint / file) == sha
    run_here("--resume", run, "--steps", "3")
    assert steps_of(run) == [0, 1, 2, 3]


def test_a_checkpoint_before_the_first_update_changes_nothing(tmp_path):
    """torch would count a step of zeros, and the first real one would be a quarter smaller."""
    weights = []
    for saved in (False, True):
        model = torch.nn.Linear(3, 2)
        torch.nn.init.ones_(model.weight)
        optimizer = srpo.new_optimizer(list(model.parameters()), srpo.Config(lr=0.1))
        if saved:
            runs.training_state(model, optimizer)
        model(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        optimizer.step()
        weights.append(model.weight.detach())
    usual = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(usual.weight)
    optimizer = torch.optim.AdamW(usual.parameters(), lr=0.1, weight_decay=0.01)
    usual(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    optimizer.step()
    assert torch.equal(*weights) and torch.equal(weights[0], usual.weight.detach())


def test_parameters_without_a_gradient_are_resumed(tmp_path):
    """A language model may have a vision tower that no text reaches."""

    def training():
        model = torch.nn.ModuleDict(
            {"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)}
        )
        model.save_pretrained = lambda *_, **__: None
        return model, srpo.new_optimizer(list(model.parameters()), srpo.Config(lr=0.1))

    (tmp_path / "checkpoints").mkdir()
    model, optimizer = training()
    model["used"](torch.ones(2)).sum().backward()
    optimizer.step()
    tokenizer = SimpleNamespace(save_pretrained=lambda *_: None)
    parts = model, tokenizer, optimizer
    runs.save_checkpoint(tmp_path, runs.Progress(step=1), runs.Origin({}, {}), *parts)
    again, its_optimizer = training()
    runs.load_checkpoint(tmp_path / "checkpoints" / "step_1", again, its_optimizer)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    steps = [its_optimizer.state[p]["step"].item() for p in again.parameters()]
    assert steps == [1, 1, 0, 0]


def test_a_directory_that_is_gone(run):
    shutil.rmtree(run)
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        runs.append(run / "metrics.jsonl", [{"step": 1}])


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[]", "no run of this program is there (TypeError: not a JSON object)"),
        ("{}", "no method in config.json"),
        ("[" * 10**5, "no run of this program is there (RecursionError"),
        ('{"method": ' + "9" * 5000 + "}", "no run of this program is there (ValueError"),
        ('{"method": 7}', "config.json: --method must be of type str, not 7"),
        ('{"method": "srpo", "steps": "many"}', "config.json: --steps must be of type int"),
        ('{"method": "srpo", "lr": NaN}', "config.json: --lr must be at least 0"),
        ('{"method": "srpo", "mask_prefix": 1}', "--mask_prefix must be of type bool"),
        ('{"method": "srpo", "split": [1]}', "--split must be one of 1x4, 2x4, 1x8, not [1]"),
        ('{"method": "srpo", "model": "\\ud800"}', "--model must be printable text"),
    ],
)
def test_a_damaged_config(tmp_path, capsys, content, complaint):
    (tmp_path / "config.json").write_text(content)
    line = refused(capsys, "--resume", tmp_path)
    assert complaint in line and "\n" not in line


def test_a_line_that_was_cut_in_two_is_passed_over(run):
    """Whoever reads a run while it writes, or after a kill, sees its whole lines."""
    lines = (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    assert len(runs.read_run(run).lines) == len(lines.splitlines())
    runs.drop_later_lines(run / "metrics.jsonl", 5)
    assert (run / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("damage", ["{", "[1]", '{"step": "2"}', "7", "\0\0"])
def test_a_damaged_line(run, name, damage):
    (run / name).write_text('{"step": 0}\n' + damage + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=f"{name}, line 2: not a line of srpo.py; restore"):
        runs.drop_later_lines(run / name, 5)
    if name == "metrics.jsonl":
        with pytest.raises(UserError, match="metrics.jsonl, line 2: not a line of srpo.py"):
            runs.read_run(run)


@pytest.mark.parametrize("manifest", ["[]", "7", '{"state": 1}', '{"a\\u0000b": ""}', "[" * 10**5])
def test_a_damaged_manifest(run, manifest):
    (run / "checkpoints" / "step_2" / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="step_2 is damaged .*; remove"):
        runs.newest_checkpoint(run)


# ------------------------------------------------------------------------------------------- models


def damage_weights(folder, how):
    """Damages model.safetensors, or what it should fit."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "nan":
        weights[name][3, 3] = float("nan")
    elif how == "missing":
        del weights[name]
    elif how == "unexpected":
        weights["extra.weight"] = torch.zeros(3)
    elif how == "mismatched":
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "foreign": b"hello " * 1000}
    path.write_bytes(contents.get(how, whole))
    if how == "pickled":
        path.rename(folder / "pytorch_model.bin")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "how, complaint",
    [
        ("nan", f"{UP} holds nan or inf"),
        ("missing", f"do not fit its config.json (missing: {UP})"),
        ("unexpected", "do not fit its config.json (unexpected: extra.weight)"),
        ("mismatched", f"mismatched: {UP} is [384, 95], not [384, 96]"),
        ("truncated", "cannot be loaded (Error while deserializing header: incomplete metadata"),
        ("empty", "cannot be loaded (Error while deserializing header: header too small"),
        ("foreign", "cannot be loaded (Error while deserializing header: header too large"),
        ("pickled", "cannot be loaded ("),
    ],
)
def test_weights_that_are_not_the_models(tmp_path, how, complaint):
    shutil.copytree(POLICY, tmp_path, dirs_exist_ok=True)
    damage_weights(tmp_path, how)
    with pytest.raises(UserError) as refusal:
        policies.load_policy(tmp_path)
    assert complaint in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "file, content, complaint",
    [
        ("config.json", '{"hidden_size": "big"}', "Field 'hidden_size' expected int, got str"),
        ("config.json", '{"num_attention_heads": 0}', "cannot be loaded (integer modulo by zero"),
        ("config.json", "[1]", "must be a mapping, not list"),
        ("config.json", "[" * 10**5, "maximum recursion depth exceeded"),
        ("tokenizer.json", "{}", "cannot be loaded ("),
        ("tokenizer.json", '{"pre_tokenizer": 7}', "cannot be loaded (data did not match"),
        ("tokenizer_config.json", '{"pad_token": 7}', "has to be either str or AddedToken"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "cannot be loaded ('>' not"),
        ("generation_config.json", "{", "generation_config.json' is not a valid JSON file"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id in generation_config"),
        ("generation_config.json", '{"max_new_tokens": -4}', "must be greater than 0, but is -4"),
    ],
)
def test_a_damaged_model_folder(tmp_path, file, content, complaint):
    """content: keys to change, or a whole file that is something else."""
    shutil.copytree(POLICY, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if content.startswith('{"'):
        edit(path, **json.loads(content))
    else:
        path.write_text(content)
    with pytest.raises(UserError) as refusal:
        policies.load_policy(tmp_path)
    assert complaint in str(refusal.value) and "\n" not in str(refusal.value)


def test_no_code_of_a_model_folder_runs(tmp_path, monkeypatch):
    """Not even for a user who would answer yes."""
    shutil.copytree(POLICY, tmp_path, dirs_exist_ok=True)
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(tmp_path / "config.json", model_type="evil", auto_map=auto_map)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be loaded"):
        policies.load_policy(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_generation_config_that_transformers_does_not_save(tmp_path):
    """A temperature without do_sample, as Llama 2 has it: the run ends, and its policy loads."""
    model = tmp_path / "model"
    shutil.copytree(POLICY, model)
    edit(model / "generation_config.json", temperature=0.9, top_p=0.6)
    out = tmp_path / "run"
    run_here(*TINY, "--train_data", "chain-3", "--model", model, "--steps", "1", "--out_dir", out)
    saved, _ = policies.load_policy(out / "checkpoints" / "step_1")
    generation = saved.generation_config
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.9, 0.6)


def test_what_cannot_be_saved_is_refused_before_training(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(POLICY, model)
    edit(model / "generation_config.json", length_penalty=2.0)
    line = refused(
        capsys, *TINY, "--train_data", "chain-3", "--model", model, "--out_dir", tmp_path / "run"
    )
    assert "cannot be saved again" in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_chat_template_that_raises(policy, monkeypatch):
    for template in ("{{ raise_exception('only pairs') }}", "{{ messages[7].role.x }}", "{% if"):
        monkeypatch.setattr(policy.tokenizer, "chat_template", template)
        with pytest.raises(UserError, match="the chat template of the policy fails"):
            policies.encode_prompt(policy.tokenizer, "1 + 1?")


def test_a_prompt_does_not_depend_on_the_day(policy, monkeypatch):
    """Llama 3.2's template, for one, writes the date."""
    template = "{% for m in messages %}{{ m.content }} {{ strftime_now('%d') }} {% endfor %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    the_day = policy.tokenizer("26")["input_ids"]
    assert policies.encode_prompt(policy.tokenizer, "1")[-len(the_day) :] == the_day
    assert policies.encode_turn(policy.tokenizer, "1")[-len(the_day) :] == the_day


def test_a_gradient_that_is_not_finite(capsys, run, monkeypatch):
    """One line, and the checkpoint before it is kept."""
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: nan)
    monkeypatch.setattr("srpo.weigh", lambda *_: [SimpleNamespace(weights=[1.0])])
    monkeypatch.setattr("srpo.backward", lambda *_: None)
    line = refused(capsys, "--resume", run, "--steps", "3")
    assert "the gradient of step 3 is not finite" in line and "smaller --lr" in line
    assert runs.newest_checkpoint(run).name == "step_2"


# ------------------------------------------------------------------------------------------ tracker

TRACKER = """
lines = []

def init(project, name, config, resume):
    lines.append((project, name, config["steps"], resume))

def log(line, step):
    lines.append((step, line["total_tokens"], None in line.values()))

def finish():
    lines.append("finish")
"""


def test_a_tracker_gets_the_step_lines(tmp_path, capsys, monkeypatch):
    out = tmp_path / "a_run"
    flags = [*TINY, "--train_data", "chain-3", "--tracker", "trackio", "--out_dir", out]
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    line = refused(capsys, *flags)
    assert "--tracker trackio cannot be used" in line and "pip install trackio" in line
    assert "\n" not in line and not out.exists()
    monkeypatch.delitem(sys.modules, "trackio")
    (tmp_path / "trackio.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    run_here(*flags)
    begin, *sent, end = sys.modules["trackio"].lines
    assert begin == ("srpo", "a_run", 2, "allow") and end == "finish"
    logged = lines_of(out / "metrics.jsonl")
    assert sent == [(line["step"], line["total_tokens"], False) for line in logged]
    monkeypatch.delitem(sys.modules, "trackio")
