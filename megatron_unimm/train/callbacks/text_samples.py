"""What the model reads, should say and would say, as text: one row of the batch now and then.

The prediction costs no extra forward pass: before a step that is to be shown, the model is asked to hand over the text
logits of its first micro-batch, of which only the best token per position is kept. It is greedy and teacher-forced: at
each position the model sees the true text before it.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_unimm.data.chat import ChatTokenizer
from megatron_unimm.data.loader import StepBatch
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow
from megatron_unimm.methods.interface import ShowsText
from megatron_unimm.models.attention import context_index
from megatron_unimm.train.callbacks.markdown import code_block
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.setup import chat_format


@dataclass(frozen=True)
class Guess:
    """The best tokens of one rank's part of the vocabulary, at its part of the row."""

    positions: np.ndarray
    """int64 [n]: places in the row."""
    logits: np.ndarray
    """float32 [n]."""
    tokens: np.ndarray
    """int64 [n]."""


class TextSamples:
    """Collects the text of data-parallel rank 0's first row from its last pipeline stage, and renders it on rank 0.

    Args:
        every_steps: steps that are shown are multiples of this, and the first one after the start of the job.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self._tokenizer: ChatTokenizer | None = None
        self._tensor_rank = 0
        self._next = 0
        self._waiting = False
        self._best: tuple[Tensor, Tensor] | None = None

    def start(self, loop: Loop) -> None:
        """Get ready, on all ranks, before the first step."""
        if dist.get_rank() == 0:
            self._tokenizer = chat_format(loop.stage).tokenizer
        if loop.groups.data_rank == 0:
            for chunk in loop.train_step.chunks:
                if isinstance(chunk.module, ShowsText):
                    chunk.module.text_observer = self._observe
        self._tensor_rank = loop.groups.tensor_rank
        self._next = loop.step + 1
        self._waiting = True

    @torch.no_grad()
    def _observe(self, logits: Tensor) -> None:
        """Keep the best tokens of the first text logits ``[n, vocab / tensor]`` of a step that is to be shown."""
        if self._waiting:
            logit, token = logits.max(dim=-1)
            self._best = logit.float(), token + self._tensor_rank * logits.shape[-1]
            self._waiting = False

    def after_step(self, loop: Loop, batch: StepBatch) -> str | None:
        """Markdown on rank 0 if the step that has just ended is shown, else None. All ranks call it every step."""
        text = None
        if loop.step == self._next:
            text = self._collect(loop, batch.rows[0].conversation)
            self._next = (loop.step // self.every_steps + 1) * self.every_steps
        self._waiting = loop.step + 1 == self._next
        return text

    def _collect(self, loop: Loop, row: PackedRow) -> str | None:
        everyone: list[Guess | None] = [None] * dist.get_world_size()
        is_first = dist.get_rank() == 0
        dist.gather_object(self._guess(loop, row), everyone if is_first else None, group=loop.groups.host)
        self._best = None
        if self._tokenizer is None:
            return None
        guesses = [guess for guess in everyone if guess is not None]
        return render(row, best_tokens(guesses, len(row.labels)), self._tokenizer)

    def _guess(self, loop: Loop, row: PackedRow) -> Guess | None:
        """This rank's part of the prediction, if it holds one. Waits for the device."""
        local = context_index(np.asarray(row.segment_bounds), loop.groups.context_rank, loop.groups.config.context)
        positions = local[row.labels[local] != IGNORED_LABEL]
        # A row without labels makes no text logits: those that came are the next row's.
        if self._best is None or not len(positions):
            return None
        logits, tokens = (part.cpu().numpy() for part in self._best)
        assert len(logits) == len(positions), f"{len(logits)} predictions for {len(positions)} labels"
        return Guess(positions, logits, tokens)


def best_tokens(guesses: list[Guess], row_length: int) -> np.ndarray:
    """The best token at each position over all parts of the vocabulary and of the row: int64 ``[T]``, -1 where no rank
    looked.
    """
    best = np.full(row_length, -np.inf, dtype=np.float32)
    tokens = np.full(row_length, -1, dtype=np.int64)
    for guess in guesses:
        better = guess.logits > best[guess.positions]
        chosen = guess.positions[better]
        best[chosen], tokens[chosen] = guess.logits[better], guess.tokens[better]
    return tokens


def render(row: PackedRow, predicted: np.ndarray, tokenizer: ChatTokenizer) -> str:
    """The first sample of each kind in a row, as Markdown.

    Args:
        predicted: int64 ``[T]``: the token that each position predicts, -1 for none.
    """
    parts = []
    for number, kind in enumerate(row.kinds):
        if kind in row.kinds[:number]:
            continue
        start, stop = row.segment_bounds[number : number + 2]
        parts.append(f"**{row.sample_ids[number]}** ({kind})")
        labelled = start + np.flatnonzero(row.labels[start:stop] != IGNORED_LABEL)
        texts = {"prompt": row.input_ids[start : labelled[0] + 1 if len(labelled) else stop]}
        if len(labelled):
            texts["label"] = row.labels[labelled]
        if len(labelled) and (predicted[labelled] >= 0).all():
            texts["predicted, each token from the true text before it"] = predicted[labelled]
        parts += [f"{title}\n\n{code_block(_text(tokens, tokenizer))}" for title, tokens in texts.items()]
    return "\n\n".join(parts)


def _text(tokens: np.ndarray, tokenizer: ChatTokenizer) -> str:
    """Decoded tokens; a run of visual tokens as its length."""
    token = tokenizer.template.special_tokens["image_pad"]
    pad, length = re.escape(token), len(token)
    return re.sub(
        f"(?:{pad})+", lambda run: f"<{len(run[0]) // length} visual tokens>", tokenizer.decode(tokens.tolist())
    )
