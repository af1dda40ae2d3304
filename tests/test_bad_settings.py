"""A corpus of bad settings: each is one small change to shipped files, and is refused by key or line, with its rule.

The last part changes shipped files at random, and asks that nothing is taken silently for what was not asked.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from ruamel.yaml import YAML
from test_config import (
    BASELINE,
    CONFIGS,
    CRITIC,
    LOCAL,
    MINITEST,
    RECIPES,
    RHO1,
    SMALL,
    TEST,
    VESSL,
    edited,
    empty_environment,
    findings,
    loader,
)

from wmtp.config import ConfigError, load_config, load_pair, origins, resolved

__all__ = ["edited", "empty_environment"]  # fixtures

# The change: in this file, the first of this text becomes that. Then what must be told: the key ("" for what
# is wrong before there are keys, where the line is), and words of the rule.
CORPUS = [
    # unknown key
    (VESSL, "mixed_precision:", "mixed_precison:", "devices.mixed_precison", "did you mean mixed_precision?"),
    (VESSL, "seed: 42", "sead: 42", "sead", "did you mean seed?"),
    (CRITIC, "num_epochs: 3", "lr: 3", "train.lr", "optim.lr"),
    (CRITIC, "lambda: 0.3", "lambda_: 0.3", "loss.lambda_", "did you mean lambda?"),
    (VESSL, "base: file", "bass: file", "paths.models.bass", "did you mean base?"),
    # type
    (VESSL, "seed: 42", 'seed: "42"', "seed", "without quotes"),
    (VESSL, "seed: 42", "seed: 42.0", "seed", "write 42"),
    (VESSL, "seed: 42", "seed: true", "seed", "int >= 0"),
    (VESSL, "seed: 42", "seed:", "seed", "int >= 0"),
    (VESSL, "seed: 42", "seed: [1]", "seed", "int >= 0"),
    (VESSL, "project: wmtp", "project: 12", "project", "quote it"),
    (VESSL, "project: wmtp", "project: true", "project", "quote it"),
    (VESSL, "project: wmtp", "project: ~", "project", "text"),
    (VESSL, "project: wmtp", 'project: "  "', "project", "text"),
    (VESSL, "save_final: true", "save_final: 1", "paths.checkpoints.save_final", "true or false"),
    (VESSL, "save_final: true", 'save_final: "true"', "paths.checkpoints.save_final", "without quotes"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: null", "launcher.resources.gpu_memory_gb", "number"),
    (VESSL, "rm: file:///app/models/starling-rm-7b", "rm: null", "paths.models.rm", "file://"),
    (CRITIC, "lr: 2e-5", 'lr: "2e-5"', "optim.lr", "without quotes"),
    (CRITIC, "    - 0.999", "    - x", "optim.betas.1", "number"),
    (CRITIC, "    sources:\n      - wmtp_code", "    sources: wmtp_code", "data.train.sources", "a list"),
    # range
    (VESSL, "workers: 16", "workers: 300", "storage.workers", ">= 1 and <= 256"),
    (VESSL, "part_size_mb: 100", "part_size_mb: 4", "storage.part_size_mb", ">= 5"),
    (VESSL, "timeout: 1800", "timeout: 0", "devices.distributed.timeout", ">= 1"),
    (VESSL, "seed: 42", "seed: -1", "seed", ">= 0"),
    (CRITIC, "heads: 4", "heads: 9", "model.heads", "<= 8"),
    (CRITIC, "max_length: 2048", "max_length: 7", "data.train.max_length", ">= 8"),
    (CRITIC, "lambda: 0.3", "lambda: 1.1", "loss.lambda", "<= 1"),
    (CRITIC, "max_weight: 3.0", "max_weight: 1", "loss.max_weight", "> 1"),
    (CRITIC, "epsilon: 0.05", "epsilon: 0", "loss.epsilon", "> 0"),
    (CRITIC, "weight_temperature: 0.7", "weight_temperature: 0", "loss.weight_temperature", "> 0"),
    (CRITIC, "    - 0.999", "    - 1.0", "optim.betas.1", "< 1"),
    (CRITIC, "    - 0.9\n    - 0.999", "    - 0.9", "optim.betas", "exactly 2"),
    (CRITIC, "warmup_ratio: 0.03", "warmup_ratio: 1.01", "optim.warmup_ratio", "<= 1"),
    (CRITIC, "grad_clip: 1.0", "grad_clip: .inf", "optim.grad_clip", "finite"),
    (CRITIC, "grad_clip: 1.0", "grad_clip: 1e999", "optim.grad_clip", "finite"),
    (CRITIC, "lr: 2e-5", "lr: .nan", "optim.lr", "finite"),
    (RHO1, "skip_threshold_percentile: 0.3", "skip_threshold_percentile: 1", "rho1.skip_threshold_percentile", "< 1"),
    (CRITIC, "    sources:\n      - wmtp_code", "    sources: []", "data.train.sources", "at least 1"),
    (CRITIC, "chunk_positions: auto", "chunk_positions: 0", "loss.chunk_positions", "auto"),
    # enumeration
    (VESSL, "sharding: full_shard", "sharding: hybrid", "devices.fsdp.sharding", "full_shard"),
    (VESSL, "mixed_precision: bf16", "mixed_precision: float16", "devices.mixed_precision", "scaler"),
    (VESSL, "target: vessl", "target: slurm", "launcher.target", "docker"),
    (CRITIC, "algo: critic-wmtp", "algo: critic_wmtp", "train.algo", "did you mean critic-wmtp?"),
    (CRITIC, "weight_norm: mean1.0_clip", "weight_norm: softmax", "loss.weight_norm", "mean1.0_clip"),
    (CRITIC, "full_finetune: true", "full_finetune: false", "train.full_finetune", "true"),
    (VESSL, "base: file:///", "base: gs://", "paths.models.base", "file://"),
    (VESSL, "tracking_uri: s3://", "tracking_uri: ftp://", "mlflow.tracking_uri", "sqlite:"),
    # impossible within one file
    (VESSL, "compute_backend: cuda", "compute_backend: cpu", "devices.distributed.backend", "nccl needs cuda"),
    (VESSL, "gpus: 4", "gpus: 0", "launcher.resources.gpus", "at least 1"),
    (VESSL, "gpus: 4", "gpus: 1", "devices.fsdp.enabled", "at least 2 ranks"),
    (CRITIC, "heads: 4", "heads: 0", "model.heads", ">= 1 and <= 8"),
    # outside of the work folder
    (VESSL, "base: file:///app/", "base: file:///workspace/", "paths.models.base", "under /app"),
    (VESSL, "wmtp_code: file:///app/", "wmtp_code: file:///app/../etc/", "paths.datasets.wmtp_code", "under /app"),
    (VESSL, "ref: file:///app/", "ref: file://", "paths.models.ref", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: file:///application/", "mlflow.tracking_uri", "under /app"),
    # variables
    (VESSL, "project: wmtp", "project: ${NO_SUCH}", "project", "without a default"),
    (VESSL, "bucket: ${S3_BUCKET_NAME:-wmtp}", "bucket: x-${NO_SUCH}-y", "storage.bucket", "without a default"),
    (VESSL, "project: wmtp", "project: ${1X}", "project", "${VAR}"),
    (VESSL, "project: wmtp", "project: ${A:-${B}}", "project", "nested"),
    (VESSL, "project: wmtp", "project: ${A:-}", "project", "text"),
    # duplicates
    (VESSL, "seed: 42", "seed: 42\nproject: b", "project", "line 4"),
    (CRITIC, "heads: 4", "heads: 4\n  heads: 4", "model.heads", "a key stands once"),
    # YAML traps
    (VESSL, "save_final: true", "save_final: yes", "paths.checkpoints.save_final", "write true"),
    (VESSL, "save_final: true", "save_final: True", "paths.checkpoints.save_final", "write true"),
    (VESSL, "accelerate: false", "accelerate: off", "storage.accelerate", "write false"),
    (VESSL, "seed: 42", "seed: 1_000", "seed", "write 1000"),
    (VESSL, "retries: 3", "retries: 1e1", "storage.retries", "write 10"),
    (CRITIC, "pack_sequences: true", "pack_sequences: On", "data.train.pack_sequences", "write true"),
    # ---- typos
    (VESSL, "experiment:", "experment:", "mlflow.experment", "did you mean experiment?"),
    (VESSL, "launcher:", "laucher:", "laucher", "did you mean launcher?"),
    (VESSL, "base_path:", "basepath:", "paths.checkpoints.basepath", "did you mean base_path?"),
    (VESSL, "sharding:", "Sharding:", "devices.fsdp.Sharding", "did you mean sharding?"),
    (VESSL, "    sharding:", "  sharding:", "devices.sharding", "did you mean devices.fsdp.sharding?"),
    (VESSL, "  num_proc: 8", "  gpus: 8", "devices.gpus", "did you mean launcher.resources.gpus?"),
    (VESSL, "seed: 42", "SEED: 42", "SEED", "checked strictly"),
    (VESSL, "seed: 42", '"seed ": 42', "seed ", "did you mean seed?"),
    (VESSL, "seed: 42", '"": 42', '""', "checked strictly"),
    (VESSL, "seed: 42", "42: seed", "42", "checked strictly"),
    (VESSL, "seed: 42", "null: 42", "null", "checked strictly"),
    (VESSL, "seed: 42", "devices.num_proc: 4", "devices.num_proc", "checked strictly"),
    (VESSL, "seed: 42", "${SEED:-seed}: 42", "${SEED:-seed}", "checked strictly"),
    (VESSL, "seed: 42", "_origins: {}", "_origins", "checked strictly"),
    (VESSL, "seed: 42", "model_config: {}", "model_config", "checked strictly"),
    (VESSL, "seed: 42", "\ufeffseed: 42", "\\ufeffseed", "did you mean seed?"),
    (VESSL, "seed: 42", "optim:\n  lr: 1e-4", "optim", "checked strictly"),
    (CRITIC, "heads: 4", "seed: 4", "model.seed", "did you mean seed?"),
    (CRITIC, "max_length:", "max_len:", "data.train.max_len", "did you mean max_length?"),
    (CRITIC, "warmup_ratio:", "warmup-ratio:", "optim.warmup-ratio", "did you mean warmup_ratio?"),
    (CRITIC, "betas:", "beta:", "optim.beta", "did you mean betas?"),
    (CRITIC, "value_lr:", "value_Ir:", "critic.value_Ir", "did you mean value_lr?"),
    (RHO1, "rho1:", "rho:", "rho", "did you mean rho1?"),
    # ---- wrong types
    (VESSL, "seed: 42", "seed: {a: 1}", "seed", "int >= 0"),
    (VESSL, "gpus: 4", "gpus: four", "launcher.resources.gpus", "int"),
    (VESSL, "gpus: 4", "gpus: [4]", "launcher.resources.gpus", "int"),
    (VESSL, "timeout: 1800", "timeout: 1800.5", "devices.distributed.timeout", "int"),
    (VESSL, "init_method: env://", "init_method: 5", "devices.distributed.init_method", "env://"),
    (VESSL, "accelerate: false", "accelerate: 0", "storage.accelerate", "true or false"),
    (VESSL, "base: file:///app/models/llama-7b-mtp", "base: [file:///app/m]", "paths.models.base", "a folder"),
    (VESSL, "base: file:///app/models/llama-7b-mtp", "base: {uri: file:///app/m}", "paths.models.base", "a folder"),
    (VESSL, "image: ghcr.io/wooshikwon/wmtp:latest", "image: {tag: latest}", "launcher.image", "text"),
    (
        VESSL,
        "  datasets:\n    mbpp_tiny: file:///app/datasets/mbpp_tiny\n    wmtp_code: file:///app/datasets/wmtp_code",
        "  datasets:\n    - file:///app/datasets/mbpp_tiny",
        "paths.datasets",
        "a mapping",
    ),
    (VESSL, "  models:\n", "  models:\n  # gone\n  more:\n", "paths.models", "a mapping of base, rm, ref"),
    (
        TEST,
        "  resources:\n    gpus: 1\n    gpu_type: local\n",
        "  resources: 1\n",
        "launcher.resources",
        "a mapping of",
    ),
    (
        TEST,
        "  resources:\n    gpus: 1\n    gpu_type: local\n",
        "  resources: []\n",
        "launcher.resources",
        "a mapping of",
    ),
    (CRITIC, "model:\n  heads: 4", "model: 4", "model", "a mapping of heads"),
    (CRITIC, "model:\n  heads: 4", "model: ~", "model", "a mapping of heads"),
    (CRITIC, "model:\n  heads: 4", "model:\n  - heads: 4", "model", "a mapping of heads"),
    (CRITIC, "heads: 4", "heads: true", "model.heads", "int"),
    (CRITIC, "heads: 4", "heads: 4.5", "model.heads", "int"),
    (CRITIC, "lr: 1e-3", "lr: fast", "pretrain.lr", "number"),
    (CRITIC, "lr: 2e-5", "lr: [2e-5]", "optim.lr", "number"),
    (CRITIC, "gamma: 1.0", "gamma: true", "critic.gamma", "number"),
    (CRITIC, "scheduler: cosine", "scheduler: 1", "optim.scheduler", "one of"),
    (CRITIC, "scheduler: cosine", "scheduler: [cosine]", "optim.scheduler", "one of"),
    (CRITIC, "    - production", "    - 1", "run.tags.1", "quote it"),
    (CRITIC, "    - production", "    - a: b", "run.tags.1", "text"),
    (CRITIC, "    - production", "    -", "run.tags.1", "text"),
    (CRITIC, "    - critic-wmtp\n    - production", "    first: critic-wmtp", "run.tags", "a list"),
    (CRITIC, "    - 0.9\n    - 0.999", "    first: 0.9\n    second: 0.999", "optim.betas", "a list"),
    (CRITIC, "      - wmtp_code", "      - [wmtp_code]", "data.train.sources.0", "text"),
    (CRITIC, "name: critic_wmtp", "name: 2026", "run.name", "quote it"),
    (CRITIC, "target: rm_sequence", "target: null", "critic.target", "rm_sequence"),
    # ---- units
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: 80GB", "launcher.resources.gpu_memory_gb", "number > 0"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: 80 GiB", "launcher.resources.gpu_memory_gb", "number > 0"),
    (VESSL, "gpu_memory_gb: 80", 'gpu_memory_gb: "80"', "launcher.resources.gpu_memory_gb", "write 80, without quotes"),
    (VESSL, "part_size_mb: 100", "part_size_mb: 100MB", "storage.part_size_mb", "int"),
    (VESSL, "timeout: 1800", "timeout: 30m", "devices.distributed.timeout", "int"),
    (VESSL, "stall_s: 30", "stall_s: 500ms", "storage.stall_s", "int"),
    (VESSL, "retry_wait_s: 10", "retry_wait_s: 10s", "storage.retry_wait_s", "int"),
    (VESSL, "max_hours: 24", "max_hours: 24h", "launcher.max_hours", "number"),
    (VESSL, "max_hours: 24", "max_hours: 1 day", "launcher.max_hours", "number"),
    (VESSL, "max_hours: 24", "price_per_hour: 2,50", "launcher.price_per_hour", "number"),
    (VESSL, "max_hours: 24", "price_per_hour: $2.50", "launcher.price_per_hour", "number"),
    (VESSL, "save_interval: 100", "save_interval: 100 steps", "paths.checkpoints.save_interval", "int"),
    (CRITIC, "max_length: 2048", "max_length: 2k", "data.train.max_length", "int"),
    (CRITIC, "warmup_ratio: 0.03", "warmup_ratio: 3%", "optim.warmup_ratio", "number"),
    # ---- negative, zero, not finite
    (VESSL, "gpus: 4", "gpus: -4", "launcher.resources.gpus", ">= 0"),
    (VESSL, "max_hours: 24", "max_hours: -1", "launcher.max_hours", "> 0"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: .inf", "launcher.resources.gpu_memory_gb", "finite"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: -0.0", "launcher.resources.gpu_memory_gb", "> 0"),
    (VESSL, "seed: 42", "seed: .inf", "seed", "int"),
    (VESSL, "seed: 42", "seed: .NaN", "seed", "int"),
    (CRITIC, "lr: 2e-5", "lr: -2e-5", "optim.lr", "> 0"),
    (CRITIC, "lr: 2e-5", "lr: 1e-400", "optim.lr", "> 0"),
    (CRITIC, "num_epochs: 3", "num_epochs: -3", "train.num_epochs", ">= 1"),
    (CRITIC, "batch_size: 2", "batch_size: -2", "data.train.batch_size", ">= 1"),
    (CRITIC, "accumulation_steps: 4", "accumulation_steps: -4", "train.accumulation_steps", ">= 1"),
    (CRITIC, "gamma: 1.0", "gamma: .NaN", "critic.gamma", "finite"),
    (CRITIC, "max_weight: 3.0", "max_weight: .INF", "loss.max_weight", "finite"),
    (CRITIC, "max_weight: 3.0", "max_weight: -.inf", "loss.max_weight", "finite"),
    (CRITIC, "weight_decay: 0.01", "weight_decay: nan", "optim.weight_decay", "number"),
    (CRITIC, "    - 0.9\n", "    - .nan\n", "optim.betas.0", "finite"),
    # ---- huge, long
    (VESSL, "seed: 42", "seed: 9223372036854775808", "seed", "below 2^63"),
    (VESSL, "seed: 42", "seed: " + "9" * 399, "seed", "below 2^63"),
    (VESSL, "seed: 42", "seed: " + "9" * 5000, "seed", "int"),
    (VESSL, "timeout: 1800", "timeout: 1000000000000000", "devices.distributed.timeout", "below 2^31"),
    (VESSL, "gpus: 4", "gpus: 2147483648", "launcher.resources.gpus", "below 2^31"),
    (VESSL, "max_hours: 24", "max_hours: 9007199254740993", "launcher.max_hours", "1e30"),
    (VESSL, "max_hours: 24", "max_hours: 1" + "0" * 320, "launcher.max_hours", "finite"),
    (CRITIC, "batch_size: 2", "batch_size: 4294967296", "data.train.batch_size", "below 2^31"),
    (CRITIC, "lr: 2e-5", "lr: 1" + "0" * 500, "optim.lr", "finite"),
    (VESSL, "project: wmtp", "project: " + "x" * 5000, "project", "at most 4096 bytes"),
    (VESSL, "base: file:///app/", "base: file:///app/" + "x/" * 5000, "paths.models.base", "at most 4096 bytes"),
    (CRITIC, "name: critic_wmtp", "name: " + "x" * 201, "run.name", "at most 200 bytes"),
    (CRITIC, "name: critic_wmtp", "name: " + "가" * 67, "run.name", "at most 200 bytes"),
    (VESSL, "seed: 42", "x" * 900 + ": 42", "x" * 77 + "…x", "checked strictly"),
    (VESSL, "seed: 42", "x" * 2000 + ": 42", "", "YAML"),
    (VESSL, "seed: 42", "seed: " + "[" * 17 + "]" * 17, "", "at most 16 levels"),
    (VESSL, "seed: 42", "seed: " + "{a: " * 5000, "", "at most 16 levels"),
    (VESSL, "seed: 42", "seed:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 500)), "", "at most 16 levels"),
    (VESSL, "seed: 42", "? " * 3000 + "seed", "", "a key is a word"),
    # ---- characters
    (VESSL, "project: wmtp", "project: wm\x07tp", "", "printable"),
    (VESSL, "project: wmtp", "project: wm\x1b[31mtp", "", "printable"),
    (VESSL, "project: wmtp", "project: wm\x7ftp", "", "printable"),
    (VESSL, "project: wmtp", "project: wm\x9btp", "", "printable"),
    (VESSL, "project: wmtp", "project: wm\ufffetp", "", "printable"),
    (VESSL, "project: wmtp", "project: wmtp\0", "", "printable"),
    (VESSL, "project: wmtp", "project: wm\u2028tp", "", "line feed"),
    (VESSL, "project: wmtp", "project: wm\u0085tp", "", "line feed"),
    (VESSL, "project: wmtp", r'project: "wm\x1b[31mtp"', "project", "prints"),
    (VESSL, "project: wmtp", r'project: "wm\x7ftp"', "project", "prints"),
    (VESSL, "project: wmtp", r'project: "wm\u2028tp"', "project", "prints"),
    (VESSL, "project: wmtp", r'project: "wm\u202etp"', "project", "prints"),
    (VESSL, "project: wmtp", r'project: "\ufeff"', "project", "prints"),
    (VESSL, "project: wmtp", "project: wm\u200btp", "project", "prints"),
    (VESSL, "project: wmtp", "project: wm\u00a0tp", "project", "prints"),
    (VESSL, "project: wmtp", r'project: "wm\ud800"', "project", "text"),
    (VESSL, "project: wmtp", r'project: "wm\UFFFFFFFF"', "", "YAML"),
    (VESSL, "project: wmtp", r'project: "wm\U00110000"', "", "YAML"),
    (VESSL, "project: wmtp", r'project: "wm\q"', "", "YAML"),
    (VESSL, "project: wmtp", "project: 'wm\ttp'", "project", "on one line"),
    (VESSL, "project: wmtp", "project: |\n  wmtp", "project", "on one line"),
    (VESSL, "project: wmtp", "project: >\n  wm\n  tp", "project", "on one line"),
    (VESSL, "base: file:///app/", r'base: "file:///app/\0"' + " #", "paths.models.base", "prints"),
    (VESSL, "seed: 42", r'"a\nb": 42', r"a\nb", "checked strictly"),
    (VESSL, "seed: 42", r'"a\u2028b": 42', r"a\u2028b", "checked strictly"),
    (VESSL, "seed: 42", r'"\ud800": 42', "", "a key is a word"),
    (VESSL, "seed: 42", r'seed: "\x85"', "seed", "int"),
    (CRITIC, "name: critic_wmtp", r'name: "a\0b"', "run.name", "prints"),
    (CRITIC, '{solution}</s>"', r'{solution}\e"', "critic.reward_template", "prints"),
    # ---- what is written twice
    (VESSL, "seed: 42", "seed: 42\nseed: 42", "seed", "line 5"),
    (VESSL, "seed: 42", 'seed: 42\n"seed": 1', "seed", "line 5"),
    (VESSL, "seed: 42", "seed: 42\n? seed\n: 1", "seed", "line 5"),
    (VESSL, "devices:\n", "mlflow:\n  experiment: x\ndevices:\n", "mlflow", "a key stands once"),
    (VESSL, "    wmtp_code:", "    mbpp_tiny:", "paths.datasets.mbpp_tiny", "a key stands once"),
    (
        TEST,
        "  resources:\n    gpus: 1\n",
        "  resources: {gpus: 1, gpus: 1}\n  more:\n",
        "launcher.resources.gpus",
        "once",
    ),
    (CRITIC, "  lr: 2e-5", "  lr: 2e-5\n  lr: 3e-5", "optim.lr", "a key stands once"),
    # ---- numbers and words that another YAML reads otherwise
    *[
        (VESSL, "seed: 42", f"seed: {text}", "seed", says)
        for text, says in {
            "no": "int",
            "on": "int",
            "12:30": "int",
            "2026-01-01": "int",
            "0o17": "write 15",
            "0x10": "write 16",
            "010": "write 10",
            "00": "write 0",
            "-017": "write -17",
            "0b101": "int",
            "1e3": "write 1000",
            "1E+2": "write 100",
            ".5": "int",
            "+.5": "int",
            "42.": "write 42",
            "1,000": "int",
            "1__000": "write 1000",
            "4 2": "int",
            "４２": "int",
            "42\u00a0": "int",
            "=": "int",
            "<<": "int",
            "Null": "int",
            "~": "int",
            "42abc": "int",
            "0x1G": "int",
            "${NONE:-0o17}": "write 15",
            "${NONE:- 42}": "int",
            "|\n  42": "int",
        }.items()
    ],
    (VESSL, "gpus: 4", "gpus: 0o4", "launcher.resources.gpus", "write 4"),
    (VESSL, "gpu_memory_gb: 80", "gpu_memory_gb: 0x50", "launcher.resources.gpu_memory_gb", "write 80"),
    (VESSL, "timeout: 1800", "timeout: 00:30:00", "devices.distributed.timeout", "int"),
    (VESSL, "enabled: true", "enabled: y", "devices.distributed.enabled", "write true"),
    (VESSL, "enabled: true", "enabled: N", "devices.distributed.enabled", "write false"),
    (VESSL, "enabled: true", "enabled: TRUE", "devices.distributed.enabled", "write true"),
    (VESSL, "enabled: true", "enabled: ~", "devices.distributed.enabled", "true or false"),
    (VESSL, "enabled: true", "enabled: ! true", "", "tags are not read"),
    (VESSL, "project: wmtp", "project: 1e3", "project", "quote it"),
    (VESSL, "project: wmtp", "project: .5", "project", "quote it"),
    (VESSL, "project: wmtp", "project: 0x10", "project", "quote it"),
    (VESSL, "project: wmtp", "project: 010", "project", "quote it"),
    (VESSL, "project: wmtp", "project: .nan", "project", "quote it"),
    (CRITIC, "lr: 2e-5", "lr: 2_0e-5", "optim.lr", "write 20e-5"),
    (CRITIC, "lr: 2e-5", "lr: 0x1p-3", "optim.lr", "number"),
    (CRITIC, "lr: 2e-5", "lr: 2e", "optim.lr", "number"),
    (CRITIC, "lr: 2e-5", "lr: 2e-5f", "optim.lr", "number"),
    (CRITIC, "lr: 2e-5", "lr: 1/50000", "optim.lr", "number"),
    (CRITIC, "scheduler: cosine", "scheduler: no", "optim.scheduler", "one of"),
    (CRITIC, "enabled: false", "enabled: off", "train.early_stopping.enabled", "write false"),
    # ---- anchors, tags, documents, tabs, what is no YAML
    (VESSL, "seed: 42", "seed: &s 42", "", "anchors"),
    (VESSL, "log_interval: 10", "log_interval: *s", "", "anchors"),
    (VESSL, "seed: 42", "&s seed: 42", "", "anchors"),
    (VESSL, "devices:\n", "devices: &d\n", "", "anchors"),
    (VESSL, "seed: 42", "<<: {seed: 42}", "", "merge"),
    (VESSL, "seed: 42", '"<<": {seed: 42}', "", "merge"),
    (VESSL, "seed: 42", "<<: *d", "", "merge"),
    (VESSL, "seed: 42", "seed: !!int 42", "", "tags"),
    (VESSL, "seed: 42", "seed: !!int '42'", "", "tags"),
    (VESSL, "seed: 42", "!!str seed: 42", "", "tags"),
    (VESSL, "project: wmtp", "project: !!python/object/apply:os.system [id]", "", "tags"),
    (VESSL, "project: wmtp", "project: !!binary d210cA==", "", "tags"),
    (VESSL, "project: wmtp", "project: !wmtp wmtp", "", "tags"),
    (VESSL, "project: wmtp", "project: ! 12", "", "tags"),
    (CRITIC, "betas:\n", "betas: !!set\n", "", "tags"),
    (VESSL, "seed: 42", "---\nseed: 42", "", "one YAML document"),
    (VESSL, "seed: 42", "...\n---\nseed: 42", "", "one YAML document"),
    (VESSL, "# Production", "%YAML 1.1\n---\n# Production", "", "1.2"),
    (VESSL, "# Production", "%YAML 1.3\n---\n# Production", "", "1.2"),
    (VESSL, "# Production", "%YAML one\n---\n# Production", "", "1.2"),
    (VESSL, "# Production", "%TAG ! tag:example.org,2000:\n---\n# Production", "", "1.2"),
    (VESSL, "  models:", "\tmodels:", "", "a tab never does"),
    (VESSL, "  models:", "  \tmodels:", "", "a tab never does"),
    (VESSL, "seed: 42", "seed:\t42", "", "a tab never does"),
    (VESSL, "seed: 42", "seed: 42\t# the answer", "", "a tab never does"),
    (CRITIC, "      - wmtp_code", "\t\t\t- wmtp_code", "", "a tab never does"),
    (VESSL, "seed: 42", "seed:42", "", "YAML"),
    (VESSL, "seed: 42", " seed: 42", "", "YAML"),
    (VESSL, "seed: 42", "seed: 42: 43", "", "YAML"),
    (VESSL, "seed: 42", "seed: - 42", "", "YAML"),
    (VESSL, "seed: 42", "- seed: 42", "", "YAML"),
    (VESSL, "seed: 42", "seed: @42", "", "YAML"),
    (VESSL, "seed: 42", "seed: `42`", "", "YAML"),
    (VESSL, "seed: 42", "seed: %42", "", "YAML"),
    (VESSL, "seed: 42", "seed: 42}", "seed", "int"),
    (VESSL, "project: wmtp", "project: {{ project }}", "", "a key is a word"),
    (VESSL, "project: wmtp", "? [project]\n: wmtp", "", "a key is a word"),
    (VESSL, "project: wmtp", "project: 'wm'tp", "", "YAML"),
    (VESSL, "project: wmtp", "project: |9\n  wmtp", "", "YAML"),
    (VESSL, "project: wmtp", "project: |0\n  wmtp", "", "YAML"),
    (VESSL, "sharding: full_shard\n", "sharding: [full_shard\n", "", "YAML"),
    (VESSL, "sharding: full_shard\n", "sharding: {full_shard\n", "", "YAML"),
    (VESSL, "sharding: full_shard\n", "sharding: 'full_shard\n", "", "YAML"),
    (VESSL, "sharding: full_shard\n", 'sharding: "full_shard\n', "", "YAML"),
    # ---- addresses, and what lies outside of the cluster's work folder
    (VESSL, "base: file:///app/", "base: /app/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: app/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: ~/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: C:\\", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: file:/app/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: FILE:///app/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/", "base: https://host/", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/models/llama-7b-mtp", "base: file://", "paths.models.base", "file://"),
    (VESSL, "base: file:///app/models/llama-7b-mtp", "base: s3://", "paths.models.base", "s3://"),
    (VESSL, "base: file:///app/", "base: s3:///", "paths.models.base", "s3://"),
    (VESSL, "base: file:///app/", "base: s3://wmtp/../", "paths.models.base", "s3://"),
    (VESSL, "base: file:///app/", "base: file://app/", "paths.models.base", "under /app"),
    (VESSL, "base: file:///app/", "base: file://localhost/app/", "paths.models.base", "under /app"),
    (VESSL, "base: file:///app/", "base: file:///App/", "paths.models.base", "under /app"),
    (VESSL, "base: file:///app/", "base: file:////etc/", "paths.models.base", "under /app"),
    (VESSL, "base: file:///app/", "base: file:///app/./x/../../", "paths.models.base", "under /app"),
    (VESSL, "rm: file:///app/", "rm: file:///home/me/", "paths.models.rm", "under /app"),
    (VESSL, "mbpp_tiny: file:///app/", "mbpp_tiny: file:///tmp/", "paths.datasets.mbpp_tiny", "under /app"),
    (MINITEST, "base_path: file:///app/", "base_path: file:///", "paths.checkpoints.base_path", "under /app"),
    (MINITEST, "registry_uri: file:///app/", "registry_uri: file:///", "mlflow.registry_uri", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: file:///app/%2e%2e/", "mlflow.tracking_uri", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: sqlite:////tmp/", "mlflow.tracking_uri", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: sqlite:///../", "mlflow.tracking_uri", "under /app"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: sqlite:", "mlflow.tracking_uri", "sqlite:///"),
    (MINITEST, "tracking_uri: file:///app/", "tracking_uri: postgresql://h/", "mlflow.tracking_uri", "sqlite:///"),
    (MINITEST, "tracking_uri: file:///app/mlruns_test", "tracking_uri: http://", "mlflow.tracking_uri", "http://"),
    (MINITEST, "tracking_uri: file:///app/mlruns_test", "tracking_uri: https://a b/", "mlflow.tracking_uri", "http://"),
    (VESSL, "bucket: ${S3_BUCKET_NAME:-wmtp}", "bucket: s3://wmtp", "storage.bucket", "no s3://"),
    (VESSL, "bucket: ${S3_BUCKET_NAME:-wmtp}", "bucket: wmtp/models", "storage.bucket", "no /"),
    (VESSL, "bucket: ${S3_BUCKET_NAME:-wmtp}", "bucket: my bucket", "storage.bucket", "letters"),
    (CRITIC, "name: critic_wmtp", "name: ../critic", "run.name", "no /"),
    (CRITIC, "name: critic_wmtp", "name: .critic", "run.name", "no dot"),
    # ---- placeholders
    *[
        (VESSL, "project: wmtp", f"project: {text}", "project", says)
        for text, says in {
            "${A": "nothing else",
            "a${A:-x": "nothing else",
            "${}": "nothing else",
            "${ A }": "nothing else",
            "${A-b}": "nothing else",
            "${A:=b}": "nothing else",
            "${A:?b}": "nothing else",
            "${A:-$B}": "nothing else",
            "${A:-${A}}": "not nested",
            "${A${B}}": "not nested",
            "${A.b}": "nothing else",
            "$A": "nothing else",
            "x-$A-y": "nothing else",
            "$(id)": "nothing else",
            "'$A'": "nothing else",
            "$${A}": "without a default",
            "${project}": "without a default",
            "'${A}'": "without a default",
            "${A:- }": "not empty",
        }.items()
    ],
    (VESSL, "seed: 42", "seed: ${A:-}", "seed", "int"),
    (VESSL, "seed: 42", "seed: ${A:-many}", "seed", "int"),
    (
        VESSL,
        "cache_dir: ${WMTP_CACHE_DIR:-/cache/models}",
        "cache_dir: $HOME/.cache",
        "storage.cache_dir",
        "nothing else",
    ),
    (CRITIC, "lr: 2e-5", "lr: ${A:-2e-5s}", "optim.lr", "number"),
    (CRITIC, "    - production", "    - ${A}", "run.tags.1", "without a default"),
    # ---- impossible within one file
    (VESSL, "compute_backend: cuda", "compute_backend: mps", "devices.compute_backend", "a Mac's own device"),
    (TEST, "gpus: 1", "gpus: 2", "launcher.resources.gpus", "more than one device needs ranks"),
    (LOCAL, "gpus: 2", "gpus: 1", "devices.fsdp.enabled", "at least 2 ranks"),
]


@functools.cache
def unchanged(*files: Path, env: str | None = None) -> None:
    """What a change is made to loads: nothing else than the change can be what is refused."""
    load_pair(*files, env=env) if len(files) == 2 else loader(*files)(*files)


def told(key: str, says: str, found: list[Any]) -> Any:
    """The one finding of this key, with its rule."""
    mine = [finding for finding in found if finding.key == key]
    assert len(mine) == 1, [str(f) for f in found]
    assert says in mine[0].rule, mine[0].rule
    assert max(len(str(f)) for f in found) < 1000
    return mine[0]


@pytest.mark.parametrize(("path", "old", "new", "key", "says"), CORPUS, ids=[f"{c[3]}={c[2][:30]!a}" for c in CORPUS])
def test_a_bad_setting_is_refused_with_key_line_and_rule(
    path: Path, old: str, new: str, key: str, says: str, edited: Callable[..., tuple[Path, int]]
) -> None:
    unchanged(path)
    copy, line = edited(path, old, new)
    assert copy.read_text("utf-8") != path.read_text("utf-8")
    finding = told(key, says, findings(loader(path), copy))
    file, _, at = finding.place.rpartition(":")
    assert file == str(copy)
    if not key:
        # An opening without its end is told at the end of the file.
        last = len(copy.read_text("utf-8").splitlines()) + 1
        assert int(at) in range(line, line + new.count("\n") + 2) or (says == "YAML" and int(at) == last)
        return
    # A key that a rule between two keys names may stand elsewhere than the change does.
    word = next((p for p in reversed(key.split(".")) if not p.isdigit()), "")
    here = copy.read_text("utf-8").split("\n")[int(at) - 1]
    assert word in here or here.strip().startswith("-") or word not in copy.read_text("utf-8")
    if new.split(":")[0].strip() == word and "\n" not in new:
        assert int(at) == line


def test_the_corpus_is_large_and_says_nothing_twice() -> None:
    assert len({(c[0], c[1], c[2]) for c in CORPUS}) == len(CORPUS) >= 120


@pytest.mark.parametrize(
    ("path", "old", "key"),
    [
        (VESSL, "project: wmtp\n", "project"),
        (VESSL, "    base: file:///app/models/llama-7b-mtp\n", "paths.models.base"),
        (VESSL, "  experiment: wmtp/prod\n", "mlflow.experiment"),
        (VESSL, "  target: vessl\n", "launcher.target"),
        (CRITIC, "  algo: critic-wmtp\n", "train.algo"),
        (CRITIC, "    sources:\n      - wmtp_code\n", "data.train.sources"),
    ],
)
def test_a_missing_key_is_named_with_the_line_of_its_section(
    path: Path, old: str, key: str, edited: Callable[..., tuple[Path, int]]
) -> None:
    unchanged(path)
    copy, _ = edited(path, old, "")
    (finding,) = findings(loader(path), copy)
    assert (finding.key, finding.what) == (key, "missing")
    line = int(finding.place.rpartition(":")[2])
    section = key.split(".")[-2] + ":" if "." in key else "seed:"
    assert copy.read_text().splitlines()[line - 1].strip().startswith(section)


def test_a_value_that_a_default_is_made_from_is_told_alone(edited: Callable[..., tuple[Path, int]]) -> None:
    copy, _ = edited(TEST, "gpu_type: local", "gpu_type: 4")
    (finding,) = findings(load_config, copy)
    assert finding.key == "launcher.resources.gpu_type"


# ---- the whole file ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [VESSL, CRITIC], ids=["config", "recipe"])
@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (lambda text: b"", 1, "one mapping"),
        (lambda text: b"  \n\n", 1, "one mapping"),
        (lambda text: b"# only a comment\n", 1, "one mapping"),
        (lambda text: b"---\n", 1, "one mapping"),
        (lambda text: b"...\n", 1, "mapping"),
        (lambda text: b"~\n", 1, "one mapping"),
        (lambda text: b"just words\n", 1, "one mapping"),
        (lambda text: b"42\n", 1, "one mapping"),
        (lambda text: b"\t", 1, "a tab never does"),
        (lambda text: b"[]\n", 1, "one mapping"),
        (lambda text: b"".join(b"- " + line + b"\n" for line in (b"a: 1", b"b: 2")), 1, "one mapping"),
        (lambda text: json.dumps(text).encode(), 1, "one mapping"),
        (lambda text: text.encode() + b"---\n" + text.encode(), None, "one YAML document"),
        (lambda text: text.encode() + b"...\nmore: 1\n", None, "one YAML document"),
        (lambda text: text.encode() + b"\0", None, "printable"),
        (lambda text: text.encode() + b"\x1a", None, "printable"),
        (lambda text: text.encode() + b"# \xe9\n", None, "UTF-8"),
        (lambda text: b"\xff\xfe" + text.encode(), 1, "UTF-8"),
        (lambda text: text.encode("utf-16"), 1, "UTF-8"),
        (lambda text: text.encode("utf-16-le"), 1, "printable"),
        (lambda text: text.encode("utf-32"), 1, "UTF-8"),
        (lambda text: text.replace("\n", "\u0085").encode(), 1, "line feed"),
        (lambda text: text.encode()[:-1] + b": {", None, "YAML"),
        (lambda text: b"\x1f\x8b\x08\x00" + text.encode(), 1, "UTF-8"),
    ],
)
def test_what_is_no_strict_yaml_mapping_is_refused_with_its_line(
    path: Path, change: Callable[[str], bytes], line: int | None, says: str, tmp_path: Path
) -> None:
    unchanged(path)
    text = path.read_text("utf-8")
    copy = tmp_path / path.name
    copy.write_bytes(change(text))
    assert copy.read_bytes() != path.read_bytes()
    (finding,) = findings(loader(path), copy)
    assert says in finding.rule, str(finding)
    file, _, at = finding.place.rpartition(":")
    # What is put behind the file is told there.
    assert file == str(copy) and (int(at) == line if line else int(at) > 3)


# ---- overrides, variables, and what two files can't be together ----------------------------------

OVERRIDES = [
    ("trian.max_steps=3", "trian.max_steps", "did you mean train.max_steps?"),
    ("train.max_step=3", "train.max_step", "did you mean max_steps?"),
    ("train.max_steps=0", "train.max_steps", ">= 1"),
    ("train.max_steps=", "train.max_steps", "int"),
    ("train.max_steps=1e2", "train.max_steps", "write 100"),
    ("train.max_steps=0x10", "train.max_steps", "write 16"),
    ("train.max_steps==3", "train.max_steps", "int"),
    ("train.max_steps=3 # few", "train.max_steps", "int"),
    ("train.max_steps='3'", "train.max_steps", "without quotes"),
    ("train.max_steps=null", "train.max_steps", "int"),
    ("train.max_steps.=3", 'train.max_steps.""', "only a mapping has keys"),
    ("train.max_steps.x=3", "train.max_steps.x", "only a mapping has keys"),
    ("train.max_steps.x=3", "train.max_steps", "int"),
    ("data.train.sources.0=x", "data.train.sources.0", "only a mapping has keys"),
    ("train=3", "train", "a mapping"),
    ("train=[3]", "train", "a mapping"),
    ("train={max_steps: 3}", "train.algo", "required"),
    ("train..max_steps=3", 'train.""', "checked strictly"),
    (".train=3", '"".train', "an override names a key"),
    (".=3", '"".""', "an override names a key"),
    ("--seed=3", "--seed", "an override names a key"),
    ("SEED=3", "SEED", "an override names a key"),
    ("se\ned=3", r"se\ned", "an override names a key"),
    ("x" * 5000 + "=3", "x" * 77 + "…x", "an override names a key"),
    ("seed.\ud800=3", r"seed.\ud800", "a key is a word"),
    ("seed=" + "9" * 5000, "seed", "int"),
    ("seed=[1", "seed", "YAML"),
    ("seed={", "seed", "YAML"),
    ("optim.betas=[0.9", "optim.betas", "YAML"),
    ("optim.betas=0.9,0.99", "optim.betas", "a list"),
    ("project=[*a]", "project", "anchors"),
    ("project=[!!str a]", "project", "tags"),
    ("project='a' b", "project", "YAML"),
    ("project='a'\n---\nb", "project", "one YAML document"),
    ("project='a': b", "project", "text"),
    ("project=a\nb", "project", "on one line"),
    ("project=a\ud800", "project", "text"),
    ("project=$HOME", "project", "nothing else"),
    ("project='${NO_SUCH}'", "project", "without a default"),
    ("paths.datasets={x: file:///a, x: file:///b}", "paths.datasets.x", "a key stands once"),
    ("paths.datasets.=file:///app/x", 'paths.datasets.""', "not empty"),
    ("paths.models.rm=none", "paths.models.rm", "file://"),
    ("storage.endpoint=", "storage.endpoint", "text"),
    ("seed", "", "key=value"),
    ("seed:3", "", "key=value"),
    ("=3", "", "key=value"),
    ("", "", "key=value"),
]


@pytest.mark.parametrize(("text", "key", "says"), OVERRIDES, ids=[ascii(o[0][:30]) for o in OVERRIDES])
def test_a_wrong_override_is_refused_by_name(text: str, key: str, says: str) -> None:
    unchanged(LOCAL, SMALL, env="minitest")
    found = findings(load_pair, LOCAL, SMALL, [text], env="minitest")
    assert any((f.place, f.key) == ("--set", key) and says in f.rule for f in found), [str(f) for f in found]


def test_an_override_mends_no_section_that_is_none(edited: Callable[..., tuple[Path, int]]) -> None:
    copy, _ = edited(TEST, "  resources:\n    gpus: 1\n    gpu_type: local\n", "  resources: 1\n")
    told(
        "launcher.resources.gpus", "only a mapping has keys", findings(load_config, copy, ["launcher.resources.gpus=1"])
    )


ENVIRONMENTS = [
    # by a placeholder: `seed: ${V}` and `base: ${V}` of a cluster
    *[
        ("V", value, "seed: 42", "seed: ${V}", "seed", says)
        for value, says in {
            "": "int",
            "many": "int",
            "12 ": "int",
            "0x10": "write 16",
            "1_000": "write 1000",
            "null": "int",
            "true": "int",
            "${V}": "int",
            "$V": "int",
            "1\n2": "int",
            "\x1b[1m": "int",
            "1e1": "write 10",
            "9" * 20: "below 2^63",
            "-1": ">= 0",
        }.items()
    ],
    *[
        ("V", value, "base: file:///app/models/llama-7b-mtp", "base: ${V}", "paths.models.base", says)
        for value, says in {
            "": "a folder",
            "/app/m": "file://",
            "file:///etc": "under /app",
            "${V}": "file://",
            "file:///app/\n": "one line",
            "file:///app/\udcff": "file://",
            "x" * 5000: "at most 4096 bytes",
        }.items()
    ],
    # those that win over the file
    ("S3_BUCKET_NAME", "s3://wmtp", "", "", "storage.bucket", "no s3://"),
    ("S3_BUCKET_NAME", "a b", "", "", "storage.bucket", "letters"),
    ("AWS_DEFAULT_REGION", "  ", "", "", "storage.region", "text"),
    ("WMTP_CACHE_DIR", "/a\nb", "", "", "storage.cache_dir", "on one line"),
    *[
        ("WMTP_STORAGE_RETRIES", value, "", "", "storage.retries", "int >= 1")
        for value in ("0", "-1", "3.0", "0x3", "no")
    ],
]


@pytest.mark.parametrize(
    ("name", "value", "old", "new", "key", "says"),
    ENVIRONMENTS,
    ids=[f"{e[4]}={e[1][:20]!a}" for e in ENVIRONMENTS],
)
def test_a_bad_variable_is_refused_by_the_key_that_takes_it(
    name: str,
    value: str,
    old: str,
    new: str,
    key: str,
    says: str,
    edited: Callable[..., tuple[Path, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unchanged(VESSL)
    copy, _ = edited(VESSL, old, new)
    monkeypatch.setenv(name, "1" if key in ("seed", "storage.retries") else "file:///app/x" if new else "x")
    load_config(copy)
    monkeypatch.setenv(name, value)
    finding = told(key, says, [f for f in findings(load_config, copy) if f.key == key])
    assert finding.place == f"environment {name}" or new


PAIRS = [
    (VESSL, BASELINE, ["devices.compute_backend=cpu"], "devices.distributed.backend", "nccl"),
    (LOCAL, BASELINE, ["devices.distributed.backend=nccl"], "devices.distributed.backend", "nccl"),
    (LOCAL, BASELINE, ["devices.compute_backend=mps"], "devices.distributed.enabled", "ranks"),
    (VESSL, BASELINE, ["devices.distributed.enabled=false"], "launcher.resources.gpus", "more than one device"),
    (VESSL, BASELINE, ["devices.fsdp.enabled=false"], "devices.fsdp.enabled", "ranks"),
    (LOCAL, BASELINE, ["launcher.resources.gpus=0"], "launcher.resources.gpus", "at least 1"),
    (VESSL, BASELINE, ["data.eval.max_length=8", "model.heads=8"], "data.eval.max_length", "heads"),
    (VESSL, BASELINE, ["data.train.sources=[nope]"], "data.train.sources.0", "wmtp_code"),
    (VESSL, BASELINE, ["data.eval.sources=[mbpp_tiny, nope]"], "data.eval.sources.1", "mbpp_tiny"),
    (VESSL, BASELINE, ["train.max_steps=99"], "paths.checkpoints.save_interval", "max_steps"),
    (VESSL, BASELINE, ["devices.distributed.enabled=false"], "devices.fsdp.enabled", "both or neither"),
    (
        VESSL,
        BASELINE,
        ["data.eval.sources=[]", "train.early_stopping.enabled=true"],
        "train.early_stopping.enabled",
        "held-out",
    ),
    (
        VESSL,
        CRITIC,
        ["data.eval.sources=[]", "pretrain.early_stopping.enabled=true"],
        "pretrain.early_stopping.enabled",
        "held-out",
    ),
    (VESSL, CRITIC, ["critic.reward_template='{answer}'"], "critic.reward_template", "{solution}"),
    (VESSL, CRITIC, ["critic.reward_template='{prompt}'"], "critic.reward_template", "fields"),
    (VESSL, BASELINE, ["launcher.target=docker", "paths.models.base=file:///tmp/x"], "paths.models.base", "/app"),
    (VESSL, BASELINE, ["paths.models.base=file://tests/x"], "paths.models.base", "/app"),
    (LOCAL, BASELINE, ["paths.models.base=file://tests/x"], "paths.models.base", "ENV=test"),
    (VESSL, RHO1, ["data.train.max_length=8", "model.heads=8"], "data.train.max_length", "heads"),
    (VESSL, BASELINE, ["devices.compute_backend=mps"], "devices.compute_backend", "a Mac's own device"),
    (VESSL, BASELINE, ["launcher.target=docker", "devices.compute_backend=mps"], "devices.compute_backend", "Mac"),
    (VESSL, BASELINE, ["launcher.target=docker", "mlflow.tracking_uri=sqlite:////x.db"], "mlflow.tracking_uri", "/app"),
    (VESSL, BASELINE, ["launcher.target=docker", "paths.datasets.x=file:///x"], "paths.datasets.x", "/app"),
    (TEST, SMALL, ["launcher.resources.gpus=2"], "launcher.resources.gpus", "more than one device needs ranks"),
    (TEST, SMALL, ["devices.fsdp.enabled=true"], "devices.fsdp.enabled", "both or neither"),
    (TEST, SMALL, ["devices.compute_backend=cuda", "launcher.resources.gpus=0"], "launcher.resources.gpus", "1 GPU"),
    (MINITEST, SMALL, ["train.max_steps=4"], "paths.checkpoints.save_interval", "max_steps"),
    (MINITEST, SMALL, ["paths.checkpoints.save_interval=13"], "paths.checkpoints.save_interval", "max_steps"),
    (MINITEST, SMALL, ["paths.models={base: file:///app/m}"], "paths.models.rm", "critic-wmtp needs the rm model"),
    (MINITEST, SMALL, ["train.algo=rho1-wmtp", "paths.models={base: file:///app/m}"], "paths.models.ref", "ref model"),
    (MINITEST, SMALL, ["paths.datasets={x: file:///app/x}", "data.eval.sources=[x]"], "data.train.sources.0", "are: x"),
    (MINITEST, SMALL, ["paths.datasets={}", "data.eval.sources=[]"], "data.train.sources.0", "there are: none"),
    (MINITEST, SMALL, ["critic.reward_template='{text} {answer}'"], "critic.reward_template", "fields"),
    (MINITEST, SMALL, ["critic.reward_template='{text'"], "critic.reward_template", "fields"),
    (LOCAL, SMALL, ["mlflow.tracking_uri=file://mlruns"], "mlflow.tracking_uri", "ENV=test"),
]


@pytest.mark.parametrize(
    ("config", "recipe", "overrides", "key", "says"), PAIRS, ids=[f"{p[0].name}-{p[2]}" for p in PAIRS]
)
def test_an_impossible_pair_is_refused(config: Path, recipe: Path, overrides: list[str], key: str, says: str) -> None:
    env = "test" if config == TEST else "minitest"
    unchanged(config, recipe, env=env)
    found = findings(load_pair, config, recipe, overrides, env=env)
    assert [f.key for f in found if says in f.rule] == [key], [str(f) for f in found]


# ---- whatever is in a file, the answer is settings or findings ----------------------------------


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    at=st.integers(0, 1500),
    cut=st.integers(0, 30),
    piece=st.one_of(
        st.text(max_size=12),
        st.binary(max_size=6),
        st.sampled_from(
            [
                "\n",
                "\t",
                ": ",
                "- ",
                "{",
                "[",
                "&a ",
                "*a",
                "!!",
                "'",
                '"',
                "|\n",
                "? ",
                "${",
                "\n---\n",
                "#",
                "\\ud800",
            ]
        ),
    ),
    path=st.sampled_from([VESSL, CRITIC]),
)
def test_a_damaged_file_never_ends_in_a_traceback(
    at: int, cut: int, piece: str | bytes, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = path.read_bytes()
    inserted = piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
    copy = tmp_path_factory.getbasetemp() / path.name
    copy.write_bytes(content[:at] + inserted + content[at + cut :])
    try:
        loader(path)(copy)
    except ConfigError as error:
        assert error.findings and all(f.rule and f.next and str(f).count("\n") == 2 for f in error.findings)
        str(error).encode()


# ---- changes at random: refused by name, or taken for exactly what they say ----------------------

REQUIRED = object()
# Every key of the reference (design/configuration.md) with its default, written out once more.
DEFAULTS: dict[str, Any] = {
    "project": REQUIRED, "seed": 42, "log_interval": 10,
    "paths.models.base": REQUIRED, "paths.models.rm": None, "paths.models.ref": None, "paths.datasets": {},
    "paths.checkpoints.base_path": REQUIRED, "paths.checkpoints.save_interval": 100, "paths.checkpoints.keep_last": 3,
    "paths.checkpoints.save_final": True,
    "storage.bucket": "wmtp", "storage.region": "eu-north-1", "storage.endpoint": None, "storage.workers": 16,
    "storage.part_size_mb": 100, "storage.accelerate": False, "storage.retries": 3, "storage.retry_wait_s": 10,
    "storage.stall_s": 30, "storage.cache_dir": "/cache/models", "storage.cache_max_gb": None,
    "mlflow.experiment": REQUIRED, "mlflow.tracking_uri": REQUIRED, "mlflow.registry_uri": REQUIRED,
    "launcher.target": REQUIRED, "launcher.resources.gpus": 4, "launcher.resources.gpu_type": "A100",
    "launcher.resources.gpu_memory_gb": None, "launcher.cluster": None, "launcher.preset": None, "launcher.image": None,
    "launcher.volume": None, "launcher.max_hours": None, "launcher.price_per_hour": None,
    "devices.compute_backend": "auto", "devices.mixed_precision": "bf16", "devices.compile": False,
    "devices.num_proc": 8, "devices.distributed.enabled": True, "devices.distributed.backend": None,
    "devices.distributed.init_method": "env://", "devices.distributed.timeout": 1800,
    "devices.fsdp.enabled": True, "devices.fsdp.auto_wrap": True, "devices.fsdp.activation_ckpt": True,
    "devices.fsdp.sharding": "full_shard",
    "run.name": REQUIRED, "run.tags": [],
    "data.train.sources": REQUIRED, "data.train.max_length": 2048, "data.train.batch_size": 2,
    "data.train.pack_sequences": True, "data.train.allow_evaluation_data": False, "data.eval.share": 0.0,
    "data.eval.sources": [], "data.eval.max_length": 2048, "data.eval.batch_size": 2, "data.eval.pack_sequences": True,
    "model.heads": 4, "model.new_heads": False, "model.vocab_size": 32000,
    "train.algo": REQUIRED, "train.full_finetune": True, "train.num_epochs": 3, "train.max_steps": None,
    "train.accumulation_steps": 1, "train.early_stopping.enabled": False, "train.early_stopping.patience": 3,
    "train.early_stopping.metric": "held_out_ce",
    "pretrain.enabled": True, "pretrain.num_epochs": 1, "pretrain.max_steps": None, "pretrain.lr": 1e-3,
    "pretrain.save_value_head": True, "pretrain.early_stopping.enabled": False, "pretrain.early_stopping.patience": 3,
    "pretrain.early_stopping.metric": "value_loss",
    "critic.target": "rm_sequence", "critic.token_spread": "gae", "critic.delta_mode": "td",
    "critic.normalize": "zscore",
    "critic.gamma": 1.0, "critic.gae_lambda": 0.95, "critic.discount_lambda": 0.95, "critic.auxiliary_loss_coef": 0.1,
    "critic.value_lr": 5e-5, "critic.use_pseudo_rewards": False, "critic.reward_template": "{text}",
    "rho1.selection_mode": "weighted", "rho1.skip_threshold_percentile": 0.3, "rho1.min_ce_diff": 0.01,
    "rho1.center": "head", "rho1.center_decay": 0.99,
    "loss.weight_norm": "mean1.0_clip", "loss.lambda": 0.3, "loss.weight_temperature": 0.7, "loss.epsilon": 0.05,
    "loss.max_weight": 3.0, "loss.chunk_positions": "auto",
    "optim.optimizer": "adamw", "optim.lr": 2e-5, "optim.weight_decay": 0.01, "optim.betas": [0.9, 0.999],
    "optim.grad_clip": 1.0, "optim.scheduler": "cosine", "optim.warmup_ratio": 0.03,
    "eval.interval": 200, "eval.max_batches": 20,
}  # fmt: skip
SECTIONS = {key.rsplit(".", n)[0] for key in DEFAULTS for n in range(1, key.count(".") + 1)}
WORDS = sorted({part for key in DEFAULTS for part in key.split(".")})

# A file as it is changed: a mapping is a list of [key, value], so that a key can stand twice; any other value is its
# text, on one line.
Node = list[list[Any]]
Key = tuple[str, ...]


def tree_of(path: Path) -> Node:
    """A shipped file, read by another reader than the one that is tested: all its scalars are text."""

    def node(value: Any) -> Any:
        if isinstance(value, dict):
            return [[key, node(inner)] for key, inner in value.items()]
        if isinstance(value, list):
            return "[" + ", ".join(value) + "]"
        return json.dumps(value) if value[:1] in "{[" else value

    made: Node = node(YAML(typ="base", pure=True).load(path.read_text("utf-8")))
    return made


def written(tree: Node, indent: str = "") -> Iterator[str]:
    for key, value in tree:
        name = key if re.fullmatch(r"[A-Za-z_][\w-]*", key) else json.dumps(key)
        if isinstance(value, str):
            yield f"{indent}{name}: {value}"
        elif value:
            yield f"{indent}{name}:"
            yield from written(value, indent + "  ")
        else:
            yield f"{indent}{name}: {{}}"


def entries(tree: Node, at: Key = ()) -> Iterator[tuple[Key, Node, list[Any]]]:
    """Each key of the tree with the mapping that it stands in and its [key, value]."""
    for entry in tree:
        yield (*at, entry[0]), tree, entry
        if isinstance(entry[1], list):
            yield from entries(entry[1], (*at, entry[0]))


def named(key: Key) -> str:
    return ".".join(part or '""' for part in key)


def defaulted(text: str) -> str:
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text)


def meant(text: str) -> Any:
    """What a text on the right of a key asks for. Most of JSON is YAML; the rest is a number or words."""
    text = defaulted(text)

    def no_number(word: str) -> float:
        raise ValueError(word)

    try:
        return json.loads(text, parse_constant=no_number)
    except ValueError:
        pass
    if text.startswith("[") and text.endswith("]"):
        return [meant(part) for part in text[1:-1].split(", ")]
    return float(text) if re.fullmatch(r"[-+]?\.[0-9]+|[-+]?[0-9]+\.", text) else text


def same(value: Any, asked: Any) -> bool:
    """Exactly what was asked for; only a whole number may be asked for a fraction."""
    if isinstance(value, list) and isinstance(asked, list):
        return len(value) == len(asked) and all(map(same, value, asked))
    if type(value) is float and type(asked) is int:
        return value == asked
    return type(value) is type(asked) and bool(value == asked)


def leaves(what: dict[str, Any], at: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in what.items():
        if isinstance(value, dict) and named((*at, name)) != "paths.datasets":
            yield from leaves(value, (*at, name))
        else:
            yield (*at, name), value


def must_be_refused(tree: Node) -> set[str]:
    """Keys that no reading of the file may let pass: unknown or twice there, or no mapping where one is due."""
    bad: set[str] = set()
    for key, mapping, (name, value) in entries(tree):
        here = named(key)
        if any(here.startswith(f"{other}.") for other in bad):
            continue
        wants_mapping = here in SECTIONS or here == "paths.datasets"
        known = wants_mapping or here in DEFAULTS or named(key[:-1]) == "paths.datasets"
        twice = sum(other == name for other, _ in mapping) > 1
        null = isinstance(value, str) and meant(value) in (None, "~", "Null", "NULL", "")
        if twice or null or not known or wants_mapping != isinstance(value, list):
            bad.add(here)
    return bad


# By kind, each as likely as the others.
VALUES = st.one_of(
    st.sampled_from(["true", "false"]),
    st.sampled_from(["null", "~"]),
    st.one_of(st.integers(0, 12), st.integers(-(2**70), 2**70)).map(str),
    st.one_of(st.floats(0, 2), st.floats(allow_nan=False, allow_infinity=False)).map(json.dumps),
    st.one_of(st.sampled_from([*WORDS, "42", "1.5", "true"]), st.text(max_size=8)).map(json.dumps),
    st.sampled_from(["no", "on", "12:30", "1_000", "0o17", "0x10", "010", "1e3", ".5", "1.", ".inf", ".nan", "1e400"]),
    st.sampled_from(
        ["80GB", "5m", "auto", "cuda", "gloo", "file:///app/x", "file:///etc", "s3://b/k", "/app", "$HOME"]
    ),
    st.sampled_from(["${NO_SUCH}", "${NO_SUCH:-7}", "${NO_SUCH:-true}", "${NO_SUCH:-file:///app/x}"]),
    st.sampled_from(["[]", "[1]", "[wmtp_code]", "[0.5, 0]", "[mbpp_tiny, null]", "[true, true]"]),
    st.tuples(st.sampled_from(WORDS), st.sampled_from(["1", "true", "x"])).map(lambda pair: [list(pair)]),
    st.builds(list),
)
NAMES = st.one_of(st.sampled_from(WORDS), st.sampled_from(["", "no", "42", "~", "lambda_", "seed ", "a.b"]))


@st.composite
def change(draw: st.DrawFn, tree: Node) -> set[str]:
    """Change one thing in the tree, in place; returns the keys that were touched."""
    key, mapping, entry = draw(st.sampled_from(list(entries(tree))))
    what = draw(st.sampled_from(["delete", "retype", "retype", "retype", "rename", "duplicate", "move"]))
    if what == "delete":
        mapping.remove(entry)
        return {named(key)}
    if what == "retype":
        entry[1] = draw(VALUES)
        return {named(key)}
    if what == "rename":
        name = key[-1]
        swapped = name[:1] + name[2:3] + name[1:2] + name[3:]
        entry[0] = draw(st.one_of(NAMES, st.sampled_from([name + "s", name[:-1], name.upper(), name + " ", swapped])))
        return {named(key), named((*key[:-1], entry[0]))}
    if what == "duplicate":
        mapping.append([entry[0], draw(VALUES) if draw(st.booleans()) else json.loads(json.dumps(entry[1]))])
        return {named(key)}
    mapping.remove(entry)
    others = [((), tree), *((at, e[1]) for at, _, e in entries(tree) if isinstance(e[1], list))]
    at, other = draw(st.sampled_from(others))
    other.append(entry)
    return {named(key), named((*at, key[-1]))}


def shipped_pairs() -> list[tuple[Path, Path]]:
    small = [recipe for recipe in RECIPES if "tests" in recipe.parts]
    return [(c, r) for c in CONFIGS for r in RECIPES if (r in small) == (c != VESSL)]


def explained(path: Path, tree: Node, what: dict[str, Any], places: dict[str, str]) -> None:
    """Each resolved value is the file's, and says its line, or else the default, and says so."""
    lines = path.read_text("utf-8").split("\n")
    asked = {named(key): entry[1] for key, _, entry in entries(tree)}

    def of_the_file(key: str, value: Any) -> None:
        text = asked[key]  # a variable is text where the key is one, whatever it looks like
        assert same(value, meant(text)) or ("${" in text and value == defaulted(text)), (key, value, text)
        file, _, line = places[key].rpartition(":")
        assert file == str(path)
        assert lines[int(line) - 1].strip().startswith((key.split(".")[-1] + ":", json.dumps(key.split(".")[-1]) + ":"))

    for parts, value in leaves(what):
        key = named(parts)
        if key == "paths.datasets":
            assert set(value) == {name.split(".", 2)[2] for name in asked if name.startswith("paths.datasets.")}
            for name, address in value.items():
                of_the_file(f"paths.datasets.{name}", address)
        elif key in asked:
            of_the_file(key, value)
        else:
            default = DEFAULTS[key]
            if key == "mlflow.registry_uri":
                default = what["mlflow"]["tracking_uri"]
            if key == "launcher.resources.gpu_memory_gb" and what["launcher"]["resources"]["gpu_type"] == "A100":
                default = 80.0
            assert same(value, default), (key, value, default)
            assert places[key] == "default"


