"""Lets lm-evaluation-harness measure our checkpoints: python -m nanochat.lm_eval_adapter --tasks arc_easy.

The harness has no entry point for external models, so this module registers "nanochat" and then runs the harness's own
command. Programs import it and call lm_eval.simple_evaluate(model="nanochat"). Needs the extra `eval`.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError, logger, run_command
from nanochat.core_eval import Candidate, NanochatScorer, Question
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.runs import STAGES
from nanochat.sampling import SamplingParams
from nanochat.sequence import Sequence, spoken
from nanochat.trimming import prompt_room, trim_prompt

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string, warning_once
    from tqdm import tqdm
except ImportError as error:
    MISSING = f"lm-evaluation-harness is not installed ({error}): bash runs/setup.sh eval"
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise NanochatError(MISSING) from error

ARGUMENTS = {"source": str, "model_tag": str, "step": int, "device": str, "batch_tokens": int}
CHAT_MARK = "<|nanochat_messages|>"  # marks a context that is a conversation: JSON follows, then the answer's beginning
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}  # of answers
MOST_CANDIDATES = 64  # of a question
CHUNK = 256  # questions at a time; finished ones are in the harness's cache


@register_model("nanochat")
class NanochatLM(TemplateLM):
    """A checkpoint behind the harness's interface. Every text begins with <|bos|>; a long one loses the tokens after it."""

    def __init__(self, **arguments: Any) -> None:
        """arguments: see ARGUMENTS. Raises NanochatError for any other, and if the checkpoint or device does not exist."""
        super().__init__()
        for name, value in arguments.items():
            if name not in ARGUMENTS:
                raise NanochatError(f"unknown argument {name!r} in --model_args: choose from {', '.join(ARGUMENTS)}")
            if ARGUMENTS[name] is int and not isinstance(value, int):
                raise NanochatError(f"{name}={value} in --model_args is not a whole number")
        given = {name: ARGUMENTS[name](value) for name, value in arguments.items()}  # a tag may be given as a number
        if (source := given.get("source", "base")) not in STAGES:
            raise NanochatError(f"source={source} in --model_args is no stage of a run: choose from {', '.join(STAGES)}")
        _, self._rank, _, self._world_size, self._device = compute_init(given.get("device", ""))
        # Not self.tokenizer: the base class would take it for a Hugging Face tokenizer.
        model, self.bpe, self.meta = load_model(source, self._device, "eval", given.get("model_tag"), given.get("step"))
        self.scorer = NanochatScorer(model, self.bpe, given.get("batch_tokens"))
        self.trimmed = 0  # requests since the last report

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> NanochatLM:
        return cls.create_from_arg_obj(simple_parse_args_string(_quote_tag(arg_string)), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> NanochatLM:
        device = (additional_config or {}).get("device")  # its batch sizes are ignored: ours are in tokens
        asked = {"device": device} if device not in (None, "cuda:0") else {}  # cuda:0 is the harness's default
        return cls(**{**asked, **arg_dict})

    @property
    def eot_token_id(self) -> int:
        return self.bpe.get_bos_token_id()  # what stands between documents, and before the first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a context and its continuation; add_special_tokens: False for text that begins no document."""
        if string.startswith(CHAT_MARK):
            messages, end = json.JSONDecoder().raw_decode(string, len(CHAT_MARK))
            return self.bpe.render_for_completion({"messages": messages}) + self.bpe.encode(string[end:])
        return self.bpe.encode(string, prepend=None if add_special_tokens is False else "<|bos|>")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON after a mark, which tok_encode renders; so text that spells a special token stays text.

        Without add_generation_prompt, the last message is the beginning of the answer.
        """
        messages, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        return CHAT_MARK + json.dumps(messages, ensure_ascii=False) + begun

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Splits as the harness does, but always into the tokens of the whole text, even if one spans both parts."""
        if (before := context.rstrip()) == context + continuation:
            raise NanochatError(f"an empty continuation cannot be judged; its context ends with {context[-40:]!r}")
        tokens = self.tok_encode(context + continuation)
        start = min(len(self.tok_encode(before)), len(tokens) - 1)
        return tokens[:start], tokens[start:]

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **more: Any) -> list[tuple[float, bool]]:
        """(log P(judged | before), whether it is the likeliest) for each (arguments for the cache, before, judged)."""
        # Continuations of one context form a question, in parts: texts without any context may be thousands.
        numbered = groupby(enumerate(requests), lambda item: (item[0] // MOST_CANDIDATES, item[1][1]))
        groups, results = [[request for _, request in group] for _, group in numbered], []
        for at in tqdm(range(0, len(groups), CHUNK), desc="log-likelihoods", disable=self.rank != 0):
            part = groups[at : at + CHUNK]
            questions = [Question(0, [self._candidate(b, j) for _, b, j in group], 0, False) for group in part]
            for group, scores in zip(part, self.scorer.score(questions), strict=True):
                for (asked, _, judged), (mean, greedy) in zip(group, scores, strict=True):
                    results.append((mean * len(judged), greedy))
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, results[-1])
        self._report_trimmed(len(requests))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P(text). Text beyond the context is judged in windows, each begun by the last token of the one before."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        windows = [list(get_rolling_token_windows(text, self.eot_token_id, self.scorer.context - 1, 1)) for text in texts]
        scores = iter(self._loglikelihood_tokens([(None, *make_disjoint_window(w)) for text in windows for w in text]))
        results = [float(sum(next(scores)[0] for _ in text)) for text in windows]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a text of "until" or "max_gen_toks" tokens; greedy unless told otherwise."""
        engine, results = Engine(self.scorer.model, self.bpe), []
        for at in tqdm(range(0, len(requests), CHUNK), desc="answers", disable=self.rank != 0):
            part = requests[at : at + CHUNK]
            # Each request has its own seed: one that is repeated wants different answers.
            sequences = [self._sequence(request.args[0], request.args[1], 42 + at + i) for i, request in enumerate(part)]
            engine.run(sequences)
            for request, sequence in zip(part, sequences, strict=True):
                results.append(spoken(sequence.pieces))
                self.cache_hook.add_partial("generate_until", request.args, results[-1])
        self._report_trimmed(len(requests))
        return results

    def _sequence(self, context: str, settings: dict[str, Any], seed: int) -> Sequence:
        asked = normalize_gen_kwargs(settings)
        if unknown := sorted(asked.keys() - SETTINGS):
            warning_once(logger, f"generation settings that nanochat does not have, and leaves out: {', '.join(unknown)}")
        temperature = asked.get("temperature", 1.0) if asked["do_sample"] else 0.0
        top_k, top_p = asked.get("top_k", 0), asked.get("top_p", 1.0)
        most, stop = asked["max_gen_toks"], tuple(text for text in asked["until"] if text)
        params = SamplingParams(temperature, top_k, top_p, seed=seed, max_tokens=most, stop=stop)
        room = prompt_room(self.scorer.context, most, context_share=0.5)
        return Sequence(self._trim(self.tok_encode(context), room), params)

    def _candidate(self, before: list[int], judged: list[int]) -> Candidate:
        tokens = self._trim(before + judged, self.scorer.context)
        if len(judged) >= len(tokens):
            raise NanochatError(f"a continuation of {len(judged)} tokens does not fit a context of {len(tokens)} with <|bos|>")
        return Candidate(tokens, len(tokens) - len(judged))

    def _trim(self, tokens: list[int], most: int) -> list[int]:
        self.trimmed += len(tokens) > most
        return trim_prompt(tokens, most)

    def _report_trimmed(self, total: int) -> None:
        if self.trimmed:
            logger.warning(f"{self.trimmed} of {total} requests were cut on the left to fit {self.scorer.context} tokens")
        self.trimmed = 0

    @property
    def tokenizer_name(self) -> str:
        return f"nanochat-{self.bpe.fingerprint()}"

    def get_model_info(self) -> dict[str, Any]:
        return {f"model_{name}": self.meta[name] for name in ("tag", "stage", "step")}

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather_object(tensor.cpu()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, obj)
        return parts

    def barrier(self) -> None:
        dist.barrier()


def _quote_tag(arguments: str) -> str:
    """Model arguments with the tag in quotes: the harness would read 007 as 7, 1e3 as 1000.0 and none as no tag."""
    return re.sub(r"""\bmodel_tag=([^\s,'"]+)""", r'model_tag="\1"', arguments)


def main(argv: list[str] | None = None) -> int:
    if {"-h", "--help"} & set(argv or []):  # the harness knows nothing of us
        print(f"nanochat's checkpoint is measured unless --model names another; --model_args: {', '.join(ARGUMENTS)}\n")
    # where the harness's command reads them
    sys.argv = ["lm_eval", "run", "--model", "nanochat", *map(_quote_tag, argv or [])]
    try:
        cli_evaluate()
    except (TypeError, ValueError) as error:
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if not {"from_cli", "process_tasks"} & set(frames) and frames[-1] != "simple_evaluate":
            raise
        reason = " ".join(str(error).split())[:200]  # why the harness refuses its flags, its file or its tasks
        raise NanochatError(
            f"lm-evaluation-harness does not take this ({reason}): --help lists its flags, and its --config is YAML"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
