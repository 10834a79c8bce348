"""How much of the engine's speed reaches clients: python -m benchmarks.serve [--clients 32]

The model of benchmarks/decode.py first generates without HTTP, then behind it: clients in another process, each with its own
connection, stream completions of 128 tokens from prompts of 256. Reports both rates and their ratio, the time to the first
token (median and 99th percentile), and failures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

import torch
import uvicorn

from benchmarks.common import any_tokenizer, print_result, random_model
from nanochat.common import run_command
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.guard import CarefulProtocol
from nanochat.machine import in_own_thread
from nanochat.runner import prepare_for_inference
from nanochat.sampling import SamplingParams
from nanochat.scaling import config_for_depth
from nanochat.sequence import Sequence
from nanochat.server import create_app

PROMPT_TOKENS, NEW_TOKENS = 256, 128


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure serving at depth 4.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client")
    parser.add_argument("--threads", type=int, default=0, help="threads of the model (0: one per core)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="decode without torch.compile")
    parser.add_argument("--port", type=int, default=None, help=argparse.SUPPRESS)  # of the server, in the clients' process
    args = parser.parse_args(argv)
    if args.port is not None:
        print(json.dumps(asyncio.run(run_clients(args.port, args.clients, args.rounds))))
        return 0
    *_, device = compute_init()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = any_tokenizer(4096)

    def begin() -> tuple[Engine, float]:
        engine = Engine(
            prepare_for_inference(random_model(device, config_for_depth(4, vocab_size=4096, sequence_len=512, head_dim=64))),
            tokenizer,
            max_rows=32,
        )
        if args.compile and (reason := engine.compile()):
            print(f"decoding without torch.compile: {reason}")
        return engine, [measure_engine(engine, args.clients, args.rounds, seed) for seed in range(2)][-1]

    engine, alone = in_own_thread(begin)
    server = uvicorn.Server(uvicorn.Config(create_app([engine], "bench"), port=0, http=CarefulProtocol, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serve", f"--clients={args.clients}", f"--port={port}"]
    for rounds in (1, args.rounds):  # once to warm up
        output = subprocess.run([*command, f"--rounds={rounds}"], capture_output=True, text=True, check=True).stdout
    server.should_exit = True
    thread.join()
    served = json.loads(output)
    print_result({"clients": args.clients, "engine_tokens_per_s": alone, **served,
                  "share_of_engine": round(served["http_tokens_per_s"] / alone, 4)})  # fmt: skip
    return 0


def make_prompts(count: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4000, (count, PROMPT_TOKENS), generator=generator).tolist()


def measure_engine(engine: Engine, clients: int, rounds: int, seed: int) -> float:
    """Tokens per second of the same requests without HTTP, as many at a time as there are clients, prompts included."""
    params = SamplingParams(0, max_tokens=NEW_TOKENS, ignore_eos=True)
    waiting = [Sequence(prompt, params) for prompt in make_prompts(clients * rounds, seed)]
    running: list[Sequence] = []
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < clients:
            running.append(waiting.pop())
            engine.scheduler.submit(running[-1])
        engine.scheduler.step()
        running = [sequence for sequence in running if sequence.finish_reason is None]
    return round(clients * rounds * NEW_TOKENS / (time.perf_counter() - started), 1)


async def run_clients(port: int, clients: int, rounds: int) -> dict[str, Any]:
    prompts = make_prompts(clients * rounds, seed=7)
    started = time.perf_counter()
    results = await asyncio.gather(*(run_client(port, prompts[i::clients]) for i in range(clients)))
    seconds = time.perf_counter() - started
    first = sorted(time_s for times, _, _ in results for time_s in times)
    tokens, failed = sum(count for _, count, _ in results), sum(failures for _, _, failures in results)
    return {
        "http_tokens_per_s": round(tokens / seconds, 1),
        "requests": clients * rounds,
        "failed": failed,
        "ttft_ms_median": round(1e3 * first[len(first) // 2], 1),
        "ttft_ms_p99": round(1e3 * first[min(len(first) - 1, int(0.99 * len(first)))], 1),
    }


async def run_client(port: int, prompts: list[list[int]]) -> tuple[list[float], int, int]:
    """(seconds to the first token of each request, tokens received, failures), one request after the other."""
    first, tokens, failed = [], 0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for prompt in prompts:
        body = json.dumps({
            "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
        started, seen, usage = time.perf_counter(), False, None
        writer.write(head.encode() + body)
        while not (line := await reader.readline()).startswith(b"0\r\n"):  # the last chunk of the reply
            if not line:
                break
            if line.startswith(b"data: {"):
                if not seen:
                    first.append(time.perf_counter() - started)
                    seen = True
                if b'"choices": []' in line:
                    usage = json.loads(line[6:])["usage"]
        await reader.readline()
        complete = usage is not None and usage["completion_tokens"] == NEW_TOKENS
        tokens += usage["completion_tokens"] if usage else 0
        failed += not complete
    writer.close()
    return first, tokens, failed


if __name__ == "__main__":
    sys.exit(run_command(main))
