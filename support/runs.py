"""Run folders: how one begins, is opened again, and is exported.

A run folder holds run.json (config, data, versions), metrics.jsonl and rollouts.jsonl (functions of
the run alone), timing.jsonl (seconds), eval.json and checkpoints/.
"""

import json
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import data
from policy import Policy
from support import distributed, lora
from support.checkpoints import newest_checkpoint, writing
from support.config import Config
from support.distributed import say
from support.errors import UsageError
from support.loading import product_dtype

MADE_HERE = ("", "tiny-vl")  # values of --model for which the model is made in code, not loaded


# ------------------------------------------------------------------------------------- reading
def run_of(path: str) -> tuple[Path, Path | None]:
    """RUN, or a checkpoint such as RUN/checkpoints/best -> the run, and the checkpoint or None."""
    path = Path(path)
    if path.parent.name == "checkpoints" and (path / "state.json").is_file():
        return path.parent.parent, path
    return path, None


def read_run(path: str) -> dict:
    """The config of a run folder, {} where `path` is none (a model folder or a hub name)."""
    file = run_of(path)[0] / "run.json"
    if not file.is_file():
        return {}
    config = read_json(file, "start a new run").get("config")
    if not isinstance(config, dict):
        raise UsageError(f"{file} is damaged (no 'config' in it): start a new run")
    return config


def read_json(file: Path, way_on: str) -> dict:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{file} is damaged ({type(error).__name__}: {reason}): {way_on}"
        ) from None


# ------------------------------------------------------------------------------------ policies
def base_model(run: str | Path, config: dict) -> str:
    """The model a run started from: one made in code lies in the run folder itself."""
    return str(Path(run) / "model") if config["model"] in MADE_HERE else config["model"]


def policy_settings(config: dict) -> dict:
    """The arguments of Policy.load that a run's config fixes."""
    names = ("template", "stop_answer", "seed", "train_vision", "max_pixels", "fp32_head")
    return {"lora": 0 if config["full"] else config["lora"], **{n: config[n] for n in names}}


def open_policy(path: str, device: str, **kwargs) -> tuple[Policy, dict]:
    """A run's newest checkpoint, a model folder or a hub name -> the policy, and the run's config.

    The config is {} for a model. Of a run the critic is left out.
    """
    config = read_run(path)
    if not config:
        return Policy.load(path, device, product_dtype(device), lora=0, **kwargs), {}
    run, named = run_of(path)
    checkpoint = named or newest_checkpoint(run)
    if checkpoint is None:
        raise UsageError(
            f"{path} is a run without a finished checkpoint: resume it with "
            f"train.py --resume {path}"
        )
    try:
        settings = policy_settings(config)
    except KeyError as error:
        raise UsageError(
            f"{path}: its run.json has no {error}: another version of this code wrote that run"
        ) from None
    policy = Policy.load(base_model(run, config), device, **(settings | kwargs))
    tensors = load_file(checkpoint / "policy.safetensors")
    mine = policy.trainable()
    policy.load_trainable({name: t for name, t in tensors.items() if name in mine})
    return policy, config


def initial_weights(config, run: Path) -> dict[str, Tensor] | None:
    """The trained weights of the run that --init names; refused where its model is another one.

    A copy in our own folder serves when we resume.
    """
    if not config.init:
        return None
    if (run / "init.safetensors").exists():
        return load_file(run / "init.safetensors")
    saved, (begun, named) = read_run(config.init), run_of(config.init)
    checkpoint = named or newest_checkpoint(begun)
    if not saved or checkpoint is None:
        raise UsageError(f"--init {config.init}: no run with a finished checkpoint is there")
    for name in ("model", "full", "lora", "train_vision"):
        mine = getattr(config, name)
        if saved[name] != mine and not (name == "lora" and config.full):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--init {config.init}: that run has --{flag} {saved[name]!r}, this one {mine!r}"
            )
    return load_file(checkpoint / "policy.safetensors")


# ------------------------------------------------------------------------------- beginning one
def free_folder(name: str, config=None) -> str:
    """The folder of a new run: `name`, which must not exist, or the next free one."""
    if not name and config is None:
        return ""
    if not name:
        stem = f"runs/{Path(config.dataset).stem}-{config.algo}"
        name = next(f"{stem}-{n}" for n in count(1) if not Path(f"{stem}-{n}").exists())
    # The first process decides, before any of them makes it.
    name, there = distributed.gathered([(name, Path(name).exists())])[0]
    if there:
        raise UsageError(
            f"--out {name} exists: go on with it by --resume {name}, or name another folder"
        )
    return name


