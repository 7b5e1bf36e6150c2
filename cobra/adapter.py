"""The life of an adapter: train under the ELBO, extract, apply, merge, save."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from cobra import checkpoint, distributed, shrink
from cobra.budget import Budget
from cobra.config import CobraConfig
from cobra.cut import check_fits, warn_of_an_early_cut
from cobra.deploy.cost import WORKSPACE
from cobra.group import Group
from cobra.linear import CobraLinear, adapters_of, hand_back_hooks, nesting_encoders, share_hooks
from cobra.lora import LoraAdapter, LoraLayer
from cobra.merge import Merge, MergeReport, check_merge_options, merge_layers, merge_layers_in_place, probe_outputs
from cobra.plan import RankPlan
from cobra.selection import select_ranks
from cobra.shared import SharedInputs
from cobra.sites import Site, fingerprint
from cobra.statistics import running_statistics, warn_of_moved_statistics
from cobra.still import StillParameters
from cobra.tied import write_once
from cobra.to_lora import to_lora, warn_of_shared_weights
from cobra_kernels import draw_words, gate_kl, gate_kl_sampled, gate_noise


class Adapter:
    """A handle on the CobraLinears of a model. Made by `attach`.

    groups: that have ranks; dropped: sites that the cut left without
    """

    def __init__(
        self,
        model: nn.Module,
        config: CobraConfig,
        groups: list[Group],
        heads: dict[str, nn.Module],
        restore: list[str],
        calibration: dict | None = None,
    ):
        self.model, self.config, self.groups, self.heads = model, config, groups, heads
        self.calibration = calibration
        self.origin: LoraAdapter | None = None  # what it was loaded from, without its matrices
        self.base_fingerprint = fingerprint([site for group in groups for site in group.sites])
        self.current_step = 0
        self.shared_inputs = SharedInputs() if config.share_inputs else None
        self.plan: RankPlan | None = None
        self._trainable_before = set(restore)
        self.dropped: list[Site] = []
        self._merged: Merge | None = None
        self._detached = False
        self._at_cut: StillParameters | None = None
        self._statistics = {name: tensor.clone() for name, tensor in running_statistics(model, heads).items()}
        self._steps_since_change = 0  # of the set of parameters
        self._nesting = nesting_encoders(model)
        self._set_nested_tensors(False)
        self._claim_layers()
        write_once(model)
        self._draw()

    def _claim_layers(self) -> None:
        for group in self.groups:
            for layer in group.all_layers:
                layer.adapter = self

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._claim_layers()

    # training

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict]:
        """Optimizer groups: the matrices and heads at `lr`, lora_B at lr × lora_B_lr_scale; the gate logits at
        lr × gate_lr_scale, never decayed."""
        firsts = [layers[0] for group in self.groups for layers in group.layers]
        ratio = self.config.lora_B_lr_scale
        apart = [[p for layer in firsts for p in (layer.lora_A, layer.lora_B)], []]
        if ratio != 1:
            apart = [[layer.lora_A for layer in firsts], [layer.lora_B for layer in firsts]]
        gates = [group.gate for group in self.groups if group.gate is not None]
        heads = [p for head in self.heads.values() for p in head.parameters()]
        if any(p.dtype == torch.float16 for p in heads):
            warnings.warn(
                f"{', '.join(self.heads)} trains in fp16, where AdamW's eps is 0 and its steps are NaN: load the model in bf16 "
                "or fp32, or attach with modules_to_save=()",
                stacklevel=2,
            )
        groups = [
            {"params": apart[0], "lr": lr, "weight_decay": weight_decay},
            {"params": apart[1], "lr": lr * ratio, "weight_decay": weight_decay},
            {"params": gates, "lr": lr * self.config.gate_lr_scale, "weight_decay": 0.0},
            {"params": list(dict.fromkeys(heads)), "lr": lr, "weight_decay": weight_decay},
        ]
        return [group for group in groups if group["params"]]

    def kl_loss(self) -> Tensor:
        """() beta × KL of the gates' posterior from their prior, for one optimizer step.

        Where gradients of n micro-batches are accumulated, divide the whole loss by n: then the KL counts once.
        Zero once the ranks are cut. Engines that average gradients over processes average equal ones: it counts once there too.
        """
        self._check_attached()
        gated = [group for group in self.groups if group.gate is not None]
        if not gated:
            return torch.zeros((), device=next(self.model.parameters()).device)
        device = gated[0].gate.device  # a model may lie on several
        logits = torch.cat([distributed.whole(group.gate).to(device) for group in gated])
        prior = logits.new_tensor([prior for group in gated for prior in group.prior])
        if self.config.kl == "concrete" and gated[0].noise is not None:
            kl = gate_kl_sampled(logits, prior, torch.cat([group.noise.to(device) for group in gated]))
        else:
            kl = gate_kl(logits, prior)
        return self.config.beta * (kl.sum() if self.config.kl_reduction == "sum" else kl.mean())

    def step(self) -> None:
        """Call once after every optimizer step: the next step's gates and temperature.

        Raises RuntimeError where ranks turn out to train apart: then no engine averages the gradients of these parameters.
        """
        self._check_attached()
        if self.shared_inputs is not None:
            self.shared_inputs.settle()
        self._steps_since_change += 1
        distributed.after_step(self.groups, self._steps_since_change, f"{self.base_fingerprint} {self.config}")
        if self._at_cut is not None:
            self._at_cut.warn_if_still(self._matrices(), stacklevel=3)
            self._at_cut = None
        self.move_to_step(self.current_step + 1)

    def move_to_step(self, step: int) -> None:
        """Sets the number of optimizer steps taken, as after loading; gates and temperature follow from it."""
        if self._at_cut is not None:  # what was loaded since the cut is no move
            self._at_cut = StillParameters(self._matrices())
        self.current_step = step
        self._draw()

    def _draw(self) -> None:
        """Noise and temperature of the current step, a pure function of (seed, step, group)."""
        layers = [(group.index, layer) for group in self.groups for layer in group.all_layers]
        if not self.config.samples or self.plan is not None:
            for _, layer in layers:
                layer.gate_noise = layer.gate_draw = None
            return
        count, seed, step = len(self.groups), self.config.seed, self.current_step
        words = draw_words(seed, step, 0).repeat(count, 1)
        words[:, 4] = torch.arange(count, device="cpu")
        temperature = torch.tensor(self.config.temperature_at(step), dtype=torch.float64, device="cpu").float()
        drawn = gate_noise(count, self.config.r_max, seed=seed, step=step), words, temperature
        copies = {device: [t.to(device) for t in drawn] for device in {layer.gate_temperature.device for _, layer in layers}}
        for index, layer in layers:
            noise, words, temperature = copies[layer.gate_temperature.device]
            layer.take_draw(noise[index, : layer.rank], words[index], temperature)

    def expected_ranks(self) -> dict[str, float]:
        """Group -> Σ P(gate is open), the rank the posterior expects: of hard gates P(z > 0), of others sigmoid(logit)."""
        return {
            group.name: float(group.rank)
            if group.gate is None
            else group.all_layers[0].open_probability(distributed.whole(group.gate)).sum().item()
            for group in self.groups
        }

    def trainable_parameters(self) -> int:
        """Elements of lora_A and lora_B (without gates and heads)."""
        return sum(layers[0].lora_A.numel() + layers[0].lora_B.numel() for group in self.groups for layers in group.layers)

    # the cut

    def extract(self, budget: int | Budget | None = None) -> RankPlan:
        """The best ranks a budget allows (`cobra.budget.allocate`); changes nothing.

        They are gates, by their posterior; with the config's basis "singular" the singular directions of the updates, by their
        energy, summed over the layers of a group, whatever the budget's objective. Before any training, when there are none,
        the gates are. Another budget does not change what is ranked.

        budget: ranks, or a `Budget` in another unit or with constraints; by default the config's

        Raises ValueError for a budget out of range, gates or updates that are not finite, and after a cut, when no other ranks
        are left to choose from.
        """
        if self.plan is not None:
            raise ValueError("the ranks are cut already, as in adapter.plan; attach anew to search for others")
        budget = Budget.of(self.config.rank_budget if budget is None else budget)
        return select_ranks(self.groups, self.config, budget, self.base_fingerprint, self.current_step)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the adapter is left out: the base model's own outputs, but for heads that are trained.

        Raises ValueError if merged.
        """
        self._check_attached("leave out")
        with ExitStack() as stack:
            for layer in (layer for group in self.groups for layer in group.all_layers):
                kind = {"device": layer.weight.device, "dtype": layer.lora_A.dtype}
                nothing = torch.empty(0, layer.in_features, **kind), torch.empty(layer.out_features, 0, **kind)
                stack.enter_context(layer.cut_to(*nothing))
            yield

    @contextmanager
    def hard_gates(self, plan: RankPlan) -> Iterator[None]:
        """Within the block the model computes what it will compute after `apply(plan)`."""
        self._check_plan(plan)
        with ExitStack() as stack:
            for group, site in zip(self.groups, plan.sites, strict=True):
                for layers in group.layers:
                    matrices = shrink.kept_matrices(layers[0], site, plan.fold)
                    for layer in layers:
                        stack.enter_context(layer.cut_to(*matrices))
            yield

    def apply(self, plan: RankPlan, optimizer: checkpoint.Optimizers = None) -> None:
        """Cuts the matrices to the kept ranks. Layers of rank 0 become the base model's own modules again.

        optimizer: takes over the cut parameters, with their state cut alike (in the singular basis, and of optimizers whose
            state cannot be cut, it starts anew), and loses those that are gone; a sequence where several hold them. Without
            it, make a new optimizer from `parameter_groups`: the old one holds parameters that no longer count.

        Raises ValueError for a plan of another adapter or one applied before, and for optimizers that lack what trains on.
        """
        self._check_plan(plan)
        distributed.check_whole(self.state_dict(), "apply(plan)")
        optimizers = shrink.holders(optimizer, self.groups, plan)
        warn_of_an_early_cut(self.groups, self.config, self.current_step)
        if not any(site.energy for site in plan.sites):
            shrink.renew_uncuttable(optimizers, self._matrices())
        removed: list[nn.Parameter] = []
        dropped: list[Site] = []
        for group, site in zip(self.groups, plan.sites, strict=True):
            if group.gate is not None:
                removed.append(group.gate)
            for base, layers in zip(group.sites, group.layers, strict=True):
                if site.kept:
                    with torch.inference_mode(False):  # parameters made in it could not be trained
                        shrink.shrink_layers(layers, site, plan.fold, optimizers)
                else:
                    removed += [layers[0].lora_A, layers[0].lora_B]
                    dropped.append(base)
        self._restore(dropped)
        self.dropped += dropped
        shrink.forget(optimizers, removed)
        self.groups = [group for group, site in zip(self.groups, plan.sites, strict=True) if site.kept]
        self.plan = plan
        if self.shared_inputs is not None:
            self.shared_inputs.forget()
        # without the heads: they are the same objects after the cut, and an old optimizer goes on moving them
        self._at_cut = None if optimizers else StillParameters(self._matrices())
        self._steps_since_change = 0

    def _matrices(self) -> list[nn.Parameter]:
        return [p for group in self.groups for layer in group.all_layers for p in (layer.lora_A, layer.lora_B)]

    def _check_plan(self, plan: RankPlan) -> None:
        if self.plan is not None:
            raise ValueError("a plan was applied already: the ranks are cut once")
        if self._merged is not None:
            raise ValueError("the adapter is merged; unmerge() it first")
        self._check_attached("cut")
        check_fits(plan, self.groups, self.base_fingerprint)

    # the end

    @torch.inference_mode(False)  # weights made in it could not be trained on
    @torch.no_grad()
    def merge(
        self,
        tolerance: float | None = None,
        above: str = "raise",
        probe: object = None,
        workspace: int = WORKSPACE,
        reversible: bool = True,
    ) -> MergeReport:
        """Adds every update to its weight (fp32 sum, one rounding) and puts the base model's own modules back.

        Gates count as in evaluation mode. The model then has the base model's modules and state-dict keys; `unmerge` restores
        the original bits.

        tolerance: the largest share of a layer's update that rounding to the weight's dtype may lose (`rounding_loss`)
        above: what becomes of a layer that loses more: "raise" (then nothing is merged), or "keep" (it stays unmerged)
        probe: a batch; the report then says by how much the model's outputs on it moved in merging
        workspace: bytes for the sums of one launch, in the chunks a deployment plan has; the bits do not depend on it
        reversible: False merges in place, without a second copy of the weights: faster, and `unmerge` then raises

        Raises ValueError if merged already, where a sum is not finite, for a layer above the tolerance, for a tolerance without
        a way back, and for a workspace smaller than a row.
        """
        if self._merged is not None:
            raise ValueError("the adapter is merged already")
        self._check_attached("merge")
        distributed.check_whole(self.state_dict(), "merge()")
        check_merge_options(tolerance, above, reversible)
        before = None if probe is None else probe_outputs(self.model, probe)
        work = {
            site.name: (site, LoraLayer(*layers[0].folded()))
            for group in self.groups
            for site, layers in zip(group.sites, group.layers, strict=True)
        }
        layers = list(work.values())
        merged = merge_layers(layers, tolerance, above, workspace) if reversible else merge_layers_in_place(layers, workspace)
        self._restore(merged.sites)
        self._set_nested_tensors(not merged.kept)
        self._merged = merged
        if reversible:
            self._carry_modes()
        moved = None if before is None else (probe_outputs(self.model, probe) - before).abs().max().item()
        return MergeReport(merged.reports, moved)

    def unmerge(self) -> None:
        """Restores the base weights bit for bit and puts the adapter back. Raises ValueError if not merged, or in place."""
        if self._merged is None:
            raise ValueError("the adapter is not merged")
        modules = dict(self.model.named_modules(remove_duplicate=False))
        foreign = [name for site in self._merged.sites for name, module in site.modules if modules.get(name) is not module]
        if foreign:
            raise ValueError(f"{foreign[0]} is not the module that was merged: another adapter is attached; detach() it first")
        self._merged.undo()
        for site, layers in self._merged_layers():
            self._put_back(site, layers)
        self._set_nested_tensors(False)
        self._merged = None

    def _merged_layers(self) -> list[tuple[Site, list[CobraLinear]]]:
        merged = set(map(id, self._merged.sites))
        pairs = (pair for group in self.groups for pair in zip(group.sites, group.layers, strict=True))
        return [(site, layers) for site, layers in pairs if id(site) in merged]

    def _carry_modes(self) -> None:
        """The merged modules have their layers' modes, so that `unmerge` tells whether the model's was set meanwhile."""
        for site, layers in self._merged_layers():
            for module, layer in zip(site.distinct_modules, layers, strict=True):
                module.training = layer.training

    def _put_back(self, site: Site, layers: list[CobraLinear]) -> None:
        by_module = dict(zip(map(id, site.distinct_modules), layers, strict=True))
        for name, module in site.modules:
            layer = by_module[id(module)]
            layer.training = module.training
            share_hooks(layer, module)
            self.model.set_submodule(name, layer)

    def detach(self) -> None:
        """Takes the adapter off without merging: the base model's modules and trainable flags as before `attach`.

        Heads that were trained (`modules_to_save`) stay as they are. The handle is of no more use but to read and save.

        Raises ValueError where it is detached already, and where another adapter is attached since a merge.
        """
        if self._detached:
            raise ValueError("the adapter is detached already")
        distributed.check_whole(self.state_dict(), "detach()")
        if any(adapter is not self for adapter in adapters_of(self.model)):
            raise ValueError("another adapter is attached since; detach() or merge() that one first")
        if self._merged is not None and self._merged.originals is not None:
            self.unmerge()
        self._restore(site for group in self.groups for site in group.sites)
        self._set_nested_tensors(True)
        self._detached = True
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self._trainable_before)

    def _check_attached(self, what: str = "train") -> None:
        if self._detached:
            raise ValueError(f"the adapter is detached: there is nothing to {what}; attach anew")
        if self._merged is not None:
            raise ValueError(f"the adapter is merged: there is nothing to {what}; unmerge() it first")

    def _set_nested_tensors(self, allowed: bool) -> None:
        for encoder in self._nesting:
            encoder.use_nested_tensor = allowed

    def _restore(self, sites: Iterable[Site]) -> None:
        training, parents = self.model.training, dict(self.model.named_modules(remove_duplicate=False))
        for name, module in (named for site in sites for named in site.modules):
            if module.training != training:
                module.train(training)
            path, _, leaf = name.rpartition(".")
            hand_back_hooks(getattr(parents[path], leaf), module)
            setattr(parents[path], leaf, module)

    # files

    def to_lora(self) -> LoraAdapter:
        """The adapter apart from the model, scaling and gates folded into lora_B: to save, combine or serve. Shares memory with
        the model where nothing had to be computed.

        Raises ValueError for a module that has several names, which a checkpoint cannot say.
        """
        return to_lora(self)

    def save_pretrained(self, folder: Path | str, layout: str = "compact") -> None:
        """Writes a plain LoRA checkpoint that peft loads (`cobra.export.peft`); of several ranks, rank 0 does."""
        lora = self.to_lora()
        warn_of_shared_weights(self.groups, stacklevel=3)
        warn_of_moved_statistics(self._statistics, running_statistics(self.model, self.heads), stacklevel=2)
        if others := list(checkpoint.other_parameters(self)):
            warnings.warn(
                f"{len(others)} parameters outside the adapter are trained and not in its folder, e.g. {others[0]}: name their "
                "modules in modules_to_save, or save the model after merge()",
                stacklevel=2,
            )
        if not distributed.rank():
            lora.save_pretrained(folder, layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by full name: matrices, gates and heads, as FSDP2 holds them where it does."""
        return checkpoint.adapter_tensors(self)

    def save_checkpoint(
        self, path: Path | str, optimizer: checkpoint.Optimizers = None, scheduler: checkpoint.Schedulers = None
    ) -> None:
        """Writes one file from which training goes on with the same bits (`cobra.checkpoint`); of several optimizers or
        schedulers a sequence."""
        checkpoint.save(self, path, optimizer, scheduler)

    def load_checkpoint(
        self, path: Path | str, optimizer: checkpoint.Optimizers = None, scheduler: checkpoint.Schedulers = None
    ) -> None:
        """Reads what `save_checkpoint` wrote, into an adapter freshly attached with the same config; of several optimizers or
        schedulers in the same order."""
        checkpoint.load(self, path, optimizer, scheduler)

    def __repr__(self) -> str:
        state = "merged" if self._merged is not None else "cut" if self.plan else f"step {self.current_step}"
        return f"Adapter({len(self.groups)} groups, {self.trainable_parameters():,} parameters, {state})"
