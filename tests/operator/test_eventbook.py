"""Events that are read when a plan asks for them, and how seldom that is."""

from typing import Any

import pytest

from kubetune_operator.diagnosis import Inquiry
from kubetune_operator.errors import Unreachable
from kubetune_operator.eventbook import EventBook

JOB = Inquiry("Job", "bot-a1", "uid-1")
POD = Inquiry("Pod", "bot-a1-0-x", "uid-2")
FULL = [{"reason": "FailedCreate", "message": "exceeded quota"}]


class Server:
    """What is there to be read, who asked for it, and a clock."""

    def __init__(self) -> None:
        self.events: list[Any] = FULL
        self.asked: list[tuple[str, Inquiry]] = []
        self.now = 0.0
        self.down = False
        self.book = EventBook(self.read, lambda: self.now)

    async def read(self, namespace: str, inquiry: Inquiry) -> list[Any]:
        self.asked.append((namespace, inquiry))
        if self.down:
            raise Unreachable("no answer")
        return self.events


@pytest.fixture
def server() -> Server:
    """A server at whose start nothing has been read."""
    return Server()


async def test_a_plan_that_asks_for_nothing_costs_nothing(server):
    assert await server.book.read("team/bot", ()) is False
    assert (server.asked, server.book.known("team/bot"), server.book.due("team/bot")) == ([], {}, None)


async def test_what_is_asked_for_the_first_time_is_read_at_once(server):
    assert await server.book.read("team/bot", (JOB,)) is True
    assert server.asked == [("team", JOB)]
    assert server.book.known("team/bot") == {JOB: FULL}
    assert server.book.known("team/other") == {}
    assert server.book.due("team/bot") == 5


async def test_the_same_answer_again_is_no_news_and_comes_ever_more_seldom(server):
    await server.book.read("team/bot", (JOB,))
    times = []
    while server.now < 400:
        server.now += 1
        before = len(server.asked)
        assert await server.book.read("team/bot", (JOB,)) is False
        times += [server.now] if len(server.asked) > before else []
    assert times == [5, 15, 35, 75, 135, 195, 255, 315, 375]


async def test_another_answer_is_news(server):
    await server.book.read("team/bot", (JOB,))
    server.now, server.events = 5, []
    assert await server.book.read("team/bot", (JOB,)) is True
    assert server.book.known("team/bot") == {JOB: []}


async def test_what_is_no_longer_asked_for_is_forgotten(server):
    await server.book.read("team/bot", (JOB, POD))
    await server.book.read("team/bot", (POD,))
    assert list(server.book.known("team/bot")) == [POD]
    await server.book.read("team/bot", ())
    assert server.book.due("team/bot") is None


async def test_an_answer_that_fails_leaves_what_was_known(server):
    await server.book.read("team/bot", (JOB,))
    server.now, server.down = 5, True
    assert await server.book.read("team/bot", (JOB,)) is False
    assert server.book.known("team/bot") == {JOB: FULL}
    assert server.book.due("team/bot") == 10
