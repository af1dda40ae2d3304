from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wmtp import report


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The record of a run of twelve steps."""
    made = tmp_path / "app" / "logs" / "test-run"
    made.mkdir(parents=True)
    facts = {
        "run": "test-run",
        "env": "minitest",
        "algo": "rho1-wmtp",
        "revision": "abc1234",
        "world": 2,
        "device": "cpu",
        "total_steps": 12,
        "seed": 7,
        "price_per_hour": 6.0,
        "digests": {"data": "d1"},
        "mlflow": {"uri": "s3://b/mlruns"},
        "mlflow_run_id": "m1",
        "versions": {"torch": "2"},
        "config": {"launcher": {"resources": {"gpus": 2}}, "devices": {"fsdp": {"enabled": True}}},
        "recipe": {"optim": {"lr": 0.001}},
    }
    (made / "facts.json").write_text(json.dumps(facts))
    write(made, "parts", {"began": 1000.0}, {"ended": 1600.0, "code": 0})
    write(made, "phases", {"phase": "sync", "began": 1001.0, "ended": 1011.0})
    write(made, "sync", {"name": "base", "downloaded_bytes": 2_000_000, "seconds": 10.0})
    losses = {f"ce_head_{k}": 9.0 - k for k in range(4)} | {f"w_mean_head_{k}": 1.0 for k in range(4)}
    steps = [
        {
            "step": n,
            "at": 1100.0 + 10 * n,
            "wmtp_loss": 9.0 - n / 10,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 100.0,
        }
        | {"step_seconds": 10.0, "data_wait_s": 0.1, "checkpoint_stall_s": 0.0, "memory_gib": 1.5, "w_ess": 0.8}
        | losses
        for n in range(1, 13)
    ]
    write(made, "steps", *steps)
    write(
        made,
        "evals",
        {"step": 0, "began": 1, "at": 2, "ce": [9.5, 9.6]},
        {"step": 12, "began": 3, "at": 4, "ce": [8.5, 8.6]},
    )
    (made / "log.txt").write_text("train     warn  a <tag> & 7 | 8\nStep 1/12\n")
    return made


class Page(HTMLParser):
    """What a browser would find broken: tags that are not closed, pictures from elsewhere, names that stand twice."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pictures = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "svg" or tag == "img":
            self.pictures += 1
        assert not (known.get("src") or "data:").startswith(("http", "/", "file"))
        if "id" in known:
            self.ids.append(str(known["id"]))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if "id" in dict(attrs):
            self.ids.append(str(dict(attrs)["id"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def made(folder: Path, out: Path, *more: str) -> tuple[str, str]:
    assert report.main([str(folder), "--out", str(out), *more]) == 0
    return (out / "report.md").read_text(), (out / "report.html").read_text()


def test_the_page_stands_alone_and_is_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = made(folder, tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out/report.html'}\n"
    page = Page(text)
    assert page.pictures >= 6 and len(page.ids) == len(set(page.ids))
    assert "a &lt;tag&gt; &amp; 7 | 8" in text and "<tag>" not in text
    for used in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert (used[0] or used[1]) in page.ids


def test_the_markdown_has_the_same_facts_and_its_pictures_beside_it(folder: Path, tmp_path: Path) -> None:
    text, _ = made(folder, tmp_path / "out")
    for known in (
        "completed",
        "9.550 -> 8.550",
        "abc1234",
        "$1.00",
        "2.0 MB in 10 s",
        "20.0 % of these seconds",
        "a &lt;tag> & 7 \\| 8",
        "| what | first 6 steps -> last 6 (medians) | source |",
        "| effective sample size, a share of the tokens | 0.800 -> 0.800 | steps.jsonl |",
        "| mean weight of head 3 | 1.000 -> 1.000",
    ):
        assert known in text, known
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) >= 6
    for picture in pictures:
        ET.fromstring((tmp_path / "out" / picture).read_text())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_what_an_older_image_called_a_failure_and_saved_is_none(folder: Path) -> None:
    with (folder / "log.txt").open("a") as log:
        log.write("startup   FAIL  training ended with 75 after 20 s: step 3 SIGTERM\nstartup   FAIL  no room\n")
    told = [text for _, text, where in report.survived(report.Run(folder)) if where == "log.txt"]
    assert told == ["warn a <tag> & 7 | 8", "FAIL no room"]


def test_what_nobody_recorded_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    write(tmp_path / "r", "parts", {"began": 1.0}, {"ended": 3.0, "code": 13})
    text, page = made(tmp_path / "r", tmp_path / "out")
    assert Page(page) and "failed" in text and text.count(report.NONE) > 15
    where = text[text.index("## What ran where") : text.index("## How long")]
    assert (
        report.NONE not in where and "| record | " in where and "| began, ended | " in where and "cluster" not in where
    )
    plan = text[text.index("## Against the plan") : text.index("## The plan's completion")]
    assert plan.count("| not recorded |") == 6 and "ok" not in plan


def test_a_small_run_reaches_no_bar_of_production(folder: Path, tmp_path: Path) -> None:
    def row(env: str, name: str) -> str:
        facts = json.loads((folder / "facts.json").read_text()) | {"env": env}
        (folder / "facts.json").write_text(json.dumps(facts))
        report.main([str(folder), "--out", str(tmp_path)])
        return next(
            line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith(f"| {name} |")
        )

    assert "2 ranks on cpu, FSDP on — not checked: the bar is a production run's" in row(
        "minitest", "distributed start"
    )
    assert "2 ranks on cpu, FSDP on — missed" in row("production", "distributed start")
    assert "not checked" in row("minitest", "model download") and "ok" in row("production", "model download")


def test_remarks_stay_when_it_is_made_again(folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("The loss of head 3 is odd.\n")
    assert "head 3 is odd" in made(folder, tmp_path / "out", "--notes", str(notes))[0]
    notes.unlink()
    text, page = made(folder, tmp_path / "out")
    assert "head 3 is odd" in text and "head 3 is odd" in page


def test_remarks_of_another_encoding_are_shown_as_far_as_they_can_be_read(folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_bytes("café <b>bold</b>\n".encode("latin-1"))
    assert "caf� &lt;b&gt;bold" in made(folder, tmp_path / "out", "--notes", str(notes))[1]


@pytest.mark.parametrize(
    ("known", "command"),
    [
        ({}, "git checkout abc1234 && make deploy ENV=minitest ALGO=rho1-wmtp RUN_NAME=test-run-again"),
        ({"launcher": "docker"}, "make deploy ENV=minitest LAUNCHER=docker ALGO=rho1-wmtp RUN_NAME=test-run-again"),
        ({"launcher": "local"}, "make minitest ALGO=rho1-wmtp RUN_NAME=test-run-again"),
        ({"env": "test", "launcher": "local"}, "make train ALGO=rho1-wmtp RUN_NAME=test-run-again"),
        (
            {"revision": "abc1234-dirty"},
            "# Its tree had changes that no commit has: they are not in what this checks out.\n"
            "git checkout abc1234 && make deploy ENV=minitest ALGO=rho1-wmtp RUN_NAME=test-run-again",
        ),
        ({"set": "optim.lr=0.1 seed=3"}, 'RUN_NAME=test-run-again SET="optim.lr=0.1 seed=3"'),
    ],
)
def test_one_command_does_it_again(folder: Path, tmp_path: Path, known: dict[str, str], command: str) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({"launcher": "vessl"} | facts | known))
    again = made(folder, tmp_path / "out")[0].partition("## Again")[2]
    assert f"{command}\n```" in again, again


def test_a_resumed_run_fetched_its_models_more_than_once_and_each_time_in_time(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"env": "production"}))
    write(folder, "phases", *({"phase": "sync", "began": at, "ended": at + 200.0} for at in (1000.0, 1300.0)))
    write(folder, "sync", *({"name": "base", "downloaded_bytes": 10**9, "seconds": 200.0} for _ in range(2)))
    assert (
        "2.00 GB in 6.7 min, 5 MB/s of the whole stage, 3.3 min at most at a time — ok"
        in made(folder, tmp_path / "out")[0]
    )


def test_labels_of_lines_that_end_together_stay_inside(folder: Path, tmp_path: Path) -> None:
    _, page = made(folder, tmp_path / "out")
    weights = page[page.index("Weights: mean of each head") :]
    title = float(re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>Weights: mean', weights)[0])
    labels = re.findall(r'translate\([\d.]+ ([\d.]+)\)[^>]*>head \d|<text[^>]* y="([\d.]+)"[^>]*>head \d', weights)
    assert len(labels) == 4 and all(float(a or b) > title + 5 for a, b in labels)


def test_runs_stand_side_by_side_with_what_is_set_differently(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = folder.parent / "other-run"
    shutil.copytree(folder, other)
    facts = json.loads((other / "facts.json").read_text())
    facts |= {"run": "other-run", "recipe": {"optim": {"lr": 0.5}}}
    (other / "facts.json").write_text(json.dumps(facts))
    assert report.main([str(folder), str(other), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/compare.md").read_text()
    assert "| recipe.optim.lr | 0.001 | 0.5 |" in text and "config." not in text
    assert Page((tmp_path / "out/compare.html").read_text()).pictures == 3


def test_steps_that_were_left_out_are_no_trained_ones(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    write(folder, "steps", *(row | {"not_finite": max(0, row["step"] - 4)} for row in rows))
    text, _ = made(folder, tmp_path / "out")
    assert "completed, 4 steps, 8 were left out: not finite" in text
    assert "| steps | 4 of 12, 8 were left out: not finite |" in text
    assert "4 of 12 steps, 8 were left out: not finite — missed" in text


def test_the_pause_between_two_parts_is_nobodys_wait(folder: Path, tmp_path: Path) -> None:
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    first = report.Run(folder).until_step(12)
    began = parts[0]["began"]
    write(folder, "parts", {"began": began - 900}, {"ended": began - 800, "code": 75}, *parts)
    again = report.Run(folder).until_step(12)
    assert first is not None and again == pytest.approx(first + 100)


def test_a_folder_without_a_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no record of a run" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_page_of_a_long_run_is_no_larger_than_a_persons_patience(tmp_path: Path) -> None:
    """Between two steps is a moment that is none of them: all are seconds, and none is a mark of its own."""
    (tmp_path / "r").mkdir()
    steps = [{"step": n, "at": 1000.0 + n, "step_seconds": 0.998, "wmtp_loss": 1.0} for n in range(1, 20_001)]
    write(tmp_path / "r", "steps", *steps)
    write(tmp_path / "r", "parts", {"began": 1000.0}, {"ended": 21_000.0, "code": 0})
    text, page = made(tmp_path / "r", tmp_path / "out")
    assert "99.8 %" in text and len(page) < 1_000_000


def test_what_a_page_of_a_living_run_warns_of_stands_in_the_report(folder: Path, tmp_path: Path) -> None:
    told = [json.loads(line) | {"grad_norm": 0.0} for line in (folder / "steps.jsonl").read_text().splitlines()]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    text, _ = made(folder, tmp_path)
    assert "| warning | no gradient in the last 5 steps" in text


def test_a_dataset_that_was_synced_is_no_model(tmp_path: Path) -> None:
    write(tmp_path, "sync", {"model": "base", "seconds": 1.0}, {"dataset": "code", "seconds": 1.0})
    told = [row[0] for row in report.template_rows(report.Run(tmp_path))]
    assert told[1:3] == ["model base", "dataset code"]
