"""lib/device.py: precision, peak and compiling are chosen by what the machine can do."""

import subprocess
import sys

from lib import device
from lib.device import peak_flops, pick_autocast, pick_compile, pick_device
from lib.parallel import join_processes
from lib.settings import UserError

import pytest
import torch
from conftest import ROOT


@pytest.mark.parametrize("capability, expected", [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_precision_goes_by_capability(capability, expected, monkeypatch):
    """Older GPUs accept bf16 but emulate it slowly, so the compute capability decides."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert pick_autocast("auto", "cuda")[0] == expected
    assert pick_autocast("auto", "mps")[0] == torch.float32
    assert pick_autocast("float32", "cuda")[0] == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    assert pick_autocast("auto", "cpu")[0] == torch.float32


@pytest.mark.parametrize("bf16, fp32, expected", [(2e11, 1e11, torch.bfloat16), (1e11, 2e11, torch.float32)])
def test_bf16_on_a_cpu_must_be_faster_too(bf16, fp32, expected, monkeypatch):
    """An Intel Xeon (family 6, model 207) has avx512_bf16, but its bf16 products take twice as long as fp32 ones."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(device, "bfloat16_speed", lambda: bf16 / fp32)
    assert pick_autocast("auto", "cpu")[0] == expected


@pytest.mark.parametrize(
    "name, tflops",
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
     ("NVIDIA GH200 480GB", 0), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0),
     ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 3090", 71),
     ("NVIDIA GeForce RTX 3090 Ti", 0), ("NVIDIA GeForce RTX 4090 D", 0), ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
     ("NVIDIA Frobnicator 9", 0)],
)  # fmt: skip
def test_a_peak_is_that_of_the_very_device(name, tflops, monkeypatch):
    """An L40 is not an L4, a PCIe H100 is a quarter slower, a MIG slice is not an A100; other GPUs get no peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    assert peak_flops("cuda", torch.bfloat16)[0] == tflops * 1e12
    assert peak_flops("cuda", torch.bfloat16, 5)[0] == 5e12


@pytest.mark.parametrize("name", ["meta", "xpu", "cuda:x", "cuda:99", "CPU", ""])
def test_a_device_is_one_that_computes(name):
    """On "meta" a model has no values. Devices that torch supports but this code was never run on are refused, too."""
    with pytest.raises(UserError, match="--device="):
        pick_device(name)
    assert pick_device("cpu") == "cpu" and pick_device("auto") in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("environment", [dict(RANK="one", WORLD_SIZE="2", LOCAL_RANK="0"), dict(RANK="0")])
def test_an_environment_that_is_not_torchruns_is_refused(environment, monkeypatch):
    """Two processes that both act as rank 0 would overwrite each other's files."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    assert join_processes("cpu") == (0, 1, "cpu")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="torchrun"):
        join_processes("cpu")
    for key, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0").items():
        monkeypatch.setenv(key, value)
    assert join_processes("cpu") == (0, 1, "cpu")


def test_compile_auto_leaves_short_runs_alone(monkeypatch):
    assert not pick_compile("auto", "cpu", 1e12, 1e12)[0]
    assert pick_compile("on", "cpu", 1e12, 1e12)[0] and not pick_compile("off", "cpu", 1e20, 1e12)[0]
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    assert pick_compile("auto", "cpu", 1e20, 1e12) == (False, "no C++ compiler found")


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [True, False])
def test_numbers_too_small_to_matter_are_zero(prepared):
    """In all threads, since denormals slow down each one. Negative control: without prepare_process() they are not."""
    code = (
        "import torch\nfrom lib import device\n"
        "torch.set_num_threads(2)\n"
        f"{'device.prepare_process()' if prepared else ''}\n"
        "small = torch.full((1 << 22,), 700_000, dtype=torch.int32).view(torch.float32)  # 1e-39\n"
        "print(int((small * 0.5).view(torch.int32).count_nonzero()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (0 if prepared else 1 << 22)


def test_a_numbered_gpu_is_not_shared_by_processes(monkeypatch):
    """--device=cuda:1 under torchrun would put all processes on the second GPU."""
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device=cuda:1: each of 2 processes .*Use --device=cuda"):
        join_processes("cuda:1")


def test_measuring_leaves_the_random_numbers_of_a_run_alone():
    """The peak is measured after seeding and before the weights are initialized."""
    before = torch.get_rng_state()
    assert peak_flops("cpu", torch.float32)[0] > 1e8 and device.bfloat16_speed() > 0
    assert torch.equal(torch.get_rng_state(), before)
