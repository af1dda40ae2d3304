"""The completion report of a run, and runs side by side: Markdown and one self-contained page, from recorded facts.

    python -m wmtp.report FOLDER [FOLDER …] --out DIR [--notes FILE]

FOLDER is a record (logs/RUN of a node, or the bucket's copy). One gives ``report.md``, ``report.html``; several give
``compare.md``, ``compare.html``. The Markdown's pictures lie in ``plots/``. What nobody recorded is "not recorded".
Standard output: the page's path. Exit codes: 0 done, 2 no record there, 10 can't be written.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from wmtp import plots, vitals
from wmtp.config import flat
from wmtp.ledger import MEANING, Ledger, bytes_from_bucket, ledger_of, price_of
from wmtp.record import lines, read_json
from wmtp.runfile import EGRESS_PER_GB

NONE = "not recorded"
STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;margin:0 auto;padding:16px;max-width:1360px}
h1{font-size:1.45em;margin:.2em 0}h2{font-size:1.15em;margin:1.6em 0 .5em;border-bottom:1px solid #ccc}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:3px 10px 3px 0;
border-bottom:1px solid #eee;overflow-wrap:anywhere}td:first-child,th:first-child{min-width:7.5em}
td.source{color:#666;font-size:.85em;min-width:8.5em}.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px;margin-top:12px}
figure{margin:0}figure.wide{grid-column:1/-1;max-width:1056px}
figure svg,figure img{width:100%;height:auto;display:block}.scroll{overflow-x:auto}
.ok{color:#00664b;font-weight:600}.bad{color:#a33300;font-weight:600}.lead{font-size:1.1em}
pre{background:#f6f6f6;padding:10px;overflow-x:auto;white-space:pre-wrap}
@media(max-width:640px){td.source,th.source{display:none}body{padding:10px}}
@media print{h2{break-after:avoid}figure{break-inside:avoid}}
"""


@dataclass
class Section:
    """A heading with rows (what, value, source), pictures (name, SVG or data address), and free text."""

    title: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    heads: tuple[str, str, str] = ("what", "value", "source")
    figures: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""
    code: str = ""


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return NONE
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    if value < 5400:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.2f} h"


def figure(value: Any, form: str = "{}") -> str:
    return NONE if value in (None, "", []) else form.format(value)


def image_of(facts: dict[str, Any]) -> str:
    return "none: it ran on this machine itself" if facts.get("launcher") == "local" else figure(facts.get("image"))


def moment(at: float | None) -> str:
    return NONE if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


class Run:
    """A record, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts, self.exit = read_json(folder / "facts.json"), read_json(folder / "exit.json")
        self.failure = read_json(folder / "failure.json")
        self.vocab = read_json(folder / "vocab.json")
        self.steps, self.evals = lines(folder / "steps.jsonl"), lines(folder / "evals.jsonl")
        self.node, self.phases = lines(folder / "node.jsonl"), lines(folder / "phases.jsonl")
        self.sync = lines(folder / "sync.jsonl")
        self.ledger: Ledger = ledger_of(folder)
        self.price, self.moved = price_of(folder), bytes_from_bucket(folder)
        self.name = self.facts.get("run") or folder.name

    @property
    def state(self) -> str:
        """completed, failed, stopped (it can go on), running or killed."""
        parts = self.ledger.parts
        if not parts:
            return NONE
        if parts[-1].alive:
            return "running" if time.time() - parts[-1].ended < 300 else "killed"
        return {0: "completed", 75: "stopped", None: "killed"}.get(parts[-1].code, "failed")

    @property
    def not_finite(self) -> int:
        """Steps from which nothing was taken."""
        return int(self.steps[-1].get("not_finite") or 0) if self.steps else 0

    @property
    def trained(self) -> int:
        """Steps that changed the model."""
        return len(self.steps) - self.not_finite

    @property
    def left_out(self) -> str:
        return f", {self.not_finite} were left out: not finite" if self.not_finite else ""

    def phase(self, name: str) -> float | None:
        """Seconds of a phase over all parts; None where none has it."""
        found = [p["ended"] - p["began"] for p in self.phases if p.get("phase") == name]
        return sum(found) if found else None

    def median(self, key: str) -> float | None:
        """Over the steps, the first left out: it compiles and allocates."""
        found = [s[key] for s in self.steps[1:] if s.get(key) is not None]
        return statistics.median(found) if found else None

    def until_step(self, number: int) -> float | None:
        """Seconds from the run's first start to the end of step ``number``, or of the last where there are fewer."""
        found = [s["at"] for s in self.steps if "at" in s and s["step"] <= number]
        if not found or not self.ledger.parts:
            return None
        at, parts = max(found), self.ledger.parts
        # Between two parts nothing was paid for, and nobody waited.
        pauses = sum(max(b.began - a.ended, 0) for a, b in pairwise(parts) if b.began < at)
        return at - parts[0].began - pauses

    def held_out(self) -> tuple[list[float], list[float]]:
        """Per head, before and after; empty where nothing was held out."""
        return (self.evals[0]["ce"], self.evals[-1]["ce"]) if len(self.evals) > 1 else ([], [])


