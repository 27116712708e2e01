"""Data sets as lists of `Item`s, the prompts made of them, and which items each training step sees.

Read it with Med-RLVR (arXiv 2502.19655), section 4.1: MedQA-USMLE with five options for training,
questions and answer letters only. A data set is a row of `LOADERS`. Everything is a pure function
of files and seeds: `batch_for_step` has no cursor, so a resumed run needs none.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from support import demo_task, image_sets, jsonl, parquet_sets, pictures, text_sets
from support.errors import UsageError
from support.knowledge import texts
from support.text import LETTERS, WORDS, flat

SPLITS = ("train", "dev", "test")
OOD = "ood"  # a further test split, which asks for more than any item of train
INSTRUCTION = "Answer the medical question."


@dataclass(frozen=True)
class Limits:
    """Where the stages of training begin (`rewards.stage`): our choice, for real questions."""

    short: int = 30  # words: a think block below this is "drastically short"
    verbose: int = 256  # tokens: a completion above this is "needlessly long"
    before: int = 15  # words: more of them in front of <think> is reasoning moved out


@dataclass(frozen=True)
class Item:
    """A question with its gold answer.

    task      options                          answer
    choice    texts in the order A, B, C, ...  the gold letter
    classify  the names of a closed set        one of them
    grade     grades, lowest first             one of them
    localize  ()                               ((x1, y1, x2, y2), ...), half-open, in pixels of the
                                               original image
    """

    id: str
    task: str
    question: str
    options: tuple[str, ...]
    answer: str | tuple
    # None, or one source or a tuple of them: a path, the bytes of a file, uint8 array [H, W] or
    # [H, W, 3], Pillow image, or pictures.Crop
    image: object = None
    # (w, h, W, H): boxes in prompt and completion refer to w x h pixels, which stand for the
    # W x H of the original image
    frame: tuple[int, int, int, int] | None = None
    patient: str = ""  # where known: no patient stands in two splits
    # For the prompt (VRFT-Aug): a text about the task, then one about each class.
    knowledge: tuple[str, ...] = ()
    rationale: str = ""  # why the answer is right, for supervised fine-tuning
    instruction: str = INSTRUCTION  # the prompt's first sentence
    limits: Limits = Limits()


def to_image(box, frame) -> tuple[float, ...]:
    """A box in the frame that the model sees -> pixels of the original image.

    >>> to_image((10, 10, 20, 30), (100, 50, 200, 200))
    (20.0, 40.0, 40.0, 120.0)
    """
    width, height, image_width, image_height = frame or (1, 1, 1, 1)
    x, y = image_width / width, image_height / height
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def to_frame(box, frame) -> tuple[int, ...]:
    """The inverse of `to_image`, rounded, at least one wide and high: as completions write a box.

    >>> to_frame((20, 40, 40, 120), (100, 50, 200, 200))
    (10, 10, 20, 30)
    """
    width, height, image_width, image_height = frame or (1, 1, 1, 1)
    back = (image_width, image_height, width, height)
    x1, y1, x2, y2 = (round(value) for value in to_image(box, back))
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


# --------------------------------------------------------------------------------- the data sets
def own_rows(path: Path, split: str, data_dir: str | None, task: str) -> list[dict]:
    """Your own data, a JSON object a line (`jsonl.row_of` has the keys).

    A folder holds train.jsonl, dev.jsonl and test.jsonl. One file is cut by hash, a tenth each for
    dev and test: an item falls into the same split wherever in the file it stands.
    """
    file = path if path.is_file() else path / f"{split}.jsonl"
    if not file.is_file():
        raise UsageError(
            f"{file} is not there: a folder of your own data holds "
            "train.jsonl, dev.jsonl and test.jsonl"
        )
    rows = jsonl.read_file(file, f"{file.stem}-{split}", task=task)
    if path.is_dir():
        return rows
    return [row for row in rows if split_of(Item(**row)) == split]


def split_of(item: Item) -> str:
    # The last in order: "patient ..." sorts behind the hashes, so a patient's items stay together.
    key = sorted(apart(item))[-1]
    tenth = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {0: "dev", 1: "test"}.get(tenth, "train")


@dataclass(frozen=True)
class Source:
    """A data set: its items, its prompt, and what a run on it needs."""

    # (split, data_dir, task) -> dictionaries with the keywords of Item
    rows: Callable[[str, str | None, str], list[dict]]
    licence: str  # of the items; a set whose licence is not known is not offered
    tasks: tuple[str, ...] = ("choice",)  # those of its items; the first unless --task says another
    splits: tuple[str, ...] = SPLITS  # and OOD, where there is one
    instruction: str = INSTRUCTION
    limits: Limits = Limits()
    # Rationale -> its steps, where these are the only right ones: evaluation looks for them.
    steps: Callable[[str], list[str]] | None = None
    # Fields of Config. Flags beat these, and these beat the algorithm's row.
    defaults: dict = field(default_factory=dict)
    by_hand: str = ""  # how to get a set that is not downloaded by itself
    about: str = ""  # what it is and where it comes from, for `python data.py`


# Learning rates are for adapters unless said otherwise.
TINY = dict(full=True, samples=8, warmup=10, checkpointing=False, kl_coef=0.0)
# At 5e-4 one seed of five came to .49 on longer courses, at 3e-4 none of five below .88.
DEMO = TINY | dict(steps=80, prompts=16, max_new=26, lr=3e-4, eval_samples=2)
DEMO_IMAGES = TINY | dict(steps=120, prompts=12, max_new=32, lr=5e-4, eval_samples=4, eval_every=25)
# A base model, as in the paper; the rest is our choice.
MEDQA = dict(model="Qwen/Qwen2.5-3B", template="plain", steps=300, lr=1e-5, max_new=512)
# 200 steps as in Visual-RFT.
IMAGES = {
    **dict(model="Qwen/Qwen2.5-VL-3B-Instruct", steps=200, lr=1e-5),
    **dict(max_new=256, max_prompt=2048),
}


def medqa(name: str, options: str) -> Source:
    about = f"MedQA-USMLE, {options} options (arXiv 2009.13081)"
    return Source(partial(text_sets.medqa_rows, name), "MIT", defaults=MEDQA, about=about)


def bccd(target: str, tasks: tuple[str, ...] = ("localize",)) -> Source:
    """Boxes around the cells of one kind."""
    url = "https://github.com/Shenggan/BCCD_Dataset"
    by_hand = f"git clone {url}, then give --data-dir BCCD_Dataset"
    about = f"blood smears with boxes of {target} ({url})"
    rows = partial(image_sets.bccd_rows, target)
    return Source(rows, "MIT", tasks, defaults=IMAGES, by_hand=by_hand, about=about)


def medmnist(name: str) -> Source:
    one = image_sets.MEDMNIST[name.partition("-")[0]]
    about = f"{one.picture} (MedMNIST v2, arXiv 2110.14795)"
    rows = partial(image_sets.medmnist_rows, name)
    return Source(rows, one.licence, (one.task,), defaults=IMAGES, about=about)


# A direct answer thinks two words, the shortest course that is worked out eight.
PROTOCOL = Source(
    demo_task.protocol_rows,
    "MIT",
    splits=(*SPLITS, OOD),
    limits=Limits(short=4, verbose=26, before=3),
    steps=demo_task.steps,
    defaults=DEMO,
    about="an invented dose protocol, made in code; OOD: longer courses",
)
LOADERS = {
    "demo": PROTOCOL,
    # Two to hack (--hackable): either reward can be had without reasoning inside <think>.
    "demo-referral": replace(
        PROTOCOL,
        rows=partial(demo_task.protocol_rows, referral=True),
        defaults=DEMO | dict(w_overlong=1.0),
        about="the same, with a guess in the question that is right in training only",
    ),
    "demo-outside": replace(
        PROTOCOL,
        defaults=DEMO | dict(max_new=32),
        about="the same, after a warm start that often reasons in front of <think>",
    ),
    "demo-images": Source(
        demo_task.lesion_rows,
        "MIT",
        tasks=("classify", "grade", "localize"),
        defaults=DEMO_IMAGES,
        about="lesions drawn in code",
    ),
    "medqa": medqa("medqa", "five"),
    "medqa-4": medqa("medqa-4", "four"),
    "mmlu-pro-health": Source(
        parquet_sets.mmlu_pro_rows,
        "MIT",
        splits=("test",),
        about="MMLU-Pro's 818 health questions (arXiv 2406.01574)",
    ),
    "medmcqa": Source(
        parquet_sets.medmcqa_rows,
        "Apache-2.0",
        defaults=MEDQA,
        about="182,822 + 4,183 questions of Indian entrance exams (arXiv 2203.14371)",
    ),
    "pubmedqa": Source(
        parquet_sets.pubmedqa_rows,
        "MIT",
        tasks=("classify",),
        defaults=MEDQA,
        about="1,000 questions on abstracts: yes, no, maybe (arXiv 1909.06146)",
    ),
    "vqa-rad": Source(
        parquet_sets.vqa_rad_rows,
        "CC0-1.0",
        tasks=("classify",),
        defaults=IMAGES,
        about="radiology, the yes or no ones of 2,244 questions (doi 10.1038/sdata.2018.251)",
    ),
    "bccd": bccd("WBC", tasks=("localize", "classify")),
    "bccd-rbc": bccd("RBC"),
    "bccd-platelets": bccd("Platelets"),
    **{name: medmnist(name) for name in image_sets.NAMES},
}
DEMOS = tuple(name for name in LOADERS if name.startswith("demo"))  # with a model of their own
DATASETS = tuple(name for name in LOADERS if name not in image_sets.NAMES)
OFFERED = f"{', '.join(DATASETS)}, the MedMNIST sets (retinamnist, retinamnist-28, ...)"


def source_of(dataset: str, data_dir: str | None = None, task: str = "") -> Source:
    """The row of a data set, or of the file or folder of that name. Nothing is read yet.

    Raises UsageError where there is no such set, or it has not what is asked of it.
    """
    if dataset not in LOADERS:
        return own(dataset)
    source = LOADERS[dataset]
    if task and task not in source.tasks:
        there = " and ".join(source.tasks)
        raise UsageError(f"{dataset} cannot be used for the task {task!r}, only for {there}")
    if source.by_hand and not data_dir:
        raise UsageError(f"{dataset} is not downloaded by itself: {source.by_hand}")
    return source


def own(dataset: str) -> Source:
    if why := image_sets.why_not(dataset):
        raise UsageError(why)
    path = Path(dataset)
    if not path.exists():
        raise UsageError(
            f"no data set named {dataset!r}, and no file or folder of that name: "
            f"there are {OFFERED}, or give the path of a JSONL file"
        )
    # Without --task the first of these: each line is of the task for which it has an answer.
    tasks = ("", "choice", "classify", "grade", "localize")
    return Source(partial(own_rows, path), "your own", tasks)


def load(
    dataset: str, split: str, data_dir: str | None = None, limit: int | None = None, task: str = ""
) -> list[Item]:
    """The items of one split, in file order, the first `limit` of them.

    dataset: a name in LOADERS; or a path of your own data, see `own_rows`.
    data_dir: the folder that holds the published files, instead of the hub, in the same layout.
    task: where a set offers several, such as bccd localize and classify.
    Raises UsageError with the file, the line and the way on.
    """
    source = source_of(dataset, data_dir, task)
    if split not in (*SPLITS, OOD):
        raise UsageError(f"no split {split!r}: there are {', '.join(SPLITS)} and {OOD}")
    if split not in source.splits:
        only = ", ".join(source.splits)
        raise UsageError(f"{dataset} has no split {split!r}, only {only}")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit {limit} leaves no items: give at least 1")
    rows = source.rows(split, data_dir, task or source.tasks[0])
    ours = {"instruction": source.instruction, "limits": source.limits}
    items = [Item(**ours, **row) for row in rows]
    if not items:
        raise UsageError(f"{dataset}: split {split!r} has no items")
    if task and (other := {item.task for item in items} - {task}):
        raise UsageError(f"--task {task}: {dataset} has items for {', '.join(sorted(other))}")
    return items[:limit]


# ------------------------------------------------------------------------ splits, order, batches
def fingerprint(item: Item) -> str:
    """Hash of the normalised question *and* options, and of the images' pixels.

    The question alone would not do: "Which of these is true?" occurs many times.
    """
    parts = [flat(item.question), *sorted(map(flat, item.options)), *pixels(item)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pixels(item: Item) -> list[str]:
    """A hash of each image's pixels."""
    return [pictures.pixel_hash(source) for source in pictures.sources(item.image)]


