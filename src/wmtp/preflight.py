"""The dry run: what can be known to fail is found here, on a laptop, without importing torch.

    python -m wmtp.preflight --env production --config F --recipe F [--recipe F …] [--set a.b=c …]
                             [--revision R] [--receipt-dir D] [--only 1,memory,…] [--json] [--offline]
                             [--verbose] [--brief]

Five headings; each line is `ok`, `warn`, `FAIL` or `not checked (why)`, and all findings are shown. What needs torch
(memory, models, tokenizers, data, the twin) runs meanwhile in a child, `wmtp.preflight_torch`.
Standard output carries the JSON with `--json`, else nothing. Exit codes: 0 no `FAIL`, 2 otherwise.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wmtp import config as settings
from wmtp import registry, runfile
from wmtp.paths import PathResolver
from wmtp.registry import weighs_by_value

ROOT = Path(__file__).resolve().parents[2]
WORK_FOLDER = "/app"
IMAGE_FOLDERS = ("models", "datasets", "checkpoints", "mlruns", "logs")
OK, WARN, FAIL, NOT = "ok", "warn", "FAIL", "not checked"
HEADINGS = ("configuration", "paths", "registry", "distributed", "pipeline")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
QUICK_CHECKS = ("configuration", "paths", "registry", "devices", "reward")
TORCH_CHECKS = ("models", "tokenizers", "data", "memory", "twin")
OF_HEADING = {1: {"configuration"}, 2: {"paths"}, 3: {"registry"}, 4: {"devices", "memory"}}
OF_HEADING[5] = {*QUICK_CHECKS, *TORCH_CHECKS} - set().union(*OF_HEADING.values())
PLANNED = {  # what the plan names, whether or not this recipe uses it
    "trainer": ("baseline-mtp", "rho1-wmtp", "critic-wmtp"),
    "optimizer": ("adamw",),
    "loader": ("standardized-model-loader",),
    "tokenizer": ("hf-sentencepiece", "hf-transformers"),
}
GPU_MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141, "L40S": 48, "A10G": 24, "V100": 32, "T4": 16}
RATE_MOST = 0.1  # AdamW moves each weight by about the rate: larger ones diverge
RATE_TUNED = 1e-3  # and those of a pretrained model sooner
NO_BF16 = ("V100", "T4", "P100")
PRESET_GPUS = {"gpu-a100-80g-small": 1, "gpu-a100-80g-medium": 2, "gpu-a100-80g-large": 4}


@dataclass(frozen=True)
class Finding:
    heading: int
    verdict: str
    subject: str
    detail: str
    next: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Pair:
    """A configuration and a recipe that load together."""

    config_file: str
    recipe_file: str
    config: Any
    recipe: Any

    @property
    def algo(self) -> str:
        return str(self.recipe.train.algo)

    def image_file(self, kind: str) -> str | None:
        """A file that was named by CONFIG or RECIPE, as the image has it. Raises runfile.Refused for another place."""
        file = self.config_file if kind == "config" else self.recipe_file
        return runfile.of_image(kind.upper(), str(found_at(file)), bool(os.environ.get(kind.upper())))


def file_uris(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every `file://` of resolved settings as (dotted key, URI)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from file_uris(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value.startswith("file://"):
            yield prefix + key, value


# ---- 1: configuration ----------------------------------------------------------------------------


def check_configuration(
    config_file: str, recipe_files: list[str], overrides: list[str], env: str
) -> tuple[list[Finding], list[Pair], list[dict[str, Any]]]:
    findings: list[Finding] = []
    pairs: list[Pair] = []
    resolved: list[dict[str, Any]] = []
    told: list[Any] = []
    for recipe_file in recipe_files:
        try:
            config, recipe = settings.load_pair(found_at(config_file), found_at(recipe_file), overrides, env=env)
        except settings.ConfigError as error:
            for wrong in error.findings:
                if wrong not in told:  # a mistake of the configuration is the same with each recipe
                    told.append(wrong)
                    place = f"{wrong.place} {wrong.key}".strip()
                    if wrong.place.startswith("--set "):
                        place = wrong.place
                    findings.append(Finding(1, FAIL, place, wrong.what, wrong.next, wrong.rule))
            continue
        except OSError as error:
            findings.append(Finding(1, FAIL, str(error.filename), f"can't be read: {error.strerror}"))
            continue
        pairs.append(Pair(config_file, recipe_file, config, recipe))
        values = settings.flat(settings.resolved(config, recipe))
        origin = {**settings.origins(config), **settings.origins(recipe)}
        rows = [{"key": key, "value": value, "from": source(origin, bare(key))} for key, value in values.items()]
        resolved.append({"config": config_file, "recipe": recipe_file, "keys": rows})
        counts = Counter("default" if r["from"] == "default" else "named" for r in rows)
        for key in ("optim.lr", "pretrain.lr", "critic.value_lr"):
            tuned = env == "production" and key == "optim.lr"
            rate = values[f"recipe.{key}"]
            if rate > (most := RATE_TUNED if tuned else RATE_MOST):
                told_as = f"{rate:g} is larger than what trains{' a pretrained model' if tuned else ''}"
                rule = f"a rate is at most {most:g}"
                findings.append(Finding(1, WARN, key, told_as, f"--set {key}={most / 50:g}", rule))
        variables = sorted({n for r in rows for n in named_variables(r["from"])})
        findings.append(
            Finding(
                1,
                OK,
                f"{config_file} + {recipe_file}",
                f"{len(rows)} keys, {counts['default']} by default"
                + (f", from the environment: {', '.join(variables)}" if variables else ""),
            )
        )
    return findings, pairs, resolved


def source(origin: Mapping[str, str], key: str) -> str:
    """Where a value came from; an entry of a mapping (`paths.datasets.x`) came with its mapping."""
    while key not in origin and "." in key:
        key = key.rpartition(".")[0]
    return origin.get(key, "default")


def named_variables(place: str) -> list[str]:
    """The environment variables that a source names and that are set."""
    return [name for name in re.findall(r"\b[A-Z][A-Z0-9_]+\b", place) if os.environ.get(name)]


def found_at(file: str) -> Path:
    """As it was named where that exists (so that messages say it so), else in the repository."""
    return Path(file) if Path(file).exists() else ROOT / file


def bare(key: str) -> str:
    """The key as a file has it: the resolved result puts the two files under a name each."""
    head, _, rest = key.partition(".")
    return rest if head in ("config", "recipe") else key


# ---- 2: paths ------------------------------------------------------------------------------------


def check_paths(pair: Pair) -> Iterator[Finding]:
    config = pair.config
    cluster = config.launcher.target != "local"
    tree = settings.resolved(config, pair.recipe)
    outside = inside = 0
    for key, uri in file_uris(tree):
        path = uri.removeprefix("file://")
        if cluster and not (path + "/").startswith(WORK_FOLDER + "/"):
            outside += 1
            yield Finding(
                2,
                FAIL,
                bare(key),
                f"{uri} is outside {WORK_FOLDER}; in the image only {WORK_FOLDER} is ours",
                f"name a folder file://{WORK_FOLDER}/…",
            )
        inside += 1
    if not outside:
        where = f"lie under {WORK_FOLDER}" if cluster else "resolve"
        yield Finding(2, OK, "file:// paths", f"all {inside} {where}")

    for role, uri in settings.needed_models(config, pair.recipe).items():
        kind, path = PathResolver().resolve(uri)
        name = Path(path).name
        target = PathResolver().resolve(f"file://{WORK_FOLDER}/models/{name}")[1]
        if kind != "file" or not cluster:
            continue
        if Path(path) != Path(target):
            yield Finding(
                2,
                FAIL,
                f"paths.models.{role}",
                f"{path} is not where the sync puts {name}: {target}",
                f"paths.models.{role}: file://{WORK_FOLDER}/models/{name}",
            )
        else:
            yield Finding(2, OK, f"paths.models.{role}", f"{path}, where the sync puts {name}")
    yield from check_dockerfile(ROOT / "Dockerfile")
    yield from check_run_file(ROOT / "docker" / "vessl.yaml")
    yield from check_buckets(pair)
    if config.launcher.target == "vessl":
        yield from check_cache(pair, ROOT / "docker" / "vessl.yaml")
        yield check_rendered(pair)


def check_dockerfile(file: Path) -> Iterator[Finding]:
    if not file.is_file():
        yield Finding(2, FAIL, "Dockerfile", "is not here", f"git checkout {file.name}")
        return
    text = file.read_text()
    folders = re.findall(r"(?im)^\s*WORKDIR\s+(\S+)", text)
    if not folders or folders[-1] != WORK_FOLDER:
        yield Finding(
            2,
            FAIL,
            "Dockerfile",
            f"WORKDIR is {folders[-1] if folders else 'not set'}, the configurations say {WORK_FOLDER}",
            f"WORKDIR {WORK_FOLDER}",
        )
    else:
        yield Finding(2, OK, "Dockerfile", f"WORKDIR {WORK_FOLDER}")
    missing = [f for f in IMAGE_FOLDERS if not re.search(rf"{WORK_FOLDER}/(\{{[^}}]*)?\b{f}\b", text)]
    if missing:
        yield Finding(2, FAIL, "Dockerfile", f"makes no {WORK_FOLDER}/{missing[0]}", f"mkdir: {', '.join(missing)}")
    users = re.findall(r"(?im)^\s*USER\s+(\S+)", text)
    if not users or users[-1].partition(":")[0] in ("root", "0"):
        yield Finding(
            2,
            FAIL,
            "Dockerfile",
            f"USER is {users[-1] if users else 'not set'}",
            "USER 10001:10001",
            "nothing runs as root",
        )
    copied = {word.strip("/") for line in re.findall(r"(?im)^\s*COPY\s+(.+)$", text) for word in line.split()}
    gone = [name for name in ("src", "scripts", "docker", "configs", "datasets") if name not in copied]
    if gone:
        yield Finding(
            2,
            FAIL,
            "Dockerfile",
            f"copies no {gone[0]}",
            f"COPY {' '.join(gone)}",
            "the image has what the run file starts",
        )


def check_run_file(file: Path) -> Iterator[Finding]:
    start = f"{WORK_FOLDER}/docker/vessl_startup.sh"
    if not file.is_file():
        yield Finding(2, FAIL, "docker/vessl.yaml", "is not here", "git checkout docker/vessl.yaml")
    elif start not in file.read_text():
        yield Finding(2, FAIL, "docker/vessl.yaml", f"does not start {start}", f"exec bash {start}")
    else:
        yield Finding(2, OK, "docker/vessl.yaml", f"starts {start}")


def check_buckets(pair: Pair) -> Iterator[Finding]:
    """One bucket for everything: what a stage reads from the environment wins over the configuration, on both sides."""
    config = pair.config
    rule = "models, checkpoints and MLflow of a run are in one bucket"
    named = {"storage.bucket": config.storage.bucket}
    for key, uri in settings.flat(settings.resolved(config, pair.recipe)).items():
        if isinstance(uri, str) and uri.startswith("s3://"):
            named[bare(key)] = uri.removeprefix("s3://").partition("/")[0]
    if os.environ.get("S3_BUCKET_NAME"):
        named["S3_BUCKET_NAME"] = os.environ["S3_BUCKET_NAME"]
    others = {key: bucket for key, bucket in named.items() if bucket != config.storage.bucket}
    if others:
        told = ", ".join(f"{key}: {bucket}" for key, bucket in others.items())
        yield Finding(
            2,
            FAIL,
            "bucket",
            f"storage.bucket is {config.storage.bucket}, but {told}",
            "write ${S3_BUCKET_NAME:-…} in each",
            rule,
        )
    else:
        yield Finding(2, OK, "bucket", f"{config.storage.bucket}, in all of {', '.join(named)}")
    for name, key, value in (
        ("AWS_DEFAULT_REGION", "storage.region", config.storage.region),
        ("AWS_REGION", "storage.region", config.storage.region),
        ("S3_ENDPOINT_URL", "storage.endpoint", config.storage.endpoint),
    ):
        set_here = os.environ.get(name)
        if set_here and value and set_here != value:
            yield Finding(
                2,
                FAIL,
                key,
                f"{value}, but {name}={set_here} is set",
                f"unset {name}, or make the two agree",
                "all stages ask the same place",
            )


def check_cache(pair: Pair, file: Path) -> Iterator[Finding]:
    """The models' cache must be the folder where the run file mounts the volume."""
    mounts = re.findall(r"(?m)^  (/\S+): \$\{VOLUME\}", file.read_text()) if file.is_file() else []
    cache, volume = pair.config.storage.cache_dir, pair.config.launcher.volume
    if not volume:
        yield Finding(2, OK, "storage.cache_dir", f"{cache}; no launcher.volume: each run syncs all of its models")
    elif cache not in mounts:
        where = ", ".join(mounts) or "nowhere"
        yield Finding(
            2,
            FAIL,
            "storage.cache_dir",
            f"{cache}, but {file.name} mounts the volume at {where}",
            f"storage.cache_dir: {mounts[0] if mounts else '/cache/models'}",
            "what is synced is kept on the volume",
        )
    else:
        yield Finding(2, OK, "storage.cache_dir", f"{cache}, where {file.name} mounts {volume}")


