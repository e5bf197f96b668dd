"""open_clip's text towers with texts of any length up to their context length."""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


class ShortTextCLIP(CLIP):
    """A CLIP that encodes texts [B, n] with any n, where open_clip's own takes the context length only."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode token ids, int64 [B, n]: [B, D]."""
        length = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


class ShortTextTransformer(TextTransformer):
    """A text tower of its own whose causal mask is as long as the text."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        if mask is not None and mask.ndim == 2:
            mask = mask[: x.shape[1], : x.shape[1]]
        return x, mask
