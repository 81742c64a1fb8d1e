"""
Train an NCN on the tokens that prepare.py left in data/: on a CPU, a GPU, or several with torchrun.

    python train.py                                  # the preset that fits this machine
    python train.py --signals none --out out/static  # the same Transformer without a controller, to compare with
    python train.py --resume                         # go on after Ctrl-C, a crash or a power cut
    python train.py --data b --init out/ckpt_best.pt --out out/b    # go on from these weights, on other data
    torchrun --nproc_per_node=2 train.py             # two processes share each step's micro-batches

Every random draw is a function of the seed and the micro-batch's number: the order of the data, the dropout. So the
step is all the random state there is; a resumed run repeats the uninterrupted one bit for bit (on a CPU), and two
processes compute what one does.
"""

import argparse
import contextlib
import functools
import math
import os
import signal
import socket
import sqlite3
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime

if __name__ == "__main__":  # while torch loads, Ctrl-C just ends the script
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
import prepare
from kernels import DEVICE_HELP, DEVICES, pick_device
from ncn import ModulatedLM, NCNConfig, has_form, load_file
from prepare import SLOTS, command, control_windows, fail, label_slots, read_meta, read_tokens, rows_of, windows
from sample import generate

# ---- Settings, each a flag of the same name --------------------------------------------------------------------------
MODEL = asdict(NCNConfig(vocab_size=1)) | {"signals": "gain,precision,gate"}  # the paper's sizes are the defaults
del MODEL["vocab_size"], MODEL["n_control"]  # the data's
PAPER = MODEL | dict(
    start="neutral", rows="contiguous", batch_size=16, grad_accum=4, max_steps=0, lr=6e-4, warmup_steps=100, beta1=0.9,
    beta2=0.999, weight_decay=0.1, grad_clip=1.0, eval_interval=500, val_sequences=3200, log_interval=20, seed=42)
LAPTOP = PAPER | dict(
    n_layer=3, n_head=4, n_embd=128, ncn_hidden=32, dropout=0.0, rows="aligned", batch_size=4, grad_accum=2,
    max_steps=2000, lr=2e-3, beta2=0.99, eval_interval=100, val_sequences=256, log_interval=10)
