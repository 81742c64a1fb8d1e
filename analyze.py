"""
See how a run went, what the controller does, and whether it helps.

    python analyze.py                                  # out/training.log: convergence and sample efficiency
    python analyze.py a/training.log b/training.log    # the same, with the runs laid over each other
    python analyze.py --scan "Timmy wanted an apple. He looked in the box, but it was empty."
    python analyze.py --audit                          # what each signal is worth, on the validation data

Losses are in nats per token everywhere. What the words mean:

Verdict (paper, section 4.1.2): a straight line is fitted by least squares to the logged losses of the last 15% of the
steps. A slope within 0.001 nats per 1,000 steps of zero is "Converged", a falling line "Still improving", a rising one
"Diverging". But noise blurs slopes: 120 points that scatter by 0.05 nats over 2,400 steps give the slope a standard
error of 0.007 nats per 1,000 steps, seven times the threshold, so that a perfectly flat run would hardly ever pass.
So the slope comes with its 98% interval (Student's t, wider where neighbouring errors correlate). If the interval
holds zero, the log shows no trend, which is "Converged" too, provided that the interval is informative: narrower than
the threshold, or allowing a drift over the window below the scatter of single points. Else the slope alone decides,
and the verdict says that it is uncertain. Below 5 points it is "Undecided". One flat run in fifty is called moving by
chance. A run that ends in a NaN or infinite loss is "Diverging". And a run whose learning rate falls to 0 flattens
because of that: "Converged" does not say that more training would not help.

Sample efficiency (section 5.2): L(s) = a + b s^-c, a >= 0, is fitted by least squares to the smoothed loss, which here
is the mean over bins of equal width in log s: unlike a moving average it does not lag behind the steep start. The 95%
and 99% steps are where it has first made that share of its total improvement (first value to lowest); between them
lies the active phase. The paper does not define its index. Ours: the Sample Efficiency Index is the mean, over the
steps of the run, of the share of the total improvement already made (1: all at once; 0.5: a straight line).
"""

import argparse
import math
import os
import re
import sys
import textwrap

import matplotlib
matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from ncn import SIGNALS, ModulatedLM, load_file
from prepare import fail, get_tokenizer
from train import read_meta, read_tokens, renumber, windows

# Okabe and Ito's colours stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #56B4E9".split()
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.spines.top": False,
                     "legend.fontsize": 8.5, "legend.framealpha": 0.9, "figure.constrained_layout.use": True})


def save(fig, folder, name):
    """Writes the picture, 1000 pixels wide, under a temporary name first, so that no half picture is ever left."""
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder or ".", exist_ok=True)
        fig.savefig(path + ".part", format="png", dpi=100)
        os.replace(path + ".part", path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from None
    finally:
        plt.close(fig)
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")
    print(f"wrote {path}")


def table(head, rows):
    """Prints rows of strings under their head, all but the first to the right; there, "nan" becomes a dash."""
    rows = [[name, *("-" if cell.lstrip("+-") == "nan" else cell for cell in row)] for name, *row in rows]
    width = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, ["-" * w for w in width], *rows]:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, width))).rstrip())


def title(run):
    """The run's name and settings, in lines that fit 1000 pixels."""
    return textwrap.fill(f"{run['name']} | {run['settings']}".rstrip(" |"), 130).replace("$", r"\$")


# ----------------------------------------------------------------------------------------------------------------------
# Logs

NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))"
LINE = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)[,.](\d{3}) \[INFO\] (.*)")
STEP = re.compile(r"Step: (\d+) \|.*?\| Loss: " + NUMBER + r" \|(?:.*?Tok/s: " + NUMBER + ")?", re.I)
VALIDATION = re.compile(r"Validation Result: Loss: " + NUMBER + r"(?: \||$)", re.I)
STOPPED = re.compile(r"Stopped: loss .* at step (\d+)")  # train.py's last words when a loss is not finite
SETTINGS = re.compile(r"(Preset|[\d,]+ (?:parameters|steps)|Settings:).+")
TOKENS = re.compile(r"steps of ([\d,]+) tokens")


