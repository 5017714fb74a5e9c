"""The HTML report: its weights are the loss's, and it keeps to its size.

In a real headless Chromium it draws what it should and runs nothing that a model wrote. Without
Chromium those tests are skipped (`apt-get install chromium`; CHROMIUM names another one)."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval as measures
import srpo
from data import curves
from data.driver import run_programs
from data.faults import UserError
from data.metrics import step_metrics
from data.programs import trained_rollouts
from data.report import page
from data.runs import append, name_of, read_run
from loss import set_advantages, weigh
from rollout import PROGRAMS, records_of

CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
in_browser = pytest.mark.skipif(  # the gate installs Chromium first, and ends if it cannot
    CHROMIUM is None and "REQUIRE_OPTIONAL" not in os.environ,
    reason="Chromium is not installed; see Test it in README.md",
)
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "half \ud800 pair \udc00",
    "back \u202e drawrof \u2066 isolated",
    "\x1b[31mred\x1b[0m \x00 \x9b",
    r"$\frac{1}{2}$ &lt;b&gt; </thought>",
    "REPORT_DATA CONTENT_POLICY",
]
SHOWN = [  # the same, as the page has to show it
    *HOSTILE[:3],
    "half U+D800 pair U+DC00",
    "back U+202E drawrof U+2066 isolated",
    "U+001B[31mredU+001B[0m U+0000 U+009B",
    *HOSTILE[6:],
]


def open_record(task):
    """A program with all that a record can say: credit for each thought, a response that joins the
    base group, masked thoughts, a second turn off-policy, and a review."""
    (base,) = yield [task.request("base", 3)]
    again, _ = yield [task.request("again", 1, base[0], 2), task.request("value", 5, base[1], 2)]
    again[0].trained_from = 0
    base[1].trained_from = base[1].thought_ends[0]
    for rollout in base + again:
        H = len(rollout.thought_ends)
        rollout.advantages = [(-1.0) ** h * (h + 1) / H for h in range(H)]
    second = task.reply(base[0], "so +9 now")
    retry, _ = yield [task.request("retry", 2, prompt_ids=second), task.ask("review", second)]
    for i, rollout in enumerate(retry):
        rollout.trained_prompt = task.prompt_ids
        rollout.advantages = [i - 0.5] * len(rollout.thought_ends)
    return task.in_group(0, base + again) + task.in_group(1, retry)


class Run:
    """A run directory, written by srpo.py's own functions from rollouts of the embedded policy.

    `rollouts` holds (trained, generated) for each step, `weights` those of the loss by id of the
    rollout. method: a name, or a program. settings: of srpo.Config."""

    def __init__(self, folder, policy, steps=2, problems=4, method="srpo", **settings):
        self.folder, self.rollouts, self.weights = folder, {}, {}
        self.program = PROGRAMS.get(method, method)
        if callable(method):
            method = f"idea.py:{method.__name__}"
        folder.mkdir()
        cfg = srpo.Config(method=method, prompts_per_step=problems, **settings).resolve()
        config = {"name": cfg.name()} | asdict(cfg)
        (folder / "config.json").write_text(json.dumps(config))
        settings |= {key: config[key] for key in ("base", "prefixes", "suffixes")}
        lines = [{"step": 0, "total_tokens": 0, "eval_pass_rate": 0.25}]
        for step in range(1, steps + 1):
            tasks = policy.tasks(4, problems, "self", seed=step, **settings)
            lines.append(self.take_step(step, tasks, policy.engine))
            lines[-1]["total_tokens"] += lines[-2]["total_tokens"]
        write_lines(folder / "metrics.jsonl", lines)

    def take_step(self, step, tasks, engine):
        """Samples the rollouts of a step and writes them; its step line."""
        sampled = run_programs([self.program(task) for task in tasks], engine)
        rollouts = trained_rollouts("idea", sampled)
        set_advantages(rollouts)
        for item in weigh(rollouts, tasks[0].cfg):
            self.weights[id(item.rollout)] = item.weights
        self.rollouts[step] = (rollouts, sampled.generated)
        path = self.folder / "rollouts.jsonl"
        append(path, records_of(step, sampled.generated, tasks))
        line = {"step": step, "total_tokens": sum(r.generated for r in sampled.generated)}
        line |= step_metrics(rollouts, sampled.generated, tasks)
        line |= {"trained_tokens": 1, "off_policy_tokens": 0, "entropy": None, "counters": {}}
        line |= {"seconds": dict(sampled.seconds), "eval_pass_rate": 0.25 + step / 10}
        return line

    def records(self):
        return read_lines(self.folder / "rollouts.jsonl")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def report(out, *folders, megabytes="20"):
    """Runs the command; (text of the page, the data in it)."""
    measures.main(["report", *map(str, folders), "--out", str(out), "--megabytes", str(megabytes)])
    text = out.read_text(encoding="ascii")
    return text, json.loads(DATA.search(text)[1])


def all_trees(run):
    """Every tree of a run in the page's data."""
    trees = []
    for step in run["steps"]:
        trees += step["trees"]
    return trees


