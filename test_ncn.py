"""The whole test suite: pytest -q. Needs no network, no GPU, and nothing outside this folder."""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import http.server
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import analyze
import kernels
import ncn
import prepare
import sample
import sample as sampling
import train as training
from ncn import SALIENCE, SIGNALS, Memory, ModulatedLM, NCNConfig
from prepare import CONTROL, END
from sample import generate

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # cuda: needs a GPU
if "cuda" not in " ".join(sys.argv[1:]):  # -m cuda; all other tests run as without a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# The models are tiny: more threads would be slower, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
HERE = Path(__file__).parent


# ==== kernels.py and kernels.cu ===================================================================
# ==== Kernels =====================================================================================
# g++ compiles the very same kernels.cu for the CPU behind a shim that runs one real thread per CUDA
# thread, and the launcher cpu_threads() takes the place of the GPU's.
SHIM = r"""
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>
#define __global__
#define __device__
#define __shared__ static          // one block runs at a time: its shared memory is everybody's
#define __launch_bounds__(threads)
struct dim { unsigned x = 0, y = 0; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
thread_local dim threadIdx, blockIdx;
dim blockDim, gridDim;

unsigned removed;                  // the line of a barrier to leave out
std::unique_ptr<std::barrier<>> of_block, of_warp[64];
float lanes[64][32];

#define __syncthreads() if (__LINE__ != removed) of_block->arrive_and_wait()
inline float __shfl_xor_sync(unsigned, float v, int other) {
    unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    unsigned warp = thread / 32, lane = thread % 32;
    lanes[warp][lane] = v;
    of_warp[warp]->arrive_and_wait();
    v = lanes[warp][lane ^ other];
    of_warp[warp]->arrive_and_wait();
    return v;
}
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float half_to_float(unsigned short h) {   // its exponent's bias is 112 less than a float's
    float x = __int_as_float((h & 0x7fff) << 13) * 0x1p112f;
    return copysignf(x < 65536 ? x : h & 1023 ? NAN : INFINITY, h >> 15 ? -1 : 1);
}
inline unsigned short float_to_half(float x) {   // to nearest, ties to even
    unsigned short sign = __float_as_int(x) < 0 ? 0x8000 : 0;
    int i = __float_as_int(fabsf(x));
    if (!(fabsf(x) < 65520)) return x != x ? 0x7fff : sign | 0x7c00;
    if (fabsf(x) < 0x1p-14f) return sign | (int)nearbyintf(fabsf(x) * 0x1p24f);
    return sign | (i + 0xfff + (i >> 13 & 1) - (112 << 23)) >> 13;
}

#include "kernels.cu"

typedef unsigned long long u64;
template <class A> A take(u64*& word) {
    A a;
    memcpy(&a, word, sizeof a);
    word += sizeof(a) / 8;
    return a;
}
template <class... A> std::function<void(u64*)> kernel(void (*f)(A...)) {
    return [f](u64* words) { std::apply(f, std::tuple<A...>{take<A>(words)...}); };
}
std::function<void(u64*)> table[] = {KERNELS};

std::vector<u64> numbers() {
    auto number = [] { u64 n; return fread(&n, 8, 1, stdin) == 1 ? n : (exit(3), 0); };
    std::vector<u64> all(number());
    for (u64& n : all) n = number();
    return all;
}

// In: kernel, removed barrier, grid, block; the arguments' words; address and size of each piece of
// memory; the pieces. Out: the pieces. They are allocated to the byte, so that the address
// sanitizer sees every step beyond.
int main() {
    std::vector<u64> head = numbers(), words = numbers(), pieces = numbers(), moved = words;
    removed = head[1], gridDim.x = head[2], gridDim.y = head[3];
    blockDim.x = head[4], blockDim.y = head[5];
    std::vector<std::unique_ptr<char[]>> memory;
    for (size_t p = 0; p < pieces.size(); p += 2) {
        char* piece = memory.emplace_back(new char[pieces[p + 1]]).get();
        if (fread(piece, 1, pieces[p + 1], stdin) != pieces[p + 1]) exit(3);
        for (size_t w = 0; w < words.size(); w++)
            if (words[w] - pieces[p] < pieces[p + 1]) moved[w] += (u64)piece - pieces[p];
    }
    unsigned threads = blockDim.x * blockDim.y;
    of_block = std::make_unique<std::barrier<>>(threads);
    for (unsigned w = 0; w < threads / 32; w++) of_warp[w] = std::make_unique<std::barrier<>>(32);
    std::vector<std::jthread> running;
    for (unsigned t = 0; t < threads; t++) running.emplace_back([&, t] {
        threadIdx = {t % blockDim.x, t / blockDim.x};
        for (u64 b = 0; b < (u64)gridDim.x * gridDim.y; b++) {
            blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x)};
            table[head[0]](moved.data());
            of_block->arrive_and_wait();   // the next block takes over the shared memory
        }
    });
    running.clear();   // joins
    for (size_t m = 0; m < memory.size(); m++)
        fwrite(memory[m].get(), 1, pieces[2 * m + 1], stdout);
}
"""

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON_GPU = (pytest.mark.cuda, NO_GPU)
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(kernels._TYPES), ids=str)
HALF = (torch.float16, torch.bfloat16)


@functools.cache
def shim(sanitizer):
    """kernels.cu for CPU threads -> its program, the instances in it, and the folder they keep.

    Under a sanitizer bf16 alone, which passes through every path of the templates."""
    if not shutil.which("g++"):
        pytest.skip("no g++: kernels.cu cannot be run on the CPU")
    names = kernels._INSTANCES
    options = []
    if sanitizer:
        names = [name for name in names if "bf16" in name]
        options = [f"-fsanitize={sanitizer}"]
    folder = tempfile.TemporaryDirectory(prefix="ncn_kernels_")
    source = Path(folder.name, "shim.cpp")
    source.write_text(SHIM)
    program = source.with_name("run")
    table = ", ".join(f"kernel({name})" for name in names)
    options += ["-std=c++20", "-O1", "-g1", "-pthread", "-fno-strict-aliasing"]
    options += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-DKERNELS={table}"]
    command = ["g++", *options, f"-I{kernels._SOURCE.parent}", "-o", program, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return program, names, folder


def words_of(*numbers):
    """Words of 8 bytes as the shim reads them: first how many there are."""
    return struct.pack(f"{len(numbers) + 1}q", len(numbers), *numbers)


def cpu_threads(sanitizer="", removed_barrier=0):
    """A launcher, like kernels._Launcher, that runs each kernel in a process on CPU threads."""
    program, names, _ = shim(sanitizer)

    def launch(name, grid, block, tensors, numbers):
        tensors = [torch.empty(0) if t is None else t for t in tensors]  # a null pointer
        storages = [t.untyped_storage() for t in tensors]
        memory = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
        words = [t.data_ptr() for t in tensors]
        for number in numbers:
            words += memoryview(bytes(number)).cast("q")
        data = words_of(names.index(name), removed_barrier, *grid, *block)
        data += words_of(*words)
        data += words_of(*itertools.chain(*memory.items()))
        for address, size in memory.items():
            data += ctypes.string_at(address, size)
        done = subprocess.run([program], input=data, capture_output=True)
        assert done.returncode == 0, f"{name} {grid} {block}: {done.stderr[:3000].decode()}"
        result = io.BytesIO(done.stdout)
        for address, size in memory.items():
            ctypes.memmove(address, result.read(size), size)

    return launch


# ---- Values --------------------------------------------------------------------------------------
@pytest.fixture(params=["eager", "cpu threads", pytest.param("gpu", marks=ON_GPU)])
def backend(request, monkeypatch):
    """What computes, and where: on a GPU, all tensors that the test makes are made there."""
    device = CPU
    if request.param == "cpu threads":
        monkeypatch.setitem(kernels._launchers, CPU, cpu_threads())
    if request.param == "gpu":
        device = GPU
    with device:
        yield request.param


@pytest.fixture
def poison():
    """torch.empty is filled with NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(()).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def outputs_and_gradients(function, inputs):
    """The outputs, and the gradients of the inputs for a seeded gradient of a single output."""
    outputs = function(*inputs)
    if isinstance(outputs, tuple):
        return outputs
    rng = torch.Generator().manual_seed(0)
    given = torch.randn(outputs.shape, generator=rng, device="cpu")
    given = given.bfloat16().to(outputs)  # exact in every dtype
    return outputs.detach(), *torch.autograd.grad(outputs, inputs, given)


def compare(function, reference, *inputs):
    """A function against its reference in float64: outputs and gradients."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    exact = []
    for x in inputs:
        if x.requires_grad:
            x = x.detach().double().requires_grad_()
        exact.append(x)
    results = outputs_and_gradients(function, inputs)
    wanted = outputs_and_gradients(reference, exact)
    for got, want in zip(results, wanted, strict=True):
        assert_rounded(got, want)


def assert_rounded(got, want):
    """Equal up to one rounding to got's dtype of a result that is good to fp32."""
    limits = torch.finfo(got.dtype)
    largest = want.nan_to_num(0, 0, 0).abs().max().item()  # of terms that cancel
    atol = 4e-6 * max(1, largest) + limits.smallest_normal * limits.eps
    rtol = 0.51 * limits.eps
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol, equal_nan=True)


def actuate(z):
    return kernels.actuate(z, kernels.signals_of)


