"""What a deployment costs: rounding beside simulation and real merges, seconds and bytes beside hand counts, schedules."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import attached, gpt2, minilm

from cobra.deploy.cost import (
    SiteShape,
    Workload,
    merge_schedule,
    merge_seconds,
    predicted_rounding_loss,
    site_shapes,
    unmerged_cost,
)
from cobra.deploy.device import DEVICES, ITEMSIZE, DeviceSpec
from cobra.lora import LoraAdapter, LoraLayer
from cobra_kernels import merge_lora

# numbers that can be followed by hand: 1 FLOP and 1 byte a nanosecond, 1 µs a launch, no cache
ROUND = DeviceSpec("round", 1e9, 1e9, 1e9, 1e9, 1e9, 1e-6, 0)
FREE = dataclasses.replace(ROUND, name="free memory", bandwidth=1e30, launch=0.0)

sizes = st.integers(1, 3000)
site_shape = st.builds(
    SiteShape,
    st.just("site"),
    sizes,
    sizes,
    st.lists(st.integers(0, 80), min_size=1, max_size=6).map(tuple).filter(any),
    st.sampled_from(list(ITEMSIZE)),
)
unmerged = st.sampled_from(["packed", "padded"])
device = st.sampled_from(list(DEVICES.values()))


@pytest.mark.parametrize(("delta_std", "expected"), [(1e-4, 0.32), (3e-5, 0.70), (1e-5, 0.90)])
def test_rounding_loss_of_usual_weights(delta_std, expected):
    assert predicted_rounding_loss(0.02, delta_std, "bfloat16") == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("weight_std", [0.02, 1e-5, 0.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_loss_is_the_simulated_one(dtype, weight_std):
    """Ratios from a lost update to one that dwarfs the weight; 1e-5 lies below fp16's smallest normal number."""
    generator = torch.Generator().manual_seed(0)
    rounded = getattr(torch, dtype)
    weight = weight_std * torch.randn(2**18, dtype=torch.float64, generator=generator)
    weight = weight.to(rounded).double()
    unit = torch.randn(2**18, dtype=torch.float64, generator=generator)
    for ratio in (1e-8, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 0.1, 1.0, 10.0):
        delta = unit * ratio * (weight_std or 0.02)
        lost = ((weight + delta).to(rounded).double() - weight - delta).norm() / delta.norm()
        predicted = predicted_rounding_loss(weight_std, ratio * (weight_std or 0.02), dtype)
        assert predicted == pytest.approx(lost.item(), rel=0.02), ratio


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_loss_of_real_merges(dtype):
    """MiniLM's weights are no Gaussians and B A is none either: within 10 % all the same."""
    model, name = minilm().to(getattr(torch, dtype)), "bert.encoder.layer.0.intermediate.dense"
    weight = model.get_submodule(name).weight.detach()
    for scale in (3e-5, 3e-4, 3e-3):
        A, B = torch.randn(8, 384), torch.randn(1536, 8) * scale
        delta = B.double() @ A.double()
        lost = (merge_lora(weight, A, B).double() - weight.double() - delta).norm() / delta.norm()
        (site,) = site_shapes(model, [LoraAdapter({name: LoraLayer(A, B)})])
        assert site.rounding_loss == pytest.approx(lost.item(), rel=0.1), scale


@settings(deadline=None)
@given(st.floats(0, 1e300), st.floats(0, 1e300), st.sampled_from(list(ITEMSIZE)))
def test_rounding_loss_is_a_share(weight_std, delta_std, dtype):
    """From 0 to all of the update, whatever the numbers."""
    largest = torch.finfo(getattr(torch, dtype)).max / 8
    weight_std, delta_std = min(weight_std, largest), min(delta_std, largest)
    assert 0 <= predicted_rounding_loss(weight_std, delta_std, dtype) <= 1 + 1e-9


def test_rounding_loss_falls_with_the_update():
    losses = [predicted_rounding_loss(0.02, 1e-7 * 1.2**i, "bfloat16") for i in range(80)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0.99 and losses[-1] < 0.02


def test_no_update_loses_nothing():
    assert predicted_rounding_loss(0.02, 0.0, "bfloat16") == 0.0


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e6, "0.02"])
def test_rounding_loss_of_bad_spreads(bad):
    with pytest.raises(ValueError, match=r"weight_std=.*: expected a number from 0 to the largest float16"):
        predicted_rounding_loss(bad, 1e-4, "float16")


