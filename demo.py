"""The demo's models, small enough for a CPU, and the warm start that stands in for pre-training.

A file of its own because none of it belongs to the papers: data.py, policy.py and train.py read better without it. Nothing here is downloaded.
Reinforcement learning at this size brings out a skill, it does not create one; so the demo first teaches a random model the task and then spoils it.
What comes of that is in the README's first table.
"""
import random
from dataclasses import replace

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import data
from policy import ImageProcessor, Policy, collate
from ranks import say
from support.demo_task import demo_words
from support.text import LETTERS


# -------------------------------------------------------------------------------------------------- models
# Only the user's turn is shown: models this small learn the form from their warm start, not from an instruction.
TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% elif m.role == 'assistant' %}{{ m.content }} <eos>{% endif %}{% endfor %}"


def demo_policy(seed: int, **kwargs) -> Policy:
    """A random Qwen2 of 0.09 million weights and a tokenizer of the demo's words, all trained. No download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM
    words = ["<pad>", "<eos>", "<unk>", *demo_words()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=.15, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0, attn_implementation="prompt_once")
    with torch.random.fork_rng(devices=[]):  # made on the CPU: no GPU is touched
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return Policy(model, tokenizer, lora=0, **kwargs)


def tiny_vl_policy(seed: int, texts: list[str], **kwargs) -> Policy:
    """A random Qwen2.5-VL of 0.4 million weights that looks at images in patches of 7 pixels, with a tokenizer made from `texts`. No download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    special = ["<pad>", "<eos>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<think>", "</think>", "<answer>", "</answer>"]
    core = Tokenizer(models.BPE())                                            # bytes: any text can be written, and comes back as it was
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    numbers = "".join(f"[[{i}, {i}, {i}, {i}]] " for i in range(100)) * 9     # often, so that each becomes one token
    core.train_from_iterator([*texts, numbers], trainers.BpeTrainer(vocab_size=1000, special_tokens=special[:5], show_progress=False,
                                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.add_tokens(special[5:])                                              # one token each, but part of the text
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False,
                                        additional_special_tokens=special[2:5])
    tokenizer.chat_template = TEMPLATE
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=.15, rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
                         bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=4096),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=7, spatial_merge_size=2, temporal_patch_size=2,
                           window_size=56, fullatt_block_indexes=[1], out_hidden_size=64, initializer_range=.15),
        vision_start_token_id=2, image_token_id=3, vision_end_token_id=4, tie_word_embeddings=False,
        attn_implementation={"text_config": "prompt_once"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = 1
    processor = ImageProcessor(patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return Policy(model, tokenizer, lora=0, image_processor=processor, **kwargs)


# ---------------------------------------------------------------------------------------------- warm start
CLEAN_STEPS = {"choice": 1500, "classify": 250, "grade": 300, "localize": 400}
DILUTED_STEPS = {"choice": 60, "classify": 60, "grade": 60, "localize": 15}
RIGHT = {"choice": .25, "classify": .25, "grade": .25, "localize": .5}         # share of right answers in the diluted part


def warm_start(policy: Policy, items: list, config, clean_steps: int = 0, diluted_steps: int = 0):
    """Make the demo's stand-in for a base model; yields after the clean part once (for its evaluation), then at the end.

    Reinforcement learning brings out what a model can do now and then. So the random model is first taught the task, cleanly, and then spoilt
    (mostly random letters, broken form) until it samples badly: a skill is there, but not reliable. Tried on: settings in the README.
    """
    clean_steps, diluted_steps = clean_steps or CLEAN_STEPS[items[0].task], diluted_steps or DILUTED_STEPS[items[0].task]
    of_task: dict[str, list] = {}
    for item in items:
        of_task.setdefault(item.task, []).append(item)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=2.5e-3)
    rng = random.Random(f"warm {config.seed}")
    starts = {item.id: policy.start(item, 0, "think") for item in items}
    bar = tqdm(range(clean_steps + diluted_steps), desc="warm start", unit="step", leave=False, disable=None)
    for step in bar:
        if bar.disable and step % 250 == 0:                                                   # no terminal: a line now and then
            say(f"warm start: step {step} of {bar.total}")
        if step == clean_steps:
            yield "clean"
        diluted = step >= clean_steps
        schedule = min((step + 1) / 20, 1.0, 2 * (1 - step / clean_steps))                    # warm-up, constant, linear to 0 in the second half
        optimizer.param_groups[0]["lr"] = 1e-3 if diluted else 2.5e-3 * schedule
        rollouts = []
        for item in data.batch_for_step(items, step, 32, f"warm {config.seed}"):
            outside = config.hackable and rng.random() < .4                                   # this form stays whole: so it pays
            if diluted and not outside and rng.random() > RIGHT[item.task]:
                item = replace(item, answer=rng.choice(LETTERS[:len(item.options)]) if item.task == "choice" else rng.choice(of_task[item.task]).answer)
            words = data.completion(policy.framed(item)).split()
            if diluted and not outside and rng.random() > .6:
                words.pop(0)                                                                  # no <think>
            if outside:
                words = [*f"{item.rationale} . ".split() * 4, *words]
            rollouts.append(policy.written(replace(starts[item.id], group=len(rollouts)), " ".join(words), end=True))
        batch = collate(rollouts, policy.device)
        (-policy.score(batch).logps.sum() / batch.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    yield "diluted"
