"""Tokenizers, sources, packing and the sampler."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp import data as wmtp_data
from wmtp.config import Data
from wmtp.data import Batches, Corpus, Tokenizer, load_tokenizer, pack, read_sets, text_digest, tokenize, tokens_of
from wmtp.sources import DataError, parts_of


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
    assert tokenize([text, "", text], tokenizer, threads=2) == [[1, *ids, 2], [1, 2], [1, *ids, 2]]
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
    first = tokenizer.digest()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"eos_token": "[U]"}))
    assert len(first) == 64 and load_tokenizer(tmp_path).digest() != first
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"bos_token": None}))
    assert tokenize(["one"], load_tokenizer(tmp_path)) == [[2, 3, 2]]  # as Qwen's: one token between documents


def test_a_folder_without_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot be read"):
        load_tokenizer(tmp_path)


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8), st.integers(1, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_token_and_cuts_only_what_is_too_long(
    documents: list[list[int]], length: int, together: bool
) -> None:
    rows = pack(documents, length, 77, together)
    found = []
    every = x_ns, document_ns, pad_ns = rows.take(torch.arange(len(rows)))
    for x, document in zip(x_ns, document_ns, strict=True):
        for number in range(int(document.max()) + 1):
            found.append(x[document == number].tolist())
    assert found == [d[i : i + length] for d in documents for i in range(0, len(d), length)]
    assert all(part.shape == rows.shape == (len(rows), length) for part in every)
    assert torch.equal(pad_ns, document_ns == -1) and (x_ns[pad_ns] == 77).all()
    assert rows.tokens == sum(map(len, documents))
    assert [(p.source, p.ids.tolist()) for p in rows.pieces()] == [
        (n, d[i : i + length]) for n, d in enumerate(documents) for i in range(0, len(d), length)
    ]
    assert all(p.whole == (len(p.ids) == len(documents[p.source])) for p in rows.pieces())
    assert all(x_ns[p.row, p.at : p.at + len(p.ids)].tolist() == p.ids.tolist() for p in rows.pieces())
    ends = torch.zeros(rows.shape, dtype=torch.bool)
    for p in rows.pieces():
        ends[p.row, p.at + len(p.ids) - 1] = len(p.ids) > 2
    assert torch.equal(rows.last_tokens(longer_than=2), ends)
    if not together:
        assert len(rows) == len(found)
    for n in range(1, len(rows) if together else 0):  # no row had room for the next one's first document
        assert (~pad_ns[n - 1]).sum() + (document_ns[n] == 0).sum() > length


def test_packing_fills_a_row_before_the_next() -> None:
    rows = pack([[1, 2], [3], [4, 5]], 4, 0, True)
    x, document, _ = rows.take(torch.tensor([0, 1]))
    assert x.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert document.tolist() == [[0, 0, 1, -1], [0, 0, -1, -1]]


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


# ---- what is kept ----------------------------------------------------------------------------------------------------


def source(folder: Path, *texts: str, name: str = "a.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    records = [{"prompt": text, "solution": "s"} for text in texts]
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def tokenizer(llama: Path) -> Tokenizer:
    return load_tokenizer(llama)


def test_nothing_is_tokenized_twice(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    told: list[str] = []
    (part,) = parts_of(source(tmp_path / "one", "a", "b c", ""))
    made = tokens_of(part, tokenizer, shelf, tell=told.append)
    expected = tokenize(["a\ns", "b c\ns", "\ns"], tokenizer)
    assert made.ids.tolist() == [i for d in expected for i in d] and made.lengths.tolist() == [len(d) for d in expected]
    assert made.ids.dtype == "uint16" and made.digests.tolist() == [text_digest(t) for t in ("a\ns", "b c\ns", "\ns")]
    assert "3 prompt and solution" in told[0] and len(told) == 1

    def never(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(wmtp_data, "tokenize", never)
    (moved,) = parts_of(source(tmp_path / "two", "a", "b c", "", name="other.jsonl"))
    kept = tokens_of(moved, tokenizer, shelf, tell=told.append)
    assert "3 prompt and solution" in told[1] and "kept" in told[1]
    assert all((getattr(kept, n) == getattr(made, n)).all() for n in ("ids", "lengths", "digests", "keys"))
    assert kept.counts == made.counts and kept.ids.dtype == made.ids.dtype
    (file,) = shelf.iterdir()
    (tmp_path / "usual").touch()
    assert file.stat().st_mode == (tmp_path / "usual").stat().st_mode
    (changed,) = parts_of(source(tmp_path / "two", "a", "b d", name="other.jsonl"))
    with pytest.raises(AssertionError, match="tokenized again"):
        tokens_of(changed, tokenizer, shelf)
    monkeypatch.setattr(wmtp_data, "FORMAT", 99)
    with pytest.raises(AssertionError, match="tokenized again"):
        tokens_of(part, tokenizer, shelf)


def test_tokens_that_can_not_be_kept_are_no_end_of_a_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (part,) = parts_of(source(tmp_path / "one", "a"))
    (tmp_path / "file").touch()
    told: list[str] = []
    made = tokens_of(part, tokenizer, tmp_path / "file" / "shelf", tell=told.append)
    assert len(made.lengths) == 1 and "warn" in told[0] and "can't be written" in told[0] and len(told) == 2


def test_two_that_keep_the_same_tokens_do_not_disturb_each_other(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two nodes with one disk, where even their process numbers may be the same."""
    (part,) = parts_of(source(tmp_path / "one", "a"))
    shelf, save, told = tmp_path / "shelf", wmtp_data.save_file, list[str]()

    def meanwhile(*args: Any) -> None:
        save(*args)
        monkeypatch.setattr(wmtp_data, "save_file", save)
        tokens_of(part, tokenizer, shelf)
        staged = sorted(file.name for file in shelf.iterdir())
        assert len(staged) == 2 and staged[0].startswith(".")

    monkeypatch.setattr(wmtp_data, "save_file", meanwhile)
    tokens_of(part, tokenizer, shelf, tell=told.append)
    assert "made in" in told[0] and len(told) == 1 and len(list(shelf.iterdir())) == 1


