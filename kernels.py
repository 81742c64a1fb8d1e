"""
The five fused kernels of NCN (paper, section 4.1.1), each beside its eager definition in plain PyTorch:

    1. rms_norm      RMSNorm                            2. actuate      z -> gain, precision, gate
    3. modulate      residual + gain * gate * y         4. write_cache  zero-copy KV cache
    5. linear_cross_entropy  head and loss in one, logits for one chunk of tokens at a time

On an NVIDIA GPU the CUDA kernels of kernels.cu run. Everywhere else (no GPU, no NVRTC, another dtype, inside
torch.compile) the eager definition does, silently and to the same result up to rounding; backend() says which.
`python kernels.py` prints a table of errors and times.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import os
import struct
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

LOGIT_BYTES = 1 << 26  # bytes of logits that linear_cross_entropy holds at a time

# ---- The five functions ----------------------------------------------------------------------------------------------
# In each, the lines before `launch(` prepare what the kernel reads and writes.
def rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight, fp32 inside. x (..., d), weight (d,) -> (..., d) of x's dtype."""
    # Compiled, the formula: a Function's aliases (.to(), mul_()) lose their gradients in torch 2.11 (pytorch #180642)
    if (torch.is_grad_enabled() or _launcher(x, weight)) and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]  # without autograd's bookkeeping, which costs one token as much again


def _rms_norm(x, weight, eps):
    wide = x.float()
    rstd = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        d = x.shape[-1]
        if (launch := _launcher(x, weight)) and weight.shape == (d,):
            x = x.contiguous()
            y, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            launch(_name("rms_norm_forward", x), *_row_grid(x, rstd.numel(), d),
                   (y, rstd, x, weight.float().contiguous()), (rstd.numel(), d, float(eps)))
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
            grid, block = _row_grid(x, rows, d, few=True)  # each block leaves a row of the weight's gradient to add up
            dx, partial = torch.empty_like(x), x.new_empty(grid[0], d, dtype=torch.float32)
            launch(_name("rms_norm_backward", x), grid, block,
                   (dx, partial, dy.contiguous(), x, weight.float().contiguous(), rstd), (rows, d))
            return dx, partial.sum(0).to(weight.dtype), None
        with torch.autocast(x.device.type, enabled=False):  # @ would round to half precision under it
            dy, xhat, w = dy.float(), x.float() * rstd, weight.float()
            dw = dy * xhat
            mean = (dw @ w).unsqueeze(-1).div_(-d)
            dx = torch.addcmul(dy * w, xhat, mean).mul_(rstd)
        return dx.to(x.dtype), dw.flatten(0, -2).sum(0).to(weight.dtype), None


def actuate(z):
    """The controller's outputs to signals (Eq. 5 to 7). z (..., L, 3), any float dtype -> (..., L, 3) float32."""
    if _launcher(z):
        return _Actuate.apply(z)
    z = z.float()
    gain, gate = 2 * torch.sigmoid(z[..., 0]), torch.sigmoid(z[..., 2])
    precision = (F.softplus(z[..., 1]) + 0.01).clamp(max=4)
    return torch.stack((gain, precision, gate), -1)