def heads(values: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values) if values else NONE


def learned(run: Run) -> str:
    before, after = run.held_out()
    if not before:
        return NONE
    a, b = statistics.mean(before), statistics.mean(after)
    return f"{a:.3f} -> {b:.3f} nats per token ({'lower' if b < a else 'not lower'})"


def cost_rows(run: Run) -> list[tuple[str, str, str]]:
    cost = run.ledger.cost(run.price)
    gb = None if run.moved is None else run.moved / 1e9
    return [
        ("seconds paid for", f"{seconds(run.ledger.total)} in {len(run.ledger.parts)} part(s)", "parts.jsonl"),
        (
            "price",
            figure(run.price, "${:.2f} an hour") if run.price is not None else "not set (launcher.price_per_hour)",
            "facts.json",
        ),
        (
            "cost",
            figure(cost, "${:.2f}") if cost is not None else "not known without a price",
            "parts.jsonl, facts.json",
        ),
        (
            "left the bucket",
            figure(gb, "{:.3f} GB") + (f" (about ${gb * EGRESS_PER_GB:.2f} by AWS's list price)" if gb else ""),
            "sync.jsonl",
        ),
        (
            "goodput",
            figure(
                run.ledger.goodput and 100 * run.ledger.goodput, "{:.1f} % of these seconds trained steps that count"
            ),
            "parts.jsonl, steps.jsonl",
        ),
    ]


def survived(run: Run) -> list[tuple[str, str, str]]:
    """What went wrong, and what became of it."""
    rows = []
    for n, part in enumerate(run.ledger.parts, 1):
        if part.code != 0 and not part.alive:
            word = "was killed" if part.code is None else f"ended with {part.code}"
            after = "went on in the next" if n < len(run.ledger.parts) else "the last"
            rows.append((f"part {n}", f"{word} after {seconds(part.ended - part.began)}; {after}", "parts.jsonl"))
    if run.ledger.redone:
        rows.append(
            (
                "trained again",
                f"{run.ledger.redone} steps, {seconds(run.ledger.seconds.get('redone', 0.0))}",
                "redone.jsonl",
            )
        )
    if run.not_finite:
        rows.append(("left out", f"{run.not_finite} steps that were not finite", "steps.jsonl"))
    if (change := learned(run)).endswith("(not lower)"):
        rows.append(
            ("held-out loss", f"{change}: what was not trained on is predicted no better than before", "evals.jsonl")
        )
    rows += [("warning", text, "steps.jsonl") for text in vitals.warnings(vitals.read("", record=run.folder))]
    log = run.folder / "log.txt"
    told = [
        t
        for t in (log.read_text(errors="replace").splitlines() if log.is_file() else [])
        if (" warn  " in t or " FAIL  " in t) and "ended with 75 after" not in t  # so older images told what was saved
    ]
    for text in list(dict.fromkeys(told))[-12:]:
        stage, _, rest = text.partition(" ")
        rows.append((stage, " ".join(rest.split()), "log.txt"))
    return rows or [("nothing", "no warning, no failure, one part", "parts.jsonl, log.txt")]


