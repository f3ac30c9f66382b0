"""transformers' common tests on the family with layers that differ."""

import unittest

from .common_tests import CommonTests, FSDPTesterMixin, TensorParallelTesterMixin
from .expectations import PerLayerExpectations, SkipsExpectations
from .model_testers import ShapesTester, SkipsTester


class ShapesTest(PerLayerExpectations, CommonTests, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    model_tester = ShapesTester()


class SkipsTest(SkipsExpectations, CommonTests, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    model_tester = SkipsTester()
