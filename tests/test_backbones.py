"""Backbones: the default models are what they claim, tiny ones cover every family, the block view misses nothing."""

import copy
import io
import logging

import pytest
import torch
import transformers
from torch import nn

from memarc_utils import backbones
from memarc_utils.backbones import (
    block_view,
    freeze,
    head_parameters,
    load_backbone,
    load_tokenizer,
    mean_over_tokens,
    tiny_backbone,
)

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "opt", "llama")
DECODERS = ("gpt2", "opt", "llama")
CASES = [(family, "classification") for family in FAMILIES] + [(family, "causal_lm") for family in DECODERS]


def make_batch(model, lengths=(7, 5, 3)):
    """Right-padded random tokens; 0, 1 and 2 are the special ones of the tiny models."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), model.config.pad_token_id)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------- tiny models
@pytest.mark.parametrize(("family", "task"), CASES)
def test_tiny_padding_is_invisible(family, task):
    """A row alone, without padding, has the logits it has in a padded batch: so the last real token is found."""
    torch.manual_seed(0)
    model = tiny_backbone(family, task=task, num_labels=3)
    lengths = (7, 5, 3)
    batch = make_batch(model, lengths)
    together = model(**batch).logits
    assert together.shape == ((3, 3) if task == "classification" else (3, 7, 101))
    for row, length in enumerate(lengths):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0]
        in_batch = together[row] if task == "classification" else together[row, :length]
        torch.testing.assert_close(in_batch, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_is_seeded_and_follows_its_arguments(family):
    torch.manual_seed(3)
    first = tiny_backbone(family, hidden=16, layers=3, heads=2, vocab_size=50, dropout=0.25)
    torch.manual_seed(3)
    second = tiny_backbone(family, hidden=16, layers=3, heads=2, vocab_size=50, dropout=0.25)
    other = tiny_backbone(family, hidden=16, layers=3, heads=2, vocab_size=50, dropout=0.25)
    values, again, different = (list(model.state_dict().values()) for model in (first, second, other))
    assert all(map(torch.equal, values, again)) and not all(map(torch.equal, values, different))
    view = block_view(first)
    assert (view.width, len(view.blocks)) == (16, 3)
    assert view.embeddings[0].get_parameter(
        "weight" if family in DECODERS else "word_embeddings.weight"
    ).shape == (50, 16)
    assert not first.training
    batch, first = make_batch(first), first.train()
    assert not torch.equal(first(**batch).logits, first(**batch).logits)  # the dropout asked for is there
    quiet = tiny_backbone(family).train()
    assert torch.equal(quiet(**batch).logits, quiet(**batch).logits)  # and the default has none


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_takes_64_tokens_and_pads_as_published(family):
    model = tiny_backbone(family)
    assert model.config.pad_token_id == (1 if family == "roberta" else 0)
    assert model(**make_batch(model, lengths=(64, 2))).logits.isfinite().all()


@pytest.mark.parametrize("family", DECODERS)
def test_tie(family):
    tied, untied = tiny_backbone(family, "causal_lm", tie=True), tiny_backbone(family, "causal_lm", tie=False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
    assert block_view(tied).tied and not block_view(untied).tied
    assert list(head_parameters(tied)) == [] and list(head_parameters(untied)) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(family="mamba"), "write one of bert"),
        (dict(family="bert", task="causal_lm"), "does not fit bert"),
        (dict(family="gpt2", task="translation"), "does not fit gpt2"),
        (dict(family="gpt2", tie=True), "leave it out"),
        (dict(family="gpt2", hidden=30), "multiple of heads"),
    ],
)
def test_tiny_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone(**arguments)


# -------------------------------------------------------------------------------------------------- block view
@pytest.mark.parametrize(("family", "task"), CASES)
def test_block_view_covers_every_parameter(family, task):
    model = tiny_backbone(family, task=task)
    view = block_view(model)
    assert getattr(model, view.base_name) is view.base

    def parameters(*modules):
        return {id(parameter) for module in modules for parameter in module.parameters()}

    parts = [parameters(*view.embeddings), parameters(*view.blocks), parameters(*view.heads.values())]
    if view.final_norm is not None:
        parts.append(parameters(view.final_norm))
    assert set().union(*parts) == parameters(model)
    if not view.tied:
        assert sum(map(len, parts)) == len(parameters(model))  # and no parameter in two parts
    for block, attention, mlp in zip(view.blocks, view.attentions, view.mlps, strict=True):
        inner, feed_forward = parameters(attention), parameters(*mlp)
        assert inner and feed_forward and not inner & feed_forward
        rest = [module for module in block.modules() if parameters(module) - inner - feed_forward]
        assert all(module is block or "Norm" in type(module).__name__ for module in rest)
    names = {name for name, parameter in model.named_parameters() if id(parameter) in parts[2] - parts[0]}
    assert set(head_parameters(model)) == names


@pytest.mark.parametrize("family", FAMILIES)
def test_block_view_is_in_the_order_of_the_forward(family):
    """What enters the blocks, one after the other, is what transformers reports as hidden states."""
    torch.manual_seed(0)
    model = tiny_backbone(family, layers=3)
    view, entered, calls = block_view(model), [], []
    for block in view.blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    for index, (attention, mlp) in enumerate(zip(view.attentions, view.mlps, strict=True)):
        for kind, module in [("attention", attention), *(("mlp", part) for part in mlp)]:
            module.register_forward_hook(lambda *_, call=(index, kind): calls.append(call))
    hidden = model(**make_batch(model), output_hidden_states=True).hidden_states
    assert len(entered) == 3
    for got, want in zip(entered, hidden[:-1], strict=True):
        torch.testing.assert_close(got, want)
        assert got.shape[-1] == view.width
    per_block = [(0, "attention")] + [(0, "mlp")] * len(view.mlps[0])
    assert calls == [(index, kind) for index in range(3) for _, kind in per_block]


def test_block_view_refuses_what_it_does_not_know():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    opt_350m = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, word_embed_proj_dim=4, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8
    )
    models = [nn.Linear(2, 2), transformers.T5EncoderModel(config), transformers.OPTForCausalLM(opt_350m)]
    for model in [*models, tiny_backbone("bert").bert]:
        with pytest.raises(ValueError, match=f"no block view of {type(model).__name__}; supported are BERT"):
            block_view(model)


# ---------------------------------------------------------------------------------------------------- freezing
def test_frozen_stays_without_dropout_and_gradients():
    torch.manual_seed(0)
    model = tiny_backbone("roberta", dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert freeze(model.roberta) is model.roberta
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        made.train()
        made.roberta.train(True)
        made.roberta.encoder.layer[0].train()  # reached by another way than from above
        assert made.training and made.classifier.training
        assert not any(module.training for module in made.roberta.modules())
        batch = make_batch(made)
        hidden = [made.roberta(**batch).last_hidden_state for _ in range(2)]
        assert torch.equal(*hidden)
        assert [name for name, parameter in made.named_parameters() if parameter.requires_grad] == list(
            head_parameters(made)
        )
        assert made.state_dict().keys() == before.keys()
        assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())
    copied = copy.deepcopy(model)
    copied.roberta.embeddings.training = True
    copied.train()
    assert not copied.roberta.embeddings.training  # the copy's override reaches the copy, not the original
    assert not torch.equal(model(**batch).logits, model(**batch).logits)  # the head still has its dropout


# ------------------------------------------------------------------------------------------- the default encoder
def embed(model, tokenizer, texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return mean_over_tokens(model.bert(**batch).last_hidden_state, batch["attention_mask"])


def test_default_encoder_knows_paraphrases():
    model, tokenizer = load_backbone("default-encoder"), load_tokenizer("default-encoder")
    texts = ["The film was a joy.", "I loved this movie.", "The train leaves at noon.", "A joy, the film."]
    vectors = embed(model, tokenizer, texts)
    cosine = nn.functional.cosine_similarity
    assert cosine(vectors[0], vectors[1], dim=0) > 0.5 > 0.2 > cosine(vectors[0], vectors[2], dim=0)
    assert cosine(vectors[0], vectors[3], dim=0) > 0.8


def test_mean_pooling_is_the_mean_over_real_tokens():
    """Against transformers' bare BertModel and a loop in float64."""
    model, tokenizer = load_backbone("default-encoder", num_labels=3), load_tokenizer("default-encoder")
    bare = transformers.AutoModel.from_pretrained(backbones._source("default-encoder"))
    batch = tokenizer(["short", "a much longer sentence about films", ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, logits = bare(**batch).last_hidden_state, model(**batch).logits
        for row in range(3):
            real = [h.double() for h, m in zip(hidden[row], batch["attention_mask"][row], strict=True) if m]
            vector = torch.stack(real).mean(dim=0).float()
            torch.testing.assert_close(logits[row], model.classifier(vector), rtol=1e-4, atol=1e-5)
        labels = torch.tensor([0, 2, 1])
        out = model(**batch, labels=labels, output_hidden_states=True)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(logits, labels))
        assert len(out.hidden_states) == 7 and torch.equal(model(**batch, return_dict=False)[0], logits)
    assert torch.equal(mean_over_tokens(hidden, None), hidden.mean(dim=1))
    with pytest.raises(ValueError, match="2-D mask"):
        mean_over_tokens(hidden, torch.ones(3, 1, 4, 4))


def test_default_encoder_head_is_seeded_and_round_trips(tmp_path):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_backbone("default-encoder", num_labels=4))
    same, again, other = (model.classifier.weight for model in models)
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert 0.015 < same.std() < 0.025 and not models[0].classifier.bias.any()
    assert list(head_parameters(models[0])) == ["classifier.weight", "classifier.bias"]
    assert not [name for name, _ in models[0].named_parameters() if "pooler" in name] and not models[0].training
    models[0].save_pretrained(tmp_path)
    back = load_backbone(tmp_path, num_labels=4)
    assert type(back) is backbones.MeanPooledBertForSequenceClassification
    batch = make_batch(back)
    assert torch.equal(back(**batch).logits, models[0](**batch).logits)
    by_class = backbones.MeanPooledBertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(by_class.eval()(**batch).logits, models[0](**batch).logits)
    with pytest.raises(ValueError, match="num_labels"):
        load_backbone(tmp_path, num_labels=2)


