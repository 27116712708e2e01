"""What a run takes, the sizes that fit, the rehearsal, and the way on where memory runs out."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import refused
from safetensors.torch import load_file
from transformers import Qwen2Config

import data
import eval as evaluation
import train
from benchmarks import one_step
from policy import Policy, collate
from support import demo_model as demos
from support import distributed, errors, hub, loading, memory, runs
from support.errors import UsageError

CONFIG = replace(train.Config(), **data.LOADERS["demo"].defaults)
# A random model is wrong everywhere: what its rewards differ in is whether a completion ends.
FLAGS = (
    "--template plain --steps 3 --prompts 4 --samples 4 --max-new 8 --w-overlong 1 --warmup 1 "
    "--eval-limit 4 --eval-samples 0 --eval-every 2 --log-groups 4"
).split()


@pytest.fixture(autouse=True)
def two_threads():
    """One: on a model this small two would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model; its logits are widened, or every token would be about equally likely."""
    policy = demos.demo_policy(0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    folder = tmp_path_factory.mktemp("model")
    policy.save_folder(folder)
    return str(folder)


def run(model_dir: str, out: Path, flags: str = "") -> Path:
    train.main(["--model", model_dir, "--out", str(out), *FLAGS, *flags.split()])
    return out


def sizes(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["sizes"]


def written(out: Path, *names: str) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in names}


# --------------------------------------------------------------------- where memory runs out
def out_of_memory_once(monkeypatch, step: int) -> list[int]:
    """torch says so in the second micro-batch of a step -> the steps of all micro-batches so far.

    The first one has left its gradient by then.
    """
    steps, real = [], train.loss_of

    def loss_of(*args):
        steps.append(args[-1])
        if steps.count(step) == 2 and steps[-1] == step:
            raise torch.OutOfMemoryError("no more")
        return real(*args)

    monkeypatch.setattr(train, "loss_of", loss_of)
    return steps


def test_a_run_that_ran_out_of_memory_is_the_run_with_the_smaller_micro_batch(
    model_dir, tmp_path, monkeypatch, capsys
):
    """From the beginning, since there is no checkpoint yet: then bit for bit."""
    expected = run(model_dir, tmp_path / "expected", "--micro-batch 1 --save-every 3")
    steps = out_of_memory_once(monkeypatch, 1)
    found = run(model_dir, tmp_path / "found", "--micro-batch 2 --save-every 3")
    assert steps == [0, 0, 1, 1] + [0] * 4 + [1] * 4 + [2] * 4
    files = [f"checkpoints/000003/{name}.safetensors" for name in ("policy", "optimizer")]
    files += ["metrics.jsonl", "rollouts.jsonl", "eval.json"]
    assert written(found, *files) == written(expected, *files)
    assert sizes(found) == sizes(expected)
    assert sizes(found)["micro_batch"] == 1
    rewards = [m["reward"] for m in map(json.loads, (found / "metrics.jsonl").open())]
    assert len(rewards) == 3 and len(set(rewards)) > 1
    assert "training: out of memory; from here on --micro-batch 1" in capsys.readouterr().err


def test_after_memory_ran_out_a_run_goes_on_from_its_checkpoint(model_dir, tmp_path, monkeypatch):
    expected = run(model_dir, tmp_path / "expected", "--micro-batch 2 --save-every 1")
    steps = out_of_memory_once(monkeypatch, 2)
    found = run(model_dir, tmp_path / "found", "--micro-batch 2 --save-every 1")
    assert steps == [0, 0, 1, 1, 2, 2] + [2] * 4
    assert written(found, "rollouts.jsonl") == written(expected, "rollouts.jsonl")
    name = "checkpoints/000003/policy.safetensors"
    begun, weights = load_file(Path(model_dir) / "model.safetensors"), load_file(found / name)
    for key, w in load_file(expected / name).items():
        torch.testing.assert_close(weights[key], w, rtol=0, atol=1e-6)
    assert max((weights[key] - w).abs().max() for key, w in begun.items()) > 1e-4
    state = json.loads((found / "checkpoints/000003/state.json").read_text())
    assert set(state) == {"step", "sha256", "own_sha256"}


def test_the_policy_that_ran_out_of_memory_is_gone_before_the_next_is_loaded(
    model_dir, tmp_path, monkeypatch
):
    """Otherwise two would have to fit, and the optimiser's moments of the first."""
    made, alive, real = [], [], runs.new_policy

    def new_policy(*args):
        alive.append(sum(model() is not None for model in made))
        policy = real(*args)
        made.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(runs, "new_policy", new_policy)
    out_of_memory_once(monkeypatch, 0)
    run(model_dir, tmp_path / "run", "--micro-batch 2 --steps 1")
    assert alive == [0, 0]


