# SPDX-License-Identifier: Apache-2.0
"""`cached_step` against the same micro-batches through one graph, in float64: values, gradients, and what it leaves."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sslkernels import cached_step
from sslkernels.losses import clip_loss, nt_xent

N, WIDTH = 11, 6


class Towers(nn.Module):
    """An image and a text tower with dropout, and the scale and bias of their logits, as open_clip returns them."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, texts, *, shift=None):
        images = images if shift is None else images + shift
        out = {"image_features": self.image(images), "text_features": self.text(texts["tokens"])}
        return {**out, "logit_scale": self.logit_scale.exp()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def towers():
    torch.manual_seed(0)
    return Towers().double()


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(N, WIDTH, dtype=torch.float64, generator=generator)  # noqa: E731
    return draw(), {"tokens": draw()}


def plain(model, loss_fn, images, texts, micro_batch, **kwargs):
    """The micro-batches' forwards in turn, with a graph, then one loss of all."""
    parts = []
    for rows in torch.arange(N).split(micro_batch):
        parts.append(model(images[rows], {"tokens": texts["tokens"][rows]}, **kwargs))
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("image_features", "text_features")}
    loss = loss_fn(**whole, logit_scale=parts[0]["logit_scale"])
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("micro_batch", [1, 4, 10, 11, 100], ids=str)
def test_equals_one_graph_with_dropout_replayed(towers, pairs, micro_batch):
    other = copy.deepcopy(towers)
    torch.manual_seed(2)
    expected = plain(other, clip_loss, *pairs, micro_batch)
    after = torch.rand(3)
    torch.manual_seed(2)
    loss = cached_step(towers, clip_loss, *pairs, micro_batch=micro_batch)
    close(loss, expected)
    assert not loss.requires_grad
    close(gradients(towers), gradients(other))
    assert torch.equal(torch.rand(3), after)  # the second forward left no trace in the generator


def test_gradients_add_up(towers, pairs):
    other = copy.deepcopy(towers).eval()
    for _ in range(2):
        plain(other, clip_loss, *pairs, N)
    for micro_batch in (3, 4):
        cached_step(towers.eval(), clip_loss, *pairs, micro_batch=micro_batch)
    close(gradients(towers), gradients(other))


def test_the_model_never_sees_more_rows(towers, pairs):
    seen = []
    towers.image.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    cached_step(towers, clip_loss, *pairs, micro_batch=4)
    assert seen == [(4, False), (4, False), (3, False), (4, True), (4, True), (3, True)]


def test_keyword_and_shared_arguments(towers, pairs):
    other, shift = copy.deepcopy(towers).eval(), torch.tensor(0.7, dtype=torch.float64)
    plain(other, clip_loss, *pairs, N, shift=shift)
    cached_step(towers.eval(), clip_loss, *pairs, micro_batch=4, shift=shift)
    close(gradients(towers), gradients(other))


def test_parameters_of_the_loss_and_what_it_returns_besides():
    torch.manual_seed(0)
    model, temperature = nn.Linear(WIDTH, 4).double(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    views = torch.randn(2, N, WIDTH, dtype=torch.float64).unbind()
    both = lambda a, b: (model(a), model(b))  # noqa: E731
    loss, stats = nt_xent(*both(*views), temperature, return_stats=True)
    loss.backward()
    expected = [*gradients(model).values(), temperature.grad]
    model.zero_grad()
    temperature.grad = None
    found = cached_step(both, lambda *z: nt_xent(*z, temperature, return_stats=True), *views, micro_batch=4)
    close(found, (loss.detach(), stats))
    close([*gradients(model).values(), temperature.grad], expected)


def test_a_mean_that_the_model_returns_is_one_over_all_rows():
    torch.manual_seed(0)
    model, x = nn.Linear(WIDTH, 4).double(), torch.randn(N, WIDTH, dtype=torch.float64)

    def forward(x):
        z = model(x)
        return z, z.square().mean()

    whole = lambda z, penalty: z.logsumexp(0).sum() + penalty**2  # noqa: E731
    loss = whole(*forward(x))
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    close(cached_step(forward, whole, x, micro_batch=4), loss.detach())
    close(gradients(model), expected)


def test_a_generator_among_the_inputs_is_replayed():
    torch.manual_seed(0)
    model, x = nn.Linear(WIDTH, 4), torch.randn(N, WIDTH)
    generator, drawn = torch.Generator().manual_seed(3), []

    def forward(x, generator):
        drawn.append(torch.rand(x.shape, generator=generator))
        return model(x * drawn[-1])

    cached_step(forward, lambda z: z.logsumexp(0).sum(), x, generator, micro_batch=6)
    assert torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))
    assert torch.equal(
        torch.rand(2, generator=generator),
        torch.rand(N + 1, WIDTH, generator=torch.Generator().manual_seed(3)).flatten()[-WIDTH:][:2],
    )


