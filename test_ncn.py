"""The whole test suite: pytest -q. Needs no network, no GPU, and nothing outside this folder."""

import collections
import contextlib
import csv
import ctypes
import functools
import gc
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import analyze
import kernels
import ncn
import prepare
import sample as sampling
import train as training
from ncn import SIGNALS, ModulatedLM, NCNConfig, salience_pool, salience_step
from prepare import END, tokenizer_of
from sample import generate, stream, window_start

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # cuda: a test that needs a GPU
if "cuda" not in " ".join(sys.argv[1:]):  # -m cuda; all other tests run as without a GPU: two processes want two
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
TINY = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, ncn_hidden=8, ncn_heads=2)
BYTES = {"tokenizer": "bytes", "vocab_size": 257}  # metadata


@pytest.fixture(autouse=True)
def exact_products():
    """train.py lets a GPU round its products; what is compared here must not depend on which test ran before."""
    torch.set_float32_matmul_precision("highest")


def lively(seed=0, **config):
    """A tiny model in float32 whose every weight, the controller's too, is far from where it starts."""
    torch.manual_seed(seed)
    model = ModulatedLM(NCNConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape, seed=0, vocab_size=61):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed), device="cpu")


# ==== Kernels =========================================================================================================
# g++ compiles the very same kernels.cu for the CPU behind a shim that runs one real thread per CUDA thread,
# and the launcher cpu_threads() takes the place of the GPU's.

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
    unsigned thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / 32, lane = thread % 32;
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
template <class A> A take(u64*& word) { A a; memcpy(&a, word, sizeof a); word += sizeof(a) / 8; return a; }
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

// In: kernel, removed barrier, grid, block; the arguments' words; address and size of each piece of memory; the pieces.
// Out: the pieces. They are allocated to the byte, so that the address sanitizer sees every step beyond.
int main() {
    std::vector<u64> head = numbers(), words = numbers(), pieces = numbers(), moved = words;
    removed = head[1], gridDim.x = head[2], gridDim.y = head[3], blockDim.x = head[4], blockDim.y = head[5];
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
    for (size_t m = 0; m < memory.size(); m++) fwrite(memory[m].get(), 1, pieces[2 * m + 1], stdout);
}
"""

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = [name for name in kernels._INSTANCES if "bf16" in name]  # every path of the templates: vectors, scalar loads
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU_PARAM = pytest.param(GPU, marks=(pytest.mark.cuda, NO_GPU))
ON_GPU = pytest.mark.parametrize("device", [GPU_PARAM], ids=str)
INSTANCES = {"": kernels._INSTANCES, "thread": BF16, "address": BF16}  # by sanitizer


@functools.cache
def shim_builds():
    """kernels.cu for CPU threads, plain and under each sanitizer -> their folder, and sanitizer -> program."""
    if not shutil.which("g++"):
        pytest.skip("no g++: kernels.cu cannot be run on the CPU")
    folder, builds = tempfile.TemporaryDirectory(prefix="ncn_kernels_"), {}
    shim = Path(folder.name, "shim.cpp")
    shim.write_text(SHIM)
    for sanitizer, names in INSTANCES.items():  # all compilers at once
        program = shim.with_name(f"run_{sanitizer}")
        command = ["g++", "-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
                   "-fno-strict-aliasing", f"-DKERNELS={', '.join(f'kernel({n})' for n in names)}", "-o", program, shim,
                   f"-I{kernels._SOURCE.parent}"]
        command += [f"-fsanitize={sanitizer}"] if sanitizer else []
        builds[sanitizer] = program, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _, compiler in builds.values():
        errors = compiler.communicate()[1]
        assert compiler.returncode == 0 and not errors, errors
    return folder, {sanitizer: program for sanitizer, (program, _) in builds.items()}


def cpu_threads(sanitizer="", removed_barrier=0):
    """A launcher, like kernels._cuda's, that runs each kernel in a process of its own on CPU threads."""
    program = shim_builds()[1][sanitizer]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}

    def launch(name, grid, block, tensors, numbers):
        memory = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t is not None)}
        pack, buffer, _ = kernels._packer(tensors, numbers)
        pack(buffer, 0, *(0 if t is None else t.data_ptr() for t in tensors), *numbers)
        head = INSTANCES[sanitizer].index(name), removed_barrier, *grid, *block
        parts = head, memoryview(buffer).cast("B").cast("q"), [n for piece in memory.items() for n in piece]
        data = b"".join(struct.pack(f"{len(part) + 1}q", len(part), *part) for part in parts)
        data += b"".join(ctypes.string_at(*piece) for piece in memory.items())
        done = subprocess.run([program], input=data, capture_output=True, env=environment)
        assert done.returncode == 0, f"{name} {grid} {block}: {done.stderr[:3000].decode()}"
        for address, size in memory.items():
            ctypes.memmove(address, done.stdout, size)
            done.stdout = done.stdout[size:]
    return launch


# ---- Values ----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["eager", "cpu threads", pytest.param("gpu", marks=GPU_PARAM.marks)])
def backend(request, monkeypatch):
    """What computes, and where: on a GPU, all tensors that the test makes are made there."""
    if request.param == "cpu threads":
        monkeypatch.setitem(kernels._launchers, CPU, cpu_threads())
    with torch.device(GPU) if request.param == "gpu" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def poison():
    """torch.empty is filled with NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse
    assert torch.empty(9).isnan().all() and torch.ones(9).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_rounded(got, want, dtype, what):
    """Equal up to one rounding to got's dtype of a result that is good to fp32. Where matrix products in half precision
    come before (linear_ce), up to a few."""
    want = want.double()
    rounding = torch.finfo(got.dtype).eps / 2 if got.is_floating_point() else 0
    scale = max(1.0, want.where(want.isfinite(), 0).abs().max().item())  # of 1: where large terms cancel
    if "linear_ce" in what:
        rounding, scale = 0, scale * (1 + 4 * torch.finfo(dtype).eps / 4e-6)
    bound = 1.02 * rounding * want.abs() + 4e-6 * scale + (6e-8 if got.dtype == torch.float16 else 1e-30)
    wrong = ~(((got.double() - want).abs() <= bound) | (got.double() == want) | (got.isnan() & want.isnan()))
    assert got.shape == want.shape and not wrong.any(), (what, wrong.sum(), got[wrong][:5], want[wrong][:5])


def compare(function, reference, inputs, what, dtype=None):
    """A function against its reference in float64: outputs and gradients."""
    for got, want in zip(kernels.step(function, inputs)(), kernels.exact(reference, inputs), strict=True):
        assert_rounded(got, want, dtype or got.dtype, what)


def compare_kernels(rows, d, dtype, device=CPU, seed=0, only=""):
    for name, (function, reference, inputs, _) in kernels.cases(rows, d, dtype, device, seed).items():
        if only in name:
            compare(function, reference, inputs, f"{name} {rows} x {d} {dtype}", dtype)


HALF = torch.float16, torch.bfloat16
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(kernels._TYPES), ids=str)
KERNEL_SHAPES = (1, 1), (37, 7), (300, 31), (19, 256), (6, 257), (2, 515), (28, 113), (13, 61)  # rows, width


@EVERY_DTYPE
def test_kernel_values(dtype, backend, poison):
    for seed, (rows, d) in enumerate(KERNEL_SHAPES):
        compare_kernels(rows, d, dtype, torch.get_default_device(), seed)


@EVERY_DTYPE
def test_kernel_extreme_values(dtype, backend, poison):
    V, inf, nan, at = 71, float("inf"), float("nan"), torch.arange(71)
    rows = torch.stack([torch.full((V,), 1e4), torch.full((V,), -1e4), torch.zeros(V), torch.where(at == 5, 1e4, -1e4),
                        torch.where(at == 7, 0.0, -inf), torch.linspace(-1e4, 1e4, V), torch.where(at < 70, -inf, 3.0),
                        torch.randn(V), torch.full((V,), -inf), torch.where(at == 3, nan, 1.0)]).to(dtype)
    for target, gap in itertools.product((5, 7, 70, -1), (0, 9)):  # rows further apart than they are wide, or not
        targets, ignored = torch.full((len(rows),), target), target < 0
        want = rows.double().log_softmax(1)
        p = (want.exp() - F.one_hot(targets.clamp(min=0), V)) * (not ignored)
        logits, again = (F.pad(rows, (0, gap), value=3.0) for _ in range(2))
        loss, gradient = kernels._softmax_loss(logits[:, :V], targets, True)
        assert_rounded(loss, torch.zeros(len(rows)) if ignored else -want[:, target], dtype, "softmax")
        assert_rounded(gradient[:8], p[:8], dtype, "softmax")
        assert (logits[:, V:] == 3).all() and (ignored or gradient[8].isnan().all())
        loss_alone, _ = kernels._softmax_loss(again[:, :V], targets, False)
        good = slice(None if ignored else 8)  # the last two rows: NaN where the target counts
        assert torch.equal(loss_alone[good], loss[good])

    z = torch.tensor([[-1e4] * 3, [1e4] * 3, [inf] * 3, [-inf] * 3, [0.0] * 3, [nan] * 3]).to(dtype).requires_grad_()
    signals = kernels.actuate(z)
    want = torch.tensor([[0, 0.01, 0], [2, 4, 1], [2, 4, 1], [0, 0.01, 0], [1, 0.7031472, 0.5], [nan] * 3])
    assert signals.dtype == torch.float32
    assert_rounded(signals.detach(), want, torch.float32, "actuate")
    slope, = torch.autograd.grad(signals[:5].sum(), z)
    assert not slope[:4].any() and torch.allclose(slope[4].float(), torch.tensor([0.5, 0.5, 0.25]))

    x = torch.tensor([[0.0] * 9, [6e4] * 9, [6e-8] * 9]).to(dtype).requires_grad_()
    weight = torch.ones(9, requires_grad=True)
    compare(kernels.rms_norm, lambda x, w: F.rms_norm(x, (9,), w, 1e-5), (x, weight), "rms_norm", dtype)


def test_kernel_views_and_mixed_types(backend, poison):
    """Rows at odd addresses, a transposed input, a bfloat16 branch on a float residual, (B, T) leading dimensions."""
    x, w = torch.randn(3 * 4 * 32 + 1)[1:].view(3, 4, 32), torch.randn(33)[1:]
    for view in (x, x.transpose(0, 1), x.transpose(1, 2)[..., :4], x.bfloat16()[..., 1:]):
        inputs = view.detach().requires_grad_(), w[:view.shape[-1]].clone().requires_grad_()
        compare(kernels.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), inputs, "rms_norm", view.dtype)
    y, residual, z = torch.randn(2, 5, 33).bfloat16(), torch.randn(2, 5, 33), torch.randn(2, 5, 4, 3)
    turned = [t.transpose(0, 1) for t in (y.half(), residual.half(), z)]
    for inputs in ((y, residual, z), (y.half(), residual, z), (y, residual.bfloat16(), z), turned):
        inputs = [t.detach().requires_grad_() for t in inputs]
        compare(lambda y, r, s: kernels.modulate(y, r, s[:, :, 1, :1]),
                lambda y, r, s: r + s[:, :, 1, :1] * y, inputs, "modulate")
        compare(lambda y, r, s: kernels.modulate(y, r, s[:, :, 1, :1], s[:, :, 1, 2:]),
                lambda y, r, s: r + s[:, :, 1, :1] * s[:, :, 1, 2:] * y, inputs, "modulate")


@pytest.mark.parametrize("T, at, dtype", [(1, 0, torch.float32), (1, 10, torch.bfloat16), (4, 7, torch.float16),
                                          (11, 0, torch.float32)])
def test_kernel_cache_strides_and_positions(T, at, dtype, backend):
    """Against plain slicing, over the whole of the memory behind the cache: nothing else is written."""
    k, v = (t.view(2, T, 3, 20).transpose(1, 2) for t in torch.randn(2, T, 180).to(dtype).split(60, dim=2)[1:])
    for swap in ((0, 0), (1, 2), (2, 3)):  # a window in the memory, with its dimensions in three orders
        memory = [torch.randn(2, 5, 15, 20).to(dtype).transpose(*swap).contiguous() for _ in "kv"]
        want = [m.clone() for m in memory]
        windows = [m.transpose(*swap)[:, 1:4, 2:13] for m in memory + want]
        for window, new in zip(windows[2:], (k, v), strict=True):
            window[:, :, at:at + T] = new
        kernels.write_cache(*windows[:2], k, v, torch.tensor([at] if T == 4 else at))
        assert all(map(torch.equal, memory, want))
    cache, past_the_end = windows[0][:, :, :at + T - 1], torch.tensor(at)
    if backend == "eager":
        with pytest.raises(IndexError):
            kernels.write_cache(cache, cache.clone(), k, v, past_the_end)
    elif cache.numel():  # what fits is written, the rest goes nowhere
        memory[0].fill_(7)
        kernels.write_cache(cache, cache.clone(), k, v, past_the_end)
        assert torch.equal(cache[:, :, at:], k[:, :, :-1]) and (memory[0] != 7).sum() == k[:, :, :-1].numel()


# ---- Races and bounds ------------------------------------------------------------------------------------------------
WATCHED = (3, 7, ""), (19, 40, ""), (3, 70, ""), (6, 257, "rms"), (2, 257, "modulate")  # 512 threads are slow to watch


def four_blocks(x, work, threads, per_processor=4):
    return min(4, -(-work // threads))  # so that a block has several rows, one after the other


@pytest.mark.parametrize("sanitizer, dtype, shapes", [
    ("thread", torch.bfloat16, WATCHED), ("address", torch.bfloat16, (*WATCHED, (2, 4100, "rms"))),
    ("", torch.bfloat16, ((6, 4100, "rms"), (3, 5001, "modulate"), (3, 1100, "softmax"))),  # rows wider than registers
    ("", torch.float16, ((1, 65536, "rms"),))], ids=["races", "bounds", "wide", "wider"])
def test_kernel_races_bounds_and_wide_rows(sanitizer, dtype, shapes, monkeypatch, poison):
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads(sanitizer))
    monkeypatch.setattr(kernels, "_blocks", four_blocks)
    for rows, d, only in shapes:
        compare_kernels(rows, d, dtype, only=only)


@pytest.mark.parametrize("barrier", [
    n for n, line in enumerate(kernels._SOURCE.read_text().split("\n"), 1) if "__syncthreads();" in line])
def test_kernel_every_barrier_matters(barrier, monkeypatch):
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads("thread", barrier))
    monkeypatch.setattr(kernels, "_blocks", four_blocks)
    with pytest.raises(AssertionError, match="data race"):
        for rows, d in ((19, 40), (6, 257)):
            compare_kernels(rows, d, torch.bfloat16, only="rms")


def test_kernel_address_sanitizer_sees_one_byte():
    x = torch.zeros(8, dtype=torch.bfloat16)  # 9 elements are claimed, 8 are there
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        cpu_threads("address")("rms_norm_forward<bf16>", (1, 1), (32, 8), (
            torch.empty_like(x), torch.zeros(1), x, torch.zeros(9)), (1, 9, 1e-5))


# ---- The GPU compilers -----------------------------------------------------------------------------------------------
@functools.cache
def cubins():
    """All instances, by nvcc -> their folder, and for sm_75, 80 and 90 (cubin, what ptxas says)."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    folder = tempfile.TemporaryDirectory(prefix="ncn_nvcc_")
    source, instances = Path(folder.name, "all.cu"), ", ".join(f"(void*){name}" for name in kernels._INSTANCES)
    source.write_text(f"{kernels._SOURCE.read_text()}void* instances[] = {{{instances}}};\n")
    jobs = {sm: (source.with_name(f"{sm}.cubin"), subprocess.Popen(
        ["nvcc", "-cubin", "-std=c++17", "-Xptxas", "-v", source, "-o", source.with_name(f"{sm}.cubin"),
         f"-arch=sm_{sm}"], stderr=subprocess.PIPE, text=True)) for sm in (75, 80, 90)}
    logs = {sm: (cubin, job.communicate()[1]) for sm, (cubin, job) in jobs.items()}
    assert not any(job.returncode for _, job in jobs.values()), logs
    return folder, logs


def test_kernel_registers():
    for sm, (_, log) in cubins()[1].items():
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert "warning" not in log and len(spills) == len(kernels._INSTANCES) and set(spills) == {("0", "0")}, log
        # A processor has 65,536 registers: at 64 of them two blocks of 512 threads fit, at 40, from sm_80 on, three.
        for kernel, used in re.findall(r"entry function '_Z\d+([a-z_]+).*\n.*\n.*\n.*Used (\d+) registers", log):
            assert int(used) <= (40 if kernel == "softmax_loss" and sm > 75 else 64), (sm, kernel, used)


def wide_loads(sass):
    """Of each basic block that loads 16 bytes at a time: kernel, types (mangled), instructions, the number of these
    loads, and whether all are issued before the first of them is used."""
    for kernel, types, body in re.findall(r"Function : _Z\d+([a-z_]+)I(\w+?)Ev(.*?)\.{9}", sass, re.S):
        code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;/]+);", body)]
        starts = {int(to, 16) for _, line in code for to in re.findall(r"\b(?:BRA|BSSY)\b.* 0x(\w+)", line)}
        starts |= {at + 16 for at, line in code if re.search(r"\b(BRA|EXIT|RET|CALL)\b", line)}
        edges = [n for n, (at, _) in enumerate(code) if at in starts]
        for block in (code[i:j] for i, j in itertools.pairwise([0, *edges, len(code)])):
            loads = [n for n, (_, line) in enumerate(block) if re.search(r"\bLDG\S*\.128", line)]
            loaded, early = set(), True
            for _, line in block[loads[0]:loads[-1] + 1] if loads else ():
                registers = [int(r) for r in re.findall(r"\bR(\d+)", line)]
                early &= not loaded & set(registers)
                loaded |= set(range(registers[0], registers[0] + 4)) if ".128" in line else set()
            if loads:
                yield kernel, types, block, len(loads), early


@pytest.mark.parametrize("sm", [75, 80, 90])
def test_kernel_loads_back_to_back(sm):
    """In the machine code, all 16-byte loads of a vector's operands come before the first use of one; and the softmax's
    two loops over whole vectors take at most 150 instructions."""
    triton = importlib.util.find_spec("triton")  # brings the tool along
    tool = shutil.which("cuobjdump") or triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not tool or not Path(tool).exists():
        pytest.skip("no cuobjdump")
    sass = subprocess.run([tool, "-sass", cubins()[1][sm][0]], capture_output=True, text=True, check=True).stdout
    kinds, softmax = collections.Counter(), collections.Counter()
    for kernel, types, block, loads, early in wide_loads(sass):
        first, second = (2 - ("f16" in t or t == "S0_") for t in re.match(r"(f|\d[bf]+16)(f|S\d?_|)", types).groups())
        vector = {"rms_norm_forward": first + 2, "rms_norm_backward": 2 * first + 2, "softmax_loss": first,
                  "modulate_forward": first + second, "modulate_backward": first + second}.get(kernel)
        if vector:
            assert early and loads == vector, (kernel, types, loads, early, block)
            kinds[kernel, types] += 1
        if kernel == "softmax_loss":
            softmax[types] += len(block)
            assert f"0x{block[0][0]:x}" in block[-1][1], "the loop over whole vectors has a branch"
    assert len(kinds) == 3 * 3 + 2 * 5 and max(n for t, n in softmax.items() if sm > 75 or t != "4bf16") <= 150, softmax


@pytest.mark.parametrize("major", ["12", "13"])
def test_kernel_nvrtc(major):
    """The compiler that is used at run time, with no include path. It needs no GPU."""
    try:
        nvrtc = kernels._nvrtc(major)
    except OSError as error:
        pytest.skip(f"no NVRTC {major}: {error}")
    symbols, cubin = kernels._compile(nvrtc, kernels._INSTANCES, "90")
    assert cubin[:4] == b"\x7fELF" and list(symbols) == kernels._INSTANCES
    assert all(s.encode() in cubin for s in symbols.values())
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        kernels._compile(nvrtc, ["no_such_kernel<float>"], "90")


# ---- The road to the GPU, with a driver that only writes down what it is asked ---------------------------------------
class FakeDriver:
    """Stands in for libcuda: notes every call; a launch is decoded as the GPU would read it."""
    calls, fail, published = [], None, False

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            self.published |= GPU in kernels._launchers
            if name == "cuModuleGetFunction":
                args[0]._obj.value = 1000 + self.calls.count(name)
            if name == "cuLaunchKernel":
                self.meanwhile()
                self.launch = (args[0].value, *args[1:8], args[8].value)
                self.words = [ctypes.cast(p, ctypes.POINTER(ctypes.c_int64))[0] for p in args[9]]
                self.strides = list(ctypes.cast(args[9][-1], ctypes.POINTER(ctypes.c_int64))[:4])
            return 1 if name == self.fail else 0
        return call

    def meanwhile(self):
        """What another thread does before the driver reads the arguments."""


def test_kernel_launch(monkeypatch):
    driver, tensor = FakeDriver(), type("Tensor", (), {"device": GPU, "is_cuda": True, "dtype": None})
    for module, name, value in (
            (kernels, "_launchers", {}), (kernels, "_reasons", {}), (torch.version, "cuda", "13.0"),
            (kernels, "_cubin", lambda arch: ({n: n for n in kernels._INSTANCES}, arch)),
            (ctypes, "CDLL", lambda name: driver), (torch.cuda, "get_device_capability", lambda device: (9, 0))):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x123456789a + index, raising=False)
    kernels._launcher(tensor)
    launch = kernels._launchers[GPU]
    assert not driver.published  # no other thread can have seen a launcher whose functions are not there yet
    assert driver.calls.count("cuModuleGetFunction") == len(kernels._INSTANCES) and "cuLaunchKernel" not in driver.calls
    assert driver.calls[-1] == "cuCtxPopCurrent_v2"
    x, strides = torch.zeros(3), struct.pack("4q", 1, 1 << 33, 3, 4)
    arguments = (x, None), (1 << 40, 1e-5, -7, strides)

    def launch_another():
        driver.meanwhile = lambda: None
        launch("softmax_loss<float>", (1, 1), (32, 1), (None, None), (1, 2.0, 3, bytes(32)))
    for driver.meanwhile in (lambda: None, launch_another):
        driver.calls = []
        launch("softmax_loss<float>", (5, 2), (64, 4), *arguments)
        calls = ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
        assert driver.calls in (calls, calls[:2] + calls + calls[2:])
        function = 1001 + kernels._INSTANCES.index("softmax_loss<float>")
        assert driver.launch == (function, 5, 2, 1, 64, 4, 1, 0, 0x123456789a)
        assert driver.words == [x.data_ptr(), 0, 1 << 40, struct.unpack("q", struct.pack("d", 1e-5))[0], -7, 1]
        assert driver.strides == [1, 1 << 33, 3, 4]
    driver.fail = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match="driver error 1"):
        launch("softmax_loss<float>", (1, 1), (32, 1), *arguments)
    assert driver.calls[-1] == "cuCtxPopCurrent_v2"  # the context stack is left as it was

    def no_library(name):
        raise OSError(f"{name}: not found\nmore")
    for fail, library, version, reason in (("cuModuleLoadData", ctypes.CDLL, "13.0", "driver error 1 in kernels.py"),
                                           (None, no_library, "13.0", "not found"), (None, None, None, "NVIDIA GPU")):
        monkeypatch.setattr(ctypes, "CDLL", library)
        monkeypatch.setattr(torch.version, "cuda", version)
        driver.fail = fail
        kernels._reasons.clear()
        kernels._launchers.clear()
        kernels._launcher(tensor)
        assert GPU not in kernels._launchers and kernels._reasons[GPU].endswith(reason)


def test_kernel_grid():
    for width in (*range(1, 700), 4096, 4097, 50257, 65536):
        (blocks, one), (group, groups) = kernels._row_grid(torch.empty(0), 10 ** 12, width)
        assert one == 1 and 1 <= blocks <= 32 and group in (32, 64, 128, 256, 512)
        assert group == 512 or group * 8 >= width and (group == 32 or group * 4 < width)  # the row fits, tightly
        assert groups == (8 if group == 32 else 1) and kernels._row_grid(torch.empty(0), 1, width)[0] == (1, 1)
        few = kernels._row_grid(torch.empty(0), 10 ** 12, width, few=True)[0][0]
        assert 4 <= few <= blocks and few * group * groups >= 1024


def test_kernel_cubin_is_kept_on_disk(tmp_path, monkeypatch):
    source, result, compiled = tmp_path / "kernels.cu", ({"name": "symbol"}, b"\x7fELF\n\n\x00"), []
    monkeypatch.setattr(kernels, "_SOURCE", source)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "_nvrtc", lambda major: major)
    monkeypatch.setattr(kernels, "_compile", lambda nvrtc, names, arch: compiled.append((nvrtc, arch)) or result)
    for text, arch, count in (("// 1", "90", 1), ("// 1", "90", 1), ("// 1", "80", 2), ("// 2", "90", 3)):
        source.write_text(text)
        assert kernels._cubin(arch) == result and len(compiled) == count
    files = list((tmp_path / "__pycache__").iterdir())
    assert compiled == [("13", "90"), ("13", "80"), ("13", "90")] and len(files) == 3  # no half-written file is left
    for file in files:
        file.write_bytes(b"{damaged")
    assert kernels._cubin("90") == result and len(compiled) == 4


def test_kernel_eager_where_it_must(monkeypatch):
    """Odd types and shapes, empty tensors, torch.compile: the eager definition, whatever launcher there is."""
    monkeypatch.setitem(kernels._launchers, CPU, lambda *_: 1 / 0)
    x, w, gain, at, z = torch.ones(2, 3), torch.ones(3), torch.ones(2, 1), torch.tensor(1), torch.zeros(2, 4, 3)
    cache, new = torch.zeros(2, 1, 1, 4, 3), torch.ones(2, 1, 1, 2, 3)
    for kernel, *inputs in ((kernels.rms_norm, x, w), (kernels.actuate, z), (kernels.modulate, x, x, gain),
                            (kernels.write_cache, *cache, *new, at), (kernels._softmax_loss, x, at.expand(2), True)):
        with pytest.raises(ZeroDivisionError):
            kernel(*inputs)
    for odd in (x.double(), x[:0]):
        kernels.rms_norm(odd, w)
    kernels.rms_norm(x, w[:1])  # a weight shorter than the row would be read beyond its end
    assert kernels.actuate(z.double()).dtype == torch.float32
    for odd in ((x, x, gain.half()), (x, x.half(), gain), (x, x, gain[:1])):
        kernels.modulate(*odd)
    kernels.write_cache(*cache, *new.half(), at)
    kernels.write_cache(*cache, *new, at.int())
    with pytest.raises(RuntimeError):
        kernels.write_cache(*cache, *new.expand(2, 1, 2, 2, 3), at)  # 2 heads into 1
    meta = torch.device("meta")
    monkeypatch.setitem(kernels._launchers, meta, kernels._launchers[CPU])
    many = torch.zeros(1 << 20, 1 << 11, 1, 1, device=meta)  # more vectors than 31 bits count
    kernels.write_cache(many, many, many, many, torch.tensor([0], device=meta))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    kernels.rms_norm(x, w)
    kernels.actuate(z)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.backend() == "kernels: eager (no GPU)"


