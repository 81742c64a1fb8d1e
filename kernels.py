"""
The five fused kernels of NCN (paper, section 4.1.1), each beside its eager definition in PyTorch:

    1. rms_norm              RMSNorm
    2. actuate               z -> gain, precision, gate
    3. modulate              residual + gain * gate * y
    4. write_cache           zero-copy KV cache
    5. linear_cross_entropy  head and loss in one, logits for one chunk of tokens at a time

On an NVIDIA GPU the CUDA kernels of kernels.cu run. Everywhere else (no GPU, no NVRTC, another
dtype, inside torch.compile) the eager definition does, silently and to the same result up to
rounding; backend() says which. `python kernels.py` prints a table of errors and times.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import sys
from ctypes import addressof, byref, c_char_p, c_double, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

LOGIT_BYTES = 1 << 26  # bytes of logits that linear_cross_entropy holds at a time, at least


# ---- The five functions --------------------------------------------------------------------------
# Each asks for the launcher of its tensors (see _launcher) and runs its kernel, or, where there is
# none, the eager definition below it. Autograd differentiates the eager definitions of 1, 2 and 3
# by itself; the kernels are wrapped in a torch.autograd.Function.


# ==== 1. RMSNorm
def rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32.

    x (..., d), weight (d,) -> (..., d) of x's dtype. Zhang & Sennrich 2019."""
    if _launcher(x, weight) and weight.shape == x.shape[-1:]:
        return _RMSNorm.apply(x.contiguous(), weight.float().contiguous(), eps)
    return F.rms_norm(x, weight.shape, weight, eps)  # in fp32, too, whatever the dtypes


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        d = x.shape[-1]
        rows = x.numel() // d
        y = torch.empty_like(x)
        rstd = x.new_empty(rows, dtype=torch.float32)
        grid, block = _row_grid(x, rows, d)
        numbers = (c_int64(rows), c_int64(d), c_double(eps))
        _launcher(x)(_name("rms_norm_forward", x), grid, block, (y, rstd, x, weight), numbers)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        rows = len(rstd)
        d = len(weight)
        grid, block = _row_grid(x, rows, d, few=True)
        dx = torch.empty_like(x)
        partial = weight.new_empty(grid[0], d)  # a block's sum, over its rows, for the weight
        tensors = (dx, partial, dy.contiguous(), x, weight, rstd)
        numbers = map(c_int64, (rows, d))
        _launcher(x)(_name("rms_norm_backward", x), grid, block, tensors, numbers)
        return dx, partial.sum(0), None


# ==== 2. Actuator
def actuate(z, definition):
    """The signals of the controller's outputs z: definition(z), or the kernel with its formulas.

    z (..., L, 3), any float dtype -> gain, precision, gate (..., L, 3), float32. The model passes
    its own `definition` of Eq. 5 to 7. The kernel has them built in: to change a formula, change
    kernels.cu, too."""
    if _launcher(z):
        return _Actuate.apply(z.contiguous())
    return definition(z)


class _Actuate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        signals = torch.empty_like(z, dtype=torch.float32)
        _Actuate.launch("actuate_forward", z, (signals, z))
        ctx.save_for_backward(z)
        return signals

    @staticmethod
    def backward(ctx, dsignals):
        (z,) = ctx.saved_tensors
        dz = torch.empty_like(z)
        _Actuate.launch("actuate_backward", z, (dz, dsignals.contiguous(), z))
        return dz

    @staticmethod
    def launch(kernel, z, tensors):
        n = z.numel()
        grid = (_blocks(z, _ceil_div(n, 24), 64), 1)  # a thread takes 24 elements
        _launcher(z)(_name(kernel, z), grid, (64, 1), tensors, (c_int64(n),))


