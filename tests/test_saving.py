"""`saving`: every prepared model comes back with the same outputs; a wrong backbone is refused and left as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file

from memarc_utils.adapters import add_bottleneck_adapters, add_lora, select_bias_terms, select_linear_probe, train_everything
from memarc_utils.preparation import recorded
from memarc_utils.saving import load_trainable, save_trainable
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from tests.models import CASE_IDS, CASES, padded_batch, plain_losses, private_sgd, shake, tiny

METHODS = {
    "full": train_everything, "probe": select_linear_probe, "lora": lambda model: add_lora(model, rank=4, alpha=12.0),
    "ffa-lora": lambda model: add_lora(model, rank=4, freeze_a=True),
    "adapters": lambda model: add_bottleneck_adapters(model, width=3, after=("mlp",)),
    "biases": lambda model: select_bias_terms(model, add_missing=True),
    "side": lambda model: attach_side_network(model, SideNetworkConfig(reduction=2, layers=2, block="mlp")),
}


# A head that is tied to the embeddings stays frozen, so a probe of such a model has nothing to save.
TRAINABLE = [(case, method) for case in CASES for method in METHODS if method != "probe" or not case[2]]
TRAINABLE_IDS = [f"{CASE_IDS[CASES.index(case)]}-{method}" for case, method in TRAINABLE]


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def state(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[n][0], second[n][0]) and first[n][1] == second[n][1] for n in first)


@pytest.mark.parametrize("case, method", TRAINABLE, ids=TRAINABLE_IDS)
def test_a_prepared_model_comes_back(case, method, tmp_path):
    fresh = tiny(*case)
    model = shake(METHODS[method](tiny(*case)), scale=0.2)
    batch = padded_batch(model, case[1])
    assert save_trainable(model, tmp_path / "run") == tmp_path / "run"
    torch.manual_seed(99)  # LoRA's A and an adapter's D are drawn anew, and must be overwritten
    loaded = load_trainable(fresh, tmp_path / "run")
    assert loaded is fresh and same(state(loaded), state(model))
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.memarc_preparation == model.memarc_preparation
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["preparation.json", "trainable.safetensors"]


def test_only_what_trains_or_was_created_is_stored(tmp_path):
    model = add_lora(tiny("bert"), rank=4, freeze_a=True)
    stored = load_file(save_trainable(model, tmp_path) / "trainable.safetensors")
    assert {n for n, p in model.named_parameters() if p.requires_grad} < set(stored)
    assert all("lora_" in n or n.startswith(("bert.pooler", "classifier")) for n in stored)
    assert any("lora_A" in n for n in stored)  # frozen, but random: no backbone has it


def test_several_preparations_in_a_row(tmp_path):
    """The side network moves the backbone, and with it the names of the biases that were created before."""
    def prepare(model):
        return attach_side_network(select_bias_terms(model, add_missing=True), SideNetworkConfig(reduction=2))

    model = shake(prepare(tiny("llama")))
    with torch.no_grad():
        model.model.backbone.layers[0].mlp.down_proj.bias.fill_(0.5)
    assert [step["method"] for step in model.memarc_preparation["steps"]] == ["select_bias_terms", "attach_side_network"]
    loaded = load_trainable(tiny("llama"), save_trainable(model, tmp_path))
    assert torch.equal(logits(loaded, padded_batch(model)), logits(model, padded_batch(model)))


def test_a_parameter_frozen_by_hand_stays_frozen(tmp_path):
    model = shake(add_lora(tiny("bert"), rank=4))
    model.bert.pooler.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen weights of this backbone are not those"):
        load_trainable(tiny("bert"), save_trainable(model, tmp_path))  # it was moved first, and is not stored
    model = add_lora(tiny("bert"), rank=4)
    model.bert.pooler.requires_grad_(False)
    loaded = load_trainable(tiny("bert"), save_trainable(model, tmp_path))
    assert same(state(loaded), state(model)) and not loaded.bert.pooler.dense.weight.requires_grad


def test_a_model_that_is_prepared_alike_takes_the_values(tmp_path):
    model = shake(add_lora(tiny("bert"), rank=4))
    other = private_sgd(add_lora(tiny("bert"), rank=4)).model  # private already: values go in, nothing is replaced
    load_trainable(other, save_trainable(model, tmp_path))
    assert torch.equal(logits(other, padded_batch(model)), logits(model, padded_batch(model)))
    with pytest.raises(ValueError, match=r"prepared by add_lora\(rank=8.*the saved one by add_lora\(rank=4"):
        load_trainable(add_lora(tiny("bert"), rank=8), tmp_path)


def test_loading_during_private_training_and_saving_from_it(tmp_path):
    model = add_bottleneck_adapters(tiny("bert"), width=4)
    private = private_sgd(model)
    batch = padded_batch(model)
    private.backward(plain_losses(model, batch))
    private.step()
    loaded = load_trainable(tiny("bert"), save_trainable(model, tmp_path))
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("wrong, words", [
    (lambda: tiny("roberta"), "of a BertForSequenceClassification, this is a RobertaForSequenceClassification"),
    (lambda: tiny("bert", layers=1), "this model has no bert.encoder.layer.1"),
    (lambda: tiny("bert", layers=3), "bert.encoder.layer.2.* is not among the saved tensors"),
    (lambda: tiny("bert", hidden=64), r"has shape \(.*64.*\) in this model and \(.*32.*\) in the saved"),
    (lambda: tiny("bert", num_labels=3), r"classifier.bias has shape \(3,\) in this model and \(2,\) in the saved"),
    (lambda: tiny("bert", seed=1), "frozen weights of this backbone are not those of the saved model"),
    (lambda: tiny("bert").to(torch.bfloat16), "in the same dtype"),
    (lambda: select_linear_probe(tiny("bert")), "prepared by select_linear_probe"),
], ids=["class", "fewer-layers", "more-layers", "width", "labels", "weights", "dtype", "prepared"])
@pytest.mark.parametrize("method", ["lora", "adapters", "side"])
def test_a_wrong_backbone_is_refused_and_left_as_it_was(method, wrong, words, tmp_path):
    if method == "side" and "layer" in words:
        words = "this model has no|is not among the saved tensors|frozen weights"
    save_trainable(shake(METHODS[method](tiny("bert"))), tmp_path)
    model = wrong()
    before, modules = state(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=words):
        load_trainable(model, tmp_path)
    assert same(before, state(model)) and modules == [type(m) for m in model.modules()]


def test_errors_of_saving(tmp_path):
    with pytest.raises(ValueError, match="was not prepared: prepare it by one of add_lora"):
        save_trainable(tiny("bert"), tmp_path / "a")
    with pytest.raises(ValueError, match="nothing of this BertForSequenceClassification trains"):
        save_trainable(select_linear_probe(tiny("bert")).requires_grad_(False), tmp_path / "a")

    @recorded
    def unknown(model):
        return model

    with pytest.raises(ValueError, match="was prepared by unknown, which cannot be saved"):
        save_trainable(unknown(tiny("bert")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_errors_of_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        load_trainable(tiny("bert"), tmp_path)
    save_trainable(add_lora(tiny("bert")), tmp_path)
    path = tmp_path / "preparation.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "steps": [{"method": "os.system", "arguments": {}}]}))
    with pytest.raises(ValueError, match="names the method 'os.system'; known are add_lora"):
        load_trainable(tiny("bert"), tmp_path)
    path.write_text(json.dumps({**saved, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        load_trainable(tiny("bert"), tmp_path)


@pytest.mark.parametrize("name, damage", [("trainable.safetensors", lambda data: data[:20]), ("preparation.json", lambda data: data[:-2])])
def test_a_damaged_folder_is_named(name, damage, tmp_path):
    save_trainable(add_lora(tiny("bert")), tmp_path / "saved")
    file = tmp_path / "saved" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="cannot be read .*save the model anew"):
        load_trainable(tiny("bert"), tmp_path / "saved")


def test_the_record_is_plain_json():
    model = attach_side_network(tiny("bert"), SideNetworkConfig(reduction=2))
    assert json.loads(json.dumps(model.memarc_preparation)) == model.memarc_preparation
    assert all(name in dict(model.named_parameters()) for name in model.memarc_preparation["created"])