def test_packed_by_hand():
    """K 3 -> N 5, ranks 2 and 4 of fp32, 6 tokens: 3 each, 4 products, ranks count 16 in FLOPs."""
    cost = unmerged_cost(SiteShape("s", 3, 5, (2, 4), "float32"), ROUND, Workload(6), "packed")
    assert cost.stored == 4 * 6 * (3 + 5)
    shrink = [4 * (r * 3 + 3 * r + 3 * 3) for r in (2, 4)]  # A, x Aᵀ, x
    expand = [4 * (r * 5 + 3 * r + 2 * 3 * 5) for r in (2, 4)]  # B, x Aᵀ, y twice
    assert cost.moved == sum(shrink) + sum(expand)
    seconds = [max(2 * 3 * 16 * width, traffic) for width, both in ((3, shrink), (5, expand)) for traffic in both]
    assert cost.seconds == pytest.approx(sum(seconds) * 1e-9 + 4e-6)


def test_padded_by_hand():
    """The same at the largest rank in two launches."""
    cost = unmerged_cost(SiteShape("s", 3, 5, (2, 4), "float32"), ROUND, Workload(6), "padded")
    assert cost.stored == 4 * 2 * 4 * (3 + 5)
    shrink, expand = 4 * (4 * 3 + 3 * 4 + 3 * 3), 4 * (4 * 5 + 3 * 4 + 2 * 3 * 5)
    assert cost.moved == 2 * (shrink + expand)
    assert cost.seconds == pytest.approx(2 * (max(288, shrink) + max(480, expand)) * 1e-9 + 2e-6)


def test_roofline_has_two_sides():
    """Where memory is free FLOPs count, where they are free bytes count."""
    site = SiteShape("s", 64, 64, (16,), "float32")
    assert unmerged_cost(site, FREE, Workload(8), "packed").seconds == pytest.approx(2 * 2 * 8 * 16 * 64 * 1e-9)
    fast = dataclasses.replace(ROUND, float32=1e30, launch=0.0)
    cost = unmerged_cost(site, fast, Workload(8), "packed")
    assert cost.seconds == pytest.approx(cost.moved * 1e-9)


def test_activations_in_the_cache_stay_there():
    """x and y are 8 × 64 fp32, 2 KiB each: half of 4 KiB holds them, and matrices move alone."""
    site, load = SiteShape("s", 64, 64, (16,), "float32"), Workload(8)
    streamed, held = (unmerged_cost(site, dataclasses.replace(ROUND, cache=c), load, "packed").moved for c in (4095, 4096))
    assert streamed - held == 3 * 8 * 64 * 4


def test_only_adapters_in_flight_take_time():
    """Those of largest rank, so that the prediction holds for any."""
    site = SiteShape("s", 64, 64, (4, 0, 32), "float32")
    one = unmerged_cost(site, ROUND, Workload(6, adapters=1), "packed")
    assert one.seconds == unmerged_cost(SiteShape("s", 64, 64, (32,), "float32"), ROUND, Workload(6), "packed").seconds
    assert one.stored == unmerged_cost(site, ROUND, Workload(6), "packed").stored == 36 * 128 * 4


def test_adapters_without_rank_launch_nothing():
    site = SiteShape("s", 8, 8, (4, 0, 0), "float32")
    assert 2e-6 < unmerged_cost(site, dataclasses.replace(ROUND, bandwidth=1e30), Workload(3), "packed").seconds < 3e-6


def test_fewer_tokens_than_adapters():
    """One token is one adapter's."""
    site = SiteShape("s", 8, 8, (4,) * 5, "float32")
    assert unmerged_cost(site, ROUND, Workload(1), "packed").seconds < 3e-6


def test_grouped_devices_launch_once():
    site = SiteShape("s", 8, 8, (4,) * 5, "float32")
    apart, grouped = (unmerged_cost(site, dataclasses.replace(ROUND, grouped=g), Workload(5), "packed") for g in (False, True))
    assert apart.seconds - grouped.seconds == pytest.approx(8e-6)


@given(site_shape, device, unmerged, st.integers(1, 5000), st.floats(1, 100))
def test_more_bandwidth_is_never_slower(site, device, choice, tokens, factor):
    faster = dataclasses.replace(device, bandwidth=device.bandwidth * factor)
    load = Workload(tokens)
    assert unmerged_cost(site, faster, load, choice).seconds <= unmerged_cost(site, device, load, choice).seconds
    assert merge_seconds(site, faster, 2**20) <= merge_seconds(site, device, 2**20)


