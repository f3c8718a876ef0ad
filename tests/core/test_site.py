"""Sites: which layers a target names, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

from finetune.core.attach import attach
from finetune.core.part import Delta
from finetune.core.site import find_sites
from finetune.errors import ConfigError
from finetune.testing.sessions import tiny


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("all",), 12),
        (("attention",), 8),
        (("mlp",), 4),
        (("q",), 2),
        (("q", "v"), 4),
        (("fc1",), 2),
        (("vit.layers.0.*",), 6),
        (("*_proj", "q"), 8),
    ],
)
def test_targets(targets: tuple[str, ...], count: int) -> None:
    sites = find_sites(tiny(), targets)
    assert len(sites) == count
    assert len({s.name for s in sites}) == count


def test_a_site_knows_its_place() -> None:
    (site,) = find_sites(tiny(), ("vit.layers.1.mlp.fc1",))
    assert (site.block, site.role, site.shape, site.size, site.key) == (
        1,
        "up",
        (48, 32),
        48 * 32,
        "vit/layers/1/mlp/fc1",
    )


def test_conv1d_shape_is_out_in() -> None:
    shapes = {s.role: s.shape for s in find_sites(tiny("gpt2"), ("all",))}
    assert shapes == {"qkv": (96, 32), "o": (32, 32), "up": (128, 32), "down": (32, 128)}


def test_patched_layers_are_found_again_under_their_own_names() -> None:
    model = tiny()
    before = [s.name for s in find_sites(model, ("all",))]
    for name in before[:3]:
        attach(model, name, Delta())
    assert [s.name for s in find_sites(model, ("all",))] == before
    assert all(isinstance(s.module, nn.Linear) for s in find_sites(model, ("all",)))


def test_every_wrong_target_is_named_with_a_near_miss() -> None:
    with pytest.raises(ConfigError) as caught:
        find_sites(tiny(), ("q", "attenton", "fc3"))
    assert len(caught.value.faults) == 2
    assert "'attenton' matches no linear layer" in caught.value.faults[0]
    assert "Did you mean 'attention'?" in caught.value.faults[0]
    assert "'fc3'" in caught.value.faults[1]


def test_tied_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="lm_head shares its weight"):
        find_sites(tiny("gpt2"), ("lm_head",))


def test_the_trained_head_is_refused_as_a_target() -> None:
    model = tiny().requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(ConfigError, match="classifier is the task's head, which is trained in place"):
        find_sites(model, ("classifier",))
