"""`batch_selection`: the sampling is what the plan accounts for, and neither padding nor cutting changes a result."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerFast

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.adapters import add_lora
from memarc_utils.batch_selection import pad_rows, poisson_batches, shuffled_batches
from memarc_utils.dp_sgd import make_private
from memarc_utils.sensitivity import check_micro_batch
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.training import causal_lm_losses, classification_losses
from tests.models import CASE_IDS, CASES, cut, padded_batch, plain_losses, seeded, shake, tiny

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class Numbers:
    """A data set of n rows that hold their own index."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"index": i}


def plan_of(dataset_size, expected_batch_size, num_steps=10, **changes):
    return PrivacyPlan(**{**dict(dataset_size=dataset_size, expected_batch_size=expected_batch_size,
                                 num_steps=num_steps,
                                 noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5), **changes})


# ---------------------------------------------------------------------------------------------------- is it Poisson?
def membership(batches, dataset_size):
    """(steps, examples) of zeros and ones."""
    drawn = np.zeros((len(batches), dataset_size))
    for step, batch in enumerate(batches):
        drawn[step, batch.indices] += 1
    return drawn


def poisson_p_values(drawn, rate):
    """Three ways in which batches may fail to be Poisson: how often each example comes, how sizes scatter, what steps
    share."""
    steps, size = drawn.shape
    counts = np.bincount(drawn.sum(0).astype(int), minlength=steps + 1)[:steps + 1]
    expected = size * stats.binom.pmf(np.arange(steps + 1), steps, rate)
    edges = [k for k in range(steps + 1) if expected[k] >= 5]
    low, high = edges[0], edges[-1]
    seen, want = counts[low:high + 1].astype(float), expected[low:high + 1].copy()
    seen[0] += counts[:low].sum()
    seen[-1] += counts[high + 1:].sum()
    want[0] += expected[:low].sum()
    want[-1] += expected[high + 1:].sum()
    inclusion = stats.chisquare(seen, want * seen.sum() / want.sum()).pvalue
    sizes = drawn.sum(1)
    variance = size * rate * (1 - rate)
    spread = (sizes - size * rate).astype(float) @ (sizes - size * rate) / variance
    spread = 2 * min(stats.chi2.cdf(spread, steps), stats.chi2.sf(spread, steps))
    together = sum((drawn[k] * drawn[k + 1]).sum() for k in range(0, steps - 1, 2))
    pairs = (steps // 2) * size
    independence = stats.binomtest(int(together), pairs, rate**2).pvalue
    return inclusion, spread, independence


def test_poisson_batches_are_poisson():
    """Trap 7. Inclusion counts are binomial, sizes have the binomial's variance, consecutive steps are independent."""
    plan = plan_of(2000, 200, num_steps=100)
    drawn = membership(list(poisson_batches(Numbers(2000), plan, generator=seeded(1))), 2000)
    assert drawn.max() == 1  # nobody twice in one batch
    assert min(poisson_p_values(drawn, plan.sample_rate)) > 0.01


def test_shuffled_batches_are_not():
    """The same three tests reject what a shuffled loader gives: every example once an epoch, all sizes equal, no
    example in two consecutive steps."""
    plan = plan_of(2000, 200, num_steps=100, sampling="shuffled")
    drawn = membership(list(shuffled_batches(Numbers(2000), plan, generator=seeded(1))), 2000)
    assert max(poisson_p_values(drawn, plan.sample_rate)) < 1e-6
    assert (drawn.sum(0) == 10).all() and (drawn.sum(1) == 200).all()


def test_a_wrong_rate_is_noticed():
    """Poisson at 1.1 q instead of q."""
    drawn = membership(list(poisson_batches(Numbers(2000), plan_of(2000, 220, num_steps=100), generator=seeded(1))),
                       2000)
    assert min(poisson_p_values(drawn, 0.1)) < 1e-6


def test_small_rates_are_exact():
    """q = 1/30,000: uniform numbers in float32 come in steps of 6e-8, so float64 it must be."""
    plan = plan_of(30_000, 1, num_steps=300)
    drawn = sum(len(batch) for batch in poisson_batches(Numbers(30_000), plan, generator=seeded(2)))
    assert stats.binomtest(drawn, 300 * 30_000, 1 / 30_000).pvalue > 0.01


def test_batches_differ_from_run_to_run_unless_a_generator_is_given():
    def indices(**options):
        torch.manual_seed(0)  # no influence
        return [batch.indices for batch in poisson_batches(Numbers(500), plan_of(500, 50), **options)]

    assert indices() != indices()
    assert indices(generator=seeded(3)) == indices(generator=seeded(3)) != indices(generator=seeded(4))


def test_the_rate_is_the_plans_not_the_datas():
    """Trap 8. A neighbouring data set, one example more or less, is sampled at the same rate."""
    plan = plan_of(1000, 100, num_steps=50)
    firsts = [[b.indices for b in poisson_batches(Numbers(n), plan, generator=seeded(5))] for n in (999, 1000, 1001)]
    sizes = [sum(map(len, batches)) / 50 for batches in firsts]
    assert all(abs(size - 100) < 5 for size in sizes)
    # the same coin for the same example
    assert [i for i in firsts[0][0] if i < 999] == [i for i in firsts[1][0] if i < 999]


def test_every_step_has_a_batch_and_an_empty_one_has_no_micro_batches():
    plan = plan_of(100, 1, num_steps=40, delta=1e-3)
    batches = list(poisson_batches(Numbers(100), plan, generator=seeded(6)))
    assert len(batches) == len(poisson_batches(Numbers(100), plan)) == 40
    empty = [batch for batch in batches if len(batch) == 0]
    assert empty and all(list(batch) == [] for batch in empty)


# ------------------------------------------------------------------------------------------- refusals, resume, cutting
def test_plans_and_samplers_must_agree():
    """Trap 7: 2.63 as Poisson, 11.17 for shuffled batches. A plan answers for one of them only."""
    plan = plan_of(100, 10, delta=1e-3)
    with pytest.raises(ValueError,
                       match=r"accounts for poisson sampling, these batches are shuffled: its ε would be wrong. Use "
                             r"poisson_batches"):
        shuffled_batches(Numbers(100), plan)
    shuffled = plan.with_sampling("shuffled")
    with pytest.raises(ValueError, match="accounts for shuffled sampling, these batches are poisson.*a plan with"):
        poisson_batches(Numbers(100), shuffled)
    assert shuffled.epsilon() > plan.epsilon()
    assert len(list(shuffled_batches(Numbers(100), shuffled))) == 10


@pytest.mark.parametrize("sampler, sampling", [(poisson_batches, "poisson"), (shuffled_batches, "shuffled")])
def test_bad_arguments_are_refused(sampler, sampling):
    plan = plan_of(100, 10, delta=1e-3, sampling=sampling)
    with pytest.raises(ValueError, match="physical_batch_size must be a whole number >= 1, got 0"):
        sampler(Numbers(100), plan, 0)
    for count in (0, 50, 102, 1000):
        with pytest.raises(ValueError,
                           match=f"the plan is for 100 examples, the data set has {count}: make the plan with"):
            sampler(Numbers(count), plan)
    sampler(Numbers(101), plan)  # a neighbour of the public size
    if sampling == "poisson":
        sampler(Numbers(99), plan)
    else:  # comes round sooner: the plan's 10 steps an epoch would hold some example twice
        with pytest.raises(ValueError, match="the data set has 99"):
            sampler(Numbers(99), plan)


@pytest.mark.parametrize("sampler, sampling", [(poisson_batches, "poisson"), (shuffled_batches, "shuffled")])
def test_a_resumed_sampler_goes_on_where_it_stopped(sampler, sampling):
    plan = plan_of(97, 10, num_steps=25, delta=1e-3, sampling=sampling)
    whole = [batch.indices for batch in sampler(Numbers(97), plan, generator=seeded(7))]
    first = sampler(Numbers(97), plan, generator=seeded(7))
    begun = [batch.indices for _, batch in zip(range(13), first)]
    assert first.steps_drawn == 13
    second = sampler(Numbers(97), plan, generator=seeded(8))
    second.load_state_dict(first.state_dict())
    assert begun + [batch.indices for batch in second] == whole


def test_shuffled_epochs_hold_every_example_once():
    plan = plan_of(25, 10, num_steps=7, delta=1e-2, sampling="shuffled")
    sizes = [batch.indices for batch in shuffled_batches(Numbers(25), plan, generator=seeded(9))]
    assert [len(indices) for indices in sizes] == [10, 10, 5, 10, 10, 5, 10]
    for epoch in (sizes[:3], sizes[3:6]):
        assert sorted(sum(epoch, [])) == list(range(25))
    assert sizes[:3] != sizes[3:6]


@pytest.mark.parametrize("physical", [1, 3, 100])
def test_micro_batches_hold_each_example_once(physical):
    plan = plan_of(60, 20, num_steps=3, delta=1e-3)
    for batch in poisson_batches(Numbers(60), plan, physical, generator=seeded(10)):
        indices = list(batch.indices)
        pieces = [micro_batch["index"].tolist() for micro_batch in batch]
        assert sorted(sum(pieces, [])) == indices and all(len(piece) <= physical for piece in pieces)


def test_a_batch_is_given_out_once():
    """A second pass over the same batch before the step would let one example move the sum by 2 C."""
    batch = next(iter(poisson_batches(Numbers(60), plan_of(60, 20, delta=1e-3), generator=seeded(11))))
    assert len(list(batch)) > 0
    with pytest.raises(ValueError, match="this batch was iterated already.*moves it by 2 C"):
        list(batch)


def test_collate_gives_one_row_an_example():
    """Windows of one long text, or a copy with noise added, would each be clipped by themselves."""
    def windows(rows):
        return {"x": torch.zeros(4 * len(rows), 5)}

    batch = next(iter(poisson_batches(Numbers(60), plan_of(60, 20, delta=1e-3), 3, collate=windows,
                                      generator=seeded(12))))
    with pytest.raises(ValueError, match="collate made tensors of shapes .*12.* of 3 examples: give one row an"):
        list(batch)


def test_collators_of_transformers_will_do():
    rows = [{"input_ids": list(range(3, 5 + i % 4)), "labels": i % 2} for i in range(60)]
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    collate = DataCollatorWithPadding(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"))
    micro_batch = next(iter(next(iter(poisson_batches(rows, plan_of(60, 20, delta=1e-3), 3, collate=collate, generator=seeded())))))
    assert isinstance(collate(rows[:2]), BatchEncoding) and type(micro_batch) is dict
    assert micro_batch["input_ids"].shape == micro_batch["attention_mask"].shape and len(micro_batch["labels"]) == 3
    check_micro_batch(collate(rows[:2]))


@pytest.mark.parametrize("collated, message", [
    (lambda rows: (torch.zeros(len(rows)), torch.ones(len(rows))), "collate must return a dict of tensors, got tuple"),
    (lambda rows: {"x": torch.zeros(len(rows)), "num_items": torch.tensor(5)}, "give one row an example"),
])
def test_collate_must_give_rows_by_name(collated, message):
    batch = next(iter(poisson_batches(Numbers(60), plan_of(60, 20, delta=1e-3), 3, collate=collated,
                                      generator=seeded(14))))
    with pytest.raises(ValueError, match=message):
        list(batch)


def test_datasets_are_read_like_lists():
    """A `datasets.Dataset` gives columns, a list gives rows; texts are left out."""
    rows = [{"text": "x" * i, "input_ids": list(range(3, 4 + i)), "attention_mask": [1] * (1 + i),
             "labels": i % 2} for i in range(30)]
    plan = plan_of(30, 12, num_steps=4, delta=1e-3)
    from_list = [m for b in poisson_batches(rows, plan, 5, generator=seeded(13)) for m in b]
    from_table = [m for b in poisson_batches(datasets.Dataset.from_list(rows), plan, 5,
                                             generator=seeded(13)) for m in b]
    assert len(from_list) == len(from_table) > 4
    for one, other in zip(from_list, from_table):
        assert one.keys() == other.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(torch.equal(one[name], other[name]) for name in one)
        lengths = one["attention_mask"].sum(1)
        assert lengths.tolist() == sorted(lengths.tolist())  # rows of like length together


# ----------------------------------------------------------------------------------------------------------- padding
@few
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), pad=st.integers(0, 3), with_mask=st.booleans())
def test_padding_of_any_rows(lengths, pad, with_mask):
    rows = [{"input_ids": [7] * n, "token_type_ids": [1] * n, "labels": [5] * n, "score": 0.5, "class": 2,
             **({"attention_mask": [1] * n} if with_mask else {})} for n in lengths]
    batch = pad_rows(rows, pad)
    assert {t.shape for name, t in batch.items() if t.dim() == 2} == {(len(rows), max(lengths))}
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    assert torch.equal(batch["attention_mask"], real.long())
    assert torch.equal(batch["input_ids"], torch.where(real, 7, pad))
    assert torch.equal(batch["labels"], torch.where(real, 5, -100))
    assert torch.equal(batch["token_type_ids"], real.long())
    assert batch["score"].tolist() == [0.5] * len(rows) and batch["class"].dtype == torch.int64


