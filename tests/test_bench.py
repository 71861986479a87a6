"""bench.py: that it measures and reports. No test asserts a time: that depends on the machine."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import run_script, tiny

import bench


@pytest.mark.slow
def test_the_last_line_is_one_json_object(tmp_path):
    """Other programs read it; the smallest of the works stands for all."""
    done = run_script("bench.py", "--only=encode", "--repeats=2", "--vs=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout.splitlines()[-1])
    assert card["encode"]["ours"] > 0 and card["encode"]["tokenizers"] > 0
    assert card["encode"]["ratio"] == pytest.approx(card["encode"]["ours"] / card["encode"]["tokenizers"], rel=0.02)
    low, high = card["encode"]["spread"]["ours"]
    assert low <= card["encode"]["ours"] <= high and card["machine"]["versions"]["torch"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wrong_names_are_refused_all_at_once(tmp_path):
    done = run_script("bench.py", "--only=encode,speed", "--vs=vllm", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("--only=speed", "--vs=vllm"))
    done = run_script("bench.py", "--repeats=0", cwd=tmp_path)
    assert done.returncode == 2 and "--repeats=0: " in done.stderr and "Traceback" not in done.stderr


def test_a_peer_that_is_not_installed_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    """With the command that gets it; the others are written what they read: OpenVINO no bf16."""
    import export_gguf

    written = []

    def export(folder, kind, to):
        written.append(kind)
        to.touch()
        return to

    monkeypatch.setattr(export_gguf, "export", export)
    every = ["hf", "llamacpp", "openvino"]
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # as if it were not there
    monkeypatch.setitem(sys.modules, "openvino_genai", bench)
    assert bench.write_ggufs(tmp_path, tmp_path, every) == ["hf", "openvino"]
    said = capsys.readouterr().err
    assert said.startswith("llamacpp is left out: ") and said.endswith("pip install gguf xllamacpp\n")
    assert sorted(written) == ["f16", "q8_0"] and (tmp_path / "f16.gguf").exists()
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    assert bench.write_ggufs(tmp_path, tmp_path, every) == ["hf"] and "openvino-genai" in capsys.readouterr().err


def rounds(*figures):
    return dict(rounds=list(figures), setup_s=1, peak_mb=10)


def test_the_ratio_is_to_the_best_peer_and_a_failure_is_reported():
    """Above 1 is better, for rates and for seconds; a peer that failed has no figure, and is left out of the ratio."""
    found = {"ours": rounds(90, 120, 100), "hf": rounds(40, 50, 60), "llamacpp": dict(failed="its process died")}
    r = bench.summary("decode", found)
    assert (r["ours"], r["ratio"], r["best_peer"], r["llamacpp"]) == (100, 2.0, "hf", None) and r["failed"]["llamacpp"]
    r = bench.summary("startup", {"ours": rounds(100), "hf": rounds(50)})
    assert (r["ratio"], r["best_peer"]) == (0.5, "hf")


def test_compiled_is_compared_with_compiled(capsys):
    """The best peer of our compiled training is transformers compiled, where that is faster; the card says who was."""
    assert list(bench.contenders_for("train", ["hf", "llamacpp"], "cpu", "", "")) == [
        "ours", "ours_eager", "hf", "hf_compiled",
    ]  # fmt: skip
    assert list(bench.contenders_for("train_full_vocab", ["hf"], "cpu", "", "")) == ["ours", "hf", "hf_compiled"]
    assert list(bench.contenders_for("train", [], "cpu", "", "")) == ["ours", "ours_eager"]
    found = {"ours": rounds(450), "ours_eager": rounds(400), "hf": rounds(380), "hf_compiled": rounds(430)}
    bench.print_card("train", bench.summary("train", found))
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(", compiled") for line in lines[1:5]] == [True, False, False, True]
    assert lines[5].strip() == "1.05 x hf_compiled, the best peer"


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_transformers_can_be_compiled_block_by_block(monkeypatch):
    """Its blocks really are compiled, and it trains: its class of block has a __call__ of its own."""
    pytest.importorskip("transformers")
    from torch._dynamo.utils import counters

    monkeypatch.setitem(bench.PRESETS, "135M", tiny().config)
    counters.clear()
    for who, compiled in (("hf", False), ("hf_compiled", True)):
        contender = bench.training(who, "cpu", 512, 2, 16, torch.bfloat16)
        next(contender)
        assert next(contender) > 0
        # one graph for both blocks: with a cache of keys and values, which training has no use for, each needs its own
        assert counters["stats"]["unique_graphs"] == compiled


def test_one_limit_for_the_whole_run(monkeypatch, capsys):
    """The memory of a shared machine swings: the best that any work saw bounds all of them, the first one too."""
    speeds = iter((30, 60))

    def turns(contenders, repeats):
        speed = next(speeds)
        return {"ours": rounds(100), "machine": dict(rounds=[dict(bfloat16=800, float32=400, memory=speed)] * 2)}

    monkeypatch.setattr(bench, "take_turns", turns)
    weights = {"total": 134515008, "backbone": 106203456, "cached": 0}
    settings = bench.Settings(repeats=2)
    bench.report(settings, "cpu", ["decode", "decode_int8"], [], "", "", weights, 0)
    out = capsys.readouterr().out.splitlines()
    card = json.loads(out[-1])
    assert card["decode"]["limit"] == pytest.approx(60e9 / (2 * 134515008), abs=0.1)
    assert card["decode_int8"]["limit"] == pytest.approx(2 * card["decode"]["limit"], abs=0.2)
    assert card["decode"]["limit_fraction"] == pytest.approx(100 / card["decode"]["limit"], abs=1e-3)
    assert "decode: 45% of the 223 tok/s that the hardware allows" in out


def test_the_limit_at_depth_and_in_rows():
    """Keys and values are read as well as weights, and rows share the weights, until the products are the limit."""
    limits = dict(bfloat16=400, float32=800, memory=50)
    weights = {"total": 10**8, "backbone": 8 * 10**7, "cached": 11520}
    limit = {work: bench.hardware_limit(work, limits, weights) for work in bench.DECODE}
    assert limit["decode"] == pytest.approx(50e9 / (2 * 10**8 + 48 * 11520 * 2))
    assert limit["decode_2048"] == pytest.approx(50e9 / (2 * 10**8 + 2080 * 11520 * 2))
    assert limit["decode_int8_2048"] == pytest.approx(50e9 / (10**8 + 2080 * 11520 * 2))
    assert 7 * limit["decode"] < limit["decode_8_rows"] < 8 * limit["decode"]
    assert bench.hardware_limit("decode_8_rows", limits | dict(memory=5000), weights) == 800e9 / (2 * 10**8)
    assert bench.hardware_limit("busy", limits, weights) is None


def test_a_gpu_is_given_more_to_do():
    """Rows that fill it, and the limit is that of the same rows."""
    limits = dict(bfloat16=800000, float32=400, memory=4000)
    per_token = {}
    for device, (vocab, rows, T) in {"cpu": (49152, 2, 512), "cuda": (49152, 16, 2048)}.items():
        assert bench.contenders_for("train_full_vocab", [], device, "", "")["ours"][2:6] == (device, vocab, rows, T)
        per_token[device] = 800e12 / bench.hardware_limit("train_full_vocab", limits, {}, device)
    assert per_token["cuda"] - per_token["cpu"] == pytest.approx(12 * 30 * 9 * 64 * (2048 - 512))


@pytest.mark.slow
def test_beside_others(monkeypatch, tmp_path):
    """The busy row sets up, gives a ratio, and leaves no program running."""
    import psutil

    monkeypatch.setattr(bench, "prefilling", lambda *_: iter([None, 6.0, 2.0, 6.0, 3.0]))
    contender = bench.beside_others("reading", "cpu", "", torch.float32)
    next(contender)
    assert [next(contender), next(contender)] == [3.0, 2.0]
    assert not [p for p in psutil.Process().children() if "getppid" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_busy_programs_end_with_their_parent(tmp_path):
    """A bench that is killed must not leave two cores busy for ever."""
    import psutil

    code = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code + "; time.sleep(99)", bench.SPINNING], stdout=subprocess.PIPE, text=True
    )
    spinner = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)
    assert spinner.is_running() and spinner.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    parent.wait()
    spinner.wait(20)


def test_every_work_measures_the_weights_it_names(monkeypatch):
    """A row in int8 is of int8 weights, on our side and on that of the peers, and no other row is."""
    measured = []

    class Engine:
        def complete(self, *_):
            return {"prompt_per_second": 1.0, "predicted_per_second": 1.0}

    monkeypatch.setattr(bench, "engine_for", lambda who, folder, int8, *_, **__: measured.append(int8) or Engine())
    monkeypatch.setattr(bench, "from_pretrained", lambda *_: tiny(vocab_size=1000, max_position_embeddings=32))
    monkeypatch.setattr(bench, "quantize", lambda model, kind: measured.append(kind == "int8"))
    monkeypatch.setattr(bench, "PREFILL", 8)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "DECODE", {work: (4, rows) for work, (_, rows) in bench.DECODE.items()})
    for work in (*bench.DECODE, *bench.READ):
        found = bench.contenders_for(work, ["hf", "llamacpp", "openvino"], "cpu", "model", "ggufs")
        assert ("hf" in found) == ("int8" not in work)
        for who in found.keys() & {"ours", "llamacpp", "openvino"}:
            measured.clear()
            function, *arguments = found[who]
            contender = function(*arguments)
            next(contender)
            assert next(contender) > 0
            # bf16 weights are ours as they are, and a file of their own for a peer
            assert measured == ([True] if "int8" in work else [] if who == "ours" else [False]), (work, who)


def test_without_the_resource_module(monkeypatch, capsys):
    """Windows has none, and no /proc: the card then leaves the memory out."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(bench.Path, "exists", lambda self: False)
    found = {"ours": rounds(1) | dict(peak_mb=bench.peak_mb())}
    r = bench.summary("encode", found)
    assert r["peak_mb"]["ours"] is None and "resource" not in vars(bench)
    bench.print_card("encode", r)
    assert "peak" not in capsys.readouterr().out.split("no peer")[0]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_native_llama_bench_is_asked_for_the_same_work(tmp_path):
    """A stand-in, which notes what it was asked: the same tokens after the same depth from the same weights, and only
    where llama.cpp takes part. One that fails is said, and names its last words."""
    program = tmp_path / "llama-bench"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho \'[{{"avg_ts": 12.5}}]\'\n')
    program.chmod(0o755)
    ask = lambda work, vs: bench.contenders_for(work, vs, "cpu", "model", "ggufs", None, str(program))  # noqa: E731
    for work in ("prefill", "prefill_int8", "decode_int8", "decode_2048"):
        function, *arguments = ask(work, ["llamacpp"])["llama_bench"]
        contender = function(*arguments)
        next(contender)
        assert next(contender) == 12.5
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    asked = [{flag: value for flag, value in zip(line[::2], line[1::2])} for line in asked]
    assert [(a["-m"], a["-p"], a["-n"], a["-d"]) for a in asked] == [
        ("ggufs/bf16.gguf", "512", "0", "0"),
        ("ggufs/q8_0.gguf", "512", "0", "0"),
        ("ggufs/q8_0.gguf", "0", "64", "16"),
        ("ggufs/bf16.gguf", "0", "64", "2048"),
    ]
    assert "llama_bench" not in ask("decode", ["hf"]) and "llama_bench" not in ask("decode_8_rows", ["llamacpp"])
    program.write_text("#!/bin/sh\necho no such model >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="no such model"):
        next(contender)
