"""`feature_cache`: the same losses and gradients as without it, for every architecture; and never a stale or broken file."""

import json
from pathlib import Path

import pytest
import torch

from memarc_utils import feature_cache
from memarc_utils.batch_selection import pad_rows
from memarc_utils.feature_cache import CachedFeatures, cache_bytes, cache_features, side_of
from memarc_utils.side_network import SideNetworkConfig, attach_side_network
from memarc_utils.zeroth_order import make_zeroth_order
from tests.models import CASE_IDS, CASES, loop_gradients, plain_losses, plan_for_tests, private_sgd, seeded, shake, tiny

DOWNSAMPLES = ("learned", "low_rank", "pooled", "orthogonal")


class Rows(list):
    """Rows of 3 to 9 tokens."""

    def __init__(self, task="classification", count=11, seed=0):
        generator = seeded(seed)
        for i in range(count):
            ids = torch.randint(3, 101, (3 + i % 7,), generator=generator).tolist()
            super().append({"input_ids": ids, "labels": i % 2 if task == "classification" else ids})


def model_of(case=CASES[0], seed=0, **config):
    return shake(attach_side_network(tiny(*case, seed=seed), SideNetworkConfig(**{**dict(reduction=4, heads=2), **config})))


def losses(model, rows):
    return plain_losses(model, pad_rows(rows, getattr(model.config, "pad_token_id", 0) or 0))


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASE_IDS)
def test_the_same_losses_and_gradients_without_the_backbone(number, tmp_path):
    """To the precision of bfloat16 features; and the backbone does not run."""
    case, downsample = CASES[number], DOWNSAMPLES[number % 4]
    model, rows = model_of(case, downsample=downsample), Rows(case[1])
    cached = cache_features(model, rows, batch_size=4, folder=tmp_path)
    want, plain = losses(model, list(rows)), list(rows)
    side_of(model).backbone.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    got = losses(model, [cached[i] for i in range(len(cached))])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.detach().mean()))
    private = private_sgd(model)
    private.backward(losses(model, [cached[i] for i in range(4)]))
    private.step()
    assert len(cached) == len(plain) == 11


def test_a_batch_stands_in_bfloat16_and_the_final_state_is_exact(tmp_path):
    """The final state's float32 numbers travel as pairs of bfloat16, bit for bit, the taps are views of the batch, and a batch that
    was converted on the way is refused: its final states would be other numbers."""
    odd = SideNetworkConfig(downsample="pooled", reduction=16, heads=1)  # 3 channels of 3 taps
    for model in (model_of(), shake(attach_side_network(tiny("bert", hidden=48), odd))):
        rows = list(Rows())
        cached, side = cache_features(model, rows, batch_size=4, folder=tmp_path), side_of(model)
        batch = pad_rows([cached[i] for i in range(4)], 0)
        embeds = batch["inputs_embeds"]
        assert embeds.dtype == torch.bfloat16 and embeds.shape[-1] == 2 * side.width + len(side.taps) * side.tapped_width
        outputs, features = side._unpack(embeds)
        assert all(t.untyped_storage().data_ptr() == embeds.untyped_storage().data_ptr() for t in features.values())
        row = cached[2]["input_ids"]
        with torch.no_grad():
            final = side.cacheable_features(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))[1]
        torch.testing.assert_close(outputs.last_hidden_state[2, :len(row)], final[0], rtol=1e-5, atol=1e-6)
        stored = torch.from_numpy(cached._shards[0][1][cached._starts[2]:cached._starts[3]].copy())
        assert torch.equal(outputs.last_hidden_state[2, :len(row)], stored)
        with pytest.raises(ValueError, match="cached features came as torch.float32: give inputs_embeds as cache_features made them"):
            plain_losses(model, {**batch, "inputs_embeds": embeds.float()})


def test_the_second_text_of_a_pair_is_read_as_such(tmp_path):
    """Types of tokens belong to the features and to the cache's name."""
    model, rows = model_of(), list(Rows())
    pairs = [{**row, "token_type_ids": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in rows]
    cached = cache_features(model, pairs, batch_size=4, folder=tmp_path)
    other = cache_features(model, [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows], batch_size=4, folder=tmp_path)
    want, got, wrong = (losses(model, [rows[i] for i in range(11)]) for rows in (pairs, cached, other))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.detach().mean()))
    assert cached.folder != other.folder and not torch.allclose(wrong, want, rtol=0, atol=3e-3 * float(want.detach().mean()))


