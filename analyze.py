"""
See how a run went, whether the controller helps, and what it does.

    python analyze.py                                  # out/training.log: convergence, efficiency
    python analyze.py a/training.log b/training.log    # the same, with the runs over each other
    python analyze.py --compare out/*/training.log     # several seeds: which settings are better?
    python analyze.py --memory                         # what does a model of demo stories remember?
    python analyze.py --scan "Timmy wanted an apple. He looked in the box, but it was empty."
    python analyze.py --audit                          # what is each signal worth?

Losses are in nats per token. What the words mean:

Verdict (paper, section 4.1.2): a straight line is fitted by least squares to the logged losses of
the last 15% of the steps. A slope within 0.001 nats per 1,000 steps of zero is "Converged", a
falling line "Still improving", a rising one "Diverging". That slope has a 98% interval (Student's
t, wider where neighbouring errors correlate). If the interval excludes zero, this verdict stands.
Else the run is "Converged", if half the interval is below the threshold, or makes less over the
window than the scatter of single points. Else the slope's verdict stands, marked as uncertain.
Below 5 points it is "Undecided"; a run that ends in a NaN or infinite loss is "Diverging". A loss
flattens as the learning rate falls: more training may help a "Converged" run.

Sample efficiency (section 5.2): L(s) = a + b s^-c, a >= 0, is fitted by least squares to the
smoothed loss, the mean over bins of equal width in log s. The 95% and 99% steps are where it has
first made that share of its total improvement (first value to lowest); between them lies the active
phase. The Sample Efficiency Index (SEI), which the paper does not define, is the mean, over the
steps of the run, of the share of the improvement already made (1: all at once; 0.5: a straight
line).

Comparison: runs that differ in the seed alone form a group, which is called by the settings that
differ from group to group. Runs of one seed share the order of the data and the base weights, so
groups are compared with the first one seed by seed: the mean difference of their final losses has a
95% interval (Student's t). An interval that holds zero shows no difference, and one seed is an
anecdote: it has none. The runs come from logs, from a runs.csv that an earlier comparison wrote, or
from both. To form the groups yourself, name them: NAME=PATTERN takes the runs whose name (the
folder of their log) or path fits the pattern, and settings after it narrow the choice:

    python analyze.py --compare assets/runs.csv \\
        "static=static-? lr=0.004" "causal=causal-0.1-? lr=0.004"

Memory: of 200 demo stories that the model tells, how many use just one of the names (colours,
places, ...) that the grammar knows, from their beginning to their end?
"""

import argparse
import csv
import io
import math
import os
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch

os.environ["MPLBACKEND"] = "Agg"  # pictures go to files; a notebook's setting may not exist here

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import prepare
from kernels import DEVICE_HELP, DEVICES, pick_device
from ncn import SIGNALS, write_file
from prepare import SLOTS, command, complain, prompt_tokens
from sample import generate, load_model

# Okabe and Ito's colours stay apart for every kind of colour vision. matplotlib calls them "C0"
# (blue), "C1" (orange), "C2" (green), "C3" (purple), "C4" (red), "C5" (sky) and "C6" (black).
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "black"]
plt.rcParams.update({
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
})


def save(fig, folder, name, title=""):
    """Writes the picture, 1000 pixels wide, under a title that may take several lines."""
    fig.suptitle(title, fontsize=7, wrap=True)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    write_file(path, lambda file: fig.savefig(file, dpi=100))
    plt.close(fig)
    print(f"wrote {path}")


def pairs(text):
    """The name=value pairs of a text: {name: value}, both text."""
    return dict(re.findall(r"(\w+)=(\S+)", text))


