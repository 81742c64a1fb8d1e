"""
See how a run went, whether the controller helps, and what it does.

    python analyze.py                                  # out/training.log: convergence and sample efficiency
    python analyze.py a/training.log b/training.log    # the same, with the runs laid over each other
    python analyze.py --compare out/*/training.log     # several seeds: which settings are better, and by how much?
    python analyze.py --memory                         # a model of the demo stories: what does it remember?
    python analyze.py --scan "Timmy wanted an apple. He looked in the box, but it was empty."
    python analyze.py --audit                          # what each signal is worth, on the validation data

Losses are in nats per token unless it says per story. What the words mean:

Verdict (paper, section 4.1.2): a straight line is fitted by least squares to the logged losses of the last 15% of the
steps. A slope within 0.001 nats per 1,000 steps of zero is "Converged", a falling line "Still improving", a rising one
"Diverging". But noise blurs slopes: 120 points that scatter by 0.05 nats over 2,400 steps give the slope a standard
error of 0.007 nats per 1,000 steps, so that a perfectly flat run would hardly ever pass. So the slope comes with its
98% interval (Student's t, wider where neighbouring errors correlate). If that holds zero, the log shows no trend, which
is "Converged" too, provided that the interval is informative: narrower than the threshold, or allowing a drift over the
window below the scatter of single points. Else the slope alone decides, and the verdict says that it is uncertain.
Below 5 points it is "Undecided"; a run that ends in a NaN or infinite loss is "Diverging". One flat run in fifty is
called moving by chance, and a loss flattens as the learning rate falls: more training may help a "Converged" run.

Sample efficiency (section 5.2): L(s) = a + b s^-c, a >= 0, is fitted by least squares to the smoothed loss, which here
is the mean over bins of equal width in log s: unlike a moving average it does not lag behind the steep start. The 95%
and 99% steps are where it has first made that share of its total improvement (first value to lowest); between them
lies the active phase. The paper does not define its index. Ours: the Sample Efficiency Index is the mean, over the
steps of the run, of the share of the total improvement already made (1: all at once; 0.5: a straight line).

Comparison: runs whose settings differ in the seed alone form a group. Runs of one seed share the order of the data and
the base weights they start from, so groups are compared seed by seed: the mean difference of their final losses has a
95% interval (Student's t). An interval that holds zero shows no difference.

Memory: a slot of the demo stories, say the hero's name, is learned at the first validation from which on the loss on
its words, above what any model must lose, stays below 0.5 nats per story.
"""

import argparse
import csv
import io
import math
import os
import re
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator, MaxNLocator
from tqdm import tqdm

import prepare
from ncn import SIGNALS, ModulatedLM, load_file
from prepare import SLOTS, fail, rows_of
from sample import generate

plt.switch_backend("Agg")  # no display needed
# Okabe and Ito's colours stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #56B4E9".split()
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.spines.top": False,
                     "legend.fontsize": 8.5, "legend.framealpha": 0.9, "figure.constrained_layout.use": True})


def save(fig, folder, name, run=None):
    """Writes the picture, 1000 pixels wide, under the title of a run."""
    path = os.path.join(folder, name)
    if run:
        fig.suptitle(title(run), fontsize=9)
    try:
        os.makedirs(folder or ".", exist_ok=True)
        prepare.write_file(path, lambda file: fig.savefig(file, dpi=100))
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): choose another folder with --out") from None
    finally:
        plt.close(fig)
    print(f"wrote {path}")


def table(head, rows):
    """Prints rows of strings under their head, all but the first to the right; there, "nan" becomes a dash."""
    rows = [[name, *("-" if cell.lstrip("+-") == "nan" else cell for cell in row)] for name, *row in rows]
    width = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, ["-" * w for w in width], *rows]:
        print(row[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(row[1:], width[1:], strict=True)), sep="  ")


def title(run):
    """The run's name and settings, in lines that fit 1000 pixels."""
    return textwrap.fill(f"{run['name']} | {run['settings']}".rstrip(" |"), 130).replace("$", r"\$")


# ----------------------------------------------------------------------------------------------------------------------
# Logs

NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))"
LINE = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)[,.](\d{3}) \[INFO\] (.*)")
STEP = re.compile(rf"Step: (\d+) \|.*?\| Loss: {NUMBER} \|(?:.*?Tok/s: {NUMBER})?", re.I)
VALIDATION = re.compile(rf"Validation Result: Loss: {NUMBER}(?: \||$)", re.I)
ABOVE = re.compile(r"Above the stories' entropy: .*? (\S+) per story \| (.+)")
STOPPED = re.compile(r"Stopped: loss .* at step (\d+)")  # train.py's last words when a loss is not finite
HEAD = re.compile(r"(?:[\d,]+ )?(Preset|parameters|Settings|Data|fp32|bf16|fp16|steps)\b.+")  # what a run is, by key
SHOWN = "signals salience n_layer n_head n_embd block_size batch_size grad_accum lr seed".split()  # in titles


