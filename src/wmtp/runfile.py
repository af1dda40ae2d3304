"""The run file of the cluster: `docker/vessl.yaml` filled from configuration and recipe, and what the run will cost.

    python -m wmtp.runfile --config F --recipe F --env production --run-name N --image R@sha256:… [--output run.yaml]

Standard output: what a person is asked about before a submission, a line each. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import ipaddress
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from wmtp import config as settings

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docker" / "vessl.yaml"
SCHEMA = ROOT / "docker" / "run.schema.json"
IN_IMAGE = ("configs/", "tests/configs/")

# GB of the plan's models, for the question before a submission; the bucket itself is asked by the sync.
MODEL_GB = {"llama-7b-mtp": 27.0, "starling-rm-7b": 26.0, "sheared-llama-2.7b": 10.0}
# Dollars a GB that leave a bucket of AWS for the internet (first 10 TB a month, list price of 2025).
EGRESS_PER_GB = 0.09


class Refused(ValueError):
    """Value, rule and next step, a line each."""


def fill(node: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """The template with each scalar ``${NAME}`` replaced; None where there is nothing to fill in."""
    if isinstance(node, CommentedMap):
        for key in list(node):
            filled = fill(node[key], values, f"{path}{key}.")
            if filled is None:
                del node[key]
            else:
                quoted = path == "env." and isinstance(filled, str)
                node[key] = DoubleQuotedScalarString(filled) if quoted else filled
        return node if node else None
    if isinstance(node, CommentedSeq):
        kept = [fill(item, values, path) for item in node]
        node[:] = [item for item in kept if item is not None]
        return node
    if isinstance(node, str) and (named := re.fullmatch(r"\$\{([A-Z_]+)\}", node)):
        if named[1] not in values:
            raise Refused(f"{TEMPLATE.name}: {node}: not known\nrule  a template names {', '.join(sorted(values))}")
        return values[named[1]] if values[named[1]] not in ("", [], None) else None
    return node


def of_image(name: str, file: str, chosen: bool) -> str | None:
    """A file that was chosen by hand, as the image has it; None where the name is found by ENV and ALGO."""
    if not chosen:
        return None
    path = Path(file)
    inside = str(path.resolve().relative_to(ROOT)) if path.resolve().is_relative_to(ROOT) else file
    if not inside.startswith(IN_IMAGE):
        raise Refused(
            f"{name}={file}: not in the image\nrule  the image holds {' and '.join(IN_IMAGE)} of the checkout"
            f"\nnext  put it there: cp '{file}' configs/, then build again"
        )
    return inside


def render(
    config: settings.Config,
    recipe: settings.Recipe,
    *,
    env: str,
    run_name: str,
    image: str,
    revision: str,
    config_file: str | None = None,
    recipe_file: str | None = None,
    overrides: Sequence[str] = (),
    max_hours: str | None = None,
    endpoint: str | None = None,
) -> str:
    """The text of the run file, checked against the schema."""
    launcher, storage = config.launcher, config.storage
    for key in ("cluster", "preset"):
        if not getattr(launcher, key):
            raise Refused(
                f"launcher.{key}: not set\nrule  VESSL wants a cluster and a preset"
                f"\nnext  set launcher.{key} in the configuration (vessl cluster list, vessl resource list)"
            )
    if launcher.volume and not re.fullmatch(r"volume://[^/\s]+/\S+", launcher.volume):
        raise Refused(
            f"launcher.volume: {launcher.volume}\nrule  volume://STORAGE/NAME, as `vessl volume` lists them"
            "\nnext  for example launcher.volume: volume://cluster-nfs/wmtp-models-cache"
        )
    hours = hours_of(config, max_hours)
    values = {
        "RUN_NAME": run_name,
        "DESCRIPTION": f"{recipe.train.algo}, {env}, revision {revision}",
        "TAGS": CommentedSeq(["vessl", env, recipe.train.algo]),
        "CLUSTER": launcher.cluster,
        "PRESET": launcher.preset,
        "IMAGE": image,
        "VOLUME": launcher.volume,
        "ENV": env,
        "ALGO": recipe.train.algo,
        "CONFIG": config_file,
        "RECIPE": recipe_file,
        "SET": " ".join(overrides),
        "ALLOW": os.environ.get("ALLOW"),
        "MAX_HOURS": None if hours is None else f"{hours:.6f}".rstrip("0").rstrip("."),
        "BUCKET": os.environ.get("S3_BUCKET_NAME") or storage.bucket,
        "ENDPOINT": endpoint,
        "REGION": os.environ.get("AWS_DEFAULT_REGION") or storage.region,
    }
    yaml = YAML()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    filled = fill(yaml.load(TEMPLATE.read_text("utf-8")), values)
    # The template's own head speaks of the template.
    filled.yaml_set_start_comment(f"{run_name}, filled from docker/vessl.yaml: edit that, not this.")
    out = io.StringIO()
    yaml.dump(filled, out)
    check(out.getvalue())
    return out.getvalue()


def check(text: str) -> None:
    """Refuse what the schema refuses, all findings at once."""
    data = YAML(typ="safe").load(text)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    findings = [
        f"{'.'.join(map(str, e.absolute_path)) or 'run file'}: {e.message}" for e in validator.iter_errors(data)
    ]
    if findings:
        raise Refused(
            "\n".join([*findings, "rule  docker/run.schema.json", "next  mend the value, or docker/vessl.yaml"])
        )


def for_engine(text: str, config: settings.Config) -> str:
    """An engine's `--env-file`: image and GPUs as comments; secrets are names, the engine has their values."""
    run = YAML(typ="safe").load(text)
    env = run["env"] | {"LAUNCHER": "docker"}
    gpus = 0 if config.devices.compute_backend == "cpu" else config.launcher.resources.gpus
    lines = [f"# image {run['image']}", f"# gpus {gpus}"]
    # A login of this machine may be a temporary one; a name that is not set here is not set there.
    given = [*(f"{k}={v}" if isinstance(v, str) else k for k, v in env.items()), "AWS_SESSION_TOKEN"]
    return "\n".join([*lines, *given]) + "\n"


