"""
Neuromodulatory Control Networks (NCN), the whole model in one file; the operations it fuses are in kernels.py.

A Transformer computes the same way for every token. A brain does not: a few small nuclei broadcast noradrenaline,
acetylcholine or dopamine, and the same circuits become more sensitive, more focused, more active. Here a small
controller network reads the token embeddings and emits, for every token and every layer, three numbers:

    gain       g      in (0, 2)     how strongly the layer's two branches write into the residual stream
    precision  beta   in (0.01, 4]  inverse temperature of the layer's attention: how sharply it focuses
    gate       gamma  in (0, 1)     how much of the feed-forward branch (FFN) is let through

A signal of 1 leaves the Transformer as it is. Read from the top: config, controller, salience pooling, block, model and
loss, files. Generation is in sample.py. "Eq." and "section" refer to the paper, "Neuromodulatory Control Networks"
(M. C. Morgan, 2025). Shapes: B sequences, T tokens, width d, L layers, vocabulary V; h heads of width e = d / h, the
blocks' n_head or, in the controller, ncn_heads.

Worth noticing:
- Causal salience: at position t the controller sees tokens 0..t, so training and generation compute the same numbers.
  The paper trains with the whole sequence in view (`global`) and generates with one token (`reactive`); both are here.
- The salience cache, future work in the paper: the controller's O(1) time and memory per generated token.
- The model starts close to the plain Transformer: gain and precision at 1, the gate at 0.953, since no sigmoid is 1.
- Static and modulated models of the same seed start from the same base weights, so that runs compare pair by pair.
"""

import math
import os
import zipfile
import zlib
from collections import namedtuple
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import actuate, linear_cross_entropy, modulate, rms_norm

SIGNALS = ("gain", "precision", "gate")
SALIENCE = ("causal", "global", "reactive", "constant")

