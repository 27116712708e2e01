"""Runs killed at any moment and resumed, against one that was never disturbed, byte for byte.

    python benchmarks/kill_test.py [--kills 50] [--studies grpo ppo images]

Compared are weights, optimiser, metrics, rollouts and evaluation. Half of the kills (SIGKILL) come
at a random time, a quarter in the middle of writing a checkpoint, a quarter between two optimiser
steps of one rollout. Every run is a forked process, so that 150 of them need no 150 imports. Then
the disk fills up (RLIMIT_FSIZE), and bytes of the newest checkpoint are flipped.
"""

import argparse
import filecmp
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from support import checkpoints
from support.demo_model import demo_policy, tiny_vl_policy

COMMON = [
    *"--steps 8 --prompts 4 --samples 4 --max-new 12 --kl-coef 0.02 --save-every 2".split(),
    *"--eval-limit 8 --eval-samples 1 --eval-every 3".split(),
]
ADAPTERS = "--no-full --lora 4 --critic lora --critic-warmup 2"
STUDIES = {
    "grpo": "--epochs 2 --minibatches 2",
    "ppo": f"--algo ppo {ADAPTERS} --epochs 2 --minibatches 2",
    "images": "--dataset demo-images --task localize --epochs 2 --max-new 8",
}
# Not functions of the run alone; report.html has the run's name in it.
NOT_COMPARED = ("timing.jsonl", "run.json", "report.html")


def make_models(folder: Path) -> None:
    """Random models, not even warm: what they say does not matter here."""
    torch.set_num_threads(1)
    demo_policy(0).save_folder(folder / "text")
    items = data.load("demo-images", "train", limit=200, task="localize")
    texts = [data.messages(item)[1]["content"] + data.completion(item) for item in items]
    tiny_vl_policy(0, texts).save_folder(folder / "images")


def nothing() -> None:
    """What is prepared where nothing is to happen."""


def child(arguments: list[str], log: Path, prepare=nothing) -> int:
    """train.main in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        prepare()
        train.main(arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        # A forked child must never return into its parent's code, which would tidy up the folder.
        os._exit(2)


def ended(pid: int) -> int:
    """0, an exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8")[-2000:]


