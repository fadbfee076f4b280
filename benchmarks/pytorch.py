"""tapeless against PyTorch, eager and torch.compile: the same models, data, batches and steps in one process.

    python benchmarks/pytorch.py [--threads N] [CASE]...

Prints µs a step and how many times as long PyTorch takes. A figure is only printed if the losses of
both are those of the NumPy reference.

PyTorch gets its best reasonable form: batches made beforehand, padded at the end of documents (which
causal attention never looks at) with padding left out of the loss, `scaled_dot_product_attention`,
the fused AdamW. torch.compile gets every batch in one shape, so that it compiles once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tapeless.bench import TRAINING, about
from tapeless.bench.workload import Differs, Workload, compare
from tapeless.layout import DECAYED, param_views, parameter_plan

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("this comparison needs PyTorch: pip install torch")

CASES = ("microgpt", "width-16", "width-32", "width-64", "shakespeare-char")
STEPS = 1000  # at most, of a repetition
REPEATS = 5
IGNORED = -1  # the target of padding


class Model(torch.nn.Module):
    """A GPT of one of the architectures measured; parameters by tapeless's names, [out, in]."""

    def __init__(self, work: Workload):
        super().__init__()
        self.config = work.config
        views = param_views(work.config, parameter_plan(work.config).views("p", work.weights.view(np.uint8)))
        self.first = {name: torch.from_numpy(_turned(name, value)) for name, value in views.items()}
        self.p = torch.nn.ParameterDict({name: value.clone() for name, value in self.first.items()})

    def restart(self) -> None:
        with torch.no_grad():
            for name, value in self.first.items():
                self.p[name].copy_(value)

    def norm(self, x: Any, name: str, l: int | None = None) -> Any:
        c = self.config
        if c.norm == "rms":
            return F.rms_norm(x, (c.n_embd,), eps=c.norm_eps)
        weight = self.p[f"{name}_w"]
        return F.layer_norm(x, (c.n_embd,), weight if l is None else weight[l], None, c.norm_eps)

    def forward(self, tokens: Any, targets: Any) -> Any:
        """The loss of tokens [B, T]."""
        c, p = self.config, self.p
        (B, T), H, K = tokens.shape, c.n_head, c.head_dim
        x = F.embedding(tokens, p["wte"]) + p["wpe"][:T]
        if c.norm_embed:
            x = self.norm(x, "norme")
        for l in range(c.n_layer):
            h = self.norm(x, "norm1", l)
            q, k, v = F.linear(h, p["wqkv"][l]).view(B, T, 3, H, K).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(attended.transpose(1, 2).reshape(B, T, c.n_embd), p["wo"][l])
            u = F.linear(self.norm(x, "norm2", l), p["w1"][l])
            x = x + F.linear(
                F.relu(u) if c.activation == "relu" else F.gelu(u, approximate="tanh"), p["w2"][l]
            )
        if c.norm_final:
            x = self.norm(x, "normf")
        logits = F.linear(x, p["wte"] if c.tied else p["head"])
        return F.cross_entropy(logits.view(B * T, -1), targets.view(-1), ignore_index=IGNORED)


def _turned(name: str, value: np.ndarray) -> np.ndarray:
    matrix = name in DECAYED and name not in ("wte", "wpe")
    return np.ascontiguousarray(value.swapaxes(-1, -2)) if matrix else value.copy()


def batches(work: Workload, steps: int, width: int | None) -> list[tuple[Any, Any]]:
    """Tokens and targets [B, T] of each step, T being the longest document's length, or `width`."""
    made = []
    for spans in work.spans[:steps]:
        T = width or int(spans[:, 1].max())
        tokens, targets = np.zeros((len(spans), T), np.int64), np.full((len(spans), T), IGNORED)
        for row, (start, length) in enumerate(spans):
            tokens[row, :length] = work.stream[start : start + length]
            targets[row, :length] = work.stream[start + 1 : start + 1 + length]
        made.append((torch.from_numpy(tokens), torch.from_numpy(targets)))
    return made


def train(model: Model, loss_of: Callable, made: list[tuple[Any, Any]], work: Workload) -> Any:
    """Train from the first weights: seconds, and the losses."""
    t = work.training
    model.restart()
    groups = [
        {"params": [p for name, p in model.p.items() if name in DECAYED], "weight_decay": t.weight_decay},
        {"params": [p for name, p in model.p.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimiser = torch.optim.AdamW(groups, betas=(t.beta1, t.beta2), eps=t.eps, fused=True)
    losses = []
    began = time.perf_counter()
    for (tokens, targets), lr in zip(made, work.lrs.tolist(), strict=False):
        loss = loss_of(tokens, targets)
        loss.backward()
        if t.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return time.perf_counter() - began, torch.stack(losses).numpy()


def contenders(work: Workload, steps: int, threads: int) -> dict[str, Callable[[], Any]]:
    """What trains the same steps, by name; torch.compile only where it works."""
    engine, model = work.engine(threads=threads), Model(work)
    exact, padded = batches(work, steps, None), batches(work, steps, work.config.block_size)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    found = {
        "tapeless": lambda: work.run(engine, steps),
        "eager": lambda: train(model, model, exact, work),
        "compiled": lambda: train(model, compiled, padded, work),
    }
    try:
        train(model, compiled, padded[:2], work)
    except Exception as error:  # of many kinds, from a missing C++ compiler to a bug in a driver
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"torch.compile does not work here and is left out: {reason}", file=sys.stderr)
        del found["compiled"]
    return found


def measure(name: str, threads: int) -> dict[str, float]:
    """µs a step of each contender. Raises `Differs` if losses are not the reference's."""
    case = TRAINING[name]
    steps = min(case.steps, STEPS)
    found, best = contenders(case.workload, steps, threads), {}
    for _ in range(REPEATS):  # in turn, so that a disturbance meets all
        for who, run in found.items():
            seconds, losses = run()
            try:
                compare(losses, case.reference)
            except Differs as reason:
                raise Differs(f"{who}'s {reason}") from None
            best[who] = min(best.get(who, np.inf), seconds / steps * 1e6)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", default=CASES, help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=1, help="of each contender [default: 1]")
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case is called {unknown[0]!r}. Known: {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    report, console, code = about(), Console(highlight=False), 0
    console.print(f"{report['machine']['processor']}, {options.threads} thread(s), float32; {report['date']}")
    versions = report["versions"] | {"torch": torch.__version__}
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), soft_wrap=True)
    table = Table("µs a step", box=None)
    for column in ("tapeless", "PyTorch eager", "ratio", "torch.compile", "ratio"):
        table.add_column(column, justify="right")
    for name in options.cases:
        print(name, file=sys.stderr)
        try:
            best = measure(name, options.threads)
        except Differs as reason:
            console.print(f"{name}: {reason}")
            code = 1
            continue
        cells = [f"{best['tapeless']:,.1f}"]
        for who in ("eager", "compiled"):
            there = who in best
            cells += [f"{best[who]:,.1f}", f"{best[who] / best['tapeless']:,.1f}×"] if there else ["–", "–"]
        table.add_row(name, *cells)
    console.print(table)
    return code


if __name__ == "__main__":
    sys.exit(main())