# ---- Config ----------------------------------------------------------------------------------------------------------
@dataclass
class NCNConfig:
    """The model's settings; sizes default to the paper's run. Raises ValueError where they contradict each other."""

    vocab_size: int = 50257  # tokens the model knows
    block_size: int = 512  # context length, in tokens
    n_layer: int = 6  # Transformer blocks
    n_head: int = 8  # attention heads per block
    n_embd: int = 256  # width d of the residual stream
    dropout: float = 0.1  # on embeddings and branch outputs; fast attention kernels have none on the probabilities
    ncn_hidden: int = 64  # hidden width of the controller
    ncn_heads: int = 2  # heads of the controller's salience pooling
    homeostatic_lambda: float = 0.01  # of Eq. 18: weight of (s - 1)^2, the three added up, mean over layers, tokens
    signals: tuple = SIGNALS  # which signals the controller drives; () is the plain, "static" Transformer
    salience: str = "causal"  # tokens the salience pooling sees: causal 0..t, global all, reactive t, constant none
    n_control: int = 0  # numbers that the controller reads beside the text: a task, a metric, a slider; 0: none
    n_ffn: int = 0  # hidden width of the FFN; 0: 4 n_embd. Wider: a static model with a controller's parameters

    def __post_init__(self):
        if unknown := set(self.signals) - set(SIGNALS):
            raise ValueError(f"unknown signal '{min(unknown)}': choose from {', '.join(SIGNALS)}, or none of them")
        self.signals = tuple(name for name in SIGNALS if name in self.signals)
        check_salience(self.salience)
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "ncn_hidden", "ncn_heads"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} is {size}, it must be a whole number, at least 1")
        for name in ("n_head", "ncn_heads"):
            if self.n_embd % getattr(self, name):
                raise ValueError(f"n_embd {self.n_embd} is not divisible by {name} {getattr(self, name)}")
        if self.block_size < 2:  # when the window is full, generation drops its older half
            raise ValueError(f"block_size is {self.block_size}, it must be at least 2")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it must be in [0, 1)")
        for name in ("homeostatic_lambda", "n_control", "n_ffn"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be 0 or more")
        if self.n_control and not self.signals:
            raise ValueError(f"n_control is {self.n_control}, but a model without signals has no controller to read a "
                             "control: give it signals, or data without labels")

    def n_weights(self):
        """How many weights the matrices have, nearly all of the model's: known before they take memory."""
        d, h, L = self.n_embd, self.ncn_hidden, self.n_layer
        controller = 4 * d * d + d * (1 + h + self.n_control) + 3 * L * h if self.signals else 0
        return d * (self.vocab_size + self.block_size) + L * (4 * d * d + 2 * d * (self.n_ffn or 4 * d)) + controller


def check_salience(mode):
    if mode not in SALIENCE:
        raise ValueError(f"unknown salience mode '{mode}': choose from {', '.join(SALIENCE)}")


# ---- Controller ------------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, eps 1e-5 (Zhang & Sennrich 2019)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return rms_norm(x, self.weight)


class Controller(nn.Module):
    """The neuromodulatory nuclei: embeddings in, three signals per token and layer out.

    Tonic context c (what kind of text is this?) by salience pooling, phasic input x (what is this token?), if asked for
    a control from outside (what is wanted?), and a small MLP over their sum that decides, for each layer, how to
    process the token."""

    def __init__(self, config):
        super().__init__()
        d, self.ncn_heads, self.n_layer = config.n_embd, config.ncn_heads, config.n_layer
        self.query = nn.Parameter(torch.empty(1, d))  # the learned salience query, the "top-down attentional set"
        self.in_proj = nn.Linear(d, 3 * d)  # query, key and value of a standard multi-head attention
        self.out_proj = nn.Linear(d, d)
        self.control = nn.Linear(config.n_control, d, bias=False) if config.n_control else None  # section 3.2
        self.norm = RMSNorm(d)
        self.layer1 = nn.Linear(d, config.ncn_hidden)
        self.layer2 = nn.Linear(config.ncn_hidden, self.n_layer * 3)
        self.register_buffer("active", torch.tensor([name in config.signals for name in SIGNALS]), persistent=False)
        self.all_active = len(config.signals) == len(SIGNALS)

    def start_neutral(self):
        """Section 4.1.4: bias z so that gain = 1, precision = 1, gate = 0.953. After all other initialisation."""
        with torch.no_grad():
            self.layer2.weight.mul_(0.01)  # small: the signals start at the biases' values, yet can learn
            self.layer2.bias.copy_(torch.tensor([0.0, 0.525, 3.0]).repeat(self.n_layer))

    def forward(self, x, salience, control=None):
        """x (B, T, d), what the blocks get -> the signals (B, T, L, 3), float32, in the order of SIGNALS.
        control: (B, 1 or T, n_control); none is a control of zeros."""
        check_salience(salience)
        if salience == "constant":  # the MLP gets no input: three learned numbers per layer, the same for every token
            u = x.new_zeros(1, 1, x.size(-1))
        else:
            u = self.context(x, salience) + x  # Eq. 2; Eq. 13 says it for all tokens at once. (B, T, d)
        if control is not None:
            u = u + self.control(control.to(self.control.weight.dtype))
        return self.compute_signals(u).expand(*x.shape[:2], -1, -1)

    def context(self, x, salience):
        """Salience pooling, Eq. 1: c = Attention(query, x, x). x (B, T, d) -> (B, T, d), or (B, 1, d) for `global`."""
        value = F.linear(x, self.in_proj.weight.chunk(3)[2], self.in_proj.bias.chunk(3)[2])  # (B, T, d)
        if salience == "reactive":
            return self.out_proj(value)  # a softmax over a single token is 1
        with torch.autocast(x.device.type, enabled=False):  # scores are exponentiated: always in float32
            scores = F.linear(x.float(), self.folded()).transpose(1, 2)  # (B, h, T)
            value = value.unflatten(-1, (self.ncn_heads, -1)).transpose(1, 2).float()  # (B, h, T, e)
            if salience == "global":
                pooled = scores.softmax(-1)[:, :, None] @ value  # (B, h, 1, e): every token sees the future
            else:
                pooled, _ = salience_pool(scores, value)  # (B, h, T, e): token t sees tokens 0..t
        return self.out_proj(pooled.transpose(1, 2).flatten(2).to(x.dtype))

    def folded(self):
        """The salience scores as one small product. -> weight (h, d), float32: scores = x @ weight.T.

        Unfolded, a head's score of token i is  q . k_i / sqrt(e)  with  q = Wq query + bq  and  k_i = Wk x_i + bk.
        One query serves all tokens, so  q . k_i = (Wk^T q) . x_i + q . bk:  a (d, h) product replaces a (d, d) one; and
        q . bk is the same for every token, so that the softmax does not see it."""
        (wq, wk, _), (bq, _, _) = self.in_proj.weight.float().chunk(3), self.in_proj.bias.float().chunk(3)
        q = F.linear(self.query.float(), wq, bq).view(self.ncn_heads, 1, -1)  # (h, 1, e)
        weight = q @ wk.unflatten(0, (self.ncn_heads, -1))  # (h, 1, e) @ (h, e, d) = (h, 1, d)
        return weight.squeeze(1) / math.sqrt(q.size(-1))

    def compute_signals(self, u):
        """Tonic + phasic, u (..., d) -> signals (..., L, 3), float32."""
        z = self.layer2(torch.tanh(self.layer1(self.norm(u))))  # Eq. 3; Eq. 14 for all tokens at once. (..., 3 L)
        z = z.unflatten(-1, (self.n_layer, 3))  # Eq. 4, (..., L, 3)
        # Table 1, the signals:   gain       g     = 2 sigmoid(z[..., 0])                      Eq. 5
        #                         precision  beta  = min(softplus(z[..., 1]) + 0.01, 4)        Eq. 6
        #                         gate       gamma = sigmoid(z[..., 2])                        Eq. 7
        signals = actuate(z)
        return signals if self.all_active else torch.where(self.active, signals, 1.0)  # the others stay at 1


# ---- Salience pooling and its cache ----------------------------------------------------------------------------------
def salience_pool(scores, values, chunk=32):
    """The causal context: at each t, an average of the values so far, weighted by a softmax over the scores so far.
    scores (B, h, T), values (B, h, T, e), float32 -> pooled (B, h, T, e), and the state that continues it. Naively:

        later = torch.ones(T, T, dtype=torch.bool).triu(1)                                  # i > t
        weight = scores[:, :, None].expand(-1, -1, T, -1).masked_fill(later, -math.inf).softmax(-1)
        pooled = weight @ values                                                            # (B, h, T, e)

    A token has one score, whoever looks at it, so no (T, T) matrix is needed: the average over 0..t is a sum of
    exp(score_i) values_i over a sum of exp(score_i), and sums over a prefix can be had by n chunks of C tokens. In the
    chunk of t each token counts by itself; of an earlier chunk only its maximum and its sums. Every exponent is a
    score, or a chunk's maximum, minus a maximum that already covers it, so never above 0, and that of the largest score
    is 0: nothing overflows and no sum is 0, for any finite scores.

    The state after the last token: the maximum (B, h, 1) and the sums (B, h, e + 1), the weighted values' and, last,
    the weights'; views: copy what you keep."""
    T = scores.size(-1)
    n = -(-T // chunk)
    pad = n * chunk - T
    s = F.pad(scores, (0, pad), value=-math.inf).unflatten(-1, (n, chunk))  # (B, h, n, C)
    v = F.pad(values, (0, 1, 0, pad), value=1.0).unflatten(-2, (n, chunk))  # (B, h, n, C, e + 1): its last sum is total
    # The maxima set the scales of sums whose quotient is taken: they cancel, and need no gradient.
    top = s.detach().flatten(-2).cummax(-1).values.unflatten(-1, (n, chunk))  # (B, h, n, C), over all of 0..t
    peak = s.detach().amax(-1)  # (B, h, n), of each chunk
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=s.device).triu(1)
    within = (s[..., None, :] - top[..., None]).masked_fill(later, -math.inf).exp()  # (B, h, n, C, C): [t, i]
    weight = (s - peak[..., None]).exp()  # (B, h, n, C)
    chunk_sums = (weight[..., None, :] @ v).squeeze(-2)  # (B, h, n, e + 1)
    not_before = torch.ones(n, n, dtype=torch.bool, device=s.device).triu()[:, None]
    before = (peak[..., None, None, :] - top[..., None]).masked_fill(not_before, -math.inf).exp()  # (B, h, n, C, n)
    sums = (within @ v + before @ chunk_sums[:, :, None]).flatten(2, 3)[:, :, :T]  # (B, h, T, e + 1)
    return sums[..., :-1] / sums[..., -1:], [top.flatten(2)[:, :, T - 1 : T], sums[:, :, -1]]


def salience_step(score, value, state):
    """The salience cache: one more token at constant cost. score (B, h, 1), value (B, h, e + 1), its last element a 1,
    state as salience_pool leaves it, updated in place -> pooled (B, h, e). With top_t the maximum so far, keep

        total_t    = sum_i exp(score_i - top_t)          = r total_{t-1}    + exp(score_t - top_t)
        weighted_t = sum_i exp(score_i - top_t) value_i  = r weighted_{t-1} + exp(score_t - top_t) value_t
        pooled     = weighted_t / total_t                  with r = exp(top_{t-1} - top_t)

    When the maximum rises, what was summed is rescaled: the online softmax, as the kernel of the loss runs it."""
    top, sums = state
    both = torch.cat([top, score], -1)
    old, new = (both - torch.amax(both, -1, keepdim=True, out=top)).exp().split(1, -1)
    sums.mul_(old).addcmul_(new, value)
    return sums[..., :-1] / sums[..., -1:]


# ---- Block -----------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A pre-norm Transformer block whose attention, branches and FFN the controller modulates."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        n_ffn = config.n_ffn or 4 * d
        self.attn_norm = RMSNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ffn_norm = RMSNorm(d)
        self.ffn_in = nn.Linear(d, n_ffn)
        self.ffn_out = nn.Linear(n_ffn, d)

    def attention(self, x, precision):
        """x (B, T, d), precision (B, T, 1) or None -> (B, T, d)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, h, T, e) each
        if precision is not None:  # beta sharpens or flattens; keys stay as they are, so they can be cached
            q = q * precision[:, None].to(q.dtype)  # Eq. 8
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # Eq. 9, (B, h, T, e)
        return self.attn_out(y.transpose(1, 2).flatten(2))

    def ffn(self, x):
        """x (B, T, d) -> (B, T, d); the gate of Eq. 12 is applied by add."""
        return self.ffn_out(F.gelu(self.ffn_in(x)))

    def add(self, x, branch, gain, gate=None):
        """x + gain * gate * branch: a branch (B, T, d) joins the residual stream x, scaled by its signals (B, T, 1); no
        gate is a gate of 1, no gain the plain Transformer."""
        branch = F.dropout(branch, self.dropout, self.training)
        if gain is None:
            return x + branch
        # Backward, the branch's weights get their gradient times the same factor: Eq. 17, "gradient shielding".
        return modulate(branch, x, gain, gate)

    def forward(self, x, signals=None):
        """x (B, T, d), this layer's signals (B, T, 3) or None for the plain Transformer -> (B, T, d)."""
        gain, precision, gate = (None,) * 3 if signals is None else signals.split(1, dim=-1)  # (B, T, 1) each
        x = self.add(x, self.attention(self.attn_norm(x), precision), gain)  # Eq. 10
        return self.add(x, self.ffn(self.ffn_norm(x)), gain, gate)  # Eq. 11, with the gate of Eq. 12


# ---- Model and loss --------------------------------------------------------------------------------------------------
Loss = namedtuple("Loss", "total task homeostatic")


class ModulatedLM(nn.Module):
    """A Transformer language model and the controller that modulates it, trained as one."""

    def __init__(self, config):
        super().__init__()
        seed = int(torch.randint(2**31, ()))  # drawn before anything that differs between variants
        self.config = config
        self.checkpoint_blocks = False  # see hidden
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: the two are tied
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.controller = Controller(config) if config.signals else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.init_weights(seed)

    def init_weights(self, seed):
        """Normal weights of variance 1 / inputs, sinusoidal positions, a neutral controller."""
        # Each matrix draws from a generator of its own, named after it: what a variant adds changes nothing elsewhere.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                std = p.size(1) ** -0.5  # 1 / sqrt(inputs) keeps the variance; the embedding counts as the head
                if name.endswith(("attn_out.weight", "ffn_out.weight")):  # as in GPT-2, whatever the depth
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))
        # The position embeddings are learned, but start as sinusoids (Vaswani et al. 2017) of the same size: "the token
        # before" is then one rotation for all positions. On the demo stories that saves a tenth of the steps.
        T, d = self.position.weight.shape
        phase = torch.arange(T)[:, None] * 1e-4 ** torch.linspace(0, 1, -(-d // 2))
        with torch.no_grad():
            self.position.weight.copy_((2 / d) ** 0.5 * torch.cat([phase.sin(), phase.cos()], dim=1)[:, :d])
        if self.controller:
            self.controller.start_neutral()

    def embeddings(self, ids):
        """ids (B, T) -> (B, T, d): what the blocks get and the controller reads."""
        if ids.size(1) > self.config.block_size:
            raise ValueError(f"{ids.size(1)} tokens do not fit into block_size {self.config.block_size}")
        x = self.embed(ids) + self.position.weight[: ids.size(1)]
        return F.dropout(x, self.config.dropout, self.training)

    def check_control(self, control, B, T):
        """A control (B, n_control) or (B, T, n_control) -> (B, 1 or T, n_control), None -> None. Raises ValueError."""
        if control is None:
            return None
        if not (n := self.config.n_control):
            raise ValueError("this model takes no control: its n_control is 0")
        if tuple(control.shape) not in ((B, n), (B, T, n)):
            raise ValueError(f"control has shape {tuple(control.shape)}, it must be {(B, n)} or {(B, T, n)}")
        return control[:, None] if control.dim() == 2 else control

    def hidden(self, ids, salience=None, edit=None, control=None):
        """ids (B, T) -> the last hidden state (B, T, d), and the signals (B, T, L, 3), None without a controller."""
        x, control = self.embeddings(ids), self.check_control(control, *ids.shape)  # (B, T, d), (B, 1 or T, n_control)
        signals, per_layer = None, [None] * self.config.n_layer
        if self.controller:  # backward, the controller learns through every signal at once: Eq. 16
            signals = self.controller(x, salience or self.config.salience, control)  # (B, T, L, 3)
            per_layer = (edit(signals) if edit else signals).unbind(2)  # L x (B, T, 3)
        for block, s in zip(self.blocks, per_layer, strict=True):
            if self.checkpoint_blocks and self.training:  # keep a block's input only, and compute it again in backward
                x = checkpoint(block, x, s, use_reentrant=False)
            else:
                x = block(x, s)
        return self.norm(x), signals

    def forward(self, ids, targets=None, salience=None, edit=None, control=None):
        """ids (B, T) int64 -> logits (B, T, V); with targets (B, T) int64, of which negative ones are ignored, a Loss
        instead: total = task + homeostatic, in nats per token (float32 scalars). Raises ValueError if T > block_size.
        control: (B, n_control), or (B, T, n_control) from token to token; none is a control of zeros.

        salience overrides the config's mode. edit, a function from signals (B, T, L, 3) to signals, changes them
        before use: to dose a modulator or to pin it. The homeostatic loss is that of the unedited signals."""
        x, signals = self.hidden(ids, salience, edit, control)
        if targets is None:
            return F.linear(x, self.embed.weight)
        task = linear_cross_entropy(x, self.embed.weight, targets)  # forms the gradients in the same pass
        homeostatic = task.new_zeros(())
        if signals is not None:
            penalty = (signals - 1).square().sum(-1).mean(-1)  # (B, T): sum over the three signals, mean over layers
            counted = targets >= 0  # padding has no task, so it has no price
            penalty = (penalty * counted).sum() / counted.sum().clamp(min=1)
            homeostatic = self.config.homeostatic_lambda * penalty  # Eq. 18
        return Loss(task + homeostatic, task, homeostatic)  # Eq. 19; Eq. 15 says the same

    @torch.no_grad()
    def signals(self, ids, salience=None, control=None):
        """ids (B, T) -> (B, T, L, 3) float32: gain, precision, gate. All ones without a controller. In eval mode."""
        control = self.check_control(control, *ids.shape)
        if not self.controller:
            return torch.ones(*ids.shape, self.config.n_layer, 3, device=ids.device)
        return self.controller(self.embeddings(ids), salience or self.config.salience, control)

    # ---- Files -------------------------------------------------------------------------------------------------------

    def save(self, path, **more):
        """Writes config, weights and `more` (tensors, plain values). Raises OSError; FloatingPointError for a NaN."""
        content = {"config": asdict(self.config), "model": self.state_dict(), **more}
        if not all_finite(content):
            raise FloatingPointError(f"cannot save {path}: the weights are not finite")
        write_file(path, lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path):
        """The model of a checkpoint, ours or the paper authors', on the CPU. Raises OSError or ValueError."""
        return cls.from_checkpoint(load_file(path), path)

    @classmethod
    def from_checkpoint(cls, ckpt, path="checkpoint"):
        """As load, from the dict that load_file returns; path only serves the error message."""
        try:
            if "embed.weight" in (state := ckpt.get("model", {})):
                config = NCNConfig(**ckpt["config"])
                sizes = [t.untyped_storage().nbytes() for t in state.values() if t.is_floating_point()]
                if len(sizes) < len(state) or config.n_weights() > sum(sizes):
                    raise ValueError("fewer weights than its config says")
                model = cls(config)
                model.load_state_dict(state)
            else:
                state, config = ckpt.get("model_state_dict", ckpt), ckpt.get("config")
                config = config if isinstance(config, dict) else {}
                model = cls.from_reference(state, config.get("nhead", 8), config.get("ncn_heads", 2))
            if not all_finite(model.state_dict()):
                raise ValueError("weights that are not finite")
            return model.eval()
        except Exception as error:  # a dict of anything at all can come out of a file
            raise ValueError(f"{path} holds no NCN model: {type(error).__name__}, {error}".splitlines()[0]) from None

    @classmethod
    def from_reference(cls, state_dict, n_head=8, ncn_heads=2, salience="global"):
        """The model of the paper authors' own state dict (`transformer_layers.0.self_attn.q_proj.weight`, ...)."""
        s = {name.removeprefix("module."): t for name, t in state_dict.items()}
        layers = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("transformer_layers."))
        vocab_size, d = s["token_embeddings.weight"].shape
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
        model = cls(NCNConfig(vocab_size, s["position_embeddings.weight"].size(0), layers, n_head, d,
                              ncn_hidden=s["ncn.layer1.weight"].size(0), ncn_heads=ncn_heads, salience=salience))
        model.load_state_dict(ours)
        return model.eval()


def all_finite(content):
    """Whether no tensor in content, dicts of dicts of them, holds a NaN or an infinite number."""
    if isinstance(content, dict):
        return all(map(all_finite, content.values()))
    return not isinstance(content, torch.Tensor) or bool(content.isfinite().all())


def has_form(found, like):
    """Whether found, from a file, is like `like`: a dict with its keys, a finite tensor of its shape, of its type."""
    if isinstance(like, dict):
        return isinstance(found, dict) and all(key in found and has_form(found[key], like[key]) for key in like)
    if isinstance(like, torch.Tensor):
        return isinstance(found, torch.Tensor) and all_finite(found) and (
            found.shape, found.dtype, found.is_contiguous()) == (like.shape, like.dtype, True)
    return type(found) is type(like)


def write_file(path, write):
    """Calls write(file) on a file under a temporary name, then renames it: whatever goes wrong, the earlier file stays
    as it was. Raises OSError."""
    part = f"{path}.part"
    try:
        if os.path.lexists(part):  # a crash has left it; or it is a link, and leads to another file
            os.remove(part)
        with open(part, "xb") as file:
            write(file)
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
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load compares no checksums
            raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {type(error).__name__}, the file is "
                         "damaged, cut short, or holds more than tensors and plain values") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no NCN model")
    return content