HELP = {
    "training": {
        "max_steps": "optimizer steps; 0: one epoch",
        "batch_size": "rows per micro-batch",
        "grad_accum": "micro-batches per optimizer step, over all processes",
        "lr": "peak learning rate; cosine to 0 at max_steps",
        "seed": "of the weights, the data order and the dropout",
        "rows": "contiguous: the text cut every block_size tokens; aligned: a story each (BOS-aligned), padded",
    },
    "the controller": {
        "signals": "signals the controller drives, with commas; none: no controller, the plain Transformer",
        "salience": "what the controller sees: causal (the past), global (the past and the future, as the paper "
                    "trains), reactive (one token), constant (nothing: three learned numbers per layer)",
        "homeostatic_lambda": "weight of the homeostatic penalty, the signals' mean squared distance from 1",
        "start": "of the signals: neutral (1), or zero (biases of 0 as in the authors' code: precision 0.70, gate 0.5)",
        "ncn_hidden": "hidden width of the controller",
        "ncn_heads": "heads of the controller's salience pooling",
    },
    "the Transformer": {
        "block_size": "context length, tokens",
        "n_layer": "Transformer blocks",
        "n_head": "attention heads per block",
        "n_embd": "width of the model",
        "n_ffn": "hidden width of the FFN; 0: 4 n_embd",
        "dropout": "share of embeddings and branch outputs dropped in training",
    },
    "validation and log": {
        "eval_interval": "steps between validations, each followed by a checkpoint",
        "val_sequences": "rows of the validation set, the same in every run",
        "log_interval": "steps between log lines",
    },
    "AdamW": {
        "warmup_steps": "steps of linear warm-up",
        "beta1": "decay of the gradient's mean",
        "beta2": "decay of the gradient's square",
        "weight_decay": "weight decay, on matrices only",
        "grad_clip": "largest norm of the gradient; 0: no clipping",
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TO_RESUME = dict(settings=PAPER, dtype="", step=0, best=0.0, data={}, scaler={}, optimizer={"state": {}})


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="%(prog)s [flags]", allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    run = parser.add_argument_group("the run")
    add, begin = run.add_argument, run.add_mutually_exclusive_group()
    add("--preset", choices=("auto", "paper", "laptop"), default="auto", help="auto: paper with a GPU, laptop without")
    add("--data", default="data", help="folder that prepare.py wrote (default: data)")
    add("--out", default="out", help="folder for training.log and checkpoints (default: out)")
    begin.add_argument("--resume", action="store_true", help="go on from OUT/ckpt_latest.pt with its settings")
    begin.add_argument("--init", metavar="FILE",
                       help="begin with this checkpoint's weights, on any data of its vocabulary, as a new run. With "
                            "--lr 0 --max_steps 1 it is only validated")
    for title, flags in HELP.items():
        add = parser.add_argument_group(title).add_argument
        for name, text in flags.items():
            kind = type(PAPER[name])
            default = f"{PAPER[name]}" if PAPER[name] == LAPTOP[name] else f"paper {PAPER[name]}, laptop {LAPTOP[name]}"
            add(f"--{name}", type=kind, metavar={int: "N", float: "X", str: "NAME"}[kind],
                help=f"{text} (default: {default})")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the matrix products; auto: bf16 where it is fast, else fp16 on a GPU, fp32 on a CPU")
    add("--checkpoint_blocks", action="store_true", help="keep each block's input alone: less memory, more work")
    add("--compile", action="store_true", help="torch.compile the model: minutes to start, and slower on a CPU")
    add("--bench", action="store_true", help="train nothing: time steps with and without the controller")
    return parser.parse_args()


def resolve_settings(args, cuda, ckpt=None):
    """The run's settings: a preset or the checkpoint's, overridden by flags; with the reasons, as lines to print."""
    given = {name: getattr(args, name) for name in PAPER if getattr(args, name) is not None}
    if ckpt:
        s, notes = ckpt["settings"], []
        changed = sorted(name for name in given if given[name] != s[name])
        if refused := [name for name in changed if name in {*MODEL, "rows", "start"}]:
            raise ValueError(f"--resume cannot change the model: --{refused[0]} is {given[refused[0]]}, the checkpoint "
                             f"has {s[refused[0]]}; leave the flag out, or start a new run without --resume")
        if changed:
            notes.append(f"Changed on resume, so this is no longer the uninterrupted run: {', '.join(changed)}")
    else:
        preset = args.preset if args.preset != "auto" else "paper" if cuda else "laptop"
        s = dict(PAPER if preset == "paper" else LAPTOP)
        notes = [f"Preset {preset}" + (f" (auto: {'a' if cuda else 'no'} GPU was found)" * (args.preset == "auto"))]
    s = s | given
    for names, allowed, rule in (
            ("batch_size grad_accum log_interval eval_interval val_sequences", lambda x: x >= 1, "at least 1"),
            ("max_steps warmup_steps lr weight_decay grad_clip seed", lambda x: 0 <= x < 1e300, "0 to 1e300"),
            ("beta1 beta2", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("rows", lambda x: x in ("contiguous", "aligned"), "contiguous or aligned"),
            ("start", lambda x: x in ("neutral", "zero"), "neutral or zero")):
        for name in names.split():
            if not allowed(s[name]):
                raise ValueError(f"--{name} is {s[name]}, it must be {rule}")
    return s, notes


def model_config(s, vocab_size, device, n_control=0):
    signals = () if s["signals"] == "none" else tuple(s["signals"].split(","))
    sizes = {name: s[name] for name in MODEL} | dict(vocab_size=vocab_size, n_control=n_control)
    config = NCNConfig(**sizes | dict(signals=signals))
    memory = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else
              os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf)
    if (need := 16 * config.n_weights()) > memory:  # float32: a weight, its gradient and AdamW's two means
        raise ValueError(f"this model needs over {min(need >> 30, 10**9):,} GiB to train, found {memory / 2**30:.1f}")
    return config


# ---- Device and precision --------------------------------------------------------------------------------------------
def timed(work):
    """Runs work; seconds until it is done, on a GPU too."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def choose_dtype(device, config):
    """The name of the fastest safe dtype for such a model on this device, and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        return "fp16", "this GPU has no bf16 units; losses are scaled"
    if device.type == "mps":
        return "fp32", "the safe choice, untried like all of mps"
    # In a small model the casts cost more than the products gain. A count, no timing near a threshold, decides: runs to
    # be compared shall have one dtype.
    if config.n_embd * (12 * config.n_layer * config.n_embd + config.vocab_size) < 1.5e6:
        return "fp32", "with fewer than 1.5 million weights bf16 is no faster on a CPU"
    # Without bf16 units a CPU's bf16 product can be a hundred times slower, and with them several times faster.
    a = torch.randn(256, 256)
    b = a.bfloat16()
    a @ a, b @ b  # warm up
    gain = min(timed(lambda: a @ a) for _ in range(5)) / min(timed(lambda: b @ b) for _ in range(5))
    return ("bf16" if gain > 1.5 else "fp32"), f"bf16 products are {gain:.2g} times as fast on this CPU, measured now"


# ---- The run ---------------------------------------------------------------------------------------------------------
def learning_rate(step, s):
    """Of step 1, 2, ..., max_steps: linear warm-up, then a cosine that reaches 0 after the last step."""
    if step <= s["warmup_steps"]:
        return s["lr"] * step / s["warmup_steps"]
    progress = (step - s["warmup_steps"]) / max(1, s["max_steps"] - s["warmup_steps"])
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, s):
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": s["weight_decay"] * matrices} for matrices in (True, False)]
    fused = model.norm.weight.device.type != "mps"
    return torch.optim.AdamW(groups, lr=s["lr"], betas=(s["beta1"], s["beta2"]), fused=fused)


def passes(model, scaler, device, dtype, parts):
    """-> work(x, y, control=None): a micro-batch's forward and backward pass, one of parts whose gradients are added
    up. It returns the task and the homeostatic loss, a tensor of two."""
    def work(x, y, control=None):
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            loss = model(x, y, control=control)
        scaler.scale(loss.total / parts).backward()
        return torch.stack([loss.task, loss.homeostatic]).detach()
    return work


def can_record(device, s, args):
    """Whether a micro-batch can be a CUDA graph: rows of stories differ in length, and the random state of checkpointed
    blocks cannot be recorded."""
    nvidia = device.type == "cuda" and bool(torch.version.cuda)
    return nvidia and s["rows"] == "contiguous" and not args.checkpoint_blocks


def recorded(work, model, *inputs):
    """work(*inputs), one of passes, as a CUDA graph: a thousand small kernels launched at once, since a large GPU runs
    them in less time than Python takes to launch them. inputs are such as will follow; no gradient is kept of them."""
    for _ in range(2):  # what is compiled, measured or allocated at first use
        work(*inputs)
    model.zero_grad(set_to_none=False)  # a graph writes where it wrote when it was recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(inputs[0].device)):
        losses = work(*inputs)

    def replay(*new):
        for old, its in zip(inputs, new, strict=True):
            if old is not None:
                old.copy_(its)
        graph.replay()
        return losses
    return replay


def update(model, optimizer, scaler, s, keep):
    """What follows a step's last backward pass. Returns the gradient's norm, a tensor: nothing waits for the GPU. keep:
    the gradients become 0 where they are, since recorded passes add to them there."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["grad_clip"] or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not keep)
    return norm


def compiled(model):
    """torch.compile's model, after a trial, since it begins to work at the first call alone. Raises ValueError."""
    try:
        torch.compile(torch.neg)(next(model.parameters()).detach()[:1])
    except RuntimeError as error:
        raise ValueError("--compile needs a C compiler and, on a GPU, Triton; without it: leave the flag out "
                         f"({str(error).strip().splitlines()[0]})") from None
    return torch.compile(model)


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def drop_control(control, seed, micro):
    """Sets the control (B, T, n_control) of a row in ten to 0, so that the model learns to work without; None: None."""
    if control is not None:
        control[np.random.default_rng((seed, micro, 1)).random(len(control)) < 0.1] = 0
    return control


def join(backend, rank, world):
    """Makes the processes a group, in a new store: torchrun's survives a restart, with the addresses of the dead."""
    store, host = None, os.environ["MASTER_ADDR"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        old = dist.TCPStore(host, int(os.environ["MASTER_PORT"]))
        if rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            old.set("ncn", str(store.port))
        while not store:  # until the port is a living one's
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                socket.create_connection((host, port := int(old.get("ncn")))).close()
                store = dist.TCPStore(host, port)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def train(args):
    # torchrun sets these; alone we are rank 0 of 1.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) or 1
    device = pick_device(args.device)
    if world > 1:  # CPU tensors go through gloo also beside GPUs: agreeing to stop then needs no GPU synchronisation
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo", rank, world)

    def all_reduce_sum(values):
        if world > 1:
            dist.all_reduce(values)
        return values

    def from_rank_0(work):
        """What work() returns on rank 0, on every process: rank 0's files may be the only ones."""
        result = [work() if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(result)
        return result[0]

    restarted = all_reduce_sum(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))) > 0  # on any node
    latest, best_pt, log_path = (os.path.join(args.out, f) for f in ("ckpt_latest.pt", "ckpt_best.pt", "training.log"))
    ckpt, meta = from_rank_0(lambda: (
        load_file(latest) if args.resume or restarted and os.path.exists(latest) else None, read_meta(args.data)))
    if ckpt is not None and not (has_form(ckpt, TO_RESUME) and ckpt["dtype"] in DTYPES and ckpt["step"] >= 0):
        raise ValueError(f"{latest} was not written by train.py, or is damaged: it cannot be resumed")
    if ckpt and not args.resume:  # it may be an earlier run's, where ours died before it could set that aside
        theirs, (mine, _) = ckpt["settings"], resolve_settings(args, device.type == "cuda")
        ckpt = ckpt if theirs == mine | {"max_steps": mine["max_steps"] or theirs["max_steps"]} else None
    s, notes = resolve_settings(args, device.type == "cuda", ckpt)
    if s["grad_accum"] % world:
        raise ValueError(f"--grad_accum {s['grad_accum']} micro-batches cannot be shared by {world} processes: "
                         f"choose a multiple of {world}")

    # Data. A row is a window or a story; a micro-batch is B rows, an epoch all rows in an order of its own.
    if repr(ckpt["data"] if ckpt else meta) != repr(meta) or read_meta(args.data) != meta:  # repr: it may hold tensors
        raise ValueError(f"{args.data} is not the data this run began with: it needs the same, prepared the same way")
    tokenizer, end, T, B = None, meta["vocab_size"] - 1, s["block_size"], s["batch_size"]
    with contextlib.suppress(ConnectionError):  # no GPT-2 vocabulary: no sample lines on a terminal
        tokenizer = prepare.tokenizer_of(meta)
    tokens, val_tokens = (read_tokens(args.data, split, meta) for split in ("train", "val"))
    labels, val_labels = (
        prepare.read_labels(args.data, *its) for its in (("train", meta, tokens), ("val", meta, val_tokens)))
    rows, val_rows = (rows_of(t, T, s["rows"] == "aligned") for t in (tokens, val_tokens))
    per_epoch = len(rows) // B  # micro-batches
    if not per_epoch or not len(val_rows):
        raise ValueError(f"{args.data} holds {len(rows)} rows of {T} tokens for training, {len(val_rows)} for "
                         f"validation: too few for --batch_size {B}; prepare more text or lower --block_size")
    micro_tokens = B * rows[:, 1].mean()  # targets of a micro-batch, on average
    s["max_steps"] = s["max_steps"] or max(1, per_epoch // s["grad_accum"])
    # The same validation rows for every run: their choice has a seed of its own.
    val_rows = val_rows[np.random.default_rng(0).permutation(len(val_rows))[: s["val_sequences"]]]
    is_demo = "entropy_nats_per_story" in meta
    slots, floor = label_slots(val_tokens, tokenizer, val_labels) if is_demo else (None, None)

    def fetch(tokens, rows, control):
        """-> inputs and targets (B, T) int64, -1 where a row is padded, and control or None, on the device."""
        if tokens.base.size() < tokens.nbytes:  # the file's: to read the map beyond its end would kill the process
            raise OSError(f"{tokens.filename} was cut short while it was read")
        x, y, *control = (torch.from_numpy(a) for a in (*windows(tokens, rows, end), control) if a is not None)
        if device.type == "cuda":
            x, y, *control = (a.pin_memory() for a in (x, y, *control))
        x, y, *control = (a.to(device, non_blocking=device.type == "cuda") for a in (x, y, *control))
        return x, y, control[0] if control else None

    def batch(micro):
        epoch, place = divmod(micro, per_epoch)
        mine = rows[shuffled(s["seed"], epoch, len(rows))[place * B : (place + 1) * B]]
        return fetch(tokens, mine, drop_control(control_windows(labels, mine), s["seed"], micro))

    # Model, precision, optimizer
    config = model_config(s, meta["vocab_size"], device, len(meta.get("controls", ())))
    torch.manual_seed(s["seed"] % (1 << 63))
    model = ModulatedLM.from_checkpoint(ckpt, latest) if ckpt else ModulatedLM(config)
    if args.init and not ckpt:
        first = from_rank_0(lambda: load_file(args.init))
        its = first.get("data", {"tokenizer": "gpt2"})  # the authors' is GPT-2's
        model = ModulatedLM.from_checkpoint(first, args.init)
        old, new = ({**asdict(c), **{name: data.get(name) for name in ("tokenizer", "vocabulary")}}
                    for c, data in ((model.config, its if isinstance(its, dict) else {}), (config, meta)))
        if differ := [name for name in new if old[name] != new[name]]:
            raise ValueError(f"--init {args.init} is another model: the same {differ[0]} is needed")
    elif model.controller and s["start"] == "zero" and not ckpt:
        torch.nn.init.zeros_(model.controller.layer2.bias)
    if labels and not (ckpt or args.init):  # a control counts by how much it varies, whatever its unit
        told = labels[0].astype(float)
        model.controller.control.weight.data /= torch.from_numpy(np.where(np.ptp(told, 0) > 0, told.std(0), 1)).float()
    model.to(device).train()
    if args.dtype != "auto":
        dtype, why = args.dtype, "as --dtype says"
    elif ckpt:
        dtype, why = ckpt["dtype"], "as the run began"
    else:
        dtype, why = from_rank_0(lambda: choose_dtype(device, config))  # timings differ between processes
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    step, best = 0, math.inf
    if ckpt:
        step, best, state = ckpt["step"], ckpt["best"], ckpt["optimizer"]["state"]
        like = {i: {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
                for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]) if i in state}
        scale = ckpt["scaler"] if dtype == ckpt["dtype"] else scaler.state_dict()
        # AdamW's kernel would not look; and weights that a controller does not use have no state.
        if config != model.config or len(like) != len(state) or not has_form(
                dict(state=state, scale=scale), dict(state=like, scale=scaler.state_dict())):
            raise ValueError(f"{latest} is damaged: its parts do not belong together")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        scaler.load_state_dict(scale)
    earlier = () if ckpt else (log_path, latest, best_pt)
    del ckpt
    autocast = functools.partial(torch.autocast, device.type, DTYPES[dtype], enabled=dtype != "fp32")
    model.checkpoint_blocks = args.checkpoint_blocks
    wrapped_model, micro_steps = compiled(model) if args.compile else model, s["grad_accum"] // world
    if world > 1:  # without a softmax over several tokens the salience query has no gradient
        unused = bool(config.signals) and config.salience in ("reactive", "constant")
        wrapped_model = DistributedDataParallel(wrapped_model, find_unused_parameters=unused)
    work = passes(wrapped_model, scaler, device, dtype, micro_steps)

    # Files: rank 0 alone writes. An earlier run in the same folder is set aside, not overwritten.
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        try:
            lock = sqlite3.connect(os.path.join(args.out, "lock"), timeout=0)  # the system frees it, however we end
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise ValueError(f"another training is at work in {args.out} ({error}): choose another --out") from None
        numbered = (os.path.join(args.out, "previous", str(i)) for i in range(1, 1 << 63))
        previous = next(path for path in numbered if not os.path.exists(path))
        for path in filter(os.path.exists, earlier):
            os.renames(path, os.path.join(previous, os.path.basename(path)))
            notes.append(f"Moved the earlier {path} to {previous}")
        log_file = open(log_path, "a", encoding="utf-8", errors="backslashreplace")
    on_terminal = rank == 0 and sys.stderr.isatty()
    bar = tqdm(total=s["max_steps"], initial=step, unit="step", disable=not on_terminal)

    def log(message):
        if rank == 0:
            now = datetime.now()
            line = f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} [INFO] {message}"
            log_file.write(line + "\n")
            log_file.flush()
            bar.write(line)

    def save(*paths):
        for path in paths:
            model.save(path, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, best=best,
                       settings=s, dtype=dtype, data=meta)

    @torch.no_grad()
    def validate():
        """Mean task loss per target, each row counted once whatever the number of processes; the same without the
        control; and for demo stories the nats per story above their entropy, by slot (SLOTS and the rest), else None.
        """
        model.eval()
        # nats, those without the control, targets, stories, nats above by slot
        sums = torch.zeros(4 + len(SLOTS) + 1, dtype=torch.float64)
        mine = val_rows[rank::world]
        for i in range(0, len(mine), B):
            x, y, control = fetch(val_tokens, mine[i : i + B], control_windows(val_labels, mine[i : i + B]))
            n = (y >= 0).sum()
            with autocast():
                total = model(x, y, control=control).task * n
                untold = total if control is None else model(x, y).task * n
                if is_demo:
                    hidden = model.hidden(x, control=control)[0]  # a row's logits at a time: all need gigabytes
                    nats = torch.stack([F.cross_entropy(F.linear(h, model.embed.weight).float(), target,
                                                        ignore_index=-1, reduction="none")
                                        for h, target in zip(hidden, y, strict=True)]).cpu()
                    which, least = (torch.from_numpy(windows(a, mine[i : i + B], end)[1]) for a in (slots, floor))
                    sums[4:].index_add_(0, which[which >= 0].long(), (nats - least)[which >= 0].double())
            sums[:4] += torch.stack([total, untold, n, (y == end).sum()]).cpu()  # float64 is the CPU's, mps has none
        model.train()
        nats, untold, targets, stories, *above = all_reduce_sum(sums).tolist()
        return nats / targets, untold / targets, [a / max(stories, 1) for a in above] if is_demo else None

    received = []  # (number, seconds) of signals: the first asks for an orderly stop, a later one stops at once
    def receive(number, frame):
        received.append((number, time.monotonic()))
        if received[-1][1] > received[0][1] + 2:  # within a moment it is the same one: torchrun passes it on, too
            os._exit(128 + number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if signal.getsignal(number := getattr(signal, name, signal.SIGTERM)) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, receive)

    def stop_if_asked():
        """Every process asks whether any of them was told to stop, so that all stop at the same place."""
        if all_reduce_sum(torch.tensor(len(received))):  # the step under way is dropped: it has changed nothing yet
            from_rank_0(lambda: save(latest))  # who left sooner would make torchrun end the others
            log(f"Interrupted after step {step}: saved {latest}, go on with --resume")
            raise SystemExit(128 + (received[0][0] if received else signal.SIGTERM))  # as a shell has it

    for note in notes:
        log(note)
    n_params, n_controller = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (model, model.controller))
    log(f"{n_params:,} parameters, {n_controller:,} of them the controller's | {device.type} x {world} | "
        f"{kernels.backend(device)}")
    if model.controller:
        n_ffn = (config.n_ffn or 4 * config.n_embd) + round(n_controller / config.n_layer / (2 * config.n_embd + 1))
        log(f"A static model of this size: --signals none --n_ffn {n_ffn}")
    log("Settings: " + " ".join(f"{name}={s[name]}" for name in PAPER if not name.endswith("_interval")))
    log(f"Data: {args.data} sha256={meta['train_sha256'][:12]} tokenizer={meta['tokenizer']} "
        f"vocab_size={meta['vocab_size']}"
        + (f" n_control={config.n_control} ({', '.join(meta['controls'])})" if config.n_control else ""))
    log(f"{dtype}: {why}")
    log(f"{s['max_steps']:,} steps of {micro_tokens * s['grad_accum']:,.0f} tokens, from {args.data}: {len(tokens):,} "
        f"tokens ({meta['tokenizer']}) to train on, {len(val_rows)} rows to validate on")
    future = ""
    if model.controller and config.salience == "global":
        future = " | global salience: sees the future, no likelihood"
        log("Salience is global, as in the paper: every position sees the whole text, the future included. The loss is "
            "not a language model's likelihood, and exp(loss) no perplexity to compare with other models'.")
    if is_demo:
        log(f"These stories' own entropy is {meta['entropy_nats_per_story']:.2f} nats per story, "
            f"{meta['entropy_nats_per_token']:.4f} per token: no model can do better")

    sums, counted, clock, began_step = torch.zeros(2, device=device), 0, time.perf_counter(), step
    # Reads the next micro-batch while this one is computed. A new thread would pin memory for the first GPU.
    loader = ThreadPoolExecutor(1, initializer=lambda: device.type == "cuda" and torch.cuda.set_device(device))
    ahead = loader.submit(batch, step * s["grad_accum"] + rank)
    if keep := can_record(device, s, args) and world == 1:
        work = recorded(work, model, *ahead.result())
    try:
        while step < s["max_steps"]:
            rate = learning_rate(step + 1, s)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for j in range(micro_steps):
                stop_if_asked()
                micro = step * s["grad_accum"] + j * world + rank
                x, y, control = ahead.result()
                ahead = loader.submit(batch, micro + world)
                torch.manual_seed(int(np.random.SeedSequence((s["seed"], micro)).generate_state(1)[0]))  # for dropout
                meet = world == 1 or j == micro_steps - 1  # the processes' gradients are averaged once per step
                with contextlib.nullcontext() if meet else wrapped_model.no_sync():
                    sums += work(x, y, control)
                counted += 1
            norm = update(model, optimizer, scaler, s, keep)
            step += 1
            bar.update()

            evaluate = step % s["eval_interval"] == 0 or step == s["max_steps"]
            if step % s["log_interval"] == 0 or evaluate or step == began_step + 1:
                task, homeostatic = (all_reduce_sum(sums.clone()) / (counted * world)).tolist()
                healthy = all_reduce_sum(torch.isfinite(norm).float()).item() == world or scaler.is_enabled()
                if not math.isfinite(task) or not healthy:
                    raise FloatingPointError(f"loss {task}, gradient norm {norm.item()}")
                now = time.perf_counter()
                epoch, place = divmod(step * s["grad_accum"] - 1, per_epoch)
                scale = scaler.get_scale() if scaler.is_enabled() else 1.0
                log(f"Step: {step} | Ep: {epoch + 1} [{place + 1}/{per_epoch} ({100 * (place + 1) / per_epoch:.1f}%)] "
                    f"| Loss: {task:.4f} | Reg: {homeostatic:.4f} | PPL: {math.exp(min(task, 700)):.2f} "
                    f"| LR: {rate:.2e} | Scale: {scale:.1f} "
                    f"| Tok/s: {counted * world * micro_tokens / (now - clock):.0f}{future}")
                sums.zero_()
                counted, clock = 0, now
            if evaluate:
                result, untold, above = validate()
                log(f"Validation Result: Loss: {result:.4f} | Perplexity: {math.exp(min(result, 700)):.4f}{future}")
                if config.n_control:
                    log(f"Without the control: {untold:.4f}, so it is worth {untold - result:.4f} nats per token")
                if above:
                    per_token = result - meta["entropy_nats_per_token"]
                    log(f"Above the stories' entropy: {per_token:.4f} nats per token, {sum(above):.2f} per story | "
                        + " ".join(f"{name} {a:.2f}" for name, a in zip([*SLOTS, "rest"], above, strict=True)))
                if on_terminal and tokenizer:  # so that one sees it learn
                    with contextlib.suppress(NotImplementedError):  # a signal of one's own that the decoder lacks
                        text = generate(model, torch.tensor([[end]], device=device), 30, 0.5, seed=0, end_token=end)
                        bar.write("    " + " ".join(tokenizer.decode(text[0, 1:].tolist()).split()[:20]))
                paths, best = (best_pt, latest) if result < best else (latest,), min(best, result)
                from_rank_0(functools.partial(save, *paths))
                clock = time.perf_counter()
            if step == began_step + 1:
                began = time.perf_counter()
            elif step == began_step + 6:
                left = (time.perf_counter() - began) / 5 * (s["max_steps"] - step) / 60
                log(f"About {left:.1f} minutes to go, validation not counted")
    except OSError:  # the disk is full, nobody reads the terminal, the data are gone
        if rank == 0:
            save(latest)
        raise
    except FloatingPointError as error:
        left = f"the last good checkpoint is {latest}" if os.path.exists(latest) else "there is no checkpoint"
        log(f"Stopped: {error} at step {step}")
        fail(f"loss, gradient or weights not finite at step {step}; {left}; try a lower --lr")
        raise SystemExit(1) from None
    log("Training Complete.")
    bar.close()


