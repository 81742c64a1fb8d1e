"""
Write text with a trained model, and dose its modulators.

    python sample.py --prompt "Once upon a time"
    python sample.py --prompt "Once upon a time" --precision 0.5    # layers attend more broadly
    python sample.py --prompt "Once upon a time" --control 1,0      # the labels' numbers
    python sample.py --prompt "Once upon a time" --trace gain       # colours show the controller
"""

import argparse
import codecs
import copy
import functools
import math
import os
import platform
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import DEVICE_HELP, DEVICES, pick_device
from ncn import SIGNALS, Memory, ModulatedLM, load_file
from prepare import command, complain, prompt_tokens, tokenizer_of


# ---- Drawing a token ---------------------------------------------------------------------------
def draw(logits, uniform, temperature=0.8, top_k=50, top_p=1.0):
    """One token per row: logits (B, V), uniform (B,) in [0, 1) -> (B,) int64.

    The distribution is sharpened by the temperature (0: the likeliest token), cut to the top_k
    likeliest tokens (0: all), then to the fewest of them that hold top_p of the probability. The
    uniform number picks by the inverse of the cumulative distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    k = logits.size(-1)
    if 0 < top_k < k:
        k = top_k
    likeliest, tokens = logits.topk(k)  # (B, k), falling
    p = (likeliest.float() / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1:
        before = p.cumsum(-1) - p
        p = p * (before < top_p)  # the token that reaches top_p still counts, so one always does
    cumulative = p.cumsum(-1)
    passed = cumulative[:, :-1] <= uniform[:, None] * cumulative[:, -1:]
    passed &= p[:, 1:] > 0  # a sum's rounding must not lead to a token without probability
    return tokens.gather(-1, passed.sum(-1, keepdim=True)).squeeze(-1)


# ---- A CPU's matrices --------------------------------------------------------------------------
class PackedLinear(nn.Module):
    """Stands in for nn.Linear on an AMD CPU: the same result, and sooner for few rows.

    Reading the weight then takes nearly all the time, and torch's product (Intel's MKL) reads it
    slowly on these CPUs. So it is stored in parts, input by output, and each core reads
    parts of its own from beginning to end: up to twice the tokens/s on 2 cores."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = weight  # (out, in); the salience pooling reads weight and bias themselves
        self.bias = bias
        self.n_out = len(weight)
        width = math.ceil(self.n_out / 256) * 16  # outputs of a part: of at most 16 parts
        parts = math.ceil(self.n_out / width)
        padding = (0, parts * width - self.n_out)
        filled = F.pad(weight.detach(), (0, 0, *padding))
        self.packed = filled.unflatten(0, (parts, width)).mT.contiguous()  # (parts, in, width)
        if bias is None:
            bias = weight.new_zeros(self.n_out)
        self.packed_bias = F.pad(bias.detach(), padding).view(parts, 1, width)

    def forward(self, x):
        rows = x.reshape(1, -1, x.size(-1)).expand(len(self.packed), -1, -1)  # (parts, N, in)
        y = torch.baddbmm(self.packed_bias, rows, self.packed)  # (parts, N, width)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)[..., : self.n_out]


@functools.cache
def is_amd():
    """Whether the CPU is one of AMD's, by what Linux or Windows says of it."""
    description = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            description = file.read()
    return "AuthenticAMD" in description


def for_generation(model):
    """A copy of the model in eval mode. It shares the weights; an AMD's get packed copies, too."""
    # deepcopy's memo: what is in it counts as copied, so it is shared.
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    model = copy.deepcopy(model, shared).eval()
    if model.embed.weight.device.type == "cpu" and is_amd():
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child.weight, child.bias))
        model.logits = PackedLinear(model.embed.weight).forward
    return model


