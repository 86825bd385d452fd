"""State that a forward pass keeps of a batch, wherever it is kept: seen in what a release would show besides what trains."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from memarc_utils import model_checks
from memarc_utils.grad_sample import GradSampler
from memarc_utils.model_checks import WatchedBuffers
from memarc_utils.zeroth_order import make_zeroth_order
from tests.models import padded_batch, plain_losses, plan_for_tests, private_sgd, seeded, tiny


def x_of(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


class Codebook(nn.Module):
    """A frozen table that follows a moving mean of what is looked up in it."""

    def __init__(self, how, entries=10):
        super().__init__()
        self.layer, self.code, self.how = nn.Linear(3, 3), nn.Embedding(entries, 3).requires_grad_(False), how

    def forward(self, x):
        h = self.layer(x)
        nearest = torch.cdist(h.detach(), self.code.weight).argmin(1)
        moved = self.code.weight.detach().clone()
        moved[nearest] = 0.9 * moved[nearest] + 0.1 * h.detach()
        if self.how == "data":
            self.code.weight.data.copy_(moved)
        elif self.how == "in place":
            with torch.no_grad():
                self.code.weight.copy_(moved)
        else:
            self.code.weight = nn.Parameter(moved, requires_grad=False)
        return h


@pytest.mark.parametrize("entries", [10, 5000])
@pytest.mark.parametrize("how", ["data", "in place", "replaced"])
def test_a_frozen_table_that_follows_the_batch_is_found(how, entries):
    x = x_of(8, 3) if how != "data" or entries == 10 else x_of(3000, 3)  # of a large table a sample is compared
    model = Codebook(how, entries)
    private = private_sgd(model)
    with pytest.raises(ValueError, match="the frozen parameter code.weight was written since make_private.*note_buffers"):
        private.backward(model(x).square().sum(1))


class Counting(nn.Module):
    """Counts and queues written past torch's own count of writes."""

    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(5, 2), name
        self.register_buffer("seen", torch.zeros(100, dtype=torch.long))
        self.register_buffer("flags", torch.zeros(100, dtype=torch.bool))
        self.register_buffer("queue", torch.zeros(20_000, 5))

    def forward(self, x):
        if self.name == "queue":
            self.queue.data[:len(x)] = x.detach()
        else:
            getattr(self, self.name).data[len(x)] = 1
        return self.layer(x)


@pytest.mark.parametrize("name", ["seen", "flags", "queue"])
def test_counts_and_large_buffers_written_through_data_are_found(name):
    model = Counting(name)
    private = private_sgd(model)
    with pytest.raises(ValueError, match=f"the buffer {name} was written since make_private"):
        private.backward(model(x_of(6, 5)).square().sum(1))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.filterwarnings("ignore:no rule of its own")
def test_a_table_with_max_norm_is_refused(layer, trains):
    """Its rows are rescaled as the batch looks them up: a frozen one is released with the tokens in it."""
    table = layer(9, 3, max_norm=1.0)
    model = nn.Sequential(table.requires_grad_(trains), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="0.weight .*max_norm.*[Ss]et max_norm=None|set max_norm=None"):
        private_sgd(model)
    with pytest.raises(ValueError, match="0.weight is rescaled in the forward pass.*Set max_norm=None"):
        make_zeroth_order(model, plan_for_tests(), 0.1)
    table.weight.data.renorm_(table.norm_type, 0, table.max_norm)
    table.max_norm = None
    make_zeroth_order(model, plan_for_tests(), 0.1)


class Tracked(nn.Module):
    """Its trainable bias follows the batch: in every forward pass, or in the first one only."""

    def __init__(self, how="data", width=2):
        super().__init__()
        self.layer, self.how, self.begun = nn.Linear(3, width), how, False

    def forward(self, x):
        h = self.layer(x)
        if self.how == "data":
            self.layer.bias.data.lerp_(h.detach().mean(0), 0.1)
        elif self.how == "in place":
            with torch.no_grad():
                self.layer.bias.lerp_(h.mean(0), 0.1)
        elif self.how == "at first" and not self.begun:
            self.layer.bias.data.sub_(h.detach().mean(0))
            self.begun = True
        return h


@pytest.mark.parametrize("width", [2, 5000])
@pytest.mark.parametrize("how", ["data", "in place", "at first"])
def test_what_trains_and_follows_the_batch_is_found(how, width):
    """Noise of any size stands beside it in a release and does not hide it."""
    model = Tracked(how, width)
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0, max_grad_norm=1e-6))
    said = "the parameter layer.bias was written in a forward pass since the last step.*Remove the write"
    with pytest.raises(RuntimeError if how == "in place" else ValueError, match="inplace operation" if how == "in place" else said):
        private.backward(model(x_of(16, 3)).square().sum(1))  # torch sees what is written past no count of its own
    with pytest.raises(ValueError, match=said):
        private.step()
    private.zero_grad()
    private.backward(model.layer(x_of(16, 3)).square().sum(1))  # without the model's own call too
    private.detach()
    model.begun = False
    optimizer, before = make_zeroth_order(model, plan_for_tests(noise_multiplier=1.0), 0.1), model.layer.weight.detach().clone()
    optimizer._probe.schedule.due = False  # not a step that is looked at
    with pytest.raises(ValueError, match="the parameter layer.bias was written in a forward pass"):
        optimizer.step([x_of(16, 3)], lambda m, x: m(x).square().sum(1))
    torch.testing.assert_close(model.layer.weight.detach(), before)


