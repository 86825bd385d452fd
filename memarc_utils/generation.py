"""Text generation by a fine-tuned causal language model: decoding, and the scores of data-to-text.

A prompt (a meaning representation) has several references. Decoded texts are scored against all references of their prompt by
BLEU, ROUGE-L and NIST, the model's probabilities by the perplexity of all references. ``python -m memarc_utils.grids e2e`` runs
what is missing of the recorded comparison on E2E and appends it to ``data/results/32_generation.csv``.
"""

import csv
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import datasets
import nltk.translate.nist_score as nist_score
import torch
from jaxtyping import Float
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from memarc_utils import adapters, training
from memarc_utils.accounting import PrivacyPlan
from memarc_utils.backbones import load_backbone, load_tokenizer
from memarc_utils.batch_selection import pad_rows
from memarc_utils.data import load_text_dataset, tokenize_dataset
from memarc_utils.experiments import hash_of_code, syntax_of, without_row
from memarc_utils.methods import METHODS as PREPARATIONS
from memarc_utils.recording import append_result
from memarc_utils.side_network import SideNetwork, SideNetworkConfig, attach_side_network
from memarc_utils.summary import RESULTS

TEMPLATE = "{text}\n"  # what `tokenize_dataset` makes a prompt with
_NIST_ORDER = 5


# ------------------------------------------------------------------------------------------------------- decoding
def prompts_and_references(dataset: datasets.Dataset, template: str = TEMPLATE) -> tuple[list[str], list[list[str]]]:
    """Each different text of a generation data set once, as a prompt, in the order of first appearance; and its targets.

    Raises:
        ValueError: the data has no `target`.

    >>> prompts_and_references(datasets.Dataset.from_dict({"text": ["a", "b", "a"], "target": ["A", "B", "aa"]}))
    (['a\\n', 'b\\n'], [['A', 'aa'], ['B']])
    """
    if not {"text", "target"} <= set(dataset.column_names):
        raise ValueError(f"generation needs the columns text and target, this data has {', '.join(dataset.column_names)}: take e2e")
    references: dict[str, list[str]] = {}
    for text, target in zip(dataset["text"], dataset["target"], strict=True):
        references.setdefault(template.format(text=text), []).append(target)
    return list(references), list(references.values())


def why_no_cache(model: nn.Module) -> str:
    """Why the model decodes without a cache of keys and values, in words; empty where it can use one.

    A reversible network calls each block once for the newest token, so the blocks' cache is as it was before. A side network of
    ``mlp`` or ``adapter`` blocks treats each token by itself and needs none of its own. With ``attention`` blocks it would need
    the keys of earlier tokens at side width, which it does not keep.
    """
    for module in model.modules():
        if isinstance(module, SideNetwork) and module.side_config.block == "attention":
            return "the attention of the side blocks keeps no keys and values of earlier tokens"
    return ""


@torch.no_grad()
def generate_texts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, num_beams: int = 1,
                   max_new_tokens: int = 64, batch_size: int = 16, use_cache: bool | None = None) -> list[str]:
    """Decodes a continuation of each prompt through `transformers`' ``generate``, without sampling.

    Prompts are padded on the left under a mask, so that each continues at its own last token: the text is the same as alone.

    Args:
        model: a causal language model, prepared or not.
        tokenizer: its tokenizer; ends a text with its ``eos_token``.
        prompts: texts, with the line break or whatever else parted prompt and target in training.
        num_beams: 1 is greedy: the likeliest token each time. More keeps so many likeliest beginnings, and takes the text whose
            log probability divided by its length is highest.
        max_new_tokens: longer texts are cut.
        batch_size: prompts at once.
        use_cache: of keys and values; None takes it where the model can (see `why_no_cache`).

    Returns:
        The new text of each prompt, in the order of the prompts: no special tokens, runs of white space made one space.

    Raises:
        ValueError: an argument that does not fit, found before anything is decoded.
    """
    rows = _prompt_ids(tokenizer, prompts)
    _check_decoding(model, rows, num_beams, max_new_tokens, batch_size, use_cache)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, use_cache=not why_no_cache(model) if use_cache is None else use_cache)
    device, was_training = next(model.parameters()).device, model.training
    order, texts = sorted(range(len(rows)), key=lambda i: len(rows[i])), [""] * len(rows)
    model.eval()
    try:
        for start in training.progress(range(0, len(order), batch_size), "decoding"):
            some = order[start:start + batch_size]
            batch = training.to_device(_padded_left([rows[i] for i in some], tokenizer.pad_token_id), device)
            found = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1]:]
            for i, text in zip(some, tokenizer.batch_decode(found, skip_special_tokens=True)):
                texts[i] = " ".join(text.split())
    finally:
        model.train(was_training)
    return texts


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens that `tokenize_dataset` puts before a target."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError("prompts must be a list of texts, none of them empty; for a single one write [prompt]")
    if getattr(tokenizer, "eos_token_id", None) is None or tokenizer.pad_token_id is None:
        raise ValueError("decoding needs a tokenizer with an end-of-text and a padding token: take load_tokenizer's of the decoder")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
    return [begin + ids for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]


