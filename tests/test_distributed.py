"""Two processes over gloo: the scores, losses and ranks of one process, and errors where there would be a hang.

The work runs once, in two processes of their own; each test looks at what one part of it left behind.
"""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from models import Mlp, attached, gates_of, gpt2, image_batch, mlp_batch, token_batch, vit
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import cobra

RANKS = 2
ROOT = Path(cobra.__file__).parents[1]
CONFIG = {"rank_budget": 12, "r_max": 5, "total_steps": 4, "gate_lr_scale": 30.0, "beta": 0.1}
calibrate = partial(cobra.calibrate, steps=3, quadrature="lobatto", progress=False)


def refusal(function) -> str:
    """What a call says when it raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def rows(batch: dict, start: int, stop: int | None = None, step: int = 1) -> dict:
    return {key: value[start:stop:step] for key, value in batch.items()}


def optimizer_of(adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


def fit(model, adapter, optimizer, batch, steps: int) -> list[float]:
    """The README's loop; the batch's own losses."""
    losses = []
    for _ in range(steps):
        nll = model(**batch).loss
        (nll + adapter.kl_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        losses.append(nll.item())
    return losses


# calibration


def shards() -> list[list[dict]]:
    """Seven examples, one of them without labels, in three batches: two for rank 0, one for rank 1."""
    batch = token_batch(7)
    batch["labels"][4] = -100
    return [[rows(batch, 0, 3), rows(batch, 3, 5)], [rows(batch, 5)]]


def arrays(scores: cobra.LayerScores) -> dict:
    return {name: getattr(scores, name) for name in ("conductance", "gradient", "attributions")} | {
        "examples": scores.settings["examples"]
    }


def calibrations(rank: int) -> dict:
    """What every rank gets from loaders that differ in length, one of them empty, and from one share of max_examples."""
    model, own = gpt2(), shards()[rank]
    return {
        "uneven": arrays(calibrate(model, own)),
        "empty": arrays(calibrate(model, [] if rank else own)),
        "share": arrays(calibrate(model, own, max_examples=3)),
    }


def faulty_calibrations(rank: int) -> dict:
    model, own = gpt2(), shards()[rank]

    def broken_on_rank_1(outputs, batch):
        return outputs.logits.sum((1, 2)) * (float("nan") if rank else 1.0)

    return {
        "loss": refusal(lambda: calibrate(model, own, loss=broken_on_rank_1)),
        "empty": refusal(lambda: calibrate(model, [])),
        "arguments": refusal(lambda: calibrate(model, own, estimator="conductance" if rank else "paper")),
        "again": arrays(calibrate(model, own)),
    }


# training


def life(rank: int, ranks: int = RANKS, wrap=DistributedDataParallel) -> dict:
    """Search, cut and fine-tuning with a head, on this rank's part of a batch."""
    model, adapter = attached(vit, **CONFIG)
    batch, optimizer = rows(image_batch(6), rank, step=ranks), optimizer_of(adapter)
    wrapped, gates = wrap(model), []
    losses = []
    for _ in range(3):
        gates += gates_of(adapter)
        losses += fit(wrapped, adapter, optimizer, batch, 1)
    plan = adapter.extract()
    adapter.apply(plan, optimizer)
    losses += fit(wrap(model), adapter, optimizer, batch, 3)
    return {
        "losses": losses,
        "gates": gates,
        "ranks": plan.ranks,
        "state": {k: v.detach() for k, v in adapter.state_dict().items()},
    }


def unwrapped(rank: int) -> dict:
    """The ways to train apart."""
    model, adapter = attached(vit, **CONFIG)
    batch, optimizer = rows(image_batch(6), rank, step=RANKS), optimizer_of(adapter)
    never = refusal(lambda: fit(model, adapter, optimizer, batch, 1))

    model, adapter = attached(vit, **CONFIG)
    optimizer, wrapped = optimizer_of(adapter), DistributedDataParallel(model)
    fit(wrapped, adapter, optimizer, batch, 2)
    adapter.apply(adapter.extract(), optimizer)
    return {
        "never": never,
        "after the cut": refusal(lambda: fit(wrapped, adapter, optimizer, batch, 1)),
        "attach": refusal(lambda: cobra.attach(DistributedDataParallel(vit()), cobra.CobraConfig(**CONFIG))),
    }


