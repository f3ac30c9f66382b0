"""transformers' common tests in one class, as its own `CausalLMModelTest` puts them together.

Of the 22 files that its source distribution carries these apply: modeling, configuration, training, tensor parallel,
FSDP and executorch. The others are of tokenizers, processors, images, video, backbones, experts and decision heads,
and of pipelines, whose tests are not in the distribution: see `by_hand.py`.
"""

import random

from transformers import set_seed

from .library import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin
from .library.generation.test_utils import GenerationTesterMixin
from .library.test_configuration_common import ConfigTester
from .library.test_training_mixin import TrainingTesterMixin
from .model_testers import LLMKernelTester

SEED = 0

# By default the distributed tests run for a list of the library's own families.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
FSDPTesterMixin = test_fsdp_mixin.FSDPTesterMixin
TensorParallelTesterMixin = test_tensor_parallel_mixin.TensorParallelTesterMixin


class CommonTests(test_modeling_common.ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    model_tester = LLMKernelTester()
    all_model_classes = LLMKernelTester().model_classes

    def setUp(self):
        super().setUp()
        set_seed(SEED)
        test_modeling_common.global_rng = random.Random(SEED)

    def test_config(self):
        config = ConfigTester(
            self,
            config_class=self.model_tester.config_class,
            common_properties=["hidden_size", "num_hidden_layers"],
            num_hidden_layers=self.model_tester.num_hidden_layers,
            **self.model_tester.beyond_shapes,
        )
        config.run_common_tests()
