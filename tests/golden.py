"""One small GPT-2 in every format, written from the formats' published layouts and nothing of the package.

`python tests/golden.py` writes `tests/golden_files`; the tests hold the package to those files. Names and
shapes here are PyTorch's of llm.c's train_gpt2.py: a Linear is `[out, in]`. Every weight is a multiple of
1/64 below 2, which bfloat16 holds exactly, so that the same numbers stand in every file.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

FILES = Path(__file__).parent / "golden_files"
V, T, L, H, C = 11, 6, 2, 2, 8
B, S = 2, 5  # of the debug state: texts, tokens of each
TOKENS = 40  # of the shards
PADDED = 128
EOT = "<|endoftext|>"

SHAPES = {  # in the order of llm.c's files, where each stands for all layers
    "wte.weight": (V, C),
    "wpe.weight": (T, C),
    "ln_1.weight": (C,),
    "ln_1.bias": (C,),
    "attn.c_attn.weight": (3 * C, C),
    "attn.c_attn.bias": (3 * C,),
    "attn.c_proj.weight": (C, C),
    "attn.c_proj.bias": (C,),
    "ln_2.weight": (C,),
    "ln_2.bias": (C,),
    "mlp.c_fc.weight": (4 * C, C),
    "mlp.c_fc.bias": (4 * C,),
    "mlp.c_proj.weight": (C, 4 * C),
    "mlp.c_proj.bias": (C,),
    "ln_f.weight": (C,),
    "ln_f.bias": (C,),
}
# Where the package keeps them, as `[in, out]`.
NAMES = "wte wpe norm1_w norm1_b wqkv bqkv wo bo norm2_w norm2_b w1 b1 w2 b2 normf_w normf_b"
OURS = dict(zip(SHAPES, NAMES.split(), strict=True))


def layered(name: str) -> bool:
    return name not in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")


def is_linear(name: str) -> bool:
    return layered(name) and len(SHAPES[name]) == 2


def weights() -> dict[str, np.ndarray]:
    """Every tensor, over all layers `[L, …]` where it stands in one."""
    values, n = {}, 0
    for name, shape in SHAPES.items():
        value = np.empty((L, *shape) if layered(name) else shape, np.float32)
        value.flat = (np.arange(n, n + value.size) * 89 % 255 - 127) / 64
        n += value.size
        values[name] = value
    return values


def ours(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under the package's names, in its orientation."""
    return {
        OURS[name]: np.stack([layer.T for layer in value]) if is_linear(name) else value
        for name, value in values.items()
    }


def bfloat16(values: np.ndarray) -> bytes:
    """The upper half of each float32; the lower must be empty."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2").tobytes()


def float32(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f4").tobytes()


# ---------------------------------------------------------------- llm.c


def header(*numbers: int) -> bytes:
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


def llmc_tensors(values: dict[str, np.ndarray], number: Any, rows: int) -> bytes:
    content = b""
    for name, value in values.items():
        content += number(value)
        if name == "wte.weight":
            content += number(np.zeros((rows - V, C), np.float32))
    return content


def llmc_model(version: int) -> bytes:
    rows = V if version == 1 else PADDED
    number = bfloat16 if version == 5 else float32
    sizes = (T, V, L, H, C) if version == 1 else (T, V, L, H, C, rows)
    return header(20240326, version, *sizes) + llmc_tensors(weights(), number, rows)


def batch() -> tuple[np.ndarray, np.ndarray]:
    stream = np.arange(B * S + 1, dtype=np.int32) * 7 % V
    return stream[:-1].reshape(B, S), stream[1:].reshape(B, S)


def llmc_state(version: int = 2) -> bytes:
    """Logits, loss and gradients by automatic differentiation of `oracle`, in float64."""
    from types import SimpleNamespace

    import oracle

    config = SimpleNamespace(
        n_layer=L, n_head=H, norm="layer", norm_eps=1e-5, norm_embed=False, norm_attn=True, norm_mlp=True,
        norm_final=True, activation="gelu", residual="add", tied=True, n_streams=1,
    )  # fmt: skip
    params = {name: value.astype(np.float64) for name, value in ours(weights()).items()}
    tokens, targets = batch()
    starts = list(range(0, B * S + 1, S))
    loss, grads = oracle.loss_and_grad(params, config, tokens.ravel(), targets.ravel(), starts)
    logits = [oracle.document_logits(params, config, text) for text in tokens]
    named = {name: grads[OURS[name]] for name in SHAPES}
    named = {name: np.swapaxes(g, 1, 2) if is_linear(name) else g for name, g in named.items()}
    rows = V if version == 1 else PADDED
    return b"".join(
        [
            header(20240327, version, B, S),
            tokens.astype("<i4").tobytes(),
            targets.astype("<i4").tobytes(),
            float32(np.concatenate(logits)),
            float32(np.array([loss])),
            llmc_tensors(named, float32, rows),
        ]
    )


def stream() -> np.ndarray:
    return np.arange(TOKENS) * 3 % V


def shard(magic: int, version: int, dtype: str) -> bytes:
    """GPT-2's tokens are uint16 (20240520, version 1), those of Llama 3 uint32 (20240801, version 7)."""
    return header(magic, version, TOKENS) + stream().astype(dtype).tobytes()


