"""GPT-2 124M, trained and generating, against PyTorch and transformers: the same weights, batches and steps.

    python benchmarks/gpt2.py [train] [generate] [memory] [--threads N]

train      a step of 4 windows of 64 tokens, AdamW: tapeless, PyTorch eager, torch.compile; then with
           products in bfloat16: tapeless, and PyTorch's autocast, eager and compiled
generate   one text, a token at a time, greedily: tapeless and transformers, weights in float32 and in
           bfloat16; beside them the memory's bandwidth, measured before and after each, which bounds them
memory     peak memory of training steps, each in a process of its own, beside what llm.c allocates

The model is transformers' GPT2LMHeadModel with random weights; tapeless gets its state dict. Contenders
take turns, so that a disturbance meets all; the fastest and the median of their steps are printed. A
figure is only printed if the losses are those of PyTorch in float32: to 1e-4, in bfloat16 to 1e-2.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tapeless import presets
from tapeless.bench import about
from tapeless.bench.workload import training_flops
from tapeless.engine import Engine
from tapeless.layout import memory, n_params
from tapeless.ops.cpu.peak import bandwidth, peak_gflops

CONFIG = presets["gpt2"].model
BATCH, BLOCK, ROUNDS, STEPS, TOKENS = 4, 64, 5, 3, 100
AT_ONCE = {"B4 T64": (4, 64), "B4 T1024": (4, 1024)}


def stream() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab, BATCH * BLOCK * 40 + 1, dtype=np.int32)


def engine_of(hf: Any, threads: int, precision: str) -> Engine:
    """An engine with the weights of transformers' model."""
    engine = Engine(CONFIG.replace(precision=precision), "cpu", threads=threads)
    w = {name: value.numpy() for name, value in hf.state_dict().items()}
    p = engine.p
    p.wte[:], p.wpe[:] = w["transformer.wte.weight"], w["transformer.wpe.weight"]
    p.normf_w[:], p.normf_b[:] = w["transformer.ln_f.weight"], w["transformer.ln_f.bias"]
    theirs = {
        "norm1": "ln_1", "qkv": "attn.c_attn", "o": "attn.c_proj",
        "norm2": "ln_2", "1": "mlp.c_fc", "2": "mlp.c_proj",
    }  # fmt: skip
    for l in range(CONFIG.n_layer):
        for ours, name in theirs.items():
            names = (f"{ours}_w", f"{ours}_b") if "norm" in ours else (f"w{ours}", f"b{ours}")
            for target, part in zip(names, ("weight", "bias"), strict=True):
                getattr(p, target)[l] = w[f"transformer.h.{l}.{name}.{part}"]
    return engine


def model_of() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).eval()


# ---------------------------------------------------------------- training


class Ours:
    """Steps of tapeless."""

    def __init__(self, hf: Any, threads: int, precision: str):
        self.engine = engine_of(hf, threads, precision)
        self.engine.optimiser.constants[:] = 0.9, 0.999, 1e-8, 0, 0, 0
        self.stream, self.step = stream(), 0

    def __call__(self) -> float:
        starts = (self.step * BATCH + np.arange(BATCH)) * BLOCK
        self.step += 1
        spans = np.stack([starts, np.full(BATCH, BLOCK)], axis=1)[None]
        return float(self.engine.train(self.stream, spans, np.array([1e-4])).losses[0])


class Theirs:
    """Steps of PyTorch: the fused AdamW, and the loss without the model's own shift of targets."""

    def __init__(self, hf: Any, compiled: bool, autocast: bool):
        import torch

        self.model = model_of()
        self.model.load_state_dict(hf.state_dict())
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0, fused=True)
        self.tokens, self.step, self.autocast = torch.from_numpy(stream()).long(), 0, autocast

    def __call__(self) -> float:
        import torch

        at = self.step * BATCH * BLOCK
        self.step += 1
        x = self.tokens[at : at + BATCH * BLOCK].view(BATCH, BLOCK)
        y = self.tokens[at + 1 : at + 1 + BATCH * BLOCK]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.run(input_ids=x, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.view(BATCH * BLOCK, -1).float(), y)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())


def training(threads: int) -> None:
    hf = model_of()
    makers: dict[str, Callable[[], Any]] = {
        "tapeless": lambda: Ours(hf, threads, "float32"),
        "PyTorch eager": lambda: Theirs(hf, False, False),
        "torch.compile": lambda: Theirs(hf, True, False),
        "tapeless, bf16": lambda: Ours(hf, threads, "bf16"),
        "PyTorch autocast": lambda: Theirs(hf, False, True),
        "torch.compile, autocast": lambda: Theirs(hf, True, True),
    }
    contenders = {name: make() for name, make in makers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [run()] for name, run in contenders.items()}  # and compiles
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            for _ in range(STEPS):
                began = time.perf_counter()
                losses[name].append(run())
                seconds[name].append(time.perf_counter() - began)
    exact = np.array(losses["PyTorch eager"])
    flops = training_flops(CONFIG, [BLOCK] * BATCH)
    print(f"{'training step, B4 T64':26} fastest   median   GFLOP/s   times tapeless (medians)")
    for name, times in seconds.items():
        off = np.abs(np.array(losses[name]) / exact - 1).max()
        if off > (1e-2 if "bf16" in name or "autocast" in name else 1e-4):
            print(f"{name:26} losses differ from PyTorch's: {off:.1e}")
            continue
        base = seconds["tapeless, bf16" if "bf16" in name or "autocast" in name else "tapeless"]
        print(
            f"{name:26} {min(times):6.3f} s {np.median(times):6.3f} s   {flops / min(times) / 1e9:7.0f}"
            f"   {np.median(times) / np.median(base):.2f}"
        )


