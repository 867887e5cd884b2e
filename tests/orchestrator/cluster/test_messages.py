"""A message reaches the processes that know its key, and no others."""

from __future__ import annotations

import pytest

from orchestrator.cluster.messages import Inbox, Message, watch_messages

pytestmark = pytest.mark.slow


def test_a_message_reaches_another_process(ray_session: None) -> None:
    import ray

    def answer(asked: Message, answered: Message) -> None:
        with watch_messages(asked) as inbox:
            while not inbox.has(asked):
                pass
        answered.post(f"got {asked.read()}")

    asked, answered = Message(), Message()
    waiting = ray.remote(num_cpus=1)(answer).remote(asked, answered)
    asked.post("a question")
    ray.get(waiting, timeout=60)
    assert answered.read() == "got a question"


def test_only_the_part_that_is_named_arrives(ray_session: None) -> None:
    message = Message()
    inbox = Inbox([message, message.part("a"), message.part("b"), Message()])
    message.part("a").post()
    assert not inbox.has(message.part("a")), "it has not looked again"
    inbox.look()
    assert [inbox.has(m) for m in (message, message.part("a"), message.part("b"))] == [
        False, True, False,
    ]  # fmt: skip