def read_log(path):
    """
    Reads a training.log, ours or the authors' (the format is train.py's); lines of other kinds are skipped.

    Returns a dict: name, path, settings (str), future (bool: global salience), notes (list of str); of the rows with
    a finite loss step (N,) int64, loss (N,) nats, tokens (N,), minutes (N,) of training, from the logged speeds, so
    without validation and pauses; speed, the median of these (tokens/s); val, a list of (step, loss); above, for demo
    stories, a list of (step, nats per story above their entropy, {slot: its share of them}); setup and data, dicts of
    the name=value pairs (str) in the lines on settings and data; parameters, dtype (str); broke, the step of a
    non-finite end or None. Where steps go back, a run was resumed: the later lines win. Where they go back to the
    start, a second run was appended: the last run counts, and a note says so. Raises OSError, and ValueError for a file
    with no training step.
    """
    events, head, future = [], {}, False
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in filter(None, map(LINE.match, file)):
                day, clock, ms, text = line.groups()
                if m := STEP.match(text):
                    events.append((int(m[1]), float(m[2]), float(m[3] or "nan"), f"{day}T{clock}.{ms}"))
                    future = "sees the future" in text
                elif m := VALIDATION.match(text):
                    events.append([float(m[1])])
                elif (m := ABOVE.match(text)) and events and isinstance(events[-1], list):
                    slots, nats = m[2].split()[::2], map(float, m[2].split()[1::2])
                    events[-1] += [float(m[1]), dict(zip(slots, nats, strict=True))]
                elif m := STOPPED.match(text):
                    events.append((int(m[1]), math.nan, math.nan, f"{day}T{clock}.{ms}"))
                elif m := HEAD.match(text):
                    head[m[1]] = text
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror}): train first, or name a training.log") from None
    steps = [e[0] for e in events if isinstance(e, tuple)]
    if not steps:
        raise ValueError(f"{path} holds no training step: it is not a log of train.py's, or of a run that just began")

    rows, val, above, runs, seen = [], [], [], 1, 0
    for event in events:
        if isinstance(event, list):
            if rows and math.isfinite(event[0]):
                val.append((rows[-1][0], event[0]))
                above += [(rows[-1][0], *event[1:])] * (len(event) > 1)
            continue
        seen += 1
        if rows and event[0] <= rows[-1][0]:
            # A run that starts afresh logs its first step no later than one logging interval after zero.
            interval = steps[seen] - event[0] if seen < len(steps) else 0
            afresh = event[0] < rows[-1][0] and event[0] <= max(rows[0][0], interval)
            rows, val, above = ([x for x in old if x[0] < event[0] and not afresh] for old in (rows, val, above))
            runs += afresh
        rows.append(event)

    step, loss, speed, time = (np.array(column) for column in zip(*rows, strict=True))
    # Tokens per step: as the log says, else the usual speed x time per step.
    guess = speed[1:] * np.diff(time.astype("datetime64[ms]")).astype(float) / 1000 / np.diff(step)
    stated, guess = re.search(r"steps of ([\d,]+) tokens", head.get("steps", "")), guess[np.isfinite(guess)]
    tokens = int(stated[1].replace(",", "")) if stated else np.median(guess) if len(guess) else math.nan
    usual = np.median(speed[speed > 0]) if (speed > 0).any() else math.nan
    minutes = np.cumsum(np.diff(step, prepend=0) * tokens / np.where(speed > 0, speed, usual)) / 60
    fine = np.isfinite(loss)
    if not fine.any():
        raise ValueError(f"{path}: every logged loss is NaN or infinite, there is nothing to draw")
    notes = [f"{runs} runs in one file, this is the last"] * (runs > 1)
    notes += [f"{(~fine).sum()} rows with a NaN or infinite loss left out"] * (not fine.all())
    notes += ["global salience: the loss sees the future and is no likelihood"] * future
    if not head and not future:
        notes.append("the log does not name its settings: if its salience was global, its loss is no likelihood")
    folder, stem = os.path.split(os.path.splitext(os.path.abspath(path))[0])
    name = os.path.basename(folder) if stem == "training" else os.path.join(os.path.basename(folder), stem)
    setup, data = (dict(re.findall(r"(\w+)=(\S+)", head.get(key, ""))) for key in ("Settings", "Data"))
    if setup:
        head["Settings"] = "Settings: " + " ".join(f"{key}={setup[key]}" for key in SHOWN if key in setup)
    return dict(name=name, path=path, future=future, notes=notes, val=val, above=above, setup=setup, data=data,
                settings=" | ".join(head[key] for key in head if key in ("Preset", "parameters", "Settings", "steps")),
                parameters=head.get("parameters", "unknown").split()[0],
                dtype=" and ".join(key for key in head if key[2:] in ("16", "32")) or "an unknown precision",
                step=step[fine], loss=loss[fine], tokens=tokens * step[fine], minutes=minutes[fine], speed=usual,
                broke=None if fine[-1] else int(step[-1]))


def ewma(y, span):
    """Exponentially weighted mean, alpha = 2 / (span + 1), without bias towards the first value. y (N,) -> (N,)."""
    keep, top, bottom, out = 1 - 2 / (span + 1), 0.0, 0.0, np.empty(len(y))
    for i, value in enumerate(y):
        top, bottom = keep * top + value, keep * bottom + 1
        out[i] = top / bottom
    return out


def student_t(confidence, freedom):
    """The t that Student's T with so many degrees of freedom stays within, |T| < t, with this probability."""
    # With t = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1): easy to integrate.
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    inside = np.cumsum(density[1:] + density[:-1])
    return math.sqrt(freedom) * math.tan(np.interp(confidence, inside / inside[-1], angle[1:]))


