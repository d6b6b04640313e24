"""A server that speaks vLLM's HTTP, with our own engine behind it: what is asked, what comes back, what goes wrong."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import posttrain
from posttrain.errors import ConfigError, Stopped
from posttrain.models.forward import open_policy
from posttrain.rollout.engines import Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.engines.vllm import VllmEngine
from posttrain.rollout.engines.vllm_server import EngineError
from posttrain.rollout.sampling import Sampling
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ENDS = (2, 30, 31, 32, 33)


class Server:
    """`asked` are the requests it got; `answers` change what it says to a path; `pause` is that before each letter."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.delay = 0.0
        self.pause = 0.0
        self.vocabulary = 97
        self.loaded: set[str] = set()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(*outer.reply(self.path, None))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    self.reply(*outer.reply(self.path, body))

            def reply(self, status: int, said: str) -> None:
                self.send_response(status)
                self.end_headers()
                try:
                    for letter in said if outer.pause else [said]:
                        time.sleep(outer.pause)
                        self.wfile.write(letter.encode())
                except OSError:  # it does not wait that long
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def reply(self, path: str, body: Any) -> tuple[int, str]:
        self.asked.append((path, body))
        time.sleep(self.delay)
        if path in self.answers:
            return self.answers[path]  # type: ignore[no-any-return]
        if path == "/v1/load_lora_adapter":
            assert load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
            if body["lora_name"] in self.loaded:
                return 400, f"The lora adapter '{body['lora_name']}' has already been loaded."
            self.loaded.add(body["lora_name"])
        if path == "/v1/unload_lora_adapter":
            self.loaded.remove(body["lora_name"])
        if path == "/v1/completions":
            return 200, json.dumps({"choices": self.complete(body)})
        return 200, ""

    def complete(self, body: Any) -> list[dict[str, Any]]:
        assert body["model"] in self.loaded | {"base"}
        engine = LocalEngine(open_policy(tiny_model("llama", self.vocabulary).eval()), ENDS)
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        (made,) = engine.generate([Request(body["prompt"], 0, body["n"])], sampling)
        return [
            {
                "index": i,
                "text": "",
                "finish_reason": "stop" if one.is_ended else "length",
                "token_ids": one.ids.tolist(),
                "logprobs": {"token_logprobs": one.logps.tolist()},
            }
            for i, one in reversed(list(enumerate(made)))
        ]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def engine(server: Server, folder: Path, timeout: float = 20) -> VllmEngine:
    def save(into: Path) -> None:
        model = posttrain_adapter()
        model.save_pretrained(into)

    return VllmEngine(server.url, "base", timeout, save, folder, ENDS)


