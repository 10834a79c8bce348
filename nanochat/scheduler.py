"""Decides what runs in the next step: admits, advances and retires texts (sequence.py).

Driven by engine.py and, in a server, by engine_thread.py.

A step computes prompts until about one chunk of tokens is used up (never two), so that a long prompt does not stall other
texts; then it computes one token of every text whose prompt is done. Texts share the blocks of a common beginning, and
consecutive samples of one prompt share its whole computation. When memory runs out, the youngest text gives its blocks
back and is computed again later. Tools run in their own threads, and only the text that called one waits.
"""

from __future__ import annotations

import functools
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import torch

from nanochat.common import NanochatError, logger
from nanochat.cpu import available_memory
from nanochat.gpt import GPT
from nanochat.kv_cache import BLOCK_SIZE, BlockAllocator, KVBlocks
from nanochat.runner import ModelRunner
from nanochat.sampling import RowSettings, policy_logprobs, sample
from nanochat.sequence import Sequence, token_logprob
from nanochat.tokenizer import Tokenizer

CHUNK = {"cpu": 256, "cuda": 2048}  # a step begins no further prompt after this many tokens
MEMORY_SHARE = 0.25  # share of the free memory that is used for keys and values


class ComputedPrompt(NamedTuple):
    """A computed prompt that is kept because more waiting texts begin with it."""

    tokens: list[int]
    blocks: list[int]  # still in use; the first text writes into the last one only after the prompt's end
    content: int  # of its last full block
    logits: torch.Tensor  # (1, vocab_size), after its last token

    def serves(self, sequence: Sequence) -> bool:
        return not sequence.tokens and not sequence.params.prompt_logprobs and sequence.prompt == self.tokens


