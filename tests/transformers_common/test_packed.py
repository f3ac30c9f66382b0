"""transformers' common tests on the family with integer and sparse weights."""

import unittest

from .common_tests import CommonTests, FSDPTesterMixin, TensorParallelTesterMixin
from .expectations import PackedEmbeddingExpectations, PackedExpectations
from .model_testers import PackedEmbeddingTester, PackedTester


class PackedTest(PackedExpectations, CommonTests, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    model_tester = PackedTester()


class PackedEmbeddingTest(PackedEmbeddingExpectations, CommonTests, TensorParallelTesterMixin, unittest.TestCase):
    model_tester = PackedEmbeddingTester()
