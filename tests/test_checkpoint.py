"""Resuming: the same bits as a run that was never interrupted, or a clear refusal."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import Mlp, attached, gpt2, image_batch, layers_of, logits_of, same, stir, token_batch, train, vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cobra
from cobra import storage
from cobra.checkpoint import KIND

SEARCH, TOTAL = 4, 8
CONFIG = {
    "rank_budget": 5,
    "r_max": 3,
    "total_steps": SEARCH,
    "dropout": 0.1,
    "gate_lr_scale": 50.0,
    "beta": 0.1,
    "basis": "gates",
}


@dataclass
class Run:
    """Everything a training script holds: search, cut, fine-tuning, under a schedule and in training mode (dropout)."""

    model: nn.Module
    adapter: cobra.Adapter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    batch: dict[str, torch.Tensor]

    @classmethod
    def start(cls, build, **changes) -> "Run":
        model = build().train()
        adapter = cobra.attach(model, cobra.CobraConfig(**CONFIG | changes))
        optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2, weight_decay=0.01))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=TOTAL + 1)
        return cls(model, adapter, optimizer, scheduler, image_batch() if build is vit else token_batch())

    def advance(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            if step == SEARCH:
                self.adapter.apply(self.adapter.extract(), self.optimizer)
            batch = {key: value.roll(step, 0) for key, value in self.batch.items()}
            train(self.model, self.adapter, self.optimizer, [batch], self.scheduler)

    def save(self, path: Path) -> None:
        self.adapter.save_checkpoint(path, self.optimizer, self.scheduler)

    def load(self, path: Path) -> None:
        self.adapter.load_checkpoint(path, self.optimizer, self.scheduler)

    def state(self) -> dict:
        return {
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "plan": self.adapter.plan,
            "step": self.adapter.current_step,
            "random": torch.get_rng_state(),
        }


def copied(adapter) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}


def assert_same_bits(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_bits(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_bits(*pair)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("saved_at", [1, SEARCH, SEARCH + 2], ids=["search", "before the cut", "after the cut"])
@pytest.mark.parametrize(("build", "basis"), [(gpt2, "gates"), (vit, "gates"), (vit, "singular")])
def test_resumed_run_ends_with_the_same_bits(build, basis, saved_at, tmp_path):
    """Parameters, gates, moments, schedule and dropout: nothing tells a resumed run from one that went through."""
    straight = Run.start(build, basis=basis)
    straight.advance(0, saved_at)
    straight.save(tmp_path / "run.cobra")
    straight.advance(saved_at, TOTAL)
    expected = straight.state()

    resumed = Run.start(build, basis=basis)
    stir(resumed.adapter)
    torch.manual_seed(1234)
    resumed.load(tmp_path / "run.cobra")
    resumed.advance(saved_at, TOTAL)
    assert_same_bits(resumed.state(), expected)
    batch = straight.batch
    assert torch.equal(logits_of(resumed.model.eval(), batch), logits_of(straight.model.eval(), batch))


def test_gates_follow_the_step(tmp_path):
    """No noise is stored, and none is needed: the step gives it back."""
    run, fresh = Run.start(gpt2), Run.start(gpt2)
    run.advance(0, 2)
    run.save(tmp_path / "run.cobra")
    before = [group.layers[0][0].gates() for group in run.adapter.groups]
    fresh.load(tmp_path / "run.cobra")
    assert all(torch.equal(g.layers[0][0].gates(), z) for g, z in zip(fresh.adapter.groups, before, strict=True))
    assert not any("noise" in key for key in load_file(tmp_path / "run.cobra"))


def test_priors_come_from_the_file(tmp_path):
    """A resumed run needs no second calibration: the KL is measured from the prior it started with."""
    batch = image_batch()
    with pytest.warns(UserWarning, match="the path integral misses"):
        scores = cobra.calibrate(vit(), [batch], steps=2)
    config = cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean")
    first, second = cobra.attach(vit(), config, scores), cobra.attach(vit(), config)
    stir(first)
    first.save_checkpoint(tmp_path / "run.cobra")
    second.load_checkpoint(tmp_path / "run.cobra")
    assert second.kl_loss().item() == first.kl_loss().item() > 0


def test_optimizer_made_after_the_cut(tmp_path):
    """It has no group for the gates, the one it is loaded into still has."""
    run, fresh = Run.start(vit), Run.start(vit)
    run.advance(0, SEARCH)
    run.adapter.apply(run.adapter.extract())
    run.optimizer = torch.optim.AdamW(run.adapter.parameter_groups(lr=1e-3))
    train(run.model, run.adapter, run.optimizer, [run.batch])
    run.adapter.save_checkpoint(tmp_path / "run.cobra", run.optimizer)
    fresh.adapter.load_checkpoint(tmp_path / "run.cobra", fresh.optimizer)
    for each in (run, fresh):
        torch.manual_seed(0)
        train(each.model, each.adapter, each.optimizer, [run.batch])
    assert_same_bits(fresh.adapter.state_dict(), run.adapter.state_dict())


def several(adapter) -> tuple[list, list]:
    """lora_B under momentum, all else under AdamW, with a schedule each."""
    columns = [p for name, p in adapter.state_dict().items() if name.endswith("lora_B")]
    others = [p for name, p in adapter.state_dict().items() if not name.endswith("lora_B")]
    optimizers = [torch.optim.AdamW(others, lr=1e-2), torch.optim.SGD(columns, lr=0.1, momentum=0.9)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9 - 0.1 * i) for i, optimizer in enumerate(optimizers)]
    return optimizers, schedules


def advance_both(run: Run, optimizers, schedules, start: int, stop: int) -> None:
    for step in range(start, stop):
        if step == SEARCH:
            run.adapter.apply(run.adapter.extract(), optimizers)
        (run.model(**run.batch).loss + run.adapter.kl_loss()).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        run.adapter.step()


def state_of_all(run: Run, optimizers, schedules) -> list:
    moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return [run.adapter.state_dict(), moments, [schedule.state_dict() for schedule in schedules]]


@pytest.mark.parametrize("saved_at", [1, SEARCH + 2], ids=["search", "after the cut"])
def test_several_optimizers(saved_at, tmp_path):
    """Each goes on with its own moments and schedule, in the order in which they were saved."""
    straight, resumed, path = Run.start(vit), Run.start(vit), tmp_path / "run.cobra"
    both, again = several(straight.adapter), several(resumed.adapter)
    advance_both(straight, *both, 0, saved_at)
    straight.adapter.save_checkpoint(path, *both)
    advance_both(straight, *both, saved_at, TOTAL)
    expected = state_of_all(straight, *both)
    resumed.adapter.load_checkpoint(path, *again)
    advance_both(resumed, *again, saved_at, TOTAL)
    assert_same_bits(state_of_all(resumed, *again), expected)


def test_another_number_of_optimizers_is_refused(tmp_path):
    run, path = Run.start(vit), tmp_path / "run.cobra"
    optimizers, schedules = several(run.adapter)
    run.adapter.save_checkpoint(path, optimizers, schedules)
    before = copied(run.adapter)
    stir(run.adapter)
    with pytest.raises(ValueError, match=r"run\.cobra was saved with 2 optimizers, 1 are passed; pass all of them"):
        run.adapter.load_checkpoint(path, optimizers[:1], schedules)
    with pytest.raises(ValueError, match="saved with 2 schedulers, 1 are passed"):
        run.adapter.load_checkpoint(path, optimizers, schedules[0])
    run.adapter.load_checkpoint(path, optimizers)
    assert_same_bits(copied(run.adapter), before)


def test_files_from_before_there_were_several_optimizers(tmp_path):
    """They hold the one as it is, and null for none."""
    run, fresh, path = Run.start(vit), Run.start(vit), tmp_path / "run.cobra"
    run.advance(0, 2)
    run.save(path)
    tensors, meta = storage.read_tensors(path, KIND)
    meta |= {"optimizer": meta["optimizer"][0], "scheduler": None}
    storage.write_tensors(path, tensors, KIND, {k: v for k, v in meta.items() if k not in ("kind", "version")})
    fresh.adapter.load_checkpoint(path, fresh.optimizer)
    assert_same_bits(fresh.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"])


def test_without_an_optimizer(tmp_path):
    """A checkpoint serves evaluation too; an optimizer that was not saved cannot be loaded."""
    run, fresh = Run.start(vit), Run.start(vit)
    run.advance(0, SEARCH + 1)
    run.adapter.save_checkpoint(tmp_path / "run.cobra")
    with pytest.raises(ValueError, match=r"run\.cobra was saved without the optimizer"):
        fresh.adapter.load_checkpoint(tmp_path / "run.cobra", fresh.optimizer)
    with pytest.raises(ValueError, match="saved without the scheduler"):
        fresh.adapter.load_checkpoint(tmp_path / "run.cobra", scheduler=fresh.scheduler)
    fresh.adapter.load_checkpoint(tmp_path / "run.cobra")
    assert torch.equal(logits_of(fresh.model.eval(), run.batch), logits_of(run.model.eval(), run.batch))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.5),
        ("seed", 1),
        ("r_max", 2),
        ("rank_budget", 6),
        ("temperature", (1.0, 0.5)),
        ("target_modules", r".*mlp.*"),
        ("granularity", "block"),
        ("basis", "singular"),
    ],
)
def test_another_config_is_named(field, value, tmp_path):
    """A run that goes on under other settings is another run."""
    Run.start(gpt2).save(tmp_path / "run.cobra")
    other = Run.start(gpt2, **{field: value})
    before = copied(other.adapter)
    message = "of another model" if field == "target_modules" else rf"trained with {field}=.*this adapter has {field}="
    with pytest.raises(ValueError, match=message):
        other.load(tmp_path / "run.cobra")
    assert_same_bits(copied(other.adapter), before)


def test_files_from_before_there_was_a_choice_of_basis(tmp_path):
    path = tmp_path / "run.cobra"
    attached(vit)[1].save_checkpoint(path)
    tensors, meta = storage.read_tensors(path, KIND)
    del meta["config"]["basis"]
    storage.write_tensors(path, tensors, KIND, {k: v for k, v in meta.items() if k not in ("kind", "version")})
    attached(vit)[1].load_checkpoint(path)
    with pytest.raises(ValueError, match="trained with basis='gates', this adapter has basis='singular'"):
        attached(vit, basis="singular")[1].load_checkpoint(path)


def test_another_backend_computes_the_same_run(tmp_path):
    attached(vit)[1].save_checkpoint(tmp_path / "run.cobra")
    attached(vit, backend="torch")[1].load_checkpoint(tmp_path / "run.cobra")


def test_another_model_is_refused(tmp_path):
    """Same names and shapes, other weights."""
    config = cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean")
    cobra.attach(Mlp(), config).save_checkpoint(tmp_path / "run.cobra")
    with pytest.raises(ValueError, match=r"run\.cobra is of another model: fingerprint"):
        cobra.attach(Mlp(), config).load_checkpoint(tmp_path / "run.cobra")


def test_another_cut_is_refused(tmp_path):
    """Rows of one plan mean nothing under another, and shapes alone do not tell them apart."""
    run, other = Run.start(vit), Run.start(vit)
    run.advance(0, SEARCH + 1)
    run.save(tmp_path / "run.cobra")
    stir(other.adapter)
    other.adapter.apply(other.adapter.extract(), other.optimizer)
    with pytest.raises(ValueError, match=r"run\.cobra .* another plan"):
        other.load(tmp_path / "run.cobra")
    run.load(tmp_path / "run.cobra")


@pytest.mark.parametrize("fraction", [0, 0.001, 0.1, 0.9, 0.999])
def test_truncated_files_are_refused(fraction, tmp_path):
    run, path = Run.start(gpt2), tmp_path / "run.cobra"
    run.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(cobra.FormatError, match=r"run\.cobra: expected a COBRA training checkpoint"):
        run.load(path)


def test_what_is_not_finite_is_not_written(tmp_path):
    """A run that saves to one file keeps its last good state."""
    run, path = Run.start(gpt2), tmp_path / "run.cobra"
    run.save(path)
    good = path.read_bytes()
    layers_of(run.adapter)[0].lora_B.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"run\.cobra: adapter\.\S+\.lora_B holds NaN or Inf: the training diverged"):
        run.save(path)
    assert path.read_bytes() == good


def test_foreign_files_are_refused(tmp_path):
    run, path = Run.start(gpt2), tmp_path / "run.cobra"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(cobra.FormatError, match="found a file of another program"):
        run.load(path)
    run.adapter.extract().save(path)
    with pytest.raises(cobra.FormatError, match="truncated or foreign"):
        run.load(path)
    with pytest.raises(FileNotFoundError, match="expected a COBRA training checkpoint"):
        run.load(tmp_path / "none.cobra")


def test_missing_tensors_are_named(tmp_path):
    """All is checked before anything is copied."""
    run, other, path = Run.start(gpt2), Run.start(gpt2), tmp_path / "run.cobra"
    run.advance(0, 1)
    run.save(path)
    with safe_open(path, "pt") as f:
        header = f.metadata()
    tensors = load_file(path)
    last = [key for key in tensors if key.startswith("adapter.")][-1]
    save_file({key: value for key, value in tensors.items() if key != last}, path, header)
    before = copied(other.adapter)
    with pytest.raises(cobra.FormatError, match=last.removeprefix("adapter.")):
        other.load(path)
    assert_same_bits(copied(other.adapter), before)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(call, tmp_path, monkeypatch):
    """A full disk costs the new checkpoint, not the old one, and leaves no rubbish."""
    run, path = Run.start(gpt2), tmp_path / "run.cobra"
    run.save(path)
    old = path.read_bytes()
    run.advance(0, 1)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        run.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import resource, signal, sys, torch, cobra
from models import Mlp, stir

torch.manual_seed(0)
adapter = cobra.attach(Mlp(), cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean"))
adapter.save_checkpoint(sys.argv[1])
stir(adapter)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
adapter.save_checkpoint(sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a file size limit")
def test_killed_in_mid_write(tmp_path):
    """A process that dies with half a file written leaves the old checkpoint whole."""
    path = tmp_path / "run.cobra"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, path], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    assert sorted(p.stat().st_size > 2048 for p in tmp_path.iterdir()) == [False, True]  # the half and the whole file
    torch.manual_seed(0)
    adapter = cobra.attach(Mlp(), cobra.CobraConfig(rank_budget=4, r_max=2, gate="mean"))
    expected = copied(adapter)
    stir(adapter)
    adapter.load_checkpoint(path)
    assert_same_bits(copied(adapter), expected)


def test_other_parameters_that_train(tmp_path):
    """They go on with the rest; the adapter's folder has no place for them, and says so."""

    def start():
        run = Run.start(vit)
        norm = run.model.vit.layernorm.requires_grad_(True)
        run.optimizer.add_param_group({"params": list(norm.parameters()), "lr": 0.1})
        run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
        return run

    straight, path = start(), tmp_path / "c.safetensors"
    straight.advance(0, 3)
    straight.save(path)
    straight.advance(3, 6)
    resumed = start()
    resumed.adapter.load_checkpoint(path, resumed.optimizer, resumed.scheduler)
    resumed.advance(3, 6)
    assert same(list(resumed.model.state_dict().values()), list(straight.model.state_dict().values()))
    with pytest.warns(UserWarning, match=r"2 parameters outside the adapter are trained .* e\.g\. vit\.layernorm\.weight"):
        straight.adapter.save_pretrained(tmp_path / "adapter")
    narrow = Run.start(vit)
    narrow.model.vit.layernorm = nn.LayerNorm(2)
    with pytest.raises(ValueError, match=r"vit\.layernorm\.bias \(32,\) was trained beside the adapter, .* has \(2,\)"):
        narrow.adapter.load_checkpoint(path)


