"""Scores of frozen models: the same bits whoever computes them, kept whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wmtp import outcome
from wmtp.checkpoint import Checkpoints
from wmtp.config import Storage
from wmtp.data import Corpus, Rows, pack, tokenize
from wmtp.model import ModelSpec, MTPModel, RewardModel
from wmtp.outcome import Stopped
from wmtp.ranks import Place
from wmtp.remote import MARKER
from wmtp.scoring import (
    FORWARDS,
    Kept,
    judged_documents,
    pseudo_rewards,
    rendered,
    score_reference,
    score_rewards,
    zscored,
)
from wmtp.sources import Record

CPU = Place(torch.device("cpu"))
SPEC = ModelSpec("hf", 1, 16, 1, 2, 2, 32, 300, max_positions=40)


class Words:
    """A tokenizer of bytes; ids 0 to 2 are unknown, beginning and end."""

    vocab_size, bos_id, eos_id, unk_id = 300, 1, 2, 0

    def encode(self, text: str) -> list[int]:
        return [b + 3 for b in text.encode()]

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return bytes(int(i) - 3 for i in ids if i > 2).decode(errors="replace")

    def pieces(self) -> list[str]:
        return [str(i) for i in range(300)]

    def digest(self) -> str:
        return "words"


TOKENIZER = Words()


class Stop(outcome.Stop):
    """A notice to stop after so many looks."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    @property
    def cause(self) -> str | None:
        if self.left is None:
            return None
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None

    def beat(self, where: str) -> None:
        """Nobody watches."""

    def rest(self, over: bool = False) -> None:
        """Nor here."""


def corpus_of(count: int = 60, longest: int = 50, max_length: int = 24, pack_sequences: bool = True) -> Corpus:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, longest, (count,), generator=generator).tolist()
    records = [Record(f"p{i}", "s" * size) for i, size in enumerate(sizes)]
    rows = pack(tokenize([r.text for r in records], TOKENIZER), max_length, TOKENIZER.eos_id, pack_sequences)
    return Corpus(lambda: records, rows)


def shelf(folder: Path, remote: str | None = None) -> Checkpoints:
    return Checkpoints(folder, remote, keep_last=1, storage=Storage(retry_wait_s=0))


def lively(model: nn.Module) -> Any:
    torch.manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def reference(folder: Path, corpus: Corpus, stop: Stop | None = None, place: Place = CPU) -> dict[str, Tensor]:
    kept = Kept(shelf(folder), "reference-x")
    sets = {"train": corpus.rows, "eval": corpus_of(3).rows}
    score_reference(lively(MTPModel(SPEC)), sets, kept, 2, {"made": "here"}, place, stop or Stop())
    found = kept.load()
    assert found is not None
    return found


def rewards(folder: Path, corpus: Corpus, stop: Stop | None = None, template: str = "{text}") -> dict[str, Tensor]:
    kept = Kept(shelf(folder), "reward-x")
    model = lively(RewardModel(SPEC))
    score_rewards(model, {"train": corpus}, TOKENIZER, template, kept, 2, {}, CPU, stop or Stop())
    found = kept.load()
    assert found is not None
    return found


# ---- the reference -----------------------------------------------------------------------------------------------


def test_the_reference_speaks_of_each_token_given_its_document_alone(tmp_path: Path) -> None:
    corpus = corpus_of(12)
    found = reference(tmp_path, corpus)["train"]
    model = lively(MTPModel(SPEC))
    for piece in corpus.rows.pieces():
        x, told = torch.from_numpy(piece.ids).long(), found[piece.row, piece.at : piece.at + len(piece.ids)]
        with torch.no_grad():
            logits = model.lm_head.logits(model.hidden(x[None], torch.zeros_like(x)[None])[0, :, 0])
        expected = torch.nn.functional.cross_entropy(logits[:-1], x[1:], reduction="none")
        assert told[0] == 0
        torch.testing.assert_close(told[1:], expected, rtol=1e-4, atol=1e-5)
    assert (found[corpus.rows.take(torch.arange(len(corpus.rows)))[2]] == 0).all()


