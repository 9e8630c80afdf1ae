"""The instruments, calibrated against a callable of known duration and a tensor of known size."""

import pytest
import torch

from vitlib import timing
from vitlib.timing import Budget

CPU = torch.device("cpu")


def test_latency_of_a_known_duration_is_within_two_and_a_half_percent():
    frame = timing.latency({"a": timing.busy(0.004)}, CPU, Budget(rounds=3, samples=20, seconds=1.0))
    assert frame["latency_ms"].min() == pytest.approx(4.0, rel=0.025)  # other processes only make it longer


def test_throughput_of_a_known_duration_is_within_two_and_a_half_percent():
    # Short rounds and the best of many: other processes only make one longer.
    frame = timing.throughput({"a": timing.busy(0.004)}, {"a": 8}, CPU, Budget(rounds=40, samples=3, seconds=1.0))
    assert frame["throughput_img_s"].max() == pytest.approx(2000, rel=0.025)


def test_throughput_is_measured_at_its_batch_not_inverted_from_batch_one():
    """A call that costs the same for 1 and 8 pictures has eight times the throughput at 8, whatever batch 1 took."""
    calls = {1: timing.busy(0.002), 8: timing.busy(0.002)}
    rates = timing.throughput(calls, {1: 1, 8: 8}, CPU, Budget(30, 3, 0.5)).groupby("candidate")["throughput_img_s"]
    assert rates.max()[8] == pytest.approx(8 * rates.max()[1], rel=0.1)


def test_every_candidate_is_measured_in_every_round_and_the_order_changes():
    order = []
    calls = {name: lambda _, name=name: order.append(name) for name in "abcd"}
    frame = timing.latency(calls, CPU, Budget(rounds=6, samples=2, seconds=0.1))
    assert (frame.groupby(["candidate", "round"]).size() >= 1).all()
    assert len(frame[["candidate", "round"]].drop_duplicates()) == 24
    firsts = frame.groupby("round")["candidate"].first()
    assert firsts.nunique() > 1


def test_inputs_rotate():
    numbers = []
    timing.latency({"a": numbers.append}, CPU, Budget(rounds=2, samples=4, seconds=0.1))
    assert {0, 1, 2, 3} <= set(numbers)


@pytest.mark.parametrize("megabytes", [8, 64])
def test_peak_memory_of_a_tensor_of_known_size_is_within_two_percent(megabytes):
    peak = timing.peak_memory_mb(lambda _: torch.empty(megabytes * 2**20, dtype=torch.uint8).fill_(1), CPU)
    assert peak.allocated == pytest.approx(megabytes, rel=0.02)


def test_peak_memory_is_the_most_held_at_once():
    def call(_: int) -> None:
        for _ in range(5):
            torch.empty(16 * 2**20, dtype=torch.uint8).fill_(1)

    assert timing.peak_memory_mb(call, CPU).allocated == pytest.approx(16, rel=0.02)