def read_log(path):
    """
    Reads a training.log, ours or the authors' (the format is train.py's); lines of other kinds are skipped.

    Returns a dict: name, path, settings (str), future (bool: global salience), notes (list of str); of the rows with
    a finite loss step (N,) int64, loss (N,) nats, tokens (N,), minutes (N,) of training, from the logged speeds, so
    without validation and pauses; val, a list of (step, loss); broke, the step of a non-finite end or None.
    Where steps go back, a run was resumed: the later lines win. Where they go back to the start, a second run was
    appended: the last run counts, and a note says so. Raises OSError, and ValueError for a file with no training step.
    """
    events, settings, future = [], {}, False
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in filter(None, map(LINE.match, file)):
                day, clock, ms, text = line.groups()
                if m := STEP.match(text):
                    events.append((int(m[1]), float(m[2]), float(m[3] or "nan"), f"{day}T{clock}.{ms}"))
                    future = "sees the future" in text
                elif m := VALIDATION.match(text):
                    events.append(float(m[1]))
                elif m := STOPPED.match(text):
                    events.append((int(m[1]), math.nan, math.nan, f"{day}T{clock}.{ms}"))
                elif m := SETTINGS.match(text):
                    settings[m[1].split()[-1]] = text
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror}): train first, or name a training.log") from None
    steps = [e[0] for e in events if isinstance(e, tuple)]
    if not steps:
        raise ValueError(f"{path} holds no training step: it is not a log of train.py's, or of a run that just began")

    rows, val, runs, seen = [], [], 1, 0
    for event in events:
        if isinstance(event, float):
            val += [(rows[-1][0], event)] if rows and math.isfinite(event) else []
            continue
        seen += 1
        if rows and event[0] <= rows[-1][0]:
            # A run that starts afresh logs its first step no later than one logging interval after zero.
            interval = steps[seen] - event[0] if seen < len(steps) else 0
            afresh = event[0] < rows[-1][0] and event[0] <= max(rows[0][0], interval)
            rows, val = ([x for x in kept if x[0] < event[0] and not afresh] for kept in (rows, val))
            runs += afresh
        rows.append(event)

    step, loss, speed = (np.array(x) for x in list(zip(*rows))[:3])
    seconds = np.diff(np.array([r[3] for r in rows], dtype="datetime64[ms]")).astype(float) / 1000
    # Tokens per step: as the log says, else the usual speed x time per step.
    guess = speed[1:] * seconds / np.diff(step)
    stated, guess = TOKENS.search(settings.get("steps", "")), guess[np.isfinite(guess)]
    tokens = int(stated[1].replace(",", "")) if stated else np.median(guess) if len(guess) else math.nan
    usual = np.median(speed[speed > 0]) if (speed > 0).any() else math.nan
    minutes = np.cumsum(np.diff(step, prepend=0) * tokens / np.where(speed > 0, speed, usual)) / 60
    fine = np.isfinite(loss)
    if not fine.any():
        raise ValueError(f"{path}: every logged loss is NaN or infinite, there is nothing to draw")
    notes = [f"{runs} runs in one file, this is the last"] * (runs > 1)
    notes += [f"{(~fine).sum()} rows with a NaN or infinite loss left out"] * (not fine.all())
    notes += ["global salience: the loss sees the future and is no likelihood"] * future
    if not settings and not future:
        notes.append("the log does not name its settings: if its salience was global, its loss is no likelihood")
    folder, stem = os.path.split(os.path.splitext(os.path.abspath(path))[0])
    name = os.path.basename(folder) if stem == "training" else os.path.join(os.path.basename(folder), stem)
    return dict(name=name, path=path, settings=" | ".join(settings.values()), future=future, notes=notes, val=val,
                step=step[fine], loss=loss[fine], tokens=tokens * step[fine], minutes=minutes[fine],
                broke=None if fine[-1] else int(step[-1]))


def ewma(y, span):
    """Exponentially weighted mean, alpha = 2 / (span + 1), without bias towards the first value. y (N,) -> (N,)."""
    keep, top, bottom, out = 1 - 2 / (span + 1), 0.0, 0.0, np.empty(len(y))
    for i, value in enumerate(y):
        top, bottom = keep * top + value, keep * bottom + 1
        out[i] = top / bottom
    return out


def verdict(run, threshold=0.001, tail=0.15, z=2.326):
    """
    The verdict as the head of this file defines it. Returns a dict: verdict, why (str); slope and half, the half width
    of its 98% interval (nats per 1,000 steps; NaN below 5 points); first, the window's first step; and the fitted
    line's middle: step and level (nats).
    """
    first = run["step"][-1] - tail * (run["step"][-1] - run["step"][0])
    x, y = (run[k][run["step"] >= first] for k in ("step", "loss"))
    n, d = len(x), (x - x.mean()) / 1000
    slope = d @ y / (d @ d) if n > 1 else math.nan
    rest = y - y.mean() - slope * d
    half, f = math.nan, n - 2  # degrees of freedom
    if n >= 5:
        scatter = math.sqrt(rest @ rest / f)
        # Neighbours that err together count as fewer points: the usual first-order correction.
        r = min(max(rest[1:] @ rest[:-1] / (rest @ rest), 0), 0.9) if scatter else 0
        t = z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)  # Student's t from the normal z
        half = t * scatter / math.sqrt(d @ d) * math.sqrt((1 + r) / (1 - r))
    trend = "Converged" if abs(slope) < threshold else "Still improving" if slope < 0 else "Diverging"
    if run["broke"] is not None:
        name, why = "Diverging", f"the loss is not finite at step {run['broke']:,}"
    elif n < 5:
        name, why = "Undecided", f"the last 15% of the steps hold {n} logged point{'s' * (n > 1)}, 5 are needed"
    elif trend != "Converged" and abs(slope) > half:
        name, why = trend, "the slope's interval excludes zero"
    elif half < threshold:
        name, why = "Converged", f"the slope is below {threshold} nats per 1,000 steps"
    elif half * (d[-1] - d[0]) <= scatter:
        name, why = "Converged", f"no trend, though noise would hide up to {half:.2g} nats per 1,000 steps"
    else:
        name, why = trend, f"uncertain: by the slope alone, {n} points are too few for their noise"
    return dict(verdict=name, why=why, slope=slope, half=half, first=first, step=x.mean(), level=y.mean())


