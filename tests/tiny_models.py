"""Random text models of three families, a tokenizer of characters, and rollouts for them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from policy import Policy, Rollout

VOCABULARY = 97
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=1,
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def character_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token a character: </answer> is nine of them, as it may be in a real tokenizer."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {chr(c): c - 30 for c in range(32, 127)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", **kwargs
    )


def llama(**kwargs) -> LlamaForCausalLM:
    """kwargs: of its config, beside or in place of SIZES."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "attn_implementation": "prompt_once"} | SIZES | kwargs
    return LlamaForCausalLM(LlamaConfig(**sizes))


def family(name: str, **settings) -> Policy:
    torch.manual_seed(0)
    config, model, extra = FAMILIES[name]
    of_family = config(vocab_size=VOCABULARY, **SIZES, **extra, attn_implementation="prompt_once")
    return Policy(model(of_family), character_tokenizer(), **settings)


def made_up(policy: Policy, items: list, lengths: list[list[int]], seed: int = 0) -> list[Rollout]:
    """Rollouts of random completions, lengths [items][samples]; pad and EOS ids are among them."""
    generator = torch.Generator().manual_seed(seed)
    rollouts = []
    for p, (item, row) in enumerate(zip(items, lengths)):
        for n in row:
            ids = torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()
            rollouts.append(Rollout(item, p, policy.prompt(item), ids, [0.0] * n, True))
    return rollouts


def moved(policy: Policy, by: float) -> None:
    """Every trained weight moves by random numbers of this size: LoRA's B is no longer 0."""
    with torch.no_grad():
        for p in policy.trainable().values():
            generator = torch.Generator().manual_seed(p.numel())
            p.add_(torch.randn(p.shape, generator=generator) * by)


def completions(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.completion_ids for rollout in rollouts]


def assert_scores_and_gradients(policy: Policy, rollouts: list, batch, replicated) -> None:
    """The scorer's log-probs and their gradient are those of `replicated(policy, rollouts, 0.7)`.

    That yields a tensor of log-probs a rollout, each computed by itself. The gradient is of a sum
    with random weights. Policy's gradients are left as those of the replicated pass.
    """
    scores = policy.score(batch, temperature=0.7)
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(scores.logps.shape, generator=generator) * batch.mask
    (scores.logps * weights).sum().backward()
    ours = gradient(policy)
    policy.model.zero_grad()
    policy.model.eval()
    theirs = list(replicated(policy, rollouts, 0.7))
    of_rows = zip(theirs, scores.logps.flatten(0, 1), weights.flatten(0, 1))
    total = 0.0
    for their_logps, our_logps, weight in of_rows:
        length = len(their_logps)
        torch.testing.assert_close(our_logps[:length], their_logps, rtol=0, atol=1e-4)
        total = total + (their_logps * weight[:length]).sum()
    total.backward()
    assert (scores.logps[~batch.mask] == 0).all()
    expected = gradient(policy)
    assert (ours - expected).norm() / expected.norm() < 1e-5


def gradient(policy: Policy) -> torch.Tensor:
    """All gradients as one vector; a weight without one must have none on either side."""
    found = [p.grad.flatten() for p in policy.trainable().values() if p.grad is not None]
    return torch.cat(found).clone()
