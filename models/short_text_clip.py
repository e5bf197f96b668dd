"""open_clip's CLIP with texts of any length up to its context length."""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn


class ShortTextCLIP(CLIP):
    """A CLIP that encodes texts [B, n] with any n, where open_clip's own takes the context length only."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode token ids, int64 [B, n]: [B, D]."""
        length = text.shape[1]
        if length == self.context_length:
            return super().encode_text(text, normalize)
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