def joined(settings):
    """Settings as the text "name=value name=value", which pairs reads back."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


# ---- Logs ----------------------------------------------------------------------------------------
NUMBER = r"([-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|nan|inf))"
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \[INFO\] (.*)")
STEP = re.compile(rf"Step: (\d+) \|.*?\| Loss: {NUMBER} \|.*?Tok/s: {NUMBER}", re.I)
VALIDATION = re.compile(rf"Validation Result: Loss: {NUMBER}(?: \||$)", re.I)
STOPPED = re.compile(r"Stopped: .* at step (\d+)")  # train.py's last words: a loss is not finite
# The lines that say what a run is, each known by a word.
HEAD = re.compile(r"(?:[\d,]+ )?(parameters|Settings|Data|fp32|bf16|fp16)\b.+")


@dataclass
class Row:
    """What a log says of one step."""

    time: str
    loss: float = math.nan  # of the batches since the row before, nats per token
    speed: float = math.nan  # tokens per second
    validation: float = math.nan  # nats per token


@dataclass
class Run:
    """One training, as a log or a row of runs.csv tells it. Losses are in nats per token."""

    path: str
    name: str
    settings: dict  # train.py's flags, the precision and the number of parameters, {name: text}
    data: dict  # the log's Data line: digest, tokenizer, sizes, {name: text}
    speed: float  # tokens per second, median
    minutes: float  # of training, without validation and pauses
    validations: dict  # {step: loss}
    step: np.ndarray | None = None  # (N,); this and the rest only if it comes from a log
    loss: np.ndarray | None = None  # (N,)
    broke: int | None = None  # the step at which the loss ceased to be finite, if it did

    @property
    def final(self):
        """The last validation loss, NaN if there is none."""
        return [math.nan, *self.validations.values()][-1]


def read_lines(path):
    """The (step, Row) of a log in their order, and its header lines, {keyword of HEAD: line}."""
    rows = []
    head = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            stamped = LINE.match(line)
            if not stamped:
                continue
            time, text = stamped.groups()
            training = STEP.match(text)
            stopped = STOPPED.match(text)
            validation = VALIDATION.match(text)
            heading = HEAD.match(text)
            if training:
                rows.append((int(training[1]), Row(time, float(training[2]), float(training[3]))))
            elif stopped:
                rows.append((int(stopped[1]), Row(time)))
            elif validation and rows:
                rows[-1][1].validation = float(validation[1])
            elif heading:
                head[heading[1]] = text
    return rows, head


def last_run(rows):
    """The last run's {step: Row}, and the number of runs, in a log's (step, Row).

    Where the steps go back, the run was resumed from a checkpoint: the later rows replace what was
    lost. Where they go back to the start, nothing is left of the run before: a second one began."""
    by_step = {}
    runs = 1
    last = -1
    for step, row in rows:
        if step <= last:
            by_step = {earlier: kept for earlier, kept in by_step.items() if earlier < step}
            if not by_step:
                runs += 1
        by_step[step] = row
        last = step
    return by_step, runs


def minutes_of(by_step):
    """Minutes of training: the median time per step, times the steps. The median skips validations,
    where they come less often than log lines."""
    if len(by_step) < 2:
        return math.nan
    steps = list(by_step)
    times = np.array([row.time.replace(",", ".") for row in by_step.values()], "datetime64[ms]")
    seconds = np.diff(times) / np.timedelta64(1, "s")
    return np.median(seconds / np.diff(steps)) * steps[-1] / 60


def read_log(path):
    """The Run of a training.log, ours or the authors' (both have train.py's format).

    Lines of other kinds and rows without a finite loss are left out; prints what a reader of the
    losses must know. Raises OSError, and ValueError for a file without a training step."""
    lines, head = read_lines(path)
    by_step, runs = last_run(lines)
    finite = {step: row for step, row in by_step.items() if math.isfinite(row.loss)}
    if not finite:
        raise ValueError(f"{path} holds no training step with a finite loss: is it a training.log?")
    last = max(by_step)
    validations = {step: row.validation for step, row in finite.items()
                   if math.isfinite(row.validation)}
    settings = pairs(head.get("Settings", ""))
    settings["dtype"] = "+".join(sorted(head.keys() & {"fp32", "bf16", "fp16"}))
    settings["parameters"] = head.get("parameters", "unknown").split()[0].replace(",", "")
    if runs > 1:
        print(f"{path}: {runs} runs in one file, this is the last")
    if len(finite) < len(by_step):
        print(f"{path}: {len(by_step) - len(finite)} rows without a finite loss left out")
    if settings.get("salience") == "global" and settings.get("signals") != "none":
        print(f"{path}: global salience, so the loss sees the future and is no likelihood")
    return Run(
        path=path,
        name=os.path.basename(os.path.dirname(os.path.abspath(path))),
        settings=settings,
        data=pairs(head.get("Data", "")),
        speed=np.median([row.speed for row in finite.values()]),
        minutes=minutes_of(finite),
        validations=validations,
        step=np.array(list(finite)),
        loss=np.array([row.loss for row in finite.values()]),
        broke=None if last in finite else last,
    )


# ---- Verdict -------------------------------------------------------------------------------------
# Student's t: what |T| stays below with a probability of 95% and 98%, by degrees of freedom. The
# first is the normal distribution; between two entries t is nearly a straight line in 1 / freedom.
FREEDOM = np.array([math.inf, 30, 10, 7, 5, 4, 3, 2, 1])
STUDENT_T = {
    0.95: [1.960, 2.042, 2.228, 2.365, 2.571, 2.776, 3.182, 4.303, 12.706],
    0.98: [2.326, 2.457, 2.764, 2.998, 3.365, 3.747, 4.541, 6.965, 31.821],
}


def student_t(confidence, freedom):
    """The t that Student's T stays within with this probability, 0.95 or 0.98."""
    return np.interp(1 / freedom, 1 / FREEDOM, STUDENT_T[confidence])