def verdict(run, threshold=0.001, tail=0.15):
    """
    The verdict as the head of this file defines it. Returns a dict: verdict, why (str); slope and half, the half width
    of its 98% interval (nats per 1,000 steps; NaN below 5 points); first, the window's first step; and the fitted
    line's middle: step and level (nats).
    """
    first = run["step"][-1] - tail * (run["step"][-1] - run["step"][0])
    x, y = (run[k][run["step"] >= first] for k in ("step", "loss"))
    n, d = len(x), (x - x.mean()) / 1000
    slope = d @ y / (d @ d) if n > 1 else math.nan
    rest, half = y - y.mean() - slope * d, math.nan
    if n >= 5:
        scatter = math.sqrt(rest @ rest / (n - 2))
        # Neighbours that err together count as fewer points: the usual first-order correction.
        r = min(max(rest[1:] @ rest[:-1] / (rest @ rest), 0), 0.9) if scatter else 0
        half = student_t(0.98, n - 2) * scatter / math.sqrt(d @ d) * math.sqrt((1 + r) / (1 - r))
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
    twin.set(yscale="log", ylim=np.exp(np.clip((low, high), -700, 700)),
             ylabel="exp(loss): sees the future, no perplexity" if run["future"] else "perplexity")
    digits = (1, 2, 5) if high - low < 5 else (1, 3) if high - low < 9 else (1,)
    twin.yaxis.set_major_locator(MaxNLocator(8) if high - low < 3 else LogLocator(subs=digits, numticks=10))
    twin.yaxis.set_major_formatter("{x:,.6g}")
    twin.minorticks_off()
    twin.grid(False)


def plot_convergence(run, v, folder, name):
    """convergence_analysis.png: the whole history above; the last 15%, the fitted line and its interval below."""
    step, loss = run["step"], run["loss"]
    short, long = (max(1, round(share * len(step))) for share in (0.02, 0.15))
    fig, axes = plt.subplots(2, 1, figsize=(10, 8.2))
    for ax, start in zip(axes, (step[0], v["first"]), strict=True):
        part = step >= start
        ax.plot(step[part], loss[part], ".", color="0.65", ms=3 if part.sum() > 200 else 6, label="logged loss")
        for span, colour, width, label in ((short, SKY, 1.2, "short"), (long, BLUE, 2.2, "long")):
            ax.plot(step[part], ewma(loss, span)[part], color=colour, lw=width, label=f"{label} EWMA (span {span})")
        if val := [p for p in run["val"] if p[0] >= start]:
            ax.plot(*np.transpose(val), "D", color=ORANGE, mec="black", label=f"validation (last {val[-1][1]:.4f})")
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
    used, count = np.unique(which, return_counts=True)
    step, loss = (np.bincount(which, x)[used] / count for x in (s, run["loss"]))
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
    """Convergence and sample efficiency of each log: verdicts, a table and pictures."""
    runs = [read_log(path) for path in paths]  # all of them first: a bad one leaves no half of the pictures
    folders = [os.path.dirname(r["path"]) if out is None else out for r in runs]
    fits = [efficiency(run) for run in runs]
    rows = []
    for run, e, folder in zip(runs, fits, folders, strict=True):
        v = verdict(run)
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
    if any(fits):
        plot_sample_efficiency([(run, e) for run, e in zip(runs, fits, strict=True) if e], folders[0])
    print()
    table(["run", "steps", "Mtokens", "minutes", "train loss", "val loss", "vs first", "95% step", "99% step", "SEI"],
          rows)


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons over seeds

# The settings in which groups may differ, which then name them. All others but the seed must be equal.
MODEL = """signals salience start n_layer n_head n_embd n_ffn n_control dropout ncn_hidden ncn_heads
           homeostatic_lambda""".split()


def read_groups(paths):
    """
    Finished runs grouped by all their settings but the seed, the first log's group first: {label: {seed: run}}.

    A label says what differs from the first group; the first group's, what it has there itself. Says which runs are
    left out. Raises OSError, and ValueError where the runs cannot be compared.
    """
    groups, first, dtypes = {}, None, set()
    for run in map(read_log, paths):
        path, setup = run["path"], run["setup"] | run["data"]
        if "seed" not in setup:
            raise ValueError(f"{path} does not name its settings and its seed: only train.py's logs can be compared")
        if setup.get("signals") == ",".join(SIGNALS):
            setup["signals"] = "all"
        model, seed = tuple((name, setup.pop(name, "unset")) for name in MODEL), int(setup.pop("seed"))
        first = first or (path, setup, model)
        if differ := [f"{name} ({first[1].get(name)}, {setup.get(name)})" for name in first[1] | setup
                      if first[1].get(name) != setup.get(name)]:
            raise ValueError(f"{first[0]} and {path} cannot be compared, they differ in {', '.join(differ)}")
        if run["broke"] is not None or not run["val"] or run["val"][-1][0] < int(setup.get("max_steps", 0)):
            print(f"{path} is left out, it ends at step {run['broke'] or run['step'][-1]} of {setup.get('max_steps')}")
        elif groups.setdefault(model, {}).setdefault(seed, run) is not run:
            raise ValueError(f"{groups[model][seed]['path']} and {path} have the same settings and the same seed")
        else:
            dtypes.add(run["dtype"])
    base = first[2]
    if base not in groups:
        raise ValueError(f"no run of the settings of {first[0]} is finished, the first to compare the others with")
    if len(dtypes) > 1:
        print(f"Not all runs computed in the same precision, but in {', '.join(sorted(dtypes))}")
    groups = {base: groups.pop(base)} | groups
    varied = [pairs[0][0] for pairs in zip(*groups, strict=True) if len(set(pairs)) > 1] or ["signals", "salience"]
    return {" ".join(f"{name}={value}" for name, value in model
                     if name in varied and (model == base or (name, value) not in base)):
            dict(sorted(group.items())) for model, group in groups.items()}