# ---------------------------------------------------------------- generating


def generating(threads: int) -> None:
    import torch

    hf = model_of()
    prompt, uniforms = [50256, 15496, 995], np.zeros(TOKENS)

    def ours(precision: str) -> Callable[[], list[int]]:
        engine = engine_of(hf, threads, precision)

        def run() -> list[int]:
            rows, _ = engine.generate(prompt, 1, TOKENS, uniforms, temperature=0)
            return rows[0].tolist()

        return run

    def theirs(dtype: Any) -> Callable[[], list[int]]:
        model, ids = model_of().to(dtype), torch.tensor([prompt])
        model.load_state_dict(hf.state_dict())
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)

        def run() -> list[int]:
            ids_ = model.generate(ids, attention_mask=mask, **options)
            return ids_[0, len(prompt) :].tolist()

        return run

    contenders = {
        "tapeless": ours("float32"), "transformers": theirs(torch.float32),
        "tapeless, bf16": ours("bf16"), "transformers, bf16": theirs(torch.bfloat16),
    }  # fmt: skip
    texts = {name: run() for name, run in contenders.items()}
    if texts["tapeless"] != texts["transformers"]:
        print("the greedy texts of tapeless and transformers differ")
        return
    seconds: dict[str, list[float]] = {name: [] for name in contenders}  # a token
    shares: dict[str, list[float]] = {name: [] for name in contenders}
    widths = []
    read = n_params(CONFIG) - CONFIG.block_size * CONFIG.n_embd  # of the positions, a row
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            widths.append(bandwidth(threads))
            began = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - began) / (TOKENS + len(prompt) - 1))
            size = read * (2 if "bf16" in name else 4)
            shares[name].append(size / seconds[name][-1] / 1e9 / max(widths[-1], bandwidth(threads)))
    print(f"memory's bandwidth, {threads} threads: {min(widths):.0f} to {max(widths):.0f} GB/s")
    print(f"{'a token at a time':26} fastest        median         of what reading the weights allows")
    for name, times in seconds.items():
        print(
            f"{name:26} {1 / min(times):5.1f} tokens/s {1 / np.median(times):5.1f} tokens/s"
            f"   {np.median(shares[name]):.0%}"
        )


# ---------------------------------------------------------------- memory


def llmc_bytes(B: int, T: int) -> int:
    """What llm.c's train_gpt2.c allocates: parameters, gradients, both moments; activations and, of the
    same size, their gradients. Its layout, train_gpt2.c fill_in_activation_sizes."""
    V, C, L, NH = 50304, CONFIG.n_embd, CONFIG.n_layer, CONFIG.n_head
    params = n_params(CONFIG) + (V - CONFIG.vocab) * C
    layer = B * T * (C + 2 + 3 * C + C + C + C + C + 2 + 4 * C + 4 * C + C + C) + 2 * B * NH * T * T
    acts = B * T * C + L * layer + B * T * (C + 2) + 2 * B * T * V + B * T
    return 4 * (4 * params + 2 * acts)


def step_memory(B: int, T: int, recompute: bool, threads: int) -> None:
    """Two training steps; prints this process's peak memory."""
    config = CONFIG.replace(recompute=recompute)
    engine = Engine(config, "cpu", threads=threads)
    rng = np.random.default_rng(0)
    for i in range(0, engine.params.size, 2**20):
        part = engine.params[i : i + 2**20]
        part[:] = 0.02 * rng.standard_normal(len(part), dtype=np.float32)
    engine.optimiser.constants[:] = 0.9, 0.999, 1e-8, 0, 0, 0
    data = rng.integers(0, config.vocab, B * T + 1, dtype=np.int32)
    spans = np.array([[[b * T, T] for b in range(B)]] * 2)
    engine.train(data, spans, np.full(2, 1e-4))
    # (What getrusage says begins with the memory of the process that started this one.)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(1024 * int(peak))


def peak_memory(threads: int) -> None:
    for name, (B, T) in AT_ONCE.items():
        theirs = llmc_bytes(B, T)
        planned = sum(plan.nbytes for plan in memory(CONFIG, "float32", B * T, B, threads, "mv").values())
        print(f"training step, {name}: llm.c {theirs / 1e9:.2f} GB; planned here {planned / 1e9:.2f} GB")
        for recompute in (False, True):
            command = [sys.executable, __file__, "--step", str(B), str(T), str(int(recompute))]
            child = subprocess.run(
                [*command, "--threads", str(threads)], capture_output=True, text=True, check=True
            )
            peak = int(child.stdout)
            what = "recomputing" if recompute else "tapeless"
            print(f"  {what:12} peak {peak / 1e9:.2f} GB, {peak / theirs:.0%} of llm.c's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"train": training, "generate": generating, "memory": peak_memory}
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--threads", type=int, default=2, help="of each contender [default: 2]")
    parser.add_argument("--step", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        B, T, recompute = options.step
        return step_memory(B, T, bool(recompute), options.threads)
    if unknown := [name for name in options.parts if name not in parts]:
        parser.error(f"no part is called {unknown[0]!r}. Known: {', '.join(parts)}")
    try:
        import torch
        import transformers
    except ImportError:
        sys.exit("this comparison needs PyTorch and transformers: pip install torch transformers")
    torch.set_num_threads(options.threads)
    report = about()
    print(f"{report['machine']['processor']}, {options.threads} threads; {report['date']}")
    versions = report["versions"] | {"torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"one core's peak: {peak_gflops():.0f} GFLOP/s")
    for name in options.parts or parts:
        parts[name](options.threads)


if __name__ == "__main__":
    main()
