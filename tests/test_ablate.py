"""Mixers that are off: what is measured is the model without them, and the model itself stays as it is."""
import numpy as np
import pytest

import mambainllama as mil
from test_train import CONFIG, bits, rows


@pytest.mark.parametrize("mixer, config", [("mamba2", CONFIG), ("mamba1", CONFIG), ("mamba2", CONFIG | {"model_type": "llama", "attention_bias": True})])
def test_a_mixer_that_is_off_adds_nothing(mixer, config):
    model = mil.convert(mil.random(config, seed=1), mamba_layers=[0, 2], mixer=mixer)
    before, data = bits(model), rows(3)
    got = mil.ablate(model, data, length=24, batch=4)
    assert bits(model) == before and len(got["layers"]) == 3
    assert len({round(v, 6) for v in (got["whole"], got["without_mamba"], got["without_attention"], *got["layers"][::2])}) == 5
    assert got["layers"][1] == got["without_attention"]
    for i in (0, 2):  # what a mixer reads does not matter any more
        model.set(f"model.layers.{i}.mamba.out_proj.weight", np.zeros_like(model.get(f"model.layers.{i}.mamba.out_proj.weight")))
    again = mil.ablate(model, data, length=24, batch=4)
    assert again["whole"] == again["without_mamba"] == again["layers"][0] == got["without_mamba"]


def test_a_transformer_has_no_mamba_to_switch_off():
    model = mil.random(CONFIG, seed=1)
    got = mil.ablate(model, rows(3), length=24, batch=4)
    assert got["without_mamba"] is None and got["without_attention"] > 0
