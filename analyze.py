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
"Diverging". But noise would hardly ever let a flat run pass, so the slope has a 98% interval (Student's t, wider where
neighbouring errors correlate). If that holds zero, the log shows no trend, which is "Converged" too, provided that it
is narrower than the threshold, or allows a drift over the window below the scatter of single points. Else the slope
alone decides, and the verdict says that it is uncertain. Below 5 points it is "Undecided"; a run that ends in a NaN or
infinite loss is "Diverging". A loss flattens as the learning rate falls: more training may help a "Converged" run.

Sample efficiency (section 5.2): L(s) = a + b s^-c, a >= 0, is fitted by least squares to the smoothed loss, the mean
over bins of equal width in log s. The 95% and 99% steps are where it has first made that share of its total improvement
(first value to lowest); between them lies the active phase. The Sample Efficiency Index (SEI), which the paper does not
define, is the mean, over the steps of the run, of the share of the total improvement already made (1: all at once; 0.5:
a straight line).

Comparison: runs that differ in the seed alone form a group. Runs of one seed share the order of the data and the base
weights, so groups are compared seed by seed: the mean difference of their final losses has a 95% interval (Student's
t). An interval that holds zero shows no difference.

Memory: a slot of the demo stories, say the hero's name, is learned at the first validation from which on the loss on
its words, above what any model must lose, stays below 0.5 nats per story.
"""

import argparse
import csv
import io
import math
import os
import re
import signal
import sys
import textwrap

if __name__ == "__main__":  # while torch loads, Ctrl-C just ends the script
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import prepare
from kernels import DEVICE_HELP, DEVICES, pick_device
from ncn import SIGNALS, write_file
from prepare import SLOTS, command, fail, rows_of
from sample import generate, load_model

plt.switch_backend("Agg")  # no display needed
# Okabe and Ito's colours stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, RED, SKY = COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #56B4E9".split()
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.spines.top": False,
                     "legend.fontsize": 8.5, "figure.constrained_layout.use": True})


def save(fig, folder, name, run=None):
    """Writes the picture, 1000 pixels wide, under the title of a run."""
    path = os.path.join(folder, name)
    if run:
        fig.suptitle(title(run), fontsize=9)
    os.makedirs(folder or ".", exist_ok=True)
    write_file(path, lambda file: fig.savefig(file, dpi=100))
    plt.close(fig)
    print(f"wrote {path}")


def table(columns, rows):
    """Prints rows of values; columns: {head: format}. All but the first stand to the right, NaN becomes a dash."""
    cells = [["-" if x != x else x if isinstance(x, str) else format(x, how)
              for x, how in zip(row, columns.values(), strict=True)] for row in rows]
    width = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for first, *rest in [list(columns), ["-" * w for w in width], *cells]:
        print(first.ljust(width[0]), *(cell.rjust(w) for cell, w in zip(rest, width[1:], strict=True)), sep="  ")


def title(run):
    """The run's name and settings, in lines that fit 1000 pixels."""
    return textwrap.fill(f"{run['name']} | {run['settings']}".rstrip(" |"), 130).replace("$", r"\$")


# ---- Logs ------------------------------------------------------------------------------------------------------------
NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))"
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[,.](\d{3}) \[INFO\] (.*)")
STEP = re.compile(rf"Step: (\d{{1,15}}) \|.*?\| Loss: {NUMBER} \|(?:.*?Tok/s: {NUMBER})?", re.I)
VALIDATION = re.compile(rf"Validation Result: Loss: {NUMBER}(?: \||$)", re.I)
ABOVE = re.compile(rf"Above the stories' entropy: .*? {NUMBER} per story \| (.+)")
STOPPED = re.compile(r"Stopped: .* at step (\d{1,15})")  # train.py's last words when a loss is not finite
HEAD = re.compile(r"(?:[\d,]+ )?(Preset|parameters|Settings|Data|fp32|bf16|fp16|steps)\b.+")  # what a run is, by key
SHOWN = "signals salience n_layer n_head n_embd block_size batch_size grad_accum lr seed".split()  # in titles


