"""What a request may ask of sampling, checked once when it is made."""

from dataclasses import dataclass, field

from flexllm_jax.engine.structured_outputs import StructuredOutputsParams

TOP_LOGPROBS = 20  # most alternatives a request can ask for, as in the OpenAI interface
BANNED = 16  # most tokens that min_tokens can hold back


@dataclass(frozen=True)
class SamplingParams:
    """How to sample a request's output; the names and meanings are vLLM's.

    max_tokens           most output tokens
    min_tokens           no stop token before this many output tokens
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
    logprobs             number of alternatives to report per output token; None: no report
    prompt_logprobs      the same for the prompt
    n                    outputs per prompt
    structured_outputs   what the output must match; it then ends with an end-of-sequence token
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
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
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
        }
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            allowed = count is None or 0 <= count <= TOP_LOGPROBS
            checks[name] = (allowed, f"between 0 and {TOP_LOGPROBS}")
        for name, (good, rule) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.structured_outputs and self.min_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} cannot be had with structured_outputs, which say "
                f"when an output is complete: leave it out"
            )

    @property
    def needs_history(self) -> bool:
        """Whether sampling depends on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def stop_ids(self, eos: tuple[int, ...]) -> frozenset[int]:
        """Tokens that end the output."""
        ends = () if self.ignore_eos and not self.structured_outputs else eos
        return frozenset(self.stop_token_ids).union(ends)

    def check_banned(self, eos: tuple[int, ...]) -> None:
        """ValueError when min_tokens would have to hold back more tokens than the device can."""
        stops = len(self.stop_ids(eos))
        if self.min_tokens and stops > BANNED:
            raise ValueError(
                f"min_tokens={self.min_tokens} with {stops} stop tokens: at most {BANNED} can be "
                f"held back; give fewer stop_token_ids"
            )