# ------------------------------------------------------------------------------------- browser


class Page(HTMLParser):
    """The DOM as Chromium had it after the scripts ran: text by element id, tags, attributes."""

    VOID = {"meta", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.texts, self.title = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.ids.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        while self.ids and self.ids.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.ids and self.ids[-1][0] == "title":
            self.title += data
        for _, name in self.ids:
            if name:
                self.texts[name] = self.texts.get(name, "") + data

    def count(self, *classes):
        """Number of elements with all of the given classes."""
        wanted = set(classes)
        return sum(wanted <= set(a.get("class", "").split()) for _, a in self.tags)


def chromium(url, *flags):
    """The DOM of a page after its scripts ran.

    Fails on any message in its console: errors, and what its content policy refused."""
    assert CHROMIUM, "REQUIRE_OPTIONAL is set, and there is no Chromium; apt-get install chromium"
    common = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    quiet = "--disable-background-networking --disable-component-update --disable-sync"
    watch = "--virtual-time-budget=3000 --enable-logging=stderr --dump-dom"
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *common.split(), *quiet.split(), *watch.split(), *flags]
        command += [f"--user-data-dir={profile}", url]
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=180
        )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<html" in done.stdout, done.stderr
    return done.stdout


def opened(out, address=""):
    return Page(chromium(f"file://{out}{address}"))


FRAME = """<!doctype html><body>
<iframe src="ADDRESS" width="360" height="800"></iframe><pre id="result"></pre>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentWindow;
  const $ = (id) => page.document.getElementById(id);
  const key = (key, shiftKey = false) =>
    page.document.body.dispatchEvent(
      new page.KeyboardEvent("keydown", { key, shiftKey, bubbles: true }),
    );
  const choose = (id, value) => {
    $(id).value = value;
    $(id).dispatchEvent(new page.Event("change"));
  };
  const width = () => page.document.documentElement.scrollWidth;
  document.getElementById("result").textContent = JSON.stringify((() => { SCRIPT })());
};
</script>"""


def driven(out, script, address):
    """What a script returns that works on the page as a user does, at a phone's width.

    It runs in a page around the report, which is as it was written."""
    frame = out.with_name("frame.html")
    frame.write_text(FRAME.replace("ADDRESS", out.name + address).replace("SCRIPT", script))
    dom = chromium(f"file://{frame}", "--allow-file-access-from-files")
    return json.loads(Page(dom).texts["result"])


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "srpo": Run(folder / "srpo", policy, steps=3),
        "grpo": Run(folder / "grpo", policy, method="grpo"),
        "2x4": Run(folder / "2x4", policy, split="2x4"),
        "unmasked": Run(folder / "unmasked", policy, mask_prefix=False),
        "response": Run(folder / "response", policy, length="response"),
        "step": Run(folder / "step", policy, length="step"),
        "walk": Run(folder / "walk", policy, method="walk", rounds=4),
        "open": Run(folder / "open", policy, method=open_record),
        "open step": Run(folder / "open_step", policy, method=open_record, length="step"),
    }


# ------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize(
    "name", ["srpo", "grpo", "2x4", "unmasked", "response", "step", "walk", "open", "open step"]
)
def test_weights_are_those_of_the_loss(runs, tmp_path, name):
    run = runs[name]
    _, data = report(tmp_path / "report.html", run.folder)
    weighted = 0
    for step in data["runs"][0]["steps"]:
        rollouts, generated = run.rollouts[step["step"]]
        assert step["n"] == len(rollouts)
        if name != "walk":  # its groups have 4, 5 or 8
            assert len(rollouts) == (24 if "open" in name else 32)
        seen = set()
        for tree in step["trees"]:
            for shown in tree["rollouts"]:
                seen.add(shown["id"])
                rollout = generated[shown["id"]]
                untrained = [0.0] * len(rollout.token_ids)
                weights = run.weights.get(id(rollout), untrained)
                check_weights(shown, rollout, weights, mask_prefix=name != "unmasked")
                weighted += any(weights)
        drawn = {i for i, rollout in enumerate(generated) if rollout.purpose != "value"}
        assert seen == drawn  # each in one tree
    assert weighted


