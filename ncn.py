"""
Neuromodulatory Control Networks (NCN): the whole model in one file. The operations that a GPU
runs as one kernel each are in kernels.py, beside their definitions in plain PyTorch.

A Transformer computes the same way for every token. A brain does not: a few small nuclei broadcast
noradrenaline or acetylcholine, and the same circuits become more sensitive, more focused,
more active. Here a small controller network reads the token embeddings and emits, for every token
and every layer, three numbers:

    gain       g      in (0, 2)     how strongly the layer's two branches write into the residual
    precision  beta   in (0.01, 4]  inverse temperature of the layer's attention: how sharp it is
    gate       gamma  in (0, 1)     how much of the feed-forward branch (FFN) is let through

A signal of 1 leaves the Transformer as it is. Read from the top: config, controller, salience
pooling, block, memory, model and loss, files, a demonstration. "Eq." and "section" refer to the
paper, "Neuromodulatory Control Networks" (M. C. Morgan, 2025).

Shapes: B sequences, T tokens, width d, L layers, vocabulary V; h heads of width e = d / h, where h
is n_head in a block and ncn_heads in the controller.

Worth noticing:
- The model is written once. With a Memory it reads a text token by token and computes the same.
- Causal salience: at position t the controller sees tokens 0..t, so training and generation compute
  the same numbers. The paper trains with the whole sequence in view (`global`) and generates with
  one token (`reactive`); both are here, too.
- The salience cache, future work in the paper, is the controller's memory: its size does not grow.
- The model starts close to the plain Transformer: gain and precision at 1, the gate at 0.953,
  because no sigmoid reaches 1.
- Static and modulated models of one seed start from the same base weights, so that experiments can
  compare them pair by pair.
"""

import math
import os
import zlib
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import actuate, linear_cross_entropy, modulate, rms_norm, write_cache

SIGNALS = ("gain", "precision", "gate")
SALIENCE = ("causal", "global", "reactive", "token", "constant")


