"""Runs the commands of README.md, CONTRIBUTING.md and docs/, in small, with their exit codes.

    python .ci/readme.py SHARED --work FOLDER      # SHARED holds the sample data, FOLDER is empty

What a GPU or a network would be needed for runs on a random model of 0.09 million weights and the
sample data, a step or two of it. A command that no rule below knows fails: whoever adds one to a
page says here how it can be tried.
Each command is a process of its own, but forked from this one, which has imported torch and
transformers: that import takes longer than most of the commands.
"""

import argparse
import json
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("walkthrough", "algorithms", "images", "prompt_once", "studies", "runs")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / f"docs/{p}.md" for p in ORDER)]

FEW = "--steps 2 --prompts 2 --samples 2 --max-new 8 --eval-limit 2"
TEXT = f"{FEW} --template plain --data-dir SHARED --model TEXT"
SIGHT = f"{FEW} --model tiny-vl --eval-every 1"
SHORT = "--steps 2 --eval-limit 4 --model TEXT --template plain"
RULES = [  # (what a command looks like, the flags added to it); the first that fits
    (r"--hackable", "--dry-run"),  # the slow tests train it
    (r"train\.py$", ""),  # the demo, in full
    (r"train\.py --recipe med-rlvr --algo sft", f"{TEXT} --samples 1 --max-prompt 4096"),
    (r"train\.py --recipe v-rft --algo sft", f"{SIGHT} --samples 1 --data-dir MEDMNIST"),
    (
        r"train\.py --recipe med-rlvr --full",
        f"{TEXT} --samples 1 --minibatches 2 --max-prompt 4096",
    ),
    (
        r"train\.py --recipe med-rlvr",
        f"{TEXT} --samples 1 --minibatches 2 --max-prompt 4096 --out runs/medqa-ppo-1",
    ),
    (r"train\.py --recipe .* --dataset bccd", SIGHT),
    (r"train\.py --recipe", f"{SIGHT} --data-dir MEDMNIST"),
    (r"train\.py --dataset medqa", f"{TEXT} --max-prompt 4096"),
    (r"support\.pass_rates|--dataset mixed", "--help"),  # a random model is never right
    (r"train\.py --dataset bccd .*--model tiny-vl", ""),
    (r"train\.py --dataset demo-images", f"{SIGHT} --samples 4"),
    (r"train\.py --resume", ""),
    (r"train\.py --model runs/demo-grpo-1/model", "--steps 2 --eval-limit 4"),
    (r"train\.py --out runs/no-steps", "--dry-run"),
    (r"train\.py --(algo|scale|samples|kl-coef|reward)", SHORT),
    (r"eval\.py (runs/medqa-grpo-1|MODEL)", "--limit 2 --data-dir SHARED --max-new 8"),
    (r"eval\.py runs/sft runs/rl", "--limit 8"),
    (r"eval\.py (runs/boxes|RUN)", "--limit 2"),
    (r"eval\.py runs/(cells|demo)", ""),
    (r"(grpo|rewards|data)\.py$|^python -c|support\.report", ""),
    (r"^torchrun", f"{FEW} --model TEXT --template plain"),
    (r"benchmarks/gpu\.py", ""),  # skips itself without a GPU
    (r"benchmarks/tables\.py", "--check"),
    (r"benchmarks/\w+\.py", "--help"),  # of minutes
]
ELSEWHERE = r"pip install|-m pytest|^ruff"  # .ci/run has these
STANDS_FOR = {
    "RUN": "runs/retinamnist-grpo-1",
    "MODEL": "TEXT",
    "DIR": "SHARED",
    "A": "grpo",
    "F": "f.json",
    "FOLDER": "folder",
    "QUESTION": "What is it? A. This B. That",
}


