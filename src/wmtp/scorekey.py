"""The name under which a scorer's verdicts are kept: a digest of everything that they depend on. Imports no torch.

    python -m wmtp.scorekey --config F --recipe F [--set K=V]… [--env E] --manifests DIR

prints a line for each model of the run: role, name, and the name of its kept scores (`-` for a model that is trained
or whose key can't be known here). DIR holds the models' manifests as NAME.json. With kept scores the scorer itself
isn't needed. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp import config as settings
from wmtp.manifest import MANIFEST, Entry, ManifestError, create, hash_file, load_manifest
from wmtp.paths import PathResolver
from wmtp.registry import weighs_by_reference, weighs_by_value
from wmtp.sources import RECORD_FILES, DataError, kind_digest, parts_of

FORMAT = 1
REFERENCE, REWARD = "reference", "reward"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # in the order in which a tokenizer is looked for
NAMES = "tokenizer_config.json"  # which pieces begin and end a text, for a tokenizer.json
MARKER = ".complete"


def scorer_of(recipe: settings.Recipe) -> tuple[str, str] | None:
    """Kind of scores and role of the scorer that the recipe's algorithm needs; None for an algorithm without one."""
    if weighs_by_reference(recipe.train.algo):
        return REFERENCE, "ref"
    if weighs_by_value(recipe.train.algo):
        # Pseudo rewards are made of the base model's own cross-entropies.
        return (REFERENCE, "base") if recipe.critic.use_pseudo_rewards else (REWARD, "rm")
    return None


def untouched(folder: Path, entries: Sequence[Entry]) -> bool:
    """Whether a synced folder still is what its manifest says, by sizes and times: its marker was written last."""
    try:
        proved = (folder / MARKER).stat().st_mtime_ns
        stats = [(entry, (folder / entry.path).stat()) for entry in entries]
    except OSError:
        return False
    return all(stat.st_size == entry.bytes and stat.st_mtime_ns <= proved for entry, stat in stats)


def files_of(folder: Path, manifests: Path | None, name: str, coming: bool = False) -> list[Entry]:
    """What a model consists of: as the bucket has it where it is ``coming``, else as it lies here, else as kept."""
    kept = manifests / f"{name}.json" if manifests else None
    if coming and kept and kept.is_file():
        return list(load_manifest(kept).files)
    if folder.is_dir():
        own = folder / MANIFEST
        entries = list(load_manifest(own).files) if own.is_file() else []
        if entries and untouched(folder, entries):
            return entries
        return [Entry(**item) for item in create(folder.resolve(), name)["files"]]
    # A kept manifest speaks of the folder that the sync makes, of no other of that name.
    if kept and kept.is_file() and folder == Path(PathResolver().resolve(f"file:///app/models/{name}")[1]):
        return list(load_manifest(kept).files)
    raise FileNotFoundError(f"{folder}: neither the model nor its manifest is there")


def tokenizer_digest(folder: Path, manifests: Path | None, name: str, coming: bool = False) -> str:
    """blake3 of a model's tokenizer file, and of the one that names its special tokens where that is another."""
    if folder.is_dir() and not coming:
        by_path = {n: hash_file(folder / n) for n in (*TOKENIZERS, NAMES) if (folder / n).is_file()}
    else:
        by_path = {entry.path: entry.blake3 for entry in files_of(folder, manifests, name, coming)}
    if TOKENIZERS[0] in by_path:
        return by_path[TOKENIZERS[0]]
    if TOKENIZERS[1] in by_path:
        return by_path[TOKENIZERS[1]] + by_path.get(NAMES, "")
    raise FileNotFoundError(f"{name}: no {' or '.join(TOKENIZERS)}")


def data_digests(config: settings.Config, sources: Sequence[str], manifests: Path | None, coming: bool) -> list[str]:
    """blake3 of each file of the sources, in the order in which they are read."""
    found = []
    for source in sources:
        uri = config.paths.datasets[source]
        folder = Path(PathResolver().local(uri, f"paths.datasets.{source}"))
        kept = manifests / f"dataset:{folder.name}.json" if manifests else None
        if coming and uri.startswith("s3://") and kept and kept.is_file():
            names = {e.path: e.blake3 for e in load_manifest(kept).files if "/" not in e.path}
            records = sorted(name for name in names if name.endswith(RECORD_FILES))
            if records:  # what `parts_of` finds in the folder that comes
                found += [kind_digest(Path(name).suffix[1:], names[name]) for name in records]
                continue
        found += [digest for part in parts_of(folder) for digest in part.digests()]
    return found


def ingredients(
    config: settings.Config, recipe: settings.Recipe, manifests: Path | None, coming: bool = False
) -> dict[str, Any]:
    """Everything that the scores depend on, by content: no path, no name. Raises OSError, DataError, ManifestError."""
    scorer = scorer_of(recipe)
    assert scorer
    kind, role = scorer

    def model(role: str) -> tuple[Path, Path | None, str, bool]:
        path = PathResolver().local(getattr(config.paths.models, role), "paths.models")
        return Path(path), manifests, path.rstrip("/").rpartition("/")[2], coming

    return {
        "format": FORMAT,
        "kind": kind,
        "scorer": sorted((entry.path, entry.bytes, entry.blake3) for entry in files_of(*model(role))),
        "tokenizer": tokenizer_digest(*model("base")),
        "data": [
            [data_digests(config, part.sources, manifests, coming), part.max_length, part.pack_sequences]
            for part in (recipe.data.train, recipe.data.eval)
        ],
        # Only where it is set: scores that were kept before there was a split keep their names.
        **({"share": recipe.data.eval.share} if recipe.data.eval.share else {}),
        "template": recipe.critic.reward_template if kind == REWARD else None,
        "precision": config.devices.mixed_precision,
    }


def kept_name(
    config: settings.Config, recipe: settings.Recipe, manifests: Path | None, coming: bool = False
) -> tuple[str, dict[str, Any]]:
    """`KIND-DIGEST`, the folder of the kept scores, and what the digest was made of.

    ``coming``: for the sync, whose manifests say what the models will be.
    """
    what = ingredients(config, recipe, manifests, coming)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"{what['kind']}-{digest[:32]}", what


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.scorekey", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--env")
    parser.add_argument("--manifests", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        config, recipe = settings.load_pair(
            arguments.config, arguments.recipe, arguments.overrides, env=arguments.env or None
        )
    except settings.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    scorer = scorer_of(recipe)
    for role, uri in settings.needed_models(config, recipe).items():
        name = "-"
        if scorer and role == scorer[1] and role != "base":
            try:
                name = kept_name(config, recipe, arguments.manifests, coming=True)[0]
            except (OSError, DataError, ManifestError) as error:
                what = str(error).splitlines()[0]
                print(f"scores    warn  {what}: whether scores are kept can't be known here", file=sys.stderr)
        print(role, uri.rstrip("/").rpartition("/")[2], name, sep="\t")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that was killed is no traceback
    sys.exit(main())
