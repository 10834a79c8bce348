"""Scores with a Hugging Face model, so that published results can be reproduced. Used by scripts/base_eval --hf-path.

Needs the extra `eval` (transformers). Texts of similar length go together, padded on the right, under a token budget.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from nanochat.common import NanochatError, first_line
from nanochat.core_eval import BATCH_TOKENS, Candidate, Question, score_by_length
from nanochat.devices import get_compute_dtype, is_out_of_memory
from nanochat.trimming import padded

LOGIT_BYTES = 4 << 30  # for a batch: other models have up to eight times as many words as ours
LONGEST_CONTEXT = 4096  # also for models that can do more: no CORE question is longer


class HuggingFaceScorer:
    """A causal language model from a folder or the hub. Raises NanochatError if it cannot be loaded.

    fingerprint: a hash that differs for other weights, and for the same weights elsewhere.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise NanochatError("--hf-path needs transformers: bash runs/setup.sh eval") from None
        try:
            revision, self.fingerprint = _identify(path)
            how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}  # None: ask at the terminal
            self.tokenizer = AutoTokenizer.from_pretrained(path, **how)
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=get_compute_dtype(device), **how)
            self.model = model.to(device).eval()
        except Exception as error:  # damaged files make the library raise a dozen kinds, all with the same way out
            if is_out_of_memory(error):
                raise
            if "trust_remote_code" in str(error):
                raise NanochatError(
                    f"--hf-path {path!r} brings its own code, which is not run here: measure an export of nanochat by its "
                    "run, with --model-tag"
                ) from error
            where = "folder" if Path(path).exists() else "model of the hub"
            reason = first_line(error)[:300]
            raise NanochatError(f"--hf-path {path!r} is not a {where} that transformers can load: {reason}") from error
        self.device = device
        self.context = context_of(self.model.config)
        # The token before the beginning of a document: the model must see something before the first token.
        special = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        first = next((token for token in special if token is not None), None)
        if first is None:
            raise NanochatError(
                f"the tokenizer of {path!r} has no token to begin a text with: give it a bos, eos or pad token"
            )
        self.first: int = first

    def encode(self, text: str) -> list[int]:
        return [self.first, *self.tokenizer.encode(text, add_special_tokens=False)]

    @torch.inference_mode()
    def score(self, questions: list[Question]) -> list[list[tuple[float, bool]]]:
        """See core_eval.Scorer."""
        candidates = [candidate for question in questions for candidate in question.candidates]
        vocab_size = self.model.get_output_embeddings().weight.size(0)
        most_tokens = min(BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"]), LOGIT_BYTES // (4 * vocab_size))
        lengths = [len(candidate.tokens) for candidate in candidates]
        found = iter(score_by_length(self._score_batch, candidates, lengths, most_tokens))
        return [[next(found) for _ in question.candidates] for question in questions]

    def _score_batch(self, candidates: list[Candidate]) -> list[tuple[float, bool]]:
        lengths = torch.tensor([len(candidate.tokens) for candidate in candidates], device=self.device)
        idx = padded([candidate.tokens for candidate in candidates], self.first, self.device)
        mask = (torch.arange(idx.size(1), device=self.device) < lengths[:, None]).long()
        scores = []
        for logits, candidate in zip(self.model(idx, attention_mask=mask).logits, candidates, strict=True):
            judged = logits[candidate.start - 1 : len(candidate.tokens) - 1].float()
            wanted = torch.tensor(candidate.tokens[candidate.start :], device=self.device)
            mean = judged.log_softmax(-1).gather(1, wanted[:, None]).mean().item()
            scores.append((mean, bool((judged.argmax(-1) == wanted).all())))
        return scores


def context_of(config: Any) -> int:
    """Tokens of the longest text, by any of the names that models give to it."""
    parts = (config, getattr(config, "text_config", None))  # the latter: of models that see pictures, too
    found = [getattr(part, name, None) for part in parts for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((min(LONGEST_CONTEXT, size) for size in found if isinstance(size, int) and size > 0), LONGEST_CONTEXT)


def _identify(path: str) -> tuple[str, str]:
    """(revision, fingerprint): from the hub's commit, or from a folder's path and the size and time of each file."""
    folder, revision = Path(path), "main"
    if folder.is_dir():
        known = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
        what = repr((str(folder.resolve()), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in known]))
    else:
        from huggingface_hub import snapshot_download

        revision = Path(snapshot_download(path, allow_patterns="config.json")).name
        what = f"{path} {revision}"
    return revision, hashlib.sha256(what.encode("utf-8")).hexdigest()[:12]
