"""
Neuromodulatory Control Networks (NCN), the whole model in one file.

A Transformer computes the same way for every token. A brain does not: a few small nuclei broadcast dopamine,
acetylcholine and noradrenaline, and the same circuits become more or less sensitive, focused, active. Here a small
controller network reads the token embeddings and emits, for every token and every layer, three numbers:

    gain       g      in (0, 2)     how strongly the layer's two branches write into the residual stream
    precision  beta   in (0.01, 4]  inverse temperature of the layer's attention: how sharply it focuses
    gate       gamma  in (0, 1)     how much of the feed-forward branch (FFN) is let through

Each is 1 when the controller leaves the Transformer alone. Read from the top: config, controller, block, model,
loss, generation. "Eq." and "section" refer to the paper, "Neuromodulatory Control Networks" (M. C. Morgan, 2025).

Worth noticing:
- Causal salience: at position t the controller sees tokens 0..t, so training and generation compute the same numbers.
  The paper trains with the whole sequence in view (`global`) and generates with one token (`reactive`); both are here.
- The salience cache, future work in the paper: O(1) time and memory per generated token.
- The model starts as the plain Transformer: every signal is at its neutral value at step 0, and stays there until
  moving it pays.
- The loss never holds the logits of a whole batch (kernels.py). Generation computes a key or a value again only when
  its window refills, and has a class of its own, the Decoder, for the same sums in as few operations as can be.
"""

import math
import os
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import actuate, linear_cross_entropy, modulate, rms_norm, write_cache

SIGNALS = ("gain", "precision", "gate")
SALIENCE = ("causal", "global", "reactive")

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class NCNConfig:
    """The model's sizes; the defaults are the paper's run. Raises ValueError where they contradict each other."""

    vocab_size: int = 50257  # tokens the model knows
    block_size: int = 512  # context length, in tokens
    n_layer: int = 6  # Transformer blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 256  # width d of the residual stream
    dropout: float = 0.1  # on embeddings and branch outputs; not on attention probabilities, which would cost the
    #                       fast attention kernels
    ncn_hidden: int = 64  # hidden width of the controller
    ncn_heads: int = 2  # heads of the controller's salience pooling
    homeostatic_lambda: float = 0.01  # price of a signal's squared distance from 1 (Eq. 18)
    signals: tuple = SIGNALS  # which signals the controller drives; () is the plain Transformer
    salience: str = "causal"  # what the salience pooling sees: causal (0..t), global (everything), reactive (t alone)

    def __post_init__(self):
        if unknown := set(self.signals) - set(SIGNALS):
            raise ValueError(f"unknown signal '{min(unknown)}': choose from {', '.join(SIGNALS)}, or none of them")
        self.signals = tuple(name for name in SIGNALS if name in self.signals)
        if self.salience not in SALIENCE:
            raise ValueError(f"unknown salience mode '{self.salience}': choose from {', '.join(SALIENCE)}")
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "ncn_hidden", "ncn_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("n_head", "ncn_heads"):
            if self.n_embd % getattr(self, name):
                raise ValueError(f"n_embd {self.n_embd} is not divisible by {name} {getattr(self, name)}")
        if self.block_size < 2:  # generation keeps half of a full window
            raise ValueError(f"block_size is {self.block_size}, it must be at least 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must be in [0, 1)")
        if not 0 <= self.homeostatic_lambda < math.inf:
            raise ValueError(f"homeostatic_lambda is {self.homeostatic_lambda}, it must be 0 or more")


# ----------------------------------------------------------------------------------------------------------------------
# Controller


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, eps 1e-5 (Zhang & Sennrich 2019)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.weight)


