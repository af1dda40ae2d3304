"""Training runs for the tests, without paying torch's import for each: ranks are forked from a server that has it.

The server never builds a model, so that a rank is as fresh as a new process. Real gloo, real kills.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/config.local_minitest.yaml"


def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    heavy = ["mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "matplotlib.backends.backend_agg"]
    context.set_forkserver_preload(["wmtp.train", *heavy])
    return context


def spread(function: Callable[..., None], *args: object, ranks: int = 2) -> None:
    """Call ``function(rank, *args)`` on so many ranks, and see all of them end well."""
    processes = [server().Process(target=function, args=(rank, *args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * ranks, f"ranks ended with {codes}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(
    rank: int, world: int, port: int, app: str, run: str, argv: list[str], plant: Callable[[int], None] | None
) -> None:
    os.environ |= {"WMTP_APP_ROOT": app, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(f"{app}/{run}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    import torch

    from wmtp.train import main

    torch.set_num_threads(1)
    if plant:
        plant(rank)
    code = main(argv)
    sys.stderr.flush()
    os._exit(code)  # as a rank ends: without waiting for threads of the libraries


class Launched:
    """torchrun with its ranks, in the place of ranks: slower to start, and how a node does it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        with Path(f"{run.app}/{run.run}-0.log").open("ab") as log:
            self._process = run.torchrun("--standalone", f"--nproc-per-node={run.world}", stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self, seconds: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    @property
    def exitcode(self) -> int:
        """The trainer's own: torchrun makes 1 of every other than 0."""
        return int(json.loads(Path(f"{self._run.app}/{self._run.run}-exit.json").read_text())["code"])


class Run:
    """``wmtp.train`` on ``world`` ranks under one run name; `log` is rank 0's standard error of all its starts."""

    def __init__(
        self,
        app: Path,
        algorithm: str,
        run: str,
        *sets: str,
        world: int = 2,
        into: str = "checkpoints",
        arguments: tuple[str, ...] = (),
        plant: Callable[[int], None] | None = None,
    ) -> None:
        """``plant`` is called in each rank before it starts: a fault that can't be brought about from outside."""
        self.app, self.run, self.world, self.base = app, run, world, app / into
        self.folder = self.base / run
        name = algorithm.replace("-", "_")
        sets = (
            "data.train.max_length=32",  # the vocabulary-wide work is what costs
            "data.eval.max_length=32",
            f"paths.checkpoints.base_path=file://{self.base}",
            "paths.checkpoints.keep_last=9",
            *(("launcher.resources.gpus=1", "devices.distributed.enabled=false") if world == 1 else ()),
            *(("devices.fsdp.enabled=false",) if world == 1 else ()),
            *sets,
        )
        self.argv = ["--config", str(CONFIG), "--recipe", str(ROOT / f"tests/configs/recipe.{name}.yaml")]
        self.argv += ["--run-name", run, "--env", "minitest", "--exit-file", f"{app}/{run}-exit.json"]
        self.argv += ["--summary", f"{app}/{run}.json", *(a for s in sets for a in ("--set", s))]
        self.argv += arguments
        self.plant = plant
        self.ranks: list[BaseProcess | Launched] = []

    def start(self) -> Run:
        """Begin; with WMTP_TEST_TORCHRUN=1 (`make soak`) through torchrun, where two ranks have no plant."""
        if os.environ.get("WMTP_TEST_TORCHRUN") and self.world > 1 and not self.plant:
            self.ranks = [Launched(self)]
            return self
        port = free_port()
        arguments = (self.world, port, str(self.app), self.run, self.argv, self.plant)
        ranks = [server().Process(target=_rank, args=(rank, *arguments)) for rank in range(self.world)]
        for rank in ranks:
            rank.start()
        self.ranks = [*ranks]
        return self

    def torchrun(self, *arguments: str, **popen: Any) -> subprocess.Popen[Any]:
        """The run's command under torchrun, whose own arguments these are."""
        command = [sys.executable, "-m", "wmtp.launch", *arguments, "-m", "wmtp.train", *self.argv]
        environment = {**os.environ, "WMTP_APP_ROOT": str(self.app), "OMP_NUM_THREADS": "1", **popen.pop("env", {})}
        return subprocess.Popen(command, env=environment, **popen)

    def wait(self, seconds: float = 120) -> int:
        """Rank 0's exit code, once all have ended."""
        for rank in self.ranks:
            rank.join(seconds)
        if any(rank.is_alive() for rank in self.ranks):
            self.kill()
            raise TimeoutError(f"{self.run} did not end in {seconds} s:\n{self.log()[-3000:]}")
        return self.ranks[0].exitcode or 0

    def whole(self) -> Run:
        """Start, and end with 0."""
        code = self.start().wait()
        assert code == 0, self.log()[-3000:]
        return self

    def log(self) -> str:
        path = self.app / f"{self.run}-0.log"
        return path.read_text() if path.exists() else ""

    def until(self, text: str, times: int = 1, seconds: float = 120) -> None:
        """Wait for ``text`` to stand in the log ``times`` times."""
        deadline = time.monotonic() + seconds
        while self.log().count(text) < times:
            if time.monotonic() > deadline or not any(rank.is_alive() for rank in self.ranks):
                raise TimeoutError(f"{self.run}: no {text!r} in its log:\n{self.log()[-3000:]}")
            time.sleep(0.005)

    def kill(self) -> None:
        """kill -9, all ranks."""
        for rank in self.ranks:
            if rank.pid and rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()

    def losses(self) -> dict[int, str]:
        """Loss of each step as a hexadecimal float."""
        lines = (self.folder / "steps.jsonl").read_text().splitlines()
        return {r["step"]: float(r["wmtp_loss"]).hex() for r in map(json.loads, lines)}

    def records(self) -> list[dict[str, float]]:
        lines = (self.folder / "steps.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
