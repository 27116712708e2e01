"""The warm starts that stand in for pre-training, and the first policy of a run that names none.

Reinforcement learning at this size brings out a skill, it does not create one. So a random model is
first taught the skill, and then to use it rarely: mostly it answers at once, at random, in a broken
form. In the mixture that the demo begins with, one text in seven reasons.
"""

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import data
from data import Item
from policy import Policy, Rollout, collate
from support import demo_task
from support.demo_model import demo_policy, tiny_vl_policy
from support.distributed import say
from support.progress import Progress
from support.seeds import fold
from support.text import LETTERS


def first_policy(config, items: list[Item], warm: bool = True) -> Policy:
    """The model of a run that names none: the demo's after its warm start, or tiny-vl as it is."""
    seed = fold(config.seed, "model")
    warm = warm and config.model != "tiny-vl"
    if warm:
        say("a tiny model is made first and taught: about a minute on a CPU")
    if items[0].image is None and config.model != "tiny-vl":
        policy = demo_policy(seed)
        if warm:
            protocol_start(policy, config)
        return policy
    texts = []
    for item in items[:200]:
        texts += [data.messages(item)[1]["content"], data.completion(item)]
    policy = tiny_vl_policy(seed, texts, train_vision=True)
    if warm:
        lesion_start(policy, items, config)
    return policy


# --------------------------------------------------------------------------- the demo's protocol
RESULTS = (1, 2, 3, 4, 5, 6, 6)  # of a course: as in pre-training, longer ones are seen too
RATE = 2e-3
# Of some twenty words of a text one is the letter and two to six are levels. The others are copied
# or always the same, and would drown these look-ups.
LETTER_WEIGHT, LEVEL_WEIGHT = 5.0, 3.0
# Losses in nats, means of five lessons, below which a look-up counts as learned. A number of
# lessons would not do, since seeds differ: from a start without the look-ups reinforcement learning
# finds the form, and then nothing that pays but guessing.
LETTERS_KNOWN = {"drilled letter": 0.3}
STEPS_KNOWN = {"letter": 0.1, "level": 0.1, "word": 0.01}
# Shares of the texts that a run begins with; our choice.
STEPWISE, WELL_FORMED, OUTSIDE = 0.15, 0.35, 0.4


def protocol_start(policy: Policy, config, limit: int = 1800) -> None:
    """Four parts, on courses of training of every length; the first two end by their gates.

    letters  Drills: a dose at random, then its letter among the options. This look-up is the
             slowest to come, and without it no text earns a reward.
    steps    Two texts that go step by step, then a drill, in turns.
    settle   The same, while the learning rate falls to a tenth; here what can be hacked comes in.
    mixture  What a base model might say: most texts answer at once, most have a broken form.
    """
    lessons = ProtocolLessons(policy, config)
    lessons.study("letters", lambda step: lessons.drill(), limit, LETTERS_KNOWN)
    lessons.study("steps", lambda step: lessons.in_turns(step, plain=True), limit, STEPS_KNOWN)
    lessons.study("settle", lambda step: lessons.in_turns(step), 400, rates=(RATE, RATE / 10))
    # The rate falls, so that less of the steps is forgotten while the form is spoilt.
    lessons.study("mixture", lambda step: lessons.mixture(), 60, rates=(6e-4, 6e-5))


