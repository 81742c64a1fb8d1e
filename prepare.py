"""Turns stories into tokens: writes train.bin and val.bin (uint16, little-endian) and meta.json.
Where stories are labelled, train.control.bin and val.control.bin hold their numbers (float32).

    python prepare.py           # training_data/*.txt if there are any, else TinyStories, else demo
    python prepare.py demo      # stories from the grammar below: no download, exact entropy known
    python prepare.py books more.txt --vocab 8192 --max_mb 100

The text streams through: a corpus of any size needs the same few hundred MB of memory.
"""
import argparse
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import sys
import urllib.request
from pathlib import Path

import filelock
import numpy as np
import tiktoken
from tqdm import tqdm

END = "<|endoftext|>"               # ends every story, in the text and in the tokens
CONTROL = "<|control|>"             # begins a label line, a story's first: "<|control|> 1 0.5"
BLOCK = 4 << 20                     # bytes read and tokenised at a time
LONGEST = 16 << 20                  # bytes in one story: what bounds the memory
DEMO_MB = 24                        # three times what the laptop preset reads
TINYSTORIES = ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
               "TinyStoriesV2-GPT4-train.txt")
ARRAYS = "train", "val", "train.control", "val.control"         # NAME.bin, each as one array


# ---- Tokenizers ----------------------------------------------------------------------------------
def tokenizer_of(meta):
    """The tiktoken.Encoding of data whose metadata are `meta`. Its last token is END.
    Any text encodes, and decodes exactly. meta["tokenizer"] is one of
    "gpt2": GPT-2's bytes and merges;
    "words": bytes, then the words meta["vocabulary"];
    "bytes".
    meta["vocab_size"] is how many of them are used, with END; None means all.
    Raises ValueError for another name or size, ConnectionError where GPT-2's vocabulary is neither
    cached nor reachable."""
    name = meta["tokenizer"]
    tokens = [bytes([byte]) for byte in range(256)]
    if name == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):       # no network, or a damaged download
            raise ConnectionError("the GPT-2 vocabulary is neither cached nor reachable: "
                                  "go online once") from None
        # The bytes come first, then what each merge makes, in the order in which the merges were
        # learned and are applied. So the first n of them are a smaller tokenizer of their own.
        tokens = list(gpt2._mergeable_ranks)
        pattern = gpt2._pat_str
    elif name == "words":
        tokens += [word.encode() for word in meta["vocabulary"]]
        pattern = WORD.pattern
    elif name == "bytes":
        pattern = r"[\s\S]{1,99}"           # nothing is merged, so any cut will do
    else:
        raise ValueError(f"unknown tokenizer {name!r}: use gpt2, words or bytes")
    size = meta.get("vocab_size") or len(tokens) + 1
    if not 257 <= size <= len(tokens) + 1:
        raise ValueError(f"{name} can have a vocabulary of 257 to {len(tokens) + 1}, not of {size}")
    ranks = {token: rank for rank, token in enumerate(tokens[:size - 1])}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END: size - 1})


def clean(text):
    """Text with the data's line ends, "\\n", and without byte-order marks."""
    return text.replace("\ufeff", "").replace("\r\n", "\n")


def prompt_tokens(tokenizer, text):
    """The token ids (list of int) of a text that a model is to go on with, treated as stories are:
    an END comes first, and nothing blank stands around an END. A space at the end of the text is
    taken off, since a story's words begin with theirs; a line end stays."""
    text = re.sub(rf"\s*({re.escape(END)}\s*)+", END, END + clean(text)).rstrip(" ")
    return tokenizer.encode(text, allowed_special={END})


