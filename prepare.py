"""Turns stories into tokens: writes train.bin and val.bin (uint16, little-endian) and meta.json.
Where stories are labelled, train.control.bin and val.control.bin hold each one's numbers (float32, little-endian).

    python prepare.py              # training_data/*.txt if there are any, else TinyStories, else demo
    python prepare.py demo         # stories from the grammar below: no download, exact entropy known
    python prepare.py books more.txt --vocab seen --max_mb 100
    python prepare.py books --label dialogue        # and for each story a number, for the controller to read

The text streams through in blocks: a corpus of any size needs the same few hundred MB of memory.
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
import signal
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

END = "<|endoftext|>"               # ends every story, in the text and in the tokens
CONTROL = "<|control|>"             # begins a label line, a story's first: "<|control|> 1 0.5"
BLOCK = 4 << 20                     # bytes read and tokenised at a time; even, a token is two bytes
LONGEST = 16 << 20                  # bytes in one story: what bounds the memory
GPT2 = 50257                        # tokens in its vocabulary, the last of which is END
DEMO_MB = 24                        # more than the laptop preset reads, so that no story comes twice
# What a terminal shows of control characters out of a file or a model, except line breaks. It would obey them.
PICTURES = {i: 0x2400 + i for i in range(32) if i != 10} | dict.fromkeys(range(127, 160), 0xFFFD)
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
def tokenizer_of(meta):
    """The tiktoken.Encoding of data whose metadata are `meta`. Its last token is END; any text encodes and decodes.
    meta["tokenizer"] is "bytes"; or "words": bytes, then the words meta["vocabulary"] (default: the demo stories'); or
    "gpt2", where meta["vocabulary"], if any, holds the GPT-2 numbers of its tokens in their order (see keep).
    Raises ValueError for another name, ConnectionError if GPT-2's vocabulary is neither cached nor reachable."""
    name, vocabulary = meta["tokenizer"], meta.get("vocabulary")
    tokens = [bytes([byte]) for byte in range(256)]
    if name == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError):       # no network, or a damaged download
            raise ConnectionError("the GPT-2 vocabulary is neither cached nor reachable: go online once, or prepare "
                                  "with --tokenizer bytes") from None
        if vocabulary is None:
            return gpt2
        pattern, tokens = gpt2._pat_str, [gpt2.decode_single_token_bytes(token) for token in vocabulary[:-1]]
    elif name == "words":
        # A piece that the pattern cuts out becomes one token if it is one; else its bytes are joined to tokens, and
        # " attic" would begin with " at". So it cuts out the words, where they are whole, and all else in characters.
        # (?>...) tries one word only, the longest, which makes it 15 times as quick.
        vocabulary = vocabulary or grammar_words()
        words = sorted(vocabulary, reverse=True)            # "and" before "an"
        bare, spaced, marks = ("|".join(re.escape(word) for word in words if re.fullmatch(kind, word)) or "(?!)"
                               for kind in (r"\w+", r"\W\w+", r"\W+"))         # (?!) matches nothing
        pattern = rf"(?>{spaced})\b|\b(?>{bare})\b|{marks}|[\s\S]"
        tokens += [word.encode() for word in vocabulary]
    elif name == "bytes":
        pattern = r"[\s\S]{1,99}"           # nothing is joined, so any cut will do; long pieces are the quickest
    else:
        raise ValueError(f"unknown tokenizer {name!r}: use gpt2, words or bytes")
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def grammar_words(slot="story", before=""):
    """The words and marks of the demo stories, sorted, each with the space before it if it has one; no single bytes.
    Or those of one slot, with `before`, a space or nothing, in front."""
    words = set()
    for option, _ in every(GRAMMAR[slot]):
        words.update(word for word in WORD.findall(SLOT.sub("\n", before + option)) if len(word) > 1)
        for space, inner in re.findall(r"( ?){(\w+)}", before + option):
            words.update(grammar_words(inner, space))
    return sorted(words)


def keep(seen):
    """GPT-2's token numbers to keep, rising: `seen`, every byte, END, and every token on the way to one of them.
    BPE joins the pair of lowest number first. All that it joins on the way to a kept token is kept, and what is left
    keeps its order: so text of seen tokens encodes to the same pieces as before, and any other text still encodes."""
    ranks = tokenizer_of({"tokenizer": "gpt2"})._mergeable_ranks
    kept = {*range(256), *map(int, seen), len(ranks)}                                           # END is the last
    for token, rank in sorted(ranks.items(), key=lambda item: -item[1]):                        # parts come later
        if rank in kept and rank > 255:
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            kept |= {ranks[part] for part in parts}
    return sorted(kept)


