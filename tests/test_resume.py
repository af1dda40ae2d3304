"""A run that goes on under other settings says so, or does not go on."""

from __future__ import annotations

import pytest
from runs import ROOT

from wmtp.config import flat, load_pair
from wmtp.outcome import BadInput
from wmtp.resume import made_of, refuse_changes

FILES = (ROOT / "configs/config.local_minitest.yaml", ROOT / "tests/configs/recipe.rho1_wmtp.yaml")


def made(*sets: str, **facts: object) -> dict[str, object]:
    config, recipe = load_pair(*FILES, list(sets), env="minitest")
    return made_of(config, recipe, **facts)


def test_other_code_is_told_and_refuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = made(rows_per_step=4)
    assert len(str(before["code"])) == 12
    refuse_changes(before, made(rows_per_step=4), [], 3)
    refuse_changes(
        {k: v for k, v in before.items() if k != "code"}, made(rows_per_step=4), [], 3
    )  # of an older version
    assert "warn" not in capsys.readouterr().err
    refuse_changes(before | {"code": "0" * 12}, made(rows_per_step=4), [], 3)
    assert "the checkpoint of step 3 was made by other code (src/wmtp was 000000000000, is " in capsys.readouterr().err


def test_flat_names_nested_keys() -> None:
    assert flat({"a": {"b": 1, "c": [2]}, "d": 3}) == {"a.b": 1, "a.c": [2], "d": 3}


def test_every_difference_is_listed_with_both_values_and_the_way_to_allow_it() -> None:
    with pytest.raises(BadInput) as refused:
        refuse_changes(made(data="a", seed=1), made("optim.lr=0.5", "seed=7", data="b"), [], 40)
    text = str(refused.value)
    assert "step 40" in text
    for line in ("data: a -> b", "optim.lr: 0.001 -> 0.5", "seed: 1 -> 7"):
        assert line in text
    assert 'ALLOW="data optim.lr seed"' in text


def test_what_is_allowed_by_name_goes_on_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    refuse_changes(made(), made("optim.lr=0.5"), ["optim.lr"], 1)
    assert "optim.lr: 0.001 -> 0.5" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"optim\.grad_clip"):
        refuse_changes(made(), made("optim.lr=0.5", "optim.grad_clip=2"), ["optim.lr"], 1)


def test_other_rows_a_step_are_refused_whatever_is_allowed() -> None:
    with pytest.raises(BadInput, match=r"rows_per_step: 4 -> 8 \(ranks x") as refused:
        refuse_changes(made(rows_per_step=4), made(rows_per_step=8), ["rows_per_step"], 1)
    assert "ALLOW" not in str(refused.value)


@pytest.mark.parametrize("free", ["run.name=other", "eval.interval=3", "eval.max_batches=1", "log_interval=9"])
def test_what_no_step_depends_on_may_change(free: str) -> None:
    refuse_changes(made(), made(free), [], 1)


def test_a_key_that_one_of_them_lacks_is_a_difference() -> None:
    before = made()
    del before["loss.lambda"]
    with pytest.raises(BadInput, match=r"loss.lambda: not set -> "):
        refuse_changes(before, made(), [], 1)