def ewma(y, span):
    """Exponentially weighted mean of y (N,), alpha = 2 / (span + 1) -> (N,).

    Divided by the sum of its weights, it has no bias towards the first value."""
    keep = 1 - 2 / (span + 1)
    weights = keep ** np.arange(len(y))
    return np.convolve(y, weights)[: len(y)] / np.cumsum(weights)


@dataclass
class Verdict:
    """How a run ends, with the line that was fitted to its last 15%."""

    first: float  # the window's first step
    step: float  # its mean step: the line passes through (step, loss)
    loss: float
    slope: float = math.nan  # nats per 1,000 steps; NaN below 5 points
    half: float = math.nan  # half the width of its 98% interval
    name: str = "Undecided"
    why: str = "5 logged points are needed in the last 15% of the steps"


def judge(slope, half, drift, scatter):
    """The verdict's name and reason, as the head of this file defines it.

    slope, half: nats per 1,000 steps; drift: what half makes over the window, in nats."""
    threshold = 0.001
    if abs(slope) < threshold:
        trend = "Converged"
    elif slope < 0:
        trend = "Still improving"
    else:
        trend = "Diverging"
    if trend != "Converged" and abs(slope) > half:
        return trend, "the slope's interval excludes zero"
    if half < threshold or drift <= scatter:
        return "Converged", f"no trend beyond noise or 0.001: ± {half:.2g} nats per 1,000 steps"
    return trend, "uncertain: by the slope alone, there are too few points for their noise"


def verdict(run):
    """The Verdict on the last 15% of a run's steps, see the head of this file."""
    first = run.step[-1] - 0.15 * (run.step[-1] - run.step[0])
    window = run.step >= first
    x = run.step[window]
    y = run.loss[window]
    v = Verdict(first, x.mean(), y.mean())
    if len(x) >= 5:
        d = (x - v.step) / 1000  # thousands of steps
        v.slope = d @ y / (d @ d)
        rest = y - v.loss - v.slope * d
        scatter = math.sqrt(rest @ rest / (len(x) - 2))
        error = scatter / math.sqrt(d @ d)
        if scatter > 0:  # points whose neighbours err alike count as (1 - r) / (1 + r)
            r = np.clip(rest[1:] @ rest[:-1] / (rest @ rest), 0, 0.9)
            error *= math.sqrt((1 + r) / (1 - r))
        v.half = student_t(0.98, len(x) - 2) * error
        v.name, v.why = judge(v.slope, v.half, v.half * (d[-1] - d[0]), scatter)
    if run.broke is not None:
        v.name = "Diverging"
        v.why = f"the loss is not finite at step {run.broke:,}"
    return v


def draw_history(ax, run, start):
    """Logged, smoothed and validation losses from the step `start` on; exp(loss) on the right."""
    part = run.step >= start
    step = run.step[part]
    ax.plot(step, run.loss[part], ".", color="0.65", label="logged loss")
    for share, colour in ((0.02, "C5"), (0.15, "C0")):
        smooth = ewma(run.loss, max(1, share * len(run.loss)))
        ax.plot(step, smooth[part], color=colour, label=f"EWMA over {share:.0%} of the points")
    validations = [point for point in run.validations.items() if point[0] >= start]
    if validations:
        steps, losses = zip(*validations, strict=True)
        ax.plot(steps, losses, "D", color="C1", label=f"validation (last {run.final:.4f})")
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    ax.legend()
    right = ax.secondary_yaxis("right")
    right.set_ylabel("exp(loss)")
    right.yaxis.set_major_formatter(lambda loss, _: f"{math.exp(min(loss, 700)):,.5g}")


