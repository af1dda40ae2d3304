"""Many kills of the sync, and a condensed day of delivery: whatever is interrupted, what stands is whole and right.

    scripts/bucket.sh run DIR -- python tests/soak_sync.py [--seed 1] [--kills 100 [--kills-only] | --day 200]

A sync's whole process group is killed (-9) at moments drawn from the seed: anywhere in its run, and aimed at what is
short. The next call must end with 0 and the bytes that were published, ask for no file that was proved before, leave no
staging; while a watcher looks all the time at all that stands under a final name. Then several syncs at once, and a
reader beside a sync. --day: tests/soak_day.py. Standard error: the story. Standard output: `N passed, N failed`. Exit
codes: 0 all passed, 1 not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from wmtp.manifest import COMPLETE, MANIFEST, ManifestError, differences, hash_file, load_manifest, plain_file

ROOT = Path(__file__).parent.parent
MARK = f"WMTP_SOAK={uuid.uuid4().hex}"
PHASES = ("start", "transfer", "verification", "promotion", "linking", "end")
LINK = "rate:bytes=4000000"
"""What the wire carries while a kill is on its way, so that a transfer lasts longer than everything else."""
BOUND_S = 120.0


def say(text: str) -> None:
    print(f"soak      {text}", file=sys.stderr, flush=True)


class Proxy:
    """The way to the bucket of one call, or of several: what was asked for on it can't be another call's."""

    def __init__(self, log: Path, *faults: str) -> None:
        self.log, to = log, os.environ["S3_ENDPOINT_URL"]
        log.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "tests/fault_proxy.py"), "--to", to, "--log", str(log), *faults]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def asked(self, name: str) -> Counter[str]:
        """How often each file of a model was asked for."""
        time.sleep(0.1)  # the line of a request is written when it has ended
        lines = map(json.loads, self.log.read_text().splitlines())
        keys = (str(line["key"]) for line in lines if line["method"] == "GET")
        found = Counter(key.removeprefix(f"models/{name}/") for key in keys if key.startswith(f"models/{name}/"))
        del found[MANIFEST]
        return found


class Stage:
    """A script as a process group of its own, with its story in a file."""

    def __init__(self, story: Path, *command: str, **environment: str) -> None:
        self.story, self.out = story, story.with_suffix(".out")
        mark = dict([MARK.split("=")])
        with story.open("w") as err, self.out.open("w") as out:
            self.process = subprocess.Popen(
                [str(ROOT / "scripts" / command[0]), *command[1:]],
                env=os.environ | mark | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def code(self, bound: float = BOUND_S) -> int | str:
        """Its exit code, or what else became of it; beyond ``bound`` seconds it is ended."""
        try:
            return self.process.wait(bound)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"no end in {bound:.0f} s"

    def told(self) -> str:
        return self.story.read_text(errors="replace")


def left() -> list[str]:
    """Processes of any stage that live, after a moment in which the kernel ends them."""
    found: list[str] = []
    for _ in range(50):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " ")[:100])
        if not found:
            break
        time.sleep(0.1)
    return found


def content(folder: Path) -> dict[str, str]:
    """blake3 of each file of a model, by path; read, not believed."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}
    return {path: digest for path, digest in named.items() if path not in (MANIFEST, COMPLETE)}


# ---- the watcher -----------------------------------------------------------------------------------------------------


def wrong(folder: Path, seen: set[tuple[int, int]]) -> str:
    """What is not whole or not right in a folder of the store; its content is read once, its sizes each time."""
    try:
        stat = (folder / COMPLETE).stat()
        manifest = load_manifest(folder / MANIFEST)
        if not (folder / COMPLETE).read_text().strip() == manifest.digest == folder.name:
            return "name, marker and manifest are not of one version"
        for entry in manifest.files:
            path = plain_file(folder, entry.path)
            if path is None or path.stat().st_size != entry.bytes:
                return f"{entry.path} is missing or of another size"
        if (key := (stat.st_ino, stat.st_mtime_ns)) not in seen:
            for what in differences(manifest, folder):
                return what
            seen.add(key)
    except (OSError, ManifestError) as error:
        return str(error)
    return ""