# ---- The demo stories ----------------------------------------------------------------------------
# A slot has options, separated by "|" and all equally likely; or it is a pair (earlier slot,
# table), and the option drawn there selects the table's entry. "{slot}" draws where a story first
# meets it, and repeats those words from then on.
#
# No text can be told in two ways: slots are drawn in reading order, a draw's words stand where it
# is drawn, and no option is the beginning of another one of its list. So reading from left to right
# settles every draw, and the entropy of the stories is the entropy of the draws.
SHE = "girl|cat|bunny|mouse"
HE = "boy|dog|fox|hedgehog"
PLACES = "beach|forest|farm|park|garden|castle"
HIGH = "at the top of a"
WATER = "across a"
BEAST = "right behind a"
DARK = "inside a"
HOLE = "down in a"


def gendered(she, he):
    """A slot whose word follows from the hero's kind: `she` of a girl, `he` of a boy."""
    return "kind", dict.fromkeys(SHE.split("|"), she) | dict.fromkeys(HE.split("|"), he)


def by_place(options):
    """A slot whose word follows from the place: one of the options, in the order of PLACES."""
    return "place", dict(zip(PLACES.split("|"), options.split(", "), strict=True))


GRAMMAR = {
    "story": "{start} {trait} {kind} named {name}. {has}\n"
             "{day}, {name} and {her} friend {pal} the {animal} {went} to the {place}. "
             "{wish} {seen}, but it was {trouble} {spot}. {worry}\n"
             "{idea} {She} {fix}\n"
             "{home} {end}",
    "start": "Once upon a time, there was a|Once upon a time, there lived a|Long ago, there was a|"
             "Once upon a time, in a small town, there was a|There once was a",
    "trait": "brave|kind|smart|sweet|nice|clever",
    "kind": f"{SHE}|{HE}",
    "name": gendered("Lily|Mia|Anna|Sue|Lucy|Emma|Amy|Zoe", "Tom|Ben|Max|Tim|Sam|Jack|Leo|Bob"),
    "She": gendered("She", "He"),
    "she": gendered("she", "he"),
    "him": gendered("her", "him"),
    "Her": gendered("Her", "His"),
    "her": gendered("her", "his"),
    "has": "{She} had a {color} {thing}.|{She} loved {her} {color} {thing}.|"
           "{She} took {her} {color} {thing} everywhere.|"
           "{Her} favorite thing was a {color} {thing}.",
    "color": "red|blue|green|yellow|pink|purple",
    "thing": "rope|kite|umbrella|ball|boat|shovel|drum|blanket|lamp",
    "pal": "Gus|Dot|Pip|Rex|Coco|Bella|Spot|Daisy",
    "animal": "pig|lamb|pony|goat|panda|bear",
    "day": "One day|One fine day|One morning|One Sunday",
    "went": "went|walked|ran",
    "place": PLACES,
    "wish": "{name} wanted a {goal} for {her} {kin}.|{She} wanted to give {her} {kin} a {goal}.|"
            '"I want a {goal} for my {kin}," said {name}.',
    "goal": by_place("pretty shell|smooth stone|shiny pearl, golden leaf|tasty berry|brown nut, "
                     "fresh egg|soft feather|juicy apple, shiny coin|lucky clover|glass marble, "
                     "ripe strawberry|pretty rose|sweet plum, golden key|silver cup|little crown"),
    "kin": "mom|dad|grandma|grandpa|sister|brother",
    "seen": "Soon they saw one|At last {pal} saw one|They looked around and saw one",
    "trouble": ("thing", {
        "rope": f"{HIGH}|{WATER}|{HOLE}",
        "kite": f"{HIGH}|{WATER}|{BEAST}",
        "umbrella": f"{HIGH}|{WATER}",
        "ball": f"{HIGH}|{BEAST}",
        "boat": WATER,
        "shovel": f"{WATER}|{HOLE}",
        "drum": f"{BEAST}|{DARK}",
        "blanket": f"{BEAST}|{HOLE}",
        "lamp": f"{DARK}|{HOLE}"}),
    "spot": ("trouble", {
        HIGH: by_place("tall rock, tall tree, tall barn, tall gate, high wall, high tower"),
        WATER: by_place("deep pool, cold stream, muddy pond, wide lake, round pond, deep river"),
        BEAST: by_place("grumpy crab, grumpy wolf, grumpy bull, grumpy swan, grumpy goose, "
                        "grumpy dragon"),
        DARK: by_place("dark cave, dark cabin, dark barn, dark tunnel, dark shed, dark room"),
        HOLE: by_place("sandy hole, deep hole, muddy hole, big hole, deep pit, dry well")}),
    "worry": '"Oh no!" said {pal}. "{alas}"|"{alas}" said {pal}.|{pal} stopped. "{alas}"',
    "alas": ("trouble", {
        HIGH: "It is too high!|We can not fly!",
        WATER: "We will get wet!|We can not swim!",
        BEAST: "It looks so angry!|I am scared of it!",
        DARK: "It is too dark!|We can not see a thing!",
        HOLE: "It is too deep!|We might fall in!"}),
    "idea": 'Then {name} had an idea.|"I have my {thing}!" said {name}.|'
            "{name} smiled at {her} {thing}.|{name} knew what to do.",
    "fix": ("trouble", {
        HIGH: ("thing", {
            "rope": "threw the {color} {thing} over the {spot}, climbed up and took the {goal}.",
            "kite": "flew the {color} {thing} over the {spot}, and its string pulled the {goal} "
                    "down.",
            "umbrella": "opened the {color} {thing}. The wind lifted {him} onto the {spot}, "
                        "and {she} took the {goal}.",
            "ball": "threw the {color} {thing} at the {spot}. Bump! The {goal} fell down, "
                    "and {pal} caught it."}),
        WATER: ("thing", {
            "rope": "tied the {color} {thing} to a tree, swung over the {spot} and took the "
                    "{goal}.",
            "kite": "held on to the {color} {thing}, flew over the {spot} and took the {goal}.",
            "umbrella": "sat in the {color} {thing}, sailed over the {spot} and took the {goal}.",
            "boat": "put the {color} {thing} on the {spot}, sailed over and took the {goal}.",
            "shovel": "built a path across the {spot} with the {color} {thing} and took the "
                      "{goal}."}),
        BEAST: ("thing", {
            "kite": "let the {spot} fly the {color} {thing}. It laughed and gave {him} the {goal}.",
            "ball": "rolled the {color} {thing} to the {spot}. It laughed and gave {him} the "
                    "{goal}.",
            "drum": "played the {color} {thing}. The {spot} began to dance and gave {him} the "
                    "{goal}.",
            "blanket": "wrapped the {spot} in the {color} {thing}. It smiled and gave {him} the "
                       "{goal}."}),
        DARK: ("thing", {
            "drum": "played the {color} {thing}. They felt brave, went into the {spot} "
                    "and took the {goal}.",
            "lamp": "turned on the {color} {thing}. Now the {spot} was bright, and {she} found "
                    "the {goal}."}),
        HOLE: ("thing", {
            "rope": "let the {color} {thing} down into the {spot}, climbed down and took the "
                    "{goal}.",
            "shovel": "dug steps into the {spot} with the {color} {thing}, walked down and took "
                      "the {goal}.",
            "blanket": "hung the {color} {thing} into the {spot}, climbed down and took the "
                       "{goal}.",
            "lamp": "held the {color} {thing} over the {spot}, saw steps, went down and took "
                    "the {goal}."})}),
    "home": "Back home, {name} gave the {goal} to {her} {kin}.|"
            "At home, {her} {kin} was so happy with the {goal}.|"
            "They ran home and gave the {goal} to {name}'s {kin}.",
    "end": '"What a {trait} {kind}!" said {her} {kin}.|'
           "{name} hugged {pal} and the {color} {thing}.|"
           "Now {name} loved the {color} {thing} even more.|{name} and {pal} were very happy.",
}
# The slots that a label (--labels) decides, where earlier text gives no hint:
# {slot: (control, {its number: option})}.
LABELLED = {
    "end": ("hug", {1: "{name} hugged {pal} and the {color} {thing}.",
                    -1: '"What a {trait} {kind}!" said {her} {kin}.'}),
    "start": ("long", {1: "Once upon a time, in a small town, there was a",
                       -1: "There once was a"}),
}
CONTROLS = ["hug", "long"]                              # the order of a label's numbers
SLOT = re.compile(r"{(\w+)}")
WORD = re.compile(r"'s| ?\w+| ?[^\w\s]|\s")             # a word or a mark: one token of "words"
LOOKED_UP = {"kind", "thing", "place", "trouble"}       # the slots that later slots depend on
# What a story must remember: {its name in analyze.py's table: the slot of GRAMMAR}.
SLOTS = {"hero": "name", "friend": "pal", "colour": "color", "thing": "thing", "place": "place",
         "goal": "goal", "whom": "kin"}