@given(site_shape, device, unmerged, st.integers(1, 5000), st.data())
def test_larger_rank_is_never_cheaper(site, device, choice, tokens, data):
    ranks = list(site.ranks)
    ranks[data.draw(st.integers(0, len(ranks) - 1))] += data.draw(st.integers(1, 100))
    larger = dataclasses.replace(site, ranks=tuple(ranks))
    small, large = (dataclasses.astuple(unmerged_cost(s, device, Workload(tokens), choice)) for s in (site, larger))
    assert all(a <= b * (1 + 1e-12) for a, b in zip(small, large, strict=True))
    assert merge_seconds(site, device, 2**20) <= merge_seconds(larger, device, 2**20)


@given(site_shape, device, st.integers(1, 5000))
def test_padding_stores_and_moves_no_less(site, device, tokens):
    packed, padded = (unmerged_cost(site, device, Workload(tokens), choice) for choice in ("packed", "padded"))
    assert packed.stored <= padded.stored and packed.moved <= padded.moved
    if len(site.ranks) == 1:
        assert packed == padded


def test_merge_seconds_by_hand():
    """bf16 4 × 8 in fp32 sums of two rows: cast, add, round back for each of four pieces."""
    site = SiteShape("s", 4, 8, (3,), "bfloat16")
    assert merge_seconds(site, ROUND, 2 * 4 * 4) == pytest.approx(max(2 * 16 * 32, (2 + 4 + 4 + 4 + 4 + 2) * 32) * 1e-9 + 12e-6)


sites_to_merge = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 200), st.sampled_from(list(ITEMSIZE))), max_size=12)


@given(sites_to_merge, st.integers(50 * 8, 20_000))
def test_chunks_cover_every_row_once_under_the_cap(shapes, workspace):
    sites = {f"s{i}": SiteShape(f"s{i}", K, N, (4,), dtype) for i, (K, N, dtype) in enumerate(shapes)}
    schedule = merge_schedule(list(sites.values()), workspace)
    rows = Counter()
    for chunk in schedule.chunks:
        assert 0 < chunk.workspace <= workspace
        assert len({sites[piece.site].dtype for piece in chunk.pieces}) == 1
        widths = [(p.row_stop - p.row_start, sites[p.site]) for p in chunk.pieces]
        assert chunk.workspace == sum(n * s.in_features * max(4, s.itemsize) for n, s in widths)
        rows.update((p.site, row) for p in chunk.pieces for row in range(p.row_start, p.row_stop))
    assert rows == Counter((name, row) for name, site in sites.items() for row in range(site.out_features))


def test_sites_that_fit_are_whole_and_like_sites_are_neighbours():
    shapes = [(8, 4), (2, 4), (8, 4), (2, 4)]
    sites = [SiteShape(f"s{i}", K, N, (4,), "bfloat16") for i, (K, N) in enumerate(shapes)]
    chunks = merge_schedule(sites, 8 * 4 * 4 * 2).chunks
    assert [[(p.site, p.row_start, p.row_stop) for p in chunk.pieces] for chunk in chunks] == [
        [("s1", 0, 4), ("s3", 0, 4), ("s0", 0, 4)],
        [("s2", 0, 4)],
    ]


def test_workspace_below_one_row_is_refused():
    """The widest row says what is needed."""
    sites = [SiteShape("narrow", 10, 2, (1,), "bfloat16"), SiteShape("wide", 100, 2, (1,), "float64")]
    with pytest.raises(ValueError, match="workspace=799 is less than one row of wide; give at least 800 bytes"):
        merge_schedule(sites, 799)
    assert merge_schedule(sites, 800).chunks


def test_a_schedule_merges_a_real_model():
    """Followed piece by piece it gives the weights that one merge of each layer gives."""
    model = minilm().bfloat16()
    names = [f"bert.encoder.layer.0.{name}.dense" for name in ("attention.output", "intermediate", "output")]
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    adapter = {n: LoraLayer(torch.randn(4, w.shape[1]), torch.randn(w.shape[0], 4) * 0.01) for n, w in weights.items()}
    found = {name: torch.full_like(w, math.nan) for name, w in weights.items()}
    schedule = merge_schedule(site_shapes(model, [LoraAdapter(adapter)]), 500_000)
    assert len(schedule.chunks) > len(names)
    for piece in (piece for chunk in schedule.chunks for piece in chunk.pieces):
        rows, layer = slice(piece.row_start, piece.row_stop), adapter[piece.site]
        found[piece.site][rows] = merge_lora(weights[piece.site][rows], layer.lora_A, layer.lora_B[rows])
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], merge_lora(weight, adapter[name].lora_A, adapter[name].lora_B))


def layer(K: int, N: int, rank: int) -> LoraLayer:
    return LoraLayer(torch.randn(rank, K), torch.randn(N, rank))


