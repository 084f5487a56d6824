"""When two checkpoints are the same model: then their logits are the same too, and one need not compute both."""

import dataclasses

import jax
import numpy as np
import pytest


def assert_same_config(config, expected):
    """But for its name, and for numbers that one of the files has in float32."""
    assert type(config) is type(expected)
    (found, there), (wanted, known) = (
        jax.tree.flatten(dataclasses.asdict(c) | {"model_type": None}) for c in (config, expected)
    )
    assert there == known
    assert found == pytest.approx(wanted, rel=1e-6)


def assert_same_parameters(model, expected):
    """Bit for bit, as they lie on the mesh."""
    found, wanted = ({p.name: p.weight for p in m.placed} for m in (model, expected))
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        leaves, tree = jax.tree.flatten(weight)
        theirs, same_tree = jax.tree.flatten(wanted[name])
        assert tree == same_tree, name
        for leaf, other in zip(leaves, theirs, strict=True):
            np.testing.assert_array_equal(leaf, other, err_msg=name)