def die_at(owner, name: str, call: int) -> None:
    """Makes owner.name kill its own process after so many calls: the moment cannot be missed."""
    real, seen = getattr(owner, name), []

    def fatal(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


def arguments_of(run: Path, flags: list[str]) -> list[str]:
    if (run / "run.json").exists():
        return ["--resume", str(run)]
    return ["--out", str(run), *flags]


def differences(run: Path, whole: Path) -> list[str]:
    """Files whose bytes differ."""
    found = []
    for path in whole.rglob("*"):
        name = path.relative_to(whole)
        if not path.is_file() or path.name in NOT_COMPARED:
            continue
        if not (run / name).is_file() or not filecmp.cmp(run / name, path, shallow=False):
            found.append(str(name))
    return found


def appeared(path: Path) -> None:
    for _ in range(12_000):
        if path.exists():
            return
        time.sleep(0.01)
    raise SystemExit(f"{path} did not appear within two minutes")


def whole_run(folder: Path, flags: list[str]) -> tuple[Path, float]:
    """An undisturbed run, and the seconds from its run.json to its end."""
    run = folder / "whole"
    pid = child(["--out", str(run), *flags], folder / "log")
    appeared(run / "run.json")
    start = time.perf_counter()
    if ended(pid):
        raise SystemExit(end_of(folder / "log"))
    return run, time.perf_counter() - start


def killed(run: Path, flags: list[str], log: Path, rng: random.Random, seconds: float) -> bool:
    """One start or resumption with a kill in it; False where the run ended first."""
    kind = rng.choice(("time", "time", "checkpoint", "update"))
    call = rng.randint(1, 3 if kind == "checkpoint" else 7)

    def prepare() -> None:
        if kind == "checkpoint":
            die_at(checkpoints, "save_file", call)
        elif kind == "update":
            die_at(torch.optim.AdamW, "step", call)

    pid = child(arguments_of(run, flags), log, prepare)
    if kind == "time":
        appeared(run / "run.json")
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{run} ended with {code}:\n{end_of(log)}")
    return code != 0


def finish(run: Path, flags: list[str], log: Path) -> None:
    if code := ended(child(arguments_of(run, flags), log)):
        raise SystemExit(f"{run} ended with {code}:\n{end_of(log)}")


def study(name: str, flags: list[str], folder: Path, kills: int) -> tuple[int, int, int]:
    """kills, resumptions and files that differ."""
    rng, log = random.Random(f"kill {name}"), folder / "log"
    done = resumed = wrong = number = 0
    whole, seconds = whole_run(folder, flags)
    while done < kills:
        run, number = folder / f"run-{number}", number + 1
        while done < kills and killed(run, flags, log, rng, seconds):
            # Whatever follows on a kill is a resumption: the loop's next round, or `finish`.
            done, resumed = done + 1, resumed + 1
        finish(run, flags, log)
        found = differences(run, whole)
        wrong += len(found)
        different = f", different: {', '.join(found)}" if found else ""
        print(f"  {name}: {done} kills so far{different}", flush=True)
        shutil.rmtree(run)
    return done, resumed, wrong


def full_disk(run: Path, flags: list[str], log: Path, limit: int) -> bool:
    """Whether a run whose files may have `limit` bytes ends with a word on the full disk."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = ended(child(["--out", str(run), *flags], log, prepare))
    said = code == 2 and "could not be written" in log.read_text(encoding="utf-8")
    if not said:
        print(f"  with files of at most {limit} bytes {run} ended with {code}, without that word")
    return said


def flipped_bytes(run: Path, rng: random.Random) -> dict[Path, bytes]:
    """Damage the newest checkpoint -> the files of the older ones, which must stay as they are."""
    newest = checkpoints.newest_checkpoint(run)
    victim = newest / rng.choice(("policy.safetensors", "optimizer.safetensors", "state.json"))
    content = bytearray(victim.read_bytes())
    for _ in range(3):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(content)
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if newest not in path.parents}


def faults(name: str, flags: list[str], folder: Path, times: int) -> int:
    """Files that differ after a full disk and after a damaged checkpoint."""
    rng, wrong, whole = random.Random(f"faults {name}"), 0, folder / "whole"
    newest = checkpoints.newest_checkpoint(whole)
    largest = max(path.stat().st_size for path in newest.iterdir())
    for number in range(times):
        # A log of its own: the limit is for it too.
        run, log = folder / f"fault-{number}", folder / f"fault-{number}.log"
        wrong += not full_disk(run, flags, log, rng.randrange(20_000, largest))
        finish(run, flags, log)
        older = flipped_bytes(run, rng)
        (run / "eval.json").unlink()
        finish(run, flags, log)
        wrong += len(differences(run, whole))
        wrong += sum(path.exists() and path.read_bytes() != old for path, old in older.items())
        shutil.rmtree(run)
    return wrong


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=50, help="of each study")
    p.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    p.add_argument("--faults", type=int, default=3, help="full disks, flipped bytes, a study")
    args = p.parse_args()
    totals, wrong_after_faults = [0, 0, 0], 0
    with tempfile.TemporaryDirectory() as work:
        pid = os.fork()  # the parent itself must not start torch's threads: forks would hang
        if not pid:
            make_models(Path(work))
            os._exit(0)
        if ended(pid):
            raise SystemExit("the models could not be made")
        for name in args.studies:
            folder = Path(work) / f"study-{name}"
            folder.mkdir()
            model = f"{work}/{'images' if name == 'images' else 'text'}"
            flags = [*COMMON, *STUDIES[name].split(), "--model", model]
            found = study(name, flags, folder, args.kills)
            print("{}: kills {}, resumes {}, differences {}".format(name, *found), flush=True)
            totals = [a + b for a, b in zip(totals, found)]
            wrong = faults(name, flags, folder, args.faults)
            said = f"{args.faults} full disks, {args.faults} damaged checkpoints"
            print(f"{name}: {said}, {wrong} differences", flush=True)
            wrong_after_faults += wrong
    print("kills {}, resumes {}, differences {}".format(*totals))
    too_few = totals[0] < args.kills * len(args.studies)
    raise SystemExit(totals[2] > 0 or wrong_after_faults > 0 or too_few)


if __name__ == "__main__":
    main()
