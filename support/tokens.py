"""A tokenizer as the policy uses it: prompts to ids, ids to texts, and where a completion ends."""

from functools import partial

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from data import plain_text
from support.errors import UsageError


def load_tokenizer(name_or_path: str):
    """AutoTokenizer, except where a folder says that its tokenizer.json is all there is.

    AutoTokenizer would rebuild that one by the model's type.
    """
    generic = ("TokenizersBackend", "PreTrainedTokenizerFast")
    is_generic = get_tokenizer_config(name_or_path).get("tokenizer_class") in generic
    return (PreTrainedTokenizerFast if is_generic else AutoTokenizer).from_pretrained(name_or_path)


class Tokens:
    """template: "auto" is the tokenizer's chat template where it has one, else a plain transcript.

    stop_answer: whether a completion ends at its first </answer>; "auto" is with the plain
    template, since a base model does not end by itself.
    """

    def __init__(self, model, tokenizer, template: str = "auto", stop_answer: str = "auto"):
        self.tokenizer = tokenizer
        has_template = bool(tokenizer.chat_template)
        if template == "chat" and not has_template:
            raise UsageError("this model's tokenizer has no chat template: use --template plain")
        self.chat = template == "chat" or (template == "auto" and has_template)
        self.stop_answer = stop_answer == "on" or (stop_answer == "auto" and not self.chat)
        self.forbidden: set[int] = set()  # ids that stand for an image
        closing = self.closing_ids() if self.chat else []
        self.eos_ids = self.all_eos_ids(model, closing)
        own = tokenizer.eos_token_id
        # What supervised fine-tuning teaches to end with.
        self.end_id = [*closing, *([] if own is None else [own]), *self.eos_ids][0]

    def all_eos_ids(self, model, closing: list[int]) -> list[int]:
        """Every id that ends a completion: of generation config, model, tokenizer and chat turn."""
        ids = set(closing)
        for found in (
            getattr(model.generation_config, "eos_token_id", None),
            getattr(model.config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            ids.update(found if isinstance(found, (list, tuple)) else [found])
        ids.discard(None)
        if not ids:
            raise UsageError(
                "neither the tokenizer nor the generation config names an EOS token: "
                "no completion could end"
            )
        return sorted(ids)

    def closing_ids(self) -> list[int]:
        """The special token that closes a turn of the chat, if one does."""
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        after = self.tokenizer(text.rsplit("ANSWER", 1)[-1], add_special_tokens=False).input_ids
        return [token for token in after[:1] if token in self.tokenizer.all_special_ids]

    def of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a prompt: by the chat template, or plain with the tokenizer's own BOS."""
        if not self.chat:
            ids = self.tokenizer(plain_text(messages)).input_ids
            return ids[:-1] if ids[-1] in self.eos_ids else ids  # some close every text with EOS
        render = partial(
            self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True
        )
        try:
            text = render(messages)
        except Exception as error:  # jinja2's: some templates know no system turn
            if type(error).__name__ != "TemplateError":
                raise
            together = "\n\n".join(message["content"] for message in messages)
            text = render([{"role": "user", "content": together}])
        return self.tokenizer(text, add_special_tokens=False).input_ids  # the BOS is in it already

    def of_completion(self, text: str, end: bool = False) -> list[int]:
        """The ids of a text that nobody sampled; end: and the token that ends it."""
        text = text if self.chat else f" {text}"
        return self.tokenizer(text, add_special_tokens=False).input_ids + [self.end_id] * end

    def checked(self, ids: list[int], where: str) -> list[int]:
        """A text that shows no image must not ask for pixels that are not there."""
        if found := set(ids) & self.forbidden:
            name = self.tokenizer.convert_ids_to_tokens(found.pop())
            raise UsageError(
                f"{where}: its text holds the token {name}, which stands for an image: take it out"
            )
        return ids

    def answer_end(self, ids: list[int]) -> int | None:
        """How many of the ids it takes until the text holds </answer>; None where it does not."""
        if "</answer>" not in self.tokenizer.decode(ids):
            return None
        low, high = 1, len(ids)  # bisection: once it is there, it stays
        while low < high:
            middle = (low + high) // 2
            if "</answer>" in self.tokenizer.decode(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def end(self, ids: list[int]) -> int | None:
        """How many ids a completion has, the one that ends it among them; None: it does not end.

        It depends on the ids alone, not on when the sampling loop noticed.
        """
        ends = [t + 1 for t, token in enumerate(ids) if token in self.eos_ids][:1]
        if self.stop_answer and (end := self.answer_end(ids)) is not None:
            ends.append(end)
        return min(ends, default=None)
