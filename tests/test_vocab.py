from __future__ import annotations

import json
from pathlib import Path

import pytest

from wmtp.vocab import ModelUnreadableError, VocabError, Vocabulary, compare, content_digest, stated_size

PIECES = ["<unk>", "a", "b"]


def test_one_vocabulary_passes() -> None:
    compare([Vocabulary("base", 3, PIECES), Vocabulary("rm", 3, list(PIECES))], 3)


def test_first_differing_piece_and_both_models_are_named() -> None:
    with pytest.raises(VocabError, match="base and rm differ at piece 1: 'a' and 'b'"):
        compare([Vocabulary("base", 3, PIECES), Vocabulary("rm", 3, ["<unk>", "b", "a"])], 3)


def test_size_other_than_expected_is_refused() -> None:
    with pytest.raises(VocabError, match="vocab_size 3, expected 32000"):
        compare([Vocabulary("base", 3, PIECES)], 32000)


def test_tokenizer_of_another_size_is_refused() -> None:
    with pytest.raises(VocabError, match="has 3 pieces"):
        compare([Vocabulary("base", 4, PIECES)], 4)


def test_an_embedding_may_be_padded_to_a_multiple() -> None:
    pieces = [str(n) for n in range(200)]
    compare([Vocabulary("base", 256, pieces), Vocabulary("rm", 256, list(pieces))], 256)
    with pytest.raises(VocabError, match="base and rm differ at piece 199: '199' and None"):
        compare([Vocabulary("base", 256, pieces), Vocabulary("rm", 256, pieces[:-1])], 256)
    for size in (201, 192, 768):
        with pytest.raises(VocabError, match=f"has 200 pieces, its vocab_size is {size}"):
            compare([Vocabulary("base", size, pieces)], size)
    with pytest.raises(VocabError, match="has 31900 pieces"):  # Llama's is whole, or it is not Llama's
        compare([Vocabulary("base", 32000, [str(n) for n in range(31900)])], 32000)


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"vocab_size": "3"}', '{"vocab_size": 0}', '{"vocab_size": true}'])
def test_unusable_size_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnreadableError, match=r"config\.json"):
        stated_size(tmp_path)


def test_meta_file_may_leave_the_size_open(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"vocab_size": -1}))
    assert stated_size(tmp_path) is None


def test_digest_sees_the_order() -> None:
    assert content_digest(PIECES) != content_digest(PIECES[::-1])