def language_batch(rank: int = 0, ranks: int = 1) -> dict:
    batch = token_batch(4)
    return rows(batch | {"labels": batch["input_ids"]}, rank, step=ranks)


def adapted_gpt2(dtype: torch.dtype = torch.float32):
    model = gpt2().to(dtype)
    return model, cobra.attach(model, cobra.CobraConfig(**CONFIG))


def sharded_gpt2(dtype: torch.dtype = torch.float32, blocks: bool = True, **settings):
    from torch.distributed.fsdp import fully_shard

    model, adapter = adapted_gpt2(dtype)
    for block in model.transformer.h if blocks else ():
        fully_shard(block, **settings)
    return fully_shard(model, **settings), adapter, optimizer_of(adapter)


def fsdp2(rank: int) -> dict:
    """Blocks sharded: training, everything that reads parameters, resuming, and the cut in a whole model."""
    batch, path = language_batch(rank, RANKS), Path(os.environ["COBRA_TEST_FOLDER"]) / f"run.{rank}.safetensors"
    model, adapter, optimizer = sharded_gpt2()
    found = {"losses": fit(model, adapter, optimizer, batch, 3), "expected": adapter.expected_ranks()}
    plan, lora = adapter.extract(), adapter.to_lora()
    adapter.save_checkpoint(path, optimizer)
    with adapter.hard_gates(plan), torch.no_grad():
        found["cut"] = model(**language_batch()).logits
    found |= {name: refusal(work) for name, work in (("apply", lambda: adapter.apply(plan)), ("merge", adapter.merge))}
    found["base"] = [type(site.module.weight).__name__ for group in adapter.groups for site in group.sites]
    found["on"] = fit(model, adapter, optimizer, batch, 2)

    resumed, adapter, optimizer = sharded_gpt2()
    adapter.load_checkpoint(path, optimizer)
    found["resumed"] = fit(resumed, adapter, optimizer, batch, 2)

    whole, adapter = adapted_gpt2()
    adapter.load_checkpoint(path)
    adapter.apply(plan)
    adapter.merge()
    with torch.no_grad():
        found["merged"] = whole(**language_batch()).logits
    return found | {"ranks": plan.ranks, "lora": {name: layer.lora_B for name, layer in lora.layers.items()}}


def fsdp2_precisions(rank: int) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    batch, half = language_batch(rank, RANKS), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    variants = {
        "one group": sharded_gpt2(blocks=False),
        "bf16 weights": sharded_gpt2(torch.bfloat16),
        "bf16 policy": sharded_gpt2(mp_policy=half),
        "one group, bf16 policy": sharded_gpt2(blocks=False, mp_policy=half),
    }
    return {name: fit(*variant, batch, 3) for name, variant in variants.items()}


