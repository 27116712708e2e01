"""The policy: a language model, or one that also sees, which samples groups of completions and scores them, each prompt computed once per group.

A group is one prompt and G completions, laid out as one row [prompt | c_1 | ... | c_G]: completions see the prompt and themselves, not each other.
One attention function, registered with transformers, does this for scoring (with gradient) and for decoding (with cached keys and values).
The idea is Prefix Grouper's (arXiv 2506.05433), here for sampling, old and reference log-probs and the gradient alike, exactly and not approximately.
"""
import copy
import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer,
                          PreTrainedTokenizerFast)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor, smart_resize

import data
from data import Item, UsageError
from ranks import say
from support.pictures import open_image, size_of, sources


# -------------------------------------------------------------------------------------------- what flows
@dataclass(eq=False)
class Pictures:
    """The images of one prompt, one object shared by all its rollouts, so that what is computed of them is computed once."""
    pixels: Tensor                      # [patches of all images, channels x time x height x width of a patch]
    grids: Tensor                       # [images, 3]: time, height, width in patches
    positions: Tensor                   # [3, L] of the prompt's tokens: time, height, width
    features: Tensor | None = None      # [image tokens, D] once a frozen tower has seen them


@dataclass
class Rollout:
    item: Item
    group: int                          # the prompt's index in the step: the only key that advantages group by
    prompt_ids: list[int]
    completion_ids: list[int]           # end with the token that stopped them, an EOS or the one that closed </answer>
    sample_logps: list[float]           # one per completion id
    finished: bool                      # False: cut at the token limit
    text: str = ""                      # decoded, without special tokens
    parsed: object = None               # after grading
    reward: float = 0.0
    parts: dict = field(default_factory=dict)
    correct: bool = False
    predicted: str = ""
    advantage: float = 0.0              # after grpo
    closer: dict = field(default_factory=dict)      # of a logged one, after the update: stage, and per token its text, entropy and ratio
    pictures: Pictures | None = field(default=None, repr=False)

    def __getstate__(self) -> dict:
        """What another process gets of it: no pixels, which it can open itself."""
        return vars(self) | {"pictures": None}


@dataclass
class Batch:                            # made only by collate; P prompts, G completions each
    prompt_ids: Tensor                  # [P, L] left-padded
    prompt_mask: Tensor                 # [P, L] bool
    completion_ids: Tensor              # [P, G, T] right-padded
    mask: Tensor                        # [P, G, T] bool, from lengths, never from token values
    pictures: list[Pictures | None] = ()    # P of them, or none at all

    def prompts(self, which: slice | Tensor) -> "Batch":
        """Only some of the prompts, with all their completions and no more padding than these need."""
        prompt_mask, mask = self.prompt_mask[which], self.mask[which]
        skip, T = int((~prompt_mask.any(0)).sum()), int(mask.any(0).any(0).sum())
        pictures = [self.pictures[p] for p in torch.arange(len(self.mask))[which].tolist()] if self.pictures else ()
        return Batch(self.prompt_ids[which, skip:], prompt_mask[:, skip:], self.completion_ids[which, :, :T], mask[..., :T], pictures)


@dataclass
class Scores:
    logps: Tensor                       # [P, G, T], 0 where not counted
    entropy: Tensor                     # [P, G, T], nats, without gradient
    values: Tensor | None               # [P, G, T], the critic's, where there is one


