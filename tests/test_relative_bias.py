"""T5's relative positions: looked up without a batch axis, clipped as if each example had looked them up by itself."""

import copy

import pytest
import torch
from transformers import MT5Config, MT5EncoderModel, T5Config, T5ForConditionalGeneration

from memarc_utils.grad_sample import GradSampler
from tests.models import (distance, loop_clipped_sum, loop_gradients, padded_batch, plain_losses, plan_for_tests,
                          private_sgd, shake, size, t5)


@pytest.mark.parametrize("options", [{}, dict(family=MT5EncoderModel, config=MT5Config)], ids=["t5", "mt5"])
@pytest.mark.parametrize("batch, tokens", [(4, 7), (5, 5), (1, 4), (3, 1)])
def test_relative_positions_against_a_loop(options, batch, tokens):
    """As many tokens as examples is the case in which a wrong batch axis fits by chance."""
    model = shake(t5(**options), scale=0.3)
    rows = padded_batch(model, batch=batch, tokens=max(2, tokens))
    gradients = loop_gradients(model, rows)
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.5))
    private.backward(plain_losses(model, rows))
    want = loop_clipped_sum(gradients, 0.5)
    got = private.clipped_sum()
    assert distance(got, want) <= 1e-5 * size(want)
    table = next(name for name in want if "relative_attention_bias" in name)
    assert float(want[table].norm()) > 1e-4  # or it was not tested
    torch.testing.assert_close(got[table].double(), want[table], rtol=1e-4, atol=1e-7)


def test_the_value_is_the_same_and_detaching_gives_the_plain_model_back():
    model = shake(t5(), scale=0.3)
    rows = padded_batch(model)
    want = plain_losses(model, rows).detach()
    attention = model.encoder.encoder.block[0].layer[0].SelfAttention
    sampler = GradSampler(model)
    assert "compute_bias" in vars(attention)
    torch.testing.assert_close(plain_losses(model, rows).detach(), want, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    sampler.detach()
    assert "compute_bias" not in vars(attention)
    torch.testing.assert_close(plain_losses(twin, rows).detach(), want, rtol=0, atol=0)


def test_encoder_and_decoder_together():
    """A decoder has a table of its own, with causal buckets; generation runs as without the engine."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1, num_decoder_layers=1,
                      dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0, relative_attention_num_buckets=8,
                      tie_word_embeddings=False)
    model = shake(T5ForConditionalGeneration(config).eval(), scale=0.2)
    ids, targets = torch.randint(3, 50, (3, 5)), torch.randint(3, 50, (3, 4))

    def losses(model, rows):
        logits = model(input_ids=rows["input_ids"], decoder_input_ids=rows["labels"]).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows["labels"], reduction="none").sum(1)

    rows = {"input_ids": ids, "labels": targets}
    want = loop_clipped_sum(loop_gradients(model, rows, losses), 0.5)
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    private = private_sgd(model, plan_for_tests(max_grad_norm=0.5))
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    private.backward(losses(model, rows))
    assert distance(private.clipped_sum(), want) <= 1e-5 * size(want)