def perplexity_axis(ax, run):
    """A second axis on the right: exp(loss) at round numbers, evenly spaced ones in a narrow range, else 1 2 5 10."""
    twin, (low, high) = ax.twinx(), ax.get_ylim()
    choices = [[d * 10.0**k for k in range(-4, 12) for d in digits] for digits in ((1,), (1, 3), (1, 2, 5))]
    if high - low < 3:
        choices = [MaxNLocator(8).tick_values(*np.exp(np.minimum((low, high), 700)))]
    for ticks in choices:
        ticks = [p for p in ticks if p > 0 and low <= math.log(p) <= high]
        if len(ticks) >= 4:
            break
    ticks = ticks[:: 1 + len(ticks) // 9]
    twin.set_yticks(np.log(ticks), [f"{p:,.6g}" for p in ticks])
    twin.set(ylim=(low, high), ylabel="exp(loss): sees the future, no perplexity" if run["future"] else "perplexity")
    twin.grid(False)


def plot_convergence(run, v, folder, name):
    """convergence_analysis.png: the whole history above; the last 15%, the fitted line and its interval below."""
    step, loss = run["step"], run["loss"]
    short, long = (max(1, round(share * len(step))) for share in (0.02, 0.15))
    fig, axes = plt.subplots(2, 1, figsize=(10, 8.2))
    for ax, start in zip(axes, (step[0], v["first"])):
        part = step >= start
        ax.plot(step[part], loss[part], ".", color="0.65", ms=3 if part.sum() > 200 else 6, label="logged loss")
        for span, colour, width, label in ((short, SKY, 1.2, "short"), (long, BLUE, 2.2, "long")):
            ax.plot(step[part], ewma(loss, span)[part], color=colour, lw=width, label=f"{label} EWMA (span {span})")
        if val := [p for p in run["val"] if p[0] >= start]:
            ax.plot(*zip(*val), "D", color=ORANGE, mec="black", label=f"validation (last {val[-1][1]:.4f})")
        ax.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].axvspan(v["first"], step[-1], color="0.9", zorder=0, label="last 15% of the steps")
    if math.isfinite(v["half"]):
        x = np.array([v["first"], v["step"], step[-1]])
        line, spread = v["level"] + v["slope"] * (x - v["step"]) / 1000, v["half"] * np.abs(x - v["step"]) / 1000
        axes[1].plot(x, line, "--", color=RED, lw=2.2,
                     label=f"linear fit: {v['slope']:+.4f} ± {v['half']:.4f} nats per 1,000 steps")
        axes[1].fill_between(x, line - spread, line + spread, color=RED, alpha=0.12)
    axes[0].set_title(title(run), fontsize=9)
    axes[1].set_title(f"{v['verdict']}: {v['why']}", fontsize=11, weight="bold")
    for ax in axes:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the points
        ax.legend(loc="upper right", ncols=2)
        perplexity_axis(ax, run)
    save(fig, folder, name)


def efficiency(run, bins=128):
    """
    The power law and the index as the head of this file defines them. Returns a dict: step, loss (at most `bins`,),
    the smoothed curve; a, b, c, r2 of the fit; p95 and p99, indices into the curve; sei. None for fewer than 5 bins or
    where nothing improved.
    """
    s = np.maximum(run["step"], 1.0)
    which = np.digitize(np.log(s), np.linspace(*np.log(s[[0, -1]]), bins + 1)[1:-1])
    step, loss = (np.bincount(which, x)[np.unique(which)] for x in (s, run["loss"]))  # sums, then means
    step, loss = (x / np.unique(which, return_counts=True)[1] for x in (step, loss))
    total = loss[0] - loss.min()
    if len(step) < 5 or total <= 0:
        return None
    fits = []
    for c in np.geomspace(0.02, 4, 160):  # for a given c, the best a and b are linear least squares
        A = np.stack([np.ones_like(step), step**-c], 1)
        (a, b), *_ = np.linalg.lstsq(A, loss, rcond=None)
        if a >= 0:
            fits.append((((A @ (a, b) - loss) ** 2).sum(), a, b, c))
    error, a, b, c = min(fits)
    done = (loss[0] - loss) / total
    return dict(step=step, loss=loss, a=a, b=b, c=c, r2=1 - error / ((loss - loss.mean()) ** 2).sum(),
                p95=np.argmax(done >= 0.95), p99=np.argmax(done >= 0.99),
                sei=np.trapezoid(done, step) / (step[-1] - step[0]))