def plot_convergence(run, v, folder, name):
    """convergence_analysis.png: the whole run above; the last 15% and the fitted line below."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(10, 8.2))
    ends = np.array([v.first, run.step[-1]])
    top.axvspan(*ends, color="0.9", label="last 15% of the steps")
    if math.isfinite(v.slope):
        line = v.loss + v.slope * (ends - v.step) / 1000
        label = f"linear fit: {v.slope:+.4f} ± {v.half:.4f} nats per 1,000 steps"
        bottom.plot(ends, line, "--", color="C4", lw=3, label=label)
    draw_history(top, run, run.step[0])
    draw_history(bottom, run, v.first)
    bottom.set_title(f"{v.name}: {v.why}")
    save(fig, folder, name, f"{run.name} {joined(run.settings)}")


# ---- Sample efficiency ---------------------------------------------------------------------------
@dataclass
class Efficiency:
    """The smoothed loss, its power law a + b s^-c, and the index."""

    step: np.ndarray
    loss: np.ndarray
    law: tuple  # a, b, c
    r2: float  # the share of the curve's variance that the law explains
    p95: int  # index of the first point with 95%, 99% of the improvement
    p99: int
    sei: float


def smoothed(run):
    """Means of steps and losses over bins of equal width in log s; empty ones fall out."""
    step = np.maximum(run.step, 1)
    edges = np.geomspace(step[0], step[-1], 129)  # of 128 bins
    count = np.histogram(step, edges)[0]
    sums = [np.histogram(step, edges, weights=x)[0] for x in (step, run.loss)]
    return [x[count > 0] / count[count > 0] for x in sums]


def fit_power_law(step, loss):
    """Least squares of a + b s^-c, a >= 0 -> (a, b, c), R²."""
    fits = []
    for c in np.geomspace(0.02, 4, 160):  # for a given c the best a and b are linear least squares
        powers = step**-c
        b, a = np.polyfit(powers, loss, 1)
        if a < 0:  # then the best with a >= 0 has none
            a = 0
            b = powers @ loss / (powers @ powers)
        error = np.sum((a + b * powers - loss) ** 2)
        fits.append((error, a, b, c))
    error, *law = min(fits)
    return law, 1 - error / np.sum((loss - loss.mean()) ** 2)


def efficiency(run):
    """The Efficiency of a run; None if it is too short or nothing improved."""
    step, loss = smoothed(run)
    gained = loss[0] - loss
    if len(step) < 5 or gained.max() <= 0:
        return None
    share = gained / gained.max()
    p95 = np.argmax(share >= 0.95)
    p99 = np.argmax(share >= 0.99)
    sei = np.trapezoid(share, step) / (step[-1] - step[0])
    return Efficiency(step, loss, *fit_power_law(step, loss), p95, p99, sei)


def plot_sample_efficiency(fits, folder):
    """sample_efficiency.png: the smoothed losses of (Run, Efficiency) and their power laws, by
    step, by time and by tokens."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 5), sharey=True)
    for i, (run, e) in enumerate(fits):
        colour = f"C{i}"
        a, b, c = e.law
        label = f"{run.name}: {a:.2f} + {b:.3g} s^-{c:.2f}, R² {e.r2:.3f}, SEI {e.sei:.3f}"
        active = slice(e.p95, e.p99 + 1)
        minutes = run.minutes / run.step[-1] * e.step
        for ax, x in zip(axes, (e.step, minutes, 60 * run.speed * minutes), strict=True):
            ax.plot(x, e.loss, colour, label=label)
            ax.plot(x, a + b * e.step**-c, "--", color=colour)
            ax.plot(x[active], e.loss[active], colour, lw=7, alpha=0.35)
    names = ("optimizer step s", "minutes of training", "tokens")
    for ax, name in zip(axes, names, strict=True):
        ax.set(xscale="log", xlabel=f"{name} (log scale)")
    axes[0].set_ylabel("loss (nats per token)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center")
    title = "Dashed: the power law. Broad: the active phase, 95% to 99% of the improvement"
    save(fig, folder, "sample_efficiency.png", title)


def analyse_logs(paths, folder):
    """Convergence and sample efficiency of each log: verdicts, numbers and pictures."""
    runs = [read_log(path) for path in paths]  # all first: a bad one leaves no half of the pictures
    fits = []
    for i, run in enumerate(runs, start=1):
        v = verdict(run)
        e = efficiency(run)
        tokens = run.speed * run.minutes * 60 / 1e6
        print(f"\n{run.name}: {v.name} ({v.why})")
        print(f"    slope {v.slope:+.4f} ± {v.half:.4f} nats per 1,000 steps")
        print(f"    {run.step[-1]:,} steps, {tokens:,.2f} M tokens in {run.minutes:,.1f} minutes")
        print(f"    validation loss {run.final:.4f}, vs first {run.final - runs[0].final:+.4f}")
        if e:
            fits.append((run, e))
            print(f"    95% of the improvement at step {e.step[e.p95]:,.0f}, "
                  f"99% at step {e.step[e.p99]:,.0f}, SEI {e.sei:.3f}")
        number = f"_{i}" if len(runs) > 1 else ""
        plot_convergence(run, v, folder, f"convergence_analysis{number}.png")
    if fits:
        plot_sample_efficiency(fits, folder)


# ---- Groups of runs ------------------------------------------------------------------------------
CSV_COLUMNS = ["group", "run", "seed", "parameters", "tokens_per_s", "minutes", "val_loss",
               "validations", "data", "settings"]