def test_out_of_memory_with_one_prompt_ends_the_run_in_a_line(model_dir, tmp_path, monkeypatch):
    """And --resume goes on with it, where there is more memory."""

    def never_enough(policy, batch, config, step, real=train.loss_of):
        if step == 1:
            raise torch.OutOfMemoryError("no more")
        return real(policy, batch, config, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_of", never_enough)
        with pytest.raises(UsageError, match="training: out of memory with one prompt at a time"):
            run(model_dir, tmp_path / "run", "--micro-batch 1 --save-every 1")
    train.main(["--resume", str(tmp_path / "run")])
    steps = [m["step"] for m in map(json.loads, (tmp_path / "run/metrics.jsonl").open())]
    assert steps == [1, 2, 3]


def full_above(monkeypatch, most: int, error: Exception) -> list[int]:
    """A GPU on which more rows than `most` do not fit -> the rows of each call so far."""
    real, rows = Policy.sample, []

    def sample(self, items, n, *args, **kwargs):
        rows.append(len(items) * n)
        if rows[-1] > most:
            raise error
        return real(self, items, n, *args, **kwargs)

    monkeypatch.setattr(Policy, "sample", sample)
    return rows


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_while_sampling_goes_on_with_fewer_rows(
    model_dir, tmp_path, monkeypatch, error, capsys
):
    """In training and evaluation alike, and the run is that of a larger GPU."""
    expected = run(model_dir, tmp_path / "expected")
    rows = full_above(monkeypatch, 8, error)
    found = run(model_dir, tmp_path / "found")
    assert rows == [4, 4, 16, 8, 8, 8, 8, 4, 8, 8, 4, 4]  # test and ood before and after
    assert "sampling: out of memory; from here on 8 rows at once" in capsys.readouterr().err
    names = [json.loads(line)["text"] for line in (expected / "rollouts.jsonl").open()]
    assert [json.loads(line)["text"] for line in (found / "rollouts.jsonl").open()] == names


def test_other_errors_are_not_taken_for_full_memory(model_dir, monkeypatch):
    policy = Policy.load(model_dir, lora=0, template="plain")
    full_above(monkeypatch, 1, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        evaluation.answer(policy, data.load("demo", "test")[:4], CONFIG)


def test_an_evaluation_loses_nothing_where_memory_runs_out(model_dir, monkeypatch):
    """Ten items, at most three rows at once: 10 fail, 5 fail, then two at a time."""
    items = data.load("demo", "test")[:10]
    policy = Policy.load(model_dir, lora=0, template="plain")
    expected = evaluation.answer(policy, items, CONFIG, temperature=1.0, seed=3)
    rows = full_above(monkeypatch, 3, torch.OutOfMemoryError("no more"))
    found = evaluation.answer(policy, items, CONFIG, temperature=1.0, seed=3)
    assert rows == [10, 5, 2, 2, 2, 2, 2]
    for name in ("completion_ids", "group", "text", "reward"):
        assert [getattr(r, name) for r in found] == [getattr(r, name) for r in expected]
    rows.clear()
    evaluation.answer(policy, items[:4], CONFIG)
    assert rows == [2, 2]  # what was learned stays


def test_one_prompt_that_does_not_fit_ends_in_a_line(model_dir, monkeypatch):
    policy = Policy.load(model_dir, lora=0, template="plain")
    full_above(monkeypatch, 1, torch.OutOfMemoryError("no more"))
    items = data.load("demo", "test")[:4]
    refused(
        lambda: evaluation.answer(policy, items, CONFIG, n=2, temperature=1.0),
        "out of memory with the completions of one prompt (2 at once)",
    )


def test_one_of_several_processes_cannot_go_back_alone(model_dir, tmp_path, monkeypatch):
    """The others wait in a collective call, which must not meet one of another step."""

    def no_more(*args):
        monkeypatch.setattr(distributed, "world", 2)
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", no_more)
        with pytest.raises(UsageError, match=r"--resume \S+ --micro-batch 2"):
            run(model_dir, tmp_path / "run", "--micro-batch 4")


def test_a_resumed_run_keeps_its_sizes_and_takes_a_smaller_micro_batch(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--steps 1 --micro-batch 2")
    content = json.loads((out / "run.json").read_text())
    content["sizes"] |= {"sample_rows": 4, "head_chunk": 64}
    (out / "run.json").write_text(json.dumps(content))
    train.main(["--resume", str(out), "--steps", "2"])
    assert sizes(out) == {"micro_batch": 2, "sample_rows": 4, "head_chunk": 64}
    train.main(["--resume", str(out), "--steps", "3", "--micro-batch", "1"])
    assert sizes(out)["micro_batch"] == 1


def test_half_of_a_micro_batch(capsys):
    config = replace(CONFIG, micro_batch=5)
    for left in (2, 1):
        config = memory.halved(config, "here")
        assert config.micro_batch == left
        assert f"here: out of memory; from here on --micro-batch {left}" in capsys.readouterr().err
    with pytest.raises(UsageError, match="here: out of memory with one prompt at a time"):
        memory.halved(config, "here")


def test_fewer_rows_at_once_sample_the_same(model_dir, monkeypatch):
    """Three completions a prompt; at most four rows are one prompt at a time."""
    policy = Policy.load(model_dir, lora=0, template="plain")
    config, items = replace(CONFIG, prompts=5, samples=3), data.load("demo", "train")[:8]
    real, parts, found = Policy.sample, [], []

    def sample(self, part, *args, **kwargs):
        parts.append(len(part))
        return real(self, part, *args, **kwargs)

    monkeypatch.setattr(Policy, "sample", sample)
    for rows in (Policy.sample_rows, 4):
        policy.sample_rows = rows
        rollouts = one_step.sampled_and_graded(policy, items, config)
        found.append([rollout.completion_ids for rollout in rollouts])
    assert parts == [5, 1, 1, 1, 1, 1]
    assert found[0] == found[1] and len(found[0]) == 15


# ------------------------------------------------------------------------------- what fits
MODEL_3B = memory.Model(
    SimpleNamespace(
        num_hidden_layers=36,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=2,
        intermediate_size=11008,
        vocab_size=151936,
    ),
    total=3_100_000_000,
    trained=30_000_000,
    fp32=False,
)


def test_sizes_are_halved_until_they_fit():
    config = train.Config(prompts=16, samples=8, max_new=1024)

    def fitted(free):
        sizes = memory.fit(config, MODEL_3B, 350, free)
        return sizes, memory.peak(memory.memory(config, MODEL_3B, 350, sizes))

    assert fitted(1e12)[0] == (16, 256, 512)
    tight, taken = fitted(24e9)
    assert tight.micro_batch < 16 and taken <= 0.9 * 24e9
    hopeless, taken = fitted(1e9)
    assert (hopeless.micro_batch, hopeless.head_chunk) == (1, 64) and hopeless.sample_rows < 128
    assert taken > 1e9


def test_keys_and_values_by_hand():
    """36 layers x (K, V) x 2 heads x 128 numbers x 2 bytes: 36,864 bytes a token.

    128 rows of 512 own tokens, and the 16 prompts of 350 once each.
    """
    config = train.Config(prompts=16, samples=8, max_new=512)
    parts = memory.memory(config, MODEL_3B, 350, memory.Sizes(16))
    fewer = memory.memory(config, MODEL_3B, 350, memory.Sizes(16, sample_rows=32))
    # Beside them: the prompts' pass through a layer of 11,008, or 4 numbers a word and row.
    adapters, reading, picking = 2 * 30_000_000, 4 * 11_008 * 2 * 16 * 350, 16 * 151_936 * 32
    assert parts["sampling"] == 36_864 * (128 * 512 + 16 * 350) + adapters + reading
    assert fewer["sampling"] == 36_864 * (32 * 512 + 4 * 350) + adapters + reading // 4
    assert picking < reading // 4
    # 128 items with a prompt each, of which 46 are read at once: 16,384 tokens at most.
    at_once = 4 * 11_008 * 2 * 46 * 350
    assert parts["evaluation"] == 36_864 * 128 * (512 + 350) + adapters + at_once


def test_the_arithmetic_is_near_the_truth(model_dir):
    """Weights and moments to the byte."""
    policy = Policy.load(model_dir, lora=0)
    total = sum(p.numel() for p in policy.model.parameters())
    model = memory.Model(policy.model.config, total, total, fp32=True)
    parts = memory.memory(CONFIG, model, 20, memory.Sizes(2))
    optimizer = train.make_optimizer(policy, CONFIG)
    rollouts = policy.sample(data.load("demo", "train")[:2], 2, 8, 1.0, 0)
    policy.score(collate(rollouts)).logps.sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert parts["weights"] == sum(p.nbytes for p in policy.model.parameters())
    assert parts["update"] > sum(p.grad.nbytes for p in policy.trainable().values())
    assert parts["optimiser"] == sum(value.nbytes for value in states if value.dim())


def test_the_bf16_reference_is_counted(model_dir, bf16_products):
    """Weights in fp32, and the copy, whose embedding stays fp32."""
    policy = Policy.load(model_dir, lora=0, keep_reference=True)
    config = replace(CONFIG, full=True, kl_coef=0.1)
    total = sum(p.numel() for p in policy.model.parameters())
    model = memory.Model(policy.model.config, total, total, fp32=False)
    parts = memory.memory(config, model, 20, memory.Sizes(2))
    reference = sum(p.nbytes for p in policy.frozen.parameters())
    assert parts["weights"] == pytest.approx(4 * total + reference, rel=0.01)  # but for norms


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("critic", ["", "lora"])
@pytest.mark.parametrize("fp32_head", [False, True])
def test_weights_are_counted_before_a_model_is_loaded(model_dir, full, critic, fp32_head):
    """As the policy of a GPU has them, the critic's adapters among them; but for the value head."""
    config = replace(CONFIG, model=model_dir, full=full, critic="lora", fp32_head=fp32_head)
    config.advantage = "gae" if critic else "group"
    policy = Policy.load(
        model_dir,
        dtype=torch.float32 if full else torch.bfloat16,
        lora=0 if full else config.lora,
        critic=critic,
        critic_rank=config.lora,
        fp32_head=fp32_head,
    )
    total, trained = memory.weights_of(config)
    counted = [p.numel() for name, p in policy.trainable().items() if "value_head" not in name]
    assert trained == sum(counted)
    held = memory.model_of(policy).total - (64 + 1 if critic else 0)
    beside = trained - total if full else trained  # adapters, the policy's or the critic's
    assert held == total + beside


# ------------------------------------------------------------------- before the first step
def test_preflight_puts_in_force_what_fits(model_dir, monkeypatch, capsys):
    """Almost no memory: the smallest sizes, and a word that even they may not fit."""
    policy = Policy.load(model_dir, lora=0, template="plain")
    monkeypatch.setattr(memory, "available", lambda device, held: 1e6)
    config = replace(CONFIG, prompts=4, samples=4, max_new=200)
    fitted = memory.preflight(policy, data.load("demo", "train")[:20], config)
    assert fitted == replace(config, micro_batch=1)
    assert memory.sizes_of(policy, fitted) == {
        "micro_batch": 1,
        "sample_rows": policy.sample_rows,
        "head_chunk": policy.head_chunk,
    }
    assert policy.head_chunk == 64 or policy.sample_rows == config.samples
    shown = capsys.readouterr().err
    assert "may not fit" in shown and "1 prompts a pass" in shown
    assert Policy.sample_rows == 256


def test_the_rehearsal_finds_what_goes_through_and_leaves_nothing(model_dir, monkeypatch, capsys):
    policy, real, sizes = Policy.load(model_dir, lora=0, template="plain"), Policy.score, []

    def score(self, batch, *args, **kwargs):
        scores = real(self, batch, *args, **kwargs)
        sizes.append(len(batch.mask))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no more")
        return scores

    monkeypatch.setattr(Policy, "score", score)
    config = replace(CONFIG, prompts=8, samples=2)
    config = memory.preflight(policy, data.load("demo", "train")[:20], config)
    assert sizes == [8, 4, 2] and config.micro_batch == 2
    assert all(p.grad is None for p in policy.trainable().values())
    assert "the longest batch went through" in capsys.readouterr().err


def test_the_rehearsal_holds_what_a_later_step_holds(model_dir, monkeypatch):
    """A gradient for every trained weight, and 8 bytes for Adam's moments."""
    policy, real, seen = Policy.load(model_dir, lora=0, template="plain"), Policy.score, []
    trained = policy.trainable().values()

    def score(self, *args):
        seen.append(sum(p.grad.nbytes for p in trained))
        return real(self, *args)

    def empty_like(p, make=torch.empty_like):
        seen.append(made := make(p))
        return made

    monkeypatch.setattr(Policy, "score", score)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    assert memory.goes_through(policy, data.load("demo", "train")[:2], replace(CONFIG, max_new=4))
    at_score = next(i for i, x in enumerate(seen) if isinstance(x, int))
    weights = sum(p.nbytes for p in trained)
    assert seen[at_score] == weights
    assert sum(x.nbytes for x in seen[:at_score]) == 2 * weights
    assert all(p.grad is None for p in trained)


def test_the_longest_prompts_are_found(model_dir):
    policy = Policy.load(model_dir, lora=0, template="plain")
    items = data.load("demo", "train")[:200]
    lengths = [len(policy.prompt(item, "think")) for item in items]
    found = memory.longest(policy, items, CONFIG, 3)
    assert min(lengths) < max(lengths)
    assert [len(policy.prompt(item, "think")) for item in found] == sorted(lengths)[:-4:-1]


def test_dry_run_writes_nothing(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", model_dir, *FLAGS, "--dry-run"])
    shown = capsys.readouterr()
    assert "dry run" in shown.out
    assert "  update " in shown.err and "longest batch went through" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_checkpoint_takes_is_said_and_no_hours(model_dir, capsys):
    """0.088 million weights, all trained: 12 bytes each."""
    memory.check_hub(replace(CONFIG, model=model_dir, full=True))
    shown = capsys.readouterr().err
    assert "To download: nothing. A checkpoint takes 0.00 GB, 2 are kept\n" in shown
    assert " h " not in shown


def test_medqa_offline_says_both_ways_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "online", lambda: False)
    with pytest.raises(UsageError) as error:
        train.main(["--dataset", "medqa", "--out", str(tmp_path / "run")])
    assert "--model DIR" in str(error.value) and "--data-dir DIR" in str(error.value)


def test_a_set_of_parquet_files_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setattr(hub, "cached", lambda repo, name, kind: False)
    found = memory.not_here(replace(CONFIG, dataset="vqa-rad", model="."))
    assert list(found) == ["vqa-rad's files"]
    assert "flaviagiammarino/vqa-rad's data/test-" in found["vqa-rad's files"]


def shape_of_3b(folder: Path) -> str:
    """A folder with the config of Qwen2.5-3B and no weights."""
    Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "free, full, words",
    [
        # 37 for weights and moments, 12 for gradients, and something to work with.
        (24, True, ("GB at the smallest sizes, and 24.0 GB are free", "adapters with --samples 8")),
        (7.5, False, ("--samples 4 --max-new 256 would fit",)),
        (5, False, ("GB are missing", "a smaller --model would")),
    ],
)
def test_a_gpu_too_small_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, free, full, words
):
    monkeypatch.setattr(loading, "pick_device", lambda name: "cuda")
    monkeypatch.setattr(loading, "product_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(memory, "available", lambda device, held: free * 1e9)
    config = replace(train.Config(), dataset="medqa", model=shape_of_3b(tmp_path), full=full)
    monkeypatch.setattr(memory, "not_here", lambda config: {})
    refused(lambda: memory.check_hub(config), *words)
    monkeypatch.setattr(memory, "available", lambda device, held: 80e9)
    memory.check_hub(config)


def test_full_memory_ends_a_program_in_a_line(capsys):
    def main():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`\nx")

    with pytest.raises(SystemExit) as stop:
        errors.run(main, "train.py")
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("train.py: the GPU's memory is full (CUDA error: CUBLAS_STATUS_ALLOC")
    assert shown.count("\n") == 1


def test_a_large_model_without_a_gpu_is_refused_before_anything_is_fetched(
    monkeypatch, tmp_path, medqa_dir
):
    """Only the config is read: of a folder with the shape of Qwen2.5-3B and no weights."""
    shape_of_3b(tmp_path / "m")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--dataset", "medqa", "--model", str(tmp_path / "m"), "--data-dir", medqa_dir]
    flags += ["--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="3.1 billion.*--device cpu"):
        train.main(flags)
    with pytest.raises(UsageError, match="cannot load"):  # on demand: then the weights are missing
        train.main([*flags, "--device", "cpu"])