def fake_gpus(monkeypatch, count):
    """As many GPUs, as far as choosing one goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_pick_device(monkeypatch):
    for count, rank, name, want in ((0, 0, "auto", "cpu"), (0, 1, "cpu", "cpu"), (1, 0, "auto", "cuda:0"),
                                    (2, 1, "cuda", "cuda:1"), (2, 1, "cpu", "cpu")):
        fake_gpus(monkeypatch, count)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert kernels.pick_device(name) == torch.device(want)
    assert torch.get_float32_matmul_precision() == "highest"  # or TF32 would round what is kept in fp32 on purpose
    fake_gpus(monkeypatch, 1)
    for name, words in (("auto", "process 2 .* torch finds 1"), ("mps", "no Apple GPU")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ValueError, match=words):
            kernels.pick_device(name)
    assert kernels.backend(CPU) == "kernels: eager (no GPU)"


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------
@EVERY_DTYPE
def test_kernel_linear_cross_entropy(dtype, backend, monkeypatch, poison):
    """Over several chunks, in fp32 or under autocast (half precision products, fp32 sums: small terms survive over many
    tokens, 1/N does not underflow); ignored targets; no valid target; a second backward pass; no gradient."""
    N, V, d = (200, 300, 8) if backend == "cpu threads" else (300, 50257, 8)
    monkeypatch.setattr(kernels, "LOGIT_BYTES", 150 * V * dtype.itemsize)  # at least three chunks
    h, w = torch.randn(2, N, d, requires_grad=True), (torch.randn(V, d) / 3).requires_grad_()
    targets = tokens(2, N).to(h.device) - 1
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in (h, w)]
    want = F.cross_entropy((rounded[0] @ rounded[1].T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    bound = 4 * torch.finfo(dtype).eps if dtype in HALF else 1e-5
    with torch.autocast(h.device.type, dtype if dtype in HALF else None, enabled=dtype in HALF):
        loss = kernels.linear_cross_entropy(h, w, targets)
        assert loss.dtype == torch.float32 and loss.shape == () and abs(loss.item() / want.item() - 1) < bound / 10
        first, second = (torch.autograd.grad(3 * loss, (h, w), retain_graph=True) for _ in range(2))
        for got, again, exact in zip(first, second, torch.autograd.grad(3 * want, rounded), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, again)
            assert (got - exact).norm() <= bound * exact.norm()
        assert (first[1] == 0).float().mean() < 1e-3
        only_h, = torch.autograd.grad(kernels.linear_cross_entropy(h, w.detach(), targets), h)
        assert torch.allclose(3 * only_h, first[0], rtol=1e-5)
        none = kernels.linear_cross_entropy(h, w, torch.full_like(targets, -1))
        assert none.item() == 0 and not any(g.any() for g in torch.autograd.grad(none, (h, w)))
        with torch.no_grad():
            assert kernels.linear_cross_entropy(h, w, targets).item() == loss.item()
            spread = targets.flatten().int().repeat_interleave(2)[::2]  # every other element of a narrower type
            assert kernels.linear_cross_entropy(h.flatten(0, 1), w, spread).item() == loss.item()


@EVERY_DTYPE
def test_kernel_head_stays_within_the_vocabulary(dtype, poison):
    """Odd vocabularies leave gaps in the buffer of logits; whatever lies there has no part in a product."""
    for N, V, d in (48, 61, 32), (100, 567, 128):
        inputs = torch.randn(N, d).to(dtype).requires_grad_(), torch.randn(V, d).to(dtype).requires_grad_()
        loss = kernels.linear_cross_entropy(*inputs, tokens(N, vocab_size=V))
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


@EVERY_DTYPE
def test_kernel_head_in_whole_tiles(dtype, monkeypatch, poison):
    """The GPU's way, here on a CPU: columns in multiples of 64, chunks of 128, a gradient added up in float32 by the
    product itself. The padding changes no number."""
    N, V, d = 300, 301, 24
    h, w, targets = torch.randn(N, d).to(dtype), torch.randn(V, d).to(dtype) / 3, tokens(N, vocab_size=V)
    inputs, seen, added = (h.requires_grad_(), w.requires_grad_()), [], []

    def addmm(total, a, b, out_dtype, out):  # a CPU's has no out_dtype
        added.append(len(b))
        assert out is total and out.dtype == out_dtype == torch.float32 and a.dtype == b.dtype == dtype
        return out.add_(a.float() @ b.float())

    def softmax_loss(logits, *rest, real=kernels._softmax_loss):
        seen.append((*logits.shape, logits.stride(0)))
        return real(logits, *rest)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(kernels, "_softmax_loss", softmax_loss)
    exact = kernels.exact(lambda h, w: F.cross_entropy(h @ w.T, targets), inputs)
    results = []
    for tiles, rows in (False, 128), (True, 200):
        monkeypatch.setattr(kernels, "_tensor_cores", lambda h, tiles=tiles: tiles)
        monkeypatch.setattr(kernels, "LOGIT_BYTES", rows * (320 if tiles else V) * dtype.itemsize)
        results.append(kernels.step(lambda h, w: kernels.linear_cross_entropy(h, w, targets), inputs)())
    assert seen == [(n, V, stride) for stride in (304, 320) for n in (128, 128, 44)]
    (loss, dh, dw), tiled = results
    assert torch.equal(tiled[0], loss) and tiled[2].shape == dw.shape
    torch.testing.assert_close(tiled[1], dh, rtol=torch.finfo(dtype).eps, atol=1e-8)
    if dtype == torch.float32:
        torch.testing.assert_close(tiled[2], dw, rtol=1e-6, atol=1e-8)
    else:  # a rounding less
        assert added == [128, 128, 44] and (tiled[2] - exact[2]).norm() <= (dw - exact[2]).norm()


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_kernel_under_torch_compile(dtype, bound, monkeypatch):
    """Compiled values and gradients are the eager ones, here and in torch 2.11, which lost those below every norm."""
    def model(x, w, z, head, targets, cache, position):
        x = kernels.rms_norm(x, w)
        signals = kernels.actuate(z)
        x = kernels.modulate(kernels.rms_norm(x.to(dtype), w), x, signals[..., 0, :1], signals[..., 0, 2:])
        kernels.write_cache(cache, cache, x[:, None, :2], x[:, None, 2:4], position)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return kernels.linear_cross_entropy(x, head, targets)

    monkeypatch.setattr(kernels, "LOGIT_BYTES", 3 * 30 * dtype.itemsize)  # three chunks
    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 4, 16), (16,), (2, 4, 2, 3), (30, 16))]
    rest = torch.arange(-1, 7).view(2, 4), torch.zeros(2, 1, 6, 16), torch.tensor([3])
    out = model(*inputs, *rest)
    monkeypatch.setattr(kernels, "_tensor_cores", lambda h: dtype == torch.bfloat16)  # with padding, and without
    compiled = torch.compile(model, fullgraph=True)(*inputs, *rest)
    for want, got in ((out, compiled), *zip(torch.autograd.grad(out, inputs), torch.autograd.grad(compiled, inputs),
                                            strict=True)):
        assert (got - want).norm() <= bound * want.norm()


def test_kernel_table(monkeypatch, capsys):
    """With kernels (here on CPU threads) and without; a case that fails is named, be it for want of memory."""
    assert 0.01 < kernels._seconds(lambda: time.sleep(0.01)) < 0.1

    def short_of(*_):
        raise torch.OutOfMemoryError

    def some(rows, d, *rest, every=kernels.cases):
        actuate, modulate = list(every(7, 32, *rest).items())[1:3]
        return dict((actuate, modulate, ("9", (short_of, *actuate[1][1:]))))

    monkeypatch.setattr(kernels, "cases", some)
    monkeypatch.setattr(kernels, "_seconds", lambda run, captured=True: run() and 1e-6)
    monkeypatch.setattr(torch, "compile", short_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for launchers in {}, {CPU: cpu_threads()}:
        monkeypatch.setattr(kernels, "_launchers", launchers)
        kernels.main(7, 300, 8)
        out = capsys.readouterr().out
        assert out.startswith(kernels.backend()) and "test_kernel_values" in out and not kernels._force_eager
        assert 0.1 < float(re.search(r"\nof a launch, (\S+) us are Python's\n", out)[1]) < 100
        row = error_time = r" +\d\.\de-\d\d +1 us"
        row += error_time + r" +0% +1\.00x OutOfMemoryError" if launchers else ""
        assert len(re.findall(rf"(?m)^[23] .* 40 x 256{row}$", out)) == 6
        assert len(re.findall(r"(?m)^9 .* OutOfMemoryError$", out)) == 3
        assert len(re.findall(r"(?m) 0\.0 ms +\d+ MiB$", out)) == 2 + hasattr(F, "linear_cross_entropy")


def test_kernel_peak_memory():
    before, block = kernels.peak_memory(CPU, reset=True), torch.ones(1 << 24)
    if not before:
        pytest.skip("only Linux tells")
    assert 60 << 20 < kernels.peak_memory(CPU) - before < 100 << 20
    del block
    assert kernels.peak_memory(CPU, reset=True) < before + (20 << 20)


@pytest.mark.parametrize("device", [CPU, GPU_PARAM], ids=str)
def test_kernel_model(device, monkeypatch):
    """Loss and every gradient of a small model, with the fused kernels and without."""
    if device == CPU:
        monkeypatch.setitem(kernels._launchers, CPU, cpu_threads())
    results = []
    for force in (False, True):
        monkeypatch.setattr(kernels, "_force_eager", force)
        model, ids = lively().to(device), tokens(2, 13).to(device)
        model(ids[:, :-1], ids[:, 1:]).total.backward()
        results.append([model(ids).detach(), *(p.grad for p in model.parameters())])
    assert not all(map(torch.equal, *results))  # the kernels did run
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("device", [CPU, GPU_PARAM], ids=str)
def test_kernel_launches_of_a_micro_batch(device, monkeypatch):
    """No eager definition steps in unseen: six layers under fp16 autocast, thirteen chunks of the head, all counted."""
    launched = collections.Counter()
    if device == CPU:
        monkeypatch.setitem(kernels._launchers, CPU, lambda *_: None)
    assert kernels.backend() == "kernels: fused CUDA" or device == CPU
    monkeypatch.setitem(kernels._launchers, device, lambda name, *rest, real=kernels._launchers[device]:
                        launched.update([name]) or real(name, *rest))
    monkeypatch.setattr(kernels, "LOGIT_BYTES", 1)  # a token per chunk
    model, ids = lively(n_layer=6).to(device).train(), tokens(1, 14).to(device)
    with torch.autocast(device.type, torch.float16):
        model(ids[:, :-1], ids[:, 1:]).total.backward()
    both = {"rms_norm_{}<float>": 14, "modulate_{}<f16, float>": 12, "actuate_{}<f16>": 1}
    assert launched == {"softmax_loss<f16>": 13, **{name.format(way): n for name, n in both.items()
                                                    for way in ("forward", "backward")}}


# ---- On a GPU alone --------------------------------------------------------------------------------------------------
GPU_SHAPES = (8192, 256), (300, 1100), (333, 5000), (3, 16384)


def test_kernel_gpu_tests_fit_a_small_card():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" or "cuda" in " ".join(sys.argv[1:])
    for rows, d in GPU_SHAPES:
        for _, _, inputs, _ in kernels.cases(rows, d, torch.float32, "meta").values():
            assert sum(i.numel() * 8 for i in inputs) < 1 << 28  # bytes in float64, of which there are a few copies


@ON_GPU
@EVERY_DTYPE
def test_kernel_on_gpu(dtype, device, poison):
    assert kernels.backend() == "kernels: fused CUDA"
    for seed, (rows, d) in enumerate(GPU_SHAPES):
        compare_kernels(rows, d, dtype, device, seed)


@ON_GPU
def test_kernel_graph_replays_at_new_positions(device):
    """A captured write goes where the position on the device says at replay."""
    cache = torch.zeros(2, 1, 2, 9, 16, device=device)
    new, position = torch.ones(2, 1, 2, 1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    kernels.write_cache(*cache, *new, position)  # compiles
    with torch.cuda.graph(graph):
        kernels.write_cache(*cache, *new, position)
    for at in (4, 8, 2):
        position.fill_(at)
        new[0].fill_(at)
        graph.replay()
    assert cache[:, 0, 1, :, 0].tolist() == [[1, 0, 2, 0, 4, 0, 0, 0, 8], [1, 0, 1, 0, 1, 0, 0, 0, 1]]


@ON_GPU
def test_kernel_decode_step_replays_as_a_graph(device):
    """Greedy text on the GPU, over refills of the window, is the full pass's; sampled text is the same in any batch."""
    model = lively().to(device)
    for text in (tokens(3, 4).to(device), tokens(1, 40).to(device)):
        made = sampling.generate(model, text, 60, temperature=0)
        for n in range(text.size(1), made.size(1)):
            logits = model(made[:, sampling.window_start(n, model.config.block_size):n])[:, -1]
            drawn = logits.gather(1, made[:, n:n + 1])[:, 0]
            torch.testing.assert_close(drawn, logits.amax(-1), atol=1e-3, rtol=1e-4)  # ties may fall either way
    together = sampling.generate(model, tokens(1, 4).expand(6, -1).to(device), 40, temperature=3.0, seed=5)
    assert torch.equal(together[2:3], sampling.generate(model, tokens(1, 4).to(device), 40, temperature=3.0, seed=7))


# ==== The model =======================================================================================================
def by_the_paper(model, ids, control=None):
    """The model's logits, signals and homeostatic loss, written out again in float64, with full masks."""
    c, p = model.config, {k: v.double() for k, v in model.state_dict().items()}
    B, T = ids.shape
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def norm(x, w):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w

    def heads(x, n):
        return x.view(B, -1, n, c.n_embd // n).transpose(1, 2)

    def attention(q, k, v, n, mask):
        scores = heads(q, n) @ heads(k, n).transpose(-1, -2) / math.sqrt(c.n_embd // n)
        return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ heads(v, n)).transpose(1, 2).reshape(B, -1, c.n_embd)

    x = p["embed.weight"][ids] + p["position.weight"][:T]
    s, homeostatic = torch.ones(B, T, c.n_layer, 3, dtype=torch.float64), 0.0
    if c.signals:
        w, b = p["controller.in_proj.weight"].chunk(3), p["controller.in_proj.bias"].chunk(3)
        query = p["controller.query"].expand(B, T, -1)
        mask = {"global": causal | True, "reactive": torch.eye(T, dtype=torch.bool)}.get(c.salience, causal)
        context = attention(query @ w[0].T + b[0], x @ w[1].T + b[1], x @ w[2].T + b[2], c.ncn_heads, mask)
        context = context @ p["controller.out_proj.weight"].T + p["controller.out_proj.bias"]
        u = torch.zeros_like(x) if c.salience == "constant" else context + x
        if control is not None:
            u = u + (control.double() @ p["controller.control.weight"].T).view(B, -1, c.n_embd)
        u = norm(u, p["controller.norm.weight"])
        hidden = torch.tanh(u @ p["controller.layer1.weight"].T + p["controller.layer1.bias"])
        z = (hidden @ p["controller.layer2.weight"].T + p["controller.layer2.bias"]).view(B, T, c.n_layer, 3)
        every = (2 * z[..., 0].sigmoid(), (F.softplus(z[..., 1]) + 0.01).clamp(max=4), z[..., 2].sigmoid())
        s = torch.stack([its if name in c.signals else torch.ones_like(its)
                         for its, name in zip(every, SIGNALS, strict=True)], -1)
        homeostatic = c.homeostatic_lambda * sum((s[..., i] - 1).square().mean() for i in range(3))
    for i in range(c.n_layer):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        gain, precision, gate = s[:, :, i].split(1, dim=-1)
        q, k, v = (norm(x, w["attn_norm.weight"]) @ w["qkv.weight"].T).chunk(3, -1)
        x = x + gain * (attention(q * precision, k, v, c.n_head, causal) @ w["attn_out.weight"].T)
        inner = F.gelu(norm(x, w["ffn_norm.weight"]) @ w["ffn_in.weight"].T + w["ffn_in.bias"])
        x = x + gain * gate * (inner @ w["ffn_out.weight"].T + w["ffn_out.bias"])
    return norm(x, p["norm.weight"]) @ p["embed.weight"].T, s, homeostatic


@pytest.mark.parametrize("salience", ncn.SALIENCE)
@pytest.mark.parametrize("signals", [SIGNALS, ("gain",), ("precision", "gate"), ()])
def test_model_is_the_papers(salience, signals):
    for seed, shape in enumerate([(1, 1), (3, 16), (2, 7)]):
        model = lively(seed, salience=salience, signals=signals, n_ffn=40 * (seed % 2))
        ids, targets = tokens(*shape, seed=seed), tokens(*shape, seed=seed + 9)
        logits, s, homeostatic = by_the_paper(model, ids)
        torch.testing.assert_close(model(ids).double(), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.signals(ids).double(), s, atol=1e-5, rtol=1e-5)
        loss = model(ids, targets)
        task = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss.task.double(), task, atol=1e-5, rtol=1e-5)
        assert abs(loss.homeostatic.item() - homeostatic) < 1e-6
        assert loss.total.item() == pytest.approx((loss.task + loss.homeostatic).item())


def controls(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_a_control_joins_the_controllers_input(salience):
    """One for all tokens, or one each; none is zeros, and a new model hardly heeds it, but can learn to."""
    model, ids = lively(salience=salience, n_control=3), tokens(2, 16)
    for control in (controls(2, 3), controls(2, 16, 3)):
        logits, s, _ = by_the_paper(model, ids, control)
        torch.testing.assert_close(model(ids, control=control).double(), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.signals(ids, control=control).double(), s, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids, control=torch.zeros(2, 3)), model(ids), atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    new = ModulatedLM(NCNConfig(**TINY, salience=salience, n_control=3)).eval()
    torch.manual_seed(0)
    plain = ModulatedLM(NCNConfig(**TINY, salience=salience)).eval()
    assert (new.signals(ids, control=controls(2, 3)) - plain.signals(ids)).abs().max() < 0.03
    assert all(torch.equal(p, new.state_dict()[name]) for name, p in plain.state_dict().items())
    assert set(new.state_dict()) - set(plain.state_dict()) == {"controller.control.weight"}
    new(ids, ids, control=controls(2, 3)).total.backward()
    assert new.controller.control.weight.grad.abs().min() > 0


@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_a_control_is_learned(salience):
    """The next token is what the control says and no text can tell: hardly any of the ln 2 nats are left."""
    torch.manual_seed(0)
    model, control = ModulatedLM(NCNConfig(**TINY, salience=salience, n_control=1)), torch.tensor([[1.0], [-1.0]] * 4)
    targets = (5 + (control > 0)).long().expand(-1, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        (loss := model(tokens(8, 16, seed=step, vocab_size=4), targets, control=control)).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.task < 0.1


@pytest.mark.parametrize("n, shape, says", [
    (0, (2, 1), "takes no control"), (3, (2, 2), r"\(2, 2\), it must be \(2, 3\) or \(2, 9, 3\)"),
    (3, (1, 3), "it must be"), (3, (2, 8, 3), "it must be"), (3, (3,), "it must be")])
def test_a_control_of_another_shape_is_refused(n, shape, says):
    model = lively(n_control=n)
    for call in (model, model.signals, lambda ids, control: generate(model, ids[:, :5], 4, control=control)):
        with pytest.raises(ValueError, match=says):
            call(tokens(2, 9), control=torch.zeros(shape))


@pytest.mark.parametrize("salience", ["global", "reactive"])
def test_golden_outputs_of_the_authors(salience):
    path = SHARED / "golden" / "reference_tiny.npz"
    if not path.exists():
        pytest.skip("the authors' outputs are not here")
    golden = np.load(path)
    state = {k.removeprefix("state/"): torch.from_numpy(golden[k]) for k in golden if k.startswith("state/")}
    model = ModulatedLM.from_reference(state, n_head=4, ncn_heads=2, salience=salience)
    ids = torch.from_numpy(golden["input_ids"])
    torch.testing.assert_close(model(ids), torch.from_numpy(golden[f"{salience}/logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.signals(ids), torch.from_numpy(golden[f"{salience}/signals"]), atol=1e-4, rtol=0)
    if salience == "global":
        assert abs(model(ids, ids).homeostatic.item() - golden["global/reg_loss"]) < 1e-4


def as_the_authors_name_it(model):
    """Our state dict under the authors' names: from_reference must bring it back."""
    ours, theirs = model.state_dict(), {}
    names = {"embed.weight": "token_embeddings.weight", "position.weight": "position_embeddings.weight",
             "norm.weight": "final_norm.weight", "controller.query": "ncn.control_query",
             "controller.in_proj.": "ncn.pooling_attn.in_proj_", "controller.out_proj.": "ncn.pooling_attn.out_proj.",
             "controller.norm.": "ncn.ncn_norm.", "controller.layer": "ncn.layer", "blocks.": "transformer_layers.",
             "attn_norm": "norm1", "ffn_norm": "norm2", "attn_out": "self_attn.out_proj",
             "ffn_in": "feed_forward.linear1", "ffn_out": "feed_forward.linear2"}
    for name, value in ours.items():
        for old, new in names.items():
            name = name.replace(old, new) if name.startswith(old) or name.startswith("transformer") else name
        if ".qkv." in name:
            for x, part in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("qkv", f"self_attn.{x}_proj")] = part
        else:
            theirs[name] = value.view(1, 1, -1) if name == "ncn.control_query" else value
    return theirs | {"output_head.weight": ours["embed.weight"]}


def test_from_reference_and_load(tmp_path):
    model = lively(salience="global")
    theirs = as_the_authors_name_it(model)
    ids = tokens(2, 9)
    again = ModulatedLM.from_reference(theirs, n_head=2, ncn_heads=2)
    assert torch.equal(again(ids), model(ids))
    assert again.config == NCNConfig(**{**TINY, "dropout": 0.1, "salience": "global"})
    torch.save({"model_state_dict": theirs, "config": {"nhead": 2, "ncn_heads": 2}}, tmp_path / "theirs.pt")
    assert torch.equal(ModulatedLM.load(tmp_path / "theirs.pt")(ids), model(ids))
    model.save(tmp_path / "ours.pt")
    loaded = ModulatedLM.load(tmp_path / "ours.pt")
    assert torch.equal(loaded(ids), model(ids)) and loaded.config == model.config and not loaded.training


def test_sizes_and_neutral_start():
    model = ModulatedLM(NCNConfig())
    assert sum(p.numel() for p in model.parameters()) == 18_007_762
    assert sum(p.numel() for p in model.controller.parameters()) == 281_298
    ids = tokens(2, 64, vocab_size=50257)
    model.eval()
    loss = model(ids, ids)
    assert 1.5e-5 < loss.homeostatic.item() < 1e-4 and 10.8 < model(ids, ids.flip(0)).task.item() < 11.8
    start = torch.tensor([1.0, math.log1p(math.exp(0.525)) + 0.01, 1 / (1 + math.exp(-3))])
    assert (model.signals(ids) - start).abs().max() < 0.02  # the last initialisation did not undo the first
    model.controller.zero_grad()
    loss.total.backward()
    assert all(p.grad.abs().max() > 0 for p in model.controller.layer1.parameters())  # nothing is stuck


def test_variants_of_a_seed_start_from_the_same_base_weights():
    """Whatever the controller, and also with a wider FFN but for the FFN; another seed, or model, starts elsewhere."""
    def start(seed, **config):
        torch.manual_seed(seed)
        return ModulatedLM(NCNConfig(**{**TINY, **config})).eval()

    causal = start(1)
    base = {name: p for name, p in causal.named_parameters() if not name.startswith("controller")}
    for config in (dict(signals=()), dict(salience="reactive"), dict(salience="constant"), dict(signals=("gate",)),
                   dict(homeostatic_lambda=0.5, ncn_hidden=3), dict(signals=(), n_ffn=150)):
        variant = dict(start(1, **config).named_parameters())
        same = {name for name in base if "ffn_" not in name or "n_ffn" not in config}
        assert len(same) >= 9 and all(torch.equal(variant[name], base[name]) for name in same)
    others = [start(2, signals=()), ModulatedLM(NCNConfig(**TINY))]
    assert not any(torch.equal(model.embed.weight, causal.embed.weight) for model in others)
    # At step 0 the signals pinned to 1 give the static model's logits.
    ids = tokens(2, 12)
    torch.testing.assert_close(causal(ids, edit=torch.ones_like), start(1, signals=())(ids), atol=1e-6, rtol=1e-5)


def test_a_wider_ffn_has_the_parameters_of_a_controller():
    """The n_ffn that train.py names, at the laptop's and the paper's sizes: within 0.1% of the modulated model."""
    for config, n_ffn in ((dict(vocab_size=10589, n_layer=3, n_head=4, n_embd=128, ncn_hidden=32), 604),
                          (dict(), 1115)):
        count = [sum(p.numel() for p in ModulatedLM(NCNConfig(**config, **more)).parameters())
                 for more in ({}, dict(signals=(), n_ffn=n_ffn))]
        assert abs(count[1] / count[0] - 1) < 1e-3


def test_constant_salience_is_the_same_for_every_token():
    model = lively(salience="constant")
    s = model.signals(tokens(3, 16))
    assert torch.equal(s, s[:1, :1].expand_as(s)) and len(s.unique()) == 6
    model(tokens(3, 16), tokens(3, 16)).total.backward()
    assert model.controller.layer2.bias.grad.abs().min() > 0 and model.controller.query.grad is None


@pytest.mark.parametrize("salience", ["causal", "reactive", "constant"])
def test_padding_has_no_loss_and_no_price(salience):
    """Rows of different lengths at once, or each alone weighted by its targets: the same losses and gradients."""
    model, ids, targets, lengths = lively(salience=salience), tokens(3, 16), tokens(3, 16, seed=1), (5, 16, 9)
    alone = [model(ids[i : i + 1, :n], targets[i : i + 1, :n]) for i, n in enumerate(lengths)]
    want = [sum(x * n for x, n in zip(losses, lengths, strict=True)) / 30 for losses in zip(*alone, strict=True)]
    want_grad = torch.autograd.grad(want[0], model.controller.layer2.weight)[0]
    for i, n in enumerate(lengths):
        targets[i, n:] = -1
    got = model(ids, targets)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    got_grad = torch.autograd.grad(got.total, model.controller.layer2.weight)[0]
    torch.testing.assert_close(got_grad, want_grad, atol=1e-6, rtol=1e-4)
    nothing = model(ids, torch.full_like(targets, -1))
    assert nothing.task == nothing.homeostatic == 0


@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_only_global_salience_sees_the_future(salience):
    model, ids = lively(salience=salience), tokens(2, 16)
    # Trained for a while: what must not depend on the future after initialisation must not after learning either.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        model(tokens(4, 15, seed=step), tokens(4, 16, seed=step)[:, 1:]).total.backward()
        optimizer.step()
    before = model(ids)
    for t in (1, 8, 15):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 61
        difference = (model(changed) - before)[:, :t].abs().max().item()
        assert difference > 1e-3 if salience == "global" else difference <= 1e-6
        assert (model(changed) - before)[:, t:].abs().max() > 1e-2


def test_the_demonstration_shows_what_the_readme_explains(capsys):
    """`python ncn.py`: only global salience leaks, the cache equals the pool, and the numbers worked out by hand."""
    ncn.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "sees the future" in line] == ["global"]
    assert any(line.split()[:2] == ["controller", "281,298"] for line in lines)
    assert float(next(line for line in lines if "cache" in line).split("difference ")[1].split(",")[0]) < 1e-5
    by_hand = [line.split("= ")[1] for line in lines if "= " in line]
    assert by_hand == ["1 3 4 3", "1.50 2.00 0.75", "6.00 9.00", "14.50 19.00"]


@pytest.mark.parametrize("bad", [dict(n_head=3), dict(ncn_heads=5), dict(n_head=True), dict(n_layer=2.0),
                                 dict(signals=("gain", "dopamine")), dict(n_ffn=-1),
                                 dict(salience="psychic"), dict(n_layer=0), dict(dropout=1.0), dict(block_size=1),
                                 dict(homeostatic_lambda=-1.0), dict(n_control=-1), dict(n_control=1, signals=())])
def test_config_refuses(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)) if "signals" not in bad else "signal")):
        NCNConfig(**{**TINY, **bad})


