"""The page of licences has every package of a run, as it is installed here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import licences
import pytest

PAGE = (Path(__file__).parent.parent / "docs/licences.md").read_text()


def test_every_locked_package_is_on_the_page() -> None:
    told = re.findall(r"[\w-]+", PAGE.partition(licences.BEGIN)[2].partition(licences.END)[0])
    assert len(licences.locked()) > 80 and set(licences.locked()) <= set(told)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the page was made with the versions of Python 3.11")
def test_the_table_is_what_the_packages_say() -> None:
    assert licences.with_table(PAGE) == PAGE, "python tests/licences.py docs/licences.md"


def test_the_models_and_data_sets_of_the_configuration_are_on_the_page() -> None:
    configuration = (Path(__file__).parent.parent / "configs/config.vessl.yaml").read_text()
    names = re.findall(r"file:///app/(?:models|datasets)/(\S+)", configuration)
    assert len(names) == 5 and [name for name in names if f"`{name}`" not in PAGE] == []


def test_what_a_package_says_is_read_in_the_order_of_its_worth() -> None:
    assert licences.licence_of("numpy") == "BSD (clauses not said)"  # a long text, then a classifier
    assert licences.licence_of("click") == "BSD-3-Clause" and licences.licence_of("requests") == "Apache-2.0"
    assert licences.licence_of("no-such-package") is None
