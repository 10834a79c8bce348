"""Serve a model: python -m scripts.chat_web, then open http://127.0.0.1:8000, or point an OpenAI client at it."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn

from nanochat.chosen_model import add_checkpoint_arguments, load_chosen_model
from nanochat.common import NanochatError, run_command
from nanochat.devices import compute_init
from nanochat.engine import Engine
from nanochat.guard import CarefulProtocol
from nanochat.machine import in_own_thread
from nanochat.runner import prepare_for_inference
from nanochat.sampling import SamplingParams
from nanochat.server import create_app
from nanochat.service import ChatDefaults, Limits, Service
from nanochat.settings import Arguments, SettingsParser, add_device_argument, add_sampling_arguments

ANY_ADDRESS = ("0.0.0.0", "::")
# The last two are the names by which containers reach this machine.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "host.docker.internal", "host.containers.internal")


def parse_arguments(argv: list[str] | None) -> Arguments:
    parser = SettingsParser(
        "Serve a model: chat page, runs page, OpenAI's API.",
        examples=["%(prog)s --model-tag demo", "%(prog)s --host 0.0.0.0 --port 8080 --api-key SECRET"],
    )
    add_checkpoint_arguments(parser, from_hf=True)
    answers = parser.add_argument_group("answers", "defaults for the page and /chat/completions; a request may differ")
    usual = ChatDefaults()
    add_sampling_arguments(answers, usual.temperature, usual.top_k)
    answers.add_argument("-m", "--max-tokens", type=int, default=usual.max_tokens, help="most tokens in an answer")
    machine = parser.add_argument_group("machine")
    add_device_argument(machine)
    machine.add_argument("-n", "--num-gpus", type=int, default=1, help="GPUs, each with a copy of the model and a thread")
    machine.add_argument("--weights", default="auto", choices=("auto", "int8"), help="int8: half the memory of bfloat16")
    machine.add_argument("--max-rows", type=int, default=32, help="texts that are computed together")
    machine.add_argument("--kv-tokens", type=int, default=0, help="tokens held in memory (default: what --max-rows texts "
                         "need, at most a quarter of the free memory)")  # fmt: skip
    machine.add_argument("--no-compile", dest="compile", action="store_false", help="decode without torch.compile")
    network = parser.add_argument_group("network")
    network.add_argument("-p", "--port", type=int, default=8000, help="port to listen on")
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 lets other machines in"
    )
    network.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                         help="host name to accept when there is no key, besides this machine's at 127.0.0.1")  # fmt: skip
    network.add_argument("--api-key", default=os.environ.get("NANOCHAT_API_KEY"), metavar="KEY",
                         help="clients must send this (default: NANOCHAT_API_KEY)")  # fmt: skip
    network.add_argument("--cors-origin", action="append", metavar="URL", help="let pages from this origin call the API")
    network.add_argument("--max-waiting", type=int, default=Limits.max_waiting, help="texts in the queue; more get 429")
    network.add_argument("--request-timeout", type=float, default=Limits.request_timeout_s, metavar="SECONDS",
                         help="limit for a whole answer")  # fmt: skip
    network.add_argument("--grace", type=float, default=Limits.grace_s, metavar="SECONDS",
                         help="to finish running answers on shutdown")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.require_positive("num_gpus", "max_rows", "max_waiting", "max_tokens")
    SamplingParams(args.temperature, args.top_k, max_tokens=args.max_tokens)  # raises if a default is invalid
    defaults = ChatDefaults(args.temperature, args.top_k, args.max_tokens)
    args.require_between(0, 86400, "grace")
    args.require_between(1, 86400, "request_timeout")
    args.require_between(1, 65535, "port")
    args.require_between(0, math.inf, "kv_tokens")
    if args.api_key is not None:
        args.api_key = args.api_key.strip()  # a secret read from a file may end with a newline
        if not args.api_key or not args.api_key.isascii() or not args.api_key.isprintable():
            raise NanochatError("the API key is empty or has characters that no client sends: set one, or leave out --api-key")
    origins = [check_origin(origin) for origin in args.cors_origin or ()]
    hosts = allowed_hosts(args.host, args.api_key, [check_host(name) for name in args.allow_host])
    with listening(args.host, args.port) as sockets:  # before a model is loaded in vain
        return run_server(args, defaults, origins, hosts, sockets)


def run_server(
    args: Arguments, defaults: ChatDefaults, origins: list[str], hosts: list[str] | None, sockets: list[socket.socket]
) -> int:
    """Load the model and serve it until told to stop."""
    *_, device = compute_init(args.device_type)
    engines, meta = in_own_thread(lambda: load_engines(args, choose_devices(device, args.num_gpus)))
    limits = Limits(max_waiting=args.max_waiting, request_timeout_s=args.request_timeout, grace_s=args.grace)
    app = create_app(engines, meta["tag"], limits, args.api_key, origins, args.compile, hosts, defaults)
    shown = args.allow_host[0] if hosts and args.host in ANY_ADDRESS else in_url(args.host)
    url = f"http://{shown}:{args.port}"
    others = "; --host 0.0.0.0 lets other machines in" if is_local(args.host) else ""
    print(f"{meta['tag']} ({meta['origin']}) is at {url} (Ctrl-C stops it{others})", flush=True)
    if not args.api_key:
        print(f"for programs: OPENAI_BASE_URL={url}/v1, any API key", flush=True)
    if args.compile:
        print(
            "the first answers wait about half a minute for the compiler; --no-compile starts at once, and slower", flush=True
        )
    config = uvicorn.Config(app, http=CarefulProtocol, log_level="warning", timeout_graceful_shutdown=int(args.grace) + 5)
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to stop a server
        Server(config, app.state.service).run(sockets)
    if not app.state.service.is_stopped:
        # Stopped during compilation, or by repeated Ctrl-C. A thread in compiled code cannot be stopped, and a normal exit
        # of Python would end the interpreter under it: the process would abort with a core dump.
        sys.stdout.flush()
        os._exit(0)
    return 0


def load_engines(args: Arguments, devices: list[torch.device]) -> tuple[list[Engine], dict[str, Any]]:
    """(an engine for each device, the checkpoint's meta)."""
    engines = []
    for device in devices:
        model, tokenizer, meta = load_chosen_model(args, device)
        prepare_for_inference(model, args.weights)
        engines.append(Engine(model, tokenizer, max_rows=args.max_rows, kv_tokens=args.kv_tokens))
    return engines, meta


class Server(uvicorn.Server):
    """When told to stop, gives running answers some time, then ends them properly.

    Answers that wait for the compiler end at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            grace_s = self.service.limits.grace_s if self.service.is_ready else 0.0
            timer = threading.Timer(grace_s, self.service.cancel_all)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)
        if self.force_exit:  # a second Ctrl-C: do not print traces of the requests that are cut off
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def choose_devices(device: torch.device, count: int) -> list[torch.device]:
    """The devices to serve from. Raises NanochatError if there are not that many."""
    if count == 1:
        return [device]
    available = torch.cuda.device_count() if device.type == "cuda" else 0
    if count > available:
        raise NanochatError(f"--num-gpus {count}: this machine has {available} GPUs")
    return [torch.device("cuda", i) for i in range(count)]


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def is_local(host: str) -> bool:
    return host.startswith("127.") or in_url(host) in LOCAL_HOSTS


def allowed_hosts(host: str, api_key: str | None, named: Sequence[str] = ()) -> list[str] | None:
    """The host names that a server without a key accepts; None: any. named: those from --allow-host."""
    if api_key or not (named or is_local(host)):
        return None
    own = [] if host in ANY_ADDRESS else [in_url(host).lower()]  # the address that main shows
    return [*LOCAL_HOSTS, *own, *named]


def check_host(name: str) -> str:
    """A name as browsers send it, without a port. Raises NanochatError if it is none, which would never match."""
    if not re.fullmatch(r"[\w.-]+|\[[\da-f:.]+\]", name.lower(), re.ASCII):
        raise NanochatError(f"--allow-host {name} is no name of a machine: give NAME, without http:// and without a port")
    return name.lower()


def check_origin(origin: str) -> str:
    """An origin as browsers send it. Raises NanochatError for anything else, which would never match."""
    origin = origin.rstrip("/").lower()
    url = urlsplit(origin)
    if origin != "*" and origin != f"{url.scheme}://{url.netloc}":
        raise NanochatError(f"--cors-origin {origin} is not an origin: give http://HOST:PORT, without a path")
    return origin


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at each address of a host; that at :: is for IPv4, too, where the machine can.

    Raises NanochatError if one is not available. An address that the machine has not, such as IPv6's, may be missing if there
    is another.
    """
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, address in dict.fromkeys((family, address) for family, *_, address in found):
                both = host == "::" and socket.has_dualstack_ipv6()
                try:
                    server = socket.create_server(address, family=family, dualstack_ipv6=both)
                except OSError as error:
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    missing = error
                else:
                    sockets.append(opened.enter_context(server))
            if missing is not None and not sockets:
                raise missing
        except (OSError, UnicodeError) as error:  # the latter: a name that no machine can have
            reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
            raise NanochatError(
                f"port {port} of {host} is not available ({reason}): choose another --port or --host"
            ) from error
        yield sockets


if __name__ == "__main__":
    sys.exit(run_command(main))
