"""What Prometheus is told of requests, by vLLM's names: their sizes, what they ask for, and where
their time goes."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SIZES = (1, 2, 5, *(x * 10**n for n in range(1, 5) for x in (1, 2, 5)), 100_000)
_MODEL = "model_name"


class RequestHistograms:
    """Histograms and counters of requests to one model."""

    def __init__(self, registry: CollectorRegistry, model: str):
        def histogram(name: str, text: str, buckets: tuple) -> Histogram:
            name = f"vllm:{name}"
            metric = Histogram(name, text, (_MODEL,), registry=registry, buckets=buckets)
            return metric.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, (_MODEL,), registry=registry).labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens processed.")
        self.cached_tokens = counter(
            "prompt_tokens_cached", "Of these, those found in the prefix cache."
        )
        self.output_tokens = counter("generation_tokens", "Tokens generated.")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _SLOW)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens.", FAST)
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "A request's time after its first token, by token.",
            FAST,
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _SLOW)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first computation.", _SLOW)
        self.prefill = histogram(
            "request_prefill_time_seconds", "First computation to first token.", _SLOW
        )
        self.decode = histogram("request_decode_time_seconds", "First token to last.", _SLOW)
        self.inference = histogram(
            "request_inference_time_seconds", "First computation to last token.", _SLOW
        )
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", _SIZES)
        self.output_size = histogram("request_generation_tokens", "Tokens of an output.", _SIZES)
        self.longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest output.", _SIZES
        )
        self.computed = histogram(
            "request_prefill_kv_computed_tokens",
            "Tokens of a prompt that were not in the prefix cache.",
            _SIZES,
        )
        self.params_n = histogram("request_params_n", "Outputs asked for.", (1, 2, 5, 10, 20))
        self.params_max_tokens = histogram(
            "request_params_max_tokens", "Most tokens asked for.", _SIZES
        )