def accelerated(rank: int, ranks: int = RANKS) -> dict:
    """The README's loop with an Accelerator; batch i of the loader goes to rank i modulo the number of ranks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it is one for the process, as is its environment: a Trainer may have left bf16 there
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    data = image_batch(12)
    examples = [{"pixel_values": x, "labels": y} for x, y in zip(data["pixel_values"], data["labels"], strict=True)]
    model, adapter = attached(vit, **CONFIG)
    wrapped, optimizer, loader = accelerator.prepare(
        model, optimizer_of(adapter), torch.utils.data.DataLoader(examples, batch_size=4 // ranks)
    )
    losses = []
    for cut in (False, True):
        for batch in loader:
            nll = wrapped(**batch).loss
            accelerator.backward(nll + adapter.kl_loss())
            optimizer.step()
            optimizer.zero_grad()
            adapter.step()
            losses.append(nll.item())
        if not cut:
            plan = adapter.extract()
            adapter.apply(plan, optimizer)
            wrapped = accelerator.prepare(model)
    return {"losses": losses, "ranks": plan.ranks}


def in_a_trainer(rank: int, ranks: int = RANKS) -> dict:
    """CobraCallback under DDP, in fp64: the cut in the middle or last, from checkpoints, in micro-batches."""
    from transformers import Trainer, TrainingArguments

    from cobra.integrations.transformers import CobraCallback

    folder = Path(os.environ["COBRA_TEST_FOLDER"]) / f"trainer of {ranks}"
    data = image_batch(16)
    images = [{"pixel_values": x.double(), "labels": y} for x, y in zip(data["pixel_values"], data["labels"], strict=True)]

    def run(resume=None, parts: int = 1, search_share: float = 0.5, save: str = "no"):
        model = vit().double()
        adapter = cobra.attach(model, cobra.CobraConfig.preset("paper", **CONFIG))
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=4 // ranks // parts,
            gradient_accumulation_steps=parts,
            train_sampling_strategy="sequential",
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy=save,
            save_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=images, callbacks=[CobraCallback(search_share)])
        trainer.train(resume_from_checkpoint=resume)
        return {
            "ranks": adapter.plan.ranks,
            "posterior": [list(site.posterior) for site in adapter.plan.sites],
            "state": {name: tensor.detach() for name, tensor in adapter.state_dict().items()},
        }

    found = {"straight": run(save="steps"), "cut last": run(search_share=1.0)}
    if ranks == 1:
        return found
    resumed = {f"from step {step}": run(resume=str(folder / f"checkpoint-{step}")) for step in (1, 3)}
    return found | resumed | {"accumulated": run(parts=2)}


def wrapped_anew(rank: int) -> dict:
    """A wrapper over parameters that were exchanged: it averages their gradients, and its settings and hook stay."""
    from cobra.integrations.ddp import rewrap

    def doubled(state, bucket):
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    torch.manual_seed(0)
    wrapper = DistributedDataParallel(
        Mlp(), find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=1, broadcast_buffers=False
    )
    wrapper.register_comm_hook(None, doubled)
    wrapper.eval()
    head = wrapper.module.classifier
    wrapper.module.up = torch.nn.Linear(6, 10)
    rewrap(wrapper)
    wrapper(torch.full((2, 6), float(rank + 1))).sum().backward()
    return {
        "module": wrapper.module.classifier is head,
        "training": wrapper.training,
        "settings": [wrapper.find_unused_parameters, wrapper.gradient_as_bucket_view, wrapper.bucket_bytes_cap],
        "gradient": wrapper.module.up.weight.grad,
        "head": head.weight.grad,
        "weight": wrapper.module.up.weight.detach(),
    }


# the two processes

PARTS = (calibrations, faulty_calibrations, life, unwrapped, fsdp2, fsdp2_precisions, accelerated, in_a_trainer, wrapped_anew)


def work(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "COBRA_TEST_FOLDER": str(folder)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = f"file://{folder}/start"
    dist.init_process_group("gloo", init_method=start, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
    for part in PARTS:
        torch.save(part(rank), folder / f"{part.__name__}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs all parts in two processes; part -> what it returned on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (folder, port), nprocs=RANKS)
    return lambda part: [torch.load(folder / f"{part.__name__}.{rank}.pt", weights_only=True) for rank in range(RANKS)]


def averaged(parts: list[dict], key: str = "losses") -> torch.Tensor:
    return torch.tensor([part[key] for part in parts]).mean(0)


def close(found, expected, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# calibration


@pytest.mark.parametrize(
    ("case", "loader"),
    [
        ("uneven", lambda: [*shards()[0], *shards()[1]]),
        ("empty", lambda: shards()[0]),
        ("share", lambda: [rows(shards()[0][0], 0, 2), rows(shards()[1][0], 0, 1)]),
    ],
    ids=["uneven", "empty", "share"],
)
def test_scores_on_every_rank_are_those_of_one_process_over_the_same_batches(ran, case, loader):
    """To the bit, the per-example attributions in the order of ranks."""
    expected = arrays(calibrate(gpt2(), loader()))
    for part in ran(calibrations):
        assert part[case]["examples"] == expected["examples"]
        for name in ("conductance", "gradient", "attributions"):
            assert torch.equal(part[case][name], expected[name]), name


def test_a_fault_on_one_rank_is_an_error_on_all(ran):
    first, second = ran(faulty_calibrations)
    assert "ValueError: the loss of example 0 in calibration batch 0 is nan" in second["loss"]
    assert "the calibration failed on rank 1: ValueError: the loss of example 0" in first["loss"]
    for part in (first, second):
        assert "the calibration loader is empty" in part["empty"]
        assert "rank 1 calibrated with estimator='conductance', rank 0 with 'paper'" in part["arguments"]
        assert torch.equal(part["again"]["conductance"], ran(calibrations)[0]["uneven"]["conductance"])


# DistributedDataParallel


def test_ddp_trains_like_one_process(ran):
    """Over search, cut and fine-tuning: the averaged losses, the ranks and the final matrices. The KL counts once: at beta 0.1
    twice the term would move the gates' logits by more than the tolerance."""
    expected, found = life(0, 1, wrap=lambda model: model), ran(life)
    close(averaged(found), expected["losses"])
    for part in found:
        assert part["ranks"] == expected["ranks"] and len(set(part["ranks"].values())) > 1
        for name, tensor in expected["state"].items():
            close(part["state"][name], tensor, 1e-3)


