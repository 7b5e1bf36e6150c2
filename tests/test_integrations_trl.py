"""CobraCallback in trl's SFTTrainer: the Trainer's and the custom loop's results, accumulation, resuming, what SFTTrainer turns
on by itself (activation checkpointing, bf16, a fused language head), packing, assistant-only loss, peft beside COBRA; and in
DPOTrainer."""

import math
import os
import socket
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import same, smollm2, smollm2_tokenizer, stir
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import distributed, multiprocessing
from torch.nn import functional
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import cobra
from cobra.integrations.transformers import CobraCallback

SEARCH, STEPS, RATE, BATCH = 3, 5, 1e-2, 8
CONFIG = {"rank_budget": 14, "r_max": 4, "total_steps": 1, "beta": 0.5, "gate_lr_scale": 20.0}
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "adamw_torch",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
ROUNDED = 1e-5  # between losses that round to fp32 in different places, in a model in fp64
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ '<s> ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=TEMPLATE, **special)


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Small and random, its head not tied. In fp64 little of what differs is rounding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).to(dtype)


def texts(count: int = 32) -> list[dict]:
    """Random tokens, 6 to 19 a text."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(4, len(WORDS), (n,), generator=generator).tolist()} for n in lengths]


def attached(dtype: torch.dtype = torch.float64, **changes):
    model = llama(dtype)
    return model, cobra.attach(model, cobra.CobraConfig.preset("paper", **CONFIG | changes))


def sft(folder, model, data=None, peft_config=None, callbacks=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **ARGUMENTS | changes),
        train_dataset=Dataset.from_list(data or texts()),
        processing_class=words_tokenizer(),
        callbacks=[CobraCallback()] if callbacks is None else callbacks,
        peft_config=peft_config,
    )


def trained(folder, dtype=torch.float64, config=None, resume=None, **changes):
    """The trainer after training, and the adapter."""
    model, adapter = attached(dtype, **config or {})
    trainer = sft(folder, model, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, adapter


def tensors(adapter) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in adapter.state_dict().values()]


def logged(trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(adapter, model, clip: float = 0.0) -> list[float]:
    """README's loop over search, cut and the steps after it; where gradients are clipped, the KL follows."""
    optimizer, losses = torch.optim.AdamW(adapter.parameter_groups(lr=RATE)), []
    for step in range(STEPS):
        if step == SEARCH:
            adapter.apply(adapter.extract(), optimizer)
        rows = [texts()[i % 32] for i in range(step * BATCH, (step + 1) * BATCH)]
        batch = padded(rows)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if adapter.plan is None:
            adapter.kl_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    return losses


def assert_equal_runs(found, expected, tolerance: float) -> None:
    """Ranks, posteriors of all gates, matrices."""
    assert found.plan.ranks == expected.plan.ranks and found.plan.total == CONFIG["rank_budget"]
    for mine, theirs in zip(found.plan.sites, expected.plan.sites, strict=True):
        assert mine.posterior == pytest.approx(theirs.posterior, rel=0, abs=tolerance)
    for mine, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with no more than what SFTTrainer does by itself: activation checkpointing and the fused head."""
    trainer, adapter = trained(tmp_path_factory.mktemp("plain"))
    assert trainer.args.gradient_checkpointing and trainer.model.is_gradient_checkpointing
    return trainer, adapter


@pytest.mark.parametrize(
    ("config", "clip"),
    [({}, 0.0), ({}, 0.05), ({"lora_B_lr_scale": 4.0}, 0.0)],
    ids=["plain", "clipped", "lora_B faster"],
)
def test_equals_the_custom_loop(config, clip, tmp_path):
    trainer, adapter = trained(tmp_path, config=config, max_grad_norm=clip)
    model, own = attached(total_steps=SEARCH, **config)
    losses = by_hand(own, model, clip)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert_equal_runs(adapter, own, ROUNDED)


def test_equals_the_plain_trainer(plain, tmp_path):
    """Which has neither the fused head nor activation checkpointing."""
    model, adapter = attached()
    rows = [row | {"labels": row["input_ids"]} for row in texts()]
    collate = DataCollatorForSeq2Seq(words_tokenizer())
    arguments = TrainingArguments(str(tmp_path), **ARGUMENTS)
    Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[CobraCallback()]).train()
    assert_equal_runs(adapter, plain[1], ROUNDED)


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["not clipped", "clipped"])
def test_accumulation_changes_nothing(clip, plain, tmp_path):
    """4 and 8 micro-batches, of texts of different lengths, against one batch: ranks the same, posteriors and matrices within
    1e-9."""
    _, whole = trained(tmp_path, max_grad_norm=clip) if clip else plain
    for parts in (4, 8):
        changes = {"per_device_train_batch_size": BATCH // parts, "gradient_accumulation_steps": parts, "max_grad_norm": clip}
        _, adapter = trained(tmp_path, **changes)
        assert_equal_runs(adapter, whole, 1e-9)


RESUMED = {
    "config": {"dropout": 0.1},
    "dtype": torch.float32,
    "bf16": True,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.1,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupts, and its folder: fp32 under bf16 autocast, dropout, clipping, a schedule, accumulation."""
    folder = tmp_path_factory.mktemp("straight")
    return *trained(folder, **RESUMED), folder


