"""The loop: one gradient whatever the micro-batch, a resumed run that is the same run, faults that stay outside the weights, and the command line."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

import data
import demo as demos
import eval as evaluation
import policy as policies
import preflight
import rewards
import runs
import train
from data import UsageError
from policy import Policy

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model folder: a demo policy that has been taught a little, so that its rewards differ."""
    path = tmp_path_factory.mktemp("model")
    policy = demos.demo_policy(0)
    config = replace(train.Config(), **train.DEFAULTS["demo"])
    for _ in demos.warm_start(policy, data.load("demo", "train")[:200], config, clean_steps=40, diluted_steps=2):
        pass
    policy.model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    return str(path)


FAST = ["--steps", "6", "--prompts", "4", "--samples", "4", "--eval-limit", "12", "--eval-samples", "1", "--eval-every", "2", "--save-every", "1", "--warmup", "2"]


def run(model_dir, out, *flags):
    train.main(["--model", model_dir, "--out", str(out), *FAST, *flags])
    return out


def artefacts(out: Path) -> dict:
    newest = runs.newest_checkpoint(out)
    return {"weights": (newest / "policy.safetensors").read_bytes(), "optimizer": (newest / "optimizer.safetensors").read_bytes(),
            **{name: (out / name).read_text() for name in ("metrics.jsonl", "rollouts.jsonl", "eval.json")}}


