"""All that a run depends on, a setting a line.

Training, `eval.py MODEL` and the examples of rewards.py all read these defaults, so none of them
can keep a copy that grows old. A leaf: of our own files it knows the names of data sets only.
"""

from dataclasses import dataclass, field

import data


def setting(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Each field is a flag: --clip-high 0.28. Without arguments: GRPO with Med-RLVR's reward."""

    # what to learn from
    dataset: str = setting(
        "demo", f"{data.OFFERED}, or a JSONL file or folder of your own"
    )
    data_dir: str = setting("", "folder that holds the published files, instead of the hub")
    task: str = setting(
        "",
        "where a data set offers several: localize, classify or grade; empty = its own",
        ("", "classify", "grade", "localize"),
    )
    shots: int = setting(0, "train on N items of each class, drawn by the seed; 0 = all")
    limit: int = setting(0, "train on the first N items only; 0 = all")
    eval_limit: int = setting(0, "evaluate on the first N items of dev and of test only; 0 = all")
    shuffle_options: bool = setting(
        False, "another order of the options for each item, fixed by the seed"
    )
    style: str = setting("think", "prompt", ("think", "direct", "cot"))
    knowledge: str = setting(
        "none",
        "prior knowledge in the prompt: about the kind of image (task), and about each class "
        "(class)",
        ("none", "task", "class"),
    )
    knowledge_file: str = setting(
        "", "a file of your own for it; empty = the data set's in knowledge/"
    )
    max_prompt: int = setting(1024, "tokens; a longer prompt is dropped and counted, never cut")
    hackable: bool = setting(
        False,
        "demo only: a warm start in which reasoning in front of <think> pays, to watch a "
        "reward hack (stage 5)",
    )
    # the model
    model: str = setting(
        "",
        "Hugging Face folder or hub name; tiny-vl = a random Qwen2.5-VL of 0.4 million "
        "weights, to try things; empty = the demo's tiny model",
    )
    init: str = setting("", "run folder whose policy to start from, and to keep as the reference")
    device: str = setting("auto", "auto, cpu, cuda")
    template: str = setting(
        "auto", "auto = the tokenizer's chat template where it has one", ("auto", "chat", "plain")
    )
    stop_answer: str = setting(
        "auto", "stop at the first </answer>; auto = with the plain template", ("auto", "on", "off")
    )
    full: bool = setting(False, "train all weights instead of adapters")
    lora: int = setting(16, "rank of the adapters")
    lora_alpha: float = setting(32.0, "their scale is alpha / rank")
    lora_targets: str = setting("all", "all, or a comma list such as q_proj,v_proj")
    train_vision: bool = setting(
        False, "train the vision tower too (with adapters of its own, or all of it with --full)"
    )
    max_pixels: int = setting(
        0, "images are shrunk to at most so many pixels; 0 = the model's own limit"
    )
    # the algorithm: --algo sets the rest of this block, and flags override it
    algo: str = setting(
        "grpo",
        "a row of the table of algorithms",
        ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "ppo", "sft"),
    )
    advantage: str = setting(
        "group",
        "compare with the group's other samples, or with a learned value (GAE)",
        ("group", "gae"),
    )
    scale: str = setting("std", "divide a group's advantages by its std", ("std", "none"))
    leave_one_out: bool = setting(False, "baseline = mean of the other samples of the group")
    weights: str = setting(
        "sequence",
        "who counts the same: each sequence, each token, or tokens over a constant",
        ("sequence", "token", "constant"),
    )
    ratio: str = setting(
        "token", "probability ratio per token or per sequence", ("token", "sequence")
    )
    clip_low: float = setting(0.2, "ratios below 1 - this stop pushing down")
    clip_high: float = setting(0.2, "ratios above 1 + this stop pushing up")
    dual_clip: float = setting(0.0, "bound of ratio x |A| for A < 0; 0 = none")
    kl: str = setting(
        "k3",
        "KL estimator; k1 goes into the reward of each token (gae only), k2 and k3 into the loss",
        ("k1", "k2", "k3"),
    )
    kl_coef: float = setting(0.0, "weight of the KL to the reference; 0 = no reference pass")
    dynamic: bool = setting(
        False, "DAPO: drop groups that are all right or all wrong, and sample others instead"
    )
    refills: int = setting(3, "at most so many extra rounds of sampling for that")
    # the critic of --algo ppo
    critic: str = setting(
        "head",
        "a scalar head on the policy's detached hidden states, or adapters of its own (lora) "
        "and a head",
        ("head", "lora"),
    )
    gamma: float = setting(1.0, "discount of GAE")
    lam: float = setting(0.95, "lambda of GAE")
    value_lr: float = setting(1e-4, "the critic's learning rate")
    value_clip: float = setting(
        0.2, "the critic moves at most so far from the values that made the advantages; 0 = no clip"
    )
    critic_warmup: int = setting(0, "first steps in which only the critic learns")
    # the rollout and its updates
    prompts: int = setting(16, "prompts a step (P)")
    samples: int = setting(8, "completions a prompt (G)")
    temperature: float = setting(1.0, "of sampler, scorer and reference alike")
    max_new: int = setting(512, "new tokens a completion")
    updates: int = setting(1, "passes over a rollout")
    minibatches: int = setting(1, "optimiser steps a pass, at most one a prompt")
    sample_rows: int = setting(
        256, "completions sampled at once, for memory only: their random numbers stay the same"
    )
    micro_batch: int = setting(
        0,
        "prompts a forward pass, for memory only: the gradient stays the same up to rounding;"
        " 0 = as many as fit",
    )
    checkpointing: bool = setting(True, "recompute activations in the backward pass")
    # the reward
    reward: str = setting(
        "med-rlvr",
        "malformed -1, wrong 0, right +1; or accuracy + format; or that with credit for a "
        "grade nearly right",
        ("med-rlvr", "acc-format", "fuzzy"),
    )
    strict: bool = setting(False, "well formed = nothing outside the two blocks")
    w_format: float = setting(1.0, "weight of the format in acc-format, at most the 1 of accuracy")
    w_leak: float = setting(
        0.0, "penalty for an answer given away in a very short think block (stage 4)"
    )
    w_before: float = setting(0.0, "penalty for reasoning placed before <think> (stage 5)")
    w_short: float = setting(0.0, "penalty for too short a reasoning")
    min_think: int = setting(30, "words of reasoning below which w_short grows, to 1 at none")
    w_overlong: float = setting(0.0, "weight of the soft penalty for completions near the limit")
    fuzzy: str = setting(
        "tenth",
        "--reward fuzzy: credit of a grade at distance 0, 1, 2, ... from the gold one, such "
        "as 1,0.5,0.1; two lists under/over; or tenth, sixteenth, asymmetric",
    )
    box_reward: str = setting(
        "iou",
        "localize: mean IoU, mean generalised IoU, or 1 where the mean IoU reaches a "
        "threshold, fixed or rising",
        ("iou", "giou", "threshold", "tighten"),
    )
    tau: float = setting(0.5, "that threshold; for tighten where it begins (MedLoc-R1: 0.3)")
    tau_end: float = setting(0.8, "and where it ends")
    recite: float = setting(
        0.0, "weight of the BLEU of the think block with the knowledge; below 0 it is a penalty"
    )
    overlong_share: float = setting(0.2, "last share of max_new over which it rises to 1")
    # the optimiser
    steps: int = setting(300, "training steps")
    lr: float = setting(1e-5, "learning rate of AdamW after the warm-up")
    warmup: float = setting(
        10.0, "steps of linear warm-up; below 1: that share of --steps, rounded up"
    )
    schedule: str = setting(
        "constant",
        "the rate after the warm-up: constant, or a cosine to a tenth at the last step",
        ("constant", "cosine"),
    )
    beta2: float = setting(0.95, "AdamW's second beta (OpenRLHF)")
    weight_decay: float = setting(0.0, "AdamW's")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    # the run
    seed: int = setting(0, "of everything: order, options, samples, adapters")
    out: str = setting("", "run folder; empty = the next free runs/DATASET-ALGO-N")
    eval_every: int = setting(20, "steps between evaluations on dev; 0 = none")
    eval_samples: int = setting(1, "completions an item for the sampled accuracy, before and after")
    save_every: int = setting(20, "steps between checkpoints; the last step is always saved")
    keep: int = setting(2, "checkpoints kept")
    log_groups: int = setting(1, "groups a step written to rollouts.jsonl")
    report_every: int = setting(
        0,
        "steps between reports, written to report.html in the run folder; one is always "
        "written at the end",
    )