# ==== Salience ========================================================================================================
def pool_by_softmax(scores, values):
    T = scores.size(-1)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    weight = scores.double()[:, :, None].expand(-1, -1, T, -1).masked_fill(later, -math.inf).softmax(-1)
    return weight @ values.double()


def scores_like(kind, shape, seed):
    g = torch.Generator().manual_seed(seed)
    T = shape[-1]
    ramp = torch.linspace(-1e4, 1e4, T) if T > 1 else torch.zeros(1)
    return {"normal": torch.randn(shape, generator=g), "wild": 1e4 * torch.randn(shape, generator=g),
            "rising": ramp.expand(shape), "falling": ramp.flip(0).expand(shape), "equal": torch.full(shape, -1e4),
            "spike": torch.full(shape, -1e4).index_fill(-1, torch.tensor([T // 3]), 1e4),
            "staircase": (torch.arange(T) // 5 * 30.0).expand(shape)}[kind].clone()


@pytest.mark.parametrize("kind", ["normal", "wild", "rising", "falling", "equal", "spike", "staircase"])
def test_salience_pool_is_a_causal_softmax(kind):
    for seed, (B, h, T, e) in enumerate([(2, 2, 1, 4), (1, 3, 31, 5), (2, 1, 32, 1), (2, 2, 33, 8), (1, 2, 200, 16)]):
        values = torch.randn(B, h, T, e, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        scores = scores_like(kind, (B, h, T), seed).requires_grad_()
        pooled, _ = salience_pool(scores, values)
        expected = pool_by_softmax(scores, values)
        torch.testing.assert_close(pooled.double(), expected, atol=2e-6, rtol=1e-5)
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(seed + 1))
        got = torch.autograd.grad((pooled * weight).sum(), (scores, values))
        want = torch.autograd.grad((expected * weight).sum(), (scores, values))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["normal", "wild", "rising", "falling", "spike"])
def test_salience_cache_continues_the_pool(kind):
    """Pooling a prefix and stepping through the rest is pooling it all; the state never grows."""
    values, scores = torch.randn(2, 2, 90, 8), scores_like(kind, (2, 2, 90), 3)
    for prefix in (1, 32, 50):
        pooled, state = salience_pool(scores[:, :, :prefix], values[:, :, :prefix])
        state = [x.clone() for x in state]
        shapes = [tuple(x.shape) for x in state]
        steps = [salience_step(scores[:, :, t : t + 1], F.pad(values[:, :, t], (0, 1), value=1.0), state)
                 for t in range(prefix, 90)]
        assert [tuple(x.shape) for x in state] == shapes == [(2, 2, 1), (2, 2, 9)]
        both = torch.cat([pooled, torch.stack(steps, 2)], 2).double()
        torch.testing.assert_close(both, pool_by_softmax(scores, values), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_mixed_precision_is_close(dtype, salience):
    model, ids = lively(salience=salience), tokens(2, 16)
    exact = model(ids, ids)
    with torch.autocast("cpu", dtype):
        loss = model(ids, ids)
        signals = model.signals(ids)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert signals.dtype == loss.total.dtype == torch.float32
    assert abs(loss.task.item() - exact.task.item()) < 0.05 * exact.task.item()


# ==== Preparing data ==================================================================================================
def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---- The demo stories ------------------------------------------------------------------------------------------------
@functools.cache
def demo_stories(seed=3, count=20000):
    rng = random.Random(seed)
    return [prepare.tell(rng) for _ in range(count)]


def chance(text, todo=("{story}", END), drawn=None, at=0):
    """The probability that a story with its END begins with `text`: over every derivation, one slot after the other."""
    if at >= len(text):
        return 1.0
    drawn, part, rest = drawn or {}, todo[0], todo[1:]
    slot = part[1:-1] if part[0] == "{" else None
    if slot and slot not in drawn:
        choices = prepare.options(slot, drawn)
        return sum(chance(text, (*filter(None, re.split(r"({\w+})", choice)), *rest), {**drawn, slot: choice}, at)
                   for choice in choices) / len(choices)
    part = drawn.get(slot, part)
    return chance(text, rest, drawn, at + len(part)) if part.startswith(text[at:at + len(part)]) else 0.0


def test_demo_stories_have_one_reading():
    """Were there a second derivation, the probability would be more than the one that tell() states."""
    for text, nats in demo_stories()[:200]:
        assert -math.log(chance(text + END)) == pytest.approx(nats), text
    assert len({text for text, _ in demo_stories()}) == len(demo_stories())
    for slot, rule in prepare.GRAMMAR.items():
        for a, needs in prepare.every(rule):
            assert not any(b.startswith(a) and a != b for b, same in prepare.every(rule) if same == needs), (slot, a)


def test_demo_stories_are_the_same_everywhere():
    text = "\n".join(text for text, _ in demo_stories(42, 1000))
    assert sha256(text.encode()) == "5e0e9a843aa0c79bc3777ac439a2ab0d5becfd9bfa9ebc2e6c6c4eea5df18410"
    nats = np.array([nats for _, nats in demo_stories()])
    assert abs(nats.mean() - prepare.entropy()) < 4 * nats.std() / len(nats) ** 0.5
    assert prepare.entropy() > math.log(1e7)               # millions of different stories, and then some


@pytest.mark.parametrize("seed", range(5))
def test_demo_entropy_by_enumeration(monkeypatch, seed):
    """On small random grammars: the entropy of all texts, written out one by one, and how often each is told."""
    rng = random.Random(seed)

    def some(prefix):
        return "|".join(f"{prefix}{i}." for i in range(rng.randint(1, 4)))
    kinds, things = some("k"), "|".join(f"t{i}.{{kind}}{{color}}" for i in range(rng.randint(2, 3)))

    def by_kind(prefix):
        return "kind", {kind: some(prefix) for kind in kinds.split("|")}
    monkeypatch.setattr(prepare, "GRAMMAR", {
        "story": "{kind}{name} {thing}{color}{name}|b{thing} {fix}", "kind": kinds, "color": some("c"), "thing": things,
        "name": by_kind("n"), "fix": ("thing", {thing: by_kind("f{color}{name}") for thing in things.split("|")})})
    texts = collections.Counter()

    def enumerate_texts(text, drawn, p):
        """Leftmost slot first; an option goes in as it is, and what it holds is filled in next."""
        if not (match := prepare.SLOT.search(text)):
            texts[text] += p
            return
        slot = match[1]
        for choice in (choices := [drawn[slot]] if slot in drawn else prepare.options(slot, drawn)):
            text_now = text[:match.start()] + choice + text[match.end():]
            enumerate_texts(text_now, {**drawn, slot: choice}, p / len(choices))
    enumerate_texts("{story}", {}, 1.0)
    assert sum(texts.values()) == pytest.approx(1) and len(texts) > 10
    entropy = prepare.entropy.__wrapped__                  # nothing of this grammar may stay in the cache
    monkeypatch.setattr(prepare, "entropy", functools.cache(entropy))
    assert prepare.entropy() == pytest.approx(-sum(p * math.log(p) for p in texts.values()), rel=1e-12)
    told = collections.Counter(prepare.tell(rng)[0] for _ in range(4000))
    assert set(told) <= set(texts)
    assert all(abs(told[t] - 4000 * p) < 6 * (4000 * p) ** 0.5 + 1 for t, p in texts.items())


def test_demo_stories_are_good_english():
    sizes, famous = [], 0
    for text, _ in demo_stories()[:5000]:
        sizes.append(len(text))
        famous += text.startswith("Once upon a time, ")
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}|]|  | $|^ | [.,!]|[.,!][A-Za-z]", text), text
        assert text.count('"') % 2 == 0 and ", but it was " in text
        assert all(re.match(r'"?[A-Z]', line) and re.search(r'[.!]"?$', line) for line in text.split("\n"))
        assert all(s[0].isupper() for s in re.findall(r'[.!]"? "?(\w)(?!aid)', text)), text
        said = first_words(text)
        wrong = r"\b(he|his|him)\b" if said["kind"] in prepare.SHE.split("|") else r"\b(she|her)\b"
        assert not re.search(wrong, text, re.IGNORECASE), text
        # Before and after the obstacle: the hero, the friend, the thing and the goal. The way out names the obstacle.
        for slot in "name", "pal", "thing", "goal":
            assert all(said[slot] in part for part in text.split(", but ")), text
        assert said["thing"] in said["fix"] and said["spot"] in said["fix"]
    assert 350 <= min(sizes) and max(sizes) <= 650 and 460 <= np.mean(sizes) <= 500 and famous >= len(sizes) / 2


def first_words(text):
    """What read_back reads for each slot where it is drawn."""
    return {slot: words for slot, _, _, words, _ in reversed(prepare.read_back(text))}


def test_read_back_reads_what_was_told():
    for text, nats in demo_stories()[:1000]:
        mentions = prepare.read_back(text)
        assert math.fsum(mention[4] for mention in mentions) == pytest.approx(nats), text
        assert all(text[start:end] == words for _, start, end, words, _ in mentions)
        starts = [mention[1] for mention in mentions]
        assert starts == sorted(starts) and {*prepare.SLOTS.values()} < {mention[0] for mention in mentions}
        assert prepare.kept(mentions) == dict.fromkeys(prepare.SLOTS, True)
        for no_story in (text[:-1], text + " ", text[1:], text + text, text.replace(", but", ", and")):
            assert prepare.read_back(no_story) is None
    assert prepare.read_back("") is prepare.read_back("Once upon a time there was a quokka") is None
    girl = next(text for text, _ in demo_stories() if " girl named Lily" in text)   # what is drawn must go with that
    said = first_words(girl)
    assert prepare.read_back(girl.replace("Lily", "Tom")) is None
    for spot, needs in prepare.every(prepare.GRAMMAR["spot"]):
        read = prepare.read_back(girl.replace(said["spot"], spot))
        assert (read is None) == (needs["trouble"] != said["trouble"])


@pytest.mark.parametrize("slot, wrong", [
    ("name", {"hero"}), ("pal", {"friend"}), ("color", {"colour"}), ("thing", {"thing"}), ("fix", {"thing"}),
    ("place", {"place"}), ("spot", {"place"}), ("goal", {"goal"}), ("goal", {"goal", "place"}), ("kin", {"whom"}),
    ("trait", set()), ("kind", set()), ("her", set())])
def test_read_back_tells_what_was_forgotten(slot, wrong):
    """Any one mention but the first becomes any other option: the story is read, and just that is not kept."""
    tried = 0
    for text, nats in demo_stories()[:20]:
        first, told = first_words(text), prepare.read_back(text)
        for _, start, end, words, _ in [m for m in told if m[0] == slot][slot not in ("place", "fix"):]:
            for option, needs in prepare.every(prepare.GRAMMAR[slot]):
                in_fix = text.index(first["fix"]) < start < text.index(first["fix"]) + len(first["fix"])
                if option == words or (                    # a fix names its own thing: it changes as a whole
                        slot == "thing" and in_fix
                        or slot == "fix" and (needs["thing"] == first["thing"] or needs["trouble"] != first["trouble"])
                        or slot == "goal" and (needs["place"] == first["place"]) != (wrong == {"goal"})):
                    continue
                option = option.format_map({"him": "her", "she": "she", **first, **needs})
                mentions = prepare.read_back(text[:start] + option + text[end:])
                kept = prepare.kept(mentions)
                assert {name for name in kept if not kept[name]} == wrong
                assert slot in ("place", "fix") or math.fsum(m[4] for m in mentions) == pytest.approx(nats)
                tried += 1
    assert tried > 10


@pytest.mark.parametrize("name", ["words", "bytes"])
def test_label_slots(name):
    """The floor of each token is exactly -log of its probability given those before it; labels lie on their words."""
    tokenizer, told = tokenizer_of({"tokenizer": name}), demo_stories()[:200]
    ids = np.array(tokenizer.encode("".join(text + END for text, _ in told), allowed_special={END}))
    slots, floor = prepare.label_slots(ids, tokenizer)
    assert slots.dtype == np.int8 and floor.dtype == np.float64 and slots.shape == floor.shape == ids.shape
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    np.testing.assert_allclose(np.diff(np.cumsum(floor)[ends], prepend=0), [nats for _, nats in told])
    for first, last, (text, _) in zip(np.append(0, ends + 1)[:2], ends[:2], told[:2], strict=True):
        before = [-math.log(chance(tokenizer.decode(ids[first:i].tolist()))) for i in range(first, last + 2)]
        np.testing.assert_allclose(np.diff(before), floor[first:last + 1], atol=1e-9)
        for i, slot in enumerate(prepare.SLOTS.values()):
            words = [m[3] for m in prepare.read_back(text) if m[0] == slot or (slot, m[0]) == ("place", "spot")]
            labelled = tokenizer.decode(ids[first:last][slots[first:last] == i].tolist())
            assert labelled.replace(" ", "") == "".join(words).replace(" ", "")
    with pytest.raises(ValueError, match="not the demo stories"):
        prepare.label_slots(ids[1:], tokenizer)


def test_labelled_stories():
    """The label decides the beginning and the ending; what is left has the entropy that is stated."""
    rng, seen, nats_told = random.Random(1), set(), []
    tokenizer = tokenizer_of({"tokenizer": "words"})
    for _ in range(40):
        text, (hug, long) = prepare.read_label(prepare.tell_labelled(rng))
        label = dict(zip(prepare.CONTROLS, (hug, long), strict=True))
        seen.add((hug, long))
        assert (" hugged " in text) == (hug == 1) and text.startswith("Once upon a time, in a") == (long == 1)
        assert ('"What a ' in text) == (hug == -1) and text.startswith("There once was a") == (long == -1)
        nats = math.fsum(mention[4] for mention in prepare.read_back(text, label))
        nats_told.append(nats)
        unlabelled = math.fsum(mention[4] for mention in prepare.read_back(text))
        assert nats == pytest.approx(unlabelled - math.log(20))         # 4 endings, 5 beginnings
        assert -math.log(chance(text + END, drawn=label)) == pytest.approx(nats)
        assert all(prepare.read_back(text, {**label, name: -label[name]}) is None for name in label)
        ids = np.array(tokenizer.encode(text + END, allowed_special={END}))
        assert prepare.label_slots(ids, tokenizer, (np.array([[hug, long]]), None))[1].sum() == pytest.approx(nats)
    entropies = [prepare.entropy(drawn=frozenset(zip(prepare.CONTROLS, label, strict=True))) for label in seen]
    assert seen == {*itertools.product((1, -1), repeat=2)}
    assert entropies == pytest.approx([prepare.entropy() - math.log(20)] * 4)
    assert abs(np.mean(nats_told) - entropies[0]) < 4 * np.std(nats_told) / 40 ** 0.5


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
def offline(*_):
    raise OSError("no network in this test")


def random_text(rng, size):
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0x10000, 0x110000)]))
                   for _ in range(size))


def test_prepare_bytes_tokenizer():
    tokenizer = tokenizer_of({"tokenizer": "bytes"})
    assert isinstance(tokenizer, tiktoken.Encoding) and tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    for size in [0, 1, 98, 99, 100, 101, 5000]:
        text = random_text(random.Random(0), size) + END
        assert tokenizer.encode_ordinary(text) == list(text.encode())
        assert tokenizer.encode(text, allowed_special="all") == [*text.encode()[:-13], 256]
        assert tokenizer.decode(list(text.encode())) == text


def test_prepare_words_tokenizer(monkeypatch):
    """One token for each word of a story, whatever the story; bytes for all that is not such a word, as a whole."""
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError, match="--tokenizer bytes"):
        tokenizer_of({"tokenizer": "gpt2"})
    words = prepare.grammar_words()
    tokenizer = tokenizer_of({"tokenizer": "words", "vocabulary": words})
    assert tokenizer.n_vocab == 257 + len(words) and tokenizer.eot_token == 256 + len(words)

    def pieces(text):
        return [tokenizer.decode([token]) for token in tokenizer.encode_ordinary(text)]

    def longest_words(text):
        """At each place the longest word that stands there as a whole, else a character."""
        at = 0
        while at < len(text):
            here = [word for word in words if text.startswith(word, at)
                    and not re.match(r"\w\w", text[max(0, at - 1):at] + word[0])
                    and not re.match(r"\w\w", word[-1] + text[at + len(word):])]
            yield (piece := max(here, key=len, default=text[at]))
            at += len(piece)
    for text, _ in demo_stories()[:2000]:
        assert pieces(text) == re.findall(r"'s| ?[A-Za-z]+| ?[^A-Za-z\s]|\n", text)
    assert pieces("There was a quokka") == ["There", " was", " a", " ", *"quokka"]
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, 100)                       # where Unicode's letters end is not Python's own opinion
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
        text = "".join(rng.choice([*words, *" .,'\"\na_1éß\U0001F600", "He", " atti", END]) for _ in range(30))
        tokens = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(tokens) == text
        assert tokens == [token for piece in longest_words(text)
                          for token in ([256 + words.index(piece)] if piece in words else piece.encode())]


def little_gpt2(rng, text, merges=600):
    """A BPE vocabulary for a text: its first 256 numbers are the bytes, and any text encodes, as in GPT-2."""
    pattern, ranks = r" ?[a-z]+|[\s\S]", {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in sorted({*re.findall(pattern, text)})]
    while len(ranks) < 256 + merges:
        chosen = rng.choice([parts for parts in words if len(parts) > 1])
        i = rng.randrange(len(chosen) - 1)
        pair = chosen[i:i + 2]
        ranks[b"".join(pair)] = len(ranks)
        for parts in words:
            for i in range(len(parts) - 1):
                if parts[i:i + 2] == pair:
                    parts[i:i + 2] = [b"".join(pair)]
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


@pytest.mark.parametrize("seed", range(4))
def test_prepare_vocab_seen(monkeypatch, tmp_path, seed):
    """Text of seen tokens becomes the same pieces, renumbered; any other text still encodes, and decodes exactly."""
    stories = [text for text, _ in demo_stories(seed, 200)]
    full = little_gpt2(random.Random(seed), " ".join(stories))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: full)
    monkeypatch.setattr(prepare, "GPT2", full.n_vocab)
    monkeypatch.setattr(prepare, "BLOCK", 1002)            # the files are renumbered in several blocks
    (tmp_path / "a.txt").write_text(END.join(stories[:5]))  # so that many tokens never occur
    for vocab in "full", "seen":
        assert prepare_here(monkeypatch, tmp_path / "a.txt", "--out", tmp_path / vocab, "--vocab", vocab) == 0
    (before, *texts), (after, *same) = load_prepared(tmp_path / "full"), load_prepared(tmp_path / "seen")
    vocabulary = after["vocabulary"]
    assert same == texts and after.pop("train_sha256") != before.pop("train_sha256")
    assert {**after, "vocab_size": full.n_vocab} == {**before, "vocabulary": vocabulary, "val_sha256": mock.ANY}
    for side in "train", "val":
        old, new = (np.fromfile(tmp_path / vocab / f"{side}.bin", "<u2") for vocab in ("full", "seen"))
        assert (np.array(vocabulary)[new] == old).all()
    small = tokenizer_of(after)
    assert {*range(256), full.eot_token} <= {*vocabulary} and len(vocabulary) < full.n_vocab - 50
    for story in stories[:5]:
        assert [vocabulary[token] for token in small.encode(story)] == full.encode(story)
    for text in (*stories[5:40], "ünïcödé \U0001F98A", "zzzz qqqq"):
        assert small.decode(small.encode_ordinary(text)) == text


# ---- Whole runs ------------------------------------------------------------------------------------------------------
def prepare_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    return prepare.main()


def prepare_there(*args, cwd=None, code="import sys, prepare; sys.argv[0] = 'prepare.py'; sys.exit(prepare.main())"):
    """prepare.py in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parent)}, timeout=300)


def load_prepared(out):
    """Checks the files against their meta data. Returns it, and the stories of each side."""
    meta = prepare.read_meta(out)
    tokenizer = tokenizer_of(meta)
    assert meta["vocab_size"] == tokenizer.n_vocab == tokenizer.eot_token + 1 and not list(out.glob("*.tmp"))
    sides = []
    for side in "train", "val":
        tokens = prepare.read_tokens(out, side, meta)
        assert tokens.dtype == np.uint16 and tokens.tolist() == np.fromfile(out / f"{side}.bin", "<u2").tolist()
        assert len(tokens) == meta[f"{side}_tokens"] and tokens[-1] == tokenizer.eot_token
        sides.append(tokenizer.decode(tokens.tolist()).split(END)[:-1])
        assert len(sides[-1]) == meta[f"{side}_stories"] > 0
    return meta, *sides


def write_data(folder, meta, **splits):
    """A data folder as prepare.py leaves it, of these tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        data = np.array(ids, "<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        meta = meta | {f"{split}_tokens": len(ids), f"{split}_sha256": sha256(data)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("more", [[], ["--tokenizer=bytes"]])
def test_prepare_demo(tmp_path, more):
    out = tmp_path / "deep" / "out"
    run = prepare_there("demo", f"--out={out}", "--max_mb", "0.3", "--seed", "5", *more)
    assert run.returncode == 0 and run.stderr == ""        # no progress bar where there is no terminal
    meta, train, val = load_prepared(out)
    assert meta["tokenizer"] == ("bytes" if more else "words") and meta["seed"] == 5 and meta["val_fraction"] == 0.05
    assert meta.get("vocabulary") == (None if more else prepare.grammar_words())
    rng = random.Random(5)
    told = [prepare.tell(rng)[0] for _ in range(len(train) + len(val))]
    assert sorted(told) == sorted(train + val)
    text = "".join(f"{story}\n{END}\n" for story in told)[:-1]
    assert meta["sources"] == [{"name": "demo", "bytes": len(text), "sha256": sha256(text.encode())}]
    assert 299_000 < len(text) <= 300_000
    mean = (meta["train_tokens"] + meta["val_tokens"]) / len(told)
    assert meta["entropy_nats_per_story"] == prepare.entropy()
    assert meta["entropy_nats_per_token"] == pytest.approx(prepare.entropy() / mean)
    assert mean == np.mean([len(tokenizer_of(meta).encode_ordinary(story)) + 1 for story in told])
    assert f"{meta['entropy_nats_per_token']:.4f} nats per token" in run.stdout


@pytest.mark.parametrize("seed", range(30))
def test_prepare_reads_any_blocks(monkeypatch, tmp_path, seed):
    """Stories, split, sizes and hashes do not depend on where the blocks are cut or how many cores there are."""
    rng = random.Random(seed)
    texts, stories, folder = [], [], tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "no.md").write_text("not a story")
    hard = ["a", "é", "\U0001F600", "<|", "endoftext", "|>", "\r\n", "\n", " ", "<|end"]
    for name in "0.txt", "b/z.txt", "c.txt":               # in this order
        told = ["".join(rng.choices(hard, k=rng.randint(0, 15))) for _ in range(rng.randint(1, 12))]
        text = END.join(["first", *told]) + rng.choice(["", "\n", END, "end"])
        stories += [s.strip() for s in text.replace("\r\n", "\n").split(END) if s.strip()]
        texts.append(("\ufeff" * rng.randint(0, 1) + text).encode())
        (folder / name).write_bytes(texts[-1])
    results = []
    for block, cores in (1, 1), (rng.randint(2, 40), 3), (1 << 20, 7):
        monkeypatch.setattr(prepare, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        out = tmp_path / f"out{block}"
        assert prepare_here(monkeypatch, folder, "--tokenizer", "bytes", "--out", out, "--val_fraction", 0.3,
                            "--seed", seed) == 0
        results.append(files_in(out))
    assert results[0] == results[1] == results[2]
    meta, train, val = load_prepared(out)
    draws, sides = random.Random(seed + 1), ([], [])
    for i, story in enumerate(stories):
        sides[(draws.random() < 0.3, i)[i < 2]].append(story)       # the first two go one to each side
    assert (train, val) == sides
    assert [(s["bytes"], s["sha256"]) for s in meta["sources"]] == [(len(text), sha256(text)) for text in texts]


@pytest.mark.parametrize("limit", [10, 27, 28, 34, 35, 36, 37, 49, 50, 51, 62, 63, 64, 65, 1000])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_prepare_max_mb(monkeypatch, tmp_path, limit, block):
    """Ends at the last whole story within the limit, over all files together."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    ends, end = {}, 0
    for name, stories in ("a.txt", ["1", "2222222", "3"]), ("b.txt", ["4", "5", "6"]):
        (tmp_path / name).write_bytes(END.join(stories).encode())
        for story in stories:
            end += len(story) + (len(END) if story not in "36" else 0)
            ends[story] = end
    status = prepare_here(monkeypatch, tmp_path, "--tokenizer=bytes", "--out", tmp_path / "o", "--max_mb", limit / 1e6)
    expected = [story for story, end in ends.items() if end <= limit]
    if len(expected) < 2:
        assert status == 2 and not (tmp_path / "o" / "meta.json").exists()
    else:
        meta, train, val = load_prepared(tmp_path / "o")
        assert sorted(train + val) == expected
        assert sum(source["bytes"] for source in meta["sources"]) == ends[expected[-1]]


def test_prepare_labels(monkeypatch, tmp_path):
    """A story's numbers stand beside its tokens, on its side; text without labels leaves no file of them."""
    rng, source, out = random.Random(0), tmp_path / "a.txt", tmp_path / "o"
    told = {f"story {i}: " + 'he said "hi" ' * (i % 3): [rng.uniform(-9, 9), i] for i in range(40)}
    source.write_text(END.join(f"\n<|control|>  {a!r} {b}\r\n{text}" for text, (a, b) in told.items()), newline="")
    monkeypatch.setattr(prepare, "BLOCK", 70)
    assert prepare_here(monkeypatch, source, "--tokenizer=bytes", "--out", out, "--val_fraction=0.3") == 0
    meta, *sides = load_prepared(out)
    assert meta["controls"] == ["1", "2"] and sorted(sum(sides, [])) == sorted(text.strip() for text in told)
    numbers = {text.strip(): control for text, control in told.items()}
    for split, stories in zip(("train", "val"), sides, strict=True):
        tokens = prepare.read_tokens(out, split, meta)
        controls, ends = prepare.read_labels(out, split, meta, tokens)
        assert tokenizer_of(meta).decode(tokens[:ends[1]].tolist()) == END.join(stories[:2])
        assert controls.dtype == np.float32
        np.testing.assert_allclose(controls, [numbers[story] for story in stories], rtol=1e-6)
    assert prepare_here(monkeypatch, source, "--tokenizer=bytes", "--out", out, "--label", "dialogue") == 0
    meta, stories, _ = load_prepared(out)
    controls, _ = prepare.read_labels(out, "train", meta, tokens)
    assert meta["controls"] == ["dialogue"]
    np.testing.assert_allclose(controls, [[4 * story.count('"hi"') / len(story)] for story in stories], rtol=1e-6)
    for path, damage in ((out / "train.control.bin", b"\0" * controls.nbytes), (out / "val.control.bin", None)):
        path.write_bytes(damage) if damage else path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}.*run prepare.py again"):
            prepare.read_labels(out, path.name.split(".")[0], meta, tokens)
    assert prepare_here(monkeypatch, "demo", "--max_mb=0.01", "--out", out) == 0
    meta = load_prepared(out)[0]
    assert "controls" not in meta and prepare.read_labels(out, "train", meta, tokens) is None
    assert sorted(files_in(out)) == ["meta.json", "train.bin", "val.bin"]