def salience_pool(scores, values, chunk=32):
    """
    Causal softmax pooling: out[t] = sum_{i<=t} softmax(scores[0..t])_i values[i], and the state that continues it.

    scores (B, h, T), values (B, h, T, e), both float32 -> pooled (B, h, T, e), and the state after the last token:
    running maximum (B, h), running sum (B, h), running weighted value (B, h, e).

    There is one score per token, not one per pair of tokens, so nothing of size (T, T) is needed. Tokens are handled
    in chunks: within a chunk directly; of each earlier chunk only its maximum, its sum and its weighted value count.
    Every exponent is a score minus a running maximum that already covers it, so never above 0: exact for any scores.
    (Measured, 2 CPU cores, fp32, forward and backward at (4, 2, 512, 128): 5.4 ms; SDPA with a repeated query 29 ms.)
    """
    T = scores.size(-1)
    n = -(-T // chunk)
    pad = n * chunk - T
    s = F.pad(scores, (0, pad), value=-math.inf).unflatten(-1, (n, chunk))  # (B, h, n, C)
    v = F.pad(values, (0, 0, 0, pad)).unflatten(-2, (n, chunk))  # (B, h, n, C, e)
    # The maxima only set the scale that numerator and denominator share: their gradient is exactly zero, so detach.
    top = s.detach().flatten(-2).cummax(-1).values.unflatten(-1, (n, chunk))  # (B, h, n, C)
    peak = s.detach().amax(-1)  # (B, h, n)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=s.device).triu(1)
    within = (s[..., None, :] - top[..., None]).masked_fill(later, -math.inf).exp()  # (B, h, n, C, C)
    weight = (s - peak[..., None]).exp()  # (B, h, n, C)
    chunk_sum = weight.sum(-1)  # (B, h, n)
    chunk_value = (weight[..., None, :] @ v).squeeze(-2)  # (B, h, n, e)
    not_before = torch.ones(n, n, dtype=torch.bool, device=s.device).triu()[:, None]
    before = (peak[..., None, None, :] - top[..., None]).masked_fill(not_before, -math.inf).exp()  # (B, h, n, C, n)
    total = within.sum(-1) + (before @ chunk_sum[:, :, None, :, None]).squeeze(-1)  # (B, h, n, C)
    value = within @ v + before @ chunk_value[:, :, None]  # (B, h, n, C, e)
    pooled = (value / total[..., None]).flatten(2, 3)[:, :, :T]
    last = [x.flatten(2, 3)[:, :, T - 1] for x in (top, total, value)]
    return pooled, last


def salience_step(score, value, state):
    """
    One more token for salience_pool: score (B, h), value (B, h, e), state as salience_pool leaves it, updated in place
    -> pooled (B, h, e). This is the salience cache: constant time and memory, and the same recurrence by which the
    online softmax in kernels.cu reads a row of logits once: when the maximum rises, what was summed is rescaled.
    """
    top, total, weighted = state
    new_top = torch.maximum(top, score)
    old, new = (top - new_top).exp(), (score - new_top).exp()
    top.copy_(new_top)
    total.mul_(old).add_(new)
    weighted.mul_(old[..., None]).addcmul_(new[..., None], value)
    return weighted / total[..., None]


class Controller(nn.Module):
    """
    The neuromodulatory nuclei: embeddings in, three signals per token and layer out.

    Tonic context c (what kind of text is this?) by salience pooling, phasic input x (what is this token?), and a small
    MLP over their sum that decides, for each layer, how to process the token.
    """

    def __init__(self, config):
        super().__init__()
        d, self.n_head, self.n_layer = config.n_embd, config.ncn_heads, config.n_layer
        self.query = nn.Parameter(torch.empty(1, d))  # the learned salience query, the "top-down attentional set"
        self.in_proj = nn.Linear(d, 3 * d)  # query, key and value of a standard multi-head attention
        self.out_proj = nn.Linear(d, d)
        self.norm = RMSNorm(d)
        self.layer1 = nn.Linear(d, config.ncn_hidden)
        self.layer2 = nn.Linear(config.ncn_hidden, self.n_layer * 3)
        self.register_buffer("active", torch.tensor([name in config.signals for name in SIGNALS]), persistent=False)
        self.all_active = len(config.signals) == len(SIGNALS)

    def start_neutral(self):
        """Section 4.1.4: bias z so that gain = 1, precision = 1, gate = 0.953. After all other initialisation."""
        nn.init.normal_(self.layer2.weight, std=1e-3)  # small: the signals start at the biases' values, yet can learn
        with torch.no_grad():
            self.layer2.bias.copy_(torch.tensor([0.0, 0.525, 3.0]).repeat(self.n_layer))

    def folded(self):
        """
        The salience scores as one small product: there is a single query, so q . (Wk x + bk) = (q Wk) . x + q . bk, and
        a (d, h) product replaces a (d, d) one. -> (h, d), (h,), in float32: these scores are exponentiated.
        """
        (wq, wk, _), (bq, bk, _) = self.in_proj.weight.float().chunk(3), self.in_proj.bias.float().chunk(3)
        q = F.linear(self.query.float(), wq, bq).view(self.n_head, 1, -1)  # (h, 1, e)
        q = q / math.sqrt(q.size(-1))
        key = (q @ wk.unflatten(0, (self.n_head, -1))).squeeze(1)  # (h, d)
        return key, (q.squeeze(1) * bk.unflatten(0, (self.n_head, -1))).sum(-1)

    def context(self, x, salience):
        """Salience pooling, Eq. 1: x (B, T, d) -> c (B, T, d), or (B, 1, d) for `global`."""
        value = F.linear(x, self.in_proj.weight.chunk(3)[2], self.in_proj.bias.chunk(3)[2])  # (B, T, d)
        if salience == "reactive":
            return self.out_proj(value)  # a softmax over a single token is 1
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), *self.folded()).transpose(1, 2)  # (B, h, T)
            value = value.unflatten(-1, (self.n_head, -1)).transpose(1, 2).float()  # (B, h, T, e)
            if salience == "global":
                pooled = scores.softmax(-1)[:, :, None] @ value  # (B, h, 1, e): every token sees the future
            else:
                pooled, _ = salience_pool(scores, value)  # (B, h, T, e)
        return self.out_proj(pooled.transpose(1, 2).flatten(2).to(x.dtype))

    def signals(self, u):
        """Tonic + phasic, u (..., d) -> signals (..., L, 3) float32, and the sum of their mean squared deviations."""
        z = self.layer2(torch.tanh(self.layer1(self.norm(u))))  # Eq. 3 and 14
        z = z.unflatten(-1, (self.n_layer, 3))  # (..., L, 3), Eq. 4
        signals, deviation = actuate(z)  # Eq. 5, 6, 7, with precision clamped at 4
        if not self.all_active:  # a signal that the config leaves out stays at 1 and costs nothing
            signals = torch.where(self.active, signals, 1.0)
            deviation = deviation * self.active
        return signals, deviation.sum() * (3 / z.numel())

    def forward(self, x, salience):
        """x (B, T, d) -> signals (B, T, L, 3) float32, and their deviation."""
        return self.signals(self.context(x, salience) + x)  # Eq. 2 and 13