def rms_norm_in_float64(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def modulate(y, residual, signals):
    return kernels.modulate(y, residual, signals[..., :1], signals[..., 2:])


def modulate_in_float64(y, residual, signals):
    return residual + signals[..., :1] * signals[..., 2:] * y


@torch.no_grad()
def softmax_loss(logits, targets):
    """On a buffer whose rows are a multiple of 64 elements apart, if the number of rows is odd."""
    V = logits.shape[1]
    gap = len(logits) % 2 * (-V % 64)
    buffer = F.pad(logits, (0, gap), value=3.0)
    loss = kernels._softmax_loss(buffer[:, :V], targets, True)
    assert (buffer[:, V:] == 3).all()
    return loss, buffer[:, :V]


@torch.no_grad()
def softmax_loss_in_float64(logits, targets):
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    gradient = logits.softmax(1) - F.one_hot(targets.clamp(min=0), logits.shape[1])
    return loss, gradient * (targets >= 0)[:, None]


def compare_kernels(rows, d, dtype, only=""):
    """At rows x d; softmax with a vocabulary of 4 d + 1."""

    def draw(*shape):
        return (3 * torch.randn(shape)).to(dtype)

    torch.manual_seed(rows * d)
    if only in "rms_norm":
        compare(kernels.rms_norm, rms_norm_in_float64, draw(rows, d), torch.randn(d))
    if only in "actuate":
        compare(actuate, kernels.signals_of, draw(rows, 6, 3))
    if only in "modulate":
        signals = torch.randn(rows, 3)
        compare(modulate, modulate_in_float64, draw(rows, d), draw(rows, d), signals)
    if only in "softmax":
        targets = torch.randint(-1, 4 * d + 1, (rows,))
        compare(softmax_loss, softmax_loss_in_float64, draw(rows, 4 * d + 1), targets)


KERNEL_SHAPES = [  # rows, d
    (1, 1),
    (37, 7),
    (300, 31),
    (19, 256),
    (6, 257),
    (2, 515),
]


@EVERY_DTYPE
def test_kernel_values(dtype, backend, poison):
    shapes = KERNEL_SHAPES
    if backend == "gpu":
        shapes = [*shapes, (8192, 256), (333, 5000)]
    for rows, d in shapes:
        compare_kernels(rows, d, dtype)


@EVERY_DTYPE
def test_kernel_extreme_values(dtype, backend, poison):
    logits = torch.randn(8, 71)
    logits[0] = 1e4
    logits[1] = -1e4
    logits[2] = torch.linspace(-1e4, 1e4, 71)
    logits[3] = -1e4
    logits[3, 5] = 1e4
    logits[4:6] = -torch.inf
    logits[5, 70] = 3
    logits[6, 3] = torch.nan
    for target in (5, 70, -1):
        for rows in (7, 8):  # An odd number has gaps.
            targets = torch.full((rows,), target)
            compare(softmax_loss, softmax_loss_in_float64, logits[-rows:].to(dtype), targets)
    for extreme in (-1e4, 1e4, -torch.inf, torch.inf, torch.nan):
        z = torch.full((2, 3), extreme, dtype=dtype)
        compare(actuate, kernels.signals_of, z)
    for extreme in (0, 6e4, 6e-8):
        x = torch.full((2, 9), extreme, dtype=dtype)
        compare(kernels.rms_norm, rms_norm_in_float64, x, torch.ones(9))


def test_kernel_views_and_mixed_types(backend, poison):
    """Rows at odd addresses, a transposed input, a narrower branch on a float residual, no gate."""
    norms = functools.partial(compare, kernels.rms_norm, rms_norm_in_float64)
    adds = functools.partial(compare, modulate, modulate_in_float64)
    adds_ungated = functools.partial(compare, kernels.modulate, lambda y, x, gain: x + gain * y)
    x = torch.randn(3 * 4 * 32 + 1)[1:].view(3, 4, 32)
    weight = torch.randn(33)[1:]
    signals = torch.randn(3, 4, 2, 3)[:, :, 1]
    gain = signals[..., :1]
    turned = x.transpose(0, 1)
    norms(x, weight)
    norms(turned, weight)
    norms(x.mT[..., :4], weight[:4])
    norms(x.half()[..., 1:], weight[1:])
    adds(x.bfloat16(), x, signals)
    adds(turned, turned.half(), signals.transpose(0, 1))
    adds_ungated(x.half(), x, gain)


CACHE_WRITES = [  # number of tokens, position, how many of them a cache of 11 slots holds
    (1, 10, 1),
    (4, 7, 4),
    (11, 0, 11),
    (4, 9, 2),
]


@EVERY_DTYPE
@pytest.mark.parametrize("T, at, fits", CACHE_WRITES)
def test_kernel_cache(T, at, fits, dtype, backend):
    """Against slices, over all of the memory behind the cache: nothing else is written, also where
    the new tokens pass the end. The memory's dimensions come in three orders."""
    new = torch.randn(2, 2, T, 3, 20).to(dtype).transpose(2, 3)
    for swap in ((0, 0), (2, 3), (3, 4)):
        memory = torch.zeros(2, 2, 5, 15, 20, dtype=dtype)
        want = memory.clone()
        window = want[:, :, 1:4, 2:13]
        window[:, :, :, at : at + T] = new[:, :, :, :fits]
        memory = memory.transpose(*swap).contiguous().transpose(*swap)
        caches = memory[:, :, 1:4, 2:13]
        if fits < T and backend == "eager":
            with pytest.raises(IndexError):
                kernels.write_cache(*caches, *new, torch.tensor(at))
        else:
            kernels.write_cache(*caches, *new, torch.tensor([at]))
            assert torch.equal(memory, want)


# ---- Races and bounds ----------------------------------------------------------------------------
WATCHED = [
    (3, 7, ""),
    (9, 40, ""),
    (3, 70, "softmax"),
    (6, 257, "rms"),
    (2, 257, "modulate"),
]
WIDE = [  # wider than registers
    (6, 4100, "rms"),
    (3, 5001, "modulate"),
    (3, 1100, "softmax"),
]


def four_blocks(x, work, threads, per_processor=4):
    """So few that a block has several rows, one after the other."""
    return min(4, -(-work // threads))


@pytest.mark.parametrize("sanitizer", ["thread", "address", ""])
def test_kernel_races_bounds_and_wide_rows(sanitizer, monkeypatch, poison):
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads(sanitizer))
    monkeypatch.setattr(kernels, "_blocks", four_blocks)
    for rows, d, only in WATCHED if sanitizer else WIDE:
        compare_kernels(rows, d, torch.bfloat16, only)


SOURCE_LINES = enumerate(kernels._SOURCE.read_text().split("\n"), 1)


@pytest.mark.parametrize("barrier", [n for n, line in SOURCE_LINES if "__syncthreads();" in line])
def test_kernel_every_barrier_matters(barrier, monkeypatch):
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads("thread", barrier))
    monkeypatch.setattr(kernels, "_blocks", four_blocks)
    with pytest.raises(AssertionError, match="data race"):
        compare_kernels(19, 40, torch.bfloat16, "rms")
        compare_kernels(6, 257, torch.bfloat16, "rms")


# ---- Compiling and launching ---------------------------------------------------------------------
@pytest.mark.parametrize("major", ["12", "13"])
def test_kernel_nvrtc(major):
    """The compiler that is used at run time, with no include path. It needs no GPU."""
    try:
        nvrtc = kernels._nvrtc(major)
    except OSError as error:
        pytest.skip(f"no NVRTC {major}: {error}")
    symbols, cubin = kernels._compile(nvrtc, kernels._INSTANCES, "90")
    for name in kernels._INSTANCES:
        assert symbols[name].encode() in cubin


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ["75", "90"])
def test_kernel_nvcc(arch, tmp_path):
    """Every instance compiles for old and new cards, without a warning."""
    instances = ", ".join(f"(void*){name}" for name in kernels._INSTANCES)
    source = tmp_path / "all.cu"
    source.write_text(f"{kernels._SOURCE.read_text()}void* table[] = {{{instances}}};\n")
    command = ["nvcc", "-cubin", "-std=c++17", f"-arch=sm_{arch}", source, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()


class FakeDriver:
    """Stands in for libcuda: notes every call; a launch is read as the GPU would read it."""

    def __init__(self):
        self.calls = []
        self.functions = []
        self.fail = None

    def __getattr__(self, name):
        return functools.partial(self.call, name)

    def call(self, name, *args):
        self.calls.append(name)
        if name == "cuModuleGetFunction":
            self.functions.append(args[2].decode())
            args[0]._obj.value = len(self.functions)
        if name == "cuLaunchKernel":
            name = self.functions[args[0].value - 1]
            self.launch = (name, *args[1:8], args[8].value)
            pointers = [ctypes.cast(p, ctypes.POINTER(ctypes.c_int64)) for p in args[9]]
            self.words = [pointer[0] for pointer in pointers] + pointers[-1][1:4]
        return int(self.calls[-1] == self.fail)


@pytest.fixture
def fake_driver(monkeypatch):
    driver = FakeDriver()
    symbols = {name: name for name in kernels._INSTANCES}
    stream = SimpleNamespace(cuda_stream=0x1234567890)
    monkeypatch.setattr(kernels, "_reasons", {})
    monkeypatch.setattr(kernels, "_cubin", lambda arch: (symbols, arch))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    return driver


def test_kernel_launch(fake_driver):
    launch = kernels._try_gpu(GPU)
    x = torch.zeros(3)
    large = ctypes.c_int64(1 << 40)
    strides = (ctypes.c_int64 * 4)(1, 1 << 33, 3, 4)
    numbers = (large, ctypes.c_double(1.0), strides)
    arguments = ("softmax_loss<float>", (5, 2), (64, 4), (x, None), numbers)
    fake_driver.calls.clear()
    launch(*arguments)
    assert fake_driver.calls == ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert fake_driver.launch == ("softmax_loss<float>", 5, 2, 1, 64, 4, 1, 0, 0x1234567890)
    assert fake_driver.words == [x.data_ptr(), 0, 1 << 40, 1023 << 52, *strides]
    fake_driver.fail = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        launch(*arguments)
    assert fake_driver.calls[-1] == "cuCtxPopCurrent_v2"  # The stack of contexts is as it was.


def test_kernel_eager_where_it_must(monkeypatch):
    """Odd types and shapes, empty tensors, torch.compile: the eager definition runs."""
    x = torch.ones(2, 3)
    gain = torch.ones(2, 1)
    targets = torch.ones(2, dtype=torch.int64)
    caches = torch.zeros(2, 1, 2, 4, 3)
    new = torch.ones(2, 1, 2, 2, 3)
    at = torch.tensor(1)
    fitting = [
        lambda: kernels.rms_norm(x, x[0]),
        lambda: actuate(x),
        lambda: kernels.modulate(x, x, gain),
        lambda: kernels.write_cache(*caches, *new, at),
        lambda: kernels._softmax_loss(x.clone(), targets, True),
    ]
    monkeypatch.setitem(kernels._launchers, CPU, lambda *arguments: 1 / 0)
    for call in fitting:
        with pytest.raises(ZeroDivisionError):
            call()
    actuate(x[:0])
    actuate(x.double())
    kernels.modulate(x, x, gain.half())
    kernels.modulate(x, x, gain[:1])
    kernels.write_cache(*caches, *new.half(), at)
    with pytest.raises(RuntimeError):
        kernels.rms_norm(x, x[0, :1])  # The kernel would read beyond the weight's end,
    with pytest.raises(RuntimeError):
        kernels.write_cache(*caches[:, :, :1], *new, at)  # and write beyond the cache's.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for call in fitting:
        call()


# ---- Head and loss -------------------------------------------------------------------------------
@EVERY_DTYPE
def test_linear_cross_entropy(dtype, backend, monkeypatch, poison):
    """Over thirty chunks, in fp32 or under autocast (summed and scaled in fp32: less is lost than
    in half precision, and nothing underflows), some targets ignored, or all; without gradients."""
    torch.manual_seed(0)
    N, V = 300, 20001
    if backend == "cpu threads":
        N, V = 30, 300
    monkeypatch.setattr(kernels, "LOGIT_BYTES", N // 30 * V * dtype.itemsize)
    inputs = [torch.randn(n, 8, requires_grad=True) for n in (N, V)]
    exact = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    targets = torch.randint(-1, 60, (N,))
    want = F.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=-1)
    with torch.autocast(want.device.type, dtype, enabled=dtype in HALF):
        loss = kernels.linear_cross_entropy(*inputs, targets)
        nothing = kernels.linear_cross_entropy(*inputs, torch.full_like(targets, -1))
        with torch.no_grad():
            assert kernels.linear_cross_entropy(*inputs, targets.int()) == loss
    gradients = torch.autograd.grad(1e-4 * loss, inputs, retain_graph=True)
    bound = max(1e-5, 0.72 * torch.finfo(dtype).eps)
    assert (loss - want).abs() < bound * want
    for a, b in zip(gradients, torch.autograd.grad(1e-4 * want, exact), strict=True):
        assert (a - b).norm() <= bound * b.norm()
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss.backward()
    nothing.backward()
    assert nothing.item() == 0
    assert not inputs[1].grad.any()


def test_linear_cross_entropy_takes_larger_chunks_on_a_large_gpu(monkeypatch):
    gpu = SimpleNamespace(total_memory=128 << 30)
    monkeypatch.setattr(kernels, "_properties", lambda device: gpu)
    h = mock.MagicMock(is_cuda=True, itemsize=2)
    h.__len__.return_value = 100_000
    rows = kernels._rows_per_chunk(h, torch.empty(50304, 1))
    assert rows == (1 << 30) // (50304 * 2) // 128 * 128


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_linear_cross_entropy_in_whole_tiles(dtype, monkeypatch, poison):
    """The GPU's way, here on a CPU: columns in multiples of 64, chunks of 128, a gradient that the
    product itself adds up in float32. The padding changes no number."""
    inputs = [torch.randn(n, 24).to(dtype).requires_grad_() for n in (300, 301)]
    targets = torch.randint(301, (300,))
    shapes = []

    def addmm(dw, p, x, out_dtype, out):  # a CPU's has no out_dtype
        shapes.append(tuple(p.shape))
        return out.add_(p.to(out_dtype) @ x.to(out_dtype))

    def loss_and_gradients():
        loss = kernels.linear_cross_entropy(*inputs, targets)
        return [loss, *torch.autograd.grad(loss, inputs)]

    plain = loss_and_gradients()
    monkeypatch.setattr(kernels, "LOGIT_BYTES", 200 * 320 * dtype.itemsize)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(kernels, "_has_tensor_cores", lambda x: True)
    tiled = loss_and_gradients()
    assert shapes == [(320, 128), (320, 128), (320, 44)]
    torch.testing.assert_close(tiled, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_linear_cross_entropy_never_holds_all_logits():
    h = torch.randn(1 << 12, 4, requires_grad=True)
    weight = torch.randn(1 << 15, 4)
    before = kernels.peak_memory(CPU, reset=True)
    if before == 0:
        pytest.skip("only Linux tells")
    kernels.linear_cross_entropy(h, weight, torch.zeros(1 << 12))
    grown = kernels.peak_memory(CPU) - before
    assert 0.9 * kernels.LOGIT_BYTES < grown < 3 * kernels.LOGIT_BYTES  # All are 8 times as many.


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=ON_GPU)], ids=str)
def test_kernel_model(device, monkeypatch):
    """Loss and every gradient of a small model, with the fused kernels and without."""
    torch.manual_seed(0)
    config = ncn.NCNConfig(61, 16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, ncn_hidden=8)
    model = ncn.ModulatedLM(config).to(device)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    ids = torch.randint(61, (2, 13), device=device)

    def loss_and_gradients():
        loss = model(ids[:, :-1], ids[:, 1:]).total
        return loss, *torch.autograd.grad(loss, model.parameters())

    if device == CPU:
        monkeypatch.setitem(kernels._launchers, CPU, cpu_threads())
    fused = loss_and_gradients()
    monkeypatch.setitem(kernels._launchers, device, None)
    eager = loss_and_gradients()
    assert not all(map(torch.equal, fused, eager))  # The kernels did run.
    torch.testing.assert_close(fused, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.cuda
@NO_GPU
def test_kernel_graph_replays_at_new_positions():
    """A captured write goes where the position on the device says at replay."""
    caches = torch.zeros(2, 1, 2, 9, 16, device=GPU)
    new = torch.ones(2, 1, 2, 1, 16, device=GPU)
    position = torch.zeros(1, dtype=torch.int64, device=GPU)
    kernels.write_cache(*caches, *new, position)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.write_cache(*caches, *new, position)
    for at in (4, 8, 2):
        position.fill_(at)
        new.fill_(at)
        graph.replay()
    values = caches[1, 0, 1, :, 0]
    assert values.tolist() == [1, 0, 2, 0, 4, 0, 0, 0, 8]


# ==== ncn.py and sample.py ========================================================================
# ==== ncn.py ======================================================================================
TINY = {
    "vocab_size": 61,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "dropout": 0.0,
    "ncn_hidden": 8,
    "ncn_heads": 2,
}
EVERY_MODE = pytest.mark.parametrize("salience", SALIENCE)


def new_model(seed, **config):
    """A new tiny model. What is drawn at random after it depends on the seed, too."""
    torch.manual_seed(seed)
    return ModulatedLM(NCNConfig(**TINY | config)).eval()


def lively(**config):
    """A tiny model whose every weight, the controller's too, is far from where it starts."""
    model = new_model(0, **config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape):
    return torch.randint(61, shape)


def assert_near(got, want, bound=1e-4):
    """The largest difference is small beside the largest value."""
    assert got.shape == want.shape
    difference = (got - want).abs().max()
    largest = want.abs().max().clamp(min=0.01)
    assert difference <= bound * largest


# ---- The paper's equations -----------------------------------------------------------------------
@pytest.mark.parametrize("salience", ["global", "reactive"])
def test_golden_outputs_of_the_authors(salience):
    path = HERE.parent / "shared" / "golden" / "reference_tiny.npz"
    if not path.exists():
        pytest.skip("the authors' outputs are not here")
    golden = {}
    state = {}
    for name, array in np.load(path).items():
        golden[name] = torch.from_numpy(array)
        if name.startswith("state/"):
            state[name.removeprefix("state/")] = golden[name]
    model = ModulatedLM.from_reference(state, n_head=4, ncn_heads=2, salience=salience)
    ids = golden["input_ids"]
    assert_near(model(ids), golden[salience + "/logits"])
    assert_near(model.signals(ids), golden[salience + "/signals"])
    if salience == "global":
        assert_near(model(ids, ids).homeostatic, golden["global/reg_loss"])


def paper_norm(x, norm):
    mean_square = x.square().mean(-1, keepdim=True)
    return x / (mean_square + 1e-5).sqrt() * norm.weight


def paper_attention(q, k, v, n_head, mask):
    """Multi-head attention before its last projection. q, k, v (B, T, d), mask (T, T)."""
    q, k, v = (ncn.heads(x, n_head) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.transpose(1, 2).flatten(2)


def paper_signals(model, x, control, past):
    """The controller, Eq. 1 to 7, 13 and 14: x (B, T, d) -> (B, T, L, 3)."""
    c = model.controller
    mode = model.config.salience
    mask = past
    if mode == "global":
        mask = past | True
    if mode == "reactive":
        mask = torch.eye(len(past)).bool()
    if mode == "constant":
        u = torch.zeros_like(x)
    elif mode == "token":
        u = x
    else:
        query = c.in_proj(c.query).chunk(3, -1)[0].expand_as(x)
        _, key, value = c.in_proj(x).chunk(3, -1)
        u = c.out_proj(paper_attention(query, key, value, c.ncn_heads, mask)) + x
    u = paper_norm(u + c.control(control), c.norm)
    z = c.layer2(c.layer1(u).tanh())
    gain, precision, gate = z.unflatten(-1, (-1, 3)).unbind(-1)
    precision = F.softplus(precision) + 0.01
    signals = [2 * gain.sigmoid(), precision.clamp(max=4), gate.sigmoid()]
    for i, name in enumerate(SIGNALS):
        if name not in model.config.signals:
            signals[i] = torch.ones_like(gain)
    return torch.stack(signals, -1)


def paper_model(model, ids, control):
    """A float64 model's logits (B, T, V) and signals (B, T, L, 3), with full masks."""
    T = ids.size(1)
    past = torch.ones(T, T).tril().bool()
    x = model.embed.weight[ids] + model.position.weight[:T]
    signals = x.new_ones(*ids.shape, len(model.blocks), 3)
    if model.controller:
        signals = paper_signals(model, x, control.double(), past)
    for block, s in zip(model.blocks, signals.unbind(2), strict=True):
        gain, precision, gate = s.split(1, -1)
        q, k, v = block.qkv(paper_norm(x, block.attn_norm)).chunk(3, -1)
        y = paper_attention(q * precision, k, v, block.n_head, past)
        x = x + gain * block.attn_out(y)
        hidden = F.gelu(block.ffn_in(paper_norm(x, block.ffn_norm)))
        x = x + gain * gate * block.ffn_out(hidden)
    x = paper_norm(x, model.norm)
    return x @ model.embed.weight.T, signals


@EVERY_MODE
@pytest.mark.parametrize("signals", [
    SIGNALS,
    ("gain",),
    ("precision", "gate"),
    (),
])
@pytest.mark.parametrize("sharpness", [1, 300])  # of the salience: scores of some 2 or 600
def test_the_model_is_the_papers(salience, signals, sharpness):
    n_control = len(signals)
    model = lively(salience=salience, signals=signals, n_ffn=40, n_control=n_control)
    assert len(model.blocks[0].ffn_in.weight) == 40
    control = None
    if signals:
        if model.controller.pools:
            model.controller.query.data *= sharpness
        model.controller.layer2.bias.data[1] = 5  # a precision at its limit
        control = torch.randn(3, 16, n_control)
    exact = copy.deepcopy(model).double()
    ids = tokens(3, 16)
    targets = tokens(3, 16)
    logits, s = paper_model(exact, ids, control)
    deviation = (s - 1).square().mean((0, 1, 2))
    price = 0.01 * deviation.sum()
    total = F.cross_entropy(logits.mT, targets) + price
    total.backward()
    loss = model(ids, targets, control=control)
    loss.total.backward()
    assert_near(model(ids, control=control), logits)
    assert_near(model.signals(ids, control=control), s)
    assert_near(loss.total, total)
    assert_near(loss.homeostatic, price)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.grad is not None:
            assert_near(ours.grad, theirs.grad, 1e-3)


def test_sizes_and_neutral_start():
    model = ModulatedLM(NCNConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == 18_007_762
    assert sum(p.numel() for p in model.controller.parameters()) == 281_298
    ids = tokens(2, 64)
    neutral = torch.tensor([1, 1, 0.952574])
    assert_near(model.signals(ids), neutral.expand(2, 64, 6, 3), 0.02)
    assert 2e-5 < model(ids, ids).homeostatic < 3e-5


@pytest.mark.parametrize("config", [
    {"signals": ()},
    {"salience": "constant", "n_control": 2},
    {"signals": (), "n_ffn": 150},
])
def test_variants_of_a_seed_share_the_base_weights(config):
    base = new_model(1)
    variant = new_model(1, **config)
    weights = variant.state_dict()
    for name, p in base.state_dict().items():
        if not name.startswith("controller"):  # a wider FFN begins with the same units
            assert torch.equal(p, weights[name][tuple(map(slice, p.shape))])
    assert not torch.equal(new_model(2).embed.weight, base.embed.weight)


@EVERY_MODE
def test_padding_counts_for_nothing(salience):
    """Rows of different lengths together, or each alone, weighted by its targets."""
    model = lively(salience=salience, block_size=32)
    ids = tokens(3, 32)
    targets = tokens(3, 32)
    padded = targets.clone()
    alone = 0
    for row, n in enumerate((8, 32, 17)):
        piece = slice(row, row + 1), slice(n)
        loss = model(ids[piece], targets[piece])
        alone += torch.stack(loss) * n / (8 + 32 + 17)
        padded[row, n:] = -1
    together = model(ids, padded)
    assert_near(torch.stack(together), alone, 1e-5)
    assert model(ids, torch.full_like(ids, -1)).total == 0


@EVERY_MODE
def test_only_global_salience_sees_the_future(salience):
    model = lively(salience=salience)
    ids = tokens(2, 16)
    other = ids.clone()
    other[:, 9:] = (ids[:, 9:] + 7) % 61
    moved = (model(other) - model(ids)).abs().amax((0, 2))
    if salience == "global":
        assert moved[:9].min() > 0.001
    else:
        assert moved[:9].max() < 1e-5


# ---- Memory --------------------------------------------------------------------------------------
@EVERY_MODE
@pytest.mark.parametrize("pieces", [
    [1] * 16,
    [4, 1, 6, 5],
    [16],
])
@pytest.mark.parametrize("sharpness", [1, 300])
def test_reading_with_a_memory_is_the_full_pass(salience, pieces, sharpness):
    model = lively(salience=salience, n_control=2)
    if model.controller.pools:
        model.controller.query.data *= sharpness
    mode = salience.replace("global", "causal")  # the tokens read so far are all there is
    ids = tokens(3, 16)
    control = torch.randn(3, 16, 2)

    def edit(signals):
        return 1.5 * signals

    logits = model(ids, edit=edit, control=control, salience=mode)
    signals = edit(model.signals(ids, mode, control))
    memory = Memory(model, 3)
    start = 0
    for T in pieces:
        end = start + T
        now = control[:, start:end]
        last = model(ids[:, start:end], memory=memory, edit=edit, control=now)
        assert_near(last, logits[:, end - 1])
        assert_near(memory.signals, signals[:, start:end])
        start = end
    sizes = [tensor.numel() for tensor in memory.salience]
    assert sizes == [3 * 2, 3 * 32]  # however much was read
    with pytest.raises(ValueError, match="tokens do not fit into block_size 16"):
        model(ids[:, :1], memory=memory)


def test_a_control_can_be_fed_back():
    """The entropy of the last prediction, in the caller's own loop, as in section 3.2."""
    model = lively(n_control=1)
    ids = tokens(2, 16)
    memory = Memory(model, 2)
    control = torch.zeros(2, 1)
    given = []
    for t in range(16):
        given.append(control)
        logits = model(ids[:, t : t + 1], memory=memory, control=control)
        control = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)
    full = model(ids, control=torch.stack(given, 1))
    assert_near(logits, full[:, -1])


def test_a_control_is_zeros_by_default_and_has_a_shape():
    model = lively(n_control=3)
    ids = tokens(2, 9)
    control = torch.randn(2, 3)
    assert_near(model(ids, control=0 * control), model(ids), 1e-6)
    for shape in ((2, 2), (2, 8, 3)):
        with pytest.raises(ValueError, match="must be"):
            model(ids, control=torch.zeros(shape))
    with pytest.raises(ValueError, match="takes no control"):
        lively().signals(ids, control=control)


# ---- Training ------------------------------------------------------------------------------------
def test_gradient_shielding_is_exact():
    """Eq. 17: at half the gain, a branch's weights get half of the gradient, bit for bit."""
    block = lively().blocks[1]
    x = torch.randn(2, 8, 32)
    arriving = torch.randn(2, 8, 32)
    signal = torch.rand(2, 8, 1)
    branches = {block.attention: block.qkv.weight, block.ffn: block.ffn_in.weight}
    for branch, weight in branches.items():
        gradients = []
        for gain in (signal, signal / 2):
            out = block.add(x, branch(x), gain, signal)
            gradients += torch.autograd.grad(out, weight, arriving)
        assert torch.equal(gradients[0] / 2, gradients[1])


def test_checkpointed_blocks_compute_the_same():
    """Bit for bit, dropout included; each block computes a second time."""
    results = []
    passes = []
    for checkpointed in (False, True):
        model = lively(dropout=0.3).train()
        model.checkpoint_blocks = checkpointed
        model.blocks[1].qkv.register_forward_hook(lambda *_: passes.append(1))
        loss = model(tokens(3, 16), tokens(3, 16)).total
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))
    assert len(passes) == 1 + 2


