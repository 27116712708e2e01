"""Writes the README's tables from benchmarks/results/*.json: `python benchmarks/tables.py`; `--check` fails where they differ."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def demo(found: dict) -> str:
    rows = ["| `--algo` | steps | spoilt start: sampled | trained: sampled | greedy, and its interval for the lowest seed | minutes |", "|---|---|---|---|---|---|"]
    between = lambda values, form: f"{min(values):{form}} to {max(values):{form}}"
    for algo in dict.fromkeys(r["algo"] for r in found["rows"]):
        of = [r for r in found["rows"] if r["algo"] == algo]
        greedy, lowest = [r["after"]["accuracy"] for r in of], min((r["after"] for r in of), key=lambda after: after["accuracy"])
        rows.append(f"| {algo} | {of[0]['steps']} | {between([r['before']['sampled_accuracy'] for r in of], '.2f')} | **{between([r['after']['sampled_accuracy'] for r in of], '.3f')}** | "
                    f"{between(greedy, '.3f')} [{lowest['ci95'][0]:.3f}, {lowest['ci95'][1]:.3f}] | {between([r['seconds'] / 60 for r in of], '.1f')} |")
    best, clean = [r["explained_variance_best5"] for r in found["rows"] if "explained_variance_best5" in r], [r["clean"]["sampled_accuracy"] for r in found["rows"]]
    return "\n".join(rows) + (f"\n\nAccuracy on {found['rows'][0]['after']['n']} held-out vignettes, seeds {', '.join(sorted({str(r['seed']) for r in found['rows']}))}; 95% Wilson intervals; before it is spoilt the model samples "
                              f"{between(clean, '.3f')}. {found['machine']}. PPO's critic: explained variance up to {between(best, '.2f')} (best mean of five steps, by seed). Commit {found['commit']}.")


def compare(found: dict) -> str:
    rows = ["| trained by | greedy | sampled | maj@4 | pass@4 | same answer when options rotate |", "|---|---|---|---|---|---|"]
    cell = lambda value, ci: f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"
    for r in found["results"]:
        rows.append(f"| {Path(r['model']).name} | {cell(r['accuracy'], r['ci95'])} | {cell(r['sampled_accuracy'], r['sampled_ci95'])} | {r['maj_at_k']:.3f} | "
                    f"{r['pass_at_k']['4']:.3f} | {r['rotated_agreement']:.3f} |")
    lines = [f"{Path(c['b']).name} against {Path(c['a']).name}: {c['difference']:+.3f} [{c['difference_ci95'][0]:+.3f}, {c['difference_ci95'][1]:+.3f}], McNemar's p {c['mcnemar_p']:.2f}"
             for c in found["comparisons"]]
    return "\n".join(rows) + f"\n\n{'; '.join(lines)} (greedy, {found['comparisons'][0]['n']} items)."


def real(found: dict) -> str:
    rows = ["| seed | well formed, first five steps | last five steps | accuracy, first and last five |", "|---|---|---|---|"]
    share = lambda x: f"{x['share']:.2f} [{x['ci95'][0]:.2f}, {x['ci95'][1]:.2f}]"
    rows += [f"| {r['seed']} | {share(r['formed_first'])} | {share(r['formed_last'])} | {r['accuracy_first']:.2f}, {r['accuracy_last']:.2f} |" for r in found["rows"]]
    return found["text"] + "\n\n" + "\n".join(rows)


def vision(found: dict) -> str:
    rows = ["| | tokens a pass | vision tower runs | seconds a step | peak memory |", "|---|---|---|---|---|",
            f"| once per group | {found['tokens']} | {found['tower_runs']} | {found['seconds']:.1f} | {found['peak_gb']:.2f} GB |",
            f"| once per sample | {found['peer_tokens']} | {found['peer_tower_runs']} | {found['peer_seconds']:.1f} | {found['peer_peak_gb']:.2f} GB |"]
    return "\n".join(rows) + (f"\n\n**{found['ratio']:.1f} times** faster (median; pairs {', '.join(f'{x:.1f}' for x in found['ratios'])}). {found['model']}, {found['prompts']} BCCD photographs "
                              f"of {found['image_tokens'][0]} image tokens, {found['samples']} samples of {found['max_new']} tokens, {found['threads']} CPU threads, fp32. GPU: not measured.")


def trl(found: dict) -> str:
    names = {"step": ("whole step", "TRL"), "in_sampling": ("of it sampling", "TRL"), "memory": ("peak memory", "TRL"), "step_completions": ("whole step", "TRL, its head on completions only"),
             "step_by_prompt": ("whole step, one prompt a pass", "TRL, likewise"), "memory_by_prompt": ("peak memory, one prompt a pass", "TRL, likewise"), "sampling": ("sampling alone", "Hugging Face `generate`"), "scoring": ("log-probs and backward alone", "replicated prompts")}
    found = found | {"in_sampling": found["step"]["in_sampling"]}
    rows = ["| | ours | the other | ratio (median; pair by pair) |", "|---|---|---|---|"]
    for key, (what, peer) in names.items():
        if key in found:
            r, (unit, form) = found[key], ("gb", "{:.1f} GB") if key.startswith("memory") else ("seconds", "{:.1f} s")
            rows.append(f"| {what} | {form.format(r[unit])} | {peer}: {form.format(r['peer_' + unit])} | **{r['ratio']:.1f}** ({', '.join(f'{x:.1f}' for x in r['ratios'])}) |")
    commits = "; ".join(f"{what} at commit {commit[:7]}" for what, commit in found.get("commits", {"all": found["commit"]}).items())
    heads = [f"{h['vocabulary']:,} x {h['length']:,}: {h['gb']:.2f} / {h['peer_gb']:.2f}" for h in found.get("head", [])]
    return "\n".join(rows) + (f"\n\n{found['model']}, {found['prompts']} prompts of {min(found['prompt_tokens'])} to {max(found['prompt_tokens'])} tokens x {found['samples']} samples x {found['max_new']} tokens, "
                              f"{found['threads']} CPU threads, fp32; trl {found['trl']}, transformers {found['transformers']}, torch {found['torch']}; {found['machine']}; {commits}, {found['date']}. GPU: not measured."
                              + (f"\n\nMemory of the head's pass above 16 tokens' (vocabulary x tokens: ours / full logits, GB): {'; '.join(heads)}." if heads else ""))


def ablation(task: str):
    cell = lambda x, sign="": f"{x[0]:{sign}.3f} [{x[1]:{sign}.3f}, {x[2]:{sign}.3f}]"
    titles = {"start": "start", "sampled": "after: sampled", "greedy": "greedy", "kappa": "kappa"}
    differences = {"sampled": "sampled, minus v-rft", "kappa_over_steps": "kappa over the steps, minus v-rft"}
    def render(found: dict) -> str:
        lines = found["summary"]
        there = lambda names: [name for name in names if name in lines[0]]
        rows = [f"| {task} | seeds | " + " | ".join([*(titles[n] for n in there(titles)), *(differences[n] for n in there(differences))]) + " |"]
        rows.append("|---" * (rows[0].count("|") - 1) + "|")
        for line in lines:
            against = line.get("against_v-rft")
            rows.append(f"| {line['arm']} | {line['seeds']} | " + " | ".join([*(cell(line[n]) for n in there(titles)), *(cell(against[n], "+") if against else "-" for n in there(differences))]) + " |")
        twice = [f"{line['arm']} minus 'v-rft, twice the steps': {cell(line['against_twice']['sampled'], '+')}" for line in lines if "boxes" in line["arm"] and "against_twice" in line]
        return "\n".join(rows) + (f"\n\nSampled accuracy on test, paired by seed: {'; '.join(twice)}." if twice else "")
    return render


def main() -> None:
    readme = ROOT / "README.md"
    text = before = readme.read_text(encoding="utf-8")
    for name, file, render in (("demo", "demo", demo), ("compare", "demo_compare", compare), ("real", "real", real), ("vision", "vision_step", vision),
                               ("trl", "vs_trl", trl), ("grade", "ablation_grade", ablation("grade")), ("outline", "ablation_classify", ablation("classify"))):
        path = ROOT / "benchmarks" / "results" / f"{file}.json"
        if path.exists():
            table = render(json.loads(path.read_text(encoding="utf-8")))
            text = re.sub(rf"(<!-- {name} table[^>]*-->\n).*?(<!-- /{name} table -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if "--check" in sys.argv:
        raise SystemExit("README.md: its tables are not those of benchmarks/results: run python benchmarks/tables.py" if text != before else 0)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