def test_frozen_features_and_frozen_models(towers, pairs):
    towers.text.requires_grad_(False)
    cached_step(towers, clip_loss, *pairs, micro_batch=4)
    assert all(p.grad is None for p in towers.text.parameters())
    assert all(p.grad is not None for p in towers.image.parameters())
    towers.requires_grad_(False).zero_grad()
    cached_step(towers, clip_loss, *pairs, micro_batch=4)
    assert all(p.grad is None for p in towers.parameters())


def test_gradients_reach_inputs():
    x = torch.randn(N, WIDTH, dtype=torch.float64, requires_grad=True)
    x.logsumexp(0).sum().backward()
    expected, x.grad = x.grad, None
    cached_step(lambda x: x * 1.0, lambda z: z.logsumexp(0).sum(), x, micro_batch=4)
    close(x.grad, expected)


@pytest.mark.parametrize("cached", [False, True], ids=["one graph", "cached"])
def test_autocast(cached):
    """The casts of weights that autocast keeps for one context are made without a graph here, and wanted with one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(N, WIDTH)
    exact = copy.deepcopy(model).double()
    whole = lambda z: z.float().logsumexp(0).sum()  # noqa: E731
    exact(x.double()).logsumexp(0).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        if cached:
            cached_step(model, whole, x, micro_batch=4)
        else:
            whole(model(x)).backward()
    for p, q in zip(model.parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() < 2e-2 * q.grad.norm()


def test_scaler(towers, pairs):
    other = copy.deepcopy(towers)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    torch.manual_seed(2)
    expected = cached_step(other, clip_loss, *pairs, micro_batch=4)
    torch.manual_seed(2)
    close(cached_step(towers, clip_loss, *pairs, micro_batch=4, scaler=scaler), expected)
    for p, q in zip(towers.parameters(), other.parameters()):
        close(p.grad, 64 * q.grad)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.layers(x)


def test_batch_norm_is_refused_unless_of_the_micro_batch():
    torch.manual_seed(0)
    model, x = Normed().double(), torch.randn(12, WIDTH, dtype=torch.float64)
    whole = lambda z: z.logsumexp(0).sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"layers\.1 is batch norm in training mode"):
        cached_step(model, whole, x, micro_batch=4)
    other = copy.deepcopy(model)
    whole(torch.cat([other(part) for part in x.split(4)])).backward()
    cached_step(model, whole, x, micro_batch=4, batch_norm="micro_batch")
    close(gradients(model), gradients(other))
    for name, value in other.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], value), name
    cached_step(model.eval(), whole, x, micro_batch=4)


class Trainer:
    """No module, but holds one; `__call__` reaches it through a method."""

    def __init__(self, model):
        self.model, self.parts = model, {"encoder": [model]}

    @property
    def encoder(self):
        return self.model

    def encode(self, x):
        return self.model(x)

    def __call__(self, x):
        return self.encode(x)


GLOBAL = None  # the model that `by_a_global` calls


def by_a_global(x):
    return GLOBAL(x)


def functions_over(model):
    """All the ways that a function comes to the model."""
    trainer, models = Trainer(model), [model]

    def inner(x):
        return model(x)

    return {
        "closure": lambda x: model(x),
        "list": lambda x: models[0](x),
        "comprehension": lambda x: torch.cat([models[0](part) for part in x.split(2)]),
        "global": by_a_global,
        "function that calls one": lambda x: by_a_global(x),
        "function in a function": lambda x: inner(x),
        "default": lambda x, model=model: model(x),
        "bound method": model.forward,
        "method of an object": trainer.encode,
        "object": trainer,
        "function that calls an object": lambda x: trainer(x),
        "attribute": lambda x: trainer.model(x),
        "method of an attribute": lambda x: trainer.encode(x),
        "property": lambda x: trainer.encoder(x),
        "list of an attribute": lambda x: trainer.parts["encoder"][0](x),
        "partial": functools.partial(lambda f, x: f(x), model),
        "partial's keyword": functools.partial(lambda x, f: f(x), f=model),
        "compiled": torch.compile(lambda x: model(x), backend="eager"),
        "decorated": torch.autocast("cpu", enabled=False)(lambda x: model(x)),
    }


@pytest.fixture
def normed(monkeypatch):
    torch.manual_seed(0)
    model = Normed()
    monkeypatch.setitem(globals(), "GLOBAL", model)
    return model


@pytest.mark.parametrize("way", functions_over(nn.Identity()))
def test_a_function_is_treated_as_the_module_it_holds(normed, way):
    function, x, whole = functions_over(normed)[way], torch.randn(12, WIDTH), lambda z: z.logsumexp(0).sum()
    with pytest.raises(ValueError, match=r"layers\.1 is batch norm in training mode"):
        cached_step(function, whole, x, micro_batch=4)
    other = copy.deepcopy(normed)
    with torch.no_grad():
        for part in x.split(4):
            other(part) if way != "comprehension" else [other(piece) for piece in part.split(2)]
    cached_step(function, whole, x, micro_batch=4, batch_norm="micro_batch")
    for name, value in other.named_buffers():
        assert torch.equal(dict(normed.named_buffers())[name], value), name


def test_modules_that_a_function_does_not_name_do_not_count(normed):
    trainer, x = SimpleNamespace(model=normed, other=nn.Linear(WIDTH, 4)), torch.randn(12, WIDTH)
    cached_step(lambda x: trainer.other(x), lambda z: z.logsumexp(0).sum(), x, micro_batch=4)


def test_buffers_that_the_loss_changes_stay_changed():
    model, x = nn.Linear(WIDTH, 4), torch.randn(N, WIDTH)
    model.register_buffer("losses", torch.zeros(()))

    def loss_fn(z):
        model.losses += 1
        return z.logsumexp(0).sum()

    cached_step(model, loss_fn, x, micro_batch=4)
    assert model.losses == 1


@pytest.mark.parametrize(
    "dtype, noise, raises",
    [
        (torch.float32, 1e-2, True),
        (torch.float32, 1e-5, False),
        (torch.float64, 1e-6, True),
        (torch.float64, 1e-10, False),
        (torch.bfloat16, 1e-2, False),
        (torch.bfloat16, 0.2, True),
        ("autocast", 1e-2, False),
        ("autocast", 0.2, True),
        ("16-bit model, float32 features", 1e-2, False),
    ],
    ids=str,
)
def test_how_far_the_second_forward_may_be_from_the_first(dtype, noise, raises):
    """Noise of NumPy's generator, which cannot be replayed."""
    draw, autocast = np.random.default_rng(0), dtype == "autocast"
    inner = {"autocast": torch.float32, "16-bit model, float32 features": torch.bfloat16}.get(dtype, dtype)
    model, x = nn.Linear(WIDTH, 4, dtype=inner), torch.randn(N, WIDTH, dtype=inner)
    outer = torch.float32 if isinstance(dtype, str) else dtype

    def forward(x):
        z = model(x).to(outer)
        return z * torch.from_numpy(1 + noise * draw.standard_normal(tuple(z.shape))).to(outer)

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(RuntimeError, match="second forward gave features that differ") if raises else nullcontext(),
    ):
        cached_step(forward, lambda z: z.float().logsumexp(0).sum(), x, micro_batch=4)