@EVERY_MODE
def test_mixed_precision_is_close(salience):
    model = lively(salience=salience)
    ids = tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids).total
        signals = model.signals(ids)
    assert_near(loss, model(ids, ids).total, 0.05)
    assert_near(signals, model.signals(ids), 0.05)


def test_every_tensor_is_on_the_models_device():
    """One without a device would be on the meta device, which computes no values."""
    model = lively()
    static = lively(signals=())
    ids = tokens(2, 5)
    expected = model(ids)
    with torch.device("meta"):
        logits = model(ids)
        last = model(ids, memory=Memory(model, 2))
        results = [*model(ids, ids), model.signals(ids), static.signals(ids)]
    assert not any(tensor.is_meta for tensor in results)
    assert_near(logits, expected)
    assert_near(last, expected[:, -1])
    assert generate(model.to("meta"), ids.to("meta"), 30, top_p=0.9).is_meta


# ---- Files ---------------------------------------------------------------------------------------
AUTHORS_NAMES = """\
embed.               token_embeddings.
position.            position_embeddings.
attn_norm.           norm1.
ffn_norm.            norm2.
controller.in_proj.  ncn.pooling_attn.in_proj_
controller.out_proj. ncn.pooling_attn.out_proj.
controller.norm.     ncn.ncn_norm.
controller.query     ncn.control_query
controller.layer     ncn.layer
blocks.              transformer_layers.
attn_out.            self_attn.out_proj.
ffn_in.              feed_forward.linear1.
ffn_out.             feed_forward.linear2."""


def as_the_authors_name_it(model):
    theirs = {}
    for name, tensor in model.state_dict().items():
        for line in AUTHORS_NAMES.splitlines():
            name = name.replace(*line.split())
        theirs[name] = tensor
        if "qkv" in name:
            for x, part in zip("qkv", theirs.pop(name).chunk(3), strict=True):
                theirs[name.replace("qkv", f"self_attn.{x}_proj")] = part
    theirs["ncn.control_query"] = theirs["ncn.control_query"][None]
    theirs["final_norm.weight"] = theirs.pop("norm.weight")
    theirs["output_head.weight"] = theirs["token_embeddings.weight"]
    return theirs


def test_checkpoints_of_both_kinds_load(tmp_path):
    model = lively(salience="global", dropout=0.1)
    theirs = {"model_state_dict": as_the_authors_name_it(model)}
    torch.save(theirs | {"config": {"nhead": 2, "ncn_heads": 2}}, tmp_path / "theirs.pt")
    model.save(tmp_path / "ours.pt")
    ids = tokens(2, 9)
    for name in ("ours.pt", "theirs.pt"):
        loaded = ModulatedLM.load(tmp_path / name)
        assert loaded.config == model.config
        assert torch.equal(loaded(ids), model(ids))  # in eval mode


@pytest.mark.skipif(sys.platform != "linux", reason="no device that is always full")
def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """A full disk, and a crash before the new file has its name."""
    path = tmp_path / "model.pt"
    model = lively()
    model.save(path)
    before = path.read_bytes()
    os.symlink("/dev/full", f"{path}.{os.getpid()}.part")
    with pytest.raises(OSError, match="cannot write"):
        model.save(path)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name, value", [
    ("n_head", 3),
    ("n_layer", 0),
    ("block_size", 1),
    ("salience", "psychic"),
    ("signals", ["dopamine"]),
    ("signals", []),
])
def test_config_refuses(name, value):
    """Named in the message. A model without signals cannot read its controls."""
    setting = {"n_control": 2, name: value}
    with pytest.raises(ValueError, match=name.rstrip("s")):
        NCNConfig(**TINY | setting)


def test_the_demonstration_shows_what_it_claims(capsys, monkeypatch):
    """Here with fewer steps, after which the static model cannot look up yet."""
    monkeypatch.setattr(ncn, "learn", functools.partial(ncn.learn, steps=300))
    ncn.main()
    out = capsys.readouterr().out
    assert re.search(r"controller +281,298", out)
    leaks = {mode: float(leak) for mode, leak in re.findall(r"(\w+) +(\d\.\d{6})\n", out)}
    assert {mode for mode in leaks if leaks[mode] > 1e-4} == {"global"}
    whole, half = re.findall(r"norm (\d\S+)", out)
    assert float(whole) / float(half) == pytest.approx(2, abs=1e-4)
    any_value = re.findall(r"(\d\.\d+) \(\d\.\d\d\)\n", out)
    static, precision, all_signals = map(float, any_value)
    assert static > 0.4
    assert max(precision, all_signals) < 0.3