def options(slot, drawn):
    """The equally likely options of `slot` (list of str), given what was drawn before it.
    `drawn`: the option of each slot so far, and the number of each control of a label."""
    control, table = LABELLED.get(slot, (None, None))
    if control in drawn:
        return [table[drawn[control]]]
    rule = GRAMMAR[slot]
    while isinstance(rule, tuple):
        earlier_slot, table = rule
        rule = table[drawn[earlier_slot]]
    return rule.split("|")


def slot_words(name):
    """All words or phrases that stories may have for one of SLOTS, sorted (list of str).
    A story uses exactly one of them, as a whole word."""
    rule = GRAMMAR[SLOTS[name]]
    rules = rule[1].values() if isinstance(rule, tuple) else [rule]
    return sorted(set("|".join(rules).split("|")))


def tell(rng, label=()):
    """Draws a story, given its label, pairs (control, number). Returns its text and -log of its
    probability (nats). `rng`: a random.Random; Python promises the same random() for a seed in
    every version and on every machine."""
    drawn = dict(label)
    words = {}
    nats = []

    def fill(match):
        slot = match[1]
        if slot not in words:
            choices = options(slot, drawn)
            nats.append(math.log(len(choices)))
            drawn[slot] = choices[int(rng.random() * len(choices))]
            words[slot] = SLOT.sub(fill, drawn[slot])
        return words[slot]

    return SLOT.sub(fill, "{story}"), sum(nats)


