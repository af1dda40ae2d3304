"""What can be named, and that naming it is cheap."""

from __future__ import annotations

import pytest

from wmtp.registry import (
    Registry,
    RegistryError,
    loader_registry,
    optimizer_registry,
    tokenizer_registry,
    trainer_registry,
)


def test_the_plans_names_are_registered() -> None:
    assert list(trainer_registry) == ["baseline-mtp", "rho1-wmtp", "critic-wmtp"]
    assert optimizer_registry.is_registered("adamw")
    assert loader_registry.is_registered("standardized-model-loader")
    assert tokenizer_registry.is_registered("hf-sentencepiece")
    assert tokenizer_registry.is_registered("hf-transformers")
    assert not trainer_registry.is_registered("baseline_mtp")
    assert trainer_registry["rho1-wmtp"] == "wmtp.objective:rho1_wmtp"


def test_every_value_is_a_module_of_ours_and_a_function() -> None:
    for registry in (trainer_registry, optimizer_registry, loader_registry, tokenizer_registry):
        for value in registry.values():
            module, _, function = value.partition(":")
            assert module.startswith("wmtp.") and function.isidentifier()


def test_load_gives_the_function_and_refuses_what_is_not_there() -> None:
    registry = Registry("thing", {"good": "json:dumps", "gone": "json:no_such"})
    assert registry.load("good")([1]) == "[1]"
    with pytest.raises(RegistryError, match=r"'bad' is not registered; known: good, gone"):
        registry.load("bad")
    with pytest.raises(RegistryError, match=r"json has no no_such"):
        registry.load("gone")
