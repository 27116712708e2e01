"""Checkpoints: what a resumed run needs, written so that a kill at any moment loses nothing.

run/checkpoints/000020/ holds policy.safetensors (the trained weights by name),
optimizer.safetensors (AdamW's state by "name|key") and state.json with the step and the checksums
of all three: no pickle. What a resumed run needs beyond that is a function of (seed, step).
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

from policy import Policy
from support import distributed
from support.errors import UsageError

KEEP = 2  # the newest ones


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; a damaged one is named."""
    for state in sorted((run / "checkpoints").glob("[0-9]*[0-9]/state.json"), reverse=True):
        if is_whole(state):
            return state.parent
        print(
            f"{state.parent} is damaged (its checksums do not match): the one before it is used",
            file=sys.stderr,
        )
    return None


def is_whole(state: Path) -> bool:
    """Whether a checkpoint's state.json and the files it names are as they were written."""
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        if content.pop("own_sha256") != own_sum(content):
            return False
        sums = content["sha256"].items()
        return all(checksum(state.parent / name) == total for name, total in sums)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def own_sum(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(run: Path, what: str, size: int = 0):
    """A full disk, or a folder that is gone or read-only, ends the run in one line.

    What was written before stays whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(run / "checkpoints" / ".tmp", ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        there = "the folder is gone"
        if run.is_dir():
            there = f"{shutil.disk_usage(run).free / 1e6:,.1f} MB are free"
            if size:
                there = f"it takes {size / 1e6:,.1f} MB, and {there}"
        raise UsageError(
            f"{run}: {what} could not be written ({reason}); {there}. What was written before is "
            f"whole: make room, then train.py --resume {run}"
        ) from None


def save_checkpoint(run: Path, policy: Policy, optimizer, step: int, best: bool = False) -> None:
    """run/checkpoints/000020, or best: written beside its place, flushed to disk, then renamed.

    policy.safetensors (trained weights), optimizer.safetensors (AdamW's state by "name|key"), and
    state.json with the step and the checksums.
    """
    if distributed.rank:
        return
    trainable = policy.trainable()
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable.items()}
    moments = {}
    for name, p in trainable.items():
        for key, value in optimizer.state[p].items():
            moments[f"{name}|{key}"] = value.detach().cpu().contiguous()
    folder = run / "checkpoints"
    final, beside = folder / ("best" if best else f"{step:06d}"), folder / ".tmp"
    size = sum(t.nbytes for t in (*weights.values(), *moments.values()))
    with writing(run, f"the checkpoint of step {step}", size):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(weights, beside / "policy.safetensors")
        save_file(moments, beside / "optimizer.safetensors")
        sums = {path.name: checksum(path) for path in sorted(beside.iterdir())}
        state = {"step": step, "sha256": sums}
        text = json.dumps(state | {"own_sha256": own_sum(state)})
        (beside / "state.json").write_text(text, encoding="utf-8")
        for path in beside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        shutil.rmtree(final, ignore_errors=True)  # left by a resumed run from before
        beside.rename(final)
        flush_folder(folder)
    for old in sorted(folder.glob("[0-9]*[0-9]"))[:-KEEP]:
        shutil.rmtree(old)


def flush_folder(path: Path) -> None:
    """The names in a folder to disk too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def restore(run: Path, policy: Policy, optimizer) -> int:
    """Load the newest whole checkpoint into policy and optimiser -> its step, 0 where none is."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return 0
    policy.load_trainable(load_file(checkpoint / "policy.safetensors"))
    by_name: dict[str, dict] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, what = key.rpartition("|")
        by_name.setdefault(name, {})[what] = value
    names = [*policy.trainable("policy"), *policy.trainable("critic")]  # the optimiser's order
    state = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    step = int(checkpoint.name)
    distributed.gathered([])  # all have read before one deletes
    for later in (run / "checkpoints").glob("[0-9]*[0-9]"):
        if int(later.name) > step and distributed.rank == 0:  # damaged: not among those to keep
            shutil.rmtree(later)
    return step
