"""What the server says when its model fails, when it is asked wrongly, and by whom it lets itself be asked."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.engine_thread import EngineThread
from nanochat.gpt import GPT
from nanochat.openai_api import ChatRequest, CompletionRequest, Reply, RequestError, SamplingRequest, token_text
from nanochat.sampling import RowSettings, SamplingParams
from nanochat.sequence import Sequence
from nanochat.server import create_app
from nanochat.service import MAX_FAILURES, ChatDefaults, Limits, Service
from nanochat.tokenizer import Tokenizer
from scripts.chat_web import allowed_hosts, check_host, check_origin, choose_devices, in_url, listening
from tests.helpers import make_engine, wait_for
from tests.many_ranks import free_port

HELLO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 12, "ignore_eos": True}
CHAT = "/v1/chat/completions"
IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    return make_engine(tokenizer)


def _fail(*args: Any) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_a_request_leaves_open_is_the_servers_to_say(engine: Engine) -> None:
    with TestClient(create_app([engine], "tiny", defaults=ChatDefaults(0.0, 0, 3))) as client:
        for given, expected in (({}, 3), ({"max_tokens": 5}, 5)):
            body = {"messages": HELLO["messages"], "ignore_eos": True, **given}
            assert f'"completion_tokens": {expected}' in client.post("/chat/completions", json=body).text
        assert client.get("/health").json()["defaults"] == {"temperature": 0.0, "top_k": 0, "max_tokens": 3}


@pytest.mark.parametrize("more", [{"prompt": "the cat", "logprobs": 3}, {**HELLO, "logprobs": True, "top_logprobs": 3}])
def test_long_replies_keep_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """Those with log-probabilities take seconds to write; as many as there are threads are still being written here."""
    written = threading.Event()
    for name in ("chat", "completions"):
        write = getattr(Reply, name)

        def slowly(reply: Reply, sequences: list[Sequence], *args: Any, write: Any = write) -> dict[str, Any]:
            if sequences[0].params.logprobs is not None:
                written.wait(60)
            return write(reply, sequences, *args)

        monkeypatch.setattr(Reply, name, slowly)
    app = create_app([engine], "tiny")
    path = "/v1/completions" if "prompt" in more else CHAT
    with TestClient(app) as client, ThreadPoolExecutor(41) as pool:
        try:
            long = [pool.submit(client.post, path, json={"max_tokens": 2, **more}) for _ in range(40)]
            wait_for(lambda: app.state.service.answered == 40, "all to be answered", 60)
            assert pool.submit(client.post, CHAT, json=HELLO).result(20).status_code == 200
            assert not any(reply.done() for reply in long)
        finally:
            written.set()
        assert {reply.result().status_code for reply in long} == {200}


# ----------------------------------------------------------------------------- a device that fails


def _lose(engine: Engine, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let a device fail at everything from so many steps of decoding on, as it does after some errors of CUDA."""
    runner, left = engine.scheduler.runner, iter(range(after))
    decode = runner.decode

    def failing(*args: Any) -> Any:
        if next(left, None) is not None:
            return decode(*args)
        for name in ("prefill", "set_row", "set_block", "move_row"):
            monkeypatch.setattr(runner, name, _fail)
        _fail()

    monkeypatch.setattr(runner, "decode", failing)


