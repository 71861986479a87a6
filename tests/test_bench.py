"""bench.py: that it measures and reports. No test asserts a time: that depends on the machine."""

import json

import pytest
from conftest import run_script

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
    done = run_script("bench.py", "--only=encode,speed", "--vs=vllm", "--repeats=0", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("--only=speed", "--vs=vllm", "--repeats=0"))


def test_the_ratio_is_to_the_best_peer_and_a_failure_is_reported():
    """Above 1 is better, for rates and for seconds; a peer that failed has no figure, and is left out of the ratio."""
    found = {
        "ours": dict(rounds=[90, 120, 100], setup_s=1, peak_mb=10),
        "hf": dict(rounds=[40, 50, 60], setup_s=1, peak_mb=10),
        "llamacpp": dict(failed="its process died"),
    }
    r = bench.summary("decode", found, {"memory": 54, "bfloat16": 800}, {"total": 134515008, "backbone": 106203456})
    assert (r["ours"], r["ratio"], r["llamacpp"]) == (100, 2.0, None) and r["failed"]["llamacpp"]
    assert r["limit_fraction"] == pytest.approx(100 * 2 * 134515008 / 54e9, abs=1e-3)
    assert bench.summary("startup", found, {}, {})["ratio"] == 0.5
