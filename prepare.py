"""Turns stories into tokens: writes train.bin and val.bin (uint16, little-endian) and meta.json.

    python prepare.py              # training_data/*.txt if there are any, else TinyStories, else demo
    python prepare.py demo         # stories from the grammar below: no download, exact entropy known
    python prepare.py books more.txt --tokenizer bytes --max_mb 100

The text streams through in blocks of a few MB: a corpus of any size needs the same few hundred MB of memory.
"""
import argparse
import functools
import hashlib
import http.client
import json
import math
import os
import random
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
from tqdm import tqdm

END = "<|endoftext|>"               # ends every story, in the text and in the tokens
BLOCK = 4 << 20                     # bytes read and tokenised at a time
LONGEST = 16 << 20                  # bytes in one story: what bounds the memory
DEMO_MB = 24                        # more than the laptop preset reads, so that no story comes twice
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"


def get_tokenizer(name, kept=None):
    """The tiktoken.Encoding called `name`: "gpt2" (50,257 symbols), or "bytes" (257: the bytes, then END).

    `kept`: GPT-2's token numbers that remain, as keep() returns them; token i is then the one that was kept[i].
    Raises ValueError for any other name, ConnectionError if GPT-2's vocabulary is neither cached nor reachable.
    """
    if name == "bytes":
        # There are no merges, so it does not matter where the pattern cuts; long pieces are the quickest.
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,99}", special_tokens={END: 256},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    if name != "gpt2":
        raise ValueError(f"unknown tokenizer {name!r}: use gpt2 or bytes")
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):   # no network, or a damaged download
        raise ConnectionError("the GPT-2 vocabulary is neither cached nor reachable: go online once, or prepare "
                              "with --tokenizer bytes") from None
    if kept is None:
        return gpt2
    ranks = {gpt2.decode_single_token_bytes(token): i for i, token in enumerate(kept[:-1])}     # END is the last
    return tiktoken.Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def keep(seen):
    """GPT-2's token numbers to keep, rising, for a text in which only the numbers `seen` occur: those, every byte
    and END, so that any text still encodes, and every token on the way to one of them.

    BPE joins the pair of lowest number first. Whatever it joins while it makes a kept token is kept, and the order
    of what is left stays the same: so text of seen tokens encodes to the same pieces as before.
    """
    ranks = get_tokenizer("gpt2")._mergeable_ranks
    kept = {*range(256), *map(int, seen), len(ranks)}                                           # END is the last
    for token, rank in sorted(ranks.items(), key=lambda item: -item[1]):                        # parts come later
        if rank in kept and rank > 255:
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            kept |= {ranks[part] for part in parts}
    return sorted(kept)


# ---- The demo stories ----------------------------------------------------------------------------------------
# A grammar: a slot has options, separated by "|" and all equally likely, or a pair (earlier slot, table): the
# table says which options go with what the earlier slot drew. "{slot}" draws an option where a story first gets
# there and repeats the same words from then on, so hero, thing and place stay the same to the last line.
#
# No text can be told in two ways: slots are drawn in reading order, a draw's words stand where it is drawn, and
# no option is the beginning of another one of its list. So reading from left to right settles every draw, and
# the entropy of the stories is the entropy of the draws.
SHE, HE = "girl|cat|bunny|mouse", "boy|dog|fox|hedgehog"
PLACES = "beach|forest|farm|park|garden|castle"
HIGH, WATER, BEAST, DARK, HOLE = "at the top of a", "across a", "right behind a", "inside a", "down in a"


def gendered(she, he):
    return "kind", {**dict.fromkeys(SHE.split("|"), she), **dict.fromkeys(HE.split("|"), he)}


def by_place(*options):
    return "place", dict(zip(PLACES.split("|"), options))


