"""The policy: samples groups of completions and scores them, each prompt computed once per group.

A group is one prompt and G completions, laid out as one row [prompt | c_1 | ... | c_G]. Completions
see the prompt and themselves, not each other. One attention function, registered with transformers,
does this for scoring (with gradient) and for decoding (with cached keys and values). So old and
reference log-probs, the gradient and the samples follow one rule: it is no approximation, and they
are equal up to rounding. The idea is Prefix Grouper's (arXiv 2506.05433).
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
from data import Item
from support import graphs, loading
from support.decoding import Draft, quick_products
from support.errors import UsageError
from support.lora import LoRALinear, add_lora
from support.tokens import Tokens
from support.vision import Pictures, Vision


# ---------------------------------------------------------------------------------- what flows
@dataclass
class Rollout:
    item: Item
    group: int  # the prompt's index in the step
    prompt_ids: list[int]
    completion_ids: list[int]  # if finished, the last one ends it: EOS, or the end of </answer>
    sample_logps: list[float]  # one per completion id
    finished: bool  # False: cut at the token limit
    text: str = ""  # decoded, without special tokens
    parsed: object = None  # this and the rest are the grader's
    reward: float = 0.0
    parts: dict = field(default_factory=dict)
    correct: bool = False
    predicted: str | tuple = ""
    pictures: Pictures | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        """What another process gets of it: no pixels, which it can open itself."""
        return vars(self) | {"pictures": None}


@dataclass(eq=False)
class Batch:
    """All that an update compares: P prompts with G completions each, put together by `collate`."""

    prompt_ids: Tensor  # [P, L] left-padded
    prompt_mask: Tensor  # [P, L] bool
    completion_ids: Tensor  # [P, G, T] right-padded
    mask: Tensor  # [P, G, T] bool, from lengths, never from token values
    rewards: Tensor  # [P, G]
    sample_logps: Tensor  # [P, G, T] recorded while sampling
    pictures: list[Pictures | None]  # P of them
    old_logps: Tensor | None = None  # [P, G, T] before the first optimiser step
    ref_logps: Tensor | None = None  # [P, G, T] the reference's
    values: Tensor | None = None  # [P, G, T] the critic's, before the first optimiser step
    returns: Tensor | None = None  # [P, G, T] what the critic should have said
    advantages: Tensor | None = None  # [P, G, T]
    token_weights: Tensor | None = None  # [P, G] set for each optimiser step

    def take(self, which: slice | Tensor) -> "Batch":
        """Only these prompts, with all their completions and no more padding than they need."""
        unused = int((~self.prompt_mask[which].any(0)).sum())  # columns left of every prompt
        T = max(1, int(self.mask[which].any(0).any(0).sum()))
        taken = {}
        for name, x in vars(self).items():
            if isinstance(x, list):
                taken[name] = [x[p] for p in torch.arange(len(x))[which].tolist()]
            elif x is None:
                taken[name] = None
            elif x.dim() == 3:
                taken[name] = x[which, :, :T]
            elif name.startswith("prompt_"):
                taken[name] = x[which, unused:]
            else:
                taken[name] = x[which]
        return Batch(**taken)

    def minibatches(self, n: int) -> list["Batch"]:
        """n of them, at most one a prompt; a step's prompts come in a drawn order already."""
        P = len(self.mask)
        parts = torch.arange(P).tensor_split(max(1, min(n, P)))
        return [self.take(which) for which in parts if len(which)]

    def split(self, size: int, prompts: range | None = None) -> list["Batch"]:
        """Micro-batches of at most `size` prompts, of all or of these; size 0 = all at once."""
        prompts = range(len(self.mask)) if prompts is None else prompts
        firsts = prompts[:: size or len(prompts) or 1]
        ends = [*firsts[1:], prompts.stop]
        return [self.take(slice(first, end)) for first, end in zip(firsts, ends)]


