"""Runs the README's commands, each in its own words but for folders and sizes, in one empty folder, and prints every command with its exit code.

    python .ci/readme.py SHARED --work FOLDER          # SHARED holds the sample data, FOLDER is empty

What a GPU or a network would be needed for runs on a random model of 0.09 million weights and the sample data, a step or two of it. A command that no rule below
knows fails: whoever adds one to the README says here how it can be tried.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import demo

FEW = "--steps 2 --prompts 2 --samples 2 --max-new 8 --eval-limit 2"
TEXT = f"{FEW} --template plain --data-dir SHARED --model TEXT"
SIGHT = f"{FEW} --model tiny-vl --eval-every 1"
RULES = [                               # (what a command looks like, the flags added to it); the first that fits
    (r"^python train\.py$", ""),
    (r"train\.py --recipe med-rlvr --algo sft", f"{TEXT} --samples 1 --max-prompt 4096"),
    (r"train\.py --recipe v-rft --algo sft", f"{SIGHT} --samples 1 --data-dir MEDMNIST"),
    (r"train\.py --recipe med-rlvr", f"{TEXT} --samples 1 --minibatches 2 --max-prompt 4096 --out runs/medqa-ppo-1"),
    (r"train\.py --dataset medqa", f"{TEXT} --max-prompt 4096"),
    (r"train\.py --resume runs/medqa-grpo-1|train\.py --resume RUN --export", ""),
    (r"eval\.py (runs/medqa-grpo-1|MODEL)", "--limit 2 --data-dir SHARED --max-new 8"),
    (r"train\.py --(algo (sft|grpo|A)\b|scale|samples|kl-coef|reward)", "--steps 2 --eval-limit 8 --model TEXT --template plain"),
    (r"eval\.py runs/sft runs/rl", "--limit 8"),
    (r"train\.py --recipe (v-rft|vrft-aug)( --data-dir DIR --model DIR)?$", f"{SIGHT} --data-dir MEDMNIST"),
    (r"train\.py --recipe .* --dataset bccd", SIGHT),
    (r"eval\.py (runs/boxes|RUN)", "--limit 2"),
    (r"train\.py --dataset demo-images", "--steps 2 --eval-limit 8"),
    (r"--model tiny-vl|eval\.py runs/(cells|demo)", ""),
    (r"^python (grpo|rewards|data)\.py|^python -c|report\.py", ""),
    (r"^torchrun", f"{FEW} --model TEXT --template plain"),
    (r"benchmarks/gpu\.py", ""),        # skips itself without a GPU
    (r"benchmarks/tables\.py", "--check"),
]
ELSEWHERE = {                           # commands that are not run here, and why
    r"-m pytest|kill_test\.py|--hackable": "CI runs it itself",
    r"benchmarks/(vs_trl|vision_step|ablation|real|demo)\.py": "a benchmark of many minutes: --help only",
}


def commands(text: str) -> list[str]:
    """The commands of the bash blocks, without comments, and those in backticks that begin with python or torchrun."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines = [line.rpartition("&& ")[2] for line in lines if line and not line.startswith("#")]
    inline = [" ".join(found.split()) for found in re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    return list(dict.fromkeys(lines + inline))


def tiny_data(work: Path) -> dict[str, Path]:
    """Models and data of the real layouts: what TEXT and MEDMNIST stand for."""
    demo.demo_policy(0).save_folder(work / "model")
    (work / "medmnist").mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (10, 28, 28, 3), dtype=np.uint8) for part in ("train", "val", "test")}
    np.savez(work / "medmnist" / "retinamnist.npz", **arrays, **{f"{part}_labels": rng.integers(0, 5, (10, 1)) for part in ("train", "val", "test")})
    return {"TEXT": work / "model", "MEDMNIST": work / "medmnist"}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("shared", type=Path, help="folder with the sample data")
    p.add_argument("--work", type=Path, required=True, help="an empty folder to run in")
    p.add_argument("--skip", type=int, default=0, metavar="N", help="go on after the first N commands, in a folder where they have run")
    args = p.parse_args()
    folders = {"TEXT": args.work / "model", "MEDMNIST": args.work / "medmnist", "SHARED": args.shared.resolve()} if args.skip else tiny_data(args.work) | {"SHARED": args.shared.resolve()}
    failed = 0
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8"))[args.skip:]:
        why = next((reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, command)), None)
        rule = next((flags for pattern, flags in RULES if re.search(pattern, command)), None)
        if why == "CI runs it itself":
            print(f"   -  {command}   ({why})", flush=True)
            continue
        if rule is None and not why:
            print(f"   ?  {command}   no rule in .ci/readme.py says how to try it", flush=True)
            failed += 1
            continue
        words = shlex.split(command)
        if why:
            words = [*words[:2], "--help"]
        else:
            extra = shlex.split(rule)
            given = {word for word in words if word.startswith("--")}
            for i, word in enumerate(extra):                                  # what the command says itself is not said again, unless DIR stands for it
                if word.startswith("--") and (word not in given or words[words.index(word) + 1] in ("DIR", "MODEL")):
                    if word in given:
                        words[words.index(word) + 1] = extra[i + 1]
                    else:
                        words += extra[i:i + 2] if i + 1 < len(extra) and not extra[i + 1].startswith("--") else [word]
        stands_for = {"MODEL": "TEXT", "RUN": "runs/retinamnist-grpo-1", "FOLDER": "folder", "F": "f.json", "QUESTION": "What is it? A. This B. That", "DIR": "SHARED", "A": "grpo"}
        words = [stands_for.get(word, word.replace("RUN/", f"{stands_for['RUN']}/")) for word in words]
        if "--export" in words:
            words[words.index("--export") + 1] = "exported"
        words = [str(folders.get(word, word)) for word in words]
        words = [str(ROOT / word) if re.fullmatch(r"(benchmarks/)?\w+\.py", word) else word for word in words]
        if words[0] == "torchrun":
            words = ["python", "-m", "torch.distributed.run", *words[1:]]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *words[1:]], cwd=args.work, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        print(f"{done.returncode:4d}  {command}   ({time.perf_counter() - start:.0f} s{', ' + why if why else ''})", flush=True)
        if done.returncode:
            failed += 1
            print("\n".join(f"      {line}" for line in [shlex.join(words), *(done.stdout + done.stderr).splitlines()[-12:]]), flush=True)
    raise SystemExit(f"{failed} commands of the README failed" if failed else 0)


if __name__ == "__main__":
    main()