def watch(places: list[Path]) -> None:
    """Until standard input ends: every version in the stores, and every link to one, is whole.

    ``places`` are stores and folders of links. Standard output: a line for each thing that is not, at last a count.
    """
    looks, seen = 0, set[tuple[int, int]]()
    while True:
        looks += 1
        for path in [path for place in places if place.is_dir() for path in place.iterdir()]:
            if not (path.is_symlink() or re.fullmatch(r"[0-9a-f]{64}", path.name)) or path.name.startswith("."):
                continue
            folder = path.resolve()
            with contextlib.suppress(FileNotFoundError):
                was = folder.stat().st_ino
                # What an eviction took away meanwhile is under no name any more; a link may point to the next version.
                if (what := wrong(folder, seen)) and folder == path.resolve() and folder.stat().st_ino == was:
                    print(f"{path}: {wrong(folder, seen) or what}", flush=True)
            if path.is_symlink() and not path.exists() and not path.resolve().exists() and path.is_symlink():
                print(f"{path}: points nowhere", flush=True)
        if select.select([sys.stdin], [], [], 0.01)[0]:
            break
    print(f"{looks} looks, {len(seen)} folders read", flush=True)


class Watcher:
    def __init__(self, *places: Path) -> None:
        command = [sys.executable, __file__, "--watch", *map(str, places)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self) -> list[str]:
        """What was wrong; the last line is the count."""
        return self.process.communicate()[0].splitlines()


# ---- the kills -------------------------------------------------------------------------------------------------------


class World:
    """A model in the bucket, and machines that share a store."""

    def __init__(self, folder: Path, draw: random.Random, name: str) -> None:
        self.folder, self.draw, self.name = folder, draw, name
        self.cache, self.source = folder / "cache", folder / "from" / name
        (self.source / "sub dir").mkdir(parents=True)
        self.cache.mkdir(exist_ok=True)
        self.sizes = {"config.json": 20, "a.bin": 1_900_000, "b.bin": 1_200_000, "sub dir/ü*": 300_000, "empty": 0}
        self.files, self.digest, self.count = dict[str, str](), "", 0
        for path in self.sizes:
            self.write(self.source, path)
        self.publish(change=False)

    def write(self, folder: Path, path: str) -> None:
        """Another content of the same size for one of the files."""
        data = self.draw.randbytes(size := self.sizes[path])
        (folder / path).write_bytes(json.dumps(data.hex()[: size - 2]).encode() if path.endswith(".json") else data)

    def clear(self) -> None:
        """Nothing is here; in one rename each, as an eviction does it."""
        for place in (self.folder / "apps", self.cache):
            with contextlib.suppress(FileNotFoundError):
                place.rename(self.folder / "gone")
                shutil.rmtree(self.folder / "gone")
        self.cache.mkdir()

    def publish(self, change: bool = True) -> None:
        """Another version: some of its files are new."""
        for path in self.draw.sample(["config.json", "a.bin", "b.bin"], self.draw.randint(1, 3)) if change else []:
            self.write(self.source, path)
        stage = Stage(self.story(), "publish_models.sh", "--force", "--from", str(self.source.parent), self.name)
        assert stage.code() == 0, stage.told()
        self.files, self.digest = content(self.source), stage.out.read_text().split()[1]

    def story(self) -> Path:
        self.count += 1
        return self.folder / "stories" / f"{self.name}-{self.count:04}.err"

    def link(self, machine: int = 0) -> Path:
        return self.folder / "apps" / str(machine) / "models" / self.name

    def sync(self, proxy: Proxy, machine: int = 0, **more: str) -> Stage:
        environment = {"WMTP_APP_ROOT": str(self.link(machine).parent.parent), "WMTP_CACHE_DIR": str(self.cache)}
        environment |= {"S3_ENDPOINT_URL": proxy.url, "WMTP_STORAGE_RETRY_WAIT_S": "0"} | more
        return Stage(self.story(), "sync_models.sh", "--model", self.name, **environment)

    @property
    def target(self) -> Path:
        return self.cache / self.digest

    @property
    def staging(self) -> Path:
        return self.cache / ".staging" / f"{self.name}-{self.digest}"

    def proved(self) -> set[str]:
        """blake3 of what has a name in the store or in staging."""
        places = [*self.cache.glob("*/"), *self.cache.glob(".staging/*/files/")]
        return {digest for place in places if place.name != ".staging" for digest in content(place).values()}

    def arrived(self) -> bool:
        """Whether something whole waits for its name."""
        sizes = {entry for entry in self.sizes.values() if entry}
        return any(part.name.isdigit() and part.stat().st_size in sizes for part in (self.staging / "part").glob("*"))

    def phase(self) -> str:
        """Where a killed sync was, by what it left."""
        if self.target.is_dir():
            return "end" if self.link().resolve() == self.target else "linking"
        if not self.staging.is_dir():
            return "start"
        if all((self.staging / "files" / path).is_file() for path in self.sizes):
            return "promotion"
        return "verification" if self.arrived() else "transfer"

    def problems(self, stage: Stage, machine: int = 0, alone: bool = True) -> list[str]:
        """What is not as it must be after a sync that nothing disturbed; ``alone``: nobody else is at it."""
        code, told = stage.code(), stage.told()
        found = [f"ended with {code}"] if code else []
        found += [word for word in ("Traceback", "another sync holds it") if word in told and alone]
        if not found and content(self.link(machine)) != self.files:
            found.append("other bytes under the name")
        if not found and alone and (more := [path.name for path in self.cache.glob(".staging/*/")]):
            found.append(f"staging was left: {more}")
        return found