def commands() -> list[str]:
    """Of all pages, each once: bash blocks without comments, and inline code that is a command."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            lines = (re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines())
            found += [line.rpartition("&& ")[2] for line in lines if line]
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        inline = re.findall(r"`((?:python|torchrun) [^`]+)`", prose)
        found += [" ".join(command.split()) for command in inline]
    return list(dict.fromkeys(found))


def way(command: str) -> str | None:
    """The flags with which a command is tried, "elsewhere", or None where no rule knows it."""
    if re.search(ELSEWHERE, command):
        return "elsewhere"
    return next((flags for pattern, flags in RULES if re.search(pattern, command)), None)


def in_small(command: str, flags: str, folders: dict[str, Path]) -> list[str]:
    """The words of a command after `python`, with the flags added and every folder a real one.

    Of two of the same flag the later one holds. What the command says itself is not said again,
    unless a placeholder stands there.
    """
    words = shlex.split(command)
    for flag, value in dict(re.findall(r"(--[\w-]+)(?: ((?!--)\S+))?", flags)).items():
        if flag not in words:
            words += [flag, value] if value else [flag]
        elif words[words.index(flag) + 1] in ("DIR", "MODEL"):
            words[words.index(flag) + 1] = value
    if "--export" in words:
        words[words.index("--export") + 1] = "exported"
    words = [STANDS_FOR.get(word, word.replace("RUN/", STANDS_FOR["RUN"] + "/")) for word in words]
    words = [str(folders.get(word, word)) for word in words]
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    return ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]


def python(words: list[str], folder: Path, log: Path) -> None:
    """What `python WORDS` does in the root of the repository, but it writes into `folder`."""
    os.chdir(folder)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[0] = str(ROOT)
    if words[0] == "-c":
        sys.argv = ["-c"]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def forked(target, *args) -> int:
    """The exit code of a function, in a child of this process."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def import_once() -> None:
    """What all commands import. None of ours, and no tensor: threads do not survive a fork."""
    from transformers import AutoTokenizer  # noqa: F401, PLC0415 (--help need not wait for it)
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401, PLC0415 (as above)
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401, PLC0415 (as above)


def make_tiny(model: Path, medmnist: Path) -> None:
    """A model and a data set in the layouts of the real ones."""
    import numpy as np  # noqa: PLC0415 (in the child)

    sys.path[0] = str(ROOT)
    from support.demo_model import demo_policy  # noqa: PLC0415 (in the child)

    demo_policy(0).save_folder(model)
    medmnist.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (10, 28, 28, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 5, (10, 1))
    np.savez(medmnist / "retinamnist.npz", **arrays)


def learned(run: Path) -> bool:
    """What the README says of the demo."""
    found = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    before, after = found["before"]["sampled_accuracy"], found["after"]["sampled_accuracy"]
    return before <= 0.35 and after >= 0.85 and found["after"]["n"] >= 200


def tried(command: str, folders: dict[str, Path], work: Path) -> bool:
    flags = way(command)
    if flags == "elsewhere":
        print(f"   -  {command}", flush=True)
        return True
    if flags is None:
        print(f"   ?  {command}   no rule in .ci/readme.py says how to try it", flush=True)
        return False
    words, log, start = in_small(command, flags, folders), work / "log", time.perf_counter()
    code = forked(python, words, work, log)
    print(f"{code:4d}  {command}   ({time.perf_counter() - start:.0f} s)", flush=True)
    if code:
        last = log.read_text(encoding="utf-8").splitlines()[-12:]
        print("\n".join(f"      {line}" for line in [shlex.join(words), *last]), flush=True)
    if command == "python train.py" and not code and not learned(work / "runs" / "demo-grpo-1"):
        print("      the demo has not learned: see eval.json", flush=True)
        return False
    return code == 0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("shared", type=Path, help="folder with the sample data")
    p.add_argument("--work", type=Path, required=True, help="an empty folder to run in")
    p.add_argument("--only", default="", metavar="REGEX", help="only commands like this")
    args = p.parse_args()
    work = args.work.resolve()
    folders = {"TEXT": work / "model", "MEDMNIST": work / "medmnist"}
    folders["SHARED"] = args.shared.resolve()
    import_once()
    if not folders["TEXT"].exists() and forked(make_tiny, *list(folders.values())[:2]):
        raise SystemExit("the tiny model could not be made")
    chosen = [command for command in commands() if re.search(args.only, command)]
    failed = sum(not tried(command, folders, work) for command in chosen)
    raise SystemExit(f"{failed} commands failed" if failed else 0)


if __name__ == "__main__":
    main()