def resumed_config(run: Path, given: dict) -> Config:
    """The config that a run began with, and of the flags those that may change."""
    saved = read_run(str(run))
    if not saved:
        raise UsageError(f"--resume {run}: there is no run.json; a run folder is what --out named")
    if set(saved) != {f.name for f in fields(Config)}:
        raise UsageError(f"--resume {run}: that run was written by another version of train.py")
    for name, value in given.items():
        if name in ("recipe", "hackable"):
            raise UsageError(
                f"--resume {run}: a run keeps the settings it began with; leave --{name} out"
            )
        may_change = name in ("steps", "device", "out", "micro_batch")
        if not may_change and value != saved[name]:
            flag = name.replace("_", "-")
            raise UsageError(
                f"--resume {run}: that run has --{flag} {saved[name]!r}, not {value!r}; "
                "start a new run to change it"
            )
    steps = given.get("steps", saved["steps"])
    done = newest_checkpoint(run)
    if done and steps < int(done.name):
        raise UsageError(
            f"--resume {run}: --steps {steps}, and that run stands at step {int(done.name)} already"
        )
    if steps != saved["steps"]:
        laid_out = f"--warmup {saved['warmup']}" if 0 < saved["warmup"] < 1 else ""
        if saved["schedule"] == "cosine":
            laid_out = "--schedule cosine"
        if laid_out:
            raise UsageError(
                f"--resume {run}: with {laid_out} the learning rates hang on the --steps "
                f"{saved['steps']} that it began with; leave --steps out, or begin a new run with "
                f"--init {run}"
            )
    return Config(**(saved | given | {"out": str(run)}))


def facts_of(config: Config, splits: dict, device: str) -> dict:
    """What run.json says: with the same of it a resumed run goes on bit for bit, on a CPU."""
    machine = {
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": distributed.world,
    }
    if torch.device(device).type == "cuda":  # another one rounds otherwise
        machine["card"] = torch.cuda.get_device_name(device)
    return {
        "config": asdict(config),
        "data": {name: data.set_fingerprint(items) for name, items in splits.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": machine,
    }


def unfinished(run: Path, facts: dict) -> dict:
    """The evaluations that a run has already made; it is said where it will not go on exactly."""
    saved = read_json(run / "run.json", "start a new run")
    if saved["data"] != facts["data"]:
        raise UsageError(f"--resume {run}: the data set is not the one that this run began with")
    if "sizes" in saved:
        facts["sizes"] = saved["sizes"]
    changed = [name for name in ("versions", "machine") if saved.get(name) != facts[name]]
    if changed:
        then, now = (", ".join(str(f.get(name)) for name in changed) for f in (saved, facts))
        say(
            f"this run began with {then}, and here it is {now}: it goes on, equal up to rounding "
            "and no longer bit for bit"
        )
    results = run / "eval.json"
    if not results.exists():
        return {}
    return read_json(results, "delete it, and the evaluations are made again")


def new_policy(config: Config, run: Path, device: str, init: dict | None) -> Policy:
    """The policy that a run begins with."""
    return Policy.load(
        base_model(run, asdict(config)),
        device,
        checkpointing=config.checkpointing,
        keep_reference=config.kl_coef > 0 and config.algo != "sft",
        critic=config.critic if config.advantage == "gae" else "",
        critic_rank=config.lora,
        init=init,
        **policy_settings(asdict(config)),
    )


def write_beginning(run: Path, facts: dict, init: dict[str, Tensor] | None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "run.json", facts)
    if init is not None and distributed.rank == 0:
        save_file(init, run / "init.safetensors")
    say(f"run folder {run}")


def write_json(path: Path, content: dict) -> None:
    if distributed.rank:
        return
    beside = path.with_suffix(".tmp")
    with writing(path.parent, path.name):
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def export(policy: Policy, run: Path, folder: Path, config: Config, results: list[str]) -> None:
    """The trained policy as a plain Hugging Face folder: adapters merged, with a README.

    results: what the README says of its accuracy, a line each.
    """
    beside = folder.with_name(f"{folder.name}.tmp")
    lora.merge(policy.model)
    policy.model.tie_weights()  # a head in fp32 was apart
    policy.model.to(policy.model.dtype)
    settings = {name: x for name, x in asdict(config).items() if x not in ("", 0, False)}
    needs = " AutoProcessor needs torchvision." if policy.vision else ""
    lines = [
        f"# {config.model or config.dataset}, trained by {config.algo} on {config.dataset}",
        "",
        *results,
        "",
        f"Research only, no medical device.{needs} Settings of the run {run.name}:",
        "",
        *(f"- {name}: {value}" for name, value in settings.items()),
    ]
    with writing(run, f"the export {folder}"):
        policy.save_folder(beside)
        (beside / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for path in beside.iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        beside.rename(folder)
    print(f"exported to {folder}")