# ==== sample.py ===================================================================================
@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, 0, 1),
    (1.3, 0, 0.6),
    (0.8, 7, 0.9),
    (1, 99, 1e-9),
])
def test_draw_follows_the_stated_distribution(temperature, top_k, top_p):
    """With evenly spread uniform numbers, each token comes as often as its probability says."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(40)
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    p = (logits.double() / temperature).softmax(-1)
    p, order = p.sort(descending=True)
    if top_k:
        p[top_k:] = 0
        p /= p.sum()
    before = p.cumsum(0) - p
    p[before >= top_p] = 0
    p /= p.sum()
    drawn = sample.draw(logits.expand(n, -1), uniform, temperature, top_k, top_p)
    shares = drawn.bincount(minlength=40) / n
    assert (shares[order] - p).abs().max() < 2e-4


def test_draw_at_the_edges():
    highest = torch.ones(1)  # where a rounded sum may lead
    tied = torch.tensor([[1.0, 3.0, 3.0, -1e30]])
    for temperature in (0, 1e-40):
        assert sample.draw(tied, highest, temperature) in (1, 2)
    assert sample.draw(tied, highest) == 0  # not the one without probability


@pytest.mark.parametrize("config, salience", [
    ({}, "causal"),
    ({}, "global"),
    ({"n_control": 2}, "reactive"),
    ({"n_control": 2}, "constant"),
    ({"signals": ()}, "causal"),
])
@pytest.mark.parametrize("block_size, prompt", [
    (16, 1),
    (16, 40),
    (2, 1),
])
def test_greedy_text_is_that_of_full_passes(config, salience, block_size, prompt):
    """Over refills: when the memory is full, the last half of the text is kept and read again."""
    model = lively(block_size=block_size, **config)
    control = torch.randn(3, 2) if "n_control" in config else None
    text = generate(model, tokens(3, prompt), 40, 0, salience=salience, control=control)
    assert len(text[:, prompt:].unique()) > 1  # not stuck where any memory would look right
    mode = salience.replace("global", "causal")
    start = 0
    for known in range(prompt, prompt + 40):
        if known - start > block_size:
            start = known - block_size // 2
        logits = model(text[:, start:known], salience=mode, control=control)
        assert torch.equal(logits[:, -1].argmax(-1), text[:, known])


def test_a_branch_drops_in_training_alone():
    block = lively(dropout=0.5).blocks[0]
    ones = torch.ones(50, 9, block.ffn_norm.weight.numel())
    added = block.train().add(torch.zeros_like(ones), ones)
    assert set(added.unique().tolist()) == {0, 2}  # half of them, twice as large
    assert torch.equal(block.eval().add(torch.zeros_like(ones), ones), ones)


@pytest.mark.parametrize("packs", [True, False])
def test_generation_computes_the_same_and_changes_no_model(monkeypatch, packs):
    monkeypatch.setattr(sample, "is_amd", lambda: packs)
    model = lively(vocab_size=999, n_embd=6, n_ffn=7, ncn_hidden=5).train()
    before = copy.deepcopy(model.state_dict())
    ids = tokens(2, 9)
    fast = sample.for_generation(model)
    assert isinstance(fast.blocks[0].qkv, sample.PackedLinear) == packs
    assert_near(fast(ids), model(ids), 1e-5)
    generate(model, ids, 9)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


def test_rows_are_independent():
    """A seed is a text, whatever the batch and the length; and rows end on their own."""
    model = lively()
    prompt = tokens(1, 4)
    six = prompt.expand(6, -1)
    together = generate(model, six, 40, 3.0, seed=5)
    assert len(together.unique(dim=0)) == 6
    for row, text in enumerate(together):
        alone = generate(model, prompt, 40 - row, 3.0, seed=5 + row)
        assert torch.equal(alone[0], text[: alone.size(1)])
    end = together[2, 14]
    ended = generate(model, six, 40, 3.0, seed=5, end_token=end)
    new = together[:, 4 : ended.size(1)]
    has_ended = (new == end).cumsum(1) > 0
    assert torch.equal(ended[:, 4:], torch.where(has_ended, end, new))
    assert ended.size(1) == 44  # some rows have not ended
    assert generate(model, prompt, 40, 3.0, seed=7, end_token=end).size(1) <= 15


def test_a_gpu_makes_the_next_token_before_one_is_read(monkeypatch):
    order = []

    def drawn():
        for i in range(3):
            order.append(f"drawn {i}")
            yield torch.tensor([i])

    monkeypatch.setattr(torch.cuda, "Event", mock.Mock())
    for tokens_read in sample.read_late(drawn()):
        order.append(tokens_read.item())
    assert order == ["drawn 0", "drawn 1", 0, "drawn 2", 1, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_captured_stream_is_the_uncaptured_one(temperature, monkeypatch):
    """Over refills of the memory."""
    model = lively().cuda()
    prompt = tokens(2, 5).cuda()
    captured = generate(model, prompt, 60, temperature, seed=3)
    monkeypatch.setattr(sample, "captured", lambda step, *_: step)
    uncaptured = generate(model, prompt, 60, temperature, seed=3)
    assert torch.equal(captured, uncaptured)


# ---- The command line ----------------------------------------------------------------------------
BYTES = {"tokenizer": "bytes", "vocab_size": 257, "controls": ["hug", "long"]}


TRAINED = """\
prepare.py demo --max_mb 0.3
train.py --out trained --max_steps 25 --lr 2e-2 --warmup_steps 3 --n_layer 1 --n_embd 16 \
--n_head 2 --ncn_hidden 4 --rows contiguous --block_size 32 --val_sequences 8 --dtype fp32"""


@pytest.fixture
def printable(tmp_path, monkeypatch):
    """In this folder, a model that writes one printable byte after another; and a terminal."""
    model = lively(vocab_size=257, n_control=2, block_size=64)
    model.embed.weight.data[:32] = 0
    model.embed.weight.data[127:] = 0
    monkeypatch.chdir(tmp_path)
    os.mkdir("out")
    model.save("out/ckpt_best.pt", data=BYTES)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return model


@pytest.fixture
def say(printable, monkeypatch, capsys):
    """sample.py in this process, with these flags -> status, standard output, standard error."""
    def run(*flags):
        command = ["sample.py", "--prompt", "Once upon", "--max_new_tokens", "20", "--seed", "3"]
        monkeypatch.setattr(sys, "argv", command + [str(flag) for flag in flags])
        status = sample.main()
        return status, *capsys.readouterr()

    return run


def test_a_trained_model_writes_text(say):
    for line in TRAINED.splitlines():
        name, *flags = line.split()
        subprocess.run([sys.executable, HERE / name, *flags], check=True, capture_output=True)
    flags = ["--ckpt", "trained/ckpt_best.pt", "--max_new_tokens", 200]
    status, text, speed = say(*flags)
    assert status == 0
    assert re.fullmatch(r"\d+ tokens in .+ s: \d+ tokens/s, after .+ 4 \d+ tokens/s\n", speed)
    model, tokenizer, _ = sample.load_model("trained/ckpt_best.pt", "cpu")
    prompt = torch.tensor([prepare.prompt_tokens(tokenizer, "Once upon")])
    ids = generate(model, prompt, 200, seed=3, end_token=tokenizer.eot_token)
    story = tokenizer.decode(ids[0, 1:].tolist()).split(prepare.END)[0]
    assert text == story + "\n"
    assert say(*flags, "--prompt", "Once upon ")[1] == text
    assert say(*flags, "--trace", "gain")[1] == text  # no terminal, no colours
    three = say(*flags, "--num_samples", 3)[1].split("\n---\n")
    assert three[0] == story
    assert len(three) == 3


def test_sample_shows_whole_characters_up_to_the_end():
    row = sample.Row(prepare.tokenizer_of(BYTES), [256])
    texts = []
    for token in [*"né".encode(), 0xFF, 256, 65]:
        row.add(token)
        row.show()
        texts.append(row.text)
    assert texts == ["n", "n", "né", "né�", "né�", "né�"]


def test_a_trace_shows_all_of_a_long_prompt():
    """Of which a memory has read only the end, and which alone has a colour."""
    row = sample.Row(prepare.tokenizer_of(BYTES), [256, *b"abc"])
    row.show([0.5])
    assert row.text == "ab" + sample.paint("c", 0.5)


def test_doses_controls_and_traces_in_a_terminal(printable, capfd):
    """A token has the colour of the signal it was read with, dosed; the last one was not read."""
    pty = pytest.importorskip("pty")
    flags = """--prompt Hi --temperature 0 --max_new_tokens 20 --trace precision --layer 1
        --gain 0.9 --precision 0.5 --gate 0.8 --control=-9,4"""
    pty.spawn([sys.executable, str(HERE / "sample.py"), *flags.split()])
    out = capfd.readouterr().out
    assert "precision: half of neutral \x1b[48;5;17;" in out
    prompt = torch.tensor([[256, *b"Hi"]])
    control = torch.tensor([[-9.0, 4.0]])

    def dose(signals):
        return signals * torch.tensor([0.9, 0.5, 0.8])

    ids = generate(printable, prompt, 20, 0, edit=dose, control=control)
    signals = dose(printable.signals(ids, control=control))
    levels = 0.5 + 0.5 * signals[0, :, 1, 1].log2()
    levels = levels.clamp(0, 1).tolist()
    text = bytes(ids[0, 1:].tolist()).decode()
    painted = ""
    for character, level in zip(text[:-1], levels[1:-1], strict=True):
        painted += sample.paint(character, level)
    assert painted + text[-1] in out


REFUSED = """--temperature -1: temperature is -1
--temperature nan: temperature is nan
--top_p 0: top_p is 0
--top_k -1: top_k (-1)
--max_new_tokens -1: max_new_tokens (-1)
--num_samples 0: --num_samples is 0
--gain -1: 0 or more
--gate nan: 0 or more
--layer 2: the model has layers 0 to 1
--control 1,0,2: --control has 3 numbers, out/ckpt_best.pt takes 2: hug, long
--control x: invalid
--dose 1: unrecognized
--ckpt none.pt: no checkpoint none.pt
--ckpt cut.pt: it is damaged
--ckpt text.pt: it is damaged
--ckpt list.pt: holds no NCN model
--ckpt foreign.pt: holds no NCN model
--ckpt no_data.pt: holds no tokenizer
--ckpt static.pt --gain 2: it has no controller
--ckpt static.pt --trace gain: it has no controller"""


def test_sample_refuses(say):
    """In one line, with status 2."""
    content = Path("out/ckpt_best.pt").read_bytes()
    Path("cut.pt").write_bytes(content[:9000])
    Path("text.pt").write_text("not a model")
    torch.save([1], "list.pt")
    torch.save({"weights": torch.ones(2)}, "foreign.pt")
    lively().save("no_data.pt", data={})
    lively(signals=(), vocab_size=257).save("static.pt", data=BYTES)
    for line in REFUSED.splitlines():
        flags, says = line.split(": ", 1)
        status, out, err = say(*flags.split())
        assert (status, out, err.count("\n")) == (2, "", 1), line
        assert says in err


# ==== prepare.py ==================================================================================
SHARED = HERE.parent / "shared"


def prepare_here(monkeypatch, *args):
    """The exit status of prepare.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    return prepare.main()


def prepare_there(*args, before=""):
    """prepare.py in a process of its own, after the lines `before`."""
    code = f"import sys, prepare; sys.argv[0] = 'prepare.py'\n{before}\nsys.exit(prepare.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def load_prepared(out):
    """The metadata, and the stories of each split, checked against them."""
    meta = prepare.read_meta(out)
    tokenizer = prepare.tokenizer_of(meta)
    splits = []
    for split in "train", "val":
        tokens = prepare.read_tokens(out, split, meta)
        assert len(tokens) == meta[f"{split}_tokens"]
        splits.append(tokenizer.decode(tokens.tolist()).split(END)[:-1])
        assert len(splits[-1]) == meta[f"{split}_stories"]
    return meta, *splits


def files_in(folder):
    """The contents of the files in a data folder. The lock is no content."""
    return {path.name: path.read_bytes() for path in folder.glob("[!l]*")}


def write_stories(path, stories):
    path.write_bytes(END.join(stories).encode())
    return path


# ---- The demo stories ----------------------------------------------------------------------------
@functools.cache
def demo_stories():
    rng = random.Random(42)
    return [prepare.tell(rng)[0] for _ in range(20000)]


@pytest.mark.parametrize("name", prepare.SLOTS)
def test_prepare_a_story_uses_one_of_a_slots_words(name):
    words = "|".join(prepare.slot_words(name))
    found = set()
    for text in demo_stories():
        used = set(re.findall(rf"\b(?:{words})\b", text))
        assert len(used) == 1, (used, text)
        found |= used
    assert sorted(found) == prepare.slot_words(name)


def test_prepare_entropy_by_enumeration(monkeypatch):
    """On a small grammar: the entropy of all its texts, written out one by one."""
    monkeypatch.setattr(prepare, "GRAMMAR", {
        "story": "{kind} {thing} {kind}{color}|b{thing} {fix}",
        "kind": "k0|k1", "color": "c0|c1|c2", "thing": "t{kind}|u{color}",
        "fix": ("thing", {"t{kind}": ("kind", {"k0": "f|g", "k1": "h"}), "u{color}": "f{color}"})})
    chances = {}

    def enumerate_texts(text, drawn, chance):
        match = prepare.SLOT.search(text)
        if match is None:
            chances[text] = chance
            return
        slot = match[1]
        choices = [drawn[slot]] if slot in drawn else prepare.options(slot, drawn)
        for choice in choices:
            told = text.replace(match[0], choice, 1)
            enumerate_texts(told, {**drawn, slot: choice}, chance / len(choices))

    enumerate_texts("{story}", {}, 1.0)
    monkeypatch.setattr(prepare, "entropy", functools.cache(prepare.entropy.__wrapped__))
    expected = -sum(chance * math.log(chance) for chance in chances.values())
    assert prepare.entropy() == pytest.approx(expected, rel=1e-12)
    rng = random.Random(0)
    told = dict(prepare.tell(rng) for _ in range(1000))
    assert {text: math.exp(-nats) for text, nats in told.items()} == pytest.approx(chances)


# ---- Tokenizers ----------------------------------------------------------------------------------
def offline(name):
    raise OSError("no network in this test")


