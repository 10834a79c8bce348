"""Serve the chat page: python -m scripts.chat_web, then open http://127.0.0.1:8000."""

from __future__ import annotations

import argparse
import socket
import sys

import uvicorn

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError, compute_init, run_command
from nanochat.engine import Engine
from nanochat.server import create_app


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model with a chat page.")
    parser.add_argument("-i", "--source", default="sft", choices=("sft", "rl"), help="stage of the model")
    parser.add_argument("-g", "--model-tag", default=None, help="run (default: the newest with that stage)")
    parser.add_argument("-s", "--step", type=int, default=None, help="checkpoint (default: the newest)")
    parser.add_argument("-p", "--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--device-type", default="", metavar="cuda|mps|cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    check_port(args.host, args.port)
    *_, device = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.source, device, "eval", args.model_tag, args.step)
    name = f"{meta['tag']} ({args.source}, step {meta['step']})"
    app = create_app(Engine(model, tokenizer), name)
    print(f"{name} is at http://{args.host}:{args.port} (Ctrl-C stops it)", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def check_port(host: str, port: int) -> None:
    """Raise NanochatError if the port cannot be had, before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise NanochatError(f"port {port} of {host} cannot be had ({error}): choose another with --port") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
