"""Laws of the memory plan: never above the limit, refused with both numbers, monotone in the limit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmdgpu.errors import MemoryLimitError
from cmdgpu.memory import parse_bytes, show_bytes
from cmdgpu.streaming.plan import SLOT_PADDING, TARGET_BLOCK_BYTES, Plan, plan_direct, plan_pass

PROBLEMS = st.fixed_dictionaries(
    {
        "n_units": st.integers(0, 2000),
        "rows": st.sampled_from([256, 16384, 65536, 1 << 18, 1 << 20]),
        "n_snapshots": st.integers(1, 3000),
        "itemsize": st.sampled_from([2, 4]),
        "fits": st.integers(1, 20),
        "lanes": st.integers(1, 8),
        "lane_bytes": st.integers(0, 1 << 28),
        "fixed_bytes": st.integers(0, 1 << 32),
    }
)
LIMITS = st.integers(1, 1 << 36)


def plan_of(problem: dict[str, Any], limit: int) -> Plan | None:
    try:
        return plan_pass(**problem, limit_bytes=limit)
    except MemoryLimitError:
        return None


def size_of(plan: Plan | None) -> tuple[int, int]:
    return (0, 0) if plan is None else (plan.units_per_block, plan.slots)


@given(PROBLEMS, LIMITS)
def test_what_a_pass_holds_fits_the_plan_and_the_plan_the_limit(problem: dict[str, Any], limit: int) -> None:
    plan = plan_of(problem, limit)
    if plan is None:
        return
    width = plan.units_per_block * problem["rows"]
    slots = plan.slots * problem["n_snapshots"] * (width + SLOT_PADDING) * problem["itemsize"]
    outputs = problem["fits"] * width * (2 + 4 * 4)
    written = problem["rows"] * (2 + 3 * 4)
    lanes = problem["lanes"] * (slots + outputs + problem["lane_bytes"])
    assert lanes + written + problem["fixed_bytes"] <= plan.needed_bytes <= limit
    assert plan.slots >= 2, "one slot is computed on while another fills"
    assert plan.units_per_block >= 1


@given(PROBLEMS, LIMITS, LIMITS)
@example(
    {
        "n_units": 9, "rows": 256, "n_snapshots": 9, "itemsize": 4,
        "fits": 1, "lanes": 1, "lane_bytes": 0, "fixed_bytes": 0,
    },
    1 << 25, 1 << 26,
)  # fmt: skip
def test_a_larger_limit_never_gives_smaller_blocks(problem: dict[str, Any], one: int, other: int) -> None:
    small, large = sorted((one, other))
    less, more = size_of(plan_of(problem, small)), size_of(plan_of(problem, large))
    assert less[0] <= more[0] and less[1] <= more[1]


@given(PROBLEMS)
def test_the_smallest_limit_that_works_is_named_with_the_one_given(problem: dict[str, Any]) -> None:
    with pytest.raises(MemoryLimitError) as refused:
        plan_pass(**problem, limit_bytes=1000)
    assert f"the memory limit is {show_bytes(1000)}" in refused.value.message
    assert f"{problem['rows']} rows x {problem['n_snapshots']} snapshots" in refused.value.message
    named = re.match(r"give (\d+MiB) or more", str(refused.value.hint))
    assert named is not None
    works = parse_bytes(named[1])
    assert plan_of(problem, works) is not None
    assert plan_of(problem, works - (1 << 20)) is None
    said = re.search(r"2 slots\) needs (\S+ \S+), ", refused.value.message)
    assert said is not None and works - (1 << 20) < parse_bytes(said[1]) * 1.01
    assert parse_bytes(said[1]) <= works * 1.01


@given(PROBLEMS, LIMITS)
def test_blocks_hold_every_unit_once_in_order(problem: dict[str, Any], limit: int) -> None:
    plan = plan_of(problem, limit)
    if plan is None:
        return
    units = [unit for first, stop in plan.blocks() for unit in range(first, stop)]
    assert units == list(range(problem["n_units"]))
    assert all(stop - first <= plan.units_per_block for first, stop in plan.blocks())


@given(PROBLEMS)
def test_blocks_stop_growing_where_it_stops_paying(problem: dict[str, Any]) -> None:
    plan = plan_of(problem, 1 << 50)
    assert plan is not None and plan.slots == 3
    block = plan.units_per_block * problem["rows"] * problem["n_snapshots"] * problem["itemsize"]
    assert block <= TARGET_BLOCK_BYTES or plan.units_per_block == 1
    assert plan.units_per_block <= max(problem["n_units"], 1)


@given(
    rows=st.sampled_from([256, 16384, 1 << 18, 1 << 20]),
    threads=st.integers(1, 64),
    past_cache=st.booleans(),
    fixed=st.integers(0, 1 << 30),
    own=st.integers(0, 1 << 26),
    fits=st.integers(1, 20),
    limit=LIMITS,
)
def test_a_pass_straight_from_files_takes_as_many_threads_as_fit_or_names_what_the_fewest_need(
    rows: int, threads: int, past_cache: bool, fixed: int, own: int, fits: int, limit: int
) -> None:
    fewest = threads if past_cache else 1

    def plan(threads: int, limit: int) -> Plan:
        return plan_direct(
            n_units=9,
            rows=rows,
            itemsize=4,
            threads=threads,
            past_cache=past_cache,
            fits=fits,
            fixed_bytes=fixed,
            thread_bytes=own,
            limit_bytes=limit,
        )

    try:
        found = plan(threads, limit)
    except MemoryLimitError as error:
        assert plan(threads, error.needed_bytes).threads == fewest and error.needed_bytes > limit
        return
    assert found.past_cache == past_cache
    assert fewest <= found.threads <= threads and found.slots == 0
    assert fixed + found.threads * (own + rows * (4 + fits * 18)) < found.needed_bytes <= limit
    if found.threads < threads:
        assert plan(found.threads + 1, 1 << 60).needed_bytes > limit
