"""What can be named in a recipe, and where it lives.

Values are `"module:function"`: asking whether a name exists imports nothing heavy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


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


trainer_registry = Registry(
    "trainer",
    {
        "baseline-mtp": "wmtp.objective:baseline_mtp",
        "rho1-wmtp": "wmtp.objective:rho1_wmtp",
        "critic-wmtp": "wmtp.objective:critic_wmtp",
    },
)
optimizer_registry = Registry("optimizer", {"adamw": "wmtp.optim:adamw"})
loader_registry = Registry("loader", {"standardized-model-loader": "wmtp.weights:load_model"})
tokenizer_registry = Registry(
    "tokenizer",
    {
        "hf-sentencepiece": "wmtp.data:sentencepiece_tokenizer",
        "hf-transformers": "wmtp.data:transformers_tokenizer",
    },
)
