"""The text side while it is trained: whole batches with gradients, where the engine encodes one prompt at a time."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from step1x.engine.dit import Text
from step1x.engine.qwen import going_on
from step1x.engine.text import Conditioner
from step1x.engine.text_ids import Grid, rope_positions
from step1x.engine.variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextSide(nn.Module):
    """Batches of (picture patches, instructions) -> `Text`, row for row what `Conditioner.encode` gives.

    The template's tokens are the same in every sample and are only ever read through attention, so they run once a
    step as a batch of one.
    """

    def __init__(self, conditioner: Conditioner, tokenizer: "PreTrainedTokenizerFast", variant: Variant) -> None:
        super().__init__()
        self.model = conditioner.model
        self.conditioner = conditioner
        self.tokenizer = tokenizer
        self.variant = variant

    def forward(self, patches: Tensor, grid: Grid, instructions: list[str]) -> Text:
        """patches: (batch, patches, pixels) of equally sized pictures. Rows are (batch, text_tokens, width)."""
        from transformers import DynamicCache

        batch, device = len(instructions), self.model.device
        cut, length = self.variant.template_tokens, self.variant.text_tokens
        image_tokens = grid.rows * grid.columns
        ids = [self.conditioner.tokenise(words, image_tokens)[: cut + length] for words in instructions]
        longest = max(map(len, ids))
        table = torch.zeros(batch, longest, dtype=torch.long)
        positions = torch.zeros(3, batch, longest, dtype=torch.long)
        for row, sequence in enumerate(ids):
            values = torch.tensor(sequence)
            table[row, : len(sequence)] = values
            positions[:, row, : len(sequence)] = rope_positions(values, self.conditioner.tokens.image_pad, grid)
        table, positions = table.to(device), positions.to(device)
        language = self.model.language_model
        known = DynamicCache()
        language(
            inputs_embeds=language.embed_tokens(table[:1, :cut]),
            position_ids=positions[:, :1, :cut],
            use_cache=True,
            **going_on(language, known),
        )
        known.batch_repeat_interleave(batch)
        suffix = table[:, cut:]
        embeds = self._placed(language.embed_tokens(suffix), suffix, patches, grid)
        hidden = language(
            inputs_embeds=embeds,
            position_ids=positions[:, :, cut:],
            use_cache=True,
            **going_on(language, known),
        ).last_hidden_state
        lengths = torch.tensor([len(sequence) - cut for sequence in ids], device=device)
        mask = torch.arange(length, device=device)[None] < lengths[:, None]
        rows = nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1])) * mask[:, :, None]
        return Text(tokens=rows, mask=mask.long())

    def _placed(self, embeds: Tensor, ids: Tensor, patches: Tensor, grid: Grid) -> Tensor:
        """Embeddings with the vision tower's features where the picture stands."""
        merge = self.model.config.vision_config.spatial_merge_size
        shape = torch.tensor([[1, grid.rows * merge, grid.columns * merge]] * len(ids), device=embeds.device)
        features = self.model.visual(patches.flatten(0, 1).to(embeds.device), grid_thw=shape).pooler_output
        where = (ids == self.conditioner.tokens.image_pad)[:, :, None].expand_as(embeds)
        return embeds.masked_scatter(where, features.to(embeds.dtype))