def read_log(path):
    """Reads a training.log, ours or the authors' (the format is train.py's); lines of other kinds are skipped.
    Returns a dict: name, path, settings, parameters, dtype (str); notes (list of str); future (bool: global salience);
    of the rows with a finite loss step (N,) int64, loss (N,) nats, tokens (N,), minutes (N,) of training, from the
    logged speeds, so without validation and pauses; speed, their median (tokens/s); val, a list of (step, loss); above,
    for demo stories, a list of (step, nats per story above their entropy, {slot: its share of them}); setup and data,
    the name=value pairs (str) in the lines on settings and data; broke, the step of a non-finite end or None. Where
    steps go back, a run was resumed: the later lines win. Where they go back to the start, a second run was appended:
    the last run counts, and a note says so. Raises OSError, and ValueError for a file with no training step."""
    logged, head = [], {}  # logged: step, loss, tokens/s, time, validation loss, above the entropy, the line
    with open(path, encoding="utf-8", errors="replace") as file:
        for time, ms, text in (m.groups() for m in map(LINE.match, file) if m):
            if m := STEP.match(text) or STOPPED.match(text):
                loss, speed = m.groups()[1:] or (math.nan, math.nan)
                logged.append([int(m[1]), float(loss), float(speed or "nan"), f"{time}.{ms}", math.nan, None, text])
            elif logged and (m := VALIDATION.match(text)):
                logged[-1][4] = float(m[1])
            elif logged and (m := ABOVE.match(text)):
                logged[-1][5] = float(m[1]), {slot: float(x) for slot, x in re.findall(rf"(\w+) {NUMBER}", m[2])}
            elif m := HEAD.match(text):
                head[m[1]] = text
    if not logged:
        raise ValueError(f"{path} holds no training step: it is not a log of train.py's, or of a run that just began")

    rows, runs = [], 1
    for row, after in zip(logged, [*logged[1:], logged[-1]], strict=True):
        if rows and row[0] <= rows[-1][0]:
            # A run that starts afresh logs its first step no later than one logging interval after zero.
            afresh = row[0] < rows[-1][0] and row[0] <= max(rows[0][0], after[0] - row[0])
            rows = [old for old in rows if old[0] < row[0] and not afresh]
            runs += afresh
        rows.append(row)

    step, loss, speed, time = map(np.array, list(zip(*rows, strict=True))[:4])
    # Tokens per step: as the log says, else the usual speed x time per step.
    guess = speed[1:] * np.diff(time.astype("datetime64[ms]")).astype(float) / 1000 / np.diff(step)
    stated, guess = re.search(r"steps of (\d[\d,]*) tokens", head.get("steps", "")), guess[np.isfinite(guess)]
    tokens = float(stated[1].replace(",", "")) if stated else np.median(guess) if len(guess) else math.nan
    usual = np.median(speed[speed > 0]) if (speed > 0).any() else math.nan
    minutes = np.cumsum(np.diff(step, prepend=0) * tokens / np.where(speed > 0, speed, usual)) / 60
    fine, future = np.isfinite(loss), "sees the future" in rows[0][6]
    if not fine.any():
        raise ValueError(f"{path}: every logged loss is NaN or infinite, there is nothing to draw")
    notes = [f"{runs} runs in one file, this is the last"] * (runs > 1)
    notes += [f"{(~fine).sum()} rows with a NaN or infinite loss left out"] * (not fine.all())
    notes += ["global salience: the loss sees the future and is no likelihood"] * future
    folder, stem = os.path.split(os.path.splitext(os.path.abspath(path))[0])
    name = os.path.basename(folder) if stem == "training" else os.path.join(os.path.basename(folder), stem)
    setup, data = (dict(re.findall(r"(\w+)=(\S+)", head.get(key, ""))) for key in ("Settings", "Data"))
    if setup:
        head["Settings"] = "Settings: " + " ".join(f"{key}={setup[key]}" for key in SHOWN if key in setup)
    return dict(name=name, path=path, future=future, notes=notes, setup=setup, data=data, speed=usual,
                settings=" | ".join(head[key] for key in head if key in ("Preset", "parameters", "Settings", "steps")),
                parameters=head.get("parameters", "unknown").split()[0],
                dtype=" and ".join(key for key in head if key[2:] in ("16", "32")) or "an unknown precision",
                step=step[fine], loss=loss[fine], tokens=tokens * step[fine], minutes=minutes[fine],
                val=[(row[0], row[4]) for row in rows if math.isfinite(row[4])],
                above=[(row[0], *row[5]) for row in rows if row[5]],
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
    """The verdict as the head of this file defines it. Returns a dict: verdict, why (str); slope and half, the half
    width of its 98% interval (nats per 1,000 steps; NaN below 5 points); first, the window's first step; and the fitted
    line's middle: step and level (nats)."""
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
    elif half < threshold or half * (d[-1] - d[0]) <= scatter:
        name, why = "Converged", f"no trend, though noise would hide up to {half:.2g} nats per 1,000 steps"
    else:
        name, why = trend, f"uncertain: by the slope alone, {n} points are too few for their noise"
    return dict(verdict=name, why=why, slope=slope, half=half, first=first, step=x.mean(), level=y.mean())


def plot_convergence(run, v, folder, name):
    """convergence_analysis.png: the whole history above; the last 15% and the fitted line below."""
    step, loss, future = (run[key] for key in ("step", "loss", "future"))
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(10, 8.2))
    top.axvspan(v["first"], step[-1], color="0.9", zorder=0, label="last 15% of the steps")
    if math.isfinite(v["half"]):
        x = np.array([v["first"], step[-1]])
        bottom.plot(x, v["level"] + v["slope"] * (x - v["step"]) / 1000, "--", color=RED, lw=2.2, zorder=3,
                    label=f"linear fit: {v['slope']:+.4f} ± {v['half']:.4f} nats per 1,000 steps")
    for ax, start in ((top, step[0]), (bottom, v["first"])):
        part = step >= start
        ax.plot(step[part], loss[part], ".", color="0.65", ms=3 if part.sum() > 200 else 6, label="logged loss")
        for share, colour, width in ((0.02, SKY, 1.2), (0.15, BLUE, 2.2)):
            span = max(1, round(share * len(step)))
            ax.plot(step[part], ewma(loss, span)[part], color=colour, lw=width, label=f"EWMA over {share:.0%} ({span})")
        if val := [p for p in run["val"] if p[0] >= start]:
            ax.plot(*np.transpose(val), "D", color=ORANGE, mec="black", label=f"validation (last {val[-1][1]:.4f})")
        low, high = ax.get_ylim()
        ax.set(xlabel="optimizer step", ylabel="loss (nats per token)",
               ylim=(low, high + 0.25 * (high - low)))  # room for the legend above the points
        ax.xaxis.set_major_formatter("{x:,.10g}")
        ax.legend(loc="upper right", ncols=2)
        twin = ax.twinx()  # the same heights, as exp(loss)
        twin.set(ylim=ax.get_ylim(), ylabel="exp(loss): sees the future, no perplexity" if future else "perplexity")
        twin.yaxis.set_major_formatter(lambda x, _: f"{math.exp(min(x, 700)):,.5g}")
        twin.grid(False)
    bottom.set_title(f"{v['verdict']}: {v['why']}", fontsize=11, weight="bold")
    save(fig, folder, name, run)


