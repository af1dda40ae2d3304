"""A condensed day of delivery, for tests/soak_sync.py --day: operations in random order under random faults and kills.

Syncs of random models to two machines that share a store, publishes (at times two of one name at once), evictions,
checks, and runs that save checkpoints and go on from them elsewhere; up to three at the same time. One may fail with a
code that the table has for it, in bounded time and without a traceback. At the end, the faults gone, every model syncs,
store and bucket verify clean, and no run has lost a step that was told to be in the bucket.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from soak_sync import (
    BOUND_S,
    MARK,
    ROOT,
    Proxy,
    Stage,
    World,
    content,
    left,
    say,
)

KILLED = 0.25  # share of the operations
STALL_S = "2"
CODES = {  # of README's table; a kill may come before any of them
    "sync": {0, 11, 12, 13},
    "publish": {0, 1, 11, 12, 13},
    "evict": {0, 1},
    "verify": {0, 11, 12, 13},
    "train": {0, 12},
}


def faults(draw: random.Random, kind: str) -> list[str]:
    """What is wrong on the way of one operation; nearly half of the time nothing."""
    key, share = "*.distcp" if kind == "train" else "*.bin", f"503:share=0.3,seed={draw.randrange(1000)}"
    where = f"key={key},method=" + draw.choice({"publish": ["PUT"], "train": ["PUT", "GET"]}.get(kind, ["GET"]))
    passing = [
        [share],
        ["503:first=1"],
        [f"reset:bytes=700000,{where}"],
        [f"truncate:bytes=1000,first={draw.randint(1, 2)},{where}"],
        [f"truncate:bytes=1000,first=1,lowered=1,key={key}"],
        [f"stall:bytes=1000,first=1,{where}"],
        [f"flip:bytes={draw.randint(0, 5000)},first={draw.randint(1, 2)},{where}"],
        ["rate:bytes=1500000"],
        ["rate:bytes=1500000", share, f"flip:bytes=5,first=1,{where}"],
    ]
    # A run that meets these at every try of a good checkpoint gives it up as damaged, as it must.
    lasting = [] if "distcp,method=GET" in where else [[f"truncate:bytes=1000,{where}"], [f"flip:bytes=5,{where}"]]
    return draw.choice([*[[]] * 9, *passing, *lasting, ["503:"]])


def train(folder: str, prefix: str, steps: int, environment: dict[str, str], story: str) -> None:
    """A run, in a process of its own: goes on from the newest checkpoint for so many steps, and uploads them.

    Its weights are a function of the step: what comes back can be judged. Standard output: what it reached.
    """
    os.setsid()
    os.environ |= environment
    for number, path in ((1, Path(story).with_suffix(".out")), (2, Path(story))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    import torch

    from wmtp.checkpoint import Checkpoints
    from wmtp.config import Storage
    from wmtp.outcome import failure

    storage = Storage(retries=3, retry_wait_s=0, stall_s=int(STALL_S), workers=2, part_size_mb=5)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    state: dict[str, int] = {}
    try:
        checkpoints = Checkpoints(Path(folder), prefix, keep_last=2, storage=storage)
        step = checkpoints.resume(model, optimizer, state)
        same = not step or (state["reached"] == step and bool((model.weight == step).all()))
        print("resumed", step, "right" if same else "wrong", flush=True)
        for number in range(step + 1, step + 1 + steps):
            checkpoints.staged()
            with torch.no_grad():
                model.weight.fill_(number)
            checkpoints.save(number, model, optimizer, {"reached": number})
            time.sleep(0.05)
        checkpoints.close()
        print("kept", step + steps, flush=True)
    except Exception as error:
        code, _, _, told = failure(error, 0, None)
        print(told, file=sys.stderr, flush=True)
        os._exit(code)
    os._exit(0)


class Run:
    """A `train` that can be waited for and killed as a `Stage` can."""

    def __init__(self, story: Path, folder: Path, prefix: str, steps: int, environment: dict[str, str]) -> None:
        self.story, self.out = story, story.with_suffix(".out")
        environment = environment | dict([MARK.split("=")])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["soak_day", "torch", "wmtp.outcome"])
        self.process = context.Process(target=train, args=(str(folder), prefix, steps, environment, str(story)))
        self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def code(self, bound: float = BOUND_S) -> int | str:
        self.process.join(bound)
        if self.process.exitcode is None:
            self.kill()
            return f"no end in {bound:.0f} s"
        return int(self.process.exitcode)

    def told(self) -> str:
        return self.story.read_text(errors="replace") if self.story.exists() else ""

    def numbers(self, word: str) -> list[int]:
        """What it said it had resumed or kept."""
        text = self.out.read_text() if self.out.exists() else ""
        return [int(found) for found in re.findall(rf"^{word} (\d+)", text, re.MULTILINE)]


@dataclass
class Operation:
    kind: str
    what: str
    stage: Stage | Run
    proxy: Proxy
    names: list[str] = field(default_factory=list)
    faulty: bool = False
    machine: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """Of a publish: what it publishes."""
    killed: bool = False


class Day:
    def __init__(self, folder: Path, draw: random.Random, token: str) -> None:
        self.folder, self.draw, self.token, self.count = folder, draw, token, 0
        self.worlds = {name: World(folder, draw, name) for name in (f"{token}-{n}" for n in range(3))}
        self.cache = folder / "cache"
        self.source = {name: world.source for name, world in self.worlds.items()}
        self.known = {name: [world.files] for name, world in self.worlds.items()}
        """Every content that was ever to be published."""
        self.now: dict[str, dict[str, str] | None] = {name: world.files for name, world in self.worlds.items()}
        """What is published; None where a publish failed or was killed, or two were at it."""
        self.kept = Counter[str]()
        """The step that a run was told to be in the bucket."""
        self.codes: dict[str, Counter[int | str]] = {kind: Counter() for kind in CODES}
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of what a killed process could not give back

    @property
    def places(self) -> list[Path]:
        """Where everything under a final name is whole at all times."""
        return [self.cache, *(self.app(machine) / "models" for machine in range(2))]

    def app(self, machine: int) -> Path:
        return self.folder / "apps" / str(machine)

    def environment(self, machine: int, proxy: Proxy, **more: str) -> dict[str, str]:
        found = {"WMTP_APP_ROOT": str(self.app(machine)), "WMTP_CACHE_DIR": str(self.cache)}
        found |= {"WMTP_STORAGE_RETRY_WAIT_S": "0", "WMTP_STORAGE_STALL_S": STALL_S}
        return found | {"S3_ENDPOINT_URL": proxy.url} | more

    def story(self, kind: str) -> Path:
        self.count += 1
        return self.folder / "stories" / f"{self.count:04}-{kind}.err"

    # -- operations --------------------------------------------------------------------------------------------

    def begin(self, kind: str) -> Operation:
        words = faults(self.draw, kind)
        story = self.story(kind)
        proxy = Proxy(story.with_suffix(".log"), *words)
        operation: Operation = getattr(self, f"_{kind}")(story, proxy, self.draw.randrange(2))
        operation.faulty = bool(words)
        operation.what += f" [{' '.join(words)}]" if words else ""
        return operation

    def _some(self) -> list[str]:
        return self.draw.sample([*self.worlds], self.draw.randint(1, 3))

    def _sync(self, story: Path, proxy: Proxy, machine: int) -> Operation:
        names, more = self._some(), {}
        if self.draw.random() < 0.2:
            more["WMTP_CACHE_MAX_GB"] = "0.004"
        return self.sync(story, proxy, machine, names, self.environment(machine, proxy, **more))

    def sync(self, story: Path, proxy: Proxy, machine: int, names: list[str], environment: dict[str, str]) -> Operation:
        words = [word for name in names for word in ("--model", name)]
        stage = Stage(story, "sync_models.sh", *words, **environment)
        return Operation("sync", f"sync of {len(names)} to machine {machine}", stage, proxy, names, machine=machine)

    def _publish(self, story: Path, proxy: Proxy, machine: int) -> Operation:
        name, force = self.draw.choice([*self.worlds]), self.draw.random() < 0.8
        source = self.source[name]
        if self.draw.random() < 0.8:
            source = self.folder / f"from-{self.count}" / name
            shutil.copytree(self.source[name], source)
            for path in self.draw.sample(["config.json", "a.bin", "b.bin"], self.draw.randint(1, 2)):
                self.worlds[name].write(source, path)
        return self.publish(story, proxy, name, source, force)

    def publish(self, story: Path, proxy: Proxy, name: str, source: Path, force: bool) -> Operation:
        words = [*(["--force"] if force else []), "--from", str(source.parent), name]
        stage = Stage(story, "publish_models.sh", *words, **self.environment(0, proxy))
        files = content(source)
        if files not in self.known[name]:
            self.known[name].append(files)
        self.source[name] = source
        return Operation("publish", f"publish{' --force' if force else ''}", stage, proxy, [name], files=files)

    def _evict(self, story: Path, proxy: Proxy, machine: int) -> Operation:
        what = self.draw.choice(
            ["unused", "unused", *self.worlds, *(p.name[:12] for p in self.cache.glob("[0-9a-f]*"))]
        )
        stage = Stage(story, "cache.sh", "--evict", what, **self.environment(machine, proxy))
        return Operation("evict", f"eviction of {what} by machine {machine}", stage, proxy)

    def _verify(self, story: Path, proxy: Proxy, machine: int) -> Operation:
        names = self._some()
        stage = Stage(story, "verify_models.sh", *names, **self.environment(machine, proxy))
        return Operation("verify", "check of what is published", stage, proxy, names)

    def _train(self, story: Path, proxy: Proxy, machine: int) -> Operation:
        return self.train(story, proxy, machine, f"run-{self.draw.randrange(2)}", self.draw.randint(1, 4))

    def train(self, story: Path, proxy: Proxy, machine: int, run: str, steps: int) -> Operation:
        folder, prefix = self.app(machine) / "checkpoints" / run, self.prefix(run)
        stage = Run(story, folder, prefix, steps, self.environment(machine, proxy))
        return Operation("train", f"{run}, {steps} steps on machine {machine}", stage, proxy, [run], machine=machine)

    def prefix(self, run: str) -> str:
        return f"s3://{os.environ['S3_BUCKET_NAME']}/checkpoints/{self.token}/{run}"

    # -- what became of them -----------------------------------------------------------------------------------

    def end(self, operation: Operation, together: list[Operation], clean: bool = False) -> list[str]:
        """What is not as it must be after one operation, in the company of others."""
        one, found = operation, list[str]()
        code: int | str = "killed" if one.killed else one.stage.code()
        one.proxy.__exit__()
        self.codes[one.kind][code] += 1
        told = one.stage.told()
        if "Traceback" in told:
            found.append("a traceback")
        if not one.killed and code not in ({0} if clean else CODES[one.kind]):
            found.append(f"ended with {code}: {' / '.join(told.strip().splitlines()[-3:])}")
        others = {name for other in together if other is not one and other.kind == "publish" for name in other.names}
        disturbed = others & set(one.names)
        if one.kind == "publish":
            self._published(one, code, bool(disturbed))
        if one.kind == "sync" and code == 0:
            for name in one.names:
                files, now = content(self.app(one.machine) / "models" / name), self.now[name]
                if files not in self.known[name] or (now is not None and not disturbed and files != now):
                    found.append(f"{name}: other bytes than were published")
        certain = not one.faulty and not disturbed and all(self.now.get(name) is not None for name in one.names)
        if one.kind in ("sync", "verify") and certain and not one.killed and code:
            found.append(f"nothing was wrong, and it ended with {code}")
        if isinstance(one.stage, Run):
            (run,) = one.names
            if any(step < self.kept[run] for step in one.stage.numbers("resumed")):
                found.append(f"went on after {one.stage.numbers('resumed')}, {self.kept[run]} was kept")
            if "wrong" in (one.stage.out.read_text() if one.stage.out.exists() else ""):
                found.append("other weights than were saved")
            self.kept[run] = max([self.kept[run], *one.stage.numbers("kept")])
        return [f"{one.what}: {text}" for text in found]

    def _published(self, one: Operation, code: int | str, disturbed: bool) -> None:
        (name,) = one.names
        if code == 0 and not disturbed:
            self.now[name] = one.files
        elif disturbed or code not in (1, 13) or "--force" in one.what:
            self.now[name] = None

    def batch(self) -> list[Operation]:
        """Up to three at the same time; a run is on one machine at a time."""
        weights = {"sync": 9, "publish": 6, "evict": 3, "verify": 2, "train": 4}
        kinds = self.draw.choices([*weights], [*weights.values()], k=self.draw.choice([1, 1, 2, 3]))
        if not (ROOT / "scripts/verify_models.sh").exists():
            kinds = ["sync" if kind == "verify" else kind for kind in kinds]
        if kinds.count("train") > 1:
            kinds = ["train", *(kind for kind in kinds if kind != "train")]
        begun = [self.begin(kind) for kind in kinds]
        moments = sorted((self.draw.uniform(0, 2), n) for n in range(len(begun)) if self.draw.random() < KILLED)
        began = time.monotonic()
        for moment, n in moments:
            time.sleep(max(began + moment - time.monotonic(), 0))
            if begun[n].stage.alive():
                begun[n].killed = True
                begun[n].stage.kill()
        return begun

    def rounds(self, count: int) -> Iterator[tuple[str, list[str]]]:
        done = told = 0
        began = time.monotonic()
        while done < count:
            begun = self.batch()
            # The publishes first: what the others may have seen follows from how they ended.
            ended = [(one, self.end(one, begun)) for one in sorted(begun, key=lambda one: one.kind != "publish")]
            remains = left()
            for one, problems in ended:
                yield one.what, problems + ([f"processes were left: {remains}"] if remains else [])
            done += len(begun)
            if done // 20 > told or done >= count:
                told = done // 20
                say(f"operation {done}/{count}, {time.monotonic() - began:.0f} s; {self.tellcodes()}")
        yield from self.evening()

    def tellcodes(self) -> str:
        return ", ".join(
            f"{kind} " + " ".join(f"{code}:{n}" for code, n in sorted(codes.items(), key=str))
            for kind, codes in self.codes.items()
            if codes
        )

    # -- at the end --------------------------------------------------------------------------------------------

    def evening(self) -> Iterator[tuple[str, list[str]]]:
        """The faults are gone: the same commands again, and all is there, whole and clean."""
        for name in self.worlds:
            story = self.story("publish")
            one = self.publish(story, Proxy(story.with_suffix(".log")), name, self.source[name], True)
            yield "publish at the end", self.end(one, [one], clean=True)
        for machine, cache in ((0, self.cache), (1, self.cache), (2, self.folder / "cold")):
            cache.mkdir(exist_ok=True)
            story = self.story("sync")
            proxy = Proxy(story.with_suffix(".log"))
            more = self.environment(machine, proxy, WMTP_CACHE_DIR=str(cache))
            one = self.sync(story, proxy, machine, [*self.worlds], more)
            yield "sync at the end", self.end(one, [one], clean=True)
        story = self.story("evict")
        proxy = Proxy(story.with_suffix(".log"))
        stage = Stage(story, "cache.sh", "--evict", "unused", **self.environment(0, proxy))
        yield "eviction at the end", self.end(Operation("evict", "eviction", stage, proxy), [], clean=True)
        yield "the store is clean", self.store()
        yield "the bucket is clean", self.bucket()
        for run in [run for run in self.kept if self.kept[run]]:
            story = self.story("train")
            one = self.train(story, Proxy(story.with_suffix(".log")), 2, run, 1)
            yield f"{run} goes on elsewhere", self.end(one, [one], clean=True)

    def store(self) -> list[str]:
        """What is not whole, or nobody's, on the two machines and in their store."""
        told = half_written(str(self.cache), str(self.folder / "apps"))
        linked = {link.resolve().name for machine in range(2) for link in (self.app(machine) / "models").iterdir()}
        known = {f".staging/{path.name}" for path in self.cache.glob(".staging/*.lock")}
        known |= {".staging", ".used", *(f"{digest}" for digest in linked), *(f".used/{digest}" for digest in linked)}
        here = [*self.cache.iterdir(), *self.cache.glob(".staging/*"), *self.cache.glob(".used/*")]
        names = {path.relative_to(self.cache).as_posix() for path in here}
        links = {path.name for machine in range(2) for path in (self.app(machine) / "models").iterdir()}
        told += [f"left in the store: {name}" for name in sorted(names - known)]
        return told + [f"left under models: {name}" for name in sorted(links - {".manifests", *self.worlds})]

    def bucket(self) -> list[str]:
        """What is not whole, or in no manifest, under the names of this day."""
        told = half_written("--bucket", f"models/{self.token}", f"checkpoints/{self.token}")
        for name, world in self.worlds.items():
            command = ["aws", "--endpoint-url", os.environ["S3_ENDPOINT_URL"], "s3api", "list-objects-v2", "--bucket"]
            command += [os.environ["S3_BUCKET_NAME"], "--prefix", f"models/{name}/", "--query", "Contents[].Key"]
            keys = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            there = {key.removeprefix(f"models/{name}/") for key in keys}
            told += [f"in the bucket, {name}: {path}" for path in sorted(there ^ {*world.sizes, "manifest.json"})]
        return told


def half_written(*words: str) -> list[str]:
    command = [sys.executable, str(ROOT / "tests/half_written.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode < 2 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()
