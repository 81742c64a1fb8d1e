"""
Write text with a trained model, and dose its modulators.

    python sample.py --prompt "Once upon a time"
    python sample.py --prompt "Once upon a time" --precision 0.5    # every layer attends more broadly
    python sample.py --prompt "Once upon a time" --trace gain       # each token coloured by what the controller did
"""

import argparse
import codecs
import os
import sys
import time

import torch

from ncn import ModulatedLM, SIGNALS, load_file
from prepare import fail, get_tokenizer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--prompt", required=True, help="the text to go on with")
    add("--ckpt", default="out/ckpt_best.pt", help="a checkpoint of train.py's or of the paper's authors" + default)
    add("--max_new_tokens", type=int, default=256, help="tokens to write at most, per sample" + default)
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; higher: more varied" + default)
    add("--top_k", type=int, default=50, help="draw among this many likeliest tokens; 0: all" + default)
    add("--top_p", type=float, default=1.0, help="draw among the likeliest that hold this probability" + default)
    add("--num_samples", type=int, default=1, help="texts to write" + default)
    add("--seed", type=int, help="same seed, same text; by default another text each time")
    add("--salience", choices=("causal", "reactive"),
        help="what the controller sees: the text so far, or one token (the paper's cached inference); by default as "
             "trained, and causal where that was global")
    for name, effect in zip(SIGNALS, ("how strongly layers write", "how sharply they attend", "how much FFNs add")):
        add(f"--{name}", type=float, default=1.0, help=f"multiply the {name} of every layer: {effect}" + default)
    add("--trace", choices=SIGNALS, help="colour each token by this signal, once the text is complete; in a terminal "
                                         "with colours only")
    add("--layer", type=int, help="the layer that --trace shows, from 0 (default: the mean of all)")
    return parser.parse_args()


class Row:
    """One sample: its tokens become text as they come, whole characters only, up to the end of the story."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.text, self.count, self.ended = tokenizer, prompt, 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """Takes in a token; returns the text it adds."""
        self.count += not self.ended
        self.ended |= token == self.tokenizer.eot_token
        new = "" if self.ended else self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        self.text += new
        return new


def write(stream, rows):
    """The samples to standard output, one after the other, the first unfinished one word by word as it is made."""
    start, current, shown = time.perf_counter(), 0, 0
    for tokens in stream:
        for row, token in zip(rows, tokens.tolist()):
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
    report(rows, start)


def report(rows, start):
    spent, count = time.perf_counter() - start, sum(row.count for row in rows)
    print(f"{count} tokens in {spent:.2f} s: {count / spent:.0f} tokens/s", file=sys.stderr)


RAMP = 17, 24, 60, 102, 144, 185, 227  # of a terminal's 256 colours: dark blue, grey, yellow (no red beside green)


def paint(text, level):
    """The text on the background of level 0 to 1; the colour ends before a line does, or it would fill the line."""
    step = min(int(level * len(RAMP)), len(RAMP) - 1)
    on, off = f"\x1b[48;5;{RAMP[step]};38;5;{15 if step < 4 else 16}m", "\x1b[0m"
    return on + text.replace("\n", f"{off}\n{on}") + off


def write_trace(stream, rows, prompt, read, signal, layer):
    """
    The samples, each token coloured by the controller's signal when it was read. prompt: its tokens; read: list to
    which the stream's edit appends the signals of the prompt (T, L, 3), before a tensor (B, L, 3) that then holds those
    of the newest token. A token is read when the next one is drawn: the stream draws one more than is shown.
    """
    def value(signals):  # (..., L, 3) -> (...)
        signals = signals[..., SIGNALS.index(signal)]
        return (signals.mean(-1) if layer is None else signals[..., layer]).tolist()

    start, values = time.perf_counter(), [[] for _ in rows]
    texts = [[row.add(token) for token in prompt] for row in rows]
    for row in rows:
        row.count = 0
    for tokens in stream:
        for i, (token, newest) in enumerate(zip(tokens.tolist(), value(read[-1]))):
            if not rows[i].ended:
                values[i].append(newest)
                texts[i].append(rows[i].add(token))
    values = [value(read[0][1:-1]) + its for its in values]  # without the mark before the prompt; the last came above
    for row in rows:
        row.count -= not row.ended  # the one that is not shown
    low, high = min(map(min, values)), max(map(max, values))
    level = lambda x: (x - low) / (high - low or 1)
    print(f"{signal}, {'mean of the layers' if layer is None else f'layer {layer}'}: {low:.3f} "
          + "".join(paint("  ", i / len(RAMP)) for i in range(len(RAMP))) + f" {high:.3f} (neutral: 1)\n")
    print("\n---\n".join("".join(map(paint, its, map(level, numbers))) for its, numbers in zip(texts, values)))
    report(rows, start)


def main():
    args = arguments()
    sys.stdout.reconfigure(errors="replace")  # a Windows code page may lack a character of the story
    try:
        if args.num_samples < 1:
            raise ValueError(f"--num_samples is {args.num_samples}, it must be at least 1")
        doses = [getattr(args, name) for name in SIGNALS]
        if not all(0 <= dose < float("inf") for dose in doses):
            raise ValueError("--gain, --precision and --gate must be 0 or more")
        ckpt = load_file(args.ckpt)
        model = ModulatedLM.from_checkpoint(ckpt, args.ckpt)
        tokenizer = get_tokenizer(ckpt.get("tokenizer", "gpt2"), ckpt.get("kept"))
        if (doses != [1, 1, 1] or args.trace) and not model.controller:
            raise ValueError(f"{args.ckpt} has no controller to dose or to trace: it was trained with --signals none")
        if args.max_new_tokens < 0:
            raise ValueError(f"--max_new_tokens is {args.max_new_tokens}, it must be 0 or more")
        if args.layer is not None and not 0 <= args.layer < model.config.n_layer:
            raise ValueError(f"--layer is {args.layer}, the model has layers 0 to {model.config.n_layer - 1}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        if not args.prompt:
            raise ValueError("the prompt has no tokens: give the text some beginning")
        # In training every story follows the end of another one: the same mark says here that a story begins.
        prompt = tokenizer.encode_ordinary(args.prompt)
        if args.trace and len(prompt) >= model.config.block_size:
            raise ValueError(f"--trace takes a prompt of up to {model.config.block_size - 1} tokens, not {len(prompt)}")
        ids = torch.tensor([[tokenizer.eot_token, *prompt]] * args.num_samples, dtype=torch.long, device=device)
        dose, read = torch.tensor(doses, device=device), []

        def edit(signals):  # (B, T, L, 3); on a GPU run once and recorded, so nothing here may ask the host
            signals = signals * dose
            if trace and not read:
                read.extend([signals[0], signals[:, -1].expand(args.num_samples, -1, -1).clone()])
            elif trace:
                read[1].copy_(signals[:, -1])
            return signals

        trace = args.trace and sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ
        stream = model.stream(ids, args.max_new_tokens + bool(trace), args.temperature, args.top_k, args.top_p,
                              args.seed, args.salience, edit, tokenizer.eot_token)
        if trace:
            os.system("")  # lets an older Windows console understand colours
            write_trace(stream, [Row(tokenizer, "") for _ in ids], prompt, read, args.trace, args.layer)
        else:
            write(stream, [Row(tokenizer, args.prompt) for _ in ids])
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
