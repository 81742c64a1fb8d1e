"""
Train an NCN on the tokens that prepare.py left in data/: on a CPU, a GPU, or several with torchrun.

    python train.py                                  # the preset that fits this machine
    python train.py --signals none --out out/static  # the same Transformer without a controller, to compare with
    python train.py --resume                         # go on after Ctrl-C, a crash or a power cut
    torchrun --nproc_per_node=2 train.py             # two processes share each step's micro-batches

Every random draw is a function of the seed and the micro-batch's number: the order of the data, the dropout. So the
step is all the random state there is; a resumed run repeats the uninterrupted one bit for bit (on a CPU), and two
processes compute what one does.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import datetime

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
from ncn import NCNConfig, ModulatedLM, load_file
from prepare import fail, keep

# Every setting of a run: its value in the two presets, and what it is. Each is a flag of the same name.
SETTINGS = {
    #                      paper     laptop
    "block_size":         (512,      512,      "context length, tokens"),
    "n_layer":            (6,        3,        "Transformer blocks"),
    "n_head":             (8,        4,        "attention heads per block"),
    "n_embd":             (256,      128,      "width of the model"),
    "dropout":            (0.1,      0.0,      "share of embeddings and branch outputs dropped in training"),
    "ncn_hidden":         (64,       32,       "hidden width of the controller"),
    "ncn_heads":          (2,        2,        "heads of the controller's salience pooling"),
    "homeostatic_lambda": (0.01,     0.01,     "price of a signal's squared distance from 1, nats"),
    "signals":            ("gain,precision,gate",) * 2 + ("signals the controller drives, with commas; none: no "
                                                           "controller, the plain Transformer",),
    "salience":           ("causal", "causal", "what the controller sees: causal (the past), global (the past and the "
                                               "future, as the paper trains), reactive (one token)"),
    "vocab":              ("full",   "seen",   "of GPT-2's tokens: full, or seen, those that occur in the data and "
                                               "what they are made of; losses compare, and any text still encodes"),
    "batch_size":         (16,       1,        "sequences per micro-batch"),
    "grad_accum":         (4,        2,        "micro-batches per optimizer step, over all processes"),
    "max_steps":          (0,        3200,     "optimizer steps; 0: one epoch"),
    "lr":                 (6e-4,     2e-3,     "peak learning rate; cosine to 0 at max_steps"),
    "warmup_steps":       (100,      100,      "steps of linear warm-up"),
    "beta1":              (0.9,      0.9,      "AdamW's decay of the gradient's mean"),
    "beta2":              (0.999,    0.99,     "AdamW's decay of the gradient's square"),
    "weight_decay":       (0.1,      0.1,      "AdamW's weight decay, on matrices only"),
    "grad_clip":          (1.0,      1.0,      "largest norm of the gradient; 0: no clipping"),
    "eval_interval":      (500,      400,      "steps between validations, each followed by a checkpoint"),
    "val_sequences":      (3200,     128,      "windows of the validation set, the same in every run"),
    "log_interval":       (20,       10,       "steps between log lines"),
    "seed":               (42,       42,       "of the weights, the data order and the dropout"),
}
MODEL = [f.name for f in fields(NCNConfig)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    parser.add_argument("--preset", choices=("auto", "paper", "laptop"), default="auto",
                        help="auto: paper with a GPU, laptop without")
    parser.add_argument("--data", default="data", help="folder that prepare.py wrote (default: data)")
    parser.add_argument("--out", default="out", help="folder for training.log and checkpoints (default: out)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/ckpt_latest.pt with its settings")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of the matrix products; auto: bf16 where it is fast, else fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--checkpoint_blocks", action="store_true",
                        help="keep only each block's input and compute the rest twice: less memory, more work")
    parser.add_argument("--bench", action="store_true", help="train nothing: time steps, print what bounds them")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: slow to start, faster to run")
    for name, (paper, laptop, text) in SETTINGS.items():
        default = f"{paper}" if paper == laptop else f"paper {paper}, laptop {laptop}"
        parser.add_argument(f"--{name}", type=type(paper), help=f"{text} (default: {default})")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Data


def read_meta(folder):
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        return meta, meta["tokenizer"], int(meta["vocab_size"])
    except FileNotFoundError:
        raise ValueError(f"no data in {folder}: run prepare.py first, or name its folder with --data") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: run prepare.py again") from None


def read_tokens(path, vocab_size, block_size):
    """The file's uint16 tokens, memory-mapped, and which ones occur; all checked to be within the vocabulary."""
    if not os.path.isfile(path):
        raise ValueError(f"no {path}: run prepare.py first")
    if os.path.getsize(path) % 2:
        raise ValueError(f"{path} has an odd number of bytes, it is cut short: run prepare.py again")
    if os.path.getsize(path) // 2 <= block_size:
        raise ValueError(f"{path} holds {os.path.getsize(path) // 2} tokens, fewer than a window of {block_size} + 1: "
                         "prepare more text or lower --block_size")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    occurs = np.zeros(2**16, bool)
    for i in range(0, len(tokens), 2**24):
        occurs[tokens[i : i + 2**24]] = True
    seen = np.flatnonzero(occurs)
    if seen[-1] >= vocab_size:
        raise ValueError(f"{path} holds token id {seen[-1]}, beyond the vocabulary of {vocab_size}: "
                         "run prepare.py again")
    return tokens, seen


