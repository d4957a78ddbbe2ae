"""Nystrom attention (Xiong et al., AAAI 2021): self-attention in time and memory linear in the tokens."""

import torch
from torch import Tensor, nn

__all__ = ["NystromAttention", "iterative_pinv"]


class NystromAttention(nn.Module):
    """Multi-head self-attention through landmarks.

    ``softmax(Q L_k^T) pinv(softmax(L_q L_k^T)) softmax(L_q K^T) V`` with landmarks L the means of runs of queries and
    keys, plus a depth-wise convolution of the values along the sequence. With at most ``n_landmarks`` tokens every
    token is a landmark, and up to the iteration of the pseudo-inverse it is exact attention.

    Landmarks are means over present tokens only, dealt evenly, so that padding at the end changes nothing.

    Args:
        dim: width of the tokens.
        n_heads: heads; must divide ``dim``.
        n_landmarks: number of landmarks.
        pinv_iterations: of the pseudo-inverse.
        residual_kernel: width of the convolution of the values, odd; 0: none.
        dropout: of the output, in training.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int = 8,
        n_landmarks: int = 128,
        pinv_iterations: int = 6,
        residual_kernel: int = 33,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"n_heads must divide dim, got {n_heads} and {dim}")
        self.n_heads, self.n_landmarks, self.pinv_iterations = n_heads, n_landmarks, pinv_iterations
        self.head_dim = dim // n_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.residual = (
            nn.Conv1d(dim, dim, residual_kernel, padding=residual_kernel // 2, groups=dim, bias=False)
            if residual_kernel
            else None
        )

    def forward(self, tokens: Tensor, mask: Tensor, rows: int = 0) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            tokens: (B, N, dim); present tokens come first in every row.
            mask: (B, N) bool, True on present tokens.
            rows: also return the attention weights of this many first tokens.

        Returns:
            (B, N, dim), zero on padding, and (B, rows, N) weights, mean over heads, when asked for.
        """
        results, attentions = [], []
        for b in range(len(tokens)):  # bags differ in length: each is attended alone, without padding
            n = int(mask[b].sum())
            result, attention = self._attend(tokens[b, :n], rows)
            results.append(nn.functional.pad(result, (0, 0, 0, tokens.shape[1] - n)))
            if attention is not None:
                attentions.append(nn.functional.pad(attention, (0, tokens.shape[1] - n)))
        return torch.stack(results), torch.stack(attentions) if rows else None

    def _attend(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        n, dim = tokens.shape
        query, key, value = self.qkv(tokens).view(n, 3, self.n_heads, self.head_dim).permute(1, 2, 0, 3)
        query = query * self.head_dim**-0.5
        m = min(n, self.n_landmarks)
        # Tokens are dealt to m runs as evenly as whole numbers allow; a landmark is the mean of its run.
        run = torch.div(torch.arange(n, device=tokens.device) * m, n, rounding_mode="floor")
        size = torch.bincount(run, minlength=m).to(tokens.dtype).view(1, -1, 1)
        query_marks = torch.zeros_like(query[:, :m]).index_add(1, run, query) / size
        key_marks = torch.zeros_like(key[:, :m]).index_add(1, run, key) / size
        inverse = iterative_pinv(torch.softmax(query_marks @ key_marks.transpose(1, 2), dim=-1), self.pinv_iterations)
        heads, weights = [], []
        for h in range(self.n_heads):  # one head at a time: the largest matrix is N x landmarks
            right = torch.softmax(query_marks[h] @ key[h].T, dim=-1)
            left = torch.softmax(query[h] @ key_marks[h].T, dim=-1) @ inverse[h]
            heads.append(left @ (right @ value[h]))
            if rows:
                weights.append(left[:rows] @ right)
        result = torch.cat(heads, dim=-1)
        if self.residual is not None:
            values = value.transpose(1, 2).reshape(dim, n)
            result = result + self.residual(values.unsqueeze(0)).squeeze(0).T
        return self.out(result), torch.stack(weights).mean(dim=0) if rows else None


def iterative_pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Moore-Penrose inverse of (..., m, m) by the third-order iteration of Razavi et al., as Nystromformer uses it.

    Args:
        matrix: (..., m, m), rows of a softmax.
        iterations: 6 are enough for attention; more come closer.
    """
    absolute = matrix.abs()
    scale = absolute.sum(dim=-1).amax(dim=-1) * absolute.sum(dim=-2).amax(dim=-1)
    inverse = matrix.transpose(-1, -2) / scale[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 13 * identity - product @ (15 * identity - product @ (7 * identity - product))
        inverse = 0.25 * inverse @ inner
    return inverse
