"""The trainer on real parts: tiny models, real gloo ranks, real kills."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plants
import pytest
import torch
from runs import CONFIG, ROOT, Run, free_port

from wmtp import train
from wmtp.config import Storage, load_pair, load_recipe
from wmtp.data import load_tokenizer
from wmtp.manifest import create
from wmtp.optim import learning_rate
from wmtp.ranks import Place
from wmtp.remote import Remote

RECIPE = ROOT / "tests/configs/recipe.baseline_mtp.yaml"
ALGORITHMS = ("baseline-mtp", "rho1-wmtp", "critic-wmtp")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, ROOT / "tests/test_models/generate.py", "--out", folder], check=True, cwd=ROOT)
    return folder


@pytest.fixture
def app(models: Path, tmp_path: Path) -> Path:
    """A folder that stands for /app."""
    (tmp_path / "models").mkdir()
    for model in models.iterdir():
        (tmp_path / "models" / model.name).symlink_to(model)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    return tmp_path


# ---- kill and resume -------------------------------------------------------------------------------------------------


def scored(run: Run, blocks: int) -> Callable[[], bool]:
    return lambda: len(list(run.base.glob(".scores/.*.parts/*.safetensors"))) >= blocks


def stepped(run: Run, word: str, step: int) -> Callable[[], bool]:
    return lambda: f"{word} {step}/" in run.log()


def kill_when(run: Run, there: Callable[[], bool]) -> None:
    run.start()
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline and all(r.is_alive() for r in run.ranks), run.log()[-3000:]
        time.sleep(0.002)
    run.kill()


@pytest.mark.parametrize(
    ("algorithm", "kills"),
    [("critic-wmtp", 1), *(pytest.param(a, 3, marks=pytest.mark.long) for a in ALGORITHMS)],
)
def test_killed_and_resumed_gives_the_same_losses(app: Path, algorithm: str, kills: int) -> None:
    seeded = random.Random(f"moments of {algorithm}")
    sets = ("paths.checkpoints.save_interval=3", "pretrain.max_steps=7", "paths.checkpoints.save_final=false")
    whole = Run(app, algorithm, "whole", *sets).whole()
    cut = Run(app, algorithm, "cut", *sets, into="other")
    moments = {
        "baseline-mtp": [stepped(cut, "Step", s) for s in (seeded.randint(1, 3), seeded.randint(4, 6), 8)],
        "rho1-wmtp": [
            scored(cut, seeded.randint(2, 6)),
            *(stepped(cut, "Step", seeded.randint(*r)) for r in ((1, 5), (7, 10))),
        ],
        "critic-wmtp": [
            scored(cut, seeded.randint(2, 6)),
            lambda: (cut.folder / "pretrain/step-3/.complete").exists(),
            stepped(cut, "Step", seeded.randint(4, 10)),
        ],
    }[algorithm]
    for moment in moments[-kills:]:
        kill_when(cut, moment)
    cut.whole()
    assert len(whole.losses()) == 12 and cut.losses() == whole.losses()
    assert "goes on after step" in cut.log()
    made_of = json.loads((cut.folder / "step-12/trainer.json").read_text())["made_of"]
    assert made_of["train.algo"] == algorithm and len(made_of["data"]) == 64 and made_of["rows_per_step"] == 4
    assert [path.name for path in cut.base.glob(".scores/*-*")] == [made_of["scores"]] * (algorithm != "baseline-mtp")
    if algorithm != "baseline-mtp":
        assert "blocks were done before" in cut.log() or kills == 1
        weights = [record["w_ess"] for record in whole.records()]
        assert weights[0] == 1 or algorithm == "critic-wmtp"
        assert all(0 < w < 1 for w in weights[1:])
    assert not (app / "facts.json").exists()  # its exit file lies in no folder of its name
    if algorithm == "critic-wmtp":
        if kills > 1:  # one of them in stage 1
            assert re.search("value head learns the reward: 7 steps, goes on after step [36]|trained before", cut.log())
        assert [r["value_loss"] for r in cut.records()] == [r["value_loss"] for r in whole.records()]


@pytest.mark.long
def test_lambda_zero_is_the_baseline_bit_for_bit_through_a_kill(app: Path) -> None:
    sets = ("train.max_steps=20", "paths.checkpoints.save_interval=6", "paths.checkpoints.save_final=false")
    baseline = Run(app, "baseline-mtp", "baseline", *sets).whole()
    assert len(baseline.losses()) == 20
    for algorithm, step in (("rho1-wmtp", 8), ("critic-wmtp", 14)):
        run = Run(app, algorithm, algorithm, "loss.lambda=0", *sets)
        kill_when(run, stepped(run, "Step", step))
        assert run.whole().losses() == baseline.losses(), algorithm
        assert f"goes on after step {step // 6 * 6}" in run.log()
        assert {r["w_ess"] for r in run.records()} == {1.0}


@pytest.mark.long
def test_compiled_layers_and_loss_give_the_losses_of_plain_ones(app: Path) -> None:
    sets = (
        "train.max_steps=3",
        "paths.checkpoints.save_interval=3",
        "paths.checkpoints.save_final=false",
        "data.eval.sources=[]",
    )
    plain = Run(app, "baseline-mtp", "plain", *sets, world=1).whole()
    kept = "devices.fsdp.activation_ckpt=selective"
    compiled = Run(app, "baseline-mtp", "compiled", *sets, kept, "devices.compile=true", world=1).whole()
    losses = [[record["wmtp_loss"] for record in run.records()] for run in (compiled, plain)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    made_of = json.loads((compiled.folder / "step-3/trainer.json").read_text())["made_of"]
    assert made_of["devices.compile"] is True


def test_compile_without_a_compiler_is_refused_before_anything_is_read(app: Path) -> None:
    compiles: dict[str, Any] = {"world": 1, "plant": plants.no_compiler}
    Run(app, "baseline-mtp", "dry", "devices.compile=true", arguments=("--dry-run",), **compiles).whole()
    run = Run(app, "baseline-mtp", "r", "devices.compile=true", **compiles)
    assert run.start().wait() == 2
    assert "devices.compile: true: no g++, clang++ on this machine" in run.log() and "data" not in run.log()


def launcher(run: Run, *torchrun: str, **environment: str) -> subprocess.Popen[str]:
    return run.torchrun(*torchrun, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.long
def test_through_torchrun_ranks_save_when_it_is_told_to_end_follow_it_when_it_is_killed_and_go_on_on_two_nodes(
    app: Path,
) -> None:
    sets = ("paths.checkpoints.save_interval=6", "paths.checkpoints.save_final=false", "train.max_steps=10")
    run = Run(app, "baseline-mtp", "r", *sets)
    one_node = ("--standalone", "--nproc-per-node=2")

    def until(process: subprocess.Popen[str], path: Path, text: str = "") -> None:
        deadline = time.monotonic() + 120
        while not (path.exists() and text in path.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    told = launcher(run, *one_node)
    until(told, run.folder / "steps.jsonl", '"step": 2,')
    told.terminate()
    _, story = told.communicate(timeout=120)
    ended = json.loads((app / "r-exit.json").read_text())
    assert ended["code"] == 75 and ended["cause"] == "SIGTERM" and "Traceback" not in story, story
    killed = launcher(run, *one_node)
    until(killed, run.folder / "step-6/.complete")
    killed.kill()  # torchrun alone: its ranks must follow it
    _, story = killed.communicate(timeout=120)
    assert f"goes on after step {ended['step']}" in story
    address = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--nproc-per-node=1")
    nodes = [launcher(run, *address, f"--node-rank={rank}") for rank in range(2)]
    stories = "".join(node.communicate(timeout=240)[1] for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0] and "goes on after step 6" in stories, stories
    assert json.loads((app / "r.json").read_text())["steps"] == 10
    assert run.losses() == Run(app, "baseline-mtp", "whole", *sets).whole().losses()


def test_nodes_that_do_not_share_the_folder_of_checkpoints_are_refused(app: Path, tmp_path: Path) -> None:
    run = Run(app, "baseline-mtp", "r", *SHORT, "paths.checkpoints.base_path=file:///app/checkpoints")
    address = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--nproc-per-node=1")
    (tmp_path / "other").mkdir()
    for folder in ("models", "datasets"):
        (tmp_path / "other" / folder).symlink_to((app / folder).resolve())
    nodes = [launcher(run, *address, WMTP_APP_ROOT=str(root)) for root in (app, tmp_path / "other")]
    stories = "".join(node.communicate(timeout=240)[1] for node in nodes)
    assert json.loads((app / "r-exit.json").read_text())["code"] == 2, stories
    assert "not the same folder on all nodes" in stories and "Traceback" not in stories


@pytest.mark.long
def test_two_ranks_then_one_then_two_go_on_to_rounding(app: Path) -> None:
    # Evaluation before each save: what it leaves gathered must not be what is saved or stepped.
    evaluated = ("eval.interval=2", "eval.max_batches=2")
    sets = ("train.max_steps=8", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false", *evaluated)
    whole = Run(app, "rho1-wmtp", "whole", *sets).whole()
    allowed = ("--allow", "train.accumulation_steps")
    two = Run(app, "rho1-wmtp", "r", *sets, arguments=allowed)
    one = Run(app, "rho1-wmtp", "r", *sets, "train.accumulation_steps=2", world=1, arguments=allowed)
    kill_when(two, stepped(two, "Step", 4))
    kill_when(one, lambda: one.log().count("Step 6/") > 0)
    assert len(two.whole().losses()) == 8
    assert two.log().count("goes on changed, as allowed: train.accumulation_steps: ") == 2
    for step, loss in whole.losses().items():
        assert float.fromhex(two.losses()[step]) == pytest.approx(float.fromhex(loss), rel=1e-5), step


def test_one_device_and_two_ranks_see_the_same_losses(app: Path) -> None:
    sets = ("train.max_steps=2", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")
    one = Run(app, "baseline-mtp", "one", "data.train.batch_size=4", *sets, world=1).whole()
    two = Run(app, "baseline-mtp", "two", *sets).whole()
    for step in (1, 2):
        first, second = (float.fromhex(run.losses()[step]) for run in (one, two))
        assert first == pytest.approx(second, rel=1e-5)
    assert one.log().count("tokens, made in") == 2 and "kept from before" not in one.log()
    assert two.log().count("tokens, kept from before") == 2 and "made in" not in two.log()


@pytest.mark.parametrize(("rank", "order"), [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_rank_0_tokenizes_while_the_others_wait(
    rank: int, order: list[str], app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Two(Place):
        def wait(self) -> None:
            seen.append("wait")

    monkeypatch.setenv("WMTP_APP_ROOT", str(app))
    monkeypatch.setattr(train, "read_sets", lambda *_: seen.append("read"))
    config, recipe = load_pair(CONFIG, RECIPE, [], env="minitest")
    tokenizer = load_tokenizer(app / "models/test-llama-mtp")
    train.load_sets(config, recipe, tokenizer, app / "shelf", Two(torch.device("cpu"), 2, rank))
    assert seen == order


# ---- notice to stop --------------------------------------------------------------------------------------------------


def told_to_end(run: Run) -> dict[str, Any]:
    """SIGTERM to all ranks, which end with 75; the exit file."""
    for rank in run.ranks:
        assert rank.pid
        os.kill(rank.pid, signal.SIGTERM)
    assert run.wait() == 75, run.log()
    return dict(json.loads((run.app / f"{run.run}-exit.json").read_text()))


@pytest.mark.parametrize(
    "stage",
    [pytest.param("scoring", marks=pytest.mark.long), pytest.param("stage 1", marks=pytest.mark.long), "stage 2"],
)
def test_sigterm_saves_ends_with_75_and_goes_on(app: Path, stage: str) -> None:
    run = Run(
        app, "critic-wmtp", "r", "pretrain.max_steps=40", "train.max_steps=6", "paths.checkpoints.save_interval=6"
    )
    there = {
        "scoring": scored(run, 2),
        "stage 1": stepped(run, "pretrain  step", 2),
        "stage 2": stepped(run, "Step", 2),
    }
    run.start()
    deadline = time.monotonic() + 120
    while not there[stage]():
        assert time.monotonic() < deadline, run.log()
        time.sleep(0.002)
    ended = told_to_end(run)
    assert ended["code"] == 75 and ended["cause"] == "SIGTERM"
    assert "Traceback" not in run.log() and "the same command goes on" in run.log()
    run.whole()
    went_on = {
        "scoring": "blocks were done before",
        "stage 1": "pretrain  the value head learns the reward: 40 steps, goes on after step",
        "stage 2": f"6 steps; goes on after step {ended['step']}",
    }
    assert went_on[stage] in run.log()


@pytest.mark.parametrize("stage", ["save", pytest.param("upload", marks=pytest.mark.long)])
def test_sigterm_while_a_checkpoint_is_written_or_brought_to_the_bucket_leaves_both_whole(
    app: Path, prefix: str, stage: str
) -> None:
    sets = ("train.max_steps=12", "paths.checkpoints.save_interval=3", "paths.checkpoints.save_final=false")
    run = Run(app, "baseline-mtp", "r", *sets, f"paths.checkpoints.base_path={prefix}", "paths.checkpoints.keep_last=2")
    folder = app / "checkpoints/r"
    run.start()
    deadline = time.monotonic() + 120
    while not (folder / ".step-3").exists() if stage == "save" else "save      step 3" not in run.log():
        assert time.monotonic() < deadline, run.log()
        time.sleep(0.001)
    ended = told_to_end(run)
    assert Remote(f"{prefix}/r", Storage()).steps()[-1] == ended["step"]
    shutil.rmtree(folder)  # another node has nothing but the bucket
    run.whole()
    assert f"goes on after step {ended['step']}" in run.log()
    whole = Run(app, "baseline-mtp", "whole", *sets).whole().losses()
    resumed = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [float(r["wmtp_loss"]).hex() for r in resumed] == [whole[r["step"]] for r in resumed]
    assert [r["step"] for r in resumed] == list(range(ended["step"] + 1, 13))


# ---- scorers ---------------------------------------------------------------------------------------------------------


def test_with_kept_scores_the_scorer_is_not_needed(app: Path) -> None:
    sets = ("train.max_steps=2", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")
    manifests = app / "models/.manifests"
    manifests.mkdir()
    model = app / "models/test-rm-llama"
    (manifests / "test-rm-llama.json").write_text(json.dumps(create(model.resolve(), "test-rm-llama")))
    first = Run(app, "critic-wmtp", "first", *sets).whole()
    model.unlink()
    second = Run(app, "critic-wmtp", "second", *sets).whole()
    assert "was kept: the scorer is not needed" in second.log() and second.losses() == first.losses()
    other = Run(app, "critic-wmtp", "third", *sets, "critic.reward_template=a {text}").start()
    assert other.wait() == 2
    # The rank that comes first tells it.
    assert "test-rm-llama is not there" in json.loads((app / "third-exit.json").read_text())["cause"]
    assert "Traceback" not in "".join((app / f"third-{rank}.log").read_text() for rank in range(2))


def test_pseudo_rewards_need_no_reward_model(app: Path) -> None:
    (app / "models/test-rm-llama").unlink()
    sets = ("train.max_steps=2", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")
    run = Run(app, "critic-wmtp", "r", "critic.use_pseudo_rewards=true", *sets).whole()
    assert "reference-" in run.log() and len(run.losses()) == 2


def test_token_skip_trains_two_passes(app: Path) -> None:
    sets = ("train.max_steps=3", "paths.checkpoints.save_interval=3", "paths.checkpoints.save_final=false")
    split = ("data.eval.sources=[]", "data.eval.share=0.2")
    run = Run(app, "rho1-wmtp", "r", "rho1.selection_mode=token_skip", "loss.lambda=1.0", *split, *sets).whole()
    assert "held out  before" in run.log()
    zeros = [record["w_zeros"] for record in run.records()]
    assert zeros[0] == 0 and zeros[1:] == pytest.approx([0.3, 0.3], abs=0.01)


def test_a_plain_llama_of_one_head_trains_four_on_request_only(app: Path) -> None:
    plain = f"paths.models.base=file://{app}/models/test-llama"
    sets = (plain, "train.max_steps=2", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=true")
    refused = Run(app, "baseline-mtp", "refused", *sets, world=1).start()
    assert refused.wait() == 2
    assert "model.heads: 4, but" in refused.log() and "model.new_heads=true" in refused.log()
    run = Run(app, "baseline-mtp", "r", *sets, "model.new_heads=true").whole()
    assert "new heads: 1 to 3 begin as copies of the last layer of test-llama" in run.log()
    assert len(run.losses()) == 2
    assert json.loads((run.folder / "final/config.json").read_text())["n_future_tokens"] == 4


# ---- what goes wrong on the way ----------------------------------------------------------------------------------


SHORT = ("train.max_steps=6", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")


def test_a_step_that_is_not_finite_is_left_out_and_counted(app: Path) -> None:
    plain = Run(app, "rho1-wmtp", "plain", *SHORT).whole()
    run = Run(app, "rho1-wmtp", "r", *SHORT, plant=plants.not_finite_in_steps_2_and_5).whole()
    assert "step 2 is left out: " in run.log() and "step 5 is left out: " in run.log()
    records = run.records()
    assert [r["not_finite"] for r in records] == [0, 1, 1, 1, 2, 2] and records[1]["grad_norm"] is None
    # Step 3 stands where step 2 stood: nothing of it was taken in.
    ours, theirs = run.losses(), plain.losses()
    assert ours[1] == theirs[1] and ours[2] == theirs[2] and ours[3] != theirs[3]
    assert not (run.folder / "step-2").exists() and (run.folder / "step-4").exists()
    assert json.loads((app / "r.json").read_text())["not_finite"] == 2


@pytest.mark.long
def test_a_run_that_gives_nothing_finite_any_more_ends_and_keeps_its_good_checkpoint(app: Path) -> None:
    kept = ("paths.checkpoints.save_interval=1", "paths.checkpoints.keep_last=1", "paths.checkpoints.save_final=false")
    sets = ("optim.warmup_ratio=0", *kept)
    allowed = ("--allow", "optim.lr", "--allow", "train.max_steps")
    good = Run(app, "baseline-mtp", "r", *sets, "train.max_steps=3").whole()
    run = Run(app, "baseline-mtp", "r", *sets, "train.max_steps=40", "optim.lr=1e30", arguments=allowed).start()
    assert run.wait() == 20
    ended = json.loads((app / "r-exit.json").read_text())
    assert ended["code"] == 20 and "10 steps in a row up to 14 were not finite" in ended["cause"]
    assert "the last checkpoint that a finite step followed: step 3" in ended["cause"]
    # Step 4 was finite, what it made was not: only what came after it shows that.
    assert {p.name for p in run.folder.glob("step-*")} == {"step-3", "step-4"}
    shutil.rmtree(run.folder / "step-4")
    assert len(Run(app, "baseline-mtp", "r", *sets, "train.max_steps=5", arguments=allowed).whole().losses()) == 5
    assert good.log().count("goes on after step 3") == 2


def test_the_exception_of_another_rank_is_the_cause(app: Path) -> None:
    run = Run(app, "baseline-mtp", "r", *SHORT, plant=plants.rank_1_raises_in_step_3).start()
    assert run.wait() == 20
    ended = json.loads((app / "r-exit.json").read_text())
    assert ended["cause"] == "rank 1: ArithmeticError: planted in rank 1" and ended["step"] == 2
    assert "planted in rank 1" in (app / "traceback-rank-1.log").read_text()
    assert (run.folder / "step-2/.complete").exists()


def test_a_rank_that_hangs_ends_the_run_with_a_record_of_all(app: Path) -> None:
    sets = (*SHORT, "paths.checkpoints.save_interval=6")
    run = Run(app, "baseline-mtp", "r", *sets, plant=plants.rank_1_hangs_in_step_4).start()
    assert run.wait() == 20
    ended = json.loads((app / "r-exit.json").read_text())
    # Rank 0 waits in the next step already.
    assert re.search(r"no sign of life for \d+ s in step [45]", ended["cause"]) and ended["code"] == 20
    # Where rank 1 ends before the later one of rank 0's own limit, what rank 0 leaves is the end of its connection.
    where = "".join(path.read_text() for path in app.glob("*-rank-0.log"))
    assert "in change" not in where and "in run" in where
    assert "in change" in (app / "flight-rank-1.log").read_text()


def test_a_changed_recipe_is_refused_on_resume_unless_it_is_allowed_by_name(app: Path) -> None:
    sets = ("train.max_steps=4", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")
    Run(app, "baseline-mtp", "r", *sets).whole()
    longer = ("train.max_steps=6", *sets[1:])
    refused = Run(app, "baseline-mtp", "r", *longer, "optim.lr=2e-3").start()
    assert refused.wait() == 2
    cause = json.loads((app / "r-exit.json").read_text())["cause"]
    assert "optim.lr: 0.001 -> 0.002" in cause and "train.max_steps: 4 -> 6" in cause and "step 4" in cause
    assert "reads" not in refused.log()  # before anything costly
    allowed = Run(app, "baseline-mtp", "r", *longer, arguments=("--allow", "train.max_steps")).whole()
    assert len(allowed.losses()) == 6 and "goes on changed, as allowed: train.max_steps: 4 -> 6" in allowed.log()


@pytest.mark.long
def test_stage_1_does_not_go_on_under_another_recipe_either(app: Path) -> None:
    sets = ("pretrain.max_steps=40", "paths.checkpoints.save_interval=2", "paths.checkpoints.save_final=false")
    run = Run(app, "critic-wmtp", "r", *sets)
    kill_when(run, lambda: (run.folder / "pretrain/step-2/.complete").exists())
    refused = Run(app, "critic-wmtp", "r", *sets, "critic.gamma=0.5").start()
    assert refused.wait() == 2
    cause = json.loads((app / "r-exit.json").read_text())["cause"]
    assert "critic.gamma: 1.0 -> 0.5" in cause and "pretrain" not in cause


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_missing_model_is_refused_before_anything_starts(app: Path) -> None:
    (app / "models/test-llama-mtp").unlink()
    run = Run(app, "baseline-mtp", "r", world=1).start()
    assert run.wait() == 2
    assert "test-llama-mtp is not there" in run.log() and "Traceback" not in run.log()
    assert json.loads((app / "r-exit.json").read_text())["code"] == 2


def test_a_base_of_another_vocabulary_is_refused(app: Path) -> None:
    run = Run(app, "baseline-mtp", "r", "model.vocab_size=64", world=1).start()
    assert run.wait() == 2
    assert "vocab_size 32000, its tokenizer has 32000 pieces, model.vocab_size is 64" in run.log()


def test_training_on_human_eval_is_refused(app: Path) -> None:
    (app / "he").mkdir()
    (app / "he/a.jsonl").write_text('{"task_id": "HumanEval/0", "prompt": "p", "canonical_solution": "c"}')
    run = Run(app, "baseline-mtp", "r", f"paths.datasets.wmtp_code=file://{app}/he", world=1).start()
    assert run.wait() == 2
    assert "wmtp_code: 1 records are HumanEval's" in run.log() and "Traceback" not in run.log()


# ---- small things ----------------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_to_almost_nothing() -> None:
    recipe = load_recipe(RECIPE, ["optim.warmup_ratio=0.1", "optim.scheduler=cosine"])
    rates = [learning_rate(s, 100, recipe) for s in range(1, 101)]
    assert rates[9] == 1 == max(rates)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01
