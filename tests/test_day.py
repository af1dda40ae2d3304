"""The page of the operator's day has the shape of its transcript, whatever the figures of a day."""

from __future__ import annotations

from pathlib import Path

import day  # beside this file; pytest finds it
import pytest

ROOT = Path(__file__).parent.parent
TRANSCRIPT = """== A run
-- Words.
$ make deploy
~ ok
| 1/6       dry run   ok     1 s   build/x; /tmp/one/x
| push      4 s  0bcf52c8a691: Pushed
| push      8 s  0bcf52c8a691: Pushed
| 4/6       submit    ok    47 s   run-aefc451
= 0
$ make monitor
| failed
= 2
"""


def test_a_page_shows_the_chosen_lines_and_the_code_of_a_failure() -> None:
    shown = day.page(TRANSCRIPT).removeprefix(day.HEAD)
    assert shown == (
        "\n## A run\n\nWords.\n\n    $ make deploy\n    1/6       dry run   ok     1 s   build/x; /tmp/one/x\n    …\n"
        "    4/6       submit    ok    47 s   run-aefc451\n\n    $ make monitor\n    failed\n    (exit code 2)\n"
    )


def test_another_day_has_the_same_shape() -> None:
    other = TRANSCRIPT.replace("/tmp/one/x", "/var/two").replace(" 47 s", " 1 min 3 s").replace("aefc451", "0000000")
    assert other != TRANSCRIPT and day.shape(day.page(other)) == day.shape(day.page(TRANSCRIPT))


@pytest.mark.parametrize("change", [("submit    ok", "submit"), ("= 2", "= 0"), ("make monitor", "make status")])
def test_another_word_command_or_code_is_another_shape(change: tuple[str, str]) -> None:
    assert day.shape(day.page(TRANSCRIPT.replace(*change))) != day.shape(day.page(TRANSCRIPT))


def test_the_page_in_the_guide_begins_as_the_next_will() -> None:
    assert (ROOT / "docs/operators-day.md").read_text().startswith(day.HEAD)
