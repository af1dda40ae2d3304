"""VESSL's client, its imports done once: a call of it takes a fifth of the time that starting it anew takes.

    python vessl_client.py FOLDER PARENT

Started by launcher_vessl.bash with the client's own Python. FOLDER/ready is there when its imports are done.
FOLDER/calls is a FIFO that takes the name of a call, a line each. Of a call NAME there are FOLDER/NAME.arguments (its
seconds, then the client's arguments, each ended by NUL) and the FIFO FOLDER/NAME.code: it gives the exit code, or
nothing where the seconds were not enough. FOLDER/NAME.said: what the client prints.
Each call is a fork, in which the client begins as in a new process: it logs in while it is imported. Only what it
imports from elsewhere, and its 700 generated classes, are there already. It ends when process PARENT has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import select
import signal
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ELSEWHERE = (
    *("aiohttp", "boto3", "click", "docker", "google.cloud.storage", "inquirer", "kubernetes", "sentry_sdk"),
    *("tabulate", "terminaltables", "yaml"),
)
"""What takes longest to import. One that another version of the client does not bring is one less."""


def imported() -> tuple[ModuleSpec | None, ModuleType | None]:
    """The client's package, not run so far, with its generated classes beneath it; None where it is not installed."""
    spec = importlib.util.find_spec("vessl")
    if spec is None:
        return None, None
    package = sys.modules["vessl"] = importlib.util.module_from_spec(spec)
    for name in ("vessl.openapi_client", *ELSEWHERE):
        with contextlib.suppress(Exception):  # a call meets it again, and tells it
            importlib.import_module(name)
    return spec, package


def answer(folder: Path, name: str, spec: ModuleSpec | None, package: ModuleType | None) -> None:
    """One call, in a process of its own, which this ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # a signal to the stage's group must not cut off a creation, whose lock would be free at once
    seconds, *arguments = os.fsdecode((folder / f"{name}.arguments").read_bytes()).split("\0")[:-1]
    with (folder / f"{name}.code").open("w") as code, (folder / f"{name}.said").open("wb") as said:
        signal.alarm(int(seconds))  # it kills: a call that hangs is given up
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.argv = ["vessl", *arguments]
        status: object = 0
        try:
            if spec and spec.loader and package:
                spec.loader.exec_module(package)
            status = importlib.import_module("vessl.cli._main").cli()
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
            status = 1
        if isinstance(status, str):
            print(status, file=sys.stderr)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        code.write(f"{status if isinstance(status, int) else int(status is not None)}\n")
    os._exit(0)


def main() -> None:
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])  # as told: it may be gone by now
    calls = os.open(folder / "calls", os.O_RDWR)  # also for writing: it has no end
    spec, package = imported()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    (folder / "ready").touch()
    kept = b""
    while os.getppid() == parent:
        if not select.select([calls], [], [], 1)[0]:
            continue
        *names, kept = (kept + os.read(calls, 4096)).split(b"\n")
        for name in names:
            if os.fork() == 0:
                answer(folder, name.decode(), spec, package)


if __name__ == "__main__":
    main()
