"""DP-MemArc's side network: a ladder of small blocks beside a frozen backbone.

The paper (arXiv 2406.11087) published no code; this is a reconstruction from ladder side-tuning (LST, arXiv 2206.06522)
and QST (2401.07159). With h_0 the embeddings, h_k the output of the backbone's block k, width d, and r = d / reduction::

    s_0 = D_0 norm(h_0)
    s_k = block_k(μ_k s_{k-1} + (1 − μ_k) D_k norm(h_k)),    μ_k = sigmoid(α_k / 0.1), α_k = 0 at the start
    output = h_L + U norm(s_L),                              U = 0 at the start

The backbone runs under ``no_grad``: no activation of it is kept and no gradient goes through it. Since U starts at zero the
model starts exactly at the pre-trained one. Nothing here reads data outside the forward pass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memarc_utils.backbones import block_view, freeze
from memarc_utils.book_keeping import accumulation_dtype
from memarc_utils.layer_rules import register_rule

BLOCKS = ("mlp", "attention")
_TEMPERATURE = 0.1  # of LST's gates


@dataclass(frozen=True)
class SideNetworkConfig:
    """Settings of a side network.

    Attributes:
        reduction: side width r = width / reduction.
        block: ``mlp`` (each token by itself) or ``attention`` (tokens of an example meet at side width).
        every: a side block beside every k-th backbone block (the last one always).
        heads: attention heads of a side block.
    """

    reduction: int = 8
    block: str = "attention"
    every: int = 1
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("reduction", "every", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")


class Gate(nn.Module):
    """``μ s + (1 − μ) z`` with one scalar, μ = sigmoid(α / 0.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, s: Float[Tensor, "batch tokens side"], z: Float[Tensor, "batch tokens side"]
                ) -> Float[Tensor, "batch tokens side"]:
        mu = torch.sigmoid(self.alpha / _TEMPERATURE)
        return mu * s + (1 - mu) * z