def plan_rows(run: Run) -> list[tuple[str, str, str]]:
    """The plan's success table: criterion, its bar, what was measured with its state."""
    moved, took = (run.moved or 0) / 1e9, run.phase("sync")
    most = max((p["ended"] - p["began"] for p in run.phases if p.get("phase") == "sync"), default=0.0)
    ten = run.until_step(10)
    world = run.facts.get("world")
    sharding = run.facts.get("config", {}).get("devices", {}).get("fsdp", {}).get("enabled")

    def state(known: Any, fine: bool | None, value: str) -> str:
        """``fine``: None where only a production run can reach the bar."""
        verdict = "not checked: the bar is a production run's" if fine is None else "ok" if fine else "missed"
        return NONE if not known else f"{value} — {verdict}"

    small = run.facts.get("env") != "production"
    rate = f", {moved * 1000 / took:.0f} MB/s of the whole stage" if took and moved else ""
    where, tracked = run.facts.get("mlflow", {}).get("uri", NONE), run.facts.get("mlflow_run_id")
    each = f", {seconds(most)} at most at a time" if took and most < took else ""
    fetched = f"{NONE if run.moved is None else f'{moved:.2f} GB'} in {seconds(took)}{rate}{each}"
    ranks = f"{world} ranks on {run.facts.get('device')}, FSDP {'on' if sharding else 'off'}"
    trained = f"{run.trained} of {run.facts.get('total_steps')} steps{run.left_out}"
    begun = f"{seconds(ten)} from the node's start to step {min(10, len(run.steps))}"
    aligned = "settings resolved, models found, folders writable"
    return [
        ("path alignment", "everything under /app (here: WMTP_APP_ROOT)", state(run.facts, True, aligned)),
        ("model download", "about 5 min for 63 GB", state(took is not None, None if small else most <= 330, fetched)),
        ("distributed start", "4 GPUs, FSDP", state(world, None if small else world == 4, ranks)),
        ("training starts", "without running out of memory", state(run.steps, run.trained > run.not_finite, trained)),
        (
            "MLflow tracking",
            "kept in S3",
            state(tracked, True if where.startswith("s3:") else None if small else False, f"{tracked} in {where}"),
        ),
        (
            "whole deployment",
            "under 3 h, to the tenth step",
            state(ten is not None, None if small else (ten or 0) < 10800, begun),
        ),
    ]


def template_rows(run: Run) -> list[tuple[str, str, str]]:
    """The phases of the plan's report."""
    rows = [("path alignment", f"work folder /app, image {image_of(run.facts)}", "facts.json")]
    for line in run.sync:
        mb, s = line.get("downloaded_bytes", 0) / 1e6, line.get("seconds", 0.0)
        rows.append(
            (
                f"dataset {line['dataset']}" if "dataset" in line else f"model {line.get('name') or line.get('model')}",
                f"{mb:.1f} MB in {seconds(s)}" + ("" if mb else " (cache)"),
                "sync.jsonl",
            )
        )
    rows += [
        ("vocabulary", figure(run.vocab.get("vocab_size"), "one of {} pieces in all models"), "vocab.json"),
        ("process group", figure(run.facts.get("world"), "{} rank(s)"), "facts.json"),
        ("first step after", seconds(run.until_step(1)), "parts.jsonl, steps.jsonl"),
        ("first 10 steps after", seconds(run.until_step(10)), "parts.jsonl, steps.jsonl"),
        ("checkpoints", figure(run.facts.get("checkpoints")), "facts.json"),
        ("MLflow run", figure(run.facts.get("mlflow_run_id")), "facts.json"),
    ]
    return rows


FEW_STEPS = 100
WEIGHTS = {
    "w_ess": "effective sample size, a share of the tokens",
    "w_entropy": "entropy over a position's heads (1: even)",
    "w_zeros": "share of the weights that are 0",
    "w_min": "smallest weight",
    "w_max": "largest weight",
    "value_loss": "squared error of the value head",
}


