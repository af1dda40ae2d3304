"""Many kills of a training run: whatever is interrupted, the losses are those of a run that was not.

    python tests/soak_train.py [--seed 1] [--kills 30] [--steps 60] [--algorithms baseline-mtp rho1-wmtp critic-wmtp]

Two real ranks that save after every step are killed (-9, both at once) at moments drawn from the seed, over their whole
start and run. After each kill every checkpoint with a marker is loaded, tensor by tensor. Standard error: the story.
Exit codes: 0 all equal, 1 something was lost; the last line counts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from runs import ROOT, Run
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.utils._pytree import tree_leaves


def say(text: str) -> None:
    print(f"soak      {text}", file=sys.stderr, flush=True)


def load_all(folder: Path, seen: set[str]) -> int:
    """Load every checkpoint with a marker that is not in ``seen``; returns how many are there."""
    whole = [marker.parent for marker in folder.glob("step-*/.complete")]
    for step in whole:
        # A folder of that name that was written again is another one.
        key = f"{step.name} {(step / '.complete').stat().st_mtime_ns}"
        if key in seen:
            continue
        state: dict[str, Any] = {}
        _load_state_dict(state, FileSystemReader(step), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        assert len(tensors) > 100 and all(bool(torch.isfinite(t.float()).all()) for t in tensors), step
        json.loads((step / "trainer.json").read_text())
        seen.add(key)
    return len(whole)


def soak(app: Path, algorithm: str, steps: int, kills: int, draw: random.Random) -> bool:
    """Whether a run that was killed so often ends with the losses of one that was not."""
    sets = [f"train.max_steps={steps}", "paths.checkpoints.save_interval=1", "paths.checkpoints.save_final=false"]
    sets += ["pretrain.max_steps=12", "paths.checkpoints.keep_last=3", "log_interval=1"]
    began = time.monotonic()
    whole = Run(app, algorithm, f"{algorithm}-whole", *sets).start()
    whole.until("Step 1/")
    first_step = time.monotonic() - began
    assert whole.wait(600) == 0, whole.log()[-2000:]
    # Its own scores too: those of the undisturbed run would be found.
    cut = Run(app, algorithm, f"{algorithm}-cut", *sets, into="cut")
    seen: set[str] = set()
    for kill in range(kills):
        cut.start()
        done, began = cut.log().count("Step "), time.monotonic()
        # Half of the kills anywhere before the first step, half in the thick of the steps and of their saves.
        if kill % 2:
            moment = began + draw.uniform(0, first_step)
            while time.monotonic() < moment and cut.log().count("Step ") == done:
                time.sleep(0.002)
        else:
            wanted = draw.randint(1, max(2, steps // kills))
            while cut.log().count("Step ") < done + wanted and any(rank.is_alive() for rank in cut.ranks):
                assert time.monotonic() - began < 300, cut.log()[-2000:]
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3))
        ended = not any(rank.is_alive() for rank in cut.ranks)
        cut.kill()
        kept = load_all(cut.folder, seen) if cut.folder.exists() else 0
        say(f"{algorithm} kill {kill + 1}/{kills}: {kept} whole checkpoints{', it had ended' if ended else ''}")
        if ended:
            break
    cut.whole()
    saves = cut.log().count("save      step")
    same = cut.losses() == whole.losses() and len(whole.losses()) == steps
    went_on, verdict = cut.log().count("goes on after step"), "equal" if same else "DIFFER"
    say(f"{algorithm}: {kill + 1} kills, went on {went_on} times, {saves} saves, {len(seen)} loaded, losses {verdict}")
    # A run that ended before its last kill was killed too seldom to show anything.
    return same and "Traceback" not in cut.log() and kill + 1 == kills and went_on >= kills // 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--algorithms", nargs="+", default=["baseline-mtp", "rho1-wmtp", "critic-wmtp"])
    args = parser.parse_args()
    say(f"training: {args.kills} kills over {args.steps} steps of each algorithm, seed {args.seed}")
    results = []
    with tempfile.TemporaryDirectory(prefix="wmtp-soak-") as folder:
        app = Path(folder)
        generate = [sys.executable, str(ROOT / "tests/test_models/generate.py"), "--out", str(app / "models")]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
        (app / "datasets").symlink_to(ROOT / "datasets")
        for algorithm in args.algorithms:
            draw = random.Random(f"{args.seed} {algorithm}")
            results.append(soak(app, algorithm, args.steps, args.kills, draw))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
