"""The attacks of an audit on what crosses the cut: tokens from smashed data, mask and labels from output gradients.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy.leakage import (
    AttackResult,
    Embedding,
    LabelGuess,
    LabelProbe,
    MaskAttack,
    TokenKnowledge,
    attack_tokens,
    label_result,
    log_frequencies,
    match_labels,
    recover_labels,
)
from splitfed.study.audit_setting import AuditSetting
from splitfed.study.audit_view import Protection, View, log_density, sending, without_noise

OnProgress = Callable[[float], None]

_PUBLIC_FOR_MASKS: Final = 64
_PUBLIC_FOR_LABELS: Final = 256
_TOKEN_ATTACKS: Final = 5
_MOST_STEPS: Final = 300
_STEPS_PER_TEXT: Final = 4  # more passes over few texts only learn them by heart


def token_results(
    setting: AuditSetting, protection: Protection, public: View, private: View, *, on_progress: OnProgress
) -> Iterator[AttackResult]:
    """Recover tokens from smashed data.

    Args:
        setting: The run.
        protection: What the smashed data passed.
        public: What the server would see of public text.
        private: What it sees of private text.
        on_progress: Told the part that is done.
    """
    bottom = setting.parts().bottom
    mechanism = protection.smashed
    knowledge = TokenKnowledge(
        bottom=bottom,
        release=mechanism.release,
        clip=without_noise(mechanism),
        public=public.texts,
        vocabulary=int(setting.model.config.vocab_size),
        log_density=log_density(mechanism, setting.max_tokens),
        is_row_by_row=setting.config.model.bottom_blocks == 0 and getattr(mechanism, "per", "token") == "token",
    )
    embed = bottom.model.get_input_embeddings()
    with torch.no_grad():
        table_VD = embed(torch.arange(knowledge.vocabulary)).float()
    embedding = Embedding(table_VD, lambda x_BTD: bottom.model.base_model(inputs_embeds=x_BTD, use_cache=False)[0])
    done: list[str] = []

    def tell(name: str, part: float) -> None:
        on_progress(min(1.0, (len(done) + part) / _TOKEN_ATTACKS))

    for result in attack_tokens(
        knowledge,
        private.smashed_BTD,
        private.texts,
        embedding=embedding,
        seed=setting.config.run.seed,
        max_steps=min(_MOST_STEPS, _STEPS_PER_TEXT * len(public.smashed_BTD)),
        progress=tell,
    ):
        done.append(result.attack)
        tell(result.attack, 0.0)
        yield result


def gradient_results(
    setting: AuditSetting, protection: Protection, public: View, private: View, *, on_progress: OnProgress
) -> Iterator[AttackResult]:
    """Recover the loss mask, then the labels, from output gradients; arguments as in ``token_results``."""
    few = public.first(_PUBLIC_FOR_MASKS)
    log_prior_V = log_frequencies(public.texts.targets_BT, int(setting.model.config.vocab_size))
    by_row = _by_row(setting, protection, private, log_prior_V)
    on_progress(0.1)
    public_evidence_BT = _by_row(setting, protection, few, log_prior_V).evidence_N.view_as(few.texts.targets_BT)
    on_progress(0.3)
    private_evidence_BT = by_row.evidence_N.view_as(private.texts.targets_BT)
    figures = {
        "row norms": (few.gradient_BTD.norm(dim=-1), private.gradient_BTD.norm(dim=-1)),
        "row likelihoods": (public_evidence_BT, private_evidence_BT),
    }
    name = max(figures, key=lambda name: _checked(figures[name][0], few.texts.carries_loss))
    learned_from_BT, seen_BT = figures[name]
    mask = MaskAttack(learned_from_BT, few.texts.carries_loss)
    carries_loss_BT = mask.probability(seen_BT)
    yield mask.result(name, carries_loss_BT, private.texts.carries_loss)
    on_progress(0.4)
    if setting.config.model.top_blocks == 0:
        yield label_result("known head", by_row.labels_N.view_as(private.texts.targets_BT), private.texts.targets_BT)
        return
    top = setting.parts().top
    matched_BT = match_labels(
        private.gradient_BTD,
        private.hidden_BTD,
        lambda hidden_BTD: top(hidden_BTD).logits,
        sending(protection.output_gradient, setting.max_tokens),
        log_prior_V=log_prior_V,
        carries_loss_BT=carries_loss_BT,
    )
    yield label_result("gradient matching", matched_BT, private.texts.targets_BT)
    on_progress(0.8)
    many = public.first(_PUBLIC_FOR_LABELS)
    probe = LabelProbe(
        many.gradient_BTD[many.texts.carries_loss],
        many.texts.targets_BT[many.texts.carries_loss],
        head_VD=setting.model.get_output_embeddings().weight,
        log_prior_V=log_prior_V,
        seed=setting.config.run.seed,
    )
    probed_BT = probe.guess(private.gradient_BTD.flatten(0, 1)).view_as(private.texts.targets_BT)
    yield label_result("learned probe", probed_BT, private.texts.targets_BT)
    on_progress(1.0)


def _by_row(setting: AuditSetting, protection: Protection, seen: View, log_prior_V: Tensor) -> LabelGuess:
    """Read each row as if it came straight from the head; with blocks in the top that is an approximation."""
    rows_BTD = seen.hidden_BTD
    if setting.config.model.top_blocks:
        with torch.no_grad():
            first = setting.parts().top.blocks.start
            rows_BTD = setting.parts(bottom_blocks=first, top_blocks=0).trunk(rows_BTD)
    head = setting.parts(top_blocks=0).top
    return recover_labels(
        seen.gradient_BTD.flatten(0, 1),
        rows_BTD.flatten(0, 1),
        lambda rows_ND: head(rows_ND.unsqueeze(1)).logits.squeeze(1),
        sending(protection.output_gradient, setting.max_tokens),
        log_prior_V=log_prior_V,
    )


def _checked(figures_MT: Tensor, carries_loss_MT: Tensor) -> float:
    """Say how well a figure tells the mask, on public sequences that it did not learn from."""
    half = len(figures_MT) // 2
    learned = MaskAttack(figures_MT[:half], carries_loss_MT[:half])
    return ((learned.probability(figures_MT[half:]) > 0.5) == carries_loss_MT[half:]).float().mean().item()