# ==== 3. Modulation
def modulate(y, residual, gain, gate=None):
    """residual + gain * gate * y, in residual's dtype, which may be wider than y's (Eq. 10 to 12).

    y, residual (..., d); gain, gate (..., 1) float32, views of the signals welcome. No gate is a
    gate of 1."""
    signals = [gain] if gate is None else [gain, gate]
    fits = _launcher(y, residual, *signals) and y.shape == residual.shape
    fits = fits and residual.dtype in (y.dtype, torch.float32)
    for signal in signals:
        fits = fits and signal.shape == (*y.shape[:-1], 1) and signal.dtype == torch.float32
    if fits:
        columns = [s.reshape(-1) for s in signals]  # one per row: views, where they can be
        return _Modulate.apply(y.contiguous(), residual.contiguous(), *columns)
    factor = gain if gate is None else gain * gate
    return torch.addcmul(residual, y, factor).to(residual.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, residual, gain, gate=None):
        out = torch.empty_like(residual)
        _Modulate.launch("modulate_forward", y, residual, gain, gate, (out, y, residual))
        ctx.save_for_backward(y, gain, gate)
        return out

    @staticmethod
    def backward(ctx, dout):
        y, gain, gate = ctx.saved_tensors
        dout = dout.contiguous()
        dy = torch.empty_like(y)
        dgain = gain.new_empty(len(gain))
        dgate = None if gate is None else gate.new_empty(len(gate))
        _Modulate.launch("modulate_backward", y, dout, gain, gate, (dy, dgain, dgate, dout, y))
        return dy, dout, dgain, dgate

    @staticmethod
    def launch(kernel, y, residual, gain, gate, tensors):
        rows = len(gain)
        d = y.shape[-1]
        gate_stride = 0 if gate is None else gate.stride(0)
        grid, block = _row_grid(y, rows, d)
        numbers = map(c_int64, (gain.stride(0), gate_stride, rows, d))
        _launcher(y)(_name(kernel, y, residual), grid, block, (*tensors, gain, gate), numbers)


# ==== 4. KV cache
def write_cache(k_cache, v_cache, k, v, position):
    """In place: k_cache[:, :, position : position + T] = k, and v likewise.

    k, v (B, h, T, e), caches (B, h, S, e), any strides. position: int64, one element, on their
    device, so that a captured CUDA graph can be replayed at new positions. No gradient passes.
    Past the end of the cache: IndexError on a CPU, not written on a GPU."""
    B, h, T, e = k.shape
    S = k_cache.shape[2]
    same_shape = k.shape == v.shape and k_cache.shape == v_cache.shape == (B, h, S, e)
    same_dtype = k_cache.dtype == v_cache.dtype == k.dtype == v.dtype
    launch = _launcher(k_cache, v_cache, k, v)
    if launch and same_shape and same_dtype and position.device == k.device:
        vectors = B * h * T * _ceil_div(e, 8)
        grid = (_blocks(k, vectors, 256), 2)  # blockIdx.y: keys or values
        tensors = (k_cache, v_cache, k, v)
        strides = [(c_int64 * 4)(*t.stride()) for t in tensors]
        numbers = (*strides, *map(c_int64, (h, T, e, S, vectors)))
        launch(_name("write_cache", k), grid, (256, 1), (*tensors, position.long()), numbers)
        return
    with torch.no_grad():
        # No int(position): reading it back from a GPU would stop the host, and a graph's capture.
        index = position.reshape(()) + torch.arange(T, device=k.device)
        k_cache.index_copy_(2, index, k.to(k_cache.dtype))
        v_cache.index_copy_(2, index, v.to(v_cache.dtype))