def efficiency(run, bins=128):
    """The power law and the index as the head of this file defines them: a dict of step, loss (at most `bins`,), the
    smoothed curve; a, b, c, r2 of the fit; p95, p99, indices into the curve; sei. None if it is too short or flat."""
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
    for i, (run, e) in enumerate(fits):
        colour, step, loss = COLOURS[i % 6], e["step"], e["loss"]
        top.plot(step, loss, color=colour, lw=1.8, label=f"{run['name']}: {e['a']:.2f} + {e['b']:.3g} s^-{e['c']:.2f}, "
                                                         f"R² {e['r2']:.3f}, SEI {e['sei']:.3f}")
        top.plot(step, e["a"] + e["b"] * step ** -e["c"], "--", color=colour, lw=1.3)
        active = slice(e["p95"], e["p99"] + 1)
        top.plot(step[active], loss[active], color=colour, lw=7, alpha=0.35)
        for p, mark in ((e["p95"], "o"), (e["p99"], "s")):
            top.plot(step[p], loss[p], mark, color=colour, mec="black", ms=8)
        for ax, x in ((left, run["tokens"] / 1e6), (right, run["minutes"])):
            ax.plot(np.interp(step, run["step"], x), loss, color=colour, lw=1.6)
    top.set(xscale="log", xlabel="optimizer step s (log scale)", ylabel="smoothed loss (nats per token)",
            title="Dashed: power-law fit. Circle, square: 95%, 99% of the improvement; between them the active phase")
    fig.legend(loc="outside lower center", ncols=2)
    left.set(xscale="log", xlabel="training tokens (millions, log scale)", ylabel="smoothed loss (nats per token)")
    right.set(xscale="log", xlabel="training time without validation (minutes, log scale)")
    save(fig, folder, "sample_efficiency.png")


def analyse_logs(paths, out):
    """Convergence and sample efficiency of each log: verdicts, a table and pictures."""
    runs = [read_log(path) for path in paths]  # all of them first: a bad one leaves no half of the pictures
    folders = [os.path.dirname(r["path"]) if out is None else out for r in runs]
    fits, rows = [efficiency(run) for run in runs], []
    for run, e, folder in zip(runs, fits, folders, strict=True):
        v = verdict(run)
        for note in run["notes"] + ["too few points, or no improvement, for a sample-efficiency fit"] * (not e):
            print(f"{run['name']}: {note}")
        slope = f", slope {v['slope']:+.4f} ± {v['half']:.4f} nats per 1,000 steps" * math.isfinite(v["half"])
        print(f"{run['name']}: {v['verdict']}{slope} ({v['why']})")
        # Runs that share a folder get their names into the pictures' names.
        tag = "_" + re.sub(r"\W+", "-", run["name"]) if folders.count(folder) > 1 else ""
        plot_convergence(run, v, folder, f"convergence_analysis{tag}.png")
        final, first = (r["val"][-1][1] if r["val"] else math.nan for r in (run, runs[0]))
        rows.append([run["name"], run["step"][-1], run["tokens"][-1] / 1e6, run["minutes"][-1],
                     ewma(run["loss"], max(1, 0.15 * len(run["loss"])))[-1], final, final - first,
                     *((e["step"][e["p95"]], e["step"][e["p99"]], e["sei"]) if e else [math.nan] * 3)])
    if any(fits):
        plot_sample_efficiency([(run, e) for run, e in zip(runs, fits, strict=True) if e], folders[0])
    print()
    table({"run": "", "steps": ",", "Mtokens": ",.2f", "minutes": ",.1f", "train loss": ".4f", "val loss": ".4f",
           "vs first": "+.4f", "95% step": ",.0f", "99% step": ",.0f", "SEI": ".3f"}, rows)


# ---- Comparisons over seeds ------------------------------------------------------------------------------------------
# The settings in which groups may differ, which then name them. All others but the seed must be equal.
MODEL = """signals salience start n_layer n_head n_embd n_ffn n_control dropout ncn_hidden ncn_heads
           homeostatic_lambda""".split()