def test_dialogue():
    for story, share in (("No word.", 0), ('"Yes!"', 1), ('"Oh," he said. "No', 5 / 18), ("“Oh” “no”", 8 / 9)):
        assert prepare.dialogue(story) == pytest.approx(share)


def test_prepare_gpt2(monkeypatch, tmp_path):
    if not (SHARED / "tinystories").exists():
        pytest.skip("no shared TinyStories")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    source = SHARED / "tinystories" / "valid.txt"
    assert prepare_here(monkeypatch, source, "--out", tmp_path, "--max_mb", "0.4") == 0
    meta, train, val = load_prepared(tmp_path)
    assert meta["tokenizer"] == "gpt2" and 0.395e6 < meta["sources"][0]["bytes"] <= 0.4e6
    tokenizer = tiktoken.get_encoding("gpt2")
    for side, stories in ("train", train), ("val", val):
        assert np.fromfile(tmp_path / f"{side}.bin", "<u2").tolist() == [
            token for story in stories for token in [*tokenizer.encode_ordinary(story), tokenizer.eot_token]]
    text = source.read_bytes()[:meta["sources"][0]["bytes"]].decode()
    assert sorted(train + val) == sorted(s.strip() for s in text.split(END) if s.strip())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_prepare_memory(tmp_path):
    """A corpus six times as big needs the same memory."""
    code = ("import re, sys, prepare; status = prepare.main();"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)")
    text = "".join(f"{story}\n{END}\n" for story, _ in demo_stories()).encode()     # 10 MB
    peaks = []
    for copies in 1, 6:
        (tmp_path / "a.txt").write_bytes(text * copies)
        run = prepare_there(tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o", code=code)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-1]) / 1024)   # MB
    assert peaks[1] < peaks[0] + 20 and peaks[1] < 300, peaks


# ---- Tokens back -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_rows_and_windows(seed):
    """Each token is a target once, in order; an aligned row is a story after an END, or a part of a long one."""
    rng = np.random.default_rng(seed)
    T, end = int(rng.integers(1, 40)), 50
    lengths = rng.integers(1, rng.integers(2, 60), rng.integers(1, 200))
    tokens = np.concatenate([[*rng.integers(0, end, n - 1), end] for n in lengths]).astype("<u2")

    rows = prepare.rows_of(tokens, T)
    assert rows.dtype == np.int64 and rows.shape == ((len(tokens) - 1) // T, 2)
    if len(rows):
        x, y = prepare.windows(tokens, rows[(which := rng.permutation(len(rows))[:20])])
        expected = np.stack([tokens[i * T:(i + 1) * T + 1] for i in which]).astype(np.int64)
        assert (x == expected[:, :-1]).all() and (y == expected[:, 1:]).all()

    rows = prepare.rows_of(tokens, T, aligned=True)
    expected = [[i, min(T, stop - i)] for stop, n in zip(np.cumsum(lengths) - 1, lengths, strict=True)
                for i in range(stop - n, stop, T)]
    assert rows.dtype == np.int64 and rows.tolist() == expected
    x, y = prepare.windows(tokens, rows)
    inside = np.arange(rows[:, 1].max()) < rows[:, 1:]
    assert x.shape == y.shape == inside.shape and x.dtype == y.dtype == np.int64
    assert (y[inside] == tokens).all() and (x[inside] == np.roll(tokens, 1)).all()
    assert (y[~inside] == -1).all() and (x[~inside] == end).all()
    fractions = np.arange(len(tokens)) / 4                 # what belongs to each token, as its floor, stays what it is
    assert (prepare.windows(fractions, rows)[1][inside] == fractions).all()


    controls, ends = rng.random((len(lengths), 2), np.float32), np.cumsum(lengths) - 1
    story_of = np.repeat(np.arange(len(lengths)), lengths)  # of each target
    for some in (rows, prepare.rows_of(tokens, T)):
        told = prepare.control_windows((controls, ends), some) if len(some) else ()
        for (start, n), its in zip(some, told, strict=True):
            assert (its[:n] == controls[story_of[start + 1:start + n + 1]]).all() and its.dtype == np.float32


@pytest.mark.parametrize("damage", [
    "", "{", "[]", "5", dict(controls=[]), dict(controls=[1]), dict(controls=2), dict(tokenizer="gpt5"),
    dict(tokenizer=["bytes"]), dict(tokenizer=None), dict(vocab_size="257"),
    dict(vocab_size=0), dict(vocab_size=65537), dict(vocab_size=257.0), dict(vocab_size=True), dict(vocab_size=None),
    dict(entropy_nats_per_story=math.nan), dict(entropy_nats_per_token="1"), dict(vocabulary=[1]), dict(vocabulary=3),
    dict(tokenizer="words", vocab_size=259, vocabulary=["a"]), dict(tokenizer="words", vocab_size=258, vocabulary=[1]),
    dict(tokenizer="words", vocab_size=259, vocabulary=["ab"] * 2), dict(tokenizer="words"), dict(vocab_size=256),
    dict(tokenizer="gpt2", vocabulary=["a"] * 257), dict(tokenizer="gpt2", vocabulary=[*range(256)]),
    dict(tokenizer="gpt2", vocabulary=[*range(256), 50257]), dict(tokenizer="gpt2", vocabulary=[-1, *range(256)]),
    dict(tokenizer="llama"), dict(tokenizer=5), dict(vocab_size=10**12), dict(vocab_size=10**400),
    dict(entropy_nats_per_story=1.0), dict(entropy_nats_per_token=1.0), '{"vocab_size": 1e400, "tokenizer": "bytes"}',
    "[" * 100_000, "\0", '"tokenizer"'])
def test_damaged_metadata(tmp_path, damage):
    good = {"tokenizer": "bytes", "vocab_size": 257}
    with pytest.raises(ValueError, match="no data in .*run prepare.py first"):
        prepare.read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(good))
    assert prepare.read_meta(tmp_path) == good
    (tmp_path / "meta.json").write_text(damage if isinstance(damage, str) else json.dumps({**good, **damage}))
    with pytest.raises(ValueError, match=r"meta\.json is damaged: run prepare\.py again$"):
        prepare.read_meta(tmp_path)


@pytest.mark.parametrize("data, says", [
    (None, "val.bin"), (b"", "not the file"), (b"\1\0\2\0\3", "not the file"),
    (b"\1\0\2\0", "not the file"), (b"\1\0\2\0\4\0", "not the file"), (b"\1\0\2\0\3\0\3\0", "not the file"),
    ([256, 257], "token id 257, beyond the vocabulary of 257")])
def test_damaged_tokens(tmp_path, data, says):
    """Missing, empty, odd, cut at an even size, changed at the same size, too long; and whole, but beyond the model."""
    meta = BYTES
    write_data(tmp_path, meta, val=data if isinstance(data, list) else [1, 2, 3])
    meta = prepare.read_meta(tmp_path)
    if data is None:
        (tmp_path / "val.bin").unlink()
    elif isinstance(data, bytes):
        assert prepare.read_tokens(tmp_path, "val", meta).tolist() == [1, 2, 3]
        (tmp_path / "val.bin").write_bytes(data)
    with pytest.raises((ValueError, OSError), match=says):
        prepare.read_tokens(tmp_path, "val", meta)
    for lacking in ("val_tokens", "val_sha256"):  # data that were prepared before there was a digest
        with pytest.raises((ValueError, OSError), match="val.bin"):
            prepare.read_tokens(tmp_path, "val", {k: v for k, v in meta.items() if k != lacking})


# ---- Bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_prepare_unreadable(monkeypatch, tmp_path, capsys, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(prepare, "BLOCK", rng.choice([1, 2, 3, 5, 17, 1 << 20]))
    data = bytearray(END.join(["héllo \U0001F600"] * 6).encode())
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice([b"\xff", b"\xc3", b"\xf0\x9f", b"\x80", b"\xed\xa0\x80"])
    with pytest.raises(UnicodeDecodeError) as info:
        data.decode()
    (tmp_path / "a.txt").write_bytes(data)
    assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert f"a.txt: not UTF-8 at byte {info.value.start};" in error and error.count("\n") == 1
    assert not list((tmp_path / "o").iterdir())
    monkeypatch.setattr(prepare, "LONGEST", 1000)
    monkeypatch.setattr(prepare, "BLOCK", 100)
    (tmp_path / "a.txt").write_text("a" * 5000)
    assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o") == 2
    assert "a.txt: a story of over" in capsys.readouterr().err


@pytest.mark.parametrize("args, says", [
    ("missing.txt", "missing.txt"), ("empty.txt", "fewer than two stories"), ("blank.txt", "fewer than two stories"),
    ("one.txt", "fewer than two stories"), ("nothing", "no text in nothing"),
    ("good.txt latin.txt", "latin.txt: not UTF-8 at byte 3"), ("good.txt --out=good.txt", "good.txt"),
    ("good.txt --val_fraction 0", "val_fraction"), ("good.txt --val_fraction=1", "val_fraction"),
    ("good.txt --val_fraction=nan", "val_fraction"), ("good.txt --val_fraction=half", "val_fraction"),
    ("good.txt --max_mb=0", "max_mb"), ("good.txt --max_mb=nan", "max_mb"), ("good.txt --max_mb=inf", "max_mb"),
    ("good.txt --max_mb=1e-6", "--max_mb"), ("good.txt --seed=x", "seed"),
    ("good.txt --tokenizer=", "unknown tokenizer ''"),
    ("good.txt --tokenizer gpt5", "unknown tokenizer 'gpt5': use gpt2, words or bytes"),
    ("good.txt --vocab=seen", "--vocab seen is for --tokenizer gpt2"), ("good.txt --vocab=some", "--vocab"),
    ("demo --vocab=seen --tokenizer=words", "--vocab seen is for --tokenizer gpt2"),
    ("good.txt --tokens bytes", "--tokens"), ("good.txt --val=0.1", "--val"),
    ("good.txt --labels", "--labels is for demo"), ("good.txt --label mood", "--label"),
    ("good.txt 1,2.txt", "1,2.txt: story 1: a label of 1 numbers, of 0 in the first story"),
    ("1,.txt", "story 2: a label of 0 numbers, of 1 in the first story"), ("1,1_2.txt", "story 2: a label of 2"),
    ("1,nan.txt", "story 2: '<|control|> nan' must be finite numbers"), ("1,x.txt", "story 2: '<|control|> x' must be"),
    ("1,1e39.txt", "story 2: '<|control|> 1e39' must be"), ("1,alone.txt", "story 2: '<|control|> 1' must be")])
def test_prepare_bad_input(tmp_path, args, says):
    """One clear line, status 2, and what lay in the output folder is as it was."""
    (tmp_path / "data").mkdir()
    (tmp_path / "nothing").mkdir()
    for name in "train.bin", "val.bin", "meta.json":
        (tmp_path / "data" / name).write_text("precious")
    for name, data in ("good", f"a{END}b{END}c"), ("empty", ""), ("blank", f" \n{END}\r\n{END}"), ("one", "a story"):
        (tmp_path / f"{name}.txt").write_text(data)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    if "," in args:                                        # two labelled stories, the second labelled as the name says
        name = next(name for name in args.split() if "," in name)
        label = {"": "", "alone": "<|control|> 1"}.get(name[2:-4], f"<|control|> {name[2:-4].replace('_', ' ')}\n")
        (tmp_path / name).write_text(f"<|control|> 1\na{END}{label}" + "b" * ("alone" not in name))
    before = files_in(tmp_path / "data")
    run = prepare_there(*args.split(), *["--tokenizer=bytes"] * ("--tokenizer" not in args), cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert says in run.stderr and run.stderr.startswith("prepare.py: ") and run.stderr.count("\n") == 1
    assert "Errno" not in run.stderr and files_in(tmp_path / "data") == before
    assert (tmp_path / "good.txt").read_text() == f"a{END}b{END}c"


def precious(tmp_path):
    out = tmp_path / "out"
    assert prepare_there("demo", "--max_mb=0.1", "--out", out).returncode == 0
    return out, files_in(out)


@pytest.mark.parametrize("limit", [0, 100_000, 3_000_000])
def test_prepare_full_disk(tmp_path, limit):
    """RLIMIT_FSIZE stands in for a full disk: the write fails in the same way."""
    pytest.importorskip("resource")
    out, before = precious(tmp_path)
    run = prepare_there("demo", "--max_mb=4", "--tokenizer=bytes", "--out", out,
                        code="import resource, sys, prepare; "
                             f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(prepare.main())")
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert f"cannot write {out / 'train.bin'}" in run.stderr and "large" in run.stderr
    assert files_in(out) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_prepare_ctrl_c(tmp_path):
    out, before = precious(tmp_path)
    # A shell starts background jobs with SIGINT ignored, and CI may be one: the child must not inherit that.
    process = subprocess.Popen([sys.executable, prepare.__file__, "demo", "--max_mb=1000", "--out", out],
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.time() + 60
        while not ((temporary := out / "train.bin.tmp").exists() and temporary.stat().st_size):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and error == "prepare.py: interrupted, nothing was changed\n"
    assert files_in(out) == before


@pytest.mark.parametrize("call", [1, 6, 10, 11, 12, 13, 14, 16, 18])
def test_prepare_power_cut(monkeypatch, tmp_path, call):
    """The power fails before one of the calls that change the folder: what is read then is whole, old or new."""
    assert prepare_here(monkeypatch, "demo", "--max_mb=0.05", "--out", tmp_path) == 0
    old, calls = files_in(tmp_path), []

    class PowerCut(BaseException):
        pass

    def counted(real):
        def function(*args, **more):
            calls.append(1)
            if len(calls) >= call:
                raise PowerCut
            return real(*args, **more)
        return function

    for name in "fsync", "replace", "unlink":
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    with pytest.raises(PowerCut):
        prepare_here(monkeypatch, "demo", "--max_mb=0.05", "--seed=1", "--out", tmp_path)
    monkeypatch.undo()
    if (tmp_path / "meta.json").exists():
        meta = prepare.read_meta(tmp_path)  # as the files are, token for token
        assert [len(prepare.read_tokens(tmp_path, side, meta)) for side in ("train", "val")]
        assert call < 12 and all(files_in(tmp_path)[name] == content for name, content in old.items())
    else:
        assert call >= 12
    prepare_here(monkeypatch, "demo", "--max_mb=0.05", "--seed=1", "--out", tmp_path)
    load_prepared(tmp_path)


@pytest.mark.parametrize("name", ["train.bin.tmp", "ckpt.pt.part"])
def test_a_link_in_the_way_leads_nowhere(monkeypatch, tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    try:
        os.symlink(tmp_path / "precious", tmp_path / name)
    except OSError:
        pytest.skip("no links here")
    if name == "ckpt.pt.part":
        lively().save(tmp_path / "ckpt.pt")
    else:
        assert prepare_here(monkeypatch, "demo", "--max_mb=0.05", "--out", tmp_path) == 0
    assert (tmp_path / "precious").read_text() == "precious" and not os.path.lexists(tmp_path / name)


# ---- Where the text comes from ---------------------------------------------------------------------------------------
class StoryServer(http.server.BaseHTTPRequestHandler):
    """Serves server.body; sends at most server.most bytes of it; resumes if server.resumes."""

    def do_GET(self):
        body, start = self.server.body, 0
        self.server.ranges.append(self.headers["Range"])
        if self.headers["Range"] and self.server.resumes:
            start = int(self.headers["Range"][len("bytes="):-1])
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:start + self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StoryServer) as server:
        server.body = END.join(f"story {i} " * 20 for i in range(20000)).encode()
        server.most, server.resumes, server.ranges = 1 << 30, True, []
        server.url = f"http://127.0.0.1:{server.server_port}/stories.txt"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("resumes", [True, False])
def test_prepare_download(server, tmp_path, resumes):
    """A transfer that breaks off leaves nothing under the final name; the next one completes it."""
    path, part = tmp_path / "stories.txt", tmp_path / "stories.txt.part"
    server.resumes, server.most = resumes, 1_500_000
    with pytest.raises(OSError, match="stopped at 1,500,000 of"):
        prepare.download(server.url, path)
    assert not path.exists() and part.read_bytes() == server.body[:1_500_000]
    server.most = 1 << 30
    prepare.download(server.url, path)
    assert path.read_bytes() == server.body and not part.exists()
    assert server.ranges == [None, "bytes=1500000-"]
    part.write_bytes(b"x" * len(server.body))              # nothing comes after it (416): starts again
    prepare.download(server.url, path)
    assert path.read_bytes() == server.body and not part.exists()


def test_prepare_tinystories(monkeypatch, server, tmp_path, capsys):
    monkeypatch.setattr(prepare, "TINYSTORIES", server.url)
    args = "tinystories", "--tokenizer=bytes", "--out", tmp_path
    server.most = 1000
    assert prepare_here(monkeypatch, *args) == 2 and "run this again" in capsys.readouterr().err
    server.most = 1 << 30
    assert prepare_here(monkeypatch, *args) == 0
    meta, train, val = load_prepared(tmp_path)
    assert len(train) + len(val) == 20000
    assert meta["sources"][0]["sha256"] == sha256(server.body)
    asked = len(server.ranges)
    assert prepare_here(monkeypatch, *args) == 0 and len(server.ranges) == asked        # it is there: no download


def test_prepare_with_no_input(monkeypatch, server, tmp_path, capsys):
    """training_data, then tinystories, then demo, loudly; but demo never stands in for what was asked for."""
    monkeypatch.chdir(tmp_path)
    server.shutdown()
    server.server_close()                               # from here on nobody answers
    monkeypatch.setattr(prepare, "TINYSTORIES", server.url)
    monkeypatch.setattr(prepare, "DEMO_MB", 0.1)
    assert prepare_here(monkeypatch, "tinystories", "--tokenizer=bytes") == 2
    assert "cannot download" in capsys.readouterr().err
    assert prepare_here(monkeypatch, "--tokenizer=bytes") == 0
    assert "DEMO STORIES, NOT TINYSTORIES" in capsys.readouterr().err
    assert load_prepared(tmp_path / "data")[0]["sources"][0]["name"] == "demo"
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare_here(monkeypatch, "--out=other", "--vocab=seen") == 0        # no vocabulary either: words
    assert "DEMO STORIES, NOT TINYSTORIES" in capsys.readouterr().err
    assert load_prepared(tmp_path / "other")[0]["tokenizer"] == "words"
    (tmp_path / "training_data").mkdir()
    (tmp_path / "training_data" / "a.txt").write_text(f"mine{END}mine, too")
    assert prepare_here(monkeypatch) == 2                       # own text and no vocabulary: says so
    error = capsys.readouterr().err
    assert "GPT-2 vocabulary" in error and "--tokenizer bytes" in error and error.count("\n") == 1
    assert prepare_here(monkeypatch, "--tokenizer=bytes") == 0
    assert load_prepared(tmp_path / "data")[1:] == (["mine"], ["mine, too"])


def test_prepare_help():
    text = " ".join(prepare_there("--help").stdout.split())
    for words in ("--out", "default: data", "--tokenizer", "default: gpt2, but words for demo", "--vocab",
                  "default: full", "--val_fraction", "default: 0.05", "--seed", "default: 42", "--max_mb",
                  "MB (10^6 bytes)", "tinystories", "demo"):
        assert words in text


# ==== Training ========================================================================================================
SMALL = ("--rows contiguous --block_size 32 --n_layer 2 --n_head 2 --n_embd 32 --ncn_hidden 8 --batch_size 2 --lr 1e-2 "
         "--dropout 0.1 --eval_interval 4 --log_interval 2 --val_sequences 8 --warmup_steps 3 --dtype fp32").split()
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] Step: (\d+) \| Ep: \d+ \[\d+/\d+ \(\d+\.\d%\)\] "
                      r"\| Loss: (\d+\.\d{4}) \| Reg: (\d\.\d{4}) \| PPL: (\d+\.\d\d) \| LR: \d\.\d\de[-+]\d\d \| "
                      r"Scale: \d+\.0 \| Tok/s: \d+")
VAL_LINE = re.compile(r"\[INFO\] Validation Result: Loss: (\d+\.\d{4}) \| Perplexity: (\d+\.\d{4})")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Bytes of a few demo stories, as prepare.py leaves them."""
    folder = tmp_path_factory.mktemp("data")
    arguments = "demo", "--tokenizer", "bytes", "--max_mb", "0.1", "--out", folder
    subprocess.run(command("prepare.py", *arguments), check=True)
    return str(folder)


def command(script, *args):
    return [sys.executable, str(HERE / script), *map(str, args)]


def run(script, *args, cwd=None, **more):
    return subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True, timeout=300, **more)


def train_run(data, out, *args, **more):
    done = run("train.py", "--data", data, "--out", out, *SMALL, *args, **more)
    assert done.returncode == 0, done.stderr
    return torch.load(Path(out) / "ckpt_latest.pt", weights_only=True)


def refusal(module, capsys, monkeypatch, *args):
    """Calls a script's main with arguments that it must refuse: status 2 and one line on standard error, returned."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    try:
        status = module.main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith(f"{module.__name__}.py: ") and err.count("\n") == 1, (status, out, err)
    assert "Traceback" not in err
    return err


@pytest.fixture
def train_here(data, tmp_path, monkeypatch, capsys):
    """train.py in this process, on small data and into tmp_path / "out" -> its status and its standard error."""
    handlers = {n: signal.getsignal(n) for n in (2, 15, getattr(signal, "SIGHUP", 15))}

    def train(*args, data=data):
        gc.collect()  # an earlier run's lock goes with its traceback
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", data, "--out", str(tmp_path / "out"), *SMALL,
                                          *map(str, args)])
        return training.main(), capsys.readouterr().err
    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same_weights(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["model"].keys() == b["model"].keys()


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """An uninterrupted run of 12 steps: its folder and its last checkpoint."""
    out = tmp_path_factory.mktemp("run")
    return out, train_run(data, out, "--max_steps", 12)


def test_training_writes_the_papers_log(trained, data):
    out, ckpt = trained
    log = (out / "training.log").read_text()
    steps, vals = LOG_LINE.findall(log), VAL_LINE.findall(log)
    assert [int(s[0]) for s in steps] == [1, 2, 4, 6, 8, 10, 12] and len(vals) == 3
    assert float(steps[0][2]) < 1e-4 and float(steps[0][1]) == pytest.approx(math.log(257) + 0.5, abs=0.3)
    for _, loss, _, ppl in steps:
        assert float(ppl) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert float(vals[-1][0]) < float(vals[0][0]) < float(steps[0][1])
    assert log.rstrip().endswith("[INFO] Training Complete.") and log.count("Above the stories' entropy: ") == 3
    best = torch.load(out / "ckpt_best.pt", weights_only=True)
    assert best["best"] == ckpt["best"] == pytest.approx(min(float(v[0]) for v in vals), abs=1e-4)
    # What the log says is what the checkpoint does: the validation loss, computed here from the files alone.
    model = ModulatedLM.load(out / "ckpt_latest.pt")
    val = np.fromfile(Path(data) / "val.bin", dtype="<u2").astype(np.int64)
    chosen = np.random.default_rng(0).permutation((len(val) - 1) // 32)[:8]
    rows = torch.from_numpy(np.stack([val[i * 32 : i * 32 + 33] for i in chosen]))
    assert model(rows[:, :-1], rows[:, 1:]).task.item() == pytest.approx(float(vals[-1][0]), abs=1e-4)
    settings = dict(pair.split("=") for pair in re.search(r"Settings: (.*)", log)[1].split())
    assert settings["signals"] == "gain,precision,gate" and settings["n_embd"] == "32"
    digest = hashlib.sha256((Path(data) / "train.bin").read_bytes()).hexdigest()[:12]
    assert f"Data: {data} sha256={digest} tokenizer=bytes vocab_size=257" in log


@pytest.mark.parametrize("labels", [[], ["--labels"]])
def test_demo_stories_are_told_apart_by_slot(tmp_path, train_here, monkeypatch, labels):
    """A row per story: the log's nats above the entropy, by slot, are those computed here story by story."""
    folder, out = tmp_path / "data", tmp_path / "out"
    assert prepare_here(monkeypatch, "demo", "--max_mb", "0.05", "--out", folder, *labels) == 0
    flags = "--max_steps", 4, "--block_size", 160, "--rows", "aligned", "--val_sequences", 1000
    assert train_here(*flags, data=str(folder))[0] == 0
    log = (out / "training.log").read_text()
    above = re.search(r"entropy: ([-\d.]+) nats per token, ([-\d.]+) per story \| (.*)", log)
    per_token, per_story, slots = above.groups()
    slots = dict(zip(slots.split()[::2], map(float, slots.split()[1::2]), strict=True))
    assert [*slots] == [*prepare.SLOTS, "rest"] and sum(slots.values()) == pytest.approx(float(per_story), abs=0.05)
    meta, model = prepare.read_meta(folder), ModulatedLM.load(out / "ckpt_latest.pt")
    tokenizer, val = tokenizer_of(meta), prepare.read_tokens(folder, "val", meta).astype(np.int64)
    stories = np.split(val, np.flatnonzero(val == meta["vocab_size"] - 1) + 1)[:-1]
    told, total, untold, entropy = prepare.read_labels(folder, "val", meta, val), 0.0, 0.0, 0.0
    for i, story in enumerate(stories):
        y = torch.from_numpy(story)[None]
        x = torch.cat([y[:, -1:], y[:, :-1]], 1)
        control = torch.from_numpy(told[0][i : i + 1].copy()) if labels else None
        label = zip(prepare.CONTROLS, told[0][i], strict=True) if labels else ()
        total += F.cross_entropy(model(x, control=control)[0], y[0], reduction="sum").item()
        untold += F.cross_entropy(model(x)[0], y[0], reduction="sum").item()
        entropy += sum(nats for *_, nats in prepare.read_back(tokenizer.decode(story[:-1].tolist()), label))
    assert log.count("n_control=2 (hug, long)") == len(labels) and model.config.n_control == 2 * len(labels)
    for without, worth in re.findall(r"Without the control: ([\d.]+), so it is worth ([-\d.]+) nats", log):
        assert float(without) == pytest.approx(untold / len(val), abs=1e-4)
        assert float(worth) == pytest.approx((untold - total) / len(val), abs=1e-4)
    assert log.count("Without the control") == len(labels)
    above = analyze.above_entropy(model, val, tokenizer, told)
    assert above.sum() == pytest.approx((total - entropy) / len(stories), rel=1e-4)
    assert float(per_story) == pytest.approx((total - entropy) / len(stories), rel=1e-3)
    assert float(VAL_LINE.findall(log)[-1][0]) == pytest.approx(total / len(val), abs=1e-3)
    assert float(per_token) == pytest.approx(total / len(val) - meta["entropy_nats_per_token"], abs=1e-3)
    # The checkpoint knows its tokenizer, and a word that no story holds comes back right.
    prompt, control = "Once upon a time there was a quokka", ["--control=-9,9"] * len(labels)
    said = run("sample.py", "--ckpt", out / "ckpt_best.pt", "--prompt", prompt, "--max_new_tokens=5", "--seed=1",
               *control, check=True)
    ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]])
    text = generate(ModulatedLM.load(out / "ckpt_best.pt"), ids, 5, seed=1, end_token=tokenizer.eot_token,
                    control=torch.tensor([[-9.0, 9.0]]) if labels else None)[0, 1:].tolist()
    assert said.stdout == tokenizer.decode(text).split(END)[0] + "\n" and tokenizer.name == "words"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_what_the_model_learns(data, tmp_path):
    """A progress bar, and a line of text at each validation; the log file keeps the paper's lines alone."""
    shown = in_a_terminal("train.py", "--data", data, "--out", tmp_path, *SMALL, "--max_steps", 8, errors=True)
    assert "8/8" in shown and len(re.findall(r"[\r\n]    \S", shown)) == 2
    assert all(line.startswith("20") for line in (tmp_path / "training.log").read_text().splitlines())


