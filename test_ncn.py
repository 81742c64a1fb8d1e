"""The whole test suite: pytest -q. Needs no network, no GPU, and nothing outside this folder."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ncn
import sample as sampling
import train as training
from ncn import SIGNALS, ModulatedLM, NCNConfig, salience_pool, salience_step
from prepare import END, get_tokenizer

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
TINY = dict(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0, ncn_hidden=8, ncn_heads=2)


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
    """Token for token, over several refills of the window, from short prompts and from one longer than the window."""
    model = lively(salience=trained_as)
    for prompt in (tokens(3, 1), tokens(2, 5), tokens(1, 16), tokens(1, 40)):
        text = prompt
        for _ in range(60):
            logits = model(text[:, model.window_start(text.size(1)):], salience=salience)[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(model.generate(prompt, 60, temperature=0, salience=salience), text)
        assert len(text[0, -30:].unique()) > 3  # not stuck on one token, where any cache would look right


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


def test_sample_draws_the_stated_distribution():
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
