# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of layers and models."""

import doctest
import importlib
import pkgutil

import keras
import numpy as np
import pytest

import mvke_tf.layers
import mvke_tf.models
import mvke_tf.schema


def examples() -> dict[str, doctest.DocTest]:
    found = {}
    for package in (mvke_tf.layers, mvke_tf.models):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            names = {**vars(mvke_tf.schema), **vars(module), "np": np, "keras": keras}
            tests = doctest.DocTestFinder(exclude_empty=True).find(module, info.name, module, names)
            found.update({test.name: test for test in tests if test.examples})
    return found


EXAMPLES = examples()


def test_every_layer_has_an_example():
    documented = {name.rsplit(".", 1)[1] for name in EXAMPLES}
    assert set(mvke_tf.layers.__all__) | {"build_mvke", "build_mmoe_two_tower", "build_mmoe"} <= documented


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    report = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(EXAMPLES[name], out=report.append)
    assert results.failed == 0, "".join(report)
    assert results.attempted == len(EXAMPLES[name].examples)
