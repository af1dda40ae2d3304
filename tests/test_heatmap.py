"""Where the weight went, on a page and in a picture."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from wmtp.heatmap import LINES, Example, colour, scale_of, shown_texts, token_weights, write_heatmap

NAN = float("nan")


class Bytes:
    """A tokenizer of single bytes: every character beyond ASCII is split."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Page(HTMLParser):
    """Text, weight and colour of each token of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self.attributes: dict[str, str | None] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes = dict(attrs)

    def handle_data(self, data: str) -> None:
        if "title" in self.attributes:
            told, style = self.attributes["title"], self.attributes["style"]
            self.tokens.append((data, told or "", (style or "").split(";")[0]))
            self.attributes = {}


def test_a_token_weighs_the_mean_over_the_heads_that_predict_it() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    found = token_weights(w, mask)
    # Token 1: head 0 of position 0. Token 2: head 0 of 1 and head 1 of 0. Token 3: head 0 of 2 and head 1 of 1.
    assert math.isnan(found[0]) and found[1:] == [1.0, (3 + 2) / 2, (5 + 4) / 2]
    mask[1, 1] = False
    assert token_weights(w, mask)[3] == 5.0
    assert math.isnan(token_weights(w[:1], mask[:1])[0])


@pytest.mark.parametrize("text", ["plain\ncode  here\n", "é 漢字\n\n# x", "", "🙂\n" * 3])
def test_shown_texts_join_to_the_text(text: str) -> None:
    ids = list(text.encode())
    shown = shown_texts(ids, Bytes())  # type: ignore[arg-type]  # all that it asks of one
    assert len(shown) == len(ids) and "".join(shown) == text
    assert "\ufffd" not in "".join(shown)


def test_colours_are_white_at_one_and_fullest_at_the_ends() -> None:
    assert colour(1.0, 0.2, 3.0) == (255, 255, 255)
    assert colour(0.2, 0.2, 3.0) == colour(0.1, 0.2, 3.0) != colour(3.0, 0.2, 3.0)
    assert len(set(colour(NAN, 0.2, 3.0))) == 1
    assert scale_of([Example("", ["a", "b"], [NAN, 1.0])]) == (0.95, 1.05)


def test_page_and_picture_show_every_token(tmp_path: Path) -> None:
    texts = ["<b>", " & ", "x\n", "$y$", "é"]
    weights = [NAN, 0.5, 1.0, 2.5, 1.1]
    page, picture = write_heatmap(tmp_path / "w", [Example("one <1>", texts, weights)], "a title & more")
    text = page.read_text()
    found = Page(text).tokens
    assert [t.replace("\u21b5", "") for t, _, _ in found] == texts
    assert [told for _, told, _ in found] == ["not predicted", *(f"weight {w:.3f}" for w in weights[1:])]
    assert len({style for _, _, style in found}) == 5
    assert "a title &amp; more" in text and "one &lt;1&gt;" in text and "http" not in text and "<script" not in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_long_document_is_cut_in_the_picture_only(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def write(lines: int) -> tuple[str, int]:
        page, picture = write_heatmap(tmp_path / "w", [Example("", ["a\n"] * lines, [1.0] * lines)], "")
        return page.read_text(), imread(picture).shape[0]

    assert write(LINES + 40)[0].count("weight 1.000") == LINES + 40
    assert write(LINES + 40)[1] == write(LINES + 80)[1] > write(LINES)[1]
