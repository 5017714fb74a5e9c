"""The HTML report: its weights are the loss's, it keeps to its size, and in a real headless Chromium it draws what it should and runs nothing
that a model wrote. Without Chromium the tests of the page are skipped (`apt-get install chromium`; CHROMIUM names another one)."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

import eval as measures
import srpo
from data.faults import UserError
from data.report import page
from data.runs import append
from loss import set_advantages, token_weights
from rollout import PROGRAMS, run_programs

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


class Run:
    """A run directory, written by srpo.py's own functions from real rollouts of the embedded policy."""

    def __init__(
        self,
        folder,
        policy,
        steps=2,
        problems=4,
        method="srpo",
        base=4,
        prefixes=1,
        suffixes=4,
        **changed,
    ):
        self.folder, self.rollouts = folder, {}
        folder.mkdir()
        cfg = srpo.Config(
            method=method,
            base=base,
            prefixes=prefixes,
            suffixes=suffixes,
            prompts_per_step=problems,
            **changed,
        ).resolve()
        (folder / "config.json").write_text(json.dumps(asdict(cfg)))
        append(folder / "metrics.jsonl", {"step": 0, "total_tokens": 0, "eval_pass_rate": 0.25})
        total = 0
        for step in range(1, steps + 1):
            tasks = policy.tasks(
                4,
                problems,
                "self",
                seed=step,
                base=base,
                prefixes=prefixes,
                suffixes=suffixes,
                **changed,
            )
            sampled = run_programs([PROGRAMS[method](task) for task in tasks], policy.engine)
            buffers, generated, seconds = sampled.results, sampled.generated, sampled.seconds
            rollouts = [r for buffer in buffers for r in buffer]
            set_advantages(rollouts)
            srpo.write_rollouts(folder / "rollouts.jsonl", step, rollouts, generated, tasks)
            total += sum(r.generated for r in generated)
            line = {
                "step": step,
                "total_tokens": total,
                **srpo.step_metrics(rollouts, generated, tasks),
                "trained_tokens": 1,
                "entropy": None,
                "seconds": dict(seconds),
            }
            append(
                folder / "metrics.jsonl",
                line | {"counters": {}, "eval_pass_rate": 0.25 + step / 10},
            )
            self.rollouts[step] = (rollouts, generated)

    def records(self):
        return [
            json.loads(line) for line in (self.folder / "rollouts.jsonl").read_text().splitlines()
        ]

    def write(self, records):
        (self.folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def report(out, *folders, megabytes="20"):
    """Runs the command; (text of the page, the data in it)."""
    measures.main(["report", *map(str, folders), "--out", str(out), "--megabytes", str(megabytes)])
    text = out.read_text(encoding="ascii")
    return text, json.loads(DATA.search(text)[1])


class Page(HTMLParser):
    """The DOM as Chromium had it after the scripts ran: text by element id, tags, attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.texts, self.title = [], [], {}, ""
        self.feed(text)

    VOID = {"meta", "br", "img"}

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


def chromium(url, *flags):
    """The DOM of a page after its scripts ran. Fails on any message in its console: errors, and what its content policy refused."""
    assert CHROMIUM, "REQUIRE_OPTIONAL is set, and there is no Chromium; apt-get install chromium"
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync", "--virtual-time-budget=3000", "--enable-logging=stderr"]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *common, *flags, "--dump-dom", url],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=180,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<html" in done.stdout, done.stderr
    return done.stdout


def opened(out, address=""):
    return Page(chromium(f"file://{out}{address}"))


def driven(out, script, width=360, address=""):
    """What a script returns that works on the page as a user does, from a page around it: the report itself is as it was written."""
    frame = out.with_name("frame.html")
    frame.write_text(f"""<!doctype html><body><iframe src="{out.name}{address}" width="{width}" height="800"></iframe><pre id="result"></pre><script>
        onload = () => {{ const page = document.querySelector("iframe").contentWindow, $ = (id) => page.document.getElementById(id);
          const key = (key, shiftKey = false) => page.document.body.dispatchEvent(new page.KeyboardEvent("keydown", {{ key, shiftKey, bubbles: true }}));
          document.getElementById("result").textContent = JSON.stringify((() => {{ {script} }})()); }}</script>""")
    return json.loads(
        Page(chromium(f"file://{frame}", "--allow-file-access-from-files")).texts["result"]
    )


@pytest.fixture(scope="module")
def runs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "srpo": Run(folder / "srpo", policy, steps=3),
        "grpo": Run(folder / "grpo", policy, method="grpo", base=8, prefixes=0, suffixes=0),
        "2x4": Run(folder / "2x4", policy, base=0, prefixes=2),
        "unmasked": Run(folder / "unmasked", policy, mask_prefix=False),
    }


# ------------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("name", ["srpo", "grpo", "2x4", "unmasked"])
def test_weights_are_those_of_the_loss(runs, tmp_path, name):
    run = runs[name]
    _, data = report(tmp_path / "report.html", run.folder)
    seen = 0
    for step in data["runs"][0]["steps"]:
        rollouts, generated = run.rollouts[step["step"]]
        assert step["n"] == len(rollouts) == 32
        for shown in (r for tree in step["trees"] for r in tree["rollouts"]):
            r = generated[shown["id"]]
            assert (shown["k"] is None) == (r.group is None) and shown["tokens"] == [
                b - a for a, b in zip([0, *r.thought_ends], r.thought_ends)
            ]
            tokens = (
                token_weights(r, len(rollouts), mask_prefix=name != "unmasked")
                if r.group
                else [0.0] * len(r.token_ids)
            )
            sums = [sum(tokens[a:b]) for a, b in zip([0, *r.thought_ends], r.thought_ends)]
            assert shown["weights"] == pytest.approx(sums, rel=1e-5) and shown[
                "token_weight"
            ] == pytest.approx(tokens[-1], rel=1e-5)
            assert shown["masked"] == (
                sum(end <= r.prefix_len for end in r.thought_ends) if name != "unmasked" else 0
            )
            seen += any(tokens)
        assert {r["id"] for tree in step["trees"] for r in tree["rollouts"]} == set(
            range(len(generated))
        )  # each in one tree
    assert seen


def test_a_problem_that_is_twice_in_a_step_is_two_trees(runs, tmp_path):
    run = runs["2x4"]
    copy = tmp_path / "twice"
    shutil.copytree(run.folder, copy)
    (copy / "rollouts.jsonl").write_text(
        "".join(json.dumps(r | {"problem": 0}) + "\n" for r in run.records())
    )
    _, data = report(tmp_path / "report.html", copy)
    _, once = report(tmp_path / "once.html", run.folder)
    ids = lambda data: [
        [r["id"] for r in tree["rollouts"] if r["k"] is not None or r["localization"]]
        for s in data["runs"][0]["steps"]
        for tree in s["trees"]
    ]  # noqa: E731
    assert ids(data) == ids(once)


def test_cut_files_missing_rollouts_and_what_is_no_run(runs, tmp_path, capsys):
    _, whole = report(tmp_path / "whole.html", runs["srpo"].folder)
    torn = tmp_path / "torn"
    shutil.copytree(runs["srpo"].folder, torn)
    last = (torn / "rollouts.jsonl").read_text().splitlines()[-1].replace('"step": 3', '"step": 4')
    with (torn / "rollouts.jsonl").open("a") as file:
        file.write(last + "\n" + last[:100])  # killed while it wrote step 4, which has no step line
    _, cut = report(tmp_path / "cut.html", torn)
    assert (
        cut["runs"][0]["steps"] == whole["runs"][0]["steps"] and len(cut["runs"][0]["steps"]) == 3
    )
    (torn / "rollouts.jsonl").unlink()
    capsys.readouterr()
    _, none = report(tmp_path / "none.html", torn, runs["grpo"].folder)
    assert (
        none["runs"][0]["steps"] == []
        and none["runs"][1]["steps"]
        and len(none["runs"][0]["evals"]) == 4
    )
    assert (
        "no rollouts were saved" in none["notes"][0] and none["notes"][0] in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="not a run directory"):
        report(tmp_path / "bad.html", tmp_path)
    with pytest.raises(UserError, match="--out"):
        report(tmp_path / "missing" / "report.html", runs["grpo"].folder)
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["grpo"].folder, damaged)
    (damaged / "rollouts.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
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
    assert (
        len(text) <= size
        and len(data["notes"]) == 2
        and all(note in said for note in data["notes"])
    )
    for run, all_of_it in zip(data["runs"], whole["runs"]):
        steps = {s["step"]: s["trees"] for s in all_of_it["steps"]}
        assert all(tree in steps[s["step"]] for s in run["steps"] for tree in s["trees"])
        assert bool(run["steps"]) == (part > 0)
        if run["steps"]:
            assert f"{len(run['steps'])} of {len(steps)} steps" in run["steps_missing"]


# -------------------------------------------------------------------------------------------------------------------- the page


@in_browser
def test_draws_the_tree_that_the_address_names(runs, tmp_path):
    out = tmp_path / "report.html"
    _, data = report(out, *(run.folder for run in runs.values()))
    for address, run, step, slot in (
        ("#run=1&step=2&problem=3", 0, 2, 2),
        ("#run=2&step=1&problem=1", 1, 1, 0),
        ("#run=3&step=2&problem=4", 2, 2, 3),
    ):
        page = opened(out, address)
        tree = data["runs"][run]["steps"][step - 1]["trees"][slot]
        text = page.texts["tree"]
        assert tree["question"] in text and f"Step {step} trains on N = 32 rollouts" in text
        rows = [r for r in tree["rollouts"] if r["purpose"] != "localization"]
        for r in rows:
            assert all(thought in text for thought in r["thoughts"])
            for weight, tokens in zip(r["weights"][r["from"] - 1 :], r["tokens"][r["from"] - 1 :]):
                if weight:  # three digits of the weights
                    words = re.findall(rf"weight (\S+), {tokens} tokens? at", text)
                    assert any(
                        float(word.replace("−", "-")) == pytest.approx(weight, rel=0.006)
                        for word in words
                    )
        assert page.texts["tree"].count("no variance") == sum(
            all(r["advantage"] == 0 for r in rows if r["k"] == k)
            for k in {r["k"] for r in rows} - {None}
        )
        drawn = rows + [
            next(r for r in rows if r["id"] == i) for i in {r["seed"] for r in rows} - {None}
        ]  # a seed is drawn above its fork, too
        for sign, kind in ((1, "pos"), (-1, "neg")):
            colored = sum({"cell", kind} <= set(a.get("class", "").split()) for _, a in page.tags)
            assert colored == 2 * any(r["advantage"] for r in rows) + sum(
                len(r["thoughts"]) for r in drawn if sign * r["token_weight"] > 0
            )  # 2: the scale
        resets = {r["k"] for r in rows if r["k"]}
        assert [f"Reset {k}" in text for k in (1, 2)] == [k in resets for k in (1, 2)]
        assert (sum("branch" in a.get("class", "") for _, a in page.tags)) == sum(
            r["k"] is not None and r["k"] > 0 for r in rows
        )
        assert sum(tag == "path" for tag, _ in page.tags) > 8  # the charts


@in_browser
def test_buttons_keys_and_selects_change_the_tree_and_the_page_fits_a_phone(runs, tmp_path):
    out = tmp_path / "report.html"
    report(out, runs["srpo"].folder, runs["grpo"].folder)
    states = driven(out, """
        const seen = [], look = () => seen.push(page.location.hash + " " + $("tree").textContent.includes("Reset 1") + " " + $("metrics").children.length);
        look();
        $("problem-on").click(); look();
        key("ArrowRight"); look(); key("ArrowRight"); key("ArrowRight"); key("ArrowRight"); look();
        key("ArrowLeft"); key("ArrowRight", true); look();
        $("step-back").click(); look();
        $("run").value = 1; $("run").dispatchEvent(new page.Event("change")); look();
        $("signal").click();
        const signal = $("tree").querySelectorAll(".cell.pos").length;
        $("problem").value = 1; $("problem").dispatchEvent(new page.Event("change")); look();
        return { seen, signal, run: $("run-metrics").value, width: page.document.documentElement.scrollWidth };
    """, address="#run=1&step=2&problem=1")  # fmt: skip
    hashes = [seen.split()[0] for seen in states["seen"]]
    assert hashes[:6] == [
        f"#run=1&step={step}&problem={problem}"
        for step, problem in ((2, 1), (2, 2), (2, 3), (2, 4), (3, 3), (2, 3))
    ]
    assert (
        hashes[6].startswith("#run=2&step=2&")
        and hashes[7].startswith("#run=2&step=")
        and hashes[7].endswith("&problem=2")
    )
    assert states["signal"] > 0 and states["run"] == "1" and states["width"] <= 360
    assert [seen.split()[1] for seen in states["seen"][-2:]] == [
        "false",
        "false",
    ]  # grpo has no resets


@in_browser
def test_what_a_model_writes_is_text(runs, tmp_path):
    run = tmp_path / "</script><img src=x>".replace("/", "_")
    shutil.copytree(runs["srpo"].folder, run)
    records = runs["srpo"].records()
    for i, r in enumerate(records):
        r["thoughts"] = [f"{HOSTILE[(i + h) % len(HOSTILE)]}" for h in range(len(r["thoughts"]))]
        r |= {"question": " ".join(HOSTILE), "answer": HOSTILE[1], "finish": HOSTILE[1]}
        r["localized"] = r["localized"] and HOSTILE[0]
    records[0]["thoughts"][0] = "x" * 1999 + "\U0001f600" + "<b>" * 33_000 + "the end"
    (run / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {
        "counters": {HOSTILE[1]: 3, "__proto__": 1},
        "finish": {"</script>": 1},
        "entropy": float("nan"),
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "report.html"
    text, _ = report(out, run)
    assert re.search(
        r"default-src 'none'; style-src 'sha256-[^']+'; script-src 'sha256-[^']+'; base-uri 'none'; form-action 'none'\"",
        text,
    )
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<img" not in text
    page = opened(out, "#run=1&step=1&problem=1")
    assert page.title == "SRPO report: srpo 1x4, seed 0"
    made = [tag for tag, _ in page.tags]
    assert (
        "img" not in made
        and made.count("script") == 2
        and made.count("b") < 100
        and not [a for _, a in page.tags for name in a if name.startswith("on")]
    )
    shown = page.texts["tree"]
    for text in (
        HOSTILE[:3]
        + HOSTILE[6:]
        + [
            "half U+D800 pair U+DC00",
            "back U+202E drawrof U+2066 isolated",
            "U+001B[31mredU+001B[0m U+0000 U+009B",
        ]
    ):
        assert text in shown, text
    assert "show all (101,008 characters)" in shown and "the end" not in shown
    assert HOSTILE[1] in page.texts["metrics"]
    whole = driven(out, """
        const before = $("tree").textContent.length;
        [...page.document.querySelectorAll(".text button")][0].click();
        return [page.document.title, before, $("tree").textContent.length, $("tree").textContent.includes("the end"), page.document.documentElement.scrollWidth];
    """, address="#run=1&step=1&problem=1")  # fmt: skip
    assert whole[0] == page.title and whole[2] > whole[1] + 90_000 and whole[3] and whole[4] <= 360


@in_browser
def test_runs_without_rollouts_have_curves(runs, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(runs["srpo"].folder, bare, ignore=shutil.ignore_patterns("rollouts.jsonl"))
    out = tmp_path / "report.html"
    report(out, bare)
    page = opened(out)
    assert (
        "no rollouts were saved" in page.texts["notes"]
        and "0.550" in page.texts["table"]
        and "Pass rate in training" in page.texts["metrics"]
    )
    assert page.texts["tree"] == "No trees to show."