def test_cls_pooling_is_the_plain_class(tmp_path):
    model = load_backbone("default-encoder", pooling="cls")
    assert type(model) is transformers.BertForSequenceClassification
    assert "bert.pooler.dense.weight" in head_parameters(model)
    model.save_pretrained(tmp_path)
    assert type(load_backbone(tmp_path)) is transformers.BertForSequenceClassification
    assert type(load_backbone(tmp_path, pooling="mean")) is backbones.MeanPooledBertForSequenceClassification
    assert load_backbone("default-encoder", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_loading_is_silent_and_silences_nothing_else(capfd, caplog):
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            load_backbone("default-encoder")
            assert "LOAD REPORT" not in caplog.text and not caplog.records
            with backbones._quiet_loading():
                logging.getLogger("transformers.modeling_utils").warning("a warning about something else")
            assert "something else" in caplog.text
            transformers.BertForSequenceClassification.from_pretrained(backbones._source("default-encoder"))
            assert "LOAD REPORT" in caplog.text  # the reader's own loading still reports
    finally:
        transformers.logging.disable_propagation()
    capfd.readouterr()
    load_backbone("default-encoder")
    assert capfd.readouterr() == ("", "")
    assert transformers.logging.is_progress_bar_enabled()


# ------------------------------------------------------------------------------------- folders, hub, what is refused
def test_folders_and_names(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = tiny_backbone("gpt2", "causal_lm")
    model.config.pad_token_id = None  # as in the published GPT-2
    model.save_pretrained(tmp_path / "my-gpt2")
    monkeypatch.setenv("MEMARC_MODEL_DIR", str(tmp_path))
    assert torch.equal(load_backbone("my-gpt2", "causal_lm").lm_head.weight, model.lm_head.weight)
    classifier = load_backbone(str(tmp_path / "my-gpt2"), num_labels=5)
    assert classifier.config.pad_token_id == classifier.config.eos_token_id == 2
    batch = make_batch(classifier)
    alone = classifier(batch["input_ids"][2:, :3]).logits[0]
    torch.testing.assert_close(classifier(**batch).logits[2], alone, rtol=1e-5, atol=1e-6)

    state = {name: value for name, value in model.state_dict().items() if "h.1.mlp" not in name}
    model.save_pretrained(tmp_path / "torn", state_dict=state)
    with pytest.raises(ValueError, match="lacks 4 weights"):
        load_backbone("torn")
    untied = tiny_backbone("llama", "causal_lm")
    untied.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="lacks 1 weights .lm_head.weight"):
        load_backbone("headless", "causal_lm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="default-encoder", task="causal_lm"), "cannot do task='causal_lm'"),
        (dict(name="default-encoder", task="regression"), "write one of classification, causal_lm"),
        (dict(name="default-encoder", num_labels=1), "at least 2 classes"),
        (dict(name="default-encoder", pooling="max"), "write 'mean', 'cls' or None"),
        (dict(name="default-decoder", pooling="mean"), "written for BERT"),
        (dict(name="default-decoder", task="causal_lm", pooling="cls"), "belongs to classification"),
    ],
)
def test_load_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(**arguments)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "/no/such/folder", "./folder"])
def test_missing_model_names_the_three_ways(name, monkeypatch):
    monkeypatch.delenv("MEMARC_MODEL_DIR", raising=False)
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(FileNotFoundError) as error:
            load(name)
        text = str(error.value)
        assert name in text and "folder" in text and "$MEMARC_MODEL_DIR" in text and "hub" in text
        assert "\n" not in text