def little_gpt2(name):
    """A BPE in the form of GPT-2's: each of its merges adds a letter to an earlier token."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word.encode() for word in " t, th, the,On,Onc,Once,  , w, wa, was".split(",")]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("gpt2", pat_str=r"\s+(?!\S)| ?\w+|[\s\S]", mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


@pytest.mark.parametrize("name, size", [
    ("bytes", 257), ("words", 567), ("gpt2", 257), ("gpt2", 262), ("gpt2", 267)])
def test_prepare_tokenizers_encode_any_text(monkeypatch, name, size):
    monkeypatch.setattr(tiktoken, "get_encoding", little_gpt2)
    meta = {"tokenizer": name, "vocab_size": size, "vocabulary": prepare.grammar_words()}
    tokenizer = prepare.tokenizer_of(meta)
    assert tokenizer.n_vocab == size == tokenizer.eot_token + 1
    rng = random.Random(0)
    codes = [*range(128), *range(0xA0, 0x900), *range(0x1F300, 0x1F700)]
    for length in [0, 1, 99, 100, 1000] * 5:
        text = "".join(map(chr, rng.choices(codes, k=length))) + " attic was" + END
        ids = tokenizer.encode_ordinary(text)
        assert max(ids) < size - 1
        assert tokenizer.decode(ids) == text


@pytest.mark.skipif(not (SHARED / "tiktoken_cache").exists(), reason="no GPT-2 vocabulary here")
def test_prepare_vocabulary_is_a_prefix_of_gpt2(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    for size in 50257, 2000:
        args = SHARED / "tinystories" / "valid.txt", "--out", tmp_path, "--max_mb", 0.1
        assert prepare_here(monkeypatch, *args, "--vocab", size) == 0
        meta = prepare.read_meta(tmp_path)
        assert meta["vocab_size"] == size
        ids = prepare.tokenizer_of(meta).encode_ordinary(" the day was very little")
        assert ids == [262, 1110, 373, 845, 1310]           # as in GPT-2


@pytest.mark.parametrize("text, treated", [
    ("", ""), (" Once upon a time ", "Once upon a time"), ("\ufeff\r\na.\r\nb\r\n", "a.\nb\n"),
    (f"a b\n{END}\n c", f"a b{END}c"), (f"{END}a {END}", f"a{END}")])
def test_prepare_treats_prompts_as_stories(text, treated):
    tokenizer = prepare.tokenizer_of({"tokenizer": "bytes"})
    expected = tokenizer.encode(END + treated, allowed_special={END})
    assert prepare.prompt_tokens(tokenizer, text) == expected


# ---- Whole runs ----------------------------------------------------------------------------------
def test_prepare_demo(tmp_path):
    out = tmp_path / "a" / "b"
    run = prepare_there("demo", "--out", out, "--max_mb=0.3", "--seed=5")
    printed, errors = run.communicate()
    assert run.returncode == 0
    assert errors == ""                                     # no bar where there is no terminal
    meta, train, val = load_prepared(out)
    assert sorted(files_in(out)) == ["meta.json", "train.bin", "val.bin"]
    assert meta["train_sha256"].startswith("674f0277c95695761166ff2d7b598ff8")     # everywhere
    told = len(train + val)
    per_token = prepare.entropy() * told / (meta["train_tokens"] + meta["val_tokens"])
    assert meta["entropy_nats_per_token"] == pytest.approx(per_token)
    assert f"{per_token:.4f} nats per token" in printed


def test_prepare_reads_any_blocks(monkeypatch, tmp_path):
    """The data do not depend on where the blocks are cut, or on how many cores there are."""
    rng = random.Random(0)
    hard = ["a", "é", "\U0001F600", "<|", "endoftext|>", "\r\n", "\n", " ", "\ufeff", END]
    for name in "a.txt", "b.txt":
        (tmp_path / name).write_bytes("".join(rng.choices(hard, k=200)).encode())
    results = []
    for size in 1, 2, 30, 1 << 20:
        monkeypatch.setattr(prepare, "BLOCK", size)
        monkeypatch.setattr(os, "cpu_count", lambda size=size: size % 7)
        args = tmp_path, "--tokenizer=bytes", "--out", tmp_path, "--val_fraction=0.3"
        assert prepare_here(monkeypatch, *args) == 0
        results.append(load_prepared(tmp_path))
    assert results[0] == results[1] == results[2] == results[3]
    _, train, val = results[0]
    for story in train + val:
        assert "\r\n" not in story


def test_prepare_splits_by_story_and_seed(monkeypatch, tmp_path, capsys):
    """Equal stories are in one split, whatever files they are in."""
    (tmp_path / "b").mkdir()
    a = write_stories(tmp_path / "a.txt", [f"story {i}" for i in range(1000)])
    b = write_stories(tmp_path / "b" / "b.txt", [f"story {i} " for i in range(1000)])

    def split(*args):
        args = *args, "--tokenizer=bytes", "--val_fraction=0.2", "--out", tmp_path
        assert prepare_here(monkeypatch, *args) == 0
        return load_prepared(tmp_path)

    meta, train, val = split(a)
    assert 160 < len(val) < 240                             # 200, and 3 standard deviations
    assert prepare.same_data(meta, split(b)[0])
    assert not prepare.same_data(meta, split(a, "--seed=1")[0])
    assert split(a, b)[1:] == (train * 2, val * 2)
    split(write_stories(tmp_path / "novels.txt", ["a" * 1000, "b" * 1000]))
    assert "50.0% of the tokens are to validate on, not 20.0%" in capsys.readouterr().err


@pytest.mark.parametrize("limit, stories", [
    (34, 2),
    (48, 3),
    (1000, 6),
])
def test_prepare_max_mb(monkeypatch, tmp_path, limit, stories):
    """Ends at the last whole story within the limit, over all files together."""
    monkeypatch.setattr(prepare, "BLOCK", 7)
    write_stories(tmp_path / "a.txt", ["1", "2222222", "3"])            # end at byte 14, 34, 35
    write_stories(tmp_path / "b.txt", ["4", "5", "6"])                  # and 49, 63, 64
    args = tmp_path, "--tokenizer=bytes", "--out", tmp_path, "--max_mb", limit / 1e6
    assert prepare_here(monkeypatch, *args) == 0
    _, train, val = load_prepared(tmp_path)
    assert sorted(train + val) == ["1", "2222222", "3", "4", "5", "6"][:stories]


def test_prepare_labels(monkeypatch, tmp_path):
    """A story's numbers stand beside its tokens; text without labels leaves no file of them."""
    lines = [f"\n\ufeff{CONTROL}  {i} {-i / 2}\r\n\n{chr(i)}" for i in range(60, 120)]
    source = write_stories(tmp_path / "a.txt", lines)
    args = source, "--tokenizer=bytes", "--out", tmp_path, "--val_fraction=0.3"
    assert prepare_here(monkeypatch, *args) == 0
    meta = prepare.read_meta(tmp_path)
    for split in "train", "val":
        tokens = prepare.read_tokens(tmp_path, split, meta)
        controls, ends = prepare.read_labels(tmp_path, split, meta, tokens)
        assert controls.tolist() == [[i, -i / 2] for i in tokens.tolist() if i < 256]
        assert ends.tolist() == list(range(1, len(tokens), 2))
    write_stories(source, "ab")
    assert prepare_here(monkeypatch, *args) == 0
    assert prepare.read_labels(tmp_path, "val", prepare.read_meta(tmp_path), tokens) is None
    assert not (tmp_path / "val.control.bin").exists()


# ---- Trouble -------------------------------------------------------------------------------------
@pytest.mark.parametrize("args, says", [
    ("missing.txt", "missing.txt"), ("empty.txt", "fewer than two different stories"),
    ("same.txt", "fewer than two different stories"),
    ("good.txt latin.txt", "latin.txt: 'utf-8' codec can't decode byte 0xe9 in position 3"),
    ("good.txt --val_fraction 0", "val_fraction"),
    ("good.txt --max_mb=-1", "--max_mb"),
    ("good.txt --tokenizer gpt5", "unknown tokenizer 'gpt5'"),
    ("good.txt --vocab=300", "bytes can have a vocabulary of 257 to 257, not of 300"),
    ("good.txt --labels", "--labels is for the demo stories"),
    ("label.txt good.txt", "good.txt: a label of 0 numbers, not of 1 as expected: 'a'"),
    ("nan.txt", "nan.txt: '<|control|> nan' must be finite")])
def test_prepare_bad_input(monkeypatch, tmp_path, capsys, args, says):
    """One clear line, status 2, and what lay in the output folder is as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text("precious")
    texts = {"good": f"a{END}b", "empty": f" \n{END}\r\n", "same": f"a{END} a\n",
             "label": f"{CONTROL} 1\na", "latin": "caf\xe9",
             "nan": f"{CONTROL} nan\na"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode("latin1"))
    flags = ["--tokenizer=bytes", *args.split()]
    assert prepare_here(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("prepare.py: ")
    assert error.count("\n") == 1
    assert files_in(tmp_path / "data") == {"meta.json": b"precious"}


def test_prepare_one_at_a_time(monkeypatch, tmp_path, capsys):
    args = "demo", "--max_mb=0.1", "--out", tmp_path
    with prepare.locked(tmp_path):
        assert prepare_here(monkeypatch, *args) == 2
    assert f"another program is at work in {tmp_path}" in capsys.readouterr().err
    assert prepare_here(monkeypatch, *args) == 0
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()                             # the true reason: it is no file
    assert prepare_here(monkeypatch, *args) == 2
    assert "at work" not in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="no such limits and signals on Windows")
@pytest.mark.parametrize("trouble, status, lines", [
    ("full disk", 2, 1), ("SIGINT", 130, 0), ("SIGKILL", -9, 0)])
def test_prepare_trouble_leaves_what_was_there(monkeypatch, tmp_path, trouble, status, lines):
    args = "demo", "--tokenizer=bytes", "--out", tmp_path
    assert prepare_here(monkeypatch, *args, "--max_mb=0.1") == 0
    files = files_in(tmp_path)
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    if trouble == "full disk":                              # writing fails in the same way
        before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000))"
    run = prepare_there(*args, "--max_mb=1000", before=before)
    if trouble != "full disk":
        begun = tmp_path / "unfinished" / "train.bin"
        while not begun.exists() or begun.stat().st_size == 0:
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(getattr(signal, trouble))
    _, error = run.communicate()
    assert run.returncode == status
    assert error.count("\n") == lines
    if trouble == "SIGKILL":                                # the next one cleans up
        assert prepare_here(monkeypatch, *args, "--max_mb=0.1") == 0
    assert files_in(tmp_path) == files


def test_prepare_meta_vouches_for_the_files(monkeypatch, tmp_path):
    """It goes before any other file changes, and comes back after all of them."""
    args = write_stories(tmp_path / "a.txt", "ab"), "--tokenizer=bytes", "--out", tmp_path
    assert prepare_here(monkeypatch, *args) == 0
    meta = prepare.read_meta(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda path, target: pytest.fail("the power is off"))
    with pytest.raises(pytest.fail.Exception):
        prepare_here(monkeypatch, *args)
    with pytest.raises(ValueError, match="run prepare.py first"):
        prepare.read_meta(tmp_path)
    (tmp_path / "val.bin").write_bytes(b"\1\0")
    with pytest.raises(ValueError, match="val.bin is not what .* run prepare.py again"):
        prepare.read_tokens(tmp_path, "val", meta)


# ---- Where the text comes from -------------------------------------------------------------------
@pytest.fixture
def story_server(monkeypatch):
    """Says that it sends .body, and sends its first .most bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body[:self.server.most])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(prepare, "TINYSTORIES", f"http://127.0.0.1:{server.server_port}/s.txt")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_prepare_keeps_only_whole_downloads(monkeypatch, story_server, tmp_path, capsys):
    args = "tinystories", "--tokenizer=bytes", "--out", tmp_path
    stories = END.join(f"story {i} " * 20 for i in range(2000)).encode()
    for body, most, says in (stories, 10_000, "10000 out of"), (b"<html>", 99, "a login page"):
        story_server.body = body
        story_server.most = most
        assert prepare_here(monkeypatch, *args) == 2
        assert says in capsys.readouterr().err
        assert files_in(tmp_path) == {}
    story_server.body = stories                             # changed meanwhile: begins again
    story_server.most = len(stories)
    for _ in range(2):
        assert prepare_here(monkeypatch, *args) == 0
        assert (tmp_path / "s.txt").read_bytes() == stories
        story_server.body = b""                             # it is here: no second download


def test_prepare_with_no_input(monkeypatch, tmp_path, capsys):
    """training_data, then tinystories, then demo, loudly; but never in place of what was asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "TINYSTORIES", "http://127.0.0.1:1/s.txt")     # nobody answers
    monkeypatch.setattr(prepare, "DEMO_MB", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for flag, tokenizer in ("--tokenizer=bytes", "bytes"), ("--vocab=8192", "words"):
        assert prepare_here(monkeypatch, flag) == 0
        assert "DEMO STORIES, NOT TINYSTORIES" in capsys.readouterr().err
        assert prepare.read_meta("data")["tokenizer"] == tokenizer
    os.mkdir("training_data")
    write_stories(Path("training_data/a.txt"), ["mine", "mine, too"])
    assert prepare_here(monkeypatch) == 2                   # own text and no vocabulary: says so
    assert "--tokenizer bytes" in capsys.readouterr().err
    with pytest.raises(ConnectionError, match="go online once$"):
        prepare.tokenizer_of({"tokenizer": "gpt2"})         # for a checkpoint, bytes are no help


# ---- Tokens back ---------------------------------------------------------------------------------
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("T, bucket", [
    (1, 1),
    (5, 1),
    (12, 4),
    (300, 64),
])
def test_prepare_rows_and_windows(T, bucket, aligned):
    """Beside a naive walk over the targets, of which `place` is the next."""
    rng = np.random.default_rng(0)
    story_of = np.repeat(np.arange(100), rng.integers(1, 20, 100))
    ends = np.flatnonzero(np.diff(story_of, append=100))
    tokens = rng.integers(0, 50, len(story_of)).astype("<u2")
    tokens[ends] = 50
    rows = prepare.rows_of(tokens, T, aligned)
    x, y = prepare.windows(tokens, rows, bucket=bucket)
    labels = np.arange(100)[:, None], ends
    control = prepare.control_windows(labels, rows, bucket)
    place = 0 if aligned else 1
    for i, (start, n) in enumerate(rows.tolist()):
        stop = place + T
        if aligned:
            stop = min(stop, ends[story_of[place]] + 1)
        assert (start, n) == (place - 1, stop - place)
        padding = len(x[i]) - n
        assert x[i].tolist() == [50, *tokens][place:stop] + [50] * padding
        assert y[i].tolist() == [*tokens][place:stop] + [-1] * padding
        assert (control[i, :n, 0] == story_of[place:stop]).all()
        place = stop
    assert len(tokens) - place < (1 if aligned else T)
    assert 0 <= x.shape[1] - rows[:, 1].max() < bucket
    assert x.shape[1] % bucket == 0


# ---- The wrapper of all mains --------------------------------------------------------------------


def test_prepare_is_quiet_where_nobody_reads():
    run = prepare_there(before="prepare.main = prepare.command(lambda: print('x'))")
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 1


# ==== train.py ====================================================================================
TINY_RUN = ("--preset laptop --device cpu --dtype fp32 --n_layer 1 --n_embd 16 --n_head 2 "
        "--ncn_hidden 4 --val_sequences 8 --rows contiguous --block_size 32 --dropout 0.1 "
        "--batch_size 2 --grad_accum 2 --max_steps 12 --warmup_steps 3 --lr 0.01 "
        "--eval_interval 4 --log_interval 2").split()
STORIES = "--rows aligned --block_size 512 --dropout 0"
STAMP = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] "
STEP_LINE = re.compile(
    STAMP + r"Step: (\d+) \| Ep: \d+ \[\d+/\d+ \(\d+\.\d%\)\] \| Loss: (\d+\.\d{4}) "
    r"\| Reg: (\d\.\d{4}) \| PPL: (\d+\.\d\d) \| LR: \d\.\d\de[-+]\d\d \| Scale: \d+\.0 "
    r"\| Tok/s: \d+(.*)$", re.M)
VAL_LINE = re.compile(
    STAMP + r"Validation Result: Loss: (\d+\.\d{4}) \| Perplexity: (\d+\.\d{4})(.*)$", re.M)


# ---- Training, here and in processes of its own ------------------------------------------------
def call(main, *args):
    """What a script's main returns, in this process."""
    with mock.patch.object(sys, "argv", ["train.py", *map(str, args)]):
        try:
            return main()
        except SystemExit as stop:
            return stop.code


def train_tiny(data, out, flags="", main=training.main):
    """The exit status of train.py with a tiny model."""
    return call(main, *TINY_RUN, "--data", data, "--out", out, *flags.split())


def train_here(*args):
    """The same, without its signal handlers: they would stay when it ends."""
    with mock.patch.object(signal, "signal"):
        return train_tiny(*args)


def prepared_data(out, *args):
    """The folder `out`, with data that prepare.py made there."""
    assert call(prepare.main, *args, "--out", out) == 0
    return out


def new_run(data, out, flags=""):
    """The Run that these flags begin."""
    def begin():
        return training.start_or_resume(training.arguments(), torch.device("cpu"))[0]
    return train_tiny(data, out, flags, main=begin)


def inside_step(step, act):
    """Lets act(run) happen inside a step: after the backward pass, before the weights move."""
    update = training.update

    def update_or_act(run):
        if run.step + 1 == step:
            act(run)
        return update(run)
    return mock.patch.object(training, "update", update_or_act)


def fork(work, *args):
    """A process that does work(*args), forked from one that has imported all it needs."""
    if os.name == "nt":
        pytest.skip("POSIX processes and signals")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which an optimizer imports
    process = context.Process(target=work, args=args)
    process.start()
    return process


def status_of(process):
    process.join(100)
    process.kill()  # if it hangs
    process.join()
    return process.exitcode


