"""Worker processes that ask their caller in mid-call, and failures that cross."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from palaestra.gym.outcome import Cause, Failure
from palaestra.gym.worker import shut, worker


def asking(ask, questions):
    return [ask(question) for question in questions]


def hiding(ask):
    try:
        return ask(b"?")
    except BaseException:
        return b"hidden"


def asked_never(ask, value):
    return value


def failing(detail):
    raise Failure(Cause.SANDBOX, detail)


async def shouted(payload):
    await asyncio.sleep(0)
    return payload.upper()


async def lost(payload):
    raise Failure(Cause.SANDBOX, "the box is gone")


async def test_a_worker_asks_its_caller_and_goes_on():
    assert await worker(asking, [b"a", b"b" * 10**6], timeout=20, answers=shouted) == [b"A", b"B" * 10**6]
    assert await worker(asked_never, 3, timeout=20, answers=shouted) == 3
    calls = [worker(asking, [bytes([letter])] * 20, timeout=20, answers=shouted) for letter in b"abcdef"]
    assert await asyncio.gather(*calls) == [[bytes([letter])] * 20 for letter in b"ABCDEF"]


@pytest.mark.parametrize("fn", [asking, hiding])
async def test_an_exception_of_the_answer_reaches_the_caller_whatever_the_worker_does(fn):
    with pytest.raises(Failure, match="the box is gone") as raised:
        await worker(fn, *([[b"a"]] if fn is asking else []), timeout=20, answers=lost)
    assert raised.value.cause is Cause.SANDBOX
    assert await worker(asking, [b"a"], timeout=20, answers=shouted) == [b"A"]


async def test_a_timeout_of_the_answer_is_the_answers_own():
    async def late(payload):
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await worker(asking, [b"a"], timeout=20, answers=late)


async def test_the_deadline_of_the_call_holds_while_it_asks():
    cancelled = asyncio.Event()

    async def never(payload):
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    began = time.monotonic()
    with pytest.raises(Failure, match=r"did not answer within 0.5 s"):
        await worker(asking, [b"a"], timeout=0.5, answers=never)
    assert time.monotonic() - began < 10
    await asyncio.wait_for(cancelled.wait(), 5)


async def test_a_failure_crosses_from_the_worker():
    with pytest.raises(Failure) as raised:
        await worker(failing, "no more boxes", timeout=20)
    assert (raised.value.cause, raised.value.detail) == (Cause.SANDBOX, "no more boxes")


async def test_a_worker_answers_where_more_files_are_open_than_select_knows():
    shut()
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert await worker(asked_never, None, 3, timeout=60) == 3
    finally:
        for descriptor in opened:
            os.close(descriptor)
        shut()
