"""Writes the numbers of README.md and docs/: tables from benchmarks/results/*.json, lines of files.

    python benchmarks/tables.py            # writes; with --check it only fails where they differ

A table stands between `<!-- NAME table ... -->` and `<!-- /NAME table -->`, where NAME is a row of
RESULTS. Between the marks of the `files` table only the number of lines is written.
"""

import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.student import decided, figure
from benchmarks.student import interval as student

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# ------------------------------------------------------------------------------------------ cells
def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def span(values: list[float], form: str) -> str:
    """0.23 to 0.26, or 0.23 where they are all alike"""
    ends = dict.fromkeys(f"{end:{form}}" for end in (min(values), max(values)))
    return " to ".join(ends)


def interval(value: float, low: float, high: float, form: str = ".3f") -> str:
    """0.977 [0.953, 0.989]; without an interval where there is none"""
    if low != low:  # NaN, of a single seed
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


# ------------------------------------------------------------------------- one function a result
class Study:
    """The rows of demo.json by arm: figures over the seeds."""

    def __init__(self, found: dict):
        self.rows = found["rows"]

    def of(self, arm: str, place: str, name: str) -> dict[int, float]:
        """seed -> the figure `name` on the vignettes `place`."""
        return {row["seed"]: row[place][name] for row in self.rows if row["arm"] == arm}

    def best(self, kind: str) -> str:
        """Of a kind's learning rates the one with the highest mean accuracy on dev."""
        arms = {row["arm"]: None for row in self.rows if row["arm"].startswith(f"{kind},")}
        return max(arms, key=lambda arm: mean(self.of(arm, "dev", "accuracy")))

    def cell(self, arm: str, place: str, name: str, form: str = ".3f") -> str:
        return interval(*student(list(self.of(arm, place, name).values())), form)

    def difference(self, arm: str, other: str, place: str) -> str:
        """Of greedy accuracies, paired by seed."""
        a, b = (self.of(name, place, "accuracy") for name in (arm, other))
        return interval(*student([a[seed] - b[seed] for seed in a if seed in b]), "+.3f")

    def seconds(self, arm: str) -> float:
        return mean({row["seed"]: row["cpu_seconds"] for row in self.rows if row["arm"] == arm})


def mean(of_seed: dict[int, float]) -> float:
    return sum(of_seed.values()) / len(of_seed)


def demo(found: dict) -> str:
    study = Study(found)
    answers, rationales = study.best("sft, answers"), study.best("sft, rationales")
    arms = {
        "start": "the start",
        answers: f"SFT on answers (lr {answers.split(', ')[2]})",
        rationales: f"SFT with rationales (lr {rationales.split(', ')[2]})",
        "grpo": "GRPO",
        "dapo": "DAPO",
        "ppo": "PPO",
    }
    header = ["trained by", "seeds", "sampled", "greedy", "longer courses, sampled", "greedy"]
    header += ["words of thinking", "right with the true steps", "CPU seconds"]
    rows = []
    for arm, told in arms.items():
        row = [told, len(study.of(arm, "fresh", "n"))]
        row += [study.cell(arm, "fresh", f"{how}accuracy") for how in ("sampled_", "")]
        row += [study.cell(arm, "longer", f"{how}accuracy") for how in ("sampled_", "")]
        thinks = arm not in (answers, "start")
        row += [f"{mean(study.of(arm, 'fresh', 'think_words')):.1f}"]
        row += [f"{mean(study.of(arm, 'fresh', 'faithful')):.3f}" if thinks else ""]
        row += [f"{study.seconds(arm):.0f}" if arm != "start" else ""]
        rows.append(row)
    against = [f"{place} {study.difference('grpo', answers, where)}" for place, where in PLACES]
    upper = [f"{place} {study.difference('grpo', rationales, where)}" for place, where in PLACES]
    kind = "sft, rationales"
    by_rate = dict.fromkeys(row["arm"] for row in found["rows"] if row["arm"].startswith(kind))
    rates = [f"{arm.split(', ')[2]} {study.cell(arm, 'longer', 'accuracy')}" for arm in by_rate]
    explained = [row["explained_variance_best5"] for row in found["rows"] if row["arm"] == "ppo"]
    return (
        f"{table(header, rows)}\n\nMeans over seeds with Student's 95% intervals, on "
        f"{found['rows'][0]['fresh']['n']} fresh vignettes of two to four results and as many of "
        "five and six. GRPO minus SFT on answers, greedy, paired by seed: "
        f"{'; '.join(against)}; minus SFT with rationales: {'; '.join(upper)}. Rates were "
        "chosen on held-out courses of two to four results; on longer ones SFT with rationales "
        f"comes, greedy, to {', '.join(rates)}. CPU seconds of GRPO hold the warm start, the "
        "others begin at the same. PPO's critic explains up to "
        f"{span(explained, '.2f')} of the variance. {found['machine']}. Commit {found['commit']}."
    )