class _Actuate(torch.autograd.Function):  # the kernel's; autograd differentiates the eager definition
    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        signals = torch.empty_like(z, dtype=torch.float32)
        ctx.save_for_backward(z)
        ctx.grid = _blocks(z, -(-z.numel() // 24), 64), 1  # a thread takes 24 elements
        _launcher(z)(_name("actuate_forward", z), ctx.grid, (64, 1), (signals, z), (z.numel(),))
        return signals

    @staticmethod
    def backward(ctx, dsignals):
        z, = ctx.saved_tensors
        dz = torch.empty_like(z)
        _launcher(z)(_name("actuate_backward", z), ctx.grid, (64, 1), (dz, dsignals.contiguous(), z),
                     (z.numel(),))
        return dz


def modulate(y, residual, gain, gate=None):
    """residual + gain * gate * y, in residual's dtype (it may be wider than y's). y, residual (..., d); gain, gate
    (..., 1) float32, views of the signals welcome."""
    signals = (gain,) if gate is None else (gain, gate)
    if (_launcher(y, residual, *signals) and y.shape == residual.shape and residual.dtype in (y.dtype, torch.float32)
            and all(s.shape == (*y.shape[:-1], 1) and s.dtype == torch.float32 for s in signals)):
        return _Modulate.apply(y, residual, gain, gate)
    out = torch.addcmul(residual, y, gain if gate is None else gain * gate)
    return out if out.dtype == residual.dtype else out.to(residual.dtype)  # even a no-op .to() costs 1 us


class _Modulate(torch.autograd.Function):  # the kernel's; autograd differentiates the eager definition
    @staticmethod
    def forward(ctx, y, residual, gain, gate):
        y, residual = y.contiguous(), residual.contiguous()
        ctx.save_for_backward(y, gain, gate)
        out = torch.empty_like(residual)
        columns = [None if s is None else s.reshape(-1) for s in (gain, gate)]  # one per row; views where they can be
        ctx.columns, numbers = columns, (*(0 if c is None else c.stride(0) for c in columns), gain.numel(), y.shape[-1])
        ctx.grid, ctx.numbers = _row_grid(y, gain.numel(), y.shape[-1]), numbers
        _launcher(y)(_name("modulate_forward", y, residual), *ctx.grid, (out, y, residual, *columns), numbers)
        return out

    @staticmethod
    def backward(ctx, dout):
        y, gain, gate = ctx.saved_tensors
        dy, dgain, dgate = (None if t is None else t.new_empty(t.shape) for t in (y, gain, gate))
        _launcher(y)(_name("modulate_backward", y, dout), *ctx.grid,
                     (dy, dgain, dgate, dout.contiguous(), y, *ctx.columns), ctx.numbers)
        return dy, dout, dgain, dgate


def write_cache(k_cache, v_cache, k, v, position):
    """In place: k_cache[:, :, position:position + T] = k, v likewise. k, v (B, h, T, e), caches (B, h, S, e); any
    strides. position: int64, one element, on their device, so that a captured CUDA graph can be replayed at new
    positions. No gradient passes. Past the end of the cache: IndexError on the CPU, not written on a GPU."""
    B, h, T, e = k.shape
    slots, vectors = k_cache.shape[2], B * h * T * -(-e // 8)
    if ((launch := _launcher(k_cache, v_cache, k, v)) and position.device == k.device and position.dtype == torch.int64
            and k_cache.dtype == v_cache.dtype == k.dtype == v.dtype and v.shape == k.shape
            and k_cache.shape == v_cache.shape == (B, h, slots, e) and vectors < 1 << 31):
        launch(_name("write_cache", k), (_blocks(k, vectors, 256), 2), (256, 1),
               (k_cache, v_cache, k, v, position),
               (*(struct.pack("4q", *t.stride()) for t in (k_cache, v_cache, k, v)), h, T, e, slots, vectors))
        return
    with torch.no_grad():  # no int(position): reading it back from a GPU would stop the host, and a graph capture
        index = position.reshape(()) + torch.arange(T, device=k.device)
        k_cache.index_copy_(2, index, k.to(k_cache.dtype))
        v_cache.index_copy_(2, index, v.to(v_cache.dtype))


def linear_cross_entropy(h, weight, targets):
    """F.cross_entropy(h @ weight.T, targets, ignore_index=-1), with logits for one chunk of tokens at a time; gradients
    that are wanted are formed in the same pass. h (N, d) or (B, T, d), weight (V, d), targets int64 (N,) or (B, T),
    negative ones ignored -> mean loss in nats, float32; with no valid target it is 0, and so are the gradients. The
    products run in autocast's dtype where it is on, else in h's; softmax, loss and sums over chunks in fp32."""
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    h, targets = h.flatten(0, -2), targets.flatten().long().contiguous()
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(h, weight, targets, dtype)
        return _chunks(h, weight, targets, dtype, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, dtype):
        loss, ctx.n, *ctx.gradients = _chunks(h, weight, targets, dtype, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(h, weight, targets)
        ctx.dtype = dtype
        return loss

    @staticmethod
    def backward(ctx, grad):  # 1/N here, in fp32: p / 8192 would underflow in half precision
        h, weight, targets = ctx.saved_tensors
        # A second time (retain_graph) they are formed again: the first has changed them and given them away.
        gradients = ctx.gradients or _chunks(h, weight, targets, ctx.dtype, *ctx.needs_input_grad[:2])[2:]
        ctx.gradients = None
        # In place, since dw is as large as the weight; but no alias may be returned under compile (see rms_norm).
        multiply = torch.mul if torch.compiler.is_compiling() else torch.Tensor.mul_
        dh, dw = (None if g is None else multiply(g.float(), grad / ctx.n) for g in gradients)
        return (dh if dh is None or h.dtype == torch.float32 else dh.to(h.dtype),
                dw if dw is None or weight.dtype == torch.float32 else dw.to(weight.dtype), None, None)


def rows_per_chunk(h, weight):
    """Tokens per chunk of linear_cross_entropy: LOGIT_BYTES of logits. The weight and its gradient pass through memory
    once per chunk, so few tokens are slow."""
    rows = max(1, min(len(h), LOGIT_BYTES // (len(weight) * h.element_size())))
    return rows - rows % 128 if _tensor_cores(h) and rows > 128 else rows


def _tensor_cores(h):
    """Whether products want whole tiles: rows in multiples of 128, columns of 64."""
    return h.is_cuda


def _chunks(h, weight, targets, dtype, want_h, want_w):
    """-> mean loss, number of targets, unscaled gradients of h (N, d) and weight (V, d) (None where not wanted)."""
    h, weight, V, compiling = h.to(dtype), weight.to(dtype), len(weight), torch.compiler.is_compiling()
    tiles = _tensor_cores(h)
    if tiles:  # columns of zeros behind the logits: the loss does not see them, and they add 0 to the gradients
        weight = F.pad(weight, (0, 0, 0, -V % 64))
    rows = rows_per_chunk(h, weight)
    # The buffer's rows start at multiples of 16 elements: an odd V would cost a CPU's products a fifth. The elements in
    # between are zeros: products of a CPU with matrix units in bf16 read them, and 0 * NaN would be NaN.
    buffer = torch.empty(rows, -(-len(weight) // 16) * 16, dtype=h.dtype, device=h.device)
    buffer[:, len(weight):] = 0
    buffer = buffer[:, :len(weight)]
    losses, dh = [], []
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=h.device) if want_w else None
    for x, target in zip(h.split(rows), targets.split(rows), strict=True):
        p = x @ weight.t() if compiling else torch.mm(x, weight.t(), out=buffer[:len(x)])  # logits, and then:
        losses.append(_softmax_loss(p[:, :V], target, want_h or want_w)[0].sum())
        if want_h:
            dh.append(p @ weight)
        if want_w and h.dtype == torch.float32:
            dw.addmm_(p.t(), x)
        elif want_w and tiles and not compiling:  # torch.compile fails on it (pytorch #163880)
            torch.addmm(dw, p.t(), x, out_dtype=torch.float32, out=dw)
        elif want_w:  # a chunk's product is rounded to half precision, the sum over chunks is not
            width = V if compiling else 4096  # of what is added at a time: it stays in a CPU's cache
            for part, columns in zip(dw.split(width), p.split(width, 1), strict=True):
                part.add_(columns.t() @ x)
    n = (targets >= 0).sum().clamp(min=1)
    if want_w and tiles:  # where it must be alone: autograd copies a gradient that is a view
        dw = dw[:V]
    return torch.stack(losses).sum() / n, n, torch.cat(dh) if want_h else None, dw


def _softmax_loss(logits, targets, gradient):
    """logits (n, V), rows any distance apart, targets (n,) -> loss (n,) float32, and softmax - onehot in the logits'
    dtype (if gradient is true), which overwrites the logits. Both are 0 where the target is negative."""
    if (launch := _launcher(logits)) and targets.device == logits.device:
        loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        launch(_name("softmax_loss", logits), *_row_grid(logits, *logits.shape),
               (logits, loss, targets), (*logits.shape, logits.stride(0), int(gradient)))
        return loss, logits
    rows = max(1, (1 << 20) // logits.shape[1])  # on a CPU as many as stay in its cache: 2.6 times as fast in bf16
    if len(logits) > rows and not logits.is_cuda and not torch.compiler.is_compiling():
        pairs = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([_softmax_loss(*pair, gradient)[0] for pair in pairs]), logits
    valid, index, wide = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1), logits.float()
    picked, top = wide.gather(1, index), wide.amax(1, keepdim=True)
    p = wide.sub_(top).exp_()  # in place in fp32, a copy in half precision
    total = p.sum(1, keepdim=True)
    loss = torch.where(valid, total.log() + top - picked, 0.0).squeeze(1)
    if gradient:
        logits.copy_(p.mul_(valid / total).scatter_add_(1, index, -valid.float()))
    return loss, logits


# ---- Compiling and launching -----------------------------------------------------------------------------------------
# NVRTC, which every CUDA build of torch brings along, turns kernels.cu into a cubin at run
# time: no nvcc, no host compiler; a few seconds once, then kept on disk. torch.cuda._compile_kernel is not used, on
# purpose: it asks for CUDA_HOME (and so fails on most machines), compiles the file again for each kernel, passes
# integers in 32 bits, and changes from version to version.

_SOURCE = Path(__file__).with_name("kernels.cu")
_TYPES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}
_INSTANCES = [f"{kernel}<{t}>" for t in _TYPES.values() for kernel in (  # of the templates, by NVRTC's names
    "rms_norm_forward", "rms_norm_backward", "actuate_forward", "actuate_backward", "write_cache", "softmax_loss")]
_INSTANCES += [f"modulate_{way}<{types}>" for way in ("forward", "backward")
               for types in ("float, float", "f16, f16", "f16, float", "bf16, bf16", "bf16, float")]


def _nvrtc(major):
    """The NVRTC library of CUDA `major`. OSError if there is none."""
    if sys.platform == "win32":
        return ctypes.CDLL(f"nvrtc64_{major}0_0.dll")  # beside torch's own libraries
    library = f"libnvrtc.so.{major}"
    for folder in ("cuda_nvrtc", f"cu{major}"):  # where the wheels that torch depends on put it
        lib = Path(torch.__file__).parents[1] / "nvidia" / folder / "lib"
        for builtins in lib.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name: have it in memory
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

    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17")
    failed = nvrtc.nvrtcCreateProgram(ctypes.byref(program), _SOURCE.read_bytes(), b"kernels.cu", 0, None, None)
    for name in names:
        failed = failed or nvrtc.nvrtcAddNameExpression(program, name.encode())
    if failed or nvrtc.nvrtcCompileProgram(program, 2, options):
        raise RuntimeError(f"NVRTC: {text('ProgramLog').rstrip(bytes(1)).decode() or failed}")
    symbols = {}
    for name in names:
        nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol))
        symbols[name] = symbol.value.decode()
    return symbols, text("CUBIN")


def _cubin(arch):
    """_compile of all instances, through a cache in __pycache__."""
    key = hashlib.sha256(repr((_INSTANCES, arch, torch.version.cuda)).encode() + _SOURCE.read_bytes()).hexdigest()[:32]
    file = _SOURCE.parent / "__pycache__" / f"kernels-{key}.cubin"
    try:
        symbols, cubin = file.read_bytes().split(b"\n", 1)
        return json.loads(symbols), cubin
    except (OSError, ValueError):  # not there, or damaged
        symbols, cubin = _compile(_nvrtc(torch.version.cuda.split(".")[0]), _INSTANCES, arch)
    with contextlib.suppress(OSError):  # a folder that cannot be written: compile again next time
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(json.dumps(symbols).encode() + b"\n" + cubin)
        os.replace(part, file)
    return symbols, cubin


_launchers = {}  # device -> launch(kernel, (grid x, y), (block x, y), arguments), where the kernels work
_reasons = {}  # device -> one line: why they do not
_force_eager = False  # the table compares both


def _launcher(*tensors):
    """The launcher for these tensors, or None where the eager definition has to run."""
    device = tensors[0].device
    if not (device in _launchers or tensors[0].is_cuda) or _force_eager or torch.compiler.is_compiling():
        return None
    if device not in _launchers and device not in _reasons:
        try:
            _launchers[device] = _cuda(device)
        except (OSError, RuntimeError, AttributeError) as error:
            _reasons[device] = str(error).strip().split("\n")[0]
    usable = all(t.dtype in _TYPES and t.device == device and t.numel()
                 and type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    return _launchers.get(device) if usable else None


DEVICES = "auto", "cpu", "cuda", "mps"
DEVICE_HELP = "auto: cuda (an NVIDIA GPU) where there is one, else cpu; mps (an Apple one) is untried (default: auto)"


def pick_device(name="auto"):
    """The device that --device names; auto is cuda where torch finds one, else cpu. Under torchrun each process takes
    the GPU of its number. Raises ValueError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Apple GPU; choose auto or cpu")
    if name != "cuda":
        return torch.device(name)
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(f"process {rank + 1} on this machine needs a GPU of its own, torch finds {count}: start fewer "
                         "processes, or choose --device cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def backend(device=None):
    """One line for a program's start-up message: what runs on the device, and if it is the eager definitions, why."""
    device = device or pick_device()
    if device.type != "cuda":
        return "kernels: eager (no GPU)"
    _launcher(torch.empty(1, device=device))  # compiles, if nothing has yet
    return "kernels: fused CUDA" if device in _launchers else f"kernels: eager ({_reasons[device]})"


def _cuda(device):
    """A launcher for one GPU. Kernels run on torch's current stream of that device, in torch's context, whichever
    thread calls (autograd's own has none); so a captured CUDA graph records them like any other."""
    if torch.version.cuda is None:
        raise OSError("not an NVIDIA GPU")
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    symbols, cubin = _cubin("{}{}".format(*torch.cuda.get_device_capability(device)))
    context, module, functions = ctypes.c_void_p(), ctypes.c_void_p(), {name: ctypes.c_void_p() for name in symbols}
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.index)  # where it fails, the next call does
    code = driver.cuCtxPushCurrent_v2(context) or driver.cuModuleLoadData(ctypes.byref(module), cubin)
    for name, symbol in symbols.items():
        code = code or driver.cuModuleGetFunction(ctypes.byref(functions[name]), module, symbol.encode())
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    if code:
        raise RuntimeError(f"CUDA driver error {code} in kernels.py")
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
    return _launch(driver, context, functions, lambda: stream(device.index))


def _launch(driver, context, functions, stream):
    """launch(kernel, grid, block, tensors, numbers), from a driver, its functions by name and what gives the stream.
    A kernel's arguments are the tensors (None: a null pointer), then the numbers (int, float, strides as bytes)."""
    push, run, pop = driver.cuCtxPushCurrent_v2, driver.cuLaunchKernel, driver.cuCtxPopCurrent_v2
    popped = ctypes.byref(ctypes.c_void_p())
    free = {name: [] for name in functions}  # a launch takes a packer out: no other thread writes into its buffer

    def launch(name, grid, block, tensors, numbers):
        packers = free[name]
        pack, buffer, pointers = packer = packers.pop() if packers else _packer(tensors, numbers)
        pack(buffer, 0, *[0 if t is None else t.data_ptr() for t in tensors], *numbers)
        code = push(context)
        if not code:
            code = run(functions[name], *grid, 1, *block, 1, 0, ctypes.c_void_p(stream()), pointers, None)
            pop(popped)
        packers.append(packer)
        if code:
            raise RuntimeError(f"CUDA driver error {code} in kernels.py")
    return launch


def _packer(tensors, numbers):
    """For arguments of these types: what packs them into a buffer, the buffer, and pointers to each of them there.
    Every parameter in kernels.cu has 8 bytes, or is four strides."""
    formats = ["q"] * len(tensors) + [{float: "d", bytes: "32s"}.get(type(n), "q") for n in numbers]
    packed = struct.Struct("".join(formats))
    buffer = ctypes.create_string_buffer(packed.size)
    starts = itertools.accumulate(map(struct.calcsize, formats[:-1]), initial=ctypes.addressof(buffer))
    return packed.pack_into, buffer, (ctypes.c_void_p * len(formats))(*starts)


def _name(kernel, *tensors):
    return f"{kernel}<{', '.join(_TYPES[t.dtype] for t in tensors)}>"


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _blocks(x, work, threads, per_processor=32):
    """Blocks that do `work`, one item per thread. More than the GPU holds at a time gain nothing: threads walk on."""
    return min(-(-work // threads), per_processor * _processors(x.device))


def _row_grid(x, rows, width, few=False):
    """Grid and block for a thread group per row: 8 elements a thread, 32 to 512 threads; groups of 32 share a block.
    Few blocks are as many as a processor needs to be busy: 1,024 threads."""
    group = min(512, max(32, 1 << (-(-width // 8) - 1).bit_length()))
    groups = 8 if group == 32 else 1
    return (_blocks(x, rows, groups, max(4, 1024 // (group * groups)) if few else 32), 1), (group, groups)


# ---- The table: `python kernels.py` ----------------------------------------------------------------------------------
# The tests run the same cases.
def cases(rows, d, dtype, device="cpu", seed=0):
    """name -> (function, the same function for float64, inputs, bytes that forward and backward have to move). 4 and 5
    work on a copy, since they change their input: its bytes are counted too."""
    rng = torch.Generator().manual_seed(seed)
    size, V, heads = dtype.itemsize, min(4 * d + 1, (1 << 23) // d | 1), max(1, d // 32)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=rng, device="cpu") * scale).to(device, dtype).requires_grad_()

    def write(k, v, k_cache, v_cache, position):
        caches = k_cache.clone(), v_cache.clone()
        write_cache(*caches, k, v, position)
        return caches

    def softmax64(x, t):
        loss = F.cross_entropy(x, t, ignore_index=-1, reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)

    w, signals = draw(d, dtype=torch.float32), draw(rows, 2, 3, dtype=torch.float32).detach()
    signals = [signals[:, 1, n:n + 1].requires_grad_() for n in (0, 2)]  # gain and gate, strided
    targets = torch.randint(-1 if rows > 1 else 0, V, (rows,), generator=rng, device="cpu").to(device)
    kv = [draw(1, rows, heads, d // heads).detach().transpose(1, 2) for _ in "kv"]
    kv += [draw(1, heads, rows + 3, d // heads).detach() for _ in "kv"]
    return {
        "1 rms_norm": (rms_norm, lambda x, w: F.rms_norm(x, (d,), w, 1e-5), (draw(rows, d), w), 5 * rows * d * size),
        "2 actuate": (actuate, lambda z: torch.stack((2 * z[..., 0].sigmoid(),
                                                      (F.softplus(z[..., 1]) + 0.01).clamp(max=4),
                                                      z[..., 2].sigmoid()), -1),
                      (draw(rows, 6, 3, scale=3.0),), rows * 18 * (3 * size + 8)),
        "3 modulate": (modulate, lambda y, r, gain, gate: r + gain * gate * y,
                       (draw(rows, d), draw(rows, d), *signals), 6 * rows * d * size),
        "4 write_cache": (write, lambda k, v, *to: (to[0].slice_scatter(k, 2, 2, rows + 2),
                                                    to[1].slice_scatter(v, 2, 2, rows + 2)),
                          (*kv, torch.tensor([2], device=device)), 8 * rows * d * size),
        "5 softmax": (lambda x, t: _softmax_loss(x.detach().clone(), t, True), softmax64,
                      (draw(rows, V, scale=3.0), targets), 4 * rows * V * size),
        "5 linear_ce": (linear_cross_entropy, lambda h, w, t: F.cross_entropy(h @ w.T, t, ignore_index=-1),
                        (draw(rows, d), draw(V, d, scale=d ** -0.5), targets), None),
    }


def step(function, inputs):
    """A closure that runs a case -> its outputs and, from a seeded gradient of these, the gradients of its inputs."""
    wanted, given = [i for i in inputs if i.requires_grad], []

    def run():
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        ends = [o for o in out if o.requires_grad]
        if not given:  # bfloat16: exact in every type
            rng = torch.Generator().manual_seed(0)
            given.extend(torch.randn(o.shape, generator=rng, device="cpu").bfloat16().to(o) for o in ends)
        return [o.detach() for o in out] + list(torch.autograd.grad(ends, wanted, given) if ends else ())
    return run


def exact(reference, inputs):
    """A case's reference in float64."""
    return step(reference, [i.detach().double().requires_grad_(i.requires_grad) if i.is_floating_point() else i
                            for i in inputs])()


def _seconds(run, captured=True):
    """Median time of a call, after two for warming up; on a GPU of 50 in a captured graph, without Python's time."""
    times, calls = [], 50 if captured and torch.cuda.is_available() else 1
    if calls > 1:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # off the default stream, as capturing wants it
            for _ in range(3):
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        run = graph.replay
    while len(times) < 5 or sum(times) < 0.2:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times) // 2 - 1] / calls


def _launch_seconds():
    """Python's share of a launch: its time with a driver of C functions that do nothing."""
    nothing = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).abs  # of 0: no error
    driver = SimpleNamespace(cuCtxPushCurrent_v2=nothing, cuLaunchKernel=nothing, cuCtxPopCurrent_v2=nothing)
    arguments = "", (1, 1), (32, 1), [torch.ones(1)] * 4, (1, 1, 1e-5)  # as of rms_norm_forward
    launch = _launch(driver, None, {"": None}, int)
    return min(timeit.repeat(lambda: launch(*arguments), number=500, repeat=40)) / 500


def peak_memory(device, reset=False):
    """The highest number of bytes held so far, or since a reset: by the GPU, or by this process (Linux; else 0)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index("VmHWM:") + 1]) * 1024
    except (OSError, ValueError):
        return 0


def _row(function, reference, inputs, moved, bandwidth):
    """A case's cells: eager error and time; where there are kernels, theirs, and the ratios. A failure is named."""
    global _force_eager
    cells, times = [], []
    try:
        want = exact(reference, inputs)
        for _force_eager in (True, False) if inputs[0].device in _launchers else (True,):
            run = step(function, inputs)
            error = max((a - b).abs().max() / b.abs().max() for a, b in zip(run(), want, strict=True))
            times.append(_seconds(run))
            cells += f"{error:.1e}", f"{times[-1] * 1e6:.0f} us"
        if len(times) == 2:
            eager, kernel = times
            cells += f"{moved / kernel / bandwidth:.0%}" if moved else "", f"{eager / kernel:.2f}x"
            torch.compiler.reset()
            cells.append(f"{_seconds(step(torch.compile(function), inputs)) / kernel:.2f}x")
    except Exception as failure:  # no memory, no Triton, no C compiler
        cells.append(type(failure).__name__)
    finally:
        _force_eager = False
    return cells


def main(tokens=2048, vocabulary=50257, width=256):
    """Prints the table; the sizes are those of its last part, head and loss."""
    print(f"{backend()}\nof a launch, {_launch_seconds() * 1e6:.1f} us are Python's")
    device, sizes, bandwidth = pick_device(), ((40, 256),), float("inf")
    if device.type == "cuda":
        sizes = (8192, 256), (65536, 512)
        copy = torch.empty(2, 1 << 28, dtype=torch.uint8, device=device)
        bandwidth = 2 * copy[0].numel() / _seconds(lambda: copy[1].copy_(copy[0]))
        print(f"{torch.cuda.get_device_name(device)}: copies {bandwidth / 1e9:.0f} GB/s")
    else:
        print("kernels.cu itself runs on CPU threads in the tests: pytest -q -k test_kernel_values")
    print("forward and backward; error: the largest, over the largest value, of outputs and gradients, against float64")
    columns = ("eager error", "eager", "kernel error", "kernel", "of copy", "vs eager", "vs compile")
    print(f"{'':26}{'rows x d':>12}", *(f"{c:>12}" for c in columns[:7 if device in _launchers else 2]))
    for dtype, (rows, d) in itertools.product(_TYPES, sizes):
        for name, case in cases(rows, d, dtype, device).items():
            cells = (f"{cell:>12}" for cell in _row(*case, bandwidth))
            print(f"{name:16}{str(dtype)[6:]:10}{f'{rows} x {d}':>12}", *cells, flush=True)
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # the half precision that every GPU has
    print(f"head and loss, {tokens:,} tokens, vocabulary {vocabulary:,}, width {width}, {str(dtype)[6:]}: time, memory")
    h, w = (torch.randn(n, width, device=device, dtype=dtype).mul_(width ** -0.5) for n in (tokens, vocabulary))
    inputs = h.requires_grad_(), w.requires_grad_(), torch.randint(vocabulary, (tokens,), device=device)
    losses = {"linear_cross_entropy": linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk(h, w))
        losses["torch's, same chunks"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
    losses["logits formed"] = lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t)
    for name, loss in losses.items():
        before = peak_memory(device, reset=True)
        seconds = _seconds(step(loss, inputs), captured=False)
        print(f"{name:24}{seconds * 1e3:10,.1f} ms{(peak_memory(device) - before) / 2**20:10,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