def test_features_of_a_row_that_was_replaced_are_not_given_out(tmp_path):
    rows = Rows()
    cached = cache_features(model_of(), rows, folder=tmp_path)
    cached[3]
    rows[3] = {**rows[3], "input_ids": rows[3]["input_ids"][::-1]}
    with pytest.raises(ValueError, match="row 3 has other tokens than when its features were computed"):
        cached[3]
    with pytest.raises(ValueError, match="row 0 is padded"):
        cache_features(model_of(), [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": 0}], folder=tmp_path)


def test_the_start_is_exact(tmp_path):
    """The final states stay in float32: before training the cached model gives the pre-trained logits, bit for bit but for the
    padding's effect on the order of sums."""
    for case in (CASES[0], CASES[3]):
        plain, rows = tiny(*case), Rows(case[1])
        with torch.no_grad():
            want = losses(plain, list(rows)[:1])
            model = attach_side_network(plain, SideNetworkConfig(reduction=4, heads=2))
            cached = cache_features(model, rows, batch_size=1, folder=tmp_path / case[0])
            assert torch.equal(losses(model, [cached[0]]), want)


def test_gradients_of_a_side_network_in_float64_are_those_of_a_loop_on_cached_rows(tmp_path):
    model, rows = model_of(downsample="orthogonal", gate="vector", mix="gated"), Rows()
    cached = cache_features(model, rows, folder=tmp_path)
    batch = pad_rows([cached[i] for i in range(4)])
    want = loop_gradients(model, batch)
    private = private_sgd(model)
    private.sampler.backward(plain_losses(model, batch), torch.ones_like)
    for name, got in private.clipped_sum().items():
        torch.testing.assert_close(got, want[name].sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [dict(seed=1), dict(downsample="pooled"), dict(layers=2), dict(reduction=2, downsample="pooled")])
def test_another_backbone_or_config_or_data_set_has_another_cache(change, tmp_path):
    model, rows = model_of(), Rows()
    first = cache_features(model, rows, folder=tmp_path).folder
    assert cache_features(model_of(block="mlp", gate="none"), rows, folder=tmp_path).folder == first  # the ladder is not in it
    assert cache_features(model_of(**change), rows, folder=tmp_path).folder != first
    assert cache_features(model, Rows(seed=1), folder=tmp_path).folder != first
    assert cache_features(model, Rows(count=10), folder=tmp_path).folder != first


def test_what_shows_in_no_weight_has_another_cache(tmp_path):
    """A whole orthogonal projection keeps width and weights; so do the number of heads, the activation and autocast."""
    rows, model = Rows(), model_of(reduction=1)
    folders = {cache_features(model, rows, folder=tmp_path).folder, cache_features(model_of(reduction=1, downsample="orthogonal"), rows,
                                                                                  folder=tmp_path).folder}
    for change in ({"num_attention_heads": 1}, {"hidden_act": "relu"}):
        other = model_of(reduction=1)
        for name, value in change.items():
            setattr(side_of(other).config, name, value)
        folders.add(cache_features(other, rows, folder=tmp_path).folder)
    with torch.autocast("cpu", torch.bfloat16):
        folders.add(cache_features(model, rows, folder=tmp_path).folder)
    assert len(folders) == 5


def test_other_code_has_another_cache(tmp_path, monkeypatch):
    """Else a recheck of a method that reads features would find the numbers of the code that it was to be checked against."""
    model, rows, read = model_of(), Rows(), Path.read_bytes
    folders = [cache_features(model, rows, folder=tmp_path).folder]
    for module in ("backbones", "feature_cache", "side_blocks", "side_network"):
        monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b" " if path.stem == module else b""))
        folders.append(cache_features(model, rows, folder=tmp_path).folder)
    monkeypatch.setattr(Path, "read_bytes", read)
    assert cache_features(model, rows, folder=tmp_path).folder == folders[0]
    monkeypatch.setattr(feature_cache.transformers, "__version__", "0.0")
    folders.append(cache_features(model, rows, folder=tmp_path).folder)
    assert len(set(folders)) == 6