def posttrain_adapter() -> PeftModel:
    return PeftModel(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


def test_what_is_asked_and_what_comes_back(server: Server, tmp_path: Path) -> None:
    made = engine(server, tmp_path).generate(
        [Request([5, 9, 13], 7, 3), Request([21, 3], 8, 3)], Sampling(max_tokens=6)
    )
    assert [len(group) for group in made] == [3, 3]
    for group in made:
        for one in group:
            assert len(one.ids) == len(one.logps)
            assert one.is_ended == (int(one.ids[-1]) in ENDS)
    asked = next(body for path, body in server.asked if body and body["prompt"] == [5, 9, 13])
    assert {name: asked[name] for name in ("n", "max_tokens", "temperature", "top_p", "top_k", "return_token_ids")} == {
        "n": 3,
        "max_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "return_token_ids": True,
    }
    assert asked["stop_token_ids"] == list(ENDS)  # the server looks for no stop string in special tokens  # fmt: skip
    assert asked["seed"] != next(body for _, body in server.asked if body and body["prompt"] == [21, 3])["seed"]


def test_adapters_are_loaded_and_the_one_before_is_let_go(server: Server, tmp_path: Path) -> None:
    sampler = engine(server, tmp_path)
    for count in (1, 2, 3, 4):
        sampler.update_weights()
        (name,) = server.loaded
        assert name.endswith(f"-{count}")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter-3", "adapter-4"}
    sampler.generate([Request([5], 0, 1)], Sampling(max_tokens=2))
    assert server.asked[-1][1]["model"] == name
    assert sampler.health() is None


def test_another_run_is_not_in_the_way(server: Server, tmp_path: Path) -> None:
    first, second = engine(server, tmp_path / "first"), engine(server, tmp_path / "second")
    first.update_weights()
    second.update_weights()
    assert len(server.loaded) == 2
    del first
    gc.collect()
    assert server.loaded == {second._server.loaded}


ALONE = """
import sys
from pathlib import Path
from posttrain.rollout.engines.vllm import VllmEngine
def save(into): into.joinpath("..").resolve().mkdir(exist_ok=True)
sampler = VllmEngine(sys.argv[1], "base", 20, save, Path(sys.argv[2]))
sampler.update_weights()
"""


def test_the_last_adapter_is_let_go_when_the_process_ends(server: Server, tmp_path: Path) -> None:
    server.answers["/v1/load_lora_adapter"] = (200, "")
    server.answers["/v1/unload_lora_adapter"] = (200, "")
    subprocess.run([sys.executable, "-c", ALONE, server.url, str(tmp_path / "vllm")], check=True, timeout=60)
    assert [path for path, _ in server.asked] == ["/health", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
    assert server.asked[-1][1]["lora_name"] == server.asked[-2][1]["lora_name"]


WRONG: dict[str, tuple[Any, str]] = {
    "an error": ((500, "out of memory"), r"refused /v1/completions \(500\): out of memory"),
    "garbage": ((200, "{half"), "no JSON to /v1/completions"),
    "too few": ((200, json.dumps({"choices": []})), "0 completions where 2 were asked for"),
    "no token ids": ((200, json.dumps({"choices": [{"text": "a"}] * 2})), "no token ids with their log-probabilities"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_server_that_says_what_cannot_be_used_is_named(case: str, server: Server, tmp_path: Path) -> None:
    server.answers["/v1/completions"], message = WRONG[case]
    with pytest.raises(EngineError, match=message) as raised:
        engine(server, tmp_path).generate([Request([5], 0, 2)], Sampling(max_tokens=2))
    assert server.url in str(raised.value)


def test_a_server_that_is_late_or_dead_is_named(server: Server, tmp_path: Path) -> None:
    server.delay = 1.5
    with pytest.raises(EngineError, match=r"has not answered /v1/completions within 0\.3 s"):
        engine(server, tmp_path, timeout=0.3).generate([Request([5], 0, 1)], Sampling(max_tokens=2))
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(EngineError, match="cannot be reached"):
        engine(server, tmp_path).update_weights()


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_says_a_little_now_and_then_is_late(status: int, server: Server, tmp_path: Path) -> None:
    server.pause, server.answers["/health"] = 0.1, (status, "." * 100)
    started = time.monotonic()
    said = engine(server, tmp_path, timeout=0.5).health()
    assert said == f"the vLLM server at {server.url} has not answered /health within 0.5 s"
    assert time.monotonic() - started < 2


def test_a_signal_does_not_wait_for_the_server(server: Server, tmp_path: Path) -> None:
    server.delay = 3
    started = time.monotonic()
    with pytest.raises(Stopped):
        engine(server, tmp_path).generate([Request([5], 0, 1)], Sampling(max_tokens=2), lambda: True)
    assert time.monotonic() - started < 2


def settings(server: Server, folder: Path, **more: Any) -> posttrain.GRPOConfig:
    return posttrain.GRPOConfig(
        str(folder), use_vllm=True, vllm_mode="server", vllm_server_base_url=server.url, vllm_server_model="base",
        per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=2, learning_rate=1e-3,
        logging_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **more,
    )  # fmt: skip


def trainer(server: Server, folder: Path, adapter: bool = True, **more: Any) -> posttrain.GRPOTrainer:
    words = chatml_tokenizer()
    server.vocabulary = len(words)
    return posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids],
        args=settings(server, folder, **more),
        train_dataset=[{"prompt": f"Say {i}"} for i in range(4)],
        processing_class=words,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if adapter else None,
    )


def test_grpo_learns_from_what_a_server_samples(server: Server, tmp_path: Path) -> None:
    made = trainer(server, tmp_path)
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert logs[0]["sampling/logp_difference"] < 1e-4  # the adapter is fresh, so the server's model is the policy
    assert logs[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert logs[0]["grad_norm"] > 0
    assert made.rollouts.engine is not None
    (name,) = server.loaded
    assert name.endswith("-2")


def test_what_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with an adapter only"):
        trainer(server, tmp_path, adapter=False).train()
    with pytest.raises(ConfigError, match="vllm_mode='colocate' is not honoured"):
        posttrain.GRPOConfig(str(tmp_path), use_vllm=True, use_cpu=True)
    with pytest.raises(ConfigError, match="truncates to no bound"):
        settings(server, tmp_path, vllm_importance_sampling_mode="token_truncate",
                 vllm_importance_sampling_clip_max=None)  # fmt: skip
