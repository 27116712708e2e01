"""Run folders: what stands in them, written and read so that a kill at any moment loses nothing that was there before.

A file of its own because training, evaluation and export all need it, and the loop in train.py reads better without it. A run folder holds
run.json (config, data, versions), metrics.jsonl and rollouts.jsonl (functions of the run alone), timing.jsonl (seconds, memory), eval.json, and
checkpoints/000020/ with safetensors, JSON and their checksums: no pickle. What a resumed run needs beyond that is a function of (seed, step).
"""
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import ranks
from data import UsageError
from policy import Policy, Rollout, product_dtype


MADE_HERE = ("", "tiny-vl")             # values of --model for which the model is made in code, not loaded


# ------------------------------------------------------------------------------------------------- reading
def run_of(path: str) -> tuple[Path, Path | None]:
    """RUN, or one of its checkpoints by name such as RUN/checkpoints/best -> the run folder, and the checkpoint named."""
    path = Path(path)
    return (path.parent.parent, path) if path.parent.name == "checkpoints" and (path / "state.json").is_file() else (path, None)


def read_run(path: str) -> dict:
    """The config of a run folder, {} where `path` is none (a model folder or a hub name)."""
    file = run_of(path)[0] / "run.json"
    config = read_json(file, "start a new run").get("config") if file.is_file() else {}
    if not isinstance(config, dict):
        raise UsageError(f"{file} is damaged (no 'config' in it): start a new run")
    return config


def read_json(file: Path, way_on: str) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise UsageError(f"{file} is damaged ({type(error).__name__}: {' '.join(str(error).split())}): {way_on}") from None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; a damaged one is named and passed over."""
    for state in sorted((run / "checkpoints").glob("[0-9]*[0-9]/state.json"), reverse=True):
        try:
            content = json.loads(state.read_text(encoding="utf-8"))
            if content.pop("own_sha256") == own_sum(content) and all(checksum(state.parent / name) == total for name, total in content["sha256"].items()):
                return state.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        print(f"{state.parent} is damaged (its checksums do not match): the one before it is used", file=sys.stderr)
    return None


def own_sum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(2**22):
            total.update(block)
    return total.hexdigest()


def base_model(run: str | Path, config: dict) -> str:
    """The model a run started from: one made in code lies in the run folder itself."""
    return str(Path(run) / "model") if config["model"] in MADE_HERE else config["model"]


def policy_settings(config: dict) -> dict:
    """The arguments of Policy that a run's config fixes."""
    return {"lora": 0 if config["full"] else config["lora"], **{name: config[name] for name in ("lora_alpha", "lora_targets", "template", "stop_answer", "seed", "train_vision", "max_pixels")}}


def open_policy(path: str, device: str, **kwargs) -> tuple[Policy, dict]:
    """A run folder's newest checkpoint, a model folder or a hub name -> the policy, and the run's config ({} for a model)."""
    config = read_run(path)
    if not config:
        return Policy.load(path, device, product_dtype(device), lora=0, **kwargs), {}
    run, named = run_of(path)
    checkpoint = named or newest_checkpoint(run)
    if checkpoint is None:
        raise UsageError(f"{path} is a run without a finished checkpoint: resume it with train.py --resume {path}")
    try:
        settings = policy_settings(config)
    except KeyError as error:
        raise UsageError(f"{path}: its run.json has no {error}: that run was written by another version of this code") from None
    policy = Policy.load(base_model(run, config), device, **(settings | kwargs))
    tensors = load_file(checkpoint / "policy.safetensors")
    policy.load_trainable({name: tensors[name] for name in policy.trainable() if name in tensors})            # without the critic
    return policy, config


def initial_weights(config, run: Path) -> dict[str, Tensor] | None:
    """The trained weights of the run that --init names; refused where that run began from another model. A copy in our own folder serves when we resume."""
    if not config.init:
        return None
    if (run / "init.safetensors").exists():
        return load_file(run / "init.safetensors")
    saved, (begun, named) = read_run(config.init), run_of(config.init)
    checkpoint = named or newest_checkpoint(begun)
    if not saved or checkpoint is None:
        raise UsageError(f"--init {config.init}: no run with a finished checkpoint is there")
    for name in ("model", "full", "lora", "lora_alpha", "lora_targets", "train_vision"):
        if saved[name] != getattr(config, name) and not (name.startswith("lora") and config.full):
            raise UsageError(f"--init {config.init}: that run has --{name.replace('_', '-')} {saved[name]!r}, this one {getattr(config, name)!r}")
    return load_file(checkpoint / "policy.safetensors")


# ------------------------------------------------------------------------------------------------- checkpoints
def tensors_of(policy: Policy, optimizer) -> tuple[dict, dict]:
    """Trained weights by name, and AdamW's state by "name|key"."""
    moments = {f"{name}|{key}": value.detach().cpu().contiguous() for name, p in policy.trainable().items() for key, value in optimizer.state[p].items()}
    return {name: p.detach().cpu().contiguous() for name, p in policy.trainable().items()}, moments