def test_a_lost_device_ends_all_requests_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run, those that wait, and those that come later: none waits for the time limit."""
    engine.scheduler.max_rows = 2
    _lose(engine, monkeypatch, after=3)
    with TestClient(create_app([engine], "tiny")) as client:
        began = time.monotonic()
        response = client.post(CHAT, json={**HELLO, "n": 4})
        assert response.status_code == 500 and "server's log" in response.json()["error"]["message"]
        wait_for(lambda: not client.app.state.service.workers[0].thread.is_alive, "the thread to end")
        later = client.post(CHAT, json=HELLO)
        assert later.status_code == 503 and "has stopped" in later.json()["error"]["message"]
        assert client.get("/health").status_code == 503 and client.get("/health").json()["status"] == "failed"
        assert time.monotonic() - began < 20
    assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks - 1


def test_a_stream_is_told_that_the_device_is_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _lose(engine, monkeypatch, after=3)
    with TestClient(create_app([engine], "tiny")) as client:
        assert "server's log" in client.post(CHAT, json={**HELLO, "stream": True}).text


def test_texts_that_wait_for_the_calculator_are_told_as_well(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers come just when the device is lost, and would want rows of it."""
    scheduler, answer = engine.scheduler, threading.Event()
    scheduler.calculator = lambda expression: str(answer.wait(10))
    call = [engine.tokenizer.encode_special(name) for name in ("<|python_start|>", "<|python_end|>")]
    said: Counter[int] = Counter()

    def speak(logits: torch.Tensor, rows: RowSettings, *_: Any) -> torch.Tensor:
        said.update(p.seed for p in rows.params)
        return torch.tensor([call[said[p.seed] - 1] if p.seed and said[p.seed] <= 2 else 5 for p in rows.params])

    def fail(*args: Any) -> None:
        answer.set()
        wait_for(lambda: scheduler._inbox.qsize() == 2, "two messages")
        monkeypatch.setattr(scheduler.runner, "set_row", _fail)
        _fail()

    monkeypatch.setattr("nanochat.scheduler.sample", speak)
    texts = [Sequence([1, 2], SamplingParams(seed=seed)) for seed in (1, 2, 0)]
    thread = EngineThread(engine)
    for sequence in texts[:2]:
        scheduler.submit(sequence)
    thread.start()
    wait_for(lambda: len(scheduler.calling) == 2, "two calls")
    monkeypatch.setattr(scheduler.runner, "decode", fail)
    scheduler.submit(texts[2])
    wait_for(lambda: not thread.is_alive, "the thread to end")
    assert [sequence.finish_reason for sequence in texts] == ["error"] * 3 and not thread.takes_work


def test_other_devices_go_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _lose(engine, monkeypatch)
    other = Engine(engine.model, engine.tokenizer)
    with TestClient(create_app([engine, other], "tiny")) as client:
        assert client.post(CHAT, json=HELLO).status_code == 500
        assert [client.post(CHAT, json=HELLO).status_code for _ in range(4)] == [200] * 4
        assert client.get("/health").json()["status"] == "failed"