def tell_labelled(rng):
    """Draws a label and a story of it. Returns its label line and its text."""
    label = {control: -1 if rng.random() < 0.5 else 1 for control in CONTROLS}
    numbers = " ".join(map(str, label.values()))
    return f"{CONTROL} {numbers}\n{tell(rng, label)[0]}"


def grammar_words():
    """The words and marks of the demo stories, sorted, each with the space before it if it has one;
    no single characters. 1,000 stories use them all."""
    rng = random.Random(0)
    text = "\n".join(tell(rng)[0] for _ in range(1000))
    return sorted({word for word in WORD.findall(text) if len(word) > 1})


@functools.cache
def entropy(todo=("story",), drawn=frozenset()):
    """The exact entropy (nats) of a story, or of its rest: the chain rule, over every option of
    every slot. `todo`: the slots to come, in reading order. `drawn`: pairs (slot, option), and the
    pairs (control, number) of a label that is known. An option that no later slot looks up is None,
    so that stories which go on alike share one cached sum."""
    if not todo:
        return 0.0
    slot = todo[0]
    rest = todo[1:]
    known = dict(drawn)
    if slot in known:
        return entropy(rest, drawn)
    choices = options(slot, known)
    total = 0.0
    for choice in choices:
        remembered = choice if slot in LOOKED_UP else None
        total += entropy((*SLOT.findall(choice), *rest), drawn | {(slot, remembered)})
    return math.log(len(choices)) + total / len(choices)


# ---- Text in -------------------------------------------------------------------------------------
def find_files(inputs, folder):
    """The paths of `inputs`: each folder becomes every *.txt below it, in the same order
    everywhere, and "tinystories" a file in `folder`, where it is downloaded once."""
    files = []
    for path in inputs:
        if path == "tinystories":
            path = folder / Path(TINYSTORIES).name
            if not path.exists():
                download(TINYSTORIES, path)
        if path != "demo" and os.path.isdir(path):
            files += sorted(Path(path).rglob("*.txt"), key=Path.as_posix)
        else:
            files.append(path)
    return files


