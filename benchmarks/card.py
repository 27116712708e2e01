"""Every kind of run on a simulated CUDA device: what a GPU would refuse, where the host would wait.

    [python SIMULATOR | python] benchmarks/card.py [--runs NAME ...] [--json F]

SIMULATOR is a script that runs another one under such a device and offers it as the module
`fakecuda`: tensors on the CPU that obey CUDA's rules of devices and types. `fakecuda.SIM` holds
`waits`, a Counter of the places where the host needs a number of the device, and `refused`, what
CUDA would have refused. Speed, rounding and graphs are not simulated. On a real GPU it runs too,
and counts nothing. tests/test_card.py checks the table; .ci/run knows where the simulator is.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import train
from benchmarks import gpu
from policy import Policy
from support.demo_model import demo_policy
from support.log import Log
from support.warm_start import ProtocolLessons

SHORT = (
    "--steps 2 --prompts 4 --samples 2 --max-new 24 --warmup 1 --eval-limit 4 --eval-samples 0 "
    "--eval-every 0"
)
IMAGES = "--dataset demo-images --model tiny-vl"
ADAPTERS = "--model MODEL --no-full"
PPO = "--algo ppo --kl-coef 0.1"
# Flags of train.py. MODEL is the folder of a small model, RUNS the folder of the runs.
TRAINED = {
    "demo": f"--model MODEL --full {SHORT}",
    "full, KL": f"--model MODEL --full --kl-coef 0.1 --checkpointing --minibatches 2 {SHORT}",
    "lora, KL, export": f"{ADAPTERS} --kl-coef 0.1 --template plain --export RUNS/exported {SHORT}",
    "ppo, head": f"{ADAPTERS} {PPO} --critic head {SHORT}",
    "ppo, lora": f"{ADAPTERS} {PPO} --critic lora --minibatches 2 {SHORT}",
    "ppo, full, critic lora": f"--model MODEL --full {PPO} --critic lora {SHORT}",
    "dapo": f"{ADAPTERS} --algo dapo {SHORT} --samples 8",
    "head in fp32": f"--model MODEL --full --kl-coef 0.1 --fp32-head {SHORT}",
    "lora, head in fp32": f"{ADAPTERS} --kl-coef 0.1 --fp32-head {SHORT}",
    "sft": f"{ADAPTERS} --algo sft --prompts 4 {SHORT} --samples 1",
    "images, frozen tower": f"{IMAGES} --no-full --task classify {SHORT}",
    "images, trained tower": f"{IMAGES} --train-vision --task localize {SHORT}",
}
RESUMED = "lora, KL, export"


class Waits:
    """Counts of one run: waits while sampling and in the rest of its steps, tokens, updates."""

    def __init__(self, sim):
        self.sim = sim
        self.sampling = self.tokens = self.updating = self.updates = 0

    def total(self) -> int:
        return sum(self.sim.waits.values())

    def __enter__(self):
        """Policy.sample and three methods of the log count from here on."""
        sample, sampled, updated, write = Policy.sample, Log.sampled, Log.updated, Log.write

        def counted_sample(policy, items, n, max_new, *args, **kwargs):
            start = self.total()
            sample(policy, items, n, 1, *args, **kwargs)  # what a call costs whatever it writes
            after_one = self.total()
            rollouts = sample(policy, items, n, max_new, *args, **kwargs)
            self.sampling += (self.total() - after_one) - (after_one - start)
            self.tokens += max(len(rollout.completion_ids) for rollout in rollouts) - 1
            return rollouts

        def counted_sampled(log, rollouts):
            sampled(log, rollouts)
            self.step_began = self.total()

        def counted_updated(log, stats):
            updated(log, stats)
            self.updates += 1

        def counted_write(log, *args, **kwargs):
            self.updating += self.total() - self.step_began
            write(log, *args, **kwargs)

        self.patches = ExitStack()
        of_log = {"sampled": counted_sampled, "updated": counted_updated, "write": counted_write}
        self.patches.enter_context(mock.patch.multiple(Log, **of_log))
        self.patches.enter_context(mock.patch.object(Policy, "sample", counted_sample))
        return self

    def __exit__(self, *exc):
        self.patches.close()

    def figures(self) -> dict:
        """Waits a token: beyond those of a call that writes one. Waits an update: all of a step."""
        token = self.sampling / self.tokens if self.tokens else 0.0
        update = self.updating / self.updates if self.updates else 0.0
        return {"waits_per_token": token, "waits_per_update": update}


def trained(name: str, folder: Path) -> None:
    flags = TRAINED[name].replace("MODEL", f"{folder}/model").replace("RUNS", str(folder))
    train.main([*flags.split(), "--device", "cuda", "--out", str(run_of(name, folder))])


def run_of(name: str, folder: Path) -> Path:
    return folder / name.replace(", ", "-").replace(" ", "-")


def resumed(folder: Path) -> None:
    train.main(["--resume", str(run_of(RESUMED, folder)), "--steps", "3"])


def evaluated(folder: Path) -> None:
    """A run, and the model that it exported."""
    models = [str(run_of(RESUMED, folder)), f"{folder}/exported"]
    evaluation.main([*models, *"--limit 4 --samples 2 --likelihood --rotate --max-new 24".split()])


def measured(folder: Path) -> None:
    """benchmarks/gpu.py in toy sizes; a part that fails is an error here."""
    gpu.main(["--tiny", "--json", f"{folder}/gpu.json"])
    parts = json.loads((folder / "gpu.json").read_text())
    failed = [f"{name}: {part['error']}" for name, part in parts.items() if "error" in str(part)]
    if failed:
        raise RuntimeError("; ".join(failed))


RUNS = {name: lambda folder, name=name: trained(name, folder) for name in TRAINED}
RUNS |= {"resume": resumed, "eval, likelihood": evaluated, "benchmarks/gpu.py": measured}


def row(sim, work, folder: Path) -> dict:
    """What came of one run."""
    refused, start, result = len(sim.refused), time.perf_counter(), "ok"
    with Waits(sim) as waits:
        try:
            work(folder)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}".splitlines()[0]
    return {
        "result": result,
        "refused": sim.refused[refused:],
        **waits.figures(),
        "seconds": time.perf_counter() - start,
    }


def taught_a_little(folder: Path) -> None:
    """A model whose answers are right now and then, or DAPO would drop every group."""
    policy = demo_policy(0)
    lessons = ProtocolLessons(policy, train.Config())
    lessons.study("mixture", lambda step: lessons.mixture(), 60)
    policy.save_folder(folder)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    p.add_argument("--json")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/card.py: run it under a simulated CUDA device, or on a GPU")
    # A real device counts no waits, and what it refuses is an exception.
    real = SimpleNamespace(waits={}, refused=[])
    sim = sys.modules["fakecuda"].SIM if "fakecuda" in sys.modules else real
    table = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        taught_a_little(folder / "model")
        for name in args.runs:
            table[name] = row(sim, RUNS[name], folder)
    print(f"{'run':24s} {'waits a token':>14s} {'waits an update':>16s}  result")
    for name, found in table.items():
        waits = f"{found['waits_per_token']:14.2f} {found['waits_per_update']:16.1f}"
        print(f"{name:24s} {waits}  {found['result']}")
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
