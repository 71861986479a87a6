"""
Draw a run's log.jsonl, or what bench.py measured, as a PNG. Needs matplotlib (`pip install matplotlib`), but no torch.

    python plot.py --run=out/tiny_shakespeare           # loss, best step, learning rate, speed: out/.../log.png
    python bench.py > bench.txt; python plot.py --bench=bench.txt     # our speed next to the peers': bench.png
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.files import atomic, read_errors_as_user_error
from lib.settings import UserError, override, run_main


@dataclass
class Settings:
    run: str = ""  # run folders, comma-separated; several are compared in bits per byte
    bench: str = ""  # or a file that holds the output of bench.py
    out: str = ""  # the picture; empty: log.png in the first run's folder, or next to the file of --bench
    dark: bool = False  # for dark pages


def read_log(folder: str) -> tuple[list[dict], list[dict]]:
    """Return the step lines and the evaluations of a run's log.jsonl."""
    path, steps, evals = Path(folder, "log.jsonl"), [], []
    with read_errors_as_user_error(path, "train.py writes it: expected the folder of a run."):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # a kill, or a full disk, may leave half a line
                entry = json.loads(line)
                steps += [entry] if entry.get("loss") is not None else []
                evals += [entry] if entry.get("val_loss") is not None else []
    if not steps and not evals:
        raise UserError(f"{path} has no step yet: wait for the first line that train.py prints.")
    return steps, evals


def draw_runs(figure, folders: list[str]):
    """Draw losses, best step, rate and speed; several runs in bits per byte, since their tokenizers may differ."""
    loss, lr, speed = figure.subplots(3, 1, sharex=True, height_ratios=(4, 1, 1))
    loss.set_ylabel("bits per byte" if len(folders) > 1 else "loss, nats per token")
    for i, folder in enumerate(folders):
        steps, evals = read_log(folder)
        name, one, two, scale = "", "C0", "C1", 1.0  # a single run has two colors
        if len(folders) > 1:
            name, one, two = f"{Path(folder).name}, ", f"C{i}", f"C{i}"
            if not evals:
                raise UserError(f"{folder} has no evaluation yet, so its bits per byte are not known.")
            scale = evals[-1]["val_bpb"] / evals[-1]["val_loss"]
        x = [line["step"] for line in steps]
        loss.plot(x, [scale * line["loss"] for line in steps], one, lw=1, label=f"{name}training")
        lr.plot(x, [line["lr"] for line in steps], one)
        speed.plot(x, [line["tok_per_s"] for line in steps], one)
        if evals:
            x, y = [line["step"] for line in evals], [scale * line["val_loss"] for line in evals]
            best = y.index(min(y))
            label = f"best, step {x[best]:,}: {evals[best]['val_bpb']:.3f} bits per byte"
            loss.plot(x, y, two, marker="o", ms=4, label=f"{name}validation")
            loss.plot(x[best], y[best], two, marker="o", ms=11, mfc="none", mew=2, ls="", label=label)
    loss.legend(frameon=False)
    lr.set(ylabel="learning rate", ylim=(0, None))
    speed.set(ylabel="tokens / s", ylim=(0, None), xlabel="step")


def draw_bench(figure, path: Path):
    """Draw a panel for each workload: a bar for each contender, and its slowest and fastest round."""
    with read_errors_as_user_error(path, "It should hold what bench.py printed: python bench.py > FILE"):
        works = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        figure.suptitle("{device}, {threads} threads, {date}".format(**works.pop("machine")))
        for i, (work, r) in enumerate(works.items(), 1):
            panel = figure.add_subplot((len(works) + 2) // 3, min(3, len(works)), i)
            names = list(reversed(r["spread"]))  # those that ran
            ends = [[abs(r[name] - r["spread"][name][side]) for name in names] for side in (0, 1)]
            colors = ["C0" if name.startswith("ours") or work == "busy" else "C2" for name in names]
            panel.barh(names, [r[name] for name in names], xerr=ends, color=colors, ecolor="gray")
            panel.set_title(f"{work}, {r['unit']}{', less is better' if r['unit'] in ('s', 'x') else ''}", fontsize=9)


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    folders = [folder for folder in s.run.split(",") if folder]
    if bool(folders) == bool(s.bench):
        raise UserError("expected --run=out/RUN, or --bench=FILE with the output of bench.py.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    ink, paper, grid = ("#e6edf3", "#0d1117", "#30363d") if s.dark else ("#24292f", "#ffffff", "#d8dee4")
    style = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    style |= {"figure.facecolor": paper, "axes.facecolor": paper, "grid.color": grid, "axes.grid": True}
    out = Path(s.out or (Path(s.bench).with_suffix(".png") if s.bench else Path(folders[0], "log.png")))
    style |= {"axes.axisbelow": True, "font.size": 8, "axes.prop_cycle": "cycler(color=['3b8eea', 'e8742a', '35a853'])"}
    with matplotlib.rc_context(style), atomic(out) as temporary:
        figure = Figure(figsize=(9, 6), layout="constrained")
        draw_bench(figure, Path(s.bench)) if s.bench else draw_runs(figure, folders)
        figure.savefig(temporary, format="png", dpi=150)
    print(out)


if __name__ == "__main__":
    run_main(main)
