"""Run folders: what a resume may change, --init, an export, and eval.py on a run."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import refused
from safetensors.torch import load_file
from tiny_models import character_tokenizer, llama
from training import DEMO, QUICK, adapted, artefacts, made_up, read, rows, run, shaken

import data
import eval as evaluation
import train
from policy import Policy, collate
from support import runs
from support.demo_model import demo_policy
from support.tokens import load_tokenizer


# --------------------------------------------------------------------------- resumed and refused
def test_an_existing_folder_is_not_overwritten_and_a_resume_changes_nothing_else(
    model_dir, tmp_path
):
    out = run(model_dir, tmp_path / "run", "--steps", "3")

    def content() -> dict:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = content()
    refused(lambda: run(model_dir, out), "--resume")
    refused(lambda: train.main(["--out", str(out), "--dry-run"]), "exists")
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    resume = ["--resume", str(out)]
    refused(lambda: train.main([*resume, "--model", str(other)]), "--model")
    refused(lambda: train.main([*resume, "--lr", "0.5"]), "--lr")
    refused(lambda: train.main([*resume, "--recipe", "med-rlvr"]), "--recipe")
    refused(lambda: train.main([*resume, "--steps", "2"]), "stands at step 3")
    assert content() == before


def test_what_is_no_run_is_refused(tmp_path):
    refused(lambda: train.main(["--resume", str(tmp_path)]), "run.json")
    refused(lambda: evaluation.main([str(tmp_path)]), "neither a run folder")


def test_resume_with_other_data_is_refused(model_dir, tmp_path):
    question = "a man has crackles . which diagnosis ?"
    mine = tmp_path / "mine.jsonl"

    def write(answer: str) -> None:
        lines = []
        for i in range(60):
            row = {"question": f"{question} {i}", "options": ["gout", "asthma"], "answer": answer}
            lines.append(json.dumps(row) + "\n")
        mine.write_text("".join(lines))

    write("A")
    out = run(model_dir, tmp_path / "run", "--dataset", str(mine), "--steps", "1")
    write("B")
    refused(lambda: train.main(["--resume", str(out)]), "data set")


def test_the_name_of_the_card_is_kept(monkeypatch):
    """Another one adds up in another order."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    assert runs.facts_of(DEMO, {}, "cuda:1")["machine"]["card"] == "Card cuda:1"
    assert "card" not in runs.facts_of(DEMO, {}, "cpu")["machine"]


def test_another_number_of_threads_is_said_and_the_run_goes_on(model_dir, tmp_path, capsys):
    out = run(model_dir, tmp_path / "run", "--steps", "1")
    facts = read(out / "run.json")
    facts["machine"]["threads"] = 99
    (out / "run.json").write_text(json.dumps(facts))
    train.main(["--resume", str(out), "--steps", "2"])
    assert "no longer bit for bit" in capsys.readouterr().err
    assert len(rows(out / "metrics.jsonl")) == 2