# ---- A demonstration: `python ncn.py` --------------------------------------------------------------------------------
@torch.no_grad()
def main():
    """Prints what the README's tour explains: sizes, the start, the leak, the salience cache, four tokens by hand."""
    torch.manual_seed(0)
    model, ids = ModulatedLM(NCNConfig()).eval(), torch.randint(50257, (1, 64))
    print("1. Parameters at the paper's sizes")
    for name, part in (*model.named_children(), ("all", model)):
        count, total = (sum(p.numel() for p in m.parameters()) for m in (part, model))
        print(f"   {name:12}{count:>12,}{count / total:8.2%}")
    start = zip(SIGNALS, model.signals(ids).mean((0, 1, 2)), strict=True)
    print("2. Signals at step 0:", *(f"{name} {mean:.4f}" for name, mean in start))

    nn.init.normal_(model.controller.layer2.weight)  # as if it had learned, since a new controller hardly moves
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 50257], dim=1)
    print("3. One changes the last token. How far do the logits of the tokens before it move?")
    for mode in SALIENCE:
        leak = (model(ids, salience=mode) - model(other, salience=mode))[:, :-1].abs().max().item()
        print(f"   {mode:12}{leak:.6f}" + "  it sees the future" * (leak > 1e-4))

    scores, values = 9 * torch.randn(1, 2, 600), torch.randn(1, 2, 600, 128)  # (B, h, T), (B, h, T, e)
    pooled, _ = salience_pool(scores, values)  # all tokens at once
    _, state = salience_pool(scores[:, :, :1], values[:, :, :1])  # the first token, then 599 more, one by one
    with_1 = F.pad(values, (0, 1), value=1.0)
    steps = [salience_step(scores[:, :, t : t + 1], with_1[:, :, t], state) for t in range(1, 600)]  # (B, h, e) each
    apart, size = (pooled[:, :, 1:] - torch.stack(steps, dim=2)).abs().max(), sum(x.numel() for x in state)
    print(f"4. Salience cache against pool, 600 tokens: largest difference {apart:.0e}, state {size} numbers")

    print("5. Four tokens by hand. Salience exp(score) 1, 2, 1, 4 and value 1, 4, 7, 2:")
    score, value = torch.tensor([1.0, 2.0, 1.0, 4.0]).log(), torch.tensor([1.0, 4.0, 7.0, 2.0])
    pooled, _ = salience_pool(score.view(1, 1, 4), value.view(1, 1, 4, 1))
    print("   context 1/1, 9/3, 16/4, 24/8      =", *(f"{x:.0f}" for x in pooled.flatten()))
    gain, precision, gate = actuate(torch.tensor([[math.log(3), math.log(math.exp(1.99) - 1), math.log(3)]]))[0]
    print(f"   signals 2 * 3/4, 1.99 + 0.01, 3/4 = {gain:.2f} {precision:.2f} {gate:.2f}")
    q, k, v = torch.tensor([[1.0]]), torch.tensor([0.0, 0, 0, math.log(3)]), torch.tensor([0.0, 0, 0, 12])
    plain, sharp = (F.scaled_dot_product_attention(beta * q, k[:, None], v[:, None]) for beta in (1, precision))
    x = modulate(sharp, torch.ones(1, 1), gain.view(1, 1))  # Eq. 10
    y = modulate(torch.full((1, 1), 4.0), x, gain.view(1, 1), gate.view(1, 1))  # Eq. 11, 12, where the FFN says 4
    print(f"   attention 12 * 3/6, sharper 9/12  = {plain.item():.2f} {sharp.item():.2f}\n"
          f"   block 1 + 1.5 * 9, + 1.5 * 3/4 * 4 = {x.item():.2f} {y.item():.2f}")


if __name__ == "__main__":
    main()