@contextmanager
def writing(run: Path, what: str, size: int = 0):
    """A full disk, or a folder that is gone or read-only, ends the run in one line. What was written before stays whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(run / "checkpoints" / ".tmp", ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        there = f"{f'it takes {size / 1e6:,.1f} MB, and ' if size else ''}{shutil.disk_usage(run).free / 1e6:,.1f} MB are free" if run.is_dir() else "the folder is gone"
        raise UsageError(f"{run}: {what} could not be written ({reason}); {there}. What was written before is whole: make room, then train.py --resume {run}") from None


def save_checkpoint(run: Path, policy: Policy, optimizer, step: int, keep: int, state: dict, best: bool = False) -> None:
    """run/checkpoints/000020, or best: policy.safetensors, optimizer.safetensors, state.json with their checksums. Written beside, flushed to disk, then renamed."""
    if ranks.rank():
        return
    weights, moments = tensors_of(policy, optimizer)
    final, temporary = run / "checkpoints" / ("best" if best else f"{step:06d}"), run / "checkpoints" / ".tmp"
    with writing(run, f"the checkpoint of step {step}", sum(t.nbytes for t in (*weights.values(), *moments.values()))):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "policy.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        sums = {path.name: checksum(path) for path in sorted(temporary.iterdir())}
        state = {"step": step, **state, "sha256": sums}
        (temporary / "state.json").write_text(json.dumps(state | {"own_sha256": own_sum(state)}), encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb+") as f:
                os.fsync(f.fileno())
            path.chmod(0o644)                                                                 # safetensors writes files that only their owner may read
        shutil.rmtree(final, ignore_errors=True)                                              # left by a resumed run from before
        temporary.rename(final)
        flush_folder(final.parent)
    for old in sorted((run / "checkpoints").glob("[0-9]*[0-9]"))[:-keep]:
        shutil.rmtree(old)


def flush_folder(path: Path) -> None:
    """The names in a folder to disk too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def restore(run: Path, policy: Policy, optimizer) -> tuple[int, dict]:
    """Load the newest whole checkpoint into policy and optimiser; its step (0 where there is none) and state. Seeds are functions of the step: nothing else is needed."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return 0, {}
    policy.load_trainable(load_file(checkpoint / "policy.safetensors"))
    moments = load_file(checkpoint / "optimizer.safetensors")
    state: dict[int, dict] = {}
    for i, name in enumerate([*policy.trainable("policy"), *policy.trainable("critic")]):      # the order of the optimiser's groups
        state[i] = {key.rsplit("|", 1)[1]: value for key, value in moments.items() if key.rsplit("|", 1)[0] == name}
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": optimizer.state_dict()["param_groups"]})
    saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    step = saved["step"]
    ranks.gathered([])                                                                        # all have read before one deletes
    for later in (run / "checkpoints").glob("[0-9]*[0-9]"):                                   # damaged ones: they must not count among those to keep
        if int(later.name) > step and ranks.rank() == 0:
            shutil.rmtree(later)
    return step, saved


# ------------------------------------------------------------------------------------------------- logs
class Log:
    """metrics.jsonl and rollouts.jsonl, functions of the run alone, and timing.jsonl, which is not. After a resume no step stands twice."""

    def __init__(self, run: Path, step: int):
        self.run, self.files = run, {}
        for name in ("metrics", "rollouts", "timing") if ranks.rank() == 0 else ():
            path = run / f"{name}.jsonl"
            lines = path.open(encoding="utf-8").readlines() if path.exists() else []          # not splitlines: a text may hold U+2028
            whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            beside = path.with_suffix(".tmp")
            beside.write_text("".join(whole), encoding="utf-8")
            beside.replace(path)
            self.files[name] = path.open("a", encoding="utf-8")
        ranks.gathered([])                                                                    # the others read metrics.jsonl next

    def write(self, metrics: dict, rollouts: list[Rollout], timing: dict) -> None:
        step = metrics["step"]
        samples = [{"step": step, "group": r.group, "id": r.item.id, "question": r.item.question, "options": r.item.options, "gold": r.item.answer, "text": r.text,
                    "reward": r.reward, "parts": r.parts, "advantage": r.advantage, "correct": r.correct, "finished": r.finished,
                    "tokens": len(r.completion_ids), "frame": r.item.frame, **r.closer} for r in rollouts]
        for name, rows in (("rollouts", samples), ("timing", [{"step": step} | timing]), ("metrics", [metrics])) if self.files else ():
            with writing(self.run, f"{name}.jsonl of step {step}"):
                self.files[name].write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                self.files[name].flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def write_json(path: Path, content: dict) -> None:
    if ranks.rank():
        return
    beside = path.with_suffix(".tmp")
    with writing(path.parent, path.name):
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
