"""The options of the Transformer. The defaults give LLaMA, and other values give other model families. Pure, without torch.

The settings model.* have the same names and defaults (mpidp/config/model_settings.py). The options rotary_layers and
window_layers have one letter per layer. If such an option has fewer letters than the model has layers, its letters are repeated.
For example, rotary_layers="yyyn" means that every fourth layer has no rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

CHOICES = {
    "activation": ("silu", "gelu", "gelu_tanh", "relu2"), "qk_norm": ("", "head", "layer"), "norm": ("rms", "layer"),
    "norm_place": ("before", "after", "both"), "positions": ("rotary", "learned"),
}
LETTERS = {"rotary_layers": "yn", "window_layers": "wf"}  # one letter per layer


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """Options of the Transformer. The defaults are those of LLaMA."""

    activation: str = "silu"  # gelu is the exact GELU; relu2 is relu(x)^2
    gated: bool = True  # down(act(gate(x)) * up(x)); False: down(act(up(x))), without a gate matrix
    attention_bias: str = ""  # the layers with a bias, among q, k, v and o, separated by commas
    mlp_bias: bool = False  # whether gate, up and down have biases
    qk_norm: str = ""  # "head": a norm over head_dim, with one gain for all heads; "layer": a norm over all heads together
    norm: str = "rms"  # "layer": LayerNorm with gain and bias
    norm_plus_one: bool = False  # whether the gains of norms are 1 + weight
    norm_place: str = "before"  # before: f(norm(x)); after: norm(f(x)); both: norm(f(norm(x)))
    parallel: bool = False  # True: a block computes x + attention(norm1(x)) + feed_forward(norm2(x))
    positions: str = "rotary"  # "learned": a table of vectors that are added to the embedding
    position_rows: int = 0  # rows of the table of learned positions; 0: seq_len
    rotary_dims: int = 0  # number of leading dimensions of each head that are rotated; 0: all
    rotary_layers: str = ""  # one letter per layer: y rotary positions, n none; "": rotary positions in all layers
    window: int = 0  # a position attends to itself and the window - 1 positions before it; 0: to all positions before it
    window_layers: str = ""  # one letter per layer: w with the window, f full attention; "": all layers have the window
    window_rope_theta: float = 0.0  # rope_theta of layers with a window; 0: these layers use rope_theta and rope_scaling
    window_rope_scaling: str = ""  # rope_scaling of layers with a window, if window_rope_theta is above 0
    embedding_scale: float = 1.0  # the embedding's output is multiplied by this factor
    input_mix: bool = False  # a block's input is a x + b x0 with learned a and b; x0 is the embedding's output
    residual_scale: float = 1.0  # each branch's output is multiplied by this factor
    attention_scale: float = 0.0  # q k^T is multiplied by this factor; 0 means head_dim ** -0.5
    logit_scale: float = 1.0  # logits are multiplied by this factor
    attention_cap: float = 0.0  # attention scores x become cap tanh(x / cap); 0: unchanged
    logit_cap: float = 0.0  # the same for logits, after logit_scale

    def is_rotary(self, layer: int) -> bool:
        """Return whether a layer rotates queries and keys. Pure."""
        letters = self.rotary_layers or "y"
        return self.positions == "rotary" and letters[layer % len(letters)] == "y"

    def window_of(self, layer: int) -> int:
        """Return the size of a layer's sliding window, or 0 if the layer attends to all earlier positions. Pure."""
        letters = self.window_layers or "w"
        return self.window if letters[layer % len(letters)] == "w" else 0

    def biased(self) -> set[str]:
        """Return the names of the layers of a block that have a bias. Possible names are q, k, v, o, gate, up and down. Pure."""
        of_attention = {name.strip() for name in self.attention_bias.split(",") if name.strip()}
        return of_attention | ({"gate", "up", "down"} if self.mlp_bias else set())

    def norms(self) -> tuple[str, ...]:
        """Return the names of the normalization layers of a block, without those of queries and keys. Pure."""
        before = ("attention_norm", "feed_forward_norm") if self.norm_place != "after" else ()
        return before + (("attention_out_norm", "feed_forward_out_norm") if self.norm_place != "before" else ())

    def changed(self) -> dict[str, Any]:
        """Return {name: value} for the options that differ from their defaults. Pure."""
        values = {name: getattr(self, name) for name in DEFAULTS}
        return {name: value for name, value in values.items() if value != DEFAULTS[name]}


DEFAULTS = {option.name: option.default for option in fields(TransformerOptions)}