def test_gates_and_plans_are_the_same_on_every_rank(ran):
    first, second = ran(life)
    assert all(map(torch.equal, first["gates"], second["gates"]))
    assert first["ranks"] == second["ranks"]
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])


def test_ranks_that_train_apart_are_told(ran):
    for part in ran(unwrapped):
        assert "differs between ranks 0 and 1: their gradients are not averaged" in part["never"]
        assert "anew after apply(plan)" in part["after the cut"] and "RuntimeError" in part["after the cut"]
        assert "give COBRA model.module" in part["attach"]


# FSDP2


def test_fsdp2_trains_like_one_process(ran):
    model, adapter = adapted_gpt2()
    losses = fit(model, adapter, optimizer_of(adapter), language_batch(), 3)
    plan, found = adapter.extract(), ran(fsdp2)
    close(averaged(found), losses)
    for part in found:
        assert part["ranks"] == plan.ranks and len(set(plan.ranks.values())) > 1
        close(list(part["expected"].values()), list(adapter.expected_ranks().values()), 1e-4)
        for name, layer in adapter.to_lora().layers.items():
            close(part["lora"][name], layer.lora_B, 1e-4)


def test_fsdp2_resumes_with_the_same_bits(ran):
    for part in ran(fsdp2):
        assert part["resumed"] == part["on"]


def test_fsdp2_is_cut_and_merged_in_a_whole_model(ran):
    for part in ran(fsdp2):
        for name in ("apply", "merge"):
            assert f"{name}(" in part[name] and "FSDP2" in part[name] and "load_checkpoint(path)" in part[name]
        close(part["merged"], part["cut"], 1e-4)


def test_fsdp2_keeps_no_second_copy_of_the_weights(ran):
    """The base model's own modules wait aside with the sharded weights."""
    for part in ran(fsdp2):
        assert set(part["base"]) == {"DTensor"}


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance"),
    [
        ("one group", torch.float32, 1e-5),
        ("bf16 weights", torch.bfloat16, 1e-3),
        ("bf16 policy", torch.float32, 1e-2),
        ("one group, bf16 policy", torch.float32, 1e-2),
    ],
)
def test_fsdp2_precisions(ran, variant, dtype, tolerance):
    """fp32 adapters beside bf16 weights, and parameters that FSDP2 casts (against fp32)."""
    model, adapter = adapted_gpt2(dtype)
    close(averaged(ran(fsdp2_precisions), variant), fit(model, adapter, optimizer_of(adapter), language_batch(), 3), tolerance)


# accelerate


