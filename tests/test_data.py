"""Tokenizers, sources, packing and the sampler."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.data import Batches, DataError, load_tokenizer, pack, read_records, tokenize


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    source = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    return folder


def test_sentencepiece_reads_back_what_it_wrote(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    text = "def f(x):\n    return x + 1"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (32000, 0, 1, 2)
    assert tokenize([text], tokenizer) == [[1, *ids, 2]]
    assert len(tokenizer.pieces()) == 32000 and tokenizer.pieces()[:3] == ["<unk>", "<s>", "</s>"]


def test_a_tokenizer_json_with_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"[U]": 0, "[B]": 1, "[E]": 2, "one": 3}, unk_token="[U]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no token '<s>'"):
        load_tokenizer(tmp_path)
    named = {"bos_token": "[B]", "eos_token": {"content": "[E]"}, "unk_token": "[U]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenize(["one two"], tokenizer) == [[1, 3, 0, 2]]
    assert tokenizer.pieces() == ["[U]", "[B]", "[E]", "one"] and tokenizer.vocab_size == 4
    assert len(tokenizer.digest()) == 64


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot be read"):
        load_tokenizer(tmp_path)


def test_texts_of_both_spellings_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "solution": "s\u2028t"}\n\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "q", "code": "c"}')
    assert [r.text for r in read_records(tmp_path)] == ["q\nc", "p\ns\u2028t"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is a list"),
        (b'{"text": "x"}', "has neither 'solution' nor 'code'"),
        (b'{"text": 1, "code": ""}', "has a int as 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "q", "code": "c"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:2: {what}")


def test_a_source_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.jsonl file"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="hold no record"):
        read_records(tmp_path)


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8), st.integers(1, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_token_and_cuts_only_what_is_too_long(
    documents: list[list[int]], length: int, together: bool
) -> None:
    rows = pack(documents, length, 77, together)
    found = []
    for x, document in zip(rows.x, rows.document, strict=True):
        for number in range(int(document.max()) + 1):
            found.append(x[document == number].tolist())
    assert found == [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    assert rows.x.shape == rows.document.shape == rows.pad.shape == (len(rows), length)
    assert torch.equal(rows.pad, rows.document == -1) and (rows.x[rows.pad] == 77).all()
    assert rows.tokens == sum(map(len, documents))
    if not together:
        assert len(rows) == len(found)


def test_packing_fills_a_row_before_the_next() -> None:
    rows = pack([[1, 2], [3], [4, 5]], 4, 0, True)
    assert rows.x.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert rows.document.tolist() == [[0, 0, 1, -1], [0, 0, -1, -1]]


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    rows = pack([[i] for i in range(10)], 2, 0, False)
    one, two = Batches(rows, 4, 7), Batches(rows, 4, 7)
    forward = [one.global_batch(n).tolist() for n in range(10)]
    assert forward == [two.global_batch(n).tolist() for n in reversed(range(10))][::-1]
    assert forward != [Batches(rows, 4, 8).global_batch(n).tolist() for n in range(10)]
    flat = [i for batch in forward for i in batch]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert one.steps_per_epoch == 3
    x, document, pad = one.take(one.global_batch(2))
    assert x[:, 0].tolist() == forward[2] and document[:, 0].tolist() == [0] * 4 and pad[:, 1].all()
    # A batch wider than the data goes round.
    assert sorted(Batches(rows, 20, 0).global_batch(1).tolist()) == sorted(2 * list(range(10)))


def test_no_rows_or_no_step_size_is_refused() -> None:
    for rows, step in ((pack([], 4, 0, True), 1), (pack([[1]], 4, 0, True), 0)):
        with pytest.raises(DataError, match="at least 1"):
            Batches(rows, step, 0)
