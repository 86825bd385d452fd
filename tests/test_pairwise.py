"""`verify_sensitivity` over modes × bookkeeping × clippings × architectures × what trains × checkpointing, pairwise."""

import itertools

import pytest
from peft import LoraConfig, inject_adapter_in_model

from memarc_utils.adapters import add_lora, select_bias_terms
from memarc_utils.book_keeping import BOOKKEEPINGS
from memarc_utils.clipping import CLIPPINGS
from memarc_utils.dp_sgd import verify_sensitivity
from memarc_utils.grad_sample import MODES
from tests.models import padded_batch, plain_losses, shake, t5, tiny

ARCHITECTURES = {"bert": ("bert", "classification", None), "roberta": ("roberta", "classification", None),
                 "distilbert": ("distilbert", "classification", None), "gpt2-tied": ("gpt2", "causal_lm", True),
                 "gpt2-untied": ("gpt2", "causal_lm", False), "opt": ("opt", "causal_lm", True),
                 "llama": ("llama", "causal_lm", False), "t5": ("t5", "classification", None)}
FACTORS = {"architecture": list(ARCHITECTURES), "trains": ["all", "lora", "biases"],
           "checkpointing": ["none", "non-reentrant", "reentrant"], "clipping": list(CLIPPINGS), "mode": list(MODES),
           "bookkeeping": list(BOOKKEEPINGS)}


def pairwise(factors):
    """Cases in which every pair of values of two factors occurs, chosen greedily: the case with most new pairs next."""
    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    every_case = list(itertools.product(*factors.values()))
    missing, chosen = set().union(*(pairs(case) for case in every_case)), []
    while missing:
        chosen.append(max(every_case, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


PAIRWISE = pairwise(FACTORS)


def prepared(architecture, trains):
    family, task, tie = ARCHITECTURES[architecture]
    if family == "t5":
        model = t5()
        if trains == "lora":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["q", "v"]), model)
            model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains == "all" or "head" in name or (trains == "lora" and "lora_" in name)
                                     or (trains == "biases" and "bias" in name))  # the table of relative positions
        return shake(model), task
    model = tiny(family, task, tie, hidden=16, layers=2)
    if trains == "lora":
        add_lora(model, rank=2)
    elif trains == "biases":
        select_bias_terms(model, add_missing=family == "llama")
    return shake(model), task


def checkpointed(model, how):
    inner = getattr(model, "encoder", model)  # our T5 classifier is no transformers model, its encoder is
    if how != "none":
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": how == "reentrant"})
    if how == "reentrant":
        inner.enable_input_require_grads()
    return model


def test_every_pair_occurs():
    for (i, first), (k, second) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(case[i], case[k]) for case in PAIRWISE} == set(itertools.product(first, second))
    assert len(PAIRWISE) <= 32


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", PAIRWISE, ids="-".join)
def test_one_example_moves_the_sum_by_at_most_c(case):
    architecture, trains, checkpointing, clipping, mode, bookkeeping = case
    model, task = prepared(architecture, trains)
    checkpointed(model, checkpointing)
    for batch in (3, 1):
        report = verify_sensitivity(model, plain_losses, padded_batch(model, task, batch=batch, tokens=6), 0.01, mode=mode,
                                    clipping=clipping, bookkeeping=bookkeeping)
        assert report.max_contribution <= 0.01 * (1 + 1e-4) and report.max_contribution >= 0.004
        assert report.max_relative_error <= 1e-4 and report.max_norm_error <= 1e-4
        assert report.untrained_parameters == [] and report.holds


def test_checkpointing_is_on_while_it_is_verified():
    """Or the column above would say nothing: the blocks run twice under a checkpoint, once without."""
    calls = {}
    for how in FACTORS["checkpointing"]:
        model, _ = prepared("bert", "all")
        checkpointed(model, how).train()
        calls[how] = 0

        def count(module, args, how=how):
            calls[how] += 1

        model.bert.encoder.layer[0].attention.register_forward_pre_hook(count)
        verify_sensitivity(model, plain_losses, padded_batch(model, batch=2))
        assert model.training and all(m.training for m in model.modules())
    assert calls["non-reentrant"] > calls["none"] and calls["reentrant"] > calls["none"]
