"""Data sets as lists of `Item`s, the prompts made of them, and which items each training step sees.

Read it with Med-RLVR (arXiv 2502.19655), section 4.1: MedQA-USMLE with five options for training, questions and answer letters only.
Everything is a pure function of files and seeds: `batch_for_step` has no cursor, so a resumed run needs none.
A line of your own data that cannot be used is refused by file and line; a published set is taken as it is, and its oddities are counted.
"""
import hashlib
import io
import json
import random
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPLITS = ("train", "dev", "test")
DATASETS = ("demo", "medqa", "medqa-4", "mmlu-pro-health")
MAX_LINE = 1_000_000                    # characters in one line of JSONL: a longer one is no exam question


class UsageError(ValueError):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


@dataclass(frozen=True)
class Item:
    id: str
    task: str                           # "choice", "classify" (a closed set of names), "grade" (an ordered one) or "localize" (boxes)
    question: str
    options: tuple[str, ...]            # choice: their texts in the order A, B, C, ...; classify: the names; grade: the grades, lowest first; localize: ()
    answer: str | tuple                 # the gold letter, name or grade; localize: ((x1, y1, x2, y2), ...), half-open, in pixels of the original image
    image: object = None                # None, or one source or a tuple of them: a path, uint8 array [H, W] or [H, W, 3], PIL image, or images.Crop
    frame: tuple[int, int] | None = None    # (width, height) that boxes in prompt and completion refer to; None: the original image's
    patient: str = ""                   # where known: no patient stands in two splits
    knowledge: str = ""                 # text about the classes, for the prompt (VRFT-Aug)
    rationale: str = ""                 # why the answer is right, for supervised fine-tuning


# -------------------------------------------------------------------------------------------------- load
def load(dataset: str, split: str, data_dir: str | None = None, limit: int | None = None) -> list[Item]:
    """The items of one split, in file order, the first `limit` of them.

    dataset: `demo`; `medqa` or `medqa-4` (five or four options) or `mmlu-pro-health` (test only), from the hub, or from `data_dir` with the same layout;
    or a path: a folder with train.jsonl, dev.jsonl and test.jsonl, or one .jsonl file, which is cut 80/10/10 by a hash of each item.
    Raises UsageError with the file, the line and the way on.
    """
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}: there are {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit {limit} leaves no items: give at least 1")
    if dataset == "demo":
        items = demo_items(split)
    elif dataset in ("medqa", "medqa-4"):
        items = medqa_items(dataset, split, data_dir)
    elif dataset == "mmlu-pro-health":
        items = mmlu_pro_items(split, data_dir)
    elif Path(dataset).exists():
        items = own_items(Path(dataset), split)
    else:
        raise UsageError(f"no data set named {dataset!r}, and no file or folder of that name: there are {', '.join(DATASETS)}, "
                         "or give the path of a JSONL file")
    if not items:
        raise UsageError(f"{dataset}: split {split!r} has no items")
    return items[:limit]


def medqa_items(dataset: str, split: str, data_dir: str | None) -> list[Item]:
    """MedQA-USMLE (arXiv 2009.13081) in the layout of its archive: data_clean/questions/US/..."""
    name = f"data_clean/questions/US/{split}.jsonl" if dataset == "medqa" else \
        f"data_clean/questions/US/4_options/phrases_no_exclude_{split}.jsonl"
    if data_dir:
        path = Path(data_dir) / name
        if not path.is_file():
            raise UsageError(f"{path} is not there: --data-dir must hold the folder data_clean of the MedQA archive")
        with path.open(encoding="utf-8") as lines:
            return read_jsonl(lines, str(path), dataset, split, published=True)
    archive = fetch("bigbio/med_qa", "data_clean.zip")
    with zipfile.ZipFile(archive) as z, z.open(name) as lines:                # read in place: no member is written anywhere
        return read_jsonl(io.TextIOWrapper(lines, encoding="utf-8"), f"{archive}:{name}", dataset, split, published=True)


def mmlu_pro_items(split: str, data_dir: str | None) -> list[Item]:
    """The health questions of MMLU-Pro (arXiv 2406.01574), 3 to 10 options: Med-RLVR's test out of distribution. The unfiltered split, 818 rows."""
    if split != "test":
        raise UsageError("mmlu-pro-health is for evaluation only: its split is test")
    name = "data/test-00000-of-00001.parquet"
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError("reading parquet needs pyarrow: pip install pyarrow") from None
    if data_dir:
        found = [path for path in (Path(data_dir) / "MMLU-Pro" / name, Path(data_dir) / name) if path.is_file()]
        if not found:
            raise UsageError(f"neither {data_dir}/MMLU-Pro/{name} nor {data_dir}/{name} is there")
        path = str(found[0])
    else:
        path = fetch("TIGER-Lab/MMLU-Pro", name)
    try:
        rows = pyarrow.parquet.read_table(path, columns=["question_id", "question", "options", "answer", "category"]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not the parquet file of MMLU-Pro ({str(error).splitlines()[0]})") from None
    health = [row for row in rows if row["category"] == "health"]
    return read_jsonl((json.dumps(row | {"id": f"mmlu-pro-{row['question_id']}"}) for row in health), path, "mmlu-pro-health", split, published=True)


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder: a hub name has at most one slash, between two words."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def cached(repo: str, name: str, kind: str) -> bool:
    """Whether a file of a hub "model" or "dataset" is on this machine already."""
    import huggingface_hub
    return isinstance(huggingface_hub.try_to_load_from_cache(repo, name, repo_type=kind), str)


def online() -> bool:
    """Whether the hub answers within four seconds (its own client would retry for half a minute)."""
    import huggingface_hub
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=4).close()
    except urllib.error.HTTPError:
        return True                                                           # an answer, if no welcome
    except OSError:
        return False
    return True


def fetch(repo: str, name: str) -> str:
    """Path of one file of a hub data set: from the cache, else downloaded with a progress bar."""
    import huggingface_hub
    try:
        return huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_files_only=True)
    except huggingface_hub.errors.LocalEntryNotFoundError:
        pass
    if not online():
        raise UsageError(f"the hub cannot be reached and {name} of its data set {repo} is not in the cache: "
                         "connect to the network, or give --data-dir DIR with the unpacked archive")
    try:
        return huggingface_hub.hf_hub_download(repo, name, repo_type="dataset")
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UsageError(f"cannot download {name} of the hub data set {repo}: {error}") from None