def plot_sample_efficiency(fits, folder):
    """sample_efficiency.png: the smoothed losses of (run, efficiency) pairs by step, by tokens and by time."""
    fig = plt.figure(figsize=(10, 8.8))
    top, left, right = fig.subplot_mosaic("AA;BC", height_ratios=(3, 2)).values()
    low, high = (f(f(e["loss"]) for _, e in fits) for f in (min, max))
    for i, (run, e) in enumerate(fits):
        colour, step, loss = COLOURS[i % 6], e["step"], e["loss"]
        final = f", final validation {run['val'][-1][1]:.4f}" if run["val"] else ""
        top.plot(step, loss, color=colour, lw=1.8, label=f"{run['name']}: {e['a']:.2f} + {e['b']:.3g} s^-{e['c']:.2f}, "
                                                         f"R² {e['r2']:.3f}, SEI {e['sei']:.3f}{final}")
        top.plot(step, e["a"] + e["b"] * step ** -e["c"], "--", color=colour, lw=1.3)
        for p, mark in ((e["p95"], "o"), (e["p99"], "s")):
            top.plot(step[p], loss[p], mark, color=colour, mec="black", ms=8)
        # The active phases are bars under the curves, a row for each run, so that they do not hide each other.
        top.plot(step[[e["p95"], e["p99"]]], [low - (0.08 + 0.045 * i) * (high - low)] * 2, color=colour, lw=7,
                 solid_capstyle="butt")
        for ax, x in ((left, run["tokens"] / 1e6), (right, run["minutes"])):
            ax.plot(np.interp(step, run["step"], x), loss, color=colour, lw=1.6)
    for label, style in (("power-law fit", dict(ls="--")), ("95% of the improvement", dict(marker="o", ls="none")),
                         ("99% of the improvement", dict(marker="s", ls="none")), ("active phase", dict(lw=7))):
        top.plot([], [], color="0.5", label=label, **style)
    top.set(xscale="log", xlabel="optimizer step s (log scale)", ylabel="smoothed loss (nats per token)",
            ylim=(low - (0.12 + 0.045 * len(fits)) * (high - low), high + 0.05 * (high - low)))
    top.set_title("\n".join(title(run) for run, _ in fits[:3]), fontsize=9 if len(fits) == 1 else 7.5)
    fig.legend(loc="outside lower center", ncols=2)
    left.set(xscale="log", xlabel="training tokens (millions, log scale)", ylabel="smoothed loss (nats per token)")
    right.set(xscale="log", xlabel="training time without validation (minutes, log scale)")
    save(fig, folder, "sample_efficiency.png")


def analyse_logs(paths, out):
    runs = [read_log(path) for path in paths]  # all of them first: a bad one leaves no half of the pictures
    folders = [os.path.dirname(r["path"]) if out is None else out for r in runs]
    rows, fits = [], [(run, e) for run in runs if (e := efficiency(run))]
    for run, folder in zip(runs, folders):
        v, e = verdict(run), efficiency(run)
        for note in run["notes"] + ["too few points, or no improvement, for a sample-efficiency fit"] * (not e):
            print(f"{run['name']}: {note}")
        slope = f", slope {v['slope']:+.4f} ± {v['half']:.4f} nats per 1,000 steps" * math.isfinite(v["half"])
        print(f"{run['name']}: {v['verdict']}{slope} ({v['why']})")
        # Runs that share a folder get their names into the pictures' names.
        tag = "_" + re.sub(r"\W+", "-", run["name"]) if folders.count(folder) > 1 else ""
        plot_convergence(run, v, folder, f"convergence_analysis{tag}.png")
        final = [r["val"][-1][1] if r["val"] else math.nan for r in (run, runs[0])]
        speed = [f"{e['step'][e['p95']]:,.0f}", f"{e['step'][e['p99']]:,.0f}", f"{e['sei']:.3f}"] if e else ["nan"] * 3
        rows.append([run["name"], f"{run['step'][-1]:,}", f"{run['tokens'][-1] / 1e6:,.2f}",
                     f"{run['minutes'][-1]:,.1f}", f"{ewma(run['loss'], max(1, 0.15 * len(run['loss'])))[-1]:.4f}",
                     f"{final[0]:.4f}", f"{final[0] - final[1]:+.4f}", *speed])
    if fits:
        plot_sample_efficiency(fits, folders[0])
    print()
    table(["run", "steps", "Mtokens", "minutes", "train loss", "val loss", "vs first", "95% step", "99% step", "SEI"],
          rows)


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load(path):
    """-> the model (eval mode, on the GPU if any), its tokenizer, and the run: name, tokenizer, kept, settings."""
    ckpt = load_file(path)
    model, tokenizer = ModulatedLM.from_checkpoint(ckpt, path), ckpt.get("tokenizer", "gpt2")  # the authors' is GPT-2's
    c, step = model.config, ckpt.get("step", "unknown")
    if not model.controller:
        raise ValueError(f"{path} was trained with --signals none: it has no controller to look into")
    run = dict(name=os.path.join(*os.path.normpath(path).split(os.sep)[-2:]), tokenizer=tokenizer, settings=(
        f"step {step} | salience {c.salience} | signals {','.join(c.signals)} | {c.n_layer} layers, {c.n_head} heads, "
        f"width {c.n_embd}, context {c.block_size}, controller {c.ncn_hidden} | {tokenizer} tokens"))
    run["kept"] = ckpt.get("kept")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), get_tokenizer(tokenizer, run["kept"]), run


