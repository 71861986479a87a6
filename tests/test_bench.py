"""bench.py: what it measures and what it reports. No test asserts a time, which would depend on the machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import run_script, save_hf_directory, tiny, tiny_hf

import bench


@pytest.mark.slow
def test_the_last_line_is_one_json_object(tmp_path):
    """Other programs read that line. Nothing is left in the working directory."""
    done = run_script("bench.py", "--only=encode", "--repeats=2", "--vs=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout.splitlines()[-1])
    assert card["encode"]["ours"] > 0 and card["encode"]["tokenizers"] > 0 and card["machine"]["torch"]
    assert card["encode"]["ratio"] == pytest.approx(card["encode"]["ours"] / card["encode"]["tokenizers"], rel=0.02)
    assert not list(tmp_path.iterdir())


def test_wrong_names_are_refused_all_at_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=encode,speed", "--vs=vllm", "--llama_bench=no/such/program"])
    with pytest.raises(bench.UserError) as error:
        bench.main()
    assert all(word in str(error.value) for word in ("--only=speed", "--vs=vllm", "--llama_bench=no/such/program"))


@pytest.mark.slow
def test_peers_get_the_files_they_read_or_are_left_out(tmp_path, monkeypatch, capsys):
    """A peer that is not installed is named, with the command that installs it."""
    pytest.importorskip("gguf")
    folder = save_hf_directory(tmp_path / "model", tiny_hf(hidden_size=96, intermediate_size=96, head_dim=16))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else name)
    assert bench.write_ggufs(folder, tmp_path, ["hf", "llamacpp", "openvino"]) == ["hf", "openvino"]
    message = capsys.readouterr().err
    assert "llamacpp is left out" in message and message.endswith("pip install xllamacpp\n")
    assert sorted(file.name for file in tmp_path.glob("*.gguf")) == ["f16.gguf", "q8_0.gguf"]  # OpenVINO has no bf16


def rounds(*figures):
    return dict(rounds=list(figures), setup_s=1, peak_mb=10)


def test_the_ratio_is_to_the_best_peer_and_a_failure_is_left_out():
    """A ratio above 1 means that ours is faster, for rates and for seconds; a peer that failed has no figure."""
    found = {"ours": rounds(90, 120, 100), "hf": rounds(40, 50, 60), "llamacpp": dict(failed="its process died")}
    r = bench.summary("decode", found)
    assert (r["ours"], r["ratio"], r["best_peer"], r["llamacpp"]) == (100, 2.0, "hf", None)
    r = bench.summary("startup", {"ours": rounds(100), "hf": rounds(50)})
    assert (r["ratio"], r["best_peer"]) == (0.5, "hf")


def contender(fails_at: int):
    """Yield 0 for the setup, then 1, 2, ... for the rounds."""
    for i in range(9):
        if i == fails_at:
            raise RuntimeError("too hot\nand more")
        yield i
    os._exit(1)


@pytest.mark.slow
def test_contenders_take_turns_and_may_fail():
    """A failure in setup or in a round, or a process that dies, is recorded for that contender; the others go on."""
    one = bench.take_turns({"good": (contender, 99), "no setup": (contender, 0), "no round": (contender, 2)}, 3)
    assert one["good"]["rounds"] == [1, 2, 3] and one["good"]["setup_s"] >= 0
    assert one["no setup"]["failed"] == one["no round"]["failed"] == "RuntimeError: too hot"
    assert bench.take_turns({"dies": (contender, 99)}, 9)["dies"] == dict(failed="its process died")


def test_compiled_is_compared_with_compiled():
    names = lambda work, *vs: list(bench.contenders_for(work, vs, "cpu", "", ""))
    assert names("train", "hf", "llamacpp") == ["ours", "ours_eager", "hf", "hf_compiled"]
    assert names("train_full_vocab", "hf") == ["ours", "hf", "hf_compiled"] and names("train") == ["ours", "ours_eager"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_transformers_can_be_compiled_block_by_block(monkeypatch):
    """Its blocks really are compiled, although their class has its own __call__, and it trains."""
    pytest.importorskip("transformers")
    from torch._dynamo.utils import counters

    monkeypatch.setitem(bench.PRESETS, "135M", tiny().config)
    counters.clear()
    for who, compiled in (("hf", False), ("hf_compiled", True)):
        training = bench.training(who, "cpu", 512, 2, 16, torch.bfloat16)
        next(training)
        assert next(training) > 0
        # one graph for both blocks; with a KV cache, which training does not need, each would need its own
        assert counters["stats"]["unique_graphs"] == compiled


def test_one_limit_for_the_whole_run(monkeypatch, capsys):
    """The memory speed of a shared machine varies: the best one measured in any workload is the limit for all."""
    speeds = iter((30, 60))

    def turns(contenders, repeats):
        speed = next(speeds)
        return {"ours": rounds(100), "machine": dict(rounds=[dict(bfloat16=800, float32=400, memory=speed)] * 2)}

    monkeypatch.setattr(bench, "take_turns", turns)
    weights = {"total": 134515008, "backbone": 106203456, "cached": 0}
    bench.report(bench.Settings(repeats=2), "cpu", ["decode", "decode_int8"], [], "", "", weights, 0)
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["decode"]["limit"] == pytest.approx(60e9 / (2 * 134515008), abs=0.1)
    assert card["decode_int8"]["limit"] == pytest.approx(2 * card["decode"]["limit"], abs=0.2)
    assert card["decode"]["limit_fraction"] == pytest.approx(100 / card["decode"]["limit"], abs=1e-3)


def test_the_limit_at_depth_and_in_rows():
    """Keys and values are read as well as weights. Rows share the weights, until compute becomes the limit."""
    limits = dict(bfloat16=400, float32=800, memory=50)
    weights = {"total": 10**8, "backbone": 8 * 10**7, "cached": 11520}
    limit = {work: bench.hardware_limit(work, limits, weights) for work in bench.ALL}
    assert limit["decode"] == pytest.approx(50e9 / (2 * 10**8 + 48 * 11520 * 2))
    assert 7 * limit["decode"] < limit["decode_8_rows"] < 8 * limit["decode"]
    assert bench.hardware_limit("decode_8_rows", limits | dict(memory=5000), weights) == 800e9 / (2 * 10**8)
    assert limit["prefill"] == 800e9 / (16 * 10**7) and limit["busy"] is limit["prefill_int8"] is None
    on_gpu = bench.hardware_limit("train_full_vocab", limits, weights, "cuda")  # longer rows there: more attention
    assert 800e9 / on_gpu - 800e9 / limit["train_full_vocab"] == pytest.approx(12 * 30 * 9 * 64 * (2048 - 512))


@pytest.mark.slow
def test_busy_programs_end(monkeypatch):
    """The busy workload leaves no program running, and neither does a bench that is killed."""
    popen, started = subprocess.Popen, []
    monkeypatch.setattr(bench, "generating", lambda *_: iter([None, 6.0, 2.0, 6.0, 3.0]))
    busy = bench.beside_others("reading", "cpu", "", torch.float32)
    next(busy)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1])
        assert [next(busy), next(busy)] == [3.0, 2.0]
    assert len(started) == 4 and all(program.poll() is not None for program in started)
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(1);"
    command = [sys.executable, "-c", code + "sys.exit(p.poll() is not None)", bench.SPIN]
    done = subprocess.run(command, capture_output=True, timeout=20)  # returns when both have closed their output
    assert done.returncode == 0, "it ended before its parent"


def test_every_workload_measures_the_weights_it_names(monkeypatch):
    """An int8 row measures int8 weights, ours and those of the peers; no other row does."""
    measured = []

    class Engine:
        __init__ = lambda self, file, *_: measured.append("q8_0" in str(file))
        complete = lambda *_: (1.0, 1.0)

    model = tiny(vocab_size=1000, max_position_embeddings=32)
    load = lambda *_, quantize, fast: (measured.append(quantize == "int8") or model, None)
    for name, replacement in (("LlamaCpp", Engine), ("OpenVino", Engine), ("load", load)):
        monkeypatch.setattr(bench, name, replacement)
    small = {work: (4, min(new, 4), rows) for work, (_, new, rows) in bench.GENERATE.items()}
    monkeypatch.setattr(bench, "GENERATE", small)
    for work in bench.GENERATE:
        found = bench.contenders_for(work, ["hf", "llamacpp", "openvino"], "cpu", "model", "ggufs")
        assert ("hf" in found) == ("int8" not in work)
        for who in found.keys() & {"ours", "llamacpp", "openvino"}:
            measured.clear()
            function, *arguments = found[who]
            generating = function(*arguments)
            next(generating)
            assert next(generating) > 0 and measured == ["int8" in work], (work, who)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_a_native_llama_bench_is_asked_for_the_same_work(tmp_path):
    """It runs the same weights for as many tokens at the same depth, and only if llama.cpp takes part."""
    program = tmp_path / "llama-bench"
    program.write_text(f'#!/bin/sh\necho "$2 $4 $6 $8" >> {tmp_path}/asked\necho \'[{{"avg_ts": 12.5}}]\'\n')
    program.chmod(0o755)
    ask = lambda work, *vs: bench.contenders_for(work, vs, "cpu", "model", "ggufs", None, str(program))
    for work in ("prefill", "prefill_int8", "decode_int8", "decode_2048"):
        function, *arguments = ask(work, "llamacpp")["llama_bench"]
        native = function(*arguments)
        next(native)
        assert next(native) == 12.5
    assert (tmp_path / "asked").read_text().splitlines() == [  # file, prompt, new tokens, depth
        "ggufs/bf16.gguf 512 0 0", "ggufs/q8_0.gguf 512 0 0", "ggufs/q8_0.gguf 0 64 16", "ggufs/bf16.gguf 0 64 2048",
    ]  # fmt: skip
    assert "llama_bench" not in ask("decode", "hf") and "llama_bench" not in ask("decode_8_rows", "llamacpp")
    program.write_text("#!/bin/sh\necho no such model >&2; exit 1\n")
    with pytest.raises(bench.UserError, match="no such model"):
        next(native)
