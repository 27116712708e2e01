"""The memory table beside the largest number of bytes held, at Qwen2.5-3B's shapes, without a GPU.

    python SIMULATOR benchmarks/memory_table.py [--cases NAME ...] [--layers N] [--json F]

SIMULATOR is that of benchmarks/card.py, here without numbers: it knows the size of every tensor and
when it is freed. What a GPU holds beside (its context, cuBLAS's workspaces, holes between blocks)
is not in it: about 1 GB. Where a case names a card, micro-batch and rows are those that
`footprint.fit` chooses for it, and what exceeds it raises OutOfMemoryError.
"""

import argparse
import gc
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from benchmarks import one_step, shapes
from policy import Policy
from support import cli, footprint, memory
from support.config import Config


class Case(NamedTuple):
    flags: str  # of train.py
    prompt: int = 350  # tokens; 350 are MedQA's longest
    phases: tuple[str, ...] = ("update",)
    card: float = math.inf  # GB


GRPO = "--dataset medqa --max-new 512"
LONG = "--dataset medqa --max-new 1024 --kl-coef 0.04"
RECIPE = "--recipe med-rlvr"
CASES = {
    "lora, update, 1 prompt a pass": Case(f"{GRPO} --micro-batch 1"),
    "lora, update, 2 prompts a pass": Case(f"{GRPO} --micro-batch 2"),
    "lora, update, 4 prompts a pass": Case(f"{GRPO} --micro-batch 4"),
    "lora, update, 16 prompts a pass": Case(f"{GRPO} --prompts 32 --micro-batch 16"),
    "lora, update, no checkpointing": Case(f"{GRPO} --micro-batch 1 --no-checkpointing"),
    "lora, sampling, 16 x 8": Case(GRPO, phases=("sampling",)),
    "evaluation, 128 x 1": Case(GRPO, phases=("evaluation",)),
    "full with KL, update": Case(f"{GRPO} --full --kl-coef 0.04 --micro-batch 1"),
    "full with KL on 80 GB": Case(f"{LONG} --full", 350, footprint.PHASES, 80),
    "ppo, critic lora, update": Case(f"{RECIPE} --micro-batch 8", 1024),
    "med-rlvr, sampling, 256 x 1": Case(RECIPE, 1024, ("sampling",)),
    "med-rlvr, all weights, on 80 GB": Case(f"{RECIPE} --full", 1024, footprint.PHASES, 80),
    "lora, head in fp32, update": Case(f"{GRPO} --micro-batch 1 --fp32-head"),
    "med-rlvr on 24 GB": Case(RECIPE, 1024, footprint.PHASES, 24),
    "grpo 8 x 1,024 on 24 GB": Case(LONG, 350, footprint.PHASES, 24),
}


def config_of(flags: str) -> Config:
    return cli.make_config(cli.read_flags(flags.split())[0])


def policy_of(config: Config, size, length: int, prompts: int) -> tuple[Policy, list]:
    """A policy of this size, and so many items with prompts of one length."""
    size = SimpleNamespace(**vars(size) | {"length": length, "prompts": prompts})
    policy = shapes.text_policy(
        size,
        0 if config.full else config.lora,
        torch.float32 if config.full else torch.bfloat16,
        checkpointing=config.checkpointing,
        fp32_head=config.fp32_head,
        keep_reference=config.kl_coef > 0,
        critic=config.critic if config.advantage == "gae" else "",
        critic_rank=config.lora,
    )
    policy.tokens.eos_ids = [0]  # in a simulation every token: the buffers are whole, steps few
    return policy, shapes.items_of(size)


def phase(name: str, policy: Policy, items: list, config: Config, optimizer) -> None:
    """What the table has under this name."""
    rows, G = config.prompts * config.samples, config.samples
    if name == "update":  # two micro-batches: the second one finds the gradient of the first
        part = replace(config, prompts=2 * config.micro_batch, minibatches=1)
        rollouts = shapes.written(policy, items[: part.prompts], G, config.max_new)
        # Past the critic's warm-up, in which the policy has no gradient.
        one_step.update(policy, optimizer, rollouts, part, config.critic_warmup)
    elif name == "sampling":
        groups = math.ceil(min(policy.sample_rows, rows) / G)
        policy.sample(items[:groups], G, config.max_new, 1.0, seed=0)
    else:
        policy.sample(items[: min(policy.sample_rows, 128)], 1, config.max_new, 0.0, seed=0)


def measured(case: Case, size=shapes.FULL) -> dict:
    """The table and what was held at most in each phase, in GB, with Adam's moments held."""
    config = config_of(case.flags)
    policy, items = policy_of(config, size, case.prompt, max(256, 2 * config.micro_batch))
    model = memory.model_of(policy)
    sizes = footprint.fit(config, model, case.prompt, case.card * 1e9)
    config = memory.set_sizes(policy, config, sizes._asdict())
    table = footprint.memory(config, model, case.prompt, sizes)
    optimizer = train.make_optimizer(policy, config)
    for p in policy.trainable().values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found = {"sizes": sizes._asdict(), "card_gb": case.card if case.card < math.inf else None}
    for name in case.phases:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        phase(name, policy, items, config, optimizer)
        expected = table["weights"] + table["optimiser"] + table[name]
        held = torch.cuda.max_memory_allocated()
        found[name] = {"table_gb": expected / 1e9, "measured_gb": held / 1e9}
        found[name]["off"] = expected / held - 1
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--layers", type=int, default=36, help="fewer are quicker")
    p.add_argument("--json")
    args = p.parse_args()
    if "fakecuda" not in sys.modules:
        raise SystemExit("benchmarks/memory_table.py: run it under a simulated CUDA device")
    sim = sys.modules["fakecuda"].SIM
    sim.shadow, sim.memory = True, math.inf
    shapes.FULL.text["num_hidden_layers"] = args.layers
    result = {"layers": args.layers, "cases": {}}
    print(f"{'case':34s} {'phase':10s} {'table':>8s} {'simulated':>10s}   GB")
    for name in args.cases:
        sim.memory = CASES[name].card * 1e9
        found = result["cases"][name] = measured(CASES[name])
        for part in CASES[name].phases:
            table, held, off = found[part].values()
            print(f"{name:34s} {part:10s} {table:8.2f} {held:10.2f} {off:+7.1%}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