def test_learning_rate():
    s = dict(lr=6e-4, warmup_steps=100, max_steps=15880)
    assert training.learning_rate(20, s) == pytest.approx(1.2e-4) and training.learning_rate(100, s) == 6e-4
    assert training.learning_rate((15880 + 100) // 2, s) == pytest.approx(3e-4)
    assert training.learning_rate(15880, s) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                            (getattr(signal, "SIGKILL", 9), -9)])
def test_resume_equals_the_uninterrupted_run(trained, data, tmp_path, number, status):
    if os.name == "nt":
        pytest.skip("POSIX signals")
    flags = "--data", data, "--out", tmp_path, *SMALL, "--max_steps", 12, "--log_interval", 1
    process = subprocess.Popen(command("train.py", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Step: 5 " in line:  # after the checkpoint of step 4, before that of step 8
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    stopped = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert stopped["step"] == 4 if status == -9 else 5 <= stopped["step"] < 12
    done = run("train.py", "--data", data, "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    resumed = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert resumed["step"] == 12 and same_weights(resumed, trained[1])
    states = (ckpt["optimizer"]["state"].values() for ckpt in (resumed, trained[1]))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*states, strict=True) for k in a)
    assert "Moved" not in done.stdout and "Step: 1 " in (tmp_path / "training.log").read_text()


KILLER = """import os, random, signal, sys, time, train
def start(out, *more):
    if not (child := os.fork()):
        os.close(1), os.close(2), os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
        sys.argv = ["train.py", *sys.argv[3:], "--out", out, *more]
        os._exit(train.main())
    return child
begun = time.monotonic()
assert os.waitpid(start(sys.argv[1] + "/whole"), 0)[1] == 0
whole, rng = time.monotonic() - begun, random.Random(0)
for i in range(int(sys.argv[2])):
    out, more = f"{sys.argv[1]}/{i}", ()
    while True:
        child, delay = start(out, *more), rng.random() * whole
        time.sleep(delay * (not more))
        if not more:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        print(i, status, os.path.exists(out + "/ckpt_latest.pt.part"), flush=True)
        if status == 0:
            break
        more = ("--resume",) if os.path.exists(out + "/ckpt_latest.pt") else ()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_killed_at_random_moments(data, tmp_path):
    """NCN_KILLS runs (5), killed at a random moment, also while a checkpoint is written, and resumed: bit-equal."""
    kills = int(os.environ.get("NCN_KILLS", 5))
    args = [*SMALL, "--data", data, "--max_steps", "20", "--eval_interval", "1", "--val_sequences", "1"]
    done = subprocess.run([sys.executable, "-c", KILLER, tmp_path, str(kills), *args], cwd=HERE, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    first, whole = done.stdout.split("\n"), torch.load(tmp_path / "whole" / "ckpt_latest.pt", weights_only=True)
    assert any(line.split()[1] == "9" for line in first if line)
    print(sum(line.endswith("True") for line in first), "while a checkpoint was written;", done.stdout)
    for i in range(kills):
        ckpt = torch.load(tmp_path / str(i) / "ckpt_latest.pt", weights_only=True)
        assert ckpt["step"] == 20 and same_weights(ckpt, whole), i


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_one_training_per_folder_and_repeated_signals(data, tmp_path, capsys, monkeypatch):
    """While one is at work in a folder no other begins; a signal that comes three times at once is one signal."""
    flags = "--data", data, "--out", tmp_path, *SMALL, "--max_steps"
    with subprocess.Popen(command("train.py", *flags, 100000), stdout=subprocess.PIPE, text=True) as process:
        assert any("Step: 6 " in line for line in process.stdout)
        for more in ((), ("--resume",)):
            assert "another training is at work" in refusal(training, capsys, monkeypatch, *flags, 6, *more)
        assert any("Step: " in line for line in process.stdout)  # it goes on, however slow the machine
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        process.stdout.read()
    assert process.returncode in (143, 130) and not (tmp_path / "previous").exists()
    assert torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)["step"] > 6


def at_step_5(monkeypatch, event):
    rate = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda step, s: (step == 5 and event(), rate(step, s))[1])


@pytest.mark.parametrize("trouble", ["full disk", "broken pipe", "log", "cut data", "hangup", "nohup"])
def test_trouble_saves_the_state_first(train_here, trained, data, tmp_path, monkeypatch, trouble):
    """Output that cannot be written, data that end too soon, a lost terminal: saved first, and resumed bit-equal."""
    if trouble in ("full disk", "log", "hangup", "nohup", "cut data") and sys.platform == "win32":
        pytest.skip("POSIX")
    folder = tmp_path / "data"
    shutil.copytree(data, folder)

    def event():
        if trouble == "cut data":
            os.truncate(folder / "train.bin", 4096)
        elif trouble in ("hangup", "nohup"):
            signal.raise_signal(signal.SIGHUP)
        elif trouble == "log":
            os.dup2(os.open("/dev/full", os.O_WRONLY), log.fileno())
        else:
            reader, writer = os.pipe()
            os.close(reader)
            broken = open(writer if trouble == "broken pipe" else "/dev/full", "w", buffering=1)
            context.setattr(sys, "stdout", broken)

    def opened(*args, real=open, **more):
        nonlocal log
        file = real(*args, **more)
        log = file if "training.log" in str(args[0]) else log
        return file

    log = None
    monkeypatch.setattr(training, "open", opened, raising=False)
    if trouble in ("nohup", "hangup"):  # the tests themselves may run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_IGN if trouble == "nohup" else signal.SIG_DFL)
    with monkeypatch.context() as context:
        at_step_5(context, event)
        status, error = train_here("--max_steps", 12, "--eval_interval", 100, "--log_interval", 1, data=str(folder))
    ckpt = torch.load(tmp_path / "out" / "ckpt_latest.pt", weights_only=True)
    if trouble == "nohup":
        assert (status, ckpt["step"]) == (0, 12)
        return
    assert (status, error.count("\n")) == ((129, 0) if trouble == "hangup" else (2, 1)), error
    assert ckpt["step"] in (4, 5)
    if trouble == "cut data":
        assert "train.bin was cut short" in error
        shutil.copytree(data, folder, dirs_exist_ok=True)
    assert train_here("--resume", data=str(folder)) == (0, "")
    ckpt = torch.load(tmp_path / "out" / "ckpt_latest.pt", weights_only=True)
    assert ckpt["step"] == 12 and same_weights(ckpt, trained[1])


def torchrun(*args, launcher=("--standalone", "--nproc_per_node=2")):
    return [sys.executable, "-m", "torch.distributed.run", *launcher, *command("train.py", *args, *SMALL)[1:]]


def workers(process):
    """The process numbers of a torchrun's processes by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {int(pid): re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()) for pid in pids}
    return {int(match[1]): pid for pid, match in ranks.items() if match}


MORTAL = """import os, sys, train
rate, victims = train.learning_rate, {7: "1", 18: "0"}  # step: rank
def learning_rate(step, s):
    if victims.get(step) == os.environ["RANK"] and not os.path.exists(died := f"{sys.path[0]}/died-{step}"):
        open(died, "w").close()
        os.kill(os.getpid(), 9)
    return rate(step, s)
train.learning_rate = learning_rate
sys.exit(train.main())"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_restarted_group_goes_on(data, tmp_path):
    """Two nodes without a shared disk: a process of each is killed, torchrun starts all again, nothing is lost."""
    whole, nodes, port = tmp_path / "whole", [tmp_path / "a", tmp_path / "b"], random.randint(20000, 40000)
    for folder in (whole, *nodes):
        folder.mkdir()
    flags = "--data", data, "--out", "out", *SMALL, "--max_steps", "24", "--log_interval", "1"
    done = subprocess.run(torchrun(*flags), cwd=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mortal.py").write_text(MORTAL)
    launcher = ("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=1",
                f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", tmp_path / "mortal.py")
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, launcher), *flags]
    agents = [subprocess.Popen(command, cwd=node, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env=os.environ | {"PYTHONPATH": str(HERE)}) for node in nodes]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0] and not any("Traceback" in e for e in errors), errors
    logs = [node / "out" / "training.log" for node in nodes if (node / "out").exists()]
    steps = [int(step) for step, *_ in LOG_LINE.findall(logs[0].read_text())]
    assert len(logs) == 1 and steps == [*range(1, 7), *range(5, 18), *range(17, 25)]
    ckpts = [torch.load(folder / "ckpt_latest.pt", weights_only=True) for folder in (logs[0].parent, whole / "out")]
    assert ckpts[0]["step"] == 24 and same_weights(*ckpts) and not (logs[0].parent / "previous").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_signal_to_all_processes_is_one(data, tmp_path):
    """As a scheduler sends it, to torchrun and its processes at once, and torchrun passes it on."""
    flags = "--data", data, "--out", tmp_path, "--max_steps", 100000, "--eval_interval", 100000
    with subprocess.Popen(torchrun(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        assert any("Step: 6 " in line for line in agent.stdout)
        for pid in (agent.pid, *workers(agent).values()):
            os.kill(pid, signal.SIGTERM)
        _, error = agent.communicate(timeout=100)
    assert "[rank" not in error and torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)["step"] >= 6, error


def test_two_processes_equal_one(trained, data, tmp_path):
    """The same micro-batches, the same dropout; only the order of float additions differs."""
    flags = "--data", data, "--out", tmp_path, "--max_steps", 12
    done = subprocess.run(torchrun(*flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two, one = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True), trained[1]
    for name in one["model"]:
        torch.testing.assert_close(two["model"][name], one["model"][name], atol=2e-4, rtol=1e-3)
    logs = [(folder / "training.log").read_text() for folder in (tmp_path, trained[0])]
    assert logs[0].count("Step: ") == logs[1].count("Step: ")  # one process writes
    losses = [[float(v[0]) for v in VAL_LINE.findall(log)] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_a_control_is_dropped_now_and_then():
    """A row's as a whole, one in ten: a function of the seed and the micro-batch."""
    told = [[training.drop_control(np.ones((4, 3, 2), np.float32), seed, micro) for micro in range(900)]
            for seed in (1, 1, 2)]
    assert all((c == c[:, :1, :1]).all() for c in sum(told, []))
    first, again, other = (1 - np.array(c)[:, :, 0, 0] for c in told)
    assert (first == again).all() and (first != other).any() and 0.08 < first.mean() < 0.12
    assert training.drop_control(None, 1, 1) is None


def test_a_control_counts_by_how_much_it_varies(tmp_path, monkeypatch, train_here):
    """A new run divides its weights by the standard deviation of the labels; one that never varies keeps them."""
    numbers = [(0.1 * (i % 4), 7.3, 1000.0 * (i % 3)) for i in range(60)]
    stories = (f"{prepare.CONTROL} {a} {b} {c}\nOnce there was cat number {i}." for i, (a, b, c) in enumerate(numbers))
    (tmp_path / "text.txt").write_text(f"\n{END}\n".join(stories))
    data, flags = tmp_path / "data", ("--tokenizer=bytes", "--val_fraction=0.3")
    assert prepare_here(monkeypatch, tmp_path / "text.txt", *flags, "--out", data) == 0
    assert train_here("--max_steps", 1, "--lr", 0, "--seed", 5, data=str(data))[0] == 0
    model = ModulatedLM.load(tmp_path / "out" / "ckpt_latest.pt")
    torch.manual_seed(5)
    start = ModulatedLM(model.config).controller.control.weight
    told = np.fromfile(data / "train.control.bin", "<f4").reshape(-1, 3).astype(float)
    sd = torch.from_numpy(told.std(0)).float()
    torch.testing.assert_close(model.controller.control.weight, start / torch.tensor([sd[0], 1, sd[2]]))


def test_labelled_stories_resume_and_share(tmp_path, monkeypatch):
    """Killed and resumed, the run is the uninterrupted one bit for bit; two processes compute what one does."""
    data, flags = tmp_path / "data", ("--max_steps", 6, "--log_interval", 1)
    assert prepare_here(monkeypatch, "demo", "--labels", "--tokenizer=bytes", "--max_mb=0.05", "--out", data) == 0
    one = train_run(data, tmp_path / "one", *flags)
    process = subprocess.Popen(command("train.py", "--data", data, "--out", tmp_path / "killed", *SMALL, *flags),
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any("Step: 5 " in line for line in process.stdout)
    process.kill()
    process.communicate()
    run("train.py", "--data", data, "--out", tmp_path / "killed", "--resume", check=True)
    assert same_weights(torch.load(tmp_path / "killed" / "ckpt_latest.pt", weights_only=True), one)
    subprocess.run(torchrun("--data", data, "--out", tmp_path / "two", *flags), check=True, capture_output=True)
    two = torch.load(tmp_path / "two" / "ckpt_latest.pt", weights_only=True)
    for name in one["model"]:
        torch.testing.assert_close(two["model"][name], one["model"][name], atol=2e-4, rtol=1e-3)
    assert one["model"]["controller.control.weight"].abs().min() > 0


def test_a_run_begins_with_the_weights_of_another(trained, data, tmp_path, capsys, monkeypatch):
    """On other data of the vocabulary, with the log of a new run; a learning rate of 0 leaves the weights alone."""
    other, labelled = tmp_path / "other", tmp_path / "labelled"
    for folder, labels in ((other, ()), (labelled, ("--labels",))):
        assert prepare_here(monkeypatch, "demo", "--tokenizer=bytes", "--max_mb=0.03", "--out", folder, *labels) == 0
    flags, first = ("--init", trained[0] / "ckpt_latest.pt", "--max_steps"), trained[1]
    same = train_run(other, tmp_path / "same", *flags, 1, "--lr", 0)
    assert same_weights(same, first) and same["step"] == 1 and same["data"] != first["data"]
    for folder, more, says in ((data, ["--n_embd=64"], "n_embd"), (labelled, [], "n_control"), (data, ["--resume"], 0)):
        said = refusal(training, capsys, monkeypatch, "--data", folder, "--out", tmp_path / "no", *SMALL, *more,
                       *flags[:2])
        assert f"the same {says} is needed" in said if says else "not allowed with" in said
    flags = "--data", labelled, "--out", tmp_path / "no", *SMALL, "--signals=none"
    said = refusal(training, capsys, monkeypatch, *flags)
    assert "n_control is 2, but a model without signals has no controller" in said and not (tmp_path / "no").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_process_that_dies_ends_the_run(data, tmp_path):
    run = subprocess.Popen(torchrun("--data", data, "--out", tmp_path, "--max_steps", 100000),
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any("Step: 6 " in line for line in run.stdout)  # the checkpoint of step 4 is written
    os.kill(workers(run)[1], signal.SIGKILL)
    run.communicate(timeout=100)
    assert run.returncode not in (0, None)
    assert torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)["step"] >= 4  # still a whole checkpoint


@pytest.mark.parametrize("flags", ["--signals none --n_ffn 70", "--signals gain,gate --start zero", "--rows aligned",
                                   "--salience global --dtype bf16"])
def test_other_models_train_too(tmp_path, train_here, flags):
    assert train_here("--max_steps", 4, *flags.split())[0] == 0
    log = (tmp_path / "out" / "training.log").read_text()
    assert len(VAL_LINE.findall(log)) == 1
    assert log.count("sees the future, no likelihood") == ("global" in flags) * 4  # three steps, one validation
    model = ModulatedLM.load(tmp_path / "out" / "ckpt_best.pt")
    assert (model.controller is None) == ("none" in flags)
    if "zero" in flags:  # the authors' start: precision softplus(0) + 0.01, gate and gain not pinned
        assert "Reg: 0.0025" in log  # 0.01 * (0.5^2 of the gate)
    assert generate(model, tokens(2, 3, vocab_size=257), 40, seed=1).shape == (2, 43)


def test_training_needs_no_vocabulary(tmp_path):
    """A machine without a network trains on GPT-2 tokens that were prepared elsewhere."""
    ids = np.random.default_rng(0).integers(0, 300, 500)
    write_data(tmp_path, {"tokenizer": "gpt2", "vocab_size": 50257}, train=ids, val=ids)
    offline = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "https_proxy": "http://127.0.0.1:9"}
    train_run(tmp_path, tmp_path / "out", "--max_steps", 2, env=os.environ | offline)


def test_checkpointed_blocks_compute_the_same():
    """Bit for bit, dropout included, and less is kept."""
    results, kept = [], []
    for blocks in (False, True):
        model, size = lively(dropout=0.3).train(), 0
        model.checkpoint_blocks = blocks

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens(3, 16), tokens(3, 16, seed=1))
        loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
        kept.append(size)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and kept[1] < kept[0] / 2


def test_operations_per_token_are_counted():
    """The formula of --bench against torch's own counter, which misses attention and the in-place product addmm_."""
    from torch.utils.flop_counter import FlopCounterMode
    for signals in (SIGNALS, ()):
        c = NCNConfig(vocab_size=512, block_size=128, n_layer=3, n_head=4, n_embd=64, dropout=0.0, signals=signals)
        model, ids = ModulatedLM(c), tokens(2, 128)
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).total.backward()
        missed = 6 * c.n_layer * c.n_embd * c.block_size + 2 * c.vocab_size * c.n_embd
        ratio = (counter.get_total_flops() / ids.numel() + missed) / training.flops_per_token(c)
        assert 1 <= ratio < (1.02 if signals else 1 + 1e-9)  # folding the query is work per call
    assert 110e6 < training.flops_per_token(NCNConfig()) < 117e6


def test_a_dtype_is_chosen_by_the_model_and_the_cpu(monkeypatch):
    """bf16 needs products that are faster, and enough of them; the controller has no say."""
    text = dict(vocab_size=10589, n_layer=3, n_head=4, n_embd=128)
    demo = text | dict(vocab_size=567)
    for config, gain, want in (text, 3, "bf16"), (text, 1.2, "fp32"), (demo, 3, "fp32"):
        for more in {}, dict(signals=()), dict(signals=(), n_ffn=604):
            seconds = iter([gain] * 5 + [1] * 5)
            monkeypatch.setattr(training, "timed", lambda work, seconds=seconds: next(seconds))
            assert training.choose_dtype(CPU, NCNConfig(**config, **more))[0] == want


@pytest.mark.parametrize("flags", [[], ["--signals", "none", "--checkpoint_blocks"]])
def test_bench_prints_its_table(tmp_path, flags):
    done = run("train.py", "--bench", "--data", tmp_path / "none", *SMALL, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"--signals none"} | ({"with the controller", "the controller"} if not flags else set())
    names |= {"peak memory"} if sys.platform == "linux" else set()
    assert all(re.search(rf"^{re.escape(name)} +[\d.,%-]+", done.stdout, re.M) for name in names), done.stdout
    assert "vocabulary 50,257" in done.stdout
    assert not list(tmp_path.iterdir())  # it trains nothing and writes nothing