def read_validation(folder, model, run):
    """The validation tokens of a data folder, (N,). Raises ValueError where they do not fit the checkpoint."""
    _, tokenizer, vocab_size = read_meta(folder)
    if tokenizer != run["tokenizer"]:
        raise ValueError(f"{folder} holds {tokenizer} tokens, the checkpoint was trained on {run['tokenizer']} tokens: "
                         "name its own data with --data")
    tokens, seen = read_tokens(os.path.join(folder, "val.bin"), vocab_size if run["kept"] else model.config.vocab_size,
                               model.config.block_size)
    if run["kept"] and not np.isin(seen, run["kept"]).all():
        raise ValueError(f"{folder} holds tokens that the checkpoint's vocabulary lacks: name its own data with --data")
    return renumber(run["kept"])[tokens] if run["kept"] else tokens


def label(token, tokenizer):
    """A token as a table and a picture can show it, the space as a middle dot."""
    text = tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵")
    return "".join(c if c.isprintable() and ord(c) < 0x2200 else "?" for c in text)


def variance_shares(s):
    """
    Where the signals' variance comes from: s (stories, T, L, 3), the stories aligned at their first token -> (3, L, 3),
    the shares of the story (tonic), of the position, and of the token (phasic), which sum to 1.

    Two-way analysis of variance with random effects. Tonic is what a story shifts as a whole: the variance between the
    stories' means. Position is what all stories share at a distance from their start. Phasic is the rest: the token
    against its story and its place. The means' own chance variance is taken out; neighbouring tokens are not
    independent, though, so the tonic share is if anything too high.
    """
    n, t = s.shape[:2]
    story, place = s.mean(1), s.mean(0)
    rest = ((s - story[:, None] - place + s.mean((0, 1))) ** 2).sum((0, 1)) / ((n - 1) * (t - 1))
    parts = np.stack([story.var(0, ddof=1) - rest / t, place.var(0, ddof=1) - rest / n, rest]).clip(0)
    return parts / parts.sum(0).clip(1e-30)


@torch.no_grad()
def attention_entropy(model, ids):
    """
    ids (1, T) -> entropy in nats of every row of attention, (2, L, n_head, T): with the learned precision, and with
    precision 1 on the same queries and keys, so that nothing but the precision differs.
    """
    qkv, out = [], []
    hooks = [block.qkv.register_forward_hook(lambda module, args, y: qkv.append(y[0].float()))
             for block in model.blocks]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    precision = model.signals(ids)[0, :, :, 1]  # (T, L)
    future = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).triu(1)
    for layer, y in enumerate(qkv):
        q, k, _ = (x.unflatten(-1, (model.config.n_head, -1)).transpose(0, 1) for x in y.chunk(3, dim=-1))
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (n_head, T, T)
        for beta in (precision[:, layer, None], 1.0):
            out.append(torch.special.entr((scores * beta).masked_fill(future, -math.inf).softmax(-1)).sum(-1))
    return torch.stack(out).unflatten(0, (-1, 2)).transpose(0, 1).cpu().numpy()


def plot_brain_scan(s, labels, run, folder, most=64):
    """brain_scan.png (the paper's figure 4): s (T, L, 3) as three heatmaps, layers by tokens, white where neutral."""
    s, labels = s[:most], [t.replace("$", r"\$") for t in labels[:most]]
    fig, axes = plt.subplots(3, 1, figsize=(10, 8.4), sharex=True)
    for i, (ax, name) in enumerate(zip(axes, SIGNALS)):
        far = max(np.abs(s[..., i] - 1).max(), 0.02)
        image = ax.imshow(s[..., i].T, cmap="BrBG", vmin=1 - far, vmax=1 + far, aspect="auto", interpolation="nearest")
        fig.colorbar(image, ax=ax, pad=0.01, label=f"{name} (neutral: 1)")
        ax.set(ylabel="layer", title=name, yticks=range(s.shape[1]))
        ax.grid(False)
    axes[2].set_xticks(range(len(labels)), labels, fontsize=10 if len(labels) <= 36 else 8,
                       rotation=90 if max(map(len, labels)) > 1 else 0)
    axes[2].set_xlabel("token (· is a space)")
    fig.suptitle(title(run), fontsize=9)
    save(fig, folder, "brain_scan.png")