def test_a_file_of_another_size_is_refused(tmp_path):
    model, rows = model_of(), Rows()
    file = cache_features(model, rows, folder=tmp_path).folder / "final_0000.bin"
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ValueError, match="should hold the features of .* delete that folder and call cache_features again"):
        cache_features(model, rows, folder=tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="and holds .* and 0: delete"):
        cache_features(model, rows, folder=tmp_path)


def test_what_is_written_needs_no_second_room(tmp_path, monkeypatch):
    model, rows = model_of(), Rows()
    place = cache_features(model, rows, folder=tmp_path).folder
    (place / "complete.json").unlink()  # as if the run had been stopped at the end
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    cache_features(model, rows, folder=tmp_path)
    (place / "complete.json").unlink()
    (place / "final_0000.bin").unlink()  # a shard without it is written again, and its taps are no room won
    final = 4 * side_of(model).width * sum(len(row["input_ids"]) for row in rows)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": final}))
    with pytest.raises(ValueError, match="GB more and .* GB are free"):
        cache_features(model, rows, folder=tmp_path)
    monkeypatch.undo()
    cache_features(model, rows, folder=tmp_path)
    (place / "complete.json").unlink()
    (place / "taps_0000.bin").unlink()  # nor is the other half alone a shard
    assert len(cache_features(model, rows, folder=tmp_path)) == 11 and (place / "taps_0000.bin").is_file()


def test_an_interrupted_cache_goes_on_and_a_half_written_one_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_ROWS_PER_SHARD", 4)
    model, rows = model_of(), Rows()
    write, written = feature_cache._write_shard, []

    def interrupted(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments[-1])
        write(*arguments)

    monkeypatch.setattr(feature_cache, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, rows, folder=tmp_path)
    [place] = tmp_path.iterdir()
    assert not (place / "complete.json").exists()
    with pytest.raises(FileNotFoundError):
        CachedFeatures(rows, place)
    (place / "taps_0001.bin").unlink()
    (place / "final_0001.bin").unlink()  # as if the second shard had been cut off
    (place / ".final_0001.bin-half").write_bytes(b"half")
    written.clear()
    monkeypatch.setattr(feature_cache, "_write_shard", lambda *arguments: (written.append(arguments[-1]), write(*arguments)))
    cached = cache_features(model, rows, folder=tmp_path)
    assert written == [1, 2]  # the first was there
    want = losses(model, list(rows))
    torch.testing.assert_close(losses(model, [cached[i] for i in range(11)]), want, rtol=0, atol=2e-3)


def test_rows_are_read_in_any_order_and_the_size_is_as_planned(tmp_path):
    model, rows = model_of(), Rows()
    cached = cache_features(model, rows, folder=tmp_path, batch_size=3)
    side = side_of(model)
    for i in (7, 0, 10, 7):
        assert cached[i]["inputs_embeds"].shape == (len(rows[i]["input_ids"]), side.cached_width)
        assert cached[i]["labels"] == rows[i]["labels"]
    with pytest.raises(IndexError):
        cached[11]
    planned = cache_bytes(model, sum(len(row["input_ids"]) for row in rows))
    assert planned == sum(f.stat().st_size for f in cached.folder.glob("*.bin"))
    assert json.loads((cached.folder / "complete.json").read_text())["shards"] == 1


def test_what_cannot_be_kept_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no side network: call attach_side_network first"):
        cache_features(tiny("bert"), Rows(), folder=tmp_path)
    with pytest.raises(ValueError, match="the data set is empty"):
        cache_features(model_of(), [], folder=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got -5"):
        cache_features(model_of(), Rows(), batch_size=-5, folder=tmp_path)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match="GB more and .* GB are free: a frozen downsample .* is kept at side width"):
        cache_features(model_of(), Rows(), folder=tmp_path)


def test_zeroth_order_trains_on_a_cache(tmp_path):
    """The cache holds bfloat16, the losses are computed in float32."""
    model, rows = model_of(gate="none"), Rows()
    cached = cache_features(model, rows, folder=tmp_path)
    optimizer = make_zeroth_order(model, plan_for_tests(), learning_rate=1e-3)
    optimizer.step([pad_rows([cached[i] for i in range(4)])], plain_losses)
    assert optimizer.steps_taken == 1