def check_weights(shown, rollout, weights, mask_prefix):
    """Compares what the page has of a rollout with the loss's token weights."""
    assert (shown["k"] is None) == (rollout.group is None)
    assert shown["searched"] == (rollout.group is not None and rollout.searched)
    assert shown["off_policy"] == (rollout.trained_prompt is not None or rollout.searched)
    spans = list(zip([0, *rollout.thought_ends], rollout.thought_ends))
    assert shown["tokens"] == [end - start for start, end in spans]
    sums = [sum(weights[start:end]) for start, end in spans]
    assert shown["weights"] == pytest.approx(sums, rel=1e-5)
    last_tokens = [weights[end - 1] for end in rollout.thought_ends]
    assert shown["token_weights"] == pytest.approx(last_tokens, rel=1e-5)
    masked = rollout.masked(mask_prefix)
    assert shown["masked"] == sum(end <= masked for end in rollout.thought_ends)


def test_what_the_page_knows_of_an_open_record(runs, tmp_path):
    """Whole texts where a response is trained from its beginning; prompts of later turns; and only
    the number of continuations that measure a prefix."""
    _, data = report(tmp_path / "report.html", runs["open"].folder)
    run = data["runs"][0]
    about = "idea.py:open_record: embedded on chain-12; 4 prompts a step; learning rate 0.0005"
    assert run["about"] == about
    for tree in all_trees(run):
        assert tree["unshown"] == {"value": 5}
        by_purpose = {}
        for shown in tree["rollouts"]:
            by_purpose.setdefault(shown["purpose"], []).append(shown)
        (again,) = by_purpose["again"]
        assert (again["k"], again["shared"], again["masked"], again["from"]) == (0, 1, 0, 1)
        assert len(again["thoughts"]) == len(again["tokens"]) and not again["is_reset"]
        assert [r["masked"] for r in by_purpose["base"]] == [0, 1, 0]
        for shown in by_purpose["retry"]:
            assert shown["k"] == 1 and shown["off_policy"]
            assert shown["prompt"].startswith(tree["question"])
        (review,) = by_purpose["review"]
        assert review["k"] is None and review["reward"] is None


def walks_in(run):
    """[(step, tree in the page's order, rollouts of the walk)], followed from its end by the seeds
    of the rollouts themselves. One tree has one walk at most."""
    walks = []
    for step, (_, generated) in run.rollouts.items():
        of_walks = [rollout for rollout in generated if rollout.purpose == "walk"]
        continued = {id(rollout.seed) for rollout in of_walks}
        for end in of_walks:
            if id(end) not in continued:
                chain = [end]
                while chain[0].purpose == "walk":
                    chain.insert(0, chain[0].seed)
                walks.append((step, chain[0].group[0], chain))
    return walks


def test_what_the_page_knows_of_a_walk(runs, tmp_path):
    """Its rounds in order, also where nothing was found; each text once, but for the found one."""
    _, data = report(tmp_path / "report.html", runs["walk"].folder)
    steps = {step["step"]: step["trees"] for step in data["runs"][0]["steps"]}
    walks = walks_in(runs["walk"])
    assert {chain[-1].group is None for _, _, chain in walks} == {True, False}
    for step, slot, chain in walks:
        tree = steps[step][slot]
        assert tree["slot"] == slot and tree["unshown"] == {}
        generated = [id(rollout) for rollout in runs["walk"].rollouts[step][1]]
        assert tree["walks"] == [[generated.index(id(rollout)) for rollout in chain]]
        shown = {r["id"]: r for r in tree["rollouts"]}
        for i, rollout in zip(tree["walks"][0][1:], chain[1:]):
            found = rollout.group is not None
            assert shown[i]["searched"] == (found and rollout.prefix_len > 0)
            assert shown[i]["from"] == (1 if found else rollout.reset)
            assert shown[i]["shared"] == rollout.reset - 1
    n_walks = sum(len(tree["walks"]) for tree in all_trees(data["runs"][0]))
    assert n_walks == len(walks)