def plot_attention_entropy(entropy, precision, run, folder):
    """attention_entropy.png: entropy (2, L, n_head, T) by layer, and its change by the token's precision (T, L)."""
    layers, T = range(entropy.shape[1]), entropy.shape[3]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2))
    for i, (name, colour) in enumerate((("learned precision", BLUE), ("precision 1", ORANGE))):
        left.bar(np.array(layers) + 0.4 * i - 0.2, entropy[i].mean((1, 2)), 0.38, color=colour, label=name)
    even = np.log(np.arange(1, T + 1)).mean()
    left.axhline(even, color="black", ls="--", lw=1.2, label="attention spread evenly")
    left.set(xlabel="layer", ylabel="attention entropy (nats, mean of heads and tokens)", xticks=layers,
             ylim=(0, 1.35 * even + 0.1))
    change = (entropy[0] - entropy[1]).mean(1)  # (L, T)
    for i in layers:
        right.plot(precision[1:, i], change[i, 1:], "osD^vP*X"[i % 8], color=COLOURS[i % 6], alpha=0.75,
                   label=f"layer {i}")
    right.axhline(0, color="black", lw=0.8)
    right.axvline(1, color="black", lw=0.8)
    right.set(xlabel="precision of the token (neutral: 1)", ylabel="entropy minus that at precision 1 (nats)")
    left.legend(loc="upper right")
    right.legend(ncols=2)
    fig.suptitle(title(run), fontsize=9)
    save(fig, folder, "attention_entropy.png")


def scan(model, tokenizer, run, text, data, folder):
    """What the controller does to one text: tables, brain_scan.png and attention_entropy.png."""
    c, device, tokens = model.config, model.embed.weight.device, tokenizer.encode_ordinary(text)
    if not tokens:
        raise ValueError('the text to scan has no tokens: give some, as in --scan "Once upon a time"')
    if len(tokens) > c.block_size:
        print(f"Only the first {c.block_size} of the text's {len(tokens)} tokens fit into the context")
    ids = torch.tensor([tokens[: c.block_size]], device=device)
    labels, s = [label(t, tokenizer) for t in tokens[: c.block_size]], model.signals(ids)[0].cpu().numpy()  # (T, L, 3)
    print("\nSpecialisation: mean ± standard deviation of each signal over the text's tokens")
    table(["layer", *SIGNALS], [[f"{i}", *(f"{m:.3f} ± {d:.3f}" for m, d in zip(s[:, i].mean(0), s[:, i].std(0)))]
                                for i in range(c.n_layer)])
    jump = np.abs(np.diff(s, axis=0)).mean(1)  # (T - 1, 3)
    print("\nPhasic reactivity: the tokens at which each signal moves most (change, mean of the layers' sizes)")
    for i, name in enumerate(SIGNALS):
        print(f"{name:9}", *(f"{labels[t + 1]} {jump[t, i]:.3f}" for t in np.argsort(-jump[:, i])[:6]), sep="   ")
    try:
        val, T = read_validation(data, model, run), min(128, c.block_size)
        ends = np.flatnonzero(val == tokenizer.eot_token)
        stories = [val[a + 1 : a + 1 + T] for a, b in zip(ends, ends[1:]) if b - a > T][:64]
        if len(stories) < 8:
            raise ValueError(f"{data} holds only {len(stories)} stories of {T} tokens or more")
        s_val = model.signals(torch.from_numpy(np.stack(stories).astype(np.int64)).to(device)).cpu().double().numpy()
        share = 100 * variance_shares(s_val)
        print(f"\nVariance over the first {T} tokens of {len(stories)} validation stories, in %: "
              "story (tonic) / position / token (phasic)")
        table(["layer", *SIGNALS], [[f"{i}", *(" / ".join(f"{x:3.0f}" for x in share[:, i, j]) for j in range(3))]
                                    for i in range(c.n_layer)])
    except (OSError, ValueError) as error:
        print(f"\nNo shares of tonic and phasic variance, they need validation stories: {error}")
    entropy = attention_entropy(model, ids)
    print("\nAttention entropy in nats, on the same queries and keys (more precision must lower it; how far?)")
    table(["layer", "mean precision", "entropy", "at precision 1", "difference"],
          [[f"{i}", f"{s[:, i, 1].mean():.3f}", *(f"{e:.4f}" for e in entropy[:, i].mean((1, 2))),
            f"{(entropy[0, i] - entropy[1, i]).mean():+.4f}"] for i in range(c.n_layer)])
    print()
    plot_brain_scan(s, labels, run, folder)
    plot_attention_entropy(entropy, s[..., 1], run, folder)


