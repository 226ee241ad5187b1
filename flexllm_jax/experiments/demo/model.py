"""The demo's base model: a Llama of 1.8 million parameters, and its tokenizer, from text.

Both are Hugging Face's: byte-level BPE with a chat template, config.json and safetensors. The
decoder is the engine's; training is plain `jax.value_and_grad` of it over dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
)

from flexllm_jax.experiments.demo.documents import ASSISTANT, END, SYSTEM, USER
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.mixers.gated_delta import rule_inputs
from flexllm_jax.models.spec import GatedDeltaSpec
from kernels_pallas.gated_delta import conv_window, delta_window
from kernels_pallas.layer_passes import rotate

VOCABULARY = 1024
ROW = 128  # tokens of a training row
ROWS_PER_STEP = 8
WINDOW = 16  # of families that have one: shorter than a question with its answer
# What the demo's model may look like: transformers' configuration and model, and fields of theirs.
FAMILIES: dict[str, tuple[Callable[..., PreTrainedConfig], str, dict[str, Any]]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM", {}),
    "mistral": (MistralConfig, "MistralForCausalLM", {"sliding_window": WINDOW}),
    "gemma": (
        Gemma3TextConfig,
        "Gemma3ForCausalLM",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3.5": (
        Qwen3_5TextConfig,
        "Qwen3_5ForCausalLM",
        {
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
# Tools have a place in it, so that clients that bring some can be tried with it; the model itself
# has never seen any, and calls one when it must (`tool_choice`).
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }} are called as <tool_call></tool_call><|end|>"
    "{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; turns and documents end with its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, chat_template=CHAT_TEMPLATE
    )


def write_config(folder: Path, tokenizer: Any, family: str = "llama") -> ModelConfig:
    """Write config.json, generation_config.json and the tokenizer; return the config as read.
    family: one of `FAMILIES`."""
    config_class, architecture, own = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=[architecture],
        dtype="float32",
        **own,
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig.from_hf(folder)


def initial_parameters(config: ModelConfig, seed: int) -> Any:
    """Random float32 parameters: norms 1, embeddings 0.02, kernels by fan-in, outputs smaller."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [getattr(key, "key", None) for key in path]
        if "log_a" in names:
            return np.log(rng.uniform(0.01, 1.0, shape.shape)).astype(np.float32)
        if len(shape.shape) == 1:  # weights of norms, some of which add 1 to what is stored
            offset = config.layers[0].norm.offset and "out_norm" not in names
            return np.full(shape.shape, 0.0 if offset else 1.0, np.float32)
        scale = 0.02 if "embed" in names else shape.shape[0] ** -0.5
        if {"o", "out", "down"} & {*names}:
            scale /= (2 * config.num_layers) ** 0.5
        return rng.normal(0, scale, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_parameters(config, jnp.float32))


def mean_loss(decoder: Decoder, params: Any, rows: jax.Array, documents: jax.Array) -> jax.Array:
    """Next-token cross-entropy over rows [B, S+1] of token ids.

    Attention is causal and stays within a document; `documents` [B, S] numbers them.
    """
    config, (batch, length) = decoder.config, documents.shape
    together = (documents[:, :, None] == documents[:, None, :])[:, None]  # [B, 1, S, S]
    places = jnp.arange(length)
    behind = places[:, None] - places
    tokens = rows[:, :-1].reshape(-1)  # [T], T = B * S
    x = decoder.embed(params, tokens)
    token_inputs = decoder.token_inputs(params, tokens, x)
    positions, kept = jnp.tile(places, batch), {}
    for i, (layer_params, spec) in enumerate(zip(params["layers"], config.layers, strict=True)):
        layer, mixer = decoder.layer(layer_params, spec), spec.mixer
        if isinstance(mixer, GatedDeltaSpec):
            projected, gate, x = layer.project(x)
            mixed = _delta(layer, projected, documents)
            x = layer.after_mixing(x, mixed, gate, own=token_inputs[i])
            continue
        options = mixer.options
        if options.soft_cap is not None:
            raise ValueError("a soft cap of scores is not in this attention: take another family")
        angles = decoder.angles(positions, mixer)
        (q, *own), gate, x = layer.project(x, query_factor=angles.query_factor)
        if own:
            kept[i] = rotate(own[0], angles.rotation), own[1]
        heads = (rotate(q, angles.rotation), *kept[config.cache_of[i]])
        q, k, v = (own.reshape(batch, length, *own.shape[1:]) for own in heads)
        attended = jax.nn.dot_product_attention(
            *(q, k, v),
            mask=together & (behind < (options.window or length)),
            is_causal=True,
            scale=options.scale_of(q.shape[-1]),
        )
        attended = attended.reshape(batch * length, *attended.shape[2:])
        x = layer.after_mixing(x, attended, gate, own=token_inputs[i])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        decoder.logits(params, x), rows[:, 1:].reshape(-1)
    )
    return losses.mean()


