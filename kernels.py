"""The five fused kernels of NCN (paper, section 4.1.1) and their plain PyTorch twins. (Early version: twins only.)"""
import torch
import torch.nn.functional as F


def path():
    """One line that says which path is in use, for a program's start-up message."""
    return "kernels: eager (no GPU)"


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        xf = x.float()
        rstd = torch.linalg.vector_norm(xf, dim=-1, keepdim=True).square().div(x.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (xf * rstd).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy, xhat, w = dy.float(), x.float() * rstd, weight.float()
        g = dy * xhat
        mean = (g @ w).unsqueeze(-1).div_(-x.shape[-1])
        dx = torch.addcmul(dy * w, xhat, mean).mul_(rstd)
        return dx.to(x.dtype), g.flatten(0, -2).sum(0).to(weight.dtype), None


def rms_norm(x, weight, eps=1e-5):
    return _RMSNorm.apply(x, weight, eps)


def actuate(z):
    z = z.float()
    gain = 2 * torch.sigmoid(z[..., 0])
    precision = (F.softplus(z[..., 1]) + 0.01).clamp(max=4.0)
    signals = torch.stack((gain, precision, torch.sigmoid(z[..., 2])), -1)
    return signals, (signals - 1).square().flatten(0, -2).sum(0)


def modulate(y, residual, gain, gate=None):
    return torch.addcmul(residual, y, gain if gate is None else gain * gate).to(residual.dtype)


def write_cache(k_cache, v_cache, k, v, position):
    T = k.shape[2]
    if k.device.type == "cpu" and not torch.compiler.is_compiling():
        p = int(position)
        k_cache[:, :, p:p + T].copy_(k)
        v_cache[:, :, p:p + T].copy_(v)
    else:
        index = position.reshape(()) + torch.arange(T, device=k.device)
        k_cache.index_copy_(2, index, k.to(k_cache.dtype))
        v_cache.index_copy_(2, index, v.to(v_cache.dtype))


def _chunks(h, weight, targets, want_h, want_w):
    """Loss sum, number of valid targets, and the unscaled gradients (None where not wanted), chunk by chunk."""
    N, V = h.shape[0], weight.shape[0]
    rows = max(1, min(N, (1 << (26 if h.is_cuda else 24)) // V))
    buffer = torch.empty(rows, -(-V // 16) * 16, dtype=h.dtype, device=h.device)[:, :V]
    dh = []
    dw = torch.zeros(weight.shape, dtype=torch.float32, device=h.device) if want_w else None
    total = torch.zeros((), dtype=torch.float32, device=h.device)
    for i in range(0, N, rows):
        x, target = h[i:i + rows], targets[i:i + rows].unsqueeze(1)
        if torch.compiler.is_compiling():
            logits = (x @ weight.t()).float()
        else:
            logits = torch.mm(x, weight.t(), out=buffer[:len(x)]).float()
        valid, index = (target >= 0).float(), target.clamp(min=0)
        picked = logits.gather(1, index)
        top = logits.amax(1, keepdim=True)
        p = logits.sub_(top).exp_()
        s = p.sum(1, keepdim=True)
        total += ((s.log() + top - picked) * valid).sum()
        if want_h or want_w:
            p.mul_(valid / s).scatter_add_(1, index, -valid)
            p = p.to(h.dtype)
            if want_h:
                dh.append(p @ weight)
            if want_w:
                dw.addmm_(p.t(), x) if h.dtype == torch.float32 else dw.add_(p.t() @ x)
    return total, (targets >= 0).sum().clamp(min=1), torch.cat(dh) if want_h else None, dw


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, targets, dtype):
        total, n, ctx.dh, ctx.dw = _chunks(h.to(dtype), weight.to(dtype), targets, *ctx.needs_input_grad[:2])
        ctx.n, ctx.dtypes = n, (h.dtype, weight.dtype)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        scale = grad / ctx.n
        dh = None if ctx.dh is None else (ctx.dh.float() * scale).to(ctx.dtypes[0])
        dw = None if ctx.dw is None else (ctx.dw * scale).to(ctx.dtypes[1])
        return dh, dw, None, None


def linear_cross_entropy(h, weight, targets):
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    h, targets = h.flatten(0, -2), targets.flatten()
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(h, weight, targets, dtype)
        total, n, _, _ = _chunks(h.to(dtype), weight.to(dtype), targets, False, False)
        return total / n
