"""The five fused kernels of NCN (paper, section 4.1.1), and their twins in plain PyTorch.

    rms_norm              1. RMSNorm                       actuate      2. z -> gain, precision, gate
    modulate              3. residual + gain * gate * y    write_cache  4. zero-copy KV cache
    linear_cross_entropy  5. head and loss in one, logits for one chunk of tokens at a time

On an NVIDIA GPU the CUDA kernels of kernels.cu run; everywhere else (no GPU, no NVRTC, an odd dtype, inside
torch.compile) the eager twin beside each does, silently and to the same result up to rounding. path() says which.

The kernels are compiled at run time by NVRTC, which every CUDA build of torch brings along: no nvcc, no host
compiler. torch.cuda._compile_kernel is not used, on purpose: it asks for CUDA_HOME (and so fails on most machines),
compiles the file again for each kernel, passes integers in 32 bits, and changes from version to version.

`python kernels.py` prints a table of errors, and on a GPU of times.
"""
import ctypes
import hashlib
import json
import os
import statistics
import struct
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

_SOURCE = Path(__file__).with_name("kernels.cu")
_TYPES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}
CHUNK = 1 << 26   # bytes of logits that linear_cross_entropy holds at a time
_launchers = {}   # device -> launch(kernel, (grid x, y), (block x, y), arguments), or a string: why there is none


# ---- Compiling: NVRTC turns kernels.cu into a cubin for one GPU architecture: about 1 s per type, kept on disk.

def _instances(narrow):
    """The template instances whose narrowest type is `narrow`, as NVRTC wants their names."""
    one = ("rms_norm_forward", "rms_norm_backward", "actuate_forward", "actuate_backward",
           "write_cache", "softmax_loss")
    two = ("modulate_forward", "modulate_backward")   # <type of y, type of the residual>
    wide = dict.fromkeys((narrow, "float"))
    return [f"{k}<{narrow}>" for k in one] + [f"{k}<{narrow}, {r}>" for k in two for r in wide]


def _nvrtc(major):
    """The NVRTC library of CUDA `major`. OSError if there is none."""
    if sys.platform == "win32":
        return ctypes.CDLL(f"nvrtc64_{major}0_0.dll")   # beside torch's own libraries
    library = f"libnvrtc.so.{major}"
    for folder in ("cuda_nvrtc", f"cu{major}"):         # where the wheels that torch depends on put it
        lib = Path(torch.__file__).parents[1] / "nvidia" / folder / "lib"
        for builtins in lib.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))                  # NVRTC asks for it by name: have it in memory
        if (lib / library).exists():
            library = str(lib / library)
    return ctypes.CDLL(library)