# ---- The demo stories ------------------------------------------------------------------------------------------------
# A slot has options, separated by "|" and all equally likely, or a pair (earlier slot, table): which options go with
# what that one drew. "{slot}" draws an option where a story first gets there and repeats its words from then on.
#
# No text can be told in two ways: slots are drawn in reading order, a draw's words stand where it is drawn, and no
# option is the beginning of another one of its list. So reading from left to right settles every draw, and the entropy
# of the stories is the entropy of the draws.
SHE, HE = "girl|cat|bunny|mouse", "boy|dog|fox|hedgehog"
PLACES = "beach|forest|farm|park|garden|castle"
HIGH, WATER, BEAST, DARK, HOLE = "at the top of a", "across a", "right behind a", "inside a", "down in a"


def gendered(she, he):
    return "kind", {**dict.fromkeys(SHE.split("|"), she), **dict.fromkeys(HE.split("|"), he)}


def by_place(*options):
    return "place", dict(zip(PLACES.split("|"), options, strict=True))


GRAMMAR = {
    "story": "{start} {trait} {kind} named {name}. {has}\n"
             "{day}, {name} and {her} friend {pal} the {animal} {went} to the {place}. {wish} {seen}, "
             "but it was {trouble} {spot}. {worry}\n{idea} {She} {fix}\n{home} {end}",
    "start": "Once upon a time, there was a|Once upon a time, there lived a|Long ago, there was a|"
             "Once upon a time, in a small town, there was a|There once was a",
    "trait": "brave|kind|smart|sweet|nice|clever", "kind": f"{SHE}|{HE}",
    "name": gendered("Lily|Mia|Anna|Sue|Lucy|Emma|Amy|Zoe", "Tom|Ben|Max|Tim|Sam|Jack|Leo|Bob"),
    "She": gendered("She", "He"), "she": gendered("she", "he"), "him": gendered("her", "him"),
    "Her": gendered("Her", "His"), "her": gendered("her", "his"),
    "has": "{She} had a {color} {thing}.|{She} loved {her} {color} {thing}.|"
           "{She} took {her} {color} {thing} everywhere.|{Her} favorite thing was a {color} {thing}.",
    "color": "red|blue|green|yellow|pink|purple", "thing": "rope|kite|umbrella|ball|boat|shovel|drum|blanket|lamp",
    "pal": "Gus|Dot|Pip|Rex|Coco|Bella|Spot|Daisy", "animal": "pig|lamb|pony|goat|panda|bear",
    "day": "One day|One fine day|One morning|One Sunday", "went": "went|walked|ran", "place": PLACES,
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
        BEAST: by_place("grumpy crab", "grumpy wolf", "grumpy bull", "grumpy swan", "grumpy goose", "grumpy dragon"),
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
            "rope": "threw the {color} {thing} over the {spot}, climbed up and took the {goal}.",
            "kite": "flew the {color} {thing} over the {spot}, and its string pulled the {goal} down.",
            "umbrella": "opened the {color} {thing}. The wind lifted {him} onto the {spot}, and {she} took the {goal}.",
            "ball": "threw the {color} {thing} at the {spot}. Bump! The {goal} fell down, and {pal} caught it."}),
        WATER: ("thing", {
            "rope": "tied the {color} {thing} to a tree, swung over the {spot} and took the {goal}.",
            "kite": "held on to the {color} {thing}, flew over the {spot} and took the {goal}.",
            "umbrella": "sat in the {color} {thing}, sailed over the {spot} and took the {goal}.",
            "boat": "put the {color} {thing} on the {spot}, sailed over and took the {goal}.",
            "shovel": "built a path across the {spot} with the {color} {thing} and took the {goal}."}),
        BEAST: ("thing", {
            "kite": "let the {spot} fly the {color} {thing}. It laughed and gave {him} the {goal}.",
            "ball": "rolled the {color} {thing} to the {spot}. It laughed and gave {him} the {goal}.",
            "drum": "played the {color} {thing}. The {spot} began to dance and gave {him} the {goal}.",
            "blanket": "wrapped the {spot} in the {color} {thing}. It smiled and gave {him} the {goal}."}),
        DARK: ("thing", {
            "drum": "played the {color} {thing}. They felt brave, went into the {spot} and took the {goal}.",
            "lamp": "turned on the {color} {thing}. Now the {spot} was bright, and {she} found the {goal}."}),
        HOLE: ("thing", {
            "rope": "let the {color} {thing} down into the {spot}, climbed down and took the {goal}.",
            "shovel": "dug steps into the {spot} with the {color} {thing}, walked down and took the {goal}.",
            "blanket": "hung the {color} {thing} into the {spot}, climbed down and took the {goal}.",
            "lamp": "held the {color} {thing} over the {spot}, saw steps, went down and took the {goal}."})}),
    "home": "Back home, {name} gave the {goal} to {her} {kin}.|At home, {her} {kin} was so happy with the "
            "{goal}.|They ran home and gave the {goal} to {name}'s {kin}.",
    "end": '"What a {trait} {kind}!" said {her} {kin}.|{name} hugged {pal} and the {color} {thing}.|'
           "Now {name} loved the {color} {thing} even more.|{name} and {pal} were very happy.",
}
# What a label decides (--labels) and the text before does not announce: by slot, the control, and the option for each
# of its numbers.
LABELLED = {"end": ("hug", {1: "{name} hugged {pal} and the {color} {thing}.",
                            -1: '"What a {trait} {kind}!" said {her} {kin}.'}),
            "start": ("long", {1: "Once upon a time, in a small town, there was a", -1: "There once was a"})}