def test_a_clean_up_in_between_is_nothing_where_another_kept_the_same(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = parts_of(source(tmp_path / "one", "a"))
    shelf, save, told = tmp_path / "shelf", wmtp_data.save_file, list[str]()

    def swept(tensors: Any, staging: Path, about: Any) -> None:
        monkeypatch.setattr(wmtp_data, "save_file", save)
        tokens_of(part, tokenizer, shelf)
        staging.unlink()

    monkeypatch.setattr(wmtp_data, "save_file", swept)
    tokens_of(part, tokenizer, shelf, tell=told.append)
    assert "made in" in told[0] and len(told) == 1 and len(list(shelf.iterdir())) == 1


def test_another_tokenizer_makes_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (part,) = parts_of(source(tmp_path / "one", "a"))
    tokens_of(part, tokenizer, tmp_path / "shelf")
    tokenizer.digest = lambda: "another"  # type: ignore[method-assign]  # of this instance alone
    tokens_of(part, tokenizer, tmp_path / "shelf")
    assert len(list((tmp_path / "shelf").iterdir())) == 2


@pytest.mark.parametrize("damage", ["torn", "foreign", "not ours"])
def test_what_is_kept_and_can_not_be_used_is_made_again(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    shelf = tmp_path / "shelf"
    told: list[str] = []
    (part,) = parts_of(source(tmp_path / "one", "a", "b"))
    (other,) = parts_of(source(tmp_path / "two", "c"))
    made, _ = tokens_of(part, tokenizer, shelf), tokens_of(other, tokenizer, tmp_path / "others")
    (file,) = shelf.iterdir()
    (another,) = (tmp_path / "others").iterdir()
    content = {"torn": file.read_bytes()[:-3], "foreign": another.read_bytes(), "not ours": b"x" * 99}[damage]
    file.write_bytes(content)
    again = tokens_of(part, tokenizer, shelf, tell=told.append)
    assert again.ids.tolist() == made.ids.tolist() and "warn" in told[0] and "tokenized again" in told[0]
    told.clear()
    assert tokens_of(part, tokenizer, shelf, tell=told.append).ids.tolist() == made.ids.tolist()
    assert "kept" in told[0]


def test_long_sources_are_tokenized_in_chunks(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = parts_of(source(tmp_path / "one", *(f"text {i}" for i in range(50))))
    whole = tokens_of(part, tokenizer)
    monkeypatch.setattr(wmtp_data, "CHUNK", 40)
    assert tokens_of(part, tokenizer).ids.tolist() == whole.ids.tolist()


# ---- the sets of a run -----------------------------------------------------------------------------------------------


def sets_of(
    tmp_path: Path, tokenizer: Tokenizer, train: list[str], held: list[str], share: float = 0
) -> dict[str, Corpus]:
    folders = {"t": source(tmp_path / "t", *train), "h": source(tmp_path / "h", *held)}
    given = {"sources": ["h"] if held else [], "share": share}
    return read_sets(Data.model_validate({"train": {"sources": ["t"]}, "eval": given}), folders, tokenizer)


def prompts(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """What the corpus has: its records, and the same by its tokens."""
    records = corpus.records()
    assert [p.ids.tolist() for p in corpus.rows.pieces()] == tokenize([r.text for r in records], tokenizer)
    assert [p.source for p in corpus.rows.pieces()] == list(range(len(records)))
    return [record.prompt for record in records]


def test_what_an_evaluation_source_has_is_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sets = sets_of(tmp_path, tokenizer, ["a", "b", "c", "b"], ["b", "x"])
    assert prompts(sets["train"], tokenizer) == ["a", "c"] and prompts(sets["eval"], tokenizer) == ["b", "x"]
    assert "eval" not in sets_of(tmp_path, tokenizer, ["a"], [])


def test_a_share_holds_out_by_the_text_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    every = [f"text {i}" for i in range(400)]
    sets = sets_of(tmp_path, tokenizer, [*every, *every], [], 0.2)
    train, held = prompts(sets["train"], tokenizer), prompts(sets["eval"], tokenizer)
    assert not {*train} & {*held} and len(train) + len(held) == 800 and 50 < len({*held}) < 110
    below = [text for text in every if text_digest(f"{text}\ns") / 2**64 < 0.2]
    assert held == [*below, *below]
    # Whatever stands beside it, and a larger share only adds.
    few = sets_of(tmp_path, tokenizer, ["else", *every[::-3]], [], 0.2)
    assert {*prompts(few["eval"], tokenizer)} - {"else"} == {*below} & {*every[::-3]}
    assert {*below} < {*prompts(sets_of(tmp_path, tokenizer, every, [], 0.4)["eval"], tokenizer)}


def test_a_text_in_another_layout_is_the_same_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "a.jsonl").write_text('{"prompt": "def f():\\n", "canonical_solution": "    return 1\\n"}')
    (tmp_path / "t").mkdir()
    plain = [{"prompt": "def f():", "solution": f"    return {n}"} for n in (1, 2)]
    (tmp_path / "t" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in plain))
    data = Data.model_validate({"train": {"sources": ["t"]}, "eval": {"sources": ["h"]}})
    sets = read_sets(data, {name: tmp_path / name for name in "th"}, tokenizer)
    assert [record.text for record in sets["train"].records()] == ["def f():\n    return 2"]
    assert [record.text for record in sets["eval"].records()] == ["def f():\n    return 1\n"]


def test_a_share_stands_beside_evaluation_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    every = [f"text {i}" for i in range(40)]
    below = [text for text in every if text_digest(f"{text}\ns") / 2**64 < 0.5]
    sets = sets_of(tmp_path, tokenizer, every, ["x", below[0], every[0]], 0.5)
    assert prompts(sets["eval"], tokenizer) == ["x", below[0], every[0], *(t for t in below[1:] if t != every[0])]
    assert not {*prompts(sets["train"], tokenizer)} & {*prompts(sets["eval"], tokenizer)}


def test_a_side_without_a_document_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.train\.sources: of 2 documents there is no text that is not held out"):
        sets_of(tmp_path, tokenizer, ["a", "b"], ["a", "b"])
    kept = [text for text in map(str, range(40)) if text_digest(f"{text}\ns") / 2**64 >= 0.5]
    with pytest.raises(DataError, match=rf"data\.eval\.share: 0\.5 holds out none of {len(kept)} documents"):
        sets_of(tmp_path, tokenizer, kept, [], 0.5)


def test_human_eval_is_evaluated_on_and_trained_on_only_by_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "he").mkdir()
    (tmp_path / "he" / "a.jsonl").write_text('{"task_id": "HumanEval/0", "prompt": "p", "canonical_solution": "c"}')
    folders = {"he": tmp_path / "he", "t": source(tmp_path / "t", "a")}

    def read(train: dict[str, object], held: list[str]) -> dict[str, Corpus]:
        return read_sets(Data.model_validate({"train": train, "eval": {"sources": held}}), folders, tokenizer)

    assert len(read({"sources": ["t"]}, ["he"])["eval"].rows) == 1
    with pytest.raises(DataError, match=r"data\.train\.sources: he: 1 records are HumanEval's"):
        read({"sources": ["t", "he"]}, [])
    allowed = read({"sources": ["t", "he"], "allow_evaluation_data": True}, [])
    assert [record.text for record in allowed["train"].records()] == ["a\ns", "pc"]


def test_a_corpus_has_another_digest_where_tokens_or_rows_are_others(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def digest(*train: str, **layout: object) -> str:
        data = Data.model_validate({"train": {"sources": ["t"], **layout}})
        return read_sets(data, {"t": source(tmp_path / "t", *train)}, tokenizer)["train"].digest

    first = digest("a", "b c")
    assert digest("a", "b c") == first and len(first) == 64
    others = {digest("b c", "a"), digest("a", "b d"), digest("a", "b c", max_length=64)}
    assert len(others | {first, digest("a", "b c", pack_sequences=False)}) == 5
    assert pack([[1, 2], [3]], 4, 0, True).digest != pack([[1], [2, 3]], 4, 0, True).digest


def test_rows_take_little_more_than_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sets = sets_of(tmp_path, tokenizer, [f"word {i} " * 30 for i in range(50)], [])
    rows = sets["train"].rows
    held = sum(part.nbytes for part in (rows.ids, rows.source, rows.begin, rows.first))
    assert rows.ids.itemsize == 2 and held / rows.tokens < 3


def test_bad_data_of_a_synced_source_is_named_as_the_settings_name_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """It is read under the digest of its version, which nobody knows it by."""
    folder = source(tmp_path / ("fc" * 32), "a")
    (folder / "a.jsonl").write_text('{"prompt": "a", "solution": "s"}\n{"prompt": "cut\n')
    data = Data.model_validate({"train": {"sources": ["code"]}})
    with pytest.raises(DataError, match=r"^code/a\.jsonl:2: is not JSON"):
        read_sets(data, {"code": folder}, tokenizer)
