"""What this family's configurations expect where transformers' common tests assume one shape, and float weights.

Each class goes before the library's test class in the bases. Where it replaces a test it says why, and asserts what
holds instead; where the library's own assertions still hold it calls them.
"""

import copy
from unittest import mock

import torch
from torch import nn
from transformers.distributed import DistributedConfig

from hf_llmkernel.model.linear_llm_kernel import PackedEmbedding


class PerLayerExpectations:
    """A value that layers override has no single answer, and transformers raises where one is asked for."""

    def _get_tiny_config(self):
        # The library's own sets one width and one head count for all layers. Of these only the vocabulary matters:
        # tied embeddings of an odd one go wrong in its FSDP, stock Llama's too.
        config = self.model_tester.get_config()
        config.vocab_size = 256
        return type(config), config.to_diff_dict()

    def test_training_overfit(self):
        # The library's test prints head counts and widths of the configuration, and needs them for nothing else.
        original = self.model_tester.get_config

        def printable_config():
            config = original()
            config.allow_global_per_layer_attribute_access = True
            return config

        with mock.patch.object(self.model_tester, "get_config", printable_config):
            super().test_training_overfit()

    def _check_attentions_for_generate(self, attentions, config, **lengths):
        layers = [layer for layer in config.per_layer_config if "attention" not in layer.skip]
        self.assertEqual({len(step) for step in attentions}, {len(layers)})
        for index, layer in enumerate(layers):
            of_layer = tuple((step[index],) for step in attentions)
            super()._check_attentions_for_generate(attentions=of_layer, config=layer, **lengths)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        self.assertEqual(len(past_key_values), config.num_hidden_layers)
        for slot, layer in zip(past_key_values.layers, config.per_layer_config, strict=True):
            if "attention" in layer.skip:
                self.assertIsNone(slot.keys)
                self.assertIsNone(slot.values)
            else:
                keys, values = self._get_attention_shape(batch_size, seq_length, layer)
                self.assertEqual(slot.keys.shape, keys)
                self.assertEqual(slot.values.shape, values)


class SkipsExpectations(PerLayerExpectations):
    """Layers without attention have no attention weights to return."""

    def test_attention_outputs(self):
        original = self.model_tester
        tester = copy.copy(original)
        tester.num_hidden_layers = original.attending_layers
        tester.num_attention_heads = original.heads_of_the_attending
        tester.get_config = original.get_config
        with mock.patch.object(self, "model_tester", tester):
            super().test_attention_outputs()


class PackedExpectations:
    """Integers take no gradient, have no tensor-parallel plan, and scales that are initialized with them."""

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        def if_floating(parameter, requires_grad=True):
            return torch.Tensor.requires_grad_(parameter, requires_grad and parameter.is_floating_point())

        with mock.patch.object(nn.Parameter, "requires_grad_", if_floating):
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def assert_tensor_parallelism_is_refused(self):
        model = self.model_tester.causal_lm_class(self.model_tester.get_config())
        with self.assertRaisesRegex(ValueError, "tensor parallelism: .* is stored sparse or integer"):
            type(model).maybe_distribute_model(model, DistributedConfig(tp_size=2), mesh_manager=None)

    def test_tp_forward_0(self):
        self.assert_tensor_parallelism_is_refused()

    def test_tp_forward_1(self):
        self.assert_tensor_parallelism_is_refused()

    def test_tp_backward(self):
        self.assert_tensor_parallelism_is_refused()

    def test_tp_generation(self):
        self.assert_tensor_parallelism_is_refused()

    def test_init_weights_can_init_buffers(self):
        # The library wants buffers equal to those of a model whose initialization is left out; scales have none there.
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            expected = dict(model_class(copy.deepcopy(config)).named_buffers())
            with torch.device("meta"):
                model = model_class(copy.deepcopy(config))
            model.to_empty(device="cpu").init_weights()
            buffers = dict(model.named_buffers())
            self.assertEqual(sorted(buffers), sorted(expected))
            for name, buffer in buffers.items():
                if name.endswith("scales"):
                    self.assertTrue((buffer > 0).all() and buffer.isfinite().all(), name)
                elif not name.endswith("zero_points"):
                    self.assertTrue(torch.equal(buffer, expected[name]), name)