KINDS = {"list": list, "tensor": torch.tensor, "array": np.array}


@pytest.mark.parametrize("kind", KINDS)
def test_what_holds_the_tokens_changes_nothing(kind):
    """Tensors and arrays, as with_format of a data set gives them, are padded and masked as lists are: a label of 0 would be a target."""
    rows = [{"input_ids": [7] * n, "labels": [5] * n, "class": n} for n in (2, 5, 3)]
    held = [{name: KINDS[kind](v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
    want, got = pad_rows(rows, 9), pad_rows(held, 9)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert want["labels"][0].tolist() == [5, 5, -100, -100, -100] and want["input_ids"][0].tolist() == [7, 7, 9, 9, 9]


def test_a_torch_formatted_data_set_is_read_like_a_plain_one():
    plain = datasets.Dataset.from_list([{"input_ids": [7] * n, "labels": [5] * n} for n in (2, 5, 3)])
    plan = plan_of(3, 3, num_steps=1, delta=1e-2)
    (want,), (got,) = ([*next(iter(poisson_batches(data, plan, 3, pad_token_id=9)))] for data in (plain, plain.with_format("torch")))
    assert all(torch.equal(want[name], got[name]) for name in ("input_ids", "labels", "attention_mask"))


@pytest.mark.parametrize("rows, problem", [
    ([{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1]}], "some rows have the column token_type_ids and some do not"),
    ([{"input_ids": [1], "token_type_ids": None}, {"input_ids": [1], "token_type_ids": [1]}], "token_type_ids is None in 1 of 2 rows"),
    ([{"input_ids": [1], "target_ids": [1]}, {"input_ids": [1, 2], "target_ids": [1, 2]}], "target_ids has rows of several lengths")])
def test_rows_whose_reading_depends_on_neighbours_are_refused(rows, problem):
    with pytest.raises(ValueError, match=problem):
        pad_rows(rows)


def test_a_column_of_ones_own_is_padded_as_said():
    rows = [{"input_ids": [1] * n, "target_ids": [1] * n} for n in (1, 2)]
    assert pad_rows(rows, padding={"target_ids": -100})["target_ids"].tolist() == [[1, -100], [1, 1]]


def test_a_batch_left_half_way_is_remembered():
    plan = plan_of(40, 40, num_steps=3, delta=1e-3)
    batches = iter(poisson_batches(Numbers(40), plan, 16))
    first = next(batches)
    next(iter(first))
    with pytest.raises(ValueError, match="the last batch was left half way"):
        next(batches)
    batches = iter(poisson_batches(Numbers(40), plan, 16))
    first = next(batches)
    next(iter(first))
    first.give_up()
    assert len(next(batches)) == 40


def test_padding_of_tensors_and_texts():
    rows = [{"features": torch.ones(3, 2), "text": "a"}, {"features": torch.zeros(3, 2), "text": "b"}]
    assert {name: t.shape for name, t in pad_rows(rows).items()} == {"features": (2, 3, 2)}


HOW = {"all": lambda m: m, "lora": lambda m: add_lora(m, rank=4),
       "side": lambda m: attach_side_network(m, SideNetworkConfig(reduction=4, block="attention", heads=2))}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_no_neighbour_changes_an_examples_loss(case, how):
    """Each example's loss is the same alone, without padding, and beside longer neighbours; with the
    losses of `training` and with those written in the tests."""
    model = shake(HOW[how](tiny(*case)))
    batch = padded_batch(model, case[1])
    package_losses = classification_losses if case[1] == "classification" else causal_lm_losses
    for losses in (plain_losses, package_losses):
        with torch.no_grad():
            together = losses(model, batch)
            alone = torch.cat([losses(model, cut(batch, i)) for i in range(len(together))])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_rows_without_a_mask_are_padded_so_that_nobody_sees_it():
    model = shake(tiny("bert"))
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": n % 2} for n in (3, 9)]
    with torch.no_grad():
        together = classification_losses(model, pad_rows(rows))
        alone = torch.cat([classification_losses(model, pad_rows([row])) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_padding_with_another_models_token_is_what_the_test_above_would_notice():
    """GPT-2 takes the last token that is not the pad token: padded with another one it reads the padding."""
    model = shake(tiny("gpt2"))
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": n % 2} for n in (3, 9)]
    with torch.no_grad():
        right, wrong = (classification_losses(model, pad_rows(rows, pad)) for pad in (model.config.pad_token_id, 4))
    assert abs(float(right[0] - wrong[0])) > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_another_models_pad_token_is_refused_in_private_training(family):
    model = shake(tiny(family))
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": n % 2} for n in (3, 9)]
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), plan_of(10, 2, delta=1e-2))
    private.backward(classification_losses(model, pad_rows(rows, model.config.pad_token_id)))
    with pytest.raises(ValueError, match=rf"reads the last token that is not the pad token {model.config.pad_token_id}, .* holds 4"):
        private.backward(classification_losses(model, pad_rows(rows, 4)))