# ---- How fast --------------------------------------------------------------------------------------------------------
def flops_per_token(c):
    """Multiplications and additions of a training step, per token: 2 for each weight of a matrix product in the forward
    pass and 4 in the backward pass. The tied head counts once, the look-up of an embedding and the folded query and
    key of the controller not; attention looks over half of the context on average. 111 M at the paper's sizes."""
    not_products = c.n_embd * (c.block_size + (2 * c.n_embd + 1 if c.signals else 0))
    return 6 * (c.n_weights() - not_products + c.n_layer * c.n_embd * c.block_size)


def bench(args):
    """Times training steps on random tokens, with the controller and without, alternately. The vocabulary is that of
    the data, or GPT-2's where there is none."""
    device = pick_device(args.device)
    s, _ = resolve_settings(args, device.type == "cuda")
    V = read_meta(args.data)["vocab_size"] if os.path.exists(os.path.join(args.data, "meta.json")) else 50257
    config, static = (model_config(s | signals, V, device) for signals in ({}, {"signals": "none"}))
    B, T = s["batch_size"], config.block_size
    x, y = torch.randint(V, (2, B, T), device=device)
    dtype = choose_dtype(device, config)[0] if args.dtype == "auto" else args.dtype
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def stepper(config):
        model = ModulatedLM(config).to(device).train()
        model.checkpoint_blocks = args.checkpoint_blocks
        optimizer = make_optimizer(model, s)
        work = passes(compiled(model) if args.compile else model, scaler, device, dtype, s["grad_accum"])
        if keep := can_record(device, s, args):
            work = recorded(work, model, x, y)

        def step():
            for _ in range(s["grad_accum"]):
                work(x, y)
            update(model, optimizer, scaler, s, keep)
        return step

    print(f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, vocabulary {V:,}; {s['grad_accum']} "
          f"x {B} x {T} random tokens per step; {dtype}" + ", compiled" * args.compile
          + ", blocks checkpointed" * args.checkpoint_blocks)
    threads = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    print(torch.cuda.get_device_name() if device.type == "cuda" else threads,
          f"| torch {torch.__version__} | {kernels.backend(device)}", flush=True)
    empty = kernels.peak_memory(device, reset=True)
    step = stepper(config)
    timed(step)
    spent = timed(step)
    # What a graph holds for itself is reserved, not allocated.
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else kernels.peak_memory(device)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    rate = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(5))
    variants = {"with the controller" if config.signals else "--signals none": (config, step)}
    if config.signals:
        variants["--signals none"] = static, stepper(static)
        timed(variants["--signals none"][1])
    repeat, rounds = max(1, round(1 / spent)), 7 if spent < 5 else 3
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (_, work) in variants.items():
            times[name].append(timed(lambda work=work: [work() for _ in range(repeat)]) / repeat)
    tokens = s["grad_accum"] * B * T
    for name, (c, _) in variants.items():
        middle = statistics.median(times[name])
        print(f"{name:<24}{tokens / middle:>10,.0f}   tokens/s; {flops_per_token(c) / 1e6:.0f} MFLOP per token, "
              f"{flops_per_token(c) * tokens / middle / rate:.0%} of the measured {rate / 1e12:.3g} TFLOP/s")
    if config.signals:
        share = 1 - statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        print(f"{'the controller':<24}{share:>10.1%}   of a step, median of {rounds} alternated pairs")
    if peak:
        print(f"{'peak memory':<24}{peak / 2**20:>6,.0f} MiB   {(peak - empty) / 2**20:,.0f} of them for training")


@command
def main():
    args = arguments()
    try:
        bench(args) if args.bench else train(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
