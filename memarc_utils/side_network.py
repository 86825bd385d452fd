"""DP-MemArc's side network: a ladder of small blocks beside a frozen backbone.

The paper (arXiv 2406.11087) published no code; this is a reconstruction from ladder side-tuning (LST, arXiv 2206.06522)
and QST (2401.07159). With h_0 the embeddings, h_k the output of the backbone's block k, width d, and r = d / reduction::

    s_0 = D_0 norm(h_0)
    s_k = block_k(μ_k s_{k-1} + (1 − μ_k) D_k norm(h_k)),    μ_k = sigmoid(α_k / 0.1), α_k = 0 at the start
    output = h_L + U norm(s_L),                              U = 0 at the start

The backbone runs under ``no_grad``: no activation of it is kept and no gradient goes through it. Since U starts at zero the
model starts exactly at the pre-trained one. Nothing here reads data outside the forward pass. Features that were computed
before (`feature_cache`) come as ``inputs_embeds``, and the backbone does not run at all.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from memarc_utils.backbones import block_view, freeze
from memarc_utils.block_halves import LLAMA_TYPES
from memarc_utils.preparation import recorded
from memarc_utils.side_blocks import Gate, Mix, SideBlock, Sum, downsample, normalise, start_from_backbone

_CHOICES = {"block": ("mlp", "attention", "adapter"), "downsample": ("learned", "low_rank", "pooled", "orthogonal"),
            "gate": ("none", "scalar", "vector"), "mix": ("residual", "gated"), "initial_weights": ("random", "magnitude")}
FROZEN_DOWNSAMPLES = ("pooled", "orthogonal")


@dataclass(frozen=True)
class SideNetworkConfig:
    """Settings of a side network.

    Attributes:
        reduction: side width r = width / reduction.
        block: ``mlp`` (each token by itself), ``attention`` (tokens of an example meet at side width) or ``adapter`` (a
            bottleneck of r/4).
        downsample: ``learned``, ``low_rank`` (by way of 16 channels), or frozen: ``pooled`` (means of groups of channels),
            ``orthogonal`` (a fixed random projection). A frozen one has no d-wide records and no noise coordinates.
        gate: how a block's input joins the ladder: one α (``scalar``), one a channel (``vector``), or a plain sum (``none``).
        layers: ``all``, or k for a side block beside every k-th backbone block (the last one always).
        mix: ``residual``, h + U s with U = 0 at the start; ``gated``, a h + (1 − a) U s with a = 1 at the start (QST).
        initial_weights: ``random``, or ``magnitude``: from the backbone's largest weights. Never from data. Made for a learned downsample,
            which starts as the choice of the same channels; other ones mix channels, so it says little to them.
        heads: attention heads of a side block.
    """

    reduction: int = 8
    block: str = "attention"
    downsample: str = "learned"
    gate: str = "scalar"
    layers: int | str = "all"
    mix: str = "residual"
    initial_weights: str = "random"
    heads: int = 4

    def __post_init__(self) -> None:
        for name in ("reduction", "heads"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.layers != "all" and (isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1):
            raise ValueError(f"layers must be 'all' or a whole number k >= 1 (every k-th block), got {self.layers!r}")


class SideNetwork(nn.Module):
    """Takes the place of a model's base module: the frozen backbone, and the ladder beside it.

    Attributes:
        backbone: the original base module, frozen and in evaluation mode for good.
        taps: which outputs feed the ladder: 0 the embeddings, k the backbone's block k.
    """

    def __init__(self, base: nn.Module, blocks: nn.ModuleList, mlps: tuple[tuple[nn.Module, ...], ...],
                 heads: list[nn.Module], width: int, config: SideNetworkConfig, causal: bool) -> None:
        super().__init__()
        if width % config.reduction:
            raise ValueError(f"reduction {config.reduction} does not divide the backbone's width {width}: take one of "
                             f"{[r for r in (2, 4, 8, 16, 32, 64) if width % r == 0 and width > r]}")
        side = width // config.reduction
        if side < 2:
            raise ValueError(f"reduction {config.reduction} leaves a side width of {side}: one channel less its mean is zero, and nothing "
                             f"below it would learn. Take at most {width // 2}")
        if config.block == "attention" and side % config.heads:
            raise ValueError(f"{config.heads} heads do not divide the side width {side} = {width} / {config.reduction}: "
                             "change heads or reduction")
        self.side_config, self.config, self.causal, self.width = config, base.config, causal, width
        pooler = getattr(base, "pooler", None)
        self.backbone = freeze(base)
        if pooler is not None:  # it reads the final hidden state, which is ours, and belongs to the head
            base.pooler = None
        self.pooler = None if pooler is None else _thaw(pooler)
        depth, step = len(blocks), 1 if config.layers == "all" else config.layers
        self._blocks, self._heads = [blocks], heads  # in lists: they are the model's, not registered a second time
        self.taps = [0, *sorted(range(depth, 0, -step))]
        self.downs = nn.ModuleList(downsample(config.downsample, width, side, tap) for tap in self.taps)
        gates = {"none": Sum, "scalar": Gate, "vector": lambda: Gate(side)}
        self.gates = nn.ModuleList(gates[config.gate]() for _ in self.taps[1:])
        self.side_blocks = nn.ModuleList(SideBlock(side, config.block, config.heads, causal) for _ in self.taps[1:])
        self.up = nn.Linear(side, width, bias=False)
        if config.mix == "gated":
            self.mix = Mix(width)
        else:
            nn.init.zeros_(self.up.weight)
        first = next(base.parameters())
        for part in (self.downs, self.gates, self.side_blocks, self.up, getattr(self, "mix", None)):  # float32, or wider with the backbone
            if part is not None:
                part.to(first.device, torch.promote_types(first.dtype, torch.float32))
        if config.initial_weights == "magnitude":
            start_from_backbone(self.downs, self.side_blocks, [mlps[tap - 1] for tap in self.taps[1:]], width)

    @property
    def output_dtype(self) -> torch.dtype:
        """Of what the head reads."""
        return next(p.dtype for head in self._heads for p in head.parameters())

    @property
    def tapped_width(self) -> int:
        """Numbers of one tap that a cache holds a token: r after a frozen downsample, d before one that trains."""
        frozen = self.side_config.downsample in FROZEN_DOWNSAMPLES
        return self.width // self.side_config.reduction if frozen else self.width

    @property
    def cached_width(self) -> int:
        """Width of the ``inputs_embeds`` of a token whose features come from a cache, in bfloat16: the final state, whose float32 numbers
        lie in two each, and all taps."""
        return 2 * self.width + len(self.taps) * self.tapped_width

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
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and embeds.shape[-1] == self.cached_width:
            outputs, features = self._unpack(embeds)
        else:
            outputs, features = self._run_backbone(input_ids, attention_mask, **kwargs)
        state = self._climb(features, self._mask(attention_mask, outputs.last_hidden_state))
        hidden, change = outputs.last_hidden_state, self.up(normalise(state))
        hidden = hidden.to(torch.promote_types(hidden.dtype, self.output_dtype))
        mixed = self.mix(hidden, change) if self.side_config.mix == "gated" else hidden + change.to(hidden.dtype)
        changed = {"last_hidden_state": mixed.to(self.output_dtype)}
        if outputs.get("hidden_states"):  # the last of them is what the head reads
            changed["hidden_states"] = (*outputs.hidden_states[:-1], changed["last_hidden_state"])
        if self.pooler is not None:
            changed["pooler_output"] = self.pooler(changed["last_hidden_state"])
        return type(outputs)(**{**outputs, **changed})  # built anew: the heads read the entries by position

    def _unpack(self, embeds: Float[Tensor, "batch tokens cached"]) -> tuple:
        """What `_run_backbone` returns, from the features of a cache: views of the batch, not copies."""
        if embeds.dtype != torch.bfloat16:
            raise ValueError(f"cached features came as {embeds.dtype}: give inputs_embeds as cache_features made them, in bfloat16 (the final "
                             "state's float32 numbers lie in two each, which a conversion would destroy)")
        final, taps = embeds[..., :2 * self.width], embeds[..., 2 * self.width:]
        if embeds.shape[-1] % 2:  # float32 numbers begin at even places only
            final = final.contiguous()
        outputs = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=final.view(torch.float32))
        return outputs, dict(zip(self.taps, taps.split(self.tapped_width, -1)))

    def _run_backbone(self, input_ids, attention_mask, **kwargs) -> tuple:
        """The base module's outputs, and the tapped features: normalised, and downsampled where that is frozen."""
        features = {}
        handles = self._collect(features)
        try:
            with torch.no_grad():
                outputs = self.backbone(input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, features

    def cacheable_features(self, input_ids: Tensor, attention_mask: Tensor, **kwargs) -> tuple[
            Float[Tensor, "batch tokens taps tapped"], Float[Tensor, "batch tokens width"]]:
        """What the ladder reads of a batch, and the final hidden state that the head reads."""
        outputs, features = self._run_backbone(input_ids, attention_mask, **kwargs, **({"use_cache": False} if self.causal else {}))
        return torch.stack([features[tap] for tap in self.taps], 2), outputs.last_hidden_state

    def _collect(self, features: dict[int, Tensor]) -> list:
        """Hooks that keep the tapped features of this call."""
        blocks = self._blocks[0]
        frozen = self.side_config.downsample in FROZEN_DOWNSAMPLES

        def keep(tap: int, h: Tensor) -> None:
            wide = normalise(h.to(self.up.weight.dtype))
            # What a learned downsample reads stands until the backward pass: in the backbone's type, which may be bfloat16.
            features[tap] = self.downs[self.taps.index(tap)](wide) if frozen else wide.to(h.dtype)

        def keep_input(module, args, kwargs):
            keep(0, args[0] if args else kwargs["hidden_states"])

        def keeper(tap):
            def keep_output(module, args, output):
                keep(tap, output[0] if isinstance(output, tuple) else output)
            return keep_output

        return [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True),
                *(blocks[tap - 1].register_forward_hook(keeper(tap)) for tap in self.taps[1:])]

    def _climb(self, features: dict[int, Tensor], mask: Tensor | None) -> Float[Tensor, "batch tokens side"]:
        dtype, frozen = self.up.weight.dtype, self.side_config.downsample in FROZEN_DOWNSAMPLES
        z = [features.pop(tap).to(dtype) if frozen else down(features.pop(tap)) for tap, down in zip(self.taps, self.downs)]
        state = z[0]
        for new, gate, block in zip(z[1:], self.gates, self.side_blocks):
            state = gate(state, new)
            # Computed again in the backward pass: cheap at side width, and the ladder's activations would be most of the peak.
            state = checkpoint(block, state, mask, use_reentrant=False, preserve_rng_state=False, determinism_check="none") \
                if torch.is_grad_enabled() else block(state, mask)
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


