"""
Write text with a trained model, and dose its modulators.

    python sample.py --prompt "Once upon a time"
    python sample.py --prompt "Once upon a time" --precision 0.5    # every layer attends more broadly
    python sample.py --prompt "Once upon a time" --control 1,0      # told what the stories' labels told in training
    python sample.py --prompt "Once upon a time" --trace gain       # each token coloured by what the controller did
"""

import argparse
import codecs
import itertools
import math
import os
import re
import signal
import sys
import time

if __name__ == "__main__":  # while torch loads, Ctrl-C just ends the script
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F

from kernels import DEVICE_HELP, DEVICES, actuate, modulate, pick_device, rms_norm, write_cache
from ncn import SIGNALS, ModulatedLM, load_file, salience_pool, salience_step
from prepare import GPT2, PICTURES, command, fail, is_sound, tokenizer_of


# ---- Drawing a token -------------------------------------------------------------------------------------------------
def draw(logits, uniform, temperature, top_k, top_p, gpu=False):
    """One token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64. gpu: by the way that is short there.

    The distribution is sharpened by the temperature, cut to the top_k likeliest tokens, then to the fewest of them
    that hold top_p of the probability; the uniform number then picks by the inverse of the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.size(-1)
    k = min(top_k or V, V)
    likely, token = likeliest(logits, k) if gpu and 32 * k < V else logits.topk(k)  # (B, k), falling
    p = (likely.float() / max(temperature, 1e-30)).softmax(-1)  # lower still, the quotient would overflow
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # the token that reaches top_p still counts, so one always does
        uniform = uniform * p.sum(-1)
    # A GPU sums in an order of its own: what has no probability may seem to add some, and must not be drawn.
    passed = (p.cumsum(-1)[:, :-1] <= uniform[:, None]).logical_and(p[:, 1:])
    return token.gather(-1, passed.sum(-1, keepdim=True)).squeeze(-1)


def likeliest(logits, k):
    """logits.topk(k) in two stages, first in each part of the vocabulary: in a row of 50,257 a GPU finds them by 16
    kernels, in 29 parts of 1,733 by one, and among the parts' by two more."""
    n = logits.size(-1) // next(parts for parts in range(32, 0, -1) if logits.size(-1) % parts == 0)
    likely, at = logits.unflatten(-1, (-1, n)).topk(k, sorted=False)  # (B, parts, k)
    likely, order = likely.flatten(1).topk(k)
    return likely, at.flatten(1).gather(-1, order).add(order // k, alpha=n)


# ---- The decoder -----------------------------------------------------------------------------------------------------
class Decoder:
    """ModulatedLM, one more token at a time: keys, values and the salience state are remembered. Naively, the logits of
    the next token are `model(ids)[:, -1]`, which reads all the text again; a test compares the two at every step.

    A token costs one reading of all weights and, on a CPU, some 5 us per operation, however small. So the steps are
    those of Controller and Block with as few operations as can be. What differs, and what each is worth on 2 CPU cores
    at the paper's sizes (a step without it takes so much longer):
    - a norm's weight is part of the matrix behind it (12%), and so are the factors of GELU (6%);
    - a CPU's matrices lie in parts, input by output: as products with one vector they would use one core (40%), the
      head would be read against its order (120%).
    A GPU's step never waits for the host and reads all slots of the cache with a mask: the same work at every position,
    so that it can be captured as a CUDA graph. Raises NotImplementedError for weights that it does not know."""

    KNOWN = set("""embed.weight position.weight norm.weight controller.query controller.in_proj.weight
        controller.in_proj.bias controller.out_proj.weight controller.out_proj.bias controller.norm.weight
        controller.layer1.weight controller.layer1.bias controller.layer2.weight controller.layer2.bias
        blocks.attn_norm.weight blocks.qkv.weight blocks.attn_out.weight blocks.ffn_norm.weight blocks.ffn_in.weight
        blocks.ffn_in.bias blocks.ffn_out.weight blocks.ffn_out.bias controller.control.weight""".split())

    @torch.no_grad()
    def __init__(self, model, batch, gpu=None):
        c, weight, controller = model.config, model.embed.weight, model.controller
        d, h, device = c.n_embd, c.ncn_heads, weight.device
        if unknown := {re.sub(r"\.\d+\.", ".", name) for name, _ in model.named_parameters()} - self.KNOWN:
            raise NotImplementedError(f"sample.py's Decoder does not know {min(unknown)}: add its step there, too")
        self.model, self.gpu = model, weight.is_cuda if gpu is None else gpu
        self.dtype = weight.dtype if self.gpu else torch.float32  # a CPU is as fast in fp32, and more exact
        self.length = 0  # tokens read, on the host ...
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # ... and on the device
        self.slots = torch.arange(c.block_size, device=device)
        self.places = model.position.weight  # what a step looks up of its place: on a GPU the mask, too
        if self.gpu:
            mask = weight.new_full((c.block_size, c.block_size), -math.inf).triu(1)
            self.places = torch.cat([mask, self.places], dim=1)  # (slots, slots + d)
        self.cache = weight.new_zeros(c.n_layer, batch, 2 * c.n_head, c.block_size, d // c.n_head, dtype=self.dtype)
        self.state = [torch.zeros(batch, h, n, device=device) for n in (1, d // h + 1)]  # see salience_pool
        # x / rms(x) * w is x / sqrt(x . x + d eps) * (sqrt(d) w): the first factor is normalize's, the second folded.
        self.eps, self.ones = torch.tensor((d * 1e-5) ** 0.5), torch.full((d,), d**-0.5, device=device)
        self.parts = 1 if self.gpu else max(16, torch.get_num_threads())
        half = 1.0 if self.gpu else 0.5**0.5  # gelu(x) = (y + y erf(y)) / sqrt(2) with y = x / sqrt(2)

        def fold(linear, norm):
            return linear.weight.to(self.dtype) * (norm.weight * d**0.5)

        self.blocks = [(self.pack(fold(b.qkv, b.attn_norm)), self.pack(b.attn_out.weight),
                        self.pack(fold(b.ffn_in, b.ffn_norm) * half, b.ffn_in.bias * half),
                        self.pack(b.ffn_out.weight * half, b.ffn_out.bias)) for b in model.blocks]
        self.norm, self.head = model.norm.weight.to(self.dtype) * d**0.5, self.pack(weight)
        if controller:  # one product makes what the pooling needs, a head's values, a 1 and its score, in float32
            value, bias = (p.float().chunk(3)[2].unflatten(0, (h, -1)) for p in (controller.in_proj.weight,
                                                                                 controller.in_proj.bias))
            value = torch.cat([value, torch.zeros(h, 1, d, device=device), controller.folded()[:, None]], dim=1)
            self.pool = self.pack(value.flatten(0, 1), F.pad(F.pad(bias, (0, 1), value=1.0), (0, 1)).flatten())
            self.out_proj = self.pack(controller.out_proj.weight, controller.out_proj.bias)
            self.layer1 = fold(controller.layer1, controller.norm), controller.layer1.bias.to(self.dtype)
            self.layer2 = [p.to(self.dtype) for p in controller.layer2.parameters()]

    def pack(self, weight, bias=None):
        """What linear takes of a weight (out, in), a bias (out,). On a CPU (parts, in, n) and (parts, 1, n), n a
        multiple of 16 and out = parts * n, filled up with zeros."""
        if self.gpu:
            return weight, bias, len(weight)
        n = -(-len(weight) // (16 * self.parts)) * 16
        parts = -(-len(weight) // n)
        packed = torch.zeros(parts, weight.size(1), n)
        for part, rows in zip(packed, weight.split(n), strict=True):
            part[:, : len(rows)] = rows.t()
        pad = parts * n - len(weight)
        return packed, None if bias is None else F.pad(bias.float(), (0, pad)).view(parts, 1, n), len(weight)

    def linear(self, x, packed):
        """x (rows, in), packed by pack -> (rows, out)."""
        weight, bias, out = packed
        if self.gpu:
            return F.linear(x, weight, bias)
        rows, x = len(x), x.expand(len(weight), -1, -1)  # (parts, rows, in)
        y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)  # (parts, rows, n)
        y = y.view(1, -1) if rows == 1 else y.transpose(0, 1).flatten(1)
        return y if y.size(1) == out else y[:, :out]

    def normalize(self, x):
        """x (rows, d) -> x / sqrt(x . x + d eps), which is RMSNorm but for the weight that pack has folded in."""
        if self.gpu:
            return rms_norm(x, self.ones)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.eps)

    def compute_signals(self, x, salience, control=None):
        """Controller.forward: x (B, T, d) -> (B, T, L, 3), float32. T > 1 only where nothing was read before."""
        (B, T, d), k, flat = x.shape, self.model.controller, x.flatten(0, 1)
        if salience == "constant":
            u = torch.zeros_like(flat)
        else:
            pool = self.linear(flat.float(), self.pool).view(B, T, k.ncn_heads, -1)  # (B, T, h, e + 2)
            value, score = pool[..., :-2], pool[..., -1:]
            if salience == "causal" and self.length == 0:
                pooled, state = salience_pool(score.squeeze(-1).transpose(1, 2), value.transpose(1, 2))  # (B, h, T, e)
                value = pooled.transpose(1, 2)
                for old, new in zip(self.state, state, strict=True):
                    old.copy_(new)
            elif salience == "causal":
                value = salience_step(score[:, 0], pool[:, 0, :, :-1], self.state)  # (B, h, e)
            u = self.linear(value.reshape(B * T, d).to(x.dtype), self.out_proj) + flat  # Eq. 1, 2
        if control is not None:
            u = u + F.linear(control.to(x.dtype), k.control.weight.to(x.dtype)).view(B * T, d)
        z = F.linear(torch.tanh(F.linear(self.normalize(u), *self.layer1)), *self.layer2)  # Eq. 3
        signals = actuate(z.view(B, T, k.n_layer, 3))  # Eq. 4 to 7
        return signals if k.all_active else torch.where(k.active, signals, 1.0)

    def step(self, ids, salience, edit=None, control=None):
        """Reads ids (B, T), which follow those read before, with their control (B, T, n_control), if any, and returns
        the last one's logits (B, V). T > 1 only as the first step after rewind; ids and control may then have one row
        for all of the batch."""
        model, c, (B, T) = self.model, self.model.config, ids.shape
        place = F.embedding(self.position if self.length else self.slots[:T], self.places)
        x = (model.embed(ids) + place[:, -c.n_embd :]).to(self.dtype)  # (B, T, d)
        if model.controller:
            signals = self.compute_signals(x, salience, control)
            signals = edit(signals) if edit else signals
        else:
            signals = torch.ones(B, T, c.n_layer, 3, device=x.device)
        x = x.view(B * T, -1)
        # The layers' signals and places in the cache, found at once: a few operations instead of a few per layer.
        precision = signals[..., 1].to(x.dtype)[:, None, :, :, None].unbind(3)  # L x (B, 1, T, 1)
        gain, _, gate = (s.unbind(1) for s in signals.reshape(B * T, -1, 3).split(1, -1))  # L x (B * T, 1) each
        end = self.length + T
        new = self.cache[:, :, :, self.length : end].unbind()  # L x (batch, 2 h, T, e)
        seen = self.cache if self.gpu else self.cache[:, :, :, :end]
        keys, values = (s.unbind() for s in seen.chunk(2, dim=2))  # L x (batch, h, slots, e) each
        mask = place[:, : c.block_size] if self.gpu else None  # (1, slots)
        for i, (qkv, attn_out, ffn_in, ffn_out) in enumerate(self.blocks):
            # Block.attention
            qkv = self.linear(self.normalize(x), qkv).view(B, T, 3 * c.n_head, -1).transpose(1, 2)  # (B, 3 h, T, e)
            q, kv = qkv.narrow(1, 0, c.n_head), qkv.narrow(1, c.n_head, 2 * c.n_head)
            q = q * precision[i]  # Eq. 8
            if self.gpu:
                write_cache(keys[i], values[i], *kv.expand(len(keys[i]), -1, -1, -1).chunk(2, dim=1), self.position)
            else:
                new[i].copy_(kv)
            if self.length == 0:  # Eq. 9
                y = F.scaled_dot_product_attention(q, *kv.chunk(2, dim=1), is_causal=True)  # (B, h, T, e)
            else:
                y = F.scaled_dot_product_attention(q, keys[i], values[i], mask)
            x = modulate(self.linear(y.transpose(1, 2).reshape(B * T, -1), attn_out), x, gain[i])  # Eq. 10
            # Block.ffn
            y = self.linear(self.normalize(x), ffn_in)
            y = F.gelu(y) if self.gpu else y.addcmul_(y, y.erf())
            x = modulate(self.linear(y, ffn_out), x, gain[i], gate[i])  # Eq. 11, 12
        self.advance(T)
        x = x.view(B, T, -1)[:, -1]
        return self.linear(model.norm(x) if self.gpu else self.normalize(x) * self.norm, self.head)

    def advance(self, n):
        self.length += n
        self.position += n

    def rewind(self):
        """Forgets all it has read."""
        self.advance(-self.length)


# ---- The stream ------------------------------------------------------------------------------------------------------
def window_start(n, block_size):
    """First of n tokens that the context still holds. When the window is full its last half is kept, at positions from
    0 on, and it fills again; so the start moves once per half window, not once per token."""
    stride = block_size - block_size // 2
    return max(0, -(-(n - block_size) // stride)) * stride


def salience_of(config, asked=None):
    """The mode to generate in: as asked, else as trained, and causal where that was global. Raises ValueError."""
    salience = asked or ("causal" if config.salience == "global" else config.salience)
    if salience not in ("causal", "reactive", "constant"):
        raise ValueError(f"cannot generate with salience '{salience}': choose causal or reactive")
    return salience


def stream(model, ids, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=None, salience=None, edit=None,
           end_token=None, control=None):
    """Yields the next token of each row, (B,) int64, up to max_new_tokens times; prompt ids (B, T) int64, T >= 1.

    temperature 0 is greedy; top_k 0 keeps every token. Row r of seed s draws the same numbers whatever the batch;
    without a seed one is drawn from torch's generator. A row that has drawn end_token goes on yielding it; when all
    have, the stream ends (on a GPU up to 15 tokens later). A model trained with `global` salience generates with
    `causal`: the prefix is all there is. edit changes the signals (B, T, L, 3) before use.
    control: (B, n_control), or (B, T + max_new_tokens, n_control) from token to token. Or a function from the logits of
    a token (B, V) to the control (B, n_control) with which it is read once it is drawn, such as the entropy of the
    prediction, an internal metric; the prompt is then read with zeros.
    On a GPU both functions are captured in a CUDA graph: tensor operations only, no .item().
    Raises ValueError, NotImplementedError."""
    c = model.config
    if ids.dim() != 2 or ids.size(1) == 0:
        raise ValueError("the prompt has no tokens")
    if ids.min() < 0 or ids.max() >= c.vocab_size:
        raise ValueError(f"the prompt has a token id outside the vocabulary of {c.vocab_size}")
    if not (0 <= temperature < math.inf):
        raise ValueError(f"temperature is {temperature}, it must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, it must be in (0, 1]")
    if top_k < 0 or max_new_tokens < 0:
        raise ValueError(f"top_k ({top_k}) and max_new_tokens ({max_new_tokens}) must be 0 or more")
    salience, controls, feed_back = salience_of(c, salience), None, control if callable(control) else None
    if control is not None:  # of every token, also of those to come
        controls = torch.zeros(len(ids), ids.size(1) + max_new_tokens, c.n_control, device=ids.device)
        controls += model.check_control(controls if feed_back else control.detach(), *controls.shape[:2]).to(controls)
        if not controls.isfinite().all():
            raise ValueError("control holds a number that is not finite")
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    return _stream(model, ids, max_new_tokens, temperature, top_k, top_p, seed, salience, edit, end_token, controls,
                   feed_back)


@torch.inference_mode()
def _stream(model, ids, max_new_tokens, temperature, top_k, top_p, seed, salience, edit, end_token, controls,
            feed_back):
    (B, prompt), size = ids.shape, model.config.block_size
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed + row))
                           for row in range(B)], dim=1).to(ids.device)  # (max_new_tokens, B)
    text = torch.cat([ids, ids.new_empty(B, max_new_tokens)], dim=1)
    # On the device, where a captured step finds them: the last token, none yet, and the window's uniform numbers.
    last_token, chance = torch.full_like(ids[:, :1], -1), uniform.new_zeros(size + 1, B)
    last_control = None if controls is None else controls[:, prompt - 1 : prompt].clone()
    shared_prompt = all(bool((x[:, :prompt] == x[:1, :prompt]).all()) for x in (ids, controls) if x is not None)
    decoder, start, graph, warm_ups = Decoder(model, B), -1, None, 2

    def step(new, control):
        """Reads the tokens new (B, T) with their control, draws the next one: everything that happens per token."""
        logits = decoder.step(new, salience, edit, control).expand(B, -1)
        number = chance.index_select(0, decoder.position)[0]
        token = draw(logits, number, temperature, top_k, top_p, decoder.gpu)[:, None]
        if end_token is None:
            last_token.copy_(token)
        else:
            torch.where(last_token == end_token, last_token, token, out=last_token)
        if feed_back:
            last_control.copy_(model.check_control(feed_back(logits), B, 1))

    def captured_step():
        """The same on a GPU: recorded once, then replayed, since all that it reads and writes stays where it is."""
        nonlocal graph
        if graph is None:
            graph, length = torch.cuda.CUDAGraph(), decoder.length
            # With a stream of its own: torch's for capturing belongs to the first GPU that captured anything.
            with torch.cuda.device(ids.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(ids.device)):
                step(last_token, last_control)
            decoder.length = length  # recording moves the host's count, not the device's
        graph.replay()
        decoder.length += 1

    for n in range(prompt, prompt + max_new_tokens):  # n tokens are known
        if window_start(n, size) != start:  # the prompt, or the kept half of a full window, at once
            start = window_start(n, size)
            decoder.rewind()
            numbers = uniform[n - prompt : start + size + 1 - prompt]
            chance[n - start : n - start + len(numbers)] = numbers
            rows = 1 if shared_prompt and n == prompt else B  # samples of one prompt share its pass
            step(*(x if x is None else x[:rows, start:n] for x in (text, controls)))
        elif not decoder.gpu or warm_ups:  # on a GPU two steps as they are: kernels and libraries load
            step(last_token, last_control)
            warm_ups -= decoder.gpu
        else:
            captured_step()
        text[:, n] = last_token[:, 0]
        if feed_back:
            controls[:, n] = last_control[:, 0]
        elif controls is not None:
            last_control.copy_(controls[:, n : n + 1])
        yield text[:, n]
        # Looking at a GPU's result makes the host wait, so there only now and then.
        if end_token is not None and (not decoder.gpu or n % 16 == 0) and (last_token == end_token).all():
            return


def generate(model, ids, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=None, **how):
    """ids (B, T) -> (B, T + n), n <= max_new_tokens: the prompt and what `stream` makes of it; same arguments."""
    new = list(stream(model, ids, max_new_tokens, temperature, top_k, top_p, seed, **how))
    return torch.cat([ids, *(token[:, None] for token in new)], dim=1)


# ---- The command line ------------------------------------------------------------------------------------------------
WARM_UP = 4  # tokens: the prompt's pass; and on a GPU two steps as they are, and the captured one


class Row:
    """One sample: its tokens become text as they come, whole characters only, up to the end of the story."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.text, self.tokens, self.ended = tokenizer, prompt, [], False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """Takes in a token; returns the text it adds."""
        if self.ended:
            return ""
        self.tokens.append(token)
        self.ended = token == self.tokenizer.eot_token
        new = "" if self.ended else self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        self.text += new
        return new


def write(tokens, rows):
    """The samples to standard output, one after the other, the first unfinished one word by word as it is made."""
    current, shown = 0, 0
    for step in tokens:
        for row, token in zip(rows, step.tolist(), strict=True):
            row.add(token)
        while True:
            new = rows[current].text[shown:]
            shown += len(new)
            print(new, end="", flush=any(map(str.isspace, new)))
            if not rows[current].ended or current == len(rows) - 1:
                break
            current, shown = current + 1, 0
            print("\n---")
    print(rows[current].text[shown:] + "".join(f"\n---\n{row.text}" for row in rows[current + 1 :]))


RAMP = 17, 24, 60, 102, 144, 185, 227  # of a terminal's 256 colours: dark blue, grey, yellow (no red beside green)


def paint(text, level):
    """The text on the background of level 0 to 1; the colour ends before a line does, or it would fill the line."""
    step = min(int(level * len(RAMP)), len(RAMP) - 1)
    on, off = f"\x1b[48;5;{RAMP[step]};38;5;{15 if step < 4 else 16}m", "\x1b[0m"
    return on + text.translate(PICTURES).replace("\n", f"{off}\n{on}") + off


def read_again(model, ids, salience, control):
    """The signals with which generation has read the text ids (1, T), window by window -> (T, L, 3)."""
    size = model.config.block_size
    signals = model.signals(ids[:, :size], salience, control)[0]
    while len(signals) < ids.size(1):
        start = window_start(len(signals) + 1, size)
        more = model.signals(ids[:, start : start + size], salience, control)[0, len(signals) - start :]
        signals = torch.cat([signals, more])
    return signals


def write_trace(model, rows, salience, control, dose, signal, layer):
    """The finished samples, each token coloured by the controller's signal when it was read, to a terminal."""
    values, out = [], codecs.getwriter(sys.stdout.encoding)(sys.stdout.buffer, "replace")  # it is to obey the colours
    for row in rows:
        ids = torch.tensor([[row.tokenizer.eot_token, *row.tokens]], device=dose.device)
        its = (read_again(model, ids, salience, control) * dose)[1:, :, SIGNALS.index(signal)]  # (T, L)
        values.append((its.mean(-1) if layer is None else its[:, layer]).tolist())
    low, high = min(map(min, values)), max(map(max, values))
    print(f"{signal}, {'mean of the layers' if layer is None else f'layer {layer}'}: {low:.3f} "
          + "".join(paint("  ", i / len(RAMP)) for i in range(len(RAMP))) + f" {high:.3f} (neutral: 1)\n", file=out)
    for i, (row, its) in enumerate(zip(rows, values, strict=True)):
        again = Row(row.tokenizer, "")
        print("\n---\n" * (i > 0) + "".join(paint(again.add(token), (value - low) / (high - low or 1)) for token, value
                                            in zip(row.tokens, its, strict=True)), end="", file=out)
    print(file=out)


def load_model(path, device):
    """-> the model of a checkpoint, on the device, its tokenizer, the checkpoint. Raises OSError or ValueError."""
    ckpt = load_file(path)
    model = ModulatedLM.from_checkpoint(ckpt, path)
    data = ckpt.setdefault("data", {"tokenizer": "gpt2", "vocab_size": GPT2})  # the authors' is GPT-2's
    tokenizer = tokenizer_of(data) if is_sound(data) else None
    if not tokenizer or tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{path} holds no tokenizer for its model's {model.config.vocab_size} symbols")
    return model.to(device), tokenizer, ckpt


def numbers(text):
    return [float(number) for number in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], usage="%(prog)s --prompt TEXT [flags]",
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    add, default = parser.add_argument_group("the text").add_argument, " (default: %(default)s)"
    add("--prompt", metavar="TEXT", required=True, help="the text to go on with; empty: a story from its beginning")
    add("--ckpt", default="out/ckpt_best.pt", help="a checkpoint of train.py's or of the paper's authors" + default)
    add("--max_new_tokens", type=int, default=256, help="tokens to write at most, per sample" + default)
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; higher: more varied" + default)
    add("--top_k", type=int, default=50, help="draw among this many likeliest tokens; 0: all" + default)
    add("--top_p", type=float, default=1.0, help="draw among the likeliest that hold this probability" + default)
    add("--num_samples", type=int, default=1, help="texts to write" + default)
    add("--seed", type=int, help="same seed, same text; by default another text each time")
    add = parser.add_argument_group("the controller").add_argument
    effects = "how strongly layers write", "how sharply they attend", "how much FFNs add"
    for name, effect in zip(SIGNALS, effects, strict=True):
        add(f"--{name}", type=float, default=1.0, help=f"multiply the {name} of every layer: {effect}" + default)
    add("--control", type=numbers, metavar="X,Y,...",
        help="what the controller is told, a number for each control of the data; 0: nothing (default: all 0). Write "
             "--control=-1,0 where the first is negative")
    add("--trace", choices=SIGNALS, help="colour each token by this signal, once the text is complete; in a terminal "
                                         "with colours only")
    add("--layer", type=int, help="the layer that --trace shows, from 0 (default: the mean of all)")
    add("--salience", choices=("causal", "reactive"),
        help="what the controller sees: the text so far, or one token (the paper's cached inference); by default as "
             "trained, and causal where that was global")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    return parser.parse_args()


@command
def main():
    args = arguments()
    if args.num_samples < 1:
        raise ValueError(f"--num_samples is {args.num_samples}, it must be at least 1")
    doses = [getattr(args, name) for name in SIGNALS]
    if not all(0 <= dose <= 1e6 for dose in doses):
        raise ValueError("--gain, --precision and --gate must be 0 or more, up to 1e6")  # far above, sums overflow
    device = pick_device(args.device)
    model, tokenizer, ckpt = load_model(args.ckpt, device)
    if (doses != [1, 1, 1] or args.trace) and not model.controller:
        raise ValueError(f"{args.ckpt} has no controller to dose or to trace: it was trained with --signals none")
    if args.layer is not None and not 0 <= args.layer < model.config.n_layer:
        raise ValueError(f"--layer is {args.layer}, the model has layers 0 to {model.config.n_layer - 1}")
    names = ckpt["data"].get("controls", ())
    if args.control and len(args.control) != model.config.n_control:
        raise ValueError(f"--control has {len(args.control)} numbers, {args.ckpt} takes {model.config.n_control}"
                         + ": " * bool(names) + ", ".join(names))
    salience, dose = salience_of(model.config, args.salience), torch.tensor(doses, device=device)
    # In training every story follows the end of another one: the same mark says here that a story begins.
    prompt = tokenizer.encode_ordinary(args.prompt)
    ids = torch.tensor([[tokenizer.eot_token, *prompt]] * args.num_samples, device=device)
    control = args.control and torch.tensor([args.control], device=device)  # (1, n_control)
    start, edit = time.perf_counter(), None if doses == [1, 1, 1] else lambda signals: signals * dose
    tokens = stream(model, ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, salience,
                    edit, tokenizer.eot_token, control if control is None else control.expand(len(ids), -1))
    begun = list(itertools.islice(tokens, WARM_UP))
    if begun:
        begun[-1].tolist()  # waits for a GPU
    warm, tokens = time.perf_counter(), itertools.chain(begun, tokens)
    if args.trace and sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ:
        os.system("")  # lets an older Windows console understand colours
        rows, tokens = [Row(tokenizer, "") for _ in ids], list(tokens)
        for step in [*ids.t()[1:], *tokens]:
            for row, token in zip(rows, step.tolist(), strict=True):
                row.add(token)
        end = time.perf_counter()
        write_trace(model, rows, salience, control, dose, args.trace, args.layer)
        counts = [len(row.tokens) - len(prompt) for row in rows]
    else:
        rows = [Row(tokenizer, args.prompt) for _ in ids]
        write(tokens, rows)
        end, counts = time.perf_counter(), [len(row.tokens) for row in rows]
    count, later = sum(counts), sum(max(0, n - WARM_UP) for n in counts)
    print(f"{count} tokens in {end - start:.2f} s: {count / (end - start):.0f} tokens/s"
          + f", after the first {WARM_UP} {later / (end - warm):.0f} tokens/s" * (later > 0), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
