"""Questions in, answers out: prefill and decode, sampling, batched generation, chat."""