def own_items(path: Path, split: str) -> list[Item]:
    """Your own data. One JSON object a line: {"question", "options": [texts] or {letter: text}, "answer": letter, "id"?, "rationale"?}."""
    file = path if path.is_file() else path / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file} is not there: a folder of your own data holds train.jsonl, dev.jsonl and test.jsonl")
    with file.open(encoding="utf-8") as lines:
        items = read_jsonl(lines, str(file), file.stem, split, published=False)
    if path.is_dir():
        return items
    share = {0: "dev", 1: "test"}                                             # a tenth each; the same item falls into the same split, wherever it stands
    return [item for item in items if share.get(int(fingerprint(item), 16) % 10, "train") == split]


def read_jsonl(lines: Iterable[str], where: str, dataset: str, split: str, published: bool) -> list[Item]:
    """MedQA's schema and our own: options as a list or by letter, the gold letter in `answer_idx` or `answer`."""
    items, alike, seen = [], 0, {}
    for number, line in enumerate(decoded(lines, where), 1):
        if not line.strip():
            continue
        item, duplicates = read_item(line, f"{where}, line {number}", f"{dataset}-{split}-{number}", published)
        if item.id in seen:
            raise UsageError(f"{where}, line {number}: the id {item.id!r} stands in line {seen[item.id]} already: ids must differ")
        seen[item.id] = number
        alike += duplicates
        items.append(item)
    if alike:
        print(f"{where}: {alike} of {len(items)} questions have two options with the same text; either counts as right", file=sys.stderr)
    return items