def download(url, path):
    """Downloads a text with ENDs to `path`, which it becomes when it is whole.
    Raises ConnectionError if it cannot be had, or if what comes is cut short or something else."""
    part = Path(f"{path}.part")
    try:
        with tqdm(desc=f"{path.name}, 2.2 GB", unit="B", unit_scale=True, disable=None) as bar:
            urllib.request.urlretrieve(url, part, lambda blocks, size, total: bar.update(size))
        if END.encode() not in next(read_blocks(part), b""):
            raise ConnectionError("these are no stories, but perhaps a login page")
        part.rename(path)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_blocks(path):
    """Yields the bytes of a file in blocks."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def demo_blocks(seed, labels):
    """Yields the bytes of demo stories in blocks, without end."""
    rng = random.Random(seed)
    while True:
        stories = [tell_labelled(rng) if labels else tell(rng)[0] for _ in range(1000)]
        yield "".join(f"{story}\n{END}\n" for story in stories).encode()


def read_texts(files, args):
    """Yields (path, text): the bytes of whole stories, about BLOCK at a time, to the last one
    within args.max_mb of all text."""
    default_mb = DEMO_MB if "demo" in files else 1e9
    room = max(0, int(1e6 * (args.max_mb or default_mb)))
    for path in files:
        blocks = demo_blocks(args.seed, args.labels) if path == "demo" else read_blocks(path)
        rest = b""                          # the beginning of a story
        for block in blocks:
            block = block[:room]
            room -= len(block)
            text, end, rest = (rest + block).rpartition(END.encode())
            yield path, text + end
            if room == 0:                   # what is left may have been cut off
                return
            if len(rest) > LONGEST:
                raise ValueError(f"{path}: a story of over {LONGEST >> 20} MB; separate stories "
                                 f"by {END}")
        yield path, rest                    # the end of a file ends a story, too


def read_stories(text):
    """Yields the (story, label) in a text (bytes). A label is a list of numbers, empty where no
    label line precedes the story. Raises ValueError."""
    for story in clean(text.decode()).split(END):
        story = story.strip()
        label = []
        if story.startswith(CONTROL):
            line, _, story = story.partition("\n")
            label = [float(number) for number in line.removeprefix(CONTROL).split()]
            if not story or not label or not np.isfinite(label).all():
                raise ValueError(f"{line[:40]!r} must be finite numbers after {CONTROL}, then the "
                                 "story on a new line")
        if story:
            yield story.strip(), label


# ---- Tokens out ----------------------------------------------------------------------------------
def split_of(story, first_stories, args):
    """The split of a story, "train" or "val": equal stories always get the same one.
    A hash of the story and the seed decides; but the first two different stories of all, kept in
    the dict `first_stories`, go one to each split, so that neither is empty."""
    # The first story trains, the second validates; later ones that equal them follow them.
    if story in first_stories or len(first_stories) < 2:
        return first_stories.setdefault(story, "val" if first_stories else "train")
    digest = hashlib.sha256(f"{args.seed} {story}".encode()).hexdigest()
    share = int(digest, 16) / 16**64        # even over [0, 1)
    return "val" if share < args.val_fraction else "train"


def write_arrays(folder, files, tokenizer, meta, args):
    """Writes the tokens and labels of `files` (paths or "demo") to `folder`, and enters in `meta`
    what they are. Raises ValueError for unusable text."""
    meta.update(train_stories=0, val_stories=0, train_tokens=0, val_tokens=0)
    if args.labels:
        meta["controls"] = CONTROLS
    cores = os.cpu_count()
    first_stories = {}
    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in ARRAYS}
        for path, text in tqdm(read_texts(files, args), disable=None):
            batch = {"train": [], "val": []}
            try:
                for story, label in read_stories(text):
                    controls = meta.setdefault("controls", [str(i + 1) for i in range(len(label))])
                    if len(label) != len(controls):
                        raise ValueError(f"a label of {len(label)} numbers, not of "
                                         f"{len(controls)} as expected: {story[:40]!r}")
                    split = split_of(story, first_stories, args)
                    batch[split].append(story + END)
                    outputs[f"{split}.control"].write(np.array(label, "<f4"))
                for split, stories in batch.items():
                    # array_split cuts the stories into one part for each core, joined to one
                    # long text: thousands of short ones would cost more.
                    parts = map("".join, np.array_split(np.array(stories, object), cores))
                    ids = tokenizer.encode_batch(parts, num_threads=cores, allowed_special={END})
                    tokens = np.concatenate(ids).astype("<u2")
                    outputs[split].write(tokens)
                    meta[f"{split}_stories"] += len(stories)
                    meta[f"{split}_tokens"] += len(tokens)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if len(first_stories) < 2:
        raise ValueError("fewer than two different stories, too few to train and test: give more "
                         f"text, separate stories by {END}, or raise --max_mb")
    for name in ARRAYS:
        meta[f"{name}_sha256"] = sha256_of(folder / f"{name}.bin")


def replace_files(new, folder):
    """Moves the files of the folder `new` to `folder`. meta.json vouches for the others: the old
    one goes first, the new one comes last."""
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ARRAYS:
        path = folder / f"{name}.bin"
        (new / path.name).replace(path)
        if path.stat().st_size == 0:        # no labels
            path.unlink()
    (new / "meta.json").replace(folder / "meta.json")


def prepare(inputs, args):
    """Writes the data of `inputs` to args.out; an error before the new files are moved in leaves
    what was there. Returns the metadata. Raises ConnectionError where a download fails."""
    name = args.tokenizer
    if name is None:
        name = "words" if inputs == ["demo"] else "gpt2"
    meta = {"tokenizer": name, "vocab_size": args.vocab, "val_fraction": args.val_fraction,
            "seed": args.seed}
    if name == "words":
        meta["vocabulary"] = grammar_words()
    # First the vocabulary: where it is missing, nobody should wait for 2.2 GB to find that out.
    tokenizer = tokenizer_of(meta)
    meta["vocab_size"] = tokenizer.n_vocab
    files = find_files(inputs, args.out)
    new = args.out / "unfinished"
    new.mkdir(exist_ok=True)
    try:
        write_arrays(new, files, tokenizer, meta, args)
        if files == ["demo"]:
            # Given the label, if any: it is the same for every label.
            nats = entropy(drawn=frozenset((control, 1) for control in meta["controls"]))
            stories = meta["train_stories"] + meta["val_stories"]
            tokens = meta["train_tokens"] + meta["val_tokens"]      # ENDs count, at no nats
            meta["entropy_nats_per_story"] = nats
            meta["entropy_nats_per_token"] = nats * stories / tokens
        (new / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
        replace_files(new, args.out)
    finally:
        shutil.rmtree(new)
    return meta


# ---- Tokens back ---------------------------------------------------------------------------------
def sha256_of(path):
    with open(path, "rb") as file:          # takes about a second per GB
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(folder):
    """The metadata in `folder` (dict). Raises ValueError if they are missing or damaged."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no data in {folder}: run prepare.py first, or set --data") from None
    except ValueError:
        meta = {}
    if "vocab_size" not in meta:
        raise ValueError(f"{path} is damaged: run prepare.py again")
    return meta