def collate(rollouts: list[Rollout], device: str | torch.device = "cpu") -> Batch:
    """Rollouts, grouped by `group` in the order given, every group of the same size -> Batch."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    P, G = len(groups), len(next(iter(groups.values())))
    if any(len(rows) != G for rows in groups.values()):
        raise ValueError(f"groups of different sizes: {sorted({len(rows) for rows in groups.values()})}")
    L = max(len(rows[0].prompt_ids) for rows in groups.values())
    T = max(1, max(len(rollout.completion_ids) for rollout in rollouts))
    batch = Batch(torch.zeros(P, L, dtype=torch.long), torch.zeros(P, L, dtype=torch.bool),
                  torch.zeros(P, G, T, dtype=torch.long), torch.zeros(P, G, T, dtype=torch.bool), [rows[0].pictures for rows in groups.values()])
    for p, rows in enumerate(groups.values()):
        start = L - len(rows[0].prompt_ids)
        batch.prompt_ids[p, start:] = torch.tensor(rows[0].prompt_ids)
        batch.prompt_mask[p, start:] = True
        for g, rollout in enumerate(rows):
            if rollout.prompt_ids != rows[0].prompt_ids:
                raise ValueError(f"group {rollout.group} has rollouts of two prompts")
            batch.completion_ids[p, g, :len(rollout.completion_ids)] = torch.tensor(rollout.completion_ids, dtype=torch.long)
            batch.mask[p, g, :len(rollout.completion_ids)] = True
    return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in vars(batch).values()))


# ------------------------------------------------------------------------------- attention, prompt once
# In what coordinates each family of vision-language models writes boxes: (width, height) of the frame, None = pixels of the resized image.
FRAMES = {"qwen2_5_vl": None, "qwen2_vl": (1000, 1000)}
NO_MASK = torch.empty(0, 0, 0, 0)       # four-dimensional: transformers passes it on as it is and builds none of its own


def causal_mask(prompt_mask: Tensor) -> Tensor | None:
    """[P, L] -> [P, 1, L, L]: causal, no padding seen; a padding row sees itself, so that its softmax is not empty. None where nothing is padded: plainly causal."""
    if prompt_mask.all():
        return None
    L = prompt_mask.shape[1]
    ones = torch.ones(L, L, dtype=torch.bool, device=prompt_mask.device)
    return (ones.tril() & prompt_mask[:, None, None, :]) | torch.eye(L, dtype=torch.bool, device=prompt_mask.device)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, S, D], [B, Hkv, K, D] x 2, [B, 1, S, K] or None = causal -> [B, H, S, D]. K/V heads are repeated: with a mask, CUDA's grouped path falls back to the slow kernel."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


class Packed:
    """Attention over rows [prompt | c_1 | ... | c_G] for scoring: L + G*T tokens a row instead of G*(L + T)."""

    def __init__(self, prompt_mask: Tensor, G: int, T: int):
        P, self.L = prompt_mask.shape
        self.G, self.T = G, T
        self.prompt_mask = causal_mask(prompt_mask)                                               # [P, 1, L, L] or None
        own = torch.ones(T, T, dtype=torch.bool, device=prompt_mask.device).tril()
        mask = torch.cat([prompt_mask[:, None, :].expand(P, T, self.L), own.expand(P, T, T)], 2)  # [P, T, L+T]
        self.completion_mask = mask.repeat_interleave(G, 0)[:, None]                              # [P*G, 1, T, L+T]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [P, H, L+G*T, D], key and value [P, Hkv, L+G*T, D] -> [P, H, L+G*T, D]"""
        L, G, T = self.L, self.G, self.T
        prompt = sdpa(query[:, :, :L], key[:, :, :L], value[:, :, :L], self.prompt_mask, scale)
        if T == 0:
            return prompt
        fold = lambda x: x[:, :, L:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)           # [P, h, G*T, D] -> [P*G, h, T, D]
        share = lambda x: x[:, :, :L].repeat_interleave(G, 0)                                     # [P, h, L, D] -> [P*G, h, L, D]
        both = lambda x: torch.cat([share(x), fold(x)], 2)                                        # [P*G, h, L+T, D]
        own = sdpa(fold(query), both(key), both(value), self.completion_mask, scale)              # [P*G, H, T, D]
        own = own.unflatten(0, (-1, G)).transpose(1, 2).flatten(2, 3)                             # [P, H, G*T, D]
        return torch.cat([prompt, own], 2)


