"""What a request may ask of sampling, checked once when it is made."""

from dataclasses import dataclass, field
from itertools import chain

from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from scheduler.drafts import MOST

TOP_LOGPROBS = 20  # most alternatives a request can ask for, as in the OpenAI interface
BANNED = 16  # most tokens that min_tokens can hold back
BIASES = 300  # most tokens with a logit_bias, as in the OpenAI interface
WANTED = 128  # most logprob_token_ids, as in vLLM


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a request's output; the names and meanings are vLLM's.

    max_tokens           most output tokens
    min_tokens           no stop token before this many output tokens, unless structured_outputs
                         let nothing else follow
    temperature          0 is greedy
    top_k                most likely tokens to draw from; 0 or -1: all
    top_p                probability mass to draw from
    min_p                least probability, relative to the most likely token's
    repetition_penalty   > 1 makes tokens of prompt and output less likely (arXiv 1909.05858)
    presence_penalty, frequency_penalty   subtracted once, or per occurrence, for output tokens
    seed                 makes draws reproducible whatever else runs; None: the engine picks one
    stop                 strings that end the output, which then ends before them
    stop_token_ids       tokens that end the output; end-of-sequence tokens do unless ignore_eos
    include_stop_str_in_output   leave the stop string or token that ended the output in its text
    logit_bias           added to the logits of tokens, from -100 to 100
    allowed_token_ids    the only tokens that may come
    bad_words            words that do not come, as they stand or after a space
    logprobs             number of alternatives to report per output token; None: no report
    logprob_token_ids    the alternatives to report, in place of the most likely ones
    logprobs_at_temperature   report those of the distribution that the temperature makes
    prompt_logprobs      the same for the prompt
    prompt_logprob_token_ids   for each token of the prompt after the first, others to report too
    n                    outputs per prompt
    structured_outputs   what the output must match; it then ends with an end-of-sequence token
    num_speculative_tokens   most tokens tried at once that prompt lookup proposes; None: as the
                         engine is configured. What comes is the same. None are tried beside
                         penalties, biases, and what only lets some tokens come
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    stop_token_ids: tuple[int, ...] = field(default=())
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = field(default=())
    bad_words: tuple[str, ...] = field(default=())
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = field(default=())
    logprobs_at_temperature: bool = False
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: tuple[tuple[int, ...], ...] = field(default=())
    n: int = 1
    structured_outputs: StructuredOutputsParams | None = None
    num_speculative_tokens: int | None = None

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        of_prompt = tuple(tuple(row) for row in self.prompt_logprob_token_ids or ())
        object.__setattr__(self, "prompt_logprob_token_ids", of_prompt)
        biases, wanted = self.logit_bias.values(), self.logprob_token_ids
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= -1, "-1, 0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "more than 0"),
            "presence_penalty": (abs(self.presence_penalty) <= 2, "between -2 and 2"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 2, "between -2 and 2"),
            "stop": (all(self.stop), "strings that are not empty"),
            "n": (self.n >= 1, "at least 1"),
            "num_speculative_tokens": (
                0 <= (self.num_speculative_tokens or 0) <= MOST,
                f"between 0 and {MOST}",
            ),
            "logit_bias": (all(-100 <= bias <= 100 for bias in biases), "of -100 to 100"),
            "bad_words": (all(word.strip() for word in self.bad_words), "words"),
            "logprob_token_ids": (not wanted or self.logprobs is not None, "beside logprobs"),
            "prompt_logprob_token_ids": (
                not of_prompt or self.prompt_logprobs is not None,
                "beside prompt_logprobs",
            ),
        }
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            allowed = count is None or 0 <= count <= TOP_LOGPROBS
            checks[name] = (allowed, f"between 0 and {TOP_LOGPROBS}")
        for name, most in (("logit_bias", BIASES), ("logprob_token_ids", WANTED)):
            if (count := len(getattr(self, name))) > most:
                raise ValueError(f"{name}: it has {count} tokens, at most {most} can be told of")
        if (count := max(map(len, of_prompt), default=0)) > WANTED:
            raise ValueError(
                f"prompt_logprob_token_ids: a row has {count} tokens, at most {WANTED} can be told "
                f"of"
            )
        for name, (good, rule) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")

    @property
    def has_row_state(self) -> bool:
        """Whether sampling needs what the device keeps of a request: its tokens so far, its
        biases."""
        return (
            bool(self.logit_bias)
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def held_back(self) -> int:
        """Output tokens before which the device draws no stop token: beside a structure the
        constraint says it, which knows where only the end may follow."""
        return 0 if self.structured_outputs else self.min_tokens

    @property
    def is_constrained(self) -> bool:
        """Whether some tokens may not come."""
        return bool(self.structured_outputs or self.allowed_token_ids or self.bad_words)

    def drafts(self, default: int) -> int:
        """Most tokens that are tried at once, `default` if it does not say."""
        if self.has_row_state:
            return 0  # how likely a token is depends on those before
        asked = self.num_speculative_tokens
        return default if asked is None else asked

    def check_tokens(self, vocab_size: int) -> None:
        """ValueError for a token that the model does not have."""
        names = ("logit_bias", "allowed_token_ids", "logprob_token_ids")
        given = {name: iter(getattr(self, name)) for name in names}
        of_prompt = chain.from_iterable(self.prompt_logprob_token_ids)
        for name, tokens in (given | {"prompt_logprob_token_ids": of_prompt}).items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name}: token id {token} is outside of the vocabulary of {vocab_size}: "
                        f"use this model's tokenizer"
                    )

    def stop_ids(self, eos: tuple[int, ...]) -> frozenset[int]:
        """Tokens that end the output."""
        ends = () if self.ignore_eos and not self.structured_outputs else eos
        return frozenset(self.stop_token_ids).union(ends)

    def check_banned(self, eos: tuple[int, ...]) -> None:
        """ValueError when min_tokens would have to hold back more tokens than the device can."""
        stops = len(self.stop_ids(eos))
        if self.held_back and stops > BANNED:
            raise ValueError(
                f"min_tokens={self.min_tokens} with {stops} stop tokens: at most {BANNED} can be "
                f"held back; give fewer stop_token_ids"
            )