def test_a_write_after_the_last_backward_pass_is_found_before_the_release():
    model = Tracked("none")
    private = private_sgd(model)
    losses = model(x_of(4, 3)).square().sum(1)
    private.backward(losses)
    model.layer.bias.data.add_(losses.detach().mean())
    with pytest.raises(ValueError, match="the parameter layer.bias was written"):
        private.step()


def test_of_many_parameters_a_sample_is_read_and_every_count(monkeypatch):
    """What is written through ``.data`` in every step is found in some step; a write that torch counts, in its own."""
    monkeypatch.setattr(model_checks, "_MOST_READ", 2)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    watched = model_checks.WatchedPasses(model, {p: name for name, p in model.named_parameters()})

    def found(write):
        watched.forget()
        watched.note()
        write()
        try:
            watched.check()
        except ValueError as error:
            return "the parameter 2.bias was written" in str(error)
        return False

    assert 0 < sum(found(lambda: model[2].bias.data.add_(1)) for _ in range(60)) < 40  # 1 in 6
    with torch.no_grad():
        assert all(found(lambda: model[2].bias.add_(1)) for _ in range(10))
    assert not any(found(lambda: None) for _ in range(10))
    watched.forget()
    watched.check()


class Memory(nn.Module):
    """Keeps a moving mean of its batches where no state_dict shows it."""

    def __init__(self, where):
        super().__init__()
        self.layer, self.where = nn.Linear(3, 2), where
        self.mean = {"attribute": torch.zeros(3), "list": [torch.zeros(3)], "tuple": (torch.zeros(3),), "dict": {"x": torch.zeros(3)},
                     "data": torch.zeros(3)}[where]

    def forward(self, x):
        kept = self.mean if isinstance(self.mean, torch.Tensor) else self.mean["x" if self.where == "dict" else 0]
        y, now = self.layer(x - kept), 0.5 * kept + 0.5 * x.detach().mean(0)
        if self.where in ("list", "dict"):
            self.mean[0 if self.where == "list" else "x"] = now
        elif self.where == "data":
            self.mean.data.copy_(now)
        else:
            self.mean = (now,) if self.where == "tuple" else now
        return y


@pytest.mark.parametrize("where", ["attribute", "list", "tuple", "dict", "data"])
def test_a_batch_that_is_kept_in_a_plain_attribute_is_found(where):
    """An example of the first step would move the second step's sum by 13 C."""
    model = Memory(where)
    private = private_sgd(model)
    with pytest.raises(ValueError, match="the attribute mean.* was written in a forward pass since the last step.*delete it after"):
        private.backward(model(5 + x_of(8, 3)).square().sum(1))
    private.detach()
    optimizer = make_zeroth_order(model, plan_for_tests(noise_multiplier=1.0), 0.1)
    optimizer._probe.schedule.due = False
    with pytest.raises(ValueError, match="the attribute mean.* was written in a forward pass"):
        optimizer.step([x_of(8, 3)], lambda m, x: m(x).square().sum(1))


class Caching(nn.Module):
    """What may be kept: a table that appears, grows and is made anew; a number that the user anneals; a count of steps; a mask that is
    expanded; what is deleted after each step."""

    def __init__(self):
        super().__init__()
        self.layer, self.table, self.heat, self.names = nn.Linear(3, 2), None, torch.ones(()), ["a", "b"]
        self.calls = torch.zeros((), dtype=torch.long)
        self.weights = [self.layer.weight]  # no copy
        self.mask = torch.ones(1, 5).expand(1000, 5)

    def forward(self, x):
        self.table = torch.arange(max(len(x), 0 if self.table is None else len(self.table)), dtype=torch.float32)
        self.calls = self.calls + 1
        out = self.layer(x / self.heat)
        self.seen = out.detach()
        return out + 0 * self.table[:len(x), None]


def test_caches_schedules_and_outputs_are_let_be():
    model = Caching()
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    for step, size in enumerate((3, 3, 5, 4, 4)):
        model.heat = torch.tensor(1.0 + step)
        private.backward(model(x_of(size, 3, seed=step)).square().sum(1))
        private.step()
        with torch.no_grad():
            model(x_of(size, 3, seed=9))
        del model.seen
    private.backward(model(x_of(4, 3)).square().sum(1))
    private.zero_grad()
    with pytest.raises(ValueError, match="the attribute seen was written"):
        private.backward(model(x_of(4, 3, seed=1)).square().sum(1))