CONTROLS = [control for control, _ in LABELLED.values()]
SLOT = re.compile(r"{(\w+)}")
WORD = re.compile(r"'s| ?\w+| ?[^\w\s]|\s")             # a word or a mark of a story: one token of "words"
LOOKED_UP = {"kind", "thing", "place", "trouble"}       # the slots that later slots depend on
# The slots that a story must remember, by the names they have where that is measured.
SLOTS = {"hero": "name", "friend": "pal", "colour": "color", "thing": "thing", "place": "place", "goal": "goal",
         "whom": "kin"}
# What the words of a slot may have forgotten, where a story is read back.
MAY_FORGET = {**dict.fromkeys(("She", "she", "him", "Her", "her"), "kind"), "goal": "place", "spot": "place",
              "fix": "thing"}


def every(rule, **needs):
    """Every option of a rule of the grammar, and what must have been drawn for it: pairs (option, {slot: option})."""
    if isinstance(rule, str):
        return [(option, needs) for option in rule.split("|")]
    slot, table = rule
    return [pair for key, below in table.items() for pair in every(below, **needs, **{slot: key})]


def options(slot, drawn):
    """The equally likely options of `slot`, given what was drawn before it: slots, and the controls of a label."""
    control, table = LABELLED.get(slot, (None, None))
    rule = table[drawn[control]] if control in drawn else GRAMMAR[slot]
    while isinstance(rule, tuple):
        rule = rule[1][drawn[rule[0]]]
    return rule.split("|")


def tell(rng, label=()):
    """Draws one story, given its label, pairs (control, number). Returns its text and -log of its probability (nats).
    `rng`: a random.Random; Python promises the same random() for a seed in every version and on every machine."""
    drawn, words, nats = dict(label), {}, []

    def fill(match):
        if (slot := match[1]) not in words:
            choices = options(slot, drawn)
            nats.append(math.log(len(choices)))
            drawn[slot] = choices[int(rng.random() * len(choices))]
            words[slot] = SLOT.sub(fill, drawn[slot])
        return words[slot]

    return SLOT.sub(fill, "{story}"), sum(nats)


def tell_labelled(rng):
    """Draws a label and a story of it; returns its label line and its text."""
    label = {control: 1 - 2 * (rng.random() < 0.5) for control in CONTROLS}
    return f"{CONTROL} {' '.join(map(str, label.values()))}\n{tell(rng, label)[0]}"


@functools.cache
def entropy(todo=("story",), drawn=frozenset()):
    """The exact entropy (nats) of a story, or of its rest: the chain rule, over every option of every slot.
    `todo`: the slots to come, in reading order. `drawn`: pairs (slot, option), with None for options that no slot
    looks up, so that stories which go on alike share one cached sum; and the pairs of a label that is known."""
    if not todo:
        return 0.0
    slot, rest, known = todo[0], todo[1:], dict(drawn)
    if slot in known:
        return entropy(rest, drawn)
    choices = options(slot, known)
    return math.log(len(choices)) + math.fsum(
        entropy((*SLOT.findall(choice), *rest), drawn | {(slot, choice if slot in LOOKED_UP else None)})
        for choice in choices) / len(choices)


@functools.cache
def story_pattern():
    """A regular expression for a story in which every mention of a slot may be any option of it, whatever was drawn.
    Returns it, and for each of its groups the slot, the option, and what must have been drawn for that option."""
    groups = []

    def expression(slot, drawn):
        alternatives = []
        for option, needs in dict(every(drawn.get(slot, GRAMMAR[slot]))).items():
            groups.append((slot, option, needs))
            parts = enumerate(SLOT.split(option))       # literal, slot, literal, slot, ..., literal
            parts = [expression(part, needs) if i % 2 else re.escape(part) for i, part in parts]
            alternatives.append(f"({''.join(parts)})")
        return f"(?:{'|'.join(alternatives)})"
    return re.compile(expression("story", {})), groups