def write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}")
    half.write_text(text, "utf-8")
    half.replace(file)


def check_receipt(file: Path, env: str, revision: str, digest: str) -> None:
    """Refuse what no dry run has passed: another revision, other settings, findings that failed, or none at all."""
    following = f"\nnext  make dryrun ENV={env} ALGO=…, with the same SET, CONFIG and RECIPE"
    rule = "\nrule  production submits what a dry run of the same revision and settings has passed"
    try:
        receipt = json.loads(file.read_text("utf-8"))
        found = (receipt["env"], receipt["revision"][:7], receipt["digest"])
        failed = int(receipt["counts"]["FAIL"])
    except FileNotFoundError:
        raise Refused(f"{file.name}: no dry run of this run is here{rule}{following}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(f"{file}: not a receipt of a dry run{rule}{following}") from None
    if receipt.get("only"):
        raise Refused(f"{file.name}: the dry run was of {receipt['only']} alone{rule}{following}")
    if failed:
        raise Refused(f"{file.name}: the dry run had {failed} FAIL{rule}{following}")
    for what, mine, its in zip(
        ("environment", "revision", "settings"), (env, revision[:7], digest), found, strict=True
    ):
        if mine != its:
            raise Refused(f"{file.name}: the dry run was of {what} {its}, this is {mine}{rule}{following}")


def hours_of(config: settings.Config, max_hours: str | None) -> float | None:
    """The limit of a run in hours; MAX_HOURS wins over launcher.max_hours."""
    if max_hours is None:
        if config.launcher.max_hours is None:
            return None
        max_hours = f"{config.launcher.max_hours:.6f}".rstrip("0").rstrip(".")
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", max_hours) or float(max_hours) <= 0:
        raise Refused(f"MAX_HOURS={max_hours}\nrule  hours above 0 and below 10000\nnext  MAX_HOURS=24")
    return float(max_hours)


def endpoint_of(config: settings.Config, *, reached_from_here: bool) -> str | None:
    """The bucket's address as the node will use it; S3_ENDPOINT_URL wins over storage.endpoint."""
    endpoint = os.environ.get("S3_ENDPOINT_URL") or config.storage.endpoint
    if not endpoint:
        return None
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise Refused(
            f"S3_ENDPOINT_URL={endpoint}: no address\nrule  http(s)://HOST[:PORT]\nnext  mend S3_ENDPOINT_URL"
        )
    if parts.username or parts.password:
        raise Refused(
            "S3_ENDPOINT_URL: there is a user or a password in it\nrule  a run file holds no secret"
            "\nnext  credentials go into the secrets of the organization"
        )
    here = host == "localhost"
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        here = address.is_loopback or address.is_unspecified
    if here and not reached_from_here:
        raise Refused(
            f"S3_ENDPOINT_URL={endpoint}: this machine's own address\nrule  the cluster reaches the bucket by it"
            "\nnext  unset S3_ENDPOINT_URL, or name an address that the cluster sees"
        )
    return endpoint


def summary(config: settings.Config, recipe: settings.Recipe, image: str, max_hours: str | None) -> list[str]:
    """What will run, from where, for how long at most and for how much."""
    launcher = config.launcher
    names = [uri.rstrip("/").rpartition("/")[2] for uri in settings.needed_models(config, recipe).values()]
    known = [MODEL_GB[name] for name in names if name in MODEL_GB]
    size = f"{sum(known):.1f} GB" if len(known) == len(names) else "size not known here"
    egress = ""
    if len(known) == len(names) and not config.storage.endpoint:
        egress = f" (about ${sum(known) * EGRESS_PER_GB:.2f} egress)"
    hours = hours_of(config, max_hours)
    limit = f"at most {hours:g} h" if hours else "no limit of hours (set launcher.max_hours or MAX_HOURS)"
    cost = "price not known (set launcher.price_per_hour)"
    if launcher.price_per_hour is not None:
        cost = f"about ${launcher.price_per_hour:.2f} an hour"
        if hours:
            cost = f"about ${hours * launcher.price_per_hour:.2f}"
    return [
        image,
        f"{launcher.resources.gpus} x {launcher.resources.gpu_type} on {launcher.cluster} ({launcher.preset})",
        f"models {', '.join(names)}: {size} from {config.storage.bucket} in {config.storage.region}{egress}",
        f"{limit}, {cost}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.runfile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--recipe", required=True, metavar="FILE")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    parser.add_argument("--env", required=True, help="minitest or production")
    parser.add_argument("--run-name", required=True)
    parser.add_argument("--image", required=True, help="by digest: REPOSITORY@sha256:…")
    parser.add_argument("--revision", default="0000000")
    parser.add_argument("--named", action="append", default=[], choices=["CONFIG", "RECIPE"], help="was chosen by hand")
    parser.add_argument("--output", type=Path, help="where the run file goes, whole or not at all")
    parser.add_argument("--receipt", type=Path, help="of the dry run that must have passed for exactly this")
    parser.add_argument("--env-file", type=Path, help="the same for a container engine on this machine: its --env-file")
    args = parser.parse_args(argv)
    max_hours = os.environ.get("MAX_HOURS") or None
    try:
        config, recipe = settings.load_pair(args.config, args.recipe, args.overrides, env=args.env)
        if args.receipt:
            check_receipt(args.receipt, args.env, args.revision, settings.digest(config, recipe))
        lines = summary(config, recipe, args.image, max_hours)
        text = render(
            config,
            recipe,
            env=args.env,
            run_name=args.run_name,
            image=args.image,
            revision=args.revision,
            config_file=of_image("CONFIG", args.config, "CONFIG" in args.named),
            recipe_file=of_image("RECIPE", args.recipe, "RECIPE" in args.named),
            overrides=args.overrides,
            max_hours=max_hours,
            endpoint=endpoint_of(config, reached_from_here=args.env_file is not None),
        )
    except (settings.ConfigError, Refused) as error:
        text = str(error)
        if isinstance(error, Refused):
            text = "submit    FAIL  " + text.replace("\n", "\n          ")
        print(text, file=sys.stderr)
        return 2
    print("\n".join(lines))
    if args.output:
        write_whole(args.output, text)
    if args.env_file:
        write_whole(args.env_file, for_engine(text, config))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that was killed is no traceback
    sys.exit(main())