@pytest.mark.parametrize("flags", [["--full", "--kl-coef", "0.02", "--updates", "2", "--minibatches", "2"], ["--no-full", "--lora", "4", "--algo", "dapo"]])
def test_a_resumed_run_is_the_same_run(model_dir, tmp_path, flags):
    whole = run(model_dir, tmp_path / "whole", *flags)
    half = run(model_dir, tmp_path / "half", *flags, "--steps", "3")
    rollouts = half / "rollouts.jsonl"
    rollouts.write_text(rollouts.read_text() + json.dumps({"step": 9, "text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    with (half / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "reward"')                                       # as a kill in the middle of a line would leave it
    train.main(["--resume", str(half), "--steps", "6"])
    assert artefacts(half) == artefacts(whole)
    assert [json.loads(line)["step"] for line in (half / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(model_dir, tmp_path, capsys):
    whole = run(model_dir, tmp_path / "run")
    expected = artefacts(whole)
    newest = whole / "checkpoints" / "000006" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    train.main(["--resume", str(whole)])
    assert "000006 is damaged" in capsys.readouterr().err and artefacts(whole) == expected


def test_eval_of_a_run_repeats_its_own_numbers(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--no-full")
    evaluation.main([str(out), "--limit", "12", "--samples", "1", "--json", str(tmp_path / "e.json"), "--answers", str(tmp_path / "a.jsonl")])
    result, recorded = json.loads((tmp_path / "e.json").read_text()), json.loads((out / "eval.json").read_text())["after"]
    assert {name: result[name] for name in recorded} == recorded and recorded["n"] == 12
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and sum(row["correct"] for row in rows if row["greedy"]) / 12 == result["accuracy"]


def test_a_model_beside_a_run_is_evaluated_as_before_training(model_dir, tmp_path, capsys):
    """The tokenizer has a chat template, so alone the model would be asked by that."""
    settings = ["--template", "plain", "--max-new", "9", "--reward", "acc-format", "--steps", "1",
                "--eval-samples", "0"]
    out = run(model_dir, tmp_path / "run", *settings)
    other = run(model_dir, tmp_path / "other", *settings, "--max-new", "7")
    before = json.loads((out / "eval.json").read_text())["before"]

    def evaluated(*arguments):
        written = tmp_path / "e.json"
        evaluation.main([*map(str, arguments), "--limit", "12", "--json", str(written)])
        results = json.loads(written.read_text())["results"]
        return {result["model"]: result for result in results}, capsys.readouterr()
    for models in ((model_dir, out, other), (out, model_dir)):
        results, shown = evaluated(*models)
        base = results[model_dir]
        assert {name: base[name] for name in before} == before
        assert (base["dataset"], base["template"], base["stop_answer"], base["max_new"]) == \
            ("demo", "plain", True, 9)
        assert shown.out.count("| plain, at </answer>, 9 |") == 2
        assert f"{model_dir} is evaluated with the settings of {out}" in shown.err
    _, shown = evaluated(out, model_dir, "--max-new", "5", "--template", "chat")
    assert shown.out.count("| chat, at the end token, 5 |") == 2


def test_batching_changes_no_evaluation(model_dir):
    policy = policies.Policy.load(model_dir, lora=0)
    config, items = replace(train.Config(), **train.DEFAULTS["demo"]), data.load("demo", "test")[:20]
    texts = [[r.text for r in evaluation.answer(policy, items, config, n=2, temperature=1.0, rows=rows)] for rows in (2, 7, 100)]
    assert texts[0] == texts[1] == texts[2]


# --------------------------------------------------------------------------------------------------- update
def rollouts_for(policy, config):
    rollouts, _ = train.collect(policy, data.load("demo", "train"), config, 0)
    for i, r in enumerate(rollouts):
        r.reward = float(i % 3 == 0) - .1 * (i % 5)                            # any rewards that differ within groups
    train.set_advantages(rollouts, config)
    return rollouts


class Recorder:
    """An optimiser that only keeps the gradients it is shown."""
    def __init__(self, policy):
        self.policy, self.seen = policy, []

    def step(self):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.policy.trainable().values()]).clone())

    def zero_grad(self, set_to_none=True):
        for p in self.policy.trainable().values():
            p.grad = None


CONFIG = replace(train.Config(), **train.DEFAULTS["demo"] | dict(prompts=4, samples=4, max_grad_norm=1e9))


@pytest.mark.parametrize("algo", [algo for algo in train.ALGOS if algo != "sft"])
def test_micro_batches_and_order_cannot_change_the_gradient(algo, model_dir):
    config = replace(CONFIG, **train.ALGOS[algo] | dict(dynamic=False, minibatches=1))
    policy = policies.Policy.load(model_dir, lora=0, keep_reference=True, critic="head" if algo == "ppo" else "")
    rollouts = rollouts_for(policy, config)
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    gradients, metrics = [], []
    for micro, order in ((0, range(16)), (1, range(16)), (2, range(16)), (3, range(16)), (0, [*range(8, 16), *range(7, -1, -1)])):
        recorder = Recorder(policy)
        metrics.append(train.update(policy, recorder, [rollouts[i] for i in order], replace(config, micro_batch=micro), 0))
        gradients += recorder.seen
    assert gradients[0].norm() > 0
    for gradient, values in zip(gradients[1:], metrics[1:]):
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-6
        assert values == pytest.approx(metrics[0], abs=1e-5)


@pytest.mark.parametrize("weights", ["sequence", "token", "constant"])
def test_a_metric_of_ones_own_is_the_same_for_every_micro_batch(weights, model_dir, monkeypatch):
    """The mean and the largest token id of the completions, against the same by hand."""
    config = replace(CONFIG, weights=weights)
    policy = policies.Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, config)
    ids = [rollout.completion_ids for rollout in rollouts]
    assert len({len(row) for row in ids}) > 1
    if weights == "sequence":
        expected = sum(sum(row) / len(row) for row in ids) / len(ids)
    else:
        expected = sum(map(sum, ids)) / sum(map(len, ids))
    real = train.loss_of

    def with_tokens(policy, batch, fixed, weights, config, step):
        loss, stats = real(policy, batch, fixed, weights, config, step)
        tokens, mask = batch.completion_ids.flatten(0, 1), batch.mask.flatten(0, 1)
        stats.mean("mean_token", tokens, weights[:, None] * mask)
        stats.max("token", tokens[mask])
        return loss, stats

    monkeypatch.setattr(train, "loss_of", with_tokens)
    for micro_batch in (1, 2, 4):
        some = replace(config, micro_batch=micro_batch)
        metrics = train.update(policy, Recorder(policy), rollouts, some, 0)
        assert metrics["mean_token"] == pytest.approx(expected, rel=1e-6)
        assert metrics["token"] == max(map(max, ids))


@pytest.mark.parametrize("value", [1.0, torch.tensor(1.0)])
def test_a_metric_that_does_not_say_how_it_merges_is_refused(value, model_dir, monkeypatch):
    policy = policies.Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    real = train.loss_of

    def by_hand(*args):
        loss, stats = real(*args)
        stats["mean_logp"] = value
        return loss, stats

    monkeypatch.setattr(train, "loss_of", by_hand)
    with pytest.raises(TypeError, match="stats.mean"):
        train.update(policy, Recorder(policy), rollouts, CONFIG, 0)


def test_temperature_holds_for_sampler_scorer_and_reference(model_dir):
    """At 0.5 as at 1, log-probs of sampling are those of every later pass over the same weights."""
    config = replace(CONFIG, temperature=.5, kl_coef=.1, minibatches=2)
    policy = policies.Policy.load(model_dir, lora=0, keep_reference=True)
    rollouts = rollouts_for(policy, config)
    batch = policies.collate(rollouts)
    sampled = torch.tensor([x for r in rollouts for x in r.sample_logps])
    logps, _ = train.scored(policy, batch, config)
    torch.testing.assert_close(logps[batch.mask], sampled, rtol=0, atol=1e-4)
    at_one = policy.score(batch).logps[batch.mask]
    assert (at_one - sampled).abs().max() > .1                               # or nothing would show
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    metrics = train.update(policy, optimizer, rollouts, config, 0)
    assert metrics["max_sampler_gap"] < 1e-4
    assert metrics["max_ratio"] == pytest.approx(1, abs=1e-4)
    assert abs(metrics["kl"]) < 1e-6
    train.look_closer(policy, rollouts, config)
    assert {ratio for r in rollouts for ratio in r.closer["ratio"]} == {1.0}


class Mover(Recorder):
    """Plain gradient descent that keeps the gradients it has followed."""
    def step(self):
        super().step()
        with torch.no_grad():
            for p in self.policy.trainable().values():
                p.sub_(.5 * p.grad)


@pytest.mark.parametrize("algo", ["gspo", "dapo"])
def test_ratio_and_clip_act_with_the_rows_of_gspo_and_dapo(algo, model_dir):
    """On the first optimiser step of a rollout every ratio is 1: only a later one can differ."""
    row = train.ALGOS[algo] | dict(dynamic=False)                             # every group is kept
    unclipped = row | dict(ratio="token", clip_low=.999, clip_high=1e9)
    gradients = []
    for settings in (row, unclipped):
        config = replace(CONFIG, **settings)
        policy = policies.Policy.load(model_dir, lora=0)
        mover = Mover(policy)
        train.update(policy, mover, rollouts_for(policy, config), config, 0)
        gradients.append(mover.seen)
    assert [len(steps) for steps in gradients] == [4, 4]
    far = [float((a - b).norm() / b.norm()) for a, b in zip(*gradients)]
    assert far[0] < 1e-5 and max(far[1:]) > .01


def test_kl_is_positive_away_from_the_reference_and_the_update_reduces_it(model_dir):
    policy = policies.Policy.load(model_dir, lora=0, keep_reference=True)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(torch.randn(policy.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * .05)
    config = replace(CONFIG, kl_coef=1.0, kl="k2", prompts=8, max_grad_norm=1.0)
    rollouts, _ = train.collect(policy, data.load("demo", "train"), config, 0)                   # advantages stay 0: only the KL acts
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=.02)
    kls = [train.update(policy, optimizer, rollouts, config, 0)["kl"] for _ in range(5)]
    assert 0 < kls[-1] < kls[0]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(model_dir, capsys):
    policy = policies.Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    rollouts[3].advantage = float("nan")
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    train.update(policy, torch.optim.AdamW(policy.trainable().values(), lr=.1), rollouts, CONFIG, 41)
    assert all(torch.equal(before[name], p) for name, p in policy.trainable().items())
    assert "step 42" in capsys.readouterr().err


def test_gradients_are_clipped_and_logged_before(model_dir):
    policy = policies.Policy.load(model_dir, lora=0)
    recorder = Recorder(policy)
    metrics = train.update(policy, recorder, rollouts_for(policy, CONFIG), replace(CONFIG, max_grad_norm=1e-3), 0)
    assert float(recorder.seen[0].norm()) == pytest.approx(1e-3, rel=1e-3) and metrics["policy_grad_norm"] > 1e-2


def rates(**settings) -> list[float]:
    config = train.Config(**settings)
    return [train.learning_rate(step, config, 1.0) for step in range(config.steps)]


def test_the_learning_rate_by_hand():
    assert rates(steps=4, warmup=2) == [.5, 1, 1, 1]
    assert rates(steps=2, warmup=0) == [1, 1]
    assert rates(steps=100, warmup=.03)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    # .1 + .9 (1 + cos(pi k / 4)) / 2 for k = 1, 2, 3, 4
    falls = [.1 + .45 * (1 + .5 ** .5), .55, .1 + .45 * (1 - .5 ** .5), .1]
    assert rates(steps=6, warmup=2, schedule="cosine") == pytest.approx([.5, 1, *falls])


@pytest.mark.parametrize("steps, warmup", [(100, 3), (10, 0), (7, 7)])
def test_the_cosine_is_transformers(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=.1)
    theirs = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()  # its first step would be at 0
        theirs += scheduler.get_last_lr()
    assert rates(steps=steps, warmup=warmup, schedule="cosine") == pytest.approx(theirs)


def test_the_recipe_warms_up_over_3_percent_of_its_steps_then_falls_to_a_tenth():
    config = train.make_config({"recipe": "med-rlvr", "steps": 200})
    found = [train.learning_rate(step, config, config.lr) for step in (0, 5, 199)]
    assert found == pytest.approx([1e-5 / 6, 1e-5, 1e-6])


def test_the_rate_in_use_is_logged_and_a_falling_one_keeps_its_steps(model_dir, tmp_path):
    flags = ["--lr", "0.01", "--warmup", "0", "--schedule", "cosine", "--steps", "4"]
    out = run(model_dir, tmp_path / "run", *flags)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    falls = [.1 + .45 * (1 + .5 ** .5), .55, .1 + .45 * (1 - .5 ** .5), .1]   # as above
    assert [json.loads(line)["lr"] for line in lines] == pytest.approx([.01 * x for x in falls])
    with pytest.raises(UsageError, match="--steps 4 .--schedule cosine") as error:
        train.main(["--resume", str(out), "--steps", "6"])
    assert "\n" not in str(error.value)
    train.main(["--resume", str(out), "--steps", "4"])  # the same number is no change
    share = run(model_dir, tmp_path / "share", "--warmup", "0.5", "--steps", "2")
    with pytest.raises(UsageError, match="--steps 2 .*--warmup 0.5"):
        train.main(["--resume", str(share), "--steps", "3"])


def test_dapo_drops_equal_groups_refills_and_counts(model_dir, capsys):
    policy = policies.Policy.load(model_dir, lora=0)
    config = replace(CONFIG, dynamic=True, refills=2, prompts=6)
    rollouts, counts = train.collect(policy, data.load("demo", "train"), config, 0)
    groups = [rollouts[i:i + 4] for i in range(0, len(rollouts), 4)]
    assert all(len({r.correct for r in g}) == 2 and len({r.group for r in g}) == 1 for g in groups)
    assert [g[0].group for g in groups] == list(range(len(groups))) and counts["groups_unfilled"] == 6 - len(groups)
    assert counts["groups_dropped"] >= 6 - len(groups)
    none, counts = train.collect(policy, [replace(data.load("demo", "train")[0], answer="")], replace(config, prompts=2), 0)      # never right
    assert none == [] and counts == {"groups_dropped": 6, "groups_unfilled": 2} and "skipped" in capsys.readouterr().err


def test_same_seed_same_first_samples(model_dir):
    texts = [[r.completion_ids for r in train.collect(policies.Policy.load(model_dir, lora=4), data.load("demo", "train"), CONFIG, 5)[0]] for _ in range(2)]
    assert texts[0] == texts[1]
    other = [r.completion_ids for r in train.collect(policies.Policy.load(model_dir, lora=4), data.load("demo", "train"), CONFIG, 6)[0]]
    assert other != texts[0]


# --------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("flags, words", [
    (["--setps", "3"], "--steps"), (["--samples", "1"], "group of 1"), (["--top-p", "0.9"], "--top-p"), (["--algo", "gpro"], "choose from"),
    (["--dataset", "nothing"], "demo, demo-images, medqa"), (["--temperature", "0"], "above 0"), (["--w-format", "2"], "--w-format"),
    (["--device", "cuda"], "cuda"), (["--lora", "0", "--no-full"], "--full"), (["--device", "gpu"], "--device gpu"), (["--model", "./no/such"], "no such folder"), (["--lr", "nan"], "--lr"),
    (["--micro-batch", "-1"], "--micro-batch"), (["--algo", "ppo", "--kl", "k3"], "k1"), (["--init", "nowhere"], "--init nowhere"), (["--steps", "x"], "invalid int"), (["--resume", "/nowhere"], "run.json"),
    (["--target", "RBC"], "--dataset bccd-rbc"), (["--balanced"], "--balanced is gone"), (["--dataset", "retinamnist-99"], "retinamnist-28"), (["--task", "grade"], "only for choice"),
    (["--max-prompt", "5"], "--max-prompt 5")])