def check_rendered(pair: Pair) -> Finding:
    """The run file as submit would render it, name and digest apart."""
    digest = "registry.invalid/wmtp@sha256:" + "0" * 64
    try:
        runfile.render(
            pair.config,
            pair.recipe,
            env="production",
            run_name="dry-run",
            image=digest,
            revision="0000000",
            config_file=pair.image_file("config"),
            recipe_file=pair.image_file("recipe"),
            max_hours=os.environ.get("MAX_HOURS") or None,
            endpoint=runfile.endpoint_of(pair.config, reached_from_here=False),
        )
    except runfile.Refused as refused:
        what, *rest = str(refused).splitlines()
        following = [line.removeprefix("next").strip() for line in rest if line.startswith("next")]
        return Finding(2, FAIL, "run file", what, following[-1] if following else "")
    return Finding(2, OK, f"run file {pair.algo}", "fills docker/vessl.yaml, fits docker/run.schema.json")


# ---- 3: registry ---------------------------------------------------------------------------------


def check_registry(pairs: list[Pair]) -> Iterator[Finding]:
    keys = settings.all_keys(settings.Recipe)
    for kind, planned in PLANNED.items():
        table = getattr(registry, f"{kind}_registry")
        wanted = [*planned, *table]
        if kind == "trainer":
            wanted += [pair.algo for pair in pairs]
        elif kind == "optimizer":
            wanted += [pair.recipe.optim.optimizer for pair in pairs]
        for name in dict.fromkeys(wanted):
            if not table.is_registered(name):
                yield Finding(
                    3,
                    FAIL,
                    f"{kind} {name}",
                    "is not registered",
                    f"one line in src/wmtp/registry.py, {kind}_registry",
                )
                continue
            if table.definition(name) is None:
                yield Finding(
                    3, FAIL, f"{kind} {name}", f"stands for {table[name]}, which is not defined there, or not in Python"
                )
            elif kind == "trainer" and (why := unusable(name, keys)):
                yield Finding(3, FAIL, f"{kind} {name}", why, f"change the keywords of {table[name]}")
            else:
                yield Finding(3, OK, f"{kind} {name}", table[name])