def read_csv(path):
    """The runs in a runs.csv that a comparison wrote. Raises ValueError for any other file."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not rows[0].keys() >= set(CSV_COLUMNS):
        raise ValueError(f"{path} is no runs.csv that a comparison wrote")
    runs = []
    for row in rows:
        settings = pairs(row["settings"])
        settings["parameters"] = row["parameters"]
        runs.append(Run(
            path=f"{path}: {row['run']}",
            name=row["run"],
            settings=settings,
            data=pairs(row["data"]),
            speed=float(row["tokens_per_s"]),
            minutes=float(row["minutes"]),
            validations={int(s): float(x) for s, x in pairs(row["validations"]).items()},
        ))
    return runs


def write_csv(path, groups):
    """Writes a line for each run of {group: {seed: Run}}, as read_csv reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for group, by_seed in groups.items():
        for seed, run in by_seed.items():
            writer.writerow([
                group, run.name, seed, run.settings["parameters"], f"{run.speed:.0f}",
                f"{run.minutes:.3f}", run.final, joined(run.validations), joined(run.data),
                joined(run.settings),
            ])
    write_file(path, lambda file: file.write(text.getvalue().encode()))
    print(f"wrote {path}")


def is_finished(run):
    """Whether a run reached its last step; says so if not."""
    if "seed" not in run.settings:
        raise ValueError(f"{run.path} names no settings and no seed, as the logs of train.py do")
    end = int(run.settings["max_steps"])
    reached = max(run.validations, default=0)
    if run.broke is None and reached >= end:
        return True
    print(f"{run.path} is left out: its last validation is at step {reached} of {end}")
    return False


def by_name(runs, patterns):
    """Groups from arguments NAME=PATTERN, see the head of this file: {name: list of runs}."""
    groups = {}
    for argument in patterns:
        name, choice = argument.split("=", 1)
        pattern = choice.split(" ")[0]
        wanted = pairs(choice).items()
        named = [run for run in runs if fnmatch(run.name, pattern) or fnmatch(run.path, pattern)]
        groups[name] = [run for run in named if wanted <= run.settings.items()]
        if not groups[name]:
            raise ValueError(f"no finished run fits {argument}")
    return groups


def by_settings(runs):
    """Groups of runs that differ in the seed alone: {the settings that vary: list of runs}."""
    names = sorted(set().union(*(run.settings for run in runs)) - {"seed"})
    varied = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    groups = {}
    for run in runs:
        label = joined({name: run.settings.get(name) for name in varied})
        groups.setdefault(label, []).append(run)
    return groups


def read_groups(sources, patterns):
    """The finished runs of logs and runs.csv files, grouped: {label: {seed: Run}}."""
    runs = []
    for path in sources:
        runs += read_csv(path) if path.endswith(".csv") else [read_log(path)]
    runs = [run for run in runs if is_finished(run)]
    if not runs:
        raise ValueError("there is no finished run to compare")
    grouped = by_name(runs, patterns) if patterns else by_settings(runs)
    groups = {}
    for label, members in grouped.items():
        groups[label] = {int(run.settings["seed"]): run for run in members}
        if len(groups[label]) < len(members):
            raise ValueError(f"two runs of one seed in {label!r}: choose by a setting, see --help")
    chosen = [run for members in grouped.values() for run in members]
    for run in chosen:
        if run.data != chosen[0].data:
            raise ValueError(f"{chosen[0].path} and {run.path} were trained on different data")
    return groups


# ---- Comparisons over seeds ----------------------------------------------------------------------
def curves(runs):
    """The validations that all these runs have: steps (V,) and losses (runs, V)."""
    steps = sorted(set.intersection(*(set(run.validations) for run in runs)))
    return np.array(steps), np.array([[run.validations[step] for step in steps] for run in runs])


def interval(differences):
    """Half the width of the 95% interval of the mean of n differences (n, ...); NaN for n = 1."""
    n = len(differences)
    return student_t(0.95, max(n - 1, 1)) * scatter(differences) / math.sqrt(n)


def scatter(values):
    """The standard deviation of n values (n, ...), estimated from them; NaN for n = 1."""
    if len(values) < 2:
        return values[0] * math.nan
    return np.std(values, axis=0, ddof=1)


def reached_at(runs, target):
    """The first validated step at which the mean of these runs is at a loss or below, or NaN."""
    steps, losses = curves(runs)
    reached = steps[losses.mean(axis=0) <= target + 1e-9]  # the sums were rounded
    return reached[0] if len(reached) else math.nan