@pytest.mark.parametrize("salience", ["reactive", "constant"])
def test_unused_weights_under_torchrun(data, tmp_path, salience):
    """The salience query and key get no gradient, which DistributedDataParallel must be told."""
    flags = "--max_steps", 2, "--salience", salience
    done = subprocess.run(torchrun("--data", data, "--out", tmp_path, *flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_earlier_run_is_set_aside(tmp_path, train_here):
    out = tmp_path / "out"
    assert train_here("--max_steps", 2)[0] == 0
    first = torch.load(out / "ckpt_latest.pt", weights_only=True)
    assert train_here("--max_steps", 3, "--seed", 7)[0] == train_here("--max_steps", 2, "--seed", 8)[0] == 0
    assert same_weights(torch.load(out / "previous" / "1" / "ckpt_latest.pt", weights_only=True), first)
    logs = [(out / name / "training.log").read_text() for name in ("previous/1", "previous/2", ".")]
    assert [log.count("Training Complete.") for log in logs] == [1, 1, 1] and len(set(logs)) == 3


def test_resume_refuses(trained, data, tmp_path, capsys, monkeypatch):
    def refuse(*args):
        return refusal(training, capsys, monkeypatch, "--data", data, *args)

    assert "--n_embd is 64, the checkpoint has 32" in refuse("--out", trained[0], "--resume", "--n_embd", 64)
    assert "--signals is gain" in refuse("--out", trained[0], "--resume", "--signals", "gain")
    assert "--rows is aligned" in refuse("--out", trained[0], "--resume", "--rows", "aligned")
    assert "no checkpoint" in refuse("--out", tmp_path, "--resume")
    ModulatedLM.load(trained[0] / "ckpt_latest.pt").save(tmp_path / "ckpt_latest.pt")
    assert "not written by train.py" in refuse("--out", tmp_path, "--resume")
    (tmp_path / "ckpt_latest.pt").write_bytes((trained[0] / "ckpt_latest.pt").read_bytes()[:5000])
    assert "damaged" in refuse("--out", tmp_path, "--resume")
    other = tmp_path / "other"
    run("prepare.py", "demo", "--max_mb", "0.05", "--seed", "1", "--out", other)
    assert "not the data" in refusal(training, capsys, monkeypatch, "--data", other, "--out", trained[0], "--resume")
    ckpt = torch.load(trained[0] / "ckpt_latest.pt", weights_only=True)
    ckpt["data"]["train_tokens"] = torch.ones(3)
    torch.save(ckpt, tmp_path / "ckpt_latest.pt")
    assert "not the data" in refuse("--out", tmp_path, "--resume")
    assert not any(map(prepare.is_sound, (torch.ones(3), BYTES | {"vocabulary": torch.ones(3)})))
    assert same_weights(torch.load(trained[0] / "ckpt_latest.pt", weights_only=True), trained[1])


def test_training_refuses(data, tmp_path, capsys, monkeypatch):
    def refuse(*args):
        return refusal(training, capsys, monkeypatch, "--out", tmp_path / "out", *args)

    good = ["--data", data, *SMALL]
    assert "run prepare.py" in refuse("--data", tmp_path)
    assert "n_embd 32 is not divisible by n_head 3" in refuse(*good, "--n_head", 3)
    assert "unrecognized arguments: --n_heads 3" in refuse(*good, "--n_heads", 3)
    assert "unknown salience mode 'psychic'" in refuse(*good, "--salience", "psychic")
    assert "unknown signal" in refuse(*good, "--signals", "gain,dopamine")
    assert "invalid int value" in refuse(*good, "--n_head", "two")
    assert "--lr" in refuse(*good, "--lr", "nan")
    assert "contiguous or aligned" in refuse(*good, "--rows", "packed")
    assert "unknown signal 'none'" in refuse(*good, "--signals", "none,gain")
    assert "--beta2" in refuse(*good, "--beta2", 1)
    assert "--max_steps" in refuse(*good, "--max_steps", 10**400)
    for name, value in (("n_layer", 10**8), ("ncn_hidden", 10**400), ("n_embd", 10**6)):
        assert re.search(r"this model needs over [\d,]{3,13} GiB to train", refuse(*good, f"--{name}", value))
    for signals in ("gain,", "nonegain", ""):
        assert "unknown signal" in refuse(*good, "--signals", signals)
    assert "too few for --batch_size" in refuse(*good, "--batch_size", 10**6)
    assert "holds 0 rows" in refuse(*good, "--block_size", 10**7)
    for name in ("train.bin", "val.bin", "meta.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(data).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
        assert ("not the file" if name != "meta.json" else "damaged") in refuse("--data", folder, *SMALL)
        if name != "meta.json":
            (folder / name).unlink()
            assert f"{folder / name}: No such file" in refuse("--data", folder, *SMALL)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_training_says_what_the_machine_lacks(data, tmp_path, capsys, monkeypatch):
    """One line each: a GPU for this process, NCCL (then it is gloo), a compiler."""
    def refuse(*args):
        return refusal(training, capsys, monkeypatch, "--data", data, "--out", tmp_path / "out", *SMALL, *args)

    assert "torch finds 0" in refuse("--device", "cuda") and "invalid choice: 'tpu'" in refuse("--device", "tpu")
    with monkeypatch.context() as m:
        m.setattr(training, "pick_device", lambda name: torch.device("cuda"))
        m.setenv("WORLD_SIZE", "2")
        m.setenv("MASTER_ADDR", "127.0.0.1")
        for nccl, backend in ((True, "cpu:gloo,cuda:nccl"), (False, "gloo")):
            m.setattr(training.dist, "is_nccl_available", lambda nccl=nccl: nccl)
            m.setattr(training.dist, "init_process_group", lambda name, **_: training.fail(name) and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                refuse()
            assert capsys.readouterr().err == f"train.py: {backend}\n"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    assert "--compile needs a C compiler" in refuse("--compile")
    assert not (tmp_path / "out").exists()


def run_here(monkeypatch, module, *args):
    """A script's main in this process, which is quicker than one of its own."""
    gc.collect()  # an earlier run's lock goes with its cycles
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    handlers = {n: signal.getsignal(n) for n in (2, 15, getattr(signal, "SIGHUP", 15))}
    assert module.main() == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_resume_in_another_precision(data, tmp_path, monkeypatch):
    """The scale of fp16's losses begins where there was none, goes on, and is left behind."""
    for steps, dtype, growth in ((2, "fp32", None), (4, "fp16", 2), (6, "fp16", 4), (8, "bf16", None)):
        run_here(monkeypatch, training, "--data", data, "--out", tmp_path, *SMALL, "--max_steps", steps,
                 "--dtype", dtype, *["--resume"] * (steps > 2))
        ckpt = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
        assert ckpt["step"] == steps and ckpt["scaler"].get("_growth_tracker") == growth


MPS = torch.device("mps")


class FakeMps(TorchFunctionMode):
    """An Apple GPU on the CPU: follows which tensors would be on it, where none may have floats wider than 32 bits
    (its integers may: indices are int64)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        on_mps = any(getattr(t, "on_mps", isinstance(t, torch.nn.Parameter)) for t in given)
        if func == torch.Tensor.device.__get__:
            return MPS if on_mps else CPU
        on_mps = func is not torch.Tensor.cpu and (on_mps or any(t is MPS for t in given))
        args, kwargs = torch.utils._pytree.tree_map(lambda a: CPU if a is MPS else a, (args, kwargs or {}))
        out = func(*args, **kwargs)
        out = out.clone() if func is torch.Tensor.cpu else out
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, torch.nn.Parameter):
                assert not (on_mps and t.dtype in (torch.float64, torch.complex128)), func
                t.on_mps = on_mps
        return out


def test_no_64_bit_floats_on_mps(data, tmp_path, monkeypatch):
    """Training, validation, resuming, sampling: in float32, and with the optimizer that torch has for every device."""
    fused, AdamW = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **how: fused.append(how["fused"]) or AdamW(*args, **how))
    for module in training, sampling:
        monkeypatch.setattr(module, "pick_device", lambda name: MPS)
    monkeypatch.setattr(training, "ThreadPoolExecutor", lambda *_, **__: SimpleNamespace(  # the mode is of one thread
        submit=lambda *call: SimpleNamespace(result=functools.partial(*call))))
    dtype = "--dtype", "auto"
    for module, args in ((training, [*SMALL, *dtype, "--data", data, "--out", tmp_path, "--max_steps", 4]),
                         (training, [*SMALL, *dtype, "--data", data, "--out", tmp_path, "--max_steps", 5, "--resume"]),
                         (sampling, ["--ckpt", tmp_path / "ckpt_best.pt", "--prompt", "Once", "--max_new_tokens", 8])):
        with FakeMps():
            run_here(monkeypatch, module, *args)
    assert fused == [False, False] and "mps x 1" in (tmp_path / "training.log").read_text()
    with pytest.raises(AssertionError), FakeMps():
        torch.ones(3, device=MPS).double()


def test_non_finite_loss_stops_the_run(data, tmp_path):
    """The run is broken in its sixth step; the checkpoint of the fourth stays as it was."""
    code = f"""import sys, torch, train
step = torch.optim.AdamW.step
def broken(self, *args, calls=[], **more):
    calls.append(1)
    if len(calls) == 6:
        self.param_groups[0]["params"][0].grad.fill_(float("nan"))
    return step(self, *args, **more)
torch.optim.AdamW.step = broken
sys.argv = ["train.py", "--data", {data!r}, "--out", {str(tmp_path)!r}, *{SMALL!r}, "--max_steps", "20"]
sys.exit(train.main())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not finite at step" in done.stderr and "ckpt_latest.pt" in done.stderr
    assert done.stderr.count("\n") == 1
    kept = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(v).all() for v in kept["model"].values())


def test_nothing_that_is_not_finite_is_saved_or_loaded(train_here, tmp_path, monkeypatch):
    model, path, broken = lively(), tmp_path / "a.pt", [torch.ones(2), torch.tensor([1.0, math.nan])]
    model.save(path)
    before = path.read_bytes()
    for change in (lambda: model.save(path, optimizer={"state": {0: {"exp_avg": broken[1]}}}),
                   lambda: (model.norm.weight.data.fill_(math.inf), model.save(path))):
        with pytest.raises(FloatingPointError, match="not finite"):
            change()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    torch.save({"config": ncn.asdict(model.config), "model": model.state_dict()}, path)
    with pytest.raises(ValueError, match="a.pt holds no NCN model: .*not finite"):
        ModulatedLM.load(path)
    # A run that diverges between two log lines, told to stop; and one that saves after each step.
    assert train_here("--max_steps", 4)[0] == 0
    good = (tmp_path / "out" / "ckpt_latest.pt").read_bytes()
    far = "--lr", 1e30, "--warmup_steps", 0
    with monkeypatch.context() as context:
        at_step_5(context, lambda: None)
        rate = training.learning_rate
        context.setattr(training, "learning_rate", lambda step, s: (
            step == 20 and signal.raise_signal(signal.SIGTERM), rate(step, s))[1])
        never = "--max_steps", 1000, "--log_interval", 1000, "--eval_interval", 1000
        status, error = train_here("--resume", *far, *never)
    assert status == 1 and "not finite" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "ckpt_latest.pt").read_bytes() == good
    assert train_here(*far, "--max_steps", 50, "--log_interval", 1000, "--eval_interval", 1)[0] == 1
    for path in (tmp_path / "out").glob("*.pt"):
        assert ncn.all_finite(ncn.load_file(path))


def test_a_full_disk_leaves_the_last_checkpoint(trained, data, tmp_path):
    resource = pytest.importorskip("resource")
    for name in ("ckpt_latest.pt", "ckpt_best.pt", "training.log"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    before = (tmp_path / "ckpt_latest.pt").read_bytes()
    done = run("train.py", "--data", data, "--out", tmp_path, "--resume", "--max_steps", 16,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.startswith("train.py: cannot write") and done.stderr.count("\n") == 1
    assert (tmp_path / "ckpt_latest.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_best.pt", "ckpt_latest.pt", "lock", "training.log"]


# ==== Generation ======================================================================================================
@pytest.mark.parametrize("salience, trained_as", [("causal", "causal"), ("causal", "global"), ("reactive", "causal"),
                                                  ("constant", "constant")])
def test_cached_generation_is_the_full_pass(salience, trained_as):
    """Token for token, over several refills of the window, from short prompts and from ones longer than the window."""
    seen = set()
    for block_size, prompt in ((16, tokens(3, 1)), (16, tokens(1, 1).expand(3, -1)), (16, tokens(2, 5)),
                               (16, tokens(1, 16)), (16, tokens(1, 40)), (3, tokens(1, 7)), (2, tokens(2, 1))):
        model = lively(salience=trained_as, block_size=block_size)
        text = prompt
        for _ in range(60):
            logits = model(text[:, window_start(text.size(1), block_size):], salience=salience)[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(generate(model, prompt, 60, temperature=0, salience=salience), text)
        seen |= set(text[:, prompt.size(1):].flatten().tolist())
    assert len(seen) > 8  # not stuck on one token, where any cache would look right


def steps(decoder, ids, salience, edit=None, control=None):
    """The decoder's logits after 5, 6, ..., T tokens."""
    decoder.rewind()
    parts = [slice(5), *(slice(t, t + 1) for t in range(5, ids.size(1)))]
    return [decoder.step(ids[:, t], salience, edit, control if control is None else control[:, t]) for t in parts]


@pytest.mark.parametrize("gpu, parts", [(True, 1), (False, 2), (False, 17)])
@pytest.mark.parametrize("config", [dict(), dict(signals=(), n_ffn=50), dict(signals=("precision",)),
                                    dict(salience="reactive"), dict(salience="constant"), dict(n_control=2),
                                    dict(salience="reactive", n_control=2), dict(salience="constant", n_control=3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_is_the_model(gpu, parts, config, batch, monkeypatch):
    """A step at a time against the full pass; gpu: as a GPU decodes, over all slots, the unwritten ones masked."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)  # weights that do not divide evenly, too
    model, ids = lively(**config), tokens(batch, 16)
    control = controls(batch, 16, n) if (n := model.config.n_control) else None  # another one for each token
    decoder = sampling.Decoder(model, batch, gpu)
    for edit in (None, lambda signals: 2 * signals):
        decoder.cache.fill_(9e3)  # what was never written must not count
        with torch.no_grad():
            full = model(ids, edit=edit, control=control)
            for t, logits in enumerate(steps(decoder, ids, model.config.salience, edit, control), 4):
                torch.testing.assert_close(logits, full[:, t], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gpu", [True, False])
def test_models_in_half_precision_generate(dtype, gpu):
    """Their decoder is as near to the exact logits as their full pass is."""
    for config in (dict(), dict(signals=()), dict(salience="reactive")):
        exact, model, ids = lively(**config), lively(**config).to(dtype), tokens(2, 16)
        with torch.no_grad():
            want, near = exact(ids), model(ids)
            got = torch.stack(steps(sampling.Decoder(model, 2, gpu), ids, model.config.salience), 1)
        assert (got - want[:, 4:]).abs().max() < 3 * (near - want).abs().max()
        assert generate(model, ids[:, :3], 20, seed=1).shape == (2, 23)


def surprise(logits):
    """An internal metric: the entropy of a prediction and its largest logit. (B, V) -> (B, 2)."""
    return torch.stack([torch.special.entr(logits.softmax(-1)).sum(-1), logits.amax(-1)], 1)


class Tape(TorchDispatchMode):
    """A CUDA graph on the CPU. What is called in capture leaves a list behind and no other trace; replay calls it again
    on the same tensors, having poisoned all that is made on the way: nothing may be left over from another time."""
    running = None

    @contextlib.contextmanager
    def capture(self, stream):
        assert stream == "a stream of cpu"  # by default torch takes that of the first GPU that captured anything
        self.calls, self.made, self.before, Tape.running = [], {}, {}, self
        with self:
            yield
        Tape.running = None
        for storage, content in self.before.values():
            storage.copy_(content)

    def write(self, tensor):
        """Notes what a tensor that was there before looked like, before it is written."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.made:
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        with self:
            if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        for argument, value in (*zip(schema.arguments, args, strict=False), *((a, kwargs[a.name])
                                for a in schema.arguments if a.name in kwargs)):
            if argument.alias_info and argument.alias_info.is_write:
                self.write(value)
        out = func(*args, **kwargs)
        if all(r.alias_info is None for r in schema.returns) and schema.name != "aten::_unsafe_view":
            outs = [out] if isinstance(out, torch.Tensor) else out
            self.made |= {o.untyped_storage().data_ptr(): o for o in outs}
            if "empty" not in schema.name:
                self.calls.append((func, args, kwargs, outs))
        elif schema.is_mutable:
            self.calls.append((func, args, kwargs, ()))
        return out

    @torch.no_grad()
    def replay(self):
        for made in self.made.values():
            made.fill_(math.nan if made.is_floating_point() else 1 << 40)
        for function, args, kwargs, outs in self.calls:
            new = function(*args, **kwargs)
            for i, old in enumerate(outs):
                old.copy_(new if isinstance(new, torch.Tensor) else new[i])

    def kernels(self):
        """How many a GPU would run. Those of torch's topk and cumsum that take several are in its CUDA sources."""
        count = len(self.calls)
        for function, args, kwargs, _ in self.calls:
            if function is torch.ops.aten.topk.default:
                *rows, width = args[0].shape
                wide = width >= 20000 and math.prod(rows) <= 20  # then radix passes by many blocks, scans and a sort
                count += 15 if wide else kwargs.get("sorted", args[4] if len(args) > 4 else True)
            count += function is torch.ops.aten.cumsum.default and args[0].numel() == args[0].size(-1)
        return count


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Generation as on a GPU: two steps as they are, one captured, the others replayed."""
    monkeypatch.setattr(sampling, "Decoder", functools.partial(sampling.Decoder, gpu=True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", Tape.capture)


def launcher(run):
    """As kernels._cuda's, noted by a running tape."""
    def launch(*args):
        with _disable_current_modes():
            if Tape.running:
                Tape.running.calls.append((launch, args, {}, ()))
                for tensor in filter(torch.is_tensor, args[3]):
                    Tape.running.write(tensor)
            run(*args)
    return launch


@pytest.mark.parametrize("config, how", [
    ({}, {}), ({}, dict(temperature=0)), ({}, dict(top_k=0, top_p=0.7)), ({}, dict(top_p=0.5)), ({}, dict(ends=20)),
    ({}, dict(edit=lambda signals: 2 * signals)), (dict(block_size=3), dict(ends=45)), (dict(salience="reactive"), {}),
    (dict(salience="constant"), {}), (dict(signals=("precision",)), {}), (dict(signals=()), dict(ends=30)),
    (dict(n_control=2), dict(control=surprise)), (dict(n_control=2), dict(control=controls(3, 55, 2)))])
def test_a_captured_step_replays(config, how, as_on_a_gpu, monkeypatch):
    """A GPU's branch, over refills of the window, makes the CPU's tokens: from a tape, on poisoned memory."""
    model, replays, replay = lively(**{"vocab_size": 660, **config}), [], Tape.replay
    how = dict(temperature=2.0, top_k=20, seed=3) | how
    ends = how.pop("ends", None)  # the first row, there
    monkeypatch.setattr(Tape, "replay", lambda self: replays.append(self) or replay(self))
    on_a_gpu, on_a_cpu = sampling.Decoder, sampling.Decoder.func
    for ids in (tokens(3, 5), tokens(1, 5).expand(2, -1)):
        monkeypatch.setattr(sampling, "Decoder", on_a_cpu)
        how |= {"control": how["control"][: len(ids)]} if torch.is_tensor(how.get("control")) else {}
        end = {"end_token": int(generate(model, ids, 50, **how)[0, ends])} if ends else {}
        want = generate(model, ids, 50, **how, **end)
        monkeypatch.setattr(sampling, "Decoder", on_a_gpu)
        got = generate(model, ids, 50, **how, **end)
        assert torch.equal(got[:, : want.size(1)], want)
    assert len(replays) > 30 and len(set(replays)) == 2


def test_a_captured_step_replays_with_the_kernels(as_on_a_gpu, monkeypatch):
    model, ids = lively(n_layer=1, block_size=8), tokens(1, 5)
    monkeypatch.setattr(kernels, "_force_eager", True)
    want = generate(model, ids, 12, temperature=0)
    monkeypatch.setattr(kernels, "_force_eager", False)
    monkeypatch.setitem(kernels._launchers, CPU, launcher(cpu_threads()))
    assert torch.equal(generate(model, ids, 12, temperature=0), want)


def test_a_step_takes_110_kernels(as_on_a_gpu, monkeypatch):
    """The paper's six layers and vocabulary, top_k 50, an end token: 33 launches of ours and 77 of torch's."""
    tapes, noted = [], launcher(lambda *_: None)
    monkeypatch.setitem(kernels._launchers, CPU, noted)
    monkeypatch.setattr(Tape, "replay", lambda self: tapes.append(self))
    generate(lively(n_layer=6, vocab_size=50257), tokens(1, 3), 4, end_token=50256)
    ours = collections.Counter(args[0].split("<")[0] for call, args, *_ in tapes[0].calls if call is noted)
    assert ours == {"rms_norm_forward": 14, "actuate_forward": 1, "write_cache": 6, "modulate_forward": 12}
    assert tapes[0].kernels() <= 110


def three_steps(record, device, dtype, n_control, **config):
    """Of two micro-batches each, with dropout, as train.py takes them on a GPU. Returns the losses and the weights."""
    model = lively(dropout=0.1, n_control=n_control, **config).to(device).train()
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=0.01), []
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, growth_interval=2, enabled=dtype == "fp16")

    def inputs(i):
        ids, control = tokens(3, 17, seed=i).to(device), controls(3, 16, n_control or 1).to(device)
        return ids[:, :-1].clone(), ids[:, 1:].clone(), i * control if n_control else None

    work = training.passes(model, scaler, device, dtype, 2)
    work = training.recorded(work, model, *inputs(0)) if record else work
    for i in range(6):
        torch.manual_seed(i)
        seen.append(work(*inputs(i)).clone())
        if i % 2:
            seen.append(training.update(model, optimizer, scaler, {"grad_clip": 1.0}, keep=record))
    return [*seen, *(p.detach() for p in model.parameters())]


RECORDED = pytest.mark.parametrize("dtype, n_control, config", [
    ("fp32", 0, {}), ("bf16", 2, {}), ("fp16", 0, dict(salience="constant")), ("bf16", 0, dict(signals=()))])


@RECORDED
def test_recorded_passes_replay(dtype, n_control, config, as_on_a_gpu):
    """Training steps from a tape, on poisoned memory, are the same bits; nothing is left of the recording."""
    assert all(map(torch.equal, *(three_steps(how, CPU, dtype, n_control, **config) for how in (True, False))))


@ON_GPU
@RECORDED
def test_kernel_recorded_passes_replay(dtype, n_control, config, device):
    for a, b in zip(*(three_steps(how, device, dtype, n_control, **config) for how in (True, False)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("V, k", [(660, 20), (50257, 50), (997, 7), (4096, 128)])
def test_top_k_in_two_stages(V, k):
    """The same tokens; among equal logits, of which topk may take any, one as likely."""
    chance = torch.rand(60, generator=torch.Generator().manual_seed(V))
    for logits in (torch.randn(60, V, generator=torch.Generator().manual_seed(k)).mul(2), tokens(60, V) / 8.0):
        for top_p in (0.6, 1.0):
            one, two = (sampling.draw(logits, chance, 0.9, k, top_p, gpu)[:, None] for gpu in (False, True))
            value = logits.gather(1, one)
            assert torch.equal(logits.gather(1, two), value)
            assert torch.equal(one, two) or ((one == two) | ((logits == value).sum(1, keepdim=True) > 1)).all()
    likely, token = sampling.likeliest(logits, k)
    assert torch.equal(likely, logits.topk(k).values) and torch.equal(likely, logits.gather(1, token))
    assert all(len(set(row)) == k for row in token.tolist())


def test_decoder_refuses_what_it_does_not_know():
    """A new weight, and a new signal: an error, never silently other numbers."""
    model = lively()
    model.blocks[0].head_gate = torch.nn.Linear(32, 2)
    with pytest.raises(NotImplementedError, match="blocks.head_gate"):
        generate(model, tokens(1, 3), 2)
    model = lively()
    model.controller.layer2 = torch.nn.Linear(8, model.config.n_layer * 4)
    with pytest.raises((RuntimeError, ValueError)):
        generate(model, tokens(1, 3), 2)


@pytest.mark.parametrize("salience", ["causal", "reactive", "constant"])
def test_controls_in_generation_are_the_full_passes(salience):
    """A control for the text, one for each token, and one fed back from the prediction, over refills of the window."""
    model, texts = lively(salience=salience, n_control=2), []
    model.controller.control.weight.data *= 9  # so that they matter
    for prompt in (tokens(2, 5), tokens(1, 3).expand(2, -1)):
        T = prompt.size(1)
        for control in (controls(2, 2), controls(1, 2).expand(2, -1), controls(2, T + 24, 2), surprise):
            text, its = prompt, torch.zeros(2, T, 2)
            if control is not surprise:
                its = control if control.dim() == 3 else control[:, None].expand(-1, T + 24, -1)
            for n in range(T, T + 24):
                at = window_start(n, 16)
                logits = model(text[:, at:], control=its[:, at:n])[:, -1].detach()
                text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
                its = torch.cat([its, surprise(logits)[:, None]], 1) if control is surprise else its
            assert torch.equal(generate(model, prompt, 24, temperature=0, control=control), text)
            texts.append(tuple(text.flatten().tolist()))
    assert len(set(texts)) == 8
    for bad in (lambda logits: logits, torch.full((1, 2), math.nan)):
        with pytest.raises(ValueError, match="must be|not finite"):
            generate(model, tokens(1, 3), 3, control=bad)
    with pytest.raises(ValueError, match="takes no control"):
        generate(lively(), tokens(1, 3), 3, control=surprise)


def test_unseeded_generation_draws_from_torchs_generator():
    model, prompt = lively(), tokens(1, 4)
    torch.manual_seed(7)
    first, second, after = generate(model, prompt, 30), generate(model, prompt, 30), torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(generate(model, prompt, 30), first) and not torch.equal(first, second)
    assert torch.equal(generate(model, prompt, 30), second) and torch.equal(torch.rand(3), after)
    state = torch.get_rng_state()
    generate(model, prompt, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_window_keeps_its_last_half():
    for block_size in (2, 7, 16):
        starts = [window_start(n, block_size) for n in range(1, 100)]
        for n, start in enumerate(starts, 1):
            assert (start == 0) if n <= block_size else (block_size // 2 < n - start <= block_size)
        assert starts == sorted(starts)


def test_rows_end_on_their_own_and_batches_draw_the_same():
    model, prompt = lively(), tokens(1, 4).expand(6, -1)
    alone = [generate(model, prompt[:1], 40, temperature=3.0, seed=seed) for seed in range(5, 11)]
    together = generate(model, prompt, 40, temperature=3.0, seed=5)
    assert torch.equal(torch.cat(alone), together) and len(together.unique(dim=0)) == 6
    end = int(together[2, 10])
    ended = generate(model, prompt, 40, temperature=3.0, seed=5, end_token=end)
    for row, full in zip(ended, together, strict=True):
        new = full[4:].tolist()
        length = new.index(end) if end in new else 40
        assert row[4:].tolist() == (new[:length] + [end] * 40)[: ended.size(1) - 4]
    assert generate(model, prompt[2:3], 40, temperature=3.0, seed=7, end_token=end).size(1) <= 11


def test_samples_of_one_prompt_share_its_pass(monkeypatch):
    """The prompt goes through the model once; rows with prompts of their own are passed each."""
    model, passes, step = lively(), [], sampling.Decoder.step
    monkeypatch.setattr(sampling.Decoder, "step",
                        lambda self, ids, *more: passes.append(tuple(ids.shape)) or step(self, ids, *more))
    prompt = tokens(1, 9)
    shared = generate(model, prompt.expand(4, -1), 30, temperature=2.0, seed=1)
    assert passes[0] == (1, 9) and set(passes[1:]) == {(4, 1), (4, 9)}  # (4, 9): what a full window keeps
    passes.clear()
    mixed = generate(model, torch.cat([prompt, prompt, tokens(1, 9, seed=5)]), 30, temperature=2.0, seed=1)
    assert passes[0] == (3, 9) and torch.equal(mixed[:2], shared[:2])


def test_a_seed_is_a_text_whatever_its_length():
    model, prompt = lively(), tokens(2, 4)
    long = generate(model, prompt, 50, temperature=3.0, seed=5)
    for n in (0, 1, 17, 49):
        assert torch.equal(generate(model, prompt, n, temperature=3.0, seed=5), long[:, : 4 + n])


def test_generation_leaves_the_model_as_it_was():
    model = lively(dropout=0.5).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    text = generate(model, tokens(1, 4), 20, temperature=0)
    assert model.training and torch.equal(text, generate(model.eval(), tokens(1, 4), 20, temperature=0))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory from /proc")
def test_generation_needs_no_more_memory_as_it_goes_on():
    model, resident = lively(), []
    for n, _ in enumerate(stream(model, tokens(1, 4), 6000, seed=0)):
        if n % 1000 == 999:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert len(resident) == 6 and resident[-1] - resident[0] < 1e6, resident


def test_sample_draws_the_stated_distribution(monkeypatch):
    """With evenly spread chances, each token comes as often as its probability says."""
    logits, n = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2, 20_000
    chance = (torch.arange(n) + 0.5) / n
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6), (0.8, 7, 0.9),
                                      (1e-30, 0, 1.0), (1.0, 0, 1e-9), (1.0, 99, 1.0)]:
        p = ((logits - logits.max()).double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        if top_k:
            p[order[top_k:]] = 0
            p /= p.sum()
        p[order[1:][p[order].cumsum(0)[:-1] >= top_p]] = 0
        p /= p.sum()
        drawn = sampling.draw(logits.expand(n, -1), chance, temperature, top_k, top_p)
        assert (drawn.bincount(minlength=40) / n - p).abs().max() < 2e-4
    assert (sampling.draw(logits.expand(n, -1), chance, 0, 50, 1.0) == logits.argmax()).all()
    edge = torch.tensor([[0.0, 0.0, -1e30]])
    assert sampling.draw(edge, torch.tensor([1 - 2**-24]), 1.0, 0, 1.0).item() in (0, 1)  # not what has none
    quarters = sampling.draw(torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75]), 1.0, 0, 1.0)
    assert sorted(quarters.tolist()) == [0, 1, 2, 3]  # each from its lower end on
    many = torch.randn(5000, 40) * torch.linspace(0, 9, 5000)[:, None]
    for top_p in (0.05, 0.5, 0.9):  # the highest chance finds no token that top_p cuts off
        p = many.softmax(-1).sort(-1, descending=True).values
        drawn = sampling.draw(many, torch.full((5000,), 1 - 2**-24), 1.0, 0, top_p)
        lowest = p.gather(1, ((p.cumsum(-1) - p < top_p).sum(-1, keepdim=True) - 1))
        assert (many.softmax(-1).gather(1, drawn[:, None]) >= lowest * 0.999).all()
    cumsum = torch.Tensor.cumsum  # a GPU's is not sequential, so its last digits may rise where nothing was added
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim: cumsum(p, dim) + 1e-3 * torch.arange(p.size(dim)))
    for top_p in (0.5, 1.0):
        assert sampling.draw(torch.tensor([[9.0, -1e30, -1e30]]), torch.tensor([1 - 2**-24]), 1.0, 0, top_p).item() == 0


@pytest.mark.parametrize("bad", [
    dict(temperature=-0.1), dict(temperature=math.nan), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1),
    dict(max_new_tokens=-1), dict(salience="global"), dict(ids=tokens(1, 0)), dict(ids=torch.tensor([[61]])),
    dict(ids=torch.tensor([[-1]]))])
def test_generation_refuses(bad):
    with pytest.raises(ValueError):
        generate(lively(), **{**dict(ids=tokens(1, 3), max_new_tokens=2), **bad})


def test_doses_move_the_signals_they_name():
    """Precision 0.25 broadens every layer's attention and 4 narrows it; gain 0 silences every layer."""
    model, ids = lively(), tokens(4, 16)
    inputs = {}
    for i, block in enumerate(model.blocks):
        block.qkv.register_forward_hook(lambda m, x, y, i=i: inputs.__setitem__(i, y))
    entropies = {}
    for dose in (0.25, 1.0, 4.0):
        doses = torch.tensor([1.0, dose, 1.0])
        model(ids, edit=lambda s, doses=doses: s * doses)
        s = model.signals(ids) * doses
        for i in range(2):
            q, k, _ = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in inputs[i].chunk(3, -1))
            scores = (q * s[:, None, :, i, 1:2]) @ k.transpose(-1, -2) / 4
            p = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
            entropies[i, dose] = torch.special.entr(p).sum(-1).mean().item()
    for i in range(2):
        assert entropies[i, 0.25] > entropies[i, 1.0] + 0.05 and entropies[i, 1.0] > entropies[i, 4.0] + 0.05
    silent = model(ids, edit=lambda s: s * torch.tensor([0.0, 1.0, 1.0]))
    x = model.norm(model.embeddings(ids))
    torch.testing.assert_close(silent, x @ model.embed.weight.T)


# ==== Sampling ========================================================================================================
def test_sampling_writes_text(trained, monkeypatch, capsys):
    ckpt = trained[0] / "ckpt_best.pt"

    def say(*args):
        return run("sample.py", "--prompt", "Once upon", "--ckpt", ckpt, "--seed", 3, *args,
                   env=os.environ | {"PYTHONUTF8": "1"})

    one, again, three = say(), say(), say("--num_samples", 3)
    assert one.returncode == three.returncode == 0 and one.stdout == again.stdout
    assert one.stdout.startswith("Once upon") and len(one.stdout) > 60
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s: \d+ tokens/s, after the first 4 \d+ tokens/s\n", one.stderr)
    for count in (0, 4):  # no rate where nothing follows the start-up
        run_here(monkeypatch, sampling, "--prompt", "Once upon", "--ckpt", ckpt, "--max_new_tokens", count)
        assert re.fullmatch(rf"{count} tokens in [\d.]+ s: \d+ tokens/s\n", capsys.readouterr().err)
    model, ids = ModulatedLM.load(ckpt), torch.tensor([[256, *b"Once upon"]])  # after the end of another story
    expected = generate(model, ids, 256, seed=3, end_token=256)[0, 1:].tolist()
    assert one.stdout.startswith(tokenizer_of({"tokenizer": "bytes"}).decode(expected)[:20])
    first = generate(model, ids[:, :1], 256, seed=3, end_token=256)[0, 1:].tolist()  # an empty prompt: a new story
    assert say("--prompt", "").stdout.startswith(tokenizer_of({"tokenizer": "bytes"}).decode(first)[:20])
    rows = three.stdout.split("\n---\n")
    assert len(rows) == 3 and rows[0] + "\n" == one.stdout and len(set(rows)) == 3
    assert say("--gain=0").stdout != one.stdout


def test_sampling_shows_whole_characters_up_to_the_end():
    tokenizer, texts = tokenizer_of({"tokenizer": "bytes"}), []
    row = sampling.Row(tokenizer, "")
    for token in [*"né ".encode(), 0xFF, *"ü".encode(), 256, 65]:
        row.add(token)
        texts.append(row.text)
    assert texts == ["n", "n", "né", "né ", "né �", "né �", "né �ü", "né �ü", "né �ü"]
    assert row.ended and len(row.tokens) == 8


def in_a_terminal(*args, errors=False, **env):
    """The script's standard output, with its standard error if errors, run in a pseudo-terminal."""
    import fcntl
    import pty
    import termios
    os.environ.pop("NO_COLOR", None)
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))  # 25 lines of 100 columns
    env = {**os.environ, "TERM": "xterm", **env}
    stderr = writer if errors else subprocess.PIPE
    with subprocess.Popen(command(*args), stdout=writer, stderr=stderr, env=env) as process:
        os.close(writer)
        out = b""
        try:
            while part := os.read(reader, 65536):
                out += part
        except OSError:  # the other side has closed it
            pass
        os.close(reader)
        assert process.wait() == 0, process.stderr.read()
    return out.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_sampling_traces_a_signal(trained):
    """The text, longer than the context of 32 tokens, is painted with the signals that generation has read it with."""
    ckpt = trained[0] / "ckpt_best.pt"
    say = ["sample.py", "--prompt", "Once upon", "--seed", 3, "--max_new_tokens", 70, "--top_k", 3, "--ckpt", ckpt,
           "--trace", "precision", "--precision", 0.5, "--num_samples", 2]
    painted, plain = in_a_terminal(*say, "--layer", 1), run(*say).stdout
    assert "\x1b" not in plain + in_a_terminal(*say, NO_COLOR="1") + in_a_terminal(*say, TERM="dumb")
    legend, _ = legend_and_text = painted.split("\n\n", 1)
    assert re.sub(r"\x1b\[[\d;]*m", "", legend_and_text[1]) == plain and plain.isascii()  # the prompt included
    # Each token has the colour of its signal, which the generation of the same text passes to edit.
    low, high = map(float, re.search(r"layer 1: ([\d.]+) .* ([\d.]+) \(", legend).groups())
    model = ModulatedLM.load(ckpt)
    rows, expected = plain.removesuffix("\n").split("\n---\n"), []
    for seed, row in enumerate(rows, 3):
        read, prompt = [], torch.tensor([[256, *b"Once upon"]])

        def dose(signals, read=read):
            read.append(0.5 * signals[0, -1, 1, 1].item())
            return signals * torch.tensor([1, 0.5, 1])

        text = generate(model, prompt, 71, top_k=3, seed=seed, edit=dose)
        assert bytes(text[0, 1 : 1 + len(row)].tolist()).decode() == row
        first = model.signals(prompt, "causal")[0, 1:, 1, 1] * 0.5
        expected.append([*first.tolist(), *read[1:]][: len(row)])
    both = sum(expected, [])
    assert low == pytest.approx(min(both), abs=6e-4) and high == pytest.approx(max(both), abs=6e-4) and high > low
    for row, values, shown in zip(rows, expected, legend_and_text[1].split("\n---\n"), strict=True):
        colours = re.findall(r"\x1b\[48;5;(\d+);38;5;\d+m([^\x1b\n])", shown)
        assert [character for _, character in colours] == [c for c in row if c != "\n"]
        values = [v for v, character in zip(values, row, strict=True) if character != "\n"]
        for (colour, _), value in zip(colours, values, strict=True):
            level = (value - min(both)) / (max(both) - min(both)) * len(sampling.RAMP)
            assert abs(sampling.RAMP.index(int(colour)) + 0.5 - level) < 0.6


def test_a_trace_shows_what_the_control_does():
    """The signals read again, over refills of the window, are those with which the text was written."""
    model, read = lively(n_control=2), []
    for control in (controls(1, 2), None):
        text = generate(model, tokens(1, 5), 40, seed=1, control=control, edit=lambda s: read.append(s[0, -1]) or s)
        again = sampling.read_again(model, text[:, :-1], "causal", control)
        torch.testing.assert_close(again[4:], torch.stack(read[-40:]), atol=1e-5, rtol=1e-5)
    assert (read[0] - read[40]).abs().max() > 1e-3


class Pretended(io.TextIOWrapper):
    def isatty(self):
        return True


def test_a_terminal_obeys_no_text(trained, capsys, monkeypatch):
    """Control characters out of a prompt, a model, a file's name: as they are in a pipe, but not to a terminal."""
    evil, ckpt = "\x1b]0;x\x07\r\x9b\x7f\b\n", trained[0] / "ckpt_best.pt"

    def said(module, *args, terminal):
        with monkeypatch.context() as context:
            if terminal:
                for name in ("stdout", "stderr"):
                    context.setattr(sys, name, Pretended(io.BytesIO(), encoding="utf-8", write_through=True))
                context.setenv("TERM", "xterm")
            context.delenv("NO_COLOR", raising=False)
            context.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
            module.main()
            written = [s.buffer.getvalue().decode() for s in (sys.stdout, sys.stderr)] if terminal else ()
        return "".join(written or capsys.readouterr())

    def controls(text):
        return {c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160)}

    for module, *args in ((sampling, "--prompt", evil, "--ckpt", ckpt), (sampling, "--prompt", "a", "--ckpt", evil),
                          (prepare, "--tokenizer=bytes", evil[:-1]), (analyze, evil[:-1])):
        assert controls(said(module, *args, terminal=False)) and not controls(said(module, *args, terminal=True)), args
    painted = said(sampling, "--prompt", evil, "--ckpt", ckpt, "--trace", "gain", terminal=True)
    assert not controls(re.sub(r"\x1b\[(48;5;\d+;38;5;\d+|0)m", "", painted)) and "\x1b[0m" in painted


FUZZ = int(os.environ.get("NCN_FUZZ", 60))


def damaged(content, rng):
    """A copy of nested dicts and lists in which one thing, anywhere, is another one or is gone."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.03:
        wild = [None, "x", -1, 0, 10**30, 1e300, math.nan, [], {}, True, torch.ones(3), torch.tensor(math.nan)]
        if isinstance(content, torch.Tensor) and rng.random() < 0.7:
            wild = [content[..., :-1] if content.dim() else content[None], content.double(), content.flatten(),
                    content * math.inf, content * 1e38, content.int(), content.ravel()[0].expand(content.shape),
                    torch.ones(1).expand(10**6, 10**6), content.to_sparse(), content.to(torch.complex64)]
        return rng.choice(wild)
    copy = content.copy()
    key = rng.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.05:
        del copy[key]
    else:
        copy[key] = damaged(copy[key], rng)
    return copy


def cut(data, rng):
    """Bytes with one changed, a piece gone, or another one put in."""
    i, j = sorted(rng.choices(range(len(data) + 1), k=2))
    j = min(j, i + rng.choice([1, 10, 10**9]))
    return data[:i] + rng.choice([b"", bytes([rng.randrange(256)]), data[i:j] * 2, rng.randbytes(j - i)]) + data[j:]


def test_fuzz(trained, data, train_here, tmp_path, capsys, monkeypatch, run_analyze):
    """NCN_FUZZ (60) damaged checkpoints, logs and meta.json files: what comes is a result, or the one line."""
    (out := tmp_path / "out").mkdir()
    shutil.copytree(data, folder := tmp_path / "data")
    whole = {path.name: path.read_bytes() for path in (*trained[0].iterdir(), *folder.iterdir()) if path.is_file()}
    ckpt = torch.load(trained[0] / "ckpt_latest.pt", weights_only=True)
    monkeypatch.setattr(analyze, "save", lambda fig, *_: (fig.canvas.draw(), analyze.plt.close(fig)) if FUZZ > 100 else
                        analyze.plt.close(fig))
    counts = collections.Counter()
    for seed in range(FUZZ):
        rng, kind = random.Random(seed), ("resume", "sample", "meta", "log", "resume", "sample")[seed % 6]
        for name in ("ckpt_latest.pt", "training.log", "meta.json"):
            (folder if name == "meta.json" else out).joinpath(name).write_bytes(whole[name])
        name = {"meta": "meta.json", "log": "training.log"}.get(kind, "ckpt_latest.pt")
        path = (folder if kind == "meta" else out) / name
        if rng.random() < 0.3 or kind == "log":
            path.write_bytes(cut(whole[name], rng))
        elif kind == "meta":
            def plain(x):
                return x.tolist() if isinstance(x, torch.Tensor) and x.dtype != torch.complex64 else str(x)
            path.write_text(json.dumps(damaged(json.loads(whole[name]), rng), default=plain))
        else:
            torch.save(damaged(ckpt, rng), path)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if kind in ("resume", "meta"):
                more = ("--resume", "--max_steps", 13) if kind == "resume" else ("--max_steps", 1)
                status, error = train_here(*more, data=str(folder))
            else:
                args = ["--prompt", "Once", "--max_new_tokens", 3, "--ckpt", path] if kind == "sample" else [path]
                monkeypatch.setattr(sys, "argv", [f"{kind}.py", *map(str, args)])
                status = (sampling if kind == "sample" else analyze).main()
                error = capsys.readouterr().err
        counts[kind, status] += 1
        lines = error.count("\n") - (kind == "sample" and status == 0)
        heard = [str(w.message) for w in heard if w.category is not ResourceWarning]
        lines += len(heard)
        assert status in (0, 1, 2) and lines == (status > 0), (seed, kind, status, error, heard)
    print(*sorted(counts.items()))
    assert all(counts[kind, 2] for kind in ("resume", "sample", "meta"))


def test_sampling_refuses(trained, tmp_path, capsys, monkeypatch):
    ckpt = trained[0] / "ckpt_best.pt"

    def refuse(*args):
        return refusal(sampling, capsys, monkeypatch, "--prompt", "Once", "--ckpt", ckpt, *args)

    assert "temperature" in refuse("--temperature", -0.1)
    assert "top_p" in refuse("--top_p", 0) and "top_p" in refuse("--top_p", 1.5)
    assert "memory" in refuse("--max_new_tokens", 10**14) and "1e6" in refuse("--gain", 1e39)
    assert "--num_samples" in refuse("--num_samples", 0)
    assert "0 or more" in refuse("--gain", -1)
    for flags in (["--temperature", 1e-50], ["--top_p", 1e-50], ["--gain", 1e6, "--gate", 1e6, "--precision", 1e6]):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "Once", "--ckpt", str(ckpt), *map(str, flags)])
        assert sampling.main() == 0
    capsys.readouterr()
    assert "max_new_tokens (-1)" in refuse("--max_new_tokens", -1)
    assert "layers 0 to" in refuse("--trace", "gain", "--layer", 9) and "layers 0 to" in refuse("--layer", -1)
    assert "unrecognized" in refuse("--dose", 1)
    assert "--control has 2 numbers" in refuse("--control", "1,0") and "takes 0" in refuse("--control=-1")
    assert "invalid numbers value: '1,x'" in refuse("--control", "1,x")
    lively(n_control=2, vocab_size=257).save(tmp_path / "two.pt", data=BYTES | {"controls": ["hug", "long"]})
    assert "has 3 numbers" in (said := refuse("--ckpt", tmp_path / "two.pt", "--control", "1,0,1"))
    assert "takes 2: hug, long" in said
    assert "not finite" in refuse("--ckpt", tmp_path / "two.pt", "--control", "nan,0")
    assert "no checkpoint" in refuse("--ckpt", tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(ckpt.read_bytes()[:3000])
    assert "damaged" in refuse("--ckpt", tmp_path / "short.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "not a checkpoint" in refuse("--ckpt", tmp_path / "text.pt")

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    assert "safely" in refuse("--ckpt", tmp_path / "hostile.pt")
    assert not (tmp_path / "owned").exists()
    odd_model = {"model": {"embed.weight": torch.ones(2)}, "config": {"depth": 3}}
    for odd in ({"model": 3}, {"weights": torch.ones(2)}, [1], odd_model):
        torch.save(odd, tmp_path / "odd.pt")
        assert "no NCN model" in refuse("--ckpt", tmp_path / "odd.pt")


# ==== Analysis ========================================================================================================
AUTHORS_LOG = """\
2025-12-05 08:23:35,567 [INFO] Step: 20 | Ep: 1 [80/63518 (0.1%)] | Loss: 9.9924 | Reg: 0.0034 | PPL: 21860.27 | \
LR: 1.20e-04 | Scale: 65536.0 | Tok/s: 2493
2025-12-07 18:57:00,151 [INFO] Validation Result: Loss: 1.5082 | Perplexity: 4.5184
"""


def said(*texts):
    return [f"2025-12-05 09:00:00,000 [INFO] {text}\n" for text in texts]


def log_lines(steps, losses, seconds_per_step=1.0, speed=1000, suffix=""):
    times = [datetime(2025, 12, 5, 8) + timedelta(seconds=seconds_per_step * int(s)) for s in steps]
    return [f"{t:%Y-%m-%d %H:%M:%S},{t.microsecond // 1000:03d} [INFO] Step: {s} | Ep: 1 [{s}/9 (1.0%)] | "
            f"Loss: {x:.4f} | Reg: 0.0001 | PPL: 1.00 | LR: 1.20e-04 | Scale: 1.0 | Tok/s: {speed}{suffix}\n"
            for t, s, x in zip(times, steps, losses, strict=True)]


def val_lines(loss):
    return said(f"Validation Result: Loss: {loss:.4f} | Perplexity: 1.0000")


def write_log(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.log").write_text("".join(lines), encoding="utf-8")
    return str(folder / "training.log")


def read_lines(folder, *lines):
    return analyze.read_log(write_log(folder, itertools.chain(*lines)))


def loss_curve(kind, seed=0):
    """Synthetic logs: 800 points, noise 0.05, one point every 20 steps as in the authors' log."""
    s = 20 * np.arange(1, 801)
    y = 1.5 + 8 * np.exp(-s / 700) + np.random.default_rng(seed).normal(0, 0.05, len(s))
    return s, y + {"Converged": 0 * s, "Still improving": -3e-5 * s, "Diverging": 2e-4 * np.maximum(s - 12000, 0)}[kind]


@pytest.fixture
def run_analyze(monkeypatch, capsys):
    """analyze.py with these arguments -> what it prints; with refused=True the one line in which it refuses."""
    def run(*args, refused=False):
        monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
        status = analyze.main()
        out, err = capsys.readouterr()
        assert (status, bool(err)) == ((2, True) if refused else (0, False)), err
        assert not err or err.count("\n") == 1 and err.startswith("analyze.py: ") and "wrote" not in out, err
        return err or out
    return run


def pictures(folder):
    """The names of the files in a folder but its logs and checkpoints; PNGs are 1000 pixels wide, by their headers."""
    for path in folder.glob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 1000
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".log", ".pt"))