class ProtocolLessons:
    """What the random model is taught, and the optimiser that it learns by."""

    def __init__(self, policy: Policy, config):
        self.policy, self.rng, self.taken = policy, random.Random(f"warm {config.seed}"), 0
        parameters = policy.trainable().values()
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
        # A base model has no reason to trust a referral: here its guesses are right by chance.
        self.reliable = 0.0 if config.dataset == "demo-referral" else None
        self.outside = OUTSIDE if config.dataset == "demo-outside" else 0.0
        of_word = policy.tokenizer.convert_tokens_to_ids
        self.letters = torch.tensor(of_word(list(LETTERS[:5])), device=policy.device)
        self.levels = torch.tensor(of_word(list(demo_task.LEVELS)), device=policy.device)

    def study(
        self,
        name: str,
        lesson: Callable[[int], list[Rollout]],
        limit: int,
        gates: dict[str, float] | None = None,
        rates: tuple[float, float] = (RATE, RATE),
    ) -> None:
        """Lessons until every loss that `gates` names is below its gate, at most `limit` of them.

        rates: the learning rate of the first and of the last one.
        """
        recent = defaultdict(lambda: deque([9.0] * 5, maxlen=5))
        with Progress(f"warm start: {name}", limit, "step") as progress:
            for step in range(limit):
                rate = rates[0] + (rates[1] - rates[0]) * step / limit
                self.optimizer.param_groups[0]["lr"] = rate * min((self.taken + 1) / 20, 1.0)
                for what, loss in self.learn(lesson(step), name == "mixture").items():
                    recent[what].append(loss)
                self.taken += 1
                losses = {what: sum(of_five) / 5 for what, of_five in recent.items()}
                told = ", ".join(f"{what} {loss:.3f}" for what, loss in losses.items())
                progress.update(1, f"loss of a {told}")
                known = all(losses.get(what, 9.0) < gate for what, gate in (gates or {}).items())
                if gates and known:
                    break
        say(f"warm start: {name}, {step + 1} steps; loss of a {told}")
        if gates and not known:
            below = ", ".join(f"{what} {gate}" for what, gate in gates.items())
            say(f"that is not learned ({below}): such a start stays at chance; try another --seed")

    # -- the lessons: rollouts that nobody sampled
    def drill(self, plain: bool = True) -> list[Rollout]:
        """Sixteen prompts, eight direct answers each; plain: at random whatever a referral says."""
        asked = [self.vignette() for _ in range(16)]
        return self.written(
            [(item, [whole(*self.direct(item, plain)) for _ in range(8)]) for item in asked]
        )

    def in_turns(self, step: int, plain: bool = False) -> list[Rollout]:
        """Two lessons of 32 texts step by step, then a drill; plain: nothing stands outside."""
        if step % 3 == 0:
            return self.drill(plain)
        asked = [self.vignette() for _ in range(32)]
        texts = [whole(item.rationale, item.answer) for item in asked]
        if self.outside and not plain:
            texts[::2] = map(outside, asked[::2])
        return self.written([(item, [text]) for item, text in zip(asked, texts)])

    def mixture(self) -> list[Rollout]:
        """32 prompts, four texts each."""
        asked = [self.vignette() for _ in range(32)]
        return self.written([(item, [self.anything(item) for _ in range(4)]) for item in asked])

    def vignette(self) -> Item:
        return Item("", **demo_task.vignette(self.rng, RESULTS, "train", self.reliable))

    def direct(self, item: Item, plain: bool = False) -> tuple[str, str]:
        """A think block that only names a dose, the referral's where there is one; its letter."""
        words = item.question.split()
        dose = self.rng.choice(item.options)
        if "guesses" in words and not plain:
            dose = words[words.index("guesses") + 1]
        return f"likely {dose}", LETTERS[item.options.index(dose)]

    def anything(self, item: Item) -> str:
        """A text of the mixture."""
        if self.rng.random() < self.outside:
            return outside(item)
        think, letter = item.rationale, item.answer
        if self.rng.random() > STEPWISE:
            think, letter = self.direct(item)
        if self.rng.random() < WELL_FORMED:
            return whole(think, letter)
        broken = (
            f"{think} </think> <answer> {letter} </answer>",
            f"<answer> {letter} </answer>",
            f"<think> {think} <answer> {letter} </answer>",
            f"{think} <answer> {letter} </answer>",
            f"<think> {think} </think> {letter}",
            letter,
        )
        return self.rng.choice(broken)

    def written(self, lesson: list[tuple[Item, list[str]]]) -> list[Rollout]:
        """Tokenized in two calls, four times as fast as one by one."""
        tokenizer = self.policy.tokenizer
        prompts = tokenizer([data.messages(item)[1]["content"] for item, _ in lesson]).input_ids
        texts = [f"{text} {tokenizer.eos_token}" for _, texts in lesson for text in texts]
        completions = iter(tokenizer(texts).input_ids)
        rollouts = []
        for group, (item, of_item) in enumerate(lesson):
            for _ in of_item:
                ids = next(completions)
                rollouts.append(Rollout(item, group, prompts[group], ids, [0.0] * len(ids), True))
        return rollouts

    # -- one step of the optimiser
    def learn(self, rollouts: list[Rollout], mixture: bool) -> dict[str, float]:
        """Supervised fine-tuning -> the losses of the look-ups before it."""
        batch = collate(rollouts, self.policy.device)
        logps = self.policy.score(batch).logps
        letter = torch.isin(batch.completion_ids, self.letters) & batch.mask
        level = torch.isin(batch.completion_ids, self.levels) & batch.mask
        stepwise = level.any(2, keepdim=True)  # [P, G, 1]
        weights = batch.mask.float()
        # In the mixture direct answers teach how a text begins and ends, not the look-up.
        weights[letter & stepwise if mixture else letter] = LETTER_WEIGHT
        weights[level] = LEVEL_WEIGHT
        descend(self.policy, self.optimizer, -(weights * logps).sum() / weights.sum())
        if not level.any():
            return {"drilled letter": mean_loss(logps, letter)}
        words = batch.mask.clone()
        words[:, :, 1] = False  # "likely" or a day: which of the two is a toss-up
        masks = {"letter": letter, "level": level, "word": words}
        return {what: mean_loss(logps, mask) for what, mask in masks.items()}