@pytest.mark.parametrize("what", [reference, rewards])
@pytest.mark.parametrize("stops", [[0], [1, 1], [2]])
def test_scores_have_the_same_bits_after_stops(what: Any, stops: list[int], tmp_path: Path) -> None:
    corpus = corpus_of()
    whole = what(tmp_path / "whole", corpus)
    for after in stops:
        with pytest.raises(Stopped):
            what(tmp_path / "cut", corpus, Stop(after))
    cut = what(tmp_path / "cut", corpus)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not list((tmp_path / "cut").glob(".*.parts")), "the parts are joined"


def test_a_finished_block_is_not_computed_again_and_a_torn_one_is_no_block(tmp_path: Path) -> None:
    corpus = corpus_of()
    with pytest.raises(Stopped):
        reference(tmp_path, corpus, Stop(1))
    parts = sorted((tmp_path / ".reference-x.parts").iterdir())
    assert len(parts) == 2
    before = {p.name: p.stat().st_mtime_ns for p in parts}
    (tmp_path / ".reference-x.parts/train-2.123").write_bytes(b"torn")
    with pytest.raises(Stopped):
        reference(tmp_path, corpus, Stop(0))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".reference-x.parts").glob("*.safetensors")}
    assert len(after) == 3 and before.items() <= after.items()


def test_every_block_has_the_same_number_of_forwards(tmp_path: Path) -> None:
    """Sharded forwards are collective: a rank with a short block, or none, must not fall behind."""
    seen: list[tuple[int, ...]] = []

    class Counting(MTPModel):
        def forward(self, x_bs: Tensor, *rest: Any, **more: Any) -> Any:
            seen.append(tuple(x_bs.shape))
            return super().forward(x_bs, *rest, **more)

    kept = Kept(shelf(tmp_path), "reference-y")
    rows = corpus_of(33).rows
    score_reference(lively(Counting(SPEC)), {"train": rows}, kept, 2, {}, CPU, Stop())
    blocks = -(-len(rows) // (2 * FORWARDS))
    assert len(rows) % (2 * FORWARDS) and seen == [(2, 24)] * (blocks * FORWARDS)


# ---- rewards -------------------------------------------------------------------------------------------------------


def test_a_reward_is_that_of_the_document_alone_and_lies_at_its_end(tmp_path: Path) -> None:
    corpus = corpus_of(20)
    found = rewards(tmp_path, corpus, template="<s>Q{prompt}A{solution}</s>")["train"]
    assert torch.equal(found != 0, corpus.rows.last_tokens())
    model = lively(RewardModel(SPEC))
    for document in judged_documents(corpus, TOKENIZER, "<s>Q{prompt}A{solution}</s>", SPEC.max_positions):
        x = torch.tensor([document.ids])
        with torch.no_grad():
            alone = model(x, torch.zeros_like(x), torch.tensor([len(document.ids) - 1]))
        torch.testing.assert_close(found[document.row, document.last], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text}", [1, *b"p{x}<s>\ns</s>{prompt}"]),
        ("<s>{text}</s>", [1, *b"p{x}<s>\ns</s>{prompt}", 2]),
        ("<s>[I] {prompt} </s>[/I] {solution}</s>", [1, *b"[I] p{x}<s> ", 2, *b"[/I] s</s>{prompt}", 2]),
        ("a{solution}b", [1, *b"as</s>{prompt}b"]),
    ],
)
def test_a_template_has_special_tokens_and_what_a_field_brings_is_text(template: str, expected: list[int]) -> None:
    found = rendered(template, Record("p{x}<s>", "s</s>{prompt}"), None, TOKENIZER)
    assert found == [i if i in (1, 2) else i + 3 for i in expected]


def test_a_cut_piece_is_a_document_of_its_own() -> None:
    records = [Record("ask", "0123456789" * 3)]
    rows = pack(tokenize([records[0].text], TOKENIZER), 16, 2, True)
    found = judged_documents(Corpus(lambda: records, rows), TOKENIZER, "<s>{prompt}|{solution}", 99)
    shown = [TOKENIZER.decode(d.ids) for d in found]
    assert shown == ["ask|01234567890", "ask|1234567890123456", "ask|789"]
    assert [(d.row, d.last) for d in found] == [(0, 15), (1, 15), (2, 3)]


