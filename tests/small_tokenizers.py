"""Small tokenizers of the kinds that models have, made by the tokenizers library."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def sentencepiece_tokenizer(
    words: Sequence[str] = (), chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer made like Llama 2's: a space is U+2581 and one is put before every text, `words`
    are merged, bytes of other characters are tokens <0xNN>, and a BOS comes first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for letter in [*map(chr, range(33, 127)), "\u2581"]:
        vocabulary.setdefault(letter, len(vocabulary))
    for word in words:
        for at in range(1, len(word)):
            pair = (word[:at], word[at])
            if pair not in merges:
                merges.append(pair)
            vocabulary.setdefault(word[: at + 1], len(vocabulary))
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(bpe)
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def byte_level_tokenizer(
    special: Sequence[str] = ("<unk>", "<s>", "</s>"),
    eos: str | None = "</s>",
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A token a byte, and the special ones before them."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    others = [token for token in special if token != eos]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        additional_special_tokens=others,
        chat_template=chat_template,
    )