def curves(runs):
    """Validations that all runs have: steps (n,), losses and minutes of training (runs, n)."""
    steps = np.array(sorted(set.intersection(*({step for step, _ in run["val"]} for run in runs))))
    return (steps, np.array([[dict(run["val"])[step] for step in steps] for run in runs]),
            np.array([np.interp(steps, run["step"], run["minutes"]) for run in runs]))


def paired(first, group):
    """
    A group against the first, both {seed: run}, by the seeds that they share: None if there are none, else a dict of
    seeds; steps (n,); mean and half (n,), the mean difference at each validation and half its 95% interval; sd (n,),
    the scatter of the differences, and unpaired (n,), what it would be between runs of different seeds (NaN for one
    seed); reached, the step at which the group's mean curve, straight between validations, first reaches the first
    group's final loss, NaN if it never does.
    """
    seeds = [seed for seed in group if seed in first]
    if not seeds:
        return None
    n, (steps, loss, _) = len(seeds), curves([g[seed] for g in (first, group) for seed in seeds])
    a, b = loss[:n], loss[n:]
    sd, unpaired, half = np.full((3, len(steps)), math.nan)
    if n > 1:
        sd, unpaired = (b - a).std(0, ddof=1), np.sqrt(a.var(0, ddof=1) + b.var(0, ddof=1))
        half = student_t(0.95, n - 1) * sd / math.sqrt(n)
    curve, target = b.mean(0), a.mean(0)[-1]
    i = np.argmax(curve <= target)  # the first
    section = [max(i - 1, 0), i]
    reached = np.interp(-target, -curve[section], steps[section]) if curve[i] <= target else math.nan
    return dict(seeds=seeds, steps=steps, mean=(b - a).mean(0), half=half, sd=sd, unpaired=unpaired, reached=reached)


def learned(above, bound=0.5):
    """When each slot was learned, from read_log's `above`, as the head of this file defines it: {slot: step or inf}."""
    steps, parts = [step for step, *_ in above] + [math.inf], [part for *_, part in above]
    return {slot: steps[max((i for i, part in enumerate(parts, 1) if not part[slot] < bound), default=0)]
            for slot in (parts[0] if parts else ()) if slot != "rest"}


def compare(paths, out):
    """Groups of runs over seeds against the first group: tables, comparison.png and runs.csv."""
    groups = read_groups(paths)
    (name, first), *_ = groups.items()
    pairs = {label: paired(first, group) for label, group in groups.items()}
    rows, slots, file = [], [], io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write("group run seed parameters tokens_per_s minutes val_loss learned validations data settings".split())
    for label, group in groups.items():
        p, runs = pairs[label], group.values()
        loss, when = [run["val"][-1][1] for run in runs], [learned(run["above"]) for run in runs]
        numbers = [p[key][-1] for key in ("mean", "half", "sd")] if p and label != name else [math.nan] * 3
        rows.append([label, f"{len(runs)}", next(iter(runs))["parameters"],
                     f"{np.median([run['speed'] for run in runs]):,.0f}", f"{np.mean(loss):.4f}",
                     f"{np.std(loss, ddof=1) if len(runs) > 1 else math.nan:.4f}", f"{numbers[0]:+.4f}",
                     f"{numbers[1]:.4f}", f"{numbers[2]:.4f}", f"{p['reached'] if p else math.nan:,.0f}"])
        if all(when):
            for text, of in ((label, np.median), ("    from", min), ("    to", max)):
                steps = [of([w[slot] for w in when]) for slot in when[0]]
                slots.append([text, *(f"{step:,.0f}" if step < math.inf else "never" for step in steps)])
        for (seed, run), w in zip(group.items(), when, strict=True):
            told = [" ".join(f"{key}={value}" for key, value in items) for items in (
                w.items(), run["val"], run["data"].items(), run["setup"].items())]
            write([label, run["name"], seed, run["parameters"].replace(",", ""), f"{run['speed']:.0f}",
                   f"{run['minutes'][-1]:.2f}", run["val"][-1][1], *told])
        for note in sorted({note for run in runs for note in run["notes"]}):
            print(f"{label}: {note}")
        for lacking, seeds in ((label, first.keys() - group), (name, group.keys() - first)):
            if seeds:
                print(f"{lacking} has no run of seed {', '.join(map(str, sorted(seeds)))}: pairs are of common seeds")
    print("""
Final validation loss (nats per token): mean and scatter (sd) of the seeds; the difference to the first group, mean of
pairs of one seed, with its 95% interval and the scatter of the pairs; and the step at which the mean curve reaches the
first group's final loss""")
    table(["group", "seeds", "parameters", "tokens/s", "loss", "sd", "difference", "95% ±", "sd", "reached at"], rows)
    others = [p for label, p in pairs.items() if p and label != name]
    if min(map(len, [*groups.values(), *(p["seeds"] for p in others)])) < 2:
        print("One seed is an anecdote, it has no interval: train more with --seed.")
    if scatter := [(p["sd"][-1], p["unpaired"][-1]) for p in others if p["sd"][-1] > 0]:
        sd, unpaired = np.sqrt(np.square(scatter).mean(0))
        print(f"Runs of one seed share data order and base weights: their differences scatter by {sd:.4f}, those of\n"
              f"different seeds would by {unpaired:.4f}. That is worth {(unpaired / sd) ** 2:.2g} times the seeds.")
    if slots:
        print("\nStep at which each slot was learned, its loss staying below 0.5 nats per story: median and range")
        table(["group", *when[0]], slots)
    print()
    folder = os.path.dirname(paths[0]) if out is None else out
    plot_comparison(groups, pairs, folder)
    path = os.path.join(folder, "runs.csv")
    prepare.write_file(path, lambda binary: binary.write(file.getvalue().encode()))
    print(f"wrote {path}")


