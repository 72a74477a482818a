"""What Prometheus reads. Names are vLLM's where vLLM has one, so that its dashboards fit.

The engine's own counts are read when they are asked for; what a request took is noted at its end.
"""

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gemsmith.engine.batching import Stats
from gemsmith.engine.request import FinishReason, Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TOKENS = tuple(4**i for i in range(10))


class Metrics:
    """The counts of one server, in a registry of their own."""

    def __init__(self, model: str, stats: Callable[[], Stats], weights_bytes: int) -> None:
        self._stats, self._model, self._weights_bytes = stats, model, weights_bytes
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory and CPU time, on Linux
        self._registry.register(self)  # pyright: ignore[reportArgumentType]
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by why.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._errors = Counter(
            "gemsmith:request_errors",
            "Requests answered with an error, by HTTP status.",
            ["model_name", "status"],
            registry=self._registry,
        )
        self._media = Counter(
            "gemsmith:media_tokens",
            "Tokens of prompts that stand for media.",
            ["model_name", "kind"],
            registry=self._registry,
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Queue and prefill.", SECONDS
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Until the last token.", SECONDS
        )
        self._token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of a request.", PER_TOKEN
        )
        self._prompts = self._histogram("vllm:request_prompt_tokens", "Of a request.", TOKENS)
        self._replies = self._histogram("vllm:request_generation_tokens", "Of a request.", TOKENS)

    def finished(self, usage: Usage, reason: FinishReason) -> None:
        """Note a request that ended."""
        name = self._model
        # vLLM knows stop, length, abort and error.
        word = "length" if reason is FinishReason.LENGTH else "stop"
        self._success.labels(name, word).inc()
        for kind in ("image", "audio", "video"):
            self._media.labels(name, kind).inc(getattr(usage, f"{kind}_tokens"))
        self._first.labels(name).observe(usage.time_to_first_token_s)
        self._whole.labels(name).observe(usage.total_s)
        if usage.completion_tokens > 1:
            spent = usage.total_s - usage.time_to_first_token_s
            self._token.labels(name).observe(spent / (usage.completion_tokens - 1))
        self._prompts.labels(name).observe(usage.prompt_tokens)
        self._replies.labels(name).observe(usage.completion_tokens)

    def refused(self, status: int) -> None:
        """Note a request answered with an error."""
        self._errors.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's counts; called by the registry."""
        stats = self._stats()
        gauges = {
            "vllm:num_requests_running": ("Requests in the batch.", stats.running),
            "vllm:num_requests_waiting": ("Requests in the queue.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Of all K/V blocks, 1 is all.", stats.kv_usage),
            "gemsmith:kv_used_bytes": ("Of K/V blocks in use.", stats.kv_used_bytes),
            "gemsmith:kv_bytes": ("Of all K/V blocks.", stats.kv_bytes),
            "gemsmith:weights_bytes": ("Of weights in memory.", self._weights_bytes),
        }
        counters = {
            "vllm:num_preemptions": ("Requests put back for lack of K/V.", stats.preemptions),
            "vllm:prompt_tokens": ("Tokens of prompts computed.", stats.prompt_tokens),
            "vllm:prompt_tokens_cached": ("Tokens of prompts not computed.", stats.cached_tokens),
            "vllm:prefix_cache_queries": (
                "Tokens of prompts asked of the prefix cache.",
                stats.cached_tokens + stats.prompt_tokens,
            ),
            "vllm:prefix_cache_hits": ("Those that it had.", stats.cached_tokens),
            "gemsmith:prefix_hits": ("Prompts of which it had a part.", stats.prefix_hits),
            "gemsmith:prefix_restored": (
                "Ends of turns that came from disk.",
                stats.checkpoints_restored,
            ),
            "vllm:generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "vllm:spec_decode_num_drafts": ("Times a reply was guessed ahead.", stats.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens guessed.", stats.draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": (
                "Those that were right.",
                stats.accepted_tokens,
            ),
            "gemsmith:steps": ("Passes of the model.", stats.steps),
            "gemsmith:busy_seconds": ("Time spent in steps.", stats.busy_s),
            "gemsmith:requests_aborted": ("Clients that went away, or ran late.", stats.aborted),
            "gemsmith:requests_failed": ("Requests that failed in the model.", stats.failed),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(name, help, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (help, value) in counters.items():
            counter = CounterMetricFamily(name, help, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter

        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guesses that were right, by their place among those of a step.",
            labels=["model_name", "position"],
        )
        for place, count in enumerate(stats.accepted_by_place):
            accepted.add_metric([self._model, str(place)], count)
        yield accepted

        misses = CounterMetricFamily(
            "gemsmith:prefix_misses",
            "Prompts of which the prefix cache had nothing, or less than there was, by why.",
            labels=["model_name", "reason"],
        )
        for reason, count in stats.prefix_misses.items():
            misses.add_metric([self._model, str(reason)], count)
        yield misses

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, ["model_name"], buckets=buckets, registry=self._registry)