def unusable(algo: str, keys: Iterable[str]) -> str:
    """Why a trainer's function can't be called with what there is, or with a recipe's ``keys``; empty where it can."""
    asked = registry.asked_by(algo)
    if strange := sorted(asked - registry.MADE.keys() - registry.KEYS.keys()):
        there = ", ".join([*registry.MADE, *registry.KEYS])
        own = "(registry.KEYS, where a setting of its own is a line)"
        return f"asks for {', '.join(strange)}; what there is: {there} {own}"
    for name in sorted(asked & registry.KEYS.keys()):
        if registry.KEYS[name] not in keys:
            return f"asks for {name}, by registry.KEYS the recipe's {registry.KEYS[name]}: no recipe has that key"
    if {"ref_aligned", "delta_aligned"} <= asked:
        return "asks for ref_aligned and for delta_aligned: a run has one scorer"
    return ""


# ---- 4: distributed ------------------------------------------------------------------------------


def ranks_of(config: Any) -> int:
    """Processes that a run starts."""
    return max(1, config.launcher.resources.gpus) if config.devices.distributed.enabled else 1


def check_distributed(pair: Pair) -> Iterator[Finding]:
    devices, resources = pair.config.devices, pair.config.launcher.resources
    train = pair.recipe.data.train
    backend, device = devices.distributed.backend, devices.compute_backend
    ranks = ranks_of(pair.config)
    if devices.distributed.enabled:
        fits = {"cuda": ("nccl", None), "cpu": ("gloo", None), "auto": ("nccl", "gloo", None)}
        if backend not in fits.get(device, ()):
            yield Finding(
                4,
                FAIL,
                "backend",
                f"devices.distributed.backend: {backend} can't serve compute_backend: {device}",
                "nccl for cuda, gloo for cpu; mps has one device only",
            )
        else:
            yield Finding(4, OK, "backend", f"{backend or 'by device'} on {device}")
    if ranks > 1 and not devices.fsdp.enabled:
        yield Finding(
            4,
            FAIL,
            "sharding",
            f"devices.fsdp.enabled: false with {ranks} ranks; ranks share one model through FSDP",
            "devices.fsdp.enabled: true",
        )
    elif ranks > 1:
        yield Finding(4, OK, "sharding", f"{devices.fsdp.sharding} over {ranks} ranks")
    else:
        yield Finding(4, OK, "sharding", "one rank: nothing to share")
    if devices.mixed_precision == "bf16" and device == "cuda" and resources.gpu_type in NO_BF16:
        yield Finding(4, FAIL, "precision", f"{resources.gpu_type} has no bf16", "devices.mixed_precision: fp32")
    else:
        yield Finding(4, OK, "precision", f"{devices.mixed_precision} on {device}")

    preset = pair.config.launcher.preset
    if pair.config.launcher.target != "vessl":
        pass
    elif preset not in PRESET_GPUS:
        yield Finding(4, NOT, "preset", f"{preset or 'none named'}: its number of GPUs is not known here")
    elif PRESET_GPUS[preset] != resources.gpus:
        yield Finding(
            4,
            FAIL,
            "preset",
            f"{preset} has {PRESET_GPUS[preset]} GPUs, launcher.resources.gpus is {resources.gpus}",
            "make the two agree",
        )
    else:
        yield Finding(4, OK, "preset", f"{preset}: {resources.gpus} x {resources.gpu_type}")

    rows = train.batch_size * ranks * pair.recipe.train.accumulation_steps
    yield Finding(
        4,
        OK,
        f"batch {pair.algo}",
        f"{rows} rows of {train.max_length}: {rows * train.max_length} tokens per step at most"
        f" ({train.batch_size} x {ranks} ranks x {pair.recipe.train.accumulation_steps})",
    )