def test_analyze_reads_logs(tmp_path):
    run = read_lines(tmp_path / "theirs", AUTHORS_LOG)
    assert [run[key] for key in ("name", "val", "above", "broke")] == ["theirs", [(20, 1.5082)], [], None]
    assert run["step"].tolist() == [20] and run["loss"].tolist() == [9.9924]
    steps = [1, 10, 20, 30]
    run = read_lines(tmp_path, log_lines(steps, [4, 3, 2, 1], seconds_per_step=2.0, speed=512))
    np.testing.assert_allclose([run["tokens"], run["minutes"]], np.outer([1024, 2 / 60], steps))  # 2 s each
    # What train.py states wins over the clock, which also counts validation.
    head = said("Preset laptop", "910,252 parameters, 70,828 of them the controller's", "bf16: why",
                "Settings: lr=0.1 rows=x seed=3", "Data: a/b sha256=01ab", "600 steps of 8,192 tokens, from data")
    tail = said("Above the stories' entropy: 0.0300 nats per token, 3.60 per story | hero 0.10 whom 3.00 rest 0.50")
    run = read_lines(tmp_path, head, log_lines(steps, [4, 3, 2, 1], 50, 512), val_lines(2), tail)
    np.testing.assert_allclose([run["tokens"], run["minutes"]], np.outer([8192, 16 / 60], steps))
    shown = " ".join(analyze.title(run).split())  # a title shows the chief settings
    assert "| Preset laptop | 910,252 parameters, " in shown and "| Settings: lr=0.1 seed=3 | 600 steps of 8," in shown
    assert [run[key] for key in ("setup", "data", "parameters", "dtype", "speed", "above")] == [
        {"lr": "0.1", "rows": "x", "seed": "3"}, {"sha256": "01ab"}, "910,252", "bf16", 512,
        [(30, 3.6, {"hero": 0.1, "whom": 3.0, "rest": 0.5})]]


def test_analyze_resumed_repeated_and_broken_runs(tmp_path):
    above = said("Above the stories' entropy: 0.0100 nats per token, 1.00 per story | hero 1.00")
    run = read_lines(tmp_path, log_lines(range(10, 101, 10), [5] * 10), val_lines(4), above, log_lines(
        range(60, 65), [9] * 5), log_lines(range(70, 121, 10), [3] * 6), val_lines(2.5), above)
    assert run["step"].tolist() == [10, 20, 30, 40, 50, 60, 61, 62, 63, 64, 70, 80, 90, 100, 110, 120]
    assert run["loss"].tolist() == [5] * 5 + [9] * 5 + [3] * 6
    assert run["val"] == [(120, 2.5)], "the validation at step 100 belongs to weights that were lost"
    assert run["above"] == [(120, 1, {"hero": 1})] and not any("runs in one file" in note for note in run["notes"])
    for second in (range(20, 61, 20), [1, 20, 40], range(50, 201, 50), [20]):  # begun afresh: the last run counts
        run = read_lines(tmp_path, log_lines(range(20, 301, 20), [5] * 15), val_lines(4.9),
                         log_lines(second, [3] * len(second)))
        assert run["step"].tolist() == list(second) and set(run["loss"]) == {3} and run["val"] == []
        assert any(note.startswith("2 runs in one file") for note in run["notes"])
    torn = log_lines([50], [3.1234])[0].split("234")[0]  # cut off within the number: 3.1 would be wrong
    run = read_lines(tmp_path, log_lines([10, 20, 30, 40], [5, math.nan, math.inf, 4]), "\nnoise\n",
                     val_lines(math.nan), torn)
    assert run["step"].tolist() == [10, 40] and run["loss"].tolist() == [5, 4] and run["val"] == []
    assert any(note.startswith("2 rows") for note in run["notes"])
    for end in (log_lines([90], [math.nan]), said("Stopped: loss nan, gradient norm nan at step 90; x")):
        v = analyze.verdict(read_lines(tmp_path, log_lines(range(1, 81), [2.0] * 80), end))
        assert v["verdict"] == "Diverging" and "step 90" in v["why"]


def test_analyze_verdicts(tmp_path):
    for kind, true in (("Converged", 0.0), ("Still improving", -0.03), ("Diverging", 0.2)):
        verdicts = [analyze.verdict(read_lines(tmp_path, log_lines(*loss_curve(kind, seed)))) for seed in range(40)]
        assert sum(v["verdict"] == kind for v in verdicts) >= 38
        assert sum(abs(v["slope"] - true) <= v["half"] for v in verdicts) >= 37  # the interval is a 98% one
    s = 20 * np.arange(1, 801)
    for slope, kind in ((-0.9e-6, "Converged"), (-1.1e-6, "Still improving"), (1.1e-6, "Diverging")):  # no noise
        assert analyze.verdict(dict(step=s, loss=2 + slope * s, broke=None))["verdict"] == kind, slope
    rng = np.random.default_rng(0)
    for n in (1, 4, 20, 60):  # at most nine points in the last 15%
        v = analyze.verdict(dict(step=10 * np.arange(1, n + 1), loss=2 + rng.normal(0, 0.05, n), broke=None))
        assert (v["verdict"] == "Undecided") == (n < 30) and v["why"].startswith("uncertain") == (n >= 30)


def test_analyze_curves():
    for confidence, freedom, t in ((0.95, 1, 12.7062), (0.95, 2, 4.30265), (0.95, 60, 2.0003), (0.98, 5, 3.36493)):
        assert abs(analyze.student_t(confidence, freedom) / t - 1) < 2e-5, freedom
    y = np.array([3.0, 1.0, 4.0])
    np.testing.assert_allclose(analyze.ewma(y, 3), [3, 5 / 3, 21 / 7])  # weights 1, 1/2, 1/4
    np.testing.assert_allclose(analyze.ewma(y, 1), y)
    s = 20 * np.arange(1, 801)
    e = analyze.efficiency(dict(step=s, loss=1.5 + 25.0 * s**-0.6))
    assert abs(e["a"] - 1.5) < 0.02 and abs(e["b"] - 25) < 1 and abs(e["c"] - 0.6) < 0.02 and e["r2"] > 0.9999
    line = analyze.efficiency(dict(step=s, loss=5 - 1e-4 * s))
    assert abs(line["sei"] - 0.5) < 0.02 and line["a"] >= 0
    np.testing.assert_allclose(line["step"][[line["p95"], line["p99"]]] / s[-1], [0.95, 0.99], atol=0.04)
    early = analyze.efficiency(dict(step=s, loss=np.where(s < 100, 5.0, 1.0)))
    assert early["sei"] > 0.97 and early["step"][early["p95"]] < 120
    for loss in (1 + 1e-4 * s, np.array([3.0, 2.0, 1.0])):  # nothing improved, too short
        assert analyze.efficiency(dict(step=s[: len(loss)], loss=loss)) is None