def read_groups(paths):
    """Finished runs grouped by all their settings but the seed, the first log's group first: {label: {seed: run}}. A
    label says what differs from the first group. Raises OSError, and ValueError where runs cannot be compared."""
    groups, first = {}, None
    for run in map(read_log, paths):
        path, setup = run["path"], run["setup"] | run["data"]
        if "seed" not in setup:
            raise ValueError(f"{path} does not name its settings and its seed: only train.py's logs can be compared")
        model, seed = [(name, setup.pop(name, "unset")) for name in MODEL], int(setup.pop("seed"))
        model = (*model, ("parameters", run["parameters"]))  # they tell of a change in the code
        first = first or (path, setup, model)
        if differ := [f"{name} ({first[1].get(name)}, {setup.get(name)})" for name in first[1] | setup
                      if first[1].get(name) != setup.get(name)]:
            raise ValueError(f"{first[0]} and {path} cannot be compared, they differ in {', '.join(differ)}")
        if run["broke"] is not None or not run["val"] or run["val"][-1][0] < int(setup.get("max_steps", 0)):
            print(f"{path} is left out, it ends at step {run['broke'] or run['step'][-1]} of {setup.get('max_steps')}")
        elif groups.setdefault(model, {}).setdefault(seed, run) is not run:
            raise ValueError(f"{groups[model][seed]['path']} and {path} have the same settings and the same seed")
    base = first[2]
    if base not in groups:
        raise ValueError(f"no run of the settings of {first[0]} is finished, the first to compare the others with")
    if len(dtypes := {run["dtype"] for group in groups.values() for run in group.values()}) > 1:
        print(f"Not all runs computed in the same precision, but in {', '.join(sorted(dtypes))}")
    groups = {base: groups.pop(base)} | groups
    # The parameters are told only where nothing else tells two groups apart.
    n = -1 if len({model[:-1] for model in groups}) == len(groups) else None
    varied = [pairs[0][0] for pairs in zip(*(model[:n] for model in groups), strict=True) if len(set(pairs)) > 1]
    varied = varied or ["signals", "salience"]
    return {" ".join(f"{name}={value}".replace(",".join(SIGNALS), "all") for name, value in model
                     if name in varied and (model == base or (name, value) not in base)):
            dict(sorted(group.items())) for model, group in groups.items()}


def curves(runs):
    """Validations that all runs have: steps (n,), losses and minutes of training (runs, n)."""
    steps = np.array(sorted(set.intersection(*({step for step, _ in run["val"]} for run in runs))))
    return (steps, np.array([[dict(run["val"])[step] for step in steps] for run in runs]),
            np.array([np.interp(steps, run["step"], run["minutes"]) for run in runs]))


def paired(first, group):
    """A group against the first, both {seed: run}, by the n seeds that they share: None if n = 0, else a dict of n; of
    steps (V,) of validations, mean and half (V,), the mean difference and half its 95% interval, sd (V,), the scatter
    of the differences, and unpaired (V,), what it would be between different seeds (NaN for one seed); and of reached,
    the step at which the group's mean curve first reaches the first group's final loss, NaN if it never does."""
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
    return dict(n=n, steps=steps, mean=(b - a).mean(0), half=half, sd=sd, unpaired=unpaired, reached=reached)