PLACES = (("in distribution", "fresh"), ("longer", "longer"))


def hack(found: dict) -> str:
    study = Study(found)
    header = ["", "reward, last five steps", "accuracy in training", "test, greedy"]
    header += ["longer courses, greedy", "words of thinking", "alarms"]
    rows = []
    for arm, told in (("hack", "`--hackable referral`"), ("guard", "with the guard")):
        runs = [run for run in found["rows"] if run["arm"] == arm]
        row = [told, span([run["train_reward"][1] for run in runs], ".2f")]
        row += [span([run["train_accuracy"] for run in runs], ".2f")]
        row += [study.cell(arm, place, "accuracy") for place in ("fresh", "longer")]
        row += [f"{mean(study.of(arm, 'fresh', 'think_words')):.1f}"]
        row += [f"in {sum(bool(run['alarms']) for run in runs)} of {len(runs)} runs"]
        rows.append(row)
    difference = study.difference("guard", "hack", "fresh")
    return (
        f"{table(header, rows)}\n\nGuard minus hack on test, greedy, paired by seed: {difference}."
    )


def real(found: dict) -> str:
    parts = []
    for model in ("qwen", "smollm2"):
        runs = [run for run in found[model]["rows"] if len(run["formed"]) >= 10]
        if not runs:  # with fewer steps the first five are the last five too
            continue
        header = ["run", "steps", "well formed, first five steps", "last five steps"]
        header += ["accuracy, first and last five"]
        told = {"reward": "reward", "part_truncated": "cut at the limit"}
        told = {name: what for name, what in told.items() if f"{name}_first" in runs[0]}
        rows = []
        for run in runs:
            first, last = run["formed_first"], run["formed_last"]
            row = [run.get("algo") or f"seed {run['seed']}", len(run["formed"])]
            row += [interval(x["share"], *x["ci95"], ".2f") for x in (first, last)]
            for name in ("accuracy", *told):
                row.append(f"{run[f'{name}_first']:.2f}, {run[f'{name}_last']:.2f}")
            rows.append(row)
        parts += [found[model]["text"], table([*header, *told.values()], rows)]
    return "\n\n".join(parts)


def prompts(found: dict) -> str:
    header = ["model, template, style, wording", "questions", "well formed", "read"]
    header += ["well formed and read", "right", "tokens", "cut"]
    rows = []
    for part, split in (("screen", "train"), ("cells", "test")):
        for cell, x in found[part].items():
            row = [cell, f"{x['n']} of {split}", *(f"{x[k]:.2f}" for k in ("well_formed", "read"))]
            row += [interval(x["sound"], *x["sound_ci95"], ".2f"), f"{x['right']:.2f}"]
            rows.append([*row, f"{x['tokens']:.0f}", f"{x['cut']:.2f}"])
    return table(header, rows)


def eval_speed(found: dict) -> str:
    header = ["model", "items a CPU second, prompts read together", "in batches of one length"]
    rows = []
    for name, x in found["models"].items():
        row = [name, f"{x['n'] / statistics.median(x['seconds']['together']):.3f}"]
        for way in ("ordered", "in parts"):
            turns = ", ".join(f"{ratio:.2f}" for ratio in x[way]["ratios"])
            row.append(f"{x[way]['ratio']:.2f} times ({turns})")
        rows.append(row)
    x = next(iter(found["models"].values()))
    return (
        f"{table([*header, 'few at a time'], rows)}\n\n{x['n']} MedQA questions, think prompt, "
        f"{x['max_new']} new tokens at most, {found['threads']} CPU thread; medians, and turn by "
        "turn. GPU: not measured."
    )


