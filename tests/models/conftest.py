"""Write folders of tiny random models with a tokenizer of words, by ``save_pretrained``."""

import pytest
import torch
import transformers

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "other", "dog", "ran"]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {
    **TINY,
    "vocab_size": 20,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", **special
    )


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a model of the named class and returns its folder."""

    def write(name, special=None, **options):
        model_class = getattr(transformers, name)
        torch.manual_seed(1)
        model = model_class(model_class.config_class(**options))
        model.save_pretrained(tmp_path / name)
        if special is not None:
            tokenizer(**special).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def text():
    """Return the options of a tiny text model that fits the tokenizer."""
    return dict(TEXT)


@pytest.fixture
def vit(folder):
    return folder("ViTForImageClassification", **TINY, image_size=8, patch_size=4, num_labels=5)


@pytest.fixture
def bert(folder):
    return folder("BertForSequenceClassification", {"pad_token": "<pad>"}, **TEXT)


@pytest.fixture
def llama(folder):
    return folder("LlamaForCausalLM", {}, **{**TEXT, "pad_token_id": None})