def test_what_cannot_be_replayed_raises():
    model, calls = nn.Linear(WIDTH, 4), []

    def forward(x):
        calls.append(None)
        return model(x) * len(calls)

    with pytest.raises(RuntimeError, match="second forward gave features that differ"):
        cached_step(forward, lambda z: z.logsumexp(0).sum(), torch.randn(N, WIDTH), micro_batch=4)


def test_the_generator_goes_on_after_an_error():
    model, x = nn.Dropout(0.5), torch.randn(N, WIDTH, requires_grad=True)
    torch.manual_seed(0)
    model(x)
    expected = torch.rand(3)
    torch.manual_seed(0)

    def forward(x):
        if torch.is_grad_enabled():
            raise KeyError
        return model(x)

    with pytest.raises(KeyError):
        cached_step(forward, lambda z: z.sum(), x, micro_batch=N)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "error, match, model, loss_fn, inputs, options",
    [
        (ValueError, "micro_batch", None, None, None, {"micro_batch": 0}),
        (ValueError, "batch_norm", None, None, None, {"batch_norm": "ghost"}),
        (ValueError, r"rows in common, got \[4, 6\]", None, None, (torch.rand(4, 6), torch.rand(6, 6)), {}),
        (ValueError, r"rows in common, got \[0\]", None, None, (torch.rand(0, 6),), {}),
        (ValueError, r"rows in common, got \[\]", None, None, (3,), {}),
        (ValueError, r"return 2 rows for 2 rows, got shape \(1, 6\)", lambda x: x.sum(0, True), None, None, {}),
        (TypeError, "tensors of features, got NoneType", lambda x: None, None, None, {}),
        (TypeError, "loss_fn must return a tensor, or .*, got dict", None, lambda z: {"loss": z.sum()}, None, {}),
    ],
)
def test_refuses(error, match, model, loss_fn, inputs, options):
    call = {"micro_batch": 2, **options}
    with pytest.raises(error, match=match):
        cached_step(model or nn.Linear(6, 4), loss_fn or torch.sum, *(inputs or (torch.rand(4, 6),)), **call)