class Cache:
    """Keys and values while decoding: the prompt's once per prompt, the completions' in buffers of fixed length.

    One token a completion is fed at a time, as a [P, G] "sequence" whose G positions do not see each other. To transformers this is the
    cache, of which it calls only `update`, and to the attention function below it is the layout.
    """
    is_sliding = ()  # no layer is: transformers 5.17 looks through them

    def __init__(self, prompt_mask: Tensor, G: int, max_new: int):
        self.prompt_mask, self.G, self.max_new, self.length = prompt_mask, G, max_new, -1         # length -1: the prompt comes next
        self.causal = causal_mask(prompt_mask)
        self.prompt: dict[int, tuple[Tensor, Tensor]] = {}                                        # layer -> K, V [P, Hkv, L, D]
        self.own: dict[int, tuple[Tensor, Tensor]] = {}                                           # layer -> K, V [P, Hkv, G, max_new, D]

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        if self.length < 0:
            self.prompt[layer] = key, value
            P, H, _, D = key.shape
            self.own[layer] = key.new_empty(P, H, self.G, self.max_new, D), value.new_empty(P, H, self.G, self.max_new, D)
        else:
            for buffer, new in zip(self.own[layer], (key, value)):
                buffer[:, :, :, self.length] = new                                                # [P, Hkv, G, D]
        return key, value

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Prompt: query [P, H, L, D] -> the same. Decoding: query [P, H, G, D], G tokens that each see the prompt and their own past."""
        if self.length < 0:
            return sdpa(query, key, value, self.causal, scale)
        prompt_key, prompt_value = self.prompt[layer]
        own_key, own_value = (x[:, :, :, :self.length + 1] for x in self.own[layer])              # [P, Hkv, G, t+1, D]
        P, Hkv, L, D = prompt_key.shape
        q = query.unflatten(1, (Hkv, -1)).transpose(2, 3)                                         # [P, Hkv, G, R, D], R query heads a K/V head
        R = q.shape[3]
        to_prompt = (q.flatten(2, 3) @ prompt_key.transpose(2, 3)).unflatten(2, (-1, R))          # [P, Hkv, G, R, L]
        if self.causal is not None:                                                               # some prompt is padded
            to_prompt.masked_fill_(~self.prompt_mask[:, None, None, None, :], -torch.inf)
        to_own = q @ own_key.transpose(3, 4)                                                      # [P, Hkv, G, R, t+1]
        p = torch.cat([to_prompt, to_own], -1).float().mul_(scale).softmax(-1).to(q.dtype)
        out = (p[..., :L].flatten(2, 3) @ prompt_value).unflatten(2, (-1, R)) + p[..., L:] @ own_value
        return out.transpose(2, 3).flatten(1, 2)                                                  # [P, H, G, D]

    def keep(self, prompts: Tensor, slots: Tensor) -> None:
        """Only these prompts [P'] and, of each, these completions [P', G']."""
        self.prompt_mask, self.G = self.prompt_mask[prompts], slots.shape[1]
        for layer in self.prompt:
            self.prompt[layer] = tuple(x[prompts] for x in self.prompt[layer])
            self.own[layer] = tuple(x[prompts[:, None], :, slots].transpose(1, 2) for x in self.own[layer])


def prompt_once(module, query, key, value, attention_mask, scaling=None, prompt_once=None, **kwargs):
    """transformers' attention interface: query [B, H, S, D] -> ([B, S, H, D], None). Without a layout it is plain sdpa.

    It stays in force for ever: gradient checkpointing runs the forward pass again, in the backward pass.
    """
    if prompt_once is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unserved = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unserved:
        raise UsageError(f"the attention of {type(module).__name__} uses {', '.join(unserved)}, which prompt-once attention does not serve")
    scale = scaling if scaling is not None else query.shape[-1] ** -.5
    return prompt_once.attend(module.layer_idx, query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register("prompt_once", prompt_once)
AttentionMaskInterface.register("prompt_once", sdpa_mask)


def refuse_unserved(config) -> None:
    """UsageError, by name, for a model family whose attention or head does more than ours."""
    text = config.get_text_config(decoder=True)
    layers = set(getattr(text, "layer_types", None) or []) - {"full_attention"}
    window = not getattr(text, "layer_types", None) and getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    faults = [*sorted(layers), *(["sliding_window"] if window else [])]
    faults += [name for name in ("attn_logit_softcapping", "attention_chunk_size", "alibi", "final_logit_softcapping") if getattr(text, name, None)]
    faults += [name for name in ("logit_scale", "logits_scaling") if getattr(text, name, None) not in (None, 1, 1.0)]
    if faults:
        raise UsageError(f"model type {config.model_type!r} is not served: it uses {', '.join(faults)}. "
                         "Served are Llama, Qwen2, Qwen2.5, Qwen3, SmolLM and other families with plain full attention")


# --------------------------------------------------------------------------------------- linear layers, LoRA
class ThinLinear(nn.Linear):
    """nn.Linear, but decoding on a CPU multiplies W x^T, not x W^T: with 16 to 32 rows MKL is 1.3 to 1.6 times as fast at it."""
    decoding = False                    # True only within Policy.sample: scoring always multiplies in the same way

    def forward(self, x: Tensor) -> Tensor:
        if not ThinLinear.decoding or x.device.type != "cpu" or x.shape[:-1].numel() > 64:
            return super().forward(x)
        y = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])                       # [out, n] -> [n, out] -> [..., out]
        return y if self.bias is None else y + self.bias

    @staticmethod
    @contextmanager
    def thin():
        ThinLinear.decoding = True
        try:
            yield
        finally:
            ThinLinear.decoding = False


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A x (arXiv 2106.09685): W frozen, A [rank, in] and B [out, rank] trained in fp32; B starts at 0.

    It can hold several pairs by name, "policy" and a critic's or a frozen reference's; `switch["adapters"]` names the one in force, or None.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, switch: dict, names: list[str], generator: torch.Generator):
        super().__init__()
        self.base, self.scale, self.switch = base, alpha / rank, switch
        bound, device = base.in_features ** -.5, base.weight.device
        self.A = nn.ParameterDict({name: torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator).to(device) for name in names})
        self.B = nn.ParameterDict({name: torch.zeros(base.out_features, rank, device=device) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        y, name = self.base(x), self.switch["adapters"]
        if name is None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.A[name].to(x.dtype)), self.B[name].to(x.dtype))