GRAMMAR = {
    "story": "{start} {trait} {kind} named {name}. {has}\n"
             "{day}, {name} and {her} friend {pal} the {animal} {went} to the {place}. {wish} {seen}, "
             "but it was {trouble} {spot}. {worry}\n{idea} {She} {fix}\n{home} {end}",
    "start": "Once upon a time, there was a|Once upon a time, there lived a|Long ago, there was a|"
             "Once upon a time, in a small town, there was a|There once was a",
    "trait": "brave|kind|smart|sweet|nice|clever",
    "kind": f"{SHE}|{HE}",
    "name": gendered("Lily|Mia|Anna|Sue|Lucy|Emma|Amy|Zoe", "Tom|Ben|Max|Tim|Sam|Jack|Leo|Bob"),
    "She": gendered("She", "He"), "she": gendered("she", "he"), "him": gendered("her", "him"),
    "Her": gendered("Her", "His"), "her": gendered("her", "his"),
    "has": "{She} had a {color} {thing}.|{She} loved {her} {color} {thing}.|"
           "{She} took {her} {color} {thing} everywhere.|{Her} favorite thing was a {color} {thing}.",
    "color": "red|blue|green|yellow|pink|purple",
    "thing": "rope|kite|umbrella|ball|boat|shovel|drum|blanket|lamp",
    "day": "One day|One fine day|One morning|One Sunday",
    "pal": "Gus|Dot|Pip|Rex|Coco|Bella|Spot|Daisy",
    "animal": "pig|lamb|pony|goat|panda|bear",
    "went": "went|walked|ran",
    "place": PLACES,
    "wish": "{name} wanted a {goal} for {her} {kin}.|{She} wanted to give {her} {kin} a {goal}.|"
            '"I want a {goal} for my {kin}," said {name}.',
    "goal": by_place("pretty shell|smooth stone|shiny pearl", "golden leaf|tasty berry|brown nut",
                     "fresh egg|soft feather|juicy apple", "shiny coin|lucky clover|glass marble",
                     "ripe strawberry|pretty rose|sweet plum", "golden key|silver cup|little crown"),
    "kin": "mom|dad|grandma|grandpa|sister|brother",
    "seen": "Soon they saw one|At last {pal} saw one|They looked around and saw one",
    "trouble": ("thing", {
        "rope": f"{HIGH}|{WATER}|{HOLE}", "kite": f"{HIGH}|{WATER}|{BEAST}", "umbrella": f"{HIGH}|{WATER}",
        "ball": f"{HIGH}|{BEAST}", "boat": WATER, "shovel": f"{WATER}|{HOLE}", "drum": f"{BEAST}|{DARK}",
        "blanket": f"{BEAST}|{HOLE}", "lamp": f"{DARK}|{HOLE}"}),
    "spot": ("trouble", {
        HIGH: by_place("tall rock", "tall tree", "tall barn", "tall gate", "high wall", "high tower"),
        WATER: by_place("deep pool", "cold stream", "muddy pond", "wide lake", "round pond", "deep river"),
        BEAST: by_place("grumpy crab", "grumpy wolf", "grumpy bull", "grumpy swan", "grumpy goose",
                        "grumpy dragon"),
        DARK: by_place("dark cave", "dark cabin", "dark barn", "dark tunnel", "dark shed", "dark room"),
        HOLE: by_place("sandy hole", "deep hole", "muddy hole", "big hole", "deep pit", "dry well")}),
    "worry": '"Oh no!" said {pal}. "{alas}"|"{alas}" said {pal}.|{pal} stopped. "{alas}"',
    "alas": ("trouble", {
        HIGH: "It is too high!|We can not fly!", WATER: "We will get wet!|We can not swim!",
        BEAST: "It looks so angry!|I am scared of it!", DARK: "It is too dark!|We can not see a thing!",
        HOLE: "It is too deep!|We might fall in!"}),
    "idea": 'Then {name} had an idea.|"I have my {thing}!" said {name}.|{name} smiled at {her} {thing}.|'
            "{name} knew what to do.",
    "fix": ("trouble", {
        HIGH: ("thing", {
            "rope": "threw the {color} rope over the {spot}, climbed up and took the {goal}.",
            "kite": "flew the {color} kite over the {spot}, and its string pulled the {goal} down.",
            "umbrella": "opened the {color} umbrella. The wind lifted {him} onto the {spot}, and {she} took "
                        "the {goal}.",
            "ball": "threw the {color} ball at the {spot}. Bump! The {goal} fell down, and {pal} caught it."}),
        WATER: ("thing", {
            "rope": "tied the {color} rope to a tree, swung over the {spot} and took the {goal}.",
            "kite": "held on to the {color} kite, flew over the {spot} and took the {goal}.",
            "umbrella": "sat in the {color} umbrella, sailed over the {spot} and took the {goal}.",
            "boat": "put the {color} boat on the {spot}, sailed over and took the {goal}.",
            "shovel": "built a path across the {spot} with the {color} shovel and took the {goal}."}),
        BEAST: ("thing", {
            "kite": "let the {spot} fly the {color} kite. It laughed and gave {him} the {goal}.",
            "ball": "rolled the {color} ball to the {spot}. It laughed and gave {him} the {goal}.",
            "drum": "played the {color} drum. The {spot} began to dance and gave {him} the {goal}.",
            "blanket": "wrapped the {spot} in the {color} blanket. It smiled and gave {him} the {goal}."}),
        DARK: ("thing", {
            "drum": "played the {color} drum. They felt brave, went into the {spot} and took the {goal}.",
            "lamp": "turned on the {color} lamp. Now the {spot} was bright, and {she} found the {goal}."}),
        HOLE: ("thing", {
            "rope": "let the {color} rope down into the {spot}, climbed down and took the {goal}.",
            "shovel": "dug steps into the {spot} with the {color} shovel, walked down and took the {goal}.",
            "blanket": "hung the {color} blanket into the {spot}, climbed down and took the {goal}.",
            "lamp": "held the {color} lamp over the {spot}, saw steps, went down and took the {goal}."})}),
    "home": "Back home, {name} gave the {goal} to {her} {kin}.|At home, {her} {kin} was so happy with the "
            "{goal}.|They ran home and gave the {goal} to {name}'s {kin}.",
    "end": '"What a {trait} {kind}!" said {her} {kin}.|{name} hugged {pal} and the {color} {thing}.|'
           "Now {name} loved the {color} {thing} even more.|{name} and {pal} were very happy.",
}
SLOT = re.compile(r"{(\w+)}")
LOOKED_UP = {"kind", "thing", "place", "trouble"}       # the slots that later slots depend on


