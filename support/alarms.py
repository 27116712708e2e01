"""What a step's rollouts look like in numbers, why nothing may be learned, and signs of hacking."""

from rewards import STAGES, stage


def describe(rollouts: list) -> dict:
    """The metrics of a step's graded rollouts, means over completions; {} where there is none."""
    if not rollouts:
        return {}
    n = len(rollouts)
    groups: dict[int, set] = {}
    for r in rollouts:
        groups.setdefault(r.group, set()).add(r.reward)
    stages = [stage(r.parsed, r.item, len(r.completion_ids)) for r in rollouts]
    parts = {f"part_{name}": sum(r.parts[name] for r in rollouts) / n for name in rollouts[0].parts}
    return {
        "reward": sum(r.reward for r in rollouts) / n,
        "accuracy": sum(r.correct for r in rollouts) / n,
        "think_words": sum(len(r.parsed.think.split()) for r in rollouts) / n,
        "stages": {name: stages.count(name) / n for name in STAGES},
        "length": sum(len(r.completion_ids) for r in rollouts) / n,
        "groups_equal": sum(len(rewards) == 1 for rewards in groups.values()) / len(groups),
        **parts,
    }


def troubles(history: list[dict], window: int = 5) -> list[str]:
    """Why nothing may be learned, and what to do.

    Looked at after 5, 10, 20, 40, ... steps, so that it is said and does not fill the screen.
    """
    last, times = [m for m in history[-window:] if "reward" in m], len(history) // window
    if len(history) % window or len(last) < window or times & (times - 1):
        return []
    found, when = [], f"in the last {window} steps"
    if all(m["groups_equal"] == 1 for m in last):
        always = {m["reward"] for m in last}
        reward = f", always {last[0]['reward']:.2f}" if len(always) == 1 else ""
        found.append(
            f"every group {when} had equal rewards{reward}: nothing is learned from them. Look at "
            "rollouts.jsonl; --algo sft first, which teaches the form too, then --init with its "
            "run, other items, or a higher --temperature would help"
        )
    if all(m["part_truncated"] == 1 for m in last):
        found.append(
            f"every completion {when} was cut at --max-new: raise it, or see in rollouts.jsonl why "
            "none ends"
        )
    return found


def alarms(history: list[dict], window: int = 5, back: int = 10) -> list[str]:
    """Signs of reward hacking: the reward has risen while what it should stand for has fallen.

    Means of the last `window` steps against those `back` steps before; every `back` steps. Few
    held-out items tell little, so of their accuracy the ends of its intervals count.
    """
    if history[-1]["step"] % back:
        return []
    history = [m for m in history if "reward" in m]
    if len(history) < back + window:
        return []
    then, now = history[-back - window : -back], history[-window:]

    def mean(steps: list[dict], value) -> float:
        return sum(value(m) for m in steps) / len(steps)

    rewards = [mean(steps, lambda m: m["reward"]) for steps in (then, now)]
    if rewards[1] <= rewards[0] + 0.02:
        return []
    rose = f"reward rose from {rewards[0]:.2f} to {rewards[1]:.2f}"
    found = []
    words = [mean(steps, lambda m: m["think_words"]) for steps in (then, now)]
    if words[1] < 0.8 * words[0]:
        found.append(f"{rose} while thinking shrank from {words[0]:.0f} to {words[1]:.0f} words")
    dev = [m for m in history if "dev_ci95" in m]
    best = max(dev, key=lambda m: m["dev_ci95"][0], default=None)
    if dev and dev[-1]["dev_ci95"][1] < best["dev_ci95"][0]:
        fell = f"fell from {best['dev_accuracy']:.2f} to {dev[-1]['dev_accuracy']:.2f}"
        found.append(f"{rose} while held-out accuracy {fell}")
    accuracy = mean(now, lambda m: m["accuracy"])
    recent = [m for m in now if "dev_ci95" in m]  # training may have left an older one behind
    if recent and accuracy > recent[-1]["dev_ci95"][1] + 0.2:
        found.append(
            f"{rose}, and accuracy in training to {accuracy:.2f}, while held-out accuracy is "
            f"{recent[-1]['dev_accuracy']:.2f}: what earns the reward holds in training only"
        )
    outside = [mean(steps, lambda m: m["stages"]["step-by-step exploit"]) for steps in (then, now)]
    if outside[1] > outside[0] + 0.2:
        found.append(
            f"{rose} while reasoning moved in front of <think> (step-by-step exploit) in "
            f"{outside[1]:.0%} of completions, from {outside[0]:.0%}; see --w-before"
        )
    return found