def read_back(text, label=()):
    """Reads one story, without END. Returns its mentions in reading order, None if it is no story of the grammar, or
    not one of its label, pairs (control, number).
    A mention is (slot, start, end, words, nats): words = text[start:end]; nats, the log of the number of options where
    they are drawn, 0 where they are repeated. What is drawn must go with what was drawn before it, except for what it
    MAY_FORGET; a repetition may be any option of the slot. kept() says what came back right."""
    pattern, groups = story_pattern()
    match, mentions, drawn = pattern.fullmatch(text), [], dict(label)
    for i, (slot, option, needs) in enumerate(groups[1:] if match else (), 2):      # group 1 is the whole story
        start, end = match.span(i)
        if start < 0:                                   # this option does not stand here
            continue
        nats = 0.0
        if slot not in drawn:
            choices = options(slot, drawn)
            if option not in choices and (slot not in MAY_FORGET or any(
                    drawn[other] != needed for other, needed in needs.items() if other != MAY_FORGET[slot])):
                return None
            nats, drawn[slot] = math.log(len(choices)), option
        mentions.append((slot, start, end, text[start:end], nats))
    return mentions or None


def kept(mentions):
    """For each of SLOTS: is every mention the first one's? For the place: do all goals and spots belong to it?"""
    first, wrong = {}, set()
    for slot, _, _, words, _ in mentions:
        if words != first.setdefault(slot, words):
            wrong.add(slot)
        if slot in ("goal", "spot") and words not in options(slot, first):
            wrong.add("place")
    return {name: slot not in wrong for name, slot in SLOTS.items()}


def label_slots(tokens, tokenizer, labels=None):
    """What each of `tokens` (N,), whole demo stories with their ENDs, is part of, and what the grammar pays for it,
    given the stories' labels, if they have any, see read_labels.
    Returns (N,) int8, the position in SLOTS of the slot whose words it belongs to (a spot's count for its place), else
    len(SLOTS); and (N,) float64, -log of its probability (nats) given the tokens before it, exactly: over a story they
    sum to tell()'s nats. Raises ValueError if these are no stories of the grammar."""
    number = {slot: i for i, slot in enumerate(SLOTS.values())}
    number["spot"] = number["place"]
    slots, floor, begin = np.full(len(tokens), len(SLOTS), np.int8), np.zeros(len(tokens)), 0
    pieces = tokenizer.decode_tokens_bytes(tokens.tolist())
    token_of = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])              # of each character
    for i, text in enumerate(b"".join(pieces).decode(errors="replace").split(END)[:-1]):
        if not (mentions := read_back(text, zip(CONTROLS, labels[0][i], strict=True) if labels else ())):
            raise ValueError("these are not the demo stories of this version: run prepare.py demo again")
        first = {slot: words for slot, _, _, words, _ in reversed(mentions)}
        first |= {slot: options(slot, first)[0] for slot in GRAMMAR.keys() - first}     # a pronoun that is not used
        for slot, start, end, words, nats in mentions:
            if slot in number:
                slots[token_of[begin + start]:token_of[begin + end - 1] + 1] = number[slot]
            if nats:
                # Until a character rules some options out, they share the probability with the one that was drawn.
                choices = [option.format_map(first) for option in options(slot, first)]
                ruled_out = sorted(len(os.path.commonprefix([words, choice])) for choice in choices)[:-1]
                for place, left in zip(ruled_out, range(len(choices), 1, -1), strict=True):
                    floor[token_of[begin + start + place]] += math.log(left / (left - 1))
        begin += len(text) + len(END)
    return slots, floor


# ---- Labels ----------------------------------------------------------------------------------------------------------
def dialogue(story):
    """The share of a story's characters that stand inside quotation marks, in [0, 1]."""
    return sum(map(len, re.findall('"[^"]*"|“[^”]*”', story))) / len(story)


# What --label can compute: add your own function, from a story to a number. A model that is told nothing reads 0.
LABELS = {"dialogue": dialogue}


def read_label(story):
    """The text of a story, and the numbers of its label line, if it has one. Raises ValueError."""
    if not story.startswith(CONTROL):
        return story, []
    line, _, text = story.partition("\n")
    with contextlib.suppress(ValueError):
        numbers = [float(number) for number in line[len(CONTROL):].split()]
        if numbers and all(abs(number) < 3e38 for number in numbers) and (text := text.strip()):
            return text, numbers
    raise ValueError(f"{line[:40]!r} must be finite numbers after {CONTROL}, then the story on a new line")