@dataclass
class Scores:
    logps: Tensor  # [P, G, T], 0 where not counted
    entropy: Tensor  # [P, G, T], nats, without gradient
    values: Tensor | None  # [P, G, T], the critic's, where there is one


def collate(rollouts: list[Rollout], device: str | torch.device = "cpu") -> Batch:
    """Rollouts in any order -> Batch: `group` alone says which row belongs to which prompt.

    Raises ValueError for groups of different sizes, or of two prompts.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    sizes = {len(rows) for rows in groups.values()}
    if len(sizes) > 1:
        raise ValueError(f"groups of different sizes: {sorted(sizes)}")
    P, G = len(groups), max(sizes, default=1)
    L = max((len(rollout.prompt_ids) for rollout in rollouts), default=1)
    T = max([1, *(len(rollout.completion_ids) for rollout in rollouts)])

    prompt_ids, completion_ids = torch.zeros(P, L).long(), torch.zeros(P, G, T).long()
    prompt_mask, mask = torch.zeros(P, L).bool(), torch.zeros(P, G, T).bool()
    rewards, sample_logps = torch.zeros(P, G), torch.zeros(P, G, T)
    for p, rows in enumerate(groups.values()):
        start = L - len(rows[0].prompt_ids)
        prompt_ids[p, start:] = torch.tensor(rows[0].prompt_ids)
        prompt_mask[p, start:] = True
        for g, rollout in enumerate(rows):
            if rollout.prompt_ids != rows[0].prompt_ids:
                raise ValueError(f"group {rollout.group} has rollouts of two prompts")
            length = len(rollout.completion_ids)
            completion_ids[p, g, :length] = torch.tensor(rollout.completion_ids).long()
            mask[p, g, :length] = True
            rewards[p, g] = rollout.reward
            sample_logps[p, g, :length] = torch.tensor(rollout.sample_logps)
    tensors = (prompt_ids, prompt_mask, completion_ids, mask, rewards, sample_logps)
    pictures = [rows[0].pictures for rows in groups.values()]
    return Batch(*(x.to(device) for x in tensors), pictures)


# ---------------------------------------------------------------------- attention, prompt once
#
#            prompt   c_1     c_2      rows: who looks, columns: at whom; G = 2
#   prompt   causal    .       .
#   c_1        all   causal    .
#   c_2        all     .     causal
#


def causal_mask(prompt_mask: Tensor) -> Tensor | None:
    """[P, L] -> [P, 1, L, L], who may look at whom; None where nothing is padded: plainly causal.

    A padding row sees itself, so that its softmax is not empty.
    """
    if prompt_mask.all():
        return None
    L = prompt_mask.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=prompt_mask.device).tril()
    itself = torch.eye(L, dtype=torch.bool, device=prompt_mask.device)
    return (causal & prompt_mask[:, None, None, :]) | itself


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, S, D], [B, Hkv, K, D] x 2, mask [B, 1, S, K] or None = causal -> [B, H, S, D]

    Grouped heads go as they are to a CPU's kernel and to CUDA's flash kernel, which takes neither a
    mask nor fp32. For CUDA's other kernels K and V are repeated, or the slowest one would run.
    """
    repeats, flash = query.shape[1] // key.shape[1], mask is None and value.dtype != torch.float32
    if query.is_cuda and not flash:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        repeats = 1
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=repeats > 1
    )


