"""`pipeline topics`: the broker's topics against topics/*.toml, as lines or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.options import Address, parse_url
from pipeline.adapters.kafka.plan import Plan, Step, Wish
from pipeline.adapters.kafka.topics import TopicAdmin
from pipeline.cli import console
from pipeline.config import Config
from pipeline.settings import KafkaSettings


def run_plan(url: str, wish: Wish, config: Config, *, as_json: bool) -> int:
    """Print the differences; return the exit code, 1 if one of them would be refused."""
    address = parse_url(url)
    plan = _admin(address, config.kafka).plan(wish)
    summary = f"{_count(plan.changes)} to apply" if plan.changes else "nothing to do"
    if plan.refused:
        summary = f"{len(plan.refused)} refused: apply would change nothing"
    return _print(address, plan, plan.steps, summary, as_json=as_json)


def run_apply(url: str, wish: Wish, config: Config, *, as_json: bool) -> int:
    """Create and alter topics, print what was done or refused; return the exit code."""
    address = parse_url(url)
    applied = _admin(address, config.kafka).apply(wish)
    plan, done = applied.plan, applied.done
    summary = f"{_count(done)} applied" if done else "nothing to do"
    if plan.refused:
        summary = f"{len(plan.refused)} refused: {f'{_count(done)} applied before' if done else 'nothing was changed'}"
    left = [step for step in plan.steps if step not in plan.changes]
    return _print(address, plan, [*done, *left], summary, as_json=as_json)


def _admin(address: Address, settings: KafkaSettings) -> TopicAdmin:
    return TopicAdmin(address, settings.kafka, topics.load(), SystemClock(), timeout_ms=settings.kafka_timeout_ms)


def _print(address: Address, plan: Plan, steps: Sequence[Step], summary: str, *, as_json: bool) -> int:
    if as_json:
        console.print_json({"to": str(address), "summary": summary, "steps": [_as_json(address, step) for step in steps]})
    else:
        for step in steps:
            console.show(_line(address, step))
        console.show(summary)
    return console.FAILED if plan.refused else console.OK


def _as_json(address: Address, step: Step) -> dict[str, Any]:
    return {
        "action": step.action,
        "topic": address.topic(step.topic),
        "setting": step.setting,
        "found": step.found,
        "wanted": step.wanted,
        "note": step.note,
    }


def _line(address: Address, step: Step) -> str:
    has = "missing" if step.found is None else step.found
    text = f"{step.action:6}  {address.topic(step.topic)}  {step.setting}: broker {has}, wanted {step.wanted}"
    return console.printable(text + (f" ({step.note})" if step.note else ""))


def _count(steps: Sequence[Step]) -> str:
    return f"{len(steps)} change{'' if len(steps) == 1 else 's'}"