# ----------------------------------------------------------------------------------------- --init
@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A random model folder, `model`, and a supervised run from it, `sft`."""
    path = tmp_path_factory.mktemp("taught")
    demo_policy(0).save_folder(path / "model")
    flags = "--algo sft --samples 1 --full --steps 60 --lr 3e-3 --prompts 32".split()
    run(path / "model", path / "sft", *flags, *QUICK, "--save-every", "0")
    return path


def test_sft_teaches_the_form(taught):
    metrics = rows(taught / "sft" / "metrics.jsonl")
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"] and metrics[0]["accuracy"] == 1
    before, after = (read(taught / "sft" / "eval.json")[when] for when in ("before", "after"))
    assert before["well_formed"] == 0 and after["well_formed"] > 0.5


def test_init_starts_at_the_other_runs_policy_and_keeps_it_as_reference(taught, tmp_path):
    flags = "--algo grpo --kl-coef 0.1 --full --steps 2 --prompts 2 --samples 2".split()
    flags += ["--init", str(taught / "sft"), *QUICK]
    out = run(taught / "model", tmp_path / "rl", *flags)
    before, after = (read(path / "eval.json") for path in (taught / "sft", out))
    assert after["before"] == before["after"]
    # The reference is where it starts, not the base.
    assert abs(rows(out / "metrics.jsonl")[0]["kl"]) < 1e-6
    other = tmp_path / "other"
    demo_policy(1).save_folder(other)
    refused(
        lambda: run(other, tmp_path / "no", *flags),
        f"--init {taught / 'sft'}",
        str(other),
        str(taught / "model"),
    )


def test_adapters_that_start_from_others_keep_a_frozen_copy_as_reference(items):
    first = shaken(adapted())
    tensors = {name: p.detach().clone() for name, p in first.trainable().items()}
    policy = adapted(critic="lora", init=tensors)
    batch = collate(made_up(policy, items[:2], [[4, 2], [3, 5]]))
    expected = first.score(batch).logps
    assert torch.equal(policy.score(batch).logps, expected)
    assert not any("reference" in name for name in policy.trainable())
    shaken(policy)
    with policy.reference():
        assert torch.equal(policy.score(batch).logps, expected)
    assert not torch.equal(policy.score(batch).logps, expected)


# ----------------------------------------------------------------------------------------- export
ADAPTERS = "--no-full --lora 4 --lr 0.05".split()


CRITIC = "--full --algo ppo --critic lora --lora 4".split()


@pytest.mark.parametrize("flags", [ADAPTERS, ["--full"], CRITIC])
def test_an_export_is_a_plain_model_that_writes_the_same(flags, model_dir, tmp_path):
    out, exported = run(model_dir, tmp_path / "run", *flags, "--steps", "3"), tmp_path / "export"
    before = artefacts(out)
    train.main(["--resume", str(out), "--export", str(exported)])
    assert artefacts(out) == before
    policy, _ = runs.open_policy(str(out), "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = load_tokenizer(str(exported))
    for rollout in policy.sample(data.load("demo", "test")[:4], 1, 8, 0.0, 0):
        asked = [{"role": "user", "content": data.messages(rollout.item)[1]["content"]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == rollout.prompt_ids
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert written.tolist()[: len(rollout.completion_ids)] == rollout.completion_ids
    algo = "ppo" if flags == CRITIC else "grpo"
    assert f"trained by {algo}" in (exported / "README.md").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_has_the_models_type_and_no_head_of_its_own(tied, tmp_path):
    """As on a GPU: adapters on weights in bf16, and the head in fp32 beside a tied embedding."""
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    policy = Policy(model, character_tokenizer(), lora=4, fp32_head=True)
    runs.export(policy, tmp_path / "run", tmp_path / "export", DEMO, [])
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) != tied


def test_an_export_that_cannot_be_written_is_said(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--steps", "1", *QUICK)
    resume = ["--resume", str(out), "--export"]
    refused(lambda: train.main([*resume, str(tmp_path)]), "exists")
    file = tmp_path / "file"
    file.write_text("")
    # Its own run is named, not the export's folder.
    message = refused(lambda: train.main([*resume, str(file / "export")]), "export", str(file))
    assert message.endswith(f"--resume {out}")


# -------------------------------------------------------------------------------- eval.py on a run
def evaluated(tmp_path, *arguments) -> dict:
    """eval.py's --json: one result, or several by the name of their model."""
    written = tmp_path / "e.json"
    evaluation.main([*map(str, arguments), "--limit", "12", "--json", str(written)])
    found = read(written)
    if "results" in found:
        return {result["model"]: result for result in found["results"]}
    return found


def test_eval_of_a_run_repeats_its_own_numbers(model_dir, tmp_path):
    out = run(model_dir, tmp_path / "run", "--no-full")
    answers = tmp_path / "a.jsonl"
    result = evaluated(tmp_path, out, "--samples", "1", "--answers", answers)
    recorded = read(out / "eval.json")["after"]
    del recorded["ood"]  # another split
    assert {name: result[name] for name in recorded} == recorded and recorded["n"] == 12
    told = rows(answers)
    assert len(told) == 24
    assert sum(row["correct"] for row in told if row["greedy"]) / 12 == result["accuracy"]


def test_a_model_beside_a_run_is_evaluated_as_before_training(model_dir, tmp_path, capsys):
    """The tokenizer has a chat template, so alone the model would be asked by that."""
    settings = "--template plain --max-new 9 --reward acc-format --steps 1".split()
    settings += ["--eval-samples", "0"]
    out = run(model_dir, tmp_path / "run", *settings)
    other = run(model_dir, tmp_path / "other", *settings, "--max-new", "7")
    before = read(out / "eval.json")["before"]
    del before["ood"]
    capsys.readouterr()
    for models in ((model_dir, out, other), (out, model_dir)):
        base = evaluated(tmp_path, *models)[model_dir]
        shown = capsys.readouterr()
        assert {name: base[name] for name in before} == before
        asked = (base["dataset"], base["template"], base["stop_answer"], base["max_new"])
        assert asked == ("demo", "plain", True, 9)
        assert shown.out.count("| plain, at </answer>, 9 |") == 2
        assert f"{model_dir} is evaluated with the settings of {out}" in shown.err
    evaluated(tmp_path, out, model_dir, "--max-new", "5", "--template", "chat")
    assert capsys.readouterr().out.count("| chat, at the end token, 5 |") == 2


def test_batching_changes_no_evaluation(model_dir):
    policy, items = Policy.load(model_dir, lora=0), data.load("demo", "test")[:20]
    texts = []
    for n_rows in (2, 7, 100):
        found = evaluation.answer(policy, items, DEMO, n=2, temperature=1.0, rows=n_rows)
        texts.append([rollout.text for rollout in found])
    assert texts[0] == texts[1] == texts[2]
