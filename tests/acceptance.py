"""The plan's criteria, each beside what was measured: the rows of `make acceptance`.

    python tests/acceptance.py needs [ID…]      the evidence that these rows want, a name a line, in order
    python tests/acceptance.py table DIR [ID…]  the table, judged by the evidence in DIR, left by scripts/acceptance.sh

An ID is a row's or a section's (`P1.2`, `P1`). A row's check returns what it measured, or raises: AssertionError or any
other error is FAIL, Unchecked is `not checked`. A row with a `command` can be shown by a cluster alone: its check says
what is known here. Exit codes: 0 no FAIL, 1 a FAIL, 2 an unknown ID.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
RUN = "acceptance-critic-wmtp"
FOLDERS = ("models", "datasets", "checkpoints", "mlruns", "logs")
ALGORITHMS = ("baseline-mtp", "critic-wmtp", "rho1-wmtp")
PLAN_GB = {"llama-7b-mtp": 27, "starling-rm-7b": 26, "sheared-llama-2.7b": 10}
MINITEST = "make deploy ENV=minitest ALGO=critic-wmtp"
PRODUCTION = "make deploy ENV=production ALGO=critic-wmtp"
REPORT = "make report RUN_ID=…"

SECTIONS = {
    "E": "1.1 Test environment",
    "P1": "Phase 1: paths",
    "P2": "Phase 2: models",
    "P3": "Phase 3: dry run and mini-test settings",
    "MT": "Checklist of the mini-test",
    "PR": "Checklist of production",
    "P4": "Phase 4: cache and monitor",
    "S1": "Step 1: preparation",
    "S2": "Step 2: image",
    "S3": "Step 3: mini-test on the cluster",
    "S4": "Step 4: production",
    "R": "Success table and report",
}


class Unchecked(Exception):
    """What could not be looked at here, and why."""


class Evidence:
    """What the stages left: a folder each, with `rc`, `out`, `err`, `seconds`, and files of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rc(self, name: str, file: str = "rc") -> int:
        why = self.folder / name / "why"
        if why.is_file():
            raise Unchecked(why.read_text().strip())
        return int((self.folder / name / file).read_text())

    def text(self, name: str, file: str = "out") -> str:
        """A file of a stage that ended with 0."""
        code = self.rc(name)
        told = (self.folder / name / "err").read_text()
        found = re.findall(r"FAIL +(.*)", told) or told.splitlines()[-1:] or [""]
        assert code == 0, f"{name} ended with {code}: {found[0]}"
        return (self.folder / name / file).read_text()

    def json(self, name: str, file: str = "out") -> Any:
        return json.loads(self.text(name, file).splitlines()[-1])

    def whole(self, name: str) -> Any:
        return json.loads(self.text(name))

    def summary(self) -> dict[str, Any]:
        return json.loads(self.text("minitest", "summary.json"))

    def tap(self, test: str) -> str:
        """A test of the image's suite, on real engines and a real registry."""
        self.rc("engine")
        said = (self.folder / "engine" / "out").read_text()
        if "skipped" in said:
            raise Unchecked("scripts/test_image.sh was skipped")
        found = re.search(rf"^(not ok|ok) \d+ (.*{re.escape(test)}.*)$", said, re.M)
        assert found, f"no test was run that is named {test}"
        assert found[1] == "ok", f"not ok: {found[2]}"
        return f"ok: {found[2]}"


class Row(NamedTuple):
    id: str
    criterion: str
    bar: str
    check: Callable[[Evidence], str]
    needs: tuple[str, ...] = ()
    command: str = ""


def read(file: str) -> str:
    return (ROOT / file).read_text("utf-8")


def settings(file: str) -> Any:
    return YAML(typ="safe").load(read(file))


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


# ---- files ----------------------------------------------------------------------------------------------------------


def last_stage() -> str:
    return re.split(r"^FROM .*$", read("Dockerfile"), flags=re.M)[-1]


def workdir(_: Evidence) -> str:
    found = re.findall(r"^WORKDIR (\S+)", last_stage(), re.M)
    assert found == ["/app"], f"WORKDIR {' '.join(found) or 'is not set'}"
    return "WORKDIR /app"