@torch.no_grad()
def ablations(model, batches):
    """
    Task loss under each condition on batches, pairs of ids and targets (B, T) -> {condition: (batches,) nats per
    token}, "as trained" first; and the signals as trained, (batches * B, T, L, 3).

    Pinned to its mean, a signal is a constant per layer: what that adds to the loss is what its moving is worth.
    Pinned to its neutral value, 1, it is gone. "prefix only" lets a `global` model's salience see tokens 0..t (causal
    mode), all there is when it generates: what that adds is the leak, what the sight of the future had taken off.
    """
    s, names = torch.cat([model.signals(x) for x, _ in batches]), model.config.signals

    def pin(which, value):  # value (L, 3)
        mask = torch.tensor([name in which for name in SIGNALS], device=s.device)
        return dict(edit=lambda signals: torch.where(mask, value, signals))

    conditions = {"as trained": {}}
    for how, value in (("mean", s.mean((0, 1))), ("neutral", torch.ones_like(s[0, 0]))):
        conditions |= {f"{name} {how}": pin([name], value) for name in names}
        conditions |= {f"all {how}": pin(names, value)} if len(names) > 1 else {}
    if model.config.salience == "global":
        conditions["prefix only"] = dict(salience="causal")
    return {name: np.array([model(x, y, **how).task.item() for x, y in tqdm(batches, name, leave=False, disable=None)])
            for name, how in conditions.items()}, s


def gradients(model, x, y):
    """
    One backward pass for each window, x and y (W, T). Returns the windows' mean signals (W, L, 3), the norms of the
    gradients of each layer's weights (W, L, 2), all of them and the FFN's, and the losses (W,).
    """
    signals, norms, losses = [], [], []
    for a, b in zip(tqdm(x.split(1), "gradients", leave=False, disable=None), y.split(1)):
        model.zero_grad()
        loss = model(a, b).task
        loss.backward()
        norms.append([[math.sqrt(sum(p.grad.square().sum().item() for n, p in block.named_parameters() if part in n))
                       for part in ("", "ffn_")] for block in model.blocks])
        signals.append(model.signals(a)[0].mean(0).cpu().numpy())
        losses.append(loss.item())
    model.zero_grad()
    return np.array(signals), np.array(norms), np.array(losses)


def shielding(signals, norms):
    """Pearson's r over windows, (L, 2): mean gain and the layer's norm, mean gate and its FFN's; NaN for a constant."""
    pairs = [[(signals[:, i, 0], norms[:, i, 0]), (signals[:, i, 2], norms[:, i, 1])] for i in range(norms.shape[1])]
    return np.array([[np.corrcoef(a, b)[0, 1] if a.std() > 1e-7 else math.nan for a, b in row] for row in pairs])