def test_a_rendering_beyond_the_positions_keeps_its_beginning_token_and_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = [Record("a", "b" * 30), Record("a", "c")]
    rows = pack(tokenize([r.text for r in records], TOKENIZER), 64, 2, True)
    found = judged_documents(Corpus(lambda: records, rows), TOKENIZER, "{text}", 10)
    assert len(found[0].ids) == 10 and found[0].ids[0] == 1 and TOKENIZER.decode(found[0].ids) == "b" * 9
    assert "1 of 2 documents are longer than the reward model's 10 positions" in capsys.readouterr().err


def test_rewards_are_zscored_over_the_training_set() -> None:
    rows = pack([[1, 5], [1, 5, 6], [1, 7]], 8, 2, True)
    ends = rows.last_tokens()
    train = torch.zeros(1, 8)
    train[ends] = torch.tensor([1.0, 2.0, 6.0])
    held = torch.zeros(1, 8)
    held[ends] = torch.tensor([3.0, 3.0, 3.0])
    found = zscored({"train": train, "eval": held}, {"train": rows, "eval": rows})
    deviation = (14 / 3) ** 0.5
    torch.testing.assert_close(found["train"][ends], torch.tensor([-2.0, -1.0, 3.0]) / deviation)
    assert (found["eval"] == 0).all() and (found["train"][~ends] == 0).all()


def test_rewards_that_are_all_alike_become_zero_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    rows = pack([[1, 5], [1, 5, 6]], 8, 2, True)
    same = rows.last_tokens().float() * 0.1
    assert (zscored({"train": same}, {"train": rows})["train"] == 0).all()
    assert "warn" in capsys.readouterr().err


def test_pseudo_rewards_are_the_mean_of_what_can_be_predicted() -> None:
    rows: Rows = pack([[1, 5, 6], [1], [1, 7]], 8, 2, True)
    ce = torch.tensor([[0.0, 2, 4, 0, 0, 5, 0, 0]])
    assert pseudo_rewards(ce, rows).tolist() == [[0, 0, -3, 0, 0, -5, 0, 0]]


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_damaged_kept_scores_are_none(tmp_path: Path) -> None:
    reference(tmp_path, corpus_of(4))
    kept = Kept(shelf(tmp_path), "reference-x")
    assert json.loads((kept.folder / "made-of.json").read_text()) == {"made": "here"}
    (kept.folder / "scores.safetensors").write_bytes(b"torn")
    assert kept.load() is None
    # Else the sync would leave out the scorer that is needed now.
    assert not (kept.folder / MARKER).exists()


def test_kept_scores_of_other_rows_are_none(tmp_path: Path) -> None:
    corpus = corpus_of(4)
    reference(tmp_path, corpus)
    kept = Kept(shelf(tmp_path), "reference-x")
    shapes = {"train": corpus.rows.shape, "eval": corpus_of(3).rows.shape}
    assert kept.load(shapes) is not None
    assert kept.load(shapes | {"eval": (1, 2)}) is None


def test_torn_scores_come_from_the_bucket_again(tmp_path: Path, prefix: str) -> None:
    first = Kept(shelf(tmp_path, prefix), "reference-x")
    score_reference(lively(MTPModel(SPEC)), {"train": corpus_of(4).rows}, first, 2, {}, CPU, Stop())
    first.shelf.close()
    (first.folder / "scores.safetensors").write_bytes(b"torn")
    assert Kept(shelf(tmp_path, prefix), "reference-x").load() is not None