def test_failures_in_a_row_are_a_sick_server_until_it_answers(client: TestClient, engine: Engine) -> None:
    """Where the thread itself survives, since the error falls into a prompt; one failure alone may be the request's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler.runner, "prefill", _fail)
        for failures in range(1, MAX_FAILURES + 1):
            assert client.post(CHAT, json=HELLO).status_code == 500
            assert client.get("/health").status_code == (200 if failures < MAX_FAILURES else 503)
        patch.setattr("nanochat.service.REST_S", 0)  # some time later it is tried again
        assert client.get("/health").status_code == 200
    assert client.get("/health").status_code == 503
    assert client.post(CHAT, json=HELLO).status_code == 200
    assert client.get("/health").json()["status"] == "ok"


# ----------------------------------------------------------------------------- functions that run the model


def test_a_function_runs_in_the_models_thread_among_texts(engine: Engine) -> None:
    """It returns, raises or takes too long for its own caller alone."""
    late = threading.Event()

    def where(model: GPT) -> tuple[str, bool, list[float]]:
        return threading.current_thread().name, torch.is_inference_mode_enabled(), model.features(IDS)[0, -1].tolist()

    async def ask() -> None:
        text = Sequence([1, 2], SamplingParams(max_tokens=40, ignore_eos=True))
        ticket = service.submit([text])
        assert await service.compute(where) == ("model", True, expected)
        with pytest.raises(ZeroDivisionError):
            await service.compute(lambda model: 1 // 0)
        for fails in (lambda model: next(iter(())), lambda model: Future().result(0)):  # to asyncio these have a meaning
            with pytest.raises(RuntimeError, match="StopIteration|TimeoutError"):
                await service.compute(fails)
        service.limits = replace(service.limits, request_timeout_s=0.2)
        with pytest.raises(RequestError, match=r"within 0\.2 s"):
            await service.compute(lambda model: late.wait(10))
        late.set()
        async for _ in ticket.updates():
            pass
        assert text.finish_reason == "length" and service.is_healthy and service.workers[0].load == 0

    with torch.inference_mode():
        expected = engine.model.features(IDS)[0, -1].tolist()
    service = Service([engine], "tiny", Limits(), compile=False)
    service.start()
    try:
        asyncio.run(ask())
    finally:
        service.close()


def test_functions_wait_for_the_compiler_and_for_room(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(engine, "compile", lambda: compiled.wait(60) and None)

    async def ask() -> None:
        waiting = asyncio.create_task(service.compute(lambda model: compiled.is_set()))
        await asyncio.sleep(0.3)
        with pytest.raises(RequestError) as full:
            await service.compute(lambda model: None)
        assert full.value.status == 429 and not waiting.done()
        compiled.set()
        assert await waiting
        await asyncio.to_thread(service.close)
        with pytest.raises(RequestError, match="has stopped"):
            await service.compute(lambda model: None)

    service = Service([engine], "tiny", Limits(max_waiting=1), compile=True)
    service.start()
    asyncio.run(ask())


# ----------------------------------------------------------------------------- the event loop


def test_long_replies_are_written_beside_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 600,000 tokens took seconds, in which nobody else was served."""
    on_the_loop = []

    def watched(*args: Any) -> str:
        try:
            on_the_loop.append(asyncio.get_running_loop())
        except RuntimeError:  # there is none in other threads
            on_the_loop.append(None)
        return token_text(*args)

    for module in ("server", "openai_api"):
        monkeypatch.setattr(f"nanochat.{module}.token_text", watched)
    assert client.post("/tokenize", json={"prompt": "the cat"}).json()["token_strs"]
    asked = {"logprobs": 2, "echo": True, "max_tokens": 4}
    assert client.post("/v1/completions", json={"prompt": "the cat", **asked}).json()["choices"][0]["logprobs"]
    assert client.post(CHAT, json={**HELLO, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert on_the_loop and not any(on_the_loop)


def test_a_loop_that_closes_does_not_end_the_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may do so just after it was asked whether it has."""
    worker = Service([engine], "tiny", Limits(), compile=False).workers[0]
    params = SamplingParams(max_tokens=3, ignore_eos=True)

    async def submit() -> None:
        worker.submit([Sequence([1, 2], params)])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(submit())
    loop.close()
    later = Sequence([1, 2], replace(params, max_tokens=9))
    engine.scheduler.submit(later)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_closed", lambda: False)
        worker.thread.start()
        wait_for(lambda: later.finish_reason or not worker.thread.is_alive, "the later text")
    assert later.finish_reason == "length"
    worker.thread.close()


# ----------------------------------------------------------------------------- asked wrongly


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/chat/completions", "/tokenize"])
def test_a_body_that_is_not_said_to_be_json(client: TestClient, path: str) -> None:
    """As curl sends it without a header."""
    response = client.post(path, content=b'{"prompt": "x"}', headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "send the body with Content-Type: application/json"


# ----------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_setting_reaches_the_sampler(kind: type) -> None:
    asked = {"temperature": 0.3, "top_p": 0.4, "top_k": 5, "min_p": 0.06, "repetition_penalty": 1.7, "seed": 8,
             "presence_penalty": 0.6, "frequency_penalty": -0.7, "logit_bias": {"9": -100}, "stop": ["a", "b"],
             "ignore_eos": True}  # fmt: skip
    arguments = {"max_tokens"}
    others = {"model", "n", "stream", "stream_options"}  # which say what is answered, and how
    assert asked.keys() == SamplingRequest.model_fields.keys() - arguments - others
    body = {"messages": HELLO["messages"]} if kind is ChatRequest else {"prompt": "x"}
    expected = {**asked, "logit_bias": ((9, -100.0),), "stop": ("a", "b"), "seed": 10, "max_tokens": 7, "logprobs": 2}
    assert kind(**body, **asked).params(2, 7, 2) == SamplingParams(**expected)
    plain = kind(**body, seed=0).params(0, None, None)
    assert plain == SamplingParams(1.0, seed=0)  # the model's own distribution, as with OpenAI
    assert kind(**body, top_k=-1, seed=0).params(0, None, None) == plain  # vLLM's "all"


@pytest.mark.parametrize("seed", [5, -1, -(2**63), 2**63 - 1])
def test_samples_of_one_request_differ_and_the_seed_decides_them(client: TestClient, seed: int) -> None:
    """Also around zero: Python's own generator takes -1 and 1 for the same seed."""
    body = {**HELLO, "temperature": 1, "seed": seed, "n": 3}
    choices = client.post(CHAT, json=body).json()["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert client.post(CHAT, json=body).json()["choices"] == choices


# ----------------------------------------------------------------------------- what is counted


def _counted(client: TestClient) -> dict[str, dict[str, float]]:
    """The numbers of tokens in /metrics and in /stats, by the names of the latter."""
    lines = [line for line in client.get("/metrics").text.split("\n") if line.startswith("vllm:")]
    value = {line.removeprefix("vllm:").split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    names = {"prompt_tokens": "prompt_tokens", "cached_tokens": "prefix_cache_hits", "generated_tokens": "generation_tokens"}
    stats = client.get("/stats").json()
    assert value["prompt_tokens_total"] == value["prefix_cache_queries_total"]
    return {"metrics": {ours: value[f"{theirs}_total"] for ours, theirs in names.items()},
            "stats": {name: stats[name] for name in names}}  # fmt: skip


def test_prompts_that_were_never_read_are_not_counted(engine: Engine) -> None:
    """Texts that were cancelled in the queue, and those of no tokens; with those that were read, all add up."""
    engine.scheduler.max_rows, left = 1, threading.Event()
    decode = engine.scheduler.runner.decode
    engine.scheduler.runner.decode = lambda *args: left.wait(60) and decode(*args)
    app = create_app([engine], "tiny")
    with TestClient(app) as client:
        client.post(CHAT, json={**HELLO, "max_tokens": 0})
        assert set(_counted(client)["metrics"].values()) == {0}
        texts = [Sequence([1, 2, 3 + i] * 8, SamplingParams(max_tokens=50, ignore_eos=True)) for i in range(4)]
        for text in texts:
            text.on_update = lambda text: app.state.service.count_finished(text) if text.finish_reason else None
            engine.scheduler.submit(text)
        wait_for(lambda: texts[0].tokens, "the first to be begun")
        for text in texts:
            engine.scheduler.cancel(text)
        left.set()
        wait_for(lambda: all(text.finish_reason for text in texts), "all to end")
        counted = _counted(client)
        assert counted["metrics"] == counted["stats"] and counted["stats"]["prompt_tokens"] == len(texts[0].prompt)


def test_generated_tokens_are_those_that_the_model_chose(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the one that ends the answer, without the calculator's; the usage is told of the answer."""
    encode, special = engine.tokenizer.encode, engine.tokenizer.encode_special
    said = [special("<|python_start|>"), *encode("2+3"), special("<|python_end|>"), *encode("It is 5.")]
    script = iter([*said, special("<|assistant_end|>")])
    monkeypatch.setattr("nanochat.scheduler.sample", lambda *_: torch.tensor([next(script)]))
    with TestClient(create_app([engine], "tiny")) as client:
        usage = client.post(CHAT, json={**HELLO, "ignore_eos": False, "max_tokens": 60}).json()["usage"]
        counted = _counted(client)
    forced = 2 + len(encode("5"))
    assert counted["metrics"] == counted["stats"] and counted["stats"]["generated_tokens"] == len(said) + 1
    assert usage["completion_tokens"] == len(said) + forced


# ----------------------------------------------------------------------------- by whom


def test_a_server_of_this_machine_alone_answers_to_its_names(engine: Engine) -> None:
    """Else any page of the internet could talk to it, once its own name means this machine."""
    with TestClient(create_app([engine], "tiny", hosts=allowed_hosts("127.0.0.1", None))) as client:
        ours = ("localhost", "localhost:", "localhost:8000", "127.0.0.1:80", "[::1]", "[::1]:8000", "LocalHost:1")
        for host in (*ours, "host.docker.internal:80"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
            for path in ("/", "/health", "/api/runs"):
                response = client.get(path, headers={"Host": host})
                message = response.json()["error"]["message"]
                assert response.status_code == 403 and "--allow-host" in message and "--api-key" in message


@pytest.mark.parametrize(
    ("host", "key", "names"),
    [("127.0.0.1", None, ["127.0.0.1"]), ("localhost", None, ["localhost"]), ("::1", None, ["[::1]"]),
     ("127.0.0.2", None, ["127.0.0.2"]), ("127.0.0.1", "secret", None), ("0.0.0.0", None, None), ("::", None, None),
     ("192.168.1.5", None, None)],
)  # fmt: skip
def test_which_servers_answer_to_some_names_alone(host: str, key: str | None, names: list[str] | None) -> None:
    allowed = allowed_hosts(host, key)
    assert allowed is None if names is None else set(names) <= set(allowed or ())


def test_a_server_may_be_given_names_that_a_key_makes_needless() -> None:
    anywhere, one_address = (set(allowed_hosts(host, None, ["my.example"]) or ()) for host in ("0.0.0.0", "192.0.2.7"))
    assert {"127.0.0.1", "my.example"} <= anywhere and "0.0.0.0" not in anywhere
    assert one_address == anywhere | {"192.0.2.7"}
    assert allowed_hosts("0.0.0.0", "secret", ["my.example"]) is None
    assert {"127.0.0.1", "localhost", "my.example"} <= set(allowed_hosts("127.0.0.1", None, ["my.example"]) or ())


def test_names_are_written_as_browsers_send_them() -> None:
    assert [check_host(name) for name in ("My.Example", "[::1]", "10.0.0.1")] == ["my.example", "[::1]", "10.0.0.1"]
    for name in ("my.example:8080", "http://my.example", "my.example/", "::1", "", "*"):
        with pytest.raises(NanochatError, match="without a port"):
            check_host(name)


def test_origins_are_written_as_browsers_send_them() -> None:
    assert check_origin("http://localhost:3000/") == check_origin("http://LOCALHOST:3000") == "http://localhost:3000"
    assert check_origin("*") == "*"
    for origin in ("http://localhost:3000/chat", "localhost:3000", "localhost", "http://", "http://a?b"):
        with pytest.raises(NanochatError, match="without a path"):
            check_origin(origin)


def test_the_address_of_a_server_can_be_opened() -> None:
    assert [in_url(host) for host in ("::1", "127.0.0.1", "localhost")] == ["[::1]", "127.0.0.1", "localhost"]


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "in use"), ("192.0.2.7", "address"), ("a" * 70, "codec")])
def test_a_port_that_cannot_be_had_is_named(host: str, reason: str) -> None:
    """And one that is had is so from then on: nobody takes it while a model is loaded."""
    with listening("127.0.0.1", port := free_port()) as sockets:
        assert sockets[0].getsockname() == ("127.0.0.1", port)
        error = pytest.raises(NanochatError, match=rf"port {port} of {host} .*{reason}.*: choose another --port")
        with error, listening(host, port):
            pass
    with listening("127.0.0.1", port):
        pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "localhost", ""])
def test_a_host_is_reached_at_all_its_addresses(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers try ::1 first for localhost, and clients that know IPv4 alone are others' machines, too."""
    if host == "localhost":
        local = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "2001:db8::1")]
        found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (2 * local)]
        monkeypatch.setattr("socket.getaddrinfo", lambda _, port, **how: [(*one[:4], (one[4], port)) for one in found])
    port = free_port()
    with listening(host, port):
        monkeypatch.undo()
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), timeout=10).close()


def test_gpus_that_are_not_there_are_named() -> None:
    with pytest.raises(NanochatError, match="has 0 GPUs"):
        choose_devices(torch.device("cpu"), 2)


def test_requests_that_are_too_long_are_refused(engine: Engine) -> None:
    request = ChatRequest(messages=[{"role": "user", "content": "x"}], max_completion_tokens=3, max_tokens=9)
    assert request.limit == 3  # the newer name goes before the older one
    with TestClient(create_app([engine], "tiny"), raise_server_exceptions=False) as client:
        limit, size = engine.model.config.sequence_len, engine.tokenizer.get_vocab_size()
        full = [engine.tokenizer.get_bos_token_id()] + [5] * (limit - 1)
        for prompt in (full, [size]):
            assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 400
        roles = (("user", 150_000), ("assistant", 60_000), ("user", 1))
        long = {"messages": [{"role": role, "content": "x" * length} for role, length in roles]}
        error = client.post("/v1/chat/completions", json=long).json()["error"]
        assert error["message"].startswith("the conversation is longer")
