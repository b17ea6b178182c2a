"""ConsisID's transformer blocks with less memory, bit for bit.

diffusers' block (0.42.1, models/transformers/consisid_transformer_3d.py) allocates a tensor for
each activation, gate and residual, and holds the inputs of attention until the feed-forward is
done. The block below computes the same numbers in the same order. It writes in place to tensors
that it has allocated, and frees its inputs early. The largest tensor, inside the feed-forward, is
0.8 GiB at 720x480 and 49 frames in bfloat16; it exists once instead of twice.

For sampling only: in-place operations prevent gradients.
"""

import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.activations import GELU
from diffusers.models.transformers.consisid_transformer_3d import ConsisIDBlock


class LeanGELU(GELU):
    """The feed-forward's first layer, with the activation in place."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, inner dim] to [batch, tokens, feed-forward dim]."""
        return torch.ops.aten.gelu_(self.proj(hidden_states), approximate=self.approximate)


class LeanBlock(ConsisIDBlock):
    """A block that frees its inputs early, and adds in place."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as `ConsisIDBlock.forward`: returns video and text as new tensors.

        Args:
            hidden_states, encoder_hidden_states: video and text, [batch, tokens, inner dim]; not
                modified.
            temb: [batch, time embed dim].
        """
        text_tokens = encoder_hidden_states.shape[1]
        video, text, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
        video, text = self.attn1(
            hidden_states=video, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb
        )
        hidden_states = hidden_states + video.mul_(gate)
        encoder_hidden_states = encoder_hidden_states + text.mul_(text_gate)
        video, text, gate, text_gate = self.norm2(hidden_states, encoder_hidden_states, temb)
        tokens = torch.cat([text, video], dim=1)
        del text, video
        for layer in self.ff.net:
            tokens = layer(tokens)
        hidden_states.add_(tokens[:, text_tokens:].mul_(gate))
        encoder_hidden_states.add_(tokens[:, :text_tokens].mul_(text_gate))
        return hidden_states, encoder_hidden_states


# The classes are replaced, not the forwards, because modules of one class share compiled code.
LEAN: dict[type, type] = {ConsisIDBlock: LeanBlock, GELU: LeanGELU}


def use_lean_blocks(transformer: ConsisIDTransformer3DModel) -> None:
    """Replace the classes of a transformer's blocks by those above, in place."""
    for module in transformer.transformer_blocks.modules():
        if type(module) in LEAN:
            module.__class__ = LEAN[type(module)]