def judged(config: Path, recipe: Path, trees: dict[Path, Node], touched: set[str], folder: Path) -> bool:
    """Whether the changed pair loads; in either case the answer is the right one."""
    copies = {path: folder / path.name for path in trees}
    for path, copy in copies.items():
        copy.write_text("\n".join(written(trees[path])) + "\n", "utf-8")
    refused = must_be_refused(trees[config]) | must_be_refused(trees[recipe])
    try:
        loaded = load_pair(copies[config], copies[recipe], env="test")
    except ConfigError as error:
        keys = {finding.key for finding in error.findings}
        # An unknown mapping is named, not each key in it.
        named_in = {key for key in refused if any(f"{key}.".startswith(f"{found}.") for found in keys if found)}
        assert refused == named_in | (refused & keys), (refused, str(error))
        for finding in error.findings:
            assert finding.rule and finding.next and str(finding).count("\n") == 2 and len(str(finding)) < 1000
            # Nothing is told that has not to do with what was touched.
            at = f"{finding.key}." if finding.key else ""
            near = touched | {"paths.datasets" for key in touched if key.startswith("paths.datasets.")}
            told = any(at.startswith(f"{key}.") or f"{key}.".startswith(at) or key in str(finding) for key in near)
            assert told, (touched, str(finding))
        return False
    assert not refused, f"taken silently: {refused}"
    what = resolved(*loaded)
    explained(copies[config], trees[config], what["config"], origins(loaded[0]))
    explained(copies[recipe], trees[recipe], what["recipe"], origins(loaded[1]))
    return True


