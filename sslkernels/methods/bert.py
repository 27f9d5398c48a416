# SPDX-License-Identifier: Apache-2.0
"""BERT: words of a text are hidden and named again; does the second passage follow the first?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.losses import masked_lm_loss, next_sentence_loss
from sslkernels.losses._common import IGNORE
from sslkernels.methods._method import Method
from sslkernels.nn import TextTransformer
from sslkernels.nn.transformer import init_linear
from sslkernels.ops import gather_tokens, nearest, token_mask


class BERT(Method):
    """Devlin et al. 2019. batch = (tokens, segments, is_random): (B, L), (B, L) and (B,) int64, `text.sentence_pairs`.

        15% of the tokens are chosen, never [CLS], [SEP] and padding: 80% of them become [MASK], 10% any token
        x    = backbone(tokens, segments)                                            (B, L, dim)
        h    = norm(gelu(dense(x)))                                                  at the chosen tokens alone
        mlm  = mean over the chosen tokens of cross_entropy(h @ token_embed.T + decoder_bias, the token)
        nsp  = mean cross_entropy(next_sentence(tanh(pooler(x[:, 0]))), is_random)
        loss = mlm + nsp

    With `next_sentence=False` batch = tokens and the loss is mlm: RoBERTa's way. Masks are drawn anew at every step, as
    RoBERTa's; BERT's data have ten of each passage. A batch without any token to choose has no mlm, and is NaN.

    Args:
        backbone: what turns tokens into features; its `token_embed` is the decoder's weight.
        mask_token, special_tokens: ids of [MASK], and of tokens that are never chosen, padding included.
        ratio, max_predictions: part of a row's tokens that is chosen, and the most of a row.
        continuations: (V,) bool, which ids continue a word ("##ing"): whole words are then chosen, within the same
            number of tokens.

    Source: google-research/bert `run_pretraining.py`, `create_pretraining_data.py::create_masked_lm_predictions`. Its
    mlm divides by the number of tokens + 1e-5, and its blocks are post-norm.

    Example:
        >>> method = BERT(TextTransformer(1000), next_sentence=False)
        >>> loss, metrics = method(torch.randint(5, 1000, (8, 64)))
    """

    continuations: Tensor | None

    def __init__(
        self,
        backbone: TextTransformer,
        *,
        mask_token: int = 4,
        special_tokens: Sequence[int] = (0, 2, 3),
        ratio: float = 0.15,
        max_predictions: int = 20,
        continuations: Tensor | None = None,
        next_sentence: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__(process_group)
        vocab_size, dim = backbone.token_embed.weight.shape
        if continuations is not None and (continuations.shape != (vocab_size,) or continuations.dtype != torch.bool):
            got = f"{continuations.dtype} {tuple(continuations.shape)}"
            raise ValueError(f"continuations must be bool ({vocab_size},), one for each token, got {got}")
        self.mask_token, self.special_tokens = mask_token, tuple(special_tokens)
        self.ratio, self.max_predictions = ratio, max_predictions
        self.backbone = backbone
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=1e-12))
        self.decoder_bias = nn.Parameter(torch.zeros(vocab_size))
        self.pooler = nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) if next_sentence else None
        self.next_sentence = nn.Linear(dim, 2) if next_sentence else None
        self.register_buffer("continuations", continuations, persistent=False)
        for head in (self.transform, self.pooler, self.next_sentence):
            if head is not None:
                init_linear(head, "normal")

    def mask(self, tokens: Tensor, generator: torch.Generator | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) as the backbone sees them, and labels (B, L): the chosen tokens, -100 elsewhere."""
        words = None if self.continuations is None else (~self.continuations[tokens]).cumsum(dim=1)
        return token_mask(
            tokens,
            self.mask_token,
            self.backbone.token_embed.num_embeddings,
            self.ratio,
            special=self.special_tokens,
            words=words,
            lengths=self.backbone.valid(tokens).sum(dim=1),
            max_predictions=self.max_predictions,
            ignore_index=IGNORE,
            generator=generator,
            **options,
        )

    def forward(
        self, batch: Tensor | Sequence[Tensor], *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(batch, Tensor) != (self.next_sentence is None):
            wanted = "tokens" if self.next_sentence is None else "(tokens, segments, is_random)"
            raise ValueError(f"batch must be {wanted} for next_sentence={self.next_sentence is not None}")
        tokens, segments, is_random = (batch, None, None) if isinstance(batch, Tensor) else batch
        everyone = self.whole(tokens).gather(tokens) if self.training else tokens
        inputs, labels = self.draw(tokens, lambda rows: self.mask(everyone, generator))
        # a random token may be [PAD], and is none for that
        x = self.backbone.forward_features(inputs, segments, self.backbone.valid(tokens))
        # As many places of each row as a full one has, so that counting them waits for no device.
        slots = min(self.max_predictions, max(1, round(self.ratio * tokens.shape[1])))
        places = (labels != IGNORE).byte().topk(slots, dim=1).indices
        hidden = self.transform(gather_tokens(x, places))
        span = {"process_group": self.process_group}
        mlm = masked_lm_loss(
            hidden, self.backbone.token_embed.weight, labels.gather(1, places), self.decoder_bias, **span
        )
        if self.pooler is None or self.next_sentence is None or is_random is None:
            return mlm, {"loss": mlm.detach()}
        logits = self.next_sentence(self.pooler(x[:, 0]))
        nsp = next_sentence_loss(logits, is_random, **span)
        metrics = {"loss": mlm + nsp, "mlm_loss": mlm, "nsp_loss": nsp}
        metrics["nsp_accuracy"] = (logits.argmax(dim=1) == is_random).float().mean()
        return mlm + nsp, {name: value.detach() for name, value in metrics.items()}

    def encode(self, x: Tensor) -> Tensor:
        """Features of tokens (B, L)."""
        return self.backbone(x)

    @torch.no_grad()
    def fill(self, tokens: Tensor, segments: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Tokens (B, L) with the most likely one in place of each [MASK], or where `places` (B, L), bool, is True."""
        places = tokens == self.mask_token if places is None else places
        hidden = self.transform(self.backbone.forward_features(tokens, segments)[places])
        ones = hidden.new_ones(len(hidden), 1)
        weight = torch.cat([self.backbone.token_embed.weight, self.decoder_bias[:, None]], dim=1)
        best = nearest(torch.cat([hidden, ones], dim=1), weight, metric="dot")[1]  # no logits are stored
        return tokens.masked_scatter(places, best)
