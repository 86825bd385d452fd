"""`generation`: decoding against a loop of argmax, one text at a time; scores by hand and by other routes; runs that go on."""

import csv
import functools
import itertools
import math
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memarc_utils import generation
from memarc_utils.adapters import add_bottleneck_adapters, add_lora, select_bias_terms
from memarc_utils.backbones import load_tokenizer, tiny_backbone
from memarc_utils.couplings import ReversibleConfig
from memarc_utils.data import tokenize_dataset
from memarc_utils.experiments import syntax_of
from memarc_utils.generation import (METHODS, UNTRAINED, Run, bleu, execute, finished, generate_texts, nist, perplexity,
                                     prompts_and_references, rouge_l, scores, why_no_cache)
from memarc_utils.reversible import make_reversible
from memarc_utils.saving import load_trainable, save_trainable
from memarc_utils.side_network import SideNetworkConfig, attach_side_network

WORDS = ["<pad>", "<unk>", "<eos>", *(f"w{i}" for i in range(3, 31))]  # ids as in tiny_backbone: 0 pads, 2 ends
PROMPTS = ["w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w3", "w20 w3 w20 w5"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def side(block):
    return lambda model: attach_side_network(model, SideNetworkConfig(reduction=2, block=block))


def reversible(kind):
    config = ReversibleConfig(kind, segment=None if kind in ("bdia", "lossless") else 1)
    return lambda model: make_reversible(add_lora(model, rank=2), config)


PREPARED = {"plain": lambda model: model, "lora": add_lora, "adapters": add_bottleneck_adapters,
            "bitfit": lambda model: select_bias_terms(model, add_missing=True),
            **{f"side {block}": side(block) for block in ("mlp", "attention", "adapter")},
            **{kind: reversible(kind) for kind in ("lossless", "bdia", "meft1", "meft2", "meft3", "midpoint")}}


def prepared(family="llama", kind="plain", seed=0):
    """A model whose every parameter was moved, so that what was added shows in its texts."""
    torch.manual_seed(seed)
    model = PREPARED[kind](tiny_backbone(family, "causal_lm", vocab_size=len(WORDS), layers=3, tie=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        model.get_output_embeddings().weight[2] *= 0.3  # the end is not the likeliest word at once
    return model


@torch.no_grad()
def greedy_naive(model, tokenizer, prompt, steps):
    """The likeliest token each time, the whole text through the model again, no padding, no cache."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(steps):
        new = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].argmax()
        if new == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, new.view(1, 1)], 1)
    return " ".join(WORDS[i] for i in ids[0, start:] if i > 1)  # neither padding nor unknown words are shown


@pytest.mark.parametrize(("family", "kind"), [
    *(("llama", kind) for kind in PREPARED),
    *((family, kind) for family in ("gpt2", "opt") for kind in ("plain", "side mlp", "side attention", "lossless", "meft3"))])
def test_greedy_texts_are_those_of_an_argmax_loop(family, kind, tokenizer):
    model = prepared(family, kind)
    want = [greedy_naive(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(want)) > 1
    for use_cache, batch_size in ((None, 4), (False, 4), (None, 3), (None, 1)):  # with a cache where there is one, and without
        got = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size, use_cache=use_cache)
        assert got == want, (use_cache, batch_size)


@pytest.mark.parametrize("kind", ["plain", "side mlp", "side attention", "lossless", "meft1"])
def test_beams_in_a_batch_are_those_of_one_text_alone(kind, tokenizer):
    model = prepared("llama", kind)
    together = generate_texts(model, tokenizer, PROMPTS, num_beams=3, max_new_tokens=6)
    assert together == [generate_texts(model, tokenizer, [prompt], num_beams=3, max_new_tokens=6)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("fault", ["padded on the right", "padding is not masked"])
def test_wrong_padding_would_be_seen(fault, tokenizer, monkeypatch):
    model, padded_left = prepared(), generation._padded_left
    want = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8)

    def padded_wrongly(rows, pad):
        batch = padded_left(rows, pad)
        if fault == "padded on the right":
            return {name: torch.stack([row.roll(len(ids)) for row, ids in zip(t, rows)]) for name, t in batch.items()}
        return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}

    monkeypatch.setattr(generation, "_padded_left", padded_wrongly)
    assert generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8) != want


@torch.no_grad()
def test_as_many_beams_as_words_find_the_best_of_all_texts(tokenizer):
    """Two tokens, or the end after none or one: log probability over length, end of text included."""
    for seed in range(4):
        model, found = prepared(seed=seed), {}
        prompt = tokenizer(PROMPTS[0]).input_ids
        first = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        second = model(torch.tensor([[*prompt, word] for word in range(len(WORDS))])).logits[:, -1].log_softmax(-1)
        for a, b in itertools.product(range(len(WORDS)), repeat=2):
            found[(2,) if a == 2 else (a, b)] = float(first[a] if a == 2 else (first[a] + second[a, b]) / 2)
        best = max(found, key=found.get)
        got = generate_texts(model, tokenizer, PROMPTS[:1], num_beams=len(WORDS), max_new_tokens=2)[0]
        assert got == " ".join(WORDS[i] for i in best if i > 2)


@pytest.mark.parametrize("kind", PREPARED)
def test_a_cache_is_taken_where_there_is_one(kind, tokenizer):
    model, seen = prepared("llama", kind), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    generate_texts(model, tokenizer, [PROMPTS[0]], max_new_tokens=4)
    assert (kind == "side attention") == bool(why_no_cache(model))
    assert seen[0] == 7 and len(seen) > 2 and set(seen[1:]) == ({1} if not why_no_cache(model) else set(range(8, 7 + len(seen))))
    if why_no_cache(model):
        with pytest.raises(ValueError, match="keeps no keys and values"):
            generate_texts(model, tokenizer, PROMPTS, max_new_tokens=4, use_cache=True)


def test_a_text_ends_at_its_end_and_the_mode_comes_back(tokenizer):
    model = prepared()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1e-3 * torch.ones(32)  # the sign of one sum decides between 0 and the end
    model.train()
    texts = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=5)
    assert texts == [""] * 4 and model.training and tokenizer.padding_side == "right"


def data():
    return datasets.Dataset.from_dict({
        "text": ["w3 w4", "w5", "w3 w4", "w6 w7 w8"], "target": ["w9 w10 w11", "w12", "w13", "w14 w15 w16 w17 w18 w19"]})


def test_prompts_are_what_stands_before_a_target_in_training(tokenizer):
    prompts, references = prompts_and_references(data())
    assert prompts == ["w3 w4\n", "w5\n", "w6 w7 w8\n"] and references[0] == ["w9 w10 w11", "w13"]
    real = load_tokenizer("default-decoder")
    restaurants = datasets.Dataset.from_dict({"text": ["name[Café Rouge], priceRange[£20-25]"], "target": ["Café Rouge is dear."]})
    for reader, rows in ((tokenizer, data()), (real, restaurants)):
        row = tokenize_dataset(rows, reader, 64)[0]
        masked = [i for i, label in zip(row["input_ids"], row["labels"]) if label == -100]
        assert generation._prompt_ids(reader, prompts_and_references(rows)[0])[0] == masked


# ------------------------------------------------------------------------------------------------------------ perplexity
@pytest.mark.parametrize("kind", ["plain", "side mlp", "side attention", "lossless"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_perplexity_by_the_models_own_loss_one_text_at_a_time(family, kind, tokenizer):
    model, rows = prepared(family, kind), tokenize_dataset(data(), tokenizer, 64).to_list()
    total = count = 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        n = int((labels[:, 1:] != -100).sum())  # 4, 2, 2 and 7 with the end of text
        total += n * float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, use_cache=False).loss)
        count += n
    assert count == 15
    for batch_size in (1, 3, 4):
        assert perplexity(model, rows, batch_size) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_perplexity_weighs_tokens_and_not_texts(tokenizer):
    model, rows = prepared(), tokenize_dataset(data(), tokenizer, 64).to_list()
    each = [math.log(perplexity(model, [row])) for row in rows]
    mean_over_tokens = sum(n * loss for n, loss in zip((4, 2, 2, 7), each)) / 15
    assert math.log(perplexity(model, rows)) == pytest.approx(mean_over_tokens, rel=1e-5)
    assert abs(mean_over_tokens - sum(each) / 4) > 1e-3


# ---------------------------------------------------------------------------------------------------------------- scores
def test_bleu_by_hand():
    one = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx(100 * one)
    assert bleu(["a b c d e"], [["a b c d f", "x b c d e"]]) == pytest.approx(100)  # each n-gram in one of the two
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert bleu(["a b c d"], [["a b c d e", "a b c d x y z z"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))  # the nearest length
    # two texts, two references and one: counts are added up over the corpus before they are divided
    pooled = ((5 + 4) / 9 * (4 + 3) / 7 * (3 + 2) / 5 * (2 + 1) / 3) ** (1 / 4) * 100
    assert bleu(["a b c d e", "k l m n"], [["a b c d f", "x b c d e"], ["k l m n"]]) == pytest.approx(pooled)
    half = ((4 + 4) / 9 * (3 + 3) / 7 * (2 + 2) / 5 * (1 + 1) / 3) ** (1 / 4)
    assert bleu(["a b c d e", "k l m n"], [["a b c d f"], ["k l m n", "q"]]) == pytest.approx(100 * half)


def rouge_l_naive(text, reference):
    """F1 of the longest common subsequence, by its recursion."""
    a, b = text.lower().split(), reference.lower().split()
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        length[i + 1][j + 1] = length[i][j] + 1 if a[i] == b[j] else max(length[i][j + 1], length[i + 1][j])
    return 2 * length[-1][-1] / (len(a) + len(b))


def test_rouge_l_by_its_recursion():
    texts = ["The Mill is a cheap pub near the river", "a b c a b d"]
    references = [["near the river is a pub The Mill", "The Mill is a very cheap pub"], ["b a c b d", "c", "d d d"]]
    want = [max(rouge_l_naive(text, one) for one in some) for text, some in zip(texts, references)]
    assert rouge_l(texts, references) == pytest.approx(100 * sum(want) / 2)
    assert want[0] != rouge_l_naive(texts[0], references[0][0])  # the best one is not the first


def test_nist_by_hand():
    # words a, b, c, d once each of four: log2 4 each; bigrams follow their first word always: nothing new in them
    assert nist(["a b c d"], [["a b c d"]]) == pytest.approx(2.0)
    # a twice of four words: log2 2, b and c log2 4; ab and ac: log2 (2/1) each, ba: log2 (1/1)
    assert nist(["a b a c"], [["a b a c"]]) == pytest.approx((1 + 2 + 1 + 2) / 4 + (1 + 0 + 1) / 3)
    short = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(2 / 3) ** 2)  # two thirds of the length: one half
    assert short == pytest.approx(0.5)
    assert nist(["a b"], [["a b c"]]) == pytest.approx(math.log2(3) * short)
    assert nist([""], [["a b"]]) == 0 and nist(["x"], [["a b"]]) == 0


def test_scores_keep_pounds_and_accents_and_rank():
    references = [["Café Rouge costs £20-25 by the river."], ["The Mill is cheap and near the Crown."]]
    right = [some[0] for some in references]
    wrong = scores(["Cafe Rouge costs 20 euros.", "It is."], references)
    best = scores(right, references)
    assert best["bleu"] == pytest.approx(100) and best["rouge_l"] == pytest.approx(100)
    assert all(wrong[name] < best[name] for name in best)


# ------------------------------------------------------------------------------------------------------------- bad input
def refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_arguments_are_refused(tokenizer):
    model, rows = prepared(), tokenize_dataset(data(), tokenizer, 64).to_list()
    for prompts in ([], ["w3", ""]):
        refused(lambda: generate_texts(model, tokenizer, prompts), "none of them empty")
    refused(lambda: generate_texts(model, tokenizer, "w3"), r"write \[prompt\]")
    for name in ("num_beams", "max_new_tokens", "batch_size"):
        refused(lambda: generate_texts(model, tokenizer, PROMPTS, **{name: 0}), f"{name} must be a whole number >= 1, got 0")
    refused(lambda: generate_texts(model, tokenizer, PROMPTS, max_new_tokens=58), "take at most 57")
    encoder = tiny_backbone("bert")
    refused(lambda: generate_texts(encoder, tokenizer, PROMPTS), "generates no text")
    refused(lambda: generate_texts(model, load_tokenizer("default-decoder"), ["near the river"], max_new_tokens=4), "own tokenizer")
    refused(lambda: prompts_and_references(data().remove_columns("target")), "columns text and target, this data has text")
    refused(lambda: perplexity(model, []), "no rows")
    refused(lambda: perplexity(model, rows, 0), "batch_size")
    refused(lambda: perplexity(model, [{**rows[0], "labels": [-100] * len(rows[0]["labels"])}]), "no target token")
    refused(lambda: perplexity(model, [{"input_ids": [3, 4]}]), "no target token")
    for score in (bleu, rouge_l, nist):
        refused(lambda: score([], []), "at least 1; got 0 and 0")
        refused(lambda: score(["a"], [["a"], ["b"]]), "got 1 and 2")
        refused(lambda: score(["a"], ["a"]), r"references\[0\] must be a list of texts")
        refused(lambda: score(["a", "b"], [["a"], ["b", " "]]), r"references\[1\]")


# ------------------------------------------------------------------------------------------------------------ saved, runs
@pytest.mark.parametrize("kind", ["lora", "side mlp", "lossless", "bitfit"])
def test_a_saved_model_writes_the_same_texts(kind, tokenizer, tmp_path):
    torch.manual_seed(3)
    model = PREPARED[kind](tiny_backbone("llama", "causal_lm", vocab_size=len(WORDS), layers=3, tie=False))
    start = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn_like(parameter)
    want = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=8)
    torch.manual_seed(3)
    fresh = tiny_backbone("llama", "causal_lm", vocab_size=len(WORDS), layers=3, tie=False)
    loaded = load_trainable(fresh, save_trainable(model, tmp_path))
    assert generate_texts(loaded, tokenizer, PROMPTS, max_new_tokens=8) == want != start


@pytest.fixture
def small_runs(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(generation, "TABLE", tmp_path / "runs.csv")
    monkeypatch.setattr(generation, "load_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(generation, "load_backbone", lambda name, task: tiny_backbone(
        "llama", task, vocab_size=len(WORDS), hidden=64, layers=5, tie=True))
    monkeypatch.setattr(generation, "load_text_dataset", lambda name, split: data())
    return tmp_path / "runs.csv"


def run(method, seed=0, **settings):
    return Run(method, seed, num_steps=2, batch_size=2, max_tokens=16, num_prompts=2, num_beam_prompts=1, **settings)


def test_runs_go_on_where_they_stopped(small_runs, monkeypatch):
    runs = [run(UNTRAINED), run("side"), run("lora")]
    monkeypatch.setattr(generation, "RUNS", runs)
    monkeypatch.setattr(generation, "generate_texts", lambda model, tokenizer, prompts, **settings: ["w9 w10"] * len(prompts))
    execute(runs[1])
    assert [finished(one) for one in runs] == [False, True, False]
    first = small_runs.read_text()
    assert generation.run_missing((0, 3)) == 1 and generation.run_missing((1, 3)) == 0
    assert generation.run_missing() == 1 and generation.run_missing() == 0
    assert small_runs.read_text().startswith(first)
    with open(small_runs, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * 3 and {row["method"] for row in rows} == {UNTRAINED, "side", "lora"}
    assert {row["metric"] for row in rows[:7]} == {"bleu", "rouge_l", "nist", "beam_bleu", "beam_rouge_l", "beam_nist", "perplexity"}
    assert all(float(row["epsilon"]) == 0 if row["method"] == UNTRAINED else 7.9 < float(row["epsilon"]) <= 8 for row in rows)
    assert not finished(run("side", 1)) and not finished(run("side", epsilon=3.0))


def test_rows_of_other_code_are_kept_apart(small_runs, monkeypatch):
    monkeypatch.setattr(generation, "generate_texts", lambda model, tokenizer, prompts, **settings: ["w9 w10"] * len(prompts))
    one = run("side")
    execute(one)
    code = one.settings()["code"]
    small_runs.write_text(small_runs.read_text().replace(code, "0123456789ab"))
    refused(lambda: finished(run("side", 1)), f"rows of side that other code made .0123456789ab, now {code}.")
    small_runs.write_text(small_runs.read_text().replace('""code"": ""0123456789ab"", ', ""))
    refused(lambda: finished(one), "rows of side that other code made .not noted")


def test_the_code_of_a_run_is_its_own(monkeypatch):
    """Its side network and what decodes and scores are in it; another method's rates are not; a name that is gone is told."""
    before = {method: Run(method).settings()["code"] for method in ("side", "lora", UNTRAINED)}
    assert len(set(before.values())) == 3
    wider = functools.partial(attach_side_network, config=SideNetworkConfig(block="mlp", layers=3))
    monkeypatch.setitem(METHODS, "side", (wider, (1.0, 1.0)))
    assert [Run(method).settings()["code"] == code for method, code in before.items()] == [False, True, True]
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read(path, **how).replace("_NIST_ORDER = 5", "_NIST_ORDER = 4"))
    syntax_of.cache_clear()
    changed = Run("lora").settings()["code"]
    monkeypatch.undo()
    syntax_of.cache_clear()
    assert changed != before["lora"] == Run("lora").settings()["code"]
    refused(lambda: syntax_of("generation", ("rouge_2",)), "generation.py defines no rouge_2")


@pytest.mark.parametrize("method", METHODS)
def test_methods_fit_a_llama_and_keep_a_cache(method):
    prepare, rates = METHODS[method]
    model = prepare(tiny_backbone("llama", "causal_lm", hidden=64, layers=10, tie=True))
    assert not why_no_cache(model) and any(p.requires_grad for p in model.parameters()) and len(rates) == 2


def test_runs_are_checked():
    refused(lambda: Run("loar"), "method must be one of side, lora")
    refused(lambda: Run("lora", epsilon=-1.0), "epsilon must be a finite number above 0")
    refused(lambda: Run("lora", num_steps=0), "num_steps must be a finite whole number above 0")
    refused(lambda: Run("lora", num_prompts=3, num_beam_prompts=4), "num_beam_prompts must be between 1 and num_prompts=3")
