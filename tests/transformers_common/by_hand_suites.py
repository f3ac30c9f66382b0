"""transformers' `CausalLMModelTest`, generation and pipeline tests included, on this family and on stock Llama.

`by_hand.py` copies this file into a `tests` package that it puts together from a copy of transformers' repository, and
runs it there; hence the relative imports.
"""

import os
import random
import unittest

import model_testers as family
from expectations import PackedEmbeddingExpectations, PackedExpectations, PerLayerExpectations, SkipsExpectations
from transformers import set_seed

from . import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin
from .causal_lm_tester import CausalLMModelTest, CausalLMModelTester

SEED = int(os.environ["TRANSFORMERS_SUITE_SEED"])
# By default the distributed tests run for a list of the library's own families.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class SeededTest(CausalLMModelTest):
    def setUp(self):
        super().setUp()
        set_seed(SEED)
        test_modeling_common.global_rng = random.Random(SEED)


def tester(configurations: type[family.LLMKernelTester]) -> type[CausalLMModelTester]:
    """The library's tester, with the configurations of one of ours."""
    return type(configurations.__name__, (configurations, CausalLMModelTester), {})


class WideWindowTester(family.ShapesTester):
    """The library's checks of caches know no window that is shorter than the text."""

    beyond_shapes = {**family.ShapesTester.beyond_shapes, "sliding_window": 64}


class LlamaTest(SeededTest, unittest.TestCase):
    model_tester_class = tester(family.LlamaTester)


class HomogeneousTest(SeededTest, unittest.TestCase):
    model_tester_class = tester(family.LLMKernelTester)


class ShapesTest(PerLayerExpectations, SeededTest, unittest.TestCase):
    model_tester_class = tester(WideWindowTester)


class SkipsTest(SkipsExpectations, SeededTest, unittest.TestCase):
    model_tester_class = tester(family.SkipsTester)


class PackedTest(PackedExpectations, SeededTest, unittest.TestCase):
    model_tester_class = tester(family.PackedTester)


class PackedEmbeddingTest(PackedEmbeddingExpectations, SeededTest, unittest.TestCase):
    model_tester_class = tester(family.PackedEmbeddingTester)