def add_lora(decoder: nn.Module, rank: int, alpha: float, targets: str, switch: dict, names: list[str], seed: int) -> None:
    """Replace the decoder's linear layers by LoRALinear: all, or those whose name stands in the comma list, of which each must be there."""
    generator = torch.Generator().manual_seed(seed)
    linear = [(parent, name, child) for parent in decoder.modules() for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    there = {name for _, name, _ in linear}
    wanted = there if targets == "all" else {name.strip() for name in targets.split(",")}
    if unknown := sorted(wanted - there):
        raise UsageError(f"--lora-targets {targets}: no linear layer of this model is named {', '.join(map(repr, unknown))}; there are {', '.join(sorted(there))}")
    for parent, name, child in linear:
        if name in wanted:
            setattr(parent, name, LoRALinear(child, rank, alpha, switch, names, generator))


# --------------------------------------------------------------------------------------- precision
def product_dtype(device: str | torch.device) -> torch.dtype:
    """The type of matrix products: bf16 on a GPU that has it, fp32 elsewhere.

    A GPU before Ampere, such as a T4 or V100, can only emulate bf16, which is slower than fp32.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def halve_linear_layers(model: nn.Module) -> None:
    """Round the weights of a frozen fp32 model's linear layers to bf16, in place.

    Autocast rounds these weights for every product anyway, so its outputs do not change by a bit.
    What is added up between the products stays fp32: the embedding, and a head that is tied to it.
    """
    embedding = model.get_input_embeddings().weight
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight is not embedding:
            layer.to(torch.bfloat16)


# ----------------------------------------------------------------------------------------------- policy
class Policy:
    """A model, its tokenizer, and what is trained of it. Made by `Policy.load`, `runs.open_policy` (a run folder too) or in demo.py."""

    def __init__(self, model, tokenizer, *, lora: int = 16, lora_alpha: float | None = None, lora_targets: str = "all", template: str = "auto",
                 stop_answer: str = "auto", checkpointing: bool = False, keep_reference: bool = False, critic: str = "", head_chunk: int = 512,
                 seed: int = 0, init: dict[str, Tensor] | None = None, image_processor: ImageProcessor | None = None, train_vision: bool = False):
        self.model, self.tokenizer, self.head_chunk = model.requires_grad_(lora == 0).eval(), tokenizer, head_chunk
        self.image_processor, self.train_vision = image_processor, train_vision
        if train_vision and not image_processor:
            raise UsageError("--train-vision: this model has no vision tower; use a Qwen2.5-VL or Qwen2-VL")
        self._image_tokens()
        self.device, self.switch, self.checkpointing = model.device, {"adapters": "policy" if lora else None}, checkpointing
        # --full on a GPU: fp32 weights, bf16 products. Elsewhere products have the weights' type.
        self.mixed = model.dtype == torch.float32 and product_dtype(self.device) == torch.bfloat16
        # transformers 5.17 calls the cache so; later versions warn of this name and have another.
        known = inspect.signature(model.get_decoder().forward).parameters
        self.cache_argument = "past_key_values" if "past_key_values" in known else "cache"
        without_dropout(model)
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = ThinLinear
        names = ["policy"] + ["reference"] * (init is not None) + ["critic"] * (critic == "lora")
        if lora:
            add_lora(model.get_decoder(), lora, lora_alpha or 2 * lora, lora_targets, self.switch, names, seed)
        if image_processor and not train_vision:
            model.model.visual.requires_grad_(False)
        elif image_processor and lora:
            add_lora(model.model.visual, lora, lora_alpha or 2 * lora, "all", self.switch, names, seed + 1)
        self.critic, self.value_head = critic, None
        if critic:
            self.value_head = nn.Linear(model.config.get_text_config(decoder=True).hidden_size, 1, device=model.device)     # fp32
            # Our choice: all values begin at 0. OpenRLHF has N(0, std 1 / (h + 1)) and no bias.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if init is not None:
            self._start_from(init)
        self.frozen = None
        if keep_reference and not lora:
            self.frozen = copy.deepcopy(model).requires_grad_(False)
            if self.mixed:
                halve_linear_layers(self.frozen)  # before it shares any with the policy
            if image_processor and not train_vision:
                self.frozen.model.visual = model.model.visual  # never moved: one is enough
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            # The layers run again in the backward pass, when other adapters may be in force: each remembers its own.
            enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._adapters(self.switch["adapters"]))})
        self.chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
        if self.chat and not tokenizer.chat_template:
            raise UsageError("this model's tokenizer has no chat template: use --template plain")
        self.stop_answer = stop_answer == "on" or (stop_answer == "auto" and not self.chat)
        self.eos_ids = self._eos_ids()

    @classmethod
    def load(cls, name_or_path: str, device: str = "cpu", dtype: torch.dtype | None = None, max_pixels: int = 0, **kwargs) -> "Policy":
        """A Hugging Face folder or hub name. dtype: of the frozen weights; by default bf16 on a GPU that has it and fp32 elsewhere.

        max_pixels: images are shrunk to at most so many; 0 = the image processor's own limit.

        Raises UsageError where there is no such model, no tokenizer, or a family that prompt-once attention does not serve.
        """
        full = kwargs.get("lora", 16) == 0
        products = product_dtype(device)
        if device.startswith("cuda") and products == torch.float32:
            gpu = torch.cuda.get_device_name(device)
            say(f"{gpu} has no bf16 of its own: it computes in fp32, with twice the memory")
        if dtype is None:
            dtype = torch.float32 if full else products
        try:
            config = AutoConfig.from_pretrained(name_or_path)
            refuse_unserved(config)
            tokenizer = load_tokenizer(name_or_path)
            if config.model_type in FRAMES:                                                       # the vision tower keeps plain sdpa
                kwargs["image_processor"] = ImageProcessor.from_pretrained(name_or_path)
                model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype, attn_implementation={"text_config": "prompt_once"})
            else:
                model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, attn_implementation="prompt_once")
        except UsageError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"cannot load {name_or_path}: {first_line(error)}. A model folder holds config.json, *.safetensors and a tokenizer; "
                             "a hub name needs a network") from None
        if max_pixels and "image_processor" in kwargs:
            kwargs["image_processor"].size["longest_edge"] = max_pixels
        return cls(model.to(device), tokenizer, **kwargs)

    @torch.no_grad()
    def merge(self) -> None:
        """W + (alpha / rank) B A in place of each adapted layer, rounded once to W's type; the adapters are gone after it."""
        for parent in [m for m in self.model.modules() if any(isinstance(child, LoRALinear) for child in m.children())]:
            for name, layer in [(name, child) for name, child in parent.named_children() if isinstance(child, LoRALinear)]:
                weight = layer.base.weight
                weight.copy_(weight.float() + layer.scale * (layer.B["policy"] @ layer.A["policy"]))
                setattr(parent, name, layer.base)

    def save_folder(self, path) -> None:
        """A plain Hugging Face folder. Only for a policy without adapters."""
        for part in filter(None, (self.model, self.tokenizer, self.image_processor)):
            part.save_pretrained(path)

    # -- prompts
    def _eos_ids(self) -> list[int]:
        """Every id that ends a completion: the generation config's, the model's, the tokenizer's, and the one that closes a turn of the chat."""
        ids: set[int] = set()
        for found in (getattr(self.model.generation_config, "eos_token_id", None), getattr(self.model.config, "eos_token_id", None),
                      self.tokenizer.eos_token_id):
            ids.update(found if isinstance(found, (list, tuple)) else [found])
        if self.chat:
            turn = self.tokenizer.apply_chat_template([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}], tokenize=False)
            after = self.tokenizer(turn.rsplit("ANSWER", 1)[-1], add_special_tokens=False).input_ids
            closing = [token for token in after[:1] if token in self.tokenizer.all_special_ids]
            ids.update(closing)
        ids.discard(None)
        if not ids:
            raise UsageError("neither the tokenizer nor the generation config names an EOS token: no completion could end")
        own = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else sorted(ids)
        self.end_id = (closing if self.chat and closing else own)[0]                              # what supervised fine-tuning teaches to end with
        return sorted(ids)

    def prompt(self, item: Item, style: str = "think") -> list[int]:
        """The token ids of an item's prompt, images first: chat template where used, else the plain transcript with the tokenizer's own BOS."""
        chat = data.messages(self.framed(item), style)
        if item.image is None:
            return self._plain(self._text_ids(chat), item.id)
        if not self.image_processor:
            raise UsageError(f"{item.id} has an image, and this model cannot see: --model needs a Qwen2.5-VL or Qwen2-VL")
        sizes = [self._resized(source, item.id) for source in sources(item.image)]
        chat[1]["content"] = self.image_mark * len(sizes) + chat[1]["content"]
        merged, text, ids = self.image_processor.patch_size * self.image_processor.merge_size, self._text_ids(chat), []
        if text.count(self.image_token) != len(sizes):
            raise UsageError(f"{item.id}: its text holds the token {self.tokenizer.convert_ids_to_tokens(self.image_token)}, which stands for an image: take it out")
        counts = iter([(w // merged) * (h // merged) for w, h in sizes])                          # tokens of each image
        for token in text:
            ids += [token] * (next(counts) if token == self.image_token else 1)
        return ids

    def _plain(self, ids: list[int], where: str) -> list[int]:
        """The ids of a text that shows no image: a token that stands for one would ask for pixels that are not there."""
        if found := set(ids) & set(self.forbidden.tolist()):
            raise UsageError(f"{where}: its text holds the token {self.tokenizer.convert_ids_to_tokens(found.pop())}, which stands for an image: take it out")
        return ids

    def _text_ids(self, chat: list[dict[str, str]]) -> list[int]:
        if not self.chat:
            ids = self.tokenizer(data.plain_text(chat)).input_ids
            return ids[:-1] if ids[-1] in self.eos_ids else ids               # some tokenizers close every text with EOS
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:                                            # jinja2's, raised by templates that know no system turn
            if type(error).__name__ != "TemplateError":
                raise
            joined = [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}]
            text = self.tokenizer.apply_chat_template(joined, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids       # the template holds the BOS already

    def encode(self, items: list[Item], style: str = "think") -> list[list[int]]:
        """Prompt token ids, one list an item. Never truncated: the caller drops what is too long."""
        return [self.prompt(item, style) for item in items]

    # -- images
    def _image_tokens(self) -> None:
        """Which ids stand for an image, and which may never be sampled: an image token in a completion would ask for pixels that are not there."""
        config, known = self.model.config, len(self.tokenizer)
        ids = {name: getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")} if self.image_processor else {}
        ids = {name: token for name, token in ids.items() if token is not None and token < known}
        self.image_token, self.forbidden = ids.get("image"), torch.tensor(sorted(ids.values()), dtype=torch.long, device=self.model.device)
        self.image_mark = "".join(self.tokenizer.convert_ids_to_tokens(ids[name]) for name in ("vision_start", "image", "vision_end") if name in ids)

    def _resized(self, source, where: str) -> tuple[int, int]:
        """(width, height) in pixels to which the image processor will bring an image."""
        (width, height), processor = size_of(source), self.image_processor
        try:
            h, w = smart_resize(height, width, processor.patch_size * processor.merge_size, processor.size["shortest_edge"], processor.size["longest_edge"])
        except ValueError as error:
            raise UsageError(f"{where}: an image of {width} x {height} pixels cannot be used ({error})") from None
        return w, h

    def framed(self, item: Item) -> Item:
        """A `localize` item with the coordinate frame that this model family writes boxes in."""
        if item.task != "localize" or item.frame or not self.image_processor:
            return item
        source = sources(item.image)[0]
        frame = FRAMES[self.model.config.model_type] or self._resized(source, item.id)
        return replace(item, frame=(*frame, *size_of(source)))

    def look(self, item: Item, ids: list[int]) -> Pictures | None:
        """Open the images of an item whose prompt has these token ids. None where it has no image."""
        if item.image is None:
            return None
        opened = self.image_processor([open_image(source, item.id) for source in sources(item.image)], return_tensors="pt")
        row, grids = torch.tensor([ids]), opened["image_grid_thw"]
        expected = int(grids.prod(1).sum()) // self.image_processor.merge_size**2
        if (found := int((row == self.image_token).sum())) != expected:
            raise ValueError(f"{item.id}: the prompt has {found} image tokens and its images {expected} features")
        positions, _ = self.model.model.get_rope_index(row, (row == self.image_token).int(), image_grid_thw=grids)
        return Pictures(opened["pixel_values"], grids, positions[:, 0])

    def _tower(self, seen: list[Pictures]) -> Tensor:
        """The vision tower on all images of some prompts -> [image tokens, D]"""
        pixels, grids = (torch.cat([getattr(pictures, name) for pictures in seen]).to(self.device) for name in ("pixels", "grids"))
        return torch.cat(self.model.model.get_image_features(pixels, grids).pooler_output)

    def _features(self, seen: list[Pictures]) -> Tensor:
        """A frozen tower runs once per prompt, and its features serve sampling and every pass of the update; a trained one runs in every forward pass."""
        if self.train_vision:
            return self._tower(seen)
        for pictures in seen:
            if pictures.features is None:
                with torch.no_grad():
                    pictures.features = self._tower([pictures])
        return torch.cat([pictures.features for pictures in seen])

    def _positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of the prompts' tokens, [P, L] or, where the model sees, [3, P, L]; and where their completions start, [P]: at the prompt's own end, not the padded one."""
        positions = (batch.prompt_mask.cumsum(1) - 1).clamp(min=0)
        if not self.image_processor:
            return positions, batch.prompt_mask.sum(1)
        positions = positions.expand(3, -1, -1).clone()
        for p, pictures in enumerate(batch.pictures):
            if pictures is not None:                                                              # an image of h x w tokens takes max(h, w) positions
                positions[:, p, -pictures.positions.shape[1]:] = pictures.positions.to(self.device)
        return positions, positions.amax((0, 2)) + 1

    # -- the model's three calls: hidden states, head, values
    def _autocast(self):
        """Entered for the decoder and for the head's product, and for nothing else while scoring.

        The policy and its frozen reference are under the same one. All that is done with logits and
        hidden states (log-probs, entropies, values) stands outside, since autocast would bring dot
        products and the value head to bf16.
        """
        return torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext()

    def _hidden(self, ids: Tensor, positions: Tensor, layout: Packed | Cache, pictures: list[Pictures | None] = ()) -> Tensor:
        """ids [P, S], positions [P, S] or [3, P, S] -> the decoder's last hidden states [P, S, D]"""
        cache = {"use_cache": False}
        if isinstance(layout, Cache):
            cache = {"use_cache": True, self.cache_argument: layout}
        inputs = {"input_ids": ids}
        if seen := [p for p in pictures if p is not None]:
            words = self.model.get_input_embeddings()(ids)                                        # [P, S, D]
            inputs = {"inputs_embeds": words.masked_scatter((ids == self.image_token)[..., None], self._features(seen).to(words.dtype))}
        if self.image_processor and positions.dim() == 2:
            positions = positions.expand(3, -1, -1)
        return self.model.get_decoder()(**inputs, attention_mask=NO_MASK.to(ids.device), position_ids=positions, prompt_once=layout, **cache).last_hidden_state

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """[..., D] -> [..., V] in fp32, divided by the temperature: the one place where sampler, scorer and reference get theirs."""
        with self._autocast():
            logits = self.model.lm_head(hidden)
        logits = logits.float()
        logits = logits / temperature if temperature not in (0, 1) else logits                    # a pass over [..., V] saved
        return logits.index_fill_(-1, self.forbidden, -1e9) if len(self.forbidden) else logits    # not -inf: 0 x -inf in the entropy would be NaN

    # -- sampling
    @torch.no_grad()
    def sample(self, items: list[Item], n: int, max_new: int, temperature: float, seed: int, first_row: int = 0, style: str = "think") -> list[Rollout]:
        """n completions of each item, of at most max_new tokens; temperature 0 is greedy. Returns len(items)*n rollouts, an item's together.

        Row r draws its random numbers from (seed, first_row + r) alone: neither batching nor who else is alive changes what it says.
        There is no top-k or top-p: the policy that is scored must be the one that was sampled.
        """
        P, started = len(items), [self.start(item, p, style) for p, item in enumerate(items)]
        uniforms = torch.from_numpy(np.stack([np.random.Generator(np.random.Philox(key=[seed % 2**64, first_row + row])).random(max_new)
                                              for row in range(P * n)])).to(self.device)                              # [P*n, max_new]
        batch = collate(started, self.device)                                                     # for its left-padded prompts
        cache = Cache(batch.prompt_mask, n, max_new)
        tokens = torch.zeros(P * n, max_new, dtype=torch.long, device=self.device)
        logps = torch.zeros(P * n, max_new, device=self.device)
        eos = torch.tensor(self.eos_ids, device=self.device)
        done = torch.zeros(P * n, dtype=torch.bool, device=self.device)
        rows = torch.arange(P * n, device=self.device).view(P, n)                                 # [P', G'] which row sits in which slot
        positions, lengths = self._positions(batch)                                               # lengths [P']: position of the next token
        self.model.eval()                                                                         # in train mode checkpointing drops the cache
        with self._autocast(), ThinLinear.thin():
            hidden = self._hidden(batch.prompt_ids, positions, cache, batch.pictures)[:, -1:]     # [P, 1, D]: left-padded, so the last is real
            for t in range(max_new):
                picked, picked_logps = pick(self._logits(hidden, temperature), uniforms[rows, t], greedy=temperature == 0)      # [P', G'] x 2
                tokens[rows, t], logps[rows, t] = picked, picked_logps
                done[rows] |= torch.isin(picked, eos)
                if t == max_new - 1:
                    break
                if t % 8 == 7:                                                                    # now and then, since it makes the GPU wait
                    if self.stop_answer:
                        for row in rows.unique().tolist():
                            done[row] |= self._answer_end(tokens[row, max(0, t - 31):t + 1].tolist()) is not None
                    if bool(done[rows].all()):
                        break
                    rows, lengths = drop_finished(rows, lengths, done, cache)
                cache.length = t
                hidden = self._hidden(tokens[rows, t], lengths[:, None].expand_as(rows) + t, cache)                            # [P', G', D]
        return [self._finish(started[row // n], *ids_and_logps) for row, ids_and_logps in enumerate(zip(tokens[:, :t + 1].tolist(), logps[:, :t + 1].tolist()))]

    def start(self, item: Item, group: int, style: str) -> Rollout:
        """A rollout with its prompt and nothing written yet."""
        ids = self.prompt(item, style)
        return Rollout(self.framed(item), group, ids, [], [], False, pictures=self.look(item, ids))

    def written(self, started: Rollout, text: str, end: bool = False) -> Rollout:
        """A rollout that nobody sampled: this text as the completion; end: and the token that ends it."""
        ids = self.tokenizer(text if self.chat else " " + text, add_special_tokens=False).input_ids + [self.end_id] * end
        return replace(started, completion_ids=self._plain(ids, started.item.id), sample_logps=[0.0] * len(ids), finished=True, text=text)

    def _answer_end(self, ids: list[int]) -> int | None:
        """How many of the ids it takes until the text holds </answer>; None where it does not."""
        if "</answer>" not in self.tokenizer.decode(ids):
            return None
        low, high = 1, len(ids)                                                                   # bisection: once there, it stays
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if "</answer>" in self.tokenizer.decode(ids[:middle]) else (middle + 1, high)
        return low

    def _finish(self, started: Rollout, ids: list[int], logps: list[float]) -> Rollout:
        """Cut a row where it ended, which does not depend on when the sampling loop noticed."""
        ends = [t + 1 for t, token in enumerate(ids) if token in self.eos_ids][:1]
        if self.stop_answer and (end := self._answer_end(ids)) is not None:
            ends.append(end)
        n = min(ends, default=len(ids))
        return replace(started, completion_ids=ids[:n], sample_logps=logps[:n], finished=bool(ends), text=self.tokenizer.decode(ids[:n], skip_special_tokens=True))

    # -- scoring
    def score(self, batch: Batch, temperature: float = 1.0, values_too: bool = True) -> Scores:
        """Log-probs of the completions under the policy, with gradient where it is enabled, and the critic's values where there is one.

        The value of token t is the critic's expectation before that token is seen. The prompt is computed once for its G completions.
        """
        P, L = batch.prompt_ids.shape
        _, G, T = batch.completion_ids.shape
        fed = batch.completion_ids[:, :, :T - 1]                                                  # nothing is predicted from the last token
        ids = torch.cat([batch.prompt_ids, fed.flatten(1)], 1)                                    # [P, L + G*(T-1)]
        positions, starts = self._positions(batch)                                                # [P, L] or [3, P, L]; [P]
        own = (starts[:, None] + torch.arange(T - 1, device=ids.device)).repeat(1, G)             # [P, G*(T-1)]
        positions = torch.cat([positions, own.expand(*positions.shape[:-1], -1)], -1)
        self.model.train(self.checkpointing and torch.is_grad_enabled())
        layout = Packed(batch.prompt_mask, G, T - 1)
        def predicting(h):                                                                        # [P, L + G*(T-1), D] -> [P, G, T, D], row t predicts token t
            last = h[:, None, L - 1:L].expand(P, G, 1, -1)                                        # the prompt's last: every completion's first token
            return torch.cat([last, h[:, L:].unflatten(1, (G, T - 1))], 2)
        with self._autocast():
            hidden = predicting(self._hidden(ids, positions, layout, batch.pictures))
        targets = batch.completion_ids[batch.mask]
        logps, entropy = self._token_logps(hidden[batch.mask], targets, temperature)
        values = None
        if self.critic and values_too:
            seen = hidden.detach()  # "head": reads the policy's states, never moves them
            if self.critic == "lora":
                with self._adapters("critic"), self._autocast():
                    seen = predicting(self._hidden(ids, positions, layout, batch.pictures))
            values = self.value_head(seen[batch.mask].float())[:, 0]
        spread = lambda x: torch.zeros(P, G, T, device=ids.device).masked_scatter(batch.mask, x)  # [sum len] -> [P, G, T]
        return Scores(spread(logps), spread(entropy), spread(values) if values is not None else None)

    @contextmanager
    def _adapters(self, name: str | None):
        before, self.switch["adapters"] = self.switch["adapters"], name
        try:
            yield
        finally:
            self.switch["adapters"] = before

    def _token_logps(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log pi(target) and the entropy, in fp32 and by chunks. hidden [M, D], targets [M] -> [M], [M]

        The logits of a chunk are computed again in the backward pass, so memory grows with D x length, not with vocabulary x length.
        """
        chunks, entropies = list(zip(hidden.split(self.head_chunk), targets.split(self.head_chunk))), []
        def chunk(h, target):                                                                     # [m, D], [m] -> [m]
            every = self._logits(h, temperature).log_softmax(-1)                                  # [m, V]
            if len(entropies) < len(chunks):                                                      # the first time, not when it runs again
                with torch.no_grad():
                    entropies.append(-torch.linalg.vecdot(every.exp(), every))
            return every.gather(1, target[:, None])[:, 0]
        again = (lambda h, y: checkpoint(chunk, h, y, use_reentrant=False)) if torch.is_grad_enabled() else chunk
        return torch.cat([again(h, y) for h, y in chunks]), torch.cat(entropies)

    @contextmanager
    def reference(self):
        """Within it, this policy is the frozen reference: its adapters off, or the copy made at load. Restored whatever happens."""
        model, adapters = self.model, self.switch["adapters"]
        layer = next((m for m in model.modules() if isinstance(m, LoRALinear)), None)
        try:
            if self.frozen is not None:
                self.model = self.frozen
            elif layer is None:
                raise ValueError("no reference: all weights are trained and no copy was kept (keep_reference=True)")
            self.switch["adapters"] = "reference" if layer is not None and "reference" in layer.A else None
            yield self
        finally:
            self.model, self.switch["adapters"] = model, adapters

    # -- weights
    def trainable(self, part: str = "") -> dict[str, nn.Parameter]:
        """What the optimiser moves and a checkpoint holds, by name. part: "policy" or "critic" for only that."""
        named = [*self.model.named_parameters(), *([(f"value_head.{n}", p) for n, p in self.value_head.named_parameters()] if self.critic else [])]
        of_critic = lambda name: name.startswith("value_head.") or name.endswith(".critic")
        return {name: p for name, p in named if p.requires_grad and (not part or of_critic(name) == (part == "critic"))}

    @torch.no_grad()
    def _start_from(self, tensors: dict[str, Tensor]) -> None:
        """Begin at another run's policy (not its critic), and keep that as the frozen reference."""
        mine = self.trainable("policy")
        theirs = {name: t for name, t in tensors.items() if name in mine}
        if any(name not in theirs or theirs[name].shape != p.shape for name, p in mine.items() if not name.endswith(".reference")):
            raise UsageError("--init: those weights belong to another model, or to another LoRA rank or targets")
        for name, p in mine.items():
            if name.endswith(".reference"):
                p.copy_(theirs[name.removesuffix("reference") + "policy"]).requires_grad_(False)
            else:
                p.copy_(theirs[name])

    @torch.no_grad()
    def load_trainable(self, tensors: dict[str, Tensor]) -> None:
        mine = self.trainable()
        if set(mine) != set(tensors) or any(mine[name].shape != tensors[name].shape for name in mine):
            raise UsageError("these weights belong to another model, or to another LoRA rank or targets")
        for name, p in mine.items():
            p.copy_(tensors[name])


def pick(logits: Tensor, uniform: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token a row by inversion of the distribution function, and its log-prob. logits [P, 1 or G, V], uniform [P, G] -> [P, G] x 2

    The token is the first whose cumulated probability exceeds u: one random number a token, and never a token of probability 0.
    """
    every = logits.log_softmax(-1).expand(*uniform.shape, -1)                                      # [P, G, V]: the first token's are shared
    if greedy:
        token = logits.argmax(-1, keepdim=True).expand(*uniform.shape, 1)
    else:
        cdf = every.exp().cumsum(-1)
        below = torch.minimum(uniform[..., None].to(cdf.dtype) * cdf[..., -1:], torch.nextafter(cdf[..., -1:], torch.zeros_like(cdf[..., -1:])))
        token = torch.searchsorted(cdf, below, right=True)
    return token[..., 0], every.gather(-1, token)[..., 0]


def drop_finished(rows: Tensor, lengths: Tensor, done: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Close ranks when it saves a tenth of the slots: only prompts with a live row, as many slots as the liveliest has. rows [P, G] -> [P', G']"""
    alive = ~done[rows]                                                                           # [P, G]
    prompts, G = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
    if len(prompts) * G > .9 * rows.numel():
        return rows, lengths
    slots = alive[prompts].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :G]         # live first; a dead row fills what is left
    cache.keep(prompts, slots)
    return rows[prompts[:, None], slots], lengths[prompts]


def without_dropout(model: nn.Module) -> None:
    """Dropout off for good: with it, two scoring passes of the same weights would differ."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_tokenizer(name_or_path: str):
    """AutoTokenizer, except where the folder says that its tokenizer.json is all there is: AutoTokenizer would rebuild that by the model's type."""
    generic = get_tokenizer_config(name_or_path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(name_or_path)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def pick_device(name: str) -> str:
    """auto -> cuda where there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    return name


def quiet() -> None:
    """transformers' own bars and hints off: the command line has its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_shape(name_or_path: str):
    """The text model's config: layers, widths, heads, vocabulary."""
    return AutoConfig.from_pretrained(name_or_path).get_text_config(decoder=True)


def model_size(name_or_path: str, rank: int) -> tuple[int, int]:
    """(weights, weights trained) of a model, from its config alone. rank 0: all are trained."""
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        with torch.device("meta"):
            model = (AutoModelForImageTextToText if config.model_type in FRAMES else AutoModelForCausalLM).from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read the config of {name_or_path}: {first_line(error)}") from None
    total = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
    return total, rank * sum(m.in_features + m.out_features for m in linear) if rank else total
