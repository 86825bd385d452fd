"""Several processes, one private run: two gloo ranks against one process, empty local batches, and what is refused."""

import datetime
import io
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from memarc_utils.accounting import PrivacyPlan
from memarc_utils.batch_selection import poisson_batches, shuffled_batches
from memarc_utils.dp_sgd import make_private

PLAN = PrivacyPlan(dataset_size=40, expected_batch_size=8, num_steps=4, noise_multiplier=0.7, max_grad_norm=0.5, delta=1e-3)


class Data:
    """Forty examples; a thin stand-in for a data set, which every rank can read as a whole."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(40, 6, generator=generator), torch.randint(0, 2, (40,), generator=generator)

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": int(self.y[i])}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def run(clipping="flat", seed=0, plan=PLAN, sampling_seed=1):
    """Four private steps; returns the weights, and how many examples this process clipped in each."""
    model = network(seed)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), plan, clipping=clipping,
                           noise_generator=torch.Generator().manual_seed(5))
    counts = []
    for batch in poisson_batches(Data(), plan, 3, generator=torch.Generator().manual_seed(sampling_seed)):
        counts.append(len(batch))
        for micro_batch in batch:
            private.backward(F.cross_entropy(model(micro_batch["x"]), micro_batch["labels"], reduction="none"))
        private.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), counts


def same_as_one_process(rank, clipping):
    return run(clipping, seed=rank)  # ranks start from other weights: rank 0's count


def empty_on_one_rank(rank):
    """Four examples, q = 1/4: batches that are empty on one rank, or on both, still take their step everywhere."""
    plan = PrivacyPlan(dataset_size=40, expected_batch_size=1, num_steps=6, noise_multiplier=0.7, max_grad_norm=0.5,
                       delta=1e-3)
    return run(plan=plan, sampling_seed=2)


def one_rank_fails(rank):
    model = network(0)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    if rank == 1:
        model(torch.ones(2, 6)).sum().backward()
    else:
        private.backward(model(torch.ones(2, 6)).sum(1))
    with pytest.raises(ValueError) as error:
        private.step()
    return str(error.value)


def trained_on_one_rank_only(rank):
    """A parameter that only one rank's examples reach is trained; one that none reaches is named on both."""
    model = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1), "c": nn.Linear(3, 1)})
    model["c"].requires_grad_(False)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    private.backward(model["ab"[rank]](torch.ones(2, 3)).sum(1))
    private.step()
    private.detach()
    model["c"].requires_grad_(True)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    private.backward(model["ab"[rank]](torch.ones(2, 3)).sum(1))
    with pytest.raises(ValueError, match="no backward pass reached c.weight, c.bias"):
        private.step()
    return True


def other_parameters(rank):
    model = network(0)
    model[rank].requires_grad_(False)
    with pytest.raises(ValueError, match="the ranks train different parameters"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    plan = PrivacyPlan.from_dict({**PLAN.to_dict(), "max_grad_norm": 0.5 + rank})
    model = network(0)
    with pytest.raises(ValueError, match="the ranks have different plans"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), plan)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    private.steps_taken = 3 * rank
    with pytest.raises(ValueError, match=r"the ranks have taken \[0, 3\] steps"):
        private.step()
    wrapped = nn.parallel.DistributedDataParallel(network(0))
    with pytest.raises(ValueError, match="take the plain model, not DistributedDataParallel"):
        make_private(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.5), PLAN)
    return True


def draws_without_a_shared_generator(rank):
    """Each rank draws for its own examples; shuffled epochs hold each example once over the ranks."""
    drawn = [batch.indices for batch in poisson_batches(Data(), PLAN)]
    plan = PrivacyPlan.from_dict({**PLAN.to_dict(), "num_steps": 5, "sampling": "shuffled"})
    return drawn, [i for batch in shuffled_batches(Data(), plan) for i in batch.indices]


def resume(rank):
    """State taken and loaded on each rank; two ranks' state is refused by one process (the parent tries)."""
    model = network(0)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    private.step()
    state = private.state_dict()
    model = private.detach()
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    private.load_state_dict(state)
    private.step()
    return state


CASES = {"flat": (same_as_one_process, "flat"), "per_layer": (same_as_one_process, "per_layer"), "empty": (empty_on_one_rank,),
         "one fails": (one_rank_fails,), "trained": (trained_on_one_rank_only,), "unequal": (other_parameters,),
         "draws": (draws_without_a_shared_generator,), "resume": (resume,)}


def _worker(rank, store, connection):
    results = {}
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                                timeout=datetime.timedelta(seconds=60))
        for name, (function, *arguments) in CASES.items():
            results[name] = function(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:
        results["error"] = traceback.format_exc()
    buffer = io.BytesIO()
    torch.save(results, buffer)  # by value: shared tensors would be gone with this process
    connection.send_bytes(buffer.getvalue())


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Every case on two gloo ranks: name to (rank 0's result, rank 1's)."""
    context = multiprocessing.get_context("spawn")
    store, started = tmp_path_factory.mktemp("ranks") / "store", []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(rank, store, sender))
        process.start()
        started.append((process, receiver))
    results = [torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False) for _, receiver in started]
    for process, _ in started:
        process.join(30)
    assert not any("error" in result for result in results), results
    return {name: tuple(result[name] for result in results) for name in CASES}


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_two_ranks_equal_one_process(clipping, on_two_ranks):
    want, counts = run(clipping)
    (first, first_counts), (second, second_counts) = on_two_ranks[clipping]
    assert torch.equal(first, second)  # the ranks stay together to the last bit
    torch.testing.assert_close(first, want, rtol=1e-5, atol=1e-6)
    assert [a + b for a, b in zip(first_counts, second_counts)] == counts
    assert sum(first_counts) and sum(second_counts)


def test_ranks_stay_in_step_when_a_local_batch_is_empty(on_two_ranks):
    (first, first_counts), (second, second_counts) = on_two_ranks["empty"]
    assert torch.equal(first, second) and len(first_counts) == len(second_counts) == 6
    assert any((a == 0) != (b == 0) for a, b in zip(first_counts, second_counts))  # or nothing was tested
    torch.testing.assert_close(first, empty_on_one_rank(0)[0], rtol=1e-5, atol=1e-6)


def test_what_one_rank_refuses_all_refuse(on_two_ranks):
    first, second = on_two_ranks["one fails"]
    assert first.startswith("another rank cannot step: a gradient reached") or "other than private.backward" in first
    assert "private.backward" in second


def test_parameters_count_as_trained_over_all_ranks(on_two_ranks):
    assert on_two_ranks["trained"] == (True, True)


def test_unequal_ranks_and_wrapped_models_are_refused(on_two_ranks):
    assert on_two_ranks["unequal"] == (True, True)


def test_each_rank_draws_for_its_own_examples(on_two_ranks):
    for rank, (drawn, epoch) in enumerate(on_two_ranks["draws"]):
        assert len(drawn) == 4 and all(i % 2 == rank for indices in drawn for i in indices)
        assert sorted(epoch) == list(range(rank, 40, 2))


def test_a_state_of_two_ranks_is_refused_by_one(on_two_ranks):
    states = on_two_ranks["resume"]
    private = make_private(model := network(0), torch.optim.SGD(model.parameters(), lr=0.5), PLAN)
    with pytest.raises(ValueError, match="ranks is 2 there and 1 here"):
        private.load_state_dict(states[0])
