"""Tiny models, padded batches and slow, plain gradients that the engine's tests share. No code of the engine is used
here."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5EncoderModel

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.backbones import tiny_backbone
from memarc_utils.dp_sgd import make_private

# family, task, tied head
CASES = [("bert", "classification", None), ("roberta", "classification", None), ("distilbert", "classification", None),
         ("gpt2", "causal_lm", False), ("gpt2", "causal_lm", True), ("gpt2", "classification", None),
         ("opt", "causal_lm", True), ("opt", "classification", None), ("llama", "causal_lm", False),
         ("llama", "classification", None)]
CASE_IDS = ["-".join(str(part) for part in case if part is not None) for case in CASES]


def tiny(family="bert", task="classification", tie=None, seed=0, **sizes):
    torch.manual_seed(seed)
    return tiny_backbone(family, task=task, tie=tie, **sizes)


def padded_batch(model, task="classification", batch=4, tokens=7, seed=0):
    """Row i has ``tokens - i`` real tokens (at least 2), padding on the right; no token is a special one."""
    generator = torch.Generator().manual_seed(seed)
    pad = model.config.pad_token_id or 0
    lengths = [max(2, tokens - i) for i in range(batch)]
    mask = torch.tensor([[1] * n + [0] * (tokens - n) for n in lengths])
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).masked_fill(mask == 0, pad)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask,
            "labels": labels if task == "classification" else ids.masked_fill(mask == 0, -100)}


def plain_losses(model, batch):
    """One loss per example by the shortest code: cross-entropy of the class, or the mean over the example's own next
    tokens."""
    labels = batch["labels"]
    logits = model(**{name: t for name, t in batch.items() if name != "labels"}).logits
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return each.sum(1) / (labels[:, 1:] != -100).sum(1)


def rows(batch, indices):
    return {name: t[indices] for name, t in batch.items()}


def cut(batch, i):
    """Example i alone, without its padding."""
    length = int(batch["attention_mask"][i].sum())
    return {name: (t[i:i + 1, :length] if t.dim() == 2 else t[i:i + 1]) for name, t in batch.items()}


def shake(model, seed=1, scale=0.05):
    """Moves what starts at zero or one (LoRA's B, upsamples, norms, biases) so that every gradient matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def loop_gradients(model, batch, losses=plain_losses):
    """Each example's gradient by a forward and a backward of its own: {name: (B, *shape)}."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for i in range(len(next(iter(batch.values())))):
        found = torch.autograd.grad(losses(model, rows(batch, [i])).sum(), list(named.values()), allow_unused=True)
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found)])
    return {name: torch.stack(each) for name, each in zip(named, zip(*gradients))}


def loop_norms(gradients):
    return sum(g.double().flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def groups_of(model):
    """Sets of names: the parameters of one layer, and of layers that share one, by repeated merging."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    groups = [{names[p] for p in module.parameters(recurse=False) if p in names} for module in model.modules()]
    groups = [group for group in groups if group]
    while True:
        meeting = [(a, b) for k, a in enumerate(groups) for b in groups[k + 1:] if a & b]
        if not meeting:
            return groups
        first, second = meeting[0]
        groups = [g for g in groups if g is not first and g is not second] + [first | second]


def loop_clipped_sum(gradients, max_grad_norm, clipping="flat", groups=None):
    """Σ_i c_i g_i with c written out, in float64; ``per_layer`` clips each group of names by itself to C/√G."""
    if clipping == "per_layer":
        parts = [loop_clipped_sum({n: gradients[n] for n in group}, max_grad_norm / len(groups)**0.5) for group in groups]
        return {name: total for part in parts for name, total in part.items()}
    norms = loop_norms(gradients)
    factors = (max_grad_norm / norms).clamp(max=1) if clipping == "flat" else max_grad_norm / (norms + 0.01)
    return {name: torch.einsum("b,b...->...", factors, g.double()) for name, g in gradients.items()}


def distance(first, second):
    """Euclidean distance over all parameters, in float64."""
    names = first.keys() | second.keys()
    pairs = [(first.get(n, torch.zeros(())), second.get(n, torch.zeros(()))) for n in names]
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5


def size(gradient):
    return distance(gradient, {})


def plan_for_tests(**changes):
    settings = dict(dataset_size=1000, expected_batch_size=4, num_steps=50, noise_multiplier=0.0, max_grad_norm=0.1,
                    delta=1e-4)
    return PrivacyPlan(**{**settings, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def private_sgd(model, plan=None, lr=1.0, seed=0, **options):
    """`make_private` around plain SGD over every parameter, with reproducible noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return make_private(model, optimizer, plan or plan_for_tests(), noise_generator=seeded(seed), **options)


def without_shape_check(function):
    """The function as users call it: under pytest shapes and types in signatures are checked before the body runs."""
    return getattr(function, "__wrapped__", function)


class T5Classifier(nn.Module):
    """transformers' T5 encoder, whose relative positions carry no batch axis, mean-pooled, with a linear head."""

    def __init__(self, family=T5EncoderModel, config=T5Config, layers=2, dropout=0.0):
        super().__init__()
        self.config = config(vocab_size=101, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=layers,
                             dropout_rate=dropout, pad_token_id=0, relative_attention_num_buckets=8,
                             relative_attention_max_distance=16)
        self.encoder, self.head = family(self.config), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(pooled))


def t5(seed=0, **options):
    torch.manual_seed(seed)
    return T5Classifier(**options).eval()
