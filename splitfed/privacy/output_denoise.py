"""Taking the trunk output nearer to that of clean smashed data, on the device that knows what it sent.

The device's own smashed data and noise enter, and nothing leaves: what the top then sends back passes the gate as ever.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

_RIDGE = 1e-6  # of the mean square of a feature


@dataclass(frozen=True, eq=False)
class OutputDenoiser:
    """An affine map from the noisy trunk output, the clean smashed data and its noise to the clean trunk output.

    Shape legend: B sequences, T tokens, D hidden.

    Attributes:
        of_output_DD: What the trunk output is multiplied by, shape [D, D].
        of_smashed_DD: The same for the smashed data.
        of_noise_DD: The same for its noise.
        bias_D: What is added, shape [D].

    Guarantees:
        * On the data that it was fitted to, its squared error is the least of any affine map, to the ridge.
        * Differentiable with respect to the trunk output; smashed data and noise are taken as constants.
        * A row of the result depends on the same rows of the inputs alone.

    Source: Mai, Yan, Huang, Yang & Pang, Split-and-Denoise: protect large language model inference with local
    differential privacy (2023), for the inputs; there the map is a transformer.
    """

    of_output_DD: Tensor
    of_smashed_DD: Tensor
    of_noise_DD: Tensor
    bias_D: Tensor

    def __call__(self, output_BTD: Tensor, smashed_BTD: Tensor, noise_BTD: Tensor) -> Tensor:
        """Estimate the clean trunk output.

        Args:
            output_BTD: Trunk output of the released smashed data, shape [B, T, D].
            smashed_BTD: Smashed data before its noise, clipped, of the same shape.
            noise_BTD: What was added to it, of the same shape.

        Returns:
            An estimate, shape [B, T, D], of the trunk output's dtype.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if not output_BTD.shape == smashed_BTD.shape == noise_BTD.shape or output_BTD.shape[-1] != len(self.bias_D):
            raise ValueError(
                f"Trunk output, smashed data and noise are of one shape [B, T, {len(self.bias_D)}], not "
                f"{list(output_BTD.shape)}, {list(smashed_BTD.shape)} and {list(noise_BTD.shape)}."
            )
        estimate_BTD = output_BTD.float() @ self.of_output_DD + self.bias_D
        estimate_BTD = estimate_BTD + smashed_BTD.detach().float() @ self.of_smashed_DD
        return (estimate_BTD + noise_BTD.detach().float() @ self.of_noise_DD).to(output_BTD.dtype)

    def state(self) -> dict[str, Tensor]:
        """Give the tensors by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> "OutputDenoiser":
        """Take the tensors back.

        Raises:
            ValueError: If a tensor is missing, or there is one too many.
        """
        names = {part.name for part in fields(cls)}
        if state.keys() != names:
            raise ValueError(f"An output denoiser is made of {sorted(names)}, not of {sorted(state)}.")
        return cls(**state)


def fit_output_denoiser(batches: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> OutputDenoiser:
    """Fit the map by least squares, a batch at a time.

    Args:
        batches: Noisy trunk output, clean smashed data, its noise and the clean trunk output of public sequences, each
            of shape [B, T, D].

    Returns:
        The map, in float32.

    Raises:
        ValueError: If there is no batch.
    """
    gram_FF: Tensor | None = None
    moments_FD: Tensor | None = None
    for *inputs, wanted_BTD in batches:
        features_NF = torch.cat([*inputs, torch.ones_like(wanted_BTD[..., :1])], dim=-1).flatten(0, 1).double()
        gram, moments = features_NF.T @ features_NF, features_NF.T @ wanted_BTD.flatten(0, 1).double()
        gram_FF = gram if gram_FF is None else gram_FF + gram
        moments_FD = moments if moments_FD is None else moments_FD + moments
    if gram_FF is None or moments_FD is None:
        raise ValueError("A map needs data to be fitted to; give a batch or more.")
    ridge_F = _RIDGE * gram_FF.diagonal()
    weights_FD = torch.linalg.solve(gram_FF + torch.diag(ridge_F), moments_FD).float()
    of_output_DD, of_smashed_DD, of_noise_DD, bias_1D = weights_FD.split([*[moments_FD.shape[1]] * 3, 1])
    return OutputDenoiser(of_output_DD, of_smashed_DD, of_noise_DD, bias_1D[0])