def vision(found: dict) -> str:
    header = ["", "tokens a pass", "vision tower runs", "seconds a step", "peak memory"]
    rows = []
    for side, peer in (("once per group", ""), ("once per sample", "peer_")):
        row = [
            side,
            found[f"{peer}tokens"],
            found[f"{peer}tower_runs"],
            f"{found[f'{peer}seconds']:.1f}",
            f"{found[f'{peer}peak_gb']:.2f} GB",
        ]
        rows.append(row)
    pairs = ", ".join(f"{ratio:.1f}" for ratio in found["ratios"])
    return (
        f"{table(header, rows)}\n\n"
        f"**{found['ratio']:.1f} times** faster (median; pairs {pairs}). {found['model']}, "
        f"{found['prompts']} BCCD photographs of {found['image_tokens'][0]} image tokens, "
        f"{found['samples']} samples of {found['max_new']} tokens, {found['threads']} CPU threads, "
        "fp32. GPU: not measured."
    )


def decoding(found: dict) -> str:
    header = ["a token step of 3B, 16 prompts x 8 samples", "kernels", "host waits a token"]
    header += ["estimate for an H100", "of its bandwidth limit"]
    rows = []
    for when, launched in (("before", "launched one by one"), ("now", "as a CUDA graph")):
        for kind in ("adapters", "adapters_off"):
            count = found[when][kind]
            row = [f"{kind.replace('_', ' ')}, {launched}", f"{count['kernels']:,}"]
            row += [f"{found[when]['waits_a_token']:.3f}", f"{count['estimated_ms']:.1f} ms"]
            rows.append([*row, f"{count['share_of_limit']:.0%}"])
    return (
        f"{table(header, rows)}\n\nKernels counted on the meta device, waits on a simulated one. "
        "The estimate is the larger of bytes / 3.35 TB/s and kernels x 2 us in a graph, x 5 us one "
        "by one; not measured. On a CPU of one thread the same loop writes "
        f"{found['now']['speed_ratio']:.2f} times as many tokens a second as before."
    )


def card_memory(found: dict) -> str:
    header = ["Qwen2.5-3B", "phase", "table", "simulated peak", "difference"]
    rows = []
    for case, phases in found["cases"].items():
        for phase in ("sampling", "evaluation", "update"):
            if of_phase := phases.get(phase):
                sizes = [f"{of_phase[key]:.1f} GB" for key in ("table_gb", "measured_gb")]
                rows.append([case, phase, *sizes, f"{of_phase['off']:+.1%}"])
    return table(header, rows)


MEASURED = {  # of vs_trl.json: what is measured, and the other side
    "step": ("whole step", "TRL"),
    "in_sampling": ("of it sampling", "TRL"),
    "memory": ("peak memory", "TRL"),
    "step_completions": ("whole step", "TRL, its head on completions only"),
    "step_by_prompt": ("whole step, one prompt a pass", "TRL, likewise"),
    "memory_by_prompt": ("peak memory, one prompt a pass", "TRL, likewise"),
    "sampling": ("sampling alone", "Hugging Face `generate`"),
    "scoring": ("log-probs and backward alone", "replicated prompts"),
}


def trl(found: dict) -> str:
    rows = []
    for key, (what, peer) in MEASURED.items():
        measured = found["step"]["in_sampling"] if key == "in_sampling" else found.get(key)
        if measured is None:
            continue
        unit, form = ("gb", "GB") if key.startswith("memory") else ("seconds", "s")
        pairs = ", ".join(f"{ratio:.1f}" for ratio in measured["ratios"])
        row = [
            what,
            f"{measured[unit]:.1f} {form}",
            f"{peer}: {measured[f'peer_{unit}']:.1f} {form}",
            f"**{measured['ratio']:.1f}** ({pairs})",
        ]
        rows.append(row)
    commits = found.get("commits", {"all": found["commit"]})
    at = "; ".join(f"{what} at commit {commit[:7]}" for what, commit in commits.items())
    shortest, longest = min(found["prompt_tokens"]), max(found["prompt_tokens"])
    caption = (
        f"{found['model']}, {found['prompts']} prompts of {shortest} to {longest} tokens x "
        f"{found['samples']} samples x {found['max_new']} tokens, {found['threads']} CPU threads, "
        f"fp32; trl {found['trl']}, transformers {found['transformers']}, torch {found['torch']}; "
        f"{found['machine']}; {at}, {found['date']}. GPU: not measured."
    )
    parts = [table(["", "ours", "the other", "ratio (median; pair by pair)"], rows), caption]
    if found.get("head"):
        heads = [
            f"{h['vocabulary']:,} x {h['length']:,}: {h['gb']:.2f} / {h['peer_gb']:.2f}"
            for h in found["head"]
        ]
        parts.append(
            "Memory of the head's pass above 16 tokens' (vocabulary x tokens: ours / full logits, "
            f"GB): {'; '.join(heads)}."
        )
    return "\n\n".join(parts)


