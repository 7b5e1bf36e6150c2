"""Modules trained whole beside the adapter: which ones, and what is refused or warned of."""

import warnings

import pytest
import torch
from models import attached, gpt2, logits_of, minilm, state_of, stir, token_batch, vit

import cobra


@pytest.mark.parametrize(
    ("build", "modules_to_save", "expected"),
    [
        (vit, "auto", ["classifier"]),
        (minilm, "auto", ["classifier"]),
        (gpt2, "auto", []),  # an output projection tied to the embeddings is no task head
        (vit, (), []),
        (vit, "layernorm", ["vit.layernorm"]),
        (vit, ["classifier", "patch_embeddings"], ["classifier", "vit.embeddings.patch_embeddings"]),
    ],
)
def test_modules_to_save(build, modules_to_save, expected):
    """A head on random weights must train; nothing else does unless it is named."""
    model, adapter = attached(build, modules_to_save=modules_to_save)
    assert list(adapter.heads) == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {f"{head}.{name}" for head in expected for name, _ in model.get_submodule(head).named_parameters()}


@pytest.mark.parametrize(
    ("modules_to_save", "message"),
    [
        ("pooler", "modules_to_save: the model has no module 'pooler'"),
        ("o_proj", "modules_to_save and target_modules both name 'vit.layers.0.attention.o_proj'"),
        ("attention", "modules_to_save and target_modules both name 'vit.layers.0.attention"),
    ],
    ids=["unknown", "adapted", "holds adapted ones"],
)
def test_modules_to_save_are_checked(modules_to_save, message):
    """Training a layer whole and by an adapter would leave its weight to two optimizer groups."""
    model = vit()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        cobra.attach(model, cobra.CobraConfig(rank_budget=6, gate="mean", modules_to_save=modules_to_save))
    assert state_of(model) == before


def test_a_head_of_several_layers_trains_whole():
    """DistilBERT's pre_classifier is as new as its classifier."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=8, hidden_dim=16, n_heads=2, n_layers=1, vocab_size=30)
    adapter = cobra.attach(DistilBertForSequenceClassification(config), cobra.CobraConfig(rank_budget=4, gate="mean"))
    assert set(adapter.heads) == {"pre_classifier", "classifier"}
    assert not any("classifier" in group.name for group in adapter.groups)


def test_tied_heads_are_warned_of(tmp_path):
    """peft loads them into a copy and leaves the other module as it was; with both named it computes what was trained."""
    from peft import PeftModel

    for alone, other in (("transformer.wte", "lm_head"), ("lm_head", "transformer.wte")):
        said = f"modules_to_save: {alone} shares a weight with {other}, .* name both of them, or leave {alone} out"
        with pytest.warns(UserWarning, match=said):
            attached(gpt2, modules_to_save=(alone,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, adapter = attached(gpt2, modules_to_save=("wte", "lm_head"))
        attached(vit, modules_to_save="auto")
    assert not [w for w in caught if "shares a weight" in str(w.message)]
    stir(adapter)
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))  # which refuses a parameter under two names
    batch = token_batch()
    model(**batch).loss.backward()
    optimizer.step()
    adapter.apply(adapter.extract())
    expected = logits_of(model, batch)
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(gpt2(), batch)).abs().max() > 0.1
