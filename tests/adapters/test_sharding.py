"""What each of the devices that share a base gets of an adapter, and that the parts make the whole."""

from __future__ import annotations

import pytest
import torch

from lora_serve.adapters.adapter import Adapter, BaseShape, Lowered, ModuleOverride, Prefix, Site, flatten
from lora_serve.adapters.sharding import Sharding
from lora_serve.kernels.contract import Delta

SITES = {name: Site(name, 8, 6) for name in ("q", "o", "head")}
BASE = BaseShape(SITES, tuple((name,) for name in SITES), lambda site: torch.empty(0))


def shardings(size: int = 2) -> list[Sharding]:
    return [Sharding(rank, size, {"q": 1}, frozenset({"o"}), (True, False)) for rank in range(size)]


@pytest.fixture
def adapter() -> Adapter:
    torch.manual_seed(0)
    vectors = {"gain_in": torch.randn(8), "gain_out": torch.randn(6), "shift": torch.randn(6)}
    return flatten(
        "digest",
        Lowered(
            {name: Delta(torch.randn(3, 8), torch.randn(3, 6)) for name in SITES},
            {},
            {
                name: ModuleOverride(parameters={"weight": torch.randn(6, 8), "bias": torch.randn(6)}, **vectors)
                for name in SITES
            },
            Prefix(2, None, (torch.randn(2, 4, 5),) * 2, (torch.randn(2, 4, 3),) * 2),
        ),
        torch.float32,
    )


@pytest.mark.parametrize("size", [1, 2])
def test_the_parts_of_a_layer_make_its_output(size: int, adapter: Adapter) -> None:
    """y = gain_out * (W (gain_in * x) + b) + shift, and B(A x), as each rank computes it from its part of x."""
    x = torch.randn(4, 8)

    def outputs(part: Adapter, site: Site, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        delta, override = part.delta(site), part.overrides[site.name]
        assert delta is not None
        own = (x * override.gain_in) @ override.parameters["weight"].T + override.parameters["bias"]
        return own, x @ delta.a.T @ delta.b

    parts = [(each.shape(BASE), each.adapter(adapter, BASE)) for each in shardings(size)]
    for name in SITES:
        wanted = outputs(adapter, SITES[name], x)
        given = x.chunk(size, 1) if name == "o" else [x] * size
        found = [outputs(part, base.sites[name], own) for (base, part), own in zip(parts, given, strict=True)]
        for index, whole in enumerate(wanted):
            each = [pair[index] for pair in found]
            made = sum(each) if name == "o" else torch.cat(each, 1) if name == "q" else each[-1]
            torch.testing.assert_close(made, whole)


def test_what_is_done_to_an_output_is_cut_only_where_the_output_is(adapter: Adapter) -> None:
    parts = [each.adapter(adapter, BASE).overrides for each in shardings()]
    for role in ("gain_out", "shift"):
        for name in SITES:
            each = [getattr(part[name], role) for part in parts]
            made = torch.cat(each) if name == "q" else each[1]
            assert torch.equal(made, getattr(adapter.overrides[name], role))


def test_a_prefix_is_cut_by_heads_in_the_layers_whose_heads_are(adapter: Adapter) -> None:
    first, second = (each.adapter(adapter, BASE).prefix for each in shardings())
    assert adapter.prefix is not None
    assert first is not None
    assert second is not None
    assert torch.equal(torch.cat([first.keys[0], second.keys[0]], 1), adapter.prefix.keys[0])
    assert torch.equal(second.values[1], adapter.prefix.values[1])


def test_a_part_is_one_tensor_of_its_own_size(adapter: Adapter) -> None:
    part = shardings()[1].adapter(adapter, BASE)
    assert part.flat.untyped_storage().data_ptr() != adapter.flat.untyped_storage().data_ptr()
    assert part.nbytes < adapter.nbytes
    assert all(tensor.is_contiguous() for override in part.overrides.values() for tensor in override.tensors.values())