def kill(world: World, seconds: float) -> tuple[str, list[str]]:
    """One kill, and the call after it: where it fell, and what went wrong."""
    aims: dict[str, Callable[[], bool]] = {
        "verification": world.arrived,
        "promotion": lambda: all((world.staging / "files" / path).is_file() for path in world.sizes),
        "linking": world.target.is_dir,
        "the end": lambda: world.link().resolve() == world.target,
    }
    draw, second = world.draw, None
    aim, moment = draw.choice(["time", "time", "time", *aims]), draw.uniform(0, 1.1 * seconds)
    late = draw.choice([0.0, draw.uniform(0, 0.004), draw.uniform(0, 0.1)])
    beside, again = draw.random() < 0.15, draw.random() < 0.15
    with Proxy(world.folder / "slow.log", LINK) as slow, Proxy(world.folder / "fast.log") as fast:
        stage, began = world.sync(slow), time.monotonic()
        if beside:
            second = world.sync(fast, machine=1)
        while stage.alive():
            with contextlib.suppress(FileNotFoundError):  # looked at while it changes
                if time.monotonic() - began > moment if aim == "time" else aims[aim]():
                    break
            time.sleep(0.0005)
        time.sleep(late if aim != "time" else 0)
        over = not stage.alive()
        stage.kill()
        problems = [f"beside it: {what}" for what in world.problems(second, 1, alone=False)] if second else []
        if remains := left():
            problems.append(f"processes were left: {remains}")
        where = "end" if over else world.phase()
        if world.link().is_symlink() and not (world.cache / ".used" / world.link().resolve().name).is_dir():
            problems.append("a link that an eviction by another machine does not know of")
        if again:
            world.publish()
        proved = world.proved()
    with Proxy(world.folder / "next.log") as clean:
        stage = world.sync(clean)
        problems += world.problems(stage)
        problems += [f"{path} was fetched again" for path in clean.asked(world.name) if world.files[path] in proved]
    return where, problems


def crowd(world: World, count: int) -> list[str]:
    """So many machines want one model of one cold store: one fetches it."""
    world.clear()
    with Proxy(world.folder / "crowd.log", LINK) as proxy:
        stages = [world.sync(proxy, machine=machine) for machine in range(count)]
        problems = [what for n, stage in enumerate(stages) for what in world.problems(stage, n, alone=False)]
        if (asked := proxy.asked(world.name)) != Counter(list(world.sizes)):
            problems.append(f"asked for {dict(asked)}")
    return problems


READER = """
import sys
from pathlib import Path
from soak_sync import content
from wmtp.cache import hold
folder = Path(sys.argv[1]).resolve()
hold(folder)
print(sorted(content(folder).items()), flush=True)
for line in sys.stdin:
    print(sorted(content(folder).items()), flush=True)
"""