@pytest.mark.parametrize(
    ("config", "recipe"), shipped_pairs(), ids=lambda path: f"{path.parent.parent.name}-{path.name}"
)
def test_a_shipped_pair_as_it_is_changed_at_random_loads_unchanged(config: Path, recipe: Path, tmp_path: Path) -> None:
    assert judged(config, recipe, {path: tree_of(path) for path in (config, recipe)}, set(), tmp_path)
    assert set(DEFAULTS) == {named(key) for part in resolved(*load_pair(config, recipe, env="test")).values()
                             for key, _ in leaves(part)}  # fmt: skip


def pruned(tree: Node, at: Key = ()) -> Node:
    """Only what is required, and what the recipe's sources name."""
    kept: Node = []
    for name, value in tree:
        key = named((*at, name))
        if key in SECTIONS and (inner := pruned(value, (*at, name))):
            kept.append([name, inner])
        elif DEFAULTS.get(key) is REQUIRED or key == "paths.datasets":
            kept.append([name, value])
    return kept


@pytest.mark.parametrize("recipe", [BASELINE, RHO1], ids=lambda path: path.name)
def test_what_is_left_out_has_the_default_of_the_reference(recipe: Path, tmp_path: Path) -> None:
    config = tree_of(VESSL)
    least = pruned(config)
    models = [entry for key, _, entry in entries(config) if key == ("paths", "models")]
    for key, _, entry in entries(least):
        if key == ("paths", "models"):
            entry[1] = models[0][1]
    assert judged(VESSL, recipe, {VESSL: least, recipe: pruned(tree_of(recipe))}, set(), tmp_path)


