"""transformers' own common tests, as far as they apply to an image classifier.

`make test-common` runs this file on the package that `fetch.py` makes; `make test` does not collect it.
"""

from __future__ import annotations

import unittest

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification

MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["jeidnn"] = JEIDNNForImageClassification.__name__  # so labels are made


class ModelTester:
    """A ViT of two blocks, with an exit after each, on 13 images of 32 x 32 pixels: 2 x 2 patches and a class token."""

    is_training = True
    batch_size, num_hidden_layers, hidden_size, seq_length = 13, 2, 64, 5

    def __init__(self, **options):
        self.options = options

    def get_config(self) -> JEIDNNConfig:
        return JEIDNNConfig(
            backbone="test_vit", backbone_kwargs={"depth": 2}, image_size=32, num_labels=10, **self.options
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[JEIDNNConfig, dict]:
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 32, 32])}


class CommonTests(ModelTesterMixin):
    """What does not apply to either recipe is skipped here, with its reason."""

    all_model_classes = (JEIDNNForImageClassification,)
    has_attentions = False  # timm's blocks keep theirs to themselves
    test_resize_embeddings = False

    def test_config(self):
        config_tester = ConfigTester(self, JEIDNNConfig, has_text_modality=False, common_properties=["num_labels"])
        config_tester.run_common_tests()

    @unittest.skip("An image classifier has no nn.Embedding as input.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("The hidden states are a frozen backbone's: they have no gradient.")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("Loads a checkpoint without any weight and expects a warning: here that is a ValueError.")
    def test_model_weights_reload_no_missing_tied_weights(self):
        pass


class PaperRecipeTest(CommonTests, unittest.TestCase):
    def setUp(self):
        self.model_tester = ModelTester(recipe="paper", native_head=False)


class DefaultRecipeTest(CommonTests, unittest.TestCase):
    def setUp(self):
        self.model_tester = ModelTester(recipe="default")

    @unittest.skip("The ensemble is one of class probabilities: a ValueError for regression and several labels.")
    def test_problem_types(self):
        pass

    @unittest.skip("Another number of labels than that of a frozen native head is a ValueError.")
    def test_can_load_ignoring_mismatched_shapes(self):
        pass