def learned(above, bound=0.5):
    """When each slot was learned, from read_log's `above`, as the head of this file defines it: {slot: step or inf}."""
    steps, parts = [step for step, *_ in above] + [math.inf], [part for *_, part in above]
    return {slot: steps[max((i for i, part in enumerate(parts, 1) if not part.get(slot, math.inf) < bound), default=0)]
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
        p, runs = pairs[label], list(group.values())
        loss, when = [run["val"][-1][1] for run in runs], [learned(run["above"]) for run in runs]
        difference = [p[key][-1] for key in ("mean", "half", "sd")] if p and label != name else [math.nan] * 3
        rows.append([label, len(runs), runs[0]["parameters"], np.median([run["speed"] for run in runs]), np.mean(loss),
                     np.std(loss, ddof=1) if len(runs) > 1 else math.nan, *difference, p["reached"] if p else math.nan])
        if all(when):
            for text, of in ((label, np.median), ("    from", min), ("    to", max)):
                steps = [of([w.get(slot, math.inf) for w in when]) for slot in when[0]]
                slots.append([text, *("never" if step == math.inf else step for step in steps)])
        for seed, run, w in zip(group, runs, when, strict=True):
            write([label, run["name"], seed, run["parameters"].replace(",", ""), f"{run['speed']:.0f}",
                   f"{run['minutes'][-1]:.2f}", run["val"][-1][1], *(
                       " ".join(f"{key}={value}" for key, value in dict(items).items())
                       for items in (w, run["val"], run["data"], run["setup"]))])
        for note in sorted({note for run in runs for note in run["notes"]}):
            print(f"{label}: {note}")
        for lacking, seeds in ((label, first.keys() - group), (name, group.keys() - first)):
            if seeds:
                print(f"{lacking} has no run of seed {', '.join(map(str, sorted(seeds)))}: pairs are of common seeds")
    print("\nFinal validation loss: mean and scatter (sd) of the seeds; difference to the first group, seed by seed,\n"
          "with 95% interval and scatter; step at which the mean curve reaches the first group's final loss")
    table({"group": "", "seeds": "", "parameters": "", "tokens/s": ",.0f", "loss": ".4f", "sd": ".4f",
           "difference": "+.4f", "95% ±": ".4f", "pairs' sd": ".4f", "reached at": ",.0f"}, rows)
    others = [p for label, p in pairs.items() if p and label != name]
    if min([len(group) for group in groups.values()] + [p["n"] for p in others]) < 2:
        print("One seed is an anecdote, it has no interval: train more with --seed.")
    if scatter := [(p["sd"][-1], p["unpaired"][-1]) for p in others if p["sd"][-1] > 0]:
        sd, unpaired = np.sqrt(np.square(scatter).mean(0))
        print(f"Runs of one seed share data order and base weights: their differences scatter by {sd:.4f}, those of\n"
              f"different seeds would by {unpaired:.4f}. That is worth {(unpaired / sd) ** 2:.2g} times the seeds.")
    if slots:
        print("\nStep at which each slot was learned, its loss staying below 0.5 nats per story: median and range")
        table({"group": "", **dict.fromkeys(when[0], ",.0f")}, slots)
    folder = os.path.dirname(paths[0]) if out is None else out
    plot_comparison(groups, pairs, folder)
    path = os.path.join(folder, "runs.csv")
    write_file(path, lambda binary: binary.write(file.getvalue().encode()))
    print(f"wrote {path}")


def plot_comparison(groups, pairs, folder):
    """comparison.png: validation curves by step and by time, and the differences to the first group by step."""
    fig = plt.figure(figsize=(10, 8.6))
    left, right, below = fig.subplot_mosaic("AB;CC").values()
    for i, ((label, group), p) in enumerate(zip(groups.items(), pairs.values(), strict=True)):
        steps, loss, minutes = curves(group.values())
        bands = [(left, steps, loss.mean(0), loss.min(0), loss.max(0)),
                 (right, minutes.mean(0), loss.mean(0), loss.min(0), loss.max(0))]
        if p:
            bands.append((below, p["steps"], p["mean"], p["mean"] - p["half"], p["mean"] + p["half"]))
        for ax, x, mean, low, high in bands:
            ax.plot(x, mean, ("-", "--", ":")[i // 6 % 3], color=COLOURS[i % 6], lw=1.8, marker=".",
                    label=f"{label} ({len(group)})" if ax == left else None)
            ax.fill_between(x, low, high, color=COLOURS[i % 6], alpha=0.15, lw=0)
    left.set(xlabel="optimizer step", ylabel="validation loss (nats per token)",
             title="By step: mean and range of the seeds")
    right.set(xlabel="training time without validation (minutes)", title="The same by time")
    below.set(xlabel="optimizer step", ylabel="difference (nats per token)",
              title="Difference to the first group, seed by seed, with its 95% interval")
    fig.legend(loc="outside lower center", ncols=2, title="group (seeds)")
    save(fig, folder, "comparison.png")


# ---- Models ----------------------------------------------------------------------------------------------------------
def load(path, device):
    """-> the model (eval mode, on the device), its tokenizer, and a dict of name, settings, data and rows."""
    model, tokenizer, ckpt = load_model(path, device)
    c, data, name = model.config, ckpt["data"], os.path.join(*os.path.normpath(path).split(os.sep)[-2:])
    shown = vars(c) | {"signals": ",".join(c.signals) or "none"}
    settings = " ".join(f"{key}={shown[key]}" for key in SHOWN if key in shown)
    return model, tokenizer, dict(
        name=name, settings=f"step {ckpt.get('step', '?')} | {settings} | {data['tokenizer']} tokens", data=data,
        rows=setup.get("rows") if isinstance(setup := ckpt.get("settings"), dict) else None)


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
def above_entropy(model, tokens, tokenizer, labels=None, at_once=16):
    """What a model loses on whole demo stories, tokens (N,), above their entropy: nats per story, (len(SLOTS) + 1,),
    for each slot and for the rest. Rows begin with a story; global salience sees the past alone. With labels, see
    prepare.read_labels, the model is told them."""
    salience, nats = "causal" if model.config.salience == "global" else None, []
    rows = rows_of(tokens, model.config.block_size, aligned=True)  # every token is a target once, in their order
    for i in range(0, len(rows), at_once):
        x, y = batch(model, tokens, rows[i : i + at_once])
        control = prepare.control_windows(labels, rows[i : i + at_once])
        control = control if control is None else torch.from_numpy(control).to(x.device)
        logits = model(x, salience=salience, control=control)
        loss = F.cross_entropy(logits.mT.float(), y, ignore_index=-1, reduction="none")
        nats.append(loss[y >= 0].cpu().numpy())
    slots, least = prepare.label_slots(tokens, tokenizer, labels)
    return np.bincount(slots, np.concatenate(nats) - least, len(SLOTS) + 1) / (tokens == tokenizer.eot_token).sum()


def memory(model, tokenizer, run, args, folder, stories=200):
    """What a story remembers of its beginning: sampled ones are read back; memory.png shows when that was learned."""
    if "entropy_nats_per_story" not in run["data"]:
        raise ValueError(f"{run['name']} was not trained on the demo stories, no others can be read back")
    val, end = read_validation(args.data, run), tokenizer.eot_token
    ends = np.flatnonzero(val == end)[:500]
    labels = prepare.read_labels(args.data, "val", prepare.read_meta(args.data), val)
    above = above_entropy(model, val[: ends[-1] + 1], tokenizer, labels)
    prompt = torch.full((stories, 1), end, device=model.embed.weight.device)  # a story begins where another one ended
    most = 2 * int(np.diff(ends, prepend=-1).max())  # tokens: no story of the grammar is as long
    texts = generate(model, prompt, most, temperature=0.5, top_k=0, top_p=1.0, seed=0, end_token=end)[:, 1:].tolist()
    read = [prepare.read_back(tokenizer.decode(text[: text.index(end)])) for text in texts if end in text]
    right = [prepare.kept(mentions) for mentions in read if mentions]
    count = [sum(r[slot] for r in right) for slot in SLOTS] + [sum(all(r.values()) for r in right)]
    print(f"""
Of {stories} sampled stories (temperature 0.5) {len(right)} are stories of the grammar. In how many of the {stories} is
every later mention the first one's? And what is lost above the entropy, on {len(ends)} validation stories?""")
    table({"slot": "", "kept in": "", "share": ".1%", "nats per story": ".2f"}, [
        *([slot, n, n / stories, nats] for slot, n, nats in zip(
            [*SLOTS, "all of these"], count, [*above[:-1], above[:-1].sum()], strict=True)),
        ["the rest", "", "", above[-1]], ["whole story", "", "", above.sum()]])
    log = os.path.join(os.path.dirname(args.ckpt), "training.log")
    if not os.path.exists(log) or not (history := read_log(log)["above"]):
        return print(f"No memory.png: there is no {log} of a training on the demo stories")

    fig, ax = plt.subplots(figsize=(10, 6.2))
    steps, total, parts = zip(*history, strict=True)
    ax.plot(steps, total, color="black", lw=2.4, label="whole story")
    for (slot, step), colour in zip(learned(history).items(), [*COLOURS, "0.45"], strict=False):
        ax.plot(steps, [part.get(slot, math.nan) for part in parts], color=colour, lw=1.5,
                label=f"{slot}: learned at step {step:,}" if step < math.inf else f"{slot}: not learned")
        if step < math.inf:
            ax.plot(step, parts[steps.index(step)][slot], "o", color=colour, mec="black", ms=8, zorder=3)
    ax.axhline(0.5, color="0.5", ls="--", lw=1)
    ax.set_yscale("log", nonpositive="clip")
    ax.set(xlabel="optimizer step", ylabel="loss above the stories' entropy (nats per story, log scale)",
           ylim=(0.01, 2 * max(total)), title="A slot is learned (o) when its loss stays below half a nat (dashed)")
    ax.yaxis.set_major_formatter("{x:g}")
    fig.legend(loc="outside lower center", ncols=4)
    save(fig, folder, "memory.png", run)


def label(token, tokenizer):
    """A token as a table and a picture can show it, the space as a middle dot."""
    text = tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵")
    return "".join(c if c.isprintable() and ord(c) < 0x2200 else "?" for c in text)


def spread(s):
    """Signals (N, L, 3) -> for each layer, mean ± standard deviation of its three over the tokens, as text."""
    return [[f"{x.mean():.3f} ± {x.std():.3f}" for x in layer.T] for layer in s.swapaxes(0, 1)]


def variance_shares(s):
    """Where the signals' variance comes from: s (stories, T, L, 3), the stories aligned at their first token ->
    (3, L, 3), the shares of the story (tonic), the position, and the token (phasic), which sum to 1 (two-way analysis
    of variance). Neighbouring tokens are not independent, so the tonic share is if anything too high."""
    n, t = s.shape[:2]
    story, place = s.mean(1), s.mean(0)
    rest = ((s - story[:, None] - place + s.mean((0, 1))) ** 2).sum((0, 1)) / ((n - 1) * (t - 1))
    parts = np.stack([story.var(0, ddof=1) - rest / t, place.var(0, ddof=1) - rest / n, rest]).clip(0)
    return parts / parts.sum(0).clip(1e-30)


@torch.no_grad()
def attention_entropy(model, ids):
    """ids (1, T) -> entropy in nats of every row of attention, (2, L, n_head, T): with the learned precision, and with
    precision 1 on the same queries and keys, so that nothing but the precision differs."""
    x, signals, out = model.embeddings(ids), model.signals(ids), []
    future = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).triu(1)
    for block, s in zip(model.blocks, signals.unbind(2), strict=True):  # s (1, T, 3)
        q, k, _ = block.qkv(block.attn_norm(x)).unflatten(-1, (3, model.config.n_head, -1))[0].transpose(0, 2).unbind(1)
        scores = q @ k.mT / math.sqrt(q.size(-1))  # (n_head, T, T)
        for beta in (s[0, :, 1, None], 1.0):
            out.append(torch.special.entr((scores * beta).masked_fill(future, -math.inf).softmax(-1)).sum(-1))
        x = block(x, s)
    return torch.stack(out).unflatten(0, (-1, 2)).transpose(0, 1).cpu().numpy()


def scan(model, tokenizer, run, args, folder):
    """What the controller does to one text: tables, brain_scan.png and attention_entropy.png."""
    c, tokens = model.config, tokenizer.encode_ordinary(args.scan)
    if not tokens:
        raise ValueError('the text to scan has no tokens: give some, as in --scan "Once upon a time"')
    if len(tokens) > c.block_size:
        print(f"Only the first {c.block_size} of the text's {len(tokens)} tokens fit into the context")
    ids = torch.tensor([tokens[: c.block_size]], device=model.embed.weight.device)
    labels, s = [label(t, tokenizer) for t in tokens[: c.block_size]], model.signals(ids)[0].cpu().numpy()  # (T, L, 3)
    columns, layers = dict.fromkeys(["layer", *SIGNALS], ""), range(c.n_layer)
    print("\nSpecialisation: mean ± standard deviation of each signal over the text's tokens")
    table(columns, [[i, *row] for i, row in enumerate(spread(s))])
    jump = np.abs(np.diff(s, axis=0)).mean(1)  # (T - 1, 3)
    print("\nPhasic reactivity: the tokens at which each signal moves most (change, mean of the layers' sizes)")
    for i, name in enumerate(SIGNALS):
        print(f"{name:9}", *(f"{labels[t + 1]} {jump[t, i]:.3f}" for t in np.argsort(-jump[:, i])[:6]), sep="   ")
    try:
        val, T = read_validation(args.data, run), min(128, c.block_size)
        ends = np.flatnonzero(val == tokenizer.eot_token)
        starts = ends[:-1][np.diff(ends) > T][:64] + 1
        if len(starts) < 8:
            raise ValueError(f"{args.data} holds only {len(starts)} stories of {T} tokens or more")
        stories, _ = batch(model, val, np.stack([starts, np.full(len(starts), T)], 1))
        share = 100 * variance_shares(model.signals(stories).cpu().double().numpy())
        print(f"\nVariance over the first {T} tokens of {len(starts)} validation stories, in %: "
              "story (tonic) / position / token (phasic)")
        table(columns, [[i, *(" / ".join(f"{x:3.0f}" for x in part) for part in share[:, i].T)] for i in layers])
    except (OSError, ValueError) as error:
        print(f"\nNo shares of tonic and phasic variance, they need validation stories: {error}")
    entropy = attention_entropy(model, ids).mean((2, 3))  # (2, L)
    print("\nAttention entropy in nats, on the same queries and keys (more precision must lower it; how far?)")
    table({"layer": "", "mean precision": ".3f", "entropy": ".4f", "at precision 1": ".4f", "difference": "+.4f"},
          [[i, s[:, i, 1].mean(), a, b, a - b] for i, (a, b) in enumerate(entropy.T)])

    s, labels = s[:64], [t.replace("$", r"\$") for t in labels[:64]]
    fig, axes = plt.subplots(3, 1, figsize=(10, 8.4), sharex=True)
    for i, name in enumerate(SIGNALS):
        far = max(np.abs(s[..., i] - 1).max(), 0.02)
        image = axes[i].imshow(s[..., i].T, "BrBG", vmin=1 - far, vmax=1 + far, aspect="auto", interpolation="nearest")
        fig.colorbar(image, ax=axes[i], pad=0.01, label=f"{name} (neutral: 1)")
        axes[i].set(ylabel="layer", yticks=range(s.shape[1]))
        axes[i].grid(False)
    axes[2].set_xticks(range(len(labels)), labels, fontsize=9, rotation=90)
    axes[2].set_xlabel("token (· is a space)")
    save(fig, folder, "brain_scan.png", run)

    fig, ax = plt.subplots(figsize=(10, 5.2))
    for i, name in enumerate(("learned precision", "precision 1")):
        ax.bar(np.array(layers) + 0.4 * i - 0.2, entropy[i], 0.38, color=COLOURS[i], label=name)
    ax.set(xlabel="layer", ylabel="attention entropy (nats, mean of heads and tokens)", xticks=layers)
    ax.legend()
    save(fig, folder, "attention_entropy.png", run)


@torch.no_grad()
def ablations(model, batches):
    """Task loss under each condition on batches, pairs of ids and targets (B, T) -> {condition: (batches,) nats per
    token}, "as trained" first; and the signals as trained of the tokens that have a target, (N, L, 3).
    Pinned to its mean, a signal is a constant per layer: what that adds to the loss is what its moving is worth.
    Pinned to 1, neutral, it is gone. "prefix only" lets a `global` model's salience see tokens 0..t (causal mode), all
    there is when it generates: what that adds is the leak, what the sight of the future had taken off."""
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


def shielding(model, x, y):
    """A backward pass for each of the windows x, y (W, T); padding counts nowhere. Returns Pearson's r over the
    windows, (L, 2): of mean gain and the norm of the gradient of the layer's weights, and of mean gate and that of the
    FFN's, NaN for a constant signal; and the mean loss."""
    signals, norms, losses = [], [], []
    for i in range(len(x)):
        model.zero_grad()
        loss = model(x[i : i + 1], y[i : i + 1]).task
        loss.backward()
        norms.append([[math.hypot(*(p.grad.norm().item() for name, p in block.named_parameters() if part in name))
                       for part in ("", "ffn_")] for block in model.blocks])
        signals.append(model.signals(x[i : i + 1])[y[i : i + 1] >= 0].mean(0)[:, [0, 2]].tolist())
        losses.append(loss.item())
    model.zero_grad()
    signals, norms = np.array(signals), np.array(norms)  # (W, L, 2)
    covariance = ((signals - signals.mean(0)) * (norms - norms.mean(0))).mean(0)
    spread = np.where(signals.std(0) > 1e-7, signals.std(0), math.nan)
    return covariance / (spread * norms.std(0)), np.mean(losses)


def audit(model, tokenizer, run, args, folder, budget=32768):
    """What each signal is worth, how far the gate closes, and whether gradients are shielded: tables and audit.png."""
    T, val = model.config.block_size, read_validation(args.data, run)
    rows = rows_of(val, T, aligned=run["rows"] == "aligned")  # as it was trained
    rows = rows[np.random.default_rng(0).permutation(len(rows))[: max(2, budget // T)]]  # as train.py chooses
    size = max(1, len(rows) // 32)
    batches = [batch(model, val, rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
    if len(batches) < 2:
        raise ValueError(f"{args.data} holds fewer than two rows of {T} validation tokens: prepare more text")
    loss, s = ablations(model, batches)
    base = loss.pop("as trained")
    added = {name: ((x - base).mean(), 2 * (x - base).std(ddof=1) / math.sqrt(len(base))) for name, x in loss.items()}
    print(f"\nLoss on {len(batches) * size} validation rows of up to {T} tokens; ±: two standard errors, paired")
    table({"signals": "", "loss": ".4f", "added": "+.5f", "±": ".5f"}, [["as trained", base.mean(), "", ""]] + [
        [name, base.mean() + m, m, e] for name, (m, e) in added.items()])
    if "prefix only" in added:
        print(f"As trained, every position sees the future: {base.mean():.4f} is no likelihood. The honest loss is "
              f"{loss['prefix only'].mean():.4f}; the leak is {added['prefix only'][0]:+.4f} nats.")
    s = s.cpu().numpy()
    gate = s[..., 2]  # (N, L)
    print("\nMean ± standard deviation of each signal over these tokens, and the share of gates below 0.5")
    table({"layer": "", **dict.fromkeys(SIGNALS, ""), "gates below 0.5": ".1%"},
          [[i, *row, closed] for i, (row, closed) in enumerate(zip(spread(s), (gate < 0.5).mean(0), strict=True))])

    # Two kinds of text as far apart as can be had without another download: stories, and this very program.
    T = min(T, 128)
    with open(__file__, encoding="utf-8") as file:
        code = np.array(tokenizer.encode_ordinary(file.read()))
    code_rows = rows_of(code, T)[:: max(1, len(code) // T // 32)][:32]
    (stories, told), (program, coded) = (shielding(model, *batch(model, text, part)) for text, part in (
        (val, np.minimum(rows[:32], (len(val), T))), (code, code_rows)))
    print(f"""
Gradient shielding (Eq. 17), up to 32 windows of {T} tokens of stories (loss {told:.3f}) and of code (loss {coded:.3f}):
r of a window's mean gain with the gradient norm of the layer's weights, and of its mean gate with that of the FFN's.
Shielding predicts r > 0. But a higher loss makes larger gradients, too, and chance alone gives |r| up to 0.35.""")
    r = dict(zip(("gain: stories", "gain: code", "gate: stories", "gate: code"),
                 (stories[:, 0], program[:, 0], stories[:, 1], program[:, 1]), strict=True))
    layers = np.arange(gate.shape[1])
    table({"layer": "", **dict.fromkeys(r, "+.2f")}, zip(layers, *r.values(), strict=True))

    fig = plt.figure(figsize=(10, 8.6))
    top, left, right = fig.subplot_mosaic("AA;BC").values()
    value, error = np.transpose(list(added.values()))
    top.barh(list(added), value, xerr=error, capsize=3, color=[BLUE if "mean" in name else ORANGE for name in added])
    top.invert_yaxis()
    top.set(xlabel="added to the loss (nats per token, ± two standard errors)",
            title=f"What each signal is worth: pinned to its mean, and to neutral (loss as trained {base.mean():.4f})")
    left.boxplot(gate, positions=layers, widths=0.6, whis=(1, 99), showfliers=False)
    left.axhline(0.5, color=RED, ls="--", lw=1.2)
    left.set(xlabel="layer", ylabel="gate (box: half the tokens; whiskers: 98%)", ylim=(0, 1.05), title="The gate")
    for i, (name, x) in enumerate(r.items()):
        right.bar(layers + 0.2 * i - 0.3, x, 0.19, color=(BLUE, SKY, RED, ORANGE)[i], label=name)
    right.set(xlabel="layer", ylabel="correlation with the gradient norm", xticks=layers, ylim=(-1.05, 1.5),
              title="Gradient shielding (Eq. 17 predicts r > 0)")
    right.legend(ncols=2, loc="upper right")
    save(fig, folder, "audit.png", run)


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    add = parser.add_argument_group("of logs").add_argument
    add("log", nargs="*", metavar="LOG", help="training logs (default: out/training.log)")
    add("--compare", nargs="+", metavar="LOG", help="several settings and seeds: tables, comparison.png, runs.csv")
    add = parser.add_argument_group("of a checkpoint").add_argument
    add("--memory", action="store_true", help="what 200 sampled demo stories keep: table, and memory.png from its log")
    add("--scan", metavar="TEXT", help="what the controller does to TEXT: brain_scan.png, attention_entropy.png")
    add("--audit", action="store_true", help="what each signal is worth, on validation data: tables and audit.png")
    add("--ckpt", default="out/ckpt_best.pt", help="checkpoint to look into (default: %(default)s)")
    add("--data", default="data", help="folder that prepare.py wrote (default: %(default)s)")
    add = parser.add_argument_group("both").add_argument
    add("--out", help="folder for the pictures (default: beside the first log or the checkpoint)")
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    args = parser.parse_args()
    looks = [look for look, on in ((memory, args.memory), (scan, args.scan is not None), (audit, args.audit)) if on]
    if args.compare:
        compare(args.compare, args.out)
    if args.log or not (args.compare or looks):
        analyse_logs(args.log or [os.path.join("out", "training.log")], args.out)
    if looks:
        model, tokenizer, run = load(args.ckpt, pick_device(args.device))
        if not model.controller and looks != [memory]:
            raise ValueError(f"{args.ckpt} was trained with --signals none: it has no controller to look into")
        print(title(run))
        for look in looks:
            look(model, tokenizer, run, args, os.path.dirname(args.ckpt) if args.out is None else args.out)


if __name__ == "__main__":
    sys.exit(main())