# ==== 5. Head and loss
def linear_cross_entropy(h, weight, targets):
    """F.cross_entropy(h @ weight.T, targets, ignore_index=-1), without all logits at a time.

    h (N, d) or (B, T, d), weight (V, d), targets int64 (N,) or (B, T), negative ones ignored ->
    mean loss in nats, float32; with no valid target it is 0, and so are the gradients. Logits
    exist for one chunk of tokens at a time, so gradients that are wanted are formed in the same
    pass; a second backward pass raises RuntimeError. The products run in autocast's dtype where
    it is on, else in h's; softmax, loss and sums over chunks in fp32."""
    if torch.compiler.is_compiling():
        # torch.compile would trace every chunk; it leaves this to eager PyTorch and the kernel.
        return torch.compiler.disable(linear_cross_entropy)(h, weight, targets)
    dtype = h.dtype
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    h = h.flatten(0, -2)
    targets = targets.flatten().long().contiguous()
    want_gradients = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(h, weight, targets, dtype, want_gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, dtype, want_gradients):
        h = h.to(dtype)
        weight = weight.to(dtype)
        loss, n, dh, dw = _loss_in_chunks(h, weight, targets, want_gradients)
        ctx.n = n
        ctx.gradients = (dh, dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy has no second backward pass: call it again")
        dh, dw = ctx.gradients
        ctx.gradients = None  # They are scaled in place and given away: dw is large.
        scale = grad / ctx.n  # Here, and in fp32: p / 8192 would underflow in half precision.
        dh = dh.float().mul_(scale)
        dw = dw.mul_(scale)
        return dh, dw, None, None, None  # Autograd rounds them to the inputs' dtypes.


def _loss_in_chunks(h, weight, targets, want_gradients):
    """h (N, d), weight (V, d), targets (N,) -> mean loss, number of targets, and the gradients of
    h and weight for the sum of the losses (None where they are not wanted)."""
    V = len(weight)
    if _has_tensor_cores(weight):
        # Columns of zeros behind the logits, which neither loss nor gradients see.
        weight = F.pad(weight, (0, 0, 0, -V % 64))
    rows = _rows_per_chunk(h, weight)
    buffer = _logit_buffer(rows, weight)
    loss = torch.zeros((), dtype=torch.float32, device=h.device)
    dh = None
    dw = None
    if want_gradients:
        dh = torch.empty_like(h)
        dw = torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, len(h), rows):
        chunk = slice(start, start + rows)
        x = h[chunk]
        p = torch.mm(x, weight.t(), out=buffer[: len(x)])  # the logits
        loss += _softmax_loss(p[:, :V], targets[chunk], want_gradients).sum()
        if want_gradients:  # p now holds softmax - onehot
            torch.mm(p, weight, out=dh[chunk])
            _add_product(dw, p, x)
    if want_gradients and len(dw) > V:
        dw = dw[:V]
    n = (targets >= 0).sum().clamp(min=1)
    return loss / n, n, dh, dw


def _has_tensor_cores(x):
    """Whether products are fastest in whole tiles: rows in multiples of 128, columns of 64."""
    return x.is_cuda