TOLD = {  # figures of an augmentation's arm
    "start, sampled_accuracy": "start, sampled",
    "sampled_accuracy": "sampled",
    "accuracy": "greedy",
    "off_by_one": "one grade off, greedy",
    "kappa": "kappa, greedy",
    "dev_kappa over the steps": "kappa on dev, over the steps",
    "accuracy over the steps": "sampled in training, over the steps",
    "part_recite over the steps": "BLEU, over the steps",
    "think_words over the steps": "words of thinking, over the steps",
}


def augmentation(found: dict) -> str:
    """One row an arm: means over seeds; then each question with its verdict."""
    setting, rows = found["setting"], []
    arms = dict.fromkeys(row["arm"] for row in found["rows"])
    for arm in arms:
        of_arm = [row for row in found["rows"] if row["arm"] == arm]
        cells = []
        for name in setting["figures"]:
            known = not name.endswith("steps") or of_arm[0]["curves"].get(name.split()[0])
            values = [figure(row, name) for row in of_arm] if known else []
            cells.append(interval(*student(values)) if values else "")  # sft samples nothing
        rows.append([arm, len(of_arm), *cells])
    header = ["", "seeds", *(TOLD[name] for name in setting["figures"])]
    lines = []
    for question in setting["questions"]:
        answer = decided(found["rows"], question, len(found["seeds"]))
        lines.append(
            f"- {question['asks']} **{answer['verdict'].capitalize()}**: {answer['arm']} minus "
            f"{answer['control']}, {TOLD[answer['figure']]}, "
            f"paired by seed: {interval(*answer['difference'], '+.3f')}."
        )
    return table(header, rows) + "\n\n" + "\n".join(lines)


RESULTS = {  # table: its file in benchmarks/results, its function
    "demo": ("demo", demo),
    "hack": ("demo", hack),
    "decoding": ("decoding", decoding),
    "memory": ("memory_table", card_memory),
    "real": ("real", real),
    "prompts": ("prompts", prompts),
    "evaluation": ("eval_speed", eval_speed),
    "vision": ("vision_step", vision),
    "trl": ("vs_trl", trl),
    **{name: (f"augmentation_{name}", augmentation) for name in ("fuzzy", "grades", "outlines")},
}


# ------------------------------------------------------------------------------- lines of files
def lines_of(path: Path) -> int:
    """The lines of a file, or of all files of a folder that are code of ours."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in (".py", ".css", ".js")]
        return sum(map(lines_of, files))
    return len(path.read_text(encoding="utf-8").splitlines())


def counted(rows: str) -> str:
    """The second cell of each row whose first names a file or folder, to the nearest ten."""

    def with_lines(found: re.Match) -> str:
        return f"| `{found[1]}` | {round(lines_of(ROOT / found[1]), -1):,} |"

    return re.sub(r"^\| `([\w/.]+)` \|[ \d,]*\|", with_lines, rows, flags=re.M)


# ----------------------------------------------------------------------------------------- pages
def marked(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name} table[^>]*-->\n)(.*?)(<!-- /{name} table -->)", re.S)


def written(text: str) -> str:
    """A page with the tables that it has marks for."""
    for name, (file, render) in RESULTS.items():
        if marked(name).search(text):
            path = ROOT / "benchmarks" / "results" / f"{file}.json"
            rendered = render(json.loads(path.read_text(encoding="utf-8")))
            text = marked(name).sub(lambda m, new=rendered: f"{m[1]}{new}\n{m[3]}", text)
    return marked("files").sub(lambda m: m[1] + counted(m[2]) + m[3], text)


def main() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name in (*RESULTS, "files"):
        places = sum(len(marked(name).findall(text)) for text in texts.values())
        if places != 1:
            raise SystemExit(f"tables.py: the {name} table has {places} places, not one")
    stale = [page for page, text in texts.items() if written(text) != text]
    if "--check" not in sys.argv:
        for page in stale:
            page.write_text(written(texts[page]), encoding="utf-8")
    elif stale:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        raise SystemExit(f"{names}: not the numbers of today: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