# ---- Text in ---------------------------------------------------------------------------------------------------------
def read_blocks(path, seed=None, labelled=False):
    """Yields the bytes of a file in blocks of BLOCK; for "demo", without end, demo stories, on request with labels."""
    rng = random.Random(seed)
    while path == "demo":
        stories = (tell_labelled(rng) if labelled else tell(rng)[0] for _ in range(1000))
        yield "".join(f"{story}\n{END}\n" for story in stories).encode()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_stories(blocks, source, room):
    """Yields (list of stories, bytes used) from blocks of bytes, to the last whole story within `room` bytes.
    Enters the size and sha256 of what it used in the dict `source`. Raises ValueError if it is not UTF-8."""
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
            raise ValueError(f"{source['name']}: not UTF-8 at byte {start + error.start}; save it as UTF-8") from None
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
        one = path == "demo" or os.path.isfile(path)
        if not (found := [path] if one else sorted(Path(path).rglob("*.txt"), key=Path.as_posix)):
            raise ValueError(f"no text in {path}: give text files, folders of .txt files, tinystories or demo")
        files += found
    return files


def download(url, path):
    """Downloads `url` to `path`. Until it is whole it is `path`.part, from where the next call goes on.
    Raises ConnectionError if the server cannot be reached, OSError if the transfer ends early."""
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
    with (response, open(part, "ab" if have else "wb") as file,
          tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar,
          contextlib.suppress(TimeoutError, ConnectionError, http.client.HTTPException)):       # the size tells
        while chunk := response.read(1 << 20):
            file.write(chunk)
            bar.update(len(chunk))
    if (size := part.stat().st_size) != total:
        raise OSError(f"the download stopped at {size:,} of {total:,} bytes; run this again to go on")
    os.replace(part, path)


# ---- Tokens out ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def new_files(paths):
    """New binary files, which get the names `paths`, in this order, once all are on the disk; an empty one is removed.
    The last one vouches for the others, so its predecessor goes first: a power cut leaves them whole, or none to vouch.
    Any error leaves what was there before; one that comes from the disk is an OSError "cannot write PATHS: reason"."""
    try:
        with contextlib.ExitStack() as stack:
            for path in paths:                                  # where a crash left one, or a link leads elsewhere
                Path(f"{path}.tmp").unlink(missing_ok=True)
            files = [stack.enter_context(open(f"{path}.tmp", "x+b")) for path in paths]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        Path(paths[-1]).unlink(missing_ok=True)
        for path in paths:
            os.replace(f"{path}.tmp", path)
            if not os.path.getsize(path):
                os.unlink(path)
    except OSError as error:
        raise OSError(f"cannot write {', '.join(map(str, paths))}: {error.strerror or error}") from None
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.tmp")


def encode(tokenizer, stories, pool):
    """The tokens (uint16) of `stories`, each with its END, made on all cores. A story itself holds no END."""
    step = math.ceil(len(stories) / os.cpu_count()) or 1
    texts = ["".join(story + END for story in stories[i:i + step]) for i in range(0, len(stories), step)]
    tokens = pool.map(lambda text: tokenizer.encode_to_numpy(text, allowed_special={END}), texts)
    return np.concatenate([np.zeros(0, np.uint32), *tokens]).astype("<u2")