def _gate_gradient(gate: Gate, s: Tensor, z: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """``∂/∂α = μ(1 − μ)/0.1 · Σ g ⊙ (s − z)`` per example."""
    mu = torch.sigmoid(gate.alpha / _TEMPERATURE)
    inner = (grad_output * (s - z)).flatten(1).sum(1, keepdim=True, dtype=accumulation_dtype(grad_output.dtype))
    return {"alpha": inner * (mu * (1 - mu) / _TEMPERATURE)}


register_rule(Gate, _gate_gradient)


def normalise(h: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
    """Layer normalisation without parameters: brings every backbone's features to one scale."""
    return F.layer_norm(h, h.shape[-1:])


class SideBlock(nn.Module):
    """Pre-norm residual block at side width; ``attention`` adds self-attention before the MLP.

    The norms carry no parameters (under noise a scale earns little), projections start small.
    """

    def __init__(self, side: int, config: SideNetworkConfig, causal: bool) -> None:
        super().__init__()
        self.causal, self.heads = causal, config.heads
        self.up, self.down = nn.Linear(side, 2 * side), nn.Linear(2 * side, side)
        if config.block == "attention":
            self.qkv, self.mix = nn.Linear(side, 3 * side), nn.Linear(side, side)

    def forward(self, s: Float[Tensor, "batch tokens side"], mask: Tensor | None) -> Float[Tensor, "batch tokens side"]:
        if hasattr(self, "qkv"):
            s = s + self.mix(self._attend(self.qkv(normalise(s)), mask))
        return s + self.down(F.gelu(self.up(normalise(s))))

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return mixed.transpose(1, 2).flatten(2)


class SideNetwork(nn.Module):
    """Takes the place of a model's base module: the frozen backbone, and the ladder beside it.

    Attributes:
        backbone: the original base module, frozen and in evaluation mode for good.
        taps: which outputs feed the ladder: 0 the embeddings, k the backbone's block k.
    """

    def __init__(self, base: nn.Module, blocks: nn.ModuleList, width: int, config: SideNetworkConfig, causal: bool) -> None:
        super().__init__()
        if width % config.reduction:
            raise ValueError(f"reduction {config.reduction} does not divide the backbone's width {width}: take one of "
                             f"{[r for r in (2, 4, 8, 16, 32, 64) if width % r == 0]}")
        side = width // config.reduction
        if config.block == "attention" and side % config.heads:
            raise ValueError(f"{config.heads} heads do not divide the side width {side} = {width} / {config.reduction}: "
                             "change heads or reduction")
        self.side_config, self.config, self.causal = config, base.config, causal
        pooler = getattr(base, "pooler", None)
        self.backbone = freeze(base)
        if pooler is not None:  # it reads the final hidden state, which is ours, and belongs to the head
            base.pooler = None
        self.pooler = None if pooler is None else _thaw(pooler)
        depth = len(blocks)
        self._blocks = [blocks]  # in a list: they are the backbone's, not registered a second time
        self.taps = [0, *sorted(range(depth, 0, -config.every))]
        self.downs = nn.ModuleList(nn.Linear(width, side, bias=False) for _ in self.taps)
        self.gates = nn.ModuleList(Gate() for _ in self.taps[1:])
        self.side_blocks = nn.ModuleList(SideBlock(side, config, causal) for _ in self.taps[1:])
        self.up = nn.Linear(side, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(next(base.parameters()).device)

    def __getattr__(self, name: str):
        """Whatever `transformers` asks of the base module (embed_tokens, dtype, get_input_embeddings) the backbone answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":  # not set yet
                raise
            return getattr(self.backbone, name)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        """As the base module's; ``last_hidden_state`` (and ``pooler_output``) have the ladder's output added."""
        if self.causal and (kwargs.get("past_key_values") is not None or kwargs.get("use_cache")) \
                and self.side_config.block == "attention":
            raise ValueError("a side network with attention keeps no cache of earlier tokens: call with use_cache=False, or "
                             'take SideNetworkConfig(block="mlp")')
        if self.causal and self.side_config.block == "attention":
            kwargs["use_cache"] = False
        kwargs["return_dict"] = True
        features = {}
        handles = self._collect(features)
        try:
            with torch.no_grad():
                outputs = self.backbone(input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        state = self._climb(features, self._mask(attention_mask, features[0]))
        hidden = outputs.last_hidden_state
        changed = {"last_hidden_state": hidden + self.up(normalise(state)).to(hidden.dtype)}
        if self.pooler is not None:
            changed["pooler_output"] = self.pooler(changed["last_hidden_state"])
        return type(outputs)(**{**outputs, **changed})  # built anew: the heads read the entries by position

    def _collect(self, features: dict[int, Tensor]) -> list:
        """Hooks that keep the tapped features of this call."""
        blocks = self._blocks[0]

        def keep_input(module, args, kwargs):
            features[0] = args[0] if args else kwargs["hidden_states"]

        def keeper(tap):
            def keep_output(module, args, output):
                features[tap] = output[0] if isinstance(output, tuple) else output
            return keep_output

        return [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True),
                *(blocks[tap - 1].register_forward_hook(keeper(tap)) for tap in self.taps[1:])]

    def _climb(self, features: dict[int, Tensor], mask: Tensor | None) -> Float[Tensor, "batch tokens side"]:
        dtype = self.up.weight.dtype
        state = self.downs[0](normalise(features.pop(0).to(dtype)))
        for tap, down, gate, block in zip(self.taps[1:], self.downs[1:], self.gates, self.side_blocks):
            state = block(gate(state, down(normalise(features.pop(tap).to(dtype)))), mask)
        return state

    def _mask(self, attention_mask: Tensor | None, h: Tensor) -> Tensor | None:
        """Boolean mask of the side attention: real tokens only, and no later ones in a causal model."""
        if self.side_config.block != "attention" or attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(f"the side attention needs a mask of shape (batch, tokens), got {tuple(attention_mask.shape)}")
        mask = attention_mask.bool()[:, None, None, :]
        if self.causal:
            tokens = h.shape[1]
            mask = mask & torch.ones(tokens, tokens, dtype=torch.bool, device=h.device).tril()
            mask = mask | torch.eye(tokens, dtype=torch.bool, device=h.device)  # a row of padding sees itself, not nothing
        return mask


def _thaw(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part.__dict__.pop("train", None)
    return module.requires_grad_(True)


def attach_side_network(backbone: nn.Module, config: SideNetworkConfig = SideNetworkConfig()) -> nn.Module:
    """Puts a side network beside the model's backbone, in place: the same model comes back.

    Call signature and outputs stay those of the `transformers` model; only the side network and the head train.

    Args:
        backbone: a BERT, RoBERTa, DistilBERT, GPT-2, OPT or Llama type with a classification or language-model head. A head
            that is tied to the embeddings stays frozen.
        config: see `SideNetworkConfig`.

    Raises:
        ValueError: not such a model, it has a side network already, or the config does not fit its width.
    """
    name = getattr(backbone, "base_model_prefix", "")
    if any(isinstance(m, SideNetwork) for m in backbone.modules()):
        raise ValueError("this model has a side network already: load the backbone anew to attach another")
    view = block_view(backbone)
    family = backbone.config.model_type
    causal = family in ("gpt2", "opt", "llama")
    # OPT's language model calls the decoder inside its base module, so the ladder goes there.
    owner, attribute = (view.base, "decoder") if family == "opt" else (backbone, name)
    side = SideNetwork(getattr(owner, attribute), view.blocks, view.width, config, causal)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    setattr(owner, attribute, side)
    for module in (side.downs, side.gates, side.side_blocks, side.up, side.pooler):
        if module is not None:
            module.requires_grad_(True)
    if not view.tied:
        for head, module in view.heads.items():
            module.requires_grad_(True)
    return backbone
