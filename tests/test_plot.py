"""plot.py: what its pictures show of a run or of bench.py's figures, and what it says if there is nothing to draw."""

import json
import sys
from pathlib import Path

from lib.settings import UserError

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is an optional package")

from matplotlib.figure import Figure

import plot


def run_folder(path: Path, losses=(3.0, 2.0, 2.5), tokens_per_byte=0.5) -> Path:
    """Make a folder with a log of ten steps, an evaluation for each of `losses`, a sample and a changed setting."""
    lines = [dict(step=i, loss=4.0 - i / 10, lr=1e-3, grad_norm=1.0, tok_per_s=100.0) for i in range(1, 11)]
    bits = tokens_per_byte / 0.6931
    lines += [dict(step=4 * i, val_loss=loss, val_bpb=loss * bits) for i, loss in enumerate(losses)]
    lines += [dict(step=5, sample="text"), dict(step=5, setting="lr", old=1, new=2), dict(step=11, loss=None)]
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 12, "lo')  # a kill
    return path


def curves(figure, panel=0) -> dict[str, list]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[panel].lines}


def test_a_run_shows_its_losses_and_its_best_step(tmp_path):
    """The best step has the lowest validation loss, not the last; learning rate and speed have their own panels."""
    figure = Figure()
    plot.draw_runs(figure, [str(run_folder(tmp_path / "a"))])
    shown = curves(figure)
    assert shown["training"] == pytest.approx([4.0 - i / 10 for i in range(1, 11)])
    assert shown["validation"] == [3.0, 2.0, 2.5] and shown["best, step 4: 1.443 bits per byte"] == [2.0]
    assert [figure.axes[i].lines[0].get_ydata()[0] for i in (1, 2)] == [1e-3, 100.0]


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    """Two runs with the same loss per byte, one with twice as many tokens, must have the same curve."""
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", (1.5, 1.0, 1.25), 1.0)
    figure = Figure()
    plot.draw_runs(figure, [str(a), str(b)])
    shown = curves(figure)
    assert shown["a, validation"] == pytest.approx(shown["b, validation"])
    assert shown["a, training"] != pytest.approx(shown["b, training"])  # control: these losses differ per byte


def test_bench_shows_every_contender(tmp_path):
    """A bar for each contender that ran, as long as its median, with the slowest and the fastest round."""
    result = {"unit": "tok/s", "ours": 80.0, "hf": 40.0, "openvino": None, "spread": {"ours": [70, 85], "hf": [39, 43]}}
    file = tmp_path / "bench.txt"
    machine = {"device": "a CPU", "threads": 2, "date": "2026-11-30"}
    file.write_text("decode\n  ours ...\n" + json.dumps({"machine": machine, "train": result, "decode": result}) + "\n")
    figure = Figure()
    plot.draw_bench(figure, file)
    assert len(figure.axes) == 2 and [bar.get_width() for bar in figure.axes[1].patches] == [40.0, 80.0]
    ends = [[x for x, _ in end] for end in figure.axes[1].collections[0].get_segments()]
    assert ends == [[39.0, 43.0], [70.0, 85.0]]  # slowest and fastest round
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["hf", "ours"]


def test_the_command_writes_a_picture(tmp_path, monkeypatch, capsys):
    """`python plot.py --run=...`, light and dark: a PNG next to the log, or at --out."""
    folder = run_folder(tmp_path / "a")
    for flags, out in ([], folder / "log.png"), (["--dark=true", f"--out={tmp_path}/dark.png"], tmp_path / "dark.png"):
        monkeypatch.setattr(sys, "argv", ["plot.py", f"--run={folder}", *flags])
        plot.main()
        assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"{out}\n"
    assert (tmp_path / "dark.png").read_bytes() != (folder / "log.png").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "expected --run"),
        (["--run=missing"], r"missing.log\.jsonl not found"),
        (["--run=empty"], "no step yet"),
        (["--run=steps,steps"], "no evaluation yet"),
        (["--bench=empty/log.jsonl"], "what bench.py printed"),
    ],
)
def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/log.jsonl").write_text("\n")
    run_folder(Path("steps"), losses=())
    monkeypatch.setattr(sys, "argv", ["plot.py", *flags])
    with pytest.raises(UserError, match=message):
        plot.main()
    assert not list(tmp_path.rglob("*.png*"))