# ---- Config ------------------------------------------------------------------------------------
@dataclass
class NCNConfig:
    """The model's settings; sizes default to the paper's run. Raises ValueError if they clash."""

    vocab_size: int = 50257  # tokens the model knows
    block_size: int = 512  # context length, in tokens
    n_layer: int = 6  # Transformer blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 256  # width d of the residual stream
    dropout: float = 0.1  # on the embeddings and on what each branch adds
    ncn_hidden: int = 64  # hidden width of the controller
    ncn_heads: int = 2  # heads of the controller's salience pooling
    homeostatic_lambda: float = 0.01  # weight of the price for signals away from 1 (Eq. 18)
    signals: tuple = SIGNALS  # those the controller drives; (): the plain, "static" Transformer
    salience: str = "causal"  # or global, reactive, token, constant: what the controller sees
    n_control: int = 0  # numbers the controller reads beside the text: a task, a metric, a slider
    n_ffn: int = 0  # hidden width of the FFN; 0: 4 n_embd

    def __post_init__(self):
        for name in self.signals:
            if name not in SIGNALS:
                raise ValueError(f"unknown signal '{name}': choose from {', '.join(SIGNALS)}")
        self.signals = tuple(name for name in SIGNALS if name in self.signals)
        check_salience(self.salience)
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "ncn_hidden", "ncn_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("n_head", "ncn_heads"):
            if self.n_embd % getattr(self, name):
                heads = getattr(self, name)
                raise ValueError(f"n_embd {self.n_embd} is not divisible by {name} {heads}")
        if self.block_size < 2:  # generation reads the last half of a full context again
            raise ValueError(f"block_size is {self.block_size}, it must be at least 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must be in [0, 1)")
        for name in ("homeostatic_lambda", "n_control", "n_ffn"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be 0 or more")
        if self.n_control and not self.signals:
            raise ValueError("a model without signals has no controller to read a control: "
                             "give it signals, or data without labels")


def check_salience(mode):
    if mode not in SALIENCE:
        raise ValueError(f"unknown salience mode '{mode}': choose from {', '.join(SALIENCE)}")


# ---- Controller --------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, eps 1e-5 (Zhang & Sennrich 2019)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.weight)


def signals_of(z):
    """z (..., 3) -> signals (..., 3), float32 (the paper's Table 1). kernels.cu has this, too."""
    z = z.float()
    gain = 2 * torch.sigmoid(z[..., 0])  # Eq. 5
    precision = (F.softplus(z[..., 1]) + 0.01).clamp(max=4)  # Eq. 6
    gate = torch.sigmoid(z[..., 2])  # Eq. 7
    return torch.stack([gain, precision, gate], dim=-1)


class Controller(nn.Module):
    """The neuromodulatory nuclei: embeddings in, three signals per token and layer out.

    It sums the tonic context c (what kind of text is this?), the phasic input x (what is this
    token?) and, if there is one, a control from outside (what is wanted?). A small MLP reads the
    sum and decides, for each layer, how to process the token."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.n_layer = config.n_layer
        self.ncn_heads = config.ncn_heads
        self.pools = config.salience not in ("token", "constant")
        if self.pools:
            self.query = nn.Parameter(torch.empty(1, d))  # learned: what makes a token matter
            self.in_proj = nn.Linear(d, 3 * d)  # query, key, value of a multi-head attention
            self.out_proj = nn.Linear(d, d)
        self.control = None
        if config.n_control:
            self.control = nn.Linear(config.n_control, d, bias=False)  # section 3.2
        self.norm = RMSNorm(d)
        self.layer1 = nn.Linear(d, config.ncn_hidden)
        self.layer2 = nn.Linear(config.ncn_hidden, self.n_layer * 3)
        driven = torch.tensor([name in config.signals for name in SIGNALS])  # the others stay at 1
        self.register_buffer("driven", driven, persistent=False)
        self.drives_all = len(config.signals) == len(SIGNALS)

    def start_neutral(self):
        """Section 4.1.4: bias z so that gain = 1, precision = 1, gate = 0.953.

        To be called last: in the authors' own code, the other initialisation overwrites it.
        """
        with torch.no_grad():
            # The signals start at the biases' values, yet can learn. softplus(0.525) + 0.01 = 1.
            self.layer2.weight.mul_(0.01)
            self.layer2.bias.copy_(torch.tensor([0.0, 0.525, 3.0]).repeat(self.n_layer))

    def forward(self, x, salience, control=None, memory=None, real=None):
        """x (B, T, d), what the blocks get -> the signals (B, T, L, 3), float32, as in SIGNALS.

        control: (B, 1 or T, n_control); none is a control of zeros. memory and real: see context.
        """
        check_salience(salience)
        if salience == "constant":  # the MLP reads nothing: three learned numbers per layer
            u = x.new_zeros(1, 1, x.size(-1))
        elif salience == "token":  # no context, c = 0: the slimmest controller that moves
            u = x
        elif not self.pools:
            raise ValueError(f"this model has no salience pooling, so it cannot be {salience}")
        else:
            u = self.context(x, salience, memory, real) + x  # Eq. 2, Eq. 13: (B, T, d)
        if control is not None:
            u = u + self.control(control.to(self.control.weight.dtype))
        hidden = torch.tanh(self.layer1(self.norm(u)))  # Eq. 3, Eq. 14: (B, T, ncn_hidden)
        z = self.layer2(hidden)  # (B, T, 3 L)
        z = z.unflatten(-1, (self.n_layer, 3))  # Eq. 4: (B, T, L, 3)
        signals = actuate(z, signals_of)  # Eq. 5 to 7, on a GPU in one kernel
        if not self.drives_all:
            signals = torch.where(self.driven, signals, 1.0)
        return signals.expand(*x.shape[:2], -1, -1)

    # ---- Salience pooling ----------------------------------------------------------------------
    def context(self, x, salience, memory=None, real=None):
        """Salience pooling, Eq. 1: c = Attention(query, x, x). x (B, T, d) -> (B, T, d).

        It is a standard multi-head attention, but every position asks with the same learned query.
        `causal`: position t sees tokens 0..t, and what a memory has read before. `global`: every
        position sees all tokens but padding, where real (B, T), bool, is false -> (B, 1, d).
        `reactive`: position t sees its own token."""
        d = x.size(-1)
        weight = self.in_proj.weight
        bias = self.in_proj.bias
        k, v = F.linear(x, weight[d:], bias[d:]).chunk(2, dim=-1)  # (B, T, d) each
        if salience == "reactive":  # a softmax over a single token is 1: the value is the answer
            return self.out_proj(v)
        q = F.linear(self.query, weight[:d], bias[:d])[None]  # (1, 1, d)
        q, k, v = (heads(y, self.ncn_heads) for y in (q, k, v))  # (1, h, 1, e), (B, h, T, e) twice
        pooled = v  # a single new token: its average is its value
        if memory is None or x.size(1) > 1:
            asking = 1 if salience == "global" else x.size(1)  # `global` asks once for all
            # Contiguous, because the backward pass of bf16 attention on a CPU takes 500 times as
            # long for a query that was only expanded.
            same_query = q.expand(len(x), -1, asking, -1).contiguous()  # (B, h, T or 1, e)
            mask = None
            if salience == "global" and real is not None:
                mask = real[:, None, None]  # (B, 1, 1, T)
            pooled = F.scaled_dot_product_attention(  # Eq. 1: (B, h, T or 1, e)
                same_query, k, v, mask, is_causal=salience == "causal")
        if memory is not None:  # pooled covers the new tokens only: joins what came before
            scores = (q.float() * k.float()).sum(-1) / math.sqrt(q.size(-1))  # (B, h, T)
            pooled = salience_step(scores, pooled.float(), memory.salience).to(v.dtype)
        return self.out_proj(pooled.transpose(1, 2).flatten(2))


def heads(x, n):
    """(B, T, d) -> (B, n, T, d / n)."""
    B, T, d = x.shape
    return x.view(B, T, n, d // n).transpose(1, 2)


def salience_step(scores, pooled, state):
    """The salience cache: joins what was read before to T new tokens, at a cost that never grows.

    Attention averages values, each weighted by exp(score). The query never changes, so a token has
    one score, whoever looks at it, and all that was read before counts like one token: its weight
    is the sum of their weights, its value their average. (A KV cache must grow, because there every
    new token asks with a query of its own.)

    scores (B, h, T) of the new tokens; pooled (B, h, T, e), their causal average among themselves;
    state: [log of the weights' sum (B, h, 1), average (B, h, 1, e)], updated in place; float32.
    -> the average over all tokens up to each new one, (B, h, T, e)."""
    before, average = state
    total = torch.logaddexp(before, scores.logcumsumexp(-1))  # (B, h, T)
    share_before = (before - total).exp()[..., None]  # (B, h, T, 1), of all weight; 0 at the start
    pooled = torch.lerp(pooled, average, share_before)  # pooled + share (average - pooled)
    before.copy_(total[..., -1:].detach())
    average.copy_(pooled[:, :, -1:].detach())
    return pooled


# ---- Block -------------------------------------------------------------------------------------
class Block(nn.Module):
    """A pre-norm Transformer block whose attention, branches and FFN the controller modulates."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.n_embd
        n_ffn = config.n_ffn or 4 * d
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attn_norm = RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ffn_norm = RMSNorm(d)
        self.ffn_in = nn.Linear(d, n_ffn)
        self.ffn_out = nn.Linear(n_ffn, d)

    def attention(self, x, precision=None, memory=None):
        """x (B, T, d), precision (B, T, 1) -> (B, T, d)."""
        qkv = heads(self.qkv(x), 3 * self.n_head)  # (B, 3 h, T, e): those of q, of k, of v
        q, k, v = qkv.chunk(3, dim=1)  # (B, h, T, e) each
        if precision is not None:  # the asking token's: so it scales the query, not the keys
            q = q * precision[:, None].to(q.dtype)  # Eq. 8: (B, h, T, e)
        if memory is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # Eq. 9: (B, h, T, e)
        else:
            k, v = memory.append(self.layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, memory.mask)  # Eq. 9 over all that was read
        return self.attn_out(y.transpose(1, 2).flatten(2))

    def ffn(self, x):
        """x (B, T, d) -> (B, T, d); the gate of Eq. 12 is applied by add."""
        return self.ffn_out(F.gelu(self.ffn_in(x)))

    def add(self, x, branch, gain=None, gate=None):
        """x + gain * gate * branch: a branch (B, T, d) joins the residual stream x (B, T, d).

        gain, gate: (B, T, 1). No gate is a gate of 1; no gain is the plain Transformer."""
        if self.training:
            branch = F.dropout(branch, self.dropout)
        if gain is None:
            return x + branch
        # Backward, the branch's weights get their gradient times the same factor: Eq. 17,
        # "gradient shielding".
        return modulate(branch, x, gain, gate)

    def forward(self, x, signals=None, memory=None):
        """x (B, T, d), the layer's signals (B, T, 3), None: a plain Transformer -> (B, T, d)."""
        gain = precision = gate = None
        if signals is not None:
            gain, precision, gate = signals.split(1, dim=-1)  # (B, T, 1) each
        x = self.add(x, self.attention(self.attn_norm(x), precision, memory), gain)  # Eq. 10
        return self.add(x, self.ffn(self.ffn_norm(x)), gain, gate)  # Eq. 11, with Eq. 12's gate


# ---- Memory ------------------------------------------------------------------------------------
class Memory:
    """What a model remembers of the tokens it has read, for B texts side by side.

    `model(ids, memory=memory)` reads more tokens: keys, values and the salience state of the
    earlier ones are here, so nothing is read twice. It holds at most block_size tokens.

    On a GPU a step does the same work at every position (it looks at all slots, with a mask, and
    finds its position on the device), so that it can be captured as a CUDA graph and replayed."""

    def __init__(self, model, batch_size):
        c = model.config
        weight = model.embed.weight
        shape = (c.n_layer, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.keys = weight.new_zeros(shape)
        self.values = weight.new_zeros(shape)
        log_sum = weight.new_zeros(batch_size, c.ncn_heads, 1, dtype=torch.float32)
        average = log_sum.new_zeros(batch_size, c.ncn_heads, 1, c.n_embd // c.ncn_heads)
        self.salience = [log_sum, average]  # see salience_step
        self.slots = torch.arange(c.block_size, device=weight.device)
        self.position = self.slots[:1].clone()  # how many tokens were read, on the device
        self.signals = None  # of the tokens read last, as the blocks got them: (B, T, L, 3)
        self.end = 0  # how many slots the tokens being read look at
        self.mask = None  # which of these each of them sees, (T, end); None: all
        self.clear()

    def clear(self):
        """Forgets everything."""
        self.length = 0  # the same number as position, on the host
        self.position.zero_()
        self.salience[0].fill_(-math.inf)  # the log of a sum of no weights

    def open(self, T):
        """Prepares for T more tokens -> their positions (T,). Raises ValueError if it is full."""
        slots = len(self.slots)
        if self.length + T > slots:
            raise ValueError(f"{self.length} + {T} tokens do not fit into block_size {slots}")
        positions = self.position + self.slots[:T]
        self.end = slots if positions.is_cuda else self.length + T
        self.mask = None
        if T > 1 or positions.is_cuda:
            self.mask = self.slots[: self.end] <= positions[:, None]  # (T, end)
        return positions

    def append(self, layer, k, v):
        """k, v (B, h, T, e) of a layer's new tokens -> those of all tokens, (B, h, end, e)."""
        keys = self.keys[layer, :, :, : self.end]  # (B, h, end, e)
        values = self.values[layer, :, :, : self.end]
        if keys.is_cuda:
            write_cache(keys, values, k, v, self.position)
        else:
            keys[:, :, self.length :] = k
            values[:, :, self.length :] = v
        return keys, values

    def close(self, T, signals):
        """The T tokens are read, with these signals."""
        self.length += T
        self.position += T
        self.signals = signals


# ---- Model and loss ----------------------------------------------------------------------------
Loss = namedtuple("Loss", "total task homeostatic")


class ModulatedLM(nn.Module):
    """A Transformer language model and the controller that modulates it, trained as one."""

    def __init__(self, config):
        super().__init__()
        seed = int(torch.randint(2**31, ()))  # drawn first, so that all variants draw the same one
        self.config = config
        self.checkpoint_blocks = False  # keep only a block's input, compute it again in backward
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # tied: also the output head
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.controller = Controller(config) if config.signals else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.init_weights(seed)

    def init_weights(self, seed):
        """Normal weights of variance 1 / inputs, sinusoidal positions, a neutral controller."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                usual = 4 * self.config.n_embd  # inputs of ffn_out, unless n_ffn says more
                std = min(p.size(1), usual) ** -0.5  # keeps the variance; embed is the head, too
                if name.endswith(("attn_out.weight", "ffn_out.weight")):  # as GPT-2, for any depth
                    std /= math.sqrt(2 * self.config.n_layer)
                # A generator of its own, named after the matrix: whatever a variant adds, the
                # other matrices stay the same.
                own = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                for columns in p.split(usual, dim=1):  # a wider FFN has the same first units
                    columns.data.copy_(std * torch.randn(columns.shape, generator=own))
        # Position embeddings are learned, but start as sinusoids (Vaswani et al. 2017) of the same
        # size: "the token before" is then one rotation for all positions.
        T, d = self.position.weight.shape
        phase = torch.arange(T)[:, None] * 1e-4 ** torch.linspace(0, 1, (d + 1) // 2)
        sinusoids = torch.cat([phase.sin(), phase.cos()], dim=1)[:, :d]
        with torch.no_grad():
            self.position.weight.copy_((2 / d) ** 0.5 * sinusoids)
        if self.controller:
            self.controller.start_neutral()

    def embeddings(self, ids, memory=None):
        """ids (B, T) -> (B, T, d): what the blocks get and the controller reads."""
        T = ids.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size {self.config.block_size}")
        if memory is None:
            positions = torch.arange(T, device=ids.device)
        else:
            positions = memory.open(T)
        x = self.embed(ids) + self.position(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def check_control(self, control, B, T):
        """A control (B, n_control) or (B, T, n_control) -> (B, 1 or T, n_control); None stays."""
        if control is None:
            return None
        n = self.config.n_control
        if n == 0:
            raise ValueError("this model takes no control: its n_control is 0")
        if tuple(control.shape) not in ((B, n), (B, T, n)):
            raise ValueError(f"control has shape {tuple(control.shape)}, "
                             f"it must be {(B, n)} or {(B, T, n)}")
        return control[:, None] if control.dim() == 2 else control

    def hidden(self, ids, memory=None, salience=None, edit=None, control=None, real=None):
        """ids (B, T) -> the last hidden state (B, T, d), and the signals (B, T, L, 3) or None."""
        salience = salience or self.config.salience
        if memory is not None and salience == "global":
            salience = "causal"  # the tokens read so far are all there is
        control = self.check_control(control, *ids.shape)  # (B, 1 or T, n_control)
        x = self.embeddings(ids, memory)  # (B, T, d)
        signals = None  # what the controller says
        used = None  # what the blocks get
        per_layer = [None] * self.config.n_layer
        if self.controller:  # backward, it learns through every signal at once: Eq. 16
            signals = self.controller(x, salience, control, memory, real)  # (B, T, L, 3)
            used = edit(signals) if edit else signals
            per_layer = used.unbind(2)  # L x (B, T, 3)
        for block, s in zip(self.blocks, per_layer, strict=True):
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, s, use_reentrant=False)
            else:
                x = block(x, s, memory)
        if memory is not None:
            memory.close(ids.size(1), used)
        return self.norm(x), signals

    def logits(self, x):
        """The output head: hidden states (..., d) -> logits (..., V). The loss does without it."""
        return F.linear(x, self.embed.weight)

    def forward(self, ids, targets=None, memory=None, salience=None, edit=None, control=None):
        """ids (B, T) int64 -> logits (B, T, V), or instead:

        with targets (B, T) int64, of which negative ones are ignored, a Loss of float32 scalars,
        total = task + homeostatic, in nats per token; with a memory, which then holds these tokens,
        too, the last token's logits (B, V).

        salience overrides the config's mode. edit, a function from signals (B, T, L, 3) to signals,
        changes them before use: to dose a modulator or to pin it; the homeostatic loss is that of
        the unedited ones. control: (B, n_control), or (B, T, n_control) from token to token; none
        is a control of zeros. Raises ValueError for more tokens than block_size."""
        real = None if targets is None else not_padding(targets)
        x, signals = self.hidden(ids, memory, salience, edit, control, real)
        if memory is not None:
            return self.logits(x[:, -1])
        if targets is None:
            return self.logits(x)
        task = linear_cross_entropy(x, self.embed.weight, targets)  # loss and gradients in one pass
        homeostatic = task.new_zeros(())
        if signals is not None:
            price = (signals - 1).square().sum(-1).mean(-1)  # (B, T), the mean over layers
            counted = targets >= 0  # a token without a task has no price
            price = (price * counted).sum() / counted.sum().clamp(min=1)
            homeostatic = self.config.homeostatic_lambda * price  # Eq. 18
        return Loss(task + homeostatic, task, homeostatic)  # Eq. 19; Eq. 15 says the same

    @torch.no_grad()
    def signals(self, ids, salience=None, control=None):
        """ids (B, T) -> gain, precision, gate (B, T, L, 3), float32; all 1 without a controller."""
        control = self.check_control(control, *ids.shape)
        if not self.controller:
            return torch.ones(*ids.shape, self.config.n_layer, len(SIGNALS), device=ids.device)
        return self.controller(self.embeddings(ids), salience or self.config.salience, control)

    # ---- Files ---------------------------------------------------------------------------------

    def save(self, path, **more):
        """Writes config, weights and `more` (tensors, plain values). Raises OSError."""
        content = {"config": asdict(self.config), "model": self.state_dict(), **more}
        write_file(path, lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path):
        """The model of a checkpoint, ours or the paper authors', on the CPU, in eval mode.

        Raises OSError or ValueError."""
        return cls.from_checkpoint(load_file(path), path)

    @classmethod
    def from_checkpoint(cls, content, path):
        """As load, from what load_file has returned; path serves the error message."""
        try:
            if "model" not in content:
                config = content.get("config") or {}
                state = content.get("model_state_dict", content)
                return cls.from_reference(state, config.get("nhead", 8), config.get("ncn_heads", 2))
            model = cls(NCNConfig(**content["config"]))
            model.load_state_dict(content["model"])
            return model.eval()
        except Exception as error:  # a dict of anything at all can come out of a file
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} holds no NCN model ({reason})") from None

    @classmethod
    def from_reference(cls, state_dict, n_head=8, ncn_heads=2, salience="global"):
        """The model of the paper authors' own state dict, whose names differ from ours."""
        theirs = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
        vocab_size, d = theirs["token_embeddings.weight"].shape
        n_layer = len([name for name in theirs if name.endswith("q_proj.weight")])
        config = NCNConfig(
            vocab_size=vocab_size, block_size=len(theirs["position_embeddings.weight"]),
            n_layer=n_layer, n_head=n_head, n_embd=d, ncn_hidden=len(theirs["ncn.layer1.weight"]),
            ncn_heads=ncn_heads, salience=salience)
        ours = {}
        for name, tensor in theirs.items():
            for old, new in THEIR_NAMES.items():
                name = name.replace(old, new)
            ours[name] = tensor
        ours["controller.query"] = ours["controller.query"].view(1, d)
        for layer in range(n_layer):
            q, k, v = (ours.pop(f"blocks.{layer}.{x}_proj.weight") for x in "qkv")
            ours[f"blocks.{layer}.qkv.weight"] = torch.cat([q, k, v])
        ours.pop("output_head.weight", None)  # tied to the embedding
        model = cls(config)
        model.load_state_dict(ours)
        return model.eval()


THEIR_NAMES = {  # parts of the authors' names -> ours, longer ones first
    "token_embeddings.": "embed.", "position_embeddings.": "position.", "final_norm.": "norm.",
    "ncn.control_query": "controller.query", "ncn.pooling_attn.in_proj_": "controller.in_proj.",
    "ncn.pooling_attn.": "controller.", "ncn.ncn_norm.": "controller.norm.", "ncn.": "controller.",
    "transformer_layers.": "blocks.", "self_attn.out_proj.": "attn_out.", "self_attn.": "",
    "feed_forward.linear1.": "ffn_in.", "feed_forward.linear2.": "ffn_out.",
    "norm1.": "attn_norm.", "norm2.": "ffn_norm.",
}


def not_padding(targets):
    """targets (B, T) -> (B, T) bool: the tokens up to a row's last target; the rest is padding."""
    places = torch.arange(targets.size(1), device=targets.device)
    last = torch.where(targets >= 0, places, 0).amax(1, keepdim=True)  # (B, 1)
    return places <= last


def write_file(path, write):
    """Calls write(file) on a new file, then gives it its name: whatever goes wrong, an earlier file
    stays as it was. Raises OSError."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_file(path):
    """The dict in a checkpoint, on the CPU; runs no code from it. Raises OSError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}: train one first, or name one that is there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"cannot read {path} ({type(error).__name__}): it is damaged, or holds "
                         "more than tensors and plain values") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no NCN model")
    return content


# ---- A demonstration: `python ncn.py` ----------------------------------------------------------
def retrieval(n):
    """n sequences of a task that wants a different precision in each of its two regimes.

    A sequence is a regime, eight pairs (key, value), a token each, and a query, one of the keys.
    Regime 0, "retrieve": the answer is the query's value. Regime 1, "any": any of the eight values.
    -> ids and targets (n, 10), regimes (n,), and the least possible losses (n,), in nats."""
    regime = torch.randint(2, (n, 1))
    keys = torch.rand(n, 8).argsort(1)  # (n, 8), all eight of them in any order
    values = torch.randint(8, (n, 8))
    asked = torch.randint(8, (n, 1))
    pair = torch.where(regime == 0, asked, torch.randint(8, (n, 1)))  # whose value is the answer
    query = keys.gather(1, asked)
    answer = values.gather(1, pair)
    # The vocabulary: 2 regimes, 64 pairs, 8 queries, 8 answers.
    ids = torch.cat([regime, 2 + 8 * keys + values, 66 + query], dim=1)
    targets = torch.full_like(ids, -1)
    targets[:, -1:] = 74 + answer
    share = (values == answer).float().mean(1, keepdim=True)
    least = torch.where(regime == 0, 0.0, -share.log())
    return ids, targets, regime[:, 0], least[:, 0]


def learn(seed, steps=600, lr=3e-3, **changes):
    """Trains a block with one head on that task; yields the model after each step."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=82, block_size=10, n_layer=1, n_head=1, n_embd=64, ncn_hidden=32)
    model = ModulatedLM(NCNConfig(dropout=0.0, **sizes | changes))
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        ids, targets, _, _ = retrieval(128)
        model(ids, targets).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield model


@torch.no_grad()
def judge(model):
    """-> for both regimes: nats above the least possible loss, and the precision at the query."""
    ids, targets, regime, least = retrieval(4000)
    nats = F.cross_entropy(model(ids)[:, -1], targets[:, -1], reduction="none") - least
    precision = model.signals(ids)[:, -1, :, 1].mean(1)  # (n,), the mean over layers
    return [(nats[regime == r].mean().item(), precision[regime == r].mean().item()) for r in (0, 1)]


def show_leak(model, ids):
    print("2. One changes the last token. How far do the logits of the tokens before it move?")
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % model.config.vocab_size
    for mode in SALIENCE:
        difference = model(ids, salience=mode) - model(other, salience=mode)
        print(f"   {mode:12}{difference[:, :-1].abs().max():.6f}")


def show_shielding(block):
    print("3. The gradient of an FFN's weights, at half the gain: shielded by half")
    x = torch.randn(1, 8, block.ffn_in.in_features)
    for gain in (1.0, 0.5):
        out = block.add(x, block.ffn(x), torch.full((1, 8, 1), gain))
        gradient = torch.autograd.grad(out.sum(), block.ffn_in.weight)[0]
        print(f"   gain {gain}: norm {gradient.norm():.4f}")


def main():
    """Prints sizes and start, the leak of `global`, shielding, and who learns the task."""
    torch.manual_seed(0)
    model = ModulatedLM(NCNConfig()).eval()
    ids = torch.randint(model.config.vocab_size, (1, 64))
    print("1. Parameters at the paper's sizes; then gain, precision and gate at the start")
    for name, part in [("controller", model.controller), ("all", model)]:
        print(f"   {name:12}{sum(p.numel() for p in part.parameters()):>12,}")
    print("  ", *(f"{mean:.4f}" for mean in model.signals(ids).mean((0, 1, 2))))
    with torch.no_grad():
        nn.init.normal_(model.controller.layer2.weight)  # as if it had learned: signals move
        show_leak(model, ids)
    show_shielding(model.blocks[0])
    print("4. One head, two regimes: retrieve a key's value, or name any value.\n"
          "   Nats above the best possible loss (and the mean precision):\n"
          f"   {'':15}{'retrieve':>16}{'any':>16}")
    for name, signals in (("static", ()), ("precision alone", ("precision",)), ("all", SIGNALS)):
        *_, model = learn(0, signals=signals)
        print(f"   {name:15}", *(f"{nats:8.3f} ({beta:.2f})" for nats, beta in judge(model)))


if __name__ == "__main__":
    main()