def same_data(a, b):
    """Whether two metadata (dicts) are of the same tokens and labels, wherever the text lay."""
    keys = ["tokenizer", "vocab_size", "vocabulary", *(f"{name}_sha256" for name in ARRAYS)]
    return all(a.get(key) == b.get(key) for key in keys)


def read_array(folder, name, meta, dtype):
    """One of ARRAYS, memory-mapped. Raises ValueError if `meta` does not describe its file."""
    path = f"{folder}/{name}.bin"
    if sha256_of(path) != meta.get(f"{name}_sha256"):
        raise ValueError(f"{path} is not what its meta.json describes: run prepare.py again")
    return np.memmap(path, dtype, "r")


def read_tokens(folder, split, meta):
    """The tokens of `split`, "train" or "val": uint16, memory-mapped. Raises ValueError."""
    return read_array(folder, split, meta, "<u2")


def read_labels(folder, split, meta, tokens):
    """The labels of the stories of `split`, whose tokens these are; None where they have none.
    Returns (stories, n_control) float32, memory-mapped, and (stories,) where each one's END is."""
    controls = meta.get("controls")
    if not controls:
        return None
    labels = read_array(folder, f"{split}.control", meta, "<f4")
    return labels.reshape(-1, len(controls)), np.flatnonzero(tokens == meta["vocab_size"] - 1)