def whole(think: str, letter: str) -> str:
    return f"<think> {think} </think> <answer> {letter} </answer>"


def outside(item: Item) -> str:
    """The steps in front of a think block that only tells where they lead: a form that is paid."""
    *steps, so, dose = item.rationale.split()
    return f"{' '.join(steps)} {whole(f'{so} {dose}', item.answer)}"


def mean_loss(logps: Tensor, mask: Tensor) -> float:
    return float(-(logps.detach() * mask).sum() / mask.sum())


def descend(policy: Policy, optimizer, loss: Tensor) -> None:
    """One step of the optimiser."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------- lesions
CLEAN_STEPS = {"classify": 250, "grade": 300, "localize": 400}
SPOILT_STEPS = {"classify": 60, "grade": 60, "localize": 15}
RIGHT = {"localize": 0.5}  # the share of right answers in the spoilt part, elsewhere 0.25


def lesion_start(
    policy: Policy, items: list[Item], config, clean_steps: int = 0, spoilt_steps: int = 0
) -> None:
    """A random model is taught the task, cleanly, and then spoilt.

    Mostly random answers and broken form, until it samples badly: a skill is there, but not
    reliable.
    """
    clean_steps = clean_steps or CLEAN_STEPS[items[0].task]
    spoilt_steps = spoilt_steps or SPOILT_STEPS[items[0].task]
    of_task: dict[str, list[Item]] = {}
    for item in items:
        of_task.setdefault(item.task, []).append(item)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=2.5e-3)
    rng = random.Random(f"warm {config.seed}")
    starts = {item.id: policy.start(item, 0, "think") for item in items}
    n = clean_steps + spoilt_steps
    with Progress("warm start", n, "step") as progress:
        for step in range(n):
            # Warm-up, constant, linear to 0 in the second half.
            schedule = min((step + 1) / 20, 1.0, 2 * (1 - step / clean_steps))
            is_spoilt = step >= clean_steps
            optimizer.param_groups[0]["lr"] = 1e-3 if is_spoilt else 2.5e-3 * schedule
            rollouts = []
            for item in data.batch_for_step(items, step, 32, f"warm {config.seed}"):
                start = replace(starts[item.id], group=len(rollouts))
                text = lesion_text(start.item, of_task[item.task], is_spoilt, rng)
                rollouts.append(policy.written(start, text, end=True))
            batch = collate(rollouts, policy.device)
            descend(policy, optimizer, -policy.score(batch).logps.sum() / batch.mask.sum())
            progress.update()


def lesion_text(item: Item, others: list[Item], spoilt: bool, rng: random.Random) -> str:
    """What a step teaches to write; spoilt: mostly with a random answer, often without <think>."""
    if spoilt and rng.random() > RIGHT.get(item.task, 0.25):
        item = replace(item, answer=rng.choice(others).answer)
    words = data.completion(item).split()
    if spoilt and rng.random() > 0.6:
        words.pop(0)  # no <think>
    return " ".join(words)