# ---- The stream --------------------------------------------------------------------------------
def check_settings(max_new_tokens, temperature, top_k, top_p):
    """Raises ValueError for what stream cannot work with."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, it must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, it must be in (0, 1]")
    if top_k < 0 or max_new_tokens < 0:
        raise ValueError(f"top_k ({top_k}) and max_new_tokens ({max_new_tokens}) must be 0 or more")


def captured(step, memory, *inputs):
    """-> a function like step for one token per row, recorded once as a CUDA graph, then replayed.

    A step launches some 300 small kernels, and a GPU runs them in less time than Python takes to
    launch them. All that the step reads and writes must stay where it is."""
    device = memory.position.device
    length = memory.length
    graph = torch.cuda.CUDAGraph()
    # A stream of its own, since torch's for capturing belongs to the first GPU that captured.
    # The mode lets other threads of torch allocate meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = step(*inputs)
    memory.length = length  # recording has moved the host's count, not the device's
    signals = memory.signals

    def replay(*new):
        for old, value in zip(inputs, new, strict=True):
            old.copy_(value)
        graph.replay()
        memory.length += 1
        memory.signals = signals  # the graph's, also after a step outside it has set others
        return output
    return replay


def uniform_numbers(seed, rows, count, device):
    """(count, rows) numbers in [0, 1): row r depends on seed + r alone, whatever the other rows."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    columns = [torch.rand(count, generator=generator) for generator in generators]
    return torch.stack(columns, dim=1).to(device)


@torch.inference_mode()
def stream(model, ids, max_new_tokens, temperature=0.8, top_k=50, top_p=1.0, seed=None,
           salience=None, edit=None, end_token=None, control=None, memory=None):
    """Yields the next token of each row, (B,) int64, up to max_new_tokens times.

    ids: the prompt (B, T) int64, T >= 1. temperature, top_k, top_p: see draw. Row r of seed s draws
    the same numbers whatever the batch; without a seed one is drawn from torch's generator. A row
    that has drawn end_token goes on yielding it; when all have, the stream ends (on a GPU up to 15
    tokens later). salience: instead of the config's. edit changes the signals (B, T, L, 3) before
    use; control: (B, n_control).
    memory: an empty Memory(model, B), for a caller who wants to look into it between the tokens.
    When it is full, or a prompt too long, the last block_size // 2 tokens are kept and read again.
    On a GPU the step is captured, edit too: tensor operations only, no .item().
    Raises ValueError when the first token is asked for."""
    check_settings(max_new_tokens, temperature, top_k, top_p)
    B, prompt_length = ids.shape
    block_size = model.config.block_size
    model = for_generation(model)
    if memory is None:
        memory = Memory(model, B)
    numbers = uniform_numbers(seed, B, max_new_tokens, ids.device)
    text = torch.cat([ids, ids.new_empty(B, max_new_tokens)], dim=1)
    ended = torch.zeros(B, dtype=torch.bool, device=ids.device)

    def step(new, uniform):
        """Reads the tokens new (B, T) and draws the next one: all that happens per token."""
        logits = model(new, memory=memory, salience=salience, edit=edit, control=control)
        return draw(logits, uniform, temperature, top_k, top_p)

    read_one = step
    for i in range(max_new_tokens):
        known = prompt_length + i  # tokens of the text so far
        if memory.length in (0, block_size):  # nothing was read yet, or it is full
            memory.clear()
            start = 0 if known <= block_size else known - block_size // 2
            token = step(text[:, start:known], numbers[i])
        else:
            last = text[:, known - 1 : known]
            if ids.is_cuda and i >= 3 and read_one is step:  # the first steps load kernels
                read_one = captured(step, memory, last.clone(), numbers[i].clone())
            token = read_one(last, numbers[i])
        if end_token is not None:
            token = torch.where(ended, end_token, token)
            ended |= token == end_token
        text[:, known] = token
        yield text[:, known]  # not the token itself, which a graph's next replay overwrites
        # Looking at a GPU's result makes the host wait, so there only now and then.
        look = not ids.is_cuda or i % 16 == 0
        if end_token is not None and look and ended.all():
            return


def generate(model, ids, *settings, **more_settings):
    """The prompt ids (B, T) and what stream makes of it, with its settings -> (B, T + n).

    Raises ValueError."""
    new = [token[:, None] for token in stream(model, ids, *settings, **more_settings)]
    return torch.cat([ids, *new], dim=1)


