"""The figures of a finished minitest: rows for a person, ``summary.json`` for a machine.

Reads what the stages left in the run's folder (``train.json`` of the trainer, ``sync.jsonl`` of the sync) and, on
standard input, ``name<TAB>value`` lines of the caller.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def sync_figures(lines: list[str]) -> dict[str, float]:
    """Megabytes that the sync moved, and their rate, from its JSON line a model (``downloaded_bytes``, ``seconds``)."""
    models = [json.loads(line) for line in lines if line.strip()]
    moved = sum(m["downloaded_bytes"] for m in models) / 1e6
    seconds = sum(m["seconds"] for m in models)
    return {
        "models_synced_mb": round(moved, 1),
        "sync_mb_per_second": round(moved / seconds, 1) if seconds else 0.0,
    }


def rows(folder: Path, extra: list[str], seconds: int) -> dict[str, Any]:
    """All figures by name. Raises FileNotFoundError where a stage left nothing: an absent figure is not a zero."""
    out: dict[str, Any] = json.loads((folder / "train.json").read_text())
    out |= sync_figures((folder / "sync.jsonl").read_text().splitlines())
    vocab = folder / "vocab.json"
    if vocab.exists():
        out["vocab_size"] = json.loads(vocab.read_text())["vocab_size"]
    out |= dict(line.rstrip("\n").split("\t", 1) for line in extra if "\t" in line)
    return out | {"seconds": seconds}


def not_learned(figures: dict[str, Any]) -> str | None:
    """What is wrong with the held-out loss of a run; None where it fell."""
    if 2 * (bad := figures.get("not_finite") or 0) > figures.get("steps", 0):
        return f"{bad} of {figures['steps']} steps were left out: not finite"
    before, after = figures.get("held_out_ce_before"), figures.get("held_out_ce_after")
    if before is None or after is None:
        return "no held-out loss was measured"
    return None if after < before else f"the held-out loss did not fall: {before:.3f} -> {after:.3f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.minitest", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="build/<ENV>/<run name>")
    parser.add_argument("--seconds", type=int, required=True, help="of the whole run so far")
    args = parser.parse_args(argv)
    figures = rows(args.folder, sys.stdin.readlines(), args.seconds)
    for name, value in figures.items():
        if isinstance(value, float):
            value = f"{value:.3f}"
        elif isinstance(value, dict):
            value = " ".join(f"{key} {number:.3f}" for key, number in value.items())
        elif isinstance(value, list):
            value = " ".join(f"{v:.3f}" for v in value)
        print(f"{name}: {value}")
    staging = args.folder / ".summary.json"
    staging.write_text(json.dumps(figures, indent=2) + "\n")
    staging.replace(args.folder / "summary.json")
    if problem := not_learned(figures):
        print(
            f"minitest  FAIL  {problem}\n          rule  a dozen steps on real parts lower the loss of held-out text\n"
            f"          next  look at wmtp_loss in the steps above, and at the recipe's optim.lr",
            file=sys.stderr,
        )
        return 1
    print(f"minitest: ok {args.seconds} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