def _rows_per_chunk(h, weight):
    """Tokens per chunk: LOGIT_BYTES of logits, on a GPU at least 1/128 of its memory. Few are slow:
    they fill a part of a large GPU, and the weight and its gradient pass through memory once per
    chunk."""
    held = LOGIT_BYTES
    if h.is_cuda:
        held = max(held, _properties(h.device).total_memory // 128)
    rows = held // (len(weight) * h.itemsize)
    rows = max(1, min(len(h), rows))
    if _has_tensor_cores(h) and rows > 128:
        rows -= rows % 128
    return rows


def _logit_buffer(rows, weight):
    """Memory for the logits (rows, V) of one chunk, whose rows start at multiples of 64 elements.

    With an odd V, unaligned rows would cost a CPU's products a fifth. The gaps are zeros, since
    bf16 products on a CPU with matrix units read them, and 0 * NaN is NaN."""
    V = len(weight)
    buffer = weight.new_empty(rows, _ceil_div(V, 64) * 64)
    buffer[:, V:] = 0
    return buffer[:, :V]


def _add_product(dw, p, x):
    """dw += p.T @ x, the weight's gradient. dw (V, d) float32, p (n, V), x (n, d)."""
    if x.dtype == torch.float32:
        dw.addmm_(p.t(), x)
    elif _has_tensor_cores(x):
        torch.addmm(dw, p.t(), x, out_dtype=torch.float32, out=dw)
    else:
        # A CPU rounds each chunk's product to half precision, but not the sum over chunks. What is
        # added at a time, 4,096 rows, stays in its cache.
        for part, columns in zip(dw.split(4096), p.split(4096, dim=1), strict=True):
            part.add_(columns.t() @ x)


def _softmax_loss(logits, targets, want_gradient):
    """The loss of each row, float32; the logits become softmax - onehot, if that is wanted.

    logits (n, V), rows any distance apart, targets (n,) int64 -> (n,). Both are 0 where the target
    is negative. If no gradient is wanted, the logits hold nothing of use afterwards."""
    rows, V = logits.shape
    launch = _launcher(logits)
    if launch and targets.device == logits.device:
        loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
        grid, block = _row_grid(logits, rows, V)
        numbers = map(c_int64, (rows, V, logits.stride(0), want_gradient))
        launch(_name("softmax_loss", logits), grid, block, (logits, loss, targets), numbers)
        return loss
    piece = rows
    if not logits.is_cuda:  # as many as stay in a CPU's cache: 2.6 times as fast in bf16
        piece = max(1, (1 << 20) // V)
    pairs = zip(logits.split(piece), targets.split(piece), strict=True)
    return torch.cat([_eager_softmax_loss(*pair, want_gradient) for pair in pairs])


def _eager_softmax_loss(logits, targets, want_gradient):
    valid = (targets >= 0).unsqueeze(1)
    index = targets.clamp(min=0).unsqueeze(1)
    wide = _wide(logits)
    at_target = wide.gather(1, index)
    top = wide.amax(1, keepdim=True)
    p = wide.sub_(top).exp_()  # in place in fp32, a copy in half precision
    total = p.sum(1, keepdim=True)
    loss = torch.where(valid, total.log() + top - at_target, 0.0)
    if want_gradient:
        p.mul_(valid / total).scatter_add_(1, index, -valid.to(p.dtype))
        logits.copy_(p)
    return loss.squeeze(1)


# ---- Compiling and launching ---------------------------------------------------------------------
# NVRTC, which every CUDA build of torch brings along, turns kernels.cu into a cubin at run time: no
# nvcc, no host compiler; a few seconds once, then kept on disk. torch.cuda._compile_kernel is not
# used, on purpose: it asks for CUDA_HOME (and so fails on most machines), compiles the file again
# for each kernel, passes integers in 32 bits, and changes from version to version.

_SOURCE = Path(__file__).with_name("kernels.cu")
_TYPES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}
_KERNELS = "rms_norm_forward rms_norm_backward actuate_forward actuate_backward write_cache"
_KERNELS += " softmax_loss"
_BRANCH_AND_RESIDUAL = ("float, float", "f16, f16", "f16, float", "bf16, bf16", "bf16, float")
# The instances of the templates, by the names that NVRTC knows them by.
_INSTANCES = [f"{kernel}<{t}>" for t in _TYPES.values() for kernel in _KERNELS.split()]
_INSTANCES += [f"modulate_forward<{types}>" for types in _BRANCH_AND_RESIDUAL]
_INSTANCES += [f"modulate_backward<{types}>" for types in _BRANCH_AND_RESIDUAL]

_launchers = {}  # device -> its _Launcher, or None where the kernels do not work
_reasons = {}  # device -> one line: why they do not


def _launcher(*tensors):
    """The launcher for these tensors, or None where the eager definition has to run."""
    if torch.compiler.is_compiling():
        return None
    device = tensors[0].device
    if device.type == "cuda" and device not in _launchers:
        _launchers[device] = _try_gpu(device)
    launch = _launchers.get(device)
    if launch is None:
        return None
    for t in tensors:
        if t.dtype not in _TYPES or t.device != device or t.numel() == 0:
            return None
    return launch


def _try_gpu(device):
    try:
        return _Launcher(device)
    except (OSError, RuntimeError, AttributeError) as error:
        _reasons[device] = str(error).strip().split("\n")[0]
        return None


class _Launcher:
    """Compiles and loads the kernels for one GPU, and launches them there.

    A launch goes to torch's current stream of that device, so that a captured CUDA graph records
    it. It runs in torch's context, whichever thread calls: autograd's own thread has none."""

    def __init__(self, device):
        if torch.version.cuda is None:
            raise OSError("not an NVIDIA GPU")
        library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        self.driver = ctypes.CDLL(library)
        self.index = device.index
        self.context = c_void_p()
        self.popped = byref(c_void_p())
        self.functions = {}
        major, minor = torch.cuda.get_device_capability(device)
        symbols, cubin = _cubin(f"{major}{minor}")
        _check(self.driver.cuDevicePrimaryCtxRetain(byref(self.context), self.index))
        module = c_void_p()
        self.in_context(self.driver.cuModuleLoadData, byref(module), cubin)
        get_function = self.driver.cuModuleGetFunction
        for name, symbol in symbols.items():
            self.functions[name] = c_void_p()
            pointer = byref(self.functions[name])
            self.in_context(get_function, pointer, module, symbol.encode())

    def __call__(self, name, grid, block, tensors, numbers):
        """The kernel's arguments are the tensors (None: a null pointer), then the numbers: C values
        of the types in kernels.cu."""
        arguments = [c_void_p(None if t is None else t.data_ptr()) for t in tensors]
        arguments += numbers
        pointers = (c_void_p * len(arguments))(*map(addressof, arguments))
        stream = c_void_p(torch.cuda.current_stream(self.index).cuda_stream)
        shape = (*grid, 1, *block, 1)
        launch = self.driver.cuLaunchKernel
        self.in_context(launch, self.functions[name], *shape, 0, stream, pointers, None)

    def in_context(self, call, *arguments):
        """Runs a call of the driver with torch's context; afterwards the one before is back."""
        _check(self.driver.cuCtxPushCurrent_v2(self.context))
        code = call(*arguments)
        self.driver.cuCtxPopCurrent_v2(self.popped)
        _check(code)


def _check(code):
    if code:
        raise RuntimeError(f"CUDA error {code} in kernels.py")


def _cubin(arch):
    """_compile of all instances for `arch`, through a cache in __pycache__."""
    recipe = repr((_SOURCE.read_bytes(), _INSTANCES, arch, torch.version.cuda))
    key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
    file = _SOURCE.parent / "__pycache__" / f"kernels-{key}.cubin"
    try:
        symbols, cubin = file.read_bytes().split(b"\n", 1)
        return json.loads(symbols), cubin
    except (OSError, ValueError):  # It is not there, or damaged.
        nvrtc = _nvrtc(torch.version.cuda.split(".")[0])
        symbols, cubin = _compile(nvrtc, _INSTANCES, arch)
    with contextlib.suppress(OSError):  # In a folder that cannot be written, compile next time.
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(json.dumps(symbols).encode() + b"\n" + cubin)
        os.replace(unfinished, file)
    return symbols, cubin


def _compile(nvrtc, names, arch):
    """kernels.cu for `arch` ("90") -> ({instance: symbol}, cubin). RuntimeError with the log."""
    program = c_void_p()
    new = byref(program)
    source = _SOURCE.read_bytes()
    _check(nvrtc.nvrtcCreateProgram(new, source, b"kernels.cu", 0, None, None))
    for name in names:
        _check(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    options = (c_char_p * 2)(f"--gpu-architecture=sm_{arch}".encode(), b"--std=c++17")
    if nvrtc.nvrtcCompileProgram(program, 2, options):
        log = _nvrtc_output(nvrtc, program, "ProgramLog")
        raise RuntimeError(f"NVRTC: {log.rstrip(bytes(1)).decode()}")
    symbols = {}
    for name in names:
        symbol = c_char_p()
        nvrtc.nvrtcGetLoweredName(program, name.encode(), byref(symbol))
        symbols[name] = symbol.value.decode()
    return symbols, _nvrtc_output(nvrtc, program, "CUBIN")


def _nvrtc_output(nvrtc, program, kind):
    """What nvrtcGet{kind} writes, as bytes."""
    size = c_size_t()
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
    return buffer.raw


def _nvrtc(major):
    """The NVRTC library of CUDA `major`. OSError if there is none."""
    if sys.platform == "win32":
        return ctypes.CDLL(f"nvrtc64_{major}0_0.dll")  # beside torch's own libraries
    library = f"libnvrtc.so.{major}"
    for folder in ("cuda_nvrtc", f"cu{major}"):  # where the wheels that torch depends on put it
        lib = Path(torch.__file__).parents[1] / "nvidia" / folder / "lib"
        for builtins in lib.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))  # NVRTC asks for it by name: have it in memory.
        if (lib / library).exists():
            library = str(lib / library)
    return ctypes.CDLL(library)


