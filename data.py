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
from functools import lru_cache
from pathlib import Path

from support.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SPLITS = ("train", "dev", "test")
DATASETS = ("demo", "demo-images", "medqa", "medqa-4", "mmlu-pro-health", "bccd")
OFFERED = f"{', '.join(DATASETS)}, the MedMNIST sets (retinamnist, retinamnist-28, ...)"  # for help
MAX_LINE = 1_000_000                    # characters in one line of JSONL: a longer one is no exam question


@dataclass(frozen=True)
class Item:
    id: str
    task: str                           # "choice", "classify" (a closed set of names), "grade" (an ordered one) or "localize" (boxes)
    question: str
    options: tuple[str, ...]            # choice: their texts in the order A, B, C, ...; classify: the names; grade: the grades, lowest first; localize: ()
    answer: str | tuple                 # the gold letter, name or grade; localize: ((x1, y1, x2, y2), ...), half-open, in pixels of the original image
    image: object = None                # None, or one source or a tuple of them: a path, uint8 array [H, W] or [H, W, 3], PIL image, or images.Crop
    frame: tuple[int, int, int, int] | None = None     # boxes in prompt and completion refer to a width x height (the first two) that stands for the original one (the last two)
    patient: str = ""                   # where known: no patient stands in two splits
    # For the prompt (VRFT-Aug): a text about the task, then one about each class.
    knowledge: tuple[str, ...] = ()
    rationale: str = ""                 # why the answer is right, for supervised fine-tuning


def to_image(box, frame) -> tuple[float, ...]:
    """A box in the frame that the model sees -> pixels of the original image. frame = (its width, its height, image width, image height) or None.

    >>> to_image((10, 10, 20, 30), (100, 50, 200, 200)), to_frame((20, 40, 40, 120), (100, 50, 200, 200))
    ((20.0, 40.0, 40.0, 120.0), (10, 10, 20, 30))
    """
    width, height, image_width, image_height = frame or (1, 1, 1, 1)
    x, y = image_width / width, image_height / height
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def to_frame(box, frame) -> tuple[int, ...]:
    """The inverse of `to_image`, rounded, at least one wide and high: how supervised answers write a box."""
    width, height, image_width, image_height = frame or (1, 1, 1, 1)
    x1, y1, x2, y2 = (round(value) for value in to_image(box, (image_width, image_height, width, height)))
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


# -------------------------------------------------------------------------------------------------- load
def load(dataset: str, split: str, data_dir: str | None = None, limit: int | None = None, task: str = "", target: str = "") -> list[Item]:
    """The items of one split, in file order, the first `limit` of them.

    dataset: `demo`; `medqa` or `medqa-4` (five or four options) or `mmlu-pro-health` (test only), from the hub, or from `data_dir` with the same layout;
    `bccd` and the 2-D MedMNIST sets (images.py); or a path: a folder with train.jsonl, dev.jsonl and test.jsonl, or one .jsonl file, cut 80/10/10 by hash.
    task: where a set offers several (bccd: localize, classify). target: what to find in bccd, WBC unless said.
    Raises UsageError with the file, the line and the way on.
    """
    import images                                                             # here, since it builds on this file
    images.check(dataset, data_dir, task, target)
    if split not in SPLITS:
        raise UsageError(f"no split {split!r}: there are {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit {limit} leaves no items: give at least 1")
    if dataset == "demo":
        import demo
        items = demo.demo_items(split)
    elif dataset in ("medqa", "medqa-4"):
        items = medqa_items(dataset, split, data_dir)
    elif dataset == "mmlu-pro-health":
        items = mmlu_pro_items(split, data_dir)
    elif dataset == "demo-images":
        import demo
        items = demo.lesion_items(split, task or "classify")
    elif dataset == "bccd":
        items = images.bccd_items(split, data_dir, task or "localize", target or "WBC")
    elif images.is_medmnist(dataset):
        items = images.medmnist_items(dataset, split, data_dir)
    elif Path(dataset).exists():
        items = own_items(Path(dataset), split, task)
    else:
        raise UsageError(f"no data set named {dataset!r}, and no file or folder of that name: "
                         f"there are {OFFERED}, or give the path of a JSONL file")
    if not items:
        raise UsageError(f"{dataset}: split {split!r} has no items")
    if task and (other := {item.task for item in items} - {task}):
        raise UsageError(f"--task {task}: {dataset} has items for {', '.join(sorted(other))}")
    return items[:limit]


