"""torchrun, with one line in place of its traceback when ranks fail.

    python -m wmtp.launch --standalone --nproc-per-node 2 -m wmtp.train …     (torchrun's own arguments)

How a rank failed is the trainer's to say (`exit.json` and its own lines); what only the launcher sees,
such as a rank that the kernel killed, is said here. Exit codes: 0, or 1 when a rank failed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

OUT_OF_MEMORY = "killed by the system, most often for memory: dmesg, or the cluster's events, say more"


def story(rank: int, exitcode: int) -> str:
    """What to say of a rank that ended with `exitcode` (negative: a signal)."""
    if exitcode >= 0:
        return f"launch    rank {rank} ended with {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"launch    rank {rank} ended by {name}" + (f": {OUT_OF_MEMORY}" if name == "SIGKILL" else "")


def main(argv: list[str] | None = None) -> int:
    # torchrun says the same at length: one logger reads the environment, the other is torch's own.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    os.environ["WMTP_LAUNCHER"] = str(os.getpid())  # a rank that finds another parent has outlived its launcher
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:] if argv is None else argv)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            print(story(rank, failure.exitcode), file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"launch    stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
