"""
Write text with a trained model, and dose its modulators.

    python sample.py --prompt "Once upon a time"
    python sample.py --prompt "Once upon a time" --precision 0.5    # every layer attends more broadly
"""

import argparse
import codecs
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
    return parser.parse_args()


class Row:
    """One sample: its tokens become text as they come, whole characters only, up to the end of the story."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.text, self.count, self.ended = tokenizer, prompt, 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        self.count += not self.ended
        self.ended |= token == self.tokenizer.eot_token
        if not self.ended:
            self.text += self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))


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
    spent, count = time.perf_counter() - start, sum(row.count for row in rows)
    print(rows[current].text[shown:] + "".join(f"\n---\n{row.text}" for row in rows[current + 1 :]))
    print(f"{count} tokens in {spent:.2f} s: {count / spent:.0f} tokens/s", file=sys.stderr)


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
        tokenizer = get_tokenizer(ckpt.get("tokenizer", "gpt2"))
        if doses != [1, 1, 1] and not model.controller:
            raise ValueError(f"{args.ckpt} has no controller to dose: it was trained with --signals none")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        if not args.prompt:
            raise ValueError("the prompt has no tokens: give the text some beginning")
        # In training every story follows the end of another one: the same mark says here that a story begins.
        prompt = [[tokenizer.eot_token, *tokenizer.encode_ordinary(args.prompt)]] * args.num_samples
        prompt, dose = torch.tensor(prompt, dtype=torch.long, device=device), torch.tensor(doses, device=device)
        stream = model.stream(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                              args.salience, lambda signals: signals * dose, tokenizer.eot_token)
        write(stream, [Row(tokenizer, args.prompt) for _ in prompt])
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