def options(slot, drawn):
    """The equally likely options of `slot`, given what was drawn before it."""
    rule = GRAMMAR[slot]
    while isinstance(rule, tuple):
        rule = rule[1][drawn[rule[0]]]
    return rule.split("|")


def tell(rng):
    """Draws one story. Returns its text and -log of its probability (nats).

    `rng`: a random.Random; Python promises the same random() for a seed in every version and on every machine.
    """
    drawn, words, nats = {}, {}, 0.0

    def fill(match):
        nonlocal nats
        slot = match[1]
        if slot not in words:
            choices = options(slot, drawn)
            nats += math.log(len(choices))
            drawn[slot] = choices[int(rng.random() * len(choices))]
            words[slot] = SLOT.sub(fill, drawn[slot])
        return words[slot]

    return SLOT.sub(fill, "{story}"), nats


@functools.cache
def entropy(todo=("story",), drawn=frozenset()):
    """The exact entropy (nats) of a story, or of its rest: the chain rule, over every option of every slot.

    `todo`: the slots to come, in reading order. `drawn`: pairs (slot, option), with None for options that no
    slot looks up, so that stories which go on alike share one cached sum.
    """
    if not todo:
        return 0.0
    slot, rest, known = todo[0], todo[1:], dict(drawn)
    if slot in known:
        return entropy(rest, drawn)
    choices = options(slot, known)
    return math.log(len(choices)) + math.fsum(
        entropy((*SLOT.findall(choice), *rest), drawn | {(slot, choice if slot in LOOKED_UP else None)})
        for choice in choices) / len(choices)


# ---- Text in -------------------------------------------------------------------------------------------------
def demo_blocks(seed):
    """Endless blocks (bytes) of demo stories."""
    rng = random.Random(seed)
    while True:
        yield "".join(f"{tell(rng)[0]}\n{END}\n" for _ in range(1000)).encode()


def file_blocks(path):
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def read_stories(blocks, source, room):
    """Yields (list of stories, bytes used) from blocks of bytes, to the last whole story within `room` bytes.

    Enters the size and sha256 of what it used in the dict `source`. Raises ValueError if it is not UTF-8.
    """
    rest, digest, done, source["bytes"] = b"", hashlib.sha256(), False, 0
    while not done:
        block, start = next(blocks, b""), source["bytes"]
        text = rest + block
        full = start + len(text) > room
        done = full or not block
        # Cut at the last END: bytes after it wait for the next block. The end of the file ends a story, too.
        used, mark, rest = text[:int(room) - start if full else None].rpartition(END.encode())
        used = text if done and not full else used + mark
        if not done and len(rest) > LONGEST:
            raise ValueError(f"{source['name']}: a story of over {LONGEST >> 20} MB; separate stories by {END}")
        try:
            stories = used.decode().replace("\r\n", "\n").split(END)
        except UnicodeDecodeError as error:
            where = start + error.start
            raise ValueError(f"{source['name']}: not UTF-8 at byte {where}; save it as UTF-8") from None
        if start == 0:
            stories[0] = stories[0].removeprefix("\ufeff")      # the mark that some editors put first
        digest.update(used)
        source["bytes"] += len(used)
        yield [story for text in stories if (story := text.strip())], len(used)
    source["sha256"] = digest.hexdigest()