def decoded(lines: Iterable[str], where: str) -> Iterable[str]:
    """The lines, with a word on where the text stops being UTF-8."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            yield line
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}, after line {number}: not UTF-8 ({error.reason}): save the file as UTF-8") from None


def read_item(line: str, where: str, default_id: str, published: bool) -> tuple[Item, bool]:
    """One line -> its Item, and whether two of its options read the same. Raises UsageError with `where`."""
    if len(line) > MAX_LINE:
        raise UsageError(f"{where}: {len(line):,} characters; the limit is {MAX_LINE:,}")
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()                          # half a character (a lone surrogate) could not be written again
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a line must be one JSON object")
    question, options = row.get("question"), row.get("options")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: no text under 'question'")
    if isinstance(options, dict):
        if sorted(options) != list(LETTERS[:len(options)]):
            raise UsageError(f"{where}: the option letters are {sorted(options)}, not A, B, C, ... without a gap")
        options = [options[letter] for letter in sorted(options)]
    if not isinstance(options, list) or not 2 <= len(options) <= 26 or not all(isinstance(o, str) and o.strip() for o in options):
        raise UsageError(f"{where}: 'options' must be 2 to 26 texts, as a list or by letter")
    answer = row.get("answer_idx", row.get("answer"))
    if not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS[:len(options)]:
        raise UsageError(f"{where}: the answer {answer!r} is not one of the option letters {', '.join(LETTERS[:len(options)])}")
    duplicates = len({" ".join(o.split()).casefold() for o in options}) < len(options)
    if duplicates and not published:
        raise UsageError(f"{where}: two options have the same text")
    return Item(str(row.get("id", default_id)), "choice", question.strip(), tuple(o.strip() for o in options), answer,
                rationale=str(row.get("rationale") or "")), duplicates


# --------------------------------------------------------------------------------- splits, order, batches
def fingerprint(item: Item) -> str:
    """Hash of the normalised question *and* options: "Which of these is true?" alone occurs many times."""
    flat = lambda text: " ".join(text.split()).casefold()
    return hashlib.sha256("\n".join([flat(item.question), *sorted(map(flat, item.options))]).encode()).hexdigest()


def set_fingerprint(items: list[Item]) -> str:
    """Of a whole split, in its order, answers included: tells a resumed run whether its data is still the same."""
    return hashlib.sha256(" ".join(f"{fingerprint(item)}{item.answer}" for item in items).encode()).hexdigest()[:16]


def without(items: list[Item], held_out: list[Item]) -> list[Item]:
    """The items whose question and options do not occur in `held_out`."""
    taken = {fingerprint(item) for item in held_out}
    return [item for item in items if fingerprint(item) not in taken]


def shuffle_options(item: Item, seed: int = 0) -> Item:
    """The same question with its options in another order, a function of (seed, item.id); the gold letter moves along."""
    order = list(range(len(item.options)))
    random.Random(f"{seed} {item.id}").shuffle(order)
    return replace(item, options=tuple(item.options[i] for i in order), answer=LETTERS[order.index(LETTERS.index(item.answer))])


def rotate_options(item: Item, by: int = 1) -> Item:
    """The same question with every option moved `by` places up, the first ones to the end."""
    n, gold = len(item.options), LETTERS.index(item.answer)
    return replace(item, options=item.options[by % n:] + item.options[:by % n], answer=LETTERS[(gold - by) % n])


def batch_for_step(items: list[Item], step: int, n: int, seed) -> list[Item]:
    """The n items of a step: pages of an endless book, each epoch of it a new permutation of `items` drawn from (seed, epoch).

    A pure function: a resumed run asks for its step and gets the same items. Refill round k of dynamic sampling passes seed=(seed, k).
    """
    if not items:
        raise UsageError("no items to draw a batch from")
    pages: dict[int, list[int]] = {}
    batch = []
    for position in range(step * n, step * n + n):
        epoch, place = divmod(position, len(items))
        if epoch not in pages:
            pages[epoch] = list(range(len(items)))
            random.Random(f"{seed} {epoch}").shuffle(pages[epoch])
        batch.append(items[pages[epoch][place]])
    return batch


# ------------------------------------------------------------------------------------------------ prompts
# Our own wording: the papers' prompts are not public. Known is what they ask for: thinking in tags first, then the answer in tags.
INSTRUCTIONS = {
    "think": "Answer the medical question. First reason inside <think> and </think>, then give the letter of the best option "
             "inside <answer> and </answer>, and nothing after it.",
    "direct": "Answer the medical question. Give only the letter of the best option, inside <answer> and </answer>.",
    "cot": "Answer the medical question. Think step by step, then give the letter of the best option inside <answer> and </answer>.",
}


def messages(item: Item, style: str = "think") -> list[dict[str, str]]:
    """The prompt of an item as chat messages. style: think (what is trained), direct and cot (the paper's baselines)."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options))
    return [{"role": "system", "content": INSTRUCTIONS[style]},
            {"role": "user", "content": f"{item.question}\n{options}" if options else item.question}]


def plain_text(chat: list[dict[str, str]]) -> str:
    """The prompt for a base model, which has no chat template: the transcript of a conversation, cut where the answer begins."""
    system, user = (message["content"] for message in chat)
    return f"{system}\n\nUser: {user}\n\nAssistant:"


def completion(item: Item, style: str = "think") -> str:
    """What supervised fine-tuning teaches to write: the rationale, where the item has one, and the letter."""
    answer = f"<answer> {item.answer} </answer>"
    return f"<think> {item.rationale} </think> {answer}" if style == "think" and item.rationale else answer


# --------------------------------------------------------------------------------------------------- demo
# Twenty conditions, each with four findings that a textbook would name first; one word each, since the demo's tokenizer knows words.
CONDITIONS = {
    "pneumonia": "productive-cough pleuritic-pain crackles rusty-sputum",
    "asthma": "wheeze night-cough pollen-trigger variable-peak-flow",
    "appendicitis": "right-iliac-pain rebound-tenderness anorexia migrating-pain",
    "migraine": "throbbing-headache photophobia visual-aura phonophobia",
    "gout": "big-toe-pain tophi high-urate negatively-birefringent-crystals",
    "hypothyroidism": "cold-intolerance weight-gain slow-reflexes dry-skin",
    "hyperthyroidism": "heat-intolerance tremor lid-lag weight-loss",
    "cystitis": "dysuria urinary-frequency suprapubic-pain cloudy-urine",
    "meningitis": "neck-stiffness petechial-rash kernig-sign bulging-fontanelle",
    "angina": "exertional-chest-pain relief-by-nitrate jaw-radiation st-depression",
    "pancreatitis": "epigastric-pain-to-back high-lipase grey-turner-sign alcohol-excess",
    "psoriasis": "silvery-plaques nail-pitting auspitz-sign extensor-rash",
    "cholera": "rice-water-stool severe-dehydration sunken-eyes contaminated-water",
    "measles": "koplik-spots coryza conjunctivitis maculopapular-rash",
    "parkinsonism": "rest-tremor bradykinesia shuffling-gait cogwheel-rigidity",
    "glaucoma": "halos-around-lights raised-eye-pressure cupped-disc tunnel-vision",
    "pulmonary-embolism": "sudden-dyspnoea haemoptysis leg-swelling recent-flight",
    "iron-deficiency": "pallor spoon-nails low-ferritin pica",
    "diabetes-insipidus": "polyuria dilute-urine hypernatraemia constant-thirst",
    "scabies": "burrows night-itch itchy-web-spaces affected-household",
}
_DEMO_SIZES = {"train": 3000, "dev": 200, "test": 300}
_AGES = tuple(f"{age}-year-old" for age in range(20, 80, 5))


def demo_items(split: str) -> list[Item]:
    """Vignettes of two or three findings with five options, made in code; the same on every machine.

    One three-finding combination of each condition never occurs in train; dev and test are different vignettes of just those. So the
    test asks for a combination that was never seen. Shared findings or more held-out combinations would need a larger model.
    """
    names, rng, seen = list(CONDITIONS), random.Random("demo"), set()
    items: dict[str, list[Item]] = {"train": [], "dev": [], "test": []}
    held_out = {name: rng.sample(CONDITIONS[name].split(), 3) for name in names}                  # lists: the order of a set of words differs between processes
    for part, size in _DEMO_SIZES.items():
        while len(items[part]) < size:
            name = names[len(items[part]) % len(names)]
            pool = [c for k in (2, 3) for c in combinations(CONDITIONS[name].split(), k) if set(c) != set(held_out[name])]
            findings = rng.choice(pool) if part == "train" else held_out[name]
            findings = rng.sample(findings, len(findings))
            options = rng.sample([n for n in names if n != name], 4) + [name]
            rng.shuffle(options)
            question = (f"a {rng.choice(_AGES)} {rng.choice(('man', 'woman'))} has {' and '.join(findings)} . "
                        "which diagnosis ?")
            item = Item(f"demo-{part}-{len(items[part])}", "choice", question, tuple(options), LETTERS[options.index(name)],
                        rationale=f"findings suggest {name}")
            if fingerprint(item) not in seen:
                seen.add(fingerprint(item))
                items[part].append(item)
    return items[split]


def demo_words() -> list[str]:
    """Every word that a demo prompt or completion can hold, in a fixed order: the vocabulary of the demo's tokenizer."""
    texts = ["a man woman has and . which diagnosis ? findings suggest <think> </think> <answer> </answer>", " ".join(_AGES),
             " ".join(CONDITIONS), " ".join(CONDITIONS.values()), " ".join(f"{letter} {letter}." for letter in LETTERS[:5])]
    return list(dict.fromkeys(" ".join(texts).split()))