# --------------------------------------------------------------------------------------------- what goes on as before
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_weights_loaded_between_steps_are_no_write(clipping):
    """Before the next forward pass, evaluations in between or not, or after a word."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    private, start = private_sgd(model, plan_for_tests(noise_multiplier=1.0), clipping=clipping), None
    for step in range(4):
        for micro_batch in range(2):
            private.backward(model(x_of(4, 3)).square().sum(1))
        private.step()
        start = start or {name: t.clone() for name, t in model.state_dict().items()}
        with torch.no_grad():
            model(x_of(4, 3))
        model.load_state_dict(start)
    model(x_of(4, 3))  # a forward pass of ones own, with a gradient
    model.load_state_dict({name: t + 1 for name, t in start.items()})
    private.zero_grad()
    private.backward(model(x_of(4, 3)).square().sum(1))
    private.step()


def test_weights_of_ones_own_go_on_after_a_word():
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))

    def step():
        private.backward(model(x_of(4, 3)).square().sum(1))
        private.step()

    step()
    state = private.state_dict()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ValueError, match="0.weight was written"):
        private.backward(model(x_of(4, 3)).square().sum(1))
    private.sampler.note_buffers()
    step()
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0))
    private.load_state_dict(state)  # a resume writes everything
    step()
    model = private.detach()
    private = private_sgd(model.requires_grad_(True), plan_for_tests(noise_multiplier=1.0))  # thawed
    step()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_ordinary_models_are_not_accused(family):
    """Rotary and position buffers, frozen weights, evaluation in between; both ways of training."""
    task = "classification" if family == "bert" else "causal_lm"
    model = tiny(family, task)
    for parameter in list(model.parameters())[:-3]:
        parameter.requires_grad_(False)
    model.get_output_embeddings() if task == "classification" else model.get_output_embeddings().requires_grad_(True)
    private = private_sgd(model, plan_for_tests(noise_multiplier=1.0), lr=1e-3)
    for tokens in (5, 9):
        private.backward(plain_losses(model, padded_batch(model, task, tokens=tokens)))
        private.step()
        with torch.no_grad():
            plain_losses(model.eval(), padded_batch(model, task, tokens=12))
        model.train()
    private.detach()
    optimizer = make_zeroth_order(model, plan_for_tests(noise_multiplier=1.0), 1e-3)
    for tokens in (5, 9, 12):
        optimizer.step([padded_batch(model, task, tokens=tokens)], plain_losses)


def test_the_same_value_written_again_is_no_write():
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.arange(4.0))
    watched = WatchedBuffers(model)
    model.table.copy_(torch.arange(4.0))
    watched.check()
    model.table = torch.arange(4.0)  # a rotary table computed anew
    watched.check()
    model.table = torch.arange(5.0)
    with pytest.raises(ValueError, match="the buffer table"):
        watched.check()


@pytest.mark.parametrize("kind", ["meta", "fake", "inference"])
def test_tensors_without_numbers_or_without_a_count(kind):
    if kind == "fake":
        with FakeTensorMode():
            model = nn.Linear(3, 2).requires_grad_(False)
    elif kind == "meta":
        model = nn.Linear(3, 2, device="meta").requires_grad_(False)
    else:
        with torch.inference_mode():
            model = nn.Linear(3, 2).requires_grad_(False)
    watched = WatchedBuffers(model)
    watched.check()
    with torch.inference_mode(kind == "inference"):
        model.weight.detach().zero_()
    with pytest.raises(ValueError, match="the frozen parameter weight"):
        watched.check()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32,
                                   torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn])
def test_one_changed_number_of_any_type_shows(dtype):
    for size in (1, 7, model_checks._SAMPLE):
        tensor = torch.zeros(size, dtype=dtype)
        before = model_checks._fingerprints([tensor])
        tensor.data[size - 1] = 1
        assert model_checks._fingerprints([tensor]) != before
    strange = torch.full((3, 4), float("nan")).t()  # neither finite nor contiguous
    assert model_checks._fingerprints([strange]) == model_checks._fingerprints([strange.clone()])


def test_a_large_backbone_costs_a_sample():
    """Two thousand numbers a tensor, whatever its size: no copy of it, and sums that no order of adding rounds."""
    tensor = torch.full((2**22,), -1.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        ((_, _, total),) = model_checks._fingerprints([tensor])
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 100_000
    assert abs(total) < 2**53 and total == int(total)


def test_a_frozen_layer_is_not_watched_twice_as_it_thaws():
    """What was frozen and trains now is named by the check of the parameters."""
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    sampler = GradSampler(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="trainable parameters appeared after make_private: 0.weight"):
        sampler.check_parameters()
    sampler.detach()