def fork_two(work, *args):
    """The exit statuses of two processes that do work(rank, world, port, *args)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # a free one
    processes = [fork(work, rank, 2, port, *args) for rank in (0, 1)]
    return [status_of(process) for process in processes]


def join_group(rank, world, port):
    """Makes this process one of several, as torchrun tells it by its environment."""
    training.RANK = rank
    training.WORLD = world
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def train_there(rank, world, port, data, out, flags="", act=None):
    """train.py in such a process. The first process does act(run) in its seventh step."""
    join_group(rank, world, port)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    with inside_step(7 if act and rank == 0 else None, act):
        sys.exit(train_tiny(data, out, flags))


def train_alone(*args):
    """A process that does the same on its own."""
    return fork(train_there, 0, 1, 0, *args)


def send(numbers, run):
    for number in numbers:
        os.kill(os.getpid(), number)


def out_of_memory(run):
    raise MemoryError


def checkpoint(out):
    return torch.load(out / "ckpt_latest.pt", weights_only=True)


def assert_same_run(out, reference, atol=0.0):
    """The last steps in two folders have the same weights, bit for bit or nearly."""
    a = checkpoint(out)
    b = checkpoint(reference)
    assert a["step"] == b["step"]
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=atol)


def log_of(out):
    return (out / "training.log").read_text(encoding="utf-8")


def losses_of(out):
    """The numbers of a run's log lines and validation lines, in two lists of tuples of strings."""
    return STEP_LINE.findall(log_of(out)), VAL_LINE.findall(log_of(out))


def refused(capsys, data, out, flags=""):
    """The one line on standard error with which train.py ends, with status 2."""
    capsys.readouterr()
    assert train_here(data, out, flags) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"train\.py: .+\n", error)
    return error


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("demo"), "demo", "--max_mb", 0.3)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return prepared_data(tmp_path_factory.mktemp("labelled"), "demo", "--labels", "--max_mb", 0.1)


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """The folder of an uninterrupted run of 12 steps."""
    out = tmp_path_factory.mktemp("whole")
    assert train_here(demo, out) == 0
    return out


@pytest.fixture(scope="module")
def two(demo, tmp_path_factory):
    """The folder of an uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("two")
    assert fork_two(train_there, demo, out) == [0, 0]
    return out


# ---- The log -----------------------------------------------------------------------------------
def test_train_log_is_the_papers(whole):
    steps, validations = losses_of(whole)
    assert [int(step) for step, *_ in steps] == [1, 2, 4, 6, 8, 10, 12]
    assert len(validations) == 3
    assert len(re.findall(STAMP + r"About \d+\.\d minutes to go", log_of(whole), re.M)) == 1
    assert re.search(STAMP + r"Training Complete\.\n\Z", log_of(whole), re.M)
    for _, loss, _, perplexity, _ in steps:
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-4)


def stories_of(data, split):
    """The stories of a split, each with its END, as int64 arrays."""
    tokens = np.fromfile(data / f"{split}.bin", "<u2").astype(np.int64)
    return np.split(tokens, np.flatnonzero(tokens == tokens[-1]) + 1)[:-1]


def losses_by_hand(out, stories, labels=None):
    """The task loss and the price of stories that the trained model reads one by one."""
    model = ModulatedLM.load(out / "ckpt_latest.pt")
    sums = torch.zeros(2)
    for i, story in enumerate(stories):
        y = torch.from_numpy(story)[None]
        x = torch.cat([y[:, -1:], y[:, :-1]], dim=1)  # an END, then the story
        control = None if labels is None else labels[i][None]
        loss = model(x, y, control=control)
        sums += len(story) * torch.stack([loss.task, loss.homeostatic]).detach()
    return (sums / sum(map(len, stories))).tolist()


def test_train_losses_count_each_target_once(demo, tmp_path):
    """Also where stories differ in length. The signals start as the authors' do."""
    flags = f"{STORIES} --lr 0 --max_steps 1 --start zero --homeostatic_lambda 1 --batch_size 3"
    assert train_here(demo, tmp_path, f"{flags} --val_sequences 1000") == 0
    stories = stories_of(demo, "train")
    order = np.random.default_rng((42, 0)).permutation(len(stories))  # of this seed and epoch
    expected = losses_by_hand(tmp_path, [stories[i] for i in order[:6]])
    assert expected[1] == pytest.approx(0.297**2 + 0.5**2, abs=0.01)
    [(_, loss, price, *_)], [(validation, *_)] = losses_of(tmp_path)
    assert [float(loss), float(price)] == pytest.approx(expected, abs=1e-4)
    expected, _ = losses_by_hand(tmp_path, stories_of(demo, "val"))
    assert float(validation) == pytest.approx(expected, abs=1e-4)


# ---- A step ------------------------------------------------------------------------------------
def gradients_of_a_step(data, out, flags):
    """The gradient of each weight in the first step, and the logged Loss and Reg."""
    gradients = {}

    def keep(run):
        for name, p in run.model.named_parameters():
            gradients[name] = p.grad.clone()

    with inside_step(1, keep):
        assert train_here(data, out, f"{STORIES} --start zero --max_steps 1 {flags}") == 0
    [(_, loss, price, *_)], _ = losses_of(out)
    return gradients, float(loss), float(price)


@pytest.mark.parametrize("salience", ["causal", "global"])
def test_train_step_does_not_depend_on_how_it_is_cut_or_padded(demo, tmp_path, salience):
    """Eight stories as 8 x 1, 2 x 4, 1 x 8 micro-batches, or padded as --compile has it."""
    steps = []
    for cut in ("8 --grad_accum 1", "2 --grad_accum 4", "1 --grad_accum 8",
                "8 --grad_accum 1 --compile"):
        flags = f"--salience {salience} --batch_size {cut}"
        with mock.patch.object(ModulatedLM, "compile"):
            steps.append(gradients_of_a_step(demo, tmp_path, flags))
    reference, *logged = steps[0]
    for gradients, *also_logged in steps[1:]:
        assert also_logged == pytest.approx(logged, abs=1.1e-4)
        for name, gradient in gradients.items():
            difference = (gradient - reference[name]).norm()
            assert difference <= 1e-6 * reference[name].norm(), name


def test_train_learning_rate_reaches_0_after_the_last_step():
    s = dict(warmup_steps=100, max_steps=1100)
    shares = [training.schedule(step, s) for step in range(1, 1102)]
    assert shares[19] == pytest.approx(0.2)
    assert shares[99] == max(shares) == 1
    assert shares[-2] > 1e-9 > shares[-1]


def test_train_embeddings_have_a_rate_of_their_own(demo, tmp_path):
    run = new_run(demo, tmp_path, "--lr 0 --embed_lr 0.1")
    before = copy.deepcopy(run.model.state_dict())
    next(training.train_steps(run))
    after = run.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"embed.weight", "position.weight"}


def test_train_shortest_runs_move_the_weights(demo, tmp_path):
    assert train_here(demo, tmp_path, "--max_steps 1 --warmup_steps 0") == 0
    assert (checkpoint(tmp_path)["model"]["norm.weight"] != 1).all()
    assert train_here(demo, tmp_path, "--max_steps 2 --warmup_steps 3") == 0
    assert "max_steps is below warmup_steps" in log_of(tmp_path)


def test_train_epochs_have_each_row_once_in_another_order(demo, tmp_path):
    run = new_run(demo, tmp_path, "--batch_size 5")
    count = len(run.train.rows) // 5
    rows = [training.rows_of_micro_batch(run, n)[:, 0] for n in range(2 * count)]
    first, second = np.reshape(rows, (2, -1))
    assert len(set(first)) == len(set(second)) == 5 * count
    assert (first != second).any()


def test_train_validates_all_seeds_on_the_same_rows(demo, tmp_path):
    rows = [new_run(demo, tmp_path, f"--seed {seed}").val.rows for seed in (1, 2)]
    np.testing.assert_array_equal(*rows)


def test_train_compiled_has_the_same_losses(demo, tmp_path):
    """Traced as --compile does it, but run without a C compiler: that takes minutes."""
    logs = []
    compiled = functools.partialmethod(ModulatedLM.compile, backend="aot_eager")
    with mock.patch.object(ModulatedLM, "compile", compiled):
        for compiles in ("", "--compile"):
            flags = f"{STORIES} --max_steps 6 --log_interval 1 --batch_size 1 {compiles}"
            assert train_here(demo, tmp_path, flags) == 0
            steps, validations = losses_of(tmp_path)
            logs.append([float(loss) for _, loss, *_ in steps + validations])
    torch.compiler.reset()
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


# ---- Resuming ----------------------------------------------------------------------------------
def test_train_killed_at_random_moments(demo, tmp_path):
    """NCN_KILLS runs (5) are killed, resumed, and end as the uninterrupted one, bit for bit."""
    flags = "--eval_interval 1"  # much of the time, a checkpoint is being written
    rng = random.Random(0)
    for _ in range(2):  # the first one also starts the server that forks
        start = time.monotonic()
        assert status_of(train_alone(demo, tmp_path / "whole", flags)) == 0
    seconds = time.monotonic() - start
    killed = 0
    for i in range(int(os.environ.get("NCN_KILLS", 5))):
        out = tmp_path / str(i)
        process = train_alone(demo, out, flags)
        time.sleep(rng.random() * seconds)
        process.kill()
        killed += status_of(process) == -signal.SIGKILL
        assert status_of(train_alone(demo, out, f"{flags} --resume")) == 0
        assert_same_run(out, tmp_path / "whole")
    assert killed > 0


@pytest.mark.parametrize("signals, step", [
    ([signal.SIGINT], 7), ([signal.SIGTERM], 7), ([signal.SIGTERM, signal.SIGTERM], 4)])
def test_train_stops_in_order_at_the_first_signal(demo, whole, tmp_path, signals, step):
    """The state is saved. A second signal ends the run at once."""
    stop = functools.partial(send, signals)
    assert status_of(train_alone(demo, tmp_path, "", stop)) == 128 + signals[0]
    assert checkpoint(tmp_path)["step"] == step
    assert train_here(demo, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, whole)


def poison_weights(run):
    run.model.norm.weight.data.fill_(math.nan)


def poison_and_fail(run):
    poison_weights(run)
    out_of_memory(run)


def poison_and_stop(run):
    poison_weights(run)
    send([signal.SIGTERM], run)


def test_train_error_in_validation_or_in_a_step_saves_the_steps_before(demo, tmp_path, capsys):
    with mock.patch.object(training, "validate", out_of_memory):
        assert "not enough memory" in refused(capsys, demo, tmp_path)
    assert checkpoint(tmp_path)["step"] == 4
    with inside_step(7, out_of_memory):
        assert "not enough memory" in refused(capsys, demo, tmp_path, "--resume")
    assert checkpoint(tmp_path)["step"] == 6
    assert train_here(demo, tmp_path, "--resume --batch_size 1") == 0
    assert "--batch_size changed from 2 to 1" in log_of(tmp_path)


@pytest.mark.parametrize("trouble, status", [
    (poison_weights, 2), (poison_and_fail, 2), (poison_and_stop, 128 + signal.SIGTERM)])
def test_train_saves_no_weights_that_are_not_finite(demo, tmp_path, trouble, status):
    process = train_alone(demo, tmp_path, "--log_interval 100", trouble)
    assert status_of(process) == status
    kept = checkpoint(tmp_path)
    assert kept["step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_train_full_disk_leaves_the_last_checkpoint(demo, tmp_path, capsys, monkeypatch):
    def fill_the_disk(run):
        monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("No space left")))

    with inside_step(6, fill_the_disk):
        assert "No space left" in refused(capsys, demo, tmp_path)
    assert checkpoint(tmp_path)["step"] == 4


def test_train_resume_knows_the_data_by_their_content(demo, tmp_path, capsys):
    out = tmp_path / "out"
    for name, flags in (("a", ""), ("b", "--resume --max_steps 13")):
        text = tmp_path / f"{name}.txt"
        text.write_text(END.join(f"There was once a cat with number {i}." for i in range(200)))
        data = prepared_data(tmp_path / name, text, "--tokenizer", "bytes")
        assert train_here(data, out, flags) == 0
    assert checkpoint(out)["step"] == 13
    assert "is not the data that" in refused(capsys, demo, out, "--resume")


def test_train_resume_with_nothing_there_begins(demo, whole, tmp_path):
    """Blocks that keep their inputs alone change nothing."""
    assert train_here(demo, tmp_path, "--resume --checkpoint_blocks") == 0
    assert f"Nothing to resume in {tmp_path}: this run begins" in log_of(tmp_path)
    assert_same_run(tmp_path, whole)


# ---- Several processes -------------------------------------------------------------------------
def test_train_two_processes_equal_one(whole, two):
    assert_same_run(two, whole, atol=6e-8)


def compare_with_ddp(rank, world, port, data, out):
    """Sums gradients over the processes as train.py does, and as DistributedDataParallel."""
    join_group(rank, world, port)
    training.join_processes(torch.device("cpu"))
    run = new_run(data, out, f"{STORIES} --grad_clip 0")
    ddp = torch.nn.parallel.DistributedDataParallel(new_run(data, out, STORIES).model)
    run.optimizer = mock.MagicMock()  # leaves weights and gradients alone
    x, y, share, _ = training.batch(run, rank, training.targets_of_step(run))
    training.micro_batch(run, x, y, share)
    training.update(run)
    (ddp(x, y).total * share * world).backward()  # DDP takes the mean
    for ours, reference in zip(run.model.parameters(), ddp.module.parameters(), strict=True):
        assert torch.equal(ours.grad, reference.grad)