# ---- 5: pipeline ---------------------------------------------------------------------------------


class TorchChecks:
    """`python -m wmtp.preflight_torch` in a child, which imports torch while the other checks run."""

    WAIT_S = 600

    def __init__(self, args: argparse.Namespace, recipes: list[str], only: set[str]) -> None:
        self.child: subprocess.Popen[str] | None = None
        self.left_out = bool(recipes) and "twin" in only and os.environ.get("TWIN") == "0"
        wanted = [name for name in TORCH_CHECKS if name in only and not (name == "twin" and self.left_out)]
        if not recipes or not wanted:
            return
        # It dies with this process, whatever kills that.
        tied = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        command = [*tied, sys.executable, "-m", "wmtp.preflight_torch"]
        command += ["--config", str(found_at(args.config)), "--env", args.env]
        command += [word for recipe in recipes for word in ("--recipe", str(found_at(recipe)))]
        command += [word for override in args.overrides for word in ("--set", override)]
        command += ["--only", ",".join(wanted)]
        command += [f"--{name}" for name in ("offline", "verbose") if getattr(args, name)]
        self.folder = tempfile.TemporaryDirectory(prefix="wmtp-dryrun-")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": self.folder.name}
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def close(self) -> None:
        """End the child, if it still lives, and remove what it left."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.folder.cleanup()

    def findings(self) -> Iterator[Finding]:
        if self.left_out:
            yield Finding(5, NOT, "twin", "TWIN=0 leaves it out")
        if self.child is None:
            return
        try:
            out, err = self.child.communicate(timeout=self.WAIT_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            out, err = self.child.communicate()
            err = f"no end within {self.WAIT_S} s"
        for line in out.splitlines():
            if line.startswith("{"):
                yield Finding(**json.loads(line))
        if self.child.returncode:
            last = err.strip().splitlines()[-1:] or ["no word"]
            following = "python -m wmtp.preflight_torch, with the same arguments"
            yield Finding(5, FAIL, "the checks with torch", f"they died: {last[0][:200]}", following)


def check_discount(pair: Pair) -> Finding:
    """A reward at the end of a long row must still be seen at its beginning."""
    gamma, length = pair.recipe.critic.gamma, pair.recipe.data.train.max_length
    left = gamma**length
    subject = "critic.gamma"
    if left < 0.1:
        what = f"{gamma} over {length} tokens leaves {left:.1e} of the reward at a row's first token"
        return Finding(5, WARN, subject, what, "critic.gamma: 1.0")
    return Finding(5, OK, subject, f"{gamma} over {length} tokens leaves {left:.2g} of the reward")


def here(uri: str) -> Path | None:
    """The folder that the image will have as `uri`, as far as this machine has it."""
    kind, path = PathResolver().resolve(uri)
    if kind != "file":
        return None
    in_repository = ROOT / uri.removeprefix(f"file://{WORK_FOLDER}/")
    for folder in (Path(path), in_repository):
        if folder.is_dir():
            return folder
    return None


# ---- what a person sees --------------------------------------------------------------------------


def colours() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return sys.stderr.isatty() and not plain


def columns() -> int | None:
    """Columns to wrap at: the terminal's, or COLUMNS; None where nobody looks (a pipe, a log)."""
    if not sys.stderr.isatty() and "COLUMNS" not in os.environ:
        return None
    return max(60, shutil.get_terminal_size((80, 24)).columns)