def plot_comparison(groups, pairs, folder):
    """comparison.png: validation curves by step and by time, and the differences to the first group by step."""
    fig = plt.figure(figsize=(10, 8.6 if len(groups) > 1 else 5))
    axes = fig.subplot_mosaic("AB;CC" if len(groups) > 1 else "AB")
    for i, (label, group) in enumerate(groups.items()):
        (steps, loss, minutes), p = curves(group.values()), pairs[label]
        bands = [("A", steps, loss.mean(0), loss.min(0), loss.max(0)),
                 ("B", minutes.mean(0), loss.mean(0), loss.min(0), loss.max(0))]
        if i and p:
            bands.append(("C", p["steps"], p["mean"], p["mean"] - p["half"], p["mean"] + p["half"]))
        for ax, x, mean, low, high in bands:
            axes[ax].plot(x, mean, ("-", "--", ":")[i // 6 % 3], color=COLOURS[i % 6], lw=1.8, marker=".",
                          label=f"{label} ({len(group)})" if ax == "A" else None)
            axes[ax].fill_between(x, low, high, color=COLOURS[i % 6], alpha=0.15, lw=0)
    axes["A"].set(xlabel="optimizer step", ylabel="validation loss (nats per token)",
                  title="By step: mean and range of the seeds")
    axes["B"].set(xlabel="training time without validation (minutes)", title="The same by time")
    if len(groups) > 1:
        axes["C"].axhline(0, color=BLUE, lw=1.8)
        axes["C"].set(xlabel="optimizer step", ylabel="difference (nats per token)",
                      title=f"Difference to {next(iter(groups))}, seed by seed, with its 95% interval")
    fig.legend(loc="outside lower center", ncols=2, title="group (seeds)")
    save(fig, folder, "comparison.png")


# ----------------------------------------------------------------------------------------------------------------------
# Models


def load(path):
    """-> the model (eval mode, on the GPU if any), its tokenizer, and a dict of name, settings, data and rows."""
    ckpt = load_file(path)
    model, data = ModulatedLM.from_checkpoint(ckpt, path), ckpt.get("data", {"tokenizer": "gpt2"})  # as the authors'
    c, step = model.config, ckpt.get("step", "unknown")
    run = dict(name=os.path.join(*os.path.normpath(path).split(os.sep)[-2:]), settings=(
        f"step {step} | salience {c.salience} | signals {','.join(c.signals) or 'none'} | {c.n_layer} layers, "
        f"{c.n_head} heads, width {c.n_embd}, context {c.block_size}, controller {c.ncn_hidden} | "
        f"{data['tokenizer']} tokens"),
        data=data, rows=ckpt.get("settings", {}).get("rows"))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), prepare.tokenizer_of(data), run


def read_validation(folder, run):
    """The validation tokens of a data folder, (N,). Raises ValueError where they do not fit the checkpoint."""
    meta = prepare.read_meta(folder)
    if any(meta.get(key) != run["data"].get(key) for key in ("tokenizer", "vocabulary")):
        raise ValueError(f"{folder} holds {meta['tokenizer']} tokens, the checkpoint was trained on another vocabulary "
                         f"({run['data']['tokenizer']}): name its own data with --data")
    return prepare.read_tokens(folder, "val", meta)


def batch(model, tokens, rows):
    """Rows of tokens, see rows_of -> inputs and targets (B, T) int64 on the model's device; -1: no target, padding."""
    return [torch.from_numpy(x).to(model.embed.weight.device) for x in prepare.windows(tokens, rows)]


@torch.no_grad()
def above_entropy(model, tokens, tokenizer, at_once=16):
    """
    What a model loses on whole demo stories, tokens (N,), above their entropy: nats per story, (len(SLOTS) + 1,), for
    each slot and for the rest. Rows begin with a story; global salience sees the past alone.
    """
    salience, end, nats = "causal" if model.config.salience == "global" else None, tokenizer.eot_token, []
    rows = rows_of(tokens, model.config.block_size, end)  # every token is a target once, in their order
    for i in range(0, len(rows), at_once):
        x, y = batch(model, tokens, rows[i : i + at_once])
        loss = F.cross_entropy(model(x, salience=salience).mT.float(), y, ignore_index=-1, reduction="none")
        nats.append(loss[y >= 0].cpu().numpy())
    slots, least = prepare.label_slots(tokens, tokenizer)
    return np.bincount(slots, np.concatenate(nats) - least, len(SLOTS) + 1) / (tokens == end).sum()