def apart(item: Item) -> set[str]:
    """What must not stand in two splits: the question, or each image, and the patient."""
    shown = {fingerprint(item)} if item.image is None else set(pixels(item))
    return shown | ({f"patient {item.patient}"} if item.patient else set())


def set_fingerprint(items: list[Item]) -> str:
    """Of a whole split, in its order, answers included.

    It tells a resumed run whether its data is still the same.
    """
    text = " ".join(f"{fingerprint(item)}{item.answer}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without(items: list[Item], held_out: list[Item]) -> list[Item]:
    """The items that share no question, image or patient with `held_out`."""
    taken = set().union(*map(apart, held_out))
    return [item for item in items if not apart(item) & taken]


def few_shot(items: list[Item], n: int, seed) -> list[Item]:
    """n items of each class, drawn by the seed, or all where there are fewer; boxes are one class.

    The classes are mixed, so that a limit does not cut off the last of them.
    """
    classes: dict[str, list[Item]] = {}
    for item in items:
        name = "boxes" if item.task == "localize" else str(item.answer)
        classes.setdefault(name, []).append(item)
    few = []
    for name, members in classes.items():
        random.Random(f"{seed} {name}").shuffle(members)
        few += members[:n]
    return random.Random(f"{seed} few").sample(few, len(few))


def shuffle_options(item: Item, seed: int = 0) -> Item:
    """The same question with its options in another order, a function of (seed, item.id).

    The gold letter moves along. Grades have an order of their own and keep it.
    """
    if item.task not in ("choice", "classify"):
        return item
    order = list(range(len(item.options)))
    random.Random(f"{seed} {item.id}").shuffle(order)
    answer = item.answer
    if item.task == "choice":
        answer = LETTERS[order.index(LETTERS.index(answer))]
    return replace(item, options=tuple(item.options[i] for i in order), answer=answer)


def rotate_options(item: Item, by: int = 1) -> Item:
    """The same question with every option moved `by` places up, the first ones to the end."""
    n, gold = len(item.options), LETTERS.index(item.answer)
    by %= n
    options = item.options[by:] + item.options[:by]
    return replace(item, options=options, answer=LETTERS[(gold - by) % n])


def batch_for_step(items: list[Item], step: int, n: int, seed) -> list[Item]:
    """The n items of a step: pages of an endless book.

    Each epoch of it is a new permutation of `items` drawn from (seed, epoch). As a pure function it
    gives a resumed run the same items. Refill round k of dynamic sampling passes seed=(seed, k).
    """
    if not items:
        raise UsageError("no items to draw a batch from")
    epoch, place = divmod(step * n, len(items))
    pages: list[Item] = []
    while len(pages) < place + n:
        order = list(items)
        random.Random(f"{seed} {epoch}").shuffle(order)
        pages, epoch = pages + order, epoch + 1
    return pages[place : place + n]


# ------------------------------------------------------------------------------------- knowledge
def with_knowledge(items: list[Item], dataset: str, knowledge: str) -> list[Item]:
    """Prior knowledge in the prompt: VRFT-Aug's explicit perception augmentation.

    knowledge: none, task (what kind of image it is), class (what each class looks like too), or the
    path of a file of one's own.
    """
    if knowledge == "none":
        return items
    base, task = Path(dataset).stem, items[0].task
    stems = [f"{base}-{task}", base]
    if dataset in LOADERS:  # retinamnist-28 and bccd-rbc have the files of retinamnist and bccd
        stems.append(base.partition("-")[0])
    names = {name for item in items for name in item.options} if task != "choice" else set()
    told = texts(knowledge, stems, names, dataset)
    return [replace(item, knowledge=told) for item in items]


# --------------------------------------------------------------------------------------- prompts
# Our own wording: the papers' prompts are not public. Known is what they ask for: thinking in tags
# first, then the answer in tags. Of several wordings a small Qwen2.5 follows this one most often
# (benchmarks/prompts.py); "..." has no words, so who copies the form as it stands earns nothing.
# The item's instruction stands before it.
INSTRUCTIONS = {
    "think": "First reason inside <think> and </think>, "
    "then give {} inside <answer> and </answer>, and nothing after it. "
    "The form: <think> ... </think> <answer> X </answer>",
    "direct": "Give only {}, inside <answer> and </answer>. The form: <answer> X </answer>",
    "cot": "Think step by step, then give {} inside <answer> and </answer>. "
    "The form: ... <answer> X </answer>",
}
WANTED = {
    "choice": "the letter of the best option",
    "classify": "the name of the class, exactly as listed",
    "grade": "the grade",
    "localize": "the boxes as [[x1, y1, x2, y2], ...]",
}


def messages(item: Item, style: str = "think") -> list[dict[str, str]]:
    """The prompt of an item as chat messages, its images left out.

    style: think (what is trained), direct and cot (the paper's baselines).
    """
    wanted = WANTED[item.task]
    if item.task == "localize" and item.frame:
        wanted += " in pixels of a {} x {} image".format(*item.frame)
    listed = [f"- {text}" for text in item.options]
    if item.task == "choice":
        listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, item.options)]
    system = f"{item.instruction} {INSTRUCTIONS[style].format(wanted)}"
    user = "\n".join([*item.knowledge, item.question, *listed])
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def plain_text(chat: list[dict[str, str]]) -> str:
    """The prompt for a base model, which has no chat template.

    It is the transcript of a conversation, cut where the answer begins.
    """
    system, user = (message["content"] for message in chat)
    return f"{system}\n\nUser: {user}\n\nAssistant:"


# The think block of an item without a rationale. Our choice, since no paper has one: it is true of
# every item and names no answer, and with it the completion has the form that the reward asks for.
NO_RATIONALE = "The answer follows from what is given."


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
    reasoning = item.rationale if WORDS.search(item.rationale) else NO_RATIONALE
    return f"<think> {reasoning} </think> {answer}"


if __name__ == "__main__":
    for name in (*DATASETS, *image_sets.MEDMNIST):
        source = LOADERS[name]
        print(f"{name:16} {', '.join(source.tasks):25} {source.licence:12} {source.about}")
