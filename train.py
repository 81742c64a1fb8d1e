"""
Train an NCN on the tokens that prepare.py left in data/: on a CPU, a GPU, or several with torchrun.

    python train.py                                  # the preset that fits this machine
    python train.py --signals none --out out/static  # the same Transformer without a controller
    python train.py --resume                         # go on after Ctrl-C, a crash or a power cut
    python train.py --data b --init out/ckpt_best.pt --out out/b   # begin with these weights
    torchrun --nproc_per_node=2 train.py             # two processes share each step's micro-batches
    torchrun --nproc_per_node=2 --max-restarts=3 train.py --resume # and recover by themselves

A step is a few micro-batches, whose gradients add up before the weights move. Every random draw is
a function of the seed and the micro-batch's number: the order of the data, the dropout. So the step
is all the random state there is. A resumed run repeats the uninterrupted one bit for bit (on a
CPU), and two processes compute what one does.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: see join_processes
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import kernels
import prepare
from kernels import DEVICE_HELP, DEVICES, pick_device
from ncn import SALIENCE, ModulatedLM, NCNConfig, load_file
from prepare import command, complain, control_windows, read_labels, read_meta, read_tokens, windows
from sample import generate

# On the terminal and in OUT/training.log. Only rank 0 gives it handlers; elsewhere it is silent.
log = logging.getLogger("train")


# ---- Settings, each a flag of the same name ----------------------------------------------------
MODEL = asdict(NCNConfig())  # the paper's sizes are the defaults
MODEL["signals"] = "gain,precision,gate"
del MODEL["vocab_size"], MODEL["n_control"]  # the data decide
FIXED = {*MODEL, "rows", "start"}  # what a resumed run cannot change
PAPER = MODEL | dict(
    start="neutral", rows="contiguous", batch_size=16, grad_accum=4, max_steps=0, lr=6e-4,
    embed_lr=0.0, warmup_steps=100, beta1=0.9, beta2=0.999, weight_decay=0.1, grad_clip=1.0,
    eval_interval=500, val_sequences=3200, log_interval=20, seed=42)
LAPTOP = PAPER | dict(
    n_layer=3, n_head=4, n_embd=128, ncn_hidden=32, homeostatic_lambda=0.1, dropout=0.0,
    rows="aligned", batch_size=4, grad_accum=2, max_steps=2000, lr=3e-3, beta2=0.99,
    eval_interval=100, val_sequences=256, log_interval=10)
HELP = {
    "training": {
        "max_steps": "optimizer steps; 0: one epoch",
        "batch_size": "rows per micro-batch",
        "grad_accum": "micro-batches per optimizer step, over all processes",
        "lr": "peak learning rate; a cosine leads to 0 after the last step. A wider model wants a "
              "lower one: with 1,024 tokens a step 0.003 at width 128, 0.0016 at 192, 0.001 at 256",
        "embed_lr": "peak learning rate of the token and position embeddings, which a wider model "
                    "does not want lower; 0: as --lr",
        "seed": "of the weights, the data order and the dropout",
        "rows": "contiguous: the text cut every block_size tokens; aligned: a story each, padded",
    },
    "the controller": {
        "signals": "signals the controller drives, with commas; none: the plain Transformer",
        "salience": "what the controller sees: causal (the past), global (the past and the future, "
                    "as the paper trains), reactive (one token, pooled), token (one token, "
                    "without pooling), constant (nothing)",
        "homeostatic_lambda": "weight of the price for signals away from 1",
        "start": "of the signals: neutral (1, gate 0.95), or zero (the authors': precision 0.70, "
                 "gate 0.5)",
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
CHOICES = {"rows": ("contiguous", "aligned"), "start": ("neutral", "zero"), "salience": SALIENCE}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="%(prog)s [flags]",
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(complain(message))
    add = parser.add_argument_group("the run").add_argument
    add("--preset", choices=("auto", "paper", "laptop"), default="auto",
        help="auto: paper with a GPU, laptop without")
    add("--data", default="data", help="folder that prepare.py wrote (default: data)")
    add("--out", default="out", help="folder for training.log and checkpoints (default: out)")
    add("--resume", action="store_true",
        help="go on from OUT/ckpt_latest.pt with its settings; begin if there is none. With "
             "torchrun --max-restarts=3 a run recovers by itself; on several nodes, set "
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, too")
    add("--init", metavar="FILE",
        help="begin with this checkpoint's weights, on any data of its vocabulary, as a new run. "
             "With --lr 0 --max_steps 1 it is only validated")
    for title, flags in HELP.items():
        add = parser.add_argument_group(title).add_argument
        for name, text in flags.items():
            default = f"paper {PAPER[name]}, laptop {LAPTOP[name]}"
            if PAPER[name] == LAPTOP[name]:
                default = PAPER[name]
            add(f"--{name}", type=type(PAPER[name]), choices=CHOICES.get(name),
                help=f"{text} (default: {default})")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the matrix products; auto: bf16 where it is fast, on an older GPU fp16, else fp32")
    add("--checkpoint_blocks", action="store_true",
        help="keep only each block's input: less memory, more work")
    add("--compile", action="store_true", help="torch.compile the model: minutes to start")
    add("--no_record", action="store_true",
        help="on a GPU, launch each step's kernels one by one: slower; a model with .item() in it "
             "cannot be recorded")
    add("--bench", action="store_true",
        help="train nothing: time steps with and without the controller")
    return parser.parse_args()


def settings_of(args, on_gpu, saved=None):
    """-> the run's settings: a preset, or those of the checkpoint `saved`, overridden by the flags;
    and notes on them, lines for the log. Raises ValueError."""
    given = {name: getattr(args, name) for name in PAPER if getattr(args, name) is not None}
    preset = args.preset
    if preset == "auto":
        preset = "paper" if on_gpu else "laptop"
    settings = PAPER if preset == "paper" else LAPTOP
    notes = [f"Preset {preset}"]
    if saved:
        settings = PAPER | saved["settings"]  # an older one may lack some
        notes = []
    settings = settings | given
    for name in ("batch_size", "grad_accum", "log_interval", "eval_interval", "val_sequences"):
        if settings[name] < 1:
            raise ValueError(f"--{name} is {settings[name]}, it must be at least 1")
    for name in ("max_steps", "warmup_steps", "seed", "grad_clip", "lr", "embed_lr"):
        if settings[name] < 0:
            raise ValueError(f"--{name} is {settings[name]}, it must be 0 or more")
    return settings, notes


def changes(s, saved):
    """Notes on what a resumed run does otherwise than the checkpoint `saved`. Raises ValueError."""
    notes = []
    for name, old in saved["settings"].items():
        if s[name] == old:
            continue
        if name in FIXED:
            raise ValueError(f"--resume cannot change --{name}: it was {old}")
        notes.append(f"--{name} changed from {old} to {s[name]}")
    return notes


def config_of(s, vocab_size, n_control=0):
    """The model's config by these settings and the data."""
    sizes = {name: s[name] for name in MODEL}
    sizes["signals"] = () if s["signals"] == "none" else tuple(s["signals"].split(","))
    return NCNConfig(vocab_size=vocab_size, n_control=n_control, **sizes)