def memory(model, tokenizer, run, data, log, folder, stories=200):
    """What does a story remember of its beginning? Sampled ones are read back: a table; and memory.png from the log."""
    if "entropy_nats_per_story" not in run["data"]:
        raise ValueError(f"{run['name']} was not trained on the demo stories, no others can be read back")
    val, end = read_validation(data, run), tokenizer.eot_token
    ends = np.flatnonzero(val == end)[:500]
    above = above_entropy(model, val[: ends[-1] + 1], tokenizer).tolist()
    prompt = torch.full((stories, 1), end, device=model.embed.weight.device)  # a story begins where another one ended
    most = 2 * int(np.diff(ends, prepend=-1).max())  # tokens: no story of the grammar is as long
    texts = generate(model, prompt, most, temperature=0.5, top_k=0, top_p=1.0, seed=0, end_token=end)[:, 1:].tolist()
    read = [prepare.read_back(tokenizer.decode(text[: text.index(end)])) for text in texts if end in text]
    right = [prepare.kept(mentions) for mentions in read if mentions]
    count = [sum(r[slot] for r in right) for slot in SLOTS] + [sum(all(r.values()) for r in right)]
    print(f"""
Of {stories} sampled stories (temperature 0.5) {len(right)} are stories of the grammar. In how many of the {stories} is
every later mention the first one's? And what is lost above the entropy, on {len(ends)} validation stories?""")
    table(["slot", "kept in", "share", "nats per story"], [
        *([slot, f"{n}", f"{n / stories:.1%}", f"{nats:.2f}"] for slot, n, nats in zip(
            [*SLOTS, "all of these"], count, [*above[:-1], sum(above[:-1])], strict=True)),
        ["the rest", "", "", f"{above[-1]:.2f}"], ["whole story", "", "", f"{sum(above):.2f}"]])
    print()
    if os.path.exists(log) and (history := read_log(log)["above"]):
        plot_memory(history, run, folder)
    else:
        print(f"No memory.png: there is no {log} of a training on the demo stories")


def plot_memory(above, run, folder):
    """memory.png, from read_log's `above`: the loss of a story and of each slot by step, and when it was learned."""
    fig, ax = plt.subplots(figsize=(10, 6.2))
    steps, total, parts = zip(*above, strict=True)
    ax.plot(steps, total, color="black", lw=2.4, label="whole story")
    names = {}
    for (slot, step), colour in zip(learned(above).items(), [*COLOURS, "0.45"], strict=False):
        ax.plot(steps, [part[slot] for part in parts], color=colour, lw=1.5,
                label=f"{slot}: learned at step {step:,}" if step < math.inf else f"{slot}: not learned")
        if step < math.inf:
            ax.plot(step, parts[steps.index(step)][slot], "o", color=colour, mec="black", ms=8, zorder=3)
            names.setdefault(step, []).append(slot)
    for step, slots in names.items():
        ax.axvline(step, color="0.5", ls=":", lw=1)
        ax.text(step, 3.5 * max(total), ", ".join(slots), rotation=90, va="top", ha="right")
    ax.axhline(0.5, color="0.5", ls="--", lw=1)
    ax.set_yscale("log", nonpositive="clip")
    ax.set(xlabel="optimizer step", ylabel="loss above the stories' entropy (nats per story, log scale)",
           ylim=(0.01, 4 * max(total)), title="A slot is learned when its loss stays below half a nat (dashed)")
    ax.yaxis.set_major_formatter("{x:g}")
    fig.legend(loc="outside lower center", ncols=4)
    save(fig, folder, "memory.png", run)


def label(token, tokenizer):
    """A token as a table and a picture can show it, the space as a middle dot."""
    text = tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵")
    return "".join(c if c.isprintable() and ord(c) < 0x2200 else "?" for c in text)