class Scheduler:
    """Continuous batching for one model. Any thread may `submit`, `cancel`, `cancel_all` and `post`; the rest is for one."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, calculator: Callable[[str], str | None], max_rows: int, kv_tokens: int
    ) -> None:
        """calculator: from the text of a call to its result, or None for no output; called in other threads.

        kv_tokens: tokens whose keys and values are held at once (0: enough for max_rows texts, if memory allows).
        """
        self.tokenizer, self.calculator, self.max_rows = tokenizer, calculator, max_rows
        self.limit = model.config.sequence_len
        num_blocks = _choose_num_blocks(model, max_rows, kv_tokens)
        self.runner = ModelRunner(model, num_blocks, max_rows)
        self.allocator = BlockAllocator(num_blocks)
        self.chunk = CHUNK.get(self.runner.device.type, CHUNK["cpu"])
        special = tokenizer.encode_special
        self.stop_ids = {special("<|assistant_end|>"), special("<|bos|>")}
        self._call_start, self._call_end = special("<|python_start|>"), special("<|python_end|>")
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence] = []  # in the decoding batch, by row
        self.prefilling: Sequence | None = None
        self._computed: ComputedPrompt | None = None  # kept for waiting texts
        self._settings = RowSettings([], self.runner.device)  # of the rows that were sampled last
        self.calling: set[Sequence] = set()
        self._waits_for_tools = False  # nothing runs, and no waiting text fits until a tool answers
        self._arriving: set[Sequence] = set()  # submitted, and not yet seen by the one thread
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tools = ThreadPoolExecutor(max_rows, thread_name_prefix="tool")
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    # ------------------------------------------------------------------------- from any thread

    def submit(self, sequence: Sequence) -> None:
        """Queue a text. Raises NanochatError if its prompt is empty or leaves no room in the context."""
        if not sequence.prompt:
            raise NanochatError("an empty prompt cannot be continued: begin it with <|bos|>")
        if len(sequence.prompt) >= self.limit:
            n = len(sequence.prompt)
            raise NanochatError(f"a prompt of {n} tokens leaves no room in a context of {self.limit}: shorten it")
        self._arriving.add(sequence)
        self._inbox.put(lambda: self._enqueue(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Stop a text before the next step and free what it holds."""
        self._inbox.put(lambda: self._finish(sequence, "cancelled"))

    def cancel_all(self) -> None:
        """Stop all texts before the next step."""
        self._inbox.put(lambda: self.end_all("cancelled"))

    def post(self, message: Callable[[], None]) -> None:
        """Call `message` in the scheduler's thread before its next step; wakes a waiting scheduler.

        If it raises, this is logged, and the texts go on.
        """
        self._inbox.put(functools.partial(_call, message))

    @property
    def num_waiting(self) -> int:
        """The number of texts that are queued but not begun."""
        return len(self._arriving) + len(self.waiting)

    # ------------------------------------------------------------------------- the step

    @property
    def is_idle(self) -> bool:
        """True if a step would do nothing: everything is done or waits for tools."""
        return self._inbox.empty() and not (self.rows or self.prefilling) and (self._waits_for_tools or not self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.rows) + len(self.calling) + (self.prefilling is not None)

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until something is submitted, cancelled or answered by a tool."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        self._waits_for_tools = False
        message()

    def forget(self) -> None:
        """Stop sharing anything that was computed so far; a prompt that is computed in part begins anew."""
        self._let_go()
        self.allocator.forget()
        if self.prefilling is not None:
            begun, self.prefilling = self.prefilling, None
            begun.prompt_logprobs.clear()
            self._preempt(begun)

    def step(self) -> None:
        """Compute about one chunk of prompts and one token of every running text."""
        self.take_messages()
        self._prefill()
        self._decode()

    def take_messages(self) -> None:
        """Process what other threads have posted since the last step."""
        while not self._inbox.empty():
            self._waits_for_tools = False
            self._inbox.get()()

    def end_all(self, reason: str, error: str | None = None) -> None:
        """End every text, with "cancelled" or "error"."""
        self.take_messages()
        self._let_go()
        prefilling = [self.prefilling] if self.prefilling else []
        for sequence in [*self.waiting, *prefilling, *self.rows, *self.calling]:
            self._finish(sequence, reason, error)

    def end_all_on_host(self, reason: str, error: str | None = None) -> None:
        """`end_all` for a device that fails at everything: does not touch it; nothing can be computed afterwards."""
        running, self.rows = self.rows, []
        for sequence in running:
            sequence.row = None
        for sequence in [*running, *self.calling]:  # before messages: a tool's answer would need a row
            self._finish(sequence, reason, error)
        self.end_all(reason, error)

    def _enqueue(self, sequence: Sequence) -> None:
        self._arriving.discard(sequence)
        if sequence.finish_reason is not None:  # already cancelled
            return
        sequence.begin(self.tokenizer)
        if sequence.params.max_tokens == 0 and not sequence.params.prompt_logprobs:
            self._finish(sequence, "length")
        else:
            self.waiting.append(sequence)

    def _prefill(self) -> None:
        """Compute prompts until the chunk is used up or no text can be admitted."""
        budget = self.chunk
        while budget > 0:
            self._begin_samples()
            sequence = self.prefilling or self._admit()
            if sequence is None:
                self._waits_for_tools = not self.rows
                return
            if sequence.computed >= (prompt_end := len(sequence.prompt)):  # put back, and its prompt is still in blocks
                self.prefilling = None
                self._enter_row(sequence)
                continue
            # A text's chunks always end at multiples of the chunk size, so its numbers do not depend on other texts in the
            # batch. They can depend on earlier texts: decoding rounds keys and values in shared blocks differently in
            # bfloat16 than prefill does. So what a text that was put back had generated is decoded again.
            end = min(prompt_end, (sequence.computed // self.chunk + 1) * self.chunk)
            tokens = sequence.slice(sequence.computed, end)
            every = sequence.params.prompt_logprobs and not sequence.tokens
            before = sequence.token_before(sequence.computed)
            logits = self.runner.prefill(tokens, before, sequence.computed, sequence.blocks, every)
            if every:
                following = sequence.slice(sequence.computed + 1, end + 1)
                for row, token in zip(logits[: len(following)], following, strict=True):
                    sequence.prompt_logprobs.append(token_logprob(row, token, sequence.params.logprobs or 0))
                logits = logits[-1:]
            # All weights are read for a prompt of one token, too: many short ones must not hold up running texts.
            budget -= max(len(tokens), self.chunk // 8)
            self._advance(sequence, end)
            if end == prompt_end:
                self.prefilling = None
                if sequence.params.max_tokens == 0:
                    self._finish(sequence, "length")
                    continue
                self._enter_row(sequence)
                if not sequence.tokens:
                    self._keep_prompt(sequence, logits)
                    self._sample([sequence], logits)

    def _admit(self) -> Sequence | None:
        """Begin the prompt that has waited longest, if a row and enough memory are free."""
        if not self.waiting or not self._has_row:
            return None
        sequence = self.waiting[0]
        known = sequence.slice(0, sequence.length - 1)  # always compute the last token, for its logits
        blocks, content = self.allocator.share([] if sequence.params.prompt_logprobs else known)
        needed = -(-sequence.length // BLOCK_SIZE) - len(blocks)
        if not self._has_blocks(needed) and (self.rows or self.calling):
            self.allocator.release(blocks)
            return None
        self._begin(sequence, blocks, content, needed, len(blocks) * BLOCK_SIZE)
        self.prefilling = sequence
        return sequence

    @property
    def _has_row(self) -> bool:
        return len(self.rows) + len(self.calling) < self.max_rows

    def _has_blocks(self, needed: int) -> bool:
        """Whether that many blocks are free plus one for each running text, which may soon need it."""
        return needed + len(self.rows) <= self.allocator.num_free

    def _begin(self, sequence: Sequence, shared: list[int], content: int, needed: int, computed: int) -> None:
        """Start the next waiting text with these shared full blocks and `needed` new ones; `computed` tokens are done."""
        self.waiting.popleft()
        sequence.admitted = True
        sequence.computed, sequence.published, sequence.content = computed, len(shared), content
        if not sequence.tokens:
            sequence.cached_tokens = computed
            self.prompt_tokens += len(sequence.prompt)
            self.cached_tokens += computed
        sequence.blocks = shared + [cast("int", self.allocator.allocate()) for _ in range(needed)]

    # ------------------------------------------------------------------------- samples of one prompt

    @property
    def _next_is_sample(self) -> bool:
        return self._computed is not None and bool(self.waiting) and self._computed.serves(self.waiting[0])

    def _keep_prompt(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Keep a prompt that was just computed, if the next waiting text has the same one."""
        self._computed = ComputedPrompt(sequence.prompt, list(sequence.blocks), sequence.content, logits)
        self.allocator.use(self._computed.blocks)
        if not self._next_is_sample:
            self._let_go()

    def _begin_samples(self) -> None:
        """Start the next waiting texts as long as their prompt is the one that is kept."""
        while self._computed is not None and self._start_samples(self._computed):  # some end at once, and free their rows
            pass
        if self._has_row or not self._next_is_sample:  # another prompt comes next, or there is no memory to keep this one
            self._let_go()

    def _start_samples(self, held: ComputedPrompt) -> bool:
        """Start as many texts of the kept prompt as there is room for; returns whether there were any."""
        whole = len(held.tokens) // BLOCK_SIZE  # full blocks; each text gets its own copy of the partial one after them
        needed, samples = len(held.blocks) - whole, []
        while self._next_is_sample and self._has_row and self._has_blocks(needed):
            sequence = self.waiting[0]
            self.allocator.use(held.blocks[:whole])
            self._begin(sequence, held.blocks[:whole], held.content, needed, len(held.tokens))
            self._enter_row(sequence)
            samples.append(sequence)
        if samples:
            if needed:
                self.runner.copy_block(held.blocks[-1], [sequence.blocks[-1] for sequence in samples])
            self._sample(samples, held.logits.expand(len(samples), -1))
        return bool(samples)

    def _let_go(self) -> None:
        """Release the kept prompt."""
        if self._computed is not None:
            self.allocator.release(self._computed.blocks)
            self._computed = None

    # ------------------------------------------------------------------------- one token of each

    def _decode(self) -> None:
        for sequence in list(self.rows):
            if sequence.row is not None and sequence.computed // BLOCK_SIZE >= len(sequence.blocks):
                self._grow(sequence)
        rows = self.rows
        if not rows:
            return
        positions = [sequence.computed for sequence in rows]
        tokens = [sequence.token_at(i) for sequence, i in zip(rows, positions, strict=True)]
        previous = [sequence.token_before(i) for sequence, i in zip(rows, positions, strict=True)]
        logits = self.runner.decode(tokens, previous, positions)
        sampled, places = [], []
        for place, sequence in enumerate(rows):
            self._advance(sequence, sequence.computed + 1)
            if sequence.computed == sequence.length:  # otherwise the next token is forced
                sampled.append(sequence)
                places.append(place)
        if len(sampled) < len(rows):
            logits = logits[places]
        if sampled:
            self._sample(sampled, logits)

    def _grow(self, sequence: Sequence) -> None:
        """Give a text its next block; if none is free, preempt the youngest texts until one is."""
        while (block := self.allocator.allocate()) is None:
            if self._computed is not None:
                self._let_go()
                continue
            youngest = max(self.rows, key=lambda other: other.created)
            self._preempt(youngest)
            if youngest is sequence:
                return
        self.runner.set_block(cast("int", sequence.row), len(sequence.blocks), block)
        sequence.blocks.append(block)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_row(sequence)
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _advance(self, sequence: Sequence, computed: int) -> None:
        """Record how many tokens are computed, and publish the blocks that are full now."""
        sequence.computed = computed
        while (sequence.published + 1) * BLOCK_SIZE <= computed:
            start = sequence.published * BLOCK_SIZE
            tokens = tuple(sequence.slice(start, start + BLOCK_SIZE))
            block = sequence.blocks[sequence.published]
            sequence.content = self.allocator.publish(block, sequence.content, tokens)
            sequence.published += 1

    # ------------------------------------------------------------------------- tokens

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        params = [sequence.params for sequence in sequences]
        if params != self._settings.params:
            self._settings = RowSettings(params, logits.device)
        adjusted = logits.clone() if self._settings.to_adjust else logits
        for i in self._settings.to_adjust:
            adjusted[i] = sequences[i].adjust(logits[i])
        uniform = [0.0 if p.greedy else s.random.random() for s, p in zip(sequences, params, strict=True)]
        chosen = sample(adjusted, self._settings, uniform)
        drawn = chosen.tolist()
        if min(drawn) < 0:
            error = "the model's logits are not finite: its weights are damaged, or diverged in training"
            self.end_all("error", error)
            self.runner.memory.clear()  # what is masked counts 0 times, but 0 times NaN would spoil the next text
            self.allocator.forget()
            raise NanochatError(error)
        if any(p.policy_logprobs for p in params):
            for sequence, logprob in zip(sequences, policy_logprobs(adjusted, self._settings, chosen).tolist(), strict=True):
                sequence.policy_logprobs.append(logprob)
        for i, (sequence, token) in enumerate(zip(sequences, drawn, strict=True)):
            if sequence.params.logprobs is not None:
                sequence.logprobs.append(token_logprob(logits[i], token, sequence.params.logprobs))
            self._accept(sequence, token)

    def _accept(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token, and decide whether the text continues."""
        params = sequence.params
        if sequence.first_token_at is None:
            sequence.first_token_at = time.perf_counter()
        self.generated_tokens += 1
        if token in self.stop_ids and not params.ignore_eos:
            sequence.stop_token = token
            self._finish(sequence, "stop")
            return
        self._append(sequence, token, 1)
        if token == self._call_start:
            sequence.call = []
        elif token == self._call_end and sequence.call is not None:
            self._call_tool(sequence)
        elif sequence.call is not None:
            sequence.call.append(token)
        self._end_or_go_on(sequence)

    def _append(self, sequence: Sequence, token: int, mask: int) -> None:
        if sequence.append(token, mask):
            self._finish(sequence, "stop")

    def _end_or_go_on(self, sequence: Sequence) -> None:
        if sequence.finish_reason is not None:
            return
        maximum = sequence.params.max_tokens
        if maximum is not None and len(sequence.tokens) >= maximum:
            self._finish(sequence, "length")
        elif sequence.length >= self.limit:
            self._finish(sequence, "context")
        elif sequence.on_update is not None:
            sequence.on_update(sequence)

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        if sequence.finish_reason is not None:
            return
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            if not self.waiting:
                self._let_go()
        if self.prefilling is sequence:
            self.prefilling = None
        self.calling.discard(sequence)
        self._leave_row(sequence)
        self._release(sequence)
        sequence.end(reason, error)

    def _enter_row(self, sequence: Sequence) -> None:
        sequence.row = len(self.rows)
        self.rows.append(sequence)
        self.runner.set_row(sequence.row, sequence.blocks)

    def _leave_row(self, sequence: Sequence) -> None:
        if sequence.row is None:
            return
        self.runner.move_row(len(self.rows) - 1, sequence.row)  # first: if it fails, the text is still in `rows`
        last = self.rows.pop()
        if last is not sequence:
            self.rows[sequence.row], last.row = last, sequence.row
        sequence.row = None

    def _release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.blocks)
        sequence.blocks = []

    # ------------------------------------------------------------------------- tools

    def _call_tool(self, sequence: Sequence) -> None:
        """Run the tool in a thread; until it answers, the text leaves the batch but keeps its blocks."""
        expression, sequence.call = self.tokenizer.decode(sequence.call or ()), None
        self._leave_row(sequence)
        self.calling.add(sequence)
        future = self._tools.submit(self.calculator, expression)
        future.add_done_callback(lambda done: self._inbox.put(lambda: self._take_answer(sequence, done)))

    def _take_answer(self, sequence: Sequence, done: Any) -> None:
        """Append a tool's answer as forced tokens and let the text continue."""
        if sequence.finish_reason is not None:
            return
        if (error := done.exception()) is not None:
            logger.warning("a tool failed: %s", error)
        result = None if error is not None else done.result()
        self.calling.discard(sequence)
        if result is not None:
            for token in [self._output_start, *self.tokenizer.encode(result), self._output_end]:
                if sequence.length >= self.limit or len(sequence.tokens) == sequence.params.max_tokens:
                    break
                self._append(sequence, token, 0)
        self._enter_row(sequence)
        self._end_or_go_on(sequence)

    def close(self) -> None:
        """Drop the tool calls that have not begun. No text can call a tool afterwards."""
        self._tools.shutdown(wait=False, cancel_futures=True)


def _call(message: Callable[[], None]) -> None:
    try:
        message()
    except Exception:  # it concerns no text
        logger.exception("what was posted to the model's thread failed")


def _choose_num_blocks(model: GPT, max_rows: int, kv_tokens: int) -> int:
    """Blocks for kv_tokens, or else for max_rows full-length texts within a share of the free memory.

    Never fewer than one full-length text needs. The memory is only touched when it is used.
    """
    config, device = model.config, model.get_device()
    whole = -(-config.sequence_len // BLOCK_SIZE)
    if kv_tokens:
        wanted = -(-kv_tokens // BLOCK_SIZE)
    else:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # weights that were cast, or a pass of training: PyTorch keeps what they took
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        wanted = int(MEMORY_SHARE * free) // KVBlocks.bytes_per_block(config, model.get_compute_dtype())
        wanted = min(wanted, whole * max_rows)
    return max(wanted, whole) + 1