def test_a_problem_that_is_twice_in_a_step_is_two_trees(runs, tmp_path):
    run = runs["2x4"]
    copy = tmp_path / "twice"
    shutil.copytree(run.folder, copy)
    write_lines(copy / "rollouts.jsonl", [record | {"problem": 0} for record in run.records()])
    _, twice = report(tmp_path / "report.html", copy)
    _, once = report(tmp_path / "once.html", run.folder)
    assert ids_by_tree(twice) == ids_by_tree(once)


def ids_by_tree(data):
    """Ids of the rollouts that are trained on or were localized, tree by tree."""
    ids = []
    for tree in all_trees(data["runs"][0]):
        named = [r for r in tree["rollouts"] if r["k"] is not None or r["localization"]]
        ids.append([r["id"] for r in named])
    return ids


def test_the_page_goes_to_the_first_run(runs, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(runs["grpo"].folder, copy)
    measures.main(["report", str(copy), str(runs["srpo"].folder)])
    assert f"{copy}/report.html: 2 runs" in capsys.readouterr().out
    assert DATA.search((copy / "report.html").read_text())
    assert not (runs["srpo"].folder / "report.html").exists()


def test_cut_files(runs, tmp_path):
    """A step without a step line, and half a line, are left out."""
    _, whole = report(tmp_path / "whole.html", runs["srpo"].folder)
    torn = tmp_path / "torn"
    shutil.copytree(runs["srpo"].folder, torn)
    last = (torn / "rollouts.jsonl").read_text().splitlines()[-1].replace('"step": 3', '"step": 4')
    with (torn / "rollouts.jsonl").open("a") as file:
        file.write(last + "\n" + last[:100])  # killed while it wrote step 4, which has no step line
    _, cut = report(tmp_path / "cut.html", torn)
    assert cut["runs"][0]["steps"] == whole["runs"][0]["steps"]
    assert len(cut["runs"][0]["steps"]) == 3


def test_missing_rollouts(runs, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(runs["srpo"].folder, bare)
    (bare / "rollouts.jsonl").unlink()
    _, data = report(tmp_path / "none.html", bare, runs["grpo"].folder)
    without, other = data["runs"]
    assert without["steps"] == [] and other["steps"]
    assert len(without["evals"]) == 4
    assert "no rollouts were saved" in data["notes"][0]
    assert data["notes"][0] in capsys.readouterr().out


def test_what_cannot_be_reported(runs, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        report(tmp_path / "bad.html", tmp_path)
    with pytest.raises(UserError, match="--out"):
        report(tmp_path / "missing" / "report.html", runs["grpo"].folder)
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["grpo"].folder, damaged)
    (damaged / "rollouts.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        report(tmp_path / "bad.html", damaged)
    first, *_ = (runs["grpo"].folder / "rollouts.jsonl").read_text().splitlines()
    for damage in ({"answer": None}, {"thoughts": [1] * len(json.loads(first)["thoughts"])}):
        (damaged / "rollouts.jsonl").write_text(json.dumps(json.loads(first) | damage) + "\n")
        with pytest.raises(UserError, match="line 1: "):
            report(tmp_path / "bad.html", damaged)


@pytest.mark.parametrize("part", [0.8, 0.4, 0.15, 0.0])
def test_stays_in_its_size_and_says_what_it_leaves_out(runs, tmp_path, capsys, part):
    folders = [runs["srpo"].folder, runs["2x4"].folder]
    text, whole = report(tmp_path / "whole.html", *folders)
    empty = len(page({"notes": [], "runs": [run | {"steps": []} for run in whole["runs"]]}))
    size = empty + 2000 + part * (len(text) - empty)
    capsys.readouterr()
    text, data = report(tmp_path / "small.html", *folders, megabytes=size / 1e6)
    said = capsys.readouterr().out
    assert len(text) <= size
    assert len(data["notes"]) == 2
    for note in data["notes"]:
        assert note in said
    for run, all_of_it in zip(data["runs"], whole["runs"]):
        trees_of = {step["step"]: step["trees"] for step in all_of_it["steps"]}
        for step in run["steps"]:
            assert all(tree in trees_of[step["step"]] for tree in step["trees"])
        assert bool(run["steps"]) == (part > 0)
        if run["steps"]:
            assert f"{len(run['steps'])} of {len(trees_of)} steps" in run["steps_missing"]
    with pytest.raises(UserError, match="is too little: without any tree .*; allow more"):
        report(tmp_path / "smaller.html", *folders, megabytes=(empty + 1000) / 1e6)


def test_the_colours_of_advantages_are_those_of_the_pictures():
    template = Path(measures.__file__).with_name("data") / "report.html"
    colours = f"--positive: {curves.POSITIVE}; --negative: {curves.NEGATIVE};"
    assert template.read_text().count(colours) == 1


# ------------------------------------------------------------------------------------ the page


@in_browser
@pytest.mark.parametrize(
    "address, run, step, slot",
    [
        ("#run=1&step=2&problem=3", 0, 2, 2),
        ("#run=2&step=1&problem=1", 1, 1, 0),
        ("#run=3&step=2&problem=4", 2, 2, 3),
    ],
)
def test_draws_the_tree_that_the_address_names(runs, tmp_path, address, run, step, slot):
    out = tmp_path / "report.html"
    _, data = report(out, *(one.folder for one in runs.values()))
    page = opened(out, address)
    tree = data["runs"][run]["steps"][step - 1]["trees"][slot]
    text = page.texts["tree"]
    assert tree["question"] in text
    assert f"Step {step} trains on N = 32 rollouts" in text
    rows = [r for r in tree["rollouts"] if r["purpose"] != "localization"]
    for r in rows:
        check_texts(r, text)
    check_groups(rows, text)
    check_colours(rows, page)
    suffixes = [r for r in rows if r["k"]]
    assert page.count("branch") == len(suffixes)
    assert sum(tag == "path" for tag, _ in page.tags) > 8  # the charts


def check_texts(r, text):
    """The thoughts of a rollout are in the page, with three digits of their weights."""
    for thought in r["thoughts"]:
        assert thought in text
    first = r["from"] - 1
    for weight, tokens in zip(r["weights"][first:], r["tokens"][first:]):
        if weight:
            words = re.findall(rf"weight (\S+), {tokens} tokens? at", text)
            numbers = [float(word.replace("−", "-")) for word in words]
            assert any(number == pytest.approx(weight, rel=0.006) for number in numbers)


def check_groups(rows, text):
    """Every reset has a title, and every group without variance says so."""
    groups = {}
    for r in rows:
        if r["k"] is not None:
            groups.setdefault(r["k"], []).append(any(r["token_weights"]))
    flat = [k for k, weighted in groups.items() if not any(weighted)]
    assert text.count("no variance") == len(flat)
    for k in (1, 2):
        assert (f"Reset {k}" in text) == (k in groups)


def check_colours(rows, page):
    """A cell has a colour where its thought has a weight."""
    by_id = {r["id"]: r for r in rows}
    seeds = {r["seed"] for r in rows if r["is_reset"]}
    drawn = rows + [by_id[seed] for seed in seeds]  # a seed is drawn above its fork, too
    in_scale = 2 if any(any(r["token_weights"]) for r in rows) else 0
    for sign, kind in ((1, "pos"), (-1, "neg")):
        cells = 0
        for r in drawn:
            cells += sum(sign * weight > 0 for weight in r["token_weights"][r["from"] - 1 :])
        assert page.count("cell", kind) == in_scale + cells


@in_browser
def test_draws_each_thought_in_its_own_colour(runs, tmp_path):
    out = tmp_path / "report.html"
    _, data = report(out, runs["open"].folder)
    page = opened(out, "#run=1&step=1&problem=2")
    tree = data["runs"][0]["steps"][0]["trees"][1]
    text = page.texts["tree"]
    rows = [r for r in tree["rollouts"] if r["k"] is not None]
    check_colours(rows, page)
    for r in rows:
        check_texts(r, text)
    masked = [r for r in rows if r["masked"]]
    assert len(masked) == 1
    assert page.count("cell", "masked") == 1 + len(masked)  # one is in the legend
    assert page.count("cell", "shared") == 1 + 1
    assert "Sampled after thought 1 of base rollout 1, and trained from its beginning." in text
    assert "Trained from thought 2 on." in text
    assert text.count("Off-policy: sampled from another prompt than it is trained under.") == 2
    assert text.count("Off-policy: its prefix was searched for.") == 1
    assert "The prompt that it was sampled from" in text
    assert "an advantage for each thought" in text
    assert re.search(r"A −\S+ to \+\S+", text)
    for title in ("Base group", "Group 1: retry", "Drawn, and trained on by nobody"):
        assert title in text
    assert "Reset 1" not in text
    assert '5 continuations for "value" that nobody trained on are not shown.' in text
    assert page.texts["subtitle"] == data["runs"][0]["about"]


WALK = """
  const row = (node) => ({
    name: node.querySelector(".name").textContent,
    meta: node.querySelector(".meta").textContent,
    kept: node.querySelectorAll(".cell.kept").length,
    shared: node.querySelectorAll(".cell.shared").length,
    cells: node.querySelectorAll(".cell").length,
    located: [...node.querySelectorAll(".cell.located")].map((cell) => +cell.textContent),
    wrong: [...node.querySelectorAll(".cell.wrong")].map((cell) => +cell.textContent),
    coloured: node.querySelectorAll(".cell.pos").length,
  });
  return ADDRESSES.map((address) => {
    page.location.hash = address;
    page.dispatchEvent(new page.HashChangeEvent("hashchange"));
    const sections = [...$("tree").querySelectorAll("section")];
    const walk = sections.find((s) => s.querySelector("h3").textContent.startsWith("Walk"));
    return {
      address: page.location.hash,
      titles: sections.map((s) => s.querySelector("h3").textContent),
      group: sections[0].textContent,
      walk: walk.textContent,
      rows: [...walk.querySelectorAll("details.row")].map(row),
      charts: $("metrics").textContent,
      width: width(),
    };
  });
"""


def of_two_rounds(walks, found):
    """The first walk of two rounds or more that keep something, and found a success or not."""
    for walk in walks:
        chain = walk[-1]
        if (chain[-1].group is not None) == found and len(chain) > 2 and chain[-1].prefix_len:
            return walk


@in_browser
def test_draws_a_walk_round_by_round(runs, tmp_path):
    """Each row shows what it keeps, where it is reset next, and its true first wrong thought."""
    out = tmp_path / "report.html"
    run = runs["walk"]
    report(out, run.folder)
    walks = [of_two_rounds(walks_in(run), found) for found in (True, False)]
    addresses = [f"#run=1&step={step}&problem={slot + 1}" for step, slot, _ in walks]
    pages = driven(out, WALK.replace("ADDRESSES", json.dumps(addresses)), addresses[0])
    records = {(record["step"], record["id"]): record for record in run.records()}
    for (step, _, chain), address, shown in zip(walks, addresses, pages):
        assert shown["address"] == address and shown["width"] <= 360
        assert "Walks, by how they ended" in shown["charts"]
        assert "Rounds of a walk, on average" in shown["charts"]
        check_words(chain, shown)
        assert len(shown["rows"]) == len(chain)
        generated = [id(rollout) for rollout in run.rollouts[step][1]]
        for i, (rollout, row) in enumerate(zip(chain, shown["rows"])):
            truth = records[step, generated.index(id(rollout))]["first_wrong"]
            assert row["wrong"] == ([truth] if truth else [])
            assert row["located"] == [after.reset for after in chain[i + 1 : i + 2]]
            assert row["cells"] == len(rollout.thought_ends)
            assert row["shared"] == (rollout.reset - 1 if i else 0)
            if i:
                found = rollout.group is not None
                assert row["name"] == f"round {i}"
                assert row["kept"] == (0 if found else rollout.reset - 1)
                assert row["coloured"] == (len(rollout.thought_ends) if found else 0)


def check_words(chain, shown):
    """The title and the text say how the walk ended."""
    rounds = len(chain) - 1
    if chain[-1].group is None:
        assert shown["titles"] == ["Base group", f"Walk: nothing found in {rounds} rounds"]
        assert "none joined the group, and nobody trains on them" in shown["walk"]
        assert "no variance" in shown["group"]
    else:
        assert shown["titles"] == ["Base group", f"Walk: found after {rounds} rounds"]
        joined = f"round {rounds} joined the base group, and is trained as a whole."
        assert f"{joined} It is off-policy: its prefix was searched for." in shown["walk"]
        assert f"one was found after {rounds} rounds" in shown["group"]
        assert "no variance" not in shown["group"]


USER = """
  const seen = [];
  const look = () => {
    const resets = $("tree").textContent.includes("Reset 1");
    seen.push({ hash: page.location.hash, resets });
  };
  look();
  $("problem-on").click(); look();
  key("ArrowRight"); look();
  key("ArrowRight"); key("ArrowRight"); key("ArrowRight"); look();
  key("ArrowLeft"); key("ArrowRight", true); look();
  $("step-back").click(); look();
  choose("run", 1); look();
  $("signal").click();
  const signal = $("tree").querySelectorAll(".cell.pos").length;
  choose("problem", 1); look();
  return { seen, signal, run: $("run-metrics").value, width: width() };
"""


@in_browser
def test_buttons_keys_and_selects_change_the_tree_and_the_page_fits_a_phone(runs, tmp_path):
    out = tmp_path / "report.html"
    report(out, runs["srpo"].folder, runs["grpo"].folder)
    state = driven(out, USER, "#run=1&step=2&problem=1")
    hashes = [seen["hash"] for seen in state["seen"]]
    places = [(2, 1), (2, 2), (2, 3), (2, 4), (3, 3), (2, 3)]
    assert hashes[:6] == [f"#run=1&step={step}&problem={problem}" for step, problem in places]
    assert hashes[6].startswith("#run=2&step=2&")
    assert hashes[7].startswith("#run=2&step=") and hashes[7].endswith("&problem=2")
    assert state["signal"] > 0 and state["run"] == "1" and state["width"] <= 360
    assert [seen["resets"] for seen in state["seen"][6:]] == [False, False]  # grpo has none


@pytest.fixture
def hostile(runs, tmp_path):
    """A copy of a run in which everything that a model or a data set writes is an attack."""
    folder = tmp_path / "<_script><img src=x>"
    shutil.copytree(runs["srpo"].folder, folder)
    records = runs["srpo"].records()
    for i, record in enumerate(records):
        n = len(record["thoughts"])
        record["thoughts"] = [HOSTILE[(i + h) % len(HOSTILE)] for h in range(n)]
        record |= {"question": " ".join(HOSTILE), "answer": HOSTILE[1], "finish": HOSTILE[1]}
        record["localized"] = record["localized"] and HOSTILE[0]
    records[0]["thoughts"][0] = "x" * 1999 + "\U0001f600" + "<b>" * 33_000 + "the end"
    write_lines(folder / "rollouts.jsonl", records)
    lines = read_lines(folder / "metrics.jsonl")
    lines[1]["counters"] = {HOSTILE[1]: 3, "__proto__": 1}
    lines[1] |= {"finish": {"</script>": 1}, "entropy": float("nan")}
    write_lines(folder / "metrics.jsonl", lines)
    return folder


UNFOLD = """
  const before = $("tree").textContent.length;
  page.document.querySelector(".text button").click();
  const after = $("tree").textContent.length;
  const ends = $("tree").textContent.includes("the end");
  return { title: page.document.title, before, after, ends, width: width() };
"""


@in_browser
def test_what_a_model_writes_is_text(runs, hostile, tmp_path):
    out = tmp_path / "report.html"
    text, _ = report(out, hostile)
    assert re.search(
        r"default-src 'none'; style-src 'sha256-[^']+'; script-src 'sha256-[^']+'; "
        r"base-uri 'none'; form-action 'none'\"",
        text,
    )
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text
    first = "#run=1&step=1&problem=1"
    page = opened(out, first)
    assert page.title == f"SRPO report: {name_of(read_run(hostile))}, seed 0"
    made = [tag for tag, _ in page.tags]
    assert "img" not in made and made.count("script") == 2 and made.count("b") < 100
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    for expected in SHOWN:
        assert expected in page.texts["tree"], expected
    assert "show all (101,008 characters)" in page.texts["tree"]
    assert "the end" not in page.texts["tree"]
    assert HOSTILE[1] in page.texts["metrics"]
    unfolded = driven(out, UNFOLD, first)
    assert unfolded["title"] == page.title
    assert unfolded["after"] > unfolded["before"] + 90_000
    assert unfolded["ends"] and unfolded["width"] <= 360


@in_browser
def test_runs_without_rollouts_have_curves(runs, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(runs["srpo"].folder, bare, ignore=shutil.ignore_patterns("rollouts.jsonl"))
    out = tmp_path / "report.html"
    report(out, bare)
    page = opened(out)
    assert "no rollouts were saved" in page.texts["notes"]
    assert "0.550" in page.texts["table"]
    assert "Pass rate in training" in page.texts["metrics"]
    assert page.texts["tree"] == "No trees to show."