def llmc_tokenizer() -> bytes:
    """The bytes of the tokens of `tokenizer`, each after its length; version 2 names the end of text."""
    tokens = [token.replace("Ġ", " ").encode() for token in VOCABULARY]
    return header(20240328, 2, V, V - 1) + b"".join(bytes([len(token)]) + token for token in tokens)


# ---------------------------------------------------------------- Hugging Face

VOCABULARY = [*"abcdefg", "Ġ", "ab", "Ġab", EOT]
CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_ctx": T,
    "n_embd": C,
    "n_head": H,
    "n_layer": L,
    "n_positions": T,
    "vocab_size": V,
}


def huggingface_tensors() -> dict[str, np.ndarray]:
    """By Hugging Face's names, whose Conv1D is `[in, out]`."""
    tensors = {}
    for name, value in weights().items():
        if not layered(name):
            tensors[name] = value
            continue
        for l, layer in enumerate(value):
            tensors[f"h.{l}.{name}"] = layer.T if is_linear(name) else layer
    return tensors


def safetensors(tensors: dict[str, np.ndarray], dtype: str) -> bytes:
    number = {"F32": float32, "BF16": bfloat16, "F16": lambda v: v.astype("<f2").tobytes()}[dtype]
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, value in tensors.items():
        data = number(value)
        offsets = [len(content), len(content) + len(data)]
        about[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        content += data
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + content


def huggingface(
    folder: Path, dtype: str = "F32", prefix: str = "transformer.", shards: int = 1, extras: bool = False
) -> Path:
    """A folder as `save_pretrained` makes it. `extras`: the masks and the head that old files hold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tensors = {prefix + name: value for name, value in huggingface_tensors().items()}
    if extras:
        for l in range(L):
            tensors[f"{prefix}h.{l}.attn.bias"] = np.tril(np.ones((1, 1, T, T), np.float32))
            tensors[f"{prefix}h.{l}.attn.masked_bias"] = np.array([1.0], np.float32)
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(tensors, dtype))
        return folder
    names, homes = list(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = names[k::shards]
        homes |= dict.fromkeys(part, file)
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in part}, dtype))
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tokenizer(folder: Path) -> None:
    """A byte-level BPE of V tokens, in the files of GPT-2's: letters, two merges, the end of a text."""
    vocab = {token: i for i, token in enumerate(VOCABULARY)}
    assert len(vocab) == V
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")


def gguf(path: Path) -> None:
    """By the gguf package's own way of writing tensors, as llama.cpp's converter does."""
    import gguf as package

    writer = package.GGUFWriter(path, "gpt2")
    writer.add_context_length(T)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(4 * C)
    writer.add_block_count(L)
    writer.add_head_count(H)
    writer.add_layer_norm_eps(1e-5)
    mapping = package.get_tensor_name_map(package.MODEL_ARCH.GPT2, L)
    for name, value in huggingface_tensors().items():
        linear = any(is_linear(n) and name.endswith(n) for n in SHAPES)
        stored = np.ascontiguousarray(value.T if linear else value)
        writer.add_tensor(mapping.get_name(name, (".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    FILES.mkdir(exist_ok=True)
    for version in (1, 3, 5):
        (FILES / f"llmc_v{version}.bin").write_bytes(llmc_model(version))
    (FILES / "llmc_state_v1.bin").write_bytes(llmc_state(1))
    (FILES / "llmc_state.bin").write_bytes(llmc_state())
    (FILES / "llmc_tokens_v1.bin").write_bytes(shard(20240520, 1, "<u2"))
    (FILES / "llmc_tokens_v7.bin").write_bytes(shard(20240801, 7, "<u4"))
    (FILES / "llmc_tokenizer.bin").write_bytes(llmc_tokenizer())
    tokenizer(huggingface(FILES / "huggingface"))
    huggingface(FILES / "huggingface_bf16", "BF16")
    gguf(FILES / "gpt2.gguf")


if __name__ == "__main__":
    main()
