"""Runs killed at any moment and resumed, against one that was never disturbed: weights, optimiser, metrics, rollouts and evaluation, byte for byte.

    python benchmarks/kill_test.py [--kills 50] [--studies grpo ppo images]

Half of the kills (SIGKILL) come at a random time, a quarter in the middle of writing a checkpoint, a quarter between two optimiser steps of one rollout. Every
run is a forked process, so that 150 of them need no 150 imports. Then the disk fills up (RLIMIT_FSIZE), and bytes of the newest checkpoint are flipped.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import demo
import runs
import torch
import train

COMMON = "--steps 8 --prompts 4 --samples 4 --eval-limit 8 --eval-samples 1 --eval-every 3 --save-every 2 --keep 2 --max-new 12 --kl-coef 0.02"
STUDIES = {"grpo": "--updates 2 --minibatches 2", "ppo": "--algo ppo --critic lora --no-full --lora 4 --updates 2 --minibatches 2 --critic-warmup 2",
           "images": "--dataset demo-images --task localize --updates 2 --max-new 8 --box-reward tighten --tau 0.01"}


def make_models(folder: Path) -> dict[str, str]:
    """Random models, not even warm: what they say does not matter here."""
    torch.set_num_threads(1)
    demo.demo_policy(0).save_folder(folder / "text")
    items = data.load("demo-images", "train", limit=200, task="localize")
    demo.tiny_vl_policy(0, [data.messages(item)[1]["content"] + data.completion(item) for item in items]).save_folder(folder / "images")
    return {"grpo": str(folder / "text"), "ppo": str(folder / "text"), "images": str(folder / "images")}


def child(arguments: list[str], log: Path, prepare=lambda: None) -> int:
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
        os._exit(2)                                                           # a forked child must never return into its parent's code, which would tidy up the folder


def ended(pid: int) -> int:
    """0, an exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(owner, name: str, call: int):
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
    return ["--resume", str(run)] if (run / "run.json").exists() else ["--out", str(run), *flags]


def differences(run: Path, whole: Path) -> list[str]:
    """Files whose bytes differ. run.json, timing.jsonl and report.html, which has the run's name in it, are not functions of the run alone."""
    names = [str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.name not in ("timing.jsonl", "run.json", "report.html")]
    return [name for name in names if not (run / name).is_file() or not filecmp.cmp(run / name, whole / name, shallow=False)]


def appeared(path: Path) -> None:
    for _ in range(12_000):
        if path.exists():
            return
        time.sleep(.01)
    raise SystemExit(f"{path} did not appear within two minutes")


def whole_run(folder: Path, flags: list[str]) -> tuple[Path, float]:
    """An undisturbed run, and the seconds from its run.json to its end."""
    run = folder / "whole"
    pid = child(["--out", str(run), *flags], folder / "log")
    appeared(run / "run.json")
    start = time.perf_counter()
    if ended(pid):
        raise SystemExit((folder / "log").read_text(encoding="utf-8")[-2000:])
    return run, time.perf_counter() - start


def killed(run: Path, flags: list[str], log: Path, rng: random.Random, seconds: float) -> bool:
    """One start or resumption with a kill in it; False where the run ended first."""
    kind = rng.choice(("time", "time", "checkpoint", "update"))
    prepare = {"time": lambda: None, "checkpoint": lambda: die_at(runs, "save_file", rng.randint(1, 3)), "update": lambda: die_at(torch.optim.AdamW, "step", rng.randint(1, 7))}[kind]
    pid = child(arguments_of(run, flags), log, prepare)
    if kind == "time":
        appeared(run / "run.json")
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"{run} ended with {code}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return code != 0


def finish(run: Path, flags: list[str], log: Path) -> None:
    if code := ended(child(arguments_of(run, flags), log)):
        raise SystemExit(f"{run} ended with {code}:\n{log.read_text(encoding='utf-8')[-2000:]}")


def study(name: str, flags: list[str], folder: Path, kills: int) -> tuple[int, int, int]:
    """kills, resumptions and files that differ."""
    rng, done, resumed, wrong, number = random.Random(f"kill {name}"), 0, 0, 0, 0
    whole, seconds = whole_run(folder, flags)
    while done < kills:
        run, number = folder / f"run-{number}", number + 1
        while done < kills and killed(run, flags, folder / "log", rng, seconds):
            done, resumed = done + 1, resumed + 1                             # whatever follows on a kill is a resumption: the loop's next round, or `finish`
        finish(run, flags, folder / "log")
        found = differences(run, whole)
        wrong += len(found)
        print(f"  {name}: {done} kills so far" + (f", different: {', '.join(found)}" if found else ""), flush=True)
        shutil.rmtree(run)
    return done, resumed, wrong


def faults(name: str, flags: list[str], folder: Path, times: int) -> int:
    """Files that differ after the disk filled up while a checkpoint was written, and after bytes of the newest checkpoint were flipped."""
    rng, wrong = random.Random(f"faults {name}"), 0
    whole = folder / "whole"
    largest = max(path.stat().st_size for path in runs.newest_checkpoint(whole).iterdir())
    for number in range(times):
        run, log = folder / f"fault-{number}", folder / f"fault-{number}.log"             # a log of its own: the limit is for it too
        limit = rng.randrange(20_000, largest)
        code = ended(child(["--out", str(run), *flags], log, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        full = code == 2 and "could not be written" in log.read_text(encoding="utf-8")
        if not full:
            print(f"  {name}: with files of at most {limit} bytes the run ended with {code}, not with a word on the full disk")
            wrong += 1
        finish(run, flags, log)
        newest = runs.newest_checkpoint(run)
        victim = newest / rng.choice(("policy.safetensors", "optimizer.safetensors", "state.json"))
        content = bytearray(victim.read_bytes())
        for _ in range(3):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
        older = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file() and newest not in path.parents}
        (run / "eval.json").unlink()
        finish(run, flags, log)
        wrong += len(differences(run, whole)) + sum(path.exists() and path.read_bytes() != content for path, content in older.items())
        shutil.rmtree(run)
    return wrong


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=50, help="of each study")
    p.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    p.add_argument("--faults", type=int, default=3, help="full disks and flipped bytes, of each study")
    args = p.parse_args()
    totals, wrong_after_faults = [0, 0, 0], 0
    with tempfile.TemporaryDirectory() as work:
        pid = os.fork()                                                       # the parent itself must not start torch's threads: forks would hang
        if not pid:
            make_models(Path(work))
            os._exit(0)
        if ended(pid):
            raise SystemExit("the models could not be made")
        for name in args.studies:
            folder = Path(work) / f"study-{name}"
            folder.mkdir()
            flags = [*COMMON.split(), *STUDIES[name].split(), "--model", f"{work}/{'images' if name == 'images' else 'text'}"]
            found = study(name, flags, folder, args.kills)
            print("{}: kills {}, resumes {}, differences {}".format(name, *found), flush=True)
            totals = [a + b for a, b in zip(totals, found)]
            wrong = faults(name, flags, folder, args.faults)
            print(f"{name}: {args.faults} full disks, {args.faults} damaged checkpoints, {wrong} differences", flush=True)
            wrong_after_faults += wrong
    print("kills {}, resumes {}, differences {}".format(*totals))
    raise SystemExit(totals[2] > 0 or wrong_after_faults > 0 or totals[0] < args.kills * len(args.studies))


if __name__ == "__main__":
    main()