def _compile(nvrtc, names, arch):
    """kernels.cu for `arch` ("90") -> ({instance: symbol}, cubin). RuntimeError with the log if it fails."""
    program, size, symbol = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p()

    def text(kind):
        getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.raw

    options = [f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCreateProgram(ctypes.byref(program), _SOURCE.read_bytes(), b"kernels.cu", 0, None, None)
    for name in names:
        failed = failed or nvrtc.nvrtcAddNameExpression(program, name.encode())
    if failed or nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
        raise RuntimeError(f"NVRTC: {text('ProgramLog').rstrip(bytes(1)).decode() or failed}")
    symbols = {}
    for name in names:
        nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol))
        symbols[name] = symbol.value.decode()
    cubin = text("CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return symbols, cubin


def _cubin(narrow, arch):
    """_compile through a cache in __pycache__ (1 s per type once, milliseconds afterwards)."""
    names = _instances(narrow)
    key = hashlib.sha256(repr((names, arch, torch.version.cuda)).encode() + _SOURCE.read_bytes()).hexdigest()[:32]
    file = _SOURCE.parent / "__pycache__" / f"kernels-{key}.cubin"
    try:
        head, cubin = file.read_bytes().split(b"\n", 1)
        return json.loads(head), cubin
    except (OSError, ValueError):
        pass
    symbols, cubin = _compile(_nvrtc(torch.version.cuda.split(".")[0]), names, arch)
    try:
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(json.dumps(symbols).encode() + b"\n" + cubin)
        os.replace(part, file)
    except OSError:
        pass   # a folder that cannot be written: compile again next time
    return symbols, cubin


# ---- Launching.

def _pack(args):
    """Kernel arguments -> (64-bit words, array of pointers to each argument's first word). Every parameter in
    kernels.cu has 8 bytes (or is a struct of such): a tensor is its address, None a null pointer, a float a double,
    a tuple a struct."""
    words, starts = [], []
    for a in args:
        starts.append(8 * len(words))
        if isinstance(a, torch.Tensor):
            words.append(a.data_ptr())
        elif isinstance(a, float):
            words += struct.unpack("q", struct.pack("d", a))
        elif isinstance(a, tuple):
            words += a
        else:
            words.append(a or 0)
    words = (ctypes.c_int64 * len(words))(*words)
    base = ctypes.addressof(words)
    return words, (ctypes.c_void_p * len(starts))(*[base + s for s in starts])


def _cuda(device, driver):
    """A launcher for one GPU. Kernels run on torch's current stream of that device, in torch's context, whichever
    thread calls (autograd's own has none); so a captured CUDA graph records them like any other. Each type is loaded
    at its first use: run a step before you capture one, as for torch's own libraries."""
    def check(code):
        if code:
            raise RuntimeError(f"CUDA driver error {code} in kernels.py")

    context, functions = ctypes.c_void_p(), {}
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.index))

    def load(narrow):
        symbols, cubin = _cubin(narrow, "%d%d" % torch.cuda.get_device_capability(device))
        module = ctypes.c_void_p()
        check(driver.cuModuleLoadData(ctypes.byref(module), cubin))
        for name, symbol in symbols.items():
            functions[name] = ctypes.c_void_p()
            check(driver.cuModuleGetFunction(ctypes.byref(functions[name]), module, symbol.encode()))

    def launch(name, grid, block, args):
        words, pointers = _pack(args)
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        check(driver.cuCtxPushCurrent_v2(context))
        try:
            if name not in functions:
                load(name.split("<")[1].rstrip(">").split(",")[0])
            if grid:
                check(driver.cuLaunchKernel(functions[name], *grid, 1, *block, 1, 0, stream, pointers, None))
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    launch("softmax_loss<float>", None, None, ())   # compile now: what cannot work falls back before it is needed
    return launch


def _start(device):
    if torch.version.cuda is None:
        return "not an NVIDIA GPU"
    try:
        return _cuda(device, ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error).strip().split("\n")[0]


def _launcher(*tensors):
    """The launcher for these tensors, or None where the eager twin has to run."""
    device = tensors[0].device
    if device not in _launchers and not tensors[0].is_cuda or torch.compiler.is_compiling():
        return None
    if device not in _launchers:
        _launchers[device] = _start(device)
    for t in tensors:
        if (t.dtype not in _TYPES or t.device != device or not t.numel()
                or type(t) not in (torch.Tensor, torch.nn.Parameter)):
            return None
    return _launchers[device] if callable(_launchers[device]) else None


def path():
    """One line for a program's start-up message: which path runs, and if it is the eager one, why."""
    if not torch.cuda.is_available():
        return "kernels: eager (no GPU)"
    _launcher(torch.empty(1, device="cuda"))   # compiles, if nothing has yet
    launch = _launchers[torch.device("cuda", torch.cuda.current_device())]
    return "kernels: fused CUDA" if callable(launch) else f"kernels: eager ({launch})"


def _name(kernel, *tensors):
    return f"{kernel}<{', '.join(_TYPES[t.dtype] for t in tensors)}>"