class Packed:
    """Attention over rows [prompt | c_1 | ... | c_G] for scoring.

    A row has L + G*T tokens; G copies of the prompt, as others lay it out, have G*(L + T).
    """

    def __init__(self, prompt_mask: Tensor, G: int, T: int):
        P, self.L = prompt_mask.shape
        self.G, self.T = G, T
        self.prompt_mask = causal_mask(prompt_mask)  # [P, 1, L, L] or None
        to_prompt = prompt_mask[:, None, :].expand(P, T, self.L)
        to_itself = torch.ones(T, T, dtype=torch.bool, device=prompt_mask.device).tril()
        mask = torch.cat([to_prompt, to_itself.expand(P, T, T)], 2)  # [P, T, L+T]
        self.completion_mask = mask.repeat_interleave(G, 0)[:, None]  # [P*G, 1, T, L+T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [P, H, L+G*T, D], key and value [P, Hkv, L+G*T, D] -> [P, H, L+G*T, D]"""
        L, G, T = self.L, self.G, self.T
        prompt = sdpa(query[:, :, :L], key[:, :, :L], value[:, :, :L], self.prompt_mask, scale)
        if T == 0:
            return prompt
        apart = [x[:, :, L:].unflatten(2, (G, T)) for x in (query, key, value)]  # [P, h, G, T, D]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in apart)  # [P*G, h, T, D]
        prompt_k, prompt_v = (x[:, :, :L].repeat_interleave(G, 0) for x in (key, value))
        k, v = torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)  # [P*G, Hkv, L + T, D]
        own = sdpa(q, k, v, self.completion_mask, scale)  # [P*G, H, T, D]
        own = own.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)  # [P, H, G*T, D]
        return torch.cat([prompt, own], 2)


