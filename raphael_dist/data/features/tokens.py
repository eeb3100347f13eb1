"""Tokenizes captions as plain text: a special token written in a caption has no effect."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from raphael_dist.data.features.encoder_files import TokenBatch, Tokenizer

_log = logging.getLogger(__name__)
_TRIES = 8  # breaking up one special token may create another in hostile text


def tokenize(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int, padding: str) -> tuple[TokenBatch, int]:
    """Tokenize captions with a tokenizer of transformers. Special tokens written in a caption are treated as plain text.

    Args:
        tokenizer: The tokenizer.
        captions: B captions.
        max_tokens: Largest number of tokens of a caption, with special tokens. Longer captions are truncated.
        padding: "max_length": pad all captions to `max_tokens` tokens. "longest": to the length of the longest caption.

    Returns:
        The tokenizer's output (input_ids, attention_mask, int64 [B, Y] for Y tokens), and the number of captions that were
        truncated.
    """
    texts = list(captions)
    for _ in range(_TRIES):
        # split_special_tokens keeps most tokenizers from finding special tokens in the text.
        batch = tokenizer(
            texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt",
            return_special_tokens_mask=True, split_special_tokens=True,
        )  # fmt: skip
        special = _special_in_text(tokenizer, batch["input_ids"], batch["special_tokens_mask"])
        if batch.encodings is None or not special.any():
            break
        # The vocabulary of a Unigram model (T5) contains them as pieces; a space inside turns them into ordinary characters.
        for row in special.any(dim=1).nonzero().flatten().tolist():
            texts[row] = _break_up(texts[row], [batch.encodings[row].offsets[i] for i in special[row].nonzero().flatten()])
    batch.pop("special_tokens_mask")
    return batch, _count_truncated(tokenizer, texts, batch, max_tokens)


def _special_in_text(tokenizer: Tokenizer, ids_BY: Tensor, mask_BY: Tensor) -> Tensor:
    """Return bool [B, Y]: true at special tokens that are written in a caption's text. The unknown token is excluded.

    `ids_BY`: token ids. `mask_BY`: 1 at special tokens that the tokenizer has added itself.
    """
    # Some tokenizers pad with an ordinary character ("!" in Stable Diffusion 2).
    known = {i for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True) if len(token) > 1}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    known = (known - {tokenizer.unk_token_id}) | ends
    return torch.isin(ids_BY, torch.tensor(sorted(known))) & (mask_BY == 0)


def _break_up(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return `text` with a space after the first character of each span, so that it contains no special tokens there.

    A span of one character is replaced by a space. `spans`: (index of the first character, index after the last one) of
    each special token in the text.
    """
    for first, end in sorted(spans, reverse=True):
        text = text[: first + (end - first > 1)] + " " + text[first + 1 :]
    return text


def _count_truncated(tokenizer: Tokenizer, texts: Sequence[str], batch: TokenBatch, max_tokens: int) -> int:
    if batch.encodings is not None:
        return sum(bool(encoding.overflowing) for encoding in batch.encodings)
    full = (batch["attention_mask"].sum(dim=1) == max_tokens).tolist()
    full_texts = [text for text, is_full in zip(texts, full, strict=True) if is_full]
    # A tokenizer in Python does not report truncation; only texts that fill their row may be longer.
    return sum(
        len(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]) > max_tokens for text in full_texts
    )


class TruncationCounter:
    """Counts tokenized texts, and how many of them were truncated to `max_tokens` tokens; logs both numbers as a warning."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.truncated, self.total = max_tokens, 0, 0
        self._warned: set[str] = set()

    def add(self, truncated: int, total: int) -> None:
        """Count `total` further texts, `truncated` of which were truncated."""
        self.truncated += truncated
        self.total += total

    def warn(self, what: str = "captions", truncated: int | None = None, total: int | None = None) -> None:
        """Log how many texts were truncated, if any were. There is at most one warning for each kind of texts.

        `what`: kind of the texts, such as "captions". `truncated`, `total`: numbers of truncated texts and of all texts.
        None: the numbers counted by `add`.
        """
        truncated = self.truncated if truncated is None else truncated
        total = self.total if total is None else total
        if truncated and what not in self._warned:
            self._warned.add(what)
            _log.warning("%s", truncation_line(what, truncated, total, self.max_tokens))


def truncation_line(what: str, truncated: int, total: int, max_tokens: int) -> str:
    """Return a line for the log: `truncated` of `total` texts have more than `max_tokens` tokens and are truncated.

    `what`: kind of the texts in the plural, such as "captions".
    """
    return f"text.max_tokens={max_tokens}: longer {what} are truncated ({truncated} of {total})"