def rows_of(tokens, block_size, aligned=False):
    """The rows to train on: (N, 2) int64, where in `tokens` a row's inputs begin, and how many
    targets it has.
    Contiguous rows are windows of block_size targets; a rest that fills none is left out.
    An aligned row is a story: its inputs begin with the END of the story before, its targets end
    with its own END. The first story begins at index -1, the file's last token, which is an END. A
    story longer than block_size is cut into several rows. So here each token is a target once."""
    if not aligned:
        rows = [(start, block_size) for start in range(0, len(tokens) - block_size, block_size)]
    else:
        rows = []
        start = -1
        for stop in np.flatnonzero(tokens == tokens[-1]).tolist():
            rows += [(i, min(block_size, stop - i)) for i in range(start, stop, block_size)]
            start = stop
    return np.array(rows, np.int64).reshape(-1, 2)


def places_of(rows, bucket):
    """Where in the tokens the inputs of `rows` are: (B, T) int64. T is the largest number of
    targets, rounded up to a multiple of `bucket`."""
    return rows[:, :1] + np.arange(math.ceil(rows[:, 1].max() / bucket) * bucket)


def windows(tokens, rows, bucket=1):
    """Inputs and targets of `rows` (B, 2), see rows_of: (B, T) int64 each, with T the largest
    number of targets, rounded up to a multiple of `bucket`.
    A shorter row is padded: inputs with the last token, which is END, targets with -1, which
    carries no loss."""
    places = places_of(rows, bucket)
    x = tokens[places % len(tokens)].astype(np.int64)
    y = tokens[(places + 1) % len(tokens)].astype(np.int64)
    stops = rows[:, :1] + rows[:, 1:]
    padding = places >= stops
    x[padding] = tokens[-1]
    y[padding] = -1
    return x, y


def control_windows(labels, rows, bucket=1):
    """What the labels tell the controller at each input of `rows`, see windows: (B, T, n_control)
    float32; None for None. An END is the first input of the story after it."""
    if labels is None:
        return None
    controls, ends = labels
    story = np.searchsorted(ends, places_of(rows, bucket), "right")
    return controls[story.clip(max=len(controls) - 1)]


# ---- The command line ----------------------------------------------------------------------------
def complain(error):
    """Says in one line on standard error what is wrong. Returns the exit status of bad input."""
    lines = str(error).splitlines() or ["not enough memory"]        # a MemoryError says nothing
    print(f"{Path(sys.argv[0]).name}: {lines[0]}", file=sys.stderr)
    return 2


def command(main):
    """Decorates a script's main, so that it returns its exit status and prints an error as one line
    on standard error, without a traceback. Ctrl-C gives 130."""
    def run():
        try:
            with contextlib.suppress(AttributeError):       # a notebook's stream has no such method
                sys.stdout.reconfigure(errors="replace")    # a Windows code page lacks characters
            status = main()
            sys.stdout.flush()
            return status or 0
        except BrokenPipeError:
            # Nobody reads on, as after `| head`. At its end Python would try to write once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:                          # of --help, say
            return stop.code
        except (ValueError, OSError, MemoryError, FloatingPointError, OverflowError,
                RuntimeError) as error:
            # RuntimeErrors are bugs, except out of memory and lost connections between processes:
            # torch tells some of them by a class, some only by a text.
            outside = "OutOfMemory|out of memory|allocate memory|^Dist|[Cc]onnect|[Tt]imed out"
            if isinstance(error, RuntimeError) and not re.search(outside, repr(error)):
                raise
            return complain(error)
    return run