def _processors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _grid(x, rows, width, per_processor=32):
    """Grid and block for one team per row: a thread for each 8 numbers, a power of two from 32 to 512; teams of 32
    share a block. More blocks than the GPU holds at a time gain nothing: the teams walk over the rows."""
    team = min(512, max(32, 1 << (-(-width // 8) - 1).bit_length()))
    teams = 8 if team == 32 else 1
    return (min(-(-rows // teams), per_processor * _processors(x)), 1), (team, teams)


# ---- The five functions. In each, the lines before `launch(` prepare what the kernel reads and writes.

def _rms_norm(x, weight, eps):
    wide = x.float()
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        d = x.shape[-1]
        if (launch := _launcher(x, weight)) and weight.shape == (d,):
            x = x.contiguous()
            y, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            launch(_name("rms_norm_forward", x), *_grid(x, rstd.numel(), d),
                   (y, rstd, x, weight.float().contiguous(), rstd.numel(), d, float(eps)))
        else:
            y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        rows, d = rstd.numel(), x.shape[-1]
        if (launch := _launcher(x, weight, dy)) and weight.shape == (d,):
            x = x.contiguous()
            grid, block = _grid(x, rows, d, 4)   # few blocks: each leaves one row of the weight's gradient to add up
            dx, partial = torch.empty_like(x), x.new_zeros(grid[0], d, dtype=torch.float32)
            launch(_name("rms_norm_backward", x), grid, block,
                   (dx, partial, dy.contiguous(), x, weight.float().contiguous(), rstd, rows, d))
            return dx, partial.sum(0).to(weight.dtype), None
        with torch.autocast(x.device.type, enabled=False):   # @ would round to half precision under it
            dy, xhat, w = dy.float(), x.float() * rstd, weight.float()
            dw = dy * xhat
            mean = (dw @ w).unsqueeze(-1).div_(-d)
            dx = torch.addcmul(dy * w, xhat, mean).mul_(rstd)
        return dx.to(x.dtype), dw.flatten(0, -2).sum(0).to(weight.dtype), None


def rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, fp32 inside. x (..., d), weight (d,) -> (..., d)
    of x's dtype. On 2 CPU cores, forward and backward at (4, 512, 256): 1.0 ms, F.rms_norm 3.6 ms."""
    if not torch.is_grad_enabled() and not _launcher(x, weight):
        return _rms_norm(x, weight, eps)[0]   # without autograd's bookkeeping, which costs one token as much again
    return _RMSNorm.apply(x, weight, eps)


class _Actuate(torch.autograd.Function):   # the kernel's; the twin needs none
    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        signals, n = torch.empty_like(z, dtype=torch.float32), z.numel()
        ctx.save_for_backward(z)
        ctx.grid = min(-(-n // (24 * 256)), 8 * _processors(z)), 1
        partial = z.new_empty(ctx.grid[0], 3, dtype=torch.float32)
        _launcher(z)(_name("actuate_forward", z), ctx.grid, (256, 1), (signals, partial, z, n))
        return signals, partial.sum(0)

    @staticmethod
    def backward(ctx, dsignals, ddeviation):
        z, = ctx.saved_tensors
        dz = torch.empty_like(z)
        _launcher(z)(_name("actuate_backward", z), ctx.grid, (256, 1),
                     (dz, dsignals.contiguous(), ddeviation.contiguous(), z, z.numel()))
        return dz


def actuate(z, deviation=True):
    """The controller's outputs to signals (paper, section 4.1). z (..., L, 3), any float dtype -> signals
    (..., L, 3) float32: gain 2 sigmoid(z0), precision min(softplus(z1) + 0.01, 4), gate sigmoid(z2); and deviation
    (3,) float32: the sum over all rows and layers of (s - 1)^2, for the homeostatic loss. Both differentiable. With
    deviation=False the second may be None: generation has no use for it."""
    if _launcher(z):
        return _Actuate.apply(z)
    z = z.float()
    precision = (F.softplus(z[..., 1]) + 0.01).clamp(max=4)
    signals = torch.stack((2 * torch.sigmoid(z[..., 0]), precision, torch.sigmoid(z[..., 2])), -1)
    return signals, (signals - 1).square().flatten(0, -2).sum(0) if deviation else None


def _column(signal):
    """One number per row and the distance between them: (N,) tensor, stride. A view where that can be one."""
    column = None if signal is None else signal.reshape(-1)
    return column, 0 if signal is None else column.stride(0)


class _Modulate(torch.autograd.Function):   # the kernel's; the twin needs none
    @staticmethod
    def forward(ctx, y, residual, gain, gate):
        y, residual = y.contiguous(), residual.contiguous()
        ctx.save_for_backward(y, gain, gate)
        out = torch.empty_like(residual)
        ctx.factors = [f for g in (gain, gate) for f in _column(g)]
        ctx.grid = _grid(y, gain.numel(), y.shape[-1])
        _launcher(y)(_name("modulate_forward", y, residual), *ctx.grid,
                     (out, y, residual, *ctx.factors, gain.numel(), y.shape[-1]))
        return out

    @staticmethod
    def backward(ctx, dout):
        y, gain, gate = ctx.saved_tensors
        dy, dgain = torch.empty_like(y), torch.empty_like(gain, memory_format=torch.contiguous_format)
        dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launcher(y)(_name("modulate_backward", y, dout), *ctx.grid,
                     (dy, dgain, dgate, dout.contiguous(), y, *ctx.factors, gain.numel(), y.shape[-1]))
        return dy, dout, dgain, dgate


def modulate(y, residual, gain, gate=None):
    """residual + gain * gate * y, in residual's dtype (it may be wider than y's). y, residual (..., d); gain, gate
    (..., 1) float32, views of the signals welcome."""
    signals = (gain,) if gate is None else (gain, gate)
    if (_launcher(y, residual, *signals) and y.shape == residual.shape
            and residual.dtype in (y.dtype, torch.float32)
            and all(s.shape == (*y.shape[:-1], 1) and s.dtype == torch.float32 for s in signals)):
        return _Modulate.apply(y, residual, gain, gate)
    out = torch.addcmul(residual, y, gain if gate is None else gain * gate)
    return out if out.dtype == residual.dtype else out.to(residual.dtype)   # a .to without work costs 1 us, too


def write_cache(k_cache, v_cache, k, v, position):
    """In place: k_cache[:, :, position:position + T] = k, and v likewise. k, v (B, h, T, dh); caches (B, h, S, dh);
    any strides. position: int64 with one element, on the tensors' device, so that a captured CUDA graph can be
    replayed at new positions. No gradient passes. A token past the end of the cache is an error on the CPU and not
    written on a GPU."""
    B, h, T, d = k.shape
    slots = k_cache.shape[2]
    if ((launch := _launcher(k_cache, v_cache, k, v)) and position.device == k.device and position.dtype == torch.int64
            and k_cache.dtype == v_cache.dtype == k.dtype == v.dtype and v.shape == k.shape
            and k_cache.shape == v_cache.shape == (B, h, slots, d)):
        units = B * h * T * -(-d // 8)
        launch(_name("write_cache", k), (min(-(-units // 256), 32 * _processors(k)), 2), (256, 1),
               (k_cache, v_cache, k, v, position, k_cache.stride(), v_cache.stride(), k.stride(), v.stride(),
                h, T, d, slots, units))
        return
    with torch.no_grad():
        if k.device.type == "cpu" and not torch.compiler.is_compiling():
            at = int(position)
            k_cache[:, :, at:at + T].copy_(k)
            v_cache[:, :, at:at + T].copy_(v)
        else:   # no int(): reading the position back would stop the host, and a graph capture
            index = position.reshape(()) + torch.arange(T, device=k.device)
            k_cache.index_copy_(2, index, k.to(k_cache.dtype))
            v_cache.index_copy_(2, index, v.to(v_cache.dtype))


def _softmax_loss(logits, targets, gradient):
    """logits (n, V), rows any distance apart, targets (n,) -> loss (n,) float32, and softmax - onehot in the logits'
    dtype (if gradient is true), which overwrites the logits. Both are 0 where the target is negative."""
    if (launch := _launcher(logits)) and targets.device == logits.device:
        loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        launch(_name("softmax_loss", logits), *_grid(logits, *logits.shape),
               (logits, loss, targets, *logits.shape, logits.stride(0), int(gradient)))
        return loss, logits
    # On a CPU a few rows at a time, which stay in the cache: 2.6 times as fast in bf16, 1.1 times in fp32.
    whole = logits.is_cuda or torch.compiler.is_compiling()
    rows = len(logits) if whole else max(1, (1 << 20) // logits.shape[1])
    losses = []
    for part, target in zip(logits.split(rows), targets.split(rows)):
        valid, index, wide = (target >= 0).unsqueeze(1), target.clamp(min=0).unsqueeze(1), part.float()
        picked, top = wide.gather(1, index), wide.amax(1, keepdim=True)
        p = wide.sub_(top).exp_()   # in place in fp32, a copy in half precision
        total = p.sum(1, keepdim=True)
        losses.append(torch.where(valid, total.log() + top - picked, 0.0).squeeze(1))
        if gradient:
            part.copy_(p.mul_(valid / total).scatter_add_(1, index, -valid.float()))
    return torch.cat(losses), logits


def chunk(h, weight):
    """Tokens per chunk of linear_cross_entropy. The weight and its gradient pass through memory once per chunk, so not
    too few: on a CPU at V 50257, d 256, fp32, 64 tokens cost 1.45 s per 2,048, 256 cost 1.25 and 512 cost 1.18, at
    206 KB each."""
    return max(1, min(len(h), CHUNK // (len(weight) * h.element_size())))


def _chunks(h, weight, targets, want_h, want_w):
    """-> sum of the losses, number of targets, unscaled gradients of h and weight (None where not wanted). One dtype
    for h (N, d) and weight (V, d)."""
    N, V = h.shape[0], weight.shape[0]
    rows = chunk(h, weight)
    # Rows of the buffer start at multiples of 16 numbers: an odd V would cost cuBLAS and our loads their alignment.
    buffer = torch.empty(rows, -(-V // 16) * 16, dtype=h.dtype, device=h.device)[:, :V]
    losses, dh = [], []
    width = V if h.is_cuda or torch.compiler.is_compiling() else 4096   # of what is added to dw: it stays in the cache
    dw = torch.zeros(V, h.shape[1], dtype=torch.float32, device=h.device) if want_w else None
    for x, target in zip(h.split(rows), targets.split(rows)):
        if torch.compiler.is_compiling():
            logits = x @ weight.t()   # the compiler plans its own memory
        else:
            logits = torch.mm(x, weight.t(), out=buffer[:len(x)])
        loss, p = _softmax_loss(logits, target, want_h or want_w)
        losses.append(loss.sum())
        if want_h:
            dh.append(p @ weight)
        if want_w and h.dtype == torch.float32:
            dw.addmm_(p.t(), x)
        elif want_w:   # a chunk's product is rounded to half precision, the sum over chunks is not
            for part, columns in zip(dw.split(width), p.split(width, 1)):
                part.add_(columns.t() @ x)
    return torch.stack(losses).sum(), (targets >= 0).sum().clamp(min=1), torch.cat(dh) if want_h else None, dw


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, dtype):
        total, ctx.n, *ctx.gradients = _chunks(h.to(dtype), weight.to(dtype), targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(h, weight, targets)
        ctx.dtype = dtype
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad):   # 1/N here, in fp32: p / 8192 would underflow in half precision
        h, weight, targets = ctx.saved_tensors
        if ctx.gradients is None:   # a second time (retain_graph): the first has changed them and given them away
            _, _, *ctx.gradients = _chunks(h.to(ctx.dtype), weight.to(ctx.dtype), targets, *ctx.needs_input_grad[:2])
        scale = grad / ctx.n
        dh, dw = (None if g is None else g.float().mul_(scale).to(x.dtype) for g, x in zip(ctx.gradients, (h, weight)))
        ctx.gradients = None
        return dh, dw, None, None


def linear_cross_entropy(h, weight, targets):
    """F.cross_entropy(h @ weight.T, targets, ignore_index=-1) without the logits: they exist for one chunk of tokens
    at a time, and the gradients are formed in the same pass. h (N, d) or (B, T, d), weight (V, d), targets int64 (N,)
    or (B, T), negative ones ignored -> mean loss in nats, float32. With no valid target the loss is 0, and so are the
    gradients. The products run in autocast's dtype where it is on, else in h's; softmax and loss in fp32, and the
    weight's gradient is summed over chunks in fp32. No gradient is formed under no_grad.

    Measured on one CPU core, forward and backward, 1,024 tokens, V 50257, d 256, fp32: 1.23 s; torch 2.13's
    F.linear_cross_entropy 1.42 s at this chunk size and 7.40 s at its own; F.cross_entropy 1.83 s. Peak memory at
    2,048 tokens beyond the start: 84, 149, 137 and 1,139 MB."""
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    h, targets = h.flatten(0, -2), targets.flatten().long().contiguous()
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(h, weight, targets, dtype)
        total, n, _, _ = _chunks(h.to(dtype), weight.to(dtype), targets, False, False)
        return total / n


# ---- The table: `python kernels.py`. The tests run the same cases.

def cases(rows, d, dtype, device="cpu", seed=0):
    """name -> (function, the same function in float64, inputs, bytes that forward and backward have to move). 4 and 5
    work on a copy, since they change their input: its bytes are counted too."""
    rng = torch.Generator().manual_seed(seed)
    e, V, heads = dtype.itemsize, 4 * d + 1, max(1, d // 32)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=rng) * scale).to(device, dtype).requires_grad_()

    def cache(write):
        def run(k, v, kc, vc, position):
            kc, vc = kc.detach().clone(), vc.detach().clone()
            write(kc, vc, k.detach().transpose(1, 2), v.detach().transpose(1, 2), position)
            return kc, vc
        return run

    def write(kc, vc, k, v, p):
        kc[:, :, p:p + k.shape[2]], vc[:, :, p:p + k.shape[2]] = k, v

    def actuate64(z):
        s = torch.stack((2 * z[..., 0].sigmoid(), (F.softplus(z[..., 1]) + 0.01).clamp(max=4), z[..., 2].sigmoid()), -1)
        return s, (s - 1).square().flatten(0, -2).sum(0)

    def mean64(h, w, t):
        return F.cross_entropy(h @ w.T, t, ignore_index=-1, reduction="sum") / (t >= 0).sum().clamp(min=1)

    def softmax64(x, t):
        logp = x.detach().log_softmax(1)
        p = (logp.exp() - F.one_hot(t.clamp(min=0), V)) * (t >= 0).unsqueeze(1)
        return F.nll_loss(logp, t, ignore_index=-1, reduction="none"), p

    signals = draw(rows, 2, 3, dtype=torch.float32)
    targets = torch.randint(-1, V, (rows,), generator=rng).to(device)
    kv = [draw(1, rows, heads, d // heads) for _ in "kv"] + [draw(1, heads, rows + 3, d // heads) for _ in "kv"]
    return {
        "1 rms_norm": (rms_norm, lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w,
                       (draw(rows, d), draw(d, dtype=torch.float32)), 5 * rows * d * e),
        "2 actuate": (actuate, actuate64, (draw(rows, 6, 3, scale=3.0),), rows * 18 * (3 * e + 8)),
        "3 modulate": (lambda y, r, s: modulate(y, r, s[:, 1, :1], s[:, 1, 2:]),
                       lambda y, r, s: r + s[:, 1, :1] * s[:, 1, 2:] * y,
                       (draw(rows, d), draw(rows, d), signals), 6 * rows * d * e),
        "4 write_cache": (cache(write_cache), cache(write),
                          (*kv, torch.tensor([2], device=device)), 8 * rows * d * e),
        "5 softmax": (lambda x, t: _softmax_loss(x.detach().clone(), t, True), softmax64,
                      (draw(rows, V, scale=3.0), targets), 4 * rows * V * e),
        "5 linear_ce": (linear_cross_entropy, mean64,
                        (draw(rows, d), draw(V, d, scale=d ** -0.5), targets), None),
    }


def step(function, inputs):
    """A closure that runs a case forward and backward, always with the same seeded gradient of its outputs, and returns
    the outputs and the gradients of the inputs."""
    wanted, given = [i for i in inputs if i.requires_grad], []

    def run():
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        ends = [o for o in out if o.requires_grad]
        if not given:   # bfloat16: exact in every type
            rng = torch.Generator().manual_seed(0)
            given.extend(torch.randn(o.shape, generator=rng).bfloat16().to(o.device, o.dtype) for o in ends)
        return [o.detach() for o in out] + list(torch.autograd.grad(ends, wanted, given) if ends else ())
    return run


def exact(reference, inputs):
    """A case's reference in float64."""
    return step(reference, [i.detach().double().requires_grad_() if i.is_floating_point() else i for i in inputs])()


def _seconds(run):
    """Median time of one call. On a GPU a captured graph is replayed: Python's own time does not count."""
    if not torch.cuda.is_available():
        times = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):   # warm-up off the default stream, as capturing wants it
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times)


def main():
    print(path())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    sizes = ((8192, 256), (65536, 512)) if cuda else ((40, 256),)
    if cuda:
        source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * len(source) / _seconds(lambda: target.copy_(source))
        print(f"{torch.cuda.get_device_name(device)}: copies {bandwidth / 1e9:.0f} GB/s; times: forward and backward")
    else:
        try:   # the tests bring the CPU launcher; without it the table has the twins alone
            from test_ncn import cpu_threads
            _launchers[device] = cpu_threads()
        except (ImportError, OSError) as error:
            print(f"kernels.cu is not run on CPU threads: {error}")
    launch = _launchers.get(device)
    print("error: the largest, over the largest value, of outputs and gradients, against float64")
    print(f"{'':16}{'':10}{'rows x d':>12}{'twin error':>12}{'kernel error':>14}{'twin':>11}"
          + (f"{'kernel':>11}{'of copy':>9}{'vs eager':>10}{'vs compile':>12}" if cuda else ""))
    for dtype in _TYPES:
        for rows, d in sizes:
            for name, (function, reference, inputs, moved) in cases(rows, d, dtype, device).items():
                want, line = exact(reference, inputs), f"{name:16}{str(dtype)[6:]:10}{f'{rows} x {d}':>12}"

                def error():
                    got = step(function, inputs)()
                    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want))
                _launchers[device] = "twins"
                line += f"{error():12.1e}"
                twin = _seconds(step(function, inputs))
                compiled = _seconds(step(torch.compile(function), inputs)) if cuda else None
                _launchers[device] = launch
                line += (f"{error():14.1e}" if callable(launch) else f"{'-':>14}") + f"{twin * 1e6:8.0f} us"
                if cuda:
                    kernel = _seconds(step(function, inputs))
                    share = f"{moved / kernel / bandwidth:9.0%}" if moved else f"{'-':>9}"
                    line += f"{kernel * 1e6:8.0f} us{share}{twin / kernel:9.2f}x{compiled / kernel:11.2f}x"
                print(line, flush=True)


if __name__ == "__main__":
    import kernels   # not __main__: the tests' launcher is put where `import kernels` finds it
    kernels.main()
