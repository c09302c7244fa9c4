"""Tables and plots from the result files: ``python benchmarks/report.py`` rewrites them, and the README's own table.

Every folder of ``benchmarks/results`` that holds ``machine`` records is one device.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- benchmarks: written by benchmarks/report.py -->", "<!-- end of benchmarks -->"


def load(folder):
    """The result files of a device, by benchmark."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: result for name, result in found.items() if "cases" in result}


def title(test, ours):
    """``test_forward[64x70-float32-native]`` as ``forward 64x70-float32``."""
    name, _, case = test.removeprefix("test_").partition("[")
    name = name.replace("forward_backward", "forward + backward").replace("_", " ")
    return f"{name} {case.rstrip(']').removesuffix(ours).rstrip('-')}".strip()


def rows(results):
    for benchmark, result in results.items():
        for test, case in result["cases"].items():
            yield benchmark, title(test, case["ours"]), case


def table(results):
    lines = [
        "| op | case | backend | ms | eager, ms | times faster than | of the ceiling | peak MB (eager), results |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for benchmark, name, case in rows(results):
        ours, base, memory = case["ours"], case["baseline"], case.get("peak MB")
        faster = ", ".join(f"{peer} {ratio:.2g}" for peer, ratio in case["times faster than"].items())
        share = case.get("share of the matrix rate", case.get("share of the bandwidth"))
        of_ceiling = "" if share is None else f"{share:.0%}"
        peak = "" if memory is None else f"{memory[ours]:.3g} ({memory[base]:.3g}), {case['results MB']:.3g}"
        times = f"{case['ms'][ours]:.3g} | {case['ms'][base]:.3g}"
        lines.append(f"| {benchmark} | {name} | {ours} | {times} | {faster} | {of_ceiling} | {peak} |")
    return lines


def machine_line(results):
    machine = next(iter(results.values()))["machine"]
    ceilings = next(iter(results.values()))["ceilings, G/s"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "python"))
    return (
        f"{machine['device']}; {versions}; {machine['date']}. Ceilings in the same run: read {ceilings['read']} GB/s, "
        f"copy {ceilings['copy']} GB/s, matrix products {ceilings['matmul']:.0f} GFLOP/s."
    )


def plot(results, path):
    """Times of every candidate over ours, a bar each beside its name, on a logarithmic axis."""
    bars, middles, y = [], {}, 0.0
    for benchmark, name, case in rows(results):
        faster = case["times faster than"]
        middles[f"{benchmark} {name}"] = y + (len(faster) - 1) / 2
        bars += [(y + i, *pair) for i, pair in enumerate(faster.items())]
        y += len(faster) + 0.7
    figure, axes = plt.subplots(figsize=(9, 1 + 0.12 * y), layout="constrained")
    heights, _, ratios = zip(*bars, strict=True)
    axes.barh(heights, ratios, 0.8)
    for height, peer, ratio in bars:
        axes.text(ratio * 1.03, height, f"{peer} {ratio:.2g}", fontsize=6, va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(list(middles.values()), list(middles), fontsize=7)
    axes.set_ylim(y - 1, -1)
    axes.set_xlim(right=2 * max(ratios))
    axes.set_xlabel("times faster than the peer")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    sections = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if results := load(folder):
            plot(results, folder / "speed.png")
            picture = f"![times faster than the peers](benchmarks/results/{folder.name}/speed.png)"
            sections += [machine_line(results), "", *table(results), "", picture, ""]
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        readme.write_text(before + "\n".join([BEGIN, "", *sections]) + END + rest.split(END)[1])
    print("\n".join(sections))


if __name__ == "__main__":
    main()
