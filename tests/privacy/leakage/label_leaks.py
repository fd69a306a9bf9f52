"""What the label attacks are tested on: a random head with its gradients, and a real model on real text."""

import csv
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from splitfed.privacy import clip


def norm_and_head(D, V, *, seed=0):
    """An RMS norm and a linear head, row by row; and the head's weight."""
    weight_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(seed))
    return (lambda x: F.rms_norm(x, (D,)) @ weight_VD.T), weight_VD


def output_gradient(top, hidden, labels, scale):
    """The gradient of scale times the sum of token losses, at the trunk output."""
    hidden = hidden.detach().requires_grad_()
    loss = scale * F.cross_entropy(top(hidden).flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient


def noisy(gradient_BTD, std, *, clipping_norm=None, per="token", seed=0):
    """Clip and add noise, as a Gaussian mechanism would."""
    if clipping_norm is not None:
        gradient_BTD = clip(gradient_BTD, clipping_norm, per=per)
    return gradient_BTD + std * torch.randn(gradient_BTD.shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Seen:
    """Sequences of the E2E data as a server has them: trunk output, output gradient, and for the judge the labels."""

    hidden_BTD: torch.Tensor
    gradient_BTD: torch.Tensor
    labels_BT: torch.Tensor


class RealModel:
    """stories260k, whole, with its top cut off where it is wanted."""

    def __init__(self, folder, *, tokens=96):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokens = tokens
        self.head_VD = self.model.lm_head.weight

    def top(self, blocks):
        """The last blocks, norm and head: [B, T, D] to [B, T, V]."""
        from splitfed.models import partition

        part = partition(self.model, bottom_blocks=1, top_blocks=blocks).top
        return lambda hidden_BTD: part(hidden_BTD).logits

    def see(self, rows, *, top_blocks):
        """Run rows of E2E up to the second split point, and their loss back to it."""
        from splitfed.models import partition

        parts = partition(self.model, bottom_blocks=1, top_blocks=top_blocks)
        ids_BT, labels_BT = self._encode(rows)
        hidden_BTD = parts.trunk(parts.bottom(ids_BT))
        gradient = output_gradient(lambda hidden: parts.top(hidden).logits, hidden_BTD, labels_BT, 1 / self.tokens)
        return Seen(hidden_BTD, gradient, labels_BT)

    def _encode(self, rows):
        shape = len(rows), self.tokens
        ids_BT, labels_BT = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        for at, row in enumerate(rows):
            prompt, completion = (
                self.tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("mr", "ref")
            )
            whole = [1, *prompt, *completion, 2][: self.tokens]
            ids_BT[at, : len(whole)] = torch.tensor(whole)
            labels_BT[at, len(prompt) : len(whole) - 1] = torch.tensor(whole[len(prompt) + 1 :])
        return ids_BT, labels_BT


def e2e_rows(folder, count, *, skip=0):
    """Every 97th row of the training data, so that neighbours do not describe the same restaurant."""
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))[skip * 97 : (skip + count) * 97 : 97]