def renumber(kept):
    """From the files' token numbers to those of a model that knows only the tokens `kept` (see keep in prepare.py)."""
    ids = np.full(2**16, -1)
    ids[kept] = np.arange(len(kept))
    return ids


def windows(tokens, which, block_size, device, ids=None):
    """
    Windows number `which` of the tokens -> inputs and targets, the same shifted by one; (B, T) int64 each.
    ids: the model's number of each of the files' token numbers, where they differ (see renumber).
    """
    rows = np.stack([tokens[i * block_size : (i + 1) * block_size + 1] for i in which])
    rows = torch.from_numpy((rows if ids is None else ids[rows]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


# ----------------------------------------------------------------------------------------------------------------------
# Precision


def seconds(run, times=3):
    """The fastest of a few timed calls, after one to warm up."""
    run()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


def choose_dtype(device, model, batch):
    """The name of the fastest safe dtype on this device, and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        return "fp16", "this GPU has no bf16 units; losses are scaled"
    # Without bf16 units a bf16 product can be a hundred times slower: a small one first, the model only if it pays.
    a = torch.randn(256, 256)
    b = a.bfloat16()
    gain = seconds(lambda: a @ a) / seconds(lambda: b @ b)
    if gain > 1.2:
        def step(enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(*batch).total.backward()
            model.zero_grad()
        gain = seconds(lambda: step(False)) / seconds(lambda: step(True))
    return ("bf16" if gain > 1.05 else "fp32"), f"bf16 would be {gain:.2g} times as fast on this CPU, measured just now"


# ----------------------------------------------------------------------------------------------------------------------
# The run


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the state was saved; status is the shell's, 128 + the signal's number."""


def learning_rate(step, s):
    """Of step 1, 2, ..., max_steps: linear warm-up, then a cosine that reaches 0 after the last step."""
    if step <= s["warmup_steps"]:
        return s["lr"] * step / s["warmup_steps"]
    progress = (step - s["warmup_steps"]) / max(1, s["max_steps"] - s["warmup_steps"])
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * progress))