def reader(world: World) -> list[str]:
    """One reads the version of before; a sync that would like its room, and an eviction, leave it alone."""
    world.clear()
    with Proxy(world.folder / "reader.log") as proxy:
        problems, old = world.problems(world.sync(proxy)), (world.target, str(sorted(world.files.items())))
        command = [sys.executable, "-c", READER, str(world.link())]
        paths = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=paths) as process:
            assert process.stdin and process.stdout
            reads = [process.stdout.readline().strip()]
            world.publish()
            stage = world.sync(proxy, WMTP_CACHE_MAX_GB="0.000001")
            problems += world.problems(stage)
            evict = {"WMTP_APP_ROOT": str(world.link().parent.parent), "WMTP_CACHE_DIR": str(world.cache)}
            Stage(world.story(), "cache.sh", "--evict", "unused", **evict).code()
            print(file=process.stdin, flush=True)
            reads.append(process.stdout.readline().strip())
            if reads != [old[1]] * 2:
                problems.append("the reader saw other bytes")
            process.stdin.close()
        Stage(world.story(), "cache.sh", "--evict", "unused", **evict).code()
        if old[0].exists() or not world.target.exists():
            problems.append("what nobody reads any more was not evicted, or what is linked was")
    return problems


def kills(world: World, count: int, only: bool) -> Iterator[tuple[str, list[str]]]:
    """Rounds: what it was and what went wrong."""
    fell = Counter[str]()
    with Proxy(world.folder / "slow.log", LINK) as slow:
        began = time.monotonic()
        yield "an undisturbed sync", world.problems(world.sync(slow))
    seconds = time.monotonic() - began
    say(f"a sync takes {seconds:.1f} s")
    for number in range(1, count + 1):
        if world.draw.random() < 0.3:
            world.publish()
        else:
            world.clear()
        where, problems = kill(world, seconds)
        fell[where] += 1
        yield f"kill {number} ({where})", problems
        if number % 10 == 0 or number == count:
            say(f"kill {number}/{count}: " + ", ".join(f"{fell[phase]} in {phase}" for phase in PHASES))
    if not only:
        yield "two at once", crowd(world, 2)
        yield "five at once", crowd(world, 5)
        yield "a reader beside a sync", reader(world)


def tally(rounds: Iterator[tuple[str, list[str]]], watcher: Watcher, stories: Path) -> int:
    """Says what went wrong, counts, and gives the exit code."""
    passed = failed = 0
    for what, problems in rounds:
        passed, failed = passed + (not problems), failed + bool(problems)
        if problems:
            say(f"FAIL  {what}: {'; '.join(problems)}")
    *wrongs, count = watcher.end() or ["the watcher died"]
    say(f"watched: {count}, {len(wrongs)} wrong")
    for line in wrongs[:20]:
        say(f"FAIL  {line}")
    bad = bool(wrongs) or not re.match(r"[1-9]\d* looks, [1-9]\d* folders read$", count)
    passed, failed = passed + (not bad), failed + bad
    if failed:
        kept = ROOT / "build/soak/stories"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(stories, kept)
        say(f"what the stages said: {kept}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-only", action="store_true", help="no syncs at once, no reader")
    parser.add_argument("--day", type=int, metavar="OPERATIONS", help="a condensed day of so many operations")
    parser.add_argument("--watch", type=Path, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.watch:
        watch(args.watch)
        return 0
    with tempfile.TemporaryDirectory(prefix="wmtp-soak-") as name:
        folder = Path(name)
        (folder / "stories").mkdir()
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"] = str(folder / "tmp")  # what is killed leaves its temporary folder
        draw, token = random.Random(args.seed), f"soak-{uuid.uuid4().hex[:8]}"
        if args.day:
            from soak_day import Day

            say(f"day: {args.day} operations, seed {args.seed}")
            day = Day(folder, draw, token)
            return tally(day.rounds(args.day), Watcher(*day.places), folder / "stories")
        say(f"delivery: {args.kills} kills of the sync, seed {args.seed}")
        world = World(folder, draw, token)
        watcher = Watcher(world.cache, world.link(0).parent, world.link(1).parent)
        return tally(kills(world, args.kills, args.kills_only), watcher, folder / "stories")


if __name__ == "__main__":
    from soak_sync import main as this  # the module that soak_day knows: one MARK

    sys.exit(this())