def is_known(dataset: str) -> bool:
    import images
    return dataset in DATASETS or images.is_medmnist(dataset)


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


def own_items(path: Path, split: str, task: str = "") -> list[Item]:
    """Your own data. One JSON object a line: {"question", "options": [texts] or {letter: text}, "answer": letter, "id"?, "rationale"?}.

    With "image" or "images" (paths beside the file) also labels, grades or boxes: `images.own_image_item`.
    """
    file = path if path.is_file() else path / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(f"{file} is not there: a folder of your own data holds train.jsonl, dev.jsonl and test.jsonl")
    with file.open(encoding="utf-8") as lines:
        items = read_jsonl(lines, str(file), file.stem, split, published=False, task=task)
    if path.is_dir():
        return items
    share = {0: "dev", 1: "test"}                                             # a tenth each; the same item falls into the same split, wherever it stands
    place = lambda item: int(hashlib.sha256(sorted(apart(item))[-1].encode()).hexdigest(), 16) % 10       # "patient ..." sorts behind the hashes: a patient's items together
    return [item for item in items if share.get(place(item), "train") == split]


def read_jsonl(lines: Iterable[str], where: str, dataset: str, split: str, published: bool, task: str = "") -> list[Item]:
    """MedQA's schema and our own: options as a list or by letter, the gold letter in `answer_idx` or `answer`."""
    items, alike, seen = [], 0, {}
    for number, line in enumerate(decoded(lines, where), 1):
        if not line.strip():
            continue
        item, duplicates = read_item(line, f"{where}, line {number}", f"{dataset}-{split}-{number}", published, Path(where).parent, task)
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


def read_item(line: str, where: str, default_id: str, published: bool, folder: Path = Path(), task: str = "") -> tuple[Item, bool]:
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
    import images
    image = ()
    if "image" in row or "images" in row:
        if "options" not in row:
            return images.own_image_item(row, where, default_id, folder, task), False
        image = images.own_images(row, where, folder)
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
    if answer is None:
        raise UsageError(f"{where}: no 'answer'; there are {', '.join(map(repr, row))}")
    if not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS[:len(options)]:
        raise UsageError(f"{where}: the answer {answer!r} is not one of the option letters {', '.join(LETTERS[:len(options)])}")
    duplicates = len({" ".join(o.split()).casefold() for o in options}) < len(options)
    if duplicates and not published:
        raise UsageError(f"{where}: two options have the same text")
    return Item(str(row.get("id", default_id)), "choice", question.strip(), tuple(o.strip() for o in options), answer,
                image=image or None, patient=images.own_text(row, "patient", where),
                rationale=images.own_rationale(row, where)), duplicates


# --------------------------------------------------------------------------------- splits, order, batches
def fingerprint(item: Item) -> str:
    """Hash of the normalised question *and* options, and of the images' pixels: "Which of these is true?" alone occurs many times."""
    flat = lambda text: " ".join(text.split()).casefold()
    return hashlib.sha256("\n".join([flat(item.question), *sorted(map(flat, item.options)), *pixels(item)]).encode()).hexdigest()


def pixels(item: Item) -> list[str]:
    """A hash of each image's pixels."""
    import images
    return [images.pixel_hash(source) for source in images.sources(item)]


def apart(item: Item) -> set[str]:
    """What must not stand in two splits: the question, or with images each image (by its pixels) and the patient."""
    shown = {fingerprint(item)} if item.image is None else set(pixels(item))
    return shown | ({f"patient {item.patient}"} if item.patient else set())