def wrapped(text: str, width: int | None, indent: int) -> str:
    """Lines of `text` within `width`, each but the first indented."""
    lines = text.strip().splitlines() or [""]
    if width is not None:
        room = max(20, width - indent)
        lines = [part for line in lines for part in textwrap.wrap(line, room, break_on_hyphens=False) or [""]]
    return ("\n" + " " * indent).join(lines)


def show(findings: list[Finding], resolved: list[dict[str, Any]], every_value: bool, headings: Iterable[int]) -> None:
    tint = {OK: "32", WARN: "33", FAIL: "31", NOT: "2"} if colours() else {}
    width = columns()
    name = 28 if width is None or width >= 110 else 20
    for number in headings:
        say(f"{number}/5 {HEADINGS[number - 1]}")
        for finding in (f for f in findings if f.heading == number):
            word = f"{finding.verdict:<12}"
            if finding.verdict in tint:
                word = f"\033[{tint[finding.verdict]}m{word}\033[0m"
            start = f"{finding.subject:<{name}} "
            if len(start) > name + 1 and width is not None:
                start += "\n" + " " * (15 + name + 1)  # a long name has a line of its own
            say(f"  {word} {start}{wrapped(finding.detail, width, 15 + name + 1)}".rstrip())
            for label, text in (("rule", finding.rule), ("next", finding.next)):
                if text and (label == "next" or finding.verdict in (FAIL, WARN)):
                    say(f"               {label}  {wrapped(text, width, 21)}")
        if number == 1 and every_value:
            for row in (row for pair in resolved for row in pair["keys"]):
                text = f"{bare(row['key'])}: {shown(row['value'])}  ({row['from']})"
                say(f"               {wrapped(text, width, 19)}")
        elif number == 1 and resolved:
            say("               each value and its source: name one ALGO, or --json")


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def say_again(finding: Finding, *more: tuple[str, str]) -> None:
    """A finding in short, for a list at the end."""
    text = f"{finding.subject}: {finding.detail.splitlines()[0]}"
    text += "".join(f"; {name}: {value}" for name, value in more if value)
    say(f"               {wrapped(text, columns(), 17)}")


