"""Qwen-VL: which tokens of a prompt stand for its images, where they stand, what the tower sees."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil as ImageProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support import pictures
from support.errors import UsageError
from support.tokens import Tokens

__all__ = ["FRAMES", "ImageProcessor", "Pictures", "Vision"]

# The frame in which a family of models writes boxes, (width, height); None = the resized image.
FRAMES = {"qwen3_vl": (1000, 1000), "qwen2_5_vl": None, "qwen2_vl": (1000, 1000)}


@dataclass(eq=False)
class Pictures:
    """The images of one prompt, one object for all its rollouts: what is computed is shared."""

    pixels: Tensor  # [patches of all images, channels x time x height x width of a patch]
    grids: Tensor  # [images, 3]: time, height, width in patches
    positions: Tensor  # [3, L] of the prompt's tokens: time, height, width
    features: Tensor | None = None  # [levels, image tokens, D] once a frozen tower has seen them


class Vision:
    """The eyes of a Qwen3-VL, Qwen2.5-VL or Qwen2-VL.

    trained: the tower learns, so nothing of it is kept.
    """

    def __init__(self, model, tokens: Tokens, processor: ImageProcessor, trained: bool):
        self.model, self.tokens, self.processor, self.trained = model, tokens, processor, trained
        known = len(tokens.tokenizer)
        ids = {}
        for name in ("image", "video", "vision_start", "vision_end"):
            token = getattr(model.config, f"{name}_token_id", None)
            if token is not None and token < known:
                ids[name] = token
        self.image_token = ids["image"]
        # Never sampled: an image token in a completion would ask for pixels that are not there.
        tokens.forbidden = set(ids.values())
        marks = [ids[name] for name in ("vision_start", "image", "vision_end") if name in ids]
        self.mark = "".join(tokens.tokenizer.convert_ids_to_tokens(marks))

    # -- prompts
    def resized(self, source, where: str) -> tuple[int, int]:
        """(width, height) in pixels to which the image processor will bring an image."""
        width, height = pictures.size_of(source)
        side = self.processor.patch_size * self.processor.merge_size
        limits = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
        try:
            h, w = smart_resize(height, width, side, *limits)
        except ValueError as error:
            raise UsageError(
                f"{where}: an image of {width} x {height} pixels cannot be used ({error})"
            ) from None
        return w, h

    def framed(self, item):
        """A `localize` item with the coordinate frame that this model family writes boxes in."""
        if item.task != "localize" or item.frame:
            return item
        source = pictures.sources(item.image)[0]
        frame = FRAMES[self.model.config.model_type] or self.resized(source, item.id)
        return replace(item, frame=(*frame, *pictures.size_of(source)))

    def prompt(self, chat: list[dict[str, str]], item) -> list[int]:
        """The ids of a prompt with images, which stand in front of the user's text.

        Each image token of the text becomes as many as the image has features.
        """
        sizes = [self.resized(source, item.id) for source in pictures.sources(item.image)]
        chat[1]["content"] = self.mark * len(sizes) + chat[1]["content"]
        text = self.tokens.of_chat(chat)
        if text.count(self.image_token) != len(sizes):
            name = self.tokens.tokenizer.convert_ids_to_tokens(self.image_token)
            raise UsageError(
                f"{item.id}: its text holds the token {name}, which stands for an image: "
                "take it out"
            )
        side = self.processor.patch_size * self.processor.merge_size
        counts = iter([(w // side) * (h // side) for w, h in sizes])
        ids = []
        for token in text:
            ids += [token] * (next(counts) if token == self.image_token else 1)
        return ids

    def look(self, item, ids: list[int]) -> Pictures | None:
        """Open the images of an item whose prompt has these ids. None where it has no image."""
        if item.image is None:
            return None
        images = [pictures.open_image(s, item.id) for s in pictures.sources(item.image)]
        opened = self.processor(images, return_tensors="pt")
        row, grids = torch.tensor([ids]), opened["image_grid_thw"]
        is_image = row == self.image_token
        expected = int(grids.prod(1).sum()) // self.processor.merge_size**2
        if (found := int(is_image.sum())) != expected:
            raise ValueError(
                f"{item.id}: the prompt has {found} image tokens and its images {expected} features"
            )
        positions, _ = self.model.model.get_rope_index(row, is_image.int(), image_grid_thw=grids)
        return Pictures(opened["pixel_values"], grids, positions[:, 0])

    # -- the forward pass
    def tower(self, model, seen: list[Pictures]) -> Tensor:
        """The vision tower on all images of some prompts -> [levels, image tokens, D]

        Its output, and in Qwen3-VL what some layers on the way to it saw (arXiv 2406.04334).
        """
        visual = model.model.visual
        pixels = torch.cat([p.pixels for p in seen]).to(visual.device, visual.dtype)
        grids = torch.cat([p.grids for p in seen]).to(visual.device)
        found = visual(pixels, grid_thw=grids)
        return torch.stack([found.pooler_output, *getattr(found, "deepstack_features", ())])

    def features(self, model, seen: list[Pictures]) -> Tensor:
        """A frozen tower runs once a prompt, for sampling and every pass of the update alike."""
        if self.trained:
            return self.tower(model, seen)
        for one in seen:
            if one.features is None:
                with torch.no_grad():
                    one.features = self.tower(model, [one])
        return torch.cat([one.features for one in seen], 1)

    def inputs(self, model, ids: Tensor, seen: list[Pictures]) -> dict:
        """The decoder's keywords for ids [P, S], of which image tokens stand for features."""
        words = model.get_input_embeddings()(ids)  # [P, S, D]
        is_image = ids == self.image_token
        # The first level stands in for image tokens; layer i adds level i + 1 to what it wrote.
        first, *later = self.features(model, seen).to(words.dtype)
        inputs = {"inputs_embeds": words.masked_scatter(is_image[..., None], first)}
        if later:
            inputs |= {"visual_pos_masks": is_image, "deepstack_visual_embeds": later}
        return inputs

    def positions(self, prompt_positions: Tensor, seen: list[Pictures | None]) -> Tensor:
        """[P, L] -> [3, P, L]: an image of h x w tokens takes max(h, w) positions, not h * w."""
        positions = prompt_positions.expand(3, -1, -1).clone()
        for p, one in enumerate(seen):
            if one is not None:
                positions[:, p, -one.positions.shape[1] :] = one.positions.to(positions.device)
        return positions