def _check_decoding(model: nn.Module, rows: list[list[int]], num_beams: int, max_new_tokens: int, batch_size: int,
                    use_cache: bool | None) -> None:
    for name, value in (("num_beams", num_beams), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if getattr(model, "can_generate", lambda: False)() is not True:
        raise ValueError(f"a {type(model).__name__} generates no text: load a decoder with task='causal_lm'")
    if use_cache and (reason := why_no_cache(model)):
        raise ValueError(f"this model cannot use a cache: {reason}. Leave use_cache at None")
    longest, limit = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(f"the longest prompt has {longest} tokens; with max_new_tokens={max_new_tokens} that is more than the "
                         f"{limit} positions of the model: take at most {limit - longest}, or drop the longest prompts")
    vocabulary, largest = model.get_input_embeddings().num_embeddings, max(map(max, rows))
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer gives token {largest}, the model knows {vocabulary}: take the model's own tokenizer")


def _padded_left(rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {"input_ids": torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])}


# --------------------------------------------------------------------------------------------------------- scores
def _check_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(texts, str) or not texts or len(texts) != len(references):
        raise ValueError(f"texts and references must be lists of one length, at least 1; got {len(texts)} and {len(references)}")
    for i, (text, some) in enumerate(zip(texts, references)):
        if not isinstance(text, str):
            raise ValueError(f"texts[{i}] must be a text, got {type(text).__name__}")
        if isinstance(some, str) or not some or not all(isinstance(one, str) and one.strip() for one in some):
            raise ValueError(f"references[{i}] must be a list of texts, at least one and none empty, got {some!r}")


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 100] by sacrebleu (Post 2018, arXiv 1804.08771): tokenisation 13a, case kept, exponential smoothing.

    ``BP · exp(¼ Σ_n log p_n)``: p_n counts an n-gram at most as often as the one reference that has it most often; the brevity
    penalty BP compares with the reference of the nearest length. Texts may have different numbers of references.

    >>> round(bleu(["the cat sat on a mat"], [["the cat sat on the mat"]]), 2)
    53.73
    """
    _check_texts(texts, references)
    most = max(map(len, references))
    streams = [[some[k] if k < len(some) else None for some in references] for k in range(most)]
    return BLEU().corpus_score(list(texts), streams).score


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over texts of the best ROUGE-L F1 over the references, in [0, 100] (Lin 2004): lower case, no stemming.

    With the longest common subsequence of length l, precision l / |text|, recall l / |reference|; F1 is their harmonic mean.

    >>> round(rouge_l(["the cat sat"], [["a dog", "the cat slept"]]), 2)
    66.67
    """
    _check_texts(texts, references)
    scorer = RougeScorer(["rougeL"])
    return 100 * sum(scorer.score_multi(list(some), text)["rougeL"].fmeasure for text, some in zip(texts, references)) / len(texts)


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus NIST-5 (Doddington 2002) by nltk: n-grams weighted by how rare they are in the references. Unbounded above, so only
    texts against the same references can be compared.

    nltk takes the best single reference for each order, mteval the union of all: numbers differ a little from that script's.

    Tokenisation 13a, as in `bleu`. An order that is longer than every text counts 0.
    """
    _check_texts(texts, references)
    tokenize = Tokenizer13a()
    hypotheses = [tokenize(text).split() for text in texts]
    order = min(_NIST_ORDER, max(map(len, hypotheses)))  # nltk divides by zero at an order that no text has
    if order == 0:
        return 0.0
    return float(nist_score.corpus_nist([[tokenize(one).split() for one in some] for some in references], hypotheses, order))


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[dict], batch_size: int = 16, pad_token_id: int = 0) -> float:
    """``exp(Σ_i Σ_t −log p(y_it) / Σ_i n_i)`` over the target tokens of all rows, n_i of them in row i, end of text included.

    Every token weighs the same, so long references count more than short ones. The prompt is no target.

    Args:
        model: a causal language model.
        rows: of `tokenize_dataset`, one for each reference: ``input_ids`` and ``labels``, -100 where no target stands.
        batch_size: rows at once.
        pad_token_id: for padding on the right, under a mask.

    Raises:
        ValueError: no rows, a row without a target, or a batch size below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
    if not len(rows):
        raise ValueError("there are no rows to take the perplexity of")
    rows = sorted((dict(row) for row in rows), key=lambda row: len(row["input_ids"]))
    for row in rows:
        if "labels" not in row or isinstance(row["labels"], int) or all(label == -100 for label in row["labels"][1:]):
            raise ValueError("a row has no target token: take the rows of tokenize_dataset on data with a target, with a max_length "
                             "that leaves room for it")
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for start in training.progress(range(0, len(rows), batch_size), "perplexity"):
            batch = training.to_device(pad_rows(rows[start:start + batch_size], pad_token_id), device)
            tokens = (batch["labels"][:, 1:] != -100).sum(1)
            total += float((training.causal_lm_losses(model, batch).double() * tokens).sum())
            count += int(tokens.sum())
    finally:
        model.train(was_training)
    return math.exp(total / count)


def scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``bleu``, ``rouge_l`` and ``nist`` of the same texts."""
    return {"bleu": bleu(texts, references), "rouge_l": rouge_l(texts, references), "nist": nist(texts, references)}


# ----------------------------------------------------------------------------------------------- recorded comparison
# How a method prepares the model, and its AdamW rates: of most parameters, and of those that start at zero. They are those of private
# classification, but for the side network's, at whose 4e-2 the noise of a small batch ruined the model: of four pairs tried (and three
# other side networks) these had the lowest perplexity on 96 validation rows, at T = 12. Its mlp blocks let decoding keep its cache.
METHODS: dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[float, float]]] = {
    "side": (functools.partial(attach_side_network, config=SideNetworkConfig(block="mlp", layers=5)), (5e-3, 1e-2)),
    "lora": (PREPARATIONS["lora"], (1e-3, 5e-3)),
    "rev-lora": (PREPARATIONS["rev-lora"], (1e-3, 5e-3)),
    "bitfit": (PREPARATIONS["bitfit with added biases"], (1e-2, 1e-2)),
}
UNTRAINED = "untrained"
TABLE = RESULTS / "32_generation.csv"
_SCORED_BY = ("backbones", "batch_selection", "data", "padding", "training")  # what the scores of any model rest on
_CODE = ("side_network", "side_blocks", "couplings", "reversal", "reversible")  # beside the engine
_OF_THIS_MODULE = ("TEMPLATE", "_NIST_ORDER", "prompts_and_references", "why_no_cache", "generate_texts", "_prompt_ids", "_padded_left",
                   "execute", "_scores_on_e2e", "scores", "bleu", "rouge_l", "nist", "perplexity")
_UNITS = {"bleu": "points", "rouge_l": "points", "nist": "", "beam_bleu": "points", "beam_rouge_l": "points", "beam_nist": "",
          "perplexity": ""}  # in the order of the rows; the last one marks a finished run


@dataclass(frozen=True)
class Run:
    """One recorded training and its scores on E2E's test split.

    Attributes:
        method: a key of `METHODS`, or ``untrained``: the pre-trained model as it is, for reference.
        seed: of the preparation, the sampling and the noise (a release draws the last two from the system).
        epsilon: target at δ = 1/(10 N).
        num_steps: T.
        batch_size: expected batch size.
        model: a decoder that `load_backbone` knows.
        max_tokens: of prompt and target.
        num_prompts: meaning representations that are decoded greedily, drawn once for all runs; perplexity takes all references of them.
        num_beam_prompts: the first so many of them are decoded with 4 beams as well.
        autocast: trains in bfloat16 where autocast does; scores are always computed in float32.
    """

    method: str
    seed: int = 0
    epsilon: float = 8.0
    num_steps: int = 20
    batch_size: int = 128
    model: str = "default-decoder"
    max_tokens: int = 112
    num_prompts: int = 50
    num_beam_prompts: int = 20
    autocast: bool = True

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, UNTRAINED):
            raise ValueError(f"method must be one of {', '.join((*METHODS, UNTRAINED))}, got {self.method!r}")
        for name, kind in (("epsilon", (int, float)), ("num_steps", int), ("batch_size", int), ("max_tokens", int)):
            if not isinstance(getattr(self, name), kind) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite {'whole ' if kind is int else ''}number above 0, got {getattr(self, name)!r}")
        if not 1 <= self.num_beam_prompts <= self.num_prompts:
            raise ValueError(f"num_beam_prompts must be between 1 and num_prompts={self.num_prompts}, got {self.num_beam_prompts}")

    def settings(self) -> dict:
        """What tells this run from others in the table."""
        scored = syntax_of("generation", _OF_THIS_MODULE)
        if self.method == UNTRAINED:
            shown = {name: getattr(self, name) for name in ("model", "max_tokens", "num_prompts", "num_beam_prompts")}
            return {**shown, "beams": 4, "code": hash_of_code(_SCORED_BY, scored, trained=False)}
        prepare, rates = METHODS[self.method]
        code = hash_of_code(_CODE, scored + repr(getattr(prepare, "keywords", None)))
        rest = {name: value for name, value in asdict(self).items() if name not in ("method", "seed", "epsilon")}
        return {**rest, "target_epsilon": self.epsilon, "rates": list(rates), "clipping": "automatic", "optimizer": "adamw",
                "beams": 4, "code": code}

    def is_of(self, settings: dict) -> bool:
        """Whether a row with these settings is of this run, code and seed aside."""
        return all(settings.get(name) == value for name, value in self.settings().items() if name != "code")


# What is asked first comes first: an interrupted list has answered something.
RUNS = [Run(UNTRAINED), Run("side"), Run("lora"), *(Run(method, seed) for seed in (1, 2) for method in ("side", "lora")),
        *(Run(method, seed) for seed in range(3) for method in ("rev-lora", "bitfit"))]


def finished(run: Run) -> bool:
    """Whether the run's last row is in the table.

    Raises:
        ValueError: the table has rows of the same setting that other code made, or code that was not noted.
    """
    if not TABLE.exists():
        return False
    wanted, found = run.settings(), False
    with open(TABLE, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] == run.method and run.is_of(have := json.loads(row["settings"])):
                if have.get("code") != wanted["code"]:
                    raise ValueError(f"{TABLE.name} has rows of {run.method} that other code made ({have.get('code', 'not noted')}, now "
                                     f"{wanted['code']}): move them away, or check out the code that made them (commit {row['commit']})")
                found = found or (row["seed"] == str(run.seed) and row["metric"] == list(_UNITS)[-1])
    return found


def execute(run: Run) -> None:
    """Trains privately, decodes and scores; appends one row a metric to ``data/results/32_generation.csv``."""
    tokenizer, device = load_tokenizer(run.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.seed)
    model = load_backbone(run.model, task="causal_lm").to(device)
    row = dict.fromkeys(("delta", "accountant", "noise_multiplier", "sample_rate", "num_steps", "max_grad_norm", "trainable_share"))
    row |= {"num_train": 0, "epsilon": 0.0}  # the untrained model has seen none of the data
    if run.method != UNTRAINED:
        train = tokenize_dataset(load_text_dataset("e2e", "train"), tokenizer, run.max_tokens)
        prepare, rates = METHODS[run.method]
        model = prepare(model).to(device)
        plan = PrivacyPlan.from_epsilon(
            target_epsilon=run.epsilon, delta=1 / (10 * len(train)), dataset_size=len(train), num_steps=run.num_steps,
            expected_batch_size=run.batch_size, max_grad_norm=1.0)
        sampling, noise = (torch.Generator(place).manual_seed(1000 + run.seed) for place in ("cpu", device))
        optimizer = torch.optim.AdamW(training.parameter_groups(model, *rates), weight_decay=0.0)

        def losses(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " batch"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=run.autocast):
                return training.causal_lm_losses(model, batch)

        training.train_privately(model, train, plan, optimizer, losses, physical_batch_size=16, sampling_generator=sampling,
                                 noise_generator=noise, description=run.method)
        row |= {"num_train": len(train), "epsilon": plan.epsilon(), "delta": plan.delta, "accountant": "pld",
                "noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate, "num_steps": plan.num_steps,
                "max_grad_norm": plan.max_grad_norm, "trainable_share": adapters.trainable_share(model)[2]}
    found = _scores_on_e2e(run, model, tokenizer)
    for metric, unit in _UNITS.items():
        append_result(TABLE, experiment="32_generation", method=run.method, model=run.model, dataset="e2e", seed=run.seed, metric=metric,
                      value=found[metric], unit=unit, settings=run.settings(), **row)


def _scores_on_e2e(run: Run, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    test = load_text_dataset("e2e", "test")
    chosen = set(random.Random(0).sample(sorted(set(test["text"])), run.num_prompts))
    test = test.select([i for i, text in enumerate(test["text"]) if text in chosen])
    prompts, references = prompts_and_references(test)
    few = run.num_beam_prompts
    beam = scores(generate_texts(model, tokenizer, prompts[:few], num_beams=4), references[:few])
    rows = tokenize_dataset(test, tokenizer, 2 * run.max_tokens).to_list()  # whole references
    return {**scores(generate_texts(model, tokenizer, prompts), references), **{f"beam_{name}": value for name, value in beam.items()},
            "perplexity": perplexity(model, rows, pad_token_id=tokenizer.pad_token_id)}


def run_missing(shard: tuple[int, int] = (0, 1)) -> int:
    """Runs what has no row yet of `RUNS`, or of every n-th of them from the i-th; returns how many ran.

    Raises:
        ValueError: see `finished`; found before anything runs.
    """
    ran = 0
    for run in without_row(RUNS, finished, shard, "runs"):
        execute(run)
        ran += 1
    return ran