def ends_of(run: Run) -> int:
    """How many steps are its beginning, and its end."""
    return min(10, -(-len(run.steps) // 2))


def weight_rows(run: Run) -> list[tuple[str, str, str]]:
    """What the weights were at the beginning and at the end; nothing where all tokens weigh alike."""
    if run.facts.get("algo") == "baseline-mtp" or not run.steps:
        return []
    some = ends_of(run)
    means = {k: f"mean weight of head {k[12:]}" for k in run.steps[-1] if k.startswith("w_mean_head_")}
    rows = []
    for key, what in {**means, **WEIGHTS}.items():
        ends = [[s[key] for s in part if s.get(key) is not None] for part in (run.steps[:some], run.steps[-some:])]
        if all(ends):
            first, last = map(statistics.median, ends)
            rows.append((what, f"{first:.3f} -> {last:.3f}", "steps.jsonl"))
    return rows


def again(facts: dict[str, Any]) -> str:
    """The command that does the same under another name."""
    env, algo, name, launcher, chosen = (facts.get(key) for key in ("env", "algo", "run", "launcher", "set"))
    if not env or not algo or not name:
        return NONE
    what = f"make deploy ENV={env}" + (" LAUNCHER=docker" if launcher == "docker" else "")
    if env == "test":
        what = "make train"
    elif launcher == "local":
        what = "make minitest"
    commit, _, dirty = str(facts.get("revision") or "").partition("-")
    first = "# Its tree had changes that no commit has: they are not in what this checks out.\n" if dirty else ""
    first += f"git checkout {commit} && " if commit else ""
    return f"{first}{what} ALGO={algo} RUN_NAME={name}-again" + (f' SET="{chosen}"' if chosen else "")


def sections(run: Run, notes: str) -> list[Section]:
    """The whole report, in the order in which it is asked."""
    facts, config = run.facts, run.facts.get("config", {})
    verdict = [
        ("state", run.state + (f": {run.exit['cause']}" if run.exit.get("cause") else ""), "parts.jsonl, exit.json"),
        ("steps", f"{run.trained} of {figure(facts.get('total_steps'))}{run.left_out}", "steps.jsonl"),
        ("held-out loss", learned(run), "evals.jsonl"),
    ]
    if run.failure and run.state not in ("completed", "running"):  # else an earlier part's, which was survived
        verdict.append(("cause class", str(run.failure.get("class")), "failure.json"))
        verdict.append(("evidence", figure(run.failure.get("evidence")), "failure.json"))
        verdict.append(("next", figure(run.failure.get("next")), "failure.json"))
    launcher, parts = config.get("launcher", {}), run.ledger.parts
    resources = launcher.get("resources", {})
    gpus = f"{resources.get('gpus', 0)} x {resources.get('gpu_type') or 'no GPU'}"
    device = f"{figure(facts.get('world'))} rank(s) on {facts.get('gpu') or figure(facts.get('device'))}"
    when = f"{moment(parts[0].began)}, {moment(parts[-1].ended)}" if parts else NONE
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
    where = [
        ("revision", figure(facts.get("revision")), "facts.json"),
        ("image", image_of(facts), "facts.json"),
        ("algorithm, environment", f"{figure(facts.get('algo'))}, {figure(facts.get('env'))}", "facts.json"),
        ("host", f"{figure(facts.get('host'))}, {device}", "facts.json"),
        ("cluster", f"{launcher.get('cluster') or 'none'}: {gpus}" if launcher else NONE, "facts.json"),
        ("began, ended", when, "parts.jsonl"),
        ("versions", figure(versions), "facts.json"),
        ("seed", figure(facts.get("seed")), "facts.json"),
        ("data digest", figure(facts.get("digests", {}).get("data")), "facts.json"),
        ("record", f"{run.folder}: the sources that this page names", ""),
    ]
    spent = [
        (kind, f"{seconds(s)}, {100 * s / run.ledger.total:.1f} %", MEANING[kind])
        for kind, s in run.ledger.seconds.items()
    ]
    spent += [
        ("image", NONE + ": before the container begins", ""),
        ("sum", seconds(sum(run.ledger.seconds.values())), f"paid for: {seconds(run.ledger.total)}"),
    ]
    where = [row for row in where if not row[1].startswith(NONE)]  # of a run that ended before it was known
    before, after = run.held_out()
    learning = Section(
        "How it learned",
        [
            ("held out, before, per head", heads(before), "evals.jsonl"),
            ("held out, after, per head", heads(after), "evals.jsonl"),
        ],
    )
    if run.steps:
        learning.figures.append(("loss", plots.loss_plot(run.steps)))
        if len(run.evals) > 1:
            learning.figures.append(("held-out", plots.held_out_plot(run.evals)))
        learning.figures.append(
            ("gradient", plots.line_plot(run.steps, "grad_norm", "Gradient norm before clipping", "norm", log=True))
        )
        learning.figures.append(("rate", plots.line_plot(run.steps, "lr", "Learning rate", "rate")))
    step, wait = run.median("step_seconds"), run.median("data_wait_s")
    stall = sum(s.get("checkpoint_stall_s") or 0.0 for s in run.steps)
    mfu = run.median("mfu")
    memory = max((s["memory_gib"] for s in run.steps if s.get("memory_gib")), default=None)
    speed = Section(
        "How fast",
        [
            (
                "tokens per second",
                figure(run.median("tokens_per_second"), "{:.0f} in a step (median; without evaluation and saves)"),
                "steps.jsonl",
            ),
            ("step", figure(step, "{:.3f} s (median)"), "steps.jsonl"),
            (
                "MFU",
                f"{100 * mfu:.1f} % (median)" if mfu else f"{NONE}: the peak of this device is not known",
                "steps.jsonl",
            ),
            ("memory", figure(memory, "{:.2f} GiB of rank 0 at most"), "steps.jsonl"),
            (
                "waiting for data",
                figure(step and wait is not None and 100 * wait / step, "{:.2f} % of a step (median)"),
                "steps.jsonl",
            ),
            ("waiting for checkpoints", seconds(stall), "steps.jsonl"),
        ],
    )
    if run.steps:
        speed.figures.append(
            ("throughput", plots.line_plot(run.steps, "tokens_per_second", "Throughput", "tokens per second"))
        )
        speed.figures.append(("memory", plots.line_plot(run.steps, "memory_gib", "Memory of rank 0", "GiB")))
    if len(run.node) > 1:
        speed.figures.append(("node", plots.gpu_plot(run.node)))
    spans = f"first {ends_of(run)} steps -> last {ends_of(run)} (medians)"
    weight = Section("Where the weight went", weight_rows(run), ("what", spans, "source"))
    if facts.get("algo") == "baseline-mtp":
        weight.text = "baseline-mtp weighs all tokens alike: there is nothing to show."
    elif run.steps:
        weight.figures.append(("weights", plots.weights_plot(run.steps)))
        picture = run.folder / "weights.png"
        if picture.is_file():
            address = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
            weight.figures.append(("heat map", address))
        else:
            weight.text = f"Heat map of held-out text: {NONE} (it is drawn at the end of a run that holds data out)."
    else:
        weight.text = NONE
    wall = Section("How long each phase took", spent, ("phase", "seconds, share", "what it is"))
    if run.ledger.parts:
        wall.figures.append(("waterfall", plots.waterfall(run.ledger)))
    return [
        Section("Did it work", verdict),
        Section("What ran where", where),
        wall,
        learning,
        speed,
        weight,
        Section("What went wrong and was survived", survived(run)),
        Section("What it cost", cost_rows(run)),
        Section("Against the plan", plan_rows(run), ("criterion", "bar", "measured, state")),
        Section("The plan's completion report", template_rows(run)),
        Section("Remarks", text=notes or "None were given (NOTES=file)."),
        Section("Again", code=again(run.facts)),
    ]


def compared(runs: list[Run]) -> list[Section]:
    """Runs side by side: their figures, where they were set differently, their curves."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [r.state for r in runs]),
        ("algorithm", [figure(r.facts.get("algo")) for r in runs]),
        ("revision", [re.sub(r"^(.{12})[^-]*", r"\1", figure(r.facts.get("revision"))) for r in runs]),
        ("steps", [str(len(r.steps)) for r in runs]),
        ("held-out loss", [learned(r) for r in runs]),
        ("held out per head, after", [heads(r.held_out()[1]) for r in runs]),
        *((what, [figure(r.median(key), "{:.3f}") for r in runs]) for key, what in WEIGHTS.items()),
        ("tokens per second (median)", [figure(r.median("tokens_per_second"), "{:.0f}") for r in runs]),
        (
            "memory, GiB",
            [
                figure(max((s["memory_gib"] for s in r.steps if s.get("memory_gib")), default=None), "{:.2f}")
                for r in runs
            ],
        ),
        ("first step after", [seconds(r.until_step(1)) for r in runs]),
        ("seconds paid for", [seconds(r.ledger.total) for r in runs]),
        ("goodput", [figure(r.ledger.goodput and 100 * r.ledger.goodput, "{:.1f} %") for r in runs]),
        ("cost", [figure(r.ledger.cost(r.price), "${:.2f}") if r.price is not None else "no price set" for r in runs]),
        ("left the bucket", [figure(None if r.moved is None else r.moved / 1e9, "{:.3f} GB") for r in runs]),
    ]
    settings = [flat({k: r.facts.get(k, {}) for k in ("config", "recipe")}) for r in runs]
    different = [
        (key, [json.dumps(s.get(key)) for s in settings])
        # An embedded bucket has its port each time, and names are no difference.
        for key in sorted(set().union(*settings) - {"config.storage.endpoint", "recipe.run.name", "recipe.run.tags"})
        if len({json.dumps(s.get(key)) for s in settings}) > 1
    ]
    names = [r.name for r in runs]
    short = [name[-24:] for name in names]
    held = [[(e["step"], statistics.mean(e["ce"])) for e in r.evals if e.get("ce")] for r in runs]
    shown = (
        ("Held-out loss, mean over the heads", "nats per token", held),
        ("Training cross-entropy of head 0", "nats per token", [plots.series(r.steps, "ce_head_0") for r in runs]),
        ("Throughput", "tokens per second", [plots.series(r.steps, "tokens_per_second") for r in runs]),
    )
    curves = Section("Curves")
    for title, unit, points in shown:
        drawn = plots.overlay(list(zip(short, points, strict=True)), title, unit, marked=points is held)
        curves.figures.append((title.split(",")[0].lower(), drawn))
    shortest = min(len(r.steps) for r in runs)
    limits = Section("What this can't show")
    if shortest < FEW_STEPS:
        limits.text = (
            f"{shortest} steps tell no algorithm from another, and their speed is that of what else the machine "
            "did. More steps, and more than one seed, would."
        )
    return [
        Wide("Side by side", names, rows),
        *([limits] if limits.text else []),
        Wide("Set differently", names, different or [("nothing", ["the same"] * len(runs))]),
        curves,
    ]


class Wide(Section):
    """A table with a column for each run."""

    def __init__(self, title: str, names: list[str], rows: list[tuple[str, list[str]]]) -> None:
        super().__init__(title)
        self.names, self.wide = names, rows


def table_of(section: Section) -> tuple[list[str], list[list[str]]]:
    if isinstance(section, Wide):
        return ["", *section.names], [[what, *values] for what, values in section.wide]
    return list(section.heads), [list(row) for row in section.rows]


def page(title: str, lead: str, found: list[Section]) -> str:
    """One HTML page that needs nothing beside it."""

    def cell(tag: str, text: str, source: bool, told: str = "") -> str:
        kind = " class=source" if source else ""
        hover = f' title="{html.escape(told, quote=True)}"' if told else ""
        return f"<{tag}{kind}{hover}>{html.escape(text)}</{tag}>"

    out = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>"]
    for section in found:
        out.append(f"<section><h2>{html.escape(section.title)}</h2>")
        top, rows = table_of(section)
        sourced = top[-1] == "source"
        if rows:
            last = len(top) - 1
            out.append("<div class=scroll><table><thead><tr>")
            out += [cell("th", text, sourced and n == last) for n, text in enumerate(top)]
            out.append("</tr></thead><tbody>")
            for row in rows:
                told = row[last] if sourced else ""
                cells = [cell("td", c, sourced and n == last, told if n == 1 else "") for n, c in enumerate(row)]
                out.append(f"<tr>{''.join(cells)}</tr>")
            out.append("</tbody></table></div>")
        if section.figures:
            out.append("<div class=figures>")
            for name, picture in section.figures:
                if picture.startswith("<svg"):
                    out.append(f"<figure>{picture}</figure>")
                else:  # text, which a column would make too small to read
                    out.append(f'<figure class=wide><img alt="{html.escape(name)}" src="{picture}"></figure>')
            out.append("</div>")
        if section.text:
            out += [f"<p>{html.escape(part)}</p>" for part in section.text.strip().split("\n\n")]
        if section.code:
            out.append(f"<pre>{html.escape(section.code)}</pre>")
        out.append("</section>")
    view = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head = f"{view}<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(out)}</body></html>\n'


def markdown(title: str, lead: str, found: list[Section], pictures: Path) -> str:
    """The same facts for a code host; its pictures are written to ``pictures``."""
    out = [f"# {title}", "", lead, ""]

    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").split()).replace("<", "&lt;") or " "

    for section in found:
        out += [f"## {section.title}", ""]
        top, rows = table_of(section)
        if rows:
            out += ["| " + " | ".join(cell(t) for t in top) + " |", "|" + " --- |" * len(top)]
            out += ["| " + " | ".join(cell(c) for c in row) + " |" for row in rows] + [""]
        for name, picture in section.figures:
            kind = "svg" if picture.startswith("<svg") else "png"
            file = pictures / f"{section.title.split()[0].lower()}-{name.replace(' ', '-')}.{kind}"
            pictures.mkdir(parents=True, exist_ok=True)
            if kind == "svg":
                file.write_text(picture)
            else:
                file.write_bytes(base64.b64decode(picture.partition(",")[2]))
            out += [f"![{name}]({pictures.name}/{file.name})", ""]
        if section.text:
            out += [section.text.strip(), ""]
        if section.code:
            out += ["```bash", section.code, "```", ""]
    return "\n".join(out)


def write(out: Path, stem: str, title: str, lead: str, found: list[Section]) -> Path:
    """Both forms, whole or not at all; gives the page."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = out / ("plots" if stem == "report" else f"{stem}-plots")
    shutil.rmtree(pictures, ignore_errors=True)
    for kind, text in (("md", markdown(title, lead, found, pictures)), ("html", page(title, lead, found))):
        staging = out / f".{stem}.{kind}"
        staging.write_text(text)
        staging.replace(out / f"{stem}.{kind}")
    return out / f"{stem}.html"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--notes", type=Path, help="a person's remarks; they are kept beside the report for the next time"
    )
    args = parser.parse_args(argv)
    stage = "compare" if len(args.folders) > 1 else "report"
    for folder in args.folders:
        if not (folder / "parts.jsonl").is_file() and not (folder / "facts.json").is_file():
            print(
                f"{stage:<9} FAIL  {folder}: no record of a run\n"
                "          rule  a record has facts.json and parts.jsonl\n"
                "          next  make status RUN_ID=…",
                file=sys.stderr,
            )
            return 2
    runs = [Run(folder) for folder in args.folders]
    try:
        if len(runs) > 1:
            names = ", ".join(run.name for run in runs)
            print(write(args.out, "compare", f"{len(runs)} runs side by side", names, compared(runs)))
            return 0
        run, kept = runs[0], args.out / "notes.md"
        if args.notes:
            args.out.mkdir(parents=True, exist_ok=True)
            text = args.notes.read_text(errors="replace")
            kept.write_text(text)
        notes = kept.read_text() if kept.is_file() else ""
        lead = f"{run.name}: {run.state}, {run.trained} steps{run.left_out}, held-out loss {learned(run)}."
        print(write(args.out, "report", "WMTP completion report", lead, sections(run, notes)))
    except OSError as error:
        print(
            f"{stage:<9} FAIL  {error.filename or args.out}: {error.strerror}\n"
            "          next  make room or rights there, then again",
            file=sys.stderr,
        )
        return 2 if args.notes and error.filename == str(args.notes) else 10
    return 0


if __name__ == "__main__":
    sys.exit(main())
