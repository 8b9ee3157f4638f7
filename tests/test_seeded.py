"""Random numbers of our own, which take none from anybody else."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from lib_dinotile.hosts.patched import seeded


class Devices(types.ModuleType):
    """Stands in for `torch.cuda` and its like: the generators of some devices."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(name)
        self.generators = [torch.Generator().manual_seed(40 + number) for number in range(count)]
        self.current = 0

    def _of(self, device: object) -> torch.Generator:
        index = torch.device(device).index
        return self.generators[self.current if index is None else index]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return self._of(device or self.__name__).get_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        self._of(device or self.__name__).set_state(state)

    def manual_seed(self, seed: int) -> None:
        self.generators[self.current].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    @contextlib.contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, self.current if device.index is None else device.index
        yield
        self.current = before

    def states(self) -> list[list[int]]:
        return [generator.get_state().tolist() for generator in self.generators]

    def _is_in_bad_fork(self) -> bool:
        return False


class Mps(Devices):
    """As of torch 2.1: there is one device, and nothing takes its number."""

    def get_rng_state(self) -> torch.Tensor:
        return super().get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        super().set_rng_state(state)

    device = None


@pytest.fixture
def kinds(monkeypatch) -> dict[str, Devices]:
    kinds = {"cuda": Devices("cuda", 3), "xpu": Devices("xpu", 2), "mps": Mps("mps", 1)}
    for name, module in kinds.items():
        monkeypatch.setattr(torch, name, module, raising=False)
    return kinds


def draws(kinds: dict[str, Devices], device: torch.device) -> list[float]:
    """The next from the CPU's generator and from the device's."""
    own = [] if device.type == "cpu" else [torch.rand(1, generator=kinds[device.type]._of(device)).item()]
    return [torch.rand(1).item(), *own]


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:2", "xpu:1", "mps", "mps:0"])
def test_generators_are_seeded_and_put_back_and_those_of_other_devices_left_alone(kinds, name):
    device = torch.device(name)
    before = torch.get_rng_state().tolist(), {kind: module.states() for kind, module in kinds.items()}
    within = []
    for _ in range(2):
        with contextlib.suppress(LookupError), seeded(device):
            others = {kind: module.states() for kind, module in kinds.items()}
            within.append(draws(kinds, device))
            raise LookupError("it breaks off")
        if device.type != "cpu":
            others[device.type][device.index or 0] = before[1][device.type][device.index or 0]
        assert others == before[1]
        assert (torch.get_rng_state().tolist(), {kind: module.states() for kind, module in kinds.items()}) == before
        torch.rand(3)
        before = torch.get_rng_state().tolist(), before[1]
    known = torch.Generator().manual_seed(0)
    first = torch.rand(1, generator=known).item()
    assert within == 2 * [[first] * len(within[0])]


@pytest.mark.parametrize("name", ["vulkan", "meta"])
def test_a_device_whose_generator_is_not_known_has_the_cpus_seeded(kinds, name):
    before = torch.get_rng_state().tolist(), {kind: module.states() for kind, module in kinds.items()}
    with seeded(torch.device(name)):
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert (torch.get_rng_state().tolist(), {kind: module.states() for kind, module in kinds.items()}) == before