def test_analyze_pictures_of_logs(tmp_path, monkeypatch, run_analyze):
    write_log(tmp_path / "out", log_lines(*loss_curve("Still improving")) + val_lines(1.25))
    monkeypatch.chdir(tmp_path)
    out = run_analyze()  # out/training.log is the default
    assert "out: Still improving, slope -0.0" in out and "1.2500" in out
    assert pictures(tmp_path / "out") == ["convergence_analysis.png", "sample_efficiency.png"], "and no temporary file"
    for n in (1, 5):  # so short that there is nothing to fit: the points are drawn all the same
        assert "Undecided" in run_analyze(write_log(tmp_path / f"short{n}", log_lines(range(1, n + 1), [3.0] * n)))
        assert pictures(tmp_path / f"short{n}") == ["convergence_analysis.png"]
    lines = [line.split(" | Tok/s")[0] + "\n" for line in log_lines(range(1, 31), np.linspace(4, 2, 30))]  # no speeds
    assert "Still improving" in run_analyze(write_log(tmp_path, lines))
    paths = [write_log(tmp_path / name, log_lines(*loss_curve("Converged", i)) + val_lines(1.5 - 0.25 * i))
             for i, name in enumerate(("first", "second"))]
    assert "-0.2500" in run_analyze(*paths, "--out", tmp_path / "new")
    assert pictures(tmp_path / "new") == [
        "convergence_analysis_first.png", "convergence_analysis_second.png", "sample_efficiency.png"]
    # Without --out each log's own picture goes beside it, and their comparison beside the first.
    run_analyze(*paths)
    assert pictures(tmp_path / "first") == ["convergence_analysis.png", "sample_efficiency.png"]
    assert pictures(tmp_path / "second") == ["convergence_analysis.png"]
    # The right axis shows exp(loss) at the loss's own ticks, and calls it no perplexity where it sees the future.
    axes = []  # ylim, label, what stands at 2.5
    monkeypatch.setattr(analyze, "save", lambda fig, *_: axes.extend(
        (ax.get_ylim(), ax.get_ylabel(), ax.yaxis.get_major_formatter()(2.5, 0)) for ax in fig.axes))
    future = "exp(loss): sees the future, no perplexity"
    for suffix, name in (("", "perplexity"), (" | global salience: sees the future, no likelihood", future)):
        axes.clear()
        out = run_analyze(write_log(tmp_path, log_lines(range(1, 20), [3.0] * 19, suffix=suffix)))
        assert axes[2:] == [(ylim, name, "12.182") for ylim, *_ in axes[:2]] and ("likelihood" in out) == bool(suffix)


def test_analyze_bad_logs(tmp_path, run_analyze):
    good = write_log(tmp_path / "good", log_lines(*loss_curve("Converged")))
    for name, content in (("empty", b""), ("foreign", b"epoch 1 loss 3\n"), ("binary", bytes(range(256)) * 100)):
        (tmp_path / f"{name}.log").write_bytes(content)
    nan = write_log(tmp_path / "nan", log_lines([1, 2], [math.nan] * 2))
    for bad in ("missing.log", "empty.log", "foreign.log", "binary.log", ".", nan):
        assert (tmp_path / bad).name in run_analyze(good, tmp_path / bad, refused=True)
    assert "empty.log" in run_analyze(good, "--out", tmp_path / "empty.log", refused=True)
    assert pictures(tmp_path / "good") == [], "a bad log beside a good one must leave nothing half done"
    assert "unrecognized arguments" in run_analyze("--no-such-flag", refused=True)


def compared(folder, seed, final, above=None, digest="0123456789ab", every=10, **settings):
    """A made-up log: three validations, 10 steps apart, fall in a straight line from 4 at step 0 to `final`."""
    settings = dict(signals="gain,precision,gate", salience="causal", n_embd=128, n_ffn=0, max_steps=3 * every,
                    lr=0.002, seed=seed) | settings
    lines = said("2,084,297 parameters, 70,729 of them the controller's", f"Data: data sha256={digest}", "bf16: why",
                 "Settings: " + " ".join(f"{name}={value}" for name, value in settings.items()))
    for i in range(3):
        lines += log_lines(range(i * every + 1, (i + 1) * every + 1), [3.0] * every)
        lines += val_lines(4 + (final - 4) * (i + 1) / 3)
        lines += said(f"Above the stories' entropy: 0.01 nats per token, 5.00 per story | {above[i]}") if above else []
    return write_log(folder / f"{len(list(folder.glob('*')))}", lines)


def test_analyze_is_quick(tmp_path, run_analyze):
    lines = log_lines(range(1, 100_001), np.linspace(9, 2, 100_000))
    path = write_log(tmp_path, [x for i in range(0, len(lines), 50) for x in lines[i : i + 50] + val_lines(2.0)])
    paths = [compared(tmp_path / "many", i // 5, 2 + 0.01 * i, every=200, n_ffn=i % 5) for i in range(40)]
    for limit, args in ((8, [path]), (15, ["--compare", *paths])):
        start = time.process_time()  # not the clock on the wall: the machine may be busy
        run_analyze(*args)
        assert time.process_time() - start < limit


def test_analyze_compare(tmp_path, run_analyze):
    # The first group scatters by 0.2, the pairs' differences (-0.1, -0.2, -0.3) by 0.1: t(2) 0.1 / sqrt(3) = 0.2484.
    paths = [compared(tmp_path, seed, x) for seed, x in enumerate((2.0, 2.2, 2.4))]
    paths += [compared(tmp_path, seed, x, signals="none", n_ffn=604) for seed, x in enumerate((1.9, 2.0, 2.1))]
    paths += [compared(tmp_path, seed, x, salience="reactive") for seed, x in ((7, 2.6), (2, 2.5))]
    out = run_analyze("--compare", *paths, "--out", tmp_path / "new")
    assert [line.split() for line in out.splitlines() if "2,084,297" in line] == [line.split() for line in (
        "signals=all salience=causal n_ffn=0  3  2,084,297  1,000  2.2000  0.2000        -       -       -  30",
        # The mean falls from 4 by 2 in 30 steps, and so reaches 2.2 after 27.
        "signals=none n_ffn=604               3  2,084,297  1,000  2.0000  0.1000  -0.2000  0.2484  0.1000  27",
        "salience=reactive                    2  2,084,297  1,000  2.5500  0.0707  +0.1000       -       -   -")]
    assert "salience=reactive has no run of seed 0, 1:" in out and "n_ffn=0 has no run of seed 7:" in out
    assert all(x in out for x in ("scatter by 0.1000", "would by 0.2236", "worth 5 times"))  # sqrt(0.2^2 + 0.1^2)
    assert "anecdote" in out, "one pair is left of the last group"
    assert "anecdote" not in run_analyze("--compare", *paths[:6])
    assert pictures(tmp_path / "new") == ["comparison.png", "runs.csv"]
    # The table can be made again from runs.csv.
    with open(tmp_path / "new" / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(r["group"], r["seed"], r["val_loss"]) for r in runs[5:]] == [
        ("signals=none n_ffn=604", "2", "2.1"), ("salience=reactive", "2", "2.5"), ("salience=reactive", "7", "2.6")]
    assert [runs[0][key] for key in ("parameters", "tokens_per_s", "validations", "data")] == [
        "2084297", "1000", "10=3.3333 20=2.6667 30=2.0", "sha256=0123456789ab"] and "seed=0" in runs[0]["settings"]


def test_analyze_compare_few_and_unequal_runs(tmp_path, run_analyze):
    paths = [compared(tmp_path, 0, 2.0), compared(tmp_path, 0, 1.9, n_embd=64)]
    for settings, word in ((dict(digest="ba9876543210"), "sha256"), (dict(lr=0.001), "lr"), ({}, "same seed"),
                           (dict(max_steps=60), "max_steps"), (dict(rows="aligned"), "rows")):
        assert word in run_analyze("--compare", *paths, compared(tmp_path, 0, 1.9, **settings), refused=True)
    out = run_analyze("--compare", *paths)
    assert [line.split()[-4:] for line in out.splitlines() if "n_embd=64" in line] == [["-0.1000", "-", "-", "29"]]
    other = Path(compared(tmp_path, 0, 1.8))  # of other code: the same settings, but more parameters
    other.write_text(other.read_text().replace("2,084,297", "2,084,693"))
    assert "parameters=2,084,693" in run_analyze("--compare", paths[0], other)
    other.write_text(other.read_text().replace("n_ffn=0", "n_ffn=9"))  # where settings tell, they alone are told
    told = run_analyze("--compare", paths[0], other)
    assert "n_ffn=9 " in told and "parameters=" not in told
    with open(paths[1], "a") as file:
        file.writelines(said("Stopped: loss nan, gradient norm nan at step 31"))
    out = run_analyze("--compare", *paths)
    assert f"{paths[1]} is left out, it ends at step 31 of 30" in out and "n_embd" not in out.split("group")[-1]
    assert "is finished" in run_analyze("--compare", compared(tmp_path, 0, 2.0, max_steps=60), refused=True)
    old = write_log(tmp_path / "old", log_lines([10, 20], [3, 2]) + val_lines(2))
    assert "does not name its settings" in run_analyze("--compare", old, refused=True)


def test_analyze_learned(tmp_path, run_analyze):
    # A slot is learned where it stays below 0.5. The rows: median, earliest and latest of three seeds.
    heroes, goals = ([2, 0.4, 0.3], [0.4, 0.6, 0.49], [0, 0, 0]), ([2, 2, 2], [2, 2, 0], [2, 2, 0.5])
    paths = [compared(tmp_path, seed, 2.0, [f"hero {hero[i]} goal {goal[i]} rest 1" for i in range(3)])
             for seed, (hero, goal) in enumerate(zip(heroes, goals, strict=True))]
    rows = run_analyze("--compare", *paths).split("learned")[1].splitlines()[3:6]
    assert [row.split()[-2:] for row in rows] == [["20", "never"], ["10", "30"], ["30", "never"]]


def scan_model(**config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=16, ncn_hidden=8, dropout=0.0)
    model = ModulatedLM(NCNConfig(**sizes | config)).eval()
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return model


def scan_data(folder, meta, ids=None):
    """A data folder as prepare.py leaves it, of these tokens; else of 40 stories of 40 to 80 random bytes."""
    rng = np.random.default_rng(0)
    ids = ids or [i for _ in range(40) for i in (*rng.integers(97, 123, rng.integers(40, 80)), 256)]
    return write_data(folder, meta, val=ids)


def random_batch(*shape, seed=0):
    return torch.randint(257, (2, *shape), generator=torch.Generator().manual_seed(seed))  # ids and targets


def test_analyze_variance_shares():
    rng, n, t = np.random.default_rng(0), 60, 50
    parts = [rng.normal(size=shape) for shape in ((n, 1, 1, 1), (1, t, 1, 1), (n, t, 1, 1))]  # story, place, token
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 2, 1)):
        s = sum(w * x / x.std() for w, x in zip(weights, parts, strict=True)) + np.zeros((n, t, 2, 3))
        share, want = analyze.variance_shares(s), np.square(weights) / np.square(weights).sum()
        assert share.shape == (3, 2, 3) and np.abs(share.sum(0) - 1).max() < 1e-9
        assert np.abs(share - want[:, None, None]).max() < 0.03, weights
    # Pure noise of few stories and positions: the means' own chance variance must not count as theirs.
    noise = analyze.variance_shares(rng.normal(size=(12, 10, 500, 3)))
    assert noise[:2].mean((1, 2)).max() < 0.045  # uncorrected: 1/10 and 1/12 of the whole
    assert np.isfinite(analyze.variance_shares(np.ones((n, t, 2, 3)))).all()  # a signal that never moves


def test_analyze_attention_entropy():
    ids, model = random_batch(1, 20)[0], scan_model()
    entropy = analyze.attention_entropy(model, ids)
    assert entropy.shape == (2, 2, 2, 20) and np.abs(entropy[..., 0]).max() < 1e-6  # one token: nowhere else to look
    with torch.no_grad():  # independently: row by row from the blocks' weights
        signals, x = model.signals(ids), model.embeddings(ids)
        for i, block in enumerate(model.blocks):
            q, k, _ = block.qkv(block.attn_norm(x)).double().chunk(3, -1)
            scales = signals[0, :, i, 1], torch.ones(20)
            for head, t, (j, scale) in itertools.product(range(2), range(20), enumerate(scales)):
                part = slice(8 * head, 8 * head + 8)
                p = (scale[t] * (k[0, : t + 1, part] @ q[0, t, part]) / math.sqrt(8)).softmax(0)
                assert abs(entropy[j, i, head, t] + float((p * p.log()).sum())) < 1e-4
            x = block(x, signals[:, :, i])


@pytest.mark.parametrize("salience", ["causal", "global", "reactive"])
def test_analyze_ablations(salience):
    model = scan_model(salience=salience)
    batches = [random_batch(2, 32, seed=seed).unbind() for seed in range(3)]
    loss, s = analyze.ablations(model, batches)
    names = [f"{name} {how}" for how in ("mean", "neutral") for name in (*SIGNALS, "all")]
    assert list(loss) == ["as trained", *names, *["prefix only"] * (salience == "global")]
    plain = ModulatedLM(NCNConfig(**{**vars(model.config), "signals": ()})).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("controller")})

    def losses(model, **how):
        return [model(x, y, **how).task.item() for x, y in batches]

    np.testing.assert_allclose(loss["as trained"], losses(model), atol=1e-6)
    np.testing.assert_allclose(loss["all neutral"], losses(plain), atol=1e-5)
    if salience == "global":
        np.testing.assert_allclose(loss["prefix only"], losses(model, salience="causal"), atol=1e-6)
    # One at a time: pinning the gate leaves gain and precision alone, so it differs from pinning all.
    assert len({round(float(v[0]), 6) for v in loss.values()}) == len(loss)
    # Padding has signals, but they count nowhere.
    batches[0][1][1, 20:] = -1
    padded = analyze.ablations(model, batches)[1]
    assert s.shape == (192, 2, 3) and torch.equal(padded, torch.cat([s[:52], s[64:]]))
    # A controller that never moves is worth nothing beyond its mean.
    model.controller.layer2.weight.data.zero_()
    loss, _ = analyze.ablations(model, batches)
    assert all(np.abs(loss[f"{name} mean"] - loss["as trained"]).max() < 1e-5 for name in SIGNALS)
    only, _ = analyze.ablations(scan_model(signals=("gate",)), batches)
    assert list(only) == ["as trained", "gate mean", "gate neutral"]


def test_analyze_shielding():
    # Eq. 17 at its limit: gain 0 (or gate 0) shields a branch's weights exactly.
    for which, silent in ((0, ("attn", "qkv", "ffn")), (2, ("ffn",))):
        model, (x, y), opened = scan_model(), random_batch(5, 16), torch.ones(2, 3)
        opened[1, which] = 0
        model(x, y, edit=lambda signals, opened=opened: signals * opened).task.backward()
        for layer, block in enumerate(model.blocks):
            for name, p in block.named_parameters():
                assert (layer == 1 and name.startswith(silent)) == (p.grad is None or p.grad.count_nonzero() == 0), name
    y[2, 9:] = -1  # padding, in what is measured
    r, loss = analyze.shielding(model, x, y)
    assert r.shape == (2, 2) and all(p.grad is None for p in model.parameters())
    signals, norms, losses, block = [], [], [], model.blocks[1]
    for i, real in enumerate((y >= 0).sum(1)):
        losses.append(model(x[i : i + 1, :real], y[i : i + 1, :real]).task)
        grads = torch.autograd.grad(losses[-1], [*block.parameters()])
        ffn = [g for (name, _), g in zip(block.named_parameters(), grads, strict=True) if name.startswith("ffn_")]
        norms.append([torch.cat([g.flatten() for g in part]).norm() for part in (grads, ffn)])
        signals.append(model.signals(x[i : i + 1, :real])[0, :, 1, [0, 2]].mean(0).tolist())
    want = [np.corrcoef(*pair)[0, 1] for pair in zip(np.transpose(signals), np.array(norms).T, strict=True)]
    np.testing.assert_allclose(r[1], want, atol=1e-4)  # gain and all, gate and FFN
    assert abs(loss - sum(losses).item() / 5) < 1e-5
    model.controller.layer2.weight.data.zero_()  # a signal that never moves has no correlation
    assert np.isnan(analyze.shielding(model, x, y)[0]).all()


def test_analyze_spread():
    s = np.array([[[0.5, 1, 1], [1, 1, 2]], [[1.5, 1, 1], [1, 1, 4]]])  # two tokens, two layers
    assert analyze.spread(s) == [["1.000 ± 0.500", "1.000 ± 0.000", "1.000 ± 0.000"],
                                 ["1.000 ± 0.000", "1.000 ± 0.000", "3.000 ± 1.000"]]


@pytest.mark.parametrize("config", [{"salience": "global"}, {"signals": ("precision",)}])
def test_analyze_scan_and_audit(tmp_path, monkeypatch, run_analyze, config):
    scan_data(tmp_path / "data", BYTES)
    (tmp_path / "out").mkdir()
    rows = {"rows": "aligned" if "signals" in config else "contiguous"}
    scan_model(**config).save(tmp_path / "out" / "ckpt_best.pt", data=BYTES, settings=rows)
    monkeypatch.chdir(tmp_path)
    out = run_analyze("--scan", "He paid $5,\nbut it was empty.", "--audit")
    assert all(words in out for words in ("Specialisation", "Phasic", "story (tonic) / position / token",
                                          "Attention entropy", "as trained", "gates below 0.5", "Gradient shielding"))
    assert ("the leak is" in out) == (config.get("salience") == "global")
    assert pictures(tmp_path / "out") == ["attention_entropy.png", "audit.png", "brain_scan.png"]
    # Without validation stories the scan still works, and says what it leaves out.
    out = run_analyze("--scan", "x" * 50, "--data", "nowhere")
    assert "Only the first 32" in out and "No shares" in out
    assert "".join(analyze.label(t, prepare.tokenizer_of(BYTES)) for t in (*b" a\n$", 200)) == "·a↵$?"  # 200: no text


def test_analyze_refuses_models_and_data(tmp_path, run_analyze):
    ckpt, no = tmp_path / "ckpt.pt", functools.partial(run_analyze, "--ckpt", tmp_path / "ckpt.pt", refused=True)
    data = scan_data(tmp_path / "data", BYTES)
    assert "ckpt.pt" in no("--audit")
    scan_model(signals=()).save(ckpt, data=BYTES)
    assert "no controller" in no("--scan", "Hello") and "no controller" in no("--audit", "--data", data)
    scan_model().save(ckpt, data=BYTES)
    assert "no tokens" in no("--scan", "") and "not trained on the demo" in no("--memory", "--data", data)
    assert "--data" in no("--audit", "--data", scan_data(data, {"tokenizer": "gpt2", "vocab_size": 50257}))
    words = {"tokenizer": "words", "vocab_size": 258, "vocabulary": ["one"]}
    scan_model(vocab_size=258).save(ckpt, data=words)
    assert "--data" in no("--audit", "--data", scan_data(data, words | {"vocabulary": ["two"]}))
    (data / "meta.json").write_text("{")
    assert "damaged" in no("--audit", "--data", data) and "no data" in no("--audit", "--data", tmp_path / "nowhere")


def test_analyze_memory(tmp_path, monkeypatch, run_analyze):
    """Validation stories told here, and sampled ones told with wrong words put in by hand: the figures are exact."""
    meta, rng = {"tokenizer": "words", "vocabulary": prepare.grammar_words()}, random.Random(1)
    meta |= dict.fromkeys(("entropy_nats_per_story", "entropy_nats_per_token"), prepare.entropy())
    tokenizer = prepare.tokenizer_of(meta)
    end, words = tokenizer.eot_token, prepare.GRAMMAR["color"].split("|")
    meta["vocab_size"] = tokenizer.n_vocab
    model, ckpt = scan_model(vocab_size=tokenizer.n_vocab, block_size=160, salience="global"), tmp_path / "ckpt_best.pt"
    model.save(ckpt, data=meta)
    ids, total, colour = [], 0, 0  # nats above the entropy: all in all, and at the colours, of which there are six
    for _ in range(20):
        text, nats = prepare.tell(rng)
        story = [end, *tokenizer.encode_ordinary(text), end]
        logits = model(torch.tensor([story[:-1]]), salience="causal")[0]
        loss = F.cross_entropy(logits, torch.tensor(story[1:]), reduction="none").tolist()
        ids, total = ids + story[1:], total + (sum(loss) - nats) / 20
        pairs = zip(loss, story[1:], strict=True)
        colour += sum(x for x, token in pairs if tokenizer.decode([token]).strip() in words) / 20
    scan_data(tmp_path / "data", meta, ids)

    texts, heroes, colours, strange = [], set(range(10)), set(range(7, 21)), set(range(30, 36))
    for i in range(200):
        text, _ = prepare.tell(rng)
        for slot, wrong, which in (("name", ("Lily", "Sam"), heroes), ("color", ("red", "blue"), colours)):
            if i in which:  # the last mention is another one than the first
                *_, (_, start, stop, word, _) = (m for m in prepare.read_back(text) if m[0] == slot)
                text = text[:start] + wrong[word == wrong[0]] + text[stop:]
        text = text[: text.rindex(" ")] + " quokka." if i in strange else text
        texts.append(tokenizer.encode_ordinary(text) + [end])
    width = max(map(len, texts)) - 1
    endless = {i for i, text in enumerate(texts) if len(text) > width}  # whole stories, but for their END

    def generate(model, ids, most, temperature, top_k, top_p, seed, end_token):
        assert (ids == end_token).all() and len(ids) == 200 and most > width
        assert (temperature, top_k, top_p, end_token) == (0.5, 0, 1, end)
        return torch.cat([ids, torch.tensor([(text + [end_token] * width)[:width] for text in texts])], 1)

    monkeypatch.setattr(analyze, "generate", generate)
    look = "--memory", "--ckpt", ckpt, "--data", tmp_path / "data"
    out = run_analyze(*look)
    rows = {line[:12].strip(): line[12:].split() for line in out.splitlines()}
    told = set(range(200)) - strange - endless
    assert endless and f"(temperature 0.5) {len(told)} are stories" in out
    kept = {slot: int(rows[slot][0]) for slot in (*prepare.SLOTS, "all of these")}
    assert kept == dict.fromkeys(prepare.SLOTS, len(told)) | {
        "hero": len(told - heroes), "colour": len(told - colours), "all of these": len(told - heroes - colours)}
    nats = {slot: float(row[-1]) for slot, row in rows.items() if slot in (*kept, "the rest", "whole story")}
    np.testing.assert_allclose([nats["whole story"], nats["colour"]], [total, colour - math.log(6)], atol=0.006)
    assert abs(nats["all of these"] + nats["the rest"] - total) < 0.02 and "No memory.png" in out
    # With the log of a training beside it, the picture. A static model has a memory, too.
    scan_model(vocab_size=tokenizer.n_vocab, block_size=160, signals=()).save(ckpt, data=meta)
    lines = [f"hero {h} " + " ".join(f"{slot} 2" for slot in [*prepare.SLOTS][1:]) + " rest 1" for h in (2, 0.4, 0.1)]
    os.replace(compared(tmp_path / "logs", 0, 2.0, lines), tmp_path / "training.log")
    labels, save = [], analyze.save
    monkeypatch.setattr(analyze, "save", lambda fig, *where: (
        labels.extend(text.get_text() for text in fig.legends[0].texts), save(fig, *where)))
    run_analyze(*look)
    assert "memory.png" in pictures(tmp_path)
    assert labels[:3] == ["whole story", "hero: learned at step 20", "friend: not learned"]


# ==== The README ======================================================================================================
README = (HERE / "README.md").read_text(encoding="utf-8")
SNIPPETS = [textwrap.dedent(text) for text in re.findall(r"^ *```python\n(.*?)^ *```", README, re.S | re.M)]


def test_readme_names_what_there_is(monkeypatch, capsys):
    """Every file and picture, every flag, every name with an underscore, and the line of each equation."""
    helps, modules = "", (analyze, kernels, ncn, prepare, sampling, training, torch, NCNConfig, ModulatedLM)
    for module in (analyze, prepare, sampling, training):
        monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
        with contextlib.suppress(SystemExit):
            module.main()
        helps += capsys.readouterr().out
    torchruns = {"--nproc_per_node", "--nnodes", "--rdzv", "--max"}
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", README)) <= set(re.findall(r"--[a-z]\w+", helps)) | torchruns
    files = {file for file in re.findall(r"\]\((?!https?:|#)([^)#]+)", README)}
    files |= set(re.findall(r"`([\w/]+\.(?:py|cu|txt|csv|png|svg))`", README))
    assert len(files) > 10 and all((HERE / file).exists() for file in files), files
    names = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:\([^`]*\))?`", README)) - {"my_folder"}
    assert all(name in NCNConfig.__dataclass_fields__ or any(hasattr(m, name) for m in modules) for name in names)
    lines = (HERE / "ncn.py").read_text(encoding="utf-8").splitlines()
    equations = re.findall(r"\[(\d+)\]\(ncn\.py#L(\d+)\)", README)
    assert sorted(int(number) for number, _ in equations) == [*range(1, 20)]
    for number, line in equations:
        assert re.search(rf"Eq\..*\b{number}\b", lines[int(line) - 1]), (number, line)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


def test_readme_head_gates(tmp_path):
    """The README's own signal, put into a copy of ncn.py: it starts near neutral and learns, the decoder refuses it."""
    source = (HERE / "ncn.py").read_text(encoding="utf-8")
    for hunk in re.search(r"```diff\n(.*?)```", README, re.S)[1].split("@@\n")[1:]:
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in " " + sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "ncn.py").write_text(source, encoding="utf-8")
    code = f"""import sys, torch
sys.path.append({str(HERE)!r})
from ncn import NCNConfig, ModulatedLM
from sample import generate
model, ids = ModulatedLM(NCNConfig(**{TINY!r})).eval(), torch.randint(61, (2, 12))
signals = model.signals(ids)
assert signals.shape == (2, 12, 2, 5) and (signals - 1).abs().max() < 0.06
optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
for _ in range(10):
    losses.append(model(ids[:, :-1], ids[:, 1:]).total)
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < losses[0] and model.controller.head_gates.weight.grad.abs().max() > 0
generate(model, ids, 2)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "NotImplementedError" in done.stderr and "head_gates" in done.stderr, done.stderr
