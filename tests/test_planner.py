"""Decisions and their edges, choices of the caller, the table, the plan as a value."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import minilm

from cobra.deploy.cost import SiteShape, Workload, predicted_rounding_loss, site_shapes
from cobra.deploy.device import DEVICES, DeviceSpec
from cobra.deploy.planner import DeploymentPlan, plan_deployment
from cobra.lora import LoraAdapter, LoraLayer

H100 = DEVICES["H100"]
LONE = SiteShape("layers.0.q", 4096, 4096, (8,), "bfloat16", 0.02, (1e-4,))
LOSS = predicted_rounding_loss(0.02, 1e-4, "bfloat16")


def decide(site: SiteShape, tokens: int = 16, device: DeviceSpec | str = H100, **options):
    workload = Workload(tokens, long_lived=options.pop("long_lived", True))
    return plan_deployment([site], device, workload, **options).sites[0]


def test_tolerance_decides_a_merge():
    """At the predicted loss it is merged, a hair below no more."""
    merged, kept = decide(LONE, tolerance=LOSS), decide(LONE, tolerance=LOSS * (1 - 1e-9))
    assert (merged.choice, kept.choice) == ("merged", "packed")
    assert merged.rounding_loss == kept.rounding_loss == LOSS
    assert (merged.stored, merged.moved, merged.added_us) == (0, 0, 0.0) and merged.merge_us > 0
    assert kept.stored == 2 * 8 * 8192 and kept.added_us > 0 and kept.merge_us == 0
    assert "loses 0.33 of the update" in merged.reason
    assert "a merge would lose 0.33 of the update, more than 0.325" in kept.reason


def test_default_tolerance_keeps_a_small_update_out_of_bfloat16():
    assert decide(LONE).choice == "packed"
    assert decide(dataclasses.replace(LONE, dtype="float16")).choice == "merged"
    assert decide(dataclasses.replace(LONE, delta_std=(1e-3,))).choice == "merged"


def test_a_passing_adapter_is_not_merged():
    """The reason says when the merge would have paid."""
    site = dataclasses.replace(LONE, delta_std=(1e-3,))
    kept = decide(site, long_lived=False)
    merge_us = decide(site).merge_us
    assert kept.choice == "packed"
    steps = -(-merge_us // kept.added_us)
    assert kept.reason == f"a merge of {merge_us:,.1f} µs would pay after {steps:.0f} steps"


@pytest.mark.parametrize("unknown", [{"weight_std": None}, {"delta_std": None}])
def test_an_unknown_loss_is_not_risked(unknown):
    kept = decide(dataclasses.replace(LONE, **unknown), tolerance=1.0)
    assert (kept.choice, kept.rounding_loss) == ("packed", None)
    assert "needs weight_std and delta_std" in kept.reason


@pytest.mark.parametrize("ranks", [(0,), (0, 0, 0)])
def test_rank_0_is_the_base_layer(ranks):
    base = decide(dataclasses.replace(LONE, ranks=ranks, delta_std=None))
    assert (base.choice, base.stored, base.moved, base.added_us, base.merge_us) == ("base", 0, 0, 0.0, 0.0)


def test_padding_waste_decides_between_packed_and_padded():
    """Equal ranks are one product; a large rank among small ones is paid for eight times."""
    even = SiteShape("s", 4096, 4096, (16,) * 8, "bfloat16")
    uneven = dataclasses.replace(even, ranks=(1024, *(16,) * 7))
    assert decide(even, tokens=16384).choice == "padded"
    assert decide(uneven, tokens=16384).choice == "packed"
    assert decide(uneven, tokens=16384).reason.endswith("padding stores 7.21x the ranks")
    crossing = [decide(dataclasses.replace(even, ranks=(r, *(16,) * 7)), tokens=16384).choice for r in range(16, 1025, 16)]
    assert crossing == sorted(crossing, reverse=True)  # padded up to a rank, packed from it on


def test_launches_decide_between_packed_and_padded():
    """Where they cost nothing, padding has no advantage."""
    site = SiteShape("s", 4096, 4096, (16, 64), "bfloat16")
    assert decide(site).choice == "padded"
    assert decide(site, device=dataclasses.replace(H100, launch=0.0)).choice == "packed"
    assert decide(site, device=dataclasses.replace(H100, grouped=True)).choice == "packed"


def test_bytes_decide_between_equal_times():
    """Four adapters, one in flight: the same products at the same rank, in less storage."""
    site = SiteShape("s", 256, 256, (16, 16, 16, 4), "bfloat16")
    choice = plan_deployment([site], H100, Workload(16, adapters=1)).sites[0]
    assert choice.choice == "packed" and "packed 8.0 µs, padded 8.0 µs" in choice.reason


several = st.lists(st.lists(st.integers(0, 64), min_size=3, max_size=3).map(tuple), min_size=1, max_size=4)


@given(several, st.integers(1, 3000), st.sampled_from(list(DEVICES.values())), st.floats(1, 50))
def test_plans_are_pure_and_never_slower_with_more_bandwidth(ranks, tokens, device, factor):
    sites = [SiteShape(f"s{i}", 300 + i, 500, r, "bfloat16") for i, r in enumerate(ranks)]
    plan = plan_deployment(sites, device, Workload(tokens))
    assert plan == plan_deployment(sites, device, Workload(tokens))
    assert DeploymentPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    faster = plan_deployment(sites, dataclasses.replace(device, bandwidth=device.bandwidth * factor), Workload(tokens))
    assert faster.added_us <= plan.added_us
    for s in plan.sites:
        other = {"packed": "padded", "padded": "packed"}.get(s.choice)
        if other:
            forced = plan_deployment([s.site], device, Workload(tokens), fixed={s.site.name: other}).sites[0]
            assert (s.added_us, s.stored) <= (forced.added_us, forced.stored)


@given(several, st.integers(1, 3000), st.data())
def test_larger_ranks_never_make_a_plan_faster(ranks, tokens, data):
    larger = [tuple(r + data.draw(st.integers(0, 40)) for r in row) for row in ranks]
    plans = [
        plan_deployment([SiteShape(f"s{i}", 300, 500, r, "float32") for i, r in enumerate(rows)], "A100-80", Workload(tokens))
        for rows in (ranks, larger)
    ]
    assert plans[0].added_us <= plans[1].added_us * (1 + 1e-12)


def test_choices_of_the_caller_stand():
    forced = decide(LONE, fixed={LONE.name: "merged"})
    assert (forced.choice, forced.rounding_loss) == ("merged", LOSS)
    assert forced.reason == "fixed by the caller, against packed; a merge would lose 0.33 of the update, more than 0.1"
    assert plan_deployment([LONE], H100, Workload(1), fixed={LONE.name: "merged"}).merges.chunks
    padded = decide(dataclasses.replace(LONE, dtype="float16"), fixed={LONE.name: "padded"})
    assert padded.choice == "padded" and padded.reason.startswith("fixed by the caller, against merged; rounding loses")
    agreed = decide(LONE, fixed={LONE.name: "packed"})
    assert agreed.reason.startswith("fixed by the caller; a merge would lose")


@pytest.mark.parametrize(
    ("ranks", "choice", "message"),
    [
        ((8, 8), "merged", "q cannot be merged: a weight holds one adapter, there are 2; use packed or padded"),
        ((8, 0), "merged", "q cannot be merged: a weight holds one adapter"),
        ((8,), "base", "q cannot be base: that drops updates of rank 8"),
        ((0,), "merged", "q cannot be merged: no adapter has rank here"),
        ((0, 0), "padded", "q cannot be padded: no adapter has rank here"),
        ((8,), "merge", "q: fixed choice='merge' is not one of .* .did you mean 'merged'"),
    ],
)
def test_choices_that_cannot_be_are_refused(ranks, choice, message):
    with pytest.raises(ValueError, match=message):
        decide(SiteShape("q", 64, 64, ranks, "bfloat16"), fixed={"q": choice})


def test_fixed_names_must_be_sites():
    with pytest.raises(ValueError, match=r"fixed names 'layers.0.k', which is no site \(did you mean 'layers.0.q'\?\)"):
        decide(LONE, fixed={"layers.0.k": "packed"})


def test_bad_requests():
    with pytest.raises(ValueError, match=r"layers\.0\.q is the name of 2 sites"):
        plan_deployment([LONE, LONE], H100, Workload(1))
    two = SiteShape("layers.1.q", 64, 64, (8, 8), "bfloat16")
    with pytest.raises(ValueError, match=r"layers\.1\.q has ranks of 2 adapters, layers\.0\.q of 1; give rank 0"):
        plan_deployment([LONE, two], H100, Workload(1))
    with pytest.raises(ValueError, match="adapters=3 in flight; the sites have ranks of 2"):
        plan_deployment([two], H100, Workload(8, adapters=3))
    with pytest.raises(ValueError, match=r"device 'H10' is unknown \(did you mean 'H100'"):
        plan_deployment([two], "H10", Workload(1))
    for tolerance in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance=.*: expected a finite number of at least 0"):
            decide(LONE, tolerance=tolerance)
    with pytest.raises(ValueError, match="workspace=0: expected an integer of at least 1"):
        decide(LONE, workspace=0)


def test_workspace_counts_for_merged_sites_alone():
    with pytest.raises(ValueError, match=r"workspace=16,383 is less than one row of layers\.0\.q; give at least 16,384 bytes"):
        decide(LONE, tolerance=1.0, workspace=16_383)
    assert decide(LONE, workspace=16_383).choice == "packed"


def test_merged_rows_are_scheduled_once():
    sites = [dataclasses.replace(LONE, name=f"layers.{i}.q", dtype="float16", ranks=(4 * i,)) for i in range(3)]
    plan = plan_deployment(sites, H100, Workload(1), workspace=2**24)
    assert plan.choices == {"layers.0.q": "base", "layers.1.q": "merged", "layers.2.q": "merged"}
    pieces = [piece for chunk in plan.merges.chunks for piece in chunk.pieces]
    covered = [(p.site, row) for p in pieces for row in range(p.row_start, p.row_stop)]
    assert sorted(covered) == [(f"layers.{i}.q", row) for i in (1, 2) for row in range(4096)]
    assert all(chunk.workspace <= 2**24 for chunk in plan.merges.chunks)


def mixed_plan() -> DeploymentPlan:
    shapes = {"attn.q": (4096, 4096), "mlp.up": (4096, 11008)}
    sites = [
        SiteShape(f"layers.{i}.{name}", K, N, (8 if i < 3 else 0,), "bfloat16", 0.02, (1e-4 * (1 + 9 * (name == "mlp.up")),))
        for i in range(4)
        for name, (K, N) in shapes.items()
    ]
    return plan_deployment(sites, H100, Workload(64))


def test_table_explains_itself():
    plan = mixed_plan()
    text = plan.table()
    head, rows = text.split("\n\n")
    assert head.splitlines() == [
        "device    H100: 989 TFLOP/s bfloat16, 3,350 GB/s, 4 µs a launch",
        "workload  64 tokens a step, all adapters in flight, long-lived",
        "merges    at most 0.1 of an update lost to rounding; 3 chunks in 268,435,456 bytes of workspace",
    ]
    lines = rows.splitlines()
    assert re.split("  +", lines[0])[:6] == ["site", "sites", "shape", "dtype", "ranks", "choice"]
    assert re.split("  +", lines[0])[6:] == ["stored B", "moved B", "added µs", "merge µs", "lost", "why"]
    assert lines[1].startswith("layers.*.attn.q      3  4096 → 4096   bfloat16      8  packed")
    assert lines[1].endswith("0.33  a merge would lose 0.33 of the update, more than 0.1")
    assert lines[2].startswith("layers.*.mlp.up      3  4096 → 11008  bfloat16      8  merged")
    assert lines[3].startswith("layers.3.attn.q      1  4096 → 4096   bfloat16      0  base")
    assert lines[5].split() == [
        "total",
        "8",
        f"{plan.stored:,}",
        f"{plan.moved:,}",
        f"{plan.added_us:,.1f}",
        f"{plan.merge_us:,.1f}",
    ]
    assert len(lines) == 6 and str(plan) == text
    assert (
        repr(plan) == f"DeploymentPlan(H100: 2 base, 3 merged, 3 packed; {plan.stored:,} bytes, {plan.added_us:,.1f} µs a step)"
    )


def test_table_of_all_sites():
    plan = mixed_plan()
    lines = plan.table(all=True).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [s.site.name for s in plan.sites]


def test_shared_line_shows_the_worst_loss():
    sites = [dataclasses.replace(LONE, name=f"q{i}", delta_std=(std,)) for i, std in enumerate((5e-4, 4e-4, 9e-4))]
    line = plan_deployment(sites, H100, Workload(1)).table().splitlines()[5]
    assert line.split()[:2] == ["q*", "3"] and f"{predicted_rounding_loss(0.02, 4e-4, 'bfloat16'):.2g}" in line


def test_no_sites():
    plan = plan_deployment([], "CPU", Workload(1))
    assert plan.added_us == plan.stored == 0 and plan.table().splitlines()[-1].split()[:2] == ["total", "0"]


def test_plan_of_a_real_model():
    """MiniLM in bf16: an update far above the weights' grid is merged, one below it stays beside them."""
    model = minilm().bfloat16()
    names = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    scale = {name: 1e-2 if "query" in name else 1e-5 for name in names}
    adapter = LoraAdapter({n: LoraLayer(torch.randn(4, 384), torch.randn(384, 4) * scale[n]) for n in names})
    plan = plan_deployment(site_shapes(model, [adapter]), "A100-40", Workload(1))
    assert plan.choices == {name: "merged" if "query" in name else "packed" for name in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("merges"), "a DeploymentPlan needs merges"),
        (lambda v: v.update(tolerence=1), r"no field 'tolerence' \(did you mean 'tolerance'\?\)"),
        (lambda v: v["device"].update(bandwidht=1), r"a DeviceSpec has no field 'bandwidht' \(did you mean 'bandwidth'"),
        (lambda v: v["sites"][0]["site"].pop("ranks"), "a SiteShape needs ranks"),
        (lambda v: v["sites"][0].update(choice="fused"), "choice='fused' is not one of"),
        (lambda v: v["merges"]["chunks"][0]["pieces"][0].pop("row_stop"), "a MergePiece needs row_stop"),
        (lambda v: v.update(sites=None), "not a complete deployment plan"),
    ],
)
def test_a_damaged_plan_is_refused(change, message):
    value = json.loads(json.dumps(mixed_plan().to_dict()))
    change(value)
    with pytest.raises(ValueError, match=message):
        DeploymentPlan.from_dict(value)