@pytest.mark.parametrize("saved_at", [2, SEARCH, 4], ids=["in the search", "at the cut", "after the cut"])
def test_resumed_run_ends_with_the_same_bits(saved_at, straight, tmp_path):
    trainer, adapter, folder = straight
    torch.manual_seed(1)
    resumed, other = trained(tmp_path, resume=str(folder / f"checkpoint-{saved_at}"), **RESUMED)
    assert other.plan == adapter.plan and other.current_step == adapter.current_step == STEPS
    assert same(tensors(other), tensors(adapter))
    assert logged(resumed, "loss")[-(STEPS - saved_at) :] == logged(trainer, "loss")[saved_at:]


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": False},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["off", "reentrant", "not reentrant"],
)
def test_activation_checkpointing_sees_the_same_gates(changes, plain, tmp_path):
    """To the bit: what is recomputed is what was computed."""
    _, adapter = trained(tmp_path, **changes)
    assert same(tensors(adapter), tensors(plain[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16(dtype, plain, tmp_path):
    """SFTTrainer's default, on fp32 and bf16 weights: the adapter stays in fp32, and the budget is met."""
    trainer, adapter = trained(tmp_path, dtype, bf16=None)
    assert trainer.args.bf16 and {t.dtype for t in tensors(adapter)} == {torch.float32}
    assert adapter.plan.total == CONFIG["rank_budget"]
    assert logged(trainer, "loss") == pytest.approx(logged(plain[0], "loss"), rel=5e-3)
    assert logged(trainer, "loss") != logged(plain[0], "loss")


def test_packing_keeps_texts_apart(tmp_path):
    """Two texts in one row without padding: the first loss is the one of the texts side by side."""
    data = texts(2)
    trainer, adapter = trained(tmp_path, data=data, packing=True, max_length=64, per_device_train_batch_size=1)
    apart, _ = trained(tmp_path, data=data, per_device_train_batch_size=2)
    assert len(trainer.train_dataset) == 1 and adapter.plan.total == CONFIG["rank_budget"]
    assert logged(trainer, "loss")[0] == pytest.approx(logged(apart, "loss")[0], rel=1e-6)


def test_assistant_only_loss(tmp_path):
    """Answers alone have labels, and the loss is theirs."""
    talk = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5"}]
    data = [{"messages": talk} for _ in range(8)]
    trainer, adapter = trained(tmp_path, data=data, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    kept = words_tokenizer().convert_ids_to_tokens(batch["labels"][0][batch["labels"][0] != -100])
    assert kept == ["w4", "w5", "</s>"] and adapter.plan.total == CONFIG["rank_budget"]
    with torch.no_grad():
        expected = llama()(**{key: value for key, value in batch.items() if key != "completion_mask"}).loss.item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-6)
    assert logged(trainer, "loss")[-1] < expected


def test_what_was_trained_merges(plain, tmp_path):
    """The patched forward of the fused head stays on the model and does no harm."""
    model, adapter = attached(torch.float32)
    sft(tmp_path, model).train()
    stir(adapter)
    batch = padded(texts(2))
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        adapter.merge()
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-4)
    assert {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)} == {"Linear"}


def test_dpo(tmp_path):
    """Beside the base model as the reference: the first loss is that of two equal models, and pairs come apart."""
    pairs = [{"prompt": "w1 w2 w3", "chosen": "w4 w5", "rejected": "w6 w7 w8"}] * 16
    model, adapter = attached(torch.float32)
    trainer = DPOTrainer(
        model,
        ref_model=llama(torch.float32),
        args=DPOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(pairs),
        processing_class=words_tokenizer(),
        callbacks=[CobraCallback()],
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and losses[-1] < losses[0] - 0.03
    assert adapter.plan.total == CONFIG["rank_budget"] and logged(trainer, "rewards/margins")[-1] > 0


def on_a_rank(rank: int, folder: Path, port: int) -> None:
    """One of two processes that share every batch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _, adapter = trained(folder, per_device_train_batch_size=BATCH // 2)
    torch.save({"ranks": adapter.plan.ranks, "tensors": tensors(adapter)}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """Over search, cut and the steps after it, texts of different lengths on each: the loss counts the tokens of both, and the
    KL counts once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(on_a_rank, (tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    _, adapter = trained(tmp_path)
    assert first["ranks"] == second["ranks"] == adapter.plan.ranks
    assert same(first["tensors"], second["tensors"])
    for found, expected in zip(first["tensors"], tensors(adapter), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# what would not train


def test_an_adapter_on_the_head_is_told(tmp_path):
    """The fused head reads lm_head.weight and never calls the layer."""
    model, _ = attached(target_modules=("q_proj", "lm_head"), rank_budget=6)
    with pytest.warns(UserWarning, match=r"1 of 3 adapted layers got no gradient in the first step, e\.g\. lm_head: the loss"):
        sft(tmp_path, model).train()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_peft_config_beside_cobra_is_refused(targets, tmp_path):
    """When the trainer is made, before a step is taken."""
    from peft import LoraConfig

    model, _ = attached(torch.float32)
    with pytest.raises(ValueError, match=r"peft has put an adapter of its own on .*q_proj .*leave out peft_config= \(None\)"):
        sft(tmp_path, model, peft_config=LoraConfig(target_modules=targets))


def test_ranks_for_peft_config(tmp_path):
    """The other way round: COBRA's ranks in trl's own LoRA, without the callback."""
    model = llama(torch.float32)
    scores = cobra.calibrate(model, [padded(texts(4))], steps=4, progress=False)
    plan = cobra.plan_ranks(scores, 14)
    trainer = sft(tmp_path, model, peft_config=plan.to_peft_config(scaling=2.0, task_type="CAUSAL_LM"), callbacks=[])
    trainer.train()
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): len(p)
        for name, p in trainer.model.named_parameters()
        if "lora_A" in name
    }
    assert found == {name: rank for name, rank in plan.ranks.items() if rank}


@pytest.mark.slow
def test_smollm2(tmp_path):
    """Real weights and a real tokenizer, calibration first: the loss falls, the budget is met, the merge is exact."""
    model, tokenizer = smollm2(layers=6), smollm2_tokenizer()
    text = "The river rises in the hills to the north of the town and flows south through a wide valley of farms."
    batch = dict(tokenizer([text], return_tensors="pt"))
    scores = cobra.calibrate(model, [batch | {"labels": batch["input_ids"]}], steps=4, baseline="mean", progress=False)
    adapter = cobra.attach(model, cobra.CobraConfig(rank_budget=84, r_max=8, total_steps=1), scores)
    arguments = SFTConfig(
        str(tmp_path), **ARGUMENTS | {"max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
    )
    data = Dataset.from_list([{"text": text}] * 4)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[CobraCallback()])
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.7 * losses[0] and adapter.plan.total == 84
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        adapter.merge()
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-3, atol=1e-3)