# ---- Several processes -------------------------------------------------------------------------
# torchrun starts them and sets RANK and WORLD_SIZE; alone, a process is rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Makes the processes a group. gloo carries CPU tensors, and NCCL a GPU's, where it can."""
    if WORLD == 1:
        return
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives a restart, and with it the addresses of processes that died.
        # So each attempt has keys of its own.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    # torch.distributed.nn is imported above. Left to torch.optim, that happens after this line, and
    # its functions keep the group as a default: never freed, its threads at times abort the exit.
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)


def sum_over_processes(tensor):
    """Replaces a tensor by its sum over all processes, and returns it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(work):
    """What work() returns on rank 0, on every process: only rank 0 needs the run's folder."""
    result = [work() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


class StopSign:
    """Ctrl-C and SIGTERM ask for an orderly stop. A second one ends the process at once. Of several
    processes it does not, since torchrun passes its own on."""

    def __init__(self):
        self.number = 0
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                number = getattr(signal, name)
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it: leave it so
                    signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.number and WORLD == 1:
            os._exit(128 + number)
        self.number = number

    def is_up(self):
        """Whether any process was asked to stop, so that all stop at the same step."""
        return sum_over_processes(torch.tensor(self.number)).item() > 0


# ---- The data ----------------------------------------------------------------------------------
@dataclass
class Split:
    """Tokens to train on, or to validate on. A row is a window of the text or a story."""

    tokens: np.ndarray  # (N,) uint16
    labels: tuple | None  # see prepare.read_labels
    rows: np.ndarray  # (R, 2): where a row begins, how many targets it has


def read_split(args, name, meta, s):
    """The split "train" or "val" of the data. Raises ValueError, OSError."""
    tokens = read_tokens(args.data, name, meta)
    rows = prepare.rows_of(tokens, s["block_size"], s["rows"] == "aligned")
    if name == "val":  # the same rows for every run: their choice has a seed of its own
        rows = rows[np.random.default_rng(0).permutation(len(rows))[: s["val_sequences"]]]
    return Split(tokens, read_labels(args.data, name, meta, tokens), rows)


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def rows_of_micro_batch(run, number):
    """The rows of micro-batch 0, 1, 2, ...: (B, 2). An epoch is the rows in an order of
    its own, less a rest that fills no micro-batch."""
    rows = run.train.rows
    size = run.settings["batch_size"]
    epoch, place = divmod(number, len(rows) // size)
    order = shuffled(run.settings["seed"], epoch, len(rows))
    return rows[order[place * size : (place + 1) * size]]


def targets_of_step(run):
    """How many targets the micro-batches of the next step have, on all processes together."""
    first = run.step * run.settings["grad_accum"]
    numbers = range(first, first + run.settings["grad_accum"])
    return sum(int(rows_of_micro_batch(run, number)[:, 1].sum()) for number in numbers)


def to_device(run, array):
    """A numpy array as a tensor on the run's device; nothing waits for the copy."""
    tensor = torch.from_numpy(array)
    if run.device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(run.device, non_blocking=True)


def fetch(run, split, rows):
    """Rows (B, 2) -> inputs and targets (B, T) int64, targets of -1 where a row is padded, and
    the control (B, T, n_control) float32 or None; on the device."""
    x, y = windows(split.tokens, rows, run.bucket)
    control = control_windows(split.labels, rows, run.bucket)
    if control is not None:
        control = to_device(run, control)
    return to_device(run, x), to_device(run, y), control


def batch(run, number, targets):
    """Micro-batch `number` of a step with so many targets: inputs, targets, its share of the step's
    (a scalar), control.

    For one row in ten the control is 0, so that the model learns to work without."""
    rows = rows_of_micro_batch(run, number)
    share = rows[:, 1].sum() / targets
    x, y, control = fetch(run, run.train, rows)
    if control is not None:
        rng = np.random.default_rng((run.settings["seed"], number, 1))
        keeps = rng.random((len(rows), 1, 1)) > 0.1
        control = control * to_device(run, keeps)
    return x, y, to_device(run, np.array(share, dtype=np.float32)), control


# ---- The run -----------------------------------------------------------------------------------
@dataclass
class Run:
    """All there is to a training run."""

    settings: dict  # of PAPER's names
    model: ModulatedLM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16's gradients; else it does nothing
    device: torch.device
    dtype: str  # of DTYPES
    records: bool  # whether micro-batches are recorded as CUDA graphs
    bucket: int  # rows are padded to a multiple of so many tokens
    meta: dict  # of the data, see prepare.py
    train: Split
    val: Split
    step: int = 0  # whole steps done
    best: float = math.inf  # the lowest validation loss, nats per token


def choose_dtype(device, config):
    """The name of the fastest safe dtype for such a model on this device, and why."""
    if device.type == "mps":
        return "fp32", "the safe choice, untried like all of mps"
    half = "bf16"
    size = 256
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 units"
        half = "fp16"
        size = 2048
    # For small models the number of weights decides, no timing, so that runs to be compared use the
    # same dtype.
    elif config.n_embd * (12 * config.n_layer * config.n_embd + config.vocab_size) < 1.5e6:
        return "fp32", "the casts of so small a model cost more than bf16 saves"
    # Has this device units for it? Without, a CPU's products take up to 100 times as long, and some
    # GPUs gain nothing.
    a = torch.randn(size, size, device=device)
    b = a.to(DTYPES[half])
    fp32 = min(seconds(lambda: a @ a) for _ in range(6))
    ratio = fp32 / min(seconds(lambda: b @ b) for _ in range(6))
    name = half if ratio > 1.5 else "fp32"
    return name, f"{half} products are {ratio:.2g} times as fast here, measured now"


def seconds(work):
    """Runs work; seconds until it is done, on a GPU too."""
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def make_run(args, settings, model, device, dtype, meta, train, val):
    """A run of this model on these data, at step 0."""
    named = dict(model.named_parameters())
    embeddings = [named.pop("embed.weight"), named.pop("position.weight")]
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    lr = settings["lr"]
    groups = [  # with their peak learning rates
        {"params": matrices, "peak": lr},
        {"params": embeddings, "peak": settings["embed_lr"] or lr},
        {"params": vectors, "peak": lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr, (settings["beta1"], settings["beta2"]), weight_decay=settings["weight_decay"],
        fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    model.to(device).train()
    model.checkpoint_blocks = args.checkpoint_blocks
    records = device.type == "cuda" and torch.version.cuda is not None  # not on ROCm
    # Checkpointing restores the random state, which a CUDA graph cannot record.
    records = records and not (args.checkpoint_blocks or args.no_record)
    bucket = 1
    if records or args.compile:  # few lengths, as each needs a graph or a compilation of its own
        bucket = 64 if settings["block_size"] % 64 == 0 else settings["block_size"]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a length needs several: train, validate, ...
        model.compile(dynamic=False)
    return Run(
        settings, model, optimizer, scaler, device, dtype, records, bucket, meta, train, val)


def new_model(args, s, config, meta, labels, initial):
    """The model of a new run: with the weights of the checkpoint `initial`, or by its seed."""
    model = ModulatedLM(config)
    if initial is not None:
        other = ModulatedLM.from_checkpoint(initial, args.init)
        of_checkpoint = identity(other.config, initial.get("data", {"tokenizer": "gpt2"}))
        for name, wanted in identity(config, meta).items():
            if of_checkpoint[name] != wanted:
                raise ValueError(f"--init {args.init} is another model: it has another {name}")
        model.load_state_dict(other.state_dict())
        return model
    if model.controller and s["start"] == "zero":
        torch.nn.init.zeros_(model.controller.layer2.bias)
    if labels is not None:
        # Scale the control's weights by 1 / std of its labels, so that units do not matter.
        std = torch.from_numpy(labels[0].astype(np.float32)).std(0, correction=0)
        model.controller.control.weight.data /= torch.where(std > 0, std, 1)
    return model


def identity(config, meta):
    """What two models must share, if one is to go on with the other's weights."""
    sizes = asdict(config)
    del sizes["dropout"], sizes["homeostatic_lambda"]
    return sizes | {"tokenizer": meta["tokenizer"], "vocabulary": meta.get("vocabulary")}


def read_start(args):
    """-> the data's metadata; the checkpoint to resume, or None; that of --init, or None.

    Raises ValueError, OSError."""
    latest = os.path.join(args.out, "ckpt_latest.pt")
    meta = read_meta(args.data)
    if not (args.resume and os.path.exists(latest)):
        initial = load_file(args.init) if args.init else None
        return meta, None, initial
    saved = load_file(latest)
    if not saved.keys() >= {"optimizer", "scaler", "settings", "data"}:
        raise ValueError(f"{latest} was not written by train.py: it cannot be resumed")
    if not prepare.same_data(saved["data"], meta):
        raise ValueError(f"{args.data} is not the data that {latest} began with")
    return meta, saved, None


def start_or_resume(args, device):
    """-> the run that the flags ask for, and notes for its log.

    Raises ValueError, OSError."""
    meta, saved, initial = from_rank_0(lambda: read_start(args))
    s, notes = settings_of(args, device.type == "cuda", saved)
    if args.resume and saved is None:
        notes.append(f"Nothing to resume in {args.out}: this run begins")
    config = config_of(s, meta["vocab_size"], len(meta.get("controls", ())))
    train = read_split(args, "train", meta, s)
    val = read_split(args, "val", meta, s)
    check_rows(args, s, train, val)
    if s["max_steps"] < s["warmup_steps"]:
        notes.append("max_steps is below warmup_steps: the peak learning rate is never reached")
    if saved:
        notes += changes(s, saved)
    torch.manual_seed(s["seed"])
    if saved is None:
        model = new_model(args, s, config, meta, train.labels, initial)
    else:
        model = ModulatedLM.from_checkpoint(saved, args.out)
    dtype, why = args.dtype, "as --dtype says"
    if dtype == "auto" and saved:
        dtype, why = saved["dtype"], "as the run began"
    elif dtype == "auto":
        dtype, why = from_rank_0(lambda: choose_dtype(device, config))
    notes.append(f"{dtype}: {why}")
    run = make_run(args, s, model, device, dtype, meta, train, val)
    if saved:
        # The moments alone: betas and weight decay are the flags'.
        moments = {"state": saved["optimizer"]["state"]}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | moments)
        if saved["dtype"] == dtype:
            run.scaler.load_state_dict(saved["scaler"])
        run.step = saved["step"]
        run.best = saved["best"]
    return run, notes


def check_rows(args, s, train, val):
    """Makes a max_steps of 0 one epoch's steps. Raises ValueError where there is too little text,
    or where processes cannot share a step evenly."""
    if s["grad_accum"] % WORLD:
        raise ValueError(f"--grad_accum {s['grad_accum']} micro-batches cannot be shared by "
                         f"{WORLD} processes: choose a multiple of {WORLD}")
    micro_batches = len(train.rows) // s["batch_size"]
    if micro_batches == 0 or len(val.rows) == 0:
        raise ValueError(
            f"{args.data} holds {len(train.rows)} rows of up to {s['block_size']} tokens to train "
            f"on, {len(val.rows)} to validate on: too few for --batch_size {s['batch_size']}; "
            "prepare more text or lower --block_size")
    if s["max_steps"] == 0:
        s["max_steps"] = max(1, micro_batches // s["grad_accum"])


# ---- A step ------------------------------------------------------------------------------------
def autocast(run):
    return torch.autocast(run.device.type, DTYPES[run.dtype], enabled=run.dtype != "fp32")


def micro_batch(run, x, y, share, control=None):
    """Forward and backward pass of some rows, see batch; gradients add up over a step.

    -> the task and the homeostatic loss times the share, (2,). Over a step they add up to its mean
    per target, however it is cut into micro-batches."""
    with autocast(run):
        loss = run.model(x, y, control=control)
    run.scaler.scale(loss.total * share).backward()
    return torch.stack([loss.task, loss.homeostatic]).detach() * share


def recorded(run):
    """micro_batch of this run as CUDA graphs: a thousand small kernels launched at once, since a
    large GPU runs them in less time than Python takes to launch them.

    A graph has one row length. All are recorded before the first step: recording runs micro-batches
    first, with a share of 0, and then sets the gradients to 0."""
    longest = run.model.config.block_size
    lengths = [longest]
    if run.settings["rows"] == "aligned":
        lengths = range(run.bucket, longest + 1, run.bucket)
    graphs = {}
    pool = torch.cuda.graph_pool_handle()
    for length in lengths:
        rows = np.array([[0, length]] * run.settings["batch_size"])
        x, y, control = fetch(run, run.train, rows)
        inputs = [x, y, torch.zeros((), device=run.device), control]
        for _ in range(2):  # whatever compiles or allocates does so now
            micro_batch(run, *inputs)
        run.model.zero_grad(set_to_none=False)  # a graph adds to these very tensors
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(run.device)
        # The mode lets other threads of torch allocate meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            losses = micro_batch(run, *inputs)
        graphs[length] = graph, inputs, losses

    def replay(*new):
        graph, inputs, losses = graphs[new[0].size(1)]
        for old, value in zip(inputs, new, strict=True):
            if old is not None:
                old.copy_(value)
        graph.replay()
        return losses
    return replay


def schedule(step, s):
    """The share of the peak learning rate at step 1, 2, ..., max_steps: linear warm-up, then a
    cosine, 0 only after the last step."""
    if step <= s["warmup_steps"]:
        return step / s["warmup_steps"]
    progress = (step - s["warmup_steps"]) / (s["max_steps"] + 1 - s["warmup_steps"])
    return 0.5 * (1 + math.cos(math.pi * progress))


def update(run):
    """Moves the weights by the gradients of all processes. -> the gradients' norm, a tensor."""
    for p in run.model.parameters():
        if p.grad is not None:
            sum_over_processes(p.grad)  # each process has weighted its own by its share
    run.scaler.unscale_(run.optimizer)
    clip = run.settings["grad_clip"] or math.inf
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=not run.records)
    return norm


def train_steps(run):
    """Trains without end; after each step yields the nats of this process's micro-batches (2,), the
    targets of all processes, and the gradient's norm. Nothing waits for a GPU, except fp16's
    scaler."""
    compute = functools.partial(micro_batch, run)
    if run.records:
        try:
            compute = recorded(run)
        except RuntimeError as error:
            log.info(f"Not recorded, so launched kernel by kernel: {str(error).splitlines()[0]}")
            run.records = False
            run.optimizer.zero_grad()
    accum = run.settings["grad_accum"]
    while True:
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(run.step + 1, run.settings)
        targets = targets_of_step(run)
        losses = torch.zeros(2, device=run.device)
        first = run.step * accum
        for number in range(first + RANK, first + accum, WORLD):  # this process's micro-batches
            seed = np.random.SeedSequence((run.settings["seed"], number)).generate_state(1)[0]
            torch.manual_seed(int(seed))  # of the dropout
            losses += compute(*batch(run, number, targets))
        norm = update(run)
        run.step += 1
        yield losses * targets, targets, norm


# ---- Validation, checkpoints, the log ----------------------------------------------------------
@torch.no_grad()
def validate(run):
    """-> task loss in nats per target, the same without the control, and targets per story.

    Each row counts once, whatever the number of processes."""
    run.model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # nats, those without control, targets, stories
    size = run.settings["batch_size"]
    mine = run.val.rows[RANK::WORLD]
    for i in range(0, len(mine), size):
        x, y, control = fetch(run, run.val, mine[i : i + size])
        with autocast(run):
            loss = run.model(x, y, control=control).task
            without_control = loss if control is None else run.model(x, y).task
        n = (y >= 0).sum()
        stories = (y == run.meta["vocab_size"] - 1).sum()  # END is the last token
        sums += torch.stack([loss * n, without_control * n, n, stories]).cpu()
    run.model.train()
    nats, without_control, targets, stories = sum_over_processes(sums).tolist()
    return nats / targets, without_control / targets, targets / max(stories, 1)


def save(args, run, name):
    """Writes a checkpoint into the run's folder, on rank 0. But not where a weight or one of its
    moments is not finite: then the earlier one stays."""
    if RANK > 0:
        return
    tensors = list(run.model.parameters())
    for moments in run.optimizer.state.values():
        tensors += moments.values()
    if not all(tensor.isfinite().all() for tensor in tensors):
        log.info(f"{name} is not written: the weights or their moments are not finite")
        return
    run.model.save(
        os.path.join(args.out, name), optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(), step=run.step, best=run.best, settings=run.settings,
        dtype=run.dtype, data=run.meta)


def remark(run):
    """What every logged loss of a `global` model must say."""
    if run.model.controller and run.model.config.salience == "global":
        return " | global salience: sees the future, no likelihood"
    return ""


def evaluate(args, run):
    """Validates, says what came out, and saves the run."""
    loss, without_control, targets_per_story = validate(run)
    log.info(f"Validation Result: Loss: {loss:.4f} | Perplexity: {math.exp(min(loss, 700)):.4f}"
             + remark(run))
    if run.model.config.n_control:
        worth = without_control - loss
        log.info(f"Without the control: {without_control:.4f}, so it is worth {worth:.4f} nats per "
                 "token")
    if "entropy_nats_per_story" in run.meta:
        above = loss * targets_per_story - run.meta["entropy_nats_per_story"]
        log.info(f"Above the stories' entropy: {above / targets_per_story:.4f} nats per token, "
                 f"{above:.2f} per story")
    if loss < run.best:
        run.best = loss
        save(args, run, "ckpt_best.pt")
    save(args, run, "ckpt_latest.pt")


def show_sample(run):
    """What the model writes by now, so that one sees it learn."""
    with contextlib.suppress(ConnectionError):  # where GPT-2's vocabulary is out of reach
        tokenizer = prepare.tokenizer_of(run.meta)
        end = tokenizer.eot_token
        start = torch.tensor([[end]], device=run.device)
        ids = generate(run.model, start, 30, temperature=0.5, seed=0, end_token=end)
        tqdm.write("    " + " ".join(tokenizer.decode(ids[0, 1:].tolist()).split()[:20]))


class Meter:
    """Losses and time since the last log line."""

    def __init__(self, run):
        self.nats = torch.zeros(2, device=run.device)  # task, homeostatic
        self.targets = 0
        self.clock = time.perf_counter()

    def log(self, run, norm):
        """Writes the paper's log line. Raises FloatingPointError for a loss or a gradient that
        is not finite."""
        task, homeostatic = (sum_over_processes(self.nats) / self.targets).tolist()
        # fp16's norm may be infinite: the scaler then leaves the step out.
        if not math.isfinite(task) or not (norm.isfinite() or run.scaler.is_enabled()):
            raise FloatingPointError(f"loss {task}, gradient norm {norm.item()}, try a lower --lr")
        speed = self.targets / (time.perf_counter() - self.clock)
        per_epoch = len(run.train.rows) // run.settings["batch_size"]
        epoch, place = divmod(run.step * run.settings["grad_accum"] - 1, per_epoch)
        done = place + 1
        log.info(f"Step: {run.step} | Ep: {epoch + 1} [{done}/{per_epoch} ({done / per_epoch:.1%})]"
                 f" | Loss: {task:.4f} | Reg: {homeostatic:.4f} "
                 f"| PPL: {math.exp(min(task, 700)):.2f} "
                 f"| LR: {run.optimizer.param_groups[0]['lr']:.2e} "
                 f"| Scale: {run.scaler.get_scale():.1f} | Tok/s: {speed:.0f}{remark(run)}")


def open_log(args, resumes):
    """Opens the log. Unless this run resumes, moves an earlier one to OUT/previous/N first."""
    log.setLevel(logging.INFO)
    log.propagate = False
    number = 1
    while os.path.exists(f"{args.out}/previous/{number}"):
        number += 1
    for name in ("training.log", "ckpt_latest.pt", "ckpt_best.pt"):
        if os.path.exists(f"{args.out}/{name}") and not resumes:
            # This makes the folders, too.
            os.renames(f"{args.out}/{name}", f"{args.out}/previous/{number}/{name}")
    file = logging.FileHandler(f"{args.out}/training.log", encoding="utf-8")
    log.handlers = [file, logging.StreamHandler(sys.stdout)]
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))


def describe(args, run, notes):
    """The log's first lines: what is trained, on what, where."""
    s = run.settings
    c = run.model.config
    count = sum(p.numel() for p in run.model.parameters())
    of_controller = 0
    if run.model.controller:
        of_controller = sum(p.numel() for p in run.model.controller.parameters())
        # One more hidden unit costs 2 d + 1 weights per layer.
        n_ffn = (c.n_ffn or 4 * c.n_embd) + round(of_controller / c.n_layer / (2 * c.n_embd + 1))
        notes.append(f"A static model of this size: --signals none --n_ffn {n_ffn}")
    for note in notes:
        log.info(note)
    log.info(f"{count:,} parameters, {of_controller:,} of them the controller's | "
             f"{run.device.type} x {WORLD} | {kernels.backend(run.device)}")
    names = [name for name in PAPER if not name.endswith("_interval")]
    log.info("Settings: " + " ".join(f"{name}={s[name]}" for name in names))
    log.info(f"Data: {args.data} sha256={run.meta['train_sha256'][:12]} "
             f"tokenizer={run.meta['tokenizer']} vocab_size={c.vocab_size} "
             f"n_control={c.n_control} {' '.join(run.meta.get('controls', ()))}".rstrip())
    tokens = run.train.rows[:, 1].mean() * s["batch_size"] * s["grad_accum"]
    log.info(f"{s['max_steps']:,} steps of {tokens:,.0f} tokens, {len(run.val.rows)} rows to "
             "validate on")
    if "entropy_nats_per_story" in run.meta:
        log.info(f"These stories' own entropy is {run.meta['entropy_nats_per_story']:.2f} nats per "
                 f"story, {run.meta['entropy_nats_per_token']:.4f} per token: no model does better")


# ---- The loop ----------------------------------------------------------------------------------
def train(args, device):
    """Trains from the first step, or that of a checkpoint, to the last."""
    run, notes = start_or_resume(args, device)
    stop = StopSign()
    with contextlib.ExitStack() as stack:
        if RANK == 0:
            stack.enter_context(prepare.locked(args.out))
            open_log(args, resumes=run.step > 0)
            stack.enter_context(logging_redirect_tqdm([log]))
        describe(args, run, notes)
        try:
            loop(args, run, stop)
        except Exception as error:
            rescue(args, run, error)
            raise
        log.info("Training Complete.")


def loop(args, run, stop):
    """Trains to the last step; now and then logs, validates and saves."""
    s = run.settings
    first = run.step + 1
    steps = train_steps(run)
    meter = Meter(run)
    estimated = False
    on_terminal = RANK == 0 and sys.stderr.isatty()
    with tqdm(total=s["max_steps"], initial=run.step, unit="step", disable=not on_terminal) as bar:
        while run.step < s["max_steps"]:
            if stop.is_up():
                save(args, run, "ckpt_latest.pt")
                log.info(f"Interrupted after step {run.step}: go on with --resume")
                sum_over_processes(torch.zeros(1))  # a barrier: when one exits, torchrun ends all
                # The number is 0 where another process was asked.
                raise SystemExit(128 + (stop.number or signal.SIGTERM))
            nats, targets, norm = next(steps)
            meter.nats += nats
            meter.targets += targets
            bar.update()
            evaluates = run.step % s["eval_interval"] == 0 or run.step == s["max_steps"]
            if evaluates or run.step % s["log_interval"] == 0 or run.step == first:
                meter.log(run, norm)
                if run.step > first and not estimated:
                    estimated = True
                    per_step = (time.perf_counter() - meter.clock) / (run.step - first)
                    minutes = per_step * (s["max_steps"] - run.step) / 60
                    log.info(f"About {minutes:.1f} minutes to go, without validation")
                if evaluates:
                    evaluate(args, run)
                    if on_terminal:
                        show_sample(run)
                meter = Meter(run)


def rescue(args, run, error):
    """After an error (a full disk, no memory, a bug): says so, and saves the last whole step."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, FloatingPointError):  # analyze.py reads this line
        log.info(f"Stopped: {reason} at step {run.step}")
    else:
        log.info(f"Failed after step {run.step}: {reason}")
    # Not of several GPUs: to read the weights, they might wait for one that has died.
    if WORLD == 1 or run.device.type == "cpu":
        save(args, run, "ckpt_latest.pt")


# ---- How fast ----------------------------------------------------------------------------------
def bench(args, device):
    """Prints how fast steps on random tokens are, with the controller and without, alternately."""
    s, _ = settings_of(args, device.type == "cuda")
    s = s | {"rows": "contiguous", "max_steps": 10**9}  # the schedule wants an end
    vocab_size = 50257  # GPT-2's
    size = (s["batch_size"] + 1) * s["block_size"]
    tokens = np.random.default_rng(0).integers(vocab_size, size=size)
    rows = prepare.rows_of(tokens, s["block_size"])
    data = Split(tokens, None, rows)
    dtype = args.dtype
    if dtype == "auto":
        dtype, _ = choose_dtype(device, config_of(s, vocab_size))
    steps = {}
    peak = 0  # of memory, in bytes, with the controller
    for name, signals in (("with the controller", s["signals"]), ("--signals none", "none")):
        config = config_of(s | {"signals": signals}, vocab_size)
        run = make_run(args, s, ModulatedLM(config), device, dtype, {}, data, data)
        steps[name] = train_steps(run)
        next(steps[name])  # what is allocated or compiled at first use
        if name == "with the controller":
            peak = kernels.peak_memory(device)
    times = {name: [] for name in steps}
    for _ in range(7):
        for name, step in steps.items():
            times[name].append(seconds(functools.partial(next, step)))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, "
          f"{kernels.backend(device)}")
    for name, measured in times.items():
        speed = s["grad_accum"] * rows[:, 1].sum() / statistics.median(measured)
        print(f"{name:20}{speed:>12,.0f} tokens/s")
    both = zip(*times.values(), strict=True)
    share = statistics.median(1 - static / modulated for modulated, static in both)
    print(f"{'the controller':20}{share:>12.1%} of a step\n"
          f"{'peak memory':20}{peak >> 20:>12,} MiB")


@command
def main():
    args = arguments()
    device = pick_device(args.device)
    join_processes(device)
    try:
        if args.bench:
            bench(args, device)
        else:
            train(args, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
