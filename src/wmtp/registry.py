"""What can be named in a recipe, and where it lives.

Values are `"module:function"`: asking whether a name exists imports nothing heavy.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MADE = {
    "ref_aligned": "cross-entropy of each predicted token under the reference model, [..., H]",
    "head_mean": "running mean of each head's excess over the reference, [H], or None",
    "delta_aligned": "the value that each predicted token adds, by the critic's value head, [..., H]",
}
"""What a run makes for a trainer's function that asks for it by keyword. It decides what a run needs."""

KEYS = {
    "temperature": "loss.weight_temperature",
    "epsilon": "loss.epsilon",
    "max_weight": "loss.max_weight",
    "mix": "loss.lambda",
    "min_ce_diff": "rho1.min_ce_diff",
}
"""The other keywords that it may ask for, beside `ce` and `mask`: each is the value of a key of the recipe."""


class RegistryError(LookupError):
    """A name that is not in the registry, or whose function is not where the registry says."""


class Registry(Mapping[str, str]):
    """Names to `"module:function"`, looked up without importing, loaded when wanted."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def is_registered(self, name: str) -> bool:
        return name in self._entries

    def load(self, name: str) -> Callable[..., Any]:
        """Import and return the function. Raises RegistryError for an unknown or a dangling name."""
        if name not in self._entries:
            raise RegistryError(f"{self.kind} {name!r} is not registered; known: {', '.join(self._entries)}")
        module, _, function = self._entries[name].partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except AttributeError:
            raise RegistryError(
                f"{self.kind} {name!r} is registered as {self._entries[name]}, but {module} has no {function}"
            ) from None

    def definition(self, name: str) -> ast.FunctionDef | ast.ClassDef | None:
        """What a name stands for, as its source defines it, without importing it; None where it is not there."""
        module, _, target = self._entries[name].partition(":")
        try:
            spec = importlib.util.find_spec(module)
            body = ast.parse(Path(spec.origin).read_text("utf-8")).body if spec and spec.origin else []
        except (ModuleNotFoundError, SyntaxError):  # not even its package, or at work
            return None
        found = (node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == target)
        return next(found, None)


trainer_registry = Registry(
    "trainer",
    {
        "baseline-mtp": "wmtp.objective:baseline_mtp",
        "rho1-wmtp": "wmtp.objective:rho1_wmtp",
        "critic-wmtp": "wmtp.objective:critic_wmtp",
    },
)


@functools.cache
def asked_by(algo: str) -> frozenset[str]:
    """The keywords of an algorithm's function: of `MADE` and `KEYS`, where it is sound; none of an unknown name."""
    found = trainer_registry.definition(algo) if algo in trainer_registry else None
    return frozenset(a.arg for a in found.args.kwonlyargs) if isinstance(found, ast.FunctionDef) else frozenset()


def weighs_by_reference(algo: str) -> bool:
    """Whether an algorithm asks for the reference model's cross-entropies."""
    return "ref_aligned" in asked_by(algo)


def weighs_by_value(algo: str) -> bool:
    """Whether an algorithm asks for the value that a token adds: it has a value head, and stage 1 trains it."""
    return "delta_aligned" in asked_by(algo)


optimizer_registry = Registry("optimizer", {"adamw": "wmtp.optim:adamw"})
loader_registry = Registry("loader", {"standardized-model-loader": "wmtp.weights:load_model"})
tokenizer_registry = Registry(
    "tokenizer",
    {
        "hf-sentencepiece": "wmtp.data:sentencepiece_tokenizer",
        "hf-transformers": "wmtp.data:transformers_tokenizer",
    },
)
