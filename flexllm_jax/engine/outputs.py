"""What the Python API returns for a prompt."""

from dataclasses import dataclass

from flexllm_jax.engine.request import TokenLogprobs


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a prompt. `logprobs`: for each token, token id -> log-probability.
    `reasoning`: what `LLM.chat` tells apart from `text` as a thought before it; None: nothing."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None
    reasoning: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What came of one prompt; the attributes of a single output are here too.

    `prompt_logprobs` has None for the first token, which nothing precedes.
    """

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None
    ttft_s: float | None
    tpot_s: float | None

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.outputs[0].text

    @property
    def reasoning(self) -> str | None:
        """What was thought before the first output's text."""
        return self.outputs[0].reasoning

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first output."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first output."""
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        """Why the first output ended: "stop" or "length"."""
        return self.outputs[0].finish_reason
