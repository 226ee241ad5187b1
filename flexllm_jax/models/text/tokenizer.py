"""A checkpoint's tokenizer: how a prompt becomes tokens, and which tokens end an output.

Training and serving ask the same functions, so that what is trained is what is served. transformers
is imported when a tokenizer is loaded: it takes seconds, and far more where PyTorch is installed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from flexllm_jax.config import ConfigError
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import Conversation, ConversationError

# Names of transformers' general class, which has all it needs from tokenizer.json, and the types of
# models for which its AutoTokenizer believes tokenizer_config.json when it names that class.
_GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")
_BELIEVED = ("llama", "qwen3")


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a checkpoint's folder: what transformers' AutoTokenizer makes of it.
    ConfigError when there is none to use."""
    try:
        if _is_general(path):  # without what AutoTokenizer imports: models, with all of PyTorch
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={str(path)!r} has no usable tokenizer ({str(error).splitlines()[0]}): "
            f"give a complete Hugging Face checkpoint"
        ) from None


def _is_general(path: Path) -> bool:
    """Whether AutoTokenizer would take transformers' general class."""
    files = [Path(path) / name for name in ("config.json", "tokenizer_config.json")]
    if not all(file.is_file() for file in (*files, Path(path) / "tokenizer.json")):
        return False
    model, tokenizer = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    known = model.get("model_type") in _BELIEVED and "auto_map" not in tokenizer
    return known and tokenizer.get("tokenizer_class") in _GENERAL


def encode_text(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt. The special tokens that the tokenizer puts before a text (a BOS) are
    not put before one that begins with them."""
    return encode_texts(tokenizer, [text], add_special_tokens=add_special_tokens)[0]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """`encode_text` of several. Other threads run meanwhile."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [each.ids[_twice(each) if add_special_tokens else 0 :] for each in encodings]


def token_starts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Where the tokens of `encode_texts` stand in each text: for each, the characters before it
    that are complete, so that it says what is between its start and the next one's."""
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
    return [_starts(each, _twice(each) if add_special_tokens else 0) for each in encodings]


def _starts(encoding: Encoding, twice: int) -> list[int]:
    starts, reached = [], 0
    for start, end in encoding.offsets[twice:]:
        # Some tokenizers tell offsets without the space before a word, or none for special tokens.
        starts.append(min(start, reached) if start < end else reached)
        reached = max(reached, end)
    return starts


def _twice(encoding: Encoding) -> int:
    """How many of an encoding's first tokens are there twice."""
    before = next((at for at, added in enumerate(encoding.special_tokens_mask) if not added), 0)
    return before if encoding.ids[before : 2 * before] == encoding.ids[:before] else 0


def end_token_ids(tokenizer: Any, of_model: Sequence[int] = ()) -> tuple[int, ...]:
    """The tokens that end an output: those of the checkpoint's generation config or config
    (`of_model`), the tokenizer's, and the one that ends a turn in the chat template. Training ends
    texts and turns with the latter two, which the former may not name: base models with a ChatML
    template, say."""
    ends = [*of_model, tokenizer.eos_token_id, _turn_end(tokenizer)]
    return tuple(dict.fromkeys(token for token in ends if token is not None))


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind what the assistant says, if any."""
    answer = "Four."
    question = {"role": "user", "content": "What is two plus two?"}
    conversation = Conversation([question, {"role": "assistant", "content": answer}])
    try:
        text = ChatTemplate(tokenizer).render(conversation, add_generation_prompt=False)
    except ConversationError:
        return None  # none, or one of other things than a question and its answer
    _, said, behind = text.rpartition(answer)
    backend = tokenizer.backend_tokenizer
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    tokens = backend.encode(behind if said else "", add_special_tokens=False).ids
    return next((token for token in tokens if token in special), None)
