"""Results of linear_logprobs, and the certificate of its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Values of Certificate.num_entries for tokens without sparse entries, whose gradient is exact
RECOMPUTED, CACHED = -1, -2


class Certificate(NamedTuple):
    """How each token's gradient is computed, and what is left out of it. Reading it does not wait for the device.

    Attributes:
        dropped_mass: ``[...]`` float32, the probability that is in none of a token's sparse entries; 0 where the
            gradient is exact. The gradient of the loss with respect to a token's logits is off by at most
            ``|c| dropped_mass / temperature`` in the L1 norm, apart from float32 rounding (which exceeds a tolerance
            below 1e-6).
        num_entries: ``[...]`` int32, the number of sparse entries, or of tokens in the sampler's support; 0 for a token
            without a loss; -2 if the token's probabilities are cached, -1 if its logits are recomputed. With ``group``
            a token has -1 if that is so on any rank, and -2 as on this one.
    """

    dropped_mass: Tensor
    num_entries: Tensor

    @property
    def mean_dropped_mass(self) -> Tensor:
        """Mean over the tokens with a loss, 0-d."""
        return self.dropped_mass.sum() / self._num_tokens

    @property
    def max_dropped_mass(self) -> Tensor:
        """Maximum over all tokens, 0-d; 0 without tokens."""
        return torch.cat([self.dropped_mass.flatten(), self.dropped_mass.new_zeros(1)]).amax()

    @property
    def sparse_share(self) -> Tensor:
        """Share of the tokens with a loss whose gradient is sparse, 0-d in [0, 1]."""
        return (self.num_entries > 0).sum() / self._num_tokens

    @property
    def cached_share(self) -> Tensor:
        """Share of the tokens with a loss whose probabilities are cached, 0-d in [0, 1]."""
        return (self.num_entries == CACHED).sum() / self._num_tokens

    @property
    def mean_entries(self) -> Tensor:
        """Mean number of entries over the tokens whose gradient is sparse, 0-d."""
        return self.num_entries.clamp(min=0).sum() / (self.num_entries > 0).sum().clamp(min=1)

    @property
    def _num_tokens(self) -> Tensor:
        return (self.num_entries != 0).sum().clamp(min=1)


def reference_entries(loss_mask: Tensor, support: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return ``num_entries`` of the reference, which computes all logits of tokens without a support."""
    num_entries = torch.where(loss_mask, RECOMPUTED, 0)
    if support is not None:
        sizes = support[1].diff()
        num_entries = torch.where(loss_mask & (sizes > 0), sizes, num_entries)
    return num_entries.int()


class CertifiedLogprobOutput(NamedTuple):
    """Log-probabilities and entropies in nats, float32, in the shape of the labels, and their certificate."""

    logprobs: Tensor
    entropy: Tensor
    certificate: Certificate


class ForwardOutput(NamedTuple):
    """Output of the registered operation for N tokens, T of which have a loss and no support."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N]
    row_stats: Tensor  # [2, N], of RowResults
    dropped_mass: Tensor  # [N], of the certificate
    num_entries: Tensor  # [N] int32, of the certificate
    cached_probs: Tensor  # [num_dense, row_stride(V)]
    cached_factors: Tensor  # [2, num_dense]
    sparse_index: Tensor  # [T or 0, max_entries] int32
    sparse_value: Tensor  # [T or 0, max_entries]
    local_num_entries: Tensor  # [N] int32, on this rank
    first_row: Tensor  # [1] int64, of this rank's shard
    tokens: Tensor  # [T] int64, indices of these tokens
    support_logits: Tensor  # [M]