def write_tokens(files, name, seen, inputs, val_fraction, seed, max_mb, labelled=False, label=None):
    """Writes the tokens of `inputs` (files or "demo") to files[0] and files[1], the stories' labels, if they have any,
    to files[2] and files[3], the metadata to files[4]; returns them. `name`: the tokenizer; `seen`: keep what occurs of
    GPT-2's tokens; `val_fraction`: share of the stories; `max_mb`: 10^6 bytes of text, or None; `labelled`: the demo
    stories are; `label`: which of LABELS to compute instead. Raises ValueError for unusable text."""
    tokenizer, bins, label_files, meta_file = tokenizer_of({"tokenizer": name}), files[:2], files[2:4], files[4]
    sources, stories_in, occurs, n_control = [], [0, 0], np.zeros(1 << 16, bool), None
    sizes = [1e6 * (max_mb or DEMO_MB) if path == "demo" else os.path.getsize(path) for path in inputs]
    room = min(sum(sizes), 1e6 * (max_mb or math.inf))
    rng = random.Random(seed + 1)                               # not the one that tells the demo stories
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=room, unit="B", unit_scale=True, disable=None) as bar:
        for path, size in zip(inputs, sizes, strict=True):
            if not room:
                break
            sources.append({"name": str(path)})
            before = sum(stories_in)
            for stories, used in read_stories(read_blocks(path, seed, labelled), sources[-1], min(room, size)):
                sides, numbers = ([], []), ([], [])             # to train on, to validate on
                for number, story in enumerate(stories, sum(stories_in)):
                    try:
                        story, control = read_label(story)
                        control = [LABELS[label](story)] if label else control
                        n_control = len(control) if n_control is None else n_control
                        if len(control) != n_control:
                            raise ValueError(f"a label of {len(control)} numbers, of {n_control} in the first story")
                    except ValueError as error:
                        raise ValueError(f"{path}: story {number - before + 1}: {error}") from None
                    # One draw per story: the split depends on the seed and the story's number, on nothing else. The
                    # first two stories go one to each side, so that neither is ever empty.
                    drawn = rng.random() < val_fraction
                    side = drawn if number > 1 else number
                    sides[side].append(story)
                    numbers[side].append(control)
                for side, file in enumerate(bins):
                    label_files[side].write(np.array(numbers[side], "<f4").tobytes())
                    tokens = encode(tokenizer, sides[side], pool)
                    stories_in[side] += len(sides[side])
                    occurs[tokens] = True
                    file.write(tokens.tobytes())
                bar.update(used)
            room = max(0, room - size)                          # a source cut short is the last one
    if sum(stories_in) < 2:
        raise ValueError(f"{' '.join(map(str, inputs))}: fewer than two stories, too few to train and test; "
                         f"separate stories by {END}" + " or raise --max_mb" * bool(max_mb))
    tokens_in = [file.tell() // 2 for file in bins]
    vocabulary = keep(np.flatnonzero(occurs)) if seen else grammar_words() if name == "words" else None
    if seen:
        new_id = np.zeros(1 << 16, "<u2")
        new_id[vocabulary] = range(len(vocabulary))
        for file in bins:
            file.seek(0)
            for block in read_blocks(file.name):                # it reads ahead of what is overwritten
                file.write(new_id[np.frombuffer(block, "<u2")].tobytes())
    digests = [file.seek(0) or hashlib.file_digest(file, "sha256").hexdigest() for file in (*bins, *label_files)]
    counts = zip(("train_stories", "val_stories", "train_tokens", "val_tokens", "train_sha256", "val_sha256",
                  "train_control_sha256", "val_control_sha256"), stories_in + tokens_in + digests, strict=True)
    meta = {"tokenizer": name, "vocab_size": len(vocabulary) if seen else tokenizer.n_vocab, **dict(counts),
            "sources": sources, "val_fraction": val_fraction, "seed": seed}
    if n_control:                                               # the controls' names
        meta["controls"] = [label] if label else CONTROLS if labelled else [str(i + 1) for i in range(n_control)]
    if inputs == ["demo"] and not label:                        # an END costs no nats, but counts as a token
        known = frozenset((control, 1) for control in meta.get("controls", ()))     # for -1 it is the same
        meta["entropy_nats_per_story"] = entropy(drawn=known)
        meta["entropy_nats_per_token"] = entropy(drawn=known) * sum(stories_in) / sum(tokens_in)
    if vocabulary:
        meta["vocabulary"] = vocabulary                         # a long list, so at the end
    meta_file.write((json.dumps(meta, indent=1) + "\n").encode())
    return meta


# ---- Tokens back -----------------------------------------------------------------------------------------------------
def read_meta(folder):
    """The metadata in `folder`, a dict. Raises ValueError in one line where there are none or they are damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ValueError(f"no data in {folder}: run prepare.py first, or name its folder with --data")
    with contextlib.suppress(ValueError, RecursionError):
        if is_sound(meta := json.loads(path.read_text(encoding="utf-8"))):
            return meta
    raise ValueError(f"{path} is damaged: run prepare.py again")


def is_sound(meta):
    """Whether metadata, out of meta.json or a checkpoint, are such as write_tokens makes, so that they can be used."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, RuntimeError):  # the last two: there may be tensors
        name, size, words = {**meta}["tokenizer"], meta["vocab_size"], meta.get("vocabulary")
        nats, kinds = [meta.get(f"entropy_nats_per_{unit}") for unit in ("story", "token")], {*map(type, words or ())}
        return type(size) is int and 1 <= size <= 1 << 16 and (
            words is None and size == {"gpt2": GPT2, "bytes": 257}[name]
            or name == "words" and kinds == {str} and size - 257 == len(words) == len({w for w in words if len(w) > 1})
            or name == "gpt2" and kinds == {int} and words == sorted({*words, *range(256)})
            and size == len(words) > words[0] == 0 and words[-1] < GPT2
        ) and (nats == [None, None] or all(type(x) is float and math.isfinite(x) for x in nats)
               ) and {*map(type, meta.get("controls", [""]))} == {str}


def read_tokens(folder, split, meta):
    """The tokens of `split`, "train" or "val": uint16, memory-mapped. Raises ValueError if they do not fit `meta`."""
    path = Path(folder) / f"{split}.bin"
    with open(path, "rb") as file:                              # takes about a second per GB
        found = path.stat().st_size / 2, hashlib.file_digest(file, "sha256").hexdigest()
    if found != (meta.get(f"{split}_tokens"), meta.get(f"{split}_sha256")):
        raise ValueError(f"{path} is not the file that its meta.json describes: run prepare.py again")
    tokens = np.memmap(path, "<u2", "r")
    if (largest := tokens.max(initial=0)) >= meta["vocab_size"]:
        raise ValueError(f"{path} holds token id {largest}, beyond the vocabulary of {meta['vocab_size']}: "
                         "run prepare.py again")
    return tokens


def read_labels(folder, split, meta, tokens):
    """The labels of the stories of `split`, whose tokens these are; None where they have none. -> (stories, n_control)
    float32, memory-mapped, and (stories,) where each one's END is. Raises ValueError if they do not fit `meta`."""
    if not (n_control := len(meta.get("controls", ()))):
        return None
    path = Path(folder) / f"{split}.control.bin"
    if not path.is_file():
        raise ValueError(f"no {path}: run prepare.py again")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != meta.get(f"{split}_control_sha256"):
            raise ValueError(f"{path} is not the file that its meta.json describes: run prepare.py again")
    return np.memmap(path, "<f4", "r").reshape(-1, n_control), np.flatnonzero(tokens == meta["vocab_size"] - 1)


def rows_of(tokens, block_size, aligned=False):
    """The rows to train on: (N, 2) int64, where in `tokens` its inputs begin and how many targets it has.
    Contiguous rows are windows of block_size targets; a rest that fills none is left out. An aligned row is a story: it
    begins with the END before it (before the file's first at index -1, its last token, an END, too) and ends with its
    own; a story that is too long is cut into rows of its own. So each token is a target once."""
    if not aligned:
        count = (len(tokens) - 1) // block_size
        return np.stack([np.arange(count) * block_size, np.full(count, block_size)], 1)
    rows, start = [], -1
    for stop in np.flatnonzero(tokens == tokens[-1]).tolist():
        rows += [(i, min(block_size, stop - i)) for i in range(start, stop, block_size)]
        start = stop
    return np.array(rows)


def windows(tokens, rows, end=None):
    """Inputs and targets of `rows` (B, 2), see rows_of: (B, T) int64 each, with T the largest number of targets.
    A shorter row is padded: inputs with `end` (default: the last token, which is END), targets with -1, which carries
    no loss. `tokens` may be any array beside the tokens, as label_slots returns: its floats stay floats."""
    start, count = rows[:, :1], rows[:, 1:]
    steps = np.arange(count.max())
    x, y = (tokens[(start + steps + i) % len(tokens)].astype(np.result_type(tokens, np.int64)) for i in (0, 1))
    padding = steps >= count
    x[padding], y[padding] = tokens[-1] if end is None else end, -1
    return x, y


def control_windows(labels, rows):
    """What the labels tell the controller at each input of `rows`, see windows: (B, T, n_control) float32; None: None.
    An END is the first input of the story after it."""
    if labels is None:
        return None
    (controls, ends), place = labels, rows[:, :1] + np.arange(rows[:, 1].max())
    return controls[np.searchsorted(ends, place, "right").clip(max=len(controls) - 1)]


# ---- The command line ------------------------------------------------------------------------------------------------
def fail(error):
    """Says in one line on standard error what is wrong. Returns the exit status of bad input."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = f"{Path(sys.argv[0]).name}: {str(error) or 'not enough memory'}".splitlines()[0]
    with contextlib.suppress(OSError):                          # where nobody listens, the status tells
        print(line.translate(PICTURES) if sys.stderr.isatty() else line, file=sys.stderr)
    return 2


def command(main):
    """Makes a function a script's main, which returns the exit status: an error is one line there, no traceback."""
    def run():
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in ("stdin", "stdout", "stderr"):              # closed, as by >&-: no file shall get its number
            setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))
        sys.stdout.reconfigure(errors="replace")                # a Windows code page may lack a character
        if sys.stdout.isatty():
            sys.stdout.write = lambda text, write=sys.stdout.write: write(text.translate(PICTURES))
        try:
            status = main() or 0
        except (ValueError, OSError, FloatingPointError, OverflowError, MemoryError, RuntimeError) as error:
            if type(error) is RuntimeError and not re.search("memory|[Cc]onnection", str(error)):
                raise                                           # it did not come from outside
            status = fail(error)
        except (KeyboardInterrupt, SystemExit) as stop:
            status = getattr(stop, "code", 130)
        try:
            sys.stdout.flush()
        except OSError as error:                                # nobody reads; at its end Python would try once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = status or fail(error)
        signal.signal(signal.SIGINT, before)
        return status
    return run


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [INPUT ...] [flags]",
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(fail(message))
    add = parser.add_argument_group("text and tokens").add_argument
    add("inputs", nargs="*", metavar="INPUT",
        help=f"UTF-8 text files (stories separated by {END}; each may begin with a line '{CONTROL} 1 0.5', its label: "
             "numbers for the controller to read, as many in every story), folders (every *.txt below), tinystories "
             "(downloads TinyStoriesV2-GPT4, 2.2 GB, into the output folder) or demo (stories from a built-in "
             "grammar); default: training_data if it holds any .txt, else tinystories, and demo where there is no "
             "network")
    add("--out", type=Path, default=Path("data"), help="output folder (default: %(default)s)")
    add("--tokenizer", help="gpt2, bytes, or words: the demo stories', else bytes (default: gpt2, but words for demo)")
    add("--vocab", choices=("full", "seen"), default="full",
        help="full, or of GPT-2's tokens only those seen in the text and their parts (default: %(default)s)")
    add("--max_mb", type=float,
        help=f"MB (10^6 bytes) of text to use, to the last whole story (default: all; for demo {DEMO_MB})")
    add("--val_fraction", type=float, default=0.05, help="share of the stories to validate on (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the split and of demo (default: %(default)s)")
    add = parser.add_argument_group("labels, for the controller to read").add_argument
    add("--labels", action="store_true",
        help="label the demo stories: they end with a hug (1) or with words (-1), begin long (1) or short (-1)")
    add("--label", choices=LABELS,
        help="label each story with what a function says of its text: dialogue, its share inside quotation marks, 0 to "
             "1; or your own, see LABELS in prepare.py")
    args = parser.parse_args()
    try:
        if not 0 < args.val_fraction < 1:
            raise ValueError(f"--val_fraction is {args.val_fraction}, but must lie between 0 and 1")
        if args.max_mb is not None and not 0 < args.max_mb < math.inf:
            raise ValueError(f"--max_mb is {args.max_mb}, but must be above 0")
        if args.labels and "demo" not in args.inputs:
            raise ValueError("--labels is for demo: leave it out, or begin each story with a label line")
        asked = args.inputs or ["training_data"] * any(Path("training_data").rglob("*.txt"))
        inputs = asked or ["tinystories"]
        name = ("words" if inputs == ["demo"] else "gpt2") if args.tokenizer is None else args.tokenizer
        try:
            # The vocabulary comes first: where it is missing, nobody should wait for 2.2 GB to find that out.
            tokenizer_of({"tokenizer": name})
            if args.vocab == "seen" and name != "gpt2":
                raise ValueError(f"--vocab seen is for --tokenizer gpt2; {name} has few tokens: leave it out")
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
            inputs, name = ["demo"], args.tokenizer or "words"
        seen, inputs = args.vocab == "seen" and name == "gpt2", find_files(inputs)
        args.out.mkdir(parents=True, exist_ok=True)
        # meta.json comes last: it vouches for the others.
        names = "train.bin", "val.bin", "train.control.bin", "val.control.bin", "meta.json"
        with new_files([args.out / file for file in names]) as files:
            meta = write_tokens(files, name, seen, inputs, args.val_fraction, args.seed, args.max_mb, args.labels,
                                args.label)
    except KeyboardInterrupt:
        fail("interrupted, nothing was changed")
        return 130
    controls = meta.get("controls", ())
    print(f"{args.out}: {meta['train_stories']:,} stories ({meta['train_tokens']:,} tokens) to train on and "
          f"{meta['val_stories']:,} ({meta['val_tokens']:,}) to validate on; tokenizer {meta['tokenizer']}, "
          f"{meta['vocab_size']:,} symbols" + (f"; controls: {', '.join(controls)}" if controls else ""))
    if "entropy_nats_per_token" in meta:
        print(f"The best possible loss on these stories is {meta['entropy_nats_per_token']:.4f} nats per token"
              + " to one who knows the labels" * bool(controls) + ".")


if __name__ == "__main__":
    sys.exit(main())