# ----------------------------------------------------------------------------------------------------------------------
# Block


class _Dropout(torch.autograd.Function):
    """For a CPU: 16 random bits per number instead of 32, one byte kept instead of 4. (2 cores, (4, 512, 256): 1.0 ms,
    F.dropout 3.5.) The share that stays is a multiple of 1/65536, and what stays is scaled by exactly its inverse."""

    @staticmethod
    def forward(ctx, x, p):
        stay = min(max(round((1 - p) * 2**16), 1), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-(2**63), None).view(torch.int16)
        keep = (bits[: x.numel()] < stay - 2**15).view(x.shape)
        ctx.save_for_backward(keep)
        ctx.scale = 2**16 / stay
        return x * keep.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0].to(dy.dtype).mul_(ctx.scale), None


def dropout(x, p, training):
    """F.dropout(x, p, training), by the fastest way that the device has."""
    if not training or not p:
        return x
    return F.dropout(x, p) if x.is_cuda or torch.compiler.is_compiling() else _Dropout.apply(x, p)


class Block(nn.Module):
    """A pre-norm Transformer block whose attention, branches and FFN the controller modulates."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.attn_norm = RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ffn_norm = RMSNorm(d)
        self.ffn_in = nn.Linear(d, 4 * d)
        self.ffn_out = nn.Linear(4 * d, d)

    def forward(self, x, signals=None):
        """x (B, T, d), this layer's signals (B, T, 3) or None for the plain Transformer -> (B, T, d)."""
        gain, precision, gate = (None,) * 3 if signals is None else signals.split(1, dim=-1)  # (B, T, 1) each
        x = self.add(x, self.attention(self.attn_norm(x), precision), gain)  # Eq. 10
        return self.add(x, self.ffn(self.ffn_norm(x)), gain, gate)  # Eq. 11, 12

    def ffn(self, x):
        x, rest = self.ffn_in(x), lambda x: self.ffn_out(F.gelu(x))
        if not self.training or x.numel() < 2**20:
            return rest(x)
        # The backward pass computes GELU again instead of keeping its result, a fifth of a block's memory. It costs
        # nothing that can be measured where that is much, 3% of a step where it is little.
        return checkpoint(rest, x, use_reentrant=False, preserve_rng_state=False)

    def add(self, x, branch, gain, gate=None):
        """One branch joins the residual stream, scaled by its signals."""
        branch = dropout(branch, self.dropout, self.training)
        return x + branch if gain is None else modulate(branch, x, gain, gate)

    def attention(self, x, precision):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, h, T, d/h) each
        if precision is not None:  # Eq. 8: beta sharpens or flattens; keys stay as they are, so they can be cached
            q = q * precision[:, None].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # Eq. 9
        return self.attn_out(y.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------------------------------
# Model and loss

Loss = namedtuple("Loss", "total task homeostatic")


class ModulatedLM(nn.Module):
    """A Transformer language model and the controller that modulates it, trained as one (Eq. 15, 19)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False  # see hidden
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: the two are tied
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.controller = Controller(config) if config.signals else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:  # GPT-2: the branches' last projections are scaled so that depth does not add variance
                branch_end = name.endswith(("attn_out.weight", "ffn_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if branch_end else 0.02)
        # The position embeddings are learned, but start as sinusoids (Vaswani et al. 2017) of the same size: "the token
        # before" is then one rotation for all positions. On the demo stories that saves a tenth of the steps.
        phase = torch.arange(config.block_size)[:, None] * 1e-4 ** torch.linspace(0, 1, -(-config.n_embd // 2))
        with torch.no_grad():
            self.position.weight.copy_(0.02 * 2**0.5 * torch.cat([phase.sin(), phase.cos()], dim=1)[:, : config.n_embd])
        if self.controller:
            self.controller.start_neutral()

    def embeddings(self, ids):
        """ids (B, T) -> (B, T, d): what the blocks get and the controller reads."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens do not fit into block_size {self.config.block_size}")
        x = self.embed(ids) + self.position.weight[: ids.size(1)]
        return dropout(x, self.config.dropout, self.training)

    def hidden(self, ids, salience=None, edit=None):
        """ids (B, T) -> the last hidden state (B, T, d), and the controller's deviation (0 without a controller)."""
        x = self.embeddings(ids)
        signals, deviation = [None] * self.config.n_layer, x.new_zeros(())
        if self.controller:
            signals, deviation = self.controller(x, salience or self.config.salience)  # (B, T, L, 3)
            signals = (edit(signals) if edit else signals).unbind(2)  # L x (B, T, 3)
        for block, s in zip(self.blocks, signals):
            if self.checkpoint_blocks and self.training:  # keep a block's input only, and compute it again in backward
                x = checkpoint(block, x, s, use_reentrant=False)
            else:
                x = block(x, s)
        return self.norm(x), deviation

    def forward(self, ids, targets=None, salience=None, edit=None):
        """
        ids (B, T) int64 -> logits (B, T, vocab_size); with targets (B, T), where -1 is ignored, a Loss instead:
        total = task + homeostatic, all in nats per token (float32 scalars).

        salience overrides the config's mode. edit, a function from signals (B, T, L, 3) to signals, changes them
        before use: to dose a modulator or to pin it. The homeostatic loss is that of the unedited signals.
        """
        x, deviation = self.hidden(ids, salience, edit)
        if targets is None:
            return F.linear(x, self.embed.weight)
        task = linear_cross_entropy(x, self.embed.weight, targets)
        homeostatic = self.config.homeostatic_lambda * deviation  # Eq. 18
        return Loss(task + homeostatic, task, homeostatic)  # Eq. 19

    @torch.no_grad()
    def signals(self, ids, salience=None):
        """ids (B, T) -> (B, T, n_layer, 3) float32: gain, precision, gate. All ones without a controller."""
        if not self.controller:
            return torch.ones(*ids.shape, self.config.n_layer, 3, device=ids.device)
        return self.controller(self.embeddings(ids), salience or self.config.salience)[0]

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    def window_start(self, n):
        """
        First of n tokens that the context still holds. When the window is full its last half is kept, at positions
        from 0 on, and it fills again; so the start moves once per half window, not once per token.
        """
        stride = self.config.block_size - self.config.block_size // 2
        return max(0, -(-(n - self.config.block_size) // stride)) * stride

    def stream(self, ids, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=None, salience=None, edit=None,
               end_token=None):
        """
        Yields the next token of each row, (B,) int64, up to max_new_tokens times; prompt ids (B, T) int64, T >= 1.

        temperature 0 is greedy; top_k 0 keeps every token. Row r of seed s draws the same numbers whatever the batch.
        A row that has drawn end_token goes on yielding it; when all have, the stream ends (on a GPU up to 15 tokens
        later). A model trained with `global` salience generates with `causal`: the prefix is all there is. A GPU
        records edit with the third step and repeats it, so it may use tensors only. Raises ValueError.
        """
        if ids.dim() != 2 or ids.size(1) == 0:
            raise ValueError("the prompt has no tokens")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"the prompt has a token id outside the vocabulary of {self.config.vocab_size}")
        if not (0 <= temperature < math.inf):
            raise ValueError(f"temperature is {temperature}, it must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, it must be in (0, 1]")
        if top_k < 0 or max_new_tokens < 0:
            raise ValueError(f"top_k ({top_k}) and max_new_tokens ({max_new_tokens}) must be 0 or more")
        salience = salience or ("causal" if self.config.salience == "global" else self.config.salience)
        if salience not in ("causal", "reactive"):
            raise ValueError(f"cannot generate with salience '{salience}': choose causal or reactive")
        return self._stream(ids, max_new_tokens, temperature, top_k, top_p, seed, salience, edit, end_token)

    @torch.inference_mode()
    def _stream(self, ids, max_new_tokens, temperature, top_k, top_p, seed, salience, edit, end_token):
        B, prompt = ids.shape
        seed = torch.seed() % 2**31 if seed is None else seed
        chance = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed + row))
                              for row in range(B)], dim=1).to(ids.device)  # (max_new_tokens, B)
        text = torch.cat([ids, ids.new_empty(B, max_new_tokens)], dim=1)
        newest, turn = ids[:, -1:].clone(), ids.new_zeros(1)  # what a step reads; how many were drawn, on the device
        ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
        alike = bool((ids == ids[0]).all())
        decoder, start, graph, steps = Decoder(self, B), -1, None, 0

        def step(fresh):
            """Reads the tokens fresh (B, T), draws the next one: everything that happens per token."""
            logits = decoder(fresh, salience, edit).expand(B, -1)
            token = sample(logits, chance.index_select(0, turn)[0], temperature, top_k, top_p)
            if end_token is not None:
                token = torch.where(ended, end_token, token)
                ended.logical_or_(token == end_token)
            newest.copy_(token[:, None])
            turn.add_(1)

        for n in range(prompt, prompt + max_new_tokens):  # n tokens are known
            if self.window_start(n) != start:  # the prompt, or the kept half of a full window, in one pass
                start = self.window_start(n)
                decoder.advance(-decoder.length)
                step(text[: 1 if alike and n == prompt else B, start:n])  # samples of one prompt share its pass
            elif not ids.is_cuda or steps < 2:  # on a GPU two steps as they are: kernels and libraries load
                step(newest)
                steps += 1
            else:
                if graph is None:  # then one is recorded, not run ...
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.device(ids.device), torch.cuda.graph(graph):
                        step(newest)
                    decoder.length -= 1
                graph.replay()  # ... and repeated: all it reads and writes stays where it is
                decoder.length += 1
            text[:, n] = newest[:, 0]
            yield text[:, n]
            # Looking at a GPU's result makes the host wait, so there only now and then.
            if end_token is not None and (not ids.is_cuda or n % 16 == 0) and ended.all():
                return

    def generate(self, ids, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=None, **how):
        """ids (B, T) -> (B, T + n), n <= max_new_tokens: the prompt and what `stream` makes of it; same arguments."""
        stream, n = self.stream(ids, max_new_tokens, temperature, top_k, top_p, seed, **how), ids.size(1)
        text = torch.cat([ids, ids.new_empty(len(ids), max_new_tokens)], dim=1)
        for token in stream:
            text[:, n] = token
            n += 1
        return text[:, :n]

    # ------------------------------------------------------------------------------------------------------------------
    # Files

    def save(self, path, **more):
        """Writes config, weights and whatever `more` holds; under a temporary name first, so never half a file."""
        save_file({"config": asdict(self.config), "model": self.state_dict(), **more}, path)

    @classmethod
    def load(cls, path):
        """The model of a checkpoint, ours or the paper authors', on the CPU. Raises OSError or ValueError."""
        return cls.from_checkpoint(load_file(path), path)

    @classmethod
    def from_checkpoint(cls, ckpt, path="checkpoint"):
        """As load, from the dict that load_file returns; path only serves the error message."""
        try:
            if "embed.weight" in ckpt.get("model", {}):
                model = cls(NCNConfig(**ckpt["config"]))
                model.load_state_dict(ckpt["model"])
                return model.eval()
            state, config = ckpt.get("model_state_dict", ckpt), ckpt.get("config")
            config = config if isinstance(config, dict) else {}
            return cls.from_reference(state, n_head=config.get("nhead", 8), ncn_heads=config.get("ncn_heads", 2))
        except Exception as error:  # a dict of anything at all can come out of a file
            raise ValueError(f"{path} holds no NCN model: {type(error).__name__}, {error}".splitlines()[0]) from None

    @classmethod
    def from_reference(cls, state_dict, n_head=8, ncn_heads=2, salience="global"):
        """A checkpoint of the paper authors' own code (names in SPEC: `transformer_layers.0.self_attn.q_proj...`)."""
        s = {name.removeprefix("module."): t for name, t in state_dict.items()}
        layers = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("transformer_layers."))
        vocab_size, d = s["token_embeddings.weight"].shape
        model = cls(NCNConfig(vocab_size, s["position_embeddings.weight"].size(0), layers, n_head, d,
                              ncn_hidden=s["ncn.layer1.weight"].size(0), ncn_heads=ncn_heads, salience=salience))
        ours = {"embed.weight": s["token_embeddings.weight"], "position.weight": s["position_embeddings.weight"],
                "norm.weight": s["final_norm.weight"], "controller.query": s["ncn.control_query"].view(1, d),
                "controller.norm.weight": s["ncn.ncn_norm.weight"]}
        for kind in ("weight", "bias"):
            ours[f"controller.in_proj.{kind}"] = s[f"ncn.pooling_attn.in_proj_{kind}"]
            ours[f"controller.out_proj.{kind}"] = s[f"ncn.pooling_attn.out_proj.{kind}"]
            ours[f"controller.layer1.{kind}"] = s[f"ncn.layer1.{kind}"]
            ours[f"controller.layer2.{kind}"] = s[f"ncn.layer2.{kind}"]
        for i in range(layers):
            theirs, block = f"transformer_layers.{i}.", f"blocks.{i}."
            ours[block + "qkv.weight"] = torch.cat([s[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv"])
            ours[block + "attn_out.weight"] = s[theirs + "self_attn.out_proj.weight"]
            for ffn, linear in (("ffn_in", "linear1"), ("ffn_out", "linear2")):
                for kind in ("weight", "bias"):
                    ours[f"{block}{ffn}.{kind}"] = s[f"{theirs}feed_forward.{linear}.{kind}"]
            ours[block + "attn_norm.weight"] = s[theirs + "norm1.weight"]
            ours[block + "ffn_norm.weight"] = s[theirs + "norm2.weight"]
        model.load_state_dict(ours)
        return model.eval()


class Decoder:
    """
    Generation's step: ids (B, T) that follow those it has read -> the last one's logits (B, V), valid until the next
    step. It computes what ModulatedLM does, but remembers each layer's keys and values and the salience state, in
    memory taken once.

    A step for one token is bound by the reading of the weights and, on a CPU, by the number of operations, some 5 us
    each, however small. So there are as few as can be: the weights of norms and the factors of GELU are part of the
    matrices beside them, and all layers' places in the cache are found at once. A CPU's matrices are cut into parts,
    one for each core, as a single one would multiply a matrix and a vector, and into more for several rows (8% faster
    at 16); the head's, the largest, is laid out in the order in which it is read. (2 cores, the paper's head: 0.9 ms,
    by F.linear 4.2 ms.) A GPU's step asks nothing of the host, and reads all slots of the cache with a mask, so that it
    is the same work at every position and can be recorded as a CUDA graph.
    """

    @torch.no_grad()
    def __init__(self, model, batch, gpu=None):
        self.model, c, weight = model, model.config, model.embed.weight
        d, h, device = c.n_embd, c.ncn_heads, weight.device
        self.gpu = weight.is_cuda if gpu is None else gpu
        self.cache = weight.new_zeros(c.n_layer, batch, 2 * c.n_head, c.block_size, d // c.n_head)  # keys, then values
        self.length = 0  # tokens read, on the host ...
        self.position = torch.zeros((), dtype=torch.long, device=device)  # ... and on the device
        self.slots = torch.arange(c.block_size, device=device)
        # x / rms(x) * w is x / sqrt(x . x + d eps) * (sqrt(d) w): the first factor is `unit`, the second the matrix's.
        self.eps, self.plain = weight.new_full((), (d * 1e-5) ** 0.5), weight.new_full((d,), d**-0.5)
        scaled = lambda linear, norm, factor=1.0: linear.weight * (norm.weight * (d**0.5 * factor))
        half = 0.5**0.5  # gelu(x) = (y + y erf y) / sqrt(2) with y = x / sqrt(2)
        self.parts = 1 if self.gpu else max(2 if batch == 1 else 16, torch.get_num_threads())
        self.layers = [(self.lay(scaled(b.qkv, b.attn_norm)), self.lay(b.attn_out.weight),
                        self.lay(scaled(b.ffn_in, b.ffn_norm, half), b.ffn_in.bias * half),
                        self.lay(b.ffn_out.weight * half, b.ffn_out.bias)) for b in model.blocks]
        if k := model.controller:
            self.state = [torch.zeros(batch, *s, device=device) for s in ((h,), (h,), (h, d // h))]  # of the salience
            value = k.in_proj.weight.chunk(3)[2], k.in_proj.bias.chunk(3)[2]
            self.pool = self.lay(*(torch.cat(pair) for pair in zip(value, k.folded())))  # value and score at once
            self.out = self.lay(k.out_proj.weight, k.out_proj.bias)
            self.layer1 = scaled(k.layer1, k.norm)
        self.norm, self.head = model.norm.weight * d**0.5, weight
        if not self.gpu:  # the head as it is read, and a place for its results: part by part, then row by row
            size = -(-c.vocab_size // (16 * self.parts)) * 16
            self.head, self.results = weight.new_zeros(self.parts, d, size), weight.new_empty(self.parts, batch, size)
            self.logits = weight.new_empty(batch, self.parts, size)
            for i, rows in enumerate(weight.split(size)):
                self.head[i, :, : len(rows)] = rows.t()

    def lay(self, weight, bias=None):
        """
        What product takes: a Linear's weight (out, in), bias (out,) or None, and out; for a CPU the first two in parts,
        filled up where they do not divide: (parts, out/parts, in), (parts, out/parts, 1).
        """
        if self.gpu:
            return weight, bias, len(weight)
        split = lambda w: F.pad(w, (0, 0, 0, -len(w) % self.parts)).unflatten(0, (self.parts, -1))
        several = self.cache.size(1) > 1  # rows: then the other order in memory is the faster one
        return (split(weight).mT.contiguous().mT if several else split(weight),
                None if bias is None else split(bias[:, None]), len(weight))

    def product(self, x, linear):
        """x (rows, in) through what lay returned -> (rows, out)."""
        weight, bias, out = linear
        if self.gpu:
            return F.linear(x, weight, bias)
        if x.size(0) == 1:
            x = x.t().expand(self.parts, -1, -1)  # (parts, in, 1)
            y = torch.bmm(weight, x) if bias is None else torch.baddbmm(bias, weight, x)  # (parts, out/parts, 1)
            y = y.view(1, -1)
        else:
            x, weight = x.expand(self.parts, -1, -1), weight.mT
            y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.mT, x, weight)  # (parts, rows, out/parts)
            y = y.transpose(0, 1).flatten(1)
        return y if y.size(1) == out else y[:, :out]

    def unit(self, x):
        """x (rows, d) -> x / sqrt(x . x + d eps)."""
        if self.gpu:
            return rms_norm(x, self.plain)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.eps)

    def __call__(self, ids, salience, edit=None):
        """ids may have one row for all of the batch. Only where length is 0 may they be several tokens."""
        m, c, (B, T), product = self.model, self.model.config, ids.shape, self.product
        x = (m.embed(ids) + m.position(self.position + self.slots[:T])).view(B * T, -1)
        signals = x.new_ones(B, T, c.n_layer, 3)
        if m.controller:
            signals = self.signals(x, B, T, salience)
            signals = edit(signals) if edit else signals
        gain, precision, gate = signals.unbind(-1)  # (B, T, L) each
        # Eq. 10 and 11 as factors of the two branches.
        gains, both = (s.reshape(B * T, -1, 1).unbind(1) for s in (gain, gain * gate))  # L x (B * T, 1) each
        precisions = precision.to(x.dtype)[:, None, :, :, None].unbind(3)  # L x (B, 1, T, 1)
        mask = (self.slots <= self.position)[None] if self.gpu else None  # (1, slots)
        end = self.length + T
        place = self.cache[:, :, :, self.length : end].unbind()  # L x (batch, 2 h, T, d/h)
        known = self.cache if self.gpu else self.cache[:, :, :, :end]
        keys, values = (its.unbind() for its in known.chunk(2, dim=2))  # L x (batch, h, slots, d/h) each
        for i, (qkv, attn_out, ffn_in, ffn_out) in enumerate(self.layers):
            qkv = product(self.unit(x), qkv).view(B, T, 3 * c.n_head, -1).transpose(1, 2)  # (B, 3 h, T, d/h)
            q, kv = qkv.narrow(1, 0, c.n_head), qkv.narrow(1, c.n_head, 2 * c.n_head)
            q = q * precisions[i]  # Eq. 8
            if self.gpu:
                write_cache(keys[i], values[i], *kv.expand(len(keys[i]), -1, -1, -1).chunk(2, dim=1), self.position)
            else:
                place[i].copy_(kv)
            if self.length == 0:  # Eq. 9
                y = F.scaled_dot_product_attention(q, *kv.chunk(2, dim=1), is_causal=True)  # (B, h, T, d/h)
            else:
                y = F.scaled_dot_product_attention(q, keys[i], values[i], mask)
            x = modulate(product(y.transpose(1, 2).reshape(B * T, -1), attn_out), x, gains[i])  # Eq. 10, (B * T, d)
            y = product(self.unit(x), ffn_in)
            y = y.addcmul_(y, y.erf())
            x = modulate(product(y, ffn_out), x, both[i])  # Eq. 11, 12
        self.advance(T)
        x = self.unit(x.view(B, T, -1)[:, -1]) * self.norm
        if self.gpu:
            return F.linear(x, self.head)
        y = torch.bmm(x.expand(self.parts, -1, -1), self.head, out=self.results[:, :B])  # (parts, B, V/parts)
        return self.logits[:B].copy_(y.transpose(0, 1)).flatten(1)[:, : c.vocab_size]

    def signals(self, x, B, T, salience):
        """The controller, Eq. 1 to 7: x (B * T, d) -> (B, T, L, 3)."""
        k = self.model.controller
        pooled, scores = torch.split_with_sizes(self.product(x, self.pool), (x.size(1), k.n_head), 1)
        if salience == "causal":
            scores, value = scores.view(B, T, -1).float(), pooled.view(B, T, k.n_head, -1).float()  # (B, T, h, e)
            if self.length == 0:
                pooled, last = salience_pool(scores.transpose(1, 2), value.transpose(1, 2))  # (B, h, T, e)
                pooled = pooled.transpose(1, 2)
                for kept, new in zip(self.state, last):
                    kept.copy_(new)
            else:
                pooled = salience_step(scores[:, 0], value[:, 0], self.state)  # (B, h, e)
            pooled = pooled.reshape(B * T, -1).to(x.dtype)
        u = self.unit(self.product(pooled, self.out) + x)
        z = k.layer2(F.linear(u, self.layer1, k.layer1.bias).tanh()).view(B, T, -1, 3)
        signals, _ = actuate(z, deviation=False)
        return signals if k.all_active else torch.where(k.active, signals, 1.0)

    def advance(self, n):
        self.length += n
        self.position += n


def sample(logits, chance, temperature, top_k, top_p):
    """
    One token per row: logits (B, V), chance (B,) uniform in [0, 1) -> (B,) int64.

    The distribution is sharpened by the temperature, cut to the top_k likeliest tokens, then to the fewest of them
    that hold top_p of the probability; chance then picks by the inverse of the cumulative distribution.
    """
    if temperature == 0:
        return logits.argmax(-1)
    likely, token = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), falling
    p = ((likely - likely[:, :1]) / temperature).softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # the token that reaches top_p still counts, so one always does
    upto = p.cumsum(-1)
    choice = torch.searchsorted(upto, chance[:, None] * upto[:, -1:], right=True)
    # A GPU sums in an order of its own: what has no probability may seem to add some, and must not be drawn.
    choice = torch.minimum(choice, (p > 0).sum(-1, keepdim=True) - 1)
    return token.gather(-1, choice).squeeze(-1)


def save_file(content, path):
    """torch.save under a temporary name, then renamed: a crash or a full disk leaves the earlier file as it was."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_file(path):
    """The dict in a checkpoint, on the CPU; runs no code from it (weights_only). Raises OSError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}: train one first, or name one that is there")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {type(error).__name__}, the file is "
                         "damaged, cut short, or holds more than tensors and plain values") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no NCN model")
    return content
