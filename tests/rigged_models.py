"""Models whose answers are known in advance, for tests of metrics.

`bigram` is a real Llama rigged so that the next token depends on the last one alone, with probabilities that the test
chooses: its layers add nothing, its embeddings are one-hot, and its head holds log-probabilities.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.types import EvalSet

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
OF = {name: index for index, name in enumerate(["<s>", "</s>", *ALPHABET, *("Ġ" + letter for letter in "ABCD")])}
BOS, EOS = 0, 1
WIDTH = 264


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """BOS, then bytes, with one token each for " A" to " D"."""
    raw = Tokenizer(models.BPE(vocab=OF, merges=[("Ġ", letter) for letter in "ABCD"]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def bigram(following: dict[str, dict[str, float]]) -> LoadedModel:
    """A Llama that gives each named token its probabilities; what is left is spread over all other tokens."""
    config = LlamaConfig(
        vocab_size=len(OF),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    table = torch.full((len(OF), len(OF)), 1 / len(OF), dtype=torch.float64)
    for last, probabilities in following.items():
        rest = (1 - sum(probabilities.values())) / (len(OF) - len(probabilities))
        table[OF[last]] = rest
        for token, probability in probabilities.items():
            table[OF[last], OF[token]] = probability
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(OF), WIDTH))
        # The final norm multiplies a one-hot vector by the root of its width.
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, : len(OF)] = (table.log().T / math.sqrt(WIDTH)).float()
    return LoadedModel(model=model, tokenizer=tiny_tokenizer())


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(OF),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def edited(model: LlamaForCausalLM, layer: int) -> LoadedModel:
    """A subject whose MLP output matrix in one layer was changed."""
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    original = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return LoadedModel(model=model, tokenizer=tiny_tokenizer(), originals={name: original})


def chain(text: list[str]) -> dict[str, dict[str, float]]:
    """Each token is followed by the next with probability 0.9."""
    return {last: {token: 0.9} for last, token in pairwise(text)}


def forget_set(**parts: Any) -> EvalSet:
    return EvalSet(name="forget", role="forget", **parts)


def retain_set(**parts: Any) -> EvalSet:
    return EvalSet(name="retain", role="keep", **parts)


def answering(model: LoadedModel, data: EvalSet, answers: Sequence[Sequence[str]], **settings: Any) -> Reading:
    """A reading of a model that gives these answers to the set's questions."""
    reading = Reading(model, data, **settings)
    reading.__dict__["answers"] = [tuple(texts) for texts in answers]
    return reading


TEXTS = ("one short text", "a", "another text, a little longer", "x: y")