def test_train_gradients_of_two_processes_are_those_of_ddp(demo, tmp_path):
    assert fork_two(compare_with_ddp, demo, tmp_path) == [0, 0]


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: notes operations, and does them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.notes.append((operation, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, out in self.notes:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


def take(tape, *_, **__):
    return tape


def refuse(*_, **__):
    raise RuntimeError("operation not permitted when stream is capturing")


def record_there(rank, world, port, data, out, flags, graph=take):
    """train_there with recorded steps, on a CPU."""
    def make_run(*args, make=training.make_run):
        return dataclasses.replace(make(*args), records=True, bucket=16)

    fakes = dict(CUDAGraph=Tape, Stream=mock.Mock(), graph_pool_handle=mock.Mock(), graph=graph)
    with mock.patch.multiple(torch.cuda, **fakes):
        with mock.patch.object(training, "make_run", make_run):
            train_there(rank, world, port, data, out, flags)


@pytest.mark.parametrize("rows", ["contiguous", "aligned"])
def test_train_processes_replay_recorded_steps(demo, tmp_path, rows):
    flags = f"--rows {rows}"
    assert train_here(demo, tmp_path / "launched", flags) == 0
    assert fork_two(record_there, demo, tmp_path / "recorded", flags) == [0, 0]
    assert_same_run(tmp_path / "recorded", tmp_path / "launched", atol=6e-8)


def test_train_goes_on_launched_where_recording_fails(demo, whole, tmp_path):
    assert status_of(fork(record_there, 0, 1, 0, demo, tmp_path, "", refuse)) == 0
    assert "Not recorded, so launched kernel by kernel: operation" in log_of(tmp_path)
    assert_same_run(tmp_path, whole, atol=1e-6)


def test_train_signals_to_a_process_stop_all(demo, two, tmp_path):
    """In the same step, saved once; torchrun passes on what a scheduler has sent already."""
    stop = functools.partial(send, [signal.SIGTERM, signal.SIGTERM])
    assert fork_two(train_there, demo, tmp_path, "", stop) == [143, 143]
    assert log_of(tmp_path).count("Interrupted after step 7") == 1
    assert fork_two(train_there, demo, tmp_path, "--resume") == [0, 0]
    assert_same_run(tmp_path, two)


def test_train_error_in_one_process_ends_all(demo, tmp_path):
    assert fork_two(train_there, demo, tmp_path, "", out_of_memory) == [2, 2]
    assert checkpoint(tmp_path)["step"] == 6


MORTAL = """import os, sys, train, weakref
update = train.update
def update_or_die(run):
    if run.step == 6 and train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), 9)
    return update(run)
train.update = update_or_die
destroy = train.dist.destroy_process_group
def destroy_and_see():
    group = weakref.ref(train.dist.group.WORLD)
    destroy()
    assert group() is None
train.dist.destroy_process_group = destroy_and_see
sys.exit(train.main())"""


def test_train_killed_process_is_restarted_by_torchrun(demo, two, tmp_path):
    script = tmp_path / "mortal.py"
    script.write_text(MORTAL)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
    args = [*launcher, script, *TINY_RUN, "--data", demo, "--out", tmp_path, "--resume"]
    folder = str(Path(training.__file__).parent)
    done = subprocess.run([sys.executable, *args], env={**os.environ, "PYTHONPATH": folder})
    assert done.returncode == 0
    assert log_of(tmp_path).count("cpu x 2") == 2
    assert_same_run(tmp_path, two)


# ---- The folder, and what is refused -----------------------------------------------------------
def test_train_one_run_per_folder(demo, tmp_path, capsys):
    assert train_here(demo, tmp_path, "--max_steps 1") == 0
    first = log_of(tmp_path)
    with prepare.locked(tmp_path):
        assert "another program is at work in" in refused(capsys, demo, tmp_path)
    assert "another" not in refused(capsys, demo, tmp_path / "training.log")
    assert train_here(demo, tmp_path, "--max_steps 2") == 0
    assert train_here(demo, tmp_path, "--max_steps 3") == 0
    assert log_of(tmp_path / "previous" / "1") == first
    assert checkpoint(tmp_path / "previous" / "2")["step"] == 2


@pytest.mark.parametrize("flags, says", [
    ("--data elsewhere", "run prepare.py"),
    ("--n_head 3", "n_embd 16 is not divisible by n_head 3"),
    ("--n_heads 3", "unrecognized arguments: --n_heads 3"),
    ("--n_head two", "invalid int value: 'two'"),
    ("--salience psychic", "invalid choice: 'psychic'"),
    ("--signals none,gain", "unknown signal 'none'"),
    ("--batch_size 0", "--batch_size is 0, it must be at least 1"),
    ("--seed -1", "--seed is -1, it must be 0 or more"),
    ("--lr nan", "Invalid learning rate: nan"),
    ("--batch_size 1000000", "too few for --batch_size 1000000"),
    ("--block_size 1000000", "holds 0 rows of up to 1000000 tokens"),
    ("--init nothing.pt", "no checkpoint nothing.pt"),
])
def test_train_refuses(demo, tmp_path, capsys, flags, says):
    assert says in refused(capsys, demo, tmp_path / "out", flags)
    assert not (tmp_path / "out").exists()


def test_train_resume_refuses(demo, whole, tmp_path, capsys):
    assert "--n_embd: it was 16" in refused(capsys, demo, whole, "--resume --n_embd 32")
    path = tmp_path / "ckpt_latest.pt"
    ModulatedLM.load(whole / path.name).save(path, optimizer={})
    assert "was not written by train.py" in refused(capsys, demo, tmp_path, "--resume")
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged" in refused(capsys, demo, tmp_path, "--resume")


# ---- Other beginnings, controls ----------------------------------------------------------------
def test_train_begins_with_another_runs_weights(demo, labelled, whole, tmp_path, capsys):
    weights = f"--init {whole / 'ckpt_latest.pt'}"
    other = prepared_data(tmp_path / "other", "demo", "--max_mb", 0.1, "--seed", 7)
    assert train_here(other, tmp_path, f"{weights} --lr 0 --max_steps 1 --dropout 0.2") == 0
    assert checkpoint(tmp_path)["config"]["dropout"] == 0.2
    ours = checkpoint(tmp_path)["model"]
    torch.testing.assert_close(ours, checkpoint(whole)["model"], rtol=0, atol=0)
    assert "another n_ffn" in refused(capsys, demo, tmp_path, f"{weights} --n_ffn 70")
    assert "another n_control" in refused(capsys, labelled, tmp_path, weights)


def test_train_a_row_in_ten_has_no_control(labelled, tmp_path):
    run = new_run(labelled, tmp_path, STORIES)
    controls = [training.batch(run, number, 1)[3] for number in range(300)]
    missing = torch.cat([(control == 0).float().mean((1, 2)) for control in controls])
    assert set(missing.tolist()) == {0, 1}  # of a row, all or nothing
    assert 0.06 < missing.mean() < 0.14


def test_train_validation_says_what_the_control_is_worth(labelled, tmp_path):
    def amplify(run):
        run.model.controller.layer2.weight.data.mul_(1000)

    with inside_step(1, amplify):
        flags = f"{STORIES} --val_sequences 1000 --max_steps 1"
        assert train_here(labelled, tmp_path, flags) == 0
    stories = stories_of(labelled, "val")
    labels = torch.from_numpy(np.fromfile(labelled / "val.control.bin", "<f4")).view(-1, 2)
    told, _ = losses_by_hand(tmp_path, stories, labels)
    untold, _ = losses_by_hand(tmp_path, stories)
    length = sum(map(len, stories)) / len(stories)
    entropy = prepare.read_meta(labelled)["entropy_nats_per_story"]
    above = told - entropy / length
    numbers = re.findall(r"(?:control:|worth|entropy:|token,) (-?\d+\.\d+)", log_of(tmp_path))
    expected = [untold, untold - told, above, above * length]
    assert [*map(float, numbers)] == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_train_controls_are_scaled_by_their_spread(labelled, tmp_path):
    """Their weights begin divided by the labels' standard deviation, unless that is 0."""
    config = new_run(labelled, tmp_path).model.config
    labels = np.array([[0.1, 7.3], [0.3, 7.3]])
    torch.manual_seed(5)
    start = {"start": "neutral"}
    scaled = training.new_model(None, start, config, None, (labels, None), None)
    torch.manual_seed(5)
    drawn = ModulatedLM(config).controller.control.weight
    expected = drawn / torch.tensor([0.1, 1.0])
    torch.testing.assert_close(scaled.controller.control.weight, expected)


def test_train_labelled_runs_resume_and_share(labelled, tmp_path):
    one = tmp_path / "one"
    assert train_here(labelled, one) == 0
    assert fork_two(train_there, labelled, tmp_path / "two") == [0, 0]
    assert_same_run(tmp_path / "two", one, atol=6e-8)
    kill = functools.partial(send, [signal.SIGKILL])
    assert status_of(train_alone(labelled, tmp_path, "", kill)) == -signal.SIGKILL
    assert train_here(labelled, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, one)


# ---- Variants, the machine, the terminal -------------------------------------------------------
@pytest.mark.parametrize("flags", [
    "--signals none --n_ffn 70", "--signals gate,gain", "--salience reactive",
    "--salience constant", "--salience global --dtype bf16", "--dtype fp16"])
def test_train_variants(demo, tmp_path, flags):
    assert train_here(demo, tmp_path, flags) == 0
    steps, validations = losses_of(tmp_path)
    assert float(validations[-1][0]) < float(steps[0][1])
    for *_, remark in steps + validations:
        assert ("global salience: sees the future, no likelihood" in remark) == ("global" in flags)
    model = ModulatedLM.load(tmp_path / "ckpt_best.pt")
    assert (model.controller is None) == ("none" in flags)


@pytest.mark.parametrize("device, vocab_size, gain, dtype", [
    ("cpu", 8192, 3, "bf16"), ("cpu", 8192, 1.2, "fp32"), ("cpu", 567, 3, "fp32"),
    ("cuda", 567, 3, "fp16"), ("cuda", 567, 1.2, "fp32")])
def test_train_dtype_is_chosen_by_measuring(monkeypatch, device, vocab_size, gain, dtype):
    """Half precision where its products are faster; on a CPU, where the model is large, too."""
    config = NCNConfig(vocab_size=vocab_size, n_layer=3, n_head=4, n_embd=128)
    times = iter([gain] * 6 + [1] * 6)
    matrix = torch.ones(2, 2)
    monkeypatch.setattr(training, "seconds", lambda work: next(times))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: matrix)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert training.choose_dtype(torch.device(device), config)[0] == dtype


def test_train_bench_prints_its_table(demo, tmp_path, capsys):
    assert train_here(demo, tmp_path / "out", "--bench --dtype auto") == 0
    table = (r"with the controller +[\d,]+ tokens/s\n--signals none +[\d,]+ tokens/s\n"
             r"the controller +-?\d+\.\d% of a step\npeak memory +[\d,]+ MiB\n")
    assert re.search(table, capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_train_shows_a_terminal_a_bar_and_what_the_model_writes(demo, tmp_path, capsys):
    with mock.patch.object(sys.stderr, "isatty", return_value=True):
        assert train_here(demo, tmp_path) == 0
    shown = capsys.readouterr()
    assert "12/12" in shown.err
    assert len(re.findall(r"^    \S.* ", shown.out, re.M)) == 3


# ==== analyze.py ==================================================================================
# ==== analyze.py ==================================================================================
AUTHORS_LOG = """\
2025-12-05 08:23:35,567 [INFO] Step: 20 | Ep: 1 [80/63518 (0.1%)] | Loss: 9.9924 | Reg: 0.0034 \
| PPL: 21860.27 | LR: 1.20e-04 | Scale: 65536.0 | Tok/s: 2493
2025-12-05 08:29:03,921 [INFO] Step: 40 | Ep: 1 [160/63518 (0.3%)] | Loss: 8.7131 | Reg: 0.0033 \
| PPL: 6082.04 | LR: 2.40e-04 | Scale: 65536.0 | Tok/s: 2495
2025-12-07 18:57:00,151 [INFO] Validation Result: Loss: 1.5082 | Perplexity: 4.5184
2025-12-07 18:57:02,194 [INFO] Training Complete.
"""


def log_message(text, seconds=0):
    time = datetime(2025, 12, 5) + timedelta(seconds=seconds)
    return f"{time:%Y-%m-%d %H:%M:%S},000 [INFO] {text}\n"


def log_steps(steps, losses):
    """A training line for each step, two seconds a step."""
    text = ""
    for step, loss in zip(steps, losses, strict=True):
        values = f"Loss: {loss:.4f} | Reg: 0.0001 | PPL: 1.00 | LR: 1.20e-04 | Scale: 1.0"
        message = f"Step: {step} | Ep: 1 [{step}/9 (1.0%)] | {values} | Tok/s: 512"
        text += log_message(message, 2 * int(step))
    return text


def log_validation(loss):
    return log_message(f"Validation Result: Loss: {loss:.4f} | Perplexity: 1.0000")


def log_file(folder, *texts):
    path = Path(folder, "training.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(texts))
    return str(path)


def log_of_training(folder, final, seed, settings="", digest="01ab"):
    """A finished run whose validations, ten steps apart, fall from 4 in a straight line."""
    head = log_message("2,013,568 parameters, 0 of them the controller's")
    head += log_message(f"Settings: signals=none max_steps=30 {settings} seed={seed}")
    head += log_message(f"Data: data sha256={digest} tokenizer=gpt2")
    rows = ""
    for i in range(3):
        steps = range(10 * i + 1, 10 * i + 11)
        rows += log_steps(steps, [3.0] * 10)
        rows += log_validation(4 + (final - 4) * (i + 1) / 3)
    return log_file(folder, head, rows)


def noisy_run(slope, seed=0):
    """800 points, 20 steps apart as in the authors' log, with noise and a slope at the end."""
    step = 20 * np.arange(1, 801)
    noise = np.random.default_rng(seed).normal(0, 0.05, 800)
    loss = 1.5 + 8 * np.exp(-step / 700) + slope * np.maximum(step - 12000, 0)
    return step, loss + noise


def run_of(step, loss):
    return analyze.Run("", "", {}, {}, 1.0, 1.0, {}, step, loss)


@pytest.fixture
def run_analyze(tmp_path, monkeypatch, capsys):
    """analyze.py with these arguments, in an empty folder -> what it prints; where it shall refuse,
    the one line that says why."""
    monkeypatch.chdir(tmp_path)

    def run(arguments="", refused=False, script=analyze):
        monkeypatch.setattr(sys, "argv", [script.__file__, *shlex.split(arguments)])
        status = script.main()
        out, err = capsys.readouterr()
        assert status == (2 if refused else 0)
        assert err.count("\n") == refused
        return err if refused else out

    return run


def printed(out, label):
    """What was printed in the line that begins with the label, in words."""
    line = next(line for line in out.splitlines() if line.startswith(f"{label} "))
    return line.removeprefix(label).split()


# ---- Logs and verdicts ---------------------------------------------------------------------------
def test_analyze_reads_the_authors_log(run_analyze):
    run = analyze.read_log(log_file("theirs", AUTHORS_LOG))
    assert run.validations == {40: 1.5082}
    assert run.minutes == pytest.approx(2 * 328.354 / 60)
    log_file("long", log_steps(*noisy_run(0)), log_validation(1.5082))
    assert "long: Converged" in run_analyze("long/training.log")


def test_analyze_resumed_and_appended_runs(tmp_path, capsys):
    before = log_steps([20, 40, 60, 80, 100], [5.0] * 5)
    before += log_validation(4)
    resumed = log_file(tmp_path, before, log_steps([41, 60, 80], [3.0] * 3))
    run = analyze.read_log(resumed)
    assert run.step.tolist() == [20, 40, 41, 60, 80]
    assert run.loss.tolist() == [5, 5, 3, 3, 3]
    assert run.validations == {}, "that of step 100 belongs to weights that were lost"
    appended = log_file(tmp_path, before, log_steps([1, 20], [3.0] * 2))
    assert analyze.read_log(appended).step.tolist() == [1, 20]
    assert "2 runs in one file" in capsys.readouterr().out


def test_analyze_verdicts():
    for name, slope in (("Converged", 0), ("Still improving", -5e-5), ("Diverging", 2e-4)):
        runs = [run_of(*noisy_run(slope, seed)) for seed in range(40)]
        verdicts = list(map(analyze.verdict, runs))
        assert sum(v.name == name for v in verdicts) >= 38
        covered = [abs(v.slope - 1000 * slope) <= v.half for v in verdicts]
        assert sum(covered) >= 37, "the interval is a 98% one"
    step = 20 * np.arange(1, 801)
    for slope, name in ((9e-7, "Converged"), (-1.1e-6, "Still improving")):  # without noise
        assert analyze.verdict(run_of(step, 2 + slope * step)).name == name
    assert analyze.verdict(run_of(step[:20], np.ones(20))).name == "Undecided"


def test_analyze_verdict_on_a_loss_that_is_not_finite(tmp_path):
    good = log_steps(range(1, 81), [2.0] * 80)
    stopped = log_message("Stopped: loss nan at step 90")
    for bad in (log_steps([90], [math.nan]), stopped):
        run = analyze.read_log(log_file(tmp_path, good, bad))
        assert analyze.verdict(run).name == "Diverging"
        assert run.broke == 90


def test_analyze_efficiency_of_known_curves():
    step = 20 * np.arange(1, 801)
    power_law = analyze.efficiency(run_of(step, 1.5 + 25.0 * step**-0.6))
    assert power_law.law == pytest.approx((1.5, 25, 0.6), rel=0.03)
    # 97.5% of the improvement comes at step 1,000, the rest at step 8,000 of 16,000.
    stairs = 5 - 3.9 * (step >= 1000) - 0.1 * (step >= 8000)
    e = analyze.efficiency(run_of(step, stairs))
    assert e.step[[e.p95, e.p99]] == pytest.approx([1000, 8000], rel=0.05)
    assert e.sei == pytest.approx(0.927, abs=0.01)  # (0.975 * 7 + 1 * 8) / 16
    assert analyze.efficiency(run_of(step, step / 10_000)) is None


def test_analyze_pictures_of_logs(run_analyze):
    log_file("out", log_steps(*noisy_run(-5e-5)), log_validation(1.25))
    assert "out: Still improving" in run_analyze()  # out/training.log is the default
    pictures = ["convergence_analysis.png", "sample_efficiency.png"]
    assert sorted(os.listdir("out")) == [*pictures, "training.log"]
    log_file("short", log_steps([1], [3.0]), log_validation(1.0))
    assert "-0.2500" in run_analyze("out/training.log short/training.log --out new")
    pictures = ["convergence_analysis_1.png", "convergence_analysis_2.png"]
    assert sorted(os.listdir("new")) == [*pictures, "sample_efficiency.png"]


def test_analyze_refuses_bad_logs(run_analyze):
    log_file("good", log_steps(range(1, 50), [3.0] * 49))
    log_file("nan", log_steps([1, 2], [math.nan] * 2))
    for bad in ("missing", "nan"):
        arguments = f"good/training.log {bad}/training.log"
        assert f"{bad}/training.log" in run_analyze(arguments, refused=True)
    assert not Path("out").exists(), "a bad log beside a good one leaves nothing half done"
    assert "unrecognized arguments" in run_analyze("--no-such-flag", refused=True)


def test_analyze_starts_in_a_notebook():
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    command = [sys.executable, analyze.__file__, "--help"]
    subprocess.run(command, env=environment, capture_output=True, check=True)


# ---- Comparisons ---------------------------------------------------------------------------------


def write_compared_logs():
    """Logs of a static and of a wide model with seeds 1, 2 and 3; returns their paths."""
    paths = []
    of_seeds = [
        (1, 2.0, 1.9),
        (2, 2.2, 2.0),
        (3, 2.4, 2.1),
    ]
    for seed, static, wide in of_seeds:
        path = log_of_training(f"logs/static-{seed}", static, seed, "lr=0.002 n_ffn=0")
        paths.append(path)
        path = log_of_training(f"logs/wide-{seed}", wide, seed, "lr=0.002 n_ffn=604")
        paths.append(path)
    return " ".join(paths)


def test_analyze_compares_logs(run_analyze):
    logs = write_compared_logs()
    log_of_training("other", 2.5, 2, "n_ffn=604 lr=0.001")
    log_of_training("short", 2.5, 1, "max_steps=60")
    out = run_analyze(f"--compare {logs} other/training.log short/training.log")
    assert "short/training.log is left out: its last validation is at step 30 of 60" in out
    # The differences of the pairs are -0.1, -0.2 and -0.3: their sd is 0.1, and t(2) is 4.303.
    half = f"{4.303 * 0.1 / math.sqrt(3):.4f}"
    losses = ["2.0000", "0.1000", "-0.2000", "±", half]
    expected = ["3", "2013568", "512", *losses, "3", "0.1000", "30"]
    assert printed(out, "lr=0.002 n_ffn=604") == expected
    expected = ["nan", "+0.3000", "±", "nan", "1", "nan", "nan"]
    assert printed(out, "lr=0.001 n_ffn=604")[4:] == expected
    assert sorted(os.listdir("out")) == ["comparison.png", "runs.csv"]


def test_analyze_compares_what_it_wrote_and_names(run_analyze):
    out = run_analyze(f"--compare {write_compared_logs()}")
    table = out.split("wrote")[0]
    written = Path("out/runs.csv").read_bytes()
    out = run_analyze("--compare out/runs.csv")
    assert out.split("wrote")[0] == table
    assert "stays as it is" in out
    assert Path("out/runs.csv").read_bytes() == written
    # A name takes runs by their names or paths, from a runs.csv and from logs.
    log_of_training("logs/wide-7", 1.8, 3, "n_ffn=604 lr=0.004")
    names = "'plain=static-?' 'wide=wide-? lr=0.002' 'fast=logs/* lr=0.004'"
    out = run_analyze(f"--compare out/runs.csv logs/wide-7/training.log {names} --out new")
    assert printed(out, "wide") == printed(table, "n_ffn=604")
    assert printed(out, "fast")[3:5] == ["1.8000", "nan"]


@pytest.mark.parametrize(
    ("why", "arguments"),
    [
        ("trained on different data", "other/training.log"),
        ("two runs of one seed in 'all'", "all=*"),
        ("no finished run fits b=c", "b=c"),
        ("names no settings", "theirs/training.log"),
        ("no.csv is no runs.csv", "no.csv"),
        ("missing.csv", "missing.csv"),
    ],
)
def test_analyze_refuses_comparisons(run_analyze, why, arguments):
    logs = write_compared_logs()
    log_of_training("other", 1.9, 4, digest="23cd")
    log_file("theirs", AUTHORS_LOG)
    Path("no.csv").write_text("run,seed\nwide-1,1\n")
    assert why in run_analyze(f"--compare {logs} {arguments}", refused=True)


def test_analyze_repeats_the_comparisons_of_the_readme(run_analyze):
    runs = Path(analyze.__file__).parent / "assets" / "runs.csv"
    names = "'static=static-? lr=0.004' 'causal=causal-0.1-? lr=0.004'"
    out = run_analyze(f"--compare {runs} {names}")
    assert printed(out, "causal")[5:9] == ["-0.0166", "±", "0.0111", "8"]


# ---- Models --------------------------------------------------------------------------------------
def lively_model(**config):
    """A model of byte tokens whose signals move."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = ModulatedLM(NCNConfig(**sizes, ncn_hidden=8, dropout=0.0, **config)).eval()
    for weights in model.parameters():
        weights.data += 0.5 * torch.randn_like(weights)
    return model


def write_model_and_data(run, more=(), **config):
    """ckpt.pt, and in `data` the text on which it could have been trained: random letters."""
    letters = np.random.default_rng(0).choice([*"abcdefgh"], (40, 60))
    Path("text.txt").write_text("<|endoftext|>".join(map("".join, letters)))
    run("text.txt --tokenizer bytes --val_fraction 0.5", script=prepare)
    model = lively_model(**config)
    data = prepare.read_meta("data") | dict(more)
    model.save("ckpt.pt", data=data, settings={"rows": "aligned"})
    return model


def test_analyze_ablations_are_edits_by_hand():
    model = lively_model(salience="global")
    x, y = torch.randint(257, (2, 4, 32))
    y[0, 20:] = -1
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    losses, signals = analyze.ablations(model, batches)
    assert signals.shape == (128 - 12, 2, 3), "padding counts nowhere"
    mean = torch.from_numpy(signals.mean(0))

    def pin_precision(s):
        gain, precision, gate = s.unbind(-1)
        return torch.stack([gain, torch.ones_like(precision), gate], -1)

    for label, how in {
        "all mean": {"edit": lambda s: mean.expand_as(s)},
        "precision neutral": {"edit": pin_precision},
        "prefix only": {"salience": "causal"},
    }.items():
        by_hand = model(x[:2], y[:2], **how).task.item()
        assert losses[label][0] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("config", [{"salience": "global"}, {"signals": ("precision",)}])
def test_analyze_scan_and_audit(monkeypatch, run_analyze, config):
    model = write_model_and_data(run_analyze, **config)
    figures = []
    save = analyze.save

    def keep_and_save(fig, *rest):
        figures.append(fig)
        save(fig, *rest)

    monkeypatch.setattr(analyze, "save", keep_and_save)
    text = "He paid $5 and $6,\nbut it was empty."
    out = run_analyze(f"--scan '{text}' --audit --ckpt ckpt.pt")
    assert sorted(os.listdir("out")) == ["audit.png", "brain_scan.png"]
    tokens = torch.tensor([[256, *text.encode()[:31]]])  # after an END, as stories are
    precision = model.signals(tokens)[0, 1:, 0, 1]
    assert printed(out, "    0")[3] == f"{precision.mean():.3f}"
    scales = {ax.images[0].get_clim() for ax in figures[0].axes[:3]}
    assert len(scales) == 1, "all three signals have one"
    assert sum(scales.pop()) == pytest.approx(2), "neutral stands in its middle"
    assert ("the leak is" in out) == (model.config.salience == "global")


def test_analyze_refuses_models_and_data(run_analyze):
    assert "ckpt.pt" in run_analyze("--audit --ckpt ckpt.pt", refused=True)
    write_model_and_data(run_analyze, signals=())
    assert "no controller" in run_analyze("--audit --ckpt ckpt.pt", refused=True)
    write_model_and_data(run_analyze)
    assert "no tokens" in run_analyze("--scan '' --ckpt ckpt.pt", refused=True)
    assert "not trained on the demo" in run_analyze("--memory --ckpt ckpt.pt", refused=True)
    run_analyze("text.txt --tokenizer words --out words", script=prepare)
    arguments = "--audit --ckpt ckpt.pt --data words"
    assert "another tokenizer" in run_analyze(arguments, refused=True)


def test_analyze_memory_counts_the_words_of_slots(monkeypatch, run_analyze):
    entropy = {"entropy_nats_per_story": 32.5, "entropy_nats_per_token": 0.3}
    write_model_and_data(run_analyze, entropy, signals=())
    right = (
        "Once there was a girl named Mia. She had a red kite. One day, Mia and her friend Pip "
        "went to the park. Mia wanted a shiny coin for her mom. Mia hugged Pip."
    )
    two_heroes = right.replace("Mia hugged", "Sue hugged")
    no_colour = right.replace("red ", "")
    cut_short = right.ljust(200)  # it has no end
    stories = [right] * 100 + [two_heroes] * 50 + [no_colour] * 30 + [cut_short] * 20

    def generate(model, ids, max_new_tokens, temperature, top_k, seed, end_token):
        assert ids.eq(end_token).all()
        assert (temperature, top_k, seed, end_token) == (0.5, 0, 0, 256)
        rows = [list(story.encode()) + [256] * (200 - len(story)) for story in stories]
        return torch.cat([ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(analyze, "generate", generate)
    out = run_analyze("--memory --ckpt ckpt.pt")
    slots = [*prepare.SLOTS, "all of these"]
    counts = {slot: int(printed(out, slot)[0]) for slot in slots}
    expected = dict.fromkeys(prepare.SLOTS, 180)
    assert counts == expected | {"hero": 130, "colour": 150, "all of these": 100}


# ==== README.md ===================================================================================
FOLDER = Path(training.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


def help_of(module):
    shown = io.StringIO()
    with mock.patch.object(sys, "argv", ["x.py", "--help"]), contextlib.redirect_stdout(shown):
        with contextlib.suppress(SystemExit):
            module.main()
    return shown.getvalue()


def test_readme_flags_exist():
    helps = "".join(map(help_of, (analyze, prepare, sampling, training)))
    of_torchrun = {"--nproc_per_node", "--nnodes", "--rdzv", "--max", "--standalone"}
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", README))
    assert len(named) > 10
    assert named <= set(re.findall(r"--[a-z]\w+", helps)) | of_torchrun


def test_readme_files_exist():
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    quoted = re.findall(r"`([\w/]+\.(?:py|cu|txt|csv|md))`", README)
    assert len(linked) > 2
    for name in {*linked, *quoted}:
        assert (FOLDER / name).exists(), name


def test_readme_equations_link_to_their_lines():
    lines = (FOLDER / "ncn.py").read_text(encoding="utf-8").splitlines()
    links = re.findall(r"\[(\d+)\]\(ncn\.py#L(\d+)\)", README)
    assert len(links) > 10
    for equation, line in links:
        assert re.search(rf"Eq\..*\b{equation}\b", lines[int(line) - 1]), (equation, line)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path / "stories.txt", ["He said \"no\".", "A cat sat."])
    exec(snippet, {})
    for labelled in tmp_path.glob("labelled.txt"):
        assert [label for _, label in prepare.read_stories(labelled.read_bytes())] == [[0.31], [0]]


def with_head_gates(source):
    """ncn.py with the README's own signal, hunk by hunk."""
    diff = re.search(r"^```diff\n(@@.*?)^```", README, re.S | re.M)[1]
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


HEAD_GATES = """
import sys, torch, prepare, sample, train
from ncn import ModulatedLM, Memory

def run(main, *args):
    sys.argv = ["x.py", *args]
    assert main() == 0, args

run(prepare.main, "demo", "--max_mb", "0.1")
tiny = "--n_layer 1 --n_embd 16 --n_head 2 --ncn_hidden 4 --block_size 32 --val_sequences 8"
run(train.main, *tiny.split(), "--preset", "laptop", "--device", "cpu", "--max_steps", "3")
run(sample.main, "--prompt", "Once", "--max_new_tokens", "5", "--precision", "0.5")
sample.colours_are_shown = lambda: True
run(sample.main, "--prompt", "Once", "--max_new_tokens", "5", "--trace", "gain")
model = ModulatedLM.load("out/ckpt_best.pt")
x = torch.randn(1, 20, 16)
attention = model.blocks[0].attention
assert torch.equal(attention(x, head_gates=torch.ones(1, 20, 2)), attention(x))
assert not attention(x, head_gates=torch.zeros(1, 20, 2)).any()
ids = torch.arange(20)[None]
assert model.signals(ids).shape == (1, 20, 1, 5)
longer = sample.generate(model, ids, 9, temperature=0)
assert torch.equal(longer[:, 20:], model(longer)[:, 19:-1].argmax(-1))
one = model.state_dict()["controller.head_gates.weight"]
torch.manual_seed(42)
assert (one != ModulatedLM(model.config).state_dict()["controller.head_gates.weight"]).any()
"""


def test_readme_head_gates_train_and_generate(tmp_path):
    """A signal of one's own needs no edit outside ncn.py."""
    for path in [*FOLDER.glob("*.py"), FOLDER / "kernels.cu"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = (FOLDER / "ncn.py").read_text(encoding="utf-8")
    (tmp_path / "ncn.py").write_text(with_head_gates(source), encoding="utf-8")
    (tmp_path / "gates.py").write_text(HEAD_GATES)
    command = [sys.executable, "gates.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b[48;5;" in done.stdout