class Cache:
    """Keys and values while decoding: the prompt's once, the completions' in buffers of max_new.

    One token a completion is fed at a time, as a [P, G] "sequence" whose G positions do not see
    each other. transformers takes it for its own cache, of which it calls only `update`; to the
    attention function below it is the layout.

    Token t goes into slot t; a step looks at `span` slots, and a bias hides those after t. t is a
    tensor, and span changes seldom: so a GPU can record a step and replay it.
    """

    is_sliding = ()  # transformers 5.17 looks into it

    def __init__(self, prompt_mask: Tensor, G: int, max_new: int):
        (P, self.L), device = prompt_mask.shape, prompt_mask.device
        self.G, self.max_new, self.span = G, max_new, 0  # span 0: prompts are read,
        self.first, self.causal = 0, None  # those from `first` on, under this mask
        # One element, not zero dimensions: the host would read those where they are an index.
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.bias = torch.full((P, self.L + max_new), -torch.inf, device=device)  # 0: to be seen
        self.bias[:, : self.L].masked_fill_(prompt_mask, 0)
        self.prompt: dict[int, list[Tensor]] = {}  # layer -> K, V [P, Hkv, L, D]
        self.own: dict[int, list[Tensor]] = {}  # layer -> K, V [P, Hkv, G, max_new, D]

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        key = key.to(value.dtype)  # under autocast it is in fp32 yet, for every product to round
        P, (_, H, S, D) = len(self.bias), key.shape
        if layer not in self.prompt:  # zeros, since 0 times what memory holds may be NaN
            self.prompt[layer] = [value.new_zeros(P, H, self.L, D) for _ in "KV"]
            self.own[layer] = [value.new_zeros(P, H, self.G, self.max_new, D) for _ in "KV"]
        for new, prompt, own in zip((key, value), self.prompt[layer], self.own[layer]):
            if self.span == 0:
                prompt[self.first : self.first + len(new), :, self.L - S :] = new
            else:
                own.index_copy_(3, self.t, new[:, :, :, None])  # [P, Hkv, G, 1, D]
        return key, value

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The prompt's query [P, H, L, D], or one token a completion's [P, H, G, D] -> the same.

        When decoding, each of G tokens sees the prompt and its own past, not the other completions.
        """
        if self.span == 0:
            return sdpa(query, key, value, self.causal, scale)
        (prompt_key, prompt_value), L = self.prompt[layer], self.L
        own_key, own_value = (x[:, :, :, : self.span] for x in self.own[layer])
        # R query heads share a K/V head. Both products want this order: one copy serves them.
        q = query.unflatten(1, (own_key.shape[1], -1)).transpose(2, 3).contiguous()
        R = q.shape[3]  # q [P, Hkv, G, R, D]
        to_prompt = (q.flatten(2, 3) @ prompt_key.mT).unflatten(2, (-1, R))  # [P, Hkv, G, R, L]
        scores = torch.cat([to_prompt, q @ own_key.mT], -1)  # [P, Hkv, G, R, L + span]
        bias = self.bias[:, None, None, None, : L + self.span]
        p = torch.add(bias, scores, alpha=scale).softmax(-1).to(value.dtype)  # in fp32, as the bias
        out = (p[..., :L].flatten(2, 3) @ prompt_value).unflatten(2, (-1, R))  # [P, Hkv, G, R, D]
        out.flatten(0, 2).baddbmm_(p[..., L:].flatten(0, 2), own_value.flatten(0, 2))  # added to it
        return out.transpose(1, 2).flatten(2, 3).transpose(1, 2)  # [P, H, G, D], in one copy

    def keep(self, prompts: Tensor, slots: Tensor) -> None:
        """Only these prompts [P'] and, of each, these completions [P', G']."""
        self.bias, self.G = self.bias[prompts], slots.shape[1]
        for layer in self.prompt:
            self.prompt[layer] = [x[prompts] for x in self.prompt[layer]]
            kept = [x[prompts[:, None], :, slots] for x in self.own[layer]]  # [P', G', Hkv, ., D]
            self.own[layer] = [x.transpose(1, 2).contiguous() for x in kept]


def prompt_once(
    module, query, key, value, attention_mask, scaling=None, prompt_once=None, **kwargs
):
    """transformers' attention interface: query [B, H, S, D] -> ([B, S, H, D], None).

    The layout, Packed or Cache, comes by keyword; without one it is plain sdpa. It stays registered
    for ever, since gradient checkpointing runs the forward pass again in the backward pass.
    """
    if prompt_once is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    unserved = ("sliding_window", "softcap", "s_aux", "position_bias")
    if used := [name for name in unserved if kwargs.get(name) is not None]:
        raise UsageError(
            f"the attention of {type(module).__name__} uses {', '.join(used)}, "
            "which prompt-once attention does not serve"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = prompt_once.attend(module.layer_idx, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("prompt_once", prompt_once)
AttentionMaskInterface.register("prompt_once", sdpa_mask)
# cuDNN would plan anew for every new shape, and every micro-batch has one.
torch.backends.cuda.enable_cudnn_sdp(False)


# -------------------------------------------------------------------------------------- policy
@dataclass
class Settings:
    """The keywords of `Policy` and `Policy.load`: what is trained, and how prompts are written."""

    lora: int = 16  # the adapters' rank; 0 = all weights are trained
    critic: str = ""  # "", "head" (reads the policy's hidden states) or "lora" (has adapters too)
    critic_rank: int = 16  # for lora=0, where the critic adapts the frozen copy
    keep_reference: bool = False  # a frozen copy for lora=0; adapters are switched off instead
    init: dict[str, Tensor] | None = None  # another run's weights: the beginning, the reference
    train_vision: bool = False
    checkpointing: bool = False  # of activations: the layers run again in the backward pass
    fp32_head: bool = False  # logits by a product in fp32, whatever the others are in
    template: str = "auto"  # this and the next: see support/tokens.py
    stop_answer: str = "auto"
    seed: int = 0  # of the adapters


class Policy:
    """A model, its tokenizer, and what is trained of it.

    Made by `Policy.load`, by `runs.open_policy` (which opens run folders too), or by the functions
    of support/demo_model.py.
    """

    # For memory only; support/memory.py may lower them.
    head_chunk = 512  # tokens whose logits are held at once
    sample_rows = 256  # completions sampled at once
    prefill_tokens = 16_384  # of prompts, read at once on a GPU

    def __init__(self, model, tokenizer, image_processor=None, **settings):
        use = Settings(**settings)
        self.model, self.tokenizer = model.requires_grad_(use.lora == 0).eval(), tokenizer
        self.device, self.checkpointing = model.device, use.checkpointing
        self.tokens = Tokens(model, tokenizer, use.template, use.stop_answer)
        self.vision = None
        if image_processor:
            self.vision = Vision(model, self.tokens, image_processor, use.train_vision)
        elif use.train_vision:
            raise UsageError("--train-vision: this model has no vision tower; use a Qwen-VL")
        self.forbidden = torch.tensor(
            sorted(self.tokens.forbidden), dtype=torch.long, device=self.device
        )
        # --full on a GPU: fp32 weights, bf16 products. Else products have the weights' own type.
        bf16_products = loading.product_dtype(self.device) == torch.bfloat16
        self.mixed = bf16_products and model.dtype == torch.float32
        # For the decoder and for the head's product, and for nothing else while scoring: autocast
        # would bring dot products and the value head to bf16. Sampling stands within one such block
        # as a whole, since the casts of the weights are kept until the outermost one ends.
        self.autocast = partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=self.mixed
        )
        self.cache_argument, self.fp32_head = loading.cache_argument(model), use.fp32_head
        self.replay = self.device.type == "cuda"  # decoding steps, as CUDA graphs
        # The slots that a step looks at, and the tokens of prompts that are read at once: a CPU is
        # as fast with few prompts as with many, and few need less padding.
        self.least_span = 256 if self.replay else 64
        self.prefill_tokens = Policy.prefill_tokens if self.replay else 1024
        loading.prepare(model, use.fp32_head)

        self.switch = {"adapters": "policy" if use.lora else None}
        names = ["policy"]
        names += ["reference"] * (use.init is not None) + ["critic"] * (use.critic == "lora")
        if use.lora:
            add_lora(model.get_decoder(), use.lora, self.switch, names, use.seed)
        if self.vision and not use.train_vision:
            model.model.visual.requires_grad_(False)
        elif self.vision and use.lora:
            add_lora(model.model.visual, use.lora, self.switch, names, use.seed + 1)
        self.critic = use.critic
        self.value_head = new_value_head(model) if use.critic else None
        self.frozen = None
        if use.init is not None:
            loading.begin_at(use.init, self.trainable("policy"))
        if not use.lora and (use.keep_reference or use.critic == "lora"):
            shares_tower = self.vision and not use.train_vision
            self.frozen = loading.frozen_copy(model, self.mixed, use.fp32_head, shares_tower)
            if use.critic == "lora":  # with these adapters it is the critic, without the reference
                copied = self.frozen.get_decoder()
                add_lora(copied, use.critic_rank, self.switch, ["critic"], use.seed)
        if use.checkpointing:
            # When the layers run again other adapters may be in force: each remembers its own.
            loading.enable_checkpointing(
                (model, self.frozen),
                lambda: (nullcontext(), self.adapters(self.switch["adapters"])),
            )

    @classmethod
    def load(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        max_pixels: int = 0,
        **settings,
    ) -> "Policy":
        """A Hugging Face folder or hub name.

        dtype: of the weights; by default fp32 where all are trained, else as products are.
        max_pixels: images are shrunk to at most so many; 0 = the image processor's own limit.
        Raises UsageError where there is no such model, no tokenizer, or a family not served.
        """
        if dtype is None:
            full = Settings(**settings).lora == 0
            dtype = torch.float32 if full else loading.product_dtype(device)
        model, tokenizer, processor = loading.load(name_or_path, device, dtype)
        if max_pixels and processor:
            processor.size["longest_edge"] = max_pixels
        return cls(model, tokenizer, processor, **settings)

    # -- prompts
    def prompt(self, item: Item, style: str = "think") -> list[int]:
        """The token ids of an item's prompt, images first."""
        item = self.vision.framed(item) if self.vision else item
        chat = data.messages(item, style)
        if item.image is None:
            return self.tokens.checked(self.tokens.of_chat(chat), item.id)
        if not self.vision:
            raise UsageError(
                f"{item.id} has an image, and this model cannot see: "
                "--model needs a Qwen3-VL, Qwen2.5-VL or Qwen2-VL"
            )
        return self.vision.prompt(chat, item)

    def encode(self, items: list[Item], style: str = "think") -> list[list[int]]:
        """Prompt ids, one list an item. Never truncated: the caller drops what is too long."""
        return [self.prompt(item, style) for item in items]

    def start(self, item: Item, group: int, style: str) -> Rollout:
        """A rollout with its prompt and nothing written yet."""
        item = self.vision.framed(item) if self.vision else item
        ids = self.prompt(item, style)
        pictures = self.vision.look(item, ids) if self.vision else None
        return Rollout(item, group, ids, [], [], False, pictures=pictures)

    def written(self, started: Rollout, text: str, end: bool = False) -> Rollout:
        """A rollout that nobody sampled, with this text; end: and the token that ends it."""
        ids = self.tokens.checked(self.tokens.of_completion(text, end), started.item.id)
        return replace(
            started, completion_ids=ids, sample_logps=[0.0] * len(ids), finished=True, text=text
        )

    # -- the model's calls: hidden states, logits
    def hidden(
        self, ids: Tensor, positions: Tensor, layout: Packed | Cache, pictures: list = ()
    ) -> Tensor:
        """ids [P, S], positions [P, S] or [3, P, S] -> the last hidden states [P, S, D]"""
        cache = {"use_cache": False}
        if isinstance(layout, Cache):
            cache = {"use_cache": True, self.cache_argument: layout}
        if self.vision and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        seen = [one for one in pictures if one is not None]
        with self.autocast():
            inputs = {"input_ids": ids}
            if seen:
                inputs = self.vision.inputs(self.model, ids, seen)
            # Four-dimensional: transformers passes this mask on as it is and builds none.
            decoder, mask = self.model.get_decoder(), ids.new_empty(0, 0, 0, 0)
            return decoder(
                **inputs, attention_mask=mask, position_ids=positions, prompt_once=layout, **cache
            ).last_hidden_state

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """[..., D] -> [..., V] in fp32, divided by the temperature.

        The one place where sampler, scorer and reference get theirs, forbidden ids left out.
        """
        if self.fp32_head:
            with torch.autocast(self.device.type, enabled=False):
                logits = self.model.lm_head(hidden.float())
        else:
            with self.autocast():
                logits = self.model.lm_head(hidden).float()
        if temperature not in (0, 1):
            logits = logits / temperature
        if len(self.forbidden):  # not -inf: 0 x -inf in the entropy would be NaN
            logits = logits.index_fill(-1, self.forbidden, -1e9)
        return logits

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the prompts' tokens, [P, L] or [3, P, L], and where their completions start, [P].

        That is at the prompt's own end, not at the padded one.
        """
        positions = (batch.prompt_mask.cumsum(1) - 1).clamp(min=0)
        if not self.vision:
            return positions, batch.prompt_mask.sum(1)
        positions = self.vision.positions(positions, batch.pictures)
        return positions, positions.amax((0, 2)) + 1

    # -- sampling
    @graphs.or_plainly
    @torch.no_grad()
    def sample(
        self,
        items: list[Item],
        n: int,
        max_new: int,
        temperature: float,
        seed: int,
        first_row: int = 0,
        style: str = "think",
    ) -> list[Rollout]:
        """n completions of each item, at most max_new tokens long; temperature 0 is greedy.

        Returns len(items) * n rollouts, an item's together. Row r draws its random numbers from
        (seed, first_row + r) alone: neither batching nor who else is alive changes what it says.
        There is no top-k or top-p: the policy that is scored must be the one that was sampled.
        """
        started = [self.start(item, p, style) for p, item in enumerate(items)]
        prompts, rows = collate(started, self.device), range(first_row, first_row + len(items) * n)
        self.model.eval()  # in train mode checkpointing would drop the cache
        cache, read = Cache(prompts.prompt_mask, n, max_new), []
        with self.autocast(), quick_products(self.model):
            # 1. The prompts, once each: their last hidden states predict the first tokens.
            for part in prompts.split(max(1, self.prefill_tokens // cache.L)):
                cache.causal = causal_mask(part.prompt_mask)
                positions, starts = self.positions(part)
                hidden = self.hidden(part.prompt_ids, positions, cache, part.pictures)
                read.append((hidden[:, -1:].clone(), starts))  # left-padded: the last one is real
                cache.first += len(starts)
            hidden, starts = map(torch.cat, zip(*read))  # [P, 1, D], [P]: next token's position
            draft = Draft(seed, rows, max_new, starts, cache.t)
            draft.pick(self.logits(hidden, temperature), greedy=temperature == 0)
            step = partial(self.step, draft, cache, temperature)
            if self.replay:
                step = graphs.Replay(step, draft, cache)
            for written in range(1, max_new):
                # 2. Now and then, since it makes a GPU wait: who has finished?
                if written % 8 == 0:
                    draft.close_ranks(written, self.tokens.end, cache)
                    if draft.done.all():
                        break
                # 3. One more token of each row. Spans are powers of two: they change seldom.
                cache.span = min(max_new, max(self.least_span, 1 << (written - 1).bit_length()))
                step()
        # 4. Each completion, cut where it ended.
        T, rollouts = int(cache.t) + 1, []
        written = zip(draft.tokens[:, :T].tolist(), draft.logps[:, :T].tolist())
        for i, (ids, logps) in enumerate(written):
            end = self.tokens.end(ids)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            said = dict(completion_ids=ids[:end], sample_logps=logps[:end], text=text)
            rollouts.append(replace(started[i // n], **said, finished=end is not None))
        return rollouts

    def step(self, draft: Draft, cache: Cache, temperature: float) -> None:
        """Feed token t of each row, pick token t + 1.

        Shapes are fixed, all that changes stands in tensors, and the host reads none of them: a GPU
        records it once and replays it (support/graphs.py).
        """
        cache.bias.index_fill_(1, cache.L + cache.t, 0)  # from now on slot t is seen
        ids = draft.tokens[draft.rows, cache.t]  # [P', G']
        positions = (draft.starts[:, None] + cache.t).expand_as(ids)
        hidden = self.hidden(ids, positions, cache)  # [P', G', D]
        cache.t += 1
        draft.pick(self.logits(hidden, temperature), greedy=temperature == 0)

    # -- scoring
    def score(self, batch: Batch, temperature: float = 1.0, values_too: bool = True) -> Scores:
        """Log-probs of the completions, with gradient where it is enabled, and the critic's values.

        The value of token t is the critic's expectation before that token is seen.
        """
        states = self.counted_states(batch)
        targets = batch.completion_ids[batch.mask]
        logps, entropy = self.token_logps(states, targets, temperature)
        zeros, values = torch.zeros(batch.mask.shape, device=self.device), None
        if self.critic and values_too:
            if self.critic == "lora":
                with self.adapters("critic", self.frozen):
                    states = self.counted_states(batch)
            else:  # a head alone reads the policy's states and never moves them
                states = states.detach()
            values = zeros.masked_scatter(batch.mask, self.value_head(states.float())[:, 0])
        logps, entropy = (zeros.masked_scatter(batch.mask, x) for x in (logps, entropy))
        return Scores(logps, entropy, values)

    def counted_states(self, batch: Batch) -> Tensor:
        """The hidden state that predicts each counted token, [sum of lengths, D]."""
        self.model.train(self.checkpointing and torch.is_grad_enabled())
        P, L = batch.prompt_ids.shape
        _, G, T = batch.completion_ids.shape
        fed = batch.completion_ids[:, :, : T - 1]  # nothing is predicted from the last token
        ids = torch.cat([batch.prompt_ids, fed.flatten(1)], 1)  # [P, L + G*(T-1)]
        positions, starts = self.positions(batch)  # [P, L] or [3, P, L]; [P]
        own = (starts[:, None] + torch.arange(T - 1, device=ids.device)).repeat(1, G)
        positions = torch.cat([positions, own.expand(*positions.shape[:-1], -1)], -1)
        layout = Packed(batch.prompt_mask, G, T - 1)
        h = self.hidden(ids, positions, layout, batch.pictures)  # [P, L + G*(T-1), D]
        # The prompt's last token predicts the first of every completion.
        first = h[:, None, L - 1 : L].expand(P, G, 1, -1)
        later = h[:, L:].unflatten(1, (G, T - 1))
        return torch.cat([first, later], 2)[batch.mask]

    def token_logps(
        self, hidden: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """log pi(target) and the entropy, in fp32 and by chunks. [M, D], [M] -> [M], [M]

        The logits of a chunk are computed again in the backward pass, so memory grows with
        D x length, not with vocabulary x length.
        """
        chunks = zip(hidden.split(self.head_chunk), targets.split(self.head_chunk))
        found = [
            checkpoint(self.chunk_logps, h, target, temperature, use_reentrant=False)
            for h, target in chunks
        ]
        logps, entropies = zip(*found)
        return torch.cat(logps), torch.cat(entropies)

    def chunk_logps(self, h: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        every = self.logits(h, temperature).log_softmax(-1)  # [m, V]
        logps = every.gather(1, target[:, None])[:, 0]
        with torch.no_grad():  # last: the backward pass stops before it when it runs this again
            entropy = -torch.linalg.vecdot(every.exp(), every)
        return logps, entropy

    # -- which weights are in force, and which are trained
    @contextmanager
    def adapters(self, name: str | None, frozen: nn.Module | None = None):
        """Within it these adapters are in force, on the frozen copy where one is given."""
        before = self.model, self.switch["adapters"]
        self.model, self.switch["adapters"] = frozen or self.model, name
        try:
            yield
        finally:
            self.model, self.switch["adapters"] = before

    @contextmanager
    def reference(self):
        """Within it, this policy is the frozen reference; restored whatever happens.

        With adapters that is the model without them, or with those it began at; else the copy.
        """
        model = self.model
        layer = next((m for m in model.modules() if isinstance(m, LoRALinear)), None)
        if self.frozen is None and layer is None:
            raise ValueError("no reference: all weights are trained, and keep_reference was False")
        begun_at = "reference" if layer is not None and "reference" in layer.A else None
        adapters = self.switch["adapters"]
        try:
            self.model, self.switch["adapters"] = self.frozen or model, begun_at
            yield self
        finally:
            self.model, self.switch["adapters"] = model, adapters

    def trainable(self, part: str = "") -> dict[str, nn.Parameter]:
        """What the optimiser moves and a checkpoint holds. part: "policy" or "critic" alone."""
        named = dict(self.model.named_parameters())
        for prefix, module in (("frozen", self.frozen), ("value_head", self.value_head)):
            if module is not None:  # of the frozen copy the critic's adapters are trained
                named |= {f"{prefix}.{name}": p for name, p in module.named_parameters()}
        found = {}
        for name, p in named.items():
            owner = "policy"
            if name.startswith("value_head.") or name.endswith(".critic"):
                owner = "critic"
            if p.requires_grad and part in ("", owner):
                found[name] = p
        return found

    @torch.no_grad()
    def load_trainable(self, tensors: dict[str, Tensor]) -> None:
        mine = self.trainable()
        if {name: p.shape for name, p in mine.items()} != {n: t.shape for n, t in tensors.items()}:
            raise UsageError("these weights belong to another model, or to another LoRA rank")
        for name, p in mine.items():
            p.copy_(tensors[name])

    def save_folder(self, path) -> None:
        """A plain Hugging Face folder. Only for a policy without adapters."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        if self.vision:
            self.vision.processor.save_pretrained(path)


def new_value_head(model) -> nn.Linear:
    """Hidden state [D] -> value, in fp32.

    Our choice: the first values are 0. OpenRLHF draws the weight from N(0, 1 / (D + 1)).
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    head = nn.Linear(width, 1, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
