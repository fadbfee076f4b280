"""The result of `tapeless bench` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(report: dict[str, Any]) -> None:
    """Print what `tapeless.bench.bench` returned."""
    console = Console(highlight=False)
    machine, versions = report["machine"], report["versions"]
    console.print(f"{machine['processor']}, {machine['cores']} cores; {machine['system']}; {report['date']}")
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    peaks = ", ".join(f"{peak:,.0f} on {threads}" for threads, peak in report["peak_gflops"].items())
    console.print(f"{report['simd']}, {report['dtype']}; multiply-add peak, GFLOP/s by cores: {peaks}")
    training = [case for case in report["cases"] if "us_per_step" in case]
    other = [case for case in report["cases"] if "us_per_step" not in case and "refused" not in case]
    if training:
        console.print("", _training(training), sep="\n")
    if other:
        console.print("", _other(other), sep="\n")
    profiles = [(case["case"], case["profile"]) for case in training if "profile" in case]
    if profiles:
        console.print("", "Where the time of a step goes, on one thread (µs and share):", sep="\n")
    for i in range(0, len(profiles), 3):  # as many as stand side by side on a terminal
        console.print(_profiles(dict(profiles[i : i + 3])))
    for case in report["cases"]:
        if "refused" in case:
            console.print(f"[bold red]{case['case']}:[/] {case['refused']}", soft_wrap=True)


def _table(left: list[str], right: list[str]) -> Table:
    table = Table(*left, box=None)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _training(cases: list[dict[str, Any]]) -> Table:
    table = _table(["training", "a step"], ["threads", "tokens", "µs a step", "GFLOP/s", "of peak"])
    for case in cases:
        table.add_row(
            case["case"], case["work"], str(case["threads"]), f"{case['tokens_per_step']:,.0f}",
            f"{case['us_per_step']:,.1f}", f"{case['gflops']:,.1f}", f"{case['fraction_of_peak']:.1%}",
        )  # fmt: skip
    return table


def _other(cases: list[dict[str, Any]]) -> Table:
    table = _table(["other", "of what"], ["measured"])
    for case in cases:
        if "characters_per_second" in case:
            share = f"{case['fraction_of_peak']:.1%} of peak"
            figure = f"{case['characters_per_second']:,.0f} characters/s, {share}"
        elif "generating_seconds" in case:
            figure = f"train {case['training_seconds']:.2f} s, generate {case['generating_seconds']:.2f} s"
        else:
            figure = f"{case['seconds']:.2f} s"
        table.add_row(case["case"], case["work"], figure)
    return table


def _profiles(profiles: dict[str, Any]) -> Table:
    table = _table(["family"], list(profiles))
    for family in next(iter(profiles.values())):
        cells = [profile[family] for profile in profiles.values()]
        table.add_row(family, *(f"{cell['us']:,.1f} {cell['share']:>6.1%}" for cell in cells))
    return table