def _delta(layer: Any, projected: tuple[jax.Array, ...], documents: jax.Array) -> jax.Array:
    """The gated delta rule of rows of documents [B, S]; [B * S, Hv, dv]."""
    spec: GatedDeltaSpec = layer.spec.mixer

    def one_row(u: jax.Array, b: jax.Array, a: jax.Array, numbers: jax.Array) -> jax.Array:
        first = jnp.diff(numbers, prepend=-1) != 0
        before = jnp.zeros((spec.width - 1, spec.channels), u.dtype)
        convolved = conv_window(u, layer.conv.weight[...], before, first)
        state, is_token = jnp.zeros(spec.state, jnp.float32), jnp.ones_like(first)
        return delta_window(*rule_inputs(layer, convolved, b, a), first, is_token, state)[0]

    u, b, a = (x.reshape(*documents.shape, -1) for x in projected)
    mixed = jax.vmap(one_row)(u, b, a, documents)
    return mixed.reshape(-1, *mixed.shape[2:])


def training_rows(
    tokenizer: Any, texts: Iterator[str], steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (token ids [B, S+1], document numbers [B, S]): documents in a row, the last one cut.

    Every document stands alone: other people's documents before it would hide for long which name
    a fact belongs to.
    """
    for _ in range(steps):
        rows = np.zeros((ROWS_PER_STEP, ROW + 1), np.int32)
        documents = np.zeros((ROWS_PER_STEP, ROW + 1), np.int32)
        for row, numbers in zip(rows, documents, strict=True):
            at = number = 0
            while at <= ROW:
                tokens = tokenizer(next(texts))["input_ids"][: ROW + 1 - at]
                row[at : at + len(tokens)] = tokens
                numbers[at : at + len(tokens)] = number
                at, number = at + len(tokens), number + 1
        yield rows, documents[:, :-1]


def train(
    config: ModelConfig,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
) -> Any:
    """Train with Muon, AdamW for what is no matrix; `report(step, loss)` after each step.

    Muon (Jordan et al. 2024) needs half of AdamW's steps here.
    """
    decoder = Decoder(config, jnp.dtype(jnp.float32))
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, min(20, steps // 5), steps, 2.5e-4)

    def kind(path: tuple[Any, ...], leaf: jax.Array) -> str:
        matrix = leaf.ndim == 2 and getattr(path[0], "key", None) != "embed"
        return "muon" if matrix else "adamw"

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {
                "muon": optax.contrib.muon(lambda step: 5 * rate(step)),
                "adamw": optax.adamw(rate, b2=0.98, weight_decay=0.0),
            },
            lambda params: jax.tree_util.tree_map_with_path(kind, params),
        ),
    )

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(lambda p: mean_loss(decoder, p, *batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.asarray, initial_parameters(config, seed))
    state = optimizer.init(params)
    for index, batch in enumerate(batches):
        params, state, loss = step(params, state, batch)
        report(index + 1, float(loss))
    return params