def folders(_: Evidence) -> str:
    made = re.search(r"install -d -m (\d+) -o wmtp -g wmtp ([^\n]*)", read("Dockerfile"))
    assert made, "the Dockerfile makes no folders"
    missing = {f"/app/{name}" for name in FOLDERS} - set(made[2].split())
    assert not missing and made[1] == "755", f"mode {made[1]}, missing: {' '.join(sorted(missing)) or 'none'}"
    return f"{len(FOLDERS)} folders, mode {made[1]}"


def no_workspace(_: Evidence) -> str:
    places = [*(ROOT / "configs").rglob("*"), *(ROOT / "docker").rglob("*"), *(ROOT / "scripts").rglob("*")]
    files = [ROOT / "Dockerfile", *(p for p in places if p.is_file())]
    found = [str(p.relative_to(ROOT)) for p in files if "/workspace" in p.read_text("utf-8", "replace")]
    assert not found, f"/workspace in {' '.join(found)}"
    return f"none in {len(files)} files"


def resolved(_: Evidence) -> str:
    os.environ.pop("WMTP_APP_ROOT", None)
    from wmtp.paths import PathResolver

    found = PathResolver().resolve("file:///app/models/test")
    assert found == ("file", "/app/models/test"), str(found)
    s3 = PathResolver().resolve("s3://wmtp/models")
    assert s3 == ("s3", "s3://wmtp/models"), str(s3)
    return f"{found[0]} {found[1]}; {s3[0]} {s3[1]}"


def executable(*names: str) -> Callable[[Evidence], str]:
    def check(_: Evidence) -> str:
        for name in names:
            assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
            kept = subprocess.run(["git", "ls-files", "-s", name], cwd=ROOT, capture_output=True, text=True).stdout
            assert kept.startswith("100755 "), f"git keeps {name} as {kept[:6] or 'nothing'}"
        return "mode 100755: " + ", ".join(Path(name).name for name in names)

    return check


def registered(_: Evidence) -> str:
    from wmtp import registry

    wanted = (
        (registry.trainer_registry, ALGORITHMS),
        (registry.optimizer_registry, ("adamw",)),
        (registry.loader_registry, ("standardized-model-loader",)),
        (registry.tokenizer_registry, ("hf-sentencepiece", "hf-transformers")),
    )
    for kind, names in wanted:
        for name in names:
            assert kind.is_registered(name), f"no {kind.kind} {name}"
            module, function = kind[name].split(":")
            source = read(f"src/{module.replace('.', '/')}.py")
            assert re.search(rf"^def {function}\(", source, re.M), f"{kind.kind} {name}: no {kind[name]}"
    return f"{sum(len(names) for _, names in wanted)} names, each a function that exists"


def shapes(_: Evidence) -> str:
    from wmtp.runfile import MODEL_GB

    sizes = {f.parent.name: json.loads(f.read_text())["vocab_size"] for f in (ROOT / "configs/shapes").glob("*/*.json")}
    assert sizes == dict.fromkeys(PLAN_GB, 32000) and MODEL_GB == PLAN_GB, f"{sizes}, {MODEL_GB}"
    return "32000 in the kept shapes of all 3; 63 GB"


def same_as_plan(file: str, wanted: dict[str, Any]) -> str:
    found = settings(file)
    wrong = {key: at(found, key) for key, value in wanted.items() if at(found, key) != value}
    assert not wrong, f"{file}: {wrong}"
    return f"{len(wanted)} of the plan's keys, equal"


DEVICES = {
    "launcher.target": "vessl",
    "launcher.resources.gpus": 4,
    "launcher.resources.gpu_type": "A100",
    "devices.compute_backend": "cuda",
    "devices.mixed_precision": "bf16",
    "devices.num_proc": 8,
    "devices.distributed.enabled": True,
    "devices.distributed.backend": "nccl",
    "devices.distributed.init_method": "env://",
    "devices.distributed.timeout": 1800,
    "devices.fsdp.enabled": True,
    "devices.fsdp.auto_wrap": True,
    "devices.fsdp.sharding": "full_shard",
}


def minitest_settings(_: Evidence) -> str:
    return same_as_plan(
        "configs/config.vessl_minitest.yaml",
        DEVICES
        | {
            "project": "wmtp_vessl_minitest",
            "seed": 42,
            "log_interval": 5,
            "paths.datasets.mbpp_tiny": "file:///app/datasets/mbpp_tiny",
            "paths.checkpoints.base_path": "file:///app/test_checkpoints",
            "paths.checkpoints.save_interval": 5,
            "paths.checkpoints.keep_last": 1,
            "paths.checkpoints.save_final": False,
            "mlflow.experiment": "wmtp/vessl_minitest",
            "mlflow.tracking_uri": "file:///app/mlruns_test",
            "mlflow.registry_uri": "file:///app/mlruns_test",
            "devices.fsdp.activation_ckpt": True,
        },
    )


