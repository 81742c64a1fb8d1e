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
import sys
import time
from dataclasses import asdict, fields
from datetime import datetime

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
from ncn import NCNConfig, ModulatedLM, load_file
from prepare import fail

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
    """The file's uint16 tokens, memory-mapped, checked to be within the vocabulary."""
    if not os.path.isfile(path):
        raise ValueError(f"no {path}: run prepare.py first")
    if os.path.getsize(path) % 2:
        raise ValueError(f"{path} has an odd number of bytes, it is cut short: run prepare.py again")
    if os.path.getsize(path) // 2 <= block_size:
        raise ValueError(f"{path} holds {os.path.getsize(path) // 2} tokens, fewer than a window of {block_size} + 1: "
                         "prepare more text or lower --block_size")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    highest = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
    if highest >= vocab_size:
        raise ValueError(f"{path} holds token id {highest}, beyond the vocabulary of {vocab_size}: "
                         "run prepare.py again")
    return tokens


def windows(tokens, which, block_size, device):
    """Windows number `which` of the tokens -> inputs and targets, the same shifted by one; (B, T) int64 each."""
    rows = np.stack([tokens[i * block_size : (i + 1) * block_size + 1] for i in which]).astype(np.int64)
    rows = torch.from_numpy(rows)
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
        settings, notes = dict(ckpt["settings"]), []
        changed = {name for name in given if given[name] != settings[name]}
        if refused := sorted(changed & set(MODEL)):
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
    for name in ("beta1", "beta2"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"--{name} is {settings[name]}, it must be in [0, 1)")
    return settings, notes


def train(args):
    # torchrun sets these; alone we are rank 0 of 1.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() \
        else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")

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
    signals = tuple(filter(None, s["signals"].replace("none", "").split(",")))
    config = NCNConfig(**{name: s[name] for name in MODEL if name in s} | dict(vocab_size=vocab_size, signals=signals))
    T, B = config.block_size, s["batch_size"]
    tokens, val_tokens = (read_tokens(os.path.join(args.data, f"{x}.bin"), vocab_size, T) for x in ("train", "val"))
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
        dtype, why = choose_dtype(device, model, windows(tokens, [0], T, device))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": s["weight_decay"]},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=s["lr"], betas=(s["beta1"], s["beta2"]), fused=True)
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

    def total(values):
        """Sum over the processes."""
        if world > 1:
            dist.all_reduce(values)
        return values

    def save(path):
        if rank == 0:
            model.save(path, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, best=best,
                       settings=s, dtype=dtype, data=meta, tokenizer=tokenizer)

    @torch.no_grad()
    def validate():
        """Mean task loss over the chosen windows, each counted once whatever the number of processes."""
        model.eval()
        result, mine = torch.zeros(2, dtype=torch.float64, device=device), chosen[rank::world]
        for i in range(0, len(mine), B):
            with autocast():
                task = model(*windows(val_tokens, mine[i : i + B], T, device)).task
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
    while step < s["max_steps"]:
        rate = learning_rate(step + 1, s)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for j in range(share):
            stop_if_asked()
            micro = step * s["grad_accum"] + j * world + rank
            epoch, place = divmod(micro, per_epoch)
            x, y = windows(tokens, shuffled(s["seed"], epoch, count)[place * B : (place + 1) * B], T, device)
            torch.manual_seed(int(np.random.SeedSequence((s["seed"], micro)).generate_state(1)[0]))  # for the dropout
            last = j == share - 1
            with run.no_sync() if world > 1 and not last else contextlib.nullcontext():  # gradients meet once per step
                with autocast():
                    loss = run(x, y)
                scaler.scale(loss.total / share).backward()
            sums += torch.stack([loss.task, loss.homeostatic]).detach()
            counted += 1
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s["grad_clip"] or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step += 1
        bar.update()

        evaluate = step % s["eval_interval"] == 0 or step == s["max_steps"]
        if step % s["log_interval"] == 0 or evaluate or step == began_step + 1:
            task, homeostatic = (total(sums.clone()) / (counted * world)).tolist()
            healthy = total(torch.isfinite(norm).float()).item() == world or scaler.is_enabled()
            if not math.isfinite(task) or not healthy:
                kept = f"the last good checkpoint is {latest}" if os.path.exists(latest) else "there is no checkpoint"
                log(f"Stopped: loss {task}, gradient norm {norm.item()} at step {step}")
                raise FloatingPointError(f"loss or gradient not finite at step {step}; {kept}; try a lower --lr")
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


def main():
    try:
        train(arguments())
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