def _wide(x):
    """x in float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _name(kernel, *tensors):
    types = ", ".join(_TYPES[t.dtype] for t in tensors)
    return f"{kernel}<{types}>"


def _ceil_div(a, b):
    return -(-a // b)


_properties = functools.cache(torch.cuda.get_device_properties)  # of a GPU


def _blocks(x, work, threads, per_processor=32):
    """Blocks that do `work`, one item per thread. More than the GPU holds at a time gain nothing:
    threads walk on."""
    processors = _properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(_ceil_div(work, threads), per_processor * processors)


def _row_grid(x, rows, width, few=False):
    """Grid and block for a thread group per row: 8 elements a thread, 32 to 512 threads; groups of
    32 share a block. `few` blocks are as many as a processor needs to be busy: 1,024 threads."""
    threads = _ceil_div(width, 8)
    group = 1 << (threads - 1).bit_length()  # the next power of two
    group = min(512, max(32, group))
    groups = 8 if group == 32 else 1
    per_processor = 32
    if few:
        per_processor = max(4, 1024 // (group * groups))
    blocks = _blocks(x, rows, groups, per_processor)
    return (blocks, 1), (group, groups)


# ---- Devices -------------------------------------------------------------------------------------
DEVICES = "auto", "cpu", "cuda", "mps"
DEVICE_HELP = (
    "auto: cuda (an NVIDIA GPU) where there is one, else cpu; "
    "mps (an Apple one) is untried (default: auto)"
)


def pick_device(name="auto"):
    """The device that --device names; auto is cuda where torch finds one, else cpu.

    Under torchrun each process takes the GPU of its number. ValueError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no Apple GPU; choose auto or cpu")
    if name != "cuda":
        return torch.device(name)
    rank = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if rank >= count:
        raise ValueError(
            f"process {rank + 1} on this machine needs a GPU of its own, torch finds {count}: "
            "start fewer processes, or choose --device cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def backend(device=None):
    """One line for a program's start: what runs on the device, and if it is eager, why."""
    if device is None:
        device = pick_device()
    if device.type != "cuda":
        return "kernels: eager (no NVIDIA GPU)"
    if _launcher(torch.empty(1, device=device)):  # compiles, if nothing has yet
        return "kernels: fused CUDA"
    return f"kernels: eager ({_reasons[device]})"


def peak_memory(device, reset=False):
    """The highest number of bytes held so far, or since a reset.

    By the tensors on the GPU, or by this process (Linux; elsewhere 0)."""
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


# ---- The table: `python kernels.py` --------------------------------------------------------------
def signals_of(z):
    """Eq. 5 to 7, for the table alone: the model itself is beyond this file."""
    gain, precision, gate = _wide(z).unbind(-1)
    precision = (F.softplus(precision) + 0.01).clamp(max=4)
    return torch.stack((2 * gain.sigmoid(), precision, gate.sigmoid()), -1)


@torch.no_grad()
def written_cache(k, v, position):
    k_cache = torch.empty_like(k)
    write_cache(k_cache, torch.empty_like(v), k, v, position)
    return k_cache


@torch.no_grad()
def softmax_minus_onehot(logits, targets):
    """The fifth kernel, on a copy since it changes the logits; the last 47 columns are a gap."""
    gradient = logits.clone()[:, :-47]
    _softmax_loss(gradient, targets, True)
    return gradient


def cases(rows, d, dtype):
    """(name, function, inputs, bytes that forward and backward have to read and write) of each
    kernel. Logits are as in training: 50,257 of them, in rows that start at multiples of 64."""
    x, residual, k, v = torch.randn(4, 1, 1, rows, d, dtype=dtype)
    z = torch.randn(rows, 6, 3, dtype=dtype)
    weight = torch.randn(d)
    gain, _, gate = torch.randn(1, 1, rows, 3).split(1, dim=-1)
    logits = torch.randn(min(rows, 512), 50304, dtype=dtype)
    targets = torch.zeros(len(logits), dtype=torch.int64)
    position = targets[:1]
    signals = functools.partial(actuate, definition=signals_of)
    return [
        ("1 rms_norm", rms_norm, (x, weight), 5 * x.nbytes),
        ("2 actuate", signals, (z,), 3 * z.nbytes + 8 * z.numel()),
        ("3 modulate", modulate, (x, residual, gain, gate), 6 * x.nbytes),
        ("4 write_cache", written_cache, (k, v, position), 4 * k.nbytes),
        ("5 softmax", softmax_minus_onehot, (logits, targets), 4 * logits.nbytes),
    ]


def outputs(function, inputs):
    """The output, and for a gradient of ones the gradients of the inputs."""
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    output = function(*inputs)
    gradients = ()
    if output.requires_grad:
        gradients = torch.autograd.grad(output, wanted, torch.ones_like(output))
    return [output.detach(), *gradients]


def largest_error(function, inputs):
    """The largest error over the largest value, of outputs and gradients, against float64, which
    only the eager definitions take."""
    in_float64 = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    pairs = zip(outputs(function, inputs), outputs(function, in_float64), strict=True)
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def seconds(function, inputs):
    """Median time of forward and backward; on a GPU of 50 in a captured graph, without Python's."""
    run = functools.partial(outputs, function, inputs)
    calls = 1
    if torch.cuda.is_available():
        calls = 50
        run()  # What is compiled or allocated at first use comes before the capture.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        run = graph.replay
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange().median / calls


def measure(function, inputs, bytes_moved, bandwidth):
    """The cells of a row: eager error and time; with kernels also theirs, and the ratios."""
    device = inputs[0].device
    launch = _launchers.get(device)
    _launchers[device] = None  # The eager definition runs.
    error = largest_error(function, inputs)
    eager = seconds(function, inputs)
    _launchers[device] = launch
    cells = f"{error:13.1e}{eager * 1e6:10.0f} us"
    if launch is None:
        return cells
    error = largest_error(function, inputs)
    kernel = seconds(function, inputs)
    share = bytes_moved / kernel / bandwidth
    cells += f"{error:14.1e}{kernel * 1e6:10.1f} us{share:10.0%}{eager / kernel:9.2f}x"
    try:
        torch.compiler.reset()
        compiled = seconds(torch.compile(function), inputs)
        return cells + f"{compiled / kernel:11.2f}x"
    except Exception as problem:  # no Triton, no C compiler
        return cells + f" {type(problem).__name__}"


def main():
    device = pick_device()
    print(backend(device))
    sizes = [(40, 256)]
    bandwidth = float("inf")
    if device.type == "cuda":
        sizes = [(8192, 256), (65536, 512)]
        copies = torch.empty(2, 1 << 28, dtype=torch.uint8, device=device)
        bandwidth = copies.nbytes / seconds(torch.Tensor.copy_, copies.unbind())
        print(f"{torch.cuda.get_device_name(device)}: copies {bandwidth / 1e9:.0f} GB/s")
    else:
        print("kernels.cu itself runs on CPU threads in the tests: pytest -q -k test_kernel")
    print("forward and backward; error: the largest, over the largest value, against float64")
    print(f"{'rows x d':>35}  eager error        eager", end="")
    print("  kernel error       kernel   of copy  vs eager  vs compile")
    for dtype in _TYPES:
        for rows, d in sizes:
            with torch.device(device):
                table = cases(rows, d, dtype)
            for name, *case in table:
                cells = measure(*case, bandwidth)
                print(f"{name:14}{_TYPES[dtype]:9}{f'{rows} x {d}':>12}{cells}", flush=True)


if __name__ == "__main__":
    main()