def print_comparison(groups, first):
    """A line for each group {seed: Run}: its mean and its difference to the first, seed by seed."""
    width = max(map(len, ["group", *groups]))
    target = np.mean([run.final for run in first.values()])
    print("\nFinal validation loss: mean and scatter (sd) of the seeds; difference to the first "
          "group, seed by seed,\nwith its 95% interval and its scatter; the first validation at "
          "which the mean has reached the first group's final loss")
    print(f"{'group':{width}}  seeds  parameters  tokens/s    loss      sd  "
          "difference        pairs      sd  reached at")
    for label, group in groups.items():
        seeds = sorted(first.keys() & group.keys())
        if not seeds:
            raise ValueError(f"{label!r} shares no seed with the first group")
        differences = np.array([group[seed].final - first[seed].final for seed in seeds])
        runs = list(group.values())
        losses = [run.final for run in runs]
        speed = np.median([run.speed for run in runs])
        size = runs[0].settings["parameters"]
        print(f"{label:{width}}  {len(runs):5}  {size:>10}  {speed:8,.0f}  {np.mean(losses):.4f}  "
              f"{scatter(losses):.4f}  {differences.mean():+.4f} ± {interval(differences):.4f}  "
              f"{len(seeds):5}  {scatter(differences):.4f}  {reached_at(runs, target):10,.0f}")


def plot_comparison(groups, first, folder):
    """comparison.png: validation by step and by time, and the differences to the first group."""
    fig = plt.figure(figsize=(10, 8.6))
    left, right, below = fig.subplot_mosaic("AB;CC").values()
    for i, (label, group) in enumerate(groups.items()):
        style = dict(color=f"C{i}", marker=".")
        steps, losses = curves(group.values())
        minutes = np.mean([run.minutes for run in group.values()]) * steps / steps[-1]
        left.plot(steps, losses.mean(axis=0), **style, label=f"{label} ({len(group)})")
        right.plot(minutes, losses.mean(axis=0), **style)
        seeds = first.keys() & group.keys()
        # The first group's runs, then this group's, all at the same steps.
        steps, losses = curves([runs[seed] for runs in (first, group) for seed in seeds])
        differences = losses[len(seeds) :] - losses[: len(seeds)]
        below.errorbar(steps, differences.mean(axis=0), interval(differences), **style, capsize=3)
    left.set(xlabel="optimizer step", ylabel="validation loss (nats per token)",
             title="Mean of the seeds")
    right.set(xlabel="training time without validation (minutes)", title="The same by time")
    below.set(xlabel="optimizer step", ylabel="difference (nats per token)",
              title="Difference to the first group, seed by seed, with its 95% interval")
    fig.legend(loc="outside lower center", ncols=2, title="group (seeds)")
    save(fig, folder, "comparison.png")


def compare(arguments, folder):
    """Groups of runs over seeds against the first group: table, comparison.png and runs.csv."""
    sources = [text for text in arguments if os.path.exists(text) or "=" not in text]
    patterns = [text for text in arguments if text not in sources]
    groups = read_groups(sources, patterns)
    first = next(iter(groups.values()))
    print_comparison(groups, first)
    plot_comparison(groups, first, folder)
    path = os.path.join(folder, "runs.csv")
    if os.path.abspath(path) in map(os.path.abspath, sources):
        print(f"{path} was read, so it stays as it is: --out writes another one")
    else:
        write_csv(path, groups)


# ---- Models --------------------------------------------------------------------------------------
def slots_kept(story):
    """Of each of SLOTS: does the story (text) use just one of the words that it can hold?"""
    kept = {}
    for slot in SLOTS:
        words = prepare.slot_words(slot)
        used = [word for word in words if re.search(rf"\b{word}\b", story)]
        kept[slot] = len(used) == 1
    kept["all of these"] = all(kept.values())
    return kept


def count_remembered(model, tokenizer, checkpoint, number=200):
    """Samples stories, and prints how many keep to their words from the beginning to the end."""
    if "entropy_nats_per_story" not in checkpoint["data"]:
        raise ValueError("the model was not trained on the demo stories, it knows no others")
    end = tokenizer.eot_token
    prompt = torch.full((number, 1), end, device=model.embed.weight.device)  # a story follows END
    # No story of the grammar has 1,000 tokens, not even in bytes. One that does not end by then
    # keeps nothing.
    sampled = generate(model, prompt, 1000, temperature=0.5, top_k=0, seed=0, end_token=end)
    ended = [tokens for tokens in sampled[:, 1:].tolist() if end in tokens]
    results = [slots_kept(tokenizer.decode(tokens[: tokens.index(end)])) for tokens in ended]
    print(f"\nOf {number} sampled stories (temperature 0.5), {len(results)} come to an end.")
    print("How many use just one word of a slot?")
    for slot in [*SLOTS, "all of these"]:
        count = sum(kept[slot] for kept in results)
        print(f"{slot:12}  {count:4}  {count / number:6.1%}")