def test_matrices_that_moved_before_their_checkpoint_came(tmp_path):
    """A Trainer loads those that were not cut by itself: no sign that nobody called step()."""
    run, path = Run.start(vit), tmp_path / "c.safetensors"
    run.advance(0, 6)
    run.save(path)
    fresh = Run.start(vit)
    stir(fresh.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.adapter.load_checkpoint(path, fresh.optimizer, fresh.scheduler)
    assert same(list(fresh.model.state_dict().values()), list(run.model.state_dict().values()))


def test_scheduler_with_whole_number_keys(tmp_path):
    """MultiStepLR keys its milestones by step: as JSON's text keys they would never be met again."""
    run = Run.start(vit)
    run.scheduler = torch.optim.lr_scheduler.MultiStepLR(run.optimizer, milestones=[2, 6], gamma=0.1)
    run.advance(0, 3)
    run.save(tmp_path / "run.cobra")
    run.advance(3, TOTAL)
    resumed = Run.start(vit)
    resumed.scheduler = torch.optim.lr_scheduler.MultiStepLR(resumed.optimizer, milestones=[2, 6], gamma=0.1)
    resumed.load(tmp_path / "run.cobra")
    resumed.advance(3, TOTAL)
    assert resumed.scheduler.get_last_lr() == run.scheduler.get_last_lr()
    assert_same_bits(resumed.state()["adapter"], run.state()["adapter"])


def test_a_warm_up_before_milestones(tmp_path):
    """MultiStepLR counts its milestones in a Counter, which is more than a dictionary."""
    runs = [Run.start(vit) for _ in range(2)]
    for run in runs:
        warm_up = torch.optim.lr_scheduler.LinearLR(run.optimizer, 0.1, 1.0, 2)
        steps = torch.optim.lr_scheduler.MultiStepLR(run.optimizer, [2, 4])
        run.scheduler = torch.optim.lr_scheduler.SequentialLR(run.optimizer, [warm_up, steps], [3])
    straight, resumed = runs
    straight.advance(0, 2)
    straight.save(tmp_path / "run.cobra")
    straight.advance(2, TOTAL)
    resumed.load(tmp_path / "run.cobra")
    resumed.advance(2, TOTAL)
    assert_same_bits(copied(resumed.adapter), copied(straight.adapter))
    assert resumed.scheduler.get_last_lr() == straight.scheduler.get_last_lr()


def test_a_cut_that_is_loaded_without_the_optimizer_is_watched(tmp_path):
    """What the file wrote into the matrices is no move of an optimizer that holds those from before the cut."""
    run, fresh = Run.start(vit), Run.start(vit)
    run.advance(0, SEARCH + 1)
    run.save(tmp_path / "run.cobra")
    fresh.adapter.load_checkpoint(tmp_path / "run.cobra")
    with pytest.warns(UserWarning, match="no parameter moved in the step after apply"):
        train(fresh.model, fresh.adapter, fresh.optimizer, [fresh.batch])


def test_heads_with_tied_tensors(tmp_path):
    """A masked language head has its bias under two names."""
    from transformers import BertConfig, BertForMaskedLM

    def started():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = BertForMaskedLM(BertConfig(vocab_size=40, **sizes))
        config = cobra.CobraConfig(4, r_max=2, gate="open", target_modules=("query", "value"), modules_to_save=("cls",))
        return model, cobra.attach(model, config)

    model, adapter = started()
    stir(adapter)
    with torch.no_grad():
        model.cls.predictions.bias.fill_(0.5)
    adapter.save_checkpoint(tmp_path / "a")
    other, theirs = started()
    theirs.load_checkpoint(tmp_path / "a")
    assert all(torch.equal(found, model.state_dict()[name]) for name, found in other.state_dict().items())