def audit(model, tokenizer, run, data, folder, budget=32768):
    """What each signal is worth, how far the gate closes, and whether gradients are shielded: tables and audit.png."""
    T, device, val = model.config.block_size, model.embed.weight.device, read_validation(data, model, run)
    chosen = np.random.default_rng(0).permutation((len(val) - 1) // T)[: max(2, budget // T)]  # as train.py chooses
    size = max(1, len(chosen) // 32)
    batches = [windows(val, chosen[i : i + size], T, device) for i in range(0, len(chosen) - size + 1, size)]
    if len(batches) < 2:
        raise ValueError(f"{data} holds fewer than two windows of {T} validation tokens: prepare more text")
    loss, s = ablations(model, batches)
    base = loss.pop("as trained")
    added = {name: ((x - base).mean(), 2 * (x - base).std(ddof=1) / math.sqrt(len(base))) for name, x in loss.items()}
    print(f"\nLoss on {len(batches) * size} validation windows of {T} tokens, in nats per token; ± is two standard "
          "errors, paired by batch")
    table(["signals", "loss", "added", "±"], [["as trained", f"{base.mean():.4f}", "", ""]] + [
        [name, f"{base.mean() + m:.4f}", f"{m:+.5f}", f"{e:.5f}"] for name, (m, e) in added.items()])
    if "prefix only" in added:
        print(f"As trained, every position sees the future: {base.mean():.4f} is no likelihood. The honest loss is "
              f"{loss['prefix only'].mean():.4f}; the leak is {added['prefix only'][0]:+.4f} nats.")
    gate = s[..., 2].flatten(0, 1).cpu().numpy()  # (tokens, L)
    print("\nShare of tokens with the gate below 0.5, by layer:", *(f"{x:.1%}" for x in (gate < 0.5).mean(0)))

    # Two kinds of text as far apart as can be had without another download: stories, and this very program.
    T = min(T, 128)
    with open(__file__, encoding="utf-8") as file:
        code = np.array(tokenizer.encode_ordinary(file.read()))
    kinds = [gradients(model, *windows(text, np.linspace(0, (len(text) - 1) // T - 1, 32).astype(int), T, device))
             for text in (val, code)]
    r = [shielding(signals, norms) for signals, norms, _ in kinds]
    both = shielding(*(np.concatenate(x) for x in list(zip(*kinds))[:2]))
    stories, program = (losses.mean() for _, _, losses in kinds)
    print(f"""
Gradient shielding (Eq. 17), 32 windows of {T} tokens of stories (loss {stories:.3f}) and of code (loss {program:.3f}):
r of a window's mean gain with the gradient norm of the layer's weights, and of its mean gate with that of the FFN's.
Shielding predicts r > 0. But windows of higher loss have larger gradients too, whatever the signals do, and "both"
mixes two kinds of very different loss. Chance alone gives |r| up to 0.35.""")
    table(["layer", "gain: stories", "code", "gate: stories", "code", "grad: stories", "code"],
          [[f"{i}", *(f"{k[j][:, i, n].mean():.3g}" for j, n in ((0, 0), (0, 2), (1, 0)) for k in kinds)]
           for i in range(gate.shape[1])])
    table(["layer", "r gain: stories", "code", "both", "r gate: stories", "code", "both"],
          [[f"{i}", *(f"{x[i, n]:+.2f}" for n in (0, 1) for x in (*r, both))] for i in range(gate.shape[1])])
    print()
    plot_audit(base.mean(), added, gate, r, run, folder)


def plot_audit(base, added, gate, r, run, folder):
    """audit.png: what pinning adds to the loss, how the gate is spread, and the correlations of gradient shielding."""
    fig = plt.figure(figsize=(10, 8.6))
    top, left, right = fig.subplot_mosaic("AA;BC").values()
    layers = np.arange(gate.shape[1])
    for i, (name, (value, error)) in enumerate(added.items()):
        colour = BLUE if name.endswith("mean") else ORANGE if name.endswith("neutral") else PURPLE
        top.barh(i, value, 0.7, xerr=error, color=colour, capsize=3)
    top.axvline(0, color="black", lw=0.8)
    top.set_yticks(range(len(added)), added)
    top.invert_yaxis()
    top.set(xlabel="added to the loss (nats per token, ± two standard errors)",
            title=f"What each signal is worth: pinned to its mean, and to neutral (loss as trained {base:.4f})")
    left.boxplot(gate, positions=layers, widths=0.6, whis=(1, 99), showfliers=False, patch_artist=True,
                 boxprops=dict(facecolor=SKY), medianprops=dict(color="black"))
    left.axhline(0.5, color=RED, ls="--", lw=1.2)
    for i, share in enumerate((gate < 0.5).mean(0)):
        left.text(i, 1.04, f"{share:.1%}", ha="center")
    left.set(xlabel="layer", ylabel="gate (box: half the tokens; whiskers: 98%)", ylim=(0, 1.12),
             title="The gate, and its share of tokens below 0.5")
    for i, colour in enumerate((BLUE, SKY, RED, ORANGE)):
        right.bar(layers + 0.2 * i - 0.3, r[i % 2][:, i // 2], 0.19, color=colour,
                  label=f"{('gain', 'gate')[i // 2]}, {('stories', 'code')[i % 2]}")
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="layer", ylabel="correlation with the gradient norm", xticks=layers, ylim=(-1.05, 1.5),
              title="Gradient shielding (Eq. 17 predicts r > 0)")
    right.legend(ncols=2, loc="upper right")
    fig.suptitle(title(run), fontsize=9)
    save(fig, folder, "audit.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    parser.add_argument("log", nargs="*", metavar="LOG", help="training logs (default: out/training.log)")
    parser.add_argument("--scan", metavar="TEXT", help="what the controller does to TEXT: tables, brain_scan.png and "
                                                       "attention_entropy.png")
    parser.add_argument("--audit", action="store_true", help="what each signal is worth, on about 32,000 tokens of "
                                                             "validation data: tables and audit.png")
    parser.add_argument("--ckpt", default="out/ckpt_best.pt", help="checkpoint to look into (default: %(default)s)")
    parser.add_argument("--data", default="data", help="folder that prepare.py wrote (default: %(default)s)")
    parser.add_argument("--out", help="folder for the pictures (default: beside the log or the checkpoint)")
    args = parser.parse_args()
    try:
        if args.log or not (args.audit or args.scan is not None):
            analyse_logs(args.log or [os.path.join("out", "training.log")], args.out)
        if args.audit or args.scan is not None:
            model, tokenizer, run = load(args.ckpt)
            folder = os.path.dirname(args.ckpt) if args.out is None else args.out
            print(title(run))
            if args.scan is not None:
                scan(model, tokenizer, run, args.scan, args.data, folder)
            if args.audit:
                audit(model, tokenizer, run, args.data, folder)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