def test_site_shapes_of_a_real_model():
    """In the model's order; 0 where an adapter leaves a layer alone; spreads as the dense product has them."""
    model = minilm()
    query, down = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.3.output.dense"
    first = LoraAdapter({down: layer(1536, 384, 5), query: layer(384, 384, 3)})
    second = LoraAdapter({query: layer(384, 384, 0), down: layer(1536, 384, 2)})
    sites = site_shapes(model, [first, second])
    assert [(s.name, s.in_features, s.out_features, s.ranks, s.dtype) for s in sites] == [
        (query, 384, 384, (3, 0), "float32"),
        (down, 1536, 384, (5, 2), "float32"),
    ]
    for site in sites:
        assert site.weight_std == pytest.approx(model.get_submodule(site.name).weight.square().mean().sqrt().item(), rel=1e-5)
        for adapter, std in zip((first, second), site.delta_std, strict=True):
            dense = adapter.layers[site.name].lora_B @ adapter.layers[site.name].lora_A
            assert std == pytest.approx(dense.square().mean().sqrt().item(), rel=1e-5)


def test_site_shapes_of_conv1d():
    """transformers' Conv1D keeps (K, N)."""
    name = "transformer.h.0.mlp.c_fc"
    (site,) = site_shapes(gpt2(), [LoraAdapter({name: layer(32, 128, 4)}, transposed=True)])
    assert (site.in_features, site.out_features) == (32, 128)


def test_site_shapes_before_training():
    """A rank plan has no matrices, a model on the meta device no weights."""
    model, adapter = attached()
    plan = adapter.extract()
    adapter.detach()
    sites = site_shapes(model, [plan])
    assert {s.name: s.ranks for s in sites} == {name: (rank,) for name, rank in plan.ranks.items()}
    assert all(s.delta_std is None and s.weight_std > 0 and s.rounding_loss is None for s in sites)
    assert all(s.weight_std is None for s in site_shapes(model.to("meta"), [plan]))


def test_site_shapes_refuses_what_does_not_fit():
    model = gpt2()
    with pytest.raises(ValueError, match=r"mlp\.cfc' is no module of the model \(did you mean .*h\.0\.mlp\.c_fc"):
        site_shapes(model, [LoraAdapter({"transformer.h.0.mlp.cfc": layer(32, 128, 4)})])
    with pytest.raises(ValueError, match=r"c_fc: lora_A \(4, 128\) and lora_B \(32, 4\) do not fit weight \(128, 32\)"):
        site_shapes(model, [LoraAdapter({"transformer.h.0.mlp.c_fc": layer(128, 32, 4)})])
    with pytest.raises(ValueError, match=r"transformer\.wte is a Embedding; expected a plain nn.Linear or Conv1D"):
        site_shapes(model, [LoraAdapter({"transformer.wte": layer(32, 96, 4)})])
    with pytest.raises(ValueError, match="no adapters"):
        site_shapes(model, [])


def test_layers_with_adapters_on_them_are_refused():
    model, adapter = attached()
    with pytest.raises(ValueError, match=r"is a CobraLinear; .* merge or detach first"):
        site_shapes(model, [adapter.extract()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": -1}, "q: in_features=-1: expected an integer of at least 1"),
        ({"out_features": 0}, "q: out_features=0: expected an integer of at least 1"),
        ({"in_features": 4.0}, "q: in_features=4.0: expected an integer"),
        ({"ranks": (4, -2)}, "q: rank=-2: expected an integer of at least 0"),
        ({"ranks": ()}, "q: ranks is empty"),
        ({"dtype": "bf16"}, "q: dtype='bf16' is not one of 'bfloat16', 'float16', 'float32', 'float64'"),
        ({"dtype": "float8"}, "did you mean"),
        ({"delta_std": (1e-4, 1e-4)}, "q: 2 delta_std for 1 ranks"),
        ({"weight_std": -0.1}, "q: a std of -0.1: expected a finite number of at least 0"),
    ],
)
def test_bad_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        SiteShape(**{"name": "q", "in_features": 8, "out_features": 8, "ranks": (4,), "dtype": "bfloat16"} | changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "tokens=0: expected an integer of at least 1"),
        ({"tokens": 4, "adapters": 0}, "adapters=0: expected an integer of at least 1"),
        ({"tokens": 4, "adapters": 8}, "adapters=8 in flight need as many tokens a step; tokens=4"),
    ],
)
def test_bad_workloads(given, message):
    with pytest.raises(ValueError, match=message):
        Workload(**given)