def find_files(inputs):
    """`inputs`, with each folder replaced by every *.txt below it, in an order that is the same everywhere."""
    files = []
    for path in inputs:
        below = sorted(Path(path).rglob("*.txt"), key=Path.as_posix)
        found = [path] if path == "demo" or os.path.isfile(path) else below
        if not found:
            raise ValueError(f"no text in {path}: give text files, folders of .txt files, tinystories or demo")
        files += found
    return files


def download(url, path):
    """Downloads `url` to `path`. Until it is whole it is `path`.part, from where the next call goes on.

    Raises ConnectionError if the server cannot be reached, OSError if the transfer ends early.
    """
    part = Path(f"{path}.part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except (OSError, http.client.HTTPException) as error:
        if have and getattr(error, "code", None) == 416:        # nothing after what we have: start again
            part.unlink()
            return download(url, path)
        raise ConnectionError(f"cannot download {url} ({getattr(error, 'reason', error)})") from None
    have = have if response.status == 206 else 0                # 200: the server sends all of it again
    total = have + int(response.headers["Content-Length"] or 0)
    with response, open(part, "ab" if have else "wb") as file, tqdm(
            desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
        try:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        except (TimeoutError, ConnectionError, http.client.HTTPException):
            pass                                                # the size tells
    if (size := part.stat().st_size) != total:
        raise OSError(f"the download stopped at {size:,} of {total:,} bytes; run this again to go on")
    os.replace(part, path)


# ---- Tokens out ----------------------------------------------------------------------------------------------
def encode(tokenizer, stories, pool):
    """The tokens (uint16 bytes) of `stories`, each with its END, made on all cores.

    A story holds no END (it is what separates them), so the ones put in here are the only special tokens: the
    result is encode_ordinary of each story, then END.
    """
    step = max(1, math.ceil(len(stories) / os.cpu_count()))
    texts = ["".join(story + END for story in stories[i:i + step]) for i in range(0, len(stories), step)]
    tokens = pool.map(lambda text: tokenizer.encode_to_numpy(text, allowed_special={END}), texts)
    return b"".join(part.astype("<u2").tobytes() for part in tokens)


def write(out, tokenizer, inputs, val_fraction, seed, max_mb):
    """Writes train.bin, val.bin and meta.json from `inputs` (files or "demo") into `out`. Returns the metadata.

    `val_fraction`: share of the stories; `max_mb`: 10^6 bytes of text, or None. The files are renamed into place
    when all is done: an error (ValueError, OSError) leaves `out` as it was.
    """
    sources, counts = [], {f"{side}_{what}": 0 for side in ("train", "val") for what in ("stories", "tokens")}
    sizes = [1e6 * (max_mb or DEMO_MB) if path == "demo" else os.path.getsize(path) for path in inputs]
    room = min(sum(sizes), 1e6 * (max_mb or math.inf))
    rng = random.Random(seed + 1)                               # not the one that tells the demo stories
    out.mkdir(parents=True, exist_ok=True)
    temporary = {out / name: out / f"{name}.tmp" for name in ("train.bin", "val.bin", "meta.json")}
    try:
        train, val, meta_file = temporary.values()
        with (open(train, "wb") as train, open(val, "wb") as val, ThreadPoolExecutor(os.cpu_count()) as pool,
              tqdm(total=room, unit="B", unit_scale=True, disable=None) as bar):
            for path, size in zip(inputs, sizes):
                if not room:
                    break
                sources.append({"name": str(path)})
                blocks = demo_blocks(seed) if path == "demo" else file_blocks(path)
                for stories, used in read_stories(blocks, sources[-1], min(room, size)):
                    sides = {"train": [], "val": []}
                    for story in stories:
                        # One draw per story: the split depends on the seed and the story's number, on nothing
                        # else. The first two stories go one to each side, so that neither is ever empty.
                        number = counts["train_stories"] + counts["val_stories"]
                        drawn = rng.random() < val_fraction
                        side = "val" if (drawn if number > 1 else number) else "train"
                        sides[side].append(story)
                        counts[f"{side}_stories"] += 1
                    for side, file in ("train", train), ("val", val):
                        tokens = encode(tokenizer, sides[side], pool)
                        counts[f"{side}_tokens"] += len(tokens) // 2
                        file.write(tokens)
                    bar.update(used)
                room = max(0, room - size)                      # a source cut short is the last one
        stories, tokens = (counts[f"train_{what}"] + counts[f"val_{what}"] for what in ("stories", "tokens"))
        if stories < 2:
            raise ValueError(f"{' '.join(map(str, inputs))}: fewer than two stories, too few to train and test; "
                             f"separate stories by {END}" + " or raise --max_mb" * bool(max_mb))
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, **counts, "sources": sources,
                "val_fraction": val_fraction, "seed": seed}
        if inputs == ["demo"]:                                  # an END costs no nats, but counts as a token
            meta["entropy_nats_per_story"] = entropy()
            meta["entropy_nats_per_token"] = entropy() * stories / tokens
        meta_file.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for final, path in temporary.items():                   # meta.json last: it vouches for the other two
            os.replace(path, final)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return meta


def fail(error):
    """Says in one line on standard error what is wrong. Returns the exit status of bad input."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"{Path(sys.argv[0]).name}: {error}".splitlines()[0], file=sys.stderr)
    return 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    parser.add_argument("inputs", nargs="*", metavar="INPUT",
                        help=f"UTF-8 text files (stories separated by {END}), folders (every *.txt below), "
                             "tinystories (downloads TinyStoriesV2-GPT4, 2.2 GB, into the output folder) or "
                             "demo (stories from a built-in grammar); default: training_data if it holds any "
                             ".txt, else tinystories, and demo where there is no network")
    parser.add_argument("--out", type=Path, default=Path("data"), help="output folder (default: %(default)s)")
    parser.add_argument("--tokenizer", help="gpt2 or bytes (default: gpt2, but bytes for demo)")
    parser.add_argument("--val_fraction", type=float, default=0.05,
                        help="share of the stories for validation, between 0 and 1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the split and of demo (default: %(default)s)")
    parser.add_argument("--max_mb", type=float, help="MB (10^6 bytes) of text to use, to the last whole story "
                                                     f"(default: all; for demo {DEMO_MB})")
    args = parser.parse_args()
    try:
        if not 0 < args.val_fraction < 1:
            raise ValueError(f"--val_fraction is {args.val_fraction}, but must lie between 0 and 1")
        if args.max_mb is not None and not 0 < args.max_mb < math.inf:
            raise ValueError(f"--max_mb is {args.max_mb}, but must be above 0")
        asked = args.inputs or ["training_data"] * any(Path("training_data").rglob("*.txt"))
        inputs = asked or ["tinystories"]
        try:
            # The vocabulary comes first: where it is missing, nobody should wait for 2.2 GB to find that out.
            tokenizer = get_tokenizer(args.tokenizer or ("bytes" if inputs == ["demo"] else "gpt2"))
            if "tinystories" in inputs:
                corpus = args.out / TINYSTORIES.rpartition("/")[2]
                inputs = [corpus if path == "tinystories" else path for path in inputs]
                args.out.mkdir(parents=True, exist_ok=True)
                if not corpus.exists():
                    download(TINYSTORIES, corpus)
        except ConnectionError as error:
            if asked:
                raise
            fail(f"NO NETWORK, SO THESE ARE THE BUILT-IN DEMO STORIES, NOT TINYSTORIES: {error}")
            inputs, tokenizer = ["demo"], get_tokenizer(args.tokenizer or "bytes")
        meta = write(args.out, tokenizer, find_files(inputs), args.val_fraction, args.seed, args.max_mb)
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        fail("interrupted, nothing was changed")
        return 130
    print(f"{args.out}: {meta['train_stories']:,} stories ({meta['train_tokens']:,} tokens) to train on and "
          f"{meta['val_stories']:,} ({meta['val_tokens']:,}) to validate on; tokenizer {meta['tokenizer']}, "
          f"{meta['vocab_size']:,} symbols")
    if "entropy_nats_per_token" in meta:
        print(f"The best possible loss on these stories is {meta['entropy_nats_per_token']:.4f} nats per token.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