def print_signals(signals):
    """Mean and standard deviation of signals (N, L, 3) over N, a line for each layer."""
    print(f"{'layer':5} {'gain':15} {'precision':15} {'gate':15} gates below 0.5")
    closed = (signals[..., 2] < 0.5).mean(axis=0)
    for i, layer in enumerate(signals.swapaxes(0, 1)):
        columns = [f"{signal.mean():.3f} ± {signal.std():.3f}  " for signal in layer.T]
        print(f"{i:5}", *columns, f"{closed[i]:15.1%}")


def scan(model, tokenizer, text, title, folder):
    """What the controller does to one text: tables and brain_scan.png."""
    tokens = prompt_tokens(tokenizer, text)[: model.config.block_size]  # END and the text
    if len(tokens) == 1:
        raise ValueError('the text has no tokens: give some, as in --scan "Once upon a time"')
    ids = torch.tensor([tokens], device=model.embed.weight.device)
    signals = model.signals(ids)[0, 1:, :, :3].cpu().numpy()  # (T, L, 3): not those you may add
    labels = [tokenizer.decode([t]).replace(" ", "·").replace("\n", "↵") for t in tokens[1:]]
    print(f"\nSpecialisation: mean ± standard deviation of each signal over {len(labels)} tokens")
    print_signals(signals)
    print("\nPhasic reactivity: where each signal moves most (mean size of the layers' changes)")
    jumps = np.abs(np.diff(signals, axis=0)).mean(axis=1)  # (T - 1, 3)
    for name, jump in zip(SIGNALS, jumps.T, strict=True):
        strongest = np.argsort(-jump)[:6]
        print(f"{name:9}", *(f"  {labels[t + 1]} {jump[t]:.3f}" for t in strongest))
    plot_scan(signals[:64], labels[:64], title, folder)


def plot_scan(signals, labels, title, folder):
    """brain_scan.png: signals (T, L, 3) by token and layer, on one scale around neutral."""
    fig, axes = plt.subplots(3, 1, figsize=(10, 8.4), sharex=True)
    far = np.abs(signals - 1).max()
    for i, ax in enumerate(axes):
        image = ax.imshow(signals[..., i].T, "BrBG", vmin=1 - far, vmax=1 + far, aspect="auto")
        ax.set(title=SIGNALS[i], ylabel="layer", yticks=range(signals.shape[1]))
        ax.grid(False)
    fig.colorbar(image, ax=axes, label="signal (neutral: 1)")
    labels = [label.replace("$", r"\$") for label in labels]  # else $...$ would be a formula
    axes[2].set_xticks(range(len(labels)), labels, rotation=90)
    axes[2].set_xlabel("token (· is a space)")
    save(fig, folder, "brain_scan.png", title)


def validation_batches(model, folder, checkpoint):
    """Up to 64 rows of validation data in up to 32 batches: pairs of ids and targets (B, T).

    Labels are left out: a model that reads controls reads zeros.

    Raises ValueError where the data do not fit the checkpoint."""
    meta = prepare.read_meta(folder)
    for key in ("tokenizer", "vocab_size", "vocabulary"):
        if meta.get(key) != checkpoint["data"].get(key):
            raise ValueError(f"{folder} has another {key} than the checkpoint: name its own --data")
    tokens = prepare.read_tokens(folder, "val", meta)
    size = model.config.block_size
    aligned = checkpoint.get("settings", {}).get("rows") == "aligned"  # as it was trained
    rows = prepare.rows_of(tokens, size, aligned)
    if len(rows) < 2:
        raise ValueError(f"{folder} holds fewer than two rows of {size} validation tokens")
    rows = np.random.default_rng(0).permutation(rows)[:64]
    parts = np.array_split(rows, min(32, len(rows)))
    batches = [np.stack(prepare.windows(tokens, part)) for part in parts]
    return [torch.tensor(batch, device=model.embed.weight.device) for batch in batches]


def pinned(names, values):
    """An edit for the model: the signals of these names become values (L, 3)."""
    def edit(signals):
        signals = signals.clone()
        for i, name in enumerate(SIGNALS):
            if name in names:
                signals[..., i] = values[:, i]
        return signals
    return edit