def variance_shares(s):
    """
    Where the signals' variance comes from: s (stories, T, L, 3), the stories aligned at their first token -> (3, L, 3),
    the shares of the story (tonic), of the position, and of the token (phasic), which sum to 1.

    Two-way analysis of variance with random effects: the variance of the stories' means; of what all stories share at
    a distance from their start; and the rest, the token against its story and its place. The means' own chance variance
    is taken out; neighbouring tokens are not independent, though, so the tonic share is if anything too high.
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
    x, signals, out = model.embeddings(ids), model.signals(ids), []
    future = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).triu(1)
    for block, s in zip(model.blocks, signals.unbind(2), strict=True):  # s (1, T, 3)
        q, k, _ = block.qkv(block.attn_norm(x)).unflatten(-1, (3, model.config.n_head, -1))[0].transpose(0, 2).unbind(1)
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (n_head, T, T)
        for beta in (s[0, :, 1, None], 1.0):
            out.append(torch.special.entr((scores * beta).masked_fill(future, -math.inf).softmax(-1)).sum(-1))
        x = block(x, s)
    return torch.stack(out).unflatten(0, (-1, 2)).transpose(0, 1).cpu().numpy()


def plot_brain_scan(s, labels, run, folder, most=64):
    """brain_scan.png (the paper's figure 4): s (T, L, 3) as three heatmaps, layers by tokens, white where neutral."""
    s, labels = s[:most], [t.replace("$", r"\$") for t in labels[:most]]
    fig, axes = plt.subplots(3, 1, figsize=(10, 8.4), sharex=True)
    for i, name in enumerate(SIGNALS):
        far = max(np.abs(s[..., i] - 1).max(), 0.02)
        image = axes[i].imshow(s[..., i].T, "BrBG", vmin=1 - far, vmax=1 + far, aspect="auto", interpolation="nearest")
        fig.colorbar(image, ax=axes[i], pad=0.01, label=f"{name} (neutral: 1)")
        axes[i].set(ylabel="layer", title=name, yticks=range(s.shape[1]))
        axes[i].grid(False)
    axes[2].set_xticks(range(len(labels)), labels, fontsize=10 if len(labels) <= 36 else 8,
                       rotation=90 if max(map(len, labels)) > 1 else 0)
    axes[2].set_xlabel("token (· is a space)")
    save(fig, folder, "brain_scan.png", run)


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
    save(fig, folder, "attention_entropy.png", run)


def scan(model, tokenizer, run, text, data, folder):
    """What the controller does to one text: tables, brain_scan.png and attention_entropy.png."""
    c, tokens = model.config, tokenizer.encode_ordinary(text)
    if not tokens:
        raise ValueError('the text to scan has no tokens: give some, as in --scan "Once upon a time"')
    if len(tokens) > c.block_size:
        print(f"Only the first {c.block_size} of the text's {len(tokens)} tokens fit into the context")
    ids = torch.tensor([tokens[: c.block_size]], device=model.embed.weight.device)
    labels, s = [label(t, tokenizer) for t in tokens[: c.block_size]], model.signals(ids)[0].cpu().numpy()  # (T, L, 3)
    print("\nSpecialisation: mean ± standard deviation of each signal over the text's tokens")
    table(["layer", *SIGNALS], [[f"{i}", *(f"{x.mean():.3f} ± {x.std():.3f}" for x in s[:, i].T)]
                                for i in range(c.n_layer)])
    jump = np.abs(np.diff(s, axis=0)).mean(1)  # (T - 1, 3)
    print("\nPhasic reactivity: the tokens at which each signal moves most (change, mean of the layers' sizes)")
    for i, name in enumerate(SIGNALS):
        print(f"{name:9}", *(f"{labels[t + 1]} {jump[t, i]:.3f}" for t in np.argsort(-jump[:, i])[:6]), sep="   ")
    try:
        val, T = read_validation(data, run), min(128, c.block_size)
        ends = np.flatnonzero(val == tokenizer.eot_token)
        starts = ends[:-1][np.diff(ends) > T][:64] + 1
        if len(starts) < 8:
            raise ValueError(f"{data} holds only {len(starts)} stories of {T} tokens or more")
        stories, _ = batch(model, val, np.stack([starts, np.full(len(starts), T)], 1))
        share = 100 * variance_shares(model.signals(stories).cpu().double().numpy())
        print(f"\nVariance over the first {T} tokens of {len(starts)} validation stories, in %: "
              "story (tonic) / position / token (phasic)")
        table(["layer", *SIGNALS], [[f"{i}", *(" / ".join(f"{x:3.0f}" for x in share[:, i, j]) for j in range(3))]
                                    for i in range(c.n_layer)])
    except (OSError, ValueError) as error:
        print(f"\nNo shares of tonic and phasic variance, they need validation stories: {error}")
    entropy = attention_entropy(model, ids)
    print("\nAttention entropy in nats, on the same queries and keys (more precision must lower it; how far?)")
    table(["layer", "mean precision", "entropy", "at precision 1", "difference"],
          [[f"{i}", f"{s[:, i, 1].mean():.3f}", f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}"]
           for i, (a, b) in enumerate(entropy.mean((2, 3)).T)])
    print()
    plot_brain_scan(s, labels, run, folder)
    plot_attention_entropy(entropy, s[..., 1], run, folder)


@torch.no_grad()
def ablations(model, batches):
    """
    Task loss under each condition on batches, pairs of ids and targets (B, T) -> {condition: (batches,) nats per
    token}, "as trained" first; and the signals as trained of the tokens that have a target, (N, L, 3).

    Pinned to its mean, a signal is a constant per layer: what that adds to the loss is what its moving is worth.
    Pinned to its neutral value, 1, it is gone. "prefix only" lets a `global` model's salience see tokens 0..t (causal
    mode), all there is when it generates: what that adds is the leak, what the sight of the future had taken off.
    """
    s, names = torch.cat([model.signals(x)[y >= 0] for x, y in batches]), model.config.signals

    def pin(which, value):  # value (L, 3)
        mask = torch.tensor([name in which for name in SIGNALS], device=s.device)
        return dict(edit=lambda signals: torch.where(mask, value, signals))

    conditions = {"as trained": {}}
    for how, value in (("mean", s.mean(0)), ("neutral", torch.ones_like(s[0]))):
        conditions |= {f"{name} {how}": pin([name], value) for name in names}
        conditions |= {f"all {how}": pin(names, value)} if len(names) > 1 else {}
    if model.config.salience == "global":
        conditions["prefix only"] = dict(salience="causal")
    return {name: np.array([model(x, y, **how).task.item() for x, y in tqdm(batches, name, leave=False, disable=None)])
            for name, how in conditions.items()}, s


def gradients(model, x, y):
    """
    A backward pass for each of the windows x, y (W, T) -> their mean signals (W, L, 3), the norms of the gradients of
    each layer's weights, all of them and the FFN's (W, L, 2), and the losses (W,). Padding counts nowhere.
    """
    signals, norms, losses = [], [], []
    for i in tqdm(range(len(x)), "gradients", leave=False, disable=None):
        model.zero_grad()
        loss = model(x[i : i + 1], y[i : i + 1]).task
        loss.backward()
        norms.append([[math.hypot(*(p.grad.norm().item() for name, p in block.named_parameters() if part in name))
                       for part in ("", "ffn_")] for block in model.blocks])
        signals.append(model.signals(x[i : i + 1])[y[i : i + 1] >= 0].mean(0).cpu().numpy())
        losses.append(loss.item())
    model.zero_grad()
    return np.array(signals), np.array(norms), np.array(losses)


def shielding(signals, norms):
    """Pearson's r over windows, (L, 2): mean gain and the layer's norm, mean gate and its FFN's; NaN for a constant."""
    pairs = [[(signals[:, i, 0], norms[:, i, 0]), (signals[:, i, 2], norms[:, i, 1])] for i in range(norms.shape[1])]
    return np.array([[np.corrcoef(a, b)[0, 1] if a.std() > 1e-7 else math.nan for a, b in row] for row in pairs])


def audit(model, tokenizer, run, data, folder, budget=32768):
    """What each signal is worth, how far the gate closes, and whether gradients are shielded: tables and audit.png."""
    T, val = model.config.block_size, read_validation(data, run)
    rows = rows_of(val, T, tokenizer.eot_token if run["rows"] == "aligned" else None)  # as it was trained
    rows = rows[np.random.default_rng(0).permutation(len(rows))[: max(2, budget // T)]]  # as train.py chooses
    size = max(1, len(rows) // 32)
    batches = [batch(model, val, rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
    if len(batches) < 2:
        raise ValueError(f"{data} holds fewer than two rows of {T} validation tokens: prepare more text")
    loss, s = ablations(model, batches)
    base = loss.pop("as trained")
    added = {name: ((x - base).mean(), 2 * (x - base).std(ddof=1) / math.sqrt(len(base))) for name, x in loss.items()}
    print(f"\nLoss on {len(batches) * size} validation rows of up to {T} tokens, in nats per token; ± is two standard "
          "errors, paired by batch")
    table(["signals", "loss", "added", "±"], [["as trained", f"{base.mean():.4f}", "", ""]] + [
        [name, f"{base.mean() + m:.4f}", f"{m:+.5f}", f"{e:.5f}"] for name, (m, e) in added.items()])
    if "prefix only" in added:
        print(f"As trained, every position sees the future: {base.mean():.4f} is no likelihood. The honest loss is "
              f"{loss['prefix only'].mean():.4f}; the leak is {added['prefix only'][0]:+.4f} nats.")
    gate = s[..., 2].cpu().numpy()  # (N, L)
    print("\nShare of tokens with the gate below 0.5, by layer:", *(f"{x:.1%}" for x in (gate < 0.5).mean(0)))

    # Two kinds of text as far apart as can be had without another download: stories, and this very program.
    T, r, mean = min(T, 128), [], []
    with open(__file__, encoding="utf-8") as file:
        code = np.array(tokenizer.encode_ordinary(file.read()))
    code_rows = rows_of(code, T)
    code_rows = code_rows[np.linspace(0, len(code_rows) - 1, 32).astype(int)]
    for text, part in ((val, np.minimum(rows[:32], (len(val), T))), (code, code_rows)):
        signals, norms, losses = gradients(model, *batch(model, text, part))
        r.append(shielding(signals, norms))
        mean.append(losses.mean())
    print(f"""
Gradient shielding (Eq. 17), up to 32 windows of {T} tokens of stories (loss {mean[0]:.3f}) and of code
(loss {mean[1]:.3f}): r of a window's mean gain with the gradient norm of the layer's weights, and of its mean gate with
that of the FFN's. Shielding predicts r > 0. But a higher loss makes larger gradients, too, and chance alone gives |r|
up to 0.35.""")
    table(["layer", "gain: stories", "code", "gate: stories", "code"],
          [[f"{i}", *(f"{x[i, n]:+.2f}" for n in (0, 1) for x in r)] for i in range(gate.shape[1])])
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
    save(fig, folder, "audit.png", run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    add, default = parser.add_argument, " (default: %(default)s)"
    add("log", nargs="*", metavar="LOG", help="training logs (default: out/training.log)")
    add("--out", help="folder for the pictures (default: beside the first log or the checkpoint)")
    add("--compare", nargs="+", metavar="LOG", help="training logs of several settings and seeds: which are better, "
        "by how much? Tables, comparison.png, and runs.csv with a line for each run")
    add("--ckpt", default="out/ckpt_best.pt", help="checkpoint that the following look into" + default)
    add("--data", default="data", help="folder that prepare.py wrote" + default)
    add("--memory", action="store_true", help="what 200 sampled demo stories keep to the last line: a table, and "
        "memory.png from the training.log beside the checkpoint")
    add("--scan", metavar="TEXT", help="what the controller does to TEXT: tables, brain_scan.png and "
        "attention_entropy.png")
    add("--audit", action="store_true", help="what each signal is worth, on about 32,000 tokens of validation data: "
        "tables and audit.png")
    args = parser.parse_args()
    inside = args.memory or args.audit or args.scan is not None
    try:
        if args.compare:
            compare(args.compare, args.out)
        if args.log or not (args.compare or inside):
            analyse_logs(args.log or [os.path.join("out", "training.log")], args.out)
        if inside:
            model, tokenizer, run = load(args.ckpt)
            beside = os.path.dirname(args.ckpt)
            folder = beside if args.out is None else args.out
            if not model.controller and (args.audit or args.scan is not None):
                raise ValueError(f"{args.ckpt} was trained with --signals none: it has no controller to look into")
            print(title(run))
            if args.memory:
                memory(model, tokenizer, run, args.data, os.path.join(beside, "training.log"), folder)
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