def test_mistakes_get_one_line(flags, words, tmp_path, model_dir):
    if "--max-prompt" in flags:
        flags = flags + ["--model", model_dir]
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError) as error:
        train.main([*flags] if "--resume" in flags else [*flags, "--out", str(tmp_path / "run")])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_exit_code_2_and_no_traceback(tmp_path):
    for script, flags in (("train.py", ["--samples", "1"]), ("eval.py", [str(tmp_path), "--dataset", "demo"])):
        done = subprocess.run([sys.executable, ROOT / script, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten_and_a_resume_changes_nothing_else(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--steps", "1")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="--resume"):
        run(model_dir, out)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    for flags, words in ((["--model", str(other)], "--model"), (["--lr", "0.5"], "--lr"), (["--recipe", "med-rlvr"], "--recipe")):
        with pytest.raises(UsageError, match=words):
            train.main(["--resume", str(out), *flags])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_with_other_data_is_refused(model_dir, tmp_path):
    rows = [{"question": f"a man has crackles . which diagnosis ? {i}", "options": ["gout", "asthma"], "answer": "A"} for i in range(60)]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(model_dir, tmp_path / "run", "--dataset", str(mine), "--steps", "1")
    mine.write_text("".join(json.dumps(row | {"answer": "B"}) + "\n" for row in rows))
    with pytest.raises(UsageError, match="data set"):
        train.main(["--resume", str(out)])


def test_flags_beat_defaults_and_defaults_beat_the_algorithm():
    config = train.make_config({"dataset": "medqa", "algo": "dapo", "clip_high": .3})
    assert (config.clip_high, config.dynamic, config.weights, config.template) == (.3, True, "token", "plain")
    assert train.make_config({"algo": "grpo", "dataset": "demo"}).kl_coef == 0 and train.make_config({"algo": "grpo", "dataset": "medqa"}).kl_coef == .04
    assert train.Config().reward == "med-rlvr"
    assert train.make_config({"algo": "dapo", "dataset": "medqa"}).minibatches == 4
    assert train.make_config({"algo": "dapo", "dataset": "demo"}).minibatches == 1


def test_a_path_does_not_take_a_data_sets_settings_by_its_name():
    assert not train.make_config({"dataset": "demo-mine/train.jsonl"}).full and train.make_config({"dataset": "bccd-mine.jsonl"}).model == ""
    assert train.make_config({"dataset": "retinamnist-28"}).model == train.make_config({"dataset": "retinamnist"}).model != ""


def test_the_threshold_rises_when_it_is_mastered_and_a_resumed_run_has_it_too():
    """By hand: 3 steps of 12 groups are 30 groups; mastered, .3 rises by .15 and .15, then by .10; spread, too few or too small boxes hold it."""
    config = train.Config(prompts=12, box_reward="tighten", tau=.3)
    good = {"part_box": .9, "box_spread": .1, "part_iou": .9}
    levels = [train.tightened([good] * n, .3, config) for n in range(12)]
    assert levels == pytest.approx([.3, .3, .3, .45, .45, .6, .6, .7, .7, .8, .8, .8]) and levels[5] == train.tightened([good] * 5, .3, config)
    for bad in ({"part_box": .7}, {"box_spread": .3}, {"part_iou": .35}):
        assert train.tightened([good | bad] * 12, .3, config) == .3


@pytest.mark.parametrize("flags, words", [(["--fuzzy", "0.5,1"], "fuzzy"), (["--recite", "-0.5"], "knowledge"), (["--knowledge", "class", "--recite", "2"], "--recite"), (["--w-format", "1.5"], "--w-format"),
                                          (["--box-reward", "tighten", "--tau", "0.9"], "--tau"), (["--knowledge-file", "k.md"], "--knowledge"), (["--shots", "-1"], "--shots"), (["--dataset", "chestmnist"], "multi-label")])
def test_weights_and_tables_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(UsageError, match=words):
        train.main(flags)


def test_medqa_offline_says_both_ways_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(data, "online", lambda: False)
    with pytest.raises(UsageError) as error:
        train.main(["--dataset", "medqa", "--out", str(tmp_path / "run")])
    assert "--model DIR" in str(error.value) and "--data-dir DIR" in str(error.value)


def test_a_large_model_without_a_gpu_is_refused_before_anything_is_fetched(monkeypatch, tmp_path, medqa_dir):
    """Only the config is read: of a folder with the shape of Qwen2.5-3B and no weights."""
    from transformers import Qwen2Config
    Qwen2Config(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--dataset", "medqa", "--model", str(tmp_path / "m"), "--data-dir", medqa_dir, "--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="3.1 billion.*--device cpu"):
        train.main(flags)
    with pytest.raises(UsageError, match="cannot load"):                      # allowed on demand: then the weights are what is missing
        train.main([*flags, "--device", "cpu"])


def test_importing_has_no_side_effect(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data, rewards, policy, grpo, train, eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_the_demo_learns(algo, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--algo", algo, "--out", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["before"]["sampled_accuracy"] <= .35 and result["after"]["sampled_accuracy"] >= .85 and result["after"]["accuracy"] >= .90
    assert result["after"]["n"] >= 200 and done.stdout.count("\n") == 1 and str(tmp_path / "run") in done.stdout


# ------------------------------------------------------------------------------------------- preflight
def with_settings(**changes):
    return replace(CONFIG, **changes)


def test_running_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(model_dir, capsys, monkeypatch):
    """torch says so in the middle of an update; what the failed try left in .grad must not count."""
    config = with_settings(samples=2, prompts=4, kl_coef=.04, micro_batch=4)
    policy = Policy.load(model_dir, lora=4, seed=0)
    rollouts = rollouts_for(policy, config)
    weights = {name: p.detach().clone() for name, p in policy.trainable().items()}
    after, score = [], Policy.score
    for limit in (99, 2):
        policy.load_trainable(weights)
        calls = []
        def limited(self, batch, *args, **kwargs):
            calls.append(len(batch.mask))
            if len(batch.mask) > limit:
                raise torch.OutOfMemoryError("no more")
            scores = score(self, batch, *args, **kwargs)
            if torch.is_grad_enabled() and limit == len(batch.mask) == 2 and calls.count(2) == 4:          # the second micro-batch fails too, after the first has left its gradient
                raise torch.OutOfMemoryError("no more")
            return scores
        monkeypatch.setattr(Policy, "score", limited)
        mine = replace(config)
        train.update(policy, train.make_optimizer(policy, mine), rollouts, mine, 0)
        after.append({name: p.detach().clone() for name, p in policy.trainable().items()})
    assert mine.micro_batch == 1 and "out of memory" in capsys.readouterr().err
    assert all(torch.allclose(after[0][name], after[1][name], atol=1e-6) for name in weights)
    with pytest.raises(UsageError, match="one prompt"):
        preflight.smaller(mine, "micro_batch", "step 1")


def test_sampling_with_less_memory_samples_the_same(model_dir, monkeypatch):
    policy, config, items = Policy.load(model_dir, lora=0), with_settings(samples=2, prompts=6, sample_rows=12), data.load("demo", "train")[:8]
    expected, _ = train.collect(policy, items, replace(config), 0)
    sample = Policy.sample
    def limited(self, part, *args, **kwargs):
        if len(part) > 2:
            raise torch.OutOfMemoryError("no more")
        return sample(self, part, *args, **kwargs)
    monkeypatch.setattr(Policy, "sample", limited)
    found, _ = train.collect(policy, items, config, 0)
    assert config.sample_rows == 3 and [r.completion_ids for r in found] == [r.completion_ids for r in expected]


def test_sizes_are_halved_until_they_fit():
    shape = SimpleNamespace(num_hidden_layers=36, hidden_size=2048, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008, vocab_size=151936)
    config = train.Config(prompts=16, samples=8, max_new=1024)
    roomy, chunk, parts = preflight.fit(config, shape, 3_100_000_000, 30_000_000, 350, False, 1e12)
    assert (roomy.micro_batch, roomy.sample_rows, chunk) == (16, 256, 512)
    tight, chunk, parts = preflight.fit(config, shape, 3_100_000_000, 30_000_000, 350, False, 24e9)
    assert tight.micro_batch < 16 and preflight.peak(parts) <= .9 * 24e9
    hopeless, chunk, parts = preflight.fit(config, shape, 3_100_000_000, 30_000_000, 350, False, 1e9)
    assert (hopeless.micro_batch, chunk) == (1, 64) and hopeless.sample_rows < 128


def test_the_arithmetic_is_near_the_truth(model_dir):
    """Weights, gradients and moments to the byte."""
    policy = Policy.load(model_dir, lora=0)
    config = with_settings(samples=2, prompts=2)
    total = sum(p.numel() for p in policy.model.parameters())
    parts = preflight.memory(config, policy.model.config, total, total, 20, fp32=True)
    optimizer = train.make_optimizer(policy, config)
    train.update(policy, optimizer, rollouts_for(policy, config), config, 0)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == (sum(p.nbytes for p in policy.model.parameters()), 4 * total, moments)


def test_the_bf16_reference_is_counted(model_dir, bf16_products):
    """Weights in fp32, their casts in bf16, and the copy, whose embedding stays fp32."""
    policy = Policy.load(model_dir, lora=0, keep_reference=True)
    config = with_settings(full=True, kl_coef=.1)
    total = sum(p.numel() for p in policy.model.parameters())
    parts = preflight.memory(config, policy.model.config, total, total, 20, fp32=False)
    copy = sum(p.nbytes for p in policy.frozen.parameters())
    assert parts["weights"] == pytest.approx(6 * total + copy, rel=.01)  # but for norms


def test_dry_run_writes_nothing(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", model_dir, *FAST, "--dry-run"])
    shown = capsys.readouterr()
    assert "dry run" in shown.out and "activations" in shown.err and "longest batch went through" in shown.err and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on_as_if_nothing_had_been(number, model_dir, tmp_path, monkeypatch, capsys):
    whole, handler = run(model_dir, tmp_path / "whole", "--save-every", "4"), signal.getsignal(number)
    write = runs.Log.write
    def interrupted(self, metrics, *args):
        if metrics["step"] == 3:
            os.kill(os.getpid(), number)
        return write(self, metrics, *args)
    with monkeypatch.context() as patched:
        patched.setattr(runs.Log, "write", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(model_dir, tmp_path / "half", "--save-every", "4")
    assert stopped.value.code == 128 + number and f"--resume {tmp_path / 'half'}" in capsys.readouterr().err
    assert runs.newest_checkpoint(tmp_path / "half").name == "000003" and signal.getsignal(number) == handler
    train.main(["--resume", str(tmp_path / "half")])
    assert artefacts(tmp_path / "half") == artefacts(whole)


def test_a_full_disk_leaves_what_was_there_and_says_how_much_was_missing(model_dir, tmp_path, monkeypatch):
    whole, half, save = run(model_dir, tmp_path / "whole"), tmp_path / "half", runs.save_file
    def full(tensors, path):
        save(tensors, path)
        if Path(path).parent.parent.joinpath("000002").exists():
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_file", full)
        with pytest.raises(UsageError, match=r"No space left on device.*takes [\d.]+ MB, and [\d.,]+ MB are free.*--resume"):
            run(model_dir, half)
    assert runs.newest_checkpoint(half).name == "000002" and not (half / "checkpoints" / ".tmp").exists()
    train.main(["--resume", str(half)])
    assert artefacts(half) == artefacts(whole)


def test_a_folder_that_vanishes_is_said(model_dir, tmp_path, monkeypatch):
    out, save = tmp_path / "run", runs.save_file
    def gone(tensors, path):
        shutil.rmtree(out, ignore_errors=True)
        save(tensors, path)
    monkeypatch.setattr(runs, "save_file", gone)
    with pytest.raises(UsageError, match="the folder is gone"):
        run(model_dir, out)


def test_steps_that_are_never_finite_end_the_run_with_a_checkpoint(model_dir, tmp_path, monkeypatch, capsys):
    real = train.loss_of
    def broken(*args):
        loss, stats = real(*args)
        stats.sum("loss", float("nan"))
        return loss * float("nan"), stats
    monkeypatch.setattr(train, "loss_of", broken)
    with pytest.raises(UsageError, match="5 steps in a row"):
        run(model_dir, tmp_path / "run", "--save-every", "0")
    assert runs.newest_checkpoint(tmp_path / "run").name == "000005" and "step 1:" in capsys.readouterr().err


def test_the_row_whose_log_probs_are_not_finite_is_named(model_dir, capsys):
    policy = Policy.load(model_dir, lora=0)
    rollouts = rollouts_for(policy, CONFIG)
    score = policy.score
    def spoilt(batch, *args, **kwargs):
        scores = score(batch, *args, **kwargs)
        if len(batch.mask) == 4:
            scores.logps[2, 1] = float("inf")
        return scores
    policy.score = spoilt
    train.update(policy, train.make_optimizer(policy, CONFIG), rollouts, CONFIG, 0)
    assert "[9]" in capsys.readouterr().err                                   # group 2, sample 1, of groups of 4


def test_troubles_by_hand():
    fine = {"reward": .5, "groups_equal": .5, "part_truncated": 0}
    assert train.troubles([fine] * 5) == [] and train.troubles([fine | {"groups_equal": 1}] * 4) == []
    assert "always 0.50" in train.troubles([fine | {"groups_equal": 1}] * 5)[0] and "--max-new" in train.troubles([fine | {"part_truncated": 1}] * 10)[0]
    assert "always" not in train.troubles([fine | {"groups_equal": 1, "reward": i / 9} for i in range(5)])[0]
    (none,) = train.troubles([fine | {"reward": -1, "groups_equal": 1}] * 5)
    assert "--algo sft" in none and "--init" in none and "the form" in none


def test_the_advice_for_no_reward_leads_to_reward(monkeypatch):
    """SFT on questions without rationales, such as MedQA's: a random model that earned -1 on every
    sample then writes the form, and is right now and then."""
    questions = [replace(item, rationale="") for item in data.load("demo", "train")[:100]]
    words = dict.fromkeys([*demos.demo_words(), *data.completion(questions[0]).split()])
    monkeypatch.setattr(demos, "demo_words", lambda: list(words))
    torch.set_num_threads(1)
    policy = demos.demo_policy(0)
    config = replace(CONFIG, prompts=8, samples=8, max_new=16)
    sft = replace(config, **train.ALGOS["sft"] | dict(algo="sft", prompts=16, lr=5e-3))

    def sampled():
        rollouts, _ = train.collect(policy, questions, config, 0)
        return [rollout.reward for rollout in rollouts]

    assert set(sampled()) == {-1}
    optimizer = train.make_optimizer(policy, sft)
    for step in range(30):
        taught, _ = train.demonstrations(policy, questions, sft, step)
        assert {rollout.reward for rollout in taught} == {1}
        train.update(policy, optimizer, taught, sft, step)
    rewards = sampled()
    assert rewards.count(-1) < len(rewards) / 2 and {0, 1} <= set(rewards)


def test_equal_rewards_are_no_trouble_while_demonstrations_are_taught(model_dir, tmp_path, capsys):
    run(model_dir, tmp_path / "sft", "--algo", "sft", "--samples", "1", "--steps", "5")
    assert "nothing is learned" not in capsys.readouterr().err


def test_the_best_checkpoint_by_dev_is_kept_apart(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--keep", "1")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    dev = {m["step"]: m["dev_accuracy"] for m in metrics if "dev_accuracy" in m}
    best = out / "checkpoints" / "best"
    assert json.loads((best / "state.json").read_text())["step"] == min(dev, key=lambda step: (-dev[step], step))
    assert len(list((out / "checkpoints").iterdir())) == 2
    policy, config = runs.open_policy(str(best), "cpu")
    assert torch.equal(policy.trainable()["lm_head.weight"], safetensors.torch.load_file(best / "policy.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("flags", [["--no-full", "--lora", "4", "--lr", "0.05"], ["--full"]])
def test_an_export_is_a_plain_model_that_writes_the_same(flags, model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", *flags, "--steps", "3")
    before = artefacts(out)
    train.main(["--resume", str(out), "--export", str(tmp_path / "export")])
    assert artefacts(out) == before
    policy, _ = runs.open_policy(str(out), "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = policies.load_tokenizer(str(tmp_path / "export"))
    for rollout in policy.sample(data.load("demo", "test")[:4], 1, 8, 0.0, 0):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": data.messages(rollout.item)[1]["content"]}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
        assert ids[0].tolist() == rollout.prompt_ids
        assert model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:].tolist()[:len(rollout.completion_ids)] == rollout.completion_ids
    assert "trained by grpo" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(UsageError, match="exists"):
        train.main(["--resume", str(out), "--export", str(tmp_path / "export")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=f"export.*{tmp_path / 'file'}.*--resume {out}$"):                 # its own run is named, not the export's folder
        train.main(["--resume", str(out), "--export", str(tmp_path / "file" / "export")])


def test_a_resumed_run_on_another_number_of_threads_says_so_and_goes_on(model_dir, tmp_path, capsys):
    out = run(model_dir, tmp_path / "run", "--steps", "1")
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(facts | {"machine": facts["machine"] | {"threads": 99}}))
    train.main(["--resume", str(out), "--steps", "2"])
    assert "no longer bit for bit" in capsys.readouterr().err and len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_fewer_steps_than_are_done_are_refused(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--steps", "3")
    with pytest.raises(UsageError, match="stands at step 3"):
        train.main(["--resume", str(out), "--steps", "2"])
    assert json.loads((out / "run.json").read_text())["config"]["steps"] == 3
    with pytest.raises(UsageError, match="exists"):
        train.main(["--out", str(out), "--dry-run"])
    with pytest.raises(UsageError, match="neither a run folder"):
        evaluation.main([str(tmp_path)])
    with pytest.raises(UsageError, match="no data set named 'nope.jsonl'"):
        train.main(["--dataset", "nope.jsonl"])


def test_a_logged_rollout_says_what_became_of_each_token(model_dir, tmp_path):
    """entropy and pi / pi_sampled after the update: 1 where nothing was learned, and elsewhere further from 1 the more was."""
    still, moved = (run(model_dir, tmp_path / name, "--steps", "2", "--lr", rate, "--warmup", "0") for name, rate in (("still", "1e-9"), ("moved", "1e-2")))
    far = {}
    for out in (still, moved):
        rows = [json.loads(line) for line in (out / "rollouts.jsonl").open(encoding="utf-8")]
        assert len(rows) == 8 and all(len(r["pieces"]) == len(r["entropy"]) == len(r["ratio"]) == r["tokens"] for r in rows)
        assert all(r["stage"] in rewards.STAGES and min(r["entropy"]) >= 0 for r in rows)
        far[out] = max(abs(x - 1) for r in rows for x in r["ratio"])
        assert "Completions" in (out / "report.html").read_text(encoding="utf-8")
    assert far[still] < .005 < .05 < far[moved]
