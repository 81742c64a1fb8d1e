"""The whole test suite: pytest -q. Needs no network, no GPU, and nothing outside this folder."""

import collections
import ctypes
import functools
import hashlib
import http.server
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import analyze
import kernels
import ncn
import prepare
import sample as sampling
import train as training
from ncn import SIGNALS, ModulatedLM, NCNConfig, salience_pool, salience_step
from prepare import END, get_tokenizer

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # cuda: a test that needs a GPU
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
TINY = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, ncn_hidden=8, ncn_heads=2)


@pytest.fixture(autouse=True)
def exact_products():
    """train.py lets a GPU round its products; what is compared here must not depend on which test ran before."""
    torch.set_float32_matmul_precision("highest")


def lively(seed=0, **config):
    """A tiny model in float32 whose every weight, the controller's too, is far from where it starts."""
    torch.manual_seed(seed)
    model = ModulatedLM(NCNConfig(**{**TINY, **config})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape, seed=0, vocab_size=61):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The model


def by_the_paper(model, ids):
    """The model's logits, signals and homeostatic loss, written out again from SPEC in float64, with full masks."""
    c, p = model.config, {k: v.double() for k, v in model.state_dict().items()}
    B, T = ids.shape
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def norm(x, w):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w

    def heads(x, n):
        return x.view(B, -1, n, c.n_embd // n).transpose(1, 2)

    def attention(q, k, v, n, mask):
        scores = heads(q, n) @ heads(k, n).transpose(-1, -2) / math.sqrt(c.n_embd // n)
        return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ heads(v, n)).transpose(1, 2).reshape(B, -1, c.n_embd)

    x = p["embed.weight"][ids] + p["position.weight"][:T]
    s, homeostatic = torch.ones(B, T, c.n_layer, 3, dtype=torch.float64), 0.0
    if c.signals:
        w, b = p["controller.in_proj.weight"].chunk(3), p["controller.in_proj.bias"].chunk(3)
        query = p["controller.query"].expand(B, T, -1)
        mask = {"causal": causal, "global": causal | True, "reactive": torch.eye(T, dtype=torch.bool)}[c.salience]
        context = attention(query @ w[0].T + b[0], x @ w[1].T + b[1], x @ w[2].T + b[2], c.ncn_heads, mask)
        context = context @ p["controller.out_proj.weight"].T + p["controller.out_proj.bias"]
        u = norm(context + x, p["controller.norm.weight"])
        hidden = torch.tanh(u @ p["controller.layer1.weight"].T + p["controller.layer1.bias"])
        z = (hidden @ p["controller.layer2.weight"].T + p["controller.layer2.bias"]).view(B, T, c.n_layer, 3)
        every = (2 * z[..., 0].sigmoid(), (F.softplus(z[..., 1]) + 0.01).clamp(max=4), z[..., 2].sigmoid())
        s = torch.stack([every[i] if name in c.signals else torch.ones_like(every[i]) for i, name in enumerate(SIGNALS)], -1)
        homeostatic = c.homeostatic_lambda * sum((s[..., i] - 1).square().mean() for i in range(3))
    for i in range(c.n_layer):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        gain, precision, gate = s[:, :, i].split(1, dim=-1)
        q, k, v = (norm(x, w["attn_norm.weight"]) @ w["qkv.weight"].T).chunk(3, -1)
        x = x + gain * (attention(q * precision, k, v, c.n_head, causal) @ w["attn_out.weight"].T)
        inner = F.gelu(norm(x, w["ffn_norm.weight"]) @ w["ffn_in.weight"].T + w["ffn_in.bias"])
        x = x + gain * gate * (inner @ w["ffn_out.weight"].T + w["ffn_out.bias"])
    return norm(x, p["norm.weight"]) @ p["embed.weight"].T, s, homeostatic


@pytest.mark.parametrize("salience", ncn.SALIENCE)
@pytest.mark.parametrize("signals", [SIGNALS, ("gain",), ("precision", "gate"), ()])
def test_model_is_the_papers(salience, signals):
    for seed, shape in enumerate([(1, 1), (3, 16), (2, 7)]):
        model = lively(seed, salience=salience, signals=signals)
        ids, targets = tokens(*shape, seed=seed), tokens(*shape, seed=seed + 9)
        logits, s, homeostatic = by_the_paper(model, ids)
        torch.testing.assert_close(model(ids).double(), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.signals(ids).double(), s, atol=1e-5, rtol=1e-5)
        loss = model(ids, targets)
        torch.testing.assert_close(loss.task.double(), F.cross_entropy(logits.flatten(0, 1), targets.flatten()), atol=1e-5, rtol=1e-5)
        assert abs(loss.homeostatic.item() - homeostatic) < 1e-6
        assert loss.total.item() == pytest.approx((loss.task + loss.homeostatic).item())


def test_precision_is_clamped_at_4():
    model = lively()
    with torch.no_grad():
        model.controller.layer2.bias.fill_(50.0)
    assert model.signals(tokens(1, 4))[..., 1].unique().tolist() == [4.0]


@pytest.mark.parametrize("salience", ["global", "reactive"])
def test_golden_outputs_of_the_authors(salience):
    path = SHARED / "golden" / "reference_tiny.npz"
    if not path.exists():
        pytest.skip("the authors' outputs are not here")
    golden = np.load(path)
    state = {k.removeprefix("state/"): torch.from_numpy(golden[k]) for k in golden if k.startswith("state/")}
    model = ModulatedLM.from_reference(state, n_head=4, ncn_heads=2, salience=salience)
    ids = torch.from_numpy(golden["input_ids"])
    torch.testing.assert_close(model(ids), torch.from_numpy(golden[f"{salience}/logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.signals(ids), torch.from_numpy(golden[f"{salience}/signals"]), atol=1e-4, rtol=0)
    if salience == "global":
        assert abs(model(ids, ids).homeostatic.item() - golden["global/reg_loss"]) < 1e-4


def as_the_authors_name_it(model):
    """Our state dict under the authors' names: from_reference must bring it back."""
    ours, theirs = model.state_dict(), {}
    names = {"embed.weight": "token_embeddings.weight", "position.weight": "position_embeddings.weight",
             "norm.weight": "final_norm.weight", "controller.query": "ncn.control_query",
             "controller.in_proj.": "ncn.pooling_attn.in_proj_", "controller.out_proj.": "ncn.pooling_attn.out_proj.",
             "controller.norm.": "ncn.ncn_norm.", "controller.layer": "ncn.layer", "blocks.": "transformer_layers.",
             "attn_norm": "norm1", "ffn_norm": "norm2", "attn_out": "self_attn.out_proj", "ffn_in": "feed_forward.linear1",
             "ffn_out": "feed_forward.linear2"}
    for name, value in ours.items():
        for old, new in names.items():
            name = name.replace(old, new) if name.startswith(old) or name.startswith("transformer") else name
        if ".qkv." in name:
            for x, part in zip("qkv", value.chunk(3)):
                theirs[name.replace("qkv", f"self_attn.{x}_proj")] = part
        else:
            theirs[name] = value.view(1, 1, -1) if name == "ncn.control_query" else value
    return theirs | {"output_head.weight": ours["embed.weight"]}


def test_from_reference_and_load(tmp_path):
    model = lively(salience="global")
    theirs = as_the_authors_name_it(model)
    ids = tokens(2, 9)
    again = ModulatedLM.from_reference(theirs, n_head=2, ncn_heads=2)
    assert torch.equal(again(ids), model(ids)) and again.config == NCNConfig(**{**TINY, "dropout": 0.1, "salience": "global"})
    torch.save({"model_state_dict": theirs, "config": {"nhead": 2, "ncn_heads": 2}}, tmp_path / "theirs.pt")
    assert torch.equal(ModulatedLM.load(tmp_path / "theirs.pt")(ids), model(ids))
    model.save(tmp_path / "ours.pt")
    loaded = ModulatedLM.load(tmp_path / "ours.pt")
    assert torch.equal(loaded(ids), model(ids)) and loaded.config == model.config and not loaded.training


def test_sizes_and_neutral_start():
    model = ModulatedLM(NCNConfig())
    assert sum(p.numel() for p in model.parameters()) == 18_007_762
    assert sum(p.numel() for p in model.controller.parameters()) == 281_298
    ids = tokens(2, 64, vocab_size=50257)
    model.eval()
    loss = model(ids, ids)
    assert 1.5e-5 < loss.homeostatic.item() < 1e-4 and 10.3 < model(ids, ids.flip(0)).task.item() < 11.5
    start = torch.tensor([1.0, math.log1p(math.exp(0.525)) + 0.01, 1 / (1 + math.exp(-3))])
    assert (model.signals(ids) - start).abs().max() < 0.02  # the last initialisation did not undo the first
    model.controller.zero_grad()
    loss.total.backward()
    assert all(p.grad.abs().max() > 0 for p in model.controller.layer1.parameters())  # nothing is stuck


def test_neutral_signals_are_the_plain_transformer():
    model, ids = lively(), tokens(2, 12)
    plain = ModulatedLM(NCNConfig(**TINY, signals=())).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("controller")})
    torch.testing.assert_close(model(ids, edit=torch.ones_like), plain(ids), atol=1e-5, rtol=1e-5)
    assert (model(ids) - plain(ids)).abs().max() > 0.1
    assert plain(ids, ids).homeostatic == 0 and torch.equal(plain.signals(ids), torch.ones(2, 12, 2, 3))


@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_only_global_salience_sees_the_future(salience):
    model, ids = lively(salience=salience), tokens(2, 16)
    # Trained for a while: what must not depend on the future after initialisation must not after learning either.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        model(tokens(4, 15, seed=step), tokens(4, 16, seed=step)[:, 1:]).total.backward()
        optimizer.step()
    before = model(ids)
    for t in (1, 8, 15):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 7) % 61
        difference = (model(changed) - before)[:, :t].abs().max().item()
        assert difference > 1e-3 if salience == "global" else difference <= 1e-6
        assert (model(changed) - before)[:, t:].abs().max() > 1e-2


@pytest.mark.parametrize("bad", [dict(n_head=3), dict(ncn_heads=5), dict(signals=("gain", "dopamine")), dict(salience="psychic"),
                                 dict(n_layer=0), dict(dropout=1.0), dict(block_size=1), dict(homeostatic_lambda=-1.0)])
def test_config_refuses(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)) if "signals" not in bad else "signal")):
        NCNConfig(**{**TINY, **bad})


# ----------------------------------------------------------------------------------------------------------------------
# Salience


def pool_by_softmax(scores, values):
    mask = torch.ones(scores.size(-1), scores.size(-1), dtype=torch.bool).triu(1)
    return scores.double()[..., None, :].expand(*scores.shape, -1).masked_fill(mask, -math.inf).softmax(-1) @ values.double()


