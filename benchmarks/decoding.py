"""What one token step of sampling costs: on a GPU by counting, without one; on a CPU by the clock.

    FAKECUDA=PATH python benchmarks/decoding.py [--against CHECKOUT] [--json F]

Kernels: the operations of a step at Qwen2.5-3B's shapes on the meta device, views left out; 16
prompts of 350 tokens, 8 samples each, at token 256 of 512. Bytes: weights, adapters and K/V. From
both an estimate for an H100, not a measurement: the larger of bytes / 3.35 TB/s and kernels x 2 us
(replayed as a graph), or x 5 us (launched by Python, whose own time is left out).
Waits of the host for the device, a token: on the simulated device that FAKECUDA names, if it does.
Tokens a second of CPU time, at SmolLM2-135M's shapes on one thread: of this checkout and of the
other one in turn. Of that one the waits are counted too; its kernels stay as the JSON has them.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

# CHECKOUT: of the code that is looked at, in a child process.
sys.path.insert(0, os.environ.get("CHECKOUT", str(Path(__file__).resolve().parent.parent)))
import data
from policy import Cache, Policy
from support import decoding
from support.demo_model import demo_policy

HERE = Path(__file__).resolve().parent.parent
P, L, G, T, t = 16, 350, 8, 512, 256
QWEN_3B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    bos_token_id=None,
    eos_token_id=None,
)
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "detach")
BANDWIDTH, GRAPH, LAUNCH = 3.35e12, 2e-6, 5e-6  # bytes/s; seconds a kernel, replayed and launched


def policy_of(config, dtype: torch.dtype, device: str) -> Policy:
    """Random weights, the demo's tokenizer, adapters of rank 16; nothing ends a completion."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="prompt_once"
        )
    policy = Policy(model, demo_policy(0).tokenizer, lora=16)
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], False
    return policy


class Kernels(TorchDispatchMode):
    """Counts operations by name, but those that only look at memory or reserve some."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(NO_KERNEL):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def one_kernel(input, normalized_shape, weight, eps):
    """Stands in for F.rms_norm, which is one kernel on CUDA and on meta taken apart."""
    return input.relu()


@torch.no_grad()
def step_at_3b(adapters: bool) -> dict:
    """Kernels, bytes and estimates of a step, and the limit: what any decoder has to read."""
    with mock.patch.object(F, "rms_norm", one_kernel):
        policy = policy_of(QWEN_3B, torch.bfloat16, "meta")
        policy.switch["adapters"] = "policy" if adapters else None
        policy.autocast = nullcontext  # there is none on meta, nor with weights in bf16
        cache = Cache(torch.ones(P, L, dtype=torch.bool, device="meta"), G, T)
        prompts = torch.zeros(P, L, dtype=torch.long, device="meta")
        with decoding.quick_products(policy.model), Kernels() as seen:
            policy.hidden(prompts, prompts, cache)
            draft = decoding.Draft(0, range(P * G), T, prompts[:, 0], cache.t)
            cache.span = 512
            seen.counts.clear()
            policy.step(draft, cache, 1.0)
    token = 2 * 2 * 36 * 2 * 128  # bytes of K and V, in bf16, of 36 layers with 2 heads of 128
    parameters = policy.model.named_parameters()
    weights = sum(2 * p.numel() for name, p in parameters if adapters or ".policy" not in name)
    limit = weights + token * (P * L + P * G * (t + 1))
    found = {"kernels": seen.counts.total(), "most": dict(seen.counts.most_common(12))}
    moved = limit + token * P * G * (cache.span - t - 1)
    return found | estimates(found["kernels"], moved, limit, GRAPH)


def estimates(kernels: int, moved: float, limit: float, a_kernel: float) -> dict:
    expected = max(moved / BANDWIDTH, kernels * a_kernel)
    return {
        "bytes": moved,
        "bytes_limit": limit,
        "estimated_ms": 1000 * expected,
        "share_of_limit": limit / BANDWIDTH / expected,
    }


def waits() -> float:
    """Of the host, a token, with the check for </answer>. Runs under the simulated device."""
    simulated, items = sys.modules["fakecuda"].SIM, data.load("demo", "train", limit=4)
    with tempfile.TemporaryDirectory() as folder:
        demo_policy(0).save_folder(folder)
        policy = Policy.load(folder, "cuda", lora=16)
    policy.replay = False  # of streams and graphs there are none
    policy.tokens.eos_ids, policy.tokens.stop_answer = [], True
    counts = []
    for max_new in (16, 80):
        simulated.waits.clear()
        policy.sample(items, 4, max_new, 1.0, seed=0)
        counts.append(sum(simulated.waits.values()))
    return (counts[1] - counts[0]) / 64


def speed() -> float:
    """Tokens a second of this process's time."""
    torch.set_num_threads(1)
    policy, items = policy_of(SMOLLM2, torch.float32, "cpu"), data.load("demo", "train", limit=4)
    policy.sample(items, 4, 4, 1.0, seed=0)  # warms up
    start = time.process_time()
    policy.sample(items, 4, 48, 1.0, seed=0)
    return 4 * 4 * 48 / (time.process_time() - start)


def child(what: str, checkout: str) -> float:
    """`waits` or `speed` of a checkout, in a process of its own."""
    simulator = [os.environ["FAKECUDA"]] if what == "waits" else []
    command = [sys.executable, *simulator, str(Path(__file__).resolve()), "--child", what]
    env = os.environ | {"CHECKOUT": checkout, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", help="another checkout of this repository")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["waits", "speed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print({"waits": waits, "speed": speed}[args.child]())
        return
    kept = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    before = kept.get("before", {})
    found = kept.get("now", {})  # of what is not measured this time the last figures stay
    found |= {"adapters": step_at_3b(True), "adapters_off": step_at_3b(False)}
    if "FAKECUDA" in os.environ:
        found["waits_a_token"] = child("waits", str(HERE))
    if args.against:
        if "FAKECUDA" in os.environ:
            before["waits_a_token"] = child("waits", args.against)
        pairs = []
        for _ in range(args.pairs):
            pairs.append((child("speed", args.against), child("speed", str(HERE))))
            print("tokens/s: {:.1f} and {:.1f}".format(*pairs[-1]), file=sys.stderr, flush=True)
        before["tokens_per_s"], found["tokens_per_s"] = map(list, zip(*pairs))
        found["speed_ratio"] = statistics.median(new / old for old, new in pairs)
    for name in ("adapters", "adapters_off"):
        if name in before:  # its bytes: no slots but those written
            kernels, limit = before[name]["kernels"], found[name]["bytes_limit"]
            before[name] |= estimates(kernels, limit, limit, LAUNCH)
    text = json.dumps({"before": before, "now": found}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
