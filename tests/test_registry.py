"""What can be named, and that naming it is cheap."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from wmtp import registry as names
from wmtp.registry import (
    KEYS,
    MADE,
    Registry,
    RegistryError,
    loader_registry,
    optimizer_registry,
    tokenizer_registry,
    trainer_registry,
)

ROOT = Path(__file__).parent.parent


def test_the_plans_names_are_registered() -> None:
    assert {"baseline-mtp", "rho1-wmtp", "critic-wmtp"} <= trainer_registry.keys()
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


def test_what_an_algorithm_asks_for_is_read_without_importing_it() -> None:
    for algo in trainer_registry:
        function = trainer_registry.load(algo)
        keywords = inspect.signature(function).parameters.values()
        assert (
            names.asked_by(algo) == {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} <= MADE.keys() | KEYS.keys()
        )
    assert names.weighs_by_reference("rho1-wmtp") and not names.weighs_by_value("rho1-wmtp")
    assert names.weighs_by_value("critic-wmtp") and not names.weighs_by_reference("critic-wmtp")
    assert not names.weighs_by_reference("baseline-mtp") and not names.weighs_by_value("baseline-mtp")
    assert names.asked_by("no-such") == frozenset()


def test_a_definition_is_found_or_is_none() -> None:
    there = {"function": "wmtp.registry:asked_by", "class": "wmtp.registry:Registry", "gone": "wmtp.registry:no_such"}
    registry = Registry("thing", there | {"module": "wmtp.no_such:f", "package": "no_such.at_all:f"})
    assert [registry.definition(name) is not None for name in registry] == [True, True, False, False, False]


def test_every_algorithm_has_a_recipe_and_every_recipe_an_algorithm() -> None:
    """Make, the stages and the dry run take the names of algorithms from the recipes' files."""
    for folder in ("configs", "tests/configs"):
        recipes = {p.stem.removeprefix("recipe.").replace("_", "-") for p in (ROOT / folder).glob("recipe.*.yaml")}
        assert recipes == trainer_registry.keys()