def test_accelerate_trains_like_one_process(ran):
    expected, found = accelerated(0, 1), ran(accelerated)
    close(averaged(found), expected["losses"])
    assert [part["ranks"] for part in found] == [expected["ranks"]] * RANKS


# transformers' Trainer


def test_the_trainer_under_ddp_trains_like_one_process(ran, tmp_path, monkeypatch):
    """Ranks, posteriors within 1e-8 and matrices within 1e-6 of one process's, over search, cut and the steps after it; both
    processes, and resumed runs, hold the same bits."""
    monkeypatch.setenv("COBRA_TEST_FOLDER", str(tmp_path))
    alone = in_a_trainer(0, 1)
    first, second = ran(in_a_trainer)
    for name, found in first.items():
        expected = alone.get(name, alone["straight"])
        assert found["ranks"] == expected["ranks"] and len(set(expected["ranks"].values())) > 1
        for posterior, wanted in zip(found["posterior"], expected["posterior"], strict=True):
            close(posterior, wanted, 1e-8)
        for key, tensor in expected["state"].items():
            close(found["state"][key], tensor, 1e-6)
            assert torch.equal(found["state"][key], second[name]["state"][key])
    for name in ("from step 1", "from step 3"):  # in the search, after the cut
        assert all(torch.equal(first[name]["state"][key], tensor) for key, tensor in first["straight"]["state"].items())


def test_a_wrapper_made_anew_in_place(ran):
    """New and old parameters have the hook's sum of both processes' gradients, once."""
    first, second = ran(wrapped_anew)
    for part in (first, second):
        assert part["module"] and not part["training"] and part["settings"] == [True, True, 2**20]
        for name in ("gradient", "head", "weight"):
            assert torch.equal(part[name], first[name])
    torch.manual_seed(0)
    model = Mlp()
    model.up = torch.nn.Linear(6, 10)
    assert torch.equal(first["weight"], model.up.weight)
    sum(model(torch.full((2, 6), float(rank + 1))).sum() for rank in range(RANKS)).backward()
    close(first["gradient"], model.up.weight.grad)
    close(first["head"], model.classifier.weight.grad)


# torchrun

DYING = """
import os, torch, cobra
from models import Mlp, mlp_batch
torch.distributed.init_process_group("gloo")
def loss(outputs, batch):
    if torch.distributed.get_rank():
        os._exit(7)
    return outputs.square().sum(1)
cobra.calibrate(Mlp(), [mlp_batch()], loss=loss, steps=3, progress=False)
print("scores of half of the examples")
"""


def test_a_worker_that_dies_takes_the_others_along(tmp_path):
    """Under torchrun, within seconds: no rank goes on with part of the examples, and none waits for ever."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    ended = subprocess.run(launch, capture_output=True, text=True, timeout=120, env=os.environ | paths, cwd=tmp_path)
    assert ended.returncode != 0 and "exitcode  : 7" in ended.stderr, ended.stderr
    assert "scores" not in ended.stdout


# DeepSpeed ZeRO-3, which marks its parameters with ds_id


def test_zero3_is_refused_before_attach():
    model = Mlp()
    model.up.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"up.weight lies in parts on the ranks \(DeepSpeed ZeRO-3\)"):
        calibrate(model, [mlp_batch()])
    with pytest.raises(ValueError, match="calibrate and attach before sharding it"):
        cobra.attach(model, cobra.CobraConfig(rank_budget=4, total_steps=4))


@pytest.mark.parametrize(
    "method", ["kl_loss", "expected_ranks", "extract", "to_lora", "merge", "save_pretrained", "save_checkpoint"]
)
def test_zero3_is_refused_after_attach(tmp_path, method):
    """An empty adapter is never written, nor trained."""
    _, adapter = attached(vit, **CONFIG)
    for index, tensor in enumerate(adapter.state_dict().values()):
        tensor.ds_id, tensor.data = index, torch.zeros(0)
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3"):
        getattr(adapter, method)(*[tmp_path / "saved"] * method.startswith("save"))
    assert not (tmp_path / "saved").exists()