def set_fingerprint(items: list[Item]) -> str:
    """Of a whole split, in its order, answers included: tells a resumed run whether its data is still the same."""
    return hashlib.sha256(" ".join(f"{fingerprint(item)}{item.answer}" for item in items).encode()).hexdigest()[:16]


def without(items: list[Item], held_out: list[Item]) -> list[Item]:
    """The items that share no question, image or patient with `held_out`."""
    taken = set().union(*map(apart, held_out))
    return [item for item in items if not apart(item) & taken]


def by_class(items: list[Item], seed) -> list[list[Item]]:
    """The items of each class in an order drawn from the seed; boxes are one class."""
    classes: dict[str, list[Item]] = {}
    for item in items:
        classes.setdefault("boxes" if item.task == "localize" else str(item.answer), []).append(item)
    for name, members in classes.items():
        random.Random(f"{seed} {name}").shuffle(members)
    return list(classes.values())


def few_shot(items: list[Item], n: int, seed) -> list[Item]:
    """n items of each class, or all where there are fewer."""
    few = [item for members in by_class(items, seed) for item in members[:n]]
    return random.Random(f"{seed} few").sample(few, len(few))                 # mixed: a limit must not cut off the last classes


def balanced(items: list[Item], seed) -> list[Item]:
    """Every class as often as the commonest: the items of rarer ones are repeated."""
    classes = by_class(items, seed)
    most = max(map(len, classes))
    return [members[i % len(members)] for members in classes for i in range(most)]


def shuffle_options(item: Item, seed: int = 0) -> Item:
    """The same question with its options in another order, a function of (seed, item.id); the gold letter moves along."""
    order = list(range(len(item.options)))
    random.Random(f"{seed} {item.id}").shuffle(order)
    if item.task != "choice":                                                 # names have no letters, and grades an order of their own
        return replace(item, options=tuple(item.options[i] for i in order)) if item.task == "classify" else item
    return replace(item, options=tuple(item.options[i] for i in order), answer=LETTERS[order.index(LETTERS.index(item.answer))])


def rotate_options(item: Item, by: int = 1) -> Item:
    """The same question with every option moved `by` places up, the first ones to the end."""
    n, gold = len(item.options), LETTERS.index(item.answer)
    return replace(item, options=item.options[by % n:] + item.options[:by % n], answer=LETTERS[(gold - by) % n])


@lru_cache(maxsize=4)
def permutation(length: int, key: str) -> list[int]:
    order = list(range(length))
    random.Random(key).shuffle(order)
    return order


def batch_for_step(items: list[Item], step: int, n: int, seed) -> list[Item]:
    """The n items of a step: pages of an endless book, each epoch of it a new permutation of `items` drawn from (seed, epoch).

    A pure function: a resumed run asks for its step and gets the same items. Refill round k of dynamic sampling passes seed=(seed, k).
    """
    if not items:
        raise UsageError("no items to draw a batch from")
    batch = []
    for position in range(step * n, step * n + n):
        epoch, place = divmod(position, len(items))
        batch.append(items[permutation(len(items), f"{seed} {epoch}")[place]])
    return batch


# ---------------------------------------------------------------------------------------------- knowledge
def with_knowledge(items: list[Item], dataset: str, level: str, file: str = "") -> list[Item]:
    """Prior knowledge in the prompt (VRFT-Aug's explicit perception augmentation). level: none, task (what kind of image), class (and what each class looks like).

    file: Markdown, `# task` and a `## NAME` section for each class; empty = knowledge/DATASET-TASK.md or knowledge/DATASET.md beside this file.
    """
    if level == "none":
        return items
    folder, base, task = Path(__file__).parent / "knowledge", dataset.partition("-")[0] if "mnist" in dataset else Path(dataset).stem, items[0].task
    path = Path(file) if file else next((p for p in (folder / f"{base}-{task}.md", folder / f"{base}.md") if p.is_file()), None)
    if path is None:
        raise UsageError(f"--knowledge {level}: there is none for {dataset}; write a file with a '# task' and a '## NAME' section for each class, and give it by --knowledge-file")
    sections = read_knowledge(path)
    names = {name for item in items for name in item.options}
    if items[0].task != "choice" and names:                                   # boxes have no classes: all sections are told
        if missing := sorted(names - set(sections)):
            raise UsageError(f"{path}: no section '## {missing[0]}'; every class needs one: {', '.join(sorted(names))}")
        if unknown := sorted(set(sections) - names - {"task"}):
            raise UsageError(f"{path}: the section '## {unknown[0]}' names no class of {dataset}; there are {', '.join(sorted(names))}")
    told = [sections["task"], *(f"{name}: {text}" for name, text in sections.items() if level == "class" and name != "task")]
    return [replace(item, knowledge=tuple(told)) for item in items]