class PackedEmbeddingExpectations(PackedExpectations):
    """Rows of integers neither grow nor shrink nor learn, and a packed head is never made up."""

    def assert_resizing_is_refused(self):
        config = self.model_tester.get_config()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config))
            self.assertIs(model.resize_token_embeddings(config.vocab_size), model.get_input_embeddings())
            for wanted in ({"new_num_tokens": config.vocab_size + 10}, {"pad_to_multiple_of": 64}):
                with self.assertRaisesRegex(ValueError, "stored compressed"):
                    model.resize_token_embeddings(**wanted)

    def test_resize_tokens_embeddings(self):
        self.assert_resizing_is_refused()

    def test_resize_embeddings_untied(self):
        self.assert_resizing_is_refused()

    def test_resize_embeddings_untied_no_reinit_on_post_init(self):
        self.assert_resizing_is_refused()

    def test_load_with_mismatched_shapes(self):
        # `ignore_mismatched_sizes` would make the embedding anew from random numbers, which no packed one allows.
        model_class = self.model_tester.sequence_classification_class
        state = model_class(self.model_tester.get_config()).state_dict()
        smaller = copy.copy(self.model_tester)
        smaller.vocab_size = 10
        for ignore in (False, True):
            with self.assertRaisesRegex(ValueError, "embed_tokens.*of another shape"):
                model_class.from_pretrained(
                    None, config=smaller.get_config(), state_dict=state, ignore_mismatched_sizes=ignore
                )

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), PackedEmbedding)
            replacement = nn.Embedding(10, 10)
            model.set_input_embeddings(replacement)
            self.assertIs(model.get_input_embeddings(), replacement)
            head = model.get_output_embeddings()
            self.assertTrue(head is None or isinstance(head, nn.Linear))

    def test_correct_missing_keys(self):
        with self.a_body_without_its_packed_head_refused():
            super().test_correct_missing_keys()

    def test_base_model_prefix_loads_base_weights(self):
        with self.a_body_without_its_packed_head_refused():
            super().test_base_model_prefix_loads_base_weights()

    def a_body_without_its_packed_head_refused(self):
        """Asserts that the causal model refuses a body's tensors; the classes with a dense head are left to test."""
        causal = self.model_tester.causal_lm_class
        body = self.model_tester.base_model_class(self.model_tester.get_config())
        with self.assertRaisesRegex(ValueError, "lm_head.*missing"):
            causal.from_pretrained(None, config=self.model_tester.get_config(), state_dict=body.state_dict())
        others = [model_class for model_class in self.all_model_classes if model_class is not causal]
        return mock.patch.object(self, "all_model_classes", others)

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
        # What comes out of an integer embedding has no gradient; the embedded inputs that replace it have.
        config = self.model_tester.get_config()
        shape = (self.model_tester.batch_size, self.model_tester.seq_length, config.hidden_size)
        return config, {"inputs_embeds": torch.rand(shape, requires_grad=True)}

    def assert_tying_is_refused(self):
        with self.assertRaisesRegex(ValueError, "lm_head_form: a tied head"):
            self.model_tester.config_class(**{**self.model_tester.beyond_shapes, "tie_word_embeddings": True})

    def test_fsdp2_sharding_structure_1_tied(self):
        self.assert_tying_is_refused()

    def test_fsdp2_plan_vs_ddp_1_tied(self):
        self.assert_tying_is_refused()

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # There is no gradient of the embedding to look at; that of the first layer has to come through.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(copy.deepcopy(config)).train()
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
            outputs = model(**self._prepare_for_class(inputs, model_class, return_labels=True), use_cache=False)
            outputs[0].sum().backward()
            gradient = model.base_model.layers[0].self_attn.k_proj.weight.grad
            self.assertTrue(gradient.isfinite().all() and gradient.abs().sum() > 0, model_class.__name__)

    def test_training_overfit(self):
        # A frozen embedding and head cannot learn a text by heart; what floats learns, what is integer stays.
        torch.manual_seed(0)
        model = self.model_tester.causal_lm_class(self.model_tester.get_config()).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.arange(1, 20).repeat(2, 3)
        losses = []
        for _ in range(30):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        self.assertLess(losses[-1], 0.9 * losses[0])
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                self.assertTrue(torch.equal(tensor, before[name]), name)
