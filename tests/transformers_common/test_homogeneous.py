"""transformers' common tests on the family with every layer alike."""

import unittest
from unittest import mock

from .common_tests import CommonTests, FSDPTesterMixin, TensorParallelTesterMixin
from .library import test_executorch


class HomogeneousTest(CommonTests, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    pass


class ExportTest(test_executorch.ExecutorchTest):
    def setUp(self):
        model = HomogeneousTest.model_tester.causal_lm_class(HomogeneousTest.model_tester.get_config())
        with mock.patch.object(test_executorch.AutoModelForCausalLM, "from_pretrained", return_value=model):
            super().setUp()