def locked(folder):
    """Holds the lock of `folder`, which it makes, while in a `with` block: one program at a time.
    Raises ValueError if another process has it, OSError if there cannot be a lock."""
    os.makedirs(folder, exist_ok=True)
    try:
        return filelock.FileLock(f"{folder}/lock").acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another program is at work in {folder}: "
                         "wait for it, or name another folder by --out") from None


def read_arguments():
    """The command line, checked. Raises ValueError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(complain(message))
    add = parser.add_argument
    add("input", nargs="*",
        help=f"UTF-8 text files (stories separated by {END}; each may begin with a line "
             f"'{CONTROL} 1 0.5', its label: numbers for the controller to read, as many in every "
             "story), folders (every *.txt below), tinystories (downloads TinyStoriesV2-GPT4, "
             "2.2 GB, into the output folder) or demo (stories from a built-in grammar, without "
             "end: name it last); default: "
             "training_data if it holds any .txt, else tinystories, and demo where there is no "
             "network")
    add("--out", type=Path, default="data", help="output folder (default: %(default)s)")
    add("--tokenizer",
        help="gpt2, words (the demo stories', else bytes) or bytes (default: gpt2; for demo words)")
    add("--vocab", type=int,
        help="tokens in the vocabulary, 257 or more: the first of GPT-2's, say, and END, so any "
             "text still encodes (default: all, 50257 of GPT-2's)")
    add("--labels", action="store_true",
        help="label the demo stories, for the controller to read: they end with a hug (1) or with "
             "words (-1), begin long (1) or short (-1) (default: no labels)")
    add("--val_fraction", type=float, default=0.05,
        help="share of the stories to validate on, above 0 and below 1 (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the split and of demo (default: %(default)s)")
    add("--max_mb", type=float,
        help="MB (10^6 bytes) of text to use, to the last whole story (default and 0: all; demo: "
             f"{DEMO_MB})")
    args = parser.parse_args()
    if args.labels and "demo" not in args.input:
        raise ValueError("--labels is for the demo stories: prepare.py demo --labels. In a text of "
                         f"your own, write label lines: {CONTROL} 1 0.5")
    if not 0 < args.val_fraction < 1:
        raise ValueError(f"--val_fraction is {args.val_fraction}, but must lie between 0 and 1")
    return args


@command
def main():
    args = read_arguments()
    if not args.input and any(Path("training_data").rglob("*.txt")):
        args.input = ["training_data"]
    with locked(args.out):
        try:
            meta = prepare(args.input or ["tinystories"], args)
        except ConnectionError as error:
            if args.input:
                raise ConnectionError(f"{error}; with no network, prepare text files with "
                                      "--tokenizer bytes") from None
            complain("NO NETWORK, SO THESE ARE THE BUILT-IN DEMO STORIES, NOT TINYSTORIES: "
                     f"{error}")
            args.vocab = None
            meta = prepare(["demo"], args)
    print(f"{args.out}: {meta['train_stories']:,} stories ({meta['train_tokens']:,} tokens) to "
          f"train on and {meta['val_stories']:,} ({meta['val_tokens']:,}) to validate on; "
          f"tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} symbols")
    if "entropy_nats_per_token" in meta:
        print("The best possible loss on these stories, to one who knows their labels, if any, is "
              f"{meta['entropy_nats_per_token']:.4f} nats per token.")
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    if not 0.5 < share / args.val_fraction < 2:
        complain(f"{share:.1%} of the tokens are to validate on, not {args.val_fraction:.1%}: "
                 f"stories stay whole, and these are few or long; separate them by {END}")


if __name__ == "__main__":
    sys.exit(main())