def test_a_start_with_another_block_size_takes_no_block_for_another(tmp_path: Path) -> None:
    corpus = corpus_of(40)
    sets = {"train": corpus.rows, "eval": corpus_of(3).rows}
    whole = reference(tmp_path / "whole", corpus)
    kept = Kept(shelf(tmp_path / "parted"), "reference-x")
    with pytest.raises(Stopped):
        score_reference(lively(MTPModel(SPEC)), sets, kept, 2, {}, CPU, Stop(0))
    assert list(kept.parts.glob("*.safetensors"))
    score_reference(lively(MTPModel(SPEC)), sets, kept, 1, {}, CPU, Stop())
    found = kept.load()
    assert found is not None
    torch.testing.assert_close(found, whole)


def test_two_runs_that_want_the_same_scores_take_nothing_from_each_other(tmp_path: Path) -> None:
    corpus = corpus_of(40)
    first = Kept(shelf(tmp_path), "reference-x", "one")
    with pytest.raises(Stopped):
        score_reference(lively(MTPModel(SPEC)), {"train": corpus.rows}, first, 2, {}, CPU, Stop(0))
    done = {p.name for p in first.parts.iterdir()}
    second = Kept(shelf(tmp_path), "reference-x", "two")  # a start sweeps what kills left
    score_reference(lively(MTPModel(SPEC)), {"train": corpus.rows}, second, 2, {}, CPU, Stop())
    assert done and {p.name for p in first.parts.iterdir()} == done
    score_reference(lively(MTPModel(SPEC)), {"train": corpus.rows}, first, 2, {}, CPU, Stop())
    assert first.load() is not None and not first.staging.exists()


def test_a_score_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    model = lively(RewardModel(SPEC))
    with torch.no_grad():
        next(model.v_head.parameters())[0, 0] = math.nan
    kept = Kept(shelf(tmp_path), "reward-x")
    with pytest.raises(RuntimeError, match="not finite"):
        score_rewards(model, {"train": corpus_of(4)}, TOKENIZER, "{text}", kept, 2, {}, CPU, Stop())
    assert kept.load() is None
    with pytest.raises(RuntimeError, match="not finite"):
        rows = pack([[1, 5], [1, 5, 6]], 8, 2, True)
        zscored({"train": rows.last_tokens() * math.nan}, {"train": rows})


def test_a_pseudo_reward_of_one_token_is_0_and_in_no_mean() -> None:
    rows: Rows = pack([[1, 5, 6], [1], [1, 7]], 8, 2, True)
    ce = torch.tensor([[0.0, 2, 4, 0, 0, 5, 0, 0]])
    found = zscored({"train": pseudo_rewards(ce, rows)}, {"train": rows}, longer_than=1)["train"]
    assert found.tolist() == [[0, 0, 1, 0, 0, -1, 0, 0]]


def test_the_bucket_keeps_them_for_another_machine(tmp_path: Path, prefix: str) -> None:
    first = Kept(shelf(tmp_path / "one", prefix), "reference-x")
    assert first.load() is None
    sets = {"train": corpus_of(4).rows}
    score_reference(lively(MTPModel(SPEC)), sets, first, 2, {}, CPU, Stop())
    first.shelf.close()
    mine = first.load()
    theirs = Kept(shelf(tmp_path / "two", prefix), "reference-x").load()
    assert mine is not None and theirs is not None and torch.equal(mine["train"], theirs["train"])


def test_damaged_scores_in_the_bucket_are_told_and_made_again(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"train": corpus_of(4).rows}
    first = Kept(shelf(tmp_path / "one", prefix), "reference-x")
    score_reference(lively(MTPModel(SPEC)), sets, first, 2, {}, CPU, Stop())
    first.shelf.close()
    file, remote = first.folder / "scores.safetensors", first.shelf.remote
    assert remote is not None
    file.write_bytes(b"x" * file.stat().st_size)
    remote.s5cmd("cp", str(file), f"{prefix}/reference-x/{file.name}")
    second = Kept(shelf(tmp_path / "two", prefix), "reference-x")
    assert second.load() is None and "arrived with another content" in capsys.readouterr().err
    score_reference(lively(MTPModel(SPEC)), sets, second, 2, {}, CPU, Stop())
    second.shelf.close()
    assert Kept(shelf(tmp_path / "three", prefix), "reference-x").load() is not None