def read_knowledge(path: Path) -> dict[str, str]:
    """{"task": text, class name: text, ...}; comments and line breaks inside a section do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    sections: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            name = line.lstrip("#").strip()
            if name in sections:
                raise UsageError(f"{path}, line {number}: a second section {name!r}")
            sections[name] = []
        elif sections and not line.startswith("<!--"):
            sections[list(sections)[-1]].append(line.strip())
    texts = {name: " ".join(filter(None, of_section)) for name, of_section in sections.items()}
    for name in ("task", *texts):
        if not texts.get(name):
            raise UsageError(f"{path}: the section {name!r} is missing or empty")
    return texts


# ------------------------------------------------------------------------------------------------ prompts
# Our own wording: the papers' prompts are not public. Known is what they ask for: thinking in tags first, then the answer in tags.
INSTRUCTIONS = {
    "think": "Answer the medical question. First reason inside <think> and </think>, then give {} inside <answer> and </answer>, and nothing after it.",
    "direct": "Answer the medical question. Give only {}, inside <answer> and </answer>.",
    "cot": "Answer the medical question. Think step by step, then give {} inside <answer> and </answer>.",
}
WANTED = {"choice": "the letter of the best option", "classify": "the name of the class, exactly as listed", "grade": "the grade",
          "localize": "the boxes as [[x1, y1, x2, y2], ...]"}


def messages(item: Item, style: str = "think") -> list[dict[str, str]]:
    """The prompt of an item as chat messages, its images left out. style: think (what is trained), direct and cot (the paper's baselines)."""
    wanted = WANTED[item.task]
    if item.task == "localize" and item.frame:
        wanted += " in pixels of a {} x {} image".format(*item.frame)
    listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options)] if item.task == "choice" else [f"- {text}" for text in item.options]
    lines = [*item.knowledge, item.question, *listed]
    return [{"role": "system", "content": INSTRUCTIONS[style].format(wanted)}, {"role": "user", "content": "\n".join(lines)}]


def plain_text(chat: list[dict[str, str]]) -> str:
    """The prompt for a base model, which has no chat template: the transcript of a conversation, cut where the answer begins."""
    system, user = (message["content"] for message in chat)
    return f"{system}\n\nUser: {user}\n\nAssistant:"


# The think block of an item without a rationale. Our choice, since no paper has one: it is true of
# every item and names no answer, and with it the completion has the form that the reward asks for.
NO_RATIONALE = "The answer follows from what is given."


def says_something(text: str) -> bool:
    """Whether a text holds a letter or a digit of any script.

    >>> says_something("."), says_something("\\u200b"), says_something("-1")
    (False, False, True)
    """
    return any(map(str.isalnum, text))


def completion(item: Item, style: str = "think") -> str:
    """What supervised fine-tuning teaches to write; `rewards.grade` gives it the full reward.

    The answer is the letter, name, grade or boxes, the latter rounded to the item's frame. In the
    style "think" the rationale, or where the item has none `NO_RATIONALE`, stands before it: an
    answer without a think block is malformed.
    """
    gold = item.answer
    if item.task == "localize":
        gold = [list(to_frame(box, item.frame)) for box in item.answer]
    answer = f"<answer> {gold} </answer>"
    if style != "think":
        return answer
    reasoning = item.rationale if says_something(item.rationale) else NO_RATIONALE
    return f"<think> {reasoning} </think> {answer}"