# ---- The command line --------------------------------------------------------------------------
class Row:
    """One sample: its tokens become text as they come, whole characters only, until it ends."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.waiting = prompt[1:]  # tokens not shown yet; prompt[0] is END
        self.text = ""
        self.count = 0  # tokens drawn
        self.ended = False

    def add(self, token):
        """Takes in the token drawn next."""
        if self.ended:
            return
        self.count += 1
        if token == self.tokenizer.eot_token:
            self.ended = True
        else:
            self.waiting.append(token)

    def show(self, levels=()):
        """Makes the waiting tokens text; levels, of the tokens that were read last, colour them."""
        n = len(self.waiting)
        # Both end with the same token. Tokens before the levels' first were not read in this step,
        # so they have no colour; a level before the first token is that of END.
        padded = [None] * n + list(levels)
        for token, level in zip(self.waiting, padded[len(levels) :], strict=True):
            text = self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
            self.text += text if level is None else paint(text, level)
        self.waiting = []


def read_late(tokens):
    """Yields a GPU's tokens (B,) on the host, one step late, so that the GPU makes the next ones
    while Python writes these."""
    earlier = None
    for drawn in tokens:
        on_host = drawn.to("cpu", non_blocking=True)  # into pinned memory
        copied = torch.cuda.Event()
        copied.record()
        if earlier:
            earlier[1].synchronize()
            yield earlier[0]
        earlier = on_host, copied
    if earlier:
        earlier[1].synchronize()
        yield earlier[0]


def write(tokens, rows, levels=None):
    """Writes the samples to standard output, the first one word by word as it comes.

    levels(), for a trace, returns each row's colours of the tokens that were read last. A token is
    drawn before it is read, so the text stays a token behind."""
    shown = 0
    for drawn in tokens:
        of_rows = levels() if levels else [()] * len(rows)
        for row, of_row, token in zip(rows, of_rows, drawn.tolist(), strict=True):
            row.show(of_row)
            row.add(token)
        print(rows[0].text[shown:], end="", flush=True)
        shown = len(rows[0].text)
    for row in rows:
        row.show()
    print(rows[0].text[shown:])
    for row in rows[1:]:
        print(f"---\n{row.text}")


def timed(tokens, times):
    """Yields the tokens, and enters in the list `times` when each came, in seconds."""
    for drawn in tokens:
        times.append(time.perf_counter())
        yield drawn


# 256-colour codes from dark blue over grey to yellow: no red beside green.
RAMP = (17, 18, 24, 60, 102, 144, 185, 220, 227)


def paint(text, level):
    """The text on a background for level 0 to 1. The colour ends before a line does."""
    place = round(level * (len(RAMP) - 1))
    ink = 15 if place < 5 else 16
    on = f"\x1b[48;5;{RAMP[place]};38;5;{ink}m"
    off = "\x1b[0m"
    return on + text.replace("\n", f"{off}\n{on}") + off


def trace_levels(memory, signal, layer):
    """The signals of the tokens read last as levels, (B, T), lists: 0.5 is neutral, 0 half of it
    and below, 1 its double and above. layer None: the mean of all layers."""
    values = memory.signals[..., SIGNALS.index(signal)]  # (B, T, L)
    values = values.mean(-1) if layer is None else values[..., layer]
    return (0.5 + 0.5 * values.clamp(min=1e-9).log2()).clamp(0, 1).tolist()


def colours_are_shown():
    """Whether standard output is a terminal with colours, and nobody asked to do without them."""
    if os.name == "nt":
        os.system("")  # makes an older console understand colour codes
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def load_model(path, device):
    """-> the model of a checkpoint, on the device, its tokenizer, the checkpoint's content.

    Raises OSError or ValueError."""
    content = load_file(path)
    model = ModulatedLM.from_checkpoint(content, path)
    data = content.setdefault("data", {"tokenizer": "gpt2", "vocab_size": 50257})  # the authors'
    try:
        tokenizer = tokenizer_of(data)
    except (KeyError, TypeError):
        tokenizer = None
    if tokenizer is None or tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"{path} holds no tokenizer for its model's vocabulary")
    return model.to(device), tokenizer, content


def control_numbers(text):
    return [float(number) for number in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0],
                                     usage="%(prog)s --prompt TEXT [flags]", allow_abbrev=False)
    parser.error = lambda message: sys.exit(complain(message))
    add = parser.add_argument_group("the text").add_argument
    default = " (default: %(default)s)"
    add("--prompt", metavar="TEXT", required=True,
        help="the text to go on with; empty: a story from its beginning")
    add("--ckpt", default="out/ckpt_best.pt",
        help="a checkpoint of train.py's or of the paper's authors" + default)
    add("--max_new_tokens", type=int, default=256, help="tokens to write at most" + default)
    add("--temperature", type=float, default=0.8,
        help="0: always the likeliest token; higher: more varied" + default)
    add("--top_k", type=int, default=50, help="draw among so many likeliest; 0: all" + default)
    add("--top_p", type=float, default=1.0,
        help="draw among the likeliest that hold this probability" + default)
    add("--num_samples", type=int, default=1, help="texts to write" + default)
    add("--seed", type=int, help="same seed, same text; by default another text each time")
    add = parser.add_argument_group("the controller").add_argument
    effects = ("how strongly layers write", "how sharply they attend", "how much FFNs add")
    for name, effect in zip(SIGNALS, effects, strict=True):
        text = f"multiply the {name} of every layer: {effect}"
        add(f"--{name}", type=float, default=1.0, help=text + default)
    add("--control", type=control_numbers, metavar="X,Y,...",
        help="a number for each control of the data, for the controller to read (default: all 0). "
             "Write --control=-1,0 where the first is negative")
    add("--trace", choices=SIGNALS,
        help="colour each token by this signal as it was read, in a terminal with colours")
    add("--layer", type=int, help="the layer that --trace shows, from 0 (default: the mean of all)")
    add("--salience", choices=("causal", "reactive"),
        help="what the controller sees: the text so far, or one token (the paper's cached "
             "inference); by default as trained, and causal where that was global")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    return parser.parse_args()


def check_arguments(args, model, content):
    """Raises ValueError where the arguments do not fit the model."""
    doses = [args.gain, args.precision, args.gate]
    if args.num_samples < 1:
        raise ValueError(f"--num_samples is {args.num_samples}, it must be at least 1")
    for dose in doses:
        if not 0 <= dose <= 1e6:  # far above, sums overflow
            raise ValueError("--gain, --precision and --gate must be 0 or more, up to 1e6")
    if not model.controller and (doses != [1, 1, 1] or args.trace):
        raise ValueError(f"{args.ckpt} was trained with --signals none: it has no controller to "
                         "dose or to trace")
    if args.layer is not None and not 0 <= args.layer < model.config.n_layer:
        raise ValueError(f"--layer is {args.layer}, the model has layers 0 to "
                         f"{model.config.n_layer - 1}")
    if not all(map(math.isfinite, args.control or [])):
        raise ValueError("--control must be finite numbers")
    if args.control and len(args.control) != model.config.n_control:
        names = ", ".join(content["data"].get("controls", ())) or "none"
        raise ValueError(f"--control has {len(args.control)} numbers, {args.ckpt} takes "
                         f"{model.config.n_control}: {names}")


@command
def main():
    args = arguments()
    device = pick_device(args.device)
    model, tokenizer, content = load_model(args.ckpt, device)
    check_arguments(args, model, content)
    prompt = prompt_tokens(tokenizer, args.prompt)
    ids = torch.tensor([prompt] * args.num_samples, device=device)
    dose = torch.tensor([args.gain, args.precision, args.gate], device=device)

    def edit(signals):  # a reader's own signals stand behind the three, and stay
        return torch.cat([signals[..., :3] * dose, signals[..., 3:]], dim=-1)

    control = None
    if args.control:
        control = torch.tensor([args.control] * args.num_samples, device=device)
    memory = Memory(model, args.num_samples)
    levels = None
    if args.trace and colours_are_shown():
        levels = functools.partial(trace_levels, memory, args.trace, args.layer)
        scale = "".join(paint("  ", i / 8) for i in range(9))
        print(f"{args.trace}: half of neutral {scale} double\n")
    rows = [Row(tokenizer, prompt) for _ in range(args.num_samples)]
    start = time.perf_counter()
    tokens = stream(model, ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                    args.seed, args.salience, edit, tokenizer.eot_token, control, memory)
    if device.type == "cuda" and levels is None:  # a trace wants the signals of this very step
        tokens = read_late(tokens)
    times = []
    write(timed(tokens, times), rows, levels)
    seconds = time.perf_counter() - start
    count = sum(row.count for row in rows)
    speed = f"{count} tokens in {seconds:.2f} s: {count / seconds:.0f} tokens/s"
    if len(times) > 4:  # a GPU loads and records its kernels for the first ones
        later = count * (1 - 4 / len(times)) / (times[-1] - times[3])
        speed += f", after the first 4 {later:.0f} tokens/s"
    print(speed, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