FRACTIONS = {
    "launcher.resources.gpu_memory_gb",
    "launcher.max_hours",
    "launcher.price_per_hour",
    "storage.cache_max_gb",
}
COUNTS = {"train.max_steps", "pretrain.max_steps", "loss.chunk_positions"}


def kind_of(key: str) -> type:
    """The type that the reference gives a key."""
    if key in FRACTIONS | COUNTS:
        return float if key in FRACTIONS else int
    default: Any = {"data.train.sources": [], "paths.datasets": {}}.get(key, DEFAULTS.get(key))
    return str if default is None or default is REQUIRED else type(default)


@pytest.mark.parametrize(
    "text",
    [
        "true",
        "null",
        "7",
        "0.5",
        "7.0",
        ".inf",
        '"7"',
        "'true'",
        "no",
        "12:30",
        "0x10",
        "1_0",
        "[7]",
        "[]",
        "{a: 7}",
        "{}",
    ],
)
@pytest.mark.parametrize("path", [VESSL, CRITIC], ids=["config", "recipe"])
def test_no_key_of_the_reference_takes_a_value_of_another_type(path: Path, text: str, tmp_path: Path) -> None:
    """All keys at once have this value: each that has another type is told."""
    asked = {"0x10": None, "{a: 7}": {}, "{}": {}, "'true'": "true", "[7]": [7], ".inf": 0.5}.get(text, meant(text))
    mine = {name for name, _ in tree_of(path)} | ({"rho1"} if path == CRITIC else set())
    keys = [key for key in DEFAULTS if key.split(".")[0] in mine]
    tree: Node = []
    for key in keys:
        here = tree
        for part in key.split(".")[:-1]:
            if part not in [name for name, _ in here]:
                here.append([part, []])
            here = next(value for name, value in here if name == part)
        here.append([key.split(".")[-1], text])
    copy = tmp_path / path.name
    copy.write_text("\n".join(written(tree)) + "\n", "utf-8")
    told = {finding.key for finding in findings(loader(path), copy)}
    fits = {key for key in keys if type(asked) in {kind_of(key), int if kind_of(key) is float else None}}
    assert len(keys) > 35 and set(keys) - fits <= told


@hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.data(), pair=st.sampled_from(shipped_pairs()), twice=st.booleans())
def test_a_change_at_random_is_refused_by_name_or_taken_as_it_stands(
    data: st.DataObject, pair: tuple[Path, Path], twice: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trees = {path: tree_of(path) for path in pair}
    touched: set[str] = set()
    for _ in range(1 + twice):
        tree = trees[data.draw(st.sampled_from(pair))]
        touched |= data.draw(change(tree))
    judged(*pair, trees, touched, tmp_path_factory.getbasetemp())
