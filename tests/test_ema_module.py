# SPDX-License-Identifier: Apache-2.0
"""The EMA module: schedules, buffers, masters, wrappers, sharded and meta models, swapping, what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslkernels import EMA


def network(dtype: torch.dtype | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype), nn.Linear(4, 2, dtype=dtype))


def moved(model: nn.Module, by: float = 1.0) -> nn.Module:
    """The model after what could be a training step: every number is another."""
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.add_(by if x.is_floating_point() else 1)
    return model


def state(module: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in (*module.parameters(), *module.buffers())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


class TestMomentum:
    def test_constant(self) -> None:
        ema = EMA(network(), 0.9)
        assert [ema.momentum_at(k) for k in (0, 1, 10**9)] == [0.9, 0.9, 0.9]

    def test_linear_is_that_of_ijepa(self) -> None:
        """(ema[0] + i (ema[1] - ema[0]) / steps for i in range(steps + 1)), then constant."""
        ema = EMA(network(), 0.996, schedule="linear", total_steps=500)
        for k in (0, 1, 250, 499, 500):
            assert math.isclose(ema.momentum_at(k), 0.996 + k * (1.0 - 0.996) / 500, rel_tol=1e-12)
        assert ema.momentum_at(501) == ema.momentum_at(10**9) == 1.0

    def test_cosine_is_that_of_byol(self) -> None:
        ema = EMA(network(), 0.99, schedule="cosine", total_steps=1000)
        for k in (0, 1, 333, 999, 1000):
            assert math.isclose(ema.momentum_at(k), 1 - (1 - 0.99) * (math.cos(math.pi * k / 1000) + 1) / 2)
        assert ema.momentum_at(2000) == 1.0

    def test_cosine_to_another_end(self) -> None:
        ema = EMA(network(), 0.9, final_momentum=0.5, schedule="cosine", total_steps=10)
        assert (ema.momentum_at(0), ema.momentum_at(10)) == (0.9, 0.5)
        assert math.isclose(ema.momentum_at(5), 0.7)

    def test_updates_follow_the_schedule_and_count(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        ema = EMA(model, 0.0, final_momentum=1.0, schedule="linear", total_steps=4)
        expected = model.weight.detach().clone()
        for k in range(6):
            moved(model)
            m = min(1.0, k / 4)
            expected = m * expected + (1 - m) * model.weight.detach()
            ema.update(model)
            torch.testing.assert_close(ema.module.weight, expected)
            assert ema.step == k + 1

    def test_a_given_step_overrules_the_count(self) -> None:
        model = nn.Linear(1, 1)
        ema = EMA(model, 0.0, schedule="linear", total_steps=10)
        before = state(ema)
        ema.update(moved(model), step=10)  # momentum 1
        assert same(state(ema), before) and ema.step == 11


class TestCopy:
    def test_it_starts_as_a_frozen_copy_in_the_same_mode(self) -> None:
        model = network()
        model[1].eval()
        ema = EMA(model)
        assert same(state(ema.module), state(model))
        assert [m.training for m in ema.module.modules()] == [m.training for m in model.modules()]
        assert not any(p.requires_grad for p in ema.parameters())
        assert all(p.requires_grad for p in model.parameters())
        x = torch.randn(5, 3)
        torch.testing.assert_close(EMA(model)(x), copy.deepcopy(model)(x))

    @pytest.mark.parametrize("use_buffers", ["copy", "average", "ignore"])
    def test_buffers(self, use_buffers: str) -> None:
        model = network()
        ema = EMA(model, 0.75, use_buffers=use_buffers)
        old, old_count = model[1].running_mean.clone(), int(model[1].num_batches_tracked)
        ema.update(moved(model))
        share = {"copy": 1.0, "average": 0.25, "ignore": 0.0}[use_buffers]
        torch.testing.assert_close(ema.module[1].running_mean, old + share)
        assert int(ema.module[1].num_batches_tracked) == old_count + (use_buffers != "ignore")
        torch.testing.assert_close(ema.module[0].weight.detach(), model[0].weight.detach() - 0.75)

    def test_set_starts_again_from_the_model(self) -> None:
        model = network()
        ema = EMA(model, use_buffers="ignore")
        ema.update(moved(model))
        ema.set(moved(model))
        assert same(state(ema.module), state(model)) and ema.step == 1

    def test_any_strides_and_repeated_memory(self) -> None:
        """What the op refuses as a target is made dense in the copy."""
        model = nn.Module()
        model.transposed = nn.Parameter(torch.randn(3, 4).t())
        model.image = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
        model.register_buffer("expanded", torch.zeros(1).expand(4))
        ema = EMA(model, 0.5, use_buffers="average")
        expected = 0.5 * ema.module.transposed + 0.5 * (model.transposed.detach() + 1)
        with torch.no_grad():
            model.transposed += 1
        ema.update(model)
        torch.testing.assert_close(ema.module.transposed.detach(), expected)
        assert ema.module.image.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("by_data", [False, True], ids=["one parameter", "one memory"])
    def test_shared_parameters_are_averaged_once(self, by_data: bool) -> None:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if by_data:
            model[1].weight.data = model[0].weight.data
        else:
            model[1].weight = model[0].weight
        ema = EMA(model, 0.5)
        before = model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].weight.add_(1)
        ema.update(model)
        for layer in ema.module:
            torch.testing.assert_close(layer.weight.detach(), before + 0.5)
        with ema.average_parameters(model):
            torch.testing.assert_close(model[1].weight.detach(), before + 0.5)
        torch.testing.assert_close(model[1].weight.detach(), before + 1)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("masters", [False, True], ids=["stochastic", "masters"])
    def test_sixteen_bits_do_not_stall(self, masters: bool, dtype: torch.dtype) -> None:
        model = nn.Linear(64, 64, bias=False, dtype=dtype)
        nn.init.zeros_(model.weight)
        ema = EMA(model, 0.999, dtype=torch.float32 if masters else None)
        nn.init.ones_(model.weight)
        state_of_generator = torch.get_rng_state()
        for _ in range(1000):
            ema.update(model)
        assert torch.equal(torch.get_rng_state(), state_of_generator)
        assert ema.module.weight.dtype == (torch.float32 if masters else dtype)
        assert abs(ema.module.weight.double().mean().item() - (1 - 0.999**1000)) < 0.005

    def test_replicas_stay_alike(self) -> None:
        model = network(torch.bfloat16)
        replicas = [EMA(model, 0.99) for _ in range(2)]
        for _ in range(5):
            moved(model)
            torch.rand(1)
            for ema in replicas:
                ema.update(model)
        assert same(*map(state, replicas))

    def test_masters_in_a_context_lose_nothing(self) -> None:
        model = network(torch.bfloat16)
        ema = EMA(model, 0.9, dtype=torch.float32)
        ema.update(moved(model, 0.01))
        average, own = state(ema), state(model)
        with ema.average_parameters(model):
            assert all(x.equal(y.to(x.dtype)) for x, y in zip(state(model), average))
        assert same(state(ema), average) and same(state(model), own)
        with pytest.raises(ValueError, match=r"'0.weight' is torch.float32 on cpu in the average and torch.bfloat16"):
            ema.swap(model)
        assert same(state(ema), average) and same(state(model), own)

    @pytest.mark.gpu
    def test_on_another_device(self) -> None:
        model = network().cuda()
        ema = EMA(model, 0.5, device="cpu")
        ema.update(moved(model))
        assert {x.device.type for x in state(ema)} == {"cpu"}
        assert same(state(ema.module)[1:2], [model[0].bias.detach().cpu() - 0.5])


class TestSwap:
    def test_swap_twice_is_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sslkernels.ema.SWAPPED_AT_ONCE", 5)  # several pieces of every weight
        model = network()
        ema = EMA(model, 0.5)
        average, own = state(ema), state(moved(model))
        places = [p.data_ptr() for p in model.parameters()]
        ema.swap(model)
        assert same(state(ema), own) and same(state(model), average)
        assert places == [p.data_ptr() for p in model.parameters()]
        ema.swap(model)
        assert same(state(ema), average) and same(state(model), own)

    def test_context_survives_an_exception(self) -> None:
        model = network()
        ema = EMA(model, 0.5)
        average, own = state(ema), state(moved(model))
        with pytest.raises(KeyError), ema.average_parameters(model) as within:
            assert within is model and same(state(model), average)
            raise KeyError
        assert same(state(ema), average) and same(state(model), own)

    def test_ignored_buffers_stay(self) -> None:
        model = network()
        ema = EMA(model, use_buffers="ignore")
        moved(model)
        with ema.average_parameters(model):
            assert torch.equal(model[1].running_mean, torch.ones(4))


class TestState:
    def test_it_resumes(self) -> None:
        options: dict[str, Any] = {"schedule": "cosine", "total_steps": 7, "momentum": 0.5}
        model = network()
        ema = EMA(model, **options)
        for _ in range(3):
            ema.update(moved(model))
        resumed = EMA(network(), **options)
        resumed.load_state_dict(ema.state_dict())
        assert resumed.step == 3
        for x in (ema, resumed):
            x.update(moved(copy.deepcopy(model)))
        assert same(state(ema), state(resumed))

    def test_names(self) -> None:
        model = network()
        names = EMA(model).state_dict().keys()
        assert set(names) == {"_extra_state", *(f"module.{name}" for name in model.state_dict())}
        ema = EMA(network())
        ema.module.load_state_dict(model.state_dict())
        assert same(state(ema.module), state(model))

    def test_saved_as_plain_tensors(self, tmp_path: Any) -> None:
        ema = EMA(network())
        torch.save(ema.state_dict(), tmp_path / "ema.pt")
        ema.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_copies(self, clone: Any) -> None:
        model = network()
        ema = EMA(model, 0.5)
        ema.update(moved(model))
        other = clone(ema)
        before = state(ema)
        assert same(state(other), before) and other.step == 1
        other.update(moved(model))
        assert same(state(ema), before)

    def test_as_a_submodule(self) -> None:
        method = nn.Module()
        method.student = network()
        method.teacher = EMA(method.student)
        assert not method.eval().teacher.module.training
        assert "teacher.module.0.weight" in method.state_dict()
        method.double()
        method.teacher.update(method.student)
        assert method.teacher.module[0].weight.dtype == torch.float64

    def test_repr(self) -> None:
        assert "momentum=0.99, schedule='constant', use_buffers='copy'" in repr(EMA(network(), 0.99))
        assert "final_momentum=1.0, total_steps=5" in repr(EMA(network(), schedule="linear", total_steps=5))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class TestWrappers:
    def test_data_parallel(self, mesh: Any) -> None:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for ema in (EMA(wrapped, 0.5), EMA(model, 0.5)):
            before = state(ema)[0]
            ema.update(moved(wrapped))
            torch.testing.assert_close(state(ema)[0], before + 0.5 * (model[0].weight.detach() - before))
            assert "module.0.weight" in ema.state_dict()

    def test_compiled(self) -> None:
        model = network()
        ema = EMA(torch.compile(model, backend="eager"), 0.5)
        ema.update(torch.compile(moved(model), backend="eager"))
        assert "module.0.weight" in ema.state_dict()
        model[0] = torch.compile(model[0], backend="eager")  # after the average was made
        ema.update(model)

    def test_sharded(self, mesh: Any) -> None:
        """FSDP2 of both, from the meta device."""
        from torch.distributed.fsdp import fully_shard

        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        ema = EMA(model, 0.5)
        for module in (model, ema.module):
            fully_shard(module, mesh=mesh)
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.zeros_(p)
        ema.to_empty(device="cpu")
        ema.set(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        ema.update(model)
        assert {type(p).__name__ for p in ema.parameters()} == {"DTensor"}
        assert all((p.full_tensor() == 0.5).all() for p in ema.parameters())
        with ema.average_parameters(model):
            assert all((p.full_tensor() == 0.5).all() for p in model.parameters())
        assert all((p.full_tensor() == 1).all() for p in model.parameters())
        with pytest.raises(TypeError, match=r"the average's parameter '0.weight' is a DTensor and the model's .*Param"):
            ema.update(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


def test_meta_models() -> None:
    with torch.device("meta"):
        ema = EMA(network(), 0.5)
        ema.update(network())
    model = network()
    with pytest.raises(ValueError, match=r"parameter '0.weight' of the average is on the meta device: call to_empty"):
        ema.update(model)
    ema.to_empty(device="cpu")
    ema.set(model)
    assert same(state(ema.module), state(model)) and ema.step == 1
    ema.update(model)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\], got 1.1"),
            ({"momentum": math.nan}, ValueError, "momentum must be in"),
            ({"momentum": True}, TypeError, "momentum must be a number, got bool"),
            ({"momentum": torch.tensor(0.5)}, TypeError, "momentum must be a number, got Tensor"),
            ({"schedule": "step"}, ValueError, "schedule must be one of .*got 'step'"),
            ({"schedule": "cosine"}, ValueError, 'schedule "cosine" needs total_steps'),
            ({"schedule": "linear", "total_steps": 0}, ValueError, "total_steps must be positive"),
            ({"schedule": "linear", "total_steps": 5, "final_momentum": -1.0}, ValueError, "final_momentum must be in"),
            ({"total_steps": 5}, ValueError, "total_steps are of schedule"),
            ({"final_momentum": 1.0}, ValueError, "total_steps are of schedule"),
            ({"use_buffers": "skip"}, ValueError, "use_buffers must be one of"),
            ({"dtype": torch.int64}, TypeError, "dtype must be floating, got torch.int64"),
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any], error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            EMA(network(), **options)

    def test_models(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            EMA([])
        with pytest.raises(ValueError, match="uninitialized parameter, 'weight'"):
            EMA(nn.LazyLinear(3))

    @pytest.mark.parametrize(
        ("other", "error", "match"),
        [
            (
                nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
                ValueError,
                "average has a parameter '2.weight', the m",
            ),
            (nn.Sequential(*network(), nn.Linear(2, 2)), ValueError, "the model has a parameter '3.weight', the av"),
            (
                nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
                ValueError,
                r"parameter '2.weight' has shape \(2, 4\) in the average and \(5, 4\) in the model",
            ),
            (
                nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)),
                ValueError,
                "the average has a buffer '1.running_mean', the model has none",
            ),
            ([], TypeError, "model must be a torch.nn.Module, got list"),
        ],
        ids=["fewer", "more", "shape", "buffers", "list"],
    )
    def test_other_models_leave_everything_as_it_was(self, other: Any, error: type[Exception], match: str) -> None:
        ema = EMA(network(), 0.5)
        before = state(ema)
        for call in (ema.update, ema.set, ema.swap, lambda model: ema.average_parameters(model).__enter__()):
            with pytest.raises(error, match=match):
                call(other)
            assert same(state(ema), before) and ema.step == 0

    def test_a_step_that_is_no_integer(self) -> None:
        model = network()
        with pytest.raises(TypeError, match="step must be an integer, got float"):
            EMA(model).update(model, step=1.5)