def tiny_data(_: Evidence) -> str:
    count = len(read("datasets/mbpp_tiny/problems.jsonl").splitlines())
    assert count == 10, f"{count} samples"
    return f"{count} samples"


def with_uv(_: Evidence) -> str:
    uv = ROOT / ".venv/bin/uv"
    done = subprocess.run([uv, "pip", "check", "--python", ROOT / ".venv/bin/python"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    assert '"${pip[@]}"' in read("Dockerfile") and "uv" in read("requirements/uv.in"), "the image does not use uv"
    return done.stderr.strip().splitlines()[-1]


# ---- dry run --------------------------------------------------------------------------------------------------------


def findings(e: Evidence, heading: int, name: str = "config", least: int = 1) -> list[dict[str, str]]:
    found = [f for f in e.whole(name)["findings"] if f["heading"] == heading]
    bad = [f"{f['subject']}: {f['detail']}" for f in found if f["verdict"] == "FAIL"]
    assert not bad, bad[0]
    good = [f for f in found if f["verdict"] == "ok"]
    assert len(good) >= least, f"{len(good)} findings are ok under heading {heading}"
    return good


def loads(e: Evidence) -> str:
    good = findings(e, 1, least=3)
    return f"{len(good)} pairs load: {good[0]['detail']}"


def app_paths(e: Evidence) -> str:
    good = findings(e, 2, least=6)
    lie = next(f for f in good if f["subject"] == "file:// paths")
    image = next(f for f in good if f["subject"] == "Dockerfile")
    return f"{lie['detail']}; {image['detail']}"


def distributed(e: Evidence) -> str:
    findings(e, 4, least=4)
    return same_as_plan("configs/config.vessl.yaml", DEVICES) + "; " + findings(e, 4)[1]["detail"]


def twin(e: Evidence) -> str:
    found = next(f for f in findings(e, 5, "dryrun") if f["subject"].startswith("twin"))
    assert "third step equal" in found["detail"], found["detail"]
    return found["detail"].split(";")[0]


def memory(e: Evidence) -> str:
    found = next(f for f in e.whole("dryrun")["findings"] if f["subject"].startswith("memory"))
    peak, card = re.findall(r"([\d.]+) GiB", found["detail"])[:2]
    assert found["verdict"] == "ok" and float(peak) < 0.9 * float(card), f"{peak} of {card} GiB at peak, predicted"
    return f"{peak} of {card} GiB at peak, predicted"


def no_fail(e: Evidence) -> str:
    counts = e.whole("dryrun")["counts"]
    assert counts["FAIL"] == 0 and counts["ok"] >= 20, str(counts)
    return ", ".join(f"{n} {word}" for word, n in counts.items())


def minitest_dry(e: Evidence) -> str:
    ok = sum(len(findings(e, heading, "minitest_config")) for heading in (1, 2, 3, 4))
    wanted = settings("tests/configs/recipe.critic_wmtp.yaml")["train"]["max_steps"]
    assert wanted >= 10, f"{wanted} steps"
    return f"{ok} findings ok, {wanted} steps"


# ---- models ---------------------------------------------------------------------------------------------------------


def mb_per_second(e: Evidence) -> float:
    first = e.json("sync", "first.out")
    assert first["cache"] == "miss" and first["downloaded_bytes"] == first["bytes"] > 1e8, str(first)
    return first["mb_per_second"]


def arrives(e: Evidence) -> str:
    rate = mb_per_second(e)
    said = e.text("sync", "first.err")
    assert "blake3 verified while arriving" in said, "no proof of the content"
    code = e.rc("sync", "damaged.rc")
    assert code == 13, f"another content of the same size ends with {code}"
    return f"{e.json('sync', 'first.out')['bytes'] / 1e6:.0f} MB at {rate:.0f} MB/s, blake3 proved; damaged: code 13"


def reckoned(e: Evidence) -> str:
    rate = mb_per_second(e)
    return f"{rate:.0f} MB/s from the embedded bucket: 63 GB in {63000 / rate / 60:.1f} min, reckoned"


def retries(e: Evidence) -> str:
    e.text("sync")
    code, said = e.rc("sync", "broken.rc"), e.text("sync", "broken.err")
    tries = re.findall(r"try (\d) of 3", said)
    assert code == 12 and tries == ["1", "2", "3"], f"ended with {code} after tries {' '.join(tries) or 'none'}"
    asked = settings("configs/config.vessl.yaml")["storage"]
    assert (asked["retries"], asked["retry_wait_s"]) == (3, 10), str(asked)
    return f"3 tries, then code {code}; {asked['retry_wait_s']} s apart in production"


def one_vocabulary(e: Evidence) -> str:
    right = e.json("vocab")
    assert right["vocab_size"] == 32000 and len(right["models"]) >= 2, str(right)
    code = e.rc("vocab", "wrong.rc")
    assert code == 14, f"another size in one model ends with {code}"
    return f"32000 in {len(right['models'])} models, by content; another size ends with 14"


def hit(e: Evidence) -> str:
    second, seconds = e.json("sync", "second.out"), float(e.text("sync", "second.seconds"))
    assert second["cache"] == "hit" and second["downloaded_bytes"] == 0, str(second)
    assert seconds < 30, f"{seconds} s"
    return f"hit, 0 bytes fetched, {seconds:.1f} s"


def marked(e: Evidence) -> str:
    found = e.text("sync", "marker").strip()
    assert re.fullmatch(r"[0-9a-f]{64}/\.complete", found), found or "no marker in the volume"
    return f"{found[:12]}….complete"


def run_file(e: Evidence) -> dict[str, Any]:
    return YAML(typ="safe").load(e.text("render", "run.yaml"))


def starts(e: Evidence) -> str:
    file = run_file(e)
    assert file["run"] == [{"command": "exec bash /app/docker/vessl_startup.sh", "workdir": "/app"}], str(file["run"])
    assert file["env"]["ENV_MODE"] == "production" and file["env"]["WMTP_ALGO"] == "critic-wmtp", str(file["env"])
    assert "@sha256:" in file["image"], file["image"]
    return "exec bash /app/docker/vessl_startup.sh, image by digest"


def named_image(e: Evidence) -> str:
    place, image = settings("configs/config.vessl.yaml")["launcher"]["image"], run_file(e)["image"]
    assert place == "ghcr.io/wooshikwon/wmtp:latest" and image.startswith("ghcr.io/wooshikwon/wmtp@sha256:"), image
    return "ghcr.io/wooshikwon/wmtp is named, by digest"


def volume(e: Evidence) -> str:
    mount = run_file(e)["mount"]
    assert mount == {"/cache/models": "volume://storage/wmtp-models-cache"}, str(mount)
    assert settings("configs/config.vessl.yaml")["storage"]["cache_dir"].endswith("/cache/models}"), "storage.cache_dir"
    return "launcher.volume is mounted at /cache/models"


def local_tests(e: Evidence) -> str:
    losses = []
    for algo in ALGORITHMS:
        kept = json.loads(e.text("test", f"{algo}.json"))
        assert kept["steps"] == 2 and kept["ranks"] == 1 and kept["not_finite"] == 0, f"{algo}: {kept}"
        losses.append(f"{kept['held_out_ce_after']:.2f}")
    return f"3 algorithms, 2 steps each, held-out loss {' '.join(losses)}"


def skips_sync(e: Evidence) -> str:
    said = e.text("test", "err")
    assert said.count("test: no sync") == 3 and "Download" not in said, "ENV_MODE=test fetched models"
    return "ENV_MODE=test: no sync"


# ---- mini-test ------------------------------------------------------------------------------------------------------


def story(e: Evidence) -> str:
    return e.text("minitest", "err")


def small_models(e: Evidence) -> str:
    lines = [json.loads(line) for line in e.text("minitest", "sync.jsonl").splitlines()]
    names = sorted(m["model"] for m in lines)
    assert names == ["test-llama-mtp", "test-rm-llama"], f"synced: {' '.join(names) or 'nothing'}"
    assert all(m["downloaded_bytes"] > 0 for m in lines), "nothing was fetched"
    return f"{len(lines)} models, {sum(m['bytes'] for m in lines) / 1e6:.0f} MB, by the node's own script"


def in_order(e: Evidence) -> str:
    said = story(e)
    places = [said.find(word) for word in ("startup   sync ok", "startup   vocabularies ok", "Step 1/", "training ok")]
    assert min(places) >= 0 and places == sorted(places), str(places)
    return "sync, vocabularies, training, in this order"


def two_ranks(e: Evidence) -> str:
    found = e.summary()["ranks"]
    assert found == 2, f"{found} ranks"
    return "2 gloo ranks on CPU here"


def wrapped(e: Evidence) -> str:
    assert e.summary()["fsdp"] == "full_shard", str(e.summary()["fsdp"])
    sizes = [int(size) for key, size in checkpoint_files(e) if key.endswith(".distcp")]
    assert len(sizes) == 2 and max(sizes) < 0.7 * sum(sizes), f"shards of {sizes} bytes"
    return "full_shard; each of 2 ranks saves " + " and ".join(f"{s / sum(sizes):.0%}" for s in sizes)


def steps(e: Evidence) -> str:
    done = e.summary()
    assert done["steps"] >= 10 and done["not_finite"] == 0, str(done["steps"])
    assert done["held_out_ce_after"] < done["held_out_ce_before"], "the held-out loss did not fall"
    return f"{done['steps']} steps, held-out loss {done['held_out_ce_before']:.2f} -> {done['held_out_ce_after']:.2f}"


def tracked(e: Evidence) -> str:
    run_id = e.summary()["mlflow_run_id"]
    e.text("mlflow")
    with sqlite3.connect(f"file:{e.folder}/mlflow/store/mlflow.db?mode=ro", uri=True) as store:
        query = "select count(*) from metrics where key = 'wmtp_loss' and run_uuid = ?"
        points = store.execute(query, [run_id]).fetchone()[0]
    assert points == e.summary()["steps"], f"{points} points of wmtp_loss in run {run_id}"
    return f"{points} points of wmtp_loss, read back from {e.text('mlflow', 'from').strip()}"


def tracked_in_s3(e: Evidence) -> str:
    place = settings("configs/config.vessl.yaml")["mlflow"]["tracking_uri"]
    assert place.startswith("s3://") and place.endswith("/mlruns"), place
    return tracked(e)


def checkpoint_files(e: Evidence) -> list[tuple[str, str]]:
    where = e.summary()["checkpoint"].split("/", 3)[3]
    rows = [line.split("\t") for line in e.text("checkpoint", "listing").splitlines()]
    return [(key.removeprefix(f"{where}/"), size) for key, size in rows if key.startswith(f"{where}/")]


def saved(e: Evidence) -> str:
    names = [key for key, _ in checkpoint_files(e)]
    assert ".complete" in names, f"no marker among {names}"
    drill = e.json("checkpoint")
    assert drill["tensors"] > 0 and drill["not_finite"] == 0, str(drill)
    return f"{len(names)} objects and a marker; restored: {drill['tensors']} tensors, {drill['bytes'] / 1e6:.0f} MB"


def saved_in_s3(e: Evidence) -> str:
    place = settings("configs/config.vessl.yaml")["paths"]["checkpoints"]["base_path"]
    assert place.startswith("s3://"), place
    assert e.summary()["checkpoint"].startswith("s3://"), e.summary()["checkpoint"]
    return saved(e)


def under_ten_minutes(e: Evidence) -> str:
    took = int(e.summary()["seconds"])
    assert took < 600, f"{took} s"
    return f"{took} s here"


def searched_words(e: Evidence) -> str:
    said = story(e)
    download, step = said.count("Download"), len(re.findall(r"^Step \d+/\d+", said, re.M))
    assert download and step >= 10, f"{download} lines with Download, {step} with Step"
    return f"Download in {download}, Step in {step} lines"


# ---- monitor, report, cluster ---------------------------------------------------------------------------------------


def page(e: Evidence) -> str:
    said, run_id = e.text("monitor"), e.summary()["mlflow_run_id"]
    for words in ("[GPU Utilization]", "Last 50 lines]", "[MLflow Experiments]", "wmtp_loss", f"{run_id}  FINISHED"):
        assert words in said, f"no {words}"
    return f"GPUs, last 50 lines, MLflow run {run_id[:8]}… FINISHED"


def report(e: Evidence) -> str:
    said = e.text("report", "report.md")
    wanted = ["cluster", "began, ended", "path alignment", "model test-llama-mtp", "vocabulary", "process group"]
    missing = [w for w in [*wanted, "first 10 steps after", "checkpoints", "MLflow run"] if f"| {w} | " not in said]
    assert not missing, f"no row {', '.join(missing)}"
    template = said.partition("## The plan's completion report")[2].partition("\n## ")[0].splitlines()
    unknown = [r for r in template if "not recorded" in r and "image not recorded" not in r]
    assert not unknown, unknown[0]
    return f"{sum(r.startswith('| ') for r in template) - 2} rows of the plan's template, filled"


def submitted(e: Evidence) -> str:
    number, again = e.json("submit"), e.json("submit", "again.out")
    runs = e.text("submit", "runs").split()
    assert number == again and runs == [f"{number}.yaml"], f"runs {runs}, numbers {number} and {again}"
    sent = YAML(typ="safe").load(e.text("submit", "sent.yaml"))
    assert sent["resources"] == {"cluster": "vessl-kr-a100-80g-sxm", "preset": "gpu-a100-80g-large"}, str(sent)
    return f"real client, stub of the API: run {number}, the same when pressed twice"


def followed(e: Evidence) -> str:
    said = e.text("submit", "logs.out")
    assert "Download" in said and "Step 12/12" in said, said[-200:]
    return f"{len(said.splitlines())} lines by the real client from the stub"


def rehearsed(e: Evidence) -> str:
    said = e.text("deploy", "err")
    for word in ("'docker' 'build'", "'docker' 'push'", "vessl run create -f", "53.0 GB", "nothing was changed"):
        assert word in said, f"no {word}"
    assert "unbound variable" not in said, "an unbound variable"
    return f"{said.count('would run')} changes told, none made"


def ranks_predicted(e: Evidence) -> str:
    return next(f["detail"] for f in findings(e, 4) if f["subject"] == "sharding")


def both(*checks: Callable[[Evidence], str]) -> Callable[[Evidence], str]:
    return lambda e: "; ".join(check(e) for check in checks)


def tap(test: str) -> Callable[[Evidence], str]:
    return lambda e: e.tap(test)


MINI, SYNC, DRY, CONFIG, ENGINE = ("minitest",), ("sync",), ("dryrun",), ("config",), ("engine",)
SAVED, TRACKED = ("minitest", "checkpoint"), ("minitest", "mlflow")
IMAGE, PULL, DEPLOYED = "/app with its folders", "another engine pulls by the digest", "deploy: all stages in order"
CONTAINER = "container: deploy: sync, vocabularies, two ranks"
CHECK = "image: the plan's check of paths"
STARTUP, DRYRUN = "docker/vessl_startup.sh", "scripts/test_vessl_config.sh"

ROWS: tuple[Row, ...] = (
    Row("E.1", "all algorithms train on one device", "no error", local_tests, ("models", "test")),
    Row("E.2", "uv stays the package tool", "one consistent set", with_uv),
    Row("P1.1", "WORKDIR of the image", "/app", workdir),
    Row("P1.2", "folders under /app", "5, mode 755", folders),
    Row("P1.3", "the image builds", "no error", tap(IMAGE), ENGINE),
    Row("P1.4", "addresses are resolved", "/app/models/test", resolved),
    Row("P1.5", "nothing names the old work folder", "no /workspace", no_workspace),
    Row("P1.6", "pwd and folders in the container", "/app, 755", tap(IMAGE), ENGINE),
    Row("P1.7", "the plan's check in the container", "passes", tap(CHECK), ENGINE),
    Row("P2.1", "the startup script brings the models", "before training", both(small_models, in_order), MINI),
    Row("P2.2", "the startup script may be executed", "mode 755", executable(STARTUP)),
    Row("P2.3", "models come in a local container", "test passes", tap(CONTAINER), ENGINE),
    Row("P2.4", "vocabulary of all models", "32000", both(one_vocabulary, shapes), ("models", "vocab")),
    Row("P2.5", "the run file starts the script", "one command", starts, ("render",)),
    Row("P2.6", "a failed transfer is tried again", "3 tries, 10 s apart", retries, SYNC),
    Row("P2.7", "ENV_MODE=test fetches nothing", "no sync", skips_sync, ("models", "test")),
    Row("P2.8", "files arrive whole", "proved", arrives, SYNC),
    Row("P2.9", "63 GB", "about 5 min", reckoned, SYNC, f"{PRODUCTION}; {REPORT}"),
    Row("P3.1", "[1/5] configuration and recipe load", "no error", loads, CONFIG),
    Row("P3.2", "[2/5] all paths begin with /app", "all", app_paths, CONFIG),
    Row("P3.3", "[3/5] components are registered", "7 names", registered),
    Row("P3.4", "[4/5] distributed, FSDP, precision", "nccl, full_shard, bf16", distributed, CONFIG),
    Row("P3.5", "[5/5] the pipeline in a dry run", "no error", twin, DRY),
    Row("P3.6", "configuration of the mini-test", "the plan's values", minitest_settings),
    Row("P3.7", "tiny dataset", "10 samples", tiny_data),
    Row("P3.8", "dry run of the mini-test", "at least 10 steps", minitest_dry, ("minitest_config",)),
    Row("MT.1", "small models downloaded", "all of the run", small_models, MINI),
    Row("MT.2", "4 GPUs start together", "4 ranks", two_ranks, MINI, MINITEST),
    Row("MT.3", "FSDP wraps", "sharded", wrapped, SAVED),
    Row("MT.4", "the loop runs", "at least 10 steps", steps, MINI),
    Row("MT.5", "MLflow logs", "every step", tracked, TRACKED),
    Row("MT.6", "checkpoint saved", "whole", saved, SAVED),
    Row("MT.7", "total time", "< 10 min", under_ten_minutes, MINI),
    Row("PR.1", "large models downloaded", "63 GB, about 5 min", reckoned, SYNC, f"{PRODUCTION}; {REPORT}"),
    Row("PR.2", "one vocabulary", "32000", one_vocabulary, ("models", "vocab")),
    Row("PR.3", "no out of memory", "none", memory, DRY, f"{PRODUCTION}; make monitor"),
    Row("PR.4", "checkpoints in S3", "uploaded, restorable", saved_in_s3, SAVED),
    Row("PR.5", "MLflow in S3", "read back", tracked_in_s3, TRACKED),
    Row("P4.1", "a later run finds the models", "about 30 s", hit, SYNC),
    Row("P4.2", "the cache is marked when whole", ".complete", marked, SYNC),
    Row("P4.3", "a volume in the run file", "/cache/models", volume, ("render",)),
    Row("P4.4", "monitor: GPUs, 50 lines, MLflow", "one page", page, ("minitest", "monitor")),
    Row("S1.1", "Dockerfile done", "/app, 5 folders", both(workdir, folders)),
    Row("S1.2", "scripts may be executed", "mode 755", executable(STARTUP, DRYRUN, "scripts/monitor_training.sh")),
    Row("S1.3", "dry run passes", "0 FAIL", no_fail, DRY),
    Row("S2.1", "image builds", "no error", tap(IMAGE), ENGINE),
    Row("S2.2", "image is pushed", "with a login", tap(PULL), ENGINE),
    Row("S2.3", "pulled, and pwd", "/app", tap(PULL), ENGINE),
    Row("S2.4", "image is in ghcr.io", "pushed", named_image, ("render",), "make build push ENV=production"),
    Row("S3.0", "a run is submitted", "one run", submitted, ("submit",)),
    Row("S3.1", "4 GPUs start together", "4 ranks", ranks_predicted, CONFIG, MINITEST),
    Row("S3.2", "FSDP wraps", "on 4 GPUs", wrapped, SAVED, MINITEST),
    Row("S3.3", "training goes on", "Step N/M", steps, MINI, f"{MINITEST}; make logs"),
    Row("S3.4", "no out of memory", "none", memory, DRY, f"{MINITEST}; make monitor"),
    Row("S3.5", "total time", "< 10 min", under_ten_minutes, MINI, f"{MINITEST}; {REPORT}"),
    Row("S4.0", "a deploy tells what it will do", "every change", rehearsed, ("deploy",)),
    Row("S4.1", "models downloaded", "63 GB, about 5 min", reckoned, SYNC, f"{PRODUCTION}; {REPORT}"),
    Row("S4.2", "one vocabulary", "32000", one_vocabulary, ("models", "vocab"), f"{PRODUCTION}; make logs"),
    Row("S4.3", "stable for hours", "no out of memory", memory, DRY, "make monitor RUN_ID=… FOLLOW=1"),
    Row("S4.4", "MLflow in S3", "s3://wmtp/mlruns", tracked_in_s3, TRACKED, "make mlflow FROM=s3://wmtp/mlruns"),
    Row("S4.5", "checkpoints in S3", "restorable", saved_in_s3, SAVED, "make verify-checkpoint RUN_ID=…"),
    Row("S4.6", "the log has the words searched for", "Download, Step", searched_words, MINI),
    Row("S4.7", "the log of a submitted run", "make logs", followed, ("submit",)),
    Row("S4.8", "all stages of a deploy", "to the tenth step", tap(DEPLOYED), ENGINE),
    Row("R.1", "path alignment", "Dockerfile = settings", both(workdir, app_paths), CONFIG),
    Row("R.2", "model download", "about 5 min (63 GB)", reckoned, SYNC, f"{PRODUCTION}; {REPORT}"),
    Row("R.3", "distributed start", "4 GPU FSDP", both(two_ranks, wrapped), SAVED, MINITEST),
    Row("R.4", "training starts", "no out of memory", both(steps, memory), (*MINI, *DRY), MINITEST),
    Row("R.5", "MLflow tracking", "kept in S3", tracked_in_s3, TRACKED),
    Row("R.6", "whole deployment", "< 3 h", under_ten_minutes, MINI, f"{PRODUCTION}; {REPORT}"),
    Row("R.7", "the completion report", "filled from facts", report, ("minitest", "report")),
)
# In the order of collection: what another needs comes before it.
# fmt: off
ORDER = (
    "models", "config", "minitest_config", "render", "vocab", "sync", "submit", "deploy", "test", "dryrun", "minitest",
    "checkpoint", "mlflow", "monitor", "report", "engine",
)
# fmt: on


@dataclass
class Verdict:
    state: str
    measured: str

    @property
    def plain(self) -> str:
        """One line that fits a cell."""
        return " ".join(self.measured.replace("|", "/").split())[:240]


def judge(row: Row, evidence: Evidence) -> Verdict:
    try:
        measured = row.check(evidence)
    except Unchecked as why:
        return Verdict("not checked", str(why))
    except Exception as error:
        # A check that stumbles has not seen what it should.
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Verdict("FAIL", f"{kind}{error}")
    if row.command:
        return Verdict("cluster", f"{measured}; there: {row.command}")
    return Verdict("ok", measured)


def chosen(ids: Sequence[str]) -> list[Row]:
    """The rows of these rows' or sections' ids, all where none is named. Raises SystemExit for an unknown one."""
    unknown = set(ids) - {row.id for row in ROWS} - set(SECTIONS)
    if unknown:
        print(
            f"accept    FAIL  {' '.join(sorted(unknown))}: no such row\n"
            "          rule  an id is a row's or a section's\n"
            "          next  ONLY=P1,S1.2 make acceptance",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return [row for row in ROWS if not ids or row.id in ids or row.id.partition(".")[0] in ids]


def table(rows: list[Row], evidence: Evidence) -> int:
    verdicts = [(row, judge(row, evidence)) for row in rows]
    for key, title in SECTIONS.items():
        mine = [(row, v) for row, v in verdicts if row.id.partition(".")[0] == key]
        if not mine:
            continue
        print(f"## {title}\n")
        cells = [("id", "criterion", "bar", "measured", "state")]
        cells += [(r.id, r.criterion, r.bar, v.plain, v.state) for r, v in mine]
        cells.insert(1, ("---",) * 5)
        # What was measured goes last, and unpadded: it is as long as it is.
        widths = [max(len(row[i]) for row in cells) for i in (0, 4, 1, 2)]
        for row in cells:
            padded = [row[i].ljust(width) for i, width in zip((0, 4, 1, 2), widths, strict=True)]
            print(f"| {' | '.join(padded)} | {row[3]} |")
        print()
    count = [sum(v.state == state for _, v in verdicts) for state in ("ok", "cluster", "not checked", "FAIL")]
    print(f"{count[0]} ok, {count[1]} need the cluster, {count[2]} not checked, {count[3]} FAIL")
    return 1 if count[3] else 0


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["needs"]:
        wanted = {name for row in chosen(argv[1:]) for name in row.needs}
        print(*(name for name in ORDER if name in wanted), sep="\n")
        return 0
    if argv[:1] == ["table"] and len(argv) > 1:
        return table(chosen(argv[2:]), Evidence(Path(argv[1])))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