@torch.no_grad()
def ablations(model, batches):
    """Task losses under each condition on batches, pairs of ids and targets (B, T) -> {condition:
    (batches,) nats per token}; and the signals as trained, (N, L, 3), of the N tokens that have a
    target.

    Pinned to its mean per layer, a signal stops moving: the loss that this adds is the worth of its
    movement. Pinned to 1, neutral, it is gone. "prefix only": a `global` model's salience sees
    tokens 0..t alone, as when it generates; the loss that this adds is what seeing the future had
    saved. The signals of a `global` model also see the padding of aligned rows."""
    signals = torch.cat([model.signals(x)[y >= 0][..., :3] for x, y in batches])
    mean = signals.mean(dim=0)  # (L, 3)
    conditions = {"as trained": {}}
    for how, values in (("mean", mean), ("neutral", torch.ones_like(mean))):
        for name in model.config.signals:
            conditions[f"{name} {how}"] = {"edit": pinned([name], values)}
        conditions[f"all {how}"] = {"edit": pinned(SIGNALS, values)}
    if model.config.salience == "global":
        conditions["prefix only"] = {"salience": "causal"}
    losses = {}
    for label, change in conditions.items():
        bar = tqdm(batches, label, leave=False, disable=None)
        losses[label] = np.array([model(x, y, **change).task.item() for x, y in bar])
    return losses, signals.cpu().numpy()


def audit(model, batches, title, folder):
    """What each signal is worth and how far the gate closes: tables and audit.png."""
    losses, signals = ablations(model, batches)
    trained = losses.pop("as trained")
    added = {label: loss - trained for label, loss in losses.items()}
    errors = {label: 2 * x.std(ddof=1) / math.sqrt(len(x)) for label, x in added.items()}
    print(f"\nLoss on up to 64 validation rows: {trained.mean():.4f}. With signals pinned it "
          "changes by (±: two standard errors, paired)")
    for label, x in added.items():
        print(f"{label:17}  {x.mean():+.5f} ± {errors[label]:.5f}")
    if "prefix only" in added:
        print(f"As trained, every position sees the future: {trained.mean():.4f} is no likelihood, "
              f"the honest loss is {losses['prefix only'].mean():.4f}; "
              f"the leak is {added['prefix only'].mean():+.4f} nats")
    print("\nMean ± standard deviation of each signal over the validation tokens")
    print_signals(signals)
    plot_audit(added, errors, signals[..., 2], title, folder)


def plot_audit(added, errors, gates, title, folder):
    """audit.png: what each condition adds to the loss above; the gates (N, L) by layer below."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(10, 8.6))
    means = [x.mean() for x in added.values()]
    top.barh(list(added), means, xerr=list(errors.values()))
    top.invert_yaxis()
    top.set_xlabel("added to the loss (nats per token, ± two standard errors)")
    bottom.boxplot(gates, positions=range(gates.shape[1]), whis=(1, 99), showfliers=False)
    bottom.set(xlabel="layer", ylabel="gate (box: 50% of tokens, whiskers: 98%)", ylim=(0, 1.05))
    save(fig, folder, "audit.png", title)


# ---- The command line ----------------------------------------------------------------------------
def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: sys.exit(complain(message))
    add = parser.add_argument
    add("log", nargs="*", metavar="LOG", help="training logs (default: out/training.log)")
    add("--compare", action="store_true",
        help="compare the LOGs, which may also be runs.csv files and NAME=PATTERN, see above: "
        "table, comparison.png, runs.csv")
    add("--memory", action="store_true", help="what 200 sampled demo stories keep: table")
    add("--scan", metavar="TEXT", help="what the controller does to TEXT: tables, brain_scan.png")
    add("--audit", action="store_true",
        help="what each signal is worth on validation data: tables, audit.png")
    add("--ckpt", default="out/ckpt_best.pt",
        help="checkpoint for --memory, --scan and --audit (default: %(default)s)")
    add("--data", default="data", help="prepare.py's folder, for --audit (default: %(default)s)")
    add("--out", default="out", help="folder for pictures and runs.csv (default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help=DEVICE_HELP)
    return parser.parse_args()


def look_into(args):
    """Memory, scan and audit of a checkpoint, as asked."""
    model, tokenizer, checkpoint = load_model(args.ckpt, pick_device(args.device))
    title = f"{args.ckpt} step={checkpoint.get('step')} {joined(checkpoint.get('settings', {}))}"
    print(title)
    if args.memory:
        count_remembered(model, tokenizer, checkpoint)
    if not model.controller and (args.audit or args.scan is not None):
        raise ValueError(f"{args.ckpt} was trained with --signals none: it has no controller")
    if args.scan is not None:
        scan(model, tokenizer, args.scan, title, args.out)
    if args.audit:
        audit(model, validation_batches(model, args.data, checkpoint), title, args.out)


@command
def main():
    args = parse_arguments()
    asks_for_model = args.memory or args.audit or args.scan is not None
    if args.compare:
        compare(args.log, args.out)
    elif args.log or not asks_for_model:
        analyse_logs(args.log or ["out/training.log"], args.out)
    if asks_for_model:
        look_into(args)


if __name__ == "__main__":
    sys.exit(main())