@recorded
def attach_side_network(backbone: nn.Module, config: SideNetworkConfig = SideNetworkConfig()) -> nn.Module:
    """Puts a side network beside the model's backbone, in place: the same model comes back.

    Call signature and outputs stay those of the `transformers` model; only the side network and the head train.

    Args:
        backbone: a BERT, RoBERTa, DistilBERT, GPT-2, OPT or Llama (Mistral, Qwen2) type with a classification or language-model head. A head
            that is tied to the embeddings stays frozen.
        config: see `SideNetworkConfig`.

    Raises:
        ValueError: not such a model, it has a side network already, or the config does not fit its width.
    """
    if not isinstance(config, SideNetworkConfig):
        raise ValueError(f"config must be a SideNetworkConfig, got {type(config).__name__}: write SideNetworkConfig(reduction=8)")
    name = getattr(backbone, "base_model_prefix", "")
    if any("lora_" in key for key, _ in backbone.named_parameters()) or any(type(m).__name__ == "AdaptedLayer" for m in backbone.modules()):
        raise ValueError("this model has LoRA layers or adapters, which would get no gradient beside a side network: load the "
                         "backbone anew")
    if any(isinstance(m, SideNetwork) for m in backbone.modules()):
        raise ValueError("this model has a side network already: load the backbone anew to attach another")
    if any(".reversible" in type(module).__module__ for module in backbone.modules()):
        raise ValueError("this model is reversible, and a side network's backbone keeps no activations anyway: load the backbone anew")
    view = block_view(backbone)
    known = {p for part in (view.base, *view.heads.values()) for p in part.parameters()}
    if unknown := [key for key, p in backbone.named_parameters() if p not in known]:
        raise ValueError(f"{unknown[0]} lies beside the backbone and belongs to no head that is known here (a classifier or language-model "
                         f"head of a supported type): {type(backbone).__name__} cannot be prepared")
    family = backbone.config.model_type
    causal = family in ("gpt2", "opt", *LLAMA_TYPES) or bool(getattr(backbone.config, "is_decoder", False))
    # OPT's language model calls the decoder inside its base module, so the ladder goes there.
    owner, attribute = (view.base, "decoder") if family == "opt" else (backbone, name)
    side = SideNetwork(getattr(owner, attribute), view.blocks, view.mlps, list(view.heads.values()), view.width, config, causal)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    setattr(owner, attribute, side)
    for module in (side.downs, side.gates, side.side_blocks, side.up, getattr(side, "mix", None), side.pooler):
        if module is not None:
            module.requires_grad_(True)
    if causal and config.block == "attention":  # it keeps no cache of earlier tokens: generate() computes them again
        for settings in (backbone.config, getattr(backbone, "generation_config", None)):
            if settings is not None:
                settings.use_cache = False
    if not view.tied:
        for head, module in view.heads.items():
            module.to(side.up.weight.dtype).requires_grad_(True)  # a backbone in bfloat16 keeps its heads in float32
    return backbone