def settle(args, cuda, ckpt):
    """The run's settings: a preset or the checkpoint's, overridden by flags; with the reasons, as lines to print."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if ckpt:
        settings, notes = {"vocab": "full"} | ckpt["settings"], []
        changed = {name for name in given if given[name] != settings[name]}
        if refused := sorted(changed & {*MODEL, "vocab"}):
            raise ValueError(f"--resume cannot change the model: --{refused[0]} is {given[refused[0]]}, the checkpoint "
                             f"has {settings[refused[0]]}; leave the flag out, or start a new run without --resume")
        if changed:
            notes.append(f"Changed on resume, so this is no longer the uninterrupted run: {', '.join(sorted(changed))}")
    else:
        preset = args.preset if args.preset != "auto" else "paper" if cuda else "laptop"
        settings = {name: value[preset == "laptop"] for name, value in SETTINGS.items()}
        notes = [f"Preset {preset}" + (f" (auto: {'a' if cuda else 'no'} GPU was found)" * (args.preset == "auto"))]
    settings.update(given)
    for name in ("batch_size", "grad_accum", "log_interval", "eval_interval", "val_sequences"):
        if settings[name] < 1:
            raise ValueError(f"--{name} is {settings[name]}, it must be at least 1")
    for name in ("max_steps", "warmup_steps", "lr", "weight_decay", "grad_clip", "seed"):
        if not 0 <= settings[name] < math.inf:
            raise ValueError(f"--{name} is {settings[name]}, it must be 0 or more")
    if settings["vocab"] not in ("full", "seen"):
        raise ValueError(f"--vocab is {settings['vocab']}, it must be full or seen")
    for name in ("beta1", "beta2"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"--{name} is {settings[name]}, it must be in [0, 1)")
    return settings, notes


def pick_device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


def model_config(s, vocab_size):
    signals = tuple(filter(None, s["signals"].replace("none", "").split(",")))
    return NCNConfig(**{name: s[name] for name in MODEL if name in s} | dict(vocab_size=vocab_size, signals=signals))


def make_optimizer(model, s):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": s["weight_decay"]},
                              {"params": others, "weight_decay": 0.0}],
                             lr=s["lr"], betas=(s["beta1"], s["beta2"]), fused=True)


def update(model, optimizer, scaler, s):
    """What follows a step's last backward pass. Returns the gradient's norm, a tensor: nothing waits for the GPU."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["grad_clip"] or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def train(args):
    # torchrun sets these; alone we are rank 0 of 1.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device()
    latest, best_path = (os.path.join(args.out, f"ckpt_{name}.pt") for name in ("latest", "best"))
    ckpt = load_file(latest) if args.resume else None
    if ckpt and not {"settings", "optimizer", "step", "data"} <= ckpt.keys():
        raise ValueError(f"{latest} was not written by train.py: it cannot be resumed")
    s, notes = settle(args, device.type == "cuda", ckpt)
    if s["grad_accum"] % world:
        raise ValueError(f"--grad_accum {s['grad_accum']} micro-batches cannot be shared by {world} processes: "
                         f"choose a multiple of {world}")

    # Data, model, optimizer
    meta, tokenizer, vocab_size = read_meta(args.data)
    if ckpt and ckpt["data"] != meta:
        raise ValueError(f"{args.data} is not the data this run began with: --resume needs the same, prepared the same "
                         "way")
    T, B = s["block_size"], s["batch_size"]
    (tokens, seen), (val_tokens, val_seen) = (read_tokens(os.path.join(args.data, f"{x}.bin"), vocab_size, T)
                                              for x in ("train", "val"))
    kept = ckpt.get("kept") if ckpt else None
    if s["vocab"] == "seen" and tokenizer == "gpt2" and not ckpt:
        try:
            kept = keep(np.union1d(seen, val_seen))
        except ConnectionError:
            raise ValueError("the GPT-2 vocabulary is neither cached nor reachable: go online once, or use --vocab full"
                             ) from None
        notes.append(f"Vocabulary: {len(kept):,} of GPT-2's {vocab_size:,} tokens, those that occur and what they are "
                     "made of")
    ids = renumber(kept) if kept else None
    config = model_config(s, len(kept) if kept else vocab_size)
    count = (len(tokens) - 1) // T
    if count < B:
        raise ValueError(f"{args.data} holds {count} windows of {T} tokens, fewer than --batch_size {B}")
    per_epoch = count // B  # micro-batches
    s["max_steps"] = s["max_steps"] or max(1, per_epoch // s["grad_accum"])
    # The same validation windows for every run: their choice has a seed of its own.
    chosen = np.random.default_rng(0).permutation((len(val_tokens) - 1) // T)[: s["val_sequences"]]

    torch.manual_seed(s["seed"])
    model = ModulatedLM.from_checkpoint(ckpt, latest) if ckpt else ModulatedLM(config)
    model.to(device).train()
    if ckpt:
        dtype, why = ckpt["dtype"], "as the run began"
    if args.dtype != "auto":
        dtype, why = args.dtype, "as --dtype says"
    elif not ckpt:
        dtype, why = choose_dtype(device, model, windows(tokens, [0], T, device, ids))
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    step, best = 0, math.inf
    if ckpt:
        optimizer.load_state_dict(ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        step, best = ckpt["step"], ckpt["best"]
        del ckpt

    if world > 1:  # CPU tensors go through gloo also beside GPUs: agreeing to stop then needs no GPU synchronisation
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        why_shared = [why, dtype]
        dist.broadcast_object_list(why_shared)  # timings differ between processes
        why, dtype = why_shared
    autocast = functools.partial(torch.autocast, device.type, DTYPES[dtype], enabled=dtype != "fp32")
    model.checkpoint_blocks = args.checkpoint_blocks
    run = torch.compile(model) if args.compile else model
    if world > 1:  # without a softmax over several tokens the salience query has no gradient
        run = DistributedDataParallel(run, find_unused_parameters=config.salience == "reactive")

    # Files: rank 0 alone writes. An earlier run in the same folder is set aside, not overwritten.
    log_file = None
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        log_path = os.path.join(args.out, "training.log")
        if not args.resume:
            for path in filter(os.path.exists, (log_path, latest, best_path)):
                os.makedirs(os.path.join(args.out, "previous"), exist_ok=True)
                os.replace(path, os.path.join(args.out, "previous", os.path.basename(path)))
                notes.append(f"Moved the earlier {path} to {os.path.join(args.out, 'previous')}")
        log_file = open(log_path, "a", encoding="utf-8")
    bar = tqdm(total=s["max_steps"], initial=step, unit="step", disable=rank > 0 or not sys.stderr.isatty())

    def log(message):
        if rank == 0:
            now = datetime.now()
            line = f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} [INFO] {message}"
            log_file.write(line + "\n")
            log_file.flush()
            bar.write(line)

    def batch(micro):
        epoch, place = divmod(micro, per_epoch)
        return windows(tokens, shuffled(s["seed"], epoch, count)[place * B : (place + 1) * B], T, device, ids)

    def total(values):
        """Sum over the processes."""
        if world > 1:
            dist.all_reduce(values)
        return values

    def save(path):
        if rank == 0:
            model.save(path, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, best=best,
                       settings=s, dtype=dtype, data=meta, tokenizer=tokenizer, kept=kept)

    @torch.no_grad()
    def validate():
        """Mean task loss over the chosen windows, each counted once whatever the number of processes."""
        model.eval()
        result, mine = torch.zeros(2, dtype=torch.float64, device=device), chosen[rank::world]
        for i in range(0, len(mine), B):
            with autocast():
                task = model(*windows(val_tokens, mine[i : i + B], T, device, ids)).task
            result += torch.stack([task.double(), task.new_ones((), dtype=torch.float64)]) * len(mine[i : i + B])
        model.train()
        result = total(result)
        return (result[0] / result[1]).item()

    received = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first asks for an orderly stop, a second one stops at once
        signal.signal(number, lambda n, frame: (received.append(n), signal.signal(n, signal.SIG_DFL)))

    def stop_if_asked():
        """Every process asks whether any of them was told to stop, so that all stop at the same place."""
        number = torch.tensor(received[0] if received else 0)
        if world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:  # the step under way is dropped: its gradients touched neither weights nor optimizer
            save(latest)
            log(f"Interrupted after step {step}: saved {latest}, go on with --resume")
            raise Interrupted(128 + int(number))

    sees_future = model.controller and config.salience == "global"
    future = " | global salience: sees the future, no likelihood" if sees_future else ""
    floor = meta.get("entropy_nats_per_token")
    for note in notes:
        log(note)
    whole, part = (sum(p.numel() for p in m.parameters()) if m else 0 for m in (model, model.controller))
    log(f"{whole:,} parameters, {part:,} of them the controller's | {device.type} x {world} | {kernels.path()}")
    log("Settings: " + " ".join(f"{name}={s[name]}" for name in (
        "signals", "salience", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "grad_accum", "lr", "seed")))
    log(f"{dtype}: {why}")
    log(f"{s['max_steps']:,} steps of {B * T * s['grad_accum']:,} tokens, from {args.data}: {len(tokens):,} tokens "
        f"({tokenizer}) to train on, {len(chosen)} windows to validate on")
    if future:
        log("Salience is global, as in the paper: every position sees the whole text, the future included. The loss is "
            "not a language model's likelihood, and exp(loss) no perplexity to compare with other models'.")
    if floor:
        log(f"These stories' own entropy is {floor:.4f} nats per token: no model can do better")

    sums, counted, clock, began_step = torch.zeros(2, device=device), 0, time.perf_counter(), step
    share = s["grad_accum"] // world
    # Reads the next micro-batch while this one is computed. A new thread would pin memory for the first GPU.
    loader = ThreadPoolExecutor(1, initializer=lambda: device.type == "cuda" and torch.cuda.set_device(device))
    ahead = loader.submit(batch, step * s["grad_accum"] + rank)
    while step < s["max_steps"]:
        rate = learning_rate(step + 1, s)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for j in range(share):
            stop_if_asked()
            micro = step * s["grad_accum"] + j * world + rank
            x, y = ahead.result()
            ahead = loader.submit(batch, micro + world)
            torch.manual_seed(int(np.random.SeedSequence((s["seed"], micro)).generate_state(1)[0]))  # for the dropout
            last = j == share - 1
            with run.no_sync() if world > 1 and not last else contextlib.nullcontext():  # gradients meet once per step
                with autocast():
                    loss = run(x, y)
                scaler.scale(loss.total / share).backward()
            sums += torch.stack([loss.task, loss.homeostatic]).detach()
            counted += 1
        norm = update(model, optimizer, scaler, s)
        step += 1
        bar.update()

        evaluate = step % s["eval_interval"] == 0 or step == s["max_steps"]
        if step % s["log_interval"] == 0 or evaluate or step == began_step + 1:
            task, homeostatic = (total(sums.clone()) / (counted * world)).tolist()
            healthy = total(torch.isfinite(norm).float()).item() == world or scaler.is_enabled()
            if not math.isfinite(task) or not healthy:
                left = f"the last good checkpoint is {latest}" if os.path.exists(latest) else "there is no checkpoint"
                log(f"Stopped: loss {task}, gradient norm {norm.item()} at step {step}")
                raise FloatingPointError(f"loss or gradient not finite at step {step}; {left}; try a lower --lr")
            now = time.perf_counter()
            speed = counted * world * B * T / (now - clock)
            done = step * s["grad_accum"]
            epoch, place = (done - 1) // per_epoch, (done - 1) % per_epoch + 1
            scale = scaler.get_scale() if scaler.is_enabled() else 1.0
            log(f"Step: {step} | Ep: {epoch + 1} [{place}/{per_epoch} ({100 * place / per_epoch:.1f}%)] | "
                f"Loss: {task:.4f} | Reg: {homeostatic:.4f} | PPL: {math.exp(min(task, 700)):.2f} | LR: {rate:.2e} | "
                f"Scale: {scale:.1f} | Tok/s: {speed:.0f}{future}")
            sums.zero_()
            counted, clock = 0, now
        if evaluate:
            result = validate()
            log(f"Validation Result: Loss: {result:.4f} | Perplexity: {math.exp(min(result, 700)):.4f}{future}")
            if floor:
                log(f"{result - floor:.4f} nats per token above the stories' entropy")
            if result < best:
                best = result
                save(best_path)
            save(latest)
            clock = time.perf_counter()
        if step == began_step + 1:
            began = time.perf_counter()
        elif step == began_step + 6:
            left = (time.perf_counter() - began) / 5 * (s["max_steps"] - step) / 60
            log(f"About {left:.1f} minutes to go, validation not counted")
    log("Training Complete.")
    bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# How fast, and what bounds it


def peak_memory(device, reset=False):
    """The highest number of bytes held so far, or since a reset: by the GPU, or by this process (Linux; else None)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), None)
    except OSError:
        return None


def flops_per_token(c):
    """
    Multiplications and additions of a training step, per token: 2 for each weight of a matrix product in the forward
    pass and 4 in the backward pass. The tied head counts once, the look-up of an embedding and the folded query and
    key of the controller not; attention looks over half of the context on average. 111 M at the paper's sizes.
    """
    controller = 2 * c.n_embd**2 + c.n_embd * c.ncn_hidden + 3 * c.n_layer * c.ncn_hidden if c.signals else 0
    blocks = c.n_layer * (12 * c.n_embd**2 + c.n_embd * c.block_size)
    return 6 * (blocks + c.vocab_size * c.n_embd + controller)


def memory_needed(c, rows, narrow):
    """
    Bytes at the peak of a training step on `rows` tokens, without what torch itself takes: weights, gradients and
    AdamW's two means (16 per parameter; 2 more for narrow copies), what the backward pass needs (counted in bytes per
    token and width, in fp32 and in bf16 or fp16; a static model keeps a fifth less), the gradient of the head's next
    micro-batch, and one chunk of logits.
    """
    parameters = (12 * c.n_layer * c.n_embd + c.vocab_size + c.block_size) * c.n_embd
    kept = 36 * c.n_layer + 29 if narrow else 62 * c.n_layer + 31
    logits = min(kernels.CHUNK, rows * c.vocab_size * (2 if narrow else 4))
    return parameters * (18 if narrow else 16) + rows * c.n_embd * kept + 4 * c.vocab_size * c.n_embd + logits


def bench(args):
    """
    Times training steps on random tokens, with the controller and without, and prints what bounds them. The vocabulary
    is that of the data, in full, or GPT-2's where there is none.
    """
    device = pick_device()
    s, _ = settle(args, device.type == "cuda", None)
    vocab_size = read_meta(args.data)[2] if os.path.exists(os.path.join(args.data, "meta.json")) else 50257
    config = model_config(s, vocab_size)
    B, T, d, V = s["batch_size"], config.block_size, config.n_embd, vocab_size
    x, y = torch.randint(V, (2, B, T), device=device)
    torch.manual_seed(s["seed"])
    model = ModulatedLM(config).to(device).train()
    dtype = args.dtype if args.dtype != "auto" else choose_dtype(device, model, (x[:1], y[:1]))[0]
    autocast = functools.partial(torch.autocast, device.type, DTYPES[dtype], enabled=dtype != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def timed(work):
        """Runs work; seconds until the device is done with it."""
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def stepper(model):
        optimizer = make_optimizer(model, s)
        model.checkpoint_blocks = args.checkpoint_blocks
        run = torch.compile(model) if args.compile else model

        def step():
            for _ in range(s["grad_accum"]):
                with autocast():
                    loss = run(x, y)
                scaler.scale(loss.total / s["grad_accum"]).backward()
            update(model, optimizer, scaler, s)
        return step, optimizer

    def row(name, value, note=""):
        print(f"{name:<28}{value:>12}   {note}", flush=True)

    print(f"{config.n_layer} layers, width {d}, {config.n_head} heads, vocabulary {V:,}; {s['grad_accum']} x {B} x {T} "
          f"random tokens per step; {dtype}" + ", compiled" * args.compile + ", blocks checkpointed"
          * args.checkpoint_blocks)
    print(torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
          f"| torch {torch.__version__} | {kernels.path()}")
    empty = peak_memory(device, reset=True)
    step, optimizer = stepper(model)
    timed(step)
    spent = timed(step)
    peak = empty and peak_memory(device)

    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    rate = 2 * n**3 / min(timed(lambda: a @ a) for _ in range(5))
    del a
    variants = {"with the controller" if config.signals else "--signals none": step}
    static = model_config(s | {"signals": "none"}, V)
    if config.signals:
        variants["--signals none"] = stepper(ModulatedLM(static).to(device).train())[0]
        timed(variants["--signals none"])
    repeat, rounds = max(1, round(1 / spent)), 7 if spent < 5 else 3
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            times[name].append(timed(lambda: [work() for _ in range(repeat)]) / repeat)
    tokens = s["grad_accum"] * B * T
    for name, work in variants.items():
        middle = statistics.median(times[name])
        flops = flops_per_token(config if work is step else static)
        row(name, f"{tokens / middle:,.0f}", f"tokens/s; {flops / 1e6:.0f} MFLOP per token, "
            f"{flops * tokens / middle / rate:.0%} of the measured {rate / 1e12:.3g} TFLOP/s")
    if config.signals:
        ratio = statistics.median(b / a for a, b in zip(*times.values()))
        row("the controller's share", f"{1 - ratio:.1%}", f"of a step, median of {rounds} alternated pairs")
    if peak:
        own = sum(4 * p.numel() for p in model.parameters())  # was there before the first step
        row("peak memory", f"{peak / 2**20:,.0f} MiB", f"{(peak - empty + own) / 2**20:,.0f} of them for training; "
            f"{memory_needed(config, B * T, dtype != 'fp32') / 2**20:,.0f} by the formula"
            + " without checkpointed blocks" * args.checkpoint_blocks)

    # Where the time goes: the same step, not compiled, stopped at its joints.
    parts = {"blocks and controller": [], "head and loss": [], "optimizer": []}
    for _ in range(4):
        def blocks():
            with autocast():
                out.extend(model.hidden(x))
        def head():
            with autocast():
                out.append(kernels.linear_cross_entropy(leaf, model.embed.weight, y))
            scaler.scale(out[-1]).backward()
        out = []
        forward = timed(blocks)
        leaf = out[0].detach().requires_grad_()
        parts["head and loss"].append(timed(head))
        parts["blocks and controller"].append(forward + timed(lambda: out[0].backward(leaf.grad)))
        parts["optimizer"].append(timed(lambda: update(model, optimizer, scaler, s)) / s["grad_accum"])
    middle = {name: statistics.median(spent[1:]) for name, spent in parts.items()}
    for name, spent in middle.items():
        row(name, f"{1e3 * spent:,.1f} ms", f"{spent / sum(middle.values()):.0%} of a micro-batch")
    del variants, work, step, optimizer, model, out, leaf

    # The head and its loss, ours and others, each from the memory the process holds before it.
    h, w = (torch.randn(*shape, device=device, dtype=DTYPES[dtype]) * 0.1 for shape in ((B * T, d), (V, d)))
    h, w, target = h.requires_grad_(), w.requires_grad_(), y.flatten()
    rivals = {"linear_cross_entropy, ours": kernels.linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=kernels.chunk(h, w))
        rivals["torch's, same chunks"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
    rivals["torch's, logits formed"] = lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t)
    spent, held = {name: [] for name in rivals}, dict.fromkeys(rivals, 0)
    for _ in range(4):
        for name, loss in rivals.items():
            before = peak_memory(device, reset=True)
            spent[name].append(timed(lambda: loss(h, w, target).backward()))
            h.grad = w.grad = None
            held[name] = max(held[name], before and peak_memory(device) - before or 0)
    for name in rivals:
        row(name, f"{1e3 * statistics.median(spent[name][1:]):,.1f} ms",
            f"forward and backward, {B * T:,} tokens" + (f"; {held[name] / 2**20:,.0f} MiB" if held[name] else ""))


def main():
    try:
        args = arguments()
        bench(args) if args.bench else train(args)
    except Interrupted as stop:
        return stop.args[0]
    except FloatingPointError as error:
        fail(error)
        return 1
    except (ValueError, OSError) as error:
        return fail(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
