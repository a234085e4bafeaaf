"""What the server counts, in Prometheus' form.

The three gauges that gateways look for, the histograms of times, and the counts of prompt look-up
and of answers that gave way have vLLM's names
(https://docs.vllm.ai/en/latest/design/metrics.html); the rest begins with `llava:`.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
      model: the served name, a label of all.
    """

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        label = {"labelnames": ["model_name"], "registry": self.registry}

        def gauge(name: str, text: str):
            return Gauge(name, text, **label).labels(model)

        def counter(name: str, text: str, *labels: str):
            made = Counter(name, text, labelnames=["model_name", *labels], registry=self.registry)
            return made if labels else made.labels(model)

        def seconds(name: str, text: str):
            return Histogram(name, text, buckets=SECONDS, **label).labels(model)

        self.model = model
        self.running = gauge("vllm:num_requests_running", "Requests that have a row")
        self.waiting = gauge("vllm:num_requests_waiting", "Requests that wait for a row")
        self.cache_use = gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages in use")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers")
        self.first_token = seconds("vllm:time_to_first_token_seconds", "From request to first text")
        self.between = seconds("vllm:inter_token_latency_seconds", "Between two pieces of text")
        self.whole = seconds("vllm:e2e_request_latency_seconds", "From request to end of answer")
        self._success = counter(
            "vllm:request_success", "Answers by how they ended", "finished_reason"
        )
        self.cached_tokens = counter(
            "llava:cached_prompt_tokens", "Prompt tokens found in the cache"
        )
        self.put_back = counter("vllm:num_preemptions", "Answers that gave way in a full cache")
        self.drafts = counter("vllm:spec_decode_num_drafts", "Runs of tokens guessed by look-up")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Tokens guessed")
        self.accepted_tokens = counter(
            "vllm:spec_decode_num_accepted_tokens", "Guessed tokens that came true"
        )
        self.images = counter("llava:images", "Pictures received")
        self._rejected = counter("llava:rejected", "Requests refused, by HTTP status", "status")
        self.cancelled = counter("llava:cancelled", "Answers whose client left")
        self.faults = counter("llava:engine_faults", "Steps that failed")
        self.compilations = gauge("llava:compilations", "Programs compiled since the start")
        self.loop_lag = seconds("llava:loop_lag_seconds", "How late the event loop runs")

    def ended(self, reason: str) -> None:
        self._success.labels(self.model, reason).inc()

    def rejected(self, status: int) -> None:
        self._rejected.labels(self.model, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