def unique(findings: list[Finding]) -> list[Finding]:
    """Three recipes share a configuration: what was found once is said once."""
    return list(dict.fromkeys(findings))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wmtp.preflight", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--env", required=True, choices=("test", "minitest", "production"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipe", required=True, action="append")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--revision", default="0000000", help="for the run's name")
    parser.add_argument("--receipt-dir", type=Path, help="where the receipt is written")
    parser.add_argument(
        "--only",
        default=",".join((*QUICK_CHECKS, *TORCH_CHECKS)),
        metavar="LIST",
        help=f"headings by number or name, or of {', '.join((*QUICK_CHECKS, *TORCH_CHECKS))}",
    )
    parser.add_argument("--json", action="store_true", help="the findings on standard output")
    parser.add_argument("--offline", action="store_true", help="no bucket is meant to be asked")
    parser.add_argument("--verbose", action="store_true", help="with a decoded sample of the data")
    parser.add_argument("--brief", action="store_true", help="without each value; the receipt has them")
    args = parser.parse_args(argv)
    args.only = only_of(args.only)
    return args


def only_of(text: str) -> set[str]:
    """The checks that `--only` names, or the end. The configuration is always one: the others need it."""
    found = {"configuration"}
    for word in text.split(","):
        numbers = {str(n): n for n in OF_HEADING} | {name: n for n, name in enumerate(HEADINGS, 1)}
        if word in numbers:
            found |= OF_HEADING[numbers[word]]
        elif word in (*QUICK_CHECKS, *TORCH_CHECKS):
            found.add(word)
        else:
            known = [*numbers, *QUICK_CHECKS[3:], *TORCH_CHECKS]
            near = difflib.get_close_matches(word, known, 1) or ["models"]
            say(f"dry run   FAIL  --only {text}: {word or 'an empty word'} is no check")
            say(f"          rule  a comma between checks; known are {', '.join(known)}")
            say(f"          next  ONLY={','.join(near[0] if w == word else w for w in text.split(','))}")
            sys.exit(2)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    findings, pairs, resolved = check_configuration(args.config, args.recipe, args.overrides, args.env)
    name, digest = args.env, None
    if len(args.recipe) == 1 and pairs:
        digest = settings.digest(pairs[0].config, pairs[0].recipe)
        name = os.environ.get("RUN_NAME") or (f"{args.env}-{pairs[0].algo}-{args.revision[:7]}-{digest}")
        if not RUN_NAME.fullmatch(name) or name == "latest" or name.isdigit():
            rule = 'letters, digits, ".", "_" and "-", no number and not "latest": it names folders'
            findings.append(Finding(1, FAIL, "RUN_NAME", name, "choose another RUN_NAME", rule))
            name = args.env
    only: set[str] = args.only
    child = TorchChecks(args, [pair.recipe_file for pair in pairs], only)
    atexit.register(child.close)
    if child.left_out:
        only = only - {"twin"}
    algos = ", ".join(p.algo for p in pairs) or "no recipe that loads"
    say(f"dry run   {args.env}, {algos}, revision {args.revision}")
    if pairs and "registry" in only:
        findings += check_registry(pairs)
    for pair in pairs:
        if "paths" in only:
            findings += check_paths(pair)
        if "devices" in only:
            findings += check_distributed(pair)
        if "reward" in only and weighs_by_value(pair.algo):
            findings.append(check_discount(pair))
    asked = [n for n, checks in OF_HEADING.items() if checks & args.only]
    for number in asked[1:]:
        if not pairs:
            findings.append(Finding(number, NOT, HEADINGS[number - 1], "nothing loaded"))
    findings = unique(findings)
    every_value = len(args.recipe) == 1 and not args.brief
    show(findings, [] if args.brief else resolved, every_value, [n for n in asked if n < 4])
    if child.child:
        say(f"          {', '.join(n for n in TORCH_CHECKS if n in only)}: importing torch takes 10 s")
    findings = unique([*findings, *child.findings()])
    show(findings, resolved, False, [n for n in asked if n > 3])
    unproved = [f for f in findings if f.verdict == NOT]
    if pairs and unproved and args.env == "production":
        say("what this dry run could not promise")
        for finding in unproved:
            say_again(finding)
    wrong = [f for f in findings if f.verdict == FAIL]
    if wrong and resolved and len(args.recipe) == 1:  # the lines above may be more than a screen
        say(f"what is wrong ({len(wrong)})")
        for finding in wrong:
            say_again(finding, ("rule", finding.rule), ("next", finding.next))
    counts = Counter(f.verdict for f in findings)
    report = {
        "env": args.env,
        "run": name,
        "revision": args.revision,
        "digest": digest,
        "only": sorted(only) if only != {*QUICK_CHECKS, *TORCH_CHECKS} else None,
        "counts": {verdict: counts[verdict] for verdict in (OK, WARN, NOT, FAIL)},
        "findings": [asdict(f) for f in findings],
        "resolved": resolved,
    }
    text = json.dumps(report, indent=2, default=str) + "\n"
    receipt = ""
    if args.json:
        sys.stdout.write(text)
        sys.stdout.flush()
    if args.receipt_dir:
        folder = args.receipt_dir / name if name != args.env else args.receipt_dir
        try:
            runfile.write_whole(folder / "preflight.json", text)
        except OSError as error:
            say(f"dry run   FAIL  {folder}/preflight.json: {error.strerror}")
            say("          rule  a stage hands its results on there\n          next  make it writable")
            return 10
        receipt = (
            f"receipt {folder}/\n          preflight.json" if columns() else f"receipt {folder / 'preflight.json'}"
        )
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (OK, WARN, NOT, FAIL))
    say(f"dry run   {summary} in {time.monotonic() - began:.1f} s")
    if receipt:
        say(f"          {receipt}")
    return 2 if counts[FAIL] else 0


def ended(number: int, frame: Any) -> None:
    """A signal ends it in one line; what it began ends with it."""
    say(f"\ndry run   FAIL  interrupted ({signal.Signals(number).name})")
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ended)
    sys.exit(main())