def test_missing_assets(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMARC_ASSETS_DIR", str(tmp_path))
    for name in ("default-encoder", "default-decoder"):
        with pytest.raises(FileNotFoundError, match="make run"):
            load_backbone(name)


# ------------------------------------------------------------------------------------------- the default decoder
@pytest.fixture(scope="module")
def decoder():
    return load_backbone("default-decoder", "causal_lm"), load_tokenizer("default-decoder")


def perplexity(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()


def test_default_decoder_speaks_english(decoder):
    model, tokenizer = decoder
    ids = tokenizer("The weather was so bad that they decided to stay at home and watch a film.", return_tensors="pt")
    ids = ids["input_ids"]
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, ids) < 40
    assert perplexity(model, shuffled) > 20 * perplexity(model, ids)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(continued)


def test_default_decoder_is_a_plain_llama(decoder):
    model, _ = decoder
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert block_view(model).tied and list(head_parameters(model)) == []
    torch.manual_seed(0)
    classifier = load_backbone("default-decoder", num_labels=3)
    assert type(classifier) is transformers.LlamaForSequenceClassification
    assert classifier.config.pad_token_id == model.config.pad_token_id == 0
    assert torch.equal(classifier.model.layers[7].mlp.up_proj.weight, model.model.layers[7].mlp.up_proj.weight)


def test_default_decoder_tokenizer(decoder):
    model, tokenizer = decoder
    for text in ("Plain text, 42.", "two\nlines\n\n  and   spaces", "naïve — “quoted”"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.padding_side == "right" and len(tokenizer) == model.config.vocab_size


def test_default_decoder_holds_the_numbers_of_the_file(decoder):
    """A second route to the weights: the reader of the gguf package, and our own unpacking of its 4-bit blocks."""
    gguf = pytest.importorskip("gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(str(backbones._asset(backbones.DECODER_GGUF))).tensors}
    model, _ = decoder
    layer = model.model.layers[3]
    for name, weight in [("ffn_up", layer.mlp.up_proj.weight), ("attn_v", layer.self_attn.v_proj.weight)]:
        tensor = tensors[f"blk.3.{name}.weight"]
        assert tensor.tensor_type.name == "Q4_1"
        blocks = torch.from_numpy(tensor.data.copy()).reshape(-1, 20)  # scale, minimum (16 bits each), 32 nibbles
        scale, minimum = blocks[:, :2].view(torch.float16).float(), blocks[:, 2:4].view(torch.float16).float()
        nibbles = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
        torch.testing.assert_close(weight.detach().reshape(-1, 32), scale * nibbles + minimum, rtol=0, atol=0)
    norm = torch.from_numpy(tensors["blk.3.attn_norm.weight"].data.copy())
    assert torch.equal(layer.input_layernorm.weight, norm)


def test_conversion_happens_once_and_whole(tmp_path, monkeypatch):
    """A stopped conversion leaves nothing, a second call converts nothing (small stand-ins for the slow reading)."""
    torch.manual_seed(0)
    model, calls = tiny_backbone("llama", "causal_lm", vocab_size=30_523, tie=True), []
    tokenizer = load_tokenizer("default-encoder")
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)  # the GGUF's vocabulary holds it
    model.config.quantization_config = {"quant_method": "gguf"}  # as transformers leaves it after reading a GGUF
    monkeypatch.setenv("MEMARC_ASSETS_DIR", str(backbones._asset(backbones.DECODER_GGUF).parents[1]))
    monkeypatch.setattr(backbones, "REPOSITORY", tmp_path)
    monkeypatch.setattr(backbones.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: calls.append(k) or model)
    monkeypatch.setattr(backbones.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            backbones._decoder_folder()
    assert list((tmp_path / "build" / "models").iterdir()) == []
    folder = backbones._decoder_folder()
    assert backbones._decoder_folder() == folder and len(calls) == 2
    assert list((tmp_path / "build" / "models").iterdir()) == [folder]
    monkeypatch.undo()
    back = load_backbone(folder, "causal_lm")
    assert not hasattr(back.config, "quantization_config") and tokenizer.pad_token == "<|endoftext|>"
    assert back.config.pad_token_id == load_tokenizer(folder).pad_token_id == tokenizer.pad_token_id
    assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))
