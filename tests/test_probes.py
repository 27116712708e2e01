"""What each probe asks, and what it makes of the answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
from data import Item
from policy import Policy, Rollout
from rewards import Parsed
from support import demo_model as demos
from support import probes

NAMES = ("round", "irregular")


def answered(gold, predicted, options=("a", "b", "c")):
    item = Item("i", "choice", "Q", options, gold)
    parsed = Parsed("", "x", predicted, "", True)
    right = gold == predicted
    return Rollout(item, 0, [], [], [], True, parsed=parsed, correct=right, predicted=predicted)


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------- options
def test_letters_are_scikit_learns_recall():
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = list("AABBBCCA"), list("AABACCBA")
    found = probes.letters([answered(g, p) for g, p in zip(gold, predicted)])
    recall = metrics.recall_score(gold, predicted, average=None, labels=list("ABC"))
    assert found["accuracy"] == pytest.approx(dict(zip("ABC", recall)))
    assert found["predicted"] == {"A": 4, "B": 2, "C": 2}
    assert found["gold"] == {"A": 3, "B": 3, "C": 2}


def test_rotation_agrees_where_the_same_text_is_named():
    asked = [answered("A", said) for said in ("A", "A", "B", "")]
    turned = [data.rotate_options(rollout.item) for rollout in asked]  # b, c, a
    said = ("C", "A", "A", "")  # a, b, b, nothing
    after = [replace(r, item=i, predicted=p) for r, i, p in zip(asked, turned, said)]
    assert probes.same_option(asked, after) == 2 / 4


# ---------------------------------------------------------------------------------------- images
@pytest.fixture
def mixed():
    """No image; round and irregular with one; irregular with two."""
    one = Item("one", "classify", "Q", NAMES, "round", image=picture(0, 56, 56))
    return [
        replace(one, id="none", image=None),
        one,
        replace(one, id="other", image=picture(9, 28, 56), answer="irregular"),
        replace(one, id="two", image=(picture(1, 90, 40), picture(2, 30, 30)), answer="irregular"),
    ]


def test_blank_images_are_grey_and_as_large(mixed):
    blank = probes.blank(mixed)
    assert [item.id for item in blank] == ["one", "other", "two"]
    assert [image.size for image in blank[2].image] == [(40, 90), (30, 30)]
    assert {image.getcolors()[0][1] for item in blank for image in item.image} == {(128,) * 3}


def test_an_image_goes_to_an_item_of_another_answer_with_as_many(mixed):
    """Items without an image once received a neighbour's, and the neighbour lost its own."""
    swapped = probes.swapped([replace(mixed[1], frame=(1, 2, 3, 4)), *mixed])
    assert [item.id for item in swapped] == ["one", "one", "other"]  # none has two images but "two"
    assert all(np.array_equal(item.image, mixed[2].image) for item in swapped[:2])
    assert np.array_equal(swapped[2].image, mixed[1].image)
    assert [item.answer for item in swapped] == ["round", "round", "irregular"]
    assert swapped[0].frame is None  # the frame of the image that it had


# ------------------------------------------------------------------------------------ likelihood
@pytest.fixture(scope="module")
def policy():
    policy = demos.demo_policy(0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)  # at initialisation all tokens are about as likely
    return policy


def test_likelihoods_are_the_replicated_forward(policy):
    for item in data.load("demo", "test")[:3]:
        expected = []
        for letter in "ABCDE":
            prompt = policy.prompt(item, "direct")
            ids = policy.tokenizer(f"<answer> {letter} </answer>").input_ids
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0]
            steps = logits.log_softmax(-1)[len(prompt) - 1 :]
            expected.append(sum(float(steps[t, token]) for t, token in enumerate(ids)))
        assert probes.likelihoods(policy, item) == pytest.approx(expected, abs=1e-4)


def test_the_likeliest_letter_by_hand():
    items = [Item("1", "choice", "Q", ("a", "b"), "A"), Item("2", "choice", "Q", ("a", "b"), "A")]
    found = probes.likeliest(items, [[-1.0, -2.0], [-3.0, -2.0]])
    assert found["likelihood_accuracy"] == 0.5 and "auc" not in found
    assert found["likelihood_ci95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)


def test_the_auc_of_classes_is_that_of_their_probabilities():
    """One item lists its classes in another order; the gap of log-probs alone counts."""
    one = Item("1", "classify", "Q", ("x", "y"), "x")
    items = [one, replace(one, options=("y", "x")), replace(one, answer="y")]
    scores = [[-1.0, -2.0], [-50.0, -50.5], [-9.0, -9.25]]  # x beats y by 1, -0.5, 0.25
    found = probes.likeliest(items, scores)
    assert found["auc"] == 0.5  # of the pairs x above y: 1 > 0.25 is in order, -0.5 > 0.25 is not
    assert found["likelihood_accuracy"] == 1 / 3
    low, high = found["auc_ci95"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_items_of_other_classes_have_no_auc():
    one = Item("1", "classify", "Q", ("x", "y"), "x")
    found = probes.likeliest([one, replace(one, options=("x", "z"))], [[0.0, -1.0]] * 2)
    assert found["likelihood_accuracy"] == 1 and "auc" not in found


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_likeliest_letter_is_lm_evaluation_harnesss(chat):
    """Same model, items and prompt text, asked by the harness as a multiple-choice task of its own.

    Runs where lm-eval is installed (requirements-dev.txt says why it is not among the others). What
    is compared are all log-likelihoods, the likeliest option of each item, and the accuracy.
    """
    lm_eval = pytest.importorskip("lm_eval")
    harness = pytest.importorskip("lm_eval.models.huggingface")
    tasks = pytest.importorskip("lm_eval.api.task")
    datasets = pytest.importorskip("datasets")  # which the harness brings along
    items = [replace(item, knowledge=()) for item in data.load("demo", "dev")[:16]]
    tokenizer = merging_tokenizer([data.messages(item)[1]["content"] for item in items])
    tokenizer.chat_template = demos.TEMPLATE if chat else None
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
    policy = Policy(model, tokenizer)
    rows = []
    for item in items:
        asked = data.messages(item, "direct")
        text = data.plain_text(asked)
        if chat:
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answers = [f"<answer> {name} </answer>" for name in probes.names_of(item)]
        gold = probes.names_of(item).index(item.answer)
        rows.append({"text": text, "answers": answers, "gold": gold})
    config = {
        "task": "ours",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["text"],
        "doc_to_choice": lambda row: row["answers"],
        "doc_to_target": lambda row: row["gold"],
        "target_delimiter": "" if chat else " ",
    }
    asker = harness.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
    found = lm_eval.simple_evaluate(
        asker, tasks=[tasks.ConfigurableTask(config=config)], bootstrap_iters=0
    )
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    theirs = [[logp for logp, _ in sample["filtered_resps"]] for sample in samples]
    ours = [probes.likelihoods(policy, item) for item in items]
    for of_item, of_theirs in zip(ours, theirs, strict=True):
        if chat:  # the harness counts the prompt's last line break as part of every answer
            of_theirs = [logp - of_theirs[0] + of_item[0] for logp in of_theirs]
        assert of_item == pytest.approx(of_theirs, abs=1e-3)
        assert np.argmax(of_item) == np.argmax(of_theirs)
    accuracy = probes.likeliest(items, ours)["likelihood_accuracy"]
    assert accuracy == found["results"]["ours"]["acc,none"]
    assert 0 < accuracy < 1 and len({int(np.argmax(of_item)) for of_item in ours}) > 1


def merging_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs as in Qwen's, learned on these texts: many of its tokens are parts of words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