def scores_like(kind, shape, seed):
    g = torch.Generator().manual_seed(seed)
    T = shape[-1]
    ramp = torch.linspace(-1e4, 1e4, T) if T > 1 else torch.zeros(1)
    return {"normal": torch.randn(shape, generator=g), "wild": 1e4 * torch.randn(shape, generator=g),
            "rising": ramp.expand(shape), "falling": ramp.flip(0).expand(shape), "equal": torch.full(shape, -1e4),
            "spike": torch.full(shape, -1e4).index_fill(-1, torch.tensor([T // 3]), 1e4),
            "staircase": (torch.arange(T) // 5 * 30.0).expand(shape)}[kind].clone()


@pytest.mark.parametrize("kind", ["normal", "wild", "rising", "falling", "equal", "spike", "staircase"])
def test_salience_pool_is_a_causal_softmax(kind):
    for seed, (B, h, T, e) in enumerate([(2, 2, 1, 4), (1, 3, 31, 5), (2, 1, 32, 1), (2, 2, 33, 8), (1, 2, 200, 16)]):
        values = torch.randn(B, h, T, e, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        scores = scores_like(kind, (B, h, T), seed).requires_grad_()
        pooled, _ = salience_pool(scores, values)
        expected = pool_by_softmax(scores, values)
        torch.testing.assert_close(pooled.double(), expected, atol=2e-6, rtol=1e-5)
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(seed + 1))
        got = torch.autograd.grad((pooled * weight).sum(), (scores, values))
        want = torch.autograd.grad((expected * weight).sum(), (scores, values))
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["normal", "wild", "rising", "falling", "spike"])
def test_salience_cache_continues_the_pool(kind):
    """Pooling a prefix and stepping through the rest is pooling it all; the state never grows."""
    values, scores = torch.randn(2, 2, 90, 8), scores_like(kind, (2, 2, 90), 3)
    for prefix in (1, 32, 50):
        pooled, state = salience_pool(scores[:, :, :prefix], values[:, :, :prefix])
        state = [x.clone() for x in state]
        shapes = [tuple(x.shape) for x in state]
        steps = [salience_step(scores[:, :, t], values[:, :, t], state) for t in range(prefix, 90)]
        assert [tuple(x.shape) for x in state] == shapes == [(2, 2), (2, 2), (2, 2, 8)]
        torch.testing.assert_close(torch.cat([pooled, torch.stack(steps, 2)], 2).double(), pool_by_softmax(scores, values),
                                   atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("salience", ncn.SALIENCE)
def test_mixed_precision_is_close(dtype, salience):
    model, ids = lively(salience=salience), tokens(2, 16)
    exact = model(ids, ids)
    with torch.autocast("cpu", dtype):
        loss = model(ids, ids)
        signals = model.signals(ids)
    loss.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert signals.dtype == loss.total.dtype == torch.float32
    assert abs(loss.task.item() - exact.task.item()) < 0.05 * exact.task.item()


# ----------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("salience", ["causal", "reactive"])
@pytest.mark.parametrize("trained_as", ["causal", "global"])
def test_cached_generation_is_the_full_pass(salience, trained_as):
    """Token for token, over several refills of the window, from short prompts and from ones longer than the window."""
    seen = set()
    for block_size, prompt in ((16, tokens(3, 1)), (16, tokens(1, 1).expand(3, -1)), (16, tokens(2, 5)), (16, tokens(1, 16)), (16, tokens(1, 40)), (2, tokens(2, 1)), (3, tokens(1, 7))):
        model = lively(salience=trained_as, block_size=block_size)
        text = prompt
        for _ in range(60):
            logits = model(text[:, model.window_start(text.size(1)):], salience=salience)[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(model.generate(prompt, 60, temperature=0, salience=salience), text)
        seen |= set(text[:, prompt.size(1):].flatten().tolist())
    assert len(seen) > 8  # not stuck on one token, where any cache would look right


@pytest.mark.parametrize("gpu, parts", [(True, 1), (False, 2), (False, 3)])
@pytest.mark.parametrize("config", [dict(), dict(signals=()), dict(signals=("precision",)), dict(salience="reactive")])
@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_is_the_model(gpu, parts, config, batch, monkeypatch):
    """A step at a time against the full pass; gpu: as a GPU decodes, over all slots, the unwritten ones masked."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)  # weights that do not divide evenly, too
    model, ids = lively(**config), tokens(batch, 16)
    decoder, double = ncn.Decoder(model, batch, gpu), lambda signals: 2 * signals
    for edit in (None, double):
        decoder.cache.fill_(9e3)  # what was never written must not count
        with torch.no_grad():
            full = model(ids, edit=edit)
            decoder.advance(-decoder.length)
            for t in range(5, 17):
                new = ids[:, :5] if t == 5 else ids[:, t - 1 : t]
                torch.testing.assert_close(decoder(new, model.config.salience, edit), full[:, t - 1], atol=2e-5, rtol=1e-5)


def test_window_keeps_its_last_half():
    for block_size in (2, 7, 16):
        model = lively(block_size=block_size)
        starts = [model.window_start(n) for n in range(1, 100)]
        for n, start in enumerate(starts, 1):
            assert (start == 0) if n <= block_size else (block_size // 2 < n - start <= block_size)
        assert starts == sorted(starts)


def test_rows_end_on_their_own_and_batches_draw_the_same():
    model, prompt = lively(), tokens(1, 4).expand(6, -1)
    alone = [model.generate(prompt[:1], 40, temperature=3.0, seed=seed) for seed in range(5, 11)]
    together = model.generate(prompt, 40, temperature=3.0, seed=5)
    assert torch.equal(torch.cat(alone), together) and len(together.unique(dim=0)) == 6
    end = int(together[2, 10])
    ended = model.generate(prompt, 40, temperature=3.0, seed=5, end_token=end)
    for row, full in zip(ended, together):
        new = full[4:].tolist()
        length = new.index(end) if end in new else 40
        assert row[4:].tolist() == (new[:length] + [end] * 40)[: ended.size(1) - 4]
    assert model.generate(prompt[2:3], 40, temperature=3.0, seed=7, end_token=end).size(1) <= 11


def test_samples_of_one_prompt_share_its_pass(monkeypatch):
    """The prompt goes through the model once; rows with prompts of their own are passed each."""
    model, passes, call = lively(), [], ncn.Decoder.__call__
    monkeypatch.setattr(ncn.Decoder, "__call__", lambda self, ids, *more: passes.append(tuple(ids.shape)) or call(self, ids, *more))
    prompt = tokens(1, 9)
    shared = model.generate(prompt.expand(4, -1), 30, temperature=2.0, seed=1)
    assert passes[0] == (1, 9) and set(passes[1:]) == {(4, 1), (4, 9)}  # (4, 9): what a full window keeps
    passes.clear()
    mixed = model.generate(torch.cat([prompt, prompt, tokens(1, 9, seed=5)]), 30, temperature=2.0, seed=1)
    assert passes[0] == (3, 9) and torch.equal(mixed[:2], shared[:2])


def test_a_seed_is_a_text_whatever_its_length():
    model, prompt = lively(), tokens(2, 4)
    long = model.generate(prompt, 50, temperature=3.0, seed=5)
    for n in (0, 1, 17, 49):
        assert torch.equal(model.generate(prompt, n, temperature=3.0, seed=5), long[:, : 4 + n])


def test_generation_leaves_the_model_as_it_was():
    model = lively(dropout=0.5).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    text = model.generate(tokens(1, 4), 20, temperature=0)
    assert model.training and torch.equal(text, model.eval().generate(tokens(1, 4), 20, temperature=0))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory from /proc")
def test_generation_needs_no_more_memory_as_it_goes_on():
    model, resident = lively(), []
    for n, _ in enumerate(model.stream(tokens(1, 4), 6000, seed=0)):
        if n % 1000 == 999:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert len(resident) == 6 and resident[-1] - resident[0] < 1e6, resident


def test_sample_draws_the_stated_distribution(monkeypatch):
    """With evenly spread chances, each token comes as often as its probability says."""
    logits, n = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2, 20_000
    chance = (torch.arange(n) + 0.5) / n
    for temperature, top_k, top_p in [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6), (0.8, 7, 0.9), (1e-30, 0, 1.0),
                                      (1.0, 0, 1e-9), (1.0, 99, 1.0)]:
        p = ((logits - logits.max()).double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        if top_k:
            p[order[top_k:]] = 0
            p /= p.sum()
        p[order[1:][p[order].cumsum(0)[:-1] >= top_p]] = 0
        p /= p.sum()
        drawn = ncn.sample(logits.expand(n, -1), chance, temperature, top_k, top_p)
        assert (drawn.bincount(minlength=40) / n - p).abs().max() < 2e-4
    assert (ncn.sample(logits.expand(n, -1), chance, 0, 50, 1.0) == logits.argmax()).all()
    edge = torch.tensor([[0.0, 0.0, -1e30]])
    assert ncn.sample(edge, torch.tensor([1 - 2**-24]), 1.0, 0, 1.0).item() in (0, 1)  # never a token without probability
    quarters = ncn.sample(torch.zeros(4, 4), torch.tensor([0.0, 0.25, 0.5, 0.75]), 1.0, 0, 1.0)
    assert sorted(quarters.tolist()) == [0, 1, 2, 3]  # each from its lower end on
    many = torch.randn(5000, 40) * torch.linspace(0, 9, 5000)[:, None]
    for top_p in (0.05, 0.5, 0.9):  # the highest chance finds no token that top_p cuts off
        p = many.softmax(-1).sort(-1, descending=True).values
        drawn = ncn.sample(many, torch.full((5000,), 1 - 2**-24), 1.0, 0, top_p)
        lowest = p.gather(1, ((p.cumsum(-1) - p < top_p).sum(-1, keepdim=True) - 1))
        assert (many.softmax(-1).gather(1, drawn[:, None]) >= lowest * 0.999).all()
    cumsum = torch.Tensor.cumsum  # a GPU's is not sequential, so its last digits may rise where nothing was added
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim: cumsum(p, dim) + 1e-3 * torch.arange(p.size(dim)))
    for top_p in (0.5, 1.0):
        assert ncn.sample(torch.tensor([[9.0, -1e30, -1e30]]), torch.tensor([1 - 2**-24]), 1.0, 0, top_p).item() == 0


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=math.nan), dict(top_p=0.0), dict(top_p=1.1),
                                 dict(top_k=-1), dict(max_new_tokens=-1), dict(salience="global"), dict(ids=tokens(1, 0)),
                                 dict(ids=torch.tensor([[61]])), dict(ids=torch.tensor([[-1]]))])
def test_generation_refuses(bad):
    with pytest.raises(ValueError):
        lively().generate(**{**dict(ids=tokens(1, 3), max_new_tokens=2), **bad})


def test_doses_move_the_signals_they_name():
    """Precision 0.25 broadens every layer's attention and 4 narrows it; gain 0 silences every layer."""
    model, ids = lively(), tokens(4, 16)
    inputs = {}
    for i, block in enumerate(model.blocks):
        block.qkv.register_forward_hook(lambda m, x, y, i=i: inputs.__setitem__(i, y))
    entropies = {}
    for dose in (0.25, 1.0, 4.0):
        edit = lambda s: s * torch.tensor([1.0, dose, 1.0])
        model(ids, edit=edit)
        s = edit(model.signals(ids))
        for i in range(2):
            q, k, _ = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in inputs[i].chunk(3, -1))
            scores = (q * s[:, None, :, i, 1:2]) @ k.transpose(-1, -2) / 4
            p = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
            entropies[i, dose] = torch.special.entr(p).sum(-1).mean().item()
    for i in range(2):
        assert entropies[i, 0.25] > entropies[i, 1.0] + 0.05 and entropies[i, 1.0] > entropies[i, 4.0] + 0.05
    silent = model(ids, edit=lambda s: s * torch.tensor([0.0, 1.0, 1.0]))
    x = model.norm(model.embeddings(ids))
    torch.testing.assert_close(silent, x @ model.embed.weight.T)


# ----------------------------------------------------------------------------------------------------------------------
# Training

SMALL = ["--block_size", "32", "--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--ncn_hidden", "8", "--batch_size", "2",
         "--dropout", "0.1", "--eval_interval", "4", "--log_interval", "2", "--val_sequences", "8", "--warmup_steps", "3",
         "--dtype", "fp32", "--lr", "1e-2"]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[INFO\] Step: (\d+) \| Ep: \d+ \[\d+/\d+ \(\d+\.\d%\)\] \| "
                      r"Loss: (\d+\.\d{4}) \| Reg: (\d\.\d{4}) \| PPL: (\d+\.\d\d) \| LR: \d\.\d\de[-+]\d\d \| Scale: \d+\.0 \| "
                      r"Tok/s: \d+")
VAL_LINE = re.compile(r"\[INFO\] Validation Result: Loss: (\d+\.\d{4}) \| Perplexity: (\d+\.\d{4})")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tokens of a few demo stories, as prepare.py leaves them."""
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, HERE / "prepare.py", "demo", "--max_mb", "0.1", "--out", folder], check=True)
    return str(folder)


def command(script, *args):
    return [sys.executable, str(HERE / script), *map(str, args)]


def run(script, *args, cwd=None, **more):
    return subprocess.run(command(script, *args), cwd=cwd, capture_output=True, text=True, timeout=300, **more)


def train_run(data, out, *args, **more):
    done = run("train.py", "--data", data, "--out", out, *SMALL, *args, **more)
    assert done.returncode == 0, done.stderr
    return torch.load(Path(out) / "ckpt_latest.pt", weights_only=True)


def refusal(module, capsys, monkeypatch, *args):
    """Calls a script's main with arguments that it must refuse: status 2 and one line on standard error, returned."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    try:
        status = module.main()
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith(f"{module.__name__}.py: ") and err.count("\n") == 1, (status, out, err)
    assert "Traceback" not in err
    return err


def same_weights(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["model"].keys() == b["model"].keys()


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """An uninterrupted run of 12 steps: its folder and its last checkpoint."""
    out = tmp_path_factory.mktemp("run")
    return out, train_run(data, out, "--max_steps", 12)


def test_training_writes_the_papers_log(trained, data):
    out, ckpt = trained
    log = (out / "training.log").read_text()
    steps, vals = LOG_LINE.findall(log), VAL_LINE.findall(log)
    assert [int(s[0]) for s in steps] == [1, 2, 4, 6, 8, 10, 12] and len(vals) == 3
    assert float(steps[0][2]) < 1e-4 and float(steps[0][1]) == pytest.approx(math.log(257), abs=0.3)
    for _, loss, _, ppl in steps:
        assert float(ppl) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert float(vals[-1][0]) < float(vals[0][0]) < float(steps[0][1])
    assert log.rstrip().endswith("[INFO] Training Complete.") and "above the stories' entropy" in log
    best = torch.load(out / "ckpt_best.pt", weights_only=True)
    assert best["best"] == ckpt["best"] == pytest.approx(min(float(v[0]) for v in vals), abs=1e-4)
    # What the log says is what the checkpoint does: the validation loss, computed here from the files alone.
    model = ModulatedLM.load(out / "ckpt_latest.pt")
    val = np.fromfile(Path(data) / "val.bin", dtype="<u2").astype(np.int64)
    chosen = np.random.default_rng(0).permutation((len(val) - 1) // 32)[:8]
    rows = torch.from_numpy(np.stack([val[i * 32 : i * 32 + 33] for i in chosen]))
    assert model(rows[:, :-1], rows[:, 1:]).task.item() == pytest.approx(float(vals[-1][0]), abs=1e-4)


def test_every_window_is_read_once_per_epoch():
    tokens = np.arange(1000, dtype="<u2")
    order = training.shuffled(42, 0, 99)
    assert sorted(order) == list(range(99)) and list(order) != list(training.shuffled(42, 1, 99))
    x, y = training.windows(tokens, order, 10, torch.device("cpu"))
    assert torch.equal(x + 1, y) and x.dtype == torch.int64 and sorted(x.flatten().tolist()) == list(range(990))


def test_learning_rate():
    s = dict(lr=6e-4, warmup_steps=100, max_steps=15880)
    assert training.learning_rate(20, s) == pytest.approx(1.2e-4) and training.learning_rate(100, s) == 6e-4
    assert training.learning_rate((15880 + 100) // 2, s) == pytest.approx(3e-4) and training.learning_rate(15880, s) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (getattr(signal, "SIGKILL", 9), -9)])
def test_resume_equals_the_uninterrupted_run(trained, data, tmp_path, number, status):
    if os.name == "nt":
        pytest.skip("POSIX signals")
    process = subprocess.Popen(command("train.py", "--data", data, "--out", tmp_path, *SMALL, "--max_steps", 12, "--log_interval", 1),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "Step: 5 " in line:  # after the checkpoint of step 4, before that of step 8
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    stopped = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert stopped["step"] == 4 if status == -9 else 5 <= stopped["step"] < 12
    done = run("train.py", "--data", data, "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    resumed = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert resumed["step"] == 12 and same_weights(resumed, trained[1])
    for a, b in zip(resumed["optimizer"]["state"].values(), trained[1]["optimizer"]["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert "Moved" not in done.stdout and "Step: 1 " in (tmp_path / "training.log").read_text()


def test_two_processes_equal_one(trained, data, tmp_path):
    """The same micro-batches, the same dropout; only the order of float additions differs."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train.py"),
                           "--data", data, "--out", str(tmp_path), *SMALL, "--max_steps", "12"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two, one = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True), trained[1]
    for name in one["model"]:
        torch.testing.assert_close(two["model"][name], one["model"][name], atol=2e-4, rtol=1e-3)
    logs = [(folder / "training.log").read_text() for folder in (tmp_path, trained[0])]
    assert logs[0].count("Step: ") == logs[1].count("Step: ")  # one process writes
    losses = [[float(v[0]) for v in VAL_LINE.findall(log)] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process in /proc")
def test_a_process_that_dies_ends_the_run(data, tmp_path):
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train.py"),
                            "--data", data, "--out", str(tmp_path), *SMALL, "--max_steps", "100000"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any("Step: 6 " in line for line in run.stdout)  # the checkpoint of step 4 is written
    workers = [int(p) for p in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    second = [p for p in workers if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes()]
    os.kill(second[0], signal.SIGKILL)
    run.communicate(timeout=100)
    assert run.returncode not in (0, None)
    assert torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)["step"] >= 4  # still a whole checkpoint


@pytest.mark.parametrize("flags", [["--signals", "none"], ["--signals", "gain,gate", "--salience", "reactive"],
                                   ["--salience", "global", "--dtype", "bf16"]])
def test_other_models_train_too(data, tmp_path, flags):
    train_run(data, tmp_path, "--max_steps", 4, *flags)
    log = (tmp_path / "training.log").read_text()
    assert len(VAL_LINE.findall(log)) == 1
    assert log.count("sees the future, no likelihood") == ("global" in flags) * 4  # three steps, one validation
    model = ModulatedLM.load(tmp_path / "ckpt_best.pt")
    assert (model.controller is None) == ("none" in flags)
    assert model.generate(tokens(2, 3, vocab_size=257), 40, seed=1).shape == (2, 43)


def test_checkpointed_blocks_compute_the_same():
    """Bit for bit, dropout included, and less is kept."""
    results, kept = [], []
    for blocks in (False, True):
        model, size = lively(dropout=0.3).train(), 0
        model.checkpoint_blocks = blocks

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(tokens(3, 16), tokens(3, 16, seed=1))
        loss.total.backward()
        results.append([loss.total.detach(), *(p.grad for p in model.parameters())])
        kept.append(size)
    assert all(torch.equal(a, b) for a, b in zip(*results)) and kept[1] < kept[0] / 2


def test_gelu_computed_again_changes_nothing():
    block, x = ncn.Block(NCNConfig(n_embd=32, n_head=2)), torch.randn(1, 2**13, 32)  # 2**20 numbers within the FFN
    results = []
    for training in (True, False):
        y = block.train(training).ffn(x)
        block.zero_grad()
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in (*block.ffn_in.parameters(), *block.ffn_out.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_dropout():
    x = torch.ones(1000, 100, requires_grad=True)
    y = ncn.dropout(x, 0.3, True)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.unique().tolist() == [0.0, float(torch.tensor(2**16 / 45875))]  # 1 / 0.7
    assert abs(y.mean().item() - 1) < 0.01 and abs((y == 0).float().mean().item() - 0.3) < 0.01
    assert ncn.dropout(x, 0.3, False) is x and ncn.dropout(x, 0.0, True) is x
    dropped = ncn.dropout(torch.ones(10**6), 0.5, True).view(-1, 4) == 0  # four numbers share 64 random bits: not alike
    assert torch.allclose(dropped.float().T.corrcoef(), torch.eye(4), atol=0.01)
    for size in (1, 2, 3, 5):
        assert ncn.dropout(torch.ones(size, dtype=torch.bfloat16), 0.9, True).shape == (size,)
    assert (ncn.dropout(torch.ones(1000), 1e-7, True) != 0).float().mean() > 0.99  # as near to 0 and 1 as 16 bits go
    assert (ncn.dropout(torch.ones(1000), 1 - 1e-7, True) == 0).float().mean() > 0.99


def test_operations_per_token_are_counted():
    """The formula of --bench against torch's own counter, which misses attention and the in-place product addmm_."""
    from torch.utils.flop_counter import FlopCounterMode
    for signals in (SIGNALS, ()):
        c = NCNConfig(vocab_size=512, block_size=128, n_layer=3, n_head=4, n_embd=64, dropout=0.0, signals=signals)
        model, ids = ModulatedLM(c), tokens(2, 128)
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).total.backward()
        missed = 6 * c.n_layer * c.n_embd * c.block_size + 2 * c.vocab_size * c.n_embd
        ratio = (counter.get_total_flops() / ids.numel() + missed) / training.flops_per_token(c)
        assert 1 <= ratio < (1.02 if signals else 1 + 1e-9)  # folding the salience query is work per call, not per token
    assert 110e6 < training.flops_per_token(NCNConfig()) < 117e6  # SPEC: 115 MFLOP per token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formula_counts_what_is_kept(dtype, monkeypatch):
    """What the backward pass keeps for 1,024 tokens more, storage by storage, against the formula of --bench."""
    checkpoint, storages = ncn.checkpoint, {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    monkeypatch.setattr(ncn, "checkpoint", lambda run, x, **how: checkpoint(run, note(x), **how))  # it keeps its input
    for layers in (1, 3):
        c, kept = NCNConfig(vocab_size=99, block_size=64, n_layer=layers, n_head=8, n_embd=256), []
        model, narrow = ModulatedLM(c).train(), dtype != torch.float32
        for rows in (16, 32):
            storages.clear()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                    x = model.hidden(tokens(rows, 64, vocab_size=99))[0]
            kept.append(sum(storages.values()))
            del x
        formula = [training.memory_needed(c, rows, narrow) - rows * 99 * (2 if narrow else 4) for rows in (1024, 2048)]
        assert kept[1] - kept[0] == pytest.approx(formula[1] - formula[0], rel=0.02)  # the logits come after what is kept


@pytest.mark.parametrize("flags", [[], ["--signals", "none", "--checkpoint_blocks"]])
def test_bench_prints_its_table(tmp_path, flags):
    done = run("train.py", "--bench", "--data", tmp_path / "none", *SMALL, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"--signals none", "blocks and controller", "head and loss", "optimizer", "linear_cross_entropy, ours",
             "torch's, logits formed"}
    names |= {"with the controller", "the controller's share"} if not flags else set()
    names |= {"peak memory"} if sys.platform == "linux" else set()
    assert all(re.search(rf"^{re.escape(name)} +[\d.,%-]+", done.stdout, re.M) for name in names), done.stdout
    shares = [int(x) for x in re.findall(r"(\d+)% of a micro-batch", done.stdout)]
    assert len(shares) == 3 and abs(sum(shares) - 100) <= 2 and "vocabulary 50,257" in done.stdout
    assert not list(tmp_path.iterdir())  # it trains nothing and writes nothing


def little_gpt2(text, merges=300):
    """A byte-pair encoding learned from the text, under GPT-2's name: 256 bytes, the merges, END."""
    ranks, words = {bytes([byte]): byte for byte in range(256)}, collections.Counter(re.findall(r" ?\w+|\W", text))
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    for rank in range(256, 256 + merges):
        pairs = collections.Counter()
        for word, its in parts.items():
            for pair in zip(its, its[1:]):
                pairs[pair] += words[word]
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks[a + b] = rank
        for its in parts.values():
            i = 0
            while i < len(its) - 1:
                if (its[i], its[i + 1]) == (a, b):
                    its[i : i + 2] = [a + b]
                i += 1
    return tiktoken.Encoding("gpt2", pat_str=r" ?\w+|\W", mergeable_ranks=ranks, special_tokens={END: len(ranks)})


@pytest.mark.parametrize("seed", range(4))
def test_a_kept_vocabulary_encodes_alike(monkeypatch, seed):
    """What was seen encodes to the same pieces, anything else still encodes, and nothing is kept without a reason."""
    stories = [story for story, _ in demo_stories(seed, 300)]
    full = little_gpt2(" ".join(stories), 600)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: full)
    text = " ".join(stories[:2])
    seen = set(full.encode_ordinary(text))
    kept = prepare.keep(seen)
    small = get_tokenizer("gpt2", kept)
    assert kept == sorted(kept) and {*range(256), full.eot_token} | seen <= set(kept) and len(kept) < full.n_vocab - 50
    assert small.n_vocab == len(kept) and small.eot_token == len(kept) - 1
    assert [kept[token] for token in small.encode_ordinary(text)] == full.encode_ordinary(text)
    for other in ("".join(stories[2:9]), "Ünïcödé 漢字 \0\n\n  zebra"):
        assert small.decode(small.encode_ordinary(other)) == other
    parts = [full.decode_single_token_bytes(token) for token in kept[:-1]]
    for token in set(kept) - seen - {*range(256), full.eot_token}:  # a step on the way to a longer one
        piece = full.decode_single_token_bytes(token)
        assert any(piece in part and piece != part for part in parts)


def test_kept_vocabulary_from_training_to_analysis(monkeypatch, tmp_path, capsys):
    stories = [story for story, _ in demo_stories(1, 200)]
    full = little_gpt2(" ".join(stories), 600)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: full)
    (tmp_path / "few.txt").write_text(END.join(stories[:8]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        assert module.main() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    call(prepare, tmp_path / "few.txt", "--tokenizer", "gpt2", "--val_fraction", 0.3, "--out", tmp_path / "data")
    train = ["--data", tmp_path / "data", "--vocab", "seen", *SMALL, "--out", tmp_path]
    out = call(training, *train, "--max_steps", 2)
    call(training, *train, "--max_steps", 3, "--resume")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ckpt = ncn.load_file(tmp_path / "ckpt_latest.pt")
    used = np.unique(np.concatenate([np.fromfile(tmp_path / "data" / f"{side}.bin", "<u2") for side in ("train", "val")]))
    assert ckpt["kept"] == prepare.keep(used) and f"{len(ckpt['kept'])} of GPT-2's 857 tokens" in out
    assert ckpt["config"]["vocab_size"] == len(ckpt["kept"]) < full.n_vocab
    assert call(sampling, "--prompt", stories[0][:30], "--ckpt", tmp_path / "ckpt_best.pt").startswith(stories[0][:30])
    assert "nats per token" in call(analyze, "--audit", "--ckpt", tmp_path / "ckpt_best.pt", "--data", tmp_path / "data", "--out", tmp_path)
    (tmp_path / "more.txt").write_text(END.join(stories))
    call(prepare, tmp_path / "more.txt", "--tokenizer", "gpt2", "--val_fraction", 0.3, "--out", tmp_path / "more")
    assert "lacks" in refusal(analyze, capsys, monkeypatch, "--audit", "--ckpt", tmp_path / "ckpt_best.pt", "--data", tmp_path / "more")
    assert "the model: --vocab" in refusal(training, capsys, monkeypatch, "--data", tmp_path / "data", "--out", tmp_path, "--resume", "--vocab", "full")


def test_reactive_salience_under_torchrun(data, tmp_path):
    """Its query and key get no gradient, which DistributedDataParallel must be told."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train.py"),
                           "--data", data, "--out", str(tmp_path), *SMALL, "--max_steps", "2", "--salience", "reactive"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_earlier_run_is_set_aside(data, tmp_path):
    first = train_run(data, tmp_path, "--max_steps", 2)
    train_run(data, tmp_path, "--max_steps", 3, "--seed", 7)
    assert same_weights(torch.load(tmp_path / "previous" / "ckpt_latest.pt", weights_only=True), first)
    assert (tmp_path / "training.log").read_text().count("Training Complete.") == 1


def test_resume_refuses(trained, data, tmp_path, capsys, monkeypatch):
    refuse = lambda *args: refusal(training, capsys, monkeypatch, "--data", data, *args)
    assert "--n_embd is 64, the checkpoint has 32" in refuse("--out", trained[0], "--resume", "--n_embd", 64)
    assert "--signals is gain" in refuse("--out", trained[0], "--resume", "--signals", "gain")
    assert "no checkpoint" in refuse("--out", tmp_path, "--resume")
    ModulatedLM.load(trained[0] / "ckpt_latest.pt").save(tmp_path / "ckpt_latest.pt")
    assert "not written by train.py" in refuse("--out", tmp_path, "--resume")
    (tmp_path / "ckpt_latest.pt").write_bytes((trained[0] / "ckpt_latest.pt").read_bytes()[:5000])
    assert "damaged" in refuse("--out", tmp_path, "--resume")
    other = tmp_path / "other"
    run("prepare.py", "demo", "--max_mb", "0.05", "--seed", "1", "--out", other)
    assert "not the data" in refusal(training, capsys, monkeypatch, "--data", other, "--out", trained[0], "--resume")
    assert same_weights(torch.load(trained[0] / "ckpt_latest.pt", weights_only=True), trained[1])


def test_training_refuses(data, tmp_path, capsys, monkeypatch):
    refuse = lambda *args: refusal(training, capsys, monkeypatch, "--out", tmp_path / "out", *args)
    good = ["--data", data, *SMALL]
    assert "run prepare.py" in refuse("--data", tmp_path)
    assert "n_embd 32 is not divisible by n_head 3" in refuse(*good, "--n_head", 3)
    assert "unrecognized arguments: --n_heads 3" in refuse(*good, "--n_heads", 3)
    assert "unknown salience mode 'psychic'" in refuse(*good, "--salience", "psychic")
    assert "unknown signal" in refuse(*good, "--signals", "gain,dopamine")
    assert "invalid int value" in refuse(*good, "--n_head", "two")
    assert "--lr" in refuse(*good, "--lr", "nan")
    assert "full or seen" in refuse(*good, "--vocab", "some")
    assert "--beta2" in refuse(*good, "--beta2", 1)
    assert "fewer than --batch_size" in refuse(*good, "--batch_size", 10**6)
    assert "fewer than a window" in refuse(*good, "--block_size", 10**7)
    for name in ("train.bin", "val.bin", "meta.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(data).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
        assert ("odd number of bytes" if name != "meta.json" else "damaged") in refuse("--data", folder, *SMALL)
        if name != "meta.json":
            np.array([5] * 50 + [257] + [5] * 50, dtype="<u2").tofile(folder / name)
            assert "token id 257, beyond the vocabulary of 257" in refuse("--data", folder, *SMALL)
            (folder / name).unlink()
            assert f"no {folder / name}" in refuse("--data", folder, *SMALL)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_non_finite_loss_stops_the_run(data, tmp_path):
    """The run is broken in its sixth step; the checkpoint of the fourth stays as it was."""
    code = f"""import sys, torch, train
step = torch.optim.AdamW.step
def broken(self, *args, calls=[], **more):
    calls.append(1)
    if len(calls) == 6:
        self.param_groups[0]["params"][0].grad.fill_(float("nan"))
    return step(self, *args, **more)
torch.optim.AdamW.step = broken
sys.argv = ["train.py", "--data", {data!r}, "--out", {str(tmp_path)!r}, *{SMALL!r}, "--max_steps", "20"]
sys.exit(train.main())"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not finite at step" in done.stderr and "ckpt_latest.pt" in done.stderr
    assert done.stderr.count("\n") == 1
    kept = torch.load(tmp_path / "ckpt_latest.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(v).all() for v in kept["model"].values())


def test_a_full_disk_leaves_the_last_checkpoint(trained, data, tmp_path):
    resource = pytest.importorskip("resource")
    for name in ("ckpt_latest.pt", "ckpt_best.pt", "training.log"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    before = (tmp_path / "ckpt_latest.pt").read_bytes()
    done = run("train.py", "--data", data, "--out", tmp_path, "--resume", "--max_steps", 16,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.startswith("train.py: cannot write") and done.stderr.count("\n") == 1
    assert (tmp_path / "ckpt_latest.pt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_best.pt", "ckpt_latest.pt", "training.log"]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_sampling_writes_text(trained):
    ckpt = trained[0] / "ckpt_best.pt"
    say = lambda *args: run("sample.py", "--prompt", "Once upon", "--ckpt", ckpt, "--seed", 3, *args, env=os.environ | {"PYTHONUTF8": "1"})
    one, again, three = say(), say(), say("--num_samples", 3)
    assert one.returncode == three.returncode == 0 and one.stdout == again.stdout
    assert one.stdout.startswith("Once upon") and len(one.stdout) > 60 and re.search(r"\d+ tokens/s", one.stderr)
    model, ids = ModulatedLM.load(ckpt), torch.tensor([[256, *b"Once upon"]])  # after the end of another story
    expected = model.generate(ids, 256, seed=3, end_token=256)[0, 1:].tolist()
    assert one.stdout.startswith(get_tokenizer("bytes").decode(expected)[:20])
    rows = three.stdout.split("\n---\n")
    assert len(rows) == 3 and rows[0] + "\n" == one.stdout and len(set(rows)) == 3
    assert say("--gain=0").stdout != one.stdout


def test_sampling_shows_whole_characters_up_to_the_end():
    tokenizer, texts = get_tokenizer("bytes"), []
    row = sampling.Row(tokenizer, "")
    for token in [*"né ".encode(), 0xFF, *"ü".encode(), 256, 65]:
        row.add(token)
        texts.append(row.text)
    assert texts == ["n", "n", "né", "né ", "né �", "né �", "né �ü", "né �ü", "né �ü"]
    assert row.ended and row.count == 8


def in_a_terminal(*args, **env):
    """The script's standard output, run in a pseudo-terminal."""
    import pty
    os.environ.pop("NO_COLOR", None)
    reader, writer = pty.openpty()
    with subprocess.Popen(command(*args), stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm", **env}) as process:
        os.close(writer)
        out = b""
        try:
            while part := os.read(reader, 65536):
                out += part
        except OSError:  # the other side has closed it
            pass
        os.close(reader)
        assert process.wait() == 0, process.stderr.read()
    return out.decode().replace("\r\n", "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_sampling_traces_a_signal(trained):
    ckpt, say = trained[0] / "ckpt_best.pt", ["--prompt", "Once upon", "--seed", 3, "--max_new_tokens", 20, "--top_k", 3]
    say = ["sample.py", *say, "--ckpt", ckpt, "--trace", "precision", "--precision", 0.5, "--num_samples", 2]
    painted, plain = in_a_terminal(*say, "--layer", 1), run(*say).stdout
    assert "\x1b" not in plain + in_a_terminal(*say, NO_COLOR="1") + in_a_terminal(*say, TERM="dumb")
    legend, text = painted.split("\n\n", 1)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain and plain.isascii()  # the same text, the prompt included
    # Each token has the colour of its signal, as one pass over the finished text computes it.
    model, low, high = ModulatedLM.load(ckpt), *map(float, re.search(r"layer 1: ([\d.]+) .* ([\d.]+) \(", legend).groups())
    rows, expected = plain.removesuffix("\n").split("\n---\n"), []
    for row in rows:
        ids = torch.tensor([[256, *row.encode()]])
        expected.append((model.signals(ids, "causal")[0, 1:, 1, 1] * 0.5).tolist())
    both = sum(expected, [])
    assert low == pytest.approx(min(both), abs=6e-4) and high == pytest.approx(max(both), abs=6e-4) and high > low
    for row, values, shown in zip(rows, expected, text.split("\n---\n")):
        colours = re.findall(r"\x1b\[48;5;(\d+);38;5;\d+m([^\x1b\n])", shown)
        assert [character for _, character in colours] == [c for c in row if c != "\n"]
        values = [v for v, character in zip(values, row) if character != "\n"]
        for (colour, _), value in zip(colours, values):
            level = (value - min(both)) / (max(both) - min(both)) * len(sampling.RAMP)
            assert abs(sampling.RAMP.index(int(colour)) + 0.5 - level) < 0.6


def test_sampling_refuses(trained, tmp_path, capsys, monkeypatch):
    ckpt = trained[0] / "ckpt_best.pt"
    refuse = lambda *args: refusal(sampling, capsys, monkeypatch, "--prompt", "Once", "--ckpt", ckpt, *args)
    assert "temperature" in refuse("--temperature", -0.1)
    assert "top_p" in refuse("--top_p", 0) and "top_p" in refuse("--top_p", 1.5)
    assert "no tokens" in refuse("--prompt", "")
    assert "--num_samples" in refuse("--num_samples", 0)
    assert "0 or more" in refuse("--gain", -1)
    assert "--max_new_tokens" in refuse("--max_new_tokens", -1) and "up to 31 tokens" in refuse("--trace", "gain", "--prompt", "a" * 32)
    assert "layers 0 to" in refuse("--trace", "gain", "--layer", 9) and "layers 0 to" in refuse("--layer", -1)
    assert "unrecognized" in refuse("--dose", 1)
    assert "no checkpoint" in refuse("--ckpt", tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes(ckpt.read_bytes()[:3000])
    assert "damaged" in refuse("--ckpt", tmp_path / "short.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "not a checkpoint" in refuse("--ckpt", tmp_path / "text.pt")

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    assert "safely" in refuse("--ckpt", tmp_path / "hostile.pt")
    assert not (tmp_path / "owned").exists()
    for odd in ({"model": 3}, {"weights": torch.ones(2)}, [1], {"model": {"embed.weight": torch.ones(2)}, "config": {"depth": 3}}):
        torch.save(odd, tmp_path / "odd.pt")
        assert "no NCN model" in refuse("--ckpt", tmp_path / "odd.pt")


# ----------------------------------------------------------------------------------------------------------------------
# Preparing data


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---- The demo stories ----------------------------------------------------------------------------------------
@functools.cache
def demo_stories(seed=3, count=20000):
    rng = random.Random(seed)
    return [prepare.tell(rng) for _ in range(count)]


def readings(text, todo, words, drawn, at=0):
    """Every way to read text[at:] as `todo`, literals and {slots}: yields its -log probability."""
    if not todo:
        if at == len(text):
            yield 0.0
        return
    part, rest = todo[0], todo[1:]
    if isinstance(part, tuple):                            # here ends a slot that began at start: keep its words
        slot, start = part
        yield from readings(text, rest, {**words, slot: text[start:at]}, drawn, at)
    elif not part.startswith("{") or (part := words.get(part[1:-1], part))[:1] != "{":
        if text.startswith(part, at):
            yield from readings(text, rest, words, drawn, at + len(part))
    else:
        slot = part[1:-1]
        choices = prepare.options(slot, drawn)
        for choice in choices:
            inside = [*filter(None, re.split(r"({\w+})", choice)), (slot, at)]
            for nats in readings(text, inside + rest, words, {**drawn, slot: choice}, at):
                yield nats + math.log(len(choices))


def test_demo_stories_have_one_reading():
    """Each story has exactly one derivation, whose probability is the one that tell() states."""
    for text, nats in demo_stories()[:200]:
        assert list(readings(text, ["{story}"], {}, {})) == [pytest.approx(nats)], text
    assert len({text for text, _ in demo_stories()}) == len(demo_stories())


def test_demo_options_begin_differently():
    def lists(rule):
        return [rule.split("|")] if isinstance(rule, str) else [o for r in rule[1].values() for o in lists(r)]
    for slot, rule in prepare.GRAMMAR.items():
        for choices in lists(rule):
            assert not any(a is not b and b.startswith(a) for a in choices for b in choices), (slot, choices)


def test_demo_entropy_is_the_mean_of_the_sample():
    nats = np.array([nats for _, nats in demo_stories()])
    assert abs(nats.mean() - prepare.entropy()) < 4 * nats.std() / len(nats) ** 0.5
    assert prepare.entropy() > math.log(1e7)               # millions of different stories, and then some


@pytest.mark.parametrize("seed", range(5))
def test_demo_entropy_by_enumeration(monkeypatch, seed):
    """On small random grammars: the entropy of the texts themselves, all of them written out."""
    rng = random.Random(seed)

    def some(prefix):
        return "|".join(f"{prefix}{i}." for i in range(rng.randint(1, 4)))
    kinds, things = some("k"), "|".join(f"t{i}.{{kind}}{{color}}" for i in range(rng.randint(2, 3)))
    monkeypatch.setattr(prepare, "GRAMMAR", {
        "story": "{kind}{name} {thing}{color}{name}|b{thing} {fix}",
        "kind": kinds, "color": some("c"), "thing": things,
        "name": ("kind", {kind: some("n") for kind in kinds.split("|")}),
        "fix": ("thing", {thing: ("kind", {kind: some("f{color}{name}") for kind in kinds.split("|")})
                          for thing in things.split("|")})})
    texts = collections.Counter()

    def enumerate_texts(text, drawn, p):
        """Leftmost slot first; an option goes in as it is, and what it holds is filled in next."""
        match = prepare.SLOT.search(text)
        if not match:
            texts[text] += p
        elif match[1] in drawn:
            enumerate_texts(text[:match.start()] + drawn[match[1]] + text[match.end():], drawn, p)
        else:
            for choice in (choices := prepare.options(match[1], drawn)):
                enumerate_texts(text[:match.start()] + choice + text[match.end():],
                                {**drawn, match[1]: choice}, p / len(choices))
    enumerate_texts("{story}", {}, 1.0)
    assert sum(texts.values()) == pytest.approx(1) and len(texts) > 10
    prepare.entropy.cache_clear()
    try:
        assert prepare.entropy() == pytest.approx(-sum(p * math.log(p) for p in texts.values()), rel=1e-12)
        told = collections.Counter(prepare.tell(rng)[0] for _ in range(4000))
        assert set(told) <= set(texts)
        assert all(abs(told[t] - 4000 * p) < 6 * (4000 * p) ** 0.5 + 1 for t, p in texts.items())
    finally:
        prepare.entropy.cache_clear()


def test_demo_options_are_equally_likely():
    for slot in "animal", "pal", "place", "kin":
        choices = prepare.options(slot, {})
        went = "(?:went|walked|ran)"
        pattern = re.compile({"animal": rf" the (\w+) {went}", "pal": r"friend (\w+)",
                              "place": rf"{went} to the (\w+)\.", "kin": rf"\b({'|'.join(choices)})\b"}[slot])
        counts = collections.Counter(pattern.search(text)[1] for text, _ in demo_stories())
        assert set(counts) == set(choices)
        mean = len(demo_stories()) / len(choices)
        assert all(abs(count - mean) < 5 * mean ** 0.5 for count in counts.values()), counts


def test_demo_is_the_same_everywhere():
    text = "\n".join(text for text, _ in demo_stories(42, 1000))
    assert sha256(text.encode()) == "5e0e9a843aa0c79bc3777ac439a2ab0d5becfd9bfa9ebc2e6c6c4eea5df18410"


def test_demo_stories_are_good_english():
    sizes, famous = [], 0
    for text, _ in demo_stories():
        sizes.append(len(text))
        famous += text.startswith("Once upon a time, ")
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|[{}|]|  | $|^ | [.,!]|[.,!][A-Za-z]", text), text
        assert text.count('"') % 2 == 0 and ", but it was " in text
        assert all(re.match(r'"?[A-Z]', line) and re.search(r'[.!]"?$', line) for line in text.split("\n"))
        assert all(s[0].isupper() for s in re.findall(r'[.!]"? "?(\w)(?!aid)', text)), text
        kind, name = re.search(r"(\w+) named (\w+)\.", text).groups()
        wrong = r"\b(he|his|him)\b" if kind in prepare.SHE.split("|") else r"\b(she|her)\b"
        assert not re.search(wrong, text, re.IGNORECASE), text
        pal = re.search(r"friend (\w+)", text)[1]
        thing = re.search(rf"\b({prepare.GRAMMAR['thing']})\b", text)[1]
        before, after = text.split(", but ")
        goal = re.search(r"\ba (\w+ \w+)(?: for|\.$|\. \w)", before.split("\n")[1])[1]
        assert all(part.count(word) for part in (before, after) for word in (name, pal, thing, goal)), text
        # the way out names the thing, the obstacle and the goal
        obstacle = re.match(r"it was (?:[a-z]+ )+?a (\w+ \w+)[.,]", after)[1]
        fix = after.split("\n")[1]
        assert thing in fix and obstacle in fix and goal in after, text
    assert 350 <= min(sizes) and max(sizes) <= 650 and 460 <= np.mean(sizes) <= 500
    assert famous >= len(sizes) / 2


# ---- Tokenizers ----------------------------------------------------------------------------------------------
def test_prepare_bytes_tokenizer():
    tokenizer = prepare.get_tokenizer("bytes")
    assert isinstance(tokenizer, tiktoken.Encoding) and tokenizer.n_vocab == 257 and tokenizer.eot_token == 256
    rng = random.Random(0)
    for size in [0, 1, 98, 99, 100, 101, 5000]:
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800),
                                       rng.randrange(0x10000, 0x110000)])) for _ in range(size)) + END
        assert tokenizer.encode_ordinary(text) == list(text.encode())
        assert tokenizer.encode(text, allowed_special="all") == [*text.encode()[:-13], 256]
        assert tokenizer.decode(list(text.encode())) == text


def test_prepare_tokenizer_errors(monkeypatch):
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt5'"):
        prepare.get_tokenizer("gpt5")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError, match="--tokenizer bytes"):
        prepare.get_tokenizer("gpt2")


def offline(*_):
    raise OSError("no network in this test")


# ---- Whole runs ----------------------------------------------------------------------------------------------
def prepare_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    return prepare.main()


def prepare_there(*args, cwd=None, code="import sys, prepare; sys.argv[0] = 'prepare.py'; sys.exit(prepare.main())"):
    """prepare.py in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parent)}, timeout=300)


def load_prepared(out):
    """Checks the files against their meta data. Returns it, and the stories of each side."""
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = prepare.get_tokenizer(meta["tokenizer"])
    assert meta["vocab_size"] == tokenizer.n_vocab
    assert not list(out.glob("*.tmp"))
    sides = []
    for side in "train", "val":
        tokens = np.fromfile(out / f"{side}.bin", "<u2").tolist()
        assert len(tokens) == meta[f"{side}_tokens"] and tokens[-1] == tokenizer.eot_token
        sides.append(tokenizer.decode(tokens).split(END)[:-1])
        assert len(sides[-1]) == meta[f"{side}_stories"] > 0
    return meta, *sides


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_demo(tmp_path):
    out = tmp_path / "deep" / "out"
    run = prepare_there("demo", f"--out={out}", "--max_mb", "0.3", "--seed", "5")
    assert run.returncode == 0 and run.stderr == ""        # no progress bar where there is no terminal
    meta, train, val = load_prepared(out)
    assert meta["tokenizer"] == "bytes" and meta["seed"] == 5 and meta["val_fraction"] == 0.05
    rng = random.Random(5)
    told = [prepare.tell(rng)[0] for _ in range(len(train) + len(val))]
    assert sorted(told) == sorted(train + val)
    text = "".join(f"{story}\n{END}\n" for story in told)[:-1]
    assert meta["sources"] == [{"name": "demo", "bytes": len(text), "sha256": sha256(text.encode())}]
    assert 299_000 < len(text) <= 300_000
    assert meta["entropy_nats_per_story"] == prepare.entropy()
    mean = (meta["train_tokens"] + meta["val_tokens"]) / len(told)
    assert meta["entropy_nats_per_token"] == pytest.approx(prepare.entropy() / mean)
    assert mean == np.mean([len(story) + 1 for story in told])
    assert f"{meta['entropy_nats_per_token']:.4f} nats per token" in run.stdout


def hard_corpus(rng, files):
    """Random texts with everything that is hard: and the stories that they hold."""
    texts, stories = [], []
    for _ in range(files):
        text = f"first{END}"
        for _ in range(rng.randint(1, 12)):
            words = [rng.choice(["a", "é", "\U0001F600", "<|", "endoftext", "|>", "\r\n", "\n", " ", "<|end"])
                     for _ in range(rng.randint(0, 15))]
            text += "".join(words) + END
        text = text[:-len(END)] + rng.choice(["", "\n", END, "end"])
        stories += [s.strip() for s in text.replace("\r\n", "\n").split(END) if s.strip()]
        texts.append("\ufeff" * rng.randint(0, 1) + text)
    return texts, stories


@pytest.mark.parametrize("seed", range(30))
def test_prepare_reads_any_blocks(monkeypatch, tmp_path, seed):
    """Stories, split, sizes and hashes do not depend on where the blocks are cut or how many cores there are."""
    rng = random.Random(seed)
    texts, stories = hard_corpus(rng, 3)
    folder = tmp_path / "in"
    for i, text in enumerate(texts):                       # the order: in/0.txt, in/b/z.txt, in/c.txt
        path = folder / ["0.txt", "b/z.txt", "c.txt"][i]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "no.md").write_text("not a story")
    results = []
    for block, cores in (1, 1), (rng.randint(2, 40), 3), (1 << 20, 7):
        monkeypatch.setattr(prepare, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        out = tmp_path / f"out{block}"
        assert prepare_here(monkeypatch, folder, "--tokenizer", "bytes", "--out", out, "--val_fraction", 0.3,
                       "--seed", seed) == 0
        results.append(files_in(out))
    assert results[0] == results[1] == results[2]
    meta, train, val = load_prepared(out)
    draws = random.Random(seed + 1)
    sides = [draws.random() < 0.3 for _ in stories]
    sides[:2] = False, True
    assert val == [s for s, side in zip(stories, sides) if side]
    assert train == [s for s, side in zip(stories, sides) if not side]
    assert [(s["bytes"], s["sha256"]) for s in meta["sources"]] == [
        (len(t.encode()), sha256(t.encode())) for t in texts]


def test_prepare_split(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text(END.join(f"story {i}" for i in range(4000)))
    splits = []
    for seed in 1, 2, 1:
        assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o",
                       f"--seed={seed}") == 0
        splits.append(load_prepared(tmp_path / "o")[2])
        assert 150 < len(splits[-1]) < 250                 # 200 expected, standard deviation 14
    assert splits[0] == splits[2] != splits[1]
    (tmp_path / "a.txt").write_text(f"one{END}two")
    for fraction in "1e-9", "0.999999":
        assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o",
                       "--val_fraction", fraction) == 0
        assert len(load_prepared(tmp_path / "o")[1]) == 1


@pytest.mark.parametrize("limit", [10, 27, 28, 34, 35, 36, 37, 49, 50, 51, 62, 63, 64, 65, 1000])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_prepare_max_mb(monkeypatch, tmp_path, limit, block):
    """Ends at the last whole story within the limit, over all files together."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    ends, end = {}, 0
    for name, stories in ("a.txt", ["1", "2222222", "3"]), ("b.txt", ["4", "5", "6"]):
        (tmp_path / name).write_bytes(END.join(stories).encode())
        for story in stories:
            end += len(story) + (len(END) if story not in "36" else 0)
            ends[story] = end
    status = prepare_here(monkeypatch, tmp_path, "--tokenizer=bytes", "--out", tmp_path / "o",
                     "--max_mb", limit / 1e6)
    expected = [story for story, end in ends.items() if end <= limit]
    if len(expected) < 2:
        assert status == 2 and not (tmp_path / "o" / "meta.json").exists()
    else:
        meta, train, val = load_prepared(tmp_path / "o")
        assert sorted(train + val) == expected
        assert sum(source["bytes"] for source in meta["sources"]) == ends[expected[-1]]


def test_prepare_gpt2(monkeypatch, tmp_path):
    if not (SHARED / "tinystories").exists():
        pytest.skip("no shared TinyStories")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    source = SHARED / "tinystories" / "valid.txt"
    assert prepare_here(monkeypatch, source, "--out", tmp_path, "--max_mb", "0.4") == 0
    meta, train, val = load_prepared(tmp_path)
    assert meta["tokenizer"] == "gpt2" and 0.395e6 < meta["sources"][0]["bytes"] <= 0.4e6
    tokenizer = tiktoken.get_encoding("gpt2")
    for side, stories in ("train", train), ("val", val):
        tokens = np.fromfile(tmp_path / f"{side}.bin", "<u2").tolist()
        assert tokens == [token for story in stories
                          for token in [*tokenizer.encode_ordinary(story), tokenizer.eot_token]]
    text = source.read_bytes()[:meta["sources"][0]["bytes"]].decode()
    assert sorted(train + val) == sorted(s.strip() for s in text.split(END) if s.strip())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_prepare_memory(tmp_path):
    """A corpus six times as big needs the same memory."""
    code = ("import re, sys, prepare; status = prepare.main();"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)")
    text = "".join(f"{story}\n{END}\n" for story, _ in demo_stories()).encode()     # 10 MB
    peaks = []
    for copies in 1, 6:
        (tmp_path / "a.txt").write_bytes(text * copies)
        run = prepare_there(tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o", code=code)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout.split()[-1]) / 1024)   # MB
    assert peaks[1] < peaks[0] + 20 and peaks[1] < 300, peaks


# ---- Bad input -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_prepare_not_utf8(monkeypatch, tmp_path, capsys, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(prepare, "BLOCK", rng.choice([1, 2, 3, 5, 17, 1 << 20]))
    data = bytearray(END.join(["héllo \U0001F600"] * 6).encode())
    bad = rng.choice([b"\xff", b"\xc3", b"\xf0\x9f", b"\x80", b"\xed\xa0\x80"])
    at = rng.randrange(len(data) + 1)
    data[at:at] = bad
    try:
        data.decode()
    except UnicodeDecodeError as error:
        where = error.start
    else:
        pytest.skip("still UTF-8")
    (tmp_path / "a.txt").write_bytes(data)
    assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert f"a.txt: not UTF-8 at byte {where};" in error and error.count("\n") == 1
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("args, says", [
    (["missing.txt"], "missing.txt"),
    (["empty.txt"], "fewer than two stories"),
    (["blank.txt"], "fewer than two stories"),
    (["one.txt"], "fewer than two stories"),
    (["nothing"], "no text in nothing"),
    (["latin.txt"], "latin.txt: not UTF-8 at byte 3"),
    (["good.txt", "latin.txt"], "latin.txt: not UTF-8 at byte 3"),
    (["good.txt", "--val_fraction", "0"], "val_fraction"),
    (["good.txt", "--val_fraction=1"], "val_fraction"),
    (["good.txt", "--val_fraction=nan"], "val_fraction"),
    (["good.txt", "--val_fraction=half"], "val_fraction"),
    (["good.txt", "--max_mb=0"], "max_mb"),
    (["good.txt", "--max_mb=nan"], "max_mb"),
    (["good.txt", "--max_mb=inf"], "max_mb"),
    (["good.txt", "--max_mb=1e-6"], "--max_mb"),
    (["good.txt", "--seed=x"], "seed"),
    (["good.txt", "--tokenizer", "gpt5"], "use gpt2 or bytes"),
    (["good.txt", "--tokens", "bytes"], "--tokens"),
    (["good.txt", "--val=0.1"], "--val"),
    (["good.txt", "--out=good.txt"], "good.txt"),
])
def test_prepare_bad_input(tmp_path, args, says):
    """One clear line, status 2, and what lay in the output folder is as it was."""
    (tmp_path / "data").mkdir()
    (tmp_path / "nothing").mkdir()
    for name in "train.bin", "val.bin", "meta.json":
        (tmp_path / "data" / name).write_text("precious")
    for name, data in (("good", f"a{END}b{END}c"), ("empty", ""), ("blank", f" \n{END}\r\n{END}"),
                       ("one", "a story")):
        (tmp_path / f"{name}.txt").write_text(data)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    before = files_in(tmp_path / "data")
    args = args if any("--tokenizer" in arg for arg in args) else [*args, "--tokenizer=bytes"]
    run = prepare_there(*args, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert says in run.stderr and run.stderr.startswith("prepare.py: ") and run.stderr.count("\n") == 1
    assert "Errno" not in run.stderr
    assert files_in(tmp_path / "data") == before
    assert (tmp_path / "good.txt").read_text() == f"a{END}b{END}c"


def test_prepare_one_endless_story(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare, "LONGEST", 1000)
    monkeypatch.setattr(prepare, "BLOCK", 100)
    (tmp_path / "a.txt").write_text("a" * 5000)
    assert prepare_here(monkeypatch, tmp_path / "a.txt", "--tokenizer=bytes", "--out", tmp_path / "o") == 2
    assert "a.txt: a story of over" in capsys.readouterr().err


def test_prepare_gpt2_offline(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"a{END}b")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare_here(monkeypatch, tmp_path / "a.txt", "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert "GPT-2 vocabulary" in error and "--tokenizer bytes" in error and error.count("\n") == 1


def precious(tmp_path):
    out = tmp_path / "out"
    assert prepare_there("demo", "--max_mb=0.1", "--out", out).returncode == 0
    return out, files_in(out)


@pytest.mark.parametrize("limit", [0, 100_000, 3_000_000])
def test_prepare_full_disk(tmp_path, limit):
    """RLIMIT_FSIZE stands in for a full disk: the write fails in the same way."""
    pytest.importorskip("resource")
    out, before = precious(tmp_path)
    run = prepare_there("demo", "--max_mb=4", "--out", out,
                 code="import resource, sys, prepare; "
                      f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(prepare.main())")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "large" in run.stderr, run.stderr
    assert files_in(out) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_prepare_ctrl_c(tmp_path):
    out, before = precious(tmp_path)
    # A shell starts background jobs with SIGINT ignored, and CI may be one: the child must not inherit that.
    process = subprocess.Popen([sys.executable, prepare.__file__, "demo", "--max_mb=1000", "--out", out],
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.time() + 60
        while not ((temporary := out / "train.bin.tmp").exists() and temporary.stat().st_size):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and error == "prepare.py: interrupted, nothing was changed\n"
    assert files_in(out) == before


# ---- Where the text comes from -------------------------------------------------------------------------------
class StoryServer(http.server.BaseHTTPRequestHandler):
    """Serves server.body; sends at most server.most bytes of it; resumes if server.resumes."""

    def do_GET(self):
        body, start = self.server.body, 0
        self.server.ranges.append(self.headers["Range"])
        if self.headers["Range"] and self.server.resumes:
            start = int(self.headers["Range"][len("bytes="):-1])
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:start + self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StoryServer)
    server.body = END.join(f"story {i} " * 20 for i in range(20000)).encode()
    server.most, server.resumes, server.ranges = 1 << 30, True, []
    server.url = f"http://127.0.0.1:{server.server_port}/stories.txt"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("resumes", [True, False])
def test_prepare_download(server, tmp_path, resumes):
    """A transfer that breaks off leaves nothing under the final name; the next one completes it."""
    path, part = tmp_path / "stories.txt", tmp_path / "stories.txt.part"
    server.resumes, server.most = resumes, 1_500_000
    with pytest.raises(OSError, match="stopped at 1,500,000 of"):
        prepare.download(server.url, path)
    assert not path.exists() and part.read_bytes() == server.body[:1_500_000]
    server.most = 1 << 30
    prepare.download(server.url, path)
    assert path.read_bytes() == server.body and not part.exists()
    assert server.ranges == [None, "bytes=1500000-"]


def test_prepare_download_starts_again(server, tmp_path):
    (tmp_path / "stories.txt.part").write_bytes(b"x" * len(server.body))           # nothing comes after it: 416
    prepare.download(server.url, tmp_path / "stories.txt")
    assert (tmp_path / "stories.txt").read_bytes() == server.body


def test_prepare_tinystories(monkeypatch, server, tmp_path, capsys):
    monkeypatch.setattr(prepare, "TINYSTORIES", server.url)
    args = "tinystories", "--tokenizer=bytes", "--out", tmp_path
    server.most = 1000
    assert prepare_here(monkeypatch, *args) == 2 and "run this again" in capsys.readouterr().err
    server.most = 1 << 30
    assert prepare_here(monkeypatch, *args) == 0
    meta, train, val = load_prepared(tmp_path)
    assert len(train) + len(val) == 20000
    assert meta["sources"][0]["sha256"] == sha256(server.body)
    asked = len(server.ranges)
    assert prepare_here(monkeypatch, *args) == 0 and len(server.ranges) == asked        # it is there: no download


def test_prepare_with_no_input(monkeypatch, server, tmp_path, capsys):
    """training_data, then tinystories, then demo, loudly; but demo never stands in for what was asked for."""
    monkeypatch.chdir(tmp_path)
    server.shutdown()
    server.server_close()                               # from here on nobody answers
    monkeypatch.setattr(prepare, "TINYSTORIES", server.url)
    monkeypatch.setattr(prepare, "DEMO_MB", 0.1)
    assert prepare_here(monkeypatch, "tinystories", "--tokenizer=bytes") == 2
    assert "cannot download" in capsys.readouterr().err
    assert prepare_here(monkeypatch, "--tokenizer=bytes") == 0
    assert "DEMO STORIES, NOT TINYSTORIES" in capsys.readouterr().err
    assert load_prepared(tmp_path / "data")[0]["sources"][0]["name"] == "demo"
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert prepare_here(monkeypatch, "--out=other") == 0        # no vocabulary either: bytes
    assert "DEMO STORIES, NOT TINYSTORIES" in capsys.readouterr().err
    assert load_prepared(tmp_path / "other")[0]["tokenizer"] == "bytes"
    (tmp_path / "training_data").mkdir()
    (tmp_path / "training_data" / "a.txt").write_text(f"mine{END}mine, too")
    assert prepare_here(monkeypatch) == 2                       # own text and no vocabulary: says so
    assert "--tokenizer bytes" in capsys.readouterr().err
    assert prepare_here(monkeypatch, "--tokenizer=bytes") == 0
    assert load_prepared(tmp_path / "data")[1:] == (["mine"], ["mine, too"])


def test_prepare_help():
    text = " ".join(prepare_there("--help").stdout.split())
    for words in ("--out", "default: data", "--tokenizer", "default: gpt2, but bytes for demo", "--val_fraction",
                  "default: 0.05", "--seed", "default: 42", "--max_mb", "MB (10^6 bytes)", "tinystories", "demo"):
        assert words in text


# ----------------------------------------------------------------------------------------------------------------------
# Analysis

# One line of the authors' own log, and its validation result.
AUTHORS_LOG = """\
2025-12-05 08:23:35,567 [INFO] Step: 20 | Ep: 1 [80/63518 (0.1%)] | Loss: 9.9924 | Reg: 0.0034 | PPL: 21860.27 | \
LR: 1.20e-04 | Scale: 65536.0 | Tok/s: 2493
2025-12-07 18:57:00,151 [INFO] Validation Result: Loss: 1.5082 | Perplexity: 4.5184
2025-12-07 18:57:02,194 [INFO] Training Complete.
"""


def log_lines(steps, losses, seconds_per_step=1.0, speed=1000, suffix=""):
    start = datetime(2025, 12, 5, 8, 0, 0)
    times = [start + timedelta(seconds=seconds_per_step * int(s)) for s in steps]
    return [f"{t:%Y-%m-%d %H:%M:%S},{t.microsecond // 1000:03d} [INFO] Step: {s} | Ep: 1 [{s}/9 (1.0%)] | "
            f"Loss: {x:.4f} | Reg: 0.0001 | PPL: 1.00 | LR: 1.20e-04 | Scale: 1.0 | Tok/s: {speed}{suffix}\n"
            for t, s, x in zip(times, steps, losses)]


def val_lines(loss):
    return [f"2025-12-05 09:00:00,000 [INFO] Validation Result: Loss: {loss:.4f} | Perplexity: 1.0000\n"]


def write_log(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.log").write_text("".join(lines), encoding="utf-8")
    return str(folder / "training.log")


def loss_curve(kind, seed=0):
    """The issue's synthetic logs: 800 points, noise 0.05, one point every 20 steps as in the authors' log."""
    s = 20 * np.arange(1, 801)
    y = 1.5 + 8 * np.exp(-s / 700) + np.random.default_rng(seed).normal(0, 0.05, len(s))
    return s, y + {"Converged": 0 * s, "Still improving": -3e-5 * s, "Diverging": 2e-4 * np.maximum(s - 12000, 0)}[kind]


def analyze_here(monkeypatch, capsys, *args):
    """analyze.py with these arguments -> exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, args)])
    status = analyze.main()
    return status, *capsys.readouterr()


def png_width(path):
    """Width of a PNG in pixels, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big")


def scan_model(seed=0, spread=0.5, **config):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=16, ncn_hidden=8, dropout=0.0)
    model = ModulatedLM(NCNConfig(**{**sizes, **config})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def scan_data(folder, stories=40):
    """A data folder as prepare.py leaves it: stories of random bytes of 40 to 80 tokens."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([[*rng.integers(97, 123, rng.integers(40, 80)), 256] for _ in range(stories)]).astype("<u2")
    folder.mkdir(parents=True, exist_ok=True)
    ids.tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257}))
    return folder


# ---- logs


def test_analyze_reads_the_authors_log(tmp_path):
    run = analyze.read_log(write_log(tmp_path / "theirs", [AUTHORS_LOG]))
    assert (run["name"], run["step"].tolist(), run["loss"].tolist()) == ("theirs", [20], [9.9924])
    assert run["val"] == [(20, 1.5082)] and run["broke"] is None


def test_analyze_counts_tokens_and_time(tmp_path):
    steps = [1, 10, 20, 30]
    run = analyze.read_log(write_log(tmp_path, log_lines(steps, [4, 3, 2, 1], seconds_per_step=2.0, speed=512)))
    np.testing.assert_allclose(run["tokens"], [1024 * s for s in steps])  # 512 tokens/s, 2 s a step
    np.testing.assert_allclose(run["minutes"], [2 * s / 60 for s in steps])
    # What train.py states wins over the clock, which also counts validation.
    head = [f"2025-12-05 08:00:00,000 [INFO] {text}\n" for text in (
        "Preset laptop", "910,252 parameters, 70,828 of them the controller's", "600 steps of 8,192 tokens, from data")]
    run = analyze.read_log(write_log(tmp_path, head + log_lines(steps, [4, 3, 2, 1], seconds_per_step=50, speed=512)))
    np.testing.assert_allclose(run["tokens"], [8192 * s for s in steps])
    np.testing.assert_allclose(run["minutes"], [16 * s / 60 for s in steps])
    assert all(text in analyze.title(run) for text in ("Preset laptop", "910,252 parameters", "600 steps of 8,192"))


def test_analyze_resumed_run(tmp_path):
    lines = log_lines(range(10, 101, 10), [5.0] * 10) + val_lines(4.0) + log_lines(range(61, 65), [9.0] * 4) + \
        log_lines(range(70, 121, 10), [3.0] * 6) + val_lines(2.5)
    run = analyze.read_log(write_log(tmp_path, lines))
    assert run["step"].tolist() == [10, 20, 30, 40, 50, 60, 61, 62, 63, 64, 70, 80, 90, 100, 110, 120]
    assert run["loss"].tolist() == [5.0] * 6 + [9.0] * 4 + [3.0] * 6
    assert run["val"] == [(120, 2.5)], "the validation at step 100 belongs to weights that were lost"
    assert not any("runs in one file" in note for note in run["notes"])


@pytest.mark.parametrize("second", [range(20, 61, 20), [1, 20, 40], range(50, 201, 50), [20]])
def test_analyze_takes_the_last_of_two_runs(tmp_path, second):
    lines = log_lines(range(20, 301, 20), [5.0] * 15) + val_lines(4.9) + log_lines(second, [3.0] * len(second))
    run = analyze.read_log(write_log(tmp_path, lines))
    assert run["step"].tolist() == list(second) and set(run["loss"]) == {3.0} and run["val"] == []
    assert any(note.startswith("2 runs in one file") for note in run["notes"])


def test_analyze_skips_what_is_not_finite_or_torn(tmp_path):
    lines = log_lines([10, 20, 30, 40], [5, math.nan, math.inf, 4]) + ["\n", "noise\n"] + val_lines(math.nan)
    lines += [log_lines([50], [3.1234])[0].split("234")[0]]  # cut off within the number: 3.1 would be wrong
    run = analyze.read_log(write_log(tmp_path, lines))
    assert run["step"].tolist() == [10, 40] and run["loss"].tolist() == [5, 4] and run["val"] == []
    assert any(note.startswith("2 rows") for note in run["notes"])


@pytest.mark.parametrize("end", [log_lines([90], [math.nan])[0],
                                 "2025-12-05 08:30:00,000 [INFO] Stopped: loss nan, gradient norm nan at step 90; x\n"])
def test_analyze_non_finite_end_is_diverging(tmp_path, end):
    v = analyze.verdict(analyze.read_log(write_log(tmp_path, log_lines(range(1, 81), [2.0] * 80) + [end])))
    assert v["verdict"] == "Diverging" and "step 90" in v["why"]


@pytest.mark.parametrize("kind", ["Converged", "Still improving", "Diverging"])
def test_analyze_verdicts(tmp_path, kind):
    true = {"Converged": 0.0, "Still improving": -0.03, "Diverging": 0.2}[kind]
    right = covered = 0
    for seed in range(40):
        v = analyze.verdict(analyze.read_log(write_log(tmp_path, log_lines(*loss_curve(kind, seed)))))
        right += v["verdict"] == kind
        covered += abs(v["slope"] - true) <= v["half"]
    assert right >= 38 and covered >= 37, (right, covered)  # the interval is a 98% one


def test_analyze_verdict_without_noise_keeps_the_threshold(tmp_path):
    s = 20 * np.arange(1, 801)
    for slope, kind in ((0.0, "Converged"), (0.9e-6, "Converged"), (-0.9e-6, "Converged"),
                        (-1.1e-6, "Still improving"), (1.1e-6, "Diverging")):
        run = dict(step=s, loss=2 + slope * s, broke=None)
        assert analyze.verdict(run)["verdict"] == kind, slope


def test_analyze_verdict_says_when_it_is_uncertain():
    rng = np.random.default_rng(0)
    for n in (1, 4, 20, 60):  # at most nine points in the last 15%
        v = analyze.verdict(dict(step=10 * np.arange(1, n + 1), loss=2 + rng.normal(0, 0.05, n), broke=None))
        assert v["verdict"] == "Undecided" if n < 30 else v["why"].startswith("uncertain") and v["verdict"] != "Undecided"


def test_analyze_ewma():
    y, span = np.array([3.0, 1.0, 4.0, 1.0]), 3
    w = (1 - 2 / (span + 1)) ** np.arange(4)[::-1]
    np.testing.assert_allclose(analyze.ewma(y, span)[-1], (w * y).sum() / w.sum())
    np.testing.assert_allclose(analyze.ewma(y, 1), y)


def test_analyze_power_law_and_index():
    s = 20 * np.arange(1, 801)
    e = analyze.efficiency(dict(step=s, loss=1.5 + 25.0 * s**-0.6))
    assert abs(e["a"] - 1.5) < 0.02 and abs(e["b"] - 25) < 1 and abs(e["c"] - 0.6) < 0.02 and e["r2"] > 0.9999
    line = analyze.efficiency(dict(step=s, loss=5 - 1e-4 * s))
    assert abs(line["sei"] - 0.5) < 0.02
    assert abs(line["step"][line["p95"]] / s[-1] - 0.95) < 0.04 and abs(line["step"][line["p99"]] / s[-1] - 0.99) < 0.04
    assert line["a"] >= 0
    early = analyze.efficiency(dict(step=s, loss=np.where(s < 100, 5.0, 1.0)))
    assert early["sei"] > 0.97 and early["step"][early["p95"]] < 120
    assert analyze.efficiency(dict(step=s, loss=1 + 1e-4 * s)) is None  # nothing improved
    assert analyze.efficiency(dict(step=s[:3], loss=np.array([3.0, 2.0, 1.0]))) is None


def test_analyze_pictures_of_one_log(tmp_path, monkeypatch, capsys):
    s, y = loss_curve("Still improving")
    path = write_log(tmp_path / "out", log_lines(s, y) + val_lines(1.25))
    monkeypatch.chdir(tmp_path)
    status, out, err = analyze_here(monkeypatch, capsys)  # out/training.log is the default
    assert status == 0 and not err and "out: Still improving, slope -0.0" in out and "1.2500" in out
    for name in ("convergence_analysis.png", "sample_efficiency.png"):
        assert png_width(tmp_path / "out" / name) == 1000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "convergence_analysis.png", "sample_efficiency.png", "training.log"], "no temporary file may be left"
    for n in (1, 5):  # so short that there is nothing to fit: the points are drawn all the same
        path = write_log(tmp_path / f"short{n}", log_lines(range(1, n + 1), [3.0] * n))
        status, out, err = analyze_here(monkeypatch, capsys, path)
        assert status == 0 and not err and "Undecided" in out
        assert png_width(tmp_path / f"short{n}" / "convergence_analysis.png") == 1000


def test_analyze_several_logs(tmp_path, monkeypatch, capsys):
    paths = [write_log(tmp_path / name, log_lines(*loss_curve("Converged", i)) + val_lines(1.5 - 0.25 * i))
             for i, name in enumerate(("first", "second"))]
    status, out, _ = analyze_here(monkeypatch, capsys, *paths, "--out", tmp_path / "pictures")
    assert status == 0 and "-0.2500" in out
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "convergence_analysis_first.png", "convergence_analysis_second.png", "sample_efficiency.png"]
    # Without --out each log's own picture goes beside it, and their comparison beside the first.
    saved = []
    monkeypatch.setattr(analyze, "save", lambda fig, folder, name: (saved.append((folder, name)), plt.close(fig)))
    assert analyze_here(monkeypatch, capsys, *paths)[0] == 0
    folders = [str(tmp_path / name) for name in ("first", "second")]
    assert saved == [(f, "convergence_analysis.png") for f in folders] + [(folders[0], "sample_efficiency.png")]


def test_analyze_log_without_speeds(tmp_path, monkeypatch, capsys):
    lines = [line.split(" | Tok/s")[0] + "\n" for line in log_lines(range(1, 31), np.linspace(4, 2, 30))]
    status, out, err = analyze_here(monkeypatch, capsys, write_log(tmp_path, lines))
    assert status == 0 and not err and "Still improving" in out


def test_analyze_global_loss_is_not_called_a_perplexity(tmp_path, monkeypatch, capsys):
    suffix = " | global salience: sees the future, no likelihood"  # as train.py writes it
    path = write_log(tmp_path, log_lines(range(1, 20), [3.0] * 19, suffix=suffix))
    labels = []
    monkeypatch.setattr(analyze, "save", lambda fig, *_: (labels.extend(ax.get_ylabel() for ax in fig.axes),
                                                          plt.close(fig)))
    status, out, _ = analyze_here(monkeypatch, capsys, path)
    assert status == 0 and "no likelihood" in out
    assert "perplexity" not in labels and "exp(loss): sees the future, no perplexity" in labels


def test_analyze_bad_logs(tmp_path, monkeypatch, capsys):
    good = write_log(tmp_path / "good", log_lines(*loss_curve("Converged")))
    (tmp_path / "empty.log").write_text("")
    (tmp_path / "foreign.log").write_text("epoch 1 loss 3.0\n" * 10)
    (tmp_path / "binary.log").write_bytes(bytes(range(256)) * 100)
    nan = write_log(tmp_path / "nan", log_lines([1, 2], [math.nan] * 2))
    for bad in ("missing.log", "empty.log", "foreign.log", "binary.log", ".", nan):
        status, out, err = analyze_here(monkeypatch, capsys, good, tmp_path / bad)
        assert status == 2 and err.count("\n") == 1 and err.startswith("analyze.py: ") and "wrote" not in out, bad
    assert not list((tmp_path / "good").glob("*.png")), "a bad log beside a good one must leave nothing half done"
    (tmp_path / "file").write_text("")
    status, _, err = analyze_here(monkeypatch, capsys, good, "--out", tmp_path / "file")
    assert status == 2 and err.count("\n") == 1 and "--out" in err
    with pytest.raises(SystemExit) as stop:
        analyze_here(monkeypatch, capsys, "--no-such-flag")
    assert stop.value.code == 2


def test_analyze_is_quick(tmp_path, monkeypatch, capsys):
    s = np.arange(1, 100_001)
    lines = log_lines(s, 1.5 + 8 * s**-0.3)
    path = write_log(tmp_path, sum((lines[i : i + 50] + val_lines(2.0) for i in range(0, len(lines), 50)), []))
    start = time.process_time()  # not the clock on the wall: the machine may be busy
    assert analyze_here(monkeypatch, capsys, path)[0] == 0
    assert time.process_time() - start < 8


# ---- models


def test_analyze_variance_shares():
    rng = np.random.default_rng(0)
    n, t = 60, 50
    story, place, token = rng.normal(size=(n, 1, 1, 1)), rng.normal(size=(1, t, 1, 1)), rng.normal(size=(n, t, 1, 1))
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 2, 1)):
        parts = [w * x / x.std() for w, x in zip(weights, (story, place, token))]
        share = analyze.variance_shares(sum(parts) + np.zeros((n, t, 2, 3)))
        want = np.square(weights) / np.square(weights).sum()
        assert share.shape == (3, 2, 3) and np.abs(share.sum(0) - 1).max() < 1e-9
        assert np.abs(share - want[:, None, None]).max() < 0.03, weights
    # Pure noise of few stories and positions: the means' own chance variance must not count as theirs.
    noise = analyze.variance_shares(rng.normal(size=(12, 10, 500, 3)))
    assert noise[0].mean() < 0.045 and noise[1].mean() < 0.045  # uncorrected: 1/10 and 1/12 of the whole
    assert np.isfinite(analyze.variance_shares(np.ones((n, t, 2, 3)))).all()  # a signal that never moves


def test_analyze_attention_entropy():
    ids = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
    model = scan_model()
    entropy = analyze.attention_entropy(model, ids)
    assert entropy.shape == (2, 2, 2, 20) and np.abs(entropy[..., 0]).max() < 1e-6  # one token: nowhere else to look
    rises = model.signals(ids)[0, :, :, 1].T.numpy()[:, None] < 1  # (L, 1, T)
    assert rises.any() and not rises.all()
    assert np.where(rises, entropy[0] >= entropy[1] - 1e-5, entropy[0] <= entropy[1] + 1e-5).all()
    # Independently: row by row from the first block's weights.
    with torch.no_grad():
        q, k, _ = model.blocks[0].qkv(model.blocks[0].attn_norm(model.embeddings(ids))).double().chunk(3, -1)
        beta = model.signals(ids)[0, :, 0, 1].double()
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            for t in range(20):
                for j, b in enumerate((beta[t], 1.0)):
                    p = (b * (k[0, : t + 1, part] @ q[0, t, part]) / math.sqrt(8)).softmax(0)
                    assert abs(entropy[j, 0, head, t] + float((p * p.log()).sum())) < 1e-4
    # Without queries attention is even.
    with torch.no_grad():
        model.blocks[1].qkv.weight[:16] = 0
    np.testing.assert_allclose(analyze.attention_entropy(model, ids)[:, 1], np.log(np.arange(1, 21)) +
                               np.zeros((2, 2, 20)), atol=1e-5)
    assert not any(block.qkv._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("salience", ["causal", "global", "reactive"])
def test_analyze_ablations(salience):
    model = scan_model(salience=salience)
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randint(257, (2, 32), generator=g), torch.randint(257, (2, 32), generator=g)) for _ in range(3)]
    loss, s = analyze.ablations(model, batches)
    names = [f"{name} {how}" for how in ("mean", "neutral") for name in (*SIGNALS, "all")]
    assert list(loss) == ["as trained", *names, *["prefix only"] * (salience == "global")]
    assert s.shape == (6, 32, 2, 3)
    plain = ModulatedLM(NCNConfig(**{**vars(model.config), "signals": ()})).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("controller")})
    with torch.no_grad():
        for i, (x, y) in enumerate(batches):
            assert abs(loss["as trained"][i] - model(x, y).task.item()) < 1e-6
            assert abs(loss["all neutral"][i] - plain(x, y).task.item()) < 1e-5
            if salience == "global":
                assert abs(loss["prefix only"][i] - model(x, y, salience="causal").task.item()) < 1e-6
                assert abs(loss["prefix only"][i] - loss["as trained"][i]) > 1e-5
    # One at a time: pinning the gate leaves gain and precision alone, so it differs from pinning all.
    assert len({round(float(v[0]), 6) for v in loss.values()}) == len(loss)
    # A controller that never moves is worth nothing beyond its mean.
    with torch.no_grad():
        model.controller.layer2.weight.zero_()
    loss, _ = analyze.ablations(model, batches)
    assert all(np.abs(loss[f"{name} mean"] - loss["as trained"]).max() < 1e-5 for name in SIGNALS)
    only = analyze.ablations(scan_model(signals=("gate",)), batches)[0]
    assert list(only) == ["as trained", "gate mean", "gate neutral"]


@pytest.mark.parametrize("signal, silent", [("gain", ("attn", "qkv", "ffn")), ("gate", ("ffn",))])
def test_analyze_closed_branches_get_no_gradient(signal, silent):
    """Gradient shielding (Eq. 17) at its limit: gain 0 (or gate 0) shields a branch's weights exactly."""
    model = scan_model()
    ids = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(1))

    def close(signals):
        signals = signals.clone()
        signals[:, :, 1, SIGNALS.index(signal)] = 0
        return signals

    model(ids[:, :-1], ids[:, 1:], edit=close).task.backward()
    for layer, block in enumerate(model.blocks):
        for name, p in block.named_parameters():
            if layer == 1 and name.startswith(silent):
                assert p.grad is None or p.grad.count_nonzero() == 0, name
            else:
                assert p.grad.count_nonzero() > 0, (layer, name)


def test_analyze_gradients_and_shielding():
    model = scan_model()
    x = torch.randint(257, (5, 17), generator=torch.Generator().manual_seed(2))
    signals, norms, losses = analyze.gradients(model, x[:, :-1], x[:, 1:])
    assert signals.shape == (5, 2, 3) and norms.shape == (5, 2, 2) and losses.shape == (5,)
    assert (norms[..., 0] > norms[..., 1]).all() and all(p.grad is None for p in model.parameters())
    model(x[3:4, :-1], x[3:4, 1:]).task.backward()
    ffn = [p.grad.flatten() for name, p in model.blocks[1].named_parameters() if name.startswith("ffn_")]
    assert abs(torch.cat(ffn).norm().item() / norms[3, 1, 1] - 1) < 1e-5
    np.testing.assert_allclose(signals[3], model.signals(x[3:4, :-1])[0].mean(0).numpy(), rtol=1e-5)
    # A norm that is the signal times a constant correlates perfectly; a constant signal has no correlation.
    signals[:, 0, 2] = 1.0
    r = analyze.shielding(signals, 3 * signals[..., [0, 2]])
    assert np.isnan(r[0, 1]) and np.allclose(r[[0, 1, 1], [0, 0, 1]], 1)


@pytest.mark.parametrize("config", [{"salience": "global"}, {"signals": ("precision",)}])
def test_analyze_scan_and_audit(tmp_path, monkeypatch, capsys, config):
    scan_data(tmp_path / "data")
    (tmp_path / "out").mkdir()
    scan_model(**config).save(tmp_path / "out" / "ckpt_best.pt", tokenizer="bytes", step=7)
    monkeypatch.chdir(tmp_path)
    status, out, err = analyze_here(monkeypatch, capsys, "--scan", "He paid $5,\nbut it was empty.", "--audit")
    assert status == 0 and not err
    for words in ("Specialisation", "Phasic", "story (tonic) / position / token", "Attention entropy", "as trained",
                  "gate below 0.5", "Gradient shielding"):
        assert words in out, words
    assert ("the leak is" in out) == (config.get("salience") == "global")
    for name in ("brain_scan.png", "attention_entropy.png", "audit.png"):
        assert png_width(tmp_path / "out" / name) == 1000
    # Without validation stories the scan still works, and says what it leaves out.
    monkeypatch.setattr(analyze, "save", lambda fig, *_: plt.close(fig))
    status, out, _ = analyze_here(monkeypatch, capsys, "--scan", "x" * 50, "--data", "nowhere")
    assert status == 0 and "Only the first 32" in out and "No shares" in out


def test_analyze_refuses_models_and_data(tmp_path, monkeypatch, capsys):
    def refused(*args):
        status, out, err = analyze_here(monkeypatch, capsys, *args)
        assert status == 2 and err.count("\n") == 1 and "wrote" not in out, (args, err)
        return err

    data, ckpt = scan_data(tmp_path / "data"), tmp_path / "ckpt.pt"
    assert "none.pt" in refused("--audit", "--ckpt", tmp_path / "none.pt")
    scan_model(signals=()).save(ckpt, tokenizer="bytes")
    assert "no controller" in refused("--scan", "Hello", "--ckpt", ckpt)
    assert "no controller" in refused("--audit", "--ckpt", ckpt, "--data", data)
    scan_model().save(ckpt, tokenizer="bytes")
    assert "no tokens" in refused("--scan", "", "--ckpt", ckpt)
    (data / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 50257}))
    assert "--data" in refused("--audit", "--ckpt", ckpt, "--data", data)
    (data / "meta.json").write_text("{")
    refused("--audit", "--ckpt", ckpt, "--data", data)
    refused("--audit", "--ckpt", ckpt, "--data", tmp_path / "nowhere")


def test_analyze_perplexity_ticks():
    """Whatever the range, the right axis has a few round ticks, each at the height of its loss."""
    for low, high in ((4.847, 4.893), (1.38, 1.64), (2.23, 2.59), (1, 11), (1, 3.9), (1, 4.1), (0.01, 0.02), (-2, 25)):
        fig, ax = plt.subplots()
        ax.set_ylim(low, high)
        analyze.perplexity_axis(ax, {"future": False})
        twin = fig.axes[1]
        ticks, names = twin.get_yticks(), [float(t.get_text().replace(",", "")) for t in twin.get_yticklabels()]
        plt.close(fig)
        assert 4 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high, (low, high)
        assert twin.get_ylim() == (low, high)
        np.testing.assert_allclose(np.exp(ticks), names, rtol=1e-4)


def test_analyze_labels():
    tokenizer = get_tokenizer("bytes")
    assert [analyze.label(t, tokenizer) for t in b" a\n$"] == ["·", "a", "↵", "$"]
    assert len(analyze.label(200, tokenizer)) == 1  # a byte that is no text by itself


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: g++ compiles the very same kernels.cu for the CPU behind a shim that runs one real thread per CUDA thread, and
# the launcher cpu_threads() takes the place of the GPU's.

# ---- CUDA on CPU threads.

SHIM = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>
#define __global__
#define __device__
#define __shared__ static          // one block runs at a time: its shared memory is everybody's
#define __launch_bounds__(threads)
struct dim { unsigned x = 0, y = 0; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
thread_local dim threadIdx, blockIdx;
dim blockDim, gridDim;

std::unique_ptr<std::barrier<>> of_block;
std::vector<std::unique_ptr<std::barrier<>>> of_warp_lanes;
float lanes[64][32];

const int removed = getenv("NCN_REMOVED_BARRIER") ? atoi(getenv("NCN_REMOVED_BARRIER")) : -1;
inline void __syncthreads(int which = -2) { if (which != removed) of_block->arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float v, int other) {
    unsigned thread = threadIdx.y * blockDim.x + threadIdx.x, warp = thread / 32, lane = thread % 32;
    lanes[warp][lane] = v;
    of_warp_lanes[warp]->arrive_and_wait();
    v = lanes[warp][lane ^ other];
    of_warp_lanes[warp]->arrive_and_wait();
    return v;
}
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float half_to_float(unsigned short h) {
    int e = h >> 10 & 31, m = h & 1023;
    float x = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return h >> 15 ? -x : x;
}
inline unsigned short float_to_half(float x) {   // nearbyint rounds to nearest, ties to even
    unsigned short sign = __float_as_int(x) < 0 ? 0x8000 : 0;
    float a = fabsf(x);
    if (a != a) return 0x7fff;
    if (a >= 65520) return sign | 0x7c00;
    int e = -13;                                 // a = steps * 2^(e - 11); below 2^-14 the steps stay the same
    if (a >= 0x1p-14f) frexpf(a, &e);
    int steps = nearbyintf(ldexpf(a, 11 - e));
    return sign | (steps + ((e + 13) << 10));    // a step count of 2048 carries into the exponent by itself
}

#include "kernels.cu"

typedef unsigned long long u64;
template <class A> A take(u64*& word) { A a; memcpy(&a, word, sizeof a); word += sizeof(a) / 8; return a; }
template <class... A> std::function<void(u64*)> kernel(void (*f)(A...)) {
    return [f](u64* words) { std::apply(f, std::tuple<A...>{take<A>(words)...}); };
}
std::function<void(u64*)> table[] = {KERNELS};

// The file holds: which kernel, grid, block, number of words, the words, number of memory blocks, number of pointers;
// per memory block its size; per pointer its word and its memory block (the word then holds the offset in it); the
// memory. Memory is allocated to the byte, so that the address sanitizer sees every step beyond, and written back.
int main(int, char** argv) {
    FILE* file = fopen(argv[1], "r+b");
    auto number = [&] { u64 n; if (fread(&n, 8, 1, file) != 1) exit(3); return n; };
    u64 which = number();
    gridDim.x = number(), gridDim.y = number(), blockDim.x = number(), blockDim.y = number();
    std::vector<u64> words(number());
    for (u64& w : words) w = number();
    std::vector<u64> sizes(number()), pointers(2 * number());
    for (u64& s : sizes) s = number();
    for (u64& p : pointers) p = number();
    long start = ftell(file);
    std::vector<char*> memory;
    for (u64 s : sizes) {
        memory.push_back((char*)malloc(s));
        if (fread(memory.back(), 1, s, file) != s) exit(3);
    }
    for (u64 p = 0; p < pointers.size(); p += 2) words[pointers[p]] += (u64)memory[pointers[p + 1]];

    unsigned threads = blockDim.x * blockDim.y;
    of_block = std::make_unique<std::barrier<>>(threads);
    for (unsigned w = 0; w < threads; w += 32) of_warp_lanes.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::jthread> team;
    for (unsigned t = 0; t < threads; t++) team.emplace_back([&, t] {
        threadIdx = {t % blockDim.x, t / blockDim.x};
        for (u64 b = 0; b < (u64)gridDim.x * gridDim.y; b++) {
            blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x)};
            table[which](words.data());
            __syncthreads();   // the next block takes over the shared memory
        }
    });
    team.clear();   // joins
    fseek(file, start, SEEK_SET);
    for (size_t m = 0; m < memory.size(); m++) fwrite(memory[m], 1, sizes[m], file), free(memory[m]);
    return fclose(file);
}
"""


CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
INSTANCES = {"": [n for t in kernels._TYPES.values() for n in kernels._instances(t)],   # by sanitizer
            "thread": kernels._instances("bf16"), "address": kernels._instances("bf16")}


@functools.cache
def shim_builds():
    """kernels.cu for CPU threads: plain, and under each sanitizer. All three compilers start at once -> the folder
    that holds the programs, and sanitizer -> (program, its compiler)."""
    if not shutil.which("g++"):
        pytest.skip("no g++: kernels.cu cannot be run on the CPU")
    folder, builds, count = tempfile.TemporaryDirectory(prefix="ncn_kernels_"), {}, iter(range(99))
    source = re.sub(r"__syncthreads\(\)", lambda _: f"__syncthreads({next(count)})", kernels._SOURCE.read_text())
    Path(folder.name, "kernels.cu").write_text(source)
    for sanitizer, names in INSTANCES.items():
        program = Path(folder.name, f"run_{sanitizer}")
        text = SHIM.replace("KERNELS", ", ".join(f"kernel({n})" for n in names))
        program.with_suffix(".cpp").write_text(text)
        command = ["g++", "-std=c++20", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
                   "-fno-strict-aliasing", "-o", program, program.with_suffix(".cpp")]
        command += [f"-fsanitize={sanitizer}"] if sanitizer else []
        builds[sanitizer] = program, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return folder, builds


def cpu_threads(sanitizer="", removed_barrier=None):
    """A launcher, like kernels._cuda's, that runs each kernel in a process of its own on CPU threads."""
    folder, builds = shim_builds()
    program, compiler = builds[sanitizer]
    if compiler.poll() is None or compiler.stderr:
        errors = compiler.communicate()[1]
        compiler.stderr = None
        assert compiler.returncode == 0 and not errors, errors
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    if removed_barrier is not None:
        environment["NCN_REMOVED_BARRIER"] = str(removed_barrier)

    def launch(name, grid, block, args):
        words, starts = kernels._pack(args)
        base, words, storages, pointers = starts[0], list(words), {}, []
        for arg, start in zip(args, starts):
            if isinstance(arg, torch.Tensor):   # an address becomes an offset in the memory block of its storage
                storage, word = arg.untyped_storage(), (start - base) // 8
                storages.setdefault(storage.data_ptr(), storage)
                pointers += [word, list(storages).index(storage.data_ptr())]
                words[word] -= storage.data_ptr()
        memory = [np.ctypeslib.as_array((ctypes.c_uint8 * s.nbytes()).from_address(a)) for a, s in storages.items()]
        head = [INSTANCES[sanitizer].index(name), *grid, *block, len(words), *words, len(memory), len(pointers) // 2,
                *map(len, memory), *pointers]
        file = Path(folder.name, "launch")
        file.write_bytes(struct.pack(f"{len(head)}q", *head) + b"".join(m.tobytes() for m in memory))
        done = subprocess.run([program, file], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{name} {grid} {block}: {done.stderr[:3000]}"
        back = np.fromfile(file, np.uint8, offset=8 * len(head))
        for m in memory:
            m[:], back = back[:len(m)], back[len(m):]
    return launch


# ---- Values.

@pytest.fixture
def poison():
    """torch.empty is filled with NaN: a number that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all() and torch.ones(9).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_rounded(got, want, dtype, what):
    """Equal up to one rounding to got's dtype of a result that is good to fp32. Where matrix products in half precision
    come before (linear_ce), up to a few."""
    want = want.double()
    rounding = torch.finfo(got.dtype).eps / 2 if got.is_floating_point() else 0
    scale = max(1.0, want.where(want.isfinite(), 0).abs().max().item())   # of 1: where large terms cancel
    if "linear_ce" in what:
        rounding, scale = 0, scale * (1 + 4 * torch.finfo(dtype).eps / 4e-6)
    bound = 1.02 * rounding * want.abs() + 4e-6 * scale + (6e-8 if got.dtype == torch.float16 else 1e-30)
    wrong = ~(((got.double() - want).abs() <= bound) | (got.double() == want) | (got.isnan() & want.isnan()))
    assert got.shape == want.shape and not wrong.any(), (what, wrong.sum(), got[wrong][:5], want[wrong][:5])


def compare_kernels(monkeypatch, device, launch, rows, d, dtype, seed=0, only=""):
    monkeypatch.setitem(kernels._launchers, device, launch)
    for name, (function, reference, inputs, _) in kernels.cases(rows, d, dtype, device, seed).items():
        if only in name:
            for got, want in zip(kernels.step(function, inputs)(), kernels.exact(reference, inputs), strict=True):
                assert_rounded(got, want, dtype, f"{name} {rows} x {d} {dtype}")


EVERY_DTYPE = pytest.mark.parametrize("dtype", list(kernels._TYPES), ids=str)
KERNEL_SHAPES = ((1, 1), (37, 7), (300, 31), (19, 256), (6, 257), (2, 515))   # rows, width


@EVERY_DTYPE
@pytest.mark.parametrize("path", ["twin", "cpu threads"])
def test_kernel_values(path, dtype, monkeypatch, poison):
    rng = np.random.default_rng(list(kernels._TYPES).index(dtype))
    shapes = KERNEL_SHAPES + tuple((int(rng.integers(1, 40)), int(rng.integers(1, 120))) for _ in range(2))
    launch = cpu_threads() if path != "twin" else "twin"
    for seed, (rows, d) in enumerate(shapes):
        compare_kernels(monkeypatch, CPU, launch, rows, d, dtype, seed)


@pytest.mark.parametrize("name, rows, d", [("rms", 6, 4100), ("modulate", 3, 5001), ("softmax", 3, 1100)])
def test_kernel_rows_wider_than_registers(name, rows, d, monkeypatch, poison):
    compare_kernels(monkeypatch, CPU, cpu_threads(), rows, d, torch.bfloat16, only=name)   # softmax: 4 d + 1 logits


def test_kernel_widest_row(monkeypatch, poison):
    x, w = torch.randn(1, 65536, dtype=torch.float16), torch.ones(65536)
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads())
    assert_rounded(kernels.rms_norm(x, w), x.double() / x.double().square().mean().add(1e-5).sqrt(), x.dtype, "wide")


@EVERY_DTYPE
@pytest.mark.parametrize("path", ["twin", "cpu threads"])
def test_kernel_extreme_values(path, dtype, monkeypatch, poison):
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads() if path != "twin" else "twin")
    V, inf, nan = 71, float("inf"), float("nan")
    rows = torch.stack([torch.full((V,), 1e4), torch.full((V,), -1e4), torch.zeros(V),
                        torch.where(torch.arange(V) == 5, 1e4, -1e4), torch.where(torch.arange(V) == 7, 0.0, -inf),
                        torch.linspace(-1e4, 1e4, V), torch.where(torch.arange(V) < 70, -inf, 3.0), torch.randn(V),
                        torch.full((V,), -inf), torch.where(torch.arange(V) == 3, nan, 1.0)]).to(dtype)
    for target in (5, 7, 70, -1):
        targets = torch.full((len(rows),), target)
        want = rows.double().log_softmax(1)
        p = (want.exp() - F.one_hot(targets.clamp(min=0), V)) * (target >= 0)
        logits = torch.full((len(rows), V + 9), 3.0, dtype=dtype)   # rows further apart than they are wide
        logits[:, :V] = rows
        loss, gradient = kernels._softmax_loss(logits[:, :V], targets, True)
        good = slice(0, 8 if target >= 0 else None)                 # the last two rows: NaN where the target counts
        assert_rounded(loss, -want[:, target] if target >= 0 else torch.zeros(len(rows)), dtype, "softmax")
        assert_rounded(gradient[:8], p[:8], dtype, "softmax")
        assert (logits[:, V:] == 3).all() and (good.stop is None or gradient[8].isnan().all())
        loss_alone, _ = kernels._softmax_loss(rows.clone(), targets, False)
        assert torch.equal(loss_alone[good], loss[good])

    z = torch.tensor([[-1e4] * 3, [1e4] * 3, [inf] * 3, [-inf] * 3, [0.0] * 3, [nan] * 3]).to(dtype).requires_grad_()
    signals, deviation = kernels.actuate(z)
    assert signals.dtype == deviation.dtype == torch.float32 and deviation.isnan().all()
    want = torch.tensor([[0, 0.01, 0], [2, 4, 1], [2, 4, 1], [0, 0.01, 0], [1, 0.7031472, 0.5], [nan] * 3])
    assert_rounded(signals.detach(), want, torch.float32, "actuate")
    slope, = torch.autograd.grad(signals[:5].sum() + 0 * deviation.nan_to_num().sum(), z)
    assert not slope[:4].any() and torch.allclose(slope[4].float(), torch.tensor([0.5, 0.5, 0.25]))

    x = torch.tensor([[0.0] * 9, [6e4] * 9, [6e-8] * 9]).to(dtype)
    y = kernels.rms_norm(x, torch.ones(9))
    assert_rounded(y, x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt(), dtype, "rms_norm")


@pytest.mark.parametrize("path", ["twin", "cpu threads"])
def test_kernel_views_and_mixed_types(path, monkeypatch, poison):
    """Rows at odd addresses, a transposed input, a bfloat16 branch on a float residual, (B, T) leading dimensions."""
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads() if path != "twin" else "twin")
    base = torch.randn(3 * 4 * 32 + 1)
    x, w = base[1:].view(3, 4, 32), torch.randn(33)[1:]
    norm = lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    for view in (x, x.transpose(0, 1), x.transpose(1, 2)[..., :4], x.bfloat16()[..., 1:]):
        inputs = [view.detach().requires_grad_(), w[:view.shape[-1]].clone().requires_grad_()]
        for got, want in zip(kernels.step(kernels.rms_norm, inputs)(), kernels.exact(norm, inputs)):
            assert_rounded(got, want, view.dtype, "rms_norm")
    y, residual, z = torch.randn(2, 5, 33).bfloat16(), torch.randn(2, 5, 33), torch.randn(2, 5, 4, 3)
    for pair in ((y, residual), (y, residual.bfloat16()), (y.half().transpose(0, 1), residual.half().transpose(0, 1))):
        inputs = [t.detach().requires_grad_() for t in (*pair, z if pair[0].shape[0] == 2 else z.transpose(0, 1))]
        for gate in (None, 2):
            view = lambda s, k: None if k is None else s[:, :, 1, k:k + 1]
            run = lambda y, r, s: kernels.modulate(y, r, view(s, 0), view(s, gate))
            plain = lambda y, r, s: r + view(s, 0) * (1 if gate is None else view(s, gate)) * y
            for got, want in zip(kernels.step(run, inputs)(), kernels.exact(plain, inputs)):
                assert_rounded(got, want, got.dtype, "modulate")


@pytest.mark.parametrize("path", ["twin", "cpu threads"])
def test_kernel_cache_strides_and_positions(path, monkeypatch):
    """Against plain slicing, over the whole of the memory behind the cache: nothing else is written."""
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads() if path != "twin" else "twin")
    B, h, S, d = 2, 3, 11, 20
    for T, at, dtype in ((1, 0, torch.float32), (1, 10, torch.bfloat16), (4, 7, torch.float16), (11, 0, torch.float32)):
        qkv = torch.randn(B, T, 3 * h * d).to(dtype)
        k, v = (t.view(B, T, h, d).transpose(1, 2) for t in qkv.split(h * d, dim=2)[1:])
        for swap in ((0, 0), (1, 2), (2, 3)):   # a window in the memory, with its dimensions in three orders
            permute = lambda m: m.transpose(*swap)[:, 1:4, 2:13]
            memory = [torch.randn(B, 5, 15, d).to(dtype).transpose(*swap).contiguous() for _ in "kv"]
            want = [m.clone() for m in memory]
            for m, new in zip(want, (k, v)):
                permute(m)[:, :, at:at + T] = new
            kernels.write_cache(*map(permute, memory), k, v, torch.tensor([at] if T == 4 else at))
            assert all(map(torch.equal, memory, want)), (T, at)
    if path != "twin":   # beyond the end: what fits is written, the rest goes nowhere
        cache, k = torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 3, 8)
        kernels.write_cache(cache, cache.clone(), k, k, torch.tensor(2))
        assert cache.sum((0, 1, 3)).tolist() == [0, 0, 8, 8]


# ---- Races and bounds. bfloat16 takes every path of the templates: vectors, single loads, wider residual.

@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernel_races_and_bounds(sanitizer, monkeypatch):
    wide = ((2, 4100, "rms"),) if sanitizer == "address" else ()   # 512 threads: slow to watch, no new barrier
    for rows, d, only in ((3, 7, ""), (19, 40, ""), (3, 70, ""), (6, 257, "rms"), (2, 257, "modulate"), *wide):
        compare_kernels(monkeypatch, CPU, cpu_threads(sanitizer), rows, d, torch.bfloat16, only=only)


@pytest.mark.parametrize("barrier", range(kernels._SOURCE.read_text().count("__syncthreads();")))
def test_kernel_every_barrier_matters(barrier, monkeypatch):
    with pytest.raises(AssertionError, match="data race"):
        for rows, d in ((19, 40), (6, 257)):
            compare_kernels(monkeypatch, CPU, cpu_threads("thread", barrier), rows, d, torch.bfloat16, only="rms")


def test_kernel_address_sanitizer_sees_one_byte(monkeypatch):
    launch = cpu_threads("address")
    x = torch.zeros(8, dtype=torch.bfloat16)   # 9 numbers are claimed, 8 are there
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        launch("rms_norm_forward<bf16>", (1, 1), (32, 8),
               (torch.empty_like(x), torch.zeros(1), x, torch.zeros(9), 1, 9, 1e-5))


# ---- The GPU compilers.

def all_instances():
    return f"void* instances[] = {{{', '.join(f'(void*){n}' for n in INSTANCES[''])}}};\n"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_kernel_nvcc(tmp_path):
    source = tmp_path / "all.cu"
    source.write_text(kernels._SOURCE.read_text() + all_instances())
    command = ["nvcc", "-cubin", "-std=c++17", "-Xptxas", "-v", "-o"]
    jobs = {sm: subprocess.Popen([*command, tmp_path / f"{sm}.cubin", f"-arch=sm_{sm}", source], stderr=subprocess.PIPE,
                                 text=True) for sm in (75, 80, 90)}
    for sm, job in jobs.items():
        log = job.communicate()[1]
        assert job.returncode == 0 and "warning" not in log, log
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert len(spills) == len(INSTANCES[""]) and set(spills) == {("0", "0")}, log
        # 512 threads at 64 registers: two blocks fill a processor's 65,536
        assert max(map(int, re.findall(r"Used (\d+) registers", log))) <= 64, (sm, log)


@pytest.mark.parametrize("major", ["12", "13"])
def test_kernel_nvrtc(major):
    """The compiler that is used at run time, with no include path. It needs no GPU."""
    try:
        nvrtc = kernels._nvrtc(major)
    except OSError as error:
        pytest.skip(f"no NVRTC {major}: {error}")
    symbols, cubin = kernels._compile(nvrtc, kernels._instances("bf16"), "90")
    assert cubin[:4] == b"\x7fELF" and set(symbols) == set(kernels._instances("bf16"))
    assert all(s.encode() in cubin for s in symbols.values())
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        kernels._compile(nvrtc, ["no_such_kernel<float>"], "90")


# ---- The road to the GPU, with a driver that only writes down what it is asked.

class FakeDriver:
    """Stands in for libcuda: notes every call; a launch is decoded as the GPU would read it."""

    def __init__(self, fail=None):
        self.calls, self.fail = [], fail

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if name == "cuModuleGetFunction":
                args[0]._obj.value = 1000 + self.calls.count(name)
            if name == "cuLaunchKernel":
                self.launch = (args[0].value, *args[1:8], args[8].value)
                self.words = [ctypes.cast(p, ctypes.POINTER(ctypes.c_int64))[0] for p in args[9]]
                self.strides = list(ctypes.cast(args[9][-1], ctypes.POINTER(ctypes.c_int64))[:4])
            return 1 if name == self.fail else 0
        return call


def test_kernel_launch(monkeypatch):
    monkeypatch.setattr(kernels, "_cubin", lambda narrow, arch: ({n: n for n in kernels._instances(narrow)}, b""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0x123456789a}))
    driver = FakeDriver()
    launch = kernels._cuda(GPU, driver)
    assert driver.calls[:3] == ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuModuleLoadData"]
    loaded = driver.calls.count("cuModuleGetFunction")
    assert loaded == len(kernels._instances("float")) and "cuLaunchKernel" not in driver.calls
    x, args = torch.zeros(3), (1 << 40, 1e-5, None, -7, (1, 1 << 33, 3, 4))
    for _ in range(2):   # a second launch loads nothing
        driver.calls.clear()
        launch("softmax_loss<float>", (5, 2), (64, 4), (x, *args))
        assert driver.calls == ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    function = 1001 + kernels._instances("float").index("softmax_loss<float>")
    assert driver.launch == (function, 5, 2, 1, 64, 4, 1, 0, 0x123456789a)
    assert driver.words == [x.data_ptr(), 1 << 40, struct.unpack("q", struct.pack("d", 1e-5))[0], 0, -7, 1]
    assert driver.strides == [1, 1 << 33, 3, 4]
    driver.calls.clear()
    launch("modulate_forward<bf16, float>", (1, 1), (32, 8), (x,))   # the second type is loaded when it is met
    assert driver.calls.count("cuModuleLoadData") == 1 and driver.calls[-1] == "cuCtxPopCurrent_v2"
    driver.fail, driver.calls = "cuLaunchKernel", []
    with pytest.raises(RuntimeError, match="driver error 1"):
        launch("softmax_loss<float>", (1, 1), (32, 1), (x,))
    assert driver.calls[-1] == "cuCtxPopCurrent_v2"   # the context stack is left as it was


def test_kernel_failed_start_falls_back(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert kernels._start(GPU) == "not an NVIDIA GPU"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: not found\nmore")))
    assert kernels._start(GPU).endswith("not found")


def test_kernel_grid():
    x = torch.empty(0)
    for width in (*range(1, 700), 4096, 4097, 50257, 65536):
        (blocks, one), (team, teams) = kernels._grid(x, 10 ** 12, width)
        assert one == 1 and 1 <= blocks <= 32 and team * teams <= 512 and team in (32, 64, 128, 256, 512)
        assert team == 512 or team * 8 >= width and (team == 32 or team * 4 < width)   # the row fits, tightly
        assert (teams == 8) == (team == 32)
        assert kernels._grid(x, 1, width)[0] == (1, 1)


def test_kernel_cubin_is_kept_on_disk(tmp_path, monkeypatch):
    source = tmp_path / "kernels.cu"
    source.write_text("// one")
    compiled = []
    monkeypatch.setattr(kernels, "_SOURCE", source)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "_nvrtc", lambda major: major)
    result = {"name": "symbol"}, b"\x7fELF\n\n\x00"
    monkeypatch.setattr(kernels, "_compile", lambda *a: compiled.append(a) or result)
    for arch in ("90", "90", "80"):
        assert kernels._cubin("float", arch) == result
    assert [c[2] for c in compiled] == ["90", "80"]
    source.write_text("// two")
    kernels._cubin("float", "90")
    assert len(compiled) == 3 and len(list((tmp_path / "__pycache__").iterdir())) == 3   # no half-written file is left
    for file in (tmp_path / "__pycache__").iterdir():
        file.write_bytes(b"{damaged")
    kernels._cubin("float", "90")
    assert len(compiled) == 4


def test_kernel_eager_where_it_must(monkeypatch):
    """Odd types, empty tensors, two devices, torch.compile: the twin, whatever launcher there is."""
    def never(*_):
        raise AssertionError("launched")
    monkeypatch.setitem(kernels._launchers, CPU, never)
    with pytest.raises(AssertionError, match="launched"):
        kernels.rms_norm(torch.ones(2, 3), torch.ones(3))
    kernels.rms_norm(torch.ones(2, 3, dtype=torch.float64), torch.ones(3))
    kernels.rms_norm(torch.ones(0, 3), torch.ones(3))
    kernels.rms_norm(torch.ones(2, 3), torch.ones(1))   # a weight shorter than the row would be read beyond its end
    with pytest.raises(RuntimeError):
        kernels.write_cache(*torch.zeros(2, 1, 1, 4, 3), *torch.zeros(2, 1, 2, 1, 3), torch.tensor(0))   # 2 heads into 1
    assert kernels.actuate(torch.zeros(2, 4, 3, dtype=torch.float64))[0].dtype == torch.float32
    x, gain = torch.ones(2, 3), torch.ones(2, 1)
    kernels.modulate(x, x, gain.half())
    kernels.modulate(x, x.half(), gain)
    kernels.modulate(x, x, torch.ones(1, 1))
    cache = torch.zeros(1, 1, 4, 3)
    kernels.write_cache(cache, cache.clone(), x[None, None].half(), x[None, None].half(), torch.tensor(1))
    kernels.write_cache(cache, cache.clone(), x[None, None], x[None, None], torch.tensor(1, dtype=torch.int32))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    kernels.rms_norm(torch.ones(2, 3), torch.ones(3))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.path() == "kernels: eager (no GPU)"


# ---- linear_cross_entropy.

@pytest.mark.parametrize("path", ["twin", "cpu threads"])
def test_kernel_linear_cross_entropy(path, monkeypatch, poison):
    """fp32 against F.cross_entropy to 1e-5, over several chunks; ignored targets; no valid target; no gradient."""
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads() if path != "twin" else "twin")
    V, d = (50257, 8) if path == "twin" else (211, 8)
    monkeypatch.setattr(kernels, "CHUNK", 150 * V * 4)   # 400 rows: three chunks
    h, w = torch.randn(2, 200, d, requires_grad=True), (torch.randn(V, d) / 3).requires_grad_()
    targets = torch.randint(-1, V, (2, 200))
    targets[0, :9] = -1
    want = F.cross_entropy((h.double() @ w.double().T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss = kernels.linear_cross_entropy(h, w, targets)
    assert loss.dtype == torch.float32 and loss.shape == () and abs(loss.item() / want.item() - 1) < 1e-6
    both = [torch.autograd.grad(3 * out, (h, w), retain_graph=True) for out in (loss, want, loss)]   # loss: twice
    for got, exact, again in zip(*both, strict=True):
        assert (got - exact).norm() <= 1e-5 * exact.norm() and torch.equal(got, again)
    only_h, = torch.autograd.grad(kernels.linear_cross_entropy(h, w.detach(), targets), h)
    assert torch.allclose(3 * only_h, both[0][0], rtol=1e-5)
    none = kernels.linear_cross_entropy(h, w, torch.full_like(targets, -1))
    assert none.item() == 0 and not any(g.any() for g in torch.autograd.grad(none, (h, w)))
    with torch.no_grad():
        assert kernels.linear_cross_entropy(h, w, targets).item() == loss.item()
        spread = targets.flatten().int().repeat_interleave(2)[::2]   # every other number of a narrower type
        assert kernels.linear_cross_entropy(h.flatten(0, 1), w, spread).item() == loss.item()


@pytest.mark.parametrize("path", ["twin", "cpu threads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernel_linear_cross_entropy_autocast(dtype, path, monkeypatch, poison):
    """Half precision products, fp32 sums: small terms survive over many tokens, 1/N does not underflow."""
    monkeypatch.setitem(kernels._launchers, CPU, cpu_threads() if path != "twin" else "twin")
    N, V, d = (1000, 40000, 4) if path == "twin" else (400, 300, 4)
    monkeypatch.setattr(kernels, "CHUNK", 150 * V * 2)
    h, w = torch.randn(N, d, requires_grad=True), torch.randn(V, d, requires_grad=True)
    targets = torch.randint(0, 50, (N,))
    with torch.autocast("cpu", dtype=dtype):
        loss = kernels.linear_cross_entropy(h, w, targets)
    got = torch.autograd.grad(loss, (h, w))
    half = [t.detach().to(dtype).double().requires_grad_() for t in (h, w)]
    want = F.cross_entropy(half[0] @ half[1].T, targets)
    exact = torch.autograd.grad(want, half)
    assert loss.dtype == torch.float32 and abs(loss.item() / want.item() - 1) < 2e-3
    for g, e, source in zip(got, exact, (h, w)):
        assert g.dtype == source.dtype == torch.float32
        assert (g - e).norm() <= 4 * torch.finfo(dtype).eps * e.norm() and (g == 0).float().mean() < 1e-3


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.filterwarnings("ignore")
def test_kernel_under_torch_compile():
    def model(x, w, z, head, targets, cache, position):
        x = kernels.rms_norm(x, w)
        signals, deviation = kernels.actuate(z)
        x = kernels.modulate(x, x, signals[..., 0, :1], signals[..., 0, 2:])
        kernels.write_cache(cache, cache, x[:, None, :2], x[:, None, 2:4], position)
        return kernels.linear_cross_entropy(x, head, targets) + deviation.sum()

    inputs = [torch.randn(s, requires_grad=True) for s in ((2, 4, 16), (16,), (2, 4, 2, 3), (30, 16))]
    rest = torch.randint(-1, 30, (2, 4)), torch.zeros(2, 1, 6, 16), torch.tensor([3])
    plain = model(*inputs, *rest)
    compiled = torch.compile(model, fullgraph=True)(*inputs, *rest)
    assert torch.allclose(plain, compiled)
    for a, b in zip(torch.autograd.grad(plain, inputs), torch.autograd.grad(compiled, inputs)):
        assert torch.allclose(a, b, atol=1e-6)


def test_kernel_table(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_launchers", {})
    monkeypatch.setitem(sys.modules, "test_ncn", sys.modules[__name__])
    monkeypatch.setattr(kernels, "cases", lambda *a, all=kernels.cases: dict(list(all(7, 32, *a[2:]).items())[1:3]))
    kernels.main()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == kernels.path() and len([line for line in out if line[:1] in "23"]) == 6


def model_with_and_without_kernels(device, launch, monkeypatch):
    """Loss and every gradient of a small model, with the fused kernels and with the twins."""
    results = []
    for launcher in (launch, "twins"):
        monkeypatch.setitem(kernels._launchers, device, launcher)
        model = lively().to(device)
        ids = tokens(2, 13).to(device)
        model(ids[:, :-1], ids[:, 1:]).total.backward()
        results.append([model(ids).detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_kernel_model_on_cpu_threads(monkeypatch):
    model_with_and_without_kernels(CPU, cpu_threads(), monkeypatch)


# ---- On a GPU: the same cases.

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@EVERY_DTYPE
def test_kernel_on_gpu(dtype, monkeypatch, poison):
    assert kernels.path() == "kernels: fused CUDA"
    for seed, (rows, d) in enumerate(KERNEL_SHAPES + ((8192, 256), (333, 5000), (3, 16384))):
        compare_kernels(monkeypatch, GPU, kernels._launchers[GPU], rows, d, dtype, seed)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_model_on_gpu(monkeypatch):
    assert kernels.path() == "kernels: fused CUDA"
    model_with_and_without_kernels(GPU, kernels._launchers[GPU], monkeypatch)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_graph_replays_at_new_positions():
    """A captured write goes where the position on the device says at replay; other streams and views are respected."""
    cache = [torch.zeros(1, 2, 9, 16, device=GPU) for _ in "kv"]
    k, v = (torch.ones(1, 2, 1, 16, device=GPU) for _ in "kv")
    position = torch.zeros(1, dtype=torch.int64, device=GPU)
    kernels.write_cache(*cache, k, v, position)   # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.write_cache(*cache, k, v, position)
    for at in (4, 8, 2):
        position.fill_(at)
        k.fill_(at)
        graph.replay()
    assert cache[0][0, 1, :, 0].tolist() == [1, 0, 2, 0, 4, 0, 0, 0, 8]
    assert cache[1][0, 1, :, 0].tolist() == [1, 0, 1, 0, 1, 0, 0, 0, 1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_decode_step_replays_as_a_graph():
    """Greedy text on the GPU, over refills of the window, is the full pass's; sampled text does not depend on the batch."""
    model = lively().to(GPU)
    for text in (tokens(3, 4).to(GPU), tokens(1, 40).to(GPU)):
        made = model.generate(text, 60, temperature=0)
        for n in range(text.size(1), made.size(1)):
            logits = model(made[:, model.window_start(n) : n])[:, -1]
            drawn = logits.gather(1, made[:, n : n + 1])[:, 0]
            torch.testing.assert_close(drawn, logits.amax(-1), atol=1e-3, rtol=1e-4)  # ties may fall either way
    together = model.generate(tokens(1, 4).expand(6, -1).to(GPU), 40, temperature=3.0, seed=5)
    assert torch.equal(together[2:3], model.generate(tokens(1, 4).to(GPU), 40, temperature=3.0, seed=7))
